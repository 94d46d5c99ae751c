"""Which sparsity for a model and data: how much is searched and confirmed, and the model that comes of it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from crisp_attention.errors import ConfigurationError, RecordError
from crisp_attention.experiment import budget as budgets
from crisp_attention.experiment import search_space
from crisp_attention.experiment.conclusions.analysis import Analysis
from crisp_attention.experiment.data import dataset
from crisp_attention.experiment.execution import tuning
from crisp_attention.experiment.execution.ledger import Ledger, require_optuna
from crisp_attention.experiment.model_card import card
from crisp_attention.experiment.results.faults import HINT
from crisp_attention.experiment.results.files import whole_folder
from crisp_attention.experiment.results.store import Store
from crisp_attention.experiment.search_space import Question
from crisp_attention.experiment.specification.spec import ExperimentSpec, parse, to_plain

_MODEL = "model"


@dataclass(frozen=True)
class Wish:
    """How much a user wants to be done.

    Attributes:
        budget: As "2h"; None for the usual numbers.
        trials: Of each arm; None for as many as fit.
        seeds: Of each arm; None for as many as fit.
        jobs: Worker processes; None for one a core.
        storage: URL of an Optuna storage to share; None for one of the run directory.
        seeds_per_trial: Trainings of each trial.
    """

    budget: str | None = None
    trials: int | None = None
    seeds: int | None = None
    jobs: int | None = None
    storage: str | None = None
    seeds_per_trial: int = 1

    def check(self) -> None:
        """Make sure, before anything is read, that it can be wished for.

        Raises:
            ConfigurationError: If a number is below 1, the budget is no duration, or Optuna is not installed.
        """
        for name in ("trials", "seeds", "seeds_per_trial"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigurationError(f"--{name.replace('_', '-')} must be at least 1, got {value}.")
        if self.budget is not None:
            budgets.seconds_of(self.budget)
        require_optuna()


@dataclass(frozen=True)
class Recommendation:
    """The model that is saved.

    Attributes:
        folder: Where it is.
        arm: Whose it is.
        why: In a sentence.
    """

    folder: Path
    arm: str
    why: str


def settle(question: Question, wish: Wish, folder: Path, announce: Callable[[str], None]) -> ExperimentSpec:
    """The experiment with its numbers of trials and seeds, which stand from then on.

    A study that was begun keeps those it was begun with, and so does one that is shared, whatever this machine's speed;
    numbers that are given by name are tried in their place.

    Args:
        question: What is asked.
        wish: How much is to be done.
        folder: The run directory, which need not be there.
        announce: Told what was settled, and why.

    Raises:
        ConfigurationError: If the budget is no duration or too small, or the storage cannot be used.
        RecordError: If the directory or the storage holds another experiment.
    """
    seconds = None if wish.budget is None else budgets.seconds_of(wish.budget)
    store = Store(folder)
    trials, seeds = wish.trials, wish.seeds
    if store.begun:
        begun, _, _ = store.study()
        if begun.tune is None:
            raise RecordError(f"{folder} holds another experiment ({begun.name}, which searches nothing). {HINT}")
        trials, seeds = trials or begun.tune.trials, seeds or begun.seeds
        if seconds is not None:
            announce(f"The study was begun with {trials} trials and {seeds} seeds of each arm, and goes on with them")
        return _with(question.spec, budgets.Share(trials, seeds))
    store.require(question.spec, question.fingerprints)
    agreed = _agreed(question, wish)
    if agreed is not None and trials is None:
        announce(f"The search is shared, and has {agreed} trials of each arm")
        trials = agreed
    if seconds is None:
        return _with(question.spec, budgets.usual(trials, seeds))
    announce("Measuring how fast this machine trains, to see what fits into the budget")
    cost = search_space.cost(question, wish.jobs)
    share = budgets.share(seconds, cost, trials, seeds)
    announce(
        f"{budgets.in_words(seconds)} are room for {share.trials} trials of each arm "
        f"(about {budgets.in_words(cost.search(share.trials))}) and then {share.seeds} seeds of each "
        f"(about {budgets.in_words(cost.confirmation(share.seeds))}); these numbers stand from now on"
    )
    return _with(question.spec, share)


def save(analysis: Analysis, folder: Path) -> Recommendation | None:
    """Save the model that the verdict recommends under `model`, with a card; None if its run did not finish.

    The sparse arm's if that helps, else the dense one's. Of each it is the first seed's, whatever its accuracy.

    Args:
        analysis: Of the finished experiment.
        folder: Its run directory.

    Raises:
        StorageError: If it cannot be written.
    """
    store, word = Store(folder), analysis.verdict.word
    helps = word == "helps"
    arm = analysis.spec.primary.arm if helps else analysis.spec.primary.baseline
    _, runs, _ = store.study()
    run = next(run for run in runs if run.arm == arm and run.index == 0)
    record, source = store.load(run.config.run_id), store.model(run.config.run_id)
    if record is None or record.status != "finished" or not source.exists():
        return None
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    # A schedule may have ended in dense attention.
    end = "" if config.get("crisp_attention") else ", dense at the end of its schedule"
    why = {
        "helps": f"The sparse arm came out better than the dense one on these data, so this is its model{end}.",
        "hurts": "The sparse arm came out worse than the dense one on these data, so this is the dense model.",
        "equivalent": "The two arms are equivalent on these data, so this is the simpler, dense model.",
    }.get(word, "It is not shown that the sparse arm is better on these data, so this is the dense model.")
    task = "text-classification" if (source / "tokenizer_config.json").exists() else "image-classification"
    target = folder / _MODEL
    with store.writing(), whole_folder(target) as scratch:
        shutil.copytree(source, scratch, dirs_exist_ok=True)
        text = card(analysis, record, why, config.get("crisp_attention"), task)
        (scratch / "README.md").write_text(text, encoding="utf-8")
    return Recommendation(target, arm, why)


def _agreed(question: Question, wish: Wish) -> int | None:
    """How many trials those who share a storage have agreed on."""
    if wish.storage is None:
        return None
    assert question.spec.tune is not None
    carved = dataset.carve(question.data.conditions[""], question.spec.tune.share)
    return Ledger(question.spec, tuning.prints_of(question.checkpoint, carved), wish.storage).agreed()


def _with(spec: ExperimentSpec, share: budgets.Share) -> ExperimentSpec:
    """The experiment with these numbers, checked as if they had been written.

    Raises:
        ConfigurationError: If one of them is out of range.
    """
    content = to_plain(spec)
    tune = {**content["tune"], "trials": share.trials}
    return parse({**content, "seeds": share.seeds, "tune": tune}, "crisp tune")
