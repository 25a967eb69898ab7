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


@parameter_kernel
def accumulate_grad(total, grad, scale, first):
    """total = scale*grad if `first`, else total + scale*grad.  total, grad: (P,)"""
    s = total.dtype.type(scale)
    for i in prange(total.size):
        total[i] = s * grad[i] if first else total[i] + s * grad[i]


@parameter_kernel
def sgd(theta, grad, velocity, lr_schedule, step, momentum, dampening, weight_decay, nesterov):
    """torch's: g = grad + weight_decay*theta, v = momentum*v + (1 - dampening)*g (at first v = g), theta -= lr*v."""
    t = step[0]
    lr = theta.dtype.type(lr_schedule[min(t, lr_schedule.size - 1)])
    mu, decay = theta.dtype.type(momentum), theta.dtype.type(weight_decay)
    gain = theta.dtype.type(1.0 if t == 0 else 1.0 - dampening)
    if momentum == 0:
        for i in prange(theta.size):
            theta[i] -= lr * (grad[i] + decay * theta[i])
    else:
        tiny = np.finfo(theta.dtype).tiny
        for i in prange(theta.size):
            g = grad[i] + decay * theta[i]
            v = flush_denormal(mu * velocity[i] + gain * g, tiny)
            velocity[i] = v
            theta[i] -= lr * (g + mu * v if nesterov else v)
    step[0] = t + 1


@parameter_kernel
def sgd_per_parameter(theta, grad, step_sizes, step):
    """theta[i] -= step_sizes[i] * grad[i]: a learning rate for every parameter.  step_sizes: (P,)"""
    for i in prange(theta.size):
        theta[i] -= step_sizes[i] * grad[i]
    step[0] += 1


@parameter_kernel
def adam(theta, grad, m, v, lr_schedule, step, beta1, beta2, eps, weight_decay, decoupled):
    """Adam (Kingma and Ba 2015).  Weight decay is added to the gradient; if `decoupled`, theta is scaled (AdamW)."""
    t = step[0] + 1
    T = theta.dtype.type
    lr = lr_schedule[min(t - 1, lr_schedule.size - 1)]
    step_size = T(lr / (1 - beta1**t))
    root_scale = T(1 / math.sqrt(1 - beta2**t))
    keep = T(1 - lr * weight_decay if decoupled else 1.0)
    decay = T(0.0 if decoupled else weight_decay)
    b1, b2, a1, a2, e, tiny = T(beta1), T(beta2), T(1 - beta1), T(1 - beta2), T(eps), np.finfo(theta.dtype).tiny
    for i in prange(theta.size):
        g = grad[i] + decay * theta[i]
        mi, vi = flush_denormal(b1 * m[i] + a1 * g, tiny), flush_denormal(b2 * v[i] + a2 * g * g, tiny)
        m[i], v[i] = mi, vi
        theta[i] = theta[i] * keep - step_size * mi / (T(math.sqrt(vi)) * root_scale + e)
    step[0] = t


@parameter_kernel
def ema_update(average, theta, step, decay):
    """average = decay*average + (1 - decay)*theta, as torch's get_ema_multi_avg_fn; average = theta if step[0] = 0.

    average: (P,)
    """
    keep, gain, first = theta.dtype.type(decay), theta.dtype.type(1 - decay), step[0] == 0
    for i in prange(theta.size):
        average[i] = theta[i] if first else keep * average[i] + gain * theta[i]
    step[0] += 1
