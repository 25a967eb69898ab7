"""Inspection of a model: activations of each layer, the first non-finite array, the summary table."""

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from tinycnn import _check
from tinycnn._typing import Array, DeviceArray, Shape
from tinycnn.layers import Layer
from tinycnn.plan import Plan

if TYPE_CHECKING:
    from tinycnn.model import Sequential


class LayerActivations(NamedTuple):
    """Arrays of one layer, NumPy (N, ...); the gradients are None if no backward was asked for."""

    layer: Layer
    input: Array
    output: Array
    input_grad: Array | None
    output_grad: Array | None


def activations(
    model: "Sequential", x: Array, dy: Array | Callable[[Array], Array] | None = None
) -> list[LayerActivations]:
    """`Sequential.activations` of prepared images x; the caller holds the lock."""
    plan = model.plan(len(x), unfused=True)
    model.ops.copy_to(plan.x, x)
    plan.forward()
    if dy is not None:
        dy = np.asarray(dy(plan.to_host(plan.y)) if callable(dy) else dy, model.dtype)
        _check.shape("dy", dy, plan.dy.shape, "the output")
        model.ops.copy_to(plan.dy, dy)
        plan.backward(input_gradient=True)
    result = []
    for step in plan.steps:
        if step.layers:
            gradients = (None, None) if dy is None else (plan.to_host(step.dx), plan.to_host(step.dy))
            result.append(LayerActivations(step.layers[0], plan.to_host(step.x), plan.to_host(step.y), *gradients))
    return result


def find_non_finite(model: "Sequential", plan: Plan) -> str | None:
    """`Sequential.find_non_finite`."""

    def bad(array: DeviceArray) -> bool:
        return not np.isfinite(model.ops.to_host(array)).all()

    if bad(plan.x):
        return "the input"
    snapshot, unfused = model.snapshot(), model.plan(plan.batch, unfused=True)
    model.ops.copy_to(unfused.x, plan.x)
    try:
        for step in unfused.steps:
            step.forward()
            for parameter in model.parameter_table:
                if parameter.layer in step.layers and bad(parameter.view):
                    return f"parameter {parameter.name} of layer {step!r}"
            if step.layers and bad(step.y):
                return f"the output of layer {step!r}"
    finally:
        model.restore(snapshot)
    return None


def summary(model: "Sequential") -> str:
    """`Sequential.summary` of a model whose input shape is known."""
    rows = [
        ("layer", "output shape", "parameters", "multiply-adds"),
        ("input", _join(model.shapes[0]), "", ""),
    ]
    parameters = adds = 0
    output_shapes = {name: shapes[1] for (name, _), shapes in zip(model.leaves, model.leaf_shapes, strict=True)}
    input_shapes = {name: shapes[0] for (name, _), shapes in zip(model.leaves, model.leaf_shapes, strict=True)}
    output_shapes |= {str(number): shape for number, shape in enumerate(model.shapes[1:])}
    for name, layer in model.named_layers():
        if layer.named_children():
            rows.append(
                (f"{name} {type(layer).__name__}", _join(output_shapes[name]) if name in output_shapes else "", "", "")
            )
            continue
        count = sum(math.prod(shape) for shape in layer.parameter_shapes().values())
        cost = layer.multiply_adds(input_shapes[name])
        parameters, adds = parameters + count, adds + cost
        shape = _join(output_shapes[name])
        rows.append((f"{name} {layer!r}", shape, f"{count:,}" if count else "", f"{cost:,}" if cost else ""))
    rows.append(("total", "", f"{parameters:,}", f"{adds:,}"))
    w = [max(len(row[column]) for row in rows) for column in range(4)]
    rule = "-" * (sum(w) + 6)
    lines = [f"{a:<{w[0]}}  {b:<{w[1]}}  {c:>{w[2]}}  {d:>{w[3]}}".rstrip() for a, b, c, d in rows]
    normalization: list[Any] = [] if model.normalization is None else [str(model.normalization)]
    return "\n".join([lines[0], rule, *lines[1:-1], rule, lines[-1], *normalization])


def _join(shape: Shape) -> str:
    return " x ".join(map(str, shape))
