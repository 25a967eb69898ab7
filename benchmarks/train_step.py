"""A whole training step of LeNet-5, tinycnn against other libraries.

    python -m benchmarks train-step [--batches 32 64] [--nets tanh+avg relu+max] [--threads 1 2] [--only tinycnn torch]

A step is what training does: gather a batch of uint8 images by index, normalise, forward, loss, backward, Adam.  All
nets start from the same weights and take the same batches; their losses after 20 steps are compared before any time is
taken.  Then they take turns, and the medians of the turns are printed, with the share of the machine's single-precision
GEMM peak that the step's arithmetic comes to; the peak is measured in the same rounds.

The second table says where tinycnn's time goes, from clocks read between the kernels of whole steps.  `alone` is the
same call over and over, which finds its data in the cache: what is less there than in the step is time spent waiting
for memory, and the sum of such times would be less than the step.

Whole steps go on with one thread while other programs slow all of them down, kernels called one by one do not: with
--busy the second table shows what each would wait for.
"""

import functools
import time
import timeit

import numpy as np

from benchmarks import _ceilings, _competitors
from benchmarks import _harness as harness

BATCHES = [1, 8, 32, 64, 128, 256, 512, 1024]
NETS = ["tanh+avg", "relu+max"]
FORWARD_ADDS = 416_520
STEP_FLOPS = 2 * (3 * FORWARD_ADDS - 117_600)  # the first convolution needs no gradient of its input
# Of the losses after 20 steps.  With ReLU and max pooling, a unit within rounding of zero, or two pixels within
# rounding of each other, send libraries different ways, and Adam's step is as large as any: with batches of 128,
# PyTorch and JAX differ by 5e-4.  The same convolutions and linear layers are in the net without kinks.
TOLERANCE = {"tanh+avg": 1e-4, "relu+max": 1e-2}
PROFILED = 40  # steps with clocks between the kernels
REPEATED = 9  # calls alone; few, since a layer that works in place drives its numbers towards zero


class TinyCNN(_competitors.TinyCNN):
    """With a look inside the step."""

    def parts(self, index):
        """What a step does, in order: (name, phase, floating-point operations, bytes read and written, call)."""
        model, batch, criterion = self.model, len(index), self.criterion
        plan = model.plan(batch)
        criterion.ensure_allocated(model.ops, batch, 10, model.dtype)
        yield "gather", "data", 0, plan.x.nbytes * 5 // 4, lambda: self.batches.gather(plan.x, index)
        backward = []
        for at, step in enumerate(plan.steps):
            name = " ".join([*map(str, step.numbers), *(type(layer).__name__ for layer in step.layers)]) or repr(step)
            x, y = step.x, step.y
            adds = [layer.multiply_adds(model.shapes[n]) for n, layer in zip(step.numbers, step.layers, strict=True)]
            flops = 2 * batch * sum(adds)
            shapes = [shape for layer in step.layers for shape in layer.parameter_shapes().values()]
            weights = 4 * sum(int(np.prod(shape)) for shape in shapes)
            yield name, "forward", flops, x.nbytes + y.nbytes + weights, step.forward
            if at < plan.first_trainable:
                continue
            wanted = at > plan.first_trainable
            # Layers with weights read x and dy; the others read dy and about as much again as their output.
            moved = (x.nbytes if flops else y.nbytes) + y.nbytes + wanted * x.nbytes + 2 * weights
            call = functools.partial(step.backward, step.dx if wanted else plan.no_grad_buffer)
            backward.append((name, "backward", (1 + wanted) * flops, moved, call))
        y, dy, labels = plan.y, plan.dy, self.batches.gather(plan.x, index)
        yield (
            "cross entropy", "loss", 0, 2 * y.nbytes,
            lambda: (criterion.forward_backward(dy, y, labels), criterion.batch_loss(batch)),
        )  # fmt: skip
        yield from reversed(backward)
        yield "Adam", "optimizer", 0, 7 * model.theta.nbytes, self.optimizer.step

    def profile(self, batch, weights):
        """(seconds of a step, rows of the second table): medians over steps in one piece and, in turn with them, steps
        taken apart, which do the same to the bit."""
        self.start(batch, weights)
        self.step(self.indices[0])
        whole = self.model.theta.copy()
        self.start(batch, weights)
        parts = list(self.parts(self.indices[0]))
        for *_, call in parts:
            call()
        if not np.array_equal(whole, self.model.theta):
            raise RuntimeError("a step taken apart is not the step")
        clocks = np.empty((PROFILED, len(parts) + 1))
        steps = np.empty(PROFILED)
        for clock, step in zip(clocks, steps.reshape(PROFILED, 1), strict=True):
            self.run.loader.seek(0)
            step[0] = time.perf_counter()
            self.run.replay(batch)
            clock[0] = time.perf_counter()
            step[0] = clock[0] - step[0]
            for number, (*_, call) in enumerate(parts):
                call()
                clock[number + 1] = time.perf_counter()
        seconds = np.median(np.diff(clocks, axis=1), axis=0)
        alone = [float(np.median(timeit.repeat(call, number=1, repeat=REPEATED))) for *_, call in parts]
        return float(np.median(steps)), [
            {"part": name, "phase": phase, "seconds": float(s), "alone": a, "flops": int(flops), "bytes": int(moved)}
            for (name, phase, flops, moved, _), s, a in zip(parts, seconds, alone, strict=True)
        ]


