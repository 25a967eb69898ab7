"""Checks of what a caller hands in: every message names the argument, what was expected and what came."""

import numbers
from collections.abc import Mapping

import numpy as np

REAL = "fiub"  # NumPy's kinds of real numbers: floats, signed and unsigned integers, booleans


def short_repr(value, length=200):
    """`repr(value)` for a message, cut at `length`; some values, integers of 5,000 digits for one, have none."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):
        return f"{type(value).__name__} that is too large to print"
    return text if len(text) <= length else text[:length] + "…"


def describe(value):
    """What came, for a message: its repr if that is short, otherwise its kind and shape."""
    if isinstance(value, type):
        return f"the class {value.__name__}: call it, {value.__name__}(...)"
    shape, text = getattr(value, "shape", None), short_repr(value, 60)
    if shape is None and len(text) <= 60 and "\n" not in text:
        return text
    return f"{type(value).__name__}" + (f" of shape {tuple(shape)}" if shape is not None else "")


def instance(name, value, kinds, what, hint=""):
    """`value` if it is one of `kinds`, a class or several; `what` says in words what that is."""
    if not isinstance(value, kinds):
        raise TypeError(f"{name} must be {what}, got {describe(value)}{hint and '; ' + hint}")
    return value


def optional_callable(name, value):
    """`value` if it can be called, or is None."""
    if value is not None and not callable(value):
        raise TypeError(f"{name} must be a function or None, got {describe(value)}")
    return value


def mapping(name, value, hint=""):
    """`value` if it is a dictionary of any kind."""
    return instance(name, value, Mapping, "a dictionary, as state_dict() gives it", hint)


def generator(name, value):
    """np.random.default_rng(value)"""
    try:
        return np.random.default_rng(value)
    except (TypeError, ValueError):
        words = "a seed (an integer that is not negative, or several), a NumPy generator or None"
        kind = ValueError if isinstance(value, numbers.Integral) else TypeError
        raise kind(f"{name} must be {words}, got {describe(value)}") from None


def image_shape(name, value):
    """`value` as the shape of one image or row of numbers, a tuple of positive integers."""
    if not isinstance(value, (tuple, list)):
        raise TypeError(f"{name} must be a tuple of integers such as (1, 28, 28), got {describe(value)}")
    if not value:
        raise ValueError(f"{name} must be a tuple of integers such as (1, 28, 28), got an empty one")
    return tuple(integer(name, n, 1) for n in value)


def learning_rates(name, value, shape=None):
    """A learning rate, or an array of them, as a (steps,) array of its own, float64; `shape`, if it has to have one."""
    try:
        values = np.atleast_1d(np.asarray(value))
        if values.dtype.kind == "O" and isinstance(value, int):  # beyond 64 bits
            values = np.array([float(value)])
    except (ValueError, OverflowError):
        raise ValueError(f"{name} must be finite and an array of numbers, got {describe(value)}") from None
    if values.dtype.kind not in "fiu" or values.ndim != 1 or not values.size:
        raise TypeError(f"{name} must be a number or a one-dimensional array of numbers, got {describe(value)}")
    values = values.astype(np.float64)
    wrong = values[~(np.isfinite(values) & (values >= 0))]
    if wrong.size:
        raise ValueError(f"{name} must be finite and not negative, got {wrong[0]:g}")
    if shape is not None and np.ndim(value) and values.shape != shape:
        raise ValueError(f"{name} must be a number or have shape {shape}, got {values.shape}")
    return values


def per_channel(name, value, channels):
    """A number, or one a channel, as (channels,) float64."""
    value = array(name, value).astype(np.float64)
    if value.shape not in ((), (1,), (channels,)):
        raise ValueError(f"{name} must be a number or {channels}, one a channel, got shape {value.shape}")
    return np.broadcast_to(finite(name, value), (channels,))


def detach(value):
    """`value` without the record that torch keeps of how it was computed, which NumPy would not take."""
    return value.detach() if getattr(value, "requires_grad", False) and hasattr(value, "detach") else value


def _as_array(name, value):
    try:
        return np.asarray(detach(value))
    except ValueError:  # lists of different lengths
        raise ValueError(f"{name} must be an array, got lists of different lengths") from None


def integer(name, value, minimum=None):
    """`value` as an int; TypeError if it is none, ValueError below `minimum`."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    if minimum is not None and value < minimum:
        raise ValueError(f"{name} must be at least {minimum}, got {value}")
    return int(value)


