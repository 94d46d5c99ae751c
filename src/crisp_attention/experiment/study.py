"""The whole way once: specification -> runs -> records -> analysis -> report."""

from __future__ import annotations

import dataclasses
import os
import statistics
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from crisp_attention.experiment import report, workload
from crisp_attention.experiment.conclusions.analysis import Analysis, analyse
from crisp_attention.experiment.data import dataset
from crisp_attention.experiment.execution import distributed, tuning
from crisp_attention.experiment.execution.choice import choose
from crisp_attention.experiment.execution.executor import Division, Executor
from crisp_attention.experiment.execution.tuning import TuningPlan
from crisp_attention.experiment.execution.worker import Event, Task
from crisp_attention.experiment.outline import outline
from crisp_attention.experiment.outlook import makespan
from crisp_attention.experiment.results.examples import Examples
from crisp_attention.experiment.results.record import Record
from crisp_attention.experiment.results.store import Store
from crisp_attention.experiment.results.tuning import Tuning
from crisp_attention.experiment.specification.runs import Fingerprints, PlannedRun, expand
from crisp_attention.experiment.specification.shards import Shard
from crisp_attention.experiment.specification.spec import ExperimentSpec
from crisp_attention.experiment.specification.tuned import apply, probes
from crisp_attention.experiment.training import model
from crisp_attention.representation import bullets, card, paragraph, table

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
        runs: All runs of the experiment, each once; as they were asked for until `tuning` is done.
        pending: Those still to do, of the shard if there is one.
        elsewhere: How many of these another process is training now.
        begun: How many of the others were interrupted and have a checkpoint.
        division: Runs side by side, and threads.
        executor: Who does them.
        seconds: What a run takes, by arm and condition; empty if nothing is pending, and without those
            that could not be timed.
        examples: The evaluation texts, to be kept; None if nothing is pending.
        tuning: What is to be searched before the runs; None if nothing is.
        tuned: What was found; None if nothing is searched, or not found yet.
        shard: The part of the runs that is to be done here; None for all.
        keep: Whether the models of the first seed are kept.
        source: Another run directory, whose finished runs are taken over; None if there is none.
        taken: Ids of the runs that are taken over from there.
        cut: How many texts are longer than the limit, and what becomes of them; None if none is.
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
    division: Division
    executor: Executor
    seconds: Mapping[Cell, float]
    examples: Examples | None
    tuning: TuningPlan | None = None
    tuned: Tuning | None = None
    shard: Shard | None = None
    keep: bool = False
    source: Store | None = None
    taken: tuple[str, ...] = ()
    cut: str | None = None

    def __repr__(self) -> str:
        told = outline(self)
        return f"Plan of {told.name} in {self.folder}: {told.size} {told.todo}"

    def _repr_html_(self) -> str:
        told = outline(self)
        on = "" if told.done else f" Interrupting is safe: the same call goes on in {self.folder}."
        return card(
            f"Plan of {told.name}",
            paragraph(told.size),
            bullets(told.notes),
            table(told.arms.header, told.arms.rows, told.arms.prose),
            paragraph(f"{told.trouble}; retry=True does them again.") if told.trouble else "",
            bullets(told.tuning),
            paragraph(f"{told.todo}{on}"),
        )

    @property
    def remaining(self) -> float | None:
        """Seconds until all is done, the workers sharing the runs in order; None if nobody can tell."""
        cells = ((task.run.arm, task.run.condition) for task in self.pending)
        return self._shared(cells, self.division.jobs)

    @property
    def searching(self) -> float | None:
        """Seconds that the search will take if no trial is given up early; None if nobody can tell."""
        if self.tuning is None:
            return 0.0
        cells = [
            (arm, self.spec.primary_condition)
            for arm, done in self.tuning.done.items()
            for _ in range((self.tuning.trials - done) * self.tuning.seeds)
        ]
        seconds = self._shared(cells, self.tuning.division.jobs)
        return None if seconds is None else seconds * self._epochs_of_a_trial

    def seconds_a_training(self, arm: str) -> float | None:
        """What one training of a trial of an arm takes; None if nobody can tell."""
        seconds = self.seconds.get((arm, self.spec.primary_condition))
        return None if seconds is None else seconds * self._epochs_of_a_trial

    @property
    def _epochs_of_a_trial(self) -> float:
        """As a share of those of a run."""
        return self.spec.epochs_of_trials / self.spec.epochs_in(self.spec.primary_condition)

    def _shared(self, cells: Iterable[Cell], jobs: int) -> float | None:
        if not self.seconds:
            return None
        slowest = max(self.seconds.values())
        return makespan((self.seconds.get(cell, slowest) for cell in cells), jobs)


