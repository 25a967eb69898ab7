"""Convolutions of many shapes, forward and both gradients, tinycnn and other libraries.

    python -m benchmarks conv [--batch 32] [--shapes C3 64-channels] [--threads 1 2] [--only tinycnn torch]

The shapes are LeNet's; 3 x 3 kernels with growing numbers of channels and with growing images; a stride of two; 1 x 1.
`backward` computes the gradients of input, weights and bias in one call. Every library uses its preferred
layout: tinycnn the batch-blocked layout for large enough batches, as between the layers of a net; PyTorch and JAX the
faster of NCHW and NHWC for each shape and direction (recorded in the JSON); JAX under jit. ONNX Runtime has no
gradients; NumPy's are im2col and matrix products. Results are compared with NumPy's in float64 before times are
measured; the tolerance is 1e-6 times the root of the number of products in a sum, relative to the largest entry.

The table shows GFLOP/s, medians over the turns, and tinycnn's path: the functions that did the work.
"""

import functools
import math
import timeit
from typing import Any, NamedTuple

import numpy as np

from benchmarks import _ceilings, _competitors, _harness as harness, _report

PHASES = ("forward", "backward")


class Shape(NamedTuple):
    name: str
    channels: int
    maps: int
    kernel: int
    size: int  # of the image, square
    padding: int = 0
    stride: int = 1

    @property
    def out(self):
        return (self.size + 2 * self.padding - self.kernel) // self.stride + 1

    def flops(self, batch):
        return 2 * batch * self.out**2 * self.maps * self.channels * self.kernel**2

    def bytes(self, batch):
        """Bytes of images, outputs and weights in float32."""
        image, output = self.channels * self.size**2, self.maps * self.out**2
        return 4 * (batch * (image + output) + self.maps * self.channels * self.kernel**2)

    def __str__(self):
        stride = f", stride {self.stride}" if self.stride > 1 else ""
        return f"{self.kernel}x{self.kernel}, {self.channels} to {self.maps}, on {self.size}x{self.size}{stride}"


SHAPES = [
    Shape("C1", 1, 6, 5, 28, 2),
    Shape("C3", 6, 16, 5, 14),
    Shape("C5", 16, 120, 5, 5),
    *(Shape(f"{c}-channels", c, c, 3, 32, 1) for c in (4, 8, 16, 32, 64)),
    *(Shape(f"{s}-pixels", 16, 16, 3, s, 1) for s in (8, 16, 64)),
    Shape("stride-2", 32, 64, 3, 32, 1, 2),
    Shape("1x1", 64, 64, 1, 32),
]


def random_arrays(shape, batch, dtype=np.float32):
    """x, w, b, dy of a shape: the same for all competitors."""
    rng = np.random.default_rng(0)
    sizes = (
        (batch, shape.channels, shape.size, shape.size),
        (shape.maps, shape.channels, shape.kernel, shape.kernel),
        (shape.maps,),
        (batch, shape.maps, shape.out, shape.out),
    )
    return [rng.standard_normal(size, dtype=np.float32).astype(dtype) for size in sizes]


