"""Where tinycnn meets numba-cuda: how kernels are compiled, launched and recorded, and what their arrays are made of.

A kernel is a list of *phases* with barriers between them.  A phase is the work of one thread from one barrier to the
next: a plain function of (tid, nt, arrays ...), the thread's number in its block and the number of threads.  It does
not know whether its arrays lie in global or in shared memory, and calls nothing of CUDA's.  So one source serves a
GPU, Numba's simulator (NUMBA_ENABLE_CUDASIM=1) and the compiled emulation of _emulate.py, which finds missing barriers.

This module works on the first two; it is the only one that calls numba-cuda.  Rules for phases and kernels, all found
out by tools/check_kernels.py or the tests: constants are of the arrays' dtype (a Python float is float64 and drags the
arithmetic with it); arrays that stay in registers (`cuda.local.array`) are indexed by constants; hot loops index slices
by constants, or by U (Numba tests every signed index for being negative); shared arrays are declared one a line (the
simulator takes two on a line for the same).
"""

import contextlib
import functools
import importlib
import os
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
from tinycnn.backend import DeviceMemoryError
from tinycnn.kernels._cache import keep

cuda: Any = numba.cuda  # type checkers see the one that Numba itself still contains
SIMULATED = bool(getattr(numba.config, "ENABLE_CUDASIM"))  # noqa: B009
# Shared arrays read four floats at a time start at multiples of 16 bytes; the simulator refuses to be told so.
ALIGN = None if SIMULATED else 16
setattr(numba.config, "CUDA_LOW_OCCUPANCY_WARNINGS", 0)  # noqa: B010 (numba may have been imported before)

_state: dict[str, Any] = {
    "stream": 0,  # where kernels are launched: the default stream, or what is being recorded
    "held": None,  # while recording, the list of all arguments
    "number": None,  # of the GPU
    "forked": False,  # whether this is a forked child of a process that uses the GPU
}


def phase(function):
    """Compile a phase."""
    return cuda.jit(device=True)(function)


device = phase  # a function that phases call


def scalar(single, double):
    """One name for two functions of one number, `single` for float32 and `double` for float64."""

    def choose(x):
        return single(x) if isinstance(x, np.float32) else double(x)

    if not SIMULATED:
        compiled32, compiled64 = device(single), device(double)

        extending: Any = importlib.import_module("numba.cuda.extending")
        if not hasattr(extending, "overload"):  # numba-cuda before it parted from Numba
            extending = importlib.import_module("numba.extending")

        @extending.overload(choose, target="cuda")
        def _choose(x):
            return (lambda x: compiled32(x)) if x == numba.float32 else (lambda x: compiled64(x))

    return choose


class Kernel:
    """A compiled kernel; `kernel[blocks](...)` launches it, blocks: a number or a tuple of up to three.

    function   a list of phases and barriers        threads    of each block
    registers  a thread may take at most so many    double     why it computes in float64 on float32 arrays, if it does
    """

    def __init__(self, function, threads, registers, double):
        self.__name__, self.__doc__ = function.__name__, function.__doc__
        self.function, self.threads, self.registers, self.double = function, threads, registers, double
        self.compiled = cuda.jit()(function)
        if not SIMULATED:
            keep(self.compiled, importlib.import_module("numba.cuda.dispatcher").CUDACache)

    def __getitem__(self, blocks):
        return functools.partial(self.launch, blocks)

    def launch(self, blocks, *args):
        if _state["forked"]:
            raise RuntimeError(
                f"{self.__name__}: this process was forked from one that uses the GPU, and a GPU context "
                'does not survive a fork; start workers with multiprocessing.get_context("spawn")'
            )
        if _state["held"] is not None:
            _state["held"].append(args)
        self.compiled[blocks, self.threads, _state["stream"]](*args)


def kernel(threads, registers, double=None):
    """Compile a kernel; see `Kernel`."""
    return lambda function: Kernel(function, threads, registers, double)


# --- the device -------------------------------------------------------------------------------------------------------


def use(number):
    """Compute on GPU `number` from now on; one process works on one GPU."""
    if _state["number"] not in (None, number):
        raise ValueError(f"this process computes on cuda:{_state['number']} already, got cuda:{number}")
    if not SIMULATED:
        cuda.select_device(number)
        if _state["number"] is None:
            os.register_at_fork(after_in_child=lambda: _state.update(forked=True))
    _state["number"] = number


def synchronize():
    """Wait until everything launched so far is done."""
    cuda.synchronize()


def free_memory():
    """Bytes free on the device."""
    return cuda.current_context().get_memory_info()[0]


@contextlib.contextmanager
def _allocating(asked):
    try:
        yield
    except Exception as error:  # the driver's error class has no public name
        if "OUT_OF_MEMORY" not in str(error).upper().replace(" ", "_"):
            raise
        raise DeviceMemoryError(asked, free_memory()) from error


# --- arrays -----------------------------------------------------------------------------------------------------------


def empty(shape, dtype):
    """A new array on this device, filled with zeros."""
    zeros = np.zeros(shape, dtype)
    _indexable(zeros)
    with _allocating(zeros.nbytes):
        return cuda.to_device(zeros)


def _indexable(array):
    if array.size >= 2**32:
        raise ValueError(
            f"the kernels index with 32 bits: an array must have fewer than 2**32 entries, got {array.shape}"
        )


