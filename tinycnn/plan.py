"""The execution plan of a batch: the steps of a model, forward and backward, with every buffer.

    print(model.plan(64))

A plan decides

- layouts: on the CPU, maps (C, H, W) of all but the smallest batches are *batch-blocked*, (N / lanes, C, H, W, lanes):
  as many images as a vector register has lanes, interleaved pixel by pixel (kernels/layout.py).  Reorder steps convert
  from and to NCHW.  Users' layers run in NCHW.
- fusion: an activation and the pooling after it become one step, which overwrites its input with gradients; with the
  convolution before them, too.  So do a Linear and the activation after it.  A backend decides how many kernels it
  launches for a fused step (kernels/fused.py, cuda/fused.py).
- Residual: its layers, its projection and their sum become steps of one flat list.
- in-place use: an activation overwrites its input if no later step reads it.
- evaluation, on the CPU: a convolution and the batch norm, the sum of a Residual and the ReLU that follow it become one
  step (kernels/folded.py), and max pooling keeps no positions.  Such a plan has no backward.
- buffers: all but the smallest are shared by the plans of a model, which run one at a time.

An `unfused` plan does none of the last four.  After a pass, all inputs, outputs and gradients of layers can be read.
"""

import itertools
import math
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import numpy as np

from tinycnn._tracked import Replay, is_builtin, is_replayable
from tinycnn._typing import Array, DeviceArray, Shape
from tinycnn.containers import Residual
from tinycnn.errors import DeviceMemoryError
from tinycnn.layers import (
    ELU,
    AvgPool2d,
    BatchNorm2d,
    Conv2d,
    Hardtanh,
    Layer,
    Linear,
    MaxPool2d,
    ReLU,
    ReLU6,
    Sigmoid,
    Tanh,
)

if TYPE_CHECKING:
    from tinycnn.model import Sequential

# Class, numbers of the leaves (of a Residual's Add: the specs of its layers and its projection), whether in place.
StepSpec: TypeAlias = tuple[type["Step"], tuple[Any, ...], bool]


def can_fuse(activation: Layer, pool: Layer) -> bool:
    """Whether a fused kernel exists for an activation and the pooling after it."""
    if type(pool) is AvgPool2d:
        is_2x2 = pool.kernel_size == pool.stride == (2, 2) and pool.padding == (0, 0) and not pool.ceil_mode
        return is_2x2 and activation.activation_code is not None and activation.in_place
    # max f(x) = f(max x) for non-decreasing f, so the pooling comes first.
    disjoint = type(pool) is MaxPool2d and pool.kernel_size == pool.stride and pool.padding == (0, 0)
    return disjoint and type(activation) in (Tanh, Sigmoid, ReLU, ELU, Hardtanh, ReLU6)


def fused_step(layers: tuple[Layer, ...], in_place: bool, keeps_dy: bool) -> "tuple[type[Step], int] | None":
    """The fused step that begins with layers[0], and its number of layers; None if there is none.

    in_place  the first layer may overwrite its input
    keeps_dy  a step of two layers must not overwrite its dy
    """
    if len(layers) == 3 and type(layers[0]) is Conv2d and layers[1].in_place and can_fuse(*layers[1:]):
        return FusedConv2d, 3
    if len(layers) < 2:
        return None
    first, second = layers[:2]
    if type(first) is Linear and not keeps_dy and second.activation_code is not None and second.in_place:
        return FusedLinear, 2
    if in_place and can_fuse(first, second):
        return FusedAvgPool2d if type(second) is AvgPool2d else FusedMaxPool2d, 2
    return None


def clamp_limits(layer: Layer) -> tuple[float, float] | None:
    """(low, high) of an activation min(max(x, low), high); None for any other."""
    if type(layer) is ReLU:
        return 0.0, math.inf
    return layer.activation_code[1:] if type(layer) in (Hardtanh, ReLU6) else None


