"""Where tinycnn meets numba-cuda: how kernels are compiled, launched and captured, and what their arrays are made of.

It is the only module that calls numba-cuda.  A kernel is a list of *phases* with barriers between them.  A phase is the
work of one thread from one barrier to the next: a function of (tid, nt, arrays ...), the thread's number in its block
and the number of threads.  It does not know whether its arrays lie in global or in shared memory.

Rules for phases and kernels, enforced by tools/check_kernels.py or by the tests: constants are of the arrays' dtype (a
Python float is float64 and drags the arithmetic with it); arrays that stay in registers (`cuda.local.array`) are
indexed by constants; hot loops index slices by constants, or by U32 (Numba tests signed indices for being negative);
integers are divided by `divmod32` (a GPU has no instruction for a 64-bit division: each is a call).
"""

import atexit
import contextlib
import functools
import importlib
import os
import sys
import threading
import warnings
from typing import Any

import numpy as np

if not hasattr(np, "row_stack"):  # numba-cuda up to 0.30 asks for it when it first compiles; NumPy 2.5 has dropped it
    setattr(np, "row_stack", np.vstack)  # noqa: B010 (type checkers know that NumPy has no such name)

# The small grids of small networks are no mistake: no warning about each of them.
os.environ.setdefault("NUMBA_CUDA_LOW_OCCUPANCY_WARNINGS", "0")

import numba
import numba.cuda

from tinycnn import _gpu
from tinycnn.errors import DeviceError, DeviceMemoryError
from tinycnn.kernels._cache import enable_cache

cuda: Any = numba.cuda  # type checkers see the one that Numba itself still contains
setattr(numba.config, "CUDA_LOW_OCCUPANCY_WARNINGS", 0)  # noqa: B010 (numba may have been imported before)

THREADS = 128  # of a block, where a kernel has no reason for another number
ALIGN = 16  # bytes: where shared arrays start that are read four floats at a time
MAX_PENDING_FREES = 10  # allocations that wait to be freed, at most
U32 = np.uint32  # around an index in a hot loop: Numba tests every signed index for being negative

_context: dict[str, Any] = {
    "device": None,  # number of the GPU in use
    "forked": False,  # whether this is a forked child of a process that uses the GPU
    "deferred_frees": None,  # what keeps numba-cuda from freeing memory by itself
}


class _Capture(threading.local):
    """What this thread captures: the stream in place of the default one, and all arguments that were launched."""

    stream: Any = 0
    arguments: list | None = None


_capture = _Capture()


# --- errors -----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _driver_errors(what, asked=0):
    """Errors of the driver, of whichever library, as this package's own: DeviceMemoryError, DeviceError.

    what   for the message, what was being done        asked  bytes, where memory is asked for
    """
    try:
        yield
    except Exception as error:
        raise _translate_error(error, what, asked) from error


def _translate_error(error, what, asked=0):
    names = {cls.__name__ for cls in type(error).__mro__}
    if not names & {"CudaAPIError", "CUDAError"}:
        return error
    if "OUT_OF_MEMORY" in str(error).upper():
        return DeviceMemoryError(asked, free_memory())
    return DeviceError(
        f"{what} failed on cuda:{_context['device']}: {error} (kernels run asynchronously: one launched earlier may be "
        "the cause; CUDA_LAUNCH_BLOCKING=1 shows which)"
    )


# --- kernels ----------------------------------------------------------------------------------------------------------


def phase(function):
    """Compile a phase."""
    return cuda.jit(device=True)(function)


device_function = phase  # a function that phases call


