"""Residual: gradients, layouts, in-place use, names, freezing, and what is refused."""

import copy

import numpy as np
import pytest

from tinycnn import (
    SGD,
    AvgPool2d,
    BatchNorm2d,
    Conv2d,
    CrossEntropyLoss,
    DeviceDataset,
    Flatten,
    Layer,
    Linear,
    MaxPool2d,
    ReLU,
    Residual,
    Sequential,
    Tanh,
    fit,
    functional as F,
    gradcheck_model,
    models,
)

RNG = np.random.default_rng(0)


class Twice(Layer):
    """A user's layer, in NumPy: NCHW only."""

    def forward(self, y, x):
        y[...] = 2 * x

    def backward(self, dx, dy, x, y):
        if dx.size:
            dx[...] = 2 * dy


def conv(a, b, **options):
    return Conv2d(a, b, 3, padding=1, **options)


# Every way in which a Residual's ends meet what is beside them: in place or not, fused, views, blocked or not, nested.
CHAINS = {
    "identity": lambda: [conv(2, 2), Residual(conv(2, 2), Tanh(), conv(2, 2)), Tanh()],
    "first": lambda: [Residual(conv(2, 2)), Tanh()],
    "ends in place": lambda: [conv(2, 2), Residual(conv(2, 2), Tanh()), conv(2, 2)],
    "two in a row": lambda: [conv(2, 2), Residual(conv(2, 2)), Residual(conv(2, 2)), Tanh()],
    "in place between": lambda: [conv(2, 2), Residual(conv(2, 2)), Tanh(), Residual(conv(2, 2)), Tanh()],
    "fused after": lambda: [conv(2, 2), Residual(conv(2, 2)), Tanh(), AvgPool2d(2)],
    "fused before": lambda: [conv(2, 2), Tanh(), MaxPool2d(2), Residual(conv(2, 2), Tanh(), conv(2, 2)), Tanh()],
    "fused inside": lambda: [
        Residual(conv(2, 3), Tanh(), AvgPool2d(2), projection=Conv2d(2, 3, 2, stride=2)), Tanh()
    ],
    "projection": lambda: [
        conv(2, 2), Residual(conv(2, 4, stride=2), Tanh(), conv(4, 4), projection=Conv2d(2, 4, 1, stride=2)), Tanh()
    ],
    "projection of two": lambda: [
        conv(2, 2), Tanh(), Residual(conv(2, 3), projection=[Conv2d(2, 3, 1), Tanh()]), Residual(conv(3, 3)), Tanh()
    ],
    "nested first": lambda: [conv(2, 2), Residual(Residual(conv(2, 2), Tanh()), conv(2, 2)), Tanh()],
    "nested last": lambda: [conv(2, 2), Residual(conv(2, 2), Residual(Tanh(), conv(2, 2))), Tanh()],
    "only a Residual": lambda: [conv(2, 2), Residual(Residual(Tanh())), conv(2, 2)],
    "nested in projection": lambda: [
        conv(2, 2), Residual(conv(2, 2), projection=[Tanh(), Residual(conv(2, 2))]), Tanh(), Residual(conv(2, 2))
    ],
    "user's layer last": lambda: [conv(2, 2), Residual(conv(2, 2), Twice()), Tanh()],
    "user's layer only": lambda: [conv(2, 2), Residual(Twice()), Tanh()],
    "user's layer in projection": lambda: [conv(2, 2), Residual(conv(2, 2), projection=[Twice()]), conv(2, 2)],
    "view": lambda: [conv(2, 2), Residual(Flatten(), projection=[Tanh(), Flatten()]), Residual(Tanh(), Linear(72, 72))],
    "Linear last": lambda: [Flatten(), Residual(Linear(72, 72), Tanh()), Linear(72, 3)],
    "Linear in projection": lambda: [Flatten(), Residual(Linear(72, 3), projection=[Linear(72, 3), Tanh()])],
    "views only": lambda: [conv(2, 2), Residual(Flatten(), projection=Flatten())],
}  # fmt: skip


