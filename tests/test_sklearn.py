"""The estimators for scikit-learn."""

import pickle
import subprocess
import sys
from functools import partial

import numpy as np
import pytest

pytest.importorskip("sklearn", minversion="1.6")

from sklearn.base import clone
from sklearn.calibration import CalibratedClassifierCV
from sklearn.compose import TransformedTargetRegressor
from sklearn.datasets import load_diabetes, load_digits
from sklearn.model_selection import GridSearchCV, StratifiedKFold, cross_val_score
from sklearn.pipeline import Pipeline
from sklearn.preprocessing import FunctionTransformer, StandardScaler
from sklearn.utils.estimator_checks import parametrize_with_checks

from tinycnn import SGD, Flatten, Linear, ReLU, fit, sklearn as estimators
from tinycnn.sklearn import CNNClassifier, CNNRegressor, default_layers

PIXELS, DIGITS = load_digits(return_X_y=True)  # (1797, 64), 0 ... 16
IMAGES = PIXELS.reshape(-1, 8, 8)
SMALL, CLASSES = IMAGES[:200], DIGITS[:200]

EXPECTED_FAILURES = {
    "check_sample_weight_equivalence_on_dense_data": "a batch has the same number of images whatever their weights, "
    "and the pixels' mean and standard deviation are not weighted"
}


@parametrize_with_checks(
    [CNNClassifier(), CNNRegressor()],
    expected_failed_checks=lambda estimator: EXPECTED_FAILURES,
)
def test_checks_of_scikit_learn(estimator, check):
    check(estimator)


def small(**options):
    return CNNClassifier(**{"epochs": 3, "random_state": 0, **options})


def one_linear(shape, outputs):
    return [Flatten(), Linear(int(np.prod(shape)), outputs)]


# --- accuracy and tools -----------------------------------------------------------------------------------------------


def test_accuracy_on_digits():
    folds = StratifiedKFold(3, shuffle=True, random_state=0)
    scores = cross_val_score(CNNClassifier(epochs=10, random_state=0), PIXELS, DIGITS, cv=folds)
    assert min(scores) > 0.95


def test_accuracy_of_the_regressor():
    X, y = load_diabetes(return_X_y=True)
    scaled = TransformedTargetRegressor(CNNRegressor(random_state=0), transformer=StandardScaler())
    assert cross_val_score(scaled, X, y, cv=3).mean() > 0.4


def test_grid_search_in_processes():
    grid = {"cnn__layers": [None, one_linear], "cnn__lr": [1e-5, 1e-2]}
    pipeline = Pipeline([("same", FunctionTransformer()), ("cnn", small())])
    search = GridSearchCV(pipeline, grid, cv=2, n_jobs=2, error_score="raise").fit(PIXELS[:400], DIGITS[:400])
    assert search.best_params_["cnn__lr"] == 1e-2
    again = clone(pipeline).set_params(**search.best_params_).fit(PIXELS[:400], DIGITS[:400])
    np.testing.assert_array_equal(search.predict_proba(PIXELS), again.predict_proba(PIXELS))


def threads_of_a_worker():
    import numba

    return numba.get_num_threads()


