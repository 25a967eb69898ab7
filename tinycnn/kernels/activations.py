"""Activations: y = f(x) and dx = f'(x) * dy, element by element, and softmax over rows.

Element-wise activations are defined in tinycnn/scalars.py and selected by a tuple, see `scalars.activation`.  All
arrays of one call have one shape.  The backward takes y in place of x, except for those that `scalars.activations`
names; so a net runs both in place, activation_forward(y, y, ...) and activation_backward(dy, dy, y, ...).
"""

import math

from numba import prange

from tinycnn import scalars
from tinycnn.kernels._jit import device_function, force_inline, inline_ir, kernel, kernel_no_reassoc, overload_by_dtype
from tinycnn.kernels._simd import full_width
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
    ZERO,
)

BLOCK = 2048  # elements per task

pairs = scalars.activations(inline_ir, overload_by_dtype)
tanh_value, tanh_gradient = pairs[TANH]
sigmoid_value, sigmoid_gradient = pairs[SIGMOID]
relu_value, _ = pairs[RELU]
scaled_tanh_value, scaled_tanh_gradient = pairs[SCALED_TANH]
leaky_relu_value, leaky_relu_gradient = pairs[LEAKY_RELU]
gaussian_value, gaussian_gradient = pairs[GAUSSIAN]
elu_value, elu_gradient = pairs[ELU]
gelu_value, gelu_gradient = pairs[GELU]
gelu_tanh_value, gelu_tanh_gradient = pairs[GELU_TANH]
silu_value, silu_gradient = pairs[SILU]
softplus_value, softplus_gradient = pairs[SOFTPLUS]
hardtanh_value, hardtanh_gradient = pairs[HARDTANH]
scaled_tanh_constants = inline_ir(scalars.scaled_tanh_constants)


# LLVM vectorises the loops of these functions only in separate, inlined functions.
def value_loop(value):
    """A function (y, a, b): y = value(y), flat."""

    @force_inline
    def loop(y, a, b):
        for i in range(y.size):
            y[i] = value(y[i], a, b)

    return loop


def gradient_loop(gradient):
    """A function (dx, x, c, d): dx = gradient(dx, x), flat."""

    @force_inline
    def loop(dx, x, c, d):
        for i in range(dx.size):
            dx[i] = gradient(dx[i], x[i], c, d)

    return loop


sigmoid_inplace = value_loop(sigmoid_value)
gelu_inplace, gelu_gradient_inplace = value_loop(gelu_value), gradient_loop(gelu_gradient)
gelu_tanh_inplace, gelu_tanh_gradient_inplace = value_loop(gelu_tanh_value), gradient_loop(gelu_tanh_gradient)
silu_inplace, silu_gradient_inplace = value_loop(silu_value), gradient_loop(silu_gradient)
softplus_inplace, softplus_gradient_inplace = value_loop(softplus_value), gradient_loop(softplus_gradient)


@device_function
def apply_activation(y, activation):
    """y = f(y), flat.  A loop for each f, so that each is vectorised."""
    full_width()
    code, a, b = activation[0], y.dtype.type(activation[1]), y.dtype.type(activation[2])
    if code == TANH:
        for i in range(y.size):
            y[i] = tanh_value(y[i], a, b)
    elif code == SIGMOID:
        sigmoid_inplace(y, a, b)
    elif code == RELU:
        for i in range(y.size):
            y[i] = relu_value(y[i], a, b)
    elif code == SCALED_TANH:
        for i in range(y.size):
            y[i] = scaled_tanh_value(y[i], a, b)
    elif code == LEAKY_RELU:
        for i in range(y.size):
            y[i] = leaky_relu_value(y[i], a, b)
    elif code == GAUSSIAN:
        for i in range(y.size):
            y[i] = gaussian_value(y[i], a, b)
    elif code == ELU:
        for i in range(y.size):
            y[i] = elu_value(y[i], a, b)
    elif code == GELU:
        gelu_inplace(y, a, b)
    elif code == GELU_TANH:
        gelu_tanh_inplace(y, a, b)
    elif code == SILU:
        silu_inplace(y, a, b)
    elif code == SOFTPLUS:
        softplus_inplace(y, a, b)
    else:
        for i in range(y.size):
            y[i] = hardtanh_value(y[i], a, b)


