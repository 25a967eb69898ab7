"""Batch and group normalisation against NumPy, statistics of dropout masks, and the layers of both."""

import numpy as np
import pytest
import reference
from hypothesis import given, strategies as st
from reference import blank

from tinycnn import BatchNorm2d, Dropout, Dropout2d, Flatten, GroupNorm, Linear, Sequential, kernels

both_dtypes = pytest.mark.parametrize("dtype", [np.float32, np.float64])
devices = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
shapes = st.tuples(st.integers(1, 5), st.integers(1, 4), st.integers(1, 9), st.integers(2, 9))
seeds = st.integers(0, 2**32 - 1)
EPS = 1e-5


def assert_near(got, want, dtype):
    """Equal up to the rounding of sums over a few hundred numbers of magnitude 1."""
    np.testing.assert_allclose(
        got, want, rtol=0, atol=(2e-5 if dtype == np.float32 else 1e-12) * max(1, abs(want).max())
    )


# --- normalisation ----------------------------------------------------------------------------------------------------


@both_dtypes
@given(shape=shapes, seed=seeds, affine=st.booleans(), offset=st.sampled_from([0.0, 3.0]))
def test_batch_norm(shape, seed, affine, offset, dtype):
    C = shape[1]
    rng = np.random.default_rng(seed)
    x = (rng.standard_normal(shape) + offset).astype(dtype)
    weight, bias = rng.standard_normal((2, C)).astype(dtype)
    w, b = (weight, bias) if affine else (weight[:0], bias[:0])
    ones = (weight.astype(np.float64), bias.astype(np.float64)) if affine else (np.ones(C), np.zeros(C))
    running = rng.standard_normal(C).astype(dtype), rng.uniform(0.5, 2, C).astype(dtype)
    before, batches = [a.astype(np.float64) for a in running], np.array([0])
    y, mean, rstd = blank(shape, dtype), blank(C, dtype), blank(C, dtype)

    kernels.batch_norm_forward(y, x, w, b, mean, rstd, *running, batches, 0.1, EPS, False, len(x))
    statistics = before[0][:, None, None], before[1][:, None, None]
    assert_near(y, reference.normalize(x.astype(np.float64), None, *ones, EPS, statistics)[0], dtype)
    np.testing.assert_array_equal(running[0], before[0].astype(dtype))

    x64 = x.astype(np.float64)
    want, want_mean, want_rstd = reference.normalize(x64, (0, 2, 3), *ones, EPS)
    kernels.batch_norm_forward(y, x, w, b, mean, rstd, *running, batches, 0.1, EPS, True, len(x))
    assert_near(mean, want_mean.ravel(), dtype)
    spread = float(x64.std((0, 2, 3)).min())
    if spread > 0.1:  # else 1/std magnifies rounding errors
        assert_near(y, want, dtype)
        assert_near(rstd, want_rstd.ravel(), dtype)
    assert_near(running[0], 0.9 * before[0] + 0.1 * x64.mean((0, 2, 3)), dtype)
    assert_near(running[1], 0.9 * before[1] + 0.1 * x64.var((0, 2, 3), ddof=1), dtype)


@both_dtypes
@given(shape=shapes, groups=st.integers(1, 3), seed=seeds)
def test_group_norm(shape, groups, seed, dtype):
    N, per, H, W = shape
    C = groups * per
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((N, C, H, W)).astype(dtype)
    weight, bias = rng.standard_normal((2, C)).astype(dtype)
    y, mean, rstd = blank(x.shape, dtype), blank((N, groups), dtype), blank((N, groups), dtype)
    kernels.group_norm_forward(y, x, weight, bias, mean, rstd, groups, EPS)
    grouped = x.astype(np.float64).reshape(N, groups, per, H, W)
    want_mean, want_var = grouped.mean((2, 3, 4)), grouped.var((2, 3, 4))
    assert_near(mean, want_mean, dtype)
    if want_var.min() > 0.01:
        xhat = (grouped - want_mean[..., None, None, None]) / np.sqrt(want_var[..., None, None, None] + EPS)
        assert_near(y, xhat.reshape(x.shape) * weight[:, None, None].astype(np.float64) + bias[:, None, None], dtype)


