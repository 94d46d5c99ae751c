from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from crisp_attention.experiment.statistics import MIN_SEEDS, crossed_error, linear_trends, slopes, slopes_by_example

SIZES = {"train_examples=100": 100.0, "train_examples=400": 400.0, "train_examples=3200": 3200.0}
NOISE = {"label_noise=0": 0.0, "label_noise=0.2": 0.2, "label_noise=0.4": 0.4}


def generator(seed=0):
    return np.random.default_rng(seed)


EXAMPLES = 50


def trend(differences, conditions=SIZES, factor="train_examples", **settings):
    """Of differences `[S, K]` in points, to which every example contributes alike."""
    by_example = np.repeat(np.asarray(differences, float).T[:, :, None] / 100, EXAMPLES, axis=2)
    return trend_of(by_example, conditions, factor, **settings)


def trend_of(by_example, conditions=SIZES, factor="train_examples", **settings):
    (found,) = linear_trends({"a": by_example}, "b", factor, conditions, generator(), **settings)
    return found


def answers(random, seeds=8, examples=200, gains=(0.0, 0.0, 0.0)):
    """Answers of two arms `[K, S, N]`, some sentences harder than others; the arm gains as much in each condition."""
    hardness = random.uniform(0.3, 0.9, size=examples)
    right = random.random((2, len(gains), seeds, examples)) < hardness
    gained = random.random((len(gains), seeds, examples)) < np.asarray(gains)[:, None, None]
    return (right[0] | gained).astype(np.int8) - right[1].astype(np.int8)


@given(seed=st.integers(0, 999), seeds=st.integers(1, 8), places=st.integers(2, 6))
@settings(max_examples=30)
def test_slopes_are_least_squares(seed, seeds, places):
    random = generator(seed)
    positions = np.cumsum(random.uniform(0.1, 3, size=places))
    values = random.normal(size=(seeds, places))
    expected = [stats.linregress(positions, row).slope for row in values]
    np.testing.assert_allclose(slopes(positions, values), expected, atol=1e-12)


def test_a_gain_with_few_examples_is_a_falling_trend_per_doubling():
    found = trend([[6, 4, 1]] * MIN_SEEDS)  # 0, 2 and 5 doublings: exactly one point lost in each
    assert found.slopes == pytest.approx([-1.0] * MIN_SEEDS)
    assert found.slope == pytest.approx(-1.0)
    assert found.unit == "doubling of the training examples"
    assert found.differences == pytest.approx((6, 4, 1))
    assert found.p_value == pytest.approx(2 / 2**MIN_SEEDS)
    assert (found.seeds, found.examples, found.values) == (MIN_SEEDS, EXAMPLES, (100.0, 400.0, 3200.0))


def test_a_gain_with_noise_is_a_rising_trend_per_ten_points():
    found = trend([[0, 1, 2], [1, 2, 3]], NOISE, "label_noise")
    assert found.slopes == pytest.approx((0.5, 0.5))
    assert found.unit == "10 points of label noise"


def test_the_interval_on_these_examples_is_students_over_the_slopes():
    values = generator(1).normal(size=(9, 3))
    for alpha in (0.05, 0.05 / 3):
        found = trend(values, alpha=alpha)
        expected = stats.ttest_1samp(found.slopes, 0).confidence_interval(1 - alpha)
        assert (found.seed_interval.low, found.seed_interval.high) == pytest.approx((expected.low, expected.high))
    assert trend(values[:1]).seed_interval is None


def test_the_interval_is_for_other_seeds_and_other_examples():
    """A slope is a mean over sentences of what each adds to it: its standard error is the crossed one of these."""
    by_example = answers(generator(5), gains=(0.0, 0.1, 0.25))
    found = trend_of(by_example)
    steps = np.log2(list(SIZES.values()))
    own = [[stats.linregress(steps, cell).slope for cell in row] for row in by_example.transpose(1, 2, 0)]
    np.testing.assert_allclose(slopes_by_example(steps, by_example), own, atol=1e-12)
    assert found.slope == pytest.approx(100 * np.mean(own))
    width = found.interval.high - found.interval.low
    # The bootstrap counts what is particular to a seed and an example up to three times, the standard error once.
    least = 2 * stats.norm.ppf(0.975) * 100 * crossed_error(np.array(own))
    assert 0.95 * least < width < 1.05 * np.sqrt(3) * least
    assert found.interval.low < found.slope < found.interval.high


def test_a_trend_does_not_depend_on_what_else_is_tested():
    """With many seeds the permutation test draws, too."""
    one, other = answers(generator(6), seeds=18), answers(generator(7), seeds=18, gains=(0.0, 0.0, 0.1))
    both = linear_trends({"a": one, "c": other}, "b", "train_examples", SIZES, generator())
    assert both[0] == trend_of(one)
    assert (both[1].arm, both[1].slopes) == ("c", trend_of(other).slopes)
    assert both[1].p_value == trend_of(other).p_value


def test_a_slope_that_hangs_on_a_few_sentences_is_not_shown_for_others():
    """Three sentences of 100, on which all seeds agree: the test over seeds is sure of it, the interval is not."""
    by_example = np.zeros((3, 8, 100), np.int8)
    by_example[0, :, :2], by_example[0, :, 2] = 1, -1
    found = trend_of(by_example)
    assert found.p_value < 0.01
    assert found.interval.low <= 0 <= found.interval.high
    assert found.seed_interval.high < 0


def test_what_is_the_same_everywhere_is_no_trend():
    """A seed's luck that all conditions share, however large, changes nothing."""
    random = generator(2)
    values = random.normal(size=(8, 3))
    lucky = values + 50 * random.normal(size=(8, 1))
    assert trend(lucky).slopes == pytest.approx(trend(values).slopes)
    assert trend(np.full((8, 3), 2.5)).p_value == 1.0


def test_the_direction_of_the_comparison_turns_the_trend_over():
    values = generator(3).normal(size=(7, 3))
    one, other = trend(values), trend(-values)
    assert other.slope == pytest.approx(-one.slope)
    assert other.p_value == one.p_value
    for own, turned in ((one.interval, other.interval), (one.seed_interval, other.seed_interval)):
        assert (turned.low, turned.high) == pytest.approx((-own.high, -own.low), abs=0.01)


def test_the_error_rate_of_the_trend_is_what_it_promises():
    random, runs = generator(4), 400
    rejections = sum(trend(random.normal(size=(7, 3))).p_value < 0.05 for _ in range(runs))
    low, high = stats.binom.ppf([1e-4, 1 - 1e-4], runs, 0.05)
    assert low <= rejections <= high
