"""Specifications and run directories of made-up records, so that what comes after training needs no training."""

from __future__ import annotations

import dataclasses
import gc
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from crisp_attention.experiment.results.examples import Examples
from crisp_attention.experiment.results.record import (
    Epoch,
    LengthBin,
    Provenance,
    RealisedSparsity,
    Record,
    Score,
    Timing,
)
from crisp_attention.experiment.results.store import Store
from crisp_attention.experiment.results.tuning import Outcome as TuningOutcome
from crisp_attention.experiment.results.tuning import Trial, Tuning
from crisp_attention.experiment.specification.runs import Fingerprints, PlannedRun, expand
from crisp_attention.experiment.specification.spec import ExperimentSpec, parse
from crisp_attention.experiment.specification.tuned import apply, searches

# statsmodels collects all garbage at each Holm adjustment; without torch's many objects that takes no time.
gc.freeze()

MODEL = "a" * 64
DATA = "b" * 64
PRINTS = Fingerprints(MODEL, {"": DATA})
CLASSES = ("negative", "positive")
EXAMPLES = 24
NOTES = ("2 of 62 rows were dropped.",)

ARMS = (
    {"name": "dense"},
    {"name": "topk-50", "sparsity": 0.5},
    {"name": "percentile-80", "sparsity": 0.8, "rule": "percentile"},
)
PLACEBO = {"name": "dense-again", "seed_offset": 1000}

MAP_ROWS = (0, 3, 5)
MAP_TOKENS = (("[CLS]", "good", "[SEP]"), ("[CLS]", "not", "bad", "[SEP]"), ("[CLS]", "dull", "[SEP]"))
LAYERS = 2

Outcome = Callable[[str, int], "np.ndarray | str | None"]


def content(**changes: Any) -> dict[str, Any]:
    """A specification as a TOML file would give it."""
    plain = {
        "name": "made-up",
        "model": "minilm-l6",
        "seeds": 8,
        "primary": {"arm": "topk-50"},
        "data": {"source": "movie-snippets"},
        "arms": [dict(arm) for arm in ARMS],
    }
    return plain | changes


def make_spec(**changes: Any) -> ExperimentSpec:
    return parse(content(**changes), "test")


def provenance(**changes: Any) -> Provenance:
    values = {
        "packages": {"crisp-attention": "0.1", "torch": "2.8.0"},
        "git": {"commit": "0123456789abcdef", "dirty": False},
        "platform": {"system": "Linux", "machine": "x86_64", "python": "3.11.7"},
        "device": "cpu",
        "threads": 1,
        "model": "minilm-l6",
        "data": "movie-snippets",
        "weights_fingerprint": MODEL,
        "data_fingerprint": DATA,
        "data_notes": NOTES,
    }
    return Provenance(**(values | changes))


def draws(accuracy: dict[str, float], examples: int = EXAMPLES, seed: int = 0) -> Outcome:
    """Outcomes in which each example is right with the arm's probability, independently."""

    def outcome(arm: str, index: int) -> np.ndarray:
        random = np.random.default_rng([seed, index, zlib.crc32(arm.encode())])
        return random.random(examples) < accuracy.get(arm, 0.8)

    return outcome


def only(outcome: Outcome, **cases: Any) -> Outcome:
    """An outcome with some runs replaced: `arm="finished..."` by `arm={index: result}` (underscores for dashes)."""

    def changed(arm: str, index: int) -> Any:
        special = cases.get(arm.replace("-", "_"), {})
        return special[index] if index in special else outcome(arm, index)

    return changed


