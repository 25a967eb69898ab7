"""Augmentation: each kernel against SciPy or plain NumPy, the random numbers against Python's integers, and batches."""

import numpy as np
import pytest
from hypothesis import given, strategies as st
from PIL import Image
from reference import blank
from scipy import ndimage

from tinycnn import (
    SGD,
    ColorJitter,
    CrossEntropyLoss,
    DeviceDataset,
    DivergedError,
    ElasticTransform,
    Flatten,
    Linear,
    RandomAffine,
    Sequential,
    augment,
    evaluate,
    fit,
    kernels,
    scalars,
)
from tinycnn.dataset import DataLoader

both_dtypes = pytest.mark.parametrize("dtype", [np.float32, np.float64])
devices = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
seeds = st.integers(0, 2**32 - 1)
IDENTITY = (0.0, (0.0, 0.0), (1.0, 1.0), (1.0, 1.0), 0.0)  # the ranges of the identity
OFFSET = np.array([0])  # images of the batch before these
RANGES = (30.0, (2.0, 3.0), (0.8, 1.3), (0.7, 1.1), 20.0)


def counter(step=7):
    return np.array([step])


def near(got, want, dtype, scale=1.0):
    np.testing.assert_allclose(got, want, rtol=0, atol=(2e-6 if dtype == np.float32 else 1e-13) * scale)


# --- random numbers ---------------------------------------------------------------------------------------------------


def mix(x):
    """SplitMix64's output function, in Python's integers."""
    x = x * 0x9E3779B97F4A7C15 % 2**64
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ x >> 27) * 0x94D049BB133111EB % 2**64
    return x ^ x >> 31


def word(step, seed, image, draw):
    return mix((mix((mix((mix(seed) + step) % 2**64) + image) % 2**64) + draw) % 2**64)


def upper(word):
    return (2 * (word >> 40) + 1 - 2**24) / 2**24


def lower(word):
    return (2 * (word >> 8 & 0xFFFFFF) + 1 - 2**24) / 2**24


def noise(shape, step, seed):
    """The noise that elastic_field smooths, (N, 2, H, W)."""
    N, _, H, W = shape
    words = [[word(step, seed, n, k) for k in range(H * W)] for n in range(N)]
    return np.array([[[f(w) for w in row] for f in (upper, lower)] for row in words]).reshape(shape)


def test_sine_and_cosine():
    x = np.linspace(-np.pi, np.pi, 100_001, dtype=np.float32)
    for got, want in ((scalars.sin32(x), np.sin), (scalars.cos32(x), np.cos)):
        assert got.dtype == np.float32
        assert abs(got - want(x.astype(np.float64))).max() < 5e-7
    assert scalars.sin32(np.float32(0)) == 0
    assert scalars.cos32(np.float32(0)) == 1


# --- affine maps ------------------------------------------------------------------------------------------------------


def affine_by_hand(step, seed, image, degrees, translate, scale, squeeze, shear):
    """(amounts, matrix); the matrix maps output to input, so it is the inverse of the map of points (x, y)."""
    draws = [upper(word(step, seed, image, k)) for k in range(6)]
    angle, slant = np.radians(degrees * draws[0]), np.radians(shear * draws[5])
    move = np.array([translate[0] * draws[1], translate[1] * draws[2]])
    size, e = (sum(r) / 2 + (r[1] - r[0]) / 2 * d for r, d in zip((scale, squeeze), draws[3:5], strict=True))
    turned = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    sheared = np.array([[1, -np.tan(slant)], [0, 1]])
    forward = size * turned @ sheared @ np.diag([e, 1 / e])
    inverse = np.linalg.inv(forward)
    x, y = np.column_stack([inverse, -inverse @ move])
    matrix = np.array([[y[1], y[0], y[2]], [x[1], x[0], x[2]]])  # to (row, column)
    return (angle, *move, size, e, slant), matrix


@both_dtypes
@pytest.mark.parametrize("only", [None, 0, 1, 2, 3, 4])
def test_random_affine(only, dtype):
    ranges = [r if only in (None, k) else still for k, (r, still) in enumerate(zip(RANGES, IDENTITY, strict=True))]
    matrices = blank((9, 2, 3), dtype)
    kernels.random_affine(matrices, counter(41), OFFSET, 2**63 - 5, *ranges)
    want = np.array([affine_by_hand(41, 2**63 - 5, n, *ranges)[1] for n in range(9)])
    near(matrices, want, dtype, 4)
    assert abs(want - np.eye(2, 3)).max() > 0.1


