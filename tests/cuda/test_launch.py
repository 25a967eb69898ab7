"""tinycnn/cuda/_launch.py with the real numba-cuda and cuda.core: arrays, capture, other libraries, errors."""

import gc
import subprocess
import sys
import threading

import cuda_on_cpu
import numpy as np
import pytest
from cuda_on_cpu import ON_GPU

from tests.test_commands import ENVIRONMENT, ROOT
from tinycnn import (
    AdamW,
    CrossEntropyLoss,
    DeviceDataset,
    Flatten,
    Linear,
    ReLU,
    Sequential,
    cuda,
    devices,
    errors,
    evaluate,
    fit,
    optim,
    scalars,
    train,
)
from tinycnn.commands import _common
from tinycnn.cuda import _launch
from tinycnn.cuda.optim import increment_kernel

pytestmark = pytest.mark.gpu
ON_CPU = pytest.mark.skipif(ON_GPU, reason="errors of a real driver cannot be injected")


@pytest.fixture(scope="module", autouse=True)
def device():
    _launch.set_device(0)


def counter():
    return cuda.empty((1,), np.int64)


def value(step):
    return int(cuda.to_host(step)[0])


# --- arrays -----------------------------------------------------------------------------------------------------------

RELU = scalars.activation(scalars.RELU)
RELU_ARGUMENTS = scalars.RELU, np.float32(0), np.float32(0)
GRID = np.arange(24, dtype=np.float32).reshape(4, 6)
ODD = {
    "an axis of length 1 with stride 0": GRID[:, None],
    "one element with stride 0": np.broadcast_to(np.float32(3), (1,)),
    "one row of a column": GRID[:1, ::2].T[:, :1],
    "columns": GRID.T,
    "every second": GRID[::2, ::3],
    "backwards": GRID[::-1],
    "repeated": np.broadcast_to(np.float32(2), (3, 2)),
    "read-only": np.frombuffer(GRID.tobytes(), np.float32),
    "no element": np.zeros((0, 3, 2), np.float32),
    "no element, strided": GRID[:, :0],
    "no axis": np.array(3, np.float32),
}


@pytest.mark.parametrize("name", ODD)
def test_host_arrays_of_any_strides_arrive(name):
    array = ODD[name]
    device_array = cuda.to_device(array)
    shape = array.shape or (1,)
    np.testing.assert_array_equal(cuda.to_host(device_array), array.reshape(shape))
    assert device_array.is_c_contiguous()
    assert _launch.ravel(device_array).shape == (array.size,)
    other = cuda.empty(shape, np.float32)
    cuda.copy_to(other, array.reshape(shape) if array.ndim else array)
    np.testing.assert_array_equal(cuda.to_host(other), array.reshape(shape))
    if array.size:
        y = cuda.empty(shape, np.float32)
        cuda.activation_forward(y, device_array, RELU)
        np.testing.assert_array_equal(cuda.to_host(y), np.maximum(array.reshape(shape), 0))


def test_slices_of_empty_arrays():
    empty = cuda.empty((0, 3, 2), np.float32)
    assert empty[:5].shape == empty[:0].shape == (0, 3, 2)
    assert cuda.to_host(empty[:5].reshape((4, 0))).shape == (4, 0)
    array = cuda.to_device(GRID)
    assert cuda.to_host(array[:0]).shape == (0, 6)
    assert cuda.to_host(array[4:]).shape == (0, 6)
    cuda.copy_to(empty, np.zeros((0, 3, 2)))


def test_views_are_made_once():
    array = cuda.to_device(GRID)
    assert _launch.ravel(array) is _launch.ravel(array)
    assert _launch.ravel(array).ndim == 1


