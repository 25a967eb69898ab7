"""An ONNX file as nodes and constants, read within limits.

Sizes are compared with the bytes in the file before anything of that size is allocated.  `Budget` bounds the arrays
that are computed from constants.
"""

import json
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tinycnn import _check, _files
from tinycnn._typing import Array, Shape
from tinycnn.errors import DamagedFileError, OnnxError

MAX_BYTES = 1 << 30  # of a file, and of its external data
MAX_NUMBERS = 1 << 28  # of one image in any place of the net
BATCH = -(1 << 40)  # the batch size, which is not known, in shapes; 3 * BATCH is three times the batch size
DOMAINS = ("", "ai.onnx")
FLOATS = ("FLOAT", "DOUBLE", "FLOAT16", "BFLOAT16")
INTEGERS = ("UINT8", "UINT16", "UINT32", "UINT64", "INT8", "INT16", "INT32", "INT64", "BOOL")
BYTES = dict(zip(FLOATS + INTEGERS, (4, 8, 2, 2, 1, 2, 4, 8, 1, 2, 4, 8, 1), strict=True))


def import_onnx() -> Any:
    """The module onnx."""
    try:
        import onnx
        import onnx.numpy_helper
    except ImportError:
        raise ImportError('tinycnn.onnx needs onnx: pip install "tinycnn[onnx]"') from None
    return onnx


class Budget:
    """Bytes that may still be allocated for arrays that are computed."""

    def __init__(self, size: int) -> None:
        self.left = size

    def take(self, size: int) -> None:
        """ValueError if that is more than there is left."""
        self.left -= size
        if self.left < 0:
            raise ValueError("it needs more memory than a file of this size may")


class Node:
    """A node, with the types of its attributes checked when they are read.

    inputs   names; "" for an optional input that is not given
    name     the node's, or that of its output if it has none
    """

    def __init__(self, proto: Any, number: int) -> None:
        self.op, self.domain = proto.op_type, proto.domain
        self.inputs, self.outputs = list(proto.input), list(proto.output)
        self.name = _check.short_repr(proto.name or next(iter(proto.output), f"number {number}"), 80)
        self._attributes = {attribute.name: attribute for attribute in proto.attribute}

    def _get(self, name: str, kind: str) -> Any:
        attribute = self._attributes.get(name)
        if attribute is None:
            return None
        came = type(attribute).AttributeType.Name(attribute.type)
        if came != kind:
            raise ValueError(f"attribute {name} must be {kind}, got {came}")
        return attribute

    def integer(self, name: str, default: int) -> int:
        found = self._get(name, "INT")
        return default if found is None else int(found.i)

    def number(self, name: str, default: float) -> float:
        found = self._get(name, "FLOAT")
        return (
            default if found is None else _check.number(name, float(str(np.float32(found.f))))
        )  # 1e-5, not 9.99...e-6

    def text(self, name: str, default: str) -> str:
        found = self._get(name, "STRING")
        return default if found is None else found.s.decode("utf-8", "replace")

    def integers(self, name: str, default: Sequence[int] | None = None) -> list[int] | None:
        found = self._get(name, "INTS")
        return (None if default is None else list(default)) if found is None else [int(i) for i in found.ints]

    def numbers(self, name: str) -> list[float] | None:
        found = self._get(name, "FLOATS")
        return None if found is None else [float(f) for f in found.floats]

    def tensor(self, name: str) -> Any:
        found = self._get(name, "TENSOR")
        return None if found is None else found.t

    def has(self, name: str) -> bool:
        return name in self._attributes

    def axes(self, inputs: Sequence[Any], opset: int, since: int, rank: int) -> list[int] | None:
        """Axes, not negative, from the attribute, or from the second input in opsets >= since.  None: not given"""
        axes = self.integers("axes")
        if axes is None and opset >= since and len(inputs) > 1 and inputs[1] is not None:
            axes = [int(axis) for axis in constant("axes", inputs[1]).reshape(-1)]
        if axes is None:
            return None
        return [axis_of(axis, rank) for axis in axes]


