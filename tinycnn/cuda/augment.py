"""Random distortions of a batch.  GPU version of tinycnn/kernels/augment.py, with the same random numbers."""

import math

import numpy as np

from tinycnn import scalars
from tinycnn.cuda._launch import (
    THREADS,
    U32,
    blocks,
    cuda,
    device_function,
    divmod32,
    kernel,
    overload_by_dtype,
    phase,
    ravel,
    workspace,
)
from tinycnn.cuda.reduce import PARTIALS, block_reduce, reduce

splitmix64 = device_function(scalars.splitmix64)
uniform_from_high = device_function(scalars.uniform_from_high)
uniform_from_low = device_function(scalars.uniform_from_low)
sin, cos = overload_by_dtype(scalars.sin32, scalars.sin64), overload_by_dtype(scalars.cos32, scalars.cos64)
HALF = scalars.HALF


@device_function
def image_seed(counter, offset, seed, n):
    """The seed of image n.   offset: (1,), images of the batch before image 0"""
    return splitmix64(splitmix64(splitmix64(seed) + np.uint64(counter[0])) + np.uint64(offset[0]) + np.uint64(n))


@device_function
def uniform(start, draw, low, high):
    """Random number `draw` of an image, uniform in (low, high); start: the image's seed."""
    return (low + high) * HALF + (high - low) * HALF * uniform_from_high(splitmix64(start + np.uint64(draw)))


@phase
def draw_affine(tid, nt, first, matrices, counter, offset, seed, max_angle, max_shear, translate, scale, squeeze):
    """Affine maps, one thread per image."""
    n = first + tid
    if n < matrices.size // 6:
        start, m = image_seed(counter, offset, seed, n), matrices[6 * n :]
        angle, shear = uniform(start, 0, -max_angle, max_angle), uniform(start, 5, -max_shear, max_shear)
        x, y = uniform(start, 1, -translate[0], translate[0]), uniform(start, 2, -translate[1], translate[1])
        size, e = uniform(start, 3, scale[0], scale[1]), uniform(start, 4, squeeze[0], squeeze[1])
        s, c, slope = sin(angle), cos(angle), sin(shear) / cos(shear)
        ii, ij = c * e / size, -s * e / size
        ji, jj = (s + slope * c) / (size * e), (c - slope * s) / (size * e)
        m[0], m[1], m[2] = ii, ij, -(ii * y + ij * x)
        m[3], m[4], m[5] = ji, jj, -(ji * y + jj * x)


@kernel(THREADS, registers=32)
def random_affine_kernel(matrices, counter, offset, seed, max_angle, max_shear, translate, scale, squeeze):
    first = cuda.blockIdx.x * THREADS
    draw_affine(
        cuda.threadIdx.x,
        THREADS,
        first,
        matrices,
        counter,
        offset,
        seed,
        max_angle,
        max_shear,
        translate,
        scale,
        squeeze,
    )


def random_affine(matrices, counter, offset, seed, degrees, translate, scale, squeeze, shear):
    """A random affine map for every image; the CPU version has the formulas."""
    T = matrices.dtype.type
    max_angle, max_shear = T(math.radians(degrees)), T(math.radians(shear))
    pairs = (tuple(map(T, pair)) for pair in (translate, scale, squeeze))
    random_affine_kernel[blocks(len(matrices))](
        ravel(matrices), counter, offset, np.uint64(seed), max_angle, max_shear, *pairs
    )


@phase
def draw_noise_pixel(tid, nt, first, field, counter, offset, seed, plane):
    """Both components of the noise of a pixel."""
    e = first + tid
    if e < field.size // 2:
        n, k = divmod32(e, plane)
        word = splitmix64(image_seed(counter, offset, seed, n) + np.uint64(k))
        index = 2 * n * plane + k
        field[index], field[index + plane] = uniform_from_high(word), uniform_from_low(word)


@kernel(THREADS, registers=32)
def noise_kernel(field, counter, offset, seed, plane):
    draw_noise_pixel(cuda.threadIdx.x, THREADS, cuda.blockIdx.x * THREADS, field, counter, offset, seed, plane)


@phase
def convolve_axis(tid, nt, first, out, src, weights, size, stride, factor):
    """One entry of `out`: src convolved along an axis of `size` entries, `stride` apart, times `factor`."""
    e = first + tid
    if e < out.size:
        position, radius = divmod32(divmod32(e, stride)[0], size)[1], weights.size - 1
        total = src.dtype.type(0)
        for k in range(max(0, position - radius), min(size, position + radius + 1)):
            total += weights[U32(abs(k - position))] * src[U32(e + (k - position) * stride)]
        out[e] = total * factor


@kernel(THREADS, registers=40)
def convolve_axis_kernel(out, src, weights, size, stride, factor):
    convolve_axis(cuda.threadIdx.x, THREADS, cuda.blockIdx.x * THREADS, out, src, weights, size, stride, factor)


def elastic_field(field, weights, counter, offset, seed, alpha):
    """Smoothed noise; the CPU version has the formulas."""
    N, _, H, W = field.shape
    T, out = field.dtype.type, ravel(field)
    temporary = workspace(out.size, field.dtype, "elastic")
    noise_kernel[blocks(N * H * W)](out, counter, offset, np.uint64(seed), H * W)
    convolve_axis_kernel[blocks(out.size)](temporary, out, weights, W, 1, T(1))
    convolve_axis_kernel[blocks(out.size)](out, temporary, weights, H, W, T(alpha))


