"""An activation and the pooling after it in one go: what comes out is what the two layers give one after the other."""

import numpy as np
import pytest
import reference

import tinycnn
from tinycnn import layers as nn
from tinycnn import scalars
from tinycnn.model import Sequential

ACTIVATIONS = [nn.Tanh, nn.Sigmoid, nn.ReLU, nn.ScaledTanh, lambda: nn.ScaledTanh(-0.7, 1.3)]
POOLS = [
    lambda: nn.AvgPool2d(2),
    lambda: nn.AvgPool2d(2, divisor_override=3),
    lambda: nn.MaxPool2d(2),
    lambda: nn.MaxPool2d(3, ceil_mode=True),
]
BATCH = 19  # two tiles of float32, three of float64, the last one not full


def net(activation, pool, size=(7, 10), dtype=np.float64, after=()):
    return Sequential(
        nn.Conv2d(2, 3, 3, padding=1), activation(), pool(), *after, nn.Flatten(), input_shape=(2, *size), dtype=dtype,
        rng=0,
    )  # fmt: skip


def images(model, seed=1):
    return np.random.default_rng(seed).standard_normal((BATCH, *model.input_shape)).astype(model.dtype)


def check(model):
    """The gradients: with steps so small that hardly a maximum changes its place, and rounding that goes with them."""
    tinycnn.gradcheck_model(model, images(model), eps=1e-7, rtol=1e-5, rng=3)


def passes(model, x):
    """Output, gradient of the input, and that of the parameters."""
    y = model.forward(x)
    dy = np.random.default_rng(2).standard_normal(y.shape).astype(model.dtype)
    return y, model.backward(dy), model.grad.copy()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("pool", range(len(POOLS)))
@pytest.mark.parametrize("activation", range(len(ACTIVATIONS)))
def test_the_same_as_layer_by_layer(activation, pool, dtype):
    model = net(ACTIVATIONS[activation], POOLS[pool], dtype=dtype)
    x = images(model)
    may_fall = activation >= 3 and pool >= 2  # the maximum may change places with what never falls only
    assert model.plan(BATCH).fused is not may_fall
    for _ in range(4):  # recorded, and replayed
        together = passes(model, x)
    with model.unfused():
        apart = passes(model, x)
    for a, b in zip(together, apart, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=30 * np.finfo(dtype).eps * abs(b).max())
    np.testing.assert_array_equal(passes(model, x)[2], together[2])  # and joined again


@pytest.mark.parametrize("pool", range(len(POOLS)))
@pytest.mark.parametrize("activation", [0, 1, 3])
def test_gradients(activation, pool):
    model = net(ACTIVATIONS[activation], POOLS[pool])
    check(model)


def test_an_activation_behind_does_not_spoil_what_the_maximum_needs():
    model = net(nn.ReLU, lambda: nn.MaxPool2d(2), after=[nn.Tanh()])
    check(model)
    assert [step.numbers for step in model.plan(BATCH).steps if step.fused] == [(1, 2)]


@pytest.mark.parametrize(
    "pool",
    [
        lambda: nn.AvgPool2d(3),
        lambda: nn.AvgPool2d(2, 1),
        lambda: nn.AvgPool2d(2, padding=1),
        lambda: nn.AvgPool2d(2, ceil_mode=True),
        lambda: nn.MaxPool2d(2, 1),
        lambda: nn.MaxPool2d(2, padding=1),
        lambda: nn.MaxPool2d(3, 1, padding="same"),
    ],
)
def test_what_is_left_apart(pool):
    model = net(nn.Tanh, pool)
    assert not model.plan(BATCH).fused
    check(model)


SOFTER = scalars.activation(scalars.SCALED_TANH, 1.0, 0.5)


class Softer(nn.Tanh):
    """Somebody's own."""

    def forward(self, y, x):
        self.ops.activation_forward(y, x, SOFTER)

    def backward(self, dx, dy, x, y):
        self.ops.activation_backward(dx, dy, y, SOFTER)


@pytest.mark.parametrize("pool", POOLS[::2])
def test_a_subclass_does_its_own_work(pool):
    model = net(Softer, pool)
    assert not model.plan(BATCH).fused
    check(model)


def test_constants_may_change():
    model = net(nn.ScaledTanh, lambda: nn.AvgPool2d(2))
    x = images(model)
    for A in (1.0, 1.0, 1.0, 1.0, 2.5):
        model[1].A = A
        got = model.forward(x)
    with model.unfused():
        np.testing.assert_allclose(got, model.forward(x), rtol=1e-12)


@pytest.mark.parametrize("pool", POOLS[::2])
def test_one_forward_serves_one_backward(pool):
    model = net(nn.Tanh, pool)
    y = model.forward(images(model))
    first = model.backward(y)
    with pytest.raises(RuntimeError, match="backward needs a forward of its own"):
        model.backward(y)
    with model.unfused():
        with pytest.raises(RuntimeError, match="backward needs a forward"):
            model.backward(y)
        model.forward(images(model))
        for _ in range(2):
            np.testing.assert_allclose(model.backward(y), first, rtol=1e-12, atol=1e-15)
    with pytest.raises(RuntimeError, match="backward needs a forward"):
        model.backward(y)


def test_without_joined_layers_one_forward_serves_many():
    model = Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(), nn.Flatten(), input_shape=(2, 5, 5), rng=0, dtype=np.float64)
    y = model.forward(images(model))
    first = model.backward(y)
    np.testing.assert_array_equal(model.backward(y), first)
    model.activations(images(model, 5))
    np.testing.assert_array_equal(model.backward(y), first)


@pytest.mark.parametrize("pool", POOLS[::2])
def test_trace_shows_every_layer(pool):
    model = net(nn.Tanh, pool)
    x = images(model)
    before, after, pooled, _ = (layer.output for layer in model.activations(x))
    np.testing.assert_allclose(after, reference.tanh(before), rtol=1e-12)
    assert pooled.shape[2:] == (3, 5)
    assert before.min() < -1


@pytest.mark.parametrize("activation", range(3))
@pytest.mark.parametrize("pool", POOLS[::2])
def test_nan_is_seen(activation, pool):
    model = net(ACTIVATIONS[activation], pool, dtype=np.float32)
    x = images(model)
    x[3, 0, 2, 2] = np.nan
    plan = model.plan(BATCH)
    model.ops.copy_to(plan.x, x)  # past the check of what comes in
    plan.forward()
    bad = np.isnan(plan.y).any(axis=1)
    assert bad.tolist() == [i == 3 for i in range(BATCH)]