def axis_of(axis: int, rank: int) -> int:
    """An axis that may be negative, of an array with `rank` axes."""
    if not -rank <= axis < rank:
        raise ValueError(f"axis {axis} is none of {rank} axes")
    return axis % rank


def constant(name: str, value: Any) -> Array:
    """`value` if it is a constant array."""
    if value is None:
        raise ValueError(f"{name} is missing")
    if not isinstance(value, np.ndarray):
        raise ValueError(f"{name} must be a constant, but it depends on the graph's input")
    return value


class Graph:
    """What of a file is needed for its output.

    source           the file's name, for messages
    nodes            in the order of the file
    constants        initializers by name
    inputs, outputs  names; initializers are no inputs
    """

    def __init__(self, source: Any) -> None:
        self.onnx = import_onnx()
        self.source = "the ONNX model"
        self.folder: Path | None = None
        self.external_bytes = 0
        proto, size = self._read(source)
        self.metadata = {entry.key: entry.value for entry in proto.metadata_props}
        self.opset = self._opset(proto)
        if proto.functions:
            first = proto.functions[0]
            raise self.error(f"it defines functions ({first.domain}.{first.name}); inline them first: onnx.inliner")
        graph = proto.graph
        if graph.sparse_initializer:
            raise self.error("sparse initializers are not known")
        self.nodes = [Node(node, number) for number, node in enumerate(graph.node)]
        self.outputs = [entry.name for entry in graph.output]
        self._prune()
        needed = {name for node in self.nodes for name in node.inputs} | {*self.outputs}
        self.constants: dict[str, Array] = {}
        for tensor in graph.initializer:
            if tensor.name in needed:
                self.constants[tensor.name] = self.array(tensor, f"initializer {_check.short_repr(tensor.name, 80)}")
        self.budget = Budget(16 * (size + self.external_bytes) + (1 << 26))
        initializers = {tensor.name for tensor in graph.initializer}
        self._declared = [entry for entry in graph.input if entry.name not in initializers]
        self.inputs = [entry.name for entry in self._declared]

    def error(self, reason: str) -> OnnxError:
        """An `OnnxError` that names the file."""
        return OnnxError(f"{self.source}: {_check.one_line(ValueError(reason), 1500)}")

    def _read(self, source: Any) -> tuple[Any, int]:
        """(ModelProto, bytes)"""
        if isinstance(source, self.onnx.ModelProto):
            return source, source.ByteSize()
        if isinstance(source, (bytes, bytearray, memoryview)):
            content = bytes(source)
            if len(content) > MAX_BYTES:
                raise self.error(f"expected at most {MAX_BYTES:,} bytes, got {len(content):,}")
        else:
            _check.instance("source", source, (str, os.PathLike), "a path, bytes or a ModelProto")
            path = Path(source)
            self.source, self.folder = str(path), path.absolute().parent
            try:
                content = _files.read_bytes(path, MAX_BYTES)
            except DamagedFileError as error:
                raise OnnxError(_check.one_line(error)) from None
        proto = self.onnx.ModelProto()
        try:
            proto.ParseFromString(content)
        except Exception:  # protobuf's, by implementation
            raise self.error("it is no ONNX file, or truncated") from None
        if not proto.ir_version or not proto.HasField("graph"):
            raise self.error("it is no ONNX file, or truncated: it has no version or no graph")
        return proto, len(content)

    def _opset(self, proto: Any) -> int:
        newest = self.onnx.defs.onnx_opset_version()
        versions = [entry.version for entry in proto.opset_import if entry.domain in DOMAINS]
        if not versions:
            raise self.error("it does not say which version of ONNX's operators (opset) it uses")
        if not 1 <= versions[0] <= newest:
            raise self.error(f"expected an opset in 1 ... {newest} (that of the installed onnx), got {versions[0]}")
        return int(versions[0])

    def _prune(self) -> None:
        """Drop the nodes that the output does not need."""
        producers: dict[str, Node] = {}
        for node in self.nodes:
            for name in filter(None, node.outputs):
                if name in producers:
                    raise self.error(f"two nodes have an output {_check.short_repr(name, 80)}")
                producers[name] = node
        needed: set[int] = set()
        names = list(self.outputs)
        while names:
            producer = producers.get(names.pop())
            if producer is not None and id(producer) not in needed:
                needed.add(id(producer))
                names += producer.inputs
        self.nodes = [node for node in self.nodes if id(node) in needed]

    def only(self) -> tuple[str, str, list[int | None], str]:
        """Of a graph with one input and one output: (the input's name, its type, its sizes with None for those that are
        not known, the output's name)."""
        for what, names in (("output", self.outputs), ("input that is no initializer", self.inputs)):
            if len(names) != 1:
                raise self.error(f"expected one {what}, got {len(names)}: {_check.short_repr(names[:5])}")
        entry = self._declared[0]
        name = _check.short_repr(entry.name, 80)
        if entry.type.WhichOneof("value") != "tensor_type":
            raise self.error(f"input {name} must be a tensor")
        tensor = entry.type.tensor_type
        kind = self.type_name(tensor.elem_type, f"input {name}")
        if not tensor.HasField("shape") or len(tensor.shape.dim) < 2:
            raise self.error(f"input {name} must have a batch axis and the axes of an image")
        sizes: list[int | None] = []
        for dim in tensor.shape.dim:
            size = dim.dim_value if dim.HasField("dim_value") else None
            if not sizes and size in (0, -1):  # what some write for any batch
                size = None
            if size is not None and size < 1:
                raise self.error(f"input {name} must have positive sizes, got {size}")
            sizes.append(size)
        if math.prod(size or 1 for size in sizes[1:]) > MAX_NUMBERS:
            raise self.error(f"input {name} must have at most {MAX_NUMBERS:,} numbers an image, got sizes {sizes[1:]}")
        return entry.name, kind, sizes, self.outputs[0]

    def type_name(self, code: int, what: str) -> str:
        """The name of a tensor's type, if it is one of real numbers."""
        types = self.onnx.TensorProto.DataType
        name = str(types.Name(code)) if code in types.values() else str(code)
        if name not in FLOATS + INTEGERS:
            raise self.error(f"{what} must be a tensor of real numbers, got type {name}")
        return name

    def array(self, tensor: Any, what: str) -> Array:
        """The array of a TensorProto.  OnnxError unless it has as many bytes as its shape says."""
        kind = self.type_name(tensor.data_type, what)
        shape = [int(size) for size in tensor.dims]
        if any(size < 0 for size in shape) or math.prod(shape) > MAX_BYTES:
            raise self.error(f"{what} must have sizes that are possible, got {_check.short_repr(shape)}")
        count = math.prod(shape)
        size = count * BYTES[kind]
        if tensor.data_location == self.onnx.TensorProto.EXTERNAL:
            data = self.external(tensor, what, size)
            tensor = self.onnx.TensorProto(data_type=tensor.data_type, dims=shape, raw_data=data)
        elif tensor.HasField("raw_data") and len(tensor.raw_data) != size:
            raise self.error(f"{what} of shape {shape} must have {size:,} bytes, got {len(tensor.raw_data):,}")
        try:
            values: Array = self.onnx.numpy_helper.to_array(tensor)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise self.error(f"{what} of shape {shape}: {error}") from None
        if values.shape != tuple(shape):
            raise self.error(f"{what} must have shape {shape}, got {values.shape}")
        return values if kind in ("FLOAT", "DOUBLE") else values.astype(np.float32 if kind in FLOATS else np.int64)

    def external(self, tensor: Any, what: str, size: int) -> bytes:
        """The bytes of a tensor in another file of the folder."""
        entries = {entry.key: entry.value for entry in tensor.external_data}
        location = entries.get("location", "")
        shown = _check.short_repr(location, 80)
        if self.folder is None:
            raise self.error(f"{what} is in another file, {shown}: load the model by its path")
        folder = Path(os.path.realpath(self.folder))
        parts = location.replace("\\", "/").split("/")
        path = folder if "\0" in location else Path(os.path.realpath(folder / location))
        outside = not path.is_relative_to(folder) or path == folder
        if not location or location.startswith(("/", "\\")) or ".." in parts or ":" in location or outside:
            raise self.error(f"{what} must have its data inside the file's folder, got location {shown}")
        try:
            offset, length = int(entries.get("offset") or 0), int(entries.get("length") or size)
        except ValueError:
            raise self.error(f"{what} must have an offset and a length in whole numbers") from None
        if offset < 0 or length != size:
            raise self.error(f"{what} must have {size:,} bytes at an offset >= 0, got {length:,} bytes at {offset:,}")
        self.external_bytes += size
        if self.external_bytes > MAX_BYTES:
            raise self.error(f"expected at most {MAX_BYTES:,} bytes of external data")
        try:
            with _files.open_regular(path, MAX_BYTES) as file:
                file.seek(offset)
                data = file.read(size)
        except (OSError, DamagedFileError) as error:
            raise self.error(f"{what}: {error}") from None
        if len(data) != size:
            raise self.error(f"{what} needs {size:,} bytes at {offset:,} of {shown}, which ends before that")
        return data


