"""An ONNX graph as a model.  Every node becomes a constant, a layer, or another view of a value: see `_values`.

`OPERATORS` has a function for each operator: (loader, node, inputs) -> output, where an input is an array (a constant),
a `Value`, or None if it is not given.
"""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from tinycnn import _check, layers
from tinycnn._typing import Array, Shape
from tinycnn.containers import check_unbound
from tinycnn.dataset import Normalization
from tinycnn.errors import OnnxError
from tinycnn.layers import Layer
from tinycnn.model import Sequential
from tinycnn.onnx import _formulas, _patterns, _windows
from tinycnn.onnx._graph import (
    BATCH,
    DOMAINS,
    FLOATS,
    FOLDED,
    INTEGERS,
    Graph,
    Node,
    axis_of,
    constant,
    fold,
    metadata_json,
    moved_axes,
)
from tinycnn.onnx._patterns import Part
from tinycnn.onnx._values import ONE, ZERO, Builder, Step, Value, chain, output_of

Input = Any  # an array, a Value or None
REFUSED = (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RecursionError)
UNITS = {"UINT8": 255, "UINT16": 65535}


def load(source: Any, *, device: str = "cpu", input_shape: Shape | None = None) -> Sequential:
    """The model of an ONNX graph that is a chain of layers, with or without residual sums, in evaluation mode.

    source       path, bytes or `onnx.ModelProto`
    input_shape  (C, H, W) of one image, for a graph that does not say it

    Images have shape (N, C, H, W), also for a graph with NHWC input, and so have outputs.  If the graph scales integer
    pixels first, that becomes `model.normalization`.  Class names and output kind are those that `tinycnn.onnx.export`
    wrote.

    Raises ImportError without onnx, OSError, and OnnxError, in one line, for a file that is damaged or refers to data
    outside its folder, and for a graph that is no such chain: it names the node, its operator, the reason and the
    operators that are known.  Nothing in the file is executed.
    """
    graph = Graph(source)
    loader = Loader(graph, input_shape)
    for node in graph.nodes:
        loader.run(node)
    try:
        return loader.model(device)
    except REFUSED as error:
        raise OnnxError(f"{graph.source}: {_check.one_line(error)}") from None


class Loader:
    """The values of a graph, by name."""

    def __init__(self, graph: Graph, input_shape: Shape | None) -> None:
        self.graph, self.opset = graph, graph.opset
        name, kind, sizes, self.output = graph.only()
        self.integers = kind if kind in INTEGERS else None
        self.dtype = np.dtype(np.float64 if kind == "DOUBLE" else np.float32)
        self.build = Builder(graph.budget, self.dtype)
        self.batch = sizes[0]
        if input_shape is not None:
            given = _check.image_shape("input_shape", input_shape)
        elif None in sizes[1:]:
            raise graph.error(f"input {name!r} has sizes that are not known, {sizes}; give input_shape=(C, H, W)")
        else:
            given = tuple(size for size in sizes[1:] if size is not None)
        nhwc = len(given) == 3 and self._is_nhwc(name, given)
        if nhwc and input_shape is None:
            given = (given[2], given[0], given[1])
        self.input = Step(None, (), given, f"the input {_check.short_repr(name, 60)}")
        self.normalized: tuple[Step, Array, Array] | None = None  # the scaled input, (1 / std, -mean / std)
        value = output_of(self.input)
        if nhwc:
            value = self.build.transpose(value, (1, 2, 0))
        self.values: dict[str, Any] = {**graph.constants, name: value}
        self.readers = Counter(name for node in graph.nodes for name in node.inputs)

    def _is_nhwc(self, name: str, shape: Shape) -> bool:
        """Whether the input is transposed to NCHW before anything else than scaling."""
        names, seen = {name}, False
        for node in self.graph.nodes:
            if not names.intersection(node.inputs):
                continue
            target = self.graph.constants.get(node.inputs[1]) if node.op == "Reshape" and len(node.inputs) > 1 else None
            if node.op in ("Cast", "Identity", "Sub", "Div", "Mul", "Add"):
                names.update(node.outputs)
                continue
            try:
                seen = node.op == "Transpose" and node.integers("perm") == [0, 3, 1, 2]
            except ValueError:  # of another type: `run` refuses it
                return False
            if target is not None and shape[2] == 1:
                seen = target.reshape(-1)[1:].tolist() == [1, *shape[:2]]
            if not seen:
                return False
        return seen

    def run(self, node: Node) -> None:
        """Compute the outputs of a node."""
        self.build.node = node.name
        try:
            if node.domain not in DOMAINS:
                raise ValueError(f"its domain {_check.short_repr(node.domain, 60)} is not known")
            inputs = [None if not name else self._value(name) for name in node.inputs]
            if node.op in FOLDED and all(value is None or isinstance(value, np.ndarray) for value in inputs):
                result: Any = fold(self.graph, node, inputs)
            elif node.op not in OPERATORS:
                folded = ", other than of constants" if node.op in FOLDED else ""
                raise ValueError(f"the operator is not known{folded}")
            elif node.op not in TAKES_PARTS and any(isinstance(value, Part) for value in inputs):
                raise ValueError("its input is part of a layer normalisation, or the like, that is not complete")
            else:
                result = OPERATORS[node.op](self, node, inputs)
        except OnnxError:
            raise
        except REFUSED as error:
            few = isinstance(error, IndexError) and str(error) == "list index out of range"
            reason = "it has too few inputs" if few else _check.one_line(error, 400)
            raise OnnxError(
                f"{self.graph.source}: node {node.name} ({_check.short_repr(node.op, 60)[1:-1]}) cannot be loaded: "
                f"{reason}; known operators: {', '.join(sorted(OPERATORS))}; of constants also: "
                f"{', '.join(sorted({*FOLDED} - {*OPERATORS}))}"
            ) from None
        if node.outputs:
            self.values[node.outputs[0]] = result

    def _value(self, name: str) -> Any:
        if name not in self.values:
            raise ValueError(
                f"its input {_check.short_repr(name, 60)} is not computed before it: the nodes have a cycle or a wrong "
                "order, or it is an output that is not known"
            )
        value = self.values[name]
        if self.readers[name] > 1 and isinstance(value, Value):  # a formula may begin here
            value = self.values[name] = known(self, value) or value
        return value

    def model(self, device: str) -> Sequential:
        """The net up to the graph's output."""
        if not isinstance(self.values.get(self.output), Value):
            raise ValueError(f"the output {_check.short_repr(self.output, 60)} does not depend on the input")
        value = self.settle(self.values[self.output])
        if value.order is not None:
            raise ValueError("the output is a vector of NHWC order, which no layer gives")
        if value.shape != value.permuted:
            value = self.build.plain(value, len(value.shape))
        assert value.step is not None
        start = self.normalized[0] if self.normalized else self.input
        found = tuple(chain(value.step, start))
        if not found:
            raise ValueError("the graph has no layers")
        check_unbound(found)
        model = Sequential(*found, input_shape=start.shape, dtype=self.dtype, device=device, rng=0)
        model.normalization = self._normalization()
        self._restore(model)
        return model.eval()

    def _normalization(self) -> Normalization | None:
        if self.normalized is None:
            return None
        _, scale, shift = self.normalized
        unit = UNITS.get(self.integers or "", 1)
        scale, shift = (np.atleast_1d(v) for v in np.broadcast_arrays(scale, shift))
        return Normalization(-shift / scale / unit, 1 / (unit * scale), unit, unit == 1)

    def _restore(self, model: Sequential) -> None:
        """Class names and so on from the metadata of `tinycnn.onnx.export`."""
        from tinycnn.saving import KINDS

        metadata = self.graph.metadata
        try:
            if "class_names" in metadata:
                model.class_names = tuple(metadata_json(metadata["class_names"]))
            if "output_kind" in metadata:
                model.output_kind = _check.choice("output_kind", metadata["output_kind"], KINDS)
            if "normalization" in metadata and model.normalization is None and self.integers is None:
                entries = metadata_json(metadata["normalization"])
                state = {f"normalization.{name}": np.asarray(value) for name, value in dict(entries).items()}
                rest, model.normalization = Normalization.split_state(state)
                if rest or model.normalization is None:
                    raise ValueError("normalization must have a mean, a std and a unit")
        except REFUSED as error:
            raise ValueError(f"its metadata is damaged: {_check.one_line(error)}") from None

    def batch_size(self, size: int) -> int:
        """`BATCH` if a size in a shape is that of the batch."""
        return BATCH if size == self.batch else size

    # --- what operators share -----------------------------------------------------------------------------------------

    def settle(self, value: Input) -> Value:
        """A value that a layer can read as it is."""
        return self.build.settle(self.scaled_input(value))

    def scaled_input(self, source: Input) -> Value:
        """The value; a scale of the graph's integer input becomes the model's normalization."""
        if not isinstance(source, Value):
            raise ValueError("its input is a constant")
        value = self.build.resolve(source)
        if value.step is self.input and self.integers is not None and value.scaled and (value.scale > 0).all():
            if self.normalized is None:
                step = Step(None, (), self.input.shape, self.input.node)
                self.normalized = step, value.scale, value.shift
            step, scale, shift = self.normalized
            if np.array_equal(scale, value.scale) and np.array_equal(shift, value.shift):
                return output_of(step, value)
        return value

    def maps(self, value: Input, allow_scaled: bool = False) -> Value:
        """A value as maps (C, H, W), the output of a step."""
        value = self.build.plain(self.scaled_input(value), 3)
        return value if allow_scaled else self.build.settle(value)

    def layer(self, layer: Layer, value: Value, view: bool = True) -> Value:
        """A layer on a settled value; its output has the view of the value if the shapes agree."""
        step = self.build.add(layer, value)
        return output_of(step, value if view and step.shape == value.base else None)


