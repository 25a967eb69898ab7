"""tinycnn/cuda/_launch.py without a GPU, with stand-ins for the driver: recording, foreign arrays, memory."""

import contextlib
import sys
from types import SimpleNamespace

import numpy as np
import pytest

pytest.importorskip("numba.cuda")
from tinycnn import backend
from tinycnn.cuda import _launch

pytestmark = pytest.mark.skipif(_launch.SIMULATED, reason="in the simulator a step is its own recording")


class DeviceArray:
    """What numba-cuda's device arrays are to _launch.py."""

    def __init__(self, array, contiguous=True):
        self.array, self.contiguous, self.size, self.ndim = array, contiguous, array.size, array.ndim

    def is_c_contiguous(self):
        return self.contiguous

    def copy_to_host(self):
        return self.array

    def reshape(self, size):
        return DeviceArray(self.array.reshape(size))


@pytest.fixture
def state(monkeypatch):
    fresh = {"stream": 0, "held": None, "number": 0, "forked": False}
    monkeypatch.setattr(_launch, "_state", fresh)
    return fresh


@pytest.fixture
def driver(monkeypatch):
    """Stand-ins for numba.cuda's functions; a test adds what it needs."""
    fake = SimpleNamespace(
        defer_cleanup=contextlib.nullcontext, to_device=lambda a: DeviceArray(np.array(a)), synchronize=lambda: None,
        external_stream=lambda handle: ("stream", handle),
    )  # fmt: skip
    monkeypatch.setattr(_launch, "cuda", fake)
    return fake


# --- recording --------------------------------------------------------------------------------------------------------


class Builder:
    """cuda.core's graph builder."""

    stream = SimpleNamespace(handle=7)

    def __init__(self, log):
        self.log = log

    def begin_building(self):
        self.log.append("begin")

    def end_building(self):
        self.log.append("end")
        return self

    def complete(self):
        return SimpleNamespace(launch=lambda stream: self.log.append(f"replay on {stream}"))


@pytest.fixture
def log(monkeypatch):
    """What happens on the stand-in for cuda.core, in order."""
    happened: list[str] = []
    device = SimpleNamespace(
        set_current=lambda: None, create_graph_builder=lambda: Builder(happened), default_stream="the default stream"
    )
    monkeypatch.setitem(sys.modules, "cuda.core", SimpleNamespace(Device=lambda number: device))
    return happened


@pytest.mark.usefixtures("driver")
@pytest.mark.parametrize(("version", "stream"), [("0.30.4", "builder"), ("0.28.2", "stream")])
def test_a_step_runs_is_recorded_and_is_replayed(state, log, monkeypatch, version, stream):
    monkeypatch.setattr(_launch, "numba_cuda_version", lambda: version)
    launched = []

    class Compiled:
        def __getitem__(self, blocks_threads_stream):
            return lambda *args: launched.append((blocks_threads_stream[2], args))

    monkeypatch.setattr(_launch.cuda, "jit", lambda **options: lambda function: Compiled(), raising=False)
    kernel = _launch.Kernel(lambda: None, 32, 32, None)
    array = object()
    step = _launch.capture(lambda: kernel[1](array))
    step()
    assert launched == [(0, (array,))]
    assert log == []
    step()
    assert log == ["begin", "end", "replay on the default stream"]
    assert len(launched) == 2
    where = launched[1][0]
    assert isinstance(where, Builder) if stream == "builder" else where == ("stream", 7)
    step()
    assert log[-2:] == ["replay on the default stream"] * 2
    assert len(launched) == 2
    assert step.held == [(array,)]  # addresses are part of the recording: the arrays must live as long
    assert state["stream"] == 0
    assert state["held"] is None


@pytest.mark.usefixtures("driver")
def test_a_step_that_cannot_be_recorded_says_so_and_runs(state, log, monkeypatch):
    monkeypatch.setattr(_launch, "numba_cuda_version", lambda: "0.30.4")
    ran = []

    def step():
        if state["stream"] != 0:
            raise RuntimeError("operation not permitted when stream is capturing")
        ran.append(1)

    recorded = _launch.capture(step)
    recorded()
    with pytest.warns(UserWarning, match="could not be recorded and runs kernel by kernel: operation not permitted"):
        recorded()
    recorded()
    assert ran == [1, 1, 1]
    assert state["stream"] == 0


