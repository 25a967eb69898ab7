"""Batches as *tiles*: as many images as a vector register has lanes, interleaved pixel by pixel.

A batch of N images (N, C, H, W) becomes (T, C, H, W, L): image n is lane n % L of tile n // L, and lanes of the last
tile that have no image start as zeros.  A pixel of a tile is one vector then, so that no row is too short for vectors.
A `Plan` keeps the maps of a batch in this order from the images to Flatten; NumPy and GPUs never see it.
"""

import functools

import numpy as np
from numba import prange
from numba.extending import overload

from tinycnn.kernels import _simd
from tinycnn.kernels._jit import device_function, kernel

transpose, width, ravel = _simd.transpose, _simd.width, _simd.ravel


def lanes(plane):
    """Numbers a pixel of a plane has: 1 in (H, W), or L in (H, W, L); compiled code knows both beforehand."""
    return plane.shape[2] if plane.ndim == 3 else 1


@overload(lanes, inline="always")
def _lanes(plane):
    return (lambda plane: width(plane)) if plane.ndim == 3 else (lambda plane: 1)


def lanes_for(batch, dtype):
    """Images a tile for batches of this size: 1 for the few that would leave most of a tile empty."""
    size = _simd.BYTES // np.dtype(dtype).itemsize
    return size if 2 * batch >= size else 1


@device_function
def valid_range(start, step, count, size):
    """The range of k < count for which start + k*step lies in 0 ... size."""
    first = min(count, max(0, (step - 1 - start) // step))
    return first, max(first, min(count, (size - start + step - 1) // step))


@device_function
def gather_plane(to, x, n, c, count):
    """to[p*L + l] = pixel p of x[n + l, c], with L lanes; lanes from `count` on are zero."""
    L, P, step = to.size // (x.shape[2] * x.shape[3]), x.shape[2] * x.shape[3], x[0].size
    flat, start = ravel(x), n * step + c * P
    if P >= L:
        if count < L:
            whole = np.zeros(L * P, x.dtype)
            for lane in range(count):
                for p in range(P):
                    whole[lane * P + p] = flat[start + lane * step + p]
            flat, start, step = whole, 0, P
        for first in range(0, P, L):
            p = min(first, P - L)  # the last square reaches back, to end with the plane
            transpose(to, p * L, L, flat, start + p, step)
    else:
        for p in range(P):
            for lane in range(L):
                to[p * L + lane] = flat[start + lane * step + p] if lane < count else x.dtype.type(0)


@device_function
def scatter_plane(y, n, c, count, plane):
    """The opposite: y[n + l, c], pixel p, = plane[p*L + l] for the first `count` lanes."""
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
def to_blocked(tiles, x):
    """tiles: (T, C, H, W, L) from x: (N, C, H, W)"""
    T, C, L = tiles.shape[0], tiles.shape[1], tiles.shape[4]
    for task in prange(T * C):
        t, c = task // C, task % C
        plane = tiles[t, c]
        gather_plane(ravel(plane), x, t * L, c, min(L, len(x) - t * L))


@kernel
def to_nchw(y, tiles):
    """y: (N, C, H, W) from tiles: (T, C, H, W, L)"""
    T, C, L = tiles.shape[0], tiles.shape[1], tiles.shape[4]
    for task in prange(T * C):
        t, c = task // C, task % C
        plane = tiles[t, c]
        scatter_plane(y, t * L, c, min(L, len(y) - t * L), ravel(plane))


def as_nchw(x):
    """A tiled batch as a new (N, C, H, W), with an image for every lane; any other array as it is."""
    if not isinstance(x, np.ndarray) or x.ndim != 5:
        return x
    images = np.empty((x.shape[0] * x.shape[4], *x.shape[1:4]), x.dtype)
    to_nchw(images, x)
    return images


def via_nchw(output):
    """For kernels that know of no tiles: copies in plain order for them, and argument `output` copied back."""

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
