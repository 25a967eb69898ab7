"""Activations, a thread an element: y = f(x) and dx = f'(x) * dy.  Twin of tinycnn/kernels/activations.py.

softmax and log_softmax work on the rows of (R, K) arrays, a thread a row.
"""

import math

from tinycnn import scalars
from tinycnn.cuda._launch import THREADS, blocks, cuda, device_function, kernel, overload_by_dtype, phase, ravel

tanh = overload_by_dtype(scalars.tanh32, scalars.tanh64)
sigmoid = overload_by_dtype(scalars.sigmoid32, scalars.sigmoid64)


@phase
def tanh_forward_phase(tid, nt, first, y, x):
    i = first + tid
    if i < y.size:
        y[i] = tanh(x[i])


@kernel(THREADS, registers=32)
def tanh_forward_kernel(y, x):
    tanh_forward_phase(cuda.threadIdx.x, THREADS, cuda.blockIdx.x * THREADS, y, x)


def tanh_forward(y, x):
    tanh_forward_kernel[blocks(y.size)](ravel(y), ravel(x))


@phase
def tanh_backward_phase(tid, nt, first, dx, dy, y):
    i = first + tid
    if i < dx.size:
        dx[i] = dy[i] - dy[i] * y[i] * y[i]


@kernel(THREADS, registers=32)
def tanh_backward_kernel(dx, dy, y):
    tanh_backward_phase(cuda.threadIdx.x, THREADS, cuda.blockIdx.x * THREADS, dx, dy, y)


def tanh_backward(dx, dy, y):
    tanh_backward_kernel[blocks(dx.size)](ravel(dx), ravel(dy), ravel(y))


@phase
def scaled_tanh_forward_phase(tid, nt, first, y, x, a, s):
    i = first + tid
    if i < y.size:
        y[i] = a * tanh(s * x[i])


@kernel(THREADS, registers=32)
def scaled_tanh_forward_kernel(y, x, a, s):
    scaled_tanh_forward_phase(cuda.threadIdx.x, THREADS, cuda.blockIdx.x * THREADS, y, x, a, s)


def scaled_tanh_forward(y, x, A, S):
    """y = A tanh(S x); 1.7159 and 2/3 in LeCun et al. 1998, appendix A."""
    scaled_tanh_forward_kernel[blocks(y.size)](ravel(y), ravel(x), y.dtype.type(A), y.dtype.type(S))


@phase
def scaled_tanh_backward_phase(tid, nt, first, dx, dy, y, at_zero, fall):
    i = first + tid
    if i < dx.size:
        dx[i] = dy[i] * (at_zero - fall * y[i] * y[i])


@kernel(THREADS, registers=32)
def scaled_tanh_backward_kernel(dx, dy, y, at_zero, fall):
    scaled_tanh_backward_phase(cuda.threadIdx.x, THREADS, cuda.blockIdx.x * THREADS, dx, dy, y, at_zero, fall)


def scaled_tanh_backward(dx, dy, y, A, S):
    scaled_tanh_backward_kernel[blocks(dx.size)](
        ravel(dx), ravel(dy), ravel(y), y.dtype.type(A * S), y.dtype.type(S / A)
    )


@phase
def sigmoid_forward_phase(tid, nt, first, y, x):
    i = first + tid
    if i < y.size:
        y[i] = sigmoid(x[i])


@kernel(THREADS, registers=32)
def sigmoid_forward_kernel(y, x):
    sigmoid_forward_phase(cuda.threadIdx.x, THREADS, cuda.blockIdx.x * THREADS, y, x)


def sigmoid_forward(y, x):
    sigmoid_forward_kernel[blocks(y.size)](ravel(y), ravel(x))


@phase
def sigmoid_backward_phase(tid, nt, first, dx, dy, y):
    i = first + tid
    if i < dx.size:
        dx[i] = dy[i] * (y[i] - y[i] * y[i])


