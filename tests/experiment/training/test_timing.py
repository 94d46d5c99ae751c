from __future__ import annotations

import pytest
import torch

import tiny_study
from crisp_attention.experiment.data import dataset
from crisp_attention.experiment.specification.runs import expand
from crisp_attention.experiment.training import model, timing
from crisp_attention.experiment.training.timing import Pace


@pytest.fixture(scope="module")
def workplace(tiny_folders, csv_file):
    """Bench and first runs by arm."""
    spec = tiny_study.spec(tiny_folders["bert"], csv_file, seeds=1)
    checkpoint, loaded = model.resolve(spec.model), dataset.load(spec.data)
    runs = {run.arm: run for run in expand(spec, tiny_study.prints_of(checkpoint, loaded))}
    return tiny_study.bench_of(checkpoint, loaded), runs


@pytest.fixture
def ticks(monkeypatch):
    """A clock that advances by a second each time it is read."""
    now = iter(range(10**6))
    monkeypatch.setattr(timing.time, "perf_counter", lambda: float(next(now)))


def test_a_run_takes_its_epochs_steps_and_evaluations(workplace):
    bench, runs = workplace
    # Two epochs of 96 training examples, 24 evaluation examples and a probe of 16.
    assert Pace(1.0, 0.0).seconds(runs["dense"], bench) == 2 * 96
    assert Pace(0.0, 1.0).seconds(runs["dense"], bench) == 2 * (24 + 16)
    assert Pace(0.0, 1.0).seconds(tiny_study.without_curves(runs["dense"]), bench) == 24 + 16


def test_each_arm_is_timed_on_its_own_settings(workplace, ticks):
    bench, runs = workplace
    found = timing.expect(bench, runs.values(), threads=1, budget=10**6)
    assert list(found) == [(arm, "") for arm in runs]
    # Three batches of 8 (of 24 at most, the only one, three times) took a second.
    assert set(found.values()) == {2 * (96 / 24 + (24 + 16) / 72)}


def test_past_the_budget_arms_are_as_slow_as_the_slowest(workplace, monkeypatch):
    bench, runs = workplace
    timed = []

    def pace(planned, bench):
        timed.append(planned.arm)
        return Pace(len(timed), 0.0)

    monkeypatch.setattr(timing, "_pace", pace)
    found = timing.expect(bench, runs.values(), threads=1, budget=0.0)
    assert timed == ["dense"]
    assert set(found.values()) == {192.0}
    timed.clear()
    found = timing.expect(bench, runs.values(), threads=1, budget=60.0)
    assert timed == list(runs)
    assert list(found.values()) == [192.0, 384.0, 576.0, 768.0]


def test_an_arm_that_cannot_be_timed_has_no_time(workplace, monkeypatch):
    bench, runs = workplace
    original = timing._pace

    def pace(planned, bench):
        if planned.arm == "percentile-80":
            raise IndexError("index out of range in self")
        return original(planned, bench)

    monkeypatch.setattr(timing, "_pace", pace)
    few = [runs[arm] for arm in ("dense", "percentile-80")]
    assert list(timing.expect(bench, few, threads=1)) == [("dense", "")]
    monkeypatch.setattr(timing, "_pace", lambda *_: 1 / 0)
    assert timing.expect(bench, few, threads=1) == {}


def test_arms_are_timed_on_a_workers_threads(workplace, monkeypatch):
    bench, runs = workplace
    before, seen = torch.get_num_threads(), []

    def pace(planned, bench):
        seen.append(torch.get_num_threads())
        raise RuntimeError

    monkeypatch.setattr(timing, "_pace", pace)
    timing.expect(bench, [runs["dense"]], threads=before + 1)
    assert seen == [before + 1]
    assert torch.get_num_threads() == before
