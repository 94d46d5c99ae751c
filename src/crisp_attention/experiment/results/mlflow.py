"""Runs in MLflow that stand for our runs, found by a tag. Imports MLflow when it is called."""

from __future__ import annotations

from typing import Any

TAG = "crisp.run_id"
"""Tag of an MLflow run: the id of the run that it shows."""

DATABASE = "tracking/mlflow.sqlite3"
"""Where it is in a run directory, unless the user says otherwise."""


def experiment_of(client: Any, name: str) -> str:
    """Id of the MLflow experiment of a name, which is created if need be.

    Args:
        client: `mlflow.MlflowClient`.
        name: What the study is called.
    """
    found = client.get_experiment_by_name(name)
    return str(client.create_experiment(name) if found is None else found.experiment_id)


def run_of(client: Any, experiment: str, run_id: str) -> str | None:
    """Id of the MLflow run that shows a run; None if there is none yet.

    Args:
        client: `mlflow.MlflowClient`.
        experiment: Id of the experiment.
        run_id: Of our run.
    """
    found = client.search_runs([experiment], f"tags.`{TAG}` = '{run_id}'", max_results=1)
    return str(found[0].info.run_id) if found else None
