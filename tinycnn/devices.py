"""Device names, the backend module of each device, and the exchange of arrays with other libraries."""

import importlib
import re

import numpy as np

from tinycnn import _check, _gpu
from tinycnn._typing import Backend, DeviceArray
from tinycnn.errors import DeviceError


def resolve(device: str) -> str:
    """`device` ("auto", "cpu", "cuda", "cuda:N") as "cpu" or "cuda:N".  "auto" is cuda:0 if it can be used.

    Raises ValueError for other names, and DeviceError, which lists the missing parts, for a GPU that cannot be used.
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


def get(device: str) -> Backend:
    """The backend module of `device`; raises what `resolve` does."""
    device = resolve(device)
    if device == "cpu":
        return importlib.import_module("tinycnn.kernels")
    importlib.import_module("tinycnn.cuda._launch").set_device(int(device.removeprefix("cuda:")))
    return importlib.import_module("tinycnn.cuda")


def as_host(name: str, array: DeviceArray, device: str) -> tuple[DeviceArray, bool]:
    """(array, False) for an array in host memory, (a host copy, True) for one on the GPU `device`.

    Raises ValueError, with both devices, for an array on another one.
    """
    array = _check.detach(array)
    try:
        number = _gpu.device_of(array)
    except Exception as error:  # an array without data, of torch's device "meta"
        raise ValueError(f"{name} must be an array on {device}: {_check.one_line(error)}") from error
    if number is None:
        return array, False
    if device != f"cuda:{number}":
        raise ValueError(f"{name} is on cuda:{number}, expected {device} or host memory")
    ops = get(device)
    return ops.to_host(ops.to_device(array)), True


def as_dlpack(array: DeviceArray) -> DeviceArray:
    """A model's array, such as ``model.theta`` or ``layer.weight``, as one that other libraries take, without a copy:
    DLPack, ``__array__``, and on a GPU ``__cuda_array_interface__``.

        torch.from_dlpack(devices.as_dlpack(model.theta))
    """
    if isinstance(array, np.ndarray):
        return array
    from tinycnn.cuda import _launch

    return _launch.ExportedArray(array)


def set_num_threads(threads: int | None) -> int:
    """Use `threads` CPU threads; None leaves the number unchanged.  Returns the number in use."""
    import numba

    if threads is not None:
        limit: int = getattr(numba.config, "NUMBA_NUM_THREADS")  # noqa: B009 (unknown to type checkers)
        if _check.integer("threads", threads, 1) > limit:
            raise ValueError(f"threads must be at most {limit} on this machine, got {threads}")
        numba.set_num_threads(threads)
    return int(numba.get_num_threads())
