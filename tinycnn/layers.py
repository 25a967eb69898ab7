"""Layers: shapes, parameters, and which kernels to call.  Names, arguments, defaults and initialisation are torch's.

A layer knows nothing of batches, devices or its neighbours.  `Sequential` asks it for its output shape and hands it
views into the flat parameter and gradient vectors (`bind`); the `Plan` of a batch calls `forward(y, x)` and
`backward(dx, dy, x, y)` on buffers that it owns.  A new layer is a class here, a kernel pair, and a row in
tests/test_gradients.py.
"""

import inspect
import math
from types import SimpleNamespace
from typing import Any

import numpy as np

from tinycnn import _check, scalars
from tinycnn._tracked import Tracked

# What torch's layers take and these do not, and why.
UNSUPPORTED_TORCH_OPTIONS = {
    "inplace": "a model overwrites what nobody reads again by itself",
    "padding_mode": "the padding is of zeros",
    "device": "it is that of the Sequential",
    "dtype": "it is that of the Sequential",
    "return_indices": "functional.max_pool2d has it",
    "start_dim": "all axes but the batch's become one",
    "end_dim": "all axes but the batch's become one",
}


class Layer(Tracked):
    """Base class.  Defaults: no parameters, output shape = input shape.

    A layer of your own gets arrays (N, *shape) in plain order and runs as Python in every step, unless its class says
    `replayable = True` (see `tinycnn.plan`).  What the plan is allowed to do with it, its class has to say itself:

    in_place      forward may be called with y = x, and backward with dx = dy: it does not read x
    reads_output  backward reads y; taken for true where a class of your own does not say
    """

    ops: Any = None  # the backend module, set by `bind`
    training = True
    saved: Any = None  # what `reserve` made for the batch that runs; set by the plan before every call
    is_view = False  # the output is the input under another shape; no kernel runs
    in_place = False
    reads_output = False
    activation_code: Any = None  # of an activation: code and constants for fused kernels
    _bound: frozenset = frozenset()  # names of all that `bind` has set
    _shapes: dict | None = None  # of the parameters, in a model
    _views: frozenset = frozenset()  # those of them that are parameters, gradients and buffers

    def __new__(cls, *args, **options):
        for name in (
            options.keys() & UNSUPPORTED_TORCH_OPTIONS.keys() - inspect.signature(cls.__init__).parameters.keys()
        ):
            raise TypeError(f"{cls.__name__} has no {name}: {UNSUPPORTED_TORCH_OPTIONS[name]}")
        if cls.__init__ is object.__init__ and (args or options):  # which would not mind
            raise TypeError(f"{cls.__name__} takes no arguments, got {len(args) + len(options)}")
        return super().__new__(cls)

    def __setattr__(self, name, value):
        """As usual; but what is assigned to a parameter or buffer of a model's layer is copied into it."""
        before = vars(self).get(name, self)
        if name in self._views and value is not before:
            copy_into(self.ops, f"{name} of {self!r}", before, value)
            return
        if self._shapes is not None and value is not before and getattr(before, "size", None) == 0:
            raise ValueError(f"{self!r} has no {name}: it was made without one")
        super().__setattr__(name, value)
        if self._shapes is not None and self.parameter_shapes() != self._shapes:
            super().__setattr__(name, before)
            raise ValueError(
                f"{name} of {self!r} decides on the shape of its parameters, which a model has: make another"
            )

    def __getstate__(self):
        """For copies: the settings, and parameters and buffers as NumPy arrays, with which a new model will begin."""
        state = {name: value for name, value in super().__getstate__().items() if name not in self._bound}
        if self.ops is None:
            return state
        kept = [*self.parameter_shapes(), *self.initial_buffers(np.float32)]
        return state | {name: np.array(self.ops.to_host(getattr(self, name))) for name in kept} | {"_copied": True}

    def parameter_shapes(self):
        """Names and shapes of the parameters, in the order of the flat vector."""
        return {}

    def initial_parameters(self, rng):
        """Initial values of the parameters, float64, by name."""
        return {}

    def initial_buffers(self, dtype):
        """What the layer remembers from batch to batch besides its parameters: names and initial values, NumPy.

        They are part of a `state_dict`, but for those whose name begins with an underscore.
        """
        return {}

    def initial_state(self, rng, dtype):
        """The parameters to begin with, and the buffers: those that a copy has brought along, or new ones."""
        shapes = self.parameter_shapes()
        parameters = {} if vars(self).get("_copied") else self.initial_parameters(rng)
        given = {name: value for name, value in vars(self).items() if value is not None}
        parameters |= {name: _check.array(f"{name} of {self!r}", given[name]) for name in shapes if name in given}
        buffers = {name: np.array(given.get(name, v), v.dtype) for name, v in self.initial_buffers(dtype).items()}
        shapes = shapes | {name: v.shape for name, v in self.initial_buffers(dtype).items()}
        for name, value in (parameters | buffers).items():
            if np.shape(value) != tuple(shapes[name]):
                raise ValueError(f"{name} of {self!r} must have shape {shapes[name]}, got {np.shape(value)}")
        return parameters, buffers

    def bind(self, k, parameters, gradients, dtype):
        """Take the backend and the views of this layer: `self.weight`, `self.weight_grad` and so on."""
        self.ops = k
        for name, view in parameters.items():
            setattr(self, name, view)
            setattr(self, name + "_grad", gradients[name])
        for name, value in self.initial_buffers(dtype).items():
            setattr(self, name, k.to_device(value))

    def output_shape(self, shape):
        """Shape of one output for one input of `shape`, both without the batch axis.  ValueError if it cannot be."""
        return shape

    def reserve(self, k, batch, shape, dtype):
        """Allocate what forward leaves for backward, for `batch` inputs of `shape`: a SimpleNamespace, or None.

        It is there as `self.saved` whenever forward and backward are called.  The plan adds its `images`: the images
        of the batch that runs, since arrays may have room for more.
        """

    def multiply_adds(self, shape):
        """Multiply-adds of the forward pass for one input of `shape`."""
        return 0

    def forward(self, y, x):
        raise RuntimeError(f"{type(self).__name__} has no forward")

    def backward(self, dx, dy, x, y):
        """Gradients from dy, the gradient of the output; dx of size 0 is not wanted."""
        raise RuntimeError(f"{type(self).__name__} has no backward")

    def extra_repr(self):
        """Arguments for `repr`."""
        return ""

    def __repr__(self):
        return f"{type(self).__name__}({self.extra_repr()})"


