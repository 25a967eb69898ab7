"""Read the angle of a clock's hand from a noisy picture: regression.

    python examples/angle.py

The net predicts cosine and sine of the angle, which have no jump at 360 degrees.  It prints the errors and writes
angle.png: pictures, and clean ones drawn with the angles that were read.
"""

import argparse

import numpy as np

from tinycnn import Adam, Conv2d, Flatten, HuberLoss, Linear, MaxPool2d, Sequential, Tanh, fit, plot, schedules


def clocks(angle: np.ndarray, length: np.ndarray, noise: np.ndarray | float = 0.0) -> np.ndarray:
    """Pictures (n, 1, 28, 28) uint8 of hands at angles (n,) in radians, from the right, counterclockwise."""
    y, x = np.mgrid[13.5:-14.5:-1, -13.5:14.5]
    cos, sin = np.cos(angle)[:, None, None], np.sin(angle)[:, None, None]
    along, across = x * cos + y * sin, y * cos - x * sin
    hand = ((along > 0) & (along < length[:, None, None])) * np.clip(1.6 - abs(across), 0, 1)
    rim = np.clip(1 - abs(np.hypot(x, y) - 13), 0, 1) * 0.4
    return (255 * (hand + rim + noise).clip(0, 1)).astype(np.uint8)[:, None]


def random_clocks(n: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Noisy pictures, and (cos, sin) of their angles, (n, 2)."""
    angle, length = rng.uniform(-np.pi, np.pi, n), rng.uniform(7, 12, n)
    return clocks(angle, length, rng.normal(0, 0.3, (n, 28, 28))), np.stack([np.cos(angle), np.sin(angle)], axis=1)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--images", type=int, default=10_000, help="size of the training set")
    parser.add_argument("--out", default="angle.png")
    args = parser.parse_args()

    rng = np.random.default_rng(0)
    train, test = random_clocks(args.images, rng), random_clocks(1000, rng)
    model = Sequential(
        Conv2d(1, 8, 5, padding=2), Tanh(), MaxPool2d(2), Conv2d(8, 16, 5), Tanh(), MaxPool2d(2),
        Flatten(), Linear(400, 64), Tanh(), Linear(64, 2),
        input_shape=(1, 28, 28), rng=0,
    )  # fmt: skip
    optimizer = Adam(model, lr=schedules.one_cycle(3e-3, args.epochs * -(-args.images // 64)))
    for record in fit(model, HuberLoss(), optimizer, train, epochs=args.epochs, validation=test, rng=0):
        print("epoch {epoch:2}  mean absolute error: train {train_mae:.3f}  test {val_mae:.3f}".format(**record))

    read, true = (np.arctan2(values[:, 1], values[:, 0]) for values in (model.predict(test[0]), test[1]))
    error = np.degrees(abs((read - true + np.pi) % (2 * np.pi) - np.pi))
    print(f"test: half of the angles are off by less than {np.median(error):.1f} degrees, "
          f"95 % by less than {np.percentile(error, 95):.1f}")  # fmt: skip
    clean = clocks(read[:12], np.full(12, 12.0))
    plot.save(plot.image_rows({"picture": test[0][:12], "angle read": clean}), args.out)
