"""The stand-in CUDA driver of cuda_on_cpu/, through cuda.bindings, cuda.core and numba-cuda."""

import ctypes
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import cuda_on_cpu
import numpy as np
import pytest

if os.environ.get("TINYCNN_CUDA") == "gpu":
    pytest.skip("the tests use a real GPU", allow_module_level=True)
elif cuda_on_cpu.unavailable():
    pytest.skip(cuda_on_cpu.unavailable(), allow_module_level=True)
else:
    cuda_on_cpu.install()  # no-op after conftest.py

import numba
from cuda.bindings import driver
from cuda.core import Device
from cuda.core.utils import StridedMemoryView
from numba import cuda

numba.config.CUDA_LOW_OCCUPANCY_WARNINGS = 0  # tests use small grids
PROGRAM = Path(cuda_on_cpu.__file__).parent  # python tests/support/cuda_on_cpu
ERROR = driver.CUresult
NONBLOCKING = driver.CUstream_flags.CU_STREAM_NON_BLOCKING
MODES = driver.CUstreamCaptureMode
GLOBAL = MODES.CU_STREAM_CAPTURE_MODE_GLOBAL
THREAD_LOCAL = MODES.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
RELAXED = MODES.CU_STREAM_CAPTURE_MODE_RELAXED
ACTIVE = driver.CUstreamCaptureStatus.CU_STREAM_CAPTURE_STATUS_ACTIVE
INVALIDATED = driver.CUstreamCaptureStatus.CU_STREAM_CAPTURE_STATUS_INVALIDATED


def ok(result):
    """Assert success of a driver call; returns its other results."""
    error, *values = result
    assert error == ERROR.CUDA_SUCCESS, error
    return values[0] if len(values) == 1 else tuple(values)


def error_of(result):
    return result[0].name.removeprefix("CUDA_ERROR_")


@pytest.fixture(autouse=True)
def clean():
    """A current context, and no problems before and after the test."""
    Device(0).set_current()
    cuda_on_cpu.run_pending()
    assert cuda_on_cpu.problems() == []
    yield
    cuda_on_cpu.run_pending()
    assert cuda_on_cpu.problems() == []
    cuda_on_cpu.set_order("forward")
    cuda_on_cpu.set_memory(4 << 30)


@pytest.fixture
def fault():
    """Check that the only problem is a fault with these texts and that all calls fail; then recover."""

    def check(error, *texts):
        for call in (driver.cuCtxSynchronize(), driver.cuMemAlloc(4), driver.cuStreamCreate(0)):
            assert error_of(call) == error
        cuda_on_cpu.recover()
        (problem,) = cuda_on_cpu.problems()
        assert all(text in problem for text in texts), problem

    yield check
    cuda_on_cpu.recover()


@pytest.fixture
def stream():
    handle = ok(driver.cuStreamCreate(NONBLOCKING))
    yield handle
    driver.cuStreamEndCapture(handle)
    ok(driver.cuStreamDestroy(handle))


@pytest.fixture
def blocking():
    handle = ok(driver.cuStreamCreate(0))
    yield handle
    driver.cuStreamEndCapture(handle)
    ok(driver.cuStreamDestroy(handle))


@cuda.jit
def add(a, value):
    i = cuda.grid(1)
    if i < a.size:
        a[i] += value


@cuda.jit
def put(a, i, value):
    a[i] = value


@cuda.jit
def last_writer(a):
    a[0] = cuda.grid(1)


@cuda.jit
def wait_in_some(a):
    if cuda.threadIdx.x < a[0]:
        cuda.syncthreads()
    a[1] = 1


def launch(kernel, stream, *arguments, threads=32):
    kernel[1, threads, cuda.external_stream(int(stream)) if stream else 0](*arguments)


def array(values, dtype=np.float32):
    return cuda.to_device(np.array(values, dtype))


def pointer(device_array):
    return device_array.__cuda_array_interface__["data"][0]


def read(address, count, stream=None):
    """Copy `count` floats to the host, synchronously or in `stream` with a wait."""
    values = np.zeros(count, np.float32)
    if stream is None:
        ok(driver.cuMemcpyDtoH(values.ctypes.data, address, values.nbytes))
    else:
        ok(driver.cuMemcpyDtoHAsync(values.ctypes.data, address, values.nbytes, stream))
        ok(driver.cuStreamSynchronize(stream))
    return values.tolist()


add[1, 32](array([0.0]), np.float32(1))  # compiles and loads
put[1, 1](array([0.0]), 0, np.float32(1))
cuda.synchronize()


# --- kernels ----------------------------------------------------------------------------------------------------------


def test_a_kernel_computes():
    a = array(np.arange(1000))
    add[4, 256](a, np.float32(0.5))
    np.testing.assert_array_equal(a.copy_to_host(), np.arange(1000, dtype=np.float32) + 0.5)


def test_threads_and_blocks_run_in_the_order_that_was_set():
    found = {}
    for name in cuda_on_cpu.ORDERS:
        cuda_on_cpu.set_order(name)
        a = array([0], np.int64)
        last_writer[7, 32](a)
        found[name] = int(a.copy_to_host()[0])
    assert found["forward"] == 7 * 32 - 1
    assert found["backward"] == 0
    assert 0 < found["shuffled"] < 7 * 32 - 1


