"""2-D convolution (cross-correlation, as in every framework), forward and backward.

    y[n, o, i, j] = b[o] + sum over c, u, v of w[o, c, u, v] * x[n, c, i*sh + u*dh - ph, j*sw + v*dw - pw]

x: (N, C, H, W)   w: (O, C/groups, KH, KW)   b: (O,) or (0,) for none   y: (N, O, OH, OW)
stride (sh, sw), padding (ph, pw), dilation (dh, dw): pairs; pixels outside the image count as zero.  OH and OW are the
caller's choice: with stride one the last windows may reach further over the edge than the first ones do.

The textbook way is im2col: copy the pixel that tap k meets at every output position into row k of a column matrix, and
multiply by the weights.  That is what happens here for strides above one.  For stride one the copy is not needed: on a
zero-padded image stored row after row, the pixels that tap (u, v) meets are the image itself, shifted by u*pitch + v.
A row of the column matrix is then just an offset into the image, and both ways share all arithmetic.  What a window
meets between the last column of one row and the first of the next is computed too, and dropped.

Batches are interleaved, as many images as a vector has lanes (see layout.py), and direct_conv.py convolves them with a
pixel a vector.  What is in this file is for the few images that are not worth a tile, one by one, with vectors along
the rows.
"""

import numpy as np
from numba import prange

from tinycnn.kernels._jit import device_function, kernel
from tinycnn.kernels._simd import broadcast_rows, fma_outer, load_indexed, ravel, reduce_add, store_block, width, zeros
from tinycnn.kernels.direct_conv import CHUNKS, conv2d_backward_direct, conv2d_forward_direct
from tinycnn.kernels.layout import via_nchw
from tinycnn.kernels.linear import linear_backward, linear_forward
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
from tinycnn.kernels.pooling import clear

MAPS, TAPS = 3, 5  # output maps and taps of a block of weight gradients
PRODUCTS = MAPS * TAPS

products_block = device_function(lambda x: zeros(x, PRODUCTS))


def conv2d_forward(y, x, w, b, stride, padding, dilation, groups):
    """y = conv(x, w) + b; shapes at the top of this file, or x and y tiled."""
    if is_full_window(y, x, w, padding, groups):
        as_linear(y, x, w, b)
    elif x.ndim == 5:
        conv2d_forward_direct(y, x, w, b, stride, padding, dilation, groups)
    else:
        forward = conv2d_forward_shifted if stride == (1, 1) else conv2d_forward_im2col
        forward(y, x, w, b, stride, padding, dilation, groups)


def conv2d_backward(dx, dw, db, dy, x, w, stride, padding, dilation, groups):
    """Gradients of all three arguments of `conv2d_forward`; dx and db of size 0 are not computed."""
    if is_full_window(dy, x, w, padding, groups):
        as_linear_backward(dx, dw, db, dy, x, w)
    elif x.ndim == 5:
        conv2d_backward_direct(dx, dw, db, dy, x, w, stride, padding, dilation, groups)
    else:
        backward = conv2d_backward_shifted if stride == (1, 1) else conv2d_backward_im2col
        backward(dx, dw, db, dy, x, w, stride, padding, dilation, groups)


def is_full_window(y, x, w, padding, groups):
    """Whether a window is the whole image: then the convolution is a fully connected layer (C5 of 1998)."""
    return groups == 1 and padding == (0, 0) and x.shape[2:4] == w.shape[2:] and y.shape[2:4] == (1, 1)


@via_nchw(0)
def as_linear(y, x, w, b):
    linear_forward(as_rows(y), as_rows(x), as_rows(w), b)


@via_nchw(0)
def as_linear_backward(dx, dw, db, dy, x, w):
    linear_backward(as_rows(dx), as_rows(dw), db, as_rows(dy), as_rows(x), as_rows(w))


def as_rows(array):
    """(N, C, H, W) as (N, C*H*W)"""
    return array.reshape(len(array), array.shape[1] * array.shape[2] * array.shape[3])


# --- what both ways share ---------------------------------------------------------------------------------------------
# A *run* is what is computed of one map: all its rows, `pitch` apart, with what lies between them.  Vectors reach over
# its end, so whatever a run reads has room for two more.


@device_function
def run_length(y, pitch):
    """Of a plane (OH, OW), rounded up to pairs of vectors."""
    return round_up((y.shape[0] - 1) * pitch + y.shape[1], 2 * width(y))


