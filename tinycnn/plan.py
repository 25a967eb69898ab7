"""What runs for a batch: the list of steps of a model, forward and backward, with every buffer.

    print(model.plan(64))

A plan is the one place that knows

- layouts: on the CPU, maps (C, H, W) of all but the smallest batches are *blocked*, (N / lanes, C, H, W, lanes): as
  many images as a vector register has lanes, interleaved pixel by pixel (kernels/layout.py).  Reorder steps lead there
  from plain order (N, C, H, W), and back.  Layers that are not this library's own work in plain order.
- fusion: an activation and the pooling after it become one step, which writes its gradients over its input.
- in-place use: an activation writes over its input where nobody reads that again.
- buffers: all but the smallest are shared by the plans of a model, which run one at a time.

An `unfused` plan does none of the last three.  After a pass, all inputs, outputs and gradients of layers can be read.
"""

import math
from typing import Any

import numpy as np

from tinycnn import _tracked
from tinycnn.errors import DeviceMemoryError
from tinycnn.layers import AvgPool2d, MaxPool2d, ReLU, ScaledTanh, Sigmoid, Tanh


def can_fuse(activation, pool):
    """Whether one kernel can do the work of both."""
    if type(pool) is AvgPool2d:
        halves = pool.kernel_size == pool.stride == (2, 2) and pool.padding == (0, 0) and not pool.ceil_mode
        return halves and type(activation) in (Tanh, Sigmoid, ReLU, ScaledTanh)
    # The maximum is taken first, so f must not fall: max f(x) = f(max x).
    apart = type(pool) is MaxPool2d and pool.kernel_size == pool.stride and pool.padding == (0, 0)
    return apart and type(activation) in (Tanh, Sigmoid, ReLU)


def choose_steps(model, batch, unfused=False):
    """The steps of a plan: tuples (class, numbers of layers, whether it works in place)."""
    k, layers, shapes = model.ops, model.layers, model.shapes
    blocks = k.layout is not None and k.layout.lanes_for(batch, model.dtype) > 1
    found: list[tuple] = []
    blocked = free = False  # free: nobody reads the array that the next step is given, once that is done
    number = 0
    while number < len(layers):
        layer, ours = layers[number], _tracked.is_builtin(layers[number])
        if layer.is_view and ours:
            found.append((ReorderToNCHW if blocked else Reshape, (number,), not blocked))
            blocked, number = False, number + 1
            continue
        if blocked != (blocks and ours and len(shapes[number]) == len(shapes[number + 1]) == 3):
            found.append((ReorderToNCHW if blocked else ReorderToBlocked, (), False))
            blocked, free = not blocked, number > 0
        in_place = free and not unfused and _says(layer, ours, "in_place", False)
        pair = layers[number : number + 2]
        if (
            in_place
            and blocked
            and k.fused
            and len(pair) == 2
            and all(map(_tracked.is_builtin, pair))
            and can_fuse(*pair)
        ):
            average = type(pair[1]) is AvgPool2d
            found.append((FusedAvgPool2d if average else FusedMaxPool2d, (number, number + 1), False))
            free, number = average, number + 2
        else:
            found.append((LayerStep, (number,), in_place))
            free, number = not in_place and not _says(layer, ours, "reads_output", True), number + 1
    return [*found, (ReorderToNCHW, (), False)] if blocked else found


def _says(layer, ours, name, default):
    """What a layer says of itself; a class that is not ours has to say it in its own body."""
    return getattr(layer, name) if ours else vars(type(layer)).get(name, default)


class Step:
    """What is done at once, forward and backward.

    layers    whose work it does, with their `numbers`; none for a reorder
    x, y      input and output     dx, dy   gradients of the loss by them
    All four are arrays as the kernels take them; `Plan.to_host` gives NumPy (N, ...).
    """

    fused = False
    dx: Any = None
    dy: Any = None

    def __init__(self, plan, numbers, x, y):
        self.ops, self.plan, self.numbers, self.x, self.y = plan.ops, plan, numbers, x, y
        self.layers = [plan.model.layers[number] for number in numbers]
        self.builtin = all(map(_tracked.is_builtin, self.layers))
        self.replayable = all(map(_tracked.is_replayable, self.layers))

    def forward(self):
        raise NotImplementedError

    def backward(self, dx):
        """Write the gradient of x into dx; one of size 0 is not wanted."""
        raise NotImplementedError

    def __repr__(self):
        return " + ".join(f"{n} {layer!r}" for n, layer in zip(self.numbers, self.layers, strict=True))


