"""Layers: shapes, parameters, and which kernels to call.  Names, arguments, defaults and initialisation are torch's.

A layer does not depend on batch size, device or other layers.  `Sequential` reads its output shape and gives it views
into the flat parameter and gradient vectors (`bind`).  The `Plan` of a batch calls `forward(y, x)` and
`backward(dx, dy, x, y)` on its own buffers.  tests/test_places.py lists what a new layer needs besides its class.
"""

import inspect
import math
from types import SimpleNamespace
from typing import Any, TypeVar

import numpy as np

from tinycnn import _check, scalars
from tinycnn._tracked import Tracked
from tinycnn._typing import Array, Backend, DeviceArray, DType, Padding, Pair, Shape, Views

LayerT = TypeVar("LayerT", bound="Layer")

# Options of torch's layers that are not supported, and why.
UNSUPPORTED_TORCH_OPTIONS = {
    "inplace": "a model chooses in-place steps by itself",
    "padding_mode": "padding is always zeros",
    "device": "set it on the Sequential",
    "dtype": "set it on the Sequential",
    "return_indices": "functional.max_pool2d has it",
    "start_dim": "all axes but the batch's become one",
    "end_dim": "all axes but the batch's become one",
}


class Layer(Tracked):
    """Base class.  Defaults: no parameters, output shape = input shape.

    A user's layer gets arrays (N, *shape), not blocked, and runs as Python in every step unless its class says
    `replayable = True` (see `tinycnn._tracked`).  Two more class attributes are for the plan:

    in_place      forward may be called with y = x, and backward with dx = dy: it does not read x
    reads_output  backward reads y; assumed to be true if a user's class does not say
    """

    ops: Any = None  # the backend module, set by `bind`
    training = True
    requires_grad = True  # False freezes the parameters: see `route_gradients`
    saved: Any = None  # the result of `reserve` for the batch that runs; set by the plan before every call
    is_view = False  # the output is the input with another shape; no kernel runs
    needs_nchw = False  # of a layer of this library: its kernels do not know the blocked layout
    in_place = False
    reads_output = False
    activation_code: Any = None  # of an activation: see `scalars.activation`
    _bound_names: frozenset[str] = frozenset()  # names of the attributes that a model has set
    _bound_shapes: dict[str, Shape] | None = None  # of the parameters, in a model
    _array_names: frozenset[str] = frozenset()  # names of parameters, gradients and buffers, in a model
    _grad_views: Views | None = None  # views into the model's gradient, in a model

    def __new__(cls: type[LayerT], *args: Any, **kwargs: Any) -> LayerT:
        unsupported = UNSUPPORTED_TORCH_OPTIONS.keys() - inspect.signature(cls.__init__).parameters.keys()
        for name in kwargs.keys() & unsupported:
            raise TypeError(f"{cls.__name__} has no {name}: {UNSUPPORTED_TORCH_OPTIONS[name]}")
        if cls.__init__ is object.__init__ and (args or kwargs):  # object.__init__ ignores them if there is a __new__
            raise TypeError(f"{cls.__name__} takes no arguments, got {len(args) + len(kwargs)}")
        return super().__new__(cls)

    def __setattr__(self, name: str, value: Any) -> None:
        """Assigning to a parameter or buffer of a layer in a model copies into it."""
        previous = vars(self).get(name, self)
        if name == "requires_grad":
            _check.instance(f"requires_grad of {self!r}", value, bool, "True or False")
        if name in self._array_names and value is not previous:
            copy_into(self.ops, f"{name} of {self!r}", previous, value)
            return
        if self._bound_shapes is not None and value is not previous and getattr(previous, "size", None) == 0:
            raise ValueError(f"{self!r} has no {name}: it was created without one")
        super().__setattr__(name, value)
        if self._bound_shapes is not None and self.parameter_shapes() != self._bound_shapes:
            super().__setattr__(name, previous)
            raise ValueError(
                f"{name} of {self!r} cannot change in a model: it determines the parameters' shape; make a new layer"
            )
        if name == "requires_grad":
            self.route_gradients()

    def __getstate__(self) -> dict[str, Any]:
        """For copies: settings, and parameters and buffers as NumPy arrays, the initial state in a new model."""
        state = {name: value for name, value in super().__getstate__().items() if name not in self._bound_names}
        if self.ops is None:
            return state
        names = [*self.parameter_shapes(), *self.initial_buffers(np.dtype(np.float32))]
        arrays = {name: np.array(self.ops.to_host(getattr(self, name))) for name in names}
        return state | arrays | {"_copied": True}

    def parameter_shapes(self) -> dict[str, Shape]:
        """Names and shapes of the parameters, in the order of the flat vector."""
        return {}

    def initial_parameters(self, rng: np.random.Generator) -> dict[str, Array]:
        """Initial values of the parameters, float64, by name."""
        return {}

    def get_extra_state(self) -> Any:
        """What a training needs to continue besides parameters and buffers, as JSON or arrays: random numbers, counts.
        Name and use are torch's, but a state_dict does not have it: only a training's checkpoint."""
        return None

    def set_extra_state(self, state: Any) -> None:
        """Set the result of `get_extra_state`."""

    def initial_buffers(self, dtype: DType) -> dict[str, Array]:
        """Initial values of the buffers, NumPy, by name.  Those that begin with an underscore are not in a
        `state_dict`."""
        return {}

    def initial_state(self, rng: np.random.Generator, dtype: DType) -> tuple[dict[str, Array], dict[str, Array]]:
        """Initial (parameters, buffers): those of the copied layer if this is a copy, otherwise new ones."""
        shapes = self.parameter_shapes()
        parameters = {} if vars(self).get("_copied") else self.initial_parameters(rng)
        preset = {name: value for name, value in vars(self).items() if value is not None}
        parameters |= {name: _check.array(f"{name} of {self!r}", preset[name]) for name in shapes if name in preset}
        buffers = {name: np.array(preset.get(name, v), v.dtype) for name, v in self.initial_buffers(dtype).items()}
        shapes = shapes | {name: v.shape for name, v in self.initial_buffers(dtype).items()}
        for name, value in (parameters | buffers).items():
            _check.shape(f"{name} of {self!r}", np.asarray(value), shapes[name])
        return parameters, buffers

    def bind(self, ops: Backend, parameters: Views, gradients: Views, dtype: DType) -> None:
        """Set the backend and the views of this layer: `self.weight`, `self.weight_grad` and so on."""
        self.ops = ops
        for name, view in parameters.items():
            setattr(self, name, view)
            setattr(self, name + "_grad", gradients[name])
        for name, value in self.initial_buffers(dtype).items():
            setattr(self, name, ops.to_device(value))

    def route_gradients(self) -> None:
        """Let backward write the parameters' gradients into the model's gradient vector, or, for a frozen layer, into
        arrays of its own; the model's gradient is then zero."""
        for name, view in (self._grad_views or {}).items():
            gradient = view if self.requires_grad else self.ops.empty(view.shape, view.dtype)
            if gradient is not view:
                self.ops.copy_to(view, np.zeros(view.shape, view.dtype))
            vars(self)[name] = gradient

    def named_children(self) -> list[tuple[str, "Layer"]]:
        """Pairs of name and layer of a container, in the order in which they run."""
        return []

    def config_overrides(self) -> dict[str, Any]:
        """Values of the constructor's arguments that are not attributes of the same name."""
        return {}

    def config(self) -> dict[str, Any]:
        """The constructor's arguments by name, from the attributes.  TypeError names one that is not an attribute."""
        values = self.config_overrides()
        for parameter in list(inspect.signature(type(self).__init__).parameters.values())[1:]:
            if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD) or parameter.name in values:
                continue
            if not hasattr(self, parameter.name):
                raise TypeError(f"{self!r} has no attribute {parameter.name}, its constructor's argument of that name")
            values[parameter.name] = getattr(self, parameter.name)
        return values

    def output_shape(self, shape: Shape) -> Shape:
        """Output shape for an input of `shape`, both without the batch axis.  Raises ValueError if it does not fit."""
        return shape

    def reserve(self, ops: Backend, batch: int, shape: Shape, dtype: DType) -> SimpleNamespace | None:
        """Allocate the arrays that forward saves for backward, for `batch` inputs of `shape`.

        The plan sets `self.saved` to the result before forward and backward, and adds `images`, the number of images
        in the batch, which may be padded.
        """
        return None

    def multiply_adds(self, shape: Shape) -> int:
        """Multiply-adds of the forward pass for one input of `shape`."""
        return 0

    def forward(self, y: DeviceArray, x: DeviceArray) -> None:
        raise RuntimeError(f"{type(self).__name__} has no forward")

    def backward(self, dx: DeviceArray, dy: DeviceArray, x: DeviceArray, y: DeviceArray) -> None:
        """Compute dx and the parameters' gradients from dy, the gradient of the output.  Skip dx if its size is 0."""
        raise RuntimeError(f"{type(self).__name__} has no backward")

    def extra_repr(self) -> str:
        """Arguments for `repr`."""
        return ""

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.extra_repr()})"


