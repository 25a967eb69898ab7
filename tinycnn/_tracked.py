"""What may be captured and replayed, and how a capture notices that one of its parts has changed."""

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
    replayable  a user's class may set it to True: all its methods do is call this library's kernels, and what changes
                from step to step is in arrays.  Not inherited
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


# All that a training step calls.
STEP_METHODS = ("forward", "backward", "forward_backward", "accumulate_metrics", "step", "gather_batch")


def is_builtin(thing: object) -> bool:
    """Whether the class of `thing` is this library's, with no method of a step replaced on it or on its class."""
    functions = [function for name in STEP_METHODS if (function := getattr(type(thing), name, None)) is not None]
    return (
        _in_package(type(thing).__module__)
        and getattr(thing, "__dict__", {}).keys().isdisjoint(STEP_METHODS)
        # __globals__, not __module__: functools.wraps copies the latter.
        and all(_in_package(getattr(function, "__globals__", {}).get("__name__", "")) for function in functions)
    )


def _in_package(module: str) -> bool:
    return module.partition(".")[0] == __package__


def is_replayable(thing: object) -> bool:
    """Whether `thing` is known to call nothing but kernels."""
    inner = getattr(thing, "inner", None)  # the optimizer of an EMA
    replayable = vars(type(thing)).get("replayable") is True or is_builtin(thing)
    return replayable and (inner is None or is_replayable(inner))


class Replay:
    """A function without arguments that does what `step` does.

    The step is captured if all of its `parts` are known to consist of kernels, and captured anew after an attribute of
    one of them has changed.  Otherwise it runs as Python every time.
    """

    def __init__(self, ops: Backend, step: Callable[[], object], *parts: Any) -> None:
        self.ops, self.step, self.parts = ops, step, parts
        self.counters = list({id(part.changes): part.changes for part in parts if hasattr(part, "changes")}.values())
        self.changes = -1

    def __call__(self) -> None:
        changes = 0  # counters only grow, so their sum tells whether one has changed
        for counter in self.counters:
            changes += counter.count
        if changes != self.changes:
            self.changes = changes
            self.run = self.ops.capture(self.step) if all(map(is_replayable, self.parts)) else self.step
        self.run()
