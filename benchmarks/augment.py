"""Random distortions of 1,000 images of MNIST's size, tinycnn and scipy.ndimage.

    python -m benchmarks augment [--batches 10] [--turns 15] [--threads N] [--json FILE]

Both draw the random numbers, filter the noise and interpolate, for batches of 100 images. SciPy, which has one thread,
filters the fields of a batch in one call and interpolates image by image (affine_transform, map_coordinates), its
fastest way that we know. Before times are measured, both images from the same random numbers are compared. The two
then alternate, batch by batch. Printed times are medians over the turns.
"""

import argparse
import json
import os
import platform
import statistics
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from tinycnn.hardware import processor

SIZE, BATCH = 28, 100
AFFINE: dict[str, Any] = {"degrees": 15, "translate": (2, 2), "scale": (0.9, 1.1), "squeeze": (0.9, 1.1), "shear": 10}
ALPHA, SIGMA = 34, 4
TOLERANCE = 1e-4  # of grey levels 0 ... 1: coordinates are rounded to about 1e-6 of a pixel, several times
DISTORTIONS = {"affine": (True, False), "elastic": (False, True), "both": (True, True)}


class TinyCNN:
    """affine, elastic: the distortions to apply."""

    def __init__(self, affine, elastic):
        from tinycnn import ElasticTransform, kernels

        self.ops, self.result = kernels, np.empty((BATCH, 1, SIZE, SIZE), np.float32)
        self.matrices = np.empty((BATCH if affine else 0, 2, 3), np.float32)
        self.field = np.empty((BATCH if elastic else 0, 2, SIZE, SIZE), np.float32)
        self.weights = ElasticTransform(ALPHA, SIGMA).weights().astype(np.float32)
        self.background = np.zeros(1, np.float32)
        self.counter, self.offset = np.zeros(1, np.int64), np.zeros(1, np.int64)

    def run(self, images):
        ops = self.ops
        ops.increment(self.counter)
        if len(self.matrices):
            ops.random_affine(self.matrices, self.counter, self.offset, 1, *AFFINE.values())
        if len(self.field):
            ops.elastic_field(self.field, self.weights, self.counter, self.offset, 2, ALPHA)
        ops.warp(self.result, images, self.matrices, self.field, self.background)
        return self.result

    def numbers(self):
        """Random numbers of the last run: matrices and noise (with a filter of a single tap)."""
        noise = np.empty_like(self.field)
        if len(noise):
            self.ops.elastic_field(noise, np.ones(1, np.float32), self.counter, self.offset, 2, 1.0)
        return self.matrices, noise


