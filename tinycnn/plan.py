"""The execution plan of a batch: the steps of a model, forward and backward, with every buffer.

    print(model.plan(64))

A plan decides

- layouts: on the CPU, maps (C, H, W) of all but the smallest batches are *batch-blocked*, (N / lanes, C, H, W, lanes):
  as many images as a vector register has lanes, interleaved pixel by pixel (kernels/layout.py).  Reorder steps convert
  from and to NCHW.  Users' layers run in NCHW.
- fusion: an activation and the pooling after it become one step, which overwrites its input with gradients.
- in-place use: an activation overwrites its input if no later step reads it.
- buffers: all but the smallest are shared by the plans of a model, which run one at a time.

An `unfused` plan does none of the last three.  After a pass, all inputs, outputs and gradients of layers can be read.
"""

import math
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from tinycnn._tracked import Replay, is_builtin, is_replayable
from tinycnn._typing import Array, DeviceArray, Shape
from tinycnn.errors import DeviceMemoryError
from tinycnn.layers import AvgPool2d, Layer, MaxPool2d, ReLU, Sigmoid, Tanh

if TYPE_CHECKING:
    from tinycnn.model import Sequential

StepSpec: TypeAlias = tuple[type["Step"], tuple[int, ...], bool]  # class, numbers of its layers, whether in place


def can_fuse(activation: Layer, pool: Layer) -> bool:
    """Whether a fused kernel exists for the two layers."""
    if type(pool) is AvgPool2d:
        is_2x2 = pool.kernel_size == pool.stride == (2, 2) and pool.padding == (0, 0) and not pool.ceil_mode
        return is_2x2 and activation.activation_code is not None and activation.in_place
    # max f(x) = f(max x) for non-decreasing f, so the pooling comes first.
    disjoint = type(pool) is MaxPool2d and pool.kernel_size == pool.stride and pool.padding == (0, 0)
    return disjoint and type(activation) in (Tanh, Sigmoid, ReLU)


def choose_steps(model: "Sequential", batch: int, unfused: bool = False) -> list[StepSpec]:
    """The steps of a plan."""
    ops, layers, shapes = model.ops, model.layers, model.shapes
    use_blocks = ops.layout is not None and ops.layout.lanes_for(batch, model.dtype) > 1
    specs: list[StepSpec] = []
    blocked = free = False  # free: no later step reads the input of the next step
    number = 0
    while number < len(layers):
        layer, builtin = layers[number], is_builtin(layers[number])
        if layer.is_view and builtin:
            specs.append((ReorderToNCHW if blocked else Reshape, (number,), not blocked))
            blocked, number = False, number + 1
            continue
        if blocked != (use_blocks and builtin and len(shapes[number]) == len(shapes[number + 1]) == 3):
            specs.append((ReorderToNCHW if blocked else ReorderToBlocked, (), False))
            blocked, free = not blocked, number > 0
        in_place = free and not unfused and _flag(layer, builtin, "in_place", False)
        pair = layers[number : number + 2]
        fuse = in_place and blocked and ops.fused and len(pair) == 2 and all(map(is_builtin, pair)) and can_fuse(*pair)
        if fuse:
            average = type(pair[1]) is AvgPool2d
            specs.append((FusedAvgPool2d if average else FusedMaxPool2d, (number, number + 1), False))
            free, number = average, number + 2
        else:
            specs.append((LayerStep, (number,), in_place))
            free, number = not in_place and not _flag(layer, builtin, "reads_output", True), number + 1
    return [*specs, (ReorderToNCHW, (), False)] if blocked else specs


def _flag(layer: Layer, builtin: bool, name: str, default: bool) -> bool:
    """A flag of a layer's class.  A user's class must set it itself: users' flags are not inherited."""
    return bool(getattr(layer, name) if builtin else vars(type(layer)).get(name, default))


class Step:
    """A unit of work of a plan, forward and backward.

    layers    the layers that it computes, with their `numbers` in the model; none for a reorder
    x, y      input and output     dx, dy   gradients of the loss with respect to them
    All four are arrays in the layout of the kernels; `Plan.to_host` gives NumPy (N, ...).
    """

    fused = False
    dx: DeviceArray = None
    dy: DeviceArray = None

    def __init__(self, plan: "Plan", numbers: tuple[int, ...], x: DeviceArray, y: DeviceArray) -> None:
        self.ops, self.plan, self.numbers, self.x, self.y = plan.ops, plan, numbers, x, y
        self.layers = [plan.model.layers[number] for number in numbers]
        self.builtin, self.replayable = (all(map(f, self.layers)) for f in (is_builtin, is_replayable))

    def forward(self) -> None:
        raise NotImplementedError

    def backward(self, dx: DeviceArray) -> None:
        """Write the gradient of x into dx, unless dx has size 0."""
        raise NotImplementedError

    def __repr__(self) -> str:
        return " + ".join(f"{n} {layer!r}" for n, layer in zip(self.numbers, self.layers, strict=True))