def run_by_hand(layers, x, parameters):
    """Output in float64 by the functions of `functional`; `parameters`: an iterator over (weight, bias)."""
    for layer in layers:
        if isinstance(layer, Residual):
            y = run_by_hand(layer.layers, x, parameters)
            x = y + run_by_hand(layer.projection, x, parameters)
        elif isinstance(layer, Conv2d):
            x = F.conv2d(x, *next(parameters), stride=layer.stride, padding=layer.padding)
        elif isinstance(layer, Linear):
            x = F.linear(x, *next(parameters))
        elif isinstance(layer, AvgPool2d):
            x = F.avg_pool2d(x, layer.kernel_size)
        elif isinstance(layer, MaxPool2d):
            x = F.max_pool2d(x, layer.kernel_size)
        else:
            x = {Tanh: np.tanh, ReLU: lambda v: np.maximum(v, 0), Twice: lambda v: 2 * v, Flatten: F_flatten}[
                type(layer)
            ](x)
    return x


def F_flatten(x):
    return x.reshape(len(x), -1)


@pytest.mark.parametrize("chain", CHAINS)
@pytest.mark.parametrize("batch", [1, 19])
def test_gradients_and_output(chain, batch):
    model = Sequential(*CHAINS[chain](), input_shape=(2, 6, 6), rng=1, dtype=np.float64)
    x = RNG.normal(size=(batch, 2, 6, 6))
    views = iter(model.parameters())
    parameters = iter([(np.array(w), np.array(b)) for w, b in zip(views, views, strict=True)])
    np.testing.assert_allclose(model(x), run_by_hand(model.layers, x, parameters), atol=1e-12)
    assert gradcheck_model(model, x) < 1e-6


@pytest.mark.parametrize("chain", CHAINS)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_fused_in_place_and_blocked_equal_unfused(chain, dtype):
    """The plan of a batch, with and without the gradient of the input, against the unfused plan of NCHW arrays."""
    model = Sequential(*CHAINS[chain](), input_shape=(2, 6, 6), rng=1, dtype=dtype)
    x = RNG.normal(size=(37, 2, 6, 6)).astype(dtype)
    y = model(x)
    dy = RNG.normal(size=y.shape).astype(dtype)
    dx, grad = model.backward(dy), np.array(model.grad)
    with model.unfused():
        np.testing.assert_allclose(y, model(x), rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(dx, model.backward(dy), rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(grad, model.grad, rtol=1e-4, atol=1e-4)
        np.testing.assert_array_equal(model.backward(dy), model.backward(dy))
    plan = model.plan(37)
    model(x)
    plan.dy[...] = dy
    model.grad[...] = np.nan
    plan.backward()
    np.testing.assert_array_equal(model.grad, grad)


def test_names_shapes_and_text():
    model = Sequential(*CHAINS["projection"](), Flatten(), Linear(36, 3), input_shape=(2, 6, 6), rng=1)
    names = [name for name, _ in model.named_parameters()]
    assert names == [
        "0.weight", "0.bias", "1.layers.0.weight", "1.layers.0.bias", "1.layers.2.weight", "1.layers.2.bias",
        "1.projection.0.weight", "1.projection.0.bias", "4.weight", "4.bias",
    ]  # fmt: skip
    assert list(model.state_dict()) == names
    assert model.shapes[1:3] == [(2, 6, 6), (4, 3, 3)]
    assert "(1): Residual:\n    (1.layers.0): Conv2d" in repr(model)
    assert f"{len(model.theta):,}" in model.summary().splitlines()[-1]
    assert "fork" in repr(model.plan(16))
    assert repr(model[1]).startswith("Residual(Conv2d(2, 4")


def test_equals_torchs_names_with_statistics():
    model = Sequential(Residual(Conv2d(1, 1, 1), BatchNorm2d(1)), Flatten(), input_shape=(1, 2, 2))
    assert list(model.state_dict()) == [
        "0.layers.0.weight", "0.layers.0.bias", "0.layers.1.weight", "0.layers.1.bias", "0.layers.1.running_mean",
        "0.layers.1.running_var", "0.layers.1.num_batches_tracked",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Residual(), "at least one layer"),
        (lambda: Residual(3), "layers must be tinycnn layers, got 3"),
        (lambda: Residual(Tanh(), projection=3), "projection must be a layer, or a list of layers, got 3"),
        (lambda: Sequential(Residual(conv(2, 3)), input_shape=(2, 6, 6)), r"give \(3, 6, 6\) and its input has \(2, 6"),
        (
            lambda: Sequential(Residual(conv(2, 3), projection=conv(2, 4)), input_shape=(2, 6, 6)),
            r"its projection has \(4, 6, 6\)",
        ),
        (
            lambda: Sequential(Tanh(), Residual(conv(4, 4)), input_shape=(2, 6, 6)),
            "layer 1: layers of Residual: layer 0",
        ),
        (lambda: Sequential(*[Residual(Tanh())] * 2), "only once"),
        (lambda: Sequential(Residual(Sequential(Tanh())[0])), "layer 0.layers.0, .* belongs to a model"),
    ],
)
def test_refused_by_name(make, message):
    with pytest.raises((ValueError, TypeError), match=message):
        make()


