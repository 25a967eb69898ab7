"""Average and max pooling, forward and backward.  GPU version of tinycnn/kernels/pooling.py, which has all shapes.

Forward, a thread computes one output from its window.  Backward, a thread computes the gradient of one input pixel from
the windows that contain it.  No two threads add to the same entry, so the result does not depend on their order.

fused.py calls the same kernels with an activation, `code` with its constants: see activations.py.
"""

from tinycnn.cuda._launch import THREADS, blocks, cuda, device_function, divmod32, kernel, phase, ravel
from tinycnn.cuda.activations import (
    NO_ACTIVATION,
    NONE,
    gradient_arguments,
    gradient_in_place,
    value_arguments,
    value_in_place,
)


@device_function
def window_length(i, size, step, pad, length, count_include_pad):
    """Number of entries of window i along an axis of `length`, with or without the padding."""
    start = i * step - pad
    stop = min(start + size, length + pad)
    if not count_include_pad:
        start, stop = max(start, 0), min(stop, length)
    return stop - start


def window_extent(kernel_size, dilation):
    """Rows and columns from the first to the last entry of a window."""
    return tuple(d * (k - 1) + 1 for k, d in zip(kernel_size, dilation, strict=True))


@device_function
def windows_containing(i, size, step, count):
    """(first, last + 1) of the windows that contain row i; `count` windows, w has rows w*step ... w*step + size - 1."""
    return divmod32(max(i - size + step, 0), step)[0], min(divmod32(i, step)[0] + 1, count)


@phase
def average_window(
    tid, nt, first, y, x, code, a, b, size, out, kernel_size, stride, padding, count_include_pad, divisor
):  # fmt: skip
    """The mean of a window.  With an activation, of its values, which overwrite x: windows must be disjoint."""
    e = first + tid
    if e < y.size:
        plane, index = divmod32(e, out[0] * out[1])
        i, j = divmod32(index, out[1])
        h0, w0 = i * stride[0] - padding[0], j * stride[1] - padding[1]
        total = x.dtype.type(0)
        for h in range(max(h0, 0), min(h0 + kernel_size[0], size[0])):
            row = (plane * size[0] + h) * size[1]
            for w in range(max(w0, 0), min(w0 + kernel_size[1], size[1])):
                pixel = x[row + w]
                if code != NONE:
                    pixel = value_in_place(code, pixel, a, b)
                    x[row + w] = pixel
                total += pixel
        count = divisor
        if divisor == 0:
            count = window_length(i, kernel_size[0], stride[0], padding[0], size[0], count_include_pad)
            count *= window_length(j, kernel_size[1], stride[1], padding[1], size[1], count_include_pad)
        y[e] = total / x.dtype.type(count)


@kernel(THREADS, registers=64)
def avg_pool2d_forward_kernel(y, x, code, a, b, size, out, kernel_size, stride, padding, count_include_pad, divisor):
    first = cuda.blockIdx.x * THREADS
    average_window(
        cuda.threadIdx.x, THREADS, first, y, x, code, a, b, size, out, kernel_size, stride, padding,
        count_include_pad, divisor,
    )  # fmt: skip


def avg_pool2d_forward(y, x, kernel_size, stride, padding, count_include_pad, divisor):
    """y = mean of each window, or its sum / divisor if divisor > 0."""
    avg_pool2d_forward_kernel[blocks(y.size)](
        ravel(y), ravel(x), *value_arguments(NO_ACTIVATION, x.dtype), x.shape[2:], y.shape[2:], kernel_size, stride,
        padding, count_include_pad, divisor,
    )  # fmt: skip


