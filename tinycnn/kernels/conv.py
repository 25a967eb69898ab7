"""2-D convolution (cross-correlation, as in every framework), forward and backward.

    y[n, o, i, j] = b[o] + sum over c, u, v of w[o, c, u, v] * x[n, c, i*sh + u*dh - ph, j*sw + v*dw - pw]

x: (N, C, H, W)   w: (O, C/groups, KH, KW)   b: (O,) or (0,) for none   y: (N, O, OH, OW)
stride (sh, sw), padding (ph, pw), dilation (dh, dw): pairs; pixels outside the image count as zero.  The caller chooses
OH and OW: with stride one the padding may be larger at the end of an axis than at its start.

Three algorithms, all with the micro-kernel of microkernel.py:
- direct: batch-blocked layout, for all but the smallest batches; see direct_conv.py.
- shifted (stride one) and im2col (other strides): NCHW, for small batches; image by image, vectors along the rows.

im2col copies the pixels under tap k, for all output positions, into row k of a column matrix, which is multiplied by
the weights.  For stride one no copy is needed: in a zero-padded image, stored row after row, the pixels under tap
(u, v) are the image shifted by u*dh*pitch + v*dw.  So a row of the column matrix is an offset into the image:

    padded image, flat: rows of pitch = OW + (KW - 1)*dw      output channel, flat: rows of pitch
    ┌───────────┬───────────┬───────────┬───────────┬─        ┌─────────┬─┬─────────┬─┬─────────┬─
    │ row 0     │ row 1     │ row 2     │ row 3     │         │ y row 0 │#│ y row 1 │#│ y row 2 │
    └───────────┴───────────┴───────────┴───────────┴─        └─────────┴─┴─────────┴─┴─────────┴─
    ├─ tap (0, 0) reads from here on ───►                     #: windows that wrap around: computed
      ├─ tap (0, 2) from 2*dw further ────►                   too, but not copied to y
                ├─ tap (1, 0) from dh*pitch further (dh = 1) ──────►

    for o in blocks of MR channels            2*MR accumulators stay in registers for all taps
      for positions of the run, two vectors   consecutive: image and run stay in L1 or L2
        for k in taps (c, u, v)               two loads, MR broadcasts, 2*MR multiply-adds
"""

import numpy as np
from numba import prange

from tinycnn.kernels import _simd
from tinycnn.kernels._jit import device_function, kernel
from tinycnn.kernels.direct_conv import CHUNKS, conv2d_backward_direct, conv2d_forward_direct
from tinycnn.kernels.layout import via_nchw
from tinycnn.kernels.linear import linear_backward, linear_forward
from tinycnn.kernels.microkernel import (
    MR_NARROW,
    MR_WIDE,
    choose_mr,
    microkernel,
    narrow_accumulators,
    round_up,
    tap_offsets,
    wide_accumulators,
)
from tinycnn.kernels.pooling import clear

broadcast_rows, fma_outer, load_indexed, ravel = _simd.broadcast_rows, _simd.fma_outer, _simd.load_indexed, _simd.ravel
reduce_add, store_block, width, zeros = _simd.reduce_add, _simd.store_block, _simd.width, _simd.zeros

GRAD_MR, GRAD_NR = 3, 5  # register block of weight gradients: output channels, and taps
GRAD_SIZE = GRAD_MR * GRAD_NR

grad_accumulators = device_function(lambda x: zeros(x, GRAD_SIZE))


def conv2d_forward(y, x, w, b, stride, padding, dilation, groups):
    """y = conv(x, w) + b; shapes at the top of this file, or x and y in the batch-blocked layout."""
    if is_full_window(y, x, w, padding, groups):
        as_linear(y, x, w, b)
    elif x.ndim == 5:
        conv2d_forward_direct(y, x, w, b, stride, padding, dilation, groups)
    else:
        forward = conv2d_forward_shifted if stride == (1, 1) else conv2d_forward_im2col
        forward(y, x, w, b, stride, padding, dilation, groups)


def conv2d_backward(dx, dw, db, dy, x, w, stride, padding, dilation, groups):
    """Gradients of all three arguments of `conv2d_forward`; those of size 0 are not computed.  db needs dw."""
    if is_full_window(dy, x, w, padding, groups):
        as_linear_backward(dx, dw, db, dy, x, w)
    elif x.ndim == 5:
        conv2d_backward_direct(dx, dw, db, dy, x, w, stride, padding, dilation, groups)
    else:
        backward = conv2d_backward_shifted if stride == (1, 1) else conv2d_backward_im2col
        backward(dx, dw, db, dy, x, w, stride, padding, dilation, groups)


