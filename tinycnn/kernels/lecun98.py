"""Kernels that only LeNet-5 of 1998 needs (LeCun, Bottou, Bengio and Haffner 1998, section II.B).

Subsampling with a coefficient and a bias per map, convolution with a connection table, squared distances, RBF losses.
"""

import numpy as np
from numba import prange

from tinycnn.kernels._jit import device_function, kernel
from tinycnn.kernels._simd import ravel
from tinycnn.kernels.layout import via_nchw
from tinycnn.kernels.pooling import clear, mean_2x2, mean_2x2_backward

# The stride is the kernel size.  Windows of 2 x 2, as in LeNet-5, use the loops of pooling.py.


@device_function
def window_sums(sums, x, KH, KW):
    """sums[i, j] = sum of window (i, j) of one plane.  sums: (OH, OW)   x: (H, W)"""
    if KH == 2 and KW == 2:
        mean_2x2(sums, x, x.dtype.type(1), 0, len(sums))
        return
    for i in range(len(sums)):
        out = sums[i]
        for j in range(out.size):
            out[j] = 0
        for u in range(KH):
            row = x[i * KH + u]
            for v in range(KW):
                for j in range(out.size):
                    out[j] += row[j * KW + v]


@device_function
def subsample_plane(y, x, weight, bias, KH, KW):
    window_sums(y, x, KH, KW)
    flat = ravel(y)
    for k in range(flat.size):
        flat[k] = weight * flat[k] + bias


@via_nchw(0)
@kernel
def subsample_forward(y, x, weight, bias, kernel_size, scale):
    """y[n, c] = weight[c] * scale * (sum of each window) + bias[c]; scale is 1 for the sum, 1/(KH*KW) for the mean.

    x: (N, C, H, W)   y: (N, C, H // KH, W // KW)   weight, bias: (C,)
    """
    C = x.shape[1]
    for task in prange(len(x) * C):
        n, c = task // C, task % C
        w = weight[c] * x.dtype.type(scale)
        subsample_plane(y[n, c], x[n, c], w, bias[c], kernel_size[0], kernel_size[1])


@device_function
def subsample_weight_grad(dy, x, c, KH, KW):
    """Sums of dy * window and of dy over map c of all images."""
    dweight, dbias = x.dtype.type(0), x.dtype.type(0)
    windows = np.empty(dy.shape[2:], x.dtype)
    flat = ravel(windows)
    for n in range(len(x)):
        window_sums(windows, x[n, c], KH, KW)
        g = dy[n, c].reshape(flat.size)
        for k in range(g.size):
            dweight += g[k] * flat[k]
            dbias += g[k]
    return dweight, dbias


