"""Losses: the value and its gradient in one pass, one thread per image.  GPU version of tinycnn/kernels/losses.py."""

import math

from tinycnn.cuda._launch import THREADS, blocks, cuda, divmod32, kernel, phase, ravel
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
def image_soft_cross_entropy(
    tid, nt, first, loss, predicted, score, dx, x, target, weight, K, smooth, confidence, scale
):  # fmt: skip
    """Loss, predicted class and gradient of one image."""
    n = first + tid
    if n < loss.size:
        zero, one = x.dtype.type(0), x.dtype.type(1)
        row, grad, t = x[n * K :], dx[n * K :], target[n * K :]
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
            e = x.dtype.type(math.exp(row[k] - top))
            grad[k] = e
            norm += e
        log_norm = x.dtype.type(math.log(norm))
        value, total = zero, zero
        for k in range(K):
            a = weight[k] * (smooth + confidence * t[k])
            if a != zero:  # a logit of -inf is allowed where the target probability is 0
                value -= a * ((row[k] - top) - log_norm)
            total += a
        for k in range(K):
            a = weight[k] * (smooth + confidence * t[k])
            grad[k] = (grad[k] / norm * total - a) * scale
        loss[n] = value * scale


@kernel(THREADS, registers=64)
def soft_cross_entropy_kernel(loss, predicted, score, dx, x, target, weight, K, smooth, confidence, scale):
    image_soft_cross_entropy(
        cuda.threadIdx.x, THREADS, cuda.blockIdx.x * THREADS, loss, predicted, score, dx, x, target, weight, K, smooth,
        confidence, scale,
    )  # fmt: skip


def soft_cross_entropy(loss, predicted, score, dx, x, target, weight, label_smoothing, mean):
    """`cross_entropy` against class probabilities; the CPU version has formula and shapes."""
    T, (N, K) = x.dtype.type, x.shape
    smooth, confidence, scale = T(label_smoothing / K), T(1 - label_smoothing), T(1 / N if mean else 1.0)
    soft_cross_entropy_kernel[blocks(N)](
        loss, predicted, score, ravel(dx), ravel(x), ravel(target), weight, K, smooth, confidence, scale
    )


@phase
def image_nll(tid, nt, first, partials, loss, predicted, dx, x, target, weight, K, ignore_index, mean):
    """Loss, predicted class and gradient of one image."""
    n = first + tid
    if n < loss.size:
        scale, zero = x.dtype.type(1), x.dtype.type(0)
        if mean:
            scale = scale / reduce(partials)
        row, grad, t = x[n * K :], dx[n * K :], target[n]
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


@kernel(THREADS, registers=64)
def nll_loss_kernel(loss, predicted, dx, x, target, weight, K, ignore_index, mean):
    """Every block sums the weights of the whole batch in the same order, then computes its own images."""
    values = cuda.shared.array(THREADS, x.dtype)
    partials = cuda.shared.array(PARTIALS, x.dtype)
    tid, first = cuda.threadIdx.x, cuda.blockIdx.x * THREADS
    sum_weights(tid, THREADS, values, target, weight, ignore_index)
    cuda.syncthreads()
    block_reduce(tid, THREADS, partials, values)
    cuda.syncthreads()
    image_nll(tid, THREADS, first, partials, loss, predicted, dx, x, target, weight, K, ignore_index, mean)


def nll_loss(loss, predicted, dx, x, target, weight, ignore_index, mean):
    """Negative log-likelihood of log-probabilities; the CPU version has formula and shapes."""
    nll_loss_kernel[blocks(len(x))](
        loss, predicted, ravel(dx), ravel(x), target, weight, x.shape[1], ignore_index, mean
    )


# One block an image, whose numbers are added by its threads in a fixed order: images of an autoencoder are large.


@phase
def part_of_l1(tid, nt, n, values, dx, x, target, F, scale):
    """This thread's numbers of image n."""
    zero = x.dtype.type(0)
    total = zero
    for f in range(n * F + tid, n * F + F, nt):
        error = x[f] - target[f]
        total += abs(error)
        dx[f] = scale if error > zero else (-scale if error < zero else error)
    values[tid] = total


@phase
def write_sum(tid, nt, n, partials, out, scale):
    """out[n] = the sum of an image, scaled."""
    if tid == 0:
        out[n] = reduce(partials) * scale


@kernel(THREADS, registers=40)
def l1_loss_kernel(loss, dx, x, target, F, scale):
    values, partials = cuda.shared.array(THREADS, x.dtype), cuda.shared.array(PARTIALS, x.dtype)
    tid, n = cuda.threadIdx.x, cuda.blockIdx.x
    part_of_l1(tid, THREADS, n, values, dx, x, target, F, scale)
    cuda.syncthreads()
    block_reduce(tid, THREADS, partials, values)
    cuda.syncthreads()
    write_sum(tid, THREADS, n, partials, loss, scale)


def l1_loss(loss, dx, x, target, mean):
    """Absolute error; loss: (N,)   dx, x, target: (N, F).  The mean is over all N*F entries."""
    N, F = x.shape
    l1_loss_kernel[N](loss, ravel(dx), ravel(x), ravel(target), F, x.dtype.type(1 / (N * F) if mean else 1.0))


