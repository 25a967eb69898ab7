"""A convolution in evaluation, with what follows it: batch norm, the sum of a Residual, an activation that clamps.

With constant statistics, batch norm is one multiply-add for each channel, so the convolution can apply it to an output
that is still in a register (batch norm folding; CUTLASS calls what follows a product its epilogue):

    y[n, o] = min(max(scale[o] * conv(x, w)[n, o] + shift[o] + residual[n, o], low), high)

table: (4, O), scale and shift of each output channel, and low and high, which are the same for all
residual: the shape of y, or None
"""

import math

from tinycnn.kernels._jit import serial_kernel
from tinycnn.kernels.conv import run_forward
from tinycnn.kernels.norm import bias_or_zero, weight_or_one


@serial_kernel
def fold_batch_norm(table, b, weight, bias, mean, var, eps):
    """Set scale and shift: of a bias b of the convolution, or (0,) for none, and of a batch norm with these running
    statistics; mean and var are of size 0 if there is none."""
    for o in range(table.shape[1]):
        table[0, o], table[1, o] = 1, bias_or_zero(b, o)
        if var.size:
            scale = weight_or_one(weight, o) / table.dtype.type(math.sqrt(var[o] + table.dtype.type(eps)))
            table[0, o], table[1, o] = scale, (table[1, o] - mean[o]) * scale + bias_or_zero(bias, o)


def conv2d(y, x, w, table, residual, stride, padding, dilation, groups):
    """x, w, stride, ...: see conv.py; y, x and residual may be blocked"""
    run_forward(y, x, w, table[0, :0], table, residual, stride, padding, dilation, groups)
