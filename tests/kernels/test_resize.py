"""Transposed convolution, upsampling, padding, adaptive pooling, sums over channels: against plain loops in NumPy."""

import numpy as np
import pytest
from hypothesis import given, strategies as st

from tinycnn import kernels
from tinycnn.kernels import layout

both_dtypes = pytest.mark.parametrize("dtype", [np.float32, np.float64])
sizes = st.integers(1, 9)


def blocked(x):
    """x (N, C, H, W) in the batch-blocked layout."""
    lanes = max(layout.lanes_for(64, x.dtype), 4)
    y = np.zeros((-(-len(x) // lanes), *x.shape[1:], lanes), x.dtype)
    layout.to_blocked(y, x)
    return y


def both_layouts(kernel, y, *arguments):
    """The kernel's result on NCHW arrays; on blocked arrays it must be the same."""
    kernel(y, *arguments)
    if y.ndim == 4:
        blocked_y = np.full_like(blocked(y), np.nan)
        kernel(blocked_y, *(blocked(a) if isinstance(a, np.ndarray) and a.ndim == 4 else a for a in arguments))
        np.testing.assert_allclose(layout.as_nchw(blocked_y)[: len(y)], y, rtol=1e-5, atol=1e-6)
    return y


@both_dtypes
@given(n=st.integers(1, 9), size=st.tuples(sizes, sizes), out=st.tuples(sizes, sizes), seed=st.integers(0, 99))
def test_upsample_and_adaptive_pool(n, size, out, seed, dtype):
    rng = np.random.default_rng(seed)
    x, dy = rng.standard_normal((n, 2, *size)).astype(dtype), rng.standard_normal((n, 2, *out)).astype(dtype)
    (H, W), (OH, OW) = size, out
    nearest = x[:, :, np.arange(OH) * H // OH][:, :, :, np.arange(OW) * W // OW]
    got = both_layouts(kernels.upsample_nearest2d_forward, np.full_like(dy, np.nan), x)
    np.testing.assert_array_equal(got, nearest)
    mean, dx_up, dx_mean = np.empty_like(dy), np.zeros_like(x), np.zeros_like(x)
    for i in range(OH):
        for j in range(OW):
            dx_up[:, :, i * H // OH, j * W // OW] += dy[:, :, i, j]
            rows = slice(i * H // OH, -(-(i + 1) * H // OH))
            columns = slice(j * W // OW, -(-(j + 1) * W // OW))
            window = x[:, :, rows, columns]
            mean[:, :, i, j] = window.mean(axis=(2, 3))
            dx_mean[:, :, rows, columns] += dy[:, :, i : i + 1, j : j + 1] / (window.shape[2] * window.shape[3])
    tolerance = {"rtol": 1e-5, "atol": 1e-5}
    got = both_layouts(kernels.upsample_nearest2d_backward, np.full_like(x, np.nan), dy)
    np.testing.assert_allclose(got, dx_up, **tolerance)
    got = both_layouts(kernels.adaptive_avg_pool2d_forward, np.full_like(dy, np.nan), x)
    np.testing.assert_allclose(got, mean, **tolerance)
    got = both_layouts(kernels.adaptive_avg_pool2d_backward, np.full_like(x, np.nan), dy)
    np.testing.assert_allclose(got, dx_mean, **tolerance)


@both_dtypes
@given(
    n=st.integers(1, 9),
    size=st.tuples(sizes, sizes),
    sides=st.tuples(*[st.integers(-3, 4)] * 4),
    seed=st.integers(0, 99),
)
def test_zero_pad(n, size, sides, seed, dtype):
    x = np.random.default_rng(seed).standard_normal((n, 2, *size)).astype(dtype)
    (H, W), (top, bottom, left, right) = size, sides
    OH, OW = max(1, top + H + bottom), max(1, left + W + right)
    want = np.zeros((n, 2, OH, OW), dtype)
    for i in range(OH):
        for j in range(OW):
            if 0 <= i - top < H and 0 <= j - left < W:
                want[:, :, i, j] = x[:, :, i - top, j - left]
    np.testing.assert_array_equal(both_layouts(kernels.zero_pad2d, np.full_like(want, np.nan), x, (top, left)), want)


@both_dtypes
@given(n=st.integers(1, 40), channels=st.integers(1, 5), size=st.tuples(sizes, sizes), seed=st.integers(0, 99))
def test_bias_and_its_gradient(n, channels, size, seed, dtype):
    rng = np.random.default_rng(seed)
    x, b = rng.standard_normal((n, channels, *size)).astype(dtype), rng.standard_normal(channels).astype(dtype)
    np.testing.assert_allclose(
        both_layouts(kernels.sum_channels, np.full(channels, np.nan, dtype), x),
        x.sum(axis=(0, 2, 3)),
        rtol=1e-4,
        atol=1e-4,
    )
    y, planes = x.copy(), blocked(x)
    kernels.add_bias(y, b)
    np.testing.assert_array_equal(y, x + b[:, None, None])
    kernels.add_bias(planes, b)
    np.testing.assert_array_equal(layout.as_nchw(planes)[:n], y)


OPTIONS = [  # in, out, kernel, stride, padding, dilation, groups
    (3, 5, (3, 3), (1, 1), (1, 1), (1, 1), 1),
    (4, 6, (2, 3), (2, 3), (1, 0), (1, 2), 2),
    (2, 2, (4, 4), (1, 1), (0, 0), (1, 1), 1),
]


@both_dtypes
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("n", [1, 3, 35])
def test_convolution_without_its_weight_gradient(options, n, dtype):
    """dx is the same if dw is not wanted, in each of the algorithms."""
    C, O, kernel, *rest, groups = options
    rng = np.random.default_rng(0)
    x = rng.standard_normal((n, C, 9, 8)).astype(dtype)
    w = rng.standard_normal((O, C // groups, *kernel)).astype(dtype)
    out = [(s + 2 * p - d * (k - 1) - 1) // t + 1 for s, k, t, p, d in zip((9, 8), kernel, *rest, strict=True)]
    dy = rng.standard_normal((n, O, *out)).astype(dtype)
    for images, grads in ((x, dy), (blocked(x), blocked(dy))):
        results = []
        for dw in (np.empty_like(w), w[:0]):
            dx = np.full_like(images, np.nan)
            kernels.conv2d_backward(dx, dw, np.empty(0, dtype), grads, images, w, *rest, groups)
            results.append(dx)
        np.testing.assert_array_equal(*results)


def _case(name, dtype):
    rng = np.random.default_rng(1)
    x, dy = rng.standard_normal((40, 7, 19, 17)).astype(dtype), rng.standard_normal((40, 7, 7, 23)).astype(dtype)
    blank_x, blank_y, b = np.full_like(x, np.nan), np.full_like(dy, np.nan), rng.standard_normal(7).astype(dtype)
    arguments = {
        "add_bias": (x, b),
        "sum_channels": (b, x),
        "zero_pad2d": (blank_y, x, (-2, 3)),
    }.get(name, (blank_y, x) if name.endswith("forward") else (blank_x, dy))
    return getattr(kernels, name), arguments, (0,)


CASES = [
    "adaptive_avg_pool2d_forward",
    "adaptive_avg_pool2d_backward",
    "upsample_nearest2d_forward",
    "upsample_nearest2d_backward",
    "zero_pad2d",
    "add_bias",
    "sum_channels",
]


@both_dtypes
@pytest.mark.parametrize("name", CASES)
def test_same_bits(name, dtype, same_bits):
    same_bits(lambda: _case(name, dtype))
