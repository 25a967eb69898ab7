"""A run's folder: settings, checkpoint, model, history, report and pictures.

    runs/default/2026-01-31_12-00-00-seed-0/
        config.json              recipe, seed, versions, hardware, threads, data hash, git revision
        checkpoint.safetensors   what the training needs to continue after the last complete epoch
        model.safetensors        the model after that epoch: `tinycnn.load` reads it
        snapshots/               the weights after the first 20 epochs, 30, 40, ... 90, 100, 200, ..., 8 bits a number
        history.csv              one line for each epoch
        report.json              test accuracy; precision, recall and F1 of each class
        curves.png confusion.png mistakes.png filters.png feature_maps.png reliability.png

Files are written atomically: each is complete or absent.  The checkpoint is written first, and model and history are
made from it, so a run that is killed has all of its epochs but the one that was running.
"""

import csv
import io
import json
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tinycnn import checkpoint, metrics, plot
from tinycnn._files import atomic_write, read_bytes, read_json, remove_partial_files
from tinycnn._interrupts import defer_interrupt
from tinycnn._typing import Array
from tinycnn.dataset import DeviceDataset, Normalization
from tinycnn.distributed import Group
from tinycnn.errors import DamagedCheckpointError, InUseError
from tinycnn.model import Sequential

if TYPE_CHECKING:
    from filelock import BaseFileLock

FORMAT = 2  # of config.json; 1 has no checkpoint, and the weights in model.npz
SNAPSHOTS = "snapshots"  # a folder
MAX_SNAPSHOT = 500_000  # numbers; of a larger network, only the first convolution's weights are kept


class RunFolder:
    """A run's folder, locked for this process until `close`.  A callback of `fit`: it writes model and history.

    config  the content of config.json     lock  None on ranks that do not write
    """

    rank_zero_only = True

    def __init__(self, path: Path, config: Mapping[str, Any], lock: "BaseFileLock | None") -> None:
        self.path, self.config, self.lock = path, dict(config), lock
        self.history: list[dict[str, Any]] = []

    @classmethod
    def create(cls, root: str | os.PathLike[str], name: str, config: Mapping[str, Any]) -> "RunFolder":
        """A new folder under `root`.  OSError names `root` if it cannot be written."""
        root, config = Path(root), {"format": FORMAT, **config}
        stem = time.strftime("%Y-%m-%d_%H-%M-%S-") + name
        try:
            with defer_interrupt():
                root.mkdir(parents=True, exist_ok=True)
                for number in range(1, 1000):  # other runs may have started in the same second
                    path = root / (stem if number == 1 else f"{stem}-{number}")
                    try:
                        path.mkdir()
                        break
                    except FileExistsError:
                        if number == 999 or not root.is_dir():
                            raise
                folder = cls(path, config, lock_file(path))
                folder.write("config.json", json.dumps(config, indent=2) + "\n")
                return folder
        except OSError as error:
            raise OSError(f"cannot write the output folder {root}: {error.strerror or error}") from error

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> "RunFolder":
        """The folder of an earlier run.  ValueError or OSError names what is missing; InUseError if a process runs in
        it."""
        folder = Path(path)
        config = read_config(folder)
        lock = lock_file(folder)
        remove_partial_files(folder)
        return cls(folder, config, lock)

    @classmethod
    def of_ranks(cls, group: Group, make: Callable[[], "RunFolder"]) -> "RunFolder":
        """The folder that `make` creates or opens on rank 0.  The other ranks only know its path and config."""
        made: list[RunFolder] = []

        def call() -> tuple[Path, dict[str, Any]]:
            made.append(make())
            return made[0].path, made[0].config

        path, config = group.on_root(call)
        return made[0] if made else cls(path, config, None)

    @property
    def checkpoint(self) -> Path:
        """The file of the training's checkpoint."""
        return self.path / "checkpoint.safetensors"

    def close(self) -> None:
        """Let other processes use the folder."""
        if self.lock is not None:
            self.lock.release()

    def write(self, name: str, text: str) -> None:
        """Write a text file."""
        with atomic_write(self.path / name) as file:
            file.write(text.encode())

    def on_train_begin(self, model: Sequential) -> None:
        self.model = model

    def on_checkpoint(self, history: list[dict[str, Any]]) -> None:
        """Write the model and the history of an epoch."""
        self.history = history
        with defer_interrupt():  # both files must be of the same epoch
            self.model.save(self.path / "model.safetensors")
            if history:
                table = io.StringIO()
                writer = csv.DictWriter(table, list(history[0]), lineterminator="\n")
                writer.writeheader()
                writer.writerows(history)
                self.write("history.csv", table.getvalue())
            if len(history) <= 20 or len(history) == float(f"{len(history):.1g}"):  # 1 ... 20, 30, ... 90, 100, 200
                write_snapshot(self.path, len(history), self.model)

    def finish(
        self,
        model: Sequential,
        dataset: DeviceDataset,
        logits: Array,
        class_names: Sequence[str],
        report: Mapping[str, Any],
        bins: Sequence[Any] | None = None,
    ) -> list[str]:
        """Write report.json, the model, and the pictures from the test set and the model's logits (N, K) on it.

        bins: for `plot.reliability`, of the validation set.
        Returns a line for each picture that could not be written.
        """
        self.write("report.json", json.dumps(report, indent=2) + "\n")
        model.save(self.path / "model.safetensors")
        drawn = pictures(model, dataset, logits, class_names)
        if bins is not None:
            drawn["reliability"] = lambda: plot.reliability(*bins)
        if self.history:
            drawn["curves"] = lambda: plot.learning_curves(self.history)
        problems = []
        for name, draw in drawn.items():
            try:
                plot.save(draw(), self.path / f"{name}.png")
            except (OSError, ValueError) as error:  # the run is worth more than its pictures
                problems.append(f"{name}.png was not written: {error}")
        return problems


