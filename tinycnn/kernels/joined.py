"""Two layers in one pass: an activation, and the mean of 2 x 2 pixels side by side that follows it.

The maps of a net's first layers are larger than the nearest cache, and to fetch them takes as long as to work on them.
Here both layers do their work on two rows at a time.  On the way back, the gradient is written over the activation's
values, which nobody needs after that: the largest array of slopes is never made.

x, dx: (T, C, H, W, L), see tiles.py   y, dy: (T, C, H // 2, W // 2, L)
formula: see activations.py   divisor: of a window's sum
"""

import numpy as np
from numba import prange

from tinycnn.kernels._jit import inner, kernel
from tinycnn.kernels.activations import activate, descend
from tinycnn.kernels.pooling import clear, mean_2x2, row, spread_row


@inner
def forward_plane(y, x, formula, share):
    for i in range(len(y)):
        activate(row(x, 2 * i), formula)
        activate(row(x, 2 * i + 1), formula)
        mean_2x2(y, x, share, i, i + 1)


@kernel
def average_forward(y, x, formula, divisor):
    """x = f(x), y = the means of that."""
    C, share = x.shape[1], x.dtype.type(1 / divisor)
    for task in prange(len(x) * C):
        t, c = task // C, task % C
        forward_plane(y[t, c], x[t, c], formula, share)


@inner
def backward_plane(dx, dy, formula, share):
    slopes = np.zeros(row(dx, 0).size, dx.dtype)
    for h in range(2 * len(dy)):
        values = row(dx, h)
        spread_row(slopes, row(dy, h // 2), share, dx)
        descend(slopes, values, formula)
        for k in range(values.size):
            values[k] = slopes[k]
    clear(dx[2 * len(dy) :])


@kernel
def average_backward(dx, dy, formula, divisor):
    """dx: before, what `average_forward` left in x; after, the gradient of what it was given there."""
    C, share = dx.shape[1], dx.dtype.type(1 / divisor)
    for task in prange(len(dx) * C):
        t, c = task // C, task % C
        backward_plane(dx[t, c], dy[t, c], formula, share)
