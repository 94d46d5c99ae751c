from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import optimize
from scipy.special import log_softmax, softmax

from crisp_attention.experiment.statistics import (
    BINS,
    brier,
    calibration_error,
    confidence,
    nll,
    reliability,
    rescaled,
    temperature,
)


def generator(seed=0):
    return np.random.default_rng(seed)


def calibrated(seeds, examples, classes, sharpness=1.0, seed=0):
    """Logits near those whose softmax is the truth, made sharper or flatter; labels drawn from the truth."""
    random = generator(seed)
    logits = random.normal(size=(1, examples, classes)) * 1.5
    logits = np.concatenate([logits, logits + random.normal(size=(seeds - 1, examples, classes)) / 3])
    labels = np.array([random.choice(classes, p=row) for row in softmax(logits[0], axis=1)])
    return (sharpness * logits).astype(np.float32), labels


@st.composite
def predictions(draw):
    classes, examples = draw(st.integers(2, 4)), draw(st.integers(1, 40))
    random = generator(draw(st.integers(0, 10**6)))
    return random.normal(size=(examples, classes)) * draw(st.sampled_from([0.1, 1, 8])), random.integers(
        classes, size=examples
    )


# Scores by example


@given(given=predictions())
@settings(max_examples=40)
def test_scores_are_those_of_their_definitions(given):
    logits, labels = given
    for row, (logit, label) in enumerate(zip(logits, labels, strict=True)):
        shares = np.exp(logit - logit.max()) / np.exp(logit - logit.max()).sum()
        target = np.eye(len(logit))[label]
        assert nll(logits, labels)[row] == pytest.approx(-np.log(shares[label]), rel=1e-9)
        assert brier(logits, labels)[row] == pytest.approx(sum((shares - target) ** 2))
        assert confidence(logits)[row] == pytest.approx(shares.max())


def test_brier_runs_from_certainly_right_to_certainly_wrong():
    sure = np.array([[50.0, -50.0]])
    assert brier(sure, np.array([0])) == pytest.approx([0.0])
    assert brier(sure, np.array([1])) == pytest.approx([2.0])
    assert brier(np.zeros((1, 2)), np.array([1])) == pytest.approx([0.5])


def test_an_extreme_logit_is_no_infinity():
    logits = np.array([[2000.0, -2000.0]], dtype=np.float32)
    assert nll(logits, np.array([1])) == pytest.approx([4000.0])
    assert np.isfinite(temperature(logits[None], np.array([1]))).all()


@given(given=predictions(), order=st.randoms(use_true_random=False))
@settings(max_examples=25)
def test_class_names_and_the_order_of_examples_mean_nothing(given, order):
    logits, labels = given
    classes = list(range(logits.shape[1]))
    order.shuffle(classes)
    renamed = np.argsort(classes)[labels]
    np.testing.assert_allclose(nll(logits[:, classes], renamed), nll(logits, labels))
    np.testing.assert_allclose(brier(logits[:, classes], renamed), brier(logits, labels))
    np.testing.assert_allclose(
        temperature(logits[None][..., classes], renamed), temperature(logits[None], labels), rtol=1e-6
    )
    rows = generator(1).permutation(len(labels))
    np.testing.assert_allclose(
        temperature(logits[None, rows], labels[rows]), temperature(logits[None], labels), rtol=1e-6
    )


# Calibration error


def slow_error(confidences, correct, bins):
    """Sorted, cut into parts of equal size, the larger ones first."""
    order = sorted(range(len(confidences)), key=lambda item: confidences[item])
    error, start = 0.0, 0
    for number in range(min(bins, len(order))):
        size = len(order) // min(bins, len(order)) + (number < len(order) % min(bins, len(order)))
        part = order[start : start + size]
        start += size
        gap = np.mean([confidences[item] for item in part]) - np.mean([correct[item] for item in part])
        error += abs(gap) * size / len(order)
    return error


