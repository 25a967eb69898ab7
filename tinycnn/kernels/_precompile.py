"""Compile all kernels of a step before it runs, in several processes.

Numba compiles one function at a time, on its first call.  Worker processes compile others at the same time; this
process loads their results from the cache on disk.
"""

import collections
import contextlib
import importlib
import os
import pickle
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
from numba.core.dispatcher import Dispatcher

from tinycnn.kernels._cache import is_cached
from tinycnn.kernels._capture import Call, Step, trace_calls
from tinycnn.kernels._jit import dispatchers

Task = tuple[Any, dict[Any, None]]  # a dispatcher, and the argument types to compile it for

PROCESSES = 3  # more would wait for the one with the longest kernel
FEW = 3  # compiling this many kernels takes hardly longer than starting a process
JOIN_TIMEOUT = 120  # seconds for a worker to finish its last kernel; then this process compiles it
WORKER_FLAG = "TINYCNN_COMPILES_FOR_ANOTHER"  # environment variable, set in workers: they start no workers


def precompile(step: Step) -> None:
    """Compile every kernel that `step`, a function without arguments, would call.  No kernel is run."""
    calls: list[Call] = []
    with contextlib.suppress(Exception), np.errstate(all="ignore"):  # an error is raised again when the step runs
        trace_calls(step, calls, dry_run=True)
    # One task for all types of a kernel: the second compilation reuses much of the first.
    tasks: dict[Any, dict[Any, None]] = {}
    for function, args in calls:
        if isinstance(function, Dispatcher) and function.py_func.__module__.startswith("tinycnn."):
            types = tuple(map(function.typeof_pyval, args))
            if types not in function.overloads:
                tasks.setdefault(function, {})[types] = None
    # The slowest to compile first: those with the most arguments, as a rule.
    queue = collections.deque(sorted(tasks.items(), key=lambda task: -len(next(iter(task[1])))))
    workers: list[_Worker] = []
    may_start = WORKER_FLAG not in os.environ and not getattr(sys, "frozen", False)
    with contextlib.ExitStack() as stack:
        while True:
            try:
                function, signatures = queue.popleft()
            except IndexError:
                break
            misses = sum(function.stats.cache_misses.values())
            for types in signatures:
                function.compile(types)
            compiled = is_cached(function) and sum(function.stats.cache_misses.values()) > misses
            if may_start and compiled and len(queue) > FEW:
                may_start = False
                for _ in range(min(PROCESSES, _processors()) - 1):
                    with contextlib.suppress(OSError):  # sys.executable is not a Python that can be started
                        workers.append(stack.enter_context(_Worker(queue)))
        for worker in workers:
            worker.join(JOIN_TIMEOUT)
    for function, signatures in tasks.items():
        for types in signatures:
            function.compile(types)  # from the cache, unless a worker failed


def _processors() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class _Worker:
    """A process that compiles tasks from `queue` until that is empty."""

    def __init__(self, queue: collections.deque[Task]) -> None:
        code = f"import sys; sys.path.append(sys.argv[1]); from {__name__} import worker_main; worker_main()"
        self.process: Any = subprocess.Popen(
            [str(sys.executable), "-c", code, str(Path(__file__).parents[2])],
            env=os.environ | {WORKER_FLAG: "1", "PYTHONSAFEPATH": "1"},
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        self.thread = threading.Thread(target=self._feed, args=(queue,), daemon=True)
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

    def _feed(self, queue: collections.deque[Task]) -> None:
        """Send one task after another.  If the process dies, this one compiles its last task."""
        with contextlib.suppress(IndexError, OSError, ValueError, pickle.PicklingError):
            while self.process.stdout.readline():  # ready for a task
                function, signatures = queue.popleft()
                self.has_task = True
                name = function.py_func.__module__, function.py_func.__qualname__
                pickle.dump((*name, [*signatures]), self.process.stdin)
                self.process.stdin.flush()


def worker_main() -> None:
    """The loop of a worker: print a line when ready, read a task from standard input, compile it."""
    with contextlib.suppress(EOFError, KeyboardInterrupt):
        while True:
            print(flush=True)
            module, name, signatures = pickle.load(sys.stdin.buffer)
            importlib.import_module(module)
            for types in signatures:
                dispatchers[module, name].compile(types)
