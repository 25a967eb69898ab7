"""2-D convolution, forward and backward.  GPU version of tinycnn/kernels/conv.py, which has formula and shapes.

All three are implicit GEMMs: the matrix products of gemm.py with a column matrix that is never stored.  The phase that
loads a tile of it into shared memory reads its entries from the image.

    y   rows: outputs o           columns: pixels of y        k: taps (c, u, v)
    dx  rows: channels c          columns: pixels of x        k: taps (o, u, v), from dy
    dw  rows: outputs o           columns: taps, then ones    k: pixels of y; the column of ones gives db

A small table, made once for each layer, has the offset of each tap relative to the pixel.
"""

import functools

import numpy as np

from tinycnn.cuda._launch import (
    ALIGN,
    THREADS,
    U32,
    blocks,
    constant,
    cuda,
    device_function,
    divmod32,
    kernel,
    phase,
    ravel,
)
from tinycnn.cuda.activations import NONE, value_arguments, value_in_place
from tinycnn.cuda.gemm import (
    ACCUMULATORS,
    PITCH_A,
    PITCH_B,
    SIZE_A,
    SIZE_B,
    TILE_K,
    TILE_M,
    TILE_N,
    WARPS,
    add_splits,
    clear_accumulators,
    multiply_accumulate,
    split_k,
    split_workspace,
    store_tile,
)

OUTSIDE = -(2**22)  # a row outside of every image
TAP = 5  # entries of a tap in the table of taps
STEP_K = THREADS // TILE_N  # a thread loads the entries of one pixel, every second k


