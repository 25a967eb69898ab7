"""Ctrl-C while something must be finished: a run's folder, an epoch's files."""

import contextlib
import signal
import threading
from typing import Any

from tinycnn._streams import print_stderr


@contextlib.contextmanager
def defer_interrupt(message=None, *, raises=True):
    """Ctrl-C inside of it waits for the end, the second one does not.  Yields a function: whether there was one.

    message: a line that is said at once    raises: KeyboardInterrupt at the end, if there was one
    In other threads than the main one, where Python delivers no Ctrl-C, it does nothing.
    """
    asked = False

    def wait(*_):
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = True
        if message:
            print_stderr(f"\n{message} (Ctrl-C again to leave it)")

    before: Any = signal.getsignal(signal.SIGINT)
    # Whoever has set a handler of their own, or ignores Ctrl-C, is not disturbed.
    mine = threading.current_thread() is threading.main_thread() and (
        before is signal.default_int_handler or getattr(before, "defers_interrupt", False)
    )
    if mine:
        wait.defers_interrupt = True  # type: ignore[attr-defined]
        signal.signal(signal.SIGINT, wait)
    try:
        yield lambda: asked
    finally:
        if mine:
            signal.signal(signal.SIGINT, before)
    if asked and raises:
        if getattr(before, "defers_interrupt", False):
            before(signal.SIGINT, None)  # it is in another one, which waits on
        else:
            raise KeyboardInterrupt
