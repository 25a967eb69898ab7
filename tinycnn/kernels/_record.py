"""Steps that are recorded and replayed.

Of the time of a small kernel more than half goes into finding it: which layer comes next, the view of its buffer, the
code for these types.  All of that is the same in every step, so it is done once: the calls of kernels are written down,
and from then on they are all that happens, on the same arrays and numbers, one after the other.
"""

import contextlib
import functools
import os
import sys
import threading
from typing import Any

import numpy as np
from numba.core.dispatcher import Dispatcher

from tinycnn.kernels._pace import Pace

# Numba's portable thread pool ("workqueue", the only one on macOS) aborts the process when two threads enter it.
one_at_a_time = threading.RLock()


class _Here(threading.local):
    """What is known of this thread: the calls that are being recorded, and whether they are not to be made; whether the
    last kernel ran on one thread."""

    calls: list | None = None
    only = False
    alone = False


here = _Here()


class _Process:
    """forks: how many lie between this process and one whose threads it cannot use: those of a thread pool are not
    there in a forked child, and GNU OpenMP's ends a child that asks for them."""

    forks = 0


process = _Process()


def _in_child():
    pool = sys.modules.get("numba.np.ufunc.parallel")
    process.forks += getattr(pool, "_is_initialized", False)
    one_at_a_time.release()


if hasattr(os, "register_at_fork"):  # no other thread may be within a kernel: its lock would never be given back
    os.register_at_fork(
        before=one_at_a_time.acquire, after_in_parent=one_at_a_time.release, after_in_child=_in_child
    )  # fmt: skip


def recorded(function):
    """`function`, whose calls `Recorded` is to see: a compiled one, or a plain one that changes arrays."""

    @functools.wraps(function)
    def call(*args):
        if here.calls is not None:
            here.calls.append((function, args))
        if not here.only:
            function(*args)

    return call


def calls_of(step, calls, only=False):
    """Append (function, arguments) of the kernels that `step()` calls to `calls`; if `only`, it calls them in vain."""
    here.calls, here.only = calls, only
    try:
        step()
    finally:
        here.calls, here.only = None, False


class Recorded:
    """`step`, a function without arguments, to be called like it.

    The first call is recorded, the third and all later ones are replayed.  The second is done both ways: if what it
    leaves behind (in `outputs` and in the one-dimensional arrays: parameters, gradients, counters) is not the same to
    the bit, something changes arrays that is no kernel, a loss in plain NumPy say, and the step goes on as it is.
    """

    def __init__(self, step, outputs=()):
        self.step, self.outputs, self.forks = step, outputs, process.forks
        self.calls: list = []  # (function, arguments)
        self.checked = self.refused = False
        self.pace: Any = contextlib.nullcontext()

    def __call__(self):
        if self.forks != process.forks:  # recorded by a parent, which had threads
            self.__init__(self.step, self.outputs)  # type: ignore[misc]
        if here.calls is not None or self.refused:  # or a larger step is being recorded, of which this is a part
            self.step()
        elif self.checked:
            self.replay()
        elif self.calls:
            self.check()
        else:
            self.record()

    def record(self):
        calls: list = []
        calls_of(self.step, calls)
        self.calls = [(_machine_code(function, args), args) for function, args in calls]
        if any(isinstance(f, Dispatcher) and f.targetoptions.get("parallel") for f, _ in calls):
            self.pace = Pace()

    def replay(self):
        with one_at_a_time, self.pace:
            for function, args in self.calls:
                function(*args)

    def check(self):
        """Replay, undo it, take the step, and compare."""
        arrays = (a for _, args in self.calls for a in args if type(a) is np.ndarray)
        flat = {(a.ctypes.data, a.size): a for a in arrays if a.ndim == 1 and a.flags.writeable}
        lasting = [*flat.values(), *self.outputs]
        before = [a.copy() for a in lasting]
        self.replay()
        replayed = [a.tobytes() for a in lasting]
        for a, was in zip(lasting, before, strict=True):
            a[...] = was
        self.step()
        self.checked = replayed == [a.tobytes() for a in lasting]
        if not self.checked:
            self.refused, self.calls = True, []


def _machine_code(function, args):
    """What a compiled function runs for arguments of these types."""
    if not isinstance(function, Dispatcher):
        return function
    found = function.overloads.get(tuple(map(function.typeof_pyval, args)))
    return found.entry_point if found else function
