"""Sums of arrays, element by element."""

from numba import prange

from tinycnn.kernels._jit import kernel


@kernel
def add(y, a, b):
    """y = a + b; y may be a or b.   y, a, b: (n,)"""
    for i in prange(y.size):
        y[i] = a[i] + b[i]
