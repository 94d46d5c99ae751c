"""The search, its training made up: what is proposed, counted, found, and what survives a kill."""

from __future__ import annotations

import dataclasses
import json
import math
import sqlite3
import sys

import pytest

from crisp_attention.errors import ConfigurationError, CrispError, RecordError, StorageError
from crisp_attention.experiment.data.dataset import ExperimentData, carve
from crisp_attention.experiment.execution import tuning
from crisp_attention.experiment.results.pruning import STARTUP_TRIALS, exceeded, limits
from crisp_attention.experiment.results.store import Store
from crisp_attention.experiment.specification.runs import expand
from crisp_attention.experiment.specification.tune import encoded
from crisp_attention.experiment.specification.tuned import apply
from made_up_search import CHECKPOINT, HERE, RATE, Killed, Machine, data, early, hopeless, spec_of, tune
from record_builders import PRINTS, make_spec

pytestmark = pytest.mark.slow


@pytest.fixture
def machine(monkeypatch):
    """Workers that train nothing."""
    return Machine(monkeypatch)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """What twelve trials an arm find without an interruption."""
    with pytest.MonkeyPatch.context() as patch:
        Machine(patch)
        return tune(tmp_path_factory.mktemp("whole"), spec_of(trials=12))


# What is found


def test_every_arm_has_the_same_budget_and_keeps_its_best_trial(tmp_path, machine):
    spec = spec_of(trials=15)  # more than are drawn at random before the sampler learns
    found = tune(tmp_path, spec)
    assert [(outcome.arms, len(outcome.trials)) for outcome in found.outcomes] == [
        (("dense", "dense-again"), 15),
        (("topk-50",), 15),
    ]
    assert len(machine.trained) == 30
    for outcome in found.outcomes:
        assert outcome.best.loss == min(trial.loss for trial in outcome.trials) == outcome.losses[0]
    assert found.values["dense"] == found.values["dense-again"]
    assert list(found.values["topk-50"]) == ["learning_rate", "sparsity"]
    # What arms have in common is the same in their first trials.
    first = [[trial.values["learning_rate"] for trial in outcome.trials[:10]] for outcome in found.outcomes]
    assert first[0] == first[1]
    assert len(set(first[0])) == 10
    assert (found.train_examples + found.validation_examples, found.validation_examples > 5) == (60, True)


def test_the_runs_are_those_with_what_was_found(tmp_path, machine):
    spec = spec_of()
    found = tune(tmp_path, spec)
    asked, runs, _ = Store(tmp_path).study()
    assert asked == spec
    assert runs == list(expand(apply(spec, found.values), PRINTS))
    assert {run.config.training["learning_rate"] for run in runs if run.arm == "dense"} == {
        found.values["dense"]["learning_rate"]
    }


def test_ranges_and_lists_are_kept_to(tmp_path, machine):
    found = tune(tmp_path, spec_of(trials=12, weight_decay=[0.0, 0.1], hidden_dropout={"low": 0.2, "high": 0.3}))
    trials = [trial for outcome in found.outcomes for trial in outcome.trials]
    assert {trial.values["weight_decay"] for trial in trials} == {0.0, 0.1}
    assert all(0.2 <= trial.values["hidden_dropout"] <= 0.3 for trial in trials)
    rates = sorted(trial.values["learning_rate"] for trial in trials)
    assert 1e-5 <= rates[0] < 1e-4  # on a logarithmic scale a third is below
    assert rates[-1] <= 1e-2


def test_rules_layers_and_schedules_are_chosen_from_their_lists(tmp_path, machine):
    choices = {
        "rule": ["topk", "percentile"],
        "layers": ["all", [0, 1], [2]],
        "schedule": ["constant", {"kind": "anneal", "end": 0.5}],
    }
    asking = {"name": "topk-50", "sparsity": 0.5, "tune": ["learning_rate", *choices]}
    spec = make_spec(tune={"trials": 12, "learning_rate": RATE} | choices, arms=[{"name": "dense"}, asking])
    found = tune(tmp_path, spec)
    trials = found.outcomes[1].trials
    for name, space in spec.tune.ranges.items():
        if name in choices:
            assert {encoded(trial.values[name]) for trial in trials} == {encoded(item) for item in space.samples}
    assert Store(tmp_path).tuning(spec) == found  # read back from JSON
    best = found.values["topk-50"]
    (run, *_) = (run for run in Store(tmp_path).study()[1] if run.arm == "topk-50")
    assert run.config.attention["rule"] == best["rule"]
    assert run.config.attention.get("layers", "all") == (
        best["layers"] if best["layers"] == "all" else [*best["layers"]]
    )