class Call:
    """add(a, value) as a launch of the driver API."""

    def __init__(self, a, value):
        library = add.overloads[add.signatures[0]]._codelibrary
        self.handle = driver.CUfunction(int(library.get_cufunc().handle))
        size, itemsize, unused = ctypes.c_int64(a.size), ctypes.c_int64(4), ctypes.c_uint64(0)
        self.address, self.value = ctypes.c_uint64(pointer(a)), ctypes.c_float(value)
        # An array of one axis: two unused fields, size, item size, address, shape, strides.
        self.arguments = [unused, unused, size, itemsize, self.address, size, itemsize, self.value]
        self.pointers = (ctypes.c_void_p * 8)(*map(ctypes.addressof, self.arguments))

    def launch(self, grid=(1, 1, 1), block=(32, 1, 1), shared=0, stream=0):
        return driver.cuLaunchKernel(self.handle, *grid, *block, shared, stream, ctypes.addressof(self.pointers), 0)


def test_arguments_are_copied_at_the_launch():
    a = array([1.0])
    call = Call(a, 2)
    ok(call.launch())
    call.value.value, call.address.value = 100, 8
    assert a.copy_to_host() == [3]


LIMITS = [
    {"grid": (0, 1, 1)},
    {"grid": (1, 65536, 1)},
    {"grid": (1, 1, 65536)},
    {"block": (0, 1, 1)},
    {"block": (1025, 1, 1)},
    {"block": (1, 1, 65)},
    {"block": (32, 33, 1)},
    {"shared": 48 * 1024 + 1},
]


@pytest.mark.parametrize("shape", LIMITS)
def test_limits_of_a_launch(shape):
    a = array([1.0])
    call = Call(a, 2)
    assert error_of(call.launch(**shape)) == "INVALID_VALUE"
    ok(call.launch(grid=(3, 65535, 1), block=(16, 1, 64), shared=48 * 1024))
    cuda_on_cpu.recover()  # drop the queued launch
    assert a.copy_to_host() == [1]


def test_more_shared_memory_needs_an_attribute():
    call = Call(array([1.0]), 2)
    max_shared = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
    kernel = driver.CUkernel(int(call.handle))
    assert ok(driver.cuKernelGetAttribute(max_shared, kernel, 0)) == 48 * 1024
    ok(driver.cuKernelSetAttribute(max_shared, 227 * 1024, kernel, 0))
    assert error_of(driver.cuKernelSetAttribute(max_shared, 227 * 1024 + 1, kernel, 0)) == "INVALID_VALUE"
    ok(call.launch(shared=227 * 1024))
    assert error_of(call.launch(shared=227 * 1024 + 1)) == "INVALID_VALUE"
    ok(driver.cuKernelSetAttribute(max_shared, 48 * 1024, kernel, 0))


def test_a_launch_without_parameters_or_on_an_unknown_stream():
    call = Call(array([1.0]), 2)
    assert error_of(driver.cuLaunchKernel(call.handle, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0)) == "INVALID_VALUE"
    call.pointers[7] = None
    assert error_of(call.launch()) == "INVALID_VALUE"
    assert error_of(Call(array([1.0]), 2).launch(stream=4096)) == "INVALID_HANDLE"
    assert "0x1000 is not a live stream" in cuda_on_cpu.problems()[0]


def test_more_registers_than_the_device_has():
    """The limit depends on the registers of the cubin, not only on the threads."""
    from cuda.core import ObjectCode

    cubin = bytearray(bytes(put.overloads[put.signatures[0]]._codelibrary.get_cubin().code))
    start = cubin.index(bytes([4, 0x2F, 8, 0]))  # EIATTR_REGCOUNT: symbol, registers
    cubin[start + 8] = 72
    name = put.overloads[put.signatures[0]]._codelibrary._entry_name
    kernel = ObjectCode.from_cubin(bytes(cubin)).get_kernel(name)
    assert kernel.attributes.num_regs == 72
    assert kernel.attributes.max_threads_per_block == 896
    arguments = (ctypes.c_void_p * 16)(*[ctypes.addressof(ctypes.c_uint64(0))] * 16)
    handle = driver.CUfunction(int(kernel.handle))
    result = driver.cuLaunchKernel(handle, 1, 1, 1, 928, 1, 1, 0, 0, ctypes.addressof(arguments), 0)
    assert error_of(result) == "LAUNCH_OUT_OF_RESOURCES"


def test_a_kernel_without_a_translation(monkeypatch):
    from cuda_on_cpu import ptx

    @cuda.jit
    def untranslated(a):
        a[0] = 1

    monkeypatch.setattr(cuda_on_cpu, "register", lambda *_: None)
    monkeypatch.setattr(ptx, "compile_kernel", lambda *_: None)
    with pytest.raises(Exception, match="INVALID_IMAGE"):
        untranslated[1, 1](array([0.0]))
    assert "untranslated" in cuda_on_cpu.problems()[0]


def test_a_translation_with_other_parameters(monkeypatch):
    """Two kernels of one name differ in their parameters."""
    from cuda_on_cpu import ptx

    @cuda.jit
    def other(a, b, c):
        a[0] = b + c

    library = put.overloads[put.signatures[0]]._codelibrary
    wrong = ptx.compile_kernel(cuda_on_cpu._ptx(library), cuda_on_cpu.FOLDER)
    monkeypatch.setattr(ptx, "compile_kernel", lambda *_: wrong)
    with pytest.raises(Exception, match="INVALID_IMAGE"):
        other[1, 1](array([0.0]), 1, 2)
    differs, launched = cuda_on_cpu.problems()
    assert "differ in their parameters" in differs
    assert "no translation" in launched


def test_an_image_that_is_not_a_cubin():
    assert error_of(driver.cuLibraryLoadData(b"no image at all", [], [], 0, [], [], 0)) == "INVALID_IMAGE"
    assert cuda_on_cpu.problems() == ["cuLibraryLoadData: the image is not a cubin with kernels"]


