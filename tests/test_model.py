"""Sequential and the layers: parameters, shapes, buffers, state, and errors."""

import math

import numpy as np
import pytest

from tinycnn import (
    ELU,
    GELU,
    AvgPool2d,
    Conv2d,
    Flatten,
    GaussianRBF,
    Hardtanh,
    LeakyReLU,
    Linear,
    LogSoftmax,
    MaxPool2d,
    ReLU,
    ScaledTanh,
    Sequential,
    Sigmoid,
    Softmax,
    Softplus,
    Tanh,
    kernels,
    models,
)
from tinycnn.layers import Layer

IMAGES = np.random.default_rng(0).standard_normal((21, 1, 28, 28)).astype(np.float32)


def small(**options):
    """A net for images (2, 6, 6), with every kind of layer that has state."""
    chain = Conv2d(2, 3, 3, padding=1), ReLU(), MaxPool2d(2), Flatten(), Linear(27, 5), Tanh(), Linear(5, 4)
    return Sequential(*chain, **{"input_shape": (2, 6, 6), "rng": 1, **options})


X = np.random.default_rng(1).standard_normal((9, 2, 6, 6)).astype(np.float32)

# --- LeNet-5 ----------------------------------------------------------------------------------------------------------

LENET5_STATE = {
    "0.weight": (6, 1, 5, 5),
    "0.bias": (6,),
    "3.weight": (16, 6, 5, 5),
    "3.bias": (16,),
    "7.weight": (120, 400),
    "7.bias": (120,),
    "9.weight": (84, 120),
    "9.bias": (84,),
    "11.weight": (10, 84),
    "11.bias": (10,),
}

LENET5_SUMMARY = """\
layer                                         output shape  parameters  multiply-adds
-------------------------------------------------------------------------------------
input                                         1 x 28 x 28
0 Conv2d(1, 6, kernel_size=(5, 5), padding=(2, 2))  6 x 28 x 28          156        117,600
1 Tanh()                                      6 x 28 x 28
2 AvgPool2d(kernel_size=(2, 2), stride=(2, 2))  6 x 14 x 14
3 Conv2d(6, 16, kernel_size=(5, 5))           16 x 10 x 10       2,416        240,000
4 Tanh()                                      16 x 10 x 10
5 AvgPool2d(kernel_size=(2, 2), stride=(2, 2))  16 x 5 x 5
6 Flatten()                                   400
7 Linear(400, 120)                            120               48,120         48,000
8 Tanh()                                      120
9 Linear(120, 84)                             84                10,164         10,080
10 Tanh()                                     84
11 Linear(84, 10)                             10                   850            840
-------------------------------------------------------------------------------------
total                                                           61,706        416,520
"""


def test_lenet5_has_61706_parameters():
    model = models.lenet5()
    assert model.theta.size == model.grad.size == 61_706
    assert sum(p.size for p in model.parameters()) == 61_706
    adds = [layer.multiply_adds(shape) for layer, shape in zip(model.layers, model.shapes, strict=False)]
    assert sum(adds) == 416_520
    assert model.forward(IMAGES).shape == (21, 10)


def test_lenet5_state_has_the_keys_and_shapes_of_torch():
    state = models.lenet5().state_dict()
    assert {name: value.shape for name, value in state.items()} == LENET5_STATE
    assert list(state) == list(LENET5_STATE)


def test_summary():
    rows = [line.split() for line in LENET5_SUMMARY.splitlines() if not line.startswith("-")]
    text = models.lenet5().summary()
    lines = text.splitlines()
    assert [line.split() for line in lines if not line.startswith("-")] == rows
    assert [i for i, line in enumerate(lines) if set(line) == {"-"}] == [1, len(lines) - 2]
    assert all(line == line.rstrip() for line in lines)
    ends = {len(line) for line in lines if line.split()[-1].replace(",", "").isdigit() and "," in line.split()[-1]}
    assert len(lines[1]) in ends  # numbers are right-aligned
    named = [line for line in lines if "Conv2d" in line or "Linear(400" in line or "total" in line]
    assert {len(line) for line in named} == {len(lines[1])}


