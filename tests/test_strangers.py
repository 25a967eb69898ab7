"""Users' own layers, losses, optimizers and data sets, threads, copies: all work, or raise an error that says why."""

import contextlib
import copy
import functools
import math
import pickle
import re
import threading
from pathlib import Path

import numpy as np
import pytest

from tinycnn import (
    EMA,
    SGD,
    Adam,
    AvgPool2d,
    BatchNorm2d,
    Conv2d,
    CrossEntropyLoss,
    DeviceDataset,
    Dropout,
    Flatten,
    Linear,
    MaxPool2d,
    MSELoss,
    OneHotMSELoss,
    RandomAffine,
    ReLU,
    Sequential,
    Tanh,
    evaluate,
    fit,
    lecun98,
    losses,
    models,
    optim,
    schedules,
    train,
    train_step,
)
from tinycnn.dataset import DataLoader
from tinycnn.kernels import _capture
from tinycnn.layers import Layer

RNG = np.random.default_rng(0)
IMAGES, LABELS = RNG.integers(0, 256, (60, 8, 8), np.uint8), RNG.integers(0, 4, 60)
X = RNG.standard_normal((40, 1, 8, 8)).astype(np.float32)


def chain():
    return Conv2d(1, 3, 3), Tanh(), AvgPool2d(2), Flatten(), Linear(27, 8), ReLU(), Linear(8, 4)


def net(*layers, **options):
    return Sequential(*(layers or chain()), **{"input_shape": (1, 8, 8), "rng": 0, **options})


def digits(count=60, **options):
    return DeviceDataset(IMAGES[:count], LABELS[:count], **options)


def learn(model, criterion=None, optimizer=None, data=None, **options):
    options = {"epochs": 2, "batch_size": 16, "rng": 0, "progress": False, **options}
    return fit(model, criterion or CrossEntropyLoss(), optimizer or SGD(model, 0.1), data or digits(), **options)


# --- users' layers, losses, optimizers --------------------------------------------------------------------------------


class Softplus(Layer):
    """A layer in NumPy that sets no flags."""

    def forward(self, y, x):
        assert y is not x
        y[...] = np.log1p(np.exp(x))

    def backward(self, dx, dy, x, y):
        dx[...] = dy / (1 + np.exp(-x))


class OwnTanh(Layer):
    """Its backward reads the output, and it sets no flags."""

    def forward(self, y, x):
        y[...] = np.tanh(x)

    def backward(self, dx, dy, x, y):
        dx[...] = dy * (1 - y * y)


class LateLinear(Linear):
    """A subclass that changes its behaviour from the fourth call on."""

    calls = 0

    def forward(self, y, x):
        super().forward(y, x)
        self.calls += 1
        if self.calls > 3:
            y *= 2


