"""The micro-kernel of all convolutions on the CPU, and the packing of the weights that it reads.

It computes a register block of MR output channels x NR_VECTORS vectors of output positions: neighbouring pixels of the
batch-blocked layout, or consecutive pixels of a row.  Per tap it loads two vectors and broadcasts MR weights, for 2*MR
multiply-adds; so each loaded vector is used MR times.  direct_conv.py has a drawing of one call.
"""

from typing import Any

import numpy as np
from numba import types
from numba.extending import overload

from tinycnn.kernels import _simd
from tinycnn.kernels._jit import device_function, force_inline

# Output channels of a register block, of two vectors each; see `choose_mr`.  AVX-512 has 32 registers, others 16.
MR_WIDE, MR_NARROW = (8, 6) if _simd.BYTES == 64 else (4, 6)
WIDE_SIZE, NARROW_SIZE = 2 * MR_WIDE, 2 * MR_NARROW

load_strided, fma_broadcast, zeros = _simd.load_strided, _simd.fma_broadcast, _simd.zeros
prefetch, ravel = _simd.prefetch, _simd.ravel
store_block, store_epilogue = _simd.store_block, _simd.store_epilogue

# Accumulators are tuples of vectors, and the length of a tuple is part of its type: one function for each length.
wide_accumulators = device_function(lambda x: zeros(x, WIDE_SIZE))
narrow_accumulators = device_function(lambda x: zeros(x, NARROW_SIZE))


@device_function
def round_up(n, multiple):
    """The smallest multiple of `multiple` that is at least n."""
    return (n + multiple - 1) // multiple * multiple


@device_function
def divide(n, parts):
    """n / parts, rounded up."""
    return (n + parts - 1) // parts


@device_function
def part(index, count, size):
    """Part `index` of `count` of 0 ... size - 1: (first, end)."""
    return index * size // count, (index + 1) * size // count


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


@force_inline
def prefetch_block(array, index, row_step, vector_step, rows):
    """Load what `store_result` will read of a residual, if there is one: it is not in the cache, and the micro-kernel
    takes long enough."""
    if array is not None:
        for r in range(rows):
            prefetch(array, index + r * row_step)
            prefetch(array, index + r * row_step + vector_step)


@force_inline
def store_result(y, index, row_step, vector_step, acc, rows, r, epilogue, residual):
    """Store the register block of channels r, r + 1, ... at y[index + row*row_step + vector*vector_step], row < rows.

    epilogue: of one group, see `by_group`, or None   residual: at the indices of y, or None
    """
    if epilogue is None:
        store_block(y, index, row_step, vector_step, acc, rows)
    else:
        store_epilogue(y, index, row_step, vector_step, acc, rows, epilogue, epilogue.size // 4, r, residual)


def none_for_none(function: Any) -> Any:
    """A part of kernels that returns None if its first argument is None.  (Numba decides by type: a function that may
    return None or an array is neither.)"""
    part = device_function(function)

    def call(array, a, b):
        return None if array is None else function(array, a, b)

    @overload(call)
    def _call(array, a, b):
        return (lambda array, a, b: None) if array is types.none else (lambda array, a, b: part(array, a, b))

    return call


@none_for_none
def by_group(table, groups, count):
    """Rows of numbers for the output channels, (rows, O), as (groups, rows*count), padded with zeros.

    count: at least O/groups; O may be 0
    """
    (rows, O), padded = table.shape, np.zeros((groups, len(table) * count), table.dtype)
    for line in range(rows):
        for o in range(O):
            padded[o // (O // groups), line * count + o % (O // groups)] = table[line, o]
    return padded


@none_for_none
def flat_items(array, first, end):
    """array[first:end], flat."""
    return ravel(array[first:end])


@none_for_none
def widen(rows, length, pitch):
    """Flat rows of `length` as flat rows of `pitch`."""
    wide = np.zeros(rows.size // length * pitch, rows.dtype)
    for k in range(rows.size):
        wide[k // length * pitch + k % length] = rows[k]
    return wide


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
