"""Plans of evaluation, with folded convolutions: the same outputs and gradients as layer by layer."""

import copy
import pickle

import numpy as np
import pytest
from numpy.testing import assert_array_equal

from tinycnn import (
    AvgPool2d,
    BatchNorm2d,
    Conv2d,
    Dropout,
    Flatten,
    Hardtanh,
    Layer,
    Linear,
    MaxPool2d,
    ReLU,
    ReLU6,
    Residual,
    Sequential,
    Tanh,
)
from tinycnn.plan import FoldedConv2d, FoldedSum

BATCHES = [1, 3, 8, 13, 20]  # NCHW and blocked, in training and in evaluation, with partial blocks
SHAPE = (3, 9, 8)


def conv(inputs, outputs, **options):
    return Conv2d(inputs, outputs, 3, **{"padding": 1} | options)


def block(inputs, outputs, *after, **options):
    return [conv(inputs, outputs, **options), BatchNorm2d(outputs), *after]


NETS = {
    "relu": lambda: block(3, 5, ReLU()),
    "relu6": lambda: block(3, 5, ReLU6(), bias=False),
    "hardtanh": lambda: block(3, 5, Hardtanh(-0.3, 0.7)),
    "tanh": lambda: [*block(3, 5, Tanh()), *block(5, 4)],
    "no batch norm": lambda: [conv(3, 5), ReLU(), conv(5, 5, bias=False), Hardtanh(-0.1, 0.4), conv(5, 2)],
    "max pooling": lambda: [*block(3, 5, ReLU(), MaxPool2d(2)), *block(5, 4, Tanh(), MaxPool2d(2))],
    "max pooling without batch norm": lambda: [conv(3, 5), ReLU(), MaxPool2d(2), conv(5, 4), Tanh(), MaxPool2d(3)],
    "pooling only": lambda: [*block(3, 5), MaxPool2d(2), AvgPool2d(2)],
    "average pooling": lambda: [*block(3, 5, ReLU(), AvgPool2d(2)), *block(5, 4, Tanh(), AvgPool2d(2))],
    "only average pooling": lambda: [conv(3, 5), ReLU(), AvgPool2d(2), conv(5, 4), Tanh(), AvgPool2d(2)],
    "ceil mode": lambda: [*block(3, 5, ReLU(), MaxPool2d(2, ceil_mode=True)), conv(5, 4), ReLU(), MaxPool2d(2)],
    "overlapping": lambda: [*block(3, 5, ReLU(), MaxPool2d(3, 2, padding=1)), conv(5, 4), ReLU(), MaxPool2d(2, 1)],
    "dilated": lambda: [*block(3, 5, ReLU(), MaxPool2d(2, 2, dilation=2)), conv(5, 4), ReLU(), MaxPool2d(2, 2, 0, 2)],
    "not affine": lambda: [conv(3, 5), BatchNorm2d(5, affine=False), ReLU()],
    "batch statistics": lambda: [conv(3, 5), BatchNorm2d(5, track_running_stats=False), ReLU(), *block(5, 4, ReLU())],
    "two batch norms": lambda: [*block(3, 5), BatchNorm2d(5), ReLU(), ReLU6()],
    "batch norm after an activation": lambda: [conv(3, 5), ReLU(), BatchNorm2d(5), BatchNorm2d(5)],
    "strides and groups": lambda: [
        *block(3, 6, ReLU(), stride=2), *block(6, 9, ReLU6(), groups=3, dilation=2, padding=2),
        *block(9, 18, ReLU(), groups=9)
    ],
    "one window": lambda: [Conv2d(3, 5, (9, 8)), BatchNorm2d(5), ReLU()],
    "vectors": lambda: [*block(3, 5, ReLU(), MaxPool2d(2)), Flatten(), Linear(80, 7), ReLU(), Linear(7, 3)],
    "wide": lambda: [*block(3, 18, ReLU()), *block(18, 21, ReLU6()), Residual(*block(21, 21)), ReLU(), conv(21, 17)],
    "residual": lambda: [*block(3, 4, ReLU()), Residual(*block(4, 4, ReLU()), *block(4, 4)), ReLU(), conv(4, 2)],
    "residual, then pooling": lambda: [
        Residual(*block(3, 3)), ReLU(), MaxPool2d(2), Residual(conv(3, 3)), ReLU(), AvgPool2d(2)
    ],
    "residual, then a layer": lambda: [Residual(*block(3, 3)), Tanh(), Residual(conv(3, 3)), Flatten(), Linear(216, 3)],
    "residual of an activation": lambda: [
        Residual(*block(3, 3, ReLU())), ReLU(), Residual(conv(3, 3), Tanh()), Hardtanh()
    ],
    "residual of the input": lambda: [Residual(conv(3, 3))],
    "projection": lambda: [
        Residual(*block(3, 5, ReLU(), stride=2), *block(5, 5), projection=[Conv2d(3, 5, 1, stride=2), BatchNorm2d(5)]),
        ReLU(), Residual(*block(5, 5), projection=[Tanh()]),
        Residual(*block(5, 5), projection=block(5, 5, ReLU6())), ReLU()
    ],
    "projection only": lambda: [
        Residual(AvgPool2d(2), projection=block(3, 3, stride=(2, 2), padding=(0, 1))), ReLU(),
        Residual(Tanh(), projection=conv(3, 3)), ReLU()
    ],
    "nested": lambda: [
        *block(3, 4), Residual(*block(4, 4, ReLU()), Residual(*block(4, 4)), ReLU(), *block(4, 4)), ReLU(), conv(4, 4)
    ],
    "nested last": lambda: [
        Residual(*block(3, 3), Residual(*block(3, 3))), ReLU(),
        Residual(conv(3, 3), Residual(conv(3, 3)), ReLU()), ReLU()
    ],
    "nested first": lambda: [Residual(Residual(*block(3, 3)), *block(3, 3)), ReLU(), Residual(Residual(conv(3, 3)))],
    "nested in a projection": lambda: [
        Residual(*block(3, 3), projection=[Residual(*block(3, 3)), ReLU(), *block(3, 3)]), ReLU6()
    ],
}  # fmt: skip


