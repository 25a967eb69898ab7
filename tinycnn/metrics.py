"""Classification metrics: the confusion matrix, and metrics computed from it.

Rows are true classes, columns are predicted classes.  A ratio 0/0 (a class that never occurs, or is never predicted)
is 0, like scikit-learn's `zero_division=0`.
"""

import operator
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray


def confusion_matrix(true: ArrayLike, predicted: ArrayLike, classes: int) -> NDArray[np.int64]:
    """The confusion matrix, (classes, classes) int64; entry [i, j] counts samples of class i predicted as j.

    true, predicted: (N,) class indices in 0 ... classes-1, of any integer dtype.
    Raises TypeError for labels that are not integers, ValueError for a wrong shape, different lengths, or a label out
    of range.
    """
    classes = operator.index(classes)
    if classes < 1:
        raise ValueError(f"classes must be at least 1, got {classes}")
    rows, columns = _labels("true", true, classes), _labels("predicted", predicted, classes)
    if len(rows) != len(columns):
        raise ValueError(f"predicted must be {len(rows)} labels as in true, got {len(columns)}")
    counts = np.bincount(rows * classes + columns, minlength=classes * classes)
    return counts.reshape(classes, classes).astype(np.int64)


def softmax(logits: ArrayLike) -> NDArray[np.float64]:
    """Probabilities (N, K) float64 of logits (N, K)."""
    logits = np.asarray(logits, np.float64)
    exp = np.exp(logits - logits.max(axis=1, keepdims=True))
    probabilities: NDArray[np.float64] = exp / exp.sum(axis=1, keepdims=True)
    return probabilities


def confidence(logits: ArrayLike) -> NDArray[np.float64]:
    """Softmax probability of the predicted class.  logits: (N, K).  Returns (N,)."""
    probability: NDArray[np.float64] = softmax(logits).max(axis=1)
    return probability


def rejection_rate(scores: ArrayLike, labels: ArrayLike, error: float = 0.005) -> float:
    """Smallest fraction of the images, 0 ... 1, to reject so that at most a fraction `error` of the others is wrong.

    Images are rejected by the difference between their two largest scores, smallest first (LeCun et al. 1998, section
    III.D, figure 10).  scores: (N, K), K >= 2, the largest is the prediction; labels: (N,).
    Raises ValueError for another shape, scores that are not finite, or an error outside of 0 ... 1.
    """
    scores = np.asarray(scores, np.float64)
    if scores.ndim != 2 or scores.shape[1] < 2 or not len(scores):
        raise ValueError(f"scores must have shape (N, K) with N >= 1 and K >= 2, got {scores.shape}")
    if not np.isfinite(scores).all():
        raise ValueError("scores must be finite")
    if not 0 <= error <= 1:
        raise ValueError(f"error must be from 0 to 1, got {error}")
    labels = _labels("labels", labels, scores.shape[1])
    if len(labels) != len(scores):
        raise ValueError(f"labels must be {len(scores)} labels as in scores, got {len(labels)}")
    second, first = np.sort(scores, axis=1)[:, -2:].T
    order = np.argsort(second - first, kind="stable")  # largest difference first
    margin, wrong = (first - second)[order], (scores.argmax(axis=1) != labels)[order]
    accepted = np.arange(1, len(labels) + 1)
    # A threshold cannot separate images of equal difference.
    possible = (np.cumsum(wrong) <= error * accepted) & np.append(margin[:-1] > margin[1:], True)
    return float(1 - accepted[possible].max(initial=0) / len(labels))


def accuracy(cm: ArrayLike) -> float:
    """Fraction of correct predictions, 0 ... 1 (0 if nothing was counted).  cm: (K, K) counts."""
    cm = _counts(cm)
    return float(np.trace(cm) / max(cm.sum(), 1))


def precision_recall_f1(cm: ArrayLike) -> dict[str, NDArray[Any]]:
    """Precision, recall, F1 (float64, 0 ... 1) and support (int64) of each class.

    cm: (K, K) counts, rows = true.  Returns a dict of four (K,) arrays: "precision" (the fraction of predictions of
    class k that are correct), "recall" (the fraction of samples of class k that are predicted as k), "f1" (their
    harmonic mean) and "support" (number of samples of class k).
    Raises ValueError or TypeError if cm is not a square matrix of non-negative integers.
    """
    cm = _counts(cm)
    correct, support, predicted = np.diag(cm), cm.sum(axis=1), cm.sum(axis=0)
    return {
        "precision": _ratio(correct, predicted),
        "recall": _ratio(correct, support),
        "f1": _ratio(2 * correct, support + predicted),
        "support": support,
    }


