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
    bounds = [f"at least {least:g}"] if least is not None else []
    bounds += [f"below {below:g}"] if below is not None else []
    if not np.isfinite(value) or (least is not None and value < least) or (below is not None and value >= below):
        raise ValueError(f"{name} must be {' and '.join(bounds) or 'finite'}, got {value:g}")
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


def conv_padding(padding, kernel, stride, dilation):
    """`padding` as a pair: numbers, "valid" for none, or "same", which keeps the size; the others are pairs."""
    if padding == "valid":
        return 0, 0
    if padding != "same":
        return pair("padding", padding, 0)
    if stride != (1, 1):
        raise ValueError(f"padding='same' needs a stride of 1, got {stride}")
    around = tuple(d * (k - 1) for k, d in zip(kernel, dilation, strict=True))
    if around[0] % 2 or around[1] % 2:
        raise ValueError(
            f"padding='same' needs the same on both sides here, but kernel_size {kernel} with dilation {dilation} asks "
            f"for {around} rows and columns in all; use an odd kernel_size"
        )
    return around[0] // 2, around[1] // 2


def conv_sizes(size, kernel, stride, padding, dilation):
    """Output (height, width) of a convolution of an input of (height, width) `size`; all arguments are pairs."""
    out = []
    for axis, name in enumerate(("height", "width")):
        reach = dilation[axis] * (kernel[axis] - 1) + 1
        padded = size[axis] + 2 * padding[axis]
        if padded < reach:
            raise ValueError(
                f"kernel_size {kernel[axis]} with dilation {dilation[axis]} reaches over {reach} pixels, "
                f"but the padded {name} of the input is {padded}"
            )
        out.append((padded - reach) // stride[axis] + 1)
    return tuple(out)


def pool_sizes(size, kernel, stride, padding, dilation, ceil_mode):
    """Output (height, width) of a pooling, as torch counts it."""
    for axis in range(2):
        if padding[axis] > kernel[axis] // 2:
            raise ValueError(f"padding must be at most half of kernel_size {kernel[axis]}, got {padding[axis]}")
    out = conv_sizes(size, kernel, stride, padding, dilation)
    if not ceil_mode:
        return out
    more = []
    for axis in range(2):
        span = size[axis] + 2 * padding[axis] - dilation[axis] * (kernel[axis] - 1) - 1
        count = -(-span // stride[axis]) + 1
        # A last window that would start in the padding on the right is dropped.
        more.append(count - ((count - 1) * stride[axis] >= size[axis] + padding[axis]))
    return tuple(more)
