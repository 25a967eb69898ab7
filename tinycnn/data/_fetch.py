"""Find the four files of an MNIST-like data set on this machine or download them, and check their hashes."""

import contextlib
import gzip
import hashlib
import io
import os
import sys
import time
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tinycnn._check import short_repr
from tinycnn._files import atomic_write, open_regular
from tinycnn._streams import SafeStream
from tinycnn._typing import Array, Shape
from tinycnn.data.idx import GZIP_MAGIC, parse_idx
from tinycnn.errors import DamagedFileError, DataUnavailableError

FILES = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")
_SHAPES: tuple[Shape, ...] = ((60_000, 28, 28), (60_000,), (10_000, 28, 28), (10_000,))
_MAX_BYTES = 60_000 * 28 * 28 + 16  # size of the largest file, uncompressed
_TIMEOUT = 10  # seconds, for the connection and for each read
_WINDOW, _MIN_BYTES = 30, 30_000  # a mirror that sends fewer bytes in a window of so many seconds is too slow
_STALE = 24 * 60 * 60  # seconds; the process that wrote to an older temporary file is gone
_NO_FOLDER, _NO_FILES = "no such folder", "none of the files"


class _OtherDatasetError(Exception):
    """The file belongs to another data set, or its data set is unknown."""


@dataclass(frozen=True)
class Source:
    """Folders, hashes (sha256 of the content, or md5 of the gzip file) and mirrors of a data set."""

    title: str
    folders: tuple[str, ...]  # below a searched folder; downloads go into the first
    algorithm: str
    hashes: tuple[str, ...]
    mirrors: tuple[str, ...]


MNIST = Source(
    "MNIST",
    ("mnist", "MNIST/raw"),
    "sha256",
    (
        "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
        "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
        "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
        "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
    ),
    ("https://ossci-datasets.s3.amazonaws.com/mnist/", "https://storage.googleapis.com/cvdf-datasets/mnist/"),
)
FASHION_MNIST = Source(
    "Fashion-MNIST",
    ("fashion-mnist", "fashion_mnist", "FashionMNIST/raw"),
    "md5",
    (
        "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
        "25c81989df183df01b3e8a0aad5dffbe",
        "bef4ecab320f06d8554ea6380940ec79",
        "bb300cfdad3c16e7a12a480ee83cd310",
    ),
    (
        "https://github.com/zalandoresearch/fashion-mnist/raw/master/data/fashion/",
        "https://fashion-mnist.s3.eu-central-1.amazonaws.com/",
    ),
)
KMNIST = Source(
    "KMNIST",
    ("kmnist", "KMNIST/raw"),
    "md5",
    (
        "bdb82020997e1d708af4cf47b453dcf7",
        "e144d726b3acfaa3e44228e80efcd344",
        "5c965bf0a639b31b8f53240b1b52f4d7",
        "7320c461ea6c1c855c0b718fb2a4b134",
    ),
    ("https://codh.rois.ac.jp/kmnist/dataset/kmnist/",),
)
_SOURCES = (MNIST, FASHION_MNIST, KMNIST)


def cache_folder() -> Path:
    """The folder for downloads: $XDG_CACHE_HOME/tinycnn, or the platform's default for caches."""
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "tinycnn"
    configured = os.environ.get("XDG_CACHE_HOME", "")
    # The XDG specification requires that relative paths are ignored.
    return (Path(configured) if Path(configured).is_absolute() else Path.home() / ".cache") / "tinycnn"


def fetch(source: Source, data_dir: str | os.PathLike[str] | None, download: bool) -> list[Array]:
    """Find or download `source`; returns train images, train labels, test images and test labels.

    See `datasets.mnist` for the folders and the errors.
    """
    cache = cache_folder()
    user_folders = [Path(folder).expanduser() for folder in (os.environ.get("TINYCNN_DATA"), data_dir) if folder]
    searched: list[str] = []
    unusable: list[str] = []
    for root in [*user_folders, cache]:
        for folder in [*(root / name for name in source.folders), root]:
            arrays, note = _read_folder(folder, source, is_root=folder == root, strict=root in user_folders)
            if arrays is not None:
                return arrays
            searched.append(f"  {folder}: {note}")
            if note not in (_NO_FOLDER, _NO_FILES):
                unusable.append(f"Not used: {folder}: {note}")

    target = (Path(data_dir).expanduser() if data_dir else cache) / source.folders[0]
    failures: list[str] = []
    reason = "downloading is switched off (download=False)"
    if download:
        try:
            return _download(source, target, source.mirrors, failures)
        except DataUnavailableError as error:
            reason = error.reason
    names = ", ".join(f"{name}.gz" for name in FILES)
    tried = ["Tried to download from:", *failures] if failures else [f"Nothing was downloaded: {reason}"]
    mirrors = ["The files are at:", *(f"  {mirror}" for mirror in source.mirrors)]
    lines = [
        f"{source.title} is not available: {reason}",
        f"Put {names} in {target}, or in any folder and set TINYCNN_DATA to it.",
        *unusable,
    ]
    raise DataUnavailableError(
        "\n".join(lines),
        reason,
        details="\n".join(["Looked in:", *searched, *tried, *mirrors]),
    )


