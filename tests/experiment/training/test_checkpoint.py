from __future__ import annotations

import functools
import json
import math

import numpy as np
import pytest
import torch

import crisp_attention as crisp
import tiny_study
from crisp_attention.experiment.data import dataset
from crisp_attention.experiment.results import provenance
from crisp_attention.experiment.specification.runs import expand
from crisp_attention.experiment.training import checkpoint, model, train
from crisp_attention.experiment.training.checkpoint import Checkpoints
from crisp_attention.experiment.training.workbench import silence_training

pytestmark = pytest.mark.slow

RUN = "0123456789abcdef"
STEPS = 12
"""Of one epoch of the tiny study."""


class Killed(BaseException):
    """What ends a run at once, as a signal would."""


@pytest.fixture(scope="module")
def workplace(tiny_folders, csv_file):
    """Bench and first runs by arm."""
    spec = tiny_study.spec(tiny_folders["bert"], csv_file, seeds=1)
    checkpoint, loaded = model.resolve(spec.model), dataset.load(spec.data)
    silence_training()
    runs = {run.arm: run for run in expand(spec, tiny_study.prints_of(checkpoint, loaded))}
    return tiny_study.bench_of(checkpoint, loaded), runs


@pytest.fixture(scope="module")
def uninterrupted(workplace):
    """The record and outputs of an arm's run from its beginning to its end."""
    bench, runs = workplace
    return functools.cache(lambda arm: train.run(runs[arm], bench, lambda _: None))


def eager(folder, run_id, **arguments):
    """Checkpoints that are written whenever there is an occasion."""
    return Checkpoints(folder, run_id, **({"seconds": 0.0, "share": math.inf} | arguments))


def interrupted(monkeypatch, planned, bench, folder, step):
    """Train until the checkpoint at a step is complete, and end there."""
    original = Checkpoints.complete

    def complete(self, now, books):
        original(self, now, books)
        if now == step:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "complete", complete)
        with pytest.raises(Killed):
            train.run(planned, bench, lambda _: None, eager(folder, planned.config.run_id))
    assert [path.name for path in folder.glob("checkpoint-*")] == [f"checkpoint-{step}"]


@pytest.mark.parametrize(
    ("arm", "steps"),
    [("dense", [5, STEPS, STEPS + 1]), ("percentile-80", [STEPS - 1, STEPS + 4]), ("random-50-train", [5])],
    ids=["dense", "percentile", "random"],
)
def test_a_run_taken_up_again_ends_as_if_nothing_had_happened(
    workplace, uninterrupted, monkeypatch, tmp_path, arm, steps
):
    """To the last bit, wherever it was interrupted: within an epoch, between two, and more than once."""
    bench, runs = workplace
    planned = runs[arm]
    whole, whole_outputs = uninterrupted(arm)
    for step in steps:
        interrupted(monkeypatch, planned, bench, tmp_path, step)
    checkpoints = eager(tmp_path, planned.config.run_id)
    record, outputs = train.run(planned, bench, lambda _: None, checkpoints)
    assert record.resumed == len(steps)
    different = {"timing", "resumed"}
    assert record.model_dump(exclude=different) == whole.model_dump(exclude=different)
    assert outputs.keys() == whole_outputs.keys()
    for name, array in outputs.items():
        np.testing.assert_array_equal(array, whole_outputs[name], err_msg=name, strict=True)


def test_without_curves_a_run_ends_the_same_and_is_taken_up_again_the_same(
    workplace, uninterrupted, monkeypatch, tmp_path
):
    """Only the last epoch is evaluated; an evaluation between changes nothing of what comes after it."""
    bench, runs = workplace
    whole, whole_outputs = uninterrupted("percentile-80")
    planned = tiny_study.without_curves(runs["percentile-80"])
    for step in (5, STEPS):
        interrupted(monkeypatch, planned, bench, tmp_path, step)
    record, outputs = train.run(planned, bench, lambda _: None, eager(tmp_path, planned.config.run_id))
    assert record.epochs == whole.epochs[-1:]
    different = {"timing", "resumed", "epochs", "config", "run_id"}
    assert record.model_dump(exclude=different) == whole.model_dump(exclude=different)
    for name, array in outputs.items():
        np.testing.assert_array_equal(array, whole_outputs[name], err_msg=name, strict=True)


def test_saving_and_resuming_follow_the_schedule_of_sparsity(tiny_folders, csv_file, monkeypatch, tmp_path):
    """A stochastic schedule and weight decay: what depends on the step, and what on the optimizer's state."""
    plain = tiny_study.spec(tiny_folders["bert"], csv_file, seeds=1)
    attention = crisp.SparsityConfig(sparsity=0.6, schedule=crisp.Schedule("stochastic"))
    arms = (*plain.arms[:3], plain.arms[3].model_copy(update={"attention": attention}))
    spec = plain.model_copy(update={"arms": arms})
    checkpoint, loaded = model.resolve(spec.model), dataset.load(spec.data)
    bench = tiny_study.bench_of(checkpoint, loaded)
    planned = list(expand(spec, tiny_study.prints_of(checkpoint, loaded)))[-1]
    whole, whole_outputs = train.run(planned, bench, lambda _: None)
    interrupted(monkeypatch, planned, bench, tmp_path, STEPS + 3)
    record, outputs = train.run(planned, bench, lambda _: None, eager(tmp_path, planned.config.run_id))
    assert record.realised_sparsity == whole.realised_sparsity
    np.testing.assert_array_equal(outputs["test_logits"], whole_outputs["test_logits"])


# Without training


