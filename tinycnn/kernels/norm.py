"""Batch and group normalisation: y = (x - mean) / sqrt(var + eps) * weight[c] + bias[c].

Both take mean and (biased) variance over a set of numbers of x: (N, C, H, W).  For batch normalisation (Ioffe and
Szegedy 2015) a set is a channel in all images, for group normalisation (Wu and He 2018) a group of channels in one.
weight, bias: (C,), or (0,) for none.  mean, rstd = 1/sqrt(var + eps): one a set; forward leaves them for backward.

With xhat = (x - mean)*rstd and g = weight*dy, and sums over a set of m numbers,

    dx = rstd * (g - sum(g)/m - xhat * sum(g*xhat)/m),   dweight = sum of dy*xhat,   dbias = sum of dy
"""

import math

from numba import prange

from tinycnn.kernels._jit import inner, kernel
from tinycnn.kernels.tiles import lanes, on_images


@inner
def moments(x, n0, n1, c0, c1):
    """Mean and biased variance of x[n0:n1, c0:c1]."""
    count = x.dtype.type((n1 - n0) * (c1 - c0) * x.shape[2] * x.shape[3])
    total = x.dtype.type(0)
    for n in range(n0, n1):
        for c in range(c0, c1):
            plane = x[n, c].reshape(x[n, c].size)
            for i in range(plane.size):
                total += plane[i]
    mean, squares = total / count, x.dtype.type(0)
    for n in range(n0, n1):
        for c in range(c0, c1):
            plane = x[n, c].reshape(x[n, c].size)
            for i in range(plane.size):
                squares += (plane[i] - mean) * (plane[i] - mean)
    return mean, squares / count


@inner
def normalise(y, x, n0, n1, c0, c1, mean, rstd, weight, bias):
    for n in range(n0, n1):
        for c in range(c0, c1):
            w = weight[c] if weight.size else x.dtype.type(1)
            b = bias[c] if bias.size else x.dtype.type(0)
            to, plane = y[n, c].reshape(y[n, c].size), x[n, c].reshape(x[n, c].size)
            for i in range(plane.size):
                to[i] = (plane[i] - mean) * rstd * w + b


@inner
def slopes(dx, dy, x, n0, n1, c0, c1, mean, rstd, weight):
    """dx of one set whose mean and variance depend on x."""
    count = x.dtype.type((n1 - n0) * (c1 - c0) * x.shape[2] * x.shape[3])
    straight, bent = x.dtype.type(0), x.dtype.type(0)
    for n in range(n0, n1):
        for c in range(c0, c1):
            w = weight[c] if weight.size else x.dtype.type(1)
            g, plane = dy[n, c].reshape(dy[n, c].size), x[n, c].reshape(x[n, c].size)
            for i in range(plane.size):
                straight += w * g[i]
                bent += w * g[i] * ((plane[i] - mean) * rstd)
    straight, bent = straight / count, bent / count
    for n in range(n0, n1):
        for c in range(c0, c1):
            w = weight[c] if weight.size else x.dtype.type(1)
            to, g, plane = (
                dx[n, c].reshape(dx[n, c].size),
                dy[n, c].reshape(dy[n, c].size),
                x[n, c].reshape(x[n, c].size),
            )
            for i in range(plane.size):
                to[i] = rstd * (w * g[i] - straight - (plane[i] - mean) * rstd * bent)


@inner
def channel_sums(dy, x, c, mean, rstd, step_n, at):
    """Sums of dy*xhat and dy over channel c of all images; image n is in set at + n*step_n."""
    bent, straight = x.dtype.type(0), x.dtype.type(0)
    for n in range(len(x)):
        m, r = mean[at + n * step_n], rstd[at + n * step_n]
        g, plane = dy[n, c].reshape(dy[n, c].size), x[n, c].reshape(x[n, c].size)
        for i in range(plane.size):
            bent += g[i] * ((plane[i] - m) * r)
            straight += g[i]
    return bent, straight


