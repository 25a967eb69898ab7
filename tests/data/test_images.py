"""Your own images: pictures of every mode, damaged files, tables, splits.  Pillow writes the pictures."""

import os
import re
import struct
import subprocess
import sys
import tempfile
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from PIL import Image

from tinycnn.data import DamagedFileError, _pictures, _tables, from_files, images

GREY = (1, 28, 28)


def grey(value, size=(28, 28)):
    return Image.new("L", size, value)


def make_classes(root, counts=None, size=(28, 28)):
    """Grey pictures; the value of each is different in its class."""
    for name, count in (counts or {"cat": 3, "dog": 3}).items():
        (root / name).mkdir(parents=True)
        for i in range(count):
            grey(10 + i, size).save(root / name / f"{i}.png")
    return root


def read(path, **options):
    options.setdefault("on_message", lambda _: None)
    return from_files(path, **options)


def decode(path, shape=GREY, fit="pad"):
    return _pictures.decode(Path(path), shape, fit).pixels


# ---- one picture


@pytest.mark.parametrize(
    ("mode", "colour", "expected"),
    [
        ("1", 1, 255),
        ("L", 77, 77),
        ("LA", (100, 0), 255),  # transparent: white
        ("LA", (100, 255), 100),
        ("LA", (55, 51), 215),  # (55 * 51 + 255 * 204) / 255
        ("P", 3, 3),
        ("RGB", (200, 100, 50), 124),  # 0.299 R + 0.587 G + 0.114 B = 124.2
        ("RGBA", (200, 100, 50, 255), 124),
        ("RGBA", (0, 0, 0, 0), 255),
        ("I;16", 257 * 40, 40),
        ("I;16", 257 * 40 + 129, 41),  # rounded
        ("I;16", 65535, 255),
    ],
)
def test_modes_as_grey(tmp_path, mode, colour, expected):
    image = Image.new(mode, (28, 28), colour)
    if mode == "P":
        image.putpalette([value for i in range(256) for value in (i, i, i)])
    image.save(tmp_path / "a.png")
    pixels = decode(tmp_path / "a.png")
    assert pixels.shape == GREY
    assert pixels.dtype == np.uint8
    assert set(pixels.ravel().tolist()) == {expected}


@pytest.mark.parametrize(
    ("mode", "suffix", "colour", "expected"),
    [
        ("RGB", "png", (200, 100, 50), (200, 100, 50)),
        ("RGB", "bmp", (200, 100, 50), (200, 100, 50)),
        ("RGB", "gif", (255, 0, 0), (255, 0, 0)),
        ("RGBA", "png", (255, 0, 0, 51), (255, 204, 204)),
        ("CMYK", "tif", (255, 0, 255, 0), (0, 255, 0)),
        ("L", "png", 9, (9, 9, 9)),
        ("F", "tif", 0.2, (51, 51, 51)),
        ("F", "tif", 51.0, (51, 51, 51)),
        ("I", "tif", 257 * 51, (51, 51, 51)),
    ],
)
def test_modes_as_rgb(tmp_path, mode, suffix, colour, expected):
    Image.new(mode, (4, 3), colour).save(tmp_path / f"a.{suffix}")
    pixels = decode(tmp_path / f"a.{suffix}", (3, 3, 4))
    assert pixels.shape == (3, 3, 4)
    assert pixels.reshape(3, -1).T.tolist() == [list(expected)] * 12


def test_cmyk_jpeg(tmp_path):
    Image.new("CMYK", (64, 64), (255, 0, 255, 0)).save(tmp_path / "a.jpg")
    assert np.abs(decode(tmp_path / "a.jpg", (3, 8, 8)).mean((1, 2)) - (0, 255, 0)).max() < 3


def test_the_transparent_colour_of_a_palette_is_white(tmp_path):
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.putdata([0, 1])
    image.save(tmp_path / "a.png", transparency=1)
    assert decode(tmp_path / "a.png", (3, 1, 2)).tolist() == [[[10, 255]], [[20, 255]], [[30, 255]]]


def test_the_first_frame_of_a_gif(tmp_path):
    frames = [grey(value) for value in (50, 200)]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert set(decode(tmp_path / "a.gif").ravel().tolist()) == {50}


UPRIGHT = [[1, 2], [3, 4], [5, 6]]
AS_STORED = {  # by EXIF's definition of where row 0 and column 0 of the stored picture belong
    1: UPRIGHT,
    2: [[2, 1], [4, 3], [6, 5]],
    3: [[6, 5], [4, 3], [2, 1]],
    4: [[5, 6], [3, 4], [1, 2]],
    5: [[1, 3, 5], [2, 4, 6]],
    6: [[2, 4, 6], [1, 3, 5]],
    7: [[6, 4, 2], [5, 3, 1]],
    8: [[5, 3, 1], [6, 4, 2]],
}


@pytest.mark.parametrize("orientation", AS_STORED)
def test_exif_orientation(tmp_path, orientation):
    image = Image.fromarray(np.array(AS_STORED[orientation], np.uint8))
    exif = Image.Exif()
    exif[0x0112] = orientation
    image.save(tmp_path / "a.png", exif=exif)
    picture = _pictures.decode(tmp_path / "a.png", (1, 3, 2), "pad")
    assert picture.pixels[0].tolist() == UPRIGHT
    assert picture.size == (2, 3)


