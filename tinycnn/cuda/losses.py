"""Losses: the value and its gradient in one pass, a thread an image.  Twin of tinycnn/kernels/losses.py."""

import math

from tinycnn.cuda._launch import THREADS, blocks, cuda, kernel, phase, ravel
from tinycnn.cuda.reduce import PARTIALS, block_reduce, reduce


@phase
def weigh(tid, nt, some, target, weight, ignore_index):
    """This thread's share of the sum of weight[target]."""
    share = weight.dtype.type(0)
    for n in range(tid, target.size, nt):
        if target[n] != ignore_index:
            share += weight[target[n]]
    some[tid] = share


@phase
def judge(
    tid, nt, first, few, loss, predicted, dx, x, target, weight, K, ignore_index, smooth, hit, mean
):  # fmt: skip
    """One image: loss, class and gradient."""
    n = first + tid
    if n < loss.size:
        scale, zero = x.dtype.type(1), x.dtype.type(0)
        if mean:
            scale = scale / reduce(few)
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
            value, share = zero, zero
            for k in range(K):
                a = weight[k] * (smooth + hit if k == t else smooth)
                if a != zero:  # so that a logit of -inf may stand where no probability is asked for
                    value -= a * ((row[k] - top) - log_norm)
                share += a
            for k in range(K):
                a = weight[k] * (smooth + hit if k == t else smooth)
                grad[k] = (grad[k] / norm * share - a) * scale
            loss[n] = value * scale


@kernel(THREADS, registers=64)
def cross_entropy_kernel(loss, predicted, dx, x, target, weight, K, ignore_index, smooth, hit, mean):
    """Every block sums the weights of the whole batch, in the same order, and then does its own images."""
    some = cuda.shared.array(THREADS, x.dtype)
    few = cuda.shared.array(PARTIALS, x.dtype)
    tid, first = cuda.threadIdx.x, cuda.blockIdx.x * THREADS
    weigh(tid, THREADS, some, target, weight, ignore_index)
    cuda.syncthreads()
    block_reduce(tid, THREADS, few, some)
    cuda.syncthreads()
    judge(
        tid, THREADS, first, few, loss, predicted, dx, x, target, weight, K, ignore_index, smooth, hit, mean
    )  # fmt: skip


def cross_entropy(loss, predicted, dx, x, target, weight, ignore_index, label_smoothing, mean):
    """Softmax cross entropy of logits and the class with the largest logit; formula and shapes are at the twin."""
    T, K = x.dtype.type, x.shape[1]
    smooth, hit = T(label_smoothing / K), T(1 - label_smoothing)
    cross_entropy_kernel[blocks(len(x))](
        loss, predicted, ravel(dx), ravel(x), target, weight, K, ignore_index, smooth, hit, mean
    )


@phase
def square(tid, nt, first, loss, dx, x, target, F, scale):
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
    square(cuda.threadIdx.x, THREADS, cuda.blockIdx.x * THREADS, loss, dx, x, target, F, scale)


def mse_loss(loss, dx, x, target, mean):
    """Squared error; loss: (N,)   dx, x, target: (N, F).  The mean is over all N*F entries."""
    N, F = x.shape
    scale = x.dtype.type(1 / (N * F) if mean else 1.0)
    mse_loss_kernel[blocks(N)](loss, ravel(dx), ravel(x), ravel(target), F, scale)


@phase
def mark(tid, nt, first, rows, predicted, x, labels, K):
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
    mark(cuda.threadIdx.x, THREADS, cuda.blockIdx.x * THREADS, rows, predicted, x, labels, K)


def one_hot(rows, predicted, x, labels):
    """rows[n, k] = 1 where k = labels[n], else 0, and the class with the largest of x[n]; shapes are at the twin."""
    one_hot_kernel[blocks(len(x))](ravel(rows), predicted, ravel(x), labels, x.shape[1])