def make(name_or_layers, shape=SHAPE, dtype=np.float32, seed=0):
    """A model in evaluation mode with statistics and batch norms of any values."""
    chain = NETS[name_or_layers]() if isinstance(name_or_layers, str) else name_or_layers
    model, rng = Sequential(*chain, input_shape=shape, rng=seed, dtype=dtype), np.random.default_rng(seed)
    for _, layer in model.leaves:
        if isinstance(layer, BatchNorm2d):
            if layer.track_running_stats:
                layer.running_mean = rng.standard_normal(layer.channels)
                layer.running_var = rng.uniform(0.3, 3, layer.channels)
            if layer.affine:
                layer.weight, layer.bias = rng.standard_normal((2, layer.channels))
    return model.eval()


def images(batch, shape=SHAPE, seed=1):
    return np.random.default_rng(seed).standard_normal((batch, *shape)).astype(np.float32)


def close(got, want, tolerance=1e-5):
    np.testing.assert_allclose(got, want, rtol=0, atol=tolerance * np.abs(want).max())


def check_forward(model, x):
    """The output, equal to that of one layer after the other."""
    y = model.forward(x)
    with model.unfused():
        close(y, model.forward(x))
    return y


def steps(model, batch):
    return [type(step) for step in model.plan(batch).steps]


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("name", NETS)
def test_same_as_unfused(name, batch):
    model, x = make(name), images(batch)
    y = check_forward(model, x)
    dy = np.random.default_rng(2).standard_normal(y.shape).astype(np.float32)
    assert_array_equal(model.forward(x), y)
    dx, grad = model.backward(dy), model.grad.copy()
    assert_array_equal(model.forward(x), y)  # the backward used the same buffers
    with model.unfused():
        model.forward(x)
        close(dx, model.backward(dy), 1e-4)
        close(grad, model.grad, 1e-4)


@pytest.mark.parametrize("name", NETS)
def test_float64(name):
    model = make(name, dtype=np.float64)
    for batch in (1, 5, 11):
        x = images(batch).astype(np.float64)
        y = model.forward(x)
        with model.unfused():
            close(y, model.forward(x), 1e-13)