def test_exif_orientation_of_a_reduced_jpeg(tmp_path):
    values = np.zeros((400, 600), np.uint8)
    values[:, :300] = 255  # white on the left, which is the top when turned clockwise
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(values).save(tmp_path / "a.jpg", exif=exif)
    picture = _pictures.decode(tmp_path / "a.jpg", (1, 6, 4), "pad")
    assert picture.size == (400, 600)
    assert (picture.pixels[0, :2] > 240).all()
    assert (picture.pixels[0, 4:] < 15).all()


def test_damaged_exif_data_are_ignored(tmp_path):
    grey(60).save(tmp_path / "a.jpg", exif=b"Exif\0\0II*\0\xff\xff\xff\x7fgarbage")
    make_classes(tmp_path / "in")
    (tmp_path / "a.jpg").rename(tmp_path / "in" / "cat" / "a.jpg")
    assert len(read(tmp_path / "in").train_images) == 5


# ---- fitting


def split_picture(width, height):
    """Left half 40, right half 200."""
    values = np.full((height, width), 40, np.uint8)
    values[:, width // 2 :] = 200
    return Image.fromarray(values)


def test_pad_keeps_the_proportions(tmp_path):
    split_picture(80, 40).save(tmp_path / "a.png")
    pixels = decode(tmp_path / "a.png", (1, 8, 8))[0]
    assert len(set(pixels[[0, 1, 6, 7]].ravel().tolist())) == 1  # two rows above, two below
    assert pixels[2:6, 0].tolist() == [40] * 4
    assert pixels[2:6, 7].tolist() == [200] * 4


def test_pad_with_the_median_of_the_border(tmp_path):
    values = np.full((10, 20), 90, np.uint8)
    values[4:6, 8:12] = 0
    values[0, 0] = 255
    Image.fromarray(values).save(tmp_path / "a.png")
    pixels = decode(tmp_path / "a.png", (1, 20, 20))[0]
    assert set(pixels[:5].ravel().tolist()) == set(pixels[15:].ravel().tolist()) == {90}
    assert (pixels[5:15] == values).all()  # of the right width: not resampled
    Image.new("RGB", (10, 20), (1, 2, 3)).save(tmp_path / "b.png")
    assert decode(tmp_path / "b.png", (3, 20, 20)).reshape(3, -1).T.tolist() == [[1, 2, 3]] * 400


def test_crop_cuts_the_middle(tmp_path):
    values = np.repeat(np.array([[10] * 4 + [100] * 8 + [10] * 4], np.uint8), 8, axis=0)
    Image.fromarray(values).save(tmp_path / "a.png")
    assert set(decode(tmp_path / "a.png", (1, 8, 8), "crop").ravel().tolist()) == {100}
    Image.fromarray(values.T).save(tmp_path / "b.png")
    pixels = decode(tmp_path / "b.png", (1, 4, 4), "crop")[0].astype(int)
    assert np.abs(pixels - 100).max() <= 5  # the filter reaches over the cut


def test_stretch_uses_everything(tmp_path):
    split_picture(80, 40).save(tmp_path / "a.png")
    pixels = decode(tmp_path / "a.png", (1, 8, 8), "stretch")[0]
    assert (pixels[:, 0] == 40).all()
    assert (pixels[:, 7] == 200).all()


def test_resizing_averages(tmp_path):
    chequered = np.indices((280, 280)).sum(0) % 2 * 255
    Image.fromarray(chequered.astype(np.uint8)).save(tmp_path / "a.png")
    assert np.abs(decode(tmp_path / "a.png").astype(int) - 128).max() <= 2


@pytest.mark.parametrize("fit", ["pad", "crop", "stretch"])
@pytest.mark.parametrize("size", [(1, 1), (1, 500), (500, 1), (3, 2)])
def test_extreme_sizes(tmp_path, size, fit):
    grey(33, size).save(tmp_path / "a.png")
    assert set(decode(tmp_path / "a.png", (1, 9, 7), fit).ravel().tolist()) == {33}


@pytest.mark.parametrize("fit", ["pad", "crop", "stretch"])
def test_any_size_fits_any_other(fit):
    rng = np.random.default_rng(0)
    for width, height, *target in rng.integers(1, [300, 300, 40, 40], (2000, 4)).tolist():
        pixels = _pictures.fit_to(grey(33, (width, height)), (1, *target), fit)
        assert pixels.shape == (1, *target)
        assert (pixels == 33).all()


def test_a_picture_of_the_right_size_is_unchanged(tmp_path):
    values = np.random.default_rng(0).integers(0, 256, (28, 28), np.uint8)
    Image.fromarray(values).save(tmp_path / "a.png")
    for fit in ("pad", "crop", "stretch"):
        assert (decode(tmp_path / "a.png", fit=fit)[0] == values).all()


def test_a_large_jpeg_is_reduced_while_decoding(tmp_path, monkeypatch):
    Image.new("RGB", (8000, 6000), "red").save(tmp_path / "a.jpg")
    loaded = []
    convert = _pictures._convert
    monkeypatch.setattr(_pictures, "_convert", lambda image, c: loaded.append(image.size) or convert(image, c))
    picture = _pictures.decode(tmp_path / "a.jpg", GREY, "pad")
    assert loaded == [(1000, 750)]
    assert picture.size == (8000, 6000)
    assert not picture.grey


# ---- folders


def test_a_folder_of_classes(tmp_path):
    root = make_classes(tmp_path / "pets", {"10": 6, "9": 12, "b": 6}, (20, 10))
    (root / "README.txt").write_text("x")
    (root / "9" / ".DS_Store").write_text("x")
    (root / "9" / "Thumbs.db").write_text("x")
    (root / "9" / "._0.png").write_text("x")
    (root / ".hidden").mkdir()
    grey(0).save(root / "loose.png")
    Image.new("RGB", (300, 200)).save(root / "b" / "x.JPG")
    messages = []
    data = from_files(root, on_message=messages.append)
    assert data.name == "pets"
    assert data.classes == ("9", "10", "b")
    assert data.train_images.shape == (21, 28, 28)
    assert np.bincount(data.train_labels).tolist() == [10, 5, 6]
    assert np.bincount(data.test_labels).tolist() == [2, 1, 1]
    assert messages == [
        f"{root}: ignored 5 other files, 1 pictures outside the folders of the classes",
        "25 images, 3 classes (9 12, 10 6, b 7), sizes from 20 x 10 to 300 x 200: converted to grey, "
        "padded and resized to 28 x 28; 21 for training, 4 for testing",
    ]


def test_the_message_says_what_was_done(tmp_path):
    root = make_classes(tmp_path / "in")
    for options, text in [
        ({}, "all 28 x 28; "),
        ({"shape": (3, 28, 28)}, "all 28 x 28: converted to RGB; "),
        ({"shape": (1, 14, 14)}, "all 28 x 28: resized to 14 x 14; "),
        ({"shape": (1, 10, 20), "fit": "crop"}, "all 28 x 28: cropped and resized to 20 x 10; "),
        ({"shape": (1, 10, 20), "fit": "stretch"}, "all 28 x 28: stretched to 20 x 10; "),
    ]:
        messages = []
        from_files(root, on_message=messages.append, **options)
        assert messages == [f"6 images, 2 classes (cat 3, dog 3), {text}4 for training, 2 for testing"]


def test_many_classes_are_not_all_listed(tmp_path):
    messages = []
    from_files(make_classes(tmp_path, {str(i): 2 for i in range(12)}), on_message=messages.append)
    assert "12 classes (0 2, 1 2, 2 2, 3 2, 4 2, 5 2, 6 2, 7 2, 8 2, 9 2, ...)" in messages[0]


@pytest.mark.parametrize("name", ["test", "Test", "val", "valid", "validation"])
def test_a_folder_with_a_test_set(tmp_path, name):
    make_classes(tmp_path / "train", {"a": 1, "b": 4})
    make_classes(tmp_path / name, {"b": 2})
    data = read(tmp_path)
    assert data.classes == ("a", "b")
    assert data.train_labels.tolist() == [0, 1, 1, 1, 1]
    assert data.test_labels.tolist() == [1, 1]


def test_only_one_test_set_is_used(tmp_path):
    make_classes(tmp_path / "train")
    make_classes(tmp_path / "val", {"cat": 1})
    make_classes(tmp_path / "test", {"cat": 2})
    messages = []
    assert len(from_files(tmp_path, on_message=messages.append).test_images) == 2
    assert messages[0] == f"{tmp_path / 'val'} is not used: {tmp_path / 'test'} is the test set"


def test_a_folder_with_train_only_is_split(tmp_path):
    make_classes(tmp_path / "train")
    assert len(read(tmp_path).test_images) == 2


def test_train_is_a_class_beside_other_classes(tmp_path):
    make_classes(tmp_path, {"train": 2, "bus": 2})
    assert read(tmp_path).classes == ("bus", "train")


def test_symlinks_are_followed(tmp_path):
    root = make_classes(tmp_path / "in", {"a": 2})
    make_classes(tmp_path / "elsewhere", {"b": 2})
    (root / "b").symlink_to(tmp_path / "elsewhere" / "b")
    (root / "a" / "link.png").symlink_to(root / "a" / "0.png")
    assert read(root).classes == ("a", "b")
    assert len(read(root).train_images) == 3


def test_names_that_cannot_be_printed(tmp_path):
    root = make_classes(tmp_path / "in", {"a": 2})
    name = os.fsdecode(b"b\xff\x1b[31m")
    try:
        make_classes(root, {name: 2})
    except OSError:
        pytest.skip("this file system takes UTF-8 names only")
    messages = []
    data = from_files(root, on_message=messages.append)
    assert data.classes == ("a", "b\N{REPLACEMENT CHARACTER}\N{REPLACEMENT CHARACTER}[31m")
    assert messages[0].isprintable()


# ---- splits


def test_a_split_is_stratified_and_repeatable(tmp_path):
    counts = {"a": 2, "b": 7, "c": 60}
    first, second = make_classes(tmp_path / "1", counts), tmp_path / "2"
    for name, count in reversed(counts.items()):  # another order in the file system
        (second / name).mkdir(parents=True)
        for i in reversed(range(count)):
            grey(10 + i).save(second / name / f"{i}.png")
    data = read(first)
    assert np.bincount(data.test_labels).tolist() == [1, 1, 10]
    assert np.bincount(data.train_labels).tolist() == [1, 6, 50]
    np.random.seed(5)  # noqa: NPY002 (the split must not depend on it)
    assert read(second).sha256 == data.sha256
    values = [images[labels == 2, 0, 0] for images, labels in
              ((data.train_images, data.train_labels), (data.test_images, data.test_labels))]  # fmt: skip
    assert sorted(np.concatenate(values).tolist()) == list(range(10, 70))
    assert values[1].tolist() != list(range(10, 20))
    assert len(read(first, test_fraction=0.5).test_images) == 1 + 4 + 30
    assert len(read(first, test_fraction=0.999).train_images) == 3


def test_a_new_picture_moves_few_others(tmp_path):
    root = make_classes(tmp_path, {"a": 60, "b": 60})
    before = {image[0, 0] for image in read(root).test_images[:10]}
    grey(200).save(root / "a" / "new.png")
    assert len(before - {image[0, 0] for image in read(root).test_images[:10]}) <= 1


# ---- damaged files


def damaged_pictures(folder):
    """A damaged file of each kind, and words of the reason."""
    Image.effect_noise((64, 64), 50).save(folder / "cut.jpg")
    (folder / "cut.jpg").write_bytes((folder / "cut.jpg").read_bytes()[:-300])
    Image.effect_noise((64, 64), 50).save(folder / "cut.png")
    (folder / "cut.png").write_bytes((folder / "cut.png").read_bytes()[:-300])
    (folder / "empty.png").write_bytes(b"")
    (folder / "text.png").write_text("hello")
    (folder / "folder.png").mkdir()
    os.mkfifo(folder / "pipe.png")
    (folder / "device.png").symlink_to("/dev/zero")
    (folder / "gone.png").symlink_to(folder / "nothing")
    (folder / "bomb.png").write_bytes(png_of_size(50_000, 50_000))
    (folder / "large.png").write_bytes(png_of_size(10_001, 10_000))
    with (folder / "sparse.png").open("wb") as file:
        file.truncate(2**36)
    Image.new("F", (2, 2), 300.0).save(folder / "bright.tif")
    return {
        "cut.jpg": "truncated",
        "cut.png": "truncated|broken",
        "empty.png": "an empty file",
        "text.png": "not a picture",
        "folder.png": "expected a regular file, got a folder",
        "pipe.png": "expected a regular file, got a named pipe",
        "device.png": "expected a regular file, got a device",
        "gone.png": "No such file",
        "bomb.png": "expected at most 100,000,000 pixels, got more",
        "large.png": "expected at most 100,000,000 pixels, got 10001 x 10000",
        "sparse.png": "expected at most 1,073,741,824 bytes, got 68,719,476,736",
        "bright.tif": "pixels must be 0 to 255, got 300.0 to 300.0",
    }


def png_of_size(width, height):
    """A PNG that declares a size and has no pixels."""
    chunks = [b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0), b"IDAT", b"IEND"]
    framed = [struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk)) for chunk in chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(framed)


