"""Argument checks.  Every message names the argument, the expected and the given value: "x must be ..., got ..."."""

import numbers
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np

from tinycnn._typing import Array, DType, Padding, Pair, Shape

T = TypeVar("T")
REAL = "fiub"  # NumPy's kinds of real numbers: floats, signed and unsigned integers, booleans


# --- how a message shows a value --------------------------------------------------------------------------------------


def short_repr(value: object, length: int = 200) -> str:
    """`repr(value)`, cut at `length`.  Some values have no repr: integers of 5,000 digits."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):
        return f"{type(value).__name__} that is too large to print"
    return text if len(text) <= length else text[:length] + "…"


def one_line(error: BaseException, length: int = 500) -> str:
    """The message of an exception on one line, cut at `length`; its type if it has none."""
    text = "".join(c if c.isprintable() else " " for c in str(error)[: 4 * length])  # no terminal escape sequences
    return " ".join(text.split())[:length] or type(error).__name__


PASSWORD = re.compile(r"(://[^\s:/@]*):(.*)@", re.DOTALL)  # up to the last @: an unescaped password may have some
PASSWORD_OPTION = re.compile(r"([?&](?:ssl)?pass(?:word|wd)?=)[^&\s]*", re.IGNORECASE)


def has_password(url: str) -> bool:
    """Whether there is a password before the host of a URL."""
    return PASSWORD.search(url) is not None


def hide_password(text: str) -> str:
    """The text, such as a URL or an option of the command line, with *** instead of the password of its URL."""
    return PASSWORD_OPTION.sub(r"\1***", PASSWORD.sub(r"\1:***@", text))


def describe(value: object) -> str:
    """The repr of `value` if that is short, otherwise its type and shape."""
    if isinstance(value, type):
        return f"the class {value.__name__}: call it, {value.__name__}(...)"
    shape, text = getattr(value, "shape", None), short_repr(value, 60)
    if shape is None and len(text) <= 60 and "\n" not in text:
        return text
    return f"{type(value).__name__}" + (f" of shape {tuple(shape)}" if shape is not None else "")


# --- objects ----------------------------------------------------------------------------------------------------------


def instance(name: str, value: T, types: type | tuple[type, ...], expected: str, hint: str = "") -> T:
    """`value` if it is an instance of `types`, which the message calls `expected`."""
    if not isinstance(value, types):
        raise TypeError(f"{name} must be {expected}, got {describe(value)}{hint and '; ' + hint}")
    return value


def optional_callable(name: str, value: T) -> T:
    """`value` if it can be called or is None."""
    if value is not None and not callable(value):
        raise TypeError(f"{name} must be a function or None, got {describe(value)}")
    return value


def mapping(name: str, value: Mapping[str, T], hint: str = "") -> Mapping[str, T]:
    """`value` if it is a Mapping."""
    return instance(name, value, Mapping, "a dictionary, as state_dict() gives it", hint)


def generator(name: str, value: Any) -> np.random.Generator:
    """`np.random.default_rng(value)`, with an error that names the argument."""
    try:
        return np.random.default_rng(value)
    except (TypeError, ValueError):
        expected = "a seed (an integer that is not negative, or several), a NumPy generator or None"
        error = ValueError if isinstance(value, numbers.Integral) else TypeError
        raise error(f"{name} must be {expected}, got {describe(value)}") from None


def float_dtype(name: str, value: Any) -> DType:
    """float32 or float64 as a NumPy dtype."""
    if value not in (np.float32, np.float64, np.dtype("f4"), np.dtype("f8"), "float32", "float64"):
        raise ValueError(f"{name} must be float32 or float64, got {value!r}")
    dtype: DType = np.dtype(value)
    return dtype


# --- numbers ----------------------------------------------------------------------------------------------------------


def integer(name: str, value: Any, minimum: int | None = None) -> int:
    """`value` as an int.  Raises TypeError if it is not an integer, ValueError below `minimum`."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    if minimum is not None and value < minimum:
        raise ValueError(f"{name} must be at least {minimum}, got {value}")
    return int(value)


