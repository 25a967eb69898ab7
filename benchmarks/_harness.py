"""What all benchmarks share: competitors in processes of their own, turns, hardware, tables, files.

A competitor is an object of any class; `Worker` makes it in a fresh process and calls its methods from here.  Of its
own, because the idle threads of one library's pool spin for a while, and would take the processor from the next one's.
Competitors take turns: each repeats its call for a fraction of a second, then the next one does, round after round, so
that whatever else the machine is doing meets all of them alike.  The median of the turns is what counts.

The machine's ceilings are measured in the same rounds, as two more competitors: `_ceilings.CpuCeilings`.
"""

import argparse
import contextlib
import json
import multiprocessing
import os
import platform
import statistics
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path

import numpy as np

from tinycnn.hardware import git_revision, processor

PACKAGES = ("tinycnn", "numpy", "numba", "torch", "jax", "onnxruntime", "onnx", "scipy")
THREAD_VARIABLES = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS", "NPROC")
PAUSE = 0.05  # seconds before a turn, until the others' threads sleep


class WorkerError(Exception):
    """What a competitor could not do, in a line."""


# --- processes --------------------------------------------------------------------------------------------------------


def worker_main(pipe, make, arguments):
    """The life of a worker's process: make the competitor, then call what it is told to call, until the pipe ends."""
    competitor = None
    while True:
        try:
            name, arguments, seconds = ("make", arguments, None) if competitor is None else pipe.recv()
        except EOFError:
            return
        try:
            if competitor is None:
                competitor, answer = make(*arguments), None
            elif seconds is None:
                answer = getattr(competitor, name)(*arguments)
            else:
                answer = repeat(getattr(competitor, name), arguments, seconds)
        except ModuleNotFoundError as error:
            pipe.send((f"{error.name} is not installed (pip install {str(error.name).split('.')[0]})", None))
        except Exception as error:
            words = str(error).strip().splitlines() or [""]
            pipe.send((f"{type(error).__name__}: {words[0]}"[:300], None))
        else:
            pipe.send((None, answer))
        if competitor is None:
            return


def repeat(function, arguments, seconds):
    """Seconds of every call, for about `seconds`; one before them is not counted."""
    time.sleep(PAUSE)
    function(*arguments)
    times: list[float] = []
    start = last = time.perf_counter()
    while last - start < seconds or not times:
        function(*arguments)
        now = time.perf_counter()
        times.append(now - last)
        last = now
    return times


class Worker:
    """The near end of `worker_main`: an object made by `make(*arguments)` in another process, with so many threads."""

    def __init__(self, threads, make, *arguments):
        context = multiprocessing.get_context("spawn")
        self.pipe, far = context.Pipe()
        with limit_threads(threads):  # which the child inherits
            self.process = context.Process(target=worker_main, args=(far, make, arguments), daemon=True)
            self.process.start()
        far.close()
        self._answer()

    def _answer(self):
        try:
            error, answer = self.pipe.recv()
        except EOFError:
            self.process.join()
            raise WorkerError(f"its process ended with exit status {self.process.exitcode}") from None
        if error:
            raise WorkerError(error)
        return answer

    def call(self, method, *arguments):
        self.pipe.send((method, arguments, None))
        return self._answer()

    def turn(self, seconds, method, *arguments):
        """Seconds of every call of a turn, see `repeat`."""
        self.pipe.send((method, arguments, seconds))
        return self._answer()

    def stop(self):
        self.pipe.close()
        self.process.join(5)
        if self.process.is_alive():
            self.process.terminate()


@contextlib.contextmanager
def limit_threads(threads):
    """Processes started inside have so many threads, and, where the system can, so many cores, for libraries that do
    not ask (XLA's pool has a thread a core)."""
    before = {name: os.environ.get(name) for name in THREAD_VARIABLES}
    os.environ |= dict.fromkeys(THREAD_VARIABLES, str(threads))
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    if len(cores) > threads:
        os.sched_setaffinity(0, cores[:threads])
    try:
        yield
    finally:
        if len(cores) > threads:
            os.sched_setaffinity(0, cores)
        for name, value in before.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value


@contextlib.contextmanager
def busy(programs):
    """So many other processes keep a core busy each, inside, and as long as this one lives."""
    command = [sys.executable, "-c", "import os\nparent = os.getppid()\nwhile os.getppid() == parent: pass"]
    loops = [subprocess.Popen(command, start_new_session=True) for _ in range(programs)]
    try:
        yield loops
    finally:
        for loop in loops:
            loop.kill()
            loop.wait()


def start_workers(threads, kinds, *arguments):
    """A worker for each of `kinds` (a dict: name -> class); those that cannot be made are left out, with a line."""
    workers = {}
    for name, make in kinds.items():
        try:
            workers[name] = Worker(threads, make, *arguments)
        except WorkerError as error:
            skip(name, error)
    return workers


def stop_workers(workers):
    for worker in workers.values():
        worker.stop()


def skip(name, reason):
    print(f"{name} is skipped: {reason}", flush=True)