@device_function
def subsample_input_grad(dx, dy, weight, KH, KW):
    """The transpose of `subsample_plane`; pixels outside of all windows get zero."""
    if KH == 2 and KW == 2:
        mean_2x2_backward(dx, dy, weight)
        return
    clear(dx)
    for h in range(dy.shape[0] * KH):
        out, g = dx[h], dy[h // KH]
        for v in range(KW):
            for j in range(g.size):
                out[j * KW + v] = weight * g[j]


@via_nchw(0)
@kernel
def subsample_backward(dx, dweight, dbias, dy, x, weight, kernel_size, scale):
    """Gradients of all three arguments of `subsample_forward`.  A dx of size 0 is not computed."""
    for c in prange(x.shape[1]):
        KH, KW = kernel_size
        dw, db = subsample_weight_grad(dy, x, c, KH, KW)
        dweight[c], dbias[c] = dw * x.dtype.type(scale), db
        if dx.size:
            for n in range(len(x)):
                subsample_input_grad(dx[n, c], dy[n, c], weight[c] * x.dtype.type(scale), KH, KW)


# Convolution with a connection table works on whole planes: if output rows have the pitch of the input, the pixels that
# one tap reads are a contiguous run of the input.  The entries between two output rows are ignored or zero.


@device_function
def pad_rows(padded, dy, pitch):
    """padded = the rows of dy, (OH, OW), `pitch` apart, with zeros between them."""
    for k in range(padded.size):
        padded[k] = 0
    for i in range(dy.shape[0]):
        out, g = padded[i * pitch :], dy[i]
        for j in range(g.size):
            out[j] = g[j]


@device_function
def conv_plane(out, plane, w, pitch):
    """out += plane convolved with w; out: a run over all output rows   plane: (H*W,)   w: (KH, KW)"""
    for u in range(w.shape[0]):
        for v in range(w.shape[1]):
            source, tap = plane[u * pitch + v :], w[u, v]
            for k in range(out.size):
                out[k] += tap * source[k]


@device_function
def conv_plane_input_grad(plane, g, w, pitch):
    """The transpose of `conv_plane`."""
    for u in range(w.shape[0]):
        for v in range(w.shape[1]):
            out, tap = plane[u * pitch + v :], w[u, v]
            for k in range(g.size):
                out[k] += tap * g[k]


@device_function
def conv_plane_weight_grad(dw, g, plane, pitch):
    """dw[u, v] += sum of g * (plane shifted by the tap); g: a run over all output rows"""
    for u in range(dw.shape[0]):
        for v in range(dw.shape[1]):
            source, total = plane[u * pitch + v :], dw.dtype.type(0)
            for k in range(g.size):
                total += g[k] * source[k]
            dw[u, v] += total


@device_function
def conv_output(y, x, w, bias, sources, first, end):
    """One output map of one image, from pairs first ... end - 1.  y: (OH, OW)   x: (C, H, W)"""
    pitch = x.shape[2]
    run = np.empty((y.shape[0] - 1) * pitch + y.shape[1], y.dtype)
    for k in range(run.size):
        run[k] = bias
    for p in range(first, end):
        plane = x[sources[p]]
        conv_plane(run, ravel(plane), w[p], pitch)
    for i in range(y.shape[0]):
        out, source = y[i], run[i * pitch :]
        for j in range(out.size):
            out[j] = source[j]


@via_nchw(0)
@kernel
def conv2d_map_forward(y, x, w, b, sources, starts):
    """y[n, o] = b[o] + sum of x[n, sources[p]] convolved with w[p] over the pairs p = starts[o] ... starts[o + 1] - 1.

    x: (N, C, H, W)   y: (N, O, H - KH + 1, W - KW + 1)   w: (pairs, KH, KW)   b: (O,)
    sources: (pairs,), the input map of each connected pair of maps   starts: (O + 1,)
    """
    O = y.shape[1]
    for task in prange(len(x) * O):
        n, o = task // O, task % O
        conv_output(y[n, o], x[n], w, b[o], sources, starts[o], starts[o + 1])


@device_function
def conv_weight_grad(dw, db, dy, x, o, sources, first, end):
    """dw of the pairs of output map o, and db[o]."""
    pitch = x.shape[3]
    run = np.empty((dy.shape[2] - 1) * pitch + dy.shape[3], x.dtype)
    total = x.dtype.type(0)
    for p in range(first, end):
        taps = ravel(dw[p])
        for t in range(taps.size):
            taps[t] = 0
    for n in range(len(x)):
        pad_rows(run, dy[n, o], pitch)
        for k in range(run.size):
            total += run[k]
        for p in range(first, end):
            plane = x[n, sources[p]]
            conv_plane_weight_grad(dw[p], run, ravel(plane), pitch)
    db[o] = total


@device_function
def conv_input_grad(dx, dy, w, sources, starts):
    """dx of one image: (C, H, W)"""
    pitch = dx.shape[2]
    flat = ravel(dx)
    for i in range(flat.size):
        flat[i] = 0
    run = np.empty((dy.shape[1] - 1) * pitch + dy.shape[2], dx.dtype)
    for o in range(len(dy)):
        pad_rows(run, dy[o], pitch)
        for p in range(starts[o], starts[o + 1]):
            plane = dx[sources[p]]
            conv_plane_input_grad(ravel(plane), run, w[p], pitch)


@via_nchw(0)
@kernel
def conv2d_map_backward(dx, dw, db, dy, x, w, sources, starts):
    """Gradients of all three arguments of `conv2d_map_forward`.  A dx of size 0 is not computed."""
    O, images = dy.shape[1], len(x) if dx.size else 0
    for task in prange(images + O):
        if task < images:
            conv_input_grad(dx[task], dy[task], w, sources, starts)
        else:
            o = task - images
            conv_weight_grad(dw, db, dy, x, o, sources, starts[o], starts[o + 1])


@kernel
def squared_distance_forward(y, x, w):
    """y[n, i] = |x[n] - w[i]|^2: the Euclidean RBF units of eq. 7.  x: (N, F)   w: (K, F)   y: (N, K)"""
    for n in prange(len(x)):
        for i in range(len(w)):
            total = x.dtype.type(0)
            for f in range(x.shape[1]):
                total += (x[n, f] - w[i, f]) * (x[n, f] - w[i, f])
            y[n, i] = total


@device_function
def sum_differences(out, row, points, weights):
    """out = 2 * sum over i of weights[i] * (row - points[i])"""
    for f in range(out.size):
        out[f] = 0
    for i in range(len(points)):
        point, twice = points[i], weights[i] + weights[i]
        for f in range(out.size):
            out[f] += twice * (row[f] - point[f])


@kernel
def squared_distance_backward(dx, dw, dy, x, w):
    """Gradients of both arguments of `squared_distance_forward`; dx and dw of size 0 are not computed."""
    images, points = len(x) if dx.size else 0, len(w) if dw.size else 0
    for task in prange(images + points):
        if task < images:
            sum_differences(dx[task], x[task], w, dy[task])
        else:
            sum_differences(dw[task - images], w[task - images], x, dy[:, task - images])


@kernel
def rbf_loss(loss, predicted, dx, x, target, rubbish, factor, mean):
    """Losses of y = factor * x, with squared distances x: (N, K); the prediction is the class with the smallest.

    rubbish < 0: y[t], eq. 8.  Else y[t] + log(exp(-rubbish) + sum of exp(-y)), eq. 9, which also pushes away the
    points of the other classes.   loss, predicted, target: (N,)   dx: (N, K)
    """
    N, K = x.shape
    scale, unit = x.dtype.type(1 / N if mean else 1.0), x.dtype.type(factor)
    for n in prange(N):
        row, grad, t = x[n], dx[n], target[n]
        best = 0
        for k in range(1, K):
            if row[k] < row[best] or row[k] != row[k]:
                best = k
        predicted[n] = best
        value, zero = unit * row[t], x.dtype.type(0)
        if rubbish < 0:
            for k in range(K):
                grad[k] = unit * scale if k == t else zero
        else:
            least = min(unit * row[best], x.dtype.type(rubbish))
            norm = x.dtype.type(np.exp(least - x.dtype.type(rubbish)))
            for k in range(K):
                norm += np.exp(least - unit * row[k])
            value += np.log(norm) - least
            for k in range(K):
                share = np.exp(least - unit * row[k]) / norm
                grad[k] = ((x.dtype.type(1) if k == t else zero) - share) * (unit * scale)
        loss[n] = value * scale
