"""Compiling all that a step needs before it is taken, in several processes.

Numba compiles one function at a time, when it is first called, and keeps the result in its cache on disk.  So other
processes can compile too: they leave what they have compiled in the cache, from where this one loads it.
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
from tinycnn.kernels._capture import trace_calls
from tinycnn.kernels._jit import dispatchers

PROCESSES = 3  # with more, all would wait for the one with the longest kernel
FEW = 3  # so many kernels take hardly longer than starting a process
JOIN_TIMEOUT = 120  # seconds for another process to end what it has begun, before it is compiled here
WORKER_FLAG = "TINYCNN_COMPILES_FOR_ANOTHER"  # in the environment of the other processes, which start no more


def precompile(step):
    """Compile every kernel that `step`, a function without arguments, would call; none of them is run."""
    calls: list = []
    with contextlib.suppress(Exception), np.errstate(all="ignore"):  # what fails here fails again when it is run
        trace_calls(step, calls, dry_run=True)
    # All types of a kernel stay together: who compiles the second finds much of the first done.
    wanted: dict = {}
    for function, args in calls:
        if isinstance(function, Dispatcher) and function.py_func.__module__.startswith("tinycnn."):
            types = tuple(map(function.typeof_pyval, args))
            if types not in function.overloads:
                wanted.setdefault(function, {})[types] = None
    # The longest should be first, and those with many arguments tend to be long.
    waiting = collections.deque(sorted(wanted.items(), key=lambda one: -len(next(iter(one[1])))))
    others: list = []
    may_start = WORKER_FLAG not in os.environ and not getattr(sys, "frozen", False)
    with contextlib.ExitStack() as ending:
        while True:
            try:
                function, kinds = waiting.popleft()
            except IndexError:
                break
            missed = sum(function.stats.cache_misses.values())
            for types in kinds:
                function.compile(types)
            compiled_here = is_cached(function) and sum(function.stats.cache_misses.values()) > missed
            if may_start and compiled_here and len(waiting) > FEW:
                may_start = False
                for _ in range(min(PROCESSES, _processors()) - 1):
                    with contextlib.suppress(OSError):  # where this process is no Python that can be started again
                        others.append(ending.enter_context(_Process(waiting)))
        for one in others:
            one.end(JOIN_TIMEOUT)
    for function, kinds in wanted.items():
        for types in kinds:
            function.compile(types)  # from the cache, or here after all


def _processors():
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class _Process:
    """A process that compiles what it takes from `waiting`, until nothing is left."""

    def __init__(self, waiting):
        worker_main = f"import sys; sys.path.append(sys.argv[1]); from {__name__} import worker_main; worker_main()"
        self.process: Any = subprocess.Popen(
            [str(sys.executable), "-c", worker_main, str(Path(__file__).parents[2])],
            env=os.environ | {WORKER_FLAG: "1", "PYTHONSAFEPATH": "1"},
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        self.thread = threading.Thread(target=self._feed, args=(waiting,), daemon=True)
        self.began = False  # to compile

    def __enter__(self):
        self.thread.start()
        return self

    def end(self, patience):
        """Wait for what it is compiling, but not for it to be ready, now that nothing is left."""
        if self.began:
            self.thread.join(patience)

    def __exit__(self, *_):
        self.process.kill()
        self.process.wait()
        self.thread.join()
        for pipe in (self.process.stdin, self.process.stdout):
            with contextlib.suppress(OSError):  # what it was told, and did not read any more
                pipe.close()

    def _feed(self, waiting):
        """Hand over one kernel after the other.  If the process dies, what it had is compiled in this one."""
        with contextlib.suppress(IndexError, OSError, ValueError, pickle.PicklingError):
            while self.process.stdout.readline():  # ready, or done with one
                function, kinds = waiting.popleft()
                self.began = True
                pickle.dump((function.py_func.__module__, function.py_func.__qualname__, [*kinds]), self.process.stdin)
                self.process.stdin.flush()


def worker_main():
    """Compile what standard input names, and say so after each: what the other processes do."""
    with contextlib.suppress(EOFError, KeyboardInterrupt):
        while True:
            print(flush=True)
            module, name, kinds = pickle.load(sys.stdin.buffer)
            importlib.import_module(module)
            for types in kinds:
                dispatchers[module, name].compile(types)
