"""Dropout, one thread per element.  GPU version of tinycnn/kernels/dropout.py, with the same masks."""

import numpy as np

from tinycnn import scalars
from tinycnn.cuda._launch import THREADS, blocks, cuda, device_function, divmod32, kernel, phase, ravel

splitmix64 = device_function(scalars.splitmix64)
HALF_WORD = np.uint64(32)


@phase
def dropout_element(tid, nt, first, y, x, counter, offset, masks, seed, threshold, scale, span):
    i = first + tid
    if i < y.size:
        start = splitmix64(splitmix64(seed) + np.uint64(counter[0])) + np.uint64(offset[0]) * np.uint64(masks)
        kept = (splitmix64(start + np.uint64(divmod32(i, span)[0])) >> HALF_WORD) >= threshold
        y[i] = x[i] * scale if kept else x.dtype.type(0)


@kernel(THREADS, registers=32)
def dropout_kernel(y, x, counter, offset, masks, seed, threshold, scale, span):
    first = cuda.blockIdx.x * THREADS
    dropout_element(cuda.threadIdx.x, THREADS, first, y, x, counter, offset, masks, seed, threshold, scale, span)


def dropout(y, x, counter, offset, seed, p, span):
    """y = x / (1 - p) where kept, else 0; see the CPU version for the mask."""
    scale = x.dtype.type(1 / (1 - p) if p < 1 else 0.0)
    masks = x.size // len(x) // span  # of an image
    dropout_kernel[blocks(x.size)](
        ravel(y), ravel(x), counter, offset, masks, np.uint64(seed), np.uint64(p * 4294967296.0), scale, span
    )
