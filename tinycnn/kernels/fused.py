"""Two layers in one pass: an activation, and the pooling that follows it.

The maps of a net's first layers are larger than the nearest cache, and to fetch them takes as long as to work on them.
Before a mean of 2 x 2 pixels side by side, both layers do their work on two rows at a time.  On the way back, the
gradient is written over the activation's values, which nobody needs after that: the largest array of slopes is never
made.  The maximum is taken first, since the largest of f(x) is f of the largest x if f never falls: then few numbers
are left for f.

x, dx: (T, C, H, W, L), see layout.py   y, dy: (T, C, OH, OW, L), of means (T, C, H // 2, W // 2, L)
formula: see activations.py   divisor: of a window's sum   indices and the rest: see pooling.py
"""

import numpy as np
from numba import prange

from tinycnn.kernels._jit import device_function, kernel
from tinycnn.kernels._simd import ravel
from tinycnn.kernels.activations import apply_activation, apply_derivative
from tinycnn.kernels.pooling import clear, max_windows, mean_2x2, repeat_pixels, row, unpool


@device_function
def forward_plane(y, x, formula, share):
    for i in range(len(y)):
        apply_activation(ravel(x[2 * i : 2 * i + 2]), formula)
        mean_2x2(y, x, share, i, i + 1)


@kernel
def avg_pool_forward(y, x, formula, divisor):
    """x = f(x), y = the means of that."""
    C, share = x.shape[1], x.dtype.type(1 / divisor)
    for task in prange(len(x) * C):
        t, c = task // C, task % C
        forward_plane(y[t, c], x[t, c], formula, share)


@device_function
def backward_plane(dx, dy, formula, share):
    length = row(dx, 0).size
    slopes = np.zeros(2 * length, dx.dtype)
    for i in range(len(dy)):
        values = ravel(dx[2 * i : 2 * i + 2])
        repeat_pixels(slopes[:length], row(dy, i), share, dx)
        repeat_pixels(slopes[length:], row(dy, i), share, dx)
        apply_derivative(slopes, values, formula)
        for k in range(values.size):
            values[k] = slopes[k]
    clear(dx[2 * len(dy) :])


@kernel
def avg_pool_backward(dx, dy, formula, divisor):
    """dx: before, what `avg_pool_forward` left in x; after, the gradient of what it was given there."""
    C, share = dx.shape[1], dx.dtype.type(1 / divisor)
    for task in prange(len(dx) * C):
        t, c = task // C, task % C
        backward_plane(dx[t, c], dy[t, c], formula, share)


@kernel
def max_pool_forward(y, indices, x, formula, kernel_size, stride, padding, dilation):
    """y = f(the largest entry of each window of x)."""
    C = x.shape[1]
    for task in prange(len(x) * C):
        t, c = task // C, task % C
        max_windows(y[t, c], indices[t, c], x[t, c], kernel_size, stride, padding, dilation)
        apply_activation(ravel(y[t, c]), formula)


@kernel
def max_pool_backward(dx, dy, indices, y, formula, kernel_size, stride, padding, dilation):
    """dx from dy, which is overwritten; y: what `max_pool_forward` left."""
    C = dx.shape[1]
    for task in prange(len(dx) * C):
        t, c = task // C, task % C
        apply_derivative(ravel(dy[t, c]), ravel(y[t, c]), formula)
        unpool(dx[t, c], dy[t, c], indices[t, c], kernel_size, stride, padding, dilation)
