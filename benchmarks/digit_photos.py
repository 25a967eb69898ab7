"""Pictures of digits that are not like MNIST's: accuracy with and without tinycnn.digits.prepare, calibration, and
rejection of pictures that show no digit.

    python -m benchmarks digit-photos MODEL [--count 2000] [--json FILE] [--pictures FILE.png]

MODEL is a file of Sequential.save.  The pictures are drawn from pen paths, or from MNIST's test digits, at any place of
pictures of 60 to 400 pixels, with pens of 1 to 12 pixels, rotated by up to 12 degrees, dark on light or light on dark,
with the texture of paper, shadows, dust and the artefacts of JPEG.
"""

import argparse
import io
import json
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from benchmarks import _report
from tinycnn import calibration, data, digits, load, metrics
from tinycnn.data.synthetic import _style_table
from tinycnn.hardware import git_revision

SOURCES = ("pen paths", "MNIST")
LIMITS: dict[str, list[float]] = {  # of the groups of each condition
    "pen": [1, 2, 4, 8, 13],
    "height": [0, 40, 80, 160, 400],
    "contrast": [70, 100, 150, 250],
    "texture": [0, 2, 4, 6],
    "jpeg": [30, 50, 70, 91],
    "turn": [-12, -6, 6, 12],
}
FIRST_SEED = 100  # smaller seeds drew the pictures that digits.prepare was developed on
QUANTILE = 0.02  # of the digits, to be refused
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
    pictures: list[np.ndarray] = []
    labels: list[int] = []
    conditions: list[dict[str, Any]] = []
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


# --- measuring --------------------------------------------------------------------------------------------------------


def resize(picture: np.ndarray, invert: bool = False) -> np.ndarray:
    """The whole picture at 28 x 28, without preparation.  invert: if it is light."""
    small = np.asarray(Image.fromarray(picture).resize((28, 28), Image.Resampling.BOX))
    return 255 - small if invert and small.mean() > 127 else small


def prepare(picture: np.ndarray) -> np.ndarray | None:
    """None if there seems to be no ink."""
    try:
        return digits.prepare(picture)
    except ValueError:
        return None