def test_a_kernel_of_an_unloaded_library():
    library = put.overloads[put.signatures[0]]._codelibrary
    handle = ok(driver.cuLibraryLoadData(bytes(library.get_cubin().code), [], [], 0, [], [], 0))
    kernel = ok(driver.cuLibraryGetKernel(handle, library._entry_name.encode()))
    assert error_of(driver.cuLibraryGetKernel(handle, b"nothing")) == "NOT_FOUND"
    ok(driver.cuLibraryUnload(handle))
    assert error_of(driver.cuKernelGetFunction(kernel)) == "INVALID_HANDLE"
    assert "is not a live kernel" in cuda_on_cpu.problems()[0]
    a = array([0.0])
    put[1, 1](a, 0, np.float32(3))  # the same kernel in another library
    assert a.copy_to_host() == [3]


# --- when queued work runs --------------------------------------------------------------------------------------------


def test_work_runs_when_something_waits_for_it(stream):
    a = array([0.0])
    before = cuda_on_cpu.kernels_run()
    launch(add, stream, a, np.float32(1))
    launch(add, stream, a, np.float32(1))
    b = array([5.0])  # allocates, and copies in the legacy stream
    assert (cuda_on_cpu.kernels_run() - before, cuda_on_cpu.pending_work()) == (0, 2)
    ok(driver.cuStreamSynchronize(stream))
    assert (cuda_on_cpu.kernels_run() - before, cuda_on_cpu.pending_work()) == (2, 0)
    assert read(pointer(a), 1) == [2]
    assert read(pointer(b), 1) == [5]


WAITS = {
    "stream": lambda stream: driver.cuStreamSynchronize(stream),
    "context": lambda stream: driver.cuCtxSynchronize(),
    "free": lambda stream: driver.cuMemFree(ok(driver.cuMemAlloc(4))),
}


@pytest.mark.parametrize("wait", WAITS)
def test_what_waits_for_a_nonblocking_stream(stream, wait):
    a = array([0.0])
    launch(add, stream, a, np.float32(1))
    assert read(pointer(a), 1) == [0]  # a synchronous copy does not wait: synchronisation is missing
    ok(WAITS[wait](stream))
    assert read(pointer(a), 1) == [1]


@pytest.mark.parametrize("special", [0, driver.CU_STREAM_LEGACY, driver.CU_STREAM_PER_THREAD])
def test_a_synchronous_copy_waits_for_the_default_streams(special):
    a = array([0.0])
    launch(add, special, a, np.float32(1))
    assert read(pointer(a), 1) == [1]


def test_blocking_streams_and_the_legacy_stream_wait_for_each_other(blocking):
    other = ok(driver.cuStreamCreate(0))
    a, b = array([1.0]), array([10.0])
    launch(add, blocking, a, np.float32(1))
    launch(add, other, b, np.float32(1))
    ok(driver.cuStreamSynchronize(blocking))
    assert cuda_on_cpu.pending_work() == 1  # blocking streams do not wait for each other
    ok(driver.cuMemcpyDtoDAsync(pointer(a), pointer(b), 4, 0))  # after both
    launch(add, blocking, a, np.float32(100))  # after the copy
    ok(driver.cuStreamSynchronize(blocking))
    assert cuda_on_cpu.pending_work() == 0
    assert read(pointer(a), 1) == [111]
    ok(driver.cuStreamDestroy(other))


def test_asynchronous_copies_read_and_write_the_host_late(stream):
    a, source = array([0.0]), np.array([1], np.float32)
    ok(driver.cuMemcpyHtoDAsync(pointer(a), source.ctypes.data, 4, stream))
    source[0] = 2
    found = np.zeros(1, np.float32)
    ok(driver.cuMemcpyDtoHAsync(found.ctypes.data, pointer(a), 4, stream))
    assert found == [0]
    ok(driver.cuStreamSynchronize(stream))
    assert found == [2]


def test_the_host_does_not_wait_for_copies_and_fills_on_the_device():
    a, b = array([1.0]), array([0.0])
    ok(driver.cuMemcpyDtoD(pointer(b), pointer(a), 4))
    ok(driver.cuMemsetD8(pointer(a), 0, 4))
    assert cuda_on_cpu.pending_work() == 2
    assert read(pointer(b), 1) == [1]
    assert read(pointer(a), 1) == [0]


def test_the_work_of_a_destroyed_stream_still_runs():
    handle, a = ok(driver.cuStreamCreate(NONBLOCKING)), array([0.0])
    launch(add, handle, a, np.float32(1))
    ok(driver.cuStreamDestroy(handle))
    assert cuda_on_cpu.pending_work() == 1
    ok(driver.cuCtxSynchronize())
    assert read(pointer(a), 1) == [1]
    assert error_of(driver.cuStreamSynchronize(handle)) == "INVALID_HANDLE"
    assert "is not a live stream" in cuda_on_cpu.problems()[0]


def test_a_stream_waits_for_an_event_of_another(stream):
    producer, a = ok(driver.cuStreamCreate(NONBLOCKING)), array([0.0])
    event = ok(driver.cuEventCreate(0))
    launch(add, producer, a, np.float32(1))
    ok(driver.cuEventRecord(event, producer))
    launch(add, producer, a, np.float32(10))
    ok(driver.cuStreamWaitEvent(stream, event, 0))
    ok(driver.cuEventDestroy(event))  # the queued wait keeps what it needs
    assert read(pointer(a), 1, stream) == [1]
    assert cuda_on_cpu.pending_work() == 1
    ok(driver.cuStreamDestroy(producer))


