"""Fully connected layer, forward and backward: y[n, o] = b[o] + sum_f x[n, f] * w[o, f].

x: (N, F)   w: (O, F)   b: (O,) or (0,) for none   y: (N, O)

All three products are C = A @ B, with C: (M, J), A: (M, K), B: (K, J).  A strip of NR columns of B is packed first, to
be read front to back.  Then, for MR rows of A at a time, an MR x NR block of C stays in registers for all k.

    C (M, J)    A (M, K)       B (K, J)       a strip of B is packed by
    y  (N, O)   x    (N, F)    w.T (F, O)     pack_b_columns: a transposition
    dx (N, F)   dy   (N, O)    w   (O, F)     pack_b_rows: a copy
    dw (O, F)   dy.T (O, N)    x   (N, F)     pack_b_rows

                                     NR = 2W columns, W lanes per register
                                       ┌─────┬─────┐
                                       │     │     │ k = 0
                                       ├─────┼─────┤
                                       │  v  │  v  │ k         strip of B, packed: (K, NR)
                                       ├─────┼─────┤           per k: two loads
                                       │     │     │ K - 1
                 A (M, K)              └──▼──┴──▼──┘
             ┌─────┬───┬─────┐         ┌─────┬─────┐
           i │     │ a ├─────┼────────►│ acc │ acc │ i         block of C: (MR, NR), in registers,
             │     │ a ├─────┼────────►│ acc │ acc │           starts as the bias, stored at the end
             │     │ : │     │         │  :  │  :  │
      i+MR-1 │     │ a ├─────┼────────►│ acc │ acc │ i+MR-1    MR = 8 with AVX-512 (32 registers),
             └─────┴───┴─────┘         └─────┴─────┘           else 6 (16 registers)
                     k: broadcast       j .. j+NR-1

    for j in strips of NR columns       a task each, or several if there are many threads; packs its strip of B
      for i in blocks of MR rows        the strip stays in L1 or L2: K x 16 floats with AVX2
        for k in 0 .. K-1               2*MR multiply-adds for two loads and MR broadcasts

Nothing is blocked along k or i: the matrices of small nets fit in the L2 cache.  The last strip and the last block
overlap those before them, instead of being shorter.
"""

import numpy as np
from numba import prange

from tinycnn.kernels import _simd
from tinycnn.kernels._jit import device_function, kernel
from tinycnn.kernels.microkernel import divide, part, round_up

BYTES, ravel, width, transpose, zeros = _simd.BYTES, _simd.ravel, _simd.width, _simd.transpose, _simd.zeros
load_strided, store_block, fma_broadcast = _simd.load_strided, _simd.store_block, _simd.fma_broadcast
fma_outer, reduce_add = _simd.fma_outer, _simd.reduce_add

MR = 8 if BYTES == 64 else 6  # rows of a register block, each NR_VECTORS = 2 vectors long
GEMV_MR = 10  # outputs of `gemv` at a time
ACCUMULATORS = 2 * MR

gemm_accumulators = device_function(lambda x: zeros(x, ACCUMULATORS))
gemv_accumulators = device_function(lambda x: zeros(x, GEMV_MR))


@device_function
def pad_to(array, rows, columns):
    """`array`, (R, C), padded with zeros to at least `rows` rows and `columns` columns."""
    if len(array) >= rows and array.shape[1] >= columns:
        return array
    padded = np.zeros((max(rows, len(array)), max(columns, array.shape[1])), array.dtype)
    copy_into(padded, array, array.shape[1])
    return padded


@device_function
def copy_into(dst, src, columns):
    """dst[i, j] = src[i, j] for j < columns.  (Slice assignment would compile seconds longer.)"""
    for i in range(min(len(dst), len(src))):
        for j in range(columns):
            dst[i, j] = src[i, j]


@device_function
def gemv(y, x, w, b, blocks):
    """y = w @ x + b for one image, as dot products with vectors along F.

    y: (O,)   x: (F,)   w: (>= O, F), at least GEMV_MR rows   blocks: of GEMV_MR outputs, (first, end)
    """
    O, F, W = y.size, x.size, width(x)
    vector_end, flat, zero, single = F // W * W, ravel(w), gemv_accumulators(x), zeros(x, 1)
    totals = np.empty(round_up(GEMV_MR, W), x.dtype)
    for first in range(blocks[0] * GEMV_MR, blocks[1] * GEMV_MR, GEMV_MR):
        o, acc = max(0, min(first, O - GEMV_MR)), zero  # the last block overlaps the one before it
        for f in range(0, vector_end, W):
            acc = fma_outer(acc, load_strided(x, f, F, single), load_strided(flat, o * F + f, F, zero))
        for k in range(totals.size):
            totals[k] = 0
        reduce_add(totals, 0, acc)
        for k in range(min(GEMV_MR, O)):
            total = totals[k] + (b[o + k] if b.size else x.dtype.type(0))
            for f in range(vector_end, F):
                total += x[f] * w[o + k, f]
            y[o + k] = total


@device_function
def pack_b_rows(b, count, K, j):
    """Columns j ... j + 2W of B, packed: (K, 2W), contiguous (each row of B is on another page).  b: (K, count)"""
    W, pair = width(b), zeros(b, 2)
    strip = np.empty(K * 2 * W, b.dtype)
    for k in range(K):
        store_block(strip, k * 2 * W, 0, W, load_strided(b, k * count + j, W, pair), 1)
    return strip


