"""The kernels of tinycnn.cuda on the CPU, compiled, one phase after the other: a test bench, thousands of times faster
than Numba's simulator.  TINYCNN_CUDA=emulate, set before tinycnn.cuda is imported, puts it in place of _launch.py.

The code of a kernel is run by Python once a block.  A call of a phase is not carried out but noted; at the next barrier
all that was noted is done, thread by thread, which is just what a barrier means.  What a GPU leaves open is varied:

- the order of the threads and of the blocks, by `orders`: a race, or a missing barrier, changes the result;
- what memory holds at first: shared and local arrays begin as NaN (integers: as an index far outside of any array).

Indices are checked.  Control flow around phases must be the same for all threads: `cuda.threadIdx` can be handed to
phases, and nothing else.
"""

import functools
import itertools
import time
from types import SimpleNamespace
from typing import Any

import numba
import numpy as np

ALIGN = None
GARBAGE = 2**30  # as an index: out of bounds
OPTIONS: dict[str, Any] = {"boundscheck": True, "error_model": "numpy"}
_state: dict[str, Any] = {"order": "forward", "kernel": None}


def orders(threads):
    """Three orders in which `threads` threads may run, by name."""
    there = np.arange(threads)
    return {
        "forward": there,
        "backward": there[::-1].copy(),
        "shuffled": np.random.default_rng(threads).permutation(threads),
    }


class Thread:
    """`cuda.threadIdx.x`: which thread this is, only a phase knows."""


class Registers:
    """What `cuda.local.array` gives: a row for every thread."""

    def __init__(self, rows):
        self.rows = rows


class Phase:
    """A phase.  Arrays in registers must be its first arguments after (tid, nt)."""

    def __init__(self, function):
        self.__name__, self.__doc__ = function.__name__, function.__doc__
        compiled = numba.njit(**OPTIONS)(function)

        @numba.njit(**OPTIONS)
        def none(order, nt, arguments):
            for t in order:
                compiled(t, nt, *arguments)

        @numba.njit(**OPTIONS)
        def one(order, nt, r, arguments):
            for t in order:
                compiled(t, nt, r[t], *arguments)

        @numba.njit(**OPTIONS)
        def two(order, nt, r, s, arguments):
            for t in order:
                compiled(t, nt, r[t], s[t], *arguments)

        self.loops = none, one, two

    def __call__(self, tid, nt, *arguments):
        if not isinstance(tid, Thread):
            raise TypeError(f"{self.__name__}: the first argument must be cuda.threadIdx.x, got {tid!r}")
        registers = [a.rows for a in itertools.takewhile(lambda a: isinstance(a, Registers), arguments)]
        _state["kernel"].noted.append((self.loops[len(registers)], nt, registers, arguments[len(registers) :]))


def phase(function):
    return Phase(function)


def device(function):
    """A function that phases call."""
    return numba.njit(**OPTIONS)(function)


def scalar(single, double):
    from tinycnn.kernels import _jit

    return _jit.scalar(single, double)


class Kernel:
    """Runs block by block; the interface of _launch.Kernel."""

    def __init__(self, function, threads, registers, double):
        self.__name__, self.__doc__ = function.__name__, function.__doc__
        self.function, self.threads, self.registers, self.double = function, threads, registers, double
        self.noted: list[tuple] = []

    def __getitem__(self, blocks):
        return functools.partial(self.launch, blocks)

    def launch(self, blocks, *args):
        blocks = (*blocks, 1, 1)[:3] if isinstance(blocks, tuple) else (blocks, 1, 1)
        if min(blocks) < 1:
            raise ValueError(f"{self.__name__}: a grid must have at least one block, got {blocks}")
        cuda.gridDim = SimpleNamespace(x=blocks[0], y=blocks[1], z=blocks[2])
        _state["kernel"], self.noted = self, []
        self.order = orders(self.threads)[_state["order"]]
        numbers = list(itertools.product(*map(range, blocks)))
        for at in orders(len(numbers))[_state["order"]]:
            cuda.blockIdx = SimpleNamespace(**dict(zip("xyz", numbers[at], strict=True)))
            self.function(*args)
            self.barrier()

    def barrier(self):
        """Do what was noted: the first thread all of it, then half of the others, then the rest."""
        if len(self.noted) == 1:
            groups = [self.order]
        else:
            middle = self.threads // 2
            groups = [self.order[:1], self.order[1:middle], self.order[middle:]]
        for group in groups:
            for loop, nt, registers, arguments in self.noted:
                loop(group, nt, *registers, arguments)
        self.noted.clear()


def kernel(threads, registers, double=None):
    return lambda function: Kernel(function, threads, registers, double)


def _poisoned(shape, dtype, alignment=None):
    dtype = np.dtype(dtype)
    return np.full(shape, np.nan if dtype.kind == "f" else GARBAGE, dtype)


def _registers(size, dtype):
    return Registers(_poisoned((_state["kernel"].threads, size), dtype))


cuda = SimpleNamespace(
    threadIdx=SimpleNamespace(x=Thread()),
    shared=SimpleNamespace(array=_poisoned),
    local=SimpleNamespace(array=_registers),
    syncthreads=lambda: _state["kernel"].barrier(),
)

# --- services ---------------------------------------------------------------------------------------------------------


def use(number):
    pass


def synchronize():
    pass


def seconds(function):
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def empty(shape, dtype):
    return np.zeros(shape, dtype)


def to_device(array):
    return np.array(array, order="C")


def to_host(array):
    return np.array(array)


def share(array):
    return array


def write(array, values):
    array[...] = values


def flat(array):
    return array.reshape(array.size)


@functools.cache
def scratch(size, dtype, use):
    return np.full(size, np.nan, dtype)


@functools.cache
def constant(values):
    return np.array(values, np.int32)


def capture(step):
    return step