@kernel(THREADS, registers=32)
def sigmoid_backward_kernel(dx, dy, y):
    sigmoid_backward_phase(cuda.threadIdx.x, THREADS, cuda.blockIdx.x * THREADS, dx, dy, y)


def sigmoid_backward(dx, dy, y):
    sigmoid_backward_kernel[blocks(dx.size)](ravel(dx), ravel(dy), ravel(y))


@phase
def gaussian_forward_phase(tid, nt, first, y, x, slope):
    i = first + tid
    if i < y.size:
        y[i] = y.dtype.type(math.exp(slope * x[i]))


@kernel(THREADS, registers=32)
def gaussian_forward_kernel(y, x, slope):
    gaussian_forward_phase(cuda.threadIdx.x, THREADS, cuda.blockIdx.x * THREADS, y, x, slope)


def gaussian_forward(y, x):
    """y = exp(-x/2), of squared distances x."""
    gaussian_forward_kernel[blocks(y.size)](ravel(y), ravel(x), y.dtype.type(-0.5))


@phase
def gaussian_backward_phase(tid, nt, first, dx, dy, y, slope):
    i = first + tid
    if i < dx.size:
        dx[i] = slope * y[i] * dy[i]


@kernel(THREADS, registers=32)
def gaussian_backward_kernel(dx, dy, y, slope):
    gaussian_backward_phase(cuda.threadIdx.x, THREADS, cuda.blockIdx.x * THREADS, dx, dy, y, slope)


def gaussian_backward(dx, dy, y):
    gaussian_backward_kernel[blocks(dx.size)](ravel(dx), ravel(dy), ravel(y), y.dtype.type(-0.5))


@phase
def relu_forward_phase(tid, nt, first, y, x):
    i = first + tid
    if i < y.size:
        y[i] = x.dtype.type(0) if x[i] <= x.dtype.type(0) else x[i]  # written so that NaN stays NaN


@kernel(THREADS, registers=32)
def relu_forward_kernel(y, x):
    relu_forward_phase(cuda.threadIdx.x, THREADS, cuda.blockIdx.x * THREADS, y, x)


def relu_forward(y, x):
    relu_forward_kernel[blocks(y.size)](ravel(y), ravel(x))


@phase
def relu_backward_phase(tid, nt, first, dx, dy, y):
    i = first + tid
    if i < dx.size:
        dx[i] = y.dtype.type(0) if y[i] <= y.dtype.type(0) else dy[i]


@kernel(THREADS, registers=32)
def relu_backward_kernel(dx, dy, y):
    relu_backward_phase(cuda.threadIdx.x, THREADS, cuda.blockIdx.x * THREADS, dx, dy, y)


def relu_backward(dx, dy, y):
    relu_backward_kernel[blocks(dx.size)](ravel(dx), ravel(dy), ravel(y))


@phase
def leaky_relu_forward_phase(tid, nt, first, y, x, slope):
    i = first + tid
    if i < y.size:
        y[i] = slope * x[i] if x[i] <= x.dtype.type(0) else x[i]


@kernel(THREADS, registers=32)
def leaky_relu_forward_kernel(y, x, slope):
    leaky_relu_forward_phase(cuda.threadIdx.x, THREADS, cuda.blockIdx.x * THREADS, y, x, slope)


def leaky_relu_forward(y, x, negative_slope):
    leaky_relu_forward_kernel[blocks(y.size)](ravel(y), ravel(x), x.dtype.type(negative_slope))


@phase
def leaky_relu_backward_phase(tid, nt, first, dx, dy, x, slope):
    i = first + tid
    if i < dx.size:
        dx[i] = slope * dy[i] if x[i] <= x.dtype.type(0) else dy[i]


@kernel(THREADS, registers=32)
def leaky_relu_backward_kernel(dx, dy, x, slope):
    leaky_relu_backward_phase(cuda.threadIdx.x, THREADS, cuda.blockIdx.x * THREADS, dx, dy, x, slope)


