"""Write files atomically; read files and JSON within limits."""

import errno
import json
import os
import secrets
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from glob import escape
from io import BufferedReader
from pathlib import Path
from typing import Any, BinaryIO

from tinycnn.errors import DamagedFileError

MAX_BYTES = 4 << 30  # of a file that is read as a whole


@contextmanager
def atomic_write(path: Path) -> Iterator[BinaryIO]:
    """Yield a temporary file that replaces `path` when the block ends, and is deleted if the block raises.

    The temporary file is in the folder of `path`: a rename is atomic only within one file system.  When the block has
    ended, the file and its name are on the disk.  An OSError names `path`.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.part")
    try:
        try:
            opened = temporary.open("xb")
        except FileNotFoundError:
            raise FileNotFoundError(errno.ENOENT, "the folder does not exist", str(path)) from None
        with opened as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)  # noqa: PTH105 (Path.replace keeps its own reference to it in Python 3.10)
        _sync_folder(path.parent)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        if error.errno is None or error.filename not in (None, str(temporary)):
            raise
        raise OSError(error.errno, error.strerror, str(path)) from None  # of the subclass for the number
    except BaseException:  # Ctrl-C must not leave it behind either
        temporary.unlink(missing_ok=True)
        raise


def _sync_folder(folder: Path) -> None:
    """Write the folder's entries to the disk: without this a rename may be lost if the machine stops."""
    with suppress(OSError):  # not possible on every file system, and not on Windows
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def require_writable(folder: Path) -> None:
    """Create the folder if it does not exist.  OSError names it if files cannot be written there."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(folder)) from None


def remove_partial_files(folder: Path, name: str = "*") -> None:
    """Remove what killed processes left of `atomic_write` of the file `name`, or of all files.  Nobody may be writing
    them."""
    for path in folder.glob(f".{name if name == '*' else escape(name)}.{'[0-9a-f]' * 16}.part"):
        with suppress(OSError):
            path.unlink()


def open_regular(path: Path, max_bytes: int) -> BufferedReader:
    """Open a file to read.  Raises DamagedFileError if it is not a regular file (reading a named pipe could wait for
    ever) or has more than `max_bytes`; OSError."""
    _check_regular(path, path.stat(), max_bytes)  # before it is opened: opening a device can have effects
    file = open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK))  # noqa: SIM115
    try:
        _check_regular(path, os.fstat(file.fileno()), max_bytes)  # it may be another file by now
    except BaseException:
        file.close()
        raise
    return file


def _check_regular(path: Path, status: os.stat_result, max_bytes: int) -> None:
    if not stat.S_ISREG(status.st_mode):
        kinds = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a named pipe", stat.S_IFSOCK: "a socket"}
        kind = kinds.get(stat.S_IFMT(status.st_mode), "a device")
        raise DamagedFileError(f"{path}: expected a regular file, got {kind}")
    if status.st_size > max_bytes:
        raise DamagedFileError(f"{path}: expected at most {max_bytes:,} bytes, got {status.st_size:,}")


def read_bytes(path: Path, limit: int = MAX_BYTES) -> bytes:
    """The content of a file.  Raises as `open_regular` does."""
    with open_regular(path, limit) as file:
        return file.read()


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.  Raises ValueError, with the reason, for other content; OSError."""
    try:
        content = json.loads(read_bytes(path, 1 << 26).decode("utf-8"))
        json.dumps(content, ensure_ascii=False).encode()  # raises ValueError for an unpaired surrogate
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if not isinstance(content, dict):
        raise ValueError("it is not a JSON object")
    return content
