"""LeNet-5 of 1998 against the figures of the paper, and its kernels against NumPy."""

import copy
import hashlib
import math

import numpy as np
import pytest
import reference
from hypothesis import given, strategies as st
from reference import assert_close, blank

from tinycnn import (
    AvgPool2d,
    Conv2d,
    CrossEntropyLoss,
    DeviceDataset,
    Flatten,
    Linear,
    MaxPool2d,
    MSELoss,
    Residual,
    ScaledTanh,
    Sequential,
    evaluate,
    fit,
    gradcheck_model,
    kernels,
    lecun98,
    recipes,
)
from tinycnn.recipes import build

both_dtypes = pytest.mark.parametrize("dtype", [np.float32, np.float64])
seeds = st.integers(0, 2**32 - 1)


# --- figures of the paper ---------------------------------------------------------------------------------------------


def test_parameters_and_connections():
    model = lecun98.lenet5(rng=0)
    found: dict[str, int] = {}
    for name, view in model.named_parameters():
        number = name.split(".")[0]
        found[number] = found.get(number, 0) + math.prod(view.shape)
    assert list(found.values()) == [156, 12, 1_516, 32, 48_120, 10_164]
    assert len(model.theta) == 60_000
    assert lecun98.count_connections(model) == 340_908
    per_layer = [122_304, 5_880, 151_600, 2_000, 48_120, 10_164, 840]
    assert sum(per_layer) == 340_908


def test_table_1():
    table = lecun98.connections()
    assert table.shape == (6, 16)
    assert table.sum() == 60
    assert list(table.sum(axis=0)) == [3] * 6 + [4] * 9 + [6]
    assert list(table.sum(axis=1)) == [10] * 6
    three = {tuple(np.flatnonzero(column)) for column in table.T[:6]}
    assert three == {tuple(sorted((i, (i + 1) % 6, (i + 2) % 6))) for i in range(6)}  # contiguous, section II.B


def test_the_bitmaps_are_those_of_figure_3():
    codes = lecun98.bitmaps()
    bits = np.packbits(codes.ravel() > 0).tobytes()
    assert hashlib.sha256(bits).hexdigest() == "1ada2fe32175b2c4cacdbddf2ccce971e4b9195f5b5c998a8a5aa0a35509c680"
    assert list((codes > 0).sum(axis=1)) == [35, 27, 33, 32, 41, 35, 39, 25, 43, 39]
    assert set(np.unique(codes)) == {-1, 1}


def test_places_are_the_codes_of_ten_outputs():
    codes = lecun98.places()
    assert list(codes.argmax(axis=1)) == list(range(10))
    assert codes.sum() == 10 - 90
    assert set(np.unique(codes)) == {-1, 1}


def test_the_initial_parameters_are_those_of_the_recipe():
    (recipe,) = recipes.find("lecun1998")
    expected = build.build_model(recipe, np.random.default_rng(0)).state_dict()
    model = lecun98.lenet5(rng=0)
    found = model.state_dict()
    assert {name: value.shape for name, value in found.items()} == {n: v.shape for n, v in expected.items()}
    for name in expected:
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-6)
    np.testing.assert_array_equal(found["13.weight"], lecun98.bitmaps())


def test_subsampling_starts_as_the_mean_for_sums_too():
    """The same function, in other coefficients."""
    means, sums = (lecun98.lenet5(pool, rng=0) for pool in ("mean", "sum"))
    x = np.random.default_rng(1).standard_normal((2, 1, 32, 32)).astype(np.float32)
    np.testing.assert_allclose(means(x), sums(x), rtol=1e-5)


def test_cyclic_connections():
    table = lecun98.cyclic(4, 6, 14)  # two of the outputs read three maps
    assert ["".join(map(str, np.flatnonzero(column))) for column in table.T] == ["012", "123", "23", "03", "01", "12"]
    assert lecun98.cyclic(3, 2, 6).all()
    for pairs in (5, 25):
        with pytest.raises(ValueError, match=f"pairs must be from 6 to 24, got {pairs}"):
            lecun98.cyclic(4, 6, pairs)


def test_lenet4_has_the_numbers_of_the_paper():
    """About 17,000 parameters and 260,000 connections.  S2 counts its four inputs, which pooling averages first."""
    (recipe,) = recipes.find("lenet4-1998")
    model = build.build_model(recipe, np.random.default_rng(0))
    assert len(model.theta) == 16_998
    assert lecun98.count_connections(model) - 100 + 8 * 14 * 14 * 3 == 258_306  # 100: the codes of the outputs


