"""Training steps of networks larger than LeNet-5, tinycnn and PyTorch.

    python -m benchmarks nets [--nets resnet20] [--batches 16 64 128] [--threads 1 2]

A step gathers a batch of uint8 images by index, normalises it, and runs forward, cross entropy, backward and SGD with
momentum. Both have the same initial weights and batches, and their losses over 10 steps are compared before times are
measured. PyTorch runs eagerly, in the faster of its two memory formats.
"""

import itertools
import timeit

import numpy as np

from benchmarks import _harness as harness, _report

BATCHES = [16, 64, 128]
IMAGES, CLASSES, CHECK_STEPS = 1024, 10, 10
LR, MOMENTUM = 0.01, 0.9
TOLERANCE = 2e-3  # of the largest loss, over the first steps: ReLUs near zero select different gradients
NETS = ["resnet20"]


def make(net):
    """The network `net` of tinycnn, with its initial weights."""
    from tinycnn import models

    return getattr(models, net)(rng=0)


def batches(shape, batch):
    """(images, labels, indices of the batches)."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (IMAGES, *shape), dtype=np.uint8)
    order = np.array([rng.permutation(IMAGES)[:batch] for _ in range(CHECK_STEPS)])
    return images, rng.integers(0, CLASSES, IMAGES), order


class TinyCNN:
    def __init__(self, net, threads):
        import tinycnn

        tinycnn.set_num_threads(threads)
        self.net = net

    def start(self, batch):
        from tinycnn import SGD, CrossEntropyLoss, DeviceDataset, dataset, train

        self.batch, model = batch, make(self.net)
        images, labels, order = batches(model.input_shape, batch)
        data = DeviceDataset(images, labels, mean=0.5, std=0.25)
        criterion, optimizer = CrossEntropyLoss(), SGD(model, LR, MOMENTUM)
        train.warm_up(model, criterion, optimizer, data, batch)
        loader = dataset.DataLoader(data, longest=order.size)
        self.run, self.order = train.StepRunner(model, criterion, loader, optimizer), order

    def losses(self):
        self.run.start_epoch(self.order.ravel())
        sums = [0.0]
        for _ in self.order:
            self.run.replay(self.batch)
            sums.append(self.run.totals[0] / self.batch)
        return np.diff(sums)

    def next_step(self):
        self.run.loader.seek(0)
        self.run.replay(self.batch)


class Torch:
    formats = ("contiguous_format", "channels_last")

    def __init__(self, net, threads):
        import torch

        from tinycnn.torch import to_module

        self.as_module = to_module
        torch.set_num_threads(threads)
        self.torch, self.net = torch, net

    def start(self, batch):
        seconds = {}
        for name in self.formats:
            self._load(batch, name)
            seconds[name] = min(timeit.repeat(self.next_step, number=1, repeat=3))
        self._load(batch, min(seconds, key=lambda name: seconds[name]))

    def _load(self, batch, memory_format):
        torch, model = self.torch, make(self.net)
        self.format = getattr(torch, memory_format)
        images, labels, self.order = batches(model.input_shape, batch)
        self.images, self.labels = torch.from_numpy(images), torch.from_numpy(labels)
        self.model = self.as_module(model).to(memory_format=self.format)
        self.optimizer = torch.optim.SGD(self.model.parameters(), LR, MOMENTUM, fused=True)
        self.index_cycle = itertools.cycle(self.order)

    def next_step(self):
        index = next(self.index_cycle)
        x = self.images[index].float().mul(1 / (255 * 0.25)).sub(0.5 / 0.25).to(memory_format=self.format)
        loss = self.torch.nn.functional.cross_entropy(self.model(x), self.labels[index])
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        return loss.item()

    def losses(self):
        return [self.next_step() for _ in self.order]


COMPETITORS = {"tinycnn": TinyCNN, "torch": Torch}


def measure(args, threads):
    rows = []
    for net in args.nets:
        model = make(net)
        adds = sum(layer.multiply_adds(shape) for layer, shape in zip(model.layers, model.shapes, strict=False))
        print(f"\n{net}, {threads} threads; {len(model.theta):,} parameters, {adds:,} multiply-adds forward")
        workers = harness.start_workers(threads, args.only, net, threads)
        head = ["batch", "loss", *(f"{name}/s" for name in workers), *(f"x {name}" for name in list(workers)[1:])]
        print_row = _report.table(head, [5, 9, *(max(9, len(h)) for h in head[2:])])
        columns = list(workers)
        for batch in args.batches:
            harness.call_all(workers, "start", batch)
            losses = harness.call_all(workers, "losses")
            harness.assert_agree(f"{net}, batch {batch}: the losses", losses, "tinycnn", TOLERANCE)
            jobs = {name: (worker, "next_step") for name, worker in workers.items()}
            times = harness.round_robin(jobs, args.turns, args.seconds)
            rates = {name: batch / harness.median(times[name]) for name in workers}
            rows.append({"threads": threads, "net": net, "batch": batch, "images_per_second": rates})
            ratios = [f"{rates['tinycnn'] / rates[n]:.2f}" if n in rates else None for n in columns[1:]]
            cells = [f"{rates[n]:,.0f}" if n in rates else None for n in columns]
            print_row(batch, f"{losses['tinycnn'][-1]:.6f}", *cells, *ratios)
        harness.stop_workers(workers)
    return rows


def main(argv=None):
    parser = harness.options("nets", __doc__, COMPETITORS, turns=7, seconds=1.0)
    parser.add_argument("--batches", type=int, nargs="+", default=BATCHES)
    parser.add_argument("--nets", nargs="+", choices=NETS, default=NETS)
    harness.run("nets", harness.parse(parser, argv, COMPETITORS), measure)


if __name__ == "__main__":
    main()
