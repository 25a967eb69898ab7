"""torch's functions on NumPy arrays, over the CPU kernels, each with a backward function.

`f_backward(dy, x, ...)` takes dy, the gradient of f's output, and the arguments of `f(x, ...)`.  It returns the
gradients of the differentiable arguments in their order (a tuple if there are several; None for a missing bias).
float32 and float64 are kept, other real types become float32.  NaN and infinities pass through.  For teaching and for
checking: every call allocates, so train with `Sequential`.
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from tinycnn import _check, kernels, layers, losses, scalars
from tinycnn._typing import Array, DType, Padding, Pair
from tinycnn.losses import as_float


def _prepare(name: str, x: ArrayLike, ndim: int | None = None, axes: str = "", dtype: DType | None = None) -> Array:
    """x as an array that kernels take, of `dtype`; by default its own floating-point type, or float32."""
    x = _check.array(name, x, ndim, axes)
    return as_float(x) if dtype is None else np.require(x, dtype, ["C", "W"])


def _prepare_bias(bias: ArrayLike | None, channels: int, dtype: DType) -> Array:
    """The bias (channels,); empty for None."""
    if bias is None:
        return np.empty(0, dtype)
    b = _prepare("bias", bias, 1, "(O,)", dtype)
    _check.shape("bias", b, (channels,))
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
    b = _prepare_bias(bias, len(w), w.dtype)
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


def _transposed_arguments(
    input: ArrayLike,
    weight: ArrayLike,
    bias: ArrayLike | None,
    stride: Pair,
    padding: Pair,
    output_padding: Pair,
    groups: int,
    dilation: Pair,
) -> tuple[Array, Array, Array, Array, tuple[Any, ...]]:
    """A new output, the arrays, and the kernels' (stride, padding, dilation, groups)."""
    x = _prepare("input", input, 4, "(N, C, H, W)")
    w = _prepare("weight", weight, 4, "(C, O/groups, KH, KW)", x.dtype)
    groups = _check.integer("groups", groups, 1)
    if w.shape[0] != x.shape[1] or x.shape[1] % groups:
        raise ValueError(
            f"weight must have {x.shape[1]} input channels, divisible by groups {groups}, got shape {w.shape}"
        )
    kernel_size, channels = (w.shape[2], w.shape[3]), groups * w.shape[1]
    b = _prepare_bias(bias, channels, x.dtype)
    stride, dilation = _check.pair("stride", stride, 1), _check.pair("dilation", dilation, 1)
    padding = _check.pair("padding", padding, 0)
    extra = _check.output_padding(output_padding, stride)
    size = _check.transposed_output_size(x.shape[2:], kernel_size, stride, padding, extra, dilation)
    return np.empty((len(x), channels, *size), x.dtype), x, w, b, (stride, padding, dilation, groups)


def conv_transpose2d(
    input: ArrayLike,
    weight: ArrayLike,
    bias: ArrayLike | None = None,
    stride: Pair = 1,
    padding: Pair = 0,
    output_padding: Pair = 0,
    groups: int = 1,
    dilation: Pair = 1,
) -> Array:
    """(N, C, H, W), (C, O/groups, KH, KW), (O,) -> (N, O, OH, OW)."""
    y, x, w, b, options = _transposed_arguments(input, weight, bias, stride, padding, output_padding, groups, dilation)
    kernels.conv2d_backward(y, w[:0], b[:0], x, y, w, *options)
    if b.size:
        kernels.add_bias(y, b)
    return y


