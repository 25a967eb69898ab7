"""Write files atomically; read files and JSON within limits."""

import errno
import json
import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from glob import escape
from pathlib import Path
from typing import Any, BinaryIO

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


def remove_partial_files(folder: Path, name: str = "*") -> None:
    """Remove what killed processes left of `atomic_write` of the file `name`, or of all files.  Nobody may be writing
    them."""
    for path in folder.glob(f".{name if name == '*' else escape(name)}.{'[0-9a-f]' * 16}.part"):
        with suppress(OSError):
            path.unlink()


def read_bytes(path: Path, limit: int = MAX_BYTES) -> bytes:
    """The content of a regular file.  ValueError for a folder, a pipe or a device, or a file of more than `limit`
    bytes."""
    status = path.stat()  # before it is opened: opening a pipe would wait for its writer
    if not stat.S_ISREG(status.st_mode):
        kind = "a folder" if stat.S_ISDIR(status.st_mode) else "a pipe or a device"
        raise ValueError(f"{path} must be a file, got {kind}")
    if status.st_size > limit:
        raise ValueError(f"{path} must have at most {limit:,} bytes, got {status.st_size:,}")
    return path.read_bytes()


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