def number(name, value, minimum=None, *, maximum=None, below=None):
    """`value` as a finite float with minimum <= value <= maximum and value < below."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a number, got {value!r}")
    try:
        value = float(value)
    except OverflowError:  # an integer of hundreds of digits
        value = np.inf
    within = np.isfinite(value), minimum is None or value >= minimum, maximum is None or value <= maximum
    if not all(within) or (below is not None and value >= below):
        limits = (("at least", minimum), ("at most", maximum), ("below", below))
        bounds = " and ".join(f"{words} {limit:g}" for words, limit in limits if limit is not None)
        raise ValueError(f"{name} must be {bounds or 'finite'}, got {value:g}")
    return value


def pair(name, value, minimum):
    """An integer, or two (height, width), as a pair of ints."""
    if isinstance(value, (tuple, list)):
        if len(value) != 2:
            raise ValueError(f"{name} must be an integer or a pair (height, width), got {value!r}")
        return integer(name, value[0], minimum), integer(name, value[1], minimum)
    value = integer(name, value, minimum)
    return value, value


def choice(name, value, choices):
    """`value` if it is one of `choices`."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")
    return value


def array(name, value, ndim=None, axes=""):
    """`value` as a non-empty array of real numbers with `ndim` axes (`axes` says which, for the message)."""
    value = _as_array(name, value)
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


def labels(name, value, count, classes=None, ignore_index=None):
    """`value` as (count,) int64 class numbers 0 ... classes-1 (or ignore_index); classes: None for any."""
    value = _as_array(name, value)
    if value.dtype.kind not in "iu":
        raise TypeError(f"{name} must be integer class numbers, got dtype {value.dtype}")
    if value.shape != (count,):
        raise ValueError(f"{name} must have shape ({count},), one class number an image, got {value.shape}")
    bad = (value < 0) | (value >= (np.iinfo(np.int64).max if classes is None else classes))
    if ignore_index is not None:
        bad &= value != ignore_index
    if bad.any():
        at = int(np.flatnonzero(bad)[0])
        bounds = "not be negative" if classes is None else f"lie in 0 ... {classes - 1}"
        raise ValueError(f"{name} must {bounds}, got {value[at]} at index {at}")
    return value.astype(np.int64, copy=False)


def conv_padding(padding, kernel, stride, dilation):
    """`padding` as a pair: numbers, "valid" for none, or "same", which keeps the size; the others are pairs.

    "same" is what lies before the image; after it one more is needed where dilation * (kernel - 1) is odd, as in torch.
    """
    if isinstance(padding, str):
        choice("padding", padding, ("same", "valid"))
        if padding == "valid":
            return 0, 0
        if stride != (1, 1):
            raise ValueError(f"padding='same' needs a stride of 1, got {stride}")
        return tuple(d * (k - 1) // 2 for k, d in zip(kernel, dilation, strict=True))
    return pair("padding", padding, 0)


def conv_output_size(size, kernel, stride, padding, dilation, same=False):
    """Output (height, width) of a convolution of an input of (height, width) `size`; all arguments are pairs.

    same: whether `padding` is what "same" asked for
    """
    return tuple(size) if same else _window_sizes(size, kernel, stride, padding, dilation, (0, 0))


def pool_padding(padding, kernel):
    """`padding` as a pair of at most half of the window `kernel`, a pair."""
    padding = pair("padding", padding, 0)
    for pixels, length in zip(padding, kernel, strict=True):
        if pixels > length // 2:
            raise ValueError(f"padding must be at most half of kernel_size {length}, got {pixels}")
    return padding


def pool_output_size(size, kernel, stride, padding, dilation, ceil_mode):
    """Output (height, width) of a pooling, as torch counts it."""
    return _window_sizes(size, kernel, stride, padding, dilation, [n - 1 for n in stride] if ceil_mode else (0, 0))


def _window_sizes(size, kernel, stride, padding, dilation, beyond):
    """How many windows there are along each axis, which may reach over the padded image by `beyond` pixels."""
    out = []
    for axis, name in enumerate(("height", "width")):
        reach = dilation[axis] * (kernel[axis] - 1) + 1
        padded = size[axis] + 2 * padding[axis]
        count = (padded + beyond[axis] - reach) // stride[axis] + 1
        # A last window that would start in the padding on the right is dropped.
        if beyond[axis] and (count - 1) * stride[axis] >= size[axis] + padding[axis]:
            count -= 1
        if count < 1:
            raise ValueError(
                f"kernel_size {kernel[axis]} with dilation {dilation[axis]} reaches over {reach} pixels, "
                f"but the padded {name} of the input is {padded}"
            )
        out.append(count)
    return tuple(out)
