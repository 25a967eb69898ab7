"""What all tests share: the GPU that they run on, how hard Hypothesis tries, and the check that a kernel gives the same
bits every time."""

import os

import cuda_on_cpu
import numba
import numpy as np
import pytest
from cuda_on_cpu import ON_GPU
from hypothesis import HealthCheck, settings

# The first example of a kernel compiles it, so neither deadlines nor "too slow" mean anything here.
settings.register_profile(
    "dev", deadline=None, max_examples=25, suppress_health_check=[HealthCheck.too_slow], print_blob=True
)
settings.register_profile("ci", settings.get_profile("dev"), derandomize=True, database=None)
settings.register_profile("thorough", settings.get_profile("dev"), max_examples=500)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci" if os.environ.get("CI") else "dev"))

# What tests with the marker gpu run on.  TINYCNN_CUDA=gpu: a GPU.  cpu: PTX on the processor, an error where that is
# impossible.  Not set: the same, and skipped where that is impossible.
IMPOSSIBLE = None if ON_GPU else cuda_on_cpu.unavailable()


def pytest_configure():
    if IMPOSSIBLE is not None and os.environ.get("TINYCNN_CUDA") == "cpu":
        raise pytest.UsageError(f"CUDA kernels cannot run on this processor: {IMPOSSIBLE}")
    if not ON_GPU and IMPOSSIBLE is None:
        cuda_on_cpu.install()


def pytest_collection_modifyitems(items):
    if IMPOSSIBLE is not None:
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason=f"CUDA kernels cannot run on this processor: {IMPOSSIBLE}"))


@pytest.fixture(autouse=True)
def no_misuse_of_the_driver(request):
    """The stand-in driver has nothing to complain about; tests that misuse it on purpose ask it themselves."""
    yield
    if not ON_GPU and IMPOSSIBLE is None and "gpu" in request.keywords:
        assert cuda_on_cpu.problems() == []


@pytest.fixture
def small_digits(monkeypatch):
    """Whatever data set is asked for, it is 400 synthetic digits to train on and 100 to test on."""
    from tinycnn import data

    images, labels = data.synthetic_digits(500, rng=0)
    digits = data.Dataset("digits", images[:400], labels[:400], images[400:], labels[400:], tuple("0123456789"))
    monkeypatch.setattr(data, "load", lambda name, *_: digits)
    return digits


@pytest.fixture
def threads():
    """set_num_threads, undone afterwards; skips where there is only one."""
    if numba.config.NUMBA_NUM_THREADS < 2:
        pytest.skip("needs two CPU threads, this machine (or NUMBA_NUM_THREADS) has one")
    before = numba.get_num_threads()
    yield numba.set_num_threads
    numba.set_num_threads(before)


@pytest.fixture
def same_bits(threads):
    """Check that `case()` -> (kernel, arguments, outputs among them) leaves the same bits on 1 and 2 threads, and
    from run to run."""

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
