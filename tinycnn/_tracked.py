"""What may be captured and replayed, and how a capture learns that something in it has changed."""


class ChangeCounter:
    """A counter of changes."""

    count = 0


class Tracked:
    """Counts the changes of its attributes: what was captured with their values is captured anew then.

    changes     the counter; layers and optimizers share that of their model
    replayable  a class of yours may set it to True: it says that its methods call this library's kernels and nothing
                else, and that what changes from step to step lives in arrays.  It is not inherited
    """

    changes: ChangeCounter

    def __new__(cls, *args, **options):
        self = super().__new__(cls)
        self.__dict__["changes"] = ChangeCounter()
        return self

    def __setattr__(self, name, value):
        if self.__dict__.get(name, Tracked) is not value:
            self.changes.count += 1
        super().__setattr__(name, value)

    def __getstate__(self):
        return {name: value for name, value in vars(self).items() if name != "changes"}

    def __setstate__(self, state):
        self.__dict__.update(state)


OVERRIDABLE_METHODS = ("forward", "backward", "forward_backward", "accumulate_metrics", "step", "gather_batch")


def is_builtin(thing):
    """Whether `thing` is exactly of a class of this library, with no method replaced, of it or of its class."""
    functions = [function for name in OVERRIDABLE_METHODS if (function := getattr(type(thing), name, None)) is not None]
    return (
        _from_here(type(thing).__module__)
        and getattr(thing, "__dict__", {}).keys().isdisjoint(OVERRIDABLE_METHODS)
        # Where a function was written: functools.wraps copies its __module__.
        and all(_from_here(getattr(function, "__globals__", {}).get("__name__", "")) for function in functions)
    )


def _from_here(module):
    return module.partition(".")[0] == __package__


def is_replayable(thing):
    """Whether `thing` is known to be made of kernels."""
    inside = getattr(thing, "inner", None)  # the optimizer that an EMA holds
    own = vars(type(thing)).get("replayable") is True or is_builtin(thing)
    return own and (inside is None or is_replayable(inside))


class Replay:
    """`step`, a function without arguments, to be called like it.

    It is captured if all of `parts`, which it is made of, are known to consist of kernels, and anew whenever an
    attribute of one of them has changed; otherwise it runs as Python every time.
    """

    def __init__(self, k, step, *parts):
        self.ops, self.step, self.parts = k, step, parts
        self.counters = list({id(part.changes): part.changes for part in parts if hasattr(part, "changes")}.values())
        self.seen = -1

    def __call__(self):
        seen = 0  # counters only grow
        for counter in self.counters:
            seen += counter.count
        if seen != self.seen:
            self.seen = seen
            self.run = self.ops.capture(self.step) if all(map(is_replayable, self.parts)) else self.step
        self.run()
