"""ONNX's operators on arrays, by `tinycnn.functional`: a `Backend` for ONNX's own tests.

Unlike `load`, which makes layers of a whole graph, this runs node by node and takes any shape that a function takes.
`OPERATORS` has a function for each operator: (node, inputs, opset) -> outputs.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx
from onnx.backend.base import Backend as OnnxBackend, BackendRep

from tinycnn import functional as F
from tinycnn._typing import Array
from tinycnn.errors import OnnxError
from tinycnn.onnx import _windows
from tinycnn.onnx._graph import FOLDED, Graph, Node, axis_of, fold, moved_axes
from tinycnn.onnx._load import REFUSED
from tinycnn.onnx._serve import supports_device

Inputs = Sequence[Any]  # arrays, None for those that are not given
Outputs = Sequence[Any]


class Backend(OnnxBackend):
    """tinycnn's functions as a backend of ONNX.  Arrays are float32 or float64."""

    @classmethod
    def is_compatible(cls, model: Any, device: str = "CPU", **kwargs: Any) -> bool:
        """Whether all operators are known."""
        return supports_device(device) and all(node.op_type in {*OPERATORS, *FOLDED} for node in model.graph.node)

    @classmethod
    def prepare(cls, model: Any, device: str = "CPU", **kwargs: Any) -> "Rep":
        """A graph to run.  Raises OnnxError for an operator that is not known, and onnx's errors for an invalid one."""
        super().prepare(model, device, **kwargs)
        if not supports_device(device):
            raise OnnxError(f"device must be CPU, got {device!r}; tinycnn.onnx.load(..., device='cuda') runs on a GPU")
        return Rep(model)

    @classmethod
    def run_node(
        cls, node: Any, inputs: Any, device: str = "CPU", outputs_info: Any = None, **kwargs: Any
    ) -> tuple[Any, ...]:
        """The outputs of one node.   inputs: arrays in the order of the node's inputs"""
        super().run_node(node, inputs, device, outputs_info, **kwargs)
        opset = int(kwargs.get("opset_version", onnx.defs.onnx_opset_version()))
        return tuple(run(Node(node, 0), [None if v is None else np.asarray(v) for v in inputs], opset, None))

    @classmethod
    def supports_device(cls, device: str) -> bool:
        return supports_device(device)


class Rep(BackendRep):
    """A graph with its constants."""

    def __init__(self, model: Any) -> None:
        self.graph = Graph(model)
        for node in self.graph.nodes:
            if node.op not in OPERATORS and node.op not in FOLDED:
                raise unknown(node)

    def run(self, inputs: Any, **kwargs: Any) -> tuple[Any, ...]:
        """The outputs for arrays in the order of the graph's inputs, or a dictionary by name."""
        given = inputs if isinstance(inputs, dict) else dict(zip(self.graph.inputs, inputs, strict=False))
        values: dict[str, Any] = {"": None, **self.graph.constants, **given}
        for node in self.graph.nodes:
            found = run(node, [values[name] for name in node.inputs], self.graph.opset, self.graph)
            values.update(zip(node.outputs, found, strict=False))
        return tuple(values[name] for name in self.graph.outputs)


def unknown(node: Node) -> OnnxError:
    return OnnxError(
        f"node {node.name} ({node.op}): the operator is not known; known operators: "
        f"{', '.join(sorted({*OPERATORS, *FOLDED}))}"
    )


def run(node: Node, inputs: Inputs, opset: int, graph: Graph | None) -> Outputs:
    """The outputs of a node.  OnnxError names it and says why it cannot run."""
    try:
        if node.op in OPERATORS:
            check_types(node, inputs)
            return OPERATORS[node.op](node, inputs, opset)
        if graph is not None and node.op in FOLDED:
            return [fold(graph, node, inputs)]
    except OnnxError:
        raise
    except REFUSED as error:
        raise OnnxError(f"node {node.name} ({node.op}): {' '.join(str(error).split())}") from None
    raise unknown(node)


VIEWS = ("Flatten", "Reshape", "Squeeze", "Unsqueeze", "Transpose", "Identity")


