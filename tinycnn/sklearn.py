"""Estimators for scikit-learn: `CNNClassifier` and `CNNRegressor`.

    from tinycnn.sklearn import CNNClassifier
    cross_val_score(CNNClassifier(epochs=10), images, labels)

They need scikit-learn: ``pip install "tinycnn[sklearn]"``.
"""

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import numpy as np

try:
    from sklearn.base import BaseEstimator, ClassifierMixin, RegressorMixin
    from sklearn.model_selection import train_test_split
    from sklearn.utils import check_random_state
    from sklearn.utils.class_weight import compute_class_weight
    from sklearn.utils.multiclass import check_classification_targets
    from sklearn.utils.validation import _check_sample_weight, check_is_fitted, validate_data
except ImportError as error:
    raise ImportError(f'tinycnn.sklearn needs scikit-learn 1.6: pip install "tinycnn[sklearn]" ({error})') from error

from tinycnn import _check, devices
from tinycnn._typing import Array, Shape
from tinycnn.callbacks import EarlyStopping
from tinycnn.dataset import DeviceDataset, unit_of
from tinycnn.layers import Conv2d, Flatten, Layer, Linear, MaxPool2d, ReLU
from tinycnn.losses import CrossEntropyLoss, Loss, MSELoss
from tinycnn.model import Sequential
from tinycnn.optim import EMA, SGD, Adam, AdamW, Optimizer, RMSprop
from tinycnn.train import fit

__all__ = ["CNNClassifier", "CNNRegressor", "default_layers"]

Layers: TypeAlias = Sequence[Layer] | Callable[[Shape, int], Sequence[Layer]] | None
OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {
    "adamw": AdamW,
    "adam": Adam,
    "rmsprop": RMSprop,
    "sgd": lambda model, lr, **options: SGD(model, lr, momentum=0.9, **options),
}
SMALLEST_IMAGE = 8  # pixels a side; smaller ones get no convolution
PREDICTION_BATCH = 256


def default_layers(input_shape: Shape, outputs: int) -> list[Layer]:
    """The layers of an estimator with ``layers=None``, for images (C, H, W).

    Blocks of a 3x3 convolution, ReLU and 2x2 max pooling, with 16, 32, 64, 64 ... maps, until a side is shorter than 8;
    then Linear(128), ReLU and Linear(outputs).  Images with a side shorter than 8, and data that are no images, get
    Linear(64), ReLU and Linear(outputs).
    """
    channels, height, width = input_shape
    layers: list[Layer] = []
    maps, hidden = 16, 64
    while min(height, width) >= SMALLEST_IMAGE:
        layers += [Conv2d(channels, maps, 3, padding=1), ReLU(), MaxPool2d(2)]
        channels, height, width = maps, height // 2, width // 2
        maps, hidden = min(2 * maps, 64), 128
    return [*layers, Flatten(), Linear(channels * height * width, hidden), ReLU(), Linear(hidden, outputs)]


