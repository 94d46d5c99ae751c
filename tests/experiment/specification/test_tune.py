"""What `[tune]` may say, which arms share a search, and what an experiment becomes with what was found."""

from __future__ import annotations

import dataclasses
import tomllib

import pytest

from crisp_attention.config import SparsityConfig
from crisp_attention.errors import ConfigurationError
from crisp_attention.experiment.report.provenance import spec_as_toml
from crisp_attention.experiment.specification.runs import Fingerprints, expand
from crisp_attention.experiment.specification.spec import parse, to_plain
from crisp_attention.experiment.specification.tuned import apply, probes, searches
from record_builders import ARMS, PLACEBO, PRINTS, content, make_spec

RATE = {"low": 1e-5, "high": 1e-3}
EVERYTHING = {
    "trials": 7,
    "share": 0.3,
    "epochs": 2,
    "seed": 5,
    "learning_rate": RATE,
    "weight_decay": [0.0, 0.01, 0.1],
    "attention_dropout": {"low": 0, "high": 0.4},
    "hidden_dropout": {"low": 0.0, "high": 0.4},
    "label_smoothing": [0.0, 0.1],
    "sparsity": {"low": 0.2, "high": 0.9},
}
STRUCTURE = {
    "rule": ["topk", "percentile", "block_topk"],
    "layers": ["all", [0, 1], [-1]],
    "schedule": ["constant", "linear", {"kind": "anneal", "end": 0.5}],
}
ASKING = {"name": "topk-50", "sparsity": 0.5, "tune": ["learning_rate", "sparsity", *STRUCTURE]}


def tuned(*arms, **tune):
    """An experiment that tunes; the learning rate unless ranges are given."""
    return make_spec(tune=tune or {"learning_rate": RATE}, arms=[*map(dict, arms or ARMS)])


def arms_of(spec):
    return [search.arms for search in searches(spec)]


# What is written


def test_a_specification_with_every_setting_survives_both_round_trips():
    spec = tuned({"name": "dense", "tune": ["learning_rate"]}, ASKING, ARMS[2], **EVERYTHING, **STRUCTURE, pruning=True)
    assert parse(tomllib.loads(spec_as_toml(spec)), "report") == spec
    assert parse(to_plain(spec), "study") == spec
    assert spec.tune.weight_decay.choices == (0.0, 0.01, 0.1)
    assert spec.tune.attention_dropout.ends == (0.0, 0.4)


def test_without_it_nothing_of_it_is_said():
    plain = to_plain(make_spec())
    assert "tune" not in plain
    assert all("tune" not in arm for arm in plain["arms"])
    assert searches(make_spec()) == ()
    assert probes(make_spec()) == (make_spec(),)


def test_it_is_part_of_what_an_experiment_is_and_only_the_number_of_trials_may_grow():
    spec = tuned(trials=4, learning_rate=RATE)
    assert spec.identity() == tuned(trials=6, learning_rate=RATE).identity()
    for other in (
        {"learning_rate": RATE, "share": 0.3},
        {"learning_rate": RATE, "seed": 1},
        {"learning_rate": RATE, "seeds_per_trial": 2},
        {"weight_decay": [0, 1]},
    ):
        assert tuned(**other).identity() != spec.identity()
    # What it was before trials had seeds, an experiment still is.
    assert "seeds_per_trial" not in to_plain(tuned(learning_rate=RATE, seeds_per_trial=1))["tune"]
    assert tuned({"name": "dense", "tune": []}, *ARMS[1:]).identity() != tuned().identity()


