from __future__ import annotations

import dataclasses
import itertools
import math
from fractions import Fraction

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
    Pair,
    contrasts,
    detectable_effect,
    equivalence_p,
    holm,
    interquartile_mean,
    mcnemar,
    paired,
    probability_better,
    seeds_needed,
    t_interval,
)


def generator(seed=0):
    return np.random.default_rng(seed)


def contrast(arm, baseline, correct_arm, correct_baseline, random, **settings):
    (found,) = contrasts([Pair(arm, baseline, correct_arm, correct_baseline)], random, **settings)
    return found


def sign_flip_p(differences, random):
    (found,) = paired.sign_flip_p(differences[None], random)
    return found


def crossed_bootstrap(arm, baseline, random, **settings):
    (found,) = paired.crossed_bootstrap([100 * (arm.astype(float) - baseline.astype(float))], random, **settings)
    return found


def matrix(correct, examples):
    """Bool `[S, N]` with the given number of correct examples per seed."""
    return np.arange(examples)[None, :] < np.asarray(correct)[:, None]


@st.composite
def matrices(draw, least_seeds=1):
    shape = draw(st.integers(least_seeds, 8)), draw(st.integers(1, 30))
    random = generator(draw(st.integers(0, 10**6)))
    rates = draw(st.sampled_from([(0.5, 0.5), (0.8, 0.9), (0.3, 0.9), (1.0, 0.5), (1.0, 1.0)]))
    return tuple(random.random(shape) < rate for rate in rates)


# The sign-flip test


def brute_force(counts):
    """Share of all sign patterns whose sum is at least as far from 0, in whole numbers."""
    sums = [abs(sum(pattern)) for pattern in itertools.product(*((count, -count) for count in counts))]
    return Fraction(sum(total >= abs(sum(counts)) for total in sums), len(sums))


@given(counts=st.lists(st.integers(-12, 12), min_size=1, max_size=8))
def test_sign_flip_is_exact(counts):
    found = sign_flip_p(np.array(counts, dtype=float), generator())
    assert found == pytest.approx(float(brute_force(counts)), abs=1e-12)


@settings(max_examples=30)
@given(
    counts=st.lists(st.integers(-9, 9), min_size=2, max_size=8),
    baseline=st.lists(st.integers(9, 50), min_size=8, max_size=8),
    examples=st.sampled_from([59, 67]),
)
@example(counts=[1, 0, -1, 9, -6, 5], baseline=[23, 41, 30, 17, 45, 38, 9, 9], examples=67)
def test_the_p_of_a_contrast_is_exact(counts, baseline, examples):
    baseline = np.array(baseline[: len(counts)])
    found = contrast("a", "b", matrix(baseline + counts, examples), matrix(baseline, examples), generator())
    assert found.p_value == pytest.approx(float(brute_force(counts)), abs=1e-12)


def test_rounding_never_makes_a_result_significant():
    """Equal sums of whole examples are ties: as accuracies in points they differ in the last digit."""
    baseline = np.array([783, 793, 786, 786, 796, 784, 794, 790, 786])
    counts = [2, 1, -1, 5, 5, 3, 2, -2, 4]
    assert float(brute_force(counts)) == 0.0546875
    found = contrast("a", "b", matrix(baseline + counts, 872), matrix(baseline, 872), generator())
    assert found.p_value == 0.0546875


@pytest.mark.parametrize("seeds", [*range(2, 13), 16])
def test_the_smallest_p_is_that_of_all_seeds_agreeing(seeds):
    differences = np.linspace(0.1, 2.0, seeds)
    assert sign_flip_p(differences, generator()) == pytest.approx(2 / 2**seeds)
    assert sign_flip_p(-differences, generator()) == pytest.approx(2 / 2**seeds)


def test_below_the_least_number_of_seeds_nothing_can_be_significant():
    assert 2 / 2 ** (MIN_SEEDS - 1) > ALPHA
    assert 2 / 2**MIN_SEEDS < ALPHA


@pytest.mark.parametrize("differences", [[0.3], [-7.0], [0.0], [0.0, 0.0, 0.0], [0.0] * 20])
def test_one_seed_or_no_difference_is_no_evidence(differences):
    assert sign_flip_p(np.array(differences), generator()) == 1.0


@given(
    differences=st.lists(st.integers(-40, 40), min_size=2, max_size=8),
    order=st.randoms(use_true_random=False),
    scale=st.sampled_from([0.25, 1.0, 8.0]),
)
def test_sign_flip_knows_neither_the_direction_nor_the_order_nor_the_unit(differences, order, scale):
    values = np.array(differences, dtype=float)
    p = sign_flip_p(values, generator())
    shuffled = list(differences)
    order.shuffle(shuffled)
    assert sign_flip_p(-values, generator()) == pytest.approx(p)
    assert sign_flip_p(scale * np.array(shuffled, dtype=float), generator()) == pytest.approx(p)


def test_many_seeds_are_sampled_from_the_given_generator():
    differences = generator(1).normal(0.5, 1.0, size=20)
    first, again, other = (sign_flip_p(differences, generator(seed)) for seed in (0, 0, 1))
    assert first == again
    assert first != other
    # The exact p is near the t test's for normal differences; 99,999 draws place it within 0.002.
    assert first == pytest.approx(stats.ttest_1samp(differences, 0).pvalue, abs=0.015)
    assert other == pytest.approx(first, abs=0.005)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["normal", "skewed pairs", "counts"])
def test_the_error_rate_at_ten_seeds_is_what_it_promises(kind):
    random, runs = generator(7), 300
    rejections = 0
    for _ in range(runs):
        if kind == "normal":
            differences = random.normal(size=10)
        elif kind == "skewed pairs":  # two independent draws of one skewed distribution
            differences = random.exponential(size=10) - random.exponential(size=10)
        else:  # accuracies of two equal arms
            differences = 100 * (random.binomial(872, 0.9, size=10) - random.binomial(872, 0.9, size=10)) / 872
        rejections += sign_flip_p(differences, random) < ALPHA
    low, high = stats.binom.ppf([1e-4, 1 - 1e-4], runs, ALPHA)
    assert low <= rejections <= high


# Intervals


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