def test_summary_needs_a_shape():
    model = Sequential(Conv2d(1, 2, 3), Tanh())
    with pytest.raises(ValueError, match="input_shape is not known yet"):
        model.summary()
    assert "2 x 6 x 4" in model.summary((1, 8, 6))
    with pytest.raises(ValueError, match=r"input_shape is \(1, 8, 6\), got \(1, 9, 9\)"):
        model.summary(input_shape=(1, 9, 9))


@pytest.mark.parametrize("activation", ["tanh", "sigmoid", "relu"])
@pytest.mark.parametrize("pool", ["avg", "max"])
def test_lenet5_options(activation, pool):
    model = models.lenet5(activation, pool, classes=7, rng=1)
    y = model.forward(IMAGES[:2])
    assert y.shape == (2, 7)
    assert np.isfinite(y).all()


@pytest.mark.parametrize(("arguments", "words"), [(("gelu",), "activation must be one of"), (("tanh", "mean"), "pool")])
def test_lenet5_names_a_wrong_argument(arguments, words):
    with pytest.raises(ValueError, match=words):
        models.lenet5(*arguments)


# --- repr -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layer", "text"),
    [
        (Conv2d(1, 6, 5), "Conv2d(1, 6, kernel_size=(5, 5))"),
        (
            Conv2d(4, 6, (3, 2), (2, 1), 1, 2, 2, bias=False),
            "Conv2d(4, 6, kernel_size=(3, 2), stride=(2, 1), padding=(1, 1), dilation=(2, 2), groups=2, bias=False)",
        ),
        (Linear(3, 4), "Linear(3, 4)"),
        (Linear(3, 4, bias=False), "Linear(3, 4, bias=False)"),
        (AvgPool2d(2), "AvgPool2d(kernel_size=(2, 2), stride=(2, 2))"),
        (MaxPool2d(2, 1, "same"), "MaxPool2d(kernel_size=(2, 2), stride=(1, 1), padding='same')"),
        (MaxPool2d(3, 2, 1), "MaxPool2d(kernel_size=(3, 3), stride=(2, 2), padding=(1, 1))"),
        (GaussianRBF(84, 10), "GaussianRBF(84, 10)"),
        (GaussianRBF(84, 10, scale=0.2), "GaussianRBF(84, 10, scale=0.2)"),
        (Flatten(), "Flatten()"),
        (Tanh(), "Tanh()"),
        (Sigmoid(), "Sigmoid()"),
        (ReLU(), "ReLU()"),
        (LeakyReLU(0.2), "LeakyReLU(negative_slope=0.2)"),
        (ELU(0.5), "ELU(alpha=0.5)"),
        (GELU("tanh"), "GELU(approximate='tanh')"),
        (Hardtanh(-2, 3), "Hardtanh(min_val=-2, max_val=3)"),
        (Softplus(2, 10), "Softplus(beta=2, threshold=10)"),
        (ScaledTanh(), "ScaledTanh(A=1.7159, S=0.666667)"),
        (Softmax(), "Softmax(dim=-1)"),
        (LogSoftmax(1), "LogSoftmax(dim=1)"),
    ],
    ids=repr,
)
def test_repr_of_layers(layer, text):
    assert repr(layer) == text


def test_repr_of_a_model():
    assert repr(Sequential(Linear(3, 2), Tanh())) == "Sequential(\n  (0): Linear(3, 2)\n  (1): Tanh()\n)"


# --- parameters -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layer", "fan_in"),
    [(Conv2d(8, 16, (5, 3)), 120), (Conv2d(32, 64, 3, groups=4), 72), (Linear(100, 50), 100), (Linear(1, 2000), 1)],
    ids=repr,
)
def test_initial_values_are_uniform_within_one_over_root_fan_in(layer, fan_in):
    model, bound = Sequential(layer, rng=3, dtype=np.float64), 1 / math.sqrt(fan_in)
    for name, values in model.named_parameters():
        assert np.abs(values).max() <= bound
        if values.size > 1000:
            assert np.abs(values).max() > 0.99 * bound
            assert abs(values.mean()) < 4 * bound / math.sqrt(3 * values.size), name
            assert values.std() == pytest.approx(bound / math.sqrt(3), rel=0.05)
    assert len(np.unique(model.theta)) == model.theta.size