class LayerStep(Step):
    """A layer does its own work."""

    def __init__(self, plan, numbers, x, y):
        super().__init__(plan, numbers, x, y)
        (self.layer,) = self.layers
        rooms = [len(x) * (plan.lanes if x.ndim == 5 else 1), plan.model.max_batch]
        what = plan.model.shapes[numbers[0]], plan.model.dtype
        self.saved = self.layer.reserve(plan.ops, rooms[0], *what)
        if self.saved is not None:
            self.saved.images = plan.batch
        elif not self.builtin:  # it keeps its buffers itself, and serves other plans too
            self.layer.reserve(plan.ops, max(rooms), *what)

    def forward(self):
        vars(self.layer)["saved"] = self.saved
        self.layer.forward(self.y, self.x)

    def backward(self, dx):
        vars(self.layer)["saved"] = self.saved
        self.layer.backward(dx, self.dy, self.x, self.y)


class FusedAvgPool2d(Step):
    """An activation, which writes over x, and the mean of windows of 2 x 2."""

    fused = True

    def __init__(self, plan, numbers, x, y):
        super().__init__(plan, numbers, x, y)
        self.activation, self.pool = self.layers

    def forward(self):
        self.ops.fused.avg_pool_forward(self.y, self.x, self.activation.activation_code, self.pool.divisor or 4)

    def backward(self, dx):
        self.ops.fused.avg_pool_backward(dx, self.dy, self.activation.activation_code, self.pool.divisor or 4)


class FusedMaxPool2d(Step):
    """The maximum of windows, and an activation of it."""

    fused = True

    def __init__(self, plan, numbers, x, y):
        super().__init__(plan, numbers, x, y)
        self.activation, self.pool = self.layers
        self.indices = plan.ops.empty(y.shape, np.int32)

    def forward(self):
        self.ops.fused.max_pool_forward(self.y, self.indices, self.x, self.activation.activation_code, *self.pool.window)

    def backward(self, dx):
        formula = self.activation.activation_code
        self.ops.fused.max_pool_backward(dx, self.dy, self.indices, self.y, formula, *self.pool.window)


class Reshape(Step):
    """The same numbers under another shape."""

    def forward(self):
        pass

    def backward(self, dx):
        pass


class ReorderToBlocked(Step):
    """Reorder: x in plain order, y blocked."""

    def forward(self):
        self.ops.layout.to_blocked(self.y, self.x)

    def backward(self, dx):
        self.ops.layout.to_nchw(dx, self.dy)

    def __repr__(self):
        return "reorder to blocked"


class ReorderToNCHW(Step):
    """Reorder: x blocked, y in plain order, which may be flat."""

    def forward(self):
        self.ops.layout.to_nchw(self.y.reshape((len(self.y), *self.x.shape[1:4])), self.x)

    def backward(self, dx):
        self.ops.layout.to_blocked(dx, self.dy.reshape((len(self.dy), *dx.shape[1:4])))

    def __repr__(self):
        return f"reorder to NCHW {super().__repr__()}".rstrip()


