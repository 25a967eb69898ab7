"""Captured steps on the CPU give the bits of the step itself; steps with foreign code are not captured."""

import copy

import numpy as np
import pytest

from tinycnn import (
    EMA,
    SGD,
    AdamW,
    ColorJitter,
    CrossEntropyLoss,
    DeviceDataset,
    ElasticTransform,
    RandomAffine,
    Sequential,
    fit,
    kernels,
    layers,
    lecun98,
    losses,
    train,
)
from tinycnn.dataset import DataLoader
from tinycnn.kernels import _capture
from tinycnn.plan import Plan

STEPS = 5
TABLE = np.array([[True, False, True], [True, True, True], [False, True, True]])

# name: (layers, loss, optimizer)
NETS = {
    "convolutions": (
        [
            layers.Conv2d(1, 3, 3, padding=1), layers.BatchNorm2d(3), layers.ReLU(), layers.MaxPool2d(2),
            layers.Conv2d(3, 4, 3, stride=2, groups=1), layers.GroupNorm(2, 4), layers.LeakyReLU(),
            layers.Dropout2d(0.3), layers.Flatten(), layers.Linear(4, 9), layers.Tanh(), layers.Dropout(0.2),
            layers.Linear(9, 4),
        ],
        CrossEntropyLoss(label_smoothing=0.1),
        lambda model: EMA(AdamW(model, np.geomspace(1e-2, 1e-3, STEPS)), 0.9),
    ),
    "1998": (
        [
            layers.Conv2d(1, 3, 3), lecun98.ScaledTanh(), lecun98.Subsample(3, 2), lecun98.MappedConv2d(TABLE, 2),
            layers.Sigmoid(), layers.AvgPool2d(2, 1), layers.Flatten(), layers.Linear(3, 6),
            lecun98.EuclideanRBF(np.random.default_rng(0).choice([-1.0, 1.0], (4, 6))),
        ],
        lecun98.RBFLoss(rubbish=1.0),
        lambda model: SGD(model, 1e-2, momentum=0.9),
    ),
    "functions of a whole row": (
        [layers.Flatten(), layers.Softmax(), layers.Linear(64, 5), layers.GaussianRBF(5, 4, 0.3)],
        losses.OneHotMSELoss(),
        lambda model: SGD(model, 1e-2),
    ),
    "an activation that cannot work in place": (
        [layers.Tanh(), layers.Flatten(), layers.Linear(64, 4), layers.LogSoftmax()],
        losses.OneHotMSELoss(),
        lambda model: SGD(model, 1e-2),
    ),
}  # fmt: skip


def images(count):
    rng = np.random.default_rng(4)
    distortions = RandomAffine(degrees=10), ElasticTransform(), ColorJitter(brightness=0.1)
    labels = np.arange(count) % 4
    labels.flags.writeable = False  # as those of a file may be
    return DeviceDataset(rng.integers(0, 256, (count, 8, 8), np.uint8), labels, augment=distortions)


def made(chain, criterion, optimizer, batch):
    """(run, function that returns all state that its steps change)"""
    model, batches = Sequential(*copy.deepcopy(chain), rng=1), images(STEPS * batch)
    model.set_input_shape(batches.image_shape)
    rule = optimizer(model)
    run = train.StepRunner(model, copy.deepcopy(criterion), DataLoader(batches, augment=True), rule)
    run.start_epoch(np.random.default_rng(3).permutation(STEPS * batch))

    def state():
        arrays = [run.totals, run.loader.cursor, *model.snapshot(), *rule.state_dict().values()]
        return [np.array(a).tobytes() for a in arrays]

    return run, state


@pytest.mark.parametrize("batch", [3, 40])
@pytest.mark.parametrize("net", NETS)
def test_a_captured_step_has_the_bits_of_the_step(net, batch, monkeypatch):
    run, state = made(*NETS[net], batch)
    want = []
    for _ in range(STEPS):
        run.step(batch)
        want.append(state())
    run, state = made(*NETS[net], batch)
    for number in range(STEPS):
        if number == 1:  # replays call no layer
            monkeypatch.setattr(Plan, "forward", None)
        run.replay(batch)
        assert state() == want[number], f"after step {number + 1}"
    assert len(set(map(tuple, want))) == STEPS