def test_random_affine_covers_its_ranges():
    N = 20_000
    amounts = np.array([affine_by_hand(1, 5, n, *RANGES)[0] for n in range(N)])
    matrices = blank((N, 2, 3), np.float64)
    kernels.random_affine(matrices, counter(1), OFFSET, 5, *RANGES)
    # The kernel's own determinant: 1/size**2, whatever the rest.
    np.testing.assert_allclose(np.linalg.det(matrices[:, :, :2]), amounts[:, 3] ** -2, rtol=1e-10)
    low = [-np.radians(30), -2, -3, 0.8, 0.7, -np.radians(20)]
    high = [np.radians(30), 2, 3, 1.3, 1.1, np.radians(20)]
    for values, a, b in zip(amounts.T, low, high, strict=True):
        assert a <= values.min() < a + 0.001 * (b - a)
        assert b - 0.001 * (b - a) < values.max() <= b
        counts = np.histogram(values, 10, (a, b))[0]
        assert abs(counts - N / 10).max() < 5 * np.sqrt(N / 10)
    correlations = np.corrcoef(amounts.T) - np.eye(6)
    assert abs(correlations).max() < 5 / np.sqrt(N)


@both_dtypes
def test_the_identity_is_exact(dtype):
    matrices = blank((5, 2, 3), dtype)
    kernels.random_affine(matrices, counter(), OFFSET, 3, *IDENTITY)
    np.testing.assert_array_equal(matrices, np.broadcast_to(np.eye(2, 3), (5, 2, 3)))


def test_part_of_a_batch_has_the_numbers_of_the_batch():
    x, colours = np.random.default_rng(0).random((9, 3, 5, 4)), np.ones(3)
    results = []
    for part in (slice(0, 9), slice(4, 9)):
        offset, n = np.array([part.start]), part.stop - part.start
        matrices, field, pixels = blank((n, 2, 3), np.float64), blank((n, 2, 5, 4), np.float64), x[part].copy()
        kernels.random_affine(matrices, counter(), offset, 3, *RANGES)
        kernels.elastic_field(field, np.ones(1), counter(), offset, 3, 34.0)
        kernels.jitter(pixels, counter(), offset, 3, 0.5, 0.5, colours, 0 * colours)
        results.append((matrices, field, pixels))
    for whole, part in zip(*results, strict=True):
        np.testing.assert_array_equal(part, whole[4:])


def test_other_steps_seeds_and_images_have_other_numbers():
    draws = []
    for step, seed in ((0, 0), (1, 0), (0, 1)):
        matrices = blank((3, 2, 3), np.float64)
        kernels.random_affine(matrices, counter(step), OFFSET, seed, *RANGES)
        draws += [m.tobytes() for m in matrices]
    assert len(set(draws)) == 9


# --- elastic fields ---------------------------------------------------------------------------------------------------


@both_dtypes
@pytest.mark.parametrize(
    ("H", "W", "sigma"), [(28, 28, 4), (7, 12, 1.3), (9, 4, 6), (1, 5, 0.5), (5, 1, 0.1), (13, 11, 2.7)]
)
def test_elastic_field(H, W, sigma, dtype):
    shape, weights = (3, 2, H, W), ElasticTransform(sigma=sigma).weights()
    field = blank(shape, dtype)
    kernels.elastic_field(field, weights.astype(dtype), counter(9), OFFSET, 77, 34.0)
    rough = noise(shape, 9, 77)
    want = 34 * ndimage.gaussian_filter(rough, (0, 0, sigma, sigma), mode="constant", truncate=4)
    near(field, want, dtype, 34)
    assert want.any()


def test_the_weights_are_scipys():
    for sigma in (0.1, 1, 2.7, 4):
        weights = ElasticTransform(sigma=sigma).weights()
        R = len(weights) - 1
        impulse = np.zeros(2 * R + 3)
        impulse[R + 1] = 1
        np.testing.assert_allclose(
            ndimage.gaussian_filter(impulse, sigma, mode="constant", truncate=4)[R + 1 : 2 * R + 2], weights, rtol=1e-12
        )