@device_function
def divmod32(a, b):
    """(a // b, a % b) of 0 <= a < 2**32 and 0 < b < 2**32, divided in 32 bits."""
    quotient = np.int64(U32(a) // U32(b))
    return quotient, a - quotient * b


def overload_by_dtype(single, double):
    """One name for two functions of one number, `single` for float32 and `double` for float64."""

    def choose(x):
        return single(x) if isinstance(x, np.float32) else double(x)

    compiled32, compiled64 = device_function(single), device_function(double)
    extending: Any = importlib.import_module("numba.cuda.extending")
    if not hasattr(extending, "overload"):  # numba-cuda before it parted from Numba
        extending = importlib.import_module("numba.extending")

    @extending.overload(choose, target="cuda")
    def _choose(x):
        return (lambda x: compiled32(x)) if x == numba.float32 else (lambda x: compiled64(x))

    return choose


def blocks(count):
    """Blocks of THREADS threads for `count` elements, one a thread."""
    return -(-count // THREADS)


class Kernel:
    """A compiled kernel; `kernel[blocks](...)` launches it, blocks: a number or a tuple of up to three.

    function   a list of phases and barriers        threads    of each block
    registers  a thread may take at most so many    double     why it computes in float64 on float32 arrays, if it does

    A grid without blocks, as for an array without elements, launches nothing: the driver refuses one.
    """

    def __init__(self, function, threads, registers, double):
        self.__name__, self.__doc__ = function.__name__, function.__doc__
        self.function, self.threads, self.registers, self.double = function, threads, registers, double
        self.compiled = enable_cache(cuda.jit()(function), importlib.import_module("numba.cuda.dispatcher").CUDACache)

    def __getitem__(self, blocks):
        return functools.partial(self.launch, blocks)

    def launch(self, blocks, *args):
        if _context["forked"]:
            raise RuntimeError(
                f"{self.__name__}: this process was forked from one that uses the GPU, and a GPU context "
                'does not survive a fork; start workers with multiprocessing.get_context("spawn")'
            )
        if 0 in (blocks if isinstance(blocks, tuple) else (blocks,)):
            return
        if _capture.arguments is not None:
            _capture.arguments.append(args)
        try:
            self.compiled[blocks, self.threads, _capture.stream](*args)
        except Exception as error:
            raise _translate_error(error, f"the launch of {self.__name__}") from error


def kernel(threads, registers, double=None):
    """Compile a kernel; see `Kernel`."""
    return lambda function: Kernel(function, threads, registers, double)


# --- the device -------------------------------------------------------------------------------------------------------


def set_device(number):
    """Compute on GPU `number` from now on; one process works on one GPU."""
    if _context["device"] not in (None, number):
        raise ValueError(f"this process computes on cuda:{_context['device']} already, got cuda:{number}")
    with _driver_errors("the start"):
        cuda.select_device(number)
    if _context["device"] is None:
        _defer_cleanup()
        os.register_at_fork(after_in_child=lambda: _context.update(forked=True))
    _context["device"] = number


def synchronize():
    """Wait until everything launched so far is done."""
    with _driver_errors("waiting"):
        cuda.synchronize()


def free_memory():
    """Bytes free on the device."""
    return cuda.current_context().get_memory_info()[0]


def skip_cleanup_after_fault(code):
    """If the GPU has met an error after which it does nothing any more: when the interpreter ends, let it end at once,
    with this exit code.  Freeing what was on the GPU would fail, with a traceback for every kernel."""

    def leave():
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(Exception):
                stream.flush()
        os._exit(code)

    try:
        cuda.synchronize()
    except Exception:
        atexit.register(leave)  # the last one registered, and so the first one called


def precompile(step):
    """Nothing: here kernels are compiled one by one, when they are launched first."""


# --- arrays -----------------------------------------------------------------------------------------------------------


def empty(shape, dtype):
    """A new array on this device, filled with zeros."""
    return _upload(np.zeros(shape, dtype))


def _upload(array):
    if array.size >= 2**32:
        raise ValueError(
            f"the kernels index with 32 bits: an array must have fewer than 2**32 entries, got {array.shape}"
        )
    with _driver_errors("a copy to the device", array.nbytes), _cleaning_up():
        # numba-cuda refuses to slice an array that has no memory: an empty one is the beginning of one that has.
        if array.size == 0:
            return cuda.device_array(1, array.dtype)[:0].reshape(array.shape)
        return cuda.to_device(array)


def _defer_cleanup():
    """Keep numba-cuda from freeing memory by itself: Python collects garbage in any thread, and the driver frees memory
    only for one with a context."""
    _context["deferred_frees"] = cuda.defer_cleanup()
    _context["deferred_frees"].__enter__()


@contextlib.contextmanager
def _cleaning_up():
    """Free what waits for it, unless this thread captures; within it, where memory runs out, numba-cuda may, too."""
    if _capture.arguments is not None or _context["deferred_frees"] is None:
        yield
        return
    _context["deferred_frees"].__exit__(None, None, None)
    try:
        garbage = cuda.current_context().memory_manager.deallocations
        if len(garbage) > MAX_PENDING_FREES:
            garbage.clear()
        yield
    finally:
        _defer_cleanup()


def _contiguous(array, dtype=None):
    """`array` in C order, with the strides that its shape implies.  NumPy lets an axis of length 1 have any stride, and
    calls the array contiguous; numba-cuda does not."""
    array = np.ascontiguousarray(array, dtype)
    return np.ndarray(array.shape, array.dtype, array)


def to_device(array):
    """`array` as a C-contiguous array of this device: NumPy, or what another library holds on this GPU (shared, not
    copied, if it is C-contiguous)."""
    if isinstance(array, np.ndarray | np.generic | list | tuple | int | float):
        return _upload(_contiguous(array))
    device = _gpu.device_of(array)
    if device is None:
        return to_device(np.asarray(array))
    if device != _context["device"]:
        raise ValueError(f"the array lies on cuda:{device}, this process computes on cuda:{_context['device']}")
    try:
        # It waits for the array's stream, and is no longer bound to it: a bound array is copied without waiting.
        array = cuda.as_cuda_array(array if hasattr(array, "__cuda_array_interface__") else _Interface(array)).bind(0)
    except Exception as error:
        if "CONTEXT" in str(error).upper() or "INVALID_HANDLE" in str(error).upper():
            raise ValueError(f"the array's stream belongs to another CUDA context: {error}") from error
        raise _translate_error(error, "taking another library's array") from error
    return array if array.is_c_contiguous() else to_device(to_host(array))


LEGACY_STREAM = 1  # CUDA's number of the default stream, where kernels are launched


class _Interface:
    """An array that speaks DLPack only, as one that speaks CUDA's array interface."""

    def __init__(self, array):
        from cuda.core.utils import StridedMemoryView

        # The other library makes its own work on the array come before what is launched on our stream.
        view = StridedMemoryView.from_dlpack(array, stream_ptr=LEGACY_STREAM)
        self.keep = array, view
        size = np.dtype(view.dtype).itemsize
        self.__cuda_array_interface__ = {
            "version": 3, "shape": tuple(view.shape), "typestr": np.dtype(view.dtype).str, "data": (view.ptr, False),
            "strides": None if view.strides is None else tuple(size * step for step in view.strides),
        }  # fmt: skip


class ExportedArray:
    """A GPU array for other libraries: torch.as_tensor, cupy.asarray, jax.dlpack.from_dlpack, numpy.asarray take it."""

    def __init__(self, array):
        self.array, self.shape, self.dtype = array, array.shape, array.dtype

    @property
    def __cuda_array_interface__(self):
        # Names the stream whose work the other library has to wait for.
        return {**self.array.__cuda_array_interface__, "stream": LEGACY_STREAM}

    def __dlpack_device__(self):
        return 2, _context["device"]  # kDLCUDA

    def __dlpack__(self, **options):
        from cuda.core.utils import StridedMemoryView

        synchronize()  # whatever stream the other library works on, our work is done
        return StridedMemoryView.from_cuda_array_interface(self.array, stream_ptr=-1).__dlpack__(**options)

    def __array__(self, dtype=None, copy=None):
        return np.asarray(to_host(self.array), dtype)


def to_host(array):
    """An array of this device as NumPy; waits for the kernels that write it."""
    if not hasattr(array, "copy_to_host"):
        return np.asarray(array)
    with _driver_errors("a copy from the device"):
        return array.copy_to_host()


def copy_to(array, values):
    """Overwrite an array of this device with `values` (NumPy or of this device, of the same shape)."""
    if isinstance(values, np.ndarray):
        values = _contiguous(values, array.dtype)
    with _driver_errors("a copy to the device"):
        array.copy_to_device(values)


def ravel(array):
    """`array` as one axis.  Remembered on the array, since making a view costs as much time as a launch."""
    if array.ndim == 1:
        return array
    view = getattr(array, "_flat", None)
    if view is None:
        view = array._flat = array.reshape(array.size)
    return view


@functools.cache
def workspace(size, dtype, use):
    """`size` numbers of room for a kernel; the same array for the same size, dtype and use, as kernels run one after
    another.  Allocated once, and never freed: a captured step may hold on to it."""
    return empty((size,), dtype)


@functools.cache
def constant(values):
    """A tuple of integers as an int32 array of this device, allocated once."""
    return to_device(np.array(values, np.int32))


# --- time and memory --------------------------------------------------------------------------------------------------


def elapsed_seconds(function):
    """Seconds that the device takes for what `function` launches, by events on the device."""
    start, stop = cuda.event(timing=True), cuda.event(timing=True)
    start.record()
    function()
    stop.record()
    stop.synchronize()
    return cuda.event_elapsed_time(start, stop) / 1000


# --- captured steps ---------------------------------------------------------------------------------------------------


def capture(step):
    """`step` as one CUDA graph: called without arguments, it does what `step()` does with one launch.

    step  a function that launches kernels, and neither allocates, copies, nor waits.  It is run once before the
          recording, so that everything is compiled; what changes from call to call must live in device memory
    """
    return CapturedStep(step)


class CapturedStep:
    """The first call runs the step as it is, which compiles and allocates; the second records it, and replays.

    Addresses are part of a recording, so this object keeps all arrays alive that the kernels were given.
    """

    def __init__(self, step):
        self.step, self.graph, self.calls, self.arguments = step, None, 0, []

    def __call__(self):
        self.calls += 1
        if self.calls == 1:
            return self.step()
        if self.graph is None:
            self.record()
        if not self.graph:
            return self.step()
        with _driver_errors("the replay of a captured step"):
            return self.graph()

    def record(self):
        from cuda.core import Device  # numba-cuda depends on it

        device = Device(_context["device"])
        device.set_current()
        builder, building = device.create_graph_builder(), True
        try:
            builder.begin_building("thread_local")  # the driver refuses what cannot be part of a graph
            # numba-cuda takes the builder in place of a stream since 0.29; before, its stream does the same.
            newer = tuple(map(int, numba_cuda_version().split(".")[:2])) >= (0, 29)
            _capture.stream = builder if newer else cuda.external_stream(int(builder.stream.handle))
            _capture.arguments = self.arguments
            self.step()
            building = False
            graph = builder.end_building().complete()
            self.graph = functools.partial(graph.launch, device.default_stream)
        except Exception as error:
            warnings.warn(f"the step could not be captured and runs kernel by kernel: {error}", stacklevel=3)
            self.graph, self.arguments = False, []
        finally:
            _capture.stream, _capture.arguments = 0, None
            if building:  # until the capture ends, this thread may not even allocate
                with contextlib.suppress(Exception):
                    builder.end_building()


def numba_cuda_version():
    """numba-cuda's version, as text."""
    from importlib.metadata import version

    return version("numba-cuda")