class _CNN(BaseEstimator):
    """Base class of the estimators."""

    model_: Sequential
    history_: list[dict[str, Any]]
    _optimizer: Any
    _random: np.random.RandomState
    _y_options: dict[str, Any]  # of `validate_data`
    _output: str  # what an output is for

    def __init__(
        self,
        layers: Layers = None,
        *,
        image_shape: Shape | None = None,
        optimizer: str | Callable[[Sequential], Optimizer | EMA] = "adamw",
        lr: float = 1e-3,
        epochs: int = 30,
        batch_size: int = 32,
        weight_decay: float = 1e-4,
        early_stopping: bool = False,
        validation_fraction: float = 0.1,
        n_iter_no_change: int | None = 10,
        tol: float = 1e-4,
        warm_start: bool = False,
        random_state: Any = None,
        device: str = "cpu",
        verbose: bool = False,
    ) -> None:
        self.layers = layers
        self.image_shape = image_shape
        self.optimizer = optimizer
        self.lr = lr
        self.epochs = epochs
        self.batch_size = batch_size
        self.weight_decay = weight_decay
        self.early_stopping = early_stopping
        self.validation_fraction = validation_fraction
        self.n_iter_no_change = n_iter_no_change
        self.tol = tol
        self.warm_start = warm_start
        self.random_state = random_state
        self.device = device
        self.verbose = verbose

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.three_d_array = True
        return tags

    # --- training -----------------------------------------------------------------------------------------------------

    def _train(self, X: Any, y: Any, sample_weight: Any, *, partial: bool, classes: Any = None) -> Any:
        """`fit`, or one epoch of `partial_fit`."""
        fresh = not hasattr(self, "model_") or not (partial or self.warm_start)
        self._check_parameters()
        images, y, shape = self._validate(X, fresh, y)
        targets, outputs = self._encode(y, fresh, partial, classes)
        weights: Array | None = None
        if sample_weight is not None:
            weights = _check_sample_weight(sample_weight, images)
            if not weights.any():
                raise ValueError("sample_weight must not be all zero")
            if not weights.all():
                images, targets, weights = (array[weights != 0] for array in (images, targets, weights))
        self._check_targets(targets, partial)
        random = check_random_state(self.random_state) if fresh or not partial else self._random
        model = self._new_model(shape, outputs, _seed(random)) if fresh else self.model_
        optimizer = self._new_optimizer(model) if fresh or not partial else self._optimizer
        if not callable(self.optimizer) and optimizer.lr != self.lr:
            optimizer.lr = self.lr  # set_params between two calls of partial_fit
        parts = self._split(targets, _seed(random)) if self.early_stopping and not partial else None
        train, validation = self._datasets(model, images, targets, weights, parts)
        stopping = None
        if not partial and (self.early_stopping or self.n_iter_no_change is not None):
            monitor, patience = "val_loss" if self.early_stopping else "train_loss", self.n_iter_no_change
            stopping = EarlyStopping(
                monitor, self.epochs if patience is None else patience, self.tol, restore_best=bool(self.early_stopping)
            )
        history = fit(
            model, self._criterion(y), optimizer, train, validation=validation, rng=_seed(random),
            epochs=1 if partial else self.epochs, batch_size=self.batch_size, progress=bool(self.verbose),
            callbacks=[] if stopping is None else [stopping], on_epoch=_print_record if self.verbose else None,
        )  # fmt: skip
        self.history_ = history if fresh else [*self.history_, *history]
        self.loss_curve_ = [record["train_loss"] for record in self.history_]
        self.n_iter_, self.image_shape_ = len(self.history_), shape
        self.model_, self._optimizer, self._random = model, optimizer, random
        return self

    def _check_parameters(self) -> None:
        if not callable(self.optimizer):
            _check.choice("optimizer", self.optimizer, tuple(OPTIMIZERS))
        _check.number("lr", self.lr, 0)
        _check.integer("epochs", self.epochs, 1)
        _check.integer("batch_size", self.batch_size, 1)
        _check.number("weight_decay", self.weight_decay, 0)
        _check.number("tol", self.tol, 0)
        if self.n_iter_no_change is not None:
            _check.integer("n_iter_no_change", self.n_iter_no_change, 1)
        if self.early_stopping and _check.number("validation_fraction", self.validation_fraction, 0, below=1) == 0:
            raise ValueError("validation_fraction must be positive, got 0")
        if self.layers is not None and not callable(self.layers):
            expected = "a list of layers, a function (input_shape, outputs) -> list of layers, or None"
            for layer in _check.instance("layers", self.layers, (list, tuple), expected):
                _check.instance("layers", layer, Layer, expected)

    def _new_model(self, shape: Shape, outputs: int, seed: int) -> Sequential:
        if callable(self.layers):
            layers = self.layers(shape, outputs)
        else:
            layers = default_layers(shape, outputs) if self.layers is None else self.layers
        layers = copy.deepcopy(list(layers))  # layers belong to one model
        model = Sequential(*layers, input_shape=shape, rng=seed, device=self.device)
        if model.shapes[-1] != (outputs,):
            raise ValueError(
                f"layers must end in {outputs} outputs, one a {self._output}, got outputs of shape {model.shapes[-1]}"
            )
        return model

    def _new_optimizer(self, model: Sequential) -> Optimizer | EMA:
        if callable(self.optimizer):
            return self.optimizer(model)
        return OPTIMIZERS[self.optimizer](model, self.lr, weight_decay=self.weight_decay)

    def _datasets(
        self,
        model: Sequential,
        images: Array,
        targets: Array,
        weights: Array | None,
        parts: tuple[Array, Array] | None,
    ) -> tuple[DeviceDataset, DeviceDataset | None]:
        """Training and validation set, with the mean and std of the model if it has been trained."""
        scaling: dict[str, Any] = {}
        if model.normalization is not None:
            known, unit = model.normalization, unit_of(images.dtype)
            scaling = {"mean": known.mean * known.unit / unit, "std": known.std * known.unit / unit}
        datasets: list[DeviceDataset] = []
        for part in parts or [slice(None)]:
            if datasets:
                scaling = {"mean": datasets[0].mean, "std": datasets[0].std}
            sample_weight = None if weights is None else weights[part]
            datasets.append(
                DeviceDataset(images[part], targets[part], sample_weight=sample_weight, device=model.device, **scaling)
            )
        return datasets[0], datasets[1] if parts else None

    # --- data ---------------------------------------------------------------------------------------------------------

    def _validate(self, X: Any, reset: bool, y: Any = "no_validation") -> tuple[Array, Any, Shape]:
        """(images (N, C, H, W), y as scikit-learn validates it, (C, H, W)).

        reset  whether X decides the shape, and the number and names of the features; otherwise it must have the known
        """
        device = devices.resolve(self.device) if reset else self.model_.device
        X, y = devices.as_host("X", X, device)[0], devices.as_host("y", y, device)[0]
        if not hasattr(X, "shape"):
            X = np.asarray(X)  # nested lists
        shape: Shape = tuple(X.shape[1:])
        if len(shape) > 1:
            if len(shape) > 3:
                raise ValueError(f"X must have shape (N, features), (N, H, W) or (N, C, H, W), got {tuple(X.shape)}")
            X = _check.array("X", X)
            X = X.reshape(len(X), -1)
            shape = (1, *shape)[-3:]
        if reset and self.image_shape is not None:
            given = _check.image_shape("image_shape", self.image_shape)
            if not 2 <= len(given) <= 3:
                raise ValueError(f"image_shape must be (H, W) or (C, H, W), got {self.image_shape!r}")
            given = (1, *given)[-3:]
            if len(shape) > 1 and shape != given:
                raise ValueError(f"X must have images of image_shape {given}, got {shape}")
        if isinstance(y, str):
            X = validate_data(self, X, reset=reset)
        else:
            X, y = validate_data(self, X, y, reset=reset, **self._y_options)
        if not reset:
            if len(shape) > 1 and shape != self.image_shape_:
                raise ValueError(f"X must have images of shape {self.image_shape_}, as in fit, got {shape}")
            shape = self.image_shape_
        elif len(shape) < 2:
            shape = _guess_shape(X.shape[1]) if self.image_shape is None else given
            if math.prod(shape) != X.shape[1]:
                raise ValueError(
                    f"X must have {math.prod(shape)} features, the pixels of image_shape {self.image_shape}, "
                    f"got {X.shape[1]}"
                )
        return X.reshape(len(X), *shape), y, shape

    def _outputs(self, X: Any) -> Array:
        """The model's outputs (N, K) for images or rows of pixels, float32."""
        check_is_fitted(self)
        images, _, _ = self._validate(X, reset=False)
        known: Any = self.model_.normalization
        # Pixels of all dtypes are scaled alike: uint8 in training, float64 out of a pipeline.
        mean, std = ((known.unit * v)[:, None, None] for v in (known.mean, known.std))
        batches = range(0, len(images), PREDICTION_BATCH)
        return np.concatenate([self.model_.outputs((images[i : i + PREDICTION_BATCH] - mean) / std) for i in batches])


