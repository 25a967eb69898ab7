"""Continue a training that was interrupted: `fit(..., checkpoint="run.safetensors")`.

The file holds everything that the next epoch depends on: parameters and buffers, the optimizer's state and rates, the
position in the random numbers (order, dropout, augmentation, the images of `SDLM`), the callbacks' state, and the
history.  It is written before the first epoch and after each one, as a whole or not at all.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tinycnn import _check, checkpoint
from tinycnn._repr import InitRepr
from tinycnn._typing import Array, State
from tinycnn.dataset import DeviceDataset
from tinycnn.errors import DamagedCheckpointError, ResumeError
from tinycnn.model import Sequential

if TYPE_CHECKING:
    from tinycnn.train import Hooks, Orders, Snapshot, StepRunner

FORMAT = "tinycnn training"
VERSION = 1
IMAGES = "training data: images"  # the number, in `settings`
SAMPLED = 64  # images of a memory-mapped file that its fingerprint reads


class TrainingCheckpoint(InitRepr):
    """The file of a training: ``fit(..., checkpoint=TrainingCheckpoint(path))``, or just the path.

    path   file name ending in .safetensors
    force  continue although the file is of another training, with what is given now

    ignored: the differences that were ignored, one line each
    """

    def __init__(self, path: str | os.PathLike[str], force: bool = False) -> None:
        if not isinstance(path, (str, os.PathLike)) or Path(path).suffix != ".safetensors":
            raise ValueError(f"checkpoint must be a file name ending in .safetensors, got {_check.describe(path)}")
        self.path, self.force = Path(path), bool(force)
        self.ignored: list[str] = []

    def read(self) -> dict[str, Any] | None:
        """The state in the file; None if there is no file.  DamagedCheckpointError for a file of something else."""
        if not self.path.exists():
            return None
        arrays, metadata = checkpoint.load(self.path)
        if metadata.get("format") != FORMAT:
            raise DamagedCheckpointError(f"{self.path} must be the checkpoint of a training, got other content")
        if metadata.get("version") != VERSION:
            newer = "it was written by a newer version of tinycnn"
            raise ResumeError(
                f"{self.path}: expected format {VERSION}, got {_check.short_repr(metadata.get('version'))}: {newer}"
            )
        try:
            state: dict[str, Any] = _join(metadata["state"], arrays)
        except (KeyError, TypeError, AttributeError, RecursionError) as error:
            raise DamagedCheckpointError(
                f"{self.path} must be the checkpoint of a training: {_check.one_line(error, 200)}"
            ) from None
        return state

    def write(self, state: Mapping[str, Any]) -> None:
        """Replace the file."""
        arrays: dict[str, Array] = {}
        content = {"format": FORMAT, "version": VERSION, "state": _split(dict(state), "", arrays)}
        checkpoint.save(self.path, arrays, content)

    def check(self, saved: Mapping[str, Any], given: Mapping[str, Any]) -> None:
        """ResumeError that names every difference of two `settings`; with `force` they are kept in `ignored`."""
        self.refuse(*differences(saved, given))

    def refuse(self, *reasons: str) -> None:
        """ResumeError with the reasons, if there are any and `force` is not set."""
        if reasons and not self.force:
            raise ResumeError(f"{self.path} cannot be continued: {'; '.join(reasons)}")
        self.ignored += reasons


class Saver:
    """Saves the state of a training in its checkpoint, and loads it."""

    def __init__(
        self,
        checkpoint: Any,
        runner: "StepRunner",
        orders: "Orders | None",
        generator: np.random.Generator,
        hooks: "Hooks",
        settings: dict[str, Any],
    ) -> None:
        self.file = checkpoint if isinstance(checkpoint, TrainingCheckpoint) else TrainingCheckpoint(checkpoint)
        self.runner, self.orders, self.generator, self.hooks = runner, orders, generator, hooks
        self.settings = settings
        self.first_rates: Array = runner.optimizer.lr_schedule.copy()

    def save(self, last_good: "Snapshot", history: list[dict[str, Any]], stopped: bool) -> None:
        """Write the file after an epoch, if this is rank 0.   stopped: whether a callback ended the training"""
        model, optimizer, augmentation = self.runner.model, self.runner.optimizer, self.runner.loader.augmentation
        (theta, *buffers), optimizer_state = last_good
        state = {
            "settings": self.settings, "history": history, "stopped": stopped,
            "theta": theta, "buffers": dict(zip((name for name, _ in model.named_buffers()), buffers, strict=True)),
            "layers": {name: state for name, layer in model.leaves if (state := layer.get_extra_state()) is not None},
            "optimizer": optimizer_state, "first_rates": self.first_rates,
            "rng": self.generator.bit_generator.state,
            "upcoming": None if self.orders is None else self.orders.upcoming,
            "augmentation": 0 if augmentation is None else augmentation.batches_drawn(),
            "callbacks": [part.state_dict() for part in self.hooks.stateful],
        }  # fmt: skip
        if self.runner.group.rank == 0:
            self.file.write(state)
        with optimizer.average_parameters():
            self.hooks("on_checkpoint", history)

    def load(self, saved: Mapping[str, Any] | None) -> tuple[list[dict[str, Any]], bool]:
        """Continue from the state in the file, if there is one.  Returns the history, and whether a callback has ended
        the training."""
        if saved is None:
            return [], False
        model, optimizer = self.runner.model, self.runner.optimizer
        try:
            self.file.check(saved["settings"], self.settings)
            state = self._with_rates(saved["optimizer"], saved["first_rates"])
            model.restore([saved["theta"], *(saved["buffers"][name] for name, _ in model.named_buffers())])
            for name, layer in model.leaves:
                if name in saved["layers"]:
                    layer.set_extra_state(saved["layers"][name])
            optimizer.load_state_dict(state)
            self.generator.bit_generator.state = saved["rng"]
            if self.orders is not None and self.settings[IMAGES] == saved["settings"][IMAGES]:
                self.orders.upcoming = saved["upcoming"]
            if self.runner.loader.augmentation is not None:
                self.runner.loader.augmentation.continue_from(saved["augmentation"])
            for part, part_state in zip(self.hooks.stateful, saved["callbacks"], strict=True):
                part.load_state_dict(part_state)
            history: list[dict[str, Any]] = saved["history"]
        except ResumeError:
            raise
        except (KeyError, ValueError, TypeError, AttributeError) as error:
            raise ResumeError(f"{self.file.path} does not fit this training: {error}") from error
        return history, saved["stopped"]

    def _with_rates(self, state: State, first: Array) -> State:
        """The optimizer's saved state with the rates to continue with: the saved ones, or those that are given now if
        they extend them.   first: the rates at the start of the training"""
        given, steps = self.runner.optimizer.lr_schedule, int(state["_step"][0])
        if np.array_equal(given, first):
            return state
        taken = np.arange(steps)
        old, new = (rates[np.minimum(taken, len(rates) - 1)] for rates in (first, given))
        if not np.array_equal(old, new):
            step = int(np.flatnonzero(old != new)[0])
            before, now = float(old[step]), float(new[step])
            self.file.refuse(
                f"learning rate: {steps:,} steps were taken with another schedule (step {step + 1:,}: {before} in the "
                f"checkpoint, {now} now)"
            )
        elif not np.array_equal(state["rates"], first):
            self.file.refuse("learning rate: a callback has changed the schedule that is given now")
        self.first_rates = given.copy()
        return state | {"rates": given}


def training_settings(
    runner: "StepRunner", validator: "StepRunner | None", hooks: "Hooks", options: Mapping[str, Any]
) -> dict[str, Any]:
    """The `settings` of a call of `fit`."""
    loaders = {"training data": runner.loader} | ({"validation data": validator.loader} if validator else {})
    data = {
        f"{name}: {key}": value
        for name, loader in loaders.items() if loader.repeatable
        for key, value in fingerprint(loader.dataset).items()
    }  # fmt: skip
    stateful = [_text(part, ("path", "optimizer")) for part in hooks.stateful]
    return settings(runner.model, runner.criterion, runner.optimizer, data, {**options, "callbacks": stateful})


def settings(
    model: Sequential, criterion: Any, optimizer: Any, data: Mapping[str, Any], options: Mapping[str, Any]
) -> dict[str, Any]:
    """What has to be equal when a training continues, as JSON.   data: fingerprints of the data sets"""
    from tinycnn import hardware, saving

    def layer_text(layer: Any) -> str:
        try:
            return json.dumps(saving.encode(layer))
        except TypeError:  # a user's layer
            return _text(layer)

    return {
        **hardware.versions(),
        "device": model.device.partition(":")[0],
        "dtype": model.dtype.name,
        "input shape": list(model.input_shape or ()),
        **{f"layer {number}": layer_text(layer) for number, layer in enumerate(model.layers)},
        "frozen layers": [name for name, layer in model.leaves if not layer.requires_grad],
        "loss": _text(criterion),
        "optimizer": _text(optimizer),
        **data,
        **options,
    }


def differences(saved: Mapping[str, Any], given: Mapping[str, Any]) -> list[str]:
    """A line for each setting that is not equal."""
    nothing = "none"
    return [
        f"{name}: {_short(saved.get(name, nothing))} in the checkpoint, {_short(given.get(name, nothing))} now"
        for name in dict.fromkeys([*saved, *given])
        if saved.get(name, nothing) != given.get(name, nothing)
    ]


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 200 else text[:200] + " ..."


def _text(part: Any, omit: tuple[str, ...] = ("lr",)) -> str:
    """The constructor call of a loss, optimizer, layer or callback, without the arguments `omit`; the class's name if
    it has no `repr` of its own."""
    if isinstance(part, InitRepr):
        return part.describe(omit)
    kind = type(part)
    return kind.__qualname__ if kind.__repr__ is object.__repr__ else repr(part)


def fingerprint(dataset: DeviceDataset) -> dict[str, Any]:
    """Hash of a data set's arrays (of a memory-mapped file: of some images), and its options."""
    digest = hashlib.sha256()
    for name, values in dataset.arrays().items():
        digest.update(f"{name} {values.dtype} {values.shape}".encode())
        rows = np.linspace(0, len(values) - 1, SAMPLED).astype(int) if dataset.on_disk else slice(None)
        host = values[rows] if dataset.on_disk else dataset.ops.to_host(values)
        digest.update(np.ascontiguousarray(host).data)
    augmentation = dataset.augmentation
    transforms = [repr(t) for t in (augmentation.affine, augmentation.elastic, augmentation.jitter) if t is not None]
    return {
        "images": len(dataset),
        "sha256": digest.hexdigest(),
        "mean": dataset.mean.tolist(),
        "std": dataset.std.tolist(),
        "padding": list(dataset.padding),
        **({"augment": transforms, "seeds": augmentation.seeds()} if transforms else {}),
    }


# --- nested state <-> arrays by name and JSON -------------------------------------------------------------------------


def _split(value: Any, name: str, arrays: dict[str, Array]) -> Any:
    """`value` as JSON; its arrays are put into `arrays`, by the path of keys that leads to them."""
    if isinstance(value, np.ndarray):
        arrays[name] = value
        return {"array": name}
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, Mapping):
        return {"items": {str(k): _split(v, f"{name}.{k}" if name else str(k), arrays) for k, v in value.items()}}
    if isinstance(value, (list, tuple)):
        return [_split(v, f"{name}.{i}", arrays) for i, v in enumerate(value)]
    return value


def _join(value: Any, arrays: Mapping[str, Array]) -> Any:
    """Inverse of `_split`."""
    if isinstance(value, list):
        return [_join(v, arrays) for v in value]
    if not isinstance(value, dict):
        return value
    return arrays[value["array"]] if "array" in value else {k: _join(v, arrays) for k, v in value["items"].items()}
