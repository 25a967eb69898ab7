"""Losses: value and gradient in one pass.

loss: (N,), one number per image; their sum is the loss of the batch.  If `mean`, they are already divided by the
batch's weight.
"""

import math

from numba import prange

from tinycnn.kernels._jit import kernel, kernel_no_reassoc


@kernel_no_reassoc
def cross_entropy(loss, predicted, dx, x, target, weight, ignore_index, label_smoothing, mean):
    """Softmax cross entropy of logits, as in torch, and the class with the largest logit.

    loss: (N,)   predicted, target: (N,) int64   dx, x: (N, K)   weight: (K,)
    loss[n] = -sum_k a[k] log softmax(x[n])[k], a[k] = weight[k] * ((1 - s) [k = target] + s/K), s = label_smoothing;
    images whose target is ignore_index have loss 0; the mean divides by the sum of weight[target].
    The largest logit is subtracted first, so that no exponential overflows.
    """
    N, K = x.shape
    total = 0.0
    for n in range(N):
        if target[n] != ignore_index:
            total += weight[target[n]]
    scale = x.dtype.type(1 / total if mean else 1.0)
    smooth = x.dtype.type(label_smoothing / K)
    confidence = x.dtype.type(1 - label_smoothing)
    zero = x.dtype.type(0)
    for n in prange(N):
        row, grad, t = x[n], dx[n], target[n]
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
                grad[k] = math.exp(row[k] - top)
                norm += grad[k]
            log_norm = math.log(norm)
            value, weight_sum = zero, zero
            for k in range(K):
                a = weight[k] * (smooth + confidence if k == t else smooth)
                if a != zero:  # avoids 0 * inf: a logit may be -inf where the target probability is 0
                    value -= a * ((row[k] - top) - log_norm)
                weight_sum += a
            for k in range(K):
                a = weight[k] * (smooth + confidence if k == t else smooth)
                grad[k] = (grad[k] / norm * weight_sum - a) * scale
            loss[n] = value * scale


@kernel
def mse_loss(loss, dx, x, target, mean):
    """Squared error.  loss: (N,)   dx, x, target: (N, F)   mean: over all N*F entries"""
    N, F = x.shape
    scale = x.dtype.type(1 / (N * F) if mean else 1.0)
    two = x.dtype.type(2)
    for n in prange(N):
        value = x.dtype.type(0)
        for f in range(F):
            error = x[n, f] - target[n, f]
            value += error * error
            dx[n, f] = two * error * scale
        loss[n] = value * scale


@kernel
def one_hot(rows, predicted, x, labels):
    """rows[n, k] = 1 where k = labels[n], else 0; predicted[n] = argmax of x[n].

    rows, x: (N, K)   predicted, labels: (N,) int64
    """
    zero, one = x.dtype.type(0), x.dtype.type(1)
    for n in prange(len(x)):
        row, best = x[n], 0
        for k in range(row.size):
            rows[n, k] = one if k == labels[n] else zero
            if row[k] > row[best] or row[k] != row[k]:
                best = k
        predicted[n] = best
