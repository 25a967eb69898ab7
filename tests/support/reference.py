"""Reference implementations in plain NumPy and float64: slow and short.

Shapes and argument names are those of the kernels.  Nothing here imports tinycnn.
"""

import math

import numpy as np

from tinycnn import scalars


def out_size(size, kernel, stride, padding, dilation=1, ceil_mode=False):
    """Output length along one axis: the windows that fit; with ceil_mode one more, if the others leave pixels out and
    it starts before the right padding."""
    extent = dilation * (kernel - 1) + 1
    starts = list(range(0, size + 2 * padding - extent + 1, stride))
    if ceil_mode and not starts and extent - (size + 2 * padding) < stride:  # a window larger than the image
        starts.append(0)
    if ceil_mode and starts[-1] + extent < size + 2 * padding and starts[-1] + stride < size + padding:
        starts.append(starts[-1] + stride)
    return len(starts)


def windows(x, kernel, out, stride, padding, dilation, fill):
    """x: (N, C, H, W) -> (N, C, OH, OW, KH, KW); `fill` where a window leaves the image."""
    N, C, H, W = x.shape
    (OH, OW), (KH, KW) = out, kernel
    result = np.full((N, C, OH, OW, KH, KW), fill, x.dtype)
    for i in range(OH):
        for u in range(KH):
            h = i * stride[0] + u * dilation[0] - padding[0]
            for j in range(OW):
                for v in range(KW):
                    w = j * stride[1] + v * dilation[1] - padding[1]
                    if 0 <= h < H and 0 <= w < W:
                        result[:, :, i, j, u, v] = x[:, :, h, w]
    return result


def add_windows(columns, shape, stride, padding, dilation):
    """The transpose of `windows` (with fill 0): adds every entry to its pixel."""
    x = np.zeros(shape, columns.dtype)
    H, W = shape[2:]
    OH, OW, KH, KW = columns.shape[2:]
    for i in range(OH):
        for u in range(KH):
            h = i * stride[0] + u * dilation[0] - padding[0]
            for j in range(OW):
                for v in range(KW):
                    w = j * stride[1] + v * dilation[1] - padding[1]
                    if 0 <= h < H and 0 <= w < W:
                        x[:, :, h, w] += columns[:, :, i, j, u, v]
    return x


# --- convolution ------------------------------------------------------------------------------------------------------


def conv_out(x, w, stride, padding, dilation):
    return tuple(out_size(*s) for s in zip(x.shape[2:], w.shape[2:], stride, padding, dilation, strict=True))


def conv2d(x, w, b, stride=(1, 1), padding=(0, 0), dilation=(1, 1), groups=1):
    """x: (N, C, H, W)   w: (O, C/groups, KH, KW)   b: (O,) or (0,)"""
    x, w, b = (np.asarray(a, np.float64) for a in (x, w, b))
    parts = []
    for xg, wg in zip(np.split(x, groups, 1), np.split(w, groups), strict=True):
        win = windows(xg, w.shape[2:], conv_out(x, w, stride, padding, dilation), stride, padding, dilation, 0)
        parts.append(np.einsum("ncijuv,ocuv->noij", win, wg))
    y = np.concatenate(parts, 1)
    return y + b.reshape(-1, 1, 1) if b.size else y


def conv2d_backward(dy, x, w, stride=(1, 1), padding=(0, 0), dilation=(1, 1), groups=1):
    """(dx, dw, db)"""
    dy, x, w = (np.asarray(a, np.float64) for a in (dy, x, w))
    dx, dw = [], []
    split = np.split(dy, groups, 1), np.split(x, groups, 1), np.split(w, groups)
    for dyg, xg, wg in zip(*split, strict=True):
        win = windows(xg, w.shape[2:], dy.shape[2:], stride, padding, dilation, 0)
        dw.append(np.einsum("noij,ncijuv->ocuv", dyg, win))
        columns = np.einsum("noij,ocuv->ncijuv", dyg, wg)
        dx.append(add_windows(columns, xg.shape, stride, padding, dilation))
    return np.concatenate(dx, 1), np.concatenate(dw), dy.sum((0, 2, 3))


