"""Trainings by 1, 2 and 4 ranks, for tests/test_mpi.py: mpiexec -n 4 python mpi_checks.py FOLDER

Rank 0 prints the results as JSON: {case: {ranks: result}}.  A result has the final parameters and buffers of each rank
(as one list if they are equal on all), and the history.
"""

import json
import sys
import time
import traceback
from pathlib import Path

import numpy as np
from mpi4py import MPI

import tinycnn
from tinycnn import (
    EMA,
    SGD,
    Adam,
    AvgPool2d,
    Batches,
    BatchNorm1d,
    BatchNorm2d,
    ColorJitter,
    Conv2d,
    CrossEntropyLoss,
    DeviceDataset,
    Dropout,
    Dropout2d,
    EarlyStopping,
    Flatten,
    Linear,
    MSELoss,
    RandomAffine,
    ReLU,
    Sequential,
    Tanh,
    fit,
)
from tinycnn.errors import DivergedError, RankError
from tinycnn.layers import Layer
from tinycnn.losses import Loss

SIZES = 1, 2, 4
FOLDER = Path(sys.argv[1])
RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (53, 1, 8, 8)).astype(np.uint8)
LABELS = (IMAGES.reshape(53, -1)[:, :3].argmax(axis=1)).astype(np.int64)
WEIGHTS = RNG.uniform(0.2, 3, 53)
HELD_OUT = IMAGES[:21], LABELS[:21]  # 21 images: unequal parts
DEVICE = sys.argv[2] if len(sys.argv) > 2 else "cpu"


def convolution(*more, rng=0):
    head = Linear(48, 3)
    layers = Conv2d(1, 3, 3, padding=1), *more, Tanh(), AvgPool2d(2), Flatten(), head
    return Sequential(*layers, input_shape=(1, 8, 8), rng=rng, device=DEVICE)


def data(images=IMAGES, labels=LABELS, **options):
    return DeviceDataset(images, labels, device=DEVICE, **options)


class Doubled(Layer):
    """A user's layer."""

    def forward(self, y, x):
        y[...] = 2 * x

    def backward(self, dx, dy, x, y):
        dx[...] = 2 * dy


class Absolute(Loss):
    """A user's loss: the mean absolute difference to one-hot classes."""

    def forward_backward(self, dx, x, target):
        difference = x - np.eye(x.shape[1], dtype=x.dtype)[target]
        self._loss[: len(x)] = abs(difference).sum(axis=1) / x.size
        dx[...] = np.sign(difference) / x.size


def train(comm, model, criterion=None, optimizer=None, dataset=None, **options):
    """Train, and return a result."""
    optimizer = SGD(model, 0.1, momentum=0.9) if optimizer is None else optimizer
    defaults = {"epochs": 2, "batch_size": 15, "rng": 3, "progress": False, "comm": comm}
    history = fit(model, criterion or CrossEntropyLoss(), optimizer, dataset or data(), **defaults | options)
    return result(comm, model, history)


def result(comm, model, history):
    arrays = [np.array(model.ops.to_host(a)) for a in (model.theta, *(b for _, b in model.named_buffers()))]
    everywhere = comm.allgather([a.tobytes() for a in arrays])
    assert all(other == everywhere[0] for other in everywhere), "the ranks hold different parameters or buffers"
    histories = comm.allgather(history)
    assert all(other == histories[0] for other in histories), "the ranks have different histories"
    keep = [{k: v for k, v in record.items() if k not in ("seconds", "images_per_second")} for record in history]
    return {"state": np.concatenate([np.ravel(a).astype(float) for a in arrays]).tolist(), "history": keep}


def plain(comm):
    """Batches of 15 of 53 images: unequal parts, and a last batch of 8."""
    return train(comm, convolution(), validation=HELD_OUT)


def few_images(comm):
    """A last batch of 2 images: two of four ranks have none."""
    return train(comm, convolution(), dataset=data(IMAGES[:32], LABELS[:32]), validation=(IMAGES[:3], LABELS[:3]))


def random_layers(comm):
    """Random numbers of augmentation and dropout belong to the image, not to the rank."""
    dataset = data(augment=(RandomAffine(degrees=20, translate=(1, 1)), ColorJitter(0.3, 0.3)), seed=5)
    model = Sequential(
        Conv2d(1, 8, 3), Dropout2d(0.3), ReLU(), Flatten(), Dropout(0.4), Linear(288, 3),
        input_shape=(1, 8, 8), rng=0, device=DEVICE,
    )  # fmt: skip
    return train(comm, model, dataset=dataset)


def large_batches(comm):
    """Batches that one process runs in pieces of 256 and fewer, with dropout and augmentation."""
    images = np.random.default_rng(1).integers(0, 256, (1300, 1, 4, 4)).astype(np.uint8)
    dataset = data(images, np.arange(1300) % 3, augment=ColorJitter(0.5), seed=1)
    model = Sequential(Flatten(), Dropout(0.2), Linear(16, 3), input_shape=(1, 4, 4), rng=0, device=DEVICE)
    return train(comm, model, dataset=dataset, batch_size=600)


def weighted(comm):
    """Class weights, one of them 0, an ignored class and sample weights: the mean over a batch has their sum."""
    loss = CrossEntropyLoss(weight=[0.0, 1.0, 3.0], ignore_index=1)
    return train(comm, convolution(), loss, dataset=data(sample_weight=WEIGHTS), validation=HELD_OUT)


def summed(comm):
    model = convolution()
    return train(comm, model, CrossEntropyLoss(reduction="sum"), SGD(model, 0.01))


