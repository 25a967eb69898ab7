"""Residual: a layer that consists of layers.  The plan turns it into steps: those of its layers, and a sum."""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from tinycnn import _check
from tinycnn._typing import Shape
from tinycnn.layers import Layer


class Residual(Layer):
    """The output of a chain of layers plus its input (He et al. 2016): y = layers(x) + x.

    layers      the chain; its output must have the shape of its input, unless there is a projection
    projection  a layer, or several, between the input and the sum: y = layers(x) + projection(x)

    state_dict keys: "layers.0.weight", "projection.0.weight" and so on, after the number of the container.  Raises
    ValueError if the two shapes differ.  `requires_grad` and `training` set the flag of all layers inside.
    """

    layers: tuple[Layer, ...] = ()
    projection: tuple[Layer, ...] = ()

    def __init__(self, *layers: Layer, projection: Layer | Sequence[Layer] = ()) -> None:
        _check.instance("projection", projection, (Layer, tuple, list), "a layer, or a list of layers")
        projection = (projection,) if isinstance(projection, Layer) else tuple(projection)
        for name, chain in (("layers", layers), ("projection", projection)):
            for layer in chain:
                _check.instance(name, layer, Layer, "tinycnn layers")
        if not layers:
            raise ValueError("a Residual needs at least one layer")
        self.layers, self.projection = layers, projection

    def __setattr__(self, name: str, value: Any) -> None:
        if name in ("requires_grad", "training"):
            for layer in (*self.layers, *self.projection):
                setattr(layer, name, value)
        if name in ("layers", "projection") and self.ops is not None:
            raise ValueError(f"{name} of a Residual cannot change in a model; make a new model")
        super().__setattr__(name, value)

    def named_children(self) -> list[tuple[str, Layer]]:
        """Pairs of name, such as "layers.0", and layer, in the order in which they run."""
        return [(f"layers.{n}", layer) for n, layer in enumerate(self.layers)] + [
            (f"projection.{n}", layer) for n, layer in enumerate(self.projection)
        ]

    def output_shape(self, shape: Shape) -> Shape:
        output, shortcut = (
            chain_shapes(chain, shape, f"{name} of Residual: ")[-1]
            for name, chain in (("layers", self.layers), ("projection", self.projection))
        )
        if output != shortcut:
            advice = "change it" if self.projection else "a projection must change the input's shape"
            raise ValueError(
                f"Residual adds outputs of one shape, but its layers give {output} and its "
                f"{'projection' if self.projection else 'input'} has {shortcut}; {advice}"
            )
        return output

    def multiply_adds(self, shape: Shape) -> int:
        total = 0
        for chain in (self.layers, self.projection):
            for layer, input_shape in zip(chain, chain_shapes(chain, shape), strict=False):
                total += layer.multiply_adds(input_shape)
        return total

    def config(self) -> dict[str, Any]:
        return {"layers": self.layers, "projection": self.projection}

    def __repr__(self) -> str:
        projection = f", projection=[{', '.join(map(repr, self.projection))}]" if self.projection else ""
        return f"Residual({', '.join(map(repr, self.layers))}{projection})"


class NamedLayer(NamedTuple):
    """A layer, and the name that begins its keys in a state_dict: "0", or "3.layers.0"."""

    name: str
    layer: Layer


def named_layers(layers: Iterable[Layer]) -> list[NamedLayer]:
    """All layers with their names, depth first: a container, then the layers inside."""
    found: list[NamedLayer] = []

    def visit(name: str, layer: Layer) -> None:
        found.append(NamedLayer(name, layer))
        for child, inner in layer.named_children():
            visit(f"{name}.{child}", inner)

    for number, layer in enumerate(layers):
        visit(str(number), layer)
    return found


def leaves(layers: Iterable[Layer]) -> list[NamedLayer]:
    """The layers that compute, those inside of containers included, in the order in which they run."""
    return [named for named in named_layers(layers) if not isinstance(named.layer, Residual)]


def chain_shapes(layers: Iterable[Layer], shape: Shape, prefix: str = "") -> list[Shape]:
    """The shapes of the input and of every output of a chain.  ValueError names the layer that does not fit."""
    shapes = [tuple(shape)]
    for number, layer in enumerate(layers):
        try:
            shapes.append(tuple(layer.output_shape(shapes[-1])))
        except ValueError as error:
            raise ValueError(f"{prefix}layer {number}: {error}") from None
    return shapes


def leaf_shapes(layers: Iterable[Layer], shape: Shape) -> list[tuple[Shape, Shape]]:
    """(input shape, output shape) of each of the `leaves`."""
    shapes: list[tuple[Shape, Shape]] = []
    for layer in layers:
        output = tuple(layer.output_shape(shape))
        if isinstance(layer, Residual):
            shapes += leaf_shapes(layer.layers, shape) + leaf_shapes(layer.projection, shape)
        else:
            shapes.append((tuple(shape), output))
        shape = output
    return shapes


def check_unbound(layers: tuple[Layer, ...]) -> None:
    """Raise TypeError or ValueError unless `layers` can become a new model."""
    for layer in layers:
        hint = "give them one by one, Sequential(*layers)" if isinstance(layer, (list, tuple)) else ""
        _check.instance("layers", layer, Layer, "tinycnn layers", hint)
    if not layers:
        raise ValueError("a Sequential needs at least one layer")
    named = named_layers(layers)
    for name, layer in named:
        if layer.ops is not None:
            raise ValueError(
                f"layer {name}, {layer!r}, belongs to a model already; copy.deepcopy(layer) makes a copy, with its "
                "weights, for another one"
            )
    if len({id(layer) for _, layer in named}) < len(named):
        raise ValueError("a layer may be in a Sequential only once; make a new one for each position")
