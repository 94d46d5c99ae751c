"""Processes that are killed, that meet each other, and disks that are full: no finished run is lost."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from collections import Counter, deque

import numpy as np
import pytest

import made_up_worker
from crisp_attention.errors import StorageError
from crisp_attention.experiment import study
from crisp_attention.experiment.execution import local, worker
from crisp_attention.experiment.execution.executor import Division
from crisp_attention.experiment.execution.worker import Event, Task
from crisp_attention.experiment.results import files, leases
from crisp_attention.experiment.results import records as records_module
from crisp_attention.experiment.results.store import Store
from crisp_attention.experiment.specification.resources import ResourcesSpec
from crisp_attention.experiment.training.journal import Progress
from record_builders import PRINTS, draws, fill, finished, make_spec, planned, troubled

pytestmark = pytest.mark.slow

RIGHT = np.arange(200) % 3 != 0


def scenario(name, folder, count):
    done = subprocess.run(
        [sys.executable, made_up_worker.__file__, name, str(folder), str(count)],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([*sys.path])},
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])  # workers print too


def test_processes_on_one_directory_never_do_the_same_run_twice(tmp_path):
    told = scenario("together", tmp_path, 4)
    assert told["failed"] == 0
    trained = Counter((tmp_path / made_up_worker.TRAINED).read_text().split())
    assert set(trained.values()) == {1}
    store = Store(tmp_path)
    _, runs, _ = store.study()
    assert trained.keys() == {run.config.run_id for run in runs}
    assert len(runs) == told["runs"]
    for record in store.load_all(runs).values():
        store.load_arrays(record)


def test_machines_do_each_run_once_without_locks_and_take_over_what_others_left(tmp_path):
    """One is killed, one suspended until all is done, which then has nothing to add."""
    told = scenario("apart", tmp_path, 3)
    assert told["failed"] == 0
    assert told["unchanged"]
    trained = Counter((tmp_path / made_up_worker.TRAINED).read_text().split())
    store = Store(tmp_path)
    _, runs, _ = store.study()
    assert set(store.load_all(runs)) == {run.config.run_id for run in runs}
    assert trained == Counter(run.config.run_id for run in runs) + Counter(told["interrupted"])
    assert len(told["interrupted"]) == 2


def test_sixty_kills_at_random_moments_lose_no_finished_run(tmp_path):
    told = scenario("killed", tmp_path, 60)
    assert told["kills"] >= 60
    assert told["records"] >= 60
    assert told["halves"]
    store = Store(tmp_path)
    store.open(make_spec(seeds=made_up_worker.SEEDS), PRINTS)
    assert not list(store.records.glob(".*"))
    # Each kill costs the run that was in training, no other.
    trained = Counter((tmp_path / made_up_worker.TRAINED).read_text().split())
    assert trained.total() <= told["records"] + told["kills"]


def test_what_killed_processes_left_is_swept_and_what_others_write_is_not(tmp_path):
    store = fill(tmp_path, make_spec(seeds=2), draws({}))
    done, alive = (planned(make_spec(seeds=2))["dense", index].config.run_id for index in (0, 1))
    (store.records / f"{alive}.json").unlink()
    for run_id in (done, alive):
        (store.records / f".{run_id}.npz.x1y2").write_bytes(b"half")
        (store.checkpoints(run_id) / "checkpoint-5").mkdir(parents=True)
    lock = Store(tmp_path).lock(alive)
    store.open(make_spec(seeds=2), PRINTS)
    assert [path.name for path in store.records.glob(".*")] == [f".{alive}.npz.x1y2"]
    assert not store.checkpoints(done).exists()
    lock.release()
    store.open(make_spec(seeds=2), PRINTS)
    assert not list(store.records.glob(".*"))
    assert store.checkpoints(alive).exists()  # to go on from


# Who does a run again


@pytest.fixture
def made_up(tmp_path, monkeypatch):
    """A store with one run, and a worker whose training is made up; `outcome` is what it returns or raises."""
    from crisp_attention.experiment.training import train

    store = Store(tmp_path / "out")
    store.open(make_spec(), PRINTS)
    run = planned(make_spec())["topk-50", 3]
    outcome = [finished(run, RIGHT)]

    def train_run(*arguments):
        if isinstance(outcome[0], Exception):
            raise outcome[0]
        return outcome[0]

    monkeypatch.setattr(train, "run", train_run)
    return store, run, outcome


@pytest.mark.parametrize("status", ["failed", "diverged"])
def test_trouble_stands_until_it_is_retried(made_up, status):
    store, run, _ = made_up
    record = troubled(run, status)
    store.save(record, None)
    event = worker._run(Task(run), store, None, [].append)
    assert (event.kind, event.reason) == (status, f"made to be {status}")
    event = worker._run(Task(run, record), store, None, [].append)
    assert event.kind == "finished"
    # Another process that had planned to retry it too finds that it was done.
    before = store.load(run.config.run_id)
    assert worker._run(Task(run, record), store, None, [].append).kind == "finished"
    assert store.load(run.config.run_id) == before


def test_checkpoints_go_when_the_record_is_there_and_not_before(made_up, monkeypatch):
    store, run, _ = made_up
    folder = store.checkpoints(run.config.run_id)
    (folder / "checkpoint-5").mkdir(parents=True)
    with monkeypatch.context() as patch:
        patch.setattr(records_module, "write_once", full)
        with pytest.raises(StorageError):
            worker._run(Task(run), store, None, [].append)
    assert folder.exists()
    assert worker._run(Task(run), store, None, [].append).kind == "finished"
    assert not folder.exists()


@pytest.mark.parametrize("moment", ["in training", "at the end"])
def test_a_run_that_was_taken_over_is_left_to_the_other(made_up, monkeypatch, moment):
    """This process was suspended; the other finishes first, or later."""
    from crisp_attention.experiment.training import train

    store, run, outcome = made_up
    taken = []

    def train_run(planned, bench, report, *_):
        report(Progress(1, 10, 0.5))
        file = next((store.folder / "leases" / run.config.run_id).glob("[0-9]*"))
        file.with_name("2").write_bytes(file.read_bytes())
        file.unlink()
        if moment == "in training":
            monkeypatch.setattr(leases, "_awake_or_not", lambda: 1e12)
            report(Progress(2, 10, 0.5))
            taken.append("went on")
        return outcome[0]

    monkeypatch.setattr(train, "run", train_run)
    assert worker._run(Task(run), store, None, [].append).kind == "elsewhere"
    assert not taken
    assert list(store.records.iterdir()) == []


# Disks


def full(*arguments):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/somewhere")


def test_an_error_of_the_disk_is_no_failure_of_the_run(made_up):
    store, run, outcome = made_up
    outcome[0] = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with pytest.raises(StorageError, match="No space left on device"):
        worker._run(Task(run), store, None, [].append)
    assert store.load(run.config.run_id) is None


class OneTask(list):
    """A parent that has one task and keeps what it is told."""

    send = list.append

    def __init__(self, task):
        super().__init__()
        self.tasks = [task, None]

    def recv(self):
        return self.tasks.pop(0)


@pytest.fixture
def serve(monkeypatch):
    """A worker's body in this process, without its signals, its log and its models."""
    from crisp_attention.experiment.training import workbench

    def serve(pipe, folder, log):
        with monkeypatch.context() as patch:
            for name in ("dup2", "_end_with_parent"):
                patch.setattr(local.os if name == "dup2" else local, name, lambda *_: None)
            patch.setattr(local.signal, "signal", lambda *_: None)
            patch.setattr(workbench, "Workbench", lambda *_: None)
            patch.setattr(sys, "stdout", sys.stdout)
            patch.setattr(sys, "stderr", sys.stderr)
            local.serve(pipe, folder, None, None, 1, log)

    return serve


