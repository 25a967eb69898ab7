"""Activations, element by element: y = f(x) and dx = f'(x) * dy.  All arrays of one kernel have one shape.

Where the derivative is simpler in terms of the output, the backward takes y in place of x.  Then the input is not
needed again, and a net calls forward(y, y) and backward(dy, dy, y): memory that is not touched costs no time.
"""

import functools
import inspect
import math

import numpy as np
from numba import prange

from tinycnn import scalars
from tinycnn.kernels._capture import traced
from tinycnn.kernels._jit import device_function, force_inline, kernel, kernel_no_reassoc, scalar
from tinycnn.kernels._simd import full_width

tanh = scalar(scalars.tanh32, scalars.tanh64)
sigmoid = scalar(scalars.sigmoid32, scalars.sigmoid64)


copy = traced(np.copyto)


def in_place(source):
    """For a kernel that overwrites its first array: Python calls it with one more argument, named `source`, whose
    values go there first, unless it is that very array."""

    def decorate(kernel):
        @functools.wraps(kernel)
        def call(to, values, *args):
            if to is not values:
                copy(to, values)
            kernel(to, *args)

        parameters = list(inspect.signature(kernel).parameters.values())
        parameters.insert(1, parameters[0].replace(name=source))
        call.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        return call

    return decorate


TANH, SIGMOID, RELU, SCALED_TANH = scalars.TANH, scalars.SIGMOID, scalars.RELU, scalars.SCALED_TANH
BLOCK = 2048  # numbers a task


@force_inline
def sigmoid_inplace(y):  # LLVM vectorises this loop only if it is force_inline as it is
    for i in range(y.size):
        y[i] = sigmoid(y[i])


@device_function
def apply_activation(y, formula):
    """y = f(y), flat.  formula: which f, and its two constants"""
    full_width()
    which, a, s, zero = formula[0], y.dtype.type(formula[1]), y.dtype.type(formula[2]), y.dtype.type(0)
    if which == TANH:
        for i in range(y.size):
            y[i] = tanh(y[i])
    elif which == SIGMOID:
        sigmoid_inplace(y)
    elif which == RELU:
        for i in range(y.size):
            y[i] = zero if y[i] <= zero else y[i]  # written so that NaN stays NaN
    else:
        for i in range(y.size):
            y[i] = a * tanh(s * y[i])


@device_function
def apply_derivative(dx, y, formula):
    """dx *= f'(x), flat, where y = f(x)."""
    which, zero = formula[0], y.dtype.type(0)
    if which == TANH:
        for i in range(dx.size):
            dx[i] -= dx[i] * y[i] * y[i]
    elif which == SIGMOID:
        for i in range(dx.size):
            dx[i] *= y[i] - y[i] * y[i]
    elif which == RELU:
        for i in range(dx.size):
            dx[i] = zero if y[i] <= zero else dx[i]
    else:
        at_zero, fall = y.dtype.type(formula[1] * formula[2]), y.dtype.type(formula[2] / formula[1])
        for i in range(dx.size):
            dx[i] *= at_zero - fall * y[i] * y[i]


@in_place("x")
@kernel
def forward(y, formula):
    y = y.reshape(y.size)
    for block in prange((y.size + BLOCK - 1) // BLOCK):
        apply_activation(y[block * BLOCK : (block + 1) * BLOCK], formula)


@in_place("dy")
@kernel
def backward(dx, y, formula):
    dx, y = dx.reshape(dx.size), y.reshape(y.size)
    for block in prange((dx.size + BLOCK - 1) // BLOCK):
        apply_derivative(dx[block * BLOCK : (block + 1) * BLOCK], y[block * BLOCK : (block + 1) * BLOCK], formula)


def tanh_forward(y, x):
    forward(y, x, (TANH, 1.0, 1.0))


def tanh_backward(dx, dy, y):
    backward(dx, dy, y, (TANH, 1.0, 1.0))


def scaled_tanh_forward(y, x, A, S):
    """y = A tanh(S x); 1.7159 and 2/3 in LeCun et al. 1998, appendix A."""
    forward(y, x, (SCALED_TANH, float(A), float(S)))


def scaled_tanh_backward(dx, dy, y, A, S):
    backward(dx, dy, y, (SCALED_TANH, float(A), float(S)))


def sigmoid_forward(y, x):
    forward(y, x, (SIGMOID, 1.0, 1.0))


def sigmoid_backward(dx, dy, y):
    backward(dx, dy, y, (SIGMOID, 1.0, 1.0))


def relu_forward(y, x):
    forward(y, x, (RELU, 1.0, 1.0))


def relu_backward(dx, dy, y):
    backward(dx, dy, y, (RELU, 1.0, 1.0))


@kernel
def leaky_relu_forward(y, x, negative_slope):
    x, y = x.reshape(x.size), y.reshape(y.size)
    zero, slope = x.dtype.type(0), x.dtype.type(negative_slope)
    for i in prange(x.size):
        y[i] = slope * x[i] if x[i] <= zero else x[i]


@kernel
def leaky_relu_backward(dx, dy, x, negative_slope):
    dx, dy, x = dx.reshape(dx.size), dy.reshape(dy.size), x.reshape(x.size)
    zero, slope = x.dtype.type(0), x.dtype.type(negative_slope)
    for i in prange(dx.size):
        dx[i] = slope * dy[i] if x[i] <= zero else dy[i]


@kernel
def gaussian_forward(y, x):
    """y = exp(-x/2), of squared distances x."""
    x, y = x.reshape(x.size), y.reshape(y.size)
    slope = x.dtype.type(-0.5)
    for i in prange(x.size):
        y[i] = math.exp(slope * x[i])


@kernel
def gaussian_backward(dx, dy, y):
    dx, dy, y = dx.reshape(dx.size), dy.reshape(dy.size), y.reshape(y.size)
    slope = y.dtype.type(-0.5)
    for i in prange(dx.size):
        dx[i] = slope * y[i] * dy[i]


@device_function
def largest(x):
    """The largest number of a row; NaN if there is one."""
    top = x[0]
    for k in range(1, x.size):
        top = x[k] if x[k] > top or x[k] != x[k] else top
    return top


@kernel
def softmax_forward(y, x):
    """y[r] = exp(x[r]) / sum(exp(x[r])) for every row r; x, y: (R, K)"""
    for r in prange(x.shape[0]):
        xr, yr = x[r], y[r]
        top, total = largest(xr), x.dtype.type(0)
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
        top, total = largest(xr), x.dtype.type(0)
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
