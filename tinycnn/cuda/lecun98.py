"""The layers and losses of the 1998 LeNet-5.  GPU version of tinycnn/kernels/lecun98.py, which has all shapes.

Forward: one thread per output.  Backward: one thread per input, or one block per sum.
"""

import math

from tinycnn.cuda._launch import THREADS, blocks, cuda, divmod32, kernel, phase, ravel
from tinycnn.cuda.reduce import PARTIALS, block_reduce, reduce


@phase
def write_gradients(tid, nt, dweight, dbias, c, weight_partials, bias_partials, scale):
    """The gradients of map c; dweight's sum is multiplied by `scale`."""
    if tid == 0:
        dweight[c], dbias[c] = reduce(weight_partials) * scale, reduce(bias_partials)


# --- subsampling ------------------------------------------------------------------------------------------------------


@phase
def sum_window(tid, nt, first, y, x, weight, bias, C, size, out, kernel_size, scale):
    e = first + tid
    if e < y.size:
        plane, index = divmod32(e, out[0] * out[1])
        (i, j), c = divmod32(index, out[1]), divmod32(plane, C)[1]
        h, w = i * kernel_size[0], j * kernel_size[1]
        total = x.dtype.type(0)
        for u in range(kernel_size[0]):
            for v in range(kernel_size[1]):
                total += x[(plane * size[0] + h + u) * size[1] + w + v]
        y[e] = weight[c] * scale * total + bias[c]


@kernel(THREADS, registers=64)
def subsample_forward_kernel(y, x, weight, bias, C, size, out, kernel_size, scale):
    first = cuda.blockIdx.x * THREADS
    sum_window(cuda.threadIdx.x, THREADS, first, y, x, weight, bias, C, size, out, kernel_size, scale)


def subsample_forward(y, x, weight, bias, kernel_size, scale):
    """y[n, c] = weight[c] * scale * (sum of each window) + bias[c]."""
    subsample_forward_kernel[blocks(y.size)](
        ravel(y), ravel(x), weight, bias, x.shape[1], x.shape[2:], y.shape[2:], kernel_size, x.dtype.type(scale)
    )


@phase
def spread_gradient(tid, nt, first, dx, dy, weight, C, size, out, kernel_size, scale):
    e = first + tid
    if e < dx.size:
        plane, index = divmod32(e, size[0] * size[1])
        h, w = divmod32(index, size[1])
        i, j, c = divmod32(h, kernel_size[0])[0], divmod32(w, kernel_size[1])[0], divmod32(plane, C)[1]
        value = dx.dtype.type(0)
        if i < out[0] and j < out[1]:
            value = weight[c] * scale * dy[(plane * out[0] + i) * out[1] + j]
        dx[e] = value


@kernel(THREADS, registers=64)
def subsample_input_kernel(dx, dy, weight, C, size, out, kernel_size, scale):
    first = cuda.blockIdx.x * THREADS
    spread_gradient(cuda.threadIdx.x, THREADS, first, dx, dy, weight, C, size, out, kernel_size, scale)


@phase
def sum_weight_gradients(tid, nt, weight_sums, bias_sums, dy, x, c, N, C, size, out, kernel_size):
    """This thread's part of the sums of dy * window and of dy over map c."""
    weight_sum, bias_sum = x.dtype.type(0), x.dtype.type(0)
    for e in range(tid, N * out[0] * out[1], nt):
        n, index = divmod32(e, out[0] * out[1])
        i, j = divmod32(index, out[1])
        h, w = i * kernel_size[0], j * kernel_size[1]
        total = x.dtype.type(0)
        for u in range(kernel_size[0]):
            for v in range(kernel_size[1]):
                total += x[((n * C + c) * size[0] + h + u) * size[1] + w + v]
        g = dy[(n * C + c) * out[0] * out[1] + index]
        weight_sum += g * total
        bias_sum += g
    weight_sums[tid], bias_sums[tid] = weight_sum, bias_sum


@kernel(THREADS, registers=64)
def subsample_weight_kernel(dweight, dbias, dy, x, N, C, size, out, kernel_size, scale):
    """Block x: map x."""
    weight_sums = cuda.shared.array(THREADS, x.dtype)
    bias_sums = cuda.shared.array(THREADS, x.dtype)
    weight_partials = cuda.shared.array(PARTIALS, x.dtype)
    bias_partials = cuda.shared.array(PARTIALS, x.dtype)
    tid, c = cuda.threadIdx.x, cuda.blockIdx.x
    sum_weight_gradients(tid, THREADS, weight_sums, bias_sums, dy, x, c, N, C, size, out, kernel_size)
    cuda.syncthreads()
    block_reduce(tid, THREADS, weight_partials, weight_sums)
    block_reduce(tid, THREADS, bias_partials, bias_sums)
    cuda.syncthreads()
    write_gradients(tid, THREADS, dweight, dbias, c, weight_partials, bias_partials, scale)


