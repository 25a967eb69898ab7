"""Losses: the value and its gradient in one pass, one thread per image.  GPU version of tinycnn/kernels/losses.py."""

import math

from tinycnn.cuda._launch import THREADS, blocks, cuda, kernel, phase, ravel
from tinycnn.cuda.reduce import PARTIALS, block_reduce, reduce


@phase
def sum_weights(tid, nt, values, target, weight, ignore_index):
    """This thread's part of the sum of weight[target]."""
    total = weight.dtype.type(0)
    for n in range(tid, target.size, nt):
        if target[n] != ignore_index:
            total += weight[target[n]]
    values[tid] = total


@phase
def image_cross_entropy(
    tid, nt, first, partials, loss, predicted, dx, x, target, weight, K, ignore_index, smooth, hit, mean
):  # fmt: skip
    """Loss, predicted class and gradient of one image."""
    n = first + tid
    if n < loss.size:
        scale, zero = x.dtype.type(1), x.dtype.type(0)
        if mean:
            scale = scale / reduce(partials)
        row, grad, t = x[n * K :], dx[n * K :], target[n]
        top, best = row[0], 0
        for k in range(1, K):
            if row[k] > top or row[k] != row[k]:
                top, best = row[k], k
        predicted[n] = best
        if t == ignore_index:
            loss[n] = zero
            for k in range(K):
                grad[k] = zero
        else:
            norm = zero
            for k in range(K):
                e = x.dtype.type(math.exp(row[k] - top))
                grad[k] = e
                norm += e
            log_norm = x.dtype.type(math.log(norm))
            value, total = zero, zero
            for k in range(K):
                a = weight[k] * (smooth + hit if k == t else smooth)
                if a != zero:  # a logit of -inf is allowed where the target probability is 0
                    value -= a * ((row[k] - top) - log_norm)
                total += a
            for k in range(K):
                a = weight[k] * (smooth + hit if k == t else smooth)
                grad[k] = (grad[k] / norm * total - a) * scale
            loss[n] = value * scale


@kernel(THREADS, registers=64)
def cross_entropy_kernel(loss, predicted, dx, x, target, weight, K, ignore_index, smooth, hit, mean):
    """Every block sums the weights of the whole batch in the same order, then computes its own images."""
    values = cuda.shared.array(THREADS, x.dtype)
    partials = cuda.shared.array(PARTIALS, x.dtype)
    tid, first = cuda.threadIdx.x, cuda.blockIdx.x * THREADS
    sum_weights(tid, THREADS, values, target, weight, ignore_index)
    cuda.syncthreads()
    block_reduce(tid, THREADS, partials, values)
    cuda.syncthreads()
    image_cross_entropy(
        tid, THREADS, first, partials, loss, predicted, dx, x, target, weight, K, ignore_index, smooth, hit, mean
    )  # fmt: skip


def cross_entropy(loss, predicted, dx, x, target, weight, ignore_index, label_smoothing, mean):
    """Softmax cross entropy of logits, and the class with the largest logit; the CPU version has formula and shapes."""
    T, K = x.dtype.type, x.shape[1]
    smooth, hit = T(label_smoothing / K), T(1 - label_smoothing)
    cross_entropy_kernel[blocks(len(x))](
        loss, predicted, ravel(dx), ravel(x), target, weight, K, ignore_index, smooth, hit, mean
    )


@phase
def image_squared_error(tid, nt, first, loss, dx, x, target, F, scale):
    n = first + tid
    if n < loss.size:
        value = x.dtype.type(0)
        for f in range(n * F, n * F + F):
            error = x[f] - target[f]
            value += error * error
            dx[f] = (error + error) * scale
        loss[n] = value * scale


@kernel(THREADS, registers=40)
def mse_loss_kernel(loss, dx, x, target, F, scale):
    image_squared_error(cuda.threadIdx.x, THREADS, cuda.blockIdx.x * THREADS, loss, dx, x, target, F, scale)


def mse_loss(loss, dx, x, target, mean):
    """Squared error; loss: (N,)   dx, x, target: (N, F).  The mean is over all N*F entries."""
    N, F = x.shape
    scale = x.dtype.type(1 / (N * F) if mean else 1.0)
    mse_loss_kernel[blocks(N)](loss, ravel(dx), ravel(x), ravel(target), F, scale)


@phase
def one_hot_row(tid, nt, first, rows, predicted, x, labels, K):
    n = first + tid
    if n < labels.size:
        zero, one, best = x.dtype.type(0), x.dtype.type(1), n * K
        for e in range(n * K, n * K + K):
            rows[e] = one if e - n * K == labels[n] else zero
            if x[e] > x[best] or x[e] != x[e]:
                best = e
        predicted[n] = best - n * K


@kernel(THREADS, registers=40)
def one_hot_kernel(rows, predicted, x, labels, K):
    one_hot_row(cuda.threadIdx.x, THREADS, cuda.blockIdx.x * THREADS, rows, predicted, x, labels, K)


def one_hot(rows, predicted, x, labels):
    """rows[n, k] = 1 where k = labels[n], else 0, and the class with the largest x[n]; shapes: see the CPU version."""
    one_hot_kernel[blocks(len(x))](ravel(rows), predicted, ravel(x), labels, x.shape[1])
