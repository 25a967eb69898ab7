"""NumPy in, NumPy out: torch's functions over the CPU kernels, each with a twin that returns the gradients.

`f(x, ...)` and `f_backward(dy, x, ...)` take the same arguments after dy, the gradient of f's output, and the twin
returns the gradients of the differentiable arguments in their order (a tuple where there are several; None for a bias
that was not given).  float32 and float64 are kept, other real types become float32.  NaN and infinities pass through.
For teaching and for checking: every call allocates, so train with `Sequential`.
"""

import numpy as np

from tinycnn import _check, kernels
from tinycnn.losses import CrossEntropyLoss, MSELoss, as_float

EMPTY = (0,)


def _prepare(name, x, ndim=None, axes="", dtype=None):
    x = _check.array(name, x, ndim, axes)
    return as_float(x) if dtype is None else np.require(x, dtype, ["C", "W"])


def _gradient(dy, y):
    dy = _check.array("dy", dy)
    if dy.shape != y.shape:
        raise ValueError(f"dy must have the shape of the output, {y.shape}, got {dy.shape}")
    return np.require(dy, y.dtype, ["C", "W"])


# --- convolution ------------------------------------------------------------------------------------------------------


def _conv_arguments(input, weight, bias, stride, padding, dilation, groups):
    x = _prepare("input", input, 4, "(N, C, H, W)")
    w = _prepare("weight", weight, 4, "(O, C/groups, KH, KW)", x.dtype)
    b = np.empty(EMPTY, x.dtype) if bias is None else _prepare("bias", bias, 1, "(O,)", x.dtype)
    stride, dilation = _check.pair("stride", stride, 1), _check.pair("dilation", dilation, 1)
    groups, same = _check.integer("groups", groups, 1), isinstance(padding, str) and padding == "same"
    padding = _check.conv_padding(padding, w.shape[2:], stride, dilation)
    if x.shape[1] % groups or w.shape[0] % groups:
        raise ValueError(f"channels must be divisible by groups {groups}, got {x.shape[1]} in and {w.shape[0]} out")
    if w.shape[1] != x.shape[1] // groups:
        raise ValueError(f"weight must have {x.shape[1] // groups} input channels a group, got shape {w.shape}")
    if bias is not None and b.shape != w.shape[:1]:
        raise ValueError(f"bias must have shape {w.shape[:1]}, got {b.shape}")
    sizes = _check.conv_output_size(x.shape[2:], w.shape[2:], stride, padding, dilation, same)
    y = np.empty((len(x), len(w), *sizes), x.dtype)
    return y, x, w, b, (stride, padding, dilation, groups)


def conv2d(input, weight, bias=None, stride=1, padding=0, dilation=1, groups=1):
    """(N, C, H, W), (O, C/groups, KH, KW), (O,) -> (N, O, OH, OW)."""
    y, x, w, b, options = _conv_arguments(input, weight, bias, stride, padding, dilation, groups)
    kernels.conv2d_forward(y, x, w, b, *options)
    return y


def conv2d_backward(dy, input, weight, bias=None, stride=1, padding=0, dilation=1, groups=1):
    """Gradients (input, weight, bias)."""
    y, x, w, b, options = _conv_arguments(input, weight, bias, stride, padding, dilation, groups)
    dx, dw, db = np.empty_like(x), np.empty_like(w), np.empty_like(b)
    kernels.conv2d_backward(dx, dw, db, _gradient(dy, y), x, w, *options)
    return dx, dw, None if bias is None else db


# --- pooling ----------------------------------------------------------------------------------------------------------


def _pool_arguments(input, kernel_size, stride, padding, dilation, ceil_mode):
    x = _prepare("input", input, 4, "(N, C, H, W)")
    kernel_size = _check.pair("kernel_size", kernel_size, 1)
    stride = kernel_size if stride is None else _check.pair("stride", stride, 1)
    padding, dilation = _check.pool_padding(padding, kernel_size), _check.pair("dilation", dilation, 1)
    window = kernel_size, stride, padding, dilation
    y = np.empty((*x.shape[:2], *_check.pool_output_size(x.shape[2:], *window, ceil_mode)), x.dtype)
    return y, x, window


