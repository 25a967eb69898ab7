"""What the commands share: exit codes, options, error messages, and the lines that show a training.

Exit codes: 0 success, 1 an error (one line on stderr), 2 wrong usage, 130 Ctrl-C, 143 SIGTERM.
"""

import argparse
import contextlib
import json
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from tinycnn import _streams
from tinycnn._streams import EXIT_INTERRUPTED
from tinycnn.errors import DeviceError, RankError

EXIT_TERMINATED = 143  # as of a process that SIGTERM has killed

Command = Callable[[], "int | tuple[int, Any]"]  # returns the exit code, or that and a document for --json


class Terminated(KeyboardInterrupt):
    """SIGTERM: what is done for Ctrl-C is done for it too."""


def use_device(args: argparse.Namespace) -> str:
    """The device of --device, checked; sets the number of threads."""
    from tinycnn import devices

    device = devices.resolve(args.device)
    devices.get(device)
    devices.set_num_threads(args.threads)
    return device


def run_command(command: Command, interrupted: str = "interrupted", as_json: bool = False) -> int:
    """Call `command` and return its exit code.  Print one line for a user error, Ctrl-C (`interrupted`) or SIGTERM.

    as_json  print the document that it returns, or {"error": ...}, to stdout, and what it prints to stderr
    """
    code, document = 1, None
    with _streams.safe_streams():
        try:
            with contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext(), _terminable():
                result = command()
            code, document = result if isinstance(result, tuple) else (result, None)
        except (ValueError, OSError, ArithmeticError, MemoryError, DeviceError, RankError) as error:
            text = describe(error)
            document = {"error": text}
            print(f"error: {text}", file=sys.stderr)
            if isinstance(error, DeviceError) and "tinycnn.cuda" in sys.modules:
                from tinycnn.cuda import _launch

                _launch.skip_cleanup_after_fault(1)
        except KeyboardInterrupt as error:
            terminated = isinstance(error, Terminated)
            text = interrupted.replace("interrupted", "terminated", 1) if terminated else interrupted
            print(f"\n{text}", file=sys.stderr)
            code, document = EXIT_TERMINATED if terminated else EXIT_INTERRUPTED, {"error": text}
        if as_json:
            print(json.dumps(document))
    return code


def describe(error: BaseException) -> str:
    """An error as one line."""
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{error.filename}: {error.strerror[:1].lower()}{error.strerror[1:]}"
    return str(error) or type(error).__name__


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM raises `Terminated` inside the block, unless the program handles it in another way."""
    main_thread = threading.current_thread() is threading.main_thread()
    if not main_thread or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return

    def handler(*_: Any) -> None:
        raise Terminated

    signal.signal(signal.SIGTERM, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


class EpochPrinter:
    """Prints a line for an epoch.  Use as `on_epoch` of `fit`.

    epochs    their number
    interval  at most one line in so many seconds, and one for the last epoch
    indent    before each line
    """

    def __init__(self, epochs: int, interval: float = 0.0, indent: str = "") -> None:
        self.epochs, self.interval, self.indent = epochs, interval, indent
        self.last_print: float | None = None
        self.printed = 0  # lines

    def __call__(self, record: dict[str, Any]) -> None:
        now, epoch = time.monotonic(), record["epoch"]
        if self.last_print is None:
            print(f"{self.indent}epoch   train loss   accuracy   val loss   accuracy   images/s")
        elif now - self.last_print < self.interval and epoch != self.epochs:
            return
        self.last_print = now
        self.printed += 1
        remaining = (self.epochs - epoch) * record["seconds"]
        print(
            f"{self.indent}{epoch:5d} {record['train_loss']:12.4f} {record['train_accuracy']:10.2%} "
            f"{record['val_loss']:10.4f} {record['val_accuracy']:10.2%} {record['images_per_second']:10,.0f}"
            + (f"   about {remaining:.0f} s remaining" if self.interval and remaining > 10 else ""),
            flush=True,
        )
