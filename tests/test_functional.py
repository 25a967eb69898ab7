"""tinycnn.functional, tinycnn.optim and tinycnn.schedules against answers of PyTorch (by make_torch_answers.py), and
invalid arguments of tinycnn.functional."""

import json
from pathlib import Path

import numpy as np
import pytest
import reference

from tinycnn import CrossEntropyLoss, Linear, Sequential, Tanh, functional, optim, schedules


def read_answers():
    with np.load(Path(reference.__file__).with_name("torch_answers.npz"), allow_pickle=False) as file:
        about, flat = json.loads(str(file["about"])), {kind: file[kind] for kind in ("float32", "float64", "int64")}
    arrays = {
        name: flat[kind][start : start + int(np.prod(shape))].reshape(shape)
        for name, (kind, start, shape) in about["arrays"].items()
    }
    return about, arrays


ABOUT, ANSWERS = read_answers()


def pairs(options):
    """JSON has no tuples."""
    return {name: tuple(value) if isinstance(value, list) else value for name, value in options.items()}


# --- known answers ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("case", ABOUT["cases"], ids=lambda case: case["name"])
def test_known_answers(case, dtype):
    """Values and gradients; in float32 relative to the largest entry, because of cancellation in sums."""
    name, options = case["name"], pairs(case["options"])
    inputs = [ANSWERS[f"{name}.input{i}"].astype(dtype) for i in range(case["inputs"])]
    fixed = {key: ANSWERS[f"{name}.fixed.{key}"] for key in case["fixed"]}
    want, dy = ANSWERS[f"{name}.y"], ANSWERS[f"{name}.dy"].astype(dtype)

    def check(got, want, what):
        tolerance = 1e-12 if dtype == np.float64 else 2e-6
        np.testing.assert_allclose(got, want, rtol=tolerance, atol=tolerance * np.abs(want).max(), err_msg=what)

    y = getattr(functional, case["function"])(*inputs, **fixed, **options)
    if options.pop("return_indices", False):
        y, indices = y
        np.testing.assert_array_equal(indices, ANSWERS[f"{name}.indices"])
        assert indices.dtype == np.int64
    if want.ndim:
        assert y.dtype == dtype
    assert np.shape(y) == want.shape
    check(y, want, "y")
    gradients = getattr(functional, case["function"] + "_backward")(dy, *inputs, **fixed, **options)
    gradients = gradients if isinstance(gradients, tuple) else (gradients,)
    for number in range(case["inputs"]):
        assert gradients[number].dtype == dtype
        assert gradients[number].shape == inputs[number].shape
        check(gradients[number], ANSWERS[f"{name}.gradient{number}"], f"gradient {number}")
    assert all(g is None for g in gradients[case["inputs"] :])


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_dropout_with_a_mask(dtype):
    rng = np.random.default_rng(0)
    x, dy = rng.standard_normal((2, 3, 4, 5, 6)).astype(dtype)
    for mask in (rng.random(x.shape) >= 0.25, rng.random((3, 4, 1, 1)) >= 0.25):
        y, dx = functional.dropout(x, mask, 0.25), functional.dropout_backward(dy, x, mask, 0.25)
        assert y.dtype == dx.dtype == dtype
        np.testing.assert_allclose(y, np.where(mask, x / 0.75, 0), rtol=1e-6)
        np.testing.assert_allclose(dx, np.where(mask, dy / 0.75, 0), rtol=1e-6)
    for mask, error in ((x, TypeError), (np.ones((3, 4), bool), ValueError)):
        with pytest.raises(error, match="mask must"):
            functional.dropout(x, mask)


