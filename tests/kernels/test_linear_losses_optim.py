"""Linear, losses, optimizers, batches, the array services."""

import numpy as np
import pytest
import reference
from hypothesis import example, given, strategies as st
from reference import assert_close, blank

from tinycnn import kernels

both_dtypes = pytest.mark.parametrize("dtype", [np.float32, np.float64])
seeds = st.integers(0, 2**32 - 1)

# --- linear -----------------------------------------------------------------------------------------------------------


def linear_arrays(N, F, O, bias, seed, dtype):
    """x, w, b, dy"""
    rng = np.random.default_rng(seed)
    shapes = (N, F), (O, F), (O if bias else 0,), (N, O)
    return tuple(rng.standard_normal(shape).astype(dtype) for shape in shapes)


def check_linear(x, w, b, dy):
    y = blank(dy.shape, x.dtype)
    kernels.linear_forward(y, x, w, b)
    assert_close(y, reference.linear(x, w, b), reference.linear(abs(x), abs(w), abs(b)), x.shape[1] + 1)
    dx, dw, db = (blank(a.shape, x.dtype) for a in (x, w, b))
    kernels.linear_backward(dx, dw, db, dy, x, w)
    want, size = reference.linear_backward(dy, x, w), reference.linear_backward(abs(dy), abs(x), abs(w))
    assert_close(dx, want[0], size[0], len(w))
    assert_close(dw, want[1], size[1], len(x))
    if b.size:
        assert_close(db, want[2], size[2], len(x))
    return dx, dw, db


@both_dtypes
@given(N=st.integers(1, 60), F=st.integers(1, 70), O=st.integers(1, 20), bias=st.booleans(), seed=seeds)
def test_linear(N, F, O, bias, seed, dtype):
    check_linear(*linear_arrays(N, F, O, bias, seed, dtype))


@both_dtypes
@pytest.mark.parametrize(
    ("N", "F", "O"), [(1, 1, 1), (1, 400, 120), (24, 856, 6), (25, 857, 7), (49, 1713, 5), (48, 84, 10), (3, 2, 1000)]
)
def test_linear_around_the_sizes_of_blocks(N, F, O, dtype):
    check_linear(*linear_arrays(N, F, O, True, 6, dtype))


@both_dtypes
def test_linear_without_input_gradient(dtype):
    x, w, b, dy = linear_arrays(31, 17, 7, True, 1, dtype)
    _, dw, db = check_linear(x, w, b, dy)
    dw2, db2 = blank(w.shape, dtype), blank(b.shape, dtype)
    kernels.linear_backward(blank(x.shape, dtype)[:0], dw2, db2, dy, x, w)
    np.testing.assert_array_equal(dw2, dw)
    np.testing.assert_array_equal(db2, db)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", ["x", "w", "b", "dy"])