def test_damaged_files_are_listed(tmp_path):
    root = make_classes(tmp_path / "in")
    expected = damaged_pictures(root / "cat")
    with pytest.raises(DamagedFileError) as caught:
        read(root)
    first, *lines = str(caught.value).splitlines()
    assert first == f"{root}: 12 of 18 images cannot be read (skip_bad=True or --skip-bad skips them):"
    assert len(lines) == 11
    assert lines[-1] == "  and 2 more"
    named = sorted(expected)
    for name, line in zip(named, lines[:-1], strict=False):
        assert re.fullmatch(f"  cat/{name}: .*({expected[name]}).*", line), line

    messages = []
    data = from_files(root, skip_bad=True, on_message=messages.append)
    assert messages[0].splitlines() == [f"{root}: skipped 12 images that cannot be read:", *lines]
    assert messages[1].startswith("6 images, 2 classes (cat 3, dog 3), all 28 x 28;")
    assert len(data.train_images) == 4
    assert sorted([*data.train_images[:, 0, 0], *data.test_images[:, 0, 0]]) == [10, 10, 11, 11, 12, 12]


@pytest.mark.filterwarnings("ignore:Image size:PIL.Image.DecompressionBombWarning")
def test_every_reason(tmp_path):
    for name, reason in damaged_pictures(tmp_path).items():
        with pytest.raises(Exception, match=reason):
            decode(tmp_path / name)


