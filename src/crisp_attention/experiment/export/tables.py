"""The two tables of a study, as Arrow holds them. No torch."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from statistics import fmean
from typing import Any

import numpy as np
import pyarrow as pa

from crisp_attention.experiment import statistics
from crisp_attention.experiment.results.record import Record, Score
from crisp_attention.experiment.results.store import Store
from crisp_attention.experiment.specification.runs import PlannedRun
from crisp_attention.experiment.specification.spec import ExperimentSpec
from crisp_attention.experiment.statistics import Array

_WORD, _WHOLE, _NUMBER, _YES = pa.string(), pa.int64(), pa.float64(), pa.bool_()

RUN_COLUMNS: dict[str, Any] = {
    "study": _WORD,
    "run_id": _WORD,
    "arm": _WORD,
    "condition": _WORD,
    "seed_index": _WHOLE,
    "seed": _WHOLE,
    "status": _WORD,
    "reason": _WORD,
    "rule": _WORD,
    "requested_sparsity": _NUMBER,
    "train_realised_sparsity": _NUMBER,
    "test_realised_sparsity": _NUMBER,
    "entropy": _NUMBER,
    "epochs": _WHOLE,
    "running_loss": _NUMBER,
    **{
        f"{name}_{what}": kind
        for name in ("train", "test")
        for what, kind in (("examples", _WHOLE), ("correct", _WHOLE), ("accuracy", _NUMBER), ("loss", _NUMBER))
    },
    "test_brier": _NUMBER,
    "test_ece": _NUMBER,
    "parameters": _WHOLE,
    "started": _WORD,
    "seconds": _NUMBER,
    "train_seconds": _NUMBER,
    "train_examples_per_second": _NUMBER,
    "resumed": _WHOLE,
    "attention": _WORD,
    "attention_in_evaluation": _WORD,
    "training": _WORD,
    "model": _WORD,
    "data": _WORD,
    "weights_fingerprint": _WORD,
    "data_fingerprint": _WORD,
    "device": _WORD,
    "threads": _WHOLE,
    "system": _WORD,
    "machine": _WORD,
    "python": _WORD,
    "git_commit": _WORD,
    "git_dirty": _YES,
}
"""Columns of the table of runs that every study has; `_run_columns` adds those of its evaluations and packages."""

PREDICTION_COLUMNS: dict[str, Any] = {
    "run_id": _WORD,
    "arm": _WORD,
    "condition": _WORD,
    "seed_index": _WHOLE,
    "seed": _WHOLE,
    "evaluation": _WORD,
    "example": _WHOLE,
    "tokens": _WHOLE,
    "label": _WHOLE,
    "label_name": _WORD,
    "predicted": _WHOLE,
    "predicted_name": _WORD,
    "correct": _YES,
    "probability": _NUMBER,
    "label_probability": _NUMBER,
    "loss": _NUMBER,
}
"""Columns of the table of predictions; `logit_K` and `probability_K` of each class K follow."""


class Tables:
    """The runs and predictions of a study.

    Args:
        store: Its run directory.

    Raises:
        RecordError: If the directory or a record in it is damaged.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self.spec: ExperimentSpec
        self.runs: list[PlannedRun]
        self.spec, self.runs, _ = store.study()
        self.records = store.load_all(self.runs)

    def rows(self) -> Iterator[dict[str, Any]]:
        """One row a run that was asked for, done or not; None where something is not known.

        Raises:
            RecordError: If outputs of a run are missing or damaged.
        """
        for run in self.runs:
            record = self.records.get(run.config.run_id)
            yield _planned(self.spec, run) | ({"status": "missing"} if record is None else self._done(record))

    def runs_table(self) -> Any:
        """All rows as a `pyarrow.Table`."""
        rows = list(self.rows())
        columns = self._run_columns()
        return pa.table(
            {name: pa.array([row.get(name) for row in rows], kind) for name, kind in columns.items()},
        )

    def prediction_schema(self) -> Any:
        """The `pyarrow.Schema` of `predictions`."""
        classes = range(len(next((record.classes for record in self._finished()), ())))
        return pa.schema(
            [
                *PREDICTION_COLUMNS.items(),
                *((f"logit_{number}", pa.float32()) for number in classes),
                *((f"probability_{number}", _NUMBER) for number in classes),
            ]
        )

    def predictions(self) -> Iterator[Any]:
        """One `pyarrow.Table` a finished run and evaluation, a row an example.

        Raises:
            RecordError: If outputs of a run are missing or damaged.
        """
        schema = self.prediction_schema()
        for run in self.runs:
            record = self.records.get(run.config.run_id)
            if record is None or record.status != "finished":
                continue
            arrays = self._store.load_arrays(record)
            for name in ("test", "train", *record.evaluations):
                columns = _predictions(record, name, arrays)
                rows = len(columns["label"])
                own = {key: value for key, value in _planned(self.spec, run).items() if key in PREDICTION_COLUMNS}
                own["evaluation"] = name
                yield pa.table(
                    [
                        pa.array(columns[field.name], field.type)
                        if field.name in columns
                        else pa.array([own.get(field.name)] * rows, field.type)
                        for field in schema
                    ],
                    schema=schema,
                )

    def _finished(self) -> Iterator[Record]:
        return (record for record in self.records.values() if record.status == "finished")

    def _run_columns(self) -> dict[str, Any]:
        packages = dict.fromkeys(name for record in self.records.values() for name in record.provenance.packages)
        return {
            **RUN_COLUMNS,
            **{
                f"{item.name}_{what}": kind
                for item in self.spec.evaluations
                for what, kind in (("examples", _WHOLE), ("correct", _WHOLE), ("accuracy", _NUMBER), ("loss", _NUMBER))
            },
            **{f"version_{name}": _WORD for name in packages},
        }

    def _done(self, record: Record) -> dict[str, Any]:
        origin, timing = record.provenance, record.timing
        row = {
            "status": record.status,
            "reason": record.reason,
            "epochs": record.final.epoch if record.epochs else 0,
            "entropy": _mean(record.entropy),
            "train_realised_sparsity": _mean(record.realised_sparsity.train),
            "test_realised_sparsity": _mean(record.realised_sparsity.test),
            "parameters": record.parameters,
            "resumed": record.resumed,
            **timing.model_dump(),
            **origin.model_dump(
                include={"model", "data", "weights_fingerprint", "data_fingerprint", "device", "threads"}
            ),
            **{name: origin.platform.get(name) for name in ("system", "machine", "python")},
            "git_commit": origin.git["commit"] if origin.git else None,
            "git_dirty": origin.git["dirty"] if origin.git else None,
            **{f"version_{name}": version for name, version in origin.packages.items()},
        }
        if record.status != "finished":
            return row
        arrays = self._store.load_arrays(record)
        logits, labels = arrays["test_logits"][None], arrays["test_labels"]
        correct = logits[0].argmax(axis=1) == labels
        row["test_brier"] = float(statistics.brier(logits, labels).mean())
        row["test_ece"] = float(statistics.calibration_error(statistics.confidence(logits)[0], correct))
        row["running_loss"] = record.final.running_loss
        for name, score in (("train", record.final.train), ("test", record.final.test), *record.evaluations.items()):
            row |= {f"{name}_{what}": value for what, value in _scored(score).items()}
        return row


