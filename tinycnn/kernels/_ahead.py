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

from tinycnn.kernels._jit import compiled
from tinycnn.kernels._record import calls_of

PROCESSES = 3  # with more, all would wait for the one with the longest kernel
FEW = 3  # so many kernels take hardly longer than starting a process


def compile_for(step):
    """Compile every kernel that `step`, a function without arguments, would call; none of them is run."""
    calls: list = []
    # Other code in it is run, a loss in plain NumPy say, and meets whatever the arrays hold; its turn to fail is later.
    with contextlib.suppress(Exception), np.errstate(all="ignore"):
        calls_of(step, calls, only=True)
    wanted: dict = {}
    for function, args in calls:
        if isinstance(function, Dispatcher) and function.py_func.__module__.startswith("tinycnn."):
            types = tuple(map(function.typeof_pyval, args))
            if types not in function.overloads:
                wanted[function, types] = None
    # The longest should be first, and those with many arguments tend to be long.
    waiting = collections.deque(sorted(wanted, key=lambda one: -len(one[1])))
    others: list = []
    with contextlib.ExitStack() as ending:
        while True:
            try:
                function, types = waiting.popleft()
            except IndexError:
                break
            function.compile(types)
            if not others and function.stats.cache_misses and len(waiting) > FEW:
                with contextlib.suppress(OSError):  # where this process is no Python that can be started again
                    others += [
                        ending.enter_context(_Process(waiting)) for _ in range(min(PROCESSES, _processors()) - 1)
                    ]
        for one in others:
            one.thread.join()
    for function, types in wanted:
        function.compile(types)  # from the cache, or here after all


def _processors():
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class _Process:
    """A process that compiles what it takes from `waiting`, until nothing is left."""

    def __init__(self, waiting):
        root = str(Path(__file__).parents[2])
        path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
        command = [str(sys.executable), "-c", f"from {__name__} import _serve; _serve()"]
        self.process: Any = subprocess.Popen(
            command, env=os.environ | {"PYTHONPATH": path}, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )  # fmt: skip
        self.thread = threading.Thread(target=self._feed, args=(waiting,), daemon=True)

    def __enter__(self):
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.wait()
        self.process.stdin.close()
        self.process.stdout.close()

    def _feed(self, waiting):
        """Hand over one kernel after the other.  If the process dies, what it had is compiled in this one."""
        with contextlib.suppress(IndexError, OSError):
            while self.process.stdout.readline():  # ready, or done with one
                function, types = waiting.popleft()
                pickle.dump((function.py_func.__module__, function.py_func.__qualname__, types), self.process.stdin)
                self.process.stdin.flush()


def _serve():
    """Compile what standard input names, and say so after each: what the other processes do."""
    with contextlib.suppress(EOFError, KeyboardInterrupt):
        while True:
            print(flush=True)
            module, name, types = pickle.load(sys.stdin.buffer)
            importlib.import_module(module)
            compiled[module, name].compile(types)