@functools.cache
def tap_table(channels, kernel_size, dilation, plane, step, outside=OUTSIDE, stride=(1, 1)):
    """For tap (c, u, v): c*plane, u*dh // sh, v*dw // sw, c*step + u*KW + v, and both remainders combined; then at
    least one tap in row `outside` (for the ones that give db), up to a full tile.

    int32, TAP entries per tap.
    """
    (KH, KW), (dh, dw), (sh, sw) = kernel_size, dilation, stride
    taps = [
        (c * plane, u * dh // sh, v * dw // sw, c * step + u * KW + v, u * dh % sh * sw + v * dw % sw)
        for c in range(channels) for u in range(KH) for v in range(KW)
    ]  # fmt: skip
    taps += [(0, outside, 0, 0, 0)] * (TILE_N - len(taps) % TILE_N)
    return constant(tuple(entry for tap in taps for entry in tap))


@phase
def locate_pixel(tid, nt, position, p0, P, shape, image, first, stride, padding):
    """Pixel p0 + tid % 64 of P, in images of `shape`: position = the start of its image (+ first), and row and column
    of the corner of its window.  Neighbouring images are `image` entries apart."""
    p = p0 + tid % TILE_N
    n, rest = divmod32(p, shape[0] * shape[1])
    i, j = divmod32(rest, shape[1])
    position[0] = n * image + first
    position[1] = i * stride[0] + padding[0] if p < P else OUTSIDE
    position[2] = j * stride[1] + padding[1]


# --- y ----------------------------------------------------------------------------------------------------------------


@phase
def load_windows(tid, nt, position, b, x, taps, k0, size):
    """b[k, p] = the pixel of x under tap k0 + k of output pixel p."""
    # Load first and select afterwards: without branches, all loads of a thread are in flight at once.
    first, column = tid // TILE_N, tid % TILE_N
    for i in range(TILE_K // STEP_K):
        k = k0 + first + i * STEP_K
        h, w = position[1] + taps[U32(TAP * k + 1)], position[2] + taps[U32(TAP * k + 2)]
        inside = (U32(h) < U32(size[0])) & (U32(w) < U32(size[1]))
        index = position[0] + taps[U32(TAP * k)] + h * size[1] + w
        pixel = x[U32(index if inside else 0)]
        b[U32((first + i * STEP_K) * PITCH_B + column)] = pixel if inside else x.dtype.type(0)


@phase
def load_weights(tid, nt, a, w, k0, K, m0, M, first):
    """a[k, m] = w[first + m0 + m, k0 + k], w: (O, K)"""
    k = tid % TILE_K
    for i in range(TILE_M // WARPS):
        m = tid // TILE_K + i * WARPS
        inside = U32(k0 + k) < U32(K) and U32(m0 + m) < U32(M)
        a[U32(k * PITCH_A + m)] = w[U32((first + m0 + m) * K + k0 + k)] if inside else w.dtype.type(0)


@phase
def store_planes(tid, nt, acc, y, b, with_bias, p0, P, m0, M, first, plane, image):
    """Store acc in planes first + m of the images of y, with the bias of the plane added."""
    for s in range(2):
        p = p0 + tid % 32 + 32 * s
        if p < P:
            n, rest = divmod32(p, plane)
            index = n * image + rest
            for r in range(4):
                m = m0 + tid // 32 * 4 + r
                if m < M:
                    y[index + (first + m) * plane] = acc[2 * r + s] + b[first + m] if with_bias else acc[2 * r + s]


@device_function
def convolve(tid, acc, position, a, columns, x, w, taps, K, m0, M, first, size):
    """acc = the tile of the product of weights and windows."""
    clear_accumulators(tid, THREADS, acc)
    for k0 in range(0, K, TILE_K):
        load_weights(tid, THREADS, a, w, k0, K, m0, M, first)
        load_windows(tid, THREADS, position, columns, x, taps, k0, size)
        cuda.syncthreads()
        multiply_accumulate(tid, THREADS, acc, a, columns)
        cuda.syncthreads()


@kernel(THREADS, registers=72)
def forward_kernel(y, x, w, b, with_bias, taps, P, M, K, C, size, out, stride, padding):
    """Block (x, y, z): pixels 64 x ..., outputs 16 y ..., group z.  M outputs and C channels per group."""
    a = cuda.shared.array(SIZE_A, x.dtype, alignment=ALIGN)
    columns = cuda.shared.array(SIZE_B, x.dtype, alignment=ALIGN)
    acc, position = cuda.local.array(ACCUMULATORS, x.dtype), cuda.local.array(3, np.int64)
    tid, group, groups = cuda.threadIdx.x, cuda.blockIdx.z, cuda.gridDim.z
    p0, m0 = cuda.blockIdx.x * TILE_N, cuda.blockIdx.y * TILE_M
    plane = size[0] * size[1]
    locate_pixel(tid, THREADS, position, p0, P, out, groups * C * plane, group * C * plane, stride, padding)
    convolve(tid, acc, position, a, columns, x, w, taps, K, m0, M, group * M, size)
    plane = out[0] * out[1]
    store_planes(tid, THREADS, acc, y, b, with_bias, p0, P, m0, M, group * M, plane, groups * M * plane)


def conv2d_forward(y, x, w, b, stride, padding, dilation, groups):
    """y = conv(x, w) + b."""
    (N, _, H, W), (O, C, KH, KW) = x.shape, w.shape
    out, with_bias = y.shape[2:], b.size > 0
    P, M, K = N * out[0] * out[1], O // groups, C * KH * KW
    taps = tap_table(C, (KH, KW), dilation, H * W, 0)
    forward_kernel[(-(-P // TILE_N), -(-M // TILE_M), groups)](
        ravel(y), ravel(x), ravel(w), b if with_bias else ravel(w), with_bias, taps,
        P, M, K, C, (H, W), out, stride, (-padding[0], -padding[1]),
    )  # fmt: skip


# --- y, pooled --------------------------------------------------------------------------------------------------------

WINDOWS = TILE_N // 4  # of 2 x 2 pixels in a tile


@phase
def locate_window_pixel(tid, nt, position, p0, P, out, image, first, stride, padding):
    """`locate_pixel` for pixels in the order of 2 x 2 windows, `out` of them: 4 pixels of one window are neighbours."""
    p = p0 + tid % TILE_N
    n, rest = divmod32(p // 4, out[0] * out[1])
    i, j = divmod32(rest, out[1])
    position[0] = n * image + first
    position[1] = (2 * i + p % 4 // 2) * stride[0] + padding[0] if p < P else OUTSIDE
    position[2] = (2 * j + p % 2) * stride[1] + padding[1]


@phase
def share_tile(tid, nt, acc, tile, b, with_bias, m0, M, first):
    """tile = the accumulators of all threads, with bias: (TILE_M, TILE_N), pitched like a tile of B."""
    for r in range(4):
        row = tid // 32 * 4 + r
        bias = b[U32(first + m0 + row if with_bias and m0 + row < M else 0)] if with_bias else tile.dtype.type(0)
        for s in range(2):
            tile[U32(row * PITCH_B + tid % 32 + 32 * s)] = acc[2 * r + s] + bias


@phase
def pool_window(tid, nt, y, indices, maps, tile, average, scale, code, a, b, p0, P, m0, M, first, planes, size, out):
    """The pooling of one window of the tile for each step of WINDOWS threads."""
    window, rows = p0 // 4 + tid % WINDOWS, THREADS // WINDOWS
    n, rest = divmod32(window, out[0] * out[1])
    i, j = divmod32(rest, out[1])
    for row in range(tid // WINDOWS, TILE_M, rows):
        if m0 + row < M and 4 * window < P:
            plane = n * planes + first + m0 + row
            corner, own = 2 * i * size[1] + 2 * j, tile[U32(row * PITCH_B + tid % WINDOWS * 4) :]
            e = plane * out[0] * out[1] + rest
            if average:
                total = tile.dtype.type(0)
                for k in range(4):
                    pixel = value_in_place(code, own[k], a, b)
                    maps[U32(plane * size[0] * size[1] + corner + k // 2 * size[1] + k % 2)] = pixel
                    total += pixel
                y[e] = total / scale
            else:
                best, argmax = own[0], 0
                for k in range(1, 4):
                    if own[k] > best or own[k] != own[k]:
                        best, argmax = own[k], k
                y[e] = value_in_place(code, best, a, b)
                indices[e] = corner + argmax // 2 * size[1] + argmax % 2


@kernel(THREADS, registers=72)
def pooled_forward_kernel(
    y, indices, maps, average, scale, code, a1, b1, x, w, b, with_bias, taps, P, M, K, C, size, maps_size, out, stride,
    padding,
):  # fmt: skip
    """The blocks of `forward_kernel`, whose pixels are in the order of windows; then the pooling of their tile."""
    a = cuda.shared.array(SIZE_A, x.dtype, alignment=ALIGN)
    columns = cuda.shared.array(SIZE_B, x.dtype, alignment=ALIGN)
    acc, position = cuda.local.array(ACCUMULATORS, x.dtype), cuda.local.array(3, np.int64)
    tid, group, groups = cuda.threadIdx.x, cuda.blockIdx.z, cuda.gridDim.z
    p0, m0 = cuda.blockIdx.x * TILE_N, cuda.blockIdx.y * TILE_M
    plane = size[0] * size[1]
    locate_window_pixel(tid, THREADS, position, p0, P, out, groups * C * plane, group * C * plane, stride, padding)
    convolve(tid, acc, position, a, columns, x, w, taps, K, m0, M, group * M, size)
    share_tile(tid, THREADS, acc, columns, b, with_bias, m0, M, group * M)
    cuda.syncthreads()
    pool_window(
        tid, THREADS, y, indices, maps, columns, average, scale, code, a1, b1, p0, P, m0, M, group * M, groups * M,
        maps_size, out,
    )  # fmt: skip


def run_pooled_forward(y, indices, maps, average, divisor, activation, x, w, b, stride, padding, dilation, groups):
    """Convolution, activation and pooling of 2 x 2 windows, as in fused.py: indices of maxima, or maps of averages."""
    (N, _, H, W), (O, C, KH, KW) = x.shape, w.shape
    out, with_bias = y.shape[2:], b.size > 0
    P, M, K = 4 * N * out[0] * out[1], O // groups, C * KH * KW
    pooled_forward_kernel[(-(-P // TILE_N), -(-M // TILE_M), groups)](
        ravel(y), indices, ravel(maps), average, x.dtype.type(divisor), *value_arguments(activation, x.dtype),
        ravel(x), ravel(w), b if with_bias else ravel(w), with_bias, tap_table(C, (KH, KW), dilation, H * W, 0),
        P, M, K, C, (H, W), maps.shape[2:], out, stride, (-padding[0], -padding[1]),
    )  # fmt: skip


# --- dx ---------------------------------------------------------------------------------------------------------------


@phase
def divide_by_stride(tid, nt, position, stride):
    """Divide row and column of a pixel by the stride; the remainders are combined as in the table of taps."""
    if position[1] >= 0:
        (position[1], row), (position[2], column) = divmod32(position[1], stride[0]), divmod32(position[2], stride[1])
        position[3] = row * stride[1] + column


@phase
def load_gradients(tid, nt, position, b, dy, taps, k0, out):
    """b[k, p] = the entry of dy whose window has pixel p under tap k0 + k, or zero.  Windows start at multiples of
    the stride, so pixel and tap must have the same remainder."""
    first, column = tid // TILE_N, tid % TILE_N
    for i in range(TILE_K // STEP_K):
        k = k0 + first + i * STEP_K
        h, w = position[1] - taps[U32(TAP * k + 1)], position[2] - taps[U32(TAP * k + 2)]
        inside = (U32(h) < U32(out[0])) & (U32(w) < U32(out[1])) & (taps[U32(TAP * k + 4)] == position[3])
        index = position[0] + taps[U32(TAP * k)] + h * out[1] + w
        value = dy[U32(index if inside else 0)]
        b[U32((first + i * STEP_K) * PITCH_B + column)] = value if inside else dy.dtype.type(0)


@phase
def load_transposed_weights(tid, nt, a, w, taps, k0, K, m0, M, first, taps_per_map):
    """a[k, m] = w[o, m0 + m, u, v] for tap k0 + k = (o, u, v) of the group whose weights start at `first`."""
    k = tid % TILE_K
    index = first + taps[U32(TAP * (k0 + k) + 3)]
    for i in range(TILE_M // WARPS):
        m = tid // TILE_K + i * WARPS
        inside = U32(k0 + k) < U32(K) and U32(m0 + m) < U32(M)
        a[U32(k * PITCH_A + m)] = w[U32(index + (m0 + m) * taps_per_map)] if inside else w.dtype.type(0)


@device_function
def input_gradient(
    tid, acc, a, columns, dx, dy, w, taps, block, P, M, K, O, groups, taps_per_map, size, out, stride, padding
):  # fmt: skip
    """Blocks in this order: pixels 64 x ..., channels 16 y ..., groups.  M channels and O outputs per group."""
    position = cuda.local.array(4, np.int64)
    rest, x = divmod32(block, (P + TILE_N - 1) // TILE_N)
    group, row = divmod32(rest, (M + TILE_M - 1) // TILE_M)
    p0, m0, plane = x * TILE_N, row * TILE_M, out[0] * out[1]
    clear_accumulators(tid, THREADS, acc)
    locate_pixel(tid, THREADS, position, p0, P, size, groups * O * plane, group * O * plane, (1, 1), padding)
    divide_by_stride(tid, THREADS, position, stride)
    for k0 in range(0, K, TILE_K):
        load_transposed_weights(tid, THREADS, a, w, taps, k0, K, m0, M, group * O * M * taps_per_map, taps_per_map)
        load_gradients(tid, THREADS, position, columns, dy, taps, k0, out)
        cuda.syncthreads()
        multiply_accumulate(tid, THREADS, acc, a, columns)
        cuda.syncthreads()
    plane = size[0] * size[1]
    store_planes(tid, THREADS, acc, dx, w, False, p0, P, m0, M, group * M, plane, groups * M * plane)


# --- dw and db --------------------------------------------------------------------------------------------------------


@phase
def load_pixels(
    tid, nt, a, b, dy, x, taps, k0, k1, m0, M, c0, C, O, first_o, first_x, image, size, out, stride, padding
):
    """a[k, m] = dy of output m0 + m at pixel k0 + k; b[k, c] = the pixel of x under tap c0 + c, 1 after the taps."""
    k = tid % TILE_K
    p, plane = k0 + k, out[0] * out[1]
    n, rest = divmod32(p, plane)
    i, j = divmod32(rest, out[1])
    h0, w0 = i * stride[0] + padding[0] if p < k1 else OUTSIDE, j * stride[1] + padding[1]
    start = (n * O + first_o) * plane + rest
    for i in range(TILE_M // WARPS):
        m = tid // TILE_K + i * WARPS
        inside = p < k1 and U32(m0 + m) < U32(M)
        a[U32(k * PITCH_A + m)] = dy[U32(start + (m0 + m) * plane)] if inside else x.dtype.type(0)
    start = n * image + first_x
    for i in range(TILE_N // WARPS):
        column = tid // TILE_K + i * WARPS
        c = c0 + column
        h, w = h0 + taps[U32(TAP * c + 1)], w0 + taps[U32(TAP * c + 2)]
        inside = (U32(h) < U32(size[0])) & (U32(w) < U32(size[1]))
        index = start + taps[U32(TAP * c)] + h * size[1] + w
        pixel = x[U32(index if inside else 0)]
        b[U32(k * PITCH_B + column)] = pixel if inside else x.dtype.type(c == C)


@device_function
def weight_gradient(
    tid, acc, a, columns, flag, dw, db, with_sums, dy, x, taps, block, K, M, C, channels, groups, size, out, stride,
    padding, length, splits, parts, counters, pitch,
):  # fmt: skip
    """Blocks in this order: splits of the sum over K pixels, `length` long, taps 64 x ..., outputs 16 y ..., groups."""
    columns_of_tiles, row_tiles = (C + with_sums + TILE_N - 1) // TILE_N, (M + TILE_M - 1) // TILE_M
    tile, split = divmod32(block, splits)
    rest, column_tile = divmod32(tile, columns_of_tiles)
    group, row_tile = divmod32(rest, row_tiles)
    c0, m0 = column_tile * TILE_N, row_tile * TILE_M
    plane = size[0] * size[1]
    k1 = min(K, (split + 1) * length)
    clear_accumulators(tid, THREADS, acc)
    for k0 in range(split * length, k1, TILE_K):
        load_pixels(
            tid, THREADS, a, columns, dy, x, taps, k0, k1, m0, M, c0, C, groups * M, group * M,
            group * channels * plane, groups * channels * plane, size, out, stride, padding,
        )  # fmt: skip
        cuda.syncthreads()
        multiply_accumulate(tid, THREADS, acc, a, columns)
        cuda.syncthreads()
    if add_splits(tid, acc, parts, counters, flag, tile, split, splits, pitch):
        # Groups are stacked along the rows: row m of this group is row group*M + m of dw.
        rows, zero = group * M, dw.dtype.type(0)
        store_tile(tid, THREADS, acc, dw, db, db, with_sums, False, NONE, zero, zero, rows + m0, rows + M, c0, C)


@kernel(THREADS, registers=80)
def backward_kernel(
    dx, dw, db, with_sums, dy, x, w, w_taps, w_blocks, K, M, channels, groups, length, splits, parts, counters, pitch,
    x_taps, P, taps_per_map, size, out, stride, padding, corner,
):  # fmt: skip
    """The blocks of dw and db, then those of dx.  M outputs and `channels` channels per group, K pixels of y."""
    a = cuda.shared.array(SIZE_A, x.dtype, alignment=ALIGN)
    columns = cuda.shared.array(SIZE_B, x.dtype, alignment=ALIGN)
    flag, acc = cuda.shared.array(1, np.uint32), cuda.local.array(ACCUMULATORS, x.dtype)
    tid, block = cuda.threadIdx.x, cuda.blockIdx.x
    if block < w_blocks:
        weight_gradient(
            tid, acc, a, columns, flag, dw, db, with_sums, dy, x, w_taps, block, K, M, channels * taps_per_map,
            channels, groups, size, out, stride, corner, length, splits, parts, counters, pitch,
        )  # fmt: skip
    else:
        input_gradient(
            tid, acc, a, columns, dx, dy, w, x_taps, block - w_blocks, P, channels, M * taps_per_map, M, groups,
            taps_per_map, size, out, stride, padding,
        )  # fmt: skip


def conv2d_backward(dx, dw, db, dy, x, w, stride, padding, dilation, groups):
    """Gradients of all three arguments of `conv2d_forward`, in one launch; those of size 0 are not computed.  db needs
    dw."""
    (N, _, H, W), (O, channels, KH, KW) = x.shape, w.shape
    out, taps_per_map, M, with_sums = dy.shape[2:], KH * KW, O // groups, db.size > 0
    K, P = N * out[0] * out[1], N * H * W
    tiles = groups * -(-M // TILE_M) * -(-(channels * taps_per_map + with_sums) // TILE_N) if dw.size else 0
    x_blocks = groups * -(-channels // TILE_M) * -(-P // TILE_N) if dx.size else 0
    length, splits = split_k(K, tiles, 256)
    backward_kernel[tiles * splits + x_blocks](
        ravel(dx), ravel(dw), db if with_sums else ravel(dw), with_sums, ravel(dy), ravel(x), ravel(w),
        tap_table(channels, (KH, KW), dilation, H * W, 0), tiles * splits, K, M, channels, groups, length, splits,
        *split_workspace(tiles, splits, x.dtype),
        tap_table(M, (KH, KW), dilation, out[0] * out[1], channels * taps_per_map, -OUTSIDE, stride), P, taps_per_map,
        (H, W), out, stride, padding, (-padding[0], -padding[1]),
    )  # fmt: skip


# --- im2col and col2im, for teaching and for tests --------------------------------------------------------------------


@phase
def im2col_entry(tid, nt, first, columns, x, kernel_size, size, out, stride, padding, dilation):
    """One entry of the column matrix."""
    e = first + tid
    if e < columns.size:
        tap, index = divmod32(e, out[0] * out[1])  # tap: ((n*C + c)*KH + u)*KW + v
        row, v = divmod32(tap, kernel_size[1])
        image, u = divmod32(row, kernel_size[0])
        i, j = divmod32(index, out[1])
        h, w = i * stride[0] + u * dilation[0] - padding[0], j * stride[1] + v * dilation[1] - padding[1]
        inside = h >= 0 and h < size[0] and w >= 0 and w < size[1]
        columns[e] = x[(image * size[0] + h) * size[1] + w] if inside else x.dtype.type(0)


@kernel(THREADS, registers=64)
def im2col_kernel(columns, x, kernel_size, size, out, stride, padding, dilation):
    first = cuda.blockIdx.x * THREADS
    im2col_entry(cuda.threadIdx.x, THREADS, first, columns, x, kernel_size, size, out, stride, padding, dilation)


def im2col(columns, x, kernel_size, out_size, stride, padding, dilation):
    """columns: (N, C*KH*KW, OH*OW) from x: (N, C, H, W); out_size is (OH, OW)."""
    im2col_kernel[blocks(columns.size)](
        ravel(columns), ravel(x), kernel_size, x.shape[2:], out_size, stride, padding, dilation
    )


@phase
def col2im_pixel(tid, nt, first, x, columns, kernel_size, size, out, stride, padding, dilation):
    """One pixel of x: the sum of its copies in the column matrix."""
    e = first + tid
    if e < x.size:
        image, rest = divmod32(e, size[0] * size[1])
        row0, column0 = divmod32(rest, size[1])
        total = x.dtype.type(0)
        for u in range(kernel_size[0]):
            h = row0 + padding[0] - u * dilation[0]
            for v in range(kernel_size[1]):
                w = column0 + padding[1] - v * dilation[1]
                (i, above), (j, left) = divmod32(max(h, 0), stride[0]), divmod32(max(w, 0), stride[1])
                if h >= 0 and w >= 0 and above == 0 and left == 0 and i < out[0] and j < out[1]:
                    row = (image * kernel_size[0] + u) * kernel_size[1] + v
                    total += columns[(row * out[0] + i) * out[1] + j]
        x[e] = total


@kernel(THREADS, registers=64)
def col2im_kernel(x, columns, kernel_size, size, out, stride, padding, dilation):
    first = cuda.blockIdx.x * THREADS
    col2im_pixel(cuda.threadIdx.x, THREADS, first, x, columns, kernel_size, size, out, stride, padding, dilation)


def col2im(x, columns, kernel_size, out_size, stride, padding, dilation):
    """x: (N, C, H, W), each pixel the sum of its copies in columns: (N, C*KH*KW, OH*OW)."""
    col2im_kernel[blocks(x.size)](
        ravel(x), ravel(columns), kernel_size, x.shape[2:], out_size, stride, padding, dilation
    )
