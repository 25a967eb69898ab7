"""Losses: the value and the gradient with respect to the model's output, computed in one pass."""

import math
import threading
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from numpy.typing import ArrayLike

from tinycnn import _check
from tinycnn._repr import InitRepr
from tinycnn._tracked import Tracked
from tinycnn._typing import Array, Backend, DeviceArray, DType, Shape

if TYPE_CHECKING:
    from tinycnn.dataset import DeviceDataset

LossT = TypeVar("LossT", bound="Loss")


class Loss(InitRepr, Tracked):
    """Base class: buffers, and the call on NumPy arrays.

    `allocate` sets the backend and the buffers; `forward_backward(dx, x, target)` then allocates nothing.  Calling a
    loss checks the arguments and returns (value, gradient) as NumPy.

    output_kind  what the model's outputs are for this loss: "logits" (softmax gives probabilities),
                 "log_probabilities", "scores" (the largest is the prediction), "distances" (the smallest is),
                 "label_logits" (sigmoid gives the probability of each label), "values", or None if that is not known

    The targets are those of the data set: class numbers (n,) int64, or floating-point numbers (n, ...).
    """

    output_kind: str | None = None
    ops: Backend
    reduction = "mean"
    lock: Any  # held while the loss is in use: there is one set of buffers
    _allocated_for: tuple[Backend, int, int, DType] | None = None  # arguments of the last `allocate`
    _buffer_names: frozenset[str] = frozenset()  # attributes that `allocate` has set
    _loss: DeviceArray
    _predicted: DeviceArray
    _score: DeviceArray  # another metric of each image; of size 0 if there is none
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
        self._predicted, self._score = ops.empty((0,), np.int64), ops.empty((0,), dtype)
        mean = self.reduction == "mean"
        equal = type(self).class_weights is Loss.class_weights
        weights = np.ones(1) if equal else self.class_weights(classes)
        self._class_weights = ops.to_device(weights if mean else np.zeros(0))
        # For targets that are no class numbers: all images have the same weight.
        self._no_classes, self._equal_weights = ops.empty((batch,), np.int64), ops.to_device(np.ones(1 if mean else 0))
        self._no_prediction, self._no_score = ops.empty((0,), np.int64), ops.empty((0,), dtype)

    def class_weights(self, classes: int) -> Array:
        """Weight of an image of each class in a mean: (classes,) float64."""
        return np.ones(classes)

    def weighted_sum(
        self, value: float, labels: Array | None, sample_weight: Array | None = None, batch: int = 0
    ) -> tuple[float, float]:
        """(term, weight) of a batch with the loss `value`: a data set's loss is sum(terms) / sum(weights) for
        reduction "mean", and sum(terms) otherwise.

        labels  class numbers, or None for other targets of `batch` images     sample_weight  a weight an image
        """
        if self.reduction != "mean":
            return value, 0.0
        weights = np.ones(batch)
        if labels is not None:
            weights = self.class_weights(self._allocated_for[2] if self._allocated_for else 0)[labels]
        weight = float((weights if sample_weight is None else weights * sample_weight).sum())
        return value * weight, weight

    def check_targets(self, name: str, dataset: "DeviceDataset", output_shape: Shape) -> None:
        """ValueError or TypeError unless the loss takes the targets of `dataset`, which the message calls `name`, for
        a model's outputs (N, *output_shape).  The base class takes all: a subclass says what it needs."""

    def forward_backward(self, dx: DeviceArray, x: DeviceArray, target: DeviceArray) -> None:
        """Compute the loss of the outputs x (n, ...) and write its gradient into dx, of the same shape."""
        raise RuntimeError(f"{type(self).__name__} has no forward_backward")

    def weight_samples(self, dx: DeviceArray, target: DeviceArray, sample_weight: DeviceArray) -> None:
        """Weight the images of the last `forward_backward`, which wrote dx: multiply loss and gradient of each by its
        weight (n,).  The mean over a batch becomes sum(weight * loss) / sum(weight)."""
        n = len(dx)
        labels, weights = self._weights_of(target)
        self.ops.weight_samples(self._loss[:n], dx.reshape((n, -1)), labels, weights, sample_weight)

    def _weights_of(self, target: DeviceArray) -> tuple[DeviceArray, DeviceArray]:
        """The class numbers of a batch and the weight of each class, for kernels."""
        if is_class_numbers(target):
            return target, self._class_weights
        return self._no_classes[: len(target)], self._equal_weights

    def predicts_classes(self) -> bool:
        """Whether the loss computes predicted classes."""
        return len(self._predicted) > 0

    def predictions(self, batch: int) -> Array | None:
        """Predicted classes (batch,) of the last `forward_backward`, NumPy; None if the loss does not compute them."""
        return self.ops.to_host(self._predicted)[:batch] if self.predicts_classes() else None

    def metric_name(self, class_numbers: bool) -> str | None:
        """Name of the metric that the loss computes, for targets that are class numbers or not; None for none.
        "accuracy" if it predicts classes."""
        return "accuracy" if class_numbers and self.predicts_classes() else None

    def batch_metric(self, batch: int, labels: Array | None) -> float:
        """Sum of the metric over the images of the last `forward_backward`; labels: as for `weighted_sum`"""
        if labels is not None:
            predicted = self.predictions(batch)
            return math.nan if predicted is None else float(np.count_nonzero(predicted == labels))
        return float(self.ops.to_host(self._score)[:batch].sum(dtype=np.float64))

    def logits(self, outputs: Array) -> Array:
        """Outputs (N, K) of a model as scores whose maximum is the prediction."""
        return outputs

    def accumulate_metrics(
        self,
        totals: DeviceArray,
        cursor: DeviceArray,
        target: DeviceArray,
        sample_weight: DeviceArray | None = None,
    ) -> None:
        """Add the result of the last `forward_backward`, on `target`, to totals; advance the cursor."""
        n = len(target)
        labels, weights = self._weights_of(target)
        class_numbers = labels is target
        self.ops.accumulate_metrics(
            totals, cursor, self._loss[:n], self._predicted[:n] if class_numbers else self._no_prediction,
            self._no_score if class_numbers else self._score[:n], labels, weights,
            self._no_score if sample_weight is None else sample_weight,
        )  # fmt: skip

    def batch_loss(self, batch: int) -> float:
        """Value of the last `forward_backward`, which was on `batch` images."""
        return float(self.ops.to_host(self._loss)[:batch].sum(dtype=np.float64))

    def _loss_and_grad(self, name: str, x: ArrayLike, target: ArrayLike) -> tuple[float, Array]:
        """(value, gradient with respect to x) for x (images, classes), called `name`, and class numbers (images,)."""
        x = as_float(_check.array(name, x, 2, "(images, classes)"))
        value, dx = _call(self, x, _check.labels("target", target, len(x), x.shape[1]))
        return float(value), dx