def copy_into(k, name, array, values):
    """Overwrite an array of the backend k by values of its shape; ValueError names both shapes."""
    values = _check.array(name, k.to_host(values)) if array.size else np.asarray(values)
    if values.shape != array.shape:
        raise ValueError(f"{name} must have shape {array.shape}, got {values.shape}")
    k.copy_to(array, values.astype(array.dtype))


class Parametric(Layer):
    """A layer with a weight and, if wanted, a bias, both drawn from U(-1/sqrt(fan_in), 1/sqrt(fan_in)) as in torch."""

    weight_shape: tuple[int, ...]
    has_bias: bool
    weight: Any  # these four are views, set by `bind`
    bias: Any
    weight_grad: Any
    bias_grad: Any

    def parameter_shapes(self):
        shapes = {"weight": self.weight_shape}
        if self.has_bias:
            shapes["bias"] = self.weight_shape[:1]
        return shapes

    def fan_in(self):
        """Inputs of one unit."""
        return math.prod(self.weight_shape[1:])

    def broadcast_to_weight(self, values):
        """Numbers that go with units (as `fan_in` has them), in a shape that goes with the weight."""
        return values

    def initial_parameters(self, rng):
        bound = 1 / math.sqrt(self.fan_in())
        return {name: rng.uniform(-bound, bound, shape) for name, shape in self.parameter_shapes().items()}

    def bind(self, k, parameters, gradients, dtype):
        super().bind(k, parameters, gradients, dtype)
        if not self.has_bias:  # kernels take an empty bias for none
            self.bias = self.bias_grad = k.empty((0,), dtype)


