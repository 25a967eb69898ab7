"""What is known of a tensor of the graph that depends on its input: the layers that compute it, and how ONNX sees it.

A `Step` is a layer, a sum, or the graph's input.  A `Value` is the output of a step seen with other axes (NHWC) or
another shape, scaled or shifted: changes that need no layer until one reads the value.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from contextlib import nullcontext, suppress
from typing import Any

import numpy as np

from tinycnn import layers, lecun98
from tinycnn._typing import Array, Shape
from tinycnn.containers import Residual
from tinycnn.layers import Layer
from tinycnn.onnx import _formulas
from tinycnn.onnx._graph import MAX_NUMBERS, Budget

MAX_CURVES = 6  # the steps before it for which a value is known as a function

ZERO, ONE = np.float64(0), np.float64(1)


class Step:
    """A layer in the net.

    layer   None for the graph's input and for a sum
    inputs  one step, two for a sum, none for the graph's input
    shape   of the output, without the batch
    before  the step that all paths from the graph's input pass, before this one
    node    name of the ONNX node, for messages
    origin  identifies the place in the graph: a layer that is changed (by a scale after it) keeps it
    """

    def __init__(
        self, layer: Layer | None, inputs: tuple["Step", ...], shape: Shape, node: str = "", origin: object = None
    ) -> None:
        self.layer, self.inputs, self.shape, self.node = layer, inputs, tuple(shape), node
        self.origin = object() if origin is None else origin
        self.before = inputs[0] if len(inputs) == 1 else common(*inputs) if inputs else None
        self.depth: int = self.before.depth + 1 if self.before else 0


def common(a: Step, b: Step) -> Step:
    """The last step that all paths to both pass."""
    first, second = a, b
    while first is not second:
        if first.depth < second.depth:
            first, second = second, first
        if first.before is None:
            raise ValueError("its inputs have no tensor in common that they are computed from")
        first = first.before
    return first


@dataclasses.dataclass(eq=False)
class Value:
    """The output of `step`, a tensor of shape (N, *step.shape), times `scale` plus `shift`, with axes `perm`, reshaped.

    step          None if it is only known as a function: `curves`
    base          the shape of the step's output
    perm          axis i of the tensor, before it is reshaped, is axis perm[i] of the step's output (without the batch)
    shape         after reshaping
    order         of a vector: feature j is number order[j] of the step's output; None for j
    scale, shift  a number, or one a channel
    node          whose output a formula is, for messages
    mean_of       of what this may be the mean in a layer normalisation
    curves        pairs of a step and values on `_formulas.GRID`: the function of that step's output which this is
    """

    step: Step | None
    base: Shape
    perm: tuple[int, ...]
    shape: Shape
    order: Array | None = None
    scale: Any = ONE
    shift: Any = ZERO
    curves: tuple[tuple[Step, Array], ...] = ()
    node: str = ""
    mean_of: Any = None
    settled: "Value | None" = None
    vector: "Value | None" = None

    def changed(self, **fields: Any) -> "Value":
        """A copy with other fields."""
        return dataclasses.replace(self, settled=None, vector=None, mean_of=None, **fields)

    @property
    def scaled(self) -> bool:
        return bool((self.scale != 1).any() or (self.shift != 0).any())

    @property
    def permuted(self) -> Shape:
        return tuple(self.base[axis] for axis in self.perm)

    @property
    def is_plain(self) -> bool:
        """Whether it has the axes and the shape of the step's output."""
        return self.perm == tuple(range(len(self.base))) and self.shape == self.base and self.order is None

    def same_view(self, other: "Value") -> bool:
        orders = self.order is None and other.order is None
        if self.order is not None and other.order is not None:
            orders = np.array_equal(self.order, other.order)
        return (self.base, self.perm, self.shape) == (other.base, other.perm, other.shape) and orders


def output_of(step: Step, like: Value | None = None, curves: Sequence[tuple[Step, Array]] = ()) -> Value:
    """The output of a step; axes and shape as those of `like`."""
    known = ((step, _formulas.GRID), *curves)[:MAX_CURVES]
    if like is not None:
        return Value(step, step.shape, like.perm, like.shape, like.order, curves=known)
    return Value(step, step.shape, tuple(range(len(step.shape))), step.shape, curves=known)


