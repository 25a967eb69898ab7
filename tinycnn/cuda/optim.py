"""Optimizers: one thread per parameter.  GPU version of tinycnn/kernels/optim.py.

Kernels read the step number and the learning rates from device memory, so that a captured step can be replayed.  Since
all threads read the step number, a separate kernel increments it.
"""

import math

from tinycnn.cuda._launch import THREADS, blocks, cuda, device_function, kernel, phase


@device_function
def learning_rate(lr_schedule, t):
    """The learning rate of step t (from 0)."""
    return lr_schedule[min(t, lr_schedule.size - 1)]


@phase
def increment_phase(tid, nt, step):
    if tid == 0:
        step[0] += 1


@kernel(32, registers=16)
def increment_kernel(step):
    increment_phase(cuda.threadIdx.x, 32, step)


def increment(step):
    """step[0] += 1; step: (1,) int64"""
    increment_kernel[1](step)


@phase
def accumulate_grad_phase(tid, nt, first_index, total, grad, scale, first):
    i = first_index + tid
    if i < total.size:
        total[i] = scale * grad[i] if first else total[i] + scale * grad[i]


@kernel(THREADS, registers=32)
def accumulate_grad_kernel(total, grad, scale, first):
    accumulate_grad_phase(cuda.threadIdx.x, THREADS, cuda.blockIdx.x * THREADS, total, grad, scale, first)


def accumulate_grad(total, grad, scale, first):
    """total = scale*grad if `first`, else total + scale*grad.  total, grad: (P,)"""
    accumulate_grad_kernel[blocks(total.size)](total, grad, total.dtype.type(scale), first)


@phase
def sgd_phase(
    tid, nt, first, theta, grad, velocity, lr_schedule, step, momentum, damping, weight_decay, use_velocity, nesterov
):
    i = first + tid
    if i < theta.size:
        lr, grad_scale = learning_rate(lr_schedule, step[0]), theta.dtype.type(1) if step[0] == 0 else damping
        g = grad[i] + weight_decay * theta[i]
        if use_velocity:
            v = momentum * velocity[i] + grad_scale * g
            velocity[i] = v
            g = g + momentum * v if nesterov else v
        theta[i] -= lr * g


@kernel(THREADS, registers=32)
def sgd_kernel(theta, grad, velocity, lr_schedule, step, momentum, damping, weight_decay, use_velocity, nesterov):
    first = cuda.blockIdx.x * THREADS
    sgd_phase(
        cuda.threadIdx.x, THREADS, first, theta, grad, velocity, lr_schedule, step, momentum, damping, weight_decay,
        use_velocity, nesterov,
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
def sgd_per_parameter_phase(tid, nt, first, theta, grad, step_sizes):
    i = first + tid
    if i < theta.size:
        theta[i] -= step_sizes[i] * grad[i]


@kernel(THREADS, registers=32)
def sgd_per_parameter_kernel(theta, grad, step_sizes):
    sgd_per_parameter_phase(cuda.threadIdx.x, THREADS, cuda.blockIdx.x * THREADS, theta, grad, step_sizes)


def sgd_per_parameter(theta, grad, step_sizes, step):
    """theta[i] -= step_sizes[i] * grad[i]: a learning rate for every parameter.  step_sizes: (P,)"""
    sgd_per_parameter_kernel[blocks(theta.size)](theta, grad, step_sizes)
    increment(step)


@phase
def adam_phase(
    tid, nt, first, theta, grad, m, v, lr_schedule, step, b1, b2, a1, a2, log_b1, log_b2, eps, weight_decay, decoupled
):
    """1 - beta**t is computed as -expm1(t log(beta)), which is accurate in float32 for beta near 1."""
    i = first + tid
    if i < theta.size:
        one = theta.dtype.type(1)
        lr, t = learning_rate(lr_schedule, step[0]), theta.dtype.type(step[0] + 1)
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
    adam_phase(
        cuda.threadIdx.x, THREADS, first, theta, grad, m, v, lr_schedule, step, b1, b2, a1, a2, log_b1, log_b2, eps,
        weight_decay, decoupled,
    )  # fmt: skip


def adam(theta, grad, m, v, lr_schedule, step, beta1, beta2, eps, weight_decay, decoupled):
    """Adam (Kingma and Ba 2015); weight decay is added to the gradient, or shrinks theta if `decoupled` (AdamW)."""
    T = theta.dtype.type
    logs = [T(math.log(beta)) if beta > 0 else T("-inf") for beta in (beta1, beta2)]
    adam_kernel[blocks(theta.size)](
        theta, grad, m, v, lr_schedule, step, T(beta1), T(beta2), T(1 - beta1), T(1 - beta2), *logs, T(eps),
        T(weight_decay), decoupled,
    )  # fmt: skip
    increment(step)


@phase
def ema_update_phase(tid, nt, first, average, theta, step, decay, complement):
    i = first + tid
    if i < theta.size:
        average[i] = theta[i] if step[0] == 0 else decay * average[i] + complement * theta[i]


@kernel(THREADS, registers=32)
def ema_update_kernel(average, theta, step, decay, complement):
    ema_update_phase(cuda.threadIdx.x, THREADS, cuda.blockIdx.x * THREADS, average, theta, step, decay, complement)


def ema_update(average, theta, step, decay):
    """average = decay*average + (1 - decay)*theta; average = theta if step[0] = 0.  average: (P,)"""
    T = theta.dtype.type
    ema_update_kernel[blocks(theta.size)](average, theta, step, T(decay), T(1 - decay))
    increment(step)
