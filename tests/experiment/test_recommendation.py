"""How much is searched and confirmed, and which model comes of it."""

from __future__ import annotations

import json

import numpy as np
import pytest

from crisp_attention.errors import ConfigurationError, RecordError
from crisp_attention.experiment import budget, recommendation, search_space
from crisp_attention.experiment.conclusions.analysis import analyse
from crisp_attention.experiment.recommendation import Wish
from crisp_attention.experiment.results.store import Store
from crisp_attention.experiment.specification.spec import USUAL_SEEDS
from crisp_attention.experiment.specification.tune import USUAL_TRIALS
from record_builders import EXAMPLES, PLACEBO, PRINTS, made_up_tuning, make_spec
from record_builders import finished as finished_run

COST = budget.Cost(trial=(10.0, 10.0), run=(10.0, 10.0, 10.0), searching=1, running=1)


@pytest.fixture
def question(tiny_folders, csv_file, monkeypatch):
    monkeypatch.setattr(search_space, "cost", lambda *_: COST)
    data = {"source": str(csv_file), "max_length": 64}
    return search_space.ask(data, str(tiny_folders["bert"]), {"epochs": 2})


def settle(question, folder, **wish):
    said = []
    spec = recommendation.settle(question, Wish(**wish), folder, said.append)
    return (spec.tune.trials, spec.seeds), spec, " ".join(said)


def test_a_budget_decides_once_how_much_is_done(question, tmp_path):
    numbers, spec, said = settle(question, tmp_path / "out", budget="20m")
    trials, seeds = numbers
    assert COST.search(trials) + COST.confirmation(seeds) <= 20 * 60
    assert f"20m are room for {trials} trials of each arm" in said
    assert f"then {seeds} seeds of each" in said
    assert not (tmp_path / "out").exists()
    # Once begun, another budget or speed changes nothing.
    Store(tmp_path / "out").open(spec, question.fingerprints)
    for wish in ({"budget": "20m"}, {"budget": "9h"}, {}):
        assert settle(question, tmp_path / "out", **wish)[0] == numbers
    assert f"begun with {trials} trials and {seeds} seeds" in settle(question, tmp_path / "out", budget="9h")[2]
    assert settle(question, tmp_path / "out", seeds=15)[0] == (trials, 15)


def test_what_is_named_is_kept_to(question, tmp_path):
    assert settle(question, tmp_path)[0] == (USUAL_TRIALS, USUAL_SEEDS)
    assert settle(question, tmp_path, trials=3, seeds=2)[0] == (3, 2)
    assert settle(question, tmp_path, trials=12, budget="20m")[0][0] == 12
    assert settle(question, tmp_path, seeds=8, budget="20m")[0][1] == 8


def test_a_shared_search_keeps_its_number_of_trials(question, tmp_path, monkeypatch):
    monkeypatch.setattr(recommendation, "_agreed", lambda *_: 11)
    numbers, _, said = settle(question, tmp_path / "out", budget="1h", storage="sqlite:///x.db")
    assert numbers[0] == 11
    assert "The search is shared, and has 11 trials of each arm" in said


