"""Fused kernels: an activation and the pooling after it, in one launch.  GPU version of tinycnn/kernels/fused.py.

x, dx: (N, C, H, W)   y, dy: (N, C, OH, OW); for averages OH = H // 2, OW = W // 2
activation: see scalars.py; one that works in place
"""

from tinycnn.cuda._launch import blocks, ravel
from tinycnn.cuda.activations import gradient_arguments, value_arguments
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
