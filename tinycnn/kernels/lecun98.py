"""What LeNet-5 of 1998 has and later nets do not (LeCun, Bottou, Bengio and Haffner 1998, section II.B).

Subsampling with a coefficient and a bias a map, convolution along a connection table, distances to given points.
"""

import numpy as np
from numba import prange

from tinycnn.kernels._jit import inner, kernel


@inner
def window_sum(plane, i, j, KH, KW):
    """Sum of window (i, j) of the KH x KW windows that lie side by side."""
    total = plane.dtype.type(0)
    for u in range(KH):
        row = plane[i * KH + u]
        for v in range(KW):
            total += row[j * KW + v]
    return total


@kernel
def subsample_forward(y, x, weight, bias, kernel_size, scale):
    """y[n, c] = weight[c] * scale * (sum of each window) + bias[c]; scale is 1 for the sum, 1/(KH*KW) for the mean.

    x: (N, C, H, W)   y: (N, C, H // KH, W // KW)   weight, bias: (C,)
    """
    KH, KW = kernel_size
    for n in prange(len(x)):
        for c in range(x.shape[1]):
            factor = weight[c] * x.dtype.type(scale)
            for i in range(y.shape[2]):
                for j in range(y.shape[3]):
                    y[n, c, i, j] = factor * window_sum(x[n, c], i, j, KH, KW) + bias[c]


