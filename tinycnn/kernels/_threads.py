"""On how many threads kernels run: a single call, and a captured step.

For any number of threads the results are the same to the bit, so this is about time alone.
"""

import os
import sys
import threading
import time

import numba
import numpy as np

# Numba's portable thread pool ("workqueue", the only one on macOS) aborts the process when two threads enter it.
pool_lock = threading.RLock()


class _Process:
    """forks: how many lie between this process and one whose threads it cannot use: those of a thread pool are not
    there in a forked child, and GNU OpenMP's ends a child that asks for them."""

    forks = 0


process = _Process()


def _in_child():
    numbas = sys.modules.get("numba.np.ufunc.parallel")
    process.forks += getattr(numbas, "_is_initialized", False)
    pool_lock.release()


if hasattr(os, "register_at_fork"):  # no other thread may be within a kernel: its lock would never be given back
    os.register_at_fork(before=pool_lock.acquire, after_in_parent=pool_lock.release, after_in_child=_in_child)

# --- a call -----------------------------------------------------------------------------------------------------------
# Calls for so few images, in plain order, with so few numbers in all arrays run on one thread, and so do calls with
# fewer numbers still: two need 2 us to meet, and longer to fetch what the other one has written.
SMALL_BATCH, SMALL_BATCH_ELEMENTS, SERIAL_ELEMENTS = 7, 120_000, 20_000
SERIAL_PARAMETERS = 100_000  # the same for parameter kernels in a captured step, after a serial kernel


def runs_serial(args, per_parameter, trace):
    """Whether a kernel with these arguments runs on one thread.

    trace   the captured step that it is called in, if any: there a kernel `per_parameter` follows the one before it
    """
    if per_parameter and trace.calls is not None:
        return trace.serial and args[0].size <= SERIAL_PARAMETERS
    trace.serial = False
    if args[0].ndim < 5:  # not blocked, see layout.py
        numbers = 0
        for a in args:
            if type(a) is np.ndarray:
                numbers += a.size
        trace.serial = numbers <= (SMALL_BATCH_ELEMENTS if len(args[0]) <= SMALL_BATCH else SERIAL_ELEMENTS)
    return trace.serial


# --- a captured step --------------------------------------------------------------------------------------------------
# Threads meet after every loop.  One that has lost its core to another program keeps the others waiting, for longer
# than many steps take, and one thread alone is faster then.  Nothing says when that is so, but it can be measured: a
# few steps on one thread now and then, and all that run on all.

PROBE_STEPS = 5  # so many on one thread say how long a step takes there
WINDOW = 0.05  # seconds of parallel steps that are compared with that, or more
LOSSES = 2  # comparisons in a row that parallel steps lose before one thread goes on for a while; one may be chance
PROBE_BUDGET = 0.005  # of the time goes into trials, at most

clock = time.perf_counter


class ThreadPolicy:
    """A context in which a step runs: on all threads, or on one while that is faster."""

    def __init__(self):
        self.all = self.used = 1  # threads that there are, and that this step runs on
        self.parallel, self.serial_seconds, self.losses = False, 0.0, 0
        self.count, self.sum = 0, 0.0  # steps since the last change, and their seconds
        self.begun = self.until = 0.0  # when this step began, and when there is something to be tried again

    def __enter__(self):
        self.begun, self.all = clock(), numba.get_num_threads()
        self.used = self.all if self.parallel else 1
        if self.used != self.all:
            numba.set_num_threads(self.used)

    def __exit__(self, *error):
        if self.used != self.all:
            numba.set_num_threads(self.all)
        if self.all == 1:
            return
        now = clock()
        self.count, self.sum = self.count + 1, self.sum + now - self.begun
        if not self.parallel:
            if self.count >= PROBE_STEPS and now >= self.until:
                self.serial_seconds = self.sum / self.count
                self.change(True, now + PROBE_STEPS * self.serial_seconds / PROBE_BUDGET)
        elif self.sum > self.serial_seconds * max(self.count, PROBE_STEPS):
            self.losses += 1
            self.change(False, now + (self.sum / PROBE_BUDGET if self.losses >= LOSSES else 0.0))
        elif self.count >= PROBE_STEPS and self.sum >= WINDOW:
            self.losses = 0
            self.change(now < self.until, self.until)

    def change(self, parallel, until):
        self.parallel, self.until, self.count, self.sum = parallel, until, 0, 0.0
