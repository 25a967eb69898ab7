"""A network as the page has it: a dictionary for JSON, with the arrays in base64."""

import base64
import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from tinycnn import _check
from tinycnn._typing import Array, Shape
from tinycnn.demo._layers import describe
from tinycnn.model import Sequential
from tinycnn.runs import quantize

MAX_PARAMETERS = 2_000_000  # 8 MB of weights
MAX_MULTIPLY_ADDS = 100_000_000  # of a forward pass: about a third of a second in a browser


@dataclasses.dataclass
class Example:
    """A picture to click.

    pixels     (C, H, W) uint8, of the shape of the network's pictures
    label      its class number, and what the network says
    """

    pixels: Array
    label: int
    predicted: int


@dataclasses.dataclass
class Net:
    """A network for a page.

    model         in evaluation mode, with a known input shape; in the order of its outputs:
    class_names   of the classes; none if the outputs are no classes: the page then shows the layers only
    title, about  a name for a button, and a sentence
    mean, std     of the pixels, one for all or one a channel: the input is (pixel / 255 - mean) / std
    resize        width to which pictures are resized before that, or None
    picture       (C, H, W) of a picture before padding and resizing
    padding       width of a black border
    digits        whether a drawing is prepared as `digits.prepare` does
    temperature, reject_below
                  of the calibration (see `calibration`); reject_below None: no picture is refused
    epochs        of the training
    snapshots     epoch -> state_dict, for the slider over the training
    examples, mistakes
                  pictures to click
    history       columns of history.csv by name
    held_out      what val_loss and val_accuracy in it are of
    confusion     (K, K) counts of the test set, rows: true classes
    """

    model: Sequential
    class_names: Sequence[str]
    title: str = "network"
    about: str = ""
    mean: Array = dataclasses.field(default_factory=lambda: np.zeros(1))
    std: Array = dataclasses.field(default_factory=lambda: np.ones(1))
    resize: int | None = None
    picture: Shape = ()
    padding: int = 0
    digits: bool = False
    temperature: float = 1.0
    reject_below: float | None = None
    epochs: float = 0
    snapshots: Mapping[float, Mapping[str, Array]] = dataclasses.field(default_factory=dict)
    examples: Sequence[Example] = ()
    examples_title: str = "Or choose a picture"
    mistakes: Sequence[Example] = ()
    history: Mapping[str, Sequence[float]] | None = None
    held_out: str = "validation"
    confusion: Array | None = None

    def __post_init__(self) -> None:
        """ValueError for a network that is too large, TypeError for a layer that the page does not know."""
        _check.instance("model", self.model, Sequential, "a Sequential")
        model = self.model
        self.layers, self.arrays = describe(model)
        shape = model.input_shape
        assert shape is not None  # `describe` raises without one
        if len(shape) != 3:
            raise ValueError(f"{self.title}: the page draws images (channels, height, width), got a network of {shape}")
        if len(model.theta) > MAX_PARAMETERS:
            raise ValueError(
                f"{self.title} is too large for a page: it has {len(model.theta):,} parameters, the page takes at "
                f"most {MAX_PARAMETERS:,}"
            )
        work = sum(layer.multiply_adds(s) for layer, s in zip(model.layers, model.shapes, strict=False))
        if work > MAX_MULTIPLY_ADDS:
            raise ValueError(
                f"{self.title} is too large for a page: a picture takes {work:,} multiply-adds, the page takes at most "
                f"{MAX_MULTIPLY_ADDS:,}"
            )
        output = tuple(model.layers[-1].output_shape(model.shapes[-2]))
        channels, height, width = self.picture or shape
        if self.digits and (channels != 1 or height != width):
            raise ValueError(
                f"digits must be False for pictures of {(channels, height, width)}: they must be square and grey"
            )
        if len(self.class_names) not in (0, output[0]) or (self.class_names and len(output) != 1):
            raise ValueError(f"class_names must have one name for each of the outputs {output}, or none, got "
                             f"{len(self.class_names)}")  # fmt: skip
        self.picture = self.picture or tuple(shape)

    def content(self) -> dict[str, Any]:
        """What the page's scripts read."""
        first = next((name for name, array in self.arrays.items() if array.ndim == 4), None)
        own = {epoch: {n: a for n, a in state.items() if n in self.arrays} for epoch, state in self.snapshots.items()}
        filters = {epoch: arrays[first] for epoch, arrays in own.items() if first in arrays}
        if first is not None:
            filters[self.epochs] = self.arrays[first]
        return {
            "title": self.title, "about": self.about, "input": self.model.input_shape, "picture": self.picture,
            "padding": self.padding, "resize": self.resize, "mean": np.ravel(self.mean).tolist(),
            "std": np.ravel(self.std).tolist(), "digits": self.digits, "kind": self.model.output_kind,
            "classes": list(self.class_names), "temperature": self.temperature, "rejectBelow": self.reject_below,
            "layers": self.layers, "texts": [_check.short_repr(layer) for layer in self.model.layers],
            "arrays": {name: encode(array) for name, array in self.arrays.items()},
            "epochs": self.epochs,
            "snapshots": [
                {"epoch": epoch, "arrays": {name: encode(a, small=True) for name, a in own[epoch].items()}}
                for epoch in choose_epochs([e for e in sorted(own) if len(own[e]) == len(self.arrays)], self.epochs)
            ],
            "filters": [{"epoch": epoch, "array": encode(filters[epoch], small=True)} for epoch in sorted(filters)],
            "examples": [encode_example(example) for example in self.examples],
            "examplesTitle": self.examples_title,
            "mistakes": [encode_example(example) for example in self.mistakes],
            "history": self.history, "heldOut": self.held_out,
            "confusion": None if self.confusion is None else np.asarray(self.confusion).tolist(),
        }  # fmt: skip


