"""Optimizers: one thread per parameter.  GPU version of tinycnn/kernels/optim.py.

Kernels read the step number and the learning rates from device memory, so that a captured step can be replayed.  All
threads read the step number; the last block increments it.
"""

import math

import numpy as np

from tinycnn.cuda._launch import THREADS, blocks, cuda, device_function, kernel, phase, to_device, workspace
from tinycnn.cuda.reduce import PARTIALS, block_reduce, is_last_block, reduce


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


@device_function
def increment_after(tid, step, counter, flag):
    """Increment the step number after all blocks have read it.

    counter: see `step_counter`   flag: (1,) uint32, shared
    """
    if is_last_block(tid, counter, 0, cuda.gridDim.x, flag):
        increment_phase(tid, 0, step)


def step_counter():
    """The counter of blocks that `increment_after` needs."""
    return workspace(1, np.uint32, "blocks of an optimizer")


def parameter_blocks(ranges, dtype):
    """(blocks, rates) of ranges (start, stop, lr_scale, weight_decay): one block of THREADS parameters per block of
    threads, and an empty one if there are no ranges.  blocks: (B, 2) int64   rates: (B, 2) of `dtype`"""
    rows = [(a, min(a + THREADS, stop), *rates) for start, stop, *rates in ranges for a in range(start, stop, THREADS)]
    rows = rows or [(0, 0, 0, 0)]  # a step counts without parameters, too
    table = np.array(rows, np.float64)
    return to_device(table[:, :2].astype(np.int64)), to_device(table[:, 2:].astype(dtype))


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
    tid, nt, block, theta, grad, velocity, lr_schedule, step, blocks, rates, momentum, damping, use_velocity, nesterov
):
    i = blocks[block, 0] + tid
    if i < blocks[block, 1]:
        lr, grad_scale = learning_rate(lr_schedule, step[0]), theta.dtype.type(1) if step[0] == 0 else damping
        lr *= rates[block, 0]
        g = grad[i] + rates[block, 1] * theta[i]
        if use_velocity:
            v = momentum * velocity[i] + grad_scale * g
            velocity[i] = v
            g = g + momentum * v if nesterov else v
        theta[i] -= lr * g


@kernel(THREADS, registers=40)
def sgd_kernel(
    theta, grad, velocity, lr_schedule, step, counter, blocks, rates, momentum, damping, use_velocity, nesterov
):  # fmt: skip
    flag = cuda.shared.array(1, np.uint32)
    sgd_phase(
        cuda.threadIdx.x, THREADS, cuda.blockIdx.x, theta, grad, velocity, lr_schedule, step, blocks, rates, momentum,
        damping, use_velocity, nesterov,
    )  # fmt: skip
    increment_after(cuda.threadIdx.x, step, counter, flag)


def sgd(theta, grad, velocity, lr_schedule, step, blocks, rates, momentum, dampening, nesterov):
    """torch's: g = grad + weight_decay*theta, v = momentum*v + (1 - dampening)*g (at first v = g), theta -= lr*v."""
    T = theta.dtype.type
    sgd_kernel[len(blocks)](
        theta, grad, velocity, lr_schedule, step, step_counter(), blocks, rates, T(momentum), T(1 - dampening),
        momentum != 0, nesterov,
    )  # fmt: skip


@phase
def sgd_per_parameter_phase(tid, nt, first, theta, grad, step_sizes):
    i = first + tid
    if i < theta.size:
        theta[i] -= step_sizes[i] * grad[i]


@kernel(THREADS, registers=32)
def sgd_per_parameter_kernel(theta, grad, step_sizes, step, counter):
    flag = cuda.shared.array(1, np.uint32)
    sgd_per_parameter_phase(cuda.threadIdx.x, THREADS, cuda.blockIdx.x * THREADS, theta, grad, step_sizes)
    increment_after(cuda.threadIdx.x, step, counter, flag)


def sgd_per_parameter(theta, grad, step_sizes, step):
    """theta[i] -= step_sizes[i] * grad[i]: a learning rate for every parameter.  step_sizes: (P,)"""
    sgd_per_parameter_kernel[max(1, blocks(theta.size))](theta, grad, step_sizes, step, step_counter())


