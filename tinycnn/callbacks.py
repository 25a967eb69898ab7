"""Callbacks: early stopping, files of a training, and a learning rate that reacts to a metric.

    fit(..., callbacks=[EarlyStopping(patience=3), ModelCheckpoint("best.safetensors"), CSVLogger("history.csv")])

A callback is any object with one or more of these methods, which are called in the order of the list:

    on_train_begin(model)  before the first epoch
    on_batch_end(record)   after each batch, with its epoch, batch (from 1 in each epoch), images, loss (before the
                           step) and lr (of the step)
    on_epoch_end(record)   after each epoch and its validation, with the epoch's record (see `fit`).  What it adds to
                           the record is in the history
    on_train_end()         at the end of a training without an exception
    on_checkpoint(history) after the checkpoint of an epoch is on the disk, with the records so far (`fit(checkpoint=)`)
    state_dict(), load_state_dict(state)
                           the callback's state in the checkpoint: numbers, texts, arrays, lists and dictionaries

With `fit(comm=)` every rank calls its callbacks, with the same records; those whose attribute `rank_zero_only` is true
run on rank 0 only, as those here that write files do.  All ranks stop if a callback of one returns True.

Training stops if `on_batch_end` or `on_epoch_end` returns True; the epoch then ends at that batch.  Both may run and
evaluate the model, and change learning rates and attributes of layers; the next step uses the new values.  If one
raises an exception, the model keeps the weights of the last complete epoch.

The training step is captured and replayed with and without callbacks.  For `on_batch_end` the loss of every batch is
read: on a GPU each step then waits for the one before.
"""

import csv
import errno
import importlib
import io
import math
import numbers
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tinycnn import _check
from tinycnn._files import atomic_write
from tinycnn._repr import InitRepr
from tinycnn._typing import Array
from tinycnn.model import Sequential
from tinycnn.optim import EMA, Optimizer


def _monitored(monitor: str, record: Mapping[str, Any]) -> Any:
    """The value `monitor` of a record."""
    if monitor not in record:
        raise ValueError(f"monitor must be one of {', '.join(map(repr, record))}, got {monitor!r}")
    return record[monitor]


def _monitor_name(monitor: Any) -> str:
    if not isinstance(monitor, str):
        raise TypeError(f"monitor must be the name of a number in the record, got {monitor!r}")
    return monitor


