"""Targets that are no class numbers, sample weights, the metric of each loss, and what is refused."""

import copy
import pickle

import numpy as np
import pytest

from tinycnn import (
    SGD,
    Adam,
    BCEWithLogitsLoss,
    ColorJitter,
    Conv2d,
    CrossEntropyLoss,
    DeviceDataset,
    Flatten,
    HuberLoss,
    L1Loss,
    Linear,
    LogSoftmax,
    MSELoss,
    NLLLoss,
    OneHotMSELoss,
    RandomAffine,
    Sequential,
    evaluate,
    fit,
    lecun98,
    losses,
    plot,
    train,
    train_step,
)
from tinycnn.dataset import DataLoader
from tinycnn.kernels._capture import CapturedStep

N, K = 40, 3
RNG = np.random.default_rng(0)
IMAGES = RNG.standard_normal((N, 4, 4)).astype(np.float32)
CLASSES, VALUES = RNG.integers(0, K, N), RNG.standard_normal((N, K))
LABELS, SHARES = RNG.integers(0, 2, (N, K)), RNG.dirichlet(np.ones(K), N)
WEIGHTS = RNG.uniform(0, 3, N) * (RNG.random(N) < 0.8)
CLASS_WEIGHTS, REDUCTIONS = np.array([0.5, 1.0, 2.0]), ("mean", "sum", "none")
ENDS = {NLLLoss: [LogSoftmax()]}


def net(*last, outputs=K, dtype=np.float64):
    return Sequential(Flatten(), Linear(16, outputs), *copy.deepcopy(last), input_shape=(1, 4, 4), rng=1, dtype=dtype)


def dataset(targets, images=IMAGES, **options):
    return DeviceDataset(images, targets, **{"mean": 0, "std": 1} | options)


def log_softmax(x):
    return x - np.log(np.exp(x).sum(1, keepdims=True))


def cross_entropy(x, targets):
    """(numbers of each image, weight of each image in a mean)"""
    rows = np.eye(K)[targets]
    return -(rows * CLASS_WEIGHTS * log_softmax(x)).sum(1), CLASS_WEIGHTS[targets] * (targets != 1)


def soft_cross_entropy(x, targets):
    smooth = 0.9 * targets + 0.1 / K
    return -(smooth * CLASS_WEIGHTS * log_softmax(x)).sum(1), np.ones(len(x))


def binary(x, t):
    loss = CLASS_WEIGHTS * ((1 - t) * np.logaddexp(0, x) + np.array([3, 1, 0.5]) * t * np.logaddexp(0, -x))
    return loss, np.ones(len(x))


def huber(x, t):
    e = abs(x.reshape(t.shape) - t)
    return np.where(e <= 0.4, e**2 / 2, 0.4 * (e - 0.2)), np.ones(len(x))


def squares(x, t):
    return (x.reshape(len(x), -1) - t.reshape(len(x), -1)) ** 2, np.ones(len(x))


# name: (loss of a reduction, targets, outputs, values and weights of images from the model's outputs, metric)
TRAINED = {
    "mse": (MSELoss, VALUES, K, squares, "mae"),
    "l1": (L1Loss, VALUES, K, lambda x, t: (abs(x - t), np.ones(len(x))), "mae"),
    "huber of one number": (lambda r: HuberLoss(r, 0.4), VALUES[:, 0], 1, huber, "mae"),
    "the image": (MSELoss, None, 16, squares, "mae"),
    "bce": (
        lambda r: BCEWithLogitsLoss(CLASS_WEIGHTS, r, [3, 1, 0.5]), LABELS.astype(bool), K, binary, "binary_accuracy",
    ),
    "probabilities": (
        lambda r: CrossEntropyLoss(CLASS_WEIGHTS, reduction=r, label_smoothing=0.1), SHARES, K, soft_cross_entropy,
        "accuracy",
    ),
    "classes": (lambda r: CrossEntropyLoss(CLASS_WEIGHTS, 1, r), CLASSES, K, cross_entropy, "accuracy"),
    "log-probabilities": (lambda r: NLLLoss(CLASS_WEIGHTS, 1, r), CLASSES, K, cross_entropy, "accuracy"),
}  # fmt: skip


def expected_loss(case, reduction, y, targets, weights):
    """The loss of all images together, from its formula."""
    values, c = TRAINED[case][3](y, targets)
    values = values if TRAINED[case][4] == "accuracy" else values.reshape(len(y), -1)
    if values.ndim > 1:
        values = values.mean(1) if reduction == "mean" else values.sum(1)
    if TRAINED[case][4] == "accuracy" and c.min() == 0:
        values = values * (c > 0)  # the ignored class
    weights = np.ones(len(y)) if weights is None else weights
    return (weights * values).sum() / (weights * c).sum() if reduction == "mean" else (weights * values).sum()


