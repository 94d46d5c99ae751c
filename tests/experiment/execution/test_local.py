from __future__ import annotations

import multiprocessing
import subprocess
import sys
from collections import deque

import pytest

import crisp_attention as crisp
import tiny_study
from crisp_attention.experiment.data import dataset
from crisp_attention.experiment.execution import local, worker
from crisp_attention.experiment.execution.executor import Division
from crisp_attention.experiment.execution.local import LocalExecutor
from crisp_attention.experiment.execution.worker import Task
from crisp_attention.experiment.results.store import Store
from crisp_attention.experiment.specification.resources import ResourcesSpec
from crisp_attention.experiment.specification.runs import expand
from crisp_attention.experiment.training import model


@pytest.mark.parametrize(
    ("cores", "jobs", "pending", "cpus", "expected"),
    [
        (2, None, 12, None, (2, 1)),
        (8, None, 3, None, (3, 2)),
        (8, 2, 12, None, (2, 4)),
        (1, None, 5, None, (1, 1)),
        (4, None, 0, None, (1, 4)),
        (8, None, 12, 3, (2, 3)),
        (8, 1, 12, 3, (1, 3)),
        (8, None, 1, 1, (1, 1)),
    ],
)
def test_cores_are_split_between_workers(monkeypatch, cores, jobs, pending, cpus, expected):
    monkeypatch.setattr(local, "available_cores", lambda: cores)
    division = LocalExecutor(ResourcesSpec(cpus=cpus)).divide(jobs, pending, pending)
    assert (division.jobs, division.threads) == expected


@pytest.mark.parametrize(("pending", "expected"), [(30, (8, 2)), (3, (3, 2)), (1, (1, 2)), (0, (1, 2))])
def test_what_is_left_of_a_study_has_the_threads_that_all_of_it_had(monkeypatch, pending, expected):
    """With others it would end in other bits, and leave its checkpoint behind."""
    monkeypatch.setattr(local, "available_cores", lambda: 16)
    division = LocalExecutor(ResourcesSpec()).divide(8, pending, 30)
    assert (division.jobs, division.threads) == expected


@pytest.mark.parametrize("jobs", [0, -1, 3])
def test_more_workers_than_cores_are_refused(monkeypatch, jobs):
    monkeypatch.setattr(local, "available_cores", lambda: 2)
    with pytest.raises(crisp.ConfigurationError, match=f"between 1 and 2, for the 2 cores of this machine; got {jobs}"):
        LocalExecutor(ResourcesSpec()).divide(jobs, 5, 5)


def test_runs_that_ask_for_more_than_the_machine_has_are_refused(monkeypatch):
    monkeypatch.setattr(local, "available_cores", lambda: 4)
    with pytest.raises(crisp.ConfigurationError, match=r"resources\.cpus = 5, but this machine has 4 cores"):
        LocalExecutor(ResourcesSpec(cpus=5)).divide(None, 5, 5)
    with pytest.raises(
        crisp.ConfigurationError, match="between 1 and 2, for the 4 cores of this machine, 2 a run; got 3"
    ):
        LocalExecutor(ResourcesSpec(cpus=2)).divide(3, 5, 5)


SCRIPT = """
import multiprocessing, sys
from crisp_attention.experiment.execution import local
print("the script begins", flush=True)
main = sys.modules["__main__"]
with local._without_main():
    child = multiprocessing.get_context("spawn").Process(target=print, args=("the child is done",), daemon=True)
    child.start()
child.join()
assert sys.modules["__main__"] is main
sys.exit(child.exitcode)
"""


@pytest.mark.parametrize("source", ["a file", "standard input"])
def test_a_worker_does_not_run_the_script_again_that_started_it(tmp_path, source):
    """Without an `if __name__ == "__main__"` in the script, and without a file of it, as in a notebook."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT, encoding="utf-8")
    with script.open(encoding="utf-8") as text:
        done = subprocess.run(
            [sys.executable, script if source == "a file" else "-"],
            stdin=text, capture_output=True, text=True, check=False, timeout=60,
        )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["the script begins", "the child is done"]


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

    LocalExecutor(ResourcesSpec()).execute(
        deque(map(Task, runs)),
        store,
        checkpoint,
        dataset.ExperimentData({"": loaded}),
        Division(1, 1),
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
        worker._run(
            Task(planned),
            store,
            tiny_study.bench_of(checkpoint, loaded),
            lambda event: worker.tell_or_leave(orphan.send, event),
        )
    assert store.load(planned.config.run_id) is None
    lock = store.lock(planned.config.run_id)
    assert lock is not None
    lock.release()