class Display(Protocol):
    """Where progress is shown."""

    def announce(self, message: str) -> None:
        """Say what happens next."""

    def present(self, plan: Plan) -> None:
        """Show what is about to be done."""

    def tuning(self, plan: Plan) -> AbstractContextManager[Callable[[PlannedRun | None, Event], None]]:
        """Show the trials of a plan while they are trained; yields the receiver of events."""

    def training(self, plan: Plan) -> AbstractContextManager[Callable[[PlannedRun | None, Event], None]]:
        """Show the runs of a plan while they are trained; yields the receiver of events."""


def directory(spec: ExperimentSpec, out: str | os.PathLike[str] | None) -> Path:
    """The run directory: the one asked for, or runs/NAME."""
    return Path("runs") / spec.name if out is None else Path(out)


def interrupted(folder: Path, again: str) -> str:
    """What to tell who interrupted a study.

    Args:
        folder: The run directory.
        again: What goes on with it, as "command".
    """
    if not Store(folder).begun:
        return f"Interrupted before anything was written: the same {again} begins anew."
    return f"Interrupted. Finished runs are kept in {folder}; the same {again} goes on from there."


def prepare(
    spec: ExperimentSpec,
    folder: Path,
    display: Display,
    jobs: int | None = None,
    retry: bool = False,
    *,
    executor: Executor | None = None,
    shard: Shard | None = None,
    storage: str | None = None,
    keep: bool = False,
    source: Path | None = None,
) -> Plan:
    """Find out what is to be done, and everything that could be wrong with it; writes nothing.

    Args:
        spec: The experiment.
        folder: The run directory, new or of the same experiment.
        display: Where progress is shown.
        jobs: Runs side by side (default: as many as there is place for).
        retry: Do diverged and failed runs again.
        executor: Who does them (default: worker processes on this machine).
        shard: The part of the runs that is to be done here (default: all).
        storage: URL of an Optuna storage for the search to share with other machines; None for one of its own.
        keep: Keep the trained models of the first seed.
        source: Another run directory, to take over its finished runs where they are runs of this experiment.

    Raises:
        CrispError: If the specification, the model, the data or the directory will not do.
    """
    executor = executor or choose("local", spec.resources)
    distributed.require_share(spec.training.batch_size)
    store, other = Store(folder), None if source is None else Store(source)
    if other is not None:
        other.identity()  # a mistyped folder is told
    if spec.tracking.report_to:
        from crisp_attention.experiment.training import tracking

        tracking.require(spec.tracking.report_to)
    checkpoint = model.resolve(spec.model, display.announce)
    found = dataset.load_experiment(spec, display.announce)
    prints = Fingerprints(checkpoint.fingerprint, *found.prints())
    store.require(spec, prints)
    tuned = store.tuning(spec)
    if tuned is None and other is not None and other.holds(spec, prints):
        # Searched anew, when results can be seen, it would be another choice.
        tuned = other.tuning(spec, "Give that number of trials, or leave out --from.")
    search = None
    if spec.tune is not None and tuned is None:
        carved = dataset.carve(found.conditions[spec.primary_condition], spec.tune.share)
        search = tuning.plan(spec, store, checkpoint, carved, jobs, executor, storage)
    final = spec if tuned is None else apply(spec, tuned.values)
    work = workload.find(final, prints, store, other, shard, retry, keep)
    if search is not None:
        # What arms are asked for may be the same until each has its own values.
        runs = tuple(expand(spec, prints))
        own = workload.own(spec, runs, shard)
        pending = tuple(Task(run, keep=keep and run.index == 0) for run in runs if run.config.run_id in own)
        work = work._replace(runs=runs, pending=pending)
    idle = [task.run.config.run_id for task in work.pending if not store.in_training(task.run.config.run_id)]
    begun = sum(map(store.has_checkpoint, idle))
    division = executor.divide(jobs, len(work.pending), len(workload.own(spec, work.runs, shard)))
    seconds: dict[Cell, float] = {}
    examples, cut = None, None
    if work.pending:
        display.announce("Checking that every arm can be run on this model, and how fast")
        from crisp_attention.experiment.training.workbench import Workbench, preflight, quiet_training

        with quiet_training():
            for probe in probes(spec) if tuned is None else (final,):
                preflight(checkpoint, found, probe)
            bench = Workbench(checkpoint, found)
            examples = bench.examples(spec.data.max_length)
            cut = _cut(bench, spec.data.max_length)
            seconds = _expect(spec, work.pending, work.runs, work.records, division, bench)
    return Plan(
        **work._asdict(),
        spec=spec,
        folder=folder,
        checkpoint=checkpoint,
        data=found,
        prints=prints,
        elsewhere=len(work.pending) - len(idle),
        begun=begun,
        division=division,
        executor=executor,
        seconds=seconds,
        examples=examples,
        tuning=search,
        tuned=tuned,
        shard=shard,
        keep=keep,
        source=other,
        cut=cut,
    )