@pytest.mark.parametrize("weights", [None, WEIGHTS], ids=["", "weighted"])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("case", TRAINED)
def test_the_loss_of_a_data_set(case, reduction, weights):
    """Its formula, for any batch size, in training and evaluation; its metric; and that steps are captured."""
    make, targets, outputs, _, metric = TRAINED[case]
    criterion, data = make(reduction), dataset(targets, sample_weight=weights)
    last = ENDS.get(type(criterion), [])
    model = net(*last, outputs=outputs)
    y = model(IMAGES[:, None])
    values = IMAGES if targets is None else targets
    want = expected_loss(case, reduction, y, values, weights)
    wanted_metric = {
        "mae": lambda: np.abs(y.reshape(N, -1) - values.reshape(N, -1)).mean(),
        "binary_accuracy": lambda: ((y > 0) == values).mean(),
        "accuracy": lambda: (y.argmax(1) == (values if values.ndim == 1 else values.argmax(1))).mean(),
    }[metric]()
    for batch_size in (7, N):
        loss, value, found = evaluate(model, data, criterion, batch_size)
        assert loss == pytest.approx(want, rel=1e-9)
        assert value == pytest.approx(wanted_metric, rel=1e-9)
        np.testing.assert_allclose(found, y, rtol=1e-12, atol=1e-14)
        (record,) = fit(model, criterion, SGD(model, 0.0), data, epochs=1, batch_size=batch_size, progress=False)
        assert record["train_loss"] == pytest.approx(want, rel=1e-9)
        assert record[f"train_{metric}"] == pytest.approx(wanted_metric, rel=1e-9)
        assert {name for name in record if name.startswith("train")} == {"train_loss", f"train_{metric}"}
    runner = train.StepRunner(model, criterion, DataLoader(data), SGD(model, 0.0))
    for _ in range(2):
        runner.loader.seek(0)
        runner.replay(9)
    ((_, replay),) = runner.captures.values()
    assert isinstance(replay.run, CapturedStep)
    assert replay.run.calls


@pytest.mark.parametrize("weights", [None, WEIGHTS], ids=["", "weighted"])
@pytest.mark.parametrize("case", TRAINED)
def test_the_gradient_of_a_step(case, weights):
    """Against finite differences of the formula of the loss, over parts of the parameters."""
    make, targets, outputs, _, _ = TRAINED[case]
    criterion, data, index = make("mean"), dataset(targets, sample_weight=weights), np.arange(5, 22)
    model = net(*ENDS.get(type(criterion), []), outputs=outputs)
    values, part = (IMAGES if targets is None else targets)[index], None if weights is None else weights[index]

    def loss():
        return expected_loss(case, "mean", model(IMAGES[index, None]), values, part)

    start = model.theta.copy()
    assert train_step(model, criterion, SGD(model, 1.0), data, index) == pytest.approx(loss_at(model, start, loss))
    step = start - model.theta
    for direction in np.random.default_rng(3).standard_normal((3, start.size)):
        ends = [loss_at(model, start + sign * 1e-6 * direction, loss) for sign in (1, -1)]
        assert step @ direction == pytest.approx((ends[0] - ends[1]) / 2e-6, rel=1e-5)
    assert model.output_kind == criterion.output_kind


def loss_at(model, theta, loss):
    previous = model.theta.copy()
    model.theta = theta
    value = loss()
    model.theta = previous
    return value


def test_float32_models_take_float64_targets():
    data, model = dataset(VALUES, sample_weight=WEIGHTS), net(dtype=np.float32)
    history = fit(model, HuberLoss(), Adam(model, 0.1), data, epochs=40, validation=data, rng=0, progress=False)
    assert history[-1]["val_mae"] < 0.95 * history[0]["train_mae"]
    assert history[-1]["val_loss"] < 0.5 * history[0]["train_loss"]


