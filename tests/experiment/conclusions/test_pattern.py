from __future__ import annotations

import pytest

from crisp_attention.experiment.conclusions.pattern import (
    Fall,
    Standing,
    dense_twins,
    dropout_arms,
    is_placebo,
    regularizer_pattern,
)
from crisp_attention.experiment.statistics import Contrast, Interval
from record_builders import ARMS, PLACEBO, make_spec

TWIN = {"name": "topk-50-to-dense", "sparsity": 0.5, "evaluate": {}}
DROPOUT = {"name": "dropout", "training": {"attention_dropout": 0.3}}
FALLS = Fall(-1.5, 0.004, 10, 0.05)
NARROWS = Fall(-2.0, 0.002, 10, 0.05)


def spec(*extra, **changes):
    return make_spec(arms=[*ARMS, PLACEBO, *extra], **changes)


def compared(arm, baseline, difference=1.0, p=0.002, low=0.3, high=1.7, seeds=10):
    return Contrast(
        arm=arm,
        baseline=baseline,
        seeds=seeds,
        examples=400,
        differences=(difference,) * seeds,
        difference=difference,
        spread=1.0,
        p_value=p,
        p_holm=None,
        interval=Interval(low, high),
        seed_interval=None,
        effect_size=None,
        probability_better=0.5,
        p_equivalence=None,
        detectable=None,
        detectable_verdict=None,
    )


def judged(train=FALLS, gap=NARROWS, twin=None, rivals=None, **standings):
    twin = twin or compared(TWIN["name"], "dense")
    rivals = [compared("topk-50", "dropout"), compared("topk-50", "more-dropout", 2.0)] if rivals is None else rivals
    rates = [
        {"name": name, "training": {"attention_dropout": 0.2 + place / 10}}
        for place, name in enumerate(dict.fromkeys(item.baseline for item in rivals))
    ]
    stand = {name.replace("_", "-"): standing for name, standing in standings.items()}
    return regularizer_pattern(spec(TWIN, *rates), train, gap, {twin.arm: twin}, rivals, stand)


# Which arms decide


@pytest.mark.parametrize(
    ("arm", "found"),
    [
        (TWIN, True),
        ({"name": "x", "sparsity": 0.5, "apply": "train"}, True),
        ({"name": "x", "sparsity": 0.5, "evaluate": {"sparsity": 0.2}}, False),
        ({"name": "x", "sparsity": 0.8, "evaluate": {}}, False),
        ({"name": "x", "sparsity": 0.5, "rule": "percentile", "evaluate": {}}, False),
        ({"name": "x", "sparsity": 0.5, "evaluate": {}, "seed_offset": 7}, False),
        ({"name": "x", "sparsity": 0.5, "evaluate": {}, "training": {"weight_decay": 0.2}}, False),
        ({"name": "x", "sparsity": 0.5, "evaluate": {}, "padding": "max_length"}, False),
        ({"name": "x", "sparsity": 0.5, "apply": "eval"}, False),
    ],
    ids=str,
)
def test_the_twin_is_trained_alike_and_evaluated_dense(arm, found):
    assert dense_twins(spec(arm)) == ([arm["name"]] if found else [])


def test_a_primary_arm_that_is_evaluated_dense_is_its_own_twin():
    assert dense_twins(spec(TWIN, primary={"arm": TWIN["name"]})) == [TWIN["name"]]


@pytest.mark.parametrize(
    ("arm", "found"),
    [
        (DROPOUT, True),
        ({"name": "x", "training": {"hidden_dropout": 0.2}}, True),
        ({"name": "x", "training": {"weight_decay": 0.2}}, False),
        ({"name": "x", "sparsity": 0.5, "training": {"attention_dropout": 0.3}}, False),
        ({"name": "x", "training": {"attention_dropout": 0.3}, "seed_offset": 50}, False),
        ({"name": "x", "training": {"attention_dropout": 0.3}, "evaluate": {"sparsity": 0.5}}, False),
    ],
    ids=str,
)
def test_tuned_dropout_is_dense_with_a_dropout_of_its_own(arm, found):
    assert dropout_arms(spec(arm)) == ([arm["name"]] if found else [])


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({}, True),
        ({"seed_offset": 3}, False),
        ({"training": {"weight_decay": 0.5}}, False),
        ({"evaluate": {"sparsity": 0.5}}, False),
        ({"padding": "max_length"}, False),
        ({"padding": "longest"}, True),
        ({"sparsity": 0.5}, False),
    ],
    ids=str,
)
def test_a_placebo_is_the_baseline_with_none_of_its_seeds(changes, found):
    made = make_spec(arms=[*ARMS, {**PLACEBO, **changes}])
    assert is_placebo(made, made.arms[-1]) == found


