"""What kernels run on: a GPU or Numba's simulator (_launch.py), or the emulation (_emulate.py)."""

import importlib
import os

import numpy as np

EMULATED = os.environ.get("TINYCNN_CUDA") == "emulate"
_home = importlib.import_module("tinycnn.cuda._emulate" if EMULATED else "tinycnn.cuda._launch")

ALIGN = _home.ALIGN
Kernel, kernel, phase, device, scalar = _home.Kernel, _home.kernel, _home.phase, _home.device, _home.scalar
cuda = _home.cuda
use, synchronize, seconds = _home.use, _home.synchronize, _home.seconds
empty, to_device, to_host, write, capture = _home.empty, _home.to_device, _home.to_host, _home.write, _home.capture
flat, scratch, constant, share = _home.flat, _home.scratch, _home.constant, _home.share

U = np.uint32  # around an index in a hot loop: Numba tests every signed index for being negative
THREADS = 128  # of a block, where a kernel has no reason for another number


def blocks(count):
    """Blocks of THREADS threads for `count` elements, one a thread."""
    return -(-count // THREADS)


def compile_for(step):
    """Nothing: here kernels are compiled one by one, when they are launched first."""
