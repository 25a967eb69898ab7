"""Torch modules of the layers that torch does not have, and the two conversions of `tinycnn.torch`."""

import inspect
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from tinycnn import containers, layers, lecun98
from tinycnn._tracked import is_builtin
from tinycnn._typing import Shape
from tinycnn.layers import Layer
from tinycnn.model import Sequential

# --- modules ----------------------------------------------------------------------------------------------------------


class Residual(nn.Module):
    """`tinycnn.Residual`."""

    def __init__(self, layers: nn.Sequential, projection: nn.Sequential) -> None:
        super().__init__()
        self.layers, self.projection = layers, projection

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.layers(x) + self.projection(x)
        return y


class ScaledTanh(nn.Module):
    """`tinycnn.ScaledTanh`."""

    def __init__(self, A: float, S: float) -> None:
        super().__init__()
        self.A, self.S = A, S

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.A * torch.tanh(self.S * x)


class SameMaxPool2d(nn.MaxPool2d):
    """`tinycnn.MaxPool2d` with padding="same"."""

    def __init__(self, kernel_size: Any, stride: Any, padding: Any, dilation: Any, ceil_mode: bool) -> None:
        super().__init__(kernel_size, stride, 0, dilation, ceil_mode=ceil_mode)
        self.padding = padding
        sides = [(d * (k - 1) // 2, -(-d * (k - 1) // 2)) for k, d in zip(kernel_size, dilation, strict=True)]
        self.sides = (*sides[1], *sides[0])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.max_pool2d(F.pad(x, self.sides, value=-torch.inf), self.kernel_size, 1, 0, self.dilation)


def squared_distances(x: torch.Tensor, centres: torch.Tensor) -> torch.Tensor:
    return (x[:, None] - centres).square().sum(2)


class GaussianRBF(nn.Module):
    """`tinycnn.GaussianRBF`."""

    def __init__(self, in_features: int, out_features: int, scale: float) -> None:
        super().__init__()
        self.in_features, self.out_features, self.scale = in_features, out_features, scale
        self.weight = nn.Parameter(scale * torch.randn(out_features, in_features))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.exp(-0.5 * squared_distances(x, self.weight))


class EuclideanRBF(nn.Module):
    """`tinycnn.lecun98.EuclideanRBF`."""

    weight: torch.Tensor

    def __init__(self, centres: Any) -> None:
        super().__init__()
        self.register_buffer("weight", torch.from_numpy(np.array(centres)))

    @property
    def centres(self) -> Any:
        return self.weight.numpy(force=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return squared_distances(x, self.weight)


class Subsample(nn.Module):
    """`tinycnn.lecun98.Subsample`."""

    def __init__(self, channels: int, kernel_size: tuple[int, int], pool: str) -> None:
        super().__init__()
        self.channels, self.kernel_size, self.pool = channels, kernel_size, pool
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        pooled = F.avg_pool2d(x, self.kernel_size, divisor_override=1 if self.pool == "sum" else None)
        return self.weight[:, None, None] * pooled + self.bias[:, None, None]


class MappedConv2d(nn.Module):
    """`tinycnn.lecun98.MappedConv2d`."""

    def __init__(self, connections: Any, kernel_size: tuple[int, int]) -> None:
        super().__init__()
        self.connections, self.kernel_size = np.array(connections), kernel_size
        self.pairs = tuple(torch.from_numpy(index) for index in np.nonzero(self.connections.T))
        self.weight = nn.Parameter(torch.zeros(len(self.pairs[0]), *kernel_size))
        self.bias = nn.Parameter(torch.zeros(self.connections.shape[1]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        dense = self.weight.new_zeros(*self.connections.T.shape, *self.kernel_size)
        return F.conv2d(x, dense.index_put(self.pairs, self.weight), self.bias)


OWN: dict[type[Layer], type[nn.Module]] = {
    containers.Residual: Residual,
    layers.GaussianRBF: GaussianRBF,
    layers.ScaledTanh: ScaledTanh,
    lecun98.EuclideanRBF: EuclideanRBF,
    lecun98.MappedConv2d: MappedConv2d,
    lecun98.Subsample: Subsample,
}
TORCH = {  # the layers that torch has, under the same names
    layer: getattr(nn, name)
    for name, layer in vars(layers).items()
    if isinstance(layer, type) and issubclass(layer, Layer) and hasattr(nn, name)
}
MODULES = TORCH | OWN
LAYERS = {module: layer for layer, module in MODULES.items()} | {
    SameMaxPool2d: layers.MaxPool2d,
    nn.UpsamplingNearest2d: layers.Upsample,
}
OPTIONS = {"padding_mode": "zeros", "start_dim": 1, "end_dim": -1, "return_indices": False}  # those that tinycnn has


# --- tinycnn to torch -------------------------------------------------------------------------------------------------


def to_module(model: Sequential) -> nn.Sequential:
    """`tinycnn.torch.to_module`."""
    module = _sequence(model.layers, "").to(getattr(torch, model.dtype.name))
    state = {name: value for name, value in model.state_dict().items() if not name.startswith("normalization.")}
    module.load_state_dict({name: torch.from_numpy(value) for name, value in state.items()})
    for name, layer in model.leaves:
        module.get_submodule(name).requires_grad_(layer.requires_grad)
    return module.train(model.training)


def _sequence(chain: tuple[Layer, ...], prefix: str) -> nn.Sequential:
    return nn.Sequential(*(_module(layer, f"{prefix}{number}") for number, layer in enumerate(chain)))


def _module(layer: Layer, name: str) -> nn.Module:
    """One layer, with other weights."""
    kind = MODULES.get(type(layer)) if is_builtin(layer) else None
    if kind is None:
        raise TypeError(f"layer {name}, {layer!r}, must be a layer of tinycnn, unchanged, to become a torch module")
    if isinstance(layer, containers.Residual):
        names = ("layers", "projection")
        return Residual(*(_sequence(getattr(layer, part), f"{name}.{part}.") for part in names))
    options = layer.config()
    if isinstance(layer, layers.Upsample) and layer.scale_factor:
        options["scale_factor"] = tuple(map(float, layer.scale_factor))
    module: nn.Module = (SameMaxPool2d if options.get("padding") == "same" and kind is nn.MaxPool2d else kind)(
        **options
    )
    return module


# --- torch to tinycnn -------------------------------------------------------------------------------------------------

Part = tuple[Layer, dict[str, torch.Tensor]]  # a layer, and its state_dict


def from_module(module: nn.Module, input_shape: Shape | None) -> Sequential:
    """`tinycnn.torch.from_module`."""
    parts = _parts(module, "", {})
    if not parts:
        raise ValueError("module must have at least one module that becomes a layer")
    state = _joined(parts)
    double = any(value.dtype == torch.float64 for value in state.values())
    dtype = np.float64 if double else np.float32
    model = Sequential(*(layer for layer, _ in parts), input_shape=input_shape, dtype=dtype, rng=0)
    model.load_state_dict(state)
    return model.train(module.training)


def _joined(parts: list[Part], prefix: str = "") -> dict[str, torch.Tensor]:
    """The state_dict of a chain."""
    return {f"{prefix}{n}.{name}": value for n, (_, state) in enumerate(parts) for name, value in state.items()}


def _parts(module: nn.Module, name: str, seen: dict[nn.Module, str]) -> list[Part]:
    """The layers of a module.   seen: names of the modules with parameters so far"""
    if type(module) is nn.Sequential:
        prefix = f"{name}." if name else ""
        return [part for n, inner in enumerate(module) for part in _parts(inner, f"{prefix}{n}", seen)]
    return [] if type(module) is nn.Identity else [_part(module, name, seen)]


def _part(module: nn.Module, name: str, seen: dict[nn.Module, str]) -> Part:
    """The layer of a module, and its state_dict."""
    label = f"module {name}, {type(module).__name__}," if name else f"{type(module).__name__}"
    kind = LAYERS.get(type(module))
    if kind is None:
        known = ", ".join(sorted({module.__name__ for module in LAYERS} | {"Identity", "Sequential"}))
        raise TypeError(f"{label} has no equal in tinycnn; these have: {known}")
    if any(True for _ in module.parameters()) and seen.setdefault(module, name) != name:
        raise TypeError(f"{label} is also module {seen[module]}: layers of tinycnn do not share parameters")
    if isinstance(module, Residual):
        chains = {part: _parts(getattr(module, part), f"{name}.{part}", seen) for part in ("layers", "projection")}
        inner = {part: [layer for layer, _ in found] for part, found in chains.items()}
        states = [_joined(found, f"{part}.") for part, found in chains.items()]
        return containers.Residual(*inner["layers"], projection=inner["projection"]), states[0] | states[1]
    for option, value in OPTIONS.items():
        if getattr(module, option, value) != value:
            raise TypeError(f"{label} has {option}={getattr(module, option)!r}, tinycnn only {value!r}")
    arguments = {
        argument: module.bias is not None if argument == "bias" else getattr(module, argument)
        for argument in list(inspect.signature(kind.__init__).parameters)[1:]
        if hasattr(module, argument)
    }
    state = module.state_dict()
    try:
        layer = kind(**arguments)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{label} cannot be a layer of tinycnn: {error}") from None
    buffers = [buffer for buffer in layer.initial_buffers(np.dtype(np.float32)) if not buffer.startswith("_")]
    if {*layer.parameter_shapes(), *buffers} != state.keys():
        raise TypeError(
            f"{label} must have {[*layer.parameter_shapes(), *buffers]} in its state_dict, got {list(state)}"
        )
    parameters = list(module.parameters())
    layer.requires_grad = not parameters or any(parameter.requires_grad for parameter in parameters)
    return layer, state
