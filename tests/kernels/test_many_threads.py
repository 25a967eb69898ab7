"""Kernels that divide their work by the number of threads: the same bits as with one, as on machines of many cores."""

import numba
import numpy as np
import pytest
from reference import blank

from tinycnn.kernels import direct_conv, layout, linear

MANY = [2, 3, 16, 64]  # what is passed to the kernels; the threads that run them are fewer


def same_for_all(monkeypatch, compute):
    """The results of `compute`, equal for any number of threads."""
    monkeypatch.setattr(numba, "get_num_threads", lambda: 1)
    wanted = compute()
    for threads in MANY:
        monkeypatch.setattr(numba, "get_num_threads", lambda threads=threads: threads)
        for got, want in zip(compute(), wanted, strict=True):
            np.testing.assert_array_equal(got, want)
    return wanted


@pytest.mark.parametrize(
    ("shape", "weights", "options"),
    [
        ((6, 14, 14), (16, 6, 5, 5), ((1, 1), (0, 0), (1, 1), 1)),
        ((4, 9, 11), (18, 2, 3, 3), ((2, 1), (1, 2), (1, 2), 2)),
        ((3, 1, 5), (5, 3, 1, 2), ((1, 2), (0, 1), (1, 1), 1)),  # one row, fewer channels than a register block
        ((64, 8, 8), (128, 64, 3, 3), ((1, 1), (1, 1), (1, 1), 1)),  # the sums of the chunks are tasks too
    ],
)
@pytest.mark.parametrize("blocks", [1, 3, 11])
def test_convolution(monkeypatch, shape, weights, options, blocks):
    rng = np.random.default_rng(0)
    L = layout.lanes_for(blocks * 16, np.float32)
    stride, padding, dilation, _ = options
    size = zip(shape[1:], weights[2:], stride, padding, dilation, strict=True)
    out = [(n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in size]
    x, dy = (rng.standard_normal((blocks, *s, L), np.float32) for s in (shape, (weights[0], *out)))
    w, b = rng.standard_normal(weights, np.float32), rng.standard_normal(weights[0], np.float32)

    def compute():
        y, dx, dw, db = (blank(a.shape, a.dtype) for a in (dy, x, w, b))
        direct_conv.conv2d_forward_direct(y, x, w, b, None, None, *options)
        direct_conv.conv2d_backward_direct(dx, dw, db, dy, x, w, *options)
        return y, dx, dw, db

    y, _, dw, _ = same_for_all(monkeypatch, compute)
    assert np.isfinite(y).all()
    assert (dw != 0).all()


@pytest.mark.parametrize("shape", [(64, 400, 120), (64, 84, 10), (37, 5, 300), (260, 33, 70)])
def test_linear(monkeypatch, shape):
    N, F, O = shape
    rng = np.random.default_rng(0)
    x, w, b, dy = (rng.standard_normal(s, np.float32) for s in ((N, F), (O, F), O, (N, O)))

    def compute():
        y, dx, dw, db = (blank(a.shape, a.dtype) for a in (dy, x, w, b))
        linear.linear_forward(y, x, w, b)
        linear.linear_backward(dx, dw, db, dy, x, w)
        return y, dx, dw, db

    y, dx, dw, _ = same_for_all(monkeypatch, compute)
    np.testing.assert_allclose(y, x @ w.T + b, rtol=0, atol=1e-4 * F**0.5)
    np.testing.assert_allclose(dx, dy @ w, rtol=0, atol=1e-4 * O**0.5)
    np.testing.assert_allclose(dw, dy.T @ x, rtol=0, atol=1e-4 * N**0.5)
