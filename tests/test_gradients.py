"""The gradient of every layer and every loss against central differences, in float64, over random shapes.

A new layer or loss needs a row in LAYERS or LOSSES: test_places.py fails without one.
"""

import numpy as np
import pytest
import reference
from hypothesis import assume, given, settings, strategies as st

from tinycnn import (
    CrossEntropyLoss,
    MSELoss,
    OneHotMSELoss,
    Sequential,
    gradcheck,
    gradcheck_model,
    layers,
    lecun98,
    losses,
    models,
)

RTOL = 1e-7
# "cuda" is a GPU, or PTX on the processor (see conftest.py): the same kernel source, in float64.
devices = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
seeds = st.integers(0, 2**32 - 1)


def smooth(rng, shape):
    return rng.standard_normal(shape)


def spaced(rng, shape):
    """A shuffled grid through zero: no two numbers closer than 0.01, none closer than 0.005 to zero."""
    size = int(np.prod(shape))
    return 0.01 * (rng.permutation(size) - size // 2 + 0.5).reshape(shape)


# --- one row per layer: a strategy of (layer, shape of one input, how inputs are drawn) -------------------------------

image_shapes = st.tuples(st.integers(1, 3), st.integers(1, 6), st.integers(1, 6))
vector_shapes = st.tuples(st.integers(1, 12))
any_shapes = image_shapes | vector_shapes


def plain(layer, shapes=any_shapes, draw_input=smooth):
    return st.tuples(st.builds(layer), shapes, st.just(draw_input))


@st.composite
def axes(draw, dilated=True, pooling=False):
    """kernel_size, stride, padding, dilation, and a size that fits, for height and width"""
    found = []
    for _ in "hw":
        kernel, stride = draw(st.integers(1, 4)), draw(st.integers(1, 3))
        dilation = draw(st.integers(1, 3)) if dilated else 1
        padding = draw(st.integers(0, kernel // 2 if pooling else kernel))
        least = max(1, dilation * (kernel - 1) + 1 - 2 * padding)
        found.append((kernel, stride, padding, dilation, least + draw(st.integers(0, 5))))
    kernel, stride, padding, dilation, size = zip(*found, strict=True)
    x = np.ones((1, 1, *size))
    out = reference.pool_out(x, kernel, stride, padding, dilation)
    mask = reference.windows(x, kernel, out, stride, padding, dilation, 0)
    assume(mask.any((4, 5)).all() if pooling else mask.any())  # windows with padding only have no gradient
    return kernel, stride, padding, dilation, size


@st.composite
def conv2d(draw):
    kernel, stride, padding, dilation, size = draw(axes())
    groups = draw(st.integers(1, 3))
    channels, outputs = groups * draw(st.integers(1, 3)), groups * draw(st.integers(1, 4))
    layer = layers.Conv2d(channels, outputs, kernel, stride, padding, dilation, groups, draw(st.booleans()))
    return layer, (channels, *size), smooth


@st.composite
def conv_transpose2d(draw):
    groups = draw(st.integers(1, 2))
    channels, outputs = groups * draw(st.integers(1, 3)), groups * draw(st.integers(1, 3))
    axes = [[draw(st.integers(low, high)) for _ in "hw"] for low, high in ((1, 4), (1, 3), (0, 2), (1, 3), (1, 4))]
    kernel, stride, padding, dilation, size = map(tuple, axes)
    extra = tuple(draw(st.integers(0, s - 1)) for s in stride)
    layer = layers.ConvTranspose2d(
        channels, outputs, kernel, stride, padding, extra, groups, draw(st.booleans()), dilation
    )
    ends = zip(size, kernel, stride, padding, dilation, extra, strict=True)
    assume(all((n - 1) * s - 2 * p + d * (k - 1) + e >= 0 for n, k, s, p, d, e in ends))
    for n, k, s, p, d, e in zip(size, kernel, stride, padding, dilation, extra, strict=True):
        out = (n - 1) * s - 2 * p + d * (k - 1) + e + 1
        assume(any(0 <= i * s + d * u - p < out for i in range(n) for u in range(k)))  # else no gradient
    return layer, (channels, *size), smooth


@st.composite
def zero_pad2d(draw):
    size = draw(st.integers(3, 6)), draw(st.integers(3, 6))
    sides = tuple(draw(st.integers(-1, 3)) for _ in range(4))
    return layers.ZeroPad2d(sides), (draw(st.integers(1, 3)), *size), smooth


@st.composite
def upsample(draw):
    pair = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    shape = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.integers(1, 3))
    larger = shape[1] + draw(st.integers(0, 5)), shape[2] + draw(st.integers(0, 5))
    layer = layers.Upsample(scale_factor=pair) if draw(st.booleans()) else layers.Upsample(larger)
    return layer, shape, smooth


@st.composite
def adaptive_avg_pool2d(draw):
    output = st.none() | st.integers(1, 7)
    return layers.AdaptiveAvgPool2d((draw(output), draw(output))), draw(image_shapes), smooth


@st.composite
def linear(draw):
    features, outputs = draw(st.integers(1, 30)), draw(st.integers(1, 13))
    return layers.Linear(features, outputs, draw(st.booleans())), (features,), smooth


@st.composite
def distances(draw):
    classes, features = draw(st.integers(1, 11)), draw(st.integers(1, 20))
    rng = np.random.default_rng([draw(seeds), 1])  # no centre equals x
    return lecun98.EuclideanRBF(rng.standard_normal((classes, features))), (features,), smooth


@st.composite
def gaussian_rbf(draw):
    features, outputs = draw(st.integers(1, 9)), draw(st.integers(1, 11))
    # Not 1: the same seed draws x, and the gradient is zero if x equals a centre.
    return layers.GaussianRBF(features, outputs, draw(st.sampled_from([0.3, 0.8]))), (features,), smooth


@st.composite
def mapped_conv2d(draw):
    channels, outputs, kernel = draw(st.integers(1, 4)), draw(st.integers(1, 5)), draw(st.integers(1, 4))
    table = np.random.default_rng(draw(seeds)).random((channels, outputs)) < 0.6
    table[np.arange(max(channels, outputs)) % channels, np.arange(max(channels, outputs)) % outputs] = True
    size = kernel + draw(st.integers(0, 4)), kernel + draw(st.integers(0, 4))
    return lecun98.MappedConv2d(table, kernel), (channels, *size), smooth


@st.composite
def subsample(draw):
    channels, kernel = draw(st.integers(1, 4)), (draw(st.integers(1, 3)), draw(st.integers(1, 3)))
    size = kernel[0] + draw(st.integers(0, 6)), kernel[1] + draw(st.integers(0, 6))
    return lecun98.Subsample(channels, kernel, draw(st.sampled_from(["sum", "mean"]))), (channels, *size), smooth


@st.composite
def batch_norm2d(draw):
    # Large sets: over few numbers 1/std is too nonlinear for finite differences.
    channels, height, width = draw(st.integers(1, 4)), draw(st.integers(4, 6)), draw(st.integers(4, 6))
    eps = draw(st.sampled_from([1e-5, 1e-2]))
    layer = layers.BatchNorm2d(channels, eps, 0.1, draw(st.booleans()), draw(st.booleans()))
    return layer, (channels, height, width), smooth


@st.composite
def batch_norm1d(draw):
    layer = layers.BatchNorm1d(draw(st.integers(1, 70)), 1e-2, 0.1, draw(st.booleans()), draw(st.booleans()))
    return layer, (layer.channels,), smooth


@st.composite
def layer_norm(draw):
    shape = draw(st.tuples(st.integers(1, 3), st.integers(2, 5), st.integers(3, 6)) | st.tuples(st.integers(3, 20)))
    layer = layers.LayerNorm(
        shape[draw(st.integers(0, len(shape) - 1)) :], 1e-2, draw(st.booleans()), draw(st.booleans())
    )
    return layer, shape, smooth


@st.composite
def group_norm(draw):
    groups, per = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    shape = (groups * per, draw(st.integers(4, 6)), draw(st.integers(4, 6)))
    return layers.GroupNorm(groups, groups * per, 1e-3, draw(st.booleans())), shape, smooth


@st.composite
def avg_pool2d(draw):
    kernel, stride, padding, _, size = draw(axes(dilated=False, pooling=True))
    divisor = draw(st.none() | st.integers(1, 9))
    layer = layers.AvgPool2d(kernel, stride, padding, draw(st.booleans()), draw(st.booleans()), divisor)
    return layer, (draw(st.integers(1, 3)), *size), smooth


@st.composite
def max_pool2d(draw):
    kernel, stride, padding, dilation, size = draw(axes(pooling=True))
    x, ceil_mode = np.ones((1, 1, *size)), draw(st.booleans())
    out = reference.pool_out(x, kernel, stride, padding, dilation, ceil_mode)
    assume(reference.windows(x, kernel, out, stride, padding, dilation, 0).any((4, 5)).all())
    layer = layers.MaxPool2d(kernel, stride, padding, dilation, ceil_mode)
    return layer, (draw(st.integers(1, 3)), *size), spaced


# Each strategy includes the usual cases, which have specialised loops.
halves = st.tuples(st.integers(1, 3), st.integers(2, 7), st.integers(2, 7))
constants = st.sampled_from([(1.7159, 2 / 3), (1.0, 1.0), (-0.5, 2.0)])
slopes = st.sampled_from([0.01, 0.0, 0.3, -0.2, 1.5])

# Large enough that no mask drops everything.
wide_shapes, wide_maps = st.tuples(st.integers(40, 60)), st.tuples(st.integers(40, 50), st.just(2), st.just(3))

LAYERS = {
    "AdaptiveAvgPool2d": adaptive_avg_pool2d(),
    "ConvTranspose2d": conv_transpose2d(),
    "Unflatten": st.tuples(
        st.builds(layers.Unflatten, st.just(1), st.just((2, -1, 3))), st.just((12,)), st.just(smooth)
    ),
    "Upsample": upsample(),
    "ZeroPad2d": zero_pad2d(),
    "AvgPool2d": avg_pool2d() | st.tuples(st.builds(layers.AvgPool2d, st.just(2)), halves, st.just(smooth)),
    "BatchNorm1d": batch_norm1d(),
    "BatchNorm2d": batch_norm2d(),
    "LayerNorm": layer_norm(),
    "ELU": st.tuples(st.builds(layers.ELU, st.sampled_from([1.0, 0.3])), any_shapes, st.just(spaced)),
    "GELU": st.tuples(st.builds(layers.GELU, st.sampled_from(["none", "tanh"])), any_shapes, st.just(smooth)),
    "Hardtanh": st.tuples(st.builds(layers.Hardtanh, st.just(-0.1), st.just(0.2)), any_shapes, st.just(spaced)),
    "Conv2d": conv2d(),
    "Dropout": st.tuples(st.builds(layers.Dropout, st.sampled_from([0.0, 0.2, 0.5])), wide_shapes, st.just(smooth)),
    "Dropout2d": st.tuples(st.builds(layers.Dropout2d, st.sampled_from([0.0, 0.3])), wide_maps, st.just(smooth)),
    "Flatten": plain(layers.Flatten),
    "GaussianRBF": gaussian_rbf(),
    "GroupNorm": group_norm(),
    "LeakyReLU": st.tuples(st.builds(layers.LeakyReLU, slopes), any_shapes, st.just(spaced)),
    "EuclideanRBF": distances(),
    "Linear": linear(),
    "LogSoftmax": plain(layers.LogSoftmax, st.tuples(st.integers(2, 12))),
    "MappedConv2d": mapped_conv2d(),
    "MaxPool2d": max_pool2d() | st.tuples(st.builds(layers.MaxPool2d, st.just(2)), halves, st.just(spaced)),
    "ScaledTanh": st.tuples(constants.map(lambda c: layers.ScaledTanh(*c)), any_shapes, st.just(smooth)),
    "Softplus": st.tuples(st.builds(layers.Softplus, st.sampled_from([1.0, 2.5])), any_shapes, st.just(smooth)),
    "Softmax": plain(layers.Softmax, st.tuples(st.integers(2, 12))),
    "Subsample": subsample(),
}
# Activations without arguments need no row of their own.
LAYERS |= {
    name: plain(layer, any_shapes, spaced)
    for name, layer in vars(layers).items()
    if isinstance(layer, type) and issubclass(layer, layers._Activation) and isinstance(layer.activation_code, tuple)
}

# Layers without a function in tinycnn/functional.py, and why: see test_places.py.
NOT_IN_FUNCTIONAL = {
    "BatchNorm1d": "is batch_norm",
    "BatchNorm2d": "is batch_norm",
    "Dropout2d": "is dropout with a mask of channels",
    "Flatten": "is reshape",
    "Unflatten": "is reshape",
    "Upsample": "is interpolate",
    "ZeroPad2d": "is pad",
    "GaussianRBF": "torch has none",
}


@devices
@pytest.mark.parametrize("name", LAYERS)
@given(data=st.data())
def test_layer(name, device, data):
    layer, shape, draw_input = data.draw(LAYERS[name])
    sizes = [20, 33] if name == "BatchNorm1d" else [1, 2, 3, 9]  # over few numbers 1/std is too nonlinear
    images, seed = data.draw(st.sampled_from(sizes), label="N"), data.draw(seeds, label="seed")
    assert type(layer).__name__ == name
    model = Sequential(layer, input_shape=shape, rng=seed, dtype=np.float64, device=device)
    x = draw_input(np.random.default_rng(seed), (images, *shape))
    # Not the seed of x: a normalisation is constant along the direction of x.
    assert gradcheck_model(model, x, rtol=RTOL, rng=seed + 1) <= RTOL


@pytest.mark.parametrize("name", ["Conv2d", "ConvTranspose2d", "Linear"])
@given(data=st.data())
def test_layer_without_input_gradient(name, data):
    """The parameters' gradients do not depend on whether that of the images is computed."""
    layer, shape, draw_input = data.draw(LAYERS[name])
    model = Sequential(layer, input_shape=shape, rng=1, dtype=np.float64)
    y = model.forward(draw_input(np.random.default_rng(2), (3, *shape)))
    model.backward(np.cos(y))
    want = model.grad.copy()
    model.grad[...] = np.nan
    plan = model.plan(3)
    plan.dy[...] = np.cos(y)  # a backward may overwrite it
    plan.backward()
    np.testing.assert_array_equal(model.grad, want)


@pytest.mark.parametrize("name", LAYERS)
@settings(max_examples=5)
@given(data=st.data())
def test_layer_passes_nan_on(name, data):
    """From its input to the output, and from the output's gradient to all gradients."""
    layer, shape, draw_input = data.draw(LAYERS[name])
    model = Sequential(layer, input_shape=shape, rng=1, dtype=np.float64).eval()
    plan = model.plan(3, unfused=True)
    plan.x[...] = np.nan
    plan.forward()
    assert np.isnan(plan.y).any()
    plan.x[...] = np.abs(draw_input(np.random.default_rng(2), plan.x.shape))  # ReLU has gradients for positive numbers
    plan.forward()
    plan.dy[...] = np.nan
    plan.backward(input_gradient=True)
    assert all(np.isnan(gradient).any() for gradient in (plan.dx, model.grad) if gradient.size)


# --- losses: builder of (loss, target) for x of shape (N, K) ----------------------------------------------------------


def cross_entropy(draw, N, K, rng):
    weight = rng.uniform(0.1, 2, K) if draw(st.booleans()) else None
    target = rng.integers(0, K, N)
    target[1:][rng.random(N - 1) < 0.3] = -100
    smoothing = draw(st.sampled_from([0.0, 0.1, 0.9]))
    return CrossEntropyLoss(weight, -100, draw(st.sampled_from(["mean", "sum", "none"])), smoothing), target


def mse(draw, N, K, rng):
    return MSELoss(draw(st.sampled_from(["mean", "sum", "none"]))), rng.standard_normal((N, K))


def nearest(draw, N, K, rng):
    rubbish = draw(st.sampled_from([None, 0.0, 1.5]))
    reduction, factor = draw(st.sampled_from(["mean", "sum"])), draw(st.sampled_from([1.0, 0.5]))
    return lecun98.RBFLoss(rubbish, reduction, factor=factor), rng.integers(0, K, N)


def one_hot_mse(draw, N, K, rng):
    return OneHotMSELoss(draw(st.sampled_from(["mean", "sum"]))), rng.integers(0, K, N)


reductions = st.sampled_from(["mean", "sum", "none"])


def l1(draw, N, K, rng):
    return losses.L1Loss(draw(reductions)), rng.standard_normal((N, K))


def huber(draw, N, K, rng):
    return losses.HuberLoss(draw(reductions), draw(st.sampled_from([0.5, 1.0, 3.0]))), rng.standard_normal((N, K))


def bce(draw, N, K, rng):
    weight, pos_weight = (rng.uniform(0.5, 2, K) if draw(st.booleans()) else None for _ in range(2))
    return losses.BCEWithLogitsLoss(weight, draw(reductions), pos_weight), rng.uniform(0, 1, (N, K)).round(1)


def nll(draw, N, K, rng):
    weight = rng.uniform(0.1, 2, K) if draw(st.booleans()) else None
    target = rng.integers(0, K, N)
    target[1:][rng.random(N - 1) < 0.3] = -100
    return losses.NLLLoss(weight, -100, draw(reductions)), target


LOSSES = {
    "BCEWithLogitsLoss": bce,
    "CrossEntropyLoss": cross_entropy,
    "HuberLoss": huber,
    "L1Loss": l1,
    "MSELoss": mse,
    "NLLLoss": nll,
    "OneHotMSELoss": one_hot_mse,
    "RBFLoss": nearest,
}


@pytest.mark.parametrize("name", LOSSES)
@given(data=st.data(), N=st.integers(1, 9), K=st.integers(2, 12), seed=seeds)
def test_loss(name, data, N, K, seed):
    rng = np.random.default_rng(seed)
    loss, target = LOSSES[name](data.draw, N, K, rng)
    assert type(loss).__name__ == name

    def backward(dy, x):
        gradient = loss(x, target)[1]
        return gradient * np.reshape(dy, np.shape(dy) + (1,) * (gradient.ndim - np.ndim(dy)))

    x = rng.standard_normal((N, K))
    assert gradcheck(lambda x: loss(x, target)[0], backward, [x], rtol=RTOL, rng=seed) <= RTOL


# --- whole nets -------------------------------------------------------------------------------------------------------


@devices
@pytest.mark.parametrize("images", [1, 10])
@pytest.mark.parametrize(("activation", "pool"), [("tanh", "avg"), ("relu", "max"), ("sigmoid", "avg")])
def test_lenet5(activation, pool, images, device):
    model = models.lenet5(activation, pool, rng=1, dtype=np.float64, device=device)
    x = np.random.default_rng(2).standard_normal((images, 1, 28, 28))
    # A small eps makes it unlikely that a kink of ReLU or of the maximum is crossed.
    options = {"eps": 1e-7, "rtol": 1e-6} if activation == "relu" else {"rtol": RTOL}
    gradcheck_model(model, x, rng=3, **options)


def test_lenet5_with_its_loss():
    model, loss = models.lenet5(rng=1, dtype=np.float64), CrossEntropyLoss(label_smoothing=0.1)
    rng = np.random.default_rng(4)
    x, target, theta = rng.standard_normal((9, 1, 28, 28)), rng.integers(0, 10, 9), model.theta.copy()

    def forward(theta):
        model.theta[...] = theta
        return loss(model.forward(x), target)[0]

    def backward(dy, theta):
        forward(theta)
        model.backward(dy * loss(model.forward(x), target)[1])
        return model.grad.copy()

    gradcheck(forward, backward, [theta], rtol=RTOL, rng=5)


def test_gradcheck_restores_the_model():
    model = models.lenet5(rng=1, dtype=np.float64)
    before = model.theta.copy()
    gradcheck_model(model, np.ones((1, 1, 28, 28)), rng=1)
    np.testing.assert_array_equal(model.theta, before)


# --- gradcheck --------------------------------------------------------------------------------------------------------

W = np.random.default_rng(6).standard_normal((30, 20))


def affine(x, b):
    return np.tanh(x @ W.T + b)


def affine_backward(dy, x, b):
    d = dy * (1 - affine(x, b) ** 2)
    return d @ W, d.sum(0)


INPUTS = [np.random.default_rng(7).standard_normal((5, 20)), np.zeros(30)]


def planted(fault):
    def backward(dy, *inputs):
        return fault(*affine_backward(dy, *inputs))

    return backward


def test_correct_gradients_pass():
    assert gradcheck(affine, affine_backward, INPUTS, rtol=RTOL, rng=8) <= RTOL
    gradcheck(affine, planted(lambda dx, db: (dx, None)), INPUTS, rng=8)  # None: not differentiated
    gradcheck(np.sin, lambda dy, x: dy * np.cos(x), [INPUTS[0]], rng=8)  # a single gradient need not be a tuple


FINE = 1e-8  # far below the planted error, well above rounding


def test_an_error_of_1e_5_in_one_bias_gradient_fails():
    def fault(dx, db):
        db[11] *= 1 + 1e-5
        return dx, db

    for seed in range(20):
        gradcheck(affine, affine_backward, INPUTS, rtol=FINE, rng=seed)
        with pytest.raises(AssertionError, match="disagree"):
            gradcheck(affine, planted(fault), INPUTS, rtol=FINE, rng=seed)


def test_an_error_of_1e_5_in_one_bias_gradient_of_a_model_fails(monkeypatch):
    model = Sequential(
        layers.Conv2d(1, 4, 3), layers.Tanh(), layers.Flatten(), layers.Linear(64, 10), input_shape=(1, 6, 6), rng=1,
        dtype=np.float64,
    )  # fmt: skip
    x = np.random.default_rng(2).standard_normal((4, 1, 6, 6))
    gradcheck_model(model, x, rtol=FINE, rng=3)
    right = model[3].backward

    def wrong(*arguments):
        right(*arguments)
        model[3].bias_grad[4] *= 1 + 1e-5

    monkeypatch.setattr(model[3], "backward", wrong)
    with pytest.raises(AssertionError, match="disagree"):
        gradcheck_model(model, x, rtol=FINE, rng=3)


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (lambda dx, db: (-dx, db), "disagree"),
        (lambda dx, db: (dx * (1 + 1e-5), db), "disagree"),
        (lambda dx, db: (dx, db * 0.999), "disagree"),
        (lambda dx, db: (dx[:, ::-1], db), "disagree"),
        (lambda dx, db: (dx, np.zeros_like(db)), "gradient 1 is all zero"),
        (lambda dx, db: (np.zeros_like(dx), np.zeros_like(db)), "gradient 0 is all zero"),
        (lambda dx, db: (dx * np.nan, db), "gradient 0 is not finite"),
        (lambda dx, db: (dx, np.where(np.arange(30) == 3, np.inf, db)), "gradient 1 is not finite"),
        (lambda dx, db: (dx.T, db), r"gradient 0 must have shape \(5, 20\)"),
        (lambda dx, db: (dx, db[None]), "gradient 1 must have shape"),
        (lambda dx, db: (dx,), "one gradient an input, 2, got 1"),
    ],
)
def test_wrong_gradients_fail(fault, words):
    with pytest.raises(AssertionError, match=words):
        gradcheck(affine, planted(fault), INPUTS, rng=9)


@pytest.mark.parametrize("dtype", [np.float32, np.int64, np.float16])
def test_float64_only(dtype):
    with pytest.raises(ValueError, match="inputs must be float64"):
        gradcheck(affine, affine_backward, [INPUTS[0].astype(dtype), INPUTS[1]])


def test_float32_model():
    model = Sequential(layers.Linear(3, 2), rng=1)
    with pytest.raises(ValueError, match="inputs must be float64"):
        gradcheck_model(model, np.ones((2, 3)))
