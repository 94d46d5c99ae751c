"""How the report says in which way settings were chosen."""

from __future__ import annotations

import re

import pytest

from crisp_attention.experiment import report
from crisp_attention.experiment.conclusions.analysis import analyse
from crisp_attention.experiment.report.sections import closing
from crisp_attention.experiment.results.store import Store
from crisp_attention.experiment.specification.spec import parse, to_plain
from record_builders import ARMS, PLACEBO, PRINTS, fill_tuned, make_spec

TUNE = {"trials": 5, "epochs": 1, "learning_rate": {"low": 1e-5, "high": 1e-3}, "sparsity": [0.25, 0.625]}
ARMS = [*map(dict, ARMS), dict(PLACEBO)]


def section(analysis):
    (found,) = [item for item in closing(analysis) if item.anchor == "tuning"]
    return found


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    return fill_tuned(tmp_path_factory.mktemp("tuned"), make_spec(tune=TUNE, arms=ARMS))


def test_every_search_states_its_budget_its_ranges_and_what_it_found(tuned):
    (table,) = section(analyse(tuned)).tables
    assert table.header == (
        "arms",
        "setting",
        "searched",
        "found",
        "trials",
        "pruned",
        "diverged",
        "loss",
        "median loss",
    )
    assert table.rows == (
        ("dense, dense-again", "learning_rate", "1e-05 to 0.001", "0.001", "5", "0", "1", "0.3750", "0.5000"),
        ("topk-50", "learning_rate", "1e-05 to 0.001", "0.001", "5", "0", "1", "0.3750", "0.5000"),
        ("topk-50", "sparsity", "0.25, 0.625", "0.625", "5", "0", "1", "0.3750", "0.5000"),
        ("percentile-80", "learning_rate", "1e-05 to 0.001", "0.001", "5", "0", "1", "0.3750", "0.5000"),
        ("percentile-80", "sparsity", "0.25, 0.625", "0.625", "5", "0", "1", "0.3750", "0.5000"),
    )


def test_the_pages_say_on_what_settings_were_chosen(tuned):
    report.write(analyse(tuned), tuned.folder)
    for name in ("report.md", "report.html"):
        text = " ".join(re.sub(r"<[^>]*>", "", (tuned.folder / name).read_text(encoding="utf-8")).split())
        assert "5 trials a search, each of 1 epoch with seed 100000" in text
        assert (
            "48 examples of the training split and was judged by its loss after the last epoch on the other 12" in text
        )
        assert "The evaluation split was not used." in text
        assert "Optuna 5.0.0 proposed" in text
        assert "Nothing was searched for" not in text


def test_trials_of_several_seeds_show_how_far_seeds_lie_apart(tmp_path):
    store = fill_tuned(tmp_path, make_spec(tune=TUNE | {"seeds_per_trial": 3}, arms=ARMS))
    found = section(analyse(store))
    (table,) = found.tables
    assert table.header[-2:] == ("median loss", "seed SD")
    assert {row[-1] for row in table.rows} == {"0.0625"}  # made up as 1/16 to either side
    assert "pooled over trials" in table.caption
    text = " ".join(found.notes)
    assert "with each of the seeds 100000 to 100002. A trial" in text
    assert "held out by document, text or image, in the mean over its seeds." in text


def test_choices_and_what_was_given_up_are_told(tmp_path):
    asking = {"name": "topk-50", "sparsity": 0.5, "tune": ["layers", "schedule"]}
    choices = {"layers": ["all", [0, 1]], "schedule": ["constant", {"kind": "anneal", "end": 0.5}]}
    spec = make_spec(tune=TUNE | choices | {"pruning": True}, arms=[{"name": "dense"}, asking, ARMS[2]])
    analysis = analyse(fill_tuned(tmp_path, spec))
    rows = {row[1]: row[2:4] for row in section(analysis).tables[0].rows if row[0] == "topk-50"}
    assert rows == {
        "layers": ("all; layers 0, 1", "layers 0, 1"),
        "schedule": ("constant; anneal end 0.5", "anneal end 0.5"),
    }
    assert "once 5 had been trained to their end: it counts as a trial" in " ".join(section(analysis).notes)


def test_the_report_asks_for_the_experiment_as_it_was_asked_for(tuned):
    analysis = analyse(tuned)
    assert analysis.spec == make_spec(tune=TUNE, arms=ARMS)
    assert analysis.arms[1].spec.attention.sparsity == 0.5
    record = analysis.arms[1].records[0]
    assert record.config["attention"]["sparsity"] == 0.625
    assert all(len(arm.records) == analysis.spec.seeds for arm in analysis.arms)


def test_before_anything_is_found_the_report_says_so(tmp_path):
    store = Store(tmp_path)
    store.open(make_spec(tune=TUNE, arms=ARMS), PRINTS)
    found = section(analyse(store))
    assert found.notes == ("The settings are not found yet: no run is done.",)
    assert found.tables == ()
    assert report.write(analyse(store), tmp_path).exists()


def test_a_study_without_it_has_no_such_section(tmp_path):
    store = Store(tmp_path)
    store.open(make_spec(), PRINTS)
    assert "tuning" not in [item.anchor for item in closing(analyse(store))]


def test_arms_without_a_search_are_named_and_an_unequal_budget_is_a_caution(tmp_path):
    arms = [ARMS[0] | {"tune": []}, *ARMS[1:3]]
    analysis = analyse(fill_tuned(tmp_path, make_spec(tune=TUNE, arms=arms)))
    assert section(analysis).notes[-1] == "Nothing was searched for dense."
    assert any("the two arms of the primary contrast were not tuned alike" in item for item in analysis.cautions)


def test_where_data_vary_the_condition_of_the_search_is_named(tmp_path):
    vary = {"train_examples": [40, 60]}
    spec = parse(to_plain(make_spec(tune=TUNE, arms=ARMS, seeds=2)) | {"vary": vary}, "test")
    analysis = analyse(fill_tuned(tmp_path, spec))
    assert "settings were searched at train_examples=60 with" in section(analysis).notes[0]
    configs = [record.config for arm in analysis.by_condition["train_examples=40"] for record in arm.records.values()]
    assert {config["training"]["learning_rate"] for config in configs} == {0.001}