def finished(run: PlannedRun, correct: np.ndarray, **changes: Any) -> tuple[Record, dict[str, np.ndarray]]:
    """The record and outputs of a run that got these examples right."""
    labels = np.arange(len(correct), dtype=np.int64) % len(CLASSES)
    answers = np.where(correct, labels, (labels + 1) % len(CLASSES))
    logits = np.zeros((len(correct), len(CLASSES)), dtype=np.float32)
    logits[np.arange(len(correct)), answers] = 1.0
    total, right = len(correct), int(np.sum(correct))
    epochs = tuple(
        Epoch(
            epoch=number,
            running_loss=0.9 / number,
            train=Score(loss=0.5 / number, correct=min(total, right + number), total=total),
            # Only the last epoch counts: the ones before it are made to look better.
            test=Score(loss=0.6 / number, correct=right if number == 2 else total, total=total),
        )
        for number in (1, 2)
    )
    share = run.config.attention["sparsity"]
    arrays = {"test_logits": logits, "test_labels": labels, "train_logits": logits[:4], "train_labels": labels[:4]}
    return _record(run, epochs=epochs, parameters=1234, share=share, **changes), arrays


def troubled(run: PlannedRun, status: str, **changes: Any) -> Record:
    """The record of a run that diverged or failed."""
    return _record(run, **({"status": status, "reason": f"made to be {status}"} | changes))


def _record(run: PlannedRun, share: float | None = None, **changes: Any) -> Record:
    layers = {} if share is None else {"layer.0": share, "layer.1": share / 2}
    values = {
        "run_id": run.config.run_id,
        "status": "finished",
        "arm": run.arm,
        "config": dataclasses.asdict(run.config),
        "classes": CLASSES,
        "epochs": (),
        "realised_sparsity": RealisedSparsity(train=layers, test=layers),
        "parameters": 0,
        "timing": Timing(
            started="2025-01-01T00:00:00+00:00", seconds=12.3, train_seconds=10.0, train_examples_per_second=50.0
        ),
        "provenance": provenance(),
    }
    return Record(**(values | changes))


def fill(folder: Path, spec: ExperimentSpec, outcome: Outcome, **changes: Any) -> Store:
    """A run directory; `outcome` says per arm and seed index: bool `[N]`, "diverged", "failed", None (not done)."""
    store = Store(folder)
    store.open(spec, PRINTS)
    for run in expand(spec, PRINTS):
        result = outcome(run.arm, run.index)
        if isinstance(result, str):
            store.save(troubled(run, result, **changes), None)
        elif result is not None:
            store.save(*finished(run, result, **changes))
    return store


def made_up_tuning(spec: ExperimentSpec) -> Tuning:
    """What might have been found: the second trial of each search is the best, the last one diverged."""
    assert spec.tune is not None
    outcomes, seeds = [], spec.tune.seeds_per_trial
    for search in searches(spec):
        losses = [0.5 - 0.125 * (number == 1) for number in range(spec.tune.trials - 1)] + [None]
        trials = [
            Trial(
                values={name: found.samples[number % 2] for name, found in search.ranges.items()},
                loss=loss,
                by_seed=()
                if loss is None or seeds == 1
                else [loss + (seed - (seeds - 1) / 2) / 16 for seed in range(seeds)],
                run_id=f"{number:016x}",
            )
            for number, loss in enumerate(losses)
        ]
        outcomes.append(TuningOutcome(arms=search.arms, trials=tuple(trials)))
    return Tuning(outcomes=tuple(outcomes), train_examples=48, validation_examples=12, optuna="5.0.0")


def fill_tuned(folder: Path, spec: ExperimentSpec, tuning: Tuning | None = None) -> Store:
    """A finished study whose settings were searched; `tuning` is what was found, `made_up_tuning` if left out."""
    store, prints, tuning = Store(folder), prints_of(spec), tuning or made_up_tuning(spec)
    store.open(spec, prints)
    store.save_tuning(tuning)
    outcome = draws({"topk-50": 0.9})
    for run in expand(apply(spec, tuning.values), prints):
        store.save(*finished(run, outcome(run.arm, run.index)))
    return store


def planned(spec: ExperimentSpec) -> dict[tuple[str, int], PlannedRun]:
    """All runs by arm and index."""
    return {(run.arm, run.index): run for run in expand(spec, PRINTS)}


def prints_of(spec: ExperimentSpec) -> Fingerprints:
    """Made-up fingerprints of all data that an experiment needs."""
    data = {name: DATA if name == "" else f"{place:x}" * 64 for place, name in enumerate(spec.conditions())}
    return Fingerprints(MODEL, data, {item.name: f"data of {item.name}" for item in spec.evaluations})


