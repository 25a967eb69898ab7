"""Optimizers: one pass over the flat parameter vector.

theta, grad and the optimizer's state: (P,).  lr_schedule: the learning rate of every step; the last one is kept.
step: (1,) int64, the number of steps taken, incremented here.  On a GPU both are in device memory, where a captured
step can read them.
"""

import math

import numpy as np
from numba import prange

from tinycnn.kernels._jit import device_function, parameter_kernel, serial_kernel

# Averages of gradients that have stopped coming, a dead ReLU's say, shrink until they are denormal numbers, of which
# processors are a hundred times slower.  Nothing above those may go: the weights that weight decay leaves of a net that
# nothing reaches are as small, and later grow again.


@device_function
def or_zero(average, least):
    return average - average if abs(average) < least else average


@serial_kernel
def increment(step):
    """step[0] += 1; step: (1,) int64"""
    step[0] += 1


@parameter_kernel
def sgd(theta, grad, velocity, lr_schedule, step, momentum, dampening, weight_decay, nesterov):
    """torch's: g = grad + weight_decay*theta, v = momentum*v + (1 - dampening)*g (at first v = g), theta -= lr*v."""
    t = step[0]
    lr = theta.dtype.type(lr_schedule[min(t, lr_schedule.size - 1)])
    mu, decay = theta.dtype.type(momentum), theta.dtype.type(weight_decay)
    fresh = theta.dtype.type(1.0 if t == 0 else 1.0 - dampening)
    if momentum == 0:
        for i in prange(theta.size):
            theta[i] -= lr * (grad[i] + decay * theta[i])
    else:
        least = np.finfo(theta.dtype).tiny
        for i in prange(theta.size):
            g = grad[i] + decay * theta[i]
            v = or_zero(mu * velocity[i] + fresh * g, least)
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
    """Adam (Kingma and Ba 2015); weight decay is added to the gradient, or taken off theta if `decoupled` (AdamW)."""
    t = step[0] + 1
    T = theta.dtype.type
    lr = lr_schedule[min(t - 1, lr_schedule.size - 1)]
    size = T(lr / (1 - beta1**t))
    root = T(1 / math.sqrt(1 - beta2**t))
    keep = T(1 - lr * weight_decay if decoupled else 1.0)
    decay = T(0.0 if decoupled else weight_decay)
    b1, b2, a1, a2, e, least = T(beta1), T(beta2), T(1 - beta1), T(1 - beta2), T(eps), np.finfo(theta.dtype).tiny
    for i in prange(theta.size):
        g = grad[i] + decay * theta[i]
        mi, vi = or_zero(b1 * m[i] + a1 * g, least), or_zero(b2 * v[i] + a2 * g * g, least)
        m[i], v[i] = mi, vi
        theta[i] = theta[i] * keep - size * mi / (T(math.sqrt(vi)) * root + e)
    step[0] = t


@parameter_kernel
def ema_update(average, theta, step, decay):
    """average = decay*average + (1 - decay)*theta, as torch's get_ema_multi_avg_fn; the first time (step[0] = 0)
    average = theta.  average: (P,)"""
    keep, share, first = theta.dtype.type(decay), theta.dtype.type(1 - decay), step[0] == 0
    for i in prange(theta.size):
        average[i] = theta[i] if first else keep * average[i] + share * theta[i]
    step[0] += 1