class _ClassLoss(Loss):
    """Base class of losses that take class numbers and predict classes."""

    def allocate(self, ops: Backend, batch: int, classes: int, dtype: DType) -> None:
        super().allocate(ops, batch, classes, dtype)
        self._predicted = ops.empty((batch,), np.int64)

    def check_targets(self, name: str, dataset: "DeviceDataset", output_shape: Shape) -> None:
        if dataset.classes is None:
            raise TypeError(
                f"{name}: {type(self).__name__} needs class numbers (N,), got floating-point targets of shape "
                f"{dataset.target_shape} an image; for these there is {_OTHER_LOSSES}"
            )
        if len(output_shape) != 1 or output_shape[0] < dataset.classes:
            raise ValueError(
                f"{name}: labels go up to {dataset.classes - 1}, but the model's output has shape {output_shape}"
            )


_OTHER_LOSSES = "MSELoss, L1Loss, HuberLoss or BCEWithLogitsLoss"


def is_class_numbers(target: DeviceArray) -> bool:
    """Whether the targets of a batch are class numbers, not floating-point numbers."""
    return target.dtype.kind in "iu"


def _class_factors(weight: ArrayLike | None) -> Array | None:
    """The argument `weight` of a loss of classes."""
    if weight is None:
        return None
    weights: Array = _check.finite("weight", _check.array("weight", weight, 1, "(classes,)"))
    if (weights < 0).any():
        raise ValueError(f"weight must not be negative, got {weights.min():g}")
    weights = weights.copy()
    weights.flags.writeable = False  # the device has a copy: to change the weights, assign another array
    return weights


