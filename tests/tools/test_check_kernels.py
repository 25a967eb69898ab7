"""tools/check_kernels.py on kernels with one planted fault each.  Needs the toolkit, not a GPU."""

import sys
from pathlib import Path

import numpy as np
import pytest
from numba import cuda

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))

import check_kernels

from tinycnn import _gpu

pytestmark = pytest.mark.skipif(
    None in _gpu.find_toolkit().values(), reason="needs the toolkit: pip install 'numba-cuda[cu13]'"
)
SIGNATURE = "void(float32[::1], float32[::1], int64)"
HALF = np.float32(0.5)


def correct(y, x, n):
    i = cuda.grid(1)
    if i < n:
        y[i] = x[i] * HALF


def float64_literal(y, x, n):
    i = cuda.grid(1)
    if i < n:
        y[i] = x[i] * 0.1  # LLVM would convert 0.5, which is exact in float32


def indexed_at_run_time(y, x, n):
    local = cuda.local.array(64, np.float32)
    for k in range(64):
        local[k * n % 64] = x[k]
    y[cuda.grid(1)] = local[n // 2 % 64]


def divides_64_bits(y, x, n):
    i = cuda.grid(1)
    y[i] = x[i // n]


def uses_many_registers(y, x, n):
    local = cuda.local.array(64, np.float32)
    for k in range(64):
        local[k] = x[k]
    cuda.syncthreads()
    total = local[0]
    for k in range(1, 64):
        total = total * local[k] + local[63 - k]
    y[cuda.grid(1)] = total


def check(function, registers=32, double=None, **options):
    return check_kernels.faults(
        check_kernels.compile_offline(function, SIGNATURE, "sm_90", **options), registers, double
    )


def test_a_kernel_without_fault_passes():
    assert check(correct) == []


def test_float64_in_a_float32_kernel():
    (fault,) = check(float64_literal)
    assert "float64 instructions" in fault
    assert check(float64_literal, double="as its decorator says") == []


def test_local_memory():
    assert any("bytes in local memory" in fault for fault in check(indexed_at_run_time))


def test_spills():
    assert check(uses_many_registers, registers=128) == []
    assert any(fault.startswith("spills") for fault in check(uses_many_registers, registers=128, max_registers=24))


def test_a_64_bit_division():
    (fault,) = check(divides_64_bits)
    assert fault == "1 64-bit divisions"


def test_more_registers_than_allowed():
    (fault,) = check(uses_many_registers)
    assert "registers, at most 32 are allowed" in fault


def test_a_kernel_that_does_not_compile_is_reported(monkeypatch):
    import tinycnn.cuda.optim

    class Broken:
        registers, double = 32, None

        def function(y):
            y.nonsense()

    monkeypatch.setattr(tinycnn.cuda.optim, "broken", Broken, raising=False)
    figures, faults = check_kernels._job(("tinycnn.cuda.optim", "broken", "void(float32[::1])", "sm_90"))
    assert figures is None
    assert faults[0].startswith("does not compile")
