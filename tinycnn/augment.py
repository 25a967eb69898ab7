"""Random distortions of training images, for `DeviceDataset(..., augment=(...))`, with torchvision's names."""

import copy
from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import ArrayLike

from tinycnn import _check, devices
from tinycnn._repr import InitRepr
from tinycnn._typing import Array, Backend, DeviceArray


def _non_negative(name: str, value: float) -> float:
    return _check.number(name, value, 0)


def _positive_range(name: str, value: Sequence[float]) -> tuple[float, float]:
    """A pair (low, high) with 0 < low <= high."""
    if not isinstance(value, (tuple, list)) or len(value) != 2:
        raise ValueError(f"{name} must be a pair (low, high), got {value!r}")
    low, high = (_check.number(name, v, 0) for v in value)
    if not 0 < low <= high:
        raise ValueError(f"{name} must be a pair (low, high) with 0 < low <= high, got {value!r}")
    return low, high


class RandomAffine(InitRepr):
    """Squeeze, shear, rotate, scale and translate every image by random amounts.

    degrees    rotation by -degrees ... degrees
    translate  largest shift in pixels (horizontal, vertical), in both directions
    scale      range of the factor of the size
    squeeze    range of e: the image becomes e times as wide and 1/e times as high
    shear      shear along x by -shear ... shear degrees
    """

    def __init__(
        self,
        degrees: float = 0,
        translate: tuple[float, float] = (0, 0),
        scale: tuple[float, float] = (1, 1),
        squeeze: tuple[float, float] = (1, 1),
        shear: float = 0,
    ) -> None:
        self.degrees = _check.number("degrees", degrees, 0, maximum=180)
        if not isinstance(translate, (tuple, list)) or len(translate) != 2:
            raise ValueError(f"translate must be a pair (horizontal, vertical), got {translate!r}")
        self.translate = _non_negative("translate", translate[0]), _non_negative("translate", translate[1])
        self.scale, self.squeeze = _positive_range("scale", scale), _positive_range("squeeze", squeeze)
        self.shear = _check.number("shear", shear, 0, below=90)


class ElasticTransform(InitRepr):
    """Displace every pixel by a smooth random field (Simard, Steinkraus and Platt 2003).

    The field is noise, uniform in +-1 pixel, smoothed by a Gaussian of `sigma` pixels and multiplied by `alpha`.  The
    defaults are the paper's, for digits of 28 x 28 pixels.
    """

    def __init__(self, alpha: float = 34, sigma: float = 4) -> None:
        self.alpha, self.sigma = _non_negative("alpha", alpha), _non_negative("sigma", sigma)
        if self.sigma == 0:
            raise ValueError("sigma must be positive, got 0")

    def weights(self) -> Array:
        """One half of the Gaussian, centre first, cut off at 4 sigma.  The sum over both halves is 1."""
        w: Array = np.exp(-0.5 * (np.arange(int(4 * self.sigma + 0.5) + 1) / self.sigma) ** 2)
        half: Array = w / (2 * w.sum() - w[0])
        return half


class ColorJitter(InitRepr):
    """Multiply the brightness of every image by a factor in 1 +- brightness, then its contrast by one in 1 +- contrast.
    For pixels 0 ... 1; the result is clipped to that range."""

    def __init__(self, brightness: float = 0, contrast: float = 0) -> None:
        self.brightness, self.contrast = _non_negative("brightness", brightness), _non_negative("contrast", contrast)


Transform: TypeAlias = RandomAffine | ElasticTransform | ColorJitter
TRANSFORMS = RandomAffine, ElasticTransform, ColorJitter


