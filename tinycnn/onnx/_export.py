"""A model as an ONNX graph.

`WRITERS` has a function for each class of layer, which adds the layer's nodes to a `Graph`.  Shapes of images are
known, so that windows which extend beyond the image become explicit padding: readers differ in their `ceil_mode`.
"""

import json
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

import tinycnn
from tinycnn import _check, _predict, layers, lecun98
from tinycnn._files import atomic_write
from tinycnn._tracked import is_builtin
from tinycnn._typing import Array, Shape, State
from tinycnn.containers import Residual
from tinycnn.layers import Layer
from tinycnn.model import Sequential

OLDEST_OPSET = 13


def export(
    model: Sequential,
    path: str | os.PathLike[str] | None = None,
    *,
    opset: int = 17,
    uint8_input: bool = False,
    probabilities: bool = False,
) -> Any:
    """The model in evaluation mode as an `onnx.ModelProto`, also written to `path` if given.

    opset          version of ONNX's operators: 13, or a later one that the installed onnx has
    uint8_input    the graph takes pixels (N, C, H, W) as `fit` did and normalises them; otherwise it takes float32
                   input, (pixel / unit - mean) / std
    probabilities  the outputs are those of `model.predict_proba`, otherwise those of `model.outputs`

    The input "input" and the output "output" have any number N of images.  The arrays are float32; parameters have
    their names and numbers in the state_dict, axes of length 1 added where that broadcasts.  A `MappedConv2d` becomes
    a convolution with a zero for each pair that is not connected.  Class names, output kind, normalization and the
    version of tinycnn are in `metadata_props`.

    Raises ImportError without onnx, ValueError for a model whose input shape is not known, or that was not trained on
    uint8 pixels if these are wanted, and TypeError for a layer that is not this library's; OSError.
    """
    try:
        import onnx
    except ImportError:
        raise ImportError('tinycnn.onnx needs onnx: pip install "tinycnn[onnx]"') from None
    _check.instance("model", model, Sequential, "a Sequential")
    newest = onnx.defs.onnx_opset_version()
    if not OLDEST_OPSET <= _check.integer("opset", opset) <= newest:
        raise ValueError(f"opset must be in {OLDEST_OPSET} ... {newest}, got {opset}")
    helper, float32 = onnx.helper, onnx.TensorProto.FLOAT
    with model.lock:
        if model.input_shape is None:
            raise ValueError("input_shape is not known yet: give it to Sequential, or call forward first")
        normalization = model.normalization
        if uint8_input and (normalization is None or normalization.unit != 255):
            trained = "not trained" if normalization is None else f"trained on {normalization.pixels}"
            raise ValueError(f"uint8_input must be False for a model that was {trained}; train it on uint8 images")
        shape = tuple(model.layers[-1].output_shape(model.shapes[-2]))
        graph, x = Graph(opset, model.state_dict()), "input"
        if uint8_input:
            x = normalize(graph, x, model)
        x = chain(graph, model.layers, x, model.input_shape)
        graph.prefix = "output"
        if probabilities and (function := _predict.probability_function(model, 1 + len(shape))):
            x = graph.add("Softmax", x, axis=1) if function == "softmax" else graph.add("Sigmoid", x)
        graph.rename(x, "output")
        metadata = {"tinycnn_version": tinycnn.__version__}
        if model.class_names is not None:
            metadata["class_names"] = json.dumps(model.class_names, ensure_ascii=False)
        if model.output_kind is not None:
            metadata["output_kind"] = model.output_kind
        if normalization is not None:
            numbers = {"mean": normalization.mean.tolist(), "std": normalization.std.tolist()}
            metadata["normalization"] = json.dumps({**numbers, "unit": normalization.unit})
        images = onnx.TensorProto.UINT8 if uint8_input else float32
        body = helper.make_graph(
            [helper.make_node(op, inputs, [y], name=y, **options) for op, inputs, y, options in graph.nodes],
            "tinycnn",
            [helper.make_tensor_value_info("input", images, ["N", *model.input_shape])],
            [helper.make_tensor_value_info("output", float32, ["N", *shape])],
            [onnx.numpy_helper.from_array(values, name) for name, values in graph.arrays.items()],
        )
    opsets = [helper.make_opsetid("", opset)]
    proto = helper.make_model(
        body,
        opset_imports=opsets,
        ir_version=helper.find_min_ir_version_for(opsets),  # for readers older than the installed onnx
        producer_name="tinycnn",
        producer_version=tinycnn.__version__,
    )
    helper.set_model_props(proto, metadata)
    if path is not None:
        with atomic_write(Path(path)) as file:
            file.write(proto.SerializeToString(deterministic=True))
    return proto


