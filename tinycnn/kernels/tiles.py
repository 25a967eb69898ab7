"""Convolution with stride one on *tiles*: as many images as a vector register has lanes.

The images of a tile are interleaved pixel by pixel, so that a pixel of the tile is one vector, and the loops below are
those of a single image: no row is too short for vectors, and nothing is computed between two rows.  Interleaving is a
transposition of small squares, which costs little (see _vector.py).  Sums stay in registers until they are complete.
"""

import numpy as np

from tinycnn.kernels import _vector
from tinycnn.kernels._jit import inner
from tinycnn.kernels.rows import SUMS

# `slide` computes SUMS output maps at a time, at two pixels each.
DOTS = 4  # rows of the weight gradient that `dots` computes at a time, of five taps each

width, zero, spread, load = _vector.width, _vector.zero, _vector.spread, _vector.load
store, fma, total, transpose = _vector.store, _vector.fma, _vector.total, _vector.transpose


@inner
def gather_plane(dst, at, x, n, c, count):
    """dst[at + p*L + l] = pixel p of x[n + l, c], with L lanes; lanes from `count` on are zero."""
    L, P, step = width(dst), x.shape[2] * x.shape[3], x.shape[1] * x.shape[2] * x.shape[3]
    flat, start = x.reshape(x.size), n * step + c * P
    if count == L and P >= L:
        for first in range(0, P, L):
            p = min(first, P - L)  # the last square reaches back, to end with the plane
            transpose(dst, at + p * L, L, flat, start + p, step)
    else:
        for p in range(P):
            for lane in range(L):
                dst[at + p * L + lane] = flat[start + lane * step + p] if lane < count else dst.dtype.type(0)


@inner
def scatter_plane(y, n, c, count, src, at):
    """The opposite: y[n + l, c], pixel p, = src[at + p*L + l] for the first `count` lanes."""
    L, P, step = width(src), y.shape[2] * y.shape[3], y.shape[1] * y.shape[2] * y.shape[3]
    flat, start = y.reshape(y.size), n * step + c * P
    if count == L and P >= L:
        for first in range(0, P, L):
            p = min(first, P - L)
            transpose(flat, start + p, step, src, at + p * L, L)
    else:
        for p in range(P):
            for lane in range(count):
                flat[start + lane * step + p] = src[at + p * L + lane]


@inner
def gather_padded(dst, x, n, count, first, channels, top, left, rows, pitch):
    """Channels of a tile, each with (rows, pitch) pixels, in which the image starts at (top, left); the rest stays."""
    L, H, W = width(dst), x.shape[2], x.shape[3]
    whole = top == 0 and left == 0 and pitch == W
    plane = np.empty(0 if whole else H * W * L, x.dtype)
    for c in range(channels):
        at = c * rows * pitch * L
        if whole:
            gather_plane(dst, at, x, n, first + c, count)
        else:
            gather_plane(plane, 0, x, n, first + c, count)
            for i in range(H):
                to, row = dst[at + ((top + i) * pitch + left) * L :], plane[i * W * L :]
                for j in range(W * L):
                    to[j] = row[j]


