"""Compile every CUDA kernel, as it is launched, to machine code, on a machine that needs no GPU and no driver.

    pip install 'tinycnn[cuda13]'
    python tools/check_kernels.py [--only NAME] [--json FILE]

Prints a table of registers, shared and local memory and spills, and fails if a kernel spills, keeps anything in local
memory, computes in float64 on float32 arrays (unless its decorator says why), divides in 64 bits, or takes more
registers than its decorator states.  What is compiled are the argument types with which kernels are really launched:
training steps of LeNet-5 and the calls of tests/support/cuda_calls.py are run with launches noted instead of made.
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


class Fake(np.ndarray):
    """What stands for a device array while launches are noted."""

    def copy_to_device(self, values):
        self[...] = values


def type_of(value):
    """The Numba type of an argument, as text."""
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
    """{(kernel, signature)} of everything that is launched."""
    sys.path[:0] = [str(ROOT / "tests" / "support"), str(ROOT)]
    from tinycnn import _gpu
    from tinycnn.cuda import _launch

    noted = {}

    def note(self, blocks, *args):
        noted.setdefault((self.__name__, f"void({', '.join(map(type_of, args))})"), self)

    # Nothing below touches a device: arrays are NumPy's, and a launch is a note.
    _gpu.require = lambda number, status=None: None
    _launch.Kernel.launch = note
    _launch._upload = lambda array: np.array(array).view(Fake)
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
    numbers = np.zeros(300, np.float32).view(Fake)
    _ceilings_cuda.copy(numbers, numbers)
    _ceilings_cuda.multiply_adds(numbers, numbers)
    for name, _, arguments, _ in cuda_calls.calls(np.float32, cuda_calls.SMALL):
        there = [np.array(a).view(Fake) if isinstance(a, np.ndarray) else a for a in arguments]
        getattr(cuda, name)(*there)
    return noted


def compile_offline(function, signature, architecture, max_registers=None):
    """The compiler's own figures of one kernel, as a dict of FIGURES."""
    from cuda.core import Linker, LinkerOptions, ObjectCode
    from numba import cuda
    from numba.cuda import dispatcher

    cc = ARCHITECTURES[architecture]
    # Functions that kernels call are compiled for "the current device"; there is none here.
    dispatcher.get_current_device = lambda: SimpleNamespace(compute_capability=cc[:2])
    code, _ = cuda.compile(function, signature, device=False, abi="numba", cc=cc, output="ltoir")
    ptx, _ = cuda.compile(function, signature, device=False, abi="numba", cc=cc, output="ptx")
    options = LinkerOptions(
        arch=architecture, link_time_optimization=True, ptxas_options=["-v"], max_register_count=max_registers
    )
    linker = Linker(ObjectCode.from_ltoir(code), options=options)
    linker.link("cubin")
    log = linker.get_info_log()

    def most(pattern):
        return max(map(int, re.findall(pattern, log)), default=0)

    return {
        "registers": most(r"Used (\d+) registers"),
        "shared": most(r"(\d+) bytes smem"),
        "local": most(r"(\d+) bytes stack frame"),
        "spills": most(r"(\d+) bytes spill stores") + most(r"(\d+) bytes spill loads"),
        "float64": len(re.findall(r"^\s*\S*\.f64", ptx, re.MULTILINE)),
        "divide64": len(re.findall(r"\b(?:div|rem)\.[su]64", ptx)),
    }


def faults(figures, registers, double):
    """What is wrong with a kernel, in words."""
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
    noted = launches()
    if tuple(map(int, metadata.version("numba-cuda").split(".")[:2])) < (0, 24):
        del ARCHITECTURES["sm_90a"]  # not known there
    jobs = [
        (kernel.function.__module__, name, signature, architecture)
        for (name, signature), kernel in sorted(noted.items(), key=lambda item: item[0])
        if args.only is None or args.only in name
        for architecture in ARCHITECTURES
    ]
    print(f"{'kernel':<28} {'arch':<7}   " + "  ".join(f"{key[:7]:>7}" for key in FIGURES))
    bad, rows = 0, []
    with multiprocessing.get_context("spawn").Pool(min(4, os.cpu_count() or 1)) as pool:
        for (_, name, signature, architecture), (figures, wrong) in zip(jobs, pool.imap(_job, jobs), strict=True):
            text = "  ".join(f"{figures[key]:7d}" for key in FIGURES) if figures else ""
            print(f"{name:<28} {architecture:<7}   {text}", "; ".join(wrong), flush=True)
            bad += bool(wrong)
            rows.append({"kernel": name, "signature": signature, "architecture": architecture, **(figures or {})})
    if args.json:
        Path(args.json).write_text(json.dumps(rows, indent=1) + "\n")
    print(f"{bad} of {len(jobs)} FAILED" if bad else f"{len(jobs)} compiled, nothing wrong")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
