"""Random distortions of a batch: affine maps, elastic fields, one interpolation for both, brightness and contrast.

As in dropout.py, nothing is drawn: a random number is computed from a seed, the number of the training step, the
number of the image in the batch and the number of the draw.  It is the same for any number of threads and any device.

Positions and displacements are (row, column), in pixels.
"""

import math

import numpy as np
from numba import prange

from tinycnn import scalars
from tinycnn.kernels._jit import device_function, kernel, scalar

splitmix64 = device_function(scalars.splitmix64)
uniform_from_high = device_function(scalars.uniform_from_high)
uniform_from_low = device_function(scalars.uniform_from_low)
sin, cos = scalar(scalars.sin32, scalars.sin64), scalar(scalars.cos32, scalars.cos64)
HALF = scalars.HALF
TAPS = 4  # weights that an iteration of `smooth` takes from either side


@device_function
def first_draw(counter, seed, n):
    """Where the draws of image n begin: the words are splitmix64(first_draw + 0), splitmix64(first_draw + 1) ..."""
    return splitmix64(splitmix64(splitmix64(np.uint64(seed)) + np.uint64(counter[0])) + np.uint64(n))


@device_function
def uniform(start, draw, low, high):
    """A number between low and high, which is exactly that if they are the same."""
    return (low + high) * HALF + (high - low) * HALF * uniform_from_high(splitmix64(start + np.uint64(draw)))


@kernel
def random_affine(matrices, counter, seed, degrees, translate, scale, squeeze, shear):
    """For every image the map from a pixel of the distorted image to the place in the original that it shows, both
    relative to the centre of their image.

    The original is squeezed (columns times e, rows through e), sheared along x, turned, scaled and moved, as in
    torchvision.  Each amount is uniform, in +-degrees, +-translate (columns, rows), scale (low, high), squeeze (low,
    high) and +-shear (an angle in degrees); positive angles turn clockwise and shear the bottom to the left.

    matrices: (N, 2, 3), for (row, column, 1)   counter: (1,) int64   seed: int
    """
    T = matrices.dtype.type
    turn, lean = T(math.radians(degrees)), T(math.radians(shear))
    across, down = T(translate[0]), T(translate[1])
    for n in prange(len(matrices)):
        start, m = first_draw(counter, seed, n), matrices[n]
        angle, slant = uniform(start, 0, -turn, turn), uniform(start, 5, -lean, lean)
        x, y = uniform(start, 1, -across, across), uniform(start, 2, -down, down)
        size, e = uniform(start, 3, T(scale[0]), T(scale[1])), uniform(start, 4, T(squeeze[0]), T(squeeze[1]))
        s, c, slope = sin(angle), cos(angle), sin(slant) / cos(slant)
        m[0, 0], m[0, 1] = c * e / size, -s * e / size
        m[1, 0], m[1, 1] = (s + slope * c) / (size * e), (c - slope * s) / (size * e)
        m[0, 2] = -(m[0, 0] * y + m[0, 1] * x)
        m[1, 2] = -(m[1, 0] * y + m[1, 1] * x)


@device_function
def smooth(out, src, weights, step, m):
    """out[j] = sum_t weights[|t|] * src[j + (R + t)*step] over -R <= t <= R, for j < m.

    weights: (R + 1,), R a multiple of TAPS
    """
    R = len(weights) - 1
    middle, w = src[R * step :], weights[0]
    for j in range(m):
        out[j] = w * middle[j]
    for t in range(1, R, TAPS):
        a0, b0, w0 = src[(R - t) * step :], src[(R + t) * step :], weights[t]
        a1, b1, w1 = src[(R - t - 1) * step :], src[(R + t + 1) * step :], weights[t + 1]
        a2, b2, w2 = src[(R - t - 2) * step :], src[(R + t + 2) * step :], weights[t + 2]
        a3, b3, w3 = src[(R - t - 3) * step :], src[(R + t + 3) * step :], weights[t + 3]
        for j in range(m):
            out[j] += w0 * (a0[j] + b0[j]) + w1 * (a1[j] + b1[j]) + w2 * (a2[j] + b2[j]) + w3 * (a3[j] + b3[j])


@kernel
def elastic_field(field, weights, counter, seed, alpha):
    """Displacements of every pixel: uniform noise in (-1, 1), zero outside the image, smoothed along columns and rows,
    times alpha (Simard, Steinkraus and Platt 2003).

    field: (N, 2, H, W)   weights: (R + 1,), of the filter, from its middle outwards   counter: (1,) int64   seed: int
    """
    N, _, H, W = field.shape
    T = field.dtype.type
    R = (len(weights) - 1 + TAPS - 1) // TAPS * TAPS
    taps = np.zeros(R + 1, field.dtype)
    taps[: len(weights)] = weights
    # Rows are R zeros apart, which end one and begin the next: the filter's sums run on over all rows.
    P = W + R
    for n in prange(N):
        start = first_draw(counter, seed, n)
        noise, wide = np.zeros((2, H * P + 2 * R), field.dtype), np.empty(H * P, field.dtype)
        high = np.zeros((H + 2 * R) * W, field.dtype)
        for i in range(H):
            across, down = noise[1, R + i * P :], noise[0, R + i * P :]
            base = start + np.uint64(i * W)
            for j in range(W):
                word = splitmix64(base + np.uint64(j))
                down[j], across[j] = uniform_from_high(word), uniform_from_low(word)
        for d in range(2):
            smooth(wide, noise[d], taps, 1, H * P)
            for i in range(H):
                row, to = wide[i * P :], high[(R + i) * W :]
                for j in range(W):
                    to[j] = row[j] * T(alpha)
            smooth(field[n, d].reshape(H * W), high, taps, W, H * W)


