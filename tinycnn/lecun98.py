"""LeNet-5 of 1998: the layers, the output code, the losses, the optimizer and the network of LeCun, Bottou, Bengio and
Haffner, "Gradient-based learning applied to document recognition", sections II.B, II.C and III.B.

Where the paper is ambiguous there is an option, or a choice marked as ours.
"""

import functools
import math
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, DTypeLike

from tinycnn import _check, init
from tinycnn._typing import Array, Backend, DeviceArray, DType, Pair, Rng, Shape, Views
from tinycnn.dataset import DeviceDataset
from tinycnn.layers import AvgPool2d, Conv2d, Flatten, Layer, Linear, MaxPool2d, ScaledTanh
from tinycnn.losses import _ClassLoss
from tinycnn.model import Sequential
from tinycnn.optim import Optimizer

BACKGROUND, FOREGROUND = -0.1, 1.175  # pixel values, section II.B: images of 28 x 28 in the middle of 32 x 32
RUBBISH = 1.0  # j of eq. 9, which the paper calls a positive constant: our choice

# Table I: the input maps in S2 of each of the sixteen maps of C3.
TABLE_I = (
    "012", "123", "234", "345", "045", "015",
    "0123", "1234", "2345", "0345", "0145", "0125", "0134", "1245", "0235",
    "012345",
)  # fmt: skip

# Figure 3: the digits as bitmaps, 7 wide and 12 high.  A row is a seven-bit number; its high bit is the left pixel.
BITMAP_ROWS = (
    "3e 00 1c 36 63 63 63 63 36 1c 00 00", "0c 1c 3c 0c 0c 0c 0c 0c 0c 3f 00 00",
    "3e 00 3e 63 43 06 1c 30 60 7f 00 00", "7f 03 06 0c 1e 03 03 03 63 3e 00 00",
    "3e 00 00 33 33 73 63 63 67 3f 03 03", "3e 00 7f 60 60 3c 1e 03 63 3e 00 00",
    "1e 30 60 60 7e 73 63 63 73 3e 00 00", "7f 03 03 06 0c 0c 18 18 18 18 00 00",
    "3e 63 63 63 3e 63 63 63 63 3e 00 00", "3e 67 63 63 67 3f 03 03 06 3c 00 00",
)  # fmt: skip


def connections() -> Array:
    """Table I as a boolean array (6, 16): whether a map of S2 is an input of a map of C3."""
    return np.array([[str(c) in inputs for inputs in TABLE_I] for c in range(6)])


def cyclic(inputs: int, outputs: int, pairs: int) -> Array:
    """Connections (inputs, outputs) of `pairs` pairs of maps: output o reads the maps o, o + 1, ... modulo `inputs`.

    The outputs read pairs // outputs maps each, the first of them one more if that leaves a rest.
    Raises ValueError unless every output gets between 1 and `inputs` maps.
    """
    counts = [len(part) for part in np.array_split(np.arange(pairs), outputs)]
    if not 1 <= min(counts) <= max(counts) <= inputs:
        raise ValueError(f"pairs must be from {outputs} to {inputs * outputs}, got {pairs}")
    return np.array([[(i - o) % inputs < count for o, count in enumerate(counts)] for i in range(inputs)])


def bitmaps() -> Array:
    """The ten target codes of F6: (10, 84), 1 where a pixel is black and -1 elsewhere, row by row."""
    rows = np.array([[int(row, 16) for row in digit.split()] for digit in BITMAP_ROWS])
    bits = rows[:, :, None] >> np.arange(6, -1, -1) & 1
    return np.where(bits.reshape(10, 84) == 1, 1.0, -1.0)


def places() -> Array:
    """Target codes of ten outputs, one a class: (10, 10), 1 for the output of the class and -1 for the others."""
    return 2 * np.eye(10) - 1


# --- layers -----------------------------------------------------------------------------------------------------------


