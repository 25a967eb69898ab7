"""Training: data sets, steps, the loop, divergence and interruption."""

import io
import os
import sys

import numba
import numpy as np
import pytest

from tinycnn import (
    SGD,
    Adam,
    AdamW,
    CrossEntropyLoss,
    DeviceDataset,
    DivergedError,
    EarlyStopping,
    Flatten,
    Linear,
    MSELoss,
    OneHotMSELoss,
    Sequential,
    Tanh,
    data,
    evaluate,
    fit,
    kernels,
    models,
    optim,
    schedules,
    set_num_threads,
    train_step,
)
from tinycnn.dataset import DataLoader
from tinycnn.train import warm_up

TWO_CORES = numba.config.NUMBA_NUM_THREADS > 1


@pytest.fixture(scope="module")
def digits():
    return data.synthetic_digits(2000, rng=0)


def small_model(rng=0):
    return Sequential(Flatten(), Linear(784, 16), Tanh(), Linear(16, 10), rng=rng)


# --- data sets --------------------------------------------------------------------------------------------------------


def test_batches_normalise_to_mean_zero_and_deviation_one(digits):
    images, labels = digits
    batches = DeviceDataset(images, labels)
    x = np.empty((len(images), 1, 28, 28), np.float32)
    target = batches.gather(x, np.arange(len(images)))
    assert abs(x.mean(dtype=np.float64)) < 1e-5
    assert abs(x.std(dtype=np.float64) - 1) < 1e-4
    assert np.array_equal(target, labels)


def test_batches_gather_by_index_with_padding_and_channels():
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (7, 3, 4, 5), dtype=np.uint8), np.arange(7)
    mean, std = [0.1, 0.2, 0.3], [0.5, 1.0, 2.0]
    batches = DeviceDataset(images, labels, mean=mean, std=std, padding=(1, 2))
    x = np.full((4, *batches.image_shape), np.nan, np.float64)
    index = np.array([6, 0, 0, 3])
    target = batches.gather(x, index)
    assert list(target) == [6, 0, 0, 3]
    padded = np.pad(images[index] / 255, ((0, 0), (0, 0), (1, 1), (2, 2)))
    want = (padded - np.reshape(mean, (1, 3, 1, 1))) / np.reshape(std, (1, 3, 1, 1))
    np.testing.assert_allclose(x, want, rtol=1e-12, atol=1e-12)


def test_float_images_are_not_divided_by_255():
    images = np.random.default_rng(0).random((5, 4, 4))
    x = np.empty((5, 1, 4, 4), np.float64)
    DeviceDataset(images, np.zeros(5, int), mean=0, std=1).gather(x, np.arange(5))
    np.testing.assert_allclose(x[:, 0], images, rtol=1e-6)


@pytest.mark.parametrize(
    ("images", "labels", "error", "words"),
    [
        (np.zeros((3, 4)), np.zeros(3, int), ValueError, "images"),
        (np.zeros((0, 4, 4)), np.zeros(0, int), ValueError, "images must not be empty"),
        (np.full((3, 4, 4), "a"), np.zeros(3, int), TypeError, "images"),
        (np.full((3, 4, 4), 1j), np.zeros(3, int), TypeError, "images"),
        (np.full((3, 4, 4), np.nan), np.zeros(3, int), ValueError, r"nan at index \(0, 0, 0, 0\)"),
        (np.zeros((3, 4, 4)), np.zeros(3, bool), TypeError, "labels"),
        (np.zeros((3, 4, 4)), np.full(3, np.nan), ValueError, "labels must be finite"),
        (np.zeros((3, 4, 4)), np.zeros((2, 5)), ValueError, r"labels must have shape \(3, \.\.\.\)"),
        (np.zeros((3, 4, 4)), np.array([0, -1, 2]), ValueError, "-1 at index 1"),
        (np.zeros((3, 4, 4)), np.zeros(2, int), ValueError, "labels"),
    ],
)
def test_invalid_data_sets_are_refused(images, labels, error, words):
    with pytest.raises(error, match=words):
        DeviceDataset(images, labels)


