"""conv2d, im2col and col2im against loops, over random shapes."""

import numpy as np
import pytest
import reference
from hypothesis import given, strategies as st
from reference import assert_close, blank

from tinycnn import kernels
from tinycnn.kernels import conv

DTYPES = [np.float32, np.float64]
both_dtypes = pytest.mark.parametrize("dtype", DTYPES)


def forward_mec(y, x, w, b, *options):
    conv.run_forward(y, x, w, b, None, None, *options)


ALGORITHMS = {  # "public" chooses by the layout, and a Linear's kernels for windows as large as the image
    "public": (conv.conv2d_forward, conv.conv2d_backward),
    "mec": (forward_mec, conv.conv2d_backward_mec),
}


@st.composite
def problems(draw, stride=None):
    """(shape of x, shape of w, bias?, (stride, padding, dilation, groups), seed)"""
    images = draw(st.sampled_from([1, 2, 4, 5, 8, 9, 16, 17, 21, 37]), label="N")  # vectors have 4, 8 or 16 lanes
    groups = draw(st.integers(1, 3), label="groups")
    per = draw(st.integers(1, 3) if groups > 1 else st.integers(1, 7), label="C/groups")
    outputs = draw(st.integers(1, 4) if groups > 1 else st.integers(1, 8), label="O/groups")
    size, kernel, strides, padding, dilation = [], [], [], [], []
    for axis in "hw":
        K, d = (
            draw(st.integers(1, 5), label=f"kernel {axis}"),
            draw(st.integers(1, 3), label=f"dilation {axis}"),
        )
        p = draw(st.integers(0, K + 1), label=f"padding {axis}")
        least = max(1, d * (K - 1) + 1 - 2 * p)  # the kernel is as large as the padded image
        size.append(least + draw(st.integers(0, 9), label=f"extra {axis}"))
        kernel.append(K)
        padding.append(p)
        dilation.append(d)
        strides.append(draw(st.integers(1, 3), label=f"stride {axis}") if stride is None else stride)
    bias = draw(st.booleans(), label="bias")
    seed = draw(st.integers(0, 2**32 - 1), label="seed")
    options = tuple(strides), tuple(padding), tuple(dilation), groups
    return (images, groups * per, *size), (groups * outputs, per, *kernel), bias, options, seed


def arrays(problem, dtype):
    """x, w, b, dy and the options"""
    x_shape, w_shape, bias, options, seed = problem
    rng = np.random.default_rng(seed)
    x, w = (rng.standard_normal(shape).astype(dtype) for shape in (x_shape, w_shape))
    b = rng.standard_normal(w_shape[0] if bias else 0).astype(dtype)
    out = reference.conv_out(x, w, *options[:3])
    dy = rng.standard_normal((x_shape[0], w_shape[0], *out)).astype(dtype)
    return x, w, b, dy, options


def forward(algorithm, x, w, b, dy, options):
    y = blank(dy.shape, x.dtype)
    ALGORITHMS[algorithm][0](y, x, w, b, *options)
    return y


def backward(algorithm, x, w, b, dy, options):
    dx, dw, db = (blank(a.shape, x.dtype) for a in (x, w, b))
    ALGORITHMS[algorithm][1](dx, dw, db, dy, x, w, *options)
    return dx, dw, db


def check_forward(algorithm, x, w, b, dy, options):
    want = reference.conv2d(x, w, b, *options)
    magnitude = reference.conv2d(abs(x), abs(w), abs(b), *options)
    assert_close(forward(algorithm, x, w, b, dy, options), want, magnitude, w[0].size + 1)


def check_backward(algorithm, x, w, b, dy, options):
    want = reference.conv2d_backward(dy, x, w, *options)
    magnitude = reference.conv2d_backward(abs(dy), abs(x), abs(w), *options)
    positions = dy[:, 0].size
    got = backward(algorithm, x, w, b, dy, options)
    assert_close(got[0], want[0], magnitude[0], w[:, 0].size)
    assert_close(got[1], want[1], magnitude[1], positions)
    if b.size:
        assert_close(got[2], want[2], magnitude[2], positions)
    return got


@both_dtypes
@given(problem=problems())
def test_forward_and_backward(problem, dtype):
    case = arrays(problem, dtype)
    check_forward("public", *case)
    check_backward("public", *case)


@both_dtypes
@given(problem=problems())
def test_mec(problem, dtype):
    case = arrays(problem, dtype)
    check_forward("mec", *case)
    check_backward("mec", *case)


