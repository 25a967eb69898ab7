"""Decode pictures with Pillow and fit them to one size."""

import io
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from PIL import Image, UnidentifiedImageError

from tinycnn._files import open_regular
from tinycnn._typing import Array, Shape

MAX_PIXELS = 100_000_000
MAX_BYTES = 2**30  # of a file: 100 megapixels of four 16-bit channels, uncompressed
_LARGE = 16_000_000  # pixels; larger pictures are decoded one at a time
_one_large_picture = threading.Lock()

_ORIENTATION = 0x0112  # the EXIF tag
_TO_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class Picture(NamedTuple):
    """pixels: (C, H, W) uint8, after fitting    size: (width, height) before it    grey: whether it was grey before"""

    pixels: Array
    size: tuple[int, int]
    grey: bool


@cache
def formats() -> tuple[str, ...]:
    """The formats that are read, of those that this Pillow has."""
    Image.init()
    return tuple(name for name in ("PNG", "JPEG", "MPO", "BMP", "GIF", "WEBP", "TIFF") if name in Image.OPEN)


def decode(path: Path, shape: Shape, fit: str) -> Picture:
    """Read a picture (of several frames the first) and fit it to `shape`.  Raises Pillow's many exceptions, and
    ValueError, for damaged files; OSError."""
    with open_regular(path, MAX_BYTES) as file, _upright(file, shape[0], max(shape[1:])) as (image, size, grey):
        return Picture(fit_to(image, shape, fit), size, grey)


def read(file: BinaryIO, shape: Shape, fit: str) -> Array:
    """The picture in an open file, fitted to `shape` (C, H, W), without the axis C if that is 1.  Raises as `decode`
    does."""
    with _upright(file, shape[0], max(shape[1:])) as (image, _, _):
        pixels = fit_to(image, shape, fit)
        return pixels[0] if shape[0] == 1 else pixels


def read_grey(file: BinaryIO) -> Array:
    """The picture in an open file, (H, W) uint8, or (H, W, 2) with its transparency; a large JPEG reduced.  Raises as
    `decode` does."""
    with _upright(file, 2, 1500) as (image, _, _):
        return np.array(image)


@contextmanager
def _upright(file: BinaryIO, channels: int, longest: int) -> Iterator[tuple[Image.Image, tuple[int, int], bool]]:
    """(image in mode L or RGB, its size before it was reduced, whether it was grey).

    channels 1 for grey, 3 for RGB, both on white; 2 for grey, in mode LA if a part is transparent
    longest  the longer side that the caller needs: JPEG files may be decoded at twice that
    """
    # In memory: a file object would allocate the length that a damaged chunk claims, up to 4 GiB.
    content = io.BytesIO(file.read())
    if not content.getbuffer().nbytes:
        raise ValueError("an empty file")
    try:
        image: Image.Image = Image.open(content, formats=formats())
    except UnidentifiedImageError:
        raise ValueError("not a picture") from None
    except Image.DecompressionBombError:
        raise ValueError(f"expected at most {MAX_PIXELS:,} pixels, got more") from None
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise ValueError(f"expected at most {MAX_PIXELS:,} pixels, got {width} x {height}")
    grey = image.mode in ("1", "L", "LA", "F") or image.mode.startswith("I")
    if image.format in ("JPEG", "MPO"):
        # A JPEG decoder can reduce by 2, 4 or 8: leave twice the size of the result, in any orientation.
        scale = 2 * longest / min(width, height)
        image.draft("RGB" if channels == 3 else "L", (int(width * scale) + 1, int(height * scale) + 1))
    with _one_large_picture if image.width * image.height > _LARGE else nullcontext():
        image.load()
        orientation = _orientation(image)
        image = _convert(image, channels)
        if orientation in _TO_UPRIGHT:
            image = image.transpose(_TO_UPRIGHT[orientation])
        yield image, (width, height) if orientation < 5 else (height, width), grey


def _orientation(image: Image.Image) -> int:
    """EXIF's orientation, 1 to 8; 1 if there is none or the EXIF data is damaged."""
    try:
        value = image.getexif().get(_ORIENTATION, 1)
    except Exception:  # of many types; the pixels can be good
        return 1
    return value if value in _TO_UPRIGHT else 1


def _convert(image: Image.Image, channels: int) -> Image.Image:
    """`image` on white, in mode L or RGB; for 2 channels in mode L, or LA if a part is transparent."""
    if image.mode == "F" or image.mode.startswith("I"):
        values = np.asarray(image)
        white = 65535 if image.mode != "F" else 1 if values.max() <= 1 else 255
        image = Image.fromarray(to_uint8(values, white))
    elif image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        if channels == 2:
            return image.convert("RGBA").convert("LA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    return image.convert("RGB" if channels == 3 else "L")


def to_uint8(values: Array, white: int) -> Array:
    """Pixels 0 to `white` as uint8 0 to 255, rounded.  Raises ValueError for others."""
    low, high = values.min(), values.max()
    if not 0 <= low <= high <= white:
        raise ValueError(f"pixels must be 0 to {white}, got {low} to {high}")
    if values.dtype == np.uint8 and white == 255:
        return values
    scaled: Array = np.rint(values * np.float64(255 / white)).astype(np.uint8)
    return scaled


def from_array(values: Array, shape: Shape, fit: str) -> Picture:
    """Pixels (h, w, 1 or 3) uint8 fitted to `shape`."""
    height, width, channels = values.shape
    if (channels, height, width) == shape:
        pixels = values.transpose(2, 0, 1)
    else:
        image = Image.fromarray(np.ascontiguousarray(values[..., 0] if channels == 1 else values))
        pixels = fit_to(_convert(image, shape[0]), shape, fit)
    return Picture(pixels, (width, height), channels == 1)


def fit_to(image: Image.Image, shape: Shape, fit: str) -> Array:
    """An image in mode L or RGB, resized without aliasing, as (C, H, W) uint8.  fit: see `images.from_files`"""
    _, height, width = shape
    if image.size != (width, height):
        if fit == "pad":
            scale = min(width / image.width, height / image.height)
            inner = max(1, round(image.width * scale)), max(1, round(image.height * scale))
            image = _pad(_resize(image, inner), (width, height))
        elif fit == "crop":
            scale = min(image.width / width, image.height / height)
            # min: rounding must not take the box beyond the image
            w, h = min(width * scale, image.width), min(height * scale, image.height)
            left, top = (image.width - w) / 2, (image.height - h) / 2
            image = _resize(image, (width, height), (left, top, image.width - left, image.height - top))
        else:
            image = _resize(image, (width, height))
    pixels = np.asarray(image)
    return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)


def _resize(image: Image.Image, size: tuple[int, int], box: tuple[float, float, float, float] | None = None) -> Any:
    return image.resize(size, Image.Resampling.LANCZOS, box, reducing_gap=3.0)


def _pad(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """`image` in the middle of `size`, the rest in the median colour of its border."""
    pixels = np.asarray(image)
    pixels = pixels.reshape(*pixels.shape[:2], -1)
    border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    colour = tuple(int(value) for value in np.median(border, axis=0))
    padded = Image.new(image.mode, size, colour if len(colour) > 1 else colour[0])
    padded.paste(image, ((size[0] - image.width) // 2, (size[1] - image.height) // 2))
    return padded
