"""A data set on a device, and the loader that reads batches from it."""

import dataclasses
import math
import mmap
from collections.abc import Generator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from tinycnn import _check, devices
from tinycnn._tracked import Tracked
from tinycnn._typing import Array, DeviceArray, DType, Pair, Shape, State
from tinycnn.augment import Augmentation, Transform


@dataclasses.dataclass(frozen=True, eq=False)
class Normalization:
    """Scaling of pixels to a model's input: (pixel / unit - mean) / std.

    mean, std  (C,) float64
    unit       the value of a white pixel: 255 for uint8, 65535 for uint16, 1 for others
    integers   whether the pixels were integers of another type, such as int16, which are used as they are
    """

    mean: Array
    std: Array
    unit: int
    integers: bool = False

    @property
    def pixels(self) -> str:
        """What the model was trained on."""
        named = {255: "uint8 pixels", 65535: "uint16 pixels"}
        return named.get(self.unit, "integer pixels" if self.integers else "floating-point pixels")

    def apply(self, name: str, x: Array) -> Array:
        """Images x (N, C, H, W) as input.  Integer pixels are normalised, floating-point input is returned unchanged.
        TypeError for integers of another type than the model was trained on."""
        if x.dtype.kind == "f":
            return x
        if not (self.integers or (self.unit > 1 and self.unit == unit_of(x.dtype))):
            accepted = (
                "them, or scaled input (floating-point numbers)" if self.unit > 1 else "(pixel - mean) / std of such"
            )
            raise TypeError(f"{name}: the model was trained on {self.pixels} and takes {accepted}, got {x.dtype}")
        per_channel = (-1,) + (1,) * (x.ndim - 2)
        if len(self.mean) not in (1, x.shape[1]):
            raise ValueError(f"{name} must have {len(self.mean)} channels, got shape {x.shape}")
        scaled: Array = (x / self.unit - self.mean.reshape(per_channel)) / self.std.reshape(per_channel)
        return scaled

    def state_dict(self) -> State:
        """The normalization's entries in a model's state_dict."""
        names = ("mean", "std", "unit", *(("integers",) if self.integers else ()))
        return {f"normalization.{name}": np.array(getattr(self, name)) for name in names}

    @classmethod
    def split_state(cls, state: Mapping[str, Any]) -> tuple[Mapping[str, Any], "Normalization | None"]:
        """(a model's state_dict without the normalization, the normalization or None)."""
        if not isinstance(state, Mapping):
            raise TypeError(f"state must be a dictionary of names and arrays, got {state!r}")
        *names, integers = [f"normalization.{field.name}" for field in dataclasses.fields(cls)]
        if not all(name in state for name in names):
            return state, None
        mean, std = (
            _check.finite(n, _check.array(n, state[n], 1, "(channels,)")).astype(np.float64) for n in names[:2]
        )
        unit = _check.as_array(names[2], state[names[2]])
        if mean.shape != std.shape or (std <= 0).any() or unit.size != 1 or unit not in (1, 255, 65535):
            raise ValueError(f"normalization must have a mean and a positive std a channel and a unit of 1, 255 or "
                             f"65535, got {mean}, {std}, {unit}")  # fmt: skip
        rest = {name: value for name, value in state.items() if name not in (*names, integers)}
        return rest, cls(mean, std, int(unit), bool(np.any(_check.as_array(integers, state.get(integers, False)))))

    def __str__(self) -> str:
        mean, std = (", ".join(f"{v:.6g}" for v in values) for values in (self.mean, self.std))
        pixels = f"{self.pixels} / {self.unit}" if self.unit > 1 else "pixels"
        return f"trained on {pixels}, less {mean}, divided by {std}"


def unit_of(dtype: Any) -> int:
    """The value of a white pixel: 255 for uint8, 65535 for uint16, 1 for others, which are used as they are."""
    return {1: 255, 2: 65535}.get(dtype.itemsize, 1) if dtype.kind == "u" else 1


def is_on_disk(array: Any) -> bool:
    """Whether `array` is a memory-mapped file (`np.memmap`, `np.load(..., mmap_mode="r")`) or a view of one."""
    while isinstance(array, np.ndarray):
        array = array.base
    return isinstance(array, mmap.mmap)


CHUNK = 2**19  # bytes of a memory-mapped array that are in memory at a time, as float64, for its statistics


