"""One rank of `python -m benchmarks scale`: mpiexec starts it.  Rank 0 prints a line of JSON with the times."""

import json
import statistics
import sys
import time

import numpy as np
from mpi4py import MPI

from tinycnn import Adam, CrossEntropyLoss, DeviceDataset, data, devices, fit, models
from tinycnn.distributed import Ranks

COMM = MPI.COMM_WORLD
PING_BYTES = (8, 4096, 65_536, 262_144, 1_048_576, 4_194_304)
WARM_STEPS, CHECKED_STEPS = 3, 5
IMAGES = 65_536  # of an epoch, in which all steps of a measurement are


class Timed(Ranks):
    """Ranks that measure their time in the all-reduce of gradients."""

    seconds = 0.0

    def sum_gradient(self, grad, weight):
        start = time.perf_counter()
        total = super().sum_gradient(grad, weight)
        self.seconds += time.perf_counter() - start
        return total


def network(name):
    if name == "lenet5":
        return models.lenet5(rng=0), data.synthetic_digits(4096, rng=0)
    images, labels = data.synthetic_digits(1024, rng=0)
    colour = np.repeat(np.pad(images, ((0, 0), (2, 2), (2, 2)))[:, None], 3, axis=1)
    return models.resnet20(rng=0), (colour, labels)


class Training:
    """Steps of a network on batches of one size."""

    def __init__(self, name, batch, threads):
        self.model, (images, labels) = network(name)
        repeats = -(-IMAGES // len(images))
        self.data = DeviceDataset(
            np.concatenate([images] * repeats), np.concatenate([labels] * repeats), mean=0.5, std=0.5
        )
        self.loss, self.optimizer, self.batch = CrossEntropyLoss(), Adam(self.model, 1e-3), batch
        self.group = Timed(COMM, threads) if COMM.size > 1 else None

    def run(self, steps):
        fit(
            self.model, self.loss, self.optimizer, self.data, epochs=1, batch_size=self.batch, steps_per_epoch=steps,
            rng=0, progress=False, comm=self.group,
        )  # fmt: skip

    def measure(self, seconds):
        """Seconds of a step, the slope between few and many steps, so that what `fit` does once does not count; and
        those of a step in the all-reduce."""
        self.run(WARM_STEPS)
        few, many = 2, 4
        while True:
            times = []
            for steps in (few, many):
                if self.group is not None:
                    self.group.seconds = 0.0
                COMM.Barrier()
                start = time.perf_counter()
                self.run(steps)
                times.append((time.perf_counter() - start, 0.0 if self.group is None else self.group.seconds))
            if COMM.bcast(times[1][0]) >= seconds or 2 * many * self.batch > IMAGES:
                break
            many *= 2
        return {
            "seconds": (times[1][0] - times[0][0]) / (many - few),
            "communication": times[1][1] / many,
        }


def ping(size):
    """Median seconds of an all-reduce of so many bytes."""
    buffer, times = np.zeros(max(size // 4, 1), np.float32), []
    for _ in range(30):
        COMM.Barrier()
        start = time.perf_counter()
        COMM.Allreduce(MPI.IN_PLACE, buffer)
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def main():
    settings = json.loads(sys.argv[1])
    devices.set_num_threads(settings["threads"])
    net, threads = settings["net"], settings["threads"]
    checked = Training(net, settings["checked"], threads)
    checked.run(CHECKED_STEPS)
    steps = {
        b: Training(settings["net"], b, settings["threads"]).measure(settings["seconds"]) for b in settings["batches"]
    }
    pings = {size: ping(size) for size in PING_BYTES} if COMM.size > 1 else {}
    if COMM.rank == 0:
        np.save(settings["weights"], checked.model.theta)
        print(json.dumps({"steps": steps, "pings": pings, "bytes": checked.model.theta.nbytes}))


if __name__ == "__main__":
    main()
