"""Runs in the trackers that Transformers' Trainer reports to: TensorBoard, MLflow, W&B, Trackio and the like.

Each run is one run of a tracker, named by arm and seed. A tracker looks on: it cannot change what a run does,
draws nothing from its random streams, and a run whose tracker fails goes on without it.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import json
import os
import random
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import TrainerCallback, TrainingArguments
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

from crisp_attention.errors import ConfigurationError, nearest
from crisp_attention.experiment.results.leases import exclusively
from crisp_attention.experiment.results.mlflow import DATABASE, TAG, experiment_of, run_of, settle, shown
from crisp_attention.experiment.specification.runs import PlannedRun

_DATABASE_SECONDS = 60.0
# What ends a run of a tracker whose integration leaves it open, or was interrupted.
_ENDINGS = {"mlflow": "end_run", "swanlab": "finish", "trackio": "finish", "wandb": "finish"}


@dataclass(frozen=True)
class Tracking:
    """Where the runs of a study are shown.

    Attributes:
        report_to: Names of the Trainer's integrations.
        folder: The run directory; trackers that write files write them under `tracking/`, unless told otherwise by
            environment variables of theirs.
        note: Told, in a sentence, of a tracker that fails.
    """

    report_to: tuple[str, ...]
    folder: Path
    note: Callable[[str], None]

    @property
    def project(self) -> str:
        """What the study is called in trackers."""
        return self.folder.resolve().name

    def arguments(self, planned: PlannedRun) -> dict[str, Any]:
        """What the integrations read in `TrainingArguments`."""
        # Trackio would copy each run to the hub, if nobody says no.
        asked = {"run_name": planned.label, "project": self.project, "trackio_static_space_id": False}
        return {key: value for key, value in asked.items() if key in TrainingArguments.__dataclass_fields__}

    @contextlib.contextmanager
    def of(self, planned: PlannedRun) -> Iterator[list[Any]]:
        """The trackers as callbacks for the Trainer, and the environment that they read, during one run."""
        wanted = self._environment(planned)
        before = {name: os.environ.get(name) for name in wanted}
        os.environ.update(wanted)
        if "wandb" in self.report_to:
            _name_in_wandb(planned.config.run_id)
        try:
            yield [self._aside(name, planned) for name in dict.fromkeys(self.report_to)]
        finally:
            for name in self.report_to:
                ending = getattr(sys.modules.get(name), _ENDINGS.get(name, ""), None)
                if ending is not None:
                    with _undisturbed(), contextlib.suppress(Exception):
                        ending()
            if "wandb" in self.report_to:
                _name_in_wandb(None)
            for name, value in before.items():
                if value is None:
                    os.environ.pop(name, None)
                else:
                    os.environ[name] = value

    def _aside(self, name: str, planned: PlannedRun) -> _Aside:
        with _undisturbed():
            return _Aside(name, INTEGRATION_TO_CALLBACK[name](), params_of(planned), self.note)

    def _environment(self, planned: PlannedRun) -> dict[str, str]:
        run_id = planned.config.run_id
        place = self.folder.resolve() / "tracking"
        # What a user has set stands.
        wanted = {
            "TENSORBOARD_LOGGING_DIR": str(place / "tensorboard"),
            "MLFLOW_TRACKING_URI": f"sqlite:///{self.folder.resolve() / DATABASE}",
            "MLFLOW_EXPERIMENT_NAME": self.project,
            "WANDB_PROJECT": self.project,
            "WANDB_DIR": str(place),
            "TRACKIO_DIR": str(place / "trackio"),
        }
        wanted = {name: os.environ.get(name, value) for name, value in wanted.items()}
        wanted["TENSORBOARD_LOGGING_DIR"] = str(Path(wanted["TENSORBOARD_LOGGING_DIR"], f"{planned.label}, {run_id}"))
        # By these a run that is resumed goes on in the tracker's run that it began in.
        wanted |= {"WANDB_RUN_ID": run_id, "WANDB_RESUME": "allow", "MLFLOW_TAGS": json.dumps({TAG: run_id})}
        if "mlflow" in self.report_to:
            place.mkdir(parents=True, exist_ok=True)
            wanted |= self._mlflow(wanted["MLFLOW_TRACKING_URI"], wanted["MLFLOW_EXPERIMENT_NAME"], run_id)
        return wanted

    def _mlflow(self, uri: str, experiment: str, run_id: str) -> dict[str, str]:
        """What has MLflow go on in the run that it has already; empty if there is none."""
        settle()
        import mlflow

        # Only one process at a time may create the database or the experiment. What fails here fails in the
        # integration too, which tells.
        with (
            exclusively(self.folder / "tracking" / "mlflow.lock", _DATABASE_SECONDS),
            _undisturbed(),
            contextlib.suppress(mlflow.exceptions.MlflowException, OSError),
        ):
            client = mlflow.MlflowClient(uri)
            earlier = run_of(client, experiment_of(client, experiment), run_id)
            return {} if earlier is None else {"MLFLOW_RUN_ID": earlier}
        return {}


def require(report_to: tuple[str, ...]) -> None:
    """Make sure that trackers are there.

    Raises:
        ConfigurationError: If there is no integration of that name, what it needs is not installed, or the MLflow
            server that `MLFLOW_TRACKING_URI` names does not answer.
    """
    settle()
    for name in report_to:
        if name not in INTEGRATION_TO_CALLBACK:
            raise ConfigurationError(
                f"tracking.report_to: unknown tracker {name!r}. {nearest(name, sorted(INTEGRATION_TO_CALLBACK))}"
            )
        try:
            INTEGRATION_TO_CALLBACK[name]()
        except Exception as error:  # of whatever library is behind it
            raise ConfigurationError(f"tracking.report_to: {name} cannot be used: {error}") from None
    if "mlflow" in report_to and (uri := os.environ.get("MLFLOW_TRACKING_URI")):
        _require_server(uri)


def _require_server(uri: str) -> None:
    """Make sure that MLflow can be reached; files are left to the first run, for looking would create them."""
    import mlflow

    if "://" not in uri or uri.startswith(("sqlite:", "file:")):
        return
    try:
        mlflow.MlflowClient(uri).search_experiments(max_results=1)
    except Exception as error:  # of MLflow, or of the database or the network behind it
        reason = " ".join(str(error).replace(uri, shown(uri)).split())
        raise ConfigurationError(
            f"tracking.report_to: mlflow at {shown(uri)} (MLFLOW_TRACKING_URI) cannot be used: {reason}"
        ) from None


def _name_in_wandb(run_id: str | None) -> None:
    """Say which run comes next: W&B reads the environment once a process, which may train several."""
    # What fails here fails in the integration too, which tells.
    with _undisturbed(), contextlib.suppress(Exception):
        import wandb

        wandb.setup(wandb.Settings(run_id=run_id, resume="allow"))


def params_of(planned: PlannedRun) -> dict[str, Any]:
    """What describes a run in trackers, beside what the Trainer tells."""
    params = {
        "arm": planned.arm,
        "condition": planned.condition,
        "seed": planned.config.seed,
        "run_id": planned.config.run_id,
        "rule": planned.config.rule,
        "requested_sparsity": planned.config.attention["sparsity"],
    }
    return {key: value for key, value in params.items() if value not in (None, "")}


class _Aside:
    """A tracker's callback that looks on. What the Trainer asks of it is asked of the integration.

    Args:
        name: Of the tracker.
        callback: The integration.
        params: What describes the run.
        note: Told once if the tracker fails.
    """

    def __init__(
        self, name: str, callback: TrainerCallback, params: Mapping[str, Any], note: Callable[[str], None]
    ) -> None:
        self._name, self._callback, self._params, self._note = name, callback, params, note
        self._failed = False

    def __getattr__(self, name: str) -> Any:
        return functools.partial(self._tell, getattr(self._callback, name))

    def _tell(self, event: Any, args: Any, state: Any, control: Any, **keywords: Any) -> None:
        if self._failed:
            return
        model = keywords.get("model")
        try:
            with _undisturbed(), _described(model, self._params):
                event(args, copy.copy(state), copy.copy(control), **copy.copy(keywords))
        except Exception as error:
            self._failed = True
            self._note(
                f"The tracker {self._name} failed ({type(error).__name__}: {error}); the run goes on without it."
            )


@contextlib.contextmanager
def _described(model: Any, params: Mapping[str, Any]) -> Iterator[None]:
    """Have the model's configuration say more for a while: all integrations take their params from there."""
    config = getattr(model, "config", None)
    own = {} if config is None else {key: value for key, value in params.items() if not hasattr(config, key)}
    for key, value in own.items():
        setattr(config, key, value)
    try:
        yield
    finally:
        for key in own:
            delattr(config, key)


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """Leave the global random streams where they are."""
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002
    try:
        with torch.random.fork_rng():
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002