def test_a_class_of_damaged_files(tmp_path):
    root = make_classes(tmp_path / "in", {"cat": 2, "dog": 2})
    (root / "dog" / "0.png").write_text("x")
    with pytest.raises(ValueError, match="class dog must have at least 2 images, one for training and one for testing"):
        read(root, skip_bad=True)
    for path in root.rglob("*.png"):
        path.write_text("x")
    with pytest.raises(ValueError, match="class cat must have at least 2 images"):
        read(root, skip_bad=True)
    make_classes(tmp_path / "two" / "train")
    test = make_classes(tmp_path / "two" / "test", {"cat": 1})
    (test / "cat" / "0.png").write_text("x")
    with pytest.raises(ValueError, match="expected images for testing that can be read"):
        read(tmp_path / "two", skip_bad=True)


def test_a_hundred_megapixels_are_accepted(tmp_path):
    root = make_classes(tmp_path / "in")
    Image.new("1", (10_000, 10_000), 1).save(root / "cat" / "large.png")
    messages = []
    from_files(root, on_message=messages.append)  # Pillow's warning would be an error here
    assert "sizes from 28 x 28 to 10000 x 10000" in messages[0]


# ---- errors before anything is read


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"shape": 28}, TypeError, "shape must be a tuple of integers"),
        ({"shape": (28, 28)}, ValueError, r"shape must be \(1, height, width\) .*, got \(28, 28\)"),
        ({"shape": (2, 28, 28)}, ValueError, r"shape must be .* got \(2, 28, 28\)"),
        ({"shape": (1, 0, 28)}, ValueError, "shape must be at least 1"),
        ({"shape": (1, 10**6, 10**6)}, ValueError, "expected images of at most .* bytes in all, got 6,000,000,000,000"),
        ({"fit": "squeeze"}, ValueError, "fit must be one of 'pad', 'crop', 'stretch', got 'squeeze'"),
        ({"test_fraction": 0}, ValueError, "test_fraction must be above 0"),
        ({"test_fraction": 1}, ValueError, "test_fraction must be at least 0 and below 1"),
        ({"on_message": 3}, TypeError, "on_message must be a function"),
    ],
)
def test_arguments_are_checked(tmp_path, options, error, message):
    with pytest.raises(error, match=message):
        read(make_classes(tmp_path), **options)


