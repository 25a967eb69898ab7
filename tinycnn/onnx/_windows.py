"""Windows of convolutions and pooling: from ONNX's attributes to the arguments of layers.

pads are (top, left, bottom, right), as in ONNX; crops and borders (left, right, top, bottom), as in `ZeroPad2d`.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

from tinycnn._typing import Padding
from tinycnn.onnx._graph import Node

LONGEST = 1 << 16  # of a kernel
Pixels = tuple[int, int]
Sides = tuple[int, int, int, int]


class Window(NamedTuple):
    """kernel, stride and dilation are (height, width); size: that of the output"""

    kernel: Pixels
    stride: Pixels
    dilation: Pixels
    pads: Sides
    size: Pixels

    @property
    def border(self) -> Sides:
        """The pads as (left, right, top, bottom)."""
        top, left, bottom, right = self.pads
        return left, right, top, bottom

    @property
    def symmetric(self) -> bool:
        top, left, bottom, right = self.pads
        return top == bottom and left == right and min(self.pads) >= 0


def pair(node: Node, name: str, default: Sequence[int]) -> Pixels:
    """An attribute of two integers."""
    values = node.integers(name, default) or []
    if len(values) != 2:
        raise ValueError(f"{name} must be two numbers, of height and width, got {values}; there are only 2-D layers")
    return values[0], values[1]


def kernel_shape(node: Node) -> Pixels:
    """The kernel of a pooling."""
    if not node.has("kernel_shape"):
        raise ValueError("it has no kernel_shape")
    return pair(node, "kernel_shape", ())


def window(node: Node, size: Sequence[int], kernel: Pixels) -> Window:
    """The window of a Conv or of a pooling over an image of (height, width) `size`."""
    stride, dilation = pair(node, "strides", (1, 1)), pair(node, "dilations", (1, 1))
    if min(*kernel, *stride, *dilation) < 1:
        raise ValueError(f"windows must be positive, got kernel {kernel}, strides {stride}, dilations {dilation}")
    if max(kernel) > LONGEST:
        raise ValueError(f"a kernel must be at most {LONGEST} long, got {kernel}")
    reach = [d * (k - 1) + 1 for d, k in zip(dilation, kernel, strict=True)]
    auto = node.text("auto_pad", "NOTSET")
    ceil = bool(node.integer("ceil_mode", 0))
    if auto in ("SAME_UPPER", "SAME_LOWER"):
        outputs = [-(-n // s) for n, s in zip(size, stride, strict=True)]
        totals = [max(0, (o - 1) * s + r - n) for o, s, r, n in zip(outputs, stride, reach, size, strict=True)]
        less, more = [t // 2 for t in totals], [t - t // 2 for t in totals]
        starts, ends = (less, more) if auto == "SAME_UPPER" else (more, less)
        pads = (starts[0], starts[1], ends[0], ends[1])
        return Window(kernel, stride, dilation, pads, (outputs[0], outputs[1]))
    if auto not in ("NOTSET", "VALID"):
        raise ValueError(f"auto_pad must be NOTSET, VALID, SAME_UPPER or SAME_LOWER, got {auto!r}")
    given = (node.integers("pads", (0,) * 4) or []) if auto == "NOTSET" else [0] * 4
    if len(given) != 4:
        raise ValueError(f"pads must be four numbers, got {given}; there are only 2-D layers")
    pads = (given[0], given[1], given[2], given[3])
    counts = []
    for axis in (0, 1):
        start, step = pads[axis], stride[axis]
        span = size[axis] + start + pads[axis + 2] - reach[axis]
        count = (-(-span // step) if ceil else span // step) + 1
        if ceil and (count - 1) * step >= size[axis] + start:  # it would start in the padding
            count -= 1
        if count < 1:
            raise ValueError(f"a kernel of {kernel} does not fit in an image of {tuple(size)} with pads {pads}")
        counts.append(count)
    return Window(kernel, stride, dilation, pads, (counts[0], counts[1]))


def conv_padding(w: Window) -> tuple[Sides | None, Padding]:
    """(border to add before the convolution, or None; its padding)."""
    if w.symmetric:
        return None, (w.pads[0], w.pads[1])
    totals = [d * (k - 1) for d, k in zip(w.dilation, w.kernel, strict=True)]
    same = *(t // 2 for t in totals), *(t - t // 2 for t in totals)
    if w.stride == (1, 1) and w.pads == same:
        return None, "same"
    return w.border, 0


class Pooling(NamedTuple):
    """Arguments of a pooling whose padding counts for nothing, and the border that then crops windows, or None."""

    padding: Pixels
    ceil_mode: bool
    crop: Sides | None


def pooling(w: Window, size: Sequence[int]) -> Pooling | None:
    """How a pooling layer, whose padding is the same at both ends and at most half a window, has the windows `w`; None
    if it cannot.  Windows that it has too many are cropped."""
    for ceil in (False, True):
        found = [_axis(w, size[axis], axis, ceil) for axis in (0, 1)]
        if None not in found:
            (top, skip_top, skip_bottom), (left, skip_left, skip_right) = (f for f in found if f is not None)
            crop = (-skip_left, -skip_right, -skip_top, -skip_bottom)
            return Pooling((top, left), ceil, crop if any(crop) else None)
    return None


def _axis(w: Window, size: int, axis: int, ceil: bool) -> tuple[int, int, int] | None:
    """(padding, windows to drop at the start, at the end) along an axis."""
    start, step, wanted = w.pads[axis], w.stride[axis], w.size[axis]
    reach = w.dilation[axis] * (w.kernel[axis] - 1) + 1
    if start < 0 or w.pads[axis + 2] < 0:
        return None
    for padding in range(start, w.kernel[axis] // 2 + 1, step):
        span = size + 2 * padding - reach
        count = (-(-span // step) if ceil else span // step) + 1
        if ceil and (count - 1) * step >= size + padding:
            count -= 1
        skip = (padding - start) // step
        if count - skip >= wanted:
            return padding, skip, count - skip - wanted
    return None


def transposed(node: Node, size: Sequence[int], kernel: Pixels) -> tuple[Window, Pixels]:
    """(the window of a ConvTranspose, output_padding)."""
    stride, dilation = pair(node, "strides", (1, 1)), pair(node, "dilations", (1, 1))
    extra = pair(node, "output_padding", (0, 0))
    if min(*kernel, *stride, *dilation) < 1 or min(extra) < 0:
        raise ValueError(f"windows must be positive, got kernel {kernel}, strides {stride}, dilations {dilation}")
    full = [
        (n - 1) * s + d * (k - 1) + 1 + e for n, s, d, k, e in zip(size, stride, dilation, kernel, extra, strict=True)
    ]
    auto, wanted = node.text("auto_pad", "NOTSET"), node.integers("output_shape")
    if wanted is not None:
        wanted = wanted[-2:]
        auto = "SAME_LOWER" if auto == "NOTSET" else auto
    if auto in ("SAME_UPPER", "SAME_LOWER"):
        wanted = wanted or [n * s for n, s in zip(size, stride, strict=True)]
        totals = [f - n for f, n in zip(full, wanted, strict=True)]
        less, more = [t // 2 for t in totals], [t - t // 2 for t in totals]
        starts, ends = (less, more) if auto == "SAME_UPPER" else (more, less)
        given = [*starts, *ends]
    else:
        given = (node.integers("pads", (0,) * 4) or []) if auto == "NOTSET" else [0] * 4
    if len(given) != 4:
        raise ValueError(f"pads must be four numbers, got {given}; there are only 2-D layers")
    out = [full[axis] - given[axis] - given[axis + 2] for axis in (0, 1)]
    if min(out) < 1:
        raise ValueError(f"nothing is left of an image of {tuple(size)} with pads {given}")
    pads = (given[0], given[1], given[2], given[3])
    return Window(kernel, stride, dilation, pads, (out[0], out[1])), extra


def transposed_padding(w: Window, extra: Pixels) -> tuple[Pixels, Pixels, Sides | None]:
    """(padding, output_padding, border that follows or None) of a ConvTranspose2d with these windows."""
    start = w.pads[0], w.pads[1]
    rest = (extra[0] + start[0] - w.pads[2], extra[1] + start[1] - w.pads[3])
    if min(start) >= 0 and min(rest) >= 0 and all(r < s for r, s in zip(rest, w.stride, strict=True)):
        return start, rest, None
    ends = [w.pads[2] - extra[0], w.pads[3] - extra[1]]  # without output_padding
    if min(*start, *ends) < 0:
        raise ValueError(f"pads {w.pads} with output_padding {extra} are none that the layer can have")
    return (0, 0), (0, 0), (-start[1], -ends[1], -start[0], -ends[0])


def nearest(node: Node, size: int, output: int, scale: float, opset: int) -> list[int]:
    """The index of the input pixel for each output pixel of a Resize (nearest) along an axis."""
    mode = node.text("coordinate_transformation_mode", "half_pixel") if opset >= 11 else "asymmetric"
    rounding = node.text("nearest_mode", "round_prefer_floor") if opset >= 11 else "floor"
    coordinates = {
        "asymmetric": lambda i: i / scale,
        "half_pixel": lambda i: (i + 0.5) / scale - 0.5,
        "half_pixel_symmetric": lambda i: (i + 0.5) / scale - 0.5 + (size / 2) * (1 - output / (scale * size)),
        "pytorch_half_pixel": lambda i: (i + 0.5) / scale - 0.5 if output > 1 else 0.0,
        "align_corners": lambda i: i * (size - 1) / (output - 1) if output > 1 else 0.0,
    }.get(mode)
    rounded = {
        "floor": math.floor,
        "ceil": math.ceil,
        "round_prefer_floor": lambda x: math.ceil(x - 0.5),
        "round_prefer_ceil": lambda x: math.floor(x + 0.5),
    }.get(rounding)
    if coordinates is None or rounded is None:
        raise ValueError(f"coordinate_transformation_mode {mode} with nearest_mode {rounding} is not known")
    return [min(max(int(rounded(coordinates(i))), 0), size - 1) for i in range(output)]
