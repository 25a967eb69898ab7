"""Capture and replay of steps.

Dispatch takes more than half of the time of a small kernel: find the next layer, the view of its buffer, the machine
code for these types.  All of this is the same in every step, so it is done once: the first call of a captured step
records which kernels it calls, and later calls run only these, with the same arguments in the same order.  The caller
guarantees that the step consists of kernels only (see `tinycnn._tracked.Replay`).
"""

import contextlib
import functools
import threading
from collections.abc import Callable
from typing import Any, TypeVar

from numba.core.dispatcher import Dispatcher

from tinycnn.kernels import _threads

F = TypeVar("F", bound=Callable[..., Any])
Step = Callable[[], Any]
Call = tuple[Callable[..., Any], tuple[Any, ...]]  # function and arguments


class _Trace(threading.local):
    """State of the capture in this thread.

    calls   recorded so far; None: nothing is being captured
    dry     whether kernels are only recorded, not run
    serial  whether the last kernel ran on one thread
    """

    calls: list[Call] | None = None
    dry = serial = False


trace = _Trace()


def traced(function: F) -> F:
    """Record the calls of `function`, a kernel or any other that changes arrays, while a step is captured."""

    @functools.wraps(function)
    def call(*args: Any) -> None:
        if trace.calls is not None:
            trace.calls.append((function, args))
            if trace.dry:
                return
        function(*args)

    return call  # type: ignore[return-value]


def trace_calls(step: Step, calls: list[Call], dry_run: bool = False) -> None:
    """Append (function, arguments) of each kernel that `step()` calls to `calls`; a dry run does not run them."""
    trace.calls, trace.dry, trace.serial = calls, dry_run, False
    try:
        step()
    finally:
        trace.calls, trace.dry = None, False


class CapturedStep:
    """Runs and records `step`, a function without arguments, on the first call; replays it on later calls."""

    def __init__(self, step: Step) -> None:
        self.step, self.forks = step, _threads.process.forks
        self.calls: list[Call] = []  # machine code and arguments
        self.policy: contextlib.AbstractContextManager[None] = contextlib.nullcontext()

    def __call__(self) -> None:
        if self.forks != _threads.process.forks:  # captured by a parent process, with threads
            self.__init__(self.step)  # type: ignore[misc]
        if trace.calls is not None:  # part of a larger step that is being captured
            self.step()
        elif self.calls:
            with _threads.pool_lock, self.policy:
                for function, args in self.calls:
                    function(*args)
        else:
            calls: list[Call] = []
            trace_calls(self.step, calls)
            self.calls = [(_machine_code(function, args), args) for function, args in calls]
            if any(isinstance(f, Dispatcher) and f.targetoptions.get("parallel") for f, _ in calls):
                self.policy = _threads.ThreadPolicy()


def _machine_code(function: Any, args: tuple[Any, ...]) -> Any:
    """The entry point of a compiled function for arguments of these types; other functions as they are."""
    if not isinstance(function, Dispatcher):
        return function
    overload = function.overloads.get(tuple(map(function.typeof_pyval, args)))
    return overload.entry_point if overload else function