def folded_step(layers: tuple[Layer, ...], nested: bool) -> "tuple[type[Step], int] | None":
    """The step of evaluation that begins with the convolution layers[0], and its number of layers; None if that is all.

    nested  `layers` end with those of a Residual, whose sum can be part of the step
    """
    count = 1
    if len(layers) > count and type(layers[count]) is BatchNorm2d:
        norm: Any = layers[count]
        count += norm.track_running_stats
    if nested and len(layers) == count:
        return FoldedConv2d, count
    pools = len(layers) > count + 1 and can_fuse(*layers[count : count + 2])  # which applies the activation
    if len(layers) > count and clamp_limits(layers[count]) and not pools:
        count += 1
    return (FoldedConv2d, count) if count > 1 else None


def can_fold(model: "Sequential") -> bool:
    """Whether a plan of evaluation may differ from that of training.  A backward runs the forward again, which changes
    nothing if all layers are this library's and in evaluation mode."""
    leaves = [layer for _, layer in model.leaves]
    return model.ops.folded is not None and all(is_builtin(layer) and not layer.training for layer in leaves)


def choose_steps(model: "Sequential", batch: int, unfused: bool = False, evaluation: bool = False) -> list[StepSpec]:
    """The steps of a plan.   evaluation: there will be no backward, and the model `can_fold`"""
    ops = model.ops
    blocked_maps = ops.layout is not None  # the layout of the fused kernels
    use_blocks = blocked_maps and ops.layout.lanes_for(batch, model.dtype, evaluation) > 1
    number = 0  # of the next leaf

    def chain(
        layers: tuple[Layer, ...], blocked: bool, free: bool, nested: bool = False
    ) -> tuple[list[StepSpec], bool, bool]:
        """The steps of a chain whose input is `blocked`, and whether the output is blocked and free.

        free    no later step reads the input of the next step, which may overwrite it
        nested  in a Residual: the gradient of its output is also that of the shortcut
        """
        nonlocal number
        specs: list[StepSpec] = []
        position = 0
        while position < len(layers):
            layer, builtin = layers[position], is_builtin(layers[position])
            if isinstance(layer, Residual):
                spec, blocked = residual(layer, blocked)
                free, position = True, position + 1
                body, following = spec[1][0], layers[position : position + 2]
                pools = len(following) == 2 and can_fuse(*following)
                if body[-1][0] is FoldedSum and following and clamp_limits(following[0]) and not pools:
                    body[-1] = FoldedSum, (*body[-1][1], number), False
                    number, position = number + 1, position + 1
                specs.append(spec)
                continue
            if layer.is_view and builtin:
                specs.append((ReorderToNCHW if blocked else Reshape, (number,), not blocked))
                blocked, number, position = False, number + 1, position + 1
                continue
            input_shape, output_shape = model.leaf_shapes[number]
            maps = len(input_shape) == len(output_shape) == 3
            if blocked != (use_blocks and builtin and maps and not layer.needs_nchw):
                specs.append(_reorder(blocked))
                blocked, free = not blocked, number > 0
            in_place = free and not unfused and _flag(layer, builtin, "in_place", False)
            fused, following = None, layers[position : position + 4]
            if evaluation and type(layer) is Conv2d and output_shape[1:] != (1, 1):
                fused = folded_step(following, nested and len(layers) <= position + 4)
            if fused is None and not unfused:
                keeps_dy = nested and position + 2 == len(layers)
                fused = fused_step(tuple(itertools.takewhile(is_builtin, following[:3])), in_place, keeps_dy)
                if fused is not None and maps and blocked != blocked_maps:
                    # The planes of one image are so small that activation and average pooling are faster in turn.
                    fused = fused if evaluation and type(following[fused[1] - 1]) is MaxPool2d else None
            if fused is not None:
                step_class, count = fused
                specs.append((step_class, tuple(range(number, number + count)), False))
                free = evaluation or type(following[count - 1]) is AvgPool2d  # backward of others reads the output
                number, position = number + count, position + count
            else:
                specs.append((LayerStep, (number,), in_place))
                free = evaluation or not (in_place or _flag(layer, builtin, "reads_output", True))
                number, position = number + 1, position + 1
        return specs, blocked, free

    def residual(layer: Residual, blocked: bool) -> tuple[StepSpec, bool]:
        """The steps of a Residual, and whether its output is blocked."""
        body, body_blocked, free = chain(layer.layers, blocked, False, True)
        projection, shortcut_blocked, _ = chain(layer.projection, blocked, False, True)
        if body_blocked != shortcut_blocked:
            body.append(_reorder(body_blocked))
            free = True
        last, numbers, _ = body[-1]
        if last is FoldedConv2d and clamp_limits(model.leaves[numbers[-1]][1]) is None:
            body[-1] = FoldedSum, numbers, False
        return (Add, (body, projection), free and not unfused), shortcut_blocked

    specs, blocked, _ = chain(model.layers, False, False)
    return [*specs, _reorder(True)] if blocked else specs


