"""Random distortions of 1,000 images of MNIST's size, tinycnn against scipy.ndimage.

    python -m benchmarks augment [--batches 10] [--turns 15] [--threads N] [--json FILE]

Both do all of it: draw the random numbers, filter the noise, interpolate, for batches of 100 images.  SciPy, which has
one thread, filters the fields of a batch in one call and interpolates image by image (affine_transform,
map_coordinates): the fastest way of using it that we know.  Before any time is taken both get the same random numbers,
and their images are compared.  The two then run in turn, a batch each, and the medians of the turns' sums are printed.
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
TOLERANCE = 1e-4  # of grey levels 0 ... 1: a place is rounded to about 1e-6 of a pixel, and twice more
DISTORTIONS = {"affine": (True, False), "elastic": (False, True), "both": (True, True)}


class TinyCNN:
    """`affine`, `elastic`: which distortions."""

    def __init__(self, affine, elastic):
        from tinycnn import ElasticTransform, kernels

        self.ops, self.result = kernels, np.empty((BATCH, 1, SIZE, SIZE), np.float32)
        self.matrices = np.empty((BATCH if affine else 0, 2, 3), np.float32)
        self.field = np.empty((BATCH if elastic else 0, 2, SIZE, SIZE), np.float32)
        self.weights = ElasticTransform(ALPHA, SIGMA).weights().astype(np.float32)
        self.background, self.counter = np.zeros(1, np.float32), np.zeros(1, np.int64)

    def run(self, images):
        k = self.ops
        k.increment(self.counter)
        if len(self.matrices):
            k.random_affine(self.matrices, self.counter, 1, *AFFINE.values())
        if len(self.field):
            k.elastic_field(self.field, self.weights, self.counter, 2, ALPHA)
        k.warp(self.result, images, self.matrices, self.field, self.background)
        return self.result

    def numbers(self):
        """The random numbers of the last run: matrices, and the noise, which a filter of one tap leaves as it is."""
        noise = np.empty_like(self.field)
        if len(noise):
            self.ops.elastic_field(noise, np.ones(1, np.float32), self.counter, 2, 1.0)
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
            angle, slant = (np.radians(AFFINE[key]) * rng.uniform(-1, 1, n) for key in ("degrees", "shear"))
            s, c, slope = np.sin(angle), np.cos(angle), np.tan(slant)
            size, e = (a + (b - a) * rng.random(n) for a, b in (AFFINE["scale"], AFFINE["squeeze"]))
            matrices[:, 0, 0], matrices[:, 0, 1] = c * e / size, -s * e / size
            matrices[:, 1, 0], matrices[:, 1, 1] = (s + slope * c) / (size * e), (c - slope * s) / (size * e)
            across, down = (t * rng.uniform(-1, 1, n) for t in AFFINE["translate"])
            matrices[:, :, 2] = -(matrices[:, :, 0] * down[:, None] + matrices[:, :, 1] * across[:, None])
        noise = rng.random((n if self.elastic else 0, 2, SIZE, SIZE), np.float32) * 2 - 1
        return matrices, noise

    def run(self, images, numbers=None):
        matrices, noise = self.draw() if numbers is None else numbers
        nd, result, middle = self.ndimage, np.empty_like(images), (SIZE - 1) / 2
        options = {"order": 1, "mode": "grid-constant", "cval": 0.0, "prefilter": False}
        if self.elastic:
            field = nd.gaussian_filter(noise, (0, 0, SIGMA, SIGMA), mode="constant", truncate=4) * ALPHA
            field = field.reshape(len(noise), 2, -1)
        for n, (image, to) in enumerate(zip(images[:, 0], result[:, 0], strict=True)):
            if self.affine:
                linear, offset = matrices[n, :, :2], matrices[n, :, 2] + middle
                offset = offset - linear.sum(axis=1) * middle
            if not self.elastic:
                nd.affine_transform(image, linear, offset, output=to, **options)
                continue
            places = linear @ self.grid + offset[:, None] if self.affine else self.grid
            nd.map_coordinates(image, places + field[n], output=to.reshape(-1), **options)
        return result


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, default=10)
    parser.add_argument("--turns", type=int, default=15, help="turns of each competitor")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--json", type=Path, help="write the figures here too")
    args = parser.parse_args(argv)
    try:
        versions = {"python": platform.python_version()} | {n: metadata.version(n) for n in ("numpy", "numba", "scipy")}
    except metadata.PackageNotFoundError:
        sys.exit("scipy is not installed: pip install 'tinycnn[test]'")

    from tinycnn import set_num_threads

    set_num_threads(args.threads)
    what = ", ".join(f"{name} {version}" for name, version in versions.items())
    print(f"{processor()}, {os.cpu_count()} cores, {args.threads} threads (scipy: 1); {what}")
    count = args.batches * BATCH
    print(f"{count:,} images of {SIZE} x {SIZE}, float32, {BATCH} at a time; medians of {args.turns} turns\n")
    result = {
        "processor": processor(), "cores": os.cpu_count(), "threads": args.threads, "versions": versions,
        "images": count, "batch": BATCH, "rows": [],
    }  # fmt: skip
    images = np.random.default_rng(0).random((args.batches, BATCH, 1, SIZE, SIZE), np.float32)
    layout = "{:<8} {:>18} {:>16} {:>16} {:>7}"
    print(layout.format("", "largest difference", "tinycnn", "scipy.ndimage", "ratio"))
    print(layout.format("", "", "µs an image", "µs an image", ""))
    for name, which in DISTORTIONS.items():
        ours, theirs = TinyCNN(*which), SciPy(*which)
        difference = max(float(abs(ours.run(b) - theirs.run(b, ours.numbers())).max()) for b in images)
        if difference > TOLERANCE:
            sys.exit(f"{name}: the images differ by up to {difference}")
        turns: dict[str, list[float]] = {"tinycnn": [], "scipy": []}
        for _ in range(args.turns):
            seconds = dict.fromkeys(turns, 0.0)
            for batch in images:
                for who, run in (("scipy", theirs.run), ("tinycnn", ours.run)):
                    start = time.perf_counter()
                    run(batch)
                    seconds[who] += time.perf_counter() - start
            for who, total in seconds.items():
                turns[who].append(total)
        micros = {who: statistics.median(totals) / count * 1e6 for who, totals in turns.items()}
        ratio = micros["scipy"] / micros["tinycnn"]
        print(
            layout.format(
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
