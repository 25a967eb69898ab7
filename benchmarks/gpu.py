"""All checks and measurements for a machine with an NVIDIA GPU.

    make gpu-check        or        python -m benchmarks gpu [--minutes 8] [--skip-tests] [--out benchmarks/results]

First the tests on the device (pytest -m gpu), and some of them under compute-sanitizer if that is installed.  Then the
benchmarks: the launches, bytes and operations of a step (counted, no times), the ceilings of the GPU, single kernels,
whole steps (eager and captured) on GPU and CPU, host time of a launch, an epoch and the time to 99 % on MNIST, and
PyTorch on the same GPU.  Results are compared with the CPU's before times are taken.  Times are medians after a
warm-up, measured by CUDA events.  Parts that fail, or for which no time is left, are reported, and the others run.
Results go to gpu.json and gpu.md in the folder of --out.

--rehearse runs the same code on tiny sizes and saves nothing; its times are meaningless.  Without a GPU, as PTX on the
CPU: python tests/support/cuda_on_cpu -m benchmarks.gpu --rehearse
"""

import argparse
import collections
import contextlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
import traceback
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
IMAGES = 60_000
RATE = 1e-3


def data_set(images):
    """Random images and labels; the time of a step does not depend on their content."""
    rng = np.random.default_rng(0)
    return rng.integers(0, 256, (images, 28, 28), dtype=np.uint8), rng.integers(0, 10, images)


class Setup:
    """LeNet-5 with loss, Adam and data on one device."""

    def __init__(self, device, batch, images, activation="relu", pool="max"):
        from tinycnn import Adam, CrossEntropyLoss, DeviceDataset, models
        from tinycnn.dataset import DataLoader
        from tinycnn.train import StepRunner

        self.batch = batch
        self.model = models.lenet5(activation, pool, rng=0, device=device)
        self.batches = DeviceDataset(*data_set(images), mean=0.1307, std=0.3081, device=device)
        self.optimizer, self.criterion = Adam(self.model, RATE), CrossEntropyLoss()
        self.run = StepRunner(self.model, self.criterion, DataLoader(self.batches), self.optimizer)
        self.run.reserve(batch)
        self.model.reserve(batch)

    def step(self):
        self.run.step(self.batch)

    def restart(self):
        """Go back to the first image and clear the totals; valid for a captured step too."""
        self.run.loader.seek(0)
        self.batches.ops.copy_to(self.run.totals, np.zeros(5))

    def losses(self, step, count):
        """The mean loss of each of the next `count` steps."""
        losses, previous = [], 0.0
        for _ in range(count):
            step()
            total = float(self.batches.ops.to_host(self.run.totals)[0])
            losses.append((total - previous) / self.batch)
            previous = total
        return losses


def median(function, repeats):
    """Median seconds of `function` on the device, after two calls to warm up."""
    from tinycnn.cuda import _launch

    for _ in range(2):
        function()
    return statistics.median(_launch.elapsed_seconds(function) for _ in range(repeats))


def assert_agree(name, got, want, tolerance):
    """Raise ValueError unless two arrays agree within `tolerance` (relative, in the Euclidean norm)."""
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    error = np.linalg.norm(got - want) / max(np.linalg.norm(want), 1e-30)
    if not error <= tolerance:
        raise ValueError(f"{name} differs from the CPU's by {error:.1e}, allowed {tolerance:.1e}")
    return error


# --- the parts: each takes the sizes and returns (results for the JSON, lines of the table) ---------------------------


def ceilings(size):
    """Upper limits of the GPU: bytes copied and fused multiply-adds per second."""
    from benchmarks import _ceilings
    from tinycnn import cuda

    ceiling = _ceilings.GpuCeilings(size["copy"], size["chains"])
    seconds = [median(call, size["repeats"]) for call in (ceiling.multiply, ceiling.copy)]
    assert_agree("the copy", cuda.to_host(ceiling.target), cuda.to_host(ceiling.source), 0)
    rates = _ceilings.rates(ceiling, *seconds)
    line = f"copy {rates['copy_gb_per_s']:,.0f} GB/s, fused multiply-adds {rates['gemm_gflops'] / 1e3:.1f} TFLOP/s"
    return rates, [line]