def saved(folder, step, run_id=RUN, **books):
    """A checkpoint as it lies on disk once the Trainer and the journal have written it."""
    own = folder / f"checkpoint-{step}"
    own.mkdir(parents=True)
    (own / "model.safetensors").write_bytes(b"weights %d" % step)
    Checkpoints(folder, run_id).complete(step, {"step": step, **books})
    return own


@pytest.fixture
def notes():
    return []


def test_the_newest_is_kept_and_taken_up(tmp_path, notes):
    for step in (5, 40, 120):
        saved(tmp_path, step, loss=(torch.tensor(0.1), 3))
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-120"]
    checkpoints = Checkpoints(tmp_path, RUN, notes.append)
    assert checkpoints.resumed == 0
    found = checkpoints.take_up()
    assert found.folder == tmp_path / "checkpoint-120"
    assert found.books == {"step": 120, "loss": (torch.tensor(0.1), 3)}
    assert Checkpoints(tmp_path, RUN).take_up().books["step"] == 120
    assert checkpoints.resumed == 2
    assert notes == []


def test_nothing_there_is_nothing_to_go_on_from(tmp_path, notes):
    folder = tmp_path / "absent"
    assert Checkpoints(folder, RUN, notes.append).take_up() is None
    assert not folder.exists()
    assert notes == []


def test_a_half_written_one_gives_way_to_the_one_before(tmp_path, notes):
    saved(tmp_path, 40)
    half = tmp_path / "checkpoint-120"
    half.mkdir()
    (half / "model.safetensors").write_bytes(b"wei")
    assert Checkpoints(tmp_path, RUN, notes.append).take_up().books["step"] == 40
    assert not half.exists()
    assert notes == []


def truncate(folder):
    (folder / "model.safetensors").write_bytes(b"wei")


def lose_a_file(folder):
    (folder / "model.safetensors").unlink()


def add_a_file(folder):
    (folder / "optimizer.pt").write_bytes(b"of another run")


def break_manifest(folder):
    (folder / "manifest.json").write_text('{"run_id": ')


def list_manifest(folder):
    (folder / "manifest.json").write_text("[]")


def of_another_run(folder):
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | {"run_id": "fedcba9876543210"}))


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (truncate, "damaged"),
        (lose_a_file, "damaged"),
        (add_a_file, "damaged"),
        (break_manifest, "damaged"),
        (list_manifest, "damaged"),
        (of_another_run, "it is of run fedcba9876543210"),
    ],
)
def test_a_damaged_or_foreign_one_is_discarded_with_a_note(tmp_path, notes, damage, reason):
    damage(saved(tmp_path / "run", 40))
    checkpoints = Checkpoints(tmp_path / "run", RUN, notes.append)
    assert checkpoints.take_up() is None
    assert checkpoints.resumed == 0
    assert not (tmp_path / "run").exists()
    (note,) = notes
    assert "step 40 was discarded" in note
    assert reason in note


def test_another_environment_is_no_place_to_go_on_in(tmp_path, notes, monkeypatch):
    saved(tmp_path, 40)
    monkeypatch.setattr(provenance, "packages", lambda: {"torch": "0.0"})
    assert Checkpoints(tmp_path, RUN, notes.append).take_up() is None
    assert "other package versions or another number of threads" in notes[0]


def test_a_damaged_one_starts_the_run_again_with_the_same_end(workplace, uninterrupted, monkeypatch, tmp_path, notes):
    bench, runs = workplace
    planned = runs["percentile-80"]
    interrupted(monkeypatch, planned, bench, tmp_path, 5)
    file = tmp_path / "checkpoint-5" / "optimizer.pt"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    again = Checkpoints(tmp_path, planned.config.run_id, notes.append)
    record, outputs = train.run(planned, bench, lambda _: None, again)
    assert record.resumed == 0
    assert "step 5 was discarded" in notes[0]
    np.testing.assert_array_equal(outputs["test_logits"], uninterrupted("percentile-80")[1]["test_logits"])


def test_saving_takes_no_more_than_its_share_of_the_time(tmp_path, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(checkpoint.time, "perf_counter", lambda: clock[0])
    checkpoints = Checkpoints(tmp_path, RUN, seconds=30.0, share=0.05)
    clock[0] = 29.0
    assert not checkpoints.due()
    clock[0] = 30.0
    assert checkpoints.due()
    (tmp_path / "checkpoint-7").mkdir()
    clock[0] = 34.0  # four seconds to save: not again before 80 have passed
    checkpoints.complete(7, {})
    clock[0] = 34.0 + 79.0
    assert not checkpoints.due()
    clock[0] = 34.0 + 80.0
    assert checkpoints.due()


@pytest.mark.parametrize("where", ["trainer", "books"])
def test_a_full_disk_ends_no_run(workplace, uninterrupted, monkeypatch, tmp_path, notes, where):
    """The checkpoint before it stays, and training goes on to the same result."""
    bench, runs = workplace
    planned = runs["dense"]
    calls = []

    def full(*arguments, **keywords):
        calls.append(arguments)
        raise OSError(28, "No space left on device")

    if where == "trainer":
        monkeypatch.setattr(train._PairedTrainer, "_save_optimizer_and_scheduler", full)
    else:
        monkeypatch.setattr(checkpoint, "_checksums", full)
    checkpoints = eager(tmp_path, planned.config.run_id, note=notes.append)
    record, outputs = train.run(planned, bench, lambda _: None, checkpoints)
    assert record.status == "finished"
    assert len(calls) == len(notes) > 5
    assert "No space left on device" in notes[0]
    assert not list(tmp_path.glob("checkpoint-*"))
    np.testing.assert_array_equal(outputs["test_logits"], uninterrupted("dense")[1]["test_logits"])