class Conv2d(Parametric):
    """2-D convolution: (C, H, W) -> (O, OH, OW).  weight: (O, C/groups, KH, KW), bias: (O,).

    Sizes are integers or pairs (height, width); padding may be "same" or "valid", too.  Raises ValueError if channels
    are not divisible by groups, or for "same" with a stride.
    """

    def __init__(self, in_channels, out_channels, kernel_size, stride=1, padding=0, dilation=1, groups=1, bias=True):
        self.in_channels = _check.integer("in_channels", in_channels, 1)
        self.out_channels = _check.integer("out_channels", out_channels, 1)
        self.kernel_size = _check.pair("kernel_size", kernel_size, 1)
        self.stride = _check.pair("stride", stride, 1)
        self.dilation = _check.pair("dilation", dilation, 1)
        self.padding = _check.conv_padding(padding, self.kernel_size, self.stride, self.dilation)
        self.same = isinstance(padding, str) and padding == "same"
        self.groups = _check.integer("groups", groups, 1)
        for name, channels in (("in_channels", self.in_channels), ("out_channels", self.out_channels)):
            if channels % self.groups:
                raise ValueError(f"{name} must be divisible by groups, got {channels} and {self.groups}")
        self.has_bias = bool(bias)
        self.weight_shape = (self.out_channels, self.in_channels // self.groups, *self.kernel_size)

    def output_shape(self, shape):
        if len(shape) != 3 or shape[0] != self.in_channels:
            raise ValueError(f"{self!r} takes ({self.in_channels}, height, width), got {shape}")
        sizes = _check.conv_output_size(
            shape[1:], self.kernel_size, self.stride, self.padding, self.dilation, self.same
        )
        return (self.out_channels, *sizes)

    def multiply_adds(self, shape):
        return math.prod(self.output_shape(shape)) * math.prod(self.weight_shape[1:])

    def forward(self, y, x):
        self.ops.conv2d_forward(y, x, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups)

    def backward(self, dx, dy, x, y):
        self.ops.conv2d_backward(
            dx,
            self.weight_grad,
            self.bias_grad,
            dy,
            x,
            self.weight,
            self.stride,
            self.padding,
            self.dilation,
            self.groups,
        )

    def extra_repr(self):
        text = f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}"
        given = {"stride": self.stride, "padding": "same" if self.same else self.padding, "dilation": self.dilation}
        defaults = {"stride": (1, 1), "padding": (0, 0), "dilation": (1, 1), "groups": 1}
        text += "".join(f", {n}={v!r}" for n, v in (given | {"groups": self.groups}).items() if v != defaults[n])
        return text + ("" if self.has_bias else ", bias=False")


class Linear(Parametric):
    """Fully connected: (F,) -> (O,).  weight: (O, F), bias: (O,)."""

    def __init__(self, in_features, out_features, bias=True):
        self.in_features = _check.integer("in_features", in_features, 1)
        self.out_features = _check.integer("out_features", out_features, 1)
        self.has_bias = bool(bias)
        self.weight_shape = (self.out_features, self.in_features)

    def output_shape(self, shape):
        if tuple(shape) != (self.in_features,):
            hint = "; put Flatten() before it" if len(shape) > 1 and math.prod(shape) == self.in_features else ""
            raise ValueError(f"{self!r} takes ({self.in_features},), got {tuple(shape)}{hint}")
        return (self.out_features,)

    def multiply_adds(self, shape):
        return self.in_features * self.out_features

    def forward(self, y, x):
        self.ops.linear_forward(y, x, self.weight, self.bias)

    def backward(self, dx, dy, x, y):
        self.ops.linear_backward(dx, self.weight_grad, self.bias_grad, dy, x, self.weight)

    def extra_repr(self):
        return f"{self.in_features}, {self.out_features}" + ("" if self.has_bias else ", bias=False")