def copy_into(ops: Backend, name: str, array: DeviceArray, values: Any) -> None:
    """Overwrite a device array with `values`; ValueError with both shapes if they differ."""
    values = _check.array(name, ops.to_host(values)) if array.size else np.asarray(values)
    _check.shape(name, values, array.shape)
    ops.copy_to(array, values.astype(array.dtype))


class Parametric(Layer):
    """A layer with a weight and, optionally, a bias, both drawn from U(-1/sqrt(fan_in), 1/sqrt(fan_in)) as in torch."""

    weight_shape: Shape
    has_bias: bool
    weight: DeviceArray  # these four are views, set by `bind`
    bias: DeviceArray
    weight_grad: DeviceArray
    bias_grad: DeviceArray

    def parameter_shapes(self) -> dict[str, Shape]:
        shapes = {"weight": self.weight_shape}
        if self.has_bias:
            shapes["bias"] = self.weight_shape[:1]
        return shapes

    def fan_in(self) -> int:
        """Inputs of one unit."""
        return math.prod(self.weight_shape[1:])

    def broadcast_to_weight(self, values: Any) -> Any:
        """Values per unit (such as `fan_in`) in a shape that broadcasts with the weight."""
        return values

    def initial_parameters(self, rng: np.random.Generator) -> dict[str, Array]:
        bound = 1 / math.sqrt(self.fan_in())
        return {name: rng.uniform(-bound, bound, shape) for name, shape in self.parameter_shapes().items()}

    def bind(self, ops: Backend, parameters: Views, gradients: Views, dtype: DType) -> None:
        super().bind(ops, parameters, gradients, dtype)
        if not self.has_bias:  # for kernels an empty array means no bias
            self.bias = self.bias_grad = ops.empty((0,), dtype)


