"""torch's functions on NumPy arrays, over the CPU kernels, each with a backward function.

`f_backward(dy, x, ...)` takes dy, the gradient of f's output, and the arguments of `f(x, ...)`.  It returns the
gradients of the differentiable arguments in their order (a tuple if there are several; None for a missing bias).
float32 and float64 are kept, other real types become float32.  NaN and infinities pass through.  For teaching and for
checking: every call allocates, so train with `Sequential`.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from tinycnn import _check, kernels, layers, scalars
from tinycnn._typing import Array, DType, Padding, Pair
from tinycnn.losses import CrossEntropyLoss, MSELoss, as_float


def _prepare(name: str, x: ArrayLike, ndim: int | None = None, axes: str = "", dtype: DType | None = None) -> Array:
    """x as an array that kernels take, of `dtype`; by default its own floating-point type, or float32."""
    x = _check.array(name, x, ndim, axes)
    return as_float(x) if dtype is None else np.require(x, dtype, ["C", "W"])


def _prepare_bias(bias: ArrayLike | None, weight: Array) -> Array:
    """The bias (O,) of a weight (O, ...); empty for None."""
    if bias is None:
        return np.empty(0, weight.dtype)
    b = _prepare("bias", bias, 1, "(O,)", weight.dtype)
    _check.shape("bias", b, weight.shape[:1])
    return b


def _prepare_gradient(dy: ArrayLike, y: Array) -> Array:
    dy = _check.array("dy", dy)
    _check.shape("dy", dy, y.shape, "the output")
    return np.require(dy, y.dtype, ["C", "W"])


# --- convolution ------------------------------------------------------------------------------------------------------


def _conv_arguments(
    input: ArrayLike,
    weight: ArrayLike,
    bias: ArrayLike | None,
    stride: Pair,
    padding: Padding,
    dilation: Pair,
    groups: int,
) -> tuple[Array, Array, Array, Array, tuple[Any, ...]]:
    """The kernels' arguments: a new output, the arrays, and (stride, padding, dilation, groups)."""
    x = _prepare("input", input, 4, "(N, C, H, W)")
    w = _prepare("weight", weight, 4, "(O, C/groups, KH, KW)", x.dtype)
    b = _prepare_bias(bias, w)
    stride, dilation = _check.pair("stride", stride, 1), _check.pair("dilation", dilation, 1)
    groups, same = _check.integer("groups", groups, 1), isinstance(padding, str) and padding == "same"
    kernel_size = w.shape[2], w.shape[3]
    padding = _check.conv_padding(padding, kernel_size, stride, dilation)
    if x.shape[1] % groups or w.shape[0] % groups:
        raise ValueError(f"channels must be divisible by groups {groups}, got {x.shape[1]} in and {w.shape[0]} out")
    if w.shape[1] != x.shape[1] // groups:
        raise ValueError(f"weight must have {x.shape[1] // groups} input channels a group, got shape {w.shape}")
    size = _check.conv_output_size(x.shape[2:], kernel_size, stride, padding, dilation, same)
    y = np.empty((len(x), len(w), *size), x.dtype)
    return y, x, w, b, (stride, padding, dilation, groups)


def conv2d(
    input: ArrayLike,
    weight: ArrayLike,
    bias: ArrayLike | None = None,
    stride: Pair = 1,
    padding: Padding = 0,
    dilation: Pair = 1,
    groups: int = 1,
) -> Array:
    """(N, C, H, W), (O, C/groups, KH, KW), (O,) -> (N, O, OH, OW)."""
    y, x, w, b, options = _conv_arguments(input, weight, bias, stride, padding, dilation, groups)
    kernels.conv2d_forward(y, x, w, b, *options)
    return y


def conv2d_backward(
    dy: ArrayLike,
    input: ArrayLike,
    weight: ArrayLike,
    bias: ArrayLike | None = None,
    stride: Pair = 1,
    padding: Padding = 0,
    dilation: Pair = 1,
    groups: int = 1,
) -> tuple[Array, Array, Array | None]:
    """Gradients (input, weight, bias)."""
    y, x, w, b, options = _conv_arguments(input, weight, bias, stride, padding, dilation, groups)
    dx, dw, db = np.empty_like(x), np.empty_like(w), np.empty_like(b)
    kernels.conv2d_backward(dx, dw, db, _prepare_gradient(dy, y), x, w, *options)
    return dx, dw, None if bias is None else db


# --- pooling ----------------------------------------------------------------------------------------------------------