class Graph:
    """Nodes and arrays of a graph that is being written.

    nodes   (operator, names of the inputs, name of the output, attributes) each
    arrays  the initializers by name
    prefix  name of the layer that is being written, "0" or "3.layers.0"
    """

    def __init__(self, opset: int, state: State) -> None:
        self.opset, self.state, self.prefix = opset, state, ""
        self.nodes: list[tuple[str, list[str], str, dict[str, Any]]] = []
        self.arrays: dict[str, Array] = {}
        self._outputs: set[str] = set()

    def add(self, op: str, *inputs: str | ArrayLike, **attributes: Any) -> str:
        """Add a node; returns the name of its output.  Inputs that are not names are constants, as float32 or, if they
        are integers, int64."""
        output = f"{self.prefix}/{op}"
        while output in self._outputs:
            output += "_"
        self._outputs.add(output)
        names = [i if isinstance(i, str) else self.constant(f"{output}.{n}", i) for n, i in enumerate(inputs)]
        self.nodes.append((op, names, output, attributes))
        return output

    def constant(self, name: str, values: ArrayLike) -> str:
        """An initializer that is no parameter."""
        array = np.asarray(values)
        self.arrays[name] = array.astype(np.int64 if array.dtype.kind == "i" else np.float32)
        return name

    def parameter(self, name: str, shape: Shape | None = None, values: Array | None = None) -> str:
        """The layer's array `name` as an initializer.   shape: with axes of length 1   values: others than its own"""
        key = f"{self.prefix}.{name}"
        array = self.state[key] if values is None else values
        self.arrays[key] = np.ascontiguousarray(array.reshape(array.shape if shape is None else shape), np.float32)
        return key

    def parameters(self, *names: str) -> list[Any]:
        """Those of the layer's arrays that it has."""
        return [self.parameter(name) for name in names if f"{self.prefix}.{name}" in self.state]

    def reduce(self, op: str, x: str, axes: Sequence[int], keepdims: bool = True) -> str:
        """A reduction: its axes are an attribute before opset 18."""
        if self.opset < 18:
            return self.add(op, x, axes=list(axes), keepdims=int(keepdims))
        return self.add(op, x, list(axes), keepdims=int(keepdims))

    def scale_and_shift(self, x: str, shape: Shape) -> str:
        """x times the layer's weight plus its bias, if it has them, in a shape that broadcasts."""
        for op, name in (("Mul", "weight"), ("Add", "bias")):
            if f"{self.prefix}.{name}" in self.state:
                x = self.add(op, x, self.parameter(name, shape))
        return x

    def rename(self, x: str, name: str) -> None:
        """Give the last result the name of the graph's output."""
        if self.nodes and self.nodes[-1][2] == x:
            op, inputs, _, attributes = self.nodes.pop()
            self.nodes.append((op, inputs, name, attributes))
        else:
            self.nodes.append(("Identity", [x], name, {}))


Writer = Callable[[Graph, Any, str, Shape], str]  # adds a layer's nodes for an input of a shape; returns the output


