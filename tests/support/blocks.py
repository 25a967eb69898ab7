"""The batch-blocked layout (tinycnn/kernels/layout.py) in plain NumPy."""

import numpy as np

from tinycnn.kernels import _simd


def lanes(dtype):
    return _simd.BYTES // np.dtype(dtype).itemsize


def to_blocked(x, L, fill=0):
    """x: (N, C, H, W) -> (B, C, H, W, L), with `fill` in the lanes without an image."""
    count = -(-len(x) // L)
    padded = np.full((count * L, *x.shape[1:]), fill, x.dtype)
    padded[: len(x)] = x
    return np.ascontiguousarray(np.moveaxis(padded.reshape(count, L, *x.shape[1:]), 1, -1))


def to_nchw(x, images):
    return np.moveaxis(x, -1, 1).reshape(-1, *x.shape[1:4])[:images]