def test_gradient_of_the_whole_net_with_its_loss():
    model = lecun98.lenet5(rng=0, dtype=np.float64)
    x = np.random.default_rng(1).standard_normal((2, 1, 32, 32))
    # eps is small: the error of the finite difference is cubic in the step of all 60,000 weights together.
    assert gradcheck_model(model, x, eps=1e-6, rtol=1e-7, rng=3) < 1e-8


# --- layers against equivalent dense layers ---------------------------------------------------------------------------


def test_a_full_table_is_a_convolution():
    rng = np.random.default_rng(0)
    mapped = Sequential(lecun98.MappedConv2d(np.ones((3, 4), bool), (3, 2)), input_shape=(3, 7, 6), rng=0)
    plain = Sequential(Conv2d(3, 4, (3, 2)), input_shape=(3, 7, 6), rng=0)
    state = plain.state_dict()
    mapped.load_state_dict({"0.weight": state["0.weight"].reshape(12, 3, 2), "0.bias": state["0.bias"]}, strict=False)
    x = rng.standard_normal((5, 3, 7, 6)).astype(np.float32)
    y = plain.forward(x)
    np.testing.assert_allclose(mapped.forward(x), y, rtol=0, atol=1e-5)
    np.testing.assert_allclose(mapped.backward(np.cos(y)), plain.backward(np.cos(y)), rtol=0, atol=1e-5)
    np.testing.assert_allclose(mapped.grad, plain.grad, rtol=0, atol=1e-4)


def test_c5_is_a_fully_connected_layer():
    rng = np.random.default_rng(0)
    w, b, x = rng.standard_normal((120, 400)), rng.standard_normal(120), rng.standard_normal((3, 400))
    conv = Sequential(Conv2d(16, 120, 5), input_shape=(16, 5, 5), dtype=np.float64)
    conv.load_state_dict({"0.weight": w.reshape(120, 16, 5, 5), "0.bias": b})
    line = Sequential(Linear(400, 120), input_shape=(400,), dtype=np.float64)
    line.load_state_dict({"0.weight": w, "0.bias": b})
    np.testing.assert_allclose(conv.forward(x.reshape(3, 16, 5, 5)).reshape(3, 120), line.forward(x), rtol=1e-12)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: lecun98.MappedConv2d(np.ones(3, bool), 5), "connections must be a table"),
        (lambda: lecun98.MappedConv2d(np.ones((3, 4)), 5), "of booleans, got shape .3, 4., dtype float64"),
        (lambda: lecun98.MappedConv2d(np.array([[True, True], [False, False]]), 5), "got none for input map 1"),
        (lambda: lecun98.MappedConv2d(np.array([[True, False], [True, False]]), 5), "got none for output map 1"),
        (lambda: lecun98.Subsample(3, pool="max"), "pool must be one of 'sum', 'mean'"),
        (
            lambda: Sequential(lecun98.Subsample(3), input_shape=(2, 4, 4)),
            r"takes \(3, height, width\), got \(2, 4, 4\)",
        ),
        (lambda: Sequential(lecun98.EuclideanRBF(np.ones((2, 5))), input_shape=(4,)), r"takes \(5,\), got \(4,\)"),
        (lambda: lecun98.EuclideanRBF(np.full((2, 5), np.nan)), "centres must be finite"),
        (lambda: lecun98.RBFLoss(-1.0), "rubbish must be at least 0"),
        (lambda: lecun98.RBFLoss(factor=0), "factor must be"),
    ],
)
def test_invalid_arguments(make, words):
    with pytest.raises(ValueError, match=words):
        make()


# --- second derivatives -----------------------------------------------------------------------------------------------


def batches_of(x, target):
    """A data set without normalisation."""
    return DeviceDataset(x, target, mean=0, std=1)


def by_differences(model, criterion, x, target, eps=1e-4):
    """The diagonal of the Hessian by finite differences of the gradient."""
    start, found = model.theta.copy(), []

    def gradient(theta):
        model.theta[...] = theta
        model.backward(criterion(model.forward(x), target)[1])
        return model.grad.copy()

    for k in range(len(start)):
        step = np.zeros_like(start)
        step[k] = eps
        found.append((gradient(start + step)[k] - gradient(start - step)[k]) / (2 * eps))
    model.theta[...] = start
    return np.array(found)