norms = pytest.mark.parametrize("layer", [lambda: BatchNorm2d(1, momentum=1.0), lambda: GroupNorm(1, 1)])


@devices
@norms
@pytest.mark.parametrize("shape", [(1, 1, 1500, 1500), (20, 1, 300, 100), (30_000, 1, 2, 2)])
def test_statistics_of_many_numbers_in_float32(shape, layer, device):
    """Added one after the other, the squares of the first shape are off by 1.6e-3."""
    x = np.random.default_rng(0).standard_normal(shape, np.float32) + 2
    model = Sequential(layer(), input_shape=shape[1:], device=device)
    y, axes = model.forward(x).astype(np.float64), (2, 3) if isinstance(model.layers[0], GroupNorm) else (0, 2, 3)
    x64 = x.astype(np.float64)
    want = (x64 - x64.mean(axes, keepdims=True)) / np.sqrt(x64.var(axes, keepdims=True) + 1e-5)
    wide = x64.var(axes).min() > 0.1 and not (shape[2] == 2 and axes == (2, 3))  # else 1/std magnifies rounding errors
    np.testing.assert_allclose(y, want, rtol=0, atol=2e-6 if wide else 1e-3)
    if "0.running_var" in (state := model.state_dict()):
        np.testing.assert_allclose(state["0.running_mean"], x64.mean(axes), rtol=2e-7)
        np.testing.assert_allclose(state["0.running_var"], x64.var(axes, ddof=1), rtol=2e-7)


@devices
def test_gradients_of_many_numbers_in_float32(device):
    rng = np.random.default_rng(1)
    x, dy = rng.standard_normal((2, 1, 1, 700, 700), np.float32)
    for layer in (BatchNorm2d(1), GroupNorm(1, 1)):
        model = Sequential(layer, input_shape=x.shape[1:], device=device)
        model.forward(x)
        model.backward(dy + 1)
        x64, dy64 = x.astype(np.float64), dy.astype(np.float64) + 1
        xhat = (x64 - x64.mean()) / np.sqrt(x64.var() + 1e-5)
        want = [(dy64 * xhat).sum(), dy64.sum()]
        np.testing.assert_allclose(model.ops.to_host(model.grad), want, rtol=0, atol=0.1)


@devices
@norms
@pytest.mark.parametrize("size", [1e19, 1e20, 1e30])
def test_squares_that_overflow_float32(size, layer, device):
    x = np.random.default_rng(2).standard_normal((20, 1, 6, 5))
    model = Sequential(layer(), input_shape=x.shape[1:], device=device)
    want = Sequential(layer(), input_shape=x.shape[1:], device=device, dtype=np.float64)
    large = (size * x).astype(np.float32)
    np.testing.assert_allclose(model.forward(large), want.forward(large), rtol=0, atol=2e-6)
    if "0.running_var" in (state := model.state_dict()):
        other = want.state_dict()
        np.testing.assert_allclose(state["0.running_mean"], other["0.running_mean"], rtol=1e-6)
        with np.errstate(over="ignore"):  # beyond float32 the variance is infinite, as in torch
            np.testing.assert_allclose(state["0.running_var"], other["0.running_var"].astype(np.float32), rtol=1e-6)