def _trainable(model: "Sequential") -> list[bool]:
    """Whether each leaf is trained."""
    return [is_trained(layer) for _, layer in model.leaves]


def is_trained(layer: Layer) -> bool:
    """Whether the layer has parameters that are not frozen."""
    return layer.requires_grad and bool(layer.parameter_shapes())


def _outputs(specs: list[StepSpec]) -> list[int]:
    """Numbers of the leaves whose outputs have a buffer."""
    numbers: list[int] = []
    for step_class, parts, in_place in specs:
        if step_class is Add:
            numbers += _outputs(parts[0]) + _outputs(parts[1])
        elif parts and not in_place:
            numbers += parts[:: len(parts) - 1] if step_class is FusedConv2d else parts[-1:]
    return numbers


def _reorder(blocked: bool) -> StepSpec:
    return (ReorderToNCHW if blocked else ReorderToBlocked, (), False)


def _flag(layer: Layer, builtin: bool, name: str, default: bool) -> bool:
    """A flag of a layer's class.  A user's class must set it itself: users' flags are not inherited."""
    return bool(getattr(layer, name) if builtin else vars(type(layer)).get(name, default))


class Step:
    """A unit of work of a plan, forward and backward.

    layers    the layers that it computes, with their `numbers` among the model's leaves; none for a reorder
    x, y      input and output     dx, dy   gradients of the loss with respect to them
    needs_dx  whether training needs dx: a step before this one has parameters that are not frozen
    All four are arrays in the layout of the kernels; `Plan.to_host` gives NumPy (N, ...).
    """

    fused = False  # backward overwrites what forward has left
    overwrites_x = False  # dx is x
    dx: DeviceArray = None
    dy: DeviceArray = None
    needs_dx = False
    previous: "Step | None" = None  # computes x; None if x is the input of the model or of a projection
    no_grad_buffer: DeviceArray = None  # empty dx for training, if that does not need dx

    def __init__(self, plan: "Plan", numbers: tuple[int, ...], x: DeviceArray, y: DeviceArray) -> None:
        self.ops, self.plan, self.numbers, self.x, self.y = plan.ops, plan, numbers, x, y
        leaves = [plan.model.leaves[number] for number in numbers]
        self.names, self.layers = [name for name, _ in leaves], [layer for _, layer in leaves]
        self.builtin, self.replayable = (all(map(f, self.layers)) for f in (is_builtin, is_replayable))
        self.trainable = any(map(is_trained, self.layers))

    def forward(self) -> None:
        raise NotImplementedError

    def backward(self, dx: DeviceArray) -> None:
        """Write the gradient of x into dx, unless dx has size 0."""
        raise NotImplementedError

    def __repr__(self) -> str:
        return " + ".join(f"{name} {layer!r}" for name, layer in zip(self.names, self.layers, strict=True))


class LayerStep(Step):
    """One layer."""

    def __init__(self, plan: "Plan", numbers: tuple[int, ...], x: DeviceArray, y: DeviceArray) -> None:
        super().__init__(plan, numbers, x, y)
        (self.layer,) = self.layers
        padded_batch = len(x) * (plan.lanes if x.ndim == 5 else 1)
        shape, dtype = plan.model.leaf_shapes[numbers[0]][0], plan.model.dtype
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

    fused = overwrites_x = True

    def __init__(self, plan: "Plan", numbers: tuple[int, ...], x: DeviceArray, y: DeviceArray) -> None:
        super().__init__(plan, numbers, x, y)
        self.activation: Any
        self.pool: Any
        self.activation, self.pool = self.layers

    def forward(self) -> None:
        self.ops.fused.avg_pool_forward(self.y, self.x, self.activation.activation_code, self.pool.divisor or 4)

    def forward_after(self, convolution: Any, x: DeviceArray) -> None:
        """`forward`, with the convolution of x that computes self.x."""
        code, divisor = self.activation.activation_code, self.pool.divisor or 4
        self.ops.fused.conv2d_avg_pool_forward(self.y, self.x, x, *convolution.operands, code, divisor)

    def backward(self, dx: DeviceArray) -> None:
        self.ops.fused.avg_pool_backward(dx, self.dy, self.activation.activation_code, self.pool.divisor or 4)


