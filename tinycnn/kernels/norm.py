"""Batch, group and layer normalisation: y = (x - mean) / sqrt(var + eps) * weight[c] + bias[c].

Mean and biased variance are those of a set of numbers of x, (N, C, H, W): batch normalisation (Ioffe and Szegedy
2015) over a channel of all images, group normalisation (Wu and He 2018) over a group of channels of one image.
weight, bias: (C,), or (0,) for none   mean, rstd = 1/sqrt(var + eps): one per set, written by forward for backward

With xhat = (x - mean)*rstd, g = weight*dy, and sums over a set of m numbers,

    dx = rstd * (g - sum(g)/m - xhat * sum(g*xhat)/m),   dweight = sum of dy*xhat,   dbias = sum of dy

Maps may be blocked, (B, C, H, W, L), see layout.py.  Sums are per lane, one image of a block: group normalisation
needs them, and batch normalisation adds them up.

Runs of at most RUN numbers are added in float32, and their sums in float64: each addition rounds by up to 6e-8 of the
sum, so the variance of a million pixels would be wrong in the third digit.  If the result is not finite, all is added
in float64: squares overflow float32 from 1.8e19 on, but 1/sqrt(var) does not.
"""

import math

import numpy as np
from numba import prange

from tinycnn.kernels._jit import device_function, kernel, kernel_no_reassoc
from tinycnn.kernels._simd import fma, load, pixel_zero, ravel, splat, store
from tinycnn.kernels.layout import lanes

RUN = 2048  # longest run of float32 additions
CHUNKS = 16  # parts of a sum over rows


@device_function
def accumulate_sums(sums, plane):
    """sums[n] += sum of lane n of a plane.  plane: (H, W) or (H, W, L)   sums: (L,)"""
    flat, total, zero = ravel(plane), load(sums, 0, pixel_zero(plane)), pixel_zero(plane)
    one = splat(plane.dtype.type(1), zero)
    for k in range(0, flat.size, sums.size):
        total = fma(one, load(flat, k, zero), total)
    store(sums, 0, total)


@device_function
def accumulate_squares(sums, plane, mean):
    """sums[n] += sum of (x - mean[n])^2 over lane n of a plane."""
    flat, total, zero = ravel(plane), load(sums, 0, pixel_zero(plane)), pixel_zero(plane)
    m, minus_one = load(mean, 0, zero), splat(plane.dtype.type(-1), zero)
    for k in range(0, flat.size, sums.size):
        centered = fma(minus_one, m, load(flat, k, zero))
        total = fma(centered, centered, total)
    store(sums, 0, total)