def test_rbf_centres_have_the_scale_as_standard_deviation():
    for scale in (1.0, 0.2, 0.0):
        centres = Sequential(GaussianRBF(84, 100, scale), rng=3, dtype=np.float64).theta
        assert centres.std() == pytest.approx(scale, rel=0.05)
        assert abs(centres.mean()) <= 4 * scale / math.sqrt(centres.size)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_radial_basis_functions_and_their_gradients(dtype):
    """Against NumPy, also for a batch smaller than the last one."""
    model = Sequential(GaussianRBF(6, 4, scale=0.5), input_shape=(6,), rng=0, dtype=dtype)
    rng, centres = np.random.default_rng(1), model[0].weight.astype(np.float64)
    for images in (9, 5):
        x, dy = rng.standard_normal((images, 6)).astype(dtype), rng.standard_normal((images, 4)).astype(dtype)
        between = x[:, None].astype(np.float64) - centres  # (N, O, F)
        want = np.exp(-0.5 * (between**2).sum(axis=2))
        tolerance = 2e-6 if dtype == np.float32 else 1e-13
        np.testing.assert_allclose(model.forward(x), want, rtol=0, atol=tolerance)
        pull = (dy * want)[:, :, None] * between
        np.testing.assert_allclose(model.backward(dy), -pull.sum(axis=1), rtol=0, atol=10 * tolerance)
        np.testing.assert_allclose(model[0].weight_grad, pull.sum(axis=0), rtol=0, atol=10 * tolerance)
        model.grad[...] = np.nan
        model.plan(images).backward()  # without the gradient of x
        np.testing.assert_allclose(model[0].weight_grad, pull.sum(axis=0), rtol=0, atol=10 * tolerance)


def test_radial_basis_functions_against_torch_formula():
    torch = pytest.importorskip("torch")
    model = Sequential(GaussianRBF(6, 4), input_shape=(6,), rng=0, dtype=np.float64)
    x = 0.3 * np.random.default_rng(1).standard_normal((5, 6))
    x_torch, centres = (torch.tensor(a, requires_grad=True) for a in (x, model[0].weight))
    y = torch.exp(-0.5 * torch.cdist(x_torch, centres) ** 2)
    y.square().sum().backward()
    np.testing.assert_allclose(model.forward(x), y.detach().numpy(), rtol=1e-10)
    dx = model.backward(2 * model.forward(x))
    np.testing.assert_allclose(dx, x_torch.grad.numpy(), rtol=1e-8)
    np.testing.assert_allclose(model[0].weight_grad, centres.grad.numpy(), rtol=1e-8)


def test_initial_values_come_from_rng_alone():
    one, same, other = (models.lenet5(rng=seed).theta for seed in (5, 5, 6))
    np.testing.assert_array_equal(one, same)
    assert (one != other).mean() > 0.99
    np.testing.assert_array_equal(models.lenet5(rng=np.random.default_rng(5)).theta, one)
    rng = np.random.default_rng(5)
    first, second = models.lenet5(rng=rng), models.lenet5(rng=rng)  # a generator advances
    np.testing.assert_array_equal(first.theta, one)
    assert (second.theta != one).mean() > 0.99
    assert (models.lenet5().theta != models.lenet5().theta).mean() > 0.99
    np.random.seed(1)  # noqa: NPY002 -- the global state is neither used nor changed
    before = np.random.get_state()[1].copy()  # noqa: NPY002
    models.lenet5()
    np.testing.assert_array_equal(np.random.get_state()[1], before)  # noqa: NPY002
    double = models.lenet5(rng=5, dtype=np.float64).theta
    np.testing.assert_array_equal(double.astype(np.float32), one)  # the same numbers, rounded


def test_parameters_and_gradients_are_views_into_two_vectors():
    model = small()
    assert model.theta.dtype == model.grad.dtype == np.float32
    for number in (0, 4, 6):
        layer = model[number]
        for name in ("weight", "bias"):
            assert np.shares_memory(getattr(layer, name), model.theta)
            assert np.shares_memory(getattr(layer, name + "_grad"), model.grad)
            assert getattr(layer, name + "_grad").shape == getattr(layer, name).shape
    np.testing.assert_array_equal(np.concatenate([p.ravel() for p in model.parameters()]), model.theta)
    model.theta[...] = 0
    np.testing.assert_array_equal(model.forward(X), np.zeros((9, 4)))
    model[6].bias[2] = 7
    assert model.theta[-2] == 7
    np.testing.assert_array_equal(model.forward(X)[:, 2], 7)
    model.grad[...] = np.nan
    model.backward(np.ones((9, 4)))
    assert np.isfinite(model.grad).all()  # every entry is overwritten, not added to
    np.testing.assert_array_equal(model[6].bias_grad, [9] * 4)
    assert [name for name, _ in model.named_parameters()] == list(model.state_dict())


