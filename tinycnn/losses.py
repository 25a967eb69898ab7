"""Losses: the value and the gradient of the model's output in one pass."""

import threading
from typing import Any

import numpy as np

from tinycnn import _check
from tinycnn._repr import InitRepr
from tinycnn._tracked import Tracked


class Loss(InitRepr, Tracked):
    """What losses share: buffers, and the call on NumPy arrays.

    `allocate` gives a loss its backend and buffers once; `forward_backward(dx, x, target)` then allocates nothing.  Called as a function, a loss checks its arguments and returns (value, gradient) as NumPy.
    """

    ops: Any = None
    reduction = "mean"
    _allocated_for: tuple | None = None  # what `allocate` was last called with
    _buffer_names: frozenset = frozenset()  # names of what it has set
    lock: Any  # held by who runs it: its buffers are there once

    def __new__(cls, *args, **options):
        self = super().__new__(cls)
        vars(self)["lock"] = threading.RLock()
        return self

    def __setattr__(self, name, value):
        super().__setattr__(name, value)
        if self._allocated_for is not None and not name.startswith("_") and name != "ops":
            self._allocated_for = None  # buffers may depend on it

    def __getstate__(self):
        return {n: v for n, v in super().__getstate__().items() if n not in self._buffer_names and n != "lock"}

    def ensure_allocated(self, k, batch, classes, dtype):
        """`allocate`, unless what is bound already will do."""
        if (
            self._allocated_for is None
            or self._allocated_for[:1] + self._allocated_for[2:] != (k, classes, dtype)
            or self._allocated_for[1] < batch
        ):
            before = {*vars(self)} - self._buffer_names
            self.allocate(k, batch, classes, dtype)
            self._buffer_names = frozenset({*vars(self), "_buffer_names"} - before)
            vars(self)["_allocated_for"] = k, batch, classes, dtype

    def allocate(self, k, batch, classes, dtype):
        """Allocate for batches of up to `batch` outputs of `classes` numbers."""
        self.ops, self._allocated_for = k, (k, batch, classes, dtype)
        self._loss = k.empty((batch,), dtype)
        self._predicted = k.empty((0,), np.int64)
        self._class_weights = k.to_device(self.class_weights(classes) if self.reduction == "mean" else np.zeros(0))

    def class_weights(self, classes):
        """How much an image of each class counts in a mean: (classes,) float64."""
        return np.ones(classes)

    def weighted_sum(self, value, labels):
        """(what the loss `value` of a batch adds to that of a data set, by how much the sum of these is divided)."""
        if self.reduction != "mean":
            return value, 0.0
        share = float(self.class_weights(self._allocated_for[2] if self._allocated_for else 0)[labels].sum())
        return value * share, share

    def forward_backward(self, dx, x, target):
        raise RuntimeError(f"{type(self).__name__} has no forward_backward")

    def predicts_classes(self):
        """Whether the loss predicts a class for each output."""
        return len(self._predicted) > 0

    def predictions(self, batch):
        """Classes (batch,) that the last `forward_backward` predicted, NumPy; None if the loss predicts none."""
        return self.ops.to_host(self._predicted)[:batch] if self.predicts_classes() else None

    def logits(self, outputs):
        """Outputs (N, K) of a model as numbers of which the largest is the prediction."""
        return outputs

    def accumulate_metrics(self, totals, cursor, target):
        """Add the loss of the last `forward_backward`, whose targets these were, to the totals; move the cursor on."""
        n = len(target)
        self.ops.accumulate_metrics(totals, cursor, self._loss[:n], self._predicted[:n], target, self._class_weights)

    def batch_loss(self, batch):
        """The loss of the last `forward_backward` on `batch` images, as a float."""
        return float(self.ops.to_host(self._loss)[:batch].sum(dtype=np.float64))

    def _loss_and_grad(self, name, x, target):
        """(value, gradient with respect to x) for x (images, classes), called `name`, and class numbers (images,)."""
        from tinycnn import devices

        x = as_float(_check.array(name, x, 2, "(images, classes)"))
        target = _check.labels("target", target, len(x), x.shape[1])
        dx = np.empty_like(x)
        with self.lock:
            self.ensure_allocated(devices.get("cpu"), len(x), x.shape[1], x.dtype)
            self.forward_backward(dx, x, target)
            return self.batch_loss(len(x)), dx


