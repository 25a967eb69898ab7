"""Matrix multiplication in tiles: convolutions and fully connected layers spend their time here.

    out[m, n] = sum over k of A[k, m] * B[k, n]

A block of 128 threads computes a tile of 16 rows and 64 columns.  It moves along k in steps of 32.  In each step all
threads load a tile of A and a tile of B into shared memory, synchronise, and multiply the tiles.  The loading phase
defines the matrices, so a matrix need not exist in memory (see conv.py).  Warp w owns rows 4w ... 4w + 3, lane l
columns l and l + 32: eight accumulators in registers, A's entries broadcast to the warp, no bank conflicts on B.

Split-K: where there are few tiles, a long sum over k is cut into splits of fixed length, one per block.  The last block
of a tile adds the partial sums in order.  So small batches fill the GPU too, and the rounding depends only on the
shapes.
"""

import numpy as np

from tinycnn.cuda._launch import THREADS, U32, cuda, device_function, phase, workspace
from tinycnn.cuda.activations import NONE, gradient_in_place, value_in_place
from tinycnn.cuda.reduce import is_last_block

TILE_M, TILE_N, TILE_K = 16, 64, 32
PITCH_A, PITCH_B = 20, 65  # between rows in shared memory: A keeps groups of 4 aligned, B avoids bank conflicts
SIZE_A, SIZE_B = TILE_K * PITCH_A, TILE_K * PITCH_B
ACCUMULATORS = 8  # of a thread
UNROLL = 4  # steps along k that are unrolled, with constant indices
WARPS = THREADS // 32


@phase
def clear_accumulators(tid, nt, acc):
    for i in range(ACCUMULATORS):
        acc[i] = 0


