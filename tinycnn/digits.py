"""Pictures of handwritten digits, prepared as MNIST was made (LeCun et al. 1998).

    ready = np.stack([digits.prepare(part) for part in digits.split(photo)])
    model.predict(ready[:, None])

A picture is a scan, a photo or a drawing, dark on light or light on dark.  In a prepared one the background is gone,
the ink is white (255) on black (0) and fits a box of 20 x 20 pixels with its aspect ratio, and its centre of mass is in
the middle of 28 x 28 pixels.  Only NumPy is used.
"""

from collections.abc import Callable

import numpy as np

from tinycnn import _check
from tinycnn._typing import Array

WORKING_SIZE = 800  # pixels; longer pictures are averaged down first
COARSE_SIZE = 128  # of the grid on which the background is estimated
OPENING = 0.34  # of the longer side: ink is narrower, shadows are wider
NOISE_FACTOR = 4.5  # ink is this many standard deviations of the noise above the background
MIN_CONTRAST = 10.0  # grey levels of 255
LEVEL = 0.4  # of the strength of the ink: the outline of a stroke
MIN_MASS, MIN_EXTENT = 0.05, 0.25  # of the largest component; smaller ones are specks
SCALE = 4  # strokes are measured on a grid that is finer than the result by this factor
MIN_STROKE = 1.5  # pixels; strokes of a hard pencil in a large picture are thickened to this width
BLANK = "image must show a digit, got a blank picture"


def prepare(image: Array, size: int = 28) -> Array:
    """The one digit in `image` as (size, size) uint8, white (255) on black (0), like MNIST's.

    image  (H, W) grey, (H, W, 2) grey and alpha, (H, W, 3) RGB or (H, W, 4) RGB and alpha, uint8
    size   pixels of a side of the result; the digit fits a box of 20/28 of it

    Raises ValueError if there is no ink in the picture, TypeError or ValueError for another dtype or shape.
    """
    size = _check.integer("size", size, 14)
    ink = _find_ink(image)
    labels, boxes = _find_parts(ink)
    return _normalize(ink * np.isin(labels, list(boxes)), size)


def split(image: Array) -> list[Array]:
    """The digits of one row, from left to right, each a picture (h, w) uint8 for `prepare`, white on black.

    Parts that lie one above the other are one digit, such as the two strokes of a broken 5; specks are dropped.

    image  as for `prepare`; raises what that raises
    """
    ink = _find_ink(image)
    labels, boxes = _find_parts(ink)
    digits: list[tuple[int, int, list[int]]] = []  # left, right, numbers of the components
    for number, (_, columns) in sorted(boxes.items(), key=lambda part: part[1][1].start):
        left, right, numbers = columns.start, columns.stop, [number]
        if digits:
            first, last, others = digits[-1]
            if min(last, right) - left > 0.5 * min(last - first, right - left):
                left, right, numbers = first, max(last, right), others + numbers
                digits.pop()
        digits.append((left, right, numbers))
    pictures = []
    for _, _, numbers in digits:
        part = ink * np.isin(labels, numbers)
        pictures.append(np.pad(np.rint(255 * part[_box(part > 0)]).astype(np.uint8), 8))
    return pictures


# --- the ink ----------------------------------------------------------------------------------------------------------


def _find_ink(image: Array) -> Array:
    """The ink, 0 ... 1, on the picture averaged down to at most WORKING_SIZE pixels a side, (h, w) float32."""
    ink = _subtract_background(_grey(image))
    level = max(NOISE_FACTOR * _noise(ink), MIN_CONTRAST)
    strokes = np.where(ink > level, ink, 0)
    if not strokes.any():
        raise ValueError(BLANK)
    # Ink in a shadow has less contrast: its strength is a local mean, weighted by the ink itself.
    typical = np.float32(np.quantile(strokes[strokes > 0], 0.8))
    shape = [max(1, round(n * min(1, COARSE_SIZE / max(ink.shape)))) for n in ink.shape]
    down = [_filter(n, m, n / 4) for n, m in zip(ink.shape, shape, strict=True)]
    up = [_filter(m, n) for n, m in zip(ink.shape, shape, strict=True)]
    weight = down[0] @ strokes @ down[1].T
    power = down[0] @ strokes**2 @ down[1].T
    prior = 0.05 * weight.max()
    strength = up[0] @ ((power + prior * typical) / (weight + prior)) @ up[1].T
    result: Array = np.clip(strokes / np.maximum(strength, 0.4 * typical), 0, 1)
    return result