# --- learning ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("activation", "pool"), [("tanh", "avg"), ("relu", "max")])
def test_32_images_are_memorized(digits, activation, pool):
    images, labels = digits
    batches = DeviceDataset(images[:32], labels[:32])
    model = models.lenet5(activation, pool, rng=1)
    fit(model, CrossEntropyLoss(), Adam(model, 3e-3), batches, epochs=60, batch_size=32, rng=0, progress=False)
    loss, accuracy, _ = evaluate(model, batches)
    assert accuracy == 1
    assert loss < 0.01


def train_lenet(threads, digits, epochs=7):
    set_num_threads(threads)
    try:
        images, labels = digits
        model = models.lenet5(rng=3)
        optimizer = AdamW(model, schedules.one_cycle(3e-3, epochs * 16))
        history = fit(
            model, CrossEntropyLoss(), optimizer, DeviceDataset(images, labels),
            epochs=epochs, batch_size=130, rng=5, progress=False,
        )  # fmt: skip
        assert optimizer.steps == epochs * 16  # with the last batch, which is smaller
        return model.theta.tobytes(), [record["train_loss"] for record in history]
    finally:
        set_num_threads(numba.config.NUMBA_NUM_THREADS)


def test_training_gives_the_same_bits_again(digits):
    assert train_lenet(None, digits) == train_lenet(None, digits)


@pytest.mark.skipif(not TWO_CORES, reason="needs two threads")
def test_training_gives_the_same_bits_with_one_and_two_threads(digits):
    assert train_lenet(1, digits) == train_lenet(2, digits)


def test_fit_reports_every_epoch(digits):
    images, labels = digits
    model, seen = small_model(), []
    train, validation = DeviceDataset(images[:300], labels[:300]), DeviceDataset(images[300:400], labels[300:400])
    history = fit(
        model, CrossEntropyLoss(), SGD(model, 0.1), train,
        epochs=3, batch_size=64, validation=validation, rng=0, on_epoch=seen.append, progress=True,
    )  # fmt: skip
    assert seen == history
    assert [record["epoch"] for record in history] == [1, 2, 3]
    assert history[2]["train_loss"] < history[0]["train_loss"]
    assert set(history[0]) == {
        "epoch", "train_loss", "train_accuracy", "lr", "seconds", "images_per_second", "val_loss", "val_accuracy",
    }  # fmt: skip


def test_the_validation_loss(digits):
    """The training loss, but plain cross entropy instead of one with options, so that runs can be compared."""
    images, labels = digits
    train, validation = DeviceDataset(images[:100], labels[:100]), DeviceDataset(images[:300], labels[:300])
    for criterion, val_criterion in [
        (OneHotMSELoss(), OneHotMSELoss()),
        (CrossEntropyLoss(label_smoothing=0.5), CrossEntropyLoss()),
    ]:
        model = small_model()
        options = {"epochs": 1, "batch_size": 32, "rng": 0, "progress": False}
        (record,) = fit(model, criterion, SGD(model, 0.1), train, validation=validation, **options)
        want = evaluate(model, validation, val_criterion)
        assert (record["val_loss"], record["val_accuracy"]) == want[:2]


def test_evaluate_does_not_depend_on_the_batch_size(digits):
    images, labels = digits
    batches, model = DeviceDataset(images[:103], labels[:103]), small_model()
    one, many = evaluate(model, batches, batch_size=1), evaluate(model, batches, batch_size=64)
    np.testing.assert_allclose(one[0], many[0], rtol=1e-6)
    assert one[1] == many[1] == (many[2].argmax(axis=1) == labels[:103]).mean()


