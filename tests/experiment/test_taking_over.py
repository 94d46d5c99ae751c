from __future__ import annotations

import contextlib

import numpy as np
import pytest

from crisp_attention.experiment import study
from crisp_attention.experiment.execution.executor import Division
from crisp_attention.experiment.execution.worker import Event, Task
from crisp_attention.experiment.results import leases
from crisp_attention.experiment.results.leases import Leases
from crisp_attention.experiment.results.store import Store
from record_builders import PRINTS, finished, make_spec, planned

RIGHT = np.arange(24) % 3 != 0


class Told(list):
    """A display that keeps what it is told."""

    announce = list.append

    @contextlib.contextmanager
    def training(self, plan):
        self.append([task.run.index for task in plan.pending])
        yield lambda run, event: self.append(event.kind)


class MadeUp:
    """An executor that trains nothing."""

    def execute(self, queue, store, checkpoint, data, division, on_event):
        while queue:
            run = queue.popleft().run
            lease = store.lock(run.config.run_id)
            if lease is not None:
                store.save(*finished(run, RIGHT))
                lease.release()
            on_event(run, Event("elsewhere" if lease is None else "finished", run.config.run_id))


@pytest.fixture
def plan(tmp_path):
    """Three runs to do by workers that do what they can take."""
    spec = make_spec(seeds=3)
    runs = [run for (arm, _), run in planned(spec).items() if arm == "dense"]

    return study.Plan(
        spec=spec, folder=tmp_path, checkpoint=None, data=None, prints=PRINTS, records={}, runs=tuple(runs),
        examples=None, pending=tuple(map(Task, runs)), elsewhere=0, begun=0, seconds={},
        division=Division(1, 1), executor=MadeUp(),
    )  # fmt: skip


def test_what_a_lost_machine_was_training_is_done_in_the_end(plan, monkeypatch):
    monkeypatch.setattr(leases, "DURATION", 0.3)
    Store(plan.folder).open(plan.spec, plan.prints)
    lost, living = Leases(plan.folder, place="lost"), Leases(plan.folder)
    with monkeypatch.context() as patch:
        patch.setattr(leases.Lease, "_keep", lambda lease: None)
        lost.take(plan.runs[0].config.run_id)
    lease = living.take(plan.runs[1].config.run_id)
    told = Told()
    study.carry_out(plan, told)
    lease.release()
    assert told == [
        [0, 1, 2], "elsewhere", "elsewhere", "finished",
        "Waiting for a sign of life from other machines (1 begun there)",
        [0], "finished",
    ]  # fmt: skip
    assert Store(plan.folder).load(plan.runs[1].config.run_id) is None


def test_what_others_have_done_in_the_meantime_is_not_done_again(plan, monkeypatch):
    store = Store(plan.folder)
    store.open(plan.spec, plan.prints)
    lease = store.lock(plan.runs[0].config.run_id)
    original = Store.abandoned

    def abandoned(own, run_ids, announce):
        """They end before it is looked at."""
        store.save(*finished(plan.runs[0], RIGHT))
        lease.release()
        return original(own, run_ids, announce)

    monkeypatch.setattr(Store, "abandoned", abandoned)
    told = Told()
    study.carry_out(plan, told)
    assert told == [[0, 1, 2], "elsewhere", "finished", "finished"]