COMPETITORS = _competitors.TRAINING | {"tinycnn": TinyCNN}


def measure(args, threads):
    """Rows of the first table, each with the second table of its batch under "parts"."""
    rows = []
    ceilings = harness.Worker(threads, _ceilings.CpuCeilings, threads)
    for net in args.nets:
        weights = _competitors.initial_weights(net)
        print(f"\nLeNet-5, {net}, {threads} threads; a step is {STEP_FLOPS / 1e6:.2f} MFLOP an image")
        workers = harness.start_workers(threads, args.only, net, threads)
        head = ["batch", "loss", *(f"{name}/s" for name in workers), *(f"x {name}" for name in list(workers)[1:])]
        line = harness.table([*head, "GEMM", "share"], [5, 9, *(max(9, len(h)) for h in head[2:]), 8, 6])
        columns = list(workers)
        for batch in args.batches:
            harness.call_all(workers, "start", batch, weights)
            losses = {name: found[-1] for name, found in harness.call_all(workers, "losses").items()}
            harness.assert_agree(
                f"batch {batch}: the loss after {_competitors.CHECK_STEPS} steps", losses, "tinycnn", TOLERANCE[net]
            )
            jobs = {name: (worker, "next_step") for name, worker in workers.items()}
            times = harness.round_robin(_ceilings.with_ceilings(jobs, ceilings), args.turns, args.seconds)
            rates = {name: batch / harness.median(times[name]) for name in workers}
            row = {"threads": threads, "net": net, "batch": batch, "losses": losses, "images_per_second": rates}
            row |= _ceilings.ceiling_rates(times)
            row["share_of_gemm"] = {n: r * STEP_FLOPS / 1e9 / row["gemm_gflops"] for n, r in rates.items()}
            row["step"], row["parts"] = workers["tinycnn"].call("profile", batch, weights)
            rows.append(row)
            ratios = [f"{rates['tinycnn'] / rates[n]:.2f}" if n in rates else None for n in columns[1:]]
            shown = [f"{rates[n]:,.0f}" if n in rates else None for n in columns]
            peak, share = row["gemm_gflops"], row["share_of_gemm"]["tinycnn"]
            line(batch, f"{losses['tinycnn']:.6f}", *shown, *ratios, f"{peak:.0f}", f"{share:.0%}")
        harness.stop_workers(workers)
        print_parts([row for row in rows if row["net"] == net and row["threads"] == threads])
    harness.stop_workers({"ceilings": ceilings})
    return rows


def print_parts(rows):
    """Where the time of the step goes, for the batch nearest to 64."""
    row = min(rows, key=lambda row: abs(row["batch"] - 64))
    total = sum(part["seconds"] for part in row["parts"])
    took = f"the parts sum up to {total * 1e6:,.0f} µs, a step takes {row['step'] * 1e6:,.0f}"
    print(f"\ntinycnn, batch {row['batch']}: {took}")
    head = ["part", "phase", "µs", "share", "alone, µs", "GFLOP/s", "of GEMM", "GB/s"]
    line = harness.table(head, [14, 9, 9, 6, 9, 8, 8, 7])
    for part in row["parts"]:
        gflops = part["flops"] / part["seconds"] / 1e9
        arithmetic = (f"{gflops:.1f}", f"{gflops / row['gemm_gflops']:.0%}") if part["flops"] else (None, None)
        micros, share = f"{part['seconds'] * 1e6:,.1f}", f"{part['seconds'] / total:.1%}"
        alone, bandwidth = f"{part['alone'] * 1e6:,.1f}", f"{part['bytes'] / part['seconds'] / 1e9:.1f}"
        line(part["part"], part["phase"], micros, share, alone, *arithmetic, bandwidth)


def main(argv=None):
    parser = harness.options("train-step", __doc__, COMPETITORS)
    parser.add_argument("--batches", type=int, nargs="+", default=BATCHES)
    parser.add_argument("--nets", nargs="+", choices=NETS, default=NETS)
    harness.run("train-step", harness.parse(parser, argv, COMPETITORS), measure)


if __name__ == "__main__":
    main()