def _checked_factors(weight: Array | None, classes: int, dtype: DType) -> Array:
    """The factors of all classes, as a kernel takes them."""
    if weight is not None and len(weight) != classes:
        raise ValueError(f"weight must have {classes} entries, one a class, got {len(weight)}")
    return np.asarray(np.ones(classes) if weight is None else weight, dtype)


def _weights_without_ignored(weight: Array | None, ignore_index: int, classes: int) -> Array:
    weights = np.ones(classes) if weight is None else np.array(weight, np.float64)
    if 0 <= ignore_index < classes:
        weights[ignore_index] = 0
    return weights


def _call(loss: Loss, x: Array, target: Array) -> tuple[float | Array, Array]:
    """(value, gradient with respect to x) of a loss, for arrays that kernels take."""
    from tinycnn import devices

    dx = np.empty_like(x)
    with loss.lock:
        loss.ensure_allocated(devices.get("cpu"), len(x), x.shape[-1], x.dtype)
        loss.forward_backward(dx, x, target)
        return loss._loss[: len(x)].copy() if loss.reduction == "none" else loss.batch_loss(len(x)), dx


def _call_with_class_numbers(loss: Loss, x: Array, target: ArrayLike, ignore_index: int) -> tuple[float | Array, Array]:
    numbers = _check.labels("target", target, len(x), x.shape[1], ignore_index)
    if loss.reduction == "mean" and not (numbers != ignore_index).any():
        raise ValueError("the mean over no images is undefined: every target is ignore_index")
    return _call(loss, x, numbers)


