"""Kernels for processors with shorter vectors, and without fused multiply-add, than this one."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import llvmlite.binding
import pytest

PROGRAM = """
import numpy as np
from tinycnn.kernels import _simd, linear

rng = np.random.default_rng(0)
x, w, b = (rng.standard_normal(shape, np.float32) for shape in ((3, 50), (40, 50), 40))
y = np.empty((3, 40), np.float32)
linear.linear_forward(y, x, w, b)
np.testing.assert_allclose(y, x @ w.T + b, rtol=0, atol=1e-4)
parts = [cell.cell_contents for cell in linear.linear_forward.__closure__]  # the parallel kernel and the serial one
kernels = [part.__wrapped__ for part in parts if hasattr(part, "__wrapped__")]
assembly = "".join(text for kernel in kernels for text in kernel.inspect_asm().values())
print(_simd.BYTES, "mulps" in assembly, "fmadd" in assembly, "fma" in assembly.replace("fmadd", ""))
"""


x86 = pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="names of x86 processors")


def run(processor, folder, *arguments):
    """Run Python with kernels for a processor; returns what it printed."""
    names = {"NUMBA_CPU_NAME": processor, "NUMBA_CPU_FEATURES": "", "NUMBA_CACHE_DIR": str(folder)}
    command = [sys.executable, "-W", "error", *arguments]
    result = subprocess.run(command, env={**os.environ, **names}, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stdout
    assert result.stderr == ""
    return result.stdout.strip()


@x86
@pytest.mark.parametrize(
    ("processor", "expected"), [("nehalem", "16 True False False"), ("haswell", "32 False True False")]
)
def test_other_processors(tmp_path, processor, expected):
    if processor == "haswell" and not llvmlite.binding.get_host_cpu_features().get("avx2"):
        pytest.skip("this processor has no AVX2")
    assert run(processor, tmp_path, "-c", PROGRAM) == expected


@x86
def test_vectors_shorter_than_a_register_block_has_rows(tmp_path):
    """Two numbers of float64: the register block has four or six output channels."""
    tests = Path(__file__).with_name("test_winograd.py")
    options = ["-q", "-p", "no:cacheprovider", "-k", "float64 and (nchw or gradient)"]
    run("nehalem", tmp_path, "-m", "pytest", *options, tests)
