"""Average and max pooling over KH x KW windows, forward and backward.

x: (N, C, H, W)   y: (N, C, OH, OW)   window of y[i, j]: rows i*sh - ph ..., columns j*sw - pw ...
kernel_size, stride, padding, dilation: pairs.  The caller chooses OH and OW (with or without ceil_mode); parts of a
window outside of the padded image do not count.

Batches may be blocked, (B, C, H, W, L), see layout.py; else a pixel has L = 1 lane.  The inner loops run over lanes.
Windows of 2 x 2 with stride 2, the usual case, have separate loops.
"""

import numpy as np
from numba import prange

from tinycnn.kernels._jit import device_function, inline_ir, kernel
from tinycnn.kernels._simd import (
    deinterleave,
    fma,
    load,
    load_where,
    pixel_zero,
    ravel,
    splat,
    store,
    store_max,
    update_max,
    width,
    zeros,
)
from tinycnn.kernels.layout import lanes, valid_range


@device_function
def is_2x2(kernel_size, stride, padding, H, W, OH, OW):
    """Whether windows are 2 x 2, side by side, and all inside the image."""
    two, zero = (2, 2), (0, 0)
    return kernel_size == two and stride == two and padding == zero and 2 * OH <= H and 2 * OW <= W


@device_function
def window_counts(length, out, size, step, pad, count_include_pad):
    """Number of entries of each window along one axis: (out,)"""
    count = np.empty(out, np.int64)
    for i in range(out):
        start = i * step - pad
        stop = min(start + size, length + pad)
        if not count_include_pad:
            start, stop = max(start, 0), min(stop, length)
        count[i] = stop - start
    return count


@device_function
def clear(plane):
    flat = ravel(plane)
    for i in range(flat.size):
        flat[i] = 0


@inline_ir
def row(plane, i):
    """Row i of a plane, (H, W) or (H, W, L), flat."""
    return ravel(plane[i])


@device_function
def mean_2x2(y, x, scale, first, end):
    """Rows first ... end - 1 of y = scale * (sum of window).  y: (OH, OW) or (OH, OW, L)   x: (H, W) or (H, W, L)"""
    OW, L, zero = y.shape[1], lanes(x), pixel_zero(x)
    factor = splat(scale, zero)
    for i in range(first, end):
        out, upper, lower = row(y, i), row(x, 2 * i), row(x, 2 * i + 1)
        for j in range(OW):
            k = 2 * j * L
            left = fma(load(upper, k, zero), factor, fma(load(lower, k, zero), factor, zero))
            right = fma(load(upper, k + L, zero), factor, fma(load(lower, k + L, zero), factor, left))
            store(out, j * L, right)


@device_function
def mean_plane(y, x, rows, columns, kernel_size, stride, padding, divisor):
    """One plane.  rows, columns: `window_counts` of both axes"""
    (H, W), (OH, OW), L = x.shape[:2], y.shape[:2], lanes(x)
    (KH, KW), (sh, sw), (ph, pw) = kernel_size, stride, padding
    clear(y)
    for i in range(OH):
        out = row(y, i)
        for h in range(max(0, i * sh - ph), min(H, i * sh - ph + KH)):
            source = row(x, h)
            for v in range(KW):
                j0, j1 = valid_range(v - pw, sw, OW, W)
                for j in range(j0, j1):
                    k = (j * sw + v - pw) * L
                    for n in range(L):
                        out[j * L + n] += source[k + n]
        for j in range(OW):
            count = x.dtype.type(divisor if divisor > 0 else rows[i] * columns[j])
            for n in range(L):
                out[j * L + n] /= count


