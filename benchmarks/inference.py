"""Inference with LeNet-5, tinycnn and other libraries: throughput, and the latency of a single image.

    python -m benchmarks inference [--batches 1 64] [--nets tanh+avg relu+max] [--threads 1 2] [--only tinycnn torch]

A call maps a NumPy array of normalised images to a NumPy array of logits by each library's usual function: `model(x)`;
 PyTorch in inference mode; jit; `session.run`. All nets have the same weights, and their logits are compared
before times are measured. The table shows medians over the turns. The latency is that of a batch of one: the median
and the 99th percentile of all calls of all turns.
"""

import itertools

import numpy as np

from benchmarks import _ceilings, _competitors, _harness as harness, _report

BATCHES = [1, 8, 32, 64, 128, 256, 512, 1024]
NETS = ["tanh+avg", "relu+max"]
FLOPS = 2 * 416_520
TOLERANCE = 1e-4  # of the largest logit


def measure(args, threads):
    rows = []
    ceilings = harness.Worker(threads, _ceilings.CpuCeilings, threads)
    for net in args.nets:
        weights = _competitors.initial_weights(net)
        print(f"\nLeNet-5, {net}, {threads} threads; {FLOPS / 1e6:.2f} MFLOP an image; images/s")
        workers = harness.start_workers(threads, args.only, net, threads)
        columns = list(workers)
        head = [*columns, *(f"x {name}" for name in columns[1:])]
        print_row = _report.table(["batch", *head, "GEMM", "share"], [5, *(max(9, len(h)) for h in head), 8, 6])
        latencies = {}
        for batch in args.batches:
            harness.call_all(workers, "start", batch, weights, "infer")
            answers = harness.call_all(workers, "infer")
            harness.assert_agree(f"batch {batch}: the logits", answers, "tinycnn", TOLERANCE)
            jobs = {name: (worker, "infer") for name, worker in workers.items()}
            times = harness.round_robin(_ceilings.with_ceilings(jobs, ceilings), args.turns, args.seconds)
            rates = {name: batch / harness.median(times[name]) for name in workers}
            row = {"threads": threads, "net": net, "batch": batch, "images_per_second": rates}
            row |= _ceilings.ceiling_rates(times)
            row["share_of_gemm"] = {n: r * FLOPS / 1e9 / row["gemm_gflops"] for n, r in rates.items()}
            if batch == 1:
                row["latency"] = latencies = {name: latency(times[name]) for name in workers}
            rows.append(row)
            ratios = [f"{rates['tinycnn'] / rates[n]:.2f}" if n in rates else None for n in columns[1:]]
            cells = [f"{rates[n]:,.0f}" if n in rates else None for n in columns]
            print_row(batch, *cells, *ratios, f"{row['gemm_gflops']:.0f}", f"{row['share_of_gemm']['tinycnn']:.0%}")
        harness.stop_workers(workers)
        if latencies:
            print("\na single image")
            print_row = _report.table(["", "median, µs", "99th percentile, µs", "calls"], [13, 10, 19, 7])
            for name, times in latencies.items():
                print_row(name, f"{times['median'] * 1e6:.1f}", f"{times['p99'] * 1e6:.1f}", f"{times['calls']:,}")
    harness.stop_workers({"ceilings": ceilings})
    return rows


def latency(turns):
    """Median and 99th percentile of the seconds of a call, over all turns."""
    calls = np.array(list(itertools.chain.from_iterable(turns)))
    return {"median": float(np.median(calls)), "p99": float(np.percentile(calls, 99)), "calls": len(calls)}


def main(argv=None):
    parser = harness.options("inference", __doc__, _competitors.ALL)
    parser.add_argument("--batches", type=int, nargs="+", default=BATCHES)
    parser.add_argument("--nets", nargs="+", choices=NETS, default=NETS)
    harness.run("inference", harness.parse(parser, argv, _competitors.ALL), measure)


if __name__ == "__main__":
    main()