@kernel
def subsample_backward(dx, dweight, dbias, dy, x, weight, kernel_size, scale):
    """Gradients of all three arguments of `subsample_forward`; dx of size 0 is not computed."""
    KH, KW = kernel_size
    for c in prange(x.shape[1]):
        share, factor = x.dtype.type(scale), weight[c] * x.dtype.type(scale)
        slope, offset = x.dtype.type(0), x.dtype.type(0)
        for n in range(len(x)):
            for i in range(dy.shape[2]):
                for j in range(dy.shape[3]):
                    slope += dy[n, c, i, j] * window_sum(x[n, c], i, j, KH, KW)
                    offset += dy[n, c, i, j]
        dweight[c], dbias[c] = slope * share, offset
        if dx.size:
            for n in range(len(x)):
                for h in range(x.shape[2]):
                    for w in range(x.shape[3]):
                        inside = h // KH < dy.shape[2] and w // KW < dy.shape[3]
                        dx[n, c, h, w] = factor * dy[n, c, h // KH, w // KW] if inside else x.dtype.type(0)


@inner
def add_pair(out, plane, w):
    """out += plane convolved with w; out: (OH, OW)   plane: (OH + KH - 1, OW + KW - 1)   w: (KH, KW)"""
    for i in range(out.shape[0]):
        to = out[i]
        for u in range(w.shape[0]):
            row, taps = plane[i + u], w[u]
            for v in range(taps.size):
                source, tap = row[v:], taps[v]
                for j in range(to.size):
                    to[j] += tap * source[j]


@inner
def spread_pair(plane, dy, w):
    """The transpose of `add_pair`: plane += dy through w."""
    for i in range(dy.shape[0]):
        g = dy[i]
        for u in range(w.shape[0]):
            row, taps = plane[i + u], w[u]
            for v in range(taps.size):
                to, tap = row[v:], taps[v]
                for j in range(g.size):
                    to[j] += tap * g[j]


@kernel
def conv2d_map_forward(y, x, w, b, sources, starts):
    """y[n, o] = b[o] + sum of x[n, sources[p]] convolved with w[p] over the pairs p = starts[o] ... starts[o + 1] - 1.

    x: (N, C, H, W)   y: (N, O, H - KH + 1, W - KW + 1)   w: (pairs, KH, KW)   b: (O,)   sources: (pairs,)   starts:
    (O + 1,)   Only pairs that are connected are computed.
    """
    O = y.shape[1]
    for task in prange(len(x) * O):
        n, o = task // O, task % O
        out = y[n, o]
        for i in range(out.shape[0]):
            for j in range(out.shape[1]):
                out[i, j] = b[o]
        for p in range(starts[o], starts[o + 1]):
            add_pair(out, x[n, sources[p]], w[p])


@inner
def pair_gradient(dw, dy, x, o, c):
    """dw[u, v] = sum over images and pixels of dy[:, o] * x[:, c] shifted by (u, v)."""
    for u in range(dw.shape[0]):
        for v in range(dw.shape[1]):
            total = dw.dtype.type(0)
            for n in range(len(x)):
                for i in range(dy.shape[2]):
                    g, row = dy[n, o, i], x[n, c, i + u, v:]
                    for j in range(g.size):
                        total += g[j] * row[j]
            dw[u, v] = total


@kernel
def conv2d_map_backward(dx, dw, db, dy, x, w, sources, starts):
    """Gradients of all three arguments of `conv2d_map_forward`; dx of size 0 is not computed."""
    O = dy.shape[1]
    for o in prange(O):
        total = x.dtype.type(0)
        for n in range(len(x)):
            plane = dy[n, o].reshape(dy[n, o].size)
            for i in range(plane.size):
                total += plane[i]
        db[o] = total
        for p in range(starts[o], starts[o + 1]):
            pair_gradient(dw[p], dy, x, o, sources[p])
    images = len(x) if dx.size else 0
    for n in prange(images):
        flat = dx[n].reshape(dx[n].size)
        for i in range(flat.size):
            flat[i] = 0
        for o in range(O):
            for p in range(starts[o], starts[o + 1]):
                spread_pair(dx[n, sources[p]], dy[n, o], w[p])


@kernel
def distance_forward(y, x, w):
    """y[n, i] = |x[n] - w[i]|^2, the Euclidean RBF units of eq. 7.  x: (N, F)   w: (K, F)   y: (N, K)"""
    for n in prange(len(x)):
        for i in range(len(w)):
            total = x.dtype.type(0)
            for f in range(x.shape[1]):
                total += (x[n, f] - w[i, f]) * (x[n, f] - w[i, f])
            y[n, i] = total


@kernel
def distance_backward(dx, dw, dy, x, w):
    """Gradients of both arguments of `distance_forward`; dx and dw of size 0 are not computed."""
    two = x.dtype.type(2)
    images, points = len(x) if dx.size else 0, len(w) if dw.size else 0
    for n in prange(images):
        for f in range(x.shape[1]):
            total = x.dtype.type(0)
            for i in range(len(w)):
                total += dy[n, i] * (x[n, f] - w[i, f])
            dx[n, f] = two * total
    for i in prange(points):
        for f in range(x.shape[1]):
            total = x.dtype.type(0)
            for n in range(len(x)):
                total += dy[n, i] * (w[i, f] - x[n, f])
            dw[i, f] = two * total


@kernel
def nearest_loss(loss, predicted, dx, x, target, rubbish, mean):
    """Losses of distances x: (N, K), whose smallest is the prediction.

    With rubbish < 0 that of eq. 8, the distance to the target; else that of eq. 9, which also keeps the others away:
    x[t] + log(exp(-rubbish) + sum of exp(-x)).   loss, predicted, target: (N,)   dx: (N, K)
    """
    N, K = x.shape
    scale = x.dtype.type(1 / N if mean else 1.0)
    for n in prange(N):
        row, grad, t = x[n], dx[n], target[n]
        best = 0
        for k in range(1, K):
            if row[k] < row[best] or row[k] != row[k]:
                best = k
        predicted[n] = best
        value, zero = row[t], x.dtype.type(0)
        if rubbish < 0:
            for k in range(K):
                grad[k] = scale if k == t else zero
        else:
            least = min(row[best], x.dtype.type(rubbish))
            norm = x.dtype.type(np.exp(least - x.dtype.type(rubbish)))
            for k in range(K):
                norm += np.exp(least - row[k])
            value += np.log(norm) - least
            for k in range(K):
                share = np.exp(least - row[k]) / norm
                grad[k] = ((x.dtype.type(1) if k == t else zero) - share) * scale
        loss[n] = value * scale
