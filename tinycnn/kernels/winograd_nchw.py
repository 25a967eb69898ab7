"""Winograd's algorithm for a few images in NCHW, forward only: winograd.py explains the algorithm.

A vector holds neighbouring tiles of an image, row after row.  Output rows are whole vectors, so half a vector of tiles
is a vector of pixels of one row.  Its columns 0 to 3 are the even and the odd pixels of two vectors:

    padded row     p0 p1 p2 p3 p4 p5 …       tile j covers columns 2*j to 2*j + 3
    from pixel 0   even: p0 p2 p4 …  column 0 of tiles 0, 1, 2, …   odd: p1 p3 p5 …  column 1
    from pixel 2   even: p2 p4 p6 …  column 2                       odd: p3 p5 p7 …  column 3
"""

import numpy as np
from numba import prange

from tinycnn.kernels import _simd
from tinycnn.kernels._jit import conv_kernel, device_function, force_inline, inline_ir
from tinycnn.kernels.direct_conv import empty_aligned, odd
from tinycnn.kernels.layout import valid_range
from tinycnn.kernels.microkernel import (
    MR_NARROW,
    MR_WIDE,
    by_group,
    choose_mr,
    divide,
    flat_items,
    narrow_accumulators,
    part,
    store_result,
    tap_offsets,
    wide_accumulators,
)
from tinycnn.kernels.winograd import input_line, multiply, output_tiles, panel_size, store_tile, transform_weights

TILE_ELEMENTS = 2**17  # of V, at most, if that is more than a pair of vectors: half of an L2 cache of 1 MB
PANEL_ELEMENTS = 2**20  # of a task's weights, about at most: 4 MB for each thread

deinterleave, interleave, load, store = _simd.deinterleave, _simd.interleave, _simd.load, _simd.store
pixel_zero, ravel, splat, width, zeros = _simd.pixel_zero, _simd.ravel, _simd.splat, _simd.width, _simd.zeros


@force_inline
def pixels(array, a, b, zero):
    """Columns 0 to 3 of a row of a vector of tiles, whose halves begin at a and b."""
    first = deinterleave(load(array, a, zero), load(array, b, zero))
    second = deinterleave(load(array, a + 2, zero), load(array, b + 2, zero))
    return first[0], first[1], second[0], second[1]


