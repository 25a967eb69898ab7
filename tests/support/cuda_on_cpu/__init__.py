"""Run CUDA kernels on the CPU: the real numba-cuda and cuda.core on a stand-in driver (driver.cpp), which runs the
kernels' PTX, translated to C (ptx.py).

    import cuda_on_cpu
    cuda_on_cpu.install()        # before numba.cuda is imported

Environment: CUDA_ON_CPU_CC=75|80|90   compute capability         CUDA_ON_CPU_MEMORY=BYTES   of the device (4 GiB)
             CUDA_ON_CPU_ORDER=forward|backward|shuffled           CUDA_ON_CPU_LOG=FILE       log of all driver calls
"""

import ctypes
import functools
import hashlib
import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

ON_GPU = os.environ.get("TINYCNN_CUDA") == "gpu"  # the tests use a real GPU
SOURCE = Path(__file__).with_name("driver.cpp")
FOLDER = Path(__file__).parents[3] / ".cuda_on_cpu"
FLAGS = [
    "-std=c++17",
    "-O1",
    "-g",
    "-Wall",
    "-Wextra",
    "-shared",
    "-fPIC",
    "-fvisibility=hidden",
    "-Wl,-soname,libcuda.so.1",
]
NUMBA_CUDA = (0, 30)  # the oldest supported version
ORDERS = "forward", "backward", "shuffled"

_state = {"driver": None, "folder": FOLDER}


def unavailable():
    """Why this machine cannot run kernels on the CPU, or None."""
    if not sys.platform.startswith("linux"):
        return "only on Linux"
    if shutil.which("g++") is None:
        return "g++ is not installed"
    if importlib.util.find_spec("numba_cuda") is None:
        return "numba-cuda is not installed"
    version = importlib.metadata.version("numba-cuda")
    if tuple(map(int, version.split(".")[:2])) < NUMBA_CUDA:
        return f"numba-cuda {version} is older than {'.'.join(map(str, NUMBA_CUDA))}"
    header = _header()
    if header is None:
        return "the toolkit's cuda.h is not installed"
    if int(re.search(r"#define CUDA_VERSION (\d+)", header.read_text())[1]) < 13000:
        return f"{header} is older than CUDA 13"
    from cuda import pathfinder

    for name in ("nvvm", "nvrtc", "nvJitLink"):
        try:
            pathfinder.load_nvidia_dynamic_lib(name)
        except pathfinder.DynamicLibNotFoundError:
            return f"the toolkit's {name} is not installed"
    return None


def _header():
    """The toolkit's cuda.h, or None."""
    packages = {sysconfig.get_paths()[name] for name in ("purelib", "platlib")}
    found = [path for package in packages for path in Path(package).glob("nvidia/*/include/cuda.h")]
    return max(found, default=None)


def install(folder=None):
    """Give this process one GPU, whose kernels run on the CPU.  Call it before numba.cuda is imported.

    folder   the cache of compiled files; by default .cuda_on_cpu in the project's folder

    RuntimeError if that is impossible.
    """
    if _state["driver"] is not None:
        return
    reason = unavailable()
    if reason is not None:
        raise RuntimeError(f"cuda_on_cpu: {reason}")
    if "numba.cuda.cudadrv.driver" in sys.modules or os.environ.get("NUMBA_ENABLE_CUDASIM", "0") not in ("", "0"):
        raise RuntimeError("cuda_on_cpu: numba.cuda has been imported already, or is the simulator")
    if _loaded("libcuda.so.1"):
        raise RuntimeError("cuda_on_cpu: another libcuda.so.1 has been loaded already")
    _state["folder"] = folder = Path(folder or FOLDER)
    driver = ctypes.CDLL(str(_build(folder)), mode=ctypes.RTLD_GLOBAL)  # kernels link to its functions
    driver.driver_problem.restype = ctypes.c_char_p
    driver.driver_count.restype = ctypes.c_long
    for name in ("executed", "pending", "allocations"):
        getattr(driver, f"driver_{name}").restype = ctypes.c_uint64
    _state["driver"] = driver

    from numba.cuda import codegen

    codegen.CUDACodeLibrary.get_cufunc = _with_translation(codegen.CUDACodeLibrary.get_cufunc)