def test_events(stream):
    a = array([0.0])
    start, end = (ok(driver.cuEventCreate(0)) for _ in range(2))
    assert error_of(driver.cuEventElapsedTime(start, end)) == "INVALID_HANDLE"
    ok(driver.cuEventQuery(start))  # never recorded
    ok(driver.cuEventRecord(start, stream))
    launch(add, stream, a, np.float32(1))
    ok(driver.cuEventRecord(end, stream))
    launch(add, stream, a, np.float32(1))
    assert error_of(driver.cuEventElapsedTime(start, end)) == "NOT_READY"
    assert error_of(driver.cuEventQuery(end)) == "NOT_READY"
    ok(driver.cuEventQuery(end))
    assert cuda_on_cpu.pending_work() == 1
    assert ok(driver.cuEventElapsedTime(start, end)) > 0
    assert error_of(driver.cuStreamQuery(stream)) == "NOT_READY"
    ok(driver.cuStreamQuery(stream))
    assert cuda_on_cpu.pending_work() == 0
    untimed = ok(driver.cuEventCreate(driver.CUevent_flags.CU_EVENT_DISABLE_TIMING))
    ok(driver.cuEventRecord(untimed, stream))
    ok(driver.cuEventSynchronize(untimed))
    assert error_of(driver.cuEventElapsedTime(start, untimed)) == "INVALID_HANDLE"
    for event in (start, end, untimed):
        ok(driver.cuEventDestroy(event))
    assert error_of(driver.cuEventQuery(end)) == "INVALID_HANDLE"
    assert "is not a live event" in cuda_on_cpu.problems()[0]


def test_numbas_events_and_streams():
    a, stream, event = array([0.0]), cuda.stream(), cuda.event()
    add[1, 32, stream](a, np.float32(1))
    event.record(stream)
    assert [event.query(), event.query()] == [False, True]
    assert a.copy_to_host() == [1]


# --- memory -----------------------------------------------------------------------------------------------------------


def test_new_memory_is_nan():
    assert np.isnan(cuda.device_array(7, np.float32).copy_to_host()).all()
    assert (cuda.device_array(7, np.int64).copy_to_host() == -1).all()


def test_freed_addresses_are_not_reused():
    seen = set()
    for _ in range(100):
        address = ok(driver.cuMemAlloc(4096))
        assert int(address) not in seen
        seen.add(int(address))
        ok(driver.cuMemFree(address))
    assert not seen & {address for address, _ in cuda_on_cpu.allocations()}


def test_out_of_device_memory():
    used = sum(size for _, size in cuda_on_cpu.allocations())
    cuda_on_cpu.set_memory(used + 1000)
    assert ok(driver.cuMemGetInfo()) == (1000, used + 1000)
    assert ok(driver.cuDeviceTotalMem(0)) == used + 1000
    assert error_of(driver.cuMemAlloc(1001)) == "OUT_OF_MEMORY"
    address = ok(driver.cuMemAlloc(1000))
    assert (int(address), 1000) in cuda_on_cpu.allocations()
    assert error_of(driver.cuMemAlloc(1)) == "OUT_OF_MEMORY"
    assert error_of(driver.cuMemAlloc(0)) == "INVALID_VALUE"
    ok(driver.cuMemFree(address))
    assert ok(driver.cuMemGetInfo())[0] == 1000
    cuda_on_cpu.set_memory(0)
    with pytest.raises(Exception, match="OUT_OF_MEMORY"):
        array([0.0])


@pytest.mark.parametrize(("offset", "where"), [(10, "after the end of"), (-1, "before")])
def test_bytes_written_beside_an_allocation(offset, where):
    address, other = ok(driver.cuMemAlloc(10)), ok(driver.cuMemAlloc(4))
    ctypes.memset(int(address) + offset, 0, 1)
    ok(driver.cuMemFree(other))
    assert cuda_on_cpu.problems() == [f"cuMemFree: bytes {where} an allocation of 10 bytes were written"]
    ok(driver.cuMemFree(address))


def test_copies_stay_inside_an_allocation(stream):
    address, host = ok(driver.cuMemAlloc(8)), np.zeros(4, np.int32)
    results = [
        driver.cuMemcpyHtoD(address, host.ctypes.data, 12),
        driver.cuMemcpyDtoH(host.ctypes.data, int(address) + 4, 8),
        driver.cuMemcpyHtoDAsync(host.ctypes.data, host.ctypes.data, 4, stream),
        driver.cuMemsetD8Async(address, 0, 9, stream),
    ]
    assert [error_of(result) for result in results] == ["INVALID_VALUE"] * 4
    problems = cuda_on_cpu.problems()
    assert len(problems) == 4
    assert all("not inside a live allocation" in problem for problem in problems)
    ok(driver.cuMemFree(address))
    assert error_of(driver.cuMemFree(address)) == "INVALID_VALUE"
    assert "byte 0 of a freed allocation of 8 bytes" in cuda_on_cpu.problems()[0]


def test_pointers():
    attributes = driver.CUpointer_attribute
    address = ok(driver.cuMemAlloc(100))
    inside = int(address) + 50
    assert ok(driver.cuPointerGetAttribute(attributes.CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL, inside)) == 0
    first, size = ok(driver.cuMemGetAddressRange(inside))
    assert (int(first), size) == (int(address), 100)
    queried = [attributes.CU_POINTER_ATTRIBUTE_MEMORY_TYPE, attributes.CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL]
    assert ok(driver.cuPointerGetAttributes(2, queried, inside)) == [driver.CUmemorytype.CU_MEMORYTYPE_DEVICE.value, 0]
    ok(driver.cuMemFree(address))
    for dead in (inside, np.zeros(1).ctypes.data):
        result = driver.cuPointerGetAttribute(attributes.CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL, dead)
        assert error_of(result) == "INVALID_VALUE"
        assert ok(driver.cuPointerGetAttributes(2, queried, dead)) == [0, -2]


# --- faults -----------------------------------------------------------------------------------------------------------


def test_a_write_past_the_end(fault):
    put[1, 1](array([0.0, 1.0]), 2, np.float32(1))
    fault("ILLEGAL_ADDRESS", "0 bytes after the end of an allocation of 8 bytes")