def test_a_worker_that_cannot_write_says_so_and_its_study_ends(made_up, serve, monkeypatch):
    store, run, _ = made_up
    pipe = OneTask(Task(run))
    with monkeypatch.context() as patch:
        patch.setattr(records_module, "write_once", full)
        serve(pipe, store.folder, store.folder / "logs" / "worker.log")
    assert [event.kind for event in pipe] == ["ready", "unsaved"]
    assert "No space left on device. Finished runs in it are kept. Make room" in pipe[-1].reason
    assert pipe[-1].run_id == run.config.run_id

    pipe = OneTask(Task(run))
    serve(pipe, store.folder, store.folder / "absent" / "worker.log")
    assert [event.kind for event in pipe] == ["unsaved"]


def test_a_study_whose_directory_cannot_be_written_stops_at_once(tmp_path, monkeypatch):
    """No other run could be kept either: the error of the first ends the study, and its workers."""
    import multiprocessing

    store = Store(tmp_path)
    runs = list(planned(make_spec(seeds=1)).values())
    told, sent = [], []

    class Process:
        def terminate(self):
            sent.append("terminated")

        def join(self, timeout=None):
            sent.append("waited" if timeout is None else "waited a while")

        def kill(self):
            sent.append("killed")  # what swallowed the first signal

    ours, theirs = multiprocessing.Pipe()
    theirs.send(Event("ready"))
    theirs.send(Event("unsaved", runs[0].config.run_id, reason="the disk is full"))
    monkeypatch.setattr(local, "_start", lambda *_: local._Worker(Process(), ours))
    tasks = [Task(run) for run in runs]
    with pytest.raises(StorageError, match="the disk is full"):
        local.LocalExecutor(ResourcesSpec()).execute(
            deque(tasks), store, None, None, Division(1, 1), lambda run, event: told.append(event.kind)
        )
    assert told == ["ready", "unsaved"]
    assert sent == ["terminated", "waited a while", "killed", "waited"]
    assert theirs.recv() == tasks[0]
    assert not theirs.poll()