class CrossEntropyLoss(Loss):
    """Softmax cross entropy of logits (N, K) against class numbers (N,), with torch's arguments.

    weight           (K,) factor of each class; the mean divides by the sum of the targets' weights
    ignore_index     images with this target count nothing
    reduction        "mean", "sum", or "none" (value per image; the gradient is that of the sum)
    label_smoothing  in [0, 1): this share of the target goes to all classes alike

    Logits of any finite size are safe.
    """

    def __init__(self, weight=None, ignore_index=-100, reduction="mean", label_smoothing=0.0):
        if weight is not None:
            weight = _check.finite("weight", _check.array("weight", weight, 1, "(classes,)"))
            if (weight < 0).any():
                raise ValueError(f"weight must not be negative, got {weight.min():g}")
            weight = weight.copy()  # assign another array to change it: the kernels' copy follows then
            weight.flags.writeable = False
        self.weight = weight
        self.ignore_index = _check.integer("ignore_index", ignore_index)
        self.reduction = _check.choice("reduction", reduction, ("mean", "sum", "none"))
        self.label_smoothing = _check.number("label_smoothing", label_smoothing, 0, maximum=1)

    def allocate(self, k, batch, classes, dtype):
        super().allocate(k, batch, classes, dtype)
        if self.weight is not None and len(self.weight) != classes:
            raise ValueError(f"weight must have {classes} entries, one a class, got {len(self.weight)}")
        weight = np.ones(classes) if self.weight is None else self.weight
        self._weight = k.to_device(np.asarray(weight, dtype))
        self._predicted = k.empty((batch,), np.int64)

    def class_weights(self, classes):
        shares = np.ones(classes) if self.weight is None else np.array(self.weight, np.float64)
        if 0 <= self.ignore_index < classes:
            shares[self.ignore_index] = 0
        return shares

    def forward_backward(self, dx, x, target):
        n = len(x)
        mean = self.reduction == "mean"
        self.ops.cross_entropy(
            self._loss[:n],
            self._predicted[:n],
            dx,
            x,
            target,
            self._weight,
            self.ignore_index,
            self.label_smoothing,
            mean,
        )

    def curvature(self, y, share):
        """Second derivatives of `share` times each image's loss by its own logits y: (N, K) NumPy; the diagonal."""
        if self.weight is not None:
            raise ValueError("second derivatives of a loss with class weights are not known here")
        p = np.exp(y - y.max(axis=1, keepdims=True))
        p /= p.sum(axis=1, keepdims=True)
        return share * p * (1 - p)

    def __call__(self, logits, target):
        """(value, gradient with respect to logits); the value is a float, or (N,) for reduction "none"."""
        from tinycnn import devices

        x = as_float(_check.array("logits", logits, 2, "(images, classes)"))
        target = _check.labels("target", target, len(x), x.shape[1], self.ignore_index)
        if self.reduction == "mean" and not (target != self.ignore_index).any():
            raise ValueError("the mean over no image is not defined: every target is ignore_index")
        dx = np.empty_like(x)
        with self.lock:
            self.ensure_allocated(devices.get("cpu"), len(x), x.shape[1], x.dtype)
            self.forward_backward(dx, x, target)
            return self._loss[: len(x)].copy() if self.reduction == "none" else self.batch_loss(len(x)), dx


class MSELoss(Loss):
    """Mean (or sum) of squared differences; reduction "none" gives the squares (the gradient is that of the sum)."""

    def __init__(self, reduction="mean"):
        self.reduction = _check.choice("reduction", reduction, ("mean", "sum", "none"))

    def forward_backward(self, dx, x, target):
        if target.size != x.size:
            raise ValueError(
                f"MSELoss needs targets of the shape of the output, {tuple(x.shape)}, got {tuple(target.shape)}; "
                "for class numbers there is OneHotMSELoss"
            )
        n = len(x)
        rows = (n, -1)
        self.ops.mse_loss(
            self._loss[:n], dx.reshape(rows), x.reshape(rows), target.reshape(rows), self.reduction == "mean"
        )

    def __call__(self, x, target):
        """(value, gradient with respect to x) for two arrays of one shape."""
        from tinycnn import devices

        x = as_float(_check.array("x", x))
        target = _check.array("target", target)
        if target.shape != x.shape:
            raise ValueError(f"target must have the shape of x, {x.shape}, got {target.shape}")
        target = np.ascontiguousarray(target, x.dtype)
        dx, none = np.empty_like(x), self.reduction == "none"  # then a number counts as an image
        with self.lock:
            self.ensure_allocated(devices.get("cpu"), x.size if none else len(x), 1 if none else x.shape[-1], x.dtype)
            self.forward_backward(*(a.reshape(-1) if none else a for a in (dx, x, target)))
            return self._loss[: x.size].reshape(x.shape).copy() if none else self.batch_loss(len(x)), dx


class OneHotMSELoss(Loss):
    """Mean (or sum) of squared differences between outputs (N, K) and one-hot class numbers (N,): torch's
    ``mse_loss(x, one_hot(target, K).float())``.  The mean is over all N*K numbers."""

    def __init__(self, reduction="mean"):
        self.reduction = _check.choice("reduction", reduction, ("mean", "sum"))

    def allocate(self, k, batch, classes, dtype):
        super().allocate(k, batch, classes, dtype)
        self._rows = k.empty((batch, classes), dtype)
        self._predicted = k.empty((batch,), np.int64)

    def forward_backward(self, dx, x, target):
        n = len(x)
        self.ops.one_hot(self._rows[:n], self._predicted[:n], x, target)
        self.ops.mse_loss(self._loss[:n], dx, x, self._rows[:n], self.reduction == "mean")

    def __call__(self, x, target):
        """(value, gradient with respect to x) for outputs (images, classes) and class numbers (images,)."""
        return self._loss_and_grad("x", x, target)


def as_float(x):
    """x as an array that kernels take: contiguous, writable, float32 or float64; other real types become float32."""
    dtype = np.float64 if x.dtype.newbyteorder("=") == np.float64 else np.float32
    return np.require(x, dtype, ["C", "W"])