def test_warm_up_changes_nothing(digits):
    images, labels = digits
    model = small_model()
    optimizer = Adam(model)
    before = model.theta.copy()
    assert warm_up(model, CrossEntropyLoss(), optimizer, DeviceDataset(images, labels), 32) > 0
    assert np.array_equal(model.theta, before)
    assert optimizer.steps == 0
    assert not optimizer.m.any()


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_fit_shows_the_kernels_that_it_compiles(digits, monkeypatch):
    def precompile(step, on_progress):
        on_progress(0, 4, "", 0.0)
        on_progress(1, 4, "linear.linear_forward", 1.5)
        on_progress(3, 4, "linear.linear_backward", 2.5)

    def stderr(terminal, progress, compiles=True):
        model = small_model()
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stderr", Terminal() if terminal else io.StringIO())
            if compiles:
                patch.setattr(kernels, "precompile", precompile)
            fit(model, CrossEntropyLoss(), SGD(model, 0.1), digits, epochs=1, rng=0, progress=progress)
            return sys.stderr.getvalue()

    shown = stderr(True, True)
    assert [f"{done}/4" in shown for done in range(4)] == [True, True, False, True]
    assert shown.index("compiling kernels") < shown.index("epoch 1/1")
    assert "compiling kernels" not in stderr(True, True, compiles=False)
    assert stderr(True, False) == stderr(False, True) == ""


# --- squared error of class numbers -----------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_squared_error_to_one_hot_class_numbers(reduction, dtype):
    rng = np.random.default_rng(0)
    x, target = rng.standard_normal((7, 4)).astype(dtype), rng.integers(0, 4, 7)
    value, gradient = OneHotMSELoss(reduction)(x, target)
    want, want_gradient = MSELoss(reduction)(x, np.eye(4)[target])
    assert value == want
    np.testing.assert_array_equal(gradient, want_gradient)
    torch = pytest.importorskip("torch")
    x_torch = torch.tensor(x, requires_grad=True)
    rows = torch.nn.functional.one_hot(torch.tensor(target), 4).to(x_torch.dtype)
    loss = torch.nn.functional.mse_loss(x_torch, rows, reduction=reduction)
    loss.backward()
    np.testing.assert_allclose(value, loss.item(), rtol=1e-6)
    np.testing.assert_allclose(gradient, x_torch.grad.numpy(), rtol=1e-6)


@pytest.mark.parametrize(
    ("target", "error", "words"),
    [
        (np.array([0, 3]), ValueError, "target must lie in 0 ... 2, got 3 at index 1"),
        (np.array([0.0, 1.0]), TypeError, "target must be integer class numbers"),
        (np.array([[0, 1, 0], [1, 0, 0]]), ValueError, r"target must have shape \(2,\)"),
    ],
)
def test_targets_that_are_refused(target, error, words):
    with pytest.raises(error, match=words):
        OneHotMSELoss()(np.ones((2, 3)), target)
    with pytest.raises(ValueError, match="reduction must be one of 'mean', 'sum'"):
        OneHotMSELoss("none")


def test_digits_are_learned_by_squared_error(digits):
    images, labels = digits
    batches, model = DeviceDataset(images[:64], labels[:64]), small_model()
    history = fit(
        model, OneHotMSELoss(), Adam(model, 1e-3), batches, epochs=40, batch_size=32, rng=0, progress=False,
    )  # fmt: skip
    assert history[-1]["train_accuracy"] == 1
    assert evaluate(model, batches, OneHotMSELoss())[0] < 0.02


# --- early stopping ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "values", "last", "best"),
    [
        ({"patience": 2}, [3, 2, 2, 2.5, 1], 4, 2),
        ({"patience": 2}, [3, 2, 2, 1, 1, 1, 0], 6, 4),  # the count restarts after an improvement
        ({"patience": 1}, [1, 1, 0], 2, 1),
        ({"patience": 0}, [1, 0.5, 0.6, 0], 3, 2),
        ({"patience": 3}, [3, 2, 1], None, 3),
        ({"patience": 2, "min_delta": 0.5}, [3, 2.6, 2.55, 1], 3, 1),
        ({"patience": 2, "mode": "max"}, [0.1, 0.3, 0.2, 0.3, 0.9], 4, 2),
        ({"patience": 2}, [np.nan, np.nan, 1], 2, 0),
        ({"patience": 2, "monitor": "train_loss"}, [2, 2, 2, 1], 3, 1),
    ],
)
def test_early_stopping_stops_after_patience(options, values, last, best):
    stopping = EarlyStopping(**options)
    found = None
    for epoch, value in enumerate(values, 1):
        if stopping({"epoch": epoch, options.get("monitor", "val_loss"): value}) is True:
            found = epoch
            break
    assert found == last
    assert stopping.best_epoch == best
    if best:
        assert stopping.best == values[best - 1]


