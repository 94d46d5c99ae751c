"""Two gloo processes that train each run together, against one."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest

import crisp_attention as crisp
import launched_study
from crisp_attention.experiment.data import dataset
from crisp_attention.experiment.execution import distributed
from crisp_attention.experiment.execution.choice import choose
from crisp_attention.experiment.execution.executor import Division
from crisp_attention.experiment.results.provenance import launch
from crisp_attention.experiment.results.store import Store
from crisp_attention.experiment.specification.resources import ResourcesSpec
from crisp_attention.experiment.specification.spec import read
from crisp_attention.experiment.training import evaluation, model, train
from crisp_attention.experiment.training.workbench import Workbench
from launched_study import FAILS_AT, KILLED_AT, LONELY, UNEVEN

# What a launcher sets


@pytest.fixture
def rank_0_of_3(monkeypatch):
    for name, value in {"RANK": "0", "WORLD_SIZE": "3", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "3"}.items():
        monkeypatch.setenv(name, value)


def test_a_batch_that_cannot_be_shared_evenly_is_refused(rank_0_of_3):
    with pytest.raises(crisp.ConfigurationError, match=r"batch_size = 32 cannot be shared evenly by 3 processes"):
        distributed.require_share(32)
    distributed.require_share(33)


def test_without_a_launcher_nothing_is_asked(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setenv("WORLD_SIZE", "3")  # as some clusters set it for whatever they start
    distributed.require_share(32)
    with distributed.launched() as leads:
        assert leads


@pytest.fixture
def leading(rank_0_of_3, monkeypatch):
    """Rank 0 within `launched`, as if the others had come."""
    monkeypatch.setattr(distributed, "_team", types.SimpleNamespace(own=launch()))


def test_runs_side_by_side_and_processes_together_exclude_each_other(leading):
    with pytest.raises(crisp.ConfigurationError, match=r"--jobs 2 asks .* a launcher has started 3 processes"):
        choose("local", ResourcesSpec()).divide(2, 5, 5)


def test_a_cluster_and_processes_together_exclude_each_other(rank_0_of_3):
    with pytest.raises(crisp.ConfigurationError, match=r"--on ray has runs done elsewhere, but a launcher"):
        choose("ray", ResourcesSpec())


def test_a_study_that_every_process_would_do_is_refused(rank_0_of_3):
    with pytest.raises(crisp.ConfigurationError, match=r"each of which would do the whole study"):
        choose("local", ResourcesSpec()).divide(None, 5, 5)


@pytest.mark.parametrize("setting", [("ACCELERATE_MIXED_PRECISION", "bf16"), ("ACCELERATE_USE_FSDP", "true")])
def test_what_a_launcher_would_change_in_silence_is_refused(leading, monkeypatch, setting):
    monkeypatch.setenv(*setting)
    with pytest.raises(crisp.ConfigurationError, match="=".join(setting)):
        choose("local", ResourcesSpec()).divide(None, 5, 5)


def test_cores_are_shared_by_the_processes_of_this_machine(leading, monkeypatch):
    monkeypatch.setattr(distributed, "available_cores", lambda: 8)
    assert choose("local", ResourcesSpec()).divide(None, 5, 5) == Division(jobs=1, threads=2, processes=3)


# Two processes

TOML = """
name = "together"
model = "{model}"
seeds = 1

[primary]
arm = "scheduled"

[data]
source = "{data}"
test_examples = 24

[training]
epochs = 2
batch_size = 8
learning_rate = 2e-3
train_probe = 16
attention_dropout = 0.0
hidden_dropout = 0.0

[vary]
train_examples = [89, 91]

[[arms]]
name = "scheduled"
rule = "percentile"
sparsity = 0.8
schedule = {{ kind = "linear" }}

[[arms]]
name = "dropout"
training = {{ attention_dropout = 0.1, hidden_dropout = 0.1 }}

[[arms]]
name = "failing"
seed_offset = 7

[[arms]]
name = "diverging"
training = {{ learning_rate = 1e30 }}