def conv_transpose2d_backward(
    dy: ArrayLike,
    input: ArrayLike,
    weight: ArrayLike,
    bias: ArrayLike | None = None,
    stride: Pair = 1,
    padding: Pair = 0,
    output_padding: Pair = 0,
    groups: int = 1,
    dilation: Pair = 1,
) -> tuple[Array, Array, Array | None]:
    """Gradients (input, weight, bias)."""
    y, x, w, b, options = _transposed_arguments(input, weight, bias, stride, padding, output_padding, groups, dilation)
    dy, dx, dw, db = _prepare_gradient(dy, y), np.empty_like(x), np.empty_like(w), np.empty_like(b)
    kernels.conv2d_backward(dy[:0], dw, b[:0], x, dy, w, *options)
    kernels.conv2d_forward(dx, dy, w, b[:0], *options)
    if b.size:
        kernels.sum_channels(db, dy)
    return dx, dw, None if bias is None else db


# --- resizing ---------------------------------------------------------------------------------------------------------


def _resize(layer: layers.Layer, input: ArrayLike) -> tuple[Array, Array]:
    """A new output of a layer without parameters, and the input."""
    x = _prepare("input", input, 4, "(N, C, H, W)")
    return np.empty((len(x), *layer.output_shape(x.shape[1:])), x.dtype), x


def interpolate(
    input: ArrayLike, size: Pair | None = None, scale_factor: float | Pair | None = None, mode: str = "nearest"
) -> Array:
    """(N, C, H, W) -> (N, C, OH, OW); see `layers.Upsample`."""
    y, x = _resize(layers.Upsample(size, scale_factor, mode), input)
    kernels.upsample_nearest2d_forward(y, x)
    return y


def interpolate_backward(
    dy: ArrayLike,
    input: ArrayLike,
    size: Pair | None = None,
    scale_factor: float | Pair | None = None,
    mode: str = "nearest",
) -> Array:
    """Gradient of input."""
    y, x = _resize(layers.Upsample(size, scale_factor, mode), input)
    dx = np.empty_like(x)
    kernels.upsample_nearest2d_backward(dx, _prepare_gradient(dy, y))
    return dx


def pad(input: ArrayLike, pad: tuple[int, int, int, int]) -> Array:
    """Zeros around (N, C, H, W).  pad: (left, right, top, bottom), negative to crop"""
    y, x = _resize(layers.ZeroPad2d(pad), input)
    kernels.zero_pad2d(y, x, (pad[2], pad[0]))
    return y


def pad_backward(dy: ArrayLike, input: ArrayLike, pad: tuple[int, int, int, int]) -> Array:
    """Gradient of input."""
    y, x = _resize(layers.ZeroPad2d(pad), input)
    dx = np.empty_like(x)
    kernels.zero_pad2d(dx, _prepare_gradient(dy, y), (-pad[2], -pad[0]))
    return dx


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


def adaptive_avg_pool2d(input: ArrayLike, output_size: int | tuple[int | None, int | None]) -> Array:
    """(N, C, H, W) -> (N, C, OH, OW); see `layers.AdaptiveAvgPool2d`."""
    y, x = _resize(layers.AdaptiveAvgPool2d(output_size), input)
    kernels.adaptive_avg_pool2d_forward(y, x)
    return y


def adaptive_avg_pool2d_backward(
    dy: ArrayLike, input: ArrayLike, output_size: int | tuple[int | None, int | None]
) -> Array:
    """Gradient of input."""
    y, x = _resize(layers.AdaptiveAvgPool2d(output_size), input)
    dx = np.empty_like(x)
    kernels.adaptive_avg_pool2d_backward(dx, _prepare_gradient(dy, y))
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


# --- normalisation and dropout ----------------------------------------------------------------------------------------


def _affine(name: str, values: ArrayLike | None, shape: tuple[int, ...], other: ArrayLike | None, fill: float) -> Any:
    """A weight or bias of a normalisation, flat: `fill` if only the `other` is given, of size 0 if neither is."""
    if values is None:
        return np.empty(0) if other is None else np.full(shape, fill).reshape(-1)
    array = _check.array(name, values)
    _check.shape(name, array, shape)
    return array.reshape(-1)