def small(*chain, shape, seed=0):
    return Sequential(*chain, input_shape=shape, rng=seed, dtype=np.float64)


def data_for(model, images=5, classes=1, seed=1):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((images, *model.input_shape)).astype(np.float32)
    return x, rng.integers(0, classes, images)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_second_derivatives_of_one_layer_are_exact(reduction):
    """Squared distances of outputs that are linear in the parameters: the recursion drops nothing."""
    for chain, shape in (
        ((Flatten(), Linear(6, 3)), (1, 2, 3)),
        ((Conv2d(2, 3, 2), Flatten()), (2, 2, 2)),
        ((lecun98.MappedConv2d(np.array([[1, 0, 1], [0, 1, 1]], bool), 2), Flatten()), (2, 2, 2)),
        ((lecun98.Subsample(3, 2, "mean"), Flatten()), (3, 2, 2)),
    ):
        model = small(*chain, lecun98.EuclideanRBF(np.random.default_rng(3).standard_normal((4, 3))), shape=shape)
        x, target = data_for(model, classes=4)
        criterion = lecun98.RBFLoss(reduction=reduction)
        h = lecun98.gauss_newton_diagonal(model, criterion, batches_of(x, target), np.arange(5))
        want = by_differences(model, lecun98.RBFLoss(), x, target)
        np.testing.assert_allclose(h, want, rtol=1e-6, err_msg=repr(model))


@pytest.mark.parametrize("factor", [1.0, 0.5])
def test_second_derivatives_with_the_rubbish_class(factor):
    model = small(Flatten(), Linear(4, 3), lecun98.EuclideanRBF(np.ones((1, 3))), shape=(1, 2, 2))
    x, target = data_for(model)
    criterion = lecun98.RBFLoss(2.0, factor=factor)
    h = lecun98.gauss_newton_diagonal(model, criterion, batches_of(x, target), np.arange(5))
    np.testing.assert_allclose(h, by_differences(model, criterion, x, target), rtol=1e-5)
    assert (h > 0).all()


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_second_derivatives_of_the_distance_to_the_target(reduction):
    """With target_curvature those of eq. 8, whatever the rubbish class, while the gradient is that of eq. 9."""
    model = small(Flatten(), Linear(4, 3), lecun98.EuclideanRBF(np.eye(3)), shape=(1, 2, 2))
    x, target = data_for(model, classes=3)
    of, exact, index = batches_of(x, target), lecun98.RBFLoss(2.0, reduction, factor=0.5), np.arange(5)
    with_eq8 = lecun98.RBFLoss(2.0, reduction, factor=0.5, target_curvature=True)
    h = lecun98.gauss_newton_diagonal(model, with_eq8, of, index)
    np.testing.assert_allclose(h, by_differences(model, lecun98.RBFLoss(factor=0.5), x, target), rtol=1e-6)
    assert not np.allclose(h, lecun98.gauss_newton_diagonal(model, exact, of, index), rtol=0.01)
    y = model.forward(x)
    np.testing.assert_array_equal(with_eq8(y, target)[1], exact(y, target)[1])


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_second_derivatives_of_softmax_are_exact(reduction):
    model = small(Flatten(), Linear(6, 4), shape=(1, 2, 3))
    x, target = data_for(model, classes=4)
    criterion = CrossEntropyLoss(reduction=reduction)
    h = lecun98.gauss_newton_diagonal(model, criterion, batches_of(x, target), np.arange(5))
    np.testing.assert_allclose(h, by_differences(model, CrossEntropyLoss(), x, target), rtol=1e-5)


def test_second_derivatives_of_a_loss_without_curvature():
    model = small(Flatten(), Linear(6, 4), shape=(1, 2, 3))
    x, target = data_for(model, classes=4)
    with pytest.raises(ValueError, match="MSELoss"):
        lecun98.gauss_newton_diagonal(model, MSELoss(), batches_of(x, target), np.arange(5))
    with pytest.raises(ValueError, match="class weights"):
        lecun98.gauss_newton_diagonal(model, CrossEntropyLoss(np.ones(4)), batches_of(x, target), np.arange(5))