@both_dtypes
@pytest.mark.parametrize("algorithm", ["mec"])
@pytest.mark.parametrize(
    ("x_shape", "w_shape", "options"),
    [  # runs of many vectors, of one element less, and of one more
        ((1, 1, 1, 857), (1, 1, 1, 1), ((1, 1), (0, 0), (1, 1), 1)),
        ((2, 2, 3, 1000), (7, 2, 2, 3), ((1, 1), (1, 1), (1, 1), 1)),
        ((1, 2, 2, 1713), (4, 1, 2, 5), ((1, 1), (0, 2), (1, 7), 2)),
        ((1, 1, 1, 860), (2, 1, 1, 5), ((1, 1), (0, 0), (1, 1), 1)),  # a row and less than a pair of vectors
        ((9, 1, 30, 31), (5, 1, 3, 3), ((1, 1), (1, 1), (1, 1), 1)),
        ((1, 1, 2, 3), (1, 1, 1, 1), ((1, 1), (3, 430), (1, 1), 1)),  # nearly all padding
        ((1, 2, 21, 21), (3, 2, 2, 2), ((2, 2), (0, 0), (1, 1), 1)),  # more pixels of dx than of dy
    ],
)
def test_long_runs(x_shape, w_shape, options, algorithm, dtype):
    case = arrays((x_shape, w_shape, True, options, 5), dtype)
    check_forward(algorithm, *case)
    check_backward(algorithm, *case)


@both_dtypes
@pytest.mark.parametrize("images", [1, 5, 8, 13, 64, 71])
def test_lenet_layers(images, dtype):
    for x, w, padding in [((1, 28, 28), (6, 1, 5, 5), (2, 2)), ((6, 14, 14), (16, 6, 5, 5), (0, 0))]:
        case = arrays(((images, *x), w, True, ((1, 1), padding, (1, 1), 1), 1), dtype)
        check_forward("public", *case)
        check_backward("public", *case)


@both_dtypes
@pytest.mark.parametrize("algorithm", ["mec"])
def test_without_input_gradient(algorithm, dtype):
    problem = (9, 4, 7, 9), (6, 2, 3, 3), True, ((1, 1), (1, 2), (1, 1), 2), 3
    x, w, b, dy, options = arrays(problem, dtype)
    dx, dw, db = backward(algorithm, x, w, b, dy, options)
    dw2, db2 = blank(w.shape, dtype), blank(b.shape, dtype)
    ALGORITHMS[algorithm][1](dx[:0], dw2, db2, dy, x, w, *options)
    np.testing.assert_array_equal(dw2, dw)
    np.testing.assert_array_equal(db2, db)
    dx2, dw2 = blank(x.shape, dtype), blank(w.shape, dtype)
    ALGORITHMS[algorithm][1](dx2, dw2, b[:0], dy, x, w, *options)  # without a bias
    np.testing.assert_array_equal(dx2, dx)
    np.testing.assert_array_equal(dw2, dw)


@both_dtypes
@given(problem=problems())
def test_backward_is_the_transpose_of_forward(problem, dtype):
    """<conv(x), dy> = <x, dx> = <w, dw>, without a reference."""
    x, w, _, dy, options = arrays(problem, np.float64)
    x, w, dy = x.astype(dtype), w.astype(dtype), dy.astype(dtype)
    no_bias = np.zeros(0, dtype)
    y = forward("public", x, w, no_bias, dy, options)
    dx, dw, _ = backward("public", x, w, no_bias, dy, options)
    products = [np.vdot(a.astype(np.float64), b) for a, b in ((y, dy), (x, dx), (w, dw))]
    scale = np.vdot(forward("public", abs(x), abs(w), no_bias, dy, options).astype(np.float64), abs(dy))
    assert np.ptp(products) <= scale * (1e-12 if dtype == np.float64 else 1e-6)


