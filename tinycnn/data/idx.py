"""Read and write IDX, MNIST's file format: two zero bytes, type, number of dimensions, sizes and data, big-endian.

The format is described by LeCun, Cortes and Burges on the page of "The MNIST database of handwritten digits".
"""

import gzip
import math
import os
import zlib
from pathlib import Path
from typing import BinaryIO, cast

import numpy as np

from tinycnn._files import atomic_write, open_regular
from tinycnn._typing import Array
from tinycnn.errors import DamagedFileError

GZIP_MAGIC = b"\x1f\x8b"

_DTYPES = {0x08: "u1", 0x09: "i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}
_MAX_DIMENSIONS = 32  # NumPy's limit in all versions; the format allows 255
_CHUNK = 1 << 20
_MAX_BYTES = 2**30  # of an array, by default


def read_idx(path: str | os.PathLike[str], *, max_bytes: int = _MAX_BYTES) -> Array:
    """Read the IDX file at `path`, gzipped or plain (detected from the first bytes).

    Returns a new array of the file's shape, dtype uint8, int8, int16, int32, float32 or float64 in native byte order.
    Memory use is bounded by the file's content, by the sizes in its header and by `max_bytes`.

    max_bytes: the largest array that is read, 1 GiB by default
    Raises DamagedFileError if the file is not IDX, is cut short, has trailing bytes, declares a larger array, or is not
    a regular file; OSError if it cannot be read.
    """
    path = Path(path)
    with open_regular(path, _largest_file(max_bytes)) as file:
        file_size = os.fstat(file.fileno()).st_size
        if file.peek(2)[:2] == GZIP_MAGIC:
            with gzip.open(file) as unzipped:
                return parse_idx(cast(BinaryIO, unzipped), path, max_bytes, file_size)
        return parse_idx(file, path, max_bytes, file_size)


def _largest_file(size: int) -> int:
    """An upper bound on the bytes of a file, plain or gzipped, with an array of `size` bytes."""
    return size + size // 100 + 2**16


def parse_idx(file: BinaryIO, path: Path, max_bytes: int = _MAX_BYTES, file_size: int = 0) -> Array:
    """Read IDX from an open file up to its end.

    path: for the messages   max_bytes: see `read_idx`   file_size: bytes of the file, gzipped or not, if known
    """
    try:
        magic = _read(file, 4)
        if len(magic) < 4 or magic[:2] != b"\0\0" or magic[2] not in _DTYPES:
            types = ", ".join(f"{code:02x}" for code in _DTYPES)
            raise DamagedFileError(
                f"{path}: not an IDX file: expected it to begin with 00 00, a type ({types}) and the number "
                f"of dimensions, got {magic.hex(' ') or 'an empty file'}"
            )
        ndim = magic[3]
        if not 1 <= ndim <= _MAX_DIMENSIONS:
            raise DamagedFileError(f"{path}: expected 1 to {_MAX_DIMENSIONS} dimensions, got {ndim}")
        header = _read(file, 4 * ndim)
        if len(header) < 4 * ndim:
            raise DamagedFileError(
                f"{path}: cut short: expected {ndim} sizes ({4 * ndim} bytes), got {len(header)} bytes"
            )
        shape = tuple(np.frombuffer(header, ">u4").tolist())
        dtype = np.dtype(_DTYPES[magic[2]])
        size = math.prod(shape) * dtype.itemsize
        if size > max_bytes:
            raise DamagedFileError(
                f"{path}: expected an array of at most {max_bytes:,} bytes, got {size:,} for shape {shape}"
            )
        if file_size > _largest_file(size):  # zeros after the end of a gzip file are read one by one
            raise DamagedFileError(
                f"{path}: too long: expected {size} bytes for shape {shape}, got a file of {file_size}"
            )
        content = _read(file, size + 1)  # one byte more, to detect trailing bytes
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DamagedFileError(f"{path}: expected a complete gzip file, got: {error}") from error
    if len(content) != size:
        problem = "cut short" if len(content) < size else "too long"
        length = f"{len(content)}" if len(content) < size else "more"
        raise DamagedFileError(f"{path}: {problem}: expected {size} bytes for shape {shape}, got {length}")
    try:
        array = np.frombuffer(content, dtype).reshape(shape)
    except ValueError as error:  # one size is 0, the product of the others overflows
        raise DamagedFileError(f"{path}: expected a shape that memory can hold, got {shape}") from error
    return array.astype(dtype.newbyteorder("="), copy=False)


def _read(file: BinaryIO, size: int) -> bytearray:
    data = bytearray()
    while len(data) < size:
        chunk = file.read(min(_CHUNK, size - len(data)))
        if not chunk:
            break
        data += chunk
    return data


def write_idx(path: str | os.PathLike[str], array: Array) -> None:
    """Write `array` to `path` atomically; gzipped if the name ends in .gz.

    array: 1 to 32 dimensions, dtype uint8, int8, int16, int32, float32 or float64.
    Raises ValueError for another dtype or number of dimensions or a size of 2**32 or more, OSError if writing fails.
    """
    path, array = Path(path), np.asarray(array)
    codes = {np.dtype(name).newbyteorder("="): code for code, name in _DTYPES.items()}
    code = codes.get(array.dtype.newbyteorder("="))
    if code is None:
        names = ", ".join(str(dtype) for dtype in codes)
        raise ValueError(f"array must have a dtype that IDX can store ({names}), got {array.dtype}")
    if not 1 <= array.ndim <= _MAX_DIMENSIONS or max(array.shape) >= 2**32:
        raise ValueError(
            f"array must have 1 to {_MAX_DIMENSIONS} dimensions, each below 2**32, got shape {array.shape}"
        )
    head = bytes([0, 0, code, array.ndim]) + np.asarray(array.shape, ">u4").tobytes()
    body = array.astype(_DTYPES[code], order="C", copy=False).tobytes()
    with atomic_write(path) as file:
        if path.suffix == ".gz":
            # Without a name and a date, so that equal arrays give equal files.
            with gzip.GzipFile("", "wb", fileobj=file, mtime=0) as zipped:
                zipped.write(head)
                zipped.write(body)
        else:
            file.write(head)
            file.write(body)
