"""The whole way once: specification -> runs -> records -> analysis -> report."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from crisp_attention.experiment import data, execute, model, report
from crisp_attention.experiment.analysis import Analysis, analyse
from crisp_attention.experiment.runs import Fingerprints, PlannedRun, expand
from crisp_attention.experiment.spec import ExperimentSpec
from crisp_attention.experiment.store import Store
from crisp_attention.experiment.worker import Event, Task


@dataclass(frozen=True)
class Plan:
    """What is about to be done.

    Attributes:
        spec: The experiment.
        folder: The run directory.
        total: Runs of the whole experiment.
        pending: Runs still to do, each once.
        division: Workers and threads.
        train_examples, test_examples: Sizes of the splits.
    """

    spec: ExperimentSpec
    folder: Path
    total: int
    pending: tuple[Task, ...]
    division: execute.Division
    train_examples: int
    test_examples: int


class Display(Protocol):
    """Where progress is shown."""

    def announce(self, message: str) -> None:
        """Say what happens next."""

    def training(self, plan: Plan) -> AbstractContextManager[Callable[[PlannedRun | None, Event], None]]:
        """Show the runs of a plan while they are trained; yields the receiver of events."""


def run(
    spec: ExperimentSpec, folder: Path, display: Display, jobs: int | None = None, retry: bool = False
) -> tuple[Analysis, Path]:
    """Do what is not done yet of an experiment, and report on all of it.

    Everything that could be wrong with the specification, the model or the data is found before
    anything is written.

    Args:
        spec: The experiment.
        folder: The run directory, new or of the same experiment.
        display: Where progress is shown.
        jobs: Worker processes (default: one a core).
        retry: Do diverged and failed runs again.

    Returns:
        The analysis and the path of the HTML report.
    """
    store = Store(folder)
    checkpoint = model.resolve(spec.model, display.announce)
    found = data.load_experiment(spec, display.announce)
    prints = Fingerprints(checkpoint.fingerprint, *found.prints())
    planned = list(expand(spec, prints))
    store.require(spec, prints)
    done = store.load_all(planned)
    unique = {run.config.run_id: run for run in reversed(planned)}
    pending = [Task(run) for run_id, run in reversed(unique.items()) if run_id not in done]
    if retry:
        pending += [Task(unique[run_id], record) for run_id, record in done.items() if record.status != "finished"]
    division = execute.divide(jobs, len(pending))
    if pending:
        display.announce("Checking that every arm can be run on this model")
        from crisp_attention.experiment.workbench import preflight

        preflight(checkpoint, found, spec)
    store.open(spec, prints)
    if pending:
        plan = Plan(
            spec,
            folder,
            len(unique),
            tuple(pending),
            division,
            max(len(dataset.train) for dataset in found.conditions.values()),
            len(found.test),
        )
        with display.training(plan) as receive:
            execute.execute(pending, store, checkpoint, found, division, receive)
    return rebuild(folder)


def rebuild(folder: Path) -> tuple[Analysis, Path]:
    """Statistics, tables, plots and pages from the records alone; trains nothing.

    Returns:
        The analysis and the path of the HTML report.

    Raises:
        RecordError: If the directory or a record in it is damaged.
        StorageError: If the report cannot be written.
    """
    store = Store(folder)
    analysis = analyse(store)
    with store.writing():
        return analysis, report.write(analysis, folder)
