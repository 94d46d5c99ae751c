"""Equivalence, two checkpoints, several contrasts, power, and the whole contrast."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from scipy import integrate, special, stats
from statsmodels.stats.contingency_tables import mcnemar as statsmodels_mcnemar

from crisp_attention.experiment.statistics import (
    ALPHA,
    EQUIVALENCE_MARGIN,
    MIN_SEEDS,
    POWER,
    Interval,
    McNemar,
    detectable_effect,
    equivalence_p,
    holm,
    interquartile_mean,
    mcnemar,
    probability_better,
    seeds_needed,
    t_interval,
)
from statistics_builders import brute_force, contrast, crossed_bootstrap, generator, matrices, matrix

# Equivalence


@given(values=st.lists(st.floats(-3, 3), min_size=2, max_size=12), margin=st.floats(0.1, 2))
def test_equivalence_is_the_worse_of_two_one_sided_t_tests(values, margin):
    values = np.array(values)
    assume(values.std() > 1e-6)
    lower = stats.ttest_1samp(values, -margin, alternative="greater").pvalue
    upper = stats.ttest_1samp(values, margin, alternative="less").pvalue
    assert equivalence_p(values, margin) == pytest.approx(max(lower, upper), rel=1e-9, abs=1e-12)


@pytest.mark.parametrize(("value", "expected"), [(0.0, 0.0), (0.4, 0.0), (-0.4, 0.0), (0.5, 1.0), (-0.5, 1.0), (3, 1)])
def test_without_spread_equivalence_is_certain_either_way(value, expected):
    assert equivalence_p(np.full(7, float(value)), 0.5) == expected


# Two checkpoints


@given(pair=matrices())
@settings(max_examples=30)
def test_mcnemar_is_statsmodels_exact_test(pair):
    arm, baseline = (table[0] for table in pair)
    found = mcnemar(arm, baseline, 3)
    table = [[int((arm & baseline).sum()), found.only_arm], [found.only_baseline, int((~arm & ~baseline).sum())]]
    assert np.sum(table) == len(arm)
    assert found.p_value == pytest.approx(float(statsmodels_mcnemar(table, exact=True).pvalue))
    assert found.index == 3
    turned = mcnemar(baseline, arm, 3)
    assert (turned.only_arm, turned.only_baseline) == (found.only_baseline, found.only_arm)
    assert turned.p_value == found.p_value


def test_two_checkpoints_that_agree_are_no_evidence():
    arm = generator().random(40) < 0.8
    assert mcnemar(arm, arm.copy(), 0) == McNemar(0, 0, 0, 1.0)


# Several contrasts, and summaries


def slow_holm(p_values):
    """Step down from the smallest: (C - rank) p, never below the one before, never above 1."""
    adjusted, highest = [0.0] * len(p_values), 0.0
    for rank, place in enumerate(sorted(range(len(p_values)), key=lambda item: p_values[item])):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[place]))
        adjusted[place] = highest
    return adjusted


@settings(max_examples=8)
@given(p_values=st.lists(st.floats(0, 1), max_size=8))
def test_holm_steps_down(p_values):
    assert holm(np.array(p_values)).tolist() == pytest.approx(slow_holm(p_values))


@given(
    arm=st.lists(st.integers(0, 9), min_size=1, max_size=9),
    baseline=st.lists(st.integers(0, 9), min_size=1, max_size=9),
)
def test_probability_better_is_mann_whitneys(arm, baseline):
    arm, baseline = np.array(arm), np.array(baseline)
    expected = stats.mannwhitneyu(arm, baseline, method="asymptotic").statistic / (len(arm) * len(baseline))
    assert probability_better(arm, baseline) == pytest.approx(expected)
    assert probability_better(arm, baseline) + probability_better(baseline, arm) == pytest.approx(1)


def test_the_interquartile_mean_leaves_out_a_quarter_at_either_end():
    assert interquartile_mean(np.array([100.0, 1, 2, 3, 4, -50, 2.5, 3.5])) == pytest.approx((2 + 2.5 + 3 + 3.5) / 4)
    assert interquartile_mean(np.array([1.0, 3.0, 8.0])) == pytest.approx(4)
    assert interquartile_mean(np.array([7.0])) == 7


# Power


def power(effect, pairs):
    """Of a two-sided paired t test at 5%: the chance that |Z + shift| exceeds the critical value, over the spread."""
    df, shift = pairs - 1, effect * math.sqrt(pairs)
    critical = stats.t.ppf(1 - ALPHA / 2, df)

    def given_spread(level):
        bound = critical * math.sqrt(special.chdtri(df, level) / df)
        return special.ndtr(shift - bound) + special.ndtr(-bound - shift)

    return integrate.quad(given_spread, 0, 1, epsabs=1e-7, limit=200)[0]


@pytest.mark.parametrize("seeds", [2, 3, 5, 6, 10, 20, 100, 1000])
@pytest.mark.parametrize("spread", [0.1, 1.0, 7.5])
def test_the_detectable_effect_is_found_with_80_percent_power(seeds, spread):
    assert power(detectable_effect(spread, seeds) / spread, seeds) == pytest.approx(POWER, abs=1e-4)


@settings(max_examples=40)
@given(spread=st.floats(0.01, 60), effect=st.sampled_from([0.5, 1.0, 2.0]))
@example(spread=1 / 6, effect=1.0)
@example(spread=0.15, effect=1.0)
@example(spread=0.0, effect=1.0)
@example(spread=1e-14, effect=1.0)
def test_seeds_needed_is_the_least_number_that_has_the_power(spread, effect):
    found = seeds_needed(effect, spread)
    assert found >= MIN_SEEDS
    if spread:
        assert power(effect / spread, found) > POWER - 1e-5
        assert found == MIN_SEEDS or power(effect / spread, found - 1) < POWER + 1e-5


@settings(max_examples=25)
@given(seeds=st.integers(MIN_SEEDS, 300), spread=st.floats(0.05, 20))
def test_seeds_needed_is_the_inverse_of_the_detectable_effect(seeds, spread):
    effect = detectable_effect(spread, seeds)
    assert seeds_needed(effect * 1.0001, spread) == seeds
    assert seeds_needed(effect * 0.9999, spread) in (seeds, seeds + 1)
    assert seeds_needed(effect * 0.8, spread) > seeds


def test_without_spread_any_effect_is_detectable():
    assert detectable_effect(0.0, 10) == 0.0
    assert seeds_needed(0.001, 0.0) == MIN_SEEDS


# The whole contrast


def test_a_contrast_in_numbers_worked_by_hand():
    arm, baseline = matrix([90, 92, 91, 95], 100), matrix([89, 92, 93, 91], 100)
    found = contrast("a", "b", arm, baseline, generator())
    assert (found.arm, found.baseline, found.seeds, found.examples) == ("a", "b", 4, 100)
    assert found.differences == pytest.approx((1, 0, -2, 4))
    assert found.difference == pytest.approx(0.75)
    assert found.spread == pytest.approx(math.sqrt((0.25**2 + 0.75**2 + 2.75**2 + 3.25**2) / 3))
    assert found.p_value == float(brute_force([1, 0, -2, 4]))
    assert found.p_holm is None
    assert found.effect_size == pytest.approx(0.75 / found.spread)
    # 90 beats 89; 91 beats 89 and ties 91; 92 beats 89, 91 and ties 92; 95 beats all.
    assert found.probability_better == pytest.approx((1 + 1.5 + 2.5 + 4) / 16)
    assert found.sentences == pytest.approx(0.75)
    expected = crossed_bootstrap(arm, baseline, generator())
    assert (found.interval.low, found.interval.high) == pytest.approx((expected.low, expected.high))
    assert found.seed_interval == t_interval(np.array([1.0, 0, -2, 4]))
    assert found.p_equivalence == pytest.approx(equivalence_p(np.array([1.0, 0, -2, 4]), EQUIVALENCE_MARGIN))
    assert found.detectable == pytest.approx(detectable_effect(found.spread, 4))


@given(pair=matrices(least_seeds=2))
@settings(max_examples=20)
def test_swapping_the_arms_turns_a_contrast_over(pair):
    one = contrast("a", "b", *pair, generator())
    other = contrast("b", "a", *pair[::-1], generator())
    assert other.p_value == pytest.approx(one.p_value)
    assert other.p_equivalence == pytest.approx(one.p_equivalence, abs=1e-9)
    assert (other.difference, other.sentences) == pytest.approx((-one.difference, -one.sentences))
    assert (other.interval.low, other.interval.high) == pytest.approx((-one.interval.high, -one.interval.low))
    assert other.probability_better == pytest.approx(1 - one.probability_better)
    assert other.spread == pytest.approx(one.spread)


@given(pair=matrices(least_seeds=2), seed=st.integers(0, 99))
@settings(max_examples=20)
def test_the_order_of_seeds_and_examples_means_nothing(pair, seed):
    seeds, examples = pair[0].shape
    assume(len({int(count) for count in pair[0].sum(1) - pair[1].sum(1)}) > 1)
    rows, columns = generator(seed).permutation(seeds), generator(seed).permutation(examples)
    one = contrast("a", "b", *pair, generator())
    other = contrast("a", "b", *(table[rows][:, columns] for table in pair), generator())
    assert sorted(other.differences) == sorted(one.differences)
    names = ["difference", "p_value", "spread", "probability_better", "p_equivalence", "effect_size", "detectable"]
    for name in names:
        assert getattr(other, name) == pytest.approx(getattr(one, name), rel=1e-9, abs=1e-12), name


@given(pair=matrices())
@settings(max_examples=20)
def test_the_sign_is_arm_minus_baseline(pair):
    found = contrast("a", "b", *pair, generator())
    assert np.sign(round(found.difference, 9)) == np.sign(int(pair[0].sum()) - int(pair[1].sum()))
    assert found.sentences == pytest.approx((int(pair[0].sum()) - int(pair[1].sum())) / len(pair[0]))
    assert found.seeds == len(found.differences)


@pytest.mark.parametrize(
    "shapes",
    [((3, 4), (3, 5)), ((3, 4), (2, 4)), ((4,), (4,)), ((0, 4), (0, 4)), ((3, 0), (3, 0)), ((2, 3, 4), (2, 3, 4))],
)
def test_shapes_that_do_not_fit_are_refused(shapes):
    with pytest.raises(ValueError, match=r"expected two \[S, N\] arrays, got") as caught:
        contrast("a", "b", *(np.zeros(shape, dtype=bool) for shape in shapes), generator())
    assert str(shapes[1]) in str(caught.value)


def test_one_seed_has_no_spread_and_no_test():
    found = contrast("a", "b", matrix([95], 100), matrix([90], 100), generator())
    assert found.difference == pytest.approx(5)
    assert found.p_value == 1.0
    unknown = ("spread", "seed_interval", "effect_size", "p_equivalence", "detectable", "detectable_verdict")
    assert [getattr(found, name) for name in unknown] == [None] * len(unknown)
    assert found.interval.low < 5 < found.interval.high
    assert found.probability_better == 1.0


@pytest.mark.parametrize("examples", [60, 872])
@pytest.mark.parametrize("count", [0, 1, -2])
def test_equal_differences_have_no_spread_also_where_the_accuracies_differ(examples, count):
    """All seeds differ by the same number of examples: rounding must not pass for a spread."""
    baseline = np.array([30, 37, 41, 44, 51, 57])
    found = contrast("a", "b", matrix(baseline + count, examples), matrix(baseline, examples), generator())
    assert found.spread == 0.0
    assert found.effect_size is None
    assert found.detectable == 0.0
    assert found.p_value == (1.0 if count == 0 else 2 / 2**6)
    assert found.p_equivalence == (0.0 if abs(100 * count / examples) < EQUIVALENCE_MARGIN else 1.0)
    assert found.seed_interval.low == pytest.approx(100 * count / examples)
    assert found.seed_interval.high == pytest.approx(100 * count / examples)


def test_a_contrast_with_itself_is_nothing():
    arm = generator(0).random((8, 50)) < 0.8
    found = contrast("a", "b", arm, arm.copy(), generator())
    assert (found.difference, found.p_value, found.interval) == (0.0, 1.0, Interval(0.0, 0.0))
    assert (found.effect_size, found.probability_better, found.p_equivalence) == (None, pytest.approx(0.5), 0.0)


def test_a_contrast_repeats_for_a_generator_at_any_number_of_seeds():
    random = generator(2)
    for seeds in (3, 20):
        arm, baseline = random.random((seeds, 40)) < 0.8, random.random((seeds, 40)) < 0.75
        assert contrast("a", "b", arm, baseline, generator(5)) == contrast("a", "b", arm, baseline, generator(5))


def test_global_randomness_is_left_alone():
    arm, baseline = matrix(range(40, 60), 100), matrix(range(41, 61), 100)
    state = np.random.get_state()[1].copy()  # noqa: NPY002
    contrast("a", "b", arm, baseline, generator())
    assert np.array_equal(np.random.get_state()[1], state)  # noqa: NPY002


def test_a_contrast_cannot_be_changed():
    found = contrast("a", "b", matrix([9], 10), matrix([8], 10), generator())
    with pytest.raises(dataclasses.FrozenInstanceError):
        found.p_value = 0.01
