"""Random small networks of all layers, with random arguments, weights and running statistics.

Norms have a group of at least four numbers and an eps that is not small: two programs' rounding errors must stay small.
"""

import numpy as np

from tinycnn import Residual, Sequential, layers, lecun98


def random_net(seed, dtype=np.float32):
    """A random model in evaluation mode: a chain of one to six steps on maps, then up to four on vectors."""
    rng = np.random.default_rng(seed)
    shape = input_shape = tuple(int(n) for n in rng.integers((1, 6, 6), (5, 13, 13)))
    chain = []
    for _ in range(rng.integers(1, 7)):
        shape = add(chain, rng, MAPS, shape)
    shape = (int(np.prod(shape)),)
    chain.append(layers.Flatten())
    for _ in range(rng.integers(0, 5)):
        shape = add(chain, rng, VECTORS, shape)
    if rng.random() < 0.5:
        chain.append(HEADS[rng.integers(len(HEADS))](rng, shape))
    return randomize(Sequential(*chain, input_shape=input_shape, rng=rng, dtype=dtype), rng)


def randomize(model, rng):
    """The model in evaluation mode, with random norms."""
    state = model.state_dict()
    for prefix, layer in model.named_layers():
        if "Norm" in type(layer).__name__:
            for name in ("weight", "bias", "running_mean", "running_var"):
                if f"{prefix}.{name}" in state:
                    low, high = (0.5, 1.5) if name in ("weight", "running_var") else (-0.5, 0.5)
                    state[f"{prefix}.{name}"] = rng.uniform(low, high, state[f"{prefix}.{name}"].shape)
    model.load_state_dict(state)
    return model.eval()


def random_input(model, n, seed=0):
    """(n, *input_shape) float32."""
    return np.random.default_rng(seed).standard_normal((n, *model.input_shape)).astype(np.float32)


def add(chain, rng, makers, shape):
    """Append a random layer that fits; returns the shape of its output."""
    while True:
        layer = makers[rng.integers(len(makers))](rng, shape)
        try:
            output = layer.output_shape(shape)
        except ValueError:  # the maps are too small for the window
            continue
        if np.prod(output) <= 3000:
            chain.append(layer)
            return output


def pick(rng, *values):
    return values[rng.integers(len(values))]


def flag(rng):
    return bool(rng.integers(2))


def pair(rng, low, high):
    """A pair of integers, the last one included."""
    return tuple(int(n) for n in rng.integers(low, high + 1, 2))


def conv2d(rng, shape):
    groups = pick(rng, 1, 1, *(g for g in (2, 3, 4) if shape[0] % g == 0))
    kernel, dilation = pair(rng, 1, 3), pair(rng, 1, 2)
    if rng.random() < 0.4:
        return layers.Conv2d(shape[0], 2 * groups, kernel, 1, "same", dilation, groups, flag(rng))
    return layers.Conv2d(shape[0], 2 * groups, kernel, pair(rng, 1, 2), pair(rng, 0, 2), dilation, groups, flag(rng))


def conv_transpose2d(rng, shape):
    stride, groups = pair(rng, 1, 2), pick(rng, 1, *(g for g in (2, 3) if shape[0] % g == 0))
    extra = tuple(int(rng.integers(s)) for s in stride)
    window = pair(rng, 1, 3), stride, pair(rng, 0, 1), extra
    return layers.ConvTranspose2d(shape[0], 2 * groups, *window, groups, flag(rng), pair(rng, 1, 2))


def mapped_conv2d(rng, shape):
    outputs = int(rng.integers(1, 5))
    table = rng.random((shape[0], outputs)) < 0.6
    table[rng.integers(shape[0])] = table[:, rng.integers(outputs)] = True
    return lecun98.MappedConv2d(table, pair(rng, 1, 3))


