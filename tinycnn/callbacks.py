"""What is called after every epoch: early stopping, and a learning rate that follows the loss."""

import math
import numbers

import numpy as np

from tinycnn import _check
from tinycnn._repr import InitRepr
from tinycnn.model import Sequential
from tinycnn.optim import EMA, Optimizer


class EarlyStopping(InitRepr):
    """Ends a training that no longer gets better: ``fit(..., on_epoch=EarlyStopping(...))``.  One for each training.

    monitor       the number in the epochs' records that is watched
    patience      after so many epochs in a row that were not better than the best, training ends
    min_delta     less than this is not better
    mode          "min" or "max": which way is better
    restore_best  a model: at the end it is given the weights of the best epoch

    best, best_epoch: the best number so far, and when.  Names and definition are those of Keras.
    """

    def __init__(self, monitor="val_loss", patience=5, min_delta=0.0, mode="min", restore_best=None):
        if not isinstance(monitor, str):
            raise TypeError(f"monitor must be the name of a number in the record, got {monitor!r}")
        if restore_best is not None and not isinstance(restore_best, Sequential):
            raise TypeError(f"restore_best must be the model that is trained, or None, got {restore_best!r}")
        self.monitor, self.patience = monitor, _check.integer("patience", patience, 0)
        self.min_delta = _check.number("min_delta", min_delta, 0)
        self.mode = _check.choice("mode", mode, ("min", "max"))
        self.best, self.best_epoch = math.inf if mode == "min" else -math.inf, 0
        self._model, self._weights, self._waited = restore_best, None, 0

    def __call__(self, record):
        """Whether to stop after the epoch of this record; NaN is not better.  ValueError if `monitor` is not in it."""
        if self.monitor not in record:
            raise ValueError(f"monitor must be one of {', '.join(map(repr, record))}, got {self.monitor!r}")
        value = record[self.monitor]
        better = self.best - value if self.mode == "min" else value - self.best
        if better > self.min_delta:
            self.best, self.best_epoch, self._waited = value, record["epoch"], 0
            if self._model is not None:
                self._weights = self._model.snapshot()
            return False
        self._waited += 1
        return self._waited >= self.patience

    def at_end(self):
        """Put the weights of the best epoch into the model `restore_best`; `fit` calls this when training ends."""
        if self._model is not None and self._weights is not None:
            self._model.restore(self._weights)


class ReduceLROnPlateau(InitRepr):
    """Lowers the learning rate when a number has stopped improving; arguments and definition are torch's.

    `step(metric)` is called after each epoch.  Where `metric` was not better than the best by `threshold` (a share of
    the best if "rel", a difference if "abs") for more than `patience` epochs, every rate still to come is multiplied by
    `factor`, down to min_lr at the least; changes of eps or less are not made.  The `cooldown` epochs after it do not
    count.

        plateau = ReduceLROnPlateau(optimizer)
        fit(..., on_epoch=lambda record: plateau.step(record["val_loss"]))
    """

    def __init__(
        self,
        optimizer,
        mode="min",
        factor=0.1,
        patience=10,
        threshold=1e-4,
        threshold_mode="rel",
        cooldown=0,
        min_lr=0.0,
        eps=1e-8,
    ):
        _check.instance("optimizer", optimizer, (Optimizer, EMA), "a tinycnn optimizer")
        self.optimizer, self.mode = optimizer, _check.choice("mode", mode, ("min", "max"))
        self.factor, self.patience = (
            _check.number("factor", factor, 0, below=1),
            _check.integer("patience", patience, 0),
        )
        self.threshold = _check.number("threshold", threshold, 0)
        self.threshold_mode = _check.choice("threshold_mode", threshold_mode, ("rel", "abs"))
        self.cooldown = _check.integer("cooldown", cooldown, 0)
        self.min_lr, self.eps = _check.number("min_lr", min_lr, 0), _check.number("eps", eps, 0)
        self.best = np.inf if mode == "min" else -np.inf
        self.num_bad_epochs = self.cooldown_counter = 0

    def step(self, metric):
        """Look at the metric of an epoch; NaN is no improvement."""
        _check.instance("metric", metric, numbers.Real, "a number")
        if self._is_better(metric):
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

    def state_dict(self):
        """What is needed to go on, besides the state of the optimizer, which holds the rates: plain numbers."""
        return {name: getattr(self, name) for name in self.STATE}

    def load_state_dict(self, state):
        """Take over what `state_dict` gave; ValueError where a key does not fit, and nothing is changed."""
        if set(_check.mapping("state", state)) != set(self.STATE):
            raise ValueError(f"plateau state must have the keys {sorted(self.STATE)}, got {sorted(state)}")
        best = state["best"]
        if isinstance(best, bool) or not isinstance(best, numbers.Real):
            raise TypeError(f"best must be a number, got {best!r}")
        counts = [_check.integer(name, state[name], 0) for name in self.STATE[1:]]
        self.best, (self.num_bad_epochs, self.cooldown_counter) = float(best), counts

    def _is_better(self, metric):
        sign = -1 if self.mode == "min" else 1
        if self.threshold_mode == "rel":
            return sign * metric > sign * self.best * (1 + sign * self.threshold)
        return sign * metric > sign * self.best + self.threshold

    def _reduce(self):
        rates = self.optimizer.lr_schedule.copy()
        coming = rates[min(self.optimizer.steps, len(rates) - 1) :]
        lower = np.maximum(coming * self.factor, self.min_lr)
        coming[...] = np.where(coming - lower > self.eps, lower, coming)
        self.optimizer.set_lr_schedule(rates)
