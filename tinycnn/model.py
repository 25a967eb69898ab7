"""Sequential: a chain of layers that owns one flat parameter vector, one flat gradient vector and every buffer.

The tensors of layers are views into the two vectors, so an optimizer, a checkpoint or a gradient norm is one loop over
one array.  Backpropagation is the loop in `run_backward`: there is no tape, since a chain is its own record.
"""

import contextlib
import functools
import math

import numpy as np

from tinycnn import _check, backend
from tinycnn.layers import Layer


class Sequential:
    """Layers applied one after the other.

    layers       the chain, e.g. ``Conv2d(1, 6, 5), Tanh(), Flatten(), Linear(3456, 10)``
    input_shape  of one image, (C, H, W); found at the first forward if not given
    rng          seed or generator for the initial parameters (anything np.random.default_rng takes)
    dtype        np.float32, or np.float64 for checking gradients
    device       "cpu", "cuda", "cuda:1" ..., or "auto": a GPU where there is one

    theta, grad  (P,): all parameters, and the gradient that the last backward left

    Shapes are checked when they become known: a layer that cannot take what the one before it gives raises ValueError.
    """

    def __init__(self, *layers, input_shape=None, rng=None, dtype=np.float32, device="cpu"):
        for layer in layers:
            hint = "give them one by one, Sequential(*layers)" if isinstance(layer, (list, tuple)) else ""
            _check.instance("layers", layer, Layer, "tinycnn layers", hint)
        if not layers:
            raise ValueError("a Sequential needs at least one layer")
        if len(set(map(id, layers))) < len(layers):
            raise ValueError("every layer may stand in a Sequential once; make a new one for each place")
        if dtype not in (np.float32, np.float64, np.dtype("f4"), np.dtype("f8"), "float32", "float64"):
            raise ValueError(f"dtype must be float32 or float64, got {dtype!r}")
        self.dtype = np.dtype(dtype)
        self.device = backend.choose(device)
        self.layers, self.training = list(layers), True
        self.input_shape: tuple[int, ...] | None = None
        self.shapes: list[tuple[int, ...]] = []  # of the input and of every output
        if input_shape is not None:
            self.set_input_shape(input_shape)
        self._slots: list[tuple] = []  # (name, layer, attribute, shape, start, stop) of every parameter
        for number, layer in enumerate(self.layers):
            for name, shape in layer.parameter_shapes().items():
                start = self._slots[-1][-1] if self._slots else 0
                self._slots.append((f"{number}.{name}", layer, name, shape, start, start + math.prod(shape)))
        self.k = backend.get(self.device)
        rng = _check.generator("rng", rng)
        size = self._slots[-1][-1] if self._slots else 0
        theta = np.empty(size, self.dtype)
        initial = {id(layer): layer.initial(rng) for layer in self.layers}
        for _, layer, name, _, start, stop in self._slots:
            theta[start:stop] = initial[id(layer)][name].ravel()
        self.theta, self.grad = self.k.to_device(theta), self.k.empty(size, self.dtype)
        for layer in self.layers:
            mine = [(name, shape, a, b) for _, owner, name, shape, a, b in self._slots if owner is layer]
            layer.bind(
                self.k,
                {name: self.theta[a:b].reshape(shape) for name, shape, a, b in mine},
                {name: self.grad[a:b].reshape(shape) for name, shape, a, b in mine},
                self.dtype,
            )
        with_parameters = [i for i, layer in enumerate(self.layers) if layer.parameter_shapes()]
        self._first = with_parameters[0] if with_parameters else len(self.layers)
        self._in_place: list[bool] = []
        self._joined: list[int] = []  # numbers of activations whose work the layer after them does
        for i, (layer, after) in enumerate(zip(self.layers, [*self.layers[1:], Layer()], strict=True)):
            self._in_place.append(self._overwrites(i))
            joined = self.k.joined is not None and self._in_place[i] and after.joins(layer)
            after.before = layer if joined else None
            if joined:
                self._joined.append(i)
        self.reserved, self._views, self._batch = 0, {}, 0  # reserved: the largest batch the buffers hold
        self._spent = False  # whether a backward has written over what the last forward had kept for it
        self._recorded: dict = {}  # by batch: `Layer.changes` when a forward pass was recorded, and the recording

    def _overwrites(self, number):
        """Whether layer `number` writes its output over its input, which nobody reads again."""
        before = number - 1
        while before >= 0 and self.layers[before].is_view:
            before -= 1
        return before >= 0 and self.layers[number].in_place and not self.layers[before].reads_output

    # --- shapes and buffers -------------------------------------------------------------------------------------------

    def set_input_shape(self, shape):
        """Fix the shape of one image and find that of every output; ValueError names the layer that does not fit."""
        shape = _check.image_shape("input_shape", shape)
        shapes = [shape]
        for number, layer in enumerate(self.layers):
            try:
                shapes.append(tuple(layer.output_shape(shapes[-1])))
            except ValueError as error:
                raise ValueError(f"layer {number}: {error}") from None
        self.input_shape, self.shapes = shape, shapes

    def reserve(self, batch):
        """Allocate buffers for batches of up to `batch` images; larger ones later allocate anew."""
        if self.input_shape is None:
            raise ValueError("input_shape is not known yet: give it to Sequential, or call forward first")
        batch = _check.integer("batch", batch, 1)
        try:
            self._allocate(batch)
        except backend.DeviceMemoryError as error:
            sizes = [math.prod(shape) for shape in self.shapes]
            kept = [n for n, again in zip(sizes, [False, *self._in_place], strict=True) if not again]
            image = self.dtype.itemsize * (sum(kept) + 2 * max(sizes))
            self._values, self._slopes, self._plain, self.reserved, self._views = [], [], [], 0, {}
            self._recorded = {}
            free = error.free
            more = f"; the buffers of a batch of {batch} need {image * batch / 2**20:,.1f} MiB, "
            more += f"a batch of {free // image} would fit" if free >= image else "and not even one image fits"
            raise backend.DeviceMemoryError(error.asked, free, more) from error

    def _allocate(self, batch):
        # Flat: how images lie in them depends on how many there are (see `_shaped`).  Of the slopes, which are needed
        # by one layer only, two are kept at a time: what lies in the cache is not fetched from memory.
        sizes = [self._room(batch) * math.prod(shape) for shape in self.shapes]
        slopes = [max(sizes)] * 2
        for i, layer in enumerate(self.layers):
            if self._in_place[i] or (layer.is_view and not self._tiled(batch, self.shapes[i])):
                sizes[i + 1] = 0
        self._values, self._slopes = ([self.k.empty((n,), self.dtype) for n in some] for some in (sizes, slopes))
        # Where tiles come from and go to: the images, the outputs and their slopes, in plain order.
        outside = self.shapes[0], self.shapes[-1], self.shapes[-1]
        self._plain = [self.k.empty((batch, *s) if self._tiled(batch, s) else (0,), self.dtype) for s in outside]
        for layer, shape in zip(self.layers, self.shapes[:-1], strict=True):
            layer.reserve(self.k, self._room(batch), shape, self.dtype)
        self.reserved, self._views, self._recorded = batch, {}, {}

    def _lanes(self, batch):
        """Images a tile, if maps of this many images are kept as tiles (kernels/tiles.py); otherwise 1."""
        return self.k.tiles.images_a_tile(batch, self.dtype) if self.k.tiles else 1

    def _tiled(self, batch, shape):
        return len(shape) == 3 and self._lanes(batch) > 1

    def _room(self, batch):
        """The batch, rounded up to whole tiles."""
        lanes = self._lanes(batch)
        return -(-batch // lanes) * lanes

    def _shaped(self, flat, batch, number):
        """The beginning of a flat buffer as a batch of shape `number`: (batch, *shape), or tiles (T, C, H, W, L)."""
        shape = self.shapes[number]
        if self._tiled(batch, shape):
            lanes, room = self._lanes(batch), self._room(batch)
            return flat[: room * math.prod(shape)].reshape((room // lanes, *shape, lanes))
        return flat[: batch * math.prod(shape)].reshape((batch, *shape))

    def _buffers(self, batch):
        """Values and slopes of the input and of every layer's output, as the kernels take them.

        Some share memory: those of a layer that works in place, the slopes of every other layer, and the slopes of an
        activation that another layer joins with its values.
        """
        if batch > self.reserved:
            self.reserve(batch)
        if batch not in self._views:
            values, slopes = ([self._shaped(flats[0], batch, 0)] for flats in (self._values, self._slopes))
            turn = 0
            for i in range(len(self.layers)):
                if self._in_place[i]:
                    values.append(values[i])
                    slopes.append(slopes[i])
                elif self.passes_through(i, values):
                    values.append(values[i].reshape((batch, *self.shapes[i + 1])))
                    slopes.append(slopes[i].reshape((batch, *self.shapes[i + 1])))
                else:
                    turn = 1 - turn
                    values.append(self._shaped(self._values[i + 1], batch, i + 1))
                    slopes.append(self._shaped(self._slopes[turn], batch, i + 1))
            for i in self._joined if values[0].ndim == 5 else ():
                slopes[i] = slopes[i + 1] = values[i + 1]
            # What the first layer with parameters is given for the gradient that nobody wants.
            unwanted = self.k.empty((0, *values[min(self._first, len(self.layers) - 1)].shape[1:]), self.dtype)
            self._views[batch] = values, slopes, unwanted, [a[:batch] for a in self._plain]
        return self._views[batch][:2]

    def unwanted(self, batch):
        """What the first layer with parameters is given for the gradient that nobody wants."""
        self._buffers(batch)
        return self._views[batch][2]

    def input_buffer(self, batch):
        """Where `run_forward(batch)` reads its images: (batch, *input_shape)."""
        values, _ = self._buffers(batch)
        return values[0] if values[0].ndim < 5 else self._views[batch][3][0]

    def output_buffers(self, batch):
        """Where it writes its output, and where `run_backward` reads the output's gradient."""
        values, slopes = self._buffers(batch)
        return (values[-1], slopes[-1]) if values[-1].ndim < 5 else tuple(self._views[batch][3][1:])

    def plain(self, array, batch):
        """One of `_buffers(batch)` as a new NumPy array (batch, ...)."""
        if array.ndim == 5:
            array = self.k.tiles.plain(array)
        return np.array(self.k.to_host(array)[:batch])

    # --- running ------------------------------------------------------------------------------------------------------

    def run_forward(self, batch):
        """The chain on what stands in the input buffer."""
        for _ in self._forward_steps(batch):
            pass

    def _forward_again(self, batch):
        """`run_forward`, recorded on the CPU, where finding the kernels for a single image takes as long as they do."""
        if not self.k.tiles:
            self.run_forward(batch)
            return
        if self._recorded.get(batch, (None,))[0] != Layer.changes:
            step, output = functools.partial(self.run_forward, batch), self.output_buffers(batch)[0]
            self._recorded[batch] = Layer.changes, self.k.capture(step, (output,))
        self._recorded[batch][1]()

    def _forward_steps(self, batch):
        """`run_forward`, layer by layer: yields the number of each and its output."""
        values, _ = self._buffers(batch)
        if batch != self._batch:
            self._batch = batch
            for layer in self.layers:
                layer.images = batch
        if values[0].ndim == 5:
            self.k.tiles.interleave(values[0], self.input_buffer(batch))
        for i, layer in enumerate(self.layers):
            if not self.passes_through(i, values):
                layer.forward(values[i + 1], values[i])
            yield i, values[i + 1]
        if values[-1].ndim == 5:
            self.k.tiles.separate(self.output_buffers(batch)[0], values[-1])

    def passes_through(self, number, values):
        """Whether layer `number` has nothing to do: its output is its input under another shape, or the next layer does
        its work."""
        return self.layers[number].is_view if values[number].ndim < 5 else number in self._joined

    @contextlib.contextmanager
    def layer_by_layer(self):
        """Within it, every layer does its own work and no more, and a backward leaves what the forward before it has
        computed, for looking at them."""
        joined = self._joined
        try:
            self._set_joined([])
            yield
        finally:
            self._set_joined(joined)

    def _set_joined(self, numbers):
        for number in {*self._joined, *numbers}:
            self.layers[number + 1].before = self.layers[number] if number in numbers else None
            self._spent = True  # what the last forward has left is not what a backward would expect now
        self._joined, self._views = numbers, {}

    def trace(self, batch):
        """Run the chain on the input buffer; copies of the output of every layer, NumPy, for looking at."""
        with self.layer_by_layer():
            return [self.plain(value, batch) for _, value in self._forward_steps(batch)]

    def run_backward(self, batch, input_gradient=False):
        """The chain back from the output's gradient; leaves the parameters' gradient in `grad`.

        Without `input_gradient` it stops at the first layer that has parameters.
        """
        for _ in self._backward_steps(batch, input_gradient):
            pass

    def _backward_steps(self, batch, input_gradient=False):
        """`run_backward`, layer by layer: before each, yields its number and the slopes of its output."""
        values, slopes = self._buffers(batch)
        if slopes[-1].ndim == 5:
            self.k.tiles.interleave(slopes[-1], self.output_buffers(batch)[1])
        first = 0 if input_gradient else self._first
        for i in range(len(self.layers) - 1, first - 1, -1):
            yield i, slopes[i + 1]
            if not self.passes_through(i, values):
                dx = slopes[i] if i > first or input_gradient else self.unwanted(batch)
                self.layers[i].backward(dx, slopes[i + 1], values[i], values[i + 1])

    def _cast(self, name, value):
        """`value` as an array of the model's dtype, all finite in it."""
        array = _check.array(name, value)
        if array.dtype != self.dtype:
            with np.errstate(over="ignore"):
                array = array.astype(self.dtype)
        return _check.finite(name, array)

    def first_not_finite(self, batch):
        """The first of input, parameters and outputs with a NaN or infinity, in words; None if there is none.

        The last `batch` images are run once more, for an output may lie where a later one was written.
        """

        def bad(array):
            return not np.isfinite(self.k.to_host(array)).all()

        if bad(self.input_buffer(batch)):
            return "the input"
        before = self.snapshot()
        try:
            for number, value in self._forward_steps(batch):
                for name, owner, attribute, *_ in self._slots:
                    if owner is self.layers[number] and bad(getattr(owner, attribute)):
                        return f"parameter {name} of layer {number} {owner!r}"
                if bad(value):
                    return f"the output of layer {number} {self.layers[number]!r}"
        finally:
            self.restore(before)
        return None

    def forward(self, x):
        """Output for images x: (N, *input_shape), any real dtype.

        Returns a new array (N, ...): NumPy, or, if x lies on the model's GPU (torch, CuPy, JAX ...), one there that
        they take back (DLPack, ``__cuda_array_interface__``).
        """
        x, on_device = backend.local("x", x, self.device)
        x = self._cast("x", x)
        if self.input_shape is None:
            if x.ndim < 2:
                raise ValueError(f"x must have a batch axis and the axes of an image, got shape {x.shape}")
            self.set_input_shape(x.shape[1:])
        if x.shape[1:] != self.input_shape:
            raise ValueError(f"x must have shape (N, {', '.join(map(str, self.shapes[0]))}), got {x.shape}")
        self.k.write(self.input_buffer(len(x)), x)
        self._forward_again(len(x))
        self._spent = False
        return self._handed_out(self.output_buffers(len(x))[0], on_device)

    def _handed_out(self, array, on_device):
        """A copy of one of the model's arrays for the caller."""
        host = np.array(self.k.to_host(array))
        return backend.share(self.k.to_device(host)) if on_device else host

    __call__ = forward

    def backward(self, dy):
        """Gradient of the last forward's input, given that of its output, dy; fills `grad`.  Returns a new array, where
        dy is.

        One forward serves one backward (RuntimeError), for a pooling layer with an activation before it writes its
        gradients over values.  ``with model.layer_by_layer():`` one forward serves many.
        """
        dy, on_device = backend.local("dy", dy, self.device)
        dy = _check.array("dy", dy)
        if not self._batch or self._spent:
            raise RuntimeError("backward needs a forward before it, one for each (but see layer_by_layer)")
        _, slope = self.output_buffers(self._batch)
        if dy.shape != slope.shape:
            raise ValueError(f"dy must have the shape of the last output, {slope.shape}, got {dy.shape}")
        self.k.write(slope, dy.astype(self.dtype, copy=False))
        self.run_backward(self._batch, input_gradient=True)
        self._spent = bool(self._joined)
        slope = self._buffers(self._batch)[1][0]
        return self._handed_out(slope if slope.ndim < 5 else self.plain(slope, self._batch), on_device)

    def predict(self, x, batch_size=256):
        """Output for any number of images, in batches; NumPy."""
        x, batch_size = backend.local("x", x, self.device)[0], _check.integer("batch_size", batch_size, 1)
        x = _check.array("x", x)
        return np.concatenate([self.forward(x[i : i + batch_size]) for i in range(0, len(x), batch_size)])

    def train(self, mode=True):
        """Switch layers that behave differently in training; returns the model."""
        self.training = bool(mode)
        for layer in self.layers:
            layer.training = self.training
        return self

    def eval(self):
        """The same as train(False)."""
        return self.train(False)

    # --- parameters ---------------------------------------------------------------------------------------------------

    def named_parameters(self):
        """Pairs of name ("0.weight") and view into `theta`."""
        return [(name, getattr(layer, attribute)) for name, layer, attribute, *_ in self._slots]

    def parameters(self):
        """The views alone."""
        return [view for _, view in self.named_parameters()]

    def named_buffers(self):
        """Pairs of name ("1.running_mean") and array of what layers remember besides their parameters."""
        return [
            (f"{number}.{name}", getattr(layer, name))
            for number, layer in enumerate(self.layers)
            for name in layer.buffers(self.dtype)
        ]

    def _saved(self):
        """What a state_dict holds, by name, on the device."""
        public = [(name, array) for name, array in self.named_buffers() if "._" not in name]
        return dict(self.named_parameters() + public)

    def snapshot(self):
        """Parameters and all buffers, as NumPy copies: what `restore` takes back."""
        arrays = [self.theta, *(array for _, array in self.named_buffers())]
        return [np.array(self.k.to_host(array)) for array in arrays]

    def restore(self, snapshot):
        """Undo what has happened since the `snapshot` was taken."""
        for array, values in zip([self.theta, *(a for _, a in self.named_buffers())], snapshot, strict=True):
            self.k.write(array, values)

    def state_dict(self):
        """Copies of all parameters and buffers by name, NumPy, in torch's layout and under torch's keys."""
        state = {name: np.array(self.k.to_host(view)) for name, view in self._saved().items()}
        return {n: v.reshape(()) if n.endswith(".num_batches_tracked") else v for n, v in state.items()}

    def load_state_dict(self, state, strict=True):
        """Set parameters from `state`.  Nothing is changed if a shape is wrong (ValueError lists all), or, if `strict`,
        if keys are missing or unexpected (KeyError lists both).  Returns (missing, unexpected)."""
        _check.mapping("state", state, "checkpoint.load reads one from a file")
        mine = self._saved()
        missing, unexpected = [n for n in mine if n not in state], [n for n in state if n not in mine]
        if strict and (missing or unexpected):
            raise KeyError(f"state does not fit the model: missing keys {missing}, unexpected keys {unexpected}")
        new = {n: self._cast(n, backend.local(n, state[n], self.device)[0]) for n in mine if n in state}
        new = {n: v.reshape(1) if n.endswith(".num_batches_tracked") and v.size == 1 else v for n, v in new.items()}
        wrong = [f"{n}: expected {mine[n].shape}, got {v.shape}" for n, v in new.items() if v.shape != mine[n].shape]
        if wrong:
            raise ValueError("state does not fit the model: " + "; ".join(wrong))
        for name, value in new.items():
            self.k.write(mine[name], value)
        return missing, unexpected

    # --- looking at it ------------------------------------------------------------------------------------------------

    def summary(self, input_shape=None):
        """A table as text: layer, output shape, parameters, multiply-adds of one image's forward pass."""
        if input_shape is not None and self.input_shape != _check.image_shape("input_shape", input_shape):
            if self.input_shape is not None:
                raise ValueError(f"input_shape is {self.input_shape}, got {tuple(input_shape)}")
            self.set_input_shape(input_shape)
        if self.input_shape is None:
            raise ValueError("input_shape is not known yet: summary(input_shape=(C, H, W))")
        rows = [
            ("layer", "output shape", "parameters", "multiply-adds"),
            ("input", _shape(self.shapes[0]), "", ""),
        ]
        parameters = adds = 0
        for i, layer in enumerate(self.layers):
            count = sum(math.prod(shape) for shape in layer.parameter_shapes().values())
            cost = layer.multiply_adds(self.shapes[i])
            parameters, adds = parameters + count, adds + cost
            shape = _shape(self.shapes[i + 1])
            rows.append((f"{i} {layer!r}", shape, f"{count:,}" if count else "", f"{cost:,}" if cost else ""))
        rows.append(("total", "", f"{parameters:,}", f"{adds:,}"))
        widths = [max(len(row[column]) for row in rows) for column in range(4)]
        line = "-" * (sum(widths) + 6)
        text = [
            f"{a:<{widths[0]}}  {b:<{widths[1]}}  {c:>{widths[2]}}  {d:>{widths[3]}}".rstrip() for a, b, c, d in rows
        ]
        return "\n".join([text[0], line, *text[1:-1], line, text[-1]])

    def __repr__(self):
        return "\n".join(["Sequential(", *(f"  ({i}): {layer!r}" for i, layer in enumerate(self.layers)), ")"])

    def __len__(self):
        return len(self.layers)

    def __getitem__(self, index):
        return self.layers[index]


def _shape(shape):
    return " x ".join(map(str, shape))
