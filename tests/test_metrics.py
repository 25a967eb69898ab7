"""Results computed by hand, and wrong arguments."""

import json

import numpy as np
import pytest
from hypothesis import given, strategies as st

from tinycnn import metrics

# Eight samples, three classes; class 2 is never predicted correctly.
TRUE = [0, 0, 0, 1, 1, 1, 1, 2]
PREDICTED = [0, 0, 1, 1, 1, 1, 2, 0]
CM = np.array([[2, 1, 0], [0, 3, 1], [1, 0, 0]])


def test_confusion_matrix_has_true_classes_in_rows():
    cm = metrics.confusion_matrix(TRUE, PREDICTED, 3)
    assert cm.dtype == np.int64
    np.testing.assert_array_equal(cm, CM)


@pytest.mark.parametrize("dtype", ["u1", "i1", "i4", "u8", ">i2"])
def test_any_integer_dtype_without_overflow(dtype):
    labels = np.arange(100).astype(dtype)
    np.testing.assert_array_equal(metrics.confusion_matrix(labels, labels[::-1], 100), np.eye(100)[::-1])


def test_no_samples():
    empty = np.array([], np.int64)
    cm = metrics.confusion_matrix(empty, empty, 2)
    np.testing.assert_array_equal(cm, np.zeros((2, 2)))
    assert metrics.accuracy(cm) == 0.0
    assert metrics.report(cm)["macro"] == {"precision": 0.0, "recall": 0.0, "f1": 0.0}


@pytest.mark.parametrize(
    ("true", "predicted", "classes", "error", "words"),
    [
        ([0.0, 1.0], [0, 1], 2, TypeError, "true must be integer"),
        ([0, 1], [False, True], 2, TypeError, "predicted must be integer"),
        ([[0, 1]], [0, 1], 2, ValueError, "true must have shape"),
        ([0, 1], [0], 2, ValueError, "predicted must be 2 labels"),
        ([0, 2], [0, 1], 2, ValueError, r"true .* 0 \.\. 1, got 2 at index 1"),
        ([0, 1], [-1, 1], 2, ValueError, "predicted .* got -1 at index 0"),
        (np.array([2**64 - 1], np.uint64), [0], 2, ValueError, "true .* got 18446744073709551615"),
        ([0], [0], 0, ValueError, "classes must be at least 1"),
        ([0], [0], 2.0, TypeError, "float"),
    ],
)
def test_wrong_labels_are_refused_by_name(true, predicted, classes, error, words):
    with pytest.raises(error, match=words):
        metrics.confusion_matrix(true, predicted, classes)


def test_scores_by_hand():
    assert metrics.accuracy(CM) == 5 / 8
    scores = metrics.precision_recall_f1(CM)
    np.testing.assert_allclose(scores["precision"], [2 / 3, 3 / 4, 0])
    np.testing.assert_allclose(scores["recall"], [2 / 3, 3 / 4, 0])
    np.testing.assert_allclose(scores["f1"], [2 / 3, 3 / 4, 0])
    np.testing.assert_array_equal(scores["support"], [3, 4, 1])

    uneven = metrics.precision_recall_f1([[1, 3], [0, 4]])
    np.testing.assert_allclose(uneven["precision"], [1, 4 / 7])
    np.testing.assert_allclose(uneven["recall"], [1 / 4, 1])
    np.testing.assert_allclose(uneven["f1"], [2 / 5, 8 / 11])


def test_zero_over_zero_is_zero():
    # Class 1 occurs and is never predicted, class 2 neither occurs nor is predicted.
    scores = metrics.precision_recall_f1([[4, 0, 0], [2, 0, 0], [0, 0, 0]])
    np.testing.assert_allclose(scores["precision"], [4 / 6, 0, 0])
    np.testing.assert_allclose(scores["recall"], [1, 0, 0])
    np.testing.assert_allclose(scores["f1"], [0.8, 0, 0])


