"""Batch and group normalisation.  GPU version of tinycnn/kernels/norm.py, which has the formulas.

A set is the values that share a mean and a variance.  A block normalises a set, or sums a channel.  A set consists of
contiguous runs: a plane of each image for batch normalisation, one run for group normalisation.  Value e of a set is
at first + e // run * jump + e % run.

Sums for mean and variance are compensated (Kahan 1965), because a thread may add thousands of values.  If a sum
overflows (squares do from 1.8e19 on), a second sum, of the values times SMALL, is used.
"""

import math

from tinycnn.cuda._launch import THREADS, constant, cuda, device_function, divmod32, kernel, phase, ravel
from tinycnn.cuda.reduce import PARTIALS, block_reduce, reduce

SMALL, BIG = 2.0**-64, 2.0**64  # exact in float32


@device_function
def offset_of(e, first, run, jump):
    """Index of value e of a set."""
    i, rest = divmod32(e, run)
    return first + i * jump + rest


@device_function
def mean_of(partials, small_partials, count):
    """The mean of a set from both of its sums."""
    T = partials.dtype.type
    m = reduce(partials) / T(count)
    return m if math.isfinite(m) else reduce(small_partials) / T(count) * T(BIG)


@phase
def sum_values(tid, nt, values, small_values, x, first, run, jump, count):
    T = x.dtype.type
    total, compensation, small_total = T(0), T(0), T(0)
    for e in range(tid, count, nt):
        value = x[offset_of(e, first, run, jump)]
        term = value - compensation
        new_total = total + term
        compensation = (new_total - total) - term
        total = new_total
        small_total += value * T(SMALL)
    values[tid], small_values[tid] = total, small_total


@phase
def sum_squares(tid, nt, values, small_values, partials, small_partials, x, first, run, jump, count):
    """Squared distances to the mean of a set, whose sum is in `partials`."""
    T = x.dtype.type
    mean = mean_of(partials, small_partials, count)
    total, compensation, small_total = T(0), T(0), T(0)
    for e in range(tid, count, nt):
        distance = x[offset_of(e, first, run, jump)] - mean
        term = distance * distance - compensation
        new_total = total + term
        compensation = (new_total - total) - term
        total = new_total
        distance *= T(SMALL)
        small_total += distance * distance
    values[tid], small_values[tid] = total, small_total


@phase
def normalise(
    tid, nt, y, x, weight, bias, affine, mean, rstd, running_mean, running_var, batches, momentum, eps, running,
    partials, small_partials, square_partials, small_square_partials, index, first, run, jump, count, channel, plane
):  # fmt: skip
    """y of one set.  running: 0: no running statistics, 1: update them, 2: use them in place of the sums."""
    T = x.dtype.type
    if running == 2:
        m, var = running_mean[index], running_var[index]
    else:
        m, var = mean_of(partials, small_partials, count), reduce(square_partials) / T(count)
    r = T(1) / T(math.sqrt(var + eps))
    if running != 2 and not math.isfinite(var):
        var = reduce(small_square_partials) / T(count)
        r = T(SMALL) / T(math.sqrt(var))
        var = var * T(BIG) * T(BIG)
    for e in range(tid, count, nt):
        offset = offset_of(e, first, run, jump)
        value = (x[offset] - m) * r
        if affine:
            c = channel + (divmod32(e, plane)[0] if jump == 0 else 0)
            value = value * weight[c] + bias[c]
        y[offset] = value
    if tid == 0:
        mean[index], rstd[index] = m, r
        if running == 1:
            if momentum < 0:
                momentum = T(1) / T(batches[0] + 1)
            running_mean[index] += momentum * (m - running_mean[index])
            unbiased = var * (T(count) / T(count - 1))
            running_var[index] += momentum * (unbiased - running_var[index])


