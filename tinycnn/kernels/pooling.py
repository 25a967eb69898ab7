"""Average and max pooling over KH x KW windows, forward and backward.

x: (N, C, H, W)   y: (N, C, OH, OW)   window of y[i, j]: rows i*sh - ph ..., columns j*sw - pw ...
kernel_size, stride, padding, dilation: pairs.  The caller chooses OH and OW (with or without ceil_mode); what a window
has outside the padded image does not count.

Loops run along rows: for each row of the window and each of its columns, one pass over an output row.  The windows of
nearly every net, 2 x 2 side by side, are written out: rows are short, and four passes over them cost more than the sums.
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


@kernel
def avg_pool2d_forward(y, x, kernel_size, stride, padding, count_include_pad, divisor):
    """y = mean of each window, or its sum / divisor if divisor > 0."""
    N, C, H, W = x.shape
    OH, OW = y.shape[2], y.shape[3]
    KH, KW = kernel_size
    (sh, sw), (ph, pw) = stride, padding
    rows = window_shares(H, OH, KH, sh, ph, count_include_pad)
    columns = window_shares(W, OW, KW, sw, pw, count_include_pad)
    if is_2x2(kernel_size, stride, padding, H, W, OH, OW):
        share = x.dtype.type(1 / (divisor if divisor > 0 else 4))
        for at in prange(N * C):
            n, c = at // C, at % C
            for i in range(OH):
                out, top, low = y[n, c, i], x[n, c, 2 * i], x[n, c, 2 * i + 1]
                for j in range(OW):
                    out[j] = ((top[2 * j] + top[2 * j + 1]) + (low[2 * j] + low[2 * j + 1])) * share
        return
    for at in prange(N * C):
        n, c = at // C, at % C
        for i in range(OH):
            out = y[n, c, i]
            for j in range(OW):
                out[j] = 0
            for h in range(max(0, i * sh - ph), min(H, i * sh - ph + KH)):
                row = x[n, c, h]
                for v in range(KW):
                    j0, j1 = columns_inside(v, sw, pw, W, OW)
                    for j in range(j0, j1):
                        out[j] += row[j * sw + v - pw]
            for j in range(OW):
                out[j] /= x.dtype.type(divisor if divisor > 0 else rows[i] * columns[j])


@kernel
def avg_pool2d_backward(dx, dy, kernel_size, stride, padding, count_include_pad, divisor):
    N, C, H, W = dx.shape
    OH, OW = dy.shape[2], dy.shape[3]
    KH, KW = kernel_size
    (sh, sw), (ph, pw) = stride, padding
    rows = window_shares(H, OH, KH, sh, ph, count_include_pad)
    columns = window_shares(W, OW, KW, sw, pw, count_include_pad)
    if is_2x2(kernel_size, stride, padding, H, W, OH, OW):
        quarter = dx.dtype.type(1 / (divisor if divisor > 0 else 4))
        for at in prange(N * C):
            n, c = at // C, at % C
            plane = dx[n, c].reshape(H * W)
            if 2 * OH < H or 2 * OW < W:
                for w in range(H * W):
                    plane[w] = 0
            for i in range(OH):
                out, top, low = dy[n, c, i], dx[n, c, 2 * i], dx[n, c, 2 * i + 1]
                for j in range(OW):
                    part = out[j] * quarter
                    top[2 * j], top[2 * j + 1], low[2 * j], low[2 * j + 1] = part, part, part, part
        return
    for at in prange(N * C):
        n, c = at // C, at % C
        share = np.empty(OW, dx.dtype)
        plane = dx[n, c].reshape(H * W)
        for w in range(H * W):
            plane[w] = 0
        for i in range(OH):
            for j in range(OW):
                share[j] = dy[n, c, i, j] / dx.dtype.type(divisor if divisor > 0 else rows[i] * columns[j])
            for h in range(max(0, i * sh - ph), min(H, i * sh - ph + KH)):
                row = dx[n, c, h]
                for v in range(KW):
                    j0, j1 = columns_inside(v, sw, pw, W, OW)
                    for j in range(j0, j1):
                        row[j * sw + v - pw] += share[j]


@kernel
def max_pool2d_forward(y, indices, x, kernel_size, stride, padding, dilation):
    """y = largest entry of each window, indices = its position h*W + w in the plane; the first one where several are
    equal, and NaN where there is one, as in torch.  indices: int32, shape of y."""
    N, C, H, W = x.shape
    OH, OW = y.shape[2], y.shape[3]
    KH, KW = kernel_size
    (sh, sw), (ph, pw), (dh, dw) = stride, padding, dilation
    if is_2x2(kernel_size, stride, padding, H, W, OH, OW) and dh == 1 and dw == 1:
        for at in prange(N * C):
            n, c = at // C, at % C
            for i in range(OH):
                out, where, top, low = y[n, c, i], indices[n, c, i], x[n, c, 2 * i], x[n, c, 2 * i + 1]
                corner = np.int32(2 * i * W)
                for j in range(OW):
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
        return
    for at in prange(N * C):
        n, c = at // C, at % C
        for i in range(OH):
            out, where = y[n, c, i], indices[n, c, i]
            for j in range(OW):
                out[j] = -np.inf
                where[j] = -1
            for u in range(KH):
                h = i * sh - ph + u * dh
                if h < 0 or h >= H:
                    continue
                row = x[n, c, h]
                for v in range(KW):
                    j0, j1 = columns_inside(v * dw, sw, pw, W, OW)
                    for j in range(j0, j1):
                        w = j * sw + v * dw - pw
                        value = row[w]
                        better = value > out[j] or value != value or where[j] < 0
                        out[j] = value if better else out[j]
                        where[j] = h * W + w if better else where[j]


@kernel
def max_pool2d_backward(dx, dy, indices):
    N, C, H, W = dx.shape
    OH, OW = dy.shape[2], dy.shape[3]
    for at in prange(N * C):
        n, c = at // C, at % C
        plane = dx[n, c].reshape(H * W)
        for w in range(H * W):
            plane[w] = 0
        for i in range(OH):
            for j in range(OW):
                plane[indices[n, c, i, j]] += dy[n, c, i, j]