def subsample_backward(dx, dweight, dbias, dy, x, weight, kernel_size, scale):
    """Gradients of all three arguments of `subsample_forward`; dx of size 0 is not computed."""
    (N, C, H, W), scale = x.shape, x.dtype.type(scale)
    window = (H, W), dy.shape[2:], kernel_size, scale
    subsample_weight_kernel[C](dweight, dbias, ravel(dy), ravel(x), N, C, *window)
    if dx.size:
        subsample_input_kernel[blocks(dx.size)](ravel(dx), ravel(dy), weight, C, *window)


# --- convolution with a connection table ------------------------------------------------------------------------------


@phase
def convolve_pixel(tid, nt, first, y, x, w, b, sources, starts, C, O, size, out, kernel_size):
    e = first + tid
    if e < y.size:
        plane, index = divmod32(e, out[0] * out[1])
        (n, o), (i, j) = divmod32(plane, O), divmod32(index, out[1])
        total = b[o]
        for p in range(starts[o], starts[o + 1]):
            for u in range(kernel_size[0]):
                row = ((n * C + sources[p]) * size[0] + i + u) * size[1] + j
                for v in range(kernel_size[1]):
                    total += w[(p * kernel_size[0] + u) * kernel_size[1] + v] * x[row + v]
        y[e] = total


@kernel(THREADS, registers=80)
def conv2d_map_forward_kernel(y, x, w, b, sources, starts, C, O, size, out, kernel_size):
    first = cuda.blockIdx.x * THREADS
    convolve_pixel(cuda.threadIdx.x, THREADS, first, y, x, w, b, sources, starts, C, O, size, out, kernel_size)


def conv2d_map_forward(y, x, w, b, sources, starts):
    """y[n, o] = b[o] + sum of x[n, sources[p]] convolved with w[p] over the pairs p of output o."""
    conv2d_map_forward_kernel[blocks(y.size)](
        ravel(y), ravel(x), ravel(w), b, sources, starts, x.shape[1], y.shape[1], x.shape[2:], y.shape[2:], w.shape[1:]
    )


@phase
def convolve_gradient(tid, nt, first, dx, dy, w, sources, starts, C, O, size, out, kernel_size):
    e = first + tid
    if e < dx.size:
        plane, index = divmod32(e, size[0] * size[1])
        (n, c), (h, k) = divmod32(plane, C), divmod32(index, size[1])
        total = dx.dtype.type(0)
        for o in range(O):
            for p in range(starts[o], starts[o + 1]):
                if sources[p] == c:
                    for u in range(max(0, h - out[0] + 1), min(kernel_size[0], h + 1)):
                        row = ((n * O + o) * out[0] + h - u) * out[1] + k
                        for v in range(max(0, k - out[1] + 1), min(kernel_size[1], k + 1)):
                            total += w[(p * kernel_size[0] + u) * kernel_size[1] + v] * dy[row - v]
        dx[e] = total


@kernel(THREADS, registers=80)
def conv2d_map_input_kernel(dx, dy, w, sources, starts, C, O, size, out, kernel_size):
    first = cuda.blockIdx.x * THREADS
    convolve_gradient(cuda.threadIdx.x, THREADS, first, dx, dy, w, sources, starts, C, O, size, out, kernel_size)


@phase
def sum_tap_gradient(tid, nt, weight_sums, bias_sums, dy, x, sources, starts, p, tap, N, C, O, size, out, kernel_size):
    """This thread's part of the sums of dy*x for tap `tap` of pair p, and of dy of the pair's output."""
    o = 0
    while starts[o + 1] <= p:
        o += 1
    u, v = divmod32(tap, kernel_size[1])
    weight_sum, bias_sum = x.dtype.type(0), x.dtype.type(0)
    for e in range(tid, N * out[0] * out[1], nt):
        n, index = divmod32(e, out[0] * out[1])
        i, j = divmod32(index, out[1])
        g = dy[(n * O + o) * out[0] * out[1] + index]
        weight_sum += g * x[((n * C + sources[p]) * size[0] + i + u) * size[1] + j + v]
        bias_sum += g
    weight_sums[tid], bias_sums[tid] = weight_sum, bias_sum


@phase
def write_tap_gradient(tid, nt, dw, db, weight_partials, bias_partials, starts, O, p, tap, taps):
    """The gradient of a tap; the block of the first tap of an output's first pair also writes db."""
    if tid == 0:
        dw[p * taps + tap] = reduce(weight_partials)
        if tap == 0:
            for o in range(O):
                if starts[o] == p and starts[o + 1] > p:
                    db[o] = reduce(bias_partials)


@kernel(THREADS, registers=64)
def conv2d_map_weight_kernel(dw, db, dy, x, sources, starts, N, C, O, size, out, kernel_size):
    """Block (x, y): tap x of pair y."""
    weight_sums = cuda.shared.array(THREADS, x.dtype)
    bias_sums = cuda.shared.array(THREADS, x.dtype)
    weight_partials = cuda.shared.array(PARTIALS, x.dtype)
    bias_partials = cuda.shared.array(PARTIALS, x.dtype)
    tid, tap, p = cuda.threadIdx.x, cuda.blockIdx.x, cuda.blockIdx.y
    sum_tap_gradient(
        tid, THREADS, weight_sums, bias_sums, dy, x, sources, starts, p, tap, N, C, O, size, out, kernel_size
    )
    cuda.syncthreads()
    block_reduce(tid, THREADS, weight_partials, weight_sums)
    block_reduce(tid, THREADS, bias_partials, bias_sums)
    cuda.syncthreads()
    write_tap_gradient(
        tid, THREADS, dw, db, weight_partials, bias_partials, starts, O, p, tap, kernel_size[0] * kernel_size[1]
    )


