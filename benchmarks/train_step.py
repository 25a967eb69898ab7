"""A whole training step of LeNet-5, tinycnn and other libraries.

    python -m benchmarks train-step [--batches 32 64] [--nets tanh+avg relu+max] [--threads 1 2] [--only tinycnn torch]

A step gathers a batch of uint8 images by index, normalises it, and runs forward, loss, backward and Adam. All nets
have the same initial weights and batches, and their losses after 20 steps are compared before times are measured. The
competitors run round robin. The table shows medians over the turns, and tinycnn's arithmetic per second as a share of
the machine's single-precision GEMM peak, which is measured in the same rounds.

The second table shows the time of each kernel of tinycnn's step, from clocks read between the kernels of whole steps.
`alone` repeats the same call, with its data in the cache. The difference is time spent waiting for memory.

Whole steps switch to one thread when other programs slow down parallel ones; single kernels do not. So with --busy the
second table shows the time that each kernel would wait.
"""

import functools
import time
import timeit

import numpy as np

from benchmarks import _ceilings, _competitors, _harness as harness, _report
from tinycnn.kernels._threads import PROBE_STEPS
from tinycnn.train import PIECE

BATCHES = [1, 8, 32, 64, 128, 256, 512, 1024]
NETS = ["tanh+avg", "relu+max"]
FORWARD_ADDS = 416_520
STEP_FLOPS = 2 * (3 * FORWARD_ADDS - 117_600)  # the first convolution needs no gradient of its input
# Of the losses after 20 steps. Libraries round differently. Where a ReLU's input is near zero, or two pixels of a max
# pooling are nearly equal, they select different gradients, and Adam takes a full step: with batches of 128,
# PyTorch and JAX differ by 5e-4. The tanh+avg net has the same convolutions and linear layers, and a tight tolerance.
TOLERANCE = {"tanh+avg": 1e-4, "relu+max": 1e-2}
PRINTED = 30  # parts in the second table
PROFILED = 40  # steps with clocks between the kernels
REPEATED = 9  # calls alone; few, as an in-place layer drives its values towards zero


class TinyCNN(_competitors.TinyCNN):
    """Adds the times of a step's parts."""

    profiled = PROFILED

    def parts(self, index):
        """The parts of a step in order: (name, phase, floating-point operations, bytes read and written, call)."""
        model, batch, criterion = self.model, len(index), self.criterion
        plan = model.plan(batch)
        criterion.ensure_allocated(model.ops, batch, model.shapes[-1][-1], model.dtype)
        yield "gather", "data", 0, plan.x.nbytes * 5 // 4, lambda: self.batches.gather(plan.x, index)
        backward = []
        for step in plan.steps:
            name = " ".join([*map(str, step.numbers), *(type(layer).__name__ for layer in step.layers)]) or repr(step)
            x, y = step.x, step.y
            adds = [
                layer.multiply_adds(model.leaf_shapes[n][0]) for n, layer in zip(step.numbers, step.layers, strict=True)
            ]
            flops = 2 * batch * sum(adds)
            shapes = [shape for layer in step.layers for shape in layer.parameter_shapes().values()]
            weights = 4 * sum(int(np.prod(shape)) for shape in shapes)
            yield name, "forward", flops, x.nbytes + y.nbytes + weights, step.forward
            needs_dx = step.needs_dx
            if not (needs_dx or step.trainable):
                continue
            # Layers with weights read x and dy; the others read dy and about as much as their output.
            moved = (x.nbytes if flops else y.nbytes) + y.nbytes + needs_dx * x.nbytes + 2 * weights
            call = functools.partial(step.backward, step.dx if needs_dx else step.no_grad_buffer)
            backward.append((name, "backward", (1 + needs_dx) * flops, moved, call))
        y, dy, labels = plan.y, plan.dy, self.batches.gather(plan.x, index)
        yield (
            type(criterion).__name__, "loss", 0, 2 * y.nbytes,
            lambda: (criterion.forward_backward(dy, y, labels), criterion.batch_loss(batch)),
        )  # fmt: skip
        yield from reversed(backward)
        yield type(self.optimizer).__name__, "optimizer", 0, 7 * model.theta.nbytes, self.optimizer.step

    def profile(self, batch, weights, timer="perf_counter"):
        """(seconds of a step, rows of the second table): medians over whole steps, and over interleaved steps run
        part by part, which give the same bits.  timer: a function of `time`"""
        timer = getattr(time, timer)
        self.start(batch, weights)
        self.step(self.indices[0])
        expected = self.model.theta.copy()
        self.start(batch, weights)
        parts = list(self.parts(self.indices[0]))
        for *_, call in parts:
            call()
        if not np.array_equal(expected, self.model.theta):
            raise RuntimeError("the parts of a step give another result than the step")
        for _ in range(PROBE_STEPS):  # which the thread policy runs on one thread
            self.run.loader.seek(0)
            self.run.replay(batch)
        clocks = np.empty((self.profiled, len(parts) + 1))
        steps = np.empty(self.profiled)
        for clock, step in zip(clocks, steps.reshape(self.profiled, 1), strict=True):
            self.run.loader.seek(0)
            step[0] = timer()
            self.run.replay(batch)
            clock[0] = timer()
            step[0] = clock[0] - step[0]
            for i, (*_, call) in enumerate(parts):
                call()
                clock[i + 1] = timer()
        seconds = np.median(np.diff(clocks, axis=1), axis=0)
        alone = [float(np.median(timeit.repeat(call, timer=timer, number=1, repeat=REPEATED))) for *_, call in parts]
        return float(np.median(steps)), [
            {"part": name, "phase": phase, "seconds": float(s), "alone": a, "flops": int(flops), "bytes": int(moved)}
            for (name, phase, flops, moved, _), s, a in zip(parts, seconds, alone, strict=True)
        ]


