"""Activations and softmax against NumPy in float64; tanh and sigmoid of float32 over all exponents."""

import numpy as np
import pytest
import reference
from hypothesis import given, strategies as st
from reference import ACTIVATIONS, assert_close, blank

from tests.test_places import NAN_STOPS
from tinycnn import kernels, scalars
from tinycnn.kernels._jit import overload_by_dtype

DTYPES = [np.float32, np.float64]
both_dtypes = pytest.mark.parametrize("dtype", DTYPES)

ROWS = {
    "softmax": (reference.softmax, reference.softmax_backward),
    "log_softmax": (reference.log_softmax, reference.log_softmax_backward),
}
every_activation = pytest.mark.parametrize("name", ACTIVATIONS)
both_softmaxes = pytest.mark.parametrize("name", ROWS)


def kernel(name, way, *constants):
    """(kernel, its last arguments)"""
    if name in ROWS:
        return getattr(kernels, name + way), ()
    return getattr(kernels, "activation" + way), (scalars.activation(getattr(scalars, name.upper()), *constants),)


def forward(name, x, *constants):
    y = blank(x.shape, x.dtype)
    function, activation = kernel(name, "_forward", *constants)
    function(y, x, *activation)
    if name in ACTIVATIONS:
        in_place = x.copy()
        function(in_place, in_place, *activation)
        np.testing.assert_array_equal(in_place, y)
    return y


def backward(name, dy, y_or_x, *constants):
    dx = blank(dy.shape, dy.dtype)
    function, activation = kernel(name, "_backward", *constants)
    function(dx, dy, y_or_x, *activation)
    if name in ACTIVATIONS:
        in_place = dy.copy()
        function(in_place, in_place, y_or_x, *activation)
        np.testing.assert_array_equal(in_place, dx)
    return dx


@st.composite
def images(draw):
    """(shape of four axes, seed, scale)"""
    shape = tuple(draw(st.integers(1, most), label=axis) for axis, most in zip("NCHW", (9, 5, 9, 9), strict=True))
    return shape, draw(st.integers(0, 2**32 - 1), label="seed"), draw(st.sampled_from([0.1, 1.0, 10.0, 1e4]))


# --- element by element -----------------------------------------------------------------------------------------------


@both_dtypes
@every_activation
@given(image=images())
def test_value_and_gradient(name, image, dtype):
    value, derivative, saved, constants = ACTIVATIONS[name]
    shape, seed, scale = image
    rng = np.random.default_rng(seed)
    x = (rng.standard_normal(shape) * scale).astype(dtype)
    x.reshape(-1)[:: 1 + seed % 7] = 0  # at 0 the derivative of ReLU is 0
    x = abs(x) if name == "gaussian" else x  # squared distances
    y = forward(name, x, *constants)
    want, z = value(x.astype(np.float64), *constants), np.minimum(abs(x.astype(np.float64)), 64)
    condition = {"gelu": z**2, "gelu_tanh": z + z**3, "softplus": 2 * z}.get(name, 0)  # of the exponential in the tail
    assert_close(y, want, abs(want) * condition, 140)  # 7 ulp and the rounding of A and S
    dy = rng.standard_normal(shape).astype(dtype)
    # In terms of y the derivative 1 - y^2 cannot be better than the rounding of y: absolute, not relative.
    assert_close(
        backward(name, dy, y if saved == "y" else x, *constants),
        dy * derivative(x.astype(np.float64), *constants),
        abs(dy),
        400,
    )


@both_dtypes
@pytest.mark.parametrize(("A", "S"), [(1.0, 1.0), (-1.7159, 2 / 3), (0.3, 4.0), (2.0, -0.5)])
def test_scaled_tanh_with_other_constants(A, S, dtype):
    x = np.linspace(-3, 3, 101).astype(dtype).reshape(1, 1, 1, -1)
    y = forward("scaled_tanh", x, A, S)
    assert_close(y, A * np.tanh(S * x.astype(np.float64)), 0, 140)
    dy = np.cos(x)
    assert_close(
        backward("scaled_tanh", dy, y, A, S),
        dy * reference.scaled_tanh_derivative(x.astype(np.float64), A, S),
        abs(A * S),
        400,
    )


