"""Data sets: MNIST, Fashion-MNIST, KMNIST, synthetic digits, your own images, and the IDX file format."""

from tinycnn.data.datasets import Dataset, fashion_mnist, kmnist, load, mnist, synthetic_dataset, train_val_split
from tinycnn.data.idx import read_idx, write_idx
from tinycnn.data.images import from_files
from tinycnn.data.negatives import not_digits
from tinycnn.data.synthetic import synthetic_digits
from tinycnn.errors import DamagedFileError, DataUnavailableError

__all__ = [
    "DamagedFileError",
    "DataUnavailableError",
    "Dataset",
    "fashion_mnist",
    "from_files",
    "kmnist",
    "load",
    "mnist",
    "not_digits",
    "read_idx",
    "synthetic_dataset",
    "synthetic_digits",
    "train_val_split",
    "write_idx",
]