# Giving up


def test_hopeless_trials_are_given_up_by_the_same_rule_for_every_arm(tmp_path, machine):
    machine.early = hopeless
    spec = spec_of(trials=15, epochs=2, pruning=True)
    found = tune(tmp_path, spec)
    for outcome in found.outcomes:
        assert len(outcome.trials) == 15  # each counts as one
        assert not any(trial.pruned for trial in outcome.trials[:STARTUP_TRIALS])
        assert 0 < outcome.pruned < 15 - STARTUP_TRIALS
        whole = []
        for trial in outcome.trials:
            first = early(trial.values["learning_rate"])
            assert trial.pruned == (1 if exceeded([first], limits(whole, 2)) else None)
            if trial.pruned is None:
                whole.append([first, trial.loss])
            else:
                assert trial.loss == first
        assert outcome.best.pruned is None
        assert len(outcome.losses) + outcome.pruned == 15


def test_a_trial_that_was_given_up_is_never_the_best(tmp_path, machine):
    # Losses rise: what was given up early had a lower one than any that was trained to its end.
    machine.early = lambda run: hopeless(run) / 1000
    found = tune(tmp_path, spec_of(trials=12, epochs=2, pruning=True))
    for outcome in found.outcomes:
        assert outcome.pruned
        assert outcome.best.loss == min(trial.loss for trial in outcome.trials if trial.pruned is None)
        assert outcome.best.loss > min(trial.loss for trial in outcome.trials)


def test_a_search_that_gives_up_goes_on_to_the_same_after_a_kill(tmp_path, machine):
    machine.early = hopeless
    spec = spec_of(trials=9, epochs=2, pruning=True)
    whole = tune(tmp_path / "whole", spec)
    machine.trained.clear()
    for until in (7, 13, 16):
        machine.until = until
        with pytest.raises(Killed):
            tune(tmp_path / "killed", spec)
    machine.until = math.inf
    assert tune(tmp_path / "killed", spec) == whole
    assert len(machine.trained) == 18
    assert any(outcome.pruned for outcome in whole.outcomes)


# The evaluation split


def test_nothing_of_the_evaluation_split_comes_into_a_search(tmp_path, machine):
    whole = data()
    tune(tmp_path, spec_of(), whole)
    (seen,) = machine.seen
    assert isinstance(seen, ExperimentData)
    assert not seen.evaluations
    texts = {text for split in (seen.conditions[""].train, seen.test) for text in split.texts}
    assert texts == set(whole.train.texts)
    assert not texts & set(whole.test.texts)


def test_other_texts_and_labels_of_the_evaluation_split_change_nothing_that_is_tried_or_found(tmp_path, machine, whole):
    other = data("something else", labels=1)
    assert data().fingerprint != other.fingerprint
    # A run's id is a hash of all data that its process is given.
    assert tune(tmp_path / "other", spec_of(trials=12), other) == whole
    # Another training split does change it.
    shorter = data()
    shorter = dataclasses.replace(shorter, train=shorter.train.take(range(50)))
    found = tune(tmp_path / "shorter", spec_of(trials=1), shorter)
    assert found.outcomes[0].trials[0].run_id != whole.outcomes[0].trials[0].run_id


# Killed, resumed, and how many trials


def test_a_search_that_is_killed_again_and_again_goes_on_to_the_same(tmp_path, machine, whole):
    spec = spec_of(trials=12)
    for until in (1, 2, 5, 21, 24):
        machine.until = until
        with pytest.raises(Killed):
            tune(tmp_path, spec)
        assert Store(tmp_path).tuning(spec) is None
    machine.until = math.inf
    assert tune(tmp_path, spec) == whole
    # What had a record was not trained again, though Optuna was not told of it.
    assert len(machine.trained) == 24


def test_a_finished_search_is_read_and_trains_nothing(tmp_path, machine, monkeypatch):
    spec = spec_of()
    found = tune(tmp_path, spec)
    machine.trained.clear()
    monkeypatch.setitem(sys.modules, "optuna", None)
    assert tune(tmp_path, spec) == found
    # Killed between the last trial and the file: all trials are there.
    monkeypatch.undo()
    (tmp_path / "tuning.json").unlink()
    assert tune(tmp_path, spec) == found
    assert machine.trained == []