@pytest.mark.parametrize("batch", [1, 7, 40])
def test_a_users_layer_runs_every_time(batch):
    model = net(Conv2d(1, 3, 3), Softplus(), AvgPool2d(2), Flatten(), Linear(27, 4), dtype=np.float64).eval()
    with_ours = [layer if not isinstance(layer, Softplus) else None for layer in model.layers]
    for number in range(6):
        x = np.random.default_rng(number).standard_normal((batch, 1, 8, 8))
        maps = Sequential(copy.deepcopy(with_ours[0]), dtype=np.float64)(x)
        rest = Sequential(*copy.deepcopy(with_ours[2:]), dtype=np.float64)
        np.testing.assert_allclose(model(x), rest(np.log1p(np.exp(maps))), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("batch", [1, 40])
def test_users_layers_and_builtin_ones_have_the_same_gradients(batch):
    """The input and output of a user's layer are not overwritten by the layers around it."""
    for before, after in ((Conv2d(1, 3, 3), ReLU()), (Tanh(), Tanh()), (MaxPool2d(2), MaxPool2d(2))):
        ours, theirs = (
            net(*copy.deepcopy((before, kind(), after, Dropout(0.0))), Flatten(), dtype=np.float64)
            for kind in (Tanh, OwnTanh)
        )
        for _ in range(4):
            y = ours(X[:batch])
            np.testing.assert_allclose(theirs(X[:batch]), y, rtol=1e-6, atol=1e-9)
            np.testing.assert_allclose(theirs.backward(np.cos(y)), ours.backward(np.cos(y)), rtol=1e-6, atol=1e-9)
            np.testing.assert_allclose(theirs.grad, ours.grad, rtol=1e-6, atol=1e-9)


def test_a_subclass_that_changes_its_behaviour_runs_every_time():
    model = net(*chain()[:-1], LateLinear(8, 4))
    plain = net()
    for call in range(6):
        np.testing.assert_allclose(model(X), plain(X) * (2 if call >= 3 else 1), rtol=1e-6)


def test_a_replaced_method_runs():
    model, plain = net(), net()
    model(X), model(X), model(X)
    forward = model.layers[-1].forward
    model.layers[-1].forward = lambda y, x: (forward(y, x), np.negative(y, out=y))
    for _ in range(3):
        np.testing.assert_array_equal(model(X), -plain(X))


class Clipped(SGD):
    """Clips the gradient, in late steps only."""

    def step(self):
        if self.steps >= 3:
            np.clip(self.model.grad, -1e-3, 1e-3, out=self.model.grad)
        super().step()


class OwnSGD:
    """Not a subclass of Optimizer."""

    def __init__(self, model, lr):
        self.model, self.lr, self.steps, self.patterns = model, lr, 0, 0

    def step(self):
        self.steps += 1
        self.model.theta -= np.float32(self.lr) * self.model.grad

    def before_epoch(self, *_):
        pass

    def use_average(self):
        pass

    average_parameters = optim.Optimizer.average_parameters

    def state_dict(self):
        return {"steps": self.steps}

    def load_state_dict(self, state):
        self.steps = state["steps"]


@pytest.mark.parametrize("averaged", [False, True])
def test_a_users_optimizer_runs_in_every_step(averaged):
    found = []
    for kind in (Clipped, SGD):
        model = net()
        optimizer = kind(model, 0.1)
        rule = EMA(optimizer, 0.5) if averaged else optimizer
        if kind is Clipped:
            learn(model, optimizer=rule)
        else:  # the same with NumPy
            order = np.random.default_rng(0)
            for permutation in [order.permutation(60) for _ in range(2)]:
                for at in range(0, 60, 16):
                    run = train.StepRunner(model, CrossEntropyLoss(), DataLoader(digits()), rule)
                    run.start_epoch(permutation[at : at + 16])
                    run.compute_loss(len(permutation[at : at + 16]))
                    model.plan(len(permutation[at : at + 16])).backward()
                    if optimizer.steps >= 3:
                        np.clip(model.grad, -1e-3, 1e-3, out=model.grad)
                    rule.step()
            rule.use_average()
        found.append(model.theta.copy())
    np.testing.assert_array_equal(*found)


def test_an_optimizer_that_is_not_a_subclass_counts_its_own_steps():
    model, plain = net(), net()
    optimizer = OwnSGD(model, 0.1)
    learn(model, optimizer=optimizer)
    learn(plain)
    assert optimizer.steps == 8
    np.testing.assert_allclose(model.theta, plain.theta, rtol=1e-5, atol=1e-7)


class Halved(OneHotMSELoss):
    def forward_backward(self, dx, x, target):
        super().forward_backward(dx, x, target)
        dx *= 0.5


def test_a_users_loss_runs_every_time():
    model, plain = net(), net()
    learn(model, Halved(), SGD(model, 0.2))
    learn(plain, OneHotMSELoss(), SGD(plain, 0.1))
    np.testing.assert_allclose(model.theta, plain.theta, rtol=1e-5, atol=1e-7)


class OwnReLU(ReLU):
    replayable = True


class OwnReLUAgain(OwnReLU):
    pass


def test_replayable_is_not_inherited():
    for kind, captured in ((OwnReLU, True), (OwnReLUAgain, False)):
        model = net(Conv2d(1, 3, 3), kind(), Flatten())
        for _ in range(2):
            model(X)
        assert isinstance(model.plan(40)._replays[True].run, _capture.CapturedStep) is captured


class Inverted(DeviceDataset):
    def gather_batch(self, x, *where):
        target = super().gather_batch(x, *where)
        np.negative(x, out=x)
        return target


def test_a_users_data_set_gathers_every_batch():
    inverted = Inverted(IMAGES, LABELS)
    model, plain = net(), net()
    learn(model, data=inverted)
    learn(plain, data=DeviceDataset(-(IMAGES / 255.0 - inverted.mean) / inverted.std, LABELS, mean=0, std=1))
    np.testing.assert_allclose(model.theta, plain.theta, rtol=1e-3, atol=1e-5)


def test_other_batch_sizes_in_between_change_nothing():
    """More sizes than plans are kept, and larger ones."""
    found = []
    for sizes in ((), range(1, 40)):
        model = net()

        def look(record, model=model, sizes=sizes):
            for n in sizes:
                model(X[:n])
            model(np.repeat(X, 8, 0)[: 300 * bool(sizes) + 1])

        records = learn(model, epochs=3, validation=digits(50), on_epoch=look)
        found.append([r["val_loss"] for r in records] + list(model.theta))
    assert found[0] == found[1]


def test_attributes_set_during_training_take_effect():
    def change(record):
        model.layers[1].p, optimizer.momentum, criterion.label_smoothing = 0.0, 0.9, 0.3

    found = []
    for early in (False, True):
        model = net(Flatten(), Dropout(1e-9), Linear(64, 4))
        optimizer, criterion = SGD(model, 0.1), CrossEntropyLoss()
        if early:
            learn(model, criterion, optimizer, epochs=1, rng=np.random.default_rng(0))
            change(None)
        rng = np.random.default_rng(0)
        if early:
            rng.permutation(60)
        learn(model, criterion, optimizer, epochs=1 if early else 2, rng=rng, on_epoch=None if early else change)
        found.append(model.theta.copy())
    np.testing.assert_array_equal(*found)


def test_other_models_do_not_invalidate_captures(monkeypatch):
    model, other, made = net(), net(), []
    init = _capture.CapturedStep.__init__
    monkeypatch.setattr(_capture.CapturedStep, "__init__", lambda self, step: (made.append(self), init(self, step))[1])

    def elsewhere(record):
        other.layers[-1].label = record["epoch"]

    learn(model, epochs=5, validation=digits(20), on_epoch=elsewhere)
    assert len(made) == 3  # batches of 16, the last of 12, and the validation


# --- threads ----------------------------------------------------------------------------------------------------------


def in_threads(*jobs):
    """Run all of them at once; the first error is raised."""
    errors = []

    def guarded(job):
        try:
            job()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(job,)) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert not any(thread.is_alive() for thread in threads)
    if errors:
        raise errors[0]