@pytest.mark.parametrize(
    ("cm", "error"),
    [
        ([1, 2], ValueError),
        ([[1, 2]], ValueError),
        (np.zeros((0, 0), int), ValueError),
        ([[1, -1], [0, 1]], ValueError),
        ([[0.5, 0.5], [0.0, 1.0]], TypeError),
    ],
)
def test_wrong_matrices_are_refused(cm, error):
    for function in (metrics.accuracy, metrics.precision_recall_f1, metrics.report):
        with pytest.raises(error, match="cm must be"):
            function(cm)


def test_rejection_rate_by_hand():
    scores = [[3, 0], [2, 0], [1, 0], [0.5, 0], [0, 0.4]]
    labels = [0, 0, 1, 0, 1]  # the third is wrong
    for error, rejected in ((0, 3 / 5), (0.19, 3 / 5), (0.2, 0), (0.25, 0), (1, 0)):
        assert metrics.rejection_rate(scores, labels, error) == pytest.approx(rejected)
    assert metrics.rejection_rate(scores, [1, 0, 0, 0, 0], 0) == 1  # the most certain is wrong
    # A wrong image with the same difference as two right ones is rejected with them.
    assert metrics.rejection_rate([[2, 0], [1, 0], [1, 0], [0, 1]], [0, 0, 0, 0], 0) == pytest.approx(3 / 4)


@pytest.mark.parametrize(
    ("scores", "labels", "error", "words"),
    [
        (np.zeros((2, 1)), [0, 0], 0.1, "shape"),
        (np.zeros((0, 2)), [], 0.1, "shape"),
        ([[np.nan, 1]], [0], 0.1, "finite"),
        ([[0, 1]], [2], 0.1, "labels"),
        ([[0, 1]], [0, 1], 0.1, "labels"),
        ([[0, 1]], [0], 1.1, "error must be"),
    ],
)
def test_rejection_rate_refuses(scores, labels, error, words):
    with pytest.raises(ValueError, match=words):
        metrics.rejection_rate(scores, labels, error)


def test_report_is_json_ready():
    report = metrics.report(CM, ["cat", "dog", "eel"])
    assert json.loads(json.dumps(report, allow_nan=False)) == report
    assert (report["accuracy"], report["errors"], report["total"]) == (0.625, 3, 8)
    assert report["per_class"]["dog"] == {"precision": 0.75, "recall": 0.75, "f1": 0.75, "support": 4}
    assert report["macro"]["f1"] == pytest.approx((2 / 3 + 3 / 4) / 3)
    assert report["weighted"]["f1"] == pytest.approx((2 + 3) / 8)
    assert list(metrics.report(CM)["per_class"]) == ["0", "1", "2"]


@pytest.mark.parametrize("names", [["a", "b"], ["a", "b", "b"]])
def test_report_refuses_wrong_names(names):
    with pytest.raises(ValueError, match="class_names must be 3 different names"):
        metrics.report(CM, names)


def test_format_report():
    assert metrics.format_report(metrics.report(CM, ["cat", "dog", "T-shirt/top"])).splitlines() == [
        "              precision     recall   f1-score   support",
        "",
        "         cat     0.6667     0.6667     0.6667         3",
        "         dog     0.7500     0.7500     0.7500         4",
        " T-shirt/top     0.0000     0.0000     0.0000         1",
        "",
        "    accuracy                           0.6250         8",
        "   macro avg     0.4722     0.4722     0.4722         8",
        "weighted avg     0.6250     0.6250     0.6250         8",
        "",
        "3 of 8 wrong",
    ]


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=1))
def test_metrics_are_consistent(pairs):
    true, predicted = np.array(pairs).T
    cm = metrics.confusion_matrix(true, predicted, 5)
    assert cm.sum() == len(pairs)
    assert metrics.accuracy(cm) == np.mean(true == predicted)
    report = metrics.report(cm)
    assert report["weighted"]["recall"] == pytest.approx(report["accuracy"])  # true by definition
    for k in range(5):
        scores = report["per_class"][str(k)]
        assert scores["support"] == np.sum(true == k)
        assert 0 <= min(scores["precision"], scores["recall"]) <= scores["f1"] + 1e-12
