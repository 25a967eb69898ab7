"""Teach a LeNet that reads digits to read letters: fine-tuning with frozen convolutions.

    python examples/finetune.py

A net is trained on MNIST.  Then its last layer is replaced, its convolutions are frozen, and the rest learns letters of
one font family.  It writes finetune.png: letters of another family, and what it reads.
"""

import argparse
import itertools
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from tinycnn import Adam, CrossEntropyLoss, DeviceDataset, Linear, RandomAffine, data, fit, models, plot

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def letters(family: str) -> tuple[np.ndarray, np.ndarray]:
    """Pictures (n, 1, 28, 28) uint8 of all letters, white on black as in MNIST, and their numbers."""
    pictures = []
    for text, weight, style, size in itertools.product(LETTERS, ("normal", "bold"), ("normal", "italic"), (14, 17)):
        canvas = FigureCanvasAgg(Figure(figsize=(0.28, 0.28), dpi=100, facecolor="black"))
        font: Any = {"family": family, "weight": weight, "style": style, "size": size}
        canvas.figure.text(0.5, 0.46, text, color="white", ha="center", va="center", **font)
        canvas.draw()
        pictures.append(np.array(canvas.buffer_rgba())[:, :, 0])
    return np.array(pictures)[:, None], np.repeat(np.arange(26), 8)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--images", type=int, default=60_000, help="number of digits")
    parser.add_argument("--out", default="finetune.png")
    args = parser.parse_args()

    mnist = data.load("mnist")
    digits = DeviceDataset(mnist.train_images[: args.images], mnist.train_labels[: args.images])
    model = models.lenet5("relu", "max", rng=0)
    fit(model, CrossEntropyLoss(), Adam(model), digits, epochs=2, rng=0)

    mean, std, affine = digits.mean, digits.std, RandomAffine(10, (2, 2), (0.8, 1.2), shear=10)
    train = DeviceDataset(*letters("DejaVu Sans"), mean=mean, std=std, augment=affine)
    unseen = DeviceDataset(*letters("STIXGeneral"), mean=mean, std=std)
    reader = model.replace(-1, Linear(84, 26), rng=1)
    reader[0].requires_grad = reader[3].requires_grad = False
    for name, net in {"fine-tuned": reader, "from scratch": models.lenet5("relu", "max", classes=26, rng=1)}.items():
        options: Any = {"epochs": args.epochs, "batch_size": 32, "validation": unseen, "rng": 0}
        record = fit(net, CrossEntropyLoss(), Adam(net, lr=2e-3), train, **options)[-1]
        print(f"{name}: {record['train_accuracy']:.1%} of the letters, {record['val_accuracy']:.1%} of another family")
    test, true = (array[::9] for array in letters("STIXGeneral"))
    chance = reader.predict_proba(test)
    plot.save(plot.predictions(test, true, chance.argmax(1), chance.max(1), list(LETTERS)), args.out)