def position(name: str, value: Any, size: int) -> int:
    """`value` as an index of a sequence of `size` elements; negative ones count from the end."""
    index = integer(name, value)
    if not -size <= index < size:
        raise IndexError(f"{name} must be in {-size} ... {size - 1}, got {value}")
    return index


def names(name: str, value: Any) -> tuple[str, ...]:
    """`value` as a tuple of different strings."""
    texts = tuple(instance(name, value, Iterable, "a list of strings"))
    if isinstance(value, str) or not all(isinstance(text, str) for text in texts):
        raise TypeError(f"{name} must be a list of strings, got {describe(value)}")
    if len(set(texts)) < len(texts) or not texts:
        raise ValueError(f"{name} must be different strings, at least one, got {describe(value)}")
    return texts


def number(
    name: str,
    value: Any,
    minimum: float | None = None,
    *,
    maximum: float | None = None,
    below: float | None = None,
) -> float:
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
    return float(value)


def pair(name: str, value: Any, minimum: int) -> tuple[int, int]:
    """An integer, or two (height, width), as a pair of ints."""
    if isinstance(value, (tuple, list)):
        if len(value) != 2:
            raise ValueError(f"{name} must be an integer or a pair (height, width), got {value!r}")
        return integer(name, value[0], minimum), integer(name, value[1], minimum)
    value = integer(name, value, minimum)
    return value, value


def choice(name: str, value: T, choices: Sequence[T]) -> T:
    """`value` if it is one of `choices`."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")
    return value


def divisible(name: str, value: int, divisor_name: str, divisor: int) -> int:
    """`value` if it is a multiple of `divisor`."""
    if value % divisor:
        raise ValueError(f"{name} must be divisible by {divisor_name}, got {value} and {divisor}")
    return value


def learning_rates(name: str, value: Any, shape: Shape | None = None) -> Array:
    """A learning rate or an array of them as a new array (steps,), float64, with `shape` if given."""
    try:
        values = np.atleast_1d(as_array(name, value))
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


# --- arrays -----------------------------------------------------------------------------------------------------------


def detach(value: Any) -> Any:
    """`value` without torch's autograd graph, and bfloat16 as float32: NumPy does not take tensors with either."""
    if not hasattr(value, "detach"):
        return value
    value = value.detach() if getattr(value, "requires_grad", False) else value
    return value.float() if str(getattr(value, "dtype", "")) == "torch.bfloat16" else value


def as_array(name: str, value: Any) -> Array:
    """`value`, anything with ``__array__`` or DLPack in host memory or nested lists, as a NumPy array."""
    try:
        if hasattr(value, "__dlpack__") and not hasattr(value, "__array__"):
            return np.from_dlpack(value)
        array = np.asarray(detach(value))
    except (TypeError, ValueError, RuntimeError, BufferError) as error:  # RuntimeError: torch
        kind = ValueError if isinstance(error, ValueError) else TypeError
        if isinstance(value, (list, tuple)) and kind is ValueError:
            raise ValueError(f"{name} must be an array, got lists of different lengths") from None
        raise kind(f"{name} must be an array that NumPy reads, got {describe(value)}: {one_line(error)}") from error
    is_bfloat16 = array.dtype.kind == "V" and array.dtype.name == "bfloat16"  # of ml_dtypes, as JAX has it
    return array.astype(np.float32) if is_bfloat16 else array


def array(name: str, value: Any, ndim: int | None = None, axes: str = "") -> Array:
    """`value` as a non-empty array of real numbers with `ndim` axes, which the message calls `axes`."""
    result = as_array(name, value)
    if result.dtype.kind not in REAL:
        raise TypeError(f"{name} must be an array of real numbers, got dtype {result.dtype}")
    if ndim is not None and result.ndim != ndim:
        raise ValueError(f"{name} must have {ndim} axes{axes and ' ' + axes}, got shape {result.shape}")
    if result.size == 0:
        raise ValueError(f"{name} must not be empty, got shape {result.shape}")
    return result


