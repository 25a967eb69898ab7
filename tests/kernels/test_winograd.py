"""Winograd's convolution of batch blocks, and of NCHW, against loops."""

import numba
import numpy as np
import pytest
import reference
from blocks import lanes, to_blocked, to_nchw
from hypothesis import given, strategies as st
from reference import blank

from tinycnn.kernels import conv, direct_conv, folded, winograd, winograd_nchw

both_dtypes = pytest.mark.parametrize("dtype", [np.float32, np.float64])
ONE = (1, 1)


@st.composite
def problems(draw):
    """(shape of x, shape of w, padding, bias?, seed)"""
    padding = draw(st.integers(0, 2)), draw(st.integers(0, 2))
    size = (max(1, 3 - 2 * p) + draw(st.integers(0, 9)) for p in padding)
    C, O, N = draw(st.integers(16, 40)), draw(st.integers(16, 40)), draw(st.sampled_from([1, 8, 16, 19]))
    return (N, C, *size), (O, C, 3, 3), padding, draw(st.booleans()), draw(st.integers(0, 999))


def arrays(problem, dtype):
    x_shape, w_shape, padding, bias, seed = problem
    rng = np.random.default_rng(seed)
    x, w = (rng.standard_normal(shape).astype(dtype) for shape in (x_shape, w_shape))
    b = rng.standard_normal(w_shape[0] if bias else 0).astype(dtype)
    out = reference.conv_out(x, w, ONE, padding, ONE)
    return x, w, b, rng.standard_normal((len(x), len(w), *out)).astype(dtype), padding


def assert_near(got, want, magnitude):
    """Up to rounding: errors are relative to the magnitude of a whole tile."""
    assert np.isfinite(got).all()
    assert np.abs(got - want).max() <= 20 * np.finfo(got.dtype).eps * magnitude.max()


@both_dtypes
@given(problem=problems())
def test_forward_and_input_gradient(problem, dtype):
    x, w, b, dy, padding = arrays(problem, dtype)
    L = lanes(dtype)
    blocked, dy_blocked, y = to_blocked(x, L), to_blocked(dy, L), to_blocked(blank(dy.shape, dtype), L)
    assert winograd.applies(y, blocked, w, ONE, ONE, 1)
    conv.run_forward(y, blocked, w, b, None, None, ONE, padding, ONE, 1)
    magnitude = reference.conv2d(abs(x), abs(w), abs(b), ONE, padding)
    assert_near(to_nchw(y, len(x)), reference.conv2d(x, w, b, ONE, padding), magnitude)
    dx, dw, db = to_blocked(blank(x.shape, dtype), L), blank(w.shape, dtype), blank(len(w), dtype)
    conv.conv2d_backward(dx, dw, db, dy_blocked, blocked, w, ONE, padding, ONE, 1)
    want = reference.conv2d_backward(dy, x, w, ONE, padding)
    magnitude = reference.conv2d_backward(abs(dy), abs(x), abs(w), ONE, padding)
    for got, a, m in zip((to_nchw(dx, len(x)), dw, db), want, magnitude, strict=True):
        assert_near(got, a, m)


@both_dtypes
@pytest.mark.parametrize("with_residual", [False, True])
def test_epilogue(with_residual, dtype):
    x, w, _, dy, padding = arrays(((11, 17, 5, 7), (21, 17, 3, 3), (1, 2), False, 3), dtype)
    L, rng = lanes(dtype), np.random.default_rng(0)
    table = rng.standard_normal((4, 21)).astype(dtype)
    table[2], table[3] = -0.5, 9
    y, term = to_blocked(blank(dy.shape, dtype), L), to_blocked(dy, L) if with_residual else None
    folded.conv2d(y, to_blocked(x, L), w, table, term, ONE, padding, ONE, 1)
    scale, shift = (row[:, None, None].astype(np.float64) for row in table[:2])
    want = reference.conv2d(x, w, table[0, :0], ONE, padding) * scale + shift + (dy if with_residual else 0)
    np.testing.assert_allclose(
        to_nchw(y, 11), np.clip(want, -0.5, 9), rtol=0, atol=(1e-4 if dtype == np.float32 else 1e-12)
    )