class Conv2d(Parametric):
    """2-D convolution: (C, H, W) -> (O, OH, OW).  weight: (O, C/groups, KH, KW), bias: (O,).

    Sizes are integers or pairs (height, width); padding may also be "same" or "valid".  Raises ValueError if channels
    are not divisible by groups, or for "same" with a stride.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Pair,
        stride: Pair = 1,
        padding: Padding = 0,
        dilation: Pair = 1,
        groups: int = 1,
        bias: bool = True,
    ) -> None:
        self.in_channels = _check.integer("in_channels", in_channels, 1)
        self.out_channels = _check.integer("out_channels", out_channels, 1)
        self.kernel_size = _check.pair("kernel_size", kernel_size, 1)
        self.stride = _check.pair("stride", stride, 1)
        self.dilation = _check.pair("dilation", dilation, 1)
        self.padding = _check.conv_padding(padding, self.kernel_size, self.stride, self.dilation)
        self.same = isinstance(padding, str) and padding == "same"
        self.groups = _check.integer("groups", groups, 1)
        _check.divisible("in_channels", self.in_channels, "groups", self.groups)
        _check.divisible("out_channels", self.out_channels, "groups", self.groups)
        self.has_bias = bool(bias)
        self.weight_shape = (self.out_channels, self.in_channels // self.groups, *self.kernel_size)

    def output_shape(self, shape: Shape) -> Shape:
        _, *size = _check.map_input(self, shape, self.in_channels)
        window = self.kernel_size, self.stride, self.padding, self.dilation
        return (self.out_channels, *_check.conv_output_size(size, *window, self.same))

    def multiply_adds(self, shape: Shape) -> int:
        return math.prod(self.output_shape(shape)) * math.prod(self.weight_shape[1:])

    @property
    def operands(self) -> tuple[Any, ...]:
        """Arguments of kernels after x."""
        return self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups

    def forward(self, y: DeviceArray, x: DeviceArray) -> None:
        self.ops.conv2d_forward(y, x, *self.operands)

    def backward(self, dx: DeviceArray, dy: DeviceArray, x: DeviceArray, y: DeviceArray) -> None:
        window = self.stride, self.padding, self.dilation
        self.ops.conv2d_backward(dx, self.weight_grad, self.bias_grad, dy, x, self.weight, *window, self.groups)

    def config_overrides(self) -> dict[str, Any]:
        return {"padding": "same" if self.same else self.padding, "bias": self.has_bias}

    def extra_repr(self) -> str:
        text = f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}"
        padding = "same" if self.same else self.padding
        values = {"stride": self.stride, "padding": padding, "dilation": self.dilation, "groups": self.groups}
        defaults = {"stride": (1, 1), "padding": (0, 0), "dilation": (1, 1), "groups": 1}
        return text + _changed(values, defaults) + ("" if self.has_bias else ", bias=False")


class ConvTranspose2d(Parametric):
    """Transposed convolution: (C, H, W) -> (O, OH, OW).  weight: (C, O/groups, KH, KW), bias: (O,).

    The input gradient of a `Conv2d` with the same arguments (Dumoulin and Visin 2016, section 4).
    OH = (H - 1) * stride - 2 * padding + dilation * (KH - 1) + output_padding + 1.  output_padding must be smaller than
    stride (torch: or dilation).
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Pair,
        stride: Pair = 1,
        padding: Pair = 0,
        output_padding: Pair = 0,
        groups: int = 1,
        bias: bool = True,
        dilation: Pair = 1,
    ) -> None:
        self.in_channels = _check.integer("in_channels", in_channels, 1)
        self.out_channels = _check.integer("out_channels", out_channels, 1)
        self.kernel_size = _check.pair("kernel_size", kernel_size, 1)
        self.stride, self.dilation = _check.pair("stride", stride, 1), _check.pair("dilation", dilation, 1)
        self.padding = _check.pair("padding", padding, 0)
        self.output_padding = _check.output_padding(output_padding, self.stride)
        self.groups = _check.integer("groups", groups, 1)
        _check.divisible("in_channels", self.in_channels, "groups", self.groups)
        _check.divisible("out_channels", self.out_channels, "groups", self.groups)
        self.has_bias = bool(bias)
        self.weight_shape = (self.in_channels, self.out_channels // self.groups, *self.kernel_size)

    def parameter_shapes(self) -> dict[str, Shape]:
        return {"weight": self.weight_shape} | ({"bias": (self.out_channels,)} if self.has_bias else {})

    @property
    def options(self) -> tuple[Any, ...]:
        """Arguments of the kernels after the arrays."""
        return self.stride, self.padding, self.dilation, self.groups

    def output_shape(self, shape: Shape) -> Shape:
        _, *size = _check.map_input(self, shape, self.in_channels)
        window = self.kernel_size, self.stride, self.padding, self.output_padding, self.dilation
        return (self.out_channels, *_check.transposed_output_size(size, *window))

    def multiply_adds(self, shape: Shape) -> int:
        return math.prod(shape) * math.prod(self.weight_shape[1:])

    def bind(self, ops: Backend, parameters: Views, gradients: Views, dtype: DType) -> None:
        super().bind(ops, parameters, gradients, dtype)
        self._unused = ops.empty((0, *self.weight_shape[1:]), dtype), ops.empty((0,), dtype)

    def forward(self, y: DeviceArray, x: DeviceArray) -> None:
        self.ops.conv2d_backward(y, *self._unused, x, y, self.weight, *self.options)
        if self.has_bias:
            self.ops.add_bias(y, self.bias)

    def backward(self, dx: DeviceArray, dy: DeviceArray, x: DeviceArray, y: DeviceArray) -> None:
        no_weight, no_bias = self._unused
        no_input = no_weight.reshape((0, *dy.shape[1:]))
        self.ops.conv2d_backward(no_input, self.weight_grad, no_bias, x, dy, self.weight, *self.options)
        if self.has_bias:
            self.ops.sum_channels(self.bias_grad, dy)
        if dx.size:
            self.ops.conv2d_forward(dx, dy, self.weight, no_bias, *self.options)

    def config_overrides(self) -> dict[str, Any]:
        return {"bias": self.has_bias}

    def extra_repr(self) -> str:
        defaults = {
            "stride": (1, 1), "padding": (0, 0), "output_padding": (0, 0), "groups": 1, "dilation": (1, 1)
        }  # fmt: skip
        text = f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}"
        changed = _changed({name: getattr(self, name) for name in defaults}, defaults)
        return text + changed + ("" if self.has_bias else ", bias=False")


class Linear(Parametric):
    """Fully connected: (F,) -> (O,).  weight: (O, F), bias: (O,)."""

    def __init__(self, in_features: int, out_features: int, bias: bool = True) -> None:
        self.in_features = _check.integer("in_features", in_features, 1)
        self.out_features = _check.integer("out_features", out_features, 1)
        self.has_bias = bool(bias)
        self.weight_shape = (self.out_features, self.in_features)

    def output_shape(self, shape: Shape) -> Shape:
        _check.vector_input(self, shape, self.in_features)
        return (self.out_features,)

    def multiply_adds(self, shape: Shape) -> int:
        return self.in_features * self.out_features

    def forward(self, y: DeviceArray, x: DeviceArray) -> None:
        self.ops.linear_forward(y, x, self.weight, self.bias)

    def backward(self, dx: DeviceArray, dy: DeviceArray, x: DeviceArray, y: DeviceArray) -> None:
        self.ops.linear_backward(dx, self.weight_grad, self.bias_grad, dy, x, self.weight)

    def config_overrides(self) -> dict[str, Any]:
        return {"bias": self.has_bias}

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}" + ("" if self.has_bias else ", bias=False")


GAUSSIAN = scalars.activation(scalars.GAUSSIAN, -0.5)  # exp(-x/2), of squared distances


