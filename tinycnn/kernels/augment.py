"""Random distortions of a batch: affine maps, elastic fields, one interpolation for both, brightness and contrast.

As in dropout.py there is no generator state: a random number is a hash of seed, training step, the image's index in the
batch and the index of the draw.  It is the same for any number of threads and any device.

Positions and displacements are (row, column), in pixels.
"""

import math

import numpy as np
from numba import prange

from tinycnn import scalars
from tinycnn.kernels._jit import device_function, kernel, overload_by_dtype

splitmix64 = device_function(scalars.splitmix64)
uniform_from_high = device_function(scalars.uniform_from_high)
uniform_from_low = device_function(scalars.uniform_from_low)
sin, cos = overload_by_dtype(scalars.sin32, scalars.sin64), overload_by_dtype(scalars.cos32, scalars.cos64)
HALF = scalars.HALF
TAPS = 4  # weights on either side that one pass of `smooth` applies


@device_function
def first_draw(counter, offset, seed, n):
    """Stream of random numbers of image n: draw k is splitmix64(first_draw + k).

    offset: (1,) int64, images of the batch before image 0
    """
    return splitmix64(
        splitmix64(splitmix64(np.uint64(seed)) + np.uint64(counter[0])) + np.uint64(offset[0]) + np.uint64(n)
    )


@device_function
def uniform(start, draw, low, high):
    """Uniform between low and high; exactly low if both are equal."""
    return (low + high) * HALF + (high - low) * HALF * uniform_from_high(splitmix64(start + np.uint64(draw)))


@kernel
def random_affine(matrices, counter, offset, seed, degrees, translate, scale, squeeze, shear):
    """A random affine map per image, from an output pixel to the input position that it samples, both relative to the
    image centre.

    The input is squeezed (columns * e, rows / e), sheared along x, rotated, scaled and translated, as in torchvision.
    The amounts are uniform in +-degrees, +-translate (columns, rows), scale (low, high), squeeze (low, high) and
    +-shear (an angle in degrees); positive angles rotate clockwise and shear the bottom to the left.

    matrices: (N, 2, 3), for (row, column, 1)   counter, offset: (1,) int64   seed: int
    """
    T = matrices.dtype.type
    rotation, skew = T(math.radians(degrees)), T(math.radians(shear))
    max_x, max_y = T(translate[0]), T(translate[1])
    for n in prange(len(matrices)):
        start, m = first_draw(counter, offset, seed, n), matrices[n]
        angle, tilt = uniform(start, 0, -rotation, rotation), uniform(start, 5, -skew, skew)
        x, y = uniform(start, 1, -max_x, max_x), uniform(start, 2, -max_y, max_y)
        size, e = uniform(start, 3, T(scale[0]), T(scale[1])), uniform(start, 4, T(squeeze[0]), T(squeeze[1]))
        s, c, shear_x = sin(angle), cos(angle), sin(tilt) / cos(tilt)
        m[0, 0], m[0, 1] = c * e / size, -s * e / size
        m[1, 0], m[1, 1] = (s + shear_x * c) / (size * e), (c - shear_x * s) / (size * e)
        m[0, 2] = -(m[0, 0] * y + m[0, 1] * x)
        m[1, 2] = -(m[1, 0] * y + m[1, 1] * x)


@device_function
def smooth(out, src, weights, step, m):
    """out[j] = sum_t weights[|t|] * src[j + (R + t)*step] over -R <= t <= R, for j < m.

    weights: (R + 1,), R a multiple of TAPS
    """
    R = len(weights) - 1
    centre, w = src[R * step :], weights[0]
    for j in range(m):
        out[j] = w * centre[j]
    for t in range(1, R, TAPS):
        a0, b0, w0 = src[(R - t) * step :], src[(R + t) * step :], weights[t]
        a1, b1, w1 = src[(R - t - 1) * step :], src[(R + t + 1) * step :], weights[t + 1]
        a2, b2, w2 = src[(R - t - 2) * step :], src[(R + t + 2) * step :], weights[t + 2]
        a3, b3, w3 = src[(R - t - 3) * step :], src[(R + t + 3) * step :], weights[t + 3]
        for j in range(m):
            out[j] += w0 * (a0[j] + b0[j]) + w1 * (a1[j] + b1[j]) + w2 * (a2[j] + b2[j]) + w3 * (a3[j] + b3[j])


@kernel
def elastic_field(field, weights, counter, offset, seed, alpha):
    """Displacement of every pixel: alpha times uniform noise in (-1, 1), zero outside of the image, smoothed along rows
    and columns (Simard, Steinkraus and Platt 2003).

    field: (N, 2, H, W)   weights: (R + 1,), the filter from its centre on   counter, offset: (1,) int64   seed: int
    """
    N, _, H, W = field.shape
    T = field.dtype.type
    R = (len(weights) - 1 + TAPS - 1) // TAPS * TAPS
    taps = np.zeros(R + 1, field.dtype)
    taps[: len(weights)] = weights
    # Rows are separated by R zeros, so that one loop of the filter runs over all rows.
    P = W + R
    for n in prange(N):
        start = first_draw(counter, offset, seed, n)
        noise, rows = np.zeros((2, H * P + 2 * R), field.dtype), np.empty(H * P, field.dtype)
        padded = np.zeros((H + 2 * R) * W, field.dtype)
        for i in range(H):
            noise_x, noise_y = noise[1, R + i * P :], noise[0, R + i * P :]
            base = start + np.uint64(i * W)
            for j in range(W):
                word = splitmix64(base + np.uint64(j))
                noise_y[j], noise_x[j] = uniform_from_high(word), uniform_from_low(word)
        for d in range(2):
            smooth(rows, noise[d], taps, 1, H * P)
            for i in range(H):
                row, out = rows[i * P :], padded[(R + i) * W :]
                for j in range(W):
                    out[j] = row[j] * T(alpha)
            smooth(field[n, d].reshape(H * W), padded, taps, W, H * W)


