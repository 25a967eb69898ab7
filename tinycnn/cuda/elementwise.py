"""Sums: of two arrays, of maps and a bias.  GPU version of tinycnn/kernels/elementwise.py, which has all shapes."""

from tinycnn.cuda._launch import THREADS, blocks, cuda, divmod32, kernel, phase, ravel
from tinycnn.cuda.reduce import PARTIALS, block_reduce, reduce


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


@phase
def add_bias_phase(tid, nt, first, y, b, pixels):
    i = first + tid
    if i < y.size:
        plane = divmod32(i, pixels)[0]
        y[i] += b[divmod32(plane, b.size)[1]]


@kernel(THREADS, registers=32)
def add_bias_kernel(y, b, pixels):
    add_bias_phase(cuda.threadIdx.x, THREADS, cuda.blockIdx.x * THREADS, y, b, pixels)


def add_bias(y, b):
    """y[n, c] += b[c].   y: (N, C, H, W)   b: (C,)"""
    add_bias_kernel[blocks(y.size)](ravel(y), b, y.shape[2] * y.shape[3])


@phase
def sum_pixels(tid, nt, c, values, dy, channels, pixels):
    total, count = dy.dtype.type(0), divmod32(dy.size, channels)[0]
    for k in range(tid, count, nt):
        n, pixel = divmod32(k, pixels)
        total += dy[(n * channels + c) * pixels + pixel]
    values[tid] = total


@phase
def store_sum(tid, nt, c, db, partials):
    if tid == 0:
        db[c] = reduce(partials)


@kernel(THREADS, registers=40)
def sum_channels_kernel(db, dy, pixels):
    """One block per channel."""
    values = cuda.shared.array(THREADS, dy.dtype)
    partials = cuda.shared.array(PARTIALS, dy.dtype)
    tid = cuda.threadIdx.x
    sum_pixels(tid, THREADS, cuda.blockIdx.x, values, dy, db.size, pixels)
    cuda.syncthreads()
    block_reduce(tid, THREADS, partials, values)
    cuda.syncthreads()
    store_sum(tid, THREADS, cuda.blockIdx.x, db, partials)


def sum_channels(db, dy):
    """db[c] = sum of dy[n, c] over images and pixels.   dy: (N, C, H, W)   db: (C,)"""
    sum_channels_kernel[db.size](db, ravel(dy), dy.shape[2] * dy.shape[3])