@devices
def test_batch_norm_layer_in_both_modes(device):
    rng = np.random.default_rng(0)
    model = Sequential(BatchNorm2d(3), rng=0, device=device, input_shape=(3, 4, 5))
    assert list(model.state_dict()) == [
        "0.weight", "0.bias", "0.running_mean", "0.running_var", "0.num_batches_tracked"
    ]  # fmt: skip
    assert model.state_dict()["0.num_batches_tracked"].shape == ()
    x = 2 * rng.standard_normal((6, 3, 4, 5)) + 1
    y = model.forward(x)
    np.testing.assert_allclose(y.mean((0, 2, 3)), 0, atol=1e-6)
    np.testing.assert_allclose(y.std((0, 2, 3)), 1, atol=1e-4)
    state = model.state_dict()
    assert state["0.num_batches_tracked"] == 1
    np.testing.assert_allclose(state["0.running_mean"], 0.1 * x.mean((0, 2, 3)), rtol=1e-5)
    model.eval()
    want = (x - state["0.running_mean"][:, None, None]) / np.sqrt(state["0.running_var"][:, None, None] + 1e-5)
    np.testing.assert_allclose(model.forward(x), want, rtol=1e-4, atol=1e-5)
    assert model.state_dict()["0.num_batches_tracked"] == 1  # unchanged in eval mode
    other = Sequential(BatchNorm2d(3), rng=1, device=device, input_shape=(3, 4, 5))
    other.load_state_dict(state)
    for name, value in other.state_dict().items():
        np.testing.assert_array_equal(value, state[name])


@devices
def test_running_statistics_that_are_the_mean_of_all_batches(device):
    """torch's momentum=None; also where the steps are replayed."""
    x = np.random.default_rng(3).standard_normal((6, 5, 2, 4, 3)).astype(np.float32)
    model = Sequential(BatchNorm2d(2, momentum=None), input_shape=(2, 4, 3), device=device)
    for batch in x:
        model.forward(batch)
    state = model.state_dict()
    np.testing.assert_allclose(state["0.running_mean"], x.mean((1, 3, 4)).mean(0), rtol=0, atol=1e-6)
    np.testing.assert_allclose(state["0.running_var"], x.var((1, 3, 4), ddof=1).mean(0), rtol=1e-6)
    assert state["0.num_batches_tracked"] == 6
    assert repr(model.layers[0]) == "BatchNorm2d(2, momentum=None)"


@devices
@pytest.mark.parametrize("affine", [True, False])
def test_gradient_of_batch_norm_in_eval_mode(affine, device):
    """There mean and variance are constants."""
    from tinycnn import gradcheck_model

    model = Sequential(BatchNorm2d(2, affine=affine), rng=0, dtype=np.float64, device=device, input_shape=(2, 3, 3))
    x = np.random.default_rng(1).standard_normal((3, 2, 3, 3))
    model.forward(3 * x + 1)
    model.eval()
    gradcheck_model(model, x, rtol=1e-7, rng=2)


def test_invalid_norms():
    with pytest.raises(ValueError, match="num_channels must be divisible by num_groups, got 6 and 4"):
        GroupNorm(4, 6)
    with pytest.raises(ValueError, match=r"BatchNorm2d\(3\) takes \(3, height, width\), got \(2, 4, 4\)"):
        Sequential(BatchNorm2d(3), input_shape=(2, 4, 4))
    model = Sequential(BatchNorm2d(2), input_shape=(2, 1, 1))
    with pytest.raises(ValueError, match="more than one value a channel"):
        model.forward(np.ones((1, 2, 1, 1)))


# --- dropout ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("p", [0.1, 0.5, 0.75])
def test_dropout_keeps_the_right_share_and_the_mean(p):
    x = np.ones(200_000, np.float32)
    y, masks = blank(x.shape, np.float32), []
    for step in (0, 1):
        for seed in (0, 1, 2**63 - 1):
            kernels.dropout(y, x, np.array([step]), np.zeros(1, np.int64), seed, p, 1)
            kept = y != 0
            np.testing.assert_allclose(y[kept], 1 / (1 - p), rtol=1e-6)
            assert abs(kept.mean() - (1 - p)) < 5 * np.sqrt(p * (1 - p) / x.size)
            masks.append(kept)
    for i in range(len(masks)):  # another step, another seed, the next number: all independent
        neighbours = (masks[i][1:] & masks[i][:-1]).mean()
        assert abs(neighbours - (1 - p) ** 2) < 0.006
        for j in range(i):
            assert abs((masks[i] & masks[j]).mean() - (1 - p) ** 2) < 0.006


