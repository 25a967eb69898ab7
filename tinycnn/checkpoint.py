"""Save and load named arrays and metadata.

Files are in the safetensors format, which torch, JAX and others read too: `safetensors.torch.load_file(path)`.  Nothing
in a file is executed.  Files of `np.savez` are read as well.
"""

import hashlib
import io
import json
import math
import os
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np

from tinycnn._check import one_line
from tinycnn._files import atomic_write, read_bytes
from tinycnn._typing import Array
from tinycnn.errors import DamagedCheckpointError

METADATA = "__metadata__"  # the name of an array in npz files: metadata as UTF-8 JSON
KEY = "tinycnn"  # of our JSON in safetensors files.  One key: the library writes several in any order
DTYPES = (
    "bool", "uint8", "uint16", "uint32", "uint64", "int8", "int16", "int32", "int64", "float16", "float32", "float64",
)  # fmt: skip


def save(path: str | os.PathLike[str], arrays: Mapping[str, Array], metadata: Mapping[str, Any] | None = None) -> None:
    """Write `arrays` and `metadata` to `path` (`*.safetensors`) atomically.

    arrays: name -> array of any shape, of one of the `DTYPES`.
    metadata: anything that JSON can represent; tuples are loaded as lists and keys as strings.
    The same content gives the same bytes.  An existing file is replaced when the new one is on the disk, and survives
    any failure.
    Raises ValueError for another suffix or an array of another dtype; TypeError for metadata or names of a wrong type;
    OSError if writing fails.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise ValueError(f"path must be a file name ending in .safetensors, got {str(path)!r}")
    data = _pack(arrays, {} if metadata is None else metadata)
    with atomic_write(path) as file:
        file.write(data)


def load(path: str | os.PathLike[str]) -> tuple[dict[str, Array], dict[str, Any]]:
    """Read (arrays, metadata) from `path`, `*.safetensors` or `*.npz`; the arrays are new and writable.

    The metadata of a file that was not written by `save` is {}.
    Raises FileNotFoundError, ValueError for another suffix, a pipe or a file of more than 4 GiB, and
    DamagedCheckpointError for a file that is damaged, truncated, compressed, or contains pickled objects.
    """
    path = Path(path)
    if path.suffix not in (".safetensors", ".npz"):
        raise ValueError(f"path must be a file name ending in .safetensors or .npz, got {str(path)!r}")
    data = read_bytes(path)
    try:
        return _unpack_npz(data) if path.suffix == ".npz" else _unpack(data)
    except Exception as error:  # arbitrary bytes can raise anything in a parser
        raise DamagedCheckpointError(f"{path}: not a usable checkpoint: {one_line(error)}") from error


def _pack(arrays: Mapping[str, Array], metadata: Mapping[str, Any]) -> bytes:
    from safetensors import numpy as safetensors

    if not isinstance(metadata, Mapping):
        raise TypeError(f"metadata must be a mapping, got {type(metadata).__name__}")
    try:
        text = json.dumps(dict(metadata))
    except (TypeError, ValueError) as error:
        raise type(error)(f"metadata: {error}") from error
    for name in arrays:
        if not isinstance(name, str):
            raise TypeError(f"arrays must have names of type str, got {name!r}")
        if not name or name == METADATA or not name.isprintable():
            raise ValueError(f"arrays: {name[:1000]!r} cannot be the name of an array")
    checked = {name: _checked_array(name, value) for name, value in arrays.items()}
    own = {"metadata": text, "names": list(checked), "sha256": _sha256(checked, text)}
    content: bytes = safetensors.save(checked, {KEY: json.dumps(own)})
    return content


def _sha256(arrays: Mapping[str, Array], text: str) -> str:
    """Hash of all of a file's content: the format has no checksum."""
    digest = hashlib.sha256(text.encode())
    for name, array in arrays.items():
        digest.update(f"\0{name}\0{array.dtype} {array.shape}\0".encode())
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


def _checked_array(name: str, value: Any) -> Array:
    try:
        array = np.asarray(value)
    except ValueError as error:  # a ragged list
        raise ValueError(f"arrays[{name!r}]: {error}") from error
    if array.dtype.newbyteorder("=").name not in DTYPES:
        raise ValueError(f"arrays[{name!r}] must be of one of the dtypes {', '.join(DTYPES)}, got {array.dtype}")
    # The library writes the memory of an array as it is, whatever its strides and byte order.
    return np.asarray(array, array.dtype.newbyteorder("="), order="C")


def _unpack(data: bytes) -> tuple[dict[str, Array], dict[str, Any]]:
    from safetensors import numpy as safetensors

    try:
        flat = safetensors.load(data)
    except KeyError as error:
        raise ValueError(f"it has an array of dtype {error}, which NumPy does not have") from None
    loaded = {name: np.require(array, requirements=("ALIGNED", "WRITEABLE")) for name, array in flat.items()}
    size = int.from_bytes(data[:8], "little")  # checked by `load`
    texts = json.loads(data[8 : 8 + size]).get(METADATA, {})
    if KEY not in texts:
        return loaded, {}
    try:
        own = json.loads(texts[KEY])
        arrays, text = {name: loaded.pop(name) for name in own["names"]}, own["metadata"]
        intact = not loaded and _sha256(arrays, text) == own["sha256"]
    except (ValueError, KeyError, TypeError, AttributeError):  # damage of the metadata
        intact = False
    if not intact:
        raise ValueError("its content does not have the checksum that it was saved with")
    return arrays, _metadata(text)


def _metadata(text: str | bytes) -> dict[str, Any]:
    metadata = json.loads(text)
    if not isinstance(metadata, dict):
        raise ValueError("its metadata is not a mapping")
    return metadata


def _unpack_npz(data: bytes) -> tuple[dict[str, Array], dict[str, Any]]:
    arrays: dict[str, Array] = {}
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        members = archive.infolist()
        # A wrong length in the zip directory hides the members after it; the end record holds the true count.
        if int.from_bytes(data[-12:-10], "little") != min(len(members), 0xFFFF):
            raise ValueError("the directory of the zip file is damaged")
        if any(member.compress_type != zipfile.ZIP_STORED for member in members):
            raise ValueError("its arrays are compressed (as np.savez_compressed does): save them with np.savez")
        if sum(member.file_size for member in members) > len(data):  # also catches members that overlap
            raise ValueError("its members claim more bytes than the file has")
        for member in members:
            name = member.filename.removesuffix(".npy")
            if name == member.filename or name in arrays:
                raise ValueError(f"it has an unexpected or repeated member {member.filename!r}")
            with archive.open(member) as file:
                arrays[name] = _read_npy(name, file)
    return arrays, _metadata(arrays.pop(METADATA).tobytes()) if METADATA in arrays else {}


def _read_npy(name: str, file: IO[bytes]) -> Array:
    """The array in a file of the npy format.  `np.load` would allocate what the header claims."""
    version = np.lib.format.read_magic(file)
    read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran_order, dtype = read_header(file)
    if dtype.kind not in "biufc":
        raise ValueError(f"its array {name!r} must hold numbers, got dtype {dtype}")
    content = bytearray(file.read())
    if math.prod(shape) * dtype.itemsize != len(content):
        raise ValueError(f"its array {name!r} has {len(content)} bytes, which do not fit shape {shape} of {dtype}")
    return np.frombuffer(content, dtype).reshape(shape, order="F" if fortran_order else "C")
