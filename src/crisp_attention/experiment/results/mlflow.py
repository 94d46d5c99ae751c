"""Runs in MLflow that stand for our runs, found by a tag. Imports MLflow when it is called."""

from __future__ import annotations

import os
import re
from typing import Any

TAG = "crisp.run_id"
"""Tag of an MLflow run: the id of the run that it shows."""

DATABASE = "tracking/mlflow.sqlite3"
"""Where it is in a run directory, unless the user says otherwise."""

# What a user has set stands. MLflow reads whether it may send telemetry when it is imported. Left to itself it takes
# over four minutes to find that a server does not answer, at each request anew.
_SETTINGS = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
}


def settle() -> None:
    """Settle, before it is imported, that MLflow sends no telemetry and is not patient without end."""
    for name, value in _SETTINGS.items():
        os.environ.setdefault(name, value)


def shown(uri: str) -> str:
    """The address of a tracking store without its password."""
    return re.sub(r"(://[^/:@]*):[^/@]*@", r"\1:***@", uri)


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