def test_threads_share_a_model():
    model = net()
    want = [model.outputs(X[n : n + 1]) for n in range(40)]

    def ask(first):
        for turn in range(50):
            n = (first + 7 * turn) % 40
            np.testing.assert_array_equal(model.outputs(X[n : n + 1]), want[n])

    in_threads(*(lambda first=first: ask(first) for first in range(4)))


def test_backward_needs_a_forward_of_its_thread():
    model = net()
    y = model(X)
    in_threads(lambda: model(X[:3]))
    with pytest.raises(RuntimeError, match="backward needs its own forward"):
        model.backward(y)


def test_two_fits_share_a_data_set_and_a_loss():
    data, criterion = digits(augment=RandomAffine(degrees=10)), CrossEntropyLoss()
    want = net()
    learn(want, data=digits(augment=RandomAffine(degrees=10)), epochs=6)
    found = [net() for _ in range(3)]
    in_threads(*(lambda model=model: learn(model, criterion, data=data, epochs=6) for model in found))
    for model in found:
        np.testing.assert_array_equal(model.theta, want.theta)


# --- layers and weights -----------------------------------------------------------------------------------------------


def test_a_layer_belongs_to_one_model_and_its_copy_keeps_the_weights():
    old = net(Conv2d(1, 3, 3), BatchNorm2d(3), ReLU(), Flatten(), Linear(108, 4))
    learn(old)
    before = old.outputs(X)
    with pytest.raises(ValueError, match=r"layer 0, Conv2d.*, belongs to a model already; copy.deepcopy"):
        Sequential(*old.layers[:-1], Linear(108, 7))
    new = Sequential(*copy.deepcopy(old.layers[:-1]), Linear(108, 7), input_shape=(1, 8, 8), rng=5)
    for name, value in old.state_dict().items():
        if not name.startswith(("4.", "normalization.")):
            np.testing.assert_array_equal(new.state_dict()[name], value)
    assert not np.shares_memory(new.theta, old.theta)
    learn(new)
    np.testing.assert_array_equal(old.outputs(X), before)
    alone = copy.deepcopy(old.layers[0])
    np.testing.assert_array_equal(alone.weight, old.layers[0].weight)


def test_layers_are_a_tuple():
    model = net()
    with pytest.raises(AttributeError):
        model.layers.append(ReLU())
    with pytest.raises(TypeError):
        model.layers[-1] = Linear(8, 2)
    with pytest.raises(AttributeError):
        model.layers = ()