def shape(name: str, value: Any, expected: Shape, of: str = "") -> None:
    """ValueError unless `value` has the shape `expected`.   of: for the message, the array whose shape that is"""
    if tuple(value.shape) != tuple(expected):
        label = f"the shape of {of}," if of else "shape"
        raise ValueError(f"{name} must have {label} {tuple(expected)}, got {tuple(value.shape)}")


def finite(name: str, value: Array) -> Array:
    """`value` if all its entries are finite; the message names the first that is not."""
    if value.dtype.kind == "f" and not np.isfinite(value).all():
        index = tuple(int(i) for i in np.argwhere(~np.isfinite(value))[0])
        raise ValueError(f"{name} must be finite, got {value[index]} at index {index}")
    return value


def cast(name: str, value: Any, dtype: DType) -> Array:
    """`value` as an array of `dtype`, finite after the conversion."""
    source = array(name, value)
    if source.dtype == dtype:
        return finite(name, source)
    with np.errstate(all="ignore"):
        converted = source.astype(dtype)
    if dtype.kind == "i" and (converted != source).any():
        raise ValueError(f"{name} must hold whole numbers below 2**63, got {source.flat[0]}")
    return finite(name, converted)


def per_channel(name: str, value: Any, channels: int) -> Array:
    """A number, or one per channel, as (channels,) float64."""
    value = array(name, value).astype(np.float64)
    if value.shape not in ((), (1,), (channels,)):
        raise ValueError(f"{name} must be a number or {channels}, one a channel, got shape {value.shape}")
    return np.broadcast_to(finite(name, value), (channels,))


def labels(
    name: str, value: Any, count: int, classes: int | None = None, ignore_index: int | None = None
) -> np.ndarray[Any, np.dtype[np.int64]]:
    """`value` as (count,) int64 class numbers 0 ... classes-1 (or ignore_index); classes: None for any."""
    value = as_array(name, value)
    if value.dtype.kind not in "iu":
        raise TypeError(f"{name} must be integer class numbers, got dtype {value.dtype}")
    if value.shape != (count,):
        raise ValueError(f"{name} must have shape ({count},), one class number an image, got {value.shape}")
    bad = (value < 0) | (value >= (np.iinfo(np.int64).max if classes is None else classes))
    if ignore_index is not None:
        bad &= value != ignore_index
    if bad.any():
        index = int(np.flatnonzero(bad)[0])
        bounds = "not be negative" if classes is None else f"lie in 0 ... {classes - 1}"
        raise ValueError(f"{name} must {bounds}, got {value[index]} at index {index}")
    return np.asarray(value.astype(np.int64, copy=False))


# --- shapes of images, layers' inputs and outputs ---------------------------------------------------------------------


def image_shape(name: str, value: Any) -> Shape:
    """`value` as the shape of one image or vector, a tuple of positive integers."""
    if not isinstance(value, (tuple, list)):
        raise TypeError(f"{name} must be a tuple of integers such as (1, 28, 28), got {describe(value)}")
    if not value:
        raise ValueError(f"{name} must be a tuple of integers such as (1, 28, 28), got an empty one")
    return tuple(integer(name, n, 1) for n in value)


def map_input(layer: object, shape: Shape, channels: int | None = None) -> Shape:
    """`shape` if it is (channels, height, width).  channels: None for any number"""
    if len(shape) != 3 or channels not in (None, shape[0]):
        raise ValueError(f"{layer!r} takes ({channels or 'channels'}, height, width), got {tuple(shape)}")
    return tuple(shape)