def _planned(spec: ExperimentSpec, run: PlannedRun) -> dict[str, Any]:
    """What is known of a run before it is done."""
    config = run.config
    return {
        "study": spec.name,
        "run_id": config.run_id,
        "arm": run.arm,
        "condition": run.condition or None,
        "seed_index": run.index,
        "seed": config.seed,
        "rule": config.rule,
        "requested_sparsity": config.attention["sparsity"],
        "attention": json.dumps(config.attention, sort_keys=True),
        "attention_in_evaluation": json.dumps(config.evaluation, sort_keys=True) if config.evaluation else None,
        "training": json.dumps(config.training, sort_keys=True),
    }


def _scored(score: Score) -> dict[str, Any]:
    return {"examples": score.total, "correct": score.correct, "accuracy": score.accuracy, "loss": score.loss}


def _mean(by_layer: Mapping[str, float]) -> float | None:
    return fmean(by_layer.values()) if by_layer else None


def _predictions(record: Record, evaluation: str, arrays: Mapping[str, Array]) -> dict[str, Any]:
    """Columns of one run on one evaluation, but those that are the same in all rows."""
    logits, labels = arrays[f"{evaluation}_logits"], arrays[f"{evaluation}_labels"]
    shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    probabilities = np.exp(shifted) / np.exp(shifted).sum(axis=1, keepdims=True)
    predicted, rows = logits.argmax(axis=1), np.arange(len(labels))
    names = np.array(record.classes, dtype=object)
    columns = {
        "example": rows,
        "label": labels,
        "label_name": names[labels],
        "predicted": predicted,
        "predicted_name": names[predicted],
        "correct": predicted == labels,
        "probability": probabilities[rows, predicted],
        "label_probability": probabilities[rows, labels],
        "loss": statistics.nll(logits[None], labels)[0],
    }
    if f"{evaluation}_lengths" in arrays:
        columns["tokens"] = arrays[f"{evaluation}_lengths"]
    for number in range(logits.shape[1]):
        columns[f"logit_{number}"] = logits[:, number]
        columns[f"probability_{number}"] = probabilities[:, number]
    return columns
