"""Shared set-up: the device of the CUDA tests, the profiles of Hypothesis, a check that kernels give the same bits on
every run."""

import os

import cuda_on_cpu
import numba
import numpy as np
import pytest
from cuda_on_cpu import ON_GPU
from hypothesis import HealthCheck, settings

# The first example of a kernel compiles it: no deadlines, no health check for slow examples.
settings.register_profile(
    "dev", deadline=None, max_examples=25, suppress_health_check=[HealthCheck.too_slow], print_blob=True
)
settings.register_profile("ci", settings.get_profile("dev"), derandomize=True, database=None)
settings.register_profile("smoke", settings.get_profile("ci"), max_examples=3)
settings.register_profile("thorough", settings.get_profile("dev"), max_examples=500)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci" if os.environ.get("CI") else "dev"))

# TINYCNN_CUDA selects the device of tests with the marker gpu. gpu: a GPU. cpu: PTX on the CPU, an error where that is
# impossible. Unset: PTX on the CPU, skipped where that is impossible.
UNAVAILABLE = None if ON_GPU else cuda_on_cpu.unavailable()


def pytest_configure():
    if UNAVAILABLE is not None and os.environ.get("TINYCNN_CUDA") == "cpu":
        raise pytest.UsageError(f"CUDA kernels cannot run on this CPU: {UNAVAILABLE}")
    if not ON_GPU and UNAVAILABLE is None:
        cuda_on_cpu.install()


def pytest_collection_modifyitems(items):
    if UNAVAILABLE is not None:
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason=f"CUDA kernels cannot run on this CPU: {UNAVAILABLE}"))


@pytest.fixture(autouse=True)
def no_driver_problems(request):
    """The driver on the CPU reports no misuse; tests that misuse it on purpose read its reports themselves."""
    yield
    if not ON_GPU and UNAVAILABLE is None and "gpu" in request.keywords:
        assert cuda_on_cpu.problems() == []


@pytest.fixture
def small_digits(monkeypatch):
    """Replaces all data sets by synthetic digits, 400 to train on and 100 to test on."""
    from tinycnn import data

    images, labels = data.synthetic_digits(500, rng=0)
    digits = data.Dataset("digits", images[:400], labels[:400], images[400:], labels[400:], tuple("0123456789"))
    monkeypatch.setattr(data, "load", lambda name, *_: digits)
    return digits


@pytest.fixture
def threads():
    """numba.set_num_threads, restored afterwards; skips where there is only one thread."""
    if numba.config.NUMBA_NUM_THREADS < 2:
        pytest.skip("needs two CPU threads, this machine (or NUMBA_NUM_THREADS) has one")
    previous = numba.get_num_threads()
    yield numba.set_num_threads
    numba.set_num_threads(previous)


@pytest.fixture
def same_bits(threads):
    """A check that `case()` -> (kernel, arguments, indices of the outputs) gives the same bits with 1 and 2 threads, on
    every run."""

    def check(case):
        runs = []
        for count in (1, 2, 2, 1, 2):
            threads(count)
            kernel, arguments, outputs = case()
            kernel(*arguments)
            runs.append([np.array(arguments[i]).tobytes() for i in outputs])
        assert any(np.any(arguments[i]) for i in outputs), "the outputs are all zero: nothing was compared"
        assert all(run == runs[0] for run in runs), [
            [a == b for a, b in zip(run, runs[0], strict=True)] for run in runs
        ]

    return check
