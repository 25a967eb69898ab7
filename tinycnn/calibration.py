"""Probabilities that can be trusted: temperature scaling (Guo et al. 2017), its measures, and a threshold below which
an image is refused as showing none of the classes."""

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from tinycnn import _check
from tinycnn._typing import Array

LIMITS = (0.01, 100.0)  # of a temperature


class Reliability(NamedTuple):
    """Bins of equal width over the confidence, for a reliability diagram; 0 in an empty bin."""

    confidence: Array  # (bins,) mean probability of the predicted class
    accuracy: Array  # (bins,) fraction of right predictions
    images: Array  # (bins,) int64, number of images


def fit_temperature(logits: ArrayLike, labels: ArrayLike) -> float:
    """The temperature T in 0.01 ... 100 with the smallest mean cross entropy of softmax(logits / T).

    logits  (N, K) outputs of a model with CrossEntropyLoss, of images that it was not trained on
    labels  (N,) class numbers

    If all predictions are right, the smallest cross entropy may lie at the limit 0.01.  Raises ValueError or TypeError
    for another shape, dtype or range, or values that are not finite.
    """
    z, y = _logits(logits), _labels(logits, labels)
    shifted = z - z.max(axis=1, keepdims=True)
    target = np.take_along_axis(shifted, y[:, None], axis=1)[:, 0].mean()

    def slope(log_beta: float) -> float:
        """Derivative by beta = 1 / T of the cross entropy, which is convex in beta."""
        weights = np.exp(np.exp(log_beta) * shifted)
        return float(((weights * shifted).sum(axis=1) / weights.sum(axis=1)).mean() - target)

    low, high = -np.log(LIMITS[1]), -np.log(LIMITS[0])
    if slope(low) >= 0:
        return LIMITS[1]
    if slope(high) <= 0:
        return LIMITS[0]
    for _ in range(50):  # bisection: to the last bit
        middle = (low + high) / 2
        low, high = (middle, high) if slope(middle) < 0 else (low, middle)
    return float(np.exp(-(low + high) / 2))


def reliability(probabilities: ArrayLike, labels: ArrayLike, bins: int = 15) -> Reliability:
    """Mean confidence, accuracy and number of images in bins (0, 1/bins], ... of the predicted class's probability.

    probabilities  (N, K), each row sums to 1      labels  (N,) class numbers

    Raises ValueError or TypeError for another shape, dtype or range.
    """
    p, y = _logits(probabilities, "probabilities"), _labels(probabilities, labels)
    bins = _check.integer("bins", bins, 1)
    if p.min() < 0 or p.max() > 1 + 1e-6 or abs(p.sum(axis=1) - 1).max() > 1e-3:
        raise ValueError("probabilities must be rows that sum to 1, got rows that do not: logits?")
    confidence, correct = p.max(axis=1), p.argmax(axis=1) == y
    number = np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)
    count = np.bincount(number, minlength=bins)
    sums = [np.bincount(number, values, minlength=bins) for values in (confidence, correct)]
    return Reliability(sums[0] / np.maximum(count, 1), sums[1] / np.maximum(count, 1), count)


def expected_calibration_error(probabilities: ArrayLike, labels: ArrayLike, bins: int = 15) -> float:
    """Mean over the images of |confidence - accuracy| of their bin, 0 ... 1.  Arguments and errors of `reliability`."""
    confidence, accuracy, count = reliability(probabilities, labels, bins)
    return float(abs(confidence - accuracy) @ count / count.sum())


def rejection_score(logits: ArrayLike) -> Array:
    """How much each image looks like one of the classes: log sum exp of its logits, (N,) float64 (the negative energy
    of Liu et al. 2020).  logits: (N, K)

    Compare it with the threshold of `fit_threshold`.  docs/own_images.md compares it with other scores.  Raises
    ValueError or TypeError for another shape, dtype, or values that are not finite.
    """
    z = _logits(logits)
    largest = z.max(axis=1)
    scores: Array = largest + np.log(np.exp(z - largest[:, None]).sum(axis=1))
    return scores


def fit_threshold(scores: ArrayLike, quantile: float = 0.01) -> float:
    """The score below which a fraction `quantile` of the images lies.

    scores  (N,) `rejection_score` of images of the classes that the model was not trained on

    Raises ValueError or TypeError for another shape, dtype or range.
    """
    quantile = _check.number("quantile", quantile, 0, maximum=1)
    return float(np.quantile(_check.finite("scores", _check.array("scores", scores, 1, "(N,)")), quantile))


def _logits(values: ArrayLike, name: str = "logits") -> Array:
    array = _check.finite(name, _check.array(name, values, 2, "(N, K)"))
    return array.astype(np.float64)


def _labels(values: ArrayLike, labels: ArrayLike) -> Array:
    count, classes = np.shape(values)
    return _check.labels("labels", labels, count, classes)