def kernels(size):
    """Time, bandwidth and arithmetic of every call of a step, from captures of many calls in a row."""
    rows, lines = [], [f"{'batch':>5} {'call':<38} {'us':>8} {'GB/s':>8} {'GFLOP/s':>9}"]
    for batch in size["kernel_batches"]:
        for activation, pool in (("tanh", "avg"), ("relu", "max")):
            cpu, gpu = (Setup(d, batch, size["images"], activation, pool) for d in ("cpu", "cuda"))
            losses = [s.losses(s.step, 1)[0] for s in (cpu, gpu)]
            assert_agree("the loss", losses[1], losses[0], 1e-4)
            compare_buffers(cpu.model, gpu.model, batch)
            for name, call, flops, moved in calls_of(gpu, batch):
                repeat = size["in_a_row"]
                captured = gpu.model.ops.capture(lambda call=call, n=repeat: [call() for _ in range(n)] and None)
                seconds = median(captured, size["repeats"]) / repeat
                rows.append({"batch": batch, "net": f"{activation} + {pool}", "call": name, "seconds": seconds,
                             "gb_per_s": moved / seconds / 1e9, "gflop_per_s": flops / seconds / 1e9})  # fmt: skip
    for row in rows:
        lines.append(
            f"{row['batch']:5d} {row['call']:<38} {row['seconds'] * 1e6:8.2f} {row['gb_per_s']:8.0f} "
            f"{row['gflop_per_s']:9.0f}"
        )
    return rows, lines


def compare_buffers(cpu, gpu, batch):
    """Compare the outputs of all steps, and the gradients, of two models after the same step.  Small batches have more
    steps on the CPU."""
    want, got = (
        {step.numbers[-1]: plan.to_host(step.y) for step in plan.steps if step.layers}
        for plan in (cpu.plan(batch), gpu.plan(batch))
    )
    for number in got:
        assert_agree(f"the output of layer {number}", got[number], want[number], 1e-4)
    assert_agree("the gradient", gpu.ops.to_host(gpu.grad), cpu.grad, 1e-4)


def calls_of(setup, batch):
    """(name, call, floating-point operations, bytes) of every call of a step.  Bytes: what must be read and written at
    least, each array once."""
    model, criterion = setup.model, setup.criterion
    plan = model.plan(batch)
    target = setup.run.loader.next(plan.x)
    out: list[tuple] = []
    order, cursor = setup.run.loader.order, setup.run.loader.cursor
    out.append(("gather", lambda: setup.batches.gather_batch(plan.x, target, order, cursor), 0, batch * 784 * 5))
    backward = []
    for step in plan.steps:
        if not step.layers or "Flatten" in repr(step):
            continue
        name = f"{step.numbers[0]} " + " + ".join(type(layer).__name__ for layer in step.layers)
        pairs = zip(step.numbers, step.layers, strict=True)
        adds = sum(layer.multiply_adds(model.leaf_shapes[number][0]) for number, layer in pairs) * batch
        parameters = sum(p.view.nbytes for p in model.parameter_table if p.layer in step.layers)
        pooling: Any = getattr(step, "pooling", None)  # of a convolution and its activation
        maps = 0 if pooling is None else pooling.x.nbytes
        indices = pooling.indices.nbytes if hasattr(pooling, "indices") else 0
        values = 0 if indices else maps  # of the activation: written forward, read backward
        moved = step.x.nbytes + step.y.nbytes + parameters
        out.append((name + " forward", step.forward, 2 * adds, moved + values + indices))
        dx, passes = (step.dx, 2) if step.needs_dx else (step.no_grad_buffer, 1)
        moved += step.y.nbytes * (len(step.layers) > 1 and not values) + parameters + dx.nbytes  # y: of an activation
        call = (name + " backward", lambda step=step, dx=dx: step.backward(dx), 2 * adds * passes)
        backward.append((*call, moved + 2 * maps + values + indices))
    out.append(("loss", lambda: criterion.forward_backward(plan.dy, plan.y, target), 0, 2 * plan.y.nbytes))
    out += reversed(backward)
    out.append(("Adam", setup.optimizer.step, 0, 7 * model.theta.nbytes))
    totals = setup.run.totals
    out.append(("metrics", lambda: criterion.accumulate_metrics(totals, cursor, target), 0, 12 * batch))
    return out