def test_batch_norm_updates_the_running_statistics_in_place():
    x, mean, var = np.random.default_rng(0).standard_normal((50, 3)), np.zeros(3), np.ones(3)
    functional.batch_norm(x, mean, var, training=True, momentum=0.5)
    np.testing.assert_allclose(mean, x.mean(0) / 2)
    np.testing.assert_allclose(var, 0.5 + x.var(0, ddof=1) / 2)
    before = mean.copy(), var.copy()
    functional.batch_norm_backward(x, x, mean, var, training=True)
    functional.batch_norm(x, mean, var)
    np.testing.assert_array_equal((mean, var), before)
    with pytest.raises(ValueError, match="needs running_mean and running_var"):
        functional.batch_norm(x, None, None)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_scaled_tanh(dtype):
    x = np.linspace(-4, 4, 99, dtype=dtype).reshape(3, 33)
    tolerance = 2e-6 if dtype == np.float32 else 1e-12
    np.testing.assert_allclose(functional.scaled_tanh(x), 1.7159 * np.tanh(2 / 3 * x), rtol=tolerance, atol=tolerance)
    np.testing.assert_allclose(functional.scaled_tanh(dtype([1.0, -1.0])), [1, -1], rtol=2e-5)  # the purpose of A and S
    want = 1.7159 * 2 / 3 * (1 - np.tanh(2 / 3 * x.astype(np.float64)) ** 2)
    np.testing.assert_allclose(functional.scaled_tanh_backward(np.ones_like(x), x), want, rtol=0, atol=tolerance)
    np.testing.assert_allclose(functional.scaled_tanh(x, 2.0, 0.5), 2 * np.tanh(x / 2), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("case", [c for c in ABOUT["cases"] if c["function"] == "max_pool2d"], ids=lambda c: c["name"])
def test_without_return_indices(case):
    options = pairs(case["options"])
    options.pop("return_indices")
    y = functional.max_pool2d(ANSWERS[f"{case['name']}.input0"], **options)
    np.testing.assert_array_equal(y, ANSWERS[f"{case['name']}.y"])


# --- optimizers and schedules -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", range(len(ABOUT["optimizers"])))
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_ten_steps(number, dtype):
    run = ABOUT["optimizers"][number]
    model = Sequential(Linear(3, 2), Tanh(), Linear(2, 3), input_shape=(3,), dtype=dtype)
    model.theta[...] = ANSWERS["steps.start"]
    optimizer, loss = getattr(optim, run["kind"])(model, **pairs(run["options"])), CrossEntropyLoss()
    for want in ANSWERS[f"steps.{number}"]:
        logits = model.forward(ANSWERS["steps.x"])
        model.backward(loss(logits, ANSWERS["steps.target"])[1])
        optimizer.step()
        tolerance = 1e-10 if dtype == np.float64 else 2e-4  # Adam divides small numbers by small numbers
        np.testing.assert_allclose(model.theta, want, rtol=tolerance, atol=tolerance)
    assert optimizer.steps == 10


@pytest.mark.parametrize("number", range(len(ABOUT["schedules"])))
def test_schedules(number):
    run = ABOUT["schedules"][number]
    rates = getattr(schedules, run["function"])(**run["options"])
    assert rates.shape == (run["options"]["steps"],)
    np.testing.assert_allclose(rates, ANSWERS[f"schedule.{number}"], rtol=1e-9, atol=1e-15)


def test_constant_schedule():
    np.testing.assert_array_equal(schedules.constant(0.25, 4), [0.25] * 4)


@pytest.mark.parametrize(
    ("schedule", "words"),
    [
        (lambda: schedules.step_decay(0.1, 0, 1), "steps"),
        (lambda: schedules.step_decay(0.1, 9, 0), "step_size"),
        (lambda: schedules.step_decay(0.1, 9, 2, gamma="x"), "gamma"),
        (lambda: schedules.cosine(-0.1, 9), "lr"),
        (lambda: schedules.cosine(0.1, 9.5), "steps"),
        (lambda: schedules.cosine(0.1, 9, np.nan), "final_lr"),
        (lambda: schedules.one_cycle(np.inf, 9), "max_lr"),
        (lambda: schedules.one_cycle(0.1, 9, warmup=1.5), "warmup"),
        (lambda: schedules.one_cycle(0.1, 9, div_factor=0), "div_factor"),
        (lambda: schedules.one_cycle(0.1, 9, final_div_factor=0.5), "final_div_factor"),
        (lambda: schedules.constant(True, 9), "lr"),
    ],
)
def test_schedules_name_a_wrong_argument(schedule, words):
    with pytest.raises((ValueError, TypeError), match=f"^{words} must"):
        schedule()


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda m: optim.SGD(m, lr=-1), "lr"),
        (lambda m: optim.SGD(m, lr=[]), "lr"),
        (lambda m: optim.SGD(m, lr="fast"), "lr"),
        (lambda m: optim.SGD(m, lr=[0.1, np.nan]), "lr"),
        (lambda m: optim.SGD(m, lr=np.ones((2, 2))), "lr"),
        (lambda m: optim.SGD(m, momentum=-0.1), "momentum"),
        (lambda m: optim.SGD(m, momentum=0.9, dampening=None), "dampening"),
        (lambda m: optim.SGD(m, nesterov=True), "nesterov"),
        (lambda m: optim.SGD(m, momentum=0.9, dampening=0.1, nesterov=True), "nesterov"),
        (lambda m: optim.SGD(m, weight_decay=-1), "weight_decay"),
        (lambda m: optim.Adam(m, betas=(0.9, 1.0)), "betas"),
        (lambda m: optim.Adam(m, betas=(-0.1, 0.9)), "betas"),
        (lambda m: optim.Adam(m, betas=(0.9,)), "betas"),
        (lambda m: optim.Adam(m, eps=-1e-8), "eps"),
        (lambda m: optim.AdamW(m, weight_decay=np.inf), "weight_decay"),
    ],
)
def test_optimizers_name_a_wrong_argument(make, words):
    model = Sequential(Linear(2, 2), rng=1)
    with pytest.raises((ValueError, TypeError), match=f"^{words} "):
        make(model)


