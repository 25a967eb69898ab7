"""The interface to numba-cuda: compiling, launching and capturing kernels, arrays on the device, errors of the driver.

No other module calls numba-cuda.  A kernel is a list of *phases* with barriers between them.  A phase is the work of
one thread between two barriers: a function of (tid, nt, arrays ...), where tid is the index of the thread in its block,
nt the number of threads.  A phase works on global and on shared arrays alike.

Rules for phases and kernels, enforced by tools/check_kernels.py or by the tests:
- Constants have the arrays' dtype.  A Python float is float64 and makes the arithmetic float64.
- Register arrays (`cuda.local.array`) are indexed by constants.
- Hot loops index slices by constants or U32: Numba adds a test for negative values to every signed index.
- Integers are divided by `divmod32`: GPUs have no instruction for 64-bit division, so each is a call.
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

if not hasattr(np, "row_stack"):  # removed in NumPy 2.5, used by numba-cuda up to 0.30
    setattr(np, "row_stack", np.vstack)  # noqa: B010 (type checkers know that NumPy has no such name)

# Small networks have small grids; numba-cuda would warn about each.
os.environ.setdefault("NUMBA_CUDA_LOW_OCCUPANCY_WARNINGS", "0")

import numba
import numba.cuda

from tinycnn import _gpu
from tinycnn.errors import DeviceError, DeviceMemoryError
from tinycnn.kernels._cache import enable_cache

cuda: Any = numba.cuda  # type checkers see Numba's own, deprecated module
setattr(numba.config, "CUDA_LOW_OCCUPANCY_WARNINGS", 0)  # noqa: B010 (numba may have been imported before)

THREADS = 128  # of a block, unless a kernel needs another number
ALIGN = 16  # bytes; alignment of shared arrays, for 128-bit loads
MAX_PENDING_FREES = 10  # deferred frees that are allowed to accumulate
U32 = np.uint32  # type of indices in hot loops

_context: dict[str, Any] = {
    "device": None,  # number of the GPU in use
    "forked": False,  # this process was forked from one that uses the GPU
    "deferred_frees": None,  # the context manager that keeps numba-cuda from freeing memory
}


class _Capture(threading.local):
    """The capture of this thread: the stream that replaces the default one, and the arguments of all launches."""

    stream: Any = 0
    arguments: list[Any] | None = None


_capture = _Capture()


# --- errors -----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _driver_errors(action, requested=0):
    """Raise errors of the driver, from numba-cuda or cuda.core, as DeviceMemoryError or DeviceError.

    action  for the message        requested  bytes of an allocation
    """
    try:
        yield
    except Exception as error:
        raise _translate_error(error, action, requested) from error


def _translate_error(error, action, requested=0):
    names = {cls.__name__ for cls in type(error).__mro__}
    if not names & {"CudaAPIError", "CUDAError"}:
        return error
    if "OUT_OF_MEMORY" in str(error).upper():
        return DeviceMemoryError(requested, free_memory())
    return DeviceError(
        f"{action} failed on cuda:{_context['device']}: {error} (kernels run asynchronously: one launched earlier may "
        "be the cause; CUDA_LAUNCH_BLOCKING=1 shows which)"
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
    """A function of one number that calls `single` for float32 and `double` for float64."""

    def dispatch(x):
        return single(x) if isinstance(x, np.float32) else double(x)

    compiled32, compiled64 = device_function(single), device_function(double)
    extending: Any = importlib.import_module("numba.cuda.extending")
    if not hasattr(extending, "overload"):  # older numba-cuda
        extending = importlib.import_module("numba.extending")

    @extending.overload(dispatch, target="cuda")
    def _dispatch(x):
        return (lambda x: compiled32(x)) if x == numba.float32 else (lambda x: compiled64(x))

    return dispatch


def blocks(count):
    """Number of blocks of THREADS threads for `count` elements, one per thread."""
    return -(-count // THREADS)


class Kernel:
    """A compiled kernel; `kernel[grid](...)` launches it, grid: the number of blocks, or a tuple of up to three.

    function   phases and barriers                       threads  of each block
    registers  maximum of a thread, for check_kernels    double   why it computes in float64 on float32 arrays, or None

    An empty grid (of an empty array) launches nothing: the driver refuses it.
    """

    def __init__(self, function, threads, registers, double):
        self.__name__, self.__doc__ = function.__name__, function.__doc__
        self.function, self.threads, self.registers, self.double = function, threads, registers, double
        self.compiled = enable_cache(cuda.jit()(function), importlib.import_module("numba.cuda.dispatcher").CUDACache)

    def __getitem__(self, grid):
        return functools.partial(self.launch, grid)

    def launch(self, grid, *args):
        if _context["forked"]:
            raise RuntimeError(
                f"{self.__name__}: this process was forked from one that uses the GPU, and a GPU context "
                'does not survive a fork; start workers with multiprocessing.get_context("spawn")'
            )
        if 0 in (grid if isinstance(grid, tuple) else (grid,)):
            return
        if _capture.arguments is not None:
            _capture.arguments.append(args)
        try:
            self.compiled[grid, self.threads, _capture.stream](*args)
        except Exception as error:
            raise _translate_error(error, f"the launch of {self.__name__}") from error


def kernel(threads, registers, double=None):
    """Compile a kernel; see `Kernel`."""
    return lambda function: Kernel(function, threads, registers, double)


# --- the device -------------------------------------------------------------------------------------------------------


def set_device(number):
    """Use GPU `number` from now on; ValueError if this process uses another one."""
    if _context["device"] not in (None, number):
        raise ValueError(f"this process computes on cuda:{_context['device']} already, got cuda:{number}")
    with _driver_errors("the start"):
        cuda.select_device(number)
    if _context["device"] is None:
        _defer_cleanup()
        os.register_at_fork(after_in_child=lambda: _context.update(forked=True))
    _context["device"] = number


def synchronize():
    """Wait for all launched work."""
    with _driver_errors("waiting"):
        cuda.synchronize()


def free_memory():
    """Bytes free on the device."""
    return cuda.current_context().get_memory_info()[0]


def skip_cleanup_after_fault(code):
    """If the CUDA context is unusable, make the interpreter exit with `code` and without cleanup: freeing arrays and
    kernels would fail, with a traceback for each."""

    def exit_now():
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(Exception):
                stream.flush()
        os._exit(code)

    try:
        cuda.synchronize()
    except Exception:
        atexit.register(exit_now)  # registered last, so called first


def precompile(step, on_progress=None):
    """Does nothing: kernels are compiled on their first launch."""


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
        # numba-cuda refuses to slice an array without memory, so an empty array is a slice of an array with one entry.
        if array.size == 0:
            return cuda.device_array(1, array.dtype)[:0].reshape(array.shape)
        return cuda.to_device(array)


def _defer_cleanup():
    """Keep numba-cuda from freeing memory in Python's garbage collection: that may run in a thread without a context,
    where the driver refuses it."""
    _context["deferred_frees"] = cuda.defer_cleanup()
    _context["deferred_frees"].__enter__()


@contextlib.contextmanager
def _cleaning_up():
    """Run deferred frees, unless this thread captures.  In the block, numba-cuda may free memory if none is left."""
    if _capture.arguments is not None or _context["deferred_frees"] is None:
        yield
        return
    _context["deferred_frees"].__exit__(None, None, None)
    try:
        pending = cuda.current_context().memory_manager.deallocations
        if len(pending) > MAX_PENDING_FREES:
            pending.clear()
        yield
    finally:
        _defer_cleanup()


def _contiguous(array, dtype=None):
    """`array` in C order, with canonical strides.  For NumPy the strides of axes of length 1 do not
    matter; for numba-cuda they do."""
    array = np.ascontiguousarray(array, dtype)
    return np.ndarray(array.shape, array.dtype, array)


def to_device(array):
    """`array` as a C-contiguous array of this device.  An array of another library on this GPU is shared, and copied
    only if it is not C-contiguous.

    ValueError for an array on another GPU, or whose stream belongs to another CUDA context.
    """
    if isinstance(array, np.ndarray | np.generic | list | tuple | int | float):
        return _upload(_contiguous(array))
    device = _gpu.device_of(array)
    if device is None:
        return to_device(np.asarray(array))
    if device != _context["device"]:
        raise ValueError(f"the array is on cuda:{device}, this process computes on cuda:{_context['device']}")
    try:
        # as_cuda_array waits for the array's stream.  bind(0): an array bound to a stream is copied without waiting.
        array = cuda.as_cuda_array(array if hasattr(array, "__cuda_array_interface__") else _DLPackAdapter(array)).bind(
            0
        )
    except Exception as error:
        if "CONTEXT" in str(error).upper() or "INVALID_HANDLE" in str(error).upper():
            raise ValueError(f"the array's stream belongs to another CUDA context: {error}") from error
        raise _translate_error(error, "taking another library's array") from error
    return array if array.is_c_contiguous() else to_device(to_host(array))


LEGACY_STREAM = 1  # CUDA's handle of the default stream, where kernels are launched


class _DLPackAdapter:
    """CUDA array interface for an array that has only DLPack."""

    def __init__(self, array):
        from cuda.core.utils import StridedMemoryView

        # The other library orders its pending work on the array before what is launched on our stream.
        view = StridedMemoryView.from_dlpack(array, stream_ptr=LEGACY_STREAM)
        self.keep = array, view
        size = np.dtype(view.dtype).itemsize
        self.__cuda_array_interface__ = {
            "version": 3, "shape": tuple(view.shape), "typestr": np.dtype(view.dtype).str, "data": (view.ptr, False),
            "strides": None if view.strides is None else tuple(size * step for step in view.strides),
        }  # fmt: skip


class ExportedArray:
    """A GPU array for other libraries, through DLPack, the CUDA array interface and `numpy.asarray`."""

    def __init__(self, array):
        self.array, self.shape, self.dtype = array, array.shape, array.dtype

    @property
    def __cuda_array_interface__(self):
        # The stream whose work the other library must wait for.
        return {**self.array.__cuda_array_interface__, "stream": LEGACY_STREAM}

    def __dlpack_device__(self):
        return 2, _context["device"]  # kDLCUDA

    def __dlpack__(self, *, dl_device=None, copy=None, **options):
        from cuda.core.utils import StridedMemoryView

        if copy or (dl_device is not None and tuple(map(int, dl_device)) != self.__dlpack_device__()):
            raise BufferError(f"the array is shared on cuda:{_context['device']}; numpy.asarray copies it to the host")
        synchronize()  # the other library may use any stream
        return StridedMemoryView.from_cuda_array_interface(self.array, stream_ptr=-1).__dlpack__(**options)

    def __array__(self, dtype=None, copy=None):
        return np.asarray(to_host(self.array), dtype)


def pinned(shape, dtype):
    """A new array in host memory that the device copies from and to without a copy in between."""
    with _driver_errors("an allocation of pinned memory"):
        return cuda.pinned_array(shape, dtype)


def to_host(array, out=None):
    """An array of this device as NumPy array, new or `out`; waits for pending kernels."""
    if not hasattr(array, "copy_to_host"):
        if _gpu.device_of(array) is None:
            return np.asarray(array)
        array = to_device(array)
    with _driver_errors("a copy from the device"):
        return array.copy_to_host(out)


def copy_to(array, values):
    """Overwrite an array of this device with `values` (NumPy or of this device, of the same shape)."""
    if isinstance(values, np.ndarray):
        values = _contiguous(values, array.dtype)
    with _driver_errors("a copy to the device"):
        array.copy_to_device(values)


def ravel(array):
    """`array` as a 1-D view.  Cached on the array: creating a view takes as long as a launch."""
    if array.ndim == 1:
        return array
    view = getattr(array, "_raveled", None)
    if view is None:
        view = array._raveled = array.reshape(array.size)
    return view


@functools.cache
def workspace(size, dtype, name):
    """A temporary array of `size` entries, shared by all calls with the same arguments: kernels run one after another.
    Never freed: a captured step may use it."""
    return empty((size,), dtype)


@functools.cache
def constant(values):
    """A tuple of integers as an int32 array of this device, allocated once."""
    return to_device(np.array(values, np.int32))


# --- time and memory --------------------------------------------------------------------------------------------------


def elapsed_seconds(function):
    """Seconds on the device of what `function` launches, measured by CUDA events."""
    start, stop = cuda.event(timing=True), cuda.event(timing=True)
    start.record()
    function()
    stop.record()
    stop.synchronize()
    return cuda.event_elapsed_time(start, stop) / 1000


# --- captured steps ---------------------------------------------------------------------------------------------------


def capture(step):
    """`step` as a callable that replays it as one CUDA graph.

    step  a function that launches kernels and neither allocates, copies nor waits.  It runs once before the capture, to
          compile everything.  Values that change from call to call must be in device memory
    """
    return CapturedStep(step)


class CapturedStep:
    """The first call runs the step, which compiles and allocates.  The second captures it, and later ones replay it.

    Addresses are part of a graph, so this object keeps the arguments of all launches alive.
    """

    def __init__(self, step):
        self.step, self.graph, self.calls, self.arguments = step, None, 0, []

    def __call__(self):
        self.calls += 1
        if self.calls == 1:
            return self.step()
        if self.graph is None:
            self.capture()
        if not self.graph:
            return self.step()
        with _driver_errors("the replay of a captured step"):
            return self.graph()

    def capture(self):
        from cuda.core import Device  # a dependency of numba-cuda

        device = Device(_context["device"])
        device.set_current()
        builder, capturing = device.create_graph_builder(), True
        try:
            builder.begin_building("thread_local")  # the driver refuses calls that cannot be captured
            # numba-cuda accepts a builder as stream since 0.29; older versions need the builder's stream.
            takes_builder = tuple(map(int, numba_cuda_version().split(".")[:2])) >= (0, 29)
            _capture.stream = builder if takes_builder else cuda.external_stream(int(builder.stream.handle))
            _capture.arguments = self.arguments
            self.step()
            capturing = False
            graph = builder.end_building().complete()
            self.graph = functools.partial(graph.launch, device.default_stream)
        except Exception as error:
            warnings.warn(f"the step could not be captured and runs kernel by kernel: {error}", stacklevel=3)
            self.graph, self.arguments = False, []
        finally:
            _capture.stream, _capture.arguments = 0, None
            if capturing:  # until it ends, this thread may not even allocate
                with contextlib.suppress(Exception):
                    builder.end_building()


def numba_cuda_version():
    """The version of numba-cuda, as text."""
    from importlib.metadata import version

    return version("numba-cuda")
