"""Trials of several seeds, their training made up: judged by the mean, given up by the first, counted whole."""

from __future__ import annotations

import json
import math

import pytest

from crisp_attention.errors import RecordError
from crisp_attention.experiment.data.dataset import carve
from crisp_attention.experiment.execution import tuning
from crisp_attention.experiment.results.pruning import STARTUP_TRIALS
from crisp_attention.experiment.results.store import Store
from made_up_search import CHECKPOINT, HERE, Killed, Machine, data, hopeless, loss_of, spec_of, tune

pytestmark = pytest.mark.slow


@pytest.fixture
def machine(monkeypatch):
    """Workers that train nothing."""
    return Machine(monkeypatch)


RUNS_OF_TWO_SEARCHES = 2 * 3


def luck(run):
    """Up to half a nat that a seed has with some settings, one of them a lot of it; its mean over three is 0."""
    turns = run.config.training["learning_rate"] * 1e8 % 1
    return 0.5 * math.cos(2 * math.pi * (turns + run.config.seed / 3))


def test_a_trial_of_several_seeds_is_judged_by_their_mean(tmp_path, machine):
    machine.late = lambda run: loss_of(run) + luck(run)
    spec = spec_of(trials=12, epochs=2, seeds_per_trial=3)
    found = tune(tmp_path, spec)
    assert len(machine.trained) == 12 * RUNS_OF_TWO_SEARCHES
    assert {run.config.seed for run in machine.trained} == set(spec.tune.seeds) == {100_000, 100_001, 100_002}
    by_id = {run.config.run_id: run for run in machine.trained}
    lucky = 0
    for outcome in found.outcomes:
        for trial in outcome.trials:
            assert len(trial.by_seed) == 3
            assert trial.loss == pytest.approx(loss_of(by_id[trial.run_id]))  # luck evens out
            assert by_id[trial.run_id].config.seed == 100_000
            assert trial.by_seed[0] == machine.late(by_id[trial.run_id])
        assert outcome.best.loss == min(trial.loss for trial in outcome.trials)
        assert outcome.deviation == pytest.approx(0.5 * math.sqrt(3 / 4))  # of three points of a wave
        lucky += outcome.best != min(outcome.trials, key=lambda trial: trial.by_seed[0])
    assert lucky  # one seed would have chosen other settings


def test_with_one_seed_a_trial_has_no_losses_by_seed(tmp_path, machine):
    found = tune(tmp_path, spec_of(seeds_per_trial=1))
    assert found == tune(tmp_path / "silent", spec_of())
    assert {trial.by_seed for outcome in found.outcomes for trial in outcome.trials} == {()}
    assert {outcome.deviation for outcome in found.outcomes} == {None}


def test_trials_of_several_seeds_go_on_to_the_same_after_a_kill(tmp_path, machine):
    machine.early, machine.late = hopeless, lambda run: loss_of(run) + luck(run)
    spec = spec_of(trials=9, epochs=2, pruning=True, seeds_per_trial=3)
    whole = tune(tmp_path / "whole", spec)
    count = len(machine.trained)
    machine.trained.clear()
    for until in (2, 10, 33, 34, 35):
        machine.until = until
        with pytest.raises(Killed):
            tune(tmp_path / "killed", spec)
    machine.until = math.inf
    assert tune(tmp_path / "killed", spec) == whole
    assert len(machine.trained) == count


def test_a_trial_is_given_up_by_its_first_seed_or_not_at_all(tmp_path, machine):
    # What comes after the first epoch of other seeds is beyond every limit.
    machine.early = lambda run: hopeless(run) if run.config.seed == 100_000 else 1e3
    found = tune(tmp_path, spec_of(trials=15, epochs=2, pruning=True, seeds_per_trial=2))
    for outcome in found.outcomes:
        assert 0 < outcome.pruned < 15 - STARTUP_TRIALS
        own = [run for run in machine.trained if run.arm == outcome.arms[0]]
        assert len(own) == 2 * (15 - outcome.pruned) + outcome.pruned
        for trial in outcome.trials:
            assert trial.pruned in (None, 1)
            assert len(trial.by_seed) == (2 if trial.pruned is None else 0)


def test_a_trial_that_diverges_with_one_of_its_seeds_is_never_found(tmp_path, machine):
    machine.outcome = lambda run: "diverged" if (run.index, run.config.seed) == (1, 100_001) else "finished"
    found = tune(tmp_path, spec_of(trials=4, epochs=2, seeds_per_trial=3))
    for outcome in found.outcomes:
        assert [trial.loss is None for trial in outcome.trials] == [False, True, False, False]
        assert outcome.diverged == 1
    assert len(machine.trained) == 4 * RUNS_OF_TWO_SEARCHES - 2  # the third seed had nothing to decide


def test_a_plan_counts_trials_of_which_all_seeds_are_done(tmp_path, machine):
    spec = spec_of(epochs=2, seeds_per_trial=3)
    machine.outcome = lambda run: "diverged" if run.arm == "topk-50" else "finished"
    machine.until = 8
    with pytest.raises(Killed):
        tune(tmp_path, spec)
    # In turn: of dense a trial and one seed of the next, of the sparse arm four trials of one seed each.
    todo = tuning.plan(spec, Store(tmp_path), CHECKPOINT, carve(data(), 0.2), 1, HERE)
    assert todo.done == {"dense": 1, "topk-50": 4}
    assert (todo.trials, todo.seeds, todo.left) == (4, 3, 3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda trial: trial["by_seed"].pop(), "a trial of dense has losses of 1 seeds, 2 were asked for"),
        (lambda trial: trial.update(loss=9.0), "the loss of a trial of dense is not the mean of those of its seeds"),
    ],
)
def test_losses_by_seed_that_cannot_be_are_refused(tmp_path, machine, change, message):
    spec = spec_of(epochs=2, seeds_per_trial=2)
    tune(tmp_path, spec)
    file = tmp_path / "tuning.json"
    content = json.loads(file.read_text(encoding="utf-8"))
    change(content["outcomes"][0]["trials"][2])
    file.write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(RecordError, match=message):
        Store(tmp_path).tuning(spec)


def test_what_was_found_before_trials_had_seeds_is_read(tmp_path, machine):
    spec = spec_of()
    found = tune(tmp_path, spec)
    file = tmp_path / "tuning.json"
    content = json.loads(file.read_text(encoding="utf-8"))
    content["schema"] = 1
    for outcome in content["outcomes"]:
        for trial in outcome["trials"]:
            del trial["by_seed"]
    file.write_text(json.dumps(content), encoding="utf-8")
    assert Store(tmp_path).tuning(spec).outcomes == found.outcomes