def check_types(node: Node, inputs: Inputs) -> None:
    """ValueError unless the first input is float32 or float64; shapes may be of any type."""
    first = inputs[0] if inputs else None
    if node.op not in VIEWS and getattr(first, "dtype", None) not in (np.float32, np.float64):
        kind = getattr(first, "dtype", type(first).__name__)
        raise ValueError(f"tinycnn computes in float32 and float64, got {kind}")


def get(inputs: Inputs, index: int) -> Any:
    """An optional input."""
    return inputs[index] if len(inputs) > index else None


def maps(x: Array) -> Array:
    """`x` if it has 4 axes."""
    if x.ndim != 4:
        raise ValueError(f"tinycnn has 2-D layers only, got shape {x.shape}")
    return x


# --- convolution and pooling ------------------------------------------------------------------------------------------


def on_images(
    function: Callable[[Node, Array, Array, Any], Array],
) -> Callable[[Node, Inputs, int], Outputs]:
    """A convolution of 2-D images also for 1-D ones (N, C, L): they become images of height 1."""

    def convolve(node: Node, inputs: Inputs, opset: int) -> Outputs:
        x, weight, bias = inputs[0], inputs[1], get(inputs, 2)
        if x.ndim != 3:
            return [function(node, maps(x), maps(weight), bias)]
        return [function(LineNode(node), x[:, :, None], weight[:, :, None], bias)[:, :, 0]]

    return convolve


def conv(node: Node, x: Array, weight: Array, bias: Any) -> Array:
    w = _windows.window(node, x.shape[2:], (weight.shape[2], weight.shape[3]))
    border, padding = _windows.conv_padding(w)
    x = x if border is None else F.pad(x, border)
    return F.conv2d(x, weight, bias, w.stride, padding, w.dilation, node.integer("group", 1))


def conv_transpose(node: Node, x: Array, weight: Array, bias: Any) -> Array:
    w, extra = _windows.transposed(node, x.shape[2:], (weight.shape[2], weight.shape[3]))
    padding, extra, border = _windows.transposed_padding(w, extra)
    groups = node.integer("group", 1)
    y = F.conv_transpose2d(x, weight, bias, w.stride, padding, extra, groups, w.dilation)
    return y if border is None else F.pad(y, border)


def lifted(function: Callable[[Node, Array], Outputs]) -> Callable[[Node, Inputs, int], Outputs]:
    """A pooling of 2-D images also for 1-D ones (N, C, L): they become images of height 1."""

    def pool(node: Node, inputs: Inputs, opset: int) -> Outputs:
        x = inputs[0]
        if x.ndim != 3:
            return function(node, maps(x))
        return [y[:, :, 0] for y in function(LineNode(node), x[:, :, None])]

    return pool


class LineNode(Node):
    """A node on lines (N, C, L) as one on images of height 1."""

    def __init__(self, node: Node) -> None:
        vars(self).update(vars(node))

    def integers(self, name: str, default: Sequence[int] | None = None) -> list[int] | None:
        values = super().integers(name)
        if values is None:
            return None if default is None else list(default)
        zero = {"pads": [0, values[0], 0, *values[1:]], "output_padding": [0, *values]}
        return zero.get(name, [1, *values])


def max_pool(node: Node, x: Array) -> Outputs:
    w = _windows.window(node, x.shape[2:], _windows.kernel_shape(node))
    plan = _windows.pooling(w, x.shape[2:])
    if plan is None:
        raise ValueError(f"pads {w.pads} are more than half of the kernel {w.kernel}")
    y, indices = F.max_pool2d(x, w.kernel, w.stride, plan.padding, w.dilation, plan.ceil_mode, return_indices=True)
    y, indices = (crop(v, plan.crop) for v in (y, indices))
    height, width = x.shape[2:]
    if node.integer("storage_order", 0):
        indices = indices % width * height + indices // width
    images = np.arange(x.shape[0] * x.shape[1]).reshape(*x.shape[:2], 1, 1)  # ONNX counts from the batch's first pixel
    return [y, indices + images * height * width]


def crop(y: Any, sides: Any) -> Array:
    """Without windows that ONNX does not have."""
    if sides is None:
        return np.asarray(y)
    left, right, top, bottom = (-side for side in sides)
    return np.ascontiguousarray(y[:, :, top : y.shape[2] - bottom, left : y.shape[3] - right])


