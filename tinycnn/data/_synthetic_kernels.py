"""Draw pen paths as grey-scale images.  Imported on first use, because it imports Numba."""

import math

import numpy as np
from numba import prange

from tinycnn._typing import Array
from tinycnn.kernels._jit import device_function, kernel

BOX = 20  # pixels; digits are scaled to fit, with their aspect ratio
SIZE = 28  # pixels; its centre of mass is moved to (SIZE / 2, SIZE / 2), counting pixels from 0


# image: (SIZE, SIZE) uint8, path: (S, 2), lifted: (S,) bool
# pen: (S,) radius and soft: width of the grey edge, in pixels
@device_function
def _draw(image: Array, path: Array, lifted: Array, pen: Array, soft: float) -> None:
    S = len(path)
    margin = pen.max() + 0.5 * soft
    x0, x1 = path[:, 0].min(), path[:, 0].max()
    y0, y1 = path[:, 1].min(), path[:, 1].max()
    scale = (BOX - 2 * margin) / max(x1 - x0, y1 - y0)
    x0 -= 0.5 * (BOX / scale - (x1 - x0))
    y0 -= 0.5 * (BOX / scale - (y1 - y0))

    ink = np.zeros((BOX, BOX), path.dtype)
    for s in range(1, S):
        if lifted[s]:
            continue
        ax, ay = (path[s - 1, 0] - x0) * scale, (path[s - 1, 1] - y0) * scale
        dx, dy = (path[s, 0] - x0) * scale - ax, (path[s, 1] - y0) * scale - ay
        length2 = dx * dx + dy * dy + 1e-12
        left, right = max(0, int(ax + min(dx, 0) - margin)), min(BOX, int(ax + max(dx, 0) + margin) + 1)
        top, bottom = max(0, int(ay + min(dy, 0) - margin)), min(BOX, int(ay + max(dy, 0) + margin) + 1)
        for i in range(top, bottom):
            for j in range(left, right):
                px, py = j + 0.5 - ax, i + 0.5 - ay
                t = min(max((px * dx + py * dy) / length2, 0.0), 1.0)
                distance = math.sqrt((px - t * dx) ** 2 + (py - t * dy) ** 2)
                radius = pen[s - 1] + t * (pen[s] - pen[s - 1])
                grey = min(max((radius - distance) / soft + 0.5, 0.0), 1.0)
                ink[i, j] = max(ink[i, j], grey)  # not a sum: segments of a stroke overlap at their ends

    mass, mass_x, mass_y = 0.0, 0.0, 0.0
    for i in range(BOX):
        for j in range(BOX):
            grey = math.floor(ink[i, j] * 255 + 0.5)
            ink[i, j] = grey
            mass += grey
            mass_x += grey * j
            mass_y += grey * i
    # Shift by whole pixels, so that centring does not blur; the box stays inside the image.
    right = min(max(math.floor(SIZE / 2 - mass_x / mass + 0.5), 0), SIZE - BOX)
    down = min(max(math.floor(SIZE / 2 - mass_y / mass + 0.5), 0), SIZE - BOX)
    image[:] = 0
    for i in range(BOX):
        for j in range(BOX):
            image[down + i, right + j] = np.uint8(ink[i, j])


# images: (N, SIZE, SIZE) uint8; style: (N,) rows of basis (K, S, P), lifted (K, S)
# points: (N, P, 2), shape: (N, 2, 2) linear map, waves: (N, W, 5) wave vector, phase, amplitude x and y
# pen: (N, 5) radius in pixels, then amplitude, frequency and phase of its change, width of the edge in pixels
@kernel
def draw_digits(
    images: Array, style: Array, basis: Array, lifted: Array, points: Array, shape: Array, waves: Array, pen: Array
) -> None:
    N = len(images)
    S, P = basis.shape[1:]
    for n in prange(N):
        path = np.empty((S, 2), points.dtype)
        radius = np.empty(S, points.dtype)
        for s in range(S):
            x, y = 0.0, 0.0
            for p in range(P):
                x += basis[style[n], s, p] * points[n, p, 0]
                y += basis[style[n], s, p] * points[n, p, 1]
            warped_x, warped_y = x, y
            for w in range(waves.shape[1]):
                wave = math.sin(waves[n, w, 0] * x + waves[n, w, 1] * y + waves[n, w, 2])
                warped_x += wave * waves[n, w, 3]
                warped_y += wave * waves[n, w, 4]
            path[s, 0] = shape[n, 0, 0] * warped_x + shape[n, 0, 1] * warped_y
            path[s, 1] = shape[n, 1, 0] * warped_x + shape[n, 1, 1] * warped_y
            modulation = pen[n, 1] * math.sin(pen[n, 2] * s / S + pen[n, 3])
            radius[s] = max(pen[n, 0] * (1 + modulation), 0.4)
        _draw(images[n], path, lifted[style[n]], radius, pen[n, 4])
