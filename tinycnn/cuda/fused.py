"""Fused kernels, one launch each: an activation and the pooling after it, with the convolution before them, and a
Linear with an activation.  GPU version of tinycnn/kernels/fused.py.

x, dx: (N, C, H, W)   y, dy: (N, C, OH, OW); for averages OH = H // 2, OW = W // 2
activation: see scalars.py; one that works in place
"""

from tinycnn.cuda import linear
from tinycnn.cuda._launch import blocks, constant, ravel
from tinycnn.cuda.activations import gradient_arguments, value_arguments
from tinycnn.cuda.conv import conv2d_forward, run_pooled_forward
from tinycnn.cuda.pooling import (
    avg_pool2d_backward_kernel,
    avg_pool2d_forward_kernel,
    max_pool2d_backward_kernel,
    max_pool2d_forward_kernel,
    window_extent,
)

WINDOWS_2X2 = (2, 2), (2, 2), (0, 0), True  # kernel size, stride, padding, count_include_pad


def avg_pool_forward(y, x, activation, divisor):
    """x = f(x), in place; y = avg_pool(x)."""
    avg_pool2d_forward_kernel[blocks(y.size)](
        ravel(y), ravel(x), *value_arguments(activation, x.dtype), x.shape[2:], y.shape[2:], *WINDOWS_2X2, divisor
    )


def avg_pool_backward(dx, dy, activation, divisor):
    """dx: on entry f(x), as `avg_pool_forward` left it in x; on return the gradient of x."""
    avg_pool2d_backward_kernel[blocks(dx.size)](
        ravel(dx), ravel(dy), *gradient_arguments(activation, dx.dtype), dx.shape[2:], dy.shape[2:], *WINDOWS_2X2,
        divisor,
    )  # fmt: skip


def max_pool_forward(y, indices, x, activation, kernel_size, stride, padding, dilation):
    """y = f(max_pool(x))."""
    max_pool2d_forward_kernel[blocks(y.size)](
        ravel(y), ravel(indices), ravel(x), x.dtype.type("-inf"), *value_arguments(activation, x.dtype), x.shape[2:],
        y.shape[2:], kernel_size, stride, padding, dilation,
    )  # fmt: skip


def max_pool_backward(dx, dy, indices, y, activation, kernel_size, stride, padding, dilation):
    """Gradient of x from dy.  y: the output of `max_pool_forward`"""
    max_pool2d_backward_kernel[blocks(dx.size)](
        ravel(dx), ravel(dy), ravel(indices), ravel(y), *gradient_arguments(activation, dx.dtype), dx.shape[2:],
        dy.shape[2:], window_extent(kernel_size, dilation), stride, padding,
    )  # fmt: skip


def conv2d_avg_pool_forward(y, maps, x, w, b, stride, padding, dilation, groups, activation, divisor):
    """maps = f(conv(x)) where windows are; y = avg_pool(maps).  `avg_pool_backward` overwrites maps with their
    gradient."""
    no_indices = constant((0,))
    run_pooled_forward(
        y, no_indices, maps, True, divisor, activation, x, w, b, stride, padding, dilation, groups
    )  # fmt: skip


def conv2d_max_pool_forward(
    y, indices, maps, x, w, b, stride, padding, dilation, groups, activation, kernel_size, pool_stride, pool_padding,
    pool_dilation,
):  # fmt: skip
    """y = f(max_pool(conv(x))).  maps: room for the gradient that `max_pool_backward` computes"""
    inside = y.shape[2] == maps.shape[2] // 2 and y.shape[3] == maps.shape[3] // 2
    if kernel_size == pool_stride == (2, 2) and pool_dilation == (1, 1) and inside:
        run_pooled_forward(
            y, ravel(indices), maps, False, 1, activation, x, w, b, stride, padding, dilation, groups
        )  # fmt: skip
        return
    conv2d_forward(maps, x, w, b, stride, padding, dilation, groups)
    max_pool_forward(y, indices, maps, activation, kernel_size, pool_stride, pool_padding, pool_dilation)


def linear_forward(y, x, w, b, activation):
    """y = f(x w^T + b), with an activation that works in place."""
    linear.run_forward(y, x, w, b, activation)


def linear_backward(dx, dw, db, dy, x, w, y, activation):
    """Gradients of `linear_forward` from dy.  y: its output"""
    linear.run_backward(dx, dw, db, dy, x, w, y, activation)
