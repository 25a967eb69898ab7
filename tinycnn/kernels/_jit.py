"""How kernels are compiled: one decorator for what Python calls, one for what kernels call.

`@kernel` compiles a function for parallel loops (`prange`) and keeps the machine code in Numba's cache, so the
compiler runs once per machine, not once per process.  Threads are not free, so small calls do without them: a kernel is
compiled for one thread when a first one comes.  `@kernel_alone` never has them.
`@inner` compiles a serial helper that kernels call.

The fastmath flags let LLVM reorder sums and fuse multiply-adds, which is what vectorises a reduction.  The flags
that assume NaN and infinity away ("nnan", "ninf") are left out on purpose: a diverged run must be seen.
"""

import functools
import threading
import types
from typing import Any

import numba
import numpy as np
from numba.extending import overload

FASTMATH = {"reassoc", "contract", "arcp", "nsz"}

# Only `prange` makes threads.  Array expressions stay loops: each would become a parallel region of its own.
NOT_PARALLEL = ("comprehension", "reduction", "inplace_binop", "setitem", "numpy", "stencil", "fusion")
OPTIONS: dict[str, Any] = {"fastmath": FASTMATH, "error_model": "numpy"}
KERNEL = OPTIONS | {"parallel": dict.fromkeys(NOT_PARALLEL, False) | {"prange": True}, "cache": True}
ALONE = OPTIONS | {"cache": True}
IN_ORDER: dict[str, Any] = {"fastmath": {"contract"}}
INNER = OPTIONS | {"no_cpython_wrapper": True, "no_cfunc_wrapper": True}  # nobody calls it but kernels

FEW = 16_384  # numbers in all arrays of a call: below, two threads need longer to meet (2 us) than one for the work

# Numba's portable thread pool ("workqueue", the only one on macOS) aborts the process when two threads enter it.
_one_at_a_time = threading.RLock()


def kernel(function):
    """Compile `function` for several threads, or, for calls with few numbers, for one; called from Python."""
    return _for_threads_or_one(function, {})


def kernel_in_order(function):
    """A `kernel` whose sums may not be reordered, for formulas whose accuracy rests on what is subtracted first."""
    return _for_threads_or_one(function, IN_ORDER)


def kernel_alone(function):
    """A `kernel` with too little to do for more than one thread."""
    return numba.njit(**ALONE)(function)


def _for_threads_or_one(function, options):
    together = numba.njit(**KERNEL | options)(function)
    # A second name, or both would share their places in the cache.
    twin = types.FunctionType(function.__code__, function.__globals__, f"{function.__name__}_alone")
    twin.__module__, twin.__qualname__ = function.__module__, f"{function.__qualname__}_alone"
    alone = numba.njit(**ALONE | options)(twin)

    @functools.wraps(function)
    def call(*args):
        numbers = 0
        for a in args:
            if type(a) is np.ndarray:
                numbers += a.size
        if numbers < FEW:
            return alone(*args)
        with _one_at_a_time:
            return together(*args)

    return call


def inner(function):
    """Compile `function` for one thread; the result is called by kernels."""
    return numba.njit(**INNER)(function)


def scalar(single, double):
    """One name for two functions of one number, `single` for float32 and `double` for float64.

    Which one is meant is settled when the caller is compiled.  Unlike in kernels, sums may not be reordered here: the
    approximations in scalars.py rely on what cancels first.
    """

    def choose(x):
        return single(x) if isinstance(x, np.float32) else double(x)

    options: Any = OPTIONS | IN_ORDER

    @overload(choose, jit_options=options)
    def _choose(x):
        return single if x == numba.float32 else double

    return choose