@device_function
def combine(y, src, at, pitch, weight, bias, shape, steps, like):
    """y[r, i, j] = bias[r] + sum of weight[r, c, u, v] * src[at + i*pitch + j + c*steps[0] + u*steps[1] + v*steps[2]]

    y: (count, OH, OW)   src: flat   weight: see `pack`; of maps of `shape`: (C, KH, KW)   like: a block, for its size
    """
    (count, OH, OW), (C, KH, KW), block, W = y.shape, shape, len(like) // 2, width(y)
    length, taps = run_length(y[0], pitch), C * KH * KW
    out, offset = np.empty(block * length, y.dtype), tap_offsets(C, KH, KW, steps[0], steps[1], steps[2])
    for r in range(0, count, block):
        for k in range(0, length, 2 * W):
            sums = microkernel(broadcast_rows(bias, r, like), src, at + k, offset, 0, taps, W, weight, r * taps)
            store_block(out, k, length, W, sums, block)
        for one in range(min(block, count - r)):
            for i in range(OH):
                to, run = y[r + one, i], out[one * length + i * pitch :]
                for j in range(OW):
                    to[j] = run[j]


@device_function
def combine_maps(y, src, at, pitch, weight, bias, shape, steps, block):
    """`combine` with blocks of as many maps as the weights are packed in."""
    if block == MR_WIDE:
        combine(y, src, at, pitch, weight, bias, shape, steps, wide_accumulators(src))
    else:
        combine(y, src, at, pitch, weight, bias, shape, steps, narrow_accumulators(src))


@device_function
def correlate(dw, rows, first, between, src, offset, length):
    """dw[o, t] += sum over k < length of rows[first + o*between + k] * src[offset[t] + k].

    dw: (O, T)   rows, src: flat   offset: (>= T rounded up to TAPS,)   length: a multiple of a vector
    """
    (O, T), W, none = dw.shape, width(src), products_block(src)
    left, right, totals = zeros(src, MAPS), zeros(src, TAPS), np.empty(round_up(MAPS * TAPS, W), src.dtype)
    lines = np.empty(round_up(O, MAPS), np.int64)
    for o in range(lines.size):
        lines[o] = first + min(o, O - 1) * between
    for o in range(0, O, MAPS):
        for t in range(0, T, TAPS):
            sums = none
            for k in range(0, length, W):
                sums = fma_outer(sums, load_indexed(rows, k, lines, o, left), load_indexed(src, k, offset, t, right))
            for i in range(totals.size):
                totals[i] = 0
            reduce_add(totals, 0, sums)
            for i in range(min(MAPS, O - o)):
                for k in range(min(TAPS, T - t)):
                    dw[o + i, t + k] += totals[i * TAPS + k]


@device_function
def lay_out(flat, images, first, count, start, pitch, plane):
    """flat[c*plane + start + i*pitch + j] = images[first + c, i, j]"""
    for c in range(count):
        for i in range(images.shape[1]):
            to, row = flat[c * plane + start + i * pitch :], images[first + c, i]
            for j in range(row.size):
                to[j] = row[j]


@device_function
def add_sums(db, dy):
    """db[o] += sum of plane o of one image."""
    for o in range(len(dy)):
        plane, total = ravel(dy[o]), dy.dtype.type(0)
        for k in range(plane.size):
            total += plane[k]
        db[o] += total