def avg_pool2d(
    input, kernel_size, stride=None, padding=0, ceil_mode=False, count_include_pad=True, divisor_override=None
):
    """(N, C, H, W) -> (N, C, OH, OW)."""
    y, x, options = _pool_arguments(input, kernel_size, stride, padding, 1, ceil_mode)
    divisor = 0 if divisor_override is None else _check.integer("divisor_override", divisor_override, 1)
    kernels.avg_pool2d_forward(y, x, *options[:3], bool(count_include_pad), divisor)
    return y


def avg_pool2d_backward(
    dy,
    input,
    kernel_size,
    stride=None,
    padding=0,
    ceil_mode=False,
    count_include_pad=True,
    divisor_override=None,
):
    """Gradient of input."""
    y, x, options = _pool_arguments(input, kernel_size, stride, padding, 1, ceil_mode)
    divisor = 0 if divisor_override is None else _check.integer("divisor_override", divisor_override, 1)
    dx = np.empty_like(x)
    kernels.avg_pool2d_backward(dx, _gradient(dy, y), *options[:3], bool(count_include_pad), divisor)
    return dx


def max_pool2d(input, kernel_size, stride=None, padding=0, dilation=1, ceil_mode=False, return_indices=False):
    """(N, C, H, W) -> (N, C, OH, OW), and, if asked for, where in its plane each maximum stood (h*W + w, int64)."""
    y, x, options = _pool_arguments(input, kernel_size, stride, padding, dilation, ceil_mode)
    indices = np.empty(y.shape, np.int32)
    kernels.max_pool2d_forward(y, indices, x, *options)
    return (y, indices.astype(np.int64)) if return_indices else y


def max_pool2d_backward(dy, input, kernel_size, stride=None, padding=0, dilation=1, ceil_mode=False):
    """Gradient of input."""
    y, x, options = _pool_arguments(input, kernel_size, stride, padding, dilation, ceil_mode)
    indices, dx = np.empty(y.shape, np.int32), np.empty_like(x)
    kernels.max_pool2d_forward(y, indices, x, *options)
    kernels.max_pool2d_backward(dx, _gradient(dy, y), indices, *options)
    return dx


# --- linear -----------------------------------------------------------------------------------------------------------


def _linear_arguments(input, weight, bias):
    x = _prepare("input", input)
    w = _prepare("weight", weight, 2, "(O, F)", x.dtype)
    b = np.empty(EMPTY, x.dtype) if bias is None else _prepare("bias", bias, 1, "(O,)", x.dtype)
    if not x.ndim or x.shape[-1] != w.shape[1]:
        raise ValueError(f"input must end in an axis of {w.shape[1]} features, got shape {x.shape}")
    if bias is not None and b.shape != w.shape[:1]:
        raise ValueError(f"bias must have shape {w.shape[:1]}, got {b.shape}")
    return np.empty((*x.shape[:-1], len(w)), x.dtype), x.reshape(-1, x.shape[-1]), w, b


def linear(input, weight, bias=None):
    """(..., F), (O, F), (O,) -> (..., O)."""
    y, x, w, b = _linear_arguments(input, weight, bias)
    kernels.linear_forward(y.reshape(-1, len(w)), x, w, b)
    return y


def linear_backward(dy, input, weight, bias=None):
    """Gradients (input, weight, bias)."""
    y, x, w, b = _linear_arguments(input, weight, bias)
    dx, dw, db = np.empty_like(x), np.empty_like(w), np.empty_like(b)
    kernels.linear_backward(dx, dw, db, _gradient(dy, y).reshape(-1, len(w)), x, w)
    return dx.reshape(*y.shape[:-1], x.shape[-1]), dw, None if bias is None else db


# --- activations ------------------------------------------------------------------------------------------------------


def _activate(kernel, input, *options):
    x = _prepare("input", input)
    y = np.empty_like(x)
    kernel(y.reshape(-1), x.reshape(-1), *options)
    return y


def _activate_backward(kernel, dy, y_or_x, *options):
    dx = np.empty_like(y_or_x)
    kernel(dx.reshape(-1), _gradient(dy, y_or_x).reshape(-1), y_or_x.reshape(-1), *options)
    return dx


def tanh(input):
    """Element by element, any shape."""
    return _activate(kernels.tanh_forward, input)


