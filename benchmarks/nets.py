"""Networks larger than LeNet-5: training and inference, tinycnn, PyTorch and ONNX Runtime.

    python -m benchmarks nets [--nets vgg resnet20] [--uses training inference] [--threads 1 2] [--only torch]

A training step gathers a batch of uint8 images by index, normalises it, and runs forward, loss, backward and SGD with
momentum. The loss is the cross entropy, of the autoencoder the mean square error. Inference maps a NumPy array to a
NumPy array, with batch norm in evaluation mode. All have the same weights and batches: the losses of 8 steps, and the
outputs, are compared before times are measured. PyTorch runs eagerly, in the faster of its two memory formats; ONNX
Runtime runs the graph that `tinycnn.onnx.export` writes.

With --cpu-time and one thread, time that other programs take is not counted.

The second table shows the times of the parts of tinycnn's training step, as `train-step` does.
"""

import numpy as np

from benchmarks import _ceilings, _competitors, _harness as harness, _report, train_step
from tinycnn import (
    SGD,
    AdaptiveAvgPool2d,
    BatchNorm2d,
    Conv2d,
    ConvTranspose2d,
    CrossEntropyLoss,
    DeviceDataset,
    Flatten,
    Linear,
    MaxPool2d,
    MSELoss,
    ReLU,
    Sequential,
    init,
    models,
)

BATCHES = {"training": [16, 64, 256], "inference": [1, 8, 64]}
IMAGES, CLASSES, CHECK_STEPS = 2048, 10, 8  # as many images as a check needs
MEAN, STD = 0.5, 0.25
LR, MOMENTUM = 0.01, 0.9
# Of the largest loss: ReLUs near zero and maxima nearly equal select different gradients.  Of the largest output.
TOLERANCE = {"training": 2e-3, "inference": 1e-4}


def vgg():
    """Two 3 x 3 convolutions and a pooling for each of 64, 128 and 256 maps, after Simonyan and Zisserman 2015."""
    layers, channels = [], 3
    for maps in (64, 128, 256):
        layers += [Conv2d(channels, maps, 3, padding=1), ReLU(), Conv2d(maps, maps, 3, padding=1), ReLU(), MaxPool2d(2)]
        channels = maps
    return Sequential(
        *layers, Flatten(), Linear(4096, 256), ReLU(), Linear(256, CLASSES), input_shape=(3, 32, 32), rng=0
    )


def conv_bn():
    """Convolution, batch norm and ReLU for each of 32, 64 and 128 maps, a pooling between them."""
    layers, channels = [], 3
    for maps in (32, 64, 128):
        layers += [Conv2d(channels, maps, 3, padding=1, bias=False), BatchNorm2d(maps), ReLU(), MaxPool2d(2)]
        channels = maps
    return Sequential(
        *layers[:-1], AdaptiveAvgPool2d(1), Flatten(), Linear(128, CLASSES), input_shape=(3, 32, 32), rng=0
    )


def autoencoder():
    """Two convolutions with stride 2, and the transposed ones."""
    return Sequential(
        Conv2d(1, 16, 3, stride=2, padding=1), ReLU(),            # 16 x 14 x 14
        Conv2d(16, 32, 3, stride=2, padding=1), ReLU(),           # 32 x 7 x 7
        ConvTranspose2d(32, 16, 4, stride=2, padding=1), ReLU(),  # 16 x 14 x 14
        ConvTranspose2d(16, 1, 4, stride=2, padding=1),           # 1 x 28 x 28
        input_shape=(1, 28, 28), rng=0,
    )  # fmt: skip


NETS = {"vgg": vgg, "conv-bn": conv_bn, "resnet20": lambda: models.resnet20(rng=0), "autoencoder": autoencoder}


def initial_weights(net):
    """Initial weights of all competitors, a state_dict. The statistics of batch norm, for inference, are random."""
    model, rng = NETS[net](), np.random.default_rng(0)
    init.kaiming_normal(model, only=Conv2d, rng=rng)
    weights = model.state_dict()
    for name, value in weights.items():
        if name.endswith("running_mean"):
            weights[name] = rng.normal(0, 0.1, value.shape).astype(value.dtype)
        elif name.endswith("running_var"):
            weights[name] = rng.uniform(0.5, 1.5, value.shape).astype(value.dtype)
    return weights


class Competitor(_competitors.Competitor):
    """What all have in common."""

    net: str
    check_steps = CHECK_STEPS

    def start(self, batch, weights, use="next_step"):
        self.model = NETS[self.net]()
        self.shape, self.training = self.model.input_shape, use == "next_step"
        super().start(batch, weights, use)

    def dataset(self):
        rng = np.random.default_rng(0)
        labels = None if self.net == "autoencoder" else rng.integers(0, CLASSES, IMAGES)
        return rng.integers(0, 256, (IMAGES, *self.shape), dtype=np.uint8), labels

    def load_model(self, weights):
        """The network of tinycnn."""
        self.model.load_state_dict(weights)
        return self.model.train(self.training)