def pictures(
    model: Sequential, dataset: DeviceDataset, logits: Array, class_names: Sequence[str]
) -> dict[str, Callable[[], Any]]:
    """Functions that draw what a model does with a test set, by name.   logits: (N, K), the model's on it"""
    images, true = dataset.ops.to_host(dataset.images), dataset.ops.to_host(dataset.labels)
    predicted, confidence = logits.argmax(axis=1), metrics.confidence(logits)
    matrix = metrics.confusion_matrix(true, predicted, logits.shape[1])
    drawn: dict[str, Callable[[], Any]] = {
        "confusion": lambda: plot.confusion(matrix, class_names),
        "mistakes": lambda: plot.mistakes(images, true, predicted, confidence, class_names),
    }
    convolutions = [name for name, view in model.named_parameters() if view.ndim == 4]
    if convolutions:
        title = "Filters of the first convolution"
        drawn["filters"] = lambda: plot.filters(model.state_dict()[convolutions[0]], title=title)
        drawn["feature_maps"] = lambda: plot.feature_maps(images[0], *feature_maps(model, dataset))
    return drawn


def lock_file(folder: Path, name: str = "") -> "BaseFileLock":
    """Lock a folder, or the file `name` in it, for this process.  The system releases the lock of a killed process.
    InUseError if another process has it."""
    from filelock import FileLock, Timeout

    lock = FileLock(folder / f"{name}.lock", thread_local=False)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise InUseError(f"{folder / name} is in use by another process") from None
    except NotImplementedError:  # a file system without locks
        pass
    except OSError as error:
        raise type(error)(error.errno, error.strerror, str(folder / f"{name}.lock")) from None
    return lock