@pytest.mark.parametrize(
    ("tune", "message"),
    [
        ({"trials": 4}, r"tune: nothing is searched: give a range for one of learning_rate, weight_decay"),
        (
            {"learning_rate": {"low": 1e-3, "high": 1e-5}},
            r"tune\.learning_rate: low must be below high, got 0\.001 and",
        ),
        ({"learning_rate": {"low": 1e-3, "high": 1e-3}}, r"low must be below high"),
        ({"learning_rate": {"low": 1e-3}}, r"a range has low and high, or is a list of values; got low\."),
        ({"learning_rate": {"low": 1e-3, "hgh": 1}}, r"a range has low and high, .* got low, hgh\."),
        ({"learning_rate": {"choices": [1, 2]}}, r"a range has low and high, or is a list of values; got choices\."),
        ({"learning_rate": [1e-3]}, r"two or more different values are needed, rising; got \[0\.001\]"),
        ({"learning_rate": [2e-3, 1e-3]}, r"two or more different values are needed, rising"),
        ({"learning_rate": "fast"}, r"tune\.learning_rate: .* got 'fast'"),
        ({"learning_rate": [0.0, 1e-3]}, r"tune: learning_rate must lie in \(0, inf\), got 0\."),
        ({"weight_decay": {"low": 0.0, "high": 0.1}}, r"weight_decay is searched on a logarithmic scale: low must be"),
        ({"hidden_dropout": {"low": 0.0, "high": 1.0}}, r"hidden_dropout must lie in \[0, 1\), got 1\."),
        ({"sparsity": [0.0, 0.5]}, r"sparsity must lie in \(0, 1\), got 0\."),
        ({"learning_rat": RATE}, r"Unknown key 'tune\.learning_rat'\. Did you mean 'learning_rate'\?"),
        ({"rule": "topk"}, r"tune\.rule: a list of what to choose from is needed, got 'topk'"),
        ({"rule": ["topk"]}, r"tune\.rule: two or more different ones are needed, got topk"),
        ({"rule": ["topk", "topkk"]}, r"Unknown rule 'topkk'\. Did you mean 'topk'\?"),
        ({"rule": ["topk", "top_p"]}, r"Unknown rule 'top_p'"),  # not set by a sparsity
        ({"layers": ["all", "last"]}, r"layers are 'all' or lists of numbers, got 'last'"),
        ({"layers": ["all", [0.5]]}, r"layers must hold integers, got 0\.5"),
        ({"schedule": ["constant", "slow"]}, r"Unknown schedule kind 'slow'"),
        ({"schedule": ["constant", {"kind": "linear", "final": 0.1}]}, r"Schedule 'linear' would ignore final=0\.1"),
        ({"schedule": ["constant", 3]}, r"schedule are kinds by name or tables of settings, got 3"),
        ({"learning_rate": RATE, "trials": 0}, r"tune\.trials: .* greater than or equal to 1, got 0"),
        ({"learning_rate": RATE, "share": 1.0}, r"tune\.share: .* less than 1, got 1\.0"),
        ({"learning_rate": RATE, "seeds_per_trial": 0}, r"tune\.seeds_per_trial: .* greater than or equal to 1, got 0"),
    ],
)
def test_what_makes_no_sense_is_refused(tune, message):
    with pytest.raises(ConfigurationError, match=message):
        tuned(**tune)


def test_an_exploration_has_its_validation_part_and_a_search_has_its_own():
    with pytest.raises(ConfigurationError, match=r"leave data\.validation_share out"):
        make_spec(tune={"learning_rate": RATE}, data={"source": "x.csv", "validation_share": 0.2})


def test_trials_are_not_given_up_by_epochs_that_nobody_evaluates():
    make_spec(tune={"learning_rate": RATE}, training={"curves": False})
    with pytest.raises(ConfigurationError, match="compares trials after every epoch"):
        make_spec(tune={"learning_rate": RATE, "pruning": True}, training={"curves": False})


@pytest.mark.parametrize(
    ("arms", "tune", "message"),
    [
        (
            ({"name": "topk-50", "rule": "top_p", "p": 0.5},),
            {"sparsity": [0.2, 0.5]},
            r"tune\.sparsity is searched for no",
        ),
        (({"name": "topk-50", "sparsity": 0.5, "apply": "eval"},), {"sparsity": [0.2, 0.5]}, "is searched for no arm"),
        (
            ({"name": "topk-50", "sparsity": 0.5, "tune": ["sparsty"]},),
            {"sparsity": [0.2, 0.5]},
            r"'topk-50': \[tune\] has no range of 'sparsty'\. Did you mean 'sparsity'",
        ),
        (
            ({"name": "topk-50", "rule": "top_p", "p": 0.5, "tune": ["sparsity"]},),
            {"sparsity": [0.2, 0.5]},
            "'topk-50': sparsity cannot be searched, it is not sparse by that in training",
        ),
        (
            ({"name": "topk-50", "sparsity": 0.5, "training": {"learning_rate": 1e-3}, "tune": ["learning_rate"]},),
            {"learning_rate": RATE},
            "learning_rate cannot be searched, it sets that itself",
        ),
        (
            ({"name": "topk-50", "sparsity": 0.5},),
            {"rule": ["topk", "percentile"]},
            "rule is searched for no arm: leave it out, or give it an arm that takes it and names it in its tune",
        ),
        (
            ({"name": "topk-50", "sparsity": 0.5, "layers": [0], "tune": ["layers"]},),
            {"layers": ["all", [1]]},
            "'topk-50': layers cannot be searched, it sets that itself",
        ),
        (
            ({"name": "topk-50", "rule": "block_topk", "sparsity": 0.5, "key_block": 8, "tune": ["rule"]},),
            {"rule": ["block_topk", "topk"]},
            "'topk-50' with rule topk: Rule 'topk' would ignore key_block=8",
        ),
        (
            # At any sparsity that is searched they are the same.
            ({"name": "topk-50", "sparsity": 0.5}, {"name": "topk-80", "sparsity": 0.8}),
            {"sparsity": [0.2, 0.5]},
            "'topk-50' and 'topk-80' are the same",
        ),
    ],
)
def test_arms_and_ranges_that_do_not_fit_are_refused(arms, tune, message):
    with pytest.raises(ConfigurationError, match=message):
        tuned({"name": "dense"}, *arms, **tune)


