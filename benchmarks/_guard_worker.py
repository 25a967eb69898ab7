"""One round of `python -m benchmarks guard`: prints, as JSON, for each case the seconds of a call and its results.

Runs with the tinycnn of another revision: only functions that are public, and as old as possible.
"""

import itertools
import json
import sys
import timeit

import numpy as np

import tinycnn

STEPS = 5


def training(model, batch, shape):
    """(a training step, the losses of the first steps)."""
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (STEPS * batch, *shape), dtype=np.uint8), rng.integers(0, 10, STEPS * batch)
    data = tinycnn.DeviceDataset(images, labels, mean=0.5, std=0.25)
    criterion, optimizer = tinycnn.CrossEntropyLoss(), tinycnn.SGD(model, 0.01, momentum=0.9)
    indices = itertools.cycle(np.arange(len(images)).reshape(STEPS, batch))

    def step():
        return tinycnn.train_step(model, criterion, optimizer, data, next(indices))

    return step, [step() for _ in range(STEPS)]


def inference(model, batch, shape):
    """(a forward pass, its outputs)."""
    x = np.random.default_rng(0).standard_normal((batch, *shape), dtype=np.float32)
    model.eval()
    return lambda: model(x), np.ravel(model(x)).tolist()


CASES = {
    "LeNet-5, a step of 64": lambda: training(tinycnn.models.lenet5(rng=0), 64, (28, 28)),
    "LeNet-5, one image": lambda: inference(tinycnn.models.lenet5(rng=0), 1, (1, 28, 28)),
    "LeNet-5, 64 images": lambda: inference(tinycnn.models.lenet5(rng=0), 64, (1, 28, 28)),
    "ResNet-20, a step of 16": lambda: training(tinycnn.models.resnet20(rng=0), 16, (3, 32, 32)),
    "ResNet-20, 16 images": lambda: inference(tinycnn.models.resnet20(rng=0), 16, (3, 32, 32)),
}

if __name__ == "__main__":
    found = {}
    for name in json.loads(sys.argv[1]):
        call, results = CASES[name]()
        count = int(float(sys.argv[2]) / timeit.timeit(call, number=1)) + 1
        found[name] = {"seconds": float(np.median(timeit.repeat(call, number=1, repeat=count))), "results": results}
    print(json.dumps(found))