class Subsample(Layer):
    """S2 and S4: the sum of each k x k window times a coefficient plus a bias, one of each per map.

    (C, H, W) -> (C, H // k, W // k)   pool: "sum", as in section II.B, or "mean", as in section II.A
    """

    weight: DeviceArray  # these four are views, set by `bind`
    bias: DeviceArray
    weight_grad: DeviceArray
    bias_grad: DeviceArray

    def __init__(self, channels: int, kernel_size: Pair = 2, pool: str = "sum") -> None:
        self.channels = _check.integer("channels", channels, 1)
        self.kernel_size = _check.pair("kernel_size", kernel_size, 1)
        self.pool = _check.choice("pool", pool, ("sum", "mean"))
        self.scale = 1.0 if pool == "sum" else 1 / math.prod(self.kernel_size)

    def parameter_shapes(self) -> dict[str, Shape]:
        return {"weight": (self.channels,), "bias": (self.channels,)}

    def initial_parameters(self, rng: np.random.Generator) -> dict[str, Array]:
        bound = 1 / math.sqrt(self.fan_in())
        return {name: rng.uniform(-bound, bound, shape) for name, shape in self.parameter_shapes().items()}

    def fan_in(self) -> int:
        return math.prod(self.kernel_size)

    def broadcast_to_weight(self, values: Any) -> Any:
        return values

    def output_shape(self, shape: Shape) -> Shape:
        _, *size = _check.map_input(self, shape, self.channels)
        return (self.channels, *_check.conv_output_size(size, self.kernel_size, self.kernel_size, (0, 0), (1, 1)))

    def multiply_adds(self, shape: Shape) -> int:
        return math.prod(self.output_shape(shape)) * (self.fan_in() + 1)

    def forward(self, y: DeviceArray, x: DeviceArray) -> None:
        self.ops.subsample_forward(y, x, self.weight, self.bias, self.kernel_size, self.scale)

    def backward(self, dx: DeviceArray, dy: DeviceArray, x: DeviceArray, y: DeviceArray) -> None:
        self.ops.subsample_backward(
            dx, self.weight_grad, self.bias_grad, dy, x, self.weight, self.kernel_size, self.scale
        )

    def curvature(
        self,
        hx: DeviceArray,
        hweight: DeviceArray,
        hbias: DeviceArray,
        hy: DeviceArray,
        x: DeviceArray,
        squared_weight: DeviceArray,
    ) -> None:
        """See `gauss_newton_diagonal`.  hweight uses the square of each window's sum, not the sum of squares."""
        sums = self.ops.empty(hy.shape, hy.dtype)
        ones, zeros = (self.ops.to_device(np.full(self.channels, value, hy.dtype)) for value in (1, 0))
        self.ops.subsample_forward(sums, x, ones, zeros, self.kernel_size, self.scale)
        squares = self.ops.to_device(np.square(self.ops.to_host(sums)))
        no_dx = self.ops.empty((0, *hy.shape[1:]), hy.dtype)
        self.ops.subsample_backward(no_dx, hweight, hbias, hy, squares, ones, (1, 1), 1.0)
        if hx.size:
            unused = [self.ops.empty((self.channels,), hy.dtype) for _ in range(2)]
            self.ops.subsample_backward(hx, *unused, hy, x, squared_weight, self.kernel_size, self.scale**2)

    def extra_repr(self) -> str:
        return f"{self.channels}, kernel_size={self.kernel_size}, pool={self.pool!r}"


