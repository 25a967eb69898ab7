"""Pictures of digits that are not like MNIST's: accuracy with and without tinycnn.digits.prepare, calibration, and
rejection of pictures that show no digit.

    python -m benchmarks digit-photos MODEL [--count 2000] [--json FILE] [--pictures FILE.png]

MODEL is a file of Sequential.save.  The pictures are drawn from pen paths, or from MNIST's test digits, at any place of
pictures of 60 to 400 pixels, with pens of 1 to 12 pixels, rotated by up to 12 degrees, dark on light or light on dark,
with the texture of paper, shadows, dust and the artefacts of JPEG.
"""

import io
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from tinycnn import data
from tinycnn.data.synthetic import _style_table

TURN = 12  # degrees
OVERSAMPLING = 4


def draw_path(label: int, height: float, pen: float, turn: float, rng: np.random.Generator) -> np.ndarray:
    """Ink 0 ... 1 (h, w) of a digit of the pen paths, `height` pixels high before the rotation."""
    table = _style_table()
    style = table.weighted[table.start[label] + rng.integers(table.size[label])]
    points = table.points[style] + rng.normal(0, 0.02, table.points.shape[1:])
    cos, sin = np.cos(turn), np.sin(turn)
    matrix = np.array([[cos, -sin], [sin, cos]]) @ np.diag([np.exp(rng.normal(0, 0.12)), 1])
    path = table.basis[style] @ points @ matrix.T * height * OVERSAMPLING
    radius = pen * OVERSAMPLING / 2
    path += np.ceil(radius) + OVERSAMPLING - path.min(axis=0)
    width, height = np.ceil(path.max(axis=0) + radius + OVERSAMPLING).astype(int)
    picture = Image.new("L", (int(width), int(height)))
    pencil = ImageDraw.Draw(picture)
    for n, (x, y) in enumerate(path):
        pencil.ellipse((x - radius, y - radius, x + radius, y + radius), fill=255)
        if not table.lifted[style][n]:
            pencil.line((*path[n - 1], x, y), fill=255, width=max(1, round(2 * radius)))
    return np.asarray(picture.reduce(OVERSAMPLING)) / np.float32(255)


def draw_mnist(image: np.ndarray, height: float, turn: float) -> np.ndarray:
    """Ink 0 ... 1 (h, w) of a digit of MNIST, enlarged and rotated, with the sharp outline of a pen."""
    side = round(height * 28 / 20)
    picture = Image.fromarray(image).resize((4 * side, 4 * side), Image.Resampling.BICUBIC)
    picture = picture.filter(ImageFilter.GaussianBlur(4 * side / 56)).rotate(
        -np.degrees(turn), Image.Resampling.BICUBIC
    )
    ink = np.asarray(picture.point(lambda v: 255 * (v > 110)).reduce(4)) / np.float32(255)
    rows, columns = np.flatnonzero(ink.any(axis=1)), np.flatnonzero(ink.any(axis=0))
    return ink[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]


def photograph(ink: np.ndarray, shape: tuple[int, int], rng: np.random.Generator) -> tuple[np.ndarray, dict[str, Any]]:
    """A picture uint8 of `shape` with the ink at a random place, and what was done to it."""
    h, w = shape
    canvas = np.zeros(shape, np.float32)
    top, left = rng.integers(h - ink.shape[0] + 1), rng.integers(w - ink.shape[1] + 1)
    canvas[top : top + ink.shape[0], left : left + ink.shape[1]] = ink
    specks = int(rng.integers(0, 5))
    for _ in range(specks):
        size = rng.integers(1, 3, 2)
        y, x = rng.integers(h - 2), rng.integers(w - 2)
        canvas[y : y + size[0], x : x + size[1]] = rng.uniform(0.4, 1)

    inverted = bool(rng.random() < 0.5)  # chalk on a board instead of ink on paper
    paper = rng.uniform(15, 90) if inverted else rng.uniform(160, 245)
    contrast = rng.uniform(70, 240 - paper if inverted else paper - 10)
    light = np.ones(shape, np.float32)
    shadow = rng.choice(["none", "gradient", "edge"])
    y, x = np.mgrid[0:h, 0:w] / np.float32(max(h, w))
    angle = rng.uniform(0, 2 * np.pi)
    along = np.cos(angle) * (x - x.mean()) + np.sin(angle) * (y - y.mean())
    if shadow == "gradient":
        light += rng.uniform(0.3, 0.8) * along - 0.15
    elif shadow == "edge":  # soft
        light -= rng.uniform(0.2, 0.5) / (1 + np.exp(-(along + rng.uniform(-0.3, 0.3)) * rng.uniform(8, 30)))
    texture = rng.uniform(0, 6)
    coarse = Image.fromarray(rng.normal(0, 1, (h // 6 + 2, w // 6 + 2)).astype(np.float32))
    fibres = np.asarray(coarse.resize((w, h), Image.Resampling.BICUBIC))
    noise = texture * (fibres + rng.normal(0, 1, shape))
    picture = (paper + (contrast if inverted else -contrast) * canvas) * light + noise
    quality = int(rng.integers(30, 91))
    file = io.BytesIO()
    Image.fromarray(np.clip(picture, 0, 255).astype(np.uint8)).save(file, "JPEG", quality=quality)
    return np.asarray(Image.open(file)), {
        "inverted": inverted,
        "shadow": str(shadow),
        "texture": float(texture),
        "jpeg": quality,
        "contrast": float(contrast),
    }


def make_pictures(source: str, count: int, seed: int) -> tuple[list[np.ndarray], np.ndarray, list[dict[str, Any]]]:
    """`count` pictures (h, w) uint8, their labels and conditions.  source: "pen paths" or "MNIST"."""
    rng = np.random.default_rng(seed)
    mnist = data.load("mnist") if source == "MNIST" else None
    pictures, labels, conditions = [], [], []
    while len(pictures) < count:
        side = np.exp(rng.uniform(np.log(60), np.log(400)))
        shape = round(side * rng.uniform(0.75, 1)), round(side)
        shape = shape if rng.random() < 0.5 else shape[::-1]
        height = rng.uniform(0.35, 0.9) * min(shape)
        pen = min(rng.integers(1, 13), height / 7)
        turn = np.radians(rng.uniform(-TURN, TURN))
        if mnist is None:
            label = len(pictures) % 10
            ink = draw_path(label, height - pen, pen, turn, rng)
        else:
            pen, index = np.nan, rng.integers(len(mnist.test_images))
            label, ink = int(mnist.test_labels[index]), draw_mnist(mnist.test_images[index], height, turn)
        if ink.shape[0] > shape[0] or ink.shape[1] > shape[1]:
            continue
        picture, condition = photograph(ink, shape, rng)
        pictures.append(picture)
        labels.append(label)
        conditions.append(
            {"side": round(side), "height": height, "pen": float(pen), "turn": np.degrees(turn), **condition}
        )
    return pictures, np.array(labels), conditions


def resize(picture: np.ndarray) -> np.ndarray:
    """The whole picture at 28 x 28, without preparation."""
    return np.asarray(Image.fromarray(picture).resize((28, 28), Image.Resampling.BOX))