class GaussianRBF(Layer):
    """Gaussian radial basis functions: (F,) -> (O,), y[k] = exp(-|x - weight[k]|^2 / 2) (Broomhead and Lowe 1988).

    weight: (O, F), the centres, trainable, drawn from N(0, scale^2).  With many features and a scale of 1
    all outputs, and with them all gradients, are nearly zero at first (|x - c|^2 is about F), and nothing is learned
    for a long time: after the 84 units of LeNet-5 a scale of 0.1 to 0.3 learns at once.
    """

    reads_output = True

    weight: Any  # these two are set by `bind`
    weight_grad: Any

    def __init__(self, in_features, out_features, scale=1.0):
        self.in_features = _check.integer("in_features", in_features, 1)
        self.out_features = _check.integer("out_features", out_features, 1)
        self.scale = _check.number("scale", scale, 0)

    def parameter_shapes(self):
        return {"weight": (self.out_features, self.in_features)}

    def initial_parameters(self, rng):
        return {"weight": self.scale * rng.standard_normal((self.out_features, self.in_features))}

    def output_shape(self, shape):
        if tuple(shape) != (self.in_features,):
            raise ValueError(f"{self!r} takes ({self.in_features},), got {tuple(shape)}")
        return (self.out_features,)

    def multiply_adds(self, shape):
        return self.in_features * self.out_features

    def reserve(self, k, batch, shape, dtype):
        # The squared distances, and later their gradient.
        return SimpleNamespace(squares=k.empty((batch, self.out_features), dtype))

    def forward(self, y, x):
        self.ops.squared_distance_forward(self.saved.squares, x, self.weight)
        self.ops.gaussian_forward(y, self.saved.squares)

    def backward(self, dx, dy, x, y):
        self.ops.gaussian_backward(self.saved.squares, dy, y)
        self.ops.squared_distance_backward(dx, self.weight_grad, self.saved.squares, x, self.weight)

    def extra_repr(self):
        return f"{self.in_features}, {self.out_features}" + (f", scale={self.scale:g}" if self.scale != 1 else "")


class _Pool2d(Layer):
    kernel_size: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation = (1, 1)
    ceil_mode: bool
    same = False

    def output_shape(self, shape):
        if len(shape) != 3:
            raise ValueError(f"{self!r} takes (channels, height, width), got {shape}")
        if self.same:
            return tuple(shape)
        window = self.kernel_size, self.stride, self.padding, self.dilation
        return (shape[0], *_check.pool_output_size(shape[1:], *window, self.ceil_mode))

    def extra_repr(self):
        given = {"padding": "same" if self.same else self.padding, "dilation": self.dilation}
        more = {"ceil_mode": self.ceil_mode, "count_include_pad": getattr(self, "count_include_pad", True)}
        defaults = {"padding": (0, 0), "dilation": (1, 1), "ceil_mode": False, "count_include_pad": True}
        text = "".join(f", {name}={v!r}" for name, v in (given | more).items() if v != defaults[name])
        divisor = getattr(self, "divisor", 0)
        return f"kernel_size={self.kernel_size}, stride={self.stride}{text}" + (
            f", divisor_override={divisor}" if divisor else ""
        )


class AvgPool2d(_Pool2d):
    """Mean of each window: (C, H, W) -> (C, OH, OW).  Padding is at most half of the window."""

    def __init__(
        self,
        kernel_size,
        stride=None,
        padding=0,
        ceil_mode=False,
        count_include_pad=True,
        divisor_override=None,
    ):
        self.kernel_size = _check.pair("kernel_size", kernel_size, 1)
        self.stride = _check.pair("stride", kernel_size if stride is None else stride, 1)
        self.padding = _check.pool_padding(padding, self.kernel_size)
        self.ceil_mode, self.count_include_pad = bool(ceil_mode), bool(count_include_pad)
        self.divisor = 0 if divisor_override is None else _check.integer("divisor_override", divisor_override, 1)

    def forward(self, y, x):
        self.ops.avg_pool2d_forward(
            y, x, self.kernel_size, self.stride, self.padding, self.count_include_pad, self.divisor
        )

    def backward(self, dx, dy, x, y):
        self.ops.avg_pool2d_backward(
            dx, dy, self.kernel_size, self.stride, self.padding, self.count_include_pad, self.divisor
        )


