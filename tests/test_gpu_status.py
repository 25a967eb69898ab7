"""The messages of --device cuda when something is missing, with a fake driver."""

import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from cuda_on_cpu import ON_GPU

from tests.test_commands import ENVIRONMENT, EXAMPLE, ROOT
from tinycnn import DeviceDataset, Sequential, _gpu, devices, layers
from tinycnn.errors import DeviceError


class Driver:
    """A fake driver with the version, GPUs and error that a test chooses."""

    def __init__(self, version=13000, gpus=(("H200", (9, 0), 139 << 30),), error=0):
        self.version, self.gpus, self.error = version, gpus, error

    def cuDriverGetVersion(self, number):
        number._obj.value = self.version
        return 0

    def cuInit(self, flags):
        return self.error

    def cuDeviceGetCount(self, count):
        count._obj.value = len(self.gpus)
        return 0

    def cuDeviceGet(self, handle, ordinal):
        handle._obj.value = ordinal
        return 0

    def cuDeviceGetName(self, text, size, handle):
        text.value = self.gpus[handle.value][0].encode()
        return 0

    def cuDeviceTotalMem_v2(self, size, handle):
        size._obj.value = self.gpus[handle.value][2]
        return 0

    def cuPointerGetAttribute(self, value, attribute, address):
        assert (attribute, address.value) == (9, 4096)
        value._obj.value = 1
        return 0

    def cuDeviceGetAttribute(self, value, attribute, handle):
        value._obj.value = self.gpus[handle.value][1][{75: 0, 76: 1}[attribute]]
        return 0


@pytest.fixture
def complete(monkeypatch):
    """A machine on which only the driver may be missing."""
    monkeypatch.setattr(_gpu, "find_toolkit", lambda: dict.fromkeys(_gpu.TOOLKIT_LIBRARIES, "/somewhere"))


@pytest.mark.usefixtures("complete")
@pytest.mark.parametrize(
    ("driver", "number", "message"),
    [
        (Driver(version=11080), 0, "driver is too old: it supports CUDA 11.8, at least 12.0 is needed"),
        (Driver(), 2, r"there is no cuda:2; this machine has cuda:0 \(H200\)"),
        (Driver(gpus=()), 0, "sees no GPU"),
        (Driver(error=100), 0, "sees no GPU$"),
        (Driver(error=999), 0, r"sees no GPU \(error 999\)"),
        (Driver(gpus=(("V100", (7, 0), 16 << 30),)), 0, "V100 has compute capability 7.0, at least 7.5 is needed"),
    ],
)
def test_a_gpu_that_cannot_be_used_is_refused(driver, number, message):
    with pytest.raises(DeviceError) as caught:
        _gpu.require(number, _gpu.probe(driver))
    assert any(re.search(message, line) for line in str(caught.value).splitlines())


@pytest.mark.usefixtures("complete")
def test_the_extra_is_that_of_the_driver():
    for version, extra in ((12080, "cu12"), (13000, "cu13")):
        with pytest.raises(DeviceError, match=rf"pip install 'numba-cuda\[{extra}\]'"):
            _gpu.require(0, _gpu.probe(Driver(version, gpus=())))


@pytest.mark.usefixtures("complete")
def test_an_old_gpu_does_not_rule_out_the_next_one():
    status = _gpu.probe(Driver(gpus=(("V100", (7, 0), 16 << 30), ("H200", (9, 0), 139 << 30))))
    with pytest.raises(DeviceError, match="V100 has compute capability"):
        _gpu.require(0, status)
    _gpu.require(1, status)


def test_a_missing_toolkit_is_named(monkeypatch):
    monkeypatch.setattr(_gpu, "find_toolkit", lambda: {"nvvm": "/somewhere", "nvrtc": None, "nvJitLink": None})
    with pytest.raises(DeviceError, match="toolkit were not found: nvrtc, nvJitLink"):
        _gpu.require(0, _gpu.probe(Driver()))


@pytest.mark.usefixtures("complete")
def test_a_complete_machine_is_ready():
    status = _gpu.probe(Driver())
    _gpu.require(0, status)
    text = "\n".join(f"{name} {value}" for name, value in _gpu.status_rows(status))
    assert "cuda:0 H200, compute capability 9.0, 139 GiB" in text
    assert "cuda ready" in text


@pytest.mark.skipif(ON_GPU, reason="this machine has a GPU")
def test_without_a_gpu_the_example_stops_with_the_reason(tmp_path):
    command = [sys.executable, str(EXAMPLE), "--device", "cuda", "--out", str(tmp_path / "runs")]
    start = time.perf_counter()
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=60, check=False, env={**ENVIRONMENT, "PYTHONPATH": str(ROOT)}
    )
    assert time.perf_counter() - start < 60
    assert done.returncode == 1
    assert done.stderr.startswith("error: device cuda cannot be used: no NVIDIA driver was found (looked for libcuda")
    assert "pip install 'numba-cuda[cu13]'" in done.stderr
    assert done.stdout == ""
    assert not (tmp_path / "runs").exists()


def test_without_a_gpu_auto_is_the_cpu(monkeypatch):
    monkeypatch.setattr(_gpu, "_cached_probe", lambda: _gpu.Status(problem="no GPU"))
    assert devices.resolve("auto") == "cpu"
    with pytest.raises(DeviceError, match="no GPU"):
        devices.resolve("cuda")


# --- arrays of other libraries ----------------------------------------------------------------------------------------


class ForeignArray:
    """A stand-in for another library's array on a GPU."""

    def __init__(self, array, number):
        self.array, self.number = array, number
        self.shape = array.shape

    def __dlpack_device__(self):
        return 2, self.number

    def __array__(self, dtype=None, copy=None):
        return self.array


@pytest.mark.parametrize(("device", "name"), [("cpu", "cpu"), pytest.param("cuda", "cuda:0", marks=pytest.mark.gpu)])
def test_an_array_on_another_device_is_refused_with_both_names(device, name):
    array = ForeignArray(np.ones((1, 3), np.float32), 1)
    with pytest.raises(ValueError, match=f"x is on cuda:1, expected {name} or host memory"):
        Sequential(layers.Linear(3, 2), rng=0, device=device).forward(array)
    with pytest.raises(ValueError, match=f"images is on cuda:1, expected {name} or host memory"):
        DeviceDataset(ForeignArray(np.ones((1, 2, 2), np.uint8), 1), np.zeros(1, int), device=device)


def test_the_device_of_an_array():
    class Interface:
        __cuda_array_interface__ = None

    assert _gpu.device_of(np.ones(3)) is None
    assert _gpu.device_of([1, 2]) is None
    assert _gpu.device_of(Interface()) == 0
    Interface.__cuda_array_interface__ = {"data": (4096, False)}
    assert _gpu.device_of(Interface(), Driver()) == 1
    assert _gpu.device_of(ForeignArray(np.ones(1), 3)) == 3


def test_only_one_module_calls_numba_cuda():
    users = [
        path.name
        for path in (Path(_gpu.__file__).parent).rglob("*.py")
        if "from numba import cuda" in path.read_text() or "numba.cuda" in path.read_text()
    ]
    assert users == ["_launch.py"]
