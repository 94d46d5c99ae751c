"""Parts of an experiment's runs: none is left out, none done twice, and each has its share of every arm."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import crisp_attention as crisp
from crisp_attention.experiment.specification.runs import PlannedRun, RunConfig
from crisp_attention.experiment.specification.shards import Shard


def runs(arms, seeds):
    """Seed by seed, as `expand` yields them."""
    return [
        PlannedRun(f"arm-{arm}", seed, RunConfig("m", "d", 8, "longest", {"arm": arm}, {}, seed))
        for seed in range(seeds)
        for arm in range(arms)
    ]


@given(arms=st.integers(2, 9), seeds=st.integers(1, 12), of=st.integers(1, 30))
@settings(deadline=None, max_examples=60)
def test_every_run_has_one_shard_and_keeps_it_when_there_are_more_seeds(arms, seeds, of):
    planned = runs(arms, seeds)
    parts = [Shard(number, of).own(planned, arms) for number in range(1, of + 1)]
    assert sum(map(len, parts)) == len(planned)
    assert frozenset().union(*parts) == {run.config.run_id for run in planned}
    assert max(map(len, parts)) - min(map(len, parts)) <= 2
    more = [Shard(number, of).own(runs(arms, seeds + 3), arms) for number in range(1, of + 1)]
    assert all(part <= grown for part, grown in zip(parts, more, strict=True))


@pytest.mark.parametrize(("arms", "seeds", "of"), [(4, 10, 2), (4, 12, 4), (4, 20, 20), (3, 12, 2), (6, 24, 4)])
def test_a_shard_has_each_arm_about_as_often(arms, seeds, of):
    planned = runs(arms, seeds)
    for number in range(1, of + 1):
        own = Shard(number, of).own(planned, arms)
        counts = Counter(run.arm for run in planned if run.config.run_id in own)
        assert len(counts) == min(arms, len(own))
        assert max(counts.values()) - min(counts.values()) <= 1


def test_runs_that_two_arms_share_are_done_once():
    planned = runs(2, 3) + runs(2, 3)
    parts = [Shard(number, 4).own(planned, 4) for number in range(1, 5)]
    assert sum(map(len, parts)) == len(frozenset().union(*parts)) == 6


def test_a_shard_is_written_as_it_is_read():
    assert Shard.parse("3/20") == Shard(3, 20)
    assert str(Shard(3, 20)) == "3/20"


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("1/0", r"takes a number and how many there are, as 3/20; got '1/0'"),
        ("0/3", "of 3 shards the number must be between 1 and 3"),
        ("4/3", "of 3 shards the number must be between 1 and 3"),
        ("x", "a number and how many there are, as 3/20; got 'x'"),
        ("1/2/3", "got '1/2/3'"),
        ("-1/3", "got '-1/3'"),
        ("", "got ''"),
    ],
)
def test_what_is_no_shard_is_refused(text, why):
    with pytest.raises(crisp.ConfigurationError, match=why):
        Shard.parse(text)