def test_garbage_may_be_collected_by_any_thread():
    """A thread without a context cannot free device memory."""

    class Cycle:
        def __init__(self):
            self.me, self.arrays = self, [cuda.empty((3,), np.float32) for _ in range(2 * _launch.MAX_PENDING_FREES)]

    def addresses(cycle):
        return {array.device_ctypes_pointer.value for array in cycle.arrays}

    gc.collect()
    cycle = Cycle()
    freed = addresses(cycle)
    del cycle
    thread = threading.Thread(target=gc.collect)
    thread.start()
    thread.join()
    cuda.empty((1,), np.float32)
    if not ON_GPU:
        assert not freed & {address for address, _ in cuda_on_cpu.allocations()}


def test_an_array_too_large_for_the_kernels_indices():
    with pytest.raises(ValueError, match=r"fewer than 2\*\*32 entries"):
        _launch._upload(np.broadcast_to(np.zeros(1, np.uint8), (2**32,)))


def test_images_with_and_without_a_channel_axis():
    images, labels = np.random.default_rng(0).integers(0, 256, (5, 4, 4), np.uint8), np.arange(5)
    model = Sequential(Flatten(), Linear(16, 5), rng=0, device="cuda")
    logits = [
        evaluate(model, DeviceDataset(x, labels, device="cuda"))[2] for x in (images, images[:, None], images[:, ::-1])
    ]
    np.testing.assert_array_equal(logits[0], logits[1])
    assert (logits[0] != logits[2]).any()


# --- launches over nothing --------------------------------------------------------------------------------------------


def test_a_launch_without_elements_does_nothing():
    empty = cuda.empty((0,), np.float32)
    cuda.activation_forward(empty, empty, RELU)
    cuda.linear_forward(cuda.empty((0, 3), np.float32), cuda.empty((0, 4), np.float32),
                        cuda.empty((3, 4), np.float32), cuda.empty((3,), np.float32))  # fmt: skip
    step = counter()
    increment_kernel[(1, 0)](step)
    assert value(step) == 0
    table = cuda.parameter_blocks([], np.float32)
    cuda.sgd(empty, empty, empty, cuda.to_device(np.ones(1, np.float32)), step, *table, 0.9, 0.0, False)
    assert value(step) == 1


@pytest.mark.parametrize("make", [lambda m: optim.SGD(m, 0.1, momentum=0.9), optim.Adam, lambda m: optim.EMA(AdamW(m))])
def test_a_model_without_parameters_trains(make):
    images, labels = np.random.default_rng(0).integers(0, 256, (6, 2, 2), np.uint8), np.arange(6) % 4
    model = Sequential(Flatten(), ReLU(), device="cuda")
    optimizer = make(model)
    batches = DeviceDataset(images, labels, device="cuda")
    history = fit(model, CrossEntropyLoss(), optimizer, batches, epochs=3, batch_size=2, rng=0, progress=False)
    assert optimizer.steps == 9
    assert np.isfinite(history[-1]["train_loss"])


# --- captured steps ---------------------------------------------------------------------------------------------------


def test_a_step_runs_is_captured_and_is_replayed():
    step, calls = counter(), []

    def run():
        calls.append(1)
        cuda.increment(step)

    captured = cuda.capture(run)
    for expected in (1, 2, 3, 4):
        captured()
        assert value(step) == expected
    assert len(calls) == 2
    assert [args[0] for args in captured.arguments] == [step]  # keeps the arrays of the graph alive


@ON_CPU
@pytest.mark.parametrize("call", ["cuGraphInstantiateWithParams", "cuStreamBeginCapture_v2"])
def test_a_failed_capture_warns_and_the_step_runs(call):
    step = counter()
    captured = cuda.capture(lambda: cuda.increment(step))
    captured()
    cuda_on_cpu.inject_error(call, 1)
    with pytest.warns(UserWarning, match="could not be captured and runs kernel by kernel: .*INVALID_VALUE"):
        captured()
    captured()
    assert value(step) == 3
    cuda_on_cpu.problems()
    again = cuda.capture(lambda: cuda.increment(step))
    for _ in range(3):
        again()
    assert again.graph
    assert value(step) == 6


