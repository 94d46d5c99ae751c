from __future__ import annotations

import pytest

from crisp_attention.experiment.statistics import (
    ALPHA,
    MIN_SEEDS,
    detectable_effect,
    least_seeds,
    look_at,
    seeds_needed,
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
    assert look.smallest_p == 0.0625
    assert look.smallest_p > look.alpha
    assert look_at((5, 10, 20), 10).smallest_p < look.alpha


def test_a_stricter_level_needs_larger_effects_and_more_seeds():
    assert detectable_effect(1.0, 10, ALPHA / 3) > detectable_effect(1.0, 10)
    assert seeds_needed(1.0, 1.0, ALPHA / 3) > seeds_needed(1.0, 1.0)
    assert seeds_needed(1.0, 0.0, ALPHA / 3) == least_seeds(ALPHA / 3)