@device_function
def transform_tiles(V, image, first, rows, columns, padding):
    """B^T d B of the tiles of `rows` rows of an image, from row `first` on.

    V: flat, (pairs of vectors, 16, odd(2*C), W), see `multiply`
    """
    (C, H, width_in), W, zero, flat = image.shape, width(image), zeros(image, 1)[0], ravel(image)
    one, minus, number = splat(image.dtype.type(1), zero), splat(image.dtype.type(-1), zero), pixel_zero(image[0])
    row, top, left, step = 2 * columns + 2, 2 * first - padding[0], -padding[1], odd(2 * C) * W
    padded = np.zeros((2 * rows + 4) * row, image.dtype)  # half a vector may begin after the last row
    (i0, i1), (j0, j1) = valid_range(top, 1, 2 * rows + 2, H), valid_range(left, 1, row, width_in)
    for c in range(C):
        for i in range(i0, i1):
            source = (c * H + top + i) * width_in + left
            for j in range(j0, j1):
                store(padded, i * row + j, load(flat, source + j, number))
        for v in range(divide(rows * columns, W)):
            t, half = v * W, v * W + W // 2  # half a vector of tiles is in one row
            a, b = 2 * (t // columns * row + t % columns), 2 * (half // columns * row + half % columns)
            p, q = pixels(padded, a, b, zero), pixels(padded, a + row, b + row, zero)
            r, s = pixels(padded, a + 2 * row, b + 2 * row, zero), pixels(padded, a + 3 * row, b + 3 * row, zero)
            store_tile(
                V, v // 2 * 16 * step + (v % 2 + 2 * c) * W, step,
                input_line(p[0], q[0], r[0], s[0], one, minus), input_line(p[1], q[1], r[1], s[1], one, minus),
                input_line(p[2], q[2], r[2], s[2], one, minus), input_line(p[3], q[3], r[3], s[3], one, minus),
                one, minus,
            )  # fmt: skip


@force_inline
def store_row(y, k, inside, vectors, channel, epilogue, residual):
    """Store two vectors at y[k[0]] and y[k[1]], those that are `inside`."""
    if inside[1]:
        store_result(y, k[0], 0, k[1] - k[0], vectors, 1, channel, epilogue, residual)
    elif inside[0]:
        store_result(y, k[0], 0, 0, (vectors[1], vectors[0]), 1, channel, epilogue, residual)


@device_function
def output_rows(y, M, tile, second, last_row, bias, channel, count, epilogue, residual, mr):
    """Outputs of `count` channels of an image, of a vector of tiles, the first of which is `tile`.

    second: of the pair of vectors, 0 or 1   last_row: of tiles; others are not stored
    """
    (OH, OW), W, zero, out = y.shape[1:], width(M), zeros(M, 1)[0], ravel(y)
    one, minus, columns = splat(M.dtype.type(1), zero), splat(M.dtype.type(-1), zero), OW // 2
    i, j = tile // columns, (tile + W // 2) // columns  # rows of the two halves
    a, b = 2 * (i * OW + tile % columns), 2 * (j * OW + (tile + W // 2) % columns)
    upper_inside = i <= last_row, j <= last_row
    lower_inside = i <= last_row and 2 * i + 1 < OH, j <= last_row and 2 * j + 1 < OH
    for r in range(count):
        upper, lower = output_tiles(M, r, second, splat(bias[channel + r], zero), mr, W, zero, one, minus)
        k = (channel + r) * OH * OW
        upper, lower = interleave(upper[0], upper[1]), interleave(lower[0], lower[1])
        store_row(out, (k + a, k + b), upper_inside, upper, channel + r, epilogue, residual)
        store_row(out, (k + a + OW, k + b + OW), lower_inside, lower, channel + r, epilogue, residual)


@inline_ir
def winograd_image(y, x, panels, bias, epilogue, residual, padding, blocks, like):
    """Blocks of output channels `blocks`, (first, end), of an image (C, H, W).   panels: of these blocks"""
    O, OH, OW = y.shape
    C, L, mr = len(x), width(x), len(like) // 2
    T, columns = divide(OH, 2), OW // 2
    rows = min(T, max(divide(2 * L, columns), TILE_ELEMENTS // (16 * C * columns)))
    vectors = divide(rows * columns, L)
    V, M = empty_aligned(divide(vectors, 2) * 16 * odd(2 * C) * L, x), empty_aligned(16 * 2 * mr * L, x)
    V[V.size - 16 * odd(2 * C) * L :] = 0  # an odd number of vectors
    offsets = tap_offsets(1, 1, C, 0, 0, 2 * L)
    for first in range(0, T, rows):
        last = min(T, first + rows) - 1
        transform_tiles(V, x, first, rows, columns, padding)
        for block in range(blocks[0], blocks[1]):
            used = min(mr, O - block * mr)
            for t in range(0, vectors, 2):
                multiply(M, V, t * 8 * odd(2 * C) * L, offsets, L, panels, block - blocks[0], like)
                for second in range(min(2, vectors - t)):
                    tile = first * columns + (t + second) * L
                    output_rows(y, M, tile, second, last, bias, block * mr, used, epilogue, residual, mr)


@conv_kernel
def conv2d_forward_winograd_nchw(y, x, w, b, epilogue, residual, padding, threads):
    """NCHW; see `conv.run_forward`.

    Threads share the images, or the output channels of an image.  Each transforms the weights that it needs, which
    takes less time than to get them from another core.
    """
    N, O = y.shape[:2]
    C, mr = x.shape[1], choose_mr(O, MR_WIDE, MR_NARROW)
    size, blocks = 16 * panel_size(C, mr, width(x)), divide(O, mr)
    initial = by_group(b.reshape((1, b.size)), 1, O)
    table, groups = flat_items(by_group(epilogue, 1, O), 0, 1), min(threads, N)
    parts = min(blocks, max(divide(threads, groups), divide(blocks * size, PANEL_ELEMENTS)))
    for task in prange(groups * parts):
        images, some = part(task // parts, groups, N), part(task % parts, parts, blocks)
        panels = np.empty((some[1] - some[0]) * size, w.dtype)
        for block in range(some[0], some[1]):
            start = (block - some[0]) * size
            transform_weights(panels[start : start + size], w, block, False, mr)
        for n in range(images[0], images[1]):
            terms = flat_items(residual, n, n + 1)
            if mr == MR_WIDE:
                winograd_image(y[n], x[n], panels, initial[0], table, terms, padding, some, wide_accumulators(x))
            else:
                winograd_image(y[n], x[n], panels, initial[0], table, terms, padding, some, narrow_accumulators(x))
