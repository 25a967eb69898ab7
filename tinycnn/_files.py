"""Write files atomically; open regular files only; read JSON."""

import errno
import json
import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path
from typing import Any, BinaryIO

from tinycnn.errors import DamagedFileError


@contextmanager
def atomic_write(path: Path) -> Iterator[BinaryIO]:
    """Yield a temporary file that replaces `path` when the block ends, and is deleted if the block raises.

    The temporary file is in the folder of `path`: a rename is atomic only within one file system.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.part")
    try:
        opened = temporary.open("xb")
    except FileNotFoundError:
        raise FileNotFoundError(errno.ENOENT, "the folder does not exist", str(path)) from None
    except OSError as error:  # name the file that the caller asked for, not the temporary one
        raise type(error)(error.errno, error.strerror, str(path)) from None
    try:
        with opened as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)  # noqa: PTH105 (Path.replace keeps its own reference to it in Python 3.10)
    except BaseException:  # Ctrl-C must not leave it behind either
        temporary.unlink(missing_ok=True)
        raise


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


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.  Raises ValueError, with the reason, for other content; OSError."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        json.dumps(content, ensure_ascii=False).encode()  # raises ValueError for an unpaired surrogate
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if not isinstance(content, dict):
        raise ValueError("it is not a JSON object")
    return content
