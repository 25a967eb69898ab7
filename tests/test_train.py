"""Training: batches, steps, the loop, what happens when it goes wrong."""

import os

import numba
import numpy as np
import pytest

from tinycnn import (
    SGD,
    Adam,
    AdamW,
    Batches,
    CrossEntropyLoss,
    DivergedError,
    Flatten,
    Linear,
    Sequential,
    Tanh,
    data,
    evaluate,
    fit,
    models,
    optim,
    set_threads,
    train_step,
)
from tinycnn.train import warm_up

TWO_CORES = numba.config.NUMBA_NUM_THREADS > 1


@pytest.fixture(scope="module")
def digits():
    return data.synthetic_digits(2000, rng=0)


def small_model(rng=0):
    return Sequential(Flatten(), Linear(784, 16), Tanh(), Linear(16, 10), rng=rng)


# --- batches ----------------------------------------------------------------------------------------------------------


def test_batches_normalise_to_mean_zero_and_deviation_one(digits):
    images, labels = digits
    batches = Batches(images, labels)
    x = np.empty((len(images), 1, 28, 28), np.float32)
    target = batches.gather(x, np.arange(len(images)))
    assert abs(x.mean(dtype=np.float64)) < 1e-5
    assert abs(x.std(dtype=np.float64) - 1) < 1e-4
    assert np.array_equal(target, labels)


def test_batches_gather_by_index_with_padding_and_channels():
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (7, 3, 4, 5), dtype=np.uint8), np.arange(7)
    mean, std = [0.1, 0.2, 0.3], [0.5, 1.0, 2.0]
    batches = Batches(images, labels, mean=mean, std=std, padding=(1, 2))
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
    Batches(images, np.zeros(5, int), mean=0, std=1).gather(x, np.arange(5))
    np.testing.assert_allclose(x[:, 0], images, rtol=1e-6)


@pytest.mark.parametrize(
    ("images", "labels", "error", "words"),
    [
        (np.zeros((3, 4)), np.zeros(3, int), ValueError, "images"),
        (np.zeros((0, 4, 4)), np.zeros(0, int), ValueError, "images must not be empty"),
        (np.full((3, 4, 4), "a"), np.zeros(3, int), TypeError, "images"),
        (np.full((3, 4, 4), 1j), np.zeros(3, int), TypeError, "images"),
        (np.full((3, 4, 4), np.nan), np.zeros(3, int), ValueError, r"nan at index \(0, 0, 0, 0\)"),
        (np.zeros((3, 4, 4)), np.zeros(3), TypeError, "labels"),
        (np.zeros((3, 4, 4)), np.array([0, -1, 2]), ValueError, "-1 at index 1"),
        (np.zeros((3, 4, 4)), np.zeros(2, int), ValueError, "labels"),
    ],
)
def test_bad_batches_are_refused(images, labels, error, words):
    with pytest.raises(error, match=words):
        Batches(images, labels)


# --- learning ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("activation", "pool"), [("tanh", "avg"), ("relu", "max")])
def test_32_images_are_learned_by_heart(digits, activation, pool):
    images, labels = digits
    batches = Batches(images[:32], labels[:32])
    model = models.lenet5(activation, pool, rng=1)
    fit(model, CrossEntropyLoss(), Adam(model, 3e-3), batches, epochs=60, batch_size=32, rng=0, progress=False)
    loss, accuracy, _ = evaluate(model, batches)
    assert accuracy == 1
    assert loss < 0.01


def train_some(threads, digits, steps_epochs=7):
    set_threads(threads)
    try:
        images, labels = digits
        model = models.lenet5(rng=3)
        optimizer = AdamW(model, optim.one_cycle(3e-3, steps_epochs * 16))
        history = fit(
            model, CrossEntropyLoss(), optimizer, Batches(images, labels),
            epochs=steps_epochs, batch_size=130, rng=5, progress=False,
        )  # fmt: skip
        assert optimizer.steps == steps_epochs * 16  # the last batch, smaller than the others, counts too
        return model.theta.tobytes(), [record["train_loss"] for record in history]
    finally:
        set_threads(numba.config.NUMBA_NUM_THREADS)


def test_training_gives_the_same_bits_again(digits):
    assert train_some(None, digits) == train_some(None, digits)


@pytest.mark.skipif(not TWO_CORES, reason="one thread is all there is")
def test_training_gives_the_same_bits_with_one_and_two_threads(digits):
    assert train_some(1, digits) == train_some(2, digits)


def test_fit_reports_every_epoch(digits):
    images, labels = digits
    model, seen = small_model(), []
    train, validation = Batches(images[:300], labels[:300]), Batches(images[300:400], labels[300:400])
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


