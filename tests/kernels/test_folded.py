"""Folded convolutions against their formula in float64."""

import math

import numba
import numpy as np
import pytest
import reference
from blocks import lanes, to_blocked, to_nchw
from reference import blank

from tinycnn.kernels import folded

both_dtypes = pytest.mark.parametrize("dtype", [np.float32, np.float64])
PROBLEMS = [  # x without images, w, (stride, padding, dilation, groups)
    ((3, 9, 8), (5, 3, 3, 3), ((1, 1), (1, 1), (1, 1), 1)),
    ((3, 3, 3), (7, 3, 3, 3), ((1, 1), (1, 1), (1, 1), 1)),  # smaller than a register block
    ((2, 3, 3), (1, 2, 2, 2), ((1, 1), (0, 0), (1, 1), 1)),
    ((4, 9, 11), (18, 2, 3, 3), ((2, 1), (1, 2), (1, 2), 2)),
    ((6, 5, 5), (6, 1, 3, 3), ((1, 2), (1, 0), (1, 1), 6)),
    ((5, 6, 7), (9, 5, 1, 1), ((1, 1), (0, 0), (1, 1), 1)),
    ((17, 5, 7), (19, 17, 3, 3), ((1, 1), (1, 0), (1, 1), 1)),
]


def case(problem, images, dtype, seed=0):
    x, w, options = problem
    rng = np.random.default_rng(seed)
    x, w = rng.standard_normal((images, *x)).astype(dtype), rng.standard_normal(w).astype(dtype)
    out = reference.conv_out(x, w, *options[:3])
    return x, w, rng.standard_normal((images, len(w), *out)).astype(dtype), options, rng


def run(x, w, table, residual, shape, options, blocked):
    L, y = lanes(x.dtype), blank(shape, x.dtype)
    if blocked:
        x, y = to_blocked(x, L), to_blocked(y, L)
        residual = None if residual is None else to_blocked(residual, L)
    folded.conv2d(y, x, w, table, residual, *options)
    return to_nchw(y, shape[0]) if blocked else y


@both_dtypes
@pytest.mark.parametrize("blocked", [False, True])
@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("problem", PROBLEMS)
def test_formula(problem, with_residual, blocked, dtype):
    for images in (1, 3, 19):
        x, w, term, options, rng = case(problem, images, dtype)
        table = rng.standard_normal((4, len(w))).astype(dtype)
        for low, high in ((-math.inf, math.inf), (0, math.inf), (-0.5, 1.5)):
            table[2], table[3] = low, high
            y = run(x, w, table, term if with_residual else None, term.shape, options, blocked)
            scale, shift = (row[:, None, None].astype(np.float64) for row in table[:2])
            want = reference.conv2d(x, w, table[0, :0], *options) * scale + shift + (term if with_residual else 0)
            tolerance = 1e-12 if dtype == np.float64 else 1e-4
            np.testing.assert_allclose(y, np.clip(want, low, high), rtol=0, atol=tolerance)


@both_dtypes
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_fold_batch_norm(bias, affine, norm, dtype):
    rng, empty = np.random.default_rng(1), np.zeros(0, dtype)
    b, weight, shift, mean = rng.standard_normal((4, 9)).astype(dtype)
    var, eps = rng.uniform(0.1, 3, 9).astype(dtype), 1e-3
    b, weight, shift = b if bias else empty, weight if affine else empty, shift if affine else empty
    table = blank((4, 9), dtype)
    table[2:] = 7
    folded.fold_batch_norm(table, b, *((weight, shift, mean, var, eps) if norm else (empty,) * 4 + (0.0,)))
    scale, offset = np.ones(9), b.astype(np.float64) if bias else np.zeros(9)
    if norm:
        scale = (weight.astype(np.float64) if affine else 1) / np.sqrt(var.astype(np.float64) + eps)
        offset = (offset - mean) * scale + (shift if affine else 0)
    tolerance = 1e-14 if dtype == np.float64 else 1e-6
    np.testing.assert_allclose(table[0], scale, rtol=tolerance)
    np.testing.assert_allclose(table[1], offset, rtol=0, atol=20 * tolerance)
    np.testing.assert_array_equal(table[2:], 7)


@both_dtypes
@pytest.mark.parametrize("blocked", [False, True])
@pytest.mark.parametrize("source", ["x", "residual"])
def test_nan_passes_the_clamp(source, blocked, dtype):
    x, w, term, options, _ = case(PROBLEMS[0], 19, dtype)
    (x if source == "x" else term)[7, 1, 4, 4] = np.nan
    table = np.repeat(np.array([1, 0, 0, 6], dtype)[:, None], len(w), 1)
    y = run(x, w, table, term, term.shape, options, blocked)
    want = np.isnan(reference.conv2d(x, w, table[0, :0], *options) + term)
    assert want.any()
    np.testing.assert_array_equal(np.isnan(y), want)


@pytest.mark.parametrize("blocked", [False, True])
@pytest.mark.parametrize("problem", PROBLEMS)
def test_same_bits_for_any_number_of_threads(monkeypatch, problem, blocked):
    x, w, term, options, rng = case(problem, 19, np.float32)
    table, results = rng.standard_normal((4, len(w))).astype(np.float32), []
    table[2], table[3] = -0.5, 1.5
    for threads in (1, 2, 5, 64):
        monkeypatch.setattr(numba, "get_num_threads", lambda threads=threads: threads)
        results.append(run(x, w, table, term, term.shape, options, blocked))
    for y in results[1:]:
        np.testing.assert_array_equal(y, results[0])