@pytest.mark.parametrize("span", [1, 12])
def test_part_of_a_batch_has_the_masks_of_the_batch(span):
    x = np.ones((40, 5, 12), np.float32)
    whole, part, step = blank(x.shape, np.float32), blank((24, 5, 12), np.float32), np.array([3])
    kernels.dropout(whole, x, step, np.array([0]), 7, 0.5, span)
    kernels.dropout(part, x[:24], step, np.array([16]), 7, 0.5, span)
    np.testing.assert_array_equal(part, whole[16:])
    blocked = blank((2, 5, 1, 12, 8), np.float32)
    kernels.dropout(blocked, np.ones(blocked.shape, np.float32), step, np.array([16]), 7, 0.5, span)
    np.testing.assert_array_equal(np.moveaxis(blocked, 4, 1).reshape(16, 5, 12), whole[16:32])


def test_dropout_of_whole_maps():
    x = np.ones((40, 5, 3, 4), np.float32)
    model = Sequential(Dropout2d(0.5), rng=0, input_shape=x.shape[1:])
    y = model.forward(x).reshape(200, 12)
    assert ((y == 0).all(1) | (y == 2).all(1)).all()
    assert 60 < (y[:, 0] == 0).sum() < 140


@devices
def test_dropout_layer(device):
    x = np.random.default_rng(0).standard_normal((50, 40)).astype(np.float32)
    model = Sequential(Linear(40, 40), Dropout(0.3), rng=3, device=device, input_shape=(40,))
    first, dx = model.forward(x), model.backward(np.ones((50, 40)))
    again = model.forward(x)
    assert (first != again).any()  # a new mask in every step
    assert dx.shape == x.shape
    model.eval()
    plain = model.forward(x)
    np.testing.assert_array_equal(plain, model.forward(x))
    kept = first != 0
    np.testing.assert_allclose(first[kept], plain[kept] / 0.7, rtol=1e-5)
    assert abs(kept.mean() - 0.7) < 0.05
    assert list(model.state_dict()) == ["0.weight", "0.bias"]
    twin = Sequential(Linear(40, 40), Dropout(0.3), rng=3, device="cpu", input_shape=(40,))
    np.testing.assert_array_equal(twin.forward(x) != 0, kept)  # the same mask on every device


def test_a_mask_stays_for_the_backward_pass():
    model = Sequential(Flatten(), Dropout(0.5), rng=0, input_shape=(1, 5, 5))
    x = np.ones((4, 1, 5, 5))
    y = model.forward(x)
    np.testing.assert_array_equal(model.backward(np.ones_like(y)).reshape(y.shape), y)


# --- the same bits on any number of threads; a row for every kernel of this file --------------------------------------