def im2col(x, kernel, out, stride, padding, dilation):
    """(N, C, H, W) -> (N, C*KH*KW, OH*OW)"""
    win = windows(x, kernel, out, stride, padding, dilation, 0).transpose(0, 1, 4, 5, 2, 3)
    return win.reshape(len(x), -1, out[0] * out[1])


def col2im(columns, shape, kernel, out, stride, padding, dilation):
    """(N, C*KH*KW, OH*OW) -> (N, C, H, W)"""
    split = columns.reshape(len(columns), -1, *kernel, *out).transpose(0, 1, 4, 5, 2, 3)
    return add_windows(split, shape, stride, padding, dilation)


# --- pooling ----------------------------------------------------------------------------------------------------------


def pool_out(x, kernel, stride, padding, dilation=(1, 1), ceil_mode=False):
    return tuple(out_size(*s, ceil_mode) for s in zip(x.shape[2:], kernel, stride, padding, dilation, strict=True))


def _divisors(x, kernel, out, stride, padding, count_include_pad, divisor):
    """Divisor of each window's sum: (OH, OW)."""
    if divisor:
        return np.full(out, divisor, np.float64)
    H, W = x.shape[2:]
    if count_include_pad:  # ones in the padded image, zeros outside
        ones = np.ones((1, 1, H + 2 * padding[0], W + 2 * padding[1]))
        return windows(ones, kernel, out, stride, (0, 0), (1, 1), 0).sum((0, 1, 4, 5))
    return windows(np.ones((1, 1, H, W)), kernel, out, stride, padding, (1, 1), 0).sum((0, 1, 4, 5))


def avg_pool2d(x, kernel, stride, padding=(0, 0), ceil_mode=False, count_include_pad=True, divisor=0):
    x = np.asarray(x, np.float64)
    out = pool_out(x, kernel, stride, padding, (1, 1), ceil_mode)
    total = windows(x, kernel, out, stride, padding, (1, 1), 0).sum((4, 5))
    return total / _divisors(x, kernel, out, stride, padding, count_include_pad, divisor)


def avg_pool2d_backward(dy, x, kernel, stride, padding=(0, 0), count_include_pad=True, divisor=0):
    dy = np.asarray(dy, np.float64)
    part = dy / _divisors(x, kernel, dy.shape[2:], stride, padding, count_include_pad, divisor)
    columns = np.broadcast_to(part[..., None, None], (*dy.shape, *kernel))
    return add_windows(columns, x.shape, stride, padding, (1, 1))


def max_pool2d(x, kernel, stride, padding=(0, 0), dilation=(1, 1), ceil_mode=False):
    """(y, indices): of equal entries the first; of several NaN the last; -inf and -1 for a window without a pixel."""
    N, C, H, W = x.shape
    OH, OW = out = pool_out(x, kernel, stride, padding, dilation, ceil_mode)
    y, indices = np.empty((N, C, *out), x.dtype), np.empty((N, C, *out), np.int64)
    for n, c, i, j in np.ndindex(N, C, OH, OW):
        best, argmax = -math.inf, -1
        for u in range(kernel[0]):
            for v in range(kernel[1]):
                h = i * stride[0] + u * dilation[0] - padding[0]
                w = j * stride[1] + v * dilation[1] - padding[1]
                if 0 <= h < H and 0 <= w < W:
                    value = x[n, c, h, w]
                    if argmax < 0 or value > best or math.isnan(value):
                        best, argmax = value, h * W + w
        y[n, c, i, j], indices[n, c, i, j] = best, argmax
    return y, indices


