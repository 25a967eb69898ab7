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
import os
import platform
import statistics
import sys
import time
from pathlib import Path

import numpy as np

LEARNING_RATE = 1e-3
CHECK_STEPS = 20
FORWARD_ADDS = 416_520
STEP_FLOPS = 2 * (3 * FORWARD_ADDS - 117_600)  # the first convolution needs no gradient of its input


def data_set(rng):
    """Random images and labels: the time of a step does not depend on what they show."""
    return rng.integers(0, 256, (20_000, 28, 28), dtype=np.uint8), rng.integers(0, 10, 20_000)


class TinyCNN:
    name = "tinycnn"

    def __init__(self, activation, pool, images, labels):
        from tinycnn import Adam, Batches, CrossEntropyLoss, models, train_step

        self.model = models.lenet5(activation, pool, rng=0)
        self.batches = Batches(images, labels, mean=0.1307, std=0.3081)
        self.optimizer, self.criterion = Adam(self.model, LEARNING_RATE), CrossEntropyLoss()
        self._step = train_step

    def step(self, index):
        return self._step(self.model, self.criterion, self.optimizer, self.batches, index)


class Torch:
    name = "torch"

    def __init__(self, activation, pool, images, labels, state, threads):
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


def gemm_peak(size=1536):
    """GFLOP/s of a single-precision matrix product of NumPy's BLAS."""
    a = np.random.default_rng(0).random((size, size), dtype=np.float32)
    start = time.perf_counter()
    a @ a
    return 2 * size**3 / (time.perf_counter() - start) / 1e9


def processor():
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def measure(competitors, batch, turns, steps, rng):
    """Median images/s of each competitor, and of GEMM in GFLOP/s, over `turns` turns of `steps` steps."""
    rates: dict[str, list[float]] = {c.name: [] for c in competitors}
    peaks = []
    for _ in range(turns):
        index = [rng.permutation(20_000)[:batch] for _ in range(steps)]
        peaks.append(gemm_peak())
        for competitor in competitors:
            competitor.step(index[0])
            start = time.perf_counter()
            for i in index:
                competitor.step(i)
            rates[competitor.name].append(batch * steps / (time.perf_counter() - start))
    return {name: statistics.median(values) for name, values in rates.items()}, statistics.median(peaks)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", choices=("torch", "none"), default="torch")
    parser.add_argument("--batches", type=int, nargs="+", default=[32, 64, 128, 256])
    parser.add_argument("--activation", choices=("tanh", "relu", "sigmoid"), default="tanh")
    parser.add_argument("--pool", choices=("avg", "max"), default="avg")
    parser.add_argument("--turns", type=int, default=15, help="turns of each competitor")
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--json", type=Path, help="write the figures here too")
    args = parser.parse_args(argv)

    import numba

    import tinycnn

    threads = tinycnn.set_threads(args.threads)
    os.environ.setdefault("OPENBLAS_NUM_THREADS", str(threads))
    against = args.against
    if against == "torch":
        try:
            import torch
        except ImportError:
            print("torch is not installed (pip install 'tinycnn[bench]'): tinycnn runs alone")
            against = "none"
    versions = {"python": platform.python_version(), "numpy": np.__version__, "numba": numba.__version__}
    if against == "torch":
        versions["torch"] = torch.__version__
    print(
        f"{processor()}, {os.cpu_count()} cores, {threads} threads; "
        + ", ".join(f"{k} {v}" for k, v in versions.items())
    )
    print(f"LeNet-5, {args.activation} + {args.pool} pooling; a step is {STEP_FLOPS / 1e6:.2f} MFLOP an image")

    rng = np.random.default_rng(0)
    images, labels = data_set(rng)
    result = {
        "processor": processor(), "cores": os.cpu_count(), "threads": threads, "versions": versions,
        "activation": args.activation, "pool": args.pool, "rows": [],
    }  # fmt: skip
    print(
        print(
            f"{'':>5} {'tinycnn / torch':>24} {'images/s':>10} {'images/s':>10} {'':>7} {'GFLOP/s':>9} {'of GEMM':>7}"
        )
    )
    print(f"{'':>5} {'tinycnn / torch':>24} {'images/s':>10} {'images/s':>10} {'':>7} {'GFLOP/s':>9} {'of GEMM':>7}")
    for batch in args.batches:
        ours = TinyCNN(args.activation, args.pool, images, labels)
        competitors: list[TinyCNN | Torch] = [ours]
        if against == "torch":
            competitors.append(Torch(args.activation, args.pool, images, labels, ours.model.state_dict(), threads))
        order = [rng.permutation(20_000)[:batch] for _ in range(CHECK_STEPS)]
        losses = [[c.step(index) for index in order][-1] for c in competitors]
        if max(losses) - min(losses) > 1e-4 * max(losses):
            sys.exit(f"batch {batch}: the losses after {CHECK_STEPS} steps differ: {losses}")
        rates, peak = measure(competitors, batch, args.turns, max(2, 1280 // batch), rng)
        share = rates["tinycnn"] * STEP_FLOPS / 1e9 / peak
        ratio = rates["tinycnn"] / rates["torch"] if against == "torch" else float("nan")
        print(
            f"{batch:>5} {' / '.join(f'{loss:.6f}' for loss in losses):>24} {rates['tinycnn']:>10,.0f} "
            f"{rates.get('torch', float('nan')):>10,.0f} {ratio:>7.2f} {peak:>9,.0f} {share:>7.0%}",
            flush=True,
        )
        result["rows"].append({
            "batch": batch, "losses": losses, "images_per_second": rates, "ratio": ratio,
            "gemm_gflops": peak, "share_of_gemm": share,
        })  # fmt: skip
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
