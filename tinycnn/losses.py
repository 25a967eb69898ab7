"""Losses: the value and the gradient with respect to the model's output, computed in one pass."""

import threading
from typing import Any, TypeVar

import numpy as np
from numpy.typing import ArrayLike

from tinycnn import _check
from tinycnn._repr import InitRepr
from tinycnn._tracked import Tracked
from tinycnn._typing import Array, Backend, DeviceArray, DType

LossT = TypeVar("LossT", bound="Loss")


class Loss(InitRepr, Tracked):
    """Base class: buffers, and the call on NumPy arrays.

    `allocate` sets the backend and the buffers; `forward_backward(dx, x, target)` then allocates nothing.  Calling a
    loss checks the arguments and returns (value, gradient) as NumPy.
    """

    ops: Backend
    reduction = "mean"
    lock: Any  # held while the loss is in use: there is one set of buffers
    _allocated_for: tuple[Backend, int, int, DType] | None = None  # arguments of the last `allocate`
    _buffer_names: frozenset[str] = frozenset()  # attributes that `allocate` has set
    _loss: DeviceArray
    _predicted: DeviceArray
    _class_weights: DeviceArray

    def __new__(cls: type[LossT], *args: Any, **kwargs: Any) -> LossT:
        self = super().__new__(cls)
        vars(self)["lock"] = threading.RLock()
        return self

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if self._allocated_for is not None and not name.startswith("_") and name != "ops":
            self._allocated_for = None  # the buffers may depend on it

    def __getstate__(self) -> dict[str, Any]:
        return {n: v for n, v in super().__getstate__().items() if n not in self._buffer_names and n != "lock"}

    def ensure_allocated(self, ops: Backend, batch: int, classes: int, dtype: DType) -> None:
        """`allocate`, unless the present buffers fit."""
        current = self._allocated_for
        if current is None or (current[0], *current[2:]) != (ops, classes, dtype) or current[1] < batch:
            other_names = {*vars(self)} - self._buffer_names
            self.allocate(ops, batch, classes, dtype)
            self._buffer_names = frozenset({*vars(self), "_buffer_names"} - other_names)
            vars(self)["_allocated_for"] = ops, batch, classes, dtype

    def allocate(self, ops: Backend, batch: int, classes: int, dtype: DType) -> None:
        """Allocate for batches of up to `batch` outputs of `classes` numbers.  Subclasses add their own buffers."""
        self.ops, self._allocated_for = ops, (ops, batch, classes, dtype)
        self._loss = ops.empty((batch,), dtype)
        self._predicted = ops.empty((0,), np.int64)
        self._class_weights = ops.to_device(self.class_weights(classes) if self.reduction == "mean" else np.zeros(0))

    def class_weights(self, classes: int) -> Array:
        """Weight of an image of each class in a mean: (classes,) float64."""
        return np.ones(classes)

    def weighted_sum(self, value: float, labels: Array) -> tuple[float, float]:
        """(term, weight) of a batch with the loss `value`: a data set's loss is sum(terms) / sum(weights) for
        reduction "mean", and sum(terms) otherwise."""
        if self.reduction != "mean":
            return value, 0.0
        weight = float(self.class_weights(self._allocated_for[2] if self._allocated_for else 0)[labels].sum())
        return value * weight, weight

    def forward_backward(self, dx: DeviceArray, x: DeviceArray, target: DeviceArray) -> None:
        """Compute the loss of the outputs x (n, ...) and write its gradient into dx, of the same shape."""
        raise RuntimeError(f"{type(self).__name__} has no forward_backward")

    def predicts_classes(self) -> bool:
        """Whether the loss computes predicted classes."""
        return len(self._predicted) > 0

    def predictions(self, batch: int) -> Array | None:
        """Predicted classes (batch,) of the last `forward_backward`, NumPy; None if the loss does not compute them."""
        return self.ops.to_host(self._predicted)[:batch] if self.predicts_classes() else None

    def logits(self, outputs: Array) -> Array:
        """Outputs (N, K) of a model as scores whose maximum is the prediction."""
        return outputs

    def accumulate_metrics(self, totals: DeviceArray, cursor: DeviceArray, target: DeviceArray) -> None:
        """Add the result of the last `forward_backward`, on `target`, to totals; advance the cursor."""
        n = len(target)
        self.ops.accumulate_metrics(totals, cursor, self._loss[:n], self._predicted[:n], target, self._class_weights)

    def batch_loss(self, batch: int) -> float:
        """Value of the last `forward_backward`, which was on `batch` images."""
        return float(self.ops.to_host(self._loss)[:batch].sum(dtype=np.float64))

    def _loss_and_grad(self, name: str, x: ArrayLike, target: ArrayLike) -> tuple[float, Array]:
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

    weight           (K,) factor of each class; the mean is divided by the sum of the targets' weights
    ignore_index     images with this target are left out
    reduction        "mean", "sum", or "none" (one value per image; the gradient is that of the sum)
    label_smoothing  0 ... 1: this fraction of the target is spread evenly over all classes

    Numerically stable for all finite logits.
    """

    def __init__(
        self,
        weight: ArrayLike | None = None,
        ignore_index: int = -100,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
    ) -> None:
        self.weight: Array | None = None
        if weight is not None:
            weights: Array = _check.finite("weight", _check.array("weight", weight, 1, "(classes,)"))
            if (weights < 0).any():
                raise ValueError(f"weight must not be negative, got {weights.min():g}")
            self.weight = weights.copy()
            self.weight.flags.writeable = False  # the device has a copy: to change the weights, assign another array
        self.ignore_index = _check.integer("ignore_index", ignore_index)
        self.reduction = _check.choice("reduction", reduction, ("mean", "sum", "none"))
        self.label_smoothing = _check.number("label_smoothing", label_smoothing, 0, maximum=1)

    def allocate(self, ops: Backend, batch: int, classes: int, dtype: DType) -> None:
        super().allocate(ops, batch, classes, dtype)
        if self.weight is not None and len(self.weight) != classes:
            raise ValueError(f"weight must have {classes} entries, one a class, got {len(self.weight)}")
        weight = np.ones(classes) if self.weight is None else self.weight
        self._weight = ops.to_device(np.asarray(weight, dtype))
        self._predicted = ops.empty((batch,), np.int64)

    def class_weights(self, classes: int) -> Array:
        weights = np.ones(classes) if self.weight is None else np.array(self.weight, np.float64)
        if 0 <= self.ignore_index < classes:
            weights[self.ignore_index] = 0
        return weights

    def forward_backward(self, dx: DeviceArray, x: DeviceArray, target: DeviceArray) -> None:
        n, mean = len(x), self.reduction == "mean"
        self.ops.cross_entropy(
            self._loss[:n], self._predicted[:n], dx, x, target, self._weight, self.ignore_index, self.label_smoothing,
            mean,
        )  # fmt: skip

    def curvature(self, y: Array, scale: float) -> Array:
        """Diagonal second derivatives of `scale` times each image's loss in its logits y, (N, K) NumPy."""
        if self.weight is not None:
            raise ValueError("second derivatives of a loss with class weights are not implemented")
        p = np.exp(y - y.max(axis=1, keepdims=True))
        p /= p.sum(axis=1, keepdims=True)
        diagonal: Array = scale * p * (1 - p)
        return diagonal

    def __call__(self, logits: ArrayLike, target: ArrayLike) -> tuple[float | Array, Array]:
        """(value, gradient with respect to logits).  The value is a float, or (N,) for reduction "none"."""
        from tinycnn import devices

        x = as_float(_check.array("logits", logits, 2, "(images, classes)"))
        target = _check.labels("target", target, len(x), x.shape[1], self.ignore_index)
        if self.reduction == "mean" and not (target != self.ignore_index).any():
            raise ValueError("the mean over no images is undefined: every target is ignore_index")
        dx = np.empty_like(x)
        with self.lock:
            self.ensure_allocated(devices.get("cpu"), len(x), x.shape[1], x.dtype)
            self.forward_backward(dx, x, target)
            return self._loss[: len(x)].copy() if self.reduction == "none" else self.batch_loss(len(x)), dx