def _read_folder(folder: Path, source: Source, is_root: bool, strict: bool) -> tuple[list[Array] | None, str]:
    """The four arrays in a folder, or None and the reason.

    is_root: the folder may hold files of other data sets    strict: raise DamagedFileError for a damaged file
    """
    if not folder.is_dir():
        return None, _NO_FOLDER
    found = [
        next((path for path in map(folder.joinpath, _file_names(name)) if _is_there(path)), None) for name in FILES
    ]
    arrays = []
    for index, path in enumerate(found):
        if path is not None:
            try:
                arrays.append(_read_checked(path, source, index, is_root))
            except FileNotFoundError:  # deleted since
                return None, f"without {path.name}"
            except _OtherDatasetError as error:
                return None, str(error)
            except DamagedFileError as error:
                if strict:
                    raise
                return None, str(error)
    if None in found:
        missing = [name for name, path in zip(FILES, found, strict=True) if path is None]
        return None, _NO_FILES if not arrays else f"without {', '.join(missing)}"
    return arrays, ""


def _is_there(path: Path) -> bool:
    """Whether there is a file.  Kaggle has MNIST's files in folders of the same names, beside files with a dot."""
    return path.exists() and not path.is_dir()


def _file_names(name: str) -> list[str]:
    """Accepted names of a file: many archives have train-images.idx3-ubyte for train-images-idx3-ubyte.

    Gzip first: two of the data sets publish only the hash of the gzip file.
    """
    return [f"{stem}{suffix}" for suffix in (".gz", "") for stem in (name, name.replace("-idx", ".idx"))]


def _read_checked(path: Path, source: Source, index: int, is_root: bool = False) -> Array:
    with open_regular(path, _MAX_BYTES) as file:
        return _checked(file.read(_MAX_BYTES + 1), path, source, index, is_root)


def _checked(raw: bytes, path: Path, source: Source, index: int, is_root: bool = False) -> Array:
    """The array in `raw`, checked to be the file FILES[index] of `source`; `path` is for the messages."""
    expected = source.hashes[index]
    kind = "sha256 of the uncompressed content" if source.algorithm == "sha256" else "md5 of the gzip file"
    zipped = raw[:2] == GZIP_MAGIC
    md5 = hashlib.md5(raw, usedforsecurity=False).hexdigest() if zipped else None
    try:
        content = _unzip(raw) if zipped else raw
    except (EOFError, OSError, zlib.error) as error:
        found = md5 if source.algorithm == "md5" else f"an incomplete gzip file ({error}; its md5 is {md5})"
        raise DamagedFileError(f"{path}: expected {kind} {expected}, found {found}") from error
    sha256 = hashlib.sha256(content).hexdigest()
    found = sha256 if source.algorithm == "sha256" else md5
    if found != expected:
        if is_root:  # all data sets use the same file names
            for other in _SOURCES:
                if other.hashes[index] in (sha256, md5):
                    raise _OtherDatasetError(f"{path.name} is of {other.title}")
            if found is None:
                raise _OtherDatasetError(
                    f"{path.name} is not compressed and therefore has no known hash; if it is {source.title}, "
                    f"put it in {source.folders[0]}/"
                )
        if found is not None:
            raise DamagedFileError(f"{path}: expected {kind} {expected}, found {found}")
    array = parse_idx(io.BytesIO(content), path)
    if array.shape != _SHAPES[index] or array.dtype != np.uint8:
        raise DamagedFileError(
            f"{path}: expected shape {_SHAPES[index]} and dtype uint8, found {array.shape} and {array.dtype}"
        )
    if array.ndim == 3:
        return array
    if array.max() > 9:
        raise DamagedFileError(f"{path}: expected labels 0 to 9, found {array.max()}")
    return array.astype(np.int64)


