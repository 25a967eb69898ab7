"""Compile all kernels of a step before it runs, in several processes.

Numba compiles one function at a time, on its first call.  Worker processes compile others at the same time; this
process loads their results from the cache on disk.
"""

import collections
import contextlib
import gc
import importlib
import os
import pickle
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numba.core.dispatcher import Dispatcher

from tinycnn._typing import CompileProgress
from tinycnn.kernels._cache import can_save, is_cached
from tinycnn.kernels._capture import Call, Step, trace_calls
from tinycnn.kernels._jit import dispatchers

Task = tuple[Any, dict[Any, None]]  # a dispatcher, and the argument types to compile it for

PROCESSES = 3  # more would wait for the one with the longest kernel
FEW = 3  # compiling this many kernels takes hardly longer than starting a process
JOIN_TIMEOUT = 120  # seconds for a worker to finish its last kernel; then this process compiles it
WORKER_FLAG = "TINYCNN_COMPILES_FOR_ANOTHER"  # environment variable, set in workers: they start no workers


def precompile(step: Step, on_progress: CompileProgress | None = None) -> None:
    """Compile every kernel that `step`, a function without arguments, would call.  No kernel is run.

    on_progress  called as on_progress(0, total, "", 0.0) if any of the kernels have to be compiled, `total` of them,
                 and after each as on_progress(done, total, name, seconds); maybe by another thread
    """
    calls: list[Call] = []
    with contextlib.suppress(Exception), np.errstate(all="ignore"):  # an error is raised again when the step runs
        trace_calls(step, calls, dry_run=True)
    # One task for all types of a kernel: the second compilation reuses much of the first.
    tasks: dict[Any, dict[Any, None]] = {}
    for function, args in calls:
        if isinstance(function, Dispatcher) and function.py_func.__module__.startswith("tinycnn."):
            types = tuple(map(function.typeof_pyval, args))
            if types not in function.overloads:
                if is_cached(function, types):
                    function.compile(types)  # loads it
                else:
                    tasks.setdefault(function, {})[types] = None
    ordered = sorted(tasks.items(), key=_size, reverse=True)  # the last tasks are short, so all processes end together
    queue, progress = collections.deque(ordered), _Report(len(ordered), on_progress)
    workers: list[_Worker] = []
    may_start = WORKER_FLAG not in os.environ and not getattr(sys, "frozen", False)
    with contextlib.ExitStack() as stack:
        if may_start and len(tasks) > FEW and all(map(can_save, tasks)):
            for _ in range(min(PROCESSES, _processors()) - 1):
                with contextlib.suppress(OSError):  # sys.executable is not a Python that can be started
                    workers.append(stack.enter_context(_Worker(queue, progress)))
        stack.enter_context(_without_gc())
        while True:
            try:
                function, signatures = queue.popleft()
            except IndexError:
                break
            start = time.perf_counter()
            for types in signatures:
                function.compile(types)
            progress(function, time.perf_counter() - start)
        for worker in workers:
            worker.join(JOIN_TIMEOUT)
    for function, signatures in tasks.items():
        for types in signatures:
            function.compile(types)  # from the cache, unless a worker failed


def _size(task: Task) -> tuple[bool, int]:
    """Orders tasks by the time they take, roughly: a parallel kernel is compiled in three parts, and one with more
    arguments, of more axes, has more loops."""
    function, signatures = task
    return bool(function.targetoptions.get("parallel")), sum(getattr(t, "ndim", 1) for t in next(iter(signatures)))


class _Report:
    """Calls `on_progress` of `precompile`, by one thread at a time."""

    def __init__(self, total: int, on_progress: CompileProgress | None) -> None:
        self.done, self.total, self.on_progress, self.lock = 0, total, on_progress, threading.Lock()
        if total and on_progress is not None:
            on_progress(0, total, "", 0.0)

    def __call__(self, function: Any, seconds: float) -> None:
        with self.lock:
            self.done += 1
            if self.on_progress is not None:
                name = f"{function.py_func.__module__.rpartition('.')[2]}.{function.py_func.__qualname__}"
                self.on_progress(self.done, self.total, name, seconds)


@contextlib.contextmanager
def _without_gc() -> Iterator[None]:
    """Garbage collection is off in the block: Numba makes millions of objects, and few cycles among them."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _processors() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class _Worker:
    """A process that compiles tasks from `queue` until that is empty."""

    def __init__(self, queue: collections.deque[Task], progress: "_Report") -> None:
        code = f"import sys; sys.path.append(sys.argv[1]); from {__name__} import worker_main; worker_main()"
        self.process: Any = subprocess.Popen(
            [str(sys.executable), "-c", code, str(Path(__file__).parents[2])],
            env=os.environ | {WORKER_FLAG: "1", "PYTHONSAFEPATH": "1"},
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        self.thread = threading.Thread(target=self._feed, args=(queue, progress), daemon=True)
        self.has_task = False  # or has had one

    def __enter__(self) -> "_Worker":
        self.thread.start()
        return self

    def join(self, timeout: float) -> None:
        """Wait for a running compile; do not wait for a worker that never started on one."""
        if self.has_task:
            self.thread.join(timeout)

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        self.thread.join()
        for pipe in (self.process.stdin, self.process.stdout):
            with contextlib.suppress(OSError):  # with a task that the process has not read
                pipe.close()

    def _feed(self, queue: collections.deque[Task], progress: "_Report") -> None:
        """Send one task after another.  If the process dies, this one compiles its last task."""
        with contextlib.suppress(IndexError, OSError, ValueError, pickle.PicklingError):
            ready = self.process.stdout.readline()
            while ready:
                function, signatures = queue.popleft()
                started, self.has_task = time.perf_counter(), True
                name = function.py_func.__module__, function.py_func.__qualname__
                pickle.dump((*name, [*signatures]), self.process.stdin)
                self.process.stdin.flush()
                ready = self.process.stdout.readline()
                if ready:
                    progress(function, time.perf_counter() - started)


def worker_main() -> None:
    """The loop of a worker: print a line when ready, read a task from standard input, compile it.  It ends if it cannot
    save what it compiles."""
    gc.disable()
    function = None
    with contextlib.suppress(EOFError, KeyboardInterrupt):
        while function is None or can_save(function):
            print(flush=True)
            module, name, signatures = pickle.load(sys.stdin.buffer)
            importlib.import_module(module)
            function = dispatchers[module, name]
            for types in signatures:
                function.compile(types)