def test_copies_freezing_and_modes():
    model = Sequential(*CHAINS["projection"](), Flatten(), Linear(36, 3), input_shape=(2, 6, 6), rng=1)
    model[1].requires_grad = False
    assert not any(layer.requires_grad for layer in model[1].layers + model[1].projection)
    other = copy.deepcopy(model)
    x = RNG.normal(size=(5, 2, 6, 6))
    np.testing.assert_array_equal(model(x), other(x))
    assert not other[1].layers[0].requires_grad
    other.eval()
    assert not other[1].layers[0].training
    with pytest.raises(ValueError, match="cannot change in a model"):
        model[1].layers = ()


def digits(n=64):
    images = np.random.default_rng(5).integers(0, 256, (n, 1, 8, 8), dtype=np.uint8)
    return DeviceDataset(
        images, (images[:, 0, :, :4].mean(axis=(1, 2)) > images[:, 0, :, 4:].mean(axis=(1, 2))).astype(int)
    )


def test_trains_recorded_as_unrecorded():
    def trained(*extra):
        model = Sequential(
            Conv2d(1, 4, 3, padding=1), BatchNorm2d(4), ReLU(),
            Residual(conv(4, 4), BatchNorm2d(4), ReLU(), *extra, conv(4, 4), BatchNorm2d(4)), ReLU(),
            Residual(conv(4, 8, stride=2), BatchNorm2d(8), projection=[Conv2d(4, 8, 1, stride=2), BatchNorm2d(8)]),
            ReLU(), AvgPool2d(4), Flatten(), Linear(8, 2), input_shape=(1, 8, 8), rng=3,
        )  # fmt: skip
        history = fit(
            model, CrossEntropyLoss(), SGD(model, lr=0.1, momentum=0.9), digits(), epochs=8, batch_size=16, rng=0
        )
        return model, history

    class Same(Layer):
        def forward(self, y, x):
            y[...] = x

        def backward(self, dx, dy, x, y):
            if dx.size:
                dx[...] = dy

    model, history = trained()
    assert history[-1]["train_loss"] < 0.6 * history[0]["train_loss"]
    np.testing.assert_allclose(trained(Same())[0].theta, model.theta, rtol=1e-3, atol=1e-4)


# --- frozen layers ----------------------------------------------------------------------------------------------------


def test_a_frozen_layer_below_costs_no_backward():
    model = Sequential(conv(2, 2), Tanh(), conv(2, 2), Flatten(), Linear(72, 3), input_shape=(2, 6, 6), rng=1)
    x, dy = RNG.normal(size=(5, 2, 6, 6)), RNG.normal(size=(5, 3))
    model(x)
    full_dx, full = model.backward(dy), np.array(model.grad)
    model[0].requires_grad = False
    assert "parameters only" in repr(model.plan(5)).splitlines()[-1]
    assert "2 Conv2d" in repr(model.plan(5)).splitlines()[-1]
    model(x)
    np.testing.assert_array_equal(model.backward(dy), full_dx)  # the input's gradient is still there
    frozen = model[0].weight.size + 2
    assert not model.grad[:frozen].any()
    np.testing.assert_array_equal(model.grad[frozen:], full[frozen:])
    model[0].requires_grad = True
    model(x)
    model.backward(dy)
    np.testing.assert_array_equal(model.grad, full)
    model[2].requires_grad = False  # between two that are trained
    model(x)
    model.backward(dy)
    np.testing.assert_array_equal(model.grad[:frozen], full[:frozen])
    assert not model[2]._grad_views["weight_grad"].any()
    with pytest.raises(TypeError, match=r"requires_grad of Conv2d.* must be True or False"):
        model[2].requires_grad = 0