def conv2d_map_backward(dx, dw, db, dy, x, w, sources, starts):
    """Gradients of all three arguments of `conv2d_map_forward`; dx of size 0 is not computed."""
    (N, C, H, W), O, kernel_size = x.shape, dy.shape[1], w.shape[1:]
    window = C, O, (H, W), dy.shape[2:], kernel_size
    conv2d_map_weight_kernel[(kernel_size[0] * kernel_size[1], len(w))](
        ravel(dw), db, ravel(dy), ravel(x), sources, starts, N, *window
    )
    if dx.size:
        conv2d_map_input_kernel[blocks(dx.size)](ravel(dx), ravel(dy), ravel(w), sources, starts, *window)


# --- distances --------------------------------------------------------------------------------------------------------


@phase
def squared_distance(tid, nt, first, y, x, w, K, F):
    e = first + tid
    if e < y.size:
        n, i = divmod32(e, K)
        total = x.dtype.type(0)
        for f in range(F):
            difference = x[n * F + f] - w[i * F + f]
            total += difference * difference
        y[e] = total


@kernel(THREADS, registers=40)
def squared_distance_forward_kernel(y, x, w, K, F):
    squared_distance(cuda.threadIdx.x, THREADS, cuda.blockIdx.x * THREADS, y, x, w, K, F)


def squared_distance_forward(y, x, w):
    """y[n, i] = |x[n] - w[i]|^2"""
    squared_distance_forward_kernel[blocks(y.size)](ravel(y), ravel(x), ravel(w), len(w), x.shape[1])


@phase
def accumulate_differences(tid, nt, first, da, dy, a, b, rows, F, stride_row, stride_other):
    """da[r, f] = 2 sum over q of dy[r*stride_row + q*stride_other] * (a[r, f] - b[q, f])"""
    e = first + tid
    if e < da.size:
        r, f = divmod32(e, F)
        total = da.dtype.type(0)
        for q in range(rows):
            total += dy[r * stride_row + q * stride_other] * (a[e] - b[q * F + f])
        da[e] = total + total


@kernel(THREADS, registers=48)
def squared_distance_backward_kernel(da, dy, a, b, rows, F, stride_row, stride_other):
    first = cuda.blockIdx.x * THREADS
    accumulate_differences(cuda.threadIdx.x, THREADS, first, da, dy, a, b, rows, F, stride_row, stride_other)


def squared_distance_backward(dx, dw, dy, x, w):
    """Gradients of both arguments of `squared_distance_forward`; dx and dw of size 0 are not computed."""
    (N, F), K = x.shape, len(w)
    if dx.size:
        squared_distance_backward_kernel[blocks(dx.size)](ravel(dx), ravel(dy), ravel(x), ravel(w), K, F, K, 1)
    if dw.size:
        squared_distance_backward_kernel[blocks(dw.size)](ravel(dw), ravel(dy), ravel(w), ravel(x), N, F, 1, K)


@phase
def image_loss(tid, nt, first, loss, predicted, dx, x, target, K, rubbish, unit, scale):
    n = first + tid
    if n < loss.size:
        T, t = x.dtype.type, target[n]
        row, grad, best = x[n * K :], dx[n * K :], 0
        for k in range(1, K):
            if row[k] < row[best] or row[k] != row[k]:
                best = k
        predicted[n] = best
        value = unit * row[t]
        if rubbish < T(0):
            for k in range(K):
                grad[k] = unit * scale if k == t else T(0)
        else:
            minimum = min(unit * row[best], rubbish)
            norm = T(math.exp(minimum - rubbish))
            for k in range(K):
                norm += T(math.exp(minimum - unit * row[k]))
            value += T(math.log(norm)) - minimum
            for k in range(K):
                probability = T(math.exp(minimum - unit * row[k])) / norm
                grad[k] = ((T(1) if k == t else T(0)) - probability) * (unit * scale)
        loss[n] = value * scale


@kernel(THREADS, registers=64)
def rbf_loss_kernel(loss, predicted, dx, x, target, K, rubbish, unit, scale):
    first = cuda.blockIdx.x * THREADS
    image_loss(cuda.threadIdx.x, THREADS, first, loss, predicted, dx, x, target, K, rubbish, unit, scale)


def rbf_loss(loss, predicted, dx, x, target, rubbish, factor, mean):
    """Losses of squared distances, eq. 8 and eq. 9; the CPU version has the formulas."""
    N, K = x.shape
    T = x.dtype.type
    constants = T(rubbish), T(factor), T(1 / N if mean else 1.0)
    rbf_loss_kernel[blocks(N)](loss, predicted, ravel(dx), ravel(x), target, K, *constants)
