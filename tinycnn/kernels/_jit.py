"""How kernels are compiled: decorators for functions that Python calls, and for functions that kernels call.

Called from Python; the machine code is cached on disk (see _cache.py), so each is compiled once per machine:

    @kernel              parallel loops (`prange`); a second, serial version is compiled when a small call needs it
                         (`_threads.runs_serial`), or in a forked child that cannot use its parent's threads
    @parameter_kernel    a kernel over flat vectors with an entry for every parameter
    @conv_kernel         a convolution, of arguments y, x, w, ...: y.size * w[0].size multiply-adds
    @kernel_no_reassoc   a kernel whose sums are not reordered
    @serial_kernel       a kernel with too little work for more than one thread

A kernel whose last parameter is `threads` is not called with it: it is passed their number, to divide its tasks, never
its sums.  (`get_num_threads` in a kernel would prevent Numba's cache.)

Called by kernels, on one thread:

    @device_function     compiled on its own; LLVM decides whether to inline it
    @force_inline        always inlined by LLVM: for innermost loops
    @inline_ir           inlined by Numba, before anything is compiled

The fastmath flags allow LLVM to reorder sums and to fuse multiply-adds, which vectorising a reduction needs.  The flags
that assume that there is no NaN and no infinity ("nnan", "ninf") are left out: a diverged run must be seen.
"""

import functools
import types
from collections.abc import Callable
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

Function = Callable[..., Any]
Options = dict[str, Any]

FASTMATH = {"reassoc", "contract", "arcp", "nsz"}

# Only `prange` makes threads.  Array expressions stay serial loops: each would be a separate parallel region.  Not
# a plain dictionary: Numba empties that in the first compilation, and all others would get the defaults.
NOT_PARALLEL = ("comprehension", "reduction", "inplace_binop", "setitem", "numpy", "stencil", "fusion")
PRANGE = ParallelOptions(dict.fromkeys(NOT_PARALLEL, False) | {"prange": True})

SHARED = {"linkonce_odr", "linkonce_any", "weak_odr", "weak_any"}  # linkages with one definition for all modules


class KernelLibrary(JITCodeLibrary):
    """The machine code of one kernel, which calls its own copies of device functions and loop bodies.

    LLVM optimises each copy again within its kernel, which can change the order of sums.  Numba leaves these copies as
    weak symbols: all callers in a process get the copy that was loaded first, or the separately compiled function.
    Results would depend on what else was compiled or loaded, so the copies are made internal.
    """

    def _finalize_final_module(self) -> None:
        # After optimisation, since LLVM optimises internal functions differently.
        for function in self._final_module.functions:
            if not function.is_declaration and function.linkage.name in SHARED:
                function.linkage = "internal"
        super()._finalize_final_module()


class PartLibrary(JITCodeLibrary):
    """A part of kernels, linked into them: a function that they call, or the body of a parallel loop.

    Numba would make machine code of each part, which takes longer than that of the kernel, and nothing calls it.  The
    last three members keep Numba from using it.
    """

    def add_ir_module(self, ir_module: Any) -> None:
        if ir_module.name != "wrapper":  # the one for calls from Python
            super().add_ir_module(ir_module)

    def _optimize_final_module(self) -> None:
        # This one calls the body of a parallel loop; it has a copy, which is optimised twice already.
        if self.name != "parallelgufuncwrapper":
            super()._optimize_final_module()

    def _finalize_final_module(self) -> None:
        self._finalize_dynamic_globals()
        self._finalized = True

    def get_pointer_to_function(self, name: str) -> int:
        return 0  # as for any function without a wrapper for Python

    @property
    def codegen(self) -> Any:
        return self

    def set_env(self, name: str, env: Any) -> None:
        """Numba calls `codegen.set_env` for each compiled function."""


class KernelCompiler(Compiler):
    """Numba's compiler with a `KernelLibrary` for the result, and `PartLibrary` for all that is compiled for it."""

    def compile_extra(self, function: Function) -> Any:
        codegen = self.state.targetctx.codegen()
        self.state.library = KernelLibrary(codegen, function.__qualname__)
        self.state.library.enable_object_caching()  # as Numba does
        # The dispatcher holds Numba's global lock, so nothing else is compiled or loaded meanwhile.
        codegen._library_class, previous = PartLibrary, codegen._library_class
        try:
            return super().compile_extra(function)
        finally:
            codegen._library_class = previous


OPTIONS: Options = {"fastmath": FASTMATH, "error_model": "numpy", "no_cfunc_wrapper": True}
KERNEL_OPTIONS = OPTIONS | {"parallel": PRANGE}
NO_REASSOC: Options = {"fastmath": {"contract"}}
DEVICE_FUNCTION = OPTIONS | {"no_cpython_wrapper": True}  # Python never calls it