def test_noise_is_uniform_and_independent():
    N, side = 30, 40
    field = blank((N, 2, side, side), np.float64)
    kernels.elastic_field(field, np.ones(1), counter(2), OFFSET, 6, 1.0)
    assert abs(field).max() < 1
    counts = np.histogram(field, 20, (-1, 1))[0]
    assert abs(counts - field.size / 20).max() < 5 * np.sqrt(field.size / 20)
    flat = field.reshape(N, 2, -1)
    pairs = [(flat[:, 0], flat[:, 1]), (flat[1:], flat[:-1]), (flat[..., 1:], flat[..., :-1])]
    pairs.append((flat[..., side:], flat[..., :-side]))
    for a, b in pairs:
        assert abs(np.corrcoef(a.ravel(), b.ravel())[0, 1]) < 5 / np.sqrt(a.size)
    later = blank(field.shape, np.float64)
    kernels.elastic_field(later, np.ones(1), counter(3), OFFSET, 6, 1.0)
    assert abs(np.corrcoef(field.ravel(), later.ravel())[0, 1]) < 5 / np.sqrt(field.size)


# --- interpolation ----------------------------------------------------------------------------------------------------


def warp_by_scipy(x, size, matrices, field, background):
    N, C, H, W = x.shape
    result = np.empty((N, C, *size))
    middle, middle_x = np.array([[(n - 1) / 2] for n in size]), np.array([[(H - 1) / 2], [(W - 1) / 2]])
    for n in range(N):
        places = np.indices(size).reshape(2, -1) - middle
        if len(matrices):
            places = matrices[n, :, :2] @ places + matrices[n, :, 2:]
        places = places + middle_x
        if len(field):
            places = places + field[n].reshape(2, -1)
        for c in range(C):
            values = ndimage.map_coordinates(x[n, c], places, order=1, mode="grid-constant", cval=background[c])
            result[n, c] = values.reshape(size)
    return result


@both_dtypes
@given(
    channels=st.integers(1, 3), size=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    out=st.tuples(st.integers(1, 9), st.integers(1, 9)), seed=seeds, turned=st.booleans(), moved=st.booleans(),
)  # fmt: skip
def test_warp(channels, size, out, seed, turned, moved, dtype):
    rng = np.random.default_rng(seed)
    x, background = rng.random((2, channels, *size)), rng.random(channels)
    matrices = np.eye(2, 3) + rng.normal(0, 0.5, (2 if turned else 0, 2, 3))
    field = rng.normal(0, 2, (2 if moved else 0, 2, *out))
    arrays = [a.astype(dtype) for a in (x, matrices, field, background)]
    y = blank((2, channels, *out), dtype)
    kernels.warp(y, *arrays)
    want = warp_by_scipy(arrays[0].astype(np.float64), out, *(a.astype(np.float64) for a in arrays[1:]))
    near(y, want, dtype, 20)  # coordinates up to 10 are rounded


def test_warp_is_scipys_affine_transform():
    rng = np.random.default_rng(0)
    x, matrix = rng.random((1, 1, 9, 6)), rng.normal(0, 1, (1, 2, 3))
    y, middle = blank(x.shape, np.float64), np.array([4, 2.5])
    kernels.warp(y, x, matrix, np.empty((0, 2, 9, 6)), np.array([0.3]))
    linear = matrix[0, :, :2]
    offset = matrix[0, :, 2] + middle - linear @ middle
    want = ndimage.affine_transform(x[0, 0], linear, offset, order=1, mode="grid-constant", cval=0.3)
    np.testing.assert_allclose(y[0, 0], want, rtol=0, atol=1e-13)
    transposed = ndimage.affine_transform(x[0, 0], linear.T, offset, order=1, mode="grid-constant", cval=0.3)
    assert abs(want - transposed).max() > 0.1


@both_dtypes
def test_the_example_of_simard_steinkraus_and_platt(dtype):
    """A is at (0, 0), its displacement 1.75 to the right and 0.5 down; the four greys around give 6, 8 and 7."""
    x, field = np.full((1, 1, 4, 5), 100, dtype), np.zeros((1, 2, 4, 5), dtype)
    x[0, 0, 1:3, 2:4] = [[3, 7], [5, 9]]
    field[0, :, 1, 1] = 0.5, 1.75
    y = blank(x.shape, dtype)
    kernels.warp(y, x, np.empty((0, 2, 3), dtype), field, np.zeros(1, dtype))
    assert y[0, 0, 1, 1] == 7
    field[0, 0, 1, 1] = 0
    kernels.warp(y, x, np.empty((0, 2, 3), dtype), field, np.zeros(1, dtype))
    assert y[0, 0, 1, 1] == 6
    field[0, 0, 1, 1] = 1
    kernels.warp(y, x, np.empty((0, 2, 3), dtype), field, np.zeros(1, dtype))
    assert y[0, 0, 1, 1] == 8


