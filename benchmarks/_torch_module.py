"""A tinycnn model as a torch module: the same layers, arguments, state_dict keys and weights."""

from typing import Any

import torch
from torch import nn


class Residual(nn.Module):
    """tinycnn's `Residual`."""

    def __init__(self, layers: nn.Module, projection: nn.Module) -> None:
        super().__init__()
        self.layers, self.projection = layers, projection

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x) + self.projection(x)


def convert(layer: Any) -> nn.Module:
    """One layer, with torch's initial weights."""
    if type(layer).__name__ == "Residual":
        return Residual(*(nn.Sequential(*map(convert, layers)) for layers in (layer.layers, layer.projection)))
    return getattr(nn, type(layer).__name__)(**layer.config())


def as_module(model: Any) -> nn.Sequential:
    """The model, with its weights and buffers."""
    module = nn.Sequential(*map(convert, model.layers)).to(getattr(torch, model.dtype.name))
    module.load_state_dict({name: torch.from_numpy(value) for name, value in model.state_dict().items()})
    return module
