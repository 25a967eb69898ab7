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


@kernel_no_reassoc
def soft_cross_entropy(loss, predicted, score, dx, x, target, weight, label_smoothing, mean):
    """`cross_entropy` against class probabilities, as in torch.

    loss, score: (N,)   predicted: (N,) int64   dx, x, target: (N, K)   weight: (K,)
    loss[n] = -sum_k a[k] log softmax(x[n])[k], a[k] = weight[k] * ((1 - s) target[n, k] + s/K), s = label_smoothing;
    the mean divides by N.  score[n]: 1 if the class with the largest logit is the most probable one, else 0
    """
    N, K = x.shape
    scale = x.dtype.type(1 / N if mean else 1.0)
    smooth = x.dtype.type(label_smoothing / K)
    confidence = x.dtype.type(1 - label_smoothing)
    zero, one = x.dtype.type(0), x.dtype.type(1)
    for n in prange(N):
        row, grad, t = x[n], dx[n], target[n]
        top, best, likely = row[0], 0, 0
        for k in range(1, K):
            if row[k] > top or row[k] != row[k]:
                top, best = row[k], k
            if t[k] > t[likely]:
                likely = k
        predicted[n] = best
        score[n] = one if best == likely else zero
        norm = zero
        for k in range(K):
            grad[k] = math.exp(row[k] - top)
            norm += grad[k]
        log_norm = math.log(norm)
        value, weight_sum = zero, zero
        for k in range(K):
            a = weight[k] * (smooth + confidence * t[k])
            if a != zero:  # avoids 0 * inf: a logit may be -inf where the target probability is 0
                value -= a * ((row[k] - top) - log_norm)
            weight_sum += a
        for k in range(K):
            a = weight[k] * (smooth + confidence * t[k])
            grad[k] = (grad[k] / norm * weight_sum - a) * scale
        loss[n] = value * scale


@kernel_no_reassoc
def nll_loss(loss, predicted, dx, x, target, weight, ignore_index, mean):
    """Negative log-likelihood of log-probabilities, as in torch, and the class with the largest.

    loss: (N,)   predicted, target: (N,) int64   dx, x: (N, K)   weight: (K,)
    loss[n] = -weight[target[n]] x[n, target[n]]; images whose target is ignore_index have loss 0; the mean divides by
    the sum of weight[target].
    """
    N, K = x.shape
    total = 0.0
    for n in range(N):
        if target[n] != ignore_index:
            total += weight[target[n]]
    scale = x.dtype.type(1 / total if mean else 1.0)
    zero = x.dtype.type(0)
    for n in prange(N):
        row, grad, t = x[n], dx[n], target[n]
        best = 0
        for k in range(K):
            grad[k] = zero
            if row[k] > row[best] or row[k] != row[k]:
                best = k
        predicted[n] = best
        loss[n] = zero
        if t != ignore_index:
            grad[t] = -weight[t] * scale
            loss[n] = -weight[t] * row[t] * scale


@kernel
def l1_loss(loss, dx, x, target, mean):
    """Absolute error; its gradient is 0 where x is the target.

    loss: (N,)   dx, x, target: (N, F)   mean: over all N*F entries
    """
    N, F = x.shape
    scale = x.dtype.type(1 / (N * F) if mean else 1.0)
    zero = x.dtype.type(0)
    for n in prange(N):
        value = zero
        for f in range(F):
            error = x[n, f] - target[n, f]
            value += abs(error)
            # Of NaN it is NaN: the last case is 0 or NaN.
            dx[n, f] = scale if error > zero else (-scale if error < zero else error)
        loss[n] = value * scale


@kernel
def huber_loss(loss, dx, x, target, delta, mean):
    """Half the squared error e up to delta, and delta * (abs(e) - delta/2) beyond it, as in torch.

    loss: (N,)   dx, x, target: (N, F)   mean: over all N*F entries
    """
    N, F = x.shape
    scale = x.dtype.type(1 / (N * F) if mean else 1.0)
    d, half, zero = x.dtype.type(delta), x.dtype.type(0.5), x.dtype.type(0)
    for n in prange(N):
        value = zero
        for f in range(F):
            error = x[n, f] - target[n, f]
            size = abs(error)
            value += d * (size - half * d) if size > d else half * error * error
            dx[n, f] = (d if error > d else (-d if error < -d else error)) * scale
        loss[n] = value * scale


@kernel
def absolute_error(score, x, target):
    """score[n] = the mean of abs(x[n] - target[n]); score: (N,)   x, target: (N, F)"""
    N, F = x.shape
    for n in prange(N):
        total = x.dtype.type(0)
        for f in range(F):
            total += abs(x[n, f] - target[n, f])
        score[n] = total / x.dtype.type(F)


@kernel_no_reassoc
def binary_cross_entropy_with_logits(loss, score, dx, x, target, weight, pos_weight, mean):
    """Cross entropy of the sigmoid of every logit, as in torch.

    loss, score: (N,)   dx, x, target: (N, F), targets 0 ... 1   mean: over all N*F entries
    weight, pos_weight: (W,) and (P,), repeated along the N*F entries; W and P divide N*F
    loss[n] = sum over f of w ((1 - t) softplus(x) + p t softplus(-x)), softplus(x) = log(1 + exp(x))
    score[n]: the fraction of labels f for which x > 0 if and only if t >= 1/2
    No exponential overflows, and no digits cancel: exp is of -abs(x) only, and softplus(x) = max(x, 0) +
    log1p(exp(-abs(x))).
    """
    N, F = x.shape
    W, P = weight.size, pos_weight.size
    scale = x.dtype.type(1 / (N * F) if mean else 1.0)
    zero, one, half = x.dtype.type(0), x.dtype.type(1), x.dtype.type(0.5)
    for n in prange(N):
        value, right = zero, zero
        row, grad, row_target = x[n], dx[n], target[n]
        w, p = (n * F) % W, (n * F) % P
        for f in range(F):
            logit, t = row[f], row_target[f]
            e = x.dtype.type(math.exp(-abs(logit)))
            tail = x.dtype.type(math.log1p(e))
            sigmoid = (one if logit >= zero else e) / (one + e)
            opposite = (e if logit >= zero else one) / (one + e)  # sigmoid(-logit)
            negative, positive = one - t, pos_weight[p] * t
            element = zero
            if negative != zero:  # avoids 0 * inf
                element += negative * (tail + (zero if logit <= zero else logit))
            if positive != zero:
                element += positive * (tail + (zero if logit >= zero else -logit))
            value += weight[w] * element
            grad[f] = weight[w] * (negative * sigmoid - positive * opposite) * scale
            right += one if (logit > zero) == (t >= half) else zero
            w, p = (w + 1 if w + 1 < W else 0), (p + 1 if p + 1 < P else 0)
        loss[n] = value * scale
        score[n] = right / x.dtype.type(F)


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
