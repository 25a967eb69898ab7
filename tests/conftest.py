"""What all tests share: how hard Hypothesis tries, and the check that a kernel gives the same bits every time."""

import os

# What plays the GPU has to be chosen before anything is imported; pytest -m gpu asks for a real one.
if os.environ.get("NUMBA_ENABLE_CUDASIM", "0") == "0" and not os.environ.get("TINYCNN_CUDA"):
    os.environ["TINYCNN_CUDA"] = "emulate"

import numba
import numpy as np
import pytest
from hypothesis import HealthCheck, settings

# The first example of a kernel compiles it, so neither deadlines nor "too slow" mean anything here.
settings.register_profile(
    "dev", deadline=None, max_examples=25, suppress_health_check=[HealthCheck.too_slow], print_blob=True
)
settings.register_profile("ci", settings.get_profile("dev"), derandomize=True, database=None)
settings.register_profile("thorough", settings.get_profile("dev"), max_examples=500)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci" if os.environ.get("CI") else "dev"))


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
