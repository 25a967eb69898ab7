"""The parameters and buffers of a model: flat vectors, the layers' views into them, and the state_dict."""

import math
import os
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from tinycnn import _check, checkpoint, devices
from tinycnn._tracked import ChangeCounter
from tinycnn._typing import Backend, DeviceArray, DType, Shape, State, Views
from tinycnn.containers import NamedLayer
from tinycnn.dataset import Normalization
from tinycnn.layers import ConvTranspose2d, Layer

if TYPE_CHECKING:
    from tinycnn.model import Sequential

COUNTER = ".num_batches_tracked"  # (1,) on the device, without axes in torch's state_dict


class Parameter(NamedTuple):
    """A parameter of a layer, and its range [start, stop) in the flat vectors."""

    name: str  # in a state_dict
    layer: Layer
    attribute: str
    shape: Shape
    start: int
    stop: int

    @property
    def view(self) -> DeviceArray:
        return getattr(self.layer, self.attribute)


def allocate(
    layers: list[NamedLayer], rng: np.random.Generator, ops: Backend, dtype: DType, changes: ChangeCounter
) -> tuple[list[Parameter], DeviceArray, DeviceArray]:
    """Draw the parameters and bind the layers to them.  Returns (table of the parameters, theta, grad)."""
    states = [layer.initial_state(rng, dtype) for _, layer in layers]
    table: list[Parameter] = []
    values, start = [np.empty(0)], 0
    for (prefix, layer), (parameters, _) in zip(layers, states, strict=True):
        for name, shape in layer.parameter_shapes().items():
            if name not in parameters:
                problem = f"initial_parameters must return {name!r}, which parameter_shapes names"
                raise ValueError(f"layer {prefix}, {type(layer).__name__}: {problem}; got {sorted(parameters)}")
            stop = start + math.prod(shape)
            table.append(Parameter(f"{prefix}.{name}", layer, name, shape, start, stop))
            values.append(np.ravel(parameters[name]))
            start = stop
    theta, grad = ops.to_device(np.concatenate(values, dtype=dtype)), ops.empty(start, dtype)
    for (_, layer), (_, buffers) in zip(layers, states, strict=True):
        views, grad_views = (
            {p.attribute: vector[p.start : p.stop].reshape(p.shape) for p in table if p.layer is layer}
            for vector in (theta, grad)
        )
        own_names = {*vars(layer)} - {*views, *buffers}
        layer.bind(ops, views, grad_views, dtype)
        for name, value in buffers.items():
            ops.copy_to(getattr(layer, name), value)
        internal_names = {"saved", "_bound_names", "_bound_shapes", "_array_names", "_grad_views", "_copied"}
        vars(layer).update(
            changes=changes,
            training=True,
            _array_names=frozenset([*views, *(f"{name}_grad" for name in views), *buffers]),
            _grad_views={f"{name}_grad": view for name, view in grad_views.items()},
            _bound_shapes=layer.parameter_shapes(),
            _bound_names=frozenset({*vars(layer)} | internal_names) - own_names,
        )
        layer.route_gradients()
    return table, theta, grad


def saved_arrays(model: "Sequential") -> Views:
    """The arrays of a state_dict by name, on the device, layer by layer."""
    arrays = dict(model.named_parameters() + model.named_buffers())
    order = {name: position for position, (name, _) in enumerate(model.named_layers())}
    names = sorted((name for name in arrays if "._" not in name), key=lambda name: order[name.rpartition(".")[0]])
    return {name: arrays[name] for name in names}


def state_dict(model: "Sequential") -> State:
    """`Sequential.state_dict`."""
    state = {name: np.array(model.ops.to_host(view)) for name, view in saved_arrays(model).items()}
    state = {name: value.reshape(()) if name.endswith(COUNTER) else value for name, value in state.items()}
    return state if model.normalization is None else state | model.normalization.state_dict()


def load_state_dict(model: "Sequential", source: Any, strict: bool) -> tuple[list[str], list[str]]:
    """`Sequential.load_state_dict`."""
    is_file = isinstance(source, (str, os.PathLike))
    state, label = (checkpoint.load(source)[0], os.fspath(source)) if is_file else (source, "state")
    _check.mapping("state", state, "or the path of a file of them")
    arrays = saved_arrays(model)
    state = {
        name: _as_host(name, value, model.device) if name in arrays or str(name).startswith("normalization.") else value
        for name, value in state.items()
    }
    state, normalization = Normalization.split_state(state)
    missing, unexpected = [n for n in arrays if n not in state], [n for n in state if n not in arrays]
    if strict and (missing or unexpected):
        raise KeyError(f"{label} does not fit the model: missing keys {missing}, unexpected keys {unexpected}")
    values = {name: _check.cast(name, state[name], arrays[name].dtype) for name in arrays if name in state}
    values = {n: v.reshape(1) if n.endswith(COUNTER) and v.size == 1 else v for n, v in values.items()}
    layers = dict(model.named_layers())
    mismatches = [
        f"{name}: expected {arrays[name].shape}, got {value.shape}"
        + _layout(layers[name.rpartition(".")[0]], arrays[name].shape, value.shape)
        for name, value in values.items()
        if value.shape != arrays[name].shape
    ]
    if mismatches:
        raise ValueError(f"{label} does not fit the model: " + "; ".join(mismatches))
    for name, value in values.items():
        model.ops.copy_to(arrays[name], value)
    model.normalization = normalization or model.normalization
    return missing, unexpected


def _as_host(name: str, value: Any, device: str) -> Any:
    """An entry of a state_dict in host memory; torch's tensors may be on any device."""
    if callable(getattr(value, "element_size", None)) and callable(getattr(value, "cpu", None)):
        value = value.detach().cpu()
        value = value.float() if value.is_floating_point() and value.element_size() < 4 else value  # bfloat16
    return devices.as_host(name, value, device)[0]


def _layout(layer: Layer, expected: Shape, got: Shape) -> str:
    """What to say of a weight that has TensorFlow's layout."""
    found = ": this looks like TensorFlow's layout {}; transpose it with numpy.transpose(weight, {})"
    if len(got) == 4 and tuple(got[axis] for axis in (3, 2, 0, 1)) == expected:
        channels = "out, in" if isinstance(layer, ConvTranspose2d) else "in, out"
        return found.format(f"(height, width, {channels})", (3, 2, 0, 1))
    return found.format("(in, out)", (1, 0)) if len(got) == 2 and got[::-1] == expected else ""
