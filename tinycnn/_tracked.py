"""Which objects can be captured and replayed, and counters of changes, which invalidate a capture."""

from collections.abc import Callable
from typing import Any, TypeVar

from tinycnn._typing import Backend

TrackedT = TypeVar("TrackedT", bound="Tracked")


class ChangeCounter:
    """A counter of changes."""

    count = 0


class Tracked:
    """Base class that counts changes of attributes.  A change invalidates what was captured with the old values.

    changes     the counter; layers and optimizers share their model's
    replayable  a user's class may set it to True if its methods only call this library's kernels, and everything that
                changes from step to step is in arrays.  Not inherited
    """

    changes: ChangeCounter

    def __new__(cls: type[TrackedT], *args: Any, **kwargs: Any) -> TrackedT:
        self = super().__new__(cls)
        self.__dict__["changes"] = ChangeCounter()
        return self

    def __setattr__(self, name: str, value: Any) -> None:
        if self.__dict__.get(name, Tracked) is not value:
            self.changes.count += 1
        super().__setattr__(name, value)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "changes"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)


# The methods that a training step calls.
STEP_METHODS = ("forward", "backward", "forward_backward", "accumulate_metrics", "step", "gather_batch")


def is_builtin(part: object) -> bool:
    """Whether the class of `part` is this library's, with no method of a step replaced on it or on its class."""
    functions = [function for name in STEP_METHODS if (function := getattr(type(part), name, None)) is not None]
    return (
        is_in_package(type(part).__module__)
        and getattr(part, "__dict__", {}).keys().isdisjoint(STEP_METHODS)
        # __globals__, not __module__: functools.wraps copies the latter.
        and all(is_in_package(getattr(function, "__globals__", {}).get("__name__", "")) for function in functions)
    )


def is_in_package(module: str) -> bool:
    """Whether a module is this library's."""
    return module.partition(".")[0] == __package__


def is_replayable(part: object) -> bool:
    """Whether `part` is known to call only kernels."""
    inner = getattr(part, "inner", None)  # the optimizer of an EMA
    if getattr(part, "sync", None) is not None:  # batch norm that asks other ranks
        return False
    replayable = vars(type(part)).get("replayable") is True or is_builtin(part)
    return replayable and (inner is None or is_replayable(inner))


class Replay:
    """`step`, replayed from a capture where possible.

    The step is captured if all of its `parts` are known to call only kernels, and again after an attribute of one of
    them has changed.  Otherwise it runs as Python every time.
    """

    def __init__(self, ops: Backend, step: Callable[[], object], *parts: Any) -> None:
        self.ops, self.step, self.parts = ops, step, parts
        self.counters = list({id(part.changes): part.changes for part in parts if hasattr(part, "changes")}.values())
        self.changes = -1

    def __call__(self) -> None:
        changes = 0  # counters only grow, so one has changed if and only if the sum has
        for counter in self.counters:
            changes += counter.count
        if changes != self.changes:
            self.changes = changes
            self.run = self.ops.capture(self.step) if all(map(is_replayable, self.parts)) else self.step
        self.run()
