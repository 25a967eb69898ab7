"""The thread policy: the number of threads of a single call, and of a captured step.

It affects only the time: results are bitwise the same for any number of threads.
"""

import os
import sys
import threading
import time
from typing import Any

import numba
import numpy as np

# Numba's portable thread pool ("workqueue", the only one on macOS) aborts the process when two threads enter it.
pool_lock = threading.RLock()


class _Process:
    """forks: the number of forks between this process and one whose threads it cannot use.

    The threads of a pool do not exist in a forked child, and GNU OpenMP kills a child that uses them.
    """

    forks = 0


process = _Process()


def _in_child() -> None:
    parallel = sys.modules.get("numba.np.ufunc.parallel")
    process.forks += getattr(parallel, "_is_initialized", False)
    pool_lock.release()


if hasattr(os, "register_at_fork"):  # the child must not inherit a lock that another thread holds
    os.register_at_fork(before=pool_lock.acquire, after_in_parent=pool_lock.release, after_in_child=_in_child)

# --- a call -----------------------------------------------------------------------------------------------------------
# NCHW calls run on one thread if their arrays have at most SERIAL_ELEMENTS numbers in all, or SMALL_BATCH_ELEMENTS for
# at most SMALL_BATCH images: starting and joining two threads takes 2 us, reading what another core wrote longer.
SMALL_BATCH, SMALL_BATCH_ELEMENTS, SERIAL_ELEMENTS = 7, 120_000, 20_000
SERIAL_MULTIPLY_ADDS = 1_000_000  # of a convolution, at most, if the others run serially: 20 us or less
# In a captured step, a parameter kernel over at most this many parameters runs serially if the kernel before it does.
SERIAL_PARAMETERS = 100_000


def runs_serial(args: tuple[Any, ...], kind: str, trace: Any) -> Any:
    """Whether a kernel runs on one thread when it is called with these arguments.

    kind: "parameter" or "convolution", see _jit.py, or ""
    trace: see _capture.py; remembers the decision for the next kernel
    """
    if kind == "parameter" and trace.calls is not None:
        return trace.serial and args[0].size <= SERIAL_PARAMETERS
    trace.serial = False
    if args[0].ndim < 5:  # not blocked, see layout.py
        elements = 0
        for a in args:
            if type(a) is np.ndarray:
                elements += a.size
        trace.serial = elements <= (SMALL_BATCH_ELEMENTS if len(args[0]) <= SMALL_BATCH else SERIAL_ELEMENTS)
        if kind == "convolution":
            trace.serial &= args[0].size * args[2][0].size <= SERIAL_MULTIPLY_ADDS
    return trace.serial


# --- a captured step --------------------------------------------------------------------------------------------------
# Threads are joined after every loop.  If one of them loses its core to another program, the others wait for it, longer
# than many steps take; then one thread is faster.  So the policy times all parallel steps, and a few serial steps
# from time to time.

PROBE_STEPS = 5  # consecutive serial steps that are timed
WINDOW = 0.05  # seconds of parallel steps to compare with them, at least
LOSSES = 2  # consecutive comparisons that parallel steps must lose before the policy stays serial; one may be chance
PROBE_BUDGET = 0.005  # largest share of the time that is spent on probing

clock = time.perf_counter


class ThreadPolicy:
    """A context manager around a captured step: sets all threads, or one while that is faster."""

    def __init__(self) -> None:
        self.available = self.used = 1  # threads
        self.parallel, self.serial_seconds, self.losses = False, 0.0, 0
        self.steps, self.seconds = 0, 0.0  # since the last change of mode
        self.started = self.probe_at = 0.0  # times: start of the step, next probe of the other mode

    def __enter__(self) -> None:
        self.started, self.available = clock(), numba.get_num_threads()
        self.used = self.available if self.parallel else 1
        if self.used != self.available:
            numba.set_num_threads(self.used)

    def __exit__(self, *error: object) -> None:
        if self.used != self.available:
            numba.set_num_threads(self.available)
        if self.available == 1:
            return
        now = clock()
        self.steps, self.seconds = self.steps + 1, self.seconds + now - self.started
        if not self.parallel:
            if self.steps >= PROBE_STEPS and now >= self.probe_at:
                self.serial_seconds = self.seconds / self.steps
                self._switch(True, now + PROBE_STEPS * self.serial_seconds / PROBE_BUDGET)
        elif self.seconds > self.serial_seconds * max(self.steps, PROBE_STEPS):
            self.losses += 1
            self._switch(False, now + (self.seconds / PROBE_BUDGET if self.losses >= LOSSES else 0.0))
        elif self.steps >= PROBE_STEPS and self.seconds >= WINDOW:
            self.losses = 0
            self._switch(now < self.probe_at, self.probe_at)

    def _switch(self, parallel: bool, probe_at: float) -> None:
        self.parallel, self.probe_at, self.steps, self.seconds = parallel, probe_at, 0, 0.0
