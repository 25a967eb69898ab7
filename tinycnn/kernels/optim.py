"""Optimizers: one pass over the flat parameter vector.

theta, grad and the optimizer's state: (P,).  lr_schedule: the learning rate of each step; the last one is kept.
step: (1,) int64, the number of steps taken, incremented here.  On a GPU both are in device memory, for captured steps.
"""

import math

import numpy as np
from numba import prange

from tinycnn.kernels._jit import device_function, parameter_kernel, serial_kernel

# Moving averages of gradients that have become zero, such as a dead ReLU's, decay to denormal numbers, which CPUs
# process a hundred times slower.  Small normal numbers are kept: weights shrunk by weight decay can grow again.


@device_function
def flush_denormal(value, tiny):
    return value - value if abs(value) < tiny else value


@serial_kernel
def increment(step):
    """step[0] += 1; step: (1,) int64"""
    step[0] += 1


BLOCK = 2048  # parameters of a task

# The loops over a block run on slices, from 0: Numba tests other signed indices for negative values, and LLVM does not
# vectorise a loop with that test.


def parameter_blocks(ranges, dtype):
    """(blocks, rates): ranges (start, stop, lr_scale, weight_decay) of the flat vector, cut into tasks.

    blocks: (B, 2) int64, [start, stop)   rates: (B, 2) float64, factor of the learning rate and weight decay
    """
    rows = [(a, min(a + BLOCK, stop), *rates) for start, stop, *rates in ranges for a in range(start, stop, BLOCK)]
    table = np.array(rows, np.float64).reshape(-1, 4)
    return table[:, :2].astype(np.int64), np.ascontiguousarray(table[:, 2:])


@parameter_kernel
def accumulate_grad(total, grad, scale, first):
    """total = scale*grad if `first`, else total + scale*grad.  total, grad: (P,)"""
    s = total.dtype.type(scale)
    for i in prange(total.size):
        total[i] = s * grad[i] if first else total[i] + s * grad[i]


@device_function
def sgd_block(theta, grad, rate, decay):
    for i in range(theta.size):
        theta[i] -= rate * (grad[i] + decay * theta[i])


@device_function
def sgd_momentum_block(theta, grad, velocity, rate, mu, gain, decay, nesterov, tiny):
    for i in range(theta.size):
        g = grad[i] + decay * theta[i]
        v = flush_denormal(mu * velocity[i] + gain * g, tiny)
        velocity[i] = v
        theta[i] -= rate * (g + mu * v if nesterov else v)


@parameter_kernel
def sgd(theta, grad, velocity, lr_schedule, step, blocks, rates, momentum, dampening, nesterov):
    """torch's: g = grad + weight_decay*theta, v = momentum*v + (1 - dampening)*g (at first v = g), theta -= lr*v.

    blocks, rates: see `parameter_blocks`
    """
    t, T = step[0], theta.dtype.type
    lr, mu, gain = lr_schedule[min(t, lr_schedule.size - 1)], T(momentum), T(1.0 if t == 0 else 1.0 - dampening)
    tiny = np.finfo(theta.dtype).tiny
    for b in prange(len(blocks)):
        rate, decay, start, stop = T(lr * rates[b, 0]), T(rates[b, 1]), blocks[b, 0], blocks[b, 1]
        if momentum == 0:
            sgd_block(theta[start:stop], grad[start:stop], rate, decay)
        else:
            sgd_momentum_block(
                theta[start:stop], grad[start:stop], velocity[start:stop], rate, mu, gain, decay, nesterov, tiny
            )
    step[0] = t + 1


@parameter_kernel
def sgd_per_parameter(theta, grad, step_sizes, step):
    """theta[i] -= step_sizes[i] * grad[i]: a learning rate for every parameter.  step_sizes: (P,)"""
    for i in prange(theta.size):
        theta[i] -= step_sizes[i] * grad[i]
    step[0] += 1


@device_function
def adam_block(theta, grad, m, v, step_size, root_scale, keep, decay, b1, b2, a1, a2, e, tiny):
    T = theta.dtype.type
    for i in range(theta.size):
        g = grad[i] + decay * theta[i]
        mi, vi = flush_denormal(b1 * m[i] + a1 * g, tiny), flush_denormal(b2 * v[i] + a2 * g * g, tiny)
        m[i], v[i] = mi, vi
        theta[i] = theta[i] * keep - step_size * mi / (T(math.sqrt(vi)) * root_scale + e)


