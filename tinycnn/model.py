"""Sequential: a chain of layers that owns one flat parameter vector, one flat gradient vector and the saved state.

The layers' parameters are views into the two vectors, so an optimizer, a checkpoint or a gradient norm is one loop over
one array.  The `Plan` of a batch holds the steps, forward and backward.  There is no autograd tape: backward runs the
chain in reverse.
"""

import contextlib
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import DTypeLike

from tinycnn import _check, _inspect, _state, devices
from tinycnn._inspect import LayerActivations
from tinycnn._tracked import ChangeCounter, is_builtin
from tinycnn._typing import Array, DeviceArray, Rng, Shape, State
from tinycnn.dataset import Normalization
from tinycnn.layers import Layer, check_unbound, copy_into
from tinycnn.plan import Plan

MAX_PLANS = 8  # the plans of the last batch sizes are kept


class Sequential:
    """Layers applied one after the other.

    layers       the chain, e.g. ``Conv2d(1, 6, 5), Tanh(), Flatten(), Linear(3456, 10)``
    input_shape  of one image, (C, H, W); set by the first forward if not given
    rng          seed or generator for the initial parameters (anything np.random.default_rng takes)
    dtype        np.float32, or np.float64 for checking gradients
    device       "cpu", "cuda", "cuda:1" ..., or "auto": a GPU if one can be used

    theta, grad    (P,): all parameters, and the gradient from the last backward
    normalization  the scaling of the pixels that `fit` trained on; None before training

    Shapes are checked when they become known: a layer that does not fit the one before it raises ValueError.  A layer
    belongs to one model.  Copies (`copy.deepcopy`, pickle) keep weights, so a network with a new head is
    ``Sequential(*copy.deepcopy(old.layers[:-1]), Linear(84, 5))``.

    Threads may share a model: calls run one at a time.
    """

    def __init__(
        self,
        *layers: Layer,
        input_shape: Shape | None = None,
        rng: Rng = None,
        dtype: DTypeLike = np.float32,
        device: str = "cpu",
    ) -> None:
        check_unbound(layers)
        self.dtype = _check.float_dtype("dtype", dtype)
        self.device = devices.resolve(device)
        self._layers, self._training = layers, True
        self.input_shape: Shape | None = None
        self.shapes: list[Shape] = []  # of the input and of every output
        self.normalization: Normalization | None = None
        self.changes, self.lock = ChangeCounter(), threading.RLock()
        self.max_batch, self._unfused, self._running = 0, False, False  # max_batch: the largest so far
        self.clear_plans()
        if input_shape is not None:
            self.set_input_shape(input_shape)
        self.ops = devices.get(self.device)
        rng = _check.generator("rng", rng)
        self.parameter_table, self._theta, self._grad = _state.allocate(layers, rng, self.ops, self.dtype, self.changes)

    @property
    def layers(self) -> tuple[Layer, ...]:
        """The chain."""
        return self._layers

    @property
    def theta(self) -> DeviceArray:
        """(P,): all parameters.  Assigning copies into it."""
        return self._theta

    @theta.setter
    def theta(self, values: DeviceArray) -> None:
        if values is not self._theta:
            copy_into(self.ops, "theta", self._theta, values)

    @property
    def grad(self) -> DeviceArray:
        """(P,): the gradient of all parameters.  Assigning copies into it."""
        return self._grad

    @grad.setter
    def grad(self, values: DeviceArray) -> None:
        if values is not self._grad:
            copy_into(self.ops, "grad", self._grad, values)

    # --- copies -------------------------------------------------------------------------------------------------------

    def __getstate__(self) -> dict[str, Any]:
        """Layers with their weights, the gradient, and attributes that a user has set, all on the host."""
        rebuilt = {"ops", "lock", "changes", "shapes", "max_batch", "_unfused", "_theta", "_grad", "parameter_table"}
        rebuilt |= {"_plans", "_shared_buffers", "_pending", "_running"}
        with self.lock:
            state = {name: value for name, value in vars(self).items() if name not in rebuilt}
            modes = [layer.training for layer in self._layers]
            return state | {"_modes": modes, "_grad": np.array(self.ops.to_host(self._grad))}

    def __setstate__(self, state: dict[str, Any]) -> None:
        options = {name: state.pop(name) for name in ("input_shape", "dtype", "device")}
        modes, grad, layers = (state.pop(name) for name in ("_modes", "_grad", "_layers"))
        Sequential.__init__(self, *layers, **options)
        vars(self).update(state)
        self.grad = grad
        self._set_modes(modes)

    # --- shapes and plans ---------------------------------------------------------------------------------------------

    def set_input_shape(self, shape: Shape) -> None:
        """Set the shape of one image and find that of every output; ValueError names the layer that does not fit."""
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

    def plan(self, batch: int, unfused: bool | None = None) -> Plan:
        """The `Plan` of a batch of `batch` images: its steps and buffers.

        unfused  no fusion, nothing in place: all inputs, outputs and gradients of layers can be read afterwards
        """
        unfused = self._unfused if unfused is None else unfused
        plan = self._plans.get((batch, unfused))
        if plan is None or plan.changes != self.changes.count:
            if self.input_shape is None:
                raise ValueError("input_shape is not known yet: give it to Sequential, or call forward first")
            self.set_input_shape(self.input_shape)  # a changed attribute, such as a stride, may change other shapes
            plan = self._plans.get((batch, unfused))
            if plan is None or not plan.is_current():
                self.max_batch = max(self.max_batch, _check.integer("batch", batch, 1))
                if not all(map(is_builtin, self._layers)):
                    self.discard_forward()  # users' layers may own buffers, and reallocate them in `Plan`
                plan = self._plans[batch, unfused] = Plan(self, batch, unfused)
                if len(self._plans) > MAX_PLANS:
                    del self._plans[next(iter(self._plans))]
        return plan

    def reserve(self, batch: int) -> None:
        """Allocate buffers for batches of up to `batch` images; a larger one allocates again."""
        with self.lock:
            self.plan(batch)

    def shared_buffer(self, name: str, size: int) -> DeviceArray:
        """A buffer of at least `size` elements that all plans share."""
        if name not in self._shared_buffers or len(self._shared_buffers[name]) < size:
            self._shared_buffers[name] = self.ops.empty((size,), self.dtype)
        return self._shared_buffers[name]

    def clear_plans(self) -> None:
        """Free all buffers."""
        self._plans: dict[tuple[int, bool], Plan] = {}
        self._shared_buffers: dict[str, DeviceArray] = {}
        self.discard_forward()

    def discard_forward(self) -> None:
        """Refuse a `backward` of the last `forward`: its buffers are about to be overwritten."""
        self._pending: tuple[Plan, int] | None = None  # plan and thread of the last forward

    @contextlib.contextmanager
    def unfused(self) -> Iterator[None]:
        """Context in which layers are not fused, and backward may be called many times after one forward."""
        with self.lock:
            previous, self._unfused = self._unfused, True
            self.discard_forward()
            try:
                yield
            finally:
                self._unfused = previous
                self.discard_forward()

    # --- running ------------------------------------------------------------------------------------------------------

    def _prepare(self, x: Any) -> Array:
        """The plan's input from images as for `forward`: uint8 pixels scaled as in training, cast to `dtype`."""
        if self.normalization is not None:
            x = self.normalization.apply("x", _check.array("x", x))
        return _check.cast("x", x, self.dtype)

    def _check_input(self, x: Array) -> None:
        if self.input_shape is None:
            if x.ndim < 2:
                raise ValueError(f"x must have a batch axis and the axes of an image, got shape {x.shape}")
            self.set_input_shape(x.shape[1:])
        if x.shape[1:] != self.input_shape:
            raise ValueError(f"x must have shape (N, {', '.join(map(str, self.shapes[0]))}), got {x.shape}")

    def _to_caller(self, array: DeviceArray, on_device: bool) -> DeviceArray:
        """A copy of one of the model's arrays: NumPy, or on the device."""
        host = np.array(self.ops.to_host(array))
        return devices.as_dlpack(self.ops.to_device(host)) if on_device else host

    def begin_run(self) -> None:
        """Mark the model as running until `end_run`.  RuntimeError if it already is."""
        if self._running:
            raise RuntimeError("the model is running; a layer, loss or optimizer must not run it again")
        self._running = True

    def end_run(self) -> None:
        """End the run that `begin_run` marked."""
        self._running = False

    def forward(self, x: Any) -> DeviceArray:
        """Output for images x: (N, *input_shape).

        x  input as in training, after scaling: (pixel - mean) / std.  A model that `fit` has trained on uint8 images
           also takes and scales uint8 pixels, and refuses other integers.  An untrained model takes any real dtype,
           unscaled

        Returns a new array (N, ...): NumPy, or, if x is on the model's GPU (torch, CuPy, JAX ...), an array on that
        GPU with DLPack and ``__cuda_array_interface__``.
        """
        x, on_device = devices.as_host("x", x, self.device)
        x = self._prepare(x)
        with self.lock:
            self._check_input(x)
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

    __call__ = forward

    def backward(self, dy: Any) -> DeviceArray:
        """Gradient of the last forward's input, from the gradient dy of its output; fills `grad`.  Returns a new
        array, on the device of dy.

        Each backward needs its own forward (RuntimeError otherwise), because a fused step overwrites its input with
        gradients; inside ``with model.unfused():`` one forward is enough.  Nothing else, and no other thread, may run
        the model in between.
        """
        dy, on_device = devices.as_host("dy", dy, self.device)
        dy = _check.array("dy", dy)
        with self.lock:
            if self._pending is None or self._pending[1] != threading.get_ident():
                raise RuntimeError(
                    "backward needs its own forward (but see unfused), and nothing may run the model in between"
                )
            plan, _ = self._pending
            _check.shape("dy", dy, plan.dy.shape, "the last output")
            self.ops.copy_to(plan.dy, dy.astype(self.dtype, copy=False))
            plan.backward(input_gradient=True)
            if plan.fused:
                self.discard_forward()
            return self._to_caller(plan.dx, on_device)

    def predict(self, x: Any, batch_size: int = 256) -> Array:
        """Output for any number of images, computed in batches in evaluation mode, NumPy.  x: as for `forward`"""
        x, batch_size = devices.as_host("x", x, self.device)[0], _check.integer("batch_size", batch_size, 1)
        x = _check.array("x", x)
        with self.lock, self.evaluating():
            outputs = [self.forward(x[i : i + batch_size]) for i in range(0, len(x), batch_size)]
            self.discard_forward()
        return np.concatenate(outputs)

    # --- training and evaluation mode ---------------------------------------------------------------------------------

    @property
    def training(self) -> bool:
        """Whether layers are in training mode."""
        return self._training

    @training.setter
    def training(self, mode: bool) -> None:
        self.train(mode)

    def train(self, mode: bool = True) -> "Sequential":
        """Switch between training and evaluation mode; returns the model."""
        with self.lock:
            if any(layer.training != self._training for layer in self._layers):
                self.changes.count += 1  # a single layer was switched: captures know the model's mode only
            self._training = bool(mode)
            self._set_modes([self._training] * len(self._layers))
        return self

    def eval(self) -> "Sequential":
        """The same as train(False)."""
        return self.train(False)

    def _set_modes(self, modes: list[bool]) -> None:
        for layer, mode in zip(self._layers, modes, strict=True):
            vars(layer)["training"] = mode

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[None]:
        """Context in evaluation mode; restores the mode of each layer."""
        if not self._training:
            yield
            return
        modes = [layer.training for layer in self._layers]
        self._training = False
        self._set_modes([False] * len(modes))
        try:
            yield
        finally:
            self._training = True
            self._set_modes(modes)

    # --- parameters and saved state -----------------------------------------------------------------------------------

    def named_parameters(self) -> list[tuple[str, DeviceArray]]:
        """Pairs of name ("0.weight") and view into `theta`."""
        return [(parameter.name, parameter.view) for parameter in self.parameter_table]

    def parameters(self) -> list[DeviceArray]:
        """The views alone."""
        return [view for _, view in self.named_parameters()]

    def named_buffers(self) -> list[tuple[str, DeviceArray]]:
        """Pairs of name ("1.running_mean") and array: the layers' state that is not trained."""
        return [
            (f"{number}.{name}", getattr(layer, name))
            for number, layer in enumerate(self._layers)
            for name in layer.initial_buffers(self.dtype)
        ]

    def snapshot(self) -> list[Array]:
        """Parameters and all buffers as NumPy copies, for `restore`."""
        return [np.array(self.ops.to_host(array)) for array in self._state_arrays()]

    def restore(self, snapshot: list[Array]) -> None:
        """Restore parameters and buffers from a `snapshot`."""
        for array, values in zip(self._state_arrays(), snapshot, strict=True):
            self.ops.copy_to(array, values)

    def _state_arrays(self) -> list[DeviceArray]:
        return [self.theta, *(array for _, array in self.named_buffers())]

    def state_dict(self) -> State:
        """Copies of all parameters and buffers by name, NumPy, with torch's keys, layouts and order.

        After `fit` it also has the scaling of pixels: normalization.mean, .std and .unit.
        """
        return _state.state_dict(self)

    def load_state_dict(self, state: Mapping[str, Any], strict: bool = True) -> tuple[list[str], list[str]]:
        """Set parameters and buffers from `state`.  Returns the names (missing, unexpected).

        Nothing is changed if a shape is wrong (ValueError lists all) or, with `strict`, keys are missing or unexpected
        (KeyError lists both).
        """
        return _state.load_state_dict(self, state, strict)

    # --- inspection ---------------------------------------------------------------------------------------------------

    def activations(self, x: Any, dy: Array | Callable[[Array], Array] | None = None) -> list[LayerActivations]:
        """Run images x and return the arrays of every layer: (layer, input, output, input_grad, output_grad), NumPy.

        dy  the gradient of the output, or a function that computes it from the output.  Without it the gradients are
            None; with it `grad` is filled too
        """
        x = self._prepare(devices.as_host("x", x, self.device)[0])
        with self.lock:
            self._check_input(x)
            if self.named_buffers():
                self.discard_forward()  # this forward changes buffers: masks, running statistics
            return _inspect.activations(self, x, dy)

    def find_non_finite(self, plan: Plan) -> str | None:
        """Description of the first array (input, parameter or output) with a NaN or infinity; None if all are finite.

        Runs the last images of `plan` again, unfused: outputs may have been overwritten.
        """
        return _inspect.find_non_finite(self, plan)

    def summary(self, input_shape: Shape | None = None) -> str:
        """A table as text: layer, output shape, parameters, multiply-adds of one image's forward pass."""
        if input_shape is not None and self.input_shape != _check.image_shape("input_shape", input_shape):
            if self.input_shape is not None:
                raise ValueError(f"input_shape is {self.input_shape}, got {tuple(input_shape)}")
            self.set_input_shape(input_shape)
        if self.input_shape is None:
            raise ValueError("input_shape is not known yet: summary(input_shape=(C, H, W))")
        return _inspect.summary(self)

    def __repr__(self) -> str:
        return "\n".join(["Sequential(", *(f"  ({i}): {layer!r}" for i, layer in enumerate(self._layers)), ")"])

    def __len__(self) -> int:
        return len(self._layers)

    def __getitem__(self, index: Any) -> Any:
        return self._layers[index]