class TinyCNN(Competitor, train_step.TinyCNN):
    profiled = 9

    def load(self, weights, images, labels):
        model = self.load_model(weights)
        self.batches = DeviceDataset(images, labels, mean=MEAN, std=STD)
        self.criterion = MSELoss() if labels is None else CrossEntropyLoss()
        self.optimizer, self.run = SGD(model, LR, MOMENTUM), None


class Torch(Competitor, _competitors.Torch):
    tries = 3

    def load(self, weights, images, labels):
        from tinycnn.torch import to_module

        torch = self.torch
        self.module = self.forward = to_module(self.load_model(weights)).to(memory_format=getattr(torch, self.format))
        self.images, self.labels = torch.from_numpy(images), None if labels is None else torch.from_numpy(labels)
        self.optimizer = torch.optim.SGD(self.module.parameters(), LR, MOMENTUM, fused=True)
        self.loss = self.loss_of

    def loss_of(self, index):
        functional = self.torch.nn.functional
        x = self.images[index].float().mul(1 / (255 * STD)).sub(MEAN / STD)
        y = self.module(x.to(memory_format=getattr(self.torch, self.format)))
        return functional.mse_loss(y, x) if self.labels is None else functional.cross_entropy(y, self.labels[index])


class OnnxRuntime(Competitor, _competitors.OnnxRuntime):
    def load(self, weights, images, labels):
        from tinycnn.onnx import export

        self.open(export(self.load_model(weights)))


COMPETITORS = {"tinycnn": TinyCNN, "torch": Torch, "onnxruntime": OnnxRuntime}


def measure(args, threads):
    """Rows of the first table; "parts", of batches of 64, holds the second."""
    rows = []
    ceilings = harness.Worker(threads, _ceilings.CpuCeilings, threads)
    for net in args.nets:
        model, weights = NETS[net](), initial_weights(net)
        adds = sum(layer.multiply_adds(shape) for layer, shape in zip(model.layers, model.shapes, strict=False))
        print(f"\n{net}, {threads} threads; {len(model.theta):,} parameters, {adds:,} multiply-adds forward; images/s")
        for use in args.uses:
            only = {n: c for n, c in args.only.items() if use == "inference" or c is not OnnxRuntime}
            workers = harness.start_workers(threads, only, net, threads)
            columns = list(workers)
            head = [*columns, *(f"x {name}" for name in columns[1:])]
            print_row = _report.table([use, "batch", *head, "GEMM"], [9, 5, *(max(9, len(h)) for h in head), 6])
            call, check = ("next_step", "losses") if use == "training" else ("infer", "infer")
            for batch in args.batches or BATCHES[use]:
                harness.call_all(workers, "start", batch, weights, call)
                answers = harness.call_all(workers, check)
                harness.assert_agree(f"{net}, batch {batch}: {use}", answers, "tinycnn", TOLERANCE[use])
                jobs = {name: (worker, call) for name, worker in workers.items()}
                times = harness.round_robin(_ceilings.with_ceilings(jobs, ceilings), args.turns, args.seconds)
                rates = {name: batch / harness.median(times[name]) for name in workers}
                row = {"threads": threads, "net": net, "use": use, "batch": batch, "images_per_second": rates}
                row |= _ceilings.ceiling_rates(times)
                if use == "training" and batch == 64:
                    row["step"], row["parts"] = workers["tinycnn"].call("profile", batch, weights, harness.Worker.clock)
                rows.append(row)
                ratios = [f"{rates['tinycnn'] / rates[n]:.2f}" if n in rates else None for n in columns[1:]]
                cells = [f"{rates[n]:,.0f}" if n in rates else None for n in columns]
                print_row("", batch, *cells, *ratios, f"{row['gemm_gflops']:.0f}")
            harness.stop_workers(workers)
        for row in rows:
            if row["net"] == net and "parts" in row:
                train_step.print_parts([row])
    harness.stop_workers({"ceilings": ceilings})
    return rows


def main(argv=None):
    parser = harness.options("nets", __doc__, COMPETITORS, turns=7, seconds=0.7)
    parser.add_argument("--batches", type=int, nargs="+", help=f"default: {BATCHES}")
    parser.add_argument("--uses", nargs="+", choices=list(BATCHES), default=list(BATCHES))
    parser.add_argument("--nets", nargs="+", choices=list(NETS), default=list(NETS))
    parser.add_argument("--cpu-time", action="store_true", help="measure CPU time: one thread, on a busy machine")
    args = harness.parse(parser, argv, COMPETITORS)
    if args.cpu_time:
        if args.threads != [1]:
            parser.error("--cpu-time needs --threads 1")  # threads spin while they wait
        harness.Worker.clock = "process_time"
    harness.run("nets", args, measure)


if __name__ == "__main__":
    main()