def test_a_layer_without_bias():
    model = Sequential(Conv2d(1, 2, 2, bias=False), Flatten(), Linear(8, 3, bias=False), input_shape=(1, 3, 3), rng=1)
    assert list(model.state_dict()) == ["0.weight", "2.weight"]
    assert model.theta.size == 8 + 24
    assert model.forward(np.zeros((2, 1, 3, 3))).any() == False  # noqa: E712
    model.forward(np.ones((2, 1, 3, 3)))
    model.backward(np.ones((2, 3)))
    assert model.grad.all()


def test_a_model_without_parameters():
    model = Sequential(AvgPool2d(2), Tanh(), Flatten())
    assert model.theta.size == 0
    assert model.state_dict() == {}
    x = np.ones((2, 3, 4, 4), np.float32)
    np.testing.assert_allclose(model(x), np.tanh(np.ones((2, 12))), rtol=1e-6)
    assert model.backward(np.ones((2, 12))).shape == x.shape


# --- state ------------------------------------------------------------------------------------------------------------


def test_state_can_be_loaded_into_another_model():
    one, other = small(rng=1), small(rng=2)
    state = one.state_dict()
    assert other.load_state_dict(state) == ([], [])
    np.testing.assert_array_equal(other.theta, one.theta)
    np.testing.assert_array_equal(other.forward(X), one.forward(X))
    one.theta[...] = 0
    assert all(value.any() for value in state.values())  # copies
    double = small(dtype=np.float64)
    double.load_state_dict(state)
    assert double.theta.dtype == np.float64
    np.testing.assert_array_equal(double.theta, other.theta)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (lambda s: s.pop("0.bias"), KeyError, r"missing keys \['0.bias'\]"),
        (lambda s: s.update({"9.weight": np.ones(3)}), KeyError, r"unexpected keys \['9.weight'\]"),
        (
            lambda s: s.update({"0.weight": s["0.weight"][:2]}),
            ValueError,
            r"0.weight: expected \(3, 2, 3, 3\), got \(2, 2",
        ),
        (lambda s: s.update({"6.weight": s["6.weight"].T}), ValueError, r"6.weight: expected \(4, 5\), got \(5, 4\)"),
        (lambda s: s.update({"6.bias": np.ones((4, 1))}), ValueError, r"6.bias: expected \(4,\), got \(4, 1\)"),
        (lambda s: s.update({"6.bias": np.array([0, 1, np.nan, 0])}), ValueError, r"6.bias must be finite.* \(2,\)"),
        (lambda s: s.update({"6.bias": np.array([None] * 4)}), TypeError, "6.bias must be an array of real numbers"),
        (lambda s: s.update({"6.bias": np.ones(4, complex)}), TypeError, "6.bias must be an array of real numbers"),
    ],
)
def test_a_wrong_state_changes_nothing(change, error, words):
    model, state = small(rng=1), small(rng=2).state_dict()
    change(state)
    before = model.theta.copy()
    with pytest.raises(error, match=words):
        model.load_state_dict(state)
    np.testing.assert_array_equal(model.theta, before)
    if error is not KeyError:
        with pytest.raises(error, match=words):
            model.load_state_dict(state, strict=False)
        np.testing.assert_array_equal(model.theta, before)


def test_errors_name_every_wrong_shape_and_key():
    model = small()
    state = model.state_dict()
    wrong = state | {"0.bias": np.ones(1), "6.bias": np.ones(2)}
    with pytest.raises(ValueError, match=r"0.bias: expected \(3,\), got \(1,\); 6.bias: expected \(4,\), got \(2,\)"):
        model.load_state_dict(wrong)
    state.pop("0.bias")
    state["extra"] = np.ones(1)
    with pytest.raises(KeyError, match=r"missing keys \['0.bias'\], unexpected keys \['extra'\]"):
        model.load_state_dict(state)