def _grey(image: Array) -> Array:
    """Luma, 0 ... 255, averaged over blocks of pixels so that the longer side has at most WORKING_SIZE."""
    if not isinstance(image, np.ndarray) or image.dtype != np.uint8:
        got = image.dtype if isinstance(image, np.ndarray) else _check.describe(image)
        raise TypeError(f"image must be a uint8 array, got {got}")
    if image.ndim not in (2, 3) or (image.ndim == 3 and image.shape[2] not in (1, 2, 3, 4)) or not image.size:
        raise ValueError(f"image must have shape (H, W) or (H, W, 1 ... 4), none of them 0, got {image.shape}")
    pixels = image if image.ndim == 3 else image[:, :, None]
    luma = np.array([0.299, 0.587, 0.114] if pixels.shape[2] > 2 else [1], np.float32)
    H, W = pixels.shape[:2]
    block = -(-max(H, W) // WORKING_SIZE)
    columns = np.arange(0, W, block)
    widths = np.diff(columns, append=W).astype(np.float32)
    grey = np.empty((-(-H // block), len(columns)), np.float32)
    alpha = np.ones_like(grey)
    for row in range(len(grey)):  # one row of blocks at a time: the picture may have 50 million pixels
        rows = pixels[row * block : (row + 1) * block]
        color = rows[:, :, : len(luma)] @ luma
        if pixels.shape[2] in (2, 4):
            opacity = rows[:, :, -1] / np.float32(255)
            alpha[row] = np.add.reduceat(opacity.mean(axis=0), columns) / widths
            color *= opacity
        grey[row] = np.add.reduceat(color.mean(axis=0), columns) / widths
    # Behind dark ink the transparent part is white, behind light ink black.
    return grey + (1 - alpha) * 255 if grey.sum() < 128 * alpha.sum() else grey


def _subtract_background(grey: Array) -> Array:
    """The height of the ink above the background, in grey levels: positive where there is ink, about 0 elsewhere."""
    h, w = grey.shape
    shape = [max(1, round(n * min(1, COARSE_SIZE / max(h, w)))) for n in (h, w)]
    down = [_filter(n, m) for n, m in zip((h, w), shape, strict=True)]
    up = [_filter(m, n) for n, m in zip((h, w), shape, strict=True)]
    coarse = down[0] @ grey @ down[1].T
    plane = _plane(coarse)
    coarse, grey = coarse - plane, grey - up[0] @ plane @ up[1].T

    # Ink covers less than half of the surroundings: it lies on one side of the local median.
    difference = grey - up[0] @ _local_median(coarse) @ up[1].T
    if (difference**3).sum() < 0:
        grey, coarse = -grey, -coarse

    width = max(3, round(OPENING * max(shape)) | 1)
    opened = _sliding(_sliding(coarse, width, np.minimum), width, np.maximum)
    blur = [_filter(m, m, OPENING * max(shape) / 2) for m in shape]
    ink = coarse - opened
    background = ink < 0.25 * ink.max() + 1e-3  # the minimum lies below the mean of the noise: corrected by this mean
    weight = blur[0] @ background.astype(np.float32) @ blur[1].T
    offset = blur[0] @ (ink * background) @ blur[1].T / np.maximum(weight, 1e-6)
    height: Array = grey - up[0] @ (opened + offset) @ up[1].T
    return height


def _plane(image: Array) -> Array:
    """The plane with the smallest sum of distances to `image`, at its size: most of a shadow's gradient."""
    y, x = np.mgrid[-1 : 1 : image.shape[0] * 1j, -1 : 1 : image.shape[1] * 1j]
    terms = np.stack([np.ones(image.size), y.ravel(), x.ravel()], axis=1)
    values, weights = image.ravel(), np.ones(image.size)
    for _ in range(12):  # least squares, each point weighted by 1 / distance of the last
        weighted = terms.T * weights
        plane = terms @ np.linalg.lstsq(weighted @ terms, weighted @ values)[0]
        weights = 1 / (abs(values - plane) + 1)
    result: Array = plane.reshape(image.shape).astype(np.float32)
    return result


def _local_median(image: Array) -> Array:
    """Medians over windows of 0.8 times the longer side, on a grid of at most 24 pixels, at the size of `image`."""
    shape = [min(n, 24) for n in image.shape]
    down = [_filter(n, m) for n, m in zip(image.shape, shape, strict=True)]
    up = [_filter(m, n) for n, m in zip(image.shape, shape, strict=True)]
    half = int(0.4 * max(shape))
    padded = np.pad(down[0] @ image @ down[1].T, half, mode="edge")
    windows = np.lib.stride_tricks.sliding_window_view(padded, (2 * half + 1, 2 * half + 1))
    medians: Array = up[0] @ np.median(windows, axis=(2, 3)) @ up[1].T
    return medians


def _noise(ink: Array) -> float:
    """Standard deviation of the background, from the pixels below it: there is no ink among them."""
    below = -ink[ink < 0]
    return 1.4826 * float(np.median(below)) if below.size else 0.0


# --- components -------------------------------------------------------------------------------------------------------


def _components(ink: Array) -> tuple[Array, Array]:
    """Connected components: their numbers at every pixel of ink, -1 elsewhere, and their masses (sums of the ink)."""
    reach = max(1, round(0.006 * max(ink.shape)))  # gaps of this many pixels are bridged
    mask = _sliding((ink > LEVEL).astype(np.uint8), 2 * reach + 1, np.maximum) > 0
    index = np.full(mask.shape, -1)
    index[mask] = np.arange(mask.sum())
    pairs = []
    for a, b in ((index[:, :-1], index[:, 1:]), (index[:-1], index[1:])):
        both = (a >= 0) & (b >= 0)
        pairs.append(np.stack([a[both], b[both]]))
    a, b = np.concatenate(pairs, axis=1)
    parent = np.arange(mask.sum())
    while len(a):  # hook every root to the smallest neighbour, then halve the paths
        np.minimum.at(parent, np.maximum(parent[a], parent[b]), np.minimum(parent[a], parent[b]))
        while (parent != parent[parent]).any():
            parent = parent[parent]
        apart = parent[a] != parent[b]
        a, b = a[apart], b[apart]
    numbers = np.unique(parent, return_inverse=True)[1]
    labels = np.full(mask.shape, -1)
    labels[mask] = numbers
    return labels, np.bincount(numbers, ink[mask])


def _find_parts(ink: Array) -> tuple[Array, dict[int, tuple[slice, slice]]]:
    """The labels of `_components`, and the boxes, by label, of the parts of digits: no specks, and no shadows at the
    edge of the picture if there is enough ink inside.  ValueError if only specks are left."""
    labels, masses = _components(ink)
    boxes = {int(n): _box(labels == n) for n in np.flatnonzero(masses >= MIN_MASS * masses.max(initial=0))}
    inside = [
        n for n, box in boxes.items() if all(s.start > 0 and s.stop < m for s, m in zip(box, ink.shape, strict=True))
    ]
    if masses[inside].max(initial=0) >= 0.3 * masses.max(initial=0):
        boxes = {n: boxes[n] for n in inside}
    extents = {n: max(side.stop - side.start for side in box) for n, box in boxes.items()}
    largest = max(extents.values(), default=0)
    if largest < min(8, max(ink.shape) / 4) or largest < 0.03 * max(ink.shape):
        raise ValueError(BLANK)
    return labels, {n: box for n, box in boxes.items() if extents[n] >= MIN_EXTENT * largest}


# --- the normal form --------------------------------------------------------------------------------------------------


def _normalize(ink: Array, size: int) -> Array:
    """Ink, 0 ... 1, of one digit as (size, size) uint8: in its box, with its centre of mass in the middle."""
    box = round(size * 20 / 28)
    fine = _fit(ink, box * SCALE)
    fine /= np.quantile(fine[fine > 0.1 * fine.max()], 0.8)  # strokes thinner than a pixel are diluted
    fine = np.clip(2 * (fine - 0.5) + 0.5, 0, 1)
    radius = (SCALE * MIN_STROKE - _stroke_width(fine)) / 2
    if radius > 0.5:
        fine = _dilate(np.pad(fine, int(radius)), radius)
    fine = _fit(fine, box * SCALE)
    shape = [-(-n // SCALE) for n in fine.shape]
    spare = [m * SCALE - n for n, m in zip(fine.shape, shape, strict=True)]
    fine = np.pad(fine, [(n // 2, n - n // 2) for n in spare])
    small = fine.reshape(shape[0], SCALE, shape[1], SCALE).mean(axis=(1, 3))
    small = np.rint(small * (255 / small.max()))
    result = np.zeros((size, size), np.uint8)
    place = []
    for axis in (0, 1):
        mass = small.sum(axis=1 - axis)
        center = mass @ np.arange(len(mass)) / mass.sum()
        start = min(max(int(np.floor(size / 2 - center + 0.5)), 0), size - len(mass))
        place.append(slice(start, start + len(mass)))
    result[place[0], place[1]] = small
    return result


def _fit(ink: Array, size: int) -> Array:
    """The box of the ink, scaled so that its longer side has `size` pixels."""
    ink = ink[_box(ink > LEVEL)]
    shape = [max(1, round(n * size / max(ink.shape))) for n in ink.shape]
    down = [_filter(n, m) for n, m in zip(ink.shape, shape, strict=True)]
    fitted: Array = down[0] @ ink @ down[1].T
    return fitted


def _stroke_width(ink: Array) -> float:
    """Mean width of the strokes in pixels: twice the area over the length of the outline, which is the sum of the
    slopes of the ink."""
    down, right = np.gradient(np.pad(ink, 1))
    return float(2 * ink.sum() / np.hypot(down, right).sum())


def _dilate(image: Array, radius: float) -> Array:
    """Largest value within `radius` pixels."""
    r = int(radius)
    h, w = image.shape
    padded = np.pad(image, r)
    offsets = [(y, x) for y in range(2 * r + 1) for x in range(2 * r + 1) if np.hypot(y - r, x - r) <= radius]
    result: Array = np.max([padded[y : y + h, x : x + w] for y, x in offsets], axis=0)
    return result


# --- filters ----------------------------------------------------------------------------------------------------------


def _filter(n: int, m: int, radius: float = 0) -> Array:
    """Matrix (m, n) float32 that resamples n pixels to m with a triangle of at least `radius` input pixels: linear
    interpolation if m > n, weighted means if m < n."""
    centers = (np.arange(m, dtype=np.float32)[:, None] + 0.5) * (n / m) - 0.5
    distance = np.abs(centers - np.arange(n, dtype=np.float32))
    weights: Array = np.maximum(0, 1 - distance / np.float32(max(radius, n / m, 1)))
    weights /= weights.sum(axis=1, keepdims=True)
    return weights


def _sliding(image: Array, width: int, extreme: Callable[[Array, Array], Array]) -> Array:
    """Largest or smallest values over windows of width x width pixels; outside, the edge is repeated."""
    for axis in (0, 1):
        view = np.pad(np.moveaxis(image, axis, 0), [(width // 2, (width - 1) // 2), (0, 0)], mode="edge")
        reach = 1
        while 2 * reach <= width:
            view, reach = extreme(view[:-reach], view[reach:]), 2 * reach
        if reach < width:
            view = extreme(view[: len(view) - (width - reach)], view[width - reach :])
        image = np.moveaxis(view, 0, axis)
    return image


def _box(mask: Array) -> tuple[slice, slice]:
    """The smallest rectangle around the pixels of `mask`."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    return slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)
