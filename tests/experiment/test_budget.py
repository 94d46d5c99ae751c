"""Durations, and how many trials and seeds fit into one."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from crisp_attention.errors import ConfigurationError
from crisp_attention.experiment.budget import (
    LEAST_TRIALS,
    MOST_TRIALS,
    Cost,
    Share,
    in_words,
    seconds_of,
    share,
    usual,
)
from crisp_attention.experiment.specification.spec import USUAL_SEEDS
from crisp_attention.experiment.statistics import MIN_SEEDS

COST = Cost(trial=(20.0, 30.0), run=(40.0, 40.0, 80.0), searching=2, running=2)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("2h", 7200), ("30m", 1800), ("90s", 90), ("1h30m", 5400), ("1.5h", 5400), (" 2 H ", 7200), ("5min 30s", 330)],
)
def test_durations_are_read(text, seconds):
    assert seconds_of(text) == seconds


@pytest.mark.parametrize("text", ["", "2", "h", "two hours", "2h!", "-2h", "0s", "2d", "1h2", "nan", "1e3s"])
def test_what_is_no_duration_is_refused(text):
    with pytest.raises(ConfigurationError, match=r"--budget must be a duration such as 2h, 1h30m, 30m or 90s, got "):
        seconds_of(text)


@given(st.floats(1, 1e6))
def test_durations_in_words_are_never_shorter(seconds):
    assert seconds <= seconds_of(in_words(seconds)) <= seconds + 60


@given(st.floats(1, 1e5), st.sampled_from([None, 15, 40]), st.sampled_from([None, 2, 8, 20]))
def test_what_fits_is_within_the_budget_or_an_error_says_what_would(budget, trials, seeds):
    least = Share(trials or LEAST_TRIALS, seeds or MIN_SEEDS)
    needed = COST.search(least.trials) + COST.confirmation(least.seeds)
    if needed > budget:
        with pytest.raises(ConfigurationError, match=f"is too small: .* Give --budget {in_words(needed)}, fewer"):
            share(budget, COST, trials, seeds)
        budget = seconds_of(in_words(needed))
    found = share(budget, COST, trials, seeds)
    assert COST.search(found.trials) + COST.confirmation(found.seeds) <= budget
    assert found.trials == trials if trials else LEAST_TRIALS <= found.trials <= MOST_TRIALS
    assert found.seeds == seeds if seeds else MIN_SEEDS <= found.seeds <= USUAL_SEEDS


def test_more_time_is_more_seeds_and_then_more_trials():
    found = [share(seconds, COST) for seconds in range(900, 9000, 60)]
    assert [item.seeds for item in found] == sorted(item.seeds for item in found)
    assert (found[0].seeds, found[-1]) == (MIN_SEEDS, Share(MOST_TRIALS, USUAL_SEEDS))
    rest = [item.trials for item in found if item.seeds == USUAL_SEEDS]
    assert rest == sorted(rest)


def test_without_a_budget_it_is_the_usual():
    assert usual(None, None) == Share(20, 10)
    assert usual(3, 2) == Share(3, 2)