@both_dtypes
@pytest.mark.parametrize("slope", [0.0, 0.2, 1.0, -0.5, 2.0])
def test_leaky_relu_with_any_slope(slope, dtype):
    x = np.array([-2, -1e-30, -0.0, 0.0, 1e-30, 3], dtype).reshape(1, 1, 1, -1)
    np.testing.assert_allclose(forward("leaky_relu", x, slope), np.where(x > 0, x, dtype(slope) * x), rtol=1e-7)
    dy = np.arange(1, 7, dtype=dtype).reshape(x.shape)
    np.testing.assert_allclose(backward("leaky_relu", dy, x, slope), np.where(x > 0, dy, dtype(slope) * dy), rtol=1e-7)


@both_dtypes
@every_activation
def test_infinity_and_nan(name, dtype):
    value, _, saved, constants = ACTIVATIONS[name]
    x = np.full((1, 1, 1, 37), 0.5, dtype)  # longer than a vector, to run the vectorised loop and its remainder
    special = {3: np.nan, 11: np.inf, 17: -np.inf, 34: np.nan, 35: np.inf, 36: -np.inf}
    for i, number in special.items():
        x[..., i] = number
    y = forward(name, x, *constants)
    np.testing.assert_array_equal(np.isnan(y), np.isnan(x))
    want = value(x.astype(np.float64), *constants)
    np.testing.assert_allclose(y, want, rtol=1e-6)
    dy = np.ones_like(x)
    dx = backward(name, dy, y if saved == "y" else x, *constants)
    np.testing.assert_array_equal(np.isnan(dx), np.isnan(x) & (name not in NAN_STOPS))
    dy[..., 5] = np.nan
    assert np.isnan(backward(name, dy, forward(name, np.abs(x), *constants), *constants)[..., 5]).all()


@both_dtypes
@every_activation
def test_nan_in_dy_reaches_dx_everywhere(name, dtype):
    """ReLU is the exception: it selects 0 or dy."""
    x = np.array([-np.inf, -1e30, -3, -0.7, -0.1, 0, 0.5, 1.2, 6, 1e30, np.inf], dtype).reshape(1, 1, 1, -1)
    x = abs(x) + 1 if name in ("gaussian", "relu") else x
    _, _, saved, constants = ACTIVATIONS[name]
    y = forward(name, x, *constants)
    assert np.isnan(backward(name, np.full_like(x, np.nan), y if saved == "y" else x, *constants)).all()


@pytest.mark.parametrize("name", ["gelu", "gelu_tanh", "silu", "softplus", "elu"])
def test_gradient_of_float32_over_the_line(name):
    """A difference such as 1 - sigmoid(x), of two numbers near 1, would multiply the rounding error by x."""
    _, derivative, saved, constants = ACTIVATIONS[name]
    half = whole_line()
    x = np.ascontiguousarray(np.concatenate([-half[::-1], half])[::7]).reshape(1, 1, 1, -1)
    y = forward(name, x, *constants)
    dx = backward(name, np.ones_like(x), y if saved == "y" else x, *constants)
    with np.errstate(all="ignore"):
        want = derivative(x.astype(np.float64), *constants)
    np.testing.assert_allclose(dx, want, rtol=0, atol=4e-7)


@both_dtypes
def test_elu_is_accurate_near_zero(dtype):
    x = -np.logspace(-30, 0, 61).astype(dtype).reshape(1, 1, 1, -1)
    np.testing.assert_allclose(forward("elu", x, 1.0), np.expm1(x.astype(np.float64)), rtol=8 * np.finfo(dtype).eps)


@pytest.mark.parametrize("name", ["gelu", "gelu_tanh", "silu", "softplus", "elu"])
def test_float32_over_the_line(name):
    """Relative error over all exponents.  Rounding the argument of an exponential costs as many ulp as its size."""
    half = whole_line()
    x = np.ascontiguousarray(np.concatenate([-half[::-1], half])[::7])
    constants = ACTIVATIONS[name][3]
    y = forward(name, x.reshape(1, 1, 1, -1), *constants).reshape(-1)
    with np.errstate(all="ignore"):
        want = ACTIVATIONS[name][0](x.astype(np.float64), *constants)
    normal = abs(want) > 1e-36
    z = np.minimum(abs(x[normal].astype(np.float64)), 64)
    assert (ulps(y[normal], want[normal]) <= 24 + 4 * (z + z**2)).all()
    assert (abs(y[~normal]) < 2e-36).all()


