"""Winograd's algorithm F(2 x 2, 3 x 3): convolution of batch blocks (B, C, H, W, L), 3 x 3 kernels, stride one.

winograd_nchw.py is the same for a few images in NCHW.

A tile of 2 x 2 outputs depends on 4 x 4 inputs.  With the matrices of Lavin and Gray (2016),

    y = A^T (sum over channels c of (G g_c G^T) * (B^T d_c B)) A        * element by element

takes 16 multiplications for each pair of channels; the definition takes 36.  The three transforms are additions, but
for halves in G.  A pixel is a vector of L images, so they are sums of vectors, and the sums over channels are 16 matrix
products, of the micro-kernel of microkernel.py:

    for strips of tiles                        a band of tile rows is a task; V of a strip stays in the L2 cache
      V[pair of tiles, k, c] = B^T d B         16 pixels in, 16 vectors out
      for o in blocks of MR output channels
        for pairs of tiles
          for k of 16                          M[k] = sum over c of U[o, k, c] * V[pair, k, c]: MR x 2 vectors
          y = A^T M A                          and the epilogue, see folded.py

The input gradient is such a convolution too, of dy with the flipped kernel.  The weight gradient is the transpose of
these transforms, with the same number of multiplications:

    dg = G^T (sum over images and tiles of (A dy A^T) * (B^T d B)) G

Its sums over lanes are those of matrix products, too: V is transposed, so that its vectors hold channels.

Rounding errors are about twice those of the definition, relative to the largest pixel of a tile.  A NaN or an infinity
reaches all four outputs of a tile.
"""

import numpy as np
from numba import prange

from tinycnn.kernels import _simd
from tinycnn.kernels._jit import device_function, force_inline, inline_ir, kernel
from tinycnn.kernels.direct_conv import BANDS, CHUNKS, add_bias_grad, conv2d_backward_direct, empty_aligned, odd
from tinycnn.kernels.microkernel import (
    MR_NARROW,
    MR_WIDE,
    by_group,
    choose_mr,
    divide,
    flat_items,
    microkernel,
    narrow_accumulators,
    part,
    round_up,
    store_result,
    tap_offsets,
    wide_accumulators,
)

LEAST_CHANNELS = 16  # of input and output: with fewer, the transforms take longer than the multiplications they save
LEAST_GRAD_CHANNELS = 2 * _simd.BYTES // 4  # of the input of a weight gradient: lanes of a register block's two vectors
GRAD_TILES = 8  # of a strip of the weight gradient
LEAST_TILES = 4 * _simd.BYTES // 4  # of a batch in NCHW: with fewer, the weights' transform takes too long
STRIP_ELEMENTS = 2**15  # of V, at most, if a strip is more than a pair of tiles

fma, load, pixel_zero, ravel, splat, store, zeros = (
    _simd.fma, _simd.load, _simd.pixel_zero, _simd.ravel, _simd.splat, _simd.store, _simd.zeros
)  # fmt: skip
load_strided, store_block, store_contiguous, transpose, width = (
    _simd.load_strided, _simd.store_block, _simd.store_contiguous, _simd.transpose, _simd.width
)  # fmt: skip