def max_pool2d_backward(dy, indices, shape):
    dx = np.zeros((*shape[:2], shape[2] * shape[3]))
    for n, c, i, j in np.argwhere(indices >= 0):
        dx[n, c, indices[n, c, i, j]] += dy[n, c, i, j]
    return dx.reshape(shape)


# --- linear -----------------------------------------------------------------------------------------------------------


def linear(x, w, b):
    x, w, b = (np.asarray(a, np.float64) for a in (x, w, b))
    y = np.einsum("nf,of->no", x, w)
    return y + b if b.size else y


def linear_backward(dy, x, w):
    dy, x, w = (np.asarray(a, np.float64) for a in (dy, x, w))
    return np.einsum("no,of->nf", dy, w), np.einsum("no,nf->of", dy, x), dy.sum(0)


# --- activations: value, and derivative as a function of the input ----------------------------------------------------


def tanh(x):
    return np.tanh(x)


def tanh_derivative(x):
    return 1 - np.tanh(x) ** 2


def scaled_tanh(x, A, S):
    return A * np.tanh(S * x)


def scaled_tanh_derivative(x, A, S):
    return A * S * (1 - np.tanh(S * x) ** 2)


def sigmoid(x):
    """1 / (1 + exp(-x)) without overflow."""
    e = np.exp(-np.abs(x))
    return np.where(x < 0, e, 1) / (1 + e)


def sigmoid_derivative(x):
    return sigmoid(x) * sigmoid(-x)


def relu(x):
    return np.where(x <= 0, 0, x)


def relu_derivative(x):
    return np.where(x > 0, 1.0, 0.0)


def leaky_relu(x, negative_slope):
    return np.where(x > 0, x, negative_slope * x)


def leaky_relu_derivative(x, negative_slope):
    return np.where(x > 0, 1.0, negative_slope)


def gaussian(x, a):
    return np.exp(a * x)


def gaussian_derivative(x, a):
    return a * np.exp(a * x)


def elu(x, alpha=1.0):
    return np.where(x > 0, x, alpha * np.expm1(np.minimum(x, 0)))


def elu_derivative(x, alpha=1.0):
    return np.where(x > 0, 1.0, alpha * np.exp(np.minimum(x, 0)))


def normal_cdf(x):
    return 0.5 * np.vectorize(math.erfc, otypes=[float])(-np.asarray(x) / math.sqrt(2))


def times_cdf(x, cdf):
    """x * cdf(x), which tends to 0 for x -> -infinity."""
    return np.where(x == -np.inf, 0.0, np.where(np.isneginf(x), 0.0, x) * cdf)


def gelu(x, *constants):
    return times_cdf(x, normal_cdf(x))


def gelu_derivative(x, *constants):
    z = np.clip(x, -100, 100)
    return normal_cdf(z) + z * np.exp(-(z**2) / 2) / math.sqrt(2 * math.pi)


def gelu_tanh(x, *constants):
    z = np.clip(x, -100, 100)
    return times_cdf(x, sigmoid(2 * math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))


def gelu_tanh_derivative(x, *constants):
    z = np.clip(x, -100, 100)
    s = sigmoid(2 * math.sqrt(2 / math.pi) * (z + 0.044715 * z**3))
    return s + z * s * (1 - s) * 2 * math.sqrt(2 / math.pi) * (1 + 3 * 0.044715 * z**2)


def silu(x):
    return times_cdf(x, sigmoid(x))


def silu_derivative(x):
    z = np.clip(x, -1000, 1000)
    return sigmoid(z) * (1 + z * (1 - sigmoid(z)))


def softplus(x, beta=1.0, threshold=20.0):
    z = beta * x
    return np.where(z > threshold, x, (np.maximum(z, 0) + np.log1p(np.exp(-abs(z)))) / beta)


def softplus_derivative(x, beta=1.0, threshold=20.0):
    return np.where(beta * x > threshold, 1.0, sigmoid(beta * x))


def hardtanh(x, low=-1.0, high=1.0):
    return np.clip(x, low, high)


