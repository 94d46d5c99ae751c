"""The whole way once: specification -> runs -> records -> analysis -> report."""

from __future__ import annotations

import heapq
import statistics
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from crisp_attention.experiment import report
from crisp_attention.experiment.conclusions.analysis import Analysis, analyse
from crisp_attention.experiment.data import dataset
from crisp_attention.experiment.execution import execute
from crisp_attention.experiment.execution.worker import Event, Task
from crisp_attention.experiment.results.record import Record
from crisp_attention.experiment.results.store import Examples, Store
from crisp_attention.experiment.specification.runs import Fingerprints, PlannedRun, expand
from crisp_attention.experiment.specification.spec import ExperimentSpec
from crisp_attention.experiment.training import model

if TYPE_CHECKING:
    from crisp_attention.experiment.training.workbench import Workbench


Cell = tuple[str, str]
"""Name of an arm, name of a condition."""


@dataclass(frozen=True)
class Plan:
    """What is about to be done. Nothing is written yet.

    Attributes:
        spec: The experiment.
        folder: The run directory.
        checkpoint: The model.
        data: All data of the experiment.
        prints: Of both.
        records: What is there already, by run id.
        runs: All runs of the experiment, each once.
        pending: Those still to do.
        elsewhere: How many of these another process is training now.
        begun: How many of the others were interrupted and have a checkpoint.
        division: Workers and threads.
        seconds: What a run takes, by arm and condition; empty if nothing is pending, and without those
            that could not be timed.
        examples: The evaluation texts, to be kept; None if nothing is pending.
    """

    spec: ExperimentSpec
    folder: Path
    checkpoint: model.Checkpoint
    data: dataset.ExperimentData
    prints: Fingerprints
    records: Mapping[str, Record]
    runs: tuple[PlannedRun, ...]
    pending: tuple[Task, ...]
    elsewhere: int
    begun: int
    division: execute.Division
    seconds: Mapping[Cell, float]
    examples: Examples | None

    @property
    def remaining(self) -> float | None:
        """Seconds until all is done, the workers sharing the runs in order; None if nobody can tell."""
        if not self.seconds:
            return None
        slowest = max(self.seconds.values())
        free = [0.0] * self.division.jobs
        for task in self.pending:
            heapq.heapreplace(free, free[0] + self.seconds.get((task.run.arm, task.run.condition), slowest))
        return max(free)


class Display(Protocol):
    """Where progress is shown."""

    def announce(self, message: str) -> None:
        """Say what happens next."""

    def training(self, plan: Plan) -> AbstractContextManager[Callable[[PlannedRun | None, Event], None]]:
        """Show the runs of a plan while they are trained; yields the receiver of events."""


def prepare(spec: ExperimentSpec, folder: Path, display: Display, jobs: int | None = None, retry: bool = False) -> Plan:
    """Find out what is to be done, and everything that could be wrong with it; writes nothing.

    Args:
        spec: The experiment.
        folder: The run directory, new or of the same experiment.
        display: Where progress is shown.
        jobs: Worker processes (default: one a core).
        retry: Do diverged and failed runs again.

    Raises:
        CrispError: If the specification, the model, the data or the directory will not do.
    """
    store = Store(folder)
    checkpoint = model.resolve(spec.model, display.announce)
    found = dataset.load_experiment(spec, display.announce)
    prints = Fingerprints(checkpoint.fingerprint, *found.prints())
    planned = list(expand(spec, prints))
    store.require(spec, prints)
    records = store.load_all(planned)
    runs = tuple({run.config.run_id: run for run in reversed(planned)}.values())[::-1]
    pending = [Task(run) for run in runs if run.config.run_id not in records]
    if retry:
        again = ((run, records.get(run.config.run_id)) for run in runs)
        pending += [Task(run, record) for run, record in again if record is not None and record.status != "finished"]
    idle = [task.run.config.run_id for task in pending if not store.in_training(task.run.config.run_id)]
    begun = sum(store.checkpoints(run_id).exists() for run_id in idle)
    division = execute.divide(jobs, len(pending))
    seconds: dict[Cell, float] = {}
    examples = None
    if pending:
        display.announce("Checking that every arm can be run on this model, and how fast")
        from crisp_attention.experiment.training.workbench import Workbench, preflight

        preflight(checkpoint, found, spec)
        bench = Workbench(checkpoint, found)
        examples = bench.examples(spec.data.max_length)
        seconds = _expect(spec, pending, runs, records, division, bench)
    return Plan(
        spec=spec,
        folder=folder,
        checkpoint=checkpoint,
        data=found,
        prints=prints,
        records=records,
        runs=runs,
        pending=tuple(pending),
        elsewhere=len(pending) - len(idle),
        begun=begun,
        division=division,
        seconds=seconds,
        examples=examples,
    )


def carry_out(plan: Plan, display: Display) -> tuple[Analysis, Path]:
    """Do what is pending, and report on all of the experiment.

    Args:
        plan: What `prepare` found.
        display: Where progress is shown.

    Returns:
        The analysis and the path of the HTML report.

    Raises:
        StorageError: If the directory cannot be written; finished runs in it are kept.
    """
    store = Store(plan.folder)
    store.open(plan.spec, plan.prints)
    if plan.examples is not None:
        store.save_examples(plan.examples)
    if plan.pending:
        with display.training(plan) as receive:
            execute.execute(list(plan.pending), store, plan.checkpoint, plan.data, plan.division, receive)
    return rebuild(plan.folder)


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


def _expect(
    spec: ExperimentSpec,
    pending: Sequence[Task],
    runs: Sequence[PlannedRun],
    records: Mapping[str, Record],
    division: execute.Division,
    bench: Workbench,
) -> dict[Cell, float]:
    """Seconds a run: as long as finished ones took where there are any, timed where there are none."""
    taken: dict[Cell, list[float]] = {}
    for run in runs:
        record = records.get(run.config.run_id)
        if record is not None and record.status == "finished" and record.provenance.threads == division.threads:
            taken.setdefault((run.arm, run.condition), []).append(record.timing.seconds)
    unknown = {(task.run.arm, task.run.condition): task.run for task in pending}
    unknown = {cell: run for cell, run in unknown.items() if cell not in taken}
    known = {cell: statistics.fmean(seconds) for cell, seconds in taken.items()}
    if not unknown:
        return known
    from crisp_attention.experiment.training import timing

    in_turn = sorted(unknown.values(), key=lambda run: run.arm != spec.primary.baseline)
    return known | timing.expect(bench, in_turn, division.threads)
