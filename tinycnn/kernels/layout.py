"""The batch-blocked layout of maps on the CPU, and the reorders between it and NCHW.

A batch (N, C, H, W) becomes (B, C, H, W, L): image n is lane n % L of block n // L, where L is the number of lanes of a
vector register and B = ceil(N / L).  oneDNN calls this layout Abcd16a for L = 16.  A pixel of a block is one vector,
so even the narrowest map fills whole registers.  Lanes of the last block without an image start as zeros.

    NCHW: the pixels of an image in a row        blocked, L = 4: a pixel of four images is one vector

    image 0 │ a0 a1 a2 a3 ...                    block 0 │ a0 b0 c0 d0 │ a1 b1 c1 d1 │ a2 b2 ...
    image 1 │ b0 b1 b2 b3 ...
    image 2 │ c0 c1 c2 c3 ...
    image 3 │ d0 d1 d2 d3 ...
    image 4 │ e0 e1 ...                          block 1 │ e0 f0 ...

A `Plan` keeps maps in this layout from the first layer to Flatten.  The layout is internal, and GPUs do not use it.
"""

import functools

import numpy as np
from numba import prange
from numba.extending import overload

from tinycnn.kernels import _simd
from tinycnn.kernels._jit import device_function, kernel

transpose, width, ravel = _simd.transpose, _simd.width, _simd.ravel


def lanes(plane):
    """Elements of a pixel: 1 in a plane (H, W), L in a plane (H, W, L); a constant in compiled code."""
    return plane.shape[2] if plane.ndim == 3 else 1


@overload(lanes, inline="always")
def _lanes(plane):
    return (lambda plane: width(plane)) if plane.ndim == 3 else (lambda plane: 1)


def lanes_for(batch, dtype, evaluation=False):
    """Lanes per block for batches of this size: 1, which means NCHW, for batches that leave much of a block empty: more
    than half in training, more than a quarter in evaluation.  (NCHW has slower weight gradients.)"""
    size = _simd.BYTES // np.dtype(dtype).itemsize
    return size if 4 * batch >= (3 if evaluation else 2) * size else 1


@device_function
def valid_range(start, step, count, size):
    """The range (first, end) of k < count for which 0 <= start + k*step < size."""
    first = min(count, max(0, (step - 1 - start) // step))
    return first, max(first, min(count, (size - start + step - 1) // step))


@device_function
def gather_plane(plane, x, n, c, count):
    """plane[p*L + l] = pixel p of x[n + l, c] for l < count, zero for the other lanes.  plane: (H*W*L,)"""
    L, P, step = plane.size // (x.shape[2] * x.shape[3]), x.shape[2] * x.shape[3], x[0].size
    flat, start = ravel(x), n * step + c * P
    if P >= L:
        if count < L:
            padded = np.zeros(L * P, x.dtype)
            for lane in range(count):
                for p in range(P):
                    padded[lane * P + p] = flat[start + lane * step + p]
            flat, start, step = padded, 0, P
        for first in range(0, P, L):
            p = min(first, P - L)  # the last L x L square overlaps the one before it
            transpose(plane, p * L, L, flat, start + p, step)
    else:
        for p in range(P):
            for lane in range(L):
                plane[p * L + lane] = flat[start + lane * step + p] if lane < count else x.dtype.type(0)


@device_function
def scatter_plane(y, n, c, count, plane):
    """Inverse of `gather_plane`: pixel p of y[n + l, c] = plane[p*L + l] for l < count."""
    L, P, step = plane.size // (y.shape[2] * y.shape[3]), y.shape[2] * y.shape[3], y[0].size
    flat, start = ravel(y), n * step + c * P
    if count == L and P >= L:
        for first in range(0, P, L):
            p = min(first, P - L)
            transpose(flat, start + p, step, plane, p * L, L)
    else:
        for p in range(P):
            for lane in range(count):
                flat[start + lane * step + p] = plane[p * L + lane]


@kernel
def to_blocked(y, x):
    """Reorder.  x: (N, C, H, W) -> y: (B, C, H, W, L)"""
    B, C, L = y.shape[0], y.shape[1], y.shape[4]
    for task in prange(B * C):
        n, c = task // C, task % C
        plane = y[n, c]
        gather_plane(ravel(plane), x, n * L, c, min(L, len(x) - n * L))


@kernel
def to_nchw(y, x):
    """Reorder.  x: (B, C, H, W, L) -> y: (N, C, H, W)"""
    B, C, L = x.shape[0], x.shape[1], x.shape[4]
    for task in prange(B * C):
        n, c = task // C, task % C
        plane = x[n, c]
        scatter_plane(y, n * L, c, min(L, len(y) - n * L), ravel(plane))


def as_nchw(x):
    """A blocked array as a new (B*L, C, H, W), lanes without an image included; any other argument unchanged."""
    if not isinstance(x, np.ndarray) or x.ndim != 5:
        return x
    images = np.empty((x.shape[0] * x.shape[4], *x.shape[1:4]), x.dtype)
    to_nchw(images, x)
    return images


def via_nchw(output):
    """Decorator for kernels without a blocked version: runs them on NCHW copies and copies argument `output` back."""

    def decorate(kernel):
        @functools.wraps(kernel)
        def call(*args):
            if args[output].ndim < 5:
                kernel(*args)
                return
            images = [as_nchw(a) for a in args]
            kernel(*images)
            if images[output].size:
                to_blocked(args[output], images[output])

        return call

    return decorate