def hardtanh_derivative(x, low=-1.0, high=1.0):
    return ((x > low) & (x < high)).astype(float)


# name in tinycnn.scalars, in lower case: (value, derivative, argument of the backward besides dy, constants)
ACTIVATIONS = {
    "tanh": (tanh, tanh_derivative, "y", ()),
    "sigmoid": (sigmoid, sigmoid_derivative, "y", ()),
    "relu": (relu, relu_derivative, "y", ()),
    "scaled_tanh": (scaled_tanh, scaled_tanh_derivative, "y", (1.7159, 2 / 3)),
    "leaky_relu": (leaky_relu, leaky_relu_derivative, "x", (0.01,)),
    "gaussian": (gaussian, gaussian_derivative, "y", (-0.5,)),
    "elu": (elu, elu_derivative, "y", (1.3,)),
    "gelu": (gelu, gelu_derivative, "x", scalars.GELU_CONSTANTS),
    "gelu_tanh": (gelu_tanh, gelu_tanh_derivative, "x", scalars.GELU_TANH_CONSTANTS),
    "silu": (silu, silu_derivative, "x", ()),
    "softplus": (softplus, softplus_derivative, "x", (1.5, 20.0)),
    "hardtanh": (hardtanh, hardtanh_derivative, "y", (-0.7, 1.2)),
    "relu6": (hardtanh, hardtanh_derivative, "y", (0.0, 6.0)),
}


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def softmax_backward(dy, x):
    """Product with the Jacobian, dy_k/dx_i = y_k ([i = k] - y_i)."""
    y = softmax(x)
    jacobian = np.einsum("rk,ki->rki", y, np.eye(x.shape[1])) - np.einsum("rk,ri->rki", y, y)
    return np.einsum("rk,rki->ri", dy, jacobian)


def log_softmax(x):
    shifted = x - x.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def log_softmax_backward(dy, x):
    """d log y_k / dx_i = [i = k] - y_i"""
    jacobian = np.eye(x.shape[1])[None] - softmax(x)[:, None, :]
    return np.einsum("rk,rki->ri", dy, jacobian)


# --- losses -----------------------------------------------------------------------------------------------------------


def cross_entropy(x, target, weight=None, ignore_index=-100, label_smoothing=0.0, reduction="mean"):
    """(loss of each image, gradient): with "mean" both are divided by the sum of the targets' weights."""
    x = np.asarray(x, np.float64)
    N, K = x.shape
    weight = np.ones(K) if weight is None else np.asarray(weight, np.float64)
    log_p, p = log_softmax(x), softmax(x)
    loss, dx, total = np.zeros(N), np.zeros((N, K)), 0.0
    for n in range(N):
        if target[n] == ignore_index:
            continue
        total += weight[target[n]]
        probability = np.full(K, label_smoothing / K)
        probability[target[n]] += 1 - label_smoothing
        a = probability * weight
        loss[n] = -sum(a[k] * log_p[n, k] for k in range(K) if a[k])
        dx[n] = p[n] * a.sum() - a
    divisor = total if reduction == "mean" else 1.0
    return loss / divisor, dx / divisor


def mse_loss(x, target, reduction="mean"):
    """(loss of each row, gradient)"""
    x, target = np.asarray(x, np.float64), np.asarray(target, np.float64)
    divisor = x.size if reduction == "mean" else 1
    return ((x - target) ** 2).sum(1) / divisor, 2 * (x - target) / divisor


def one_hot(x, labels):
    """(one-hot rows in the shape of x, argmax of each row of x)"""
    rows, predicted = np.zeros(x.shape), []
    for n, label in enumerate(labels):
        rows[n, label] = 1
        predicted.append(list(x[n]).index(max(x[n])))
    return rows, predicted


# --- optimizers: theta after every step -------------------------------------------------------------------------------


