"""From a device's name to the module that computes on it."""

import importlib
import re

from tinycnn import _check, _gpu
from tinycnn.errors import DeviceError


def resolve(device):
    """`device` ("auto", "cpu", "cuda", "cuda:N") as "cpu" or "cuda:N".  "auto" is cuda:0 where it can be used.

    ValueError for other names, DeviceError, saying what is missing, for a GPU that cannot be used.
    """
    match = re.fullmatch(r"auto|cpu|cuda(?::(\d+))?", device) if isinstance(device, str) else None
    if match is None:
        raise ValueError(f"device must be 'auto', 'cpu', 'cuda' or 'cuda:N', got {device!r}")
    if device == "cpu":
        return device
    try:
        number = int(match[1] or 0)
        _gpu.require(number)
        return f"cuda:{number}"
    except DeviceError:
        if device != "auto":
            raise
        return "cpu"


def get(device):
    """The backend module of `device`; errors are those of `resolve`."""
    device = resolve(device)
    if device == "cpu":
        return importlib.import_module("tinycnn.kernels")
    importlib.import_module("tinycnn.cuda._launch").set_device(int(device.removeprefix("cuda:")))
    return importlib.import_module("tinycnn.cuda")


def as_host(name, array, device):
    """(array, False) for what lies in main memory, (a copy there, True) for an array on the GPU `device`.

    ValueError, naming both, for an array on another device.
    """
    array = _check.detach(array)
    number = _gpu.device_of(array)
    if number is None:
        return array, False
    if device != f"cuda:{number}":
        raise ValueError(f"{name} lies on cuda:{number}, but this computes on {device}")
    k = get(device)
    return k.to_host(k.to_device(array)), True


def as_dlpack(array):
    """An array of the GPU's backend as other libraries take it: DLPack and ``__cuda_array_interface__``."""
    from tinycnn.cuda import _launch

    return _launch.ExportedArray(array)


def set_num_threads(threads):
    """Use so many CPU threads from now on; None leaves the choice to Numba.  Returns the number in use."""
    import numba

    if threads is not None:
        most: int = getattr(numba.config, "NUMBA_NUM_THREADS")  # noqa: B009 (unknown to type checkers)
        if _check.integer("threads", threads, 1) > most:
            raise ValueError(f"threads must be at most {most} on this machine, got {threads}")
        numba.set_num_threads(threads)
    return numba.get_num_threads()
