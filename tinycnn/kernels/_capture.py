"""Steps that are captured and replayed.

Of the time of a small kernel more than half goes into finding it: which layer comes next, the view of its buffer, the
code for these types.  All of that is the same in every step, so it is done once: the calls of kernels are written down,
and from then on they are all that happens, on the same arrays and numbers, one after the other.  Who captures a step
has to know that it is made of kernels alone (see `tinycnn.plan.Replay`).
"""

import contextlib
import functools
import threading
from typing import Any

from numba.core.dispatcher import Dispatcher

from tinycnn.kernels import _threads


class _Trace(threading.local):
    """Of this thread: the calls that are being written down, whether they are made as well, and whether the last one
    was to run on one thread."""

    calls: list | None = None
    dry = serial = False


trace = _Trace()


def traced(function):
    """`function`, whose calls a capture is to see: a compiled one, or a plain one that changes arrays."""

    @functools.wraps(function)
    def call(*args):
        if trace.calls is not None:
            trace.calls.append((function, args))
            if trace.dry:
                return
        function(*args)

    return call


def trace_calls(step, calls, dry_run=False):
    """Append (function, arguments) of the kernels that `step()` calls to `calls`; in a dry run they do nothing."""
    trace.calls, trace.dry, trace.serial = calls, dry_run, False
    try:
        step()
    finally:
        trace.calls, trace.dry = None, False


class CapturedStep:
    """`step`, a function without arguments, to be called like it: the first call runs it, all later ones replay it."""

    def __init__(self, step):
        self.step, self.forks = step, _threads.process.forks
        self.calls: list = []  # (machine code, arguments)
        self.policy: Any = contextlib.nullcontext()

    def __call__(self):
        if self.forks != _threads.process.forks:  # captured by a parent process, which had threads
            self.__init__(self.step)  # type: ignore[misc]
        if trace.calls is not None:  # a larger step is being captured, of which this is a part
            self.step()
        elif self.calls:
            with _threads.pool_lock, self.policy:
                for function, args in self.calls:
                    function(*args)
        else:
            calls: list = []
            trace_calls(self.step, calls)
            self.calls = [(_machine_code(function, args), args) for function, args in calls]
            if any(isinstance(f, Dispatcher) and f.targetoptions.get("parallel") for f, _ in calls):
                self.policy = _threads.ThreadPolicy()


def _machine_code(function, args):
    """What a compiled function runs for arguments of these types."""
    if not isinstance(function, Dispatcher):
        return function
    found = function.overloads.get(tuple(map(function.typeof_pyval, args)))
    return found.entry_point if found else function
