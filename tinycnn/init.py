"""Initial weights by the rules of torch.nn.init, for all convolutions and fully connected layers of a model."""

import math

import numpy as np

from tinycnn import _check
from tinycnn.layers import Parametric

# What a nonlinearity takes from the spread of its input, as torch.nn.init.calculate_gain has it.
GAIN = {"linear": 1.0, "sigmoid": 1.0, "tanh": 5 / 3, "relu": math.sqrt(2)}


def xavier_uniform(model, gain=1.0, *, rng=None):
    """U(-a, a) with a = gain * sqrt(6 / (fan_in + fan_out)) (Glorot and Bengio 2010)."""
    _draw(model, rng, lambda r, shape, fan_in, fan_out: _uniform(r, shape, gain * math.sqrt(6 / (fan_in + fan_out))))


def xavier_normal(model, gain=1.0, *, rng=None):
    """N(0, s^2) with s = gain * sqrt(2 / (fan_in + fan_out)) (Glorot and Bengio 2010)."""
    _draw(model, rng, lambda r, shape, i, o: gain * math.sqrt(2 / (i + o)) * r.standard_normal(shape))


def kaiming_uniform(model, nonlinearity="relu", *, rng=None):
    """U(-a, a) with a = GAIN[nonlinearity] * sqrt(3 / fan_in) (He et al. 2015)."""
    gain = GAIN[_check.choice("nonlinearity", nonlinearity, tuple(GAIN))]
    _draw(model, rng, lambda r, shape, fan_in, _: _uniform(r, shape, gain * math.sqrt(3 / fan_in)))


def kaiming_normal(model, nonlinearity="relu", *, rng=None):
    """N(0, s^2) with s = GAIN[nonlinearity] / sqrt(fan_in) (He et al. 2015)."""
    gain = GAIN[_check.choice("nonlinearity", nonlinearity, tuple(GAIN))]
    _draw(model, rng, lambda r, shape, fan_in, _: gain / math.sqrt(fan_in) * r.standard_normal(shape))


def constant_bias(model, value=0.0):
    """Every bias of a convolution or fully connected layer."""
    value = _check.number("value", value)
    _set(model, "bias", lambda shape: np.full(shape, value))


def _uniform(rng, shape, bound):
    return rng.uniform(-bound, bound, shape)


def _draw(model, rng, rule):
    rng = np.random.default_rng(rng)

    def weight(shape):
        each = math.prod(shape[2:])  # positions of the kernel; 1 for a fully connected layer
        return rule(rng, shape, shape[1] * each, shape[0] * each)

    _set(model, "weight", weight)


def _set(model, attribute, values):
    state = {
        f"{number}.{attribute}": values(layer.parameter_shapes()[attribute])
        for number, layer in enumerate(model.layers)
        if isinstance(layer, Parametric) and attribute in layer.parameter_shapes()
    }
    if not state:
        raise ValueError(f"the model has no convolution or fully connected layer with a {attribute}")
    model.load_state_dict(state, strict=False)
