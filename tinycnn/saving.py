"""A model as a file: layers and their arguments as JSON, arrays as in a state_dict.

Nothing in a file is executed.  A layer is named by its class, which must be one of this library's, or one that the
reader gives.
"""

import os
from collections.abc import Mapping
from typing import Any

import numpy as np

from tinycnn import _check, checkpoint, layers as builtin_layers, lecun98
from tinycnn._tracked import is_in_package
from tinycnn._typing import Array
from tinycnn.containers import Residual, check_unbound, named_layers
from tinycnn.errors import DamagedCheckpointError, UnknownLayerError
from tinycnn.layers import Layer
from tinycnn.model import Sequential

FORMAT = "tinycnn model"
VERSION = 1
KINDS = (None, "logits", "log_probabilities", "scores", "distances", "label_logits", "values")


def save(model: Sequential, path: str | os.PathLike[str]) -> None:
    """`Sequential.save`."""
    with model.lock:
        metadata = {
            "format": FORMAT,
            "version": VERSION,
            "layers": [encode(layer) for layer in model.layers],
            "frozen": [name for name, layer in model.leaves if not layer.requires_grad],
            "input_shape": model.input_shape,
            "dtype": model.dtype.name,
            "output_kind": model.output_kind,
            "class_names": model.class_names,
        }
        checkpoint.save(path, model.state_dict(), metadata)


def load(
    path: str | os.PathLike[str], *, device: str = "cpu", custom_layers: Mapping[str, type[Layer]] | None = None
) -> Sequential:
    """The model that `Sequential.save` wrote to `path`, in evaluation mode.

    custom_layers  your own layer classes by name

    Raises DamagedCheckpointError for a file that is damaged or holds no model, UnknownLayerError for a layer whose
    class is not known.  Nothing in the file is executed.
    """
    custom = dict(_check.mapping("custom_layers", custom_layers or {}))
    arrays, metadata = checkpoint.load(path)
    if metadata.get("format") != FORMAT:
        names = _check.short_repr(list(arrays)[:6])
        raise DamagedCheckpointError(f"{path} holds no model, but {len(arrays)} arrays: {names}")
    if metadata.get("version") != VERSION:
        raise DamagedCheckpointError(
            f"{path}: expected version {VERSION}, got {_check.short_repr(metadata.get('version'))}"
        )
    try:
        chain = tuple(decode(layer, custom) for layer in metadata["layers"])
        check_unbound(chain)
        _check_sizes(chain, arrays)
        for prefix, layer in named_layers(chain):  # so that no other weights are allocated
            vars(layer).update({name: arrays[f"{prefix}.{name}"] for name in layer.parameter_shapes()})
        shape = metadata["input_shape"]
        options = {"input_shape": shape and tuple(shape), "dtype": metadata["dtype"], "device": device, "rng": 0}
        with np.errstate(over="raise"):  # a constant beyond the dtype
            model = Sequential(*chain, **options)
        model.load_state_dict(arrays)
        named = dict(model.leaves)
        for name in metadata["frozen"]:
            named[name].requires_grad = False
        model.output_kind = _check.choice("output_kind", metadata["output_kind"], KINDS)
        model.class_names = metadata["class_names"]
    except UnknownLayerError as error:
        raise UnknownLayerError(f"{path}: {_check.one_line(error)}") from None
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RecursionError) as error:
        raise DamagedCheckpointError(f"{path}: {_check.one_line(error)}") from error
    return model.eval()


def _check_sizes(chain: tuple[Layer, ...], arrays: Mapping[str, Array]) -> None:
    """ValueError unless the file has the parameters of the layers: a model must not allocate what the file does not
    have."""
    most = sum(array.size for array in arrays.values()) + 2**20
    for prefix, layer in named_layers(chain):
        for name, shape in layer.parameter_shapes().items():
            key = f"{prefix}.{name}"
            if key not in arrays or arrays[key].shape != shape:
                came = f"shape {arrays[key].shape}" if key in arrays else "no array"
                raise ValueError(f"state does not fit the model: {key} must have shape {shape}, got {came}")
        if getattr(layer, "channels", 0) > most:  # batch norm without parameters
            raise ValueError(f"{layer!r} has more channels than the file has numbers")


def encode(value: Any) -> Any:
    """A layer, or an argument of one, as JSON.  TypeError for what cannot be saved."""
    if isinstance(value, Layer):
        kind = type(value)
        scope = "" if is_in_package(kind.__module__) else "custom "
        return {"layer": scope + kind.__name__, **{name: encode(v) for name, v in value.config().items()}}
    if isinstance(value, (tuple, list)):
        return [encode(entry) for entry in value]
    if isinstance(value, np.ndarray):
        return {"array": value.tolist(), "dtype": value.dtype.name}
    if isinstance(value, np.generic):
        return value.item()
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(f"a layer's argument must be numbers, strings, arrays or layers to be saved, got {value!r}")


def decode(value: Any, custom: Mapping[str, type[Layer]]) -> Any:
    """Inverse of `encode`."""
    if isinstance(value, list):
        return tuple(decode(entry, custom) for entry in value)
    if not isinstance(value, dict):
        return value
    if "array" in value:
        return np.array(value["array"], np.dtype(_check.choice("dtype", value["dtype"], ARRAY_DTYPES)))
    arguments = {name: decode(v, custom) for name, v in value.items() if name != "layer"}
    scope, _, name = value["layer"].rpartition(" ")
    layer_class = custom.get(name) if scope else _builtin(name)
    if layer_class is None:
        advice = f"give its class: custom_layers={{{name!r}: {name}}}" if scope else "it is of a newer version"
        raise UnknownLayerError(f"the file has a layer {name}, which is not known; {advice}")
    if layer_class is Residual:
        return Residual(*arguments["layers"], projection=arguments["projection"])
    return layer_class(**arguments)


ARRAY_DTYPES = ("bool", "float32", "float64", "int64", "int32", "uint8", "int8")


def _builtin(name: str) -> type[Layer] | None:
    """The class of this library with the name, if it is a layer."""
    for module in (builtin_layers, lecun98):
        found = getattr(module, name, None)
        if isinstance(found, type) and issubclass(found, Layer) and not name.startswith("_"):
            return found
    return Residual if name == "Residual" else None
