"""Batch and group normalisation: y = (x - mean) / sqrt(var + eps) * weight[c] + bias[c].

Both take mean and (biased) variance over a set of numbers of x: (N, C, H, W).  For batch normalisation (Ioffe and
Szegedy 2015) a set is a channel in all images, for group normalisation (Wu and He 2018) a group of channels in one.
weight, bias: (C,), or (0,) for none.  mean, rstd = 1/sqrt(var + eps): one a set; forward leaves them for backward.

With xhat = (x - mean)*rstd and g = weight*dy, and sums over a set of m numbers,

    dx = rstd * (g - sum(g)/m - xhat * sum(g*xhat)/m),   dweight = sum of dy*xhat,   dbias = sum of dy

Maps may be tiled, (T, C, H, W, L), see layout.py.  Sums are taken lane by lane, that is, for each image of a tile: what
group normalisation needs, and batch normalisation adds up.

No more than RUN numbers are added one after the other in float32, and the sums of such runs in float64: each addition
rounds by up to 6e-8 of the sum, and the variance of a million pixels would be off in the third digit.  What is not
finite then is added in float64 altogether: squares overflow float32 from 1.8e19 on, where 1/sqrt(var) does not.
"""

import math

import numpy as np
from numba import prange

from tinycnn.kernels._jit import device_function, kernel
from tinycnn.kernels._simd import fma, load, pixel_zero, ravel, splat, store
from tinycnn.kernels.layout import lanes

RUN = 2048


@device_function
def add_lanes(sums, plane):
    """sums[n] += the numbers in lane n of a plane."""
    flat, total, none = ravel(plane), load(sums, 0, pixel_zero(plane)), pixel_zero(plane)
    one = splat(plane.dtype.type(1), none)
    for k in range(0, flat.size, sums.size):
        total = fma(one, load(flat, k, none), total)
    store(sums, 0, total)


@device_function
def add_squares(sums, plane, mean):
    """sums[n] += the squared distances of lane n from mean[n]."""
    flat, total, none = ravel(plane), load(sums, 0, pixel_zero(plane)), pixel_zero(plane)
    m, minus = load(mean, 0, none), splat(plane.dtype.type(-1), none)
    for k in range(0, flat.size, sums.size):
        far = fma(minus, m, load(flat, k, none))
        total = fma(far, far, total)
    store(sums, 0, total)