def test_training_stops_early_with_the_best_weights(digits):
    images, labels = digits
    train, validation = DeviceDataset(images[:300], labels[:300]), DeviceDataset(images[300:400], labels[300:400])
    rates = np.concatenate([np.full(10, 0.1), np.full(100, 10.0)])  # worse from the third epoch on
    for averaged in (False, True):
        for restore in (False, True):
            model = small_model()
            optimizer = SGD(model, rates)
            optimizer = optim.EMA(optimizer, 0.5) if averaged else optimizer
            stopping, seen = EarlyStopping(patience=3, restore_best=model if restore else None), []

            class Recorder:
                at_end = stopping.at_end

                def __call__(self, record, stopping=stopping, model=model, seen=seen):
                    seen.append(model.theta.copy())
                    return stopping(record)

            history = fit(
                model, CrossEntropyLoss(), optimizer, train, epochs=20, batch_size=64, validation=validation, rng=0,
                on_epoch=Recorder(), progress=False,
            )  # fmt: skip
            assert len(history) == stopping.best_epoch + 3 < 20
            losses = [record["val_loss"] for record in history]
            assert min(losses) == losses[stopping.best_epoch - 1] == stopping.best
            at = stopping.best_epoch - 1 if restore else -1
            assert np.array_equal(model.theta, seen[at])
            assert evaluate(model, validation)[0] == losses[at]


def test_the_best_weights_are_restored_without_an_early_stop(digits):
    images, labels = digits
    batches, model = DeviceDataset(images[:100], labels[:100]), small_model()
    rates = np.concatenate([np.full(4, 0.1), np.full(4, 10.0)])
    stopping = EarlyStopping("train_loss", patience=9, restore_best=model, mode="max")  # the first is the best
    options = {"epochs": 3, "batch_size": 50, "rng": 0, "progress": False}
    history = fit(model, CrossEntropyLoss(), SGD(model, rates), batches, on_epoch=stopping, **options)
    assert len(history) == 3
    assert stopping.best_epoch == int(np.argmax([record["train_loss"] for record in history])) + 1


def test_only_true_from_a_callback_stops_training(digits):
    images, labels = digits
    batches = DeviceDataset(images[:64], labels[:64])
    for result, epochs in ((None, 3), (False, 3), ((None, None), 3), ("stop", 3), (True, 1)):
        model = small_model()
        history = fit(
            model, CrossEntropyLoss(), SGD(model, 0.1), batches, epochs=3, rng=0, progress=False,
            on_epoch=lambda record, result=result: result,
        )  # fmt: skip
        assert len(history) == epochs


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: EarlyStopping(7), "monitor must be"),
        (lambda: EarlyStopping(patience=-1), "patience must be"),
        (lambda: EarlyStopping(patience=1.5), "patience must be"),
        (lambda: EarlyStopping(min_delta=-1), "min_delta must be"),
        (lambda: EarlyStopping(mode="least"), "mode must be"),
        (lambda: EarlyStopping(restore_best="best"), "restore_best must be True or False, or the model"),
        (lambda: EarlyStopping()({"epoch": 1, "train_loss": 2.0}), "monitor must be one of 'epoch', 'train_loss'"),
    ],
)
def test_early_stopping_refuses_by_name(make, words):
    with pytest.raises((ValueError, TypeError), match=f"^{words}"):
        make()


