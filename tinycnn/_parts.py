"""Parts of a model: slices, which share its weights, and models with a replaced layer."""

import copy
from typing import TYPE_CHECKING, Any

from tinycnn import _check
from tinycnn._typing import Rng
from tinycnn.containers import check_unbound
from tinycnn.layers import Layer

if TYPE_CHECKING:
    from tinycnn.model import Sequential


def take_slice(model: "Sequential", part: slice) -> "Sequential":
    """A model of the layers `part`, which shares layers, weights, gradients and lock with `model`."""
    start, stop, step = part.indices(len(model.layers))
    if step != 1 or start >= stop:
        raise ValueError(f"a slice of a model must be of one or more neighbouring layers, got {part}")
    with model.lock:
        view = type(model).__new__(type(model))
        shared = ("dtype", "device", "ops", "changes", "lock", "_run")
        vars(view).update({name: getattr(model, name) for name in shared})
        view.set_layers(model.layers[start:stop], model.shapes[start] if model.shapes else None)
        vars(view)["_training"] = model.training
        has_output, has_input = stop == len(model.layers), start == 0
        view.normalization = model.normalization if has_input else None
        view.output_kind = model.output_kind if has_output else None
        view.class_names = model.class_names if has_output else None
        names = {id(layer): name for name, layer in view.named_layers()}
        table = [parameter for parameter in model.parameter_table if id(parameter.layer) in names]
        first, last = (table[0].start, table[-1].stop) if table else (0, 0)
        view._theta, view._grad = model.theta[first:last], model.grad[first:last]
        view.parameter_table = [
            p._replace(name=f"{names[id(p.layer)]}.{p.attribute}", start=p.start - first, stop=p.stop - first)
            for p in table
        ]
    return view


def replace(model: "Sequential", index: int, layers: tuple[Layer, ...], rng: Rng) -> "Sequential":
    """`Sequential.replace`."""
    from tinycnn.model import Sequential

    position = range(len(model.layers))[_check.position("index", index, len(model.layers))]
    check_unbound(layers)
    with model.lock:
        chain = copy.deepcopy(list(model.layers))
    chain[position : position + 1] = layers
    options: dict[str, Any] = {"dtype": model.dtype, "device": model.device}
    new = Sequential(*chain, input_shape=model.input_shape, rng=rng, **options)
    new.normalization = model.normalization
    return new