def _norm_arguments(
    input: ArrayLike, weight: ArrayLike | None, bias: ArrayLike | None, shape: Any, eps: float
) -> tuple[Array, Array, Array, Array, float]:
    """(a new output, input, weight, bias, eps); shape: a function that gives the shape of weight and bias"""
    x = _prepare("input", input)
    expected = shape(x)
    w, b = _affine("weight", weight, expected, bias, 1.0), _affine("bias", bias, expected, weight, 0.0)
    return np.empty_like(x), x, w.astype(x.dtype), b.astype(x.dtype), _check.number("eps", eps, 0)


def _norm_gradients(
    dx: Array, dw: Array, db: Array, weight: ArrayLike | None, bias: ArrayLike | None
) -> tuple[Array, Array | None, Array | None]:
    return (
        dx,
        None if weight is None else dw.reshape(np.shape(weight)),
        None if bias is None else db.reshape(np.shape(bias)),
    )


def _channels(x: Array) -> tuple[int, ...]:
    if x.ndim not in (2, 4):
        raise ValueError(f"input must have shape (N, C) or (N, C, H, W), got {x.shape}")
    return (x.shape[1],)


def _run_batch_norm(
    input: ArrayLike,
    running_mean: ArrayLike | None,
    running_var: ArrayLike | None,
    weight: ArrayLike | None,
    bias: ArrayLike | None,
    training: bool,
    momentum: float,
    eps: float,
    update: bool,
) -> tuple[Array, Array, Array, tuple[Array, Array]]:
    """(output, input, weight, (mean, rstd)).   update: whether to change the running statistics in training"""
    y, x, w, b, eps = _norm_arguments(input, weight, bias, _channels, eps)
    if (running_mean is None or running_var is None) and not training:
        raise ValueError("batch_norm needs running_mean and running_var, unless in training")
    if training and x.size == x.shape[1]:
        raise ValueError(f"input must have more than one value a channel in training, got shape {x.shape}")
    running = []
    for name, given, fill in (("running_mean", running_mean, 0.0), ("running_var", running_var, 1.0)):
        values = np.full(x.shape[1], fill) if given is None else _check.array(name, given)
        _check.shape(name, values, (x.shape[1],))
        running.append(np.array(values, x.dtype))
    saved = np.empty(x.shape[1], x.dtype), np.empty(x.shape[1], x.dtype)
    momentum, count = _check.number("momentum", momentum, 0, maximum=1), np.zeros(1, np.int64)
    kernels.batch_norm_forward(y, x, w, b, *saved, running[0], running[1], count, momentum, eps, bool(training), len(x))
    for given, values in zip((running_mean, running_var), running, strict=True):
        if training and update and isinstance(given, np.ndarray):
            given[...] = values
    return y, x, w, saved


def batch_norm(
    input: ArrayLike,
    running_mean: ArrayLike | None,
    running_var: ArrayLike | None,
    weight: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Array:
    """(N, C) or (N, C, H, W) -> the same shape.  In training NumPy arrays of running statistics are updated in place,
    as in torch."""
    return _run_batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps, True)[0]