def test_freezing_of_a_projection_only():
    model = Sequential(*CHAINS["projection"](), Flatten(), Linear(36, 3), input_shape=(2, 6, 6), rng=1)
    x, dy = RNG.normal(size=(5, 2, 6, 6)), RNG.normal(size=(5, 3))
    model(x)
    model.backward(dy)
    full = np.array(model.grad)
    model[0].requires_grad = False
    model[1].projection[0].requires_grad = False
    plan = model.plan(5)
    model(x)
    plan.dy[...] = dy
    model.grad[...] = 0
    plan.backward()
    for parameter in model.parameter_table:
        trained = parameter.layer.requires_grad
        expected = full[parameter.start : parameter.stop] if trained else 0
        np.testing.assert_array_equal(model.grad[parameter.start : parameter.stop], expected)


# --- slices, replace --------------------------------------------------------------------------------------------------


def test_a_slice_shares_weights():
    model = Sequential(*CHAINS["projection"](), Flatten(), Linear(36, 3), input_shape=(2, 6, 6), rng=1)
    x = RNG.normal(size=(5, 2, 6, 6)).astype(np.float32)
    features, head = model[:-1], model[-1:]
    np.testing.assert_array_equal(head(features(x)), model(x))
    assert list(features) == list(model.layers[:-1])
    assert head.named_parameters()[0][0] == "0.weight"
    head.theta = np.zeros(len(head.theta))
    assert not model(x).any()
    assert not np.asarray(model[-1].weight).any()
    SGD(features, lr=1.0)
    for part in (slice(3, 3), slice(None, None, 2), slice(None, None, -1)):
        with pytest.raises(ValueError, match="neighbouring layers"):
            model[part]
    with pytest.raises(IndexError, match=r"index must be in -5 \.\.\. 4, got 5"):
        model[5]


def test_a_slice_between_forward_and_backward_is_refused():
    model = Sequential(*CHAINS["identity"](), input_shape=(2, 6, 6), rng=1)
    x = RNG.normal(size=(5, 2, 6, 6))
    y = model(x)
    model[:1](x)
    with pytest.raises(RuntimeError, match="its own forward"):
        model.backward(y)


def test_replace_makes_a_new_model():
    model = Sequential(*CHAINS["projection"](), Flatten(), Linear(36, 3), input_shape=(2, 6, 6), rng=1)
    model[0].requires_grad = False
    model.class_names = ["a", "b", "c"]
    new = model.replace(-1, Linear(36, 8), Tanh(), Linear(8, 7), rng=2)
    x = RNG.normal(size=(5, 2, 6, 6)).astype(np.float32)
    assert new(x).shape == (5, 7)
    np.testing.assert_array_equal(new[:-3](x), model[:-1](x))
    assert new.class_names is None
    assert not new[0].requires_grad
    new.theta = np.zeros(len(new.theta))
    assert model(x).any()
    with pytest.raises(ValueError, match="layer 4: Linear"):
        model.replace(-1, Linear(35, 3))
    with pytest.raises(IndexError, match="index"):
        model.replace(9, Linear(36, 3))


# --- ResNet-20 --------------------------------------------------------------------------------------------------------


def test_resnet20():
    model = models.resnet20(rng=0)
    assert len(model.theta) == 272_474
    assert model.shapes[-3:] == [(64, 1, 1), (64,), (10,)]
    small = models.resnet20(classes=3, input_shape=(1, 7, 9), rng=1, dtype=np.float64)
    x = np.random.default_rng(3).normal(size=(6, 1, 7, 9))
    # Both are fixed: with others, one difference in three steps over the kink of a ReLU.
    assert gradcheck_model(small, x, eps=1e-7, rtol=1e-4, rng=0) < 1e-4
