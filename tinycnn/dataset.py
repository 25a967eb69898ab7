"""A data set on a device, and the loader that reads batches from it."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from tinycnn import _check, devices
from tinycnn._tracked import Tracked
from tinycnn._typing import Array, DeviceArray, Pair, State
from tinycnn.augment import Augmentation, Transform


@dataclasses.dataclass(frozen=True, eq=False)
class Normalization:
    """Scaling of pixels to a model's input: (pixel / unit - mean) / std.

    mean, std  (C,) float64     unit  255 for uint8 pixels, 1 for others
    """

    mean: Array
    std: Array
    unit: int

    def apply(self, name: str, x: Array) -> Array:
        """Images x (N, C, H, W) as input.  uint8 pixels are normalised, floating-point input is returned unchanged.
        TypeError for other dtypes, and for uint8 if the model was trained on other pixels."""
        if x.dtype.kind == "f":
            return x
        if x.dtype != np.uint8 or self.unit != 255:
            trained = "uint8 pixels" if self.unit == 255 else "floating-point pixels"
            accepted = (
                "them, or scaled input (floating-point numbers)" if self.unit == 255 else "(pixel - mean) / std of such"
            )
            raise TypeError(f"{name}: the model was trained on {trained} and takes {accepted}, got {x.dtype}")
        per_channel = (-1,) + (1,) * (x.ndim - 2)
        if len(self.mean) not in (1, x.shape[1]):
            raise ValueError(f"{name} must have {len(self.mean)} channels, got shape {x.shape}")
        scaled: Array = (x / self.unit - self.mean.reshape(per_channel)) / self.std.reshape(per_channel)
        return scaled

    def state_dict(self) -> State:
        """The normalization's entries in a model's state_dict."""
        return {f"normalization.{name}": np.array(value) for name, value in vars(self).items()}

    @classmethod
    def split_state(cls, state: Mapping[str, Any]) -> tuple[Mapping[str, Any], "Normalization | None"]:
        """(a model's state_dict without the normalization, the normalization or None)."""
        if not isinstance(state, Mapping):
            raise TypeError(f"state must be a dictionary of names and arrays, got {state!r}")
        names = [f"normalization.{field.name}" for field in dataclasses.fields(cls)]
        if not all(name in state for name in names):
            return state, None
        mean, std = (
            _check.finite(n, _check.array(n, state[n], 1, "(channels,)")).astype(np.float64) for n in names[:2]
        )
        unit = np.asarray(state[names[2]])
        if mean.shape != std.shape or (std <= 0).any() or unit.size != 1 or unit not in (1, 255):
            raise ValueError(f"normalization must have a mean and a positive std a channel and a unit of 1 or 255, got "
                             f"{mean}, {std}, {unit}")  # fmt: skip
        return {name: value for name, value in state.items() if name not in names}, cls(mean, std, int(unit))

    def __str__(self) -> str:
        mean, std = (", ".join(f"{v:.6g}" for v in values) for values in (self.mean, self.std))
        return f"trained on {'uint8 pixels / 255' if self.unit == 255 else 'pixels'}, less {mean}, divided by {std}"


class DeviceDataset(Tracked):
    """Labelled images on a device, read as normalised batches.

    images     (N, H, W) or (N, C, H, W); uint8 is scaled to 0 ... 1, other types are used as they are
               (on the CPU, contiguous uint8 images are not copied: do not change them)
    labels     (N,) class numbers
    mean, std  a number, or one a channel: pixels become (pixel - mean) / std.  Computed from the images by default;
               give a validation or test set those of the training set
    padding    width of the border of zeros (before normalising) around every image
    augment    transformations (`RandomAffine`, `ElasticTransform`, `ColorJitter`) that `fit` applies, with new random
               numbers in every epoch.  `evaluate` and `gather` read the images without them
    seed       of the transformations
    """

    def __init__(
        self,
        images: ArrayLike,
        labels: ArrayLike,
        *,
        mean: ArrayLike | None = None,
        std: ArrayLike | None = None,
        padding: Pair = 0,
        augment: Transform | tuple[Transform, ...] | list[Transform] = (),
        seed: int = 0,
        device: str = "cpu",
    ) -> None:
        self.device = device = devices.resolve(device)
        pixels: Array = _check.array("images", devices.as_host("images", images, device)[0])
        class_numbers: Array = devices.as_host("labels", labels, device)[0]
        if pixels.ndim == 3:
            pixels = pixels[:, None]
        if pixels.ndim != 4:
            raise ValueError(f"images must have shape (N, H, W) or (N, C, H, W), got {pixels.shape}")
        if pixels.dtype != np.uint8:
            pixels = _check.finite("images", pixels.astype(np.float32))
        class_numbers = _check.labels("labels", class_numbers, len(pixels))
        channels, height, width = pixels.shape[1:]
        unit = 255 if pixels.dtype == np.uint8 else 1
        if mean is None:
            mean = pixels.mean(axis=(0, 2, 3), dtype=np.float64) / unit
        if std is None:
            deviation: Array = pixels.std(axis=(0, 2, 3), dtype=np.float64) / unit
            deviation[deviation == 0] = 1  # a constant channel becomes zero
            std = deviation
        self.mean: Array = _check.per_channel("mean", mean, channels)
        self.std: Array = _check.per_channel("std", std, channels)
        if (self.std <= 0).any():
            raise ValueError(f"std must be positive, got {self.std.min()}")
        self.normalization = Normalization(self.mean, self.std, unit)
        self.padding = _check.pair("padding", padding, 0)
        self.ops = devices.get(device)
        self._options = {"augment": augment, "device": "" if device == "cpu" else repr(device)}
        self.images, self.labels = self.ops.to_device(pixels), self.ops.to_device(class_numbers.copy())
        self.scale, self.shift = 1 / (unit * self.std), -self.mean / self.std
        # For the augmentation, pixels are in 0 ... 1: a normalised pixel is p / std - mean / std.
        self.augmentation = Augmentation(augment, seed, self.ops, 1 / self.std, self.shift)
        self._scale_shift: dict[Any, list[DeviceArray]] = {}  # dtype -> scale and shift on the device
        self.classes = int(class_numbers.max()) + 1
        self.image_shape = (channels, height + 2 * self.padding[0], width + 2 * self.padding[1])

    def __getstate__(self) -> dict[str, Any]:
        """All attributes, with arrays on the host."""
        state = {n: v for n, v in super().__getstate__().items() if n not in ("ops", "_scale_shift")}
        return state | {name: np.array(self.ops.to_host(getattr(self, name))) for name in ("images", "labels")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        ops = devices.get(state["device"])
        arrays = {name: ops.to_device(state[name]) for name in ("images", "labels")}
        vars(self).update(state, ops=ops, _scale_shift={}, **arrays)
        self.augmentation.ops = ops

    def __len__(self) -> int:
        return len(self.images)

    def __repr__(self) -> str:
        shape = " x ".join(map(str, self.image_shape))
        options = "".join(f", {name}={value}" for name, value in self._options.items() if value)
        return f"DeviceDataset({len(self):,} images of {shape}, {self.classes} classes{options})"

    def gather(self, x: DeviceArray, index: DeviceArray) -> DeviceArray:
        """Write the images `index` (n,) int64 into x (n, *image_shape), without augmentation.  Returns their labels."""
        return self.gather_batch(x, self.ops.empty((len(x),), np.int64), index, self.ops.empty((1,), np.int64))

    def gather_batch(self, x: DeviceArray, target: DeviceArray, order: DeviceArray, cursor: DeviceArray) -> DeviceArray:
        """Write the images order[cursor[0]:][:n] into x (n, *image_shape) and their labels into target (n,); return
        target."""
        if x.dtype not in self._scale_shift:
            self._scale_shift[x.dtype] = [self.ops.to_device(a.astype(x.dtype)) for a in (self.scale, self.shift)]
        self.ops.gather(x, target, self.images, self.labels, order, cursor, *self._scale_shift[x.dtype], self.padding)
        return target


class DataLoader:
    """Reads the batches of a data set in a given order.  Each training has its own.

    The order and the position in it are on the device, where a captured step reads them.

    augment  whether to apply the data set's transformations
    longest  length of the longest order, if longer than the data set

    Before the first `start_epoch` the order is 0, 1, 2, ...
    """

    def __init__(self, data: DeviceDataset, augment: bool = False, longest: int = 0) -> None:
        self.data, self.ops = data, data.ops
        self.order = self.ops.to_device(np.arange(max(len(data), longest)))
        self.cursor, self.target = self.ops.empty((1,), np.int64), self.ops.empty((0,), np.int64)
        self.augmentation = data.augmentation.copy_for_training() if augment else None

    def start_epoch(self, order: Array, repeat: bool = False) -> None:
        """Begin an epoch over the images `order`.

        repeat  use the random numbers of the last epoch again
        """
        if self.augmentation is not None:
            self.augmentation.start_epoch(repeat)
        self.ops.copy_to(self.order[: len(order)], order)
        self.seek(0)

    def seek(self, position: int) -> None:
        """Continue at `position` in the order."""
        self.ops.copy_to(self.cursor, np.array([position]))

    def next(self, x: DeviceArray) -> DeviceArray:
        """Write the next len(x) images into x and return their labels.  The kernel `accumulate_metrics` advances the
        cursor."""
        if len(x) > len(self.target):
            self.target = self.ops.empty((len(x),), np.int64)
        target = self.target[: len(x)]
        if self.augmentation is None:
            return self.data.gather_batch(x, target, self.order, self.cursor)
        self.data.gather_batch(self.augmentation.input_buffer(x), target, self.order, self.cursor)
        self.augmentation.apply(x)
        return target

    def augment_settings(self) -> list[dict[str, Any] | None]:
        """A copy of the transformations' settings, to detect changes."""
        transforms = (getattr(self.augmentation, name, None) for name in ("affine", "elastic", "jitter"))
        return [transform and dict(vars(transform)) for transform in transforms]

    def close(self) -> None:
        """End the training.  The next one on this data set continues the sequence of random numbers."""
        if self.augmentation is not None:
            shared = self.data.augmentation
            shared.batch_count = max(shared.batch_count, self.augmentation.batches_drawn())


def check_indices(dataset: DeviceDataset, index: ArrayLike, name: str = "index") -> Array:
    """`index` as (n,) int64 image numbers of `dataset`.  TypeError or ValueError if they are not."""
    numbers: Array = np.asarray(devices.as_host(name, index, dataset.device)[0])
    if numbers.dtype.kind not in "iu" or numbers.ndim != 1:
        raise TypeError(
            f"{name} must be a row of integer image numbers, got shape {numbers.shape}, dtype {numbers.dtype}"
        )
    invalid = np.flatnonzero((numbers < 0) | (numbers >= len(dataset)))
    if not numbers.size or invalid.size:
        example = f"{numbers[invalid[0]]} at index {invalid[0]}" if invalid.size else "none"
        raise ValueError(f"{name} must be image numbers in 0 ... {len(dataset) - 1}, got {example}")
    return numbers.astype(np.int64, copy=False)
