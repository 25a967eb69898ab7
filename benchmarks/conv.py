"""Convolutions of many shapes, forward and both gradients, tinycnn against other libraries.

    python -m benchmarks conv [--batch 32] [--shapes C3 64-channels] [--threads 1 2] [--only tinycnn torch]

The shapes: LeNet's; 3 x 3 windows on growing numbers of channels and on growing images; a stride of two; 1 x 1.
`backward` is the gradient of the input, the weights and the bias in one call.  Every library has its arrays where and
how it likes them: tinycnn in tiles, where there are images enough, as between the layers of a net; PyTorch and JAX in
the faster of NCHW and NHWC for each shape and direction (the JSON says which); JAX under jit.  ONNX Runtime has no
gradients; NumPy's are im2col and matrix products.  Results are compared with NumPy's in float64 before any time is
taken, with a tolerance of 1e-6 times the root of the number of products in a sum, relative to the largest entry.

The table has GFLOP/s, medians of the turns, and the path that tinycnn took: the function that did the work.
"""

import functools
import math
import timeit
from typing import Any, NamedTuple

import numpy as np

from benchmarks import _ceilings, _competitors
from benchmarks import _harness as harness

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
        """Of image, output and weights, float32."""
        image, output = self.channels * self.size**2, self.maps * self.out**2
        return 4 * (batch * (image + output) + self.maps * self.channels * self.kernel**2)

    def __str__(self):
        more = f", stride {self.stride}" if self.stride > 1 else ""
        return f"{self.kernel}x{self.kernel}, {self.channels} to {self.maps}, on {self.size}x{self.size}{more}"


SHAPES = [
    Shape("C1", 1, 6, 5, 28, 2),
    Shape("C3", 6, 16, 5, 14),
    Shape("C5", 16, 120, 5, 5),
    *(Shape(f"{c}-channels", c, c, 3, 32, 1) for c in (4, 8, 16, 32, 64)),
    *(Shape(f"{s}-pixels", 16, 16, 3, s, 1) for s in (8, 16, 64)),
    Shape("stride-2", 32, 64, 3, 32, 1, 2),
    Shape("1x1", 64, 64, 1, 32),
]


