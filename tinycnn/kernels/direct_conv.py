"""Convolution on tiles: see layout.py for how a batch is laid out, conv.py for what is computed.

The sums of a few output maps at two neighbouring pixels stay in registers until they are complete; the taps of a window
that would meet padding are left out.  Where the others are is written down first, in a list: then a window is one long
loop, and there is little to compute beside the sums.  A tile is copied first, a band of rows that the cache holds at a
time, so that its maps come last, in the order in which they are read.

The input's gradient is such a convolution too, of dy with the weights turned by 180 degrees.  Strides above one make it
several, with a part of the taps each: pixels that are the stride apart meet pixels of dy that are neighbours.

A weight's gradient is the product of two images shifted against each other, added up over all lanes: a few maps of one
times a few taps of the other at a time, on a strip of pixels that the cache holds.
"""

import numpy as np
from numba import prange

from tinycnn.kernels import _simd
from tinycnn.kernels._jit import device_function, inline_ir, kernel
from tinycnn.kernels.layout import valid_range
from tinycnn.kernels.microkernel import (
    MR_NARROW,
    MR_WIDE,
    choose_mr,
    microkernel,
    narrow_accumulators,
    pack,
    round_up,
    tap_offsets,
    wide_accumulators,
)

CHUNKS = 8  # weight gradients are summed in at most this many parts: never one a thread, so that their number and
# order, and with them the rounding, are the same for any number of threads
BANDS = 2  # parts of an image, each a task of its own, so that few tiles keep several threads busy
L2_ELEMENTS = 2**17  # numbers of a band and what is computed of it: with more of them the copy would leave the second
# cache before it is read, so large images have more bands
MANY, FEW, TAPS = 4, 3, 5  # of a block of weight gradients: output maps, as they fit better, and taps of a window's row
L1_PIXELS = 112  # pixels that such blocks are summed over one after the other: what they read stays in the L1 cache

BYTES, pixel_zero, zeros, broadcast_rows = _simd.BYTES, _simd.pixel_zero, _simd.zeros, _simd.broadcast_rows
load_strided, load_indexed, store_contiguous = _simd.load_strided, _simd.load_indexed, _simd.store_contiguous
store_block, fma_outer, reduce_add = _simd.store_block, _simd.fma_outer, _simd.reduce_add
load, store, ravel = _simd.load, _simd.store, _simd.ravel

MANY_SUMS, FEW_SUMS = MANY * TAPS, FEW * TAPS

many_block, few_block = device_function(lambda x: zeros(x, MANY_SUMS)), device_function(lambda x: zeros(x, FEW_SUMS))
many_maps, few_maps = device_function(lambda x: zeros(x, MANY)), device_function(lambda x: zeros(x, FEW))
taps_block = device_function(lambda x: zeros(x, TAPS))