def tanh_backward(dy, input):
    """Gradient of input."""
    return _activate_backward(kernels.tanh_backward, dy, tanh(input))


def scaled_tanh(input, A=1.7159, S=2 / 3):
    """A * tanh(S * input), LeCun et al. 1998, appendix A."""
    return _activate(kernels.scaled_tanh_forward, input, _check.number("A", A), _check.number("S", S))


def scaled_tanh_backward(dy, input, A=1.7159, S=2 / 3):
    """Gradient of input."""
    return _activate_backward(kernels.scaled_tanh_backward, dy, scaled_tanh(input, A, S), float(A), float(S))


def sigmoid(input):
    """Element by element, any shape."""
    return _activate(kernels.sigmoid_forward, input)


def sigmoid_backward(dy, input):
    """Gradient of input."""
    return _activate_backward(kernels.sigmoid_backward, dy, sigmoid(input))


def relu(input):
    """Element by element, any shape."""
    return _activate(kernels.relu_forward, input)


def relu_backward(dy, input):
    """Gradient of input; 0 where input is 0."""
    return _activate_backward(kernels.relu_backward, dy, relu(input))


def leaky_relu(input, negative_slope=0.01):
    """Element by element, any shape."""
    return _activate(kernels.leaky_relu_forward, input, _check.number("negative_slope", negative_slope))


def leaky_relu_backward(dy, input, negative_slope=0.01):
    """Gradient of input."""
    slope = _check.number("negative_slope", negative_slope)
    return _activate_backward(kernels.leaky_relu_backward, dy, _prepare("input", input), slope)


def _along(kernel, dim, *arrays):
    """Run a kernel on rows (R, K) made of the axis `dim`."""
    axis = _check.integer("dim", dim)
    if not -arrays[0].ndim <= axis < arrays[0].ndim:
        raise ValueError(f"dim must be an axis of an array with {arrays[0].ndim} axes, got {dim}")
    rows = [np.ascontiguousarray(np.moveaxis(a, axis, -1)) for a in arrays]
    out = np.empty_like(rows[0])
    kernel(out.reshape(-1, out.shape[-1]), *(r.reshape(-1, out.shape[-1]) for r in rows))
    return np.ascontiguousarray(np.moveaxis(out, -1, axis))


def softmax(input, dim):
    """exp(x) / sum(exp(x)) along axis `dim`."""
    return _along(kernels.softmax_forward, dim, _prepare("input", input))


def softmax_backward(dy, input, dim):
    """Gradient of input."""
    y = softmax(input, dim)
    return _along(kernels.softmax_backward, dim, _gradient(dy, y), y)


def log_softmax(input, dim):
    """x - log(sum(exp(x))) along axis `dim`."""
    return _along(kernels.log_softmax_forward, dim, _prepare("input", input))


def log_softmax_backward(dy, input, dim):
    """Gradient of input."""
    y = log_softmax(input, dim)
    return _along(kernels.log_softmax_backward, dim, _gradient(dy, y), y)


# --- losses -----------------------------------------------------------------------------------------------------------


def cross_entropy(input, target, weight=None, ignore_index=-100, reduction="mean", label_smoothing=0.0):
    """Logits (N, K) and class numbers (N,) -> float, or (N,) for reduction "none"."""
    return CrossEntropyLoss(weight, ignore_index, reduction, label_smoothing)(input, target)[0]


def cross_entropy_backward(dy, input, target, weight=None, ignore_index=-100, reduction="mean", label_smoothing=0.0):
    """Gradient of input; dy is a number, or (N,) for reduction "none"."""
    value, dx = CrossEntropyLoss(weight, ignore_index, reduction, label_smoothing)(input, target)
    return dx * _gradient(dy, np.asarray(value, dx.dtype)).reshape(-1, 1)


def mse_loss(input, target, reduction="mean"):
    """Two arrays of one shape -> float, or that shape for reduction "none"."""
    return MSELoss(reduction)(input, target)[0]


def mse_loss_backward(dy, input, target, reduction="mean"):
    """Gradients (input, target)."""
    value, dx = MSELoss(reduction)(input, target)
    dx = dx * _gradient(dy, np.asarray(value, dx.dtype))
    return dx, -dx
