"""Compile every CUDA kernel to machine code and check the result.  Needs no GPU and no driver.

    pip install 'tinycnn[cuda13]'
    python tools/check_kernels.py [--only NAME] [--json FILE]

Prints registers, shared memory, local memory and spills of each kernel.  Fails if a kernel spills, uses local memory,
computes in float64 on float32 arrays (unless its decorator gives the reason), divides in 64 bits, or uses more
registers than its decorator allows.  Argument types are those of real launches: training steps of LeNet-5 and the calls
of tests/support/cuda_calls.py run with a launch function that records the call.
"""

import argparse
import json
import multiprocessing
import os
import re
import sys
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
ARCHITECTURES = {"sm_75": (7, 5), "sm_80": (8, 0), "sm_90": (9, 0), "sm_90a": (9, 0, "a")}
FIGURES = ("registers", "shared", "local", "spills", "float64", "divide64")


class HostArray(np.ndarray):
    """A NumPy array in place of a device array."""

    def copy_to_device(self, values):
        self[...] = values


def type_of(value):
    """Numba's name for the type of an argument."""
    if isinstance(value, np.ndarray):
        return (
            f"{value.dtype}[::1]" if value.ndim == 1 else f"{value.dtype}[{', '.join([':'] * (value.ndim - 1))}, ::1]"
        )
    if isinstance(value, np.generic):
        return str(value.dtype)
    if isinstance(value, tuple):
        return f"UniTuple({type_of(value[0])}, {len(value)})"
    return {bool: "boolean", int: "int64", float: "float64"}[type(value)]


def launches():
    """{(name, signature): kernel} of all launches."""
    sys.path[:0] = [str(ROOT / "tests" / "support"), str(ROOT)]
    from tinycnn import _gpu
    from tinycnn.cuda import _launch

    recorded = {}

    def record(self, grid, *args):
        recorded.setdefault((self.__name__, f"void({', '.join(map(type_of, args))})"), self)

    # No device: arrays are NumPy arrays, and launches are recorded.
    _gpu.require = lambda number, status=None: None
    _launch.Kernel.launch = record
    _launch._upload = lambda array: np.array(array).view(HostArray)
    _launch.set_device = lambda number: None

    import cuda_calls

    from benchmarks import _ceilings_cuda
    from tinycnn import cuda, models, optim, train
    from tinycnn.dataset import DataLoader, DeviceDataset
    from tinycnn.losses import CrossEntropyLoss

    images, labels = np.zeros((70, 28, 28), np.uint8), np.arange(70) % 10
    for activation, pool, optimizer in (("tanh", "avg", optim.AdamW), ("relu", "max", optim.SGD)):
        model = models.lenet5(activation, pool, rng=0, device="cuda")
        batches = DeviceDataset(images, labels, mean=0, std=1, device="cuda")
        criterion = CrossEntropyLoss()
        train.StepRunner(model, criterion, DataLoader(batches), optimizer(model)).step(64)
    array = np.zeros(300, np.float32).view(HostArray)
    _ceilings_cuda.copy(array, array)
    _ceilings_cuda.multiply_adds(array, array)
    for name, _, arguments, _ in cuda_calls.calls(np.float32, cuda_calls.SMALL):
        device_arguments = [np.array(a).view(HostArray) if isinstance(a, np.ndarray) else a for a in arguments]
        getattr(cuda, name)(*device_arguments)
    return recorded


def compile_offline(function, signature, architecture, max_registers=None):
    """FIGURES of one kernel, from the compiler's log and the PTX."""
    from cuda.core import Linker, LinkerOptions, ObjectCode
    from numba import cuda
    from numba.cuda import dispatcher

    cc = ARCHITECTURES[architecture]
    # numba-cuda compiles device functions for the current device; this machine may have none.
    dispatcher.get_current_device = lambda: SimpleNamespace(compute_capability=cc[:2])
    code, _ = cuda.compile(function, signature, device=False, abi="numba", cc=cc, output="ltoir")
    ptx, _ = cuda.compile(function, signature, device=False, abi="numba", cc=cc, output="ptx")
    options = LinkerOptions(
        arch=architecture, link_time_optimization=True, ptxas_options=["-v"], max_register_count=max_registers
    )
    linker = Linker(ObjectCode.from_ltoir(code), options=options)
    linker.link("cubin")
    log = linker.get_info_log()

    def largest(pattern):
        return max(map(int, re.findall(pattern, log)), default=0)

    return {
        "registers": largest(r"Used (\d+) registers"),
        "shared": largest(r"(\d+) bytes smem"),
        "local": largest(r"(\d+) bytes stack frame"),
        "spills": largest(r"(\d+) bytes spill stores") + largest(r"(\d+) bytes spill loads"),
        "float64": len(re.findall(r"^\s*\S*\.f64", ptx, re.MULTILINE)),
        "divide64": len(re.findall(r"\b(?:div|rem)\.[su]64", ptx)),
    }


def faults(figures, registers, double):
    """Descriptions of a kernel's faults."""
    found = []
    if figures["spills"]:
        found.append(f"spills {figures['spills']} bytes")
    if figures["local"]:
        found.append(f"keeps {figures['local']} bytes in local memory")
    if figures["float64"] and not double:
        found.append(f"{figures['float64']} float64 instructions")
    if figures["divide64"]:
        found.append(f"{figures['divide64']} 64-bit divisions")
    if figures["registers"] > registers:
        found.append(f"{figures['registers']} registers, at most {registers} are allowed")
    return found


def _job(job):
    module, name, signature, architecture = job
    import importlib

    kernel = getattr(importlib.import_module(module), name)
    try:
        figures = compile_offline(kernel.function, signature, architecture)
    except Exception as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        return None, ["does not compile: " + " ".join(lines)[:600]]
    return figures, faults(figures, kernel.registers, kernel.double)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="kernels whose name contains this")
    parser.add_argument("--json", help="write all figures to this file")
    args = parser.parse_args(argv)
    recorded = launches()
    if tuple(map(int, metadata.version("numba-cuda").split(".")[:2])) < (0, 24):
        del ARCHITECTURES["sm_90a"]  # unknown to these versions
    jobs = [
        (kernel.function.__module__, name, signature, architecture)
        for (name, signature), kernel in sorted(recorded.items(), key=lambda item: item[0])
        if args.only is None or args.only in name
        for architecture in ARCHITECTURES
    ]
    print(f"{'kernel':<28} {'arch':<7}   " + "  ".join(f"{key[:7]:>7}" for key in FIGURES))
    failed, rows = 0, []
    with multiprocessing.get_context("spawn").Pool(min(4, os.cpu_count() or 1)) as pool:
        for (_, name, signature, architecture), (figures, problems) in zip(jobs, pool.imap(_job, jobs), strict=True):
            values = "  ".join(f"{figures[key]:7d}" for key in FIGURES) if figures else ""
            print(f"{name:<28} {architecture:<7}   {values}", "; ".join(problems), flush=True)
            failed += bool(problems)
            rows.append({"kernel": name, "signature": signature, "architecture": architecture, **(figures or {})})
    if args.json:
        Path(args.json).write_text(json.dumps(rows, indent=1) + "\n")
    print(f"{failed} of {len(jobs)} FAILED" if failed else f"{len(jobs)} compiled, no faults")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