@ON_CPU
def test_an_allocation_during_capture_warns_and_the_step_runs():
    step = counter()

    def allocate():
        cuda.empty((3,), np.float32)
        cuda.increment(step)

    captured = cuda.capture(allocate)
    captured()
    with pytest.warns(UserWarning, match="could not be captured"):
        captured()
    captured()
    assert value(step) == 3


def test_an_interrupted_capture_leaves_nothing_behind():
    step, interrupt = counter(), []

    def interrupted():
        cuda.increment(step)
        if interrupt:
            raise KeyboardInterrupt

    captured = cuda.capture(interrupted)
    captured()
    interrupt.append(1)
    with pytest.raises(KeyboardInterrupt):
        captured()
    cuda.increment(step)  # launched, not captured
    assert value(step) == 2


# --- arrays of other libraries ----------------------------------------------------------------------------------------


class ForeignArray:
    """An array of another library, which uses its own stream, not synchronised with the default one."""

    def __init__(self, array, stream, protocol):
        self.array, self.stream, self.protocol = array, stream, protocol
        if protocol == "interface":
            interface = {"strides": array.strides, "stream": int(stream.handle)}
            self.__cuda_array_interface__ = array.__cuda_array_interface__ | interface

    def __dlpack_device__(self):
        return 2, 0

    def __dlpack__(self, *, stream=None, **options):
        from cuda.core.utils import StridedMemoryView

        if stream != -1:
            self.stream.sync()  # our work is done before what the consumer launches
        return StridedMemoryView.from_cuda_array_interface(self.array, stream_ptr=-1).__dlpack__(**options)


@pytest.fixture
def stream():
    from cuda.core import Device, StreamOptions

    device = Device(0)
    device.set_current()
    return device.create_stream(options=StreamOptions(nonblocking=True))


def launch_on(stream, kernel, blocks, *args):
    kernel.compiled[blocks, kernel.threads, _launch.cuda.external_stream(int(stream.handle))](*args)


@pytest.mark.parametrize("protocol", ["interface", "dlpack"])
def test_to_device_waits_for_pending_work(stream, protocol):
    from tinycnn.cuda.activations import activation_forward_kernel

    x, y = cuda.to_device(GRID.ravel()), cuda.empty((24,), np.float32)
    cuda.activation_forward(y, x, RELU)  # compiles
    cuda.copy_to(y, np.zeros(24, np.float32))
    launch_on(stream, activation_forward_kernel, 1, y, x, *RELU_ARGUMENTS)
    taken = cuda.to_device(ForeignArray(y, stream, protocol))
    np.testing.assert_array_equal(cuda.to_host(taken), GRID.ravel())


@pytest.mark.parametrize("protocol", ["interface", "dlpack", "numba"])
def test_an_exported_array_waits_for_pending_work(stream, protocol):
    from cuda.core.utils import StridedMemoryView

    from tinycnn.cuda.activations import activation_forward_kernel

    x, y, out = cuda.to_device(GRID.ravel()), cuda.empty((24,), np.float32), cuda.empty((24,), np.float32)
    cuda.activation_forward(y, x, RELU)
    cuda.copy_to(y, np.zeros(24, np.float32))
    cuda.activation_forward(y, x, RELU)  # still pending when the other library takes it
    shared = devices.as_dlpack(y)
    if protocol == "numba":
        taken = _launch.cuda.as_cuda_array(shared)
    else:
        make = StridedMemoryView.from_dlpack if protocol == "dlpack" else StridedMemoryView.from_cuda_array_interface
        view = make(shared, stream_ptr=int(stream.handle))
        assert (view.ptr, view.shape) == (y.device_ctypes_pointer.value, (24,))
        taken = y
    launch_on(stream, activation_forward_kernel, 1, out, taken, *RELU_ARGUMENTS)
    stream.sync()
    np.testing.assert_array_equal(cuda.to_host(out), GRID.ravel())


def test_an_exported_array_is_an_array():
    shared = devices.as_dlpack(cuda.to_device(GRID))
    np.testing.assert_array_equal(np.asarray(shared), GRID)
    assert shared.__dlpack_device__() == (2, 0)
    assert (shared.shape, shared.dtype) == ((4, 6), np.float32)


