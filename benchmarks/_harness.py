"""The harness of all benchmarks: competitors in separate processes, round robin, checks, options.

A competitor is an object of any class; `Worker` makes it in a fresh process and calls its methods from this one. The
processes are separate because the idle threads of a library's pool spin for a while, which would slow down the next
competitor. Competitors run round robin: each repeats its call for a fraction of a second, so that load from other
programs slows down all alike. The result is the median over the turns.

The machine's ceilings (`_ceilings.CpuCeilings`) are measured in the same rounds, as two more competitors.
"""

import argparse
import contextlib
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import _plots, _report
from tinycnn.hardware import git_revision

THREAD_VARIABLES = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS", "NPROC")
PAUSE = 0.05  # seconds before a turn, for the threads of other competitors to go to sleep


class WorkerError(Exception):
    """A competitor's failure, in one line."""


# --- processes --------------------------------------------------------------------------------------------------------


def worker_main(pipe: Any, make: Callable, arguments: tuple) -> None:
    """Main function of a worker's process: make the competitor, then serve calls until the pipe is closed."""
    competitor = None
    while True:
        try:
            if competitor is not None:
                name, arguments, seconds, clock = pipe.recv()
        except EOFError:
            return
        try:
            if competitor is None:
                competitor, answer = make(*arguments), None
            elif seconds is None:
                answer = getattr(competitor, name)(*arguments)
            else:
                answer = repeat(getattr(competitor, name), arguments, seconds, getattr(time, clock))
        except ModuleNotFoundError as error:
            pipe.send((f"{error.name} is not installed (pip install {str(error.name).split('.')[0]})", None))
        except Exception as error:
            lines = str(error).strip().splitlines() or [""]
            pipe.send((f"{type(error).__name__}: {lines[0]}"[:300], None))
        else:
            pipe.send((None, answer))
        if competitor is None:
            return


def repeat(function: Callable, arguments: tuple, seconds: float, clock: Callable[[], float]) -> list[float]:
    """Seconds of every call, for about `seconds`, after a warm-up call."""
    time.sleep(PAUSE)
    function(*arguments)
    times: list[float] = []
    start = last = clock()
    while last - start < seconds or not times:
        function(*arguments)
        now = clock()
        times.append(now - last)
        last = now
    return times


class Worker:
    """An object made by `make(*arguments)` in another process, limited to `threads` threads.

    clock  function of `time` that measures calls: "process_time" is the CPU time of the process
    """

    clock = "perf_counter"

    def __init__(self, threads: int, make: Callable, *arguments: Any) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, child_end = context.Pipe()
        with limit_threads(threads):  # inherited by the child
            self.process = context.Process(target=worker_main, args=(child_end, make, arguments), daemon=True)
            self.process.start()
        child_end.close()
        self._receive()

    def _receive(self) -> Any:
        try:
            error, answer = self.pipe.recv()
        except EOFError:
            self.process.join()
            raise WorkerError(f"its process ended with exit status {self.process.exitcode}") from None
        if error:
            raise WorkerError(error)
        return answer

    def call(self, method: str, *arguments: Any) -> Any:
        self.pipe.send((method, arguments, None, self.clock))
        return self._receive()

    def repeat(self, seconds: float, method: str, *arguments: Any) -> list[float]:
        """Seconds of every call of a turn, see `repeat`."""
        self.pipe.send((method, arguments, seconds, self.clock))
        return self._receive()

    def stop(self) -> None:
        self.pipe.close()
        self.process.join(5)
        if self.process.is_alive():
            self.process.terminate()


@contextlib.contextmanager
def limit_threads(threads: int) -> Iterator[None]:
    """Limit processes started in the block to `threads` threads and, where supported, as many cores: some libraries
    ignore the variables (XLA's pool has a thread per core)."""
    previous = {name: os.environ.get(name) for name in THREAD_VARIABLES}
    os.environ |= dict.fromkeys(THREAD_VARIABLES, str(threads))
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    if len(cores) > threads:
        os.sched_setaffinity(0, cores[:threads])
    try:
        yield
    finally:
        if len(cores) > threads:
            os.sched_setaffinity(0, cores)
        for name, value in previous.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value


@contextlib.contextmanager
def busy(count: int) -> Iterator[list[subprocess.Popen]]:
    """During the block, run `count` processes that each keep a core busy. They end with this process at the latest."""
    command = [sys.executable, "-c", "import os\nparent = os.getppid()\nwhile os.getppid() == parent: pass"]
    programs = [subprocess.Popen(command, start_new_session=True) for _ in range(count)]
    try:
        yield programs
    finally:
        for program in programs:
            program.kill()
            program.wait()