def max_pool2d(rng, shape):
    kernel, stride = pair(rng, 1, 3), pair(rng, 1, 3)
    if rng.random() < 0.2:
        return layers.MaxPool2d(kernel, 1, "same")
    return layers.MaxPool2d(kernel, stride, tuple(k // 2 for k in kernel), pick(rng, 1, 1, 2), flag(rng))


def avg_pool2d(rng, shape):
    kernel, stride = pair(rng, 1, 3), pair(rng, 1, 3)
    padding = tuple(int(rng.integers(k // 2 + 1)) for k in kernel)
    return layers.AvgPool2d(kernel, stride, padding, flag(rng), flag(rng), pick(rng, None, None, 3))


def upsample(rng, shape):
    if flag(rng):
        return layers.Upsample(scale_factor=pair(rng, 1, 2))
    return layers.Upsample(tuple(int(n + rng.integers(5)) for n in shape[1:]))


def group_norm(rng, shape):
    groups = pick(rng, *(g for g in (1, 2, 3) if shape[0] % g == 0))
    if np.prod(shape) // groups < 4:  # the quotient of two rounding errors
        groups = 1
    return layers.GroupNorm(groups, shape[0], 1e-3, flag(rng))


def layer_norm(rng, shape):
    if shape[-1] < 4:
        return activation(rng, shape)
    return layers.LayerNorm(shape[rng.integers(len(shape) - 1) if len(shape) > 1 else 0 :], 1e-3, flag(rng), flag(rng))


def residual(rng, shape):
    """The chain keeps the shape of maps, or both it and the projection halve it."""
    channels, stride = shape[0], pick(rng, 1, 1, 2)
    outputs = channels if stride == 1 else 2
    chain = [layers.Conv2d(channels, outputs, 3, stride, padding=1, bias=flag(rng)), activation(rng, shape)]
    if flag(rng):
        chain.append(layers.BatchNorm2d(outputs))
    if rng.random() < 0.3:
        chain.append(Residual(activation(rng, shape), layers.Dropout2d(0.3)))
    projection = [] if stride == 1 else [layers.Conv2d(channels, outputs, 1, 2, bias=False)]
    return Residual(*chain, projection=projection)


def vector_residual(rng, shape):
    return Residual(layers.Linear(shape[0], shape[0]), activation(rng, shape))


def activation(rng, shape):
    makers = (
        layers.Tanh, layers.Sigmoid, layers.ReLU, layers.SiLU, layers.ReLU6, lambda: layers.ScaledTanh(1.2, 0.7),
        lambda: layers.LeakyReLU(pick(rng, 0.01, 0.3, -0.2)), lambda: layers.ELU(pick(rng, 1.0, 0.3)),
        lambda: layers.GELU(pick(rng, "none", "tanh")), lambda: layers.Softplus(*pick(rng, (1.0, 20.0), (2.0, 1.0))),
        lambda: layers.Hardtanh(-0.4, 0.7),
    )  # fmt: skip
    return pick(rng, *makers)()


def linear(rng, shape):
    return layers.Linear(shape[0], int(rng.integers(2, 12)), flag(rng))


def gaussian_rbf(rng, shape):
    if shape[0] > 12:  # a rounding error of the exponent is a large one of the result if the exponent is large
        return linear(rng, shape)
    return layers.GaussianRBF(shape[0], int(rng.integers(2, 5)), 0.1)


MAPS = [
    conv2d, conv2d, conv_transpose2d, mapped_conv2d, max_pool2d, max_pool2d, avg_pool2d, avg_pool2d, upsample,
    group_norm, layer_norm, residual, residual, activation, activation, activation,
    lambda rng, shape: layers.AdaptiveAvgPool2d(pick(rng, 1, 2, (3, None), (None, 4), (3, 5))),
    lambda rng, shape: layers.ZeroPad2d(tuple(int(n) for n in rng.integers(-1, 3, 4))),
    lambda rng, shape: layers.BatchNorm2d(shape[0], pick(rng, 1e-5, 1e-2), affine=flag(rng)),
    lambda rng, shape: layers.Dropout2d(0.2),
    lambda rng, shape: lecun98.Subsample(shape[0], pick(rng, 2, (1, 2)), pick(rng, "sum", "mean")),
]  # fmt: skip

VECTORS = [
    linear, linear, linear, layer_norm, vector_residual, activation, activation,
    lambda rng, shape: layers.BatchNorm1d(shape[0], 1e-3, affine=flag(rng)),
    lambda rng, shape: layers.Dropout(0.5),
    gaussian_rbf,
]  # fmt: skip

HEADS = [  # not before a norm, which would divide rounding errors of large numbers by their small deviation
    lambda rng, shape: lecun98.EuclideanRBF(rng.standard_normal((int(rng.integers(2, 5)), shape[0]))),
    lambda rng, shape: layers.Softmax(),
    lambda rng, shape: layers.LogSoftmax(),
]
