"""LeNet-5 as it was in 1998: the layers, the output code, the losses and the network of LeCun, Bottou, Bengio and
Haffner, "Gradient-based learning applied to document recognition", sections II.B and II.C.

What the paper leaves open is a switch, or said to be our choice.
"""

import functools
import math
from typing import Any

import numpy as np

from tinycnn import _check, init
from tinycnn.layers import AvgPool2d, Conv2d, Flatten, Layer, Linear, MaxPool2d, ScaledTanh
from tinycnn.losses import Loss
from tinycnn.model import Sequential
from tinycnn.optim import Optimizer

BACKGROUND, FOREGROUND = -0.1, 1.175  # pixels, section II.B: images of 28 x 28 in the middle of 32 x 32
RUBBISH = 1.0  # j of eq. 9, which the paper calls a positive constant: our choice

# Table I: the maps of S2 that each of the sixteen maps of C3 sees.
TABLE = (
    "012", "123", "234", "345", "045", "015",
    "0123", "1234", "2345", "0345", "0145", "0125", "0134", "1245", "0235",
    "012345",
)  # fmt: skip

# Figure 3: the digits as bitmaps, 7 wide and 12 high.  A row is a number of seven bits, the left pixel first.
BITMAP_ROWS = (
    "3e 00 1c 36 63 63 63 63 36 1c 00 00", "0c 1c 3c 0c 0c 0c 0c 0c 0c 3f 00 00",
    "3e 00 3e 63 43 06 1c 30 60 7f 00 00", "7f 03 06 0c 1e 03 03 03 63 3e 00 00",
    "3e 00 00 33 33 73 63 63 67 3f 03 03", "3e 00 7f 60 60 3c 1e 03 63 3e 00 00",
    "1e 30 60 60 7e 73 63 63 73 3e 00 00", "7f 03 03 06 0c 0c 18 18 18 18 00 00",
    "3e 63 63 63 3e 63 63 63 63 3e 00 00", "3e 67 63 63 67 3f 03 03 06 3c 00 00",
)  # fmt: skip


def connections():
    """Table I as a boolean array (6, 16): whether a map of S2 is seen by a map of C3."""
    return np.array([[str(c) in seen for seen in TABLE] for c in range(6)])


def bitmaps():
    """The ten target codes of F6: (10, 84), 1 where a pixel is black and -1 elsewhere, row by row."""
    rows = np.array([[int(row, 16) for row in digit.split()] for digit in BITMAP_ROWS])
    bits = rows[:, :, None] >> np.arange(6, -1, -1) & 1
    return np.where(bits.reshape(10, 84) == 1, 1.0, -1.0)


# --- layers -----------------------------------------------------------------------------------------------------------