@device_function
def rows_of_a_run(plane):
    return max(1, RUN // plane.shape[1])


@device_function
def add_wide(sums, plane, mean, squared, exact):
    """sums[n] += the numbers in lane n of a plane, or their squared distances from mean[n].  sums, mean: float64

    exact: not even a run is added in the plane's own precision
    """
    L, rows = lanes(plane), rows_of_a_run(plane)
    if exact or plane.shape[1] > RUN:
        flat = ravel(plane)
        for k in range(0, flat.size, L):
            for n in range(L):
                far = np.float64(flat[k + n]) - mean[n]
                sums[n] += far * far if squared else far
        return
    m, run = np.empty(L, plane.dtype), np.empty(L, plane.dtype)
    m[:] = mean
    for first in range(0, len(plane), rows):
        run[:] = 0
        if squared:
            add_squares(run, plane[first : first + rows], m)
        else:
            add_lanes(run, plane[first : first + rows])
        for n in range(L):
            sums[n] += run[n]


@device_function
def add_slopes(straight, bent, dy, x, mean, rstd, weight):
    """straight[n] += weight * dy and bent[n] += weight * dy * xhat over lane n of a plane."""
    g, flat, none, T = ravel(dy), ravel(x), pixel_zero(x), x.dtype.type
    total, total_bent, w = load(straight, 0, none), load(bent, 0, none), splat(weight, none)
    m, r, one, minus = load(mean, 0, none), load(rstd, 0, none), splat(T(1), none), splat(T(-1), none)
    for k in range(0, flat.size, straight.size):
        slope, far = fma(w, load(g, k, none), none), fma(minus, m, load(flat, k, none))
        total, total_bent = fma(one, slope, total), fma(fma(far, r, none), slope, total_bent)
    store(straight, 0, total)
    store(bent, 0, total_bent)


@device_function
def add_slopes_wide(straight, bent, dy, x, mean, rstd, weight):
    """`add_slopes` with sums in float64, of runs."""
    L, rows = lanes(x), rows_of_a_run(x)
    run, run_bent = np.empty(L, x.dtype), np.empty(L, x.dtype)
    for first in range(0, len(x), rows):
        run[:], run_bent[:] = 0, 0
        add_slopes(run, run_bent, dy[first : first + rows], x[first : first + rows], mean, rstd, weight)
        for n in range(L):
            straight[n] += run[n]
            bent[n] += run_bent[n]


@device_function
def normalise(y, x, mean, rstd, weight, bias):
    """y = (x - mean[n]) * rstd[n] * weight + bias, one plane."""
    to, flat, none = ravel(y), ravel(x), pixel_zero(x)
    m, minus = load(mean, 0, none), splat(x.dtype.type(-1), none)
    scale, b = fma(load(rstd, 0, none), splat(weight, none), none), splat(bias, none)
    for k in range(0, flat.size, mean.size):
        store(to, k, fma(fma(minus, m, load(flat, k, none)), scale, b))


@device_function
def bend(dx, dy, x, mean, rstd, weight, straight, bent, count):
    """dx of a plane whose mean and variance depend on x, from the sums over its set of `count` numbers."""
    to, g, flat, none = ravel(dx), ravel(dy), ravel(x), pixel_zero(x)
    m, r, w = load(mean, 0, none), load(rstd, 0, none), splat(weight, none)
    minus, share = splat(x.dtype.type(-1), none), splat(-1 / count, none)
    level, slant = fma(load(straight, 0, none), share, none), fma(load(bent, 0, none), share, none)
    for k in range(0, flat.size, mean.size):
        xhat = fma(fma(minus, m, load(flat, k, none)), r, none)
        store(to, k, fma(r, fma(w, load(g, k, none), fma(xhat, slant, level)), none))


@device_function
def factor(weight, c):
    return weight[c] if weight.size else weight.dtype.type(1)


@device_function
def offset(bias, c):
    return bias[c] if bias.size else bias.dtype.type(0)


@device_function
def channel_wide(x, c, batch_size):
    """Mean and variance of a channel in float64."""
    L, count = lanes(x[0, c]), batch_size * x.shape[2] * x.shape[3]
    mean, var = 0.0, 0.0
    for exact in (False, True):
        mean, var = 0.0, 0.0
        for t in range(len(x)):
            sums = np.zeros(L)
            add_wide(sums, x[t, c], np.zeros(L), False, exact)
            for n in range(min(L, batch_size - t * L)):
                mean += sums[n] / count
        for t in range(len(x)):
            sums = np.zeros(L)
            add_wide(sums, x[t, c], np.full(L, mean), True, exact)
            for n in range(min(L, batch_size - t * L)):
                var += sums[n] / count
        if math.isfinite(var):
            break
    return mean, var


@kernel
def batch_norm_forward(
    y, x, weight, bias, mean, rstd, running_mean, running_var, num_batches_tracked, momentum, eps, training, batch_size
):  # fmt: skip
    """In training, the statistics are the batch's, and the running ones, (C,), move towards them by `momentum` (the
    running variance is unbiased, as in torch), or, if it is below 0, by 1/(batches[0] + 1), which keeps the mean of all
    batches.  Otherwise the statistics are the running ones.

    num_batches_tracked: (1,), batches that the running statistics include; the caller increments it
    batch_size: number of images; a blocked batch may be padded to more
    """
    for c in prange(x.shape[1]):
        T, L = x.dtype.type, lanes(x[0, c])
        m, r = np.full(L, running_mean[c], x.dtype), np.empty(L, x.dtype)
        old_mean, var = running_mean[c], running_var[c]
        old_var, count = var, batch_size * x.shape[2] * x.shape[3]
        share = T(1 / (num_batches_tracked[0] + 1) if momentum < 0 else momentum)
        long = max(batch_size, x.shape[2] * x.shape[3]) > RUN
        tiles = 0 if long else len(x)
        if training:
            total, squares = T(0), T(0)
            for t in range(tiles):
                sums = np.zeros(L, x.dtype)
                add_lanes(sums, x[t, c])
                for n in range(min(L, batch_size - t * L)):
                    total += sums[n]
            m[:] = total / T(count)
            for t in range(tiles):
                sums = np.zeros(L, x.dtype)
                add_squares(sums, x[t, c], m)
                for n in range(min(L, batch_size - t * L)):
                    squares += sums[n]
            var = squares / T(count)
            running_mean[c] += share * (m[0] - running_mean[c])
            running_var[c] += share * (var * T(count / (count - 1)) - running_var[c])
        r[:] = T(1) / T(math.sqrt(var + T(eps)))
        if training and (long or not math.isfinite(var)):
            exact_mean, exact_var = channel_wide(x, c, batch_size)
            m[:], r[:] = T(exact_mean), T(1 / math.sqrt(exact_var + eps))
            running_mean[c] = old_mean + share * (m[0] - old_mean)
            running_var[c] = old_var + share * (T(exact_var * (count / (count - 1))) - old_var)
        mean[c], rstd[c] = m[0], r[0]
        for t in range(len(x)):
            normalise(y[t, c], x[t, c], m, r, factor(weight, c), offset(bias, c))


@kernel
def batch_norm_backward(dx, dweight, dbias, dy, x, weight, mean, rstd, training, batch_size):
    """dx, dweight and dbias of size 0 are not computed."""
    for c in prange(x.shape[1]):
        T, L = x.dtype.type, lanes(x[0, c])
        m, r = np.full(L, mean[c], x.dtype), np.full(L, rstd[c], x.dtype)
        straight, bent, count = np.zeros(L, x.dtype), np.zeros(L, x.dtype), T(batch_size * x.shape[2] * x.shape[3])
        if len(x) * x.shape[2] * x.shape[3] > 8 * RUN:  # of both signs: a longer run is harmless
            wide, wide_bent = np.zeros(L), np.zeros(L)
            for t in range(len(x)):
                add_slopes_wide(wide, wide_bent, dy[t, c], x[t, c], m, r, T(1))
            straight[:], bent[:] = wide, wide_bent
        else:
            for t in range(len(x)):
                add_slopes(straight, bent, dy[t, c], x[t, c], m, r, T(1))
        total, total_bent = T(0), T(0)
        for n in range(L):
            total += straight[n]
            total_bent += bent[n]
        if dweight.size:
            dweight[c], dbias[c] = total_bent, total
        w = factor(weight, c)
        straight[:], bent[:] = w * total, w * total_bent
        if not training:
            m[:], straight[:], bent[:] = 0, 0, 0
        for t in range(len(dx)):
            bend(dx[t, c], dy[t, c], x[t, c], m, r, w, straight, bent, count)
            flat = dx[t, c].reshape(dx[t, c].size)
            for n in range(batch_size - t * L, L):  # no image, no slope
                for k in range(n, flat.size, L):
                    flat[k] = 0


@device_function
def of_set(statistics, t, group, L):
    """The entries of one group of a tile's images; statistics: (N, groups)."""
    return np.ascontiguousarray(statistics[t * L : (t + 1) * L, group])


@device_function
def group_wide(x, first, per):
    """Mean and variance of `per` channels of a tile, or of an image, lane by lane in float64."""
    L, count = lanes(x[0]), per * x.shape[1] * x.shape[2]
    mean, var = np.zeros(L), np.zeros(L)
    for exact in (False, True):
        mean[:], var[:] = 0, 0
        for c in range(first, first + per):
            add_wide(mean, x[c], np.zeros(L), False, exact)
        mean /= count
        for c in range(first, first + per):
            add_wide(var, x[c], mean, True, exact)
        if math.isfinite(var.sum()):
            break
    return mean, var / count


@kernel
def group_norm_forward(y, x, weight, bias, mean, rstd, groups, eps):
    """mean, rstd: (N, groups), where a tiled batch has N lanes."""
    per = x.shape[1] // groups
    for s in prange(len(x) * groups):
        t, group, T, L = s // groups, s % groups, x.dtype.type, lanes(x[0, 0])
        m, r, count = np.zeros(L, x.dtype), np.zeros(L, x.dtype), T(per * x.shape[2] * x.shape[3])
        stop = (group + 1) * per if count <= RUN else 0
        for c in range(group * per, stop):
            add_lanes(m, x[t, c])
        for n in range(L):
            m[n] /= count
        for c in range(group * per, stop):
            add_squares(r, x[t, c], m)
        inexact = count > RUN or not math.isfinite(r.sum())
        exact_mean, exact_var = group_wide(x[t], group * per, per) if inexact else (np.empty(0), np.empty(0))
        for n in range(L):
            if count > RUN or not math.isfinite(r[n]):
                m[n], r[n] = T(exact_mean[n]), T(1 / math.sqrt(exact_var[n] + eps))
            else:
                r[n] = T(1) / T(math.sqrt(r[n] / count + T(eps)))
            mean[t * L + n, group], rstd[t * L + n, group] = m[n], r[n]
        for c in range(group * per, (group + 1) * per):
            normalise(y[t, c], x[t, c], m, r, factor(weight, c), offset(bias, c))


@kernel
def group_norm_backward(dx, dweight, dbias, dy, x, weight, mean, rstd, groups):
    """dx, dweight and dbias of size 0 are not computed."""
    per = x.shape[1] // groups
    for c in prange(dweight.size):
        L, group, one = lanes(x[0, c]), c // per, x.dtype.type(1)
        straight, bent, wide, wide_bent = np.zeros(L, x.dtype), np.zeros(L, x.dtype), np.zeros(L), np.zeros(L)
        inexact = len(x) * x.shape[2] * x.shape[3] > 8 * RUN
        for t in range(len(x)):
            m, r = of_set(mean, t, group, L), of_set(rstd, t, group, L)
            if inexact:
                add_slopes_wide(wide, wide_bent, dy[t, c], x[t, c], m, r, one)
            else:
                add_slopes(straight, bent, dy[t, c], x[t, c], m, r, one)
        dweight[c], dbias[c] = bent.sum(), straight.sum()
        if inexact:
            dweight[c], dbias[c] = wide_bent.sum(), wide.sum()
    for s in prange(len(dx) * groups):
        t, group, L = s // groups, s % groups, lanes(x[0, 0])
        m, r = of_set(mean, t, group, L), of_set(rstd, t, group, L)
        straight, bent = np.zeros(L, x.dtype), np.zeros(L, x.dtype)
        count = x.dtype.type(per * x.shape[2] * x.shape[3])
        if count > 8 * RUN:
            wide, wide_bent = np.zeros(L), np.zeros(L)
            for c in range(group * per, (group + 1) * per):
                add_slopes_wide(wide, wide_bent, dy[t, c], x[t, c], m, r, factor(weight, c))
            straight[:], bent[:] = wide, wide_bent
        else:
            for c in range(group * per, (group + 1) * per):
                add_slopes(straight, bent, dy[t, c], x[t, c], m, r, factor(weight, c))
        for c in range(group * per, (group + 1) * per):
            bend(dx[t, c], dy[t, c], x[t, c], m, r, factor(weight, c), straight, bent, count)