def report(cm: ArrayLike, class_names: Sequence[str] | None = None) -> dict[str, Any]:
    """All metrics as plain Python numbers, ready for `json.dump`.

    cm: (K, K) counts.  class_names: K different names, by default "0" ... "K-1".
    Returns {"accuracy", "errors", "total", "per_class": {name: {"precision", "recall", "f1", "support"}}, "macro":
    {...}, "weighted": {...}}.  "macro" is the mean over all K classes, also those without samples; "weighted" is the
    mean weighted by support.
    Raises ValueError for the wrong number of names or equal ones, and what `precision_recall_f1` raises.
    """
    cm = _counts(cm)
    names = [str(k) for k in range(len(cm))] if class_names is None else [str(name) for name in class_names]
    if len(names) != len(cm) or len(set(names)) != len(names):
        raise ValueError(f"class_names must be {len(cm)} different names, got {names}")
    scores = precision_recall_f1(cm)
    support = scores["support"]
    total = int(support.sum())
    means = ("precision", "recall", "f1")
    return {
        "accuracy": accuracy(cm),
        "errors": total - int(np.trace(cm)),
        "total": total,
        "per_class": {name: {key: values[k].item() for key, values in scores.items()} for k, name in enumerate(names)},
        "macro": {key: float(scores[key].mean()) for key in means},
        "weighted": {key: float(scores[key] @ support / max(total, 1)) for key in means},
    }


def format_report(report: Mapping[str, Any]) -> str:
    """The result of `report` as an aligned text table, without a final newline."""
    rows = dict(report["per_class"])
    total = report["total"]
    width = max(len(name) for name in [*rows, "weighted avg"])

    def line(name: str, scores: Mapping[str, Any], support: int) -> str:
        cells = "".join(f"{scores[key]:>11.4f}" for key in ("precision", "recall", "f1"))
        return f"{name:>{width}}{cells}{support:>10}"

    return "\n".join(
        [
            f"{'':>{width}}{'precision':>11}{'recall':>11}{'f1-score':>11}{'support':>10}",
            "",
            *(line(name, scores, scores["support"]) for name, scores in rows.items()),
            "",
            f"{'accuracy':>{width}}{'':>22}{report['accuracy']:>11.4f}{total:>10}",
            line("macro avg", report["macro"], total),
            line("weighted avg", report["weighted"], total),
            "",
            f"{report['errors']} of {total} wrong",
        ]
    )


def _ratio(numerator: NDArray[Any], denominator: NDArray[Any]) -> NDArray[np.float64]:
    ratio: NDArray[np.float64] = numerator / np.maximum(denominator, 1)  # if the denominator is 0, so is the numerator
    return ratio


def _labels(name: str, values: ArrayLike, classes: int) -> NDArray[np.int64]:
    labels = np.asarray(values)
    if labels.ndim != 1:
        raise ValueError(f"{name} must have shape (N,), got {labels.shape}")
    if not np.issubdtype(labels.dtype, np.integer):
        raise TypeError(f"{name} must be integer class indices, got dtype {labels.dtype}")
    invalid = (labels < 0) | (labels >= classes)
    if invalid.any():
        index = int(np.argmax(invalid))
        raise ValueError(f"{name} must have labels in 0 .. {classes - 1}, got {labels[index]} at index {index}")
    return labels.astype(np.int64)  # uint8 labels would overflow in i * classes + j


def _counts(cm: ArrayLike) -> NDArray[np.int64]:
    counts = np.asarray(cm)
    if counts.ndim != 2 or counts.shape[0] != counts.shape[1] or counts.size == 0:
        raise ValueError(f"cm must be a square matrix (K, K), got shape {counts.shape}")
    if not np.issubdtype(counts.dtype, np.integer):
        raise TypeError(f"cm must be integer counts, got dtype {counts.dtype}")
    if (counts < 0).any():
        raise ValueError(f"cm must be counts >= 0, got {counts.min()}")
    return counts.astype(np.int64)
