"""Invariances of prepared digits, rows of digits, pictures that are refused or extreme."""

import itertools
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, strategies as st

from tinycnn import Adam, CrossEntropyLoss, data, digits, fit, models
from tinycnn.data import DataUnavailableError

DRAWN, LABELS = data.synthetic_digits(40, rng=3)


def picture(image, scale=6, top=20, left=30, shape=(240, 260), paper=220, ink=40):
    """A digit of 28 x 28 as dark ink on paper, enlarged, at any place; grey levels float64."""
    large = np.kron(image / 255, np.ones((scale, scale)))
    canvas = np.zeros(shape)
    canvas[top : top + len(large), left : left + len(large)] = large
    return paper + (ink - paper) * canvas


def as_bytes(values):
    return np.rint(np.clip(values, 0, 255)).astype(np.uint8)


def difference(a, b):
    """Mean absolute difference, as a fraction of the mean ink of `b`.  The centre of mass is rounded to whole pixels:
    a pixel's shift is no difference."""
    shifts = [(y, x) for y in (-1, 0, 1) for x in (-1, 0, 1)]
    return min(np.abs(np.roll(a, shift, (0, 1)).astype(float) - b).mean() for shift in shifts) / b.mean()


def test_place_does_not_matter():
    """But for a few: if a row at the edge of the ink is about as strong as LEVEL, rounding decides whether the box has
    it, and the digit is up to 5 % larger and half a pixel further."""
    differences = []
    for n in range(40):
        expected = digits.prepare(as_bytes(picture(DRAWN[n], shape=(268, 288), top=35, left=45)))
        for top, left in itertools.product((0, 1, 5, 70), (0, 2, 90)):
            got = digits.prepare(as_bytes(picture(DRAWN[n], shape=(268, 288), top=top, left=left)))
            differences.append(difference(got, expected))
    assert np.quantile(differences, 0.95) < 0.02
    assert np.quantile(differences, 0.99) < 0.12
    assert max(differences) < 0.4  # different digits differ by about 1


@pytest.mark.parametrize("n", range(10))
def test_size_inversion_contrast_color_and_shadow_do_not_matter(n):
    plain = picture(DRAWN[n])
    expected = digits.prepare(as_bytes(plain))
    shadow = np.linspace(0.5, 1, plain.shape[1])
    others = {
        "size": picture(DRAWN[n], scale=3, top=9, left=11, shape=(120, 130)),
        "inverted": 255 - plain,
        "contrast": 100 + 0.4 * plain,
        "color": np.stack([plain, plain, plain], axis=2),
        "shadow": plain * shadow,
    }
    for name, other in others.items():
        assert difference(digits.prepare(as_bytes(other)), expected) < 0.35, name  # different digits differ by about 1


@pytest.mark.parametrize("ink", [0, 255])
def test_transparent_background(ink):
    alpha = as_bytes(255 - picture(DRAWN[2], paper=255, ink=0))
    expected = digits.prepare(alpha)
    color = np.full_like(alpha, ink)
    for channels in (1, 3):
        image = np.dstack([color] * channels + [alpha])
        assert difference(digits.prepare(image), expected) < 0.05


def test_noise_and_specks_are_removed():
    plain = picture(DRAWN[5])
    noisy = plain + np.random.default_rng(0).normal(0, 8, plain.shape)
    noisy[5:9, 200:204] = noisy[220:223, 10:14] = 30
    assert difference(digits.prepare(as_bytes(noisy)), digits.prepare(as_bytes(plain))) < 0.2


@pytest.mark.parametrize(("size", "box"), [(28, 20), (32, 23), (56, 40)])
def test_box_and_centre_of_mass(size, box):
    for image in DRAWN:
        ready = digits.prepare(as_bytes(picture(image)), size)
        assert ready.shape == (size, size)
        assert ready.dtype == np.uint8
        assert ready.max() == 255
        rows, columns = np.flatnonzero(ready.any(axis=1)), np.flatnonzero(ready.any(axis=0))
        assert max(np.ptp(rows), np.ptp(columns)) + 1 == box
        center = np.array([ready.sum(axis=1 - axis) @ np.arange(size) / ready.sum() for axis in (0, 1)])
        assert (abs(center - size / 2) <= 0.51).all(), center  # rounding to grey levels moves it a little


