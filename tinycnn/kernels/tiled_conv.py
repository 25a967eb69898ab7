"""Convolution on tiles: see tiles.py for how a batch is laid out, conv.py for what is computed.

The sums of a few output maps at two neighbouring pixels stay in registers until they are complete; the taps of a window
that would meet padding are left out.  The input's gradient is such a convolution too, of dy with the weights turned by
180 degrees.  A weight's gradient is the product of two images shifted against each other, added up over all lanes.
"""

import numpy as np
from numba import prange

from tinycnn.kernels import _vector
from tinycnn.kernels._jit import inner, kernel
from tinycnn.kernels.blocks import (
    MAPS,
    NARROW,
    TAPS,
    WIDE,
    add_taps,
    better,
    ceil_to,
    narrow_block,
    pack,
    products_block,
    wide_block,
)
from tinycnn.kernels.tiles import meeting

CHUNKS = 8  # weight gradients are summed in at most this many parts: never one a thread, so that their number and
# order, and with them the rounding, are the same for any number of threads
BANDS = 2  # parts of an image, each a task of its own, so that few tiles keep several threads busy

starts, outer, cross, zeros = _vector.starts, _vector.outer, _vector.cross, _vector.zeros
loads, picks, stores, add_totals = _vector.loads, _vector.picks, _vector.stores, _vector.add_totals


@inner
def spread_out(x, first, count, rows, margin, step):
    """Maps first ... first + count of a tile, flat, with pixels `step` apart, zeros between them and `margin` columns
    of zeros on both sides; only what comes from the pixel rows `rows`.  x: (C, H, W, L)"""
    H, W, L = x.shape[1:]
    pitch = (W - 1) * step[1] + 1 + 2 * margin
    flat = np.zeros((count, (H - 1) * step[0] + 1, pitch * L), x.dtype)
    for c in range(count):
        for i in range(rows[0], rows[1]):
            to, row = flat[c, i * step[0], margin * L :], x[first + c, i].reshape(W * L)
            if step[1] == 1:
                for j in range(W * L):
                    to[j] = row[j]
            else:
                for j in range(W):
                    for lane in range(L):
                        to[j * step[1] * L + lane] = row[j * L + lane]
    return flat.reshape(flat.size)


@inner
def slide(y, first, count, src, size, margin, weight, bias, shape, stride, padding, dilation, rows, like):
    """y[first + r, i, j] = bias[r] + sum of weight[r, c, u, v] * src[c, i*sh + u*dh - ph, j*sw + v*dw - pw], one tile.

    y: (O, OH, OW, L)   src: flat, of `size` (H, W), with `margin` columns of zeros on both sides, at least dilation[1]
    or padding[1] of them if a window reaches over the edge   rows: the range of i   like: a block, for its size
    weight: see `pack`   bias: as many numbers as weight has maps
    """
    (H, W), (C, KH, KW), (OH, OW, L) = size, shape, y.shape[1:]
    block, pitch, out = len(like) // 2, (W + 2 * margin) * L, y.reshape(y.size)
    next_to = 1 if OW > 1 else 0
    for i in range(rows[0], rows[1]):
        top = i * stride[0] - padding[0]
        u0, u1 = meeting(top, dilation[0], KH, H)
        for column in range(0, OW, 2):
            j = max(0, min(column, OW - 2))  # the last pair of a row reaches back
            left = j * stride[1] - padding[1]
            v0, v1 = meeting(left, dilation[1], KW, W)
            w0, w1 = meeting(left + next_to * stride[1], dilation[1], KW, W)
            at = top * pitch + (left + margin) * L
            for r in range(0, count, block):
                sums = add_taps(
                    starts(bias, r, like), src, at, H * pitch, dilation[0] * pitch, dilation[1] * L,
                    next_to * stride[1] * L, weight, r * C * KH * KW, shape, u0, u1, min(v0, w0), max(v1, w1),
                )  # fmt: skip
                to = (((first + r) * OH + i) * OW + j) * L
                stores(out, to, OH * OW * L, next_to * L, sums, min(block, count - r))