@pytest.mark.parametrize(
    ("number", "remedy"),
    [
        (errno.ENOSPC, "Make room on its disk"),
        (errno.EDQUOT, "Make room in your quota"),
        (errno.EROFS, "Make it writable"),
        (errno.EACCES, "Make it writable"),
        (errno.EIO, "See to its disk"),
    ],
)
def test_an_error_of_the_disk_says_what_happened_and_how_to_go_on(tmp_path, monkeypatch, number, remedy):
    store = Store(tmp_path / "out")
    store.open(make_spec(), PRINTS)
    run = planned(make_spec())["dense", 0]

    def fail(*arguments):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(files.os, "fsync", fail)
    with pytest.raises(StorageError) as caught:
        store.save(*finished(run, RIGHT))
    message = str(caught.value)
    for part in (str(store.folder), os.strerror(number), "Finished runs in it are kept", remedy, "same command again"):
        assert part in message
    assert list(store.records.iterdir()) == []


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 256 KiB of its own; yields a function that mounts it again with other options."""
    if os.geteuid() != 0 or shutil.which("mount") is None:
        pytest.skip("only root may mount a small tmpfs")
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", folder], capture_output=True, text=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"no tmpfs can be mounted here: {mounted.stderr.strip()}")

    def remount(options):
        subprocess.run(["mount", "-o", f"remount,{options}", folder], check=True)

    yield folder, remount
    subprocess.run(["umount", folder], check=True)


def test_a_full_disk_keeps_what_is_finished_and_goes_on_when_there_is_room(small_disk):
    folder, remount = small_disk
    spec = make_spec(seeds=60)
    store = Store(folder / "out")
    store.open(spec, PRINTS)
    saved = {}
    noise = np.random.default_rng(0).integers(0, 255, 3000, dtype=np.uint8)

    def save_all():
        for run in planned(spec).values():
            record, arrays = finished(run, RIGHT)
            store.save(record, arrays | {"maps": noise})
            saved[run.config.run_id] = (store.records / f"{run.config.run_id}.json").read_bytes()

    with pytest.raises(StorageError, match=r"No space left on device\. Finished runs in it are kept"):
        save_all()
    assert len(saved) > 10
    for run_id, content in saved.items():
        assert (store.records / f"{run_id}.json").read_bytes() == content
        store.load_arrays(store.load(run_id))
    run = next(run for run in planned(spec).values() if run.config.run_id not in saved)
    assert store.load(run.config.run_id) is None
    assert not list(store.records.glob(".*"))
    remount("size=4M")
    store.open(spec, PRINTS)
    store.save(*finished(run, RIGHT))
    assert store.load(run.config.run_id).status == "finished"


def test_a_read_only_directory_is_named_and_left_as_it_was(small_disk):
    folder, remount = small_disk
    store = fill(folder / "out", make_spec(seeds=2), draws({}))
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    remount("ro")
    for attempt in (
        lambda: store.open(make_spec(seeds=2), PRINTS),
        lambda: Store(folder / "new").open(make_spec(seeds=2), PRINTS),
        lambda: store.lock("new"),
        lambda: study.rebuild(store.folder),
    ):
        with pytest.raises(StorageError, match=r"Read-only file system\. Finished runs in it are kept\. Make it wr"):
            attempt()
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    remount("rw")