def read_config(folder: Path) -> dict[str, Any]:
    """The content of a run's config.json.  ValueError or OSError names the file and what is wrong."""
    path = folder / "config.json"
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"{folder} must be the folder of a run, got a file")
    if not path.exists():
        raise FileNotFoundError(f"{folder} must be the folder of a run: it has no config.json")
    try:
        config = read_json(path)
    except ValueError as error:
        raise ValueError(f"{path} does not describe a run ({error})") from None
    version = config.get("format", 1)
    if not isinstance(version, int) or version > FORMAT:
        raise ValueError(f"{path} was written by a newer version of tinycnn: expected format {FORMAT}, got {version}")
    return config


def read_history(folder: Path) -> list[dict[str, float]]:
    """The records in a run's history.csv; none if it has no epoch yet.  ValueError names the file if it is damaged."""
    path = folder / "history.csv"
    try:
        rows = list(csv.DictReader(io.StringIO(read_bytes(path, 1 << 28).decode())))
        return [{name: float(value) for name, value in row.items()} for row in rows]
    except FileNotFoundError:
        return []
    except (ValueError, TypeError, csv.Error) as error:
        raise ValueError(f"{path} must be a table of numbers, one line an epoch ({error})") from None


def read_report(folder: Path) -> dict[str, Any]:
    """The content of a run's report.json, {} if it is not finished.  ValueError names the file if it is damaged."""
    path = folder / "report.json"
    try:
        report = read_json(path) if path.exists() else {}
        fitted = report.get("calibration")
        if fitted is not None and not all(math.isfinite(fitted[key]) for key in ("temperature", "reject_below")):
            raise ValueError("its calibration is not finite")
        return report
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} must be the report of a run ({error})") from None


def write_snapshot(folder: Path, epoch: float, model: Sequential) -> None:
    """Keep a model's weights after an epoch, 8 bits a number: an integer times a scale for each array that is not a
    vector."""
    state = dict(Normalization.split_state(model.state_dict())[0])
    if sum(array.size for array in state.values()) > MAX_SNAPSHOT:
        state = {name: array for name, array in state.items() if array.ndim == 4 and array.size <= MAX_SNAPSHOT}
        state = dict(list(state.items())[:1])
    small = {name: quantize(array) for name, array in state.items() if array.ndim > 1}
    numbers = {name: array for name, (array, _) in small.items()}
    (folder / SNAPSHOTS).mkdir(exist_ok=True)
    metadata = {"scales": {name: scale for name, (_, scale) in small.items()}}
    checkpoint.save(folder / SNAPSHOTS / f"epoch-{epoch:g}.safetensors", state | numbers, metadata)


def quantize(array: Array) -> tuple[Array, float]:
    """(int8 numbers, scale): their product is the array, to half a scale."""
    scale = float(np.abs(array).max(initial=0)) / 127 or 1.0
    return np.rint(array / scale).astype(np.int8), scale


def read_snapshots(folder: Path) -> dict[float, dict[str, Array]]:
    """The weights after each epoch that a run kept: {epoch: {name: float32 array}}.  DamagedCheckpointError names a
    damaged file."""
    found: dict[float, dict[str, Array]] = {}
    for path in (folder / SNAPSHOTS).glob("epoch-*.safetensors"):
        arrays, metadata = checkpoint.load(path)
        try:
            scales = metadata["scales"]
            epoch = float(path.stem.removeprefix("epoch-"))
            found[epoch] = {name: (array * scales.get(name, 1)).astype(np.float32) for name, array in arrays.items()}
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise DamagedCheckpointError(f"{path} must be a snapshot of a run ({error})") from None
    return dict(sorted(found.items()))


def unfinished(root: Path, seed: int) -> list[Path]:
    """The folders of runs of this seed under `root` that have a checkpoint and no report, newest first."""
    return [
        path
        for path in sorted([*root.glob(f"*-seed-{seed}"), *root.glob(f"*-seed-{seed}-*")], reverse=True)
        if (path / "checkpoint.safetensors").exists() and not (path / "report.json").exists()
    ]


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
