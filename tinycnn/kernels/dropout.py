"""Dropout (Srivastava et al. 2014), with masks that nobody stores.

Whether a number is kept is computed from a seed, the number of the training step and the number's place: the same for
any number of threads, any block size and any device, and again in the backward pass.
"""

import numpy as np
from numba import prange

from tinycnn import scalars
from tinycnn.kernels._jit import device_function, kernel

splitmix64 = device_function(scalars.splitmix64)


@kernel
def dropout(y, x, counter, seed, p, span):
    """y = x / (1 - p) where kept, else 0; places are counted in runs of `span` numbers, which share their fate.

    Forward and backward are the same function.  y, x: any shape, or tiled   counter: (1,) int64, the step   seed: int
    """
    L, images = (x.shape[-1], len(x)) if x.ndim == 5 else (1, len(x))
    per = x.size // (images * L)
    x, y = x.reshape(x.size), y.reshape(y.size)
    scale, zero = x.dtype.type(1 / (1 - p) if p < 1 else 0.0), x.dtype.type(0)
    threshold = np.uint64(p * 4294967296.0)
    start = splitmix64(splitmix64(np.uint64(seed)) + np.uint64(counter[0]))
    for t in prange(images):  # or tiles
        if L == 1 and span == 1:  # a loop that is compiled to vectors
            to, row, first = y[t * per : (t + 1) * per], x[t * per : (t + 1) * per], start + np.uint64(t * per)
            for i in range(per):
                kept = (splitmix64(first + np.uint64(i)) >> np.uint64(32)) >= threshold
                to[i] = row[i] * scale if kept else zero
        else:
            for i in range(per):
                for lane in range(L):
                    place, k = (t * L + lane) * per + i, (t * per + i) * L + lane
                    kept = (splitmix64(start + np.uint64(place // span)) >> np.uint64(32)) >= threshold
                    y[k] = x[k] * scale if kept else zero