@inner
def channel_moments(x, c, images):
    """Mean and biased variance of channel c, and how many numbers that are."""
    count = images * x.shape[2] * x.shape[3]
    total, squares = x.dtype.type(0), x.dtype.type(0)
    for t in range(len(x)):
        plane, L = x[t, c].reshape(x[t, c].size), lanes(x[t, c])
        full = plane.size if (t + 1) * L <= images else 0
        for i in range(full):
            total += plane[i]
        for i in range(full, plane.size, L):  # the last tile's images
            for n in range(images - t * L):
                total += plane[i + n]
    mean = total / x.dtype.type(count)
    for t in range(len(x)):
        plane, L = x[t, c].reshape(x[t, c].size), lanes(x[t, c])
        full = plane.size if (t + 1) * L <= images else 0
        for i in range(full):
            squares += (plane[i] - mean) * (plane[i] - mean)
        for i in range(full, plane.size, L):
            for n in range(images - t * L):
                squares += (plane[i + n] - mean) * (plane[i + n] - mean)
    return mean, squares / x.dtype.type(count), count


@kernel
def batch_norm_forward(y, x, weight, bias, mean, rstd, running_mean, running_var, momentum, eps, training, images):
    """In training, the statistics are the batch's, and the running ones, (C,), move towards them by `momentum` (the
    running variance is unbiased, as in torch).  Otherwise the statistics are the running ones.  images: how many there
    are; a tiled batch may have room for more."""
    for c in prange(x.shape[1]):
        T, m, var = x.dtype.type, running_mean[c], running_var[c]
        if training:
            m, var, count = channel_moments(x, c, images)
            share = T(momentum)
            running_mean[c] += share * (m - running_mean[c])
            running_var[c] += share * (var * T(count / (count - 1)) - running_var[c])
        mean[c], rstd[c] = m, T(1) / T(math.sqrt(var + T(eps)))
        normalise(y, x, 0, len(x), c, c + 1, mean[c], rstd[c], weight, bias)


@inner
def channel_slopes(dx, dy, x, c, mean, rstd, w, straight, bent, images):
    """dx of a channel whose mean and variance depend on x, from the sums of dy and dy*xhat; zero where no image is."""
    count = x.dtype.type(images * x.shape[2] * x.shape[3])
    straight, bent = straight / count, bent / count
    for t in range(len(x)):
        to, g, plane = (
            dx[t, c].reshape(dx[t, c].size),
            dy[t, c].reshape(dy[t, c].size),
            x[t, c].reshape(x[t, c].size),
        )
        for i in range(plane.size):
            to[i] = w * rstd * (g[i] - straight - (plane[i] - mean) * rstd * bent)
        L = lanes(x[t, c])
        for n in range(images - t * L, L):
            for i in range(n, plane.size, L):
                to[i] = 0


@kernel
def batch_norm_backward(dx, dweight, dbias, dy, x, weight, mean, rstd, training, images):
    """dx, dweight and dbias of size 0 are not computed."""
    for c in prange(x.shape[1]):
        bent, straight = channel_sums(dy, x, c, mean, rstd, 0, c)
        if dweight.size:
            dweight[c], dbias[c] = bent, straight
        if dx.size and training:
            w = weight[c] if weight.size else x.dtype.type(1)
            channel_slopes(dx, dy, x, c, mean[c], rstd[c], w, straight, bent, images)
        elif dx.size:
            normalise(dx, dy, 0, len(x), c, c + 1, x.dtype.type(0), rstd[c], weight, weight[:0])


@on_images(0)
@kernel
def group_norm_forward(y, x, weight, bias, mean, rstd, groups, eps):
    """mean, rstd: (N, groups)"""
    N, C = x.shape[0], x.shape[1]
    for s in prange(N * groups):
        n, c0, c1 = s // groups, s % groups * (C // groups), (s % groups + 1) * (C // groups)
        m, var = moments(x, n, n + 1, c0, c1)
        r = x.dtype.type(1) / x.dtype.type(math.sqrt(var + x.dtype.type(eps)))
        mean[n, s % groups], rstd[n, s % groups] = m, r
        normalise(y, x, n, n + 1, c0, c1, m, r, weight, bias)


@on_images(0)
@kernel
def group_norm_backward(dx, dweight, dbias, dy, x, weight, mean, rstd, groups):
    """dx, dweight and dbias of size 0 are not computed."""
    N, C = x.shape[0], x.shape[1]
    means, rstds = mean.reshape(mean.size), rstd.reshape(rstd.size)
    channels, sets = C if dweight.size else 0, N * groups if dx.size else 0
    for c in prange(channels):
        dweight[c], dbias[c] = channel_sums(dy, x, c, means, rstds, groups, c // (C // groups))
    for s in prange(sets):
        n, c0, c1 = s // groups, s % groups * (C // groups), (s % groups + 1) * (C // groups)
        slopes(dx, dy, x, n, n + 1, c0, c1, means[s], rstds[s], weight)
