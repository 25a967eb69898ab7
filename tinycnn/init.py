"""Initial weights by the rules of torch.nn.init, for the convolutions and fully connected layers of a model.

`only` restricts a rule to layers of that class.
"""

import math
from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np

from tinycnn import _check
from tinycnn._typing import Array, Rng, Shape
from tinycnn.layers import Layer, Parametric
from tinycnn.model import Sequential

# Gains as in torch.nn.init.calculate_gain: factors on the standard deviation of the weights before a nonlinearity.
GAIN = {"linear": 1.0, "sigmoid": 1.0, "tanh": 5 / 3, "relu": math.sqrt(2)}

Rule: TypeAlias = Callable[[np.random.Generator, Shape, int, int], Array]  # (rng, shape, fan_in, fan_out)
Only: TypeAlias = type[Layer] | None


def xavier_uniform(model: Sequential, gain: float = 1.0, *, only: Only = None, rng: Rng = None) -> None:
    """U(-a, a) with a = gain * sqrt(6 / (fan_in + fan_out)) (Glorot and Bengio 2010)."""
    _draw(model, only, rng, lambda r, shape, i, o: _uniform(r, shape, gain * math.sqrt(6 / (i + o))))


def xavier_normal(model: Sequential, gain: float = 1.0, *, only: Only = None, rng: Rng = None) -> None:
    """N(0, s^2) with s = gain * sqrt(2 / (fan_in + fan_out)) (Glorot and Bengio 2010)."""
    _draw(model, only, rng, lambda r, shape, i, o: gain * math.sqrt(2 / (i + o)) * r.standard_normal(shape))


def kaiming_uniform(model: Sequential, nonlinearity: str = "relu", *, only: Only = None, rng: Rng = None) -> None:
    """U(-a, a) with a = GAIN[nonlinearity] * sqrt(3 / fan_in) (He et al. 2015)."""
    gain = GAIN[_check.choice("nonlinearity", nonlinearity, tuple(GAIN))]
    _draw(model, only, rng, lambda r, shape, fan_in, _: _uniform(r, shape, gain * math.sqrt(3 / fan_in)))


def kaiming_normal(model: Sequential, nonlinearity: str = "relu", *, only: Only = None, rng: Rng = None) -> None:
    """N(0, s^2) with s = GAIN[nonlinearity] / sqrt(fan_in) (He et al. 2015)."""
    gain = GAIN[_check.choice("nonlinearity", nonlinearity, tuple(GAIN))]
    _draw(model, only, rng, lambda r, shape, fan_in, _: gain / math.sqrt(fan_in) * r.standard_normal(shape))


def truncated_normal(model: Sequential, std: float = 0.1, *, only: Only = None, rng: Rng = None) -> None:
    """N(0, std^2); values beyond two standard deviations are drawn again (TensorFlow's default)."""
    std = _check.number("std", std, 0)

    def draw(rng: np.random.Generator, shape: Shape, fan_in: int, fan_out: int) -> Array:
        values = rng.standard_normal(shape)
        while (beyond := np.abs(values) > 2).any():
            values[beyond] = rng.standard_normal(np.count_nonzero(beyond))
        return std * values

    _draw(model, only, rng, draw)


def constant_bias(model: Sequential, value: float = 0.0, *, only: Only = None) -> None:
    """Set every bias of a convolution or fully connected layer to `value`."""
    value = _check.number("value", value)
    _set(model, only, "bias", lambda shape: np.full(shape, value))


def lecun1998(
    model: Sequential,
    root: bool = False,
    *,
    gain: float = 2.4,
    coefficient: float | None = None,
    biases: bool = False,
    rng: Rng = None,
) -> None:
    """U(-2.4/F, 2.4/F) with F the number of inputs of a unit (LeCun et al. 1998, appendix A), in every layer with a
    bias and a fan-in: not in normalisations.

    root         U(-2.4/sqrt(F), 2.4/sqrt(F)), another reading of the paper
    gain         instead of 2.4; sqrt(3) with `root` gives a standard deviation of 1/sqrt(F), the rule of "Efficient
                 BackProp" (LeCun, Bottou, Orr and Mueller 1998)
    coefficient  the initial coefficients of `lecun98.Subsample`, which are drawn like weights by default; the paper
                 has no rule for them
    biases       draw the biases, for which the paper has no rule, like the weights, except those of `Subsample` if
                 `coefficient` is given.  By default they are zero.
    """
    from tinycnn.lecun98 import Subsample

    rng, gain = _check.generator("rng", rng), _check.number("gain", gain, 1e-12)
    coefficient = None if coefficient is None else _check.number("coefficient", coefficient)
    state = model.state_dict()
    layers: list[tuple[str, Any]] = [*model.leaves]
    for name, layer in layers:
        if f"{name}.bias" in state and hasattr(layer, "fan_in"):
            fan_in = layer.fan_in()
            bound = gain / (np.sqrt(fan_in) if root else fan_in)
            weight, bias = state[f"{name}.weight"], state[f"{name}.bias"]
            given = coefficient is not None and isinstance(layer, Subsample)
            weight[...] = coefficient if given else layer.broadcast_to_weight(bound) * rng.uniform(-1, 1, weight.shape)
            bias[...] = bound * rng.uniform(-1, 1, bias.shape) if biases and not given else 0
    model.load_state_dict(state)


def _uniform(rng: np.random.Generator, shape: Shape, bound: float) -> Array:
    return rng.uniform(-bound, bound, shape)


def _draw(model: Sequential, only: Only, rng: Rng, rule: Rule) -> None:
    """Set every weight by `rule`."""
    generator = _check.generator("rng", rng)

    def weight(shape: Shape) -> Array:
        taps = math.prod(shape[2:])  # KH * KW; 1 for a fully connected layer
        return rule(generator, shape, shape[1] * taps, shape[0] * taps)

    _set(model, only, "weight", weight)


def _set(model: Sequential, only: Only, attribute: str, values: Callable[[Shape], Array]) -> None:
    """Set a parameter of every layer of the class `only` to values(its shape)."""
    layer_class = Parametric if only is None else only
    state = {
        f"{name}.{attribute}": values(layer.parameter_shapes()[attribute])
        for name, layer in model.leaves
        if isinstance(layer, layer_class) and attribute in layer.parameter_shapes()
    }
    if not state:
        kind = "convolution or fully connected layer" if only is None else only.__name__
        raise ValueError(f"the model has no {kind} with a {attribute}")
    model.load_state_dict(state, strict=False)