def normalize(graph: Graph, x: str, model: Sequential) -> str:
    """Pixels as the model's input; see `Normalization`."""
    graph.prefix, normalization = "normalization", model.normalization
    assert normalization is not None
    per_channel = (-1,) + (1,) * (len(model.shapes[0]) - 1)
    x = graph.add("Cast", x, to=1)  # float32
    x = graph.add("Sub", x, (normalization.unit * normalization.mean).reshape(per_channel))
    return graph.add("Div", x, (normalization.unit * normalization.std).reshape(per_channel))


def chain(graph: Graph, chained: Sequence[Layer], x: str, shape: Shape, prefix: str = "") -> str:
    """Add the nodes of layers, one after the other."""
    for number, layer in enumerate(chained):
        writer = WRITERS.get(type(layer)) if is_builtin(layer) else None
        graph.prefix = f"{prefix}{number}"
        if writer is None:
            raise TypeError(
                f"layer {graph.prefix}, {layer!r}, cannot be exported: it must be a layer of tinycnn, unchanged, got "
                f"{type(layer).__module__}.{type(layer).__qualname__}"
            )
        x, shape = writer(graph, layer, x, tuple(shape)), layer.output_shape(shape)
    return x


def residual(graph: Graph, layer: Residual, x: str, shape: Shape) -> str:
    prefix = graph.prefix
    main = chain(graph, layer.layers, x, shape, f"{prefix}.layers.")
    shortcut = chain(graph, layer.projection, x, shape, f"{prefix}.projection.")
    graph.prefix = prefix
    return graph.add("Add", main, shortcut)


def nothing(graph: Graph, layer: Layer, x: str, shape: Shape) -> str:
    return x


# --- convolutions, linear layers and distances ------------------------------------------------------------------------


def conv2d(graph: Graph, layer: layers.Conv2d, x: str, shape: Shape) -> str:
    ends = list(layer.padding)
    if layer.same:  # one pixel more than at the start if the sum is odd
        axes = zip(layer.dilation, layer.kernel_size, layer.padding, strict=True)
        ends = [d * (k - 1) - start for d, k, start in axes]
    return graph.add(
        "Conv", x, *graph.parameters("weight", "bias"), kernel_shape=layer.kernel_size, strides=layer.stride,
        pads=[*layer.padding, *ends], dilations=layer.dilation, group=layer.groups,
    )  # fmt: skip


def conv_transpose2d(graph: Graph, layer: layers.ConvTranspose2d, x: str, shape: Shape) -> str:
    return graph.add(
        "ConvTranspose", x, *graph.parameters("weight", "bias"), kernel_shape=layer.kernel_size, strides=layer.stride,
        pads=layer.padding * 2, dilations=layer.dilation, group=layer.groups, output_padding=layer.output_padding,
    )  # fmt: skip


def mapped_conv2d(graph: Graph, layer: lecun98.MappedConv2d, x: str, shape: Shape) -> str:
    table = layer.table.T
    dense = np.zeros((*table.shape, *layer.kernel_size))
    dense[table] = graph.state[f"{graph.prefix}.weight"]
    weight = graph.parameter("weight", values=dense)
    return graph.add("Conv", x, weight, graph.parameter("bias"), kernel_shape=layer.kernel_size)


def linear(graph: Graph, layer: layers.Linear, x: str, shape: Shape) -> str:
    return graph.add("Gemm", x, *graph.parameters("weight", "bias"), transB=1)


def euclidean_rbf(graph: Graph, layer: Layer, x: str, shape: Shape) -> str:
    difference = graph.add("Sub", graph.add("Unsqueeze", x, [1]), graph.parameter("weight"))
    return graph.reduce("ReduceSumSquare", difference, [2], keepdims=False)


def gaussian_rbf(graph: Graph, layer: Layer, x: str, shape: Shape) -> str:
    return graph.add("Exp", graph.add("Mul", euclidean_rbf(graph, layer, x, shape), -0.5))


# --- pooling, other sizes and shapes ----------------------------------------------------------------------------------


