"""Direct convolution of batch blocks (B, C, H, W, L): layout.py explains the layout, conv.py has the formula.

A register block, MR output channels x 2 neighbouring output pixels of L images each, stays in registers while all taps
of the windows are added, and is stored once.  The input is packed first, channels last, in bands of rows that fit
in the L2 cache, so that the taps of a window are read in ascending order.  Unlike in im2col, no window is copied.

One call of the micro-kernel, with taps k = (u, v, c), MR = 8 or 6 (4 or 6 without AVX-512), and L images a vector:

    packed weights (O/MR, KH, KW, C, MR)          block of y: MR channels x 2 pixels x L lanes,
    a panel: channels o .. o+MR-1                 in registers for all k
                                               y[.., i, j, :]   y[.., i, j+1, :]
    ┌─────┬─────┬───┬────────┐                ┌────────────────┬────────────────┐
    │ w_0 │ w_1 │ … │ w_MR-1 │ k = 0        o │      acc       │      acc       │ += w_0 * vector
    ├─────┼─────┼───┼────────┤                ├────────────────┼────────────────┤
    │ w_0 │ w_1 │ … │ w_MR-1 │ k ─broadcast─► │      acc       │      acc       │ += w_r * vector
    ├─────┼─────┼───┼────────┤                ├────────────────┼────────────────┤
    │  :  │  :  │   │   :    │         o+MR-1 │      acc       │      acc       │ += w_MR-1 * vector
    └─────┴─────┴───┴────────┘                └───────▲────────┴───────▲────────┘
                                               vector │         vector │
    packed input (rows, halo + W + halo, C|1, L)    at (h, w, c)    at (h, w+sw, c)

    row h    │ 0..0 │ C vectors │ C vectors │ C vectors │ …  │ 0..0 │     h = i*sh + u*dh - ph
    row h+dh │ 0..0 │ C vectors │ C vectors │ C vectors │ …  │ 0..0 │     w = j*sw + v*dw - pw
      …        halo    pixel 0     pixel 1     pixel 2         halo       c = 0 .. C-1

    for bands of blocks                 a task each, for the threads; stays in L2 (L2_ELEMENTS)
      for i in output rows
        for (j, j+1) in pixel pairs     both windows stay in L1: 6.7 KB in LeNet-5's C3, with L = 8
          for o in blocks of MR         a panel is read front to back: 150 x 8 floats = 4.8 KB in C3
            for k in taps               2*MR multiply-adds for two loads and MR broadcasts

Taps that read only padding are skipped.  The number of channels is made odd (C|1), since pixels a power of two
apart would compete for a few sets of the cache.

The input gradient is such a convolution too, of dy with the flipped kernel.  A stride above one splits it into
subconvolutions of stride one: one for each remainder of (h, w) modulo the stride, with the taps that reach its pixels.

The weight gradient is the correlation of dy and x, summed over pixels and lanes: register blocks of GRAD_MR_* output
channels x GRAD_NR taps, over L1_PIXELS pixels at a time.
"""

import numpy as np
from numba import prange

from tinycnn.kernels import _simd
from tinycnn.kernels._jit import device_function, inline_ir, kernel
from tinycnn.kernels.layout import valid_range
from tinycnn.kernels.microkernel import (
    MR_NARROW,
    MR_WIDE,
    by_group,
    choose_mr,
    divide,
    flat_items,
    microkernel,
    narrow_accumulators,
    pack,
    part,
    prefetch_block,
    round_up,
    store_result,
    tap_offsets,
    wide_accumulators,
)

CHUNKS = 8  # partial weight gradients, at most: not one per thread, so that the order of summation is always the same
BANDS = 2  # bands of an image, at least: each is a task, so a few blocks keep several threads busy
L2_ELEMENTS = 2**17  # of a band and its output: large images have more bands, so that the packed input stays in L2
# Register block of weight gradients: output channels, and taps.  AVX-512 has 32 registers, others 16.
GRAD_MR_WIDE, GRAD_MR_NARROW, GRAD_NR = 4, 3, 5 if _simd.BYTES == 64 else 3
L1_PIXELS = 112  # pixels of a strip, about: summed for all taps before the next strip, so that it stays in L1

