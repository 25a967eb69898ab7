"""The CUDA backend: the functions of tinycnn.kernels, with the same names and arguments, on an NVIDIA GPU.

`tinycnn.devices.get("cuda")` selects the GPU and returns this module.
"""

from tinycnn.cuda import fused
from tinycnn.cuda._launch import capture, copy_to, empty, precompile, to_device, to_host
from tinycnn.cuda.activations import (
    activation_backward,
    activation_forward,
    log_softmax_backward,
    log_softmax_forward,
    softmax_backward,
    softmax_forward,
)
from tinycnn.cuda.augment import elastic_field, jitter, random_affine, warp
from tinycnn.cuda.batch import accumulate_metrics, gather, gather_rows, weight_samples
from tinycnn.cuda.conv import col2im, conv2d_backward, conv2d_forward, im2col
from tinycnn.cuda.dropout import dropout
from tinycnn.cuda.elementwise import add, add_bias, sum_channels
from tinycnn.cuda.lecun98 import (
    conv2d_map_backward,
    conv2d_map_forward,
    rbf_loss,
    squared_distance_backward,
    squared_distance_forward,
    subsample_backward,
    subsample_forward,
)
from tinycnn.cuda.linear import linear_backward, linear_forward
from tinycnn.cuda.losses import (
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
from tinycnn.cuda.norm import (
    batch_norm_backward,
    batch_norm_forward,
    group_norm_backward,
    group_norm_forward,
    layer_norm_backward,
    layer_norm_forward,
)
from tinycnn.cuda.optim import (
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
from tinycnn.cuda.pooling import (
    adaptive_avg_pool2d_backward,
    adaptive_avg_pool2d_forward,
    avg_pool2d_backward,
    avg_pool2d_forward,
    max_pool2d_backward,
    max_pool2d_forward,
)
from tinycnn.cuda.resize import upsample_nearest2d_backward, upsample_nearest2d_forward, zero_pad2d

layout = folded = None  # this backend uses NCHW only, and runs the steps of training in evaluation too

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
