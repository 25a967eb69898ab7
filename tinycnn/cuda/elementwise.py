"""Sums of arrays: one thread per element.  GPU version of tinycnn/kernels/elementwise.py."""

from tinycnn.cuda._launch import THREADS, blocks, cuda, kernel, phase


@phase
def add_phase(tid, nt, first, y, a, b):
    i = first + tid
    if i < y.size:
        y[i] = a[i] + b[i]


@kernel(THREADS, registers=32)
def add_kernel(y, a, b):
    add_phase(cuda.threadIdx.x, THREADS, cuda.blockIdx.x * THREADS, y, a, b)


def add(y, a, b):
    """y = a + b; y may be a or b.   y, a, b: (n,)"""
    add_kernel[blocks(y.size)](y, a, b)
