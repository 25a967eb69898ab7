"""Activations, element by element: y = f(x) and dx = f'(x) * dy.  All arrays of one kernel have one shape.

Where the derivative is simpler in terms of the output, the backward takes y in place of x.  Then the input is not
needed again, and y may be x, and dx dy: the arithmetic is done on copies of pieces, because LLVM does not vectorise a
loop that writes to what it reads under another name.
"""

import math

import numpy as np
from numba import prange

from tinycnn import scalars
from tinycnn.kernels._jit import inner, kernel, kernel_in_order, scalar

tanh = scalar(scalars.tanh32, scalars.tanh64)
sigmoid = scalar(scalars.sigmoid32, scalars.sigmoid64)


PIECE = 2048  # numbers that a thread takes at a time


@inner
def pieces(x):
    return (x.size + PIECE - 1) // PIECE


@inner
def part(x, number):
    """Piece `number` of x, flat."""
    return x[number * PIECE : (number + 1) * PIECE]


@inner
def take(x, number):
    """A copy of it."""
    flat = part(x, number)
    piece = np.empty(flat.size, x.dtype)
    for i in range(piece.size):
        piece[i] = flat[i]
    return piece


@inner
def put(x, number, piece):
    flat = part(x, number)
    for i in range(piece.size):
        flat[i] = piece[i]


@kernel
def tanh_forward(y, x):
    x, y = x.reshape(x.size), y.reshape(y.size)
    for n in prange(pieces(x)):
        piece = take(x, n)
        for i in range(piece.size):
            piece[i] = tanh(piece[i])
        put(y, n, piece)


@kernel
def tanh_backward(dx, dy, y):
    dx, dy, y = dx.reshape(dx.size), dy.reshape(dy.size), y.reshape(y.size)
    for n in prange(pieces(y)):
        piece, out = take(dy, n), part(y, n)
        for i in range(piece.size):
            piece[i] -= piece[i] * out[i] * out[i]
        put(dx, n, piece)


@kernel
def scaled_tanh_forward(y, x, A, S):
    """y = A tanh(S x); 1.7159 and 2/3 in LeCun et al. 1998, appendix A."""
    x, y = x.reshape(x.size), y.reshape(y.size)
    a, s = x.dtype.type(A), x.dtype.type(S)
    for n in prange(pieces(x)):
        piece = take(x, n)
        for i in range(piece.size):
            piece[i] = a * tanh(s * piece[i])
        put(y, n, piece)


@kernel
def scaled_tanh_backward(dx, dy, y, A, S):
    dx, dy, y = dx.reshape(dx.size), dy.reshape(dy.size), y.reshape(y.size)
    at_zero, fall = y.dtype.type(A * S), y.dtype.type(S / A)
    for n in prange(pieces(y)):
        piece, out = take(dy, n), part(y, n)
        for i in range(piece.size):
            piece[i] *= at_zero - fall * out[i] * out[i]
        put(dx, n, piece)


@kernel
def sigmoid_forward(y, x):
    x, y = x.reshape(x.size), y.reshape(y.size)
    for n in prange(pieces(x)):
        piece = take(x, n)
        for i in range(piece.size):
            piece[i] = sigmoid(piece[i])
        put(y, n, piece)


@kernel
def sigmoid_backward(dx, dy, y):
    dx, dy, y = dx.reshape(dx.size), dy.reshape(dy.size), y.reshape(y.size)
    for n in prange(pieces(y)):
        piece, out = take(dy, n), part(y, n)
        for i in range(piece.size):
            piece[i] *= out[i] - out[i] * out[i]
        put(dx, n, piece)


@kernel
def relu_forward(y, x):
    x, y = x.reshape(x.size), y.reshape(y.size)
    zero = x.dtype.type(0)
    for n in prange(pieces(x)):
        piece = take(x, n)
        for i in range(piece.size):
            piece[i] = zero if piece[i] <= zero else piece[i]  # written so that NaN stays NaN
        put(y, n, piece)


@kernel
def relu_backward(dx, dy, y):
    dx, dy, y = dx.reshape(dx.size), dy.reshape(dy.size), y.reshape(y.size)
    zero = y.dtype.type(0)
    for n in prange(pieces(y)):
        piece, out = take(dy, n), part(y, n)
        for i in range(piece.size):
            piece[i] = zero if out[i] <= zero else piece[i]
        put(dx, n, piece)


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


@inner
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


@kernel_in_order
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