class EarlyStopping(InitRepr):
    """Stops a training that no longer improves: ``fit(..., callbacks=[EarlyStopping(...)])``.  Create one per training.

    monitor       the value in the epochs' records that is watched
    patience      training stops after this many epochs in a row without an improvement
    min_delta     a change by this much or less is no improvement
    mode          "min" or "max": whether lower or higher is better
    restore_best  True: the model gets the weights of the best epoch at the end of the training

    best, best_epoch: the best value so far and its epoch.  Names and definition are Keras's.
    """

    def __init__(
        self,
        monitor: str = "val_loss",
        patience: int = 5,
        min_delta: float = 0.0,
        mode: str = "min",
        restore_best: Sequential | bool | None = False,
    ) -> None:
        if not isinstance(restore_best, (Sequential, bool, type(None))):
            raise TypeError(f"restore_best must be True or False, or the model that is trained, got {restore_best!r}")
        self.restore_best = isinstance(restore_best, Sequential) or bool(restore_best)
        self.monitor, self.patience = _monitor_name(monitor), _check.integer("patience", patience, 0)
        self.min_delta = _check.number("min_delta", min_delta, 0)
        self.mode = _check.choice("mode", mode, ("min", "max"))
        self.best, self.best_epoch = math.inf if mode == "min" else -math.inf, 0
        self._model = restore_best if isinstance(restore_best, Sequential) else None
        self._waited = 0
        self._best_weights: list[Array] | None = None

    def on_train_begin(self, model: Sequential) -> None:
        """Keep the model, for `restore_best`."""
        if self.restore_best and self._model is None:
            self._model = model

    def on_epoch_end(self, record: Mapping[str, Any]) -> bool:
        """Whether to stop after the epoch of `record`.  NaN is no improvement.  ValueError if `monitor` is missing."""
        value = _monitored(self.monitor, record)
        improvement = self.best - value if self.mode == "min" else value - self.best
        if improvement > self.min_delta:
            self.best, self.best_epoch, self._waited = value, record["epoch"], 0
            if self._model is not None:
                self._best_weights = self._model.snapshot()
            return False
        self._waited += 1
        return self._waited >= self.patience

    def on_train_end(self) -> None:
        """Restore the weights of the best epoch in `restore_best`."""
        if self._model is not None and self._best_weights is not None:
            self._model.restore(self._best_weights)

    def state_dict(self) -> dict[str, Any]:
        """The state needed to resume, with the weights of the best epoch."""
        return {"best": self.best, "best_epoch": self.best_epoch, "waited": self._waited, "weights": self._best_weights}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load the result of `state_dict`."""
        self.best, self.best_epoch, self._waited = state["best"], state["best_epoch"], state["waited"]
        self._best_weights = state["weights"]

    def __call__(self, record: Mapping[str, Any]) -> bool:
        """`on_epoch_end`, for ``fit(..., on_epoch=EarlyStopping(...))``."""
        return self.on_epoch_end(record)

    def at_end(self) -> None:
        """`on_train_end`, for the same."""
        self.on_train_end()


class ModelCheckpoint(InitRepr):
    """Saves the model after each epoch that is the best so far, or after every epoch; `tinycnn.load` reads it.

    path            file name ending in .safetensors; the file is replaced when the new one is complete
    monitor, mode   the value in the epochs' records, and whether lower ("min") or higher ("max") is better
    save_best_only  False: save after every epoch

    best, best_epoch: the best value so far and its epoch.  NaN is never the best.  Names are Keras's.
    """

    rank_zero_only = True

    def __init__(
        self,
        path: str | os.PathLike[str],
        monitor: str = "val_loss",
        mode: str = "min",
        save_best_only: bool = True,
    ) -> None:
        self.path, self.monitor = _file("path", path, ".safetensors"), _monitor_name(monitor)
        self.mode, self.save_best_only = _check.choice("mode", mode, ("min", "max")), bool(save_best_only)
        self.best, self.best_epoch = math.inf if mode == "min" else -math.inf, 0

    def on_train_begin(self, model: Sequential) -> None:
        """Keep the model.  FileNotFoundError if the folder of the file does not exist."""
        self._model = model
        _require_folder(self.path)

    def state_dict(self) -> dict[str, Any]:
        """The state needed to resume."""
        return {"best": self.best, "best_epoch": self.best_epoch}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load the result of `state_dict`."""
        self.best, self.best_epoch = state["best"], state["best_epoch"]

    def on_epoch_end(self, record: Mapping[str, Any]) -> None:
        """Save the model.  ValueError if `monitor` is missing in the record."""
        if self.save_best_only or self.monitor in record:
            value = _monitored(self.monitor, record)
            if value < self.best if self.mode == "min" else value > self.best:
                self.best, self.best_epoch = value, record["epoch"]
        if not self.save_best_only or self.best_epoch == record["epoch"]:
            self._model.save(self.path)


class CSVLogger(InitRepr):
    """Writes a CSV file with a header and a row for each epoch.

    append  keep the rows that the file has already; False: a training replaces the file

    After each epoch the complete file replaces the one before, so an interruption leaves whole rows only.  Numbers are
    written with all their digits.
    """

    rank_zero_only = True

    def __init__(self, path: str | os.PathLike[str], append: bool = False) -> None:
        self.path, self.append = _file("path", path), bool(append)
        self._rows: list[dict[str, Any]] = []

    def on_train_begin(self, model: Sequential) -> None:
        """Read the rows to keep.  FileNotFoundError if the folder of the file does not exist."""
        _require_folder(self.path)
        self._rows = []
        if self.append and self.path.exists():
            with self.path.open(encoding="utf-8", newline="") as file:
                self._rows = list(csv.DictReader(file))

    def state_dict(self) -> dict[str, Any]:
        """The rows so far."""
        return {"rows": self._rows}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load the result of `state_dict`."""
        self._rows = [dict(row) for row in state["rows"]]

    def on_epoch_end(self, record: Mapping[str, Any]) -> None:
        """Write the file with a row for this epoch."""
        self._rows.append(dict(record))
        table = io.StringIO(newline="")
        writer = csv.DictWriter(
            table, list(dict.fromkeys(name for row in self._rows for name in row)), lineterminator="\n"
        )
        writer.writeheader()
        writer.writerows(self._rows)
        with atomic_write(self.path) as file:
            file.write(table.getvalue().encode())


class TensorBoard(InitRepr):
    """Writes the numbers of each epoch's record to an event file for TensorBoard, in the folder `log_dir`.

    Needs tensorboardX: ``pip install "tinycnn[tensorboard]"`` (ImportError otherwise).  Show the curves with
    ``tensorboard --logdir log_dir``.
    """

    rank_zero_only = True

    def __init__(self, log_dir: str | os.PathLike[str]) -> None:
        self.log_dir = _file("log_dir", log_dir)
        self._writer: Any = None
        self._module()

    @staticmethod
    def _module() -> Any:
        try:
            return importlib.import_module("tensorboardX")
        except ImportError as error:
            raise ImportError('TensorBoard needs tensorboardX: pip install "tinycnn[tensorboard]"') from error

    def on_epoch_end(self, record: Mapping[str, Any]) -> None:
        """Write the numbers of the record; on the disk when this returns."""
        if self._writer is None:
            self._writer = self._module().SummaryWriter(str(self.log_dir))
        for name, value in record.items():
            if name != "epoch" and isinstance(value, numbers.Real):
                self._writer.add_scalar(name, value, record["epoch"])
        self._writer.flush()

    def on_train_end(self) -> None:
        """Close the event file; a later training writes another."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None