def start_workers(threads: int, competitors: Mapping[str, Callable], *arguments: Any) -> dict[str, Worker]:
    """A worker for each competitor (name -> class). Those that fail to start are skipped, with a printed line."""
    workers = {}
    for name, make in competitors.items():
        try:
            workers[name] = Worker(threads, make, *arguments)
        except WorkerError as error:
            print_skipped(name, error)
    return workers


def stop_workers(workers: Mapping[str, Worker]) -> None:
    for worker in workers.values():
        worker.stop()


def print_skipped(name: str, reason: object) -> None:
    print(f"{name} is skipped: {reason}", flush=True)


def call_all(workers: dict[str, Worker], method: str, *arguments: Any) -> dict[str, Any]:
    """The answer of each worker. Workers that fail are stopped and removed from `workers`, with a printed line."""
    answers = {}
    for name, worker in list(workers.items()):
        try:
            answers[name] = worker.call(method, *arguments)
        except WorkerError as error:
            print_skipped(name, error)
            workers.pop(name).stop()
    return answers


# --- times ------------------------------------------------------------------------------------------------------------


def round_robin(jobs: Mapping[str, tuple], turns: int, seconds: float) -> dict[str, list[list[float]]]:
    """Run all jobs (name -> (worker, method, *arguments)) one after another, `turns` times.

    Returns name -> list of turns; a turn is the list of the seconds of its calls.
    """
    times: dict[str, list[list[float]]] = {name: [] for name in jobs}
    for _ in range(turns):
        for name, (worker, *call) in jobs.items():
            times[name].append(worker.repeat(seconds, *call))
    return times


def median(turns: Sequence[Sequence[float]]) -> float:
    """Median over the turns of the mean seconds of a call."""
    return statistics.median(statistics.fmean(turn) for turn in turns)


# --- checking ---------------------------------------------------------------------------------------------------------


def assert_agree(what: str, answers: Mapping[str, Any], reference: str, tolerance: float) -> None:
    """Exit unless all answers equal that of `reference`, to `tolerance` of its largest entry.

    answers: name -> array or number    reference: a name among them
    """
    want = np.asarray(answers[reference], np.float64)
    for name, answer in answers.items():
        got = np.asarray(answer, np.float64)
        if got.shape != want.shape:
            sys.exit(f"{what}: {name} has shape {got.shape}, {reference} {want.shape}")
        error = float(np.abs(got - want).max() / max(np.abs(want).max(), 1e-30))
        if not error <= tolerance:  # true for NaN too
            sys.exit(f"{what}: {name} differs from {reference} by {error:.1e}, allowed {tolerance:.1e}")


# --- options, files ---------------------------------------------------------------------------------------------------


def options(
    command: str, doc: str | None, competitors: Mapping[str, Callable], turns: int = 15, seconds: float = 0.2
) -> argparse.ArgumentParser:
    """A parser with the options that all commands share."""
    parser = argparse.ArgumentParser(
        prog=f"python -m benchmarks {command}", description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--threads", type=int, nargs="+", default=[os.cpu_count()], help="one run for each number")
    add("--turns", type=int, default=turns, help="turns of each competitor")
    add("--seconds", type=float, default=seconds, help="length of a turn")
    add("--busy", type=int, default=0, metavar="N", help="run beside N programs that each keep a core busy")
    if competitors:
        names = ", ".join(name for name in competitors if name != "tinycnn")
        add("--only", nargs="*", metavar="NAME", help=f"tinycnn and these, instead of all of {names}")
    add("--json", type=Path, metavar="FILE", help="write the figures to this file too")
    add("--plots", type=Path, metavar="FOLDER", help="draw the figures, as PNG files in this folder")
    return parser


def parse(
    parser: argparse.ArgumentParser, argv: Sequence[str] | None, competitors: Mapping[str, Callable]
) -> argparse.Namespace:
    """The arguments; `args.only` becomes the selected competitors, name -> class."""
    args = parser.parse_args(argv)
    only = getattr(args, "only", None)
    if unknown := set(only or ()) - set(competitors):
        parser.error(f"--only: unknown {', '.join(sorted(unknown))}, expected {', '.join(competitors)}")
    args.only = {name: c for name, c in competitors.items() if only is None or name in only or name == "tinycnn"}
    return args


def run(
    command: str, args: argparse.Namespace, measure: Callable[[argparse.Namespace, int], list[dict]]
) -> dict[str, Any]:
    """Print the header, collect the rows of `measure(args, threads)` for each number of threads, write the files."""
    result: dict[str, Any] = {
        "command": command,
        "hardware": _report.hardware(),
        "versions": _report.versions(),
        "revision": git_revision(),
        "settings": {k: v for k, v in vars(args).items() if k not in ("json", "plots")} | {"only": list(args.only)},
        "rows": [],
    }
    print(_report.header(result))
    with busy(args.busy):
        for threads in args.threads:
            result["rows"] += measure(args, threads)
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(result, indent=1) + "\n")
    if args.plots:
        _plots.draw(result, args.plots)
    return result
