"""Classes and probabilities from a model's outputs, as the loss that it was trained with defines them."""

from typing import TYPE_CHECKING, Any

from tinycnn._typing import Array
from tinycnn.layers import Softmax

if TYPE_CHECKING:
    from tinycnn.model import Sequential


def predict(model: "Sequential", x: Any, batch_size: int) -> Array:
    """`Sequential.predict`."""
    outputs, kind = model.outputs(x, batch_size), model.output_kind
    if kind == "values" or (kind is None and (outputs.ndim != 2 or outputs.shape[1] == 1)):
        return outputs
    if kind == "label_logits":
        applies: Array = outputs > 0
        return applies
    best: Array = outputs.argmin(axis=1) if kind == "distances" else outputs.argmax(axis=1)
    return best


def predict_proba(model: "Sequential", x: Any, batch_size: int) -> Array:
    """`Sequential.predict_proba`."""
    from tinycnn import functional  # loads the kernels

    outputs = model.outputs(x, batch_size)
    function = probability_function(model, outputs.ndim)
    if function is None:
        return outputs
    return functional.sigmoid(outputs) if function == "sigmoid" else functional.softmax(outputs, 1)


def probability_function(model: "Sequential", ndim: int) -> str | None:
    """The function, "softmax" or "sigmoid", of which the values for outputs of `ndim` axes are probabilities; None if
    the outputs are probabilities.  ValueError if they are neither."""
    kind = model.output_kind
    if kind not in (None, "logits", "log_probabilities", "label_logits") or ndim != 2:
        what = "no vectors" if ndim != 2 else kind
        raise ValueError(f"predict_proba needs a model of classes or labels; the outputs of this one are {what}")
    if kind is None and isinstance(model.layers[-1], Softmax):
        return None
    return "sigmoid" if kind == "label_logits" else "softmax"  # of log-probabilities, the probabilities
