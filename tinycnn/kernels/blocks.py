"""What all convolutions on the CPU share: how many sums stay in registers, and the loop that adds to them.

A block of output maps is computed at two vectors of positions at a time: neighbouring pixels of a tile, or thirty-two
pixels of a row.  An iteration loads two vectors and multiplies them by one weight of every map, so that every value
loaded is used several times, which is what keeps the multiply-add units busy.
"""

import numpy as np

from tinycnn.kernels import _vector
from tinycnn.kernels._jit import inner

WIDE, NARROW = 8, 6  # output maps a block; the number that leaves fewer of the last block unused is taken
MAPS, TAPS = 3, 5  # output maps and taps of a block of weight gradients

zeros, outer, loads = _vector.zeros, _vector.outer, _vector.loads

# Blocks are tuples, and tuples have their size in their type: these make one of each.
wide_block = inner(lambda x: zeros(x, 16))
narrow_block = inner(lambda x: zeros(x, 12))
products_block = inner(lambda x: zeros(x, 15))


@inner
def ceil_to(n, multiple):
    """The smallest multiple of `multiple` that is at least n."""
    return (n + multiple - 1) // multiple * multiple


@inner
def better(n, large, small):
    """The block size of the two that covers n with less to spare."""
    return large if ceil_to(n, large) <= ceil_to(n, small) else small


@inner
def add_taps(sums, src, at, plane, row, column, right, weight, w, shape, u0, u1, v0, v1):
    """Add, for all input maps and the given ranges of taps, weight times source at two pixels, `right` apart.

    shape: (maps, KH, KW) of the weights, which follow one another in blocks of one number for each output map
    """
    (C, KH, KW), block, pair = shape, len(sums) // 2, zeros(src, 2)
    for c in range(C):
        for u in range(u0, u1):
            here, tap = at + c * plane + u * row + v0 * column, w + ((c * KH + u) * KW + v0) * block
            for _ in range(v0, v1):
                sums = outer(sums, weight, tap, 1, loads(src, here, right, pair))
                here += column
                tap += block
    return sums


@inner
def pack(w, groups, block, flipped):
    """Weights in the order in which `add_taps` reads them: (groups, blocks * C * KH * KW * block), where the last axis
    of a block is the output map; flipped: those that lead from dy to dx, turned by 180 degrees."""
    O, per, taps = len(w), w.shape[1], w.shape[2] * w.shape[3]
    outputs, inputs = (per, O // groups) if flipped else (O // groups, per)
    packed, flat = np.zeros((groups, ceil_to(outputs, block) * inputs * taps), w.dtype), w.reshape(w.size)
    for g in range(groups):
        for r in range(outputs):
            at = r // block * block * inputs * taps + r % block
            for s in range(inputs):
                o, c = (s, r) if flipped else (r, s)
                tap, step = ((g * (O // groups) + o) * per + c) * taps, 1
                if flipped:
                    tap, step = tap + taps - 1, -1
                for _ in range(taps):
                    packed[g, at] = flat[tap]
                    at += block
                    tap += step
    return packed