@phase
def spread_average(
    tid, nt, first, dx, dy, code, c, d, size, out, kernel_size, stride, padding, count_include_pad, divisor
):  # fmt: skip
    """The gradient of a pixel.  With an activation, dx is its value on entry, of pixels in windows."""
    e = first + tid
    if e < dx.size:
        plane, index = divmod32(e, size[0] * size[1])
        h, w = divmod32(index, size[1])
        h, w = h + padding[0], w + padding[1]
        total = dx.dtype.type(0)
        in_window = False
        for i in range(*windows_containing(h, kernel_size[0], stride[0], out[0])):
            rows = window_length(i, kernel_size[0], stride[0], padding[0], size[0], count_include_pad)
            for j in range(*windows_containing(w, kernel_size[1], stride[1], out[1])):
                columns = window_length(j, kernel_size[1], stride[1], padding[1], size[1], count_include_pad)
                count = divisor if divisor > 0 else rows * columns
                total += dy[(plane * out[0] + i) * out[1] + j] / dx.dtype.type(count)
                in_window = True
        if code != NONE and in_window:  # the value of a pixel in no window is not known
            total = gradient_in_place(code, total, dx[e], c, d)
        dx[e] = total


@kernel(THREADS, registers=64)
def avg_pool2d_backward_kernel(
    dx, dy, code, c, d, size, out, kernel_size, stride, padding, count_include_pad, divisor
):  # fmt: skip
    first = cuda.blockIdx.x * THREADS
    spread_average(
        cuda.threadIdx.x, THREADS, first, dx, dy, code, c, d, size, out, kernel_size, stride, padding,
        count_include_pad, divisor,
    )  # fmt: skip


def avg_pool2d_backward(dx, dy, kernel_size, stride, padding, count_include_pad, divisor):
    avg_pool2d_backward_kernel[blocks(dx.size)](
        ravel(dx), ravel(dy), *gradient_arguments(NO_ACTIVATION, dx.dtype), dx.shape[2:], dy.shape[2:], kernel_size,
        stride, padding, count_include_pad, divisor,
    )  # fmt: skip


@phase
def max_of_window(
    tid, nt, first, y, indices, x, lowest, code, a, b, size, out, kernel_size, stride, padding, dilation
):  # fmt: skip
    e = first + tid
    if e < y.size:
        plane, index = divmod32(e, out[0] * out[1])
        i, j = divmod32(index, out[1])
        h0, w0 = i * stride[0] - padding[0], j * stride[1] - padding[1]
        best, argmax = lowest, -1
        for u in range(kernel_size[0]):
            h = h0 + u * dilation[0]
            for v in range(kernel_size[1]):
                w = w0 + v * dilation[1]
                if h >= 0 and h < size[0] and w >= 0 and w < size[1]:
                    value = x[(plane * size[0] + h) * size[1] + w]
                    if value > best or value != value or argmax < 0:
                        best, argmax = value, h * size[1] + w
        y[e] = value_in_place(code, best, a, b)
        indices[e] = argmax


@kernel(THREADS, registers=64)
def max_pool2d_forward_kernel(y, indices, x, lowest, code, a, b, size, out, kernel_size, stride, padding, dilation):
    first = cuda.blockIdx.x * THREADS
    max_of_window(
        cuda.threadIdx.x, THREADS, first, y, indices, x, lowest, code, a, b, size, out, kernel_size, stride, padding,
        dilation,
    )  # fmt: skip


def max_pool2d_forward(y, indices, x, kernel_size, stride, padding, dilation):
    """y = largest entry of each window, indices = its position h*W + w in the plane.  As in torch, the first of equal
    entries, and NaN if there is one.  indices: int32, shape of y."""
    max_pool2d_forward_kernel[blocks(y.size)](
        ravel(y), ravel(indices), ravel(x), x.dtype.type("-inf"), *value_arguments(NO_ACTIVATION, x.dtype), x.shape[2:],
        y.shape[2:], kernel_size, stride, padding, dilation,
    )  # fmt: skip


@phase
def route_gradient(tid, nt, first, dx, dy, indices, y, code, c, d, size, out, extent, stride, padding):
    e = first + tid
    if e < dx.size:
        plane, index = divmod32(e, size[0] * size[1])
        h, w = divmod32(index, size[1])
        h, w = h + padding[0], w + padding[1]
        total = dx.dtype.type(0)
        for i in range(*windows_containing(h, extent[0], stride[0], out[0])):
            for j in range(*windows_containing(w, extent[1], stride[1], out[1])):
                o = (plane * out[0] + i) * out[1] + j
                if indices[o] == index:
                    total += dy[o] if code == NONE else gradient_in_place(code, dy[o], y[o], c, d)
        dx[e] = total