def test_assigning_to_a_weight_copies_into_it():
    model = net()
    optimizer = Adam(model)
    model.layers[-1].weight = np.full((4, 8), 0.5)
    model.layers[-1].bias = [1, 2, 3, 4]
    np.testing.assert_array_equal(model.theta[-36:], [*[0.5] * 32, 1, 2, 3, 4])
    np.testing.assert_array_equal(model.state_dict()["6.weight"], 0.5)
    learn(model, optimizer=optimizer)
    assert (model.layers[-1].weight != 0.5).any()
    values = np.linspace(-1, 1, len(model.theta))
    model.theta = values
    np.testing.assert_array_equal(optimizer.model.theta, values.astype(np.float32))
    np.testing.assert_array_equal(model.layers[-1].bias, values[-4:].astype(np.float32))
    model.theta *= 2
    np.testing.assert_array_equal(model.layers[-1].bias, 2 * values[-4:].astype(np.float32))
    with pytest.raises(ValueError, match=r"weight of Linear\(8, 4\) must have shape \(4, 8\), got \(8, 4\)"):
        model.layers[-1].weight = np.ones((8, 4))
    with pytest.raises(ValueError, match="theta must have shape"):
        model.theta = values[1:]


def test_an_optimizer_of_another_model_is_refused():
    a, b = net(), net()
    for go in (
        lambda: learn(a, optimizer=Adam(b)),
        lambda: learn(a, optimizer=EMA(Adam(b))),
        lambda: train_step(a, CrossEntropyLoss(), Adam(b), digits(), [0, 1]),
    ):
        with pytest.raises(ValueError, match="another model"):
            go()


def test_fit_names_a_wrong_argument():
    model = net()
    for go, words in (
        (lambda: fit(model, SGD(model), CrossEntropyLoss(), digits(), epochs=1), "criterion must be a loss"),
        (lambda: fit(model, CrossEntropyLoss, SGD(model), digits(), epochs=1), "criterion must be a loss"),
        (lambda: fit(model, CrossEntropyLoss(), SGD, digits(), epochs=1), "optimizer must be an optimizer"),
        (
            lambda: fit(model, CrossEntropyLoss(), SGD(model), IMAGES, epochs=1),
            r"train must be a DeviceDataset, a tuple of arrays \(images, labels\), or an iterable of batches",
        ),
        (lambda: evaluate(model, (IMAGES, LABELS)), "dataset must be a DeviceDataset"),
        (lambda: evaluate(IMAGES, digits()), "model must be a Sequential"),
    ):
        with pytest.raises(TypeError, match=words):
            go()


def test_squared_errors_of_class_numbers_are_refused():
    model = net()
    before = model.theta.copy()
    for go in (
        lambda: learn(model, MSELoss()),
        lambda: train_step(model, MSELoss(), SGD(model), digits(), [0, 1]),
        lambda: evaluate(model, digits(), MSELoss()),
    ):
        with pytest.raises(ValueError, match="for class numbers there is OneHotMSELoss"):
            go()
    np.testing.assert_array_equal(model.theta, before)


@pytest.mark.parametrize(
    "between",
    [
        lambda model: train_step(model, CrossEntropyLoss(), SGD(model, 0.1), digits(), np.arange(40)),
        lambda model: evaluate(model, digits()),
        lambda model: model.outputs(X),
        lambda model: learn(model, epochs=1, batch_size=40),
    ],
)
def test_a_backward_after_something_else_is_refused(between):
    model = net()
    y = model(X)
    between(model)
    with pytest.raises(RuntimeError, match="backward needs its own forward"):
        model.backward(y)


# --- modes ------------------------------------------------------------------------------------------------------------


def test_predictions_are_made_in_evaluation_mode():
    model = net(Conv2d(1, 3, 3), BatchNorm2d(3), Dropout(0.5), Flatten(), Linear(108, 4))
    learn(model)
    before = [a.copy() for a in model.snapshot()]
    found = model.outputs(X)
    assert model.training
    np.testing.assert_equal(model.snapshot(), before)
    np.testing.assert_array_equal(model.eval()(X), found)
    model.train()
    model.layers[1].training = False  # a frozen layer stays frozen
    model.outputs(X)
    assert [layer.training for layer in model.layers] == [True, False, True, True, True]
    model.training = False
    assert not any(layer.training for layer in model.layers)


def test_switching_a_single_layer_invalidates_captures():
    model = net(Flatten(), Dropout(0.5), Linear(64, 4)).eval()
    still = [model(X) for _ in range(3)]
    model.layers[1].training = True
    assert all((model(X) != still[0]).any() for _ in range(3))
    model.eval()
    np.testing.assert_array_equal(model(X), still[0])
    model.train()
    drawn = [model(X) for _ in range(3)]
    assert all((y != still[0]).any() for y in drawn)
    model.layers[1].training = False
    np.testing.assert_array_equal(model(X), still[0])
    model.train()
    assert (model(X) != still[0]).any()


def test_a_failed_evaluation_restores_the_mode():
    model = net()
    with pytest.raises(ValueError, match="OneHotMSELoss"):
        evaluate(model, digits(), MSELoss())
    assert model.training
    assert all(layer.training for layer in model.layers)


