"""The CPU backend: the kernels, and the array services that every backend has.

A backend is a module with these names.  Backends differ in their arrays and where their loops run, not in the results.
"""

import math

import numpy as np

from tinycnn.kernels import folded, fused, layout
from tinycnn.kernels._capture import CapturedStep
from tinycnn.kernels._precompile import precompile
from tinycnn.kernels.activations import (
    activation_backward,
    activation_forward,
    log_softmax_backward,
    log_softmax_forward,
    softmax_backward,
    softmax_forward,
)
from tinycnn.kernels.augment import elastic_field, jitter, random_affine, warp
from tinycnn.kernels.batch import accumulate_metrics, gather, gather_rows, weight_samples
from tinycnn.kernels.conv import col2im, conv2d_backward, conv2d_forward, im2col
from tinycnn.kernels.dropout import dropout
from tinycnn.kernels.elementwise import add, add_bias, sum_channels
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
from tinycnn.kernels.losses import (
    absolute_error,
    binary_cross_entropy_with_logits,
    cross_entropy,
    huber_loss,
    l1_loss,
    mse_loss,
    nll_loss,
    one_hot,
    soft_cross_entropy,
)
from tinycnn.kernels.norm import (
    batch_norm_backward,
    batch_norm_forward,
    group_norm_backward,
    group_norm_forward,
    layer_norm_backward,
    layer_norm_forward,
)
from tinycnn.kernels.optim import (
    accumulate_grad,
    adam,
    clip_grad_norm,
    clip_grad_value,
    ema_update,
    increment,
    parameter_blocks,
    rmsprop,
    sgd,
    sgd_per_parameter,
)
from tinycnn.kernels.pooling import (
    adaptive_avg_pool2d_backward,
    adaptive_avg_pool2d_forward,
    avg_pool2d_backward,
    avg_pool2d_forward,
    max_pool2d_backward,
    max_pool2d_forward,
)
from tinycnn.kernels.resize import upsample_nearest2d_backward, upsample_nearest2d_forward, zero_pad2d

__all__ = [
    "absolute_error",
    "accumulate_grad",
    "accumulate_metrics",
    "activation_backward",
    "activation_forward",
    "adam",
    "adaptive_avg_pool2d_backward",
    "adaptive_avg_pool2d_forward",
    "add",
    "add_bias",
    "avg_pool2d_backward",
    "avg_pool2d_forward",
    "batch_norm_backward",
    "batch_norm_forward",
    "binary_cross_entropy_with_logits",
    "capture",
    "clip_grad_norm",
    "clip_grad_value",
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
    "folded",
    "fused",
    "gather",
    "gather_rows",
    "group_norm_backward",
    "group_norm_forward",
    "huber_loss",
    "im2col",
    "increment",
    "jitter",
    "l1_loss",
    "layer_norm_backward",
    "layer_norm_forward",
    "layout",
    "linear_backward",
    "linear_forward",
    "log_softmax_backward",
    "log_softmax_forward",
    "max_pool2d_backward",
    "max_pool2d_forward",
    "mse_loss",
    "nll_loss",
    "one_hot",
    "parameter_blocks",
    "precompile",
    "random_affine",
    "rbf_loss",
    "rmsprop",
    "sgd",
    "sgd_per_parameter",
    "soft_cross_entropy",
    "softmax_backward",
    "softmax_forward",
    "squared_distance_backward",
    "squared_distance_forward",
    "subsample_backward",
    "subsample_forward",
    "sum_channels",
    "to_device",
    "to_host",
    "upsample_nearest2d_backward",
    "upsample_nearest2d_forward",
    "warp",
    "weight_samples",
    "zero_pad2d",
]  # fmt: skip


CACHE_LINE = 64  # bytes


def empty(shape, dtype):
    """A new array of this device, filled with zeros and aligned to a cache line.

    Without the alignment every vector of a blocked map would cross two cache lines.
    """
    dtype, shape = np.dtype(dtype), (shape,) if isinstance(shape, int) else tuple(shape)
    size = math.prod(shape) * dtype.itemsize
    buffer = np.zeros(size + CACHE_LINE, np.uint8)
    start = -buffer.ctypes.data % CACHE_LINE
    return buffer[start : start + size].view(dtype).reshape(shape)


def to_device(array):
    """`array` (NumPy) as a C-contiguous array of this device."""
    return np.ascontiguousarray(array)


def to_host(array):
    """An array of this device as a NumPy array."""
    return array


def copy_to(array, values):
    """Overwrite an array of this device with `values` (NumPy or of this device, of the same shape)."""
    array[...] = values


def capture(step):
    """A faster version of `step`, a function without arguments.

    The first call runs it and records which kernels it calls on which arrays; later calls run only these.  So all
    state that changes from call to call must be in arrays, and only kernels may change it.
    """
    return CapturedStep(step)
