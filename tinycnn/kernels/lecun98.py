"""What LeNet-5 of 1998 has and later nets do not (LeCun, Bottou, Bengio and Haffner 1998, section II.B).

Subsampling with a coefficient and a bias a map, convolution along a connection table, distances to given points.
"""

import numpy as np
from numba import prange

from tinycnn.kernels._jit import device_function, kernel
from tinycnn.kernels._simd import ravel
from tinycnn.kernels.layout import via_nchw
from tinycnn.kernels.pooling import clear, mean_2x2, mean_2x2_backward

# Windows lie side by side; those of LeNet-5, 2 x 2, are written out in pooling.py.


@device_function
def window_sums(sums, x, KH, KW):
    """One plane: sums[i, j] = sum of window (i, j).  sums: (OH, OW)   x: (H, W)"""
    if KH == 2 and KW == 2:
        mean_2x2(sums, x, x.dtype.type(1), 0, len(sums))
        return
    for i in range(len(sums)):
        to = sums[i]
        for j in range(to.size):
            to[j] = 0
        for u in range(KH):
            row = x[i * KH + u]
            for v in range(KW):
                for j in range(to.size):
                    to[j] += row[j * KW + v]


@device_function
def subsample_plane(y, x, factor, offset, KH, KW):
    window_sums(y, x, KH, KW)
    flat = ravel(y)
    for k in range(flat.size):
        flat[k] = factor * flat[k] + offset


@via_nchw(0)
@kernel
def subsample_forward(y, x, weight, bias, kernel_size, scale):
    """y[n, c] = weight[c] * scale * (sum of each window) + bias[c]; scale is 1 for the sum, 1/(KH*KW) for the mean.

    x: (N, C, H, W)   y: (N, C, H // KH, W // KW)   weight, bias: (C,)
    """
    C = x.shape[1]
    for task in prange(len(x) * C):
        n, c = task // C, task % C
        factor = weight[c] * x.dtype.type(scale)
        subsample_plane(y[n, c], x[n, c], factor, bias[c], kernel_size[0], kernel_size[1])


@device_function
def subsample_slopes(dy, x, c, KH, KW):
    """Sums of dy * window and of dy over map c of all images."""
    slope, offset = x.dtype.type(0), x.dtype.type(0)
    windows = np.empty(dy.shape[2:], x.dtype)
    flat = ravel(windows)
    for n in range(len(x)):
        window_sums(windows, x[n, c], KH, KW)
        g = dy[n, c].reshape(flat.size)
        for k in range(g.size):
            slope += g[k] * flat[k]
            offset += g[k]
    return slope, offset