def _case(name, dtype):
    rng = np.random.default_rng(5)
    x, dy = rng.standard_normal((2, 9, 6, 12, 11)).astype(dtype)
    w, b, m, r = abs(rng.standard_normal((4, 6))).astype(dtype)
    sets, groups = rng.uniform(1, 2, (2, 9, 3)).astype(dtype)
    out, parts = blank(x.shape, dtype), [blank(6, dtype) for _ in range(2)]
    if name == "batch_norm_forward":
        arguments = (out, x, w, b, *parts, m, r, np.array([0]), 0.1, EPS, True, len(x))
        return kernels.batch_norm_forward, arguments, (0, 4, 5, 6, 7)
    if name == "batch_norm_backward":
        return kernels.batch_norm_backward, (out, *parts, dy, x, w, m, r, True, len(x)), (0, 1, 2)
    if name == "group_norm_forward":
        return kernels.group_norm_forward, (out, x, w, b, sets, groups, 3, EPS), (0, 4, 5)
    if name == "group_norm_backward":
        return kernels.group_norm_backward, (out, *parts, dy, x, w, sets, groups, 3), (0, 1, 2)
    if name.startswith(("layer_norm", "rows")):
        x, dy = rng.standard_normal((2, 301, 97)).astype(dtype)
        (w, b), out = rng.standard_normal((2, 97)).astype(dtype), blank(x.shape, dtype)
        parts, rows = [blank(97, dtype) for _ in range(4)], [blank(301, dtype) for _ in range(2)]
        return {
            "rows_forward": (
                kernels.batch_norm_forward,
                (out, x, w, b, *parts[:2], w * 0, w * 0 + 1, np.array([0]), 0.1, EPS, True, len(x)),
                (0, 4, 5, 6, 7),
            ),
            "rows_backward": (
                kernels.batch_norm_backward, (out, *parts[:2], dy, x, w, b, b * b + 1, True, len(x)), (0, 1, 2)
            ),
            "layer_norm_forward": (kernels.layer_norm_forward, (out, x, w, b, *rows, EPS), (0, 4, 5)),
            "layer_norm_backward": (
                kernels.layer_norm_backward, (out, *parts[:2], dy, x, w, x[:, 0].copy(), x[:, 1] ** 2 + 1), (0, 1, 2)
            ),
        }[name]  # fmt: skip
    return kernels.dropout, (out, x, np.array([3]), np.array([2]), 77, 0.4, 1), (0,)


CASES = [
    "batch_norm_forward",
    "batch_norm_backward",
    "group_norm_forward",
    "group_norm_backward",
    "layer_norm_forward",
    "layer_norm_backward",
    "dropout",
]


