"""Temperature, calibration error and rejection: values by hand, known temperatures, wrong arguments."""

import numpy as np
import pytest
from hypothesis import given, strategies as st

from tinycnn import calibration, data


def test_temperature_by_hand():
    # Three of four right at logits (z, 0): the smallest cross entropy has sigmoid(z / T) = 3/4, so z / T = log 3.
    assert calibration.fit_temperature([[5.0, 0], [5, 0], [5, 0], [5, 0]], [0, 0, 0, 1]) == pytest.approx(5 / np.log(3))


@given(st.floats(0.2, 5), st.integers(0, 2**32 - 1))
def test_temperature_scales_with_the_logits(scale, seed):
    rng = np.random.default_rng(seed)
    logits, labels = rng.normal(0, 3, (40, 4)), rng.integers(0, 4, 40)
    logits[np.arange(40), labels] += 2
    plain = calibration.fit_temperature(logits, labels)
    if 0.1 < plain < 10:
        assert calibration.fit_temperature(scale * logits, labels) == pytest.approx(scale * plain, rel=1e-9)


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
def test_a_known_temperature_is_found(temperature):
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 2, (20_000, 5))
    noise = rng.gumbel(size=logits.shape)  # the argmax is drawn with the probabilities softmax(logits)
    labels = (logits + noise).argmax(axis=1)
    assert calibration.fit_temperature(temperature * logits, labels) == pytest.approx(temperature, rel=0.03)


def test_temperature_at_its_limits():
    assert calibration.fit_temperature([[3.0, 0.0]], [0]) == 0.01  # all right
    assert calibration.fit_temperature([[3.0, 0.0]], [1]) == 100  # all wrong


def test_large_logits_do_not_overflow():
    assert calibration.rejection_score([[3e4, 3e4]]) == pytest.approx(3e4 + np.log(2))
    assert calibration.fit_temperature([[3e4, 0.0], [3e4, 0.0]], [0, 1]) == 100


PROBABILITIES = [[0.9, 0.1], [0.8, 0.2], [0.3, 0.7], [0.45, 0.55]]
TRUE = [0, 1, 1, 1]


def test_reliability_and_error_by_hand():
    confidence, accuracy, count = calibration.reliability(PROBABILITIES, TRUE, 4)  # bins up to .25, .5, .75, 1
    np.testing.assert_allclose(confidence, [0, 0, 0.625, 0.85])
    np.testing.assert_allclose(accuracy, [0, 0, 1, 0.5])
    np.testing.assert_array_equal(count, [0, 0, 2, 2])
    error = calibration.expected_calibration_error(PROBABILITIES, TRUE, 4)
    assert error == pytest.approx((2 * 0.375 + 2 * 0.35) / 4)


def test_a_confidence_on_a_limit_lies_in_the_lower_bin():
    count = calibration.reliability([[0.5, 0.5], [1.0, 0.0]], [0, 0], 2).images
    np.testing.assert_array_equal(count, [1, 1])


def test_threshold_refuses_its_quantile():
    scores = calibration.rejection_score(np.log(np.full((101, 4), 0.25)) + np.arange(101)[:, None])
    np.testing.assert_allclose(scores, np.arange(101), atol=1e-9)
    scores = np.rint(scores)
    threshold = calibration.fit_threshold(scores, 0.05)
    assert threshold == 5
    assert (scores < threshold).mean() == pytest.approx(5 / 101)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: calibration.fit_temperature([1.0, 2.0], [0]), ValueError, r"logits must have 2 axes \(N, K\)"),
        (lambda: calibration.fit_temperature([[1.0, np.nan]], [0]), ValueError, "logits must be finite"),
        (lambda: calibration.fit_temperature([[1.0, 2.0]], [2]), ValueError, r"labels must lie in 0 \.\.\. 1, got 2"),
        (lambda: calibration.fit_temperature([[1.0, 2.0]], [0.0]), TypeError, "labels must be integer"),
        (lambda: calibration.fit_temperature([[1.0, 2.0]], [0, 1]), ValueError, "labels must have shape"),
        (lambda: calibration.expected_calibration_error([[3.0, 1.0]], [0]), ValueError, "probabilities must be"),
        (lambda: calibration.reliability(PROBABILITIES, TRUE, 0), ValueError, "bins must be at least 1"),
        (lambda: calibration.fit_threshold([1.0, 2.0], 1.5), ValueError, "quantile must be"),
        (lambda: calibration.fit_threshold([[1.0]]), ValueError, "scores must have 1 axes"),
        (lambda: data.not_digits(0), ValueError, "count must be at least 1"),
    ],
)
def test_wrong_arguments_are_refused_by_name(call, error, words):
    with pytest.raises(error, match=words):
        call()


def test_not_digits_are_prepared_and_reproducible():
    images = data.not_digits(12, rng=5)
    assert images.shape == (12, 28, 28)
    assert images.dtype == np.uint8
    assert (images.max(axis=(1, 2)) == 255).all()
    assert len({image.tobytes() for image in images}) == 12
    np.testing.assert_array_equal(images, data.not_digits(12, rng=5))