class InNumPy(losses.OneHotMSELoss):
    """A loss with Python code of its own."""

    def forward_backward(self, dx, x, target):
        super().forward_backward(dx, x, target)
        dx *= 0.5


def test_a_step_with_foreign_code_is_never_captured():
    chain, _, optimizer = NETS["functions of a whole row"]
    states = []
    for replay in (False, True):
        run, state = made(chain, InNumPy(), optimizer, 40)
        for _ in range(STEPS):
            run.replay(40) if replay else run.step(40)
        states.append(state())
    assert states[0] == states[1]
    ((_, capture),) = run.captures.values()
    assert not isinstance(capture.run, _capture.CapturedStep)


def test_an_error_ends_the_capture():
    def step():
        kernels.increment(counter)
        if counter[0] == 1:
            raise KeyboardInterrupt

    counter = np.zeros(1, np.int64)
    captured = kernels.capture(step)
    with pytest.raises(KeyboardInterrupt):
        captured()
    assert _capture.trace.calls is None
    for _ in range(3):
        captured()
    assert counter == [4]
    assert len(captured.calls) == 1


def test_what_on_epoch_changes_is_seen(monkeypatch):
    batches = images(40)
    states = []
    for capture in (lambda step: step, kernels.capture):
        monkeypatch.setattr(kernels, "capture", capture)
        model = Sequential(layers.Flatten(), layers.Linear(64, 9), layers.Dropout(0.0), layers.Linear(9, 4), rng=1)
        batches.augmentation.batch_count = 0

        def more_dropout(record, model=model):
            model.layers[2].p = 0.5

        fit(model, CrossEntropyLoss(), SGD(model, 0.1), batches, epochs=2, batch_size=8, rng=0, on_epoch=more_dropout)
        states.append(model.theta.tobytes())
    assert states[0] == states[1]


# --- inference --------------------------------------------------------------------------------------------------------

X = np.random.default_rng(5).standard_normal((40, 1, 8, 8)).astype(np.float32)


def chain():
    return [
        layers.Conv2d(1, 3, 3), layers.LeakyReLU(0.1), layers.BatchNorm2d(3), layers.MaxPool2d(2), layers.Flatten(),
        layers.Linear(27, 4), layers.Dropout(0.5),
    ]  # fmt: skip


def reference_output(model, x):
    """The output of the model without captures."""
    model.clear_plans()
    return model(x)


@pytest.mark.parametrize("batch", [1, 5, 40])
def test_inference_is_replayed_until_something_changes(batch, monkeypatch):
    model, other = (Sequential(*chain(), input_shape=(1, 8, 8), rng=2).eval() for _ in range(2))
    x, plan_forward = X[:batch], Plan.forward
    ran = []
    monkeypatch.setattr(Plan, "forward", lambda self: (ran.append(self.model), plan_forward(self))[1])

    def same_four_times(replayed=True):
        for number in range(4):
            assert model(x).tobytes() == reference_output(other, x).tobytes(), f"call {number + 1}"
        ran.clear()
        assert model(x[::-1]).tobytes() == reference_output(other, x[::-1]).tobytes()
        assert ran == ([other] if replayed else [model, other])

    same_four_times()
    for m in (model, other):
        m.theta *= 0.5  # replays see it
    same_four_times()
    for m in (model, other):
        m.layers[1].negative_slope = 0.3
    same_four_times()
    for m in (model, other):
        m.train()  # statistics and masks of every batch are new
    same_four_times()
    for m in (model, other):
        m.eval()
        m.reserve(50)
    same_four_times()
    forward = layers.Linear.forward
    for m in (model, other):
        m.layers[5].forward = lambda y, x, layer=m.layers[5]: (forward(layer, y, x), np.negative(y, out=y))
    same_four_times(replayed=False)


def test_batches_of_changing_sizes():
    model, other = (Sequential(*chain(), input_shape=(1, 8, 8), rng=2).eval() for _ in range(2))
    for batch in (1, 40, 1, 40, 1, 1, 1, 1, 40, 40, 40, 3, 1):
        assert model(X[:batch]).tobytes() == reference_output(other, X[:batch]).tobytes()
