"""Sums: of two arrays, of maps and a bias."""

import numpy as np
from numba import prange

from tinycnn.kernels._jit import kernel
from tinycnn.kernels._simd import ravel

CHUNKS = 16  # parts of a sum over the batch


@kernel
def add(y, a, b):
    """y = a + b; y may be a or b.   y, a, b: (n,)"""
    for i in prange(y.size):
        y[i] = a[i] + b[i]


@kernel
def add_bias(y, b):
    """y[n, c] += b[c].   y: (N, C, H, W) or blocked   b: (C,)"""
    C = y.shape[1]
    for task in prange(len(y) * C):
        plane = ravel(y[task // C, task % C])
        for k in range(plane.size):
            plane[k] += b[task % C]


@kernel
def sum_channels(db, dy):
    """db[c] = sum of dy[n, c] over images and pixels.   dy: (N, C, H, W) or blocked   db: (C,)"""
    N, C = dy.shape[:2]
    chunks = min(CHUNKS, N)
    partials = np.zeros((chunks, C), dy.dtype)
    for chunk in prange(chunks):
        for n in range(chunk * N // chunks, (chunk + 1) * N // chunks):
            for c in range(C):
                plane, total = ravel(dy[n, c]), dy.dtype.type(0)
                for k in range(plane.size):
                    total += plane[k]
                partials[chunk, c] += total
    for c in range(C):
        db[c] = partials[0, c]
        for chunk in range(1, chunks):
            db[c] += partials[chunk, c]