class Subsample(Layer):
    """S2 and S4: windows side by side, their sum times a coefficient plus a bias, one of each a map.

    (C, H, W) -> (C, H // k, W // k)   pool: "sum", as section II.B says, or "mean", as section II.A does
    """

    weight: Any  # these four are views, set by `bind`
    bias: Any
    weight_grad: Any
    bias_grad: Any

    def __init__(self, channels, kernel_size=2, pool="sum"):
        self.channels = _check.integer("channels", channels, 1)
        self.kernel_size = _check.pair("kernel_size", kernel_size, 1)
        self.pool = _check.choice("pool", pool, ("sum", "mean"))
        self.scale = 1.0 if pool == "sum" else 1 / math.prod(self.kernel_size)

    def parameter_shapes(self):
        return {"weight": (self.channels,), "bias": (self.channels,)}

    def initial_parameters(self, rng):
        bound = 1 / math.sqrt(self.fan_in())
        return {name: rng.uniform(-bound, bound, shape) for name, shape in self.parameter_shapes().items()}

    def fan_in(self):
        return math.prod(self.kernel_size)

    def broadcast_to_weight(self, values):
        return values

    def output_shape(self, shape):
        if len(shape) != 3 or shape[0] != self.channels:
            raise ValueError(f"{self!r} takes ({self.channels}, height, width), got {tuple(shape)}")
        sizes = _check.conv_output_size(shape[1:], self.kernel_size, self.kernel_size, (0, 0), (1, 1))
        return (self.channels, *sizes)

    def multiply_adds(self, shape):
        return math.prod(self.output_shape(shape)) * (self.fan_in() + 1)

    def forward(self, y, x):
        self.ops.subsample_forward(y, x, self.weight, self.bias, self.kernel_size, self.scale)

    def backward(self, dx, dy, x, y):
        self.ops.subsample_backward(
            dx, self.weight_grad, self.bias_grad, dy, x, self.weight, self.kernel_size, self.scale
        )

    def curvature(self, hx, hweight, hbias, hy, x, weight2):
        """The coefficient multiplies a window's sum, so the square of that sum counts, not the sum of squares."""
        sums = self.ops.empty(hy.shape, hy.dtype)
        ones, zeros = (self.ops.to_device(np.full(self.channels, value, hy.dtype)) for value in (1, 0))
        self.ops.subsample_forward(sums, x, ones, zeros, self.kernel_size, self.scale)
        squares = self.ops.to_device(np.square(self.ops.to_host(sums)))
        none = self.ops.empty((0, *hy.shape[1:]), hy.dtype)
        self.ops.subsample_backward(none, hweight, hbias, hy, squares, ones, (1, 1), 1.0)
        if hx.size:
            not_these = [self.ops.empty((self.channels,), hy.dtype) for _ in range(2)]
            self.ops.subsample_backward(hx, *not_these, hy, x, weight2, self.kernel_size, self.scale**2)

    def extra_repr(self):
        return f"{self.channels}, kernel_size={self.kernel_size}, pool={self.pool!r}"


class MappedConv2d(Layer):
    """C3: a convolution in which each output map sees some of the input maps only; the other pairs are not computed.

    connections  (in_channels, out_channels) booleans; every map must be connected
    weight: (pairs, KH, KW), in the order of outputs and then of inputs   bias: (out_channels,)
    """

    weight: Any  # these six are set by `bind`
    bias: Any
    weight_grad: Any
    bias_grad: Any
    _sources: Any
    _starts: Any

    def __init__(self, connections, kernel_size):
        table = np.asarray(connections)
        if table.ndim != 2 or not table.size or table.dtype != np.bool_:
            raise ValueError(
                f"connections must be a table (in_channels, out_channels) of booleans, got shape {table.shape}, "
                f"dtype {table.dtype}"
            )
        for axis, which in ((1, "input"), (0, "output")):
            alone = np.flatnonzero(~table.any(axis))
            if alone.size:
                raise ValueError(f"connections must reach every map, got none for {which} map {alone[0]}")
        self.in_channels, self.out_channels = table.shape
        self.kernel_size = _check.pair("kernel_size", kernel_size, 1)
        self.table = table
        self._pairs_of = table.sum(axis=0)  # of each output

    def parameter_shapes(self):
        return {"weight": (int(self.table.sum()), *self.kernel_size), "bias": (self.out_channels,)}

    def fan_in(self):
        """Of each output map, (out_channels,)."""
        return self._pairs_of * math.prod(self.kernel_size)

    def broadcast_to_weight(self, values):
        return np.repeat(values, self._pairs_of)[:, None, None]

    def initial_parameters(self, rng):
        bound = 1 / np.sqrt(self.fan_in())
        weight = rng.uniform(-1, 1, self.parameter_shapes()["weight"]) * self.broadcast_to_weight(bound)
        return {"weight": weight, "bias": rng.uniform(-1, 1, self.out_channels) * bound}

    def initial_buffers(self, dtype):
        sources = np.nonzero(self.table.T)[1]
        starts = np.concatenate([[0], np.cumsum(self._pairs_of)])
        return {"_sources": sources.astype(np.int64), "_starts": starts.astype(np.int64)}

    def output_shape(self, shape):
        if len(shape) != 3 or shape[0] != self.in_channels:
            raise ValueError(f"{self!r} takes ({self.in_channels}, height, width), got {tuple(shape)}")
        return (self.out_channels, *_check.conv_output_size(shape[1:], self.kernel_size, (1, 1), (0, 0), (1, 1)))

    def multiply_adds(self, shape):
        return math.prod(self.output_shape(shape)[1:]) * math.prod(self.parameter_shapes()["weight"])

    def forward(self, y, x):
        self.ops.conv2d_map_forward(y, x, self.weight, self.bias, self._sources, self._starts)

    def backward(self, dx, dy, x, y):
        self.ops.conv2d_map_backward(
            dx, self.weight_grad, self.bias_grad, dy, x, self.weight, self._sources, self._starts
        )

    def extra_repr(self):
        pairs = int(self.table.sum())
        return f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, pairs={pairs}"