class MappedConv2d(Layer):
    """C3: a convolution in which each output map reads a subset of the input maps; other pairs are not computed.

    connections  (in_channels, out_channels) booleans; every map must be connected
    weight: (pairs, KH, KW), in the order of outputs and then of inputs   bias: (out_channels,)
    """

    weight: DeviceArray  # these six are set by `bind`
    bias: DeviceArray
    weight_grad: DeviceArray
    bias_grad: DeviceArray
    _sources: DeviceArray
    _starts: DeviceArray

    def __init__(self, connections: ArrayLike, kernel_size: Pair) -> None:
        table = np.asarray(connections)
        if table.ndim != 2 or not table.size or table.dtype != np.bool_:
            raise ValueError(
                f"connections must be a table (in_channels, out_channels) of booleans, got shape {table.shape}, "
                f"dtype {table.dtype}"
            )
        for axis, role in ((1, "input"), (0, "output")):
            unconnected = np.flatnonzero(~table.any(axis))
            if unconnected.size:
                raise ValueError(f"connections must reach every map, got none for {role} map {unconnected[0]}")
        self.in_channels, self.out_channels = table.shape
        self.kernel_size = _check.pair("kernel_size", kernel_size, 1)
        self.table = table
        self._inputs_per_map: Array = table.sum(axis=0)  # (out_channels,)

    def config_overrides(self) -> dict[str, Any]:
        return {"connections": self.table}

    def parameter_shapes(self) -> dict[str, Shape]:
        return {"weight": (int(self.table.sum()), *self.kernel_size), "bias": (self.out_channels,)}

    def fan_in(self) -> Array:
        """Inputs of a unit of each output map, (out_channels,)."""
        fan_in: Array = self._inputs_per_map * math.prod(self.kernel_size)
        return fan_in

    def broadcast_to_weight(self, values: Array) -> Array:
        return np.repeat(values, self._inputs_per_map)[:, None, None]

    def initial_parameters(self, rng: np.random.Generator) -> dict[str, Array]:
        bound = 1 / np.sqrt(self.fan_in())
        weight = rng.uniform(-1, 1, self.parameter_shapes()["weight"]) * self.broadcast_to_weight(bound)
        return {"weight": weight, "bias": rng.uniform(-1, 1, self.out_channels) * bound}

    def initial_buffers(self, dtype: DType) -> dict[str, Array]:
        sources = np.nonzero(self.table.T)[1]
        starts = np.concatenate([[0], np.cumsum(self._inputs_per_map)])
        return {"_sources": sources.astype(np.int64), "_starts": starts.astype(np.int64)}

    def output_shape(self, shape: Shape) -> Shape:
        _, *size = _check.map_input(self, shape, self.in_channels)
        return (self.out_channels, *_check.conv_output_size(size, self.kernel_size, (1, 1), (0, 0), (1, 1)))

    def multiply_adds(self, shape: Shape) -> int:
        return math.prod(self.output_shape(shape)[1:]) * math.prod(self.parameter_shapes()["weight"])

    def forward(self, y: DeviceArray, x: DeviceArray) -> None:
        self.ops.conv2d_map_forward(y, x, self.weight, self.bias, self._sources, self._starts)

    def backward(self, dx: DeviceArray, dy: DeviceArray, x: DeviceArray, y: DeviceArray) -> None:
        self.ops.conv2d_map_backward(
            dx, self.weight_grad, self.bias_grad, dy, x, self.weight, self._sources, self._starts
        )

    def extra_repr(self) -> str:
        pairs = int(self.table.sum())
        return f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, pairs={pairs}"


