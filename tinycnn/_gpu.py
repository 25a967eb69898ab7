"""What this machine has of what --device cuda needs: driver, GPU, toolkit.  Looks before numba-cuda is asked anything.

The driver is asked through ctypes, so this works, and says what is missing, where nothing else is installed.
"""

import ctypes
import functools
import importlib.metadata
import importlib.util
from dataclasses import dataclass, field

from tinycnn.errors import DeviceError

MIN_CUDA_VERSION = 12, 0  # CUDA version that a driver must know
# Compute capabilities below these are not supported by the toolkits 12 and 13.
MIN_CAPABILITY = {12: (5, 0), 13: (7, 5)}
DRIVER_LIBRARIES = ("libcuda.so.1", "libcuda.so", "nvcuda.dll")
# What numba-cuda compiles with, by the name under which NVIDIA's finder knows it.
TOOLKIT_LIBRARIES = ("nvvm", "nvrtc", "nvJitLink")
_CAPABILITY_MAJOR, _CAPABILITY_MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_...
_POINTER_DEVICE = 9  # CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL


@dataclass
class Gpu:
    """name, compute capability, bytes of memory"""

    name: str
    capability: tuple[int, int]
    memory: int


@dataclass
class Status:
    """driver: the CUDA version that the driver knows, None without a driver   problem: what is in the way, or None"""

    driver: tuple[int, int] | None = None
    gpus: list[Gpu] = field(default_factory=list)
    numba_cuda: str | None = None
    toolkit: dict[str, str | None] = field(default_factory=dict)
    problem: str | None = None

    @property
    def extra(self):
        """The extra to install, by the driver's version."""
        return "cuda12" if self.driver is not None and self.driver < (13, 0) else "cuda13"


def load_driver():
    """The driver's library, or None."""
    for name in DRIVER_LIBRARIES:
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    return None


def find_toolkit():
    """Where each part of the toolkit was found, None for what is missing."""
    try:
        from cuda.pathfinder import load_nvidia_dynamic_lib
    except ImportError:
        return dict.fromkeys(TOOLKIT_LIBRARIES)
    found: dict[str, str | None] = {}
    for name in TOOLKIT_LIBRARIES:
        try:
            found[name] = load_nvidia_dynamic_lib(name).abs_path
        except Exception:  # the class of the error differs between versions
            found[name] = None
    return found


def probe(driver=None, full=False):
    """What can be told without computing.

    driver      the driver's library, looked for if not given
    full  look for the toolkit even where something else is missing already
    """
    status = Status()
    if importlib.util.find_spec("numba_cuda") is not None:
        status.numba_cuda = importlib.metadata.version("numba-cuda")
    driver = load_driver() if driver is None else driver
    looked = f"looked for {', '.join(DRIVER_LIBRARIES)}"
    if driver is None:
        status.problem = f"no NVIDIA driver was found ({looked}); install the driver of your GPU"
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


def _query_driver(driver, status):
    """The driver's version and its GPUs."""
    number = ctypes.c_int(0)
    if driver.cuDriverGetVersion(ctypes.byref(number)) != 0:
        status.problem = "the NVIDIA driver does not answer"
        return
    status.driver = number.value // 1000, number.value % 1000 // 10
    if status.driver < MIN_CUDA_VERSION:
        status.problem = (
            f"the NVIDIA driver is too old: it knows CUDA {_version_text(status.driver)}, "
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


def require(number, status=None):
    """DeviceError, saying what was looked for, what was found and what to do, unless GPU `number` can be used."""
    status = _cached_probe() if status is None else status
    if status.problem is None and number >= len(status.gpus):
        there = ", ".join(f"cuda:{i} ({gpu.name})" for i, gpu in enumerate(status.gpus))
        raise DeviceError(f"there is no cuda:{number}; this machine has {there}")
    if status.problem is None:
        least = MIN_CAPABILITY[13 if status.driver >= (13, 0) else 12]
        gpu = status.gpus[number]
        if gpu.capability < least:
            status.problem = (
                f"{gpu.name} has compute capability {_version_text(gpu.capability)}, "
                f"at least {_version_text(least)} is needed"
            )
    if status.problem is not None:
        raise DeviceError(f"device cuda cannot be used: {status.problem}\n{_summary(status)}\n{hint(status)}")


def _summary(status):
    parts = [f"driver {'CUDA ' + _version_text(status.driver) if status.driver else 'none'}"]
    parts.append(f"GPUs {', '.join(gpu.name for gpu in status.gpus) or 'none'}")
    parts.append(f"numba-cuda {status.numba_cuda or 'none'}")
    parts += [f"{name} {'found' if path else 'none'}" for name, path in status.toolkit.items()]
    return "found: " + "; ".join(parts)


def hint(status):
    """What to type."""
    return f"with a GPU and its driver in place: pip install 'tinycnn[{status.extra}]'  (--device cpu always works)"


def _version_text(version):
    return ".".join(map(str, version))


def status_rows(status):
    """Lines (name, value) for `python -m tinycnn info`."""
    rows = [("cuda driver", f"knows CUDA {_version_text(status.driver)}" if status.driver else "none")]
    for i, gpu in enumerate(status.gpus):
        rows.append(
            (
                f"cuda:{i}",
                f"{gpu.name}, compute capability {_version_text(gpu.capability)}, {gpu.memory / 2**30:.0f} GiB",
            )
        )
    rows.append(("numba-cuda", status.numba_cuda or "none"))
    rows += [(name, path or "none") for name, path in status.toolkit.items()]
    rows.append(("cuda", "ready" if status.problem is None else f"no: {status.problem}"))
    if status.problem is not None:
        rows.append(("", hint(status)))
    return rows


def device_of(array, driver=None):
    """The number of the GPU on which an array of another library lies; None if it lies in main memory."""
    if hasattr(array, "__dlpack_device__"):
        kind, number = array.__dlpack_device__()
        return int(number) if int(kind) == 2 else None  # kDLCUDA
    if hasattr(array, "__cuda_array_interface__"):  # which does not say where: the driver knows
        address, number = (array.__cuda_array_interface__ or {}).get("data", (0,))[0], ctypes.c_int(0)
        driver = load_driver() if driver is None else driver
        if driver is not None and address:
            driver.cuPointerGetAttribute(ctypes.byref(number), _POINTER_DEVICE, ctypes.c_uint64(address))
        return number.value
    return None