@phase
def part_of_huber(tid, nt, n, values, dx, x, target, F, delta, half_delta, half, scale):
    """This thread's numbers of image n."""
    total = x.dtype.type(0)
    for f in range(n * F + tid, n * F + F, nt):
        error = x[f] - target[f]
        size = abs(error)
        total += delta * (size - half_delta) if size > delta else half * error * error
        dx[f] = (delta if error > delta else (-delta if error < -delta else error)) * scale
    values[tid] = total


@kernel(THREADS, registers=40)
def huber_loss_kernel(loss, dx, x, target, F, delta, half_delta, half, scale):
    values, partials = cuda.shared.array(THREADS, x.dtype), cuda.shared.array(PARTIALS, x.dtype)
    tid, n = cuda.threadIdx.x, cuda.blockIdx.x
    part_of_huber(tid, THREADS, n, values, dx, x, target, F, delta, half_delta, half, scale)
    cuda.syncthreads()
    block_reduce(tid, THREADS, partials, values)
    cuda.syncthreads()
    write_sum(tid, THREADS, n, partials, loss, scale)


def huber_loss(loss, dx, x, target, delta, mean):
    """Huber loss; loss: (N,)   dx, x, target: (N, F).  The CPU version has the formula."""
    (N, F), T = x.shape, x.dtype.type
    huber_loss_kernel[N](
        loss, ravel(dx), ravel(x), ravel(target), F, T(delta), T(delta / 2), T(0.5), T(1 / (N * F) if mean else 1.0)
    )


@phase
def part_of_absolute_error(tid, nt, n, values, x, target, F):
    """This thread's numbers of image n."""
    total = x.dtype.type(0)
    for f in range(n * F + tid, n * F + F, nt):
        total += abs(x[f] - target[f])
    values[tid] = total


@kernel(THREADS, registers=40)
def absolute_error_kernel(score, x, target, F, scale):
    values, partials = cuda.shared.array(THREADS, x.dtype), cuda.shared.array(PARTIALS, x.dtype)
    tid, n = cuda.threadIdx.x, cuda.blockIdx.x
    part_of_absolute_error(tid, THREADS, n, values, x, target, F)
    cuda.syncthreads()
    block_reduce(tid, THREADS, partials, values)
    cuda.syncthreads()
    write_sum(tid, THREADS, n, partials, score, scale)


def absolute_error(score, x, target):
    """score[n] = the mean of abs(x[n] - target[n]); score: (N,)   x, target: (N, F)"""
    N, F = x.shape
    absolute_error_kernel[N](score, ravel(x), ravel(target), F, x.dtype.type(1 / F))


@phase
def part_of_binary_cross_entropy(
    tid, nt, n, values, rights, dx, x, target, weight, pos_weight, F, half, scale
):  # fmt: skip
    """This thread's labels of image n."""
    zero, one = x.dtype.type(0), x.dtype.type(1)
    total, right = zero, zero
    for f in range(n * F + tid, n * F + F, nt):
        logit, t = x[f], target[f]
        w, p = weight[divmod32(f, weight.size)[1]], pos_weight[divmod32(f, pos_weight.size)[1]]
        e = x.dtype.type(math.exp(-abs(logit)))
        tail = x.dtype.type(math.log1p(e))
        sigmoid = (one if logit >= zero else e) / (one + e)
        opposite = (e if logit >= zero else one) / (one + e)
        negative, positive = one - t, p * t
        element = zero
        if negative != zero:  # avoids 0 * inf
            element += negative * (tail + (zero if logit <= zero else logit))
        if positive != zero:
            element += positive * (tail + (zero if logit >= zero else -logit))
        total += w * element
        dx[f] = w * (negative * sigmoid - positive * opposite) * scale
        right += one if (logit > zero) == (t >= half) else zero
    values[tid], rights[tid] = total, right


@kernel(THREADS, registers=64)
def binary_cross_entropy_kernel(loss, score, dx, x, target, weight, pos_weight, F, half, scale, share):
    values, partials = cuda.shared.array(THREADS, x.dtype), cuda.shared.array(PARTIALS, x.dtype)
    rights, right_partials = cuda.shared.array(THREADS, x.dtype), cuda.shared.array(PARTIALS, x.dtype)
    tid, n = cuda.threadIdx.x, cuda.blockIdx.x
    part_of_binary_cross_entropy(
        tid, THREADS, n, values, rights, dx, x, target, weight, pos_weight, F, half, scale
    )  # fmt: skip
    cuda.syncthreads()
    block_reduce(tid, THREADS, partials, values)
    block_reduce(tid, THREADS, right_partials, rights)
    cuda.syncthreads()
    write_sum(tid, THREADS, n, partials, loss, scale)
    write_sum(tid, THREADS, n, right_partials, score, share)


def binary_cross_entropy_with_logits(loss, score, dx, x, target, weight, pos_weight, mean):
    """Cross entropy of the sigmoid of every logit; the CPU version has formula and shapes."""
    (N, F), T = x.shape, x.dtype.type
    binary_cross_entropy_kernel[N](
        loss, score, ravel(dx), ravel(x), ravel(target), weight, pos_weight, F, T(0.5),
        T(1 / (N * F) if mean else 1.0), T(1 / F),
    )  # fmt: skip


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