class GaussianRBF(Layer):
    """Gaussian radial basis functions: (F,) -> (O,), y[k] = exp(-|x - weight[k]|^2 / 2) (Broomhead and Lowe 1988).

    weight: (O, F), the centres, trainable, drawn from N(0, scale^2).  With many features and scale 1, |x - c|^2 is so
    large that outputs and gradients start near zero, and learning is slow.  After the 84 units of LeNet-5, a scale of
    0.1 to 0.3 learns at once.
    """

    reads_output = True

    weight: DeviceArray  # these two are set by `bind`
    weight_grad: DeviceArray

    def __init__(self, in_features: int, out_features: int, scale: float = 1.0) -> None:
        self.in_features = _check.integer("in_features", in_features, 1)
        self.out_features = _check.integer("out_features", out_features, 1)
        self.scale = _check.number("scale", scale, 0)

    def parameter_shapes(self) -> dict[str, Shape]:
        return {"weight": (self.out_features, self.in_features)}

    def initial_parameters(self, rng: np.random.Generator) -> dict[str, Array]:
        return {"weight": self.scale * rng.standard_normal((self.out_features, self.in_features))}

    def output_shape(self, shape: Shape) -> Shape:
        _check.vector_input(self, shape, self.in_features)
        return (self.out_features,)

    def multiply_adds(self, shape: Shape) -> int:
        return self.in_features * self.out_features

    def reserve(self, ops: Backend, batch: int, shape: Shape, dtype: DType) -> SimpleNamespace:
        return SimpleNamespace(squares=ops.empty((batch, self.out_features), dtype))  # |x - c|^2, then its gradient

    def forward(self, y: DeviceArray, x: DeviceArray) -> None:
        self.ops.squared_distance_forward(self.saved.squares, x, self.weight)
        self.ops.activation_forward(y, self.saved.squares, GAUSSIAN)

    def backward(self, dx: DeviceArray, dy: DeviceArray, x: DeviceArray, y: DeviceArray) -> None:
        self.ops.activation_backward(self.saved.squares, dy, y, GAUSSIAN)
        self.ops.squared_distance_backward(dx, self.weight_grad, self.saved.squares, x, self.weight)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}" + (f", scale={self.scale:g}" if self.scale != 1 else "")


def _changed(values: dict[str, Any], defaults: dict[str, Any]) -> str:
    """For `extra_repr`: ", name=value" for each of `values` that is not the default."""
    return "".join(f", {name}={value!r}" for name, value in values.items() if value != defaults[name])


class _Pool2d(Layer):
    kernel_size: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation = (1, 1)
    ceil_mode: bool
    same = False
    count_include_pad = True
    divisor = 0  # divisor_override; 0 for none

    def output_shape(self, shape: Shape) -> Shape:
        channels, *size = _check.map_input(self, shape)
        if self.same:
            return tuple(shape)
        window = self.kernel_size, self.stride, self.padding, self.dilation
        return (channels, *_check.pool_output_size(size, *window, self.ceil_mode))

    def extra_repr(self) -> str:
        values = {
            "padding": "same" if self.same else self.padding,
            "dilation": self.dilation,
            "ceil_mode": self.ceil_mode,
            "count_include_pad": self.count_include_pad,
            "divisor_override": self.divisor,
        }
        defaults = {"padding": (0, 0), "dilation": (1, 1), "ceil_mode": False, "count_include_pad": True}
        changed = _changed(values, defaults | {"divisor_override": 0})
        return f"kernel_size={self.kernel_size}, stride={self.stride}{changed}"


class AvgPool2d(_Pool2d):
    """Mean of each window: (C, H, W) -> (C, OH, OW).  Padding is at most half of the window."""

    def __init__(
        self,
        kernel_size: Pair,
        stride: Pair | None = None,
        padding: Pair = 0,
        ceil_mode: bool = False,
        count_include_pad: bool = True,
        divisor_override: int | None = None,
    ) -> None:
        self.kernel_size = _check.pair("kernel_size", kernel_size, 1)
        self.stride = _check.pair("stride", kernel_size if stride is None else stride, 1)
        self.padding = _check.pool_padding(padding, self.kernel_size)
        self.ceil_mode, self.count_include_pad = bool(ceil_mode), bool(count_include_pad)
        self.divisor = 0 if divisor_override is None else _check.integer("divisor_override", divisor_override, 1)

    def config_overrides(self) -> dict[str, Any]:
        return {"divisor_override": self.divisor or None}

    @property
    def options(self) -> tuple[Any, ...]:
        """Arguments of the kernels after the arrays."""
        return self.kernel_size, self.stride, self.padding, self.count_include_pad, self.divisor

    def forward(self, y: DeviceArray, x: DeviceArray) -> None:
        self.ops.avg_pool2d_forward(y, x, *self.options)

    def backward(self, dx: DeviceArray, dy: DeviceArray, x: DeviceArray, y: DeviceArray) -> None:
        self.ops.avg_pool2d_backward(dx, dy, *self.options)


class MaxPool2d(_Pool2d):
    """Largest entry of each window: (C, H, W) -> (C, OH, OW); the first of equal ones, as in torch.

    With stride 1, padding may be "same" (TensorFlow's): the output has the size of the input; the last windows of an
    even size extend over the edge.
    """

    def __init__(
        self,
        kernel_size: Pair,
        stride: Pair | None = None,
        padding: Padding = 0,
        dilation: Pair = 1,
        ceil_mode: bool = False,
    ) -> None:
        self.kernel_size = _check.pair("kernel_size", kernel_size, 1)
        self.stride = _check.pair("stride", kernel_size if stride is None else stride, 1)
        self.dilation = _check.pair("dilation", dilation, 1)
        self.same = isinstance(padding, str)
        if isinstance(padding, str):
            _check.choice("padding", padding, ("same",))
            self.padding = _check.conv_padding(padding, self.kernel_size, self.stride, self.dilation)
        else:
            self.padding = _check.pool_padding(padding, self.kernel_size)
        self.ceil_mode = bool(ceil_mode)

    def config_overrides(self) -> dict[str, Any]:
        return {"padding": "same" if self.same else self.padding}

    @property
    def options(self) -> tuple[Any, ...]:
        """Arguments of the kernels after the arrays."""
        return self.kernel_size, self.stride, self.padding, self.dilation

    def reserve(self, ops: Backend, batch: int, shape: Shape, dtype: DType) -> SimpleNamespace:
        # The argmax of each window, as an index into its channel.
        return SimpleNamespace(indices=ops.empty((batch * math.prod(self.output_shape(shape)),), np.int32))

    def forward(self, y: DeviceArray, x: DeviceArray) -> None:
        self.ops.max_pool2d_forward(y, self.saved.indices.reshape(y.shape), x, *self.options)

    def backward(self, dx: DeviceArray, dy: DeviceArray, x: DeviceArray, y: DeviceArray) -> None:
        self.ops.max_pool2d_backward(dx, dy, self.saved.indices.reshape(dy.shape), *self.options)


