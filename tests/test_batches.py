"""Training on arrays, memory-mapped files and iterables of batches: the same steps, with few batches in memory."""

import itertools
import os
import signal
import threading
import time
import tracemalloc
from types import SimpleNamespace

import numpy as np
import pytest

from tinycnn import (
    SGD,
    Adam,
    Batches,
    BatchNorm2d,
    Conv2d,
    CrossEntropyLoss,
    DeviceDataset,
    DivergedError,
    Flatten,
    Linear,
    RandomAffine,
    ReLU,
    Residual,
    Sequential,
    evaluate,
    fit,
    lecun98,
    train as training,
    train_step,
)
from tinycnn.batches import AHEAD, Prefetch, make_loader
from tinycnn.dataset import CHUNK, is_on_disk, pixel_statistics
from tinycnn.kernels import _capture

RNG = np.random.default_rng(0)
IMAGES, LABELS = RNG.integers(0, 256, (60, 8, 8), np.uint8), RNG.integers(0, 4, 60)
SIZES = (16, 16, 16, 12)


def net(channels=1, **options):
    layers = Conv2d(channels, 3, 3), ReLU(), Flatten(), Linear(108, 4)
    return Sequential(*layers, rng=0, **{"input_shape": (channels, 8, 8), **options})


def learn(model, data, **options):
    options = {"epochs": 2, "batch_size": 16, "rng": 0, "progress": False, **options}
    optimizer = options.pop("optimizer", None) or Adam(model, 0.01)
    return fit(model, options.pop("criterion", None) or CrossEntropyLoss(), optimizer, data, **options)


def orders(epochs=2):
    rng = np.random.default_rng(0)
    return [rng.permutation(60) for _ in range(epochs)]


def batches(order, images=IMAGES, labels=LABELS):
    for start in range(0, 60, 16):
        yield images[order[start : start + 16]], labels[order[start : start + 16]]


@pytest.fixture(autouse=True)
def no_thread_is_left():
    yield
    assert [thread.name for thread in threading.enumerate() if thread.name == "tinycnn-reader"] == []


@pytest.fixture
def npy(tmp_path):
    def open_again(array):
        name = f"{len(list(tmp_path.iterdir()))}.npy"
        np.save(tmp_path / name, array)
        return np.load(tmp_path / name, mmap_mode="r")

    return open_again


# --- the same training from every source ------------------------------------------------------------------------------


def test_all_sources_give_the_same_bits(npy):
    """A data set on the device, arrays, a file, batches of NumPy: the same steps in the same order."""
    want, pixels = net(), {"mean": 0.0, "std": 1.0}
    history = learn(want, DeviceDataset(IMAGES, LABELS, **pixels), validation=(IMAGES[:20], LABELS[:20]))
    whole = (batch for order in orders() for batch in batches(order))
    passes = iter(orders())
    for source, options in (
        (DeviceDataset(npy(IMAGES), LABELS, **pixels), {}),
        (lambda: batches(next(passes)), {"validation": [(IMAGES[:13], LABELS[:13]), [IMAGES[13:20], LABELS[13:20]]]}),
        (Batches(whole), {"steps_per_epoch": 4}),
    ):
        model = net()
        records = learn(model, source, **{"validation": (npy(IMAGES[:20]), LABELS[:20]), **options})
        assert model.theta.tobytes() == want.theta.tobytes()
        for record, expected in zip(records, history, strict=True):
            for key in ("train_loss", "train_accuracy", "lr", "val_accuracy"):
                assert record[key] == expected[key]
            assert record["val_loss"] == pytest.approx(expected["val_loss"], rel=1e-6)
        assert (model.normalization.unit, *model.normalization.std) == (255, 1)
    default = net()
    learn(default, (IMAGES, LABELS))
    assert default.normalization.mean == pytest.approx([IMAGES.mean() / 255])