def test_what_is_folded():
    """In both layouts; otherwise the other tests would compare training with training."""
    chain = [*block(3, 4, ReLU()), Residual(*block(4, 4, ReLU()), *block(4, 4)), ReLU(), *block(4, 4, Tanh())]
    model = make(chain)
    for batch in (1, 32):
        kinds = steps(model, batch)
        assert kinds.count(FoldedConv2d) == 3
        assert kinds.count(FoldedSum) == 1
        repr(model.plan(batch))
        with model.unfused():
            assert FoldedConv2d not in steps(model, batch)
        model.train()
        assert FoldedConv2d not in steps(model, batch)
        model.eval()


# --- changes between two forwards -------------------------------------------------------------------------------------

CHANGES = {
    "weight": lambda model: model[0].weight.__imul__(2),
    "bias": lambda model: setattr(model[0], "bias", np.arange(5)),
    "bias in place": lambda model: model[0].bias.__iadd__(1),
    "theta": lambda model: setattr(model, "theta", model.theta * 1.5),
    "weight of batch norm": lambda model: model[1].weight.__imul__(-2),
    "bias of batch norm": lambda model: setattr(model[1], "bias", np.arange(5)),
    "running_mean": lambda model: setattr(model[1], "running_mean", np.arange(5)),
    "running_mean in place": lambda model: model[1].running_mean.__iadd__(1),
    "running_var": lambda model: model[1].running_var.__imul__(3),
    "eps": lambda model: setattr(model[1], "eps", 1.0),
    "load_state_dict": lambda model: model.load_state_dict(make([*block(3, 5), Hardtanh(-1, 1)], seed=7).state_dict()),
    "max_val": lambda model: setattr(model[2], "max_val", 3.0),
    "min_val": lambda model: setattr(model[2], "min_val", -3.0),
    "padding": lambda model: setattr(model[0], "padding", (0, 2)),
    "stride": lambda model: setattr(model[0], "stride", (2, 1)),
    "dilation": lambda model: setattr(model[0], "dilation", (2, 2)),
}


@pytest.mark.parametrize("batch", [1, 16])
@pytest.mark.parametrize("name", CHANGES)
def test_changes_are_seen(name, batch):
    model, x = make([*block(3, 5), Hardtanh(-0.5, 0.5)]), images(batch)
    before = check_forward(model, x)
    CHANGES[name](model)
    after = check_forward(model, x)
    assert before.shape != after.shape or np.abs(before - after).max() > 1e-3


