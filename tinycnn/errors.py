"""The exceptions that this library defines.  Each is a subclass of the built-in one that fits."""


class DivergedError(ArithmeticError):
    """The loss or a parameter stopped being finite.

    step, epoch: where, counted from 1 (epoch is None outside `fit`)    layer: name of the first layer with a non-finite
    number    The model holds the last good weights: in `fit` those of the end of the last complete epoch.
    """

    def __init__(self, layer, step, epoch=None):
        self.layer, self.step, self.epoch = layer, step, epoch
        where = f"step {step}" + (f" (epoch {epoch})" if epoch else "")
        super().__init__(
            f"training diverged at {where}: {layer} is the first to hold numbers that are not finite; "
            "try a smaller learning rate"
        )


class DeviceMemoryError(MemoryError):
    """The device has no room.  requested, free: bytes"""

    def __init__(self, asked, free, more=""):
        self.requested, self.free = asked, free
        super().__init__(
            f"out of device memory: asked for {asked / 2**20:,.1f} MiB, {free / 2**20:,.1f} MiB free{more}"
        )


class DeviceError(RuntimeError):
    """A GPU that cannot be used; the text says what was looked for, what was found, and what to do."""


class DamagedCheckpointError(ValueError):
    """The file is not a complete, plain checkpoint; the message names the file and the reason."""


class DamagedFileError(ValueError):
    """A data file is not what it should be; the message names it, what was expected and what came."""


class DataUnavailableError(OSError):
    """The data set is not on this machine and was not downloaded; `reason` says in one line why not."""

    def __init__(self, message: str, reason: str) -> None:
        super().__init__(message)
        self.reason = reason


class RecipeError(ValueError):
    """A recipe is not as it has to be; the message says which, and where."""
