"""How kernels are compiled: one decorator for what Python calls, one for what kernels call.

`@kernel` compiles a function for parallel loops (`prange`) and keeps the machine code (see _cache.py), so the compiler
runs once per machine, not once per process.  It calls no function outside its own code (see `KernelLibrary`), so that
both give the same bits.  Threads are not free, so small calls do without them: a kernel is compiled for one thread when
a first one comes.  So do forked children of a process with threads.  `@serial_kernel` never has them.
`@device_function` compiles a serial helper that kernels call, `@inline_ir` marks one that becomes part of them.

The fastmath flags let LLVM reorder sums and fuse multiply-adds, which is what vectorises a reduction.  The flags
that assume NaN and infinity away ("nnan", "ninf") are left out on purpose: a diverged run must be seen.
"""

import functools
import types
from typing import Any

import numba
import numpy as np
from numba.core.codegen import JITCodeLibrary
from numba.core.compiler import Compiler
from numba.core.cpu_options import ParallelOptions
from numba.extending import overload

from tinycnn._interrupts import defer_interrupt
from tinycnn.kernels import _threads
from tinycnn.kernels._cache import enable_cache
from tinycnn.kernels._capture import trace, traced

FASTMATH = {"reassoc", "contract", "arcp", "nsz"}

# Only `prange` makes threads.  Array expressions stay loops: each would become a parallel region of its own.  Not a
# plain dictionary: the first compilation would take its entries out, and all others would find the defaults.
NOT_PARALLEL = ("comprehension", "reduction", "inplace_binop", "setitem", "numpy", "stencil", "fusion")
PRANGE = ParallelOptions(dict.fromkeys(NOT_PARALLEL, False) | {"prange": True})

SHARED = {"linkonce_odr", "linkonce_any", "weak_odr", "weak_any"}  # linkages with one definition for all modules


class KernelLibrary(JITCodeLibrary):
    """The code of one kernel, which calls its own copies of device functions and loop bodies.

    LLVM optimises each copy once more within its kernel, which may change the order of sums.  But Numba leaves copies
    weak symbols: all callers in a process get the copy that was loaded first, or the function as it was compiled by
    itself, which a process has only if it compiles.  Results would depend on what was compiled or loaded before.
    """

    def _finalize_final_module(self):
        # After the optimisation, which would treat internal functions in another way.
        for function in self._final_module.functions:
            if not function.is_declaration and function.linkage.name in SHARED:
                function.linkage = "internal"
        super()._finalize_final_module()


class KernelCompiler(Compiler):
    """Numba's compiler, which puts what it compiles into a `KernelLibrary`."""

    def define_pipelines(self):
        state = self.state
        state.library = KernelLibrary(state.targetctx.codegen(), state.func_id.func_qualname)
        state.library.enable_object_caching()  # as Numba does where it makes the library
        return super().define_pipelines()


OPTIONS: dict[str, Any] = {"fastmath": FASTMATH, "error_model": "numpy", "no_cfunc_wrapper": True}
KERNEL_OPTIONS = OPTIONS | {"parallel": PRANGE}
NO_REASSOC: dict[str, Any] = {"fastmath": {"contract"}}
DEVICE_FUNCTION = OPTIONS | {"no_cpython_wrapper": True}  # nobody calls it but kernels


def kernel(function):
    """Compile `function` for several threads and, for when a small call comes, for one; called from Python."""
    return _parallel_and_serial(function, {})


def parameter_kernel(function):
    """A `kernel` over flat vectors, one number of each for every parameter."""
    return _parallel_and_serial(function, {}, per_parameter=True)


def kernel_no_reassoc(function):
    """A `kernel` whose sums may not be reordered, for formulas whose accuracy rests on what is subtracted first."""
    return _parallel_and_serial(function, NO_REASSOC)


def serial_kernel(function):
    """A `kernel` with too little to do for more than one thread."""
    return traced(_dispatcher(function, OPTIONS))


dispatchers: dict[tuple[str, str], Any] = {}  # by module and name: what other processes are asked to compile


def _dispatcher(function, options):
    """Numba's dispatcher of `function`.

    Ctrl-C waits for the end of a compilation, or of a load from the cache: LLVM calls back into Python, where an
    exception would be dropped.
    """
    dispatchers[function.__module__, function.__qualname__] = dispatcher = enable_cache(
        numba.njit(pipeline_class=KernelCompiler, **options)(function)
    )
    if hasattr(dispatcher, "compile"):  # with NUMBA_DISABLE_JIT it is the function itself
        dispatcher.compile = defer_interrupt()(dispatcher.compile)
    return dispatcher


def _parallel_and_serial(function, options, per_parameter=False):
    parallel = _dispatcher(function, KERNEL_OPTIONS | options)
    # A second name, or both would share their places in the cache.
    twin = types.FunctionType(function.__code__, function.__globals__, f"{function.__name__}_serial")
    twin.__module__, twin.__qualname__ = function.__module__, f"{function.__qualname__}_serial"
    serial = _dispatcher(twin, OPTIONS | options)

    one, many = traced(serial), traced(parallel)

    @functools.wraps(function)
    def call(*args):
        if _threads.runs_serial(args, per_parameter, trace) or _threads.process.forks:
            one(*args)
        else:
            with _threads.pool_lock:
                many(*args)

    return call


def device_function(function):
    """Compile `function` for one thread; the result is called by kernels."""
    return numba.njit(**DEVICE_FUNCTION)(function)


def force_inline(function):
    """A `device_function` for innermost loops, whose machine code becomes part of its callers': LLVM would often call
    it, and calls keep vectors in memory."""
    return numba.njit(forceinline=True, **DEVICE_FUNCTION)(function)


def inline_ir(function):
    """A piece of a kernel that stands on its own to be read, and is put into its place before anything is compiled:
    LLVM goes over a `device_function` once more in each kernel, and in each device function, that calls it."""
    return numba.njit(inline="always")(function)


def scalar(single, double):
    """One name for two functions of one number, `single` for float32 and `double` for float64.

    Which one is meant is settled when the caller is compiled.  Unlike in kernels, sums may not be reordered here: the
    approximations in scalars.py rely on what cancels first.
    """

    def choose(x):
        return single(x) if isinstance(x, np.float32) else double(x)

    options: Any = OPTIONS | NO_REASSOC

    @overload(choose, jit_options=options)
    def _choose(x):
        return single if x == numba.float32 else double

    return choose