@pytest.mark.parametrize("batch", [1, 16])
def test_training_between_two_evaluations(batch):
    """train() and eval() in turn: statistics move in training and are used in evaluation."""
    model, x = make("residual"), images(batch)
    twin = make("residual")
    for _ in range(3):
        y = check_forward(model, x)
        model.train()
        model.forward(x)
        model.eval()
        with twin.unfused():
            close(y, twin.forward(x))
            twin.train()
            twin.forward(x)
            twin.eval()
    for (name, got), (_, want) in zip(model.named_buffers(), twin.named_buffers(), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("batch", [2, 16])
def test_one_batch_norm_in_training(batch):
    model, x = make([*block(3, 5, ReLU()), *block(5, 4, ReLU())]), images(batch)
    folded = check_forward(model, x)
    model[1].training = True
    mean, count = model[1].running_mean.copy(), int(model[1].num_batches_tracked[0])
    y = model.forward(x)
    assert int(model[1].num_batches_tracked[0]) == count + 1
    assert not np.array_equal(mean, model[1].running_mean)
    with model.unfused():
        close(y, model.forward(x))  # does not depend on the running statistics
    model[1].training = False
    assert not np.allclose(check_forward(model, x), folded)
    model[1].training = True
    model.train().eval()
    check_forward(model, x)
    assert not model[1].training


@pytest.mark.parametrize("batch", [2, 16])
def test_backward_does_not_move_statistics(batch):
    """Of a batch norm that is in training mode in a model in evaluation mode: one forward, one update."""
    model, x = make([*block(3, 5, ReLU()), *block(5, 4, ReLU())]), images(batch)
    model[1].training = True
    y = model.forward(x)
    statistics = [np.array(array) for _, array in model.named_buffers()]
    model.backward(y)
    for (name, got), want in zip(model.named_buffers(), statistics, strict=True):
        assert_array_equal(got, want, name)


@pytest.mark.parametrize("batch", [1, 16])
@pytest.mark.parametrize("chain", [lambda: [Dropout(0.5)], lambda: [*block(3, 3, ReLU()), Dropout(0.5)]])
def test_backward_uses_the_mask_of_forward(chain, batch):
    """Of a dropout that is in training mode in a model in evaluation mode (Monte Carlo dropout)."""
    model, x = make(chain()), images(batch)
    dropout = model[-1]
    dropout.training = True
    y = model.forward(x)
    counter = int(dropout._counter[0])
    model.backward(np.ones_like(y))
    assert int(dropout._counter[0]) == counter
    if len(model) == 1:
        assert_array_equal(y != 0, model.backward(np.ones_like(y)) != 0) if not model.plan(batch).fused else None


def test_dropout_gradient_is_of_the_output():
    model, x = make([Dropout(0.5)]), np.abs(images(16)) + 1
    model[0].training = True
    y = model.forward(x)
    assert_array_equal(model.backward(np.ones_like(y)) != 0, y != 0)


@pytest.mark.parametrize("batch", [1, 16])
def test_slices(batch):
    model, x = make("residual"), images(batch)
    features = model[:3].forward(x)
    rest = model[3:]
    assert not rest.training
    close(model.forward(x), rest.forward(features))
    check_forward(model[:4], x)


# --- users' layers ----------------------------------------------------------------------------------------------------


class Twice(Layer):
    """Counts its runs."""

    def __init__(self):
        self.counts = {"forward": 0, "backward": 0}

    def forward(self, y, x):
        self.counts["forward"] += 1
        y[...] = 2 * x

    def backward(self, dx, dy, x, y):
        self.counts["backward"] += 1
        if dx.size:
            dx[...] = 2 * dy


class OwnReLU(ReLU):
    """A builtin layer with another forward."""

    runs = 0

    def forward(self, y, x):
        vars(self)["runs"] = self.runs + 1
        super().forward(y, x)
        y += 1


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("inside", [False, True])
def test_users_layers_run_once(inside, batch):
    twice = Twice()
    middle = Residual(*block(5, 5), twice) if inside else twice
    model, x = make([*block(3, 5, ReLU()), middle, *block(5, 4, ReLU())]), images(batch)
    for run in range(1, 4):
        y = model.forward(x)
        assert twice.counts == {"forward": run, "backward": run - 1}
        dx = model.backward(y)
        assert twice.counts == {"forward": run, "backward": run}
    grad = model.grad.copy()
    with model.unfused():
        want = model.forward(x)
        close(y, want)
        close(dx, model.backward(y), 1e-4)
        close(grad, model.grad, 1e-4)


def test_a_subclass_is_not_folded():
    model, x = make([conv(3, 5), BatchNorm2d(5), OwnReLU()]), images(16)
    y = check_forward(model, x)
    assert y.min() >= 1
    runs = model[2].runs
    model.forward(x)
    model.backward(y)
    assert model[2].runs == runs + 1


@pytest.mark.parametrize(
    "chain", [lambda: [Flatten(), Linear(216, 3)], lambda: [*block(3, 3), Tanh()], lambda: [MaxPool2d(2), Tanh()]]
)
@pytest.mark.parametrize("batch", [1, 16])
def test_a_method_replaced_after_the_first_forward(chain, batch):
    """`layer.forward = hook` on a layer makes it a user's."""
    model, x, calls = make(chain()), images(batch), []
    model.forward(x)
    forward = model[-1].forward

    def hook(y, x):
        calls.append(x.shape)
        forward(y, x)

    model[-1].forward = hook
    y = model.forward(x)
    model.backward(y)
    assert len(calls) == 1


# --- other ways to run a model ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["residual", "vectors", "max pooling"])
def test_evaluating_outputs_and_predict(name):
    model, twin = make(name).train(), make(name)
    x = images(45)
    with twin.unfused():
        want = np.concatenate([twin.forward(x[:20]), twin.forward(x[20:])])
    with model.evaluating():
        close(model.forward(x), want)
    assert model.training
    for size in (1, 7, 20, 256):
        close(model.outputs(x, size), want)
    if want.ndim == 2:
        assert_array_equal(model.predict(x), want.argmax(1))
    assert all(layer.training for _, layer in model.named_layers())
    close(np.concatenate([a.output for a in model.eval().activations(x)[-1:]]), want)
    model.outputs(x)
    with pytest.raises(RuntimeError, match="own forward"):
        model.backward(want)


@pytest.mark.parametrize("name", ["relu", "max pooling", "residual", "projection", "nested", "vectors"])
def test_alternating_plans(name):
    """Training and evaluation of the same batch size share buffers: the same as in separate models."""
    model, training, evaluation = make(name).train(), make(name).train(), make(name)
    for step in range(4):
        x = images(16, seed=step)
        y, want = model.forward(x), training.forward(x)
        assert_array_equal(y, want)
        assert_array_equal(model.backward(np.cos(y)), training.backward(np.cos(y)))
        assert_array_equal(model.grad, training.grad)
        model.theta = training.theta = model.theta - 0.01 * model.grad
        evaluation.load_state_dict(training.state_dict())
        model.eval()
        z = model.forward(x)
        assert_array_equal(z, evaluation.forward(x))
        if step % 2:
            assert_array_equal(model.backward(np.sin(z)), evaluation.backward(np.sin(z)))
            assert_array_equal(model.grad, evaluation.grad)
        model.train()


def test_an_evaluation_between_forward_and_backward_is_refused():
    model, x = make("residual").train(), images(16)
    y = model.forward(x)
    with model.evaluating():
        model.outputs(x)
    with pytest.raises(RuntimeError, match="own forward"):
        model.backward(y)
    model.eval().forward(x)
    model.backward(np.ones_like(y))


@pytest.mark.parametrize("change", [lambda m: m.train(), lambda m: m.reserve(64), lambda m: m.plan(3)])
@pytest.mark.parametrize("batch", [1, 16])
def test_backward_after_something_else(change, batch):
    """The gradient is of the output that forward returned, or there is none."""
    model, x = make("relu"), images(batch)
    y = model.forward(x)
    change(model)
    try:
        dx = model.backward(np.cos(y))
    except RuntimeError:
        return
    twin = make("relu")
    with twin.unfused():
        twin.forward(x)
        close(dx, twin.backward(np.cos(y)), 1e-4)


def test_many_batch_sizes():
    """More plans than a model keeps, in both modes, in turn."""
    model = make("residual")
    for batch in [*range(1, 25), *range(24, 0, -1)]:
        model.train(batch % 3 == 0)
        if model.training:
            model.forward(images(batch))
        else:
            check_forward(model, images(batch))


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
@pytest.mark.parametrize("batch", [1, 16])
def test_copies(duplicate, batch):
    model, x = make("projection"), images(batch)
    y = model.forward(x)
    twin = duplicate(model)
    assert not twin.training
    assert_array_equal(twin.forward(x), y)
    dx = twin.backward(np.cos(y))
    assert_array_equal(model.backward(np.cos(y)), dx)
    twin.theta *= 2
    check_forward(twin, x)
    assert_array_equal(model.forward(x), y)
    twin.train().forward(x)
    assert_array_equal(model.forward(x), y)


def test_frozen_parameters():
    model, x = make("residual"), images(16)
    for _, layer in model.named_layers()[:2]:
        layer.requires_grad = False
    y = check_forward(model, x)
    model.forward(x)
    dx, grad = model.backward(np.cos(y)), model.grad.copy()
    with model.unfused():
        model.forward(x)
        close(dx, model.backward(np.cos(y)), 1e-4)
        close(grad, model.grad, 1e-4)


def test_negative_zero_and_infinite_statistics():
    """A variance of zero with eps, weights of zero, and a mean much larger than the deviation."""
    model, x = make(block(3, 5, ReLU())), images(16)
    model[1].running_var = [0, 1e-12, 1, 1e12, 0.5]
    model[1].weight = [1, 0, 1, -1, 1e-3]
    check_forward(model, x)
    model[1].running_mean = [100, 0, -100, 3, 0]
    check_forward(model, x)