class LayerStep(Step):
    """One layer."""

    def __init__(self, plan: "Plan", numbers: tuple[int, ...], x: DeviceArray, y: DeviceArray) -> None:
        super().__init__(plan, numbers, x, y)
        (self.layer,) = self.layers
        padded_batch = len(x) * (plan.lanes if x.ndim == 5 else 1)
        shape, dtype = plan.model.shapes[numbers[0]], plan.model.dtype
        self.saved = self.layer.reserve(plan.ops, padded_batch, shape, dtype)
        if self.saved is not None:
            self.saved.images = plan.batch
        elif not self.builtin:  # a user's layer may own its buffers, for all plans
            self.layer.reserve(plan.ops, max(padded_batch, plan.model.max_batch), shape, dtype)

    def forward(self) -> None:
        vars(self.layer)["saved"] = self.saved
        self.layer.forward(self.y, self.x)

    def backward(self, dx: DeviceArray) -> None:
        vars(self.layer)["saved"] = self.saved
        self.layer.backward(dx, self.dy, self.x, self.y)


class FusedAvgPool2d(Step):
    """An activation, in place in x, and the mean of 2 x 2 windows."""

    fused = True

    def __init__(self, plan: "Plan", numbers: tuple[int, ...], x: DeviceArray, y: DeviceArray) -> None:
        super().__init__(plan, numbers, x, y)
        self.activation: Any
        self.pool: Any
        self.activation, self.pool = self.layers

    def forward(self) -> None:
        self.ops.fused.avg_pool_forward(self.y, self.x, self.activation.activation_code, self.pool.divisor or 4)

    def backward(self, dx: DeviceArray) -> None:
        self.ops.fused.avg_pool_backward(dx, self.dy, self.activation.activation_code, self.pool.divisor or 4)


class FusedMaxPool2d(Step):
    """The maximum of windows, and an activation of it."""

    fused = True

    def __init__(self, plan: "Plan", numbers: tuple[int, ...], x: DeviceArray, y: DeviceArray) -> None:
        super().__init__(plan, numbers, x, y)
        self.activation: Any
        self.pool: Any
        self.activation, self.pool = self.layers
        self.indices = plan.ops.empty(y.shape, np.int32)

    def forward(self) -> None:
        code = self.activation.activation_code
        self.ops.fused.max_pool_forward(self.y, self.indices, self.x, code, *self.pool.options)

    def backward(self, dx: DeviceArray) -> None:
        code = self.activation.activation_code
        self.ops.fused.max_pool_backward(dx, self.dy, self.indices, self.y, code, *self.pool.options)


class Reshape(Step):
    """The same array with another shape."""

    def forward(self) -> None:
        pass

    def backward(self, dx: DeviceArray) -> None:
        pass


class ReorderToBlocked(Step):
    """x is NCHW, y blocked."""

    def forward(self) -> None:
        self.ops.layout.to_blocked(self.y, self.x)

    def backward(self, dx: DeviceArray) -> None:
        self.ops.layout.to_nchw(dx, self.dy)

    def __repr__(self) -> str:
        return "reorder to blocked"


class ReorderToNCHW(Step):
    """x is blocked, y NCHW, or flat if the step includes a Flatten."""

    def forward(self) -> None:
        self.ops.layout.to_nchw(self.y.reshape((len(self.y), *self.x.shape[1:4])), self.x)

    def backward(self, dx: DeviceArray) -> None:
        self.ops.layout.to_blocked(dx, self.dy.reshape((len(self.dy), *dx.shape[1:4])))

    def __repr__(self) -> str:
        return f"reorder to NCHW {super().__repr__()}".rstrip()


