"""Sequential: a chain of layers that owns one flat parameter vector, one flat gradient vector and the saved state.

The tensors of layers are views into the two vectors, so an optimizer, a checkpoint or a gradient norm is one loop over
one array.  What runs for a batch of images, forward and backward, is its `Plan`: there is no tape, since a chain is its
own record.
"""

import collections
import contextlib
import math
import threading
from typing import Any

import numpy as np

from tinycnn import _check, devices
from tinycnn._tracked import ChangeCounter, is_builtin
from tinycnn.dataset import Normalization
from tinycnn.layers import Layer, copy_into
from tinycnn.plan import Plan

PLANS = 8  # of the last batch sizes are kept

Parameter = collections.namedtuple("Parameter", "name layer attribute shape start stop")
LayerActivations = collections.namedtuple("LayerActivations", "layer input output input_grad output_grad")


class Sequential:
    """Layers applied one after the other.

    layers       the chain, e.g. ``Conv2d(1, 6, 5), Tanh(), Flatten(), Linear(3456, 10)``
    input_shape  of one image, (C, H, W); found at the first forward if not given
    rng          seed or generator for the initial parameters (anything np.random.default_rng takes)
    dtype        np.float32, or np.float64 for checking gradients
    device       "cpu", "cuda", "cuda:1" ..., or "auto": a GPU where there is one

    theta, grad    (P,): all parameters, and the gradient that the last backward left
    normalization  how the pixels were scaled that `fit` has trained on; None before

    Shapes are checked when they become known: a layer that cannot take what the one before it gives raises ValueError.
    A layer belongs to one model.  Copies (`copy.deepcopy`, pickle) keep weights, so a net with a new head is
    ``Sequential(*copy.deepcopy(old.layers[:-1]), Linear(84, 5))``.

    Threads may share a model: each call waits until no other one runs.
    """

    def __init__(self, *layers, input_shape=None, rng=None, dtype=np.float32, device="cpu"):
        for number, layer in enumerate(layers):
            hint = "give them one by one, Sequential(*layers)" if isinstance(layer, (list, tuple)) else ""
            _check.instance("layers", layer, Layer, "tinycnn layers", hint)
            if layer.ops is not None:
                raise ValueError(
                    f"layer {number}, {layer!r}, belongs to a model already; copy.deepcopy(layer) gives a copy with "
                    "its weights for another one"
                )
        if not layers:
            raise ValueError("a Sequential needs at least one layer")
        if len(set(map(id, layers))) < len(layers):
            raise ValueError("every layer may stand in a Sequential once; make a new one for each place")
        if dtype not in (np.float32, np.float64, np.dtype("f4"), np.dtype("f8"), "float32", "float64"):
            raise ValueError(f"dtype must be float32 or float64, got {dtype!r}")
        self.dtype = np.dtype(dtype)
        self.device = devices.resolve(device)
        self._layers, self._training = layers, True
        self.input_shape: tuple[int, ...] | None = None
        self.shapes: list[tuple[int, ...]] = []  # of the input and of every output
        self.normalization: Normalization | None = None
        self.changes, self.lock = ChangeCounter(), threading.RLock()
        self.max_batch, self._unfused, self._running = 0, False, False  # reserved: the largest batch so far
        self.clear_plans()
        if input_shape is not None:
            self.set_input_shape(input_shape)
        self.ops = devices.get(self.device)
        rng = _check.generator("rng", rng)
        brought = [layer.initial_state(rng, self.dtype) for layer in layers]
        self._parameters: list[Parameter] = []
        values, at = [np.empty(0)], 0
        for number, (layer, (parameters, _)) in enumerate(zip(layers, brought, strict=True)):
            for name, shape in layer.parameter_shapes().items():
                self._parameters.append(Parameter(f"{number}.{name}", layer, name, shape, at, at + math.prod(shape)))
                values.append(np.ravel(parameters[name]))
                at = self._parameters[-1].stop
        self._theta = self.ops.to_device(np.concatenate(values).astype(self.dtype))
        self._grad = self.ops.empty(at, self.dtype)
        for layer, (_, buffers) in zip(layers, brought, strict=True):
            self._bind(layer, buffers)

    def _bind(self, layer, buffers):
        mine = [one for one in self._parameters if one.layer is layer]
        theta, grad = (
            {one.attribute: vector[one.start : one.stop].reshape(one.shape) for one in mine}
            for vector in (self._theta, self._grad)
        )
        before = {*vars(layer)} - {*theta, *buffers}
        layer.bind(self.ops, theta, grad, self.dtype)
        for name, value in buffers.items():
            self.ops.copy_to(getattr(layer, name), value)
        vars(layer).update(
            changes=self.changes, training=True, _views=frozenset([*theta, *(f"{n}_grad" for n in theta), *buffers]),
            _shapes=layer.parameter_shapes(),
            _bound=frozenset({*vars(layer), "saved", "_bound", "_shapes", "_views", "_copied"} - before),
        )  # fmt: skip

    @property
    def layers(self):
        """The chain, a tuple."""
        return self._layers

    @property
    def theta(self):
        """(P,): all parameters.  What is assigned is copied into it."""
        return self._theta

    @theta.setter
    def theta(self, values):
        if values is not self._theta:
            copy_into(self.ops, "theta", self._theta, values)

    @property
    def grad(self):
        """(P,): the gradient of all parameters.  What is assigned is copied into it."""
        return self._grad

    @grad.setter
    def grad(self, values):
        if values is not self._grad:
            copy_into(self.ops, "grad", self._grad, values)

    # --- copies -------------------------------------------------------------------------------------------------------

    def __getstate__(self):
        """Layers with their weights, the gradient, and whatever else was set on the model, all on the host."""
        made_anew = {"ops", "lock", "changes", "shapes", "max_batch", "_unfused", "_theta", "_grad", "_parameters"}
        made_anew |= {"_plans", "_shared", "_pending", "_running"}
        with self.lock:
            state = {name: value for name, value in vars(self).items() if name not in made_anew}
            return state | {
                "_flags": [layer.training for layer in self._layers],
                "_grad": np.array(self.ops.to_host(self._grad)),
            }

    def __setstate__(self, state):
        options = {name: state.pop(name) for name in ("input_shape", "dtype", "device")}
        flags, grad, layers = (state.pop(name) for name in ("_flags", "_grad", "_layers"))
        Sequential.__init__(self, *layers, **options)
        vars(self).update(state)
        self.grad = grad
        self._set_flags(flags)

    # --- shapes and plans ---------------------------------------------------------------------------------------------

    def set_input_shape(self, shape):
        """Fix the shape of one image and find that of every output; ValueError names the layer that does not fit."""
        shape = _check.image_shape("input_shape", shape)
        shapes = [shape]
        for number, layer in enumerate(self._layers):
            try:
                shapes.append(tuple(layer.output_shape(shapes[-1])))
            except ValueError as error:
                raise ValueError(f"layer {number}: {error}") from None
        if (shape, shapes) != (self.input_shape, self.shapes):
            self.input_shape, self.shapes = shape, shapes
            self.clear_plans()

    def plan(self, batch, unfused=None):
        """The `Plan` of a batch of so many images: what runs, and the buffers it runs on.

        unfused  no fusion, nothing in place: all inputs, outputs and gradients of layers can be read afterwards
        """
        unfused = self._unfused if unfused is None else unfused
        plan = self._plans.get((batch, unfused))
        if plan is None or plan.changes != self.changes.count:
            if self.input_shape is None:
                raise ValueError("input_shape is not known yet: give it to Sequential, or call forward first")
            self.set_input_shape(self.input_shape)  # an attribute that was set, a stride say, may change the others
            plan = self._plans.get((batch, unfused))
            if plan is None or not plan.is_current():
                self.max_batch = max(self.max_batch, _check.integer("batch", batch, 1))
                if not all(map(is_builtin, self._layers)):
                    self.discard_forward()  # layers of one's own may keep their buffers themselves, and make them now
                plan = self._plans[batch, unfused] = Plan(self, batch, unfused)
                if len(self._plans) > PLANS:
                    del self._plans[next(iter(self._plans))]
        return plan

    def reserve(self, batch):
        """Allocate buffers for batches of up to `batch` images; larger ones later allocate anew."""
        with self.lock:
            self.plan(batch)

    def shared_buffer(self, name, size):
        """An array of at least `size` numbers that all plans share."""
        if name not in self._shared or len(self._shared[name]) < size:
            self._shared[name] = self.ops.empty((size,), self.dtype)
        return self._shared[name]

    def clear_plans(self):
        """Free all buffers."""
        self._plans: dict[tuple[int, bool], Plan] = {}
        self._shared: dict[str, Any] = {}
        self.discard_forward()

    def discard_forward(self):
        """Let no `backward` follow the last `forward`: something else is about to run."""
        self._pending: tuple | None = None  # the plan of the last forward, and the thread that made it

    @contextlib.contextmanager
    def unfused(self):
        """Within it, every layer does its own work and no more, and a backward leaves what the forward before it has
        computed, for looking at them."""
        with self.lock:
            previous, self._unfused = self._unfused, True
            self.discard_forward()
            try:
                yield
            finally:
                self._unfused = previous
                self.discard_forward()

    # --- running ------------------------------------------------------------------------------------------------------

    def _cast(self, name, value, dtype=None):
        """`value` as an array of the model's dtype, all finite in it."""
        array, dtype = _check.array(name, value), dtype or self.dtype
        if array.dtype != dtype:
            given = array
            with np.errstate(all="ignore"):
                array = given.astype(dtype)
            if dtype.kind == "i" and (array != given).any():
                raise ValueError(f"{name} must hold whole numbers below 2**63, got {given.flat[0]}")
        return _check.finite(name, array)

    def _images(self, x):
        """x as `forward` takes it: raw pixels are scaled as those that the model was trained on."""
        if self.normalization is not None:
            x = self.normalization.apply("x", _check.array("x", x))
        return self._cast("x", x)

    def forward(self, x):
        """Output for images x: (N, *input_shape).

        x  numbers as in training, after scaling: (pixel - mean) / std.  Once `fit` has trained the model on uint8
           images, uint8 pixels are taken too and scaled alike, and other integers are refused; before, any real dtype
           is taken as it is

        Returns a new array (N, ...): NumPy, or, if x lies on the model's GPU (torch, CuPy, JAX ...), one there that
        they take back (DLPack, ``__cuda_array_interface__``).
        """
        x, on_device = devices.as_host("x", x, self.device)
        x = self._images(x)
        with self.lock:
            self._check_shape(x)
            plan = self.plan(len(x))
            self.discard_forward()
            self.ops.copy_to(plan.x, x)
            self.begin_run()
            try:
                plan.replay_forward()
            finally:
                self.end_run()
            self._pending = plan, threading.get_ident()
            return self._to_caller(plan.y, on_device)

    def begin_run(self):
        """Mark the model as running until `end_run`; RuntimeError if it is running already."""
        if self._running:
            raise RuntimeError("the model runs already; a layer, loss or optimizer that it calls may not run it")
        self._running = True

    def end_run(self):
        """End what `begin_run` began."""
        self._running = False

    def _check_shape(self, x):
        if self.input_shape is None:
            if x.ndim < 2:
                raise ValueError(f"x must have a batch axis and the axes of an image, got shape {x.shape}")
            self.set_input_shape(x.shape[1:])
        if x.shape[1:] != self.input_shape:
            raise ValueError(f"x must have shape (N, {', '.join(map(str, self.shapes[0]))}), got {x.shape}")

    def _to_caller(self, array, on_device):
        """A copy of one of the model's arrays for the caller."""
        host = np.array(self.ops.to_host(array))
        return devices.as_dlpack(self.ops.to_device(host)) if on_device else host

    __call__ = forward

    def backward(self, dy):
        """Gradient of the last forward's input, given that of its output, dy; fills `grad`.  Returns a new array, where
        dy is.

        One forward serves one backward (RuntimeError), for a pooling layer with an activation before it writes its
        gradients over values.  ``with model.unfused():`` one forward serves many.  Nothing else may run the
        model between the two, nor another thread.
        """
        dy, on_device = devices.as_host("dy", dy, self.device)
        dy = _check.array("dy", dy)
        with self.lock:
            if self._pending is None or self._pending[1] != threading.get_ident():
                raise RuntimeError(
                    "backward needs a forward before it, one for each (but see unfused), with nothing in "
                    "between that runs the model"
                )
            plan, _ = self._pending
            if dy.shape != plan.dy.shape:
                raise ValueError(f"dy must have the shape of the last output, {plan.dy.shape}, got {dy.shape}")
            self.ops.copy_to(plan.dy, dy.astype(self.dtype, copy=False))
            plan.backward(input_gradient=True)
            if plan.fused:
                self.discard_forward()
            return self._to_caller(plan.dx, on_device)

    def predict(self, x, batch_size=256):
        """Output for any number of images, in batches and in evaluation mode; NumPy.  x: as `forward` takes it"""
        x, batch_size = devices.as_host("x", x, self.device)[0], _check.integer("batch_size", batch_size, 1)
        x = _check.array("x", x)
        with self.lock, self.evaluating():
            found = [self.forward(x[i : i + batch_size]) for i in range(0, len(x), batch_size)]
            self.discard_forward()
        return np.concatenate(found)

    def activations(self, x, dy=None):
        """Every layer at work on images x: a list of (layer, input, output, input_grad, output_grad), NumPy (N, ...).

        dy  the gradient of the output, or a function that gives it for the output.  Without it the gradients are None;
            with it those of the parameters are left in `grad`, too
        """
        x = self._images(devices.as_host("x", x, self.device)[0])
        with self.lock:
            self._check_shape(x)
            if self.named_buffers():
                self.discard_forward()  # what is drawn or counted in it is not what a backward would expect
            plan = self.plan(len(x), unfused=True)
            self.ops.copy_to(plan.x, x)
            plan.forward()
            if dy is not None:
                dy = np.asarray(dy(plan.to_host(plan.y)) if callable(dy) else dy, self.dtype)
                if dy.shape != plan.dy.shape:
                    raise ValueError(f"dy must have the shape of the output, {plan.dy.shape}, got {dy.shape}")
                self.ops.copy_to(plan.dy, dy)
                plan.backward(input_gradient=True)
            return [
                LayerActivations(step.layers[0], *(None if dy is None and n > 1 else plan.to_host(array)
                       for n, array in enumerate((step.x, step.y, step.dx, step.dy))))
                for step in plan.steps if step.layers
            ]  # fmt: skip

    def find_non_finite(self, plan):
        """The first of input, parameters and outputs with a NaN or infinity, in words; None if there is none.

        The last images of the plan are run once more, for an output may lie where a later one was written.
        """

        def bad(array):
            return not np.isfinite(self.ops.to_host(array)).all()

        if bad(plan.x):
            return "the input"
        before, again = self.snapshot(), self.plan(plan.batch, unfused=True)
        self.ops.copy_to(again.x, plan.x)
        try:
            for step in again.steps:
                step.forward()
                for one in self._parameters:
                    if one.layer in step.layers and bad(getattr(one.layer, one.attribute)):
                        return f"parameter {one.name} of layer {step!r}"
                if step.layers and bad(step.y):
                    return f"the output of layer {step!r}"
        finally:
            self.restore(before)
        return None

    @property
    def training(self):
        """Whether layers work as in training."""
        return self._training

    @training.setter
    def training(self, mode):
        self.train(mode)

    def train(self, mode=True):
        """Switch layers that behave differently in training; returns the model."""
        with self.lock:
            if any(layer.training != self._training for layer in self._layers):
                self.changes.count += 1  # somebody has switched a single layer: captures know the model's mode only
            self._training = bool(mode)
            self._set_flags([self._training] * len(self._layers))
        return self

    def eval(self):
        """The same as train(False)."""
        return self.train(False)

    def _set_flags(self, flags):
        for layer, flag in zip(self._layers, flags, strict=True):
            vars(layer)["training"] = flag

    @contextlib.contextmanager
    def evaluating(self):
        """Evaluation mode within it; afterwards each layer is in the mode it was in."""
        if not self._training:
            yield
            return
        flags = [layer.training for layer in self._layers]
        self._training = False
        self._set_flags([False] * len(flags))
        try:
            yield
        finally:
            self._training = True
            self._set_flags(flags)

    # --- parameters ---------------------------------------------------------------------------------------------------

    def named_parameters(self):
        """Pairs of name ("0.weight") and view into `theta`."""
        return [(one.name, getattr(one.layer, one.attribute)) for one in self._parameters]

    def parameters(self):
        """The views alone."""
        return [view for _, view in self.named_parameters()]

    def named_buffers(self):
        """Pairs of name ("1.running_mean") and array of what layers remember besides their parameters."""
        return [
            (f"{number}.{name}", getattr(layer, name))
            for number, layer in enumerate(self._layers)
            for name in layer.initial_buffers(self.dtype)
        ]

    def _saved(self):
        """What a state_dict holds, by name, on the device, layer by layer."""
        found = {name: array for name, array in self.named_parameters() + self.named_buffers() if "._" not in name}
        return dict(sorted(found.items(), key=lambda item: int(item[0].partition(".")[0])))

    def snapshot(self):
        """Parameters and all buffers, as NumPy copies: what `restore` takes back."""
        arrays = [self.theta, *(array for _, array in self.named_buffers())]
        return [np.array(self.ops.to_host(array)) for array in arrays]

    def restore(self, snapshot):
        """Undo what has happened since the `snapshot` was taken."""
        for array, values in zip([self.theta, *(a for _, a in self.named_buffers())], snapshot, strict=True):
            self.ops.copy_to(array, values)

    def state_dict(self):
        """Copies of all parameters and buffers by name, NumPy, in torch's layout and order and under torch's keys.

        Once `fit` has trained the model, how its pixels are scaled is there too: normalization.mean, .std and .unit.
        """
        state = {name: np.array(self.ops.to_host(view)) for name, view in self._saved().items()}
        state = {n: v.reshape(()) if n.endswith(".num_batches_tracked") else v for n, v in state.items()}
        return state if self.normalization is None else state | self.normalization.state_dict()

    def load_state_dict(self, state, strict=True):
        """Set parameters from `state`.  Nothing is changed if a shape is wrong (ValueError lists all), or, if `strict`,
        if keys are missing or unexpected (KeyError lists both).  Returns (missing, unexpected)."""
        _check.mapping("state", state, "checkpoint.load reads one from a file")
        mine, (state, normalization) = self._saved(), Normalization.split_state(state)
        missing, unexpected = [n for n in mine if n not in state], [n for n in state if n not in mine]
        if strict and (missing or unexpected):
            raise KeyError(f"state does not fit the model: missing keys {missing}, unexpected keys {unexpected}")
        here = {n: devices.as_host(n, state[n], self.device)[0] for n in mine if n in state}
        new = {n: self._cast(n, value, mine[n].dtype) for n, value in here.items()}
        new = {n: v.reshape(1) if n.endswith(".num_batches_tracked") and v.size == 1 else v for n, v in new.items()}
        wrong = [f"{n}: expected {mine[n].shape}, got {v.shape}" for n, v in new.items() if v.shape != mine[n].shape]
        if wrong:
            raise ValueError("state does not fit the model: " + "; ".join(wrong))
        for name, value in new.items():
            self.ops.copy_to(mine[name], value)
        self.normalization = normalization or self.normalization
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
        for i, layer in enumerate(self._layers):
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
        scaled = [] if self.normalization is None else [str(self.normalization)]
        return "\n".join([text[0], line, *text[1:-1], line, text[-1], *scaled])

    def __repr__(self):
        return "\n".join(["Sequential(", *(f"  ({i}): {layer!r}" for i, layer in enumerate(self._layers)), ")"])

    def __len__(self):
        return len(self._layers)

    def __getitem__(self, index):
        return self._layers[index]


def _shape(shape):
    return " x ".join(map(str, shape))