# --- the images as targets --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("augment", [(), RandomAffine(degrees=20), ColorJitter(0.3)], ids=["", "affine", "jitter"])
def test_an_image_is_its_own_target_as_the_model_gets_it(augment):
    """Normalised, padded and augmented: a model that changes nothing has no loss."""
    pixels = np.random.default_rng(0).integers(0, 256, (N, 4, 4), np.uint8)
    data = DeviceDataset(pixels, None, padding=1, augment=augment, seed=3)
    assert data.target_shape == data.image_shape == (1, 6, 6)
    model = Sequential(Conv2d(1, 1, 1), input_shape=(1, 6, 6), rng=0)
    model[0].weight[...], model[0].bias[...] = 1, 0
    records = fit(model, MSELoss(), SGD(model, 0.0), data, epochs=2, batch_size=16, progress=False)
    assert [record["train_loss"] for record in records] == [0, 0]
    model[0].bias[...] = 0.5
    (record,) = fit(model, MSELoss(), SGD(model, 0.0), data, epochs=1, batch_size=16, progress=False)
    assert record["train_loss"] == pytest.approx(0.25, rel=1e-5)
    x = np.empty((3, 1, 6, 6), np.float32)
    assert data.gather(x, np.array([4, 0, 2])) is x


def test_binary_cross_entropy_of_pixels():
    """Pixels 0 ... 1 are targets; normalised ones are not, nor those with a border that is not 0 ... 1."""
    pixels, model = np.random.default_rng(0).integers(0, 256, (N, 4, 4), np.uint8), net(outputs=16)
    loss, accuracy, y = evaluate(model, dataset(None, pixels), BCEWithLogitsLoss())
    t = pixels.reshape(N, -1) / 255
    assert loss == pytest.approx(np.mean((1 - t) * np.logaddexp(0, y) + t * np.logaddexp(0, -y)), rel=1e-6)
    assert accuracy == pytest.approx(np.mean((y > 0) == (t >= 0.5)))
    with pytest.raises(ValueError, match=r"dataset: BCEWithLogitsLoss needs targets in 0 ... 1, got numbers from -1"):
        evaluate(model, DeviceDataset(pixels, None), BCEWithLogitsLoss())
    high = np.full((N, 2, 2), 200, np.uint8)  # normalised 0.56, and -1 in the border
    for padding, fits in ((0, True), (1, False)):
        data = DeviceDataset(high, None, mean=0.5, std=0.5, padding=padding)
        assert (data.target_range()[0] >= 0) == fits


# --- data sets --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("targets", [CLASSES, VALUES, VALUES[:, 0], LABELS, LABELS.astype(bool), None])
def test_data_sets_are_copied_and_saved(targets):
    data = dataset(targets, sample_weight=WEIGHTS)
    for again in (copy.deepcopy(data), pickle.loads(pickle.dumps(data))):
        x, y = (np.empty((5, 1, 4, 4)) for _ in range(2))
        np.testing.assert_array_equal(again.gather(x, np.arange(3, 8)), data.gather(y, np.arange(3, 8)))
        np.testing.assert_array_equal(again.sample_weight, WEIGHTS)
        assert (again.classes, again.target_shape) == (data.classes, data.target_shape)
        assert repr(again) == repr(data)


def test_targets_of_a_batch():
    x = np.empty((2, 1, 4, 4), np.float32)
    for targets, dtype in ((CLASSES, np.int64), (VALUES, np.float32), (LABELS, np.float32), (LABELS > 0, np.float32)):
        found = dataset(targets).gather(x, np.array([7, 1]))
        assert found.dtype == dtype
        np.testing.assert_array_equal(found, targets[[7, 1]].astype(dtype))
    changed = VALUES.copy()
    data = dataset(changed)
    changed[:] = 0
    np.testing.assert_array_equal(data.labels, VALUES)


def test_the_description_of_a_data_set():
    assert repr(dataset(CLASSES)) == "DeviceDataset(40 images of 1 x 4 x 4, 3 classes)"
    assert repr(dataset(VALUES)) == "DeviceDataset(40 images of 1 x 4 x 4, targets (3,))"
    text = "DeviceDataset(40 images of 1 x 4 x 4, targets: the images, weighted)"
    assert repr(dataset(None, sample_weight=WEIGHTS)) == text


@pytest.mark.parametrize(
    ("weights", "error", "words"),
    [
        (WEIGHTS[:-1], ValueError, r"sample_weight must have shape \(40,\), one weight an image, got \(39,\)"),
        (VALUES, ValueError, r"sample_weight must have shape \(40,\), .* got \(40, 3\)"),
        (-WEIGHTS, ValueError, "sample_weight must not be negative, got -2"),
        (WEIGHTS * 0, ValueError, "sample_weight must not be all zero"),
        (WEIGHTS + np.nan, ValueError, r"sample_weight must be finite, got nan at index \(0,\)"),
        (["a"] * N, TypeError, "sample_weight must be an array of real numbers"),
    ],
)
def test_sample_weights_that_are_refused(weights, error, words):
    with pytest.raises(error, match=words):
        dataset(CLASSES, sample_weight=weights)