def test_the_validation_arrays_get_the_mean_of_the_training_set():
    model = net()
    record = learn(model, (IMAGES, LABELS), validation=(IMAGES[:20] // 2, LABELS[:20]))[-1]
    train = DeviceDataset(IMAGES, LABELS)
    want = evaluate(model, DeviceDataset(IMAGES[:20] // 2, LABELS[:20], mean=train.mean, std=train.std))
    assert (record["val_loss"], record["val_accuracy"]) == want[:2]


def test_augmentation_padding_colour_and_floats_of_batches():
    images = RNG.standard_normal((60, 3, 6, 6)).astype(np.float32)
    options = {"mean": [0.1, 0.2, 0.3], "std": 2.0, "padding": 1, "augment": RandomAffine(degrees=20), "seed": 3}
    found = []
    passes = iter(orders())
    for source in (
        DeviceDataset(images, LABELS, **options),
        Batches(lambda: batches(next(passes), images), class_names=list("abcd"), **options),
    ):
        model = net(3)
        learn(model, source)
        found.append(model.theta.tobytes())
    assert found[0] == found[1]
    assert model.class_names == ("a", "b", "c", "d")


def test_the_step_of_a_stream_is_captured_once_for_each_size(monkeypatch):
    made, init = [], _capture.CapturedStep.__init__
    monkeypatch.setattr(_capture.CapturedStep, "__init__", lambda self, step: (made.append(self), init(self, step))[1])
    learn(net(), list(batches(orders()[0])), epochs=4)
    assert len(made) == 2


def test_batches_may_grow_and_shrink():
    sizes = [3, 16, 1, 40, 3, 16]
    index = [np.arange(number, number + n) for number, n in enumerate(sizes)]
    parts = [(IMAGES[i], LABELS[i]) for i in index]
    model, other = net(), net()
    learn(model, parts, epochs=2, validation=parts[3:4])  # the buffers of the loss are large enough from the start
    optimizer = Adam(other, 0.01)
    data = DeviceDataset(IMAGES, LABELS, mean=0, std=1)
    for i in index * 2:
        train_step(other, CrossEntropyLoss(), optimizer, data, i)
    assert model.theta.tobytes() == other.theta.tobytes()


def test_arrays_of_other_libraries():
    class Tensor:  # as torch's: no NumPy array, with __array__
        def __init__(self, array):
            self.array, self.shape = array, array.shape

        def __array__(self, dtype=None, copy=None):
            return np.asarray(self.array, dtype)

    class Exported:  # with DLPack only
        def __init__(self, array):
            self.array = array

        def __dlpack__(self, **options):
            return self.array.__dlpack__(**options)

        def __dlpack_device__(self):
            return self.array.__dlpack_device__()

    class Loader:  # as torch's: starts anew with every iter()
        def __init__(self, kind):
            self.kind = kind

        def __len__(self):
            return 4

        def __iter__(self):
            return ([self.kind(array) for array in batch] for batch in batches(np.arange(60)))

    found = []
    for kind in (np.array, Tensor, Exported):
        model = net()
        learn(model, Loader(kind))
        found.append(model.theta.tobytes())
    assert len(set(found)) == 1


def test_a_source_may_fill_the_same_arrays_again():
    def reused():
        images, labels = np.empty((16, 8, 8), np.uint8), np.empty(16, np.int64)
        for start in range(0, 48, 16):
            images[...], labels[...] = IMAGES[start:][:16], LABELS[start:][:16]
            yield images, labels
        images[...] = 0

    model, other = net(), net()
    learn(model, reused, epochs=1)
    learn(other, [(IMAGES[start:][:16], LABELS[start:][:16]) for start in range(0, 48, 16)], epochs=1)
    assert model.theta.tobytes() == other.theta.tobytes()


# --- files ------------------------------------------------------------------------------------------------------------


class Counted(np.memmap):
    """A memory-mapped array that counts the images it reads."""

    reads = None

    def __array_finalize__(self, source):
        super().__array_finalize__(source)
        self.reads = getattr(source, "reads", None)

    def __getitem__(self, index):
        result = super().__getitem__(index)
        if self.reads is not None and isinstance(index, np.ndarray):
            self.reads.append(len(index))
        return result


def test_a_file_is_read_batch_by_batch(tmp_path):
    """The whole file would be 64 MB, and a copy as float64 512 MB."""
    path, n = tmp_path / "images.dat", 4096
    pixels = np.lib.format.open_memmap(path, "w+", np.uint8, (n, 1, 128, 128))
    for start in range(0, n, 512):
        pixels[start : start + 512] = np.random.default_rng(start).integers(0, 256, (512, 1, 128, 128), np.uint8)
    offset = pixels.offset
    del pixels
    images = Counted(path, np.uint8, "r", offset, (n, 1, 128, 128))
    images.reads = []
    labels = np.arange(n) % 2
    model = Sequential(Flatten(), Linear(128 * 128, 2), input_shape=(1, 128, 128), rng=0)
    fit(
        model,
        CrossEntropyLoss(),
        SGD(model, 0.01),
        (IMAGES_128, np.zeros(32, int)),
        epochs=1,
        batch_size=32,
        progress=False,
    )  # fmt: skip (compile first: compilers allocate)
    tracemalloc.start()
    data = DeviceDataset(images, labels)
    fit(model, CrossEntropyLoss(), SGD(model, 0.01), data, epochs=1, batch_size=32, rng=0, progress=False)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert images.reads == [32] * (n // 32)
    assert peak < images.nbytes / 5


IMAGES_128 = RNG.integers(0, 256, (32, 128, 128), np.uint8)


@pytest.mark.parametrize("kind", [np.uint8, np.uint16, np.int16, np.float32, np.float64, ">f4"])
def test_statistics_of_a_file(npy, monkeypatch, kind):
    monkeypatch.setattr("tinycnn.dataset.CHUNK", 700)  # 3 or fewer images
    images = RNG.integers(0, 256, (60, 3, 8, 9)).astype(kind)
    images[:, 1] = 7
    data, want = DeviceDataset(npy(images), LABELS), DeviceDataset(images, LABELS)
    assert data.on_disk
    assert not want.on_disk
    np.testing.assert_allclose(data.mean, want.mean, rtol=1e-6)
    np.testing.assert_allclose(data.std, want.std, rtol=1e-5)
    assert vars(data.normalization).keys() == vars(want.normalization).keys()
    assert data.normalization.unit == want.normalization.unit
    assert data.normalization.integers == want.normalization.integers == (kind is np.int16)
    x, y = np.empty((5, 3, 8, 9), np.float32), np.empty((5, 3, 8, 9), np.float32)
    index = np.array([3, 59, 0, 3, 8])
    np.testing.assert_array_equal(data.gather(x, index), want.gather(y, index))
    np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5)
    assert CHUNK > 700


def test_a_file_can_be_evaluated_stepped_and_copied(npy):
    import copy

    data, want = DeviceDataset(npy(IMAGES), LABELS, mean=0, std=1), DeviceDataset(IMAGES, LABELS, mean=0, std=1)
    model, other = net(), net()
    for index in ([1, 2, 3], np.arange(40), [5]):
        losses = {train_step(m, CrossEntropyLoss(), SGD(m, 0.1), d, index) for m, d in ((model, data), (other, want))}
        assert len(losses) == 1
    assert model.theta.tobytes() == other.theta.tobytes()
    np.testing.assert_equal(evaluate(model, data, batch_size=17), evaluate(other, want, batch_size=17))
    duplicate = copy.deepcopy(data)
    assert not duplicate.on_disk
    np.testing.assert_equal(evaluate(model, duplicate), evaluate(other, want))
    assert is_on_disk(npy(IMAGES)[3:, 1:])
    assert not is_on_disk(np.array(npy(IMAGES)))
    assert not is_on_disk(npy(IMAGES)[[1, 2]])


def test_a_users_data_set_on_disk_gathers_in_its_own_way(npy):
    class Inverted(DeviceDataset):
        def gather_batch(self, x, *where):
            target = super().gather_batch(x, *where)
            np.negative(x, out=x)
            return target

    found = []
    for images in (IMAGES, npy(IMAGES)):
        model = net()
        learn(model, Inverted(images, LABELS, mean=0, std=1))
        found.append(model.theta.tobytes())
    assert found[0] == found[1]


def test_a_file_serves_second_derivatives(npy):
    found = []
    for images in (IMAGES, npy(IMAGES)):
        model = net()
        learn(model, DeviceDataset(images, LABELS, mean=0, std=1), optimizer=lecun98.SDLM(model, patterns=20))
        found.append(model.theta.tobytes())
    assert found[0] == found[1]
    with pytest.raises(TypeError, match="train must be a DeviceDataset or arrays for SDLM"):
        learn(model, list(batches(np.arange(60))), optimizer=lecun98.SDLM(model, patterns=20))


def test_a_nan_in_a_file_is_named(npy):
    images = IMAGES / 255.0
    images[31, 2, 5] = np.nan
    with pytest.raises(ValueError, match=r"images must be finite, got nan at index \(31, 0, 2, 5\)"):
        DeviceDataset(npy(images), LABELS)
    with pytest.raises(ValueError, match="images must be finite, got nan"):
        learn(net(), DeviceDataset(npy(images), LABELS, mean=0, std=1))
    with pytest.raises(ValueError, match="images must be finite"):
        pixel_statistics(images[:, None])


# --- errors -----------------------------------------------------------------------------------------------------------

GOOD = IMAGES[:16], LABELS[:16]


@pytest.mark.parametrize(
    ("item", "error", "words"),
    [
        (
            (IMAGES[:4, :7], LABELS[:4]),
            ValueError,
            r"one of images must have the shape of those of the first batch, \(1, 8, 8\), got \(1, 7, 8\)",
        ),
        (
            (IMAGES[:4] / 255, LABELS[:4]),
            TypeError,
            "images must have the dtype of the first batch, uint8, got float64",
        ),
        ((IMAGES[:4], LABELS[:3]), ValueError, "labels must have shape"),
        ((IMAGES[:4], LABELS[:4] / 2), TypeError, "labels must"),
        ((IMAGES[:4], LABELS[:4] + 9), ValueError, "labels go up to"),
        ((IMAGES[:0], LABELS[:0]), ValueError, "images must not be empty"),
        (IMAGES[:4], TypeError, r"must be a pair \(images, labels\), got ndarray"),
        (None, TypeError, r"must be a pair \(images, labels\), got None"),
        ((IMAGES[:4],), TypeError, r"must be a pair"),
    ],
)
def test_a_batch_that_does_not_fit_is_refused_with_its_number(item, error, words):
    model = net()
    before = model.theta.copy()
    with pytest.raises(error, match=f"^batch 3 of train.*{words}"):
        learn(model, [GOOD, GOOD, item])
    np.testing.assert_array_equal(model.theta, before)
    with pytest.raises(error, match=r"^batch 2 of validation"):
        learn(model, [GOOD, GOOD], validation=[GOOD, item])
    np.testing.assert_array_equal(model.theta, before)


def test_the_first_batch_is_checked_before_training():
    for source, words in (
        ([(IMAGES[:4, :7], LABELS[:4])], r"batch 1 of train: the model takes images \(1, 8, 8\), got \(1, 7, 8\)"),
        ([(IMAGES[:4] / np.nan, LABELS[:4])], "batch 1 of train: images must be finite"),
        ([IMAGES, LABELS], "batch 1 of train must be a pair .*arrays go into a tuple"),
        ([], "^train gave no batch$"),
        (iter([]), "^train gave no batch; an iterator such as a generator can be read only once"),
        (lambda: 3, "train: the function must return an iterator of batches, got 3"),
        (IMAGES, "train must be a DeviceDataset, a tuple of arrays"),
        ({"images": IMAGES}, "train must be"),
        ("images.npy", "train must be"),
        (DeviceDataset, "train must be .*call it"),
        (None, "train must be"),
    ):
        with np.errstate(all="ignore"), pytest.raises((TypeError, ValueError), match=words):
            learn(net(), source)
    with pytest.raises(TypeError, match="source must be an iterable of batches"):
        Batches(IMAGES)


def test_sources_that_end_early_are_named():
    four = [GOOD] * 4
    model = net()
    with pytest.raises(
        ValueError, match=r"^train gave no batch; .* pass a list, an object whose __iter__ starts anew, or"
    ):
        learn(model, iter(four), epochs=2)
    assert len(learn(model, iter(four), epochs=1)) == 1
    with pytest.raises(ValueError, match=r"^train ended after 4 batches of an epoch, steps_per_epoch is 5$"):
        learn(model, four, epochs=1, steps_per_epoch=5)
    with pytest.raises(
        ValueError, match=r"^train ended after 1 batches of an epoch, steps_per_epoch is 3; .*only once"
    ):
        learn(model, iter(four), epochs=2, steps_per_epoch=3)
    with pytest.raises(ValueError, match=r"^validation gave no batch; an iterator"):
        learn(model, four, validation=iter(four))
    once = iter(four)
    with pytest.raises(ValueError, match=r"^train gave no batch$"):
        learn(model, lambda: once, epochs=2)


def test_short_epochs_continue_and_read_no_further():
    read = []

    def source():
        for number in range(6):
            read.append(number)
            yield IMAGES[number * 4 :][:4], LABELS[number * 4 :][:4]

    seen = []
    learn(net(), source, epochs=3, steps_per_epoch=4, on_epoch=lambda record: seen.append(list(read)))
    assert seen == [[0, 1, 2, 3], [0, 1, 2, 3, 4, 5, 0, 1], [0, 1, 2, 3, 4, 5] * 2]


@pytest.mark.parametrize("kind", [OSError, KeyboardInterrupt, ZeroDivisionError])
def test_what_a_source_raises_is_raised_by_fit(kind):
    closed = []

    def source():
        try:
            yield GOOD
            yield GOOD
            raise kind("cannot read file 3")
        finally:
            closed.append(True)

    model = net()
    before = model.theta.copy()
    with pytest.raises(kind) as caught:
        learn(model, source)
    assert any(entry.name == "source" for entry in caught.traceback)
    assert closed == [True]
    np.testing.assert_array_equal(model.theta, before)


def test_ctrl_c_ends_the_thread_and_the_source():
    before, closed, good = signal.signal(signal.SIGINT, signal.default_int_handler), [], []

    def source():
        try:
            for number in itertools.count():
                if number == 20 and good:
                    os.kill(os.getpid(), signal.SIGINT)
                    time.sleep(0.05)
                yield GOOD
                if number == 30 and not good:
                    return
        finally:
            closed.append(threading.current_thread().name)

    model = net()
    try:
        with pytest.raises(KeyboardInterrupt):
            learn(model, source, epochs=5, on_epoch=lambda record: good.append(model.theta.copy()))
    finally:
        signal.signal(signal.SIGINT, before)
    assert len(good) == 1
    assert len(closed) == 2
    np.testing.assert_array_equal(model.theta, good[0])


def test_the_thread_is_ahead_by_two_batches():
    read = []

    def items():
        for number in itertools.count():
            read.append(number)
            yield number

    prefetch = Prefetch(items())
    iterator = iter(prefetch)
    for number in range(5):
        assert next(iterator) == number
        deadline = time.monotonic() + 10
        while len(read) < number + 1 + AHEAD and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(0.01)
        assert len(read) == number + 1 + AHEAD
    prefetch.close()
    assert not prefetch.thread.is_alive()


def test_a_source_may_run_the_model():
    """Hard examples: the next batch depends on the model's outputs."""
    model = net()

    def source():
        for _ in range(5):
            scores = model.forward(IMAGES[:, None] / 255)
            hardest = np.argsort(scores[np.arange(60), LABELS])[:16]
            yield IMAGES[hardest], LABELS[hardest]

    history = learn(model, source, epochs=3, validation=source)
    assert len(history) == 3
    assert model.training


def test_a_diverging_stream_names_the_step():
    bad = IMAGES[:16] / 255.0
    model = net()
    parts = [(bad, LABELS[:16])] * 6
    optimizer = SGD(model, np.array([0.1] * 6 + [0.1, 1e38, 1e38] + [0.1] * 10))
    good = []
    with np.errstate(all="ignore"), pytest.raises(DivergedError) as caught:
        learn(model, parts, epochs=2, optimizer=optimizer, on_epoch=lambda record: good.append(model.theta.copy()))
    assert caught.value.epoch == 2
    assert caught.value.step in (9, 10)
    np.testing.assert_array_equal(model.theta, good[0])
    whole = DeviceDataset(np.concatenate([bad] * 6), np.tile(LABELS[:16], 6), mean=0, std=1)
    other = net()
    optimizer = SGD(other, optimizer.lr_schedule.copy())
    with np.errstate(all="ignore"), pytest.raises(DivergedError) as expected:
        learn(other, whole, epochs=2, optimizer=optimizer)
    assert abs(caught.value.step - expected.value.step) <= 1  # the batches differ


# --- accumulation of gradients ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("streamed", [False, True])
def test_four_batches_of_16_make_one_of_64(reduction, streamed):
    """Equal to 1e-6 without batch norm; also for a last window of fewer and smaller batches."""
    images, labels = RNG.standard_normal((172, 8, 8)).astype(np.float32), RNG.integers(0, 4, 172)
    found = []
    for size, k in ((64, 1), (16, 4)):
        model = net(dtype=np.float64)
        optimizer = SGD(model, [0.01] * 3 + [0.02] * 6, momentum=0.9)
        data = DeviceDataset(images, labels, mean=0, std=1)
        if streamed:
            data = [(images[i : i + size], labels[i : i + size]) for i in range(0, 172, size)]
        history = learn(
            model, data, epochs=3, batch_size=size, optimizer=optimizer, accumulation_steps=k,
            criterion=CrossEntropyLoss(reduction=reduction),
        )  # fmt: skip
        assert optimizer.steps == 9
        found.append((model.theta.copy(), [record["train_loss"] for record in history]))
    np.testing.assert_allclose(found[0][0], found[1][0], rtol=0, atol=1e-6)
    np.testing.assert_allclose(found[0][1], found[1][1], rtol=1e-6)


def test_accumulating_steps_are_captured(monkeypatch):
    made, init = [], _capture.CapturedStep.__init__
    monkeypatch.setattr(_capture.CapturedStep, "__init__", lambda self, step: (made.append(self), init(self, step))[1])
    learn(net(), (IMAGES[:48], LABELS[:48]), epochs=5, batch_size=8, accumulation_steps=3)
    assert len(made) == 4  # the loss, the first gradient of a window, a later one, the update


def test_accumulation_of_one_changes_nothing_and_divergence_is_found():
    found = []
    for options in ({}, {"accumulation_steps": 1}):
        model = net()
        learn(model, (IMAGES, LABELS), **options)
        found.append(model.theta.tobytes())
    assert found[0] == found[1]
    model = Sequential(Conv2d(1, 3, 3), BatchNorm2d(3), Flatten(), Linear(108, 4), input_shape=(1, 8, 8), rng=0)
    learn(model, (IMAGES, LABELS), accumulation_steps=2)
    assert model.layers[1].num_batches_tracked[0] == 8  # small batches
    model = net()
    with np.errstate(all="ignore"), pytest.raises(DivergedError, match=r"\(epoch 1\)"):
        learn(model, (IMAGES, LABELS), optimizer=SGD(model, 1e38), accumulation_steps=2)
    for value, error in ((0, ValueError), (1.5, TypeError)):
        with pytest.raises(error, match="accumulation_steps must be"):
            learn(model, (IMAGES, LABELS), accumulation_steps=value)


@pytest.mark.gpu
def test_a_stream_on_the_gpu():
    parts, found = [(IMAGES[:16], LABELS[:16]), (IMAGES[16:32], LABELS[16:32]), (IMAGES[32:40], LABELS[32:40])], []
    for device in ("cpu", "cuda"):
        model = net(device=device)
        learn(model, parts, optimizer=SGD(model, 0.1), accumulation_steps=2, validation=parts[2:])
        found.append(np.array(model.ops.to_host(model.theta)))
    np.testing.assert_allclose(*found, rtol=1e-4, atol=1e-5)


# --- large batches in pieces ------------------------------------------------------------------------------------------


@pytest.fixture
def small_pieces(monkeypatch):
    monkeypatch.setattr(training, "PIECE", 32)


def runner_of(model, criterion=None, **options):
    data = DeviceDataset(IMAGES, LABELS, mean=0, std=1, **options)
    return training.StepRunner(model, criterion or CrossEntropyLoss(), make_loader(data))


def test_sizes_of_pieces():
    runner = runner_of(net())
    for n in (1, 64, 255, 256, 257, 512, 600, 1000, 4096, 4097):
        sizes = runner.pieces(n)
        assert sum(sizes) == n
        assert max(sizes) <= 256
        assert len(set(sizes[:-1])) <= 1
        assert all(size % 16 == 0 for size in sizes[:-1])
        assert len(sizes) == -(-n // 256)


class OwnLoss(CrossEntropyLoss):
    pass


@pytest.mark.parametrize(
    ("layers", "criterion", "options"),
    [
        ((Conv2d(1, 3, 3), BatchNorm2d(3), Flatten(), Linear(108, 4)), CrossEntropyLoss(), {}),
        ((Residual(Conv2d(1, 1, 3, padding=1), BatchNorm2d(1)), Flatten(), Linear(64, 4)), CrossEntropyLoss(), {}),
        ((Flatten(), Linear(64, 4)), CrossEntropyLoss(weight=[1, 2, 3, 4]), {}),
        ((Flatten(), Linear(64, 4)), CrossEntropyLoss(ignore_index=1), {}),
        ((Flatten(), Linear(64, 4)), OwnLoss(), {}),
        ((Flatten(), Linear(64, 4)), CrossEntropyLoss(), {"sample_weight": np.ones(len(IMAGES))}),
    ],
)
def test_batches_that_must_be_whole(layers, criterion, options):
    model = Sequential(*layers, input_shape=(1, 8, 8), rng=0)
    assert runner_of(model, criterion, **options).pieces(1000) == [1000]


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("streamed", [False, True])
def test_pieces_of_32_train_as_whole_batches(reduction, streamed, monkeypatch):
    """Weights, losses of epochs and of batches, and the accuracy; 100 images are 32 + 32 + 32 + 4, or 48 + 48 + 4."""
    images, labels = RNG.standard_normal((230, 8, 8)).astype(np.float32), RNG.integers(0, 4, 230)
    found = []
    for piece in (256, 32):
        monkeypatch.setattr(training, "PIECE", piece)
        model, losses = net(dtype=np.float64), []
        data = DeviceDataset(images, labels, mean=0, std=1)
        if streamed:
            data = [(images[i : i + 100], labels[i : i + 100]) for i in range(0, 230, 100)]
        optimizer = SGD(model, 0.01, momentum=0.9)
        history = learn(
            model, data, epochs=3, batch_size=100, optimizer=optimizer, criterion=CrossEntropyLoss(reduction=reduction),
            callbacks=[SimpleNamespace(on_batch_end=lambda record, to=losses: to.append(record["loss"]))],
        )  # fmt: skip
        assert optimizer.steps == 9
        plain = net(dtype=np.float64)
        learn(
            plain, data, epochs=3, batch_size=100, optimizer=SGD(plain, 0.01, momentum=0.9),
            criterion=CrossEntropyLoss(reduction=reduction),
        )  # fmt: skip
        assert plain.theta.tobytes() == model.theta.tobytes()  # the hook reads losses, and changes nothing
        metrics = [[record[key] for key in ("train_loss", "train_accuracy")] for record in history]
        found.append((model.theta.copy(), losses, metrics))
    for whole, pieces in zip(*found, strict=True):
        np.testing.assert_allclose(whole, pieces, rtol=0, atol=1e-6)


def test_pieces_and_accumulation(small_pieces):
    """Two batches of 48 + 48 images make one update, as one of 192 does."""
    images, labels = RNG.standard_normal((192, 8, 8)).astype(np.float32), RNG.integers(0, 4, 192)
    found = []
    for size, k in ((192, 1), (96, 2)):
        model = net(dtype=np.float64)
        optimizer = SGD(model, 0.01)
        learn(model, (images, labels), epochs=2, batch_size=size, optimizer=optimizer, accumulation_steps=k)
        assert optimizer.steps == 2
        found.append(model.theta.copy())
    np.testing.assert_allclose(*found, rtol=0, atol=1e-9)


def test_a_step_in_pieces_needs_the_memory_of_a_piece(small_pieces):
    model = net()
    learn(model, (np.repeat(IMAGES, 8, axis=0), np.repeat(LABELS, 8)), epochs=1, batch_size=320, validation=None)
    assert model.max_batch <= 64


def test_train_step_in_pieces(monkeypatch):
    data, found = DeviceDataset(IMAGES, LABELS, mean=0, std=1), []
    for piece in (256, 32):
        monkeypatch.setattr(training, "PIECE", piece)
        model = net(dtype=np.float64)
        found.append((train_step(model, CrossEntropyLoss(), SGD(model, 0.1), data, np.arange(60)), *model.theta))
    np.testing.assert_allclose(*found, rtol=0, atol=1e-9)


@pytest.mark.parametrize("streamed", [False, True])
def test_a_divergence_in_pieces_is_found_with_its_step(small_pieces, streamed):
    images = np.zeros((200, 8, 8), np.float32)
    images[150] = 3e38  # in the second piece of the second batch
    data = DeviceDataset(images, np.zeros(200, np.int64), mean=0, std=1)
    if streamed:
        data = [(images[i : i + 100], np.zeros(100, np.int64)) for i in (0, 100)]
    step = 2 if streamed else np.random.default_rng(0).permutation(200).tolist().index(150) // 100 + 1
    model = net()
    model.theta *= 100  # so that this image overflows
    before = model.theta.copy()
    with np.errstate(all="ignore"), pytest.raises(DivergedError, match=f"at step {step} "):
        learn(model, data, epochs=1, batch_size=100, optimizer=SGD(model, 0.0))
    np.testing.assert_array_equal(model.theta, before)  # of the last complete epoch


@pytest.mark.gpu
def test_pieces_on_the_gpu(small_pieces):
    found = []
    for device in ("cpu", "cuda"):
        model = net(device=device)
        data = DeviceDataset(IMAGES, LABELS, mean=0.5, std=0.5, device=device)
        learn(model, data, optimizer=SGD(model, 0.1), batch_size=50)  # 32 + 18, then 10
        found.append(np.array(model.ops.to_host(model.theta)))
    np.testing.assert_allclose(*found, rtol=1e-4, atol=1e-5)
