"""Pictures that show no digit, prepared like digits: a test of whether a net refuses them."""

from functools import cache

import numpy as np

from tinycnn import _check, digits
from tinycnn._typing import Array, Rng

# Without those that look like a digit: O o D Q C c 0; l I i j J T 1; Z z 2; S s 5; b G 6; B 8; g q P p 9; y Y 4 7.
LETTERS = "AEFHKMNRUVWXadefhkmnrtuvwx"
FAMILIES = ("DejaVu Sans", "DejaVu Serif", "STIXGeneral")
CELL = 96  # pixels of a letter's picture


def not_digits(count: int, *, rng: Rng = None) -> Array:
    """`count` pictures of no digit, (count, 28, 28) uint8: half letters, a quarter scribbles, a quarter noise.

    Letters that look like digits are left out.  Every picture has gone through `tinycnn.digits.prepare`.

    rng: argument of `np.random.default_rng`.  Needs matplotlib, with its own fonts.
    Raises TypeError or ValueError unless `count` is a positive integer.
    """
    count = _check.integer("count", count, 1)
    generator = _check.generator("rng", rng)
    makers = (_letter, _letter, _scribble, _noise)
    return np.stack([digits.prepare(makers[n % 4](generator)) for n in range(count)])


def _letter(rng: np.random.Generator) -> Array:
    """A letter of one of the fonts, rotated by up to 12 degrees and slanted."""
    letters = _letters()
    letter = letters[rng.integers(len(letters))]
    turn, slant = np.radians(rng.uniform(-12, 12)), rng.uniform(-0.2, 0.2)
    y, x = np.mgrid[0:CELL, 0:CELL] - (CELL - 1) / 2
    x, y = x + slant * y, y
    column = np.rint(np.cos(turn) * x + np.sin(turn) * y + CELL / 2).astype(int)
    row = np.rint(np.cos(turn) * y - np.sin(turn) * x + CELL / 2).astype(int)
    inside = (row >= 0) & (row < CELL) & (column >= 0) & (column < CELL)
    picture: Array = letter[row.clip(0, CELL - 1), column.clip(0, CELL - 1)] * inside
    return picture


@cache
def _letters() -> Array:
    """All letters of all fonts, upright and italic, normal and bold, (n, CELL, CELL) uint8, white on black."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    fonts = [(f, w, s) for f in FAMILIES for w in ("normal", "bold") for s in ("normal", "italic")]
    width, height = len(LETTERS), len(fonts)
    canvas = FigureCanvasAgg(Figure(figsize=(width, height), dpi=CELL, facecolor="black"))
    for row, (family, weight, style) in enumerate(fonts):
        for column, text in enumerate(LETTERS):
            place = (column + 0.5) / width, 1 - (row + 0.5) / height
            canvas.figure.text(
                *place,
                text,
                color="white",
                ha="center",
                va="center",
                size=46,
                family=family,
                weight=weight,
                style=style,
            )
    canvas.draw()
    sheet = np.array(canvas.buffer_rgba())[:, :, 0]
    letters: Array = sheet.reshape(height, CELL, width, CELL).swapaxes(1, 2).reshape(-1, CELL, CELL)
    return letters


def _scribble(rng: np.random.Generator) -> Array:
    """A pen that wanders through six to twelve random points."""
    points = rng.uniform(16, CELL - 16, (rng.integers(6, 13), 2))
    t = np.linspace(0, len(points) - 1, 40 * len(points))
    # The spline through the points is smoothed: weights of a Gaussian around each time.
    weights = np.exp(-((t[:, None] - np.arange(len(points))) ** 2) / 0.5)
    path = weights @ points / weights.sum(axis=1, keepdims=True)
    grid = np.arange(CELL)
    radius = rng.uniform(2, 5)
    y, x = path[:, :1, None], path[:, 1:, None]
    distance = np.sqrt((grid[:, None] - y) ** 2 + (grid - x) ** 2).min(axis=0)
    picture: Array = (255 * np.clip(radius - distance + 0.5, 0, 1)).astype(np.uint8)
    return picture


def _noise(rng: np.random.Generator) -> Array:
    """Random blobs: smoothed noise, cut at a level."""
    frequency = np.hypot(np.fft.fftfreq(CELL)[:, None], np.fft.fftfreq(CELL)) * CELL
    spectrum = np.fft.fft2(rng.standard_normal((CELL, CELL))) * np.exp(-((frequency / rng.uniform(3, 8)) ** 2))
    smooth = np.fft.ifft2(spectrum).real
    picture: Array = np.where(smooth > np.quantile(smooth, rng.uniform(0.7, 0.9)), 255, 0).astype(np.uint8)
    return picture