class EuclideanRBF(Layer):
    """The output layer, eq. 7: squared Euclidean distances to fixed points; the smallest wins.  (F,) -> (K,)

    centres: (K, F).  They are a buffer, "weight" in a state_dict, and not trained.
    """

    weight: Any  # set by `bind`

    def __init__(self, centres):
        self.centres = _check.finite("centres", _check.array("centres", centres, 2, "(classes, features)"))

    def initial_buffers(self, dtype):
        return {"weight": np.ascontiguousarray(self.centres, dtype)}

    def bind(self, k, parameters, gradients, dtype):
        super().bind(k, parameters, gradients, dtype)
        self._no_gradient = k.empty((0, self.centres.shape[1]), dtype)

    def output_shape(self, shape):
        if tuple(shape) != self.centres.shape[1:]:
            raise ValueError(f"{self!r} takes ({self.centres.shape[1]},), got {tuple(shape)}")
        return self.centres.shape[:1]

    def multiply_adds(self, shape):
        return self.centres.size

    def forward(self, y, x):
        self.ops.squared_distance_forward(y, x, self.weight)

    def backward(self, dx, dy, x, y):
        self.ops.squared_distance_backward(dx, self._no_gradient, dy, x, self.weight)

    def curvature(self, criterion, x, y, dy, share):
        """Second derivatives of the loss by x, NumPy: 2 sum of dE/dy_i, as y is quadratic, and what the loss adds."""
        x, y, dy = (np.asarray(self.ops.to_host(a), np.float64) for a in (x, y, dy))
        h = np.broadcast_to(2 * dy.sum(axis=1, keepdims=True), x.shape).copy()
        of_loss = criterion.curvature(y, share)
        for i, centre in enumerate(self.centres):
            h += of_loss[:, i : i + 1] * (2 * (x - centre)) ** 2
        return np.maximum(h, 0)

    def extra_repr(self):
        return f"{self.centres.shape[1]}, {self.centres.shape[0]}"


# --- loss -------------------------------------------------------------------------------------------------------------


class RBFLoss(Loss):
    """Losses of distances (N, K), whose smallest is the prediction, against class numbers (N,).

    rubbish    None: eq. 8, the distance to the target.  A number j: eq. 9, which also pushes the other classes away
    reduction  "mean" or "sum"
    """

    def __init__(self, rubbish=None, reduction="mean"):
        self.rubbish = None if rubbish is None else _check.number("rubbish", rubbish, 0)
        self.reduction = _check.choice("reduction", reduction, ("mean", "sum"))

    def allocate(self, k, batch, classes, dtype):
        super().allocate(k, batch, classes, dtype)
        self._predicted = k.empty((batch,), np.int64)

    def forward_backward(self, dx, x, target):
        n, rubbish = len(x), -1.0 if self.rubbish is None else self.rubbish
        self.ops.rbf_loss(self._loss[:n], self._predicted[:n], dx, x, target, rubbish, self.reduction == "mean")

    def logits(self, outputs):
        return -outputs

    def curvature(self, y, share):
        """Second derivatives of `share` times each image's loss by its own distances y: (N, K) NumPy."""
        if self.rubbish is None:
            return np.zeros_like(y)  # eq. 8 is linear
        least = np.minimum(y.min(axis=1, keepdims=True), self.rubbish)
        p = np.exp(least - y)
        p /= p.sum(axis=1, keepdims=True) + np.exp(least - self.rubbish)
        return share * p * (1 - p)

    def __call__(self, distances, target):
        """(value, gradient with respect to the distances)."""
        return self._loss_and_grad("distances", distances, target)