def test_second_derivatives_through_a_chain():
    """With one unit per layer there are no mixed terms; the recursion drops the term with f'' only."""
    chain = (
        Conv2d(1, 1, 3), ScaledTanh(), lecun98.Subsample(1, 2), ScaledTanh(),
        lecun98.MappedConv2d(np.ones((1, 1), bool), 1), ScaledTanh(), Flatten(), Linear(1, 1), ScaledTanh(),
    )  # fmt: skip
    model = small(*chain, lecun98.EuclideanRBF(np.array([[0.3]])), shape=(1, 4, 4))
    x, target = data_for(model, images=3)
    h = lecun98.gauss_newton_diagonal(model, lecun98.RBFLoss(), batches_of(x, target), np.arange(3))
    # Above the subsampling each unit has one connection: h is 2 (du/dw)^2, u the last unit's output.
    units = small(*copy.deepcopy(chain), shape=(1, 4, 4))
    units.theta[...] = model.theta
    slopes = []
    for image in x:
        units.forward(image[None])
        units.backward(np.ones((1, 1)))
        slopes.append(units.grad.copy())
    want = 2 * np.mean(np.square(slopes), axis=0)
    above = slice(10, None)  # all but the first convolution, whose weights are shared by four windows
    np.testing.assert_allclose(h[above], want[above], rtol=1e-9)
    assert (h[:10] > 0).all()


@pytest.mark.parametrize("images", [2, 11])
def test_second_derivatives_through_pooling(images):
    """An average is an untrained `Subsample`; the maximum passes one entry of its window on."""
    output = Flatten(), lecun98.EuclideanRBF(np.random.default_rng(3).standard_normal((4, 4)))
    plain = small(Conv2d(1, 1, 3), ScaledTanh(), AvgPool2d(2), *output, shape=(1, 6, 6))
    trained = small(
        Conv2d(1, 1, 3), ScaledTanh(), lecun98.Subsample(1, 2, "mean"), Flatten(),
        lecun98.EuclideanRBF(output[1].centres), shape=(1, 6, 6),
    )  # fmt: skip
    trained.theta[...] = [*plain.theta, 1, 0]
    x, target = data_for(plain, images=images, classes=4)
    criterion, index = lecun98.RBFLoss(), np.arange(images)
    want = lecun98.gauss_newton_diagonal(trained, criterion, batches_of(x, target), index)
    got = lecun98.gauss_newton_diagonal(plain, criterion, batches_of(x, target), index)
    np.testing.assert_allclose(got, want[:-2], rtol=1e-12)

    model = small(Conv2d(1, 2, 1), MaxPool2d(2), Flatten(), lecun98.EuclideanRBF(np.eye(2)), shape=(1, 2, 2))
    x, target = data_for(model, images=images, classes=2)
    h = lecun98.gauss_newton_diagonal(model, criterion, batches_of(x, target), index)
    np.testing.assert_allclose(h, by_differences(model, criterion, x, target), rtol=1e-6)


def test_second_derivatives_of_shared_weights_are_summed_over_connections():
    """The first convolution of the chain above, by the recursion written out."""
    rng = np.random.default_rng(4)
    output = lecun98.EuclideanRBF(rng.standard_normal((3, 2)))
    model = small(Conv2d(1, 2, 2), ScaledTanh(), Flatten(), Linear(8, 2), output,
                  shape=(1, 3, 3))  # fmt: skip
    x, target = data_for(model, images=2, classes=3)
    h = lecun98.gauss_newton_diagonal(model, lecun98.RBFLoss(), batches_of(x, target), np.arange(2))
    state, want = model.state_dict(), np.zeros((2, 1, 2, 2))
    for image in x.astype(np.float64):
        w = state["0.weight"]
        a = np.array([[[(w[o, 0] * image[0, i : i + 2, j : j + 2]).sum() + state["0.bias"][o] for j in range(2)]
                       for i in range(2)] for o in range(2)])  # fmt: skip
        out = 1.7159 * np.tanh(2 / 3 * a)
        slope = 2 / 3 / 1.7159 * (1.7159**2 - out**2)
        h_out = (np.square(state["3.weight"]) * 2).sum(axis=0).reshape(2, 2, 2)
        h_a = slope**2 * h_out
        for o in range(2):
            for u in range(2):
                for v in range(2):
                    want[o, 0, u, v] += (h_a[o] * image[0, u : u + 2, v : v + 2] ** 2).sum() / 2
    np.testing.assert_allclose(h[:8], want.ravel(), rtol=1e-9)


