"""Training over several processes (MPI): strong and weak scaling, the share of communication, and a model of both.

    python -m benchmarks scale [--ranks 1 2 4] [--batches 64 256 1024 4096] [--net lenet5]

Needs the extra `mpi`.  Each number of ranks is a run of mpiexec; the runs take turns.  Rows with one batch for all
ranks are strong scaling; `weak` rows have --weak images for each rank.  A step's time in `sum_gradient` is
communication, and waiting for the slowest rank.  The weights after the same steps must agree.

The model of a step is the time of one rank with its part of the batch, times ranks / cores if that is more than 1, plus
an all-reduce of the gradient: log2(ranks) * latency + 2 (ranks - 1) / ranks * bytes / bandwidth.  Latency and bandwidth
are fitted to all-reduces of several sizes between two ranks in the same run.  The model is printed beside the
measurement.  Rows of more ranks than were run are an extrapolation: they suppose that every rank has a core of its own
and that all connections are like those of this machine.
"""

import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from benchmarks import _harness as harness, _report

EXTRAPOLATED = (8, 16, 32, 64)
MPIEXEC = shutil.which("mpiexec", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]))
TOLERANCE = 1e-4  # of the weights after a few steps: sums are in another order


def start_ranks(ranks, settings, folder):
    """What the worker prints on rank 0, as a dict."""
    file = Path(folder) / f"weights-{ranks}.npy"
    command = [
        str(MPIEXEC), "-n", str(ranks), sys.executable, "-m", "benchmarks._scale_worker",
        json.dumps(settings | {"weights": str(file)}),
    ]  # fmt: skip
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{ranks} ranks: {done.stderr.strip()}")
    return json.loads(done.stdout.splitlines()[-1]) | {"weights": np.load(file)}


def fit_line(pings):
    """(latency in s, bandwidth in bytes/s) of all-reduces between two ranks.  pings: [[bytes, seconds], ...]"""
    size, seconds = np.array(pings).T
    # The smallest times decide the latency, the largest the bandwidth: relative errors.
    a, b = np.linalg.lstsq(np.stack([1 / seconds, size / seconds], axis=1), np.ones(len(size)), rcond=None)[0]
    return max(float(a), 1e-7), 1 / max(float(b), 1e-13)


def allreduce_time(ranks, size, latency, bandwidth):
    return math.ceil(math.log2(ranks)) * latency + 2 * (ranks - 1) / ranks * size / bandwidth


def model(ranks, batch, alone, size, link, cores):
    """Seconds of a step.   alone: batch -> seconds of one rank    link: latency and bandwidth"""
    part = math.ceil(batch / ranks)
    sizes = sorted(alone)
    # Below the smallest size its time: steps of few images are not shorter by much.
    compute = float(np.interp(part, sizes, [alone[size] for size in sizes]))
    return compute * max(1, ranks / cores) + (allreduce_time(ranks, size, *link) if ranks > 1 else 0)


def measure(args, threads):
    if MPIEXEC is None:
        harness.print_skipped("scale", "mpiexec is not installed: pip install 'tinycnn[mpi]'")
        return []
    cores = _report.hardware()["cores"]
    strong = sorted(set(args.batches))
    weak = {ranks: args.weak * ranks for ranks in args.ranks}
    parts = {math.ceil(batch / ranks) for batch in strong for ranks in (*args.ranks, *EXTRAPOLATED)}
    settings = {"threads": threads, "seconds": args.seconds, "net": args.net, "checked": strong[0]}
    turns: dict[int, list[dict]] = {ranks: [] for ranks in args.ranks}
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(args.turns):
            for ranks in args.ranks:
                batches = {*strong, weak[ranks]} | ({part for part in parts if part >= 8} if ranks == 1 else set())
                turns[ranks].append(start_ranks(ranks, settings | {"batches": sorted(batches)}, folder))
    harness.assert_agree(
        "weights", {f"{r} ranks": t[0]["weights"] for r, t in turns.items()}, f"{args.ranks[0]} ranks", TOLERANCE
    )

    def median(ranks, batch, key):
        return statistics.median(turn["steps"][str(batch)][key] for turn in turns[ranks])

    two = [t for r, t in turns.items() if r == 2] or [t for r, t in turns.items() if r > 1]
    sizes = two[0][0]["pings"]
    pings = [[int(size), statistics.median(turn["pings"][size] for turn in two[0])] for size in sizes]
    link = fit_line(pings)
    bytes_ = turns[args.ranks[0]][0]["bytes"]
    print(
        f"\n{args.net}: gradient of {bytes_:,} bytes; all-reduce between two ranks: latency {link[0] * 1e6:.1f} us, "
        f"bandwidth {link[1] / 1e9:.2f} GB/s"
    )
    alone = {int(batch): median(1, batch, "seconds") for batch in turns[1][0]["steps"]}
    row = _report.table(
        ("scaling", "batch", "ranks", "ms a step", "communication", "model", "images/s", "speedup"),
        (8, 6, 6, 10, 13, 8, 10, 8),
    )
    rows = []

    def show(kind, batch, ranks, measured):
        seconds = median(ranks, batch, "seconds") if measured else None
        communication = median(ranks, batch, "communication") if measured else None
        modelled = model(ranks, batch, alone, bytes_, link, cores if measured else ranks)
        rate = batch / (seconds or modelled)
        base = (args.weak if kind == "weak" else batch) / alone[args.weak if kind == "weak" else batch]
        row(
            kind, batch, f"{ranks}{'' if measured else '*'}", seconds and f"{seconds * 1e3:.2f}",
            None if communication is None else f"{communication * 1e3:.2f}", f"{modelled * 1e3:.2f}", f"{rate:,.0f}",
            f"{rate / base:.2f}",
        )  # fmt: skip
        rows.append({
            "kind": kind, "batch": batch, "ranks": ranks, "measured": measured, "seconds": seconds,
            "communication": communication, "model": modelled, "threads": threads, "net": args.net,
            "latency": link[0], "bandwidth": link[1], "bytes": bytes_,
        })  # fmt: skip

    for batch in strong:
        for ranks in args.ranks:
            show("strong", batch, ranks, True)
        for ranks in EXTRAPOLATED:
            show("strong", batch, ranks, False)
    for ranks in args.ranks:
        show("weak", weak[ranks], ranks, True)
    for ranks in EXTRAPOLATED:
        show("weak", args.weak * ranks, ranks, False)
    print(f"* extrapolation: the model, with a core for each rank.  Measured: {cores} cores for all ranks.")
    return rows


def main(argv=None):
    parser = harness.options("scale", __doc__, {}, turns=3, seconds=0.5)
    parser.set_defaults(threads=[1])
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--batches", type=int, nargs="+", default=[64, 256, 1024, 4096])
    parser.add_argument("--weak", type=int, default=256, help="images of each rank in the weak scaling")
    parser.add_argument("--net", choices=("lenet5", "resnet20"), default="lenet5")
    args = harness.parse(parser, argv, {})
    if 1 not in args.ranks or len(args.ranks) < 2:
        parser.error("--ranks: expected 1 and at least one more")
    return harness.run("scale", args, measure)


if __name__ == "__main__":
    main()
