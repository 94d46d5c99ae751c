"""A cluster of two nodes on this machine: nodes and drivers that are killed, runs that raise. Each run ends once."""

from __future__ import annotations

import dataclasses
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter, deque

import pytest

import crisp_attention as crisp
import tiny_study
from crisp_attention.experiment.data import dataset
from crisp_attention.experiment.execution.choice import choose
from crisp_attention.experiment.execution.executor import Division
from crisp_attention.experiment.execution.worker import Task
from crisp_attention.experiment.results.store import Store
from crisp_attention.experiment.specification.resources import ResourcesSpec
from crisp_attention.experiment.specification.runs import expand
from crisp_attention.experiment.training import model

pytestmark = pytest.mark.slow

CHANGES = {"seeds": 1, "epochs": 12}
SMALL = {"num_cpus": 1, "object_store_memory": 80 * 2**20}
PATIENCE = 120


@pytest.fixture(scope="module")
def cluster():
    """A head and one more node, each with one core; RAY_ADDRESS names it."""
    # Short: paths of sockets are limited.
    folder = tempfile.mkdtemp(prefix="crisp-")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_TMPDIR", folder)
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        from ray.cluster_utils import Cluster

        started = Cluster(initialize_head=True, head_node_args=SMALL | {"include_dashboard": False})
        try:
            started.add_node(**SMALL)
            patch.setenv("RAY_ADDRESS", started.address)
            yield started
        finally:
            started.shutdown()
            shutil.rmtree(folder, ignore_errors=True)


@dataclasses.dataclass
class Experiment:
    """What a study needs, and the records that the local executor leaves of it."""

    spec: object
    checkpoint: object
    data: object
    runs: list
    results: dict


@pytest.fixture(scope="module")
def experiment(tiny_folders, csv_file, tmp_path_factory):
    spec = tiny_study.spec(tiny_folders["bert"], csv_file, **CHANGES)
    checkpoint, loaded = model.resolve(spec.model), dataset.load(spec.data)
    prints = tiny_study.prints_of(checkpoint, loaded)
    runs = list(expand(spec, prints))
    found = Experiment(spec, checkpoint, dataset.ExperimentData({"": loaded}), runs, {})
    store = opened(tmp_path_factory.mktemp("local") / "out", found)
    executor = choose("local", ResourcesSpec(cpus=1))
    executor.execute(deque(map(Task, runs)), store, checkpoint, found.data, Division(1, 1), lambda run, event: None)
    found.results.update(results(store, runs))
    assert len(found.results) == len(runs) == 4
    return found


def opened(folder, experiment):
    store = Store(folder)
    store.open(experiment.spec, tiny_study.prints_of(experiment.checkpoint, experiment.data.conditions[""]))
    return store


def results(store, runs):
    """Records, the checksums of their outputs among them, without what may differ between machines and hours."""
    apart = {"timing", "resumed", "provenance"}
    return {run_id: record.model_dump(exclude=apart) for run_id, record in store.load_all(runs).items()}


def test_a_node_that_is_killed_and_a_run_that_raises_change_no_result(cluster, experiment, tmp_path):
    store = opened(tmp_path / "out", experiment)
    first = experiment.runs[0]
    broken = dataclasses.replace(first, config=dataclasses.replace(first.config, attention={"rule": "no such"}))
    executor = choose("ray", ResourcesSpec(cpus=1))
    division = executor.divide(None, 5, 5)
    assert (division.jobs, division.threads, division.place) == (2, 1, "on Ray (2 nodes)")
    with pytest.raises(crisp.ConfigurationError, match=r"1 CPUs and 1 GPUs .* the most are 1 CPUs and 0 GPUs"):
        choose("ray", ResourcesSpec(gpus=1)).divide(None, 5, 5)
    ended, notes, under_way = [], [], set()

    def receive(run, event):
        if event.kind == "ready":
            return
        if event.kind == "progress":
            under_way.add(event.run_id)
            # One on each node; the head is not killed.
            if len(under_way) == 2 and len(cluster.worker_nodes) == 1:
                cluster.remove_node(next(iter(cluster.worker_nodes)), allow_graceful=False)
        elif event.kind == "note":
            notes.append(event.reason)
        else:
            under_way.discard(event.run_id)
            ended.append((event.run_id, event.kind))

    try:
        executor.execute(
            deque(map(Task, [broken, *experiment.runs])),
            store,
            experiment.checkpoint,
            experiment.data,
            division,
            receive,
        )
    finally:
        executor.close()
        cluster.add_node(**SMALL)
    assert any("its worker or node was lost" in note and "begun again" in note for note in notes)
    assert Counter(ended) == Counter(
        [(broken.config.run_id, "failed"), *((run.config.run_id, "finished") for run in experiment.runs)]
    )
    assert store.load(broken.config.run_id).reason.startswith("ConfigurationError: ")
    assert results(store, experiment.runs) == experiment.results
    assert any("Training run" in log.read_text(encoding="utf-8") for log in (store.folder / "logs").glob("ray-*.log"))


def test_a_driver_that_is_killed_leaves_its_runs_to_the_next(cluster, experiment, tmp_path, tiny_folders, csv_file):
    file, folder = tmp_path / "spec.toml", tmp_path / "out"
    file.write_text(tiny_study.toml(tiny_folders["bert"], csv_file, **CHANGES), encoding="utf-8")
    command = [sys.executable, "-m", "crisp_attention.cli", "run", file, "--on", "ray", "--out", folder]
    with (tmp_path / "printed").open("w") as printed:
        driver = subprocess.Popen(command, stdout=printed, stderr=printed)
    deadline = time.monotonic() + PATIENCE
    while not (before := {path: path.read_bytes() for path in folder.glob("records/[!.]*.json")}):
        assert driver.poll() is None, (tmp_path / "printed").read_text()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    store = Store(folder)
    # Its tasks end with it.
    while any(store.in_training(run.config.run_id) for run in experiment.runs):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert len(list(folder.glob("records/[!.]*.json"))) < len(experiment.runs)
    again = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | {"COLUMNS": "100"})
    assert again.returncode == 0, again.stderr
    assert "on Ray (2 nodes)" in " ".join(again.stdout.split())
    assert {path: path.read_bytes() for path in before} == before
    assert results(store, experiment.runs) == experiment.results