class MSELoss(Loss):
    """Mean (or sum) of squared differences; reduction "none" gives the squares (the gradient is that of the sum)."""

    def __init__(self, reduction: str = "mean") -> None:
        self.reduction = _check.choice("reduction", reduction, ("mean", "sum", "none"))

    def forward_backward(self, dx: DeviceArray, x: DeviceArray, target: DeviceArray) -> None:
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

    def __call__(self, x: ArrayLike, target: ArrayLike) -> tuple[float | Array, Array]:
        """(value, gradient with respect to x) for two arrays of one shape."""
        from tinycnn import devices

        x = as_float(_check.array("x", x))
        values: Array = _check.array("target", target)
        if values.shape != x.shape:
            raise ValueError(f"target must have the shape of x, {x.shape}, got {values.shape}")
        values = np.ascontiguousarray(values, x.dtype)
        dx, per_number = np.empty_like(x), self.reduction == "none"  # per_number: kernels see one number per image
        batch, classes = (x.size, 1) if per_number else (len(x), x.shape[-1])
        with self.lock:
            self.ensure_allocated(devices.get("cpu"), batch, classes, x.dtype)
            self.forward_backward(*(a.reshape(-1) if per_number else a for a in (dx, x, values)))
            return self._loss[: x.size].reshape(x.shape).copy() if per_number else self.batch_loss(len(x)), dx


class OneHotMSELoss(Loss):
    """Mean (or sum) of squared differences between outputs (N, K) and one-hot class numbers (N,): torch's
    ``mse_loss(x, one_hot(target, K).float())``.  The mean is over all N*K numbers."""

    def __init__(self, reduction: str = "mean") -> None:
        self.reduction = _check.choice("reduction", reduction, ("mean", "sum"))

    def allocate(self, ops: Backend, batch: int, classes: int, dtype: DType) -> None:
        super().allocate(ops, batch, classes, dtype)
        self._rows = ops.empty((batch, classes), dtype)
        self._predicted = ops.empty((batch,), np.int64)

    def forward_backward(self, dx: DeviceArray, x: DeviceArray, target: DeviceArray) -> None:
        n = len(x)
        self.ops.one_hot(self._rows[:n], self._predicted[:n], x, target)
        self.ops.mse_loss(self._loss[:n], dx, x, self._rows[:n], self.reduction == "mean")

    def __call__(self, x: ArrayLike, target: ArrayLike) -> tuple[float, Array]:
        """(value, gradient with respect to x) for outputs (images, classes) and class numbers (images,)."""
        return self._loss_and_grad("x", x, target)


def as_float(x: Array) -> Array:
    """x as an array that kernels take: contiguous, writable, float32 or float64; other real types become float32."""
    dtype = np.float64 if x.dtype.newbyteorder("=") == np.float64 else np.float32
    return np.require(x, dtype, ["C", "W"])