@device_function
def apply_derivative(dx, y, activation):
    """dx *= f'(x), flat, where y = f(x), or y = x: see `scalars.activations`."""
    code, a, b = activation
    c, d = y.dtype.type(a), y.dtype.type(b)
    if code == TANH:
        for i in range(dx.size):
            dx[i] = tanh_gradient(dx[i], y[i], c, d)
    elif code == SIGMOID:
        for i in range(dx.size):
            dx[i] = sigmoid_gradient(dx[i], y[i], c, d)
    elif code == RELU:
        for i in range(dx.size):  # not a call of relu_gradient: that would be stored with a mask, see scalars.py
            dx[i] = ZERO if y[i] <= ZERO else dx[i]
    elif code == SCALED_TANH:
        c, d = scaled_tanh_constants(a, b)
        c, d = y.dtype.type(c), y.dtype.type(d)
        for i in range(dx.size):
            dx[i] = scaled_tanh_gradient(dx[i], y[i], c, d)
    elif code == LEAKY_RELU:
        for i in range(dx.size):
            dx[i] = leaky_relu_gradient(dx[i], y[i], c, d)
    elif code == GAUSSIAN:
        for i in range(dx.size):
            dx[i] = gaussian_gradient(dx[i], y[i], c, d)
    elif code == ELU:
        for i in range(dx.size):
            dx[i] = elu_gradient(dx[i], y[i], c, d)
    elif code == GELU:
        gelu_gradient_inplace(dx, y, c, d)
    elif code == GELU_TANH:
        gelu_tanh_gradient_inplace(dx, y, c, d)
    elif code == SILU:
        silu_gradient_inplace(dx, y, c, d)
    elif code == SOFTPLUS:
        softplus_gradient_inplace(dx, y, c, d)
    else:
        for i in range(dx.size):
            dx[i] = hardtanh_gradient(dx[i], y[i], c, d)


@device_function
def copy_block(out, source):
    for i in range(source.size):
        out[i] = source[i]


@kernel
def forward(y, x, activation):
    """x: of size 0 if in place, with x in y"""
    y, x = y.reshape(y.size), x.reshape(x.size)
    for block in prange((y.size + BLOCK - 1) // BLOCK):
        out = y[block * BLOCK : (block + 1) * BLOCK]
        copy_block(out, x[block * BLOCK : (block + 1) * BLOCK])
        apply_activation(out, activation)


@kernel
def backward(dx, dy, y, activation):
    """dy: of size 0 if in place, with dy in dx"""
    dx, dy, y = dx.reshape(dx.size), dy.reshape(dy.size), y.reshape(y.size)
    for block in prange((dx.size + BLOCK - 1) // BLOCK):
        out = dx[block * BLOCK : (block + 1) * BLOCK]
        copy_block(out, dy[block * BLOCK : (block + 1) * BLOCK])
        apply_derivative(out, y[block * BLOCK : (block + 1) * BLOCK], activation)


def activation_forward(y, x, activation):
    """y = f(x); in place if y is x.  activation: see `scalars.activation`"""
    forward(y, x[:0] if x is y else x, activation)


def activation_backward(dx, dy, y, activation):
    """dx = f'(x) * dy; in place if dx is dy.  y: the output of activation_forward, for LEAKY_RELU its input"""
    backward(dx, dy[:0] if dy is dx else dy, y, activation)


@device_function
def row_max(x):
    """The largest number of a row; NaN if it contains NaN."""
    top = x[0]
    for k in range(1, x.size):
        top = x[k] if x[k] > top or x[k] != x[k] else top
    return top


@kernel
def softmax_forward(y, x):
    """y[r] = exp(x[r]) / sum(exp(x[r])) for every row r; x, y: (R, K)"""
    for r in prange(x.shape[0]):
        xr, yr = x[r], y[r]
        top, total = row_max(xr), x.dtype.type(0)
        for k in range(xr.size):
            yr[k] = math.exp(xr[k] - top)
            total += yr[k]
        for k in range(xr.size):
            yr[k] = yr[k] / total


@kernel
def softmax_backward(dx, dy, y):
    """dx = y * (dy - sum(dy * y)), row by row."""
    for r in prange(y.shape[0]):
        dxr, dyr, yr = dx[r], dy[r], y[r]
        total = y.dtype.type(0)
        for k in range(yr.size):
            total += dyr[k] * yr[k]
        for k in range(yr.size):
            dxr[k] = yr[k] * (dyr[k] - total)


@kernel_no_reassoc
def log_softmax_forward(y, x):
    """y[r] = x[r] - log(sum(exp(x[r]))) for every row r; x, y: (R, K)"""
    for r in prange(x.shape[0]):
        xr, yr = x[r], y[r]
        top, total = row_max(xr), x.dtype.type(0)
        for k in range(xr.size):
            total += math.exp(xr[k] - top)
        log_total = math.log(total)
        for k in range(xr.size):
            yr[k] = (xr[k] - top) - log_total


@kernel
def log_softmax_backward(dx, dy, y):
    """dx = dy - exp(y) * sum(dy), row by row."""
    for r in prange(y.shape[0]):
        dxr, dyr, yr = dx[r], dy[r], y[r]
        total = y.dtype.type(0)
        for k in range(yr.size):
            total += dyr[k]
        for k in range(yr.size):
            dxr[k] = dyr[k] - math.exp(yr[k]) * total