@inner
def pack(weight):
    """weight (groups, R, T), R a multiple of SUMS, in the order that `slide` reads: (groups, R // SUMS, T * SUMS)."""
    groups, R, T = weight.shape
    packed = np.empty((groups, R // SUMS, T * SUMS), weight.dtype)
    for g in range(groups):
        for r in range(R):
            for t in range(T):
                packed[g, r // SUMS, t * SUMS + r % SUMS] = weight[g, r, t]
    return packed


@inner
def two_pixels(out, plane, p, q, src, u, v, offset, weight, start):
    """Vectors out[i*plane + p] = start[i] + sum_t weight[t*SUMS + i] * src[offset[t] + u]; so for q and v.  i < 6"""
    a0, a1, a2 = spread(src, start[0]), spread(src, start[1]), spread(src, start[2])
    a3, a4, a5 = spread(src, start[3]), spread(src, start[4]), spread(src, start[5])
    b0, b1, b2, b3, b4, b5 = a0, a1, a2, a3, a4, a5
    for t in range(offset.size):
        at = offset[t]
        x, y = load(src, at + u), load(src, at + v)
        w = weight[SUMS * t]
        a0, b0 = fma(w, x, a0), fma(w, y, b0)
        w = weight[SUMS * t + 1]
        a1, b1 = fma(w, x, a1), fma(w, y, b1)
        w = weight[SUMS * t + 2]
        a2, b2 = fma(w, x, a2), fma(w, y, b2)
        w = weight[SUMS * t + 3]
        a3, b3 = fma(w, x, a3), fma(w, y, b3)
        w = weight[SUMS * t + 4]
        a4, b4 = fma(w, x, a4), fma(w, y, b4)
        w = weight[SUMS * t + 5]
        a5, b5 = fma(w, x, a5), fma(w, y, b5)
    store(out, p, a0)
    store(out, q, b0)
    store(out, plane + p, a1)
    store(out, plane + q, b1)
    store(out, 2 * plane + p, a2)
    store(out, 2 * plane + q, b2)
    store(out, 3 * plane + p, a3)
    store(out, 3 * plane + q, b3)
    store(out, 4 * plane + p, a4)
    store(out, 4 * plane + q, b4)
    store(out, 5 * plane + p, a5)
    store(out, 5 * plane + q, b5)


@inner
def slide(y, n, count, first, outputs, src, base, pitch, offset, packed, bias):
    """y[n + l, first + r, i, j] = bias + sum_t weight[r, t] * src[offset[t] + base + (i*pitch + j)*L + l].

    offset: (T,)   packed: (>= outputs / SUMS, T * SUMS), see `pack`
    """
    L, OH, OW = width(src), y.shape[2], y.shape[3]
    plane = OH * OW * L
    out, start = np.empty(SUMS * plane, y.dtype), np.empty(SUMS, y.dtype)
    for r in range(0, outputs, SUMS):
        for i in range(SUMS):
            start[i] = bias[first + r + i] if bias.size and r + i < outputs else y.dtype.type(0)
        for i in range(OH):
            for column in range(0, OW, 2):
                j = max(0, min(column, OW - 2))  # the last pair of a row reaches back
                k = min(j + 1, OW - 1)
                two_pixels(
                    out, plane, (i * OW + j) * L, (i * OW + k) * L, src, base + (i * pitch + j) * L,
                    base + (i * pitch + k) * L, offset, packed[r // SUMS], start,
                )  # fmt: skip
        for o in range(min(SUMS, outputs - r)):
            scatter_plane(y, n, first + r + o, count, out, o * plane)


@inner
def dots(dw, r, t, grad, plane, start, pitch_dy, src, pitch, offset, OH, OW):
    """dw[r + i, t + k] += sum of grad[(r + i)*plane + start + pixel] * src[offset[t + k] + pixel], i < 4, k < 5, over
    the lanes of OH x OW pixels, whose rows are pitch_dy and pitch apart."""
    L, none = width(src), zero(src)
    a0 = a1 = a2 = a3 = a4 = none
    b0 = b1 = b2 = b3 = b4 = none
    c0 = c1 = c2 = c3 = c4 = none
    d0 = d1 = d2 = d3 = d4 = none
    s0, s1, s2, s3, s4 = offset[t], offset[t + 1], offset[t + 2], offset[t + 3], offset[t + 4]
    for i in range(OH):
        p, q = r * plane + start + i * pitch_dy * L, i * pitch * L
        for _ in range(OW):
            v0, v1, v2 = load(src, s0 + q), load(src, s1 + q), load(src, s2 + q)
            v3, v4 = load(src, s3 + q), load(src, s4 + q)
            g = load(grad, p)
            a0, a1, a2, a3, a4 = fma(g, v0, a0), fma(g, v1, a1), fma(g, v2, a2), fma(g, v3, a3), fma(g, v4, a4)
            g = load(grad, p + plane)
            b0, b1, b2, b3, b4 = fma(g, v0, b0), fma(g, v1, b1), fma(g, v2, b2), fma(g, v3, b3), fma(g, v4, b4)
            g = load(grad, p + 2 * plane)
            c0, c1, c2, c3, c4 = fma(g, v0, c0), fma(g, v1, c1), fma(g, v2, c2), fma(g, v3, c3), fma(g, v4, c4)
            g = load(grad, p + 3 * plane)
            d0, d1, d2, d3, d4 = fma(g, v0, d0), fma(g, v1, d1), fma(g, v2, d2), fma(g, v3, d3), fma(g, v4, d4)
            p += L
            q += L
    add_totals(dw[r], t, a0, a1, a2, a3, a4)
    add_totals(dw[r + 1], t, b0, b1, b2, b3, b4)
    add_totals(dw[r + 2], t, c0, c1, c2, c3, c4)
    add_totals(dw[r + 3], t, d0, d1, d2, d3, d4)


@inner
def add_totals(row, t, v0, v1, v2, v3, v4):
    to = row[t:]
    to[0], to[1], to[2] = to[0] + total(v0), to[1] + total(v1), to[2] + total(v2)
    to[3], to[4] = to[3] + total(v3), to[4] + total(v4)


@inner
def sum_plane(grad, start, pitch, OH, OW):
    """Sum over the lanes of OH x OW pixels."""
    L, sums = width(grad), zero(grad)
    one = grad.dtype.type(1)
    for i in range(OH):
        for j in range(OW):
            sums = fma(one, load(grad, start + (i * pitch + j) * L), sums)
    return total(sums)
