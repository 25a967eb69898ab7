"""The fused steps of the CUDA backend, on a GPU or as PTX on the CPU (see conftest.py)."""

import inspect

import cuda_on_cpu
import numpy as np
import pytest
from cuda_on_cpu import ON_GPU

from benchmarks import gpu
from tests.kernels import test_fused
from tinycnn import cuda, kernels, layers as nn
from tinycnn.cuda import _launch
from tinycnn.model import Sequential

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module", autouse=True)
def device():
    _launch.set_device(0)


def test_the_backends_have_the_same_fused_kernels():
    functions = [
        {name: list(inspect.signature(f).parameters) for name, f in vars(module).items() if name.endswith("ward")}
        for module in (kernels.fused, cuda.fused)
    ]
    for own, module in zip(functions, (kernels.fused, cuda.fused), strict=True):
        for name in [name for name in own if vars(module)[name].__module__ != module.__name__]:
            del own[name]  # imported
    assert functions[0] == functions[1]


def passes(model, x):
    """Output, input gradient and parameter gradient, as NumPy."""
    y = model.forward(x)
    dy = np.random.default_rng(2).standard_normal(y.shape).astype(model.dtype)
    return [np.array(a) for a in (y, model.backward(dy), model.ops.to_host(model.grad))]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("pool", range(len(test_fused.POOLS)))
@pytest.mark.parametrize("activation", range(len(test_fused.ACTIVATIONS)))
def test_same_as_unfused(activation, pool, dtype):
    chain = nn.Conv2d(2, 3, 3, padding=1), test_fused.ACTIVATIONS[activation](), test_fused.POOLS[pool](), nn.Flatten()
    model = Sequential(*chain, input_shape=(2, 7, 10), dtype=dtype, rng=0, device="cuda")
    x = np.random.default_rng(1).standard_normal((5, 2, 7, 10)).astype(dtype)
    may_decrease = activation in (3, 4) and pool >= 2
    assert model.plan(5).fused is not may_decrease
    fused = passes(model, x)
    with model.unfused():
        unfused = passes(model, x)
    for a, b in zip(fused, unfused, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=30 * np.finfo(dtype).eps * abs(b).max())


@pytest.mark.parametrize("pool", [0, 2])
def test_pixels_in_no_window_leave_nothing_behind(pool):
    """The maps have seven rows, of which the last is in no window."""
    chain = nn.Conv2d(2, 3, 3, padding=1), nn.Tanh(), test_fused.POOLS[pool](), nn.Flatten()
    model = Sequential(*chain, input_shape=(2, 7, 10), rng=0, device="cuda")
    x = np.random.default_rng(1).standard_normal((5, 2, 7, 10)).astype(np.float32)
    before, plan = passes(model, x), model.plan(5)
    maps = plan.steps[0].pooling.x
    model.ops.copy_to(maps, np.full(maps.shape, np.nan, np.float32))
    for a, b in zip(passes(model, x), before, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(("activation", "pool"), [("tanh", "avg"), ("relu", "max")])
def test_launches_of_a_training_step(activation, pool):
    """Gather; forward two convolutions with their pooling, three Linears, the loss; backward three Linears, and twice a
    pooling and a convolution; optimizer; metrics."""
    setup = gpu.Setup("cuda", 64, 192, activation, pool)
    setup.step()  # allocates
    _launch.synchronize()
    before = 0 if ON_GPU else cuda_on_cpu.kernels_run()
    with gpu.launched() as names:
        setup.step()
    _launch.synchronize()
    assert len(names) == 16, names
    assert ON_GPU or cuda_on_cpu.kernels_run() - before == 16