@kernel
def avg_pool2d_forward(y, x, kernel_size, stride, padding, count_include_pad, divisor):
    """y = mean of each window, or its sum / divisor if divisor > 0."""
    (B, C, H, W), (OH, OW) = x.shape[:4], y.shape[2:4]
    rows = window_counts(H, OH, kernel_size[0], stride[0], padding[0], count_include_pad)
    columns = window_counts(W, OW, kernel_size[1], stride[1], padding[1], count_include_pad)
    scale = x.dtype.type(1 / (divisor if divisor > 0 else 4))
    simple = is_2x2(kernel_size, stride, padding, H, W, OH, OW)
    for task in prange(B * C):
        b, c = task // C, task % C
        if simple:
            mean_2x2(y[b, c], x[b, c], scale, 0, OH)
        else:
            mean_plane(y[b, c], x[b, c], rows, columns, kernel_size, stride, padding, divisor)


@device_function
def repeat_pixels(out, source, scale, like):
    """Each pixel of the row `source`, times scale, repeated twice.  like: a plane, for its number of lanes"""
    L, zero = lanes(like), pixel_zero(like)
    factor = splat(scale, zero)
    for j in range(source.size // L):
        pixel = fma(load(source, j * L, zero), factor, zero)
        store(out, 2 * j * L, pixel)
        store(out, (2 * j + 1) * L, pixel)


@device_function
def mean_2x2_backward(dx, dy, scale):
    """One plane, the transpose of `mean_2x2`."""
    (H, W), (OH, OW) = dx.shape[:2], dy.shape[:2]
    if H > 2 * OH or W > 2 * OW:
        clear(dx)
    for i in range(OH):
        for h in (2 * i, 2 * i + 1):
            repeat_pixels(row(dx, h), row(dy, i), scale, dx)


@device_function
def mean_plane_backward(dx, dy, rows, columns, kernel_size, stride, padding, divisor):
    """One plane, the transpose of `mean_plane`."""
    (H, W), (OH, OW), L = dx.shape[:2], dy.shape[:2], lanes(dx)
    (KH, KW), (sh, sw), (ph, pw) = kernel_size, stride, padding
    clear(dx)
    for i in range(OH):
        source = row(dy, i)
        for h in range(max(0, i * sh - ph), min(H, i * sh - ph + KH)):
            target = row(dx, h)
            for v in range(KW):
                j0, j1 = valid_range(v - pw, sw, OW, W)
                for j in range(j0, j1):
                    k = (j * sw + v - pw) * L
                    count = dx.dtype.type(divisor if divisor > 0 else rows[i] * columns[j])
                    for n in range(L):
                        target[k + n] += source[j * L + n] / count


@kernel
def avg_pool2d_backward(dx, dy, kernel_size, stride, padding, count_include_pad, divisor):
    (B, C, H, W), (OH, OW) = dx.shape[:4], dy.shape[2:4]
    rows = window_counts(H, OH, kernel_size[0], stride[0], padding[0], count_include_pad)
    columns = window_counts(W, OW, kernel_size[1], stride[1], padding[1], count_include_pad)
    scale = dx.dtype.type(1 / (divisor if divisor > 0 else 4))
    simple = is_2x2(kernel_size, stride, padding, H, W, OH, OW)
    for task in prange(B * C):
        b, c = task // C, task % C
        if simple:
            mean_2x2_backward(dx[b, c], dy[b, c], scale)
        else:
            mean_plane_backward(dx[b, c], dy[b, c], rows, columns, kernel_size, stride, padding, divisor)


@device_function
def max_2x2(y, indices, x):
    """One plane; shapes as in `mean_2x2`."""
    (OH, OW), W, L, zero = y.shape[:2], x.shape[1], lanes(x), pixel_zero(x)
    for i in range(OH):
        out, position, upper, lower = row(y, i), row(indices, i), row(x, 2 * i), row(x, 2 * i + 1)
        for j in range(OW):
            corner, k = 2 * i * W + 2 * j, 2 * j * L
            pixels = load(upper, k, zero), load(upper, k + L, zero), load(lower, k, zero), load(lower, k + L, zero)
            keys = np.int32(corner), np.int32(corner + 1), np.int32(corner + W), np.int32(corner + W + 1)
            store_max(out, position, j * L, pixels, keys)


@device_function
def max_2x2_values(y, x):
    """`max_2x2` without indices."""
    OW, L, zero, W, vector = y.shape[1], lanes(x), pixel_zero(x), width(x), zeros(x, 1)[0]
    out, source, pitch = ravel(y), ravel(x), x.shape[1] * lanes(x)
    for i in range(len(y)):
        j, k = 0, 2 * i * pitch
        # A number is a pixel: vectors of windows.  What is beyond the row is overwritten by the next one.
        while L == 1 and j < OW and i * OW + j + W <= out.size and k + pitch + 2 * W <= source.size:
            upper = deinterleave(load(source, k, vector), load(source, k + W, vector))
            lower = deinterleave(load(source, k + pitch, vector), load(source, k + pitch + W, vector))
            store_max(out, None, i * OW + j, (upper[0], upper[1], lower[0], lower[1]), None)
            j, k = j + W, k + 2 * W
        for column in range(j, OW):
            k = 2 * i * pitch + 2 * column * L
            upper = load(source, k, zero), load(source, k + L, zero)
            lower = load(source, k + pitch, zero), load(source, k + pitch + L, zero)
            store_max(out, None, (i * OW + column) * L, (upper[0], upper[1], lower[0], lower[1]), None)


@device_function
def max_plane(y, indices, x, kernel_size, stride, padding, dilation):
    (H, W), (OH, OW), L, zero = x.shape[:2], y.shape[:2], lanes(x), pixel_zero(x)
    (KH, KW), (sh, sw), (ph, pw), (dh, dw) = kernel_size, stride, padding, dilation
    for i in range(OH):
        out, position = row(y, i), row(indices, i)
        for j in range(OW * L):
            out[j], position[j] = -np.inf, -1
        for u in range(KH):
            h = i * sh - ph + u * dh
            if h < 0 or h >= H:
                continue
            source = row(x, h)
            for v in range(KW):
                j0, j1 = valid_range(v * dw - pw, sw, OW, W)
                for j in range(j0, j1):
                    w = j * sw + v * dw - pw
                    update_max(out, position, j * L, load(source, w * L, zero), np.int32(h * W + w))


@inline_ir
def max_windows(y, indices, x, kernel_size, stride, padding, dilation):
    """One plane.  indices of size 0 are not computed, if windows are 2 x 2"""
    if is_2x2(kernel_size, stride, padding, x.shape[0], x.shape[1], len(y), y.shape[1]) and dilation == (1, 1):
        if indices.size:
            max_2x2(y, indices, x)
        else:
            max_2x2_values(y, x)
    else:
        max_plane(y, indices, x, kernel_size, stride, padding, dilation)


@kernel
def max_pool2d_forward(y, indices, x, kernel_size, stride, padding, dilation):
    """y = largest entry of each window, indices = its position h*W + w in the plane; the first of equal
    entries, and NaN if there is one, as in torch.  indices: int32, shape of y."""
    C = x.shape[1]
    for task in prange(len(x) * C):
        b, c = task // C, task % C
        max_windows(y[b, c], indices[b, c], x[b, c], kernel_size, stride, padding, dilation)


@device_function
def unpool_2x2(dx, dy, indices):
    """One plane, the transpose of `max_2x2`."""
    (H, W), (OH, OW), L, zero = dx.shape[:2], dy.shape[:2], lanes(dx), pixel_zero(dx)
    if H > 2 * OH or W > 2 * OW:
        clear(dx)
    for i in range(OH):
        upper, lower, source, position = row(dx, 2 * i), row(dx, 2 * i + 1), row(dy, i), row(indices, i)
        for j in range(OW):
            corner, k = 2 * i * W + 2 * j, 2 * j * L
            store(upper, k, load_where(source, j * L, position, np.int32(corner), zero))
            store(upper, k + L, load_where(source, j * L, position, np.int32(corner + 1), zero))
            store(lower, k, load_where(source, j * L, position, np.int32(corner + W), zero))
            store(lower, k + L, load_where(source, j * L, position, np.int32(corner + W + 1), zero))


@device_function
def unpool_plane(dx, dy, indices):
    L = lanes(dx)
    target, source, position = ravel(dx), ravel(dy), ravel(indices)
    clear(dx)
    for k in range(0, source.size, L):
        for n in range(L):
            if position[k + n] >= 0:  # -1: a window of padding only, whose maximum is -inf
                target[position[k + n] * L + n] += source[k + n]


@inline_ir
def unpool(dx, dy, indices, kernel_size, stride, padding, dilation):
    """One plane, the transpose of `max_windows`."""
    if is_2x2(kernel_size, stride, padding, dx.shape[0], dx.shape[1], len(dy), dy.shape[1]) and dilation == (1, 1):
        unpool_2x2(dx, dy, indices)
    else:
        unpool_plane(dx, dy, indices)


@kernel
def max_pool2d_backward(dx, dy, indices, kernel_size, stride, padding, dilation):
    """dx = sum of dy over the windows with their maximum at that pixel."""
    C = dx.shape[1]
    for task in prange(len(dx) * C):
        b, c = task // C, task % C
        unpool(dx[b, c], dy[b, c], indices[b, c], kernel_size, stride, padding, dilation)


# --- adaptive: windows from floor(i*H / OH) to ceil((i + 1)*H / OH) ---------------------------------------------------


@device_function
def adaptive_window(i, size, out):
    """(first, end) of window i of `out` windows over an axis of `size`."""
    return i * size // out, ((i + 1) * size + out - 1) // out


@device_function
def adaptive_mean(y, x):
    """One plane."""
    (H, W), (OH, OW), L, zero, source, out = x.shape[:2], y.shape[:2], lanes(x), pixel_zero(x), ravel(x), ravel(y)
    one = splat(x.dtype.type(1), zero)
    for i in range(OH):
        h0, h1 = adaptive_window(i, H, OH)
        for j in range(OW):
            w0, w1 = adaptive_window(j, W, OW)
            # Windows of whole rows are one run.
            rows, run = (1, (h1 - h0) * W) if w1 - w0 == W else (h1 - h0, w1 - w0)
            total = zero
            for h in range(rows):
                first = (h0 + h) * W + w0
                for k in range(first, first + run):
                    total = fma(load(source, k * L, zero), one, total)
            store(out, (i * OW + j) * L, fma(total, splat(x.dtype.type(1 / ((h1 - h0) * (w1 - w0))), zero), zero))


@kernel
def adaptive_avg_pool2d_forward(y, x):
    """y[i, j] = mean of its window.   x: (N, C, H, W)   y: (N, C, OH, OW)"""
    B, C = x.shape[:2]
    for task in prange(B * C):
        adaptive_mean(y[task // C, task % C], x[task // C, task % C])


@kernel
def adaptive_avg_pool2d_backward(dx, dy):
    """dx[h, w] = sum of dy / size of the window, over the windows with the pixel."""
    (B, C, H, W), (OH, OW) = dx.shape[:4], dy.shape[2:4]
    for task in prange(B * C):
        source, plane = ravel(dy[task // C, task % C]), dx[task // C, task % C]
        clear(plane)
        L, out = lanes(plane), ravel(plane)
        for i in range(OH):
            h0, h1 = adaptive_window(i, H, OH)
            for j in range(OW):
                w0, w1 = adaptive_window(j, W, OW)
                scale, p = dx.dtype.type(1 / ((h1 - h0) * (w1 - w0))), (i * OW + j) * L
                for h in range(h0, h1):
                    for w in range(w0, w1):
                        for n in range(L):
                            out[(h * W + w) * L + n] += scale * source[p + n]