# --- tanh and sigmoid of float32, over the whole line -----------------------------------------------------------------


def whole_line():
    """Non-negative floats of every exponent, denormals included, in order, and all floats around the clamps."""
    coarse = np.arange(0, 0x7F800000, 1021, dtype=np.uint32).view(np.float32)
    edges = [scalars.TANH_LIMIT, scalars.EXP_LIMIT, 7.9, 9.01, 88.72, 87.34, 103.97, 2.0**-126, 0.5, 1.0]
    edges += [float(n * np.log(2)) for n in (1, 2, 4, 8, 16, 32, 64, 128)]
    near = [np.arange(-300, 301) + int(np.float32(e).view(np.uint32)) for e in edges]
    near = np.unique(np.concatenate(near)).astype(np.uint32).view(np.float32)
    tiny = np.arange(0, 600, dtype=np.uint32).view(np.float32)
    huge = (np.arange(0x7F800000 - 600, 0x7F800001, dtype=np.uint32)).view(np.float32)  # up to infinity
    return np.unique(np.concatenate([coarse, near, tiny, huge]))


def run(name, x):
    return forward(name, x.reshape(1, 1, 1, -1)).reshape(-1)


def ulps(y, want):
    return np.abs(y.astype(np.float64) - want) / np.spacing(np.abs(want).astype(np.float32)).astype(np.float64)


def test_tanh_of_float32_over_the_whole_line():
    x = whole_line()
    y = run("tanh", x)
    want = np.tanh(x.astype(np.float64))
    assert ulps(y, want).max() <= 7
    assert y.min() >= 0
    assert y.max() == 1
    assert (y[x > 9.1] == 1).all()
    np.testing.assert_array_equal(run("tanh", -x), -y)  # odd, bit for bit
    below = np.maximum.accumulate(y) - y  # monotone to within the error
    assert (below <= 7 * np.spacing(y)).all()


def test_sigmoid_of_float32_over_the_whole_line():
    half = whole_line()
    x = np.concatenate([-half[::-1], half])
    y = run("sigmoid", x)
    want = reference.sigmoid(x.astype(np.float64))
    assert ulps(y, want).max() <= 3
    assert y.min() >= 0
    assert y.max() <= 1
    assert run("sigmoid", np.float32([0.0, -0.0]))[0] == 0.5
    right, left = run("sigmoid", half), run("sigmoid", -half)
    assert np.abs(right + left - 1).max() <= 2**-23  # sigmoid(-x) = 1 - sigmoid(x)
    below = np.maximum.accumulate(y) - y
    assert (below <= 3 * np.spacing(y)).all()


@pytest.mark.parametrize("name", ["tanh", "sigmoid"])
def test_the_end_of_the_line(name):
    x = np.tile(np.float32([np.inf, -np.inf, np.nan, 0.0, -0.0, 3.4e38, -3.4e38, 1e-45, -1e-45]), 5)
    y = run(name, x).reshape(5, 9)
    line = [1, -1, np.nan, 0, 0, 1, -1, 1e-45, -1e-45] if name == "tanh" else [1, 0, np.nan, 0.5, 0.5, 1, 0, 0.5, 0.5]
    np.testing.assert_array_equal(y, np.tile(np.float32(line), (5, 1)))


@pytest.mark.parametrize("name", ["tanh", "sigmoid"])
def test_the_scalars_are_the_same_uncompiled(name):
    """The functions in scalars.py also run as Python on np.float32; compiled, they may only fuse multiply-adds."""
    x = np.float32([0, 1e-40, 1e-3, 0.1, 0.7, 1, 2.5, 9, 9.03, 20, 100, 104, 105])
    x = np.concatenate([x, -x])
    with np.errstate(under="ignore"):
        plain = np.array([getattr(scalars, name + "32")(a) for a in x])
    assert plain.dtype == np.float32
    assert (np.abs(run(name, x) - plain) <= 4 * np.spacing(np.abs(plain))).all()


