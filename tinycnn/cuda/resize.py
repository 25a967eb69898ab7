"""Nearest upsampling and zero padding, one thread per output.  GPU version of tinycnn/kernels/resize.py."""

from tinycnn.cuda._launch import THREADS, blocks, cuda, divmod32, kernel, phase, ravel


@phase
def nearest_pixel(tid, nt, first, y, x, size, out):
    e = first + tid
    if e < y.size:
        plane, index = divmod32(e, out[0] * out[1])
        i, j = divmod32(index, out[1])
        h, w = divmod32(i * size[0], out[0])[0], divmod32(j * size[1], out[1])[0]
        y[e] = x[(plane * size[0] + h) * size[1] + w]


@kernel(THREADS, registers=40)
def upsample_forward_kernel(y, x, size, out):
    nearest_pixel(cuda.threadIdx.x, THREADS, cuda.blockIdx.x * THREADS, y, x, size, out)


def upsample_nearest2d_forward(y, x):
    """y[i, j] = x[i*H // OH, j*W // OW]"""
    upsample_forward_kernel[blocks(y.size)](ravel(y), ravel(x), x.shape[2:], y.shape[2:])


@phase
def sum_copies(tid, nt, first, dx, dy, size, out):
    """The copies of row h are the rows i with i*H // OH = h: ceil(h*OH / H) ... ceil((h + 1)*OH / H) - 1."""
    e = first + tid
    if e < dx.size:
        plane, index = divmod32(e, size[0] * size[1])
        h, w = divmod32(index, size[1])
        i0 = divmod32(h * out[0] + size[0] - 1, size[0])[0]
        i1 = divmod32((h + 1) * out[0] + size[0] - 1, size[0])[0]
        j0 = divmod32(w * out[1] + size[1] - 1, size[1])[0]
        j1 = divmod32((w + 1) * out[1] + size[1] - 1, size[1])[0]
        total = dx.dtype.type(0)
        for i in range(i0, i1):
            for j in range(j0, j1):
                total += dy[(plane * out[0] + i) * out[1] + j]
        dx[e] = total


@kernel(THREADS, registers=64)
def upsample_backward_kernel(dx, dy, size, out):
    sum_copies(cuda.threadIdx.x, THREADS, cuda.blockIdx.x * THREADS, dx, dy, size, out)


def upsample_nearest2d_backward(dx, dy):
    """dx[h, w] = sum of the dy of its copies."""
    upsample_backward_kernel[blocks(dx.size)](ravel(dx), ravel(dy), dx.shape[2:], dy.shape[2:])


@phase
def padded_pixel(tid, nt, first, y, x, size, out, offset):
    e = first + tid
    if e < y.size:
        plane, index = divmod32(e, out[0] * out[1])
        i, j = divmod32(index, out[1])
        h, w = i - offset[0], j - offset[1]
        inside = h >= 0 and h < size[0] and w >= 0 and w < size[1]
        y[e] = x[(plane * size[0] + h) * size[1] + w] if inside else x.dtype.type(0)


@kernel(THREADS, registers=40)
def zero_pad2d_kernel(y, x, size, out, offset):
    padded_pixel(cuda.threadIdx.x, THREADS, cuda.blockIdx.x * THREADS, y, x, size, out, offset)


def zero_pad2d(y, x, offset):
    """y[i, j] = x[i - top, j - left], or 0 outside of x.   offset: (top, left), which may be negative"""
    zero_pad2d_kernel[blocks(y.size)](ravel(y), ravel(x), x.shape[2:], y.shape[2:], offset)
