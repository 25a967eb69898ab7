"""Optimizers: one thread a parameter.  Twin of tinycnn/kernels/optim.py.

Step number and learning rates are read from device memory, so that a recorded step goes on by itself.  All threads read
the step number, so a kernel of its own advances it afterwards.
"""

import math

from tinycnn.cuda._launch import THREADS, blocks, cuda, device_function, kernel, phase


@device_function
def rate(lr_schedule, t):
    """The learning rate of step t (from 0)."""
    return lr_schedule[min(t, lr_schedule.size - 1)]


@phase
def count(tid, nt, step):
    if tid == 0:
        step[0] += 1


@kernel(32, registers=16)
def increment_kernel(step):
    count(cuda.threadIdx.x, 32, step)


def increment(step):
    """step[0] += 1; step: (1,) int64"""
    increment_kernel[1](step)


@phase
def descend(tid, nt, first, theta, grad, velocity, lr_schedule, step, momentum, damped, weight_decay, heavy, nesterov):
    i = first + tid
    if i < theta.size:
        lr, fresh = rate(lr_schedule, step[0]), theta.dtype.type(1) if step[0] == 0 else damped
        g = grad[i] + weight_decay * theta[i]
        if heavy:
            v = momentum * velocity[i] + fresh * g
            velocity[i] = v
            g = g + momentum * v if nesterov else v
        theta[i] -= lr * g


@kernel(THREADS, registers=32)
def sgd_kernel(theta, grad, velocity, lr_schedule, step, momentum, damped, weight_decay, heavy, nesterov):
    first = cuda.blockIdx.x * THREADS
    descend(
        cuda.threadIdx.x, THREADS, first, theta, grad, velocity, lr_schedule, step, momentum, damped, weight_decay,
        heavy, nesterov,
    )  # fmt: skip


def sgd(theta, grad, velocity, lr_schedule, step, momentum, dampening, weight_decay, nesterov):
    """torch's: g = grad + weight_decay*theta, v = momentum*v + (1 - dampening)*g (at first v = g), theta -= lr*v."""
    T = theta.dtype.type
    sgd_kernel[blocks(theta.size)](
        theta, grad, velocity, lr_schedule, step, T(momentum), T(1 - dampening), T(weight_decay), momentum != 0,
        nesterov,
    )  # fmt: skip
    increment(step)


@phase
def follow(tid, nt, first, theta, grad, step_sizes):
    i = first + tid
    if i < theta.size:
        theta[i] -= step_sizes[i] * grad[i]


@kernel(THREADS, registers=32)
def sgd_per_parameter_kernel(theta, grad, step_sizes):
    follow(cuda.threadIdx.x, THREADS, cuda.blockIdx.x * THREADS, theta, grad, step_sizes)


def sgd_per_parameter(theta, grad, step_sizes, step):
    """theta[i] -= step_sizes[i] * grad[i]: a learning rate for every parameter.  step_sizes: (P,)"""
    sgd_per_parameter_kernel[blocks(theta.size)](theta, grad, step_sizes)
    increment(step)


@phase
def adapt(
    tid, nt, first, theta, grad, m, v, lr_schedule, step, b1, b2, a1, a2, log_b1, log_b2, eps, weight_decay, decoupled
):
    """1 - beta**t is computed as -expm1(t log(beta)), which keeps its digits in float32 where beta is nearly 1."""
    i = first + tid
    if i < theta.size:
        one = theta.dtype.type(1)
        lr, t = rate(lr_schedule, step[0]), theta.dtype.type(step[0] + 1)
        size = lr / -theta.dtype.type(math.expm1(t * log_b1))
        root = one / theta.dtype.type(math.sqrt(-math.expm1(t * log_b2)))
        g = grad[i] if decoupled else grad[i] + weight_decay * theta[i]
        keep = one - lr * weight_decay if decoupled else one
        mi = b1 * m[i] + a1 * g
        vi = b2 * v[i] + a2 * g * g
        m[i], v[i] = mi, vi
        theta[i] = theta[i] * keep - size * mi / (theta.dtype.type(math.sqrt(vi)) * root + eps)


@kernel(THREADS, registers=64)
def adam_kernel(theta, grad, m, v, lr_schedule, step, b1, b2, a1, a2, log_b1, log_b2, eps, weight_decay, decoupled):
    first = cuda.blockIdx.x * THREADS
    adapt(
        cuda.threadIdx.x, THREADS, first, theta, grad, m, v, lr_schedule, step, b1, b2, a1, a2, log_b1, log_b2, eps,
        weight_decay, decoupled,
    )  # fmt: skip


def adam(theta, grad, m, v, lr_schedule, step, beta1, beta2, eps, weight_decay, decoupled):
    """Adam (Kingma and Ba 2015); weight decay is added to the gradient, or taken off theta if `decoupled` (AdamW)."""
    T = theta.dtype.type
    logs = [T(math.log(beta)) if beta > 0 else T("-inf") for beta in (beta1, beta2)]
    adam_kernel[blocks(theta.size)](
        theta, grad, m, v, lr_schedule, step, T(beta1), T(beta2), T(1 - beta1), T(1 - beta2), *logs, T(eps),
        T(weight_decay), decoupled,
    )  # fmt: skip
    increment(step)


@phase
def mix(tid, nt, first, average, theta, step, decay, share):
    i = first + tid
    if i < theta.size:
        average[i] = theta[i] if step[0] == 0 else decay * average[i] + share * theta[i]


@kernel(THREADS, registers=32)
def ema_update_kernel(average, theta, step, decay, share):
    mix(cuda.threadIdx.x, THREADS, cuda.blockIdx.x * THREADS, average, theta, step, decay, share)


def ema_update(average, theta, step, decay):
    """average = decay*average + (1 - decay)*theta; the first time (step[0] = 0) average = theta.  average: (P,)"""
    T = theta.dtype.type
    ema_update_kernel[blocks(theta.size)](average, theta, step, T(decay), T(1 - decay))
    increment(step)