class FusedMaxPool2d(Step):
    """The maximum of windows, and an activation of it."""

    fused = overwrites_x = True

    def __init__(self, plan: "Plan", numbers: tuple[int, ...], x: DeviceArray, y: DeviceArray) -> None:
        super().__init__(plan, numbers, x, y)
        self.activation: Any
        self.pool: Any
        self.activation, self.pool = self.layers
        kernel_size, *_, dilation = self.pool.options
        needed = not plan.evaluation or kernel_size != (2, 2) or dilation != (1, 1) or self.pool.ceil_mode
        self.indices = plan.ops.empty(y.shape if needed else (*y.shape[:2], *[0] * (y.ndim - 2)), np.int32)

    def forward(self) -> None:
        code = self.activation.activation_code
        self.ops.fused.max_pool_forward(self.y, self.indices, self.x, code, *self.pool.options)

    def forward_after(self, convolution: Any, x: DeviceArray) -> None:
        """`forward`, with the convolution of x that computes self.x."""
        code, options = self.activation.activation_code, self.pool.options
        self.ops.fused.conv2d_max_pool_forward(self.y, self.indices, self.x, x, *convolution.operands, code, *options)

    def backward(self, dx: DeviceArray) -> None:
        code = self.activation.activation_code
        self.ops.fused.max_pool_backward(dx, self.dy, self.indices, self.y, code, *self.pool.options)


class FusedConv2d(Step):
    """A convolution, an activation and the pooling after it.

    pooling  the step of the last two; its x are the convolution's maps, which backward overwrites with their gradient
    """

    fused = True

    def __init__(self, plan: "Plan", numbers: tuple[int, ...], x: DeviceArray, y: DeviceArray) -> None:
        super().__init__(plan, numbers, x, y)
        self.convolution = self.layers[0]
        maps = plan.new_array(f"maps {len(plan.steps)}", plan.model.leaf_shapes[numbers[0]][1], x.ndim == 5)
        pool_class = FusedAvgPool2d if type(self.layers[2]) is AvgPool2d else FusedMaxPool2d
        self.pooling = pool_class(plan, numbers[1:], maps, y)

    def forward(self) -> None:
        self.pooling.forward_after(self.convolution, self.x)

    def backward(self, dx: DeviceArray) -> None:
        maps, self.pooling.dy = self.pooling.x, self.dy
        self.pooling.backward(maps)
        self.convolution.backward(dx, maps, self.x, maps)


class FoldedConv2d(Step):
    """In evaluation, a convolution and the batch norm and the activation after it, if it has them."""

    fused = True

    def __init__(self, plan: "Plan", numbers: tuple[int, ...], x: DeviceArray, y: DeviceArray) -> None:
        super().__init__(plan, numbers, x, y)
        self.convolution: Any = self.layers[0]
        self.norm: Any = next((layer for layer in self.layers if isinstance(layer, BatchNorm2d)), None)
        self.residual: DeviceArray = None
        self.table = plan.ops.empty((4, y.shape[1]), y.dtype)

    def forward(self) -> None:
        weight, bias, *window = self.convolution.operands
        norm, none, low_high = self.norm, self.table[0, :0], clamp_limits(self.layers[-1]) or (-math.inf, math.inf)
        self.table[2:] = np.reshape(low_high, (2, 1))
        statistics = (none,) * 4 if norm is None else (norm.weight, norm.bias, norm.running_mean, norm.running_var)
        self.ops.folded.fold_batch_norm(self.table, bias, *statistics, 0.0 if norm is None else norm.eps)
        self.ops.folded.conv2d(self.y, self.x, weight, self.table, self.residual, *window)


