"""Write a file completely or not at all; read JSON."""

from __future__ import annotations

import errno
import json
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO


@contextmanager
def atomic_write(path: Path) -> Iterator[BinaryIO]:
    """Yield a file that becomes `path` when the block ends well, and vanishes when it does not.

    The temporary file lies in the same folder, since a rename is atomic only within a file system.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.part")
    try:
        opened = temporary.open("xb")
    except FileNotFoundError:
        raise FileNotFoundError(errno.ENOENT, "there is no folder for it", str(path)) from None
    except OSError as error:  # without the name of the temporary file, which nobody knows
        raise type(error)(error.errno, error.strerror, str(path)) from None
    try:
        with opened as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)  # noqa: PTH105 (Path.replace keeps its own reference to it in Python 3.10)
    except BaseException:  # Ctrl-C as well must leave nothing behind
        temporary.unlink(missing_ok=True)
        raise


def read_json(path: Path) -> dict[str, Any]:
    """The object that a JSON file holds.  ValueError says why it holds none; the caller knows what the file is."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        json.dumps(found, ensure_ascii=False).encode()  # half of a surrogate pair could not be written anywhere
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if not isinstance(found, dict):
        raise ValueError("it is no JSON object")
    return found
