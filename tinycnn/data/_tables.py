"""Images in one file: a CSV of pixels, or NumPy's .npz.  Memory is bounded by sizes that are known before reading."""

import math
import os
import struct
import tokenize
import warnings
import zipfile
import zlib
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from tinycnn._check import describe, short_repr
from tinycnn._files import open_regular
from tinycnn._typing import Array, Shape
from tinycnn.errors import DamagedFileError

_MAX_LINE = 2**24  # bytes of a line of CSV: a picture of 4 megapixels
_NAMES = (
    ("x_train", "y_train", "x_test", "y_test"),
    ("train_images", "train_labels", "test_images", "test_labels"),
    ("x", "y"),
)


class Table(NamedTuple):
    """images (N, h, w, 1 or 3), labels (N,) int64; white: the value of a white pixel"""

    images: Array
    labels: Array
    white: int


def max_bytes() -> int:
    """What an array of images may take: half of the memory, at most 8 GiB."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min(2**33, memory // 2)


# ---- CSV


def read_csv(path: Path, shape: Shape) -> Table:
    """Lines of a label and pixels 0 to 255, as Kaggle has MNIST.  Raises DamagedFileError, with the line; OSError.

    The label is the column with that name in the header, or the first.  The pixels are those of `shape`, channel by
    channel and row by row, or of a grey square.
    """
    labels: list[int] = []
    pixels = bytearray()
    limit, column, columns, number = max_bytes(), 0, 0, 0
    with open_regular(path, 8 * limit) as file, warnings.catch_warnings():
        warnings.simplefilter("error", DeprecationWarning)  # what np.fromstring says of text that is no number
        while line := file.readline(_MAX_LINE + 1):
            number += 1
            where = f"{path}, line {number}"
            if len(line) > _MAX_LINE:
                raise DamagedFileError(f"{where}: expected at most {_MAX_LINE:,} bytes, got more")
            line = line.removeprefix(b"\xef\xbb\xbf").strip()
            if not line:
                continue
            if not columns:
                names = [field.strip().lower() for field in line.replace(b'"', b"").split(b",")]
                columns = len(names)
                _pixel_shape(columns - 1, shape, f"{where}, beside the label")
                if b"label" in names or sum(not name.isdigit() for name in names) > columns / 2:
                    column = names.index(b"label") if b"label" in names else 0
                    continue
            label, row = _fast_row(line, columns, column) or _checked_row(line, columns, column, where)
            labels.append(label)
            pixels += row
            if len(pixels) > limit:
                raise DamagedFileError(f"{path}: expected at most {limit:,} pixels, got more")
    if not labels:
        raise DamagedFileError(f"{path}: expected lines of a label and pixels, got none")
    size = _pixel_shape(columns - 1, shape, str(path))
    images = np.frombuffer(pixels, np.uint8).reshape(len(labels), *size)
    return Table(np.moveaxis(images, 1, 3), np.array(labels, np.int64), 255)


def _fast_row(line: bytes, columns: int, column: int) -> tuple[int, bytes] | None:
    """(label, pixels) of a line of plain integers, seven times as fast as `_checked_row`; None for any other."""
    try:
        values = np.fromstring(line, np.int64, sep=",")
    except (ValueError, DeprecationWarning):
        return None
    if len(values) != columns or line.count(b",") != columns - 1:  # it takes a comma at the end
        return None
    label = int(values[column])
    row = values[1:] if column == 0 else np.delete(values, column)
    if row.min() < 0 or row.max() > 255 or abs(label) >= 2**62:  # np.fromstring saturates at 2**63 - 1
        return None
    return label, row.astype(np.uint8).tobytes()


def _checked_row(line: bytes, columns: int, column: int, where: str) -> tuple[int, bytes]:
    """(label, pixels) of a line.  Raises DamagedFileError with what is wrong."""
    fields = line.replace(b'"', b"").split(b",")
    if len(fields) != columns:
        raise DamagedFileError(f"{where}: expected {columns} columns, as in line 1, got {len(fields)}")
    label = _label(fields.pop(column), where)
    try:
        return label, bytes(map(int, fields))
    except ValueError:
        wrong = next((field for field in fields if not _is_pixel(field)), max(fields, key=len))
        text = short_repr(wrong.decode("latin-1"), 40)
        raise DamagedFileError(f"{where}: pixels must be integers 0 to 255, got {text}") from None


def _is_pixel(text: bytes) -> bool:
    text = text.strip()
    digits = text.lstrip(b"0")
    return text.isdigit() and len(text) < 1000 and len(digits) <= 3 and int(b"0" + digits) <= 255


def _label(text: bytes, where: str) -> int:
    try:
        value = int(text)
        if not -(2**63) <= value < 2**63:
            raise ValueError
    except ValueError:
        raise DamagedFileError(
            f"{where}: the label must be an integer, got {short_repr(text.decode('latin-1'), 40)}"
        ) from None
    return value


def _pixel_shape(count: int, shape: Shape, where: str) -> Shape:
    """The shape (C, H, W) of `count` pixels: `shape`, or a grey square."""
    side = math.isqrt(max(count, 0))
    if count == math.prod(shape):
        return shape
    if count > 0 and side * side == count:
        return 1, side, side
    expected = f"{math.prod(shape)} pixels ({' x '.join(map(str, shape))}) or a square number of them"
    raise DamagedFileError(f"{where}: expected images of {expected}, got {count}")


# ---- NPZ


def read_npz(path: Path, shape: Shape) -> tuple[Table, Table | None]:
    """The training and the test set (None without one) of arrays x and y, or x_train, y_train, x_test and y_test.

    x: (N, h, w), (N, h, w, C), (N, C, h, w) or (N, pixels), C 1 or 3; integers 0 to 255 (or 65535), floating-point
    numbers 0 to 1 (or 255), or booleans.   y: (N,) or (N, 1) integers.
    Raises DamagedFileError, with the array; OSError.
    """
    with open_regular(path, 2 * max_bytes()) as file:
        try:
            names, arrays = _read_arrays(path, file)
        except DamagedFileError:
            raise
        except (
            zipfile.BadZipFile, zlib.error, struct.error, tokenize.TokenError, OSError,
            ValueError, EOFError, RuntimeError, SyntaxError, LookupError, TypeError, RecursionError,
        ) as error:  # what zipfile and np.lib.format raise for damaged bytes # fmt: skip
            raise DamagedFileError(f"{path}: expected arrays of NumPy in a zip file, got {_reason(error)}") from error
    tables = [
        _table(f"{path}: {x}", arrays[x], f"{path}: {y}", arrays[y], shape)
        for x, y in zip(names[::2], names[1::2], strict=True)
    ]
    return tables[0], tables[1] if len(tables) > 1 else None


def _reason(error: BaseException) -> str:
    text = "".join(c if c.isprintable() else " " for c in str(error))
    return f"{type(error).__name__}: {short_repr(text, 200)}"


def _read_arrays(path: Path, file: BinaryIO) -> tuple[tuple[str, ...], dict[str, Array]]:
    with zipfile.ZipFile(file) as archive:
        members = {info.filename[:-4].lower(): info for info in archive.infolist() if info.filename.endswith(".npy")}
        names = _array_names(path, members)
        total = sum(members[name].file_size for name in names)
        if total > max_bytes():
            raise DamagedFileError(f"{path}: expected at most {max_bytes():,} bytes of arrays, got {total:,}")
        return names, {name: _read_member(path, archive, members[name], name) for name in names}


def _array_names(path: Path, members: dict[str, Any]) -> tuple[str, ...]:
    for names in _NAMES:
        if all(name in members for name in names):
            return names
    found = ", ".join(short_repr(name, 60) for name in list(members)[:10]) or "no arrays"
    raise DamagedFileError(f"{path}: expected arrays x and y, or x_train, y_train, x_test and y_test, got {found}")


def _read_member(path: Path, archive: zipfile.ZipFile, info: zipfile.ZipInfo, name: str) -> Array:
    """An array whose size in the zip directory is that in its own header."""
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise DamagedFileError(f"{path}: {name} must be stored or deflated, got zip method {info.compress_type}")
    with archive.open(info) as member:
        version = np.lib.format.read_magic(member)
        if version not in ((1, 0), (2, 0)):
            raise DamagedFileError(f"{path}: {name} must have version 1.0 or 2.0 of the npy format, got {version}")
        read_header: Any = getattr(np.lib.format, f"read_array_header_{version[0]}_0")
        size, _, dtype = read_header(member)
        if dtype.kind not in "biuf":
            raise DamagedFileError(f"{path}: {name} must be an array of numbers, got dtype {dtype}")
        expected, found = math.prod(size) * dtype.itemsize, info.file_size - member.tell()
        if 0 in size or expected != found:
            raise DamagedFileError(
                f"{path}: {name} must have {expected:,} bytes for shape {size} (not empty), got {found:,}"
            )
    with archive.open(info) as member:
        array: Array = np.lib.format.read_array(member, allow_pickle=False)
        return array


def _table(x_name: str, x: Array, y_name: str, y: Array, shape: Shape) -> Table:
    if y.dtype.kind not in "iu" or (y.dtype.kind == "u" and y.max() >= 2**63):
        raise DamagedFileError(f"{y_name} must hold integer labels, got dtype {y.dtype}")
    if y.ndim not in (1, 2) or y.shape[1:] not in ((), (1,)):
        raise DamagedFileError(f"{y_name} must have shape (N,), one label an image, got {y.shape}")
    if x.ndim == 2:
        x = x.reshape(len(x), *_pixel_shape(x.shape[1], shape, x_name))
    if x.ndim == 3:
        x = x[..., None]
    elif x.ndim == 4 and x.shape[1] in (1, 3) and (x.shape[3] not in (1, 3) or x.shape[1:] == shape):
        x = np.moveaxis(x, 1, 3)
    if x.ndim != 4 or x.shape[3] not in (1, 3):
        raise DamagedFileError(
            f"{x_name} must have shape (N, h, w), (N, h, w, C), (N, C, h, w) or (N, pixels) with C 1 or 3, "
            f"got {describe(x)}"
        )
    if len(x) != len(y):
        raise DamagedFileError(f"{x_name} must have as many images as there are labels, {len(y)}, got {len(x)}")
    low, high = x.min(), x.max()
    whites = {"b": (1,), "f": (1, 255)}.get(x.dtype.kind, (255, 65535))
    white = next((white for white in whites if high <= white), None)
    if white is None or not low >= 0:
        raise DamagedFileError(f"{x_name} must have pixels 0 to {' or '.join(map(str, whites))}, got {low} to {high}")
    return Table(x, y.reshape(-1).astype(np.int64), white)