def average_pool(node: Node, x: Array) -> Outputs:
    w = _windows.window(node, x.shape[2:], _windows.kernel_shape(node))
    if w.dilation != (1, 1):
        raise ValueError(f"there is no average pooling with dilations, got {w.dilation}")
    include, ceil = bool(node.integer("count_include_pad", 0)), bool(node.integer("ceil_mode", 0))
    if include and any(w.pads):
        top, left = w.pads[:2]
        if not w.symmetric or top > w.kernel[0] // 2 or left > w.kernel[1] // 2:
            x, top, left = F.pad(x, w.border), 0, 0
        return [F.avg_pool2d(x, w.kernel, w.stride, (top, left), ceil)]
    plan = _windows.pooling(w, x.shape[2:])
    if plan is None:
        raise ValueError(f"pads {w.pads} are more than half of the kernel {w.kernel}")
    y = F.avg_pool2d(x, w.kernel, w.stride, plan.padding, plan.ceil_mode, count_include_pad=False)
    return [crop(y, plan.crop)]


def global_pool(node: Node, x: Array) -> Outputs:
    return [F.adaptive_avg_pool2d(x, 1) if node.op == "GlobalAveragePool" else F.max_pool2d(x, x.shape[2:])]


def resize(node: Node, inputs: Inputs, opset: int) -> Outputs:
    """Nearest neighbour; whole factors, or sizes, for which the pixels are those of `interpolate`."""
    x = maps(inputs[0])
    if node.text("mode", "nearest") != "nearest":
        raise ValueError(f"mode must be nearest, got {node.text('mode', 'nearest')}")
    if node.text("keep_aspect_ratio_policy", "stretch") != "stretch":
        raise ValueError("keep_aspect_ratio_policy must be stretch")
    old = node.op == "Upsample" or opset < 11
    scales, sizes = (get(inputs, 1), None) if old else (get(inputs, 2), get(inputs, 3))
    axes = [axis_of(axis, 4) for axis in node.integers("axes") or range(4)]
    full, factors = list(x.shape), [1.0] * 4
    for n, axis in enumerate(axes):
        if sizes is not None and sizes.size:
            full[axis] = int(sizes[n])
            factors[axis] = full[axis] / x.shape[axis]
        else:
            factors[axis] = float(scales[n])
            full[axis] = math.floor(x.shape[axis] * factors[axis])
    if tuple(full[:2]) != x.shape[:2]:
        raise ValueError("it must change height and width only")
    for axis in (2, 3):
        if _windows.nearest(node, x.shape[axis], full[axis], factors[axis], opset) != [
            i * x.shape[axis] // full[axis] for i in range(full[axis])
        ]:
            raise ValueError("its modes do not give pixel i*H // OH for pixel i, as interpolate does")
    return [F.interpolate(x, (full[2], full[3]))]


