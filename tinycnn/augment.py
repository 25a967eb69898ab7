"""Random distortions of training images, for `DeviceDataset(..., augment=(...))`, with torchvision's names."""

import copy
from typing import Any

import numpy as np

from tinycnn import _check, devices
from tinycnn._repr import InitRepr


def _amount(name, value):
    return _check.number(name, value, 0)


def _range(name, value):
    """Two positive numbers, the first not above the second."""
    if not isinstance(value, (tuple, list)) or len(value) != 2:
        raise ValueError(f"{name} must be a pair (low, high), got {value!r}")
    low, high = (_check.number(name, v, 0) for v in value)
    if not 0 < low <= high:
        raise ValueError(f"{name} must be a pair (low, high) with 0 < low <= high, got {value!r}")
    return low, high


class RandomAffine(InitRepr):
    """Squeeze, shear, turn, scale and move every image, by amounts of its own.

    degrees    turned by up to so many degrees, either way
    translate  moved by up to so many pixels (horizontally, vertically), either way
    scale      made larger by a number between the two
    squeeze    e between the two: e times as wide and 1/e times as high
    shear      sheared along x by an angle of up to so many degrees, either way
    """

    def __init__(self, degrees=0, translate=(0, 0), scale=(1, 1), squeeze=(1, 1), shear=0):
        self.degrees = _check.number("degrees", degrees, 0, maximum=180)
        if not isinstance(translate, (tuple, list)) or len(translate) != 2:
            raise ValueError(f"translate must be a pair (horizontal, vertical), got {translate!r}")
        self.translate = _amount("translate", translate[0]), _amount("translate", translate[1])
        self.scale, self.squeeze = _range("scale", scale), _range("squeeze", squeeze)
        self.shear = _check.number("shear", shear, 0, below=90)


class ElasticTransform(InitRepr):
    """Move every pixel by a smooth random field (Simard, Steinkraus and Platt 2003): noise, uniform in +-1 pixel,
    smoothed by a Gaussian of `sigma` pixels, times `alpha`.  The defaults are theirs, for digits of 28 x 28 pixels."""

    def __init__(self, alpha=34, sigma=4):
        self.alpha, self.sigma = _amount("alpha", alpha), _amount("sigma", sigma)
        if self.sigma == 0:
            raise ValueError("sigma must be positive, got 0")

    def weights(self):
        """The Gaussian from its middle outwards, cut off at 4 sigma; its sum, both sides taken, is 1."""
        w = np.exp(-0.5 * (np.arange(int(4 * self.sigma + 0.5) + 1) / self.sigma) ** 2)
        return w / (2 * w.sum() - w[0])


class ColorJitter(InitRepr):
    """Change the brightness of every image by a number in 1 +- brightness, and then its contrast by one in
    1 +- contrast.  For pixels 0 ... 1: what leaves that range is cut off."""

    def __init__(self, brightness=0, contrast=0):
        self.brightness, self.contrast = _amount("brightness", brightness), _amount("contrast", contrast)


TRANSFORMS = RandomAffine, ElasticTransform, ColorJitter


