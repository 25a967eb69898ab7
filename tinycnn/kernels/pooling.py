"""Average and max pooling over KH x KW windows, forward and backward.

x: (N, C, H, W)   y: (N, C, OH, OW)   window of y[i, j]: rows i*sh - ph ..., columns j*sw - pw ...
kernel_size, stride, padding, dilation: pairs.  The caller chooses OH and OW (with or without ceil_mode); what a window
has outside the padded image does not count.

Loops run along rows: for each row of the window and each of its columns, one pass over an output row.  The windows of
nearly every net, 2 x 2 side by side, are written out: on short rows four passes cost more than the sums.
"""

import numpy as np
from numba import prange

from tinycnn.kernels._jit import inner, kernel


@inner
def columns_inside(v, step, pad, W, OW):
    """The range of j for which column j*step + v - pad lies inside 0 ... W."""
    first = max(0, (pad - v + step - 1) // step)
    return first, max(first, min(OW, (W + pad - v + step - 1) // step))


@inner
def is_2x2(kernel_size, stride, padding, H, W, OH, OW):
    """Whether windows are 2 x 2, side by side, and all inside the image."""
    two, none = (2, 2), (0, 0)
    return kernel_size == two and stride == two and padding == none and 2 * OH <= H and 2 * OW <= W


@inner
def window_shares(length, out, size, step, pad, count_include_pad):
    """For each output position the number of entries in its window along one axis; padding counts if it is to."""
    count = np.empty(out, np.int64)
    for i in range(out):
        start = i * step - pad
        stop = min(start + size, length + pad)
        if not count_include_pad:
            start, stop = max(start, 0), min(stop, length)
        count[i] = stop - start
    return count


@inner
def mean_2x2(y, x, share):
    """One plane.  y: (OH, OW)   x: (H, W)"""
    for i in range(len(y)):
        out, top, low = y[i], x[2 * i], x[2 * i + 1]
        for j in range(y.shape[1]):
            out[j] = ((top[2 * j] + top[2 * j + 1]) + (low[2 * j] + low[2 * j + 1])) * share


@inner
def mean_plane(y, x, rows, columns, kernel_size, stride, padding, divisor):
    (H, W), (OH, OW) = x.shape, y.shape
    (KH, KW), (sh, sw), (ph, pw) = kernel_size, stride, padding
    for i in range(OH):
        out = y[i]
        for j in range(OW):
            out[j] = 0
        for h in range(max(0, i * sh - ph), min(H, i * sh - ph + KH)):
            row = x[h]
            for v in range(KW):
                j0, j1 = columns_inside(v, sw, pw, W, OW)
                for j in range(j0, j1):
                    out[j] += row[j * sw + v - pw]
        for j in range(OW):
            out[j] /= x.dtype.type(divisor if divisor > 0 else rows[i] * columns[j])


@kernel
def avg_pool2d_forward(y, x, kernel_size, stride, padding, count_include_pad, divisor):
    """y = mean of each window, or its sum / divisor if divisor > 0."""
    N, C, H, W = x.shape
    OH, OW = y.shape[2:]
    rows = window_shares(H, OH, kernel_size[0], stride[0], padding[0], count_include_pad)
    columns = window_shares(W, OW, kernel_size[1], stride[1], padding[1], count_include_pad)
    share = x.dtype.type(1 / (divisor if divisor > 0 else 4))
    simple = is_2x2(kernel_size, stride, padding, H, W, OH, OW)
    for n in prange(N):
        for c in range(C):
            if simple:
                mean_2x2(y[n, c], x[n, c], share)
            else:
                mean_plane(y[n, c], x[n, c], rows, columns, kernel_size, stride, padding, divisor)


@inner
def clear(plane):
    flat = plane.reshape(plane.size)
    for i in range(flat.size):
        flat[i] = 0


@inner
def spread_2x2(dx, dy, share):
    """One plane, the transpose of `mean_2x2`."""
    if 2 * dy.shape[0] < dx.shape[0] or 2 * dy.shape[1] < dx.shape[1]:
        clear(dx)
    for i in range(len(dy)):
        out, top, low = dy[i], dx[2 * i], dx[2 * i + 1]
        for j in range(dy.shape[1]):
            part = out[j] * share
            top[2 * j], top[2 * j + 1], low[2 * j], low[2 * j + 1] = part, part, part, part


@inner
def spread_plane(dx, dy, rows, columns, kernel_size, stride, padding, divisor):
    """One plane, the transpose of `mean_plane`."""
    (H, W), (OH, OW) = dx.shape, dy.shape
    (KH, KW), (sh, sw), (ph, pw) = kernel_size, stride, padding
    share = np.empty(OW, dx.dtype)
    clear(dx)
    for i in range(OH):
        for j in range(OW):
            share[j] = dy[i, j] / dx.dtype.type(divisor if divisor > 0 else rows[i] * columns[j])
        for h in range(max(0, i * sh - ph), min(H, i * sh - ph + KH)):
            row = dx[h]
            for v in range(KW):
                j0, j1 = columns_inside(v, sw, pw, W, OW)
                for j in range(j0, j1):
                    row[j * sw + v - pw] += share[j]


@kernel
def avg_pool2d_backward(dx, dy, kernel_size, stride, padding, count_include_pad, divisor):
    N, C, H, W = dx.shape
    OH, OW = dy.shape[2:]
    rows = window_shares(H, OH, kernel_size[0], stride[0], padding[0], count_include_pad)
    columns = window_shares(W, OW, kernel_size[1], stride[1], padding[1], count_include_pad)
    share = dx.dtype.type(1 / (divisor if divisor > 0 else 4))
    simple = is_2x2(kernel_size, stride, padding, H, W, OH, OW)
    for n in prange(N):
        for c in range(C):
            if simple:
                spread_2x2(dx[n, c], dy[n, c], share)
            else:
                spread_plane(dx[n, c], dy[n, c], rows, columns, kernel_size, stride, padding, divisor)


@inner
def max_2x2(y, indices, x):
    """One plane.  y, indices: (OH, OW)   x: (H, W)"""
    W = x.shape[1]
    for i in range(len(y)):
        out, where, top, low = y[i], indices[i], x[2 * i], x[2 * i + 1]
        corner = np.int32(2 * i * W)
        for j in range(y.shape[1]):
            best, w = top[2 * j], corner
            value = top[2 * j + 1]
            better = value > best or value != value
            best, w = (value if better else best), (corner + 1 if better else w)
            value = low[2 * j]
            better = value > best or value != value
            best, w = (value if better else best), (corner + W if better else w)
            value = low[2 * j + 1]
            better = value > best or value != value
            out[j], where[j] = (value if better else best), (corner + W + 1 if better else w) + 2 * j


@inner
def max_plane(y, indices, x, kernel_size, stride, padding, dilation):
    (H, W), (OH, OW) = x.shape, y.shape
    (KH, KW), (sh, sw), (ph, pw), (dh, dw) = kernel_size, stride, padding, dilation
    for i in range(OH):
        out, where = y[i], indices[i]
        for j in range(OW):
            out[j], where[j] = -np.inf, -1
        for u in range(KH):
            h = i * sh - ph + u * dh
            if h < 0 or h >= H:
                continue
            row = x[h]
            for v in range(KW):
                j0, j1 = columns_inside(v * dw, sw, pw, W, OW)
                for j in range(j0, j1):
                    w = j * sw + v * dw - pw
                    value = row[w]
                    better = value > out[j] or value != value or where[j] < 0
                    out[j] = value if better else out[j]
                    where[j] = h * W + w if better else where[j]


@kernel
def max_pool2d_forward(y, indices, x, kernel_size, stride, padding, dilation):
    """y = largest entry of each window, indices = its position h*W + w in the plane; the first one where several are
    equal, and NaN where there is one, as in torch.  indices: int32, shape of y."""
    N, C, H, W = x.shape
    OH, OW = y.shape[2:]
    simple = is_2x2(kernel_size, stride, padding, H, W, OH, OW) and dilation[0] == 1 and dilation[1] == 1
    for n in prange(N):
        for c in range(C):
            if simple:
                max_2x2(y[n, c], indices[n, c], x[n, c])
            else:
                max_plane(y[n, c], indices[n, c], x[n, c], kernel_size, stride, padding, dilation)


@kernel
def max_pool2d_backward(dx, dy, indices, kernel_size, stride, padding, dilation):
    """dx = dy where `indices` say that the maximum stood.  (The windows are for the CUDA twin: there, a pixel looks for
    those it lies in.)"""
    N, C, OH, OW = dy.shape
    for n in prange(N):
        for c in range(C):
            plane = dx[n, c].reshape(dx[n, c].size)
            clear(plane)
            for i in range(OH):
                for j in range(OW):
                    if indices[n, c, i, j] >= 0:  # below: a window of padding alone, whose maximum is -inf
                        plane[indices[n, c, i, j]] += dy[n, c, i, j]
