"""Sums over the threads of a block, in two steps and in a fixed order, so that results are bitwise reproducible.

values[tid] = ...;  cuda.syncthreads()
block_reduce(tid, nt, partials, values);  cuda.syncthreads()
reduce(partials)        in any thread
"""

from tinycnn.cuda._launch import device_function, phase

PARTIALS = 8  # partial sums of a block


@phase
def block_reduce(tid, nt, partials, values):
    """partials[t] = values[t] + values[t + PARTIALS] + ...; values: (nt,), partials: (PARTIALS,), both shared"""
    if tid < PARTIALS:
        total = values[tid]
        for t in range(tid + PARTIALS, nt, PARTIALS):
            total += values[t]
        partials[tid] = total


@device_function
def reduce(partials):
    """The sum of the partial sums."""
    total = partials[0]
    for i in range(1, PARTIALS):
        total += partials[i]
    return total
