"""MNIST, Fashion-MNIST, KMNIST and synthetic digits as arrays. Files are found or downloaded; hashes are checked."""

import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tinycnn import _check
from tinycnn._typing import Array, Rng
from tinycnn.data._fetch import FASHION_MNIST, KMNIST, MNIST, Source, fetch
from tinycnn.data.synthetic import synthetic_digits
from tinycnn.errors import DataUnavailableError

DIGITS = tuple("0123456789")
_CLOTHES = (
    "T-shirt/top", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot",
)  # fmt: skip
_KANA = ("o", "ki", "su", "tsu", "na", "ha", "ma", "ya", "re", "wo")

_Folder = str | os.PathLike[str] | None


@dataclass(frozen=True, eq=False, repr=False)
class Dataset:
    """A training and a test set of labelled images.

    train_images, test_images  (N, H, W) or (N, C, H, W) uint8, images of one shape
    train_labels, test_labels  (N,) int64, indices into `classes`
    classes                    the names of the classes
    sha256                     hash of the arrays and the class names, computed here

    Raises TypeError or ValueError, with the field's name, for arrays of another shape or dtype.
    """

    name: str
    train_images: Array
    train_labels: Array
    test_images: Array
    test_labels: Array
    classes: tuple[str, ...]
    sha256: str = field(init=False)

    def __post_init__(self) -> None:
        if not isinstance(self.classes, tuple) or not all(isinstance(name, str) for name in self.classes):
            raise TypeError(f"classes must be a tuple of names, got {self.classes!r}")
        if not self.classes:
            raise ValueError("classes must have at least one name, got none")
        digest = hashlib.sha256("\0".join(self.classes).encode())
        for part in ("train", "test"):
            images, labels = getattr(self, f"{part}_images"), getattr(self, f"{part}_labels")
            _check_dtype(f"{part}_images", images, np.uint8)
            if images.ndim not in (3, 4) or 0 in images.shape[1:]:
                raise ValueError(f"{part}_images must have shape (N, H, W) or (N, C, H, W), got {images.shape}")
            expected = self.train_images.shape[1:]
            if images.shape[1:] != expected:
                of = f"(N, {', '.join(map(str, expected))}), as train_images have"
                raise ValueError(f"{part}_images must have shape {of}, got {images.shape}")
            _check_dtype(f"{part}_labels", labels, np.int64)
            _check.shape(f"{part}_labels", labels, (len(images),))
            if len(labels) and not 0 <= labels.min() <= labels.max() < len(self.classes):
                raise ValueError(
                    f"{part}_labels must be 0 to {len(self.classes) - 1}, got {labels.min()} to {labels.max()}"
                )
            for array in (images, labels):
                digest.update(f"{array.dtype.str} {array.shape} ".encode())
                digest.update(np.ascontiguousarray(array).data)
        object.__setattr__(self, "sha256", digest.hexdigest())  # the class is frozen

    def __repr__(self) -> str:
        train, test = len(self.train_images), len(self.test_images)
        return f"Dataset({self.name!r}, {train:,} training and {test:,} test images, {len(self.classes)} classes)"


def _check_dtype(name: str, array: Any, dtype: type) -> None:
    if not isinstance(array, np.ndarray):
        raise TypeError(f"{name} must be a NumPy array, got {type(array).__name__}")
    if array.dtype != dtype:
        raise TypeError(f"{name} must have dtype {np.dtype(dtype)}, got {array.dtype}")


def mnist(data_dir: _Folder = None, download: bool = True) -> Dataset:
    """MNIST, handwritten digits: 60,000 images to train on and 10,000 to test on (LeCun et al., 1998).

    Searches the folder in the environment variable TINYCNN_DATA, then `data_dir`, then the cache
    ($XDG_CACHE_HOME/tinycnn, else ~/.cache/tinycnn; on macOS ~/Library/Caches/tinycnn). In each it looks in mnist/, in
    MNIST/raw/ (torchvision's layout) and in the folder itself for the four IDX files, gzipped or plain, named
    train-images-idx3-ubyte or train-images.idx3-ubyte and so on. Missing files are downloaded into `data_dir`/mnist/,
    or into the cache without a `data_dir`. The sha256 of every file's content is checked.

    Raises DamagedFileError if a file in TINYCNN_DATA or `data_dir` has another content; such files are never
    overwritten, damaged files in the cache are. Raises DataUnavailableError if the files are neither found nor
    downloaded.
    """
    return _dataset("mnist", MNIST, data_dir, download, DIGITS)