def _seed(random: np.random.RandomState) -> int:
    return int(random.randint(np.iinfo(np.int32).max))


def _guess_shape(features: int) -> Shape:
    """A square grey image if the pixels can be one that is large enough; otherwise a channel for each feature: channels
    are scaled one by one."""
    side = math.isqrt(features)
    return (1, side, side) if side * side == features and side >= SMALLEST_IMAGE else (features, 1, 1)


def _print_record(record: dict[str, Any]) -> None:
    shown = {"train_loss": "training loss", "val_loss": "validation loss"}
    losses = ", ".join(f"{text} {record[name]:.6f}" for name, text in shown.items() if name in record)
    print(f"epoch {record['epoch']}, {losses}")


class CNNClassifier(ClassifierMixin, _CNN):
    """A convolutional network as a scikit-learn classifier, trained with cross entropy.

    layers          None: `default_layers`, by the shape of the images.  Or a list of layers, of which each training
                    makes copies; or a function (input_shape, outputs) -> list of layers, which a search can be made of
    image_shape     (H, W) or (C, H, W) of the images in the rows of a flat X.  None: a square grey image if the number
                    of features is a square of at least 8, otherwise the rows are no images and get a dense network;
                    (features, 1, 1) says so
    optimizer       "adamw", "adam", "rmsprop" or "sgd" (with momentum 0.9), with `lr` and `weight_decay`; or a function
                    (model) -> optimizer, which ignores these two
    epochs, batch_size
                    passes over the images, and images in a step
    early_stopping  keep `validation_fraction` of the images for validation, each class in proportion, stop when the
                    loss on it no longer improves, and use the weights of the best epoch
    n_iter_no_change, tol
                    training stops after so many epochs in a row without an improvement of the loss (of the training
                    set, or of the validation set with `early_stopping`) by more than `tol`; None: never
    warm_start      `fit` continues from the weights of the last `fit`
    class_weight    None, "balanced" (inverse to the number of images), or {class: weight}
    random_state    of the initial weights, the order of the images and the split.  The same integer gives the same
                    bits for any number of threads
    device          "cpu", "cuda", "cuda:1" ..., or "auto"
    verbose         print the losses of each epoch

    X is an array (N, H, W) or (N, C, H, W), rows of pixels (N, features) or a pandas frame of them, of any real type.
    Pixels are scaled to mean 0 and standard deviation 1 of the first training set, for each channel; data that are no
    images for each feature.

    classes_         the classes, sorted; `predict` gives these, in the order of the columns of `predict_proba`
    model_           the trained `Sequential`
    image_shape_     (C, H, W); (features, 1, 1) for data that are no images
    n_features_in_, feature_names_in_
                     number of pixels of an image; names of a frame's columns
    n_iter_, loss_curve_, history_
                     number of epochs, the training loss of each, and their records (see `tinycnn.fit`)
    """

    _output = "class"
    _y_options: dict[str, Any] = {}  # noqa: RUF012

    def __init__(
        self,
        layers: Layers = None,
        *,
        image_shape: Shape | None = None,
        optimizer: str | Callable[[Sequential], Optimizer | EMA] = "adamw",
        lr: float = 1e-3,
        epochs: int = 30,
        batch_size: int = 32,
        weight_decay: float = 1e-4,
        early_stopping: bool = False,
        validation_fraction: float = 0.1,
        n_iter_no_change: int | None = 10,
        tol: float = 1e-4,
        warm_start: bool = False,
        class_weight: Any = None,
        random_state: Any = None,
        device: str = "cpu",
        verbose: bool = False,
    ) -> None:
        super().__init__(
            layers, image_shape=image_shape, optimizer=optimizer, lr=lr, epochs=epochs, batch_size=batch_size,
            weight_decay=weight_decay, early_stopping=early_stopping, validation_fraction=validation_fraction,
            n_iter_no_change=n_iter_no_change, tol=tol, warm_start=warm_start, random_state=random_state,
            device=device, verbose=verbose,
        )  # fmt: skip
        self.class_weight = class_weight

    def fit(self, X: Any, y: Any, sample_weight: Any = None) -> "CNNClassifier":
        """Train on images X and their classes y (N,), numbers or strings.  sample_weight: (N,), not negative

        DivergedError if the loss is not finite.
        """
        self._train(X, y, sample_weight, partial=False)
        return self

    def partial_fit(self, X: Any, y: Any, classes: Any = None, sample_weight: Any = None) -> "CNNClassifier":
        """Train for one epoch on these images.   classes: all that there are; needed in the first call"""
        if self.class_weight == "balanced":
            raise ValueError('class_weight must be None or a dictionary for partial_fit, got "balanced"')
        self._train(X, y, sample_weight, partial=True, classes=classes)
        return self

    def predict(self, X: Any) -> Array:
        """Classes (N,)."""
        best = self._outputs(X).argmax(axis=1)
        predicted: Array = self.classes_[best]
        return predicted

    def predict_proba(self, X: Any) -> Array:
        """Probabilities (N, classes), float64."""
        return np.exp(self.predict_log_proba(X))

    def predict_log_proba(self, X: Any) -> Array:
        """Logarithms of the probabilities (N, classes), float64."""
        logits = self._outputs(X).astype(np.float64)
        logits -= logits.max(axis=1, keepdims=True)
        log_probabilities: Array = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
        return log_probabilities

    def decision_function(self, X: Any) -> Array:
        """Logits (N, classes); of two classes, that of the second less that of the first, (N,)."""
        logits = self._outputs(X)
        return logits[:, 1] - logits[:, 0] if logits.shape[1] == 2 else logits

    def _encode(self, y: Any, fresh: bool, partial: bool, classes: Any) -> tuple[Array, int]:
        """(class numbers (N,) int64, number of classes).  Sets `classes_`."""
        check_classification_targets(y)
        found = np.unique(y)
        if fresh:
            if partial and classes is None:
                raise ValueError("classes must be given in the first call of partial_fit")
            self.classes_ = np.unique(classes) if partial else found
        elif classes is not None and not np.array_equal(self.classes_, np.unique(classes)):
            raise ValueError(f"classes must be those of the first call, {self.classes_}, got {classes!r}")
        if len(self.classes_) < 2:
            raise ValueError(f"y must have at least two classes, got one class: {self.classes_}")
        if len(unknown := np.setdiff1d(found, self.classes_)):
            raise ValueError(f"y must have the known classes {self.classes_}, got {unknown}")
        numbers: Array = np.searchsorted(self.classes_, y)
        return numbers, len(self.classes_)

    def _check_targets(self, targets: Array, partial: bool) -> None:
        if not partial and len(left := np.unique(targets)) < 2:
            raise ValueError(f"sample_weight must leave at least two classes, got one class: {self.classes_[left]}")

    def _new_model(self, shape: Shape, outputs: int, seed: int) -> Sequential:
        model = super()._new_model(shape, outputs, seed)
        model.class_names = tuple(map(str, self.classes_)) if len({*map(str, self.classes_)}) == outputs else None
        return model

    def _split(self, targets: Array, seed: int) -> tuple[Array, Array]:
        train, validation = train_test_split(
            np.arange(len(targets)), test_size=self.validation_fraction, random_state=seed, stratify=targets
        )
        return train, validation

    def _criterion(self, y: Any) -> Loss:
        if self.class_weight is None:
            return CrossEntropyLoss()
        return CrossEntropyLoss(compute_class_weight(self.class_weight, classes=self.classes_, y=np.ravel(y)))