# --- convolutions and linear layers -----------------------------------------------------------------------------------


def conv(loader: Loader, node: Node, inputs: Sequence[Input]) -> Value:
    value, weight, bias = maps_weight_bias(loader, inputs)
    groups, (channels, height, width) = node.integer("group", 1), value.base
    if groups < 1 or weight.shape[0] % groups or weight.shape[1] * groups != channels:
        raise ValueError(f"a weight {weight.shape} with {groups} groups does not fit an input of {channels} channels")
    w = _windows.window(node, (height, width), kernel_of(node, weight))
    border, padding = _windows.conv_padding(w)
    if value.scaled:
        weight, bias = fold_input(value, weight, bias, groups, border is not None or any(w.pads))
        value = value.changed(scale=ONE, shift=ZERO)
    if border is not None:
        value = loader.layer(layers.ZeroPad2d(border), value, view=False)
    layer = layers.Conv2d(channels, len(weight), w.kernel, w.stride, padding, w.dilation, groups, bias=bias is not None)
    return loader.layer(loader.build.layer(layer, named(weight, bias)), value, view=False)


def maps_weight_bias(loader: Loader, inputs: Sequence[Input]) -> tuple[Value, Array, Array | None]:
    """The inputs of a convolution."""
    weight = constant("its weight", inputs[1])
    if weight.ndim != 4:
        raise ValueError(f"its weight must have 4 axes, got shape {weight.shape}; there are only 2-D layers")
    bias = inputs[2] if len(inputs) > 2 else None
    return loader.maps(inputs[0], allow_scaled=True), weight, None if bias is None else constant("its bias", bias)


def kernel_of(node: Node, weight: Array) -> tuple[int, int]:
    kernel = _windows.pair(node, "kernel_shape", weight.shape[2:])
    if kernel != weight.shape[2:]:
        raise ValueError(f"kernel_shape must be that of the weight, {weight.shape[2:]}, got {kernel}")
    return kernel


def named(weight: Array, bias: Array | None) -> dict[str, Array]:
    return {"weight": weight} if bias is None else {"weight": weight, "bias": bias}