@pytest.mark.skipif("TINYCNN_DATA" not in os.environ, reason="TINYCNN_DATA is not set: no real MNIST")
def test_three_hundred_steps_on_real_mnist():
    mnist = data.mnist(download=False)
    train = DeviceDataset(mnist.train_images[:19200], mnist.train_labels[:19200])
    test = DeviceDataset(mnist.test_images, mnist.test_labels, mean=train.mean, std=train.std)
    model = models.lenet5(rng=0)
    optimizer = Adam(model, schedules.one_cycle(3e-3, 300))
    fit(model, CrossEntropyLoss(), optimizer, train, epochs=1, batch_size=64, rng=0, progress=False)
    assert evaluate(model, test)[1] > 0.95


# --- divergence and interruption --------------------------------------------------------------------------------------


def test_a_diverging_run_stops_and_keeps_the_last_good_weights(digits):
    images, labels = digits
    batches, model, good = DeviceDataset(images, labels), small_model(), []
    rates = np.concatenate([np.full(32, 0.1), np.full(1000, 1e38)])  # one good epoch of 32 steps
    with np.errstate(all="ignore"), pytest.raises(DivergedError, match=r"step \d+ \(epoch 2\).*layer \d") as caught:
        fit(
            model, CrossEntropyLoss(), SGD(model, rates), batches, epochs=3, batch_size=64, rng=0,
            on_epoch=lambda record: good.append(model.theta.copy()), progress=False,
        )  # fmt: skip
    assert caught.value.epoch == 2
    assert caught.value.step > 32
    assert len(good) == 1
    assert np.array_equal(model.theta, good[0])


def test_a_step_with_a_nan_parameter_names_it_and_updates_nothing(digits):
    images, labels = digits
    model = small_model()
    model.parameters()[2][3, 4] = np.nan
    before = model.theta.copy()
    with pytest.raises(DivergedError, match=r"step 1: parameter 3\.weight of layer 3"):
        train_step(model, CrossEntropyLoss(), SGD(model, 0.1), DeviceDataset(images, labels), np.arange(8))
    assert np.array_equal(model.theta, before, equal_nan=True)


def test_an_interrupt_leaves_the_weights_of_the_last_epoch(digits):
    images, labels = digits
    model, good = small_model(), []

    def interrupt_second_epoch(record):
        good.append(model.theta.copy())
        if record["epoch"] == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(
            model, CrossEntropyLoss(), SGD(model, 0.1), DeviceDataset(images, labels), epochs=5, rng=0,
            on_epoch=interrupt_second_epoch, progress=False,
        )  # fmt: skip
    assert np.array_equal(model.theta, good[-1])


def test_a_data_set_of_a_wrong_shape_is_refused_before_training(digits):
    images, labels = digits
    model = models.lenet5(rng=0)
    before = model.theta.copy()
    for batches, words in [
        (DeviceDataset(images[:, :20], labels), r"train: the model takes images \(1, 28, 28\), got \(1, 20, 28\)"),
        (DeviceDataset(images, labels + 5), "train: labels go up to 14"),
    ]:
        with pytest.raises(ValueError, match=words):
            fit(model, CrossEntropyLoss(), SGD(model, 0.1), batches, epochs=1)
    for options in ({"epochs": 0}, {"epochs": 1, "batch_size": 0}):
        with pytest.raises(ValueError, match="must be at least 1"):
            fit(model, CrossEntropyLoss(), SGD(model, 0.1), DeviceDataset(images, labels), **options)
    assert np.array_equal(model.theta, before)


@pytest.mark.parametrize("value", [0, 10_000])
def test_an_invalid_number_of_threads_is_refused(value):
    with pytest.raises(ValueError, match="threads must be at"):
        set_num_threads(value)


# --- optimizers' own state --------------------------------------------------------------------------------------------