def _pads(layer: layers.AvgPool2d | layers.MaxPool2d, shape: Shape) -> list[int]:
    """Padding (top, left, bottom, right) with which the windows are those of the layer, without `ceil_mode`."""
    ends = []
    for axis in (0, 1):
        start, step, window = layer.padding[axis], layer.stride[axis], layer.kernel_size[axis]
        reach = (layer.output_shape(shape)[1 + axis] - 1) * step + layer.dilation[axis] * (window - 1) + 1
        ends.append(max(start, reach - shape[1 + axis] - start))
    return [*layer.padding, *ends]


def max_pool2d(graph: Graph, layer: layers.MaxPool2d, x: str, shape: Shape) -> str:
    if graph.nodes and graph.nodes[-1][0] == "Pad" and graph.nodes[-1][2] == x:
        # onnxruntime before 1.32 makes a border of zeros part of the pooling, which pads with -inf; it leaves others.
        graph.nodes[-1][1].append(graph.constant(f"{x}.2", np.finfo(np.float32).tiny))
    pads = _pads(layer, shape)
    if any(
        pad >= size for pad, size in zip(pads, layer.kernel_size * 2, strict=True)
    ):  # onnxruntime takes no such pads
        top, left, bottom, right = pads
        x, pads = graph.add("Pad", x, [0, 0, top, left, 0, 0, bottom, right], -math.inf), [0] * 4
    window = {"kernel_shape": layer.kernel_size, "strides": layer.stride, "pads": pads, "dilations": layer.dilation}
    return graph.add("MaxPool", x, **window)


def avg_pool2d(graph: Graph, layer: layers.AvgPool2d, x: str, shape: Shape) -> str:
    include, pads = layer.count_include_pad or bool(layer.divisor), _pads(layer, shape)
    window = {"kernel_shape": layer.kernel_size, "strides": layer.stride}
    if include and not layer.divisor and tuple(pads[2:]) != layer.padding:
        # The last windows count the pixels of the layer's own padding, and none beyond it.
        if any(layer.padding):
            x = graph.add("Pad", x, [0, 0, *layer.padding, 0, 0, *layer.padding])
        ends = [end - own for end, own in zip(pads[2:], layer.padding, strict=True)]
        return graph.add("AveragePool", x, **window, pads=[0, 0, *ends], count_include_pad=0)
    x = graph.add("AveragePool", x, **window, pads=pads, count_include_pad=int(include))
    return graph.add("Mul", x, math.prod(layer.kernel_size) / layer.divisor) if layer.divisor else x


