"""One training run from the command line: options, data, training, evaluation, run folder.

Used by `examples/lenet5.py` and `python -m tinycnn train`, each with its own network.
"""

import argparse
import contextlib
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from tinycnn import _streams
from tinycnn._interrupts import defer_interrupt
from tinycnn._streams import EXIT_INTERRUPTED
from tinycnn.errors import DeviceError, DivergedError

FINISHING = "interrupted: finishing the run folder"
LEARNING_RATE = {"sgd": 0.05, "adam": 3e-3, "adamw": 3e-3}  # for LeNet-5 with batches of 64


def add_options(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add the options of a training run to `parser`; returns it."""
    parser.formatter_class = argparse.ArgumentDefaultsHelpFormatter
    add = parser.add_argument
    add("--device", default="cpu", help="cpu, cuda, cuda:N, or auto (a GPU if one can be used)")
    add("--epochs", type=positive_int, default=10, help="passes over the training set")
    add("--batch-size", type=positive_int, default=64, help="images a step")
    add("--lr", type=positive_float, help="peak learning rate; the default depends on the optimizer")
    add("--optimizer", choices=("sgd", "adam", "adamw"), default="adamw", help="optimizer (sgd: with momentum 0.9)")
    add("--activation", choices=("tanh", "sigmoid", "relu"), default="tanh", help="activation function")
    add("--pool", choices=("avg", "max"), default="avg", help="pooling")
    add("--seed", type=non_negative_int, default=0, help="seed of the initial weights, the split and the order")
    add("--threads", type=positive_int, help="CPU threads; all by default")
    add("--data", choices=("auto", "mnist", "fashion", "kmnist", "synthetic"), default="auto",
        help="data set; auto: MNIST, or synthetic digits if MNIST is not available")  # fmt: skip
    add("--data-dir", help="folder to search for the data, and to download it to")
    add("--out", default="runs", help="folder for the run's folder")
    return parser


def positive_int(text: str) -> int:
    value = non_negative_int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def non_negative_int(text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a whole number, got {text!r}") from None
    if value < 0:
        raise argparse.ArgumentTypeError(f"must not be negative, got {value}")
    return value


def positive_float(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a number, got {text!r}") from None
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a positive number, got {text}")
    return value


def run(args: argparse.Namespace, network: Callable[..., Any], name: str = "lenet5") -> int:
    """Train `network(activation, pool, rng=, device=)` with the options `args`.  Returns the exit code.

    Prints its progress.  User errors are one line on stderr, not a traceback.
    """
    return run_command(lambda: _run(args, network, name))


def run_command(command: Callable[[], int], interrupted: str = "interrupted") -> int:
    """Call `command` and return its exit code.  Print one line for a user error or Ctrl-C (`interrupted`)."""
    with _streams.safe_streams():
        try:
            return command()
        except (ValueError, OSError, ArithmeticError, MemoryError, DeviceError) as error:
            print(f"error: {error}", file=sys.stderr)
            if isinstance(error, DeviceError) and "tinycnn.cuda" in sys.modules:
                from tinycnn.cuda import _launch

                _launch.skip_cleanup_after_fault(1)
            return 1
        except KeyboardInterrupt:
            print(f"\n{interrupted}", file=sys.stderr)
            return EXIT_INTERRUPTED


def _run(args: argparse.Namespace, network: Callable[..., Any], name: str) -> int:
    from tinycnn import data, devices, hardware, optim, runs, schedules, train
    from tinycnn.dataset import DeviceDataset
    from tinycnn.losses import CrossEntropyLoss

    seeds = np.random.SeedSequence(args.seed).spawn(3)  # weights, split, order
    rng_weights, rng_split, rng_order = map(np.random.default_rng, seeds)
    device = devices.resolve(args.device)
    devices.get(device)
    devices.set_num_threads(args.threads)
    dataset = data.load(args.data, args.data_dir)
    images, labels = dataset.train_images, dataset.train_labels
    train_index, val_index = data.train_val_split(len(images), len(images) // 12, rng_split)
    training = DeviceDataset(images[train_index], labels[train_index], device=device, class_names=dataset.classes)
    options: dict[str, Any] = {"mean": training.mean, "std": training.std, "device": device}
    validation = DeviceDataset(images[val_index], labels[val_index], **options)
    test = DeviceDataset(dataset.test_images, dataset.test_labels, **options)

    model = network(args.activation, args.pool, rng=rng_weights, device=device)
    steps = args.epochs * -(-len(training) // min(args.batch_size, len(training)))
    rates = schedules.one_cycle(args.lr or LEARNING_RATE[args.optimizer], steps, warmup=0.2)
    optimizers: dict[str, Callable[[], optim.Optimizer]] = {
        "sgd": lambda: optim.SGD(model, rates, momentum=0.9, weight_decay=5e-4),
        "adam": lambda: optim.Adam(model, rates),
        "adamw": lambda: optim.AdamW(model, rates, weight_decay=0.3),
    }
    optimizer = optimizers[args.optimizer]()
    criterion = CrossEntropyLoss()

    settings = {
        **vars(args),
        "device": device,
        "lr": float(rates.max()),
        "schedule": "one_cycle with 20 % warm-up",
    }
    folder = runs.RunFolder(args.out, name, {
        "settings": settings, "parameters": len(model.theta),
        "net": {"input": list(model.input_shape), "layers": ", ".join(map(repr, model.layers))},
        "pixels": {"mean": training.mean.tolist(), "std": training.std.tolist()},
        "data": {"name": dataset.name, "sha256": dataset.sha256, "train": len(training),
                 "validation": len(validation), "test": len(test)},
        "environment": hardware.environment(device),
    })  # fmt: skip
    print(model.summary())
    sizes = f"{len(training):,} images for training, {len(validation):,} for validation, {len(test):,} for testing"
    print(f"\n{dataset.name}: {sizes}")
    print(f"{hardware.device_name(device)}; results in {folder.path}")

    def on_epoch(record: train.Record) -> None:
        folder.add_epoch(record, model)
        print(
            f"{record['epoch']:5d} {record['train_loss']:12.4f} {record['train_accuracy']:10.2%} "
            f"{record['val_loss']:10.4f} {record['val_accuracy']:10.2%} {record['images_per_second']:10,.0f}",
            flush=True,
        )

    interrupted, start = False, time.perf_counter()
    try:
        print("preparing kernels (the first run compiles them: 20 seconds or more) ...", end=" ", flush=True)
        print(f"{train.warm_up(model, criterion, optimizer, training, args.batch_size):.1f} s\n")
        print("epoch   train loss   accuracy   val loss   accuracy   images/s")
        start = time.perf_counter()
        train.fit(
            model, criterion, optimizer, training, epochs=args.epochs, batch_size=args.batch_size,
            validation=validation, rng=rng_order, on_epoch=on_epoch,
        )  # fmt: skip
    except KeyboardInterrupt:
        interrupted = True
        if not folder.history:
            print(f"\ninterrupted in the first epoch; {folder.path} contains the settings only")
            return EXIT_INTERRUPTED
        print(f"\n{FINISHING} as of epoch {len(folder.history)} (press Ctrl-C again to stop at once)")
    except (DivergedError, DeviceError):
        if folder.history:
            print(f"the last good weights, of epoch {len(folder.history)}, are in {folder.path}")
        raise
    seconds = time.perf_counter() - start

    # After a Ctrl-C during training, the next one stops at once.
    deferred = contextlib.nullcontext(lambda: True) if interrupted else defer_interrupt(FINISHING, raises=False)
    with deferred as was_interrupted:
        loss, _, logits = train.evaluate(model, test)
        extra = {
            "data": dataset.name, "seed": args.seed, "epochs": len(folder.history), "interrupted": interrupted,
            "test_loss": loss, "training_seconds": sum(r["seconds"] for r in folder.history), "wall_seconds": seconds,
        }  # fmt: skip
        report = folder.finish(model, test, logits, dataset.classes, extra)
    print(
        f"\ntest accuracy {report['accuracy']:.2%} ({report['errors']} of {report['total']:,} wrong), "
        f"{extra['training_seconds']:.1f} s of training; report and pictures in {folder.path}"
    )
    return EXIT_INTERRUPTED if was_interrupted() else 0