def leaky_relu_backward(dx, dy, x, negative_slope):
    leaky_relu_backward_kernel[blocks(dx.size)](ravel(dx), ravel(dy), ravel(x), x.dtype.type(negative_slope))


@device_function
def top_of(x, at, K):
    """The largest number of a row; NaN if there is one."""
    top = x[at]
    for k in range(at + 1, at + K):
        top = x[k] if x[k] > top or x[k] != x[k] else top
    return top


@phase
def softmax_forward_phase(tid, nt, first, y, x, K):
    at = (first + tid) * K
    if at < y.size:
        top, total = top_of(x, at, K), x.dtype.type(0)
        for k in range(at, at + K):
            e = x.dtype.type(math.exp(x[k] - top))
            y[k] = e
            total += e
        for k in range(at, at + K):
            y[k] = y[k] / total


@kernel(THREADS, registers=48)
def softmax_forward_kernel(y, x, K):
    softmax_forward_phase(cuda.threadIdx.x, THREADS, cuda.blockIdx.x * THREADS, y, x, K)


def softmax_forward(y, x):
    """y[r] = exp(x[r]) / sum(exp(x[r])) for every row r; x, y: (R, K)"""
    softmax_forward_kernel[blocks(len(y))](ravel(y), ravel(x), y.shape[1])


@phase
def softmax_backward_phase(tid, nt, first, dx, dy, y, K):
    at = (first + tid) * K
    if at < dx.size:
        total = y.dtype.type(0)
        for k in range(at, at + K):
            total += dy[k] * y[k]
        for k in range(at, at + K):
            dx[k] = y[k] * (dy[k] - total)


@kernel(THREADS, registers=48)
def softmax_backward_kernel(dx, dy, y, K):
    softmax_backward_phase(cuda.threadIdx.x, THREADS, cuda.blockIdx.x * THREADS, dx, dy, y, K)


def softmax_backward(dx, dy, y):
    """dx = y * (dy - sum(dy * y)), row by row."""
    softmax_backward_kernel[blocks(len(dx))](ravel(dx), ravel(dy), ravel(y), dx.shape[1])


@phase
def log_softmax_forward_phase(tid, nt, first, y, x, K):
    at = (first + tid) * K
    if at < y.size:
        top, total = top_of(x, at, K), x.dtype.type(0)
        for k in range(at, at + K):
            total += x.dtype.type(math.exp(x[k] - top))
        log_total = x.dtype.type(math.log(total))
        for k in range(at, at + K):
            y[k] = (x[k] - top) - log_total


@kernel(THREADS, registers=48)
def log_softmax_forward_kernel(y, x, K):
    log_softmax_forward_phase(cuda.threadIdx.x, THREADS, cuda.blockIdx.x * THREADS, y, x, K)


def log_softmax_forward(y, x):
    """y[r] = x[r] - log(sum(exp(x[r]))) for every row r; x, y: (R, K)"""
    log_softmax_forward_kernel[blocks(len(y))](ravel(y), ravel(x), y.shape[1])


@phase
def log_softmax_backward_phase(tid, nt, first, dx, dy, y, K):
    at = (first + tid) * K
    if at < dx.size:
        total = y.dtype.type(0)
        for k in range(at, at + K):
            total += dy[k]
        for k in range(at, at + K):
            dx[k] = dy[k] - y.dtype.type(math.exp(y[k])) * total


@kernel(THREADS, registers=48)
def log_softmax_backward_kernel(dx, dy, y, K):
    log_softmax_backward_phase(cuda.threadIdx.x, THREADS, cuda.blockIdx.x * THREADS, dx, dy, y, K)


def log_softmax_backward(dx, dy, y):
    """dx = dy - exp(y) * sum(dy), row by row."""
    log_softmax_backward_kernel[blocks(len(dx))](ravel(dx), ravel(dy), ravel(y), dx.shape[1])