class MaxPool2d(_Pool2d):
    """Largest entry of each window: (C, H, W) -> (C, OH, OW); of equal ones the first, as in torch.

    With stride 1, padding may be "same" (TensorFlow's): the output has the size of the input, and where the window is
    even the last ones reach over the edge.
    """

    def __init__(self, kernel_size, stride=None, padding=0, dilation=1, ceil_mode=False):
        self.kernel_size = _check.pair("kernel_size", kernel_size, 1)
        self.stride = _check.pair("stride", kernel_size if stride is None else stride, 1)
        self.dilation = _check.pair("dilation", dilation, 1)
        self.same = isinstance(padding, str)
        if self.same:
            _check.choice("padding", padding, ("same",))
            self.padding = _check.conv_padding(padding, self.kernel_size, self.stride, self.dilation)
        else:
            self.padding = _check.pool_padding(padding, self.kernel_size)
        self.ceil_mode = bool(ceil_mode)

    @property
    def window(self):
        return self.kernel_size, self.stride, self.padding, self.dilation

    def reserve(self, k, batch, shape, dtype):
        # Where in their planes the entries of y stood.
        return SimpleNamespace(indices=k.empty((batch * math.prod(self.output_shape(shape)),), np.int32))

    def forward(self, y, x):
        self.ops.max_pool2d_forward(y, self.saved.indices.reshape(y.shape), x, *self.window)

    def backward(self, dx, dy, x, y):
        self.ops.max_pool2d_backward(dx, dy, self.saved.indices.reshape(dy.shape), *self.window)


class _Norm(Layer):
    """Normalisation of (C, H, W), with a weight (1 at first) and a bias (0) a channel if `affine`."""

    channels: int
    affine: bool
    weight: Any
    bias: Any
    weight_grad: Any
    bias_grad: Any

    def parameter_shapes(self):
        return {"weight": (self.channels,), "bias": (self.channels,)} if self.affine else {}

    def initial_parameters(self, rng):
        return {"weight": np.ones(self.channels), "bias": np.zeros(self.channels)} if self.affine else {}

    def bind(self, k, parameters, gradients, dtype):
        super().bind(k, parameters, gradients, dtype)
        if not self.affine:
            self.weight = self.bias = self.weight_grad = self.bias_grad = k.empty((0,), dtype)

    def output_shape(self, shape):
        if len(shape) != 3 or shape[0] != self.channels:
            raise ValueError(f"{self!r} takes ({self.channels}, height, width), got {tuple(shape)}")
        return shape


class BatchNorm2d(_Norm):
    """Normalisation of each channel over the batch (Ioffe and Szegedy 2015): (C, H, W) -> (C, H, W).

    In training with the statistics of the batch, which move the running ones by `momentum` (None: so that they are the
    mean of all batches); in eval mode with the running ones (those of the batch if not `track_running_stats`).
    state_dict: weight, bias, running_mean, running_var and num_batches_tracked, as in torch.
    """

    running_mean: Any  # these six are set by `bind`, as `initial_buffers` says
    running_var: Any
    num_batches_tracked: Any
    _running_mean: Any
    _running_var: Any
    _batches: Any

    def __init__(self, num_features, eps=1e-5, momentum=0.1, affine=True, track_running_stats=True):
        self.channels = _check.integer("num_features", num_features, 1)
        self.eps = _check.number("eps", eps, 0)
        self.momentum = None if momentum is None else _check.number("momentum", momentum, 0, maximum=1)
        self.affine, self.track_running_stats = bool(affine), bool(track_running_stats)

    def initial_buffers(self, dtype):
        zeros, ones, none = np.zeros(self.channels, dtype), np.ones(self.channels, dtype), np.zeros(1, np.int64)
        if self.track_running_stats:
            return {"running_mean": zeros, "running_var": ones, "num_batches_tracked": none}
        return {"_running_mean": zeros, "_running_var": ones, "_batches": none}

    def reserve(self, k, batch, shape, dtype):
        mean, rstd = k.empty((self.channels,), dtype), k.empty((self.channels,), dtype)
        return SimpleNamespace(mean=mean, rstd=rstd, by_batch=True)

    def forward(self, y, x):
        saved = self.saved
        saved.by_batch = self.training or not self.track_running_stats
        if saved.by_batch and saved.images * x.shape[2] * x.shape[3] == 1:
            raise ValueError(f"{self!r} needs more than one value a channel in training, got shape {tuple(x.shape)}")
        if self.track_running_stats:
            running = self.running_mean, self.running_var, self.num_batches_tracked
            momentum = -1.0 if self.momentum is None else self.momentum
        else:
            running, momentum = (self._running_mean, self._running_var, self._batches), 0.0
        self.ops.batch_norm_forward(
            y, x, self.weight, self.bias, saved.mean, saved.rstd, *running, momentum, self.eps, saved.by_batch,
            saved.images,
        )  # fmt: skip
        if self.training and self.track_running_stats:
            self.ops.increment(self.num_batches_tracked)

    def backward(self, dx, dy, x, y):
        saved = self.saved
        self.ops.batch_norm_backward(
            dx, self.weight_grad, self.bias_grad, dy, x, self.weight, saved.mean, saved.rstd, saved.by_batch,
            saved.images,
        )  # fmt: skip

    def extra_repr(self):
        defaults = {"eps": 1e-5, "momentum": 0.1, "affine": True, "track_running_stats": True}
        return str(self.channels) + "".join(
            f", {name}={getattr(self, name)!r}" for name, value in defaults.items() if getattr(self, name) != value
        )


