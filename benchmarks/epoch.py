"""Time of an epoch of MNIST, and time to 99 % of test accuracy, tinycnn and other libraries.

    TINYCNN_DATA=folder python -m benchmarks epoch [--seeds 3] [--net relu+max] [--only torch jax]

Adam at 1e-3, batches of 64, reshuffled every epoch. With the same seed all competitors have the same initial weights
and orders, and so nearly the same trajectory. They run round robin, a part of an epoch each, and are evaluated on the
test set after each part. Evaluation is not timed. Neither is compilation: a few steps run and are undone before the
clock starts. The mean losses of the first part are compared. `to 99 %` is the training time up to the first evaluation
with at least 99 % test accuracy, or a dash if --epochs did not suffice.
"""

import statistics
import sys
import time

import numpy as np

from benchmarks import _competitors, _harness as harness, _report

BATCH, GOAL = 64, 0.99
TEST_BATCH = 500
TOLERANCE = 0.02  # of the mean loss of the first part: rounding differences grow over hundreds of steps


class Runner:
    """A net with timed training. make: a class of _competitors"""

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
        """Train on `order` (steps, BATCH); returns (seconds, mean loss)."""
        time.sleep(harness.PAUSE)
        start = time.perf_counter()
        loss = self.net.train_steps(order)
        return time.perf_counter() - start, loss

    def accuracy(self):
        parts = [self.net.logits(self.test[i : i + TEST_BATCH]) for i in range(0, len(self.test), TEST_BATCH)]
        return float((np.concatenate(parts).argmax(axis=1) == self.labels).mean())


def mnist():
    """The data set, or None with a printed reason."""
    from tinycnn import data

    try:
        return data.mnist()
    except (data.DataUnavailableError, data.DamagedFileError, OSError) as error:
        print(f"skipped: no MNIST: {getattr(error, 'reason', error)}")
        return None


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
                    previous = looks[name][-1]["seconds"] if looks[name] else 0.0
                    accuracy = worker.call("accuracy")
                    looks[name].append({"seconds": previous + seconds, "loss": loss, "accuracy": accuracy})
                if len(looks["tinycnn"]) == 1:
                    first = {name: history[0]["loss"] for name, history in looks.items()}
                    harness.assert_agree(f"seed {seed}: the mean loss of the first part", first, "tinycnn", TOLERANCE)
            if all(any(look["accuracy"] >= GOAL for look in history) for history in looks.values()):
                break
        harness.stop_workers(workers)
        for name, history in looks.items():
            goal = next((look["seconds"] for look in history if look["accuracy"] >= GOAL), None)
            rows.append({
                "threads": threads, "net": args.net, "seed": seed, "batch": BATCH, "competitor": name,
                "epoch_seconds": history[-1]["seconds"] * args.looks / len(history), "seconds_to_99": goal,
                "looks": history,
            })  # fmt: skip
    print_table(rows, args, threads, len(images[0]))
    return rows


def print_table(rows, args, threads, images):
    print(f"\nMNIST, {images:,} images; LeNet-5, {args.net}, batch {BATCH}; {threads} threads; {args.seeds} seeds")
    print_row = _report.table(["", "an epoch, s", "images/s", "to 99 %, s", "each seed"], [13, 11, 10, 10, 30])
    for name in dict.fromkeys(row["competitor"] for row in rows):
        runs = [row for row in rows if row["competitor"] == name]
        seconds, goals = statistics.median(r["epoch_seconds"] for r in runs), [r["seconds_to_99"] for r in runs]
        median = f"{statistics.median(goals):.1f}" if None not in goals else None
        texts = " ".join("-" if goal is None else f"{goal:.1f}" for goal in goals)
        print_row(name, f"{seconds:.2f}", f"{images // BATCH * BATCH / seconds:,.0f}", median, texts)


def main(argv=None):
    parser = harness.options("epoch", __doc__, _competitors.TRAINING)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=15, help="at most; training ends when all have reached 99 %%")
    parser.add_argument("--looks", type=int, default=4, help="evaluations on the test set per epoch")
    parser.add_argument("--net", choices=("tanh+avg", "relu+max"), default="relu+max")
    parser.add_argument("--images", type=int, help="use only the first IMAGES images")
    args = harness.parse(parser, argv, _competitors.TRAINING)
    if min(args.seeds, args.epochs, args.looks) < 1:
        sys.exit("--seeds, --epochs and --looks must be at least 1")
    harness.run("epoch", args, measure)


if __name__ == "__main__":
    main()
