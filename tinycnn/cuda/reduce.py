"""Sums over what all threads of a block hold, in an order that is always the same."""

from tinycnn.cuda._launch import device, phase

FEW = 8  # threads that add what the others have summed


@phase
def fold(tid, nt, few, some):
    """few[t] = some[t] + some[t + FEW] + ...; some: (nt,)"""
    if tid < FEW:
        total = some[tid]
        for t in range(tid + FEW, nt, FEW):
            total += some[t]
        few[tid] = total


@device
def total(few):
    """What `fold` has left, added."""
    sum_ = few[0]
    for i in range(1, FEW):
        sum_ += few[i]
    return sum_
