"""2-D convolution (cross-correlation, as in every framework), forward and backward.

    y[n, o, i, j] = b[o] + sum over c, u, v of w[o, c, u, v] * x[n, c, i*sh + u*dh - ph, j*sw + v*dw - pw]

x: (N, C, H, W)   w: (O, C/groups, KH, KW)   b: (O,) or (0,) for none   y: (N, O, OH, OW)
stride (sh, sw), padding (ph, pw), dilation (dh, dw): pairs; pixels outside the image count as zero.

The textbook way is im2col: copy the pixel that tap k meets at every output position into row k of a column matrix, and
multiply by the weights.  That is what happens here for strides above one.  For stride one the copy is not needed: on a
zero-padded image stored row after row, the pixels that tap (u, v) meets are the image itself, shifted by u*pitch + v.
A row of the column matrix is then just an offset into the image (see rows.py), and both ways share all arithmetic.

Rows of small images are short (LeNet's C3: ten pixels), and short loops are slow.  So batches are interleaved, as many
images as a vector has lanes (see tiles.py), and tiled_conv.py does both strides with a pixel a vector.  What is in this
file is for the few images that are not worth a tile, one by one, with vectors along rows.
"""

import numpy as np
from numba import prange

from tinycnn.kernels._jit import inner, kernel
from tinycnn.kernels.linear import linear_backward, linear_forward
from tinycnn.kernels.rows import DOTS, PITCH, SUMS, TAPS, ceil_to, combine, correlate
from tinycnn.kernels.tiled_conv import CHUNKS, conv2d_backward_tiled, conv2d_forward_tiled
from tinycnn.kernels.tiles import on_images

LONG = 64  # a run this long needs no company; shorter rows are taken several at a time


def conv2d_forward(y, x, w, b, stride, padding, dilation, groups):
    """y = conv(x, w) + b; shapes at the top of this file, or x and y tiled."""
    if covers(x, w, padding, groups):
        as_linear(y, x, w, b)
    elif x.ndim == 5:
        conv2d_forward_tiled(y, x, w, b, stride, padding, dilation, groups)
    else:
        forward = conv2d_forward_shifted if stride == (1, 1) else conv2d_forward_columns
        forward(y, x, w, b, stride, padding, dilation, groups)


def conv2d_backward(dx, dw, db, dy, x, w, stride, padding, dilation, groups):
    """Gradients of all three arguments of `conv2d_forward`; dx and db of size 0 are not computed."""
    if covers(x, w, padding, groups):
        as_linear_backward(dx, dw, db, dy, x, w)
    elif x.ndim == 5:
        conv2d_backward_tiled(dx, dw, db, dy, x, w, stride, padding, dilation, groups)
    else:
        backward = conv2d_backward_shifted if stride == (1, 1) else conv2d_backward_columns
        backward(dx, dw, db, dy, x, w, stride, padding, dilation, groups)


def covers(x, w, padding, groups):
    """Whether a window is the whole image: then the convolution is a fully connected layer (C5 of 1998)."""
    return groups == 1 and padding == (0, 0) and x.shape[2:4] == w.shape[2:]


@on_images(0)
def as_linear(y, x, w, b):
    linear_forward(as_rows(y), as_rows(x), as_rows(w), b)


@on_images(0)
def as_linear_backward(dx, dw, db, dy, x, w):
    linear_backward(as_rows(dx), as_rows(dw), db, as_rows(dy), as_rows(x), as_rows(w))


def as_rows(array):
    """(N, C, H, W) as (N, C*H*W)"""
    return array.reshape(len(array), array.shape[1] * array.shape[2] * array.shape[3])


# --- what both ways share ---------------------------------------------------------------------------------------------
# Taps are listed kernel row by kernel row: tap (u, c, v) has number u*group + c*KW + v, where each kernel row is filled
# up with taps of weight zero to a multiple of TAPS.


@inner
def tap_offsets(channels, KH, KW, step_c, step_u, step_v):
    """Where the row of each tap starts in the flat source."""
    group = ceil_to(channels * KW, TAPS)
    offset = np.empty(KH * group, np.int64)
    for u in range(KH):
        for t in range(u * group, (u + 1) * group):
            offset[t] = u * step_u
        for c in range(channels):
            for v in range(KW):
                offset[u * group + c * KW + v] = c * step_c + u * step_u + v * step_v
    return offset