def adaptive_avg_pool2d(graph: Graph, layer: layers.AdaptiveAvgPool2d, x: str, shape: Shape) -> str:
    sizes, output = shape[1:], layer.output_shape(shape)[1:]
    if output == (1, 1):
        return graph.add("GlobalAveragePool", x)
    if all(n % out == 0 for n, out in zip(sizes, output, strict=True)):
        window = [n // out for n, out in zip(sizes, output, strict=True)]
        return graph.add("AveragePool", x, kernel_shape=window, strides=window)
    rows, columns = (_means(n, out) for n, out in zip(sizes, output, strict=True))
    return graph.add("MatMul", graph.add("MatMul", rows, x), columns.T)


def _means(n: int, out: int) -> Array:
    """(out, n): the weights of n numbers in the means of windows that share them out evenly."""
    starts, ends = np.arange(out) * n // out, -(-np.arange(1, out + 1) * n // out)
    positions = np.arange(n)
    inside = (positions >= starts[:, None]) & (positions < ends[:, None])
    means: Array = inside / (ends - starts)[:, None]
    return means


def subsample(graph: Graph, layer: lecun98.Subsample, x: str, shape: Shape) -> str:
    x = graph.add("AveragePool", x, kernel_shape=layer.kernel_size, strides=layer.kernel_size)
    if layer.pool == "sum":
        x = graph.add("Mul", x, float(math.prod(layer.kernel_size)))
    return graph.scale_and_shift(x, (-1, 1, 1))


def upsample(graph: Graph, layer: layers.Upsample, x: str, shape: Shape) -> str:
    sizes, output = shape[1:], layer.output_shape(shape)[1:]
    if all(out % n == 0 for n, out in zip(sizes, output, strict=True)):
        scales = [1.0, 1.0, *(out / n for n, out in zip(sizes, output, strict=True))]
        options = {"mode": "nearest", "coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}
        return graph.add("Resize", x, "", scales, **options)
    for axis, (n, out) in enumerate(zip(sizes, output, strict=True), 2):  # Resize would round scales
        x = graph.add("Gather", x, np.arange(out) * n // out, axis=axis)
    return x


def zero_pad2d(graph: Graph, layer: layers.ZeroPad2d, x: str, shape: Shape) -> str:
    left, right, top, bottom = layer.padding
    return graph.add("Pad", x, [0, 0, top, left, 0, 0, bottom, right])


def flatten(graph: Graph, layer: layers.Flatten, x: str, shape: Shape) -> str:
    return graph.add("Flatten", x)


def unflatten(graph: Graph, layer: layers.Unflatten, x: str, shape: Shape) -> str:
    return graph.add("Reshape", x, [0, *layer.output_shape(shape)])


# --- norms ------------------------------------------------------------------------------------------------------------


def batch_norm(graph: Graph, layer: layers.BatchNorm2d, x: str, shape: Shape) -> str:
    if not layer.track_running_stats:  # the statistics of the batch
        axes, per_channel = ((0, 2, 3), (-1, 1, 1)) if len(shape) == 3 else ((0,), (-1,))
        return graph.scale_and_shift(_standardized(graph, x, axes, layer.eps), per_channel)
    affine = graph.parameters("weight", "bias") or [np.ones(layer.channels), np.zeros(layer.channels)]
    statistics = graph.parameters("running_mean", "running_var")
    momentum = {} if layer.momentum is None else {"momentum": 1.0 - layer.momentum}  # for training it again
    return graph.add("BatchNormalization", x, *affine, *statistics, epsilon=layer.eps, **momentum)


def _standardized(graph: Graph, x: str, axes: Sequence[int], eps: float) -> str:
    """(x - mean) / sqrt(variance + eps) over axes."""
    centred = graph.add("Sub", x, graph.reduce("ReduceMean", x, axes))
    variance = graph.reduce("ReduceMean", graph.add("Mul", centred, centred), axes)
    return graph.add("Div", centred, graph.add("Sqrt", graph.add("Add", variance, eps)))


def layer_norm(graph: Graph, layer: layers.LayerNorm, x: str, shape: Shape) -> str:
    axes = range(-len(layer.normalized_shape), 0)
    if graph.opset < 17:
        return graph.scale_and_shift(_standardized(graph, x, axes, layer.eps), layer.normalized_shape)
    weight = graph.parameters("weight") or [np.ones(layer.normalized_shape)]
    bias = graph.parameters("bias") or [np.zeros(layer.normalized_shape)]  # onnxruntime 1.17 crashes without one
    return graph.add("LayerNormalization", x, *weight, *bias, axis=axes[0], epsilon=layer.eps)


def group_norm(graph: Graph, layer: layers.GroupNorm, x: str, shape: Shape) -> str:
    if graph.opset >= 21:
        affine = graph.parameters("weight", "bias") or [np.ones(layer.channels), np.zeros(layer.channels)]
        return graph.add("GroupNormalization", x, *affine, num_groups=layer.groups, epsilon=layer.eps)
    grouped = graph.add("Reshape", x, [0, layer.groups, -1])
    ones, zeros = np.ones(layer.groups), np.zeros(layer.groups)
    grouped = graph.add("InstanceNormalization", grouped, ones, zeros, epsilon=layer.eps)
    return graph.scale_and_shift(graph.add("Reshape", grouped, [0, *shape]), (-1, 1, 1))


# --- activations ------------------------------------------------------------------------------------------------------


def _plain(op: str, alpha: str = "", **options: Any) -> Writer:
    """The writer of an operator without arrays.   alpha: the layer's attribute of that meaning   options: attributes"""

    def write(graph: Graph, layer: Layer, x: str, shape: Shape) -> str:
        return graph.add(op, x, **options, **({"alpha": float(getattr(layer, alpha))} if alpha else {}))

    return write


def scaled_tanh(graph: Graph, layer: layers.ScaledTanh, x: str, shape: Shape) -> str:
    return graph.add("Mul", graph.add("Tanh", graph.add("Mul", x, layer.S)), layer.A)


def gelu(graph: Graph, layer: layers.GELU, x: str, shape: Shape) -> str:
    if graph.opset >= 20:
        return graph.add("Gelu", x, approximate=layer.approximate)
    if layer.approximate == "tanh":
        cube = graph.add("Mul", x, graph.add("Mul", x, x))
        inner = graph.add("Mul", graph.add("Add", x, graph.add("Mul", cube, 0.044715)), math.sqrt(2 / math.pi))
        squashed = graph.add("Tanh", inner)
    else:
        squashed = graph.add("Erf", graph.add("Mul", x, math.sqrt(0.5)))
    return graph.add("Mul", graph.add("Mul", x, 0.5), graph.add("Add", squashed, 1.0))


def silu(graph: Graph, layer: layers.SiLU, x: str, shape: Shape) -> str:
    return graph.add("Mul", x, graph.add("Sigmoid", x))


def softplus(graph: Graph, layer: layers.Softplus, x: str, shape: Shape) -> str:
    scaled = graph.add("Mul", x, layer.beta)
    y = graph.add("Div", graph.add("Softplus", scaled), layer.beta)
    if layer.threshold >= 20:  # beyond it the difference from x is below 2e-9
        return y
    return graph.add("Where", graph.add("Greater", scaled, layer.threshold), x, y)


def hardtanh(graph: Graph, layer: layers.Hardtanh, x: str, shape: Shape) -> str:
    return graph.add("Clip", x, layer.min_val, layer.max_val)


def relu6(graph: Graph, layer: layers.ReLU6, x: str, shape: Shape) -> str:
    return graph.add("Clip", x, 0.0, 6.0)


WRITERS: dict[type[Layer], Writer] = {
    Residual: residual,
    layers.AdaptiveAvgPool2d: adaptive_avg_pool2d,
    layers.AvgPool2d: avg_pool2d,
    layers.BatchNorm1d: batch_norm,
    layers.BatchNorm2d: batch_norm,
    layers.Conv2d: conv2d,
    layers.ConvTranspose2d: conv_transpose2d,
    layers.Dropout: nothing,
    layers.Dropout2d: nothing,
    layers.ELU: _plain("Elu", "alpha"),
    layers.Flatten: flatten,
    layers.GELU: gelu,
    layers.GaussianRBF: gaussian_rbf,
    layers.GroupNorm: group_norm,
    layers.Hardtanh: hardtanh,
    layers.LayerNorm: layer_norm,
    layers.LeakyReLU: _plain("LeakyRelu", "negative_slope"),
    layers.Linear: linear,
    layers.LogSoftmax: _plain("LogSoftmax", axis=1),
    layers.MaxPool2d: max_pool2d,
    layers.ReLU6: relu6,
    layers.ReLU: _plain("Relu"),
    layers.ScaledTanh: scaled_tanh,
    layers.SiLU: silu,
    layers.Sigmoid: _plain("Sigmoid"),
    layers.Softmax: _plain("Softmax", axis=1),
    layers.Softplus: softplus,
    layers.Tanh: _plain("Tanh"),
    layers.Unflatten: unflatten,
    layers.Upsample: upsample,
    layers.ZeroPad2d: zero_pad2d,
    lecun98.EuclideanRBF: euclidean_rbf,
    lecun98.MappedConv2d: mapped_conv2d,
    lecun98.Subsample: subsample,
}