@device_function
def rows_per_run(plane):
    return max(1, RUN // plane.shape[1])


@device_function
def accumulate_float64(sums, plane, mean, squared, exact):
    """`accumulate_sums`, or `accumulate_squares` if `squared`, with sums and mean in float64.

    exact: no sums in the plane's precision
    """
    L, rows = lanes(plane), rows_per_run(plane)
    if exact or plane.shape[1] > RUN:
        flat = ravel(plane)
        for k in range(0, flat.size, L):
            for n in range(L):
                centered = np.float64(flat[k + n]) - mean[n]
                sums[n] += centered * centered if squared else centered
        return
    m, run = np.empty(L, plane.dtype), np.empty(L, plane.dtype)
    m[:] = mean
    for first in range(0, len(plane), rows):
        run[:] = 0
        if squared:
            accumulate_squares(run, plane[first : first + rows], m)
        else:
            accumulate_sums(run, plane[first : first + rows])
        for n in range(L):
            sums[n] += run[n]


@device_function
def accumulate_grad_sums(sum_g, sum_g_xhat, dy, x, mean, rstd, weight):
    """sum_g[n] += weight * dy and sum_g_xhat[n] += weight * dy * xhat over lane n of a plane."""
    g, flat, zero, T = ravel(dy), ravel(x), pixel_zero(x), x.dtype.type
    total, total_g_xhat, w = load(sum_g, 0, zero), load(sum_g_xhat, 0, zero), splat(weight, zero)
    m, r, one, minus_one = load(mean, 0, zero), load(rstd, 0, zero), splat(T(1), zero), splat(T(-1), zero)
    for k in range(0, flat.size, sum_g.size):
        grad, centered = fma(w, load(g, k, zero), zero), fma(minus_one, m, load(flat, k, zero))
        total, total_g_xhat = fma(one, grad, total), fma(fma(centered, r, zero), grad, total_g_xhat)
    store(sum_g, 0, total)
    store(sum_g_xhat, 0, total_g_xhat)


@device_function
def accumulate_grad_sums_float64(sum_g, sum_g_xhat, dy, x, mean, rstd, weight):
    """`accumulate_grad_sums` with sums in float64 of runs in the precision of x."""
    L, rows = lanes(x), rows_per_run(x)
    run, run_g_xhat = np.empty(L, x.dtype), np.empty(L, x.dtype)
    for first in range(0, len(x), rows):
        run[:], run_g_xhat[:] = 0, 0
        accumulate_grad_sums(run, run_g_xhat, dy[first : first + rows], x[first : first + rows], mean, rstd, weight)
        for n in range(L):
            sum_g[n] += run[n]
            sum_g_xhat[n] += run_g_xhat[n]


@device_function
def normalize(y, x, mean, rstd, weight, bias):
    """y = (x - mean[n]) * rstd[n] * weight + bias, one plane."""
    out, flat, zero = ravel(y), ravel(x), pixel_zero(x)
    m, minus_one = load(mean, 0, zero), splat(x.dtype.type(-1), zero)
    scale, shift = fma(load(rstd, 0, zero), splat(weight, zero), zero), splat(bias, zero)
    for k in range(0, flat.size, mean.size):
        store(out, k, fma(fma(minus_one, m, load(flat, k, zero)), scale, shift))


@device_function
def input_grad(dx, dy, x, mean, rstd, weight, sum_g, sum_g_xhat, count):
    """dx of a plane, from the sums over its set of `count` numbers.  Sums of zero: mean and variance are constants."""
    out, g, flat, zero = ravel(dx), ravel(dy), ravel(x), pixel_zero(x)
    m, r, w = load(mean, 0, zero), load(rstd, 0, zero), splat(weight, zero)
    minus_one, factor = splat(x.dtype.type(-1), zero), splat(-1 / count, zero)
    minus_mean_g = fma(load(sum_g, 0, zero), factor, zero)
    minus_mean_g_xhat = fma(load(sum_g_xhat, 0, zero), factor, zero)
    for k in range(0, flat.size, mean.size):
        xhat = fma(fma(minus_one, m, load(flat, k, zero)), r, zero)
        store(out, k, fma(r, fma(w, load(g, k, zero), fma(xhat, minus_mean_g_xhat, minus_mean_g)), zero))


@device_function
def weight_or_one(weight, c):
    return weight[c] if weight.size else weight.dtype.type(1)


@device_function
def bias_or_zero(bias, c):
    return bias[c] if bias.size else bias.dtype.type(0)


@device_function
def channel_statistics(x, c, batch_size):
    """Mean and variance of a channel, in float64."""
    L, count = lanes(x[0, c]), batch_size * x.shape[2] * x.shape[3]
    mean, var = 0.0, 0.0
    for exact in (False, True):
        mean, var = 0.0, 0.0
        for b in range(len(x)):
            sums = np.zeros(L)
            accumulate_float64(sums, x[b, c], np.zeros(L), False, exact)
            for n in range(min(L, batch_size - b * L)):
                mean += sums[n] / count
        for b in range(len(x)):
            sums = np.zeros(L)
            accumulate_float64(sums, x[b, c], np.full(L, mean), True, exact)
            for n in range(min(L, batch_size - b * L)):
                var += sums[n] / count
        if math.isfinite(var):
            break
    return mean, var


def batch_norm_forward(
    y, x, weight, bias, mean, rstd, running_mean, running_var, num_batches_tracked, momentum, eps, training, batch_size
):  # fmt: skip
    """In training, uses the batch's statistics, and the running ones become (1 - momentum)*running + momentum*batch;
    else uses the running ones: (C,).  As in torch, the running variance is unbiased; momentum < 0 stands for
    1/(num_batches_tracked + 1), the mean over all batches.

    y, x: (N, C, H, W), blocked, or (N, C)
    num_batches_tracked: (1,), batches that the running statistics include; the caller increments it
    batch_size: number of images; a blocked batch may be padded to more
    """
    forward = batch_norm_rows_forward if x.ndim == 2 else batch_norm_maps_forward
    forward(y, x, weight, bias, mean, rstd, running_mean, running_var, num_batches_tracked, momentum, eps, training,
            batch_size)  # fmt: skip


def batch_norm_backward(dx, dweight, dbias, dy, x, weight, mean, rstd, training, batch_size):
    """dx, dweight and dbias of size 0 are not computed."""
    backward = batch_norm_rows_backward if x.ndim == 2 else batch_norm_maps_backward
    backward(dx, dweight, dbias, dy, x, weight, mean, rstd, training, batch_size)


@kernel
def batch_norm_maps_forward(
    y, x, weight, bias, mean, rstd, running_mean, running_var, num_batches_tracked, momentum, eps, training, batch_size
):  # fmt: skip
    for c in prange(x.shape[1]):
        T, L = x.dtype.type, lanes(x[0, c])
        m, r = np.full(L, running_mean[c], x.dtype), np.empty(L, x.dtype)
        old_mean, var = running_mean[c], running_var[c]
        old_var, count = var, batch_size * x.shape[2] * x.shape[3]
        rate = T(1 / (num_batches_tracked[0] + 1) if momentum < 0 else momentum)
        split = max(batch_size, x.shape[2] * x.shape[3]) > RUN
        blocks = 0 if split else len(x)
        if training:
            total, squares = T(0), T(0)
            for b in range(blocks):
                sums = np.zeros(L, x.dtype)
                accumulate_sums(sums, x[b, c])
                for n in range(min(L, batch_size - b * L)):
                    total += sums[n]
            m[:] = total / T(count)
            for b in range(blocks):
                sums = np.zeros(L, x.dtype)
                accumulate_squares(sums, x[b, c], m)
                for n in range(min(L, batch_size - b * L)):
                    squares += sums[n]
            var = squares / T(count)
            running_mean[c] += rate * (m[0] - running_mean[c])
            running_var[c] += rate * (var * T(count / (count - 1)) - running_var[c])
        r[:] = T(1) / T(math.sqrt(var + T(eps)))
        if training and (split or not math.isfinite(var)):
            exact_mean, exact_var = channel_statistics(x, c, batch_size)
            m[:], r[:] = T(exact_mean), T(1 / math.sqrt(exact_var + eps))
            running_mean[c] = old_mean + rate * (m[0] - old_mean)
            running_var[c] = old_var + rate * (T(exact_var * (count / (count - 1))) - old_var)
        mean[c], rstd[c] = m[0], r[0]
        for b in range(len(x)):
            normalize(y[b, c], x[b, c], m, r, weight_or_one(weight, c), bias_or_zero(bias, c))


@kernel
def batch_norm_maps_backward(dx, dweight, dbias, dy, x, weight, mean, rstd, training, batch_size):
    for c in prange(x.shape[1]):
        T, L = x.dtype.type, lanes(x[0, c])
        m, r = np.full(L, mean[c], x.dtype), np.full(L, rstd[c], x.dtype)
        sum_g, sum_g_xhat, count = np.zeros(L, x.dtype), np.zeros(L, x.dtype), T(batch_size * x.shape[2] * x.shape[3])
        if len(x) * x.shape[2] * x.shape[3] > 8 * RUN:  # terms of both signs: longer runs are harmless
            sum_g64, sum_g_xhat64 = np.zeros(L), np.zeros(L)
            for b in range(len(x)):
                accumulate_grad_sums_float64(sum_g64, sum_g_xhat64, dy[b, c], x[b, c], m, r, T(1))
            sum_g[:], sum_g_xhat[:] = sum_g64, sum_g_xhat64
        else:
            for b in range(len(x)):
                accumulate_grad_sums(sum_g, sum_g_xhat, dy[b, c], x[b, c], m, r, T(1))
        total, total_g_xhat = T(0), T(0)
        for n in range(L):
            total += sum_g[n]
            total_g_xhat += sum_g_xhat[n]
        if dweight.size:
            dweight[c], dbias[c] = total_g_xhat, total
        w = weight_or_one(weight, c)
        sum_g[:], sum_g_xhat[:] = w * total, w * total_g_xhat
        if not training:
            m[:], sum_g[:], sum_g_xhat[:] = 0, 0, 0
        for b in range(len(dx)):
            input_grad(dx[b, c], dy[b, c], x[b, c], m, r, w, sum_g, sum_g_xhat, count)
            flat = dx[b, c].reshape(dx[b, c].size)
            for n in range(batch_size - b * L, L):  # lanes without an image
                for k in range(n, flat.size, L):
                    flat[k] = 0


@device_function
def group_column(statistics, b, group, L):
    """The statistics of a group for the images of block b, contiguous.  statistics: (N, groups)"""
    return np.ascontiguousarray(statistics[b * L : (b + 1) * L, group])


@device_function
def group_statistics(x, first, channels):
    """Mean and variance of `channels` channels, from `first` on, for each lane of a block, in float64."""
    L, count = lanes(x[0]), channels * x.shape[1] * x.shape[2]
    mean, var = np.zeros(L), np.zeros(L)
    for exact in (False, True):
        mean[:], var[:] = 0, 0
        for c in range(first, first + channels):
            accumulate_float64(mean, x[c], np.zeros(L), False, exact)
        mean /= count
        for c in range(first, first + channels):
            accumulate_float64(var, x[c], mean, True, exact)
        if math.isfinite(var.sum()):
            break
    return mean, var / count


@kernel
def group_norm_forward(y, x, weight, bias, mean, rstd, groups, eps):
    """mean, rstd: (N, groups); N = B*L for a blocked batch"""
    channels = x.shape[1] // groups
    for s in prange(len(x) * groups):
        b, group, T, L = s // groups, s % groups, x.dtype.type, lanes(x[0, 0])
        m, r, count = np.zeros(L, x.dtype), np.zeros(L, x.dtype), T(channels * x.shape[2] * x.shape[3])
        stop = (group + 1) * channels if count <= RUN else 0
        for c in range(group * channels, stop):
            accumulate_sums(m, x[b, c])
        for n in range(L):
            m[n] /= count
        for c in range(group * channels, stop):
            accumulate_squares(r, x[b, c], m)
        use_float64 = count > RUN or not math.isfinite(r.sum())
        exact_mean, exact_var = (
            group_statistics(x[b], group * channels, channels) if use_float64 else (np.empty(0), np.empty(0))
        )
        for n in range(L):
            if count > RUN or not math.isfinite(r[n]):
                m[n], r[n] = T(exact_mean[n]), T(1 / math.sqrt(exact_var[n] + eps))
            else:
                r[n] = T(1) / T(math.sqrt(r[n] / count + T(eps)))
            mean[b * L + n, group], rstd[b * L + n, group] = m[n], r[n]
        for c in range(group * channels, (group + 1) * channels):
            normalize(y[b, c], x[b, c], m, r, weight_or_one(weight, c), bias_or_zero(bias, c))


@kernel
def group_norm_backward(dx, dweight, dbias, dy, x, weight, mean, rstd, groups):
    """dx, dweight and dbias of size 0 are not computed."""
    channels = x.shape[1] // groups
    for c in prange(dweight.size):
        L, group, one = lanes(x[0, c]), c // channels, x.dtype.type(1)
        sum_g, sum_g_xhat, sum_g64, sum_g_xhat64 = np.zeros(L, x.dtype), np.zeros(L, x.dtype), np.zeros(L), np.zeros(L)
        use_float64 = len(x) * x.shape[2] * x.shape[3] > 8 * RUN
        for b in range(len(x)):
            m, r = group_column(mean, b, group, L), group_column(rstd, b, group, L)
            if use_float64:
                accumulate_grad_sums_float64(sum_g64, sum_g_xhat64, dy[b, c], x[b, c], m, r, one)
            else:
                accumulate_grad_sums(sum_g, sum_g_xhat, dy[b, c], x[b, c], m, r, one)
        dweight[c], dbias[c] = sum_g_xhat.sum(), sum_g.sum()
        if use_float64:
            dweight[c], dbias[c] = sum_g_xhat64.sum(), sum_g64.sum()
    for s in prange(len(dx) * groups):
        b, group, L = s // groups, s % groups, lanes(x[0, 0])
        m, r = group_column(mean, b, group, L), group_column(rstd, b, group, L)
        sum_g, sum_g_xhat = np.zeros(L, x.dtype), np.zeros(L, x.dtype)
        count = x.dtype.type(channels * x.shape[2] * x.shape[3])
        if count > 8 * RUN:
            sum_g64, sum_g_xhat64 = np.zeros(L), np.zeros(L)
            for c in range(group * channels, (group + 1) * channels):
                accumulate_grad_sums_float64(sum_g64, sum_g_xhat64, dy[b, c], x[b, c], m, r, weight_or_one(weight, c))
            sum_g[:], sum_g_xhat[:] = sum_g64, sum_g_xhat64
        else:
            for c in range(group * channels, (group + 1) * channels):
                accumulate_grad_sums(sum_g, sum_g_xhat, dy[b, c], x[b, c], m, r, weight_or_one(weight, c))
        for c in range(group * channels, (group + 1) * channels):
            input_grad(dx[b, c], dy[b, c], x[b, c], m, r, weight_or_one(weight, c), sum_g, sum_g_xhat, count)


# --- rows: (N, C) for batch normalisation, (R, M) for layer normalisation.  Sums are in float64. ----------------------

COLUMNS = 64  # of a task


@kernel_no_reassoc
def batch_norm_rows_forward(
    y, x, weight, bias, mean, rstd, running_mean, running_var, num_batches_tracked, momentum, eps, training, batch_size
):  # fmt: skip
    N, C = x.shape
    for task in prange((C + COLUMNS - 1) // COLUMNS):
        T, first = x.dtype.type, task * COLUMNS
        width = min(COLUMNS, C - first)
        total, squares, shift = np.zeros(width), np.zeros(width), np.zeros(width, x.dtype)
        if training:
            for n in range(N):
                for k in range(width):
                    total[k] += x[n, first + k]
            for k in range(width):
                total[k] /= N
            for n in range(N):
                for k in range(width):
                    centered = x[n, first + k] - total[k]
                    squares[k] += centered * centered
        rate = T(1 / (num_batches_tracked[0] + 1) if momentum < 0 else momentum)
        for k in range(width):
            c = first + k
            if training:
                mean[c], rstd[c] = total[k], 1 / math.sqrt(squares[k] / N + eps)
                running_mean[c] += rate * (mean[c] - running_mean[c])
                running_var[c] += rate * (T(squares[k] / (N - 1)) - running_var[c])
            else:
                mean[c], rstd[c] = running_mean[c], T(1) / T(math.sqrt(running_var[c] + T(eps)))
            shift[k] = bias_or_zero(bias, c)
        for n in range(N):
            for k in range(width):
                c = first + k
                y[n, c] = (x[n, c] - mean[c]) * (rstd[c] * weight_or_one(weight, c)) + shift[k]


@kernel_no_reassoc
def batch_norm_rows_backward(dx, dweight, dbias, dy, x, weight, mean, rstd, training, batch_size):
    N, C = x.shape
    for task in prange((C + COLUMNS - 1) // COLUMNS):
        T, first = x.dtype.type, task * COLUMNS
        width = min(COLUMNS, C - first)
        sum_g, sum_g_xhat = np.zeros(width), np.zeros(width)
        for n in range(N):
            for k in range(width):
                c = first + k
                sum_g[k] += dy[n, c]
                sum_g_xhat[k] += dy[n, c] * ((x[n, c] - mean[c]) * rstd[c])
        for k in range(width if dweight.size else 0):
            dweight[first + k], dbias[first + k] = sum_g_xhat[k], sum_g[k]
        for k in range(width):
            sum_g[k] = sum_g[k] / N if training else 0.0
            sum_g_xhat[k] = sum_g_xhat[k] / N if training else 0.0
        for n in range(len(dx)):
            for k in range(width):
                c = first + k
                xhat = (x[n, c] - mean[c]) * rstd[c] if training else T(0)
                scale = rstd[c] * weight_or_one(weight, c)
                dx[n, c] = scale * (dy[n, c] - T(sum_g[k]) - xhat * T(sum_g_xhat[k]))


@kernel
def layer_norm_forward(y, x, weight, bias, mean, rstd, eps):
    """Layer normalisation (Ba, Kiros and Hinton 2016) of each row.

    y, x: (R, M)   mean, rstd: (R,)   weight, bias: both (M,), or both (0,) for none
    """
    M = x.shape[1]
    for r in prange(len(x)):
        T, row, out = x.dtype.type, x[r], y[r]
        total = 0.0
        for k in range(M):
            total += row[k]
        average, squares = total / M, 0.0
        for k in range(M):
            centered = row[k] - average
            squares += centered * centered
        m, scale = T(average), T(1 / math.sqrt(squares / M + eps))
        mean[r], rstd[r] = m, scale
        for k in range(M):
            out[k] = (row[k] - m) * scale
        for k in range(weight.size):
            out[k] = out[k] * weight[k] + bias[k]


@kernel
def layer_norm_backward(dx, dweight, dbias, dy, x, weight, mean, rstd):
    """dx, dweight and dbias of size 0 are not computed; shapes: see `layer_norm_forward`."""
    R, M = x.shape
    chunks = min(CHUNKS, R)
    weight_partials = np.zeros((chunks, dweight.size), x.dtype)
    bias_partials = np.zeros((chunks, dbias.size), x.dtype)
    for chunk in prange(chunks):
        T, dw, db, grad = x.dtype.type, weight_partials[chunk], bias_partials[chunk], np.empty(M, x.dtype)
        for r in range(chunk * R // chunks, (chunk + 1) * R // chunks):
            g, row, m, scale = dy[r], x[r], mean[r], rstd[r]
            for k in range(dw.size):
                dw[k] += g[k] * ((row[k] - m) * scale)
            for k in range(db.size):
                db[k] += g[k]
            if dx.size:
                for k in range(M):
                    grad[k] = g[k]
                for k in range(weight.size):
                    grad[k] *= weight[k]
                sum_g, sum_g_xhat, out = 0.0, 0.0, dx[r]
                for k in range(M):
                    sum_g += grad[k]
                    sum_g_xhat += grad[k] * ((row[k] - m) * scale)
                mean_g, mean_g_xhat = T(sum_g / M), T(sum_g_xhat / M)
                for k in range(M):
                    out[k] = scale * (grad[k] - mean_g - (row[k] - m) * scale * mean_g_xhat)
    for k in range(dweight.size):
        dweight[k] = 0
    for k in range(dbias.size):
        dbias[k] = 0
    for chunk in range(chunks):
        for k in range(dweight.size):
            dweight[k] += weight_partials[chunk, k]
        for k in range(dbias.size):
            dbias[k] += bias_partials[chunk, k]