def batch_norm_backward(
    dy: ArrayLike,
    input: ArrayLike,
    running_mean: ArrayLike | None,
    running_var: ArrayLike | None,
    weight: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> tuple[Array, Array | None, Array | None]:
    """Gradients (input, weight, bias).  Leaves the running statistics alone."""
    arguments = input, running_mean, running_var, weight, bias, training, momentum, eps
    y, x, w, saved = _run_batch_norm(*arguments, False)
    dx, dw, db = np.empty_like(x), np.empty_like(w), np.empty_like(w)
    dy = _prepare_gradient(dy, y)
    kernels.batch_norm_backward(dx, dw, db, dy, x, w, *saved, bool(training), len(x))
    return _norm_gradients(dx, dw, db, weight, bias)


def _run_group_norm(
    input: ArrayLike, num_groups: int, weight: ArrayLike | None, bias: ArrayLike | None, eps: float
) -> tuple[Array, Array, Array, tuple[Array, Array, int]]:
    """(output, input, weight, (mean, rstd, groups))."""
    groups = _check.integer("num_groups", num_groups, 1)
    x = _prepare("input", input, 4, "(N, C, H, W)")
    _check.divisible("channels of input", x.shape[1], "num_groups", groups)
    y, x, w, b, eps = _norm_arguments(x, weight, bias, _channels, eps)
    mean, rstd = np.empty((len(x), groups), x.dtype), np.empty((len(x), groups), x.dtype)
    kernels.group_norm_forward(y, x, w, b, mean, rstd, groups, eps)
    return y, x, w, (mean, rstd, groups)


def group_norm(
    input: ArrayLike,
    num_groups: int,
    weight: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    eps: float = 1e-5,
) -> Array:
    """(N, C, H, W) -> (N, C, H, W)."""
    return _run_group_norm(input, num_groups, weight, bias, eps)[0]


def group_norm_backward(
    dy: ArrayLike,
    input: ArrayLike,
    num_groups: int,
    weight: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    eps: float = 1e-5,
) -> tuple[Array, Array | None, Array | None]:
    """Gradients (input, weight, bias)."""
    y, x, w, saved = _run_group_norm(input, num_groups, weight, bias, eps)
    dx, dw, db = np.empty_like(x), np.empty_like(w), np.empty_like(w)
    kernels.group_norm_backward(dx, dw, db, _prepare_gradient(dy, y), x, w, *saved)
    return _norm_gradients(dx, dw, db, weight, bias)


def _run_layer_norm(
    input: ArrayLike,
    normalized_shape: int | tuple[int, ...],
    weight: ArrayLike | None,
    bias: ArrayLike | None,
    eps: float,
) -> tuple[Array, Array, Array, tuple[Array, Array], tuple[int, int]]:
    """(output, input, weight, (mean, rstd), shape of the rows)."""
    layer = layers.LayerNorm(normalized_shape, eps)
    y, x, w, b, eps = _norm_arguments(input, weight, bias, lambda _: layer.normalized_shape, eps)
    layer.output_shape(x.shape)
    size = math.prod(layer.normalized_shape)
    rows = x.size // size, size
    saved = np.empty(rows[0], x.dtype), np.empty(rows[0], x.dtype)
    kernels.layer_norm_forward(y.reshape(rows), x.reshape(rows), w, b, *saved, eps)
    return y, x, w, saved, rows


def layer_norm(
    input: ArrayLike,
    normalized_shape: int | tuple[int, ...],
    weight: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    eps: float = 1e-5,
) -> Array:
    """(..., *normalized_shape) -> the same shape; weight and bias have the shape normalized_shape."""
    return _run_layer_norm(input, normalized_shape, weight, bias, eps)[0]


def layer_norm_backward(
    dy: ArrayLike,
    input: ArrayLike,
    normalized_shape: int | tuple[int, ...],
    weight: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    eps: float = 1e-5,
) -> tuple[Array, Array | None, Array | None]:
    """Gradients (input, weight, bias)."""
    y, x, w, saved, rows = _run_layer_norm(input, normalized_shape, weight, bias, eps)
    dx, dw, db = np.empty_like(x), np.empty_like(w), np.empty_like(w)
    dy = _prepare_gradient(dy, y).reshape(rows)
    kernels.layer_norm_backward(dx.reshape(rows), dw, db, dy, x.reshape(rows), w, *saved)
    return _norm_gradients(dx, dw, db, weight, bias)


def dropout(input: ArrayLike, mask: ArrayLike, p: float = 0.5) -> Array:
    """input / (1 - p) where mask is true, 0 elsewhere.  mask: booleans that broadcast with input, such as
    ``rng.random(x.shape) >= p``; (N, C, 1, 1) drops whole channels.  Unlike torch's, it draws nothing."""
    x = _prepare("input", input)
    keep = np.asarray(mask)
    if keep.dtype != np.bool_:
        raise TypeError(f"mask must be booleans, got dtype {keep.dtype}")
    sizes = zip(keep.shape[::-1], x.shape[::-1], strict=False)
    if keep.ndim > x.ndim or any(size not in (1, n) for size, n in sizes):
        raise ValueError(f"mask must broadcast with the input's shape {x.shape}, got {keep.shape}")
    y: Array = np.where(keep, x / x.dtype.type(1 - _check.number("p", p, 0, below=1)), x.dtype.type(0))
    return y


def dropout_backward(dy: ArrayLike, input: ArrayLike, mask: ArrayLike, p: float = 0.5) -> Array:
    """Gradient of input."""
    return dropout(_prepare_gradient(dy, _prepare("input", input)), mask, p)


# --- linear -----------------------------------------------------------------------------------------------------------


def _linear_arguments(input: ArrayLike, weight: ArrayLike, bias: ArrayLike | None) -> tuple[Array, Array, Array, Array]:
    """The kernels' arguments: a new output (..., O), the input as rows (R, F), weight and bias."""
    x = _prepare("input", input)
    w = _prepare("weight", weight, 2, "(O, F)", x.dtype)
    b = _prepare_bias(bias, len(w), w.dtype)
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


def _class_rows(input: ArrayLike, target: ArrayLike, loss: Any) -> tuple[Any, Array, tuple[int, ...]]:
    """(value, gradient, shape of the value for reduction "none") of a loss of classes on (C,), (N, C) or
    (N, C, d1, ...): its rows of C numbers are those of axis 1, or of the only axis."""
    x, targets = as_float(_check.array("input", input)), _check.array("target", target)
    if x.ndim == 0:
        raise ValueError("input must have shape (C,), (N, C) or (N, C, d1, ...), got a number")
    axis, shape = min(1, x.ndim - 1), x.shape[: min(1, x.ndim - 1)] + x.shape[min(1, x.ndim - 1) + 1 :]
    rows = np.moveaxis(x, axis, -1)
    if targets.dtype.kind == "f" and targets.shape == x.shape:
        flat: Any = np.moveaxis(targets, axis, -1).reshape(-1, x.shape[axis])
    elif targets.shape == shape:
        flat = targets.reshape(-1)
    else:
        raise ValueError(
            f"target must be class numbers of shape {shape}, or probabilities of shape {x.shape}, got {targets.shape}"
        )
    value, gradient = loss(np.ascontiguousarray(rows.reshape(-1, x.shape[axis])), flat)
    return value, np.ascontiguousarray(np.moveaxis(gradient.reshape(rows.shape), -1, axis)), shape


def _class_value(input: ArrayLike, target: ArrayLike, loss: Any) -> float | Array:
    value, _, shape = _class_rows(input, target, loss)
    return np.reshape(value, shape) if loss.reduction == "none" else value


def _class_gradient(dy: ArrayLike, input: ArrayLike, target: ArrayLike, loss: Any) -> Array:
    value, dx, shape = _class_rows(input, target, loss)
    if loss.reduction != "none":
        return dx * _prepare_gradient(dy, np.asarray(value, dx.dtype))
    scaled: Array = dx * np.expand_dims(_prepare_gradient(dy, np.reshape(value, shape)), min(1, dx.ndim - 1))
    return scaled


def cross_entropy(
    input: ArrayLike,
    target: ArrayLike,
    weight: ArrayLike | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> float | Array:
    """Logits (C,), (N, C) or (N, C, d1, ...), and class numbers (), (N,) or (N, d1, ...), or probabilities of the
    logits' shape -> float, or the shape of the class numbers for reduction "none"."""
    return _class_value(input, target, losses.CrossEntropyLoss(weight, ignore_index, reduction, label_smoothing))


def cross_entropy_backward(
    dy: ArrayLike,
    input: ArrayLike,
    target: ArrayLike,
    weight: ArrayLike | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Array:
    """Gradient of input; dy has the shape of the value."""
    loss = losses.CrossEntropyLoss(weight, ignore_index, reduction, label_smoothing)
    return _class_gradient(dy, input, target, loss)


def nll_loss(
    input: ArrayLike,
    target: ArrayLike,
    weight: ArrayLike | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> float | Array:
    """Log-probabilities and class numbers, shapes as for `cross_entropy`."""
    return _class_value(input, target, losses.NLLLoss(weight, ignore_index, reduction))


def nll_loss_backward(
    dy: ArrayLike,
    input: ArrayLike,
    target: ArrayLike,
    weight: ArrayLike | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> Array:
    """Gradient of input; dy has the shape of the value."""
    return _class_gradient(dy, input, target, losses.NLLLoss(weight, ignore_index, reduction))


def _number_gradient(dy: ArrayLike, input: ArrayLike, target: ArrayLike, loss: Any) -> Array:
    """Gradient of the input of a loss that compares numbers."""
    value, dx = loss(input, target)
    scaled: Array = dx * _prepare_gradient(dy, np.asarray(value, dx.dtype))
    return scaled


def mse_loss(input: ArrayLike, target: ArrayLike, reduction: str = "mean") -> float | Array:
    """Two arrays of one shape -> float, or that shape for reduction "none"."""
    return losses.MSELoss(reduction)(input, target)[0]


def mse_loss_backward(
    dy: ArrayLike, input: ArrayLike, target: ArrayLike, reduction: str = "mean"
) -> tuple[Array, Array]:
    """Gradients (input, target)."""
    dx = _number_gradient(dy, input, target, losses.MSELoss(reduction))
    return dx, -dx


def l1_loss(input: ArrayLike, target: ArrayLike, reduction: str = "mean") -> float | Array:
    """Two arrays of one shape -> float, or that shape for reduction "none"."""
    return losses.L1Loss(reduction)(input, target)[0]


def l1_loss_backward(
    dy: ArrayLike, input: ArrayLike, target: ArrayLike, reduction: str = "mean"
) -> tuple[Array, Array]:
    """Gradients (input, target)."""
    dx = _number_gradient(dy, input, target, losses.L1Loss(reduction))
    return dx, -dx


def huber_loss(input: ArrayLike, target: ArrayLike, reduction: str = "mean", delta: float = 1.0) -> float | Array:
    """Two arrays of one shape -> float, or that shape for reduction "none"."""
    return losses.HuberLoss(reduction, delta)(input, target)[0]


def huber_loss_backward(
    dy: ArrayLike, input: ArrayLike, target: ArrayLike, reduction: str = "mean", delta: float = 1.0
) -> tuple[Array, Array]:
    """Gradients (input, target)."""
    dx = _number_gradient(dy, input, target, losses.HuberLoss(reduction, delta))
    return dx, -dx


def binary_cross_entropy_with_logits(
    input: ArrayLike,
    target: ArrayLike,
    weight: ArrayLike | None = None,
    reduction: str = "mean",
    pos_weight: ArrayLike | None = None,
) -> float | Array:
    """Logits and targets 0 ... 1 of one shape -> float, or that shape for reduction "none"."""
    return losses.BCEWithLogitsLoss(weight, reduction, pos_weight)(input, target)[0]


def binary_cross_entropy_with_logits_backward(
    dy: ArrayLike,
    input: ArrayLike,
    target: ArrayLike,
    weight: ArrayLike | None = None,
    reduction: str = "mean",
    pos_weight: ArrayLike | None = None,
) -> Array:
    """Gradient of input."""
    loss = losses.BCEWithLogitsLoss(weight, reduction, pos_weight)
    return _number_gradient(dy, input, target, loss)
