"""Activations, one thread per element: y = f(x) and dx = f'(x) * dy.  GPU version of tinycnn/kernels/activations.py.

Kernels of other files call `value` and `gradient` too, for an activation before or after them.

softmax and log_softmax work on the rows of (R, K) arrays, one thread per row.
"""

import math

from tinycnn import scalars
from tinycnn.cuda._launch import THREADS, blocks, cuda, device_function, kernel, overload_by_dtype, phase, ravel
from tinycnn.scalars import (
    ELU,
    GAUSSIAN,
    GELU,
    GELU_TANH,
    HARDTANH,
    LEAKY_RELU,
    RELU,
    SCALED_TANH,
    SIGMOID,
    SILU,
    SOFTPLUS,
    TANH,
)

exp = overload_by_dtype(scalars.exp32, scalars.exp64)
pairs = scalars.activations(device_function, overload_by_dtype)
tanh_value, tanh_gradient = pairs[TANH]
sigmoid_value, sigmoid_gradient = pairs[SIGMOID]
relu_value, relu_gradient = pairs[RELU]
scaled_tanh_value, scaled_tanh_gradient = pairs[SCALED_TANH]
leaky_relu_value, leaky_relu_gradient = pairs[LEAKY_RELU]
gaussian_value, gaussian_gradient = pairs[GAUSSIAN]
elu_value, elu_gradient = pairs[ELU]
gelu_value, gelu_gradient = pairs[GELU]
gelu_tanh_value, gelu_tanh_gradient = pairs[GELU_TANH]
silu_value, silu_gradient = pairs[SILU]
softplus_value, softplus_gradient = pairs[SOFTPLUS]
hardtanh_value, hardtanh_gradient = pairs[HARDTANH]


NONE = -1  # code of no activation
NO_ACTIVATION = scalars.activation(NONE)


@device_function
def value(code, x, a, b):
    """y = f(x)."""
    if code == LEAKY_RELU:
        return leaky_relu_value(x, a, b)
    if code == GELU:
        return gelu_value(x, a, b)
    if code == GELU_TANH:
        return gelu_tanh_value(x, a, b)
    if code == SILU:
        return silu_value(x, a, b)
    if code == SOFTPLUS:
        return softplus_value(x, a, b)
    return value_in_place(code, x, a, b)


@device_function
def value_in_place(code, x, a, b):
    """`value` of the activations that work in place, for fused kernels: less code."""
    if code == TANH:
        return tanh_value(x, a, b)
    if code == SIGMOID:
        return sigmoid_value(x, a, b)
    if code == RELU:
        return relu_value(x, a, b)
    if code == SCALED_TANH:
        return scaled_tanh_value(x, a, b)
    if code == GAUSSIAN:
        return gaussian_value(x, a, b)
    if code == ELU:
        return elu_value(x, a, b)
    if code == HARDTANH:
        return hardtanh_value(x, a, b)
    return x


@device_function
def gradient(code, dy, y, c, d):
    """dx = f'(x) * dy."""
    if code == LEAKY_RELU:
        return leaky_relu_gradient(dy, y, c, d)
    if code == GELU:
        return gelu_gradient(dy, y, c, d)
    if code == GELU_TANH:
        return gelu_tanh_gradient(dy, y, c, d)
    if code == SILU:
        return silu_gradient(dy, y, c, d)
    if code == SOFTPLUS:
        return softplus_gradient(dy, y, c, d)
    return gradient_in_place(code, dy, y, c, d)


@device_function
def gradient_in_place(code, dy, y, c, d):
    """`gradient` of the activations that work in place, for fused kernels: less code."""
    if code == TANH:
        return tanh_gradient(dy, y, c, d)
    if code == SIGMOID:
        return sigmoid_gradient(dy, y, c, d)
    if code == RELU:
        return relu_gradient(dy, y, c, d)
    if code == SCALED_TANH:
        return scaled_tanh_gradient(dy, y, c, d)
    if code == GAUSSIAN:
        return gaussian_gradient(dy, y, c, d)
    if code == ELU:
        return elu_gradient(dy, y, c, d)
    if code == HARDTANH:
        return hardtanh_gradient(dy, y, c, d)
    return dy


def value_arguments(activation, dtype):
    """(code, a, b) of `value` for arrays of a dtype."""
    code, a, b = activation
    return code, dtype.type(a), dtype.type(b)


def gradient_arguments(activation, dtype):
    """(code, c, d) of `gradient` for arrays of a dtype."""
    code, c, d = activation
    if code == SCALED_TANH:
        c, d = scalars.scaled_tanh_constants(c, d)
    return code, dtype.type(c), dtype.type(d)


@phase
def forward_phase(tid, nt, first, y, x, code, a, b):
    i = first + tid
    if i < y.size:
        y[i] = value(code, x[i], a, b)