class Plan:
    """The steps of `model` for `batch` images.

    unfused   nothing is fused, written over or shared: one `forward` serves as many `backward` as wanted
    x      where `forward` reads images: (batch, *input_shape)
    y, dy  where it leaves the output, and where `backward` reads its gradient
    dx     where `backward` leaves the gradient of x, if asked to
    fused  whether a step is, so that one `forward` serves one `backward`
    """

    def __init__(self, model, batch, unfused=False):
        self.model, self.ops, self.batch, self.unfused = model, model.ops, batch, unfused
        self.specs, self.changes = choose_steps(model, batch, unfused), model.changes.count
        self.lanes = self.ops.layout.lanes_for(batch, model.dtype) if self.ops.layout else 1
        self.steps: list[Any] = []
        self._replays: dict[bool, _tracked.Replay] = {}
        try:
            self._build()
        except DeviceMemoryError as error:
            model.clear_plans()
            sizes = [math.prod(shape) for shape in model.shapes]
            made = [numbers[-1] for _, numbers, in_place in self.specs if numbers and not in_place]
            image, free = (
                model.dtype.itemsize * (sizes[0] + sum(sizes[n + 1] for n in made) + 2 * max(sizes)),
                error.free,
            )
            more = f"; the buffers of a batch of {batch} need {image * batch / 2**20:,.1f} MiB, "
            more += f"a batch of {free // image} would fit" if free >= image else "and not even one image fits"
            raise DeviceMemoryError(error.requested, free, more) from error

    def _build(self):
        shapes = self.model.shapes
        # Gradients are needed by one step only, and take turns in two arrays: what lies in the cache is not fetched
        # from memory.
        most, turn, shape = max(map(math.prod, shapes)), 0, shapes[0]
        self.x = value = self._array("x", shape, False)
        self.dx = gradient = self._array("gradient 0", shape, False, most)
        for at, (kind, numbers, in_place) in enumerate(self.specs):
            x, dx, blocked = value, gradient, value.ndim == 5
            shape = shapes[numbers[-1] + 1] if numbers else shape
            if kind is Reshape:
                value, gradient = (array.reshape((self.batch, *shape)) for array in (x, dx))
            elif not in_place:
                blocked, turn = (blocked or kind is ReorderToBlocked) and kind is not ReorderToNCHW, 1 - turn
                value = self._array(f"output {at}", shape, blocked)
                gradient = self._array(f"gradient {turn}", shape, blocked, most)
            step = kind(self, numbers, x, value)
            if step.fused:
                dx = self.steps[-1].dy = x
            step.dx, step.dy = dx, gradient
            self.steps.append(step)
        self.y, self.dy = value, gradient
        self.fused = any(step.fused for step in self.steps)
        trainable = (at for at, step in enumerate(self.steps) if any(one.parameter_shapes() for one in step.layers))
        self.first_trainable = next(trainable, len(self.steps))  # of the steps that training goes back to
        last = self.steps[min(self.first_trainable, len(self.steps) - 1)]
        self.no_grad_buffer = self.ops.empty((0, *last.x.shape[1:]), self.model.dtype)

    def _array(self, name, shape, blocked, most=0):
        """Room for a batch of `shape`; shared, and large enough for `most` numbers an image, unless all is kept."""
        slots = -(-self.batch // self.lanes) * self.lanes
        size = math.prod(shape) * (slots if blocked else self.batch)
        flat = (
            self.ops.empty((size,), self.model.dtype)
            if self.unfused
            else self.model.shared_buffer(name, max(size, slots * most))
        )
        return flat[:size].reshape((slots // self.lanes, *shape, self.lanes) if blocked else (self.batch, *shape))

    def is_current(self):
        """Whether it would be the same if it were made now."""
        if self.changes != self.model.changes.count and self.specs == choose_steps(
            self.model, self.batch, self.unfused
        ):
            self.changes = self.model.changes.count
        return self.changes == self.model.changes.count

    def forward(self, dry_run=False):
        """From x to y.   dry_run: only what is known to be made of kernels"""
        for step in self.steps:
            if step.replayable or not dry_run:
                step.forward()

    def replay_forward(self):
        """`forward`, replayed on the CPU, where finding the kernels for a single image takes as long as they do."""
        mode = self.model.training
        if mode not in self._replays:
            self._replays[mode] = _tracked.Replay(self.ops, self.forward, *self.model.layers)
        self._replays[mode]() if self.ops.layout else self.forward()

    def backward(self, input_gradient=False, dry_run=False):
        """From dy to the parameters' gradients in `model.grad`, and, with `input_gradient`, to dx."""
        first = 0 if input_gradient else self.first_trainable
        for at in range(len(self.steps) - 1, first - 1, -1):
            step = self.steps[at]
            if step.replayable or not dry_run:
                step.backward(step.dx if at > first or input_gradient else self.no_grad_buffer)

    def to_host(self, array):
        """One of the steps' arrays as a new NumPy array (batch, ...)."""
        return np.array(self.ops.to_host(self.ops.layout.as_nchw(array) if array.ndim == 5 else array)[: self.batch])

    def __repr__(self):
        def line(step, text, source, result):
            how = "fused" if step.fused else "view" if type(step) is Reshape else "in place" if source is result else ""
            shapes = f"{tuple(source.shape)!s:>{shape}} -> {tuple(result.shape)!s:<{shape}}"
            return f"  {text:<{width}}  {shapes}  {how}".rstrip()

        width = max(len(repr(step)) for step in self.steps)
        shape = max(len(str(tuple(a.shape))) for step in self.steps for a in (step.x, step.y))
        lines = [f"{self.batch} images, {self.model.dtype}{', unfused' if self.unfused else ''}", "forward"]
        lines += [line(step, repr(step), step.x, step.y) for step in self.steps]
        lines += ["backward"]
        lines += [line(step, repr(step), step.dy, step.dx) for step in self.steps[: self.first_trainable : -1]]
        lines += (
            [f"  {self.steps[self.first_trainable]!r}  parameters only"]
            if self.first_trainable < len(self.steps)
            else []
        )
        return "\n".join(lines)
