"""Initial weights by the rules of torch.nn.init, for the convolutions and fully connected layers of a model.

`only` restricts a rule to layers of that class.
"""

import math

import numpy as np

from tinycnn import _check
from tinycnn.layers import Parametric

# What a nonlinearity takes from the spread of its input, as torch.nn.init.calculate_gain has it.
GAIN = {"linear": 1.0, "sigmoid": 1.0, "tanh": 5 / 3, "relu": math.sqrt(2)}


def xavier_uniform(model, gain=1.0, *, only=None, rng=None):
    """U(-a, a) with a = gain * sqrt(6 / (fan_in + fan_out)) (Glorot and Bengio 2010)."""
    _draw(model, only, rng, lambda r, shape, i, o: _uniform(r, shape, gain * math.sqrt(6 / (i + o))))


def xavier_normal(model, gain=1.0, *, only=None, rng=None):
    """N(0, s^2) with s = gain * sqrt(2 / (fan_in + fan_out)) (Glorot and Bengio 2010)."""
    _draw(model, only, rng, lambda r, shape, i, o: gain * math.sqrt(2 / (i + o)) * r.standard_normal(shape))


def kaiming_uniform(model, nonlinearity="relu", *, only=None, rng=None):
    """U(-a, a) with a = GAIN[nonlinearity] * sqrt(3 / fan_in) (He et al. 2015)."""
    gain = GAIN[_check.choice("nonlinearity", nonlinearity, tuple(GAIN))]
    _draw(model, only, rng, lambda r, shape, fan_in, _: _uniform(r, shape, gain * math.sqrt(3 / fan_in)))


def kaiming_normal(model, nonlinearity="relu", *, only=None, rng=None):
    """N(0, s^2) with s = GAIN[nonlinearity] / sqrt(fan_in) (He et al. 2015)."""
    gain = GAIN[_check.choice("nonlinearity", nonlinearity, tuple(GAIN))]
    _draw(model, only, rng, lambda r, shape, fan_in, _: gain / math.sqrt(fan_in) * r.standard_normal(shape))


def truncated_normal(model, std=0.1, *, only=None, rng=None):
    """N(0, std^2) without what lies beyond two standard deviations, which is drawn again (TensorFlow's default)."""
    std = _check.number("std", std, 0)

    def draw(r, shape, *_):
        values = r.standard_normal(shape)
        while (beyond := np.abs(values) > 2).any():
            values[beyond] = r.standard_normal(np.count_nonzero(beyond))
        return std * values

    _draw(model, only, rng, draw)


def constant_bias(model, value=0.0, *, only=None):
    """Every bias of a convolution or fully connected layer."""
    value = _check.number("value", value)
    _set(model, only, "bias", lambda shape: np.full(shape, value))


def lecun1998(model, root=False, *, rng=None):
    """U(-2.4/F, 2.4/F) with F the number of inputs of a unit (LeCun et al. 1998, appendix A), in every layer with a
    weight and a bias.

    With `root`, as some read the paper, U(-2.4/sqrt(F), 2.4/sqrt(F)).  It has no rule for biases: they are zero here.
    """
    rng = _check.generator("rng", rng)
    state = model.state_dict()
    for number, layer in enumerate(model.layers):
        if f"{number}.bias" in state:
            bound = layer.broadcast_to_weight(2.4 / (np.sqrt(layer.fan_in()) if root else layer.fan_in()))
            state[f"{number}.weight"] = bound * rng.uniform(-1, 1, state[f"{number}.weight"].shape)
            state[f"{number}.bias"] = np.zeros_like(state[f"{number}.bias"])
    model.load_state_dict(state)


def _uniform(rng, shape, bound):
    return rng.uniform(-bound, bound, shape)


def _draw(model, only, rng, rule):
    rng = _check.generator("rng", rng)

    def weight(shape):
        each = math.prod(shape[2:])  # positions of the kernel; 1 for a fully connected layer
        return rule(rng, shape, shape[1] * each, shape[0] * each)

    _set(model, only, "weight", weight)


def _set(model, only, attribute, values):
    kind = Parametric if only is None else only
    state = {
        f"{number}.{attribute}": values(layer.parameter_shapes()[attribute])
        for number, layer in enumerate(model.layers)
        if isinstance(layer, kind) and attribute in layer.parameter_shapes()
    }
    if not state:
        what = "convolution or fully connected layer" if only is None else only.__name__
        raise ValueError(f"the model has no {what} with a {attribute}")
    model.load_state_dict(state, strict=False)
