"""A whole training step of LeNet-5, tinycnn against PyTorch.

    python -m benchmarks.train_step [--against torch] [--batches 32 64 128 256] [--activation tanh] [--pool avg]

A step is what training does: gather a batch of uint8 images by index, normalise, forward, loss, backward, Adam (fused,
in PyTorch).  Both nets start from the same weights and take the same batches; their losses after 20 steps are compared
before any time is taken.  The two then run in turn, a few steps each, and the medians of the turns are printed, with
the share of the machine's single-precision GEMM peak that the step's arithmetic comes to; the peak is measured in the
same run, in turn with the rest.
"""

import argparse
import json
import multiprocessing
import os
import platform
import statistics
import sys
import time
from importlib import metadata
from pathlib import Path

import numpy as np

from tinycnn.runs import processor

IMAGES = 20_000
LEARNING_RATE = 1e-3
CHECK_STEPS = 20
FORWARD_ADDS = 416_520
STEP_FLOPS = 2 * (3 * FORWARD_ADDS - 117_600)  # the first convolution needs no gradient of its input


def data_set():
    """Random images and labels: the time of a step does not depend on what they show."""
    rng = np.random.default_rng(0)
    return rng.integers(0, 256, (IMAGES, 28, 28), dtype=np.uint8), rng.integers(0, 10, IMAGES)


class TinyCNN:
    def __init__(self, activation, pool):
        from tinycnn import Adam, Batches, CrossEntropyLoss, models, train_step

        self.model = models.lenet5(activation, pool, rng=0)
        self.initial = self.model.state_dict()
        self.batches = Batches(*data_set(), mean=0.1307, std=0.3081)
        self.optimizer, self.criterion = Adam(self.model, LEARNING_RATE), CrossEntropyLoss()
        self._step = train_step

    def step(self, index):
        return self._step(self.model, self.criterion, self.optimizer, self.batches, index)


class Torch:
    def __init__(self, activation, pool, state, threads):
        import torch
        from torch import nn

        torch.set_num_threads(threads)
        act = {"tanh": nn.Tanh, "relu": nn.ReLU, "sigmoid": nn.Sigmoid}[activation]
        pooling = {"avg": nn.AvgPool2d, "max": nn.MaxPool2d}[pool]
        self.net = nn.Sequential(
            nn.Conv2d(1, 6, 5, padding=2), act(), pooling(2), nn.Conv2d(6, 16, 5), act(), pooling(2), nn.Flatten(),
            nn.Linear(400, 120), act(), nn.Linear(120, 84), act(), nn.Linear(84, 10),
        )  # fmt: skip
        self.net.load_state_dict({name: torch.from_numpy(value) for name, value in state.items()})
        images, labels = data_set()
        self.images, self.labels = torch.from_numpy(images)[:, None], torch.from_numpy(labels)
        self.optimizer = torch.optim.Adam(self.net.parameters(), LEARNING_RATE, fused=True)
        self.criterion, self.tensor = nn.CrossEntropyLoss(), torch.from_numpy

    def step(self, index):
        index = self.tensor(index)
        x = self.images[index].float().mul_(1 / (255 * 0.3081)).sub_(0.1307 / 0.3081)
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.criterion(self.net(x), self.labels[index])
        loss.backward()
        self.optimizer.step()
        return loss.item()


class Gemm:
    """A single-precision matrix product of NumPy's BLAS: what the processor can do at best."""

    SIZE = 1024
    FLOPS = 2 * SIZE**3

    def __init__(self):
        self.a = np.random.default_rng(0).random((self.SIZE, self.SIZE), dtype=np.float32)

    def step(self, index):
        return float((self.a @ self.a)[0, 0])


def work(pipe, kind, *arguments):
    """A competitor in a process of its own: takes steps or times when told to.

    Of its own, because the idle threads of one library's pool spin for a while, and would take the processor from the
    next one's.
    """
    competitor = {"tinycnn": TinyCNN, "torch": Torch, "gemm": Gemm}[kind](*arguments)
    pipe.send(getattr(competitor, "initial", None))
    while True:
        indices, timed = pipe.recv()
        time.sleep(0.05)  # until the others' threads sleep
        if timed:
            competitor.step(indices[0])
        start = time.perf_counter()
        results = [competitor.step(index) for index in indices]
        pipe.send((results, time.perf_counter() - start))