class Augmentation:
    """What `DeviceDataset` does to a batch: at most one transformation of each kind.  Affine map and elastic field
    become one interpolation; brightness and contrast come last, in whatever order the transformations were given.

    k            the backend
    scale, shift a pixel p in 0 ... 1 is p * scale[c] + shift[c] in a batch
    seed         where the random numbers begin; the kernels compute them from it and the number of the batch
    """

    counter: Any  # these three are set by `copy_for_training`
    epoch_start: Any
    _buffers: dict

    def __init__(self, transforms, seed, k, scale, shift):
        chosen = {}
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
            self.jitter = None  # not even rounding
        self.warps = self.affine is not None or self.elastic is not None
        seeds = np.random.default_rng(_check.integer("seed", seed, 0)).integers(2**63, size=len(TRANSFORMS))
        self.affine_seed, self.elastic_seed, self.jitter_seed = map(int, seeds)
        self.ops, self.scale, self.shift = k, scale, shift
        self.batch_count = 0  # batches of the trainings so far

    def __getstate__(self):
        return {name: value for name, value in vars(self).items() if name != "ops"}  # a module; the data set has it

    def copy_for_training(self):
        """The same for one training, which counts on its own from what has been drawn before."""
        mine = copy.copy(self)
        mine.ops = self.ops
        # Batches so far, and how many there were when the epoch began.
        mine.counter, mine.epoch_start = (self.ops.to_device(np.array([self.batch_count])) for _ in range(2))
        mine._buffers = {}
        return mine

    def batches_drawn(self):
        """How many have been drawn, those before this training included."""
        return int(self.ops.to_host(self.counter)[0])

    def buffers(self, x):
        """Arrays for a batch like x: (images before they are moved, matrices, field, weights, scale, shift)."""
        key = x.shape[1:], x.dtype
        if key not in self._buffers or len(x) > len(self._buffers[key][0]):
            k, n, (_, H, W) = self.ops, len(x), x.shape[1:]
            weights = np.zeros(0) if self.elastic is None else self.elastic.weights()
            self._buffers[key] = (
                k.empty(x.shape if self.warps else (0, *x.shape[1:]), x.dtype),
                k.empty((0 if self.affine is None else n, 2, 3), x.dtype),
                k.empty((0 if self.elastic is None else n, 2, H, W), x.dtype),
                *(k.to_device(a.astype(x.dtype)) for a in (weights, self.scale, self.shift)),
            )
        images, matrices, field, *constants = self._buffers[key]
        return images[: len(x)], matrices[: len(x)], field[: len(x)], *constants

    def start_epoch(self, repeat):
        """An epoch begins: a new one, or the last one `again`."""
        here, there = (self.counter, self.epoch_start) if repeat else (self.epoch_start, self.counter)
        self.ops.copy_to(here, there)

    def input_buffer(self, x):
        """Where a batch is to be gathered that `apply` turns into x."""
        return self.buffers(x)[0] if self.warps else x

    def apply(self, x):
        """The next batch, from what has been gathered into `input_buffer(x)`, into x."""
        k, affine, elastic, jitter = self.ops, self.affine, self.elastic, self.jitter
        if not self.warps and jitter is None:
            return
        images, matrices, field, weights, scale, shift = self.buffers(x)
        k.increment(self.counter)
        if affine is not None:
            k.random_affine(
                matrices, self.counter, self.affine_seed, affine.degrees, affine.translate, affine.scale,
                affine.squeeze, affine.shear,
            )  # fmt: skip
        if elastic is not None:
            k.elastic_field(field, weights, self.counter, self.elastic_seed, elastic.alpha)
        if self.warps:
            k.warp(x, images, matrices, field, shift)
        if jitter is not None:
            k.jitter(x, self.counter, self.jitter_seed, jitter.brightness, jitter.contrast, scale, shift)


def resize(images, size):
    """uint8 images (N, H, W) as (N, size, size), by bilinear interpolation between the centres of pixels; beyond them
    the edge goes on.  As torchvision's Resize with antialias=False."""
    images, size = _check.array("images", images, 3, "(N, H, W)"), _check.integer("size", size, 1)
    if images.dtype != np.uint8:
        raise TypeError(f"images must be uint8, got {images.dtype}")
    k, (N, H, W) = devices.get("cpu"), images.shape
    result, chunk = np.empty((N, size, size), np.uint8), 1000
    matrix = np.array([[H / size, 0, 0], [0, W / size, 0]], np.float32)
    for at in range(0, N, chunk):
        # With a frame of its own edge no place lies outside of the image.
        x = np.pad(images[at : at + chunk], ((0, 0), (1, 1), (1, 1)), mode="edge").astype(np.float32)[:, None]
        y = np.empty((len(x), 1, size, size), np.float32)
        k.warp(y, x, np.tile(matrix, (len(x), 1, 1)), np.empty((0, 2, size, size), np.float32), np.zeros(1, np.float32))
        result[at : at + chunk] = np.floor(y[:, 0] + np.float32(0.5))
    return result