@pytest.mark.parametrize("algorithm", ["mec"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("images", [1, 11])
def test_nonfinite_values_propagate(algorithm, value, images):
    """y and dx: exactly where the value has an influence, so not in other images.  dw, and dx after a bad weight: at
    least there, since zeros of the padding are multiplied too, and 0 * inf is NaN."""
    problem = (images, 2, 8, 9), (4, 2, 3, 2), True, ((1, 1), (0, 0), (1, 1), 1), 7
    for name in ("x", "w", "b", "dy"):
        case = dict(zip(("x", "w", "b", "dy"), arrays(problem, np.float32)[:4], strict=True))
        case[name].reshape(-1)[case[name].size // 2] = value
        x, w, b, dy = case.values()
        with np.errstate(invalid="ignore"):
            want = reference.conv2d(x, w, b)
            want_grads = reference.conv2d_backward(dy, x, w)
        y = forward(algorithm, x, w, b, dy, problem[3])
        np.testing.assert_array_equal(np.isfinite(y), np.isfinite(want), err_msg=name)
        assert name == "dy" or not np.isfinite(y).all()
        dx, dw, db = backward(algorithm, x, w, b, dy, problem[3])
        if name == "w":
            assert not np.isfinite(dx[~np.isfinite(want_grads[0])]).any()
        else:
            np.testing.assert_array_equal(np.isfinite(dx), np.isfinite(want_grads[0]), err_msg=name)
        np.testing.assert_array_equal(np.isfinite(db), np.isfinite(want_grads[2]), err_msg=name)
        assert not np.isfinite(dw[~np.isfinite(want_grads[1])]).any()
        if name in "wb":
            assert np.isfinite(dw).all()


@both_dtypes
@given(problem=problems())
def test_im2col_and_col2im(problem, dtype):
    (shape, w_shape, _, (stride, padding, dilation, _), seed) = problem
    rng, kernel = np.random.default_rng(seed), w_shape[2:]
    x = rng.standard_normal(shape).astype(dtype)
    out = reference.conv_out(x, np.empty(w_shape), stride, padding, dilation)
    windows = kernel, out, stride, padding, dilation

    columns = blank((shape[0], shape[1] * kernel[0] * kernel[1], out[0] * out[1]), dtype)
    kernels.im2col(columns, x, *windows)
    np.testing.assert_array_equal(columns, reference.im2col(x, *windows))

    c = rng.standard_normal(columns.shape).astype(dtype)
    back = blank(shape, dtype)
    kernels.col2im(back, c, *windows)
    c64 = c.astype(np.float64)
    magnitude = reference.col2im(abs(c64), shape, *windows)
    assert_close(back, reference.col2im(c64, shape, *windows), magnitude, kernel[0] * kernel[1])

    products = np.vdot(columns.astype(np.float64), c), np.vdot(x.astype(np.float64), back)
    scale = np.vdot(abs(columns.astype(np.float64)), abs(c))
    assert np.ptp(products) <= scale * (1e-12 if dtype == np.float64 else 1e-6)


# --- same bits for any number of threads; one row per kernel ----------------------------------------------------------


def _conv_case(algorithm, backward, stride=(1, 1)):
    def case(dtype):
        problem = (37, 3, 19, 18), (7, 3, 5, 4), True, (stride, (2, 1), (1, 1), 1), 11
        x, w, b, dy, options = arrays(problem, dtype)
        if backward:
            dx, dw, db = (blank(a.shape, dtype) for a in (x, w, b))
            return ALGORITHMS[algorithm][1], (dx, dw, db, dy, x, w, *options), (0, 1, 2)
        return ALGORITHMS[algorithm][0], (blank(dy.shape, dtype), x, w, b, *options), (0,)

    return case


def _columns_case(backward):
    def case(dtype):
        rng = np.random.default_rng(2)
        x = rng.standard_normal((23, 3, 17, 15)).astype(dtype)
        columns = rng.standard_normal((23, 3 * 9, 17 * 15)).astype(dtype)
        windows = (3, 3), (17, 15), (1, 1), (1, 1), (1, 1)
        if backward:
            return kernels.col2im, (blank(x.shape, dtype), columns, *windows), (0,)
        return kernels.im2col, (blank(columns.shape, dtype), x, *windows), (0,)

    return case


CASES = {
    "conv2d_forward": _conv_case("public", False),
    "conv2d_backward": _conv_case("public", True),
    "im2col": _columns_case(False),
    "col2im": _columns_case(True),
}
OTHER_CASES = {
    "conv2d_forward_mec": _conv_case("mec", False),
    "conv2d_backward_mec": _conv_case("mec", True),
    "conv2d_forward, stride 2": _conv_case("public", False, (2, 3)),
    "conv2d_backward, stride 2": _conv_case("public", True, (2, 3)),
}


@both_dtypes
@pytest.mark.parametrize("name", [*CASES, *OTHER_CASES])
def test_same_bits(name, dtype, same_bits):
    same_bits(lambda: (CASES | OTHER_CASES)[name](dtype))