# What they show


def test_all_four_clauses_make_a_regularizer():
    found = judged()
    assert found.holds is True
    assert [clause.holds for clause in found.clauses] == [True] * 4
    assert found.arm == "topk-50"


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("train_falls", {"train": Fall(1.5, 0.004, 10, 0.05)}),
        ("train_falls", {"train": Fall(-1.5, 0.06, 10, 0.05)}),
        ("train_falls", {"train": Fall(-1.5, 0.02, 10, 0.05 / 3)}),
        ("gap_narrows", {"gap": Fall(2.0, 0.002, 10, 0.05)}),
        ("dense_keeps", {"twin": compared(TWIN["name"], "dense", 0.1, low=-0.6, high=0.8)}),
        ("beats_dropout", {"rivals": [compared("topk-50", "dropout", 0.4, p=0.2, low=-0.1, high=0.9)]}),
        ("beats_dropout", {"rivals": [compared("topk-50", "dropout", 0.4, p=0.01, low=-0.1, high=0.9)]}),
    ],
)
def test_a_clause_that_is_not_shown_fails_the_pattern(name, changes):
    found = judged(**changes)
    assert found.holds is False
    assert {clause.statement for clause in found.clauses if clause.holds is not True} == {
        getattr(found, name).statement
    }


def test_a_little_worse_than_dense_is_not_worse_than_the_margin():
    assert judged(twin=compared(TWIN["name"], "dense", 0.0, p=1.0, low=-0.4, high=0.4)).holds is True


def test_of_several_dropouts_the_best_one_counts():
    rivals = [compared("topk-50", "weak"), compared("topk-50", "strong", 0.1, p=0.6, low=-0.5, high=0.7)]
    found = judged(rivals=rivals)
    assert found.beats_dropout.holds is False
    assert "against strong: +0.10 points" in found.beats_dropout.figure


def test_better_than_one_dropout_is_not_yet_better_than_a_tuned_one():
    better = judged(rivals=[compared("topk-50", "dropout")])
    assert (better.beats_dropout.holds, better.holds) == (None, None)
    assert "one rate alone is not tuned; add arms with others" in better.beats_dropout.figure
    worse = judged(rivals=[compared("topk-50", "dropout", -1.0, low=-1.7, high=-0.3)])
    assert worse.beats_dropout.holds is False
    assert "against dropout, which was not tuned: -1.00 points" in worse.beats_dropout.figure


@pytest.mark.parametrize(
    ("settings", "tuned"),
    [
        ([{"attention_dropout": 0.2}, {"attention_dropout": 0.3}], True),
        ([{"attention_dropout": 0.3}, {"attention_dropout": 0.3, "weight_decay": 0.1}], False),
        ([{"attention_dropout": 0.3}, {"hidden_dropout": 0.3}], False),
        ([{"attention_dropout": 0.3}, {"attention_dropout": 0.0}], False),
        ([{"attention_dropout": 0.0}, {"attention_dropout": 0.1}, {"attention_dropout": 0.3}], True),
    ],
    ids=["two rates", "one rate twice", "one rate each of two dropouts", "one rate and none", "none and two rates"],
)
def test_a_dropout_is_tuned_by_two_rates_of_one_setting(settings, tuned):
    arms = [{"name": f"dropout-{place}", "training": own} for place, own in enumerate(settings)]
    rivals = [compared("topk-50", arm["name"]) for arm in arms]
    found = regularizer_pattern(spec(*arms), FALLS, NARROWS, {}, rivals)
    assert found.beats_dropout.holds is (True if tuned else None)


def test_a_search_of_one_trial_tunes_nothing():
    tune = {"trials": 1, "learning_rate": [1e-5, 1e-4], "attention_dropout": [0.2, 0.3]}
    searching = make_spec(arms=[{"name": "dense", "tune": ["learning_rate"]}, *ARMS[1:], {"name": "x"}], tune=tune)
    found = regularizer_pattern(searching, FALLS, NARROWS, {}, [compared("topk-50", "x")])
    assert found.beats_dropout.holds is None