def test_a_folder_of_something_else_is_refused_before_anything_is_measured(question, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setattr(search_space, "cost", None)
    with pytest.raises(RecordError, match="exists and is not a run directory"):
        settle(question, tmp_path, budget="1h")
    Store(tmp_path / "run").open(make_spec(), PRINTS)
    with pytest.raises(RecordError, match=r"run holds another experiment \(made-up, which searches nothing\)"):
        settle(question, tmp_path / "run", budget="1h")


@pytest.mark.parametrize(
    ("wish", "message"),
    [
        ({"trials": 0}, "--trials must be at least 1, got 0"),
        ({"seeds": -1}, "--seeds must be at least 1, got -1"),
        ({"seeds_per_trial": 0}, "--seeds-per-trial must be at least 1, got 0"),
        ({"budget": "soon"}, "--budget must be a duration such as 2h"),
    ],
)
def test_wishes_that_make_no_sense_are_refused(wish, message):
    with pytest.raises(ConfigurationError, match=message):
        Wish(**wish).check()


# The model


def study(folder, dense, sparse, *, kept=("dense", "sparse"), seeds=8):
    """A finished study whose arms get these shares of the examples right, and the models of its first seed."""
    arms = [{"name": "dense"}, dict(PLACEBO), {"name": "sparse", "sparsity": 0.5, "tune": ["rule", "learning_rate"]}]
    tune = {"trials": 3, "learning_rate": {"low": 1e-5, "high": 1e-3}, "rule": ["topk", "percentile"]}
    spec = make_spec(arms=arms, primary={"arm": "sparse"}, tune=tune, seeds=seeds)
    store = Store(folder)
    store.open(spec, PRINTS)
    store.save_tuning(made_up_tuning(spec))
    right = {"dense": dense, "dense-again": dense, "sparse": sparse}
    for run in store.study()[1]:
        correct = np.arange(EXAMPLES) < right[run.arm] + run.index % 2
        store.save(*finished_run(run, correct))
        if run.index == 0 and run.arm in kept:
            model = store.model(run.config.run_id)
            model.mkdir(parents=True)
            settings = {"crisp_attention": {"rule": "topk", "sparsity": 0.5}} if run.arm == "sparse" else {}
            (model / "config.json").write_text(json.dumps({"arm": run.arm, **settings}), encoding="utf-8")
            (model / "tokenizer_config.json").write_text("{}", encoding="utf-8")
    return analyse(store)


@pytest.mark.parametrize(
    ("dense", "sparse", "word", "arm"),
    [(4, 20, "helps", "sparse"), (20, 4, "hurts", "dense"), (12, 13, "inconclusive", "dense")],
)
def test_the_sparse_model_is_saved_only_if_it_helps(tmp_path, dense, sparse, word, arm):
    analysis = study(tmp_path, dense, sparse)
    assert analysis.verdict.word == word
    saved = recommendation.save(analysis, tmp_path)
    assert saved is not None
    assert (saved.arm, saved.folder) == (arm, tmp_path / "model")
    assert json.loads((saved.folder / "config.json").read_text(encoding="utf-8"))["arm"] == arm
    card = (saved.folder / "README.md").read_text(encoding="utf-8")
    assert saved.why in card
    assert "over 8 paired seeds" in card
    assert "interval over seeds and examples" in card
    assert f"This model: {(dense if arm == 'dense' else sparse)} of {EXAMPLES} evaluation examples" in card
    assert ("import crisp_attention" in card) == (arm == "sparse")
    assert ("| rule (found in the search) | percentile |" in card) == (arm == "sparse")
    assert "pipeline_tag: text-classification" in card.partition("---\n")[2].partition("---\n")[0]


def test_a_sparse_arm_that_ends_dense_is_told_as_that(tmp_path):
    """Its schedule is over: nothing in its configuration is sparse."""
    analysis = study(tmp_path, 4, 20)
    _, runs, _ = (store := Store(tmp_path)).study()
    run = next(run for run in runs if run.arm == "sparse" and run.index == 0)
    (store.model(run.config.run_id) / "config.json").write_text("{}", encoding="utf-8")
    saved = recommendation.save(analysis, tmp_path)
    assert saved.why.endswith("so this is its model, dense at the end of its schedule.")
    assert "Its attention is dense" in (saved.folder / "README.md").read_text(encoding="utf-8")


def test_a_later_verdict_replaces_the_model(tmp_path):
    analysis = study(tmp_path, 4, 20)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "old").touch()
    recommendation.save(analysis, tmp_path)
    assert sorted(path.name for path in (tmp_path / "model").iterdir()) == [
        "README.md",
        "config.json",
        "tokenizer_config.json",
    ]
    assert not list(tmp_path.glob(".model*"))


def test_without_its_model_nothing_is_saved(tmp_path):
    assert recommendation.save(study(tmp_path, 20, 4, kept=("sparse",)), tmp_path) is None
    assert not (tmp_path / "model").exists()


def test_a_card_shows_names_as_they_are(tmp_path):
    analysis = study(tmp_path, 20, 4)
    _, runs, _ = (store := Store(tmp_path)).study()
    run = next(run for run in runs if run.arm == "dense" and run.index == 0)
    record = store.load(run.config.run_id)
    record = record.model_copy(update={"classes": ("<script>", "a|b", "*`_x_`*")})
    text = recommendation.card(analysis, record, "Why.", None, "text-classification")
    assert r"\<script\>, a\|b, \*\`\_x\_\`\*" in text
