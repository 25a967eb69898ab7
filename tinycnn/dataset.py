"""A data set on its device, and how batches are read from it."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from tinycnn import _check, devices
from tinycnn._tracked import Tracked
from tinycnn.augment import Augmentation


@dataclasses.dataclass(frozen=True, eq=False)
class Normalization:
    """How pixels become a model's input: (pixel / unit - mean) / std.

    mean, std  (C,) float64     unit  255 for uint8 pixels, 1 for others
    """

    mean: np.ndarray
    std: np.ndarray
    unit: int

    def apply(self, name, x):
        """Images x (N, C, H, W) as input: uint8 pixels are scaled, floating-point numbers have been.  TypeError for
        other kinds, and for uint8 where the model was trained on other pixels."""
        if x.dtype.kind == "f":
            return x
        if x.dtype != np.uint8 or self.unit != 255:
            trained = "uint8 pixels" if self.unit == 255 else "floating-point pixels"
            took = (
                "them, or scaled input (floating-point numbers)" if self.unit == 255 else "(pixel - mean) / std of such"
            )
            raise TypeError(f"{name}: the model was trained on {trained} and takes {took}, got {x.dtype}")
        rows = (-1,) + (1,) * (x.ndim - 2)
        if len(self.mean) not in (1, x.shape[1]):
            raise ValueError(f"{name} must have {len(self.mean)} channels, got shape {x.shape}")
        return (x / self.unit - self.mean.reshape(rows)) / self.std.reshape(rows)

    def state_dict(self):
        """Its part of a state_dict."""
        return {f"normalization.{name}": np.array(value) for name, value in vars(self).items()}

    @classmethod
    def split_state(cls, state):
        """(the rest of a state_dict, the normalization in it or None)."""
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

    def __str__(self):
        mean, std = (", ".join(f"{v:.6g}" for v in values) for values in (self.mean, self.std))
        return f"trained on {'uint8 pixels / 255' if self.unit == 255 else 'pixels'}, less {mean}, divided by {std}"


class DeviceDataset(Tracked):
    """A data set on the device, handed out as normalised batches.

    images     (N, H, W) or (N, C, H, W); uint8 is read as 0 ... 1, other types as they are
               (on the CPU, contiguous uint8 images are used where they lie, so they must stay as they are)
    labels     (N,) class numbers
    mean, std  a number, or one a channel: pixels become (pixel - mean) / std.  Found from the images if not given;
               give a validation or test set those of the training set
    padding    this many pixels of zero (before normalising) are put round every image
    augment    transformations (`RandomAffine`, `ElasticTransform`, `ColorJitter`) that `fit` sees the images through,
               new ones in every epoch; `evaluate`, and whatever else asks for images by number, sees them as they are
    seed       where the transformations' random numbers begin
    """

    def __init__(self, images, labels, *, mean=None, std=None, padding=0, augment=(), seed=0, device="cpu"):
        self.device = device = devices.resolve(device)
        images, labels = devices.as_host("images", images, device)[0], devices.as_host("labels", labels, device)[0]
        images = _check.array("images", images)
        if images.ndim == 3:
            images = images[:, None]
        if images.ndim != 4:
            raise ValueError(f"images must have shape (N, H, W) or (N, C, H, W), got {images.shape}")
        if images.dtype != np.uint8:
            images = _check.finite("images", images.astype(np.float32))
        labels = _check.labels("labels", labels, len(images))
        channels, height, width = images.shape[1:]
        unit = 255 if images.dtype == np.uint8 else 1
        if mean is None:
            mean = images.mean(axis=(0, 2, 3), dtype=np.float64) / unit
        if std is None:
            std = images.std(axis=(0, 2, 3), dtype=np.float64) / unit
            std[std == 0] = 1  # a constant channel becomes zero
        self.mean, self.std = _check.per_channel("mean", mean, channels), _check.per_channel("std", std, channels)
        if (self.std <= 0).any():
            raise ValueError(f"std must be positive, got {self.std.min()}")
        self.normalization = Normalization(self.mean, self.std, unit)
        self.padding = _check.pair("padding", padding, 0)
        self.ops = devices.get(device)
        self._options = {"augment": augment, "device": "" if device == "cpu" else repr(device)}
        self.images, self.labels = self.ops.to_device(images), self.ops.to_device(labels.copy())
        self.scale, self.shift = 1 / (unit * self.std), -self.mean / self.std
        # In a batch a pixel of zero is -mean/std, and one of `unit` is 1/std more.
        self.augmentation = Augmentation(augment, seed, self.ops, 1 / self.std, self.shift)
        self._scale_shift: dict[Any, list] = {}  # scale and shift on the device, by dtype
        self.classes = int(labels.max()) + 1
        self.image_shape = (channels, height + 2 * self.padding[0], width + 2 * self.padding[1])

    def __getstate__(self):
        """All of it on the host."""
        state = {n: v for n, v in super().__getstate__().items() if n not in ("ops", "_scale_shift")}
        return state | {name: np.array(self.ops.to_host(getattr(self, name))) for name in ("images", "labels")}

    def __setstate__(self, state):
        ops = devices.get(state["device"])
        arrays = {name: ops.to_device(state[name]) for name in ("images", "labels")}
        vars(self).update(state, ops=ops, _scale_shift={}, **arrays)
        self.augmentation.ops = ops

    def __len__(self):
        return len(self.images)

    def __repr__(self):
        shape = " x ".join(map(str, self.image_shape))
        more = "".join(f", {name}={value}" for name, value in self._options.items() if value)
        return f"DeviceDataset({len(self):,} images of {shape}, {self.classes} classes{more})"

    def gather(self, x, index):
        """Write the images `index` (n,) int64 into x (n, *image_shape), as they are; returns their labels (n,)."""
        return self.gather_batch(x, self.ops.empty((len(x),), np.int64), index, self.ops.empty((1,), np.int64))

    def gather_batch(self, x, target, order, cursor):
        """`gather` images number cursor[0] and following of `order`, and their labels into `target`."""
        if x.dtype not in self._scale_shift:
            self._scale_shift[x.dtype] = [self.ops.to_device(a.astype(x.dtype)) for a in (self.scale, self.shift)]
        self.ops.gather(x, target, self.images, self.labels, order, cursor, *self._scale_shift[x.dtype], self.padding)
        return target


class DataLoader:
    """Reads a data set batch after batch, in an order; each training has one of its own.

    The order, and how far it has been gone through, are on the device, where a captured step reads them.

    augment  whether images are seen through the data set's transformations
    longest  of the orders, if that is more than the whole data set; until `start_epoch`, it goes through that in a row
    """

    def __init__(self, data, augment=False, longest=0):
        self.data, self.ops = data, data.ops
        self.order = self.ops.to_device(np.arange(max(len(data), longest)))
        self.cursor, self.target = self.ops.empty((1,), np.int64), self.ops.empty((0,), np.int64)
        self.augmentation = data.augmentation.copy_for_training() if augment else None

    def start_epoch(self, order, repeat=False):
        """Begin an epoch: `next` will give the images in the order `order`.

        repeat  not a new epoch, but the last one with the same random numbers
        """
        if self.augmentation is not None:
            self.augmentation.start_epoch(repeat)
        self.ops.copy_to(self.order[: len(order)], order)
        self.seek(0)

    def seek(self, position):
        """Let the epoch go on with the image at `position`."""
        self.ops.copy_to(self.cursor, np.array([position]))

    def next(self, x):
        """The next len(x) images into x; returns their labels.  The kernel `accumulate_metrics` moves on."""
        if len(x) > len(self.target):
            self.target = self.ops.empty((len(x),), np.int64)
        target = self.target[: len(x)]
        if self.augmentation is None:
            return self.data.gather_batch(x, target, self.order, self.cursor)
        self.data.gather_batch(self.augmentation.input_buffer(x), target, self.order, self.cursor)
        self.augmentation.apply(x)
        return target

    def augment_settings(self):
        """What the transformations are set to, to be compared."""
        kinds = (getattr(self.augmentation, name, None) for name in ("affine", "elastic", "jitter"))
        return [kind and dict(vars(kind)) for kind in kinds]

    def close(self):
        """Let the next training on this data set go on with new random numbers."""
        if self.augmentation is not None:
            self.data.augmentation.batch_count = max(
                self.data.augmentation.batch_count, self.augmentation.batches_drawn()
            )


def check_indices(batches, index, name="index"):
    """`index` as (n,) int64 numbers of images of `batches`; TypeError or ValueError for what are none."""
    index = np.asarray(devices.as_host(name, index, batches.device)[0])
    if index.dtype.kind not in "iu" or index.ndim != 1:
        raise TypeError(f"{name} must be a row of integer image numbers, got shape {index.shape}, dtype {index.dtype}")
    wrong = np.flatnonzero((index < 0) | (index >= len(batches)))
    if not index.size or wrong.size:
        came = f"{index[wrong[0]]} at index {wrong[0]}" if wrong.size else "none"
        raise ValueError(f"{name} must be image numbers in 0 ... {len(batches) - 1}, got {came}")
    return index.astype(np.int64, copy=False)