@contextlib.contextmanager
def launched():
    """A list that gets the name of every kernel launched in the context."""
    from tinycnn.cuda import _launch

    names: list[str] = []
    kernel_class: Any = _launch.Kernel
    launch = kernel_class.launch

    def count(self, grid, *args):
        if 0 not in (grid if isinstance(grid, tuple) else (grid,)):
            names.append(self.__name__)
        launch(self, grid, *args)

    kernel_class.launch = count
    try:
        yield names
    finally:
        kernel_class.launch = launch


def work_of_a_step(setup, batch):
    """(names of the kernels that a step launches, counted; its floating-point operations and bytes, by arithmetic)"""
    with launched() as names:
        setup.step()
    calls = calls_of(setup, batch)
    return names, sum(flops for *_, flops, _ in calls), sum(moved for *_, moved in calls)


def work(size):
    """Launches of a training step, counted, and its bytes and operations, by arithmetic; these are no times."""
    rows, lines = [], []
    for batch in size["work_batches"]:
        for activation, pool in (("tanh", "avg"), ("relu", "max")):
            setup = Setup("cuda", batch, max(2 * batch, 40), activation, pool)
            names, flops, moved = work_of_a_step(setup, batch)
            rows.append({"batch": batch, "net": f"{activation} + {pool}", "kernels": names, "flops": flops,
                         "bytes": moved})  # fmt: skip
            kinds = ", ".join(f"{n} {name.removesuffix('_kernel')}" for name, n in collections.Counter(names).items())
            lines.append(
                f"batch {batch}, {activation} + {pool}: {len(names)} launches, {moved / 1e6:.2f} MB, "
                f"{flops / 1e6:.0f} MFLOP"
            )
            lines.append(f"    {kinds}")
    return rows, lines


