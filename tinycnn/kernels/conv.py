"""2-D convolution (cross-correlation, as in every framework), forward and backward.

    y[n, o, i, j] = b[o] + sum over c, u, v of w[o, c, u, v] * x[n, c, i*sh + u*dh - ph, j*sw + v*dw - pw]

x: (N, C, H, W)   w: (O, C/groups, KH, KW)   b: (O,) or (0,) for none   y: (N, O, OH, OW)
stride (sh, sw), padding (ph, pw), dilation (dh, dw): pairs; pixels outside the image count as zero.  The caller chooses
OH and OW: with stride one the padding may be larger at the end of an axis than at its start.

Three algorithms, all with the micro-kernel of microkernel.py:
- direct: batch-blocked layout, for all but the smallest batches; see direct_conv.py.
- Winograd: 3 x 3 kernels with stride one, and 16 channels or more; see winograd.py, and winograd_nchw.py for the
  forward of small batches.
- MEC (memory-efficient convolution, Cho and Brand 2017): NCHW, for small batches, with vectors along the rows.

im2col would copy the pixels under tap k, for all output positions, into row k of a column matrix, and multiply it by
the weights: KH*KW copies of a pixel.  MEC lowers the columns of windows only, KW copies.  The pixels under tap (u, v),
for all output positions, are consecutive in the copy of v, from row u*dh on:

    lowered, for each channel c and kernel column v: rows of OW       output channel, flat: rows of OW
    ┌─────────┬─────────┬─────────┬─────────┬─────────┬─              ┌─────────┬─────────┬─────────┬─
    │ row 0   │ row 1   │ row 2   │ row 3   │ row 4   │               │ y row 0 │ y row 1 │ y row 2 │
    └─────────┴─────────┴─────────┴─────────┴─────────┴─              └─────────┴─────────┴─────────┴─
    ├─ tap (0, v) reads from here on ───►         pixel (h, j) is x[c, h - ph, j*sw + v*dw - pw]
              ├─ tap (1, v) from OW further ───►  with a stride sh, rows h of equal h % sh follow each other

    for o in blocks of MR channels            2*MR accumulators stay in registers for all taps
      for two vectors of positions            consecutive; vectors run across the ends of rows
        for k in taps (c, u, v)               two loads, MR broadcasts, 2*MR multiply-adds
"""

import numpy as np
from numba import prange

from tinycnn.kernels import _simd, winograd
from tinycnn.kernels._jit import conv_kernel, device_function, kernel
from tinycnn.kernels.direct_conv import (
    CHUNKS,
    add_bias_grad,
    conv2d_backward_direct,
    conv2d_forward_direct,
    subconv_taps,
)
from tinycnn.kernels.layout import valid_range, via_nchw
from tinycnn.kernels.linear import linear_backward, linear_forward
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
    wide_accumulators,
    widen,
)
from tinycnn.kernels.pooling import clear
from tinycnn.kernels.winograd_nchw import conv2d_forward_winograd_nchw

fma_outer, load_indexed, load_strided, ravel = _simd.fma_outer, _simd.load_indexed, _simd.load_strided, _simd.ravel
reduce_add, store_contiguous, width, zeros = _simd.reduce_add, _simd.store_contiguous, _simd.width, _simd.zeros
broadcast_rows, load, pixel_zero, store = _simd.broadcast_rows, _simd.load, _simd.pixel_zero, _simd.store

GRAD_MR, GRAD_NR = 3, 5  # register block of weight gradients: output channels, and taps
GRAD_SIZE = GRAD_MR * GRAD_NR

grad_accumulators = device_function(lambda x: zeros(x, GRAD_SIZE))


def conv2d_forward(y, x, w, b, stride, padding, dilation, groups):
    """y = conv(x, w) + b; shapes at the top of this file, or x and y in the batch-blocked layout."""
    if is_full_window(y, x, w, padding, groups):
        as_linear(y, x, w, b)
    else:
        run_forward(y, x, w, b, None, None, stride, padding, dilation, groups)


def run_forward(y, x, w, b, epilogue, residual, stride, padding, dilation, groups):
    """`conv2d_forward`, or what folded.py describes.   epilogue: its table; b is then of size 0"""
    if not winograd.applies(y, x, w, stride, dilation, groups):
        forward = conv2d_forward_direct if x.ndim == 5 else conv2d_forward_mec
        forward(y, x, w, b, epilogue, residual, stride, padding, dilation, groups)
    elif x.ndim == 5:
        winograd.conv2d_forward_winograd(y, x, w, b, epilogue, residual, padding, False)
    else:
        conv2d_forward_winograd_nchw(y, x, w, b, epilogue, residual, padding)