COMPETITORS = _competitors.TRAINING | {"tinycnn": TinyCNN}


def measure(args, threads):
    """Rows of the first table; "parts" holds the second table of the batch."""
    rows = []
    ceilings = harness.Worker(threads, _ceilings.CpuCeilings, threads)
    for net in args.nets:
        weights = _competitors.initial_weights(net)
        print(f"\nLeNet-5, {net}, {threads} threads; a step is {STEP_FLOPS / 1e6:.2f} MFLOP an image")
        workers = harness.start_workers(threads, args.only, net, threads)
        head = ["batch", "loss", *(f"{name}/s" for name in workers), *(f"x {name}" for name in list(workers)[1:])]
        print_row = _report.table([*head, "GEMM", "share"], [5, 9, *(max(9, len(h)) for h in head[2:]), 8, 6])
        columns = list(workers)
        for batch in args.batches:
            harness.call_all(workers, "start", batch, weights)
            losses = {name: values[-1] for name, values in harness.call_all(workers, "losses").items()}
            harness.assert_agree(
                f"batch {batch}: the loss after {_competitors.CHECK_STEPS} steps", losses, "tinycnn", TOLERANCE[net]
            )
            jobs = {name: (worker, "next_step") for name, worker in workers.items()}
            times = harness.round_robin(_ceilings.with_ceilings(jobs, ceilings), args.turns, args.seconds)
            rates = {name: batch / harness.median(times[name]) for name in workers}
            row = {"threads": threads, "net": net, "batch": batch, "losses": losses, "images_per_second": rates}
            row |= _ceilings.ceiling_rates(times)
            row["share_of_gemm"] = {n: r * STEP_FLOPS / 1e9 / row["gemm_gflops"] for n, r in rates.items()}
            if batch <= PIECE:
                row["step"], row["parts"] = workers["tinycnn"].call("profile", batch, weights)
            rows.append(row)
            ratios = [f"{rates['tinycnn'] / rates[n]:.2f}" if n in rates else None for n in columns[1:]]
            cells = [f"{rates[n]:,.0f}" if n in rates else None for n in columns]
            peak, share = row["gemm_gflops"], row["share_of_gemm"]["tinycnn"]
            print_row(batch, f"{losses['tinycnn']:.6f}", *cells, *ratios, f"{peak:.0f}", f"{share:.0%}")
        harness.stop_workers(workers)
        print_parts([row for row in rows if row["net"] == net and row["threads"] == threads])
    harness.stop_workers({"ceilings": ceilings})
    return rows


def print_parts(rows):
    """Print the second table, for the batch size nearest to 64 of those that do not run in pieces: the parts that take
    longest, in order."""
    profiled = [row for row in rows if "parts" in row]
    if not profiled:
        return
    row = min(profiled, key=lambda row: abs(row["batch"] - 64))
    total = sum(part["seconds"] for part in row["parts"])
    sums = f"the parts sum up to {total * 1e6:,.0f} µs, a step takes {row['step'] * 1e6:,.0f}"
    print(f"\ntinycnn, batch {row['batch']}: {sums}")
    head = ["part", "phase", "µs", "share", "alone, µs", "GFLOP/s", "of GEMM", "GB/s"]
    print_row = _report.table(head, [14, 9, 9, 6, 9, 8, 8, 7])
    longest = sorted(row["parts"], key=lambda part: -part["seconds"])[:PRINTED]
    for part in row["parts"]:
        if part not in longest:
            continue
        gflops = part["flops"] / part["seconds"] / 1e9
        arithmetic = (f"{gflops:.1f}", f"{gflops / row['gemm_gflops']:.0%}") if part["flops"] else (None, None)
        micros, share = f"{part['seconds'] * 1e6:,.1f}", f"{part['seconds'] / total:.1%}"
        alone, bandwidth = f"{part['alone'] * 1e6:,.1f}", f"{part['bytes'] / part['seconds'] / 1e9:.1f}"
        print_row(part["part"], part["phase"], micros, share, alone, *arithmetic, bandwidth)
    if others := len(row["parts"]) - len(longest):
        seconds = total - sum(part["seconds"] for part in longest)
        print_row(f"{others} others", "", f"{seconds * 1e6:,.1f}", f"{seconds / total:.1%}", *[None] * 4)


def main(argv=None):
    parser = harness.options("train-step", __doc__, COMPETITORS)
    parser.add_argument("--batches", type=int, nargs="+", default=BATCHES)
    parser.add_argument("--nets", nargs="+", choices=NETS, default=NETS)
    harness.run("train-step", harness.parse(parser, argv, COMPETITORS), measure)


if __name__ == "__main__":
    main()