@pytest.mark.parametrize("far", [1e30, -1e30, np.inf, -np.inf, np.nan])
@pytest.mark.parametrize("axis", [0, 1])
def test_far_outside_the_image_is_the_background(far, axis):
    x, field = np.ones((1, 1, 3, 4), np.float32), np.zeros((1, 2, 3, 4), np.float32)
    field[0, axis, 1, 2] = far
    y = blank(x.shape, np.float32)
    kernels.warp(y, x, np.empty((0, 2, 3), np.float32), field, np.array([0.25], np.float32))
    want = np.ones((3, 4), np.float32)
    want[1, 2] = 0.25
    np.testing.assert_array_equal(y[0, 0], want)


@pytest.mark.parametrize(
    ("matrix", "want"),
    [
        ([[0, -1, 0], [1, 0, 0]], lambda x: np.rot90(x, -1)),  # a quarter turn clockwise
        ([[1, 0, -1], [0, 1, 0]], lambda x: np.pad(x, ((1, 0), (0, 0)))[:-1]),  # one pixel down
        ([[1, 0, 0], [0, 1, -1]], lambda x: np.pad(x, ((0, 0), (1, 0)))[:, :-1]),  # one pixel to the right
    ],
)
def test_whole_pixels(matrix, want):
    x = np.random.default_rng(0).random((1, 1, 5, 5))
    y = blank(x.shape, np.float64)
    kernels.warp(y, x, np.array([matrix], float), np.empty((0, 2, 5, 5)), np.zeros(1))
    np.testing.assert_array_equal(y[0, 0], want(x[0, 0]))


@pytest.mark.parametrize(
    ("ranges", "draw", "shown"),
    [
        ((60.0, *IDENTITY[1:]), 0, lambda y, x: np.arctan2(y, x)),  # clockwise: a point on the right goes down
        ((0.0, (6.0, 0.0), *IDENTITY[2:]), 1, lambda y, x: x - 8),  # to the right
        ((0.0, (0.0, 6.0), *IDENTITY[2:]), 2, lambda y, x: y),  # down
        ((*IDENTITY[:2], (0.5, 1.5), *IDENTITY[3:]), 3, lambda y, x: x - 8),  # larger: further from the centre
        ((*IDENTITY[:3], (0.5, 1.5), 0.0), 4, lambda y, x: x - 8),  # wider
    ],
)
def test_the_signs_of_the_amounts(ranges, draw, shown):
    """Where a blob 8 pixels to the right of the centre is after the map."""
    i, j = np.indices((41, 41)) - 20.0
    x = np.exp(-(i**2 + (j - 8) ** 2) / 4)[None, None].repeat(12, 0)
    matrices, y = blank((12, 2, 3), np.float64), blank(x.shape, np.float64)
    kernels.random_affine(matrices, counter(), OFFSET, 1, *ranges)
    kernels.warp(y, x, matrices, np.empty((0, 2, 41, 41)), np.zeros(1))
    for n in range(12):
        weight = y[n, 0].sum()
        at = (y[n, 0] * i).sum() / weight, (y[n, 0] * j).sum() / weight
        assert np.sign(shown(*at)) == np.sign(upper(word(7, 1, n, draw)))


# --- brightness and contrast ------------------------------------------------------------------------------------------


@both_dtypes
@pytest.mark.parametrize(("brightness", "contrast"), [(0.4, 0), (0, 0.6), (0.5, 0.5), (2.5, 3)])
def test_jitter(brightness, contrast, dtype):
    rng = np.random.default_rng(0)
    pixels, scale, shift = rng.random((40, 2, 5, 7)), np.array([3.0, 2.0]), np.array([-0.4, 0.5])
    x = (pixels * scale[:, None, None] + shift[:, None, None]).astype(dtype)
    kernels.jitter(x, counter(), OFFSET, 8, brightness, contrast, scale.astype(dtype), shift.astype(dtype))
    factors = []
    for n in range(40):
        draws = [(upper(word(7, 8, n, k)) + 1) / 2 for k in range(2)]
        amounts = zip((brightness, contrast), draws, strict=True)
        b, c = (max(0, 1 - a) + (1 + a - max(0, 1 - a)) * d for a, d in amounts)
        bright = np.clip(pixels[n] * b, 0, 1)
        want = np.clip(c * bright + (1 - c) * bright.mean(), 0, 1)
        near(x[n], want * scale[:, None, None] + shift[:, None, None], dtype, 10)
        factors.append((b, c))
    widths = [a + min(a, 1) for a in (brightness, contrast)]
    assert (np.ptp(factors, axis=0) >= np.multiply(0.85, widths)).all()  # the draws cover the range


