"""The CPU kernels, and the few array services every backend offers.

A backend is a module with these names: what the arrays are made of and where the loops run is its business, what they
compute is the same.
"""

import math

import numpy as np

from tinycnn.kernels import fused, layout
from tinycnn.kernels._capture import CapturedStep
from tinycnn.kernels._precompile import precompile
from tinycnn.kernels.activations import (
    gaussian_backward,
    gaussian_forward,
    leaky_relu_backward,
    leaky_relu_forward,
    log_softmax_backward,
    log_softmax_forward,
    relu_backward,
    relu_forward,
    scaled_tanh_backward,
    scaled_tanh_forward,
    sigmoid_backward,
    sigmoid_forward,
    softmax_backward,
    softmax_forward,
    tanh_backward,
    tanh_forward,
)
from tinycnn.kernels.augment import elastic_field, jitter, random_affine, warp
from tinycnn.kernels.batch import accumulate_metrics, gather
from tinycnn.kernels.conv import col2im, conv2d_backward, conv2d_forward, im2col
from tinycnn.kernels.dropout import dropout
from tinycnn.kernels.lecun98 import (
    conv2d_map_backward,
    conv2d_map_forward,
    rbf_loss,
    squared_distance_backward,
    squared_distance_forward,
    subsample_backward,
    subsample_forward,
)
from tinycnn.kernels.linear import linear_backward, linear_forward
from tinycnn.kernels.losses import cross_entropy, mse_loss, one_hot
from tinycnn.kernels.norm import batch_norm_backward, batch_norm_forward, group_norm_backward, group_norm_forward
from tinycnn.kernels.optim import adam, ema_update, increment, sgd, sgd_per_parameter
from tinycnn.kernels.pooling import (
    avg_pool2d_backward,
    avg_pool2d_forward,
    max_pool2d_backward,
    max_pool2d_forward,
)

__all__ = [
    "accumulate_metrics",
    "adam",
    "avg_pool2d_backward",
    "avg_pool2d_forward",
    "batch_norm_backward",
    "batch_norm_forward",
    "capture",
    "col2im",
    "conv2d_backward",
    "conv2d_forward",
    "conv2d_map_backward",
    "conv2d_map_forward",
    "copy_to",
    "cross_entropy",
    "dropout",
    "elastic_field",
    "ema_update",
    "empty",
    "fused",
    "gather",
    "gaussian_backward",
    "gaussian_forward",
    "group_norm_backward",
    "group_norm_forward",
    "im2col",
    "increment",
    "jitter",
    "layout",
    "leaky_relu_backward",
    "leaky_relu_forward",
    "linear_backward",
    "linear_forward",
    "log_softmax_backward",
    "log_softmax_forward",
    "max_pool2d_backward",
    "max_pool2d_forward",
    "mse_loss",
    "one_hot",
    "precompile",
    "random_affine",
    "rbf_loss",
    "relu_backward",
    "relu_forward",
    "scaled_tanh_backward",
    "scaled_tanh_forward",
    "sgd",
    "sgd_per_parameter",
    "sigmoid_backward",
    "sigmoid_forward",
    "softmax_backward",
    "softmax_forward",
    "squared_distance_backward",
    "squared_distance_forward",
    "subsample_backward",
    "subsample_forward",
    "tanh_backward",
    "tanh_forward",
    "to_device",
    "to_host",
    "warp",
]  # fmt: skip


CACHE_LINE = 64  # bytes


def empty(shape, dtype):
    """A new array on this device, filled with zeros.

    It begins where a line of the cache begins: otherwise every vector of a tile would lie on two.
    """
    dtype, shape = np.dtype(dtype), (shape,) if isinstance(shape, int) else tuple(shape)
    size = math.prod(shape) * dtype.itemsize
    room = np.zeros(size + CACHE_LINE, np.uint8)
    start = -room.ctypes.data % CACHE_LINE
    return room[start : start + size].view(dtype).reshape(shape)


def to_device(array):
    """`array` (NumPy) as a C-contiguous array of this device."""
    return np.ascontiguousarray(array)


def to_host(array):
    """An array of this device as NumPy."""
    return array


def copy_to(array, values):
    """Overwrite an array of this device with `values` (NumPy or of this device, of the same shape)."""
    array[...] = values


def capture(step):
    """`step`, a function without arguments, as something that is called like it and does the same, sooner.

    Which kernels it calls on which arrays is written down by the first call, and from then on that is all that happens:
    what changes from call to call must live in arrays, and nothing but kernels may change them.
    """
    return CapturedStep(step)
