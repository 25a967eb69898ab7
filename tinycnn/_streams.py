"""Standard output and error that may be closed, full or ASCII: what is lost is text, never a training or a file."""

import contextlib
import os
import sys
from typing import Any

EXIT_INTERRUPTED = 130  # what a shell expects after Ctrl-C


def print_stderr(text):
    """A line on standard error, if there is one that can be written."""
    with contextlib.suppress(OSError, ValueError, AttributeError):  # AttributeError: sys.stderr is None
        sys.stderr.write(text + "\n")
        sys.stderr.flush()


class SafeStream:
    """A text stream around another, or around None, that drops what the other one cannot take.

    lost: whether something was dropped because writing failed
    """

    def __init__(self, stream):
        self.stream, self.lost = stream, False

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def isatty(self):
        return self.stream is not None and not self.lost and self.stream.isatty()

    def write(self, text):
        if self.stream is not None and not self.lost:
            try:
                self.stream.write(text)
            except UnicodeEncodeError:  # a terminal without ± or –
                encoding = self.stream.encoding
                self.stream.write(text.encode(encoding, "replace").decode(encoding))
            except (OSError, ValueError):  # a full disk, a reader that has gone; a closed file
                self.lost = True
        return len(text)

    def flush(self):
        if self.stream is not None and not self.lost:
            try:
                self.stream.flush()
            except (OSError, ValueError):
                self.lost = True


@contextlib.contextmanager
def safe_streams():
    """Within it, sys.stdout and sys.stderr are `SafeStream`.  Yields a function: whether anything was lost."""
    before: tuple[Any, Any] = sys.stdout, sys.stderr
    if all(isinstance(stream, SafeStream) for stream in before):
        yield lambda: any(stream.lost for stream in before)
        return
    mine: Any = [SafeStream(stream) for stream in before]
    sys.stdout, sys.stderr = mine
    try:
        yield lambda: any(stream.lost for stream in mine)
    finally:
        for stream in mine:
            stream.flush()
            if stream.lost:
                # Python flushes once more when it ends, and would say that it could not.
                with contextlib.suppress(OSError, ValueError, AttributeError):
                    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.stream.fileno())
        sys.stdout, sys.stderr = before
