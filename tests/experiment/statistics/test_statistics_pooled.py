from __future__ import annotations

import numpy as np
import pytest

from crisp_attention.experiment.statistics import crossed_error, pooled, sign_flip_p


def tables(random, *shapes, gain=0.0):
    """What each seed and example of a study adds: mostly nothing, sometimes one side alone is right."""
    return [random.choice([-1, 0, 1], size=shape, p=[0.1, 0.8 - gain, 0.1 + gain]) for shape in shapes]


def test_one_study_is_itself():
    random = np.random.default_rng(0)
    (table,) = tables(random, (10, 200))
    found = pooled([table], random)
    assert found.seeds == 10
    assert found.difference == pytest.approx(100 * table.mean())
    assert found.p_value == sign_flip_p(100 * table.mean(axis=1)[None], random)[0]
    assert found.over_studies is None
    half = (found.interval.high - found.interval.low) / 2
    assert half == pytest.approx(2.2622 * 100 * crossed_error(table), rel=1e-4)  # t with 9 degrees of freedom


def test_each_study_weighs_alike_whatever_its_size():
    few, many = np.zeros((4, 10)), np.ones((12, 1000))
    found = pooled([few, many], np.random.default_rng(0))
    assert found.seeds == 16
    assert found.difference == pytest.approx(50.0)


def test_studies_that_agree_leave_less_doubt_and_such_that_do_not_leave_more_over_other_data():
    random = np.random.default_rng(1)
    one, other = tables(random, (10, 300), (10, 300), gain=0.05)
    alone, both = pooled([one], random), pooled([one, other], random)
    assert both.interval.high - both.interval.low < alone.interval.high - alone.interval.low
    apart = pooled([one, -other], random)
    assert apart.over_studies.high - apart.over_studies.low > both.over_studies.high - both.over_studies.low


def test_intervals_hold_the_truth_as_often_as_they_say():
    random = np.random.default_rng(2)
    held = []
    for _ in range(300):
        sets = []
        for _ in range(3):
            seeds, examples = random.normal(size=(8, 1)), random.normal(size=(1, 60))
            sets.append(seeds + 3 * examples + 3 * random.normal(size=(8, 60)))
        found = pooled(sets, random)
        held.append(found.interval.low < 0 < found.interval.high)
    assert 0.91 < np.mean(held) <= 1.0
