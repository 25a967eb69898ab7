"""Train the networks of the page that `tinycnn demo` writes without a run, and put their run folders into the package.

    python tools/make_demo_runs.py

Takes some minutes and needs MNIST.  The weights are rounded to half precision before they are tested, so that the files
are small and the reports say what they can do.  The examples are synthetic: MNIST is not in the package.
"""

import json
import shutil
import tempfile
from pathlib import Path

import numpy as np

from tinycnn import calibration, checkpoint, data, demo, recipes, runs
from tinycnn.recipes import build, training

NETS = (  # folder, label of the button, recipe, epochs of the snapshots; the last epoch is the model
    ("1-today", "LeNet-5 today", "demo", (0, 0.1, 1, 3)),
    ("2-1998", "LeNet-5 of 1998", "lecun1998-distortions", (0, 0.1, 1, 3, 10)),
)
FILES = ("history.csv", "report.json", "model.safetensors")


class EarlySnapshot:
    """A callback of `fit`: keeps the weights after a tenth of the first epoch."""

    def __init__(self, run: training.Run) -> None:
        self.run, self.batch = run, round(len(run.splits.train) / run.batch / 10)

    def on_batch_end(self, record):
        if (record["epoch"], record["batch"]) == (1, self.batch):
            runs.write_snapshot(self.run.folder.path, 0.1, self.run.model)


def main() -> None:
    for name, label, recipe_name, epochs in NETS:
        (recipe,) = recipes.find(recipe_name)
        with tempfile.TemporaryDirectory() as work:
            run = training.Run(recipe, 0, build.load(recipe), out=work)
            run.fit(callbacks=[EarlySnapshot(run)])
            state = run.model.state_dict()
            run.model.load_state_dict(state | {n: half(a) for n, a in state.items() if n not in normalization(state)})
            result = run.finish()
            make(demo.SHIPPED / name, run.folder.path, label, epochs)
        print(f"{name}: {result['accuracy']:.2%}")


def normalization(state):
    """Names of the numbers that keep their precision."""
    return [name for name in state if name.startswith("normalization.")]


def half(array):
    return array.astype(np.float16).astype(array.dtype)


def make(target: Path, source: Path, label: str, epochs: tuple[float, ...]) -> None:
    """The folder that ships, from a run's folder."""
    shutil.rmtree(target, ignore_errors=True)
    (target / runs.SNAPSHOTS).mkdir(parents=True)
    for name in (*FILES, *(f"{runs.SNAPSHOTS}/epoch-{epoch:g}.safetensors" for epoch in epochs)):
        shutil.copy(source / name, target / name)
    arrays, metadata = checkpoint.load(target / "model.safetensors")
    small = {n: a if n in normalization(arrays) else a.astype(np.float16) for n, a in arrays.items()}
    checkpoint.save(target / "model.safetensors", small, metadata)
    config = json.loads((source / "config.json").read_text())
    environment = {key: config["environment"][key] for key in ("tinycnn", "numpy", "numba", "processor")}
    config |= {"label": label, "environment": environment}
    (target / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    images, labels, predicted = synthetic_examples(target)
    checkpoint.save(target / "examples.safetensors", {"images": images, "labels": labels, "predicted": predicted})


def synthetic_examples(folder: Path):
    """(images, labels, predicted classes) of a right digit of each class and some mistakes."""
    net = demo.from_run(folder)
    recipe, pixels = recipes.from_config(runs.read_config(folder), folder), {"mean": net.mean, "std": net.std}
    images, labels = data.synthetic_digits(3000, rng=21)
    logits = build.build_loss(recipe).logits(build.outputs(recipe, net.model, images, pixels))
    predicted = logits.argmax(axis=1)
    right, wrong = np.flatnonzero(predicted == labels), np.flatnonzero(predicted != labels)
    scores = calibration.rejection_score(logits)
    right = right[scores[right] > (net.reject_below or -np.inf)]
    index = np.concatenate([*(right[labels[right] == k][:1] for k in range(10)), wrong[:8]])
    return images[index][:, None], labels[index].astype(np.uint8), predicted[index].astype(np.uint8)


if __name__ == "__main__":
    main()