def test_evaluate_does_not_depend_on_the_batch_size(digits):
    images, labels = digits
    batches, model = Batches(images[:103], labels[:103]), small_model()
    one, many = evaluate(model, batches, batch_size=1), evaluate(model, batches, batch_size=64)
    np.testing.assert_allclose(one[0], many[0], rtol=1e-6)
    assert one[1] == many[1] == (many[2].argmax(axis=1) == labels[:103]).mean()


def test_warm_up_changes_nothing(digits):
    images, labels = digits
    model = small_model()
    optimizer = Adam(model)
    before = model.theta.copy()
    assert warm_up(model, CrossEntropyLoss(), optimizer, Batches(images, labels), 32) > 0
    assert np.array_equal(model.theta, before)
    assert optimizer.steps == 0
    assert not optimizer.m.any()


@pytest.mark.skipif("TINYCNN_DATA" not in os.environ, reason="TINYCNN_DATA is not set: no real MNIST")
def test_three_hundred_steps_on_real_mnist():
    mnist = data.mnist(download=False)
    train = Batches(mnist.train_images[:19200], mnist.train_labels[:19200])
    test = Batches(mnist.test_images, mnist.test_labels, mean=train.mean, std=train.std)
    model = models.lenet5(rng=0)
    optimizer = Adam(model, optim.one_cycle(3e-3, 300))
    fit(model, CrossEntropyLoss(), optimizer, train, epochs=1, batch_size=64, rng=0, progress=False)
    assert evaluate(model, test)[1] > 0.95


# --- going wrong ------------------------------------------------------------------------------------------------------


def test_a_diverging_run_stops_and_keeps_the_last_good_weights(digits):
    images, labels = digits
    batches, model, good = Batches(images, labels), small_model(), []
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
        train_step(model, CrossEntropyLoss(), SGD(model, 0.1), Batches(images, labels), np.arange(8))
    assert np.array_equal(model.theta, before, equal_nan=True)


def test_an_interrupt_leaves_the_weights_of_the_last_epoch(digits):
    images, labels = digits
    model, good = small_model(), []

    def interrupt_in_the_second(record):
        good.append(model.theta.copy())
        if record["epoch"] == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(
            model, CrossEntropyLoss(), SGD(model, 0.1), Batches(images, labels), epochs=5, rng=0,
            on_epoch=interrupt_in_the_second, progress=False,
        )  # fmt: skip
    assert np.array_equal(model.theta, good[-1])


def test_a_data_set_that_does_not_fit_the_model_is_refused_before_training(digits):
    images, labels = digits
    model = models.lenet5(rng=0)
    before = model.theta.copy()
    for batches, words in [
        (Batches(images[:, :20], labels), r"train: the model takes images \(1, 28, 28\), got \(1, 20, 28\)"),
        (Batches(images, labels + 5), "train: labels go up to 14"),
    ]:
        with pytest.raises(ValueError, match=words):
            fit(model, CrossEntropyLoss(), SGD(model, 0.1), batches, epochs=1)
    for options in ({"epochs": 0}, {"epochs": 1, "batch_size": 0}):
        with pytest.raises(ValueError, match="must be at least 1"):
            fit(model, CrossEntropyLoss(), SGD(model, 0.1), Batches(images, labels), **options)
    assert np.array_equal(model.theta, before)


@pytest.mark.parametrize("value", [0, 10_000])
def test_a_number_of_threads_that_cannot_be_is_refused(value):
    with pytest.raises(ValueError, match="threads must be at"):
        set_threads(value)


# --- optimizers' own state --------------------------------------------------------------------------------------------


def test_an_optimizer_goes_on_from_its_saved_state(digits):
    images, labels = digits
    batches, index = Batches(images, labels), np.arange(64)

    def steps(model, optimizer, count):
        for _ in range(count):
            train_step(model, CrossEntropyLoss(), optimizer, batches, index)

    whole, first = small_model(), small_model()
    steps(whole, Adam(whole, optim.cosine(0.01, 6)), 6)
    optimizer = Adam(first, optim.cosine(0.01, 6))
    steps(first, optimizer, 3)
    state, weights = optimizer.state_dict(), first.state_dict()
    second = small_model(rng=9)
    second.load_state_dict(weights)
    optimizer = Adam(second)
    optimizer.load_state_dict(state)
    steps(second, optimizer, 3)
    assert np.array_equal(second.theta, whole.theta)


def test_an_optimizer_refuses_a_state_that_does_not_fit():
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