def test_hair_lines_are_thickened():
    shape = (400, 400)
    image = np.full(shape, 230, np.uint8)
    image[50:350, 200] = 30
    assert (digits.prepare(image) > 128).sum(axis=1).max() >= 1
    assert digits.prepare(image)[14].astype(int).sum() > 1.2 * 255


def test_prepared_mnist_digits_are_read_as_before():
    try:
        mnist = data.load("mnist")
    except DataUnavailableError:
        pytest.skip("needs MNIST")
    model = models.lenet5("relu", "max", rng=0)
    fit(
        model,
        CrossEntropyLoss(),
        Adam(model),
        (mnist.train_images[:20_000, None], mnist.train_labels[:20_000]),
        epochs=1,
    )
    images, labels = mnist.test_images[:1000], mnist.test_labels[:1000]
    ready = np.stack([digits.prepare(image) for image in images])
    before, after = ((model.predict(x[:, None]) == labels).mean() for x in (images, ready))
    assert before > 0.93
    assert after >= before - 0.005


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5])
def test_split_finds_every_digit_from_left_to_right(count):
    for seed in range(5):
        rng = np.random.default_rng(seed)
        chosen = rng.choice(np.flatnonzero(LABELS != 1), count)
        row = np.full((130, 20 + 120 * count), 225.0)
        for n, index in enumerate(chosen):
            height = rng.integers(0, 15)
            row[height : height + 112, 10 + 120 * n : 122 + 120 * n] = picture(DRAWN[index], 4, 0, 0, (112, 112), 225)
        row[120:123, 3:6] = 60  # a speck
        parts = digits.split(as_bytes(row + rng.normal(0, 3, row.shape)))
        assert len(parts) == count
        for part, index in zip(parts, chosen, strict=True):
            assert difference(digits.prepare(part), digits.prepare(as_bytes(picture(DRAWN[index], 4)))) < 0.35


def test_strokes_above_each_other_are_one_digit():
    image = np.full((200, 300), 240, np.uint8)
    image[40:50, 60:120] = 20  # the hat of a 5, apart from its body
    image[62:140, 60:70] = image[130:140, 60:120] = 20
    image[40:140, 200:210] = 20
    parts = digits.split(image)
    assert len(parts) == 2
    assert parts[0].shape[0] > 100


@pytest.mark.parametrize(
    ("image", "error", "words"),
    [
        (np.zeros((28, 28)), TypeError, "image must be a uint8 array, got float64"),
        ([[0, 255]], TypeError, "image must be a uint8 array"),
        (np.zeros(28, np.uint8), ValueError, r"image must have shape .*\(28,\)"),
        (np.zeros((5, 28, 28), np.uint8), ValueError, "image must have shape"),
        (np.zeros((0, 28), np.uint8), ValueError, "image must have shape"),
        (np.full((60, 60), 200, np.uint8), ValueError, "blank"),
        (np.full((1, 1), 200, np.uint8), ValueError, "blank"),
        (np.full((1, 5000), 9, np.uint8), ValueError, "blank"),
        (np.zeros((70, 60, 4), np.uint8), ValueError, "blank"),
        (np.linspace(50, 200, 10_000).reshape(100, 100).astype(np.uint8), ValueError, "blank"),
    ],
)
def test_refused(image, error, words):
    for function in (digits.prepare, digits.split):
        with pytest.raises(error, match=words):
            function(image)


def test_size_is_checked():
    with pytest.raises(ValueError, match="size must be at least 14, got 3"):
        digits.prepare(DRAWN[0], 3)


@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 2**32 - 1))
def test_any_small_picture_is_prepared_or_refused(height, width, seed):
    rng = np.random.default_rng(seed)
    image = rng.integers(0, 256, (height, width), dtype=np.uint8) * (rng.random((height, width)) < rng.random())
    try:
        ready = digits.prepare(image.astype(np.uint8))
    except ValueError as error:
        if "blank" not in str(error):
            raise
    else:
        assert ready.max() == 255


def test_large_pictures_take_little_memory():
    image = np.full((5000, 10_000), 210, np.uint8)
    image[1000:4000, 4900:5200] = 30
    tracemalloc.start()
    ready = digits.prepare(image)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert ready[:, 12:16].any()
    assert peak < image.nbytes