@device_function
def biases(b, groups, count):
    """b, (O,) or (0,), as (groups, count >= O/groups), filled up with zeros."""
    bias = np.zeros((groups, count), b.dtype)
    for o in range(b.size):
        bias[o // (b.size // groups), o % (b.size // groups)] = b[o]
    return bias


@device_function
def image_of(dx, n):
    """Image n of a gradient, or nothing if it is not wanted."""
    return dx[n] if dx.size else dx.reshape((dx.size, 0, 0))


@device_function
def add_parts(to, parts):
    """to = the sum of the parts, in order; both flat, to may be of size 0."""
    for k in range(to.size):
        to[k] = parts[0, k]
    for part in range(1, len(parts)):
        for k in range(to.size):
            to[k] += parts[part, k]


# --- stride one: the image is its own column matrix -------------------------------------------------------------------


@device_function
def forward_one(y, x, weight, bias, shape, padding, dilation, block):
    """One image.  y: (O, OH, OW)   x: (C, H, W)   weight, bias: (groups, ...)"""
    (_, KH, KW), (ph, pw), groups = shape, padding, len(weight)
    per, count, pitch = len(x) // groups, len(y) // groups, y.shape[2] + (KW - 1) * dilation[1]
    plane = (y.shape[1] + (KH - 1) * dilation[0]) * pitch
    flat = np.zeros(per * plane + 2 * width(x), x.dtype)
    steps = plane, dilation[0] * pitch, dilation[1]
    for g in range(groups):
        lay_out(flat, x, g * per, per, ph * pitch + pw, pitch, plane)
        combine_maps(y[g * count : (g + 1) * count], flat, 0, pitch, weight[g], bias[g], shape, steps, block)


@kernel
def conv2d_forward_shifted(y, x, w, b, stride, padding, dilation, groups):
    shape, block = w.shape[1:], choose_mr(len(w) // groups, MR_WIDE, MR_NARROW)
    weight = pack(w, groups, block, False, False)
    bias = biases(b, groups, round_up(len(w) // groups, block))
    for n in prange(len(x)):
        forward_one(y[n], x[n], weight, bias, shape, padding, dilation, block)


@device_function
def backward_one(dx, dw, dy, x, turned, kernel_size, padding, dilation, block):
    """One image; adds to dw: (O, C/groups * KH * KW).  turned: see `pack`"""
    groups, (KH, KW), (ph, pw), (dh, dw_) = len(turned), kernel_size, padding, dilation
    per, count, pitch = len(x) // groups, len(dy) // groups, dy.shape[2] + (KW - 1) * dw_
    plane, length = (dy.shape[1] + (KH - 1) * dh) * pitch, run_length(dy[0], pitch)
    # dy is laid out with the pitch of x, so that one product serves the weight gradient; the zeros that end each of its
    # rows, dilation*(KW - 1) of them, are also those that begin the next, and `front` of them lie before the first.
    front = (KH - 1) * dh * pitch + (KW - 1) * dw_
    plane_dy, room = front + max(plane, length), 2 * width(x)
    flat, slopes = np.zeros(per * plane + room, x.dtype), np.zeros(count * plane_dy + room, x.dtype)
    offset = np.zeros(round_up(per * KH * KW, TAPS), np.int64)
    for c in range(per):
        for u in range(KH):
            for v in range(KW):
                offset[(c * KH + u) * KW + v] = c * plane + u * dh * pitch + v * dw_
    base, none = ph * pitch + pw, np.zeros(round_up(per, block), x.dtype)
    for g in range(groups):
        lay_out(flat, x, g * per, per, base, pitch, plane)
        lay_out(slopes, dy, g * count, count, front, pitch, plane_dy)
        correlate(dw[g * count : (g + 1) * count], slopes, front, plane_dy, flat, offset, length)
        if dx.size:
            shape, steps = (count, KH, KW), (plane_dy, dh * pitch, dw_)
            combine_maps(dx[g * per : (g + 1) * per], slopes, base, pitch, turned[g], none, shape, steps, block)


@kernel
def conv2d_backward_shifted(dx, dw, db, dy, x, w, stride, padding, dilation, groups):
    N, O, taps = len(x), len(w), w[0].size
    block = choose_mr(w.shape[1], MR_WIDE, MR_NARROW)
    turned = pack(w, groups, block, True, False)
    chunks = min(CHUNKS, N)
    parts, bias_parts = np.zeros((chunks, O, taps), x.dtype), np.zeros((chunks, db.size), x.dtype)
    for chunk in prange(chunks):
        for n in range(chunk * N // chunks, (chunk + 1) * N // chunks):
            kernel_size = w.shape[2], w.shape[3]
            backward_one(
                image_of(dx, n), parts[chunk], dy[n], x[n], turned, kernel_size, padding, dilation, block
            )  # fmt: skip
            if db.size:
                add_sums(bias_parts[chunk], dy[n])
    add_parts(ravel(dw), parts.reshape((chunks, O * taps)))
    add_parts(db, bias_parts)


# --- any stride: im2col, product, col2im ------------------------------------------------------------------------------


@device_function
def image_to_columns(columns, image, first, count, KH, KW, OH, OW, stride, padding, dilation):
    """columns[((c*KH + u)*KW + v)*OH*OW + i*OW + j] = image[first + c, i*sh + u*dh - ph, j*sw + v*dw - pw] or zero."""
    H, W = image.shape[1], image.shape[2]
    at = 0
    for c in range(count):
        for u in range(KH):
            for v in range(KW):
                for i in range(OH):
                    y = i * stride[0] + u * dilation[0] - padding[0]
                    inside = 0 <= y < H
                    for j in range(OW):
                        x = j * stride[1] + v * dilation[1] - padding[1]
                        columns[at] = image[first + c, y, x] if inside and 0 <= x < W else columns.dtype.type(0)
                        at += 1


@device_function
def columns_to_image(image, columns, first, count, KH, KW, OH, OW, stride, padding, dilation):
    """The transpose of `image_to_columns`: adds every column entry to the pixel that it was copied from."""
    H, W = image.shape[1], image.shape[2]
    at = 0
    for c in range(count):
        for u in range(KH):
            for v in range(KW):
                for i in range(OH):
                    y = i * stride[0] + u * dilation[0] - padding[0]
                    inside = 0 <= y < H
                    for j in range(OW):
                        x = j * stride[1] + v * dilation[1] - padding[1]
                        if inside and 0 <= x < W:
                            image[first + c, y, x] += columns[at]
                        at += 1


@kernel
def im2col(columns, x, kernel_size, out_size, stride, padding, dilation):
    """columns: (N, C*KH*KW, OH*OW) from x: (N, C, H, W); out_size is (OH, OW).  torch calls it unfold."""
    N, C = x.shape[0], x.shape[1]
    for n in prange(N):
        KH, KW = kernel_size
        flat = ravel(columns[n])
        image_to_columns(flat, x[n], 0, C, KH, KW, out_size[0], out_size[1], stride, padding, dilation)


@kernel
def col2im(x, columns, kernel_size, out_size, stride, padding, dilation):
    """x: (N, C, H, W), each pixel the sum of its copies in columns: (N, C*KH*KW, OH*OW).  torch calls it fold."""
    N, C = x.shape[0], x.shape[1]
    for n in prange(N):
        KH, KW = kernel_size
        clear(x[n])
        flat = ravel(columns[n])
        columns_to_image(x[n], flat, 0, C, KH, KW, out_size[0], out_size[1], stride, padding, dilation)


@device_function
def forward_image(y, x, weight, bias, kernel_size, stride, padding, dilation, block):
    """One image.  y: (O, OH, OW)   x: (C, H, W)   weight, bias: (groups, ...)"""
    (O, OH, OW), (KH, KW), groups = y.shape, kernel_size, len(weight)
    per, count, M = len(x) // groups, O // groups, OH * OW
    columns = np.zeros(per * KH * KW * M + 2 * width(x), x.dtype)
    for g in range(groups):
        image_to_columns(columns, x, g * per, per, KH, KW, OH, OW, stride, padding, dilation)
        out = y[g * count : (g + 1) * count]
        combine_maps(out, columns, 0, OW, weight[g], bias[g], (1, 1, per * KH * KW), (0, 0, M), block)


@kernel
def conv2d_forward_im2col(y, x, w, b, stride, padding, dilation, groups):
    kernel_size, block = w.shape[2:], choose_mr(len(w) // groups, MR_WIDE, MR_NARROW)
    weight = pack(w, groups, block, False, False)
    bias = biases(b, groups, round_up(len(w) // groups, block))
    for n in prange(len(x)):
        forward_image(y[n], x[n], weight, bias, kernel_size, stride, padding, dilation, block)


@device_function
def backward_image(dx, dw, dy, x, transposed, kernel_size, stride, padding, dilation, block):
    """One image; adds to dw: (O, C/groups * KH * KW).  transposed: the weights that lead from dy to columns"""
    (O, OH, OW), (KH, KW), groups, W = dy.shape, kernel_size, len(transposed), width(x)
    per, count, M = len(x) // groups, O // groups, OH * OW
    K, length = per * KH * KW, round_up(M, 2 * W)
    columns, slopes = np.zeros(K * M + 2 * W, x.dtype), np.zeros(count * length, x.dtype)
    offset = np.arange(round_up(K, TAPS)) * M
    offset[K:] = 0
    none = np.zeros(round_up(K, block), x.dtype)
    for g in range(groups):
        image_to_columns(columns, x, g * per, per, KH, KW, OH, OW, stride, padding, dilation)
        lay_out(slopes, dy, g * count, count, 0, OW, length)
        correlate(dw[g * count : (g + 1) * count], slopes, 0, length, columns, offset, length)
        if dx.size:
            back = columns[: K * M].reshape((K, 1, M))
            combine_maps(back, slopes, 0, 0, transposed[g], none, (count, 1, 1), (length, 0, 0), block)
            columns_to_image(dx, columns, g * per, per, KH, KW, OH, OW, stride, padding, dilation)


@kernel
def conv2d_backward_im2col(dx, dw, db, dy, x, w, stride, padding, dilation, groups):
    N, O, taps = len(x), len(w), w[0].size
    block = choose_mr(taps, MR_WIDE, MR_NARROW)
    w_t = w.reshape(groups, O // groups, taps).transpose(0, 2, 1).copy()  # columns of dx = w_t @ dy
    transposed = pack(w_t.reshape((groups * taps, O // groups, 1, 1)), groups, block, False, False)
    chunks = min(CHUNKS, N)
    parts, bias_parts = np.zeros((chunks, O, taps), x.dtype), np.zeros((chunks, db.size), x.dtype)
    for chunk in prange(chunks):
        for n in range(chunk * N // chunks, (chunk + 1) * N // chunks):
            kernel_size = w.shape[2], w.shape[3]
            to = image_of(dx, n)
            clear(to)
            backward_image(
                to, parts[chunk], dy[n], x[n], transposed, kernel_size, stride, padding, dilation, block
            )  # fmt: skip
            if db.size:
                add_sums(bias_parts[chunk], dy[n])
    add_parts(ravel(dw), parts.reshape((chunks, O * taps)))
    add_parts(db, bias_parts)
