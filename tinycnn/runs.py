"""A run's folder: settings, history, weights, report and pictures.

    runs/2026-01-31_12-00-00-lenet5/
        config.json       settings, versions, hardware, threads, data hash, git revision
        history.csv       one line for each epoch
        model.npz         the weights after the last complete epoch
        report.json       test accuracy; precision, recall and F1 of each class
        curves.png confusion.png mistakes.png filters.png feature_maps.png

Files are written atomically: each is complete or absent.
"""

import csv
import io
import json
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tinycnn import checkpoint, metrics, plot
from tinycnn._files import atomic_write
from tinycnn._interrupts import defer_interrupt
from tinycnn._typing import Array
from tinycnn.dataset import DeviceDataset
from tinycnn.model import Sequential


class RunFolder:
    """A new folder under `root`.  OSError names `root` if it cannot be written."""

    def __init__(self, root: str | os.PathLike[str], name: str, config: Mapping[str, Any]) -> None:
        root = Path(root)
        stem = time.strftime("%Y-%m-%d_%H-%M-%S-") + name
        try:
            with defer_interrupt():
                root.mkdir(parents=True, exist_ok=True)
                for number in range(1, 1000):  # other runs may have started in the same second
                    self.path = root / (stem if number == 1 else f"{stem}-{number}")
                    try:
                        self.path.mkdir()
                        break
                    except FileExistsError:
                        if number == 999 or not root.is_dir():
                            raise
                self._write("config.json", json.dumps(config, indent=2) + "\n")
        except OSError as error:
            raise OSError(f"cannot write the output folder {root}: {error.strerror or error}") from error
        self.history: list[dict[str, Any]] = []

    def _write(self, name: str, text: str) -> None:
        with atomic_write(self.path / name) as file:
            file.write(text.encode())

    def add_epoch(self, record: dict[str, Any], model: Sequential) -> None:
        """Append an epoch's record to history.csv and save the weights."""
        with defer_interrupt():  # both files must be of the same epoch
            self.history.append(record)
            table = io.StringIO()
            writer = csv.DictWriter(table, list(self.history[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(self.history)
            self._write("history.csv", table.getvalue())
            checkpoint.save(self.path / "model.npz", model.state_dict(), {"epoch": record["epoch"]})

    def finish(
        self,
        model: Sequential,
        dataset: DeviceDataset,
        logits: Array,
        class_names: Sequence[str],
        extra: Mapping[str, Any],
    ) -> dict[str, Any]:
        """Write report.json and the pictures from the test set and the model's logits (N, K) on it.

        Returns the report: that of `metrics.report`, and `extra`.
        """
        images, true = dataset.ops.to_host(dataset.images), dataset.ops.to_host(dataset.labels)
        predicted = logits.argmax(axis=1)
        matrix = metrics.confusion_matrix(true, predicted, logits.shape[1])
        report = {**extra, **metrics.report(matrix, class_names)}
        self._write("report.json", json.dumps(report, indent=2) + "\n")
        confidence = metrics.confidence(logits)
        pictures: dict[str, Any] = {
            "confusion.png": plot.confusion(matrix, class_names),
            "mistakes.png": plot.mistakes(images, true, predicted, confidence, class_names),
        }
        if self.history:
            pictures["curves.png"] = plot.learning_curves(self.history)
        convolutions = [name for name, view in model.named_parameters() if view.ndim == 4]
        if convolutions:
            weight = model.state_dict()[convolutions[0]]
            pictures["filters.png"] = plot.filters(weight, title="Filters of the first convolution")
            maps, names = feature_maps(model, dataset)
            pictures["feature_maps.png"] = plot.feature_maps(images[0], maps, names)
        for name, picture in pictures.items():
            plot.save(picture, self.path / name)
        return report


def feature_maps(model: Sequential, dataset: DeviceDataset) -> tuple[list[Array], list[str]]:
    """Outputs (C, H, W) of the convolutions (after their activation) and poolings for the first image, and names."""
    n = min(16, len(dataset))  # kernels for a batch are compiled already, those for one image are not
    with model.lock, model.evaluating():
        plan = model.plan(n, unfused=True)
        dataset.gather(plan.x, dataset.ops.to_device(np.arange(n)))
        plan.forward()
    maps: list[Array] = []
    names: list[str] = []
    for step in plan.steps:
        output = plan.to_host(step.y)
        if not step.layers:
            continue
        layer = step.layers[0]
        if output.ndim != 4:
            break
        if maps and maps[-1].shape == output[0].shape:  # an activation replaces its convolution
            maps[-1], names[-1] = output[0], f"{names[-1]}, {type(layer).__name__}"
        else:
            maps.append(output[0])
            names.append(type(layer).__name__)
    return maps, names