@given(size=st.integers(1, 80), bins=st.integers(1, 20), seed=st.integers(0, 999))
def test_the_calibration_error_is_that_of_bins_of_equal_mass(size, bins, seed):
    random = generator(seed)
    confidences, correct = random.permutation(size) / size, random.random(size) < 0.7
    assert calibration_error(confidences, correct, bins) == pytest.approx(slow_error(confidences, correct, bins))
    curve = reliability(confidences, correct, bins)
    assert sum(item.count for item in curve) == size
    assert max(item.count for item in curve) - min(item.count for item in curve) <= 1
    assert [item.confidence for item in curve] == sorted(item.confidence for item in curve)
    assert sum(item.count * item.accuracy for item in curve) == pytest.approx(correct.sum())


def test_overconfidence_is_found_and_calibration_is_little():
    logits, labels = calibrated(1, 20_000, 3)
    right = logits[0].argmax(axis=1) == labels
    assert calibration_error(confidence(logits[0]), right) < 0.02
    sharp = confidence(4 * logits[0])
    assert calibration_error(sharp, right) == pytest.approx(sharp.mean() - right.mean(), abs=0.01)
    assert len(reliability(sharp, right)) == BINS


def test_always_sure_and_always_right_is_no_error():
    assert calibration_error(np.ones(50), np.ones(50, dtype=bool)) == 0.0
    assert calibration_error(np.ones(50), np.zeros(50, dtype=bool)) == 1.0


# Temperature


@pytest.mark.parametrize("sharpness", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("classes", [2, 5])
def test_the_temperature_is_the_most_likely_one(sharpness, classes):
    logits, labels = calibrated(3, 400, classes, sharpness)
    found = temperature(logits, labels)
    for place in range(3):

        def loss(log_temperature, place=place):
            scaled = logits[place].astype(float) / np.exp(log_temperature)
            return -log_softmax(scaled, axis=1)[np.arange(400), labels].mean()

        best = optimize.minimize_scalar(loss, bounds=(-2.9, 2.9), method="bounded", options={"xatol": 1e-9})
        assert loss(np.log(found[place])) <= best.fun + 1e-9
    assert found[0] == pytest.approx(sharpness, rel=0.25)


def test_where_no_temperature_is_best_it_stays_in_its_bounds():
    logits, labels = np.array([[[2.0, 0.0], [1.0, 0.0]]]), np.array([0, 0])
    assert temperature(logits, labels) == pytest.approx([1 / 20], rel=1e-6)
    assert temperature(logits, 1 - labels) == pytest.approx([20], rel=1e-6)


def test_scaling_mends_overconfidence_and_keeps_every_answer():
    logits, labels = calibrated(2, 3000, 3, sharpness=3.0)
    scaled = rescaled(logits, labels, generator())
    np.testing.assert_array_equal(scaled.argmax(axis=-1), logits.argmax(axis=-1))
    right = logits[0].argmax(axis=1) == labels
    assert calibration_error(confidence(logits[0]), right) > 0.1
    assert calibration_error(confidence(scaled[0]), right) < 0.04


def test_no_example_is_judged_by_a_temperature_that_saw_its_label():
    """Another label changes the scaling of the other half only."""
    logits, labels = calibrated(1, 60, 2)
    before = rescaled(logits, labels, generator())
    for row in (0, 17, 59):
        changed = labels.copy()
        changed[row] = 1 - changed[row]
        after = rescaled(logits, changed, generator())
        moved = (before != after).any(axis=(0, 2))
        assert not moved[row]
        assert moved.sum() == 30


def test_a_single_example_cannot_be_scaled():
    logits = np.array([[[1.0, 3.0]]], dtype=np.float32)
    np.testing.assert_array_equal(rescaled(logits, np.array([1]), generator()), logits)


def test_seeds_are_scaled_each_on_its_own():
    logits, labels = calibrated(3, 100, 2)
    logits[1] *= 4
    together = rescaled(logits, labels, generator(5))
    for place in range(3):
        alone = rescaled(logits[place : place + 1], labels, generator(5))
        np.testing.assert_allclose(together[place], alone[0])
