"""Synthetic digits: equal bits for equal seeds; size, centre and balance like MNIST."""

import hashlib
import os
import subprocess
import sys

import numba
import numpy as np
import pytest

from tinycnn.data import Dataset, synthetic_dataset, synthetic_digits
from tinycnn.data._skeletons import STYLES

# Without the compiler the kernel is thousands of times slower.
N = 30 if numba.config.DISABLE_JIT else 3000


@pytest.fixture(scope="module")
def digits():
    return synthetic_digits(N, rng=3)


def fingerprint(images, labels):
    return hashlib.sha256(images.tobytes() + labels.tobytes()).hexdigest()


def test_shapes_and_dtypes(digits):
    images, labels = digits
    assert images.shape == (N, 28, 28)
    assert images.dtype == np.uint8
    assert labels.shape == (N,)
    assert labels.dtype == np.int64


def test_labels_are_balanced_and_shuffled(digits):
    _, labels = digits
    assert np.bincount(labels).tolist() == [N // 10] * 10
    assert len(set(labels[:30])) > 3
    assert set(np.bincount(synthetic_digits(25, rng=0)[1]).tolist()) == {2, 3}


def test_every_image_is_sized_and_centred_like_mnist(digits):
    images, _ = digits
    ink = images.astype(float)
    mass = ink.sum((1, 2))
    position = np.arange(28)
    for axis in (1, 2):
        profile = ink.sum(3 - axis)
        centre = (profile * position).sum(1) / mass
        inked = profile > 0
        first, last = inked.argmax(1), 27 - inked[:, ::-1].argmax(1)
        assert (last - first < 20).all()
        # Shifts are whole pixels, which leaves up to half a pixel, and end at the edge of the image.
        at_edge = np.minimum(first, 27 - last) == 0
        assert (np.abs(centre - 14)[~at_edge] <= 0.5 + 1e-9).all()
        assert at_edge.mean() < 0.02
    assert (images.reshape(N, -1).max(1) > 200).all()


def test_statistics_are_near_those_of_mnist(digits):
    images, labels = digits
    assert 0.11 < images.mean() / 255 < 0.16  # MNIST: 0.1307
    assert 0.28 < images.std() / 255 < 0.34  # MNIST: 0.3081
    mean = [images[labels == digit].mean() for digit in range(10)]
    assert np.argmin(mean) == 1


def test_no_two_images_are_equal(digits):
    assert len({image.tobytes() for image in digits[0]}) == N


@pytest.mark.parametrize(
    "again",
    [3, np.random.SeedSequence(3), np.random.PCG64(3), np.random.default_rng(3)],
    ids=lambda r: type(r).__name__,
)
def test_equal_seeds_give_equal_bits(digits, again):
    assert fingerprint(*synthetic_digits(N, rng=again)) == fingerprint(*digits)


def test_other_seeds_and_later_draws_differ():
    rng = np.random.default_rng(0)
    prints = {fingerprint(*synthetic_digits(20, rng=r)) for r in (rng, rng, 1, None, None)}
    assert len(prints) == 5


def test_any_number_of_threads_gives_the_same_bits(digits):
    most = numba.config.NUMBA_NUM_THREADS
    if most < 2:
        pytest.skip("needs two threads")
    before = numba.get_num_threads()
    try:
        for threads in (1, 2):
            numba.set_num_threads(threads)
            assert fingerprint(*synthetic_digits(N, rng=3)) == fingerprint(*digits)
    finally:
        numba.set_num_threads(before)


def test_another_process_gives_the_same_bits():
    code = (
        "import hashlib; from tinycnn.data import synthetic_digits; i, l = synthetic_digits(20, rng=5);"
        "print(hashlib.sha256(i.tobytes() + l.tobytes()).hexdigest())"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == fingerprint(*synthetic_digits(20, rng=5))


@pytest.mark.parametrize(("n", "error"), [(0, ValueError), (-1, ValueError), (1.5, TypeError), (True, TypeError)])
def test_sizes_are_checked(n, error):
    with pytest.raises(error, match="n must be"):
        synthetic_digits(n)
    with pytest.raises(error, match="n_test must be"):
        synthetic_dataset(10, n)


def test_the_data_set():
    data = synthetic_dataset(30, 20, rng=1)
    assert isinstance(data, Dataset)
    assert (data.name, data.classes) == ("synthetic", tuple("0123456789"))
    assert (len(data.train_images), len(data.test_labels)) == (30, 20)
    assert data.sha256 == synthetic_dataset(30, 20, rng=1).sha256 != synthetic_dataset(30, 20, rng=2).sha256
    # Streams are independent: the test part does not depend on how much is drawn for training.
    assert np.array_equal(data.test_images, synthetic_dataset(10, 20, rng=1).test_images)
    assert not np.array_equal(data.train_images[:20], data.test_images)
    rng = np.random.default_rng(1)
    assert synthetic_dataset(10, 10, rng).sha256 != synthetic_dataset(10, 10, rng).sha256


def test_every_digit_has_several_styles():
    assert len(STYLES) == 10
    assert all(3 <= len(styles) <= 10 for styles in STYLES)
    for styles in STYLES:
        for frequency, strokes in styles:
            assert frequency > 0
            assert all(len(stroke) >= 2 for stroke in strokes)