def test_sdlm_learns_in_one_pass():
    """Batch size 1, with the first rate of the schedule."""
    from tinycnn import data

    images, labels = data.synthetic_digits(400, rng=0)
    span = lecun98.FOREGROUND - lecun98.BACKGROUND
    batches = DeviceDataset(images, labels, mean=-lecun98.BACKGROUND / span, std=1 / span, padding=2)
    x = np.empty((1, 1, 32, 32), np.float32)
    batches.gather(x, np.array([0]))
    assert x.min() == pytest.approx(lecun98.BACKGROUND, abs=1e-6)
    assert x.max() <= lecun98.FOREGROUND + 1e-6
    model = lecun98.lenet5(rng=0)
    optimizer, criterion = lecun98.SDLM(model), lecun98.RBFLoss()
    before = evaluate(model, batches, criterion)[0]
    fit(model, criterion, optimizer, batches, epochs=2, batch_size=1, rng=1, progress=False)
    sizes = kernels.to_host(optimizer.step_sizes)
    assert 0 < sizes.min() < sizes.max() <= lecun98.SCHEDULE[0] / lecun98.MU * (1 + 1e-6)
    loss, accuracy, distances = evaluate(model, batches, criterion)
    assert loss < 0.5 * before
    assert accuracy == (distances.argmin(axis=1) == labels).mean() > 0.5  # the smallest distance is the prediction
    assert len(lecun98.SCHEDULE) == 20


# --- kernels ----------------------------------------------------------------------------------------------------------


@both_dtypes
@given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(1, 9), st.integers(1, 9)),
    kernel=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    seed=seeds,
)
def test_subsample(shape, kernel, seed, dtype):
    N, C, H, W = shape[0], shape[1], shape[2] + kernel[0] - 1, shape[3] + kernel[1] - 1
    rng = np.random.default_rng(seed)
    x, weight, bias = (rng.standard_normal(s).astype(dtype) for s in ((N, C, H, W), C, C))
    out = H // kernel[0], W // kernel[1]
    y = blank((N, C, *out), dtype)
    kernels.subsample_forward(y, x, weight, bias, kernel, 0.5)
    cut = x[:, :, : out[0] * kernel[0], : out[1] * kernel[1]].astype(np.float64)
    windows = cut.reshape(N, C, out[0], kernel[0], out[1], kernel[1]).sum((3, 5))
    want = 0.5 * weight[:, None, None] * windows + bias[:, None, None]
    assert_close(y, want, 1 + abs(weight).max() * abs(cut).max() * math.prod(kernel), math.prod(kernel))


@both_dtypes
@given(rows=st.integers(1, 5), classes=st.integers(2, 12), features=st.integers(1, 30), seed=seeds)
def test_distances(rows, classes, features, seed, dtype):
    rng = np.random.default_rng(seed)
    x, w = rng.standard_normal((rows, features)).astype(dtype), rng.standard_normal((classes, features)).astype(dtype)
    y = blank((rows, classes), dtype)
    kernels.squared_distance_forward(y, x, w)
    want = ((x[:, None].astype(np.float64) - w) ** 2).sum(2)
    assert_close(y, want, want.max(), features)


@both_dtypes
@pytest.mark.parametrize("rubbish", [-1.0, 0.0, 2.0])
@pytest.mark.parametrize("factor", [1.0, 0.5])
def test_rbf_loss(rubbish, factor, dtype):
    rng = np.random.default_rng(1)
    x, target = (80 + 10 * rng.standard_normal((7, 10))).astype(dtype), rng.integers(0, 10, 7)
    x[0] = 1e4 + np.arange(10)  # exp(-x) underflows in both precisions
    loss, predicted, dx = blank(7, dtype), blank(7, np.int64), blank(x.shape, dtype)
    kernels.rbf_loss(loss, predicted, dx, x, target, rubbish, factor, False)
    np.testing.assert_array_equal(predicted, x.argmin(axis=1))
    y = factor * x.astype(np.float64)
    of_target = y[np.arange(7), target]
    if rubbish < 0:
        np.testing.assert_array_equal(loss, of_target.astype(dtype))
        np.testing.assert_array_equal(dx, factor * np.eye(10)[target])
        return
    all_of_them = np.concatenate([np.full((7, 1), -rubbish), -y], axis=1)
    top = all_of_them.max(axis=1)
    log = top + np.log(np.exp(all_of_them - top[:, None]).sum(axis=1))
    np.testing.assert_allclose(loss, of_target + log, rtol=1e-6)
    share = np.exp(-y - log[:, None])
    np.testing.assert_allclose(dx, factor * (np.eye(10)[target] - share), atol=1e-5)


