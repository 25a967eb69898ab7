"""Data sets: MNIST and its look-alikes, synthetic digits, and the IDX file format."""

from tinycnn.data._fetch import DataUnavailableError
from tinycnn.data.datasets import Dataset, fashion_mnist, kmnist, load, mnist, synthetic_dataset, train_val_split
from tinycnn.data.idx import DamagedFileError, read_idx, write_idx
from tinycnn.data.synthetic import synthetic_digits

__all__ = [
    "DamagedFileError",
    "DataUnavailableError",
    "Dataset",
    "fashion_mnist",
    "kmnist",
    "load",
    "mnist",
    "read_idx",
    "synthetic_dataset",
    "synthetic_digits",
    "train_val_split",
    "write_idx",
]