def test_paths_are_checked(tmp_path):
    def refused(path, error, message):
        with pytest.raises(error) as caught:
            read(path)
        assert message in str(caught.value)
        assert str(tmp_path) in str(caught.value)

    refused(tmp_path / "none", FileNotFoundError, "no such file or folder")
    (tmp_path / "a.txt").write_text("x")
    refused(tmp_path / "a.txt", ValueError, "expected a folder of images, a .csv or a .npz file")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", ValueError, "expected a folder of images for each class, got an empty folder")
    (tmp_path / "loose").mkdir()
    grey(0).save(tmp_path / "loose" / "a.png")
    refused(tmp_path / "loose", ValueError, "expected a folder of images for each class, got 1 other entries")
    refused(make_classes(tmp_path / "one", {"a": 2}), ValueError, "expected at least 2 classes, got 1 (a)")
    root = make_classes(tmp_path / "hollow", {"a": 2, "b": 0})
    refused(root, ValueError, f"{root / 'b'}: a class must have images")
    refused(make_classes(tmp_path / "few", {"a": 2, "b": 1}), ValueError, "class b must have at least 2 images")
    make_classes(tmp_path / "parts" / "train")
    root = make_classes(tmp_path / "parts" / "test", {"cow": 1})
    refused(tmp_path / "parts", ValueError, f"{root / 'cow'}: expected one of the classes in")
    make_classes(tmp_path / "parts2" / "train")
    (tmp_path / "parts2" / "test").mkdir()
    refused(tmp_path / "parts2", ValueError, "expected images for testing, got none")
    os.mkfifo(tmp_path / "pipe.csv")
    refused(tmp_path / "pipe.csv", DamagedFileError, "expected a regular file, got a named pipe")
    os.mkfifo(tmp_path / "pipe.npz")
    refused(tmp_path / "pipe.npz", DamagedFileError, "expected a regular file, got a named pipe")


# ---- CSV


def csv_text(header, labels, pixels, column=0):
    lines = [header] if header else []
    for label, row in zip(labels, pixels, strict=True):
        fields = [str(value) for value in row]
        fields.insert(column, str(label))
        lines.append(",".join(fields))
    return "\n".join(lines) + "\n"


PIXELS = np.random.default_rng(1).integers(0, 256, (6, 784), np.uint8)
LABELS = [7, 3, 7, 3, -1, -1]


