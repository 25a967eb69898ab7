"""Detection of what `--device cuda` needs: driver, GPU, numba-cuda and toolkit.

The driver is queried through ctypes, so that this works, and reports what is missing, without numba-cuda.
"""

import ctypes
import functools
import importlib.metadata
import importlib.util
from dataclasses import dataclass, field
from typing import Any

from tinycnn.errors import DeviceError

MIN_CUDA_VERSION = 12, 0  # supported by the driver
# The lowest compute capabilities that CUDA toolkits 12 and 13 support.
MIN_CAPABILITY = {12: (5, 0), 13: (7, 5)}
DRIVER_LIBRARIES = ("libcuda.so.1", "libcuda.so", "nvcuda.dll")
# The libraries with which numba-cuda compiles, as cuda.pathfinder names them.
TOOLKIT_LIBRARIES = ("nvvm", "nvrtc", "nvJitLink")
_CAPABILITY_MAJOR, _CAPABILITY_MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_...
_POINTER_DEVICE = 9  # CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL


@dataclass
class Gpu:
    """A GPU.  memory: in bytes"""

    name: str
    capability: tuple[int, int]
    memory: int


@dataclass
class Status:
    """driver: the CUDA version that the driver supports, or None   problem: why the GPU cannot be used, or None"""

    driver: tuple[int, int] | None = None
    gpus: list[Gpu] = field(default_factory=list)
    numba_cuda: str | None = None
    toolkit: dict[str, str | None] = field(default_factory=dict)
    problem: str | None = None

    @property
    def extra(self) -> str:
        """The extra of numba-cuda to install, by the version of the driver."""
        return "cu12" if self.driver is not None and self.driver < (13, 0) else "cu13"


def load_driver() -> Any:
    """The driver's library, or None if there is no driver."""
    for name in DRIVER_LIBRARIES:
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    return None


def find_toolkit() -> dict[str, str | None]:
    """The path of each library of the toolkit, None for one that is missing."""
    try:
        from cuda.pathfinder import load_nvidia_dynamic_lib
    except ImportError:
        return dict.fromkeys(TOOLKIT_LIBRARIES)
    paths: dict[str, str | None] = {}
    for name in TOOLKIT_LIBRARIES:
        try:
            paths[name] = load_nvidia_dynamic_lib(name).abs_path
        except Exception:  # its class differs between versions
            paths[name] = None
    return paths


def probe(driver: Any = None, full: bool = False) -> Status:
    """The status of this machine, without running anything on the GPU.

    driver  the driver's library; None: search for it
    full    look for the toolkit even if something else is missing
    """
    status = Status()
    if importlib.util.find_spec("numba_cuda") is not None:
        status.numba_cuda = importlib.metadata.version("numba-cuda")
    driver = load_driver() if driver is None else driver
    if driver is None:
        status.problem = (
            f"no NVIDIA driver was found (looked for {', '.join(DRIVER_LIBRARIES)}); install the driver of your GPU"
        )
    else:
        _query_driver(driver, status)
    if status.numba_cuda is not None and (full or status.problem is None):
        status.toolkit = find_toolkit()
    if status.problem is None and status.numba_cuda is None:
        status.problem = "numba-cuda is not installed"
    missing = [name for name, path in status.toolkit.items() if path is None]
    if status.problem is None and missing:
        status.problem = f"parts of the CUDA toolkit were not found: {', '.join(missing)}"
    return status


