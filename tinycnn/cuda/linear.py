"""Fully connected layer: y[n, o] = b[o] + sum_f x[n, f] * w[o, f].  GPU version of tinycnn/kernels/linear.py.

x: (N, F)   w: (O, F)   b: (O,) or (0,) for none   y: (N, O)

`run_forward` and `run_backward` take an activation of y too, for fused.py.
"""

import numpy as np

from tinycnn.cuda._launch import ALIGN, THREADS, cuda, divmod32, kernel, ravel
from tinycnn.cuda.activations import NO_ACTIVATION, NONE, gradient_arguments, value_arguments
from tinycnn.cuda.gemm import (
    ACCUMULATORS,
    SIZE_A,
    SIZE_B,
    TILE_M,
    TILE_N,
    add_splits,
    multiply_tiles,
    split_k,
    split_workspace,
    store_tile,
)

MIN_LENGTH = 128  # of a split


@kernel(THREADS, registers=168)
def linear_forward_kernel(y, x, w, bias, with_bias, code, a, b, N, O, F, length, splits, parts, counters, pitch):
    """Block (x, y, z): outputs 64 x ..., images 16 y ..., split z of the sum over F, `length` long."""
    a_tile = cuda.shared.array(SIZE_A, x.dtype, alignment=ALIGN)
    b_tile = cuda.shared.array(SIZE_B, x.dtype, alignment=ALIGN)
    flag, acc = cuda.shared.array(1, np.uint32), cuda.local.array(ACCUMULATORS, x.dtype)
    tid, split = cuda.threadIdx.x, cuda.blockIdx.z
    n0, m0 = cuda.blockIdx.x * TILE_N, cuda.blockIdx.y * TILE_M
    multiply_tiles(
        tid, acc, a_tile, b_tile, x, x, NONE, a, b, w, split * length, min(F, (split + 1) * length), m0, N, n0, O,
        1, F, 1, F,
    )  # fmt: skip
    tile = cuda.blockIdx.y * cuda.gridDim.x + cuda.blockIdx.x
    if add_splits(tid, acc, parts, counters, flag, tile, split, splits, pitch):
        store_tile(tid, THREADS, acc, y, y, bias, False, with_bias, code, a, b, m0, N, n0, O)


@kernel(THREADS, registers=168)
def linear_backward_kernel(
    dx, dw, db, dy, x, w, y, code, c, d, with_sums, N, O, F, columns, w_tiles, w_length, w_splits, x_slot, x_length,
    x_splits, parts, counters, pitch,
):  # fmt: skip
    """Two products: dw = dy^T x, with db as another column, and dx = dy w.  The blocks of dw come first."""
    a_tile = cuda.shared.array(SIZE_A, dy.dtype, alignment=ALIGN)
    b_tile = cuda.shared.array(SIZE_B, dy.dtype, alignment=ALIGN)
    flag, acc = cuda.shared.array(1, np.uint32), cuda.local.array(ACCUMULATORS, dy.dtype)
    tid, block = cuda.threadIdx.x, cuda.blockIdx.x
    of_weights = block < w_tiles * w_splits
    out, b = (dw, x) if of_weights else (dx, w)
    M, K, stride_k, stride_m = (O, N, O, 1) if of_weights else (N, O, 1, O)
    length, splits, slot = (w_length, w_splits, 0) if of_weights else (x_length, x_splits, x_slot)
    tile, split = divmod32(block if of_weights else block - w_tiles * w_splits, splits)
    row, column = divmod32(tile, columns[0] if of_weights else columns[1])
    n0, m0 = column * TILE_N, row * TILE_M
    multiply_tiles(
        tid, acc, a_tile, b_tile, dy, y, code, c, d, b, split * length, min(K, (split + 1) * length), m0, M, n0, F,
        stride_k, stride_m, F, 1,
    )  # fmt: skip
    if add_splits(tid, acc, parts, counters, flag, slot + tile, split, splits, pitch):
        store_tile(tid, THREADS, acc, out, db, db, with_sums and of_weights, False, NONE, c, d, m0, M, n0, F)


def run_forward(y, x, w, b, activation):
    """y = f(x w^T + b) with an activation that works in place."""
    (N, F), O = x.shape, len(w)
    columns, rows = -(-O // TILE_N), -(-N // TILE_M)
    length, splits = split_k(F, columns * rows, MIN_LENGTH)
    linear_forward_kernel[(columns, rows, splits)](
        ravel(y), ravel(x), ravel(w), b if b.size else ravel(w), b.size > 0, *value_arguments(activation, x.dtype),
        N, O, F, length, splits, *split_workspace(columns * rows, splits, x.dtype),
    )  # fmt: skip


def linear_forward(y, x, w, b):
    run_forward(y, x, w, b, NO_ACTIVATION)


def run_backward(dx, dw, db, dy, x, w, y, activation):
    """Gradients of all three arguments of `run_forward` in one launch; those of size 0 are not computed.  db needs dw.
    y: the output of `run_forward`"""
    (N, F), O, with_sums = x.shape, len(w), db.size > 0
    columns = -(-(F + with_sums) // TILE_N), -(-F // TILE_N)
    w_tiles = columns[0] * -(-O // TILE_M) if dw.size else 0
    x_tiles = columns[1] * -(-N // TILE_M) if dx.size else 0
    (w_length, w_splits), (x_length, x_splits) = (
        split_k(K, tiles, MIN_LENGTH) for K, tiles in ((N, w_tiles), (O, x_tiles))
    )
    x_slot = w_tiles if w_splits > 1 else 0  # only tiles that are split need room
    slots = x_slot + (x_tiles if x_splits > 1 else 0)
    linear_backward_kernel[w_tiles * w_splits + x_tiles * x_splits](
        ravel(dx), ravel(dw), db if with_sums else ravel(dw), ravel(dy), ravel(x), ravel(w), ravel(y),
        *gradient_arguments(activation, x.dtype), with_sums, N, O, F, columns, w_tiles, w_length, w_splits, x_slot,
        x_length, x_splits, *split_workspace(slots, max(w_splits, x_splits), x.dtype),
    )  # fmt: skip


def linear_backward(dx, dw, db, dy, x, w):
    """Gradients of all three arguments of `linear_forward`; those of size 0 are not computed.  db needs dw."""
    run_backward(dx, dw, db, dy, x, w, dy, NO_ACTIVATION)