@kernel(THREADS, registers=72)
def norm_forward_kernel(
    y, x, weight, bias, affine, mean, rstd, running_mean, running_var, batches, momentum, eps, running, step, run, jump,
    count, channels, plane
):  # fmt: skip
    """Block x: set x, which starts at x * step."""
    values = cuda.shared.array(THREADS, x.dtype)
    small_values = cuda.shared.array(THREADS, x.dtype)
    partials = cuda.shared.array(PARTIALS, x.dtype)
    small_partials = cuda.shared.array(PARTIALS, x.dtype)
    square_partials = cuda.shared.array(PARTIALS, x.dtype)
    small_square_partials = cuda.shared.array(PARTIALS, x.dtype)
    tid, index = cuda.threadIdx.x, cuda.blockIdx.x
    first = index * step
    channel = index if jump > 0 else divmod32(divmod32(first, plane)[0], channels)[1]
    sum_values(tid, THREADS, values, small_values, x, first, run, jump, count)
    cuda.syncthreads()
    block_reduce(tid, THREADS, partials, values)
    block_reduce(tid, THREADS, small_partials, small_values)
    cuda.syncthreads()
    sum_squares(tid, THREADS, values, small_values, partials, small_partials, x, first, run, jump, count)
    cuda.syncthreads()
    block_reduce(tid, THREADS, square_partials, values)
    block_reduce(tid, THREADS, small_square_partials, small_values)
    cuda.syncthreads()
    normalise(
        tid, THREADS, y, x, weight, bias, affine, mean, rstd, running_mean, running_var, batches, momentum, eps,
        running, partials, small_partials, square_partials, small_square_partials, index, first, run, jump, count,
        channel, plane,
    )  # fmt: skip


@phase
def sum_gradients(
    tid, nt, values, xhat_values, dy, x, weight, affine, mean, rstd, index, first, run, jump, count, channel, plane
):
    """Sums of g and of g*xhat over one set, where g = weight*dy."""
    m, r = mean[index], rstd[index]
    total, xhat_total = x.dtype.type(0), x.dtype.type(0)
    for e in range(tid, count, nt):
        offset = offset_of(e, first, run, jump)
        g = dy[offset]
        if affine:
            g = g * weight[channel + (divmod32(e, plane)[0] if jump == 0 else 0)]
        total += g
        xhat_total += g * ((x[offset] - m) * r)
    values[tid], xhat_values[tid] = total, xhat_total


@phase
def input_gradient(
    tid, nt, dx, dy, x, weight, affine, mean, rstd, partials, xhat_partials, fixed, index, first, run, jump, count,
    channel, plane
):  # fmt: skip
    """dx of one set; `fixed`: mean and variance do not depend on x."""
    m, r, T = mean[index], rstd[index], x.dtype.type
    mean_g, mean_g_xhat = T(0), T(0)
    if not fixed:
        mean_g, mean_g_xhat = reduce(partials) / T(count), reduce(xhat_partials) / T(count)
    for e in range(tid, count, nt):
        offset = offset_of(e, first, run, jump)
        g = dy[offset]
        if affine:
            g = g * weight[channel + (divmod32(e, plane)[0] if jump == 0 else 0)]
        dx[offset] = r * (g - mean_g - (x[offset] - m) * r * mean_g_xhat)


@kernel(THREADS, registers=72)
def norm_backward_kernel(
    dx, dy, x, weight, affine, mean, rstd, fixed, step, run, jump, count, channels, plane
):  # fmt: skip
    """Block x: dx of set x."""
    values = cuda.shared.array(THREADS, x.dtype)
    xhat_values = cuda.shared.array(THREADS, x.dtype)
    partials = cuda.shared.array(PARTIALS, x.dtype)
    xhat_partials = cuda.shared.array(PARTIALS, x.dtype)
    tid, index = cuda.threadIdx.x, cuda.blockIdx.x
    first = index * step
    channel = index if jump > 0 else divmod32(divmod32(first, plane)[0], channels)[1]
    sum_gradients(
        tid, THREADS, values, xhat_values, dy, x, weight, affine, mean, rstd, index, first, run, jump, count, channel,
        plane,
    )  # fmt: skip
    cuda.syncthreads()
    block_reduce(tid, THREADS, partials, values)
    block_reduce(tid, THREADS, xhat_partials, xhat_values)
    cuda.syncthreads()
    input_gradient(
        tid, THREADS, dx, dy, x, weight, affine, mean, rstd, partials, xhat_partials, fixed, index, first, run, jump,
        count, channel, plane,
    )  # fmt: skip


@phase
def sum_channel(tid, nt, values, xhat_values, dy, x, mean, rstd, channel, N, C, plane, sets, group):
    """Sums of dy and of dy*xhat over a channel of all images; in image n the channel is in set n*sets + group."""
    total, xhat_total = x.dtype.type(0), x.dtype.type(0)
    for e in range(tid, N * plane, nt):
        n, rest = divmod32(e, plane)
        i = (n * C + channel) * plane + rest
        total += dy[i]
        xhat_total += dy[i] * ((x[i] - mean[n * sets + group]) * rstd[n * sets + group])
    values[tid], xhat_values[tid] = total, xhat_total


@phase
def write_channel_gradient(tid, nt, dweight, dbias, partials, xhat_partials, channel):
    if tid == 0:
        dbias[channel], dweight[channel] = reduce(partials), reduce(xhat_partials)