def is_full_window(y, x, w, padding, groups):
    """Whether one window covers the whole image: then the convolution is a fully connected layer (C5 of LeNet-5)."""
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


# --- shared by shifted and im2col -------------------------------------------------------------------------------------
# A *run* is one output channel as computed: its rows, `pitch` apart, and the gaps between them.  Vectors reach beyond
# its end, so its source buffers have two vectors to spare.


@device_function
def run_length(y, pitch):
    """Length of the run of a plane (OH, OW), rounded up to pairs of vectors."""
    return round_up((y.shape[0] - 1) * pitch + y.shape[1], 2 * width(y))


@device_function
def conv_rows(y, src, start, pitch, weight, bias, shape, steps, like):
    """y[r, i, j] = bias[r] + sum of weight[r, c, u, v] * src[start + i*pitch + j + (c, u, v) . steps].

    y: (count, OH, OW)   src: flat   weight, bias: of one group, see `pad_channels`
    shape: (C, KH, KW)   like: accumulators, for their number
    """
    (count, OH, OW), (C, KH, KW), mr, W = y.shape, shape, len(like) // 2, width(y)
    length, taps = run_length(y[0], pitch), C * KH * KW
    out, offsets = np.empty(mr * length, y.dtype), tap_offsets(C, KH, KW, steps[0], steps[1], steps[2])
    for block in range(0, count, mr):
        r = max(0, min(block, count - mr))  # the last block overlaps the one before it
        for k in range(0, length, 2 * W):
            acc = broadcast_rows(bias, r, like)
            # The weights are not packed, which would take longer than reading them for one image.
            acc = microkernel(acc, src, start + k, offsets, 0, taps, W, weight, r * taps, 1, taps)
            store_block(out, k, length, W, acc, mr)
        for o in range(min(mr, count - r)):
            for i in range(OH):
                row, run = y[r + o, i], out[o * length + i * pitch :]
                for j in range(OW):
                    row[j] = run[j]


@device_function
def conv_rows_by_mr(y, src, start, pitch, weight, bias, shape, steps, mr):
    """`conv_rows` with register blocks of `mr` output channels."""
    if mr == MR_WIDE:
        conv_rows(y, src, start, pitch, weight, bias, shape, steps, wide_accumulators(src))
    else:
        conv_rows(y, src, start, pitch, weight, bias, shape, steps, narrow_accumulators(src))


@device_function
def weight_grad(dw, dy, dy_start, dy_step, src, offsets, length):
    """dw[o, t] += sum over k < length of dy[dy_start + o*dy_step + k] * src[offsets[t] + k].

    dw: (O, T)   dy, src: flat   offsets: at least T rounded up to GRAD_NR   length: a multiple of a vector
    """
    (O, T), W, zero = dw.shape, width(src), grad_accumulators(src)
    dy_like, src_like, totals = zeros(src, GRAD_MR), zeros(src, GRAD_NR), np.empty(round_up(GRAD_SIZE, W), src.dtype)
    dy_offsets = np.empty(round_up(O, GRAD_MR), np.int64)
    for o in range(dy_offsets.size):
        dy_offsets[o] = dy_start + min(o, O - 1) * dy_step
    for o in range(0, O, GRAD_MR):
        for t in range(0, T, GRAD_NR):
            acc = zero
            for k in range(0, length, W):
                dy_vectors = load_indexed(dy, k, dy_offsets, o, dy_like)
                acc = fma_outer(acc, dy_vectors, load_indexed(src, k, offsets, t, src_like))
            for i in range(totals.size):
                totals[i] = 0
            reduce_add(totals, 0, acc)
            for i in range(min(GRAD_MR, O - o)):
                for k in range(min(GRAD_NR, T - t)):
                    dw[o + i, t + k] += totals[i * GRAD_NR + k]


@device_function
def pad_rows(flat, images, first, count, start, pitch, plane):
    """flat[c*plane + start + i*pitch + j] = images[first + c, i, j]; other entries are unchanged."""
    for c in range(count):
        for i in range(images.shape[1]):
            out, row = flat[c * plane + start + i * pitch :], images[first + c, i]
            for j in range(row.size):
                out[j] = row[j]