def test_a_write_to_freed_memory(fault, stream):
    address = int(ok(driver.cuMemAlloc(4)))
    view = cuda.as_cuda_array(Interface(address))
    ok(driver.cuMemFree(address))
    put[1, 1](view, 0, np.float32(1))
    fault("ILLEGAL_ADDRESS", "byte 0 of a freed allocation of 4 bytes")


def test_a_misaligned_write(fault):
    a = array([0.0, 1.0])
    put[1, 1](cuda.as_cuda_array(Interface(pointer(a) + 2)), 0, np.float32(1))
    fault("MISALIGNED_ADDRESS", "misaligned")


def test_a_barrier_that_some_threads_do_not_reach(fault):
    wait_in_some[1, 32](array([16, 0], np.int64))
    fault("LAUNCH_FAILED", "barrier")


def test_a_fault_stops_what_follows(fault, stream):
    a = array([0.0])
    launch(put, stream, a, 5, np.float32(1))
    launch(add, stream, a, np.float32(1))
    assert error_of(driver.cuStreamSynchronize(stream)) == "ILLEGAL_ADDRESS"
    assert error_of(driver.cuStreamSynchronize(stream)) == "ILLEGAL_ADDRESS"
    fault("ILLEGAL_ADDRESS", "put at 0x", "16 bytes after the end of an allocation of 4 bytes")
    assert read(pointer(a), 1) == [0]


def test_a_copy_to_an_invalid_address(fault, stream):
    ok(driver.cuMemcpyDtoHAsync(64, pointer(array([0.0])), 4, stream))
    assert error_of(driver.cuStreamSynchronize(stream)) == "ILLEGAL_ADDRESS"
    fault("ILLEGAL_ADDRESS", "memory fault in cuMemcpyDtoHAsync at 0x40")


class Interface:
    """One float at an address, as an array of another library."""

    def __init__(self, address, **more):
        self.__cuda_array_interface__ = {
            "version": 3, "shape": (1,), "typestr": "<f4", "data": (int(address), False), "strides": None, **more
        }  # fmt: skip


# --- capture and graphs -----------------------------------------------------------------------------------------------


def begin(stream, mode=RELAXED):
    ok(driver.cuStreamBeginCapture(stream, mode))


def instantiate(graph):
    return ok(driver.cuGraphInstantiateWithParams(graph, driver.CUDA_GRAPH_INSTANTIATE_PARAMS()))


def status(stream):
    return ok(driver.cuStreamIsCapturing(stream))


def test_a_graph_runs_what_was_captured(stream):
    a, b, host = array([1.0]), array([0.0]), np.zeros(1, np.float32)
    before = cuda_on_cpu.kernels_run()
    begin(stream)
    launch(add, stream, a, np.float32(1))
    ok(driver.cuMemcpyDtoDAsync(pointer(b), pointer(a), 4, stream))
    ok(driver.cuMemsetD8Async(pointer(a), 0, 4, stream))
    ok(driver.cuMemcpyDtoHAsync(host.ctypes.data, pointer(b), 4, stream))
    assert status(stream) == ACTIVE
    graph = ok(driver.cuStreamEndCapture(stream))
    assert ok(driver.cuGraphGetNodes(graph, 0))[1] == 4
    executable = instantiate(graph)
    ok(driver.cuGraphDestroy(graph))
    assert (cuda_on_cpu.kernels_run() - before, cuda_on_cpu.pending_work()) == (0, 0)
    ok(driver.cuGraphLaunch(executable, stream))
    launch(add, stream, a, np.float32(41))  # after the graph
    ok(driver.cuGraphLaunch(executable, stream))
    ok(driver.cuGraphExecDestroy(executable))  # its launches are still queued
    assert host == [0]
    ok(driver.cuStreamSynchronize(stream))
    assert cuda_on_cpu.kernels_run() - before == 3
    assert (read(pointer(a), 1), read(pointer(b), 1), host.tolist()) == ([0], [42], [42])


def test_cuda_cores_graph_builder():
    device, a = Device(0), array([0.0])
    builder = device.create_graph_builder()
    builder.begin_building()
    add[1, 32, builder](a, np.float32(1))
    graph = builder.end_building().complete()
    for _ in range(3):
        graph.launch(device.default_stream)
    assert cuda_on_cpu.pending_work() == 3
    assert a.copy_to_host() == [3]
    graph.close()
    builder.close()


def test_a_graph_may_outlive_its_memory(stream, fault):
    address = ok(driver.cuMemAlloc(4))
    begin(stream)
    launch(put, stream, cuda.as_cuda_array(Interface(address)), 0, np.float32(1))
    executable = instantiate(ok(driver.cuStreamEndCapture(stream)))
    ok(driver.cuGraphLaunch(executable, stream))
    ok(driver.cuMemFree(address))  # waits for the launch
    ok(driver.cuGraphLaunch(executable, stream))
    fault("ILLEGAL_ADDRESS", "byte 0 of a freed allocation of 4 bytes")


HARMFUL = {
    "cuMemAlloc": lambda address: driver.cuMemAlloc(4),
    "cuMemFree": lambda address: driver.cuMemFree(address),
    "cuMemcpyHtoD": lambda address: driver.cuMemcpyHtoD(address, np.zeros(1, np.float32).ctypes.data, 4),
    "cuMemcpyDtoH": lambda address: driver.cuMemcpyDtoH(np.zeros(1, np.float32).ctypes.data, address, 4),
    "cuMemsetD8": lambda address: driver.cuMemsetD8(address, 0, 4),
}