def call_all(workers, method, *arguments):
    """The answer of each worker; one that fails is stopped and leaves `workers`, with a line."""
    answers = {}
    for name, worker in list(workers.items()):
        try:
            answers[name] = worker.call(method, *arguments)
        except WorkerError as error:
            skip(name, error)
            workers.pop(name).stop()
    return answers


# --- turns ------------------------------------------------------------------------------------------------------------


def round_robin(jobs, turns, seconds):
    """Run all `jobs` (name -> (worker, method, *arguments)) in turn, `turns` times.

    Returns for each a list of turns, each a list of the seconds of its calls.
    """
    times: dict[str, list[list[float]]] = {name: [] for name in jobs}
    for _ in range(turns):
        for name, (worker, *call) in jobs.items():
            times[name].append(worker.turn(seconds, *call))
    return times


def median(turns):
    """Median over the turns of the mean seconds of a call."""
    return statistics.median(statistics.fmean(turn) for turn in turns)


# --- checking ---------------------------------------------------------------------------------------------------------


def assert_agree(what, answers, reference, tolerance):
    """Stop unless everybody's answer (arrays or numbers) is that of `reference`, to `tolerance` of its largest entry.

    answers: name -> answer    reference: a name among them
    """
    want = np.asarray(answers[reference], np.float64)
    for name, answer in answers.items():
        got = np.asarray(answer, np.float64)
        if got.shape != want.shape:
            sys.exit(f"{what}: {name} has shape {got.shape}, {reference} {want.shape}")
        error = float(np.abs(got - want).max() / max(np.abs(want).max(), 1e-30))
        if not error <= tolerance:  # not: NaN
            sys.exit(f"{what}: {name} differs from {reference} by {error:.1e}, allowed are {tolerance:.1e}")


# --- options, head line, tables, files --------------------------------------------------------------------------------


def options(command, doc, competitors, turns=15, seconds=0.2):
    """The parser that all commands begin with."""
    parser = argparse.ArgumentParser(
        prog=f"python -m benchmarks {command}", description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, nargs="+", default=[os.cpu_count()], help="several: one after the other")
    parser.add_argument("--turns", type=int, default=turns, help="turns of each competitor")
    parser.add_argument("--seconds", type=float, default=seconds, help="length of a turn")
    parser.add_argument("--busy", type=int, default=0, metavar="N", help="beside N programs that keep a core busy each")
    if competitors:
        names = ", ".join(name for name in competitors if name != "tinycnn")
        parser.add_argument("--only", nargs="*", metavar="NAME", help=f"tinycnn and these, not all of {names}")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here too")
    parser.add_argument("--plots", type=Path, metavar="FOLDER", help="draw them, PNG files in this folder")
    return parser


def parse(parser, argv, competitors):
    """The arguments; `args.only` becomes the competitors that are to run: name -> class."""
    args = parser.parse_args(argv)
    only = getattr(args, "only", None)
    if unknown := set(only or ()) - set(competitors):
        parser.error(f"--only: there is no {', '.join(sorted(unknown))}, but {', '.join(competitors)}")
    args.only = {name: c for name, c in competitors.items() if only is None or name in only or name == "tinycnn"}
    return args


def run(command, args, measure):
    """Print the head line, collect the rows of `measure(args, threads)` for all numbers of threads, write the files."""
    result = {
        "command": command,
        "hardware": hardware(),
        "versions": versions(),
        "revision": git_revision(),
        "settings": {k: v for k, v in vars(args).items() if k not in ("json", "plots")} | {"only": list(args.only)},
        "rows": [],
    }
    print(header(result))
    with busy(args.busy):
        for threads in args.threads:
            result["rows"] += measure(args, threads)
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(result, indent=1) + "\n")
    if args.plots:
        from benchmarks import _plots

        _plots.draw(result, args.plots)
    return result


def hardware():
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    found = {"processor": processor(), "cores": cores, "system": f"{platform.system()} {platform.machine()}"}
    with contextlib.suppress(AttributeError, ValueError, OSError):
        found["memory_gb"] = round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    return found


def versions():
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def header(result):
    machine, what = result["hardware"], ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    threads = " and ".join(map(str, result["settings"]["threads"]))
    memory = f"{machine['memory_gb']:g} GB, " if "memory_gb" in machine else ""
    where = f"{machine['processor']}, {machine['cores']} cores, {memory}{machine['system']}"
    return f"{where}; threads: {threads}{busy_note(result)}\n{what}"


def busy_note(result):
    """Words on the programs that kept cores busy meanwhile (older files do not say)."""
    programs = result["settings"].get("busy", 0)
    return f", beside {programs} busy program{'s' * (programs > 1)}" if programs > 0 else ""


def table(head, widths):
    """Print a head; returns a function that prints a row below it.  None becomes a dash."""

    def line(*cells):
        words = ["-" if cell is None else str(cell) for cell in cells]
        text = [f"{c:<{w}}" if i == 0 else f"{c:>{w}}" for i, (c, w) in enumerate(zip(words, widths, strict=True))]
        print("  ".join(text).rstrip(), flush=True)

    line(*head)
    print("-" * (sum(widths) + 2 * (len(widths) - 1)))
    return line