# --- arrays -----------------------------------------------------------------------------------------------------------


class Foreign:
    """An array of another library, on GPU `number`, with one or both of the two protocols."""

    def __init__(self, number=0, interface=True):
        self.number = number
        if interface:
            self.__cuda_array_interface__ = {"version": 3}

    def __dlpack_device__(self):
        return 2, self.number


@pytest.mark.usefixtures("state")
def test_arrays_of_other_libraries(driver, monkeypatch):
    seen = []

    def as_cuda_array(array):
        seen.append(array.__cuda_array_interface__)
        return DeviceArray(np.ones(3), contiguous=len(seen) < 3)

    driver.as_cuda_array = as_cuda_array
    assert _launch.to_device(Foreign()).array.sum() == 3
    with pytest.raises(ValueError, match="the array lies on cuda:1, this process computes on cuda:0"):
        _launch.to_device(Foreign(1))

    view = SimpleNamespace(ptr=4096, shape=(2, 3), strides=(3, 1), dtype=np.dtype(np.float32))
    utils = SimpleNamespace(StridedMemoryView=SimpleNamespace(from_dlpack=lambda array, stream_ptr: view))
    monkeypatch.setitem(sys.modules, "cuda.core.utils", utils)
    _launch.to_device(Foreign(interface=False))
    assert seen[1] == {
        "version": 3, "shape": (2, 3), "typestr": "<f4", "data": (4096, False), "strides": (12, 4)
    }  # fmt: skip
    assert _launch.to_device(Foreign()).contiguous  # what is not in C order is copied


@pytest.mark.usefixtures("state")
def test_a_stream_of_another_context(driver):
    def as_cuda_array(array):
        raise RuntimeError("[400] Call to cuStreamSynchronize results in CUDA_ERROR_INVALID_CONTEXT")

    driver.as_cuda_array = as_cuda_array
    with pytest.raises(ValueError, match="the array's stream belongs to another CUDA context"):
        _launch.to_device(Foreign())


@pytest.mark.usefixtures("state", "driver")
def test_what_is_handed_out_is_an_array_to_others():
    shared = _launch.share(SimpleNamespace(
        shape=(3,), dtype=np.dtype(np.float32), copy_to_host=lambda: np.ones(3, np.float32),
        __cuda_array_interface__={"version": 3},
    ))  # fmt: skip
    np.testing.assert_array_equal(np.asarray(shared), np.ones(3))
    assert shared.__dlpack_device__() == (2, 0)
    assert shared.__cuda_array_interface__ == {"version": 3}
    assert (shared.shape, shared.dtype) == ((3,), np.float32)


@pytest.mark.usefixtures("state")
def test_out_of_memory(driver, monkeypatch):
    def full(array):
        raise RuntimeError("[2] Call to cuMemAlloc results in CUDA_ERROR_OUT_OF_MEMORY")

    driver.to_device = full
    monkeypatch.setattr(_launch, "free_memory", lambda: 3 << 20)
    for ask in (
        lambda: _launch.empty((1 << 20,), np.float32),
        lambda: _launch.to_device(np.zeros(1 << 20, np.float32)),
    ):
        with pytest.raises(backend.DeviceMemoryError, match=r"asked for 4.0 MiB, 3.0 MiB free"):
            ask()
    driver.to_device = lambda array: (_ for _ in ()).throw(RuntimeError("another error"))
    with pytest.raises(RuntimeError, match="another error"):
        _launch.empty((1,), np.float32)


@pytest.mark.usefixtures("state")
def test_an_array_too_large_for_the_kernels_indices(driver):
    huge = np.broadcast_to(np.zeros(1, np.uint8), (2**32,))
    with pytest.raises(ValueError, match=r"fewer than 2\*\*32 entries"):
        _launch._indexable(huge)


def test_views_are_made_once():
    array = DeviceArray(np.zeros((2, 3)))
    assert _launch.flat(array) is _launch.flat(array)
    assert _launch.flat(array).ndim == 1
