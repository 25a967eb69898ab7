"""Kernels that are compiled ahead, by several processes."""

import os
import subprocess
import sys

import numpy as np
import pytest

from tinycnn import kernels
from tinycnn.kernels import _ahead

# Four kernels and more, for one type each, with an empty cache; prints how many of them came from another process.
COMPILE = """
import sys
import numpy as np
from tinycnn import kernels
from tinycnn.kernels import _ahead, _jit
_ahead._processors = lambda: 2
if sys.argv[1] == "dies":
    sys.executable = "false"
if sys.argv[1] == "is not there":
    sys.executable = "no such program"
x, y, z = (kernels.empty((20, 30), np.float32) for _ in range(3))
def step():
    kernels.leaky_relu_forward(y, x, 0.1)
    kernels.leaky_relu_backward(z, y, x, 0.1)
    kernels.gaussian_forward(y, x)
    kernels.gaussian_backward(z, y, y)
    kernels.softmax_forward(y, x)
    kernels.softmax_backward(z, y, y)
kernels.compile_for(step)
assert not y.any() and not z.any()
found = [f for f in _jit.compiled.values() if f.overloads]
assert len(found) == 6, found
print(sum(sum(f.stats.cache_hits.values()) for f in found))
step()
assert abs(y.sum() - 20) < 1e-4
"""


@pytest.mark.parametrize("the_other", ["works", "dies", "is not there"])
def test_every_kernel_is_compiled_and_some_by_another_process(the_other, tmp_path):
    environment = os.environ | {"NUMBA_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-c", COMPILE, the_other]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert (int(done.stdout) > 0) == (the_other == "works"), done.stdout


def test_a_step_that_fails_without_its_kernels_is_compiled_as_far_as_it_gets():
    x = kernels.empty((20, 30), np.float64)

    def step():
        kernels.relu_forward(x, x)
        np.log(x)
        raise ZeroDivisionError

    kernels.compile_for(step)
    assert not x.any()
    kernels.relu_forward(x, x)  # and kernels do what they did


def test_nothing_is_started_where_everything_is_compiled(monkeypatch):
    x = kernels.empty((20, 30), np.float32)

    def step():
        kernels.relu_forward(x, x)

    kernels.compile_for(step)
    monkeypatch.setattr(_ahead.subprocess, "Popen", None)
    kernels.compile_for(step)