@phase
def multiply_accumulate(tid, nt, acc, a_tile, b_tile):
    """acc[2r + s] += sum over k of A[k, row + r] * B[k, column + 32 s].  a_tile: (32, 16) b_tile: (32, 64), pitched."""
    for k0 in range(0, TILE_K, UNROLL):
        a, b = a_tile[k0 * PITCH_A + tid // 32 * 4 :], b_tile[k0 * PITCH_B + tid % 32 :]
        for k in range(UNROLL):
            b0, b1 = b[k * PITCH_B], b[k * PITCH_B + 32]
            for r in range(4):
                w = a[k * PITCH_A + r]
                acc[2 * r] += w * b0
                acc[2 * r + 1] += w * b1


@phase
def store_tile(tid, nt, acc, out, row_sums, bias, with_sums, with_bias, code, a, b, m0, m1, n0, N):
    """Store rows m0 ... m1 - 1 of out: (M, N), with bias[n] added if `with_bias`, and the activation `code` applied.
    Column N of the product goes to row_sums: (M,) if `with_sums`."""
    for s in range(2):
        n = n0 + tid % 32 + 32 * s
        for r in range(4):
            m = m0 + tid // 32 * 4 + r
            if m < m1:
                if n < N:
                    total = acc[2 * r + s] + bias[n] if with_bias else acc[2 * r + s]
                    out[m * N + n] = value_in_place(code, total, a, b)
                elif n == N and with_sums:
                    row_sums[m] = acc[2 * r + s]


# --- split-K ----------------------------------------------------------------------------------------------------------

BLOCKS = 512  # no more splits than give so many blocks: about four for each multiprocessor of an H100
GROUP = 16  # splits that one block adds; then another block adds the sums of the groups


@phase
def save_part(tid, nt, acc, parts, part):
    """Each thread saves its accumulators.  parts: (number of parts, ACCUMULATORS, THREADS), flat"""
    own = parts[U32(part * ACCUMULATORS * THREADS + tid) :]
    for i in range(ACCUMULATORS):
        own[i * THREADS] = acc[i]


@phase
def add_parts(tid, nt, acc, parts, first, count, step):
    """acc = the sum of the parts first, first + step, ..., in this order."""
    for i in range(ACCUMULATORS):
        acc[i] = 0
    for k in range(count):
        own = parts[U32((first + k * step) * ACCUMULATORS * THREADS + tid) :]
        for i in range(ACCUMULATORS):
            acc[i] += own[i * THREADS]


@device_function
def add_splits(tid, acc, parts, counters, flag, tile, split, splits, pitch):
    """Whether this block has the sum of all splits of its tile in acc: only one block has.

    parts, counters, pitch: see `split_workspace`   flag: (1,) uint32, shared
    """
    if splits == 1:
        return True
    groups, group = (splits + GROUP - 1) // GROUP, split // GROUP
    first, own_counters = tile * pitch, tile * (pitch + 1)
    count = min(GROUP, splits - group * GROUP)
    save_part(tid, THREADS, acc, parts, first + split)
    if not is_last_block(tid, counters, own_counters + 1 + group, count, flag):
        return False
    add_parts(tid, THREADS, acc, parts, first + group * GROUP, count, 1)
    if groups == 1:
        return True
    save_part(tid, THREADS, acc, parts, first + group * GROUP)
    if not is_last_block(tid, counters, own_counters, groups, flag):
        return False
    add_parts(tid, THREADS, acc, parts, first, groups, GROUP)
    return True


def split_k(K, tiles, min_length):
    """(length, number) of the splits of a sum over K, for each of `tiles` tiles; the length is a multiple of TILE_K."""
    length = max(min_length, -(-K // max(1, BLOCKS // max(1, tiles))))
    length = -(-length // TILE_K) * TILE_K
    return length, -(-K // length)


def split_workspace(tiles, splits, dtype):
    """(parts, counters, pitch) for `add_splits`, for at most `splits` splits of `tiles` tiles."""
    parts, counters = (tiles * splits * ACCUMULATORS * THREADS, tiles * (splits + 1)) if splits > 1 else (1, 1)
    return workspace(parts, dtype, "parts"), workspace(counters, np.uint32, "counters"), splits


# --- two matrices in memory -------------------------------------------------------------------------------------------


@phase
def load_a(tid, nt, a_tile, a, y, code, c, d, k0, k1, m0, M, stride_k, stride_m):
    """a_tile[k, m] = a[(k0 + k)*stride_k + (m0 + m)*stride_m], zero outside.  Neighbouring threads read neighbouring
    entries.  With an activation, a is the gradient of its output y, and a_tile that of its input."""
    along_k = stride_k == 1
    k, m = (tid % TILE_K, tid // TILE_K) if along_k else (tid // TILE_M, tid % TILE_M)
    step_k, step_m = (0, WARPS) if along_k else (THREADS // TILE_M, 0)
    for _ in range(TILE_K * TILE_M // THREADS):
        inside = U32(k0 + k) < U32(k1) and U32(m0 + m) < U32(M)
        index = U32((k0 + k) * stride_k + (m0 + m) * stride_m) if inside else U32(0)
        value = a[index]
        if code != NONE:
            value = gradient_in_place(code, value, y[index], c, d)
        a_tile[U32(k * PITCH_A + m)] = value if inside else a.dtype.type(0)
        k, m = k + step_k, m + step_m


@phase
def load_b(tid, nt, b_tile, b, k0, k1, n0, N, stride_k, stride_n):
    """b_tile[k, n] = b[(k0 + k)*stride_k + (n0 + n)*stride_n], ones in column N, zero beyond."""
    along_k = stride_k == 1
    k, n = (tid % TILE_K, tid // TILE_K) if along_k else (tid // TILE_N, tid % TILE_N)
    step_k, step_n = (0, WARPS) if along_k else (THREADS // TILE_N, 0)
    for _ in range(TILE_K * TILE_N // THREADS):
        inside = U32(k0 + k) < U32(k1) and U32(n0 + n) < U32(N)
        value = b[U32((k0 + k) * stride_k + (n0 + n) * stride_n)] if inside else b.dtype.type(n0 + n == N)
        b_tile[U32(k * PITCH_B + n)] = value
        k, n = k + step_k, n + step_n


@device_function
def multiply_tiles(
    tid, acc, a_tile, b_tile, a, y, code, c, d, b, k0, k1, m0, M, n0, N, stride_ak, stride_am, stride_bk, stride_bn
):  # fmt: skip
    """acc = the tile of the product over k0 ... k1 - 1."""
    clear_accumulators(tid, THREADS, acc)
    for k in range(k0, k1, TILE_K):
        load_a(tid, THREADS, a_tile, a, y, code, c, d, k, k1, m0, M, stride_ak, stride_am)
        load_b(tid, THREADS, b_tile, b, k, k1, n0, N, stride_bk, stride_bn)
        cuda.syncthreads()
        multiply_accumulate(tid, THREADS, acc, a_tile, b_tile)
        cuda.syncthreads()
