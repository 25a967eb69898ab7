"""The CUDA kernels against their CPU twins, on whatever plays the GPU: by default the emulation (tinycnn/cuda/
_emulate.py), with NUMBA_ENABLE_CUDASIM=1 Numba's simulator, with `pytest -m gpu` a GPU."""

import inspect

import cuda_calls
import numpy as np
import pytest

from tinycnn import cuda, kernels
from tinycnn.cuda import _target

pytestmark = pytest.mark.gpu
SIMULATOR = not _target.EMULATED and _target.SIMULATED
SERVICES = {"capture", "empty", "to_device", "to_host", "write"}


@pytest.fixture(params=["forward", "backward", "shuffled"] if _target.EMULATED else ["any order"])
def order(request, monkeypatch):
    """The order in which the emulation runs threads and blocks; on a GPU it is nobody's choice."""
    if _target.EMULATED:
        from tinycnn.cuda import _emulate

        monkeypatch.setitem(_emulate._state, "order", request.param)
    return request.param


@pytest.fixture(scope="module", autouse=True)
def device():
    cuda.use(0)


def run(backend, name, arguments, outputs):
    """The call on copies of the arguments; the outputs."""
    there = [
        backend.to_device(np.array(a)) if isinstance(a, np.ndarray) else a for a in arguments
    ]
    getattr(backend, name)(*there)
    return [np.array(backend.to_host(there[i])) for i in outputs]


def close(what, got, want, dtype):
    """Equal up to rounding, in an order of its own, relative to the largest number."""
    assert got.shape == want.shape, what
    if got.dtype.kind != "f":
        np.testing.assert_array_equal(got, want, what)
        return
    np.testing.assert_array_equal(np.isfinite(got), np.isfinite(want), what)
    there = np.isfinite(want)
    scale = np.abs(want[there]).max(initial=1e-30)
    np.testing.assert_allclose(got[there], want[there], rtol=0, atol=100 * np.finfo(dtype).eps * scale, err_msg=what)


def compare(kernel, dtype, sizes):
    """Every call of `kernel` on both backends."""
    for name, about, arguments, outputs in cuda_calls.calls(dtype, sizes):
        if name == kernel:
            twins = run(cuda, name, arguments, outputs), run(kernels, name, arguments, outputs)
            for got, want in zip(*twins, strict=True):
                close(f"{name}: {about}", got, want, dtype)


KERNELS = sorted(set(kernels.__all__) - SERVICES)


def test_the_two_backends_have_the_same_names_and_arguments():
    assert sorted(kernels.__all__) == sorted(cuda.__all__)
    for name in kernels.__all__:
        twins = getattr(kernels, name), getattr(cuda, name)
        assert list(inspect.signature(twins[0]).parameters) == list(inspect.signature(twins[1]).parameters), name


def test_every_kernel_is_called():
    called = {name for name, *_ in cuda_calls.calls(np.float32, cuda_calls.SMALL)}
    assert called == set(KERNELS)


@pytest.mark.parametrize("name", KERNELS)
def test_small(name, order):
    compare(name, np.float32, cuda_calls.SMALL)


@pytest.mark.skipif(SIMULATOR, reason="too slow in the simulator")
@pytest.mark.parametrize("name", KERNELS)
def test_large(name, order):
    compare(name, np.float64, cuda_calls.LARGE)