def fashion_mnist(data_dir: _Folder = None, download: bool = True) -> Dataset:
    """Fashion-MNIST, clothes in MNIST's format: 60,000 + 10,000 images of 10 classes (Xiao et al., 2017).

    Like `mnist`, with the folders fashion-mnist/, fashion_mnist/ and FashionMNIST/raw/. The published hashes (md5) are
    those of the gzip files. Plain files are therefore only checked for shape, dtype and label range, and are not
    accepted directly in a searched folder, where they could belong to another data set.
    """
    return _dataset("fashion", FASHION_MNIST, data_dir, download, _CLOTHES)


def kmnist(data_dir: _Folder = None, download: bool = True) -> Dataset:
    """Kuzushiji-MNIST, cursive Japanese in MNIST's format: 60,000 + 10,000 images (Clanuwat et al., 2018).

    Like `mnist`, with the folders kmnist/ and KMNIST/raw/. The published hashes (md5) are those of the gzip files; see
    `fashion_mnist` for plain files.
    """
    return _dataset("kmnist", KMNIST, data_dir, download, _KANA)


def _dataset(name: str, source: Source, data_dir: _Folder, download: bool, classes: tuple[str, ...]) -> Dataset:
    train_images, train_labels, test_images, test_labels = fetch(source, data_dir, download)
    return Dataset(name, train_images, train_labels, test_images, test_labels, classes)


def synthetic_dataset(n_train: int = 60_000, n_test: int = 10_000, rng: Rng = 0) -> Dataset:
    """A `Dataset` of synthetic digits; the training and the test set have independent random streams.

    rng: argument of `np.random.default_rng`; a Generator is advanced, so that a second call gives other digits.
    Raises TypeError or ValueError if a size is not a positive integer.
    """
    n_train, n_test = _check.integer("n_train", n_train, 1), _check.integer("n_test", n_test, 1)
    # The seed is drawn: not every bit generator has a seed sequence to spawn from.
    root = np.random.SeedSequence(_check.generator("rng", rng).integers(0, 2**32, 8).tolist())
    train, test = root.spawn(2)
    return Dataset(
        "synthetic", *synthetic_digits(n_train, rng=train), *synthetic_digits(n_test, rng=test), classes=DIGITS
    )


def load(
    name: str, data_dir: _Folder = None, on_message: Callable[[str], object] = print, download: bool = True
) -> Dataset:
    """Load a data set by name: "mnist", "fashion", "kmnist", "synthetic", or "auto".

    "auto" is MNIST, or the synthetic digits if MNIST is neither found nor downloaded. In that case `on_message` is
    called with two lines: the reason, and the replacement.
    Raises ValueError for another name, and the exceptions of the data set's function.
    """
    if name == "synthetic":
        return synthetic_dataset()
    if name == "auto":
        try:
            return mnist(data_dir, download)
        except DataUnavailableError as error:
            on_message(f"MNIST is not available: {error.reason}.")
            on_message(
                "Using synthetic digits instead. To use MNIST, put its four files in a folder; set TINYCNN_DATA to it."
            )
            return synthetic_dataset()
    loaders = {"mnist": mnist, "fashion": fashion_mnist, "kmnist": kmnist}
    if name not in loaders:
        raise ValueError(f"name must be auto, mnist, fashion, kmnist or synthetic, got {name!r}")
    return loaders[name](data_dir, download)


def train_val_split(n: int, n_val: int, rng: Rng) -> tuple[Array, Array]:
    """Choose `n_val` of `n` examples for validation; returns (train, validation) indices, sorted, int64.

    rng: argument of `np.random.default_rng`.
    Raises TypeError or ValueError unless n and n_val are integers with 0 <= n_val < n.
    """
    n, n_val = _check.integer("n", n, 1), _check.integer("n_val", n_val, 0)
    if n_val >= n:
        raise ValueError(f"n_val must be below n, so that training examples remain, got {n_val} of {n}")
    order = _check.generator("rng", rng).permutation(np.arange(n, dtype=np.int64))
    return np.sort(order[n_val:]), np.sort(order[:n_val])