def fold_input(
    value: Value, weight: Array, bias: Array | None, groups: int, padded: bool
) -> tuple[Array, Array | None]:
    """Weight and bias of a convolution of `value` that include its scale and shift."""
    scale, shift = (np.broadcast_to(v, value.base[0]).reshape(groups, -1) for v in (value.scale, value.shift))
    if padded and (shift != 0).any():
        raise ValueError("its input is shifted and padded with zeros, so that its bias cannot include the shift")
    repeats = len(weight) // groups
    scale, shift = (np.repeat(v, repeats, axis=0)[:, :, None, None] for v in (scale, shift))
    weight = weight.astype(np.float64)
    moved = (weight * shift).sum(axis=(1, 2, 3))
    if moved.any():
        bias = moved if bias is None else bias + moved
    return weight * scale, bias


def conv_transpose(loader: Loader, node: Node, inputs: Sequence[Input]) -> Value:
    value, weight, bias = maps_weight_bias(loader, inputs)
    groups, (channels, height, width) = node.integer("group", 1), value.base
    if weight.shape[0] != channels or groups < 1 or channels % groups:
        raise ValueError(f"a weight {weight.shape} with {groups} groups does not fit an input of {channels} channels")
    if value.scaled:
        if (value.shift != 0).any():
            raise ValueError("its input is shifted, which a transposed convolution cannot include")
        weight = weight * np.broadcast_to(value.scale, channels)[:, None, None, None]
        value = value.changed(scale=ONE)
    w, extra = _windows.transposed(node, (height, width), kernel_of(node, weight))
    padding, extra, border = _windows.transposed_padding(w, extra)
    layer = layers.ConvTranspose2d(
        channels, weight.shape[1] * groups, w.kernel, w.stride, padding, extra, groups, bias is not None, w.dilation
    )
    value = loader.layer(loader.build.layer(layer, named(weight, bias)), value, view=False)
    return value if border is None else loader.layer(layers.ZeroPad2d(border), value, view=False)


def linear(loader: Loader, value: Input, weight: Array, bias: Array | None) -> Value:
    """A Linear with weight (O, F)."""
    vector = loader.build.plain(loader.scaled_input(value), 1)
    if weight.ndim != 2 or weight.shape[1] != vector.base[0]:
        raise ValueError(f"a weight (inputs, outputs) of {weight.shape[::-1]} does not fit {vector.base[0]} inputs")
    if bias is not None:
        bias = np.asarray(bias)
        if bias.shape not in ((), (1,), (len(weight),), (1, 1), (1, len(weight))):
            raise ValueError(f"its bias must have one number an output, {len(weight)}, got shape {bias.shape}")
        bias = np.broadcast_to(bias.reshape(-1), len(weight))
    if vector.order is not None:
        loader.graph.budget.take(weight.nbytes)
        ordered = np.empty_like(weight)
        ordered[:, vector.order] = weight
        weight = ordered
    if vector.scaled:
        moved = weight.astype(np.float64) @ np.broadcast_to(vector.shift, vector.base)
        weight = weight * vector.scale
        bias = (moved if bias is None else bias + moved) if moved.any() else bias
    vector = vector.changed(order=None, scale=ONE, shift=ZERO)
    layer = layers.Linear(vector.base[0], len(weight), bias=bias is not None)
    return loader.layer(loader.build.layer(layer, named(weight, bias)), vector, view=False)


def gemm(loader: Loader, node: Node, inputs: Sequence[Input]) -> Value:
    weight = constant("its second input, the weight,", inputs[1])
    if weight.ndim != 2:
        raise ValueError(f"its weight must have 2 axes, got shape {weight.shape}")
    if node.integer("transA", 0):
        raise ValueError("transA of the graph's data mixes the images of a batch")
    weight = weight if node.integer("transB", 0) else weight.T
    alpha, beta = node.number("alpha", 1.0), node.number("beta", 1.0)
    bias = inputs[2] if len(inputs) > 2 and inputs[2] is not None else None
    bias = None if bias is None else constant("its bias", bias) * beta
    return linear(loader, inputs[0], weight if alpha == 1 else weight * alpha, bias)


def matmul(loader: Loader, node: Node, inputs: Sequence[Input]) -> Value:
    value, weight = inputs
    if isinstance(value, np.ndarray) and isinstance(weight, Value) and len(weight.shape) == 3:
        return _patterns.adaptive_pool(loader.build, loader.settle(weight), value, 0)
    weight = constant("its second input, the weight,", weight)
    while weight.ndim > 2 and weight.shape[0] == 1:
        weight = weight[0]
    if weight.ndim != 2:
        raise ValueError(f"its weight must have 2 axes, got shape {weight.shape}")
    if isinstance(value, Value) and value.perm == (1, 2, 0) and value.shape == value.permuted:  # Dense of NHWC maps
        value = loader.build.transpose(value, (2, 0, 1))
        maps = loader.settle(value)
        if weight.shape[0] != maps.base[0]:
            raise ValueError(f"a weight {weight.shape} does not fit an input of {maps.base[0]} channels")
        layer = layers.Conv2d(weight.shape[0], weight.shape[1], 1, bias=False)
        new = loader.layer(loader.build.layer(layer, {"weight": weight.T[:, :, None, None]}), maps, view=False)
        return loader.build.transpose(new, (1, 2, 0))
    if isinstance(value, Value) and len(value.shape) == 3:
        return _patterns.adaptive_pool(loader.build, loader.settle(value), weight.T, 1)
    return linear(loader, value, weight.T, None)


# --- normalisation ----------------------------------------------------------------------------------------------------