# --- users' losses ----------------------------------------------------------------------------------------------------


class Absolute(losses.Loss):
    """In NumPy, of any targets."""

    def forward_backward(self, dx, x, target):
        target = np.eye(K)[target] if target.ndim == 1 and target.dtype == np.int64 else target.reshape(x.shape)
        dx[...], self._loss[: len(x)] = np.sign(x - target) / x.size, abs(x - target).sum(1) / x.size


@pytest.mark.parametrize("targets", [CLASSES, VALUES, None], ids=["classes", "values", "images"])
@pytest.mark.parametrize("weights", [None, WEIGHTS], ids=["", "weighted"])
def test_a_users_loss(targets, weights):
    """With weights as a mean, too; without a metric; its class says nothing about targets, so all are taken."""
    data, outputs = dataset(targets, sample_weight=weights), 16 if targets is None else K
    rows = np.eye(K)[CLASSES] if targets is CLASSES else IMAGES.reshape(N, -1) if targets is None else VALUES
    w = np.ones(N) if weights is None else weights
    model, builtin = net(outputs=outputs), net(outputs=outputs)
    want = (w * abs(model(IMAGES[:, None]) - rows).mean(1)).sum() / w.sum()
    assert evaluate(model, data, Absolute(), 7)[:2] == (pytest.approx(want), None)
    options = {"epochs": 3, "batch_size": 12, "rng": 0, "progress": False}
    history = fit(model, Absolute(), SGD(model, 0.1), data, validation=data, **options)
    assert {name for name in history[0] if "_" in name} == {"train_loss", "val_loss", "images_per_second"}
    fit(builtin, L1Loss(), SGD(builtin, 0.1), dataset(rows, sample_weight=weights), **options)
    np.testing.assert_allclose(model.theta, builtin.theta, rtol=1e-12, atol=1e-14)
    assert model.output_kind is None
    assert builtin.output_kind == "values"
    plot.learning_curves(history)  # without a metric


def test_a_users_loss_of_one_output_takes_class_numbers():
    """Ordinal regression: fewer outputs than classes."""

    class Ordinal(losses.Loss):
        reduction = "sum"

        def forward_backward(self, dx, x, target):
            error = x[:, 0] - target
            dx[:, 0], self._loss[: len(x)] = 2 * error, error**2

    model, data = net(outputs=1), dataset(CLASSES)
    history = fit(model, Ordinal(), SGD(model, 0.001), data, epochs=3, validation=data, progress=False)
    assert history[-1]["val_loss"] < history[0]["train_loss"]


def test_a_batch_whose_weights_are_all_zero_changes_nothing():
    weights = np.where(np.arange(N) < 10, 0, 1)
    model, data = net(), dataset(CLASSES, sample_weight=weights)
    before = model.theta.copy()
    assert train_step(model, CrossEntropyLoss(), SGD(model, 0.1), data, np.arange(10)) == 0
    np.testing.assert_array_equal(model.theta, before)


# --- kinds of outputs, and targets that are refused -------------------------------------------------------------------


def test_output_kinds():
    kinds = {
        CrossEntropyLoss(): "logits", NLLLoss(): "log_probabilities", OneHotMSELoss(): "scores",
        lecun98.RBFLoss(): "distances", BCEWithLogitsLoss(): "label_logits", MSELoss(): "values", L1Loss(): "values",
        HuberLoss(): "values", losses.Loss(): None,
    }  # fmt: skip
    assert all(loss.output_kind == kind for loss, kind in kinds.items())