@phase
def adam_phase(
    tid, nt, block, theta, grad, m, v, lr_schedule, step, blocks, rates, b1, b2, a1, a2, log_b1, log_b2, eps, decoupled
):
    """1 - beta**t is computed as -expm1(t log(beta)), which is accurate in float32 for beta near 1."""
    i = blocks[block, 0] + tid
    if i < blocks[block, 1]:
        one = theta.dtype.type(1)
        lr, t = learning_rate(lr_schedule, step[0]) * rates[block, 0], theta.dtype.type(step[0] + 1)
        weight_decay = rates[block, 1]
        size = lr / -theta.dtype.type(math.expm1(t * log_b1))
        root = one / theta.dtype.type(math.sqrt(-math.expm1(t * log_b2)))
        g = grad[i] if decoupled else grad[i] + weight_decay * theta[i]
        keep = one - lr * weight_decay if decoupled else one
        mi = b1 * m[i] + a1 * g
        vi = b2 * v[i] + a2 * g * g
        m[i], v[i] = mi, vi
        theta[i] = theta[i] * keep - size * mi / (theta.dtype.type(math.sqrt(vi)) * root + eps)


@kernel(THREADS, registers=64)
def adam_kernel(
    theta, grad, m, v, lr_schedule, step, counter, blocks, rates, b1, b2, a1, a2, log_b1, log_b2, eps, decoupled
):  # fmt: skip
    flag = cuda.shared.array(1, np.uint32)
    adam_phase(
        cuda.threadIdx.x, THREADS, cuda.blockIdx.x, theta, grad, m, v, lr_schedule, step, blocks, rates, b1, b2, a1,
        a2, log_b1, log_b2, eps, decoupled,
    )  # fmt: skip
    increment_after(cuda.threadIdx.x, step, counter, flag)


def adam(theta, grad, m, v, lr_schedule, step, blocks, rates, beta1, beta2, eps, decoupled):
    """Adam (Kingma and Ba 2015); weight decay is added to the gradient, or shrinks theta if `decoupled` (AdamW)."""
    T = theta.dtype.type
    logs = [T(math.log(beta)) if beta > 0 else T("-inf") for beta in (beta1, beta2)]
    adam_kernel[len(blocks)](
        theta, grad, m, v, lr_schedule, step, step_counter(), blocks, rates, T(beta1), T(beta2), T(1 - beta1),
        T(1 - beta2), *logs, T(eps), decoupled,
    )  # fmt: skip


@phase
def rmsprop_phase(
    tid, nt, block, theta, grad, v, mean, velocity, lr_schedule, step, blocks, rates, alpha, complement, eps, momentum,
    centered,
):  # fmt: skip
    i = blocks[block, 0] + tid
    if i < blocks[block, 1]:
        g = grad[i] + rates[block, 1] * theta[i]
        square = alpha * v[i] + complement * g * g
        v[i] = square
        if centered:
            average = mean[i] + complement * (g - mean[i])
            mean[i] = average
            square = square - average * average
        change = g / (theta.dtype.type(math.sqrt(square)) + eps)
        if momentum > theta.dtype.type(0):
            change = momentum * velocity[i] + change
            velocity[i] = change
        theta[i] -= learning_rate(lr_schedule, step[0]) * rates[block, 0] * change


@kernel(THREADS, registers=64)
def rmsprop_kernel(
    theta, grad, v, mean, velocity, lr_schedule, step, counter, blocks, rates, alpha, complement, eps, momentum,
    centered,
):  # fmt: skip
    flag = cuda.shared.array(1, np.uint32)
    rmsprop_phase(
        cuda.threadIdx.x, THREADS, cuda.blockIdx.x, theta, grad, v, mean, velocity, lr_schedule, step, blocks, rates,
        alpha, complement, eps, momentum, centered,
    )  # fmt: skip
    increment_after(cuda.threadIdx.x, step, counter, flag)


def rmsprop(theta, grad, v, mean, velocity, lr_schedule, step, blocks, rates, alpha, eps, momentum, centered):
    """torch's: v = alpha*v + (1 - alpha)*g^2, theta -= lr*g / (sqrt(v) + eps); if `centered` v - mean^2 in place of
    v."""
    T = theta.dtype.type
    rmsprop_kernel[len(blocks)](
        theta, grad, v, mean, velocity, lr_schedule, step, step_counter(), blocks, rates, T(alpha), T(1 - alpha),
        T(eps), T(momentum), centered,
    )  # fmt: skip