class EuclideanRBF(Layer):
    """The output layer, eq. 7: squared Euclidean distances to fixed centres.  The smallest is the prediction.

    (F,) -> (K,)   centres: (K, F), not trained: the buffer "weight" of a state_dict
    """

    weight: DeviceArray  # set by `bind`

    def __init__(self, centres: ArrayLike) -> None:
        self.centres = _check.finite("centres", _check.array("centres", centres, 2, "(classes, features)"))

    def initial_buffers(self, dtype: DType) -> dict[str, Array]:
        return {"weight": np.ascontiguousarray(self.centres, dtype)}

    def bind(self, ops: Backend, parameters: Views, gradients: Views, dtype: DType) -> None:
        super().bind(ops, parameters, gradients, dtype)
        self._no_grad_buffer = ops.empty((0, self.centres.shape[1]), dtype)

    def output_shape(self, shape: Shape) -> Shape:
        _check.vector_input(self, shape, self.centres.shape[1])
        return (len(self.centres),)

    def multiply_adds(self, shape: Shape) -> int:
        return self.centres.size

    def forward(self, y: DeviceArray, x: DeviceArray) -> None:
        self.ops.squared_distance_forward(y, x, self.weight)

    def backward(self, dx: DeviceArray, dy: DeviceArray, x: DeviceArray, y: DeviceArray) -> None:
        self.ops.squared_distance_backward(dx, self._no_grad_buffer, dy, x, self.weight)

    def input_curvature(self, criterion: Any, x: DeviceArray, y: DeviceArray, dy: DeviceArray, scale: float) -> Array:
        """Second derivatives of the loss with respect to x, NumPy: sum over i of dE/dy_i y_i'' + d2E/dy_i2 (y_i')^2,
        with y_i'' = 2."""
        x, y, dy = (np.asarray(self.ops.to_host(a), np.float64) for a in (x, y, dy))
        if getattr(criterion, "target_curvature", False):
            return np.full_like(x, 2 * criterion.factor * scale)
        h: Array = np.broadcast_to(2 * dy.sum(axis=1, keepdims=True), x.shape).copy()
        hy = criterion.curvature(y, scale)
        for i, centre in enumerate(self.centres):
            h += hy[:, i : i + 1] * (2 * (x - centre)) ** 2
        positive: Array = np.maximum(h, 0)
        return positive

    def extra_repr(self) -> str:
        return f"{self.centres.shape[1]}, {self.centres.shape[0]}"


# --- loss -------------------------------------------------------------------------------------------------------------


class RBFLoss(_ClassLoss):
    """Loss of distances (N, K) against class numbers (N,).  The smallest distance is the prediction.

    rubbish           None: eq. 8, the distance to the target.  A number j: eq. 9, which also increases the other
                      distances
    reduction         "mean" or "sum"
    factor            of the squared distances: 1 as in eq. 7, or 1/2 as in EBLearn's `edist_cost`
    target_curvature  take the second derivatives for `SDLM` from eq. 8 with eq. 9 too, as `edist_cost` does
    """

    output_kind = "distances"

    def __init__(
        self,
        rubbish: float | None = None,
        reduction: str = "mean",
        *,
        factor: float = 1.0,
        target_curvature: bool = False,
    ) -> None:
        self.rubbish = None if rubbish is None else _check.number("rubbish", rubbish, 0)
        self.reduction = _check.choice("reduction", reduction, ("mean", "sum"))
        self.factor = _check.number("factor", factor, 1e-12)
        self.target_curvature = bool(target_curvature)

    def forward_backward(self, dx: DeviceArray, x: DeviceArray, target: DeviceArray) -> None:
        n, rubbish = len(x), -1.0 if self.rubbish is None else self.rubbish
        loss, predicted, mean = self._loss[:n], self._predicted[:n], self.reduction == "mean"
        self.ops.rbf_loss(loss, predicted, dx, x, target, rubbish, self.factor, mean)

    def logits(self, outputs: Array) -> Array:
        return -self.factor * outputs

    def curvature(self, y: Array, share: float) -> Array:
        """Second derivatives of `share` times each image's loss with respect to its distances y: (N, K) NumPy."""
        if self.rubbish is None:
            return np.zeros_like(y)  # eq. 8 is linear
        y = self.factor * y
        smallest = np.minimum(y.min(axis=1, keepdims=True), self.rubbish)
        p = np.exp(smallest - y)
        p /= p.sum(axis=1, keepdims=True) + np.exp(smallest - self.rubbish)
        curvature: Array = share * self.factor**2 * p * (1 - p)
        return curvature

    def __call__(self, distances: ArrayLike, target: ArrayLike) -> tuple[float, Array]:
        """(value, gradient with respect to the distances)."""
        return self._loss_and_grad("distances", distances, target)


# --- the stochastic diagonal Levenberg-Marquardt method: section III.B, appendix C ------------------------------------

MU = 0.02
PATTERNS = 500  # images on which second derivatives are estimated before each pass
SCHEDULE = (5e-4,) * 2 + (2e-4,) * 3 + (1e-4,) * 3 + (5e-5,) * 4 + (1e-5,) * 8  # eta of each of twenty passes