@device_function
def pixel(x, first, p, q, H, W, background):
    """Pixel (p - 1, q - 1) of the image that starts at `first`."""
    inside = p >= 1 and p <= H and q >= 1 and q <= W
    return x[first + (p - 1) * W + q - 1] if inside else background


@phase
def warp_pixel(tid, nt, first, y, x, matrices, field, background, channels, size, out, middle, centre, last):
    """One pixel of y.  Coordinates include a border of background, one pixel wide, around the image."""
    e = first + tid
    if e < y.size:
        zero = x.dtype.type(0)
        H, W, (OH, OW) = size[0], size[1], out
        plane, k = divmod32(e, OH * OW)
        n, c = divmod32(plane, channels)
        i, j = divmod32(k, OW)
        r, s = x.dtype.type(i) - middle[0], x.dtype.type(j) - middle[1]
        if matrices.size > 0:
            m = matrices[6 * n :]
            r, s = m[0] * r + m[1] * s + m[2], m[3] * r + m[4] * s + m[5]
        r, s = r + centre[0], s + centre[1]
        if field.size > 0:
            index = 2 * n * OH * OW + k
            r, s = r + field[index], s + field[index + OH * OW]
        r = r if r > zero else zero  # NaN becomes 0
        s = s if s > zero else zero
        r = r if r < last[0] else last[0]
        s = s if s < last[1] else last[1]
        p, q = int(r), int(s)
        fraction_h, fraction_w = r - x.dtype.type(p), s - x.dtype.type(q)
        start, outside = plane * H * W, background[c]
        top, bottom = pixel(x, start, p, q, H, W, outside), pixel(x, start, p + 1, q, H, W, outside)
        top += fraction_w * (pixel(x, start, p, q + 1, H, W, outside) - top)
        bottom += fraction_w * (pixel(x, start, p + 1, q + 1, H, W, outside) - bottom)
        y[e] = top + fraction_h * (bottom - top)


@kernel(THREADS, registers=40)
def warp_kernel(y, x, matrices, field, background, channels, size, out, middle, centre, last):
    first = cuda.blockIdx.x * THREADS
    warp_pixel(
        cuda.threadIdx.x, THREADS, first, y, x, matrices, field, background, channels, size, out, middle, centre, last
    )  # fmt: skip


def warp(y, x, matrices, field, background):
    """y[n, c] = x[n, c] sampled at the positions of an affine map and a field; the CPU version has the formulas."""
    T, size, out = x.dtype.type, x.shape[2:], y.shape[2:]
    middle, centre = (T((out[0] - 1) / 2), T((out[1] - 1) / 2)), (T((size[0] + 1) / 2), T((size[1] + 1) / 2))
    warp_kernel[blocks(y.size)](
        ravel(y), ravel(x), ravel(matrices), ravel(field), background, x.shape[1], size, out, middle, centre,
        (T(size[0] + 1), T(size[1] + 1)),
    )  # fmt: skip


@phase
def apply_brightness(tid, nt, values, x, counter, offset, seed, low, high, scale, shift, image, count, plane):
    """Change the brightness of an image, and sum this thread's pixels into `values`."""
    T = x.dtype.type
    factor, total = uniform(image_seed(counter, offset, seed, image), 0, low, high), T(0)
    for e in range(tid, count, nt):
        index, c = U32(image * count + e), U32(e) // U32(plane)
        value = (x[index] - shift[c]) / scale[c] * factor
        value = T(0) if value < T(0) else value
        value = T(1) if value > T(1) else value
        x[index] = value
        total += value
    values[tid] = total


@phase
def apply_contrast(tid, nt, partials, x, counter, offset, seed, low, high, scale, shift, image, count, plane):
    """Blend the pixels with their mean, whose sum is in `partials`, and normalise them again."""
    T = x.dtype.type
    factor = uniform(image_seed(counter, offset, seed, image), 1, low, high)
    grey = (T(1) - factor) * reduce(partials) / T(count)
    for e in range(tid, count, nt):
        index, c = U32(image * count + e), U32(e) // U32(plane)
        value = x[index] * factor + grey
        value = T(0) if value < T(0) else value
        value = T(1) if value > T(1) else value
        x[index] = value * scale[c] + shift[c]


@kernel(THREADS, registers=40)
def jitter_kernel(x, counter, offset, seed, brightness, contrast, scale, shift, count, plane):
    """One block per image."""
    values = cuda.shared.array(THREADS, x.dtype)
    partials = cuda.shared.array(PARTIALS, x.dtype)
    tid, image = cuda.threadIdx.x, cuda.blockIdx.x
    apply_brightness(
        tid, THREADS, values, x, counter, offset, seed, brightness[0], brightness[1], scale, shift, image, count, plane
    )  # fmt: skip
    cuda.syncthreads()
    block_reduce(tid, THREADS, partials, values)
    cuda.syncthreads()
    apply_contrast(
        tid, THREADS, partials, x, counter, offset, seed, contrast[0], contrast[1], scale, shift, image, count, plane
    )


def jitter(x, counter, offset, seed, brightness, contrast, scale, shift):
    """Change brightness and contrast of every image; the CPU version has the formulas."""
    N, C, H, W = x.shape
    T = x.dtype.type
    ranges = ((T(max(0.0, 1 - a)), T(1 + a)) for a in (brightness, contrast))
    jitter_kernel[N](ravel(x), counter, offset, np.uint64(seed), *ranges, scale, shift, C * H * W, H * W)