@phase
def sum_squares(tid, nt, block, values, grad, blocks):
    i = blocks[block, 0] + tid
    values[tid] = grad[i] * grad[i] if i < blocks[block, 1] else grad.dtype.type(0)


@phase
def store_partial(tid, nt, block, partials, block_partials):
    if tid == 0:
        partials[block] = reduce(block_partials)


@kernel(THREADS, registers=32)
def square_sums_kernel(partials, grad, blocks):
    values = cuda.shared.array(THREADS, grad.dtype)
    block_partials = cuda.shared.array(PARTIALS, grad.dtype)
    tid = cuda.threadIdx.x
    sum_squares(tid, THREADS, cuda.blockIdx.x, values, grad, blocks)
    cuda.syncthreads()
    block_reduce(tid, THREADS, block_partials, values)
    cuda.syncthreads()
    store_partial(tid, THREADS, cuda.blockIdx.x, partials, block_partials)


@phase
def sum_partials(tid, nt, values, partials):
    total = partials.dtype.type(0)
    for b in range(tid, partials.size, nt):
        total += partials[b]
    values[tid] = total


@phase
def scale_grad(tid, nt, block, grad, norm, block_partials, blocks, max_norm, eps):
    total = grad.dtype.type(math.sqrt(reduce(block_partials)))
    if block == 0 and tid == 0:
        norm[0] = total
    factor, one = max_norm / (total + eps), grad.dtype.type(1)
    i = blocks[block, 0] + tid
    if i < blocks[block, 1]:
        grad[i] *= one if factor >= one else factor


@kernel(THREADS, registers=40)
def scale_grad_kernel(grad, norm, partials, blocks, max_norm, eps):
    """Every block adds up all partial sums in the same order, then scales its own parameters."""
    values = cuda.shared.array(THREADS, grad.dtype)
    block_partials = cuda.shared.array(PARTIALS, grad.dtype)
    tid = cuda.threadIdx.x
    sum_partials(tid, THREADS, values, partials)
    cuda.syncthreads()
    block_reduce(tid, THREADS, block_partials, values)
    cuda.syncthreads()
    scale_grad(tid, THREADS, cuda.blockIdx.x, grad, norm, block_partials, blocks, max_norm, eps)


def clip_grad_norm(grad, norm, partials, blocks, max_norm):
    """Scale grad by min(1, max_norm / (norm + 1e-6)), norm = sqrt(sum of grad^2), over the blocks (torch's).

    norm: (1,)   partials: (B,)   blocks: (B, 2), see `parameter_blocks`
    """
    T = grad.dtype.type
    square_sums_kernel[len(blocks)](partials, grad, blocks)
    scale_grad_kernel[len(blocks)](grad, norm, partials, blocks, T(max_norm), T(1e-6))


@phase
def clip_grad_value_phase(tid, nt, first, grad, limit):
    i = first + tid
    if i < grad.size:
        g = limit if grad[i] > limit else grad[i]
        grad[i] = -limit if g < -limit else g


@kernel(THREADS, registers=32)
def clip_grad_value_kernel(grad, limit):
    clip_grad_value_phase(cuda.threadIdx.x, THREADS, cuda.blockIdx.x * THREADS, grad, limit)


def clip_grad_value(grad, value):
    """Clamp grad to [-value, value].  grad: (P,)"""
    clip_grad_value_kernel[blocks(grad.size)](grad, grad.dtype.type(value))


@phase
def ema_update_phase(tid, nt, first, average, theta, step, decay, complement):
    i = first + tid
    if i < theta.size:
        average[i] = theta[i] if step[0] == 0 else decay * average[i] + complement * theta[i]


@kernel(THREADS, registers=32)
def ema_update_kernel(average, theta, step, counter, decay, complement):
    flag = cuda.shared.array(1, np.uint32)
    ema_update_phase(cuda.threadIdx.x, THREADS, cuda.blockIdx.x * THREADS, average, theta, step, decay, complement)
    increment_after(cuda.threadIdx.x, step, counter, flag)


def ema_update(average, theta, step, decay):
    """average = decay*average + (1 - decay)*theta; average = theta if step[0] = 0.  average: (P,)"""
    T = theta.dtype.type
    ema_update_kernel[max(1, blocks(theta.size))](average, theta, step, step_counter(), T(decay), T(1 - decay))
