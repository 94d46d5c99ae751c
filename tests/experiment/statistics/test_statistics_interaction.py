from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from crisp_attention.experiment.statistics import MIN_SEEDS, linear_trend, slopes

SIZES = {"train_examples=100": 100.0, "train_examples=400": 400.0, "train_examples=3200": 3200.0}
NOISE = {"label_noise=0": 0.0, "label_noise=0.2": 0.2, "label_noise=0.4": 0.4}


def generator(seed=0):
    return np.random.default_rng(seed)


def trend(differences, conditions=SIZES, factor="train_examples", **settings):
    return linear_trend("a", "b", factor, conditions, np.asarray(differences, float), 50, generator(), **settings)


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
    assert (found.seeds, found.examples, found.values) == (MIN_SEEDS, 50, (100.0, 400.0, 3200.0))


def test_a_gain_with_noise_is_a_rising_trend_per_ten_points():
    found = trend([[0, 1, 2], [1, 2, 3]], NOISE, "label_noise")
    assert found.slopes == pytest.approx((0.5, 0.5))
    assert found.unit == "10 points of label noise"


def test_the_interval_is_students_over_the_slopes():
    values = generator(1).normal(size=(9, 3))
    for alpha in (0.05, 0.05 / 3):
        found = trend(values, alpha=alpha)
        expected = stats.ttest_1samp(found.slopes, 0).confidence_interval(1 - alpha)
        assert (found.interval.low, found.interval.high) == pytest.approx((expected.low, expected.high))
    assert trend(values[:1]).interval is None


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
    assert (other.interval.low, other.interval.high) == pytest.approx((-one.interval.high, -one.interval.low))


def test_the_error_rate_of_the_trend_is_what_it_promises():
    random, runs = generator(4), 400
    rejections = sum(trend(random.normal(size=(7, 3))).p_value < 0.05 for _ in range(runs))
    low, high = stats.binom.ppf([1e-4, 1 - 1e-4], runs, 0.05)
    assert low <= rejections <= high