@pytest.mark.parametrize(
    ("header", "column"),
    [("", 0), ("label," + ",".join(f"pixel{i}" for i in range(784)), 0), ("label," + ",".join(map(str, range(784))), 0),
     ('"' + '","'.join([*map(str, range(784)), "Label"]) + '"', 784), ("a" + ",b" * 784, 0)],
)  # fmt: skip
@pytest.mark.parametrize("ends", ["\n", "\r\n"])
def test_csv(tmp_path, header, column, ends):
    text = csv_text(header, LABELS, PIXELS, column).replace("\n", ends)
    (tmp_path / "digits.csv").write_bytes(b"\xef\xbb\xbf" * (column > 0) + text.encode() + ends.encode() * 2)
    messages = []
    data = from_files(tmp_path / "digits.csv", on_message=messages.append)
    assert data.name == "digits"
    assert data.classes == ("-1", "3", "7")  # any integers, in their order
    assert messages == ["6 images, 3 classes (-1 2, 3 2, 7 2), all 28 x 28; 3 for training, 3 for testing"]
    found = {bytes(image.ravel()): data.classes[label] for images, labels in
             ((data.train_images, data.train_labels), (data.test_images, data.test_labels))
             for image, label in zip(images, labels, strict=True)}  # fmt: skip
    assert found == {bytes(row): str(label) for row, label in zip(PIXELS, LABELS, strict=True)}


def test_csv_with_quotes_and_spaces(tmp_path):
    lines = (b"1,2,3,4,5", b'"1","2","3","4","6"', b"-1, 2,3 ,4,7", b"-1,02,3,+4,8")
    (tmp_path / "a.csv").write_bytes(b"\n".join(lines))
    data = read(tmp_path / "a.csv", shape=(1, 2, 2))
    assert data.classes == ("-1", "1")
    assert sorted([*data.train_images[:, 1, 1], *data.test_images[:, 1, 1]]) == [5, 6, 7, 8]
    assert (data.train_images[:, 0] == [2, 3]).all()


def test_csv_of_other_sizes(tmp_path):
    (tmp_path / "a.csv").write_text(csv_text("", LABELS, np.full((6, 100), 9)))
    data = read(tmp_path / "a.csv")
    assert data.train_images.shape == (3, 28, 28)
    assert set(data.train_images.ravel().tolist()) == {9}
    rows = np.arange(6 * 24).reshape(6, 24)
    (tmp_path / "b.csv").write_text(csv_text("", [0, 1] * 3, rows))
    data = read(tmp_path / "b.csv", shape=(3, 2, 4))
    assert {image.tobytes() for image in [*data.train_images, *data.test_images]} == {
        bytes(row.tolist()) for row in rows
    }


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "expected lines of a label and pixels, got none"),
        ("label,a,b,c,d\n", "expected lines of a label and pixels, got none"),
        (
            "1,2,3,4\n",
            "line 1, beside the label: expected images of 784 pixels (1 x 28 x 28) or a square number of them, got 3",
        ),
        (
            "1\n",
            "line 1, beside the label: expected images of 784 pixels (1 x 28 x 28) or a square number of them, got 0",
        ),
        ("1,2,3,4,5\n1,2,3,4\n", "line 2: expected 5 columns, as in line 1, got 4"),
        ("label,a,b,c,d\n1,2,3,4,5\n1,2,3,4,5,6\n", "line 3: expected 5 columns, as in line 1, got 6"),
        ("1,2,3,4,5\n1,2,3,4,256\n", "line 2: pixels must be integers 0 to 255, got '256'"),
        ("1,2,3,4,5\n1,2,-3,4,5\n", "line 2: pixels must be integers 0 to 255, got '-3'"),
        ("1,2,3,4,5\n1,2,3.5,,5\n", "line 2: pixels must be integers 0 to 255, got '3.5'"),
        (f"1,2,3,4,5\n1,2,3,{'9' * 9999},5\n", "line 2: pixels must be integers 0 to 255, got '9999999"),
        ("1,2,3,4,5\ncat,2,3,4,5\n", "line 2: the label must be an integer, got 'cat'"),
        ("1,2,3,4,5\n1.5,2,3,4,5\n", "line 2: the label must be an integer, got '1.5'"),
        (f"1,2,3,4,5\n{-(2**63) - 1},2,3,4,5\n", "line 2: the label must be an integer, got '-9223372036854775809'"),
        ("1,2,3,4,5\n1,2,3 4,5\n", "line 2: expected 5 columns, as in line 1, got 4"),
        ("1,2,3,4,5\n1,2,3 4,5,6\n", "line 2: pixels must be integers 0 to 255, got '3 4'"),
        ("1,2,3,4,5\n1,2,3,4,5,\n", "line 2: expected 5 columns, as in line 1, got 6"),
        ("1,2,3,4,5\n1,2,3,4,0x5\n", "line 2: pixels must be integers 0 to 255, got '0x5'"),
        (f"1,2,3,4,5\n{2**63},2,3,4,5\n", "line 2: the label must be an integer, got '9223372036854775808'"),
        ("1,2,3,4,5\n1,2,3,4,5\n", "expected at least 2 classes, got 1 (1)"),
        ("1,2,3,4,5\n1,2,3,4,5\n2,2,3,4,5\n", "class 2 must have at least 2 images"),
        ("\0" * 2**24 + "\0", "line 1: expected at most 16,777,216 bytes, got more"),
    ],
)
def test_damaged_csv(tmp_path, text, message):
    (tmp_path / "a.csv").write_text(text)
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        read(tmp_path / "a.csv")
    assert str(caught.value).startswith(str(tmp_path / "a.csv"))
    assert len(str(caught.value)) < 400