@pytest.mark.parametrize("mode", [GLOBAL, THREAD_LOCAL])
@pytest.mark.parametrize("call", HARMFUL)
def test_unsafe_calls_invalidate_a_capture(stream, call, mode):
    address = ok(driver.cuMemAlloc(4))
    a = array([0.0])
    begin(stream, mode)
    assert error_of(HARMFUL[call](address)) == "STREAM_CAPTURE_UNSUPPORTED"
    assert status(stream) == INVALIDATED
    with pytest.raises(Exception, match="STREAM_CAPTURE_INVALIDATED"):
        launch(add, stream, a, np.float32(1))
    assert error_of(driver.cuStreamEndCapture(stream)) == "STREAM_CAPTURE_INVALIDATED"
    ok(driver.cuMemFree(address))


@pytest.mark.parametrize("call", HARMFUL)
def test_a_relaxed_capture_allows_unsafe_calls(stream, call):
    """But work in the legacy stream is reported, because the graph does not contain it."""
    address = ok(driver.cuMemAlloc(4))
    begin(stream, RELAXED)
    ok(HARMFUL[call](address))
    assert status(stream) == ACTIVE
    ok(driver.cuGraphDestroy(ok(driver.cuStreamEndCapture(stream))))
    problems = cuda_on_cpu.problems()
    assert len(problems) == (call not in ("cuMemAlloc", "cuMemFree"))
    assert all("is not part of the graph" in problem for problem in problems)


@pytest.mark.parametrize(
    ("mode", "error"), [(GLOBAL, "STREAM_CAPTURE_UNSUPPORTED"), (THREAD_LOCAL, None), (RELAXED, None)]
)
def test_calls_of_other_threads_during_a_capture(stream, mode, error):
    found = []

    def allocate():
        Device(0).set_current()
        found.append(driver.cuMemAlloc(4))
        found.append(driver.cuStreamEndCapture(stream))

    begin(stream, mode)
    thread = threading.Thread(target=allocate)
    thread.start()
    thread.join()
    if error is None:
        ok(driver.cuMemFree(ok(found[0]))) if mode == RELAXED else None
    else:
        assert error_of(found[0]) == error
    if mode == RELAXED:
        ok(found[1])
    else:
        assert error_of(found[1]) == "STREAM_CAPTURE_WRONG_THREAD"
        assert (status(stream) == INVALIDATED) == (mode == GLOBAL)


def test_calls_that_a_capture_refuses(stream):
    event, captured = (ok(driver.cuEventCreate(0)) for _ in range(2))
    ok(driver.cuEventRecord(event, 0))
    cases = [
        (lambda: driver.cuStreamSynchronize(stream), "STREAM_CAPTURE_UNSUPPORTED"),
        (lambda: driver.cuStreamQuery(stream), "STREAM_CAPTURE_UNSUPPORTED"),
        (lambda: driver.cuCtxSynchronize(), "STREAM_CAPTURE_UNSUPPORTED"),
        (lambda: driver.cuStreamWaitEvent(stream, event, 0), "STREAM_CAPTURE_ISOLATION"),
        (lambda: driver.cuEventQuery(captured), "CAPTURED_EVENT"),
        (lambda: driver.cuEventSynchronize(captured), "CAPTURED_EVENT"),
        (lambda: driver.cuStreamWaitEvent(0, captured, 0), "STREAM_CAPTURE_IMPLICIT"),
    ]
    for call, error in cases:
        begin(stream)
        ok(driver.cuEventRecord(captured, stream))
        assert error_of(call()) == error
        assert status(stream) == INVALIDATED
        assert error_of(driver.cuStreamEndCapture(stream)) == "STREAM_CAPTURE_INVALIDATED"
    assert error_of(driver.cuStreamWaitEvent(stream, captured, 0)) == "CAPTURED_EVENT"
    assert error_of(driver.cuStreamEndCapture(stream)) == "ILLEGAL_STATE"
    assert error_of(driver.cuStreamBeginCapture(0, RELAXED)) == "STREAM_CAPTURE_UNSUPPORTED"
    begin(stream)
    assert error_of(driver.cuStreamBeginCapture(stream, RELAXED)) == "ILLEGAL_STATE"


def test_the_legacy_stream_while_a_blocking_stream_captures(blocking):
    a = array([0.0])
    begin(blocking)
    assert error_of(driver.cuStreamIsCapturing(0)) == "STREAM_CAPTURE_IMPLICIT"
    assert status(blocking) == ACTIVE  # a query is allowed
    with pytest.raises(Exception, match="STREAM_CAPTURE_IMPLICIT"):
        launch(add, 0, a, np.float32(1))
    assert status(blocking) == INVALIDATED


def test_captures_that_fork_and_join(stream):
    side, event = ok(driver.cuStreamCreate(NONBLOCKING)), ok(driver.cuEventCreate(0))
    a = array([0.0])

    def fork():
        begin(stream)
        ok(driver.cuEventRecord(event, stream))
        ok(driver.cuStreamWaitEvent(side, event, 0))
        launch(add, side, a, np.float32(1))

    fork()
    assert error_of(driver.cuStreamEndCapture(stream)) == "STREAM_CAPTURE_UNJOINED"
    fork()
    assert error_of(driver.cuStreamEndCapture(side)) == "STREAM_CAPTURE_UNMATCHED"
    assert error_of(driver.cuStreamEndCapture(stream)) == "STREAM_CAPTURE_INVALIDATED"
    fork()
    ok(driver.cuEventRecord(event, side))
    launch(add, side, a, np.float32(1))  # not waited for
    ok(driver.cuStreamWaitEvent(stream, event, 0))
    assert error_of(driver.cuStreamEndCapture(stream)) == "STREAM_CAPTURE_UNJOINED"
    fork()
    ok(driver.cuEventRecord(event, side))
    ok(driver.cuStreamWaitEvent(stream, event, 0))
    graph = ok(driver.cuStreamEndCapture(stream))
    assert status(side) == driver.CUstreamCaptureStatus.CU_STREAM_CAPTURE_STATUS_NONE
    executable = instantiate(graph)
    ok(driver.cuGraphLaunch(executable, 0))
    assert read(pointer(a), 1) == [1]
    other = ok(driver.cuStreamCreate(NONBLOCKING))
    begin(stream)
    begin(other)
    ok(driver.cuEventRecord(event, other))
    assert error_of(driver.cuStreamWaitEvent(stream, event, 0)) == "STREAM_CAPTURE_MERGE"
    for capturing in (stream, other):
        assert error_of(driver.cuStreamEndCapture(capturing)) == "STREAM_CAPTURE_INVALIDATED"
    ok(driver.cuStreamDestroy(other))
    ok(driver.cuStreamDestroy(side))