def test_an_arm_cannot_say_what_to_tune_where_nothing_is():
    with pytest.raises(ConfigurationError, match=r"arm 'dense' says what to tune, but there is no \[tune\]"):
        parse(content(arms=[{"name": "dense", "tune": ["learning_rate"]}, *ARMS[1:]]), "test")


# Who shares a search


def test_what_applies_is_searched_for_each_arm():
    spec = tuned(
        *ARMS,
        {"name": "decay", "training": {"weight_decay": 0.5}},
        {"name": "window", "rule": "window", "window": 3},
        {"name": "rate-only", "tune": ["learning_rate"]},
        {"name": "as-written", "tune": []},
        **EVERYTHING,
    )
    common = ["learning_rate", "weight_decay", "label_smoothing", "attention_dropout", "hidden_dropout"]
    assert {arm.name: list(spec.searched(arm)) for arm in spec.arms} == {
        "dense": common,
        "topk-50": [*common, "sparsity"],
        "percentile-80": [*common, "sparsity"],
        "decay": [name for name in common if name != "weight_decay"],
        "window": common,
        "rate-only": ["learning_rate"],
        "as-written": [],
    }
    assert "as-written" not in {arm for arms in arms_of(spec) for arm in arms}


def test_arms_that_are_trained_alike_share_a_search():
    spec = tuned(
        *ARMS,
        PLACEBO,
        {"name": "sparse-then-dense", "sparsity": 0.5, "evaluate": {}},
        {"name": "sparse-in-training", "sparsity": 0.5, "apply": "train"},
        {"name": "dense-then-sparse", "evaluate": {"sparsity": 0.5}},
        {"name": "padded", "padding": "max_length"},
        {"name": "dropout", "training": {"attention_dropout": 0.3}},
    )
    assert arms_of(spec) == [
        ("dense", "dense-again", "dense-then-sparse"),
        ("topk-50", "sparse-then-dense", "sparse-in-training"),
        ("percentile-80",),
        ("padded",),
        ("dropout",),
    ]


def test_sparsity_that_is_searched_does_not_part_arms():
    spec = tuned(*ARMS, {"name": "twin", "sparsity": 0.8, "evaluate": {}}, sparsity=[0.3, 0.6])
    assert arms_of(spec) == [("topk-50", "twin"), ("percentile-80",)]


# What was found


def test_what_was_found_becomes_the_arms_own():
    spec = tuned(*ARMS, PLACEBO, learning_rate=RATE, sparsity=[0.3, 0.6])
    found = apply(spec, {"topk-50": {"learning_rate": 2e-4, "sparsity": 0.3}, "dense": {"learning_rate": 3e-4}})
    topk, dense, other = (found.arm(name) for name in ("topk-50", "dense", "percentile-80"))
    assert (found.training_of(topk).learning_rate, topk.attention.sparsity) == (2e-4, 0.3)
    assert found.training_of(dense).learning_rate == 3e-4
    assert other == spec.arm("percentile-80")
    runs = {run.arm: run.config for run in expand(found, PRINTS)}
    assert runs["topk-50"].training["learning_rate"] == 2e-4
    assert runs["topk-50"].attention["sparsity"] == 0.3


