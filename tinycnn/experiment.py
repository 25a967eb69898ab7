"""One training run from the command line: options, data, training, evaluation, run folder.

`examples/lenet5.py` and `python -m tinycnn train` are both this, around a network of theirs.
"""

import argparse
import contextlib
import sys
import time

import numpy as np

from tinycnn import _streams
from tinycnn._interrupts import defer_interrupt
from tinycnn._streams import EXIT_INTERRUPTED
from tinycnn.errors import DeviceError, DivergedError

# Learning rates that suit LeNet-5 at batches of 64.
FINISHING = "interrupted: finishing the run folder"
LEARNING_RATE = {"sgd": 0.05, "adam": 3e-3, "adamw": 3e-3}


def add_options(parser):
    """The options of a training run."""
    whole = argparse.ArgumentDefaultsHelpFormatter
    parser.formatter_class = whole
    add = parser.add_argument
    add("--device", default="cpu", help="where to compute: cpu, cuda, cuda:N, or auto (a GPU where one can be used)")
    add("--epochs", type=positive_int, default=10, help="passes over the training set")
    add("--batch-size", type=positive_int, default=64, help="images a step")
    add("--lr", type=positive_float, help="peak learning rate; by default one that suits the optimizer")
    add(
        "--optimizer",
        choices=("sgd", "adam", "adamw"),
        default="adamw",
        help="update rule (sgd: with momentum 0.9)",
    )
    add(
        "--activation",
        choices=("tanh", "sigmoid", "relu"),
        default="tanh",
        help="after every layer but the last",
    )
    add("--pool", choices=("avg", "max"), default="avg", help="how maps are made smaller")
    add("--seed", type=non_negative_int, default=0, help="of initial weights, split and order")
    add("--threads", type=positive_int, help="CPU threads; all by default")
    add("--data", choices=("auto", "mnist", "fashion", "kmnist", "synthetic"), default="auto",
        help="auto: MNIST, or synthetic digits where it cannot be had")  # fmt: skip
    add("--data-dir", help="folder to look for the data in, and to download it to")
    add("--out", default="runs", help="folder in which this run's folder is made")
    return parser


def positive_int(text):
    value = non_negative_int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def non_negative_int(text):
    try:
        value = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a whole number, got {text!r}") from None
    if value < 0:
        raise argparse.ArgumentTypeError(f"must not be negative, got {value}")
    return value


def positive_float(text):
    try:
        value = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a number, got {text!r}") from None
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a positive number, got {text}")
    return value


def run(args, network, name="lenet5"):
    """Train `network(activation, pool, rng=, device=)` as `args` say.  Returns the exit code.

    Prints what it does; a mistake of the user's is one line on stderr, not a traceback.
    """
    return run_command(lambda: _run(args, network, name))


def run_command(command, interrupted="interrupted"):
    """Call `command`; its exit code.  A user's mistake is one line on stderr, and so is Ctrl-C, in the given words."""
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


def _run(args, network, name):
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
    chosen, held_out = data.train_val_split(len(images), len(images) // 12, rng_split)
    training = DeviceDataset(images[chosen], labels[chosen], device=device)
    like = {"mean": training.mean, "std": training.std, "device": device}
    validation = DeviceDataset(images[held_out], labels[held_out], **like)
    test = DeviceDataset(dataset.test_images, dataset.test_labels, **like)

    model = network(args.activation, args.pool, rng=rng_weights, device=device)
    steps = args.epochs * -(-len(training) // min(args.batch_size, len(training)))
    rates = schedules.one_cycle(args.lr or LEARNING_RATE[args.optimizer], steps, warmup=0.2)
    optimizer = {
        "sgd": lambda: optim.SGD(model, rates, momentum=0.9, weight_decay=5e-4),
        "adam": lambda: optim.Adam(model, rates),
        "adamw": lambda: optim.AdamW(model, rates, weight_decay=0.3),
    }[args.optimizer]()
    criterion = CrossEntropyLoss()

    settings = {
        **vars(args),
        "device": device,
        "lr": float(rates.max()),
        "schedule": "one_cycle, warm-up over 20 % of the steps",
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
    sizes = f"{len(training):,} images to train on, {len(validation):,} to validate, {len(test):,} to test"
    print(f"\n{dataset.name}: {sizes}")
    print(f"{hardware.device_name(device)}; results go to {folder.path}")

    def on_epoch(record):
        folder.add_epoch(record, model)
        print(
            f"{record['epoch']:5d} {record['train_loss']:12.4f} {record['train_accuracy']:10.2%} "
            f"{record['val_loss']:10.4f} {record['val_accuracy']:10.2%} {record['images_per_second']:10,.0f}",
            flush=True,
        )

    interrupted, start = False, time.perf_counter()
    try:
        print("preparing kernels (the first start compiles them: 20 seconds or more) ...", end=" ", flush=True)
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
            print(f"\ninterrupted before the first epoch was complete; {folder.path} holds the settings only")
            return EXIT_INTERRUPTED
        print(f"\ninterrupted: finishing the run folder as of epoch {len(folder.history)} (Ctrl-C again to leave it)")
    except (DivergedError, DeviceError):
        if folder.history:
            print(f"the weights of epoch {len(folder.history)}, the last good ones, are in {folder.path}")
        raise
    seconds = time.perf_counter() - start

    # After a Ctrl-C in training, the next one is the second.
    finishing = contextlib.nullcontext(lambda: True) if interrupted else defer_interrupt(FINISHING, raises=False)
    with finishing as asked:
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
    return EXIT_INTERRUPTED if asked() else 0
