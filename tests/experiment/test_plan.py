"""What is to be done, found out and shown before anything is written."""

from __future__ import annotations

import dataclasses
import io
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

import tiny_study
from crisp_attention.errors import ConfigurationError
from crisp_attention.experiment import study
from crisp_attention.experiment.data import dataset
from crisp_attention.experiment.display import show_plan
from crisp_attention.experiment.execution.choice import choose
from crisp_attention.experiment.execution.executor import Division
from crisp_attention.experiment.execution.worker import Task
from crisp_attention.experiment.results.store import MANIFEST, Store
from crisp_attention.experiment.specification.runs import expand
from crisp_attention.experiment.specification.tracking import TrackingSpec
from crisp_attention.experiment.training import model, timing
from record_builders import finished, provenance, troubled

RIGHT = np.arange(24) % 3 != 0


class Silent:
    """A display that keeps what it was told."""

    def __init__(self):
        self.told = []

    def announce(self, message):
        self.told.append(message)


@pytest.fixture
def spec(tiny_folders, csv_file):
    return tiny_study.spec(tiny_folders["bert"], csv_file)


@pytest.fixture
def instant(monkeypatch):
    """No timing of real steps: a second an example, whatever the arm; yields the arms that were timed."""
    timed = []

    def pace(planned, bench):
        timed.append(planned.arm)
        return timing.Pace(1.0, 0.0)

    monkeypatch.setattr(timing, "_pace", pace)
    return timed


def shown(plan, width=100):
    output = io.StringIO()
    show_plan(Console(file=output, width=width), plan)
    return output.getvalue()


def test_a_new_experiment_is_all_to_do_and_nothing_is_written(spec, tmp_path, instant):
    plan = study.prepare(spec, tmp_path / "out", Silent(), jobs=1)
    assert not (tmp_path / "out").exists()
    assert len(plan.runs) == len(plan.pending) == 8
    assert instant == [arm.name for arm in spec.arms]  # each once, the baseline first
    assert plan.remaining == 8 * 2 * 96
    text = " ".join(shown(plan).split())  # where lines break depends on how long the folder's name is
    assert "4 arms x 2 seeds" in text
    assert "96 training and 24 test examples, 2 epochs" in text
    for row in ("dense-other-seeds dense seed_offset=100 0/2 2 192 s", "percentile-80 percentile sparsity=0.8 0/2 2"):
        assert row.replace("192 s", "3 min") in text
    assert "8 runs to do, one after another" in text
    assert "about 26 min" in text
    assert "Ctrl-C is safe" in text
    noted = {"": dataclasses.replace(plan.data.conditions[""], notes=("Three rows were dropped.",))}
    noted = dataclasses.replace(plan, data=dataclasses.replace(plan.data, conditions=noted))
    assert "Three rows were dropped." in shown(noted)


def test_what_is_done_tells_how_long_the_rest_takes(spec, tmp_path, instant):
    folder = tmp_path / "out"
    checkpoint, loaded = model.resolve(spec.model), dataset.load(spec.data)
    prints = tiny_study.prints_of(checkpoint, loaded)
    store = Store(folder)
    store.open(spec, prints)
    threads = choose("local", spec.resources).divide(1, 8, 8).threads
    for run in expand(spec, prints):
        if run.index == 0 and run.arm != "percentile-80":
            store.save(*finished(run, RIGHT, provenance=provenance(threads=threads)))
        elif run.index == 0:
            store.save(troubled(run, "failed"), None)
    plan = study.prepare(spec, folder, Silent(), jobs=1)
    assert [task.before for task in plan.pending] == [None] * 4
    assert instant == ["percentile-80"]  # nobody knows how long that takes
    assert plan.remaining == pytest.approx(3 * 12.3 + 192)
    text = " ".join(shown(plan).split())
    assert "dense dense 1/2 0 1 12 s" in text
    assert "percentile-80 percentile sparsity=0.8 0/2 1 1 3 min" in text
    assert "1 run diverged or failed; --retry does them again" in text

    for pending in plan.pending[:2]:  # the second was killed while it was writing its first
        (store.checkpoints(pending.run.config.run_id) / "checkpoint-5").mkdir(parents=True)
    (store.checkpoints(plan.pending[0].run.config.run_id) / "checkpoint-5" / MANIFEST).touch()
    begun = study.prepare(spec, folder, Silent(), jobs=1)
    assert "4 runs to do (1 begun: from the last checkpoint), one after another" in " ".join(shown(begun).split())
    lock = store.lock(plan.pending[0].run.config.run_id)  # as of the process that trains it
    busy = study.prepare(spec, folder, Silent(), jobs=1)
    assert "4 runs to do (1 in training in another process), one after another" in " ".join(shown(busy).split())
    lock.release()
    again = study.prepare(spec, folder, Silent(), jobs=1, retry=True)
    assert [task.before is not None for task in again.pending] == [False] * 4 + [True]
    assert "--retry" not in shown(again)