def test_the_structure_of_attention_is_searched_for_arms_that_ask():
    spec = tuned({"name": "dense"}, ASKING, ARMS[2], **EVERYTHING, **STRUCTURE)
    assert list(spec.searched(spec.arm("topk-50"))) == ["learning_rate", "sparsity", *STRUCTURE]
    for name in ("dense", "percentile-80"):
        assert not spec.searched(spec.arm(name)).keys() & STRUCTURE.keys()


@pytest.mark.parametrize(
    ("values", "attention"),
    [
        ({"rule": "block_topk", "layers": (0, 1), "sparsity": 0.4}, {"rule": "block_topk", "layers": [0, 1]}),
        ({"layers": "all", "schedule": "constant", "sparsity": 0.4}, {}),
        ({"schedule": "linear", "sparsity": 0.4}, {"schedule": {"kind": "linear"}}),
        ({"schedule": {"kind": "anneal", "end": 0.5}, "sparsity": 0.4}, {"schedule": {"kind": "anneal", "end": 0.5}}),
    ],
)
def test_a_structure_that_was_found_becomes_the_arms_attention(values, attention):
    spec = tuned({"name": "dense"}, ASKING, **EVERYTHING, **STRUCTURE)
    found = apply(spec, {"topk-50": values}).arm("topk-50").attention
    assert found == SparsityConfig.from_dict({"sparsity": 0.4, **attention})


def test_probes_try_every_choice():
    spec = tuned({"name": "dense"}, ASKING, **EVERYTHING, **STRUCTURE)
    tried = [probe.arm("topk-50").attention for probe in probes(spec)]
    assert [attention.rule for attention in tried] == STRUCTURE["rule"]
    assert [attention.layers for attention in tried] == [None, (0, 1), (-1,)]
    assert [attention.schedule and attention.schedule.kind for attention in tried] == [None, "linear", "anneal"]


def test_two_arms_may_find_the_same():
    spec = tuned(*ARMS, {"name": "topk-80", "sparsity": 0.8, "tune": []}, sparsity=[0.5, 0.8])
    found = apply(spec, {"topk-50": {"sparsity": 0.8}})
    assert found.arm("topk-50").attention == found.arm("topk-80").attention


def test_probes_are_the_ends_of_every_range():
    spec = tuned(**EVERYTHING)
    lowest, highest = probes(spec)
    assert [probe.arm("topk-50").attention.sparsity for probe in (lowest, highest)] == [0.2, 0.9]
    assert lowest.training_of(lowest.arm("dense")).weight_decay == 0.0
    assert highest.training_of(highest.arm("dense")).weight_decay == 0.1


def test_a_trial_is_a_run_on_carved_data_with_a_seed_of_its_own():
    spec = tuned(*ARMS, PLACEBO, **EVERYTHING)
    prints = Fingerprints("model", {"": "carved"})
    search = searches(spec)[0]
    values = {"learning_rate": 2e-4, "weight_decay": 0.1}
    trials = [run for number in (0, 1) for run in search.trial(spec, values, number, prints)]
    assert [trial.index for trial in trials] == [0, 1]
    assert trials[0].config == trials[1].config
    config = trials[0].config
    assert (trials[0].arm, config.data, config.seed, config.evaluations) == ("dense", "carved", 5, {})
    assert (config.training["epochs"], config.training["learning_rate"]) == (2, 2e-4)
    assert tuned(*ARMS).tune.seed not in {run.config.seed for run in expand(spec, PRINTS)}


def test_a_trial_trains_for_the_epochs_of_the_primary_condition():
    spec = make_spec(
        tune={"trials": 2, "learning_rate": {"low": 1e-5, "high": 1e-3}},
        vary={"train_examples": [40, 60], "epochs": [9, 4]},
        primary={"arm": "topk-50", "condition": "train_examples=40"},
    )
    (run,) = searches(spec)[0].trial(spec, {"learning_rate": 2e-4}, 0, Fingerprints("model", {"": "carved"}))
    assert run.config.training["epochs"] == spec.epochs_of_trials == 9


def test_trials_of_several_seeds_differ_in_nothing_else():
    spec = tuned(*ARMS, learning_rate=RATE, seed=7, seeds_per_trial=3)
    runs = searches(spec)[0].trial(spec, {"learning_rate": 2e-4}, 4, Fingerprints("model", {"": "carved"}))
    assert [(run.index, run.config.seed) for run in runs] == [(4, 7), (4, 8), (4, 9)]
    assert all(dataclasses.replace(run.config, seed=7) == runs[0].config for run in runs)