class GroupNorm(_Norm):
    """Normalisation of each image over groups of channels (Wu and He 2018): (C, H, W) -> (C, H, W).

    Raises ValueError if num_channels is not divisible by num_groups.
    """

    def __init__(self, num_groups, num_channels, eps=1e-5, affine=True):
        self.groups = _check.integer("num_groups", num_groups, 1)
        self.channels = _check.integer("num_channels", num_channels, 1)
        if self.channels % self.groups:
            raise ValueError(f"num_channels must be divisible by num_groups, got {num_channels} and {num_groups}")
        self.eps, self.affine = _check.number("eps", eps, 0), bool(affine)

    def reserve(self, k, batch, shape, dtype):
        return SimpleNamespace(mean=k.empty((batch, self.groups), dtype), rstd=k.empty((batch, self.groups), dtype))

    def forward(self, y, x):
        saved = self.saved
        self.ops.group_norm_forward(y, x, self.weight, self.bias, saved.mean, saved.rstd, self.groups, self.eps)

    def backward(self, dx, dy, x, y):
        saved = self.saved
        self.ops.group_norm_backward(
            dx, self.weight_grad, self.bias_grad, dy, x, self.weight, saved.mean, saved.rstd, self.groups
        )

    def extra_repr(self):
        return f"{self.groups}, {self.channels}" + ("" if self.affine else ", affine=False")


class Dropout(Layer):
    """In training, every number is zeroed with probability p and the others divided by 1 - p (Srivastava et al. 2014).

    The masks come from the model's rng, and are the same for any number of threads and on any device.
    """

    seed = 0
    _counter: Any  # set by `bind`

    def __init__(self, p=0.5):
        self.p = _check.number("p", p, 0, maximum=1)

    def initial_parameters(self, rng):
        self.seed = int(rng.integers(2**63))
        return {}

    def initial_buffers(self, dtype):
        return {"_counter": np.zeros(1, np.int64)}  # training steps so far

    def elements_per_mask(self, x):
        """Number of consecutive elements that share one mask value."""
        return 1

    def reserve(self, k, batch, shape, dtype):
        return SimpleNamespace(p=0.0)  # of the last forward, for its backward

    def forward(self, y, x):
        self.saved.p = self.p if self.training else 0.0
        if self.training:
            self.ops.increment(self._counter)
        self.ops.dropout(y, x, self._counter, self.seed, self.saved.p, self.elements_per_mask(x))

    def backward(self, dx, dy, x, y):
        self.ops.dropout(dx, dy, self._counter, self.seed, self.saved.p, self.elements_per_mask(x))

    def extra_repr(self):
        return f"p={self.p:g}"