BYTES, pixel_zero, zeros, broadcast_rows = _simd.BYTES, _simd.pixel_zero, _simd.zeros, _simd.broadcast_rows
load_strided, load_indexed, store_contiguous = _simd.load_strided, _simd.load_indexed, _simd.store_contiguous
fma_outer, reduce_add = _simd.fma_outer, _simd.reduce_add
load, store, ravel = _simd.load, _simd.store, _simd.ravel

WIDE_SIZE, NARROW_SIZE = GRAD_MR_WIDE * GRAD_NR, GRAD_MR_NARROW * GRAD_NR

wide_grads = device_function(lambda x: zeros(x, WIDE_SIZE))
narrow_grads = device_function(lambda x: zeros(x, NARROW_SIZE))
wide_rows = device_function(lambda x: zeros(x, GRAD_MR_WIDE))
narrow_rows = device_function(lambda x: zeros(x, GRAD_MR_NARROW))
tap_vectors = device_function(lambda x: zeros(x, GRAD_NR))


@device_function
def empty_aligned(size, like):
    """`size` elements, not initialised, that begin on a cache line: otherwise every vector would cross two lines."""
    buffer = np.empty(size + BYTES // like.itemsize, like.dtype)
    start = -buffer.ctypes.data % BYTES // like.itemsize
    return buffer[start : start + size]


@device_function
def odd(n):
    """n, or n + 1 if n is even: a power of two as stride would map pixels to a few sets of the cache."""
    return n | 1


@device_function
def pack_input(x, first, count, rows, halo, channels_last):
    """Pack `rows` of the channels first ... first + count of a block, with `halo` columns of zeros on both sides.

    x: (C, H, W, L) -> flat: (count, rows, halo + W + halo, L) or, `channels_last`, (rows, halo + W + halo, odd(count),
    L)
    """
    H, W, L = x.shape[1:]
    height, pitch, zero, source = rows[1] - rows[0], W + 2 * halo, pixel_zero(x[0]), ravel(x)
    flat = empty_aligned(height * pitch * odd(count) * L, x)
    channel_step, pixel_step = (L, odd(count) * L) if channels_last else (height * pitch * L, L)
    for c in range(count):
        for i in range(height):
            row, k_in = i * pitch * pixel_step + c * channel_step, ((first + c) * H + rows[0] + i) * W * L
            for k in range(halo):
                store(flat, row + k * pixel_step, zero)
                store(flat, row + (pitch - 1 - k) * pixel_step, zero)
            k_out = row + halo * pixel_step
            for _ in range(W):
                store(flat, k_out, load(source, k_in, zero))
                k_out += pixel_step
                k_in += L
    return flat


@device_function
def direct_conv(
    y,
    grid,
    first,
    count,
    src,
    layout,
    weight,
    initial,
    epilogue,
    residual,
    shape,
    stride,
    padding,
    dilation,
    rows,
    like,
):
    """Macro-kernel: output rows `rows` of `count` channels of one batch block, from packed input.

    y[first + r, i, j] = initial[r] + sum of weight[r, c, u, v] * src[c, i*sh + u*dh - ph, j*sw + v*dw - pw], or of the
    epilogue, see `store_result`

    y: (O, OH, OW, L); with `grid`, (origin, step), output (i, j) is written to pixel origin + (i, j) * step
    src: see `pack_input`, channels last   layout: (H, W, first row in src, halo), halo >= min(stride[1],
    columns of a window beyond the edge)   weight: one group, see `pack`   initial, epilogue: one group, see `by_group`
    shape: (C, KH, KW)   like: accumulators, for their number
    """
    (H, W, first_row, halo), (C, KH, KW), (OH, y_width, L), (origin, step) = layout, shape, y.shape[1:], grid
    OW = (y_width - origin[1] + step[1] - 1) // step[1]
    mr, out, pairs, second = len(like) // 2, ravel(y), (OW + 1) // 2, 1 if OW > 1 else 0  # the second pixel, j + second
    column, pitch = odd(C) * L, (W + 2 * halo) * odd(C) * L
    second_step = second * stride[1] * column
    offsets, taps = tap_offsets(KH, KW, C, dilation[0] * pitch, dilation[1] * column, L), KW * C
    # The pairs of pixels, and the kernel columns inside the image for either of the two, are the same in all rows.
    columns = np.empty((pairs, 3), np.int64)
    for p in range(pairs):
        j = max(0, min(2 * p, OW - 2))  # the last pair of a row overlaps the one before it
        left = j * stride[1] - padding[1]
        range0 = valid_range(left, dilation[1], KW, W)
        range1 = valid_range(left + second * stride[1], dilation[1], KW, W)
        columns[p, 0], columns[p, 1], columns[p, 2] = j, min(range0[0], range1[0]), max(range0[1], range1[1])
    for i in range(rows[0], rows[1]):
        top = i * stride[0] - padding[0]
        u0, u1 = valid_range(top, dilation[0], KH, H)
        for p in range(pairs):
            j, v0, v1 = columns[p, 0], columns[p, 1], columns[p, 2]
            start = (top - first_row) * pitch + (j * stride[1] - padding[1] + halo) * column
            tap, run, runs = u0 * taps + v0 * C, (v1 - v0) * C, u1 - u0
            if run == taps:  # whole rows of the kernel: one run
                run, runs = run * runs, 1
            for r in range(0, count, mr):
                rows_left, row_step, vector_step = min(mr, count - r), OH * y_width * L, second * step[1] * L
                # Computed again below: an index that is kept costs a register of the micro-kernel.
                k_out = (((first + r) * OH + origin[0] + i * step[0]) * y_width + origin[1] + j * step[1]) * L
                prefetch_block(residual, k_out, row_step, vector_step, rows_left)
                acc, k, w = broadcast_rows(initial, r, like), tap, r * taps * KH
                for _ in range(runs):
                    acc = microkernel(acc, src, start, offsets, k, k + run, second_step, weight, w, mr, 1)
                    k += taps
                k_out = (((first + r) * OH + origin[0] + i * step[0]) * y_width + origin[1] + j * step[1]) * L
                store_result(out, k_out, row_step, vector_step, acc, rows_left, r, epilogue, residual)


@device_function
def bands(x, y, least):
    """The number of bands of an image: at least `least`, more if a band would not fit in the L2 cache."""
    return max(least, min(y.shape[1], (x.size + y.size) // L2_ELEMENTS))


@device_function
def input_rows(rows, K, stride, padding, dilation, height):
    """The input rows, (first, end), that output rows `rows` depend on."""
    first = rows[0] * stride - padding
    last = (rows[1] - 1) * stride + (K - 1) * dilation - padding
    return min(height, max(0, first)), min(height, max(0, last + 1))


@device_function
def halo_columns(out, W, K, stride, padding, dilation):
    """The largest number of columns of a window beyond the image, on either side."""
    return max(padding, (out - 1) * stride + (K - 1) * dilation - padding - (W - 1))


@inline_ir
def forward_band(y, x, weight, initial, epilogue, residual, shape, stride, padding, dilation, rows, like):
    """Output rows `rows` of a block.  weight: (groups, ...), see `pack`   initial, epilogue: see `by_group`
    residual: flat"""
    H, W = x.shape[1:3]
    groups, (per, KH, KW), count = len(weight), shape, len(y) // len(weight)
    halo = halo_columns(y.shape[2], W, KW, stride[1], padding[1], dilation[1])
    src_rows = input_rows(rows, KH, stride[0], padding[0], dilation[0], H)
    for g in range(groups):
        src = pack_input(x, g * per, per, src_rows, halo, True)
        direct_conv(
            y, ((0, 0), (1, 1)), g * count, count, src, (H, W, src_rows[0], halo), weight[g], initial[g],
            flat_items(epilogue, g, g + 1), residual, shape, stride, padding, dilation, rows, like,
        )  # fmt: skip


@kernel
def conv2d_forward_direct(y, x, w, b, epilogue, residual, stride, padding, dilation, groups, threads):
    """x: (B, C, H, W, L), y: (B, O, OH, OW, L); see `conv.run_forward`"""
    O, OH = y.shape[1], y.shape[2]
    per_o, shape = O // groups, (w.shape[1], w.shape[2], w.shape[3])
    mr = choose_mr(per_o, MR_WIDE, MR_NARROW)
    weight, padded = pack(w, groups, mr, False), round_up(per_o, mr)
    initial, table = by_group(b.reshape((1, b.size)), groups, padded), by_group(epilogue, groups, padded)
    count = bands(x[0], y[0], max(BANDS, min(OH, divide(threads, len(x)))))
    for task in prange(len(x) * count):
        n, rows = task // count, part(task % count, count, OH)
        terms = flat_items(residual, n, n + 1)
        if mr == MR_WIDE:
            forward_band(
                y[n], x[n], weight, initial, table, terms, shape, stride, padding, dilation, rows, wide_accumulators(x)
            )  # fmt: skip
        else:
            forward_band(
                y[n], x[n], weight, initial, table, terms, shape, stride, padding, dilation, rows,
                narrow_accumulators(x),
            )  # fmt: skip


@device_function
def subconv_taps(origin, K, stride, padding, dilation):
    """The taps of K that reach pixels origin, origin + stride, ... of dx: the first tap and the step between taps; then
    padding and dilation of the flipped convolution of dy, of stride one, with these taps."""
    first, step = 0, 1
    while first < K and (origin + padding - first * dilation) % stride:
        first += 1
    while step * dilation % stride:
        step += 1
    last = first + (K - 1 - first) // step * step
    return first, step, (last * dilation - origin - padding) // stride, step * dilation // stride


@device_function
def pack_flipped(w, groups, mr, stride, padding, dilation):
    """Flipped weights of each of the sh*sw subconvolutions of the input gradient: (sh*sw, groups, ...), see `pack`."""
    O, per, KH, KW = w.shape
    flipped = np.empty((stride[0] * stride[1], groups, round_up(per, mr) * (O // groups) * KH * KW), w.dtype)
    for a in range(stride[0]):
        for b in range(stride[1]):
            u, du, _, _ = subconv_taps(a, KH, stride[0], padding[0], dilation[0])
            v, dv, _, _ = subconv_taps(b, KW, stride[1], padding[1], dilation[1])
            packed = pack(w[:, :, u::du, v::dv], groups, mr, True)
            for g in range(groups):
                for i in range(packed.shape[1]):
                    flipped[a * stride[1] + b, g, i] = packed[g, i]
    return flipped


@inline_ir
def input_grad_band(dx, dy, weight, shape, stride, padding, dilation, rows, like):
    """Rows `rows` of a block's input gradient: a subconvolution of dy for each remainder (a, b) modulo the stride.

    weight: see `pack_flipped`   shape: (O/groups, KH, KW)
    """
    OH, OW = dy.shape[1:3]
    groups, (sh, sw), (per_o, KH, KW) = weight.shape[1], stride, shape
    per, pad = len(dx) // groups, (dilation[0] * (KH - 1) - padding[0], dilation[1] * (KW - 1) - padding[1])
    halo, initial = 1 if pad[1] > 0 else 0, np.zeros(per + MR_WIDE, dx.dtype)
    first, end = input_rows(rows, KH, 1, pad[0], dilation[0], (OH - 1) * sh + 1)  # of dy upsampled by sh
    src_rows = first // sh, (end + sh - 1) // sh
    for g in range(groups):
        src = pack_input(dy, g * per_o, per_o, src_rows, halo, True)
        for a in range(sh):
            u, du, pad_h, dil_h = subconv_taps(a, KH, sh, padding[0], dilation[0])
            for b in range(sw):
                v, dv, pad_w, dil_w = subconv_taps(b, KW, sw, padding[1], dilation[1])
                direct_conv(
                    dx, ((a, b), stride), g * per, per, src, (OH, OW, src_rows[0], halo), weight[a * sw + b, g],
                    initial, None, None, (per_o, divide(KH - u, du), divide(KW - v, dv)), (1, 1), (pad_h, pad_w),
                    (dil_h, dil_w), (divide(rows[0] - a, sh), divide(rows[1] - a, sh)), like,
                )  # fmt: skip


@device_function
def weight_grad_band(partial, bias_partial, dy, x, shape, stride, padding, dilation, rows, blocks, zero, dy_like):
    """Add a block's products of dy's rows `rows` with x to the weight gradient, and their sums to the bias gradient.

    partial: flat, (groups, blocks of output channels, KH, blocks of taps (c, v), GRAD_MR * GRAD_NR rounded up to L)
    blocks: (first, end) of the first three dimensions of `partial`, together
    zero: accumulators of zeros   dy_like: as many vectors as a block has output channels
    """
    (C, H, W, L), (O, OH, OW) = x.shape, dy.shape[:3]
    groups, KH, KW = shape
    mr, x_like = len(dy_like), tap_vectors(x)
    per, count, halo = C // groups, O // groups, halo_columns(OW, W, KW, stride[1], padding[1], dilation[1])
    plane, pitch, size = OH * OW * L, (W + 2 * halo) * L, len(zero) * L
    dy_offsets = np.zeros(round_up(count, mr), np.int64)
    src_rows, grad = input_rows(rows, KH, stride[0], padding[0], dilation[0], H), ravel(dy)
    first_row, height = (src_rows[0], src_rows[1] - src_rows[0]) if halo else (0, H)
    offsets = np.zeros(round_up(per * KW, GRAD_NR), np.int64)
    for k in range(per * KW):
        offsets[k] = k // KW * height * pitch + k % KW * dilation[1] * L
    spilled, strip = empty_aligned(KH * (offsets.size // GRAD_NR) * size, x), max(1, L1_PIXELS // OW)
    for g in range(groups):
        for r in range(count):
            dy_offsets[r] = (g * count + r) * plane
        group = g * divide(count, mr) * KH
        if group + divide(count, mr) * KH <= blocks[0] or group >= blocks[1]:
            continue
        if halo:
            src = pack_input(x, g * per, per, src_rows, halo, False)
        else:
            src = x[g * per :].reshape((C - g * per) * H * W * L)
        for r in range(0, count, mr):
            row = group + r // mr * KH
            u0, u1 = max(0, blocks[0] - row), min(KH, blocks[1] - row)
            for first in range(rows[0], rows[1] if u0 < u1 else rows[0], strip):
                last = min(first + strip, rows[1])
                for u in range(u0, u1):
                    top = u * dilation[0] - padding[0]
                    i0, i1 = valid_range(top, stride[0], OH, H)
                    start = (top - first_row) * pitch + (halo - padding[1]) * L
                    for k in range(0, offsets.size, GRAD_NR):
                        index = u * (offsets.size // GRAD_NR) + k // GRAD_NR
                        acc = zero if first == rows[0] else load_strided(spilled, index * size, L, zero)
                        for i in range(max(i0, first), min(i1, last)):
                            p, q = i * OW * L, start + i * stride[0] * pitch
                            for _ in range(OW):
                                dy_vectors = load_indexed(grad, p, dy_offsets, r, dy_like)
                                acc = fma_outer(acc, dy_vectors, load_indexed(src, q, offsets, k, x_like))
                                p += L
                                q += stride[1] * L
                        if last < rows[1]:
                            store_contiguous(spilled, index * size, acc)
                        else:
                            block = row * (offsets.size // GRAD_NR) + index
                            reduce_add(partial, block * round_up(len(zero), L), acc)
                if bias_partial.size and u0 == 0:
                    for o in range(g * count + r, g * count + min(r + mr, count)):
                        run, total = grad[(o * OH + first) * OW * L : (o * OH + last) * OW * L], x.dtype.type(0)
                        for k in range(run.size):
                            total += run[k]
                        bias_partial[o] += total


@device_function
def add_bias_grad(db, dy, first, end):
    """db[o] += sum of rows first ... end of channel o.   dy: (O, H, W) or (O, H, W, L)"""
    for o in range(db.size):
        plane, total = ravel(dy[o, first:end]), dy.dtype.type(0)
        for k in range(plane.size):
            total += plane[k]
        db[o] += total


@device_function
def reduce_partials(dw, partial, blocks, groups, mr, size):
    """Blocks `blocks` of dw, see `weight_grad_band`, from the partial gradients of the chunks, added in order.

    size: of GRAD_NR taps of a block in `partial`
    """
    O, per, KH, KW = dw.shape
    count, taps, flat, span = O // groups, per * KH * KW, ravel(dw), divide(per * KW, GRAD_NR) * size
    total = partial[0, blocks[0] * span : blocks[1] * span]
    for k in range(1, len(partial)):
        addend = partial[k, blocks[0] * span : blocks[1] * span]
        for i in range(total.size):
            total[i] += addend[i]
    start = 0
    for block in range(blocks[0], blocks[1]):
        row, u = block // KH, block % KH
        g, r = row // divide(count, mr), row % divide(count, mr) * mr
        c = v = 0
        for k0 in range(0, per * KW, GRAD_NR):
            for k in range(min(GRAD_NR, per * KW - k0)):
                index = (((g * count + r) * per + c) * KH + u) * KW + v
                for i in range(min(mr, count - r)):
                    flat[index + i * taps] = total[start + i * GRAD_NR + k]
                c, v = (c, v + 1) if v + 1 < KW else (c + 1, 0)
            start += size


@inline_ir
def backward_band(dx, partial, bias_partial, dy, x, weight, shape, stride, padding, dilation, rows, blocks, mr):
    """A part of the gradients from a block.

    shape: (groups, O/groups, KH, KW)   rows: bands of dy and of dx   blocks: see `weight_grad_band`
    """
    groups, count, KH, KW = shape
    kernel, (dy_rows, dx_rows) = (groups, KH, KW), rows
    if partial.size == 0:
        pass
    elif choose_mr(count, GRAD_MR_WIDE, GRAD_MR_NARROW) == GRAD_MR_WIDE:
        weight_grad_band(
            partial, bias_partial, dy, x, kernel, stride, padding, dilation, dy_rows, blocks, wide_grads(x),
            wide_rows(x),
        )  # fmt: skip
    else:
        weight_grad_band(
            partial, bias_partial, dy, x, kernel, stride, padding, dilation, dy_rows, blocks, narrow_grads(x),
            narrow_rows(x),
        )  # fmt: skip
    if dx.size:
        flipped = count, KH, KW
        if mr == MR_WIDE:
            input_grad_band(dx, dy, weight, flipped, stride, padding, dilation, dx_rows, wide_accumulators(x))
        else:
            input_grad_band(dx, dy, weight, flipped, stride, padding, dilation, dx_rows, narrow_accumulators(x))


@kernel
def conv2d_backward_direct(dx, dw, db, dy, x, w, stride, padding, dilation, groups, threads):
    """Gradients of all three arguments of `conv2d_forward_direct`; those of size 0 are not computed.  db needs dw."""
    (O, per, KH, KW), (OH, L), H = w.shape, dy.shape[2::2], x.shape[2]
    shape, mr = (groups, O // groups, KH, KW), choose_mr(per, MR_WIDE, MR_NARROW)
    weight = pack_flipped(w, groups, mr, stride, padding, dilation)
    count = bands(x[0], dy[0], BANDS if BANDS * len(x) < CHUNKS else 1)
    tasks = len(x) * count
    chunks, grad_mr = min(CHUNKS, tasks), choose_mr(O // groups, GRAD_MR_WIDE, GRAD_MR_NARROW)
    blocks = groups * divide(O // groups, grad_mr) * KH
    size = blocks * divide(per * KW, GRAD_NR) * round_up(grad_mr * GRAD_NR, L)
    partial = np.zeros((chunks, size if dw.size else 0), x.dtype)
    sums = min(threads, blocks, divide(partial.size, L2_ELEMENTS))  # tasks that add the chunks
    bias_partial = np.zeros((chunks, db.size), x.dtype)
    parts = max(1, min(divide(threads, chunks), H // count))  # of a chunk: some weights' gradients, and some rows of dx
    for chunk_part in prange(chunks * parts):
        chunk, p = chunk_part // parts, chunk_part % parts
        for task in range(chunk * tasks // chunks, (chunk + 1) * tasks // chunks):
            n, dx_rows = task // count, part(task % count * parts + p, count * parts, H)
            image_dx = dx[n] if dx.size else dx.reshape((0, 0, 0, 0))
            backward_band(
                image_dx, partial[chunk], bias_partial[chunk], dy[n], x[n], weight, shape, stride, padding, dilation,
                (part(task % count, count, OH), dx_rows), part(p, parts, blocks), mr,
            )  # fmt: skip
    for task in prange(sums):
        reduce_partials(dw, partial, part(task, sums, blocks), groups, grad_mr, round_up(grad_mr * GRAD_NR, L))
    for o in range(db.size):
        db[o] = bias_partial[0, o]
        for k in range(1, chunks):
            db[o] += bias_partial[k, o]
