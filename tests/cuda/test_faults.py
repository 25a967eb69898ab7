"""The CUDA tests find faults: each test plants one and checks that it is detected."""

import subprocess
import sys

import cuda_on_cpu
import numpy as np
import pytest
from cuda_on_cpu import ON_GPU

from tests.cuda import test_kernels
from tests.test_commands import ENVIRONMENT, ROOT
from tinycnn import cuda
from tinycnn.cuda import _launch
from tinycnn.cuda._launch import THREADS, blocks, cuda as numba_cuda, kernel, phase, ravel

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(ON_GPU, reason="a fault makes the context of a GPU unusable")]


@phase
def store(tid, nt, shared, x):
    shared[tid] = x[tid]


@phase
def load_reversed(tid, nt, y, shared):
    y[tid] = shared[nt - 1 - tid]


@kernel(THREADS, registers=32)
def reverse(y, x):
    shared = numba_cuda.shared.array(THREADS, np.float32)
    store(numba_cuda.threadIdx.x, THREADS, shared, x)
    numba_cuda.syncthreads()
    load_reversed(numba_cuda.threadIdx.x, THREADS, y, shared)


@kernel(THREADS, registers=32)
def reverse_without_barrier(y, x):
    shared = numba_cuda.shared.array(THREADS, np.float32)
    store(numba_cuda.threadIdx.x, THREADS, shared, x)
    load_reversed(numba_cuda.threadIdx.x, THREADS, y, shared)


@kernel(THREADS, registers=32)
def read_neighbour(y, x):
    """Every thread reads an entry that another one writes."""
    tid = numba_cuda.threadIdx.x
    y[(tid + 1) % THREADS] = y[tid] + x[tid]


@phase
def tanh_backward_wrong_sign(tid, nt, first, dx, dy, y):
    i = first + tid
    if i < dx.size:
        dx[i] = dy[i] + dy[i] * y[i] * y[i]


@kernel(THREADS, registers=32)
def wrong_backward_kernel(dx, dy, y):
    tanh_backward_wrong_sign(numba_cuda.threadIdx.x, THREADS, numba_cuda.blockIdx.x * THREADS, dx, dy, y)


@pytest.fixture(scope="module", autouse=True)
def device():
    _launch.set_device(0)


X = np.arange(THREADS, dtype=np.float32)


def in_every_order(launch):
    results = []
    for order in test_kernels.ORDERS:
        cuda_on_cpu.set_order(order)
        y, x = cuda.to_device(np.zeros(THREADS, np.float32)), cuda.to_device(X)
        launch[1](y, x)
        results.append(cuda.to_host(y))
    cuda_on_cpu.set_order("forward")
    return results


def test_a_missing_barrier_shows_as_nan():
    for y in in_every_order(reverse):
        np.testing.assert_array_equal(y, X[::-1])
    for y in in_every_order(reverse_without_barrier):
        assert np.isnan(y).any()


def test_a_race_gives_different_results():
    results = in_every_order(read_neighbour)
    assert not np.array_equal(results[0], results[1])


def test_a_wrong_sign_differs_from_the_cpu(monkeypatch):
    test_kernels.compare("activation_backward", np.float32, test_kernels.cuda_calls.SMALL)

    def activation_backward(dx, dy, y, activation):
        wrong_backward_kernel[blocks(dx.size)](ravel(dx), ravel(dy), ravel(y))

    monkeypatch.setattr(cuda, "activation_backward", activation_backward)
    with pytest.raises(AssertionError, match="activation_backward"):
        test_kernels.compare("activation_backward", np.float32, test_kernels.cuda_calls.SMALL)


def test_a_slice_of_an_empty_array_is_refused():
    with pytest.raises(RuntimeError, match="non-empty slice into empty slice"):
        numba_cuda.to_device(np.zeros(0, np.float32))[:2]


def test_strides_that_numba_cuda_calls_non_contiguous_are_refused():
    array = numba_cuda.to_device(np.zeros((4, 6), np.float32)[:, None])
    with pytest.raises(NotImplementedError, match="operation requires copying"):
        array.reshape(24)


# A fault in a kernel makes the context unusable, so each of these runs in its own process.
FATAL = {
    "an input half as long": (
        "y, x = cuda.empty((2048,), np.float32), cuda.empty((1024,), np.float32)\n"
        "cuda.activation_forward(y, x, (0, 0.0, 0.0))\n",
        "global read outside of an allocation",
        "CUDA_ERROR_ILLEGAL_ADDRESS",
    ),
    "a freed argument of a captured kernel": (
        "from cuda.bindings import driver\n"
        "array = cuda.empty((1,), np.int64)\nstep = cuda.capture(lambda: cuda.increment(array))\n"
        "step()\nstep()\nstep()\n_launch.synchronize()\n"
        "driver.cuMemFree(array.device_ctypes_pointer.value)\nstep()\n",
        "freed",
        "CUDA_ERROR_ILLEGAL_ADDRESS",
    ),
    "threads at different barriers": (
        "from tinycnn.cuda._launch import cuda as nc, kernel\n"
        "@kernel(64, registers=32)\n"
        "def divergent(y):\n"
        "    if nc.threadIdx.x < 3:\n        nc.syncthreads()\n        y[0] = 1\n"
        "    else:\n        nc.syncthreads()\n        y[1] = 2\n"
        "divergent[1](cuda.empty((2,), np.float32))\n",
        "barrier",
        "CUDA_ERROR_LAUNCH_FAILED",
    ),
}


@pytest.mark.parametrize("name", FATAL)
def test_a_fault_makes_the_context_unusable_and_is_reported(name, tmp_path):
    code, text, error = FATAL[name]
    script = tmp_path / "fault.py"
    script.write_text(
        "import gc\nimport numpy as np\nfrom tinycnn import cuda\nfrom tinycnn.cuda import _launch\n"
        "_launch.set_device(0)\n"
        f"{code}"
        "for _ in range(2):\n"
        "    try:\n        _launch.synchronize()\n        print('no error')\n"
        "    except RuntimeError as error:\n        print(error)\n"
    )
    command = [sys.executable, str(ROOT / "tests" / "support" / "cuda_on_cpu"), str(script)]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300, check=False, env={**ENVIRONMENT, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    lines = done.stdout.splitlines()
    assert [error in line for line in lines] == [True, True], done.stdout + done.stderr  # the second call fails too
    assert text in done.stderr
    assert done.returncode == 99