@kernel(THREADS, registers=64)
def max_pool2d_backward_kernel(dx, dy, indices, y, code, c, d, size, out, extent, stride, padding):
    first = cuda.blockIdx.x * THREADS
    route_gradient(cuda.threadIdx.x, THREADS, first, dx, dy, indices, y, code, c, d, size, out, extent, stride, padding)


def max_pool2d_backward(dx, dy, indices, kernel_size, stride, padding, dilation):
    extent = window_extent(kernel_size, dilation)
    max_pool2d_backward_kernel[blocks(dx.size)](
        ravel(dx), ravel(dy), ravel(indices), ravel(dy), *gradient_arguments(NO_ACTIVATION, dx.dtype),
        dx.shape[2:], dy.shape[2:], extent, stride, padding,
    )  # fmt: skip


# --- adaptive: windows from floor(i*H / OH) to ceil((i + 1)*H / OH) ---------------------------------------------------


@device_function
def adaptive_window(i, size, out):
    """(first, end) of window i of `out` windows over an axis of `size`."""
    return divmod32(i * size, out)[0], divmod32((i + 1) * size + out - 1, out)[0]


@device_function
def adaptive_windows_containing(h, size, out):
    """(first, end) of the windows that contain row h: those with floor(i*H / OH) <= h < ceil((i + 1)*H / OH)."""
    return divmod32(h * out, size)[0], divmod32((h + 1) * out + size - 1, size)[0]


@phase
def adaptive_average(tid, nt, first, y, x, size, out):
    e = first + tid
    if e < y.size:
        plane, index = divmod32(e, out[0] * out[1])
        i, j = divmod32(index, out[1])
        h0, h1 = adaptive_window(i, size[0], out[0])
        w0, w1 = adaptive_window(j, size[1], out[1])
        total = x.dtype.type(0)
        for h in range(h0, h1):
            for w in range(w0, w1):
                total += x[(plane * size[0] + h) * size[1] + w]
        y[e] = total / x.dtype.type((h1 - h0) * (w1 - w0))


@kernel(THREADS, registers=64)
def adaptive_forward_kernel(y, x, size, out):
    adaptive_average(cuda.threadIdx.x, THREADS, cuda.blockIdx.x * THREADS, y, x, size, out)


def adaptive_avg_pool2d_forward(y, x):
    """y[i, j] = mean of its window.   x: (N, C, H, W)   y: (N, C, OH, OW)"""
    adaptive_forward_kernel[blocks(y.size)](ravel(y), ravel(x), x.shape[2:], y.shape[2:])


@phase
def spread_adaptive(tid, nt, first, dx, dy, size, out):
    e = first + tid
    if e < dx.size:
        plane, index = divmod32(e, size[0] * size[1])
        h, w = divmod32(index, size[1])
        i0, i1 = adaptive_windows_containing(h, size[0], out[0])
        j0, j1 = adaptive_windows_containing(w, size[1], out[1])
        total = dx.dtype.type(0)
        for i in range(i0, i1):
            h0, h1 = adaptive_window(i, size[0], out[0])
            for j in range(j0, j1):
                w0, w1 = adaptive_window(j, size[1], out[1])
                total += dy[(plane * out[0] + i) * out[1] + j] / dx.dtype.type((h1 - h0) * (w1 - w0))
        dx[e] = total


@kernel(THREADS, registers=80)
def adaptive_backward_kernel(dx, dy, size, out):
    spread_adaptive(cuda.threadIdx.x, THREADS, cuda.blockIdx.x * THREADS, dx, dy, size, out)


def adaptive_avg_pool2d_backward(dx, dy):
    """dx[h, w] = sum of dy / size of the window, over the windows with the pixel."""
    adaptive_backward_kernel[blocks(dx.size)](ravel(dx), ravel(dy), dx.shape[2:], dy.shape[2:])