@device_function
def subsample_spread(dx, dy, factor, KH, KW):
    """The transpose of `subsample_plane`; what no window reaches gets zero."""
    if KH == 2 and KW == 2:
        mean_2x2_backward(dx, dy, factor)
        return
    clear(dx)
    for h in range(dy.shape[0] * KH):
        to, g = dx[h], dy[h // KH]
        for v in range(KW):
            for j in range(g.size):
                to[j * KW + v] = factor * g[j]


@via_nchw(0)
@kernel
def subsample_backward(dx, dweight, dbias, dy, x, weight, kernel_size, scale):
    """Gradients of all three arguments of `subsample_forward`; dx of size 0 is not computed."""
    for c in prange(x.shape[1]):
        KH, KW = kernel_size
        slope, offset = subsample_slopes(dy, x, c, KH, KW)
        dweight[c], dbias[c] = slope * x.dtype.type(scale), offset
        if dx.size:
            for n in range(len(x)):
                subsample_spread(dx[n, c], dy[n, c], weight[c] * x.dtype.type(scale), KH, KW)


# A convolution along a table works on whole planes at once: with the pitch of the input, the pixels that a tap meets
# are the input itself from some number on.  What is computed between two rows of the output is dropped, or zero.


@device_function
def lay_out(padded, dy, pitch):
    """dy: (OH, OW) row by row with `pitch`, zeros between."""
    for k in range(padded.size):
        padded[k] = 0
    for i in range(dy.shape[0]):
        to, g = padded[i * pitch :], dy[i]
        for j in range(g.size):
            to[j] = g[j]


@device_function
def add_pair(out, plane, w, pitch):
    """out += plane convolved with w; out: a run over all rows of the output   plane: (H*W,)   w: (KH, KW)"""
    for u in range(w.shape[0]):
        for v in range(w.shape[1]):
            source, tap = plane[u * pitch + v :], w[u, v]
            for k in range(out.size):
                out[k] += tap * source[k]


@device_function
def spread_pair(plane, g, w, pitch):
    """The transpose of `add_pair`."""
    for u in range(w.shape[0]):
        for v in range(w.shape[1]):
            to, tap = plane[u * pitch + v :], w[u, v]
            for k in range(g.size):
                to[k] += tap * g[k]


@device_function
def pair_gradient(dw, g, plane, pitch):
    """dw += the sums over the run of g times the plane, shifted by each tap."""
    for u in range(dw.shape[0]):
        for v in range(dw.shape[1]):
            source, total = plane[u * pitch + v :], dw.dtype.type(0)
            for k in range(g.size):
                total += g[k] * source[k]
            dw[u, v] += total


@device_function
def map_output(y, x, w, bias, sources, first, last):
    """One output map of one image.  y: (OH, OW)   x: (C, H, W)"""
    pitch = x.shape[2]
    run = np.empty((y.shape[0] - 1) * pitch + y.shape[1], y.dtype)
    for k in range(run.size):
        run[k] = bias
    for p in range(first, last):
        plane = x[sources[p]]
        add_pair(run, ravel(plane), w[p], pitch)
    for i in range(y.shape[0]):
        to, got = y[i], run[i * pitch :]
        for j in range(to.size):
            to[j] = got[j]


@via_nchw(0)
@kernel
def conv2d_map_forward(y, x, w, b, sources, starts):
    """y[n, o] = b[o] + sum of x[n, sources[p]] convolved with w[p] over the pairs p = starts[o] ... starts[o + 1] - 1.

    x: (N, C, H, W)   y: (N, O, H - KH + 1, W - KW + 1)   w: (pairs, KH, KW)   b: (O,)   sources: (pairs,)   starts:
    (O + 1,)   Only pairs that are connected are computed.
    """
    O = y.shape[1]
    for task in prange(len(x) * O):
        n, o = task // O, task % O
        map_output(y[n, o], x[n], w, b[o], sources, starts[o], starts[o + 1])


@device_function
def map_weights(dw, db, dy, x, o, sources, first, last):
    """dw of the pairs of output o, and its bias."""
    pitch = x.shape[3]
    run = np.empty((dy.shape[2] - 1) * pitch + dy.shape[3], x.dtype)
    total = x.dtype.type(0)
    for p in range(first, last):
        taps = ravel(dw[p])
        for t in range(taps.size):
            taps[t] = 0
    for n in range(len(x)):
        lay_out(run, dy[n, o], pitch)
        for k in range(run.size):
            total += run[k]
        for p in range(first, last):
            plane = x[n, sources[p]]
            pair_gradient(dw[p], run, ravel(plane), pitch)
    db[o] = total


@device_function
def map_input(dx, dy, w, sources, starts):
    """dx of one image: (C, H, W)"""
    pitch = dx.shape[2]
    flat = ravel(dx)
    for i in range(flat.size):
        flat[i] = 0
    run = np.empty((dy.shape[1] - 1) * pitch + dy.shape[2], dx.dtype)
    for o in range(len(dy)):
        lay_out(run, dy[o], pitch)
        for p in range(starts[o], starts[o + 1]):
            plane = dx[sources[p]]
            spread_pair(ravel(plane), run, w[p], pitch)


@via_nchw(0)
@kernel
def conv2d_map_backward(dx, dw, db, dy, x, w, sources, starts):
    """Gradients of all three arguments of `conv2d_map_forward`; dx of size 0 is not computed."""
    O, images = dy.shape[1], len(x) if dx.size else 0
    for task in prange(images + O):
        if task < images:
            map_input(dx[task], dy[task], w, sources, starts)
        else:
            o = task - images
            map_weights(dw, db, dy, x, o, sources, starts[o], starts[o + 1])


@kernel
def squared_distance_forward(y, x, w):
    """y[n, i] = |x[n] - w[i]|^2, the Euclidean RBF units of eq. 7.  x: (N, F)   w: (K, F)   y: (N, K)"""
    for n in prange(len(x)):
        for i in range(len(w)):
            total = x.dtype.type(0)
            for f in range(x.shape[1]):
                total += (x[n, f] - w[i, f]) * (x[n, f] - w[i, f])
            y[n, i] = total


@device_function
def add_differences(to, row, others, weights):
    """to = 2 * sum over i of weights[i] * (row - others[i])"""
    for f in range(to.size):
        to[f] = 0
    for i in range(len(others)):
        other, twice = others[i], weights[i] + weights[i]
        for f in range(to.size):
            to[f] += twice * (row[f] - other[f])


@kernel
def squared_distance_backward(dx, dw, dy, x, w):
    """Gradients of both arguments of `squared_distance_forward`; dx and dw of size 0 are not computed."""
    images, points = len(x) if dx.size else 0, len(w) if dw.size else 0
    for task in prange(images + points):
        if task < images:
            add_differences(dx[task], x[task], w, dy[task])
        else:
            add_differences(dw[task - images], w[task - images], x, dy[:, task - images])


@kernel
def rbf_loss(loss, predicted, dx, x, target, rubbish, mean):
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