class TinyCNN:
    def __init__(self, threads):
        import tinycnn

        tinycnn.set_num_threads(threads)
        self.ops = tinycnn.kernels

    def start(self, shape, batch):
        ops, (x, w, b, dy) = self.ops, random_arrays(shape, batch)
        self.batch, lanes = batch, ops.layout.lanes_for(batch, np.float32)
        x, y, dy, dx = (self.to_layout(a, lanes) for a in (x, np.zeros_like(dy), dy, np.zeros_like(x)))
        options = ((shape.stride,) * 2, (shape.padding,) * 2, (1, 1), 1)
        self.results = y, dx, *(ops.empty(a.shape, a.dtype) for a in (w, b))
        self.forward = functools.partial(ops.conv2d_forward, y, x, w, b, *options)
        self.backward = functools.partial(ops.conv2d_backward, *self.results[1:], dy, x, w, *options)

    def to_layout(self, a, lanes):
        """A copy as between the layers of a net: aligned to cache lines, and blocked if the batch is large enough."""
        N, C, H, W = a.shape
        if lanes == 1:
            copy = self.ops.empty(a.shape, a.dtype)
            copy[...] = a
        else:
            copy = self.ops.empty((-(-N // lanes), C, H, W, lanes), a.dtype)
            self.ops.layout.to_blocked(copy, a)
        return copy

    def outputs(self):
        self.forward()
        self.backward()
        y, dx, dw, db = self.results
        return [self.ops.layout.as_nchw(y)[: self.batch], self.ops.layout.as_nchw(dx)[: self.batch], dw, db]

    def path(self):
        """The kernels that do the work, of each phase."""
        return {phase: self.trace(getattr(self, phase)) for phase in PHASES}

    def trace(self, call):
        """Names of the kernels that `call` runs."""
        from tinycnn.kernels import _capture

        calls: list[Any] = []
        _capture.trace_calls(call, calls, dry_run=True)
        return " ".join(kernel.__name__.removesuffix("_serial").removeprefix("conv2d_") for kernel, _ in calls)


class TwoLayouts:
    """Base of Torch and Jax: the faster of two layouts, for each direction."""

    layouts = ("NCHW", "NHWC")

    def start(self, shape, batch):
        calls = {layout: self.calls(shape, layout, *random_arrays(shape, batch)) for layout in self.layouts}
        seconds: dict[str, dict[str, float]] = {phase: {} for phase in PHASES}
        for layout, pair in calls.items():
            for phase, call in zip(PHASES, pair, strict=True):
                call()
                seconds[phase][layout] = min(timeit.repeat(call, number=1, repeat=5))
        self.layout = {phase: min(times, key=lambda name: times[name]) for phase, times in seconds.items()}
        self.forward, self.backward = (calls[self.layout[p]][i] for i, p in enumerate(PHASES))

    def calls(self, shape, layout, x, w, b, dy) -> Any:
        raise NotImplementedError

    def to_nchw(self, array, layout):
        return np.asarray(array)

    def outputs(self):
        y, (dx, dw, db) = self.forward(), self.backward()
        backward = self.layout["backward"]
        dx, dw = self.to_nchw(dx, backward), self.to_nchw(dw, backward + " weights")
        return [self.to_nchw(y, self.layout["forward"]), dx, dw, np.asarray(db)]

    def path(self):
        return self.layout


class Torch(TwoLayouts):
    """Eager; under torch.compile a single convolution is the same call."""

    def __init__(self, threads):
        import torch

        torch.set_num_threads(threads)
        torch.set_grad_enabled(False)
        self.torch = torch

    def calls(self, shape, layout, x, w, b, dy):
        torch, pair = self.torch, lambda n: (n, n)
        memory = torch.contiguous_format if layout == "NCHW" else torch.channels_last
        x, w, dy = (torch.from_numpy(a).contiguous(memory_format=memory) for a in (x, w, dy))
        bias, options = torch.from_numpy(b), (pair(shape.stride), pair(shape.padding), (1, 1))
        backward = torch.ops.aten.convolution_backward.default
        return (
            functools.partial(torch.nn.functional.conv2d, x, w, bias, *options),
            functools.partial(backward, dy, x, w, [len(b)], *options, False, (0, 0), 1, (True, True, True)),
        )


class Jax(TwoLayouts):
    def __init__(self, threads):
        import jax

        jax.config.update("jax_platforms", "cpu")  # limit_threads sets its threads
        self.jax = jax

    def calls(self, shape, layout, x, w, b, dy):
        jax, channels_last = self.jax, layout == "NHWC"

        def conv(x, w, b):
            y = jax.lax.conv_general_dilated(
                x, w, (shape.stride,) * 2, ((shape.padding,) * 2,) * 2,
                dimension_numbers=(layout, "HWIO" if channels_last else "OIHW", layout),
            )  # fmt: skip
            return y + (b if channels_last else b[:, None, None])

        forward, backward = jax.jit(conv), jax.jit(lambda x, w, b, dy: jax.vjp(conv, x, w, b)[1](dy))
        x, dy = (jax.device_put(a.transpose(0, 2, 3, 1) if channels_last else a) for a in (x, dy))
        w, b = (jax.device_put(a) for a in (w.transpose(2, 3, 1, 0) if channels_last else w, b))
        wait = jax.block_until_ready
        return lambda: wait(forward(x, w, b)), lambda: wait(backward(x, w, b, dy))

    def to_nchw(self, array, layout):
        array = np.asarray(array)
        axes = {"NHWC": (0, 3, 1, 2), "NHWC weights": (3, 2, 0, 1)}
        return array.transpose(axes[layout]) if layout in axes else array


class OnnxRuntime:
    """Forward only."""

    def __init__(self, threads):
        import onnx.helper
        import onnxruntime

        self.onnx, self.runtime, self.threads = onnx, onnxruntime, threads

    def start(self, shape, batch):
        make, dtype = self.onnx.helper, self.onnx.TensorProto.FLOAT
        self.x, w, b, dy = random_arrays(shape, batch)
        options = {"kernel_shape": w.shape[2:], "pads": [shape.padding] * 4, "strides": [shape.stride] * 2}
        node = make.make_node("Conv", ["x", "w", "b"], ["y"], **options)
        ends = [make.make_tensor_value_info(n, dtype, a.shape) for n, a in (("x", self.x), ("y", dy))]
        weights = [self.onnx.numpy_helper.from_array(a, n) for a, n in ((w, "w"), (b, "b"))]
        graph = make.make_graph([node], "conv", ends[:1], ends[1:], weights)
        model = make.make_model(graph, opset_imports=[make.make_opsetid("", 17)], ir_version=8)
        settings = self.runtime.SessionOptions()
        settings.intra_op_num_threads, settings.inter_op_num_threads = self.threads, 1
        self.session = self.runtime.InferenceSession(
            model.SerializeToString(), settings, providers=["CPUExecutionProvider"]
        )

    def forward(self):
        return self.session.run(None, {"x": self.x})[0]

    def outputs(self):
        return [self.forward()]

    def path(self):
        return {}


class NumPy:
    def __init__(self, threads, dtype=np.float32):
        self.dtype = dtype

    def start(self, shape, batch):
        self.x, self.w, self.b, self.dy = random_arrays(shape, batch, self.dtype)
        self.options = shape.stride, shape.padding
        self.forward()

    def forward(self):
        y, self.columns = _competitors.conv_forward(self.x, self.w, self.b, *self.options)
        return y

    def backward(self):
        return _competitors.conv_backward(self.dy, self.columns, self.x, self.w, *self.options)

    def outputs(self):
        return [self.forward(), *self.backward()]

    def path(self):
        return {}


COMPETITORS = {"tinycnn": TinyCNN, "torch": Torch, "jax": Jax, "onnxruntime": OnnxRuntime, "numpy": NumPy}


def check(shape, batch, workers):
    """Compare all results with NumPy's in float64."""
    reference = NumPy(1, np.float64)
    reference.start(shape, batch)
    products = {"y": shape.channels * shape.kernel**2, "dx": shape.maps * shape.kernel**2}  # in a sum
    products |= dict.fromkeys(("dw", "db"), batch * shape.out**2)
    want = dict(zip(products, reference.outputs(), strict=True))
    for name, got in harness.call_all(workers, "outputs").items():
        for (what, count), output in zip(products.items(), got, strict=False):  # ONNX Runtime has no gradients
            outputs = {"float64": want[what], name: output}
            harness.assert_agree(f"{shape}: {what}", outputs, "float64", 1e-6 * math.sqrt(count))


def measure(args, threads):
    rows = []
    ceilings = harness.Worker(threads, _ceilings.CpuCeilings, threads)
    workers = harness.start_workers(threads, args.only, threads)
    columns = list(workers)
    print(f"\nbatches of {args.batch}, {threads} threads; GFLOP/s")
    widths = [34, 8, *(max(9, len(name)) for name in columns), 8, 8, 20]
    print_row = _report.table(["convolution", "", *columns, "x best", "of GEMM", "path"], widths)
    for shape in [shape for shape in SHAPES if not args.shapes or shape.name in args.shapes]:
        harness.call_all(workers, "start", shape, args.batch)
        check(shape, args.batch, workers)
        paths = harness.call_all(workers, "path")
        for phase, passes in zip(PHASES, (1, 2), strict=True):
            timed = {name: worker for name, worker in workers.items() if phase == "forward" or name != "onnxruntime"}
            jobs = {name: (worker, phase) for name, worker in timed.items()}
            times = harness.round_robin(_ceilings.with_ceilings(jobs, ceilings), args.turns, args.seconds)
            flops, seconds = passes * shape.flops(args.batch), {name: harness.median(times[name]) for name in timed}
            gflops = {name: flops / s / 1e9 for name, s in seconds.items()}
            row = {
                "threads": threads, "name": shape.name, "shape": shape._asdict(), "batch": args.batch, "phase": phase,
                "flops": flops, "bytes": passes * shape.bytes(args.batch), "seconds": seconds, "gflops": gflops,
                "choices": {name: phases[phase] for name, phases in paths.items() if phase in phases},
            } | _ceilings.ceiling_rates(times)  # fmt: skip
            rows.append(row)
            best = max((rate for name, rate in gflops.items() if name != "tinycnn"), default=None)
            cells = [f"{gflops[name]:.1f}" if name in gflops else None for name in columns]
            ratio = f"{gflops['tinycnn'] / best:.2f}" if best else None
            share = f"{gflops['tinycnn'] / row['gemm_gflops']:.0%}"
            print_row(str(shape), phase, *cells, ratio, share, row["choices"].get("tinycnn"))
    harness.stop_workers(workers | {"ceilings": ceilings})
    return rows


def main(argv=None):
    parser = harness.options("conv", __doc__, COMPETITORS, turns=9)
    parser.add_argument("--batch", type=int, default=32)
    names = [shape.name for shape in SHAPES]
    parser.add_argument("--shapes", nargs="+", choices=names, metavar="NAME", help=", ".join(names))
    harness.run("conv", harness.parse(parser, argv, COMPETITORS), measure)


if __name__ == "__main__":
    main()