@device_function
def on_lines(size, like):
    """So many numbers, not set, from the beginning of a line of the cache: otherwise every vector would lie on two."""
    room = np.empty(size + BYTES // like.itemsize, like.dtype)
    start = -room.ctypes.data % BYTES // like.itemsize
    return room[start : start + size]


@device_function
def odd(n):
    """n or n + 1.  Pixels that are 64 lines apart, or another power of two, would share a few places of the cache."""
    return n | 1


@device_function
def spread_out(x, first, count, rows, margin, maps_last):
    """Rows `rows` of maps first ... first + count of a tile, flat, with `margin` columns of zeros on both sides:
    (count, rows, W', L) or, `maps_last`, (rows, W', odd(count), L).

    x: (C, H, W, L)
    """
    H, W, L = x.shape[1:]
    height, pitch, none, source = rows[1] - rows[0], W + 2 * margin, pixel_zero(x[0]), ravel(x)
    flat = on_lines(height * pitch * odd(count) * L, x)
    next_map, next_pixel = (L, odd(count) * L) if maps_last else (height * pitch * L, L)
    for c in range(count):
        for i in range(height):
            here, at = i * pitch * next_pixel + c * next_map, ((first + c) * H + rows[0] + i) * W * L
            for k in range(margin):
                store(flat, here + k * next_pixel, none)
                store(flat, here + (pitch - 1 - k) * next_pixel, none)
            to = here + margin * next_pixel
            for _ in range(W):
                store(flat, to, load(source, at, none))
                to += next_pixel
                at += L
    return flat


@device_function
def slide(y, places, first, count, src, lies, weight, bias, shape, stride, padding, dilation, rows, like):
    """y[first + r, i, j] = bias[r] + sum of weight[r, c, u, v] * src[c, i*sh + u*dh - ph, j*sw + v*dw - pw], one tile.

    y: (O, OH, OW, L), of which only pixels are meant that are `places`: the first one, and how far they are apart
    src: flat, (H, W, odd(C), L), it `lies` there as (H, W, the first row that is there, columns of zeros on both sides,
    as many as a window reaches over the edge, or stride[1])   rows: the range of i   like: a block, for its size
    weight: see `pack`   bias: as many numbers as weight has maps
    """
    (H, W, begin, margin), (C, KH, KW), (OH, width, L), (place, apart) = lies, shape, y.shape[1:], places
    OW = (width - place[1] + apart[1] - 1) // apart[1]
    block, out, pairs, next_to = len(like) // 2, ravel(y), (OW + 1) // 2, 1 if OW > 1 else 0
    column, pitch = odd(C) * L, (W + 2 * margin) * odd(C) * L
    offset, taps = tap_offsets(KH, KW, C, dilation[0] * pitch, dilation[1] * column, L), KW * C
    # Where pairs of outputs stand, and the columns of the window that meet the image, are the same in all rows.
    columns = np.empty((pairs, 3), np.int64)
    for p in range(pairs):
        j = max(0, min(2 * p, OW - 2))  # the last pair of a row reaches back
        left = j * stride[1] - padding[1]
        one, other = valid_range(left, dilation[1], KW, W), valid_range(left + next_to * stride[1], dilation[1], KW, W)
        columns[p, 0], columns[p, 1], columns[p, 2] = j, min(one[0], other[0]), max(one[1], other[1])
    for i in range(rows[0], rows[1]):
        top = i * stride[0] - padding[0]
        u0, u1 = valid_range(top, dilation[0], KH, H)
        for p in range(pairs):
            j, v0, v1 = columns[p, 0], columns[p, 1], columns[p, 2]
            at = (top - begin) * pitch + (j * stride[1] - padding[1] + margin) * column
            tap, run, pieces = u0 * taps + v0 * C, (v1 - v0) * C, u1 - u0
            if run == taps:  # whole rows of the window follow one another
                run, pieces = run * pieces, 1
            for r in range(0, count, block):
                sums, k, w = broadcast_rows(bias, r, like), tap, r * taps * KH
                for _ in range(pieces):
                    sums = microkernel(sums, src, at, offset, k, k + run, next_to * stride[1] * column, weight, w)
                    k += taps
                to = (((first + r) * OH + place[0] + i * apart[0]) * width + place[1] + j * apart[1]) * L
                store_block(out, to, OH * width * L, next_to * apart[1] * L, sums, min(block, count - r))


@device_function
def bands(x, y, least):
    """How many parts an image has."""
    return max(least, min(y.shape[1], (x.size + y.size) // L2_ELEMENTS))


@device_function
def band(part, parts, height):
    """The rows of an image that are its part `part` of `parts`."""
    return part * height // parts, (part + 1) * height // parts


@device_function
def source_rows(rows, K, stride, padding, dilation, height):
    """The rows of the image that the windows of output rows `rows` meet."""
    first = rows[0] * stride - padding
    last = (rows[1] - 1) * stride + (K - 1) * dilation - padding
    return min(height, max(0, first)), min(height, max(0, last + 1))


@device_function
def edge_columns(out, W, K, stride, padding, dilation):
    """How many columns a window reaches over the edge at most, on either side."""
    return max(padding, (out - 1) * stride + (K - 1) * dilation - padding - (W - 1))


@inline_ir
def forward_band(y, x, weight, bias, shape, stride, padding, dilation, rows, like):
    """Output rows `rows` of a tile.  weight: (groups, ...), see `pack`   bias: (groups, ...)"""
    H, W = x.shape[1:3]
    groups, (per, KH, KW), count = len(weight), shape, len(y) // len(weight)
    margin = edge_columns(y.shape[2], W, KW, stride[1], padding[1], dilation[1])
    met = source_rows(rows, KH, stride[0], padding[0], dilation[0], H)
    for g in range(groups):
        src = spread_out(x, g * per, per, met, margin, True)
        slide(
            y, ((0, 0), (1, 1)), g * count, count, src, (H, W, met[0], margin), weight[g], bias[g], shape, stride,
            padding, dilation, rows, like,
        )  # fmt: skip


@kernel
def conv2d_forward_direct(y, x, w, b, stride, padding, dilation, groups):
    """y = conv(x, w) + b; x: (T, C, H, W, L), y: (T, O, OH, OW, L)."""
    O, OH = y.shape[1], y.shape[2]
    per_o, shape = O // groups, (w.shape[1], w.shape[2], w.shape[3])
    block = choose_mr(per_o, MR_WIDE, MR_NARROW)
    weight, bias = pack(w, groups, block, False, True), np.zeros((groups, round_up(per_o, block)), w.dtype)
    for o in range(b.size):
        bias[o // per_o, o % per_o] = b[o]
    parts = bands(x[0], y[0], BANDS)
    for task in prange(len(x) * parts):
        t, rows = task // parts, band(task % parts, parts, OH)
        if block == MR_WIDE:
            forward_band(y[t], x[t], weight, bias, shape, stride, padding, dilation, rows, wide_accumulators(x))
        else:
            forward_band(y[t], x[t], weight, bias, shape, stride, padding, dilation, rows, narrow_accumulators(x))


@device_function
def meeting_taps(place, K, stride, padding, dilation):
    """The taps of K that lead from dy to pixels place, place + stride, ... of dx: the first one, the step to the next
    and, for these pixels and taps on their own, turned, the padding and dilation with which they meet dy."""
    first, step = 0, 1
    while first < K and (place + padding - first * dilation) % stride:
        first += 1
    while step * dilation % stride:
        step += 1
    last = first + (K - 1 - first) // step * step
    return first, step, (last * dilation - place - padding) // stride, step * dilation // stride


@device_function
def pack_turned(w, groups, block, stride, padding, dilation):
    """(sh*sw, groups, ...): the weights that lead to a pixel of dx, see `pack`, for each place modulo the stride."""
    O, per, KH, KW = w.shape
    turned = np.empty((stride[0] * stride[1], groups, round_up(per, block) * (O // groups) * KH * KW), w.dtype)
    for a in range(stride[0]):
        for b in range(stride[1]):
            u, du, _, _ = meeting_taps(a, KH, stride[0], padding[0], dilation[0])
            v, dv, _, _ = meeting_taps(b, KW, stride[1], padding[1], dilation[1])
            packed = pack(w[:, :, u::du, v::dv], groups, block, True, True)
            for g in range(groups):
                for i in range(packed.shape[1]):
                    turned[a * stride[1] + b, g, i] = packed[g, i]
    return turned


@inline_ir
def input_band(dx, dy, weight, shape, stride, padding, dilation, rows, like):
    """Rows `rows` of a tile's input gradient: for each place modulo the stride dy convolved with weights, turned.

    weight: see `pack_turned`   shape: (O/groups, KH, KW)
    """
    OH, OW = dy.shape[1:3]
    groups, (sh, sw), (per_o, KH, KW) = weight.shape[1], stride, shape
    per, around = len(dx) // groups, (dilation[0] * (KH - 1) - padding[0], dilation[1] * (KW - 1) - padding[1])
    margin, none = 1 if around[1] > 0 else 0, np.zeros(per + MR_WIDE, dx.dtype)
    top, end = source_rows(rows, KH, 1, around[0], dilation[0], (OH - 1) * sh + 1)  # if dy's rows were sh apart
    met = top // sh, (end + sh - 1) // sh
    for g in range(groups):
        src = spread_out(dy, g * per_o, per_o, met, margin, True)
        for a in range(sh):
            u, du, up, down = meeting_taps(a, KH, sh, padding[0], dilation[0])
            for b in range(sw):
                v, dv, left, right = meeting_taps(b, KW, sw, padding[1], dilation[1])
                slide(
                    dx, ((a, b), stride), g * per, per, src, (OH, OW, met[0], margin), weight[a * sw + b, g], none,
                    (per_o, (KH - u + du - 1) // du, (KW - v + dv - 1) // dv), (1, 1), (up, left), (down, right),
                    ((rows[0] - a + sh - 1) // sh, (rows[1] - a + sh - 1) // sh), like,
                )  # fmt: skip


@device_function
def weight_blocks(part, bias_part, dy, x, shape, stride, padding, dilation, rows, none, left):
    """Add a tile's products of dy's rows `rows` to the weights' gradient, and their sums to the bias's.

    part: flat; groups, blocks of output maps, kernel rows and blocks of taps, each a block of sums and fill
    none: a block of sums   left: as many maps as it has
    """
    (C, H, W, L), (O, OH, OW) = x.shape, dy.shape[:3]
    groups, KH, KW = shape
    maps, right = len(left), taps_block(x)
    per, count, margin = C // groups, O // groups, edge_columns(OW, W, KW, stride[1], padding[1], dilation[1])
    plane, pitch, size = OH * OW * L, (W + 2 * margin) * L, len(none) * L
    offset_dy = np.zeros(round_up(count, maps), np.int64)
    met, grad, place = source_rows(rows, KH, stride[0], padding[0], dilation[0], H), ravel(dy), 0
    begin, height = (met[0], met[1] - met[0]) if margin else (0, H)
    offset = np.zeros(round_up(per * KW, TAPS), np.int64)
    for k in range(per * KW):
        offset[k] = k // KW * height * pitch + k % KW * dilation[1] * L
    kept, strip = on_lines(KH * (offset.size // TAPS) * size, x), max(1, L1_PIXELS // OW)
    for g in range(groups):
        for r in range(count):
            offset_dy[r] = (g * count + r) * plane
        if margin:
            src = spread_out(x, g * per, per, met, margin, False)
        else:
            src = x[g * per :].reshape((C - g * per) * H * W * L)
        for r in range(0, count, maps):
            for first in range(rows[0], rows[1], strip):
                last = min(first + strip, rows[1])
                for u in range(KH):
                    top = u * dilation[0] - padding[0]
                    i0, i1 = valid_range(top, stride[0], OH, H)
                    start = (top - begin) * pitch + (margin - padding[1]) * L
                    for k in range(0, offset.size, TAPS):
                        at_kept = (u * (offset.size // TAPS) + k // TAPS) * size
                        sums = none if first == rows[0] else load_strided(kept, at_kept, L, none)
                        for i in range(max(i0, first), min(i1, last)):
                            at, q = i * OW * L, start + i * stride[0] * pitch
                            for _ in range(OW):
                                sums = fma_outer(
                                    sums,
                                    load_indexed(grad, at, offset_dy, r, left),
                                    load_indexed(src, q, offset, k, right),
                                )
                                at += L
                                q += stride[1] * L
                        if last < rows[1]:
                            store_contiguous(kept, at_kept, sums)
                        else:
                            reduce_add(part, place, sums)
                            place += round_up(len(none), L)
                if bias_part.size:
                    for o in range(g * count + r, g * count + min(r + maps, count)):
                        run, total = grad[(o * OH + first) * OW * L : (o * OH + last) * OW * L], x.dtype.type(0)
                        for k in range(run.size):
                            total += run[k]
                        bias_part[o] += total


@device_function
def sum_parts(dw, db, part, bias_part, groups, maps, fill):
    """dw and db from their parts, added in order."""
    O, per, KH, KW = dw.shape
    count, taps, total = O // groups, per * KH * KW, part[0]
    for k in range(1, len(part)):
        more = part[k]
        for i in range(total.size):
            total[i] += more[i]
    at, flat = 0, ravel(dw)
    for g in range(groups):
        for r in range(0, count, maps):
            for u in range(KH):
                c = v = 0
                for k0 in range(0, per * KW, TAPS):
                    for k in range(min(TAPS, per * KW - k0)):
                        to = (((g * count + r) * per + c) * KH + u) * KW + v
                        for i in range(min(maps, count - r)):
                            flat[to + i * taps] = total[at + i * TAPS + k]
                        c, v = (c, v + 1) if v + 1 < KW else (c + 1, 0)
                    at += fill
    for o in range(db.size):
        db[o] = bias_part[0, o]
        for k in range(1, len(part)):
            db[o] += bias_part[k, o]


@inline_ir
def backward_tile(dx, part, bias_part, dy, x, weight, shape, stride, padding, dilation, band_of, block):
    """A band of a tile; adds to the parts.  shape: (groups, O/groups, KH, KW)   band_of: its number, and of how many"""
    groups, count, KH, KW = shape
    rows, windows = band(*band_of, dy.shape[1]), (groups, KH, KW)
    if choose_mr(count, MANY, FEW) == MANY:
        weight_blocks(part, bias_part, dy, x, windows, stride, padding, dilation, rows, many_block(x), many_maps(x))
    else:
        weight_blocks(part, bias_part, dy, x, windows, stride, padding, dilation, rows, few_block(x), few_maps(x))
    if dx.size:
        turned, rows = (count, KH, KW), band(*band_of, x.shape[1])
        if block == MR_WIDE:
            input_band(dx, dy, weight, turned, stride, padding, dilation, rows, wide_accumulators(x))
        else:
            input_band(dx, dy, weight, turned, stride, padding, dilation, rows, narrow_accumulators(x))


@kernel
def conv2d_backward_direct(dx, dw, db, dy, x, w, stride, padding, dilation, groups):
    """Gradients of all three arguments of `conv2d_forward_direct`; dx and db of size 0 are not computed."""
    (O, per, KH, KW), L = w.shape, dy.shape[4]
    shape, block = (groups, O // groups, KH, KW), choose_mr(per, MR_WIDE, MR_NARROW)
    weight = pack_turned(w, groups, block, stride, padding, dilation)
    parts = bands(x[0], dy[0], BANDS if BANDS * len(x) < CHUNKS else 1)
    tasks = len(x) * parts
    chunks, maps = min(CHUNKS, tasks), choose_mr(O // groups, MANY, FEW)
    fill = round_up(maps * TAPS, L)
    size = round_up(O // groups, maps) // maps * KH * (round_up(per * KW, TAPS) // TAPS) * fill
    part, bias_part = np.zeros((chunks, groups * size), x.dtype), np.zeros((chunks, db.size), x.dtype)
    for chunk in prange(chunks):
        for task in range(chunk * tasks // chunks, (chunk + 1) * tasks // chunks):
            t = task // parts
            to = dx[t] if dx.size else dx.reshape((0, 0, 0, 0))
            backward_tile(
                to, part[chunk], bias_part[chunk], dy[t], x[t], weight, shape, stride, padding, dilation,
                (task % parts, parts), block,
            )  # fmt: skip
    sum_parts(dw, db, part, bias_part, groups, maps, fill)