def metadata_json(text: str) -> Any:
    """A JSON value of the metadata; ValueError."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


# --- constants --------------------------------------------------------------------------------------------------------


def _exact(function: Callable[..., Any]) -> Callable[..., Array]:
    """Arithmetic of two arrays; integers without overflow, because `BATCH` is large."""

    def compute(a: Array, b: Array) -> Array:
        result: Array
        if a.dtype.kind == b.dtype.kind == "f":
            return np.asarray(function(a, b))
        if "f" in (a.dtype.kind, b.dtype.kind):
            return np.asarray(function(a.astype(np.float64), b.astype(np.float64)))
        if a.size + b.size > 4096 and max(np.abs(a).max(initial=0), np.abs(b).max(initial=0)) < 2**31:
            return np.asarray(function(a, b))
        exact = np.asarray(function(a.astype(object), b.astype(object)), object)
        if any(abs(int(v)) >= 2**62 for v in exact.reshape(-1)):
            raise ValueError("integers too large")
        result = np.asarray(exact, np.int64)
        return result

    return compute


def _divide(a: Any, b: Any) -> Any:
    if a.dtype != object:
        return a / b if a.dtype.kind == "f" else a // b
    if any(int(v) == 0 for v in b.reshape(-1)):
        raise ValueError("division by zero")
    return np.asarray(np.abs(a) // np.abs(b) * np.sign(a * b), object)  # ONNX truncates


ARITHMETIC: dict[str, Callable[[Array, Array], Array]] = {
    "Add": _exact(np.add),
    "Sub": _exact(np.subtract),
    "Mul": _exact(np.multiply),
    "Div": _exact(_divide),
    "Max": _exact(np.maximum),
    "Min": _exact(np.minimum),
    "Pow": lambda a, b: np.power(a, b, dtype=np.result_type(a, np.float32)),
    "Equal": lambda a, b: (a == b).astype(np.int64),
}
FUNCTIONS: dict[str, Callable[[Any], Array]] = {
    "Neg": np.negative,
    "Abs": np.abs,
    "Sqrt": np.sqrt,
    "Exp": np.exp,
    "Reciprocal": lambda a: 1 / np.asarray(a, np.float64),
    "Floor": np.floor,
    "Ceil": np.ceil,
}
FOLDED = (
    *ARITHMETIC, *FUNCTIONS, "Cast", "Concat", "Constant", "ConstantOfShape", "Expand", "Flatten", "Gather", "Identity",
    "Range", "ReduceProd", "Reshape", "Slice", "Squeeze", "Transpose", "Unsqueeze", "Where",
)  # fmt: skip


def fold(graph: Graph, node: Node, inputs: Sequence[Array | None]) -> Array:
    """The output of a node whose inputs are constants."""
    with np.errstate(all="ignore"):
        result = np.asarray(_fold(graph, node, inputs))
    if result.base is None or any(stride == 0 for stride in result.strides):
        graph.budget.take(result.nbytes)
    return result


def _fold(graph: Graph, node: Node, inputs: Sequence[Array | None]) -> Array:
    op, opset = node.op, graph.opset
    if op == "Constant":
        return constant_value(graph, node)
    given = [value for value in inputs if value is not None]
    if not given:
        raise ValueError("it has no input")
    first, rest = given[0], given[1:]
    if op in ("Max", "Min"):
        for other in rest:
            _budget_broadcast(graph, first, other)
            first = ARITHMETIC[op](first, other)
        return first
    if op in ARITHMETIC:
        (second,) = rest
        _budget_broadcast(graph, first, second)
        return np.asarray(ARITHMETIC[op](first, second))
    if op in FUNCTIONS:
        return np.asarray(FUNCTIONS[op](first))
    if op == "Identity":
        return first
    if op == "Cast":
        kind = graph.type_name(node.integer("to", 0), "its result")
        if kind == "BOOL":
            return np.asarray(first != 0, np.int64)
        dtype = {"DOUBLE": np.float64, "FLOAT16": np.float16}.get(kind, np.float32) if kind in FLOATS else np.int64
        if first.dtype.kind == "f" and dtype == np.int64:
            first = np.trunc(first)
        converted: Array = first.astype(dtype, copy=False)
        return np.asarray(converted, np.float32) if kind == "FLOAT16" else converted
    if op == "Concat":
        graph.budget.take(sum(value.nbytes for value in given))
        return np.concatenate(given, axis_of(node.integer("axis", 1), first.ndim))
    if op == "Gather":
        indices, axis = rest[0].astype(np.int64), axis_of(node.integer("axis", 0), first.ndim)
        graph.budget.take(first.nbytes // max(1, first.shape[axis]) * max(1, indices.size))
        if indices.size and not (-first.shape[axis] <= indices.min() and indices.max() < first.shape[axis]):
            raise ValueError(f"an index is none of {first.shape[axis]}")
        return np.take(first, indices, axis)
    if op == "Slice":
        return _slice(node, first, rest, opset)
    if op in ("Unsqueeze", "Squeeze"):
        shape = moved_axes(node, inputs, opset, first.shape)
        return first.reshape(shape)
    if op == "Reshape":
        target = node.integers("shape") if opset < 5 else [int(v) for v in rest[0].reshape(-1)]
        keep = not node.integer("allowzero", 0)
        return first.reshape([first.shape[n] if v == 0 and keep else v for n, v in enumerate(target or [])])
    if op == "Flatten":
        axis = node.integer("axis", 1)
        axis = axis if axis == first.ndim else axis_of(axis, first.ndim)
        return first.reshape(math.prod(first.shape[:axis]), -1)
    if op == "Transpose":
        return np.transpose(first, node.integers("perm", range(first.ndim)[::-1]))
    if op == "ReduceProd":
        axes, kept = node.axes(inputs, opset, 18, first.ndim), bool(node.integer("keepdims", 1))
        product: Array = np.asarray(np.prod(first, axis=None if axes is None else tuple(axes), keepdims=kept))
        return product
    if op == "Where":
        for other in rest:
            _budget_broadcast(graph, first, other)
        chosen: Array = np.where(first != 0, rest[0], rest[1])
        return chosen
    return _filled(graph, node, first, rest)


def constant_value(graph: Graph, node: Node) -> Array:
    """The value of a Constant."""
    if node.has("value"):
        return graph.array(node.tensor("value"), f"the value of node {node.name}")
    if node.has("value_float"):
        return np.array(node.number("value_float", 0.0), np.float32)
    if node.has("value_floats"):
        return np.array(node.numbers("value_floats"), np.float32)
    if node.has("value_int"):
        return np.array(node.integer("value_int", 0))
    if node.has("value_ints"):
        return np.array(node.integers("value_ints"), np.int64)
    raise ValueError("its value must be a tensor, or numbers")


def _budget_broadcast(graph: Graph, a: Array, b: Array) -> None:
    graph.budget.take(8 * math.prod(np.broadcast_shapes(a.shape, b.shape)))


def _filled(graph: Graph, node: Node, first: Array, rest: Sequence[Array]) -> Array:
    """ConstantOfShape, Expand and Range: outputs that are larger than their inputs."""
    if node.op == "Range":
        start, limit, step = first.item(), rest[0].item(), rest[1].item()
        if step == 0 or not all(map(math.isfinite, (start, limit, step))):
            raise ValueError("it needs numbers, and a step that is not 0")
        graph.budget.take(8 * max(0, math.ceil((limit - start) / step)))
        return np.arange(start, limit, step)
    sizes = [int(v) for v in (first if node.op == "ConstantOfShape" else rest[0]).reshape(-1)]
    if any(size < 0 for size in sizes):
        raise ValueError(f"it needs sizes that are known and not negative, got {_check.short_repr(sizes)}")
    graph.budget.take(8 * math.prod(sizes))
    if node.op == "Expand":
        shape = np.broadcast_shapes(first.shape, tuple(sizes))
        graph.budget.take(8 * math.prod(shape))
        return np.broadcast_to(first, shape)
    value = graph.array(node.tensor("value"), "its value") if node.has("value") else np.zeros(1, np.float32)
    return np.full(sizes, value.reshape(-1)[0])


def _slice(node: Node, x: Array, rest: Sequence[Array], opset: int) -> Array:
    if opset < 10:
        starts, ends, axes, steps = node.integers("starts"), node.integers("ends"), node.integers("axes"), None
    else:
        lists = [[int(v) for v in value.reshape(-1)] for value in rest]
        starts, ends, axes, steps = (*lists, None, None)[:4]
    axes = list(range(len(starts or []))) if axes is None else [axis_of(axis, x.ndim) for axis in axes]
    index = [slice(None)] * x.ndim
    for n, axis in enumerate(axes):
        step = steps[n] if steps else 1
        end: int | None = (ends or [])[n]
        if step < 0 and end is not None and end < -x.shape[axis]:
            end = None  # to the first element
        index[axis] = slice((starts or [])[n], end, step)
    return x[tuple(index)]


def moved_axes(node: Node, inputs: Sequence[Any], opset: int, shape: Shape) -> list[int]:
    """The shape after Unsqueeze or Squeeze of an array of `shape`."""
    if node.op == "Squeeze":
        axes = node.axes(inputs, opset, 13, len(shape))
        dropped = [n for n, size in enumerate(shape) if size == 1] if axes is None else axes
        if any(shape[axis] != 1 for axis in dropped):
            raise ValueError(f"axes {dropped} of shape {tuple(shape)} must have length 1")
        return [size for n, size in enumerate(shape) if n not in dropped]
    given = node.integers("axes") if opset < 13 else [int(v) for v in constant("axes", inputs[1]).reshape(-1)]
    rank = len(shape) + len(given or [])
    axes = [axis_of(axis, rank) for axis in given or []]
    if len(set(axes)) < len(axes):
        raise ValueError(f"axes must differ, got {given}")
    sizes = iter(shape)
    return [1 if n in axes else next(sizes) for n in range(rank)]
