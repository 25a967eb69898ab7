"""Precompilation of kernels by several processes, and options of the compiler."""

import os
import subprocess
import sys

import numba
import numpy as np
import pytest
from numba.core import codegen

from tinycnn import SGD, CrossEntropyLoss, DeviceDataset, Dropout, Flatten, Linear, Sequential, kernels, scalars, train
from tinycnn.dataset import DataLoader
from tinycnn.kernels import _capture, _jit, _precompile

RELU = scalars.activation(scalars.RELU)
# Precompiles the first of six kernels with an empty cache; prints how many of them were loaded from it.
COMPILE = """
import sys
import threading
import numpy as np
from tinycnn import kernels, scalars
from tinycnn.kernels import _precompile, _jit
_precompile._processors, _precompile.FEW = lambda: 2, 0
programs = {"dies": "false", "writes and dies": "echo", "is silent": sys.argv[2], "does not exist": "no such program"}
sys.executable = programs.get(sys.argv[1], sys.executable)
RELU = scalars.activation(scalars.RELU)
x, y, z = (kernels.empty((20, 30), np.float32) for _ in range(3))
count = int(sys.argv[3])
calls = [
    (kernels.softmax_forward, y, x), (kernels.softmax_backward, z, y, y), (kernels.log_softmax_forward, z, x),
    (kernels.log_softmax_backward, z, y, y), (kernels.activation_backward, z, y, x, RELU),
][:count - 1]
def step():
    kernels.activation_forward(y[0], x[0], RELU)
    kernels.activation_forward(y, x, RELU)
    for kernel, *arguments in calls:
        kernel(*arguments)
taken = []
given = threading.Event()  # the worker has a task: however long it takes to start, it has a part
class Queue(_precompile.collections.deque):
    def popleft(self):
        if threading.current_thread() is not threading.main_thread():
            given.set()
        elif sys.argv[1] == "works":
            assert given.wait(200)
        taken.append(task := super().popleft())
        return task
_precompile.collections.deque = Queue
seen = []
kernels.precompile(step, lambda *state: seen.append(state))
names = {f"{f.py_func.__module__.split('.')[-1]}.{f.py_func.__qualname__}" for f, _ in taken}
assert seen[0] == (0, count, "", 0.0) and {name for *_, name, _ in seen[1:]} <= names, seen
lost = sys.argv[1] == "writes and dies"  # the task that it was given is compiled at the end
assert [done for done, *_ in seen] == list(range(count + 1 - lost)) and all(s[1] == count for s in seen), seen
kernels.precompile(step, seen.clear)  # nothing is left to compile
assert seen and not y.any() and not z.any()
used = [f for f in _jit.dispatchers.values() if f.overloads]
assert len(used) == count and sum(len(f.overloads) for f in used) == count + 1, used
assert len(taken) == len({f for f, _ in taken}) == count, taken  # each in one process: Numba's cache needs that
print(sum(sum(f.stats.cache_hits.values()) for f in used))
step()
assert abs(y.sum() - 20) < 1e-4
"""


@pytest.mark.parametrize("worker", ["works", "dies", "writes and dies", "is silent", "does not exist"])
def test_every_kernel_is_compiled_and_some_by_a_worker(worker, tmp_path):
    silent = tmp_path / "silent"
    silent.write_text("#!/bin/sh\nexec sleep 1000\n")
    silent.chmod(0o755)
    environment = os.environ | {"NUMBA_CACHE_DIR": str(tmp_path)}
    count = "6" if worker == "works" else "2"
    command = [sys.executable, "-c", COMPILE, worker, str(silent), count]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert (int(done.stdout) > 0) == (worker == "works"), done.stdout


def test_a_step_that_fails_in_a_dry_run_is_compiled_up_to_there():
    x = kernels.empty((20, 30), np.float64)

    def step():
        kernels.activation_forward(x, x, RELU)
        np.log(x)
        raise ZeroDivisionError

    kernels.precompile(step)
    assert not x.any()
    kernels.activation_forward(x, x, RELU)  # kernels still run


def test_no_worker_is_started_if_everything_is_compiled(monkeypatch):
    x = kernels.empty((20, 30), np.float32)

    def step():
        kernels.activation_forward(x, x, RELU)

    kernels.precompile(step)
    monkeypatch.setattr(_precompile.subprocess, "Popen", None)
    kernels.precompile(step)