class SDLM(Optimizer):
    """theta[k] -= eta / (mu + h[k]) * grad[k], with h[k] the mean second derivative of the loss in parameter k.

    lr         eta: a number, or an array with one per step; an epoch uses the rate of its first step
    patterns   number of images on which `fit` estimates h before each epoch; without `fit`, call
               `estimate_step_sizes` before the first step
    """

    vectors = ("step_sizes",)  # eta / (mu + h), one per parameter
    step_sizes: DeviceArray

    def __init__(
        self, model: Sequential, lr: ArrayLike = SCHEDULE[0], mu: float = MU, patterns: int = PATTERNS
    ) -> None:
        super().__init__(model, lr, 0.0)
        self.mu = _check.number("mu", mu, 1e-12)
        self.patterns = _check.integer("patterns", patterns, 1)

    def before_epoch(self, criterion: Any, dataset: DeviceDataset, rng: np.random.Generator) -> None:
        self.estimate_step_sizes(criterion, dataset, rng.integers(0, len(dataset), self.patterns))

    def estimate_step_sizes(self, criterion: Any, dataset: DeviceDataset, index: Array) -> None:
        """Estimate h on the images `index` of `dataset` and set the step sizes for the learning rate of this step."""
        h = gauss_newton_diagonal(self.model, criterion, dataset, index)
        self.ops.copy_to(self.step_sizes, (self.lr / (self.mu + h)).astype(self.model.dtype))

    def step(self) -> None:
        self.prepare()
        self.ops.sgd_per_parameter(self.model.theta, self.model.grad, self.step_sizes, self._step)


def gauss_newton_diagonal(model: Sequential, criterion: Any, dataset: DeviceDataset, index: Array) -> Array:
    """Diagonal Gauss-Newton approximation of the Hessian of the loss, float64, (P,): the mean over the images `index`.

    With h the second derivative with respect to a unit's weighted sum a or its output x, and u its weights, the
    recursion of appendix C is (it drops the term with f'', so that h is positive)

        h_a = f'(a)^2 h_x,    h_x[j] = sum over i of u[i, j]^2 h_a[i],    h_u[i, j] = h_a[i] x[j]^2,

    summed over the connections that scale a weight.  That is backpropagation with squared weights and inputs, so the
    layers' own backward kernels compute it; an activation's is applied twice.
    """
    ops, n = model.ops, len(index)
    if not hasattr(criterion, "curvature"):
        raise ValueError(f"the second derivatives of {type(criterion).__name__} are not implemented")
    if any(layer.named_children() for layer in model.layers):
        raise ValueError("second derivatives of a Residual are not implemented")
    if model.input_shape is None:
        model.set_input_shape(dataset.image_shape)
    with model.lock:
        model.discard_forward()
        plan = model.plan(n, unfused=True)
        target = dataset.gather(plan.x, ops.to_device(np.asarray(index, np.int64)))
        plan.forward()
        criterion.ensure_allocated(ops, n, model.shapes[-1][-1], model.dtype)
        criterion.forward_backward(plan.dy, plan.y, target)
        scale = 1 / n if criterion.reduction == "mean" else 1.0
        steps, output = plan.steps[plan.first_trainable :], model.layers[-1]
        if isinstance(output, EuclideanRBF):  # quadratic in its input: outside the recursion
            last = plan.steps[-1]
            ops.copy_to(last.dx, output.input_curvature(criterion, last.x, last.y, last.dy, scale))
            steps.pop()
        else:
            ops.copy_to(plan.dy, criterion.curvature(np.asarray(ops.to_host(plan.y), np.float64), scale))
        diagonal: dict[tuple[int, str], Array] = {}  # by number of the layer and name of the parameter
        for step in reversed(steps):
            hx, hy, x, y = step.dx if step.needs_dx else step.no_grad_buffer, step.dy, step.x, step.y
            layer: Any = step.layers[0] if step.layers else None
            if isinstance(layer, AvgPool2d):  # linear: the coefficients squared
                window = layer.kernel_size, layer.stride, layer.padding, layer.count_include_pad
                ops.avg_pool2d_backward(hx, hy, *window, (layer.divisor or math.prod(layer.kernel_size)) ** 2)
            elif layer is None or not layer.parameter_shapes():
                step.backward(hx)
                if layer is not None and not isinstance(layer, Flatten | MaxPool2d):  # an activation: f' times f'
                    layer.backward(hx, hx, x, y)
            else:
                shapes = layer.parameter_shapes()
                squared_weight = ops.to_device(np.square(ops.to_host(layer.weight)))
                h = {name: ops.empty(shape, model.dtype) for name, shape in shapes.items()}
                hbias = h.get("bias", ops.empty((0,), model.dtype))
                curvature = getattr(layer, "curvature", functools.partial(_squared_backward, layer))
                curvature(hx, h["weight"], hbias, hy, x, squared_weight)
                diagonal |= {(step.numbers[0], name): np.ravel(ops.to_host(value)) for name, value in h.items()}
    layers = enumerate(layer for _, layer in model.leaves)
    ordered = [
        diagonal.get((number, name), np.full(math.prod(shape), np.inf))  # below the first trained layer: no step
        for number, layer in layers
        for name, shape in layer.parameter_shapes().items()
    ]
    return np.concatenate(ordered).astype(np.float64) / (n * scale)