class FoldedSum(FoldedConv2d):
    """`FoldedConv2d` at the end of a Residual, with its sum, which comes before the activation.

    residual  the other term
    """

    def __repr__(self) -> str:
        *parts, last = super().__repr__().split(" + ")
        return " + ".join([*parts, "add", last] if clamp_limits(self.layers[-1]) else [*parts, last, "add"])


class FusedLinear(Step):
    """A Linear and the activation after it."""

    def __init__(self, plan: "Plan", numbers: tuple[int, ...], x: DeviceArray, y: DeviceArray) -> None:
        super().__init__(plan, numbers, x, y)
        self.linear: Any
        self.activation: Any
        self.linear, self.activation = self.layers

    def forward(self) -> None:
        linear, code = self.linear, self.activation.activation_code
        self.ops.fused.linear_forward(self.y, self.x, linear.weight, linear.bias, code)

    def backward(self, dx: DeviceArray) -> None:
        linear, code = self.linear, self.activation.activation_code
        self.ops.fused.linear_backward(
            dx, linear.weight_grad, linear.bias_grad, self.dy, self.x, linear.weight, self.y, code
        )


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


class Fork(Step):
    """The input of a `Residual`, which its layers and its shortcut read: the sum of the two gradients.

    dy        the gradient from the layers
    shortcut  the step with the gradient from the shortcut: its dx, or the dy of an `Add`
    """

    shortcut: Step | None = None

    def forward(self) -> None:
        pass

    def backward(self, dx: DeviceArray) -> None:
        if dx.size:
            step: Any = self.shortcut
            other = step.dy if isinstance(step, Add) else step.dx
            self.ops.add(dx.reshape(-1), self.dy.reshape(-1), other.reshape(-1))

    def __repr__(self) -> str:
        return "fork"


class Add(Step):
    """The sum that ends a `Residual`.  Backward has nothing to do: dy is the gradient of both terms.

    x  the output of the layers     other  the output of the projection, or the input of the Residual
    """

    other: DeviceArray

    def forward(self) -> None:
        self.ops.add(self.y.reshape(-1), self.x.reshape(-1), self.other.reshape(-1))

    def backward(self, dx: DeviceArray) -> None:
        pass

    def __repr__(self) -> str:
        return "add"


class Value(NamedTuple):
    """An array between two steps, while a plan is built.

    y, dy   the array and its gradient     shape   without the batch axis
    needed  whether training needs the gradient
    step    that computes it; None for an input
    """

    y: DeviceArray
    dy: DeviceArray
    shape: Shape
    needed: bool
    step: Step | None


def _set_dy(step: Step, dy: DeviceArray) -> None:
    """Let a step read the gradient of its output from dy."""
    step.dy = dy
    if isinstance(step, Reshape):  # its dx is a view
        step.dx = dy.reshape(step.x.shape)
        if step.previous is not None:
            _set_dy(step.previous, step.dx)