def _query_driver(driver: Any, status: Status) -> None:
    """Fill in the driver's version and its GPUs, or the problem."""
    number = ctypes.c_int(0)
    if driver.cuDriverGetVersion(ctypes.byref(number)) != 0:
        status.problem = "the NVIDIA driver does not answer"
        return
    status.driver = number.value // 1000, number.value % 1000 // 10
    if status.driver < MIN_CUDA_VERSION:
        status.problem = (
            f"the NVIDIA driver is too old: it supports CUDA {_version_text(status.driver)}, "
            f"at least {_version_text(MIN_CUDA_VERSION)} is needed; update the driver"
        )
        return
    error = driver.cuInit(0)
    count = ctypes.c_int(0)
    if error == 0:
        error = driver.cuDeviceGetCount(ctypes.byref(count))
    if error != 0 or count.value == 0:
        status.problem = f"the NVIDIA driver (CUDA {_version_text(status.driver)}) sees no GPU" + (
            f" (error {error})" if error not in (0, 100) else ""
        )
        return
    for ordinal in range(count.value):
        handle, text, size = ctypes.c_int(0), ctypes.create_string_buffer(128), ctypes.c_size_t(0)
        major, minor = ctypes.c_int(0), ctypes.c_int(0)
        driver.cuDeviceGet(ctypes.byref(handle), ordinal)
        driver.cuDeviceGetName(text, len(text), handle)
        driver.cuDeviceTotalMem_v2(ctypes.byref(size), handle)
        driver.cuDeviceGetAttribute(ctypes.byref(major), _CAPABILITY_MAJOR, handle)
        driver.cuDeviceGetAttribute(ctypes.byref(minor), _CAPABILITY_MINOR, handle)
        status.gpus.append(Gpu(text.value.decode(), (major.value, minor.value), size.value))


_cached_probe = functools.cache(probe)


def require(number: int, status: Status | None = None) -> None:
    """Raise DeviceError unless GPU `number` can be used."""
    status = _cached_probe() if status is None else status
    problem = status.problem
    if problem is None and number >= len(status.gpus):
        available = ", ".join(f"cuda:{i} ({gpu.name})" for i, gpu in enumerate(status.gpus))
        raise DeviceError(f"there is no cuda:{number}; this machine has {available}")
    if problem is None:
        minimum = MIN_CAPABILITY[13 if status.driver is not None and status.driver >= (13, 0) else 12]
        gpu = status.gpus[number]
        if gpu.capability < minimum:
            capability = _version_text(gpu.capability)
            problem = f"{gpu.name} has compute capability {capability}, at least {_version_text(minimum)} is needed"
    if problem is not None:
        raise DeviceError(f"device cuda cannot be used: {problem}\n{_summary(status)}\n{hint(status)}")


def _summary(status: Status) -> str:
    parts = [f"driver {'CUDA ' + _version_text(status.driver) if status.driver else 'none'}"]
    parts.append(f"GPUs {', '.join(gpu.name for gpu in status.gpus) or 'none'}")
    parts.append(f"numba-cuda {status.numba_cuda or 'none'}")
    parts += [f"{name} {'found' if path else 'none'}" for name, path in status.toolkit.items()]
    return "found: " + "; ".join(parts)


def hint(status: Status) -> str:
    """How to install the missing packages."""
    return f"with a GPU and its driver in place: pip install 'numba-cuda[{status.extra}]'  (--device cpu always works)"


def _version_text(version: tuple[int, int]) -> str:
    return ".".join(map(str, version))


def status_rows(status: Status) -> list[tuple[str, str]]:
    """Rows (name, value) for `python -m tinycnn info`."""
    rows = [("cuda driver", f"supports CUDA {_version_text(status.driver)}" if status.driver else "none")]
    for i, gpu in enumerate(status.gpus):
        capability, size = _version_text(gpu.capability), gpu.memory / 2**30
        rows.append((f"cuda:{i}", f"{gpu.name}, compute capability {capability}, {size:.0f} GiB"))
    rows.append(("numba-cuda", status.numba_cuda or "none"))
    rows += [(name, path or "none") for name, path in status.toolkit.items()]
    rows.append(("cuda", "ready" if status.problem is None else f"no: {status.problem}"))
    if status.problem is not None:
        rows.append(("", hint(status)))
    return rows


def device_of(array: Any, driver: Any = None) -> int | None:
    """The number of the GPU that holds an array of another library; None for an array in main memory."""
    if hasattr(array, "__dlpack_device__"):
        kind, number = array.__dlpack_device__()
        return int(number) if int(kind) == 2 else None  # kDLCUDA
    if hasattr(array, "__cuda_array_interface__"):  # does not name the GPU: ask the driver
        address, number = (array.__cuda_array_interface__ or {}).get("data", (0,))[0], ctypes.c_int(0)
        driver = load_driver() if driver is None else driver
        if driver is not None and address:
            driver.cuPointerGetAttribute(ctypes.byref(number), _POINTER_DEVICE, ctypes.c_uint64(address))
        return number.value
    return None
