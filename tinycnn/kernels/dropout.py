"""Dropout (Srivastava et al. 2014) without stored masks.

The mask of an element is a hash of seed, training step and the element's position in the batch.  It is the same for any
number of threads, any block size and any device, for a part of the batch, and in the backward pass.
"""

import numpy as np
from numba import prange

from tinycnn import scalars
from tinycnn.kernels._jit import device_function, kernel

splitmix64 = device_function(scalars.splitmix64)


@kernel
def dropout(y, x, counter, offset, seed, p, span):
    """y = x / (1 - p) where an element is kept, else 0.  Forward and backward are the same function.

    y, x: any shape, or blocked   counter: (1,) int64, the step   offset: (1,) int64, images of the batch before these
    seed: int   span: number of consecutive elements of an image that share one mask value
    """
    L, blocks = (x.shape[-1], len(x)) if x.ndim == 5 else (1, len(x))
    size = x.size // (blocks * L)
    x, y = x.reshape(x.size), y.reshape(y.size)
    scale, zero = x.dtype.type(1 / (1 - p) if p < 1 else 0.0), x.dtype.type(0)
    threshold = np.uint64(p * 4294967296.0)
    start = splitmix64(splitmix64(np.uint64(seed)) + np.uint64(counter[0]))
    start += np.uint64(offset[0]) * np.uint64(size // span)
    for b in prange(blocks):  # or images, if L = 1
        if L == 1 and span == 1:  # LLVM vectorises this loop
            out, row, first = y[b * size : (b + 1) * size], x[b * size : (b + 1) * size], start + np.uint64(b * size)
            for i in range(size):
                kept = (splitmix64(first + np.uint64(i)) >> np.uint64(32)) >= threshold
                out[i] = row[i] * scale if kept else zero
        else:
            for i in range(size):
                for lane in range(L):
                    position, k = (b * L + lane) * size + i, (b * size + i) * L + lane
                    kept = (splitmix64(start + np.uint64(position // span)) >> np.uint64(32)) >= threshold
                    y[k] = x[k] * scale if kept else zero
