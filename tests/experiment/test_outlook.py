"""The time left, on clocks that are made up."""

from __future__ import annotations

import pytest

from crisp_attention.experiment.outlook import Outlook

RUNS = {f"run {number}": 10.0 for number in range(10)}


def test_before_anything_is_done_it_is_what_was_expected():
    outlook = Outlook(RUNS, jobs=1)
    assert outlook.left(123.0) == 100
    outlook.begin(50.0)
    assert outlook.left(50.0) == 100
    assert Outlook(RUNS, jobs=4).left(0.0) == 25


def test_starting_up_is_no_pace():
    """Twenty seconds until the first worker is ready; then a run in ten, as expected."""
    outlook = Outlook(RUNS, jobs=1)
    outlook.begin(20.0)
    outlook.end("run 0", finished=True)
    assert outlook.left(30.0) == 90
    outlook.begin(29.0)  # another worker
    assert outlook.left(30.0) == 90


def test_the_first_seconds_change_little_and_the_pace_wins_in_the_end():
    """Everything takes three times as long as expected."""
    outlook = Outlook(RUNS, jobs=1)
    outlook.begin(0.0)
    outlook.advance("run 0", 0.01)
    assert outlook.left(0.3) == pytest.approx(99.9, rel=0.03)
    errors = []
    for done, run in enumerate(RUNS, start=1):
        outlook.end(run, finished=True)
        errors.append(abs(outlook.left(30.0 * done) - 30.0 * (10 - done)) / (30.0 * 10))
    assert errors == sorted(errors, reverse=True)
    assert outlook.left(300.0) == 0


def test_long_runs_count_for_what_they_take():
    """Short runs first: each second of them says nothing of how many runs there are."""
    outlook = Outlook({"short": 1.0, "also short": 1.0, "long": 98.0}, jobs=1)
    outlook.begin(0.0)
    outlook.end("short", finished=True)
    outlook.end("also short", finished=True)
    assert outlook.left(2.0) == 98
    outlook.advance("long", 0.5)
    assert outlook.left(51.0) == 49


def test_one_run_is_not_shared_by_the_workers():
    outlook = Outlook({"one": 10.0, "other": 40.0}, jobs=2)
    assert outlook.left(0.0) == 40


def test_runs_that_do_not_finish_are_no_pace():
    outlook = Outlook(RUNS, jobs=1)
    outlook.begin(0.0)
    outlook.end("run 0", finished=False)  # in training elsewhere
    outlook.advance("run 1", 0.5)
    outlook.end("run 1", finished=False)  # diverged halfway
    assert outlook.left(5.0) == 80


def test_where_nothing_is_known_nothing_is_said_until_a_run_is_done():
    outlook = Outlook(dict.fromkeys(RUNS), jobs=1)
    outlook.begin(0.0)
    outlook.advance("run 0", 0.9)
    assert outlook.left(6.3) is None
    outlook.end("run 0", finished=True)
    assert outlook.left(7.0) == pytest.approx(63)


def test_what_could_not_be_timed_is_as_slow_as_the_slowest():
    assert Outlook({"known": 3.0, "slow": 5.0, "unknown": None}, jobs=1).left(0.0) == 13
