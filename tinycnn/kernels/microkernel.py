"""What all convolutions on the CPU share: how many sums stay in registers, and how the weights are laid out for them.

A block of output maps is computed at two vectors of positions at a time: neighbouring pixels of a tile, or thirty-two
pixels of a row.  An iteration loads two vectors and multiplies them by one weight of every map: each value loaded
is used several times, which is what keeps the multiply-add units busy.
"""

import numpy as np

from tinycnn.kernels import _simd
from tinycnn.kernels._jit import device_function, force_inline

MR_WIDE, MR_NARROW = 8, 6  # output maps a block; the number that leaves fewer of the last block unused is taken

load_strided, fma_broadcast, zeros = _simd.load_strided, _simd.fma_broadcast, _simd.zeros

# Blocks are tuples, and tuples have their size in their type: these make one of each.
wide_accumulators = device_function(lambda x: zeros(x, 16))
narrow_accumulators = device_function(lambda x: zeros(x, 12))


@device_function
def round_up(n, multiple):
    """The smallest multiple of `multiple` that is at least n."""
    return (n + multiple - 1) // multiple * multiple


@device_function
def choose_mr(n, large, small):
    """The block size of the two that covers n with less to spare."""
    return large if round_up(n, large) <= round_up(n, small) else small


@device_function
def tap_offsets(I, J, K, i_step, j_step, k_step):
    """i*i_step + j*j_step + k*k_step for i < I, j < J, k < K, in this order: where the taps of a window are."""
    offset, at = np.empty(I * J * K, np.int64), 0
    for i in range(I):
        for j in range(J):
            for k in range(K):
                offset[at] = i * i_step + j * j_step + k * k_step
                at += 1
    return offset


@force_inline
def microkernel(sums, src, at, offset, first, last, right, weight, w):
    """Add, for taps first ... last of the windows at two vectors, `right` apart, weight times source.

    offset: where the source has what a tap meets, counted from `at`   weight: from w on, a block of one number for each
    output map a tap
    """
    block, pair = len(sums) // 2, zeros(src, 2)
    for k in range(first, last):
        sums = fma_broadcast(sums, weight, w + k * block, 1, load_strided(src, at + offset[k], right, pair))
    return sums


@device_function
def pack(w, groups, block, flipped, taps_first):
    """Weights in the order in which they are read: (groups, blocks * C * KH * KW * block), where the last axis of a
    block is the output map, and the one before it the tap or, if `taps_first`, the input map.

    flipped: the weights that lead from dy to dx, turned by 180 degrees
    """
    (O, per, KH, KW), taps = w.shape, w.shape[2] * w.shape[3]
    outputs, inputs = (per, O // groups) if flipped else (O // groups, per)
    packed = np.zeros((groups, round_up(outputs, block) * inputs * taps), w.dtype)
    source, next_tap = (1, inputs * block) if taps_first else (taps, block)
    for g in range(groups):
        for r in range(outputs):
            for s in range(inputs):
                o, c = (s, r) if flipped else (r, s)
                at, maps = r // block * block * inputs * taps + r % block + s * source * block, w[g * (O // groups) + o]
                for i in range(KH):
                    for j in range(KW):
                        packed[g, at] = maps[c, KH - 1 - i, KW - 1 - j] if flipped else maps[c, i, j]
                        at += next_tap
    return packed