def numbers(comm):
    targets = np.eye(3, dtype=np.float32)[LABELS]
    return train(comm, convolution(), MSELoss(), dataset=data(labels=targets), validation=(IMAGES[:9], targets[:9]))


def windows(comm):
    """Three batches make one update; the last window of an epoch is smaller."""
    return train(comm, convolution(), batch_size=5, accumulation_steps=3)


def optimizers(comm):
    model = convolution()
    return train(comm, model, optimizer=EMA(Adam(model, 0.01, weight_decay=0.1, clip_grad_norm=0.5), 0.9))


def synchronized(comm):
    """Batch norm of maps and of vectors with all ranks' statistics; the last batch has 3 images, rank 3 none."""
    model = Sequential(
        Conv2d(1, 3, 3), BatchNorm2d(3), ReLU(), Flatten(), Linear(108, 6), BatchNorm1d(6, momentum=None), Tanh(),
        Linear(6, 3), input_shape=(1, 8, 8), rng=0, device=DEVICE,
    )  # fmt: skip
    dataset = data(IMAGES[:33], LABELS[:33])
    return train(comm, model, dataset=dataset, batch_size=10, validation=HELD_OUT, sync_batch_norm=True)


def own_statistics(comm):
    """Batch norm with each rank's own statistics; the running ones are averaged."""
    return train(comm, convolution(BatchNorm2d(3)), validation=HELD_OUT)


def own_classes(comm):
    return train(comm, convolution(Doubled()), Absolute(), dataset=data()) if DEVICE == "cpu" else plain(comm)


def stream(comm):
    batches = [(IMAGES[i : i + 9], LABELS[i : i + 9]) for i in range(0, 53, 9)]
    return train(comm, convolution(), dataset=Batches(batches, mean=0.5, std=0.3))


class Recorder:
    """A callback of all ranks, which records losses, and changes the learning rate."""

    def __init__(self):
        self.losses = []

    def on_train_begin(self, model):
        self.model = model

    def on_batch_end(self, record):
        self.losses.append(record["loss"])
        return len(self.losses) == 7  # in the second epoch

    def on_epoch_end(self, record):
        pass


class OnRankZero:
    rank_zero_only = True
    calls = 0

    def on_epoch_end(self, record):
        self.calls += 1
        return self.calls == 3  # stops all


def callbacks(comm):
    recorder, writer = Recorder(), OnRankZero()
    found = train(comm, convolution(), callbacks=[recorder, writer], epochs=9)
    calls = comm.allgather(writer.calls)
    assert calls == [len(found["history"])] + [0] * (comm.size - 1), calls
    found["losses"] = recorder.losses
    writer = OnRankZero()
    again = train(comm, convolution(), callbacks=[writer, EarlyStopping("train_loss", patience=9)], epochs=9)
    assert len(again["history"]) == 3
    return found


def repeated(comm):
    """The same bits again, whatever the other ranks' weights and seeds are at first."""
    first = train(comm, convolution())
    second = train(comm, convolution(rng=comm.rank), rng=3 + comm.rank)
    assert first["state"] == second["state"]
    return first


def resumed(comm):
    """One epoch by some ranks, another by four, and both by one: see the test."""
    path = FOLDER / f"{comm.size}.safetensors"
    train(comm, convolution(Dropout(0.3)), epochs=1, checkpoint=path)
    return train(comm, convolution(Dropout(0.3)), checkpoint=path)


def diverged(comm):
    """All ranks raise the error of one process, and keep the last good weights."""
    model, targets = convolution(), np.eye(3, dtype=np.float32)[LABELS]
    try:
        optimizer = SGD(model, np.concatenate([np.full(6, 0.01), np.full(9, 1e25)]))
        train(comm, model, MSELoss(), optimizer, data(labels=targets), epochs=3)
    except DivergedError as error:
        return result(comm, model, []) | {"error": str(error)}
    raise AssertionError("no error")


def problems(comm):
    """Messages that all ranks raise before training."""
    found = []
    for options in (
        {"dataset": data(IMAGES + (comm.rank == comm.size - 1))},
        {"epochs": 1 + (comm.rank == 0)},
        {"batch_size": comm.size - 1},
        {"batch_size": 0 if comm.rank == 0 else 15},
    ):
        try:
            train(comm, convolution(), **options)
            found.append("")
        except (RankError, ValueError, TypeError) as error:
            found.append(f"{type(error).__name__}: {error}")
    return {"errors": comm.allgather(found)}


CASES = (
    plain, few_images, random_layers, large_batches, weighted, summed, numbers, windows, optimizers, synchronized,
    own_statistics, own_classes, stream, callbacks, repeated, resumed, diverged, problems,
)  # fmt: skip


def main():
    world, results = MPI.COMM_WORLD, {}
    wanted = sys.argv[3].split(",") if len(sys.argv) > 3 else [case.__name__ for case in CASES]
    comms = {size: world.Split(0 if world.rank < size else 1, world.rank) for size in SIZES if size <= world.size}
    for case in CASES:
        for size, comm in comms.items():
            if case.__name__ in wanted and world.rank < size:
                start = time.process_time()
                results.setdefault(case.__name__, {})[size] = case(comm)
                results[case.__name__][size]["seconds"] = time.process_time() - start
            request = world.Ibarrier()  # MPI's own barrier waits busily
            while not request.Test():
                time.sleep(0.002)
    if world.rank == 0:
        print(json.dumps({"version": tinycnn.__version__, "cases": results}))


if __name__ == "__main__":
    try:
        main()
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        MPI.COMM_WORLD.Abort(1)