def vector_input(layer: object, shape: Shape, features: int) -> Shape:
    """`shape` if it is (features,)."""
    if tuple(shape) != (features,):
        hint = "; put Flatten() before it" if len(shape) > 1 and np.prod(shape) == features else ""
        raise ValueError(f"{layer!r} takes ({features},), got {tuple(shape)}{hint}")
    return (features,)


def conv_padding(
    padding: Padding, kernel: tuple[int, int], stride: tuple[int, int], dilation: tuple[int, int]
) -> tuple[int, int]:
    """`padding` as a pair; "valid" is 0, "same" keeps the size of the image.

    For "same" the pair is the padding before the image.  If dilation * (kernel - 1) is odd, one more pixel is needed
    after it, as in torch.
    """
    if isinstance(padding, str):
        choice("padding", padding, ("same", "valid"))
        if padding == "valid":
            return 0, 0
        if stride != (1, 1):
            raise ValueError(f"padding='same' needs a stride of 1, got {stride}")
        return dilation[0] * (kernel[0] - 1) // 2, dilation[1] * (kernel[1] - 1) // 2
    return pair("padding", padding, 0)


def conv_output_size(
    size: Sequence[int],
    kernel: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    same: bool = False,
) -> tuple[int, int]:
    """Output (height, width) of a convolution of an input of (height, width) `size`; `same` for padding="same"."""
    return (size[0], size[1]) if same else _output_size(size, kernel, stride, padding, dilation, (0, 0))


def output_padding(value: Pair, stride: tuple[int, int]) -> tuple[int, int]:
    """The `output_padding` of a transposed convolution."""
    sides = pair("output_padding", value, 0)
    if any(side >= step for side, step in zip(sides, stride, strict=True)):
        raise ValueError(f"output_padding must be smaller than stride {stride}, got {value!r}")
    return sides


def transposed_output_size(
    size: Sequence[int],
    kernel: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    extra: tuple[int, int],
    dilation: tuple[int, int],
) -> tuple[int, ...]:
    """Output size of a transposed convolution.  extra: its output_padding"""
    axes = zip(size, kernel, stride, padding, extra, dilation, strict=True)
    out = tuple((n - 1) * s - 2 * p + d * (k - 1) + e + 1 for n, k, s, p, e, d in axes)
    if min(out) < 1:
        raise ValueError(f"the output of an input of size {tuple(size)} would have size {out}")
    return out


def pool_padding(padding: Pair, kernel: tuple[int, int]) -> tuple[int, int]:
    """`padding` as a pair of at most half of the window `kernel`."""
    padding = pair("padding", padding, 0)
    for pixels, length in zip(padding, kernel, strict=True):
        if pixels > length // 2:
            raise ValueError(f"padding must be at most half of kernel_size {length}, got {pixels}")
    return padding


def pool_output_size(
    size: Sequence[int],
    kernel: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    ceil_mode: bool,
) -> tuple[int, int]:
    """Output (height, width) of a pooling, by torch's rule."""
    overhang = (stride[0] - 1, stride[1] - 1) if ceil_mode else (0, 0)
    return _output_size(size, kernel, stride, padding, dilation, overhang)


def _output_size(
    size: Sequence[int],
    kernel: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    overhang: tuple[int, int],
) -> tuple[int, int]:
    """Number of windows along each axis; the last may extend `overhang` pixels beyond the padded image."""
    counts = []
    for axis, name in enumerate(("height", "width")):
        reach = dilation[axis] * (kernel[axis] - 1) + 1
        padded = size[axis] + 2 * padding[axis]
        count = (padded + overhang[axis] - reach) // stride[axis] + 1
        # A last window that would start in the padding on the right is dropped.
        if overhang[axis] and (count - 1) * stride[axis] >= size[axis] + padding[axis]:
            count -= 1
        if count < 1:
            raise ValueError(
                f"kernel_size {kernel[axis]} with dilation {dilation[axis]} reaches over {reach} pixels, "
                f"but the padded {name} of the input is {padded}"
            )
        counts.append(count)
    return counts[0], counts[1]
