"""Layers that other writers express as several operators: layer normalisation, distances, uneven pooling and resizing.

A `Part` is an unfinished one: `_load` passes it to the functions here until a layer results.
"""

import dataclasses
from typing import Any

import numpy as np

from tinycnn import layers, lecun98
from tinycnn._typing import Array
from tinycnn.layers import Layer
from tinycnn.onnx._graph import axis_of, constant
from tinycnn.onnx._values import Builder, Value, output_of


@dataclasses.dataclass(eq=False)
class Part:
    """kind: "mean", "centred", "square", "variance", "std" or "rstd" of `value` over its last axes, of the sizes
    `sizes`; "difference" of a vector and each row of `array`; "lowest": a border of -inf, (left, right, top, bottom)"""

    kind: str
    value: Value
    sizes: tuple[int, ...] = ()
    eps: float = 0.0
    array: Any = None
    sides: tuple[int, ...] = ()


def of(part: Any, kind: str) -> bool:
    return isinstance(part, Part) and part.kind == kind


def same(a: Part, b: Part) -> bool:
    return a.value.step is b.value.step and a.value.same_view(b.value) and a.sizes == b.sizes


def mean(value: Value, axes: list[int] | None, keepdims: bool) -> Part | None:
    """The mean of a layer normalisation, if it is over the last axes.   axes: of the tensor with its batch"""
    rank = 1 + len(value.shape)
    if not axes or not keepdims or 0 in axes or sorted(axes) != list(range(rank - len(axes), rank)):
        return None
    return Part("mean", value, value.shape[-len(axes) :])


def variance(part: Any, axes: list[int] | None, keepdims: bool) -> Part:
    """The mean of a square."""
    found = mean(part.value, axes, keepdims) if of(part, "square") else None
    if found is None or found.sizes != part.sizes:
        raise ValueError("it is no part of a layer normalisation over the last axes")
    return dataclasses.replace(found, kind="variance")


def unary(part: Part, op: str) -> Part:
    """Sqrt and Reciprocal of parts."""
    kinds = {("Sqrt", "variance"): "std", ("Reciprocal", "std"): "rstd"}
    if (op, part.kind) not in kinds:
        raise ValueError("its input is part of a layer normalisation that is not known")
    return dataclasses.replace(part, kind=kinds[op, part.kind])


def binary(build: Builder, op: str, a: Any, b: Any) -> Any:
    """The result of an operator on parts; None if it has nothing to do with one."""
    if op == "Sub" and isinstance(a, Value):
        found = b if of(b, "mean") else getattr(b, "mean_of", None)
        if found is not None:
            value = build.resolve(a)
            if value.step is found.value.step and value.same_view(found.value):
                return dataclasses.replace(found, kind="centred")
        return difference(build, a, b)
    if not isinstance(a, Part) and not isinstance(b, Part):
        return None
    if of(a, "centred"):
        if (op == "Mul" and of(b, "centred") and same(a, b)) or (op == "Pow" and _is_number(b, 2)):
            return dataclasses.replace(a, kind="square")
        if ((op == "Div" and of(b, "std")) or (op == "Mul" and of(b, "rstd"))) and same(a, b):
            return normalized(build, b)
    number, part = (a, b) if isinstance(a, np.ndarray) else (b, a)
    if op == "Add" and of(part, "variance") and isinstance(number, np.ndarray) and number.size == 1:
        return dataclasses.replace(part, eps=part.eps + float(number.reshape(())))
    if op == "Pow" and of(a, "variance") and _is_number(b, 0.5):
        return dataclasses.replace(a, kind="std")
    raise ValueError("its input is part of a layer normalisation that is not known")


def _is_number(value: Any, number: float) -> bool:
    return isinstance(value, np.ndarray) and value.size == 1 and float(value.reshape(())) == number


def normalized(build: Builder, part: Part) -> Value:
    """The layer of a complete layer normalisation."""
    value = part.value
    if value.order is None:
        value = build.settle(build.plain(value, len(value.shape)))
    eps = float(str(np.float32(part.eps)))
    return output_of(build.add(layers.LayerNorm(part.sizes, eps, elementwise_affine=False), value), value)


def into_layer_norm(build: Builder, op: str, value: Value, array: Array) -> Value | None:
    """A Mul or Add of an array of one number an element after a LayerNorm, which then includes it; None otherwise."""
    layer = value.step.layer if value.step is not None else None
    if op not in ("Mul", "Add") or not isinstance(layer, layers.LayerNorm) or value.scaled or not value.is_plain:
        return None
    sizes = layer.normalized_shape
    if array.shape[-len(sizes) :] != sizes or array.size != np.prod(sizes) or value.step is None:
        return None
    weight, bias = affine(layer)
    arrays = {"weight": weight * array.reshape(sizes), "bias": bias}
    if op == "Add":
        arrays = {"weight": weight, "bias": bias + array.reshape(sizes)}
    else:
        arrays["bias"] = bias * array.reshape(sizes)
    new = build.layer(layers.LayerNorm(sizes, layer.eps), arrays)
    return output_of(build.after(new, value.step.inputs[0], value.step.origin), value)


