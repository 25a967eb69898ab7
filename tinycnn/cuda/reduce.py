"""Sums over the threads of a block, in two steps and in a fixed order, so that results are bitwise reproducible.
And the last block of a launch, which does what needs the results of all.

values[tid] = ...;  cuda.syncthreads()
block_reduce(tid, nt, partials, values);  cuda.syncthreads()
reduce(partials)        in any thread
"""

from tinycnn.cuda._launch import U32, cuda, device_function, phase

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


@device_function
def is_last_block(tid, counters, index, count, shared_flag):
    """Whether this block is the last of the `count` that call this with `index`; it sees what all of them have written.

    counters: uint32, zero before the launch and after it   shared_flag: (1,) uint32, shared

    All threads of a block call it: it has barriers.  Which block is the last differs from run to run, so no result may
    depend on that (threadFenceReduction of the CUDA samples).
    """
    cuda.threadfence()
    cuda.syncthreads()
    if tid == 0:
        shared_flag[0] = cuda.atomic.inc(counters, index, U32(count - 1))  # back to 0 after count - 1
    cuda.syncthreads()
    last = shared_flag[0] == U32(count - 1)
    if last:
        cuda.threadfence()
    return last