def test_partial_state():
    model, other = small(rng=1), small(rng=2).state_dict()
    before = model.state_dict()
    part = {"4.weight": other["4.weight"], "extra": np.ones(1)}
    missing, unexpected = model.load_state_dict(part, strict=False)
    assert unexpected == ["extra"]
    assert missing == [name for name in before if name != "4.weight"]
    for name, value in model.state_dict().items():
        np.testing.assert_array_equal(value, (other if name == "4.weight" else before)[name])


# --- running ----------------------------------------------------------------------------------------------------------


def test_batches_may_grow_and_shrink():
    for make, x in ((small, X), (lambda: models.lenet5(rng=3), IMAGES)):
        model = make()
        alone = np.concatenate([model.forward(image[None]) for image in x])
        for size in (3, len(x), 1, 8, 2, len(x)):
            # other layouts sum in another order
            np.testing.assert_allclose(model.forward(x[:size]), alone[:size], rtol=1e-5, atol=1e-6)
        fresh = make()
        for size in (5, 2, len(x)):
            np.testing.assert_array_equal(
                make().forward(x[:size]), fresh.forward(x[:size])
            )  # independent of earlier batches
            dy = np.cos(fresh.forward(x[:size]))
            other = make()
            other.forward(x[:size])
            np.testing.assert_array_equal(other.backward(dy), fresh.backward(dy))
            np.testing.assert_array_equal(other.grad, fresh.grad)


def test_reserve():
    model = small()
    assert model.max_batch == 0
    model.reserve(9)
    buffer = model.plan(9).x
    want = small().forward(X)
    np.testing.assert_array_equal(model.forward(X), want)
    assert model.max_batch == 9
    model.forward(X[:4])
    assert model.plan(9).x is buffer
    with pytest.raises(ValueError, match="batch must be at least 1, got 0"):
        model.reserve(0)
    with pytest.raises(ValueError, match="input_shape is not known yet"):
        Sequential(Tanh()).reserve(2)


def test_gradients_of_a_batch_are_the_sum_of_those_of_its_images():
    model = small(dtype=np.float64)
    dy = np.cos(model.forward(X))
    dx, grad = model.backward(dy), model.grad.copy()
    total = np.zeros_like(grad)
    for n in range(len(X)):
        model.forward(X[n : n + 1])
        np.testing.assert_allclose(model.backward(dy[n : n + 1]), dx[n : n + 1], rtol=1e-12, atol=1e-15)
        total += model.grad
    np.testing.assert_allclose(grad, total, rtol=1e-10, atol=1e-14)


def test_returned_arrays_are_copies():
    model = small()
    y = model.forward(X)
    dx = model.backward(np.ones((9, 4)))
    kept = y.copy(), dx.copy()
    model.forward(2 * X)
    model.backward(np.full((9, 4), 3))
    model.theta[...] = 0
    np.testing.assert_array_equal(y, kept[0])
    np.testing.assert_array_equal(dx, kept[1])
    y[...] = dx[...] = 0  # writable
    assert model.plan(9).y is not y
    flat = Sequential(Flatten())
    x = np.ones((2, 3), np.float32)
    y = flat.forward(x)
    assert not np.shares_memory(x, y)
    x[...] = 5
    np.testing.assert_array_equal(y, 1)


def test_arguments_are_not_modified():
    model, x = small(), X.copy()
    dy = model.forward(x)
    model.backward(dy.copy())
    np.testing.assert_array_equal(x, X)