# --- batches ----------------------------------------------------------------------------------------------------------

ALL = RandomAffine(15, (2, 2), (0.9, 1.1), (0.9, 1.1), 10), ElasticTransform(), ColorJitter(0.3, 0.3)


@pytest.fixture(scope="module")
def images():
    rng = np.random.default_rng(3)
    return rng.integers(0, 256, (20, 2, 9, 8), dtype=np.uint8), rng.integers(0, 4, 20)


def take(loader, n, dtype=np.float32):
    x = loader.ops.empty((n, *loader.data.image_shape), dtype)
    labels = loader.next(x)
    return np.array(loader.ops.to_host(x)), np.array(loader.ops.to_host(labels))


@both_dtypes
@pytest.mark.parametrize("transforms", [(), RandomAffine(), (ElasticTransform(alpha=0),), ColorJitter()])
def test_transformations_that_do_nothing_leave_every_bit(images, transforms, dtype):
    for padding in (0, (1, 2)):
        batches = DeviceDataset(*images, augment=transforms, padding=padding)
        x, labels = take(DataLoader(batches, augment=True), 12, dtype)
        plain = np.empty_like(x)
        batches.gather(plain, np.arange(12))
        assert x.tobytes() == plain.tobytes()
        np.testing.assert_array_equal(labels, images[1][:12])


@devices
def test_a_batch_is_the_result_of_the_kernels(images, device):
    mean, std, order = [0.1, 0.4], [0.5, 2.0], np.random.default_rng(0).permutation(20)
    batches = DeviceDataset(*images, mean=mean, std=std, padding=1, augment=ALL[::-1], seed=5, device=device)
    loader = DataLoader(batches, augment=True)
    loader.start_epoch(order)
    take(loader, 3)  # check the second batch
    x, _ = take(loader, 7)
    affine, elastic, jitter = (int(s) for s in np.random.default_rng(5).integers(2**63, size=3))
    plain = blank(x.shape, np.float32)
    on_device = plain if device == "cpu" else batches.ops.to_device(plain)
    batches.gather(on_device, batches.ops.to_device(order[:7]))
    plain = plain if device == "cpu" else np.array(batches.ops.to_host(on_device))
    matrices, field = blank((7, 2, 3), np.float32), blank((7, 2, 11, 10), np.float32)
    kernels.random_affine(matrices, counter(2), OFFSET, affine, 15.0, (2.0, 2.0), (0.9, 1.1), (0.9, 1.1), 10.0)
    kernels.elastic_field(field, ElasticTransform().weights().astype(np.float32), counter(2), OFFSET, elastic, 34.0)
    want, shift, scale = blank(x.shape, np.float32), -np.divide(mean, std), 1 / np.array(std)
    kernels.warp(want, plain, matrices, field, shift.astype(np.float32))
    kernels.jitter(want, counter(2), OFFSET, jitter, 0.3, 0.3, scale.astype(np.float32), shift.astype(np.float32))
    near(x, want, np.float32, 0 if device == "cpu" else 50)
    pixels = want * np.reshape(std, (2, 1, 1)) + np.reshape(mean, (2, 1, 1))
    assert pixels.min() > -1e-6
    assert pixels.max() < 1 + 1e-6


@devices
def test_batches_and_epochs_differ_and_an_epoch_can_be_repeated(images, device):
    loader = DataLoader(DeviceDataset(*images, augment=ALL, device=device), augment=True)
    order = np.zeros(20, np.int64)  # always the same image
    epochs = []
    for again in (False, False, True):
        loader.start_epoch(order, again)
        epochs.append([take(loader, 10)[0] for _ in range(2)])
    first, second, repeated = epochs
    assert len({x.tobytes() for batch in (*first, *second) for x in batch}) == 40
    assert np.array(second).tobytes() == np.array(repeated).tobytes()


