"""How kernels are compiled, and that several processes do it ahead."""

import os
import subprocess
import sys

import numba
import numpy as np
import pytest

from tinycnn import SGD, CrossEntropyLoss, DeviceDataset, Dropout, Flatten, Linear, Sequential, kernels, train
from tinycnn.dataset import DataLoader
from tinycnn.kernels import _capture, _jit, _precompile

# Four kernels and more, for one type each, with an empty cache; prints how many of them came from another process.
COMPILE = """
import sys
import numpy as np
from tinycnn import kernels
from tinycnn.kernels import _precompile, _jit
_precompile._processors = lambda: 2
programs = {"dies": "false", "talks and dies": "echo", "says nothing": sys.argv[2], "is not there": "no such program"}
sys.executable = programs.get(sys.argv[1], sys.executable)
x, y, z = (kernels.empty((20, 30), np.float32) for _ in range(3))
def step():
    kernels.leaky_relu_forward(y[0], x[0], 0.1)
    kernels.leaky_relu_forward(y, x, 0.1)
    kernels.leaky_relu_backward(z, y, x, 0.1)
    kernels.gaussian_forward(y, x)
    kernels.gaussian_backward(z, y, y)
    kernels.softmax_forward(y, x)
    kernels.softmax_backward(z, y, y)
fed = []
class Waiting(_precompile.collections.deque):
    def popleft(self):
        fed.append(one := super().popleft())
        return one
_precompile.collections.deque = Waiting
kernels.precompile(step)
assert not y.any() and not z.any()
found = [f for f in _jit.dispatchers.values() if f.overloads]
assert len(found) == 6 and sum(len(f.overloads) for f in found) == 7, found
assert len(fed) == len({f for f, _ in fed}) == 6, fed  # Numba's cache would mix up one that two processes compile
print(sum(sum(f.stats.cache_hits.values()) for f in found))
step()
assert abs(y.sum() - 20) < 1e-4
"""


@pytest.mark.parametrize("the_other", ["works", "dies", "talks and dies", "says nothing", "is not there"])
def test_every_kernel_is_compiled_and_some_by_another_process(the_other, tmp_path):
    silent = tmp_path / "silent"
    silent.write_text("#!/bin/sh\nexec sleep 1000\n")
    silent.chmod(0o755)
    environment = os.environ | {"NUMBA_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-c", COMPILE, the_other, str(silent)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert (int(done.stdout) > 0) == (the_other == "works"), done.stdout


def test_a_step_that_fails_without_its_kernels_is_compiled_as_far_as_it_gets():
    x = kernels.empty((20, 30), np.float64)

    def step():
        kernels.relu_forward(x, x)
        np.log(x)
        raise ZeroDivisionError

    kernels.precompile(step)
    assert not x.any()
    kernels.relu_forward(x, x)  # and kernels do what they did


def test_nothing_is_started_where_everything_is_compiled(monkeypatch):
    x = kernels.empty((20, 30), np.float32)

    def step():
        kernels.relu_forward(x, x)

    kernels.precompile(step)
    monkeypatch.setattr(_precompile.subprocess, "Popen", None)
    kernels.precompile(step)


def test_fit_asks_for_its_smaller_last_batch_and_for_training(monkeypatch):
    model = Sequential(Flatten(), Dropout(0.5), Linear(12, 3), input_shape=(1, 3, 4), rng=0).eval()
    data = DeviceDataset(np.zeros((20, 3, 4), np.uint8), np.arange(20) % 3, mean=0, std=1)
    before, asked = model.snapshot(), []
    monkeypatch.setattr(kernels, "precompile", lambda step: _capture.trace_calls(step, asked, dry_run=True))
    model.set_input_shape(data.image_shape)
    train._compile(train.StepRunner(model, CrossEntropyLoss(), DataLoader(data), SGD(model, 0.1)), {16, 4})
    assert {len(args[0]) for function, args in asked if function.__name__.startswith("gather")} == {16, 4}
    assert any(function.__name__ == "increment" for function, _ in asked)  # dropout's masks, in training only
    assert not model.training
    np.testing.assert_equal(model.snapshot(), before)


def test_what_is_compiled_second_is_compiled_like_the_first():
    """Numba takes the entries out of a dictionary of parallel options that it is given."""

    def two_loops(x, y):
        for i in numba.prange(len(x)):
            x[i] += 1.0
        for i in numba.prange(len(x)):
            y[i] += 1.0

    compiled = numba.njit(**_jit.KERNEL_OPTIONS | {"cache": False})(two_loops)
    for dtype in (np.float32, np.float64):
        compiled(np.zeros(3, dtype), np.zeros(3, dtype))
    loops = [compiled.get_metadata(types)["parfor_diagnostics"].count_parfors() for types in compiled.signatures]
    assert loops == [2, 2]  # they would become one