def test_predict_in_batches_equals_forward():
    model = models.lenet5(rng=2)
    whole = model.forward(IMAGES)
    for batch_size in (1, 4, 16, 21, 100):
        np.testing.assert_allclose(model.outputs(IMAGES, batch_size), whole, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(model.outputs(IMAGES), whole)
    np.testing.assert_array_equal(model(IMAGES), whole)


@pytest.mark.parametrize("batch_size", [0, -1, 2.5, "8"])
def test_predict_names_a_wrong_batch_size(batch_size):
    with pytest.raises((ValueError, TypeError), match="batch_size must be"):
        small().outputs(X, batch_size)


def test_any_real_dtype_and_layout_of_x():
    model = small()
    whole = (10 * X).astype(np.int8)
    want = model.forward(whole.astype(np.float32))
    for dtype in (np.int8, np.int64, np.float16, np.float64):
        y = model.forward(whole.astype(dtype))
        assert y.dtype == np.float32
        np.testing.assert_array_equal(y, want)
    np.testing.assert_array_equal(model.forward(np.asfortranarray(X)), model.forward(X))
    np.testing.assert_array_equal(model.forward(X.tolist()), model.forward(X))
    np.testing.assert_array_equal(model.forward(X[::-2]), model.forward(X[::-2].copy()))


def test_a_float64_model():
    model, single = small(dtype=np.float64), small()
    assert model.theta.dtype == np.float64
    y = model.forward(X)
    assert y.dtype == np.float64
    np.testing.assert_allclose(y, single.forward(X), rtol=1e-4, atol=1e-6)
    assert model.backward(y).dtype == np.float64
    assert Sequential(Tanh(), dtype="float64").dtype == np.float64


def test_train_and_eval():
    model = small()
    assert model.training
    assert all(layer.training for layer in model.layers)
    assert model.eval() is model
    assert not model.training
    assert not any(layer.training for layer in model.layers)
    assert model.train() is model
    assert all(layer.training for layer in model.layers)
    model.train(False)
    assert not model[0].training


def test_len_and_index():
    model = small()
    assert len(model) == 7
    assert isinstance(model[0], Conv2d)
    assert model[-1].out_features == 4
    assert [type(layer) for layer in model[1:3]] == [ReLU, MaxPool2d]


def test_first_forward_sets_the_input_shape():
    model = small(input_shape=None)
    np.testing.assert_array_equal(model.forward(X), small().forward(X))
    assert model.input_shape == (2, 6, 6)
    assert model.shapes == [(2, 6, 6), (3, 6, 6), (3, 6, 6), (3, 3, 3), (27,), (5,), (5,), (4,)]


def test_find_non_finite():
    model = small()
    model.forward(X)
    plan = model.plan(9)
    assert model.find_non_finite(plan) is None
    plan.x[3] = np.inf
    assert model.find_non_finite(plan) == "the input"
    model.forward(X)
    model[4].weight[2, 3] = np.nan
    assert model.find_non_finite(plan) == "parameter 4.weight of layer 4 Linear(27, 5)"
    model[4].weight[...] = 3e38
    plan.forward()
    assert model.find_non_finite(plan) == "the output of layer 4 Linear(27, 5)"


# --- errors -----------------------------------------------------------------------------------------------------------


class Half(Layer):
    """A layer without methods."""


def test_a_layer_without_forward_or_backward_raises():
    model = Sequential(Half())
    with pytest.raises(RuntimeError, match="Half has no forward"):
        model.forward(np.ones((1, 2)))
    with pytest.raises(RuntimeError, match="Half has no backward"):
        model.plan(1).backward(input_gradient=True)


def shared():
    layer = Tanh()
    return Sequential(Linear(2, 2), layer, Linear(2, 2), layer)


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: Sequential(), ValueError, "at least one layer"),
        (lambda: Sequential(Tanh), TypeError, "layers must be tinycnn layers, got the class"),
        (lambda: Sequential([Tanh()]), TypeError, "layers must be tinycnn layers, got \\["),
        (lambda: Sequential(Sequential(Tanh())), TypeError, "layers must be tinycnn layers"),
        (shared, ValueError, "a layer may be in a Sequential only once"),
        (lambda: small(dtype=np.float16), ValueError, "dtype must be float32 or float64, got .*float16"),
        (lambda: small(dtype=int), ValueError, "dtype must be float32 or float64"),
        (lambda: small(dtype=complex), ValueError, "dtype must be float32 or float64"),
        (lambda: small(device="gpu"), ValueError, "device must be 'auto', 'cpu', 'cuda' or 'cuda:N', got 'gpu'"),
        (lambda: small(device="cuda:x"), ValueError, "device must be .*got 'cuda:x'"),
        (lambda: small(device=0), ValueError, "device must be .*got 0"),
        (lambda: small(input_shape=(2, 6, 0)), ValueError, "input_shape must be at least 1, got 0"),
        (lambda: small(input_shape=(2, 6, 6.0)), TypeError, "input_shape must be an integer, got 6.0"),
        (
            lambda: small(input_shape=(1, 6, 6)),
            ValueError,
            r"layer 0: Conv2d.* takes \(2, height, width\), got \(1, 6, 6\)",
        ),
        (lambda: small(input_shape=(2, 6)), ValueError, r"layer 0: Conv2d.* takes \(2, height, width\), got \(2, 6\)"),
        (lambda: small(input_shape=(2, 8, 8)), ValueError, r"layer 4: Linear\(27, 5\) takes \(27,\), got \(48,\)"),
        (
            lambda: Sequential(Conv2d(1, 6, 5), Linear(864, 10), input_shape=(1, 16, 16)),
            ValueError,
            r"layer 1: Linear\(864, 10\) takes \(864,\), got \(6, 12, 12\); put Flatten\(\) before it",
        ),
        (
            lambda: Sequential(MaxPool2d(3), input_shape=(1, 2, 5)),
            ValueError,
            "layer 0: kernel_size 3 .* padded height of the input is 2",
        ),
        (
            lambda: Sequential(AvgPool2d(2), input_shape=(5,)),
            ValueError,
            r"layer 0: AvgPool2d.*\(channels, height, width\)",
        ),
        (lambda: Sequential(Softmax(), input_shape=(1, 2, 3)), ValueError, r"layer 0: Softmax.* takes \(classes,\)"),
        (lambda: Conv2d(0, 1, 1), ValueError, "in_channels must be at least 1, got 0"),
        (lambda: Conv2d(1, 1.0, 1), TypeError, "out_channels must be an integer, got 1.0"),
        (lambda: Conv2d(1, 1, (1, 2, 3)), ValueError, "kernel_size must be an integer or a pair"),
        (lambda: Conv2d(1, 1, 0), ValueError, "kernel_size must be at least 1"),
        (lambda: Conv2d(1, 1, 1, stride=0), ValueError, "stride must be at least 1"),
        (lambda: Conv2d(1, 1, 1, padding="full"), ValueError, "padding must be one of"),
        (lambda: Conv2d(1, 1, 1, dilation=-1), ValueError, "dilation must be at least 1"),
        (lambda: Conv2d(3, 4, 1, groups=2), ValueError, "in_channels must be divisible by groups, got 3 and 2"),
        (lambda: Conv2d(4, 3, 1, groups=2), ValueError, "out_channels must be divisible by groups, got 3 and 2"),
        (lambda: Linear(True, 1), TypeError, "in_features must be an integer, got True"),
        (lambda: Linear(1, -1), ValueError, "out_features must be at least 1"),
        (lambda: GaussianRBF(0, 1), ValueError, "in_features must be at least 1, got 0"),
        (lambda: GaussianRBF(1, 2.0), TypeError, "out_features must be an integer, got 2.0"),
        (lambda: GaussianRBF(1, 1, scale=-1), ValueError, "scale must be at least 0, got -1"),
        (lambda: Sequential(GaussianRBF(3, 2), input_shape=(4,)), ValueError, r"layer 0: .* takes \(3,\), got \(4,\)"),
        (lambda: AvgPool2d(2, divisor_override=0), ValueError, "divisor_override must be at least 1"),
        (lambda: MaxPool2d(2, 0), ValueError, "stride must be at least 1"),
        (lambda: LeakyReLU("a"), TypeError, "negative_slope must be a number"),
        (lambda: ELU(-1), ValueError, "alpha must be at least 0, got -1"),
        (lambda: ELU("1"), TypeError, "alpha must be a number, got '1'"),
        (lambda: GELU("erf"), ValueError, "approximate must be one of 'none', 'tanh', got 'erf'"),
        (lambda: Hardtanh(1, 1), ValueError, "max_val must be larger than min_val, 1, got 1"),
        (lambda: Hardtanh(2, -1), ValueError, "max_val must be larger than min_val, 2, got -1"),
        (lambda: Hardtanh(np.nan), ValueError, "min_val must be finite, got nan"),
        (lambda: Softplus(0), ValueError, "beta must be positive, got 0"),
        (lambda: Softplus(1, np.inf), ValueError, "threshold must be finite, got inf"),
        (lambda: ScaledTanh(A=0), ValueError, "A must not be 0"),
        (lambda: ScaledTanh(S=np.inf), ValueError, "S must be finite"),
        (lambda: Softmax(0), ValueError, "dim must be one of -1, 1, got 0"),
    ],
)
def test_invalid_models(make, error, words):
    with pytest.raises(error, match=words):
        make()