class Builder:
    """Steps from values, with the arrays' bytes counted."""

    def __init__(self, budget: Budget, dtype: Any) -> None:
        self.budget, self.dtype, self.node = budget, dtype, ""
        self.thresholds: dict[float, None] = {}  # the first numbers with which the graph compares

    def layer(self, layer: Layer, arrays: Mapping[str, Array]) -> Layer:
        """The layer with initial values for its parameters and buffers."""
        for name, value in arrays.items():
            self.budget.take(value.size * self.dtype.itemsize)
            with np.errstate(over="ignore"):
                array = np.ascontiguousarray(value, self.dtype)
            if not np.isfinite(array).all():
                raise ValueError(f"its {name.replace('_', ' ')} must be finite numbers")
            setattr(layer, name, array)
        if arrays:
            vars(layer)["_copied"] = True  # the model draws no initial values
        return layer

    def add(self, layer: Layer, value: Value, origin: object = None) -> Step:
        """A layer on the output of the value's step."""
        assert value.step is not None
        return self.after(layer, value.step, origin)

    def after(self, layer: Layer, step: Step, origin: object = None) -> Step:
        """A layer on the output of a step."""
        shape = tuple(layer.output_shape(step.shape))
        if math.prod(shape) > MAX_NUMBERS:
            raise ValueError(f"its output must have at most {MAX_NUMBERS:,} numbers an image, got shape {shape}")
        return Step(layer, (step,), shape, self.node, origin)

    # --- scales and shifts --------------------------------------------------------------------------------------------

    def settle(self, value: Value) -> Value:
        """The value with a step, and neither scale nor shift; ValueError if no layer can have them."""
        resolved = self.resolve(value)
        if resolved.scaled:
            node = resolved.step.node if resolved.step else ""
            raise ValueError(f"the output of {node} is scaled or shifted, which no layer can include")
        return resolved

    def resolve(self, value: Value) -> Value:
        """The value with a step; a scale and shift remain if no layer before can have them."""
        if value.step is not None and not value.scaled:
            return value
        if value.settled is None:
            value.settled = self._identified(value) or self._folded(value)
        return value.settled

    def _identified(self, value: Value) -> Value | None:
        found: tuple[Step, Layer] | None = None
        for step, curve in value.curves:
            if step is value.step or (found and step.origin is not found[0].origin):
                continue
            line = _formulas.affine(curve)
            if line is not None and value.step is None and not found:
                view = output_of(step, value).changed(curves=value.curves)
                scaled = view.changed(scale=ZERO + line[0], shift=ZERO + line[1])
                return self.resolve(scaled) if scaled.scaled else view
            layer = None if line is not None else _formulas.identify(curve, self.thresholds)
            if layer is not None:  # prefer a layer before it as it was, without a scale
                found = step, layer
        return None if found is None else output_of(self.after(found[1], found[0]), value, value.curves)

    def _folded(self, value: Value) -> Value:
        if value.step is None:
            raise ValueError(
                f"the output of node {value.node} is a formula of element-wise operators that is no activation known"
            )
        layer = self.include(value.step, value.scale, value.shift)
        if layer is None:
            return value
        step = value.step
        folded = Step(layer, step.inputs, step.shape, step.node, step.origin)
        return output_of(folded, value, value.curves)

    def include(self, step: Step, scale: Array, shift: Array) -> Layer | None:
        """The step's layer with its output times `scale` plus `shift`; None if it cannot."""
        layer, identity = step.layer, bool((shift == 0).all())
        if isinstance(layer, (layers.Conv2d, layers.ConvTranspose2d, layers.Linear)):
            config, weight = layer.config(), np.asarray(layer.weight, np.float64)
            per_output = np.broadcast_to(scale, step.shape[0])
            bias = np.asarray(layer.bias, np.float64) if layer.has_bias else np.zeros(step.shape[0])
            if isinstance(layer, layers.ConvTranspose2d):
                groups = weight.shape[0] // layer.groups
                factor = np.repeat(per_output.reshape(layer.groups, -1), groups, axis=0)[:, :, None, None]
            else:
                factor = per_output.reshape(-1, *(1,) * (weight.ndim - 1))
            arrays = {"weight": weight * factor}
            has_bias = layer.has_bias or not identity
            if has_bias:
                arrays["bias"] = bias * scale + shift
            return self.layer(type(layer)(**(config | {"bias": has_bias})), arrays)
        if isinstance(layer, (layers.BatchNorm2d, layers.GroupNorm)):
            names = ["running_mean", "running_var"] if isinstance(layer, layers.BatchNorm2d) else []
            kept = {name: np.asarray(getattr(layer, name)) for name in names}
            weight, bias = (np.asarray(getattr(layer, name), np.float64) for name in ("weight", "bias"))
            arrays = {**kept, "weight": weight * scale, "bias": bias * scale + shift}
            return self.layer(type(layer)(**layer.config()), arrays)
        if isinstance(layer, layers.LayerNorm) and (scale.ndim == 0 or len(layer.normalized_shape) == len(step.shape)):
            weight = np.asarray(
                layer.weight if layer.elementwise_affine else np.ones(layer.normalized_shape), np.float64
            )
            bias = np.asarray(layer.bias if layer.has_bias else np.zeros(layer.normalized_shape), np.float64)
            a, b = (v.reshape(-1, *(1,) * (weight.ndim - 1)) if v.ndim else v for v in (scale, shift))
            new = layers.LayerNorm(layer.normalized_shape, layer.eps)
            return self.layer(new, {"weight": weight * a, "bias": bias * a + b})
        if isinstance(layer, (layers.Tanh, layers.ScaledTanh)) and identity and scale.size == 1 and scale.item() != 0:
            factor_in = layer.S if isinstance(layer, layers.ScaledTanh) else 1.0
            factor_out = layer.A if isinstance(layer, layers.ScaledTanh) else 1.0
            return layers.ScaledTanh(factor_out * scale.item(), factor_in)
        if isinstance(layer, lecun98.Subsample):
            weight, bias = np.asarray(layer.weight, np.float64), np.asarray(layer.bias, np.float64)
            new_subsample = lecun98.Subsample(layer.channels, layer.kernel_size, layer.pool)
            return self.layer(new_subsample, {"weight": weight * scale, "bias": bias * scale + shift})
        if isinstance(layer, layers.AvgPool2d):
            return self._scaled_pooling(layer, step, scale, shift)
        return None

    def _scaled_pooling(self, layer: layers.AvgPool2d, step: Step, scale: Array, shift: Array) -> Layer | None:
        size = math.prod(layer.kernel_size)
        if (shift == 0).all() and scale.size == 1 and (layer.count_include_pad or layer.padding == (0, 0)):
            divisor = (layer.divisor or size) / scale.item() if scale.item() else 0.5
            if divisor >= 1 and abs(divisor - round(divisor)) < 1e-5 * divisor and not layer.ceil_mode:
                return layers.AvgPool2d(**(layer.config() | {"divisor_override": round(divisor)}))
        if layer.padding != (0, 0) or layer.kernel_size != layer.stride or layer.ceil_mode or layer.divisor:
            return None
        arrays = {"weight": np.broadcast_to(scale, step.shape[0]), "bias": np.broadcast_to(shift, step.shape[0])}
        return self.layer(lecun98.Subsample(step.shape[0], layer.kernel_size, "mean"), arrays)

    # --- shapes -------------------------------------------------------------------------------------------------------

    def reshape(self, value: Value, shape: Sequence[int]) -> Value:
        """The value with another shape, without the batch."""
        new = tuple(shape)
        if math.prod(new) != math.prod(value.shape):
            raise ValueError(f"an image of shape {value.shape} does not fit in {new}")
        if new == value.shape:
            return value
        if value.order is not None:
            squeezed = tuple(n for n in new if n != 1)
            if squeezed != tuple(n for n in value.shape if n != 1):
                raise ValueError("its input is a vector of NHWC order, which cannot be reshaped")
        return self._canonical(value, new)

    def _canonical(self, value: Value, shape: Shape) -> Value:
        """The value in `shape`, with axes in the step's order if only axes of length 1 are in another."""
        long = [axis for axis in value.perm if value.base[axis] != 1]
        perm = tuple(range(len(value.base))) if long == sorted(long) else value.perm
        if (perm, shape) == (value.perm, value.shape):
            return value
        return value.changed(shape=shape, perm=perm)

    def transpose(self, value: Value, perm: Sequence[int]) -> Value:
        """The value with axis i from axis perm[i], both without the batch."""
        if tuple(perm) == tuple(range(len(value.shape))):
            return value
        if value.shape != value.permuted:
            value = self.plain(value, len(value.shape))
        new = tuple(value.perm[axis] for axis in perm)
        shape = tuple(value.base[axis] for axis in new)
        return value.changed(perm=new, shape=shape)

    def plain(self, value: Value, axes: int) -> Value:
        """The value as a step's output with `axes` axes, without the batch; scale and shift may remain."""
        value = self.resolve(value)
        if len(value.shape) != axes:
            what = {1: "a vector", 3: "maps (channels, height, width)"}.get(axes, f"{axes} axes")
            raise ValueError(f"its input must be {what}, got shape (N, {', '.join(map(str, value.shape))})")
        if axes == 1:
            return self.as_vector(value)
        value = self._canonical(value, value.shape)
        if value.is_plain:
            return value
        if value.perm != tuple(range(len(value.base))) or value.order is not None:
            raise ValueError("its input has axes in another order, NHWC for example, which the layer does not know")
        flat = self.as_vector(value.changed(shape=(math.prod(value.base),)))
        flat = self.settle(flat)
        return output_of(self.add(layers.Unflatten(1, value.shape), flat))

    def as_vector(self, value: Value) -> Value:
        """A value of shape (F,) as the output of a step of shape (F,), possibly in another `order`."""
        value = self.resolve(value)
        if len(value.base) == 1:
            return value
        if value.vector is None:
            order = None
            moved = self._canonical(value, value.shape)
            if moved.perm != tuple(range(len(value.base))):
                order = np.arange(math.prod(value.base)).reshape(value.base).transpose(moved.perm).reshape(-1)
                self.budget.take(order.nbytes)
            flat = output_of(self.add(layers.Flatten(), value))
            pixels = math.prod(value.base[1:])
            scale, shift = (np.repeat(v, pixels) if v.ndim else v for v in (value.scale, value.shift))
            curves = () if value.scaled else flat.curves
            value.vector = flat.changed(order=order, scale=scale, shift=shift, curves=curves)
        return value.vector

    # --- constants that broadcast -------------------------------------------------------------------------------------

    def per_channel(self, value: Value, array: Array) -> tuple[Value, Array]:
        """A constant that is added to the value or multiplied with it, as a number or one a channel of its step.

        The value is returned too, because it may have to become a vector.  ValueError for other constants.
        """
        array = np.asarray(array, np.float64)
        if array.size == 1:
            if array.ndim > 1 + len(value.shape):
                raise ValueError(f"a constant of shape {array.shape} gives its result more axes")
            return value, array.reshape(())
        if array.size and (array == array.reshape(-1)[0]).all() and self._fits(array, value.shape):
            return value, array.reshape(-1)[0].reshape(())
        if len(value.shape) == 1 and len(value.base) > 1:
            value = self.as_vector(value)
        sizes = (1,) * (1 + len(value.shape) - array.ndim) + array.shape
        reshaped = value.shape != value.permuted
        no_channels = reshaped and (value.perm[:1] != (0,) or value.shape[:1] != value.base[:1])
        if no_channels or not self._fits(array, value.shape):
            raise ValueError(
                f"a constant of shape {array.shape} for an input (N, {', '.join(map(str, value.shape))}) must be one "
                "number, or one a channel"
            )
        by_axis = array.reshape(sizes[1:])
        if value.order is not None:
            ordered = np.empty(value.base)
            ordered[value.order] = by_axis
            return value, ordered
        if not reshaped:
            by_axis = by_axis.transpose(np.argsort(value.perm))
        first = by_axis.reshape(len(by_axis), -1)[:, :1].reshape(-1, *(1,) * (by_axis.ndim - 1))
        if (by_axis != first).any():
            raise ValueError("a constant must be one number, or one a channel, got one a pixel")
        return value, np.broadcast_to(first.reshape(-1), value.base[:1]).copy()

    def _fits(self, array: Array, shape: Shape) -> bool:
        """Whether an array broadcasts with (N, *shape) and leaves its shape alone."""
        full = (1, *shape)
        if array.ndim > len(full):
            return False
        return all(size in (1, n) for size, n in zip(array.shape[::-1], full[::-1], strict=False))

    def scaled(self, value: Value, scale: Array, shift: Array) -> Value:
        """value * scale + shift, each a number or one a channel."""
        per_channel = scale.ndim or shift.ndim
        if value.step is None:
            with nullcontext() if per_channel else suppress(ValueError):  # part of a formula, or complete
                value = self.resolve(value)
        curves: tuple[tuple[Step, Array], ...] = ()
        if not per_channel:
            with np.errstate(all="ignore"):
                curves = tuple((step, curve * scale + shift) for step, curve in value.curves)
        if value.step is None:
            return value.changed(curves=curves)
        return value.changed(scale=value.scale * scale, shift=value.shift * scale + shift, curves=curves)


def chain(step: Step, start: Step, used: set[int] | None = None) -> list[Layer]:
    """The layers from `start` to `step`.  ValueError if one would be needed twice."""
    used = set() if used is None else used
    found: list[Layer] = []
    while step is not start:
        if id(step.origin) in used or not step.inputs:
            reason = "it is used more than once, other than for a residual sum" if step.inputs else "it is not an input"
            raise ValueError(f"the output of node {step.node}: {reason}")
        used.add(id(step.origin))
        if step.layer is not None:
            found.append(step.layer)
            (step,) = step.inputs
            continue
        assert step.before is not None
        branches = sorted((chain(branch, step.before, used) for branch in step.inputs), key=len)
        if not branches[1]:
            raise ValueError(f"node {step.node} adds a tensor to itself")
        found.append(Residual(*branches[1], projection=branches[0]))
        step = step.before
    return found[::-1]
