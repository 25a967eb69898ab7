"""Save and load named arrays and metadata as a NumPy `.npz` file, never as a pickle.

The file is an uncompressed zip of `.npy` members, so `np.load` reads it too.  This reader is stricter than NumPy's: it
evaluates nothing, verifies every checksum and every declared size before it allocates, and needs no more memory than a
small multiple of the file's size.
"""

import io
import json
import math
import os
import re
import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tinycnn._files import atomic_write
from tinycnn._typing import Array
from tinycnn.errors import DamagedCheckpointError

METADATA = "__metadata__"  # reserved name: metadata as UTF-8 JSON in a uint8 array

_HEADER = re.compile(
    rb"\{'descr': '([<>|][biufc]\d{1,2})', 'fortran_order': (True|False), "
    rb"'shape': \(((?:\d{1,19}, ?)*(?:\d{1,19})?)\),? ?\}\s*"
)


def save(path: str | os.PathLike[str], arrays: Mapping[str, Array], metadata: Mapping[str, Any] | None = None) -> None:
    """Write `arrays` and `metadata` to `path` (`*.npz`) atomically.

    arrays: name -> array of any shape, of booleans, integers, floats or complex numbers.
    metadata: anything that JSON can represent; tuples are loaded as lists and keys as strings.
    The same content gives the same bytes.  An existing file is replaced when the new one is on the disk, and survives
    any failure.
    Raises ValueError for another suffix, a name that cannot be stored or an array of objects or text; TypeError for
    metadata or names of a wrong type; OSError if writing fails.
    """
    data = _pack(arrays, {} if metadata is None else metadata)
    with atomic_write(_npz(path)) as file:
        file.write(data)


def load(path: str | os.PathLike[str]) -> tuple[dict[str, Array], dict[str, Any]]:
    """Read (arrays, metadata) from `path`; the arrays are new and writable.

    Also reads files of `np.savez` that contain numbers only; their metadata is {}.
    Raises FileNotFoundError, ValueError for another suffix, and DamagedCheckpointError for a file that is damaged,
    truncated, compressed, not an npz, or contains pickled objects.
    """
    path = _npz(path)
    data = path.read_bytes()
    try:
        return _unpack(data)
    except Exception as error:  # arbitrary bytes can raise anything in a parser
        reason = str(error) or type(error).__name__
        raise DamagedCheckpointError(f"{path}: not a usable checkpoint: {reason}") from error


def _npz(path: str | os.PathLike[str]) -> Path:
    path = Path(path)
    if path.suffix != ".npz":
        raise ValueError(f"path must be a file name ending in .npz, got {str(path)!r}")
    return path


def _pack(arrays: Mapping[str, Array], metadata: Mapping[str, Any]) -> bytes:
    if not isinstance(metadata, Mapping):
        raise TypeError(f"metadata must be a mapping, got {type(metadata).__name__}")
    try:
        text = json.dumps(dict(metadata))
    except (TypeError, ValueError) as error:
        raise type(error)(f"metadata: {error}") from error
    members = {METADATA: np.frombuffer(text.encode(), np.uint8)}
    for name, value in arrays.items():
        members[_checked_name(name)] = _checked_array(name, value)

    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        for name, array in members.items():
            # A constant date (zip's first day): equal content gives equal bytes.
            member = zipfile.ZipInfo(f"{name}.npy", date_time=(1980, 1, 1, 0, 0, 0))
            member.external_attr = 0o644 << 16
            content = io.BytesIO()
            np.lib.format.write_array(content, array, allow_pickle=False)
            archive.writestr(member, content.getbuffer())
    return file.getvalue()


def _checked_name(name: str) -> str:
    if not isinstance(name, str):
        raise TypeError(f"arrays must have names of type str, got {name!r}")
    if name == METADATA:
        raise ValueError(f"arrays: the name {METADATA!r} is reserved")
    # zipfile cuts a name at NUL and turns a backslash into a slash on Windows.
    if not 1 <= len(name) <= 1000 or set(name) & {"\0", "\\"}:
        raise ValueError(f"arrays: {name[:1000]!r} cannot be the name of an array")
    return name


def _checked_array(name: str, value: Any) -> Array:
    try:
        array = np.asarray(value)
    except ValueError as error:  # a ragged list
        raise ValueError(f"arrays[{name!r}]: {error}") from error
    if array.dtype.kind not in "biufc" or array.dtype.isbuiltin == 2:  # 2: a type from another package
        raise ValueError(f"arrays[{name!r}] must be numbers or booleans, got dtype {array.dtype}")
    return array


def _unpack(data: bytes) -> tuple[dict[str, Array], dict[str, Any]]:
    arrays: dict[str, Array] = {}
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        members = archive.infolist()
        # A wrong length in the zip directory hides the members after it; the end record holds the true count.
        if int.from_bytes(data[-12:-10], "little") != min(len(members), 0xFFFF):
            raise ValueError("the directory of the zip file is damaged")
        if sum(member.file_size for member in members) > len(data):  # also catches members that overlap
            raise ValueError("its members claim more bytes than the file has")
        for member in members:
            name = member.filename.removesuffix(".npy")
            if name == member.filename or not name or name in arrays:
                raise ValueError(f"unexpected or repeated member {member.filename!r}")
            # Without zip's UTF-8 flag (bit 11) a name beyond ASCII would silently be read as another.
            if not (name.isascii() or member.flag_bits & 0x800):
                raise ValueError(f"member {member.filename!r} is not named in UTF-8")
            if member.compress_type != zipfile.ZIP_STORED or member.compress_size != member.file_size:
                raise ValueError(f"array {name!r} is compressed (as np.savez_compressed does): save it with np.savez")
            arrays[name] = _parse_npy(name, archive.read(member))  # read() verifies the checksum
    metadata = json.loads(arrays.pop(METADATA).tobytes()) if METADATA in arrays else {}
    if not isinstance(metadata, dict):
        raise ValueError("its metadata is not a mapping")
    return arrays, metadata


def _parse_npy(name: str, content: bytes) -> Array:
    # numpy.lib.format: magic string, version, header length (2 bytes, 4 from version 2), header, data.
    if content[:6] != b"\x93NUMPY" or content[6:8] not in (b"\1\0", b"\2\0", b"\3\0"):
        raise ValueError(f"array {name!r} is not in the npy format")
    length = "<H" if content[6] == 1 else "<I"
    start = 8 + struct.calcsize(length)
    end = start + struct.unpack_from(length, content, 8)[0]
    header = _HEADER.fullmatch(content[start : min(end, start + 10_000)])
    if header is None:
        raise ValueError(f"array {name!r} has a damaged header or does not hold plain numbers")
    dtype = np.dtype(header[1].decode())
    shape = tuple(int(size) for size in header[3].split(b",") if size.strip())
    claimed, actual = math.prod(shape) * dtype.itemsize, len(content) - end
    if claimed != actual:
        raise ValueError(f"array {name!r} {shape} claims {claimed} bytes and has {actual}")
    order: Any = "F" if header[2] == b"True" else "C"
    array: Array = np.ndarray(shape, dtype, content, offset=end, order=order).copy(order="K")
    return array
