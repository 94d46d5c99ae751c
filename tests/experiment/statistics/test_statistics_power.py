from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from crisp_attention.experiment.statistics import (
    ALPHA,
    MIN_SEEDS,
    POWER,
    detectable_effect,
    least_seeds,
    look_at,
    seeds_needed,
    sign_flip_effect,
    sign_flip_p,
    smallest_p,
)


def test_the_least_number_of_seeds_is_that_of_the_sign_flip_test():
    assert least_seeds() == MIN_SEEDS
    for alpha in (0.2, 0.05, 0.05 / 3, 0.01, 0.001):
        seeds = least_seeds(alpha)
        assert smallest_p(seeds) < alpha <= smallest_p(seeds - 1)


def test_the_smallest_p_of_no_seeds_is_one():
    assert [smallest_p(seeds) for seeds in (0, 1, 2, 5)] == [1.0, 1.0, 0.5, 0.0625]


@pytest.mark.parametrize(
    ("complete", "number", "seeds"), [(0, 0, 0), (4, 0, 0), (5, 1, 5), (9, 1, 5), (10, 2, 10), (19, 2, 10), (20, 3, 20)]
)
def test_a_look_is_the_last_one_that_the_data_have_reached(complete, number, seeds):
    look = look_at((5, 10, 20), complete)
    assert (look.number, look.seeds, look.complete) == (number, seeds, complete)
    assert look.alpha == pytest.approx(ALPHA / 3)


def test_a_look_at_five_seeds_can_reach_nothing():
    look = look_at((5, 10, 20), 5)
    assert smallest_p(look.seeds) == 0.0625
    assert smallest_p(look.seeds) > look.alpha
    assert smallest_p(look_at((5, 10, 20), 10).seeds) < look.alpha


@pytest.mark.parametrize(("seeds", "alpha"), [(6, 0.05), (8, 0.05), (8, 0.05 / 3), (10, 0.05)])
def test_the_sign_flip_test_finds_its_smallest_effect_with_80_percent_power(seeds, alpha):
    size, runs = sign_flip_effect(seeds, alpha), 1500
    differences = np.random.default_rng(3).normal(size, 1, size=(runs, seeds))
    found = (sign_flip_p(differences, np.random.default_rng(0)) < alpha).sum()
    low, high = stats.binom.ppf([1e-4, 1 - 1e-4], runs, POWER)
    assert low - 20 <= found <= high + 20  # the effect is known to about one per cent of power


def test_with_few_seeds_the_sign_flip_test_needs_more_than_a_t_test():
    assert sign_flip_effect(MIN_SEEDS - 1) == math.inf
    # Six agree with probability 0.8 if each has its sign with 0.8^(1/6).
    assert sign_flip_effect(6) == pytest.approx(stats.norm.ppf(POWER ** (1 / 6)), abs=0.05)
    assert sign_flip_effect(6) > 1.15 * detectable_effect(1.0, 6)
    assert sign_flip_effect(11) == pytest.approx(detectable_effect(1.0, 11))
    assert 1 <= sign_flip_effect(10) / detectable_effect(1.0, 10) < 1.1


def test_a_stricter_level_needs_larger_effects_and_more_seeds():
    assert detectable_effect(1.0, 10, ALPHA / 3) > detectable_effect(1.0, 10)
    assert seeds_needed(1.0, 1.0, ALPHA / 3) > seeds_needed(1.0, 1.0)
    assert seeds_needed(1.0, 0.0, ALPHA / 3) == least_seeds(ALPHA / 3)