@kernel(THREADS, registers=64)
def affine_gradient_kernel(dweight, dbias, dy, x, mean, rstd, N, C, plane, sets, group_size):
    """Block x: channel x; in image n the channel is in set n*sets + x // group_size."""
    values = cuda.shared.array(THREADS, x.dtype)
    xhat_values = cuda.shared.array(THREADS, x.dtype)
    partials = cuda.shared.array(PARTIALS, x.dtype)
    xhat_partials = cuda.shared.array(PARTIALS, x.dtype)
    tid, channel = cuda.threadIdx.x, cuda.blockIdx.x
    group = divmod32(channel, group_size)[0]
    sum_channel(tid, THREADS, values, xhat_values, dy, x, mean, rstd, channel, N, C, plane, sets, group)
    cuda.syncthreads()
    block_reduce(tid, THREADS, partials, values)
    block_reduce(tid, THREADS, xhat_partials, xhat_values)
    cuda.syncthreads()
    write_channel_gradient(tid, THREADS, dweight, dbias, partials, xhat_partials, channel)


def maps_shape(x):
    """(N, C, H, W) of maps, or (N, C, 1, 1) of rows."""
    return x.shape if len(x.shape) == 4 else (*x.shape, 1, 1)


def batch_norm_forward(
    y, x, weight, bias, mean, rstd, running_mean, running_var, num_batches_tracked, momentum, eps, training, batch_size
):  # fmt: skip
    """The CPU version has shapes and formulas."""
    (N, C, H, W), T, affine = maps_shape(x), x.dtype.type, weight.size > 0
    weight, bias = (weight, bias) if affine else (mean, mean)
    norm_forward_kernel[C](
        ravel(y), ravel(x), weight, bias, affine, mean, rstd, running_mean, running_var, num_batches_tracked,
        T(momentum), T(eps), 1 if training else 2, H * W, H * W, C * H * W, N * H * W, C, H * W,
    )  # fmt: skip


def batch_norm_backward(dx, dweight, dbias, dy, x, weight, mean, rstd, training, batch_size):
    """dx, dweight and dbias of size 0 are not computed."""
    (N, C, H, W), affine = maps_shape(x), weight.size > 0
    if dweight.size:
        affine_gradient_kernel[C](dweight, dbias, ravel(dy), ravel(x), mean, rstd, N, C, H * W, 0, 1)
    if dx.size:
        norm_backward_kernel[C](
            ravel(dx), ravel(dy), ravel(x), weight if affine else mean, affine, mean, rstd, not training,
            H * W, H * W, C * H * W, N * H * W, C, H * W,
        )  # fmt: skip


def group_norm_forward(y, x, weight, bias, mean, rstd, groups, eps):
    """mean, rstd: (N, groups)"""
    (N, C, H, W), T, affine = x.shape, x.dtype.type, weight.size > 0
    mean, rstd, count = ravel(mean), ravel(rstd), C // groups * H * W
    weight, bias = (weight, bias) if affine else (mean, mean)
    norm_forward_kernel[N * groups](
        ravel(y), ravel(x), weight, bias, affine, mean, rstd, mean, rstd, constant((0,)), T(0), T(eps),
        0, count, count, 0, count, C, H * W,
    )  # fmt: skip


def group_norm_backward(dx, dweight, dbias, dy, x, weight, mean, rstd, groups):
    """dx, dweight and dbias of size 0 are not computed."""
    (N, C, H, W), affine = x.shape, weight.size > 0
    mean, rstd, count = ravel(mean), ravel(rstd), C // groups * H * W
    if dweight.size:
        affine_gradient_kernel[C](dweight, dbias, ravel(dy), ravel(x), mean, rstd, N, C, H * W, groups, C // groups)
    if dx.size:
        norm_backward_kernel[N * groups](
            ravel(dx), ravel(dy), ravel(x), weight if affine else mean, affine, mean, rstd, False,
            count, count, 0, count, C, H * W,
        )  # fmt: skip


def layer_norm_forward(y, x, weight, bias, mean, rstd, eps):
    """Rows are images with M channels of one pixel, in one group; the CPU version has the shapes."""
    maps = (*x.shape, 1, 1)
    group_norm_forward(y.reshape(maps), x.reshape(maps), weight, bias, mean, rstd, 1, eps)


def layer_norm_backward(dx, dweight, dbias, dy, x, weight, mean, rstd):
    """dx, dweight and dbias of size 0 are not computed."""
    maps = (*x.shape, 1, 1)
    dx = dx.reshape(maps) if dx.size else dx
    group_norm_backward(dx, dweight, dbias, dy.reshape(maps), x.reshape(maps), weight, mean, rstd, 1)