@device_function
def pack_b_columns(b, K, j):
    """`pack_b_rows` of a transposed B: rows j ... j + 2W of b.  b: (count, K), K >= W"""
    W = width(b)
    strip = np.empty(K * 2 * W, b.dtype)
    for first in range(0, K, W):
        k = min(first, K - W)  # the last W x W square overlaps the one before it
        for half in range(2):
            transpose(strip, k * 2 * W + half * W, 2 * W, b, (j + half * W) * K + k, K)
    return strip


@device_function
def gemm_strip(out, first, last, count, a, row_step, k_step, strip, j, bias):
    """out[i, j + l] = bias[j + l] + sum over k of a[i*row_step + k*k_step] * strip[k, l], first <= i < last, l < 2W.

    out: flat, (M, count)   strip: packed columns of B   bias: see `pack_bias`
    """
    W, pair = width(out), zeros(out, 2)
    bias_row, K = load_strided(bias, 1 + j, W, pair), strip.size // (2 * W)
    if last - first < MR:
        for i in range(first, last):
            row = bias_row
            for k in range(K):
                row = fma_broadcast(row, a, i * row_step + k * k_step, 0, load_strided(strip, k * 2 * W, W, pair))
            store_block(out, i * count + j, 0, W, row, 1)
        return
    bias_block = fma_broadcast(gemm_accumulators(out), bias, 0, 0, bias_row)  # every row is 0 + 1 * bias
    for block in range(first, last, MR):
        i, acc = min(block, last - MR), bias_block  # the last block overlaps the one before it
        for k in range(K):
            acc = fma_broadcast(acc, a, i * row_step + k * k_step, row_step, load_strided(strip, k * 2 * W, W, pair))
        store_block(out, i * count + j, count, W, acc, MR)


@device_function
def pack_bias(b, count):
    """(1 + count,): a one, which `gemm_strip` multiplies by, then b, (O,) or (0,), padded with zeros."""
    packed = np.zeros(1 + count, b.dtype)
    packed[0] = 1
    for o in range(b.size):
        packed[1 + o] = b[o]
    return packed


@device_function
def divide_rows(threads, strips, rows):
    """The number of parts of all rows, of at least two blocks each, that gives every thread a task."""
    return max(1, min(divide(threads, strips), rows // (2 * MR)))


@kernel
def linear_forward(y, x, w, b, threads):
    """y = x @ w.T + b."""
    (N, O), W = y.shape, width(x)
    if N < MR:
        rows, blocks = pad_to(w, GEMV_MR, 0), divide(O, GEMV_MR)
        tasks = min(threads, blocks)
        for task in prange(tasks):
            for n in range(N):
                gemv(y[n], x[n], rows, b, part(task, tasks, blocks))
        return
    count, narrow = max(O, 2 * W), O < 2 * W
    x, w, bias = pad_to(x, 0, W), pad_to(w, count, W), pack_bias(b, count)
    out = np.empty((N, count), x.dtype) if narrow else y
    F, flat_out, flat_x, flat_w = x.shape[1], ravel(out), ravel(x), ravel(w)
    strips = divide(count, 2 * W)
    parts = divide_rows(threads, strips, N)
    for task in prange(strips * parts):
        j, (first, last) = min(task // parts * 2 * W, count - 2 * W), part(task % parts, parts, N)
        gemm_strip(flat_out, first, last, count, flat_x, F, 1, pack_b_columns(flat_w, F, j), j, bias)
    if narrow:
        copy_into(y, out, O)


@kernel
def linear_backward(dx, dw, db, dy, x, w, threads):
    """Gradients of all three arguments of `linear_forward`; those of size 0 are not computed."""
    (N, O), F, W = dy.shape, max(x.shape[1], 2 * width(x)), width(x)
    narrow = x.shape[1] < F
    rows, weights = pad_to(x, 0, F), pad_to(w, 0, F)
    padded_dx = np.empty((N if dx.size else 0, F), x.dtype) if narrow else dx
    padded_dw = np.empty((O if dw.size else 0, F), x.dtype) if narrow else dw
    flat_dy, flat_x, flat_w = ravel(dy), ravel(rows), ravel(weights)
    flat_dx, flat_dw = ravel(padded_dx), ravel(padded_dw)
    strips, bias = divide(F, 2 * W), pack_bias(db[:0], F)
    dw_parts = divide_rows(threads, 2 * strips, O) if dw.size else 0
    dx_parts = divide_rows(threads, 2 * strips, N) if dx.size else 0
    for task in prange(strips * (dw_parts + dx_parts)):
        strip, k = task % strips, task // strips
        j = min(strip * 2 * W, F - 2 * W)
        if k < dw_parts:
            first, last = part(k, dw_parts, O)
            gemm_strip(flat_dw, first, last, F, flat_dy, 1, O, pack_b_rows(flat_x, F, N, j), j, bias)
        else:
            first, last = part(k - dw_parts, dx_parts, N)
            gemm_strip(flat_dx, first, last, F, flat_dy, O, 1, pack_b_rows(flat_w, F, O, j), j, bias)
    if narrow:
        copy_into(dw, padded_dw, x.shape[1])
        copy_into(dx, padded_dx, x.shape[1])
    for o in range(db.size):
        db[o] = 0
    for n in range(N):
        for o in range(db.size):
            db[o] += dy[n, o]