class Augmentation:
    """The augmentation of a batch: at most one transformation of each class.  Affine map and elastic field are applied
    in one interpolation; brightness and contrast come last, whatever the order of `transforms`.

    seed          of the random numbers; kernels hash it with the number of the batch
    ops           the backend
    scale, shift  a pixel p in 0 ... 1 is p * scale[c] + shift[c] in a batch
    """

    counter: DeviceArray  # (1,) batches so far; `copy_for_training` sets these four
    offset: DeviceArray  # (1,) images of the batch before those of `apply`, which may be a part of it
    epoch_start: DeviceArray  # (1,) the counter at the start of the epoch
    _buffers: dict[Any, tuple[DeviceArray, ...]]

    def __init__(
        self, transforms: Transform | Sequence[Transform], seed: int, ops: Backend, scale: Array, shift: Array
    ) -> None:
        chosen: dict[type, Any] = {}
        for transform in transforms if isinstance(transforms, (tuple, list)) else (transforms,):
            kind = type(transform)
            if kind not in TRANSFORMS:
                names = ", ".join(kind.__name__ for kind in TRANSFORMS)
                raise TypeError(f"augment must be a tuple of {names}, got {_check.describe(transform)}")
            if kind in chosen:
                raise ValueError(f"augment may hold one {kind.__name__}, got two")
            chosen[kind] = transform
        self.affine, self.elastic, self.jitter = map(chosen.get, TRANSFORMS)
        if self.jitter is not None and self.jitter.brightness == self.jitter.contrast == 0:
            self.jitter = None  # the kernel would round
        self.warps = self.affine is not None or self.elastic is not None
        self.draws = self.warps or self.jitter is not None  # whether there is anything to apply
        seeds = np.random.default_rng(_check.integer("seed", seed, 0)).integers(2**63, size=len(TRANSFORMS))
        self.affine_seed, self.elastic_seed, self.jitter_seed = map(int, seeds)
        self.ops, self.scale, self.shift = ops, scale, shift
        self.batch_count = 0  # in all trainings so far

    def seeds(self) -> list[int]:
        """The seeds of the transformations."""
        return [self.affine_seed, self.elastic_seed, self.jitter_seed]

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "ops"}  # a module; the data set sets it

    def copy_for_training(self) -> "Augmentation":
        """A copy with its own counter, which starts at `batch_count`."""
        copied = copy.copy(self)
        copied.ops = self.ops
        copied.counter, copied.epoch_start = (self.ops.to_device(np.array([self.batch_count])) for _ in range(2))
        copied.offset, copied._buffers = self.ops.empty((1,), np.int64), {}
        return copied

    def batches_drawn(self) -> int:
        """Number of batches so far, in this and earlier trainings."""
        return int(self.ops.to_host(self.counter)[0])

    def buffers(self, x: DeviceArray) -> tuple[DeviceArray, ...]:
        """Buffers for a batch like x: (input images, matrices, field, weights, scale, shift)."""
        key = x.shape[1:], x.dtype
        if key not in self._buffers or len(x) > len(self._buffers[key][0]):
            ops, n, (_, H, W) = self.ops, len(x), x.shape[1:]
            weights = np.zeros(0) if self.elastic is None else self.elastic.weights()
            self._buffers[key] = (
                ops.empty(x.shape if self.warps else (0, *x.shape[1:]), x.dtype),
                ops.empty((0 if self.affine is None else n, 2, 3), x.dtype),
                ops.empty((0 if self.elastic is None else n, 2, H, W), x.dtype),
                *(ops.to_device(a.astype(x.dtype)) for a in (weights, self.scale, self.shift)),
            )
        images, matrices, field, *constants = self._buffers[key]
        return images[: len(x)], matrices[: len(x)], field[: len(x)], *constants

    def continue_from(self, batches: int) -> None:
        """Continue after so many batches.  For a copy from `copy_for_training`"""
        self.ops.copy_to(self.counter, np.array([batches]))

    def start_epoch(self, repeat: bool) -> None:
        """Begin an epoch, or repeat the last one."""
        target, source = (self.counter, self.epoch_start) if repeat else (self.epoch_start, self.counter)
        self.ops.copy_to(target, source)

    def input_buffer(self, x: DeviceArray) -> DeviceArray:
        """The array to gather a batch into, which `apply(x)` reads."""
        return self.buffers(x)[0] if self.warps else x

    def apply(self, x: DeviceArray) -> None:
        """Transform the batch in `input_buffer(x)` and write it into x."""
        ops, affine, elastic, jitter = self.ops, self.affine, self.elastic, self.jitter
        if not self.draws:
            return
        images, matrices, field, weights, scale, shift = self.buffers(x)
        ops.increment(self.counter)
        if affine is not None:
            ops.random_affine(
                matrices, self.counter, self.offset, self.affine_seed, affine.degrees, affine.translate,
                affine.scale, affine.squeeze, affine.shear,
            )  # fmt: skip
        if elastic is not None:
            ops.elastic_field(field, weights, self.counter, self.offset, self.elastic_seed, elastic.alpha)
        if self.warps:
            ops.warp(x, images, matrices, field, shift)
        if jitter is not None:
            amounts = jitter.brightness, jitter.contrast
            ops.jitter(x, self.counter, self.offset, self.jitter_seed, *amounts, scale, shift)


def resize(images: ArrayLike, size: int) -> Array:
    """Resize uint8 images (N, H, W) to (N, size, size) by bilinear interpolation between pixel centres.  Edge pixels
    are repeated beyond the edge.  Like torchvision's Resize with antialias=False."""
    source: Array = _check.array("images", images, 3, "(N, H, W)")
    size = _check.integer("size", size, 1)
    if source.dtype != np.uint8:
        raise TypeError(f"images must be uint8, got {source.dtype}")
    ops, (N, H, W) = devices.get("cpu"), source.shape
    result, chunk = np.empty((N, size, size), np.uint8), 1000
    matrix = np.array([[H / size, 0, 0], [0, W / size, 0]], np.float32)
    for start in range(0, N, chunk):
        # With a border of repeated edge pixels, no sample is outside the image.
        x = np.pad(source[start : start + chunk], ((0, 0), (1, 1), (1, 1)), mode="edge").astype(np.float32)[:, None]
        y, field = np.empty((len(x), 1, size, size), np.float32), np.empty((0, 2, size, size), np.float32)
        ops.warp(y, x, np.tile(matrix, (len(x), 1, 1)), field, np.zeros(1, np.float32))
        result[start : start + chunk] = np.floor(y[:, 0] + np.float32(0.5))
    return result