# Every image gets a frame of background, one pixel wide (two at the end), so that no pixel needs to ask where it is.
# The loops over pixels run over the whole image, as rows are too short for vectors.


@device_function
def frame(framed, image, background):
    """framed: ((H + 3) * (W + 3),)   image: (H, W)"""
    framed[:] = background
    for i in range(image.shape[0]):
        row, to = image[i], framed[(i + 1) * (image.shape[1] + 3) + 1 :]
        for j in range(image.shape[1]):
            to[j] = row[j]


@device_function
def find_places(at, down, across, rows, columns, move_i, move_j, m, H, W):
    """What a pixel shows: `at` which pixel of the framed image, and how far from there `down` and `across`."""
    T = rows.dtype.type
    zero, last_i, last_j = T(0), T(H + 1), T(W + 1)
    ii, ij, i1 = m[0, 0], m[0, 1], m[0, 2] + T((H + 1) / 2)
    ji, jj, j1 = m[1, 0], m[1, 1], m[1, 2] + T((W + 1) / 2)
    for k in range(len(at)):
        r = ii * rows[k] + ij * columns[k] + i1 + move_i[k]
        s = ji * rows[k] + jj * columns[k] + j1 + move_j[k]
        r = r if r > zero else zero  # NaN too
        s = s if s > zero else zero
        r = r if r < last_i else last_i
        s = s if s < last_j else last_j
        p, q = np.int32(r), np.int32(s)
        at[k], down[k], across[k] = p * (W + 3) + q, r - T(p), s - T(q)


@device_function
def interpolate(to, framed, pitch, at, down, across):
    a, b, a1, b1 = framed, framed[pitch:], framed[1:], framed[pitch + 1 :]
    for k in range(len(to)):
        p = at[k]
        top = a[p] + across[k] * (a1[p] - a[p])
        bottom = b[p] + across[k] * (b1[p] - b[p])
        to[k] = top + down[k] * (bottom - top)


@kernel
def warp(y, x, matrices, field, background):
    """y[n, c, i, j] = x[n, c] at matrices[n] * (i - centre, j - centre, 1) + field[n, :, i, j] + centre, between four
    pixels by bilinear interpolation.  Outside of the image is the background.

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
    still, identity = np.zeros(size, x.dtype), np.array([[one, zero, zero], [zero, one, zero]])
    for n in prange(N):
        m = matrices[n] if len(matrices) > 0 else identity
        move_i = field[n, 0].reshape(size) if len(field) > 0 else still
        move_j = field[n, 1].reshape(size) if len(field) > 0 else still
        at, down, across = np.empty(size, np.uint32), np.empty(size, x.dtype), np.empty(size, x.dtype)
        find_places(at, down, across, rows, columns, move_i, move_j, m, H, W)
        framed = np.empty((H + 3) * (W + 3), x.dtype)
        for c in range(C):
            frame(framed, x[n, c], background[c])
            interpolate(y[n, c].reshape(size), framed, W + 3, at, down, across)


@kernel
def jitter(x, counter, seed, brightness, contrast, scale, shift):
    """Change brightness and contrast of pixels 0 ... 1, of which x is pixel * scale[c] + shift[c].

    Each image times a number in 1 +- brightness, then blended with its mean by a number in 1 +- contrast; what leaves
    0 ... 1 is cut off, both times.  torchvision's formulas for grey images; with several channels the mean is over all.

    x: (N, C, H, W), changed in place   scale, shift: (C,)   counter: (1,) int64   seed: int
    """
    N, C, H, W = x.shape
    T = x.dtype.type
    zero, one = T(0), T(1)
    for n in prange(N):
        start = first_draw(counter, seed, n)
        bright = uniform(start, 0, T(max(0.0, 1 - brightness)), T(1 + brightness))
        strong = uniform(start, 1, T(max(0.0, 1 - contrast)), T(1 + contrast))
        total = zero
        for c in range(C):
            a, b, plane = bright / scale[c], -bright * shift[c] / scale[c], x[n, c].reshape(H * W)
            for i in range(H * W):
                value = plane[i] * a + b
                value = zero if value < zero else value
                value = one if value > one else value
                plane[i] = value
                total += value
        grey = (one - strong) * total / T(C * H * W)
        for c in range(C):
            a, b, plane = scale[c], shift[c], x[n, c].reshape(H * W)
            for i in range(H * W):
                value = plane[i] * strong + grey
                value = zero if value < zero else value
                value = one if value > one else value
                plane[i] = value * a + b
