"""Squeeze each digit into 16 numbers and draw it again from them: a convolutional autoencoder.

    python examples/autoencoder.py

It trains on MNIST for 5 epochs and writes autoencoder.png: digits of the test set, and what the decoder draws.
"""

import argparse

from tinycnn import (
    Adam,
    Conv2d,
    ConvTranspose2d,
    DeviceDataset,
    Flatten,
    Linear,
    MSELoss,
    ReLU,
    Sequential,
    Unflatten,
    data,
    fit,
    plot,
    schedules,
)


def autoencoder(code: int) -> Sequential:
    return Sequential(
        Conv2d(1, 16, 3, stride=2, padding=1), ReLU(),  #           16 x 14 x 14
        Conv2d(16, 32, 3, stride=2, padding=1), ReLU(),  #          32 x 7 x 7
        Flatten(), Linear(1568, code),  #                           the code
        Linear(code, 1568), ReLU(), Unflatten(1, (32, 7, 7)),
        ConvTranspose2d(32, 16, 4, stride=2, padding=1), ReLU(),  # 16 x 14 x 14
        ConvTranspose2d(16, 1, 4, stride=2, padding=1),  #          1 x 28 x 28
        input_shape=(1, 28, 28), rng=0,
    )  # fmt: skip


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--images", type=int, default=60_000, help="size of the training set")
    parser.add_argument("--out", default="autoencoder.png")
    args = parser.parse_args()

    digits = data.load("mnist")
    # Without labels the target is the image; mean 0 and std 1 leave pixels in 0 ... 1.
    train = DeviceDataset(digits.train_images[: args.images], None, mean=0, std=1)
    test = DeviceDataset(digits.test_images[: args.images], None, mean=0, std=1)
    model = autoencoder(code=16)
    steps = args.epochs * -(-len(train) // 64)
    optimizer = Adam(model, lr=schedules.one_cycle(3e-3, steps))
    for record in fit(model, MSELoss(), optimizer, train, epochs=args.epochs, validation=test, rng=0):
        print("epoch {epoch}  train loss {train_loss:.4f}  test loss {val_loss:.4f}".format(**record))

    shown = digits.test_images[:12, None]
    drawn = model.predict(shown).clip(0, 1)
    plot.save(plot.image_rows({"digit": shown / 255, "drawn again": drawn}, title="Sixteen numbers a digit"), args.out)