def conv2d_backward(dx, dw, db, dy, x, w, stride, padding, dilation, groups):
    """Gradients of all three arguments of `conv2d_forward`; those of size 0 are not computed.  db needs dw."""
    if is_full_window(dy, x, w, padding, groups):
        as_linear_backward(dx, dw, db, dy, x, w)
    elif x.ndim == 5 and winograd.applies(dy, x, w, stride, dilation, groups):
        winograd.conv2d_backward_winograd(dx, dw, db, dy, x, w, padding)
    elif x.ndim == 5:
        conv2d_backward_direct(dx, dw, db, dy, x, w, stride, padding, dilation, groups)
    else:
        conv2d_backward_mec(dx, dw, db, dy, x, w, stride, padding, dilation, groups)


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


# --- forward ----------------------------------------------------------------------------------------------------------


@device_function
def phases_of(K, stride):
    """The number of remainders modulo `stride` that taps of an axis read: one, if there is one tap."""
    return stride if K > 1 else 1


@device_function
def lower(image, first, count, kernel_size, out_size, stride, padding, dilation):
    """The lowered matrix of channels first ... first + count of an image, flat, with two vectors of zeros after it."""
    (KH, KW), (OH, OW), (sh, sw), W, one = kernel_size, out_size, stride, width(image), zeros(image, 1)
    rows, length = (OH - 1) * sh + (KH - 1) * dilation[0] + 1, OW + (KW - 1) * dilation[1] // sw  # of a row's phase
    i0, i1 = valid_range(-padding[0], 1, rows, image.shape[1])
    flat, zero, k, phases = ravel(image), pixel_zero(image[0]), 0, phases_of(KH, sh)
    padded, step = np.zeros(rows * sw * length + W, image.dtype), divide(sh, phases)  # step: between rows that are used
    size = count * KW * phases * divide(rows, sh) * OW
    lowered = np.empty(size + 2 * W, image.dtype)
    lowered[size:] = 0  # multiplied by the zeros after dy
    for c in range(first, first + count):
        for b in range(phases_of(KW, sw)):
            j0, j1 = valid_range(b - padding[1], sw, length, image.shape[2])
            for i in range(round_up(i0, step), i1, step):
                source = (c * image.shape[1] + i - padding[0]) * image.shape[2] + b - padding[1]
                target = (i * sw + b) * length
                if sw == 1:  # with `load`, as Numba's checks for negative indices prevent vectors
                    for j in range(j0, j1):
                        store(padded, target + j, load(flat, source + j, zero))
                else:
                    for j in range(j0, j1):
                        store(padded, target + j, load(flat, source + j * sw, zero))
        for v in range(KW):
            column = v * dilation[1] % sw * length + v * dilation[1] // sw
            for a in range(phases):
                for i in range(a, a + divide(rows, sh) * sh, sh):
                    source = min(i, rows - 1) * sw * length + column
                    for j in range(0, OW, W):  # what is beyond the row is overwritten by the next one
                        store_contiguous(lowered, k + j, load_strided(padded, source + j, 0, one))
                    k += OW
    return lowered


@device_function
def lowered_offsets(offsets, count, kernel_size, out_size, stride, dilation):
    """Offsets of the taps (c, u, v) in the matrix of `lower`.   stride, dilation: of rows"""
    (KH, KW), (OH, OW) = kernel_size, out_size
    phases, rows = (
        phases_of(KH, stride),
        divide((OH - 1) * stride + (KH - 1) * dilation + 1, stride),
    )  # rows: of a phase
    for c in range(count):
        for u in range(KH):
            phase, i = u * dilation % stride, u * dilation // stride
            for v in range(KW):
                offsets[(c * KH + u) * KW + v] = (((c * KW + v) * phases + phase) * rows + i) * OW


@device_function
def conv_rows(y, src, offsets, channels, weight, initial, epilogue, residual, like):
    """y[r, k] = initial[r] + sum of weight[r, t] * src[offsets[t] + k] for r in `channels`, (first, end), or the
    epilogue of it.

    y: (count, M)   weight: of one group, see `pad_channels`   initial, epilogue: see `by_group`   residual: flat
    like: accumulators, for their number
    """
    (count, M), taps, mr, W = y.shape, offsets.size, len(like) // 2, width(y)
    run, out = max(M, 2 * W), ravel(y)
    if run > M:  # less than a register block: room for a whole one
        out, residual = np.empty(count * run, y.dtype), widen(residual, M, run)
    for block in range(channels[0], channels[1], mr):
        r = max(0, min(block, count - mr))  # the last block overlaps the one before it
        for start in range(0, M, 2 * W):
            k = min(start, run - 2 * W)
            # The weights are not packed, which would take longer than reading them for one image.
            acc = broadcast_rows(initial, r, like)
            acc = microkernel(acc, src, k, offsets, 0, taps, W, weight, r * taps, 1, taps)
            store_result(out, r * run + k, run, W, acc, min(mr, count - r), r, epilogue, residual)
    if run > M:
        for r in range(channels[0], channels[1]):
            for k in range(M):
                y[r, k] = out[r * run + k]