def test_an_optimizer_resumes_from_its_state_dict(digits):
    images, labels = digits
    batches, index = DeviceDataset(images, labels), np.arange(64)

    def steps(model, optimizer, count):
        for _ in range(count):
            train_step(model, CrossEntropyLoss(), optimizer, batches, index)

    whole, first = small_model(), small_model()
    steps(whole, Adam(whole, schedules.cosine(0.01, 6)), 6)
    optimizer = Adam(first, schedules.cosine(0.01, 6))
    steps(first, optimizer, 3)
    state, weights = optimizer.state_dict(), first.state_dict()
    second = small_model(rng=9)
    second.load_state_dict(weights)
    optimizer = Adam(second)
    optimizer.load_state_dict(state)
    steps(second, optimizer, 3)
    assert np.array_equal(second.theta, whole.theta)


def test_an_optimizer_refuses_a_wrong_state():
    model = small_model()
    optimizer = Adam(model)
    with pytest.raises(ValueError, match="must have the keys"):
        optimizer.load_state_dict(SGD(model).state_dict())
    state = optimizer.state_dict() | {"m": np.zeros(3)}
    with pytest.raises(ValueError, match="'m' must have shape"):
        optimizer.load_state_dict(state)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda m: SGD(m, -0.1), "lr must be finite and not negative"),
        (lambda m: SGD(m, [0.1, np.nan]), "lr must be finite and not negative"),
        (lambda m: SGD(m, nesterov=True), "nesterov"),
        (lambda m: SGD(m, momentum=-1), "momentum must be at least 0"),
        (lambda m: Adam(m, betas=(0.9, 1.0)), "betas must be at least 0 and below 1"),
        (lambda m: Adam(m, eps=-1), "eps must be at least 0"),
        (lambda m: AdamW(m, weight_decay=-1), "weight_decay must be at least 0"),
    ],
)
def test_bad_optimizer_options_are_refused(make, words):
    with pytest.raises(ValueError, match=words):
        make(small_model())


@pytest.fixture
def orders(monkeypatch):
    """The order of images in each epoch."""
    seen, start_epoch = [], DataLoader.start_epoch

    def record(self, order, repeat=False):
        seen.append(np.array(order))
        start_epoch(self, order, repeat)

    monkeypatch.setattr(DataLoader, "start_epoch", record)
    return seen


def test_short_epochs_continue_where_the_last_one_ended(orders):
    images, labels = data.synthetic_digits(100, rng=0)
    batches, model = DeviceDataset(images, labels), small_model()
    history = fit(
        model, CrossEntropyLoss(), SGD(model, 0.1), batches, epochs=6, batch_size=10, steps_per_epoch=4, rng=0
    )
    assert [len(order) for order in orders] == [40] * 6
    sequence = np.concatenate(orders)
    for whole in (sequence[:100], sequence[100:200]):  # every image once before any is repeated
        assert sorted(whole) == list(range(100))
    assert list(sequence[:100]) != list(sequence[100:200])
    assert model.theta.any()
    assert len(history) == 6


@pytest.mark.parametrize(("steps", "error"), [(11, ValueError), (0, ValueError), (2.5, TypeError)])
def test_an_invalid_number_of_steps_is_refused(steps, error):
    images, labels = data.synthetic_digits(100, rng=0)
    model = small_model()
    with pytest.raises(error, match="steps_per_epoch"):
        fit(model, CrossEntropyLoss(), SGD(model, 0.1), DeviceDataset(images, labels), epochs=1, batch_size=10,
            steps_per_epoch=steps)  # fmt: skip


@pytest.mark.parametrize("reshuffle", [True, False])
def test_one_order_for_all_epochs_or_a_new_one_each(reshuffle, orders):
    images, labels = data.synthetic_digits(50, rng=0)
    batches, model = DeviceDataset(images, labels), small_model()
    fit(model, CrossEntropyLoss(), SGD(model, 0.1), batches, epochs=3, batch_size=20, reshuffle=reshuffle, rng=0)
    first, *later = map(list, orders)
    assert sorted(first) == list(range(50))
    assert first != list(range(50))
    assert [order == first for order in later] == [not reshuffle] * 2
