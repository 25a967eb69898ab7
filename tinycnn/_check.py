"""Checks of what a caller hands in: every message names the argument, what was expected and what came."""

import numbers

import numpy as np

REAL = "fiub"  # NumPy's kinds of real numbers: floats, signed and unsigned integers, booleans


def integer(name, value, least=None):
    """`value` as an int; TypeError if it is none, ValueError below `least`."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    if least is not None and value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")
    return int(value)


def number(name, value, least=None, below=None):
    """`value` as a finite float with least <= value < below."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a number, got {value!r}")
    value = float(value)
    if not np.isfinite(value) or (least is not None and value < least) or (below is not None and value >= below):
        bounds = [f"at least {least:g}"] * (least is not None) + [f"below {below:g}"] * (below is not None)
        raise ValueError(f"{name} must be {' and '.join(bounds) or 'finite'}, got {value}")
    return value


def pair(name, value, least):
    """An integer, or two (height, width), as a pair of ints."""
    if isinstance(value, (tuple, list)):
        if len(value) != 2:
            raise ValueError(f"{name} must be an integer or a pair (height, width), got {value!r}")
        return integer(name, value[0], least), integer(name, value[1], least)
    value = integer(name, value, least)
    return value, value


def choice(name, value, choices):
    """`value` if it is one of `choices`."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")
    return value


def array(name, value, ndim=None, axes=""):
    """`value` as a non-empty array of real numbers with `ndim` axes (`axes` says which, for the message)."""
    value = np.asarray(value)
    if value.dtype.kind not in REAL:
        raise TypeError(f"{name} must be an array of real numbers, got dtype {value.dtype}")
    if ndim is not None and value.ndim != ndim:
        raise ValueError(f"{name} must have {ndim} axes{axes and ' ' + axes}, got shape {value.shape}")
    if value.size == 0:
        raise ValueError(f"{name} must not be empty, got shape {value.shape}")
    return value


def finite(name, value):
    """`value` if it holds no NaN and no infinity; names the first bad entry otherwise."""
    if value.dtype.kind == "f" and not np.isfinite(value).all():
        at = tuple(int(i) for i in np.argwhere(~np.isfinite(value))[0])
        raise ValueError(f"{name} must be finite, got {value[at]} at index {at}")
    return value


def labels(name, value, count, classes, ignore_index=None):
    """`value` as (count,) int64 class numbers 0 ... classes-1 (or ignore_index)."""
    value = np.asarray(value)
    if value.dtype.kind not in "iu":
        raise TypeError(f"{name} must be integer class numbers, got dtype {value.dtype}")
    if value.shape != (count,):
        raise ValueError(f"{name} must have shape ({count},), one class number an image, got {value.shape}")
    bad = (value < 0) | (value >= classes)
    if ignore_index is not None:
        bad &= value != ignore_index
    if bad.any():
        at = int(np.flatnonzero(bad)[0])
        raise ValueError(f"{name} must lie in 0 ... {classes - 1}, got {value[at]} at index {at}")
    return value.astype(np.int64, copy=False)


def conv_size(name, size, kernel, stride, padding, dilation):
    """Output length of a convolution along one axis."""
    reach = dilation * (kernel - 1) + 1
    if size + 2 * padding < reach:
        raise ValueError(
            f"kernel_size {kernel} with dilation {dilation} reaches over {reach} pixels, "
            f"but the padded {name} of the input is {size + 2 * padding}"
        )
    return (size + 2 * padding - reach) // stride + 1


def pool_size(name, size, kernel, stride, padding, dilation=1, ceil_mode=False):
    """Output length of a pooling along one axis, as torch counts it."""
    if padding > kernel // 2:
        raise ValueError(f"padding must be at most half of kernel_size {kernel}, got {padding}")
    conv_size(name, size, kernel, stride, padding, dilation)
    span = size + 2 * padding - dilation * (kernel - 1) - 1
    out = (span + (stride - 1 if ceil_mode else 0)) // stride + 1
    if ceil_mode and (out - 1) * stride >= size + padding:
        out -= 1  # the last window would start in the padding on the right
    return out