class AdaptiveAvgPool2d(Layer):
    """Mean of windows that share the input out evenly: (C, H, W) -> (C, OH, OW).

    output_size: an integer or a pair; None keeps the input's size.  Window i of an axis has the rows floor(i*H / OH) to
    ceil((i + 1)*H / OH) - 1.  ``AdaptiveAvgPool2d(1)`` is global average pooling.
    """

    def __init__(self, output_size: int | tuple[int | None, int | None]) -> None:
        pair = output_size if isinstance(output_size, (tuple, list)) else (output_size, output_size)
        if len(pair) != 2:
            raise ValueError(f"output_size must be an integer or a pair, got {output_size!r}")
        self.output_size = tuple(None if n is None else _check.integer("output_size", n, 1) for n in pair)

    def output_shape(self, shape: Shape) -> Shape:
        channels, *size = _check.map_input(self, shape)
        return (channels, *(n if out is None else out for n, out in zip(size, self.output_size, strict=True)))

    def forward(self, y: DeviceArray, x: DeviceArray) -> None:
        self.ops.adaptive_avg_pool2d_forward(y, x)

    def backward(self, dx: DeviceArray, dy: DeviceArray, x: DeviceArray, y: DeviceArray) -> None:
        self.ops.adaptive_avg_pool2d_backward(dx, dy)

    def extra_repr(self) -> str:
        return f"output_size={self.output_size}"


class Upsample(Layer):
    """Nearest-neighbour upsampling: (C, H, W) -> (C, OH, OW), y[i, j] = x[i*H // OH, j*W // OW].

    size: (OH, OW), or scale_factor: how many times the input, whole numbers.  One of the two.  mode: "nearest" only
    """

    def __init__(
        self, size: Pair | None = None, scale_factor: float | Pair | None = None, mode: str = "nearest"
    ) -> None:
        if (size is None) == (scale_factor is None):
            raise ValueError("Upsample needs one of size and scale_factor")
        self.size = None if size is None else _check.pair("size", size, 1)
        self.scale_factor = None if scale_factor is None else _check.pair("scale_factor", _whole(scale_factor), 1)
        self.mode = _check.choice("mode", mode, ("nearest",))

    def output_shape(self, shape: Shape) -> Shape:
        channels, *size = _check.map_input(self, shape)
        factors = self.scale_factor or (1, 1)
        return (channels, *(self.size or (n * factor for n, factor in zip(size, factors, strict=True))))

    def forward(self, y: DeviceArray, x: DeviceArray) -> None:
        self.ops.upsample_nearest2d_forward(y, x)

    def backward(self, dx: DeviceArray, dy: DeviceArray, x: DeviceArray, y: DeviceArray) -> None:
        self.ops.upsample_nearest2d_backward(dx, dy)

    def extra_repr(self) -> str:
        return f"size={self.size}" if self.size else f"scale_factor={self.scale_factor}"


def _whole(value: Any) -> Any:
    """Floating-point numbers that are whole, as integers; other values unchanged."""
    if isinstance(value, (tuple, list)):
        return tuple(map(_whole, value))
    return int(value) if isinstance(value, float) and value.is_integer() else value


class ZeroPad2d(Layer):
    """A border of zeros: (C, H, W) -> (C, top + H + bottom, left + W + right).

    padding: an integer, or (left, right, top, bottom); negative numbers crop, as in torch
    """

    def __init__(self, padding: int | tuple[int, int, int, int]) -> None:
        sides = padding if isinstance(padding, (tuple, list)) else (padding,) * 4
        if len(sides) != 4:
            raise ValueError(f"padding must be an integer or (left, right, top, bottom), got {padding!r}")
        self.padding = tuple(_check.integer("padding", side) for side in sides)

    def output_shape(self, shape: Shape) -> Shape:
        channels, height, width = _check.map_input(self, shape)
        left, right, top, bottom = self.padding
        size = height + top + bottom, width + left + right
        if min(size) < 1:
            raise ValueError(f"{self!r} leaves nothing of an input {tuple(shape)}")
        return (channels, *size)

    def forward(self, y: DeviceArray, x: DeviceArray) -> None:
        self.ops.zero_pad2d(y, x, (self.padding[2], self.padding[0]))

    def backward(self, dx: DeviceArray, dy: DeviceArray, x: DeviceArray, y: DeviceArray) -> None:
        self.ops.zero_pad2d(dx, dy, (-self.padding[2], -self.padding[0]))

    def extra_repr(self) -> str:
        return str(self.padding)


class _Norm(Layer):
    """Normalisation of (C, H, W), with a weight (1 at first) and a bias (0) per channel if `affine`."""

    channels: int
    affine: bool
    weight: DeviceArray
    bias: DeviceArray
    weight_grad: DeviceArray
    bias_grad: DeviceArray

    def parameter_shapes(self) -> dict[str, Shape]:
        return {"weight": (self.channels,), "bias": (self.channels,)} if self.affine else {}

    def initial_parameters(self, rng: np.random.Generator) -> dict[str, Array]:
        return {"weight": np.ones(self.channels), "bias": np.zeros(self.channels)} if self.affine else {}

    def bind(self, ops: Backend, parameters: Views, gradients: Views, dtype: DType) -> None:
        super().bind(ops, parameters, gradients, dtype)
        if not self.affine:
            self.weight = self.bias = self.weight_grad = self.bias_grad = ops.empty((0,), dtype)

    def output_shape(self, shape: Shape) -> Shape:
        return _check.map_input(self, shape, self.channels)


