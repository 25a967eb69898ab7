"""Synthetic handwritten digits, rendered from pen paths: a replacement where MNIST is not available."""

from functools import cache
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from tinycnn import _check
from tinycnn._typing import Array, Rng
from tinycnn.data._skeletons import STYLES, Stroke

_SAMPLES = 72  # points along the pen path, about one pixel apart

# Variation between writers. Standard deviations unless noted; lengths are in units of the digit's height.
_HASTE = (0.4, 1.5)  # range of a factor on the next two: from neat to hasty writing
_WOBBLE = 0.055  # of each point of the path
_BEND = 0.065  # amplitude of the sine waves that distort the plane
_WAVES = 3  # number of these waves
_CYCLES = (0.3, 0.9)  # range of their periods per height
_STRETCH = 0.22  # of log(width / height)
_SLANT = (0.12, 0.28)  # mean (to the right) and standard deviation of the shear
_TURN = 0.09  # of the rotation, radians
_PEN = (1.38, 0.25)  # median radius in pixels, standard deviation of its logarithm
_SWELL = (0.0, 0.2)  # range of the relative change of the radius along the path
_EDGE = (1.0, 1.4)  # range of the width of the grey edge in pixels


def synthetic_digits(n: int, *, rng: Rng = None) -> tuple[Array, Array]:
    """Draw `n` handwritten digits, sized and centred like MNIST's.

    Returns images (n, 28, 28) uint8, white (255) on black (0), and labels (n,) int64. Each digit is scaled to fit a box
    of 20 x 20 pixels and shifted so that its centre of mass is within half a pixel of row 14, column 14 (from 0), as
    far as the box stays inside the image. Every label occurs n / 10 times (rounded up or down), in random order.

    rng: argument of `np.random.default_rng`. Equal seeds give equal bits for any number of threads.
    Raises TypeError or ValueError unless `n` is a positive integer.
    """
    from tinycnn.data._synthetic_kernels import SIZE, draw_digits

    n = _check.integer("n", n, 1)
    generator: np.random.Generator = _check.generator("rng", rng)
    labels = generator.permutation(np.arange(n, dtype=np.int64) % 10)
    table = _style_table()
    style = table.weighted[table.start[labels] + generator.integers(table.size[labels])]

    # All random numbers are drawn here, in a fixed order; the parallel kernel draws none.
    def normal(*shape: int) -> Array:
        # Larger deviations are unreadable.
        return np.clip(generator.standard_normal((n, *shape), np.float32), -2.5, 2.5)

    def uniform(limits: tuple[float, float], *shape: int) -> Array:
        low, high = limits
        return low + (high - low) * generator.random((n, *shape), np.float32)

    circle = (0.0, 2 * np.pi)
    haste = uniform(_HASTE, 1, 1)
    points = table.points[style] + _WOBBLE * haste * normal(*table.points.shape[1:])

    width, slant, turn = np.exp(_STRETCH * normal()), _SLANT[0] + _SLANT[1] * normal(), _TURN * normal()
    cos, sin = np.cos(turn), np.sin(turn)
    # rotation @ shear (y points down) @ stretch
    shape = np.stack([cos * width, -cos * slant - sin, sin * width, cos - sin * slant], 1).reshape(n, 2, 2)

    angle, frequency = uniform(circle, _WAVES), uniform(_CYCLES, _WAVES) * (2 * np.pi)
    direction = np.stack([frequency * np.cos(angle), frequency * np.sin(angle), uniform(circle, _WAVES)], 2)
    waves = np.concatenate([direction, _BEND * haste * normal(_WAVES, 2)], 2)

    radius = _PEN[0] * np.exp(_PEN[1] * normal())
    pen = np.stack([radius, uniform(_SWELL), uniform((2.0, 25.0)), uniform(circle), uniform(_EDGE)], 1)

    images = np.empty((n, SIZE, SIZE), np.uint8)
    arrays = [np.ascontiguousarray(array, np.float32) for array in (points, shape, waves, pen)]
    draw_digits(images, style, table.basis, table.lifted, *arrays)
    return images, labels


class _StyleTable(NamedTuple):
    """All K styles as arrays, padded to P points; `basis[k] @ points` gives the S samples of the pen path."""

    points: Array  # (K, P, 2)
    basis: Array  # (K, S, P)
    lifted: Array  # (K, S), True for a sample that the pen reaches without drawing
    weighted: Array  # style indices, each repeated by its frequency, sorted by digit
    start: Array  # (10,) first entry of a digit in `weighted`
    size: Array  # (10,) number of its entries


@cache
def _style_table() -> _StyleTable:
    styles = [style for digit in STYLES for style in digit]
    unique = [list(dict.fromkeys(point for stroke in strokes for point in stroke)) for _, strokes in styles]
    K, P = len(styles), max(map(len, unique))
    points = np.zeros((K, P, 2), np.float32)
    basis = np.zeros((K, _SAMPLES, P), np.float32)
    lifted = np.zeros((K, _SAMPLES), bool)
    for k, (_, strokes) in enumerate(styles):
        points[k, : len(unique[k])] = unique[k]
        _fill_basis(basis[k], lifted[k], strokes, unique[k])
    weighted = np.repeat(np.arange(K), [frequency for frequency, _ in styles])
    size = np.array([sum(frequency for frequency, _ in digit) for digit in STYLES])
    return _StyleTable(points, basis, lifted, weighted, np.cumsum(size) - size, size)


def _fill_basis(basis: Array, lifted: Array, strokes: list[Stroke], points: Stroke) -> None:
    """Fill `basis` and `lifted` of one style: each stroke is a Catmull-Rom spline, which is linear in its points."""
    lengths = np.array([sum(np.hypot(bx - ax, by - ay) for (ax, ay), (bx, by) in pairwise(s)) for s in strokes])
    counts = np.maximum(4, (lengths / lengths.sum() * len(basis)).astype(int))
    counts[counts.argmax()] += len(basis) - counts.sum()
    row = 0
    for stroke, count in zip(strokes, counts, strict=True):
        lifted[row] = True
        index = [points.index(point) for point in stroke]
        last = len(index) - 1
        for u in np.linspace(0, last, count):
            i = min(int(u), last - 1)
            t = u - i
            weights = (
                -t / 2 + t**2 - t**3 / 2,
                1 - 2.5 * t**2 + 1.5 * t**3,
                t / 2 + 2 * t**2 - 1.5 * t**3,
                -(t**2) / 2 + t**3 / 2,
            )
            for j, weight in enumerate(weights, start=i - 1):
                end = min(max(j, 0), last)
                basis[row, index[end]] += weight
                if j != end:  # the point beyond an end mirrors the end's neighbour: 2 p0 - p1
                    basis[row, index[end]] += weight
                    basis[row, index[1 if j < 0 else last - 1]] -= weight
            row += 1
