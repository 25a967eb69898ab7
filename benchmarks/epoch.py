"""Time to finish an epoch of MNIST, and time to 99 % of test accuracy, tinycnn against other libraries.

    TINYCNN_DATA=folder python -m benchmarks epoch [--seeds 3] [--net relu+max] [--only torch jax]

Adam at 1e-3, batches of 64 in a random order of their own in every epoch.  With a seed everybody has the same first
weights and the same orders, so that all take nearly the same way.  The competitors take turns, a part of an epoch
each; after each part the test set is looked at, which is not counted, and neither is what compiles: a few steps before
the clock starts, undone.  The mean losses of the first part are compared.  `to 99 %` is the training time up to the
first look that finds 99 % of the test set right, or a dash if --epochs did not suffice.
"""

import statistics
import sys
import time

import numpy as np

from benchmarks import _competitors
from benchmarks import _harness as harness

BATCH, GOAL = 64, 0.99
EVALUATED = 500  # images at a time
TOLERANCE = 0.02  # of the mean loss of the first part: hundreds of steps let differences in rounding grow


class Runner:
    """A net, and the clock that it trains by.  make: a class of _competitors"""

    def __init__(self, make, net, threads):
        self.net = make(net, threads)

    def start(self, weights, images, labels, test_images, test_labels):
        test = (test_images.astype(np.float32) / 255 - _competitors.MEAN) / _competitors.STD
        self.test, self.labels = np.ascontiguousarray(test[:, None], np.float32), test_labels
        self.net.load(weights, images, labels)
        self.net.train_steps(np.arange(3 * BATCH).reshape(3, BATCH))  # compiles
        self.accuracy()
        self.net.load(weights, images, labels)

    def train(self, order):
        """(seconds, mean loss) of the steps of `order` (steps, BATCH)"""
        time.sleep(harness.PAUSE)
        start = time.perf_counter()
        loss = self.net.train_steps(order)
        return time.perf_counter() - start, loss

    def accuracy(self):
        parts = [self.net.logits(self.test[i : i + EVALUATED]) for i in range(0, len(self.test), EVALUATED)]
        return float((np.concatenate(parts).argmax(axis=1) == self.labels).mean())


def mnist():
    """Data, or None and a line that says why not."""
    from tinycnn import data

    try:
        found = data.mnist()
    except (data.DataUnavailableError, data.DamagedFileError, OSError) as error:
        print(f"skipped: no MNIST: {getattr(error, 'reason', error)}")
        return None
    return found


def measure(args, threads):
    data = mnist()
    if data is None:
        return []
    images, test = (data.train_images, data.train_labels), (data.test_images, data.test_labels)
    if args.images:
        images, test = tuple(a[: args.images] for a in images), tuple(a[: args.images] for a in test)
    steps = len(images[0]) // BATCH
    rows = []
    for seed in range(args.seeds):
        workers: dict[str, harness.Worker] = {}
        for name, make in args.only.items():
            workers |= harness.start_workers(threads, {name: Runner}, make, args.net, threads)
        weights = _competitors.initial_weights(args.net, seed)
        harness.call_all(workers, "start", weights, *images, *test)
        looks: dict[str, list[dict]] = {name: [] for name in workers}
        rng = np.random.default_rng(seed)
        for _ in range(args.epochs):
            order = rng.permutation(len(images[0]))[: steps * BATCH].reshape(steps, BATCH)
            for part in np.array_split(order, args.looks):
                for name, worker in workers.items():
                    seconds, loss = worker.call("train", part)
                    before = looks[name][-1]["seconds"] if looks[name] else 0.0
                    accuracy = worker.call("accuracy")
                    looks[name].append({"seconds": before + seconds, "loss": loss, "accuracy": accuracy})
                if len(looks["tinycnn"]) == 1:
                    first = {name: found[0]["loss"] for name, found in looks.items()}
                    harness.assert_agree(f"seed {seed}: the mean loss of the first part", first, "tinycnn", TOLERANCE)
            if all(any(look["accuracy"] >= GOAL for look in found) for found in looks.values()):
                break
        harness.stop_workers(workers)
        for name, found in looks.items():
            goal = next((look["seconds"] for look in found if look["accuracy"] >= GOAL), None)
            rows.append({
                "threads": threads, "net": args.net, "seed": seed, "batch": BATCH, "competitor": name,
                "epoch_seconds": found[-1]["seconds"] * args.looks / len(found), "seconds_to_99": goal, "looks": found,
            })  # fmt: skip
    print_table(rows, args, threads, len(images[0]))
    return rows


def print_table(rows, args, threads, images):
    print(f"\nMNIST, {images:,} images; LeNet-5, {args.net}, batch {BATCH}; {threads} threads; {args.seeds} seeds")
    line = harness.table(["", "an epoch, s", "images/s", "to 99 %, s", "each seed"], [13, 11, 10, 10, 30])
    for name in dict.fromkeys(row["competitor"] for row in rows):
        mine = [row for row in rows if row["competitor"] == name]
        seconds, goals = statistics.median(r["epoch_seconds"] for r in mine), [r["seconds_to_99"] for r in mine]
        middle = f"{statistics.median(goals):.1f}" if None not in goals else None
        each = " ".join("-" if goal is None else f"{goal:.1f}" for goal in goals)
        line(name, f"{seconds:.2f}", f"{images // BATCH * BATCH / seconds:,.0f}", middle, each)


def main(argv=None):
    parser = harness.options("epoch", __doc__, _competitors.TRAINING)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=15, help="at most; it ends when all have reached 99 %%")
    parser.add_argument("--looks", type=int, default=4, help="an epoch, at the test set")
    parser.add_argument("--net", choices=("tanh+avg", "relu+max"), default="relu+max")
    parser.add_argument("--images", type=int, help="only so many, for a try")
    args = harness.parse(parser, argv, _competitors.TRAINING)
    if min(args.seeds, args.epochs, args.looks) < 1:
        sys.exit("--seeds, --epochs and --looks must be at least 1")
    harness.run("epoch", args, measure)


if __name__ == "__main__":
    main()