class CrossEntropyLoss(_ClassLoss):
    """Softmax cross entropy of logits (N, K) against class numbers (N,), or against probabilities (N, K) of the
    classes, with torch's arguments.

    weight           (K,) factor of each class; the mean is divided by the sum of the targets' weights, or, with
                     probabilities, by N
    ignore_index     images with this class number are left out
    reduction        "mean", "sum", or "none" (one value per image; the gradient is that of the sum)
    label_smoothing  0 ... 1: this fraction of the target is spread evenly over all classes

    Numerically stable for all finite logits.
    """

    output_kind = "logits"

    def __init__(
        self,
        weight: ArrayLike | None = None,
        ignore_index: int = -100,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
    ) -> None:
        self.weight = _class_factors(weight)
        self.ignore_index = _check.integer("ignore_index", ignore_index)
        self.reduction = _check.choice("reduction", reduction, ("mean", "sum", "none"))
        self.label_smoothing = _check.number("label_smoothing", label_smoothing, 0, maximum=1)

    def allocate(self, ops: Backend, batch: int, classes: int, dtype: DType) -> None:
        super().allocate(ops, batch, classes, dtype)
        self._weight = ops.to_device(_checked_factors(self.weight, classes, dtype))
        self._score = ops.empty((batch,), dtype)

    def class_weights(self, classes: int) -> Array:
        return _weights_without_ignored(self.weight, self.ignore_index, classes)

    def check_targets(self, name: str, dataset: "DeviceDataset", output_shape: Shape) -> None:
        if dataset.classes is not None:
            super().check_targets(name, dataset, output_shape)
            return
        hint = f"for other numbers there is {_OTHER_LOSSES}"
        expected = f"class numbers, or probabilities of the classes of shape {output_shape}"
        if len(output_shape) != 1 or dataset.target_shape != output_shape:
            raise ValueError(
                f"{name}: {type(self).__name__} needs {expected}, got floating-point targets of shape "
                f"{dataset.target_shape}; {hint}"
            )
        low, high = dataset.target_range()
        if low < 0 or high > 1:
            raise ValueError(
                f"{name}: {type(self).__name__} needs {expected}, got numbers from {low:g} to {high:g}; {hint}"
            )

    def metric_name(self, class_numbers: bool) -> str | None:
        return "accuracy"

    def forward_backward(self, dx: DeviceArray, x: DeviceArray, target: DeviceArray) -> None:
        n, mean = len(x), self.reduction == "mean"
        if target.ndim == 1:
            self.ops.cross_entropy(
                self._loss[:n], self._predicted[:n], dx, x, target, self._weight, self.ignore_index,
                self.label_smoothing, mean,
            )  # fmt: skip
        else:
            self.ops.soft_cross_entropy(
                self._loss[:n], self._predicted[:n], self._score[:n], dx, x, target, self._weight,
                self.label_smoothing, mean,
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
        x = as_float(_check.array("logits", logits, 2, "(images, classes)"))
        probabilities = _check.array("target", target)
        if probabilities.dtype.kind != "f":
            return _call_with_class_numbers(self, x, target, self.ignore_index)
        if probabilities.shape != x.shape:
            raise TypeError(
                f"target must be integer class numbers ({len(x)},), or probabilities of the shape of the logits, "
                f"{x.shape}, got dtype {probabilities.dtype}, shape {probabilities.shape}"
            )
        return _call(self, x, np.ascontiguousarray(probabilities, x.dtype))


class NLLLoss(_ClassLoss):
    """Negative log-likelihood of log-probabilities (N, K), the outputs of `LogSoftmax`, against class numbers (N,),
    with torch's arguments.

    weight        (K,) factor of each class; the mean is divided by the sum of the targets' weights
    ignore_index  images with this target are left out
    reduction     "mean", "sum", or "none" (one value per image; the gradient is that of the sum)
    """

    output_kind = "log_probabilities"

    def __init__(self, weight: ArrayLike | None = None, ignore_index: int = -100, reduction: str = "mean") -> None:
        self.weight = _class_factors(weight)
        self.ignore_index = _check.integer("ignore_index", ignore_index)
        self.reduction = _check.choice("reduction", reduction, ("mean", "sum", "none"))

    def allocate(self, ops: Backend, batch: int, classes: int, dtype: DType) -> None:
        super().allocate(ops, batch, classes, dtype)
        self._weight = ops.to_device(_checked_factors(self.weight, classes, dtype))

    def class_weights(self, classes: int) -> Array:
        return _weights_without_ignored(self.weight, self.ignore_index, classes)

    def forward_backward(self, dx: DeviceArray, x: DeviceArray, target: DeviceArray) -> None:
        n, mean = len(x), self.reduction == "mean"
        self.ops.nll_loss(
            self._loss[:n], self._predicted[:n], dx, x, target, self._weight, self.ignore_index, mean
        )  # fmt: skip

    def __call__(self, log_probabilities: ArrayLike, target: ArrayLike) -> tuple[float | Array, Array]:
        """(value, gradient with respect to the log-probabilities); the value is (N,) for reduction "none"."""
        x = as_float(_check.array("log_probabilities", log_probabilities, 2, "(images, classes)"))
        return _call_with_class_numbers(self, x, target, self.ignore_index)


class _ElementwiseLoss(Loss):
    """Base class of losses that compare every number of the output with a target: outputs and targets (N, ...).

    reduction  "mean" over all numbers, "sum", or "none" (one value a number, or, in training, an image; the gradient
               is that of the sum)
    """

    output_kind: str | None = "values"

    def __init__(self, reduction: str = "mean") -> None:
        self.reduction = _check.choice("reduction", reduction, ("mean", "sum", "none"))

    def allocate(self, ops: Backend, batch: int, classes: int, dtype: DType) -> None:
        super().allocate(ops, batch, classes, dtype)
        self._score = ops.empty((batch,), dtype)

    def check_targets(self, name: str, dataset: "DeviceDataset", output_shape: Shape) -> None:
        loss = type(self).__name__
        if dataset.classes is not None:
            raise ValueError(
                f"{name}: {loss} needs floating-point targets of the shape of the output, (N, "
                f"{', '.join(map(str, output_shape))}), got class numbers (N,); for class numbers there is "
                "OneHotMSELoss, and labels.astype(float) makes them floating-point numbers"
            )
        if not _same_numbers(dataset.target_shape, output_shape):
            raise ValueError(
                f"{name}: {loss} needs targets of the shape of the model's output, {output_shape} an image, got "
                f"{dataset.target_shape}"
            )

    def metric_name(self, class_numbers: bool) -> str | None:
        return "mae"

    def forward_backward(self, dx: DeviceArray, x: DeviceArray, target: DeviceArray) -> None:
        if target.size != x.size:
            raise ValueError(
                f"{type(self).__name__} needs targets of the shape of the output, {tuple(x.shape)}, got "
                f"{tuple(target.shape)}; for class numbers there is OneHotMSELoss"
            )
        n, rows = len(x), (len(x), -1)
        self._run_kernels(self._loss[:n], self._score[:n], dx.reshape(rows), x.reshape(rows), target.reshape(rows))

    def _run_kernels(
        self, loss: DeviceArray, score: DeviceArray, dx: DeviceArray, x: DeviceArray, target: DeviceArray
    ) -> None:
        """Compute losses and metric (n,), and the gradient, from rows (n, F)."""
        raise NotImplementedError

    def __call__(self, x: ArrayLike, target: ArrayLike) -> tuple[float | Array, Array]:
        """(value, gradient with respect to x) for two arrays of one shape."""
        from tinycnn import devices

        x = as_float(_check.array("x", x))
        values: Array = _check.array("target", target)
        if values.shape != x.shape:
            raise ValueError(f"target must have the shape of x, {x.shape}, got {values.shape}")
        values = np.ascontiguousarray(values, x.dtype)
        self._check_call(x, values)
        per_number = self.reduction == "none" or x.ndim == 0  # kernels see one number per image
        dx = np.empty_like(x)
        batch, classes = (x.size, 1) if per_number else (len(x), x.shape[-1])
        with self.lock:
            self.ensure_allocated(devices.get("cpu"), batch, classes, x.dtype)
            self.forward_backward(*(a.reshape(-1) if per_number else a for a in (dx, x, values)))
            value = self.batch_loss(batch) if self.reduction != "none" else self._loss[:batch].reshape(x.shape).copy()
            return value, dx

    def _check_call(self, x: Array, target: Array) -> None:
        """ValueError for arrays of one shape that the loss does not take."""


def _same_numbers(target_shape: Shape, output_shape: Shape) -> bool:
    """Whether targets of an image fit an output: one shape, apart from axes of length 1, or one of them is flat."""
    squeezed = [tuple(n for n in shape if n != 1) for shape in (target_shape, output_shape)]
    flat = min(map(len, squeezed)) <= 1
    return squeezed[0] == squeezed[1] or (flat and math.prod(target_shape) == math.prod(output_shape))


class MSELoss(_ElementwiseLoss):
    """Squared differences of outputs and targets (N, ...), as torch's.

    reduction  "mean" over all numbers, "sum", or "none" (one value a number, or, in training, an image; the gradient
               is that of the sum)
    """

    def _run_kernels(
        self, loss: DeviceArray, score: DeviceArray, dx: DeviceArray, x: DeviceArray, target: DeviceArray
    ) -> None:
        self.ops.mse_loss(loss, dx, x, target, self.reduction == "mean")
        self.ops.absolute_error(score, x, target)


class L1Loss(_ElementwiseLoss):
    """Absolute differences of outputs and targets (N, ...), as torch's: the gradient of a difference of 0 is 0.

    reduction  as for `MSELoss`
    """

    def _run_kernels(
        self, loss: DeviceArray, score: DeviceArray, dx: DeviceArray, x: DeviceArray, target: DeviceArray
    ) -> None:
        self.ops.l1_loss(loss, dx, x, target, self.reduction == "mean")
        self.ops.absolute_error(score, x, target)


class HuberLoss(_ElementwiseLoss):
    """Half the squared difference e of outputs and targets (N, ...) up to delta, delta * (abs(e) - delta/2) beyond it:
    torch's, Huber 1964.

    reduction  as for `MSELoss`     delta  > 0
    """

    def __init__(self, reduction: str = "mean", delta: float = 1.0) -> None:
        super().__init__(reduction)
        self.delta = _check.number("delta", delta, 0)
        if self.delta == 0:
            raise ValueError("delta must be positive, got 0")

    def _run_kernels(
        self, loss: DeviceArray, score: DeviceArray, dx: DeviceArray, x: DeviceArray, target: DeviceArray
    ) -> None:
        self.ops.huber_loss(loss, dx, x, target, self.delta, self.reduction == "mean")
        self.ops.absolute_error(score, x, target)


class BCEWithLogitsLoss(_ElementwiseLoss):
    """Cross entropy of the sigmoid of every output (N, ...) against targets 0 ... 1: several labels an image, with
    torch's arguments.

    weight      factor of each output: a number or an array whose shape is that of the output's last axes, (K,); the
                mean is not divided by it
    reduction   as for `MSELoss`
    pos_weight  factor of the positive answers, of the same shapes; above 1 it raises recall, below 1 precision

    Numerically stable for all finite logits.
    """

    output_kind = "label_logits"

    def __init__(
        self, weight: ArrayLike | None = None, reduction: str = "mean", pos_weight: ArrayLike | None = None
    ) -> None:
        super().__init__(reduction)
        self.weight, self.pos_weight = _label_factors("weight", weight), _label_factors("pos_weight", pos_weight)

    def allocate(self, ops: Backend, batch: int, classes: int, dtype: DType) -> None:
        super().allocate(ops, batch, classes, dtype)
        self._weight, self._pos_weight = (
            ops.to_device(np.ones(1, dtype) if a is None else np.ravel(a).astype(dtype))
            for a in (self.weight, self.pos_weight)
        )

    def check_targets(self, name: str, dataset: "DeviceDataset", output_shape: Shape) -> None:
        super().check_targets(name, dataset, output_shape)
        self._check_factors(output_shape)
        low, high = dataset.target_range()
        if low < 0 or high > 1:
            raise ValueError(
                f"{name}: {type(self).__name__} needs targets in 0 ... 1, got numbers from {low:g} to {high:g}"
            )

    def _check_factors(self, shape: Shape) -> None:
        for name, factors in (("weight", self.weight), ("pos_weight", self.pos_weight)):
            if factors is not None and factors.size > 1 and factors.shape != shape[-factors.ndim :]:
                raise ValueError(
                    f"{name} must be a number or have the shape of the output's last axes, {shape[-factors.ndim :]}, "
                    f"got {factors.shape}"
                )

    def _check_call(self, x: Array, target: Array) -> None:
        self._check_factors(x.shape)

    def metric_name(self, class_numbers: bool) -> str | None:
        return "binary_accuracy"

    def _run_kernels(
        self, loss: DeviceArray, score: DeviceArray, dx: DeviceArray, x: DeviceArray, target: DeviceArray
    ) -> None:
        self.ops.binary_cross_entropy_with_logits(
            loss, score, dx, x, target, self._weight, self._pos_weight, self.reduction == "mean"
        )


def _label_factors(name: str, value: ArrayLike | None) -> Array | None:
    """A factor of each label, read-only."""
    if value is None:
        return None
    factors: Array = _check.finite(name, _check.array(name, value))
    if (factors < 0).any():
        raise ValueError(f"{name} must not be negative, got {factors.min():g}")
    factors = factors.copy()
    factors.flags.writeable = False  # the device has a copy: to change the factors, assign another array
    return factors


class OneHotMSELoss(_ClassLoss):
    """Mean (or sum) of squared differences between outputs (N, K) and one-hot class numbers (N,): torch's
    ``mse_loss(x, one_hot(target, K).float())``.  The mean is over all N*K numbers."""

    output_kind = "scores"

    def __init__(self, reduction: str = "mean") -> None:
        self.reduction = _check.choice("reduction", reduction, ("mean", "sum"))

    def allocate(self, ops: Backend, batch: int, classes: int, dtype: DType) -> None:
        super().allocate(ops, batch, classes, dtype)
        self._rows = ops.empty((batch, classes), dtype)

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
