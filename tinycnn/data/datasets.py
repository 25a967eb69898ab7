"""MNIST and its two look-alikes as arrays: found on this machine, or downloaded, and always checked."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tinycnn import _check
from tinycnn.data._fetch import FASHION_MNIST, KMNIST, MNIST, Source, fetch
from tinycnn.data.synthetic import synthetic_digits
from tinycnn.errors import DataUnavailableError

DIGITS = tuple("0123456789")
_CLOTHES = (
    "T-shirt/top",
    "trouser",
    "pullover",
    "dress",
    "coat",
    "sandal",
    "shirt",
    "sneaker",
    "bag",
    "ankle boot",
)
_KANA = ("o", "ki", "su", "tsu", "na", "ha", "ma", "ya", "re", "wo")

_Folder = str | os.PathLike[str] | None


@dataclass(frozen=True, eq=False, repr=False)
class Dataset:
    """Images with labels, in a training and a test part.

    train_images, test_images: (N, 28, 28) uint8, 0 is background.  train_labels, test_labels: (N,) int64,
    indices into `classes`, which names them.  sha256: a hash of all of the above but the name, made here.
    Raises TypeError or ValueError, naming the field, if the arrays are not of this form.
    """

    name: str
    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray
    classes: tuple[str, ...]
    sha256: str = field(init=False)

    def __post_init__(self) -> None:
        if not isinstance(self.classes, tuple) or not all(isinstance(name, str) for name in self.classes):
            raise TypeError(f"classes: expected a tuple of names, got {self.classes!r}")
        if not self.classes:
            raise ValueError("classes: expected at least one name, got none")
        digest = hashlib.sha256("\0".join(self.classes).encode())
        for part in ("train", "test"):
            images, labels = getattr(self, f"{part}_images"), getattr(self, f"{part}_labels")
            _check_field(f"{part}_images", images, np.uint8, (None, 28, 28))
            _check_field(f"{part}_labels", labels, np.int64, (len(images),))
            if len(labels) and not 0 <= labels.min() <= labels.max() < len(self.classes):
                raise ValueError(
                    f"{part}_labels: expected 0 to {len(self.classes) - 1}, got {labels.min()} to {labels.max()}"
                )
            for array in (images, labels):
                digest.update(f"{array.dtype.str} {array.shape} ".encode())
                digest.update(np.ascontiguousarray(array).data)
        object.__setattr__(self, "sha256", digest.hexdigest())  # the way to set a field of a frozen class

    def __repr__(self) -> str:
        train, test = len(self.train_images), len(self.test_images)
        return f"Dataset({self.name!r}, {train:,} training and {test:,} test images, {len(self.classes)} classes)"


def _check_field(name: str, array: Any, dtype: type, shape: tuple[int | None, ...]) -> None:
    if not isinstance(array, np.ndarray):
        raise TypeError(f"{name}: expected a NumPy array, got {type(array).__name__}")
    if array.dtype != dtype:
        raise TypeError(f"{name}: expected dtype {np.dtype(dtype)}, got {array.dtype}")
    fits = array.ndim == len(shape) and all(want in (None, got) for want, got in zip(shape, array.shape, strict=True))
    if not fits:
        wanted = ", ".join("N" if want is None else str(want) for want in shape) + "," * (len(shape) == 1)
        raise ValueError(f"{name}: expected shape ({wanted}), got {array.shape}")


def mnist(data_dir: _Folder = None, download: bool = True) -> Dataset:
    """MNIST, handwritten digits: 60,000 images to train on and 10,000 to test on (LeCun et al., 1998).

    Looks in the folder that the environment variable TINYCNN_DATA names, in `data_dir` and in the cache
    ($XDG_CACHE_HOME/tinycnn, else ~/.cache/tinycnn; on macOS ~/Library/Caches/tinycnn); in each of them in
    mnist/, in MNIST/raw/ (as torchvision has it) and in the folder itself, for the four IDX files, gzipped
    or plain, named train-images-idx3-ubyte or train-images.idx3-ubyte and so on.  Failing that it downloads
    them into `data_dir`/mnist/, or else into the cache.  The content of every file must have the sha256 of MNIST.

    Raises DamagedFileError if TINYCNN_DATA or `data_dir` hold a file with another content (it is never
    overwritten; in the cache it is), DataUnavailableError if the files are not found and not downloaded.
    """
    return _dataset("mnist", MNIST, data_dir, download, DIGITS)


def fashion_mnist(data_dir: _Folder = None, download: bool = True) -> Dataset:
    """Fashion-MNIST, clothes in MNIST's format: 60,000 + 10,000 images of 10 kinds (Xiao et al., 2017).

    Found, downloaded and refused like `mnist`, in fashion-mnist/, fashion_mnist/ and FashionMNIST/raw/.  Its
    published hashes (md5) are of the gzip files.  A plain file is therefore only checked for its shape, dtype
    and label range, and is not accepted directly in a searched folder, where it might be of another data set.
    """
    return _dataset("fashion", FASHION_MNIST, data_dir, download, _CLOTHES)


def kmnist(data_dir: _Folder = None, download: bool = True) -> Dataset:
    """Kuzushiji-MNIST, cursive Japanese in MNIST's format: 60,000 + 10,000 images (Clanuwat et al., 2018).

    Found, downloaded and refused like `mnist`, in kmnist/ and KMNIST/raw/.  Its published hashes (md5) are of
    the gzip files; what that means for plain files is said at `fashion_mnist`.
    """
    return _dataset("kmnist", KMNIST, data_dir, download, _KANA)


def _dataset(name: str, source: Source, data_dir: _Folder, download: bool, classes: tuple[str, ...]) -> Dataset:
    train_images, train_labels, test_images, test_labels = fetch(source, data_dir, download)
    return Dataset(name, train_images, train_labels, test_images, test_labels, classes)


def synthetic_dataset(n_train: int = 60_000, n_test: int = 10_000, rng: Any = 0) -> Dataset:
    """A `Dataset` of synthetic digits; the training and the test part have independent random streams.

    rng: anything `np.random.default_rng` takes; a Generator is advanced, so a second call gives another set.
    Raises TypeError or ValueError if a size is no positive integer.
    """
    n_train, n_test = _check.integer("n_train", n_train, 1), _check.integer("n_test", n_test, 1)
    # Drawn, not taken from the generator's own seed: not every bit generator has one.
    root = np.random.SeedSequence(_check.generator("rng", rng).integers(0, 2**32, 8).tolist())
    train, test = root.spawn(2)
    return Dataset(
        "synthetic",
        *synthetic_digits(n_train, rng=train),
        *synthetic_digits(n_test, rng=test),
        classes=DIGITS,
    )


def load(name: str, data_dir: _Folder = None, on_message: Callable[[str], object] = print) -> Dataset:
    """Load a data set by name: "mnist", "fashion", "kmnist", "synthetic", or "auto".

    "auto" is MNIST, or, if that can be neither found nor downloaded, the synthetic digits; `on_message` is
    then called twice, with one line each: why, and what is used instead.
    Raises ValueError for another name, and what the data set's own function raises.
    """
    if name == "synthetic":
        return synthetic_dataset()
    if name == "auto":
        try:
            return mnist(data_dir)
        except DataUnavailableError as error:
            on_message(f"MNIST is not available: {error.reason}.")
            on_message(
                "Using synthetic digits instead; to get MNIST, put its four files in a folder "
                "and set TINYCNN_DATA to it."
            )
            return synthetic_dataset()
    loaders = {"mnist": mnist, "fashion": fashion_mnist, "kmnist": kmnist}
    if name not in loaders:
        raise ValueError(f"name: expected auto, mnist, fashion, kmnist or synthetic, got {name!r}")
    return loaders[name](data_dir)


def train_val_split(n: int, n_val: int, rng: Any) -> tuple[np.ndarray, np.ndarray]:
    """Choose `n_val` of `n` examples for validation; returns (train, validation) indices, sorted, int64.

    rng: anything `np.random.default_rng` takes.
    Raises TypeError or ValueError unless n and n_val are integers with 0 <= n_val < n.
    """
    for argument, value in (("n", n), ("n_val", n_val)):
        if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
            raise TypeError(f"{argument}: expected an integer, got {type(value).__name__}")
    if n < 1:
        raise ValueError(f"n: expected a positive number, got {n}")
    if not 0 <= n_val < n:
        raise ValueError(f"n_val: expected 0 to {n - 1}, so that examples to train on remain, got {n_val}")
    order = _check.generator("rng", rng).permutation(np.arange(n, dtype=np.int64))
    return np.sort(order[n_val:]), np.sort(order[:n_val])
