"""Standard output and error that never fail: output that cannot be written is dropped, and the program goes on."""

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

EXIT_INTERRUPTED = 130  # the exit code that shells expect after Ctrl-C


def print_stderr(text: str) -> None:
    """Write a line to standard error; drop it if that fails."""
    with contextlib.suppress(OSError, ValueError, AttributeError):  # AttributeError: sys.stderr is None
        sys.stderr.write(text + "\n")
        sys.stderr.flush()


class SafeStream:
    """Wraps a text stream, or None, and drops output that cannot be written.

    failed  whether output was dropped because a write failed
    """

    def __init__(self, stream: Any) -> None:
        self.stream, self.failed = stream, False

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def isatty(self) -> bool:
        return self.stream is not None and not self.failed and self.stream.isatty()

    def write(self, text: str) -> int:
        if self.stream is not None and not self.failed:
            try:
                self.stream.write(text)
            except UnicodeEncodeError:  # a terminal without ± or –
                encoding = self.stream.encoding
                self.stream.write(text.encode(encoding, "replace").decode(encoding))
            except (OSError, ValueError):  # the disk is full, the reader has closed the pipe; the file is closed
                self.failed = True
        return len(text)

    def flush(self) -> None:
        if self.stream is not None and not self.failed:
            try:
                self.stream.flush()
            except (OSError, ValueError):
                self.failed = True


@contextlib.contextmanager
def safe_streams() -> Iterator[Callable[[], bool]]:
    """Wrap sys.stdout and sys.stderr in `SafeStream` inside the block.  Yields a function that returns whether a write
    failed."""
    previous: tuple[Any, Any] = sys.stdout, sys.stderr
    if all(isinstance(stream, SafeStream) for stream in previous):
        yield lambda: any(stream.failed for stream in previous)
        return
    wrapped: Any = [SafeStream(stream) for stream in previous]
    sys.stdout, sys.stderr = wrapped
    try:
        yield lambda: any(stream.failed for stream in wrapped)
    finally:
        for stream in wrapped:
            stream.flush()
            if stream.failed:
                # Python flushes again at exit and would report an error.
                with contextlib.suppress(OSError, ValueError, AttributeError):
                    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.stream.fileno())
        sys.stdout, sys.stderr = previous
