"""The records of a study as runs in MLflow, each once however often it is exported."""

from __future__ import annotations

import hashlib
import importlib.util
import logging
import os
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from crisp_attention.errors import ConfigurationError, StorageError
from crisp_attention.experiment.export.tables import RUN_COLUMNS, Tables
from crisp_attention.experiment.results.mlflow import DATABASE, TAG, experiment_of, run_of, settle, shown
from crisp_attention.experiment.results.record import Record
from crisp_attention.experiment.results.store import Store
from crisp_attention.experiment.specification.runs import PlannedRun

_EXPORTED = "crisp.exported"
_PARAMS = (
    "arm", "condition", "seed", "seed_index", "run_id", "rule", "requested_sparsity", "attention",
    "attention_in_evaluation", "training", "model", "data", "weights_fingerprint", "data_fingerprint", "device",
    "threads",
)  # fmt: skip
_LONGEST = 6000
"""Characters of a param: MLflow takes no more."""


@dataclass(frozen=True)
class Exported:
    """What an export to MLflow has done.

    Attributes:
        uri: Of the tracking store, without a password.
        experiment: Name of the experiment there.
        new, known: Runs that were written now, and those that were there as they are.
    """

    uri: str
    experiment: str
    new: int
    known: int


def export(store: Store, uri: str | None) -> Exported:
    """Write one MLflow run a record, or complete the one that a tracker wrote while the run trained.

    Runs are known by the tag `crisp.run_id`. One whose record has changed since, as of a run that was done again, is
    replaced.

    Args:
        store: The run directory.
        uri: Of the tracking store; None for `MLFLOW_TRACKING_URI` or, if that is not set, a SQLite database in the
            run directory.

    Raises:
        ConfigurationError: If MLflow is not installed.
        RecordError: If the directory or a record in it is damaged.
        StorageError: If MLflow cannot be reached or written.
    """
    if importlib.util.find_spec("mlflow") is None:
        raise ConfigurationError(
            "Exporting to MLflow needs the package mlflow: pip install 'crisp-attention[mlflow]', or mlflow itself."
        )
    tables = Tables(store)
    rows = {row["run_id"]: row for row in tables.rows() if row["status"] != "missing"}
    runs = {run.config.run_id: run for run in tables.runs}
    settle()
    import mlflow

    # MLflow sets levels of its own when it is imported.
    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.ERROR)
    uri = uri or os.environ.get("MLFLOW_TRACKING_URI")
    name = os.environ.get("MLFLOW_EXPERIMENT_NAME", store.folder.resolve().name)
    try:
        if uri is None:
            path = store.folder.resolve() / DATABASE
            path.parent.mkdir(exist_ok=True)
            uri = f"sqlite:///{path}"
        client = mlflow.MlflowClient(uri)
        experiment = experiment_of(client, name)
        new = sum(_write(client, experiment, runs[run_id], row, tables.records[run_id]) for run_id, row in rows.items())
    except Exception as error:  # of MLflow, or of the database or the network behind it
        reason = " ".join(str(error).replace(str(uri), shown(str(uri))).split())
        raise StorageError(f"MLflow at {shown(str(uri))} cannot be written: {reason}") from error
    return Exported(shown(uri), name, new, len(rows) - new)


def _write(client: Any, experiment: str, run: PlannedRun, row: dict[str, Any], record: Record) -> bool:
    """Write a run, if it is not there as it is; says whether it was."""
    from mlflow.entities import Metric, Param, RunTag

    digest = hashlib.sha256(record.model_dump_json().encode()).hexdigest()[:16]
    began = int(datetime.fromisoformat(record.timing.started).timestamp() * 1000)
    own = run_of(client, experiment, record.run_id)
    if own is not None:
        exported = client.get_run(own).data.tags.get(_EXPORTED)
        if exported == digest:
            return False
        if exported is not None:
            client.delete_run(own)
            own = None
    if own is None:
        tags = {TAG: record.run_id}
        own = client.create_run(experiment, start_time=began, run_name=run.label, tags=tags).info.run_id
    found = client.get_run(own).data
    params = {key: row[key] for key in (*_PARAMS, *(key for key in row if key.startswith("version_")))}
    metrics = {
        key: value
        for key, value in row.items()
        if isinstance(value, int | float) and key not in params and RUN_COLUMNS.get(key) != RUN_COLUMNS["git_dirty"]
    }
    ended = began + int(record.timing.seconds * 1000)
    history = [] if "running_loss" in found.metrics else _history(record, ended)
    known = {metric.key for metric in history} | found.metrics.keys()
    final = [Metric(key, float(value), ended, 0) for key, value in metrics.items() if key not in known]
    told = [
        Param(key, str(value)[:_LONGEST])
        for key, value in params.items()
        if value is not None and key not in found.params
    ]
    for start in range(0, max(len(history) + len(final), 1), 1000):
        client.log_batch(own, metrics=[*history, *final][start : start + 1000])
    for start in range(0, len(told), 100):
        client.log_batch(own, params=told[start : start + 100])
    # Last, so that what was interrupted is done again.
    client.log_batch(own, tags=[RunTag("crisp.status", record.status), RunTag(_EXPORTED, digest)])
    client.set_terminated(own, "FINISHED" if record.status == "finished" else "FAILED", ended)
    return True


def _history(record: Record, time: int) -> list[Any]:
    """What a tracker would have been told after each epoch; the step is the epoch."""
    from mlflow.entities import Metric

    return [Metric(key, value, time, epoch.epoch) for epoch in record.epochs for key, value in epoch.metrics().items()]
