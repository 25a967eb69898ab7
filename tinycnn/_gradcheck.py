"""Gradient check by central differences along random directions.

For y = f(x, ...), random v on all inputs at once and random u on the output, the backward must give

    v . J^T u  =  (u . f(x + eps v) - u . f(x - eps v)) / (2 eps)

Two evaluations of f test every entry of every gradient at once.  In float64 the two sides agree to about 1e-9, so an
error of 1e-5 in a single bias gradient is found.  Gradients that are all zero fail: comparing zeros proves nothing.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from tinycnn import _check
from tinycnn._typing import Array, Rng
from tinycnn.model import Sequential


def gradcheck(
    forward: Callable[..., Any],
    backward: Callable[..., Any],
    inputs: Sequence[Array],
    *,
    eps: float = 1e-5,
    rtol: float = 1e-6,
    directions: int = 3,
    rng: Rng = None,
) -> float:
    """Compare a backward function with finite differences of its forward.

    forward   ``forward(*inputs)`` -> array
    backward  ``backward(dy, *inputs)`` -> one gradient per input, in order; None for an input without one
    inputs    float64 arrays

    Returns the largest relative difference found, which is at most rtol.
    Raises AssertionError if the two differ by more, or if a gradient is all zero, not finite or of the wrong shape.
    Raises ValueError if inputs are not float64.
    """
    inputs = [np.asarray(x) for x in inputs]
    if any(x.dtype != np.float64 for x in inputs):
        raise ValueError(f"inputs must be float64, got {[str(x.dtype) for x in inputs]}")
    rng = _check.generator("rng", rng)
    worst = 0.0
    for _ in range(directions):
        y = np.asarray(forward(*inputs))
        u = rng.standard_normal(y.shape)
        gradients = backward(u, *inputs)
        gradients = gradients if isinstance(gradients, tuple | list) else (gradients,)
        if len(gradients) != len(inputs):
            raise AssertionError(f"backward must give one gradient an input, {len(inputs)}, got {len(gradients)}")
        v, analytic, scale = [], 0.0, 0.0
        for number, (x, g) in enumerate(zip(inputs, gradients, strict=True)):
            direction = rng.standard_normal(x.shape)
            if g is None:
                direction = np.zeros(x.shape)
            elif np.shape(g) != x.shape:
                raise AssertionError(f"gradient {number} must have shape {x.shape}, got {np.shape(g)}")
            elif not np.isfinite(g).all():
                raise AssertionError(f"gradient {number} is not finite")
            elif not np.any(g):
                raise AssertionError(f"gradient {number} is all zero")
            else:
                analytic += float(np.vdot(g, direction))
                scale += float(np.linalg.norm(g) * np.linalg.norm(direction) / np.sqrt(x.size))
            v.append(direction)
        above = np.vdot(u, forward(*(x + eps * d for x, d in zip(inputs, v, strict=True))))
        below = np.vdot(u, forward(*(x - eps * d for x, d in zip(inputs, v, strict=True))))
        numeric = float(above - below) / (2 * eps)
        error = abs(analytic - numeric) / max(abs(analytic), abs(numeric), scale)
        worst = max(worst, error)
        if not error <= rtol:
            raise AssertionError(
                f"backward and finite differences disagree: {analytic:.10g} against {numeric:.10g}, "
                f"relative difference {error:.2g}, allowed {rtol:.2g}"
            )
    return worst


def gradcheck_model(model: Sequential, x: Array, **options: Any) -> float:
    """`gradcheck` of a float64 `Sequential` with respect to its input x (N, ...) and all of its parameters."""
    snapshot = model.snapshot()  # restored before each forward, which changes masks and running statistics
    theta = snapshot[0]

    def forward(x: Array, parameters: Array) -> Array:
        model.restore([parameters, *snapshot[1:]])
        output: Array = model.forward(x)
        return output

    def backward(dy: Array, x: Array, parameters: Array) -> tuple[Array, Array]:
        forward(x, parameters)
        return model.backward(dy), np.array(model.ops.to_host(model.grad))

    try:
        if theta.size:
            return gradcheck(forward, backward, [x, theta], **options)
        return gradcheck(lambda x: forward(x, theta), lambda dy, x: backward(dy, x, theta)[0], [x], **options)
    finally:
        model.restore(snapshot)