def _unzip(raw: bytes) -> bytes:
    with gzip.open(io.BytesIO(raw)) as file:
        return file.read(_MAX_BYTES + 1)  # one byte more, so that the hash of a longer file differs


def _download(source: Source, target: Path, mirrors: Sequence[str], failures: list[str]) -> list[Array]:
    """Download the missing files of the folder `target`; adds a line to `failures` for each failed mirror."""
    arrays, mirrors = [], list(mirrors)
    try:
        target.mkdir(parents=True, exist_ok=True)
        _remove_stale(target)
        for index, name in enumerate(FILES):
            path = target / f"{name}.gz"
            try:
                array = _read_checked(path, source, index)
            except (FileNotFoundError, DamagedFileError):
                raw, array = _download_file(source, index, mirrors, failures)
                with atomic_write(path) as file:
                    file.write(raw)
            arrays.append(array)
    except DataUnavailableError:
        raise
    except OSError as error:
        reason = f"cannot use the folder {target} ({_one_line(error)})"
        raise DataUnavailableError(reason, reason) from error
    return arrays


def _remove_stale(folder: Path) -> None:
    """Delete the temporary files of downloads whose processes were killed."""
    for name in FILES:
        for path in folder.glob(f".{name}.gz.*.part"):
            with contextlib.suppress(OSError):  # another process is faster
                if time.time() - path.lstat().st_mtime > _STALE:
                    path.unlink()


def _download_file(source: Source, index: int, mirrors: list[str], failures: list[str]) -> tuple[bytes, Array]:
    """(bytes, array) of a file from the first mirror that has it; moves that mirror to the front of `mirrors`."""
    from http.client import HTTPException
    from urllib.parse import urlsplit

    name = f"{FILES[index]}.gz"
    reasons = []
    for mirror in list(mirrors):
        try:
            raw = _transfer(f"{mirror}{name}")
            array = _checked(raw, Path(name), source, index)
        except (OSError, HTTPException, ValueError) as error:  # ValueError: a redirect to an invalid URL
            short = "has another file" if isinstance(error, DamagedFileError) else _one_line(error, 100)
            reasons.append(f"{urlsplit(mirror).hostname}: {short}")
            failures.append(f"  {mirror}{name}: {_one_line(error)}")
        else:
            mirrors.remove(mirror)
            mirrors.insert(0, mirror)
            return raw, array
    reason = "; ".join(reasons)
    raise DataUnavailableError(reason, reason)


def _transfer(url: str) -> bytes:
    """Download a URL with a progress bar. Raises OSError if it is too long, cut short, too slow or redirected to plain
    HTTP."""
    from tqdm import tqdm

    from tinycnn.data._http import Pace, open_url

    data = bytearray()
    with open_url(url, _TIMEOUT, Pace(_WINDOW, _MIN_BYTES, _MAX_BYTES + 2**20)) as response:
        if url.startswith("https:") and not response.geturl().startswith("https:"):
            raise OSError(f"redirected to an unencrypted address, {response.geturl()}")
        length = response.headers.get("Content-Length", "")
        size = int(length[:20]) if length.isdecimal() else None
        if size is not None and size > _MAX_BYTES:
            raise OSError(f"expected at most {_MAX_BYTES} bytes, got {short_repr(length, 20)}")
        name = url.rpartition("/")[2]
        with tqdm(total=size, unit="B", unit_scale=True, desc=name, file=SafeStream(sys.stderr)) as bar:
            while chunk := response.read(1 << 16):
                data += chunk
                bar.update(len(chunk))
                if len(data) > _MAX_BYTES:
                    raise OSError(f"expected at most {_MAX_BYTES} bytes, got more")
    if size is not None and len(data) != size:
        raise OSError(f"cut short: expected {size} bytes, got {len(data)}")
    return bytes(data)


def _one_line(error: Exception, length: int = 500) -> str:
    """The error as one line; the wrapped reason for errors of urllib."""
    code, reason = getattr(error, "code", None), getattr(error, "reason", None)
    cause = reason if isinstance(reason, OSError) else error  # URLError has the OSError as its reason
    text = f"HTTP {code} {reason}" if code else str(getattr(cause, "strerror", None) or reason or error)
    # The text comes from a server and can contain terminal escape sequences.
    text = "".join(c if c.isprintable() else " " for c in text)
    text = " ".join(text.split()) or type(error).__name__
    return text if len(text) <= length else text[:length] + "…"