def test_trials_are_a_total(tmp_path, machine):
    machine.until = 6
    with pytest.raises(Killed):
        tune(tmp_path, spec_of(trials=4))  # 2 searches: 8 trials in all
    machine.until = math.inf
    machine.trained.clear()
    found = tune(tmp_path, spec_of(trials=6))
    assert [len(outcome.trials) for outcome in found.outcomes] == [6, 6]
    assert len(machine.trained) == 12 - 6
    assert found == tune(tmp_path / "at once", spec_of(trials=6))


def test_fewer_trials_than_are_done_are_as_many_for_every_arm(tmp_path, machine):
    machine.until = 7
    with pytest.raises(Killed):
        tune(tmp_path, spec_of(trials=4))
    machine.until = math.inf
    assert tune(tmp_path, spec_of(trials=2)) == tune(tmp_path / "at once", spec_of(trials=2))


def test_more_trials_are_refused_once_runs_hang_on_what_was_found(tmp_path, machine):
    tune(tmp_path, spec_of(trials=4))
    before = (tmp_path / "study.json").read_bytes()
    with pytest.raises(
        RecordError, match=r"what 4 trials of each arm found; tune\.trials = 6 would choose anew when res"
    ):
        tune(tmp_path, spec_of(trials=6))
    assert (tmp_path / "study.json").read_bytes() == before
    with pytest.raises(RecordError, match="different tune"):
        tune(tmp_path, spec_of(trials=4, share=0.3))


# Trouble


def test_what_diverges_is_counted_and_never_found(tmp_path, machine):
    machine.outcome = lambda run: "diverged" if run.config.training["learning_rate"] > 2e-3 else "finished"
    found = tune(tmp_path, spec_of(trials=15))
    for outcome in found.outcomes:
        assert outcome.diverged == sum(trial.values["learning_rate"] > 2e-3 for trial in outcome.trials)
        assert outcome.best.values["learning_rate"] <= 2e-3
        assert len(outcome.losses) + outcome.diverged == 15
    assert any(outcome.diverged for outcome in found.outcomes)


def test_an_arm_whose_trials_all_diverge_is_named(tmp_path, machine):
    machine.outcome = lambda run: "diverged" if run.arm == "topk-50" else "finished"
    for _ in range(2):  # the second time without training
        with pytest.raises(CrispError, match=r"all 4 trials of arm 'topk-50' diverged\. Other ranges in \[tune\]"):
            tune(tmp_path, spec_of())
        machine.outcome = None
    assert not (tmp_path / "tuning.json").exists()


def test_a_trial_that_fails_is_an_error_and_is_tried_again(tmp_path, machine):
    whole = tune(tmp_path / "whole", spec_of())
    machine.outcome = lambda run: "failed" if (run.arm, run.index) == ("topk-50", 2) else "finished"
    with pytest.raises(CrispError, match=r"trial 3 of arm 'topk-50' failed: why\. What is done is kept"):
        tune(tmp_path / "failed", spec_of())
    machine.outcome = lambda run: "finished"
    assert tune(tmp_path / "failed", spec_of()) == whole


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text[: len(text) // 2], "Invalid JSON"),
        (lambda text: "[]", "Input should be an object"),
        (lambda text: text.replace('"loss": 0', '"los": 0'), r"outcomes\.0\.trials\.\d\.loss: Field required"),
        (lambda text: text.replace('"schema": 2', '"schema": 9'), "it has schema 9, this version reads 1 to 2"),
        (lambda text: text.replace('"topk-50"', '"topk-60"'), "its arms are not those of the experiment"),
        (
            lambda text: text.replace('"sparsity"', '"sparsety"'),
            "a trial of topk-50 tried learning_rate, sparsety, not",
        ),
        (
            lambda text: text.replace('"sparsity": 0.', '"sparsity": 9.'),
            r"tried sparsity = 9\.\d+, outside of 0\.1 to 0\.9",
        ),
    ],
)
def test_a_damaged_outcome_is_refused_and_made_again(tmp_path, machine, change, message):
    spec = spec_of()
    found = tune(tmp_path, spec)
    file = tmp_path / "tuning.json"
    text = file.read_text(encoding="utf-8")
    assert change(text) != text
    file.write_text(change(text), encoding="utf-8")
    for act in (Store(tmp_path).study, lambda: Store(tmp_path).require(spec, PRINTS)):
        with pytest.raises(
            RecordError, match=rf"tuning\.json is damaged: .*{message}.* Delete it: what was found is read"
        ):
            act()
    file.unlink()
    machine.trained.clear()
    assert tune(tmp_path, spec) == found
    assert machine.trained == []