# Every image is padded with background, by one pixel (two at the bottom and right), so that no sample needs a bounds
# check.  The loops over pixels run over the whole image, as rows are too short for vectors.


@device_function
def pad_image(padded, image, background):
    """padded: ((H + 3) * (W + 3),)   image: (H, W)"""
    padded[:] = background
    for i in range(image.shape[0]):
        row, out = image[i], padded[(i + 1) * (image.shape[1] + 3) + 1 :]
        for j in range(image.shape[1]):
            out[j] = row[j]


@device_function
def sample_positions(corner, di, dj, rows, columns, move_i, move_j, m, H, W):
    """Sampling position of each output pixel: index of the upper left pixel in the padded image, and offsets di, dj."""
    T = rows.dtype.type
    zero, last_i, last_j = T(0), T(H + 1), T(W + 1)
    ii, ij, i1 = m[0, 0], m[0, 1], m[0, 2] + T((H + 1) / 2)
    ji, jj, j1 = m[1, 0], m[1, 1], m[1, 2] + T((W + 1) / 2)
    for k in range(len(corner)):
        r = ii * rows[k] + ij * columns[k] + i1 + move_i[k]
        s = ji * rows[k] + jj * columns[k] + j1 + move_j[k]
        r = r if r > zero else zero  # NaN too
        s = s if s > zero else zero
        r = r if r < last_i else last_i
        s = s if s < last_j else last_j
        p, q = np.int32(r), np.int32(s)
        corner[k], di[k], dj[k] = p * (W + 3) + q, r - T(p), s - T(q)


@device_function
def interpolate(out, padded, pitch, corner, di, dj):
    """Bilinear interpolation at the positions from `sample_positions`."""
    a, b, a1, b1 = padded, padded[pitch:], padded[1:], padded[pitch + 1 :]
    for k in range(len(out)):
        p = corner[k]
        top = a[p] + dj[k] * (a1[p] - a[p])
        bottom = b[p] + dj[k] * (b1[p] - b[p])
        out[k] = top + di[k] * (bottom - top)


@kernel
def warp(y, x, matrices, field, background):
    """y[n, c, i, j] = x[n, c] at matrices[n] * (i - centre, j - centre, 1) + field[n, :, i, j] + centre, by bilinear
    interpolation.  Outside of the image is the background.

    y: (N, C, OH, OW)   x: (N, C, H, W)   matrices: (N, 2, 3), or (0, 2, 3) for none   background: (C,)
    field: (N, 2, OH, OW), or (0, 2, OH, OW) for none
    """
    N, C, H, W = x.shape
    OH, OW = y.shape[2:]
    T = x.dtype.type
    size, one, zero = OH * OW, T(1), T(0)
    rows, columns = np.empty(size, x.dtype), np.empty(size, x.dtype)
    for i in range(OH):
        for j in range(OW):
            rows[i * OW + j], columns[i * OW + j] = T(i) - T((OH - 1) / 2), T(j) - T((OW - 1) / 2)
    no_motion, identity = np.zeros(size, x.dtype), np.array([[one, zero, zero], [zero, one, zero]])
    for n in prange(N):
        m = matrices[n] if len(matrices) > 0 else identity
        move_i = field[n, 0].reshape(size) if len(field) > 0 else no_motion
        move_j = field[n, 1].reshape(size) if len(field) > 0 else no_motion
        corner, di, dj = np.empty(size, np.uint32), np.empty(size, x.dtype), np.empty(size, x.dtype)
        sample_positions(corner, di, dj, rows, columns, move_i, move_j, m, H, W)
        padded = np.empty((H + 3) * (W + 3), x.dtype)
        for c in range(C):
            pad_image(padded, x[n, c], background[c])
            interpolate(y[n, c].reshape(size), padded, W + 3, corner, di, dj)


@kernel
def jitter(x, counter, offset, seed, brightness, contrast, scale, shift):
    """Change brightness and contrast; x = pixel * scale[c] + shift[c] for pixels in 0 ... 1.

    Each image is multiplied by a factor in 1 +- brightness, then blended with its mean by a factor in 1 +- contrast;
    pixels are clamped to 0 ... 1 after each.  torchvision's formulas for grey images; the mean is over all channels.

    x: (N, C, H, W), changed in place   scale, shift: (C,)   counter, offset: (1,) int64   seed: int
    """
    N, C, H, W = x.shape
    T = x.dtype.type
    zero, one = T(0), T(1)
    for n in prange(N):
        start = first_draw(counter, offset, seed, n)
        gain = uniform(start, 0, T(max(0.0, 1 - brightness)), T(1 + brightness))
        blend = uniform(start, 1, T(max(0.0, 1 - contrast)), T(1 + contrast))
        total = zero
        for c in range(C):
            a, b, plane = gain / scale[c], -gain * shift[c] / scale[c], x[n, c].reshape(H * W)
            for i in range(H * W):
                value = plane[i] * a + b
                value = zero if value < zero else value
                value = one if value > one else value
                plane[i] = value
                total += value
        grey = (one - blend) * total / T(C * H * W)
        for c in range(C):
            a, b, plane = scale[c], shift[c], x[n, c].reshape(H * W)
            for i in range(H * W):
                value = plane[i] * blend + grey
                value = zero if value < zero else value
                value = one if value > one else value
                plane[i] = value * a + b
