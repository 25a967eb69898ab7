"""On how many threads a replayed step runs: on all, or on one while other programs keep the cores busy.

Threads meet after every loop.  One that has lost its core keeps the others waiting, for longer than many steps take,
and one thread alone is faster then.  Nothing says when that is so, but it can be measured: a few steps on one thread
now and then, and all that run on all.  For any number of threads the results are the same to the bit.
"""

import time

import numba

STEPS = 5  # so many on one thread say how long a step takes there
WINDOW = 0.05  # seconds of steps on all threads that are compared with that, or more
DEFEATS = 2  # one after the other, and one thread goes on alone for a while: the first may be chance
SHARE = 0.005  # of the time goes into trials, at most

clock = time.perf_counter


class Pace:
    """A context in which a step runs."""

    def __init__(self):
        self.all = self.used = 1  # threads that there are, and that this step runs on
        self.together, self.alone, self.defeats = False, 0.0, 0  # alone: seconds of a step on one thread
        self.count, self.sum = 0, 0.0  # steps since the last change, and their seconds
        self.begun = self.until = 0.0  # when this step began, and when there is something to be tried again

    def __enter__(self):
        self.begun, self.all = clock(), numba.get_num_threads()
        self.used = self.all if self.together else 1
        if self.used != self.all:
            numba.set_num_threads(self.used)

    def __exit__(self, *error):
        if self.used != self.all:
            numba.set_num_threads(self.all)
        if self.all == 1:
            return
        now = clock()
        self.count, self.sum = self.count + 1, self.sum + now - self.begun
        if not self.together:
            if self.count >= STEPS and now >= self.until:
                self.alone = self.sum / self.count
                self.change(True, now + STEPS * self.alone / SHARE)
        elif self.sum > self.alone * max(self.count, STEPS):
            self.defeats += 1
            self.change(False, now + (self.sum / SHARE if self.defeats >= DEFEATS else 0.0))
        elif self.count >= STEPS and self.sum >= WINDOW:
            self.defeats = 0
            self.change(now < self.until, self.until)

    def change(self, together, until):
        self.together, self.until, self.count, self.sum = together, until, 0, 0.0