def affine(layer: layers.LayerNorm) -> tuple[Array, Array]:
    """Weight and bias of a LayerNorm that is not in a model yet."""
    weight, bias = np.ones(layer.normalized_shape), np.zeros(layer.normalized_shape)
    if layer.elementwise_affine:
        weight = np.asarray(layer.weight, np.float64)
    return weight, np.asarray(layer.bias, np.float64) if layer.has_bias else bias


# --- distances --------------------------------------------------------------------------------------------------------


def difference(build: Builder, a: Value, b: Any) -> Part | None:
    """A vector (N, 1, F) less centres (K, F)."""
    if not isinstance(b, np.ndarray) or len(a.shape) != 2 or a.shape[0] != 1:
        return None
    if b.ndim not in (2, 3) or b.size == 0 or (b.ndim == 3 and b.shape[0] != 1):
        return None
    return Part("difference", a, array=b.reshape(b.shape[-2:]))


def distances(build: Builder, part: Any, axes: list[int] | None, keepdims: bool) -> Value:
    """ReduceSumSquare of a difference over the features."""
    if not of(part, "difference") or axes != [2] or keepdims:
        raise ValueError("it must sum the squares of differences from centres, over the features")
    vector = build.settle(build.plain(build.reshape(part.value, part.value.shape[1:]), 1))
    centres = np.array(part.array)
    if vector.order is not None:
        centres = np.empty_like(part.array)
        centres[:, vector.order] = part.array
    build.budget.take(centres.nbytes)
    return output_of(build.add(lecun98.EuclideanRBF(centres), vector))


def gaussian(build: Builder, value: Value) -> Value | None:
    """exp(-x / 2) of squared distances; None for other values."""
    step = value.step
    if step is None or not isinstance(step.layer, lecun98.EuclideanRBF) or (value.scale, value.shift) != (-0.5, 0):
        return None
    outputs, features = step.layer.centres.shape
    layer = build.layer(layers.GaussianRBF(features, outputs), {"weight": step.layer.centres})
    return output_of(build.after(layer, step.inputs[0], step.origin), value)


# --- uneven pooling and resizing --------------------------------------------------------------------------------------


def means(n: int, out: int) -> Array:
    """(out, n): the weights of n numbers in the means of windows that share them out evenly."""
    starts, ends = np.arange(out) * n // out, -(-np.arange(1, out + 1) * n // out)
    inside = (np.arange(n) >= starts[:, None]) & (np.arange(n) < ends[:, None])
    weights: Array = inside / (ends - starts)[:, None]
    return weights


def adaptive_pool(build: Builder, value: Value, weights: Array, axis: int) -> Value:
    """Maps multiplied with a matrix along height (axis 0) or width (1), if that is an adaptive average pooling."""
    value = build.settle(build.plain(value, 3))
    size, out = value.base[1 + axis], len(weights)
    if weights.ndim != 2 or weights.shape[1] != size or not np.allclose(weights, means(size, out), atol=1e-6):
        raise ValueError("it multiplies maps with a matrix other than the means of an adaptive pooling")
    assert value.step is not None
    layer, before = value.step.layer, value.step
    sizes: list[int | None] = [None, None]
    if isinstance(layer, layers.AdaptiveAvgPool2d) and layer.output_size[axis] is None:
        sizes, before = list(layer.output_size), value.step.inputs[0]
    sizes[axis] = out
    new: Layer = layers.AdaptiveAvgPool2d((sizes[0], sizes[1]))
    return output_of(build.after(new, before, value.step.origin if before is not value.step else None))


def gather(build: Builder, value: Value, indices: Any, axis: int) -> Value:
    """A Gather of rows or columns that is nearest-neighbour upsampling."""
    indices = constant("its indices", indices)
    axis = axis_of(axis, 1 + len(value.shape)) - 2
    maps = build.settle(build.plain(value, 3))
    if axis not in (0, 1) or indices.ndim != 1 or not indices.size or indices.size > 2**16:
        raise ValueError("it must take rows or columns of maps")
    sizes = [maps.base[1], maps.base[2]]
    out = len(indices)
    if (indices != np.arange(out) * sizes[axis] // out).any():
        raise ValueError("it must take pixel i*H // OH for pixel i")
    before = maps.step
    assert before is not None
    origin = None
    if (
        isinstance(before.layer, layers.Upsample)
        and before.layer.size
        and before.inputs[0].shape[1 + axis] == sizes[axis]
    ):
        before, origin = before.inputs[0], before.origin
    sizes[axis] = out
    return output_of(build.after(layers.Upsample((sizes[0], sizes[1])), before, origin))