def _cut(bench: Workbench, most: int) -> str | None:
    """How many texts of an experiment are longer than the limit, in a sentence; None if none is."""
    train = max((dataset.train for dataset in bench.data.conditions.values()), key=len)
    cut = sum(bench.cut(split, most) for split in (train, bench.data.test))
    if not cut:
        return None
    return f"{cut} of {len(train) + len(bench.data.test)} texts are longer than {most} tokens: their ends are cut off."


def carry_out(plan: Plan, display: Display) -> tuple[Analysis, Path]:
    """Do what is pending, and report on all of the experiment.

    Args:
        plan: What `prepare` found.
        display: Where progress is shown.

    Returns:
        The analysis and the path of the HTML report.

    Raises:
        CrispError: If a trial of the search fails, or all trials of an arm diverge.
        StorageError: If the directory cannot be written; finished runs in it are kept.
    """
    store = Store(plan.folder)
    store.open(plan.spec, plan.prints, plan.source)
    if plan.examples is not None:
        store.save_examples(plan.examples)
    if plan.tuning is not None:
        plan = _tune(plan, plan.tuning, store, display)
    if plan.source is not None:
        foreign = not plan.source.holds(plan.spec, plan.prints)
        for run_id in plan.taken:
            lease = store.lock(run_id)
            if lease is not None:  # else another process is taking it over, or training it
                if foreign:
                    store.note_taken_over([run_id], plan.source)
                store.take_over([run_id], plan.source)
                lease.release()
    while plan.pending:
        elsewhere = _train(plan, store, display)
        # Whoever was training these may have ended since, or be on a machine that is gone.
        free = store.abandoned(elsewhere, display.announce)
        free = {run_id for run_id in free if store.load(run_id) is None}
        plan = dataclasses.replace(
            plan, pending=tuple(task for task in plan.pending if task.run.config.run_id in free), elsewhere=0
        )
    return rebuild(plan.folder)


def _train(plan: Plan, store: Store, display: Display) -> set[str]:
    """Do what is pending; returns the ids of runs that other processes were training."""
    elsewhere = set()
    with display.training(plan) as receive:

        def note(run: PlannedRun | None, event: Event) -> None:
            if event.kind == "elsewhere":
                elsewhere.add(event.run_id)
            receive(run, event)

        plan.executor.execute(deque(plan.pending), store, plan.checkpoint, plan.data, plan.division, note)
    return elsewhere


def _tune(plan: Plan, search: TuningPlan, store: Store, display: Display) -> Plan:
    """Search first: the plan of the runs with what is found."""
    with display.tuning(plan) as receive:
        tuned = tuning.search(search, store, receive, display.announce)
    final = apply(plan.spec, tuned.values)
    work = workload.find(final, plan.prints, store, plan.source, plan.shard, keep=plan.keep)
    return dataclasses.replace(plan, **work._asdict(), tuning=None, tuned=tuned)


def unfinished(folder: Path, shard: Shard) -> int:
    """How many runs of a shard have no result: missing, diverged or failed.

    Args:
        folder: The run directory.
        shard: The part of its runs that counts.

    Raises:
        RecordError: If the directory or a record in it is damaged.
    """
    store = Store(folder)
    spec, runs, _ = store.study()
    own, records = workload.own(spec, runs, shard), store.load_all(runs)
    return len(own) - sum(records[run_id].status == "finished" for run_id in own & records.keys())


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
    division: Division,
    bench: Workbench,
) -> dict[Cell, float]:
    """Seconds a run: as long as finished ones took where there are any, timed where there are none."""
    taken: dict[Cell, list[float]] = {}
    for run in runs:
        record = records.get(run.config.run_id)
        if record is None or record.status != "finished":
            continue
        if (record.provenance.threads, record.provenance.processes) == (division.threads, division.processes):
            taken.setdefault((run.arm, run.condition), []).append(record.timing.seconds)
    unknown = {(task.run.arm, task.run.condition): task.run for task in pending}
    unknown = {cell: run for cell, run in unknown.items() if cell not in taken}
    known = {cell: statistics.fmean(seconds) for cell, seconds in taken.items()}
    if not unknown:
        return known
    from crisp_attention.experiment.training import timing

    in_turn = sorted(unknown.values(), key=lambda run: run.arm != spec.primary.baseline)
    timed = timing.expect(bench, in_turn, division.threads)
    # Each process has its part of all that takes time.
    return known | {cell: seconds / division.processes for cell, seconds in timed.items()}