[[arms]]
name = "dense"
"""


def free_ports(count):
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [str(one.getsockname()[1]) for one in sockets]
    for one in sockets:
        one.close()
    return ports


class Together:
    """What two processes left.

    Attributes:
        spec: The specification.
        folder: With the run directories.
        ranks: What each noted.
    """

    def __init__(self, folder, spec_file):
        self.folder, self.spec = folder, read(spec_file)
        shared = os.environ | {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
        shared |= {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
        script = str(Path(launched_study.__file__))
        command = [sys.executable, script, str(spec_file), str(folder), *free_ports(len(launched_study.CALLS))]
        processes = [
            subprocess.Popen(
                command,
                env=shared | {"RANK": rank, "LOCAL_RANK": rank},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
            )
            for rank in ("0", "1")
        ]
        try:
            said = [process.communicate(timeout=300)[0].decode() for process in processes]
        finally:
            for process in processes:
                process.kill()
        assert [process.returncode for process in processes] == [0, 0], "\n".join(said)
        self.said = said
        self.ranks = [json.loads((folder / f"rank-{rank}.json").read_text(encoding="utf-8")) for rank in (0, 1)]

    def store(self, name="out"):
        return Store(self.folder / name)

    def run(self, arm, condition=UNEVEN):
        _, runs, _ = self.store().study()
        return next(run for run in runs if (run.arm, run.condition) == (arm, condition))

    def record(self, arm, condition=UNEVEN, name="out"):
        return self.store(name).load(self.run(arm, condition).config.run_id)


@pytest.fixture(scope="module")
def together(tmp_path_factory, tiny_folders, csv_file):
    folder = tmp_path_factory.mktemp("together")
    spec_file = folder / "spec.toml"
    spec_file.write_text(TOML.format(model=tiny_folders["bert"], data=csv_file), encoding="utf-8")
    return Together(folder, spec_file)


@pytest.mark.slow
@pytest.mark.parametrize(("arm", "condition"), [("dense", UNEVEN), ("scheduled", LONELY)])
def test_without_dropout_two_processes_do_what_one_does(together, monkeypatch, arm, condition):
    """To rounding: parts of a batch of unequal size, or of none, weigh as their examples do."""
    monkeypatch.setattr(evaluation, "EVALUATION_BATCH", launched_study.EVALUATION_BATCH)
    data = dataset.load_experiment(together.spec, lambda _: None)
    checkpoint = model.resolve(together.spec.model)
    planned = together.run(arm, condition)
    record, outputs = train.run(planned, Workbench(checkpoint, data), lambda _: None)
    theirs = together.record(arm, condition)
    arrays = together.store().load_arrays(theirs)
    assert arrays.keys() == outputs.keys()
    for name in ("test_logits", "train_logits"):
        np.testing.assert_allclose(arrays[name], outputs[name], atol=2e-4)
    for name in ("test_labels", "test_lengths", "map_rows"):
        np.testing.assert_array_equal(arrays[name], outputs[name])
    for mine, other in zip(theirs.epochs, record.epochs, strict=True):
        assert mine.running_loss == pytest.approx(other.running_loss, abs=1e-4)
        assert mine.test.total == other.test.total == 24
    for mode in ("train", "test"):
        mine, other = (getattr(each.realised_sparsity, mode) for each in (theirs, record))
        assert mine == pytest.approx(other, abs=2e-3)
    assert theirs.entropy == pytest.approx(record.entropy, abs=1e-3)
    assert [(part.shortest, part.examples) for part in theirs.realised_by_length] == [
        (part.shortest, part.examples) for part in record.realised_by_length
    ]
    assert (theirs.provenance.processes, record.provenance.processes) == (2, 1)
    assert theirs.effective_batch_size == record.effective_batch_size == 8


@pytest.mark.slow
def test_a_schedule_stands_at_the_same_sparsity_on_every_rank(together):
    mine, other = (rank["steps"]["resumed scheduled"] for rank in together.ranks)
    assert mine == other
    assert [step for step, _ in mine] == list(range(1, 25))
    shares = [share for _, layers in mine for share in layers]
    assert shares[0] < shares[-1] == pytest.approx(0.8)


@pytest.mark.slow
def test_each_run_has_one_record_and_rank_0_alone_tells(together):
    names = {path.stem for path in together.store().records.glob("*.json")}
    assert names == {
        together.run(arm, condition).config.run_id for arm, condition in launched_study.CALLS["resumed"][1]
    }
    assert together.ranks[1]["events"] == []
    assert together.said[1] == ""
    ended = [event[1:3] for event in together.ranks[0]["events"] if event[0] == "resumed" and event[1]]
    assert ended == [
        ["scheduled", "finished"],
        ["dropout", "finished"],
        ["failing", "failed"],
        ["diverging", "diverged"],
        ["dense", "finished"],
    ]


@pytest.mark.slow
def test_a_run_that_fails_on_one_rank_ends_on_all_and_the_next_begins(together):
    record = together.record("failing")
    assert record.reason == "RankError: rank 1: ValueError: made to fail"
    assert record.provenance.processes == 2
    for rank in together.ranks:
        assert len(rank["steps"]["resumed failing"]) == FAILS_AT


@pytest.mark.slow
def test_a_run_that_diverges_stops_at_the_same_step_everywhere(together):
    assert "not finite at step" in together.record("diverging").reason
    mine, other = (len(rank["steps"]["resumed diverging"]) for rank in together.ranks)
    assert mine == other


@pytest.mark.slow
def test_killed_and_taken_up_again_it_ends_as_if_nothing_had_happened(together):
    """To the last bit, each rank's dropout included; which is another on each rank."""
    record, whole = together.record("dropout"), together.record("dropout", name="other")
    assert (record.resumed, whole.resumed) == (1, 0)
    different = {"timing", "resumed"}
    assert record.model_dump(exclude=different) == whole.model_dump(exclude=different)
    for rank in together.ranks:
        steps = {call: [step for step, _ in rank["steps"][f"{call} dropout"]] for call in launched_study.CALLS}
        assert steps["killed"] == list(range(1, KILLED_AT + 1))
        assert steps["resumed"] == list(range(KILLED_AT + 1, 25))
        assert rank["random"]["resumed dropout"] == rank["random"]["whole dropout"][KILLED_AT:]
    assert together.ranks[0]["random"]["whole dropout"] != together.ranks[1]["random"]["whole dropout"]
