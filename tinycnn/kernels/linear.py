"""Fully connected layer: y[n, o] = b[o] + sum_f x[n, f] * w[o, f].

x: (N, F)   w: (O, F)   b: (O,) or (0,) for none   y: (N, O)

All three products are written with the two loops of rows.py; which rows play which part is said at each.
"""

import numpy as np
from numba import prange

from tinycnn.kernels._jit import inner, kernel
from tinycnn.kernels.rows import DOTS, PITCH, SUMS, TAPS, ceil_to, combine, combine_one, correlate

BLOCK = 24  # images a block: with 400 features they fit the first-level cache, and each weight is loaded once for all


@inner
def row_offsets(rows, length):
    """Where each row of a (rows, length) array starts; filled up with row 0 to a multiple of TAPS."""
    offset = np.zeros(ceil_to(rows, TAPS), np.int64)
    for r in range(rows):
        offset[r] = r * length
    return offset


@inner
def combine_rows(out, first, src, length, offset, weight):
    """out[first + r, :] = sum_t weight[r, t] * (row of src at offset[t]), for as many of the SUMS rows as `out` has."""
    count = min(SUMS, out.shape[0] - first)
    if count == 1 or offset.size < TAPS:  # all SUMS and TAPS would be zeros for the most part: single images
        for i in range(count):
            row, got, factor = out[first + i], src[offset[0] :], weight[i, 0]
            for j in range(length):
                row[j] = factor * got[j]
            combine_one(row, src, offset[1:], weight[i, 1:])
        return
    scratch = np.empty(SUMS * PITCH, out.dtype)
    for j0 in range(0, length, PITCH):
        m = min(PITCH, length - j0)
        for i in range(SUMS):
            row = scratch[i * PITCH :]
            for j in range(m):
                row[j] = 0
        combine(scratch, src, j0, offset, weight, 0, 0, offset.size, m)
        for i in range(count):
            to, got = out[first + i, j0:], scratch[i * PITCH :]
            for j in range(m):
                to[j] = got[j]


@inner
def forward_block(y, x, src, offset, b, first, count):
    """y of `count` images from `first` on: images against rows of w."""
    F, O = x.shape[1], y.shape[1]
    rows = np.zeros((ceil_to(count, DOTS), F), x.dtype)
    for n in range(count):
        to, row = rows[n], x[first + n]
        for f in range(F):
            to[f] = row[f]
    out = np.zeros((len(rows), offset.size), x.dtype)
    for t in range(0, offset.size, TAPS):
        for r in range(0, count, DOTS):
            correlate(out, src, offset, rows, 0, r, t, F)
    for n in range(count):
        for o in range(O):
            y[first + n, o] = out[n, o] + b[o] if b.size else out[n, o]


@kernel
def linear_forward(y, x, w, b):
    N, src, offset = len(x), w.reshape(w.size), row_offsets(len(w), x.shape[1])
    for block in prange((N + BLOCK - 1) // BLOCK):
        forward_block(y, x, src, offset, b, block * BLOCK, min(BLOCK, N - block * BLOCK))


@inner
def weight_block(dw, db, dy, src, offset, first):
    """dw[o] = sum_n dy[n, o] * x[n] and db[o] = sum_n dy[n, o] for SUMS outputs from `first` on."""
    weight = np.zeros((SUMS, offset.size), dy.dtype)
    for i in range(min(SUMS, len(dw) - first)):
        total = dy.dtype.type(0)
        for n in range(len(dy)):
            weight[i, n] = dy[n, first + i]
            total += dy[n, first + i]
        if db.size:
            db[first + i] = total
    taps = offset if len(dy) >= TAPS else offset[: len(dy)]
    combine_rows(dw, first, src, dw.shape[1], taps, weight)


@inner
def input_block(dx, dy, src, offset, first):
    """dx[n] = sum_o dy[n, o] * w[o] for SUMS images from `first` on."""
    weight = np.zeros((SUMS, offset.size), dy.dtype)
    for i in range(min(SUMS, len(dx) - first)):
        for o in range(dy.shape[1]):
            weight[i, o] = dy[first + i, o]
    combine_rows(dx, first, src, dx.shape[1], offset, weight)


@kernel
def linear_backward(dx, dw, db, dy, x, w):
    """Gradients of all three arguments of `linear_forward`; dx and db of size 0 are not computed."""
    (N, F), O = x.shape, len(w)
    src_x, src_w = x.reshape(x.size), w.reshape(w.size)
    offset_x, offset_w = row_offsets(N, F), row_offsets(O, F)
    blocks, images = (O + SUMS - 1) // SUMS, (N + SUMS - 1) // SUMS if dx.size else 0
    for block in prange(blocks + images):
        if block < blocks:
            weight_block(dw, db, dy, src_x, offset_x, block * SUMS)
        else:
            input_block(dx, dy, src_w, offset_w, (block - blocks) * SUMS)