def test_better_than_one_dropout_that_was_searched_is_better_than_a_tuned_one():
    tune = {"learning_rate": [1e-5, 1e-4], "attention_dropout": {"low": 0.0, "high": 0.5}}
    plain = {"name": "dense", "tune": ["learning_rate"]}
    searching = make_spec(arms=[plain, *ARMS[1:], {"name": "dropout"}], tune=tune)
    assert dropout_arms(searching) == ["dropout"]
    against = {"dense": compared("topk-50", "dense")}
    found = regularizer_pattern(searching, FALLS, NARROWS, against, [compared("topk-50", "dropout")])
    assert found.beats_dropout.holds is True
    assert "not tuned" not in found.beats_dropout.figure
    # Where every arm's is searched, the baseline is such an arm.
    assert dropout_arms(make_spec(tune=tune)) == ["dense"]
    worse = [compared("topk-50", "dropout", -1.0, low=-1.7, high=-0.3)]
    assert regularizer_pattern(searching, FALLS, NARROWS, against, worse).beats_dropout.holds is False


def test_arms_for_which_other_settings_are_searched_are_no_twins():
    tune = {"learning_rate": [1e-5, 1e-4]}
    assert dense_twins(spec(TWIN, tune=tune)) == [TWIN["name"]]
    assert dense_twins(spec(TWIN | {"tune": []}, tune=tune)) == []
    placebo, untuned = spec(tune=tune), make_spec(arms=[*ARMS, PLACEBO | {"tune": []}], tune=tune)
    assert is_placebo(placebo, placebo.arm(PLACEBO["name"]))
    assert not is_placebo(untuned, untuned.arm(PLACEBO["name"]))


def test_what_no_arm_decides_is_open_and_says_which_arm_is_missing():
    found = regularizer_pattern(spec(), FALLS, NARROWS, {}, [])
    assert found.holds is None
    assert (found.dense_keeps.holds, found.beats_dropout.holds) == (None, None)
    assert found.dense_keeps.figure == "no arm is trained like it and dense in evaluation"
    assert found.beats_dropout.figure == "no dense arm sets a dropout of its own"
    assert regularizer_pattern(spec(), Fall(1.0, 0.002, 10, 0.05), NARROWS, {}, []).holds is False


def test_too_few_seeds_leave_every_clause_open():
    few = Fall(-3.0, 0.06, 5, 0.05)
    found = judged(
        few, few, compared(TWIN["name"], "dense", seeds=5), [compared("topk-50", "dropout", p=0.06, seeds=5)]
    )
    assert [clause.holds for clause in found.clauses] == [None] * 4
    assert all("too few seeds to tell" in clause.figure for clause in found.clauses)


def test_nothing_is_said_of_a_clause_before_its_pairs_are_done():
    assert judged().holds is True
    found = judged(topk_50_to_dense=Standing(awaited=4, planned=10))
    assert (found.dense_keeps.holds, found.holds) == (None, None)
    assert found.dense_keeps.figure.endswith("6 of 10 pairs are done")
    found = judged(dropout=Standing(planned=10), more_dropout=Standing(awaited=1, planned=10))
    assert (found.beats_dropout.holds, found.beats_dropout.figure) == (None, "19 of 20 pairs are done")
    found = judged(topk_50=Standing(awaited=3, planned=10))
    assert (found.train_falls.holds, found.gap_narrows.holds) == (None, None)
    assert found.train_falls.figure.endswith("7 of 10 pairs are done")


def test_no_clause_favours_the_side_that_lost_more_runs():
    found = judged(topk_50_to_dense=Standing(troubled=1, planned=10))
    assert found.dense_keeps.holds is None
    assert "1 runs of topk-50-to-dense diverged or failed" in found.dense_keeps.figure
    assert judged(topk_50_to_dense=Standing(troubled=1), dense=Standing(troubled=1)).dense_keeps.holds is True
    worse = compared(TWIN["name"], "dense", -5.0, low=-7.0, high=-3.0)
    assert judged(twin=worse, topk_50_to_dense=Standing(troubled=1, planned=10)).dense_keeps.holds is False
    lost = judged(topk_50=Standing(troubled=1, planned=10))
    assert (lost.beats_dropout.holds, lost.train_falls.holds, lost.gap_narrows.holds) == (None, None, None)
    assert judged(dropout=Standing(troubled=1), more_dropout=Standing(troubled=1)).beats_dropout.holds is True