def pad(node: Node, inputs: Inputs, opset: int) -> Outputs:
    x, pads, fill = maps(inputs[0]), [int(v) for v in inputs[1]], get(inputs, 2)
    if node.text("mode", "constant") != "constant" or (fill is not None and fill.size and fill.item() != 0):
        raise ValueError("padding is with zeros only")
    axes = range(4) if get(inputs, 3) is None else [axis_of(int(v), 4) for v in inputs[3]]
    sides = dict.fromkeys(range(4), (0, 0)) | {a: (pads[n], pads[n + len(pads) // 2]) for n, a in enumerate(axes)}
    if any(sides[0] + sides[1]):
        raise ValueError("it must pad height and width only")
    return [F.pad(x, (*sides[3], *sides[2]))]


# --- activations ------------------------------------------------------------------------------------------------------


def clip(node: Node, inputs: Inputs, opset: int) -> Outputs:
    given = (
        [get(inputs, 1), get(inputs, 2)]
        if opset >= 11
        else [node.number("min", -math.inf), node.number("max", math.inf)]
    )
    low, high = (d if v is None else float(v) for v, d in zip(given, (-math.inf, math.inf), strict=True))
    if low >= high:
        raise ValueError(f"hardtanh needs a smaller minimum than maximum, got {low:g} and {high:g}")
    if (low, high) == (0, math.inf):
        return [F.relu(inputs[0])]
    largest = float(np.finfo(inputs[0].dtype).max)
    return [F.hardtanh(inputs[0], max(low, -largest), min(high, largest))]


def swish(node: Node, inputs: Inputs, opset: int) -> Outputs:
    if node.number("alpha", 1.0) != 1:
        raise ValueError("alpha must be 1")
    return [F.silu(inputs[0])]


def softmax(node: Node, inputs: Inputs, opset: int) -> Outputs:
    x, function = inputs[0], F.softmax if node.op == "Softmax" else F.log_softmax
    if opset >= 13:
        return [function(x, node.integer("axis", -1))]
    axis = axis_of(node.integer("axis", 1), x.ndim)
    return [function(x.reshape(math.prod(x.shape[:axis]), -1), 1).reshape(x.shape)]


# --- normalisation and dropout ----------------------------------------------------------------------------------------


def batch_norm(node: Node, inputs: Inputs, opset: int) -> Outputs:
    x, scale, bias, mean, var = inputs
    eps, momentum = node.number("epsilon", 1e-5), node.number("momentum", 0.9)
    if not node.integer("training_mode", 0):
        return [F.batch_norm(x, mean, var, scale, bias, eps=eps)]
    running = np.array(mean), np.array(var)
    y = F.batch_norm(x, *running, scale, bias, True, 1 - momentum, eps)
    count = x.size // x.shape[1]
    unbiased = (running[1] - momentum * var) * ((count - 1) / count)  # ONNX's running variance is biased, torch's not
    return [y, running[0], (momentum * var + unbiased).astype(var.dtype)]


def group_norm(node: Node, inputs: Inputs, opset: int) -> Outputs:
    x, weight, bias = inputs
    if node.op == "InstanceNormalization":
        groups = x.shape[1]
    else:
        groups = node.integer("num_groups", 0)
        if opset < 21:  # one number a group
            weight, bias = (np.repeat(v, x.shape[1] // groups) for v in (weight, bias))
    flat = x.reshape(*x.shape[:2], 1, -1)
    return [F.group_norm(flat, groups, weight, bias, node.number("epsilon", 1e-5)).reshape(x.shape)]


def layer_norm(node: Node, inputs: Inputs, opset: int) -> Outputs:
    x, weight, bias = inputs[0], inputs[1], get(inputs, 2)
    axis = axis_of(node.integer("axis", -1), x.ndim)
    arguments = x, x.shape[axis:], weight, bias, node.number("epsilon", 1e-5)
    y, _, _, statistics, _ = F._run_layer_norm(*arguments)
    shape = (*x.shape[:axis], *(1,) * (x.ndim - axis))
    return [y, *(v.reshape(shape) for v in statistics)]


def dropout(node: Node, inputs: Inputs, opset: int) -> Outputs:
    x, ratio, training = inputs[0], get(inputs, 1), get(inputs, 2)
    p = node.number("ratio", 0.5) if opset < 12 else 0.5 if ratio is None else float(ratio)
    if training is not None and bool(training) and p:
        raise ValueError("masks of training are random numbers of ONNX's own")
    mask = np.ones(x.shape, bool)
    return [F.dropout(x, mask, 0.0), mask]


# --- linear -----------------------------------------------------------------------------------------------------------


def gemm(node: Node, inputs: Inputs, opset: int) -> Outputs:
    a, b, c = inputs[0], inputs[1], get(inputs, 2)
    a, b = a.T if node.integer("transA", 0) else a, b if node.integer("transB", 0) else b.T
    weight, beta = (b * node.number("alpha", 1.0)).astype(a.dtype), node.number("beta", 1.0)
    if c is None:
        return [F.linear(a, weight)]
    c = (c * beta).astype(a.dtype)
    if c.ndim < 2 or c.shape[0] == 1:  # a bias
        return [F.linear(a, weight, np.broadcast_to(c.reshape(-1), len(weight)))]
    return [F.linear(a, weight) + c]


def matmul(node: Node, inputs: Inputs, opset: int) -> Outputs:
    """`linear` of each pair of matrices."""
    a, b = inputs
    left, right = a[None] if a.ndim == 1 else a, b[:, None] if b.ndim == 1 else b
    batch = np.broadcast_shapes(left.shape[:-2], right.shape[:-2])
    left, right = (np.broadcast_to(v, (*batch, *v.shape[-2:])) for v in (left, right))
    y = np.empty((*batch, left.shape[-2], right.shape[-1]), a.dtype)
    for index in np.ndindex(batch):
        y[index] = F.linear(left[index], right[index].T)
    y = y[..., 0] if b.ndim == 1 else y
    return [y[..., 0] if a.ndim == b.ndim == 1 and y.ndim else y[..., 0, :] if a.ndim == 1 else y]


# --- losses -----------------------------------------------------------------------------------------------------------


def loss(node: Node, inputs: Inputs, opset: int) -> Outputs:
    x, target, weight = inputs[0], inputs[1], get(inputs, 2)
    function: Any = F.nll_loss if node.op == "NegativeLogLikelihoodLoss" else F.cross_entropy
    value = function(x, target, weight, node.integer("ignore_index", -100), node.text("reduction", "mean"))
    found = [np.asarray(value, x.dtype)]
    return found if len(node.outputs) < 2 else [*found, F.log_softmax(x, 1)]


# --- shapes -----------------------------------------------------------------------------------------------------------


def view(node: Node, inputs: Inputs, opset: int) -> Outputs:
    x = inputs[0]
    if not isinstance(x, np.ndarray):
        raise ValueError("sequences and optional values are not known")
    if node.op == "Identity":
        return [x]
    if node.op == "Transpose":
        perm = node.integers("perm", range(x.ndim)[::-1])
        return [np.ascontiguousarray(x.transpose(perm))]
    if node.op == "Flatten":
        axis = node.integer("axis", 1)
        axis = axis if axis == x.ndim else axis_of(axis, x.ndim)
        return [x.reshape(math.prod(x.shape[:axis]), -1)]
    if node.op == "Reshape":
        target = (node.integers("shape") or []) if opset < 5 else [int(v) for v in inputs[1]]
        keep = not node.integer("allowzero", 0)
        return [x.reshape([x.shape[n] if v == 0 and keep else v for n, v in enumerate(target)])]
    return [x.reshape(moved_axes(node, inputs, opset, x.shape))]


def _elementwise(function: Any, **attributes: tuple[str, Any]) -> Callable[[Node, Inputs, int], Outputs]:
    """attributes: of the function, each with the node's and its default"""

    def activate(node: Node, inputs: Inputs, opset: int) -> Outputs:
        given = {
            name: node.text(of, default) if isinstance(default, str) else node.number(of, default)
            for name, (of, default) in attributes.items()
        }
        return [function(inputs[0], **given)]

    return activate


OPERATORS: dict[str, Callable[[Node, Inputs, int], Outputs]] = {
    "AveragePool": lifted(average_pool),
    "BatchNormalization": batch_norm,
    "Clip": clip,
    "Conv": on_images(conv),
    "ConvTranspose": on_images(conv_transpose),
    "Dropout": dropout,
    "Elu": _elementwise(F.elu, alpha=("alpha", 1.0)),
    "Flatten": view,
    "Gelu": _elementwise(F.gelu, approximate=("approximate", "none")),
    "Gemm": gemm,
    "GlobalAveragePool": lifted(global_pool),
    "GlobalMaxPool": lifted(global_pool),
    "GroupNormalization": group_norm,
    "Identity": view,
    "InstanceNormalization": group_norm,
    "LayerNormalization": layer_norm,
    "LeakyRelu": _elementwise(F.leaky_relu, negative_slope=("alpha", 0.01)),
    "LogSoftmax": softmax,
    "MatMul": matmul,
    "MaxPool": lifted(max_pool),
    "NegativeLogLikelihoodLoss": loss,
    "Pad": pad,
    "Relu": _elementwise(F.relu),
    "Reshape": view,
    "Resize": resize,
    "Sigmoid": _elementwise(F.sigmoid),
    "Softmax": softmax,
    "SoftmaxCrossEntropyLoss": loss,
    "Softplus": _elementwise(F.softplus),
    "Squeeze": view,
    "Swish": swish,
    "Tanh": _elementwise(F.tanh),
    "Transpose": view,
    "Unsqueeze": view,
    "Upsample": resize,
}
