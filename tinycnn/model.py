"""Sequential: a chain of layers that owns one flat parameter vector, one flat gradient vector and the saved state.

The layers' parameters are views into the two vectors, so an optimizer, a checkpoint or a gradient norm is one loop over
one array.  The `Plan` of a batch holds the steps, forward and backward.  There is no autograd tape: backward runs the
chain in reverse.
"""

import contextlib
import math
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import DTypeLike

from tinycnn import _check, _inspect, _parts, _predict, _state, devices
from tinycnn._inspect import LayerActivations
from tinycnn._tracked import ChangeCounter, is_builtin
from tinycnn._typing import Array, DeviceArray, Rng, Shape, State
from tinycnn.containers import NamedLayer, chain_shapes, check_unbound, leaf_shapes, leaves, named_layers
from tinycnn.dataset import Normalization
from tinycnn.layers import Layer, copy_into
from tinycnn.plan import Plan, can_fold

MAX_PLANS = 16  # the last plans are kept: of each batch size, one for training and one for evaluation


class RunState:
    """What a model and its slices share, since they share layers.

    pending    plan and thread of the last forward, if its backward may follow
    running    whether a run is in progress
    max_batch  the largest batch so far
    """

    pending: tuple[Plan, int] | None = None
    running = False
    max_batch = 0