def test_the_seed_alone_decides(images):
    runs = []
    for seed in (0, 1, 1):
        loader = DataLoader(DeviceDataset(*images, augment=ALL, seed=seed), augment=True)
        runs.append(b"".join(take(loader, n)[0].tobytes() for n in (4, 9, 4)))
    assert runs[0] != runs[1]
    assert runs[1] == runs[2]


def test_batches_of_any_size_and_dtype_in_turn(images):
    loader = DataLoader(DeviceDataset(*images, augment=ALL), augment=True)
    for dtype in (np.float32, np.float64, np.float32):
        for n in (5, 12, 1):
            assert np.isfinite(take(loader, n, dtype)[0]).all()


def small_model():
    return Sequential(Flatten(), Linear(144, 4), rng=0)


def test_evaluation_is_not_augmented(images):
    model = small_model()
    plain, augmented = DeviceDataset(*images), DeviceDataset(*images, augment=ALL)
    assert evaluate(model, plain)[0] == evaluate(model, augmented)[0]
    assert augmented.augmentation.batch_count == 0


def learn(images, **options):
    model = small_model()
    history = fit(
        model, CrossEntropyLoss(), SGD(model, 0.1), DeviceDataset(*images, **options), epochs=3, batch_size=8, rng=0,
        progress=False,
    )  # fmt: skip
    return model.theta.tobytes(), [record["train_loss"] for record in history]


def test_training_is_augmented_and_has_the_same_bits_on_any_number_of_threads(images, threads):
    runs = []
    for count in (1, 2, 2):
        threads(count)
        runs.append(learn(images, augment=ALL))
    assert runs[0] == runs[1] == runs[2]
    assert runs[0] != learn(images)
    assert runs[0] != learn(images, augment=ALL, seed=1)


def test_a_diverged_epoch_is_repeated_with_the_same_images(images, monkeypatch):
    """An image of the third epoch is infinite.  The epoch is repeated with the same images."""
    batches, model, seen = DeviceDataset(*images, augment=ALL), small_model(), []
    monkeypatch.setattr(kernels, "capture", lambda step: step)  # Python runs every step
    monkeypatch.setattr(kernels, "precompile", lambda step, _: None)
    original_next = DataLoader.next

    def next_batch(self, x):
        target = original_next(self, x)
        seen.append(np.array(x))
        if len(seen) >= 8 and x.tobytes() == seen[7].tobytes():  # the second step of the third epoch, repeated or not
            x[...] = np.inf
        return target

    monkeypatch.setattr(DataLoader, "next", next_batch)
    with pytest.raises(DivergedError) as raised:
        fit(model, CrossEntropyLoss(), SGD(model, 0.1), batches, epochs=5, batch_size=8, rng=0, progress=False)
    assert (raised.value.epoch, raised.value.step) == (3, 8)
    assert len(seen) in (10, 11)  # after a slow step `fit` reads the loss within the epoch
    for first, repeated in zip(seen[6:8], seen[-2:], strict=True):
        assert first.tobytes() == repeated.tobytes()
    assert seen[3].tobytes() != seen[6].tobytes()


