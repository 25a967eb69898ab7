"""Synthetic handwritten digits, drawn from pen paths of our own: a stand-in where MNIST cannot be had."""

from __future__ import annotations

from functools import cache
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from tinycnn import _check
from tinycnn.data._skeletons import STYLES, Stroke

_SAMPLES = 72  # points along the pen's way; the segments between them are about one pixel long

# How much writers differ.  Unless noted, standard deviations; lengths are in units of the digit's height.
_HASTE = (0.4, 1.5)  # least and most of a factor on the next two: some write neatly, some do not
_WOBBLE = 0.055  # of each point the pen passes
_BEND = 0.065  # amplitude of sine waves that bend the plane ...
_WAVES = 3  # ... how many ...
_CYCLES = (0.3, 0.9)  # ... and of how many periods per height, least and most
_STRETCH = 0.22  # of the logarithm of width / height
_SLANT = (0.12, 0.28)  # mean (to the right, as most people write) and deviation
_TURN = 0.09  # of the rotation, radians
_PEN = (1.38, 0.25)  # median radius in pixels, deviation of its logarithm
_SWELL = (0.0, 0.2)  # change of the radius along the path, least and most
_EDGE = (1.0, 1.4)  # width of the grey edge in pixels, least and most


def synthetic_digits(n: int, *, rng: Any = None) -> tuple[np.ndarray, np.ndarray]:
    """Draw `n` handwritten digits, sized and centred like MNIST's.

    Returns images (n, 28, 28) uint8, white (255) on black (0), and labels (n,) int64.  A digit fits a box of
    20 x 20 pixels, its aspect kept, and its centre of mass lies within half a pixel of row 14, column 14
    (counted from 0), as far as the box stays inside the image.  Every label comes n / 10 times (rounded up
    or down), in random order.

    rng: anything `np.random.default_rng` takes.  Equal seeds give equal bits for any number of threads.
    Raises TypeError or ValueError unless `n` is a positive integer.
    """
    from tinycnn.data._synthetic_kernels import SIZE, draw_digits

    n = _check.integer("n", n, 1)
    rng = _check.generator("rng", rng)
    labels = rng.permutation(np.arange(n, dtype=np.int64) % 10)
    alphabet = _alphabet()
    style = alphabet.tickets[alphabet.first[labels] + rng.integers(alphabet.number[labels])]

    # All randomness is drawn here, in one order, so the parallel kernel has none.
    def normal(*shape: int) -> np.ndarray:
        return np.clip(rng.standard_normal((n, *shape), np.float32), -2.5, 2.5)  # beyond lie no digits

    def uniform(span: tuple[float, float], *shape: int) -> np.ndarray:
        return span[0] + (span[1] - span[0]) * rng.random((n, *shape), np.float32)

    circle = (0.0, 2 * np.pi)
    haste = uniform(_HASTE, 1, 1)
    points = alphabet.points[style] + _WOBBLE * haste * normal(*alphabet.points.shape[1:])

    width, slant, turn = np.exp(_STRETCH * normal()), _SLANT[0] + _SLANT[1] * normal(), _TURN * normal()
    cos, sin = np.cos(turn), np.sin(turn)
    # rotation @ shear (top to the right: y points down) @ stretch
    shape = np.stack([cos * width, -cos * slant - sin, sin * width, cos - sin * slant], 1).reshape(n, 2, 2)

    angle, frequency = uniform(circle, _WAVES), uniform(_CYCLES, _WAVES) * (2 * np.pi)
    direction = np.stack([frequency * np.cos(angle), frequency * np.sin(angle), uniform(circle, _WAVES)], 2)
    waves = np.concatenate([direction, _BEND * haste * normal(_WAVES, 2)], 2)

    radius = _PEN[0] * np.exp(_PEN[1] * normal())
    pen = np.stack([radius, uniform(_SWELL), uniform((2.0, 25.0)), uniform(circle), uniform(_EDGE)], 1)

    images = np.empty((n, SIZE, SIZE), np.uint8)
    drawing = [np.ascontiguousarray(array, np.float32) for array in (points, shape, waves, pen)]
    draw_digits(images, style, alphabet.basis, alphabet.lifted, *drawing)
    return images, labels


class _Alphabet(NamedTuple):
    """All K styles as arrays, padded to P points; `basis[k] @ points` are the S places on the pen's way."""

    points: np.ndarray  # (K, P, 2)
    basis: np.ndarray  # (K, S, P)
    lifted: np.ndarray  # (K, S), True where the pen gets to a place without drawing
    tickets: np.ndarray  # styles, each as often as its frequency, digit after digit
    first: np.ndarray  # (10,) where a digit's tickets begin
    number: np.ndarray  # (10,) and how many there are


@cache
def _alphabet() -> _Alphabet:
    styles = [style for digit in STYLES for style in digit]
    places = [list(dict.fromkeys(point for stroke in strokes for point in stroke)) for _, strokes in styles]
    K, P = len(styles), max(map(len, places))
    points = np.zeros((K, P, 2), np.float32)
    basis = np.zeros((K, _SAMPLES, P), np.float32)
    lifted = np.zeros((K, _SAMPLES), bool)
    for k, (_, strokes) in enumerate(styles):
        points[k, : len(places[k])] = places[k]
        _walk(basis[k], lifted[k], strokes, places[k])
    tickets = np.repeat(np.arange(K), [frequency for frequency, _ in styles])
    count = np.array([sum(frequency for frequency, _ in digit) for digit in STYLES])
    return _Alphabet(points, basis, lifted, tickets, np.cumsum(count) - count, count)


def _walk(basis: np.ndarray, lifted: np.ndarray, strokes: list[Stroke], points: Stroke) -> None:
    """Fill `basis` and `lifted` for one style; Catmull-Rom splines are linear in their points."""
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
                if j != end:  # beyond an end lies the mirror image of the end's neighbour: 2 p0 - p1
                    basis[row, index[end]] += weight
                    basis[row, index[1 if j < 0 else last - 1]] -= weight
            row += 1