def steps(size):
    """A training step, eager and captured, on GPU and CPU, with the same weights, batches and losses."""
    rows, lines = (
        [],
        [
            f"{'batch':>5} {'eager us':>10} {'captured us':>12} {'images/s':>12} {'TFLOP/s':>8} {'CPU images/s':>13} "
            f"{'launches':>8} {'MB':>8} {'MFLOP':>8}"
        ],
    )
    for batch in size["batches"]:
        cpu, gpu, captured_setup = (Setup(d, batch, size["images"]) for d in ("cpu", "cuda", "cuda"))
        captured = captured_setup.model.ops.capture(captured_setup.step)
        want = cpu.losses(cpu.step, size["checked"])
        got, replayed = gpu.losses(gpu.step, size["checked"]), captured_setup.losses(captured, size["checked"])
        if got != replayed:
            raise ValueError(f"batch {batch}: captured and eager steps differ: {got} and {replayed}")
        assert_agree(f"batch {batch}: the losses", got, want, 1e-3)
        seconds = {}
        for name, setup, step in (("eager", gpu, gpu.step), ("captured", captured_setup, captured)):
            count = max(1, min(size["in_a_row"], size["images"] // batch - 2))

            def run_steps(step=step, count=count):
                for _ in range(count):
                    step()

            times = []
            for _ in range(size["repeats"] + 1):
                setup.restart()
                times.append(_seconds(run_steps) / count)
            seconds[name] = statistics.median(times[1:])
        cpu.restart()
        start = time.perf_counter()
        for _ in range(count):
            cpu.step()
        seconds["cpu"] = (time.perf_counter() - start) / count
        names, flops, moved = work_of_a_step(gpu, batch)
        rows.append({"batch": batch, "seconds": seconds, "losses": {"cpu": want, "gpu": got}, "launches": len(names),
                     "bytes": moved, "flops": flops})  # fmt: skip
        rate = batch / seconds["captured"]
        lines.append(
            f"{batch:5d} {seconds['eager'] * 1e6:10.1f} {seconds['captured'] * 1e6:12.1f} {rate:12,.0f} "
            f"{rate * flops / batch / 1e12:8.2f} {batch / seconds['cpu']:13,.0f} {len(names):8d} "
            f"{moved / 1e6:8.2f} {flops / 1e6:8.0f}"
        )
    return rows, lines


def _seconds(function):
    from tinycnn.cuda import _launch

    return _launch.elapsed_seconds(function)


def launches(size):
    """Host time of a launch, without the kernel."""
    from tinycnn import cuda
    from tinycnn.cuda import _launch, optim

    step = cuda.empty((1,), np.int64)
    count = size["launches"]
    for _ in range(10):
        optim.increment_kernel[1](step)
    _launch.synchronize()
    start = time.perf_counter()
    for _ in range(count):
        optim.increment_kernel[1](step)
    seconds = (time.perf_counter() - start) / count
    _launch.synchronize()
    if int(cuda.to_host(step)[0]) != count + 10:
        raise ValueError("launches were lost")
    return {"seconds": seconds}, [f"{seconds * 1e6:.1f} us of host time per launch (one array)"]


def epochs(size):
    """Time of an epoch of MNIST, and time to 99 % test accuracy, with the data on the device."""
    from tinycnn import AdamW, CrossEntropyLoss, DeviceDataset, data, evaluate, fit, models, schedules, train

    try:
        mnist = data.mnist(download=False)
    except (OSError, ValueError) as error:
        return None, [f"skipped: {error}"]
    count = size["mnist"]
    training = DeviceDataset(mnist.train_images[:count], mnist.train_labels[:count], device="cuda")
    test = DeviceDataset(mnist.test_images[:count], mnist.test_labels[:count], mean=training.mean, std=training.std,
                   device="cuda")  # fmt: skip
    rows = []
    for seed in range(size["seeds"]):
        model = models.lenet5("relu", "max", rng=seed, device="cuda")
        batch, epochs = 128, size["epochs"]
        rates = schedules.one_cycle(4e-3, epochs * -(-len(training) // batch), warmup=0.2)
        optimizer, criterion = AdamW(model, rates, weight_decay=0.05), CrossEntropyLoss()
        train.warm_up(model, criterion, optimizer, training, batch)
        spent: list[float] = []
        reached = None

        def on_epoch(record, model=model, spent=spent):
            spent.append(record["seconds"])
            record["test_accuracy"] = evaluate(model, test, batch_size=1000)[1]

        history = fit(
            model, criterion, optimizer, training, epochs=epochs, batch_size=batch, rng=seed, on_epoch=on_epoch,
            progress=False,
        )  # fmt: skip
        for number, record in enumerate(history, 1):
            if record["test_accuracy"] >= 0.99 and reached is None:
                reached = sum(spent[:number])
        rows.append({"seed": seed, "epoch_seconds": statistics.median(spent), "seconds_to_99": reached,
                     "test_accuracy": history[-1]["test_accuracy"]})  # fmt: skip
    lines = [
        f"seed {r['seed']}: an epoch {r['epoch_seconds'] * 1e3:.1f} ms, 99 % after "
        + (f"{r['seconds_to_99'] * 1e3:.0f} ms of training" if r["seconds_to_99"] else "not reached")
        + f", {r['test_accuracy']:.2%} at the end"
        for r in rows
    ]
    return rows, lines


def torch_steps(size):
    """PyTorch's step on the same GPU: eager, compiled, and as a CUDA graph; data preloaded, losses compared."""
    try:
        import torch
        from torch import nn
    except ImportError:
        return None, ["skipped: torch is not installed"]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not size["rehearsal"]:
        return None, ["skipped: this torch sees no GPU"]
    images, labels = (torch.from_numpy(a).to(device) for a in data_set(size["images"]))
    rows, lines = [], [f"{'batch':>5} {'mode':<22} {'us':>10} {'images/s':>12}"]

    def build(batch, tf32):
        from tinycnn import models

        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32
        net = nn.Sequential(
            nn.Conv2d(1, 6, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 16, 5), nn.ReLU(), nn.MaxPool2d(2),
            nn.Flatten(), nn.Linear(400, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU(), nn.Linear(84, 10),
        ).to(device)  # fmt: skip
        state = models.lenet5("relu", "max", rng=0).state_dict()
        net.load_state_dict({name: torch.from_numpy(value) for name, value in state.items()})
        on_gpu = device == "cuda"
        optimizer = torch.optim.Adam(net.parameters(), RATE, fused=on_gpu, capturable=on_gpu)
        criterion = nn.CrossEntropyLoss()
        index = torch.arange(batch, device=device)

        def forward_loss(index):
            x = images[index][:, None].float().mul_(1 / (255 * 0.3081)).sub_(0.1307 / 0.3081)
            return criterion(net(x), labels[index])

        def step():
            optimizer.zero_grad(set_to_none=False)
            loss = forward_loss(index)
            loss.backward()
            optimizer.step()
            index.add_(batch)
            return loss

        return step, index, net

    def timed(step, index, batch):
        count = max(1, min(size["in_a_row"], size["images"] // batch - 8))
        times = []
        for _ in range(size["repeats"] + 1):
            index.copy_(torch.arange(batch, device=device))
            if device == "cuda":
                start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                start.record()
            begin = time.perf_counter()
            for _ in range(count):
                step()
            if device == "cuda":
                stop.record()
                stop.synchronize()
                times.append(start.elapsed_time(stop) / 1000 / count)
            else:
                times.append((time.perf_counter() - begin) / count)
        return statistics.median(times[1:])

    def graphed(step):
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
        return graph.replay

    for batch in size["torch_batches"]:
        setup = Setup("cuda", batch, size["images"])
        want = setup.losses(setup.step, 3)
        modes = [("eager", False), ("compiled", False), ("graph", False), ("eager, tf32", True), ("graph, tf32", True)]
        for name, tf32 in modes:
            if name != "eager" and (device == "cpu" or time.monotonic() > size["until"]):
                continue
            try:
                step, index, net = build(batch, tf32)
                losses = [step().item() for _ in range(3)]
                if not tf32:
                    assert_agree(f"torch, batch {batch}: the losses", losses, want, 1e-3)
                if name.startswith("compiled"):
                    net.compile()
                    step()
                run = graphed(step) if name.startswith("graph") else step
                seconds = timed(run, index, batch)
            except Exception as error:
                lines.append(f"{batch:5d} {name:<22} failed: {str(error).splitlines()[0][:80]}")
                rows.append({"batch": batch, "mode": name, "error": str(error)[:400]})
                continue
            rows.append({"batch": batch, "mode": name, "seconds": seconds})
            lines.append(f"{batch:5d} {name:<22} {seconds * 1e6:10.1f} {batch / seconds:12,.0f}")
    return rows, lines


PARTS = {
    "work": work, "ceilings": ceilings, "launches": launches, "steps": steps, "torch": torch_steps, "epochs": epochs,
    "kernels": kernels,
}  # fmt: skip
SIZES: dict[str, Any] = {
    "copy": 1 << 27, "chains": 1 << 22, "repeats": 15, "in_a_row": 50, "images": IMAGES, "checked": 10,
    "launches": 2000, "work_batches": (64,),
    "kernel_batches": (64, 1024), "batches": (32, 64, 128, 256, 512, 1024, 2048, 4096),
    "torch_batches": (64, 512, 128, 256, 32, 1024, 4096), "mnist": 60_000, "seeds": 5, "epochs": 4, "rehearsal": False,
}  # fmt: skip
REHEARSAL: dict[str, Any] = {
    "copy": 1000, "chains": 200, "repeats": 1, "in_a_row": 1, "images": 40, "checked": 2, "launches": 2,
    "work_batches": (64,), "kernel_batches": (2,), "batches": (3,), "torch_batches": (3,), "mnist": 60, "seeds": 1,
    "epochs": 1, "rehearsal": True,
}  # fmt: skip


# --- tests and main ---------------------------------------------------------------------------------------------------


def run_tests(limit):
    """Run pytest on the device, and small cases under compute-sanitizer; returns lines for the report."""
    environment = {**os.environ, "TINYCNN_CUDA": "gpu"}
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider"]
    lines = []
    for title, line in (("tests", command), ("compute-sanitizer", [*command, "-k", "test_small and not adam"])):
        if title == "compute-sanitizer":
            tool = shutil.which("compute-sanitizer")
            if tool is None:
                lines.append("compute-sanitizer: skipped, it is not installed")
                continue
            line = [tool, "--tool", "memcheck", "--error-exitcode", "9", *line]
        try:
            done = subprocess.run(
                line, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=limit, check=False
            )
            tail = (done.stdout.strip().splitlines() or ["no output"])[-1]
            lines.append(f"{title}: exit {done.returncode}, {tail}")
            if done.returncode:
                print(done.stdout[-6000:], done.stderr[-2000:], sep="\n")
        except subprocess.TimeoutExpired:
            lines.append(f"{title}: stopped after {limit:.0f} s")
    return lines


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=8, help="time limit; no part starts in the last minute")
    parser.add_argument("--skip-tests", action="store_true")
    parser.add_argument("--only", nargs="+", choices=PARTS, help="these parts only")
    parser.add_argument(
        "--out", type=Path, default=ROOT / "benchmarks" / "results", help="folder for gpu.json and gpu.md"
    )
    parser.add_argument("--rehearse", action="store_true", help="run on tiny sizes and save nothing")
    args = parser.parse_args(argv)
    begin = time.monotonic()

    from tinycnn import _gpu, devices, hardware
    from tinycnn.errors import DeviceError

    try:
        devices.get("cuda")
    except DeviceError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    size: dict[str, Any] = (REHEARSAL if args.rehearse else SIZES) | {"until": begin + 60 * (args.minutes - 1)}
    name = hardware.device_name("cuda:0")
    versions: dict[str, str | None] = {}
    for package in ("numpy", "numba", "numba-cuda", "torch"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    status = _gpu.probe()
    header = f"{name}; {hardware.processor()}, {os.cpu_count()} cores; driver for CUDA {status.driver}; " + ", ".join(
        f"{package} {version or 'none'}" for package, version in versions.items()
    )
    result: dict[str, Any] = {
        "device": name, "processor": hardware.processor(), "driver": status.driver, "versions": versions,
        "git_revision": hardware.git_revision(), "parts": {},
    }  # fmt: skip
    text = ["# tinycnn on a GPU", "", header, ""]
    print(header)
    failed = []
    if not (args.skip_tests or args.rehearse):
        lines = run_tests(60 * args.minutes / 2)
        failed += [line for line in lines if "exit" in line and "exit 0" not in line]
        result["tests"] = lines
        text += ["## Tests", "", *lines, ""]
        print("\n".join(lines), flush=True)
    for part, function in PARTS.items():
        if args.only and part not in args.only:
            continue
        title = (function.__doc__ or part).strip().splitlines()[0]
        if time.monotonic() > size["until"]:
            figures, lines = None, ["skipped: no time left"]
        else:
            start = time.monotonic()
            try:
                figures, lines = function(size)
            except Exception:
                failed.append(part)
                figures, lines = None, ["FAILED", *traceback.format_exc().splitlines()[-6:]]
            lines.append(f"({time.monotonic() - start:.1f} s)")
        result["parts"][part] = figures
        text += [f"## {part}", "", title, "", "```", *lines, "```", ""]
        print(f"\n{part}: {title}", *lines, sep="\n", flush=True)
        if not args.rehearse:  # after every part, so that nothing is lost
            args.out.mkdir(parents=True, exist_ok=True)
            (args.out / "gpu.json").write_text(json.dumps(result, indent=1) + "\n")
            (args.out / "gpu.md").write_text("\n".join(text))
    print("\n" + (f"FAILED: {', '.join(failed)}" if failed else "all parts done"))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
