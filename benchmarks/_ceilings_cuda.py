"""The kernels of `_ceilings.GpuCeilings`: a copy, and fused multiply-adds."""

from tinycnn.cuda._launch import THREADS, blocks, cuda, kernel, phase, ravel

STEPS, CHAINS = 256, 8
FMAS_PER_THREAD = STEPS * CHAINS


@phase
def copy_phase(tid, nt, first, y, x):
    i = first + tid
    if i < y.size:
        y[i] = x[i]


@kernel(THREADS, registers=32)
def copy_kernel(y, x):
    copy_phase(cuda.threadIdx.x, THREADS, cuda.blockIdx.x * THREADS, y, x)


@phase
def chain_phase(tid, nt, first, y, x):
    """CHAINS independent chains of multiply-adds, to hide latency."""
    m = x[0]
    a, b, c, d, e, f, g, h = x[1], x[2], x[3], x[4], x[5], x[6], x[7], x[8]
    for _ in range(STEPS):
        a, b, c, d = a * m + m, b * m + m, c * m + m, d * m + m
        e, f, g, h = e * m + m, f * m + m, g * m + m, h * m + m
    i = first + tid
    if i < y.size:
        y[i] = ((a + b) + (c + d)) + ((e + f) + (g + h))


@kernel(THREADS, registers=64)
def chain_kernel(y, x):
    chain_phase(cuda.threadIdx.x, THREADS, cuda.blockIdx.x * THREADS, y, x)


def copy(y, x):
    copy_kernel[blocks(y.size)](ravel(y), ravel(x))


def multiply_adds(y, x):
    """FMAS_PER_THREAD multiply-adds per entry of y."""
    chain_kernel[blocks(y.size)](ravel(y), ravel(x))