class Dropout2d(Dropout):
    """`Dropout` of whole maps: (C, H, W) -> (C, H, W) (Tompson et al. 2015)."""

    def output_shape(self, shape):
        if len(shape) != 3:
            raise ValueError(f"{self!r} takes (channels, height, width), got {tuple(shape)}")
        return shape

    def elements_per_mask(self, x):
        return x.shape[2] * x.shape[3]


class Flatten(Layer):
    """(C, H, W) -> (C*H*W,): the same numbers under another shape."""

    is_view = True

    def output_shape(self, shape):
        return (math.prod(shape),)


class Tanh(Layer):
    """Hyperbolic tangent."""

    in_place = reads_output = True
    activation_code = scalars.TANH, 1.0, 1.0

    def forward(self, y, x):
        self.ops.tanh_forward(y, x)

    def backward(self, dx, dy, x, y):
        self.ops.tanh_backward(dx, dy, y)


class ScaledTanh(Layer):
    """A * tanh(S * x); the squashing function of LeCun et al. 1998 (appendix A) with A = 1.7159, S = 2/3."""

    in_place = reads_output = True

    def __init__(self, A=1.7159, S=2 / 3):
        self.A, self.S = _check.number("A", A), _check.number("S", S)
        if self.A == 0:
            raise ValueError("A must not be 0")

    @property
    def activation_code(self):
        return scalars.SCALED_TANH, self.A, self.S

    def forward(self, y, x):
        self.ops.scaled_tanh_forward(y, x, self.A, self.S)

    def backward(self, dx, dy, x, y):
        self.ops.scaled_tanh_backward(dx, dy, y, self.A, self.S)

    def extra_repr(self):
        return f"A={self.A:g}, S={self.S:g}"


class Sigmoid(Layer):
    """1 / (1 + exp(-x))."""

    in_place = reads_output = True
    activation_code = scalars.SIGMOID, 1.0, 1.0

    def forward(self, y, x):
        self.ops.sigmoid_forward(y, x)

    def backward(self, dx, dy, x, y):
        self.ops.sigmoid_backward(dx, dy, y)


class ReLU(Layer):
    """max(x, 0); the derivative at 0 is 0, as in torch."""

    in_place = reads_output = True
    activation_code = scalars.RELU, 1.0, 1.0

    def forward(self, y, x):
        self.ops.relu_forward(y, x)

    def backward(self, dx, dy, x, y):
        self.ops.relu_backward(dx, dy, y)


class LeakyReLU(Layer):
    """x for x > 0, negative_slope * x below."""

    def __init__(self, negative_slope=0.01):
        self.negative_slope = _check.number("negative_slope", negative_slope)

    def forward(self, y, x):
        self.ops.leaky_relu_forward(y, x, self.negative_slope)

    def backward(self, dx, dy, x, y):
        self.ops.leaky_relu_backward(dx, dy, x, self.negative_slope)

    def extra_repr(self):
        return f"negative_slope={self.negative_slope:g}"


class _OverClasses(Layer):
    """A layer over the only axis of its input; torch's dim is 1 or -1."""

    reads_output = True

    def __init__(self, dim=-1):
        self.dim = _check.choice("dim", dim, (-1, 1))

    def output_shape(self, shape):
        if len(shape) != 1:
            raise ValueError(f"{self!r} takes (classes,), got {shape}")
        return shape

    def extra_repr(self):
        return f"dim={self.dim}"


class Softmax(_OverClasses):
    """exp(x) / sum(exp(x)) over the classes.  (CrossEntropyLoss wants logits: leave this layer out when training.)"""

    def forward(self, y, x):
        self.ops.softmax_forward(y, x)

    def backward(self, dx, dy, x, y):
        self.ops.softmax_backward(dx, dy, y)


class LogSoftmax(_OverClasses):
    """x - log(sum(exp(x))) over the classes."""

    def forward(self, y, x):
        self.ops.log_softmax_forward(y, x)

    def backward(self, dx, dy, x, y):
        self.ops.log_softmax_backward(dx, dy, y)