def _squared_backward(
    layer: Any,
    hx: DeviceArray,
    hweight: DeviceArray,
    hbias: DeviceArray,
    hy: DeviceArray,
    x: DeviceArray,
    squared_weight: DeviceArray,
) -> None:
    """The layer's backward pass with its weights and inputs squared."""
    previous = {name: getattr(layer, name) for name in ("weight", "weight_grad", "bias_grad")}
    vars(layer).update(weight=squared_weight, weight_grad=hweight, bias_grad=hbias)
    try:
        layer.backward(hx, hy, layer.ops.to_device(np.square(layer.ops.to_host(x))), None)
    finally:
        vars(layer).update(previous)


# --- the network ------------------------------------------------------------------------------------------------------


def lenet5(pool: str = "mean", *, rng: Rng = None, dtype: DTypeLike = np.float32, device: str = "cpu") -> Sequential:
    """LeNet-5 of 1998, for images (1, 32, 32): 60,000 parameters, 340,908 connections.

    The initial parameters are those of the recipe `lecun1998`; `init.lecun1998` draws other readings of the paper.
    """
    rng = _check.generator("rng", rng)
    model = Sequential(
        Conv2d(1, 6, 5), ScaledTanh(), Subsample(6, 2, pool), ScaledTanh(),
        MappedConv2d(connections(), 5), ScaledTanh(), Subsample(16, 2, pool), ScaledTanh(),
        Conv2d(16, 120, 5), ScaledTanh(), Flatten(), Linear(120, 84), ScaledTanh(), EuclideanRBF(bitmaps()),
        input_shape=(1, 32, 32), rng=rng, dtype=dtype, device=device,
    )  # fmt: skip
    average = 1.0 if pool == "mean" else 0.25  # the coefficient that makes S2 and S4 the mean of their windows
    init.lecun1998(model, root=True, gain=math.sqrt(3), coefficient=average, biases=True, rng=rng)
    return model


def count_connections(model: Sequential) -> int:
    """Connections as the paper counts them: every input, bias and centre of every unit."""
    count = 0
    for layer, shape in zip(model.layers, model.shapes[1:], strict=True):
        if isinstance(layer, MappedConv2d):
            count += math.prod(shape[1:]) * sum(math.prod(s) for s in layer.parameter_shapes().values())
        elif isinstance(layer, Subsample):
            count += math.prod(shape) * (layer.fan_in() + 1)
        elif isinstance(layer, EuclideanRBF):
            count += layer.centres.size
        elif layer.parameter_shapes():
            count += math.prod(shape) * (math.prod(layer.parameter_shapes()["weight"][1:]) + 1)
    return count
