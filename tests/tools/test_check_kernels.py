"""The compile gate (tools/check_kernels.py) on kernels with one planted fault each.  Needs the toolkit, not a GPU."""

import sys
from pathlib import Path

import numpy as np
import pytest
from numba import cuda

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))

import check_kernels

from tinycnn import _gpu

pytestmark = pytest.mark.skipif(
    None in _gpu.find_toolkit().values(), reason="needs the toolkit: pip install 'tinycnn[cuda13]'"
)
SIGNATURE = "void(float32[::1], float32[::1], int64)"
HALF = np.float32(0.5)


def right(y, x, n):
    i = cuda.grid(1)
    if i < n:
        y[i] = x[i] * HALF


def literal(y, x, n):
    i = cuda.grid(1)
    if i < n:
        y[i] = x[i] * 0.1  # (0.5 would do no harm: LLVM sees that float32 holds it)


def indexed_at_run_time(y, x, n):
    kept = cuda.local.array(64, np.float32)
    for k in range(64):
        kept[k * n % 64] = x[k]
    y[cuda.grid(1)] = kept[n // 2 % 64]


def divided(y, x, n):
    i = cuda.grid(1)
    y[i] = x[i // n]


def crowded(y, x, n):
    kept = cuda.local.array(64, np.float32)
    for k in range(64):
        kept[k] = x[k]
    cuda.syncthreads()
    total = kept[0]
    for k in range(1, 64):
        total = total * kept[k] + kept[63 - k]
    y[cuda.grid(1)] = total


def check(function, registers=32, double=None, **options):
    return check_kernels.faults(
        check_kernels.compile_offline(function, SIGNATURE, "sm_90", **options), registers, double
    )


def test_a_kernel_without_fault_passes():
    assert check(right) == []


def test_float64_in_a_float32_kernel():
    (fault,) = check(literal)
    assert "float64 instructions" in fault
    assert check(literal, double="as its decorator says") == []


def test_local_memory():
    assert any("bytes in local memory" in fault for fault in check(indexed_at_run_time))


def test_spills():
    assert check(crowded, registers=128) == []
    assert any(fault.startswith("spills") for fault in check(crowded, registers=128, max_registers=24))


def test_a_64_bit_division():
    (fault,) = check(divided)
    assert fault == "1 64-bit divisions"


def test_more_registers_than_stated():
    (fault,) = check(crowded)
    assert "registers, at most 32 are allowed" in fault


def test_what_does_not_compile_is_a_fault_and_not_a_crash(monkeypatch):
    import tinycnn.cuda.optim

    class Broken:
        registers, double = 32, None

        def function(y):
            y.nonsense()

    monkeypatch.setattr(tinycnn.cuda.optim, "broken", Broken, raising=False)
    figures, wrong = check_kernels._job(("tinycnn.cuda.optim", "broken", "void(float32[::1])", "sm_90"))
    assert figures is None
    assert wrong[0].startswith("does not compile")