def applies(y, x, w, stride, dilation, groups):
    """Whether the arguments of a convolution are a case for this file or, in NCHW, for winograd_nchw.py."""
    few = min(x.shape[1], y.shape[1]) < LEAST_CHANNELS
    if x.ndim == 4:
        tiles = (y.shape[2] + 1) // 2 * ((y.shape[3] + 1) // 2)
        few |= len(x) * tiles < LEAST_TILES or y.shape[3] % (_simd.BYTES // y.itemsize) > 0
    return w.shape[2:] == (3, 3) and stride == dilation == (1, 1) and groups == 1 and not few


@force_inline
def input_line(a, b, c, d, one, minus):
    """A line of B^T d."""
    return fma(minus, c, a), fma(one, c, b), fma(minus, b, c), fma(minus, d, b)


@force_inline
def output_line(a, b, c, d, one, minus):
    """A line of A^T m."""
    return fma(one, a, fma(one, b, c)), fma(minus, d, fma(minus, c, b))


@force_inline
def input_column(array, i, row, u, v, zero, one, minus):
    """B^T d of a column of a tile, of pixels i, i + row, ...; of zeros where u, for each of them, or v is false."""
    return input_line(
        load(array, i, zero) if u[0] and v else zero, load(array, i + row, zero) if u[1] and v else zero,
        load(array, i + 2 * row, zero) if u[2] and v else zero, load(array, i + 3 * row, zero) if u[3] and v else zero,
        one, minus,
    )  # fmt: skip


@force_inline
def store_line(V, k, step, a, b, c, d, one, minus):
    p, q, r, s = input_line(a, b, c, d, one, minus)
    store(V, k, p)
    store(V, k + step, q)
    store(V, k + 2 * step, r)
    store(V, k + 3 * step, s)


@force_inline
def store_tile(V, k, step, a, b, c, d, one, minus):
    """V[k], V[k + step], ... = the product of columns a, b, c, d of B^T d and B."""
    store_line(V, k, step, a[0], b[0], c[0], d[0], one, minus)
    store_line(V, k + 4 * step, step, a[1], b[1], c[1], d[1], one, minus)
    store_line(V, k + 8 * step, step, a[2], b[2], c[2], d[2], one, minus)
    store_line(V, k + 12 * step, step, a[3], b[3], c[3], d[3], one, minus)


@force_inline
def transform_channel(V, k, step, array, i, row, L, u, v, zero, one, minus):
    """V[k], V[k + step], ... = B^T d B of one channel of a tile.   u, v: whether its rows and columns are inside"""
    a = input_column(array, i, row, u, v[0], zero, one, minus)
    b = input_column(array, i + L, row, u, v[1], zero, one, minus)
    c = input_column(array, i + 2 * L, row, u, v[2], zero, one, minus)
    d = input_column(array, i + 3 * L, row, u, v[3], zero, one, minus)
    store_tile(V, k, step, a, b, c, d, one, minus)


@force_inline
def inside(first, size):
    """Whether first, first + 1, ... are indices of an axis of this size, four of them."""
    return 0 <= first < size, 0 <= first + 1 < size, 0 <= first + 2 < size, 0 <= first + 3 < size


@force_inline
def weight_line(a, b, c, half, one, minus, zero):
    """A line of G g."""
    sum_ac = fma(one, c, a)
    return a, fma(half, fma(one, b, sum_ac), zero), fma(half, fma(minus, b, sum_ac), zero), c


@force_inline
def column_of_weights(g, k, row, half, one, minus, zero):
    """G g of a column of a kernel, of vectors k, k + row, ..."""
    a, b, c = load(g, k, zero), load(g, k + row, zero), load(g, k + 2 * row, zero)
    return weight_line(a, b, c, half, one, minus, zero)


@force_inline
def store_weight_line(panel, k, ends, step, a, b, c, half, one, minus, zero):
    """A line of G g G^T, its first and last vector at panel[k + ends[0]] and panel[k + ends[1]]."""
    p, q, r, s = weight_line(a, b, c, half, one, minus, zero)
    store(panel, k + ends[0], p)
    store(panel, k + step, q)
    store(panel, k + 2 * step, r)
    store(panel, k + ends[1], s)


@device_function
def panel_size(C, mr, W):
    """Elements of one of 16 matrices of a panel: the last vector of `transform_weights` ends after it."""
    return C * mr + W


@device_function
def transform_weights(panel, w, block, flipped, mr):
    """A panel, (16, C, mr), of G g G^T: of output channels block*mr ...; zeros for missing ones.

    panel: flat, see `panel_size`   flipped: for the input gradient, see `pack`
    """
    O, C = (w.shape[1], w.shape[0]) if flipped else (w.shape[0], w.shape[1])
    W, flat, zero, number = width(w), ravel(w), zeros(w, 1)[0], pixel_zero(w[0, 0])
    one, minus, half = splat(w.dtype.type(1), zero), splat(w.dtype.type(-1), zero), splat(w.dtype.type(0.5), zero)
    o_step, c_step = (9, 9 * O) if flipped else (9 * C, 9)
    # Several channels at a time: a processor waits long for a vector of numbers that it has just stored one by one.
    few, row, step = 8, round_up(mr, W), panel_size(C, mr, W)  # row: of whole vectors, for mr channels
    g = empty_aligned(few * 9 * row, w)
    g[:] = 0
    ends = (3 * step, 0) if flipped else (0, 3 * step)  # for a kernel rotated by 180 degrees, G g G^T is reversed so
    for start in range(0, C, few):
        for c in range(start, min(C, start + few)):
            for r in range(min(mr, O - block * mr)):
                k, to = (block * mr + r) * o_step + c * c_step, (c - start) * 9 * row + r
                for i in range(9):
                    store(g, to + i * row, load(flat, k + i, number))
        for c in range(start, min(C, start + few)):
            for r in range(0, mr, W):
                k = (c - start) * 9 * row + r
                x = column_of_weights(g, k, 3 * row, half, one, minus, zero)
                y = column_of_weights(g, k + row, 3 * row, half, one, minus, zero)
                z = column_of_weights(g, k + 2 * row, 3 * row, half, one, minus, zero)
                k = c * mr + r  # what is stored beyond the mr channels is overwritten by the next c
                store_weight_line(panel, k + 4 * ends[0], ends, step, x[0], y[0], z[0], half, one, minus, zero)
                store_weight_line(panel, k + 4 * step, ends, step, x[1], y[1], z[1], half, one, minus, zero)
                store_weight_line(panel, k + 8 * step, ends, step, x[2], y[2], z[2], half, one, minus, zero)
                store_weight_line(panel, k + 4 * ends[1], ends, step, x[3], y[3], z[3], half, one, minus, zero)


@device_function
def transform_input(V, step, c_step, x, tile, padding):
    """V[k*step + c*c_step ...] = the vector (k, c) of B^T d B of a tile (row, column) of a block."""
    (C, H, W, L), array, zero = x.shape, ravel(x), pixel_zero(x[0])
    one, minus = splat(x.dtype.type(1), zero), splat(x.dtype.type(-1), zero)
    top, left, yes = 2 * tile[0] - padding[0], 2 * tile[1] - padding[1], (True, True, True, True)
    start, plane, row = (top * W + left) * L, H * W * L, W * L
    u, v = inside(top, H), inside(left, W)
    if u[0] and u[3] and v[0] and v[3]:  # constants make it faster
        for c in range(C):
            transform_channel(V, c * c_step, step, array, start + c * plane, row, L, yes, yes, zero, one, minus)
    else:
        for c in range(C):
            transform_channel(V, c * c_step, step, array, start + c * plane, row, L, u, v, zero, one, minus)


@force_inline
def output_column(M, k, step, zero, one, minus):
    """A^T m of a column of a tile, of vectors k, k + step, ..."""
    return output_line(
        load(M, k, zero), load(M, k + step, zero), load(M, k + 2 * step, zero), load(M, k + 3 * step, zero), one, minus
    )  # fmt: skip


@force_inline
def output_tiles(M, r, second, term, mr, L, zero, one, minus):
    """A^T M A + term, of channel r: (upper left, upper right, lower left, lower right).   M: (16, mr, 2, L)

    second: of the pair of tiles, 0 or 1
    """
    step, k = 2 * mr * L, (2 * r + second) * L
    a = output_column(M, k, 4 * step, zero, one, minus)
    b = output_column(M, k + step, 4 * step, zero, one, minus)
    c = output_column(M, k + 2 * step, 4 * step, zero, one, minus)
    d = output_column(M, k + 3 * step, 4 * step, zero, one, minus)
    upper_left, upper_right = output_line(a[0], b[0], c[0], d[0], one, minus)
    lower_left, lower_right = output_line(a[1], b[1], c[1], d[1], one, minus)
    upper = fma(one, term, upper_left), fma(one, term, upper_right)
    return upper, (fma(one, term, lower_left), fma(one, term, lower_right))


@device_function
def transform_output(y, M, r, channel, tile, second, bias, epilogue, residual, mr):
    """Two by two outputs of an output channel of a tile (row, column) of a block; see `output_tiles`."""
    (OH, OW, L), zero, out = y.shape[1:], pixel_zero(y[0]), ravel(y)
    one, minus, term = splat(y.dtype.type(1), zero), splat(y.dtype.type(-1), zero), splat(bias[channel], zero)
    upper, lower = output_tiles(M, r, second, term, mr, L, zero, one, minus)
    (i, j), width = (2 * tile[0], 2 * tile[1]), L
    if j + 1 == OW:  # a column only: the right vectors are stored at the same place, and first
        upper, lower, width = (upper[1], upper[0]), (lower[1], lower[0]), 0
    k = ((channel * OH + i) * OW + j) * L
    store_result(out, k, 0, width, upper, 1, channel, epilogue, residual)
    if i + 1 < OH:
        store_result(out, k + OW * L, 0, width, lower, 1, channel, epilogue, residual)


@force_inline
def multiply(M, V, start, offsets, L, panels, block, like):
    """M[k] = the sums over channels of panels[block, k] * V[k], of a pair of tiles from V[start] on.

    M: (16, mr, 2, L)   V: (pairs, 16, odd(2*C), L), since the 16 matrices are written at the same time
    """
    mr, C = len(like) // 2, offsets.size
    size = panel_size(C, mr, width(M))
    for k in range(16):
        w = (block * 16 + k) * size
        acc = microkernel(like, V, start + k * odd(2 * C) * L, offsets, 0, C, L, panels, w, mr, 1)
        store_block(M, k * 2 * mr * L, 2 * L, L, acc, mr)


@inline_ir
def winograd_band(y, x, panels, bias, epilogue, residual, padding, rows, like):
    """Tile rows `rows`, (first, end), of a block."""
    (C, _, _, L), O, mr = x.shape, len(y), len(like) // 2
    columns = divide(y.shape[2], 2)
    strip = max(2, min(round_up(columns, 2), STRIP_ELEMENTS // (16 * C * L) // 2 * 2))
    V, M = empty_aligned(strip * 8 * odd(2 * C) * L, x), empty_aligned(16 * 2 * mr * L, x)
    offsets = tap_offsets(1, 1, C, 0, 0, 2 * L)
    for i in range(rows[0], rows[1]):
        for first in range(0, columns, strip):
            tiles = min(strip, columns - first)
            for t in range(tiles):
                transform_input(
                    V[(t // 2 * 16 * odd(2 * C) + t % 2) * L :], odd(2 * C) * L, 2 * L, x, (i, first + t), padding
                )
            for block in range(divide(O, mr)):
                for t in range(0, tiles, 2):
                    multiply(M, V, t * 8 * odd(2 * C) * L, offsets, L, panels, block, like)
                    for r in range(min(mr, O - block * mr)):
                        for second in range(min(2, tiles - t)):
                            transform_output(
                                y, M, r, block * mr + r, (i, first + t + second), second, bias, epilogue, residual, mr
                            )  # fmt: skip


@kernel
def conv2d_forward_winograd(y, x, w, b, epilogue, residual, padding, flipped, threads):
    """x: (B, C, H, W, L), y: (B, O, OH, OW, L); see `conv.run_forward`.

    flipped: y is the gradient of the input, x that of the output, and padding 2 less the convolution's
    """
    O, C, T = y.shape[1], x.shape[1], divide(y.shape[2], 2)
    mr = choose_mr(O, MR_WIDE, MR_NARROW)
    size = 16 * panel_size(C, mr, width(w))
    panels = np.empty(divide(O, mr) * size, w.dtype)
    for block in prange(divide(O, mr)):
        transform_weights(panels[block * size : (block + 1) * size], w, block, flipped, mr)
    initial = by_group(b.reshape((1, b.size)), 1, O)
    table = flat_items(by_group(epilogue, 1, O), 0, 1)
    count = min(T, max(BANDS, divide(threads, len(x))))
    for task in prange(len(x) * count):
        n, rows = task // count, part(task % count, count, T)
        terms = flat_items(residual, n, n + 1)
        if mr == MR_WIDE:
            winograd_band(y[n], x[n], panels, initial[0], table, terms, padding, rows, wide_accumulators(x))
        else:
            winograd_band(y[n], x[n], panels, initial[0], table, terms, padding, rows, narrow_accumulators(x))


@device_function
def transform_grad(D, dy, tile, strip, t):
    """D[k, o, t], (16, O, strip, L), = A dy A^T of a tile."""
    (O, OH, OW, L), array, zero = dy.shape, ravel(dy), pixel_zero(dy[0])
    one, minus = splat(dy.dtype.type(1), zero), splat(dy.dtype.type(-1), zero)
    i, j, step = 2 * tile[0], 2 * tile[1], odd(O * strip) * L
    for o in range(O):
        k, out = ((o * OH + i) * OW + j) * L, (o * strip + t) * L
        a, b = load(array, k, zero), load(array, k + L, zero) if j + 1 < OW else zero
        k += OW * L
        c = load(array, k, zero) if i + 1 < OH else zero
        d = load(array, k + L, zero) if i + 1 < OH and j + 1 < OW else zero
        store_grad_line(D, out, step, a, b, one, minus, zero)
        store_grad_line(D, out + 4 * step, step, fma(one, a, c), fma(one, b, d), one, minus, zero)
        store_grad_line(D, out + 8 * step, step, fma(minus, c, a), fma(minus, d, b), one, minus, zero)
        store_grad_line(D, out + 12 * step, step, fma(minus, c, zero), fma(minus, d, zero), one, minus, zero)


@force_inline
def store_grad_line(D, k, step, a, b, one, minus, zero):
    store(D, k, a)
    store(D, k + step, fma(one, a, b))
    store(D, k + 2 * step, fma(minus, b, a))
    store(D, k + 3 * step, fma(minus, b, zero))


@inline_ir
def weight_grad_band(partial, dy, x, padding, rows, blocks, like):
    """Add the products of tile rows `rows` of a block to the sums of `blocks`, (first, end), of output channels.

    partial: flat, (16, blocks of output channels, pairs of vectors of input channels, register block)
    """
    (C, _, _, L), O, mr = x.shape, len(dy), len(like) // 2
    columns = divide(dy.shape[2], 2)
    padded, tiles, all_blocks, size = round_up(C, 2 * L), (rows[1] - rows[0]) * columns, divide(O, mr), len(like) * L
    V, D = empty_aligned(16 * odd(padded) * L, x), empty_aligned(16 * odd(round_up(O, mr) * GRAD_TILES) * L, x)
    transposed = empty_aligned(16 * GRAD_TILES * L * padded, x)
    V[:] = 0
    offsets = tap_offsets(1, 1, GRAD_TILES * L, 0, 0, padded)
    for first in range(0, tiles, GRAD_TILES):
        count = min(GRAD_TILES, tiles - first)
        for t in range(count):
            tile = rows[0] + (first + t) // columns, (first + t) % columns
            transform_input(V, odd(padded) * L, L, x, tile, padding)
            for k in range(16):
                for c in range(0, padded, L):
                    start = (k * GRAD_TILES + t) * L * padded + c
                    transpose(transposed, start, padded, V, (k * odd(padded) + c) * L, L)
            transform_grad(D, dy, tile, GRAD_TILES, t)
        for k in range(16):
            for block in range(blocks[0], blocks[1]):
                # A block may end after the last output channel: the sums of its other rows are not used.
                w = (k * odd(O * GRAD_TILES) + block * mr * GRAD_TILES) * L
                for c in range(0, padded, 2 * L):
                    at = ((k * all_blocks + block) * (padded // (2 * L)) + c // (2 * L)) * size
                    acc = load_strided(partial, at, L, like)
                    start = k * GRAD_TILES * L * padded + c
                    acc = microkernel(acc, transposed, start, offsets, 0, count * L, L, D, w, 1, GRAD_TILES * L)
                    store_contiguous(partial, at, acc)


@force_inline
def grad_line(a, b, c, d, half, one, minus, zero):
    """A line of G^T m."""
    sum_bc = fma(half, fma(one, c, b), zero)
    return fma(one, sum_bc, a), fma(half, fma(minus, c, b), zero), fma(one, sum_bc, d)


@force_inline
def grad_column(m, k, step, half, one, minus, zero):
    """G^T m of a column, of vectors k, k + step, ..."""
    a, b, c, d = load(m, k, zero), load(m, k + step, zero), load(m, k + 2 * step, zero), load(m, k + 3 * step, zero)
    return grad_line(a, b, c, d, half, one, minus, zero)


@device_function
def weight_grad_block(dw, partial, block, mr, W):
    """The weights' gradients of a block of output channels: G^T m G of the sum m of the partial ones, in order."""
    (O, C), zero, flat, number = dw.shape[:2], zeros(dw, 1)[0], ravel(dw), pixel_zero(dw[0, 0])
    one, minus, half = splat(dw.dtype.type(1), zero), splat(dw.dtype.type(-1), zero), splat(dw.dtype.type(0.5), zero)
    row = divide(C, 2 * W) * 2 * mr * W  # of a block
    step, sums, g = divide(O, mr) * row, partial[0], empty_aligned(9 * W, dw)  # step: of one of 16 matrices
    for k in range(16):
        first, end = k * step + block * row, k * step + (block + 1) * row
        total = sums[first:end]
        for n in range(1, len(partial)):
            addend = partial[n, first:end]
            for i in range(row):
                total[i] += addend[i]
    for r in range(min(mr, O - block * mr)):
        for c in range(0, C, W):
            k = block * row + (c // (2 * W) * mr + r) * 2 * W + c % (2 * W)
            p = grad_column(sums, k, 4 * step, half, one, minus, zero)
            q = grad_column(sums, k + step, 4 * step, half, one, minus, zero)
            s = grad_column(sums, k + 2 * step, 4 * step, half, one, minus, zero)
            t = grad_column(sums, k + 3 * step, 4 * step, half, one, minus, zero)
            store_contiguous(g, 0, grad_line(p[0], q[0], s[0], t[0], half, one, minus, zero))
            store_contiguous(g, 3 * W, grad_line(p[1], q[1], s[1], t[1], half, one, minus, zero))
            store_contiguous(g, 6 * W, grad_line(p[2], q[2], s[2], t[2], half, one, minus, zero))
            for lane in range(min(W, C - c)):
                out = ((block * mr + r) * C + c + lane) * 9
                for i in range(9):
                    store(flat, out + i, load(g, i * W + lane, number))


@kernel
def conv2d_weight_grad_winograd(dw, db, dy, x, padding, threads):
    """Gradients of the weights and of the bias, unless db is of size 0.   dw: (O, C, 3, 3)   dy, x: blocked"""
    O, C = dw.shape[:2]
    L, T = width(x), divide(dy.shape[2], 2)
    mr = choose_mr(O, MR_WIDE, MR_NARROW)
    bands = min(T, BANDS if BANDS * len(x) < CHUNKS else 1)
    tasks, blocks = len(x) * bands, divide(O, mr)
    chunks = min(CHUNKS, tasks)
    partial = np.zeros((chunks, 16 * blocks * divide(C, 2 * L) * 2 * mr * L), x.dtype)
    bias_partial = np.zeros((chunks, db.size), x.dtype)
    parts = max(1, min(divide(threads, chunks), blocks))  # of a chunk: some of the blocks
    for chunk_part in prange(chunks * parts):
        chunk, p = chunk_part // parts, chunk_part % parts
        for task in range(chunk * tasks // chunks, (chunk + 1) * tasks // chunks):
            n, rows, some = task // bands, part(task % bands, bands, T), part(p, parts, blocks)
            if mr == MR_WIDE:
                weight_grad_band(partial[chunk], dy[n], x[n], padding, rows, some, wide_accumulators(x))
            else:
                weight_grad_band(partial[chunk], dy[n], x[n], padding, rows, some, narrow_accumulators(x))
            if db.size and p == 0:
                add_bias_grad(bias_partial[chunk], dy[n], 2 * rows[0], 2 * rows[1])
    for block in prange(blocks):
        weight_grad_block(dw, partial, block, mr, L)
    for o in range(db.size):
        db[o] = bias_partial[0, o]
        for k in range(1, chunks):
            db[o] += bias_partial[k, o]


def conv2d_backward_winograd(dx, dw, db, dy, x, w, padding):
    """Gradients of all three arguments of `conv2d_forward_winograd`; those of size 0 are not computed.  db needs dw."""
    if dx.size:
        no_bias, pads = w[0, 0, 0, :0], (2 - padding[0], 2 - padding[1])
        conv2d_forward_winograd(dx, dy, w, no_bias, None, None, pads, True)
    if dw.size and x.shape[1] < LEAST_GRAD_CHANNELS:
        conv2d_backward_direct(dx[:0], dw, db, dy, x, w, (1, 1), padding, (1, 1), 1)
    elif dw.size:
        conv2d_weight_grad_winograd(dw, db, dy, x, padding)