def pixel_statistics(pixels: Array) -> tuple[Array, Array]:
    """(mean, standard deviation) of each channel of the images (N, C, H, W), float64, in one pass, chunk by chunk."""
    length = max(1, CHUNK // max(1, pixels[:1].nbytes))
    count, mean, squares = 0, np.zeros(pixels.shape[1]), np.zeros(pixels.shape[1])
    for start in range(0, len(pixels), length):
        chunk = np.array(pixels[start : start + length], np.float64)
        if not np.isfinite(chunk).all():
            n, c, i, j = (int(index) for index in np.argwhere(~np.isfinite(chunk))[0])
            raise ValueError(f"images must be finite, got {chunk[n, c, i, j]} at index {(start + n, c, i, j)}")
        # Chan, Golub and LeVeque (1979): means and sums of squared deviations of two parts.
        part, size = chunk.mean(axis=(0, 2, 3)), chunk.size // chunk.shape[1]
        chunk -= part[:, None, None]
        chunk *= chunk
        squares += chunk.sum(axis=(0, 2, 3)) + (part - mean) ** 2 * (count * size / (count + size))
        mean += (part - mean) * (size / (count + size))
        count += size
    return mean, np.sqrt(squares / count)


class DeviceDataset(Tracked):
    """Images and their targets on a device, read as normalised batches.

    images     (N, H, W) or (N, C, H, W); uint8 and uint16 are scaled to 0 ... 1, other types are used as they are
               (on the CPU, contiguous uint8 images are not copied: do not change them).  A memory-mapped array stays
               in its file: see below
    labels     the targets: (N,) integers are class numbers; floating-point numbers (N, ...) are values, probabilities
               or labels 0/1, used as they are; integers and booleans (N, K) or of more axes become floating-point
               numbers.  None: the target is the image as the model gets it, normalised, padded and augmented
    sample_weight
               (N,) weights of the images in the loss, >= 0; metrics such as the accuracy are not weighted
    mean, std  a number, or one a channel: pixels become (pixel - mean) / std.  Computed from the images by default;
               give a validation or test set those of the training set
    padding    width of the border of zeros (before normalising) around every image
    augment    transformations (`RandomAffine`, `ElasticTransform`, `ColorJitter`) that `fit` applies, with new random
               numbers in every epoch.  `evaluate` and `gather` read the images without them
    seed       of the transformations
    class_names
               names of the classes, in the order of their numbers; `fit` copies them to `model.class_names`

    Images in a memory-mapped file (`np.memmap`, `np.load(path, mmap_mode="r")`) are read batch by batch, in a thread
    that is ahead of the step by up to two batches, and are never in memory as a whole: three batches are, and on the
    device one.  Without `mean` and `std` the file is read once more at the start.  `np.array(images)` loads them.
    """

    def __init__(
        self,
        images: ArrayLike,
        labels: ArrayLike | None,
        *,
        sample_weight: ArrayLike | None = None,
        mean: ArrayLike | None = None,
        std: ArrayLike | None = None,
        padding: Pair = 0,
        augment: Transform | tuple[Transform, ...] | list[Transform] = (),
        seed: int = 0,
        device: str = "cpu",
        class_names: Sequence[str] | None = None,
    ) -> None:
        self.device = device = devices.resolve(device)
        pixels: Array = _check.array("images", devices.as_host("images", images, device)[0])
        self.on_disk = is_on_disk(images)
        if isinstance(images, np.ndarray) and self.on_disk:
            pixels = images  # it may be of a subclass that reads in its own way
        targets = None if labels is None else devices.as_host("labels", labels, device)[0]
        if pixels.ndim == 3:
            pixels = pixels[:, None]
        if pixels.ndim != 4:
            raise ValueError(
                f"images must have shape (N, H, W) or (N, C, H, W), got {pixels.shape}{_reshape_hint(pixels)}"
            )
        unit, integers = unit_of(pixels.dtype), pixels.dtype.kind != "f" and unit_of(pixels.dtype) == 1
        if not self.on_disk:
            pixels = _as_pixels(pixels)
        targets = None if targets is None else _check_targets("labels", targets, len(pixels))
        weights: Array | None = None
        if sample_weight is not None:
            host_weights = devices.as_host("sample_weight", sample_weight, device)[0]
            weights = _check_sample_weight("sample_weight", host_weights, len(pixels))
        channels, height, width = pixels.shape[1:]
        if self.on_disk and (mean is None or std is None):
            file_mean, file_std = pixel_statistics(pixels)
            mean = file_mean / unit if mean is None else mean
            std = np.where(file_std == 0, 1, file_std / unit) if std is None else std
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
        self.normalization = Normalization(self.mean, self.std, unit, integers)
        self.padding = _check.pair("padding", padding, 0)
        self.ops = devices.get(device)
        self._options = {"augment": augment, "device": "" if device == "cpu" else repr(device)}
        self.images: DeviceArray = pixels if self.on_disk else self.ops.to_device(pixels)
        self.classes: int | None = None  # None: the targets are no class numbers
        if targets is not None and targets.dtype.kind == "i":
            self.classes = int(targets.max()) + 1
        keep = self.on_disk  # such a data set reads all of a batch on the host
        self.labels: DeviceArray = targets if targets is None or keep else self.ops.to_device(targets)
        self.sample_weight: DeviceArray = weights if weights is None or keep else self.ops.to_device(weights)
        self.scale, self.shift = 1 / (unit * self.std), -self.mean / self.std
        # For the augmentation, pixels are in 0 ... 1: a normalised pixel is p / std - mean / std.
        self.augmentation = Augmentation(augment, seed, self.ops, 1 / self.std, self.shift)
        self._scale_shift: dict[Any, list[DeviceArray]] = {}  # dtype -> scale and shift on the device
        self.class_names = None if class_names is None else _class_names(class_names, self.classes or 1)
        self.image_shape = (channels, height + 2 * self.padding[0], width + 2 * self.padding[1])

    def __getstate__(self) -> dict[str, Any]:
        """All attributes, with arrays on the host."""
        state = {n: v for n, v in super().__getstate__().items() if n not in ("ops", "_scale_shift")}
        if self.on_disk:
            return state | {"images": _as_pixels(np.array(self.images)), "on_disk": False}
        return state | {name: np.array(self.ops.to_host(array)) for name, array in self.arrays().items()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        ops = devices.get(state["device"])
        arrays = {name: ops.to_device(state[name]) for name in ARRAYS if state[name] is not None}
        vars(self).update(state, ops=ops, _scale_shift={}, **arrays)
        self.augmentation.ops = ops

    def __len__(self) -> int:
        return len(self.images)

    def __repr__(self) -> str:
        shape = " x ".join(map(str, self.image_shape))
        options = "".join(f", {name}={value}" for name, value in self._options.items() if value)
        targets = f"{self.classes} classes"
        if self.classes is None:
            targets = "targets: the images" if self.labels is None else f"targets {self.target_shape}"
        options += ", weighted" * (self.sample_weight is not None)
        return f"DeviceDataset({len(self):,} images of {shape}, {targets}{options})"

    def arrays(self) -> dict[str, DeviceArray]:
        """The arrays with a row for each image, by attribute."""
        return {name: array for name in ARRAYS if (array := getattr(self, name)) is not None}

    @property
    def target_shape(self) -> Shape:
        """Shape of the target of an image: () for class numbers and for one number an image."""
        return self.image_shape if self.labels is None else tuple(self.labels.shape[1:])

    def target_range(self) -> tuple[float, float]:
        """The smallest and the largest target; reads all images if these are the targets."""
        if self.labels is not None:
            targets = self.ops.to_host(self.labels)
            return float(targets.min()), float(targets.max())
        images, ends = self.images if self.on_disk else self.ops.to_host(self.images), []
        for start in range(0, len(images), 1000):  # a file may not fit memory
            part = np.asarray(images[start : start + 1000]).reshape(-1, *self.images.shape[1:])
            ends += [part.min(axis=(0, 2, 3)), part.max(axis=(0, 2, 3))]
        if self.padding != (0, 0) or self.augmentation.warps:
            ends.append(np.zeros(len(self.scale)))  # the border
        values = np.array(ends, np.float64) * self.scale + self.shift
        return float(values.min()), float(values.max())

    def empty_target(self, n: int, dtype: DType) -> DeviceArray:
        """An array for the targets of n images, for a model of type `dtype`; of size 0 if these are the images."""
        if self.classes is not None:
            return self.ops.empty((n,), np.int64)
        return self.ops.empty((n, *((0,) if self.labels is None else self.target_shape)), dtype)

    def gather(self, x: DeviceArray, index: DeviceArray) -> DeviceArray:
        """Write the images `index` (n,) int64 into x (n, *image_shape), without augmentation.  Returns their targets:
        class numbers (n,), or numbers (n, ...) of the type of x, which are x itself if the images are the targets."""
        if self.on_disk:
            staging = self.staging(len(x))
            staging.write(self.read(self.ops.to_host(index)))
            return staging.gather(x, self.ops.to_device(np.arange(len(x))))
        return self.gather_batch(x, self.empty_target(len(x), x.dtype), index, self.ops.empty((1,), np.int64))

    def gather_batch(self, x: DeviceArray, target: DeviceArray, order: DeviceArray, cursor: DeviceArray) -> DeviceArray:
        """Write the images order[cursor[0]:][:n] into x (n, *image_shape) and their targets into target (n, ...).
        Returns target, or x if the images are the targets."""
        if x.dtype not in self._scale_shift:
            self._scale_shift[x.dtype] = [self.ops.to_device(a.astype(x.dtype)) for a in (self.scale, self.shift)]
        numbers = (target, self.labels) if self.classes is not None else (cursor[:0], cursor[:0])  # of size 0: none
        scale, shift = self._scale_shift[x.dtype]
        self.ops.gather(x, numbers[0], self.images, numbers[1], order, cursor, scale, shift, self.padding)
        if self.classes is not None:
            return target
        if self.labels is None:
            return x
        self._gather_rows(target, self.labels, order, cursor)
        return target

    def gather_weights(self, weights: DeviceArray, order: DeviceArray, cursor: DeviceArray) -> None:
        """Write the weights of the images order[cursor[0]:][:n] into weights (n,).  The data set must have weights."""
        self._gather_rows(weights, self.sample_weight, order, cursor)

    def _gather_rows(self, out: DeviceArray, rows: DeviceArray, order: DeviceArray, cursor: DeviceArray) -> None:
        size = math.prod(rows.shape[1:])
        self.ops.gather_rows(out.reshape((len(out), size)), rows.reshape((len(rows), size)), order, cursor)

    # --- batches that are copied to the device one at a time: see tinycnn/batches.py -------------------------------

    def read(self, index: Array) -> dict[str, Array]:
        """The images `index` (n,) of a data set on disk, and their labels, as arrays in host memory for `write`."""
        arrays = {name: array[index] for name, array in self.arrays().items()}
        return arrays | {"images": _as_pixels(arrays["images"])}

    def staging(self, n: int) -> "DeviceDataset":
        """A data set of n images with the settings of this one, into which `write` copies batches."""
        arrays = self.arrays()
        dtypes = {name: array.dtype for name, array in arrays.items()}
        dtypes["images"] = np.dtype(np.uint8 if self.images.dtype == np.uint8 else np.float32)
        copied = type(self).__new__(type(self))
        vars(copied).update(vars(self), on_disk=False)
        vars(copied).update({k: self.ops.empty((n, *a.shape[1:]), dtypes[k]) for k, a in arrays.items()})
        return copied

    def reserve(self, n: int) -> None:
        """Make room for n images.  Captured steps are invalid if there was less."""
        if n > len(self):
            for name, rows in self.arrays().items():
                setattr(self, name, self.ops.empty((n, *rows.shape[1:]), rows.dtype))

    def write(self, batch: Mapping[str, Array]) -> None:
        """Copy the arrays of a batch in host memory into the first rows."""
        self.reserve(len(batch["images"]))
        for name, values in batch.items():
            self.ops.copy_to(getattr(self, name)[: len(values)], values)


ARRAYS = ("images", "labels", "sample_weight")  # the arrays of a data set with a row for each image; may be None


def _reshape_hint(rows: Array) -> str:
    """For a message: how to make images of rows of pixels, such as those of a table."""
    side = math.isqrt(rows.shape[1]) if rows.ndim == 2 else 0
    sides = f"{side}, {side}" if side * side == rows.shape[-1:][0] else "H, W"
    return f"; for rows of pixels, np.asarray(images).reshape(-1, {sides})" if rows.ndim == 2 else ""


def _as_pixels(pixels: Array) -> Array:
    """Pixels as they are on the device: uint8, or float32 for other types.  They must be finite."""
    return pixels if pixels.dtype == np.uint8 else _check.finite("images", pixels.astype(np.float32))


def _check_targets(name: str, targets: Any, count: int) -> Array:
    """A copy of the targets of a data set of `count` images: (count,) int64 class numbers, or (count, ...) float32 or
    float64."""
    values: Array = _check.array(name, targets)
    if values.ndim <= 1 and values.dtype.kind != "f":
        if values.dtype.kind == "b":
            raise TypeError(f"{name} must be integer class numbers or floating-point targets, got dtype bool")
        numbers: Array = _check.labels(name, values, count).copy()
        return numbers
    if values.ndim < 1 or len(values) != count:
        raise ValueError(f"{name} must have shape ({count}, ...), one target an image, got {values.shape}")
    dtype = np.float64 if values.dtype.newbyteorder("=") == np.float64 else np.float32
    return _check.finite(name, np.array(values, dtype, order="C"))


def _check_sample_weight(name: str, value: Any, count: int) -> Array:
    """A copy of the weights (count,) of a data set, float64."""
    weights: Array = _check.finite(name, _check.array(name, value)).astype(np.float64)
    if weights.shape != (count,):
        raise ValueError(f"{name} must have shape ({count},), one weight an image, got {weights.shape}")
    if (weights < 0).any():
        raise ValueError(f"{name} must not be negative, got {weights.min():g}")
    if not weights.any():
        raise ValueError(f"{name} must not be all zero")
    return weights


def _class_names(value: Sequence[str], classes: int) -> tuple[str, ...]:
    names = _check.names("class_names", value)
    if len(names) < classes:
        raise ValueError(f"class_names must have {classes} names, one a class, got {len(names)}")
    return names


class DataLoader:
    """Reads the batches of a data set in a given order.  Each training has its own.

    The order and the position in it are on the device, where a captured step reads them.

    dataset  the data set     data     what the step gathers from: the same here, but see `StagingLoader`
    augment  whether to apply the data set's transformations
    longest  length of the longest order, if longer than the data set

    Before the first `start_epoch` the order is 0, 1, 2, ...
    """

    repeatable = True  # whether an epoch can be repeated with the same batches
    staged = False  # whether each batch is copied to the device before its step

    def __init__(self, data: DeviceDataset, augment: bool = False, longest: int = 0) -> None:
        self.dataset = self.data = data
        self.ops = data.ops
        self.order = self.ops.to_device(np.arange(max(len(data), longest)))
        self.cursor, self.target = self.ops.empty((1,), np.int64), self.ops.empty((0,), np.int64)
        self._target_buffer, self._weight_buffer = self.target, self.target
        self.sample_weight: DeviceArray | None = None  # of the last batch
        self.length: int | None = len(data)  # of the epoch; None: unknown
        self.augmentation = data.augmentation.copy_for_training() if augment else None

    def start_epoch(self, order: Array, repeat: bool = False) -> None:
        """Begin an epoch over the images `order`.

        repeat  use the random numbers of the last epoch again
        """
        if self.augmentation is not None:
            self.augmentation.start_epoch(repeat)
        self.ops.copy_to(self.order[: len(order)], order)
        self.length = len(order)
        self.seek(0)

    def batches(self, batch_size: int) -> Generator[tuple[int, int], None, None]:
        """(position in the order, number of images) of every batch of the epoch.  Close the iterator if it is left
        early."""
        length = self.length or 0
        for position in range(0, length, batch_size):
            yield position, min(batch_size, length - position)

    def reserve(self, n: int) -> None:
        """Make room for batches of n images."""

    def seek(self, position: int) -> None:
        """Continue at `position` in the order."""
        self.ops.copy_to(self.cursor, np.array([position]))

    def next(self, x: DeviceArray) -> DeviceArray:
        """Write the next len(x) images into x and return their targets; set `sample_weight` to their weights (n,), or
        None.  The kernel `accumulate_metrics` advances the cursor."""
        n, data = len(x), self.data
        if n > len(self._target_buffer) or self._target_buffer.dtype not in (x.dtype, np.int64):
            self._target_buffer = data.empty_target(n, x.dtype)
        target = self._target_buffer[:n]
        if self.augmentation is None:
            target = data.gather_batch(x, target, self.order, self.cursor)
        else:
            gathered = self.augmentation.input_buffer(x)
            target = data.gather_batch(gathered, target, self.order, self.cursor)
            self.augmentation.apply(x)
            target = x if target is gathered else target
        if data.sample_weight is not None:
            if n > len(self._weight_buffer) or self._weight_buffer.dtype != x.dtype:
                self._weight_buffer = self.ops.empty((n,), x.dtype)
            self.sample_weight = self._weight_buffer[:n]
            data.gather_weights(self.sample_weight, self.order, self.cursor)
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
    numbers: Array = _check.as_array(name, devices.as_host(name, index, dataset.device)[0])
    if numbers.dtype.kind not in "iu" or numbers.ndim != 1:
        raise TypeError(
            f"{name} must be a row of integer image numbers, got shape {numbers.shape}, dtype {numbers.dtype}"
        )
    invalid = np.flatnonzero((numbers < 0) | (numbers >= len(dataset)))
    if not numbers.size or invalid.size:
        example = f"{numbers[invalid[0]]} at index {invalid[0]}" if invalid.size else "none"
        raise ValueError(f"{name} must be image numbers in 0 ... {len(dataset) - 1}, got {example}")
    return numbers.astype(np.int64, copy=False)
