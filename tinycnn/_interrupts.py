"""Defer Ctrl-C while something has to be finished: a run's folder, the files of an epoch."""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

from tinycnn._streams import print_stderr


@contextlib.contextmanager
def defer_interrupt(message: str | None = None, *, raises: bool = True) -> Iterator[Callable[[], bool]]:
    """Defer the first Ctrl-C inside the block to its end; a second one interrupts at once.

    message  printed to stderr at the first Ctrl-C
    raises   raise the deferred KeyboardInterrupt at the end of the block

    Yields a function that returns whether Ctrl-C was pressed.  Does nothing in other threads than the main one (Python
    delivers no signals there), or if the program has installed a SIGINT handler or ignores SIGINT.
    """
    pressed = False

    def handler(*_: Any) -> None:
        nonlocal pressed
        if pressed:
            raise KeyboardInterrupt
        pressed = True
        if message:
            print_stderr(f"\n{message} (press Ctrl-C again to stop at once)")

    previous: Any = signal.getsignal(signal.SIGINT)
    nested = getattr(previous, "defers_interrupt", False)
    install = threading.current_thread() is threading.main_thread() and (
        previous is signal.default_int_handler or nested
    )
    if install:
        handler.defers_interrupt = True  # type: ignore[attr-defined]
        signal.signal(signal.SIGINT, handler)
    try:
        yield lambda: pressed
    finally:
        if install:
            signal.signal(signal.SIGINT, previous)
    if pressed and raises:
        if nested:
            previous(signal.SIGINT, None)  # pass it on to the enclosing block
        else:
            raise KeyboardInterrupt