# --- losses over a data set -------------------------------------------------------------------------------------------

CRITERIA = [
    CrossEntropyLoss(),
    CrossEntropyLoss(reduction="sum"),
    CrossEntropyLoss(reduction="none"),
    CrossEntropyLoss(weight=[0.1, 2.0, 1.0, 3.0]),
    CrossEntropyLoss(ignore_index=2),
    CrossEntropyLoss(weight=[0.1, 2.0, 1.0, 3.0], ignore_index=1, label_smoothing=0.2),
    OneHotMSELoss("sum"),
    lecun98.RBFLoss(1.0, "sum"),
]


@pytest.mark.parametrize("criterion", CRITERIA, ids=range(len(CRITERIA)))
def test_a_loss_over_a_data_set_does_not_depend_on_batches(criterion):
    model = net()
    logits = evaluate(model, digits())[2]
    want = np.sum(criterion(logits, LABELS)[0])
    for batch_size in (1, 7, 60):
        assert evaluate(model, digits(), criterion, batch_size)[0] == pytest.approx(want, rel=1e-5)
        (record,) = learn(model, criterion, SGD(model, 0.0), epochs=1, batch_size=batch_size)
        assert record["train_loss"] == pytest.approx(want, rel=1e-5)


# --- state ------------------------------------------------------------------------------------------------------------


def test_counters_are_exact():
    model = net(Conv2d(1, 3, 3), BatchNorm2d(3))
    state = model.state_dict() | {"1.num_batches_tracked": np.array(2**24 + 1)}
    model.load_state_dict(state)
    assert model.state_dict()["1.num_batches_tracked"] == 2**24 + 1
    with pytest.raises(ValueError, match="num_batches_tracked must hold whole numbers"):
        model.load_state_dict(state | {"1.num_batches_tracked": np.array(1.5)})


def test_state_dict_order():
    model = net(Conv2d(1, 3, 3), BatchNorm2d(3), Flatten(), Linear(108, 4))
    batch_norm = ["weight", "bias", "running_mean", "running_var", "num_batches_tracked"]
    assert list(model.state_dict()) == [
        "0.weight", "0.bias", *(f"1.{name}" for name in batch_norm), "3.weight", "3.bias",
    ]  # fmt: skip


