"""What the tests of the CUDA path are there to find: each test plants one fault and sees that it is found."""

import subprocess
import sys

import cuda_on_cpu
import numpy as np
import pytest
from cuda_on_cpu import ON_GPU

from tests.cuda import test_kernels
from tests.test_experiment import ENVIRONMENT, ROOT
from tinycnn import cuda
from tinycnn.cuda import _launch
from tinycnn.cuda._launch import THREADS, blocks, kernel, phase, ravel
from tinycnn.cuda._launch import cuda as numba_cuda

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(ON_GPU, reason="a GPU that has met a fault is of no use any more")]


@phase
def put(tid, nt, room, x):
    room[tid] = x[tid]


@phase
def take_reversed(tid, nt, y, room):
    y[tid] = room[nt - 1 - tid]


@kernel(THREADS, registers=32)
def reverse(y, x):
    room = numba_cuda.shared.array(THREADS, np.float32)
    put(numba_cuda.threadIdx.x, THREADS, room, x)
    numba_cuda.syncthreads()
    take_reversed(numba_cuda.threadIdx.x, THREADS, y, room)


@kernel(THREADS, registers=32)
def reverse_without_barrier(y, x):
    room = numba_cuda.shared.array(THREADS, np.float32)
    put(numba_cuda.threadIdx.x, THREADS, room, x)
    take_reversed(numba_cuda.threadIdx.x, THREADS, y, room)


@kernel(THREADS, registers=32)
def move_up(y, x):
    """Every thread reads what another one writes."""
    tid = numba_cuda.threadIdx.x
    y[(tid + 1) % THREADS] = y[tid] + x[tid]


@phase
def wrong_sign(tid, nt, first, dx, dy, y):
    i = first + tid
    if i < dx.size:
        dx[i] = dy[i] + dy[i] * y[i] * y[i]


@kernel(THREADS, registers=32)
def wrong_backward_kernel(dx, dy, y):
    wrong_sign(numba_cuda.threadIdx.x, THREADS, numba_cuda.blockIdx.x * THREADS, dx, dy, y)


@pytest.fixture(scope="module", autouse=True)
def device():
    _launch.set_device(0)


X = np.arange(THREADS, dtype=np.float32)


def in_every_order(launch):
    found = []
    for order in test_kernels.ORDERS:
        cuda_on_cpu.set_order(order)
        y, x = cuda.to_device(np.zeros(THREADS, np.float32)), cuda.to_device(X)
        launch[1](y, x)
        found.append(cuda.to_host(y))
    cuda_on_cpu.set_order("forward")
    return found


def test_a_missing_barrier_shows_as_nan():
    for y in in_every_order(reverse):
        np.testing.assert_array_equal(y, X[::-1])
    for y in in_every_order(reverse_without_barrier):
        assert np.isnan(y).any()


def test_a_race_gives_different_results():
    found = in_every_order(move_up)
    assert not np.array_equal(found[0], found[1])


def test_a_wrong_sign_is_no_twin(monkeypatch):
    test_kernels.compare("activation_backward", np.float32, test_kernels.cuda_calls.SMALL)

    def activation_backward(dx, dy, y, activation):
        wrong_backward_kernel[blocks(dx.size)](ravel(dx), ravel(dy), ravel(y))

    monkeypatch.setattr(cuda, "activation_backward", activation_backward)
    with pytest.raises(AssertionError, match="activation_backward"):
        test_kernels.compare("activation_backward", np.float32, test_kernels.cuda_calls.SMALL)


def test_a_slice_of_an_empty_array_is_refused():
    with pytest.raises(RuntimeError, match="non-empty slice into empty slice"):
        numba_cuda.to_device(np.zeros(0, np.float32))[:2]


def test_strides_that_numba_cuda_does_not_call_contiguous_are_refused():
    there = numba_cuda.to_device(np.zeros((4, 6), np.float32)[:, None])
    with pytest.raises(NotImplementedError, match="operation requires copying"):
        there.reshape(24)


# A fault in a kernel ends a context, so each of these has a process of its own.
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
def test_a_fault_ends_the_context_and_is_named(name, tmp_path):
    code, text, error = FATAL[name]
    script = tmp_path / "fault.py"
    script.write_text(
        "import gc\nimport numpy as np\nfrom tinycnn import cuda\nfrom tinycnn.cuda import _launch\n"
        "_launch.set_device(0)\n"
        f"{code}"
        "for _ in range(2):\n"
        "    try:\n        _launch.synchronize()\n        print('no error')\n"
        "    except RuntimeError as found:\n        print(found)\n"
    )
    command = [sys.executable, str(ROOT / "tests" / "support" / "cuda_on_cpu"), str(script)]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300, check=False, env={**ENVIRONMENT, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    lines = done.stdout.splitlines()
    assert [error in line for line in lines] == [True, True], done.stdout + done.stderr  # the second call fails too
    assert text in done.stderr
    assert done.returncode == 99
