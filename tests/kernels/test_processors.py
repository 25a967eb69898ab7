"""Kernels for processors with shorter vectors, and without fused multiply-add, than this one."""

import os
import platform
import subprocess
import sys

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


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="names of x86 processors")
@pytest.mark.parametrize(
    ("processor", "expected"), [("nehalem", "16 True False False"), ("haswell", "32 False True False")]
)
def test_other_processors(tmp_path, processor, expected):
    if processor == "haswell" and not llvmlite.binding.get_host_cpu_features().get("avx2"):
        pytest.skip("this processor has no AVX2")
    names = {"NUMBA_CPU_NAME": processor, "NUMBA_CPU_FEATURES": "", "NUMBA_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-W", "error", "-c", PROGRAM]
    result = subprocess.run(command, env={**os.environ, **names}, capture_output=True, text=True, timeout=300)
    assert result.stderr == ""
    assert result.stdout.strip() == expected