@device_function
def conv_rows_by_mr(y, src, offsets, channels, weight, initial, epilogue, residual, mr):
    """`conv_rows` with register blocks of `mr` output channels."""
    if mr == MR_WIDE:
        conv_rows(y, src, offsets, channels, weight, initial, epilogue, residual, wide_accumulators(src))
    else:
        conv_rows(y, src, offsets, channels, weight, initial, epilogue, residual, narrow_accumulators(src))


@device_function
def forward_image(y, x, weight, initial, epilogue, residual, shape, stride, padding, dilation, channels, mr):
    """Channels `channels`, (first, end), of one image.

    y: (O, OH, OW)   x: (C, H, W)   weight: see `pad_channels`   initial, epilogue: see `by_group`
    shape: (C/groups, KH, KW)   residual: flat, or None
    """
    (per, KH, KW), (O, OH, OW), groups, M = shape, y.shape, len(weight), y.shape[1] * y.shape[2]
    count = O // groups
    offsets = np.empty(per * KH * KW, np.int64)
    lowered_offsets(offsets, per, (KH, KW), (OH, OW), stride[0], dilation[0])
    for g in range(channels[0] // count, divide(channels[1], count)):
        group = max(channels[0] - g * count, 0), min(channels[1] - g * count, count)
        same = x.shape[1:] == y.shape[1:] and stride == (1, 1) and padding == (0, 0)
        if KH * KW == 1 and same and 2 * width(x) <= M:  # x is the matrix
            src = ravel(x[g * per : (g + 1) * per])
        else:
            src = lower(x, g * per, per, (KH, KW), (OH, OW), stride, padding, dilation)
        first, end = g * count, (g + 1) * count
        group_y, terms = y[first:end].reshape((count, M)), flat_items(residual, first * M, end * M)
        conv_rows_by_mr(group_y, src, offsets, group, weight[g], initial[g], flat_items(epilogue, g, g + 1), terms, mr)


@device_function
def channel(block, blocks, count, mr):
    """The first output channel of a block of `mr`, of `blocks` in each group of `count` channels."""
    return block // blocks * count + block % blocks * mr


@conv_kernel
def conv2d_forward_mec(y, x, w, b, epilogue, residual, stride, padding, dilation, groups, threads):
    """NCHW; see `run_forward`"""
    N, count = len(x), len(w) // groups
    shape, mr = w.shape[1:], choose_mr(count, MR_WIDE, MR_NARROW)
    weight, padded = pad_channels(w, groups, mr), max(mr, count)
    initial, table = by_group(b.reshape((1, b.size)), groups, padded), by_group(epilogue, groups, padded)
    blocks = groups * max(1, count // mr)  # tasks have whole blocks; the last of a group has its rest too
    parts = min(divide(threads, N), blocks)
    for task in prange(N * parts):
        n, (first, end) = task // parts, part(task % parts, parts, blocks)
        channels = channel(first, blocks // groups, count, mr), channel(end, blocks // groups, count, mr)
        forward_image(
            y[n], x[n], weight, initial, table, flat_items(residual, n, n + 1), shape, stride, padding, dilation,
            channels, mr,
        )  # fmt: skip


@device_function
def weight_grad(dw, dy, length, src, offsets):
    """dw[o, t] += sum over k < length of dy[o*length + k] * src[offsets[t] + k].

    dw: (O, T)   dy, src: flat   offsets: at least T rounded up to GRAD_NR   length: a multiple of a vector
    """
    (O, T), W, zero = dw.shape, width(src), grad_accumulators(src)
    dy_like, src_like, totals = zeros(src, GRAD_MR), zeros(src, GRAD_NR), np.empty(round_up(GRAD_SIZE, W), src.dtype)
    rows = np.empty(round_up(O, GRAD_MR), np.int64)
    for o in range(rows.size):
        rows[o] = min(o, O - 1) * length
    for o in range(0, O, GRAD_MR):
        for t in range(0, T, GRAD_NR):
            acc = zero
            for k in range(0, length, W):
                acc = fma_outer(acc, load_indexed(dy, k, rows, o, dy_like), load_indexed(src, k, offsets, t, src_like))
            for i in range(totals.size):
                totals[i] = 0
            reduce_add(totals, 0, acc)
            for i in range(min(GRAD_MR, O - o)):
                for k in range(min(GRAD_NR, T - t)):
                    dw[o + i, t + k] += totals[i * GRAD_NR + k]


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
def flip_taps(w, groups, mr, stride, padding, dilation):
    """Weights of the sh*sw subconvolutions of the input gradient, see direct_conv.py: input and output channels of each
    group exchanged, the kernel rotated by 180 degrees.

    w: (O, C/groups, KH, KW) -> (sh*sw, groups, ...): (C/groups, O/groups, taps), of at least `mr` channels, the missing
    ones zeros
    """
    (O, per, KH, KW), flat, zero = w.shape, ravel(w), pixel_zero(w[0, 0])
    count, step = O // groups, per * KH * KW
    flipped = np.zeros((stride[0] * stride[1], groups, max(per, mr) * count * KH * KW), w.dtype)
    target = ravel(flipped)
    for a in range(stride[0]):
        for b in range(stride[1]):
            u, du, _, _ = subconv_taps(a, KH, stride[0], padding[0], dilation[0])
            v, dv, _, _ = subconv_taps(b, KW, stride[1], padding[1], dilation[1])
            rows, columns = divide(KH - u, du), divide(KW - v, dv)
            for g in range(groups):
                start = ((a * stride[1] + b) * groups + g) * flipped.shape[2]
                for c in range(per):
                    for tap in range(rows * columns):
                        i, j = u + (rows - 1 - tap // columns) * du, v + (columns - 1 - tap % columns) * dv
                        source = ((g * count * per + c) * KH + i) * KW + j
                        k = start + c * count * rows * columns + tap
                        for o in range(count):
                            store(target, k + o * rows * columns, load(flat, source + o * step, zero))
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
    for n in range(1, len(partials)):
        for k in range(total.size):
            total[k] += partials[n, k]


@device_function
def backward_image(dx, dw, dy, x, flipped, kernel_size, stride, padding, dilation, mr):
    """Input gradient of one image; its weight gradient is added to dw: (O, C/groups * KH * KW), or of size 0.  flipped:
    see `flip_taps`"""
    (O, OH, OW), groups, (KH, KW), (sh, sw), W = dy.shape, flipped.shape[1], kernel_size, stride, width(x)
    per, count, M, length = len(x) // groups, O // groups, OH * OW, round_up(OH * OW, W)
    if dw.size:
        padded_dy, offsets = np.zeros(count * length, x.dtype), np.zeros(round_up(per * KH * KW, GRAD_NR), np.int64)
        lowered_offsets(offsets, per, kernel_size, dy.shape[1:], sh, dilation[0])
        for g in range(groups):
            for o in range(count):
                plane = ravel(dy[g * count + o])
                for k in range(M):
                    padded_dy[o * length + k] = plane[k]
            lowered = lower(x, g * per, per, kernel_size, (OH, OW), stride, padding, dilation)
            weight_grad(dw[g * count : (g + 1) * count], padded_dy, length, lowered, offsets)
    if dx.size == 0:
        return
    C, H, W = dx.shape
    initial, everything = np.zeros((groups, max(per, mr)), x.dtype), (0, C)
    for a in range(sh):
        u, du, pad_h, dil_h = subconv_taps(a, KH, sh, padding[0], dilation[0])
        for b in range(sw):
            v, dv, pad_w, dil_w = subconv_taps(b, KW, sw, padding[1], dilation[1])
            shape, pads, dils = (count, divide(KH - u, du), divide(KW - v, dv)), (pad_h, pad_w), (dil_h, dil_w)
            part_dx = dx if sh * sw == 1 else np.zeros((C, divide(H - a, sh), divide(W - b, sw)), dx.dtype)
            if part_dx.size and shape[1] * shape[2]:
                forward_image(
                    part_dx, dy, flipped[a * sw + b], initial, None, None, shape, (1, 1), pads, dils, everything, mr
                )  # fmt: skip
            if sh * sw > 1:
                dx[:, a::sh, b::sw] = part_dx


@kernel
def conv2d_backward_mec(dx, dw, db, dy, x, w, stride, padding, dilation, groups):
    N, O, mr = len(x), len(w), choose_mr(w.shape[1], MR_WIDE, MR_NARROW)
    flipped = flip_taps(w, groups, mr, stride, padding, dilation)
    chunks = min(CHUNKS, N)
    partials = np.zeros((chunks, O if dw.size else 0, w[0].size), x.dtype)
    bias_partials = np.zeros((chunks, db.size), x.dtype)
    for chunk in prange(chunks):
        for n in range(chunk * N // chunks, (chunk + 1) * N // chunks):
            kernel_size = w.shape[2], w.shape[3]
            backward_image(
                image_of(dx, n), partials[chunk], dy[n], x[n], flipped, kernel_size, stride, padding, dilation, mr
            )  # fmt: skip
            if db.size:
                add_bias_grad(bias_partials[chunk], dy[n], 0, dy.shape[2])
    reduce_partials(ravel(dw), partials.reshape((chunks, dw.size)))
    reduce_partials(db, bias_partials)


# --- im2col and col2im ------------------------------------------------------------------------------------------------


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
