"""Nearest upsampling and zero padding.

x: (N, C, H, W)   y: (N, C, OH, OW), or both blocked, (B, C, H, W, L), see layout.py; else a pixel has L = 1 lane
"""

from numba import prange

from tinycnn.kernels._jit import device_function, kernel
from tinycnn.kernels._simd import ravel
from tinycnn.kernels.layout import lanes
from tinycnn.kernels.pooling import clear


@kernel
def upsample_nearest2d_forward(y, x):
    """y[i, j] = x[i*H // OH, j*W // OW]"""
    (B, C, H, W), (OH, OW) = x.shape[:4], y.shape[2:4]
    for task in prange(B * C):
        source, out = x[task // C, task % C], y[task // C, task % C]
        L, source, out = lanes(source), ravel(source), ravel(out)
        for i in range(OH):
            for j in range(OW):
                p, q = (i * OW + j) * L, (i * H // OH * W + j * W // OW) * L
                for n in range(L):
                    out[p + n] = source[q + n]


@kernel
def upsample_nearest2d_backward(dx, dy):
    """dx[h, w] = sum of the dy of its copies."""
    (B, C, H, W), (OH, OW) = dx.shape[:4], dy.shape[2:4]
    for task in prange(B * C):
        plane, source = dx[task // C, task % C], ravel(dy[task // C, task % C])
        clear(plane)
        L, out = lanes(plane), ravel(plane)
        for i in range(OH):
            for j in range(OW):
                p, q = (i * OW + j) * L, (i * H // OH * W + j * W // OW) * L
                for n in range(L):
                    out[q + n] += source[p + n]


@device_function
def overlap(offset, out, size):
    """The range (first, end) of i < out with 0 <= i - offset < size."""
    return min(max(offset, 0), out), max(min(out, size + offset), min(max(offset, 0), out))


@kernel
def zero_pad2d(y, x, offset):
    """y[i, j] = x[i - top, j - left], or 0 outside of x.   offset: (top, left), which may be negative"""
    (B, C, H, W), (OH, OW), (top, left) = x.shape[:4], y.shape[2:4], offset
    i0, i1 = overlap(top, OH, H)
    j0, j1 = overlap(left, OW, W)
    for task in prange(B * C):
        plane, source = y[task // C, task % C], ravel(x[task // C, task % C])
        clear(plane)
        L, out = lanes(plane), ravel(plane)
        for i in range(i0, i1):
            p, q = (i * OW + j0) * L, ((i - top) * W + j0 - left) * L
            for k in range((j1 - j0) * L):
                out[p + k] = source[q + k]