def to_device(array):
    """`array` as a C-contiguous array of this device: NumPy, or what another library holds on this GPU (shared, not
    copied, if it is C-contiguous)."""
    if isinstance(array, np.ndarray | np.generic | list | tuple | int | float):
        array = np.ascontiguousarray(array)
        _indexable(array)
        with _allocating(array.nbytes):
            return cuda.to_device(array)
    if SIMULATED:
        return array
    device = _gpu.device_of(array)
    if device is None:
        return to_device(np.asarray(array))
    if device != _state["number"]:
        raise ValueError(f"the array lies on cuda:{device}, this process computes on cuda:{_state['number']}")
    try:
        array = cuda.as_cuda_array(array if hasattr(array, "__cuda_array_interface__") else _Interface(array))
    except Exception as error:
        if "CONTEXT" in str(error).upper() or "INVALID_HANDLE" in str(error).upper():
            raise ValueError(f"the array's stream belongs to another CUDA context: {error}") from error
        raise
    return array if array.is_c_contiguous() else to_device(array.copy_to_host())


class _Interface:
    """An array that speaks DLPack only, as one that speaks CUDA's array interface."""

    def __init__(self, array):
        from cuda.core.utils import StridedMemoryView

        view = StridedMemoryView.from_dlpack(array, stream_ptr=-1)
        self.keep = array, view
        size = np.dtype(view.dtype).itemsize
        self.__cuda_array_interface__ = {
            "version": 3, "shape": tuple(view.shape), "typestr": np.dtype(view.dtype).str, "data": (view.ptr, False),
            "strides": None if view.strides is None else tuple(size * step for step in view.strides),
        }  # fmt: skip


class Shared:
    """A GPU array for other libraries: torch.as_tensor, cupy.asarray, jax.dlpack.from_dlpack, numpy.asarray take it."""

    def __init__(self, array):
        self.array, self.shape, self.dtype = array, array.shape, array.dtype

    @property
    def __cuda_array_interface__(self):
        return self.array.__cuda_array_interface__

    def __dlpack_device__(self):
        return 2, _state["number"]  # kDLCUDA

    def __dlpack__(self, **options):
        from cuda.core.utils import StridedMemoryView

        synchronize()
        return StridedMemoryView.from_cuda_array_interface(self.array, stream_ptr=-1).__dlpack__(**options)

    def __array__(self, dtype=None, copy=None):
        return np.asarray(to_host(self.array), dtype)


def share(array):
    """`array` as other libraries take it."""
    return Shared(array)


def to_host(array):
    """An array of this device as NumPy; waits for the kernels that write it."""
    return array.copy_to_host() if hasattr(array, "copy_to_host") else np.asarray(array)


def write(array, values):
    """Overwrite an array of this device with `values` (NumPy or of this device, of the same shape)."""
    if isinstance(values, np.ndarray):
        values = np.ascontiguousarray(values, array.dtype)
    array.copy_to_device(values)


def flat(array):
    """`array` as one axis.  Remembered on the array, since making a view costs as much time as a launch."""
    if array.ndim == 1:
        return array
    view = getattr(array, "_flat", None)
    if view is None:
        view = array.reshape(array.size)
        if not SIMULATED:
            array._flat = view
    return view


@functools.cache
def scratch(size, dtype, use):
    """`size` numbers of room for a kernel; the same array for the same size, dtype and use, as kernels run one after
    another.  Allocated once, and never freed: a recorded step may hold on to it."""
    return empty((size,), dtype)


@functools.cache
def constant(values):
    """A tuple of integers as an int32 array of this device, allocated once."""
    return to_device(np.array(values, np.int32))


# --- time and memory --------------------------------------------------------------------------------------------------


def seconds(function):
    """Seconds that the device takes for what `function` launches, by events on the device."""
    if SIMULATED:
        raise RuntimeError("the simulator has no clock")
    start, stop = cuda.event(timing=True), cuda.event(timing=True)
    start.record()
    function()
    stop.record()
    stop.synchronize()
    return cuda.event_elapsed_time(start, stop) / 1000


# --- recorded steps ---------------------------------------------------------------------------------------------------


def capture(step, outputs=()):
    """`step` as one CUDA graph: called without arguments, it does what `step()` does with one launch.

    step     a function that launches kernels, and neither allocates, copies, nor waits.  It is run once before the
             recording, so that everything is compiled; what changes from call to call must live in device memory
    outputs  of no use here
    """
    if SIMULATED:
        return step
    return Recorded(step)


class Recorded:
    """The first call runs the step as it is, which compiles and allocates; the second records it, and replays.

    Addresses are part of a recording, so this object keeps all arrays alive that the kernels were given.
    """

    def __init__(self, step):
        self.step, self.graph, self.calls, self.held = step, None, 0, []

    def __call__(self):
        self.calls += 1
        if self.calls == 1:
            return self.step()
        if self.graph is None:
            self.record()
        return self.graph() if self.graph else self.step()

    def record(self):
        from cuda.core import Device  # numba-cuda depends on it

        device = Device(_state["number"])
        device.set_current()
        builder = device.create_graph_builder()
        builder.begin_building()
        try:
            # numba-cuda takes the builder in place of a stream since 0.29; before, its stream does the same.
            newer = tuple(map(int, numba_cuda_version().split(".")[:2])) >= (0, 29)
            _state["stream"] = builder if newer else cuda.external_stream(int(builder.stream.handle))
            _state["held"] = self.held
            with cuda.defer_cleanup():
                self.step()
        except Exception as error:
            warnings.warn(f"the step could not be recorded and runs kernel by kernel: {error}", stacklevel=3)
            with contextlib.suppress(Exception):
                builder.end_building()
            self.graph = False
            return
        finally:
            _state["stream"], _state["held"] = 0, None
        graph = builder.end_building().complete()
        self.graph = functools.partial(graph.launch, device.default_stream)


def numba_cuda_version():
    """numba-cuda's version, as text."""
    from importlib.metadata import version

    return version("numba-cuda")