@device_function
def add_bias_grad(db, dy):
    """db[o] += sum of plane o of one image."""
    for o in range(len(dy)):
        plane, total = ravel(dy[o]), dy.dtype.type(0)
        for k in range(plane.size):
            total += plane[k]
        db[o] += total


@device_function
def pad_bias(b, groups, count):
    """b, (O,) or (0,), as (groups, count), padded with zeros; count >= O/groups."""
    bias = np.zeros((groups, count), b.dtype)
    for o in range(b.size):
        bias[o // (b.size // groups), o % (b.size // groups)] = b[o]
    return bias


@device_function
def pad_channels(array, groups, mr):
    """Weights by output channel, (O, ...), as (groups, ...): at least `mr` channels a group, the missing ones zeros."""
    count, group_size = len(array) // groups, array.size // groups
    if count >= mr:
        return array.reshape((groups, group_size))
    flat, padded = ravel(array), np.zeros((groups, mr * (group_size // count)), array.dtype)
    for g in range(groups):
        for k in range(group_size):
            padded[g, k] = flat[g * group_size + k]
    return padded


@device_function
def flip(w, groups):
    """Weights of the input gradient: input and output channels of each group exchanged, the kernel rotated by 180
    degrees.   w: (O, C/groups, KH, KW) -> (C, O/groups, KH, KW)"""
    (O, per, KH, KW), count = w.shape, len(w) // groups
    flipped = np.empty((groups * per, count, KH, KW), w.dtype)
    for o in range(O):
        for c in range(per):
            source, target = w[o, c], flipped[o // count * per + c, o % count]
            for u in range(KH):
                for v in range(KW):
                    target[u, v] = source[KH - 1 - u, KW - 1 - v]
    return flipped


@device_function
def image_of(dx, n):
    """Image n of dx, or an empty array if dx is not computed."""
    return dx[n] if dx.size else dx.reshape((dx.size, 0, 0))


@device_function
def reduce_partials(total, partials):
    """total = sum of the partials, in order; total is flat and may be of size 0."""
    for k in range(total.size):
        total[k] = partials[0, k]
    for part in range(1, len(partials)):
        for k in range(total.size):
            total[k] += partials[part, k]


# --- shifted: stride one, the image is its own column matrix ----------------------------------------------------------


@device_function
def forward_shifted_image(y, x, weight, bias, shape, padding, dilation, mr):
    """y: (O, OH, OW)   x: (C, H, W)   weight, bias: see `pad_channels`   shape: (C/groups, KH, KW)"""
    (_, KH, KW), (ph, pw), groups = shape, padding, len(weight)
    per, count, pitch = len(x) // groups, len(y) // groups, y.shape[2] + (KW - 1) * dilation[1]
    plane = (y.shape[1] + (KH - 1) * dilation[0]) * pitch
    padded = np.zeros(per * plane + 2 * width(x), x.dtype)
    steps = plane, dilation[0] * pitch, dilation[1]
    for g in range(groups):
        pad_rows(padded, x, g * per, per, ph * pitch + pw, pitch, plane)
        conv_rows_by_mr(y[g * count : (g + 1) * count], padded, 0, pitch, weight[g], bias[g], shape, steps, mr)


@kernel
def conv2d_forward_shifted(y, x, w, b, stride, padding, dilation, groups):
    shape, mr = w.shape[1:], choose_mr(len(w) // groups, MR_WIDE, MR_NARROW)
    weight, bias = pad_channels(w, groups, mr), pad_bias(b, groups, max(mr, len(w) // groups))
    for n in prange(len(x)):
        forward_shifted_image(y[n], x[n], weight, bias, shape, padding, dilation, mr)


@device_function
def backward_shifted_image(dx, dw, dy, x, flipped, kernel_size, padding, dilation, mr):
    """Input gradient of one image; its weight gradient is added to dw: (O, C/groups * KH * KW), or of size 0.  flipped:
    see `pad_channels`"""
    groups, (KH, KW), (ph, pw), (dil_h, dil_w) = len(flipped), kernel_size, padding, dilation
    per, count, pitch = len(x) // groups, len(dy) // groups, dy.shape[2] + (KW - 1) * dil_w
    plane, length = (dy.shape[1] + (KH - 1) * dil_h) * pitch, run_length(dy[0], pitch)
    # dy is padded to the pitch of x, so that one product of runs gives the weight gradient.  The (KW - 1)*dil_w zeros
    # after each of its rows are also the padding before the next row; the first row has `front` zeros before it.
    front = (KH - 1) * dil_h * pitch + (KW - 1) * dil_w
    dy_plane, spare = front + max(plane, length), 2 * width(x)
    padded_x, padded_dy = np.zeros(per * plane + spare, x.dtype), np.zeros(count * dy_plane + spare, x.dtype)
    offsets = np.zeros(round_up(per * KH * KW, GRAD_NR), np.int64)
    for c in range(per):
        for u in range(KH):
            for v in range(KW):
                offsets[(c * KH + u) * KW + v] = c * plane + u * dil_h * pitch + v * dil_w
    origin, no_bias = ph * pitch + pw, np.zeros(max(per, mr), x.dtype)
    for g in range(groups):
        pad_rows(padded_dy, dy, g * count, count, front, pitch, dy_plane)
        if dw.size:
            pad_rows(padded_x, x, g * per, per, origin, pitch, plane)
            weight_grad(dw[g * count : (g + 1) * count], padded_dy, front, dy_plane, padded_x, offsets, length)
        if dx.size:
            shape, steps, group_dx = (count, KH, KW), (dy_plane, dil_h * pitch, dil_w), dx[g * per : (g + 1) * per]
            conv_rows_by_mr(group_dx, padded_dy, origin, pitch, flipped[g], no_bias, shape, steps, mr)


@kernel
def conv2d_backward_shifted(dx, dw, db, dy, x, w, stride, padding, dilation, groups):
    N, O, taps = len(x), len(w), w[0].size
    mr = choose_mr(w.shape[1], MR_WIDE, MR_NARROW)
    flipped = pad_channels(flip(w, groups), groups, mr)
    chunks = min(CHUNKS, N)
    partials = np.zeros((chunks, O if dw.size else 0, taps), x.dtype)
    bias_partials = np.zeros((chunks, db.size), x.dtype)
    for chunk in prange(chunks):
        for n in range(chunk * N // chunks, (chunk + 1) * N // chunks):
            kernel_size = w.shape[2], w.shape[3]
            backward_shifted_image(
                image_of(dx, n), partials[chunk], dy[n], x[n], flipped, kernel_size, padding, dilation, mr
            )  # fmt: skip
            if db.size:
                add_bias_grad(bias_partials[chunk], dy[n])
    reduce_partials(ravel(dw), partials.reshape((chunks, dw.size)))
    reduce_partials(db, bias_partials)


# --- im2col: any stride; copy, product, and col2im on the way back ----------------------------------------------------


@device_function
def image_to_columns(columns, image, first, count, KH, KW, OH, OW, stride, padding, dilation):
    """columns[((c*KH + u)*KW + v)*OH*OW + i*OW + j] = image[first + c, i*sh + u*dh - ph, j*sw + v*dw - pw] or zero."""
    H, W = image.shape[1], image.shape[2]
    k = 0
    for c in range(count):
        for u in range(KH):
            for v in range(KW):
                for i in range(OH):
                    h = i * stride[0] + u * dilation[0] - padding[0]
                    inside = 0 <= h < H
                    for j in range(OW):
                        w = j * stride[1] + v * dilation[1] - padding[1]
                        columns[k] = image[first + c, h, w] if inside and 0 <= w < W else columns.dtype.type(0)
                        k += 1


@device_function
def columns_to_image(image, columns, first, count, KH, KW, OH, OW, stride, padding, dilation):
    """The transpose of `image_to_columns`: adds every entry of the columns to its pixel."""
    H, W = image.shape[1], image.shape[2]
    k = 0
    for c in range(count):
        for u in range(KH):
            for v in range(KW):
                for i in range(OH):
                    h = i * stride[0] + u * dilation[0] - padding[0]
                    inside = 0 <= h < H
                    for j in range(OW):
                        w = j * stride[1] + v * dilation[1] - padding[1]
                        if inside and 0 <= w < W:
                            image[first + c, h, w] += columns[k]
                        k += 1


@kernel
def im2col(columns, x, kernel_size, out_size, stride, padding, dilation):
    """columns: (N, C*KH*KW, OH*OW) from x: (N, C, H, W); out_size is (OH, OW).  torch: unfold."""
    N, C = x.shape[0], x.shape[1]
    for n in prange(N):
        KH, KW = kernel_size
        flat = ravel(columns[n])
        image_to_columns(flat, x[n], 0, C, KH, KW, out_size[0], out_size[1], stride, padding, dilation)


@kernel
def col2im(x, columns, kernel_size, out_size, stride, padding, dilation):
    """x: (N, C, H, W), each pixel the sum of its copies in columns: (N, C*KH*KW, OH*OW).  torch: fold."""
    N, C = x.shape[0], x.shape[1]
    for n in prange(N):
        KH, KW = kernel_size
        clear(x[n])
        flat = ravel(columns[n])
        columns_to_image(x[n], flat, 0, C, KH, KW, out_size[0], out_size[1], stride, padding, dilation)


@device_function
def forward_im2col_image(y, x, weight, bias, kernel_size, stride, padding, dilation, mr):
    """y: (O, OH, OW)   x: (C, H, W)   weight, bias: see `pad_channels`"""
    (O, OH, OW), (KH, KW), groups = y.shape, kernel_size, len(weight)
    per, count, M = len(x) // groups, O // groups, OH * OW
    columns = np.zeros(per * KH * KW * M + 2 * width(x), x.dtype)
    for g in range(groups):
        image_to_columns(columns, x, g * per, per, KH, KW, OH, OW, stride, padding, dilation)
        group_y = y[g * count : (g + 1) * count]
        conv_rows_by_mr(group_y, columns, 0, OW, weight[g], bias[g], (1, 1, per * KH * KW), (0, 0, M), mr)


@kernel
def conv2d_forward_im2col(y, x, w, b, stride, padding, dilation, groups):
    kernel_size, mr = w.shape[2:], choose_mr(len(w) // groups, MR_WIDE, MR_NARROW)
    weight, bias = pad_channels(w, groups, mr), pad_bias(b, groups, max(mr, len(w) // groups))
    for n in prange(len(x)):
        forward_im2col_image(y[n], x[n], weight, bias, kernel_size, stride, padding, dilation, mr)


@device_function
def backward_im2col_image(dx, dw, dy, x, w_t, kernel_size, stride, padding, dilation, mr):
    """One image; dx and dw are added to.  dw: (O, C/groups * KH * KW)   w_t: (groups, C/groups * KH * KW * O/groups)"""
    (O, OH, OW), (KH, KW), groups, W = dy.shape, kernel_size, len(w_t), width(x)
    per, count, M = len(x) // groups, O // groups, OH * OW
    K, length = per * KH * KW, round_up(M, 2 * W)
    columns, padded_dy = np.zeros(K * M + 2 * W, x.dtype), np.zeros(count * length, x.dtype)
    offsets = np.arange(round_up(K, GRAD_NR)) * M
    offsets[K:] = 0
    no_bias = np.zeros(max(K, mr), x.dtype)
    for g in range(groups):
        pad_rows(padded_dy, dy, g * count, count, 0, OW, length)
        if dw.size:
            image_to_columns(columns, x, g * per, per, KH, KW, OH, OW, stride, padding, dilation)
            weight_grad(dw[g * count : (g + 1) * count], padded_dy, 0, length, columns, offsets, length)
        if dx.size:
            dx_columns = columns[: K * M].reshape((K, 1, M))
            conv_rows_by_mr(dx_columns, padded_dy, 0, 0, w_t[g], no_bias, (count, 1, 1), (length, 0, 0), mr)
            columns_to_image(dx, columns, g * per, per, KH, KW, OH, OW, stride, padding, dilation)


@kernel
def conv2d_backward_im2col(dx, dw, db, dy, x, w, stride, padding, dilation, groups):
    N, O, taps = len(x), len(w), w[0].size
    mr = choose_mr(taps, MR_WIDE, MR_NARROW)
    transposed = w.reshape(groups, O // groups, taps).transpose(0, 2, 1).copy()  # columns of dx = w.T @ dy
    w_t = pad_channels(transposed.reshape((groups * taps, O // groups)), groups, mr)
    chunks = min(CHUNKS, N)
    partials = np.zeros((chunks, O if dw.size else 0, taps), x.dtype)
    bias_partials = np.zeros((chunks, db.size), x.dtype)
    for chunk in prange(chunks):
        for n in range(chunk * N // chunks, (chunk + 1) * N // chunks):
            kernel_size = w.shape[2], w.shape[3]
            image_dx = image_of(dx, n)
            clear(image_dx)
            backward_im2col_image(
                image_dx, partials[chunk], dy[n], x[n], w_t, kernel_size, stride, padding, dilation, mr
            )  # fmt: skip
            if db.size:
                add_bias_grad(bias_partials[chunk], dy[n])
    reduce_partials(ravel(dw), partials.reshape((chunks, dw.size)))
    reduce_partials(db, bias_partials)