# --- accepted and rejected arguments ----------------------------------------------------------------------------------

X = np.random.default_rng(1).standard_normal((2, 4, 6, 6))
W = np.random.default_rng(2).standard_normal((6, 2, 3, 3))
B = np.zeros(6)
LOGITS, TARGET = np.random.default_rng(3).standard_normal((5, 3)), np.array([0, 1, 2, 1, 0])


def test_other_real_types_become_float32():
    for dtype in (np.uint8, np.int64, np.bool_, np.float16):
        y = functional.relu(np.array([[0, 1, 1]], dtype))
        assert y.dtype == np.float32
        np.testing.assert_array_equal(y, [[0, 1, 1]])
    assert functional.tanh([[0, 1], [2, 3]]).dtype == np.float32
    assert functional.conv2d(X.astype(np.float32), W, B, groups=2).dtype == np.float32  # the dtype of input decides


def test_memory_layout_does_not_matter():
    want = functional.conv2d(X, W, B, groups=2)
    turned = np.asfortranarray(X)
    np.testing.assert_array_equal(functional.conv2d(turned, np.asfortranarray(W), B, groups=2), want)
    single = X.astype(np.float32)
    swapped = functional.conv2d(single.astype(">f4"), W, B, groups=2)
    np.testing.assert_array_equal(swapped, functional.conv2d(single, W, B, groups=2))
    np.testing.assert_array_equal(functional.relu(X[:, ::2, ::-1]), functional.relu(X[:, ::2, ::-1].copy()))
    locked = X.copy()
    locked.setflags(write=False)
    np.testing.assert_array_equal(functional.relu(locked), functional.relu(X))


def test_scalars_are_zero_dimensional_arrays():
    for function in (
        functional.tanh, functional.sigmoid, functional.relu, functional.leaky_relu, functional.elu, functional.gelu,
        functional.silu, functional.softplus, functional.hardtanh, functional.relu6,
    ):  # fmt: skip
        assert np.shape(function(0.5)) == ()


def test_arguments_are_not_modified():
    copies = X.copy(), W.copy(), B.copy()
    y = functional.conv2d(X, W, B, groups=2, padding=1)
    functional.conv2d_backward(y, X, W, B, groups=2, padding=1)
    functional.relu(X)
    for a, b in zip((X, W, B), copies, strict=True):
        np.testing.assert_array_equal(a, b)


def test_nan_passes_through():
    x = X.copy()
    x[1, 0, 3, 3] = np.nan
    for y in (
        functional.conv2d(x, W, B, groups=2),
        functional.avg_pool2d(x, 2),
        functional.max_pool2d(x, 2),
        functional.tanh(x),
        functional.softmax(x, 1),
        functional.linear(x, np.ones((2, 6))),
    ):
        assert np.isnan(y[1]).any()
        assert np.isfinite(y[0]).all()