ONE_HOT = "for class numbers there is OneHotMSELoss"
REFUSED = [
    *[(loss, CLASSES, K, ValueError, f"{type(loss).__name__} needs floating-point targets of the .*{ONE_HOT}")
      for loss in (MSELoss(), L1Loss(), HuberLoss(), BCEWithLogitsLoss())],
    *[(loss, VALUES, K, TypeError, rf"{type(loss).__name__} needs class numbers \(N,\), got floating-point targets of "
       r"shape \(3,\) an image; for these there is MSELoss")
      for loss in (NLLLoss(), OneHotMSELoss(), lecun98.RBFLoss())],
    (CrossEntropyLoss(), VALUES, K, ValueError, "needs class numbers, or probabilities .* got numbers from -"),
    (CrossEntropyLoss(), SHARES[:, :2], K, ValueError, r"or probabilities .* \(3,\), got floating-point .* \(2,\)"),
    (None, VALUES[:, 0], K, ValueError, r"or probabilities .* \(3,\), got floating-point targets of shape \(\)"),
    (CrossEntropyLoss(), None, 16, ValueError, "or probabilities"),
    (CrossEntropyLoss(), CLASSES, 2, ValueError, r"labels go up to 2, but the model's output has shape \(2,\)"),
    (NLLLoss(), CLASSES, 2, ValueError, "labels go up to 2, but"),
    (MSELoss(), VALUES, 2, ValueError, r"MSELoss needs targets of the shape of the .* output, \(2,\) an image, got "
     r"\(3,\)"),
    (MSELoss(), VALUES[:, 0], K, ValueError, r"output, \(3,\) an image, got \(\)"),
    (L1Loss(), None, K, ValueError, r"output, \(3,\) an image, got \(1, 4, 4\)"),
    (BCEWithLogitsLoss(), LABELS * 2, K, ValueError, "needs targets in 0 ... 1, got numbers from 0 to 2"),
    (BCEWithLogitsLoss(pos_weight=[1, 2]), LABELS, K, ValueError, r"pos_weight must be a number or have .*\(3,\), got "
     r"\(2,\)"),
]  # fmt: skip


@pytest.mark.parametrize(("criterion", "targets", "outputs", "error", "words"), REFUSED)
def test_targets_that_a_loss_refuses(criterion, targets, outputs, error, words):
    """By name, before anything is computed."""
    model, data = net(outputs=outputs), dataset(targets)
    before = model.theta.copy()
    with pytest.raises(error, match=f"dataset: .*{words}" if "pos_weight" not in words else words):
        evaluate(model, data, criterion)
    if criterion is not None:
        with pytest.raises(error, match=words):
            fit(model, criterion, SGD(model, 0.1), data, epochs=1, progress=False)
        with pytest.raises(error, match=words):
            train_step(model, criterion, SGD(model, 0.1), data, [0, 1])
    np.testing.assert_array_equal(model.theta, before)
    assert not model._plans


def test_the_validation_set_is_checked():
    model = net()
    with pytest.raises(ValueError, match=r"^validation: MSELoss needs floating-point targets"):
        fit(model, MSELoss(), SGD(model, 0.1), dataset(VALUES), epochs=1, validation=dataset(CLASSES))


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: HuberLoss(delta=0), ValueError, "delta must be positive, got 0"),
        (lambda: HuberLoss("avg"), ValueError, "reduction must be one of"),
        (lambda: BCEWithLogitsLoss(reduction="max"), ValueError, "reduction must be one of"),
        (lambda: BCEWithLogitsLoss(-1.0), ValueError, "weight must not be negative, got -1"),
        (lambda: BCEWithLogitsLoss(pos_weight=[1, np.inf]), ValueError, "pos_weight must be finite"),
        (lambda: BCEWithLogitsLoss(pos_weight="2"), TypeError, "pos_weight must be an array of real numbers"),
        (lambda: BCEWithLogitsLoss([1, 2])(VALUES, VALUES), ValueError, r"weight must be .*\(3,\), got \(2,\)"),
        (lambda: NLLLoss([1, -1]), ValueError, "weight must not be negative"),
        (lambda: NLLLoss()(VALUES, VALUES), TypeError, "target must be integer class numbers"),
        (
            lambda: CrossEntropyLoss()(VALUES, VALUES[:, :2]),
            TypeError,
            r"or probabilities .*\(40, 3\), got .*\(40, 2\)",
        ),
    ],
)
def test_arguments_that_losses_refuse(make, error, words):
    with pytest.raises(error, match=words):
        make()


def test_descriptions_of_losses():
    assert repr(HuberLoss("sum", 0.5)) == "HuberLoss(reduction='sum', delta=0.5)"
    assert repr(BCEWithLogitsLoss(pos_weight=3)) == "BCEWithLogitsLoss(pos_weight=3)"
    assert repr(NLLLoss([1, 2])) == "NLLLoss(weight=[1, 2])"


# --- the progress bar ----------------------------------------------------------------------------------


def test_the_progress_bar_shows_the_metric():
    assert train._format_metrics("accuracy", 0.5, 0.25) == "loss 0.5000, accuracy 25.00%"
    assert train._format_metrics("binary_accuracy", 0.5, 0.25) == "loss 0.5000, binary accuracy 25.00%"
    assert train._format_metrics("mae", 0.5, 0.25) == "loss 0.5000, mae 0.2500"
    assert train._format_metrics(None, 0.5, None) == "loss 0.5000"