class Plan:
    """The steps of `model` for `batch` images.

    unfused  nothing is fused, in place or shared: `backward` may be called many times after one `forward`
    x        the input of `forward`: (batch, *input_shape)
    y, dy    the output of `forward`, and its gradient, the input of `backward`
    dx       the gradient of x, an output of `backward` if asked for
    fused    whether a step is fused: each `backward` then needs its own `forward`
    """

    def __init__(self, model: "Sequential", batch: int, unfused: bool = False) -> None:
        self.model, self.ops, self.batch, self.unfused = model, model.ops, batch, unfused
        self.specs, self.changes = choose_steps(model, batch, unfused), model.changes.count
        self.lanes: int = self.ops.layout.lanes_for(batch, model.dtype) if self.ops.layout else 1
        self.steps: list[Step] = []
        self._replays: dict[bool, Replay] = {}
        try:
            self._build()
        except DeviceMemoryError as error:
            model.clear_plans()
            raise DeviceMemoryError(error.requested, error.free, self._memory_hint(error.free)) from error

    def _build(self) -> None:
        shapes = self.model.shapes
        # Only one step reads a gradient: two alternating buffers stay in the cache.
        largest, turn, shape = max(map(math.prod, shapes)), 0, shapes[0]
        self.x = value = self._array("x", shape, False)
        self.dx = gradient = self._array("gradient 0", shape, False, largest)
        for index, (step_class, numbers, in_place) in enumerate(self.specs):
            x, dx, blocked = value, gradient, value.ndim == 5
            shape = shapes[numbers[-1] + 1] if numbers else shape
            if step_class is Reshape:
                value, gradient = (array.reshape((self.batch, *shape)) for array in (x, dx))
            elif not in_place:
                blocked = (blocked or step_class is ReorderToBlocked) and step_class is not ReorderToNCHW
                turn = 1 - turn
                value = self._array(f"output {index}", shape, blocked)
                gradient = self._array(f"gradient {turn}", shape, blocked, largest)
            step = step_class(self, numbers, x, value)
            if step.fused:
                dx = self.steps[-1].dy = x
            step.dx, step.dy = dx, gradient
            self.steps.append(step)
        self.y, self.dy = value, gradient
        self.fused = any(step.fused for step in self.steps)
        trainable = [i for i, step in enumerate(self.steps) if any(layer.parameter_shapes() for layer in step.layers)]
        self.first_trainable = trainable[0] if trainable else len(self.steps)  # index of the step
        first = self.steps[min(self.first_trainable, len(self.steps) - 1)]
        # Empty dx for the first trainable step: training does not need it.
        self.no_grad_buffer = self.ops.empty((0, *first.x.shape[1:]), self.model.dtype)

    def _array(self, name: str, shape: Shape, blocked: bool, min_size: int = 0) -> DeviceArray:
        """An array for a batch of `shape`; a shared buffer with at least `min_size` elements an image, unless
        unfused."""
        padded_batch = -(-self.batch // self.lanes) * self.lanes
        size = math.prod(shape) * (padded_batch if blocked else self.batch)
        if self.unfused:
            flat = self.ops.empty((size,), self.model.dtype)
        else:
            flat = self.model.shared_buffer(name, max(size, padded_batch * min_size))
        blocks = (padded_batch // self.lanes, *shape, self.lanes)
        return flat[:size].reshape(blocks if blocked else (self.batch, *shape))

    def _memory_hint(self, free: int) -> str:
        """For the message of a DeviceMemoryError."""
        sizes = [math.prod(shape) for shape in self.model.shapes]
        outputs = [numbers[-1] for _, numbers, in_place in self.specs if numbers and not in_place]
        elements = sizes[0] + sum(sizes[number + 1] for number in outputs) + 2 * max(sizes)
        per_image = self.model.dtype.itemsize * elements
        fits = f"a batch of {free // per_image} would fit" if free >= per_image else "and not even one image fits"
        return f"; the buffers of a batch of {self.batch} need {per_image * self.batch / 2**20:,.1f} MiB, {fits}"

    def is_current(self) -> bool:
        """Whether a new plan would have the same steps."""
        count = self.model.changes.count
        if self.changes != count and self.specs == choose_steps(self.model, self.batch, self.unfused):
            self.changes = count
        return self.changes == count

    def forward(self, dry_run: bool = False) -> None:
        """Compute y from x.   dry_run: run only steps that are known to call only kernels"""
        for step in self.steps:
            if step.replayable or not dry_run:
                step.forward()

    def replay_forward(self) -> None:
        """`forward`, replayed on the CPU: for one image, Python's call overhead is as long as the kernels."""
        training = self.model.training
        if training not in self._replays:
            self._replays[training] = Replay(self.ops, self.forward, *self.model.layers)
        self._replays[training]() if self.ops.layout else self.forward()

    def backward(self, input_gradient: bool = False, dry_run: bool = False) -> None:
        """Compute the parameters' gradients in `model.grad` from dy, and, with `input_gradient`, dx."""
        first = 0 if input_gradient else self.first_trainable
        for index in range(len(self.steps) - 1, first - 1, -1):
            step = self.steps[index]
            if step.replayable or not dry_run:
                step.backward(step.dx if index > first or input_gradient else self.no_grad_buffer)

    def to_host(self, array: DeviceArray) -> Array:
        """An array of a step as a new NumPy array (batch, ...)."""
        return np.array(self.ops.to_host(self.ops.layout.as_nchw(array) if array.ndim == 5 else array)[: self.batch])

    def __repr__(self) -> str:
        def line(step: Step, source: DeviceArray, result: DeviceArray) -> str:
            note = (
                "fused" if step.fused else "view" if type(step) is Reshape else "in place" if source is result else ""
            )
            shapes = f"{tuple(source.shape)!s:>{shape_width}} -> {tuple(result.shape)!s:<{shape_width}}"
            return f"  {step!r:<{width}}  {shapes}  {note}".rstrip()

        width = max(len(repr(step)) for step in self.steps)
        shape_width = max(len(str(tuple(a.shape))) for step in self.steps for a in (step.x, step.y))
        lines = [f"{self.batch} images, {self.model.dtype}{', unfused' if self.unfused else ''}", "forward"]
        lines += [line(step, step.x, step.y) for step in self.steps]
        lines += ["backward"]
        lines += [line(step, step.dy, step.dx) for step in self.steps[: self.first_trainable : -1]]
        lines += [
            f"  {step!r}  parameters only" for step in self.steps[self.first_trainable : self.first_trainable + 1]
        ]
        return "\n".join(lines)