def test_a_csv_that_memory_cannot_hold(tmp_path, monkeypatch):
    monkeypatch.setattr(_tables, "max_bytes", lambda: 10)
    (tmp_path / "a.csv").write_text("1,2,3,4,5\n" * 4)
    with pytest.raises(DamagedFileError, match="expected at most 10 pixels, got more"):
        read(tmp_path / "a.csv")
    (tmp_path / "a.csv").write_text("1,2,3,4,5\n" * 40)
    with pytest.raises(DamagedFileError, match="expected at most 80 bytes, got 400"):
        read(tmp_path / "a.csv")


# ---- NPZ


def save(path, compressed=True, **arrays):
    (np.savez_compressed if compressed else np.savez)(path, **arrays)
    return path


X = PIXELS.reshape(6, 28, 28)
Y = np.array([0, 1, 0, 1, 0, 1])


def all_images(data):
    order = np.argsort(data.test_labels, kind="stable")
    assert len(order) == 2
    return np.concatenate([data.train_images, data.test_images])


@pytest.mark.parametrize("compressed", [True, False])
def test_npz_as_keras_has_mnist(tmp_path, compressed):
    path = save(tmp_path / "mnist.npz", compressed, x_train=X, y_train=Y, x_test=X[:2], y_test=Y[:2])
    data = read(path)
    assert (data.train_images == X).all()
    assert (data.train_labels == Y).all()
    assert (data.test_images == X[:2]).all()
    assert data.test_labels.dtype == np.int64


@pytest.mark.parametrize(
    ("x", "shape"),
    [
        (X, GREY),
        (PIXELS, GREY),
        (X[..., None], GREY),
        (X[:, None], GREY),
        (np.asfortranarray(X), GREY),
        (X.astype(np.int64), GREY),
        (X / 255, GREY),
        (X.astype(np.float32), GREY),
        (X.astype(np.uint16) * 257, GREY),
        (np.stack([X] * 3, 1), GREY),
        (np.stack([X] * 3, 3), GREY),
        (np.stack([X] * 3, 1), (3, 28, 28)),
        (np.stack([X] * 3, 3), (3, 28, 28)),
        (X, (3, 28, 28)),
    ],
)
def test_npz_layouts_and_dtypes(tmp_path, x, shape):
    data = read(save(tmp_path / "a.npz", x_train=x, y_train=Y[:, None], x_test=x, y_test=Y), shape=shape)
    expected = X if shape == GREY else np.stack([X] * 3, 1)
    assert (data.train_images == expected).all()


def test_npz_split_and_labels(tmp_path):
    data = read(save(tmp_path / "a.npz", x=X > 127, y=np.array([5, 5, 5, 900, 900, 900], np.uint16)))
    assert data.classes == ("5", "900")
    assert np.bincount(data.test_labels).tolist() == [1, 1]
    found = {image.tobytes() for image in [*data.train_images, *data.test_images]}
    assert found == {(image * np.uint8(255)).tobytes() for image in X > 127}
    medmnist = {"train_images": X, "train_labels": Y[:, None], "test_images": X, "test_labels": Y[:, None]}
    assert len(read(save(tmp_path / "b.npz", **medmnist)).test_images) == 6


def test_npz_of_other_sizes(tmp_path):
    messages = []
    path = save(tmp_path / "a.npz", x=np.full((6, 10, 20, 3), 7, np.uint8), y=Y)
    data = from_files(path, shape=(3, 8, 8), on_message=messages.append)
    assert set(data.train_images.ravel().tolist()) == {7}
    assert "all 20 x 10: padded and resized to 8 x 8" in messages[0]


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"images": X, "y": Y}, "expected arrays x and y, or x_train, y_train, x_test and y_test, got 'images', 'y'"),
        ({}, "got no arrays"),
        ({"x": X, "y": Y / 1}, "y must hold integer labels, got dtype float64"),
        ({"x": X, "y": np.full(6, 2**63, np.uint64)}, "y must hold integer labels, got dtype uint64"),
        ({"x": X, "y": Y.astype(str)}, "y must be an array of numbers, got dtype <U"),
        ({"x": X, "y": np.eye(6, dtype=int)}, "y must have shape (N,), one label an image, got (6, 6)"),
        ({"x": X, "y": np.array(3)}, "y must have shape (N,), one label an image, got ()"),
        ({"x": X[:5], "y": Y}, "x must have as many images as there are labels, 6, got 5"),
        ({"x": X[:, :, :0], "y": Y}, "x must have 0 bytes for shape (6, 28, 0) (not empty), got 0"),
        ({"x": np.zeros((6, 4, 4, 4), np.uint8), "y": Y}, "x must have shape (N, h, w), (N, h, w, C)"),
        ({"x": np.zeros(6, np.uint8), "y": Y}, "x must have shape (N, h, w), (N, h, w, C)"),
        ({"x": X * 300.0, "y": Y}, "x must have pixels 0 to 1 or 255, got 0.0 to 76500.0"),
        ({"x": X - 1.0, "y": Y}, "x must have pixels 0 to 1 or 255, got -1.0 to 254.0"),
        ({"x": X * np.nan, "y": Y}, "x must have pixels 0 to 1 or 255, got nan to nan"),
        ({"x": X.astype(int) * 300, "y": Y}, "x must have pixels 0 to 255 or 65535, got 0 to 76500"),
        (
            {"x": PIXELS[:, 1:], "y": Y},
            "x: expected images of 784 pixels (1 x 28 x 28) or a square number of them, got 783",
        ),
        ({"x": X, "y": Y * 0}, "expected at least 2 classes, got 1 (0)"),
        ({"x_train": X, "y_train": Y, "x_test": X, "y_test": Y * 4}, "expected test labels that occur in training"),
        ({"x": np.array([None] * 6), "y": Y}, "x must be an array of numbers, got dtype object"),
        ({"x": X.astype(complex), "y": Y}, "x must be an array of numbers, got dtype complex128"),
    ],
)
def test_wrong_npz(tmp_path, arrays, message):
    path = save(tmp_path / "a.npz", **arrays)
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        read(path)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