def _pool_arguments(
    input: ArrayLike, kernel_size: Pair, stride: Pair | None, padding: Pair, dilation: Pair, ceil_mode: bool
) -> tuple[Array, Array, tuple[Any, ...]]:
    """The kernels' arguments: a new output, the input, and (kernel_size, stride, padding, dilation)."""
    x = _prepare("input", input, 4, "(N, C, H, W)")
    kernel_size = _check.pair("kernel_size", kernel_size, 1)
    stride = kernel_size if stride is None else _check.pair("stride", stride, 1)
    padding, dilation = _check.pool_padding(padding, kernel_size), _check.pair("dilation", dilation, 1)
    window = kernel_size, stride, padding, dilation
    y = np.empty((*x.shape[:2], *_check.pool_output_size(x.shape[2:], *window, ceil_mode)), x.dtype)
    return y, x, window


def avg_pool2d(
    input: ArrayLike,
    kernel_size: Pair,
    stride: Pair | None = None,
    padding: Pair = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> Array:
    """(N, C, H, W) -> (N, C, OH, OW)."""
    y, x, options = _pool_arguments(input, kernel_size, stride, padding, 1, ceil_mode)
    divisor = 0 if divisor_override is None else _check.integer("divisor_override", divisor_override, 1)
    kernels.avg_pool2d_forward(y, x, *options[:3], bool(count_include_pad), divisor)
    return y


def avg_pool2d_backward(
    dy: ArrayLike,
    input: ArrayLike,
    kernel_size: Pair,
    stride: Pair | None = None,
    padding: Pair = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> Array:
    """Gradient of input."""
    y, x, options = _pool_arguments(input, kernel_size, stride, padding, 1, ceil_mode)
    divisor = 0 if divisor_override is None else _check.integer("divisor_override", divisor_override, 1)
    dx = np.empty_like(x)
    kernels.avg_pool2d_backward(dx, _prepare_gradient(dy, y), *options[:3], bool(count_include_pad), divisor)
    return dx


def max_pool2d(
    input: ArrayLike,
    kernel_size: Pair,
    stride: Pair | None = None,
    padding: Pair = 0,
    dilation: Pair = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Array | tuple[Array, Array]:
    """(N, C, H, W) -> (N, C, OH, OW); with return_indices also the index h*W + w (int64) of each maximum."""
    y, x, options = _pool_arguments(input, kernel_size, stride, padding, dilation, ceil_mode)
    indices = np.empty(y.shape, np.int32)
    kernels.max_pool2d_forward(y, indices, x, *options)
    return (y, indices.astype(np.int64)) if return_indices else y


def max_pool2d_backward(
    dy: ArrayLike,
    input: ArrayLike,
    kernel_size: Pair,
    stride: Pair | None = None,
    padding: Pair = 0,
    dilation: Pair = 1,
    ceil_mode: bool = False,
) -> Array:
    """Gradient of input."""
    y, x, options = _pool_arguments(input, kernel_size, stride, padding, dilation, ceil_mode)
    indices, dx = np.empty(y.shape, np.int32), np.empty_like(x)
    kernels.max_pool2d_forward(y, indices, x, *options)
    kernels.max_pool2d_backward(dx, _prepare_gradient(dy, y), indices, *options)
    return dx


# --- linear -----------------------------------------------------------------------------------------------------------


def _linear_arguments(input: ArrayLike, weight: ArrayLike, bias: ArrayLike | None) -> tuple[Array, Array, Array, Array]:
    """The kernels' arguments: a new output (..., O), the input as rows (R, F), weight and bias."""
    x = _prepare("input", input)
    w = _prepare("weight", weight, 2, "(O, F)", x.dtype)
    b = _prepare_bias(bias, w)
    if not x.ndim or x.shape[-1] != w.shape[1]:
        raise ValueError(f"input must end in an axis of {w.shape[1]} features, got shape {x.shape}")
    return np.empty((*x.shape[:-1], len(w)), x.dtype), x.reshape(-1, x.shape[-1]), w, b


def linear(input: ArrayLike, weight: ArrayLike, bias: ArrayLike | None = None) -> Array:
    """(..., F), (O, F), (O,) -> (..., O)."""
    y, x, w, b = _linear_arguments(input, weight, bias)
    kernels.linear_forward(y.reshape(-1, len(w)), x, w, b)
    return y


def linear_backward(
    dy: ArrayLike, input: ArrayLike, weight: ArrayLike, bias: ArrayLike | None = None
) -> tuple[Array, Array, Array | None]:
    """Gradients (input, weight, bias)."""
    y, x, w, b = _linear_arguments(input, weight, bias)
    dx, dw, db = np.empty_like(x), np.empty_like(w), np.empty_like(b)
    kernels.linear_backward(dx, dw, db, _prepare_gradient(dy, y).reshape(-1, len(w)), x, w)
    return dx.reshape(*y.shape[:-1], x.shape[-1]), dw, None if bias is None else db


# --- activations ------------------------------------------------------------------------------------------------------


TANH, SIGMOID, RELU = map(scalars.activation, (scalars.TANH, scalars.SIGMOID, scalars.RELU))


def _activate(activation: tuple[int, float, float], input: ArrayLike) -> Array:
    x = _prepare("input", input)
    y = np.empty_like(x)
    kernels.activation_forward(y.reshape(-1), x.reshape(-1), activation)
    return y


def _activate_backward(activation: tuple[int, float, float], dy: ArrayLike, y_or_x: Array) -> Array:
    dx = np.empty_like(y_or_x)
    dy = _prepare_gradient(dy, y_or_x)
    kernels.activation_backward(dx.reshape(-1), dy.reshape(-1), y_or_x.reshape(-1), activation)
    return dx


def tanh(input: ArrayLike) -> Array:
    """Element by element, any shape."""
    return _activate(TANH, input)


def tanh_backward(dy: ArrayLike, input: ArrayLike) -> Array:
    """Gradient of input."""
    return _activate_backward(TANH, dy, tanh(input))


def scaled_tanh(input: ArrayLike, A: float = 1.7159, S: float = 2 / 3) -> Array:
    """A * tanh(S * input), LeCun et al. 1998, appendix A."""
    A, S = _check.number("A", A), _check.number("S", S)
    return _activate(scalars.activation(scalars.SCALED_TANH, A, S), input)


def scaled_tanh_backward(dy: ArrayLike, input: ArrayLike, A: float = 1.7159, S: float = 2 / 3) -> Array:
    """Gradient of input."""
    y = scaled_tanh(input, A, S)
    return _activate_backward(scalars.activation(scalars.SCALED_TANH, A, S), dy, y)


def sigmoid(input: ArrayLike) -> Array:
    """Element by element, any shape."""
    return _activate(SIGMOID, input)


def sigmoid_backward(dy: ArrayLike, input: ArrayLike) -> Array:
    """Gradient of input."""
    return _activate_backward(SIGMOID, dy, sigmoid(input))


def relu(input: ArrayLike) -> Array:
    """Element by element, any shape."""
    return _activate(RELU, input)


def relu_backward(dy: ArrayLike, input: ArrayLike) -> Array:
    """Gradient of input; 0 where input is 0."""
    return _activate_backward(RELU, dy, relu(input))


def leaky_relu(input: ArrayLike, negative_slope: float = 0.01) -> Array:
    """Element by element, any shape."""
    slope = _check.number("negative_slope", negative_slope)
    return _activate(scalars.activation(scalars.LEAKY_RELU, slope), input)


def leaky_relu_backward(dy: ArrayLike, input: ArrayLike, negative_slope: float = 0.01) -> Array:
    """Gradient of input."""
    slope = _check.number("negative_slope", negative_slope)
    return _activate_backward(scalars.activation(scalars.LEAKY_RELU, slope), dy, _prepare("input", input))


def elu(input: ArrayLike, alpha: float = 1.0) -> Array:
    """Element by element, any shape; see `layers.ELU`."""
    return _activate(layers.ELU(alpha).activation_code, input)


def elu_backward(dy: ArrayLike, input: ArrayLike, alpha: float = 1.0) -> Array:
    """Gradient of input."""
    return _activate_backward(layers.ELU(alpha).activation_code, dy, elu(input, alpha))


def gelu(input: ArrayLike, approximate: str = "none") -> Array:
    """Element by element, any shape; see `layers.GELU`."""
    return _activate(layers.GELU(approximate).activation_code, input)


def gelu_backward(dy: ArrayLike, input: ArrayLike, approximate: str = "none") -> Array:
    """Gradient of input."""
    return _activate_backward(layers.GELU(approximate).activation_code, dy, _prepare("input", input))


def silu(input: ArrayLike) -> Array:
    """Element by element, any shape; see `layers.SiLU`."""
    return _activate(layers.SiLU().activation_code, input)


def silu_backward(dy: ArrayLike, input: ArrayLike) -> Array:
    """Gradient of input."""
    return _activate_backward(layers.SiLU().activation_code, dy, _prepare("input", input))


def softplus(input: ArrayLike, beta: float = 1.0, threshold: float = 20.0) -> Array:
    """Element by element, any shape; see `layers.Softplus`."""
    return _activate(layers.Softplus(beta, threshold).activation_code, input)


def softplus_backward(dy: ArrayLike, input: ArrayLike, beta: float = 1.0, threshold: float = 20.0) -> Array:
    """Gradient of input."""
    return _activate_backward(layers.Softplus(beta, threshold).activation_code, dy, _prepare("input", input))


def hardtanh(input: ArrayLike, min_val: float = -1.0, max_val: float = 1.0) -> Array:
    """Element by element, any shape; see `layers.Hardtanh`."""
    return _activate(layers.Hardtanh(min_val, max_val).activation_code, input)


def hardtanh_backward(dy: ArrayLike, input: ArrayLike, min_val: float = -1.0, max_val: float = 1.0) -> Array:
    """Gradient of input."""
    return _activate_backward(layers.Hardtanh(min_val, max_val).activation_code, dy, hardtanh(input, min_val, max_val))


def relu6(input: ArrayLike) -> Array:
    """Element by element, any shape; see `layers.ReLU6`."""
    return _activate(layers.ReLU6().activation_code, input)


def relu6_backward(dy: ArrayLike, input: ArrayLike) -> Array:
    """Gradient of input."""
    return _activate_backward(layers.ReLU6().activation_code, dy, relu6(input))


def _along_axis(kernel: Callable[..., None], dim: int, *arrays: Array) -> Array:
    """The output of a kernel on rows (R, K), with the axis `dim` of the arrays as K."""
    axis = _check.integer("dim", dim)
    if not -arrays[0].ndim <= axis < arrays[0].ndim:
        raise ValueError(f"dim must be an axis of an array with {arrays[0].ndim} axes, got {dim}")
    rows = [np.ascontiguousarray(np.moveaxis(a, axis, -1)) for a in arrays]
    out = np.empty_like(rows[0])
    kernel(out.reshape(-1, out.shape[-1]), *(r.reshape(-1, out.shape[-1]) for r in rows))
    return np.ascontiguousarray(np.moveaxis(out, -1, axis))


def softmax(input: ArrayLike, dim: int) -> Array:
    """exp(x) / sum(exp(x)) along axis `dim`."""
    return _along_axis(kernels.softmax_forward, dim, _prepare("input", input))


def softmax_backward(dy: ArrayLike, input: ArrayLike, dim: int) -> Array:
    """Gradient of input."""
    y = softmax(input, dim)
    return _along_axis(kernels.softmax_backward, dim, _prepare_gradient(dy, y), y)


def log_softmax(input: ArrayLike, dim: int) -> Array:
    """x - log(sum(exp(x))) along axis `dim`."""
    return _along_axis(kernels.log_softmax_forward, dim, _prepare("input", input))


def log_softmax_backward(dy: ArrayLike, input: ArrayLike, dim: int) -> Array:
    """Gradient of input."""
    y = log_softmax(input, dim)
    return _along_axis(kernels.log_softmax_backward, dim, _prepare_gradient(dy, y), y)


# --- losses -----------------------------------------------------------------------------------------------------------


def cross_entropy(
    input: ArrayLike,
    target: ArrayLike,
    weight: ArrayLike | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> float | Array:
    """Logits (N, K) and class numbers (N,) -> float, or (N,) for reduction "none"."""
    return CrossEntropyLoss(weight, ignore_index, reduction, label_smoothing)(input, target)[0]


def cross_entropy_backward(
    dy: ArrayLike,
    input: ArrayLike,
    target: ArrayLike,
    weight: ArrayLike | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Array:
    """Gradient of input; dy is a number, or (N,) for reduction "none"."""
    value, dx = CrossEntropyLoss(weight, ignore_index, reduction, label_smoothing)(input, target)
    return dx * _prepare_gradient(dy, np.asarray(value, dx.dtype)).reshape(-1, 1)


def mse_loss(input: ArrayLike, target: ArrayLike, reduction: str = "mean") -> float | Array:
    """Two arrays of one shape -> float, or that shape for reduction "none"."""
    return MSELoss(reduction)(input, target)[0]


def mse_loss_backward(
    dy: ArrayLike, input: ArrayLike, target: ArrayLike, reduction: str = "mean"
) -> tuple[Array, Array]:
    """Gradients (input, target)."""
    value, dx = MSELoss(reduction)(input, target)
    dx = dx * _prepare_gradient(dy, np.asarray(value, dx.dtype))
    return dx, -dx