@inner
def band(task, height):
    """The rows of the image that a task works on."""
    part = task % BANDS
    return part * height // BANDS, (part + 1) * height // BANDS


@inner
def source_rows(rows, K, stride, padding, dilation, height):
    """The rows of the image that the windows of output rows `rows` meet."""
    first = rows[0] * stride - padding
    last = (rows[1] - 1) * stride + (K - 1) * dilation - padding
    return min(height, max(0, first)), min(height, max(0, last + 1))


@inner
def forward_band(y, x, weight, bias, shape, stride, padding, dilation, rows, like):
    """Output rows `rows` of a tile.  weight: (groups, ...), see `pack`   bias: (groups, ...)"""
    H, W, L = x.shape[1:]
    groups, per, KH, margin = len(weight), shape[0], shape[1], padding[1]
    count = len(y) // groups
    met = source_rows(rows, KH, stride[0], padding[0], dilation[0], H)
    for g in range(groups):
        if margin:
            src = spread_out(x, g * per, per, met, margin, (1, 1))
        else:
            src = x[g * per :].reshape((len(x) - g * per) * H * W * L)
        slide(
            y, g * count, count, src, (H, W), margin, weight[g], bias[g], shape, stride, padding, dilation, rows, like
        )  # fmt: skip


@kernel
def conv2d_forward_tiled(y, x, w, b, stride, padding, dilation, groups):
    """y = conv(x, w) + b; x: (T, C, H, W, L), y: (T, O, OH, OW, L)."""
    O, OH = y.shape[1], y.shape[2]
    per_o, shape = O // groups, (w.shape[1], w.shape[2], w.shape[3])
    block = better(per_o, WIDE, NARROW)
    weight, bias = pack(w, groups, block, False), np.zeros((groups, ceil_to(per_o, block)), w.dtype)
    for o in range(b.size):
        bias[o // per_o, o % per_o] = b[o]
    for task in prange(len(x) * BANDS):
        t, rows = task // BANDS, band(task, OH)
        if block == WIDE:
            forward_band(y[t], x[t], weight, bias, shape, stride, padding, dilation, rows, wide_block(x))
        else:
            forward_band(y[t], x[t], weight, bias, shape, stride, padding, dilation, rows, narrow_block(x))


@inner
def input_band(dx, dy, weight, shape, stride, padding, dilation, rows, like):
    """Rows `rows` of a tile's input gradient: dy, its pixels `stride` apart, convolved with the weights, turned."""
    OH, OW, L = dy.shape[1:]
    groups, (per_o, KH, KW) = len(weight), shape
    per, size = len(dx) // groups, ((OH - 1) * stride[0] + 1, (OW - 1) * stride[1] + 1)
    around = dilation[0] * (KH - 1) - padding[0], dilation[1] * (KW - 1) - padding[1]
    direct = stride == (1, 1) and around[1] <= 0
    margin, none = 0 if direct else dilation[1], np.zeros(per + WIDE, dx.dtype)
    met = source_rows(rows, KH, 1, around[0], dilation[0], size[0])
    met = met[0] // stride[0], min(OH, (met[1] + stride[0] - 1) // stride[0])
    for g in range(groups):
        if direct:
            src = dy[g * per_o :].reshape((len(dy) - g * per_o) * OH * OW * L)
        else:
            src = spread_out(dy, g * per_o, per_o, met, margin, stride)
        slide(dx, g * per, per, src, size, margin, weight[g], none, shape, (1, 1), around, dilation, rows, like)


@inner
def weight_blocks(part, dy, x, shape, stride, padding, dilation, rows):
    """Add a tile's products of dy's rows `rows` to the weights' gradient.

    part: flat; groups, blocks of output maps, kernel rows and blocks of taps, each a block of sums and fill
    """
    (C, H, W, L), (O, OH, OW) = x.shape, dy.shape[:3]
    groups, KH, KW = shape
    per, count, margin = C // groups, O // groups, padding[1]
    pitch, plane, fill = (W + 2 * margin) * L, OH * OW * L, ceil_to(MAPS * TAPS, L)
    none, left, right = products_block(x), zeros(x, MAPS), zeros(x, TAPS)
    offset = np.zeros(ceil_to(per * KW, TAPS), np.int64)
    for k in range(per * KW):
        offset[k] = k // KW * H * pitch + k % KW * dilation[1] * L
    offset_dy = np.zeros(ceil_to(count, MAPS), np.int64)
    met = source_rows(rows, KH, stride[0], padding[0], dilation[0], H)
    grad, place = dy.reshape(dy.size), 0
    for g in range(groups):
        for r in range(count):
            offset_dy[r] = (g * count + r) * plane
        if margin:
            src = spread_out(x, g * per, per, met, margin, (1, 1))
        else:
            src = x[g * per :].reshape((C - g * per) * H * W * L)
        for r in range(0, count, MAPS):
            for u in range(KH):
                top = u * dilation[0] - padding[0]
                i0, i1 = meeting(top, stride[0], OH, H)
                i0, i1 = max(i0, rows[0]), min(i1, rows[1])
                for k in range(0, offset.size, TAPS):
                    sums = none
                    for i in range(i0, i1):
                        at, q = i * OW * L, (top + i * stride[0]) * pitch
                        for _ in range(OW):
                            sums = cross(sums, picks(grad, at, offset_dy, r, left), picks(src, q, offset, k, right))
                            at += L
                            q += stride[1] * L
                    add_totals(part, place, sums)
                    place += fill


@inner
def sum_parts(dw, db, part, bias_part, groups, lanes):
    """dw and db from their parts, added in order."""
    O, per, KH, KW = dw.shape
    count, fill = O // groups, ceil_to(MAPS * TAPS, lanes)
    total = part[0]
    for k in range(1, len(part)):
        more = part[k]
        for i in range(total.size):
            total[i] += more[i]
    at = 0
    for g in range(groups):
        for r in range(0, count, MAPS):
            for u in range(KH):
                for k0 in range(0, per * KW, TAPS):
                    for i in range(min(MAPS, count - r)):
                        for k in range(k0, min(k0 + TAPS, per * KW)):
                            dw[g * count + r + i, k // KW, u, k % KW] = total[at + i * TAPS + k - k0]
                    at += fill
    for o in range(db.size):
        db[o] = bias_part[0, o]
        for k in range(1, len(part)):
            db[o] += bias_part[k, o]


@kernel
def conv2d_backward_tiled(dx, dw, db, dy, x, w, stride, padding, dilation, groups):
    """Gradients of all three arguments of `conv2d_forward_tiled`; dx and db of size 0 are not computed."""
    O, per, KH, KW = w.shape
    OH, OW, L = dy.shape[2], dy.shape[3], dy.shape[4]
    count, H = O // groups, x.shape[2]
    block = better(per, WIDE, NARROW)
    weight = pack(w, groups, block, True)
    tasks = len(x) * BANDS
    chunks = min(CHUNKS, tasks)
    blocks = groups * ((count + MAPS - 1) // MAPS) * KH * ((per * KW + TAPS - 1) // TAPS)
    part, bias_part = np.zeros((chunks, blocks * ceil_to(MAPS * TAPS, L)), x.dtype), np.zeros((chunks, O), x.dtype)
    for chunk in prange(chunks):
        shape, mine = (groups, KH, KW), part[chunk]
        for task in range(chunk * tasks // chunks, (chunk + 1) * tasks // chunks):
            t, rows = task // BANDS, band(task, OH)
            weight_blocks(mine, dy[t], x[t], shape, stride, padding, dilation, rows)
            for o in range(db.size):
                run = dy[t, o].reshape(OH * OW * L)[rows[0] * OW * L : rows[1] * OW * L]
                total = x.dtype.type(0)
                for i in range(run.size):
                    total += run[i]
                bias_part[chunk, o] += total
            if dx.size:
                turned, rows = (count, KH, KW), band(task, H)
                if block == WIDE:
                    input_band(dx[t], dy[t], weight, turned, stride, padding, dilation, rows, wide_block(x))
                else:
                    input_band(dx[t], dy[t], weight, turned, stride, padding, dilation, rows, narrow_block(x))
    sum_parts(dw, db, part, bias_part, groups, L)