class WandB(InitRepr):
    """Logs the numbers of each epoch's record to Weights & Biases.

    project  name of the project      name  of the run; None: wandb invents one
    config   dictionary of settings that the run is filed under, such as the learning rate
    mode     "offline": nothing is sent, ``wandb sync`` can do so later; "online", "disabled", or None for what wandb is
             configured to do (WANDB_MODE)
    log_dir  folder in which wandb makes its folder "wandb"
    options  further arguments of ``wandb.init``, such as group and tags

    run: wandb's run, for what else is to be logged, such as pictures.  A run that is active already, as in a sweep of
    wandb's, is used and left open; otherwise one is made, and ends with the training.  A training that continues from
    its checkpoint continues its run.

    Needs wandb: ``pip install "tinycnn[wandb]"`` (ImportError otherwise).
    """

    rank_zero_only = True

    def __init__(
        self,
        project: str,
        name: str | None = None,
        config: Mapping[str, Any] | None = None,
        mode: str | None = "offline",
        log_dir: str | os.PathLike[str] = ".",
        **options: Any,
    ) -> None:
        self.project, self.name = _check.instance("project", project, str, "a string"), name
        self.config = None if config is None else dict(_check.instance("config", config, Mapping, "a dictionary"))
        self.mode = _check.choice("mode", mode, ("offline", "online", "disabled", None))
        self.log_dir, self.options = _file("log_dir", log_dir), options
        self.run: Any = None
        self._own, self._id = False, ""
        if mode == "offline":  # wandb would still send reports of its own errors
            os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        self._module()

    def repr_overrides(self) -> dict[str, Any]:
        return {"log_dir": str(self.log_dir)}

    def repr_options(self) -> dict[str, Any]:
        return self.options

    @staticmethod
    def _module() -> Any:
        try:
            return importlib.import_module("wandb")
        except ImportError as error:
            raise ImportError('WandB needs wandb: pip install "tinycnn[wandb]"') from error

    def on_train_begin(self, model: Sequential) -> None:
        """FileNotFoundError if the folder `log_dir` does not exist: wandb would write elsewhere."""
        _require_folder(self.log_dir / "wandb")

    def on_epoch_end(self, record: Mapping[str, Any]) -> None:
        """Log the numbers of the record, as the step of its epoch."""
        if self.run is None:
            wandb = self._module()
            self._own = wandb.run is None
            options = {"id": self._id, "resume": "allow", **self.options} if self._id else self.options
            self.run = wandb.run or wandb.init(
                project=self.project, name=self.name, config=self.config, mode=self.mode, dir=str(self.log_dir),
                **options,
            )  # fmt: skip
            self._id = self.run.id
        values = {name: v for name, v in record.items() if name != "epoch" and isinstance(v, numbers.Real)}
        self.run.log(values, step=record["epoch"])

    def on_train_end(self) -> None:
        """End the run, if it was made here; a later training makes another."""
        if self._own and self.run is not None:
            self.run.finish()
        self.run, self._id = None, ""

    def state_dict(self) -> dict[str, Any]:
        """wandb's id of the run."""
        return {"id": self._id}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load the result of `state_dict`."""
        self._id = state["id"]


def _file(name: str, path: Any, suffix: str = "") -> Path:
    """`path` as a Path that ends in `suffix`."""
    if not isinstance(path, (str, os.PathLike)) or not os.fspath(path):
        raise TypeError(f"{name} must be a path, got {_check.describe(path)}")
    if suffix and Path(path).suffix != suffix:
        raise ValueError(f"{name} must be a file name ending in {suffix}, got {os.fspath(path)!r}")
    return Path(path)


def _require_folder(path: Path) -> None:
    """FileNotFoundError unless the folder of `path` exists: before hours of training."""
    if not path.parent.is_dir():
        raise FileNotFoundError(errno.ENOENT, "the folder does not exist", str(path))


class ReduceLROnPlateau(InitRepr):
    """Lowers the learning rate when a metric stops improving.  Arguments and definition are torch's.

    A callback that looks at the value `monitor` of the records; or call `step(metric)` after each epoch, as in torch.
    A metric improves if it beats the best by more than `threshold` (a fraction
    of the best for "rel", a difference for "abs").  After more than `patience` epochs without an improvement, all
    remaining rates are multiplied by `factor`, down to at least min_lr; a change of eps or less is skipped.  The
    `cooldown` epochs after a reduction do not count.

        fit(..., callbacks=[ReduceLROnPlateau(optimizer, monitor="val_loss")])
    """

    def __init__(
        self,
        optimizer: Optimizer | EMA,
        mode: str = "min",
        factor: float = 0.1,
        patience: int = 10,
        threshold: float = 1e-4,
        threshold_mode: str = "rel",
        cooldown: int = 0,
        min_lr: float = 0.0,
        eps: float = 1e-8,
        monitor: str = "val_loss",
    ) -> None:
        _check.instance("optimizer", optimizer, (Optimizer, EMA), "a tinycnn optimizer")
        self.optimizer, self.mode = optimizer, _check.choice("mode", mode, ("min", "max"))
        self.factor = _check.number("factor", factor, 0, below=1)
        self.patience = _check.integer("patience", patience, 0)
        self.threshold = _check.number("threshold", threshold, 0)
        self.threshold_mode = _check.choice("threshold_mode", threshold_mode, ("rel", "abs"))
        self.cooldown = _check.integer("cooldown", cooldown, 0)
        self.min_lr, self.eps = _check.number("min_lr", min_lr, 0), _check.number("eps", eps, 0)
        self.monitor = _monitor_name(monitor)
        self.best = np.inf if mode == "min" else -np.inf
        self.num_bad_epochs = self.cooldown_counter = 0

    def on_epoch_end(self, record: Mapping[str, Any]) -> None:
        """`step` with the value `monitor` of the record.  ValueError if it is missing."""
        self.step(_monitored(self.monitor, record))

    def step(self, metric: float) -> None:
        """Record the metric of an epoch; lower the rates when the patience is exceeded.  NaN is no improvement."""
        _check.instance("metric", metric, numbers.Real, "a number")
        if self._improves(metric):
            self.best, self.num_bad_epochs = float(metric), 0
        else:
            self.num_bad_epochs += 1
        if self.cooldown_counter:
            self.cooldown_counter -= 1
            self.num_bad_epochs = 0
        if self.num_bad_epochs > self.patience:
            self._reduce()
            self.cooldown_counter, self.num_bad_epochs = self.cooldown, 0

    STATE = ("best", "num_bad_epochs", "cooldown_counter")

    def state_dict(self) -> dict[str, Any]:
        """The state needed to resume, as plain numbers.  The rates are in the optimizer's state."""
        return {name: getattr(self, name) for name in self.STATE}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load the result of `state_dict`.  ValueError or TypeError for a wrong key or value, before any change."""
        if set(_check.mapping("state", state)) != set(self.STATE):
            raise ValueError(f"plateau state must have the keys {sorted(self.STATE)}, got {sorted(state)}")
        best = state["best"]
        if isinstance(best, bool) or not isinstance(best, numbers.Real):
            raise TypeError(f"best must be a number, got {best!r}")
        counts = [_check.integer(name, state[name], 0) for name in self.STATE[1:]]
        self.best, (self.num_bad_epochs, self.cooldown_counter) = float(best), counts

    def _improves(self, metric: float) -> bool:
        sign = -1 if self.mode == "min" else 1
        if self.threshold_mode == "rel":
            return sign * metric > sign * self.best * (1 + sign * self.threshold)
        return sign * metric > sign * self.best + self.threshold

    def _reduce(self) -> None:
        rates = self.optimizer.lr_schedule.copy()
        remaining = rates[min(self.optimizer.steps, len(rates) - 1) :]
        lower = np.maximum(remaining * self.factor, self.min_lr)
        remaining[...] = np.where(remaining - lower > self.eps, lower, remaining)
        self.optimizer.set_lr_schedule(rates)