def accuracies(correct: np.ndarray, conditions: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Accuracy in each group of each condition."""
    groups: dict[str, dict[str, float]] = {}
    for name in (*LIMITS, "shadow", "inverted"):
        values = np.array([condition[name] for condition in conditions])
        if name in LIMITS:
            masks = {f"{low:g} to {high:g}": (values >= low) & (values < high) for low, high in pairwise(LIMITS[name])}
        else:
            masks = {str(value).lower(): values == value for value in np.unique(values)}
        groups[name] = {text: float(correct[mask].mean()) for text, mask in masks.items() if mask.any()}
    return {name: group for name, group in groups.items() if group}  # the pen is not known for MNIST's digits


def measure_source(model: Any, source: str, count: int) -> tuple[dict[str, Any], np.ndarray, np.ndarray, list[Any]]:
    """The row of a source, the logits of its prepared pictures, their labels, and pairs for a contact sheet."""
    pictures, labels, conditions = make_pictures(source, count, seed=FIRST_SEED + SOURCES.index(source))
    start = time.perf_counter()
    prepared = [prepare(picture) for picture in pictures]
    seconds = (time.perf_counter() - start) / count
    ready = np.stack([np.zeros((28, 28), np.uint8) if image is None else image for image in prepared])
    logits = model.outputs(ready[:, None])
    correct = logits.argmax(axis=1) == labels
    row: dict[str, Any] = {"source": source, "count": count}
    for name, invert in (("resized", False), ("resized_inverted", True)):
        small = np.stack([resize(picture, invert) for picture in pictures])
        row[name] = float((model.predict(small[:, None]) == labels).mean())
    row |= {"prepared": float(correct.mean()), "no_ink_found": sum(image is None for image in prepared)}
    row |= {"seconds_per_picture": seconds, "groups": accuracies(correct, conditions)}
    print(
        f"\n{source}: {count} pictures, {1000 * seconds:.0f} ms each to prepare, no ink found in {row['no_ink_found']}"
    )
    print(f"resized {row['resized']:.2%}, also inverted {row['resized_inverted']:.2%}, prepared {row['prepared']:.2%}")
    for name, group in row["groups"].items():
        print(f"  {name:<9}" + ", ".join(f"{text}: {value:.2%}" for text, value in group.items()), flush=True)
    shown = [*range(min(count, 64)), *np.flatnonzero(~correct)[:32]]
    return row, logits, labels, [(pictures[n], ready[n]) for n in shown]


def measure_calibration(images: str, logits: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
    """The temperature of every second image; calibration errors of the others."""
    temperature = calibration.fit_temperature(logits[::2], labels[::2])
    row: dict[str, Any] = {"images": images, "temperature": temperature}
    for suffix, T in (("", 1.0), ("_with_temperature", temperature)):
        exp = np.exp((logits[1::2] - logits[1::2].max(axis=1, keepdims=True)).astype(np.float64) / T)
        probabilities = exp / exp.sum(axis=1, keepdims=True)
        row["ece" + suffix] = calibration.expected_calibration_error(probabilities, labels[1::2])
        row["nll" + suffix] = float(-np.log(probabilities[np.arange(len(exp)), labels[1::2]]).mean())
    changes = (f"{name} {row[name]:.4f} -> {row[name + '_with_temperature']:.4f}" for name in ("ece", "nll"))
    print(f"{images}: T = {temperature:.3f}, {', '.join(changes)}")
    return row


def scores(logits: np.ndarray, temperature: float) -> dict[str, np.ndarray]:
    """Scores that may separate digits from other pictures: larger for digits."""
    ordered = np.sort(logits.astype(np.float64), axis=1)
    return {
        "probability": metrics.confidence(logits.astype(np.float64) / temperature),
        "energy": calibration.rejection_score(logits),
        "largest logit": ordered[:, -1],
        "margin": ordered[:, -1] - ordered[:, -2],
    }


def area_under_roc(positive: np.ndarray, negative: np.ndarray) -> float:
    """Probability that a positive has a larger score than a negative."""
    ordered = np.sort(negative)
    below = np.searchsorted(ordered, positive, "left") + np.searchsorted(ordered, positive, "right")
    return float(below.mean() / 2 / len(negative))


def measure_rejection(logits: np.ndarray, other: np.ndarray, temperature: float) -> list[dict[str, Any]]:
    """For each score, the threshold of every second digit; what is refused of the other digits and of `other`."""
    rows = []
    negatives = scores(other, temperature)
    kinds = {"letters": [0, 1], "scribbles": [2], "noise": [3]}  # their order in not_digits
    print(f"\n{'refused by':<14} {'AUROC':>7} {'digits':>7} {'others':>7} " + " ".join(f"{kind:>9}" for kind in kinds))
    for name, values in scores(logits, temperature).items():
        threshold = calibration.fit_threshold(values[::2], QUANTILE)
        refused = negatives[name] < threshold
        row: dict[str, Any] = {"score": name, "auroc": area_under_roc(values[1::2], negatives[name])}
        row |= {"digits_refused": float((values[1::2] < threshold).mean()), "others_refused": float(refused.mean())}
        row |= {kind: float(refused[np.isin(np.arange(len(other)) % 4, turns)].mean()) for kind, turns in kinds.items()}
        shares = " ".join(f"{row[kind]:>9.1%}" for kind in kinds)
        print(f"{name:<14} {row['auroc']:>7.4f} {row['digits_refused']:>7.1%} {row['others_refused']:>7.1%} {shares}")
        rows.append(row)
    return rows


def contact_sheet(pairs: list[Any], cell: int = 96, columns: int = 16) -> Image.Image:
    """Rows of pictures, each above the row of what was prepared from them."""
    sheet = Image.new("L", (columns * cell, 2 * cell * -(-len(pairs) // columns)), 90)
    for n, pair in enumerate(pairs):
        for m, picture in enumerate(pair):
            scale = (cell - 4) / max(picture.shape)
            h, w = (max(1, round(side * scale)) for side in picture.shape)
            method = Image.Resampling.NEAREST if scale > 1 else Image.Resampling.BOX
            image = Image.fromarray(picture).resize((w, h), method)
            sheet.paste(image, (n % columns * cell, (2 * (n // columns) + m) * cell))
    return sheet


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", metavar="MODEL")
    parser.add_argument("--count", type=int, default=2000, help="pictures of each source")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to this file too")
    parser.add_argument(
        "--pictures", type=Path, metavar="FILE", help="draw 64 pictures of each source, and errors (PNG)"
    )
    args = parser.parse_args(argv)

    model = load(args.model)
    result: dict[str, Any] = {"command": "digit-photos", "hardware": _report.hardware(), "versions": _report.versions()}
    result |= {"revision": git_revision(), "parameters": int(model.theta.size), "rows": []}
    mnist = data.load("mnist")
    images = {"MNIST test set": (model.outputs(mnist.test_images[:, None]), mnist.test_labels)}
    shown = []
    for source in SOURCES:
        row, logits, labels, pairs = measure_source(model, source, args.count)
        result["rows"].append(row)
        images[source] = logits, labels
        shown += pairs
    logits, labels = (np.concatenate([images[source][n] for source in SOURCES]) for n in (0, 1))
    images["both sources"] = logits, labels
    print()
    result["calibration"] = [measure_calibration(name, *pair) for name, pair in images.items()]
    other = model.outputs(data.not_digits(args.count, rng=0)[:, None])
    result["rejection"] = measure_rejection(logits, other, result["calibration"][-1]["temperature"])
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")
    if args.pictures:
        contact_sheet(shown).save(args.pictures)


if __name__ == "__main__":
    main()
