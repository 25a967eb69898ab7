"""Average and max pooling against loops, over random shapes."""

import numpy as np
import pytest
import reference
from hypothesis import assume, example, given, strategies as st
from reference import assert_close, blank

from tinycnn import kernels

both_dtypes = pytest.mark.parametrize("dtype", [np.float32, np.float64])


@st.composite
def problems(draw, dilated=False):
    """(shape of x, kernel, stride, padding, dilation, ceil_mode, seed)"""
    images, channels = draw(st.integers(1, 3), label="N"), draw(st.integers(1, 5), label="C")
    side_by_side = draw(st.booleans(), label="2 x 2 side by side")  # a special case in the kernels
    ceil_mode = draw(st.booleans(), label="ceil_mode")
    size, kernel, stride, padding, dilation = [], [], [], [], []
    for axis in "hw":
        K = 2 if side_by_side else draw(st.integers(1, 5), label=f"kernel {axis}")
        d = draw(st.integers(1, 3), label=f"dilation {axis}") if dilated and not side_by_side else 1
        p = 0 if side_by_side else draw(st.integers(0, K // 2), label=f"padding {axis}")
        kernel.append(K)
        stride.append(2 if side_by_side else draw(st.integers(1, 6), label=f"stride {axis}"))
        least = d * (K - 1) + 1 - 2 * p - (stride[-1] - 1 if ceil_mode else 0)
        size.append(max(1, least) + draw(st.integers(0, 9), label=f"room {axis}"))
        padding.append(p)
        dilation.append(d)
    seed = draw(st.integers(0, 2**32 - 1), label="seed")
    pairs = (tuple(a) for a in (kernel, stride, padding, dilation))
    return ((images, channels, *size), *pairs, ceil_mode, seed)


def image(shape, seed, dtype, ties=False):
    rng = np.random.default_rng(seed)
    return (rng.integers(-2, 3, shape) if ties else rng.standard_normal(shape)).astype(dtype)


# --- average ----------------------------------------------------------------------------------------------------------

HANGING_OVER = (1, 1, 5, 7), (2, 2), (2, 2), (0, 0), (1, 1), True, 0  # the last windows reach over the edge
OVER_THE_PADDING = (1, 1, 4, 4), (3, 3), (2, 2), (1, 1), (1, 1), True, 0
LARGER_THAN_THE_IMAGE = (1, 1, 2, 3), (3, 4), (2, 3), (0, 0), (1, 1), True, 0


@both_dtypes
@given(problem=problems(), count_include_pad=st.booleans(), divisor=st.sampled_from([0, 0, 1, 7]))
@example(problem=HANGING_OVER, count_include_pad=True, divisor=0)
@example(problem=HANGING_OVER, count_include_pad=True, divisor=3)
@example(problem=OVER_THE_PADDING, count_include_pad=True, divisor=0)
@example(problem=LARGER_THAN_THE_IMAGE, count_include_pad=True, divisor=0)
def test_average(problem, count_include_pad, divisor, dtype):
    shape, kernel, stride, padding, _, ceil_mode, seed = problem
    x = image(shape, seed, dtype)
    options = count_include_pad, divisor
    where = kernel, stride, padding
    want = reference.avg_pool2d(x, *where, ceil_mode, *options)
    y = blank(want.shape, dtype)
    kernels.avg_pool2d_forward(y, x, *where, *options)
    terms = kernel[0] * kernel[1]
    assert_close(y, want, reference.avg_pool2d(abs(x), *where, ceil_mode, *options), terms)

    dy = image(y.shape, seed + 1, dtype)
    dx = blank(shape, dtype)
    kernels.avg_pool2d_backward(dx, dy, *where, *options)
    magnitude = reference.avg_pool2d_backward(abs(dy), x, *where, *options)
    assert_close(dx, reference.avg_pool2d_backward(dy, x, *where, *options), magnitude, terms)


@both_dtypes
def test_average_of_ones_is_one(dtype):
    x = np.ones((2, 3, 9, 8), dtype)
    for kernel, stride, padding, count in [((3, 2), (2, 2), (1, 1), False), ((2, 2), (2, 2), (0, 0), True)]:
        y = blank((2, 3, *reference.pool_out(x, kernel, stride, padding)), dtype)
        kernels.avg_pool2d_forward(y, x, kernel, stride, padding, count, 0)
        np.testing.assert_array_equal(y, 1)


# --- max --------------------------------------------------------------------------------------------------------------


def max_forward(x, want, kernel, stride, padding, dilation):
    y, indices = blank(want.shape, x.dtype), blank(want.shape, np.int32)
    kernels.max_pool2d_forward(y, indices, x, kernel, stride, padding, dilation)
    return y, indices


@both_dtypes
@given(problem=problems(dilated=True), ties=st.booleans())
def test_max(problem, ties, dtype):
    shape, *where, ceil_mode, seed = problem
    x = image(shape, seed, dtype, ties)
    want, at = reference.max_pool2d(x, *where, ceil_mode)
    assume((at >= 0).all())  # a window without a pixel: below
    y, indices = max_forward(x, want, *where)
    np.testing.assert_array_equal(y, want)
    np.testing.assert_array_equal(indices, at)

    dy = image(y.shape, seed + 1, dtype)
    dx = blank(shape, dtype)
    kernels.max_pool2d_backward(dx, dy, indices, *where)
    magnitude = reference.max_pool2d_backward(abs(dy), at, shape)
    assert_close(dx, reference.max_pool2d_backward(dy, at, shape), magnitude, where[0][0] * where[0][1])


@both_dtypes
@given(problem=problems(dilated=True), bad=st.sampled_from([np.nan, np.inf, -np.inf]), share=st.floats(0.02, 1))
def test_max_with_nan_and_infinity(problem, bad, share, dtype):
    shape, *where, ceil_mode, seed = problem
    x = image(shape, seed, dtype, ties=True)
    x[np.random.default_rng(seed).random(shape) < share] = bad
    want, at = reference.max_pool2d(x, *where, ceil_mode)
    assume((at >= 0).all())
    y, indices = max_forward(x, want, *where)
    np.testing.assert_array_equal(y, want)
    np.testing.assert_array_equal(indices, at)


@both_dtypes
def test_max_window_without_a_pixel(dtype):
    """Padding and dilation can leave a window no pixel: -inf, and its gradient goes nowhere."""
    x = np.arange(1, 5, dtype=dtype).reshape(1, 1, 2, 2)
    where = (2, 2), (1, 1), (1, 1), (3, 3)  # rows and columns -1 and 2 of two
    want, at = reference.max_pool2d(x, *where)
    y, indices = max_forward(x, want, *where)
    assert y.shape == (1, 1, 1, 1)
    assert y[0, 0, 0, 0] == -np.inf
    dx = blank(x.shape, dtype)
    kernels.max_pool2d_backward(dx, np.ones_like(y), indices, *where)
    np.testing.assert_array_equal(dx, reference.max_pool2d_backward(np.ones_like(y), at, x.shape))


# --- both -------------------------------------------------------------------------------------------------------------


@both_dtypes
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("where", [((2, 2), (2, 2), (0, 0)), ((3, 2), (1, 2), (1, 1))])
def test_nan_and_infinity_propagate(where, value, dtype):
    x = image((2, 2, 6, 8), 3, dtype)
    out = reference.pool_out(x, *where)
    dy = image((2, 2, *out), 4, dtype)
    x[1, 0, 3, 4] = dy[1, 0, 1, 2] = value
    y, dx = blank(dy.shape, dtype), blank(x.shape, dtype)
    kernels.avg_pool2d_forward(y, x, *where, True, 0)
    np.testing.assert_array_equal(np.isnan(y), np.isnan(want := reference.avg_pool2d(x, *where)))
    np.testing.assert_array_equal(y[np.isinf(want)], want[np.isinf(want)])
    kernels.avg_pool2d_backward(dx, dy, *where, True, 0)
    np.testing.assert_array_equal(np.isfinite(dx), np.isfinite(reference.avg_pool2d_backward(dy, x, *where)))
    assert not np.isfinite(dx).all()
    want, at = reference.max_pool2d(x, *where)
    y, indices = max_forward(x, want, *where, (1, 1))
    np.testing.assert_array_equal(y, want)
    kernels.max_pool2d_backward(dx, dy, indices, *where, (1, 1))
    np.testing.assert_array_equal(np.isfinite(dx), np.isfinite(reference.max_pool2d_backward(dy, at, x.shape)))
    assert not np.isfinite(dx).all()


# --- the same bits on any number of threads; a row for every kernel of this file --------------------------------------

SHAPE = (9, 5, 21, 18)
WINDOWS = {"2 x 2": ((2, 2), (2, 2), (0, 0)), "3 x 3 overlapping": ((3, 3), (2, 2), (1, 1))}


def _case(name, dtype, window):
    x = image(SHAPE, 1, dtype)
    where = WINDOWS[window]
    shape = (*SHAPE[:2], *reference.pool_out(x, *where))
    dy, y, dx = image(shape, 2, dtype), blank(shape, dtype), blank(SHAPE, dtype)
    indices = blank(shape, np.int32)
    if name == "max_pool2d_backward":
        kernels.max_pool2d_forward(y, indices, x, *where, (1, 1))
    arguments, outputs = {
        "avg_pool2d_forward": ((y, x, *where, True, 0), (0,)),
        "avg_pool2d_backward": ((dx, dy, *where, True, 0), (0,)),
        "max_pool2d_forward": ((y, indices, x, *where, (1, 1)), (0, 1)),
        "max_pool2d_backward": ((dx, dy, indices, *where, (1, 1)), (0,)),
    }[name]
    return getattr(kernels, name), arguments, outputs


CASES = ["avg_pool2d_forward", "avg_pool2d_backward", "max_pool2d_forward", "max_pool2d_backward"]


@both_dtypes
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("name", CASES)
def test_same_bits(name, window, dtype, same_bits):
    same_bits(lambda: _case(name, dtype, window))