@both_dtypes
@pytest.mark.parametrize(("mean", "std"), [(0, 1), (1e4, 1), (0, 1e25), (-3, 1e-3)])
@pytest.mark.parametrize("training", [True, False])
def test_batch_norm_of_rows(mean, std, training, dtype):
    """Against float64; in float32 a mean of 10,000 leaves three digits of x - mean."""
    rng = np.random.default_rng(0)
    x = (mean + std * rng.standard_normal((50, 130))).astype(dtype)
    dy, (w, b) = rng.standard_normal(x.shape).astype(dtype), rng.standard_normal((2, 130)).astype(dtype)
    running = np.full(130, mean, dtype), np.full(130, 2 * std**2 if std < 1e10 else 1, dtype)
    before, (m, r), y = [a.copy() for a in running], blank((2, 130), dtype), blank(x.shape, dtype)
    kernels.batch_norm_forward(y, x, w, b, m, r, *running, np.zeros(1, np.int64), 0.25, EPS, training, 50)
    wide = x.astype(np.float64)
    center, var = (wide.mean(0), wide.var(0)) if training else (before[0], before[1].astype(np.float64))
    xhat = (wide - center) / np.sqrt(var + EPS)
    tolerance = {"rtol": 1e-5, "atol": 1e-5 * (1 + abs(mean) / std) * max(1, abs(xhat).max())}
    np.testing.assert_allclose(y, xhat * w + b, **tolerance)
    if training and std < 1e10:
        np.testing.assert_allclose(running[0], 0.75 * before[0] + 0.25 * center, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(running[1], 0.75 * before[1] + 0.25 * wide.var(0, ddof=1), rtol=1e-4)
    elif not training:
        np.testing.assert_array_equal(running, before)
    dx, dw, db = blank(x.shape, dtype), blank(130, dtype), blank(130, dtype)
    kernels.batch_norm_backward(dx, dw, db, dy, x, w, m, r, training, 50)
    g = dy.astype(np.float64) * w
    want = g - g.mean(0) - xhat * (g * xhat).mean(0) if training else g
    scale = {"rtol": 1e-4, "atol": tolerance["atol"] * 10}
    np.testing.assert_allclose(dx / r, want, **scale)
    np.testing.assert_allclose(db, dy.sum(0), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(dw, (dy * xhat).sum(0), rtol=1e-4, atol=50 * tolerance["atol"])


@both_dtypes
@pytest.mark.parametrize("features", [1, 7, 33, 64, 97])
def test_bits_of_a_feature_do_not_depend_on_its_position(features, dtype):
    """LLVM makes a vectorised and a scalar loop of each: both must round alike."""
    rng = np.random.default_rng(0)
    column, found = rng.standard_normal((2, 301)).astype(dtype), []
    for width, position in ((64, 0), (features, 0), (features, features // 2), (features, features - 1)):
        x, dy = rng.standard_normal((2, 301, width)).astype(dtype)
        w, b, dx, dw, db, m, r, y = (np.zeros(shape, dtype) for shape in [width, width, x.shape, *[width] * 4, x.shape])
        x[:, position], dy[:, position] = column
        w[position], b[position] = 0.7, 0.3
        running = np.zeros(width, dtype), np.ones(width, dtype)
        kernels.batch_norm_forward(y, x, w, b, m, r, *running, np.zeros(1, np.int64), 0.1, EPS, True, 301)
        kernels.batch_norm_backward(dx, dw, db, dy, x, w, m, r, True, 301)
        outputs = y[:, position], dx[:, position], dw[position], db[position], running[1][position]
        found.append([np.array(a).tobytes() for a in outputs])
    assert all(outputs == found[0] for outputs in found)


@both_dtypes
@pytest.mark.parametrize(("rows", "size"), [(1, 1), (3, 7), (50, 130), (2, 5000)])
@pytest.mark.parametrize(("mean", "std"), [(0, 1), (1e4, 1), (0, 1e25)])
def test_layer_norm(rows, size, mean, std, dtype):
    rng = np.random.default_rng(0)
    x = (mean + std * rng.standard_normal((rows, size))).astype(dtype)
    dy, (w, b) = rng.standard_normal(x.shape).astype(dtype), rng.standard_normal((2, size)).astype(dtype)
    y, (m, r) = blank(x.shape, dtype), blank((2, rows), dtype)
    kernels.layer_norm_forward(y, x, w, b, m, r, EPS)
    wide = x.astype(np.float64)
    xhat = (wide - wide.mean(1, keepdims=True)) / np.sqrt(wide.var(1, keepdims=True) + EPS)
    atol = 2e-5 * (1 + abs(mean) / std) if size > 1 else 1e-3
    np.testing.assert_allclose(y, xhat * w + b, rtol=1e-5, atol=atol)
    if size == 1:
        return
    dx, dw, db = blank(x.shape, dtype), blank(size, dtype), blank(size, dtype)
    kernels.layer_norm_backward(dx, dw, db, dy, x, w, m, r)
    g = dy.astype(np.float64) * w
    want = g - g.mean(1, keepdims=True) - xhat * (g * xhat).mean(1, keepdims=True)
    np.testing.assert_allclose(dx / r[:, None], want, rtol=1e-4, atol=20 * atol)
    np.testing.assert_allclose(db, dy.sum(0), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(dw, (dy * xhat).sum(0), rtol=1e-4, atol=50 * atol)
    again, no_dx = dw.copy(), np.empty((0, size), dtype)
    kernels.layer_norm_backward(no_dx, again, db, dy, x, w, m, r)
    np.testing.assert_array_equal(again, dw)


@both_dtypes
@pytest.mark.parametrize("name", [*CASES, "rows_forward", "rows_backward"])  # rows: batch_norm of (N, C)
def test_same_bits(name, dtype, same_bits):
    same_bits(lambda: _case(name, dtype))