def numbers(shape, batch, dtype=np.float32):
    """x, w, b, dy of a shape: the same for everybody."""
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
        k, (x, w, b, dy) = self.ops, numbers(shape, batch)
        self.batch, lanes = batch, k.layout.lanes_for(batch, np.float32)
        x, y, dy, dx = (self.laid_out(a, lanes) for a in (x, np.zeros_like(dy), dy, np.zeros_like(x)))
        options = ((shape.stride,) * 2, (shape.padding,) * 2, (1, 1), 1)
        self.results = y, dx, *(k.empty(a.shape, a.dtype) for a in (w, b))
        self.forward = functools.partial(k.conv2d_forward, y, x, w, b, *options)
        self.backward = functools.partial(k.conv2d_backward, *self.results[1:], dy, x, w, *options)

    def laid_out(self, a, lanes):
        """As it lies between the layers of a net: in tiles, if there are images enough, and on a line of the cache."""
        N, C, H, W = a.shape
        if lanes == 1:
            placed = self.ops.empty(a.shape, a.dtype)
            placed[...] = a
        else:
            placed = self.ops.empty((-(-N // lanes), C, H, W, lanes), a.dtype)
            self.ops.layout.to_blocked(placed, a)
        return placed

    def answers(self):
        self.forward()
        self.backward()
        y, dx, dw, db = self.results
        return [self.ops.layout.as_nchw(y)[: self.batch], self.ops.layout.as_nchw(dx)[: self.batch], dw, db]

    def choices(self):
        """The functions that did the work: watched, not guessed."""
        return {phase: self.watch(getattr(self, phase)) for phase in PHASES}

    def watch(self, call):
        """Names of the functions that the dispatching function, called by `call`, calls in turn."""
        home, seen = call.func.__globals__, []
        paths = {n: home[n] for n in call.func.__code__.co_names if callable(home.get(n)) and n != "is_full_window"}

        def watched(name, *arguments):
            seen.append(name)
            paths[name](*arguments)

        home.update({name: functools.partial(watched, name) for name in paths})
        try:
            call()
        finally:
            home.update(paths)
        return ", ".join(name.removeprefix("conv2d_").removesuffix("_backward") for name in seen)


class TwoLayouts:
    """What Torch and Jax share: the faster of two layouts, for each direction."""

    layouts = ("NCHW", "NHWC")

    def start(self, shape, batch):
        both = {layout: self.calls(shape, layout, *numbers(shape, batch)) for layout in self.layouts}
        seconds: dict[str, dict[str, float]] = {phase: {} for phase in PHASES}
        for layout, calls in both.items():
            for phase, call in zip(PHASES, calls, strict=False):
                call()
                seconds[phase][layout] = min(timeit.repeat(call, number=1, repeat=5))
        self.layout = {phase: min(found, key=lambda name: found[name]) for phase, found in seconds.items()}
        self.forward, self.backward = (both[self.layout[p]][i] for i, p in enumerate(PHASES))

    def calls(self, shape, layout, x, w, b, dy) -> Any:
        raise NotImplementedError

    def plain(self, array, layout):
        return np.asarray(array)

    def answers(self):
        y, (dx, dw, db) = self.forward(), self.backward()
        there, back = self.layout["forward"], self.layout["backward"]
        return [self.plain(y, there), self.plain(dx, back), self.plain(dw, back + " weights"), np.asarray(db)]

    def choices(self):
        return self.layout


class Torch(TwoLayouts):
    """Eager; a convolution on its own is the same call under torch.compile."""

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
        back = torch.ops.aten.convolution_backward.default
        return (
            functools.partial(torch.nn.functional.conv2d, x, w, bias, *options),
            functools.partial(back, dy, x, w, [len(b)], *options, False, (0, 0), 1, (True, True, True)),
        )


class Jax(TwoLayouts):
    def __init__(self, threads):
        import jax

        jax.config.update("jax_platforms", "cpu")  # its threads: see limit_threads
        self.jax = jax

    def calls(self, shape, layout, x, w, b, dy):
        jax, last = self.jax, layout == "NHWC"

        def conv(x, w, b):
            y = jax.lax.conv_general_dilated(
                x, w, (shape.stride,) * 2, ((shape.padding,) * 2,) * 2,
                dimension_numbers=(layout, "HWIO" if last else "OIHW", layout),
            )  # fmt: skip
            return y + (b if last else b[:, None, None])

        forward, backward = jax.jit(conv), jax.jit(lambda x, w, b, dy: jax.vjp(conv, x, w, b)[1](dy))
        x, dy = (jax.device_put(a.transpose(0, 2, 3, 1) if last else a) for a in (x, dy))
        w, b = (jax.device_put(a) for a in (w.transpose(2, 3, 1, 0) if last else w, b))
        wait = jax.block_until_ready
        return lambda: wait(forward(x, w, b)), lambda: wait(backward(x, w, b, dy))

    def plain(self, array, layout):
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
        make, kind = self.onnx.helper, self.onnx.TensorProto.FLOAT
        self.x, w, b, dy = numbers(shape, batch)
        options = {"kernel_shape": w.shape[2:], "pads": [shape.padding] * 4, "strides": [shape.stride] * 2}
        node = make.make_node("Conv", ["x", "w", "b"], ["y"], **options)
        ends = [make.make_tensor_value_info(n, kind, a.shape) for n, a in (("x", self.x), ("y", dy))]
        weights = [self.onnx.numpy_helper.from_array(a, n) for a, n in ((w, "w"), (b, "b"))]
        graph = make.make_graph([node], "conv", ends[:1], ends[1:], weights)
        model = make.make_model(graph, opset_imports=[make.make_opsetid("", 17)], ir_version=8)
        choices = self.runtime.SessionOptions()
        choices.intra_op_num_threads, choices.inter_op_num_threads = self.threads, 1
        self.session = self.runtime.InferenceSession(
            model.SerializeToString(), choices, providers=["CPUExecutionProvider"]
        )

    def forward(self):
        return self.session.run(None, {"x": self.x})[0]

    def answers(self):
        return [self.forward()]

    def choices(self):
        return {}


class NumPy:
    def __init__(self, threads, dtype=np.float32):
        self.dtype = dtype

    def start(self, shape, batch):
        self.x, self.w, self.b, self.dy = numbers(shape, batch, self.dtype)
        self.options = shape.stride, shape.padding
        self.forward()

    def forward(self):
        y, self.columns = _competitors.conv_forward(self.x, self.w, self.b, *self.options)
        return y

    def backward(self):
        return _competitors.conv_backward(self.dy, self.columns, self.x, self.w, *self.options)

    def answers(self):
        return [self.forward(), *self.backward()]

    def choices(self):
        return {}


COMPETITORS = {"tinycnn": TinyCNN, "torch": Torch, "jax": Jax, "onnxruntime": OnnxRuntime, "numpy": NumPy}


def check(shape, batch, workers):
    """Everybody's results against NumPy's in float64."""
    reference = NumPy(1, np.float64)
    reference.start(shape, batch)
    sums = {"y": shape.channels * shape.kernel**2, "dx": shape.maps * shape.kernel**2}  # products in each
    sums |= dict.fromkeys(("dw", "db"), batch * shape.out**2)
    want = dict(zip(sums, reference.answers(), strict=True))
    for name, got in harness.call_all(workers, "answers").items():
        for (what, products), answer in zip(sums.items(), got, strict=False):
            answers = {"float64": want[what], name: answer}
            harness.assert_agree(f"{shape}: {what}", answers, "float64", 1e-6 * math.sqrt(products))


def measure(args, threads):
    rows = []
    ceilings = harness.Worker(threads, _ceilings.CpuCeilings, threads)
    workers = harness.start_workers(threads, args.only, threads)
    columns = list(workers)
    print(f"\nbatches of {args.batch}, {threads} threads; GFLOP/s")
    widths = [34, 8, *(max(9, len(name)) for name in columns), 8, 8, 20]
    line = harness.table(["convolution", "", *columns, "x best", "of GEMM", "path"], widths)
    for shape in [shape for shape in SHAPES if not args.shapes or shape.name in args.shapes]:
        harness.call_all(workers, "start", shape, args.batch)
        check(shape, args.batch, workers)
        choices = harness.call_all(workers, "choices")
        for phase, work in zip(PHASES, (1, 2), strict=True):
            able = {name: worker for name, worker in workers.items() if phase == "forward" or name != "onnxruntime"}
            jobs = {name: (worker, phase) for name, worker in able.items()}
            times = harness.round_robin(_ceilings.with_ceilings(jobs, ceilings), args.turns, args.seconds)
            flops, seconds = work * shape.flops(args.batch), {name: harness.median(times[name]) for name in able}
            gflops = {name: flops / s / 1e9 for name, s in seconds.items()}
            row = {
                "threads": threads, "name": shape.name, "shape": shape._asdict(), "batch": args.batch, "phase": phase,
                "flops": flops, "bytes": work * shape.bytes(args.batch), "seconds": seconds, "gflops": gflops,
                "choices": {name: found[phase] for name, found in choices.items() if phase in found},
            } | _ceilings.ceiling_rates(times)  # fmt: skip
            rows.append(row)
            best = max((rate for name, rate in gflops.items() if name != "tinycnn"), default=None)
            shown = [f"{gflops[name]:.1f}" if name in gflops else None for name in columns]
            ratio = f"{gflops['tinycnn'] / best:.2f}" if best else None
            share = f"{gflops['tinycnn'] / row['gemm_gflops']:.0%}"
            line(str(shape), phase, *shown, ratio, share, row["choices"].get("tinycnn"))
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