def _loaded(name):
    try:
        ctypes.CDLL(name, mode=os.RTLD_NOLOAD)
    except OSError:
        return False
    return True


def _build(folder):
    """Build the driver's shared object.  Its soname is libcuda.so.1, so a later load of that name returns it."""
    header = _header()
    command = ["g++", *FLAGS, f"-I{header.parent}", str(SOURCE)]
    key = hashlib.sha256(SOURCE.read_bytes() + header.read_bytes() + " ".join(FLAGS).encode()).hexdigest()[:16]
    path = folder / f"libcuda-{key}.so"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        temporary = folder / f"{path.name}.{os.getpid()}"
        subprocess.run([*command, "-o", str(temporary), "-ldl", "-pthread"], check=True)
        temporary.replace(path)
    return path


def _with_translation(get_cufunc):
    """Wrap numba-cuda's method that loads a kernel: translate the kernel first."""

    @functools.wraps(get_cufunc)
    def wrapped(library):
        from numba.cuda.cudadrv import devices

        if library._entry_name is not None and devices.get_context().device.id not in library._cufunc_cache:
            from . import ptx

            shared_object = ptx.compile_kernel(_ptx(library), _state["folder"])
            register(library._entry_name, shared_object)
        return get_cufunc(library)

    return wrapped


def _ptx(library):
    """The optimised PTX of a numba-cuda kernel, cached by the hash of its machine code: Numba caches only machine
    code, and generating PTX takes as long."""
    cubin = bytes(library.get_cubin().code)
    path = _state["folder"] / f"{hashlib.sha256(cubin).hexdigest()[:24]}.ptx"
    if not path.exists():
        temporary = path.with_suffix(f".{os.getpid()}")
        temporary.write_text(library.get_lto_ptx() if library._lto else library.get_asm_str())
        temporary.replace(path)
    return path.read_text()


# --- the driver, for tests --------------------------------------------------------------------------------------------


def register(kernel, shared_object):
    """Set the translation of the kernel of this name, for libraries loaded from now on."""
    _state["driver"].driver_register(kernel.encode(), str(shared_object).encode())


def set_order(name):
    """Set the order of threads and blocks: "forward" (the default), "backward" or "shuffled"."""
    _state["driver"].driver_set_order(ORDERS.index(name))


def inject_error(call, error, after=0, times=1):
    """Make a function of the driver ("cuMemAlloc") return an error (a number, or "CUDA_ERROR_...") instead of working,
    `times` times, after `after` more successful calls."""
    if isinstance(error, str):
        from cuda.bindings import driver as binding

        error = getattr(binding.CUresult, error)
    _state["driver"].driver_fail(_checked_name(call), int(error), ctypes.c_long(after), ctypes.c_long(times))


def call_count(call):
    """Number of calls of a function of the driver."""
    return _state["driver"].driver_count(_checked_name(call))


def _checked_name(call):
    if not _state["driver"].driver_implements(call.encode()):
        raise ValueError(f"the stand-in driver has no function {call!r}")
    return call.encode()


def set_memory(size):
    """Set the bytes of the device."""
    _state["driver"].driver_set_memory(ctypes.c_uint64(size))


def allocations():
    """(address, bytes) of each live allocation."""
    number = _state["driver"].driver_allocations(None, ctypes.c_uint64(0))
    pairs = (ctypes.c_uint64 * (2 * number))()
    _state["driver"].driver_allocations(pairs, ctypes.c_uint64(number))
    return list(zip(pairs[::2], pairs[1::2], strict=True))


def kernels_run():
    """Number of kernels that have run, including those of graphs."""
    return _state["driver"].driver_executed()


def pending_work():
    """Number of queued items; they run when a call waits for them."""
    return _state["driver"].driver_pending()


def run_pending():
    """Run all queued work, as a synchronisation does."""
    _state["driver"].driver_run_all()


def problems():
    """Problems since the last call, as text: misuse that a real driver would miss or crash on."""
    driver = _state["driver"]
    driver.driver_check()
    return [text.decode() for text in iter(driver.driver_problem, None)]


def recover():
    """Make the context usable again after a fault, and drop queued work; a GPU cannot do this."""
    _state["driver"].driver_recover()


def fail_on_problems():
    """From now on, exit with 99 if problems remain that `problems` has not returned."""
    _state["driver"].driver_strict()