def test_linear_shows_what_is_not_finite(name, value):
    case = dict(zip(("x", "w", "b", "dy"), linear_arrays(29, 13, 8, True, 2, np.float32), strict=True))
    case[name].reshape(-1)[case[name].size // 2] = value
    x, w, b, dy = case.values()
    want = [reference.linear(x, w, b), *reference.linear_backward(dy, x, w)]
    got = [blank(a.shape, np.float32) for a in want]
    kernels.linear_forward(got[0], x, w, b)
    kernels.linear_backward(*got[1:], dy, x, w)
    for a, b in zip(got, want, strict=True):
        np.testing.assert_array_equal(np.isfinite(a), np.isfinite(b))


# --- losses -----------------------------------------------------------------------------------------------------------


def cross_entropy(x, target, weight=None, ignore_index=-100, label_smoothing=0.0, reduction="mean"):
    loss, predicted, dx = blank(len(x), x.dtype), blank(len(x), np.int64), blank(x.shape, x.dtype)
    weight = np.ones(x.shape[1], x.dtype) if weight is None else weight
    target = np.asarray(target, np.int64)
    kernels.cross_entropy(
        loss, predicted, dx, x, target, weight, ignore_index, float(label_smoothing), reduction == "mean"
    )
    return loss, predicted, dx


@both_dtypes
@given(
    N=st.integers(1, 12),
    K=st.integers(1, 30),
    seed=seeds,
    weighted=st.booleans(),
    ignored=st.floats(0, 0.7),
    label_smoothing=st.sampled_from([0.0, 0.1, 0.5, 1.0]),
    reduction=st.sampled_from(["mean", "sum"]),
    offset=st.sampled_from([0.0, 1e4, -1e4]),
)
def test_cross_entropy(N, K, seed, weighted, ignored, label_smoothing, reduction, offset, dtype):
    rng = np.random.default_rng(seed)
    x = (3 * rng.standard_normal((N, K)) + offset).astype(dtype)
    target = rng.integers(0, K, N)
    ignore_index = int(rng.integers(-1, K))  # also one of the classes
    target[rng.random(N) < ignored] = ignore_index
    if (target == ignore_index).all():
        target[0] = (ignore_index + 1) % K
    weight = rng.uniform(0.1, 2, K).astype(dtype) if weighted else None
    options = ignore_index, label_smoothing, reduction
    if K == 1 and ignore_index == 0:
        return  # nothing is left
    loss, predicted, dx = cross_entropy(x, target, weight, *options)
    want, want_dx = reference.cross_entropy(x, target, weight, *options)
    logs = np.abs(reference.log_softmax(x.astype(np.float64))).sum(1)
    total = 1.0
    if reduction == "mean":
        total = (np.ones(K) if weight is None else weight)[target[target != ignore_index]].sum()
    assert_close(loss, want, (logs * 2 + 1) / total, K + 8)
    assert_close(dx, want_dx, 2 / total * (1 + label_smoothing * K), K + 8)
    np.testing.assert_array_equal(predicted, x.argmax(1))


@both_dtypes
def test_cross_entropy_of_huge_and_mixed_logits(dtype):
    x = np.array([[1e4, -1e4, 0, 9999], [1e4, 9999, 9998, 1e4], [-1e4, -1e4, -1e4, -9999], [1e30, 0, -1e30, 0]], dtype)
    target = [1, 1, 0, 0]
    for label_smoothing in (0.0, 0.1):
        loss, predicted, dx = cross_entropy(x, target, label_smoothing=label_smoothing, reduction="sum")
        with np.errstate(under="ignore"):
            want, want_dx = reference.cross_entropy(x, target, None, -100, label_smoothing, "sum")
        np.testing.assert_allclose(loss, want, rtol=2e-6 if dtype == np.float32 else 1e-12)
        np.testing.assert_allclose(dx, want_dx, rtol=2e-6, atol=1e-7)
        np.testing.assert_array_equal(predicted, [0, 0, 3, 0])


@both_dtypes
def test_cross_entropy_with_nan_and_infinity(dtype):
    x = np.array([[0, np.nan, 1], [np.inf, 0, 1], [-np.inf, 0, 1], [-np.inf, 0, 1], [0, 0, 1]], dtype)
    loss, predicted, dx = cross_entropy(x, [0, 1, 1, 0, 2], reduction="sum")
    assert np.isnan(loss[0])
    assert np.isnan(dx[0]).all()
    assert not np.isfinite(loss[1])
    assert np.isfinite(loss[2])  # the class at -inf is not the target
    assert loss[3] == np.inf  # here it is
    assert np.isfinite(dx[2:]).all()
    assert np.isfinite(loss[4])
    assert predicted[4] == 2


@both_dtypes
@given(N=st.integers(1, 12), F=st.integers(1, 40), seed=seeds, reduction=st.sampled_from(["mean", "sum"]))
def test_mse_loss(N, F, seed, reduction, dtype):
    x, target = np.random.default_rng(seed).standard_normal((2, N, F)).astype(dtype)
    loss, dx = blank(N, dtype), blank((N, F), dtype)
    kernels.mse_loss(loss, dx, x, target, reduction == "mean")
    want, want_dx = reference.mse_loss(x, target, reduction)
    divisor = N * F if reduction == "mean" else 1
    assert_close(loss, want, want, F + 8)
    assert_close(dx, want_dx, 2 * (abs(x) + abs(target)) / divisor, 8)
    x[-1, -1] = np.nan
    kernels.mse_loss(loss, dx, x, target, reduction == "mean")
    assert np.isnan(loss[-1])
    assert np.isnan(dx[-1, -1])
    assert np.isnan(loss).sum() == np.isnan(dx).sum() == 1


@both_dtypes
@given(N=st.integers(1, 12), K=st.integers(1, 40), seed=seeds)
def test_one_hot(N, K, seed, dtype):
    rng = np.random.default_rng(seed)
    x, labels = rng.integers(-2, 3, (N, K)).astype(dtype), rng.integers(0, K, N)  # with ties: the first counts
    rows, predicted = blank((N, K), dtype), blank(N, np.int64)
    kernels.one_hot(rows, predicted, x, labels)
    want, want_predicted = reference.one_hot(x, labels)
    np.testing.assert_array_equal(rows, want)
    np.testing.assert_array_equal(predicted, want_predicted)


def test_one_hot_propagates_nan():
    x, predicted = np.array([[0, np.nan, 5], [7, 2, 1]]), blank(2, np.int64)
    kernels.one_hot(blank(x.shape, x.dtype), predicted, x, np.array([2, 0]))
    assert list(predicted) == [1, 0]  # as NumPy's argmax


# --- optimizers -------------------------------------------------------------------------------------------------------

RATES = np.array([0.1, 0.05, 0.2, 0.025])  # the last one is kept


def path(kernel, theta, grads, states, options, weight_decay=0.0):
    """theta after each step; the optimizer's state starts at zero, as in the classes"""
    theta = theta.copy()
    table = kernels.parameter_blocks([(0, theta.size, 1.0, weight_decay)], theta.dtype)
    state = [np.zeros_like(theta) for _ in range(states)]
    step, steps = np.zeros(1, np.int64), []
    for t, grad in enumerate(grads):
        kernel(theta, grad, *state, RATES, step, *table, *options)
        assert step[0] == t + 1
        steps.append(theta.copy())
    return np.array(steps)


def vectors(size, seed, dtype):
    rng = np.random.default_rng(seed)
    return rng.standard_normal(size).astype(dtype), rng.standard_normal((8, size)).astype(dtype)


sizes = st.integers(1, 700)


@both_dtypes
@given(
    size=sizes,
    seed=seeds,
    momentum=st.sampled_from([0.0, 0.5, 0.9]),
    dampening=st.sampled_from([0.0, 0.3]),
    weight_decay=st.sampled_from([0.0, 0.1]),
    nesterov=st.booleans(),
)
def test_sgd(size, seed, momentum, dampening, weight_decay, nesterov, dtype):
    theta, grads = vectors(size, seed, dtype)
    nesterov = nesterov and momentum > 0 and dampening == 0
    got = path(kernels.sgd, theta, grads, 1, (momentum, dampening, nesterov), weight_decay)
    assert_close(got, reference.sgd(theta, grads, RATES, momentum, dampening, weight_decay, nesterov), 10, 60)


@both_dtypes
@given(
    size=sizes,
    seed=seeds,
    betas=st.sampled_from([(0.9, 0.999), (0.0, 0.5), (0.5, 0.1)]),
    eps=st.sampled_from([1e-8, 1e-2]),
    weight_decay=st.sampled_from([0.0, 0.1]),
    decoupled=st.booleans(),
)
# Without memory of earlier squares an update is m/|g|, which only eps keeps from blowing up rounding.
@example(size=300, seed=1, betas=(0.5, 0.0), eps=1e-2, weight_decay=0.1, decoupled=False)
def test_adam(size, seed, betas, eps, weight_decay, decoupled, dtype):
    theta, grads = vectors(size, seed, dtype)
    got = path(kernels.adam, theta, grads, 2, (*betas, eps, decoupled), weight_decay)
    assert_close(got, reference.adam(theta, grads, RATES, *betas, eps, weight_decay, decoupled), 10, 60)


@both_dtypes
@given(
    size=sizes,
    seed=seeds,
    alpha=st.sampled_from([0.99, 0.5]),
    eps=st.sampled_from([1e-4, 1e-2]),
    weight_decay=st.sampled_from([0.0, 0.1]),
    momentum=st.sampled_from([0.0, 0.9]),
    centered=st.booleans(),
)
def test_rmsprop(size, seed, alpha, eps, weight_decay, momentum, centered, dtype):
    theta, grads = vectors(size, seed, dtype)
    got = path(kernels.rmsprop, theta, grads, 3, (alpha, eps, momentum, centered), weight_decay)
    want = reference.rmsprop(theta, grads, RATES, alpha, eps, weight_decay, momentum, centered)
    # Centered, the difference of two squares near each other: the variance of few gradients.
    assert_close(got, want, 1e4 if centered else 100, 200)


@both_dtypes
@given(size=st.integers(1, 9000), seed=seeds, cut=st.integers(0, 9000), bound=st.sampled_from([0.5, 1e9]))
def test_clip_grad_norm(size, seed, cut, bound, dtype):
    grad = vectors(size, seed, dtype)[0]
    cut = min(cut, size - 1)
    blocks, _ = kernels.parameter_blocks([(cut, size, 1.0, 0.0)], dtype)
    norm, partials, clipped = np.zeros(1, dtype), np.zeros(len(blocks), dtype), grad.copy()
    kernels.clip_grad_norm(clipped, norm, partials, blocks, bound)
    want = np.linalg.norm(grad[cut:].astype(np.float64))
    np.testing.assert_allclose(norm[0], want, rtol=1e-5)
    np.testing.assert_array_equal(clipped[:cut], grad[:cut])
    np.testing.assert_allclose(clipped[cut:], grad[cut:] * min(1, bound / (want + 1e-6)), rtol=2e-5)
    clipped[-1] = np.nan
    kernels.clip_grad_norm(clipped, norm, partials, blocks, bound)
    assert np.isnan(norm[0])
    assert np.isnan(clipped[cut:]).all()


@both_dtypes
def test_clip_grad_value(dtype):
    grad = np.array([-3, -0.5, 0, 0.5, 3, np.nan, np.inf, -np.inf] * 5, dtype)
    kernels.clip_grad_value(grad, 0.75)
    np.testing.assert_array_equal(grad, np.array([-0.75, -0.5, 0, 0.5, 0.75, np.nan, 0.75, -0.75] * 5, dtype))


def test_parameter_blocks_cover_the_ranges():
    ranges = [(0, 5000, 1.0, 0.1), (5000, 5001, 0.5, 0.0), (7000, 9100, 2.0, 0.3)]
    blocks, rates = kernels.parameter_blocks(ranges, np.float32)
    covered = np.zeros((9200, 2))
    for (start, stop), rate in zip(blocks, rates, strict=True):
        assert not covered[start:stop].any()
        covered[start:stop] = rate
    for start, stop, *rate in ranges:
        np.testing.assert_array_equal(covered[start:stop], np.tile(rate, (stop - start, 1)))
    assert not covered[5001:7000].any()


@both_dtypes
@pytest.mark.parametrize("states", [1, 2])
def test_optimizers_propagate_nan(states, dtype):
    theta, grads = vectors(100, 3, dtype)
    grads[:, 41] = np.nan
    kernel, options = [(kernels.sgd, (0.9, 0.0, False)), (kernels.adam, (0.9, 0.999, 1e-8, False))][states - 1]
    last = path(kernel, theta, grads, states, options)[-1]
    np.testing.assert_array_equal(np.flatnonzero(np.isnan(last)), [41])


@both_dtypes
@given(size=sizes, seed=seeds, scale=st.sampled_from([1, 16, 1 / 64]))
def test_accumulate_grad(size, seed, scale, dtype):
    total, grads = np.full(size, np.nan, dtype), vectors(size, seed, dtype)[1]
    kernels.accumulate_grad(total, grads[0], scale, True)
    assert_close(total, scale * grads[0].astype(np.float64), 2, 2)
    kernels.accumulate_grad(total, grads[1], scale, False)
    assert_close(total, scale * (grads[0].astype(np.float64) + grads[1]), 4, 20)
    grads[1][size // 2] = np.nan
    kernels.accumulate_grad(total, grads[1], scale, False)
    np.testing.assert_array_equal(np.flatnonzero(np.isnan(total)), [size // 2])


@both_dtypes
@given(size=sizes, seed=seeds, decay=st.sampled_from([0.0, 0.5, 0.999]))
def test_ema_update(size, seed, decay, dtype):
    steps = vectors(size, seed, dtype)[1]
    average, step = blank(size, dtype), np.zeros(1, np.int64)
    for t, want in enumerate(reference.ema(steps, decay)):
        kernels.ema_update(average, steps[t], step, decay)
        assert_close(average, want, 5, 20)
        assert step == [t + 1]
    kernels.ema_update(average, np.where(np.arange(size) == size // 2, np.nan, steps[0]).astype(dtype), step, decay)
    np.testing.assert_array_equal(np.flatnonzero(np.isnan(average)), [size // 2])


@both_dtypes
def test_descend_each(dtype):
    theta, grad, sizes = np.random.default_rng(0).standard_normal((3, 100)).astype(dtype)
    want, step = theta.astype(np.float64) - sizes.astype(np.float64) * grad, np.array([4])
    kernels.sgd_per_parameter(theta, grad, sizes, step)
    assert_close(theta, want, 10, 2)
    assert step == [5]


# --- batches ----------------------------------------------------------------------------------------------------------


@both_dtypes
@pytest.mark.parametrize("kind", [np.uint8, np.float32])
@given(
    N=st.integers(1, 9),
    shape=st.tuples(st.integers(1, 3), st.integers(1, 9), st.integers(1, 9)),
    B=st.integers(1, 20),
    padding=st.tuples(st.integers(0, 3), st.integers(0, 3)),
    seed=seeds,
)
def test_gather(N, shape, B, padding, seed, kind, dtype):
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (N, *shape)).astype(kind)
    labels, order, start = rng.integers(0, 10, N), rng.integers(0, N, 2 * B), rng.integers(0, B + 1, 1)
    index = order[start[0] : start[0] + B]
    scale, shift = rng.uniform(0.001, 0.1, shape[0]), rng.standard_normal(shape[0])
    (ph, pw), (C, H, W) = padding, shape
    x, target = blank((B, C, H + 2 * ph, W + 2 * pw), dtype), blank(B, np.int64)
    kernels.gather(x, target, images, labels, order, start, scale, shift, padding)
    padded = np.pad(images.astype(np.float64), ((0, 0), (0, 0), (ph, ph), (pw, pw)))  # zero pixels, then normalised
    want = padded[index] * scale[:, None, None] + shift[:, None, None]
    assert_close(x, want, 256 * scale.max() + 5)
    np.testing.assert_array_equal(target, labels[index])


def accumulate(totals, cursor, loss, predicted, target, shares, score=(), sample_weight=()):
    arrays = np.float32(loss), np.array(predicted, np.int64), np.float32(score), np.array(target)
    kernels.accumulate_metrics(totals, cursor, *arrays, np.asarray(shares, float), np.float32(sample_weight))


def test_accumulate_metrics():
    totals, cursor, ones = np.zeros(5), np.zeros(1, np.int64), np.ones(4)
    accumulate(totals, cursor, [0.5, 0.25], [3, 1], [3, 2], ones)
    accumulate(totals, cursor, [1, 1, 1], [], [3, 2, 1], ones)
    np.testing.assert_array_equal(totals, [0.75 * 2 + 3 * 3, 1, 5, 2, 5])
    assert cursor == [5]
    for bad in (np.nan, np.inf, 1.0):
        accumulate(totals, cursor, [bad], [0], [0], ones)
        assert totals[3] == 2  # not counted from the first on that is not finite
        assert not np.isfinite(totals[0])


def test_accumulate_metrics_with_class_weights_and_of_sums():
    target, shares = [0, 2, 1], [1.0, 0.0, 2.0]
    for _ in range(2):
        totals = np.zeros(5)
        accumulate(totals, np.zeros(1, np.int64), [0.5, 0.25, 1], target, target, shares)
        np.testing.assert_array_equal(totals, [1.75 * 3, 3, 3, 1, 3])
    totals = np.zeros(5)
    accumulate(totals, np.zeros(1, np.int64), [0.5, 0.25, 1], target, target, [])
    np.testing.assert_array_equal(totals, [1.75, 3, 3, 1, 0])


def test_accumulate_metrics_with_scores_and_sample_weights():
    totals = np.zeros(5)
    accumulate(totals, np.zeros(1, np.int64), [0.5, 0.25, 1], [], [0, 0, 0], [1.0], [0.5, 1, 0.25], [1, 0, 2])
    np.testing.assert_array_equal(totals, [1.75 * 3, 1.75, 3, 1, 3])
    totals = np.zeros(5)
    accumulate(totals, np.zeros(1, np.int64), [0.5, 0.25], [1, 1], [1, 0], [1.0, 4.0], (), [2, 3])
    np.testing.assert_array_equal(totals, [0.75 * 11, 1, 2, 1, 11])


@both_dtypes
@pytest.mark.parametrize("shares", [[], [1.0], [0.5, 0.0, 2.0]])
def test_weight_samples(shares, dtype):
    """A mean weighted by the class becomes one weighted by class and sample."""
    rng = np.random.default_rng(0)
    loss, dx, target = rng.random(7).astype(dtype), rng.standard_normal((7, 3)).astype(dtype), rng.integers(0, 3, 7)
    weights, c = rng.integers(0, 4, 7).astype(dtype), np.ones(7) if len(shares) < 2 else np.array(shares)[target]
    factor = weights * (c.sum() / (c * weights).sum() if shares else 1)
    want = loss * factor, dx * factor[:, None]
    kernels.weight_samples(loss, dx, target, np.array(shares), weights)
    np.testing.assert_allclose(loss, want[0], rtol=1e-6)
    np.testing.assert_allclose(dx, want[1], rtol=1e-6)


@both_dtypes
def test_gather_rows(dtype):
    values = np.random.default_rng(0).standard_normal((9, 3)).astype(dtype)
    rows, order = blank((4, 3), dtype), np.array([8, 0, 3, 3, 7, 1])
    kernels.gather_rows(rows, values, order, np.array([2]))
    np.testing.assert_array_equal(rows, values[[3, 3, 7, 1]])


ELEMENTWISE = {
    "l1_loss": (lambda e: abs(e), np.sign, ()),
    "huber_loss": (
        lambda e: np.where(abs(e) > 0.7, 0.7 * (abs(e) - 0.35), e**2 / 2), lambda e: np.clip(e, -0.7, 0.7), (0.7,)
    ),
    "mse_loss": (lambda e: e**2, lambda e: 2 * e, ()),
}  # fmt: skip


@both_dtypes
@pytest.mark.parametrize("name", ELEMENTWISE)
@given(N=st.integers(1, 9), F=st.integers(1, 40), seed=seeds, mean=st.booleans())
def test_losses_of_numbers(name, N, F, seed, mean, dtype):
    value, derivative, options = ELEMENTWISE[name]
    x, target = np.random.default_rng(seed).standard_normal((2, N, F)).astype(dtype)
    x[0, 0] = target[0, 0]
    loss, dx, error = blank(N, dtype), blank((N, F), dtype), (x - target).astype(np.float64)
    getattr(kernels, name)(loss, dx, x, target, *options, mean)
    scale = 1 / (N * F) if mean else 1
    assert_close(loss, value(error).sum(axis=1) * scale, abs(error).sum(axis=1) * scale + 1e-6, F + 20)
    assert_close(dx, derivative(error) * scale, 4 * scale, 20)
    score = blank(N, dtype)
    kernels.absolute_error(score, x, target)
    assert_close(score, abs(error).mean(axis=1), 1, F + 20)
    target[0, 0] = np.nan
    getattr(kernels, name)(loss, dx, x, target, *options, mean)
    assert np.isnan(loss[0])
    assert np.isnan(dx[0, 0])


@both_dtypes
@given(N=st.integers(1, 9), F=st.integers(1, 12), seed=seeds, mean=st.booleans(), scale=st.sampled_from([1.0, 50.0]))
def test_binary_cross_entropy(N, F, seed, mean, scale, dtype):
    rng = np.random.default_rng(seed)
    x, target = (rng.standard_normal((N, F)) * scale).astype(dtype), rng.integers(0, 2, (N, F)).astype(dtype)
    weight, pos_weight = rng.uniform(0.5, 2, F).astype(dtype), rng.uniform(0.5, 2, 1).astype(dtype)
    loss, score, dx = blank(N, dtype), blank(N, dtype), blank((N, F), dtype)
    kernels.binary_cross_entropy_with_logits(loss, score, dx, x, target, weight, pos_weight, mean)
    z, factor = x.astype(np.float64), 1 / (N * F) if mean else 1
    terms = weight * ((1 - target) * np.logaddexp(0, z) + pos_weight * target * np.logaddexp(0, -z)) * factor
    assert_close(loss, terms.sum(axis=1), terms.sum(axis=1) + 1e-6, F + 40)
    sigmoid = reference.sigmoid(z)
    want = weight * ((1 - target) * sigmoid - pos_weight * target * (1 - sigmoid)) * factor
    assert_close(dx, want, 4 * factor, 20)
    np.testing.assert_allclose(score, ((x > 0) == (target > 0.5)).mean(axis=1), rtol=1e-6)


def test_array_services():
    new = kernels.empty((2, 3), np.float32)
    assert new.dtype == np.float32
    np.testing.assert_array_equal(new, np.zeros((2, 3)))
    transposed = np.arange(6.0).reshape(2, 3).T
    array = kernels.to_device(transposed)
    assert array.flags.c_contiguous
    np.testing.assert_array_equal(kernels.to_host(array), transposed)
    ran = []
    kernels.capture(lambda: ran.append(1))()
    assert ran == [1]
    kernels.copy_to(array, np.ones((3, 2)))
    np.testing.assert_array_equal(array, np.ones((3, 2)))


# --- the same bits on any number of threads; a row for every kernel of this file --------------------------------------


def _case(name, dtype):
    if name.startswith("linear"):
        x, w, b, dy = linear_arrays(77, 901, 23, True, 1, dtype)
        if name == "linear_forward":
            return kernels.linear_forward, (blank(dy.shape, dtype), x, w, b), (0,)
        return kernels.linear_backward, (*(blank(a.shape, dtype) for a in (x, w, b)), dy, x, w), (0, 1, 2)
    rng = np.random.default_rng(8)
    if name in ("cross_entropy", "mse_loss", "one_hot"):
        x, other = rng.standard_normal((2, 301, 37)).astype(dtype)
        loss, predicted, dx = blank(301, dtype), blank(301, np.int64), blank(x.shape, dtype)
        if name == "mse_loss":
            return kernels.mse_loss, (loss, dx, x, other, True), (0, 1)
        target, weight = rng.integers(0, 37, 301), np.ones(37, dtype)
        if name == "one_hot":
            return kernels.one_hot, (dx, predicted, x, target), (0, 1)
        return kernels.cross_entropy, (loss, predicted, dx, x, target, weight, -100, 0.1, True), (0, 1, 2)
    if name in ("nll_loss", "soft_cross_entropy", "l1_loss", "huber_loss", "absolute_error", "gather_rows",
                "weight_samples", "binary_cross_entropy_with_logits"):  # fmt: skip
        x, other = rng.standard_normal((2, 301, 37)).astype(dtype)
        loss, score, predicted, dx = blank(301, dtype), blank(301, dtype), blank(301, np.int64), blank(x.shape, dtype)
        target, weight, row = rng.integers(0, 37, 301), np.ones(37, dtype), abs(x[:, 0])
        arguments, outputs = {
            "nll_loss": ((loss, predicted, dx, x, target, weight, -100, True), (0, 1, 2)),
            "soft_cross_entropy": ((loss, predicted, score, dx, x, abs(other), weight, 0.1, True), (0, 1, 2, 3)),
            "l1_loss": ((loss, dx, x, other, True), (0, 1)),
            "huber_loss": ((loss, dx, x, other, 0.5, True), (0, 1)),
            "absolute_error": ((loss, x, other), (0,)),
            "gather_rows": ((dx, x, target, np.zeros(1, np.int64)), (0,)),
            "weight_samples": ((row, other, target, np.ones(37), abs(x[:, 1])), (0, 1)),
            "binary_cross_entropy_with_logits": ((loss, score, dx, x, abs(other) % 1, weight, weight, True), (0, 1, 2)),
        }[name]
        return getattr(kernels, name), arguments, outputs
    if name == "gather":
        images, labels = rng.integers(0, 256, (50, 2, 9, 11)).astype(np.uint8), rng.integers(0, 10, 50)
        x, target = blank((70, 2, 13, 13), dtype), blank(70, np.int64)
        scale, shift = np.array([0.01, 0.02]), np.array([-1.0, 2.0])
        order, cursor = rng.integers(0, 50, 90), np.array([20])
        return kernels.gather, (x, target, images, labels, order, cursor, scale, shift, (2, 1)), (0, 1)
    if name == "increment":
        return kernels.increment, (np.array([6]),), (0,)
    if name == "accumulate_metrics":
        loss, predicted, target = rng.random(64).astype(dtype), rng.integers(0, 3, 64), rng.integers(0, 3, 64)
        return (
            kernels.accumulate_metrics,
            (np.zeros(5), np.zeros(1, np.int64), loss, predicted, loss[:0], target, np.ones(3), loss[:0]),
            (0, 1),
        )
    theta, grad, m, v = rng.standard_normal((4, 61_706)).astype(dtype)
    step = np.array([3])
    if name == "ema_update":
        return kernels.ema_update, (m, theta, step, 0.99), (0, 2)
    if name == "accumulate_grad":
        return kernels.accumulate_grad, (m, grad, 16, False), (0,)
    if name == "sgd_per_parameter":
        return kernels.sgd_per_parameter, (theta, grad, v * v, step), (0, 3)
    table = kernels.parameter_blocks([(0, 30_000, 1.0, 0.01), (31_000, 61_706, 0.5, 0.0)], dtype)
    if name == "clip_grad_value":
        return kernels.clip_grad_value, (grad, 0.5), (0,)
    if name == "clip_grad_norm":
        return kernels.clip_grad_norm, (grad, m[:1], v[: len(table[0])], table[0], 1.0), (0, 1, 2)
    if name == "sgd":
        return kernels.sgd, (theta, grad, m, RATES, step, *table, 0.9, 0.0, False), (0, 2, 4)
    if name == "rmsprop":
        options = 0.99, 1e-8, 0.9, True
        return kernels.rmsprop, (theta, grad, v * v + 9, m, v, RATES, step, *table, *options), (0, 2, 3, 4, 6)
    return kernels.adam, (theta, grad, m, v * v, RATES, step, *table, 0.9, 0.999, 1e-8, True), (0, 2, 3, 5)


CASES = [
    "absolute_error",
    "binary_cross_entropy_with_logits",
    "gather_rows",
    "huber_loss",
    "l1_loss",
    "nll_loss",
    "soft_cross_entropy",
    "weight_samples",
    "linear_forward",
    "linear_backward",
    "cross_entropy",
    "mse_loss",
    "one_hot",
    "gather",
    "accumulate_metrics",
    "increment",
    "accumulate_grad",
    "ema_update",
    "sgd_per_parameter",
    "sgd",
    "adam",
    "rmsprop",
    "clip_grad_norm",
    "clip_grad_value",
]


@both_dtypes
@pytest.mark.parametrize("name", CASES)
def test_same_bits(name, dtype, same_bits):
    same_bits(lambda: _case(name, dtype))