def sgd(theta, grads, rates, momentum=0.0, dampening=0.0, weight_decay=0.0, nesterov=False):
    theta, velocity, path = np.array(theta, np.float64), None, []
    for t, grad in enumerate(grads):
        g = grad + weight_decay * theta
        if momentum:
            velocity = g if velocity is None else momentum * velocity + (1 - dampening) * g
            g = g + momentum * velocity if nesterov else velocity
        theta = theta - rates[min(t, len(rates) - 1)] * g
        path.append(theta)
    return np.array(path)


def adam(theta, grads, rates, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.0, decoupled=False):
    theta, path = np.array(theta, np.float64), []
    m = v = np.zeros_like(theta)
    for t, grad in enumerate(grads, 1):
        lr = rates[min(t - 1, len(rates) - 1)]
        g = grad if decoupled else grad + weight_decay * theta
        m = beta1 * m + (1 - beta1) * g
        v = beta2 * v + (1 - beta2) * g**2
        if decoupled:
            theta = theta - lr * weight_decay * theta
        theta = theta - lr * (m / (1 - beta1**t)) / (np.sqrt(v / (1 - beta2**t)) + eps)
        path.append(theta)
    return np.array(path)


def rmsprop(theta, grads, rates, alpha, eps, weight_decay=0.0, momentum=0.0, centered=False):
    theta, path = np.array(theta, np.float64), []
    v = mean = velocity = np.zeros_like(theta)
    for t, grad in enumerate(grads):
        g = grad + weight_decay * theta
        v, mean = alpha * v + (1 - alpha) * g**2, alpha * mean + (1 - alpha) * g
        change = g / (np.sqrt(v - mean**2 if centered else v) + eps)
        if momentum:
            change = velocity = momentum * velocity + change
        theta = theta - rates[min(t, len(rates) - 1)] * change
        path.append(theta)
    return np.array(path)


def ema(path, decay):
    """The exponential moving average after every step of a path of theta; the first is theta itself."""
    averages = [np.asarray(path[0], np.float64)]
    for theta in path[1:]:
        averages.append(decay * averages[-1] + (1 - decay) * theta)
    return np.array(averages)


# --- normalisation ----------------------------------------------------------------------------------------------------


def normalize(x, sets, weight, bias, eps, statistics=None):
    """x: (N, C, H, W) with mean and variance over the axes `sets`, or with `statistics`; (y, mean, rstd)."""
    mean, var = statistics if statistics else (x.mean(sets, keepdims=True), x.var(sets, keepdims=True))
    rstd = 1 / np.sqrt(var + eps)
    return (x - mean) * rstd * weight[:, None, None] + bias[:, None, None], mean, rstd


# --- comparing --------------------------------------------------------------------------------------------------------


def assert_close(got, want, magnitude=1.0, terms=1):
    """Assert that `got` equals `want` up to rounding.

    For a sum of `terms` products whose absolute values add up to `magnitude`: sqrt(terms) + 4 units in the last place
    in float32, 1e-12 in float64.
    """
    assert got.shape == np.shape(want), f"shape {got.shape}, expected {np.shape(want)}"
    rtol = 1e-12 if got.dtype == np.float64 else (4 + math.sqrt(terms)) * 2.0**-24
    error = np.abs(got - want)
    allowed = rtol * np.maximum(np.abs(want), magnitude) + np.finfo(got.dtype).tiny
    bad = ~(error <= allowed)
    if bad.any():
        index = tuple(int(i) for i in np.argwhere(bad)[0])
        raise AssertionError(
            f"{bad.sum()} of {bad.size} entries differ; first at {index}: {got[index]!r}, expected {want[index]!r}, "
            f"error {error[index]:.3g}, allowed {np.broadcast_to(allowed, got.shape)[index]:.3g}"
        )


def blank(shape, dtype):
    """An output array of NaN (integers: -7), to detect entries that are not written."""
    return np.full(shape, -7 if np.dtype(dtype).kind in "iu" else np.nan, dtype)