class Worker:
    """The other end of `work`."""

    def __init__(self, kind, *arguments):
        context = multiprocessing.get_context("spawn")
        self.name = kind
        self.pipe, far = context.Pipe()
        self.process = context.Process(target=work, args=(far, kind, *arguments), daemon=True)
        self.process.start()
        self.initial = self.pipe.recv()

    def steps(self, indices, timed=False):
        self.pipe.send((indices, timed))
        return self.pipe.recv()


def measure(competitors, batch, turns, steps, rng):
    """Median seconds a step of each competitor over `turns` turns of `steps` steps."""
    seconds: dict[str, list[float]] = {c.name: [] for c in competitors}
    for _ in range(turns):
        index = [rng.permutation(IMAGES)[:batch] for _ in range(steps)]
        for competitor in competitors:
            seconds[competitor.name].append(competitor.steps(index, timed=True)[1] / steps)
    return {name: statistics.median(values) for name, values in seconds.items()}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", choices=("torch", "none"), default="torch")
    parser.add_argument("--batches", type=int, nargs="+", default=[32, 64, 128, 256])
    parser.add_argument("--activation", choices=("tanh", "relu", "sigmoid"), default="tanh")
    parser.add_argument("--pool", choices=("avg", "max"), default="avg")
    parser.add_argument("--turns", type=int, default=15, help="turns of each competitor")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--json", type=Path, help="write the figures here too")
    args = parser.parse_args(argv)

    names = ["tinycnn"]
    versions = {"python": platform.python_version()} | {n: metadata.version(n) for n in ("numpy", "numba")}
    if args.against == "torch":
        try:
            versions["torch"] = metadata.version("torch")
            names.append("torch")
        except metadata.PackageNotFoundError:
            print("torch is not installed (pip install 'tinycnn[bench]'): tinycnn runs alone")
    what = ", ".join(f"{name} {version}" for name, version in versions.items())
    print(f"{processor()}, {os.cpu_count()} cores, {args.threads} threads; {what}")
    print(f"LeNet-5, {args.activation} + {args.pool} pooling; a step is {STEP_FLOPS / 1e6:.2f} MFLOP an image\n")
    result = {
        "processor": processor(), "cores": os.cpu_count(), "threads": args.threads, "versions": versions,
        "activation": args.activation, "pool": args.pool, "rows": [],
    }  # fmt: skip

    rng = np.random.default_rng(0)
    for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS"):
        os.environ[variable] = str(args.threads)
    gemm = Worker("gemm")
    layout = "{:>5} {:>22} {:>10} {:>10} {:>7} {:>9} {:>8}"
    print(layout.format("batch", "loss after 20 steps", "tinycnn", "torch", "ratio", "GEMM", "tinycnn's"))
    print(layout.format("", " / ".join(names), "images/s", "images/s", "", "GFLOP/s", "share"))
    for batch in args.batches:
        workers = [Worker("tinycnn", args.activation, args.pool)]
        if "torch" in names:
            workers.append(Worker("torch", args.activation, args.pool, workers[0].initial, args.threads))
        order = [rng.permutation(IMAGES)[:batch] for _ in range(CHECK_STEPS)]
        losses = [worker.steps(order)[0][-1] for worker in workers]
        if max(losses) - min(losses) > 1e-4 * max(losses):
            sys.exit(f"batch {batch}: the losses after {CHECK_STEPS} steps differ: {losses}")
        seconds = measure([*workers, gemm], batch, args.turns, max(4, 2560 // batch), rng)
        for worker in workers:
            worker.process.terminate()
        rates = {name: batch / seconds[name] for name in names}
        peak = Gemm.FLOPS / seconds["gemm"] / 1e9
        share = rates["tinycnn"] * STEP_FLOPS / 1e9 / peak
        ratio = rates["tinycnn"] / rates["torch"] if "torch" in rates else None
        print(
            layout.format(
                batch, " / ".join(f"{loss:.6f}" for loss in losses), f"{rates['tinycnn']:,.0f}",
                f"{rates['torch']:,.0f}" if ratio else "-", f"{ratio:.2f}" if ratio else "-", f"{peak:.0f}",
                f"{share:.0%}",
            ),
            flush=True,
        )  # fmt: skip
        result["rows"].append({
            "batch": batch, "losses": losses, "images_per_second": rates, "ratio": ratio,
            "gemm_gflops": peak, "share_of_gemm": share,
        })  # fmt: skip
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