def test_pooling_padding_over_half_of_the_window():
    with pytest.raises(ValueError, match="padding must be at most half of kernel_size 2, got 2"):
        Sequential(MaxPool2d(2, padding=2), input_shape=(1, 4, 4))


def with_bad(value):
    x = X.copy()
    x[3, 1, 2, 5] = value
    return x


@pytest.mark.parametrize(
    ("x", "error", "words"),
    [
        (with_bad(np.nan), ValueError, r"x must be finite, got nan at index \(3, 1, 2, 5\)"),
        (with_bad(-np.inf), ValueError, r"x must be finite, got -inf at index \(3, 1, 2, 5\)"),
        (X[0], ValueError, r"x must have shape \(N, 2, 6, 6\), got \(2, 6, 6\)"),
        (X[:, :1], ValueError, r"x must have shape \(N, 2, 6, 6\), got \(9, 1, 6, 6\)"),
        (X[:0], ValueError, r"x must not be empty, got shape \(0, 2, 6, 6\)"),
        (X.astype(complex), TypeError, "x must be an array of real numbers, got dtype complex128"),
        (X.astype(object), TypeError, "x must be an array of real numbers, got dtype object"),
        ("an image", TypeError, "x must be an array of real numbers, got dtype <U8"),
    ],
)
def test_invalid_images(x, error, words):
    model = small()
    want = model.forward(X)
    with pytest.raises(error, match=words):
        model.forward(x)
    with pytest.raises(error, match=words):
        small().forward(x)
    np.testing.assert_array_equal(model.plan(9).y, want)  # refused before anything is computed