def kernel(function: Function) -> Any:
    """Compile `function` for several threads and, on the first small call, for one."""
    return _parallel_and_serial(function, {})


def parameter_kernel(function: Function) -> Any:
    """A `kernel` over flat vectors with an entry for every parameter; see `_threads.runs_serial`."""
    return _parallel_and_serial(function, {}, "parameter")


def conv_kernel(function: Function) -> Any:
    """A convolution, a `kernel` of arguments y, x, w, ...: y.size * w[0].size multiply-adds."""
    return _parallel_and_serial(function, {}, "convolution")


def kernel_no_reassoc(function: Function) -> Any:
    """A `kernel` whose sums are not reordered: for formulas that are accurate only in the order they are written."""
    return _parallel_and_serial(function, NO_REASSOC)


def serial_kernel(function: Function) -> Any:
    """A `kernel` that never uses more than one thread."""
    return traced(_dispatcher(function, OPTIONS))


dispatchers: dict[tuple[str, str], Any] = {}  # of all kernels by module and name: what worker processes compile


def _dispatcher(function: Function, options: Options) -> Any:
    """Numba's dispatcher of `function`.

    Ctrl-C waits for the end of a compilation or of a load from the cache: LLVM calls back into Python, where an
    exception would be lost.
    """
    dispatchers[function.__module__, function.__qualname__] = dispatcher = enable_cache(
        numba.njit(pipeline_class=KernelCompiler, **options)(function)
    )
    if hasattr(dispatcher, "compile"):  # with NUMBA_DISABLE_JIT it is the function itself
        dispatcher.compile = defer_interrupt()(dispatcher.compile)
    return dispatcher


def _parallel_and_serial(function: Function, options: Options, kind: str = "") -> Any:
    parallel = traced(_dispatcher(function, KERNEL_OPTIONS | options))
    takes_threads = function.__code__.co_varnames[: function.__code__.co_argcount][-1] == "threads"
    # A copy under another name: with the same name both would use the same cache entries.
    copy = types.FunctionType(function.__code__, function.__globals__, f"{function.__name__}_serial")
    copy.__module__, copy.__qualname__ = function.__module__, f"{function.__qualname__}_serial"
    serial = traced(_dispatcher(copy, OPTIONS | options))

    @functools.wraps(function)
    def call(*args: Any) -> None:
        if _threads.runs_serial(args, kind, trace) or _threads.process.forks:
            serial(*args, 1) if takes_threads else serial(*args)
        else:
            with _threads.pool_lock:
                parallel(*args, numba.get_num_threads()) if takes_threads else parallel(*args)

    return call


def device_function(function: Function) -> Any:
    """Compile `function` for one thread, to be called by kernels."""
    return _refuse_python(numba.njit(**DEVICE_FUNCTION)(function))


def force_inline(function: Function) -> Any:
    """A `device_function` for innermost loops that LLVM always inlines: a call would keep vectors in memory."""
    return _refuse_python(numba.njit(forceinline=True, **DEVICE_FUNCTION)(function))


def _refuse_python(dispatcher: Any) -> Any:
    """Make a call from Python a TypeError.  It has no wrapper for Python, and Numba would jump to address 0."""

    def refuse(*args: Any, **options: Any) -> None:
        raise TypeError(
            f"{dispatcher.py_func.__qualname__} is a part of kernels, which Python cannot call; with "
            "NUMBA_DISABLE_JIT=1 it is a Python function"
        )

    if hasattr(dispatcher, "py_func"):  # with NUMBA_DISABLE_JIT it is the function itself
        dispatcher._compile_for_args = refuse
        dispatcher._insert = lambda *args, **options: None  # nothing to find for calls from Python
    return dispatcher


def inline_ir(function: Function) -> Any:
    """A named part of a kernel that Numba inlines before anything is compiled.

    A `device_function` costs more: LLVM optimises it again in each kernel, and in each device function, that calls it.
    """
    return numba.njit(inline="always")(function)


def overload_by_dtype(single: Function, double: Function) -> Any:
    """A function of one number: `single` for float32, `double` for float64, chosen when the caller is compiled.

    Unlike in kernels, sums are not reordered: the approximations in scalars.py rely on the order of operations.
    """

    # No annotations: Numba compares the signatures of `_choose` and of what it returns.
    def choose(x):
        return single(x) if isinstance(x, np.float32) else double(x)

    options: Any = OPTIONS | NO_REASSOC

    @overload(choose, jit_options=options)
    def _choose(x):
        return single if x == numba.float32 else double

    return choose