class CNNRegressor(RegressorMixin, _CNN):
    """A convolutional network as a scikit-learn regressor of one number or several an image, trained with the mean
    squared error.

    The parameters and attributes are those of `CNNClassifier`, without `class_weight` and `classes_`.  The targets are
    used as they are: if they are not of the size of 1, scale them, for instance with
    ``TransformedTargetRegressor(CNNRegressor(), transformer=StandardScaler())``.
    """

    _output = "target"
    _y_options: dict[str, Any] = {"multi_output": True, "y_numeric": True}  # noqa: RUF012

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.target_tags.multi_output = True
        return tags

    def fit(self, X: Any, y: Any, sample_weight: Any = None) -> "CNNRegressor":
        """Train on images X and their numbers y, (N,) or (N, targets).  sample_weight: (N,), not negative

        DivergedError if the loss is not finite.
        """
        self._train(X, y, sample_weight, partial=False)
        return self

    def partial_fit(self, X: Any, y: Any, sample_weight: Any = None) -> "CNNRegressor":
        """Train for one epoch on these images."""
        self._train(X, y, sample_weight, partial=True)
        return self

    def predict(self, X: Any) -> Array:
        """Numbers (N,) or (N, targets), as y was in `fit`, float64."""
        outputs = self._outputs(X).astype(np.float64)  # more than the kernels' digits, but what scikit-learn expects
        return outputs[:, 0] if self._single else outputs

    def _encode(self, y: Any, fresh: bool, partial: bool, classes: Any) -> tuple[Array, int]:
        """(targets (N, K) float32 or float64, K)."""
        targets = np.asarray(y, np.float32 if np.asarray(y).dtype == np.float32 else np.float64)
        single = targets.ndim == 1
        targets = targets.reshape(len(targets), -1)
        if not fresh and targets.shape[1] != self.model_.shapes[-1][0]:
            raise ValueError(f"y must have {self.model_.shapes[-1][0]} targets, as in fit, got {targets.shape[1]}")
        self._single = single
        return targets, targets.shape[1]

    def _check_targets(self, targets: Array, partial: bool) -> None:
        """All are fine."""

    def _split(self, targets: Array, seed: int) -> tuple[Array, Array]:
        train, validation = train_test_split(
            np.arange(len(targets)), test_size=self.validation_fraction, random_state=seed
        )
        return train, validation

    def _criterion(self, y: Any) -> Loss:
        return MSELoss()