def test_pixels_too_large_for_float32():
    with pytest.raises(ValueError, match=r"^x must be"):
        small().forward(np.full((1, 2, 6, 6), 1e300))


def test_missing_batch_axis():
    with pytest.raises(ValueError, match=r"x must have a batch axis and the axes of an image, got shape \(3,\)"):
        Sequential(Tanh()).forward(np.ones(3))


def test_a_failed_first_forward_does_not_set_the_input_shape():
    model = small(input_shape=None)
    with pytest.raises(ValueError, match="layer 4"):
        model.forward(np.ones((1, 2, 8, 8)))
    assert model.forward(X).shape == (9, 4)


def test_invalid_backward():
    model = small()
    with pytest.raises(RuntimeError, match="backward needs its own forward"):
        model.backward(np.ones((9, 4)))
    model.forward(X)
    with pytest.raises(ValueError, match=r"dy must have the shape of the last output, \(9, 4\), got \(8, 4\)"):
        model.backward(np.ones((8, 4)))
    with pytest.raises(ValueError, match="dy must have the shape"):
        model.backward(np.ones(9))
    with pytest.raises(TypeError, match="dy must be an array of real numbers"):
        model.backward(np.ones((9, 4), complex))
    model.forward(X[:2])
    assert model.backward(np.ones((2, 4))).shape == (2, 2, 6, 6)


def test_device_cpu_is_tinycnn_kernels():
    assert small(device="cpu").ops is kernels


@pytest.mark.parametrize(("window", "dilation"), [(2, 1), (3, 1), ((2, 3), 1), ((4, 2), 1), (2, 2)])
def test_same_max_pooling(window, dilation):
    """TensorFlow's rule: the larger half of an odd padding is after the image."""
    x = np.random.default_rng(0).standard_normal((2, 3, 6, 5)).astype(np.float32)
    model = Sequential(MaxPool2d(window, 1, "same", dilation), input_shape=(3, 6, 5))
    kernel = (window, window) if isinstance(window, int) else window
    total = [dilation * (k - 1) for k in kernel]
    padded = np.pad(x, ((0, 0), (0, 0), *((t // 2, t - t // 2) for t in total)), constant_values=-np.inf)
    want = np.max(
        [
            padded[:, :, u * dilation :, v * dilation :][:, :, :6, :5]
            for u in range(kernel[0])
            for v in range(kernel[1])
        ],
        0,
    )
    np.testing.assert_array_equal(model.forward(x), want)
    dx = model.backward(np.ones_like(want))
    assert dx.sum() == want.size
    with pytest.raises(ValueError, match="stride of 1"):
        MaxPool2d(2, padding="same")