def test_numbers_of_trials_that_differ_are_refused(tmp_path, machine):
    tune(tmp_path, spec_of())
    file = tmp_path / "tuning.json"
    content = json.loads(file.read_text(encoding="utf-8"))
    content["outcomes"][1]["trials"].pop()
    file.write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(RecordError, match="its arms had different numbers of trials"):
        Store(tmp_path).study()


def test_a_damaged_database_is_told_and_made_again_from_the_records(tmp_path, machine):
    machine.until = 5
    with pytest.raises(Killed):
        tune(tmp_path, spec_of())
    machine.until = math.inf
    database = tmp_path / "tuning" / "trials.sqlite3"
    database.write_bytes(b"no database" * 1000)
    with pytest.raises(
        RecordError, match=r"trials\.sqlite3 cannot be read: file is not a database\. Delete it: the same"
    ):
        tune(tmp_path, spec_of())
    database.unlink()
    assert tune(tmp_path, spec_of()) == tune(tmp_path / "whole", spec_of())
    assert len(machine.trained) == 8 + 8


def test_a_full_disk_is_told(tmp_path, machine):
    machine.until = 2
    with pytest.raises(Killed):
        tune(tmp_path, spec_of())
    connection = sqlite3.connect(tmp_path / "tuning" / "trials.sqlite3")
    # Not one page more: as a disk without room.
    pages = connection.execute("pragma page_count").fetchone()[0]
    connection.close()
    machine.until = math.inf
    real = sqlite3.connect

    def connect(*arguments, **keywords):
        own = real(*arguments, **keywords)
        own.execute(f"pragma max_page_count = {pages}")
        return own

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sqlite3.dbapi2, "connect", connect)
        patch.setattr(sqlite3, "connect", connect)
        with pytest.raises(StorageError, match=r"could not be written: .*full.* Finished runs in it are kept"):
            tune(tmp_path, spec_of(trials=400))


def test_optuna_that_is_missing_is_told_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(tuning.importlib.util, "find_spec", lambda name: None)
    spec = spec_of()
    with pytest.raises(ConfigurationError, match=r"needs the package optuna: pip install 'crisp-attention\[tune\]'"):
        tuning.plan(spec, Store(tmp_path / "out"), CHECKPOINT, carve(data(), 0.2), 1, HERE)
    assert not (tmp_path / "out").exists()
    assert tuning.plan(make_spec(), Store(tmp_path / "out"), CHECKPOINT, data(), 1, HERE) is None


def test_another_process_is_waited_for_and_what_it_found_is_taken(tmp_path, machine, monkeypatch):
    spec = spec_of()
    found = tune(tmp_path / "other", spec)
    store = Store(tmp_path / "mine")
    store.open(spec, PRINTS)
    lock, told = store.lock("tuning"), []
    todo = tuning.plan(spec, store, CHECKPOINT, carve(data(), 0.2), 1, HERE)

    def announce(message):
        """While we wait, the other process ends."""
        told.append(message)
        Store(tmp_path / "mine").save_tuning(found)
        lock.release()

    monkeypatch.setattr(tuning, "_POLL_SECONDS", 0.01)
    machine.trained.clear()
    assert tuning.search(todo, store, lambda *_: None, announce) == found
    assert told == ["Another process is tuning; waiting for what it finds"]
    assert machine.trained == []


def test_a_plan_counts_what_is_done(tmp_path, machine):
    spec = spec_of()
    machine.until = 5
    with pytest.raises(Killed):
        tune(tmp_path, spec)
    todo = tuning.plan(spec, Store(tmp_path), CHECKPOINT, carve(data(), 0.2), 1, HERE)
    assert todo.done == {"dense": 3, "topk-50": 2}
    assert (todo.trials, todo.left) == (4, 3)


def test_folders_may_be_called_anything(tmp_path, machine):
    tune(tmp_path / "50% of ?a#b ${x}", spec_of(trials=1))
    assert (tmp_path / "50% of ?a#b ${x}" / "tuning" / "trials.sqlite3").stat().st_size > 0