@parameter_kernel
def adam(theta, grad, m, v, lr_schedule, step, blocks, rates, beta1, beta2, eps, decoupled):
    """Adam (Kingma and Ba 2015).  Weight decay is added to the gradient; if `decoupled`, theta is scaled (AdamW).

    blocks, rates: see `parameter_blocks`
    """
    t = step[0] + 1
    T = theta.dtype.type
    lr = lr_schedule[min(t - 1, lr_schedule.size - 1)]
    corrected = lr / (1 - beta1**t)  # not divided in the loop, where LLVM would multiply by the reciprocal
    root_scale = T(1 / math.sqrt(1 - beta2**t))
    b1, b2, a1, a2, e, tiny = T(beta1), T(beta2), T(1 - beta1), T(1 - beta2), T(eps), np.finfo(theta.dtype).tiny
    for b in prange(len(blocks)):
        rate = lr * rates[b, 0]
        step_size = T(corrected * rates[b, 0])
        keep = T(1 - rate * rates[b, 1] if decoupled else 1.0)
        decay = T(0.0 if decoupled else rates[b, 1])
        start, stop = blocks[b, 0], blocks[b, 1]
        adam_block(
            theta[start:stop], grad[start:stop], m[start:stop], v[start:stop], step_size, root_scale, keep, decay,
            b1, b2, a1, a2, e, tiny,
        )  # fmt: skip
    step[0] = t


@device_function
def rmsprop_block(theta, grad, v, mean, velocity, rate, decay, keep, gain, mu, e, centered, tiny):
    T = theta.dtype.type
    for i in range(theta.size):
        g = grad[i] + decay * theta[i]
        square = flush_denormal(keep * v[i] + gain * g * g, tiny)
        v[i] = square
        if centered:
            average = flush_denormal(mean[i] + gain * (g - mean[i]), tiny)
            mean[i] = average
            square = square - average * average
        change = g / (T(math.sqrt(square)) + e)
        if mu > 0:
            change = flush_denormal(mu * velocity[i] + change, tiny)
            velocity[i] = change
        theta[i] -= rate * change


@parameter_kernel
def rmsprop(theta, grad, v, mean, velocity, lr_schedule, step, blocks, rates, alpha, eps, momentum, centered):
    """torch's: v = alpha*v + (1 - alpha)*g^2, theta -= lr*g / (sqrt(v) + eps); if `centered` v - mean^2 in place of v.

    v, mean: moving averages of g^2 and, if `centered`, of g   velocity: used if momentum > 0
    blocks, rates: see `parameter_blocks`
    """
    t, T = step[0], theta.dtype.type
    lr = lr_schedule[min(t, lr_schedule.size - 1)]
    keep, gain, mu, e, tiny = T(alpha), T(1 - alpha), T(momentum), T(eps), np.finfo(theta.dtype).tiny
    for b in prange(len(blocks)):
        rate, decay = T(lr * rates[b, 0]), T(rates[b, 1])
        start, stop = blocks[b, 0], blocks[b, 1]
        rmsprop_block(
            theta[start:stop], grad[start:stop], v[start:stop], mean[start:stop], velocity[start:stop], rate, decay,
            keep, gain, mu, e, centered, tiny,
        )  # fmt: skip
    step[0] = t + 1


@parameter_kernel
def clip_grad_norm(grad, norm, partials, blocks, max_norm):
    """Scale grad by min(1, max_norm / (norm + 1e-6)), norm = sqrt(sum of grad^2), over the blocks (torch's).

    norm: (1,)   partials: (B,)   blocks: (B, 2), see `parameter_blocks`
    """
    T = grad.dtype.type
    for b in prange(len(blocks)):
        g, total = grad[blocks[b, 0] : blocks[b, 1]], T(0)
        for i in range(g.size):
            total += g[i] * g[i]
        partials[b] = total
    total = T(0)
    for b in range(len(blocks)):
        total += partials[b]
    norm[0] = math.sqrt(total)
    factor = T(max_norm) / (norm[0] + T(1e-6))
    if not factor >= T(1):  # NaN too
        for b in prange(len(blocks)):
            g = grad[blocks[b, 0] : blocks[b, 1]]
            for i in range(g.size):
                g[i] *= factor


@parameter_kernel
def clip_grad_value(grad, value):
    """Clamp grad to [-value, value].  grad: (P,)"""
    limit = grad.dtype.type(value)
    for i in prange(grad.size):
        g = limit if grad[i] > limit else grad[i]
        grad[i] = -limit if g < -limit else g


@parameter_kernel
def ema_update(average, theta, step, decay):
    """average = decay*average + (1 - decay)*theta, as torch's get_ema_multi_avg_fn; average = theta if step[0] = 0.

    average: (P,)
    """
    keep, gain, first = theta.dtype.type(decay), theta.dtype.type(1 - decay), step[0] == 0
    for i in prange(theta.size):
        average[i] = theta[i] if first else keep * average[i] + gain * theta[i]
    step[0] += 1
