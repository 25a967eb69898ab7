"""Batches as *tiles*: as many images as a vector register has lanes, interleaved pixel by pixel.

A batch of N images (N, C, H, W) becomes (T, C, H, W, L): image n is lane n % L of tile n // L, and lanes of the last tile
that have no image hold zeros.  A pixel of a tile is one vector then, so that no row is too short for vectors and no loop
needs an index within them.  `Sequential` keeps all maps of a batch in this order; NumPy and GPUs never see it.
"""

import numpy as np
from numba import prange

from tinycnn.kernels import _vector
from tinycnn.kernels._jit import inner, kernel

transpose = _vector.transpose


def lanes(batch, dtype):
    """Images a tile for batches of this size: 1 for the few that would leave most of a tile empty."""
    size = _vector.BYTES // np.dtype(dtype).itemsize
    return size if 2 * batch > size else 1


@inner
def gather_plane(to, x, n, c, count):
    """to[p*L + l] = pixel p of x[n + l, c], with L lanes; lanes from `count` on are zero."""
    L, P, step = to.size // (x.shape[2] * x.shape[3]), x.shape[2] * x.shape[3], x[0].size
    flat, start = x.reshape(x.size), n * step + c * P
    if count == L and P >= L:
        for first in range(0, P, L):
            p = min(first, P - L)  # the last square reaches back, to end with the plane
            transpose(to, p * L, L, flat, start + p, step)
    else:
        for p in range(P):
            for lane in range(L):
                to[p * L + lane] = flat[start + lane * step + p] if lane < count else x.dtype.type(0)


@inner
def scatter_plane(y, n, c, count, plane):
    """The opposite: y[n + l, c], pixel p, = plane[p*L + l] for the first `count` lanes."""
    L, P, step = plane.size // (y.shape[2] * y.shape[3]), y.shape[2] * y.shape[3], y[0].size
    flat, start = y.reshape(y.size), n * step + c * P
    if count == L and P >= L:
        for first in range(0, P, L):
            p = min(first, P - L)
            transpose(flat, start + p, step, plane, p * L, L)
    else:
        for p in range(P):
            for lane in range(count):
                flat[start + lane * step + p] = plane[p * L + lane]


@kernel
def interleave(tiles, x):
    """tiles: (T, C, H, W, L) from x: (N, C, H, W)"""
    T, C, L = tiles.shape[0], tiles.shape[1], tiles.shape[4]
    for task in prange(T * C):
        t, c = task // C, task % C
        plane = tiles[t, c]
        gather_plane(plane.reshape(plane.size), x, t * L, c, min(L, len(x) - t * L))


@kernel
def separate(y, tiles):
    """y: (N, C, H, W) from tiles: (T, C, H, W, L)"""
    T, C, L = tiles.shape[0], tiles.shape[1], tiles.shape[4]
    for task in prange(T * C):
        t, c = task // C, task % C
        plane = tiles[t, c]
        scatter_plane(y, t * L, c, min(L, len(y) - t * L), plane.reshape(plane.size))