def test_only_the_first_step_allocates_arrays(images, monkeypatch):
    """A captured step must not.  The first batch of a size allocates the arrays."""
    loader = DataLoader(DeviceDataset(*images, augment=ALL), augment=True)
    take(loader, 8)
    for name in ("empty", "to_device", "to_host", "copy_to"):
        monkeypatch.setattr(loader.ops, name, None)
    x = np.empty((8, *loader.data.image_shape), np.float32)
    loader.next(x)
    loader.next(x[:3])


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: RandomAffine(degrees=-1), ValueError, "degrees must be at least 0"),
        (lambda: RandomAffine(degrees=181), ValueError, "degrees"),
        (lambda: RandomAffine(degrees="a"), TypeError, "degrees must be a number"),
        (lambda: RandomAffine(degrees=np.nan), ValueError, "degrees"),
        (lambda: RandomAffine(translate=2), ValueError, "translate must be a pair"),
        (lambda: RandomAffine(translate=(1, -2)), ValueError, "translate must be at least 0, got -2"),
        (lambda: RandomAffine(scale=1.1), ValueError, "scale must be a pair"),
        (lambda: RandomAffine(scale=(0, 1)), ValueError, "scale must be .* 0 < low <= high"),
        (lambda: RandomAffine(scale=(1.2, 1.1)), ValueError, "scale"),
        (lambda: RandomAffine(squeeze=(1, 2, 3)), ValueError, "squeeze"),
        (lambda: RandomAffine(squeeze=("a", 2)), TypeError, "squeeze"),
        (lambda: RandomAffine(shear=90), ValueError, "shear must be at least 0 and below 90"),
        (lambda: ElasticTransform(alpha=-1), ValueError, "alpha"),
        (lambda: ElasticTransform(sigma=0), ValueError, "sigma must be positive"),
        (lambda: ElasticTransform(sigma=None), TypeError, "sigma"),
        (lambda: ColorJitter(brightness=-0.1), ValueError, "brightness"),
        (lambda: ColorJitter(contrast=np.inf), ValueError, "contrast"),
        (lambda: plain_batches(augment=ColorJitter), TypeError, "augment must be a tuple of RandomAffine"),
        (lambda: plain_batches(augment=(RandomAffine(), "flip")), TypeError, "got 'flip'"),
        (lambda: plain_batches(augment=(RandomAffine(), RandomAffine())), ValueError, "one RandomAffine"),
        (lambda: plain_batches(seed=-1), ValueError, "seed must be at least 0"),
        (lambda: plain_batches(seed=None), TypeError, "seed must be an integer"),
        (lambda: augment.resize(np.zeros((2, 3, 3)), 4), TypeError, "images must be uint8"),
        (lambda: augment.resize(np.zeros((3, 3), np.uint8), 4), ValueError, "images must have 3 axes"),
        (lambda: augment.resize(np.zeros((1, 3, 3), np.uint8), 0), ValueError, "size must be at least 1"),
    ],
)
def test_bad_arguments_are_refused_by_name(make, error, words):
    with pytest.raises(error, match=words):
        make()


def plain_batches(**options):
    return DeviceDataset(np.zeros((2, 3, 3)), np.zeros(2, int), **options)


# --- resizing ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("H", "W", "size"), [(28, 28, 32), (28, 28, 28), (5, 9, 20), (1, 1, 3), (20, 3, 21)])
def test_resize_is_pillows(H, W, size):
    images = np.random.default_rng(0).integers(0, 256, (4, H, W), dtype=np.uint8)
    got = augment.resize(images, size)
    assert got.dtype == np.uint8
    for image, ours in zip(images, got, strict=True):
        theirs = np.asarray(Image.fromarray(image.astype(np.float32)).resize((size, size), Image.Resampling.BILINEAR))
        assert abs(ours - theirs).max() < 0.501  # Pillow does not round
    if H == W == size:
        np.testing.assert_array_equal(got, images)


def test_resize_of_more_images_than_a_chunk():
    images = np.random.default_rng(0).integers(0, 256, (2100, 3, 3), dtype=np.uint8)
    got = augment.resize(images, 5)
    np.testing.assert_array_equal(got[[0, 999, 1000, 2099]], augment.resize(images[[0, 999, 1000, 2099]], 5))


# --- the same bits for any number of threads: one row for every kernel of this file -----------------------------------


def _case(name, dtype):
    rng = np.random.default_rng(5)
    matrices, weights = blank((50, 2, 3), dtype), ElasticTransform(sigma=2).weights().astype(dtype)
    field = blank((50, 2, 13, 11), dtype)
    if name == "random_affine":
        return kernels.random_affine, (matrices, counter(), OFFSET, 3, *RANGES), (0,)
    if name == "elastic_field":
        return kernels.elastic_field, (field, weights, counter(), OFFSET, 3, 34.0), (0,)
    kernels.random_affine(matrices, counter(), OFFSET, 3, *RANGES)
    kernels.elastic_field(field, weights, counter(), OFFSET, 3, 34.0)
    x, colours = rng.random((50, 2, 9, 10)).astype(dtype), np.array([0.5, 2.0], dtype)
    if name == "warp":
        return kernels.warp, (blank((50, 2, 13, 11), dtype), x, matrices, field, colours), (0,)
    return kernels.jitter, (x, counter(), OFFSET, 3, 0.5, 0.5, colours, -colours), (0,)


CASES = ["random_affine", "elastic_field", "jitter", "warp"]


@both_dtypes
@pytest.mark.parametrize("name", CASES)
def test_same_bits(name, dtype, same_bits):
    same_bits(lambda: _case(name, dtype))