f = functional
BAD_DTYPES = [np.array([[None]]), np.ones((2, 2), complex), np.array([["a", "b"]])]
REFUSED = {
    "conv2d": [
        (lambda: f.conv2d(X[0], W, B), ValueError, r"input must have 4 axes \(N, C, H, W\), got shape \(4, 6, 6\)"),
        (lambda: f.conv2d(X, W[0], B), ValueError, r"weight must have 4 axes \(O, C/groups, KH, KW\), got shape"),
        (lambda: f.conv2d(X, W, B[None]), ValueError, r"bias must have 1 axes \(O,\), got shape"),
        (lambda: f.conv2d(X, W, np.zeros(5), groups=2), ValueError, r"bias must have shape \(6,\), got \(5,\)"),
        (lambda: f.conv2d(X, W, B), ValueError, "weight must have 4 input channels a group, got shape"),
        (lambda: f.conv2d(X, W, B, groups=3), ValueError, "divisible by groups 3, got 4 in and 6 out"),
        (lambda: f.conv2d(X, W[:5], None, groups=2), ValueError, "divisible by groups 2, got 4 in and 5 out"),
        (lambda: f.conv2d(X, W, B, groups=0), ValueError, "groups must be at least 1, got 0"),
        (lambda: f.conv2d(X, W, B, groups=2.0), TypeError, "groups must be an integer, got 2.0"),
        (lambda: f.conv2d(X[:0], W, B, groups=2), ValueError, r"input must not be empty, got shape \(0, 4, 6, 6\)"),
        (lambda: f.conv2d(X, W[:, :, :0], B, groups=2), ValueError, "weight must not be empty"),
        (lambda: f.conv2d(X[:, :, :2], W, B, groups=2), ValueError, "kernel_size 3 .* padded height of the input is 2"),
        (lambda: f.conv2d(X, W, B, groups=2, dilation=(1, 3)), ValueError, "kernel_size 3 with dilation 3 .* width"),
        (lambda: f.conv2d(X, W, B, stride=0, groups=2), ValueError, "stride must be at least 1, got 0"),
        (lambda: f.conv2d(X, W, B, stride=(1, 0), groups=2), ValueError, "stride must be at least 1, got 0"),
        (lambda: f.conv2d(X, W, B, stride=1.5, groups=2), TypeError, "stride must be an integer, got 1.5"),
        (lambda: f.conv2d(X, W, B, stride=(1, 2, 3), groups=2), ValueError, r"stride must be an integer or a pair"),
        (lambda: f.conv2d(X, W, B, padding=-1, groups=2), ValueError, "padding must be at least 0, got -1"),
        (lambda: f.conv2d(X, W, B, padding="full", groups=2), ValueError, "padding must be one of 'same', 'valid'"),
        (lambda: f.conv2d(X, W, B, padding=True, groups=2), TypeError, "padding must be an integer, got True"),
        (lambda: f.conv2d(X, W, B, dilation=0, groups=2), ValueError, "dilation must be at least 1, got 0"),
        (lambda: f.conv2d(X.astype(complex), W, B, groups=2), TypeError, "input must be .* got dtype complex128"),
        (lambda: f.conv2d(X.astype(object), W, B, groups=2), TypeError, "input must be .* got dtype object"),
        (lambda: f.conv2d(X, W.astype(str), B, groups=2), TypeError, "weight must be .* got dtype <U"),
        (lambda: f.conv2d(X, W, B.astype(complex), groups=2), TypeError, "bias must be .* got dtype complex128"),
        (
            lambda: f.conv2d_backward(X, X, W, B, groups=2),
            ValueError,
            r"dy must have .* \(2, 6, 4, 4\), got \(2, 4, 6, 6\)",
        ),
        (lambda: f.conv2d_backward("dy", X, W, B, groups=2), TypeError, "dy must be an array of real numbers"),
    ],
    "avg_pool2d": [
        (lambda: f.avg_pool2d(X[0], 2), ValueError, "input must have 4 axes"),
        (lambda: f.avg_pool2d(X, 0), ValueError, "kernel_size must be at least 1, got 0"),
        (lambda: f.avg_pool2d(X, 7), ValueError, "kernel_size 7 .* padded height of the input is 6"),
        (lambda: f.avg_pool2d(X, (2, 7)), ValueError, "kernel_size 7 .* padded width"),
        (lambda: f.avg_pool2d(X, 3, padding=2), ValueError, "padding must be at most half of kernel_size 3, got 2"),
        (lambda: f.avg_pool2d(X, 2, 0), ValueError, "stride must be at least 1, got 0"),
        (lambda: f.avg_pool2d(X, 2, padding=-1), ValueError, "padding must be at least 0"),
        (lambda: f.avg_pool2d(X, 2, divisor_override=0), ValueError, "divisor_override must be at least 1, got 0"),
        (lambda: f.avg_pool2d(X, 2, divisor_override=1.5), TypeError, "divisor_override must be an integer"),
        (lambda: f.avg_pool2d(X.astype(complex), 2), TypeError, "input must be"),
        (lambda: f.avg_pool2d(X[:0], 2), ValueError, "input must not be empty"),
        (lambda: f.avg_pool2d_backward(X, X, 2), ValueError, r"dy must have the shape of the output, \(2, 4, 3, 3\)"),
    ],
    "max_pool2d": [
        (lambda: f.max_pool2d(X[0], 2), ValueError, "input must have 4 axes"),
        (lambda: f.max_pool2d(X, "2"), TypeError, "kernel_size must be an integer, got '2'"),
        (lambda: f.max_pool2d(X, 3, dilation=3), ValueError, "kernel_size 3 with dilation 3 reaches over 7 pixels"),
        (lambda: f.max_pool2d(X, 2, padding=2), ValueError, "padding must be at most half of kernel_size 2, got 2"),
        (lambda: f.max_pool2d(X, 2, dilation=0), ValueError, "dilation must be at least 1"),
        (lambda: f.max_pool2d(X.astype("M8[s]"), 2), TypeError, "input must be .* got dtype datetime64"),
        (lambda: f.max_pool2d_backward(X, X, 2), ValueError, "dy must have the shape of the output"),
    ],
    "linear": [
        (lambda: f.linear(LOGITS, np.ones((2, 4))), ValueError, r"input must end in an axis of 4 features, got shape"),
        (lambda: f.linear(LOGITS, np.ones(3)), ValueError, r"weight must have 2 axes \(O, F\)"),
        (lambda: f.linear(LOGITS, np.ones((2, 3)), np.ones(3)), ValueError, r"bias must have shape \(2,\), got \(3,\)"),
        (lambda: f.linear(LOGITS[:0], np.ones((2, 3))), ValueError, "input must not be empty"),
        (
            lambda: f.linear_backward(LOGITS, LOGITS, np.ones((2, 3))),
            ValueError,
            "dy must have the shape of the output",
        ),
    ],
    "activations": [
        *[
            (lambda g=g, bad=bad: g(bad), TypeError, "input must be an array of real numbers, got dtype")
            for g in (
                f.tanh,
                f.scaled_tanh,
                f.sigmoid,
                f.relu,
                f.leaky_relu,
                f.elu,
                f.gelu,
                f.silu,
                f.softplus,
                f.hardtanh,
                f.relu6,
            )
            for bad in BAD_DTYPES
        ],
        (lambda: f.tanh([]), ValueError, "input must not be empty"),
        (lambda: f.relu_backward(X[:1], X), ValueError, "dy must have the shape of the output"),
        (lambda: f.tanh_backward(X[0, 0], X), ValueError, "dy must have the shape of the output"),
        (lambda: f.leaky_relu_backward(1.0, X), ValueError, "dy must have the shape of the output"),
        (lambda: f.leaky_relu(X, "steep"), TypeError, "negative_slope must be a number, got 'steep'"),
        (lambda: f.leaky_relu(X, np.nan), ValueError, "negative_slope must be finite"),
        (lambda: f.silu_backward(X[:1], X), ValueError, "dy must have the shape of the output"),
        (lambda: f.elu(X, -1), ValueError, "alpha must be at least 0, got -1"),
        (lambda: f.gelu_backward(X, X, "erf"), ValueError, "approximate must be one of 'none', 'tanh', got 'erf'"),
        (lambda: f.softplus(X, 0), ValueError, "beta must be positive, got 0"),
        (lambda: f.hardtanh(X, 2, -1), ValueError, "max_val must be larger than min_val, 2, got -1"),
        (lambda: f.scaled_tanh(X, None), TypeError, "A must be a number, got None"),
        (lambda: f.scaled_tanh(X, 1, 1j), TypeError, "S must be a number"),
    ],
    "softmax": [
        (lambda: f.softmax(LOGITS, 2), ValueError, "dim must be an axis of an array with 2 axes, got 2"),
        (lambda: f.softmax(LOGITS, -3), ValueError, "dim must be an axis"),
        (lambda: f.log_softmax(LOGITS, 1.0), TypeError, "dim must be an integer, got 1.0"),
        (lambda: f.softmax(LOGITS.astype(complex), 1), TypeError, "input must be"),
        (lambda: f.softmax_backward(LOGITS[0], LOGITS, 1), ValueError, "dy must have the shape of the output"),
        (lambda: f.log_softmax_backward(LOGITS.T, LOGITS, 1), ValueError, "dy must have the shape of the output"),
    ],
    "cross_entropy": [
        (lambda: f.cross_entropy(LOGITS[0], TARGET), ValueError, "target must be class numbers of shape"),
        (lambda: f.cross_entropy(LOGITS[0, 0], TARGET), ValueError, "got a number"),
        (lambda: f.cross_entropy(LOGITS.astype(object), TARGET), TypeError, "(logits|input) must be an array of real"),
        (lambda: f.cross_entropy(LOGITS[:0], TARGET[:0]), ValueError, "(logits|input) must not be empty"),
        (lambda: f.cross_entropy(LOGITS, TARGET + 1), ValueError, r"target must lie in 0 \.\.\. 2, got 3 at index 2"),
        (lambda: f.cross_entropy(LOGITS, TARGET - 1), ValueError, r"target must lie in 0 \.\.\. 2, got -1 at index 0"),
        (lambda: f.cross_entropy(LOGITS, TARGET.astype(float)), TypeError, "target must be integer class numbers"),
        (
            lambda: f.cross_entropy(LOGITS, TARGET > 1),
            TypeError,
            "target must be integer class numbers, got dtype bool",
        ),
        (
            lambda: f.cross_entropy(LOGITS, TARGET[:4]),
            ValueError,
            r"target must be class numbers of shape \(5,\).* got \(4,\)",
        ),
        (lambda: f.cross_entropy(LOGITS, np.eye(5, 4)), ValueError, "target must be class numbers of shape"),
        (lambda: f.cross_entropy(LOGITS, TARGET, np.ones(4)), ValueError, "weight must have 3 entries"),
        (lambda: f.cross_entropy(LOGITS, TARGET, -np.ones(3)), ValueError, "weight must not be negative"),
        (lambda: f.cross_entropy(LOGITS, TARGET, np.full(3, np.nan)), ValueError, "weight must be finite"),
        (lambda: f.cross_entropy(LOGITS, TARGET, ignore_index=1.5), TypeError, "ignore_index must be an integer"),
        (
            lambda: f.cross_entropy(LOGITS, TARGET, reduction="avg"),
            ValueError,
            "reduction must be one of 'mean', 'sum'",
        ),
        (
            lambda: f.cross_entropy(LOGITS, TARGET, label_smoothing=-0.1),
            ValueError,
            "label_smoothing must be at least 0",
        ),
        (lambda: f.cross_entropy(LOGITS, TARGET, label_smoothing=1.1), ValueError, "label_smoothing must be"),
        (lambda: f.cross_entropy(LOGITS, 0 * TARGET, ignore_index=0), ValueError, "target is ignore_index"),
        (lambda: f.cross_entropy_backward(np.ones(5), LOGITS, TARGET), ValueError, "dy must have the shape of"),
        (lambda: f.cross_entropy_backward(1.0, LOGITS, TARGET, reduction="none"), ValueError, "dy must have the shape"),
    ],
    "mse_loss": [
        (
            lambda: f.mse_loss(LOGITS, LOGITS[:4]),
            ValueError,
            r"target must have the shape of x, \(5, 3\), got \(4, 3\)",
        ),
        (lambda: f.mse_loss(LOGITS, LOGITS[:, :1]), ValueError, "target must have the shape of"),
        (lambda: f.mse_loss(LOGITS, LOGITS.astype(complex)), TypeError, "target must be an array of real numbers"),
        (lambda: f.mse_loss(LOGITS.astype(str), LOGITS), TypeError, "(x|input) must be an array of real numbers"),
        (lambda: f.mse_loss(LOGITS, LOGITS, "max"), ValueError, "reduction must be one of"),
        (lambda: f.mse_loss_backward(LOGITS, LOGITS, LOGITS), ValueError, "dy must have the shape of the output"),
    ],
}


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [pytest.param(*row, id=f"{group}-{i}") for group, rows in REFUSED.items() for i, row in enumerate(rows)],
)
def test_errors_name_the_argument(call, error, words):
    with pytest.raises(error, match=words):
        call()


def test_linear_keeps_infinity():
    """Also in the remainder loop after the last full vector of features."""
    x = np.ones((2, 84), np.float32)
    x[0, 70] = np.inf
    np.testing.assert_array_equal(functional.linear(x, np.ones((6, 84), np.float32)), [[np.inf] * 6, [84] * 6])
