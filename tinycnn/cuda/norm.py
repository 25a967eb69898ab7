"""Batch and group normalisation, a block a set or a channel.  Twin of tinycnn/kernels/norm.py, with the formulas.

The numbers of a set lie in runs: for batch normalisation a plane of each image, for group normalisation one run.
Number e of a set is at first + e // run * jump + e % run.

Sums for mean and variance are compensated (Kahan 1965), for a thread may have thousands of numbers to add.  Beside each
stands one of the numbers times SMALL, which is used where the other overflows: squares do from 1.8e19 on.
"""

import math

from tinycnn.cuda._launch import THREADS, constant, cuda, device_function, divmod32, kernel, phase, ravel
from tinycnn.cuda.reduce import PARTIALS, block_reduce, reduce

SMALL, BIG = 2.0**-64, 2.0**64  # exact factors, also in float32


@device_function
def place(e, first, run, jump):
    number, rest = divmod32(e, run)
    return first + number * jump + rest


@device_function
def mean_of(few, few_small, count):
    T = few.dtype.type
    m = reduce(few) / T(count)
    return m if math.isfinite(m) else reduce(few_small) / T(count) * T(BIG)


@phase
def add_numbers(tid, nt, some, small, x, first, run, jump, count):
    T = x.dtype.type
    sum_, lost, sum_small = T(0), T(0), T(0)
    for e in range(tid, count, nt):
        value = x[place(e, first, run, jump)]
        term = value - lost
        new = sum_ + term
        lost = (new - sum_) - term
        sum_ = new
        sum_small += value * T(SMALL)
    some[tid], small[tid] = sum_, sum_small


@phase
def add_squares(tid, nt, some, small, few, few_small, x, first, run, jump, count):
    """Squares of the distance to the mean, whose sum is in `few`."""
    T = x.dtype.type
    mean = mean_of(few, few_small, count)
    sum_, lost, sum_small = T(0), T(0), T(0)
    for e in range(tid, count, nt):
        distance = x[place(e, first, run, jump)] - mean
        term = distance * distance - lost
        new = sum_ + term
        lost = (new - sum_) - term
        sum_ = new
        distance *= T(SMALL)
        sum_small += distance * distance
    some[tid], small[tid] = sum_, sum_small


@phase
def normalise(
    tid, nt, y, x, weight, bias, affine, mean, rstd, running_mean, running_var, batches, momentum, eps, running, few,
    few_small, squares, squares_small, set_, first, run, jump, count, channel, plane
):  # fmt: skip
    """y of one set from its sums, or, if `running` is 2, from the running statistics (1: they move, 0: none)."""
    T = x.dtype.type
    if running == 2:
        m, var = running_mean[set_], running_var[set_]
    else:
        m, var = mean_of(few, few_small, count), reduce(squares) / T(count)
    r = T(1) / T(math.sqrt(var + eps))
    if running != 2 and not math.isfinite(var):
        var = reduce(squares_small) / T(count)
        r = T(SMALL) / T(math.sqrt(var))
        var = var * T(BIG) * T(BIG)
    for e in range(tid, count, nt):
        at = place(e, first, run, jump)
        value = (x[at] - m) * r
        if affine:
            c = channel + (divmod32(e, plane)[0] if jump == 0 else 0)
            value = value * weight[c] + bias[c]
        y[at] = value
    if tid == 0:
        mean[set_], rstd[set_] = m, r
        if running == 1:
            if momentum < 0:
                momentum = T(1) / T(batches[0] + 1)
            running_mean[set_] += momentum * (m - running_mean[set_])
            unbiased = var * (T(count) / T(count - 1))
            running_var[set_] += momentum * (unbiased - running_var[set_])


@kernel(THREADS, registers=72)
def norm_forward_kernel(
    y, x, weight, bias, affine, mean, rstd, running_mean, running_var, batches, momentum, eps, running, step, run, jump,
    count, channels, plane
):  # fmt: skip
    """Block x: set x, which begins at x * step; `channels` of a set (for groups)."""
    some = cuda.shared.array(THREADS, x.dtype)
    small = cuda.shared.array(THREADS, x.dtype)
    few = cuda.shared.array(PARTIALS, x.dtype)
    few_small = cuda.shared.array(PARTIALS, x.dtype)
    squares = cuda.shared.array(PARTIALS, x.dtype)
    squares_small = cuda.shared.array(PARTIALS, x.dtype)
    tid, set_ = cuda.threadIdx.x, cuda.blockIdx.x
    first = set_ * step
    channel = set_ if jump > 0 else divmod32(divmod32(first, plane)[0], channels)[1]
    add_numbers(tid, THREADS, some, small, x, first, run, jump, count)
    cuda.syncthreads()
    block_reduce(tid, THREADS, few, some)
    block_reduce(tid, THREADS, few_small, small)
    cuda.syncthreads()
    add_squares(tid, THREADS, some, small, few, few_small, x, first, run, jump, count)
    cuda.syncthreads()
    block_reduce(tid, THREADS, squares, some)
    block_reduce(tid, THREADS, squares_small, small)
    cuda.syncthreads()
    normalise(
        tid, THREADS, y, x, weight, bias, affine, mean, rstd, running_mean, running_var, batches, momentum, eps,
        running, few, few_small, squares, squares_small, set_, first, run, jump, count, channel, plane,
    )  # fmt: skip