def test_normalization_is_saved_with_the_model():
    model = net()
    raw = IMAGES[:40, None]
    assert model.normalization is None
    data = digits(mean=0.3, std=0.2)
    learn(model, data=data)
    want = model.outputs((raw / 255 - 0.3) / 0.2)
    np.testing.assert_allclose(model.outputs(raw), want, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(model.outputs(raw), evaluate(model, data)[2][:40], rtol=1e-5, atol=1e-5)
    state = model.state_dict()
    again = net(rng=1)
    again.load_state_dict(state)
    for other in (again, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        np.testing.assert_array_equal(other.outputs(raw), model.outputs(raw))
        assert list(other.state_dict()) == list(state)
    assert "uint8 pixels / 255, less 0.3, divided by 0.2" in model.summary()
    for kind in (np.int64, np.int8, bool):
        with pytest.raises(
            TypeError, match=rf"x: the model was trained on uint8 pixels and takes .* got {kind.__name__}"
        ):
            model.outputs(raw.astype(kind))
    for kind, unit, words in ((np.uint16, 65535, "uint16 pixels / 65535"), (np.int16, 1, "trained on pixels, less")):
        wide, pixels = net(), raw.astype(kind) * 100
        learn(wide, data=DeviceDataset(pixels, LABELS[:40]))
        assert wide.normalization.unit == unit
        assert words in wide.summary()
        again = net()
        again.load_state_dict(wide.state_dict())
        want = evaluate(wide, DeviceDataset(pixels, LABELS[:40]))[2]
        np.testing.assert_allclose(again.outputs(pixels), want, rtol=1e-5, atol=1e-5)
        with pytest.raises(TypeError, match="trained on uint16") if unit > 1 else contextlib.nullcontext():
            again.outputs(raw)
    floats = net()
    learn(floats, data=DeviceDataset(IMAGES / 255.0, LABELS))
    with pytest.raises(TypeError, match="trained on floating-point pixels"):
        floats.outputs(raw)
    with pytest.raises(ValueError, match="normalization must have a mean"):
        again.load_state_dict(state | {"normalization.std": np.zeros(1)})


# --- a second training ------------------------------------------------------------------------------------------------


def test_epochs_continue_and_a_finished_schedule_is_refused():
    model = net()
    optimizer = SGD(model, schedules.one_cycle(0.1, 8))
    assert [record["epoch"] for record in learn(model, optimizer=optimizer)] == [1, 2]
    before = model.theta.copy()
    with pytest.raises(ValueError, match=r"schedule of 8 rates is used up after 8 steps.*optimizer\.lr"):
        learn(model, optimizer=optimizer)
    np.testing.assert_array_equal(model.theta, before)
    optimizer.lr = schedules.constant(0.05, 4)
    (record,) = learn(model, optimizer=optimizer, epochs=1)
    assert record["epoch"] == 3
    assert record["lr"] == 0.05
    assert (model.theta != before).any()
    optimizer.lr = 0.025
    for _ in range(2):  # a single rate stays
        assert [r["lr"] for r in learn(model, optimizer=optimizer)] == [0.025] * 2
    with pytest.raises(ValueError, match="lr must be finite and not negative"):
        optimizer.lr = -1


@pytest.mark.parametrize(
    ("index", "error", "words"),
    [
        ([0, 60], ValueError, "index must be image numbers in 0 ... 59, got 60 at index 1"),
        ([-1], ValueError, "got -1 at index 0"),
        ([], (ValueError, TypeError), "index must be"),
        ([0.5], TypeError, "integer image numbers"),
        ([[0, 1]], TypeError, "a row of integer image numbers"),
        (3, TypeError, "a row of integer image numbers"),
        ([True], TypeError, "integer image numbers"),
    ],
)
def test_invalid_indices(index, error, words):
    model = net()
    before = model.theta.copy()
    with pytest.raises(error, match=words):
        train_step(model, CrossEntropyLoss(), SGD(model, 0.1), digits(), index)
    np.testing.assert_array_equal(model.theta, before)


def test_train_step_takes_any_index():
    found = []
    for kind in (list, tuple, np.array, np.uint8):
        model = net()
        optimizer = SGD(model, 0.1)
        for index in ([1, 2, 3], [4] * 70, [0], [5, 6, 7]):
            train_step(model, CrossEntropyLoss(), optimizer, digits(), kind(index))
        found.append(model.theta.tobytes())
    assert len(set(found)) == 1


# --- copies -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda one: pickle.loads(pickle.dumps(one))])
@pytest.mark.parametrize("averaged", [False, True])
def test_copies_continue_like_the_originals(duplicate, averaged):
    model = net(Conv2d(1, 3, 3, bias=False), BatchNorm2d(3), ReLU(), MaxPool2d(2), Flatten(), Dropout(0.3),
                Linear(27, 4))  # fmt: skip
    optimizer = Adam(model, schedules.cosine(0.01, 100))
    optimizer = EMA(optimizer, 0.9) if averaged else optimizer
    criterion, data = CrossEntropyLoss(weight=[1, 2, 3, 4]), digits(augment=RandomAffine(degrees=5))
    learn(model, criterion, optimizer, data)
    model.layers[1].training = False
    parts = model, criterion, optimizer, data
    twins = duplicate(parts)
    twin = twins[0]
    assert twin is not model
    assert twins[2].model is twin
    assert [layer.training for layer in twin.layers] == [layer.training for layer in model.layers]
    np.testing.assert_array_equal(twin.grad, model.grad)
    for some in (parts, twins):
        learn(*some)
    assert twin.theta.tobytes() == model.theta.tobytes()
    assert all(np.array_equal(a, b) for a, b in zip(twin.snapshot(), model.snapshot(), strict=True))
    assert not np.shares_memory(twin.theta, model.theta)
    np.testing.assert_equal(twins[2].state_dict(), optimizer.state_dict())
    twin.theta[...] = 0
    assert model.theta.any()


def test_a_copy_keeps_attributes_of_a_subclass():
    class Named(Sequential):
        def __init__(self, name):
            super().__init__(*chain(), input_shape=(1, 8, 8), rng=0)
            self.name = name

    model = Named("mine")
    twin = copy.deepcopy(model)
    assert (type(twin), twin.name) == (Named, "mine")
    np.testing.assert_array_equal(twin(X), model(X))


def test_repr_of_a_plan():
    plan = str(models.lenet5(rng=0).plan(64))
    lines = plan.splitlines()
    assert lines[0] == "64 images, float32"
    assert "reorder to blocked" in lines[2]
    assert lines[3].startswith("  0 Conv2d")
    assert ") + 1 Tanh() + 2 AvgPool2d(kernel_size=(2, 2), stride=(2, 2))  " in lines[3]
    assert lines[3].endswith("fused")
    assert any(line.startswith("  7 Linear(400, 120) + 8 Tanh()") and line.endswith("fused") for line in lines)
    assert "reorder to NCHW 6 Flatten()" in plan
    assert lines[-1].endswith("parameters only")
    unfused = str(models.lenet5(rng=0).plan(64, unfused=True)).splitlines()
    assert not any(line.endswith(" fused") for line in unfused)


# --- regressions ------------------------------------------------------------------------------------------------------


def few(classes=3):
    rng = np.random.default_rng(0)
    return rng.integers(0, 256, (20, 8, 8), np.uint8), np.arange(20) % classes


def one_epoch(model, criterion=None, optimizer=None, data=None, **options):
    criterion, data = criterion or CrossEntropyLoss(), data or DeviceDataset(*few())
    optimizer = optimizer or SGD(model, 0.0)
    return fit(
        model, criterion, optimizer, data, **{"epochs": 1, "batch_size": 4, "rng": 0, "progress": False} | options
    )


@pytest.mark.parametrize("part", ["layer", "activation", "loss", "optimizer"])
def test_a_wrapped_method_runs_every_time(part):
    model, criterion = net(Conv2d(1, 2, 3), Tanh(), AvgPool2d(2), Flatten(), Linear(18, 3)), CrossEntropyLoss()
    optimizer, calls = SGD(model, 0.1), []
    owner, name = {
        "layer": (model[0], "forward"), "activation": (model[1], "forward"), "loss": (criterion, "forward_backward"),
        "optimizer": (optimizer, "step"),
    }[part]  # fmt: skip
    inner = getattr(owner, name)

    @functools.wraps(inner)
    def counted(*args):
        calls.append(name)
        return inner(*args)

    setattr(owner, name, counted)
    one_epoch(model, criterion, optimizer, epochs=3)
    assert len(calls) == 15


def test_the_data_set_copies_labels():
    images, labels = few()
    labels = labels.astype(np.int64)
    data = DeviceDataset(images, labels)
    labels[:] = 7
    assert np.asarray(data.labels).max() == 2


def test_activations_checks_shapes_and_discards_a_forward():
    model, x = net(Flatten(), Dropout(0.5), Linear(64, 3)), np.ones((4, 1, 8, 8))
    for wrong in (x[0], x[:, :, :1]):
        with pytest.raises(ValueError, match="x must have shape"):
            model.activations(wrong)
    for wrong in (np.ones(3), np.ones((1, 3))):
        with pytest.raises(ValueError, match="dy must have the shape of the output"):
            model.activations(x, dy=wrong)
    model.forward(x)
    model.activations(x[:2])
    with pytest.raises(RuntimeError, match="backward needs its own forward"):
        model.backward(np.ones((4, 3)))


def test_a_new_plan_discards_a_forward_of_layers_with_own_buffers():
    class Masked(Layer):
        def reserve(self, k, batch, shape, dtype):
            self.mask = np.zeros((batch, *shape), dtype)

        def forward(self, y, x):
            self.mask[: len(x)] = x > 0
            y[...] = x * self.mask[: len(x)]

        def backward(self, dx, dy, x, y):
            dx[...] = dy * self.mask[: len(x)]

    model, x = net(Flatten(), Linear(64, 3), Masked()), np.ones((4, 1, 8, 8))
    model.forward(x)
    model.plan(128)
    with pytest.raises(RuntimeError, match="backward needs its own forward"):
        model.backward(np.ones((4, 3)))


def test_a_loss_without_classes_has_no_accuracy():
    class Squares(losses.Loss):
        def forward_backward(self, dx, x, target):
            error = x - np.eye(3, dtype=x.dtype)[target]
            dx[...], self._loss[: len(x)] = 2 * error / error.size, (error**2).sum(1) / error.size

    (record,) = one_epoch(net(Flatten(), Linear(64, 3)), Squares())
    assert not {"train_accuracy", "train_mae"} & set(record)
    assert np.isfinite(record["train_loss"])


def test_class_weights_are_read_only():
    weight = np.ones(3, np.float32)
    criterion = CrossEntropyLoss(weight)
    weight[1] = 10
    assert criterion.weight[1] == 1
    with pytest.raises(ValueError, match="read-only"):
        criterion.weight[1] = 10


def test_a_users_loss_validates():
    class Tenfold(CrossEntropyLoss):
        def forward_backward(self, dx, x, target):
            super().forward_backward(dx, x, target)
            self._loss *= 10
            dx *= 10

    data = DeviceDataset(*few())
    (record,) = one_epoch(net(Flatten(), Linear(64, 3)), Tenfold(), data=data, validation=data, batch_size=20)
    assert record["val_loss"] == pytest.approx(record["train_loss"], rel=1e-6)


def test_a_model_with_its_own_forward_is_refused():
    class Own(Sequential):
        def forward(self, x):
            return super().forward(np.zeros_like(x))

    with pytest.raises(TypeError, match="Own overrides forward or backward"):
        one_epoch(Own(Flatten(), Linear(64, 3), rng=0))


def test_numpy_true_stops_training():
    history = one_epoch(net(Flatten(), Linear(64, 3)), epochs=4, on_epoch=lambda record: np.float64(1) > 0)
    assert len(history) == 1


def test_a_view_with_its_own_backward():
    class Reversal(Flatten):
        def forward(self, y, x):
            y[...] = x.reshape(y.shape)

        def backward(self, dx, dy, x, y):
            dx[...] = -dy.reshape(dx.shape)

    class Half(Flatten):
        def backward(self, dx, dy, x, y):
            dx[...] = -dy.reshape(dx.shape)

    x, dy = np.ones((2, 1, 8, 8)), np.ones((2, 3))
    plain = net(Flatten(), Linear(64, 3))
    plain.forward(x)
    want = -plain.backward(dy)
    model = net(Reversal(), Linear(64, 3))
    model.forward(x)
    np.testing.assert_array_equal(model.backward(dy), want)
    model = net(Half(), Linear(64, 3))
    with pytest.raises(RuntimeError, match="Half has no forward"):
        model.forward(x)


def test_weights_set_before_binding():
    layer = Linear(2, 1)
    layer.weight, layer.bias = [[1.0, 2.0]], [0.5]
    np.testing.assert_allclose(Sequential(layer, input_shape=(2,))(np.ones((1, 2))), [[3.5]])
    layer = BatchNorm2d(3)
    layer.running_mean = np.array([0.5])
    with pytest.raises(ValueError, match=r"running_mean of BatchNorm2d.*must have shape \(3,\), got \(1,\)"):
        Sequential(layer, input_shape=(3, 2, 2))


def test_changed_geometry():
    x = np.random.default_rng(0).random((3, 1, 8, 8), dtype=np.float32)
    model, again = (Sequential(Conv2d(1, 2, 3), MaxPool2d(2), rng=0) for _ in range(2))
    model.forward(x)
    model[0].stride, model[1].stride = (2, 2), (1, 1)
    again = Sequential(Conv2d(1, 2, 3, stride=2), MaxPool2d(2, stride=1), rng=0)
    np.testing.assert_array_equal(model.forward(x), again.forward(x))
    with pytest.raises(ValueError, match=r"weight_shape of Conv2d.*cannot change in a model"):
        model[0].weight_shape = (2, 1, 5, 5)
    model = net(Conv2d(1, 2, 3), Flatten(), Linear(72, 3))
    model.forward(x)
    model[0].stride = (2, 2)
    with pytest.raises(ValueError, match=r"layer 2: Linear.*72"):
        model.forward(x)


def test_setting_a_missing_bias():
    model = net(Flatten(), Linear(64, 3, bias=False))
    with pytest.raises(ValueError, match=r"Linear\(64, 3, bias=False\) has no bias"):
        model[1].bias = np.full(3, 10.0, np.float32)


def test_mean_over_no_image_is_nan():
    images, labels = few()
    data = DeviceDataset(images, labels * 0)
    model = net(Flatten(), Linear(64, 3))
    assert math.isnan(evaluate(model, data, CrossEntropyLoss(ignore_index=0))[0])


def test_a_running_model_cannot_be_run_by_its_parts():
    class Asks(Layer):
        def forward(self, y, x):
            model.outputs(np.ones((2, 1, 8, 8)))
            y[...] = x

    model = net(Flatten(), Linear(64, 3), Asks())
    with pytest.raises(RuntimeError, match="the model is running"):
        model.forward(np.ones((2, 1, 8, 8)))
    assert net(Flatten(), Linear(64, 3)).forward(np.ones((2, 1, 8, 8))).shape == (2, 3)


def test_invalid_optimizer_state():
    model = net(Flatten(), Linear(64, 3))
    optimizer = Adam(model)
    state = optimizer.state_dict()
    for name, value in (("_step", np.array([-5])), ("_step", np.array([2.5])), ("m", np.full_like(state["m"], np.nan))):
        with pytest.raises(ValueError, match=f"{name}"):
            optimizer.load_state_dict(state | {name: value})


def test_the_page_on_own_layers_runs(capsys):
    page = (Path(__file__).parents[1] / "docs" / "own_layers.md").read_text(encoding="utf-8")
    names = {}
    for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL):
        exec(compile(block, "docs/own_layers.md", "exec"), names)
    model = names["network"](rng=0)
    assert [type(layer).__name__ for layer in model.layers][1:3] == ["Swish", "Scale"]
    assert names["model"].theta.shape == model.theta.shape  # the last training's