def test_an_array_that_is_not_c_contiguous_is_copied(stream):
    array = cuda.to_device(GRID).T
    taken = cuda.to_device(ForeignArray(array, stream, "interface"))
    assert taken.is_c_contiguous()
    np.testing.assert_array_equal(cuda.to_host(taken), GRID.T)


def test_a_model_takes_an_array_of_its_gpu_and_gives_one_back(stream):
    x = np.random.default_rng(0).random((4, 3), dtype=np.float32)
    model = Sequential(Linear(3, 2), rng=0, device="cuda")
    want = model.forward(x)
    for protocol in ("interface", "dlpack"):
        array = cuda.to_device(x)
        y = model.forward(ForeignArray(array, stream, protocol))
        assert y.__dlpack_device__() == (2, 0)
        np.testing.assert_array_equal(np.asarray(y), want)
    with pytest.raises(ValueError, match="x must be finite"):
        model.forward(ForeignArray(cuda.to_device(x * np.nan), stream, "interface"))


@pytest.mark.parametrize("protocol", ["interface", "dlpack"])
def test_data_and_weights_may_be_on_the_gpu(stream, protocol):
    rng = np.random.default_rng(0)
    images, labels, weights = rng.integers(0, 256, (6, 2, 2), np.uint8), np.arange(6) % 2, rng.random(6)

    def foreign(array):
        return ForeignArray(cuda.to_device(np.asarray(array)), stream, protocol)

    want = DeviceDataset(images, labels, sample_weight=weights, device="cuda")
    found = DeviceDataset(foreign(images), foreign(labels), sample_weight=foreign(weights), device="cuda")
    for name, array in want.arrays().items():
        np.testing.assert_array_equal(cuda.to_host(found.arrays()[name]), cuda.to_host(array))
    trained, model = (
        Sequential(Flatten(), Linear(4, 2), input_shape=(1, 2, 2), rng=seed, device="cuda") for seed in (0, 1)
    )
    trained.normalization = want.normalization
    state = trained.state_dict()
    model.load_state_dict({name: foreign(value) if value.ndim else value for name, value in state.items()})
    for name, value in model.state_dict().items():
        np.testing.assert_array_equal(value, state[name])
    model.theta = foreign(np.arange(10, dtype=np.float32))
    model[1].bias = foreign(np.ones(2, np.float32))
    np.testing.assert_array_equal(cuda.to_host(model.theta), [*range(8), 1, 1])


def test_parameters_go_out_without_a_copy(stream):
    from cuda.core.utils import StridedMemoryView

    model = Sequential(Linear(3, 2), rng=0, device="cuda")
    for array in (model.theta, model[0].weight):
        shared = devices.as_dlpack(array)
        np.testing.assert_array_equal(np.asarray(shared), cuda.to_host(array))
        for make in (StridedMemoryView.from_dlpack, StridedMemoryView.from_cuda_array_interface):
            assert make(shared, stream_ptr=int(stream.handle)).ptr == array.device_ctypes_pointer.value
        # As torch, CuPy and JAX call it.
        for options in ({"stream": 1}, {"stream": 2, "max_version": (1, 0)}, {"dl_device": (2, 0), "copy": False}):
            assert "dltensor" in repr(shared.__dlpack__(**options))
        for options in ({"dl_device": (1, 0)}, {"copy": True}):
            with pytest.raises(BufferError, match="the array is shared on cuda:0; numpy"):
                shared.__dlpack__(**options)


def test_an_array_on_another_gpu_is_refused(stream):
    array = ForeignArray(cuda.to_device(GRID), stream, "dlpack")
    array.__class__ = type("Elsewhere", (ForeignArray,), {"__dlpack_device__": lambda self: (2, 1)})
    with pytest.raises(ValueError, match="the array is on cuda:1, this process computes on cuda:0"):
        cuda.to_device(array)