# --- the stochastic diagonal Levenberg-Marquardt method: section III.B, appendix C ------------------------------------

MU = 0.02
PATTERNS = 500  # on which second derivatives are estimated before each pass
SCHEDULE = (5e-4,) * 2 + (2e-4,) * 3 + (1e-4,) * 3 + (5e-5,) * 4 + (1e-5,) * 8  # eta of each of twenty passes


class SDLM(Optimizer):
    """theta[k] -= eta / (mu + h[k]) * grad[k], with h[k] the mean second derivative of the loss by parameter k.

    lr         eta: a number or an array, one a step; the rate of an epoch's first step is that of the epoch
    patterns   on so many images h is measured before each epoch (by `fit`; or call `estimate` before the first step)
    """

    vectors = ("step_sizes",)  # eta / (mu + h), one a parameter
    step_sizes: Any

    def __init__(self, model, lr=SCHEDULE[0], mu=MU, patterns=PATTERNS):
        super().__init__(model, lr, 0.0)
        self.mu = _check.number("mu", mu, 1e-12)
        self.patterns = _check.integer("patterns", patterns, 1)

    def before_epoch(self, criterion, batches, rng):
        self.estimate_step_sizes(criterion, batches, rng.integers(0, len(batches), self.patterns))

    def estimate_step_sizes(self, criterion, batches, index):
        """Measure h on the images `index` of `batches` and set the step sizes for the learning rate of this step."""
        h = gauss_newton_diagonal(self.model, criterion, batches, index)
        self.ops.copy_to(self.step_sizes, (self.lr / (self.mu + h)).astype(self.model.dtype))

    def step(self):
        self.ops.sgd_per_parameter(self.model.theta, self.model.grad, self.step_sizes, self._step)