def test_a_graph_releases_its_user_objects(stream):
    gone = []
    destroy = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(gone.append)
    address = ctypes.cast(destroy, ctypes.c_void_p).value
    held = ok(driver.cuUserObjectCreate(7, driver.CUhostFn(address), 1, driver.CUuserObject_flags(1)))
    begin(stream)
    graph = ok(driver.cuStreamEndCapture(stream))
    move = driver.CUuserObjectRetain_flags.CU_GRAPH_USER_OBJECT_MOVE
    ok(driver.cuGraphRetainUserObject(graph, held, 1, move))
    executable = instantiate(graph)
    ok(driver.cuGraphDestroy(graph))
    assert gone == []
    ok(driver.cuGraphExecDestroy(executable))
    assert gone == [7]


# --- errors on purpose ------------------------------------------------------------------------------------------------


def test_injected_errors(stream):
    cuda_on_cpu.inject_error("cuMemAlloc", "CUDA_ERROR_OUT_OF_MEMORY", after=1)
    before = cuda_on_cpu.call_count("cuMemAlloc")
    addresses = [ok(driver.cuMemAlloc(4))]
    assert error_of(driver.cuMemAlloc(4)) == "OUT_OF_MEMORY"
    addresses.append(ok(driver.cuMemAlloc(4)))
    assert cuda_on_cpu.call_count("cuMemAlloc") == before + 3
    for address in addresses:
        ok(driver.cuMemFree(address))
    cuda_on_cpu.inject_error("cuMemAlloc", 2, times=2)  # numba-cuda tries twice
    with pytest.raises(Exception, match="OUT_OF_MEMORY"):
        array([0.0])
    array([0.0])
    cuda_on_cpu.inject_error("cuGraphInstantiateWithParams", 1)
    begin(stream)
    graph = ok(driver.cuStreamEndCapture(stream))
    parameters = driver.CUDA_GRAPH_INSTANTIATE_PARAMS()
    assert error_of(driver.cuGraphInstantiateWithParams(graph, parameters)) == "INVALID_VALUE"
    instantiate(graph)
    with pytest.raises(ValueError, match="no function 'cuMemAllocate'"):
        cuda_on_cpu.inject_error("cuMemAllocate", 1)


def test_a_function_that_is_not_implemented():
    assert error_of(driver.cuMemAllocManaged(4, 1)) == "NOT_SUPPORTED"
    assert cuda_on_cpu.problems() == ["the driver function cuMemAllocManaged is not implemented"]


def test_error_names_and_strings():
    source = (PROGRAM / "driver.cpp").read_text()
    for error in ERROR:
        if f"return {error.name};" in source or f", {error.name})" in source:
            assert ok(driver.cuGetErrorName(error)) == error.name.encode()
            assert ok(driver.cuGetErrorString(error))
    assert ok(driver.cuGetErrorString(ERROR.CUDA_ERROR_OUT_OF_MEMORY)) == b"out of memory"


# --- device, context, threads -----------------------------------------------------------------------------------------


def test_the_device():
    device = Device(0)
    assert device.name == "PTX on the CPU"
    assert device.compute_capability == (9, 0)
    assert device.properties.warp_size == 32
    assert device.properties.multiprocessor_count == 132
    assert device.properties.max_shared_memory_per_block_optin == 227 * 1024
    assert len(device.uuid) == 36
    assert error_of(driver.cuDeviceGet(1)) == "INVALID_DEVICE"


def test_a_thread_has_its_own_context():
    found = []

    def work():
        found.append(error_of(driver.cuMemAlloc(4)))
        a = cuda.to_device(np.array([1], np.float32))  # numba-cuda makes the context current
        for _ in range(20):
            add[1, 32](a, np.float32(1))
        found.append(a.copy_to_host()[0])

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(map(str, found)) == ["21.0"] * 4 + ["INVALID_CONTEXT"] * 4


def test_a_forked_child_has_no_driver():
    child = os.fork()
    if child == 0:
        os._exit(error_of(driver.cuCtxSynchronize()) == "NOT_INITIALIZED")
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 1


# --- arrays of other libraries ----------------------------------------------------------------------------------------


class Foreign(Interface):
    """`Interface` with DLPack."""

    def __init__(self, array):
        super().__init__(pointer(array))
        self.view = StridedMemoryView.from_cuda_array_interface(array, stream_ptr=-1)

    def __dlpack_device__(self):
        return 2, 0

    def __dlpack__(self, **options):
        return self.view.__dlpack__()


@pytest.mark.parametrize("kind", [None, 1, 2, "nonblocking"])
def test_imported_arrays_wait_for_their_stream(stream, kind):
    a = array([1.0])
    handle = int(stream) if kind == "nonblocking" else kind
    launch(add, handle or 0, a, np.float32(1))
    imported = cuda.as_cuda_array(Interface(pointer(a), stream=handle))
    assert cuda_on_cpu.pending_work() == (1 if kind is None else 0)
    add[1, 32](imported, np.float32(10))
    assert a.copy_to_host() == [12]


