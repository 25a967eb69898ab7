"""A person's own images as a `Dataset`: a folder of pictures, a CSV of pixels or NumPy's .npz."""

import hashlib
import math
import os
import re
import sys
import unicodedata
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from tinycnn import _check
from tinycnn._streams import SafeStream
from tinycnn._typing import Array, Shape
from tinycnn.data import _tables
from tinycnn.data.datasets import Dataset
from tinycnn.errors import DamagedFileError

if TYPE_CHECKING:
    from tinycnn.data._pictures import Picture

_SUFFIXES = (".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".bmp", ".gif", ".webp", ".tif", ".tiff")
_TRAIN = ("train", "training")
_TEST = ("test", "testing", "val", "valid", "validation")  # the first that is there is the test set
_FITS = {"pad": "padded and resized", "crop": "cropped and resized", "stretch": "stretched"}
_MANY = 200  # files; from here on there is a progress bar
_LISTED = 10  # files or classes in a message


@dataclass
class _Part:
    """Images of known labels that are still to be read.

    labels  (n,) int64, indices into the classes
    names   of the images, different ones: they decide the split
    read    read(i) gives image i
    """

    labels: Array
    names: list[str]
    read: Callable[[int], "Picture"]


def from_files(
    path: str | os.PathLike[str],
    *,
    shape: tuple[int, int, int] = (1, 28, 28),
    fit: str = "pad",
    skip_bad: bool = False,
    test_fraction: float = 1 / 6,
    on_message: Callable[[str], object] = print,
) -> Dataset:
    """Your own images as a `Dataset`, all of one size.

    path           one of
                   - a folder with one folder of pictures (PNG, JPEG, BMP, GIF, WebP, TIFF) a class. The names of the
                     folders are the names of the classes, sorted so that 2 comes before 10. Or train/ and test/ (or
                     val/, valid/, validation/) with such folders. Hidden files and other files are ignored.
                   - a .csv file as Kaggle has MNIST: a label and C x H x W pixels, or the pixels of a grey square
                   - a .npz file with arrays x and y, or x_train, y_train, x_test and y_test, or (MedMNIST)
                     train_images, train_labels, test_images and test_labels
                   In the files labels are any integers; they become the names of the classes.
    shape          (C, H, W) of an image, C 1 for grey or 3 for RGB
    fit            how an image of other proportions gets this shape: "pad" adds a border in the median colour of its
                   own border, "crop" cuts away what protrudes from the middle, "stretch" distorts it
    skip_bad       leave out files that cannot be read instead of raising
    test_fraction  the part of each class for the test set, if there is no test set: at least one image of each class,
                   chosen by the hash of its name, so that the split is always the same
    on_message     called with a line on what was done, and lines on what was ignored

    Pictures are turned upright as EXIF says. Transparent ones are laid on white. 16-bit pixels are divided by 257;
    floating-point pixels are 0 to 1, or 0 to 255 if one is above 1. Pictures have at most 100 megapixels.
    The images of the Dataset are (N, H, W) for C = 1, else (N, C, H, W). Sizes in messages are width x height.

    Raises TypeError or ValueError for arguments, FileNotFoundError for a missing path, DamagedFileError for files that
    cannot be read, ValueError for a folder without classes, a class without images, fewer than two classes, or a class
    of one image where a test set is needed; OSError.
    """
    target = _image_shape(shape)
    _check.choice("fit", fit, tuple(_FITS))
    test_fraction = _check.number("test_fraction", test_fraction, 0, below=1)
    if not test_fraction:
        raise ValueError("test_fraction must be above 0, got 0")
    _check.optional_callable("on_message", on_message)
    path = Path(path).expanduser()
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file or folder")
    if path.is_dir():
        classes, train, test = _read_folder(path, target, fit, on_message)
    elif path.suffix.lower() in (".csv", ".npz"):
        classes, train, test = _read_table(path, target, fit)
    else:
        raise ValueError(f"{path}: expected a folder of images, a .csv or a .npz file, got another file")
    if len(classes) < 2:
        raise ValueError(f"{path}: expected at least 2 classes, got {len(classes)} ({', '.join(classes)})")
    parts = [train, test] if test else [train]
    _check_counts(path, classes, train, splits=not test)
    total = sum(len(part.names) for part in parts) * math.prod(target)
    if total > _tables.max_bytes():
        raise ValueError(f"{path}: expected images of at most {_tables.max_bytes():,} bytes in all, got {total:,}")

    images, sizes, grey = _read_images(path, parts, target, skip_bad, on_message)
    _check_counts(path, classes, train, splits=not test)
    if test and not test.names:
        raise ValueError(f"{path}: expected images for testing that can be read, got none")
    if target[0] == 1:
        images = [array[:, 0] for array in images]
    counts = np.bincount(np.concatenate([part.labels for part in parts]), minlength=len(classes))
    if test:
        arrays = images[0], train.labels, images[1], test.labels
    else:
        for_test = _split(train, test_fraction)
        arrays = images[0][~for_test], train.labels[~for_test], images[0][for_test], train.labels[for_test]
    listed = ", ".join(f"{name} {n}" for name, n in list(zip(classes, counts, strict=True))[:_LISTED])
    more = ", ..." if len(classes) > _LISTED else ""
    on_message(
        f"{counts.sum():,} images, {len(classes)} classes ({listed}{more}), {_summary(sizes, grey, target, fit)}; "
        f"{len(arrays[0]):,} for training, {len(arrays[2]):,} for testing"
    )
    return Dataset(_printable(path.stem if path.is_file() else path.resolve().name), *arrays, classes=classes)


def _image_shape(value: Shape) -> Shape:
    shape = _check.image_shape("shape", value)
    if len(shape) != 3 or shape[0] not in (1, 3):
        raise ValueError(f"shape must be (1, height, width) for grey or (3, height, width) for RGB, got {shape}")
    return shape


def _check_counts(path: Path, classes: tuple[str, ...], train: _Part, splits: bool) -> None:
    """ValueError for a class with fewer images than needed: one, or two where `splits`."""
    counts = np.bincount(train.labels, minlength=len(classes))
    needed = 2 if splits else 1
    few = int(counts.argmin())
    if counts[few] < needed:
        reason = "one for training and one for testing" if splits else "one for training"
        raise ValueError(
            f"{path}: class {classes[few]} must have at least {needed} images, {reason}, got {counts[few]}"
        )


# ---- what there is to read


def _read_folder(
    path: Path, shape: Shape, fit: str, on_message: Callable[[str], object]
) -> tuple[tuple[str, ...], _Part, _Part | None]:
    roots = _folders(path)
    by_name = {folder.name.lower(): folder for folder in roots}
    notes: dict[str, int] = {}
    train = next((by_name[name] for name in _TRAIN if name in by_name), None)
    test = None
    if train is not None and set(by_name) <= {*_TRAIN, *_TEST}:
        sets = [by_name[name] for name in _TEST if name in by_name]
        test = sets[0] if sets else None
        for folder in sets[1:]:
            on_message(f"{_printable(str(folder))} is not used: {test} is the test set")
    else:
        train = path
    folders = _folders(train)
    if not folders:
        raise ValueError(f"{path}: expected a folder of images for each class, got {_contents(train)} in {train}")
    labels = {folder.name: label for label, folder in enumerate(folders)}
    parts = [_list_part(train, labels, shape, fit, notes)]
    if test is not None:
        unknown = [folder for folder in _folders(test) if folder.name not in labels]
        if unknown:
            raise ValueError(f"{unknown[0]}: expected one of the classes in {train}, got another")
        parts.append(_list_part(test, labels, shape, fit, notes))
        if not parts[1].names:
            raise ValueError(f"{test}: expected images for testing, got none")
    if notes:
        listed = ", ".join(f"{count} {what}" for what, count in notes.items())
        on_message(f"{_printable(str(path))}: ignored {listed}")
    return tuple(map(_printable, labels)), parts[0], parts[1] if len(parts) > 1 else None


def _list_part(root: Path, labels: dict[str, int], shape: Shape, fit: str, notes: dict[str, int]) -> _Part:
    """The pictures in the folders of the classes; counts in `notes` what is ignored."""
    paths: list[Path] = []
    numbers: list[int] = []

    def ignore(what: str) -> None:
        notes[what] = notes.get(what, 0) + 1

    for entry in root.iterdir():
        if not _is_folder(entry):
            ignore("pictures outside the folders of the classes" if is_picture(entry) else "other files")
    for folder in _folders(root):
        count = len(paths)
        for entry in sorted(folder.iterdir(), key=_natural):
            if is_picture(entry):
                paths.append(entry)
                numbers.append(labels[folder.name])
            else:
                ignore("folders inside the folders of the classes" if entry.is_dir() else "other files")
        if len(paths) == count:
            raise ValueError(f"{folder}: a class must have images ({', '.join(_SUFFIXES)}), got {_contents(folder)}")

    def read(i: int) -> "Picture":
        from tinycnn.data import _pictures

        return _pictures.decode(paths[i], shape, fit)

    return _Part(np.array(numbers, np.int64), [path.relative_to(root).as_posix() for path in paths], read)


def _folders(path: Path) -> list[Path]:
    return sorted(filter(_is_folder, path.iterdir()), key=_natural)


def _is_folder(path: Path) -> bool:
    return path.is_dir() and not path.name.startswith((".", "__MACOSX"))


def is_picture(path: Path) -> bool:
    return path.suffix.lower() in _SUFFIXES and not path.name.startswith(".")  # macOS writes ._cat.jpg beside cat.jpg


def _contents(folder: Path) -> str:
    count = sum(1 for _ in folder.iterdir())
    return f"{count} other entries" if count else "an empty folder"


def _natural(path: Path) -> tuple[list[str | int], str]:
    """A key that sorts 2 before 10."""
    pieces = re.split("([0-9]+)", path.name.casefold())
    return [int(piece) if i % 2 else piece for i, piece in enumerate(pieces)], path.name


def _printable(text: str) -> str:
    """A file's name without control characters and undecodable bytes."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)


def _read_table(path: Path, shape: Shape, fit: str) -> tuple[tuple[str, ...], _Part, _Part | None]:
    if path.suffix.lower() == ".csv":
        tables = [_tables.read_csv(path, shape)]
    else:
        tables = [table for table in _tables.read_npz(path, shape) if table is not None]
    values = np.unique(tables[0].labels)
    for table in tables[1:]:
        unknown = table.labels[~np.isin(table.labels, values)]
        if len(unknown):
            raise ValueError(f"{path}: expected test labels that occur in training, got {unknown[0]}")

    def part(table: _tables.Table) -> _Part:
        def read(i: int) -> "Picture":
            from tinycnn.data import _pictures

            return _pictures.from_array(_pictures.to_uint8(table.images[i], table.white), shape, fit)

        return _Part(np.searchsorted(values, table.labels), [str(i) for i in range(len(table.labels))], read)

    parts = [part(table) for table in tables]
    return tuple(str(value) for value in values.tolist()), parts[0], parts[1] if len(parts) > 1 else None


# ---- reading


def _read_images(
    path: Path, parts: list[_Part], shape: Shape, skip_bad: bool, on_message: Callable[[str], object]
) -> tuple[list[Array], set[tuple[int, int]], set[bool]]:
    """The images (N, C, H, W) of each part, the sizes they had, and whether they were grey.  Removes bad ones from the
    parts."""
    from tqdm import tqdm

    from tinycnn.data import _pictures

    _pictures.formats()  # initialises Pillow, in one thread
    arrays: list[Array] = []
    bad: list[str] = []
    sizes: set[tuple[int, int]] = set()
    grey: set[bool] = set()
    total = sum(len(part.names) for part in parts)
    progress = tqdm(
        total=total, desc=path.name, unit="image", disable=None if total >= _MANY else True, file=SafeStream(sys.stderr)
    )
    # Pillow warns of large pictures and of damaged metadata.  Filters are for all threads: they are set once, here.
    with progress, warnings.catch_warnings(), ThreadPool(min(4, os.cpu_count() or 1)) as pool:
        warnings.simplefilter("ignore")
        for part in parts:
            images = np.empty((len(part.names), *shape), np.uint8)
            good = np.ones(len(images), bool)

            def read(i: int, part: _Part = part, images: Array = images) -> tuple[tuple[int, int], bool] | str:
                try:
                    picture = part.read(i)
                except Exception as error:  # Pillow raises exceptions of many types for damaged files
                    return f"{part.names[i]}: {_reason(error, part.names[i])}"
                images[i] = picture.pixels
                return picture.size, picture.grey

            for i, result in enumerate(pool.imap(read, range(len(images)), chunksize=8)):
                progress.update()
                if isinstance(result, str):
                    bad.append(_printable(result))
                    good[i] = False
                else:
                    sizes.add(result[0])
                    grey.add(result[1])
            arrays.append(images if good.all() else images[good])
            part.labels = part.labels[good]
            part.names = [name for name, is_good in zip(part.names, good, strict=True) if is_good]
    if bad:
        lines = [f"  {line}" for line in bad[:_LISTED]] + [f"  and {len(bad) - _LISTED:,} more"] * (len(bad) > _LISTED)
        if not skip_bad:
            head = f"{path}: {len(bad):,} of {total:,} images cannot be read (skip_bad=True or --skip-bad skips them):"
            raise DamagedFileError("\n".join([head, *lines]))
        on_message("\n".join([f"{_printable(str(path))}: skipped {len(bad):,} images that cannot be read:", *lines]))
    return arrays, sizes, grey


def _reason(error: Exception, name: str) -> str:
    text = str(getattr(error, "strerror", None) or error).rpartition(f"{name}: ")[2]
    text = " ".join(text.split()) or type(error).__name__
    return text if len(text) <= 200 else text[:200] + "…"


def _summary(sizes: set[tuple[int, int]], grey: set[bool], shape: Shape, fit: str) -> str:
    target = shape[2], shape[1]
    ordered = sorted(sizes, key=lambda size: (size[0] * size[1], size))
    small, large = ("{} x {}".format(*size) for size in (ordered[0], ordered[-1]))
    changes = []
    if shape[0] == 1 and False in grey:
        changes.append("converted to grey")
    if shape[0] == 3 and True in grey:
        changes.append("converted to RGB")
    if sizes != {target}:
        same_aspect = all(w * target[1] == h * target[0] for w, h in sizes)
        changes.append(f"{'resized' if same_aspect else _FITS[fit]} to {target[0]} x {target[1]}")
    listed = ", ".join(changes)
    return (f"all {small}" if len(sizes) == 1 else f"sizes from {small} to {large}") + (listed and f": {listed}")


# ---- splitting


def _split(part: _Part, test_fraction: float) -> Array:
    """(n,) bool, True for testing: of each class the images whose names have the smallest hashes."""
    keys = [unicodedata.normalize("NFC", name).encode("utf-8", "surrogatepass") for name in part.names]
    ranks = np.frombuffer(b"".join(hashlib.sha256(key).digest()[:8] for key in keys), ">u8")
    for_test = np.zeros(len(ranks), bool)
    for label in np.unique(part.labels):
        index = np.flatnonzero(part.labels == label)
        count = min(len(index) - 1, max(1, round(test_fraction * len(index))))
        for_test[index[np.argsort(ranks[index], kind="stable")[:count]]] = True
    return for_test