@kernel(THREADS, registers=32)
def activation_forward_kernel(y, x, code, a, b):
    forward_phase(cuda.threadIdx.x, THREADS, cuda.blockIdx.x * THREADS, y, x, code, a, b)


def activation_forward(y, x, activation):
    """y = f(x); y may be x.  activation: see `scalars.activation`"""
    activation_forward_kernel[blocks(y.size)](ravel(y), ravel(x), *value_arguments(activation, y.dtype))


@phase
def backward_phase(tid, nt, first, dx, dy, y, code, c, d):
    i = first + tid
    if i < dx.size:
        dx[i] = gradient(code, dy[i], y[i], c, d)


@kernel(THREADS, registers=32)
def activation_backward_kernel(dx, dy, y, code, c, d):
    backward_phase(cuda.threadIdx.x, THREADS, cuda.blockIdx.x * THREADS, dx, dy, y, code, c, d)


def activation_backward(dx, dy, y, activation):
    """dx = f'(x) * dy; dx may be dy.  y: the output of activation_forward, or its input: see
    `scalars.activations`"""
    activation_backward_kernel[blocks(dx.size)](
        ravel(dx), ravel(dy), ravel(y), *gradient_arguments(activation, dx.dtype)
    )


@device_function
def row_max(x, start, K):
    """The largest number of a row; NaN if it contains NaN."""
    top = x[start]
    for k in range(start + 1, start + K):
        top = x[k] if x[k] > top or x[k] != x[k] else top
    return top


@phase
def softmax_forward_phase(tid, nt, first, y, x, K):
    start = (first + tid) * K
    if start < y.size:
        top, total = row_max(x, start, K), x.dtype.type(0)
        for k in range(start, start + K):
            e = exp(x[k] - top)
            y[k] = e
            total += e
        for k in range(start, start + K):
            y[k] = y[k] / total


@kernel(THREADS, registers=48)
def softmax_forward_kernel(y, x, K):
    softmax_forward_phase(cuda.threadIdx.x, THREADS, cuda.blockIdx.x * THREADS, y, x, K)


def softmax_forward(y, x):
    """y[r] = exp(x[r]) / sum(exp(x[r])) for every row r; x, y: (R, K)"""
    softmax_forward_kernel[blocks(len(y))](ravel(y), ravel(x), y.shape[1])


@phase
def softmax_backward_phase(tid, nt, first, dx, dy, y, K):
    start = (first + tid) * K
    if start < dx.size:
        total = y.dtype.type(0)
        for k in range(start, start + K):
            total += dy[k] * y[k]
        for k in range(start, start + K):
            dx[k] = y[k] * (dy[k] - total)


@kernel(THREADS, registers=48)
def softmax_backward_kernel(dx, dy, y, K):
    softmax_backward_phase(cuda.threadIdx.x, THREADS, cuda.blockIdx.x * THREADS, dx, dy, y, K)


def softmax_backward(dx, dy, y):
    """dx = y * (dy - sum(dy * y)), row by row."""
    softmax_backward_kernel[blocks(len(dx))](ravel(dx), ravel(dy), ravel(y), dx.shape[1])


@phase
def log_softmax_forward_phase(tid, nt, first, y, x, K):
    start = (first + tid) * K
    if start < y.size:
        top, total = row_max(x, start, K), x.dtype.type(0)
        for k in range(start, start + K):
            total += exp(x[k] - top)
        log_total = x.dtype.type(math.log(total))
        for k in range(start, start + K):
            y[k] = (x[k] - top) - log_total


@kernel(THREADS, registers=48)
def log_softmax_forward_kernel(y, x, K):
    log_softmax_forward_phase(cuda.threadIdx.x, THREADS, cuda.blockIdx.x * THREADS, y, x, K)


def log_softmax_forward(y, x):
    """y[r] = x[r] - log(sum(exp(x[r]))) for every row r; x, y: (R, K)"""
    log_softmax_forward_kernel[blocks(len(y))](ravel(y), ravel(x), y.shape[1])


@phase
def log_softmax_backward_phase(tid, nt, first, dx, dy, y, K):
    start = (first + tid) * K
    if start < dx.size:
        total = y.dtype.type(0)
        for k in range(start, start + K):
            total += dy[k]
        for k in range(start, start + K):
            dx[k] = dy[k] - exp(y[k]) * total


@kernel(THREADS, registers=48)
def log_softmax_backward_kernel(dx, dy, y, K):
    log_softmax_backward_phase(cuda.threadIdx.x, THREADS, cuda.blockIdx.x * THREADS, dx, dy, y, K)


def log_softmax_backward(dx, dy, y):
    """dx = dy - exp(y) * sum(dy), row by row."""
    log_softmax_backward_kernel[blocks(len(dx))](ravel(dx), ravel(dy), ravel(y), dx.shape[1])