def test_rbf_loss_predicts_the_smallest_distance_and_passes_nan_on():
    x = np.array([[3.0, 1.0, 2.0], [3.0, np.nan, 2.0]])
    loss, predicted, dx = blank(2, np.float64), blank(2, np.int64), blank(x.shape, np.float64)
    kernels.rbf_loss(loss, predicted, dx, x, np.array([0, 1]), 1.0, 1.0, True)
    assert list(predicted) == [1, 1]
    assert np.isfinite(loss[0])
    assert np.isnan(loss[1])


# --- the same bits with any number of threads: a row per kernel of this file ------------------------------------------


def _case(name, dtype):
    rng = np.random.default_rng(5)
    x, dy = rng.standard_normal((9, 6, 14, 14)).astype(dtype), rng.standard_normal((9, 6, 7, 7)).astype(dtype)
    weight, bias = rng.standard_normal((2, 6)).astype(dtype)
    outputs = blank(x.shape, dtype), blank(6, dtype), blank(6, dtype)
    if name == "subsample_forward":
        return kernels.subsample_forward, (blank(dy.shape, dtype), x, weight, bias, (2, 2), 0.25), (0,)
    if name == "subsample_backward":
        return kernels.subsample_backward, (*outputs, dy, x, weight, (2, 2), 0.25), (0, 1, 2)
    if name.startswith("conv2d_map"):
        layer = lecun98.MappedConv2d(lecun98.connections(), 5)
        sources, starts = layer.initial_buffers(dtype).values()
        w, b, dy = (rng.standard_normal(s).astype(dtype) for s in ((60, 5, 5), 16, (9, 16, 10, 10)))
        if name == "conv2d_map_forward":
            return kernels.conv2d_map_forward, (blank(dy.shape, dtype), x, w, b, sources, starts), (0,)
        gradients = (blank(a.shape, dtype) for a in (x, w, b))
        return kernels.conv2d_map_backward, (*gradients, dy, x, w, sources, starts), (0, 1, 2)
    x, w, dy = (rng.standard_normal(s).astype(dtype) for s in ((90, 84), (10, 84), (90, 10)))
    if name == "squared_distance_forward":
        return kernels.squared_distance_forward, (blank(dy.shape, dtype), x, w), (0,)
    if name == "squared_distance_backward":
        return kernels.squared_distance_backward, (blank(x.shape, dtype), blank(w.shape, dtype), dy, x, w), (0, 1)
    outputs = blank(90, dtype), blank(90, np.int64), blank(dy.shape, dtype)
    return kernels.rbf_loss, (*outputs, 80 + dy, rng.integers(0, 10, 90), 1.0, 1.0, True), (0, 1, 2)


CASES = [
    "subsample_forward", "subsample_backward", "conv2d_map_forward", "conv2d_map_backward", "squared_distance_forward",
    "squared_distance_backward", "rbf_loss",
]  # fmt: skip


@both_dtypes
@pytest.mark.parametrize("name", CASES)
def test_same_bits(name, dtype, same_bits):
    same_bits(lambda: _case(name, dtype))


def test_the_reference_convolution_agrees():
    """`MappedConv2d` as a dense convolution with zeros, in NumPy."""
    rng = np.random.default_rng(0)
    table = lecun98.connections()
    layer = lecun98.MappedConv2d(table, 5)
    sources, starts = layer.initial_buffers(np.float64).values()
    x, w, b = rng.standard_normal((2, 6, 14, 14)), rng.standard_normal((60, 5, 5)), rng.standard_normal(16)
    dense, y = np.zeros((16, 6, 5, 5)), blank((2, 16, 10, 10), np.float64)
    for o in range(16):
        for p in range(starts[o], starts[o + 1]):
            dense[o, sources[p]] = w[p]
    kernels.conv2d_map_forward(y, x, w, b, sources, starts)
    np.testing.assert_allclose(y, reference.conv2d(x, dense, b), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("layers", [[Residual(Conv2d(1, 1, 1))], [Residual(Conv2d(1, 1, 1), ScaledTanh())]])
def test_second_derivatives_of_a_residual_block_are_refused(layers):
    model = Sequential(*layers, Flatten(), Linear(4, 3), input_shape=(1, 2, 2))
    data = DeviceDataset(np.eye(4, dtype=np.uint8).reshape(4, 2, 2), np.arange(4) % 3)
    with pytest.raises(ValueError, match="second derivatives of a Residual are not implemented"):
        lecun98.gauss_newton_diagonal(model, CrossEntropyLoss(), data, np.arange(4))
