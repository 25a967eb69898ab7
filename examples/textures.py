"""Tell colour textures apart: a small net with batch norm and global pooling, on pictures made here.

    python examples/textures.py

The colours are random, so that the net must look at the texture.  It writes textures.png: pictures and predictions.
"""

import argparse

import numpy as np

import tinycnn as t
from tinycnn import plot

NAMES = ("stripes", "checks", "dots", "rings", "noise")


def texture(kind: int, rng: np.random.Generator) -> np.ndarray:
    """A picture (3, 32, 32) uint8."""
    y, x = np.mgrid[:32, :32] + rng.uniform(0, 32, (2, 1, 1))
    angle, size = rng.uniform(0, np.pi), rng.uniform(4, 9)
    u, v = (x * np.cos(angle) + y * np.sin(angle)) / size, (y * np.cos(angle) - x * np.sin(angle)) / size
    wave_u, wave_v = np.sin(2 * np.pi * u), np.sin(2 * np.pi * v)
    shape = [
        wave_u, np.sign(wave_u * wave_v), 4 * ((u % 1 - 0.5) ** 2 + (v % 1 - 0.5) ** 2 < 0.1) - 1,
        np.sin(2 * np.pi * np.hypot(x - 24, y - 24) / size), rng.normal(size=x.shape),
    ][kind]  # fmt: skip
    colour, mix = rng.uniform(0, 255, (3, 1, 1)), np.clip(0.5 + 0.5 * shape, 0, 1)
    return (
        (colour * mix + (colour + 128) % 256 * (1 - mix) + rng.normal(0, 12, (3, 32, 32))).clip(0, 255).astype(np.uint8)
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--images", type=int, default=4000, help="size of the training set")
    parser.add_argument("--out", default="textures.png")
    args = parser.parse_args()

    rng = np.random.default_rng(0)
    labels = rng.integers(0, len(NAMES), args.images + 1000)
    images = np.array([texture(kind, rng) for kind in labels])
    train, test = (images[1000:], labels[1000:]), (images[:1000], labels[:1000])
    model = t.Sequential(
        t.Conv2d(3, 16, 3, padding=1, bias=False), t.BatchNorm2d(16), t.ReLU(), t.MaxPool2d(2),
        t.Conv2d(16, 32, 3, padding=1, bias=False), t.BatchNorm2d(32), t.ReLU(), t.MaxPool2d(2),
        t.Residual(t.Conv2d(32, 32, 3, padding=1, bias=False), t.BatchNorm2d(32)), t.ReLU(),
        t.AdaptiveAvgPool2d(1), t.Flatten(), t.Linear(32, len(NAMES)),
        input_shape=(3, 32, 32), rng=0,
    )  # fmt: skip
    rates = t.schedules.one_cycle(1e-2, args.epochs * -(-args.images // 64))
    optimizer = t.AdamW(model, lr=rates, weight_decay=0.05, decay_bias_and_norm=False, clip_grad_norm=1.0)
    for record in t.fit(model, t.CrossEntropyLoss(), optimizer, train, epochs=args.epochs, validation=test, rng=0):
        print("epoch {epoch:2}  train {train_accuracy:.1%}  test {val_accuracy:.1%}".format(**record))
    probability = model.predict_proba(test[0][:24])
    plot.save(plot.predictions(test[0][:24], test[1][:24], probability.argmax(1), probability.max(1), NAMES), args.out)
