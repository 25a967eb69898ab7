"""The micro-kernel of all convolutions on the CPU, and the packing of the weights that it reads.

It computes a register block of MR output channels x NR_VECTORS vectors of output positions: neighbouring pixels of the
batch-blocked layout, or consecutive pixels of a row.  Per tap it loads two vectors and broadcasts MR weights, for 2*MR
multiply-adds; so each loaded vector is used MR times.  direct_conv.py has a drawing of one call.
"""

import numpy as np

from tinycnn.kernels import _simd
from tinycnn.kernels._jit import device_function, force_inline

# Output channels of a register block, of two vectors each; see `choose_mr`.  AVX-512 has 32 registers, others 16.
MR_WIDE, MR_NARROW = (8, 6) if _simd.BYTES == 64 else (4, 6)
WIDE_SIZE, NARROW_SIZE = 2 * MR_WIDE, 2 * MR_NARROW

load_strided, fma_broadcast, zeros = _simd.load_strided, _simd.fma_broadcast, _simd.zeros

# Accumulators are tuples of vectors, and the length of a tuple is part of its type: one function for each length.
wide_accumulators = device_function(lambda x: zeros(x, WIDE_SIZE))
narrow_accumulators = device_function(lambda x: zeros(x, NARROW_SIZE))


@device_function
def round_up(n, multiple):
    """The smallest multiple of `multiple` that is at least n."""
    return (n + multiple - 1) // multiple * multiple


@device_function
def choose_mr(n, wide, narrow):
    """The block size, `wide` or `narrow`, that pads n rows less; `wide` if both pad the same."""
    return wide if round_up(n, wide) <= round_up(n, narrow) else narrow


@device_function
def tap_offsets(I, J, K, i_step, j_step, k_step):
    """Offsets of the taps of a window: i*i_step + j*j_step + k*k_step for i < I, j < J, k < K, k fastest."""
    offsets, n = np.empty(I * J * K, np.int64), 0
    for i in range(I):
        for j in range(J):
            for k in range(K):
                offsets[n] = i * i_step + j * j_step + k * k_step
                n += 1
    return offsets


@force_inline
def microkernel(acc, src, start, offsets, first, last, vector_step, weight, w, tap_step, channel_step):
    """acc[r, v] += sum over k of weight[w + k*tap_step + r*channel_step] * vector at src[start + offsets[k] +
    v*vector_step].

    acc: (MR, NR_VECTORS) vectors   k: taps first <= k < last   weight: flat; of a packed panel (see `pack`) that begins
    at w the steps are MR and 1
    """
    pair = zeros(src, 2)
    for k in range(first, last):
        vectors = load_strided(src, start + offsets[k], vector_step, pair)
        acc = fma_broadcast(acc, weight, w + k * tap_step, channel_step, vectors)
    return acc


@device_function
def pack(w, groups, mr, flipped):
    """Pack weights into panels of `mr` output channels, in the order in which the micro-kernel reads them.

    w: (O, C/groups, KH, KW) -> (groups, blocks * KH * KW * C/groups * mr); missing channels of the last block are
    zeros.
    flipped: for the input gradient: input and output channels exchanged, the kernel rotated by 180 degrees
    """
    (O, per, KH, KW), taps = w.shape, w.shape[2] * w.shape[3]
    outputs, inputs = (per, O // groups) if flipped else (O // groups, per)
    packed = np.zeros((groups, round_up(outputs, mr) * inputs * taps), w.dtype)
    for g in range(groups):
        for r in range(outputs):
            for s in range(inputs):
                o, c = (s, r) if flipped else (r, s)
                k, maps = r // mr * mr * inputs * taps + r % mr + s * mr, w[g * (O // groups) + o]
                for i in range(KH):
                    for j in range(KW):
                        packed[g, k] = maps[c, KH - 1 - i, KW - 1 - j] if flipped else maps[c, i, j]
                        k += inputs * mr
    return packed