class BatchNorm2d(_Norm):
    """Normalisation of each channel over the batch (Ioffe and Szegedy 2015): (C, H, W) -> (C, H, W).

    Training mode uses the statistics of the batch and moves the running statistics towards them by `momentum` (None:
    cumulative mean over all batches).  Eval mode uses the running statistics, or the batch's if not
    `track_running_stats`.  state_dict: weight, bias, running_mean, running_var and num_batches_tracked, as in torch.
    """

    running_mean: DeviceArray  # these six are set by `bind`, from `initial_buffers`
    running_var: DeviceArray
    num_batches_tracked: DeviceArray
    _running_mean: DeviceArray
    _running_var: DeviceArray
    _batches: DeviceArray
    sync: Any = None  # `distributed.Ranks` while it trains this layer with the statistics of all ranks' images

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
    ) -> None:
        self.channels = _check.integer("num_features", num_features, 1)
        self.eps = _check.number("eps", eps, 0)
        self.momentum = None if momentum is None else _check.number("momentum", momentum, 0, maximum=1)
        self.affine, self.track_running_stats = bool(affine), bool(track_running_stats)

    def config_overrides(self) -> dict[str, Any]:
        return {"num_features": self.channels}

    def initial_buffers(self, dtype: DType) -> dict[str, Array]:
        mean, var, batches = np.zeros(self.channels, dtype), np.ones(self.channels, dtype), np.zeros(1, np.int64)
        if self.track_running_stats:
            return {"running_mean": mean, "running_var": var, "num_batches_tracked": batches}
        return {"_running_mean": mean, "_running_var": var, "_batches": batches}

    def reserve(self, ops: Backend, batch: int, shape: Shape, dtype: DType) -> SimpleNamespace:
        mean, rstd = ops.empty((self.channels,), dtype), ops.empty((self.channels,), dtype)
        return SimpleNamespace(mean=mean, rstd=rstd, use_batch_stats=True, synchronized=False)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in super().__getstate__().items() if name != "sync"}

    def forward(self, y: DeviceArray, x: DeviceArray) -> None:
        saved = self.saved
        saved.use_batch_stats = self.training or not self.track_running_stats
        saved.synchronized = self.training and self.sync is not None and self.sync.active
        if saved.use_batch_stats and saved.images * math.prod(x.shape[2:4]) == 1 and not saved.synchronized:
            raise ValueError(f"{self!r} needs more than one value a channel in training, got shape {tuple(x.shape)}")
        if self.track_running_stats:
            running = self.running_mean, self.running_var, self.num_batches_tracked
            momentum = -1.0 if self.momentum is None else self.momentum
        else:
            running, momentum = (self._running_mean, self._running_var, self._batches), 0.0
        if saved.synchronized:
            self.sync.batch_norm_forward(self, y, x, running, momentum)
        else:
            self.ops.batch_norm_forward(
                y, x, self.weight, self.bias, saved.mean, saved.rstd, *running, momentum, self.eps,
                saved.use_batch_stats, saved.images,
            )  # fmt: skip
        if self.training and self.track_running_stats:
            self.ops.increment(self.num_batches_tracked)

    def backward(self, dx: DeviceArray, dy: DeviceArray, x: DeviceArray, y: DeviceArray) -> None:
        saved = self.saved
        if saved.synchronized:
            self.sync.batch_norm_backward(self, dx, dy, x)
            return
        self.ops.batch_norm_backward(
            dx, self.weight_grad, self.bias_grad, dy, x, self.weight, saved.mean, saved.rstd, saved.use_batch_stats,
            saved.images,
        )  # fmt: skip

    def extra_repr(self) -> str:
        defaults = {"eps": 1e-5, "momentum": 0.1, "affine": True, "track_running_stats": True}
        return str(self.channels) + _changed({name: getattr(self, name) for name in defaults}, defaults)


class BatchNorm1d(BatchNorm2d):
    """`BatchNorm2d` of vectors: (F,) -> (F,), each feature over the batch."""

    def output_shape(self, shape: Shape) -> Shape:
        _check.vector_input(self, shape, self.channels)
        return shape


