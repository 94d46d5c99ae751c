from __future__ import annotations

import multiprocessing
from collections import deque

import pytest

import crisp_attention as crisp
import tiny_study
from crisp_attention.experiment.data import dataset
from crisp_attention.experiment.execution import execute, worker
from crisp_attention.experiment.execution.worker import Task
from crisp_attention.experiment.results.store import Store
from crisp_attention.experiment.specification.runs import expand
from crisp_attention.experiment.training import model


@pytest.mark.parametrize(
    ("cores", "jobs", "pending", "expected"),
    [(2, None, 12, (2, 1)), (8, None, 3, (3, 2)), (8, 2, 12, (2, 4)), (1, None, 5, (1, 1)), (4, None, 0, (1, 4))],
)
def test_cores_are_split_between_workers(monkeypatch, cores, jobs, pending, expected):
    monkeypatch.setattr(execute, "available_cores", lambda: cores)
    division = execute.divide(jobs, pending)
    assert (division.jobs, division.threads) == expected


@pytest.mark.parametrize("jobs", [0, -1, 3])
def test_more_workers_than_cores_are_refused(monkeypatch, jobs):
    monkeypatch.setattr(execute, "available_cores", lambda: 2)
    with pytest.raises(crisp.ConfigurationError, match=f"between 1 and the 2 cores of this machine, got {jobs}"):
        execute.divide(jobs, 5)


@pytest.mark.slow
def test_a_worker_that_dies_takes_only_its_run_with_it(tmp_path, tiny_folders, csv_file):
    spec = tiny_study.spec(tiny_folders["bert"], csv_file, seeds=1)
    checkpoint, loaded = model.resolve(spec.model), dataset.load(spec.data)
    store = Store(tmp_path / "out")
    store.open(spec, tiny_study.prints_of(checkpoint, loaded))
    runs = list(expand(spec, tiny_study.prints_of(checkpoint, loaded)))[:2]
    events = []

    def receive(planned, event):
        if event.kind == "progress" and not any(kind == "failed" for kind, _ in events):
            for child in multiprocessing.active_children():
                child.kill()
        elif event.kind not in ("progress", "ready"):
            events.append((event.kind, event.run_id))
            if event.kind == "failed":
                assert "worker process died (exit code -9" in event.reason

    execute.execute(
        deque(map(Task, runs)),
        store,
        checkpoint,
        dataset.ExperimentData({"": loaded}),
        execute.Division(1, 1),
        receive,
    )
    failed = [run_id for kind, run_id in events if kind == "failed"]
    assert failed == [runs[0].config.run_id]
    assert [run_id for kind, run_id in events if kind == "finished"] == [runs[1].config.run_id]
    assert store.load(failed[0]) is None  # pending next time, not lost
    assert store.load(runs[1].config.run_id).status == "finished"


def test_a_worker_whose_parent_is_gone_records_no_failure(tmp_path, tiny_folders, csv_file):
    """Killed at any moment: what was being trained stays pending, and its lock is free again."""
    spec = tiny_study.spec(tiny_folders["bert"], csv_file, seeds=1)
    checkpoint, loaded = model.resolve(spec.model), dataset.load(spec.data)
    store = Store(tmp_path / "out")
    store.open(spec, tiny_study.prints_of(checkpoint, loaded))
    planned = next(iter(expand(spec, tiny_study.prints_of(checkpoint, loaded))))
    parent, orphan = multiprocessing.Pipe()
    parent.close()
    with pytest.raises(SystemExit):
        worker.train_task(Task(planned), store, tiny_study.bench_of(checkpoint, loaded), orphan)
    assert store.load(planned.config.run_id) is None
    lock = store.lock(planned.config.run_id)
    assert lock is not None
    lock.release()