@pytest.mark.parametrize("kind", [1, 2, "nonblocking"])
def test_cuda_core_orders_the_streams_of_two_libraries(stream, kind):
    a = array([1.0])
    producer = ok(driver.cuStreamCreate(NONBLOCKING))
    launch(add, producer, a, np.float32(1))
    consumer = int(stream) if kind == "nonblocking" else kind
    view = StridedMemoryView.from_cuda_array_interface(Interface(pointer(a), stream=int(producer)), stream_ptr=consumer)
    assert (view.ptr, view.shape, view.device_id, view.is_device_accessible) == (pointer(a), (1,), 0, True)
    assert read(pointer(a), 1, driver.CUstream(consumer)) == [2]
    ok(driver.cuStreamDestroy(producer))


def test_dlpack():
    a = array([1.0, 2.0, 3.0])
    view = StridedMemoryView.from_dlpack(Foreign(a), stream_ptr=-1)
    assert (view.ptr, view.shape, view.dtype, view.device_id) == (pointer(a), (3,), np.float32, 0)


# --- the whole process ------------------------------------------------------------------------------------------------


def run(folder, program, *arguments, code=0, **environment):
    """Run a program with `python tests/support/cuda_on_cpu`; returns its output."""
    (folder / "program.py").write_text(program)
    done = subprocess.run(
        [sys.executable, str(PROGRAM), *(arguments or ["program.py"])],
        cwd=folder, env=os.environ | environment, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout, done.stderr


def test_a_program_runs_as_on_a_gpu(tmp_path):
    program = "import sys; from cuda.core import Device; print(Device(0).compute_capability, sys.argv, __name__)"
    out, err = run(tmp_path, program, "program.py", "-x", "1", CUDA_ON_CPU_CC="80", CUDA_ON_CPU_LOG="log")
    assert out == "ComputeCapability(major=8, minor=0) ['program.py', '-x', '1'] __main__\n"
    assert err == ""
    assert "cuDeviceGetAttribute(75)" in (tmp_path / "log").read_text().splitlines()
    out, _ = run(tmp_path, "import sys; print(__name__, sys.argv[1:]); sys.exit(3)", "-m", "program", "y", code=3)
    assert out == "__main__ ['y']\n"
    _, err = run(tmp_path, "1 / 0", code=1)
    assert "ZeroDivisionError" in err


def test_a_program_with_problems_exits_with_99(tmp_path):
    program = """
        from cuda.bindings import driver
        driver.cuInit(0)
        driver.cuCtxSetCurrent(driver.cuDevicePrimaryCtxRetain(0)[1])
        address = int(driver.cuMemAlloc(4)[1])
        """
    program = textwrap.dedent(program)
    _, err = run(tmp_path, program + "driver.cuMemFree(4096)", code=99)
    assert "cuMemFree of 0x1000, which is not an allocation" in err
    late = "import atexit, ctypes\natexit.register(ctypes.memset, address + 4, 0, 1)"
    _, err = run(tmp_path, program + late, code=99)  # after the interpreter has ended
    assert "bytes after the end of an allocation of 4 bytes were written" in err
    _, err = run(tmp_path, program + "print(driver.cuMemAlloc(1001))", code=0, CUDA_ON_CPU_MEMORY="1000")
    assert err == ""


def test_a_reset_destroys_everything(tmp_path):
    program = """
        from cuda.bindings import driver
        context = [driver.cuInit(0), driver.cuDevicePrimaryCtxRetain(0)][1][1]
        driver.cuCtxSetCurrent(context)
        address, stream = driver.cuMemAlloc(4)[1], driver.cuStreamCreate(0)[1]
        driver.cuMemsetD8Async(address, 0, 4, stream)
        driver.cuDevicePrimaryCtxReset(0)
        for result in driver.cuMemFree(address), driver.cuStreamDestroy(stream), driver.cuCtxSynchronize():
            assert result[0] == driver.CUresult.CUDA_ERROR_CONTEXT_IS_DESTROYED, result
        driver.cuDevicePrimaryCtxRetain(0)
        assert driver.cuMemGetInfo()[1] == driver.cuMemGetInfo()[2]
        assert driver.cuStreamDestroy(stream)[0] == driver.CUresult.CUDA_ERROR_INVALID_HANDLE
        """
    _, err = run(tmp_path, textwrap.dedent(program), code=99)
    assert "cuStreamDestroy: 0xca0000" in err
    assert "1 problems" in err


def test_a_crash_outside_of_a_kernel_is_not_caught(tmp_path):
    program = """
        import ctypes, faulthandler
        from cuda.bindings import driver
        from cuda.core import Device
        faulthandler.enable()
        Device(0).set_current()
        address = driver.cuMemAlloc(4)[1]
        for value in 1, 2:
            driver.cuMemsetD8(address, value, 4); driver.cuCtxSynchronize()
        ctypes.string_at(64)
        """
    program = textwrap.dedent(program)
    _, err = run(tmp_path, program, code=-signal.SIGSEGV)
    assert "Fatal Python error: Segmentation fault" in err


def test_reasons_for_unavailability(monkeypatch):
    assert cuda_on_cpu.unavailable() is None
    monkeypatch.setattr(cuda_on_cpu, "NUMBA_CUDA", (99, 0))
    assert "is older than 99.0" in cuda_on_cpu.unavailable()
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert cuda_on_cpu.unavailable() == "g++ is not installed"
    monkeypatch.setattr(sys, "platform", "darwin")
    assert cuda_on_cpu.unavailable() == "only on Linux"