def gauss_newton_diagonal(model, criterion, batches, index):
    """Diagonal Gauss-Newton estimate of the second derivatives of the loss by each parameter, float64, (P,).

    The mean over the images `index`.  With h the second derivative by a unit's weighted sum a or its output x, and u
    its weights, appendix C's recursion is (the term with f'' is dropped, which keeps h positive)

        h_a = f'(a)^2 h_x,    h_x[j] = sum over i of u[i, j]^2 h_a[i],    h_u[i, j] = h_a[i] x[j]^2,

    where connections that share a weight are added.  That is backpropagation with squared weights and inputs, so the
    layers' own backward kernels do it; an activation's is applied twice.
    """
    k, n = model.ops, len(index)
    if not hasattr(criterion, "curvature"):
        raise ValueError(f"the second derivatives of {type(criterion).__name__} by its arguments are not known here")
    if model.input_shape is None:
        model.set_input_shape(batches.image_shape)
    with model.lock:
        model.discard_forward()
        plan = model.plan(n, unfused=True)
        target = batches.gather(plan.x, k.to_device(np.asarray(index, np.int64)))
        plan.forward()
        criterion.ensure_allocated(k, n, model.shapes[-1][-1], model.dtype)
        criterion.forward_backward(plan.dy, plan.y, target)
        share = 1 / n if criterion.reduction == "mean" else 1.0
        steps = [step for at, step in enumerate(plan.steps) if at >= plan.first_trainable]
        last = plan.steps[-1]
        if isinstance(model.layers[-1], EuclideanRBF):  # quadratic in its input: outside the recursion
            k.copy_to(last.dx, model.layers[-1].curvature(criterion, last.x, last.y, last.dy, share))
            steps.pop()
        else:
            k.copy_to(plan.dy, criterion.curvature(np.asarray(k.to_host(plan.y), np.float64), share))
        found: dict[tuple, np.ndarray] = {}
        for step in reversed(steps):
            hx, hy, x, y = step.dx if step is not steps[0] else plan.no_grad_buffer, step.dy, step.x, step.y
            layer: Any = step.layers[0] if step.layers else None
            if isinstance(layer, AvgPool2d):  # linear: the coefficients squared
                window = layer.kernel_size, layer.stride, layer.padding, layer.count_include_pad
                k.avg_pool2d_backward(hx, hy, *window, (layer.divisor or math.prod(layer.kernel_size)) ** 2)
            elif layer is None or not layer.parameter_shapes():
                step.backward(hx)
                if layer is not None and not isinstance(layer, Flatten | MaxPool2d):  # an activation: f' times f'
                    layer.backward(hx, hx, x, y)
            else:
                shapes = layer.parameter_shapes()
                squares = {name: k.to_device(np.square(k.to_host(getattr(layer, name)))) for name in shapes}
                h = {name: k.empty(shape, model.dtype) for name, shape in shapes.items()}
                bias = h.get("bias", k.empty((0,), model.dtype))
                curvature = getattr(layer, "curvature", functools.partial(_squared_backward, layer))
                curvature(hx, h["weight"], bias, hy, x, squares["weight"])
                found |= {(step.numbers[0], name): np.ravel(k.to_host(value)) for name, value in h.items()}
    order = [found[number, name] for number, layer in enumerate(model.layers) for name in layer.parameter_shapes()]
    return np.concatenate(order).astype(np.float64) / (n * share)


def _squared_backward(layer, hx, hweight, hbias, hy, x, weight2):
    """The layer's backward pass with squares in place of its weights and inputs."""
    mine = {name: getattr(layer, name) for name in ("weight", "weight_grad", "bias_grad")}
    vars(layer).update(weight=weight2, weight_grad=hweight, bias_grad=hbias)
    try:
        layer.backward(hx, hy, layer.ops.to_device(np.square(layer.ops.to_host(x))), None)
    finally:
        vars(layer).update(mine)


# --- the network ------------------------------------------------------------------------------------------------------


def lenet5(pool="sum", *, root=False, rng=None, dtype=np.float32, device="cpu"):
    """LeNet-5 of 1998, for images (1, 32, 32): 60,000 parameters, 340,908 connections.

    Weights are drawn as `init.lecun1998` says, which has the argument `root` too.
    """
    rng = _check.generator("rng", rng)
    model = Sequential(
        Conv2d(1, 6, 5), ScaledTanh(), Subsample(6, 2, pool), ScaledTanh(),
        MappedConv2d(connections(), 5), ScaledTanh(), Subsample(16, 2, pool), ScaledTanh(),
        Conv2d(16, 120, 5), ScaledTanh(), Flatten(), Linear(120, 84), ScaledTanh(), EuclideanRBF(bitmaps()),
        input_shape=(1, 32, 32), rng=rng, dtype=dtype, device=device,
    )  # fmt: skip
    init.lecun1998(model, root, rng=rng)
    return model


def count_connections(model):
    """Connections as the paper counts them: every input, bias and centre of every unit."""
    found = 0
    for layer, shape in zip(model.layers, model.shapes[1:], strict=True):
        if isinstance(layer, MappedConv2d):
            found += math.prod(shape[1:]) * sum(math.prod(s) for s in layer.parameter_shapes().values())
        elif isinstance(layer, Subsample):
            found += math.prod(shape) * (layer.fan_in() + 1)
        elif isinstance(layer, EuclideanRBF):
            found += layer.centres.size
        elif layer.parameter_shapes():
            found += math.prod(shape) * (math.prod(layer.parameter_shapes()["weight"][1:]) + 1)
    return found