def ids_of(spec: ExperimentSpec) -> list[str]:
    """Ids of all runs where nothing varies, in order."""
    return [run.config.run_id for run in expand(spec, PRINTS)]


def fill_runs(folder: Path, spec: ExperimentSpec, result: Callable[[PlannedRun], Any]) -> Store:
    """A run directory; `result` gives per planned run a record and its arrays, or None (not done)."""
    store, prints = Store(folder), prints_of(spec)
    store.open(spec, prints)
    for run in expand(spec, prints):
        if (made := result(run)) is not None:
            store.save(*made)
    return store


def finished_in_full(
    run: PlannedRun, correct: np.ndarray, spec: ExperimentSpec, **changes: Any
) -> tuple[Record, dict[str, np.ndarray]]:
    """The same with all that a record can hold: lengths, entropy, further evaluations, attention maps."""
    random = np.random.default_rng(zlib.crc32(run.config.run_id.encode()))
    share = run.config.attention["sparsity"] or 0.0
    record, arrays = finished(run, correct)
    total = len(correct)
    arrays["test_logits"] = (arrays["test_logits"] * 2 + random.normal(scale=0.3, size=(total, 2))).astype(np.float32)
    arrays["test_logits"] = np.where(
        (arrays["test_logits"].argmax(axis=1) == arrays["test_labels"])[:, None] == correct[:, None],
        arrays["test_logits"],
        arrays["test_logits"][:, ::-1],
    )
    arrays["test_lengths"] = np.arange(3, 3 + total)
    evaluations = {}
    for item in spec.evaluations:
        right = correct & (random.random(total) < 0.9)
        arrays[f"{item.name}_labels"] = arrays["test_labels"]
        arrays[f"{item.name}_logits"] = (
            np.where(right[:, None], 1, -1) * np.eye(2, dtype=np.float32)[arrays["test_labels"]]
        )
        evaluations[item.name] = Score(loss=0.7, correct=int(right.sum()), total=total)
    arrays |= {
        "map_rows": np.array(MAP_ROWS),
        "map_lengths": np.array([len(tokens) for tokens in MAP_TOKENS]),
        "map_layers": np.array(LAYERS),
        "maps": np.concatenate([_maps(len(tokens), random) for tokens in MAP_TOKENS]),
    }
    half = total // 2
    lengths = (
        LengthBin(shortest=3, longest=2 + half, examples=half, realised=share * 0.8),
        LengthBin(shortest=3 + half, longest=2 + total, examples=total - half, realised=share),
    )
    more = {
        "realised_by_length": lengths,
        "entropy": {"layer.0": 2.0 - share, "layer.1": 1.5 - share},
        "evaluations": evaluations,
    }
    return record.model_copy(update=more | changes), arrays


def fill_in_full(folder: Path, spec: ExperimentSpec, outcome: Outcome, *, texts: bool = True) -> Store:
    """A run directory with all that a run can leave behind; `outcome` as for `fill`, in every condition the same."""

    def made(run: PlannedRun) -> Any:
        result = outcome(run.arm, run.index)
        if result is None:
            return None
        return (troubled(run, result), None) if isinstance(result, str) else finished_in_full(run, result, spec)

    store = fill_runs(folder, spec, made)
    if texts:
        own = tuple(f"sentence <b>number</b> {number}" for number in range(EXAMPLES))
        store.save_examples(Examples(texts=own, pairs=(), map_rows=MAP_ROWS, map_tokens=MAP_TOKENS))
    return store


def _maps(size: int, random: np.random.Generator) -> np.ndarray:
    """Attention of each layer `[L, T, T]`, flattened: rows that sum to one, 255 = 1.0."""
    weights = random.dirichlet(np.ones(size), size=(LAYERS, size))
    return np.rint(255 * weights).astype(np.uint8).ravel()


def planned_in(spec: ExperimentSpec) -> dict[tuple[str, str, int], PlannedRun]:
    """All runs by condition, arm and index, as `fill_in_full` does them."""
    return {(run.condition, run.arm, run.index): run for run in expand(spec, prints_of(spec))}