class Plan:
    """The steps of `model` for `batch` images.

    unfused  nothing is fused, in place or shared: `backward` may be called many times after one `forward`
    x        the input of `forward`: (batch, *input_shape)
    y, dy    the output of `forward`, and its gradient, the input of `backward`
    dx       the gradient of x, an output of `backward` if asked for
    fused    whether a step is fused: each `backward` then needs its own `forward`
    evaluation  there is no `backward`; the model must be one that `can_fold`
    """

    def __init__(self, model: "Sequential", batch: int, unfused: bool = False, evaluation: bool = False) -> None:
        self.model, self.ops, self.batch, self.unfused, self.evaluation = model, model.ops, batch, unfused, evaluation
        self.specs, self.changes = choose_steps(model, batch, unfused, evaluation), model.changes.count
        self.trainable = _trainable(model)
        self.lanes: int = self.ops.layout.lanes_for(batch, model.dtype, evaluation) if self.ops.layout else 1
        self.steps: list[Step] = []
        self.mode: bool | None = None  # whether the last `forward` that was no replay was one of training
        self._replays: dict[bool, Replay] = {}
        try:
            self._build()
        except DeviceMemoryError as error:
            model.clear_plans()
            raise DeviceMemoryError(error.requested, error.free, self._memory_hint(error.free)) from error

    def _build(self) -> None:
        # Only one step reads a gradient, so two alternating buffers do, and stay in the cache.  The gradients of a
        # Residual's output and of its projection's input live longer: each has a buffer for each depth of nesting.
        self._turn = self._depth = 0
        self._largest = max(math.prod(shape) for pair in self.model.leaf_shapes for shape in pair)
        sums: list[tuple[Add, list[Step]]] = []  # with the last steps of its terms
        shape = self.model.shapes[0]
        self.x = self.new_array("x", shape, False)
        self.dx = self.new_array("gradient 0", shape, False, self._largest)
        chain = Value(self.x, self.dx, shape, False, None)
        for spec in self.specs:
            chain = self._build_step(spec, chain, sums)
        self.y, self.dy = chain.y, chain.dy
        for add, last_steps in reversed(sums):  # add.dy is final now: a fused step after it has its own
            for step in last_steps:
                _set_dy(step, add.dy)
        self.fused = any(step.fused for step in self.steps)
        trainable = [i for i, step in enumerate(self.steps) if step.trainable]
        self.first_trainable = trainable[0] if trainable else len(self.steps)  # index of the step

    def _build_step(self, spec: StepSpec, value: "Value", sums: list[tuple["Add", list[Step]]]) -> "Value":
        """Append the step of a spec, or the steps of a Residual.  Returns its output."""
        step_class, numbers, in_place = spec
        if step_class is Add:
            body, projection = numbers
            return self._build_residual(body, projection, in_place, value, sums)
        x, dx, blocked = value.y, value.dy, value.y.ndim == 5
        y, dy = x, dx
        shape = self.model.leaf_shapes[numbers[-1]][1] if numbers else value.shape
        if step_class is Reshape:
            y, dy = (array.reshape((self.batch, *shape)) for array in (x, dx))
        elif not in_place:
            blocked = (blocked or step_class is ReorderToBlocked) and step_class is not ReorderToNCHW
            y, dy = self.new_array(f"output {len(self.steps)}", shape, blocked), self._next_gradient(shape, blocked)
        step = step_class(self, numbers, x, y)
        if step.overwrites_x:
            assert value.step is not None
            dx = value.step.dy = x
        return self._append(step, dx, dy, shape, value)

    def _build_residual(
        self,
        body: list[StepSpec],
        projection: list[StepSpec],
        in_place: bool,
        value: "Value",
        sums: list[tuple["Add", list[Step]]],
    ) -> "Value":
        """Append the steps of a Residual.  In backward the projection runs first, then the layers, then the fork."""
        self._depth += 1
        x, blocked, gradient = value.y, value.y.ndim == 5, f"{{}} gradient {self._depth}"
        fork = Fork(self, (), x, x)
        result = forked = self._append(fork, value.dy, self._next_gradient(value.shape, blocked), value.shape, value)
        folded = body[-1][0] is FoldedSum
        for spec in [] if folded else body:
            result = self._build_step(spec, result, sums)
        other, last_steps = forked, [result.step]
        if projection:
            dx = self.new_array(gradient.format("projection"), value.shape, blocked, self._largest)
            first = len(self.steps)
            other = Value(x, dx, value.shape, value.needed, None)
            for spec in projection:
                other = self._build_step(spec, other, sums)
            last_steps.append(other.step)
            fork.shortcut = self.steps[first]
        if folded:  # the sum is part of the last step, so the projection comes first
            for spec in body:
                result = self._build_step(spec, result, sums)
            assert isinstance(result.step, FoldedSum)
            result.step.residual, self._depth = other.y, self._depth - 1
            return result
        shape, blocked = result.shape, result.y.ndim == 5
        add = Add(
            self, (), result.y, result.y if in_place else self.new_array(f"output {len(self.steps)}", shape, blocked)
        )
        add.other = other.y
        dy = self.new_array(gradient.format("sum"), shape, blocked, self._largest)
        fork.shortcut = fork.shortcut or add
        sums.append((add, [step for step in last_steps if step is not None]))
        self._depth -= 1
        return self._append(add, dy, dy, shape, result)._replace(needed=result.needed or other.needed)

    def _append(self, step: Step, dx: DeviceArray, dy: DeviceArray, shape: Shape, value: "Value") -> "Value":
        """Append a step whose input is `value`.  Returns its output."""
        step.dx, step.dy, step.needs_dx, step.previous = dx, dy, value.needed, value.step
        if not value.needed:
            step.no_grad_buffer = self.ops.empty((0, *step.x.shape[1:]), self.model.dtype)
        self.steps.append(step)
        return Value(step.y, dy, shape, value.needed or step.trainable, step)

    def _next_gradient(self, shape: Shape, blocked: bool) -> DeviceArray:
        self._turn = 1 - self._turn
        return self.new_array(f"gradient {self._turn}", shape, blocked, self._largest)

    def new_array(self, name: str, shape: Shape, blocked: bool, min_size: int = 0) -> DeviceArray:
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
        shapes, outputs = self.model.leaf_shapes, _outputs(self.specs)
        elements = math.prod(self.model.shapes[0]) + 2 * self._largest
        elements += sum(math.prod(shapes[number][1]) for number in outputs)
        per_image = self.model.dtype.itemsize * elements
        fits = f"a batch of {free // per_image} would fit" if free >= per_image else "and not even one image fits"
        return f"; the buffers of a batch of {self.batch} need {per_image * self.batch / 2**20:,.1f} MiB, {fits}"

    def is_current(self) -> bool:
        """Whether a new plan would have the same steps."""
        count = self.model.changes.count
        if self.changes != count:
            current = choose_steps(self.model, self.batch, self.unfused, self.evaluation), _trainable(self.model)
            if (self.specs, self.trainable) == current:
                self.changes = count
        return self.changes == count

    def forward(self, dry_run: bool = False) -> None:
        """Compute y from x.   dry_run: run only steps that are known to call only kernels"""
        self.mode = self.model.training
        for step in self.steps:
            if step.replayable or not dry_run:
                step.forward()

    def replay_forward(self) -> None:
        """`forward`, replayed on the CPU: for one image, Python's call overhead is as long as the kernels."""
        training = self.model.training
        if not self.ops.layout or training != self.mode:  # layers note for `backward` which statistics they used
            self.forward()
            return
        if training not in self._replays:
            self._replays[training] = Replay(self.ops, self.forward, *(layer for _, layer in self.model.leaves))
        self._replays[training]()

    def backward(self, input_gradient: bool = False, dry_run: bool = False) -> None:
        """Compute the parameters' gradients in `model.grad` from dy, and, with `input_gradient`, dx."""
        for step in reversed(self.steps):
            needs_dx = input_gradient or step.needs_dx
            if (needs_dx or step.trainable) and (step.replayable or not dry_run):
                step.backward(step.dx if needs_dx else step.no_grad_buffer)

    def to_host(self, array: DeviceArray) -> Array:
        """An array of a step as a new NumPy array (batch, ...)."""
        return np.array(self.ops.to_host(self.ops.layout.as_nchw(array) if array.ndim == 5 else array)[: self.batch])

    def __repr__(self) -> str:
        def line(step: Step, source: DeviceArray, result: DeviceArray) -> str:
            is_view = isinstance(step, (Reshape, Fork)) or (isinstance(step, Add) and source is step.dy)
            notes = {"fused": len(step.layers) > 1, "view": is_view, "in place": source is result, "": True}
            note = next(text for text, holds in notes.items() if holds)
            shapes = f"{tuple(source.shape)!s:>{shape_width}} -> {tuple(result.shape)!s:<{shape_width}}"
            return f"  {step!r:<{width}}  {shapes}  {note}".rstrip()

        width = max(len(repr(step)) for step in self.steps)
        shape_width = max(len(str(tuple(a.shape))) for step in self.steps for a in (step.x, step.y))
        kind = ", unfused" if self.unfused else ", evaluation" if self.evaluation else ""
        lines = [f"{self.batch} images, {self.model.dtype}{kind}", "forward"]
        lines += [line(step, step.x, step.y) for step in self.steps]
        if self.evaluation:
            return "\n".join(lines)
        lines += ["backward"]
        for step in reversed(self.steps):
            if step.needs_dx:
                lines.append(line(step, step.dy, step.dx))
            elif step.trainable:
                lines.append(f"  {step!r}  parameters only")
        return "\n".join(lines)
