"""Checking gradients by central differences along random directions.

For y = f(x, ...), random v on all inputs at once and random u on the output, the backward must give

    v . J^T u  =  (u . f(x + eps v) - u . f(x - eps v)) / (2 eps)

Two evaluations of f test every entry of every gradient at once.  In float64 the two sides agree to about 1e-9; an error
of 1e-5 in a single bias gradient stands out.  Gradients that are all zero fail: zero against zero proves nothing.
"""

import numpy as np

from tinycnn import _check


def gradcheck(forward, backward, inputs, *, eps=1e-5, rtol=1e-6, directions=3, rng=None):
    """Compare a backward function with finite differences of its forward.

    forward   ``forward(*inputs)`` -> array
    backward  ``backward(dy, *inputs)`` -> one gradient for each input, in order; None for one that has none
    inputs    float64 arrays

    Returns the largest relative difference found, which is at most rtol.
    Raises AssertionError where the two differ by more, or a gradient is all zero, not finite, or of the wrong shape;
    ValueError if inputs are not float64.
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
        v, product, scale = [], 0.0, 0.0
        for number, (x, g) in enumerate(zip(inputs, gradients, strict=True)):
            step = rng.standard_normal(x.shape)
            if g is None:
                step = np.zeros(x.shape)
            elif np.shape(g) != x.shape:
                raise AssertionError(f"gradient {number} must have shape {x.shape}, got {np.shape(g)}")
            elif not np.isfinite(g).all():
                raise AssertionError(f"gradient {number} is not finite")
            elif not np.any(g):
                raise AssertionError(f"gradient {number} is all zero")
            else:
                product += float(np.vdot(g, step))
                scale += float(np.linalg.norm(g) * np.linalg.norm(step) / np.sqrt(x.size))
            v.append(step)
        above = np.vdot(u, forward(*(x + eps * d for x, d in zip(inputs, v, strict=True))))
        below = np.vdot(u, forward(*(x - eps * d for x, d in zip(inputs, v, strict=True))))
        numeric = float(above - below) / (2 * eps)
        error = abs(product - numeric) / max(abs(product), abs(numeric), scale)
        worst = max(worst, error)
        if not error <= rtol:
            raise AssertionError(
                f"backward and finite differences disagree: {product:.10g} against {numeric:.10g}, "
                f"relative difference {error:.2g}, allowed {rtol:.2g}"
            )
    return worst


def gradcheck_model(model, x, **options):
    """`gradcheck` of a float64 `Sequential` in its input x (N, ...) and all of its parameters."""
    before = model.snapshot()  # put back before each forward: masks and running statistics move on with every one
    theta = before[0]

    def forward(x, parameters):
        model.restore([parameters, *before[1:]])
        return model.forward(x)

    def backward(dy, x, parameters):
        forward(x, parameters)
        return model.backward(dy), np.array(model.ops.to_host(model.grad))

    def forward_only(x):
        return forward(x, theta)

    def without_parameters(dy, x):
        forward(x, theta)
        return model.backward(dy)

    try:
        if theta.size:
            return gradcheck(forward, backward, [x, theta], **options)
        return gradcheck(forward_only, without_parameters, [x], **options)
    finally:
        model.restore(before)