class LayerNorm(Layer):
    """Normalisation of each image over its last axes (Ba, Kiros and Hinton 2016): (..., *normalized_shape) -> the same.

    normalized_shape: an integer, or the sizes of the last axes.  weight (1 at first) and bias (0) have this shape.
    """

    needs_nchw = True
    weight: DeviceArray
    bias: DeviceArray
    weight_grad: DeviceArray
    bias_grad: DeviceArray

    def __init__(
        self, normalized_shape: int | Shape, eps: float = 1e-5, elementwise_affine: bool = True, bias: bool = True
    ) -> None:
        sizes = normalized_shape if isinstance(normalized_shape, (tuple, list)) else (normalized_shape,)
        self.normalized_shape = tuple(_check.integer("normalized_shape", size, 1) for size in sizes)
        if not self.normalized_shape:
            raise ValueError("normalized_shape must have at least one axis")
        self.eps = _check.number("eps", eps, 0)
        self.elementwise_affine, self.has_bias = bool(elementwise_affine), bool(bias) and bool(elementwise_affine)

    def parameter_shapes(self) -> dict[str, Shape]:
        names = ["weight"] * self.elementwise_affine + ["bias"] * self.has_bias
        return dict.fromkeys(names, self.normalized_shape)

    def initial_parameters(self, rng: np.random.Generator) -> dict[str, Array]:
        fill = {"weight": np.ones, "bias": np.zeros}
        return {name: fill[name](shape) for name, shape in self.parameter_shapes().items()}

    def bind(self, ops: Backend, parameters: Views, gradients: Views, dtype: DType) -> None:
        super().bind(ops, parameters, gradients, dtype)
        unused = ops.empty(self.normalized_shape if self.elementwise_affine else (0,), dtype)
        if not self.elementwise_affine:
            self.weight = self.weight_grad = unused
        if not self.has_bias:  # the kernels read a bias, which stays zero, if there is a weight
            self.bias, self.bias_grad = unused, ops.empty(unused.shape, dtype)

    def output_shape(self, shape: Shape) -> Shape:
        if tuple(shape[-len(self.normalized_shape) :]) != self.normalized_shape:
            raise ValueError(f"{self!r} takes inputs that end with {self.normalized_shape}, got {tuple(shape)}")
        return shape

    def reserve(self, ops: Backend, batch: int, shape: Shape, dtype: DType) -> SimpleNamespace:
        rows = batch * math.prod(shape) // math.prod(self.normalized_shape)
        return SimpleNamespace(mean=ops.empty((rows,), dtype), rstd=ops.empty((rows,), dtype))

    def _rows(self, array: DeviceArray) -> DeviceArray:
        """(R, M), with M numbers to normalise in a row; an array of size 0 has no rows."""
        size = math.prod(self.normalized_shape)
        return array.reshape((int(array.size) // size, size))

    def forward(self, y: DeviceArray, x: DeviceArray) -> None:
        parameters = self.weight.reshape(-1), self.bias.reshape(-1)
        self.ops.layer_norm_forward(
            self._rows(y), self._rows(x), *parameters, self.saved.mean, self.saved.rstd, self.eps
        )

    def backward(self, dx: DeviceArray, dy: DeviceArray, x: DeviceArray, y: DeviceArray) -> None:
        gradients = self.weight_grad.reshape(-1), self.bias_grad.reshape(-1)
        arrays = self._rows(dx), *gradients, self._rows(dy), self._rows(x)
        self.ops.layer_norm_backward(*arrays, self.weight.reshape(-1), self.saved.mean, self.saved.rstd)

    def config_overrides(self) -> dict[str, Any]:
        return {"bias": self.has_bias}

    def extra_repr(self) -> str:
        defaults = {"eps": 1e-5, "elementwise_affine": True}
        text = str(self.normalized_shape) + _changed({name: getattr(self, name) for name in defaults}, defaults)
        return text + ("" if self.has_bias or not self.elementwise_affine else ", bias=False")


class GroupNorm(_Norm):
    """Normalisation of each image over groups of channels (Wu and He 2018): (C, H, W) -> (C, H, W).

    Raises ValueError if num_channels is not divisible by num_groups.
    """

    def __init__(self, num_groups: int, num_channels: int, eps: float = 1e-5, affine: bool = True) -> None:
        self.groups = _check.integer("num_groups", num_groups, 1)
        self.channels = _check.integer("num_channels", num_channels, 1)
        _check.divisible("num_channels", self.channels, "num_groups", self.groups)
        self.eps, self.affine = _check.number("eps", eps, 0), bool(affine)

    def config_overrides(self) -> dict[str, Any]:
        return {"num_groups": self.groups, "num_channels": self.channels}

    def reserve(self, ops: Backend, batch: int, shape: Shape, dtype: DType) -> SimpleNamespace:
        mean, rstd = ops.empty((batch, self.groups), dtype), ops.empty((batch, self.groups), dtype)
        return SimpleNamespace(mean=mean, rstd=rstd)

    def forward(self, y: DeviceArray, x: DeviceArray) -> None:
        saved = self.saved
        self.ops.group_norm_forward(y, x, self.weight, self.bias, saved.mean, saved.rstd, self.groups, self.eps)

    def backward(self, dx: DeviceArray, dy: DeviceArray, x: DeviceArray, y: DeviceArray) -> None:
        saved = self.saved
        self.ops.group_norm_backward(
            dx, self.weight_grad, self.bias_grad, dy, x, self.weight, saved.mean, saved.rstd, self.groups
        )

    def extra_repr(self) -> str:
        return f"{self.groups}, {self.channels}" + ("" if self.affine else ", affine=False")


class Dropout(Layer):
    """In training, zeroes each element with probability p and divides the others by 1 - p (Srivastava et al. 2014).

    The masks depend on the model's rng, but not on the number of threads or the device.
    """

    seed = 0
    _counter: DeviceArray  # these two are set by `bind`
    _offset: DeviceArray  # (1,) images of the batch before those of forward, which may be a part of it

    def __init__(self, p: float = 0.5) -> None:
        self.p = _check.number("p", p, 0, maximum=1)

    def initial_parameters(self, rng: np.random.Generator) -> dict[str, Array]:
        self.seed = int(rng.integers(2**63))
        return {}

    def initial_buffers(self, dtype: DType) -> dict[str, Array]:
        return {"_counter": np.zeros(1, np.int64)}  # training steps so far

    def get_extra_state(self) -> int:
        return self.seed

    def set_extra_state(self, state: int) -> None:
        self.seed = int(state)

    def bind(self, ops: Backend, parameters: Views, gradients: Views, dtype: DType) -> None:
        super().bind(ops, parameters, gradients, dtype)
        self._offset = ops.empty((1,), np.int64)

    def elements_per_mask(self, x: DeviceArray) -> int:
        """Number of consecutive elements that share one mask value."""
        return 1

    def reserve(self, ops: Backend, batch: int, shape: Shape, dtype: DType) -> SimpleNamespace:
        return SimpleNamespace(p=0.0)  # the p of the last forward

    def forward(self, y: DeviceArray, x: DeviceArray) -> None:
        self.saved.p = self.p if self.training else 0.0
        if self.training:
            self.ops.increment(self._counter)
        self.ops.dropout(y, x, self._counter, self._offset, self.seed, self.saved.p, self.elements_per_mask(x))

    def backward(self, dx: DeviceArray, dy: DeviceArray, x: DeviceArray, y: DeviceArray) -> None:
        self.ops.dropout(dx, dy, self._counter, self._offset, self.seed, self.saved.p, self.elements_per_mask(x))

    def extra_repr(self) -> str:
        return f"p={self.p:g}"


class Dropout2d(Dropout):
    """`Dropout` of whole channels: (C, H, W) -> (C, H, W) (Tompson et al. 2015)."""

    def output_shape(self, shape: Shape) -> Shape:
        return _check.map_input(self, shape)

    def elements_per_mask(self, x: DeviceArray) -> int:
        return int(x.shape[2] * x.shape[3])


class Flatten(Layer):
    """(C, H, W) -> (C*H*W,): a view."""

    is_view = True

    def output_shape(self, shape: Shape) -> Shape:
        return (math.prod(shape),)


class Unflatten(Layer):
    """(F,) -> unflattened_size: a view.  dim must be 1, the axis after the batch's; one size may be -1."""

    is_view = True

    def __init__(self, dim: int, unflattened_size: Shape) -> None:
        self.dim = _check.choice("dim", dim, (1, -1))
        _check.instance("unflattened_size", unflattened_size, (tuple, list), "a tuple of sizes")
        self.unflattened_size = tuple(_check.integer("unflattened_size", size, -1) for size in unflattened_size)
        if not self.unflattened_size or 0 in self.unflattened_size or self.unflattened_size.count(-1) > 1:
            raise ValueError(f"unflattened_size must be positive sizes, one of them maybe -1, got {unflattened_size}")

    def output_shape(self, shape: Shape) -> Shape:
        known = math.prod(size for size in self.unflattened_size if size > 0)
        fits = len(shape) == 1 and (shape[0] % known == 0 if -1 in self.unflattened_size else shape[0] == known)
        if not fits:
            raise ValueError(f"{self!r} takes a vector of that many numbers, got {tuple(shape)}")
        return tuple(shape[0] // known if size == -1 else size for size in self.unflattened_size)

    def extra_repr(self) -> str:
        return f"{self.dim}, {self.unflattened_size}"


class _Activation(Layer):
    """y = f(x) for each element; `activation_code` says which f."""

    in_place = reads_output = True

    def forward(self, y: DeviceArray, x: DeviceArray) -> None:
        self.ops.activation_forward(y, x, self.activation_code)

    def backward(self, dx: DeviceArray, dy: DeviceArray, x: DeviceArray, y: DeviceArray) -> None:
        self.ops.activation_backward(dx, dy, y if self.reads_output else x, self.activation_code)


class Tanh(_Activation):
    """Hyperbolic tangent."""

    activation_code = scalars.activation(scalars.TANH)


class ScaledTanh(_Activation):
    """A * tanh(S * x); the squashing function of LeCun et al. 1998 (appendix A) with A = 1.7159, S = 2/3."""

    def __init__(self, A: float = 1.7159, S: float = 2 / 3) -> None:
        self.A, self.S = _check.number("A", A), _check.number("S", S)
        if self.A == 0:
            raise ValueError("A must not be 0")

    @property
    def activation_code(self) -> tuple[int, float, float]:
        return scalars.activation(scalars.SCALED_TANH, self.A, self.S)

    def extra_repr(self) -> str:
        return f"A={self.A:g}, S={self.S:g}"


class Sigmoid(_Activation):
    """1 / (1 + exp(-x))."""

    activation_code = scalars.activation(scalars.SIGMOID)


class ReLU(_Activation):
    """max(x, 0); the derivative at 0 is 0, as in torch."""

    activation_code = scalars.activation(scalars.RELU)


class LeakyReLU(_Activation):
    """x for x > 0, negative_slope * x below."""

    in_place = reads_output = False  # y does not determine the sign of x if the slope is 0 or negative

    def __init__(self, negative_slope: float = 0.01) -> None:
        self.negative_slope = _check.number("negative_slope", negative_slope)

    @property
    def activation_code(self) -> tuple[int, float, float]:
        return scalars.activation(scalars.LEAKY_RELU, self.negative_slope)

    def extra_repr(self) -> str:
        return f"negative_slope={self.negative_slope:g}"


class ELU(_Activation):
    """x for x > 0, alpha * (exp(x) - 1) below (Clevert, Unterthiner and Hochreiter 2016)."""

    def __init__(self, alpha: float = 1.0) -> None:
        self.alpha = _check.number("alpha", alpha, 0)

    @property
    def activation_code(self) -> tuple[int, float, float]:
        return scalars.activation(scalars.ELU, self.alpha)

    def extra_repr(self) -> str:
        return f"alpha={self.alpha:g}"


class GELU(_Activation):
    """x * P(Z <= x) for a standard normal Z (Hendrycks and Gimpel 2016).

    approximate: "none", or "tanh": x/2 * (1 + tanh(sqrt(2/pi) * (x + 0.044715 x^3)))
    """

    in_place = reads_output = False

    def __init__(self, approximate: str = "none") -> None:
        self.approximate = _check.choice("approximate", approximate, ("none", "tanh"))

    @property
    def activation_code(self) -> tuple[int, float, float]:
        if self.approximate == "tanh":
            return scalars.activation(scalars.GELU_TANH, *scalars.GELU_TANH_CONSTANTS)
        return scalars.activation(scalars.GELU, *scalars.GELU_CONSTANTS)

    def extra_repr(self) -> str:
        return f"approximate={self.approximate!r}"


class SiLU(_Activation):
    """x / (1 + exp(-x)), also called swish."""

    in_place = reads_output = False
    activation_code = scalars.activation(scalars.SILU)


class Softplus(_Activation):
    """log(1 + exp(beta * x)) / beta; x where beta * x > threshold, as in torch."""

    in_place = reads_output = False

    def __init__(self, beta: float = 1.0, threshold: float = 20.0) -> None:
        self.beta, self.threshold = _check.number("beta", beta), _check.number("threshold", threshold)
        if self.beta <= 0:
            raise ValueError(f"beta must be positive, got {self.beta:g}")

    @property
    def activation_code(self) -> tuple[int, float, float]:
        return scalars.activation(scalars.SOFTPLUS, self.beta, self.threshold)

    def extra_repr(self) -> str:
        return f"beta={self.beta:g}, threshold={self.threshold:g}"


class Hardtanh(_Activation):
    """x, but at least min_val and at most max_val; the derivative at both is 0, as in torch."""

    def __init__(self, min_val: float = -1.0, max_val: float = 1.0) -> None:
        self.min_val, self.max_val = _check.number("min_val", min_val), _check.number("max_val", max_val)
        if self.min_val >= self.max_val:
            raise ValueError(f"max_val must be larger than min_val, {self.min_val:g}, got {self.max_val:g}")

    @property
    def activation_code(self) -> tuple[int, float, float]:
        return scalars.activation(scalars.HARDTANH, self.min_val, self.max_val)

    def extra_repr(self) -> str:
        return f"min_val={self.min_val:g}, max_val={self.max_val:g}"


class ReLU6(_Activation):
    """min(max(x, 0), 6)."""

    activation_code = scalars.activation(scalars.RELU6, 0.0, 6.0)


class _OverClasses(Layer):
    """A layer over the only axis of its input; torch's dim is 1 or -1."""

    reads_output = True

    def __init__(self, dim: int = -1) -> None:
        self.dim = _check.choice("dim", dim, (-1, 1))

    def output_shape(self, shape: Shape) -> Shape:
        if len(shape) != 1:
            raise ValueError(f"{self!r} takes (classes,), got {shape}")
        return shape

    def extra_repr(self) -> str:
        return f"dim={self.dim}"


class Softmax(_OverClasses):
    """exp(x) / sum(exp(x)) over the classes.  CrossEntropyLoss takes logits: do not train with it after this layer."""

    def forward(self, y: DeviceArray, x: DeviceArray) -> None:
        self.ops.softmax_forward(y, x)

    def backward(self, dx: DeviceArray, dy: DeviceArray, x: DeviceArray, y: DeviceArray) -> None:
        self.ops.softmax_backward(dx, dy, y)


class LogSoftmax(_OverClasses):
    """x - log(sum(exp(x))) over the classes."""

    def forward(self, y: DeviceArray, x: DeviceArray) -> None:
        self.ops.log_softmax_forward(y, x)

    def backward(self, dx: DeviceArray, dy: DeviceArray, x: DeviceArray, y: DeviceArray) -> None:
        self.ops.log_softmax_backward(dx, dy, y)