def test_a_stream_of_another_context(monkeypatch, stream):
    def as_cuda_array(array):
        raise RuntimeError("[400] Call to cuStreamSynchronize results in CUDA_ERROR_INVALID_CONTEXT")

    monkeypatch.setattr(_launch.cuda, "as_cuda_array", as_cuda_array)
    with pytest.raises(ValueError, match="the array's stream belongs to another CUDA context"):
        cuda.to_device(ForeignArray(cuda.empty((3,), np.float32), stream, "interface"))


# --- errors of the driver ---------------------------------------------------------------------------------------------


@ON_CPU
def test_out_of_memory():
    cuda_on_cpu.set_memory(sum(size for _, size in cuda_on_cpu.allocations()) + (1 << 20))
    try:
        free = _launch.free_memory()
        for ask in (
            lambda: cuda.empty((1 << 20,), np.float32),
            lambda: cuda.to_device(np.zeros(1 << 20, np.float32)),
        ):
            with pytest.raises(errors.DeviceMemoryError, match=r"asked for 4.0 MiB, \d\.\d MiB free") as caught:
                ask()
            assert caught.value.requested == 4 << 20
            assert free <= caught.value.free < 4 << 20  # deferred frees run first
        model = Sequential(Linear(3, 2), rng=0, input_shape=(3,), device="cuda")
        with pytest.raises(MemoryError, match=r"a batch of [\d,]+ would fit") as caught:
            model.reserve(10**6)
        fits = int(str(caught.value).split("a batch of ")[-1].split(" would")[0].replace(",", ""))
        model.reserve(fits * 9 // 10)
    finally:
        cuda_on_cpu.set_memory(4 << 30)
    assert model.forward(np.ones((2, 3))).shape == (2, 2)  # still usable


FAILURES = {
    "cuLaunchKernelEx": ("the launch of increment_kernel", lambda step: cuda.increment(step)),
    "cuMemcpyDtoH_v2": ("a copy from the device", lambda step: cuda.to_host(step)),
    "cuMemcpyHtoD_v2": ("a copy to the device", lambda step: cuda.copy_to(step, np.zeros(1, np.int64))),
    "cuCtxSynchronize": ("waiting", lambda step: _launch.synchronize()),
}


@ON_CPU
@pytest.mark.parametrize("call", FAILURES)
def test_a_failing_call_is_one_line_on_stderr(call, capsys):
    action, call_backend = FAILURES[call]
    step = counter()
    cuda.increment(step)
    cuda_on_cpu.inject_error(call, 719)
    with pytest.raises(errors.DeviceError, match=f"{action} failed on cuda:0: .*CUDA_ERROR_LAUNCH_FAILED"):
        call_backend(step)
    cuda_on_cpu.inject_error(call, 719)
    assert _common.run_command(lambda: call_backend(step)) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {action} failed on cuda:0")


@ON_CPU
def test_a_failing_replay_is_one_line_on_stderr(capsys):
    step = counter()
    captured = cuda.capture(lambda: cuda.increment(step))
    captured()
    captured()
    cuda_on_cpu.inject_error("cuGraphLaunch", 719)
    assert _common.run_command(captured) == 1
    assert capsys.readouterr().err.startswith("error: the replay of a captured step failed on cuda:0")


def test_one_process_computes_on_one_gpu():
    with pytest.raises(ValueError, match="this process computes on cuda:0 already, got cuda:1"):
        _launch.set_device(1)


def test_a_forked_child_is_refused(monkeypatch):
    monkeypatch.setitem(_launch._context, "forked", True)
    with pytest.raises(RuntimeError, match="was forked from one that uses the GPU"):
        cuda.increment(counter())


# --- programs, from start to end --------------------------------------------------------------------------------------

PROGRAM = [sys.executable, str(ROOT / "tests" / "support" / "cuda_on_cpu")]
LENET5 = '''
"""examples/lenet5.py on the first 2,000 images of MNIST, or of synthetic digits without MNIST."""
import runpy, sys
from tinycnn import data
try:
    digits = data.mnist(download=False)
except (OSError, ValueError):
    digits = data.load("synthetic")
subset = data.Dataset("digits", digits.train_images[:2000], digits.train_labels[:2000], digits.test_images[:500],
                   digits.test_labels[:500], digits.classes)
data.load = lambda name, *_: subset
runpy.run_path(sys.argv.pop(1), run_name="__main__")
'''


def run_lenet5(tmp_path, device, *options):
    script = tmp_path / "subset.py"
    script.write_text(LENET5)
    command = PROGRAM if device == "cuda" and not ON_GPU else [sys.executable]
    arguments = [
        str(script),
        str(ROOT / "examples" / "lenet5.py"),
        "--device",
        device,
        "--out",
        str(tmp_path / device),
        "--set",
        "data.validation=166",
    ]
    return subprocess.run(
        [*command, *arguments, *options], capture_output=True, text=True, timeout=900, check=False,
        env={**ENVIRONMENT, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip


def test_the_example_on_2000_images_is_the_cpus(tmp_path):
    results = {}
    for device in ("cuda", "cpu"):
        done = run_lenet5(tmp_path, device, "--epochs", "2")
        assert done.returncode == 0, done.stdout + done.stderr
        lines = [line.split() for line in done.stdout.splitlines()]
        epochs = [
            [float(word.rstrip("%")) for word in line[1:5]]
            for line in lines
            if line[:1] in (["1"], ["2"]) and len(line) == 6
        ]
        (test,) = [float(line[2].rstrip("%")) for line in lines if line[:2] == ["test", "accuracy"]]
        results[device] = np.array([*epochs[0], *epochs[1], test])
    np.testing.assert_allclose(results["cuda"], results["cpu"], rtol=0, atol=1e-3)
    assert results["cuda"][-1] > 60


@ON_CPU
def test_the_example_reports_a_gpu_failure_in_one_line(tmp_path):
    broken = LENET5.replace("import runpy, sys", "import runpy, sys\nimport cuda_on_cpu\nfrom tinycnn import cuda")
    broken = broken.replace(
        "runpy.run_path", "cuda_on_cpu.inject_error('cuGraphLaunch', 719, after=40, times=10**6)\nrunpy.run_path"
    )
    script = tmp_path / "subset.py"
    script.write_text(broken)
    done = subprocess.run(
        [*PROGRAM, str(script), str(ROOT / "examples" / "lenet5.py"), "--device", "cuda", "--epochs", "9",
         "--set", "data.validation=166", "--out", str(tmp_path)],
        capture_output=True, text=True, timeout=900, check=False, env={**ENVIRONMENT, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert "CUDA_ERROR_LAUNCH_FAILED" in line


@ON_CPU
def test_each_batch_size_is_captured_once_in_a_training(monkeypatch):
    """Training and evaluation, with smaller last batches."""
    monkeypatch.setattr(train, "EVALUATION_BATCH", 4)
    images, labels = np.random.default_rng(0).integers(0, 256, (17, 4, 4), np.uint8), np.arange(17) % 5
    training, validation = (DeviceDataset(images[at], labels[at], device="cuda") for at in (slice(10), slice(10, 17)))
    model = Sequential(Flatten(), Linear(16, 5), rng=0, device="cuda")
    calls = "cuGraphInstantiateWithParams", "cuLaunchKernelEx", "cuGraphLaunch"
    counts = []
    fit(
        model, CrossEntropyLoss(), AdamW(model), training, epochs=5, batch_size=4, validation=validation, rng=0,
        on_epoch=lambda record: counts.append([cuda_on_cpu.call_count(call) for call in calls]), progress=False,
    )  # fmt: skip
    spent = np.diff(counts, axis=0)
    assert counts[-1][0] - counts[0][0] <= 4  # graphs: 4 and 2 images of training, 4 and 3 of validation
    np.testing.assert_array_equal(spent[-2:, 0], 0)
    np.testing.assert_array_equal(spent[-2:, 1], 0)  # no launches outside of graphs
    np.testing.assert_array_equal(spent[-2:, 2], 5)