@st.composite
def nchw_problems(draw):
    """As `problems`, with output rows of whole vectors of float32."""
    padding, vector = (draw(st.integers(0, 2)), draw(st.integers(0, 2))), lanes(np.float32)
    N, OW, OH = draw(st.integers(1, 5)), vector * draw(st.integers(1, 3)), draw(st.integers(1, 19))
    N = max(N, -(-4 * vector // ((OH + 1) // 2 * (OW // 2))))
    size = max(1, OH + 2 - 2 * padding[0]), OW + 2 - 2 * padding[1]
    C, O = draw(st.integers(16, 40)), draw(st.integers(16, 40))
    return (N, C, *size), (O, C, 3, 3), padding, draw(st.booleans()), draw(st.integers(0, 999))


@both_dtypes
@pytest.mark.parametrize("with_residual", [False, True])
@given(problem=nchw_problems())
def test_nchw(problem, with_residual, dtype):
    x, w, b, dy, padding = arrays(problem, dtype)
    y, folded_y = blank(dy.shape, dtype), blank(dy.shape, dtype)
    assert winograd.applies(y, x, w, ONE, ONE, 1)
    conv.run_forward(y, x, w, b, None, None, ONE, padding, ONE, 1)
    want, magnitude = (reference.conv2d(f(x), f(w), f(b), ONE, padding) for f in (np.asarray, abs))
    assert_near(y, want, magnitude)
    table = np.random.default_rng(0).standard_normal((4, len(w))).astype(dtype)
    table[2], table[3] = -0.5, 9
    folded.conv2d(folded_y, x, w, table, dy if with_residual else None, ONE, padding, ONE, 1)
    scale, shift = (row[:, None, None].astype(np.float64) for row in table[:2])
    want = (want - b.reshape(-1, 1, 1) if b.size else want) * scale + shift + (dy if with_residual else 0)
    assert_near(folded_y, np.clip(want, -0.5, 9), magnitude * abs(scale) + abs(shift) + 1)


def test_nchw_with_more_padding_at_the_end():
    """The caller chooses the size of the output."""
    x, w, b, _, _ = arrays(((2, 16, 15, 15), (17, 16, 3, 3), (1, 1), True, 3), np.float32)
    y = blank((2, 17, 16, 16), np.float32)
    conv.run_forward(y, x, w, b, None, None, ONE, (1, 1), ONE, 1)
    wider = np.pad(x, ((0, 0), (0, 0), (1, 2), (1, 2)))
    assert winograd.applies(y, x, w, ONE, ONE, 1)
    np.testing.assert_allclose(y, reference.conv2d(wider, w, b, ONE, (0, 0)), rtol=0, atol=1e-4)


def test_nchw_same_bits_for_any_number_of_threads(monkeypatch):
    x, w, b, dy, padding = arrays(((3, 18, 16, 48), (40, 18, 3, 3), (1, 1), True, 4), np.float32)
    results = []
    for threads in (1, 2, 5, 64):
        monkeypatch.setattr(numba, "get_num_threads", lambda threads=threads: threads)
        y = blank(dy.shape, np.float32)
        conv.run_forward(y, x, w, b, None, None, ONE, padding, ONE, 1)
        results.append(y)
    for y in results[1:]:
        np.testing.assert_array_equal(y, results[0])


def test_nchw_with_weights_for_several_tasks():
    rng = np.random.default_rng(0)
    x, w = (rng.standard_normal(shape).astype(np.float32) for shape in ((2, 64, 16, 16), (1100, 64, 3, 3)))
    y, want = blank((2, 1100, 16, 16), np.float32), blank((2, 1100, 16, 16), np.float32)
    assert 16 * w[..., 0, 0].size > winograd_nchw.PANEL_ELEMENTS
    winograd_nchw.conv2d_forward_winograd_nchw(y, x, w, w[0, 0, 0, :0], None, None, ONE)
    conv.conv2d_forward_mec(want, x, w, w[0, 0, 0, :0], None, None, ONE, ONE, ONE, 1)
    np.testing.assert_allclose(y, want, rtol=0, atol=1e-3)


def test_same_bits_for_any_number_of_threads(monkeypatch):
    x, w, b, dy, padding = arrays(((35, 18, 9, 8), (20, 18, 3, 3), (1, 1), True, 4), np.float32)
    L, results = lanes(np.float32), []
    for threads in (1, 2, 5):
        monkeypatch.setattr(numba, "get_num_threads", lambda threads=threads: threads)
        y = to_blocked(blank(dy.shape, np.float32), L)
        conv.run_forward(y, to_blocked(x, L), w, b, None, None, ONE, padding, ONE, 1)
        results.append(y)
    for y in results[1:]:
        np.testing.assert_array_equal(y, results[0])


@both_dtypes
def test_a_nan_stays_in_its_image(dtype):
    x, w, b, dy, padding = arrays(((19, 16, 6, 7), (17, 16, 3, 3), (1, 1), True, 5), dtype)
    x[4, 3, 2, 2] = np.nan
    y = to_blocked(blank(dy.shape, dtype), lanes(dtype))
    conv.run_forward(y, to_blocked(x, lanes(dtype)), w, b, None, None, ONE, padding, ONE, 1)
    got, want = np.isnan(to_nchw(y, 19)), np.isnan(reference.conv2d(x, w, b, ONE, padding))
    assert got[want].all()
    assert not np.delete(got, 4, 0).any()


@both_dtypes
@pytest.mark.parametrize("magnitude", [1e-6, 1, 1e6])
def test_rounding_errors(magnitude, dtype):
    """Of float32, at most four times those of the direct algorithm; of float64, small."""
    x, w, b, dy, padding = arrays(((16, 40, 12, 12), (32, 40, 3, 3), (1, 1), False, 6), dtype)
    x, L, results = x * dtype(magnitude), lanes(dtype), []
    for forward in (conv.run_forward, direct_conv.conv2d_forward_direct):
        y = to_blocked(blank(dy.shape, dtype), L)
        forward(y, to_blocked(x, L), w, b, None, None, ONE, padding, ONE, 1)
        results.append(np.abs(to_nchw(y, 16) - reference.conv2d(x, w, b, ONE, padding)).max())
    if dtype == np.float32:
        assert results[0] <= 4 * results[1]
    assert results[0] <= 1e3 * np.finfo(dtype).eps * magnitude