@phase
def add_slopes(tid, nt, some, bent, dy, x, weight, affine, mean, rstd, set_, first, run, jump, count, channel, plane):
    """Sums of g and of g*xhat, g = weight*dy, over one set."""
    m, r = mean[set_], rstd[set_]
    sum_, sum_bent = x.dtype.type(0), x.dtype.type(0)
    for e in range(tid, count, nt):
        at = place(e, first, run, jump)
        g = dy[at]
        if affine:
            g = g * weight[channel + (divmod32(e, plane)[0] if jump == 0 else 0)]
        sum_ += g
        sum_bent += g * ((x[at] - m) * r)
    some[tid], bent[tid] = sum_, sum_bent


@phase
def bend(
    tid, nt, dx, dy, x, weight, affine, mean, rstd, few, few_bent, fixed, set_, first, run, jump, count, channel, plane
):  # fmt: skip
    """dx of one set; `fixed`: its mean and variance do not depend on x."""
    m, r, T = mean[set_], rstd[set_], x.dtype.type
    straight, bent = T(0), T(0)
    if not fixed:
        straight, bent = reduce(few) / T(count), reduce(few_bent) / T(count)
    for e in range(tid, count, nt):
        at = place(e, first, run, jump)
        g = dy[at]
        if affine:
            g = g * weight[channel + (divmod32(e, plane)[0] if jump == 0 else 0)]
        dx[at] = r * (g - straight - (x[at] - m) * r * bent)


@kernel(THREADS, registers=72)
def norm_backward_kernel(
    dx, dy, x, weight, affine, mean, rstd, fixed, step, run, jump, count, channels, plane
):  # fmt: skip
    """Block x: dx of set x."""
    some = cuda.shared.array(THREADS, x.dtype)
    bent = cuda.shared.array(THREADS, x.dtype)
    few = cuda.shared.array(PARTIALS, x.dtype)
    few_bent = cuda.shared.array(PARTIALS, x.dtype)
    tid, set_ = cuda.threadIdx.x, cuda.blockIdx.x
    first = set_ * step
    channel = set_ if jump > 0 else divmod32(divmod32(first, plane)[0], channels)[1]
    add_slopes(
        tid, THREADS, some, bent, dy, x, weight, affine, mean, rstd, set_, first, run, jump, count, channel, plane
    )  # fmt: skip
    cuda.syncthreads()
    block_reduce(tid, THREADS, few, some)
    block_reduce(tid, THREADS, few_bent, bent)
    cuda.syncthreads()
    bend(
        tid, THREADS, dx, dy, x, weight, affine, mean, rstd, few, few_bent, fixed, set_, first, run, jump, count,
        channel, plane,
    )  # fmt: skip


@phase
def add_channel(tid, nt, some, bent, dy, x, mean, rstd, channel, N, C, plane, sets, at):
    """Sums of dy and of dy*xhat over a channel of all images; image n is in set n*sets + at."""
    sum_, sum_bent = x.dtype.type(0), x.dtype.type(0)
    for e in range(tid, N * plane, nt):
        n, rest = divmod32(e, plane)
        i = (n * C + channel) * plane + rest
        sum_ += dy[i]
        sum_bent += dy[i] * ((x[i] - mean[n * sets + at]) * rstd[n * sets + at])
    some[tid], bent[tid] = sum_, sum_bent


@phase
def write_channel(tid, nt, dweight, dbias, few, few_bent, channel):
    if tid == 0:
        dbias[channel], dweight[channel] = reduce(few), reduce(few_bent)


@kernel(THREADS, registers=64)
def affine_gradient_kernel(dweight, dbias, dy, x, mean, rstd, N, C, plane, sets, per):
    """Block x: channel x, in set n*sets + x // per of image n."""
    some = cuda.shared.array(THREADS, x.dtype)
    bent = cuda.shared.array(THREADS, x.dtype)
    few = cuda.shared.array(PARTIALS, x.dtype)
    few_bent = cuda.shared.array(PARTIALS, x.dtype)
    tid, channel = cuda.threadIdx.x, cuda.blockIdx.x
    add_channel(tid, THREADS, some, bent, dy, x, mean, rstd, channel, N, C, plane, sets, divmod32(channel, per)[0])
    cuda.syncthreads()
    block_reduce(tid, THREADS, few, some)
    block_reduce(tid, THREADS, few_bent, bent)
    cuda.syncthreads()
    write_channel(tid, THREADS, dweight, dbias, few, few_bent, channel)


def batch_norm_forward(
    y, x, weight, bias, mean, rstd, running_mean, running_var, num_batches_tracked, momentum, eps, training, batch_size
):  # fmt: skip
    """See the twin."""
    (N, C, H, W), T, affine = x.shape, x.dtype.type, weight.size > 0
    weight, bias = (weight, bias) if affine else (mean, mean)
    norm_forward_kernel[C](
        ravel(y), ravel(x), weight, bias, affine, mean, rstd, running_mean, running_var, num_batches_tracked, T(momentum),
        T(eps), 1 if training else 2, H * W, H * W, C * H * W, N * H * W, C, H * W,
    )  # fmt: skip


def batch_norm_backward(dx, dweight, dbias, dy, x, weight, mean, rstd, training, batch_size):
    """dx, dweight and dbias of size 0 are not computed."""
    (N, C, H, W), affine = x.shape, weight.size > 0
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
