"""A model as its web page has it: JSON for the layers, float32 for the arrays."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from tinycnn._tracked import is_builtin
from tinycnn._typing import Array, Shape
from tinycnn.containers import Residual
from tinycnn.layers import BatchNorm2d, Layer
from tinycnn.model import Sequential

ARRAYS = ("weight", "bias", "running_mean", "running_var")


def describe(model: Sequential) -> tuple[list[dict[str, Any]], dict[str, Array]]:
    """The layers of a chain for `buildLayers` of layers.js, and their arrays by name in the state_dict, float32.

    A layer is a dictionary of its type, the arguments of its constructor, output_shape, and the names of its arrays;
    a bias that it does not have is None.  Padding is a pair (top, left), also if the argument was "same".

    Raises ValueError if the input shape is not known, TypeError for a layer that is not this library's, or that needs
    a batch.
    """
    with model.lock:
        if model.input_shape is None:
            raise ValueError("input_shape is not known yet: give it to Sequential, or call forward first")
        arrays: dict[str, Array] = {}
        state = model.state_dict()
        return _chain(model.layers, model.input_shape, "", state, arrays), arrays


def _chain(
    layers: Sequence[Layer], shape: Shape, prefix: str, state: dict[str, Array], arrays: dict[str, Array]
) -> list[dict[str, Any]]:
    """Descriptions of layers one after the other, for an input of `shape`; adds to `arrays`."""
    descriptions = []
    for number, layer in enumerate(layers):
        name = f"{prefix}{number}"
        if not is_builtin(layer):
            raise TypeError(
                f"layer {name}, {layer!r}, cannot be computed by a web page: it must be a layer of tinycnn, unchanged, "
                f"got {type(layer).__module__}.{type(layer).__qualname__}"
            )
        output_shape = tuple(layer.output_shape(shape))
        if isinstance(layer, BatchNorm2d) and not layer.track_running_stats and math.prod(shape[1:]) == 1:
            raise TypeError(f"layer {name}, {layer!r}, cannot be computed by a web page: it needs a batch of images")
        description = {"type": type(layer).__name__, **_settings(layer), "output_shape": output_shape}
        for array in ARRAYS:
            key = f"{name}.{array}"
            if key in state:
                description[array], arrays[key] = key, np.ascontiguousarray(state[key], np.float32)
        if isinstance(layer, Residual):
            for part in ("layers", "projection"):
                description[part] = _chain(getattr(layer, part), shape, f"{name}.{part}.", state, arrays)
        descriptions.append(description)
        shape = output_shape
    return descriptions


def _settings(layer: Layer) -> dict[str, Any]:
    settings = layer.config()
    if "bias" in settings:
        settings["bias"] = None  # replaced by the array's name, if there is one
    if "padding" in settings:
        settings["padding"] = layer.padding  # type: ignore[attr-defined]  # not "same"
    if "connections" in settings:
        settings["connections"] = settings["connections"].astype(int).tolist()
    settings.pop("centres", None)  # the array "weight"
    return settings
