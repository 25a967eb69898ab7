"""The exceptions of this library.  Each is a subclass of the built-in exception that fits."""


class DivergedError(ArithmeticError):
    """The loss or a parameter is not finite.

    step, epoch  when, counted from 1; epoch is None outside `fit`
    layer        name of the first layer with a non-finite number

    The model holds the last good weights; in `fit` these are the weights at the end of the last complete epoch.
    """

    def __init__(self, layer: str, step: int, epoch: int | None = None) -> None:
        self.layer, self.step, self.epoch = layer, step, epoch
        when = f"step {step}" + (f" (epoch {epoch})" if epoch else "")
        super().__init__(
            f"training diverged at {when}: {layer} is the first with non-finite numbers; try a smaller learning rate"
        )


class DeviceMemoryError(MemoryError):
    """The device is out of memory.  requested, free: bytes"""

    def __init__(self, requested: int, free: int, hint: str = "") -> None:
        self.requested, self.free = requested, free
        super().__init__(
            f"out of device memory: asked for {requested / 2**20:,.1f} MiB, {free / 2**20:,.1f} MiB free{hint}"
        )


class DeviceError(RuntimeError):
    """A GPU cannot be used.  The message says what was searched, what was found, and what to do."""


class DamagedCheckpointError(ValueError):
    """The file is not a complete, valid checkpoint.  The message names the file and the reason."""


class InUseError(OSError):
    """Another process is writing the folder or the file."""


class ResumeError(ValueError):
    """A training cannot be continued from its checkpoint.  The message names every difference."""


class StorageError(ConnectionError):
    """The storage of a study cannot be reached.  The message names it, without its password, and what to check."""


class RankError(RuntimeError):
    """The ranks of a distributed training cannot train together, or another rank has failed.  The message names the
    ranks."""


class UnknownLayerError(ValueError):
    """A saved model has a layer whose class is not known."""


class DamagedFileError(ValueError):
    """A data file is damaged.  The message names the file, what was expected and what was found."""


class DataUnavailableError(OSError):
    """The data set is not on this machine and was not downloaded.

    reason   why not, in one line
    details  the folders and addresses that were tried and what was found there, in lines
    """

    def __init__(self, message: str, reason: str, details: str = "") -> None:
        super().__init__(message)
        self.reason, self.details = reason, details


class RecipeError(ValueError):
    """A recipe is invalid.  The message names the recipe, the line and the reason."""


class OnnxError(ValueError):
    """An ONNX file is damaged, or its graph cannot be loaded.  The message names the file, the node, its operator, the
    reason and the operators that are known."""