@pytest.mark.parametrize("name", ["tanh", "sigmoid"])
def test_float64_uses_the_library(name):
    x = np.concatenate([np.linspace(-800, 800, 40001), np.linspace(-3, 3, 40001)])
    with np.errstate(under="ignore"):
        want = ACTIVATIONS[name][0](x)
    np.testing.assert_allclose(run(name, x), want, rtol=5e-16, atol=1e-320)


# --- softmax ----------------------------------------------------------------------------------------------------------


@both_dtypes
@both_softmaxes
@given(
    rows=st.integers(1, 9),
    classes=st.integers(1, 40),
    seed=st.integers(0, 2**32 - 1),
    scale=st.sampled_from([0.0, 1.0, 30.0]),
    offset=st.sampled_from([0.0, 1e4, -1e4]),
)
def test_softmax_and_its_gradient(name, rows, classes, seed, scale, offset, dtype):
    value, gradient = ROWS[name]
    rng = np.random.default_rng(seed)
    x = (rng.standard_normal((rows, classes)) * scale + offset).astype(dtype)
    wide = x.astype(np.float64)
    y = forward(name, x)
    want = value(wide)
    assert_close(y, want, 1 if name == "softmax" else np.abs(want) + np.log(classes), classes + 8)
    dy = rng.standard_normal(x.shape).astype(dtype)
    want = gradient(dy.astype(np.float64), wide)
    assert_close(backward(name, dy, y), want, np.abs(dy).sum(1, keepdims=True), 4 * classes + 30)


@both_dtypes
@both_softmaxes
def test_softmax_of_huge_and_mixed_logits(name, dtype):
    x = np.array([[1e4, -1e4, 0, 9999], [1e38, -1e38, 1e38, 0], [-1e4, -1e4, -1e4, -1e4], [0, 1e4, 1e4, 1]], dtype)
    y = forward(name, x)
    with np.errstate(under="ignore"):
        want = ROWS[name][0](x.astype(np.float64))
    np.testing.assert_allclose(y, want, rtol=1e-6)


@both_dtypes
@both_softmaxes
def test_softmax_of_what_is_not_finite(name, dtype):
    rows = np.array([[1, np.nan, 2], [np.nan, np.inf, 0], [np.inf, 1, 2], [-np.inf, 1, 2], [0, 1, 2]], dtype)
    y = forward(name, np.tile(rows, (1, 7)))
    assert np.isnan(y[:2]).all()
    assert np.isnan(y[2]).any()
    assert not np.isnan(y[3:]).any()
    assert (y[3].reshape(7, 3)[:, 0] == (0 if name == "softmax" else -np.inf)).all()
    dy = np.ones_like(y[4:])
    dy[0, 1] = np.nan
    assert np.isnan(backward(name, dy, y[4:])).all()


# --- the same bits on any number of threads; a row for every kernel of this file --------------------------------------


def _case(name, way, dtype):
    rng = np.random.default_rng(4)
    shape = (501, 37) if name in ROWS else (7, 5, 33, 31)
    a, b = rng.standard_normal((2, *shape)).astype(dtype)
    constants = ACTIVATIONS[name][3] if name in ACTIVATIONS else ()
    function, activation = kernel(name, way, *constants)
    inputs = (a, b) if way == "_backward" else (a,)
    return function, (blank(shape, dtype), *inputs, *activation), (0,)


CASES = [name + way for name in ("activation", *ROWS) for way in ("_forward", "_backward")]


@both_dtypes
@pytest.mark.parametrize("way", ["_forward", "_backward"])
@pytest.mark.parametrize("name", [*ACTIVATIONS, *ROWS])
def test_same_bits(name, way, dtype, same_bits):
    same_bits(lambda: _case(name, way, dtype))


def test_every_activation_has_a_row():
    codes = {getattr(scalars, name.upper()) for name in ACTIVATIONS}
    assert codes == set(scalars.activations(lambda function: function, overload_by_dtype))
