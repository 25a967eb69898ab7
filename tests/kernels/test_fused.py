"""Fused activation and pooling: the same results as the two layers one after the other."""

import numpy as np
import pytest
import reference

import tinycnn
from tinycnn import layers as nn, scalars
from tinycnn.model import Sequential

ACTIVATIONS = [
    nn.Tanh, nn.Sigmoid, nn.ReLU, nn.ScaledTanh, lambda: nn.ScaledTanh(-0.7, 1.3),
    nn.ELU, lambda: nn.Hardtanh(-0.2, 0.3), nn.ReLU6,
]  # fmt: skip
POOLS = [
    lambda: nn.AvgPool2d(2),
    lambda: nn.AvgPool2d(2, divisor_override=3),
    lambda: nn.MaxPool2d(2),
    lambda: nn.MaxPool2d(3, ceil_mode=True),
]
BATCH = 19  # several blocks, the last one not full


def net(activation, pool, size=(7, 10), dtype=np.float64, after=()):
    return Sequential(
        nn.Conv2d(2, 3, 3, padding=1), activation(), pool(), *after, nn.Flatten(), input_shape=(2, *size), dtype=dtype,
        rng=0,
    )  # fmt: skip


def images(model, seed=1):
    return np.random.default_rng(seed).standard_normal((BATCH, *model.input_shape)).astype(model.dtype)


def check(model):
    """Gradient check with steps so small that hardly a maximum moves, and a tolerance for their rounding."""
    tinycnn.gradcheck_model(model, images(model), eps=1e-7, rtol=1e-5, rng=3)


def passes(model, x):
    """Output, input gradient and parameter gradient."""
    y = model.forward(x)
    dy = np.random.default_rng(2).standard_normal(y.shape).astype(model.dtype)
    return y, model.backward(dy), model.grad.copy()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("pool", range(len(POOLS)))
@pytest.mark.parametrize("activation", range(len(ACTIVATIONS)))
def test_same_as_unfused(activation, pool, dtype):
    model = net(ACTIVATIONS[activation], POOLS[pool], dtype=dtype)
    x = images(model)
    may_decrease = activation in (3, 4) and pool >= 2  # max pooling is fused with non-decreasing activations only
    assert model.plan(BATCH).fused is not may_decrease
    for _ in range(4):  # captured, then replayed
        fused = passes(model, x)
    with model.unfused():
        unfused = passes(model, x)
    for a, b in zip(fused, unfused, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=30 * np.finfo(dtype).eps * abs(b).max())
    np.testing.assert_array_equal(passes(model, x)[2], fused[2])  # and fused again


@pytest.mark.parametrize("pool", range(len(POOLS)))
@pytest.mark.parametrize("activation", [0, 1, 3])
def test_gradients(activation, pool):
    model = net(ACTIVATIONS[activation], POOLS[pool])
    check(model)


def test_activation_after_max_pooling_keeps_its_input():
    model = net(nn.ReLU, lambda: nn.MaxPool2d(2), after=[nn.Tanh()])
    check(model)
    assert [step.numbers for step in model.plan(BATCH).steps if step.fused] == [(0, 1, 2)]


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
def test_not_fused(pool):
    model = net(nn.Tanh, pool)
    assert not model.plan(BATCH).fused
    check(model)


SOFTER = scalars.activation(scalars.SCALED_TANH, 1.0, 0.5)


class Softer(nn.Tanh):
    """A user's layer."""

    def forward(self, y, x):
        self.ops.activation_forward(y, x, SOFTER)

    def backward(self, dx, dy, x, y):
        self.ops.activation_backward(dx, dy, y, SOFTER)


@pytest.mark.parametrize("pool", POOLS[::2])
def test_subclass_is_not_fused(pool):
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
    with pytest.raises(RuntimeError, match="backward needs its own forward"):
        model.backward(y)
    with model.unfused():
        with pytest.raises(RuntimeError, match="backward needs its own forward"):
            model.backward(y)
        model.forward(images(model))
        for _ in range(2):
            np.testing.assert_allclose(model.backward(y), first, rtol=1e-12, atol=1e-15)
    with pytest.raises(RuntimeError, match="backward needs its own forward"):
        model.backward(y)


def test_unfused_one_forward_serves_many_backwards():
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
    model.ops.copy_to(plan.x, x)  # bypasses the check of the input
    plan.forward()
    bad = np.isnan(plan.y).any(axis=1)
    assert bad.tolist() == [i == 3 for i in range(BATCH)]