class Sequential:
    """Layers applied one after the other.

    layers       the chain, e.g. ``Conv2d(1, 6, 5), Tanh(), Flatten(), Linear(3456, 10)``
    input_shape  of one image, (C, H, W); set by the first forward if not given
    rng          seed or generator for the initial parameters (anything np.random.default_rng takes)
    dtype        np.float32, or np.float64 for checking gradients
    device       "cpu", "cuda", "cuda:1" ..., or "auto": a GPU if one can be used

    theta, grad    (P,): all parameters, and the gradient from the last backward
    normalization  the scaling of the pixels that `fit` trained on; None before training
    output_kind    what the outputs are, set by `fit` from the loss: see `predict`; None before training
    class_names    names of the classes, or None; kept by `save`

    Shapes are checked when they become known: a layer that does not fit the one before it raises ValueError.  A layer
    belongs to one model.  Copies (`copy.deepcopy`, pickle) keep weights.

    ``len(model)``, ``model[0]`` and iteration give the layers of the chain.  A slice, such as ``model[:-1]``, is a
    model of these layers which shares their weights: a feature extractor.

    Threads may share a model: calls run one at a time.
    """

    _folds: tuple[int, bool]  # number of changes when `can_fold` was asked, and its answer

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
        self.normalization: Normalization | None = None
        self.output_kind: str | None = None
        self._class_names: tuple[str, ...] | None = None
        self.changes, self.lock, self._run = ChangeCounter(), threading.RLock(), RunState()
        self.set_layers(layers, input_shape)
        self.ops = devices.get(self.device)
        rng = _check.generator("rng", rng)
        self.parameter_table, self._theta, self._grad = _state.allocate(
            self.named_layers(), rng, self.ops, self.dtype, self.changes
        )

    def set_layers(self, layers: tuple[Layer, ...], input_shape: Shape | None) -> None:
        """Set the chain of a new model."""
        self._layers, self._training, self._unfused = layers, True, False
        self._named_layers, self.leaves = named_layers(layers), leaves(layers)
        self.input_shape: Shape | None = None
        self.shapes: list[Shape] = []  # of the input and of every output
        self.leaf_shapes: list[tuple[Shape, Shape]] = []  # input and output of each of the leaves
        self.clear_plans()
        if input_shape is not None:
            self.set_input_shape(input_shape)

    @property
    def layers(self) -> tuple[Layer, ...]:
        """The chain."""
        return self._layers

    def named_layers(self) -> list[NamedLayer]:
        """Pairs of name and layer, those inside of containers included: ("3", Residual), ("3.layers.0", Conv2d)."""
        return list(self._named_layers)

    @property
    def class_names(self) -> tuple[str, ...] | None:
        """Names of the classes; None if not known.  Assigning takes a sequence of different strings."""
        return self._class_names

    @class_names.setter
    def class_names(self, names: Iterable[str] | None) -> None:
        self._class_names = None if names is None else _check.names("class_names", names)

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
        rebuilt = {"ops", "lock", "changes", "shapes", "leaves", "leaf_shapes", "parameter_table"}
        rebuilt |= {"_named_layers", "_unfused", "_theta", "_grad", "_plans", "_folds", "_shared_buffers", "_run"}
        with self.lock:
            state = {name: value for name, value in vars(self).items() if name not in rebuilt}
            modes = self._modes()
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
        shapes = chain_shapes(self._layers, shape)
        inner = leaf_shapes(self._layers, shape)
        if (shape, shapes, inner) != (self.input_shape, self.shapes, self.leaf_shapes):
            self.input_shape, self.shapes, self.leaf_shapes = shape, shapes, inner
            self.clear_plans()

    def plan(self, batch: int, unfused: bool | None = None, evaluation: bool | None = None) -> Plan:
        """The `Plan` of a batch of `batch` images: its steps and buffers.

        unfused     no fusion, nothing in place: all inputs, outputs and gradients of layers can be read afterwards
        evaluation  steps without a backward, if they are faster; by default in evaluation mode, unless unfused
        """
        unfused = self._unfused if unfused is None else unfused
        evaluation = not (self._training or unfused) if evaluation is None else evaluation
        if evaluation and self._folds[0] != self.changes.count:
            self._folds = self.changes.count, can_fold(self)
        key = batch, unfused, evaluation and self._folds[1]
        plan = self._plans.get(key)
        if plan is None or plan.changes != self.changes.count:
            # A changed attribute, such as a stride, may change other shapes.
            self.set_input_shape(self._known_shapes()[0])
            plan = self._plans.get(key)
            if plan is None or not plan.is_current():
                self._run.max_batch = max(self.max_batch, _check.integer("batch", batch, 1))
                if not all(is_builtin(layer) for _, layer in self.leaves):
                    self.discard_forward()  # users' layers may own buffers, and reallocate them in `Plan`
                plan = self._plans[key] = Plan(self, *key)
                if len(self._plans) > MAX_PLANS:
                    del self._plans[next(iter(self._plans))]
        return plan

    @property
    def max_batch(self) -> int:
        """The largest batch so far."""
        return self._run.max_batch

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
        self._folds = -1, False
        self._plans: dict[tuple[int, bool, bool], Plan] = {}
        self._shared_buffers: dict[str, DeviceArray] = {}
        self.discard_forward()

    def discard_forward(self) -> None:
        """Refuse a `backward` of the last `forward`: its buffers are about to be overwritten."""
        self._run.pending = None

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
            sides = ", ".join(map(str, self.shapes[0]))
            pixels = math.prod(x.shape[1:]) == math.prod(self.shapes[0])
            hint = f"; np.asarray(x).reshape(-1, {sides}) makes images of these pixels" if pixels else ""
            raise ValueError(f"x must have shape (N, {sides}), got {x.shape}{hint}")

    def _to_caller(self, array: DeviceArray, on_device: bool) -> DeviceArray:
        """A copy of one of the model's arrays: NumPy, or on the device."""
        host = np.array(self.ops.to_host(array))
        return devices.as_dlpack(self.ops.to_device(host)) if on_device else host

    def begin_run(self) -> None:
        """Mark the model as running until `end_run`.  RuntimeError if it already is."""
        if self._run.running:
            raise RuntimeError("the model is running; a layer, loss or optimizer must not run it again")
        self._run.running = True

    def end_run(self) -> None:
        """End the run that `begin_run` marked."""
        self._run.running = False

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
            self._run.pending = plan, threading.get_ident()
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
            plan, thread = self._run.pending or (None, None)
            if plan is None or plan.model is not self or thread != threading.get_ident():
                raise RuntimeError(
                    "backward needs its own forward (but see unfused), and nothing may run the model in between"
                )
            _check.shape("dy", dy, plan.dy.shape, "the last output")
            if plan.evaluation:  # has no backward
                plan = self._forward_again(plan)
            self.ops.copy_to(plan.dy, dy.astype(self.dtype, copy=False))
            plan.backward(input_gradient=True)
            if plan.fused:
                self.discard_forward()
            return self._to_caller(plan.dx, on_device)

    def _forward_again(self, evaluated: Plan) -> Plan:
        """The plan that has a backward, after a forward of the same images, in evaluation mode too."""
        plan, modes = self.plan(evaluated.batch, evaluated.unfused, evaluation=False), self._modes()
        self.ops.copy_to(plan.x, evaluated.x)
        self._set_modes([False] * len(modes))
        try:
            plan.forward()
        finally:
            self._set_modes(modes)
            plan.mode = None
        return plan

    def outputs(self, x: Any, batch_size: int = 256) -> Array:
        """Output for any number of images, computed in batches in evaluation mode, NumPy.  x: as for `forward`"""
        x, batch_size = devices.as_host("x", x, self.device)[0], _check.integer("batch_size", batch_size, 1)
        x = _check.array("x", x)
        with self.lock, self.evaluating():
            outputs = [self.forward(x[i : i + batch_size]) for i in range(0, len(x), batch_size)]
            self.discard_forward()
        return np.concatenate(outputs)

    def predict(self, x: Any, batch_size: int = 256) -> Array:
        """Predictions for any number of images, in evaluation mode, NumPy.  x: as for `forward`

        The loss that the model was trained with decides what they are (`output_kind`): class numbers (N,) int64;
        booleans (N, K) after BCEWithLogitsLoss, whether each label applies; the outputs themselves after a loss of
        values such as MSELoss.  Before training, class numbers if the output is a vector of more than one number,
        otherwise the outputs.
        """
        return _predict.predict(self, x, batch_size)

    def predict_proba(self, x: Any, batch_size: int = 256) -> Array:
        """Probabilities (N, K) for any number of images, in evaluation mode, NumPy.  x: as for `forward`

        The softmax over the classes, or after BCEWithLogitsLoss the probability of each label.  ValueError if the
        model's loss does not give probabilities.
        """
        return _predict.predict_proba(self, x, batch_size)

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
            if any(mode != self._training for mode in self._modes()):
                self.changes.count += 1  # a single layer was switched: captures know the model's mode only
            self._training = bool(mode)
            self._set_modes([self._training] * len(self._named_layers))
        return self

    def eval(self) -> "Sequential":
        """The same as train(False)."""
        return self.train(False)

    def _modes(self) -> list[bool]:
        return [layer.training for _, layer in self._named_layers]

    def _set_modes(self, modes: list[bool]) -> None:
        for (_, layer), mode in zip(self._named_layers, modes, strict=True):
            vars(layer)["training"] = mode

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[None]:
        """Context in evaluation mode; restores the mode of each layer."""
        if not self._training:
            yield
            return
        modes = self._modes()
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
            (f"{prefix}.{name}", getattr(layer, name))
            for prefix, layer in self.leaves
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

    def load_state_dict(
        self, state: Mapping[str, Any] | str | os.PathLike[str], strict: bool = True
    ) -> tuple[list[str], list[str]]:
        """Set parameters and buffers.  Returns the names (missing, unexpected).

        state  arrays by name, such as a `state_dict` of this library or of torch, whose tensors may be of any floating
               type and on any device; or a file of them, `*.safetensors` or `*.npz`, read as by `checkpoint.load`

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

    def _known_shapes(self) -> list[Shape]:
        if self.input_shape is None:
            raise ValueError("input_shape is not known yet: give it to Sequential, or call forward first")
        return self.shapes

    # --- the chain ----------------------------------------------------------------------------------------------------

    def replace(self, index: int, *layers: Layer, rng: Rng = None) -> "Sequential":
        """A new model with the layer at `index` replaced by `layers`: ``model.replace(-1, Linear(84, 3))`` for a new
        head.

        The other layers are copies, with their weights, flags and the normalization; `rng` draws the new parameters.
        `output_kind` and `class_names` become None.  ValueError if a layer does not fit the one before it.
        """
        return _parts.replace(self, index, layers, rng)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write layers, weights, normalization, class names and `output_kind` to `path` (`*.safetensors`), which
        `tinycnn.load` reads.  The file is replaced when the new one is complete.

        TypeError names a layer of a user's class whose constructor's arguments are not attributes.
        """
        from tinycnn import saving

        saving.save(self, path)

    def __repr__(self) -> str:
        def line(name: str, layer: Layer) -> str:
            text = f"{type(layer).__name__}:" if layer.named_children() else repr(layer)
            return f"{'  ' * (1 + name.count('.') // 2)}({name}): {text}"

        return "\n".join(["Sequential(", *(line(*named) for named in self._named_layers), ")"])

    def __len__(self) -> int:
        return len(self._layers)

    def __iter__(self) -> Iterator[Layer]:
        return iter(self._layers)

    def __getitem__(self, index: Any) -> Any:
        """A layer, or for a slice a model that shares these layers."""
        if isinstance(index, slice):
            return _parts.take_slice(self, index)
        return self._layers[_check.position("index", index, len(self._layers))]
