"""What of an experiment is done, and what is to be done here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from crisp_attention.experiment.execution.worker import Task
from crisp_attention.experiment.results.record import Record
from crisp_attention.experiment.results.store import Store
from crisp_attention.experiment.specification.runs import Fingerprints, PlannedRun, expand
from crisp_attention.experiment.specification.shards import Shard
from crisp_attention.experiment.specification.spec import ExperimentSpec


class Workload(NamedTuple):
    """The part of a plan that changes when settings are found.

    Attributes:
        runs: All runs of the experiment, each once.
        records: Of those that are done, by run id.
        pending: What is to be done here.
        taken: Ids of the runs that are taken over from another run directory.
    """

    runs: tuple[PlannedRun, ...]
    records: Mapping[str, Record]
    pending: tuple[Task, ...]
    taken: tuple[str, ...]


def find(
    spec: ExperimentSpec,
    prints: Fingerprints,
    store: Store,
    source: Store | None,
    shard: Shard | None,
    retry: bool = False,
    keep: bool = False,
) -> Workload:
    """Compare an experiment with what its run directory has, and with what another one has of it.

    Args:
        spec: The experiment, with its settings found where they are searched.
        prints: Of model and data.
        store: The run directory.
        source: Another one, whose finished runs count as done.
        shard: The part of the runs that is to be done here (default: all).
        retry: Do diverged and failed runs again.
        keep: Keep the trained models of the first seed: what lacks its model is done again.
    """
    planned = list(expand(spec, prints))
    records = store.load_all(planned)
    found = {} if source is None else source.load_all([run for run in planned if run.config.run_id not in records])
    found = {run_id: record for run_id, record in found.items() if record.status == "finished"}
    records |= found
    runs = tuple({run.config.run_id: run for run in reversed(planned)}.values())[::-1]
    wanted = own(spec, planned, shard)
    here = [run for run in runs if run.config.run_id in wanted]
    report_to = spec.tracking.report_to
    kept = {run.config.run_id for run in here if keep and run.index == 0}

    def task(run: PlannedRun) -> Task:
        run_id = run.config.run_id
        return Task(run, records.get(run_id), report_to, keep=run_id in kept)

    # What lacks its record, or the model that was to be kept.
    pending = [
        task(run)
        for run in here
        if (run_id := run.config.run_id) not in records
        or (run_id in kept and records[run_id].status == "finished" and not store.model(run_id).exists())
    ]
    if retry:
        pending += [
            task(run)
            for run in here
            if (record := records.get(run.config.run_id)) is not None and record.status != "finished"
        ]
    return Workload(runs, records, tuple(pending), tuple(found))


def own(spec: ExperimentSpec, runs: Sequence[PlannedRun], shard: Shard | None) -> frozenset[str]:
    """The ids of the runs that are to be done here."""
    if shard is None:
        return frozenset(run.config.run_id for run in runs)
    return shard.own(runs, len(spec.arms) * len(spec.conditions()))
