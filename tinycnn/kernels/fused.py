"""Fused kernels: an activation and the pooling after it, in one pass over the maps; and, for the plan, functions that
call the kernels of a convolution or Linear and of what follows it, where another backend has one kernel.

The maps of a net's first layers exceed the L1 cache: loading them takes as long as computing on them.

Average pooling (2 x 2, stride 2): both layers work on two rows at a time, while these are in the cache.  The backward
pass overwrites the activation's output with the gradient, so the net's largest gradient array is never allocated.
Max pooling: max f(x) = f(max x) for non-decreasing f, so the kernel pools first and applies f to fewer values.

x, dx: (B, C, H, W, L), see layout.py   y, dy: (B, C, OH, OW, L); for averages (B, C, H // 2, W // 2, L)
activation: see scalars.py   divisor: y = sum of a window / divisor   indices and window arguments: see pooling.py
"""

import numpy as np
from numba import prange

from tinycnn.kernels import linear
from tinycnn.kernels._jit import device_function, kernel
from tinycnn.kernels._simd import ravel
from tinycnn.kernels.activations import activation_backward, activation_forward, apply_activation, apply_derivative
from tinycnn.kernels.conv import conv2d_forward
from tinycnn.kernels.pooling import clear, max_windows, mean_2x2, repeat_pixels, row, unpool


@device_function
def avg_pool_forward_plane(y, x, activation, share):
    for i in range(len(y)):
        apply_activation(ravel(x[2 * i : 2 * i + 2]), activation)
        mean_2x2(y, x, share, i, i + 1)


@kernel
def avg_pool_forward(y, x, activation, divisor):
    """x = f(x), in place; y = avg_pool(x)."""
    C, share = x.shape[1], x.dtype.type(1 / divisor)
    for task in prange(len(x) * C):
        n, c = task // C, task % C
        avg_pool_forward_plane(y[n, c], x[n, c], activation, share)


@device_function
def avg_pool_backward_plane(dx, dy, activation, share):
    length = row(dx, 0).size
    grads = np.zeros(2 * length, dx.dtype)
    for i in range(len(dy)):
        activations = ravel(dx[2 * i : 2 * i + 2])
        repeat_pixels(grads[:length], row(dy, i), share, dx)
        repeat_pixels(grads[length:], row(dy, i), share, dx)
        apply_derivative(grads, activations, activation)
        for k in range(activations.size):
            activations[k] = grads[k]
    clear(dx[2 * len(dy) :])


@kernel
def avg_pool_backward(dx, dy, activation, divisor):
    """dx: on entry f(x), as `avg_pool_forward` left it in x; on return the gradient of x."""
    C, share = dx.shape[1], dx.dtype.type(1 / divisor)
    for task in prange(len(dx) * C):
        n, c = task // C, task % C
        avg_pool_backward_plane(dx[n, c], dy[n, c], activation, share)


@kernel
def max_pool_forward(y, indices, x, activation, kernel_size, stride, padding, dilation):
    """y = f(max_pool(x))."""
    C = x.shape[1]
    for task in prange(len(x) * C):
        n, c = task // C, task % C
        max_windows(y[n, c], indices[n, c], x[n, c], kernel_size, stride, padding, dilation)
        apply_activation(ravel(y[n, c]), activation)


@kernel
def max_pool_backward(dx, dy, indices, y, activation, kernel_size, stride, padding, dilation):
    """Gradient of x from dy, which is overwritten.  y: the output of `max_pool_forward`"""
    C = dx.shape[1]
    for task in prange(len(dx) * C):
        n, c = task // C, task % C
        apply_derivative(ravel(dy[n, c]), ravel(y[n, c]), activation)
        unpool(dx[n, c], dy[n, c], indices[n, c], kernel_size, stride, padding, dilation)


def conv2d_avg_pool_forward(y, maps, x, w, b, stride, padding, dilation, groups, activation, divisor):
    """maps = f(conv(x)); y = avg_pool(maps).  `avg_pool_backward` overwrites maps with their gradient.

    maps: (B, C, H, W, L)   y: (B, C, H // 2, W // 2, L)   x, w, b, ...: see conv.py
    """
    conv2d_forward(maps, x, w, b, stride, padding, dilation, groups)
    avg_pool_forward(y, maps, activation, divisor)


def conv2d_max_pool_forward(
    y, indices, maps, x, w, b, stride, padding, dilation, groups, activation, kernel_size, pool_stride, pool_padding,
    pool_dilation,
):  # fmt: skip
    """y = f(max_pool(conv(x))).  maps: room for the gradient that `max_pool_backward` computes"""
    conv2d_forward(maps, x, w, b, stride, padding, dilation, groups)
    max_pool_forward(y, indices, maps, activation, kernel_size, pool_stride, pool_padding, pool_dilation)


def linear_forward(y, x, w, b, activation):
    """y = f(x w^T + b), with an activation that works in place."""
    linear.linear_forward(y, x, w, b)
    activation_forward(y, y, activation)


def linear_backward(dx, dw, db, dy, x, w, y, activation):
    """Gradients of `linear_forward` from dy, which is overwritten.  y: its output"""
    activation_backward(dy, dy, y, activation)
    linear.linear_backward(dx, dw, db, dy, x, w)
