"""Which activation a formula of element-wise operators is: from its values on a grid of numbers."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from tinycnn import layers
from tinycnn._typing import Array
from tinycnn.layers import Layer

FAR = np.array([10.0, 15.0, 30.0, 100.0, 1e3, 1e4, 1e6])
GRID = np.concatenate([-FAR[::-1], np.linspace(-8, 8, 65), FAR])
CENTRE = slice(len(FAR), -len(FAR))  # where no formula overflows
ONE, ZERO = (int(np.flatnonzero(value == GRID)[0]) for value in (1.0, 0.0))

_erf = np.vectorize(math.erf, otypes=[np.float64])


def sigmoid(x: Array) -> Array:
    value: Array = 0.5 * (1 + np.tanh(0.5 * x))
    return value


def softplus(x: Array) -> Array:
    value: Array = np.logaddexp(0, x)
    return value


def _where(condition: Any, a: Any, b: Any) -> Array:
    return np.asarray(np.where(condition != 0, a, b))


FUNCTIONS: dict[str, Callable[..., Array]] = {
    "Abs": np.abs,
    "Erf": _erf,
    "Exp": np.exp,
    "Greater": np.greater,
    "GreaterOrEqual": np.greater_equal,
    "Less": np.less,
    "LessOrEqual": np.less_equal,
    "Log": np.log,
    "Reciprocal": lambda x: 1 / x,
    "Sqrt": np.sqrt,
    "Where": _where,
}
OPERATIONS: dict[str, Callable[[Array, Array], Array]] = {
    "Add": np.add,
    "Div": np.divide,
    "Max": np.maximum,
    "Min": np.minimum,
    "Mul": np.multiply,
    "Pow": np.power,
    "Sub": np.subtract,
}


def values(layer: Layer, x: Array) -> Array:
    """The activation `layer` of x, in float64."""
    formulas: dict[type[Layer], Callable[[Any], Array]] = {
        layers.Tanh: lambda _: np.tanh(x),
        layers.ScaledTanh: lambda a: a.A * np.tanh(a.S * x),
        layers.Sigmoid: lambda _: sigmoid(x),
        layers.ReLU: lambda _: np.maximum(x, 0),
        layers.ReLU6: lambda _: np.clip(x, 0, 6),
        layers.LeakyReLU: lambda a: np.where(x > 0, x, a.negative_slope * x),
        layers.ELU: lambda a: np.where(x > 0, x, a.alpha * np.expm1(np.minimum(x, 0))),
        layers.GELU: lambda a: _gelu(x, a.approximate),
        layers.SiLU: lambda _: x * sigmoid(x),
        layers.Softplus: lambda a: np.where(a.beta * x > a.threshold, x, softplus(a.beta * x) / a.beta),
        layers.Hardtanh: lambda a: np.clip(x, a.min_val, a.max_val),
    }
    with np.errstate(all="ignore"):
        return formulas[type(layer)](layer)


def _gelu(x: Array, approximate: str) -> Array:
    inner = _erf(x / math.sqrt(2)) if approximate == "none" else np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))
    value: Array = 0.5 * x * (1 + inner)
    return value


def identify(curve: Array, thresholds: Iterable[float] = ()) -> Layer | None:
    """The activation whose values on `GRID` are `curve`; None if there is none.

    thresholds  with which the graph compares: a Softplus may have one of them
    """
    if not np.isfinite(curve[CENTRE]).all():
        return None
    finite = np.isfinite(curve)
    for layer in _candidates(curve, thresholds):
        expected = values(layer, GRID)
        if np.allclose(curve[finite], expected[finite], rtol=1e-5, atol=1e-6):
            return layer
    return None


def affine(curve: Array) -> tuple[float, float] | None:
    """(scale, shift) if the values of `curve` on `GRID` are scale * x + shift."""
    if not np.isfinite(curve).all():
        return None
    shift, scale = float(curve[ZERO]), float(curve[ONE] - curve[ZERO])
    return (scale, shift) if np.allclose(curve, scale * GRID + shift, rtol=1e-6, atol=1e-7) else None


def _candidates(curve: Array, thresholds: Iterable[float]) -> list[Layer]:
    """Activations with the settings that `curve` would determine."""
    found: list[Layer] = [layers.ReLU(), layers.ReLU6(), layers.Sigmoid(), layers.SiLU(), layers.GELU()]
    found += [layers.GELU("tanh"), layers.Tanh()]
    one, minus_one, zero = float(curve[ONE]), float(curve[2 * ZERO - ONE]), float(curve[ZERO])
    low, high, far = float(np.nanmin(curve)), float(np.nanmax(curve)), float(curve[-1])
    if GRID[0] < low < high < GRID[-1]:
        found.append(layers.Hardtanh(low, high))
    found.append(layers.LeakyReLU(-minus_one))
    if minus_one < 0:
        found.append(layers.ELU(minus_one / math.expm1(-1)))
    if math.isfinite(far) and far != 0 and 0 < abs(one / far) < 1:
        found.append(layers.ScaledTanh(far, math.atanh(one / far)))
    if zero > 0:
        found += [layers.Softplus(math.log(2) / zero, threshold) for threshold in (20.0, *thresholds)]
    return found