def from_model(model: Sequential, title: str = "network", digits: bool = False) -> Net:
    """A model of yours.  Class names and normalization are those that `fit` gave it.

    digits  whether drawings are prepared as `digits.prepare` does: for models of MNIST and the like
    """
    _check.instance("model", model, Sequential, "a Sequential")
    if model.input_shape is None:
        raise ValueError("input_shape is not known yet: give it to Sequential, or call forward first")
    output = tuple(model.layers[-1].output_shape(model.shapes[-2]))
    names: Sequence[str] = model.class_names or ()
    if not names and len(output) == 1 and output[0] > 1:
        names = tuple(map(str, range(output[0])))
    normalization = model.normalization
    pixels: dict[str, Any] = {} if normalization is None else {"mean": normalization.mean, "std": normalization.std}
    about = f"{len(model.theta):,} parameters."
    return Net(model, names, title=title, about=about, digits=digits, **pixels)


def encode(array: Array, small: bool = False) -> dict[str, Any]:
    """An array for `decodeArray` of net.js: float16 where that loses nothing, otherwise float32.

    small  8 bits a number, unless it is a vector: these are short, and biases need their digits
    """
    if small and array.ndim > 1:
        numbers, scale = quantize(array)
        return _packed(numbers) | {"scale": scale}
    half = array.astype(np.float16)
    return _packed(half if np.array_equal(half.astype(np.float32), array) else array.astype(np.float32))


def _packed(array: Array) -> dict[str, Any]:
    little = np.ascontiguousarray(array, array.dtype.newbyteorder("<"))
    return {"shape": array.shape, "dtype": array.dtype.name, "data": base64.b64encode(little.tobytes()).decode()}


def encode_example(example: Example) -> dict[str, Any]:
    pixels = base64.b64encode(np.ascontiguousarray(example.pixels, np.uint8).tobytes()).decode()
    return {"pixels": pixels, "label": int(example.label), "predicted": int(example.predicted)}


def choose_epochs(epochs: Sequence[float], last: float) -> list[float]:
    """At most five of the epochs before the last one: the first, and about evenly on a logarithmic scale."""
    before = [epoch for epoch in epochs if epoch < last]
    if len(before) <= 5:
        return before
    places = [math.log(max(epoch, 0.03)) for epoch in before]
    targets = np.linspace(places[0], math.log(last), 6)[:5]
    return [before[n] for n in sorted({int(np.argmin([abs(p - t) for p in places])) for t in targets})]