def test_no_worker_is_started_if_it_cannot_save_its_kernels(monkeypatch):
    x = kernels.empty((20, 30), np.float32)
    kernels.activation_forward(x, x, RELU)
    (dispatcher,) = [f for (_, name), f in _jit.dispatchers.items() if name == "forward_serial"]
    assert _precompile.can_save(dispatcher)
    with monkeypatch.context() as patch:
        patch.setattr(_precompile.os, "access", lambda path, mode: False)  # as for a folder that is read-only
        assert not _precompile.can_save(dispatcher)
    monkeypatch.setattr(dispatcher._cache, "_enabled", False)  # as after a failure to save
    assert not _precompile.can_save(dispatcher)


def test_fit_asks_for_its_smaller_last_batch_for_training_and_for_the_validation(monkeypatch):
    model = Sequential(Flatten(), Dropout(0.5), Linear(12, 3), input_shape=(1, 3, 4), rng=0).eval()
    data = DeviceDataset(np.zeros((20, 3, 4), np.uint8), np.arange(20) % 3, mean=0, std=1)
    before, calls = model.snapshot(), []
    monkeypatch.setattr(kernels, "precompile", lambda step, _: _capture.trace_calls(step, calls, dry_run=True))
    model.set_input_shape(data.image_shape)
    runner = train.StepRunner(model, CrossEntropyLoss(), DataLoader(data), SGD(model, 0.1))
    validator = train.StepRunner(
        model,
        CrossEntropyLoss(),
        DataLoader(DeviceDataset(np.zeros((7, 3, 4), np.uint8), np.arange(7) % 3, mean=0, std=1)),
    )
    train._compile(runner, {16, 4}, None, validator)
    assert {len(args[0]) for function, args in calls if function.__name__.startswith("gather")} == {16, 4, 7}
    assert any(function.__name__ == "increment" for function, _ in calls)  # dropout's masks, in training only
    assert not model.training
    np.testing.assert_equal(model.snapshot(), before)


@_jit.device_function
def doubled(x):
    return np.full(1, 2 * x)[0]


def test_only_kernels_become_machine_code(monkeypatch):
    """Neither device functions nor NumPy's, nor the bodies of parallel loops: all of them are parts of the kernel."""

    def kernel(x):
        for i in numba.prange(len(x)):
            x[i] = doubled(x[i])

    added, add_module = [], codegen.JitEngine.add_module
    monkeypatch.setattr(
        codegen.JitEngine, "add_module", lambda engine, module: added.append(add_module(engine, module))
    )
    x = np.ones(50)
    numba.njit(pipeline_class=_jit.KernelCompiler, **_jit.KERNEL_OPTIONS)(kernel)(x)
    assert np.all(x == 2)
    assert len(added) == 1
    assert numba.njit(lambda x: doubled(x) + 1)(3.0) == 7  # a user's function: compiled as ever
    assert len(added) > 1


def test_options_are_the_same_in_every_compilation():
    """Numba removes the entries from a plain dictionary of parallel options."""

    def two_loops(x, y):
        for i in numba.prange(len(x)):
            x[i] += 1.0
        for i in numba.prange(len(x)):
            y[i] += 1.0

    compiled = numba.njit(**_jit.KERNEL_OPTIONS | {"cache": False})(two_loops)
    for dtype in (np.float32, np.float64):
        compiled(np.zeros(3, dtype), np.zeros(3, dtype))
    loops = [compiled.get_metadata(types)["parfor_diagnostics"].count_parfors() for types in compiled.signatures]
    assert loops == [2, 2]  # not fused into one


def test_parts_of_kernels_refuse_calls_from_python():
    """Before and after a kernel that uses the part is compiled.  Without a refusal the process would crash."""
    from tinycnn.kernels import linear

    x, w, b = (np.zeros(shape, np.float32) for shape in ((64, 80), (40, 80), 40))
    for _ in range(2):
        with pytest.raises(TypeError, match="pack_bias is a part of kernels"):
            linear.pack_bias(b, 40)
        linear.linear_forward(np.empty((64, 40), np.float32), x, w, b)
    assert linear.pack_bias.overloads
