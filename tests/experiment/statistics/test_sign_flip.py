"""The sign-flip test."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy import stats

from crisp_attention.experiment.statistics import (
    ALPHA,
    MIN_SEEDS,
)
from statistics_builders import brute_force, contrast, generator, matrix, sign_flip_p


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
