"""Callbacks for the end of an epoch: early stopping, and a learning rate that reacts to a metric."""

import math
import numbers
from collections.abc import Mapping
from typing import Any

import numpy as np

from tinycnn import _check
from tinycnn._repr import InitRepr
from tinycnn._typing import Array
from tinycnn.model import Sequential
from tinycnn.optim import EMA, Optimizer


class EarlyStopping(InitRepr):
    """Stops a training that no longer improves: ``fit(..., on_epoch=EarlyStopping(...))``.  Create one per training.

    monitor       the value in the epochs' records that is watched
    patience      training stops after this many epochs in a row without an improvement
    min_delta     a change by this much or less is no improvement
    mode          "min" or "max": whether lower or higher is better
    restore_best  a model that gets the weights of the best epoch at the end of the training

    best, best_epoch: the best value so far and its epoch.  Names and definition are Keras's.
    """

    def __init__(
        self,
        monitor: str = "val_loss",
        patience: int = 5,
        min_delta: float = 0.0,
        mode: str = "min",
        restore_best: Sequential | None = None,
    ) -> None:
        if not isinstance(monitor, str):
            raise TypeError(f"monitor must be the name of a number in the record, got {monitor!r}")
        if restore_best is not None and not isinstance(restore_best, Sequential):
            raise TypeError(f"restore_best must be the model that is trained, or None, got {restore_best!r}")
        self.monitor, self.patience = monitor, _check.integer("patience", patience, 0)
        self.min_delta = _check.number("min_delta", min_delta, 0)
        self.mode = _check.choice("mode", mode, ("min", "max"))
        self.best, self.best_epoch = math.inf if mode == "min" else -math.inf, 0
        self._model, self._waited = restore_best, 0
        self._best_weights: list[Array] | None = None

    def __call__(self, record: Mapping[str, Any]) -> bool:
        """Whether to stop after the epoch of `record`.  NaN is no improvement.  ValueError if `monitor` is missing."""
        if self.monitor not in record:
            raise ValueError(f"monitor must be one of {', '.join(map(repr, record))}, got {self.monitor!r}")
        value = record[self.monitor]
        improvement = self.best - value if self.mode == "min" else value - self.best
        if improvement > self.min_delta:
            self.best, self.best_epoch, self._waited = value, record["epoch"], 0
            if self._model is not None:
                self._best_weights = self._model.snapshot()
            return False
        self._waited += 1
        return self._waited >= self.patience

    def at_end(self) -> None:
        """Restore the weights of the best epoch in `restore_best`.  `fit` calls this at the end of the training."""
        if self._model is not None and self._best_weights is not None:
            self._model.restore(self._best_weights)


class ReduceLROnPlateau(InitRepr):
    """Lowers the learning rate when a metric stops improving.  Arguments and definition are torch's.

    Call `step(metric)` after each epoch.  A metric improves if it beats the best by more than `threshold` (a fraction
    of the best for "rel", a difference for "abs").  After more than `patience` epochs without an improvement, all
    remaining rates are multiplied by `factor`, down to at least min_lr; a change of eps or less is skipped.  The
    `cooldown` epochs after a reduction do not count.

        plateau = ReduceLROnPlateau(optimizer)
        fit(..., on_epoch=lambda record: plateau.step(record["val_loss"]))
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
    ) -> None:
        _check.instance("optimizer", optimizer, (Optimizer, EMA), "a tinycnn optimizer")
        self.optimizer, self.mode = optimizer, _check.choice("mode", mode, ("min", "max"))
        self.factor = _check.number("factor", factor, 0, below=1)
        self.patience = _check.integer("patience", patience, 0)
        self.threshold = _check.number("threshold", threshold, 0)
        self.threshold_mode = _check.choice("threshold_mode", threshold_mode, ("rel", "abs"))
        self.cooldown = _check.integer("cooldown", cooldown, 0)
        self.min_lr, self.eps = _check.number("min_lr", min_lr, 0), _check.number("eps", eps, 0)
        self.best = np.inf if mode == "min" else -np.inf
        self.num_bad_epochs = self.cooldown_counter = 0

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