def npy(shape, dtype="|u1"):
    """The header of an .npy file without the data."""
    header = f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': {shape}, }}"
    header += " " * (118 - len(header) - 1) + "\n"
    return b"\x93NUMPY\1\0" + struct.pack("<H", len(header)) + header.encode()


def bomb(path, declared=None, content=b"", method=zipfile.ZIP_DEFLATED):
    with zipfile.ZipFile(path, "w", method) as archive:
        with archive.open("x.npy", "w") as file:
            file.write(npy((6, 28, 28)) + content)
        archive.writestr("y.npy", npy((6,)) + bytes(6))
        if declared is not None:
            archive.getinfo("x.npy").file_size = declared  # in the directory at the end
    return path


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.write_bytes(b"no zip file"), "expected arrays of NumPy in a zip file, got BadZipFile"),
        (lambda path: path.write_bytes(b""), "expected arrays of NumPy in a zip file, got BadZipFile"),
        (lambda path: path.write_bytes(save(path, x=X, y=Y).read_bytes()[:-100]), "expected arrays of NumPy"),
        (lambda path: bomb(path, 2**41), "bytes of arrays, got 2,199,023,2"),
        (lambda path: bomb(path, 2**30), "x must have 4,704 bytes for shape (6, 28, 28) (not empty), got 1,073,7"),
        (lambda path: bomb(path, content=bytes(10**6)), "x must have 4,704 bytes for shape (6, 28, 28) (not empty)"),
        (lambda path: bomb(path, content=bytes(5)), "x must have 4,704 bytes for shape (6, 28, 28) (not empty), got 5"),
        (lambda path: bomb(path, 128 + 4704), "expected arrays of NumPy in a zip file"),
        (lambda path: bomb(path, method=zipfile.ZIP_BZIP2), "x must be stored or deflated, got zip method 12"),
    ],
)  # fmt: skip
def test_damaged_npz(tmp_path, damage, message):
    path = tmp_path / "a.npz"
    damage(path)
    with pytest.raises(DamagedFileError, match=re.escape(message)) as caught:
        read(path)
    assert str(caught.value).startswith(str(path))


def test_an_npz_that_memory_cannot_hold(tmp_path, monkeypatch):
    path = save(tmp_path / "a.npz", x=np.zeros((6, 280, 280), np.uint8), y=Y)
    monkeypatch.setattr(_tables, "max_bytes", lambda: 400_000)
    with pytest.raises(DamagedFileError, match="expected at most 400,000 bytes of arrays, got 470,"):
        read(path)


# ---- any bytes


@settings(max_examples=100)
@given(st.data())
def test_mutated_files_are_read_or_refused(data):
    with tempfile.TemporaryDirectory() as folder:
        kind = data.draw(st.sampled_from(["csv", "npz", "stored.npz", "png"]))
        path = Path(folder) / f"a.{kind}"
        if kind == "csv":
            path.write_text(csv_text("label,a,b,c,d", [0, 1, 0, 1], np.arange(16).reshape(4, 4)))
        elif kind == "png":
            make_classes(Path(folder), {"a": 2, "b": 2}, (4, 4))
            path = Path(folder) / "a" / "0.png"
        else:
            save(path, kind == "npz", x=X[:, :4, :4], y=Y)
        content = bytearray(path.read_bytes())
        for _ in range(data.draw(st.integers(1, 4))):
            start = data.draw(st.integers(0, len(content)))
            content[start : start + data.draw(st.integers(0, 4))] = data.draw(st.binary(max_size=4))
        path.write_bytes(content)
        try:
            read(Path(folder) if kind == "png" else path)
        except (ValueError, OSError) as error:
            assert str(error).startswith(folder), repr(error)  # our own errors name the file  # noqa: PT017


def test_the_import_is_light():
    code = "import sys, tinycnn.data; print({'PIL', 'tqdm', 'matplotlib', 'numba'} & set(sys.modules))"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "set()"


def test_there_is_a_progress_bar_for_many_files_on_a_terminal(tmp_path, monkeypatch, capsys):
    root = make_classes(tmp_path)
    monkeypatch.setattr(images, "_MANY", 6)
    read(root)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    read(root)
    assert "6/6" in capsys.readouterr().err