@inner
def tap_weights(w, groups):
    """w as (groups, >= O/groups, taps)."""
    O, C, KH, KW = w.shape
    per = O // groups
    group = ceil_to(C * KW, TAPS)
    weight = np.zeros((groups, ceil_to(per, SUMS), KH * group), w.dtype)
    for o in range(O):
        for c in range(C):
            for u in range(KH):
                for v in range(KW):
                    weight[o // per, o % per, u * group + c * KW + v] = w[o, c, u, v]
    return weight


@inner
def tap_weights_flipped(w, groups):
    """w turned by 180 degrees, inputs and outputs exchanged: the weights with which dy gives dx."""
    O, C, KH, KW = w.shape
    per = O // groups
    group = ceil_to(per * KW, TAPS)
    weight = np.zeros((groups, ceil_to(C, SUMS), KH * group), w.dtype)
    for o in range(O):
        for c in range(C):
            for u in range(KH):
                for v in range(KW):
                    weight[o // per, c, (KH - 1 - u) * group + o % per * KW + KW - 1 - v] = w[o, c, u, v]
    return weight


@inner
def sum_chunks(dw, db, dw_part, db_part):
    """dw[o, c, u, v] and db[o] from the parts, added in order.  dw_part: (CHUNKS, groups, >= O/groups, taps)"""
    O, C, KH, KW = dw.shape
    chunks, groups = dw_part.shape[0], dw_part.shape[1]
    per = O // groups
    group = ceil_to(C * KW, TAPS)
    for o in range(O):
        total = dw_part[0, o // per, o % per]
        for part in range(1, chunks):
            more = dw_part[part, o // per, o % per]
            for t in range(total.size):
                total[t] += more[t]
        for c in range(C):
            for u in range(KH):
                for v in range(KW):
                    dw[o, c, u, v] = total[u * group + c * KW + v]
    for o in range(db.size):
        db[o] = db_part[0, o]
        for part in range(1, chunks):
            db[o] += db_part[part, o]


@inner
def combine_image(y, n, first, count, src, base, pitch, offset, weight, bias, KH, dilation, top, height):
    """A convolution of one image: y[n, first + r] = bias + sum over taps of weight[r, tap] * shifted source.

    Output row i, column j reads src[offset[tap] + base + i*pitch + j].  Taps of kernel row u meet source row
    i + u*dilation - top; where that is outside 0 ... height they would only meet padding, and are left out.
    """
    OH, OW = y.shape[2], y.shape[3]
    group = offset.size // KH
    out = np.empty(SUMS * PITCH, y.dtype)
    columns = min(OW, PITCH)
    rows = 1
    if columns == OW and OW < LONG:
        rows = max(1, min(OH, PITCH // pitch))
        rows = (OH + (OH - 1) // rows) // ((OH - 1) // rows + 1)  # as few runs, of equal length
    for i0 in range(0, OH, rows):
        i1 = min(OH, i0 + rows)
        u0 = max(0, (top - i1 + dilation) // dilation)  # the first u with i1 - 1 + u*dilation >= top
        u1 = min(KH, (height + top - i0 + dilation - 1) // dilation)
        for j0 in range(0, OW, columns):
            j1 = min(OW, j0 + columns)
            m = (i1 - i0 - 1) * pitch + j1 - j0
            for r in range(0, count, SUMS):
                for i in range(SUMS):
                    value = bias[first + r + i] if bias.size and r + i < count else y.dtype.type(0)
                    fill(out[i * PITCH :], value, m)
                combine(out, src, base + i0 * pitch + j0, offset, weight, r, u0 * group, u1 * group, m)
                # The columns between two rows, where the kernel hangs over the edge, were computed too: dropped here.
                for r1 in range(r, min(count, r + SUMS)):
                    for i in range(i0, i1):
                        copy(y[n, first + r1, i, j0:], out[(r1 - r) * PITCH + (i - i0) * pitch :], j1 - j0)


@inner
def fill(dst, value, count):
    # Loops over slices start at zero: an index that might be negative keeps LLVM from vectorising.
    for j in range(count):
        dst[j] = value


@inner
def copy(dst, src, count):
    for j in range(count):
        dst[j] = src[j]


@inner
def total(src, count):
    s = src.dtype.type(0)
    for j in range(count):
        s += src[j]
    return s


# --- stride one: the image is its own column matrix -------------------------------------------------------------------


@inner
def copy_padded(dst, x, n, first, count, base, pitch, plane):
    """dst[c*plane + base + i*pitch + j] = x[n, first + c, i, j]"""
    for c in range(count):
        for i in range(x.shape[2]):
            copy(dst[c * plane + base + i * pitch :], x[n, first + c, i], x.shape[3])


@inner
def forward_one(y, x, weight, b, n, KH, KW, padding, dilation):
    """Image n.  weight: (groups, >= O/groups, taps)"""
    C, H, W = x.shape[1:]
    groups, O = len(weight), y.shape[1]
    per, per_o = C // groups, O // groups
    ph, pw = padding
    pitch, plane = W + 2 * pw, (H + 2 * ph) * (W + 2 * pw)
    offset = tap_offsets(per, KH, KW, plane, dilation[0] * pitch, dilation[1])
    src = np.zeros(per * plane, x.dtype)
    for g in range(groups):
        copy_padded(src, x, n, g * per, per, ph * pitch + pw, pitch, plane)
        combine_image(y, n, g * per_o, per_o, src, 0, pitch, offset, weight[g], b, KH, dilation[0], ph, H)


@kernel
def conv2d_forward_shifted(y, x, w, b, stride, padding, dilation, groups):
    weight = tap_weights(w, groups)
    for n in prange(len(x)):
        forward_one(y, x, weight, b, n, w.shape[2], w.shape[3], padding, dilation)


@inner
def backward_one(dx, dw, db, dy, x, flipped, n, KH, KW, padding, dilation):
    """Image n; adds to dw: (groups, >= O/groups, taps) and db: (O,)."""
    C, H, W = x.shape[1:]
    O, OH, OW = dy.shape[1:]
    groups = len(dw)
    per, per_o = C // groups, O // groups
    (ph, pw), (dilation_h, dilation_w) = padding, dilation
    pitch, plane = W + 2 * pw, (H + 2 * ph) * (W + 2 * pw)
    # dy is laid out with the pitch of x, so that one product serves the weight gradient; the zeros that end each of its
    # rows, dilation*(KW - 1) of them, are also those that begin the next, and `front` of them lie before the first.
    front = (KH - 1) * dilation_h * pitch + (KW - 1) * dilation_w
    plane_dy = front + plane
    offset = tap_offsets(per, KH, KW, plane, dilation_h * pitch, dilation_w)
    offset_dy = tap_offsets(per_o, KH, KW, plane_dy, dilation_h * pitch, dilation_w)
    m, base, top = (OH - 1) * pitch + OW, ph * pitch + pw, (KH - 1) * dilation_h - ph
    src = np.zeros(per * plane, x.dtype)
    rows = np.zeros((ceil_to(per_o, DOTS), plane_dy), x.dtype)
    flat, no_bias = rows.reshape(rows.size), src[:0]
    for g in range(groups):
        copy_padded(src, x, n, g * per, per, base, pitch, plane)
        copy_padded(flat, dy, n, g * per_o, per_o, front, pitch, plane_dy)
        for t in range(0, offset.size, TAPS):
            for r in range(0, per_o, DOTS):
                correlate(dw[g], src, offset, rows, front, r, t, m)
        for o in range(per_o):
            db[g * per_o + o] += total(rows[o, front:], m)
        if dx.size:
            combine_image(
                dx, n, g * per, per, flat, base, pitch, offset_dy, flipped[g], no_bias, KH, dilation_h, top, OH
            )  # fmt: skip


@kernel
def conv2d_backward_shifted(dx, dw, db, dy, x, w, stride, padding, dilation, groups):
    N = len(x)
    O, per, KH, KW = w.shape
    flipped = tap_weights_flipped(w, groups)
    chunks = min(CHUNKS, N)
    dw_part = np.zeros((chunks, groups, ceil_to(O // groups, DOTS), KH * ceil_to(per * KW, TAPS)), x.dtype)
    db_part = np.zeros((chunks, O), x.dtype)
    for chunk in prange(chunks):
        part, bias_part = dw_part[chunk], db_part[chunk]
        for n in range(chunk * N // chunks, (chunk + 1) * N // chunks):
            backward_one(dx, part, bias_part, dy, x, flipped, n, KH, KW, padding, dilation)
    sum_chunks(dw, db, dw_part, db_part)


# --- any stride: im2col, product, col2im ------------------------------------------------------------------------------


@inner
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


@inner
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
        flat = columns[n].reshape(columns[n].size)
        image_to_columns(flat, x[n], 0, C, KH, KW, out_size[0], out_size[1], stride, padding, dilation)


@kernel
def col2im(x, columns, kernel_size, out_size, stride, padding, dilation):
    """x: (N, C, H, W), each pixel the sum of its copies in columns: (N, C*KH*KW, OH*OW).  torch calls it fold."""
    N, C = x.shape[0], x.shape[1]
    for n in prange(N):
        KH, KW = kernel_size
        fill(x[n].reshape(x[n].size), x.dtype.type(0), x[n].size)
        flat = columns[n].reshape(columns[n].size)
        columns_to_image(x[n], flat, 0, C, KH, KW, out_size[0], out_size[1], stride, padding, dilation)


@inner
def forward_image(y, x, weight, b, n, KH, KW, stride, padding, dilation):
    """Image n.  weight: (groups, >= O/groups, taps)"""
    OH, OW = y.shape[2:]
    groups = len(weight)
    per, per_o, m = x.shape[1] // groups, y.shape[1] // groups, OH * OW
    offset = tap_offsets(per, KH, KW, KH * KW * m, KW * m, m)
    columns = np.empty(per * KH * KW * m, x.dtype)
    for g in range(groups):
        image_to_columns(columns, x[n], g * per, per, KH, KW, OH, OW, stride, padding, dilation)
        combine_image(y, n, g * per_o, per_o, columns, 0, OW, offset, weight[g], b, 1, 1, 0, OH)


@kernel
def conv2d_forward_columns(y, x, w, b, stride, padding, dilation, groups):
    weight = tap_weights(w, groups)
    for n in prange(len(x)):
        forward_image(y, x, weight, b, n, w.shape[2], w.shape[3], stride, padding, dilation)


@inner
def backward_image(dx, dw, db, dy, x, transposed, n, KH, KW, stride, padding, dilation):
    """Image n; adds to dw: (groups, >= O/groups, taps) and db: (O,).  transposed: (groups, >= C/groups*KH*KW, taps)"""
    O, OH, OW = dy.shape[1:]
    groups = len(dw)
    per, per_o, m = x.shape[1] // groups, O // groups, OH * OW
    K = per * KH * KW
    offset = tap_offsets(per, KH, KW, KH * KW * m, KW * m, m)
    offset_dy = tap_offsets(per_o, 1, 1, m, 0, 0)
    columns = np.empty(K * m, x.dtype)
    dcolumns = np.empty((1, K, OH, OW), x.dtype)
    flat, no_bias = dcolumns.reshape(dcolumns.size), columns[:0]
    rows = np.zeros((ceil_to(per_o, DOTS), m), x.dtype)
    for g in range(groups):
        image_to_columns(columns, x[n], g * per, per, KH, KW, OH, OW, stride, padding, dilation)
        for o in range(per_o):
            copy(rows[o], dy[n, g * per_o + o].reshape(m), m)
            db[g * per_o + o] += total(rows[o], m)
        for t in range(0, offset.size, TAPS):
            for r in range(0, per_o, DOTS):
                correlate(dw[g], columns, offset, rows, 0, r, t, m)
        if dx.size:
            src = rows.reshape(rows.size)
            combine_image(dcolumns, 0, 0, K, src, 0, OW, offset_dy, transposed[g], no_bias, 1, 1, 0, OH)
            columns_to_image(dx[n], flat, g * per, per, KH, KW, OH, OW, stride, padding, dilation)


@kernel
def conv2d_backward_columns(dx, dw, db, dy, x, w, stride, padding, dilation, groups):
    N = len(x)
    O, per, KH, KW = w.shape
    K = per * KH * KW
    w_t = w.reshape(groups, O // groups, K).transpose(0, 2, 1).copy()  # dcolumns = w_t @ dy
    transposed = tap_weights(w_t.reshape(groups * K, O // groups, 1, 1), groups)
    chunks = min(CHUNKS, N)
    dw_part = np.zeros((chunks, groups, ceil_to(O // groups, DOTS), KH * ceil_to(per * KW, TAPS)), x.dtype)
    db_part = np.zeros((chunks, O), x.dtype)
    for chunk in prange(chunks):
        for n in range(chunk * N // chunks, (chunk + 1) * N // chunks):
            if dx.size:
                fill(dx[n].reshape(dx[n].size), x.dtype.type(0), dx[n].size)
            backward_image(dx, dw_part[chunk], db_part[chunk], dy, x, transposed, n, KH, KW, stride, padding, dilation)
    sum_chunks(dw, db, dw_part, db_part)