def test_workers_share_the_threads():
    joblib = pytest.importorskip("joblib")
    counts = joblib.Parallel(n_jobs=2)(joblib.delayed(threads_of_a_worker)() for _ in range(2))
    assert counts == [max(1, joblib.cpu_count() // 2)] * 2


@pytest.mark.parametrize("method", ["sigmoid", "isotonic"])
def test_calibration(method):
    calibrated = CalibratedClassifierCV(small(), method=method, cv=2).fit(PIXELS[:400], DIGITS[:400])
    assert calibrated.score(PIXELS[400:], DIGITS[400:]) > 0.8
    np.testing.assert_allclose(calibrated.predict_proba(PIXELS[:5]).sum(axis=1), 1)


def test_copies(tmp_path):
    joblib = pytest.importorskip("joblib")
    fitted = small(layers=[Flatten(), Linear(64, 10)]).fit(SMALL, CLASSES)
    want = fitted.predict_proba(IMAGES)
    joblib.dump(fitted, tmp_path / "model.joblib")
    for copy in (pickle.loads(pickle.dumps(fitted)), joblib.load(tmp_path / "model.joblib")):
        np.testing.assert_array_equal(copy.predict_proba(IMAGES), want)
        assert copy._optimizer.model is copy.model_
        fitted.partial_fit(SMALL, CLASSES)
        copy.partial_fit(SMALL, CLASSES)  # with the optimizer's moments and the random numbers of the original
        np.testing.assert_array_equal(copy.predict_proba(IMAGES), fitted.predict_proba(IMAGES))
        fitted = small(layers=[Flatten(), Linear(64, 10)]).fit(SMALL, CLASSES)
    unfitted = clone(fitted)
    assert not hasattr(unfitted, "model_")
    np.testing.assert_array_equal(unfitted.fit(SMALL, CLASSES).predict_proba(IMAGES), want)


# --- data -------------------------------------------------------------------------------------------------------------


def test_images_in_any_form_are_the_same():
    """uint8 or float, (N, H, W), (N, C, H, W) or flat, in a list, a frame or a tensor."""
    want = small().fit(SMALL, CLASSES)
    assert (want.n_features_in_, want.image_shape_) == (64, (1, 8, 8))
    probabilities = want.predict_proba(IMAGES)
    forms = [lambda x: x[:, None], lambda x: x.reshape(len(x), 64), lambda x: x.tolist(), np.asfortranarray]
    for form in [*forms, lambda x: x.astype(np.float32), lambda x: x.astype(np.int16)]:
        fitted = small().fit(form(SMALL), CLASSES)
        np.testing.assert_array_equal(fitted.predict_proba(form(IMAGES)), probabilities)
        np.testing.assert_allclose(fitted.predict_proba(IMAGES), probabilities, rtol=1e-5)
    for dtype in (np.uint8, np.uint16):  # scaled by 255 or 65535 first: other roundings
        fitted = small().fit(SMALL.astype(dtype), CLASSES)
        for other in (dtype, np.float64, np.int64):
            np.testing.assert_allclose(fitted.predict_proba(IMAGES.astype(other)), probabilities, atol=1e-3)
        np.testing.assert_array_equal(fitted.model_.predict(IMAGES[:, None].astype(dtype)), fitted.predict(IMAGES))
        fitted.partial_fit(SMALL, CLASSES)  # continues on pixels of another type
        assert fitted.score(SMALL, CLASSES) > 0.9


def test_torch_tensors():
    torch = pytest.importorskip("torch")
    fitted = small().fit(torch.tensor(SMALL), torch.tensor(CLASSES))
    np.testing.assert_array_equal(fitted.predict(torch.tensor(IMAGES)), small().fit(SMALL, CLASSES).predict(IMAGES))


def test_frames_of_pixels():
    pandas = pytest.importorskip("pandas")
    names = [f"pixel{i}" for i in range(64)]
    frame = pandas.DataFrame(PIXELS, columns=names)
    fitted = small().fit(frame[:200], pandas.Series(CLASSES))
    np.testing.assert_array_equal(fitted.feature_names_in_, names)
    np.testing.assert_array_equal(fitted.predict(frame), small().fit(SMALL, CLASSES).predict(IMAGES))
    with pytest.raises(ValueError, match="feature names should match"):
        fitted.predict(frame[names[::-1]])
    with pytest.warns(UserWarning, match="does not have valid feature names"):
        fitted.predict(PIXELS)


def test_memory_mapped_images(tmp_path):
    np.save(tmp_path / "x.npy", SMALL)
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r")
    want = small().fit(SMALL, CLASSES).predict(SMALL)
    np.testing.assert_array_equal(small().fit(mapped, CLASSES).predict(mapped), want)


def test_colour_images_in_rows():
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (60, 3, 8, 9), np.uint8)
    y = np.arange(60) % 2
    images[y == 1, 2] //= 2
    flat = images.reshape(60, -1)
    fitted = small(image_shape=(3, 8, 9)).fit(flat, y)
    assert fitted.model_.normalization.mean.shape == (3,)
    np.testing.assert_array_equal(fitted.predict_proba(images), fitted.predict_proba(flat))
    np.testing.assert_array_equal(small().fit(images, y).predict_proba(images), fitted.predict_proba(flat))
    assert small().fit(flat, y).image_shape_ == (216, 1, 1)  # no square


@pytest.mark.parametrize(
    ("features", "shape", "layers"),
    [(63, (63, 1, 1), 4), (49, (49, 1, 1), 4), (64, (1, 8, 8), 7), (784, (1, 28, 28), 10), (1, (1, 1, 1), 4)],
)
def test_the_default_network_fits_the_images(features, shape, layers):
    X = np.random.default_rng(0).random((6, features))
    fitted = small(epochs=1).fit(X, [0, 1] * 3)
    assert (fitted.image_shape_, len(fitted.model_)) == (shape, layers)
    assert len(default_layers((3, 224, 224), 5)) == 5 * 3 + 4
    assert small(epochs=1, image_shape=(features, 1, 1)).fit(X, [0, 1] * 3).image_shape_ == (features, 1, 1)


# --- targets and weights ----------------------------------------------------------------------------------------------


def test_classes_of_any_type():
    names = np.array(["zero", "one", "two"])
    keep = CLASSES < 3
    want = small().fit(SMALL[keep], CLASSES[keep])
    fitted = small().fit(SMALL[keep], names[CLASSES[keep]])
    assert list(fitted.classes_) == ["one", "two", "zero"]
    assert fitted.model_.class_names == ("one", "two", "zero")
    assert set(fitted.predict(SMALL)) <= set(names)
    assert fitted.score(SMALL[keep], names[CLASSES[keep]]) > 0.9
    gaps = small().fit(SMALL[keep], CLASSES[keep] * 10 - 7)
    np.testing.assert_array_equal(gaps.predict(SMALL), want.predict(SMALL) * 10 - 7)


def test_probabilities_and_logits():
    fitted = small().fit(SMALL, CLASSES)
    probabilities, logits = fitted.predict_proba(SMALL), fitted.decision_function(SMALL)
    np.testing.assert_allclose(probabilities.sum(axis=1), 1)
    np.testing.assert_allclose(np.log(probabilities), fitted.predict_log_proba(SMALL))
    exponentials = np.exp(logits.astype(float))
    np.testing.assert_allclose(probabilities, exponentials / exponentials.sum(axis=1, keepdims=True), rtol=1e-5)
    two = small().fit(SMALL, CLASSES % 2)
    decision = two.decision_function(SMALL)
    np.testing.assert_allclose(two.predict_proba(SMALL)[:, 1], 1 / (1 + np.exp(-decision.astype(float))), rtol=1e-5)


def test_numbers_and_several_numbers():
    y = np.stack([SMALL.mean(axis=(1, 2)), SMALL[:, :4].mean(axis=(1, 2))], axis=1) / 8
    regress = partial(CNNRegressor, random_state=0, epochs=10)
    both, one, column = (regress().fit(SMALL, target) for target in (y, y[:, 0], y[:, :1]))
    assert both.score(SMALL, y) > 0.8
    assert (both.predict(SMALL).shape, one.predict(SMALL).shape) == ((200, 2), (200,))
    np.testing.assert_array_equal(column.predict(SMALL), one.predict(SMALL)[:, None])
    assert both.model_.output_kind == "values"


@pytest.mark.parametrize("make", [CNNClassifier, CNNRegressor])
def test_weights_of_zero_leave_images_out(make):
    weights = np.ones(200)
    weights[50:] = 0
    estimator = make(epochs=3, random_state=0)
    want = clone(estimator).fit(SMALL[:50], CLASSES[:50]).predict(IMAGES)
    np.testing.assert_array_equal(clone(estimator).fit(SMALL, CLASSES, weights).predict(IMAGES), want)
    scaled = clone(estimator).fit(SMALL[:50], CLASSES[:50], np.full(50, 4.0)).predict(IMAGES)
    np.testing.assert_allclose(scaled, want, atol=1e-3)


def test_weights_of_images_and_of_classes():
    y = np.random.default_rng(0).integers(0, 2, 200)  # cannot be learned from one constant pixel
    X = np.zeros((200, 1))
    share = y.mean()
    fit_share = partial(small, layers=one_linear, epochs=200, batch_size=200, n_iter_no_change=None, lr=0.02)
    assert fit_share().fit(X, y).predict_proba(X)[0, 1] == pytest.approx(share, abs=0.02)
    odds = 3 * share / (1 - share)
    want = pytest.approx(odds / (1 + odds), abs=0.03)
    assert fit_share().fit(X, y, np.where(y == 1, 3.0, 1.0)).predict_proba(X)[0, 1] == want
    assert fit_share(class_weight={0: 1, 1: 3}).fit(X, y).predict_proba(X)[0, 1] == want
    balanced = fit_share(class_weight="balanced").fit(X, np.r_[np.ones(150), np.zeros(50)])
    assert balanced.predict_proba(X)[0, 1] == pytest.approx(0.5, abs=0.04)


# --- training ---------------------------------------------------------------------------------------------------------


def test_the_same_seed_gives_the_same_bits():
    first, second, other = (small(random_state=seed).fit(SMALL, CLASSES).predict_proba(SMALL) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, second)
    assert (first != other).any()


def test_partial_fit():
    model = small(random_state=0)
    for _ in range(2):
        for start in range(0, 200, 100):
            model.partial_fit(SMALL[start : start + 100], CLASSES[start : start + 100], classes=range(10))
    assert model.n_iter_ == len(model.loss_curve_) == len(model.history_) == 4
    assert model.loss_curve_[-1] < model.loss_curve_[0]
    assert model._optimizer.steps == 4 * 4
    mean = model.model_.normalization.mean
    assert mean == pytest.approx(SMALL[:100].mean())
    np.testing.assert_allclose(mean, model.partial_fit(SMALL / 2, CLASSES).model_.normalization.mean)
    with pytest.raises(ValueError, match="y must have the known classes"):
        model.partial_fit(SMALL, CLASSES + 1)
    with pytest.raises(ValueError, match="classes must be those of the first call"):
        model.partial_fit(SMALL, CLASSES, classes=range(5))
    model.set_params(lr=1e-5).partial_fit(SMALL, CLASSES)
    assert model._optimizer.lr == 1e-5
    regressor = CNNRegressor(random_state=0).partial_fit(SMALL, CLASSES)
    with pytest.raises(ValueError, match="y must have 1 targets, as in fit, got 2"):
        regressor.partial_fit(SMALL, np.stack([CLASSES] * 2, axis=1))


def test_each_call_of_partial_fit_has_its_own_order(monkeypatch):
    seeds = []
    monkeypatch.setattr(
        estimators, "fit", lambda *data, **options: seeds.append(options["rng"]) or fit(*data, **options)
    )
    for _ in range(2):
        model = small()
        for _ in range(3):
            model.partial_fit(SMALL, CLASSES, classes=range(10))
    assert seeds[:3] == seeds[3:]
    assert len(set(seeds)) == 3


def test_warm_start_continues():
    cold, warm = small(), small(warm_start=True)
    for estimator in (cold, warm):
        losses = [estimator.fit(SMALL, CLASSES).loss_curve_[-1] for _ in range(2)]
        assert (losses[1] < losses[0]) == estimator.warm_start
    assert (cold.n_iter_, warm.n_iter_) == (3, 6)


def test_early_stopping():
    shuffled = np.random.default_rng(0).permutation(CLASSES)  # cannot be learned: validation gets worse
    stopped = small(epochs=50, early_stopping=True, n_iter_no_change=3, validation_fraction=0.2).fit(SMALL, shuffled)
    losses = [record["val_loss"] for record in stopped.history_]
    assert stopped.n_iter_ < 50
    assert np.argmin(losses) == len(losses) - 4
    best = small(epochs=len(losses) - 3, early_stopping=True, validation_fraction=0.2).fit(SMALL, shuffled)
    np.testing.assert_array_equal(stopped.predict_proba(SMALL), best.predict_proba(SMALL))
    # Without a validation set the training loss decides.
    assert small(epochs=50, lr=0.0, n_iter_no_change=3).fit(SMALL, CLASSES).n_iter_ == 4
    assert small(epochs=20, lr=0.0, n_iter_no_change=None).fit(SMALL, CLASSES).n_iter_ == 20


def test_optimizers():
    for optimizer, lr in (("adam", 3e-3), ("rmsprop", 3e-3), ("sgd", 0.03), (lambda model: SGD(model, 0.3), 0)):
        assert small(optimizer=optimizer, lr=lr).fit(SMALL, CLASSES).score(SMALL, CLASSES) > 0.5


def test_verbose(capsys):
    small(verbose=True, epochs=2, early_stopping=True).fit(SMALL, CLASSES)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(",")[0] for line in lines] == ["epoch 1", "epoch 2"]
    assert "validation loss" in lines[0]


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"optimizer": "lion"}, ValueError, "optimizer must be one of 'adamw'.*got 'lion'"),
        ({"lr": -1}, ValueError, "lr must be at least 0, got -1"),
        ({"lr": "fast"}, TypeError, "lr must be a number"),
        ({"epochs": 0}, ValueError, "epochs must be at least 1, got 0"),
        ({"batch_size": 1.5}, TypeError, "batch_size must be an integer, got 1.5"),
        ({"weight_decay": -1}, ValueError, "weight_decay must be at least 0"),
        ({"tol": None}, TypeError, "tol must be a number"),
        ({"n_iter_no_change": 0}, ValueError, "n_iter_no_change must be at least 1"),
        ({"early_stopping": True, "validation_fraction": 1}, ValueError, "validation_fraction must be .*below 1"),
        ({"early_stopping": True, "validation_fraction": 0}, ValueError, "validation_fraction must be positive"),
        ({"layers": "lenet"}, TypeError, "layers must be a list of layers, a function .* got 'lenet'"),
        ({"layers": [Flatten, ReLU()]}, TypeError, "layers must be .* got the class Flatten"),
        ({"layers": [Flatten(), Linear(64, 3)]}, ValueError, "layers must end in 10 outputs, one a class, got .*3"),
        ({"layers": [Flatten(), Linear(9, 10)]}, ValueError, "takes"),
        ({"image_shape": (28, 28)}, ValueError, r"X must have images of image_shape \(1, 28, 28\), got \(1, 8, 8\)"),
        ({"image_shape": (8,)}, ValueError, r"image_shape must be \(H, W\) or \(C, H, W\), got \(8,\)"),
        ({"image_shape": 8}, TypeError, "image_shape must be a tuple"),
        ({"device": "tpu"}, ValueError, "device must be"),
        ({"class_weight": "even"}, ValueError, "class_weight"),
        ({"random_state": "seed"}, ValueError, "seed"),
    ],
)
def test_bad_parameters_are_named(options, error, words):
    estimator = small(**options)  # scikit-learn checks in fit
    with pytest.raises(error, match=words):
        estimator.fit(SMALL, CLASSES)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: small().fit(np.zeros((2, 1, 1, 8, 8)), [0, 1]), r"X must have shape \(N, features\), \(N, H, W\) or"),
        (lambda: small(image_shape=(8, 9)).fit(PIXELS, DIGITS), r"X must have 72 features, the pixels of .*got 64"),
        (lambda: small().fit(SMALL, np.zeros(200)), "at least two classes, got one class"),
        (lambda: small().fit(SMALL, CLASSES, CLASSES == 3), "sample_weight must leave at least two classes"),
        (lambda: small().fit(SMALL, CLASSES, np.zeros(200)), "must not be all zero|at least one non-zero"),
        (lambda: small().fit(SMALL, CLASSES, -np.ones(200)), "sample_weight must not be negative"),
        (lambda: small().fit(SMALL, CLASSES[:9]), "inconsistent numbers of samples"),
        (lambda: small().fit(SMALL, np.random.default_rng(0).random(200)), "Unknown label type: continuous"),
        (lambda: small().fit(np.where(SMALL == 5, np.nan, SMALL), CLASSES), "X contains NaN"),
        (lambda: small().partial_fit(SMALL, CLASSES), "classes must be given in the first call of partial_fit"),
        (
            lambda: small(class_weight="balanced").partial_fit(SMALL, CLASSES, range(10)),
            "class_weight must be None or a dictionary for partial_fit",
        ),
        (lambda: small().fit(SMALL, CLASSES).predict(SMALL[:, :7]), r"X has 56 features"),
        (
            lambda: small().fit(SMALL, CLASSES).predict(SMALL.reshape(-1, 4, 16)),
            r"X must have images of shape \(1, 8, 8\), as in fit, got \(1, 4, 16\)",
        ),
        (
            lambda: small(warm_start=True).fit(SMALL, CLASSES).fit(SMALL, CLASSES + 1),
            "y must have the known classes",
        ),
        (lambda: CNNRegressor().fit(SMALL, np.full(200, np.inf)), "y contains infinity"),
        (lambda: CNNRegressor(layers=[Flatten(), Linear(64, 2)]).fit(SMALL, CLASSES), "1 outputs, one a target"),
    ],
)
def test_bad_data_are_named(call, words):
    with pytest.raises(ValueError, match=words):
        call()


def test_what_is_missing_is_named():
    """Importing tinycnn, and all names of it, needs no scikit-learn; the module of the estimators does."""
    code = """
import sys
sys.modules["sklearn"] = None
from tinycnn import *
import tinycnn
try:
    tinycnn.sklearn
except ImportError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith('tinycnn.sklearn needs scikit-learn 1.6: pip install "tinycnn[sklearn]"')
