"""Intervals over seeds and examples, and over seeds alone."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy import stats

from crisp_attention.experiment.statistics import (
    Interval,
    Pair,
    contrasts,
    paired,
    t_interval,
)
from statistics_builders import contrast, crossed_bootstrap, generator, matrices


def slow_bootstrap(arm, baseline, random, resamples):
    """Draws of the mean difference with rows and columns drawn by index."""
    difference = arm.astype(float) - baseline.astype(float)
    seeds, examples = difference.shape
    for _ in range(resamples):
        rows = random.integers(seeds, size=seeds)
        columns = random.integers(examples, size=examples)
        yield 100 * difference[rows][:, columns].mean()


def test_the_crossed_bootstrap_resamples_rows_and_columns():
    random = generator(3)
    arm, baseline = random.random((7, 40)) < 0.8, random.random((7, 40)) < 0.7
    found = crossed_bootstrap(arm, baseline, generator())
    draws = np.array(list(slow_bootstrap(arm, baseline, generator(5), 8000)))
    assert found.low == pytest.approx(np.quantile(draws, 0.025), abs=0.06 * np.ptp(draws))
    assert found.high == pytest.approx(np.quantile(draws, 0.975), abs=0.06 * np.ptp(draws))


def width(interval):
    return interval.high - interval.low


def test_seeds_count_as_a_sample_and_so_do_examples():
    random = generator(3)
    by_seed = np.repeat(random.random((12, 1)) < 0.5, 60, axis=1)  # all examples alike
    by_example = np.repeat(random.random((1, 60)) < 0.5, 12, axis=0)  # all seeds alike
    nothing = np.zeros((12, 60), dtype=bool)
    for arm, count in ((by_seed, 12), (by_example, 60)):
        share = arm.mean()
        error = 100 * math.sqrt(share * (1 - share) / count)
        found = crossed_bootstrap(arm, nothing, generator())
        assert width(found) == pytest.approx(2 * 1.96 * error, rel=0.15)
    # The seed interval is blind to the examples.
    assert width(t_interval(100 * by_example.mean(axis=1))) == pytest.approx(0, abs=1e-9)


def test_the_pairing_of_arms_is_kept():
    """A difference in a few examples has a narrow interval however much the seeds differ."""
    random = generator(4)
    baseline = random.random((8, 500)) < random.uniform(0.3, 0.9, size=(8, 1))
    arm = baseline.copy()
    arm[:, :2] = ~arm[:, :2]
    assert width(crossed_bootstrap(arm, baseline, generator())) < 2
    unpaired = crossed_bootstrap(arm, baseline[::-1], generator())
    assert width(unpaired) > 5


@given(pair=matrices(), seed=st.integers(0, 99))
@settings(max_examples=25)
def test_the_crossed_bootstrap_repeats_for_a_generator_and_holds_the_mean(pair, seed):
    first, again = (crossed_bootstrap(*pair, generator(seed), resamples=400) for _ in range(2))
    assert first == again
    mean = 100 * (pair[0].mean() - pair[1].mean())
    assert first.low - 1e-9 <= mean <= first.high + 1e-9
    assert -100 - 1e-9 <= first.low <= first.high <= 100 + 1e-9


@given(arm=matrices(), seed=st.integers(0, 99))
@settings(max_examples=25)
def test_identical_arms_differ_by_nothing(arm, seed):
    assert crossed_bootstrap(arm[0], arm[0].copy(), generator(seed), resamples=200) == Interval(0.0, 0.0)


def test_swapping_the_arms_turns_the_interval_over():
    random = generator(1)
    arm, baseline = random.random((6, 50)) < 0.8, random.random((6, 50)) < 0.6
    one, other = crossed_bootstrap(arm, baseline, generator()), crossed_bootstrap(baseline, arm, generator())
    assert (one.low, one.high) == pytest.approx((-other.high, -other.low))


def test_blocks_of_resamples_change_nothing_but_memory():
    """More examples than fit into one block."""
    random = generator(1)
    arm, baseline = random.random((2, 20_000)) < 0.8, random.random((2, 20_000)) < 0.7
    found = crossed_bootstrap(arm, baseline, generator(), resamples=450)
    mean = 100 * (arm.mean() - baseline.mean())
    error = 100 * math.sqrt((0.8 * 0.2 + 0.7 * 0.3) * (1 / 40_000) * 3)
    assert found.low == pytest.approx(mean - 1.96 * error, abs=error)
    assert found.high == pytest.approx(mean + 1.96 * error, abs=error)


@pytest.mark.slow
def test_the_crossed_bootstrap_covers_the_true_difference_of_equal_arms():
    """Seeds and examples both drawn anew each time; coverage may fall a little short at few seeds, not far."""
    random, runs, covered = generator(11), 200, 0
    for _ in range(runs):
        ability = random.normal(size=(1, 120))
        arms = [ability + random.normal(size=(10, 1)) * 0.3 + random.normal(size=(10, 120)) > 0 for _ in range(2)]
        interval = crossed_bootstrap(*arms, random, resamples=500)
        covered += interval.low <= 0 <= interval.high
    assert covered / runs > 0.88


def test_graded_outcomes_have_a_crossed_bootstrap_too():
    """Of normal differences whose seeds and examples both matter, by the same draws of rows and columns."""
    random = generator(6)
    values = random.normal(size=(8, 1)) + random.normal(size=(1, 50)) + 0.1 * random.normal(size=(8, 50))
    (found,) = paired.crossed_bootstrap([values], generator())
    draws = np.array(list(slow_bootstrap(values / 100, np.zeros_like(values), generator(5), 6000)))
    assert found.low == pytest.approx(np.quantile(draws, 0.025), abs=0.06 * np.ptp(draws))
    assert found.high == pytest.approx(np.quantile(draws, 0.975), abs=0.06 * np.ptp(draws))
    # Both are samples: the error is nearly that of seeds and of examples together.
    assert width(found) == pytest.approx(
        2 * 1.96 * math.sqrt(values.mean(1).var() / 8 + values.mean(0).var() / 50), rel=0.1
    )


def test_a_stricter_level_has_a_wider_interval():
    random = generator(3)
    arm, baseline = random.random((7, 40)) < 0.8, random.random((7, 40)) < 0.7
    usual, strict = (contrast("a", "b", arm, baseline, generator(), alpha=alpha) for alpha in (0.05, 0.05 / 3))
    assert (usual.alpha, strict.alpha) == (0.05, 0.05 / 3)
    for name in ("interval", "seed_interval"):
        assert width(getattr(strict, name)) > 1.1 * width(getattr(usual, name))
    assert strict.detectable > usual.detectable
    assert strict.p_value == usual.p_value


def test_what_else_is_compared_changes_nothing():
    random = generator(8)
    pairs = [Pair(name, "b", random.random((18, 40)) < 0.8, random.random((18, 40)) < 0.7) for name in "xyz"]
    together = contrasts(pairs, generator(2))
    assert [contrasts([pair], generator(2))[0] for pair in pairs] == together
    assert contrasts(pairs[::-1], generator(2)) == together[::-1]
    assert contrasts([], generator()) == []


def test_the_crossed_error_is_that_of_two_samples():
    """Truth by simulation: seeds and examples both drawn anew."""
    random, means, errors = generator(9), [], []
    for _ in range(300):
        table = 0.5 * random.normal(size=(10, 1)) + random.normal(size=(1, 30)) + 2 * random.normal(size=(10, 30))
        means.append(table.mean())
        errors.append(paired.crossed_error(table) ** 2)
    assert math.sqrt(np.mean(errors)) == pytest.approx(np.std(means), rel=0.15)


def test_the_crossed_error_of_one_example_is_that_of_the_seeds():
    values = np.array([[1.0], [2.0], [4.0]])
    assert paired.crossed_error(values) == pytest.approx(values.std(ddof=1) / math.sqrt(3))
    assert paired.crossed_error(np.ones((4, 5))) == 0.0


@given(values=st.lists(st.floats(-5, 5), min_size=2, max_size=12))
def test_the_seed_interval_is_students(values):
    values = np.array(values)
    assume(values.std() > 1e-6)
    expected = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    found = t_interval(values)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), rel=1e-9, abs=1e-9)


def test_without_spread_the_seed_interval_is_a_point():
    found = t_interval(np.full(5, 0.25))
    assert (found.low, found.high) == (0.25, 0.25)
