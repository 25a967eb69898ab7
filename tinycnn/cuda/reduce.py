"""Sums over what all threads of a block hold, in an order that is always the same."""

from tinycnn.cuda._launch import device_function, phase

PARTIALS = 8  # threads that add what the others have summed


@phase
def block_reduce(tid, nt, few, some):
    """few[t] = some[t] + some[t + PARTIALS] + ...; some: (nt,)"""
    if tid < PARTIALS:
        total = some[tid]
        for t in range(tid + PARTIALS, nt, PARTIALS):
            total += some[t]
        few[tid] = total


@device_function
def reduce(few):
    """What `block_reduce` has left, added."""
    sum_ = few[0]
    for i in range(1, PARTIALS):
        sum_ += few[i]
    return sum_