def test_trackers_are_asked_for_before_anything_is_done_and_each_task_names_them(spec, tmp_path, instant):
    tracked = spec.model_copy(update={"tracking": TrackingSpec(report_to=("tensorboard",))})
    plan = study.prepare(tracked, tmp_path / "out", Silent(), jobs=1)
    assert {task.report_to for task in plan.pending} == {("tensorboard",)}
    unknown = spec.model_copy(update={"tracking": TrackingSpec(report_to=("tensorbord",))})
    with pytest.raises(ConfigurationError, match="unknown tracker 'tensorbord'"):
        study.prepare(unknown, tmp_path / "out", Silent(), jobs=1)
    assert not (tmp_path / "out").exists()


def test_nothing_to_do_needs_neither_model_nor_time(spec, tmp_path, instant, monkeypatch):
    checkpoint, loaded = model.resolve(spec.model), dataset.load(spec.data)
    prints = tiny_study.prints_of(checkpoint, loaded)
    store = Store(tmp_path)
    store.open(spec, prints)
    for run in expand(spec, prints):
        store.save(*finished(run, RIGHT))
    from crisp_attention.experiment.training import workbench

    monkeypatch.setattr(workbench, "preflight", lambda *_: pytest.fail("looked at the model"))
    plan = study.prepare(spec, tmp_path, Silent())
    assert plan.pending == ()
    assert plan.examples is None
    assert "All of 8 runs are done" in " ".join(shown(plan).split())
    assert "a run" not in shown(plan).splitlines()[-1]


def test_workers_share_the_runs_in_order(spec, tmp_path, instant):
    plan = study.prepare(spec, tmp_path / "out", Silent(), jobs=1)
    seconds = {(arm.name, ""): 10.0 * (number + 1) for number, arm in enumerate(spec.arms)}
    two = dataclasses.replace(plan, seconds=seconds, division=Division(2, 1))
    # 10 20 30 40 10 20 30 40: one worker does 10, 30, 10, 20, 40 (110), the other 20, 40, 30 (90).
    assert two.remaining == 110
    assert dataclasses.replace(two, seconds={}).remaining is None
    assert "nobody knows how long" in " ".join(shown(dataclasses.replace(two, seconds={})).split())
    # An arm that could not be timed is taken to be as slow as the slowest.
    some = {cell: value for cell, value in seconds.items() if cell[0] != "dense"}
    one = dataclasses.replace(two, seconds=some, division=Division(1, 2))
    assert one.remaining == 2 * (40 + 20 + 30 + 40)


@pytest.mark.parametrize("width", [60, 80, 200])
def test_a_plan_fits_its_terminal(spec, tmp_path, instant, width):
    plan = study.prepare(spec, Path("runs") / "tiny", Silent(), jobs=1)
    plan = dataclasses.replace(plan, spec=spec.model_copy(update={"model": "minilm-l6"}))
    lines = shown(plan, width).splitlines()
    assert max(map(len, lines)) <= width
    for arm in spec.arms:
        assert any(line.split()[:1] == [arm.name] for line in lines), f"{arm.name} is broken over lines"
    assert any("sparsity=0.8" in line for line in lines) == (width > 60)


def test_every_task_is_one_run_of_the_experiment(spec, tmp_path, instant):
    plan = study.prepare(spec, tmp_path / "out", Silent(), jobs=1)
    assert plan.pending == tuple(Task(run) for run in plan.runs)
    examples = plan.examples
    assert len(examples.texts) == 24
    tokens = [" ".join(tokens[1:-1]) for tokens in examples.map_tokens]
    assert tokens == [examples.texts[row].lower() for row in examples.map_rows]