def batch_norm(loader: Loader, node: Node, inputs: Sequence[Input]) -> Value:
    names = ("scale", "bias", "mean", "variance")
    scale, bias, mean, var = (
        constant(f"its {name}", v).astype(np.float64) for name, v in zip(names, inputs[1:5], strict=True)
    )
    if node.integer("training_mode", 0) or (loader.opset < 7 and not node.integer("is_test", 0)):
        raise ValueError("it is in training mode; export the model in evaluation mode")
    if loader.opset < 9 and not node.integer("spatial", 1):
        raise ValueError("it normalises every pixel (spatial=0), not every channel")
    source = loader.scaled_input(inputs[0])
    value = loader.build.plain(source, 3 if len(source.shape) == 3 else 1)
    kind = layers.BatchNorm2d if len(value.base) == 3 else layers.BatchNorm1d
    if {v.shape for v in (scale, bias, mean, var)} != {value.base[:1]}:
        raise ValueError(f"its arrays must have {value.base[0]} numbers, one a channel, got shape {scale.shape}")
    if (var < 0).any():
        raise ValueError("its variance must not be negative")
    eps = node.number("epsilon", 1e-5)
    if value.order is not None:
        inverse = np.argsort(value.order)
        scale, bias, mean, var = (v[inverse] for v in (scale, bias, mean, var))
    if value.scaled:
        bias = bias + scale * (value.scale * mean + value.shift - mean) / np.sqrt(var + eps)
        scale = scale * value.scale
        value = value.changed(scale=ONE, shift=ZERO)
    layer = kind(value.base[0], eps, round(min(max(1 - node.number("momentum", 0.9), 0.0), 1.0), 7))  # 0.1, not 0.09...
    arrays = {"weight": scale, "bias": bias, "running_mean": mean, "running_var": var}
    return loader.layer(loader.build.layer(layer, arrays), value)


def group_norm(loader: Loader, node: Node, inputs: Sequence[Input]) -> Value:
    value = loader.maps(inputs[0])
    groups = node.integer("num_groups", 0)
    return _group_norm(loader, node, inputs, value, value, groups)


def instance_norm(loader: Loader, node: Node, inputs: Sequence[Input]) -> Value:
    """An InstanceNormalization of reshaped maps is a GroupNorm: of (N, G, -1), G groups of channels."""
    value = loader.settle(inputs[0])
    if len(value.base) != 3 or value.perm != (0, 1, 2) or value.order is not None or not value.shape:
        raise ValueError(f"its input must be maps (channels, height, width), got shape (N, {value.shape})")
    return _group_norm(loader, node, inputs, value, value, value.shape[0])