class SciPy:
    def __init__(self, affine, elastic):
        from scipy import ndimage

        self.ndimage, self.affine, self.elastic = ndimage, affine, elastic
        self.rng = np.random.default_rng(0)
        self.grid = np.indices((SIZE, SIZE), np.float32).reshape(2, -1)

    def draw(self):
        n, rng = BATCH, self.rng
        matrices = np.zeros((n if self.affine else 0, 2, 3), np.float32)
        if self.affine:
            angle, shear = (np.radians(AFFINE[key]) * rng.uniform(-1, 1, n) for key in ("degrees", "shear"))
            s, c, slope = np.sin(angle), np.cos(angle), np.tan(shear)
            size, e = (a + (b - a) * rng.random(n) for a, b in (AFFINE["scale"], AFFINE["squeeze"]))
            matrices[:, 0, 0], matrices[:, 0, 1] = c * e / size, -s * e / size
            matrices[:, 1, 0], matrices[:, 1, 1] = (s + slope * c) / (size * e), (c - slope * s) / (size * e)
            across, down = (t * rng.uniform(-1, 1, n) for t in AFFINE["translate"])
            matrices[:, :, 2] = -(matrices[:, :, 0] * down[:, None] + matrices[:, :, 1] * across[:, None])
        noise = rng.random((n if self.elastic else 0, 2, SIZE, SIZE), np.float32) * 2 - 1
        return matrices, noise

    def run(self, images, numbers=None):
        matrices, noise = self.draw() if numbers is None else numbers
        nd, result, center = self.ndimage, np.empty_like(images), (SIZE - 1) / 2
        options = {"order": 1, "mode": "grid-constant", "cval": 0.0, "prefilter": False}
        if self.elastic:
            field = nd.gaussian_filter(noise, (0, 0, SIGMA, SIGMA), mode="constant", truncate=4) * ALPHA
            field = field.reshape(len(noise), 2, -1)
        for n, (image, out) in enumerate(zip(images[:, 0], result[:, 0], strict=True)):
            if self.affine:
                linear, offset = matrices[n, :, :2], matrices[n, :, 2] + center
                offset = offset - linear.sum(axis=1) * center
            if not self.elastic:
                nd.affine_transform(image, linear, offset, output=out, **options)
                continue
            coordinates = linear @ self.grid + offset[:, None] if self.affine else self.grid
            nd.map_coordinates(image, coordinates + field[n], output=out.reshape(-1), **options)
        return result


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, default=10)
    parser.add_argument("--turns", type=int, default=15, help="turns of each competitor")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--json", type=Path, help="write the figures to this file too")
    args = parser.parse_args(argv)
    try:
        versions = {"python": platform.python_version()} | {n: metadata.version(n) for n in ("numpy", "numba", "scipy")}
    except metadata.PackageNotFoundError:
        sys.exit("scipy is not installed: pip install scipy")

    from tinycnn import set_num_threads

    set_num_threads(args.threads)
    libraries = ", ".join(f"{name} {version}" for name, version in versions.items())
    print(f"{processor()}, {os.cpu_count()} cores, {args.threads} threads (scipy: 1); {libraries}")
    count = args.batches * BATCH
    print(f"{count:,} images of {SIZE} x {SIZE}, float32, {BATCH} at a time; medians of {args.turns} turns\n")
    result = {
        "processor": processor(), "cores": os.cpu_count(), "threads": args.threads, "versions": versions,
        "images": count, "batch": BATCH, "rows": [],
    }  # fmt: skip
    images = np.random.default_rng(0).random((args.batches, BATCH, 1, SIZE, SIZE), np.float32)
    row_format = "{:<8} {:>18} {:>16} {:>16} {:>7}"
    print(row_format.format("", "largest difference", "tinycnn", "scipy.ndimage", "ratio"))
    print(row_format.format("", "", "µs an image", "µs an image", ""))
    for name, kinds in DISTORTIONS.items():
        tinycnn, scipy = TinyCNN(*kinds), SciPy(*kinds)
        difference = max(float(abs(tinycnn.run(b) - scipy.run(b, tinycnn.numbers())).max()) for b in images)
        if difference > TOLERANCE:
            sys.exit(f"{name}: the images differ by up to {difference}")
        turns: dict[str, list[float]] = {"tinycnn": [], "scipy": []}
        for _ in range(args.turns):
            seconds = dict.fromkeys(turns, 0.0)
            for batch in images:
                for competitor, run in (("scipy", scipy.run), ("tinycnn", tinycnn.run)):
                    start = time.perf_counter()
                    run(batch)
                    seconds[competitor] += time.perf_counter() - start
            for competitor, total in seconds.items():
                turns[competitor].append(total)
        micros = {name: statistics.median(totals) / count * 1e6 for name, totals in turns.items()}
        ratio = micros["scipy"] / micros["tinycnn"]
        print(
            row_format.format(
                name, f"{difference:.1e}", f"{micros['tinycnn']:.2f}", f"{micros['scipy']:.1f}", f"{ratio:.1f}"
            ),
            flush=True,
        )
        row = {"distortion": name, "difference": difference, "microseconds_an_image": micros, "ratio": ratio}
        result["rows"].append(row)
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