def _group_norm(loader: Loader, node: Node, inputs: Sequence[Input], value: Value, view: Value, groups: int) -> Value:
    channels = value.base[0]
    if groups < 1 or channels % groups:
        raise ValueError(f"{channels} channels are not divisible into {groups} groups")
    arrays = {}
    for name, given in (("weight", inputs[1]), ("bias", inputs[2])):
        array = constant(f"its {name}", given).reshape(-1)
        if len(array) == groups != channels:
            array = np.repeat(array, channels // groups)
        if len(array) != channels:
            raise ValueError(f"its {name} must have {channels} numbers, one a channel, got {len(array)}")
        arrays[name] = array
    layer = layers.GroupNorm(groups, channels, node.number("epsilon", 1e-5))
    return output_of(loader.build.add(loader.build.layer(layer, arrays), value), view)


def layer_norm(loader: Loader, node: Node, inputs: Sequence[Input]) -> Value:
    value = loader.settle(inputs[0])
    axis = axis_of(node.integer("axis", -1), 1 + len(value.shape))
    if axis == 0:
        raise ValueError("axis 0 is the batch")
    if value.order is None:
        value = loader.settle(loader.build.plain(value, len(value.shape)))
    sizes = value.shape[axis - 1 :]
    arrays = {}
    for name, given in zip(("weight", "bias"), inputs[1:3], strict=False):
        if given is None:
            continue
        array = np.broadcast_to(constant(f"its {name}", given), sizes)
        if value.order is not None:
            array = array[np.argsort(value.order)]
        arrays[name] = array
    layer = layers.LayerNorm(sizes, node.number("epsilon", 1e-5), bias="bias" in arrays)
    return loader.layer(loader.build.layer(layer, arrays), value)


# --- pooling and other sizes ------------------------------------------------------------------------------------------


def max_pool(loader: Loader, node: Node, inputs: Sequence[Input]) -> Value:
    source = inputs[0]
    border = source.sides if isinstance(source, Part) and source.kind == "lowest" else (0, 0, 0, 0)
    value = loader.maps(source.value if isinstance(source, Part) and any(border) else source)
    size = value.base[1:]
    left, right, top, bottom = border
    w = _windows.window(node, (size[0] + top + bottom, size[1] + left + right), _windows.kernel_shape(node))
    before, start, after, end = w.pads
    w = w._replace(pads=(before + top, start + left, after + bottom, end + right))
    plan = _windows.pooling(w, size)
    if plan is not None:
        layer = layers.MaxPool2d(w.kernel, w.stride, plan.padding, w.dilation, plan.ceil_mode)
        return cropped(loader, loader.layer(layer, value, view=False), plan.crop)
    totals = [d * (k - 1) for d, k in zip(w.dilation, w.kernel, strict=True)]
    if w.stride == (1, 1) and w.pads == (*(t // 2 for t in totals), *(t - t // 2 for t in totals)):
        return loader.layer(layers.MaxPool2d(w.kernel, 1, "same", w.dilation), value, view=False)
    if not is_positive(value.step):
        raise ValueError(f"pads {w.pads} are none that the layer can have")
    value = loader.layer(layers.ZeroPad2d(w.border), value, view=False)  # zeros are no larger than what is there
    ceil = bool(node.integer("ceil_mode", 0))
    return loader.layer(layers.MaxPool2d(w.kernel, w.stride, 0, w.dilation, ceil), value, view=False)


def is_positive(step: Step | None) -> bool:
    """Whether a step has no negative outputs."""
    while step is not None and isinstance(step.layer, (layers.MaxPool2d, layers.Dropout, layers.Upsample)):
        (step,) = step.inputs
    return step is not None and isinstance(step.layer, (layers.ReLU, layers.ReLU6, layers.Sigmoid))


def cropped(loader: Loader, value: Value, crop: Any) -> Value:
    return value if crop is None else loader.layer(layers.ZeroPad2d(crop), value, view=False)


def average_pool(loader: Loader, node: Node, inputs: Sequence[Input]) -> Value:
    value = loader.maps(inputs[0])
    size = value.base[1:]
    w = _windows.window(node, size, _windows.kernel_shape(node))
    if w.dilation != (1, 1):
        raise ValueError(f"there is no average pooling with dilations, got {w.dilation}")
    ceil, include = bool(node.integer("ceil_mode", 0)), bool(node.integer("count_include_pad", 0))
    if not include or not any(w.pads):
        plan = _windows.pooling(w, size)
        if plan is None:
            raise ValueError(f"pads {w.pads} are none that the layer can have")
        counted = plan.padding == (0, 0)  # the layer's default, if it is the same
        layer = layers.AvgPool2d(w.kernel, w.stride, plan.padding, plan.ceil_mode, counted)
        return cropped(loader, loader.layer(layer, value, view=False), plan.crop)
    top, left = w.pads[:2]
    if not w.symmetric or top > w.kernel[0] // 2 or left > w.kernel[1] // 2:
        value, top, left = loader.layer(layers.ZeroPad2d(w.border), value, view=False), 0, 0
    return loader.layer(layers.AvgPool2d(w.kernel, w.stride, (top, left), ceil), value, view=False)


def global_pool(loader: Loader, node: Node, inputs: Sequence[Input]) -> Value:
    value = loader.maps(inputs[0])
    average = node.op == "GlobalAveragePool"
    layer = layers.AdaptiveAvgPool2d(1) if average else layers.MaxPool2d((value.base[1], value.base[2]))
    return loader.layer(layer, value, view=False)


def reduce_pixels(loader: Loader, node: Node, inputs: Sequence[Input]) -> Any:
    """ReduceMean and ReduceMax over height and width; a mean over the last axes may be of a layer normalisation."""
    source, keep = inputs[0], bool(node.integer("keepdims", 1))
    part = source.value if isinstance(source, Part) else source
    axes = node.axes(inputs, loader.opset, 18, 1 + len(part.shape))
    if isinstance(source, Part):
        return _patterns.variance(source, axes, keep)
    value = loader.settle(source)
    mean = _patterns.mean(value, axes, keep) if node.op == "ReduceMean" else None
    reduced = {value.perm[axis - 1] for axis in axes or [] if axis} if value.shape == value.permuted else set()
    if len(value.base) != 3 or axes is None or len(set(axes)) != 2 or reduced != {1, 2}:
        if mean is not None:
            return mean
        raise ValueError(f"it must reduce height and width of maps (channels, height, width), got axes {axes}")
    pool = layers.MaxPool2d((value.base[1], value.base[2]))
    step = loader.build.add(layers.AdaptiveAvgPool2d(1) if node.op == "ReduceMean" else pool, value)
    shape = tuple(step.shape[axis] for axis in value.perm)
    if not keep:
        shape = tuple(size for axis, size in enumerate(shape, 1) if axis not in axes)
    result = output_of(step).changed(perm=value.perm, shape=shape)
    result.mean_of = mean
    return result


def sum_of_squares(loader: Loader, node: Node, inputs: Sequence[Input]) -> Value:
    axes = node.axes(inputs, loader.opset, 18, 3)
    return _patterns.distances(loader.build, inputs[0], axes, bool(node.integer("keepdims", 1)))


def gather(loader: Loader, node: Node, inputs: Sequence[Input]) -> Value:
    return _patterns.gather(loader.build, loader.settle(inputs[0]), inputs[1], node.integer("axis", 0))


def resize(loader: Loader, node: Node, inputs: Sequence[Input]) -> Value:
    value, opset = loader.settle(inputs[0]), loader.opset
    mode = node.text("mode", "nearest")
    if mode != "nearest":
        raise ValueError(f"mode must be nearest, got {_check.short_repr(mode, 40)}")
    if node.text("keep_aspect_ratio_policy", "stretch") != "stretch":
        raise ValueError("keep_aspect_ratio_policy must be stretch")
    if len(value.base) != 3 or value.shape != value.permuted:
        raise ValueError("its input must be maps (channels, height, width)")
    new, factors = resized(loader, node, inputs, value.shape)
    output = [0, 0, 0]
    for axis, old in enumerate(value.shape):
        place = value.perm[axis]
        output[place] = new[axis]
        if place:
            check_nearest(node, old, new[axis], factors[axis], opset)
        elif new[axis] != old:
            raise ValueError("it must change height and width only")
    size, base = (output[1], output[2]), value.base[1:]
    whole = all(n % fewer == 0 for n, fewer in zip(size, base, strict=True))
    layer = layers.Upsample(scale_factor=(size[0] // base[0], size[1] // base[1])) if whole else layers.Upsample(size)
    step = loader.build.add(layer, value)
    return output_of(step).changed(perm=value.perm, shape=tuple(step.shape[axis] for axis in value.perm))


def resized(loader: Loader, node: Node, inputs: Sequence[Input], shape: Shape) -> tuple[list[int], list[float]]:
    """(sizes, scales) of the axes after the batch of a Resize or Upsample of images of `shape`."""
    if node.op == "Upsample" or loader.opset < 11:
        numbers = node.numbers("scales") if loader.opset < 9 else constant("its scales", inputs[1]).reshape(-1).tolist()
        scales, sizes = numbers or [], []
    else:
        given = [[] if v is None else constant("its sizes", v).reshape(-1).tolist() for v in inputs[2:4]]
        scales, sizes = ([*given, [], []][n] for n in (0, 1))
    full = [BATCH, *shape]
    axes = [axis_of(axis, len(full)) for axis in node.integers("axes") or range(len(full))]
    if {len(scales), len(sizes)} != {0, len(axes)}:
        raise ValueError(f"it must have scales or sizes of {len(axes)} axes")
    new, factors = list(full), [1.0] * len(full)
    for axis, number in zip(axes, scales or sizes, strict=True):
        if axis == 0:
            if (number != 1) if scales else loader.batch_size(int(number)) != BATCH:
                raise ValueError("it must leave the batch axis alone")
        elif not 0 < number < 2**20:
            raise ValueError(f"scales and sizes must be positive, got {number}")
        else:
            new[axis] = math.floor(full[axis] * number) if scales else int(number)
            factors[axis] = number if scales else new[axis] / full[axis]
    return new[1:], factors[1:]


def check_nearest(node: Node, size: int, output: int, scale: float, opset: int) -> None:
    """ValueError unless a Resize reads pixel i * size // output for pixel i of the output."""
    if not 1 <= output <= 2**16:
        raise ValueError(f"its output must have a size of 1 ... {2**16}, got {output}")
    if _windows.nearest(node, size, output, scale, opset) != [i * size // output for i in range(output)]:
        raise ValueError("its coordinate_transformation_mode and nearest_mode must give pixel i*H // OH for pixel i")


def pad(loader: Loader, node: Node, inputs: Sequence[Input]) -> Any:
    value = loader.build.resolve(loader.scaled_input(inputs[0]))
    rank, mode = 1 + len(value.shape), node.text("mode", "constant")
    if mode != "constant":
        raise ValueError(f"mode must be constant, got {_check.short_repr(mode, 40)}")
    if loader.opset < 11:
        pads, fill = node.integers("pads") or node.integers("paddings") or [], node.number("value", 0.0)
    else:
        pads = [int(v) for v in constant("its pads", inputs[1]).reshape(-1)]
        given = inputs[2] if len(inputs) > 2 else None
        fill = 0.0 if given is None or not given.size else float(constant("its value", given).reshape(-1)[0])
    axes = list(range(rank))
    if len(inputs) > 3 and inputs[3] is not None:
        axes = [axis_of(int(v), rank) for v in constant("its axes", inputs[3]).reshape(-1)]
    if len(pads) != 2 * len(axes):
        raise ValueError(f"it must have {2 * len(axes)} pads, got {len(pads)}")
    if not any(pads):
        return value
    if abs(fill) <= np.finfo(np.float32).tiny:
        fill = 0.0
    lowest = fill <= np.finfo(np.float32).min  # -inf, for a MaxPool
    if fill != 0 and not lowest:
        raise ValueError(f"its value must be 0, got {fill:g}")
    if value.scaled and (value.shift != 0).any():
        raise ValueError("its input is shifted before it is padded with zeros")
    if len(value.base) != 3 or value.shape != value.permuted:
        raise ValueError("its input must be maps (channels, height, width)")
    sides = dict.fromkeys(range(3), (0, 0))
    for n, axis in enumerate(axes):
        start, end = pads[n], pads[n + len(axes)]
        if (start or end) and (axis == 0 or value.perm[axis - 1] == 0):
            raise ValueError("it must pad height and width only")
        if axis:
            sides[value.perm[axis - 1]] = start, end
    if lowest:
        return Part("lowest", loader.settle(value), sides=(*sides[2], *sides[1]))
    step = loader.build.add(layers.ZeroPad2d((*sides[2], *sides[1])), value)
    shape = tuple(step.shape[axis] for axis in value.perm)
    return output_of(step).changed(perm=value.perm, shape=shape, scale=value.scale, shift=value.shift)


# --- activations and formulas -----------------------------------------------------------------------------------------


def activation(loader: Loader, layer: Layer, value: Input) -> Value:
    """An activation: a layer, and a formula that may be part of another one, such as x * sigmoid(x)."""
    if not isinstance(value, Value):
        raise ValueError("its input is a constant")
    try:
        settled = loader.settle(value)
    except ValueError:
        if not value.curves:
            raise
        curves = tuple((step, _formulas.values(layer, curve)) for step, curve in value.curves)
        return value.changed(step=None, node=loader.build.node, scale=ONE, shift=ZERO, curves=curves)
    curves = tuple((step, _formulas.values(layer, curve)) for step, curve in settled.curves)
    loader.graph.budget.take(len(curves) * _formulas.GRID.nbytes)
    return output_of(loader.build.add(layer, settled), settled, curves)


def known(loader: Loader, value: Value) -> Value | None:
    """The value as a layer's output; None if it is a formula so far."""
    try:
        return loader.settle(value)
    except ValueError:
        return None


def aligned(node: Node, value: Value, array: Array, opset: int) -> Array:
    """A constant with the axes of the attributes `broadcast` and `axis` of old opsets."""
    if opset >= 7 or not node.has("axis"):
        return array
    end = 1 + len(value.shape) - node.integer("axis", 0) - array.ndim
    if end < 0:
        raise ValueError(f"a constant of shape {array.shape} does not fit at axis {node.integer('axis', 0)}")
    return array.reshape(*array.shape, *(1,) * end)


def binary(loader: Loader, node: Node, inputs: Sequence[Input]) -> Any:
    op = node.op
    if op in ("Sum", "Max", "Min") and len(inputs) != 2:
        if len(inputs) == 1:
            return identity(loader, node, inputs)
        result = inputs[0]
        for other in inputs[1:]:
            result = binary(loader, node, [result, other])
        return result
    a, b = inputs
    part = _patterns.binary(loader.build, op, a, b)
    if part is not None:
        return part
    if isinstance(a, Value) and isinstance(b, Value):
        return both(loader, "Add" if op == "Sum" else op, a, b)
    value, array = (a, b) if isinstance(a, Value) else (b, a)
    if not isinstance(value, Value):
        raise ValueError("its inputs are constants")
    array = aligned(node, value, constant("its other input", array), loader.opset).astype(np.float64)
    is_first = isinstance(a, Value)
    normed = _patterns.into_layer_norm(loader.build, op, value, array)
    if normed is not None:
        return normed
    if op in ("Add", "Sum", "Sub", "Mul") or (op == "Div" and is_first):
        value, array = loader.build.per_channel(value, array)
        if op == "Mul":
            return scaled(loader, value, array, ZERO)
        if op == "Div":
            if (array == 0).any():
                raise ValueError("it divides by zero")
            return scaled(loader, value, 1 / array, ZERO)
        if op == "Sub":
            return scaled(loader, value, ONE if is_first else -ONE, -array if is_first else array)
        return scaled(loader, value, ONE, array)
    return combine(loader, _formulas.OPERATIONS[op], [value, array] if is_first else [array, value])


def scaled(loader: Loader, value: Value, scale: Array, shift: Array) -> Value:
    result = loader.build.scaled(value, scale, shift)
    if (scale.ndim or shift.ndim) and result.step is not None and result.step is not loader.input:
        return loader.build.resolve(result)
    return result


def both(loader: Loader, op: str, a: Value, b: Value) -> Value:
    """An operator of two values: a residual sum, or a formula."""
    if op in ("Add", "Sub"):
        first, other = known(loader, a), known(loader, b if op == "Add" else loader.build.scaled(b, -ONE, ZERO))
        if first is not None and other is not None and first.step is not other.step:
            if not first.same_view(other) and len(first.shape) == len(other.shape) == 1:
                first, other = (loader.settle(loader.build.plain(value, 1)) for value in (first, other))
            if not first.same_view(other):
                raise ValueError(f"it adds shapes (N, {first.shape}) and (N, {other.shape}), or axes in another order")
            steps = tuple(value.step for value in (first, other) if value.step is not None)
            return output_of(Step(None, steps, first.base, loader.build.node), first)
    return combine(loader, _formulas.OPERATIONS[op], [a, b])


def combine(loader: Loader, function: Callable[..., Array], inputs: Sequence[Input]) -> Value:
    """A function of each element of one tensor: the inputs are numbers, and functions of that tensor."""
    values = [known(loader, v) or v if isinstance(v, Value) and v.step is None else v for v in inputs]
    first, *others = [value for value in values if isinstance(value, Value)]
    if not all(isinstance(value, Value) or (isinstance(value, np.ndarray) and value.size == 1) for value in values):
        raise ValueError("its constants must be one number each")
    found = [{id(step): curve for step, curve in value.curves} for value in values if isinstance(value, Value)]
    curves = []
    for step, _ in first.curves:
        if all(id(step) in known_steps for known_steps in found):
            parts = iter(known_steps[id(step)] for known_steps in found)
            arguments = [next(parts) if isinstance(value, Value) else value.reshape(()) for value in values]
            with np.errstate(all="ignore"):
                curves.append((step, np.asarray(function(*arguments), np.float64)))
    if not curves or not all(first.same_view(other) for other in others):
        raise ValueError("it is no activation that is known, and no part of one: its inputs must depend, element by "
                         "element, on one tensor and on numbers")  # fmt: skip
    loader.graph.budget.take(len(curves) * _formulas.GRID.nbytes)
    return first.changed(step=None, node=loader.build.node, scale=ONE, shift=ZERO, curves=tuple(curves))


def formula(loader: Loader, node: Node, inputs: Sequence[Input]) -> Any:
    """An operator on each element that is no layer, but may be part of an activation's formula."""
    if isinstance(inputs[0], Part):
        return _patterns.unary(inputs[0], node.op)
    if node.op == "Neg":
        return loader.build.scaled(inputs[0], -ONE, ZERO)
    if node.op == "Exp" and isinstance(inputs[0], Value):
        gaussian = _patterns.gaussian(loader.build, inputs[0])
        if gaussian is not None:
            return gaussian
    limit = inputs[1] if node.op == "Greater" else None
    if isinstance(limit, np.ndarray) and limit.size == 1 and len(loader.build.thresholds) < 4:
        loader.build.thresholds[_check.number("its limit", float(limit.reshape(())))] = None
    return combine(loader, _formulas.FUNCTIONS[node.op], inputs)


def clip(loader: Loader, node: Node, inputs: Sequence[Input]) -> Any:
    if loader.opset < 11:
        limits = [node.number("min", -3.4e38), node.number("max", 3.4e38)]
    else:
        given = [*inputs[1:3], None, None][:2]
        limits = [
            default if v is None or not v.size else float(constant("its limit", v).reshape(-1)[0])
            for v, default in zip(given, (-math.inf, math.inf), strict=True)
        ]
    low, high = (sign * math.inf if abs(v) >= 3.4e38 else v for v, sign in zip(limits, (-1, 1), strict=True))
    if (low, high) == (-math.inf, math.inf):
        return identity(loader, node, inputs)
    if (low, high) in ((0, 6), (0, math.inf)):
        return activation(loader, layers.ReLU6() if high == 6 else layers.ReLU(), inputs[0])
    if math.isfinite(low) and math.isfinite(high):
        return activation(loader, layers.Hardtanh(low, high), inputs[0])
    return combine(loader, lambda x: np.clip(x, low, high), inputs[:1])


def prelu(loader: Loader, node: Node, inputs: Sequence[Input]) -> Value:
    slope = constant("its slope", inputs[1])
    if not slope.size or (slope != slope.reshape(-1)[0]).any():
        raise ValueError("its slope must be one number for all channels")
    return activation(loader, layers.LeakyReLU(float(slope.reshape(-1)[0])), inputs[0])


def gelu(loader: Loader, node: Node, inputs: Sequence[Input]) -> Value:
    return activation(loader, layers.GELU(node.text("approximate", "none")), inputs[0])


def swish(loader: Loader, node: Node, inputs: Sequence[Input]) -> Value:
    if node.number("alpha", 1.0) != 1:
        raise ValueError(f"alpha must be 1, got {node.number('alpha', 1.0):g}")
    return activation(loader, layers.SiLU(), inputs[0])


def softmax(loader: Loader, node: Node, inputs: Sequence[Input]) -> Value:
    value = loader.settle(inputs[0])
    rank = 1 + len(value.shape)
    old = loader.opset < 13
    axis = axis_of(node.integer("axis", 1 if old else -1), rank)
    size = math.prod(value.shape)
    if axis != 1 if old else axis == 0 or value.shape[axis - 1] != size:
        raise ValueError(f"it must be over the classes of a vector, got axis {axis} of (N, {value.shape})")
    vector = loader.settle(loader.build.plain(loader.build.reshape(value, (size,)), 1))
    layer = layers.Softmax() if node.op == "Softmax" else layers.LogSoftmax()
    return loader.build.reshape(output_of(loader.build.add(layer, vector), vector), value.shape)


def dropout(loader: Loader, node: Node, inputs: Sequence[Input]) -> Value:
    """In training; in evaluation mode the layer is the identity, as the node is."""
    p = node.number("ratio", 0.5)
    if loader.opset >= 12 and len(inputs) > 1 and inputs[1] is not None:
        p = float(constant("its ratio", inputs[1]).reshape(()))
    value = loader.settle(inputs[0])
    return loader.layer(layers.Dropout(p), value)


# --- shapes -----------------------------------------------------------------------------------------------------------


def identity(loader: Loader, node: Node, inputs: Sequence[Input]) -> Any:
    return inputs[0]


def cast(loader: Loader, node: Node, inputs: Sequence[Input]) -> Any:
    value, kind = inputs[0], loader.graph.type_name(node.integer("to", 0), "its result")
    if kind in FLOATS or (value.step is loader.input and loader.integers == kind and not value.scaled):
        return value
    raise ValueError(f"it turns numbers into {kind}; only floating-point types are known")


def shape_of(loader: Loader, node: Node, inputs: Sequence[Input]) -> Array:
    value = inputs[0]
    sizes = list(value.shape) if isinstance(value, np.ndarray) else [BATCH, *value.shape]
    end = node.integer("end", len(sizes)) if node.has("end") else len(sizes)
    return np.array(sizes[node.integer("start", 0) : end], np.int64)


def flatten(loader: Loader, node: Node, inputs: Sequence[Input]) -> Value:
    value = inputs[0]
    if axis_of(node.integer("axis", 1), 2 + len(value.shape)) != 1:
        raise ValueError("axis must be 1, the first after the batch")
    return loader.build.reshape(value, (math.prod(value.shape),))


def reshape(loader: Loader, node: Node, inputs: Sequence[Input]) -> Value:
    value = inputs[0]
    if not isinstance(value, Value):
        raise ValueError("its shape depends on the graph's input")
    if loader.opset < 5:
        target = node.integers("shape") or []
    else:
        target = [int(v) for v in constant("its shape", inputs[1]).reshape(-1)]
    full = [BATCH, *value.shape]
    if not node.integer("allowzero", 0):
        target = [full[n] if size == 0 and n < len(full) else size for n, size in enumerate(target)]
    return loader.build.reshape(value, without_batch(loader, target, math.prod(value.shape)))


def without_batch(loader: Loader, target: list[int], count: int) -> list[int]:
    """The shape of one image of `count` numbers in a batch of shape `target`."""
    shown = [("N" if size == BATCH else size) for size in target]
    if not target:
        raise ValueError("it takes away the batch axis")
    first, rest = target[0], list(target[1:])
    if rest.count(-1) == 1 and (first == BATCH or first == loader.batch):
        others = math.prod(size for size in rest if size != -1)
        if others > 0 and count % others == 0:
            rest[rest.index(-1)] = count // others
    if any(size < 1 for size in rest) or math.prod(rest) != count or first not in (BATCH, -1, loader.batch):
        raise ValueError(f"shape {shown} must keep the batch axis, and the {count} numbers of an image")
    return rest


def squeeze(loader: Loader, node: Node, inputs: Sequence[Input]) -> Value:
    value = inputs[0]
    full = [-1, *value.shape]
    new = moved_axes(node, inputs, loader.opset, tuple(full))
    if not new or new[0] != -1:
        raise ValueError("it moves the batch axis")
    return loader.build.reshape(value, new[1:])


def transpose(loader: Loader, node: Node, inputs: Sequence[Input]) -> Value:
    value = inputs[0]
    rank = 1 + len(value.shape)
    perm = node.integers("perm", range(rank)[::-1]) or []
    if sorted(perm) != list(range(rank)):
        raise ValueError(f"perm must be a permutation of {rank} axes, got {perm}")
    if perm[0] != 0:
        raise ValueError(f"it must leave the batch axis alone, got perm {perm}")
    return loader.build.transpose(value, [axis - 1 for axis in perm[1:]])


def _activation(make: Callable[[Node], Layer]) -> Callable[[Loader, Node, Sequence[Input]], Value]:
    return lambda loader, node, inputs: activation(loader, make(node), inputs[0])


TAKES_PARTS = ("Add", "Div", "MaxPool", "Mul", "Pow", "Reciprocal", "ReduceMean", "ReduceSumSquare", "Sqrt", "Sub")
OPERATORS: dict[str, Callable[[Loader, Node, Sequence[Input]], Any]] = {
    "Abs": formula,
    "Add": binary,
    "AveragePool": average_pool,
    "BatchNormalization": batch_norm,
    "Cast": cast,
    "Clip": clip,
    "Conv": conv,
    "ConvTranspose": conv_transpose,
    "Div": binary,
    "Dropout": dropout,
    "Elu": _activation(lambda node: layers.ELU(node.number("alpha", 1.0))),
    "Erf": formula,
    "Exp": formula,
    "Flatten": flatten,
    "Gather": gather,
    "Gelu": gelu,
    "Gemm": gemm,
    "GlobalAveragePool": global_pool,
    "GlobalMaxPool": global_pool,
    "Greater": formula,
    "GreaterOrEqual": formula,
    "GroupNormalization": group_norm,
    "Identity": identity,
    "InstanceNormalization": instance_norm,
    "LayerNormalization": layer_norm,
    "LeakyRelu": _activation(lambda node: layers.LeakyReLU(node.number("alpha", 0.01))),
    "Less": formula,
    "LessOrEqual": formula,
    "Log": formula,
    "LogSoftmax": softmax,
    "MatMul": matmul,
    "Max": binary,
    "MaxPool": max_pool,
    "Min": binary,
    "Mul": binary,
    "Neg": formula,
    "PRelu": prelu,
    "Pad": pad,
    "Pow": binary,
    "Reciprocal": formula,
    "ReduceMax": reduce_pixels,
    "ReduceMean": reduce_pixels,
    "ReduceSumSquare": sum_of_squares,
    "Relu": _activation(lambda node: layers.ReLU()),
    "Reshape": reshape,
    "Resize": resize,
    "Shape": shape_of,
    "Sigmoid": _activation(lambda node: layers.Sigmoid()),
    "Softmax": softmax,
    "Softplus": _activation(lambda node: layers.Softplus()),
    "Sqrt": formula,
    "Squeeze": squeeze,
    "Sub": binary,
    "Sum": binary,
    "Swish": swish,
    "Tanh": _activation(lambda node: layers.Tanh()),
    "Transpose": transpose,
    "Unsqueeze": squeeze,
    "Upsample": resize,
    "Where": formula,
}
