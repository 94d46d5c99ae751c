from __future__ import annotations

import dataclasses
import os
import random
import shutil
import types

import numpy as np
import pytest
import torch
from transformers import TrainerCallback

import tiny_study
from crisp_attention.errors import ConfigurationError
from crisp_attention.experiment.data import dataset
from crisp_attention.experiment.results.mlflow import DATABASE, TAG
from crisp_attention.experiment.specification.runs import expand
from crisp_attention.experiment.training import model, tracking, train
from crisp_attention.experiment.training.checkpoint import Checkpoints
from crisp_attention.experiment.training.tracking import Tracking, require
from crisp_attention.experiment.training.workbench import silence_training

EVENTS = [name for name in dir(TrainerCallback) if name.startswith("on_")]


@pytest.fixture(scope="module")
def workplace(tiny_folders, csv_file):
    """A bench and a planned run."""
    spec = tiny_study.spec(tiny_folders["bert"], csv_file, train=32)
    checkpoint, loaded = model.resolve(spec.model), dataset.load(spec.data)
    silence_training()
    runs = expand(spec, tiny_study.prints_of(checkpoint, loaded))
    return tiny_study.bench_of(checkpoint, loaded), next(run for run in runs if run.arm == "percentile-80")


@pytest.fixture(scope="module")
def plain(workplace):
    """What the run gives without trackers."""
    bench, run = workplace
    return train.run(run, bench, lambda now: None)


@pytest.fixture
def surroundings(monkeypatch):
    """Nothing of the user's."""
    for name in list(os.environ):
        if name.startswith(("MLFLOW_", "TENSORBOARD_", "WANDB_", "TRACKIO_")):
            monkeypatch.delenv(name)


def same(one, other):
    """Records without their times, and outputs to the last bit."""
    assert one[0].model_dump(exclude={"timing"}) == other[0].model_dump(exclude={"timing"})
    assert one[1].keys() == other[1].keys()
    for name, array in one[1].items():
        np.testing.assert_array_equal(array, other[1][name])


def noisy(monkeypatch, **methods):
    """A tracker that answers as told, in place of TensorBoard."""

    class Noisy(TrainerCallback):
        pass

    for name, method in methods.items():
        setattr(Noisy, name, method)
    monkeypatch.setitem(tracking.INTEGRATION_TO_CALLBACK, "tensorboard", Noisy)


@pytest.mark.slow
def test_tensorboard_and_mlflow_show_a_run_and_change_nothing(
    tmp_path, workplace, plain, surroundings, mlflow_database, monkeypatch
):
    import mlflow
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    bench, run = workplace
    notes = []
    folder = tmp_path / "a study"
    (folder / DATABASE).parent.mkdir(parents=True)
    shutil.copy(mlflow_database, folder / DATABASE)
    shown = Tracking(("tensorboard", "mlflow"), folder, notes.append)
    checkpoints = Checkpoints(tmp_path / "checkpoints", run.config.run_id)
    found = train.run(run, bench, lambda now: None, checkpoints, shown)
    same(found, plain)
    assert notes == []
    record = found[0]

    (own,) = (folder / "tracking" / "tensorboard").iterdir()
    assert own.name == f"percentile-80, seed 0, {record.run_id}"
    events = EventAccumulator(str(own)).Reload()
    told = {name: [(item.step, item.value) for item in events.Scalars(name)] for name in events.Tags()["scalars"]}
    assert told["test/accuracy"] == [
        (4 * epoch.epoch, pytest.approx(epoch.test.accuracy, rel=1e-6)) for epoch in record.epochs
    ]

    # Interrupted, perhaps, and taken up again: the same run of the tracker.
    same(train.run(run, bench, lambda now: None, checkpoints, shown), plain)
    uri = f"sqlite:///{folder / DATABASE}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)  # or this would open a database in the working directory
    mlflow.flush_async_logging()
    client = mlflow.MlflowClient(uri)
    (entry,) = client.search_runs([client.get_experiment_by_name("a study").experiment_id])
    assert entry.info.run_name == "percentile-80, seed 0"
    assert entry.info.status == "FINISHED"
    assert entry.data.tags[TAG] == record.run_id
    params = {"arm": "percentile-80", "seed": "0", "run_id": record.run_id, "rule": "percentile"}
    assert entry.data.params.items() >= (params | {"requested_sparsity": "0.8"}).items()
    final = record.final
    expected = {
        "running_loss": final.running_loss,
        "probe_accuracy": final.train.accuracy,
        "probe_loss": final.train.loss,
        "test_accuracy": final.test.accuracy,
        "test_loss": final.test.loss,
        "realised_sparsity": np.mean(list(record.realised_sparsity.train.values())),
        "test_realised_sparsity": np.mean(list(record.realised_sparsity.test.values())),
    }
    assert {name: entry.data.metrics[name] for name in expected} == pytest.approx(expected)


@pytest.mark.slow
@pytest.mark.parametrize("fails", [False, True], ids=["draws", "fails"])
def test_a_tracker_that_draws_or_fails_disturbs_no_run(tmp_path, workplace, plain, monkeypatch, surroundings, fails):
    asked, notes = [], []

    def disturb(own, args, state, control, **keywords):
        asked.append(state.global_step)
        random.random()
        np.random.random()  # noqa: NPY002
        torch.rand(3)
        control.should_training_stop = True
        if fails:
            raise ConnectionError("no route to host")

    noisy(monkeypatch, **dict.fromkeys(EVENTS, disturb))
    bench, run = workplace
    same(train.run(run, bench, lambda now: None, None, Tracking(("tensorboard",), tmp_path, notes.append)), plain)
    if fails:
        assert len(asked) == 1
        assert notes == [
            "The tracker tensorboard failed (ConnectionError: no route to host); the run goes on without it."
        ]
    else:
        assert asked[-1] == 8
        assert notes == []


def test_params_are_there_while_a_tracker_asks_and_not_after(tmp_path, workplace, monkeypatch):
    seen = []
    noisy(monkeypatch, on_train_begin=lambda *_, **keywords: seen.append(dict(vars(keywords["model"].config))))
    _, run = workplace
    config = types.SimpleNamespace(rule="its own")
    aside = Tracking(("tensorboard",), tmp_path, print)._aside("tensorboard", run)
    aside.on_train_begin(None, None, None, model=types.SimpleNamespace(config=config))
    assert seen == [
        {
            "rule": "its own", "arm": "percentile-80", "seed": 0, "run_id": run.config.run_id,
            "requested_sparsity": 0.8,
        }
    ]  # fmt: skip
    assert vars(config) == {"rule": "its own"}


def test_what_a_user_has_set_stands(tmp_path, workplace, monkeypatch, surroundings):
    _, run = workplace
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "boards"))
    noisy(monkeypatch)
    with Tracking(("tensorboard",), tmp_path / "study", print).of(run):
        assert os.environ["WANDB_PROJECT"] == "mine"
        assert os.environ["TENSORBOARD_LOGGING_DIR"].startswith(str(tmp_path / "boards"))
        assert os.environ["WANDB_RUN_ID"] == run.config.run_id
    assert os.environ["TENSORBOARD_LOGGING_DIR"] == str(tmp_path / "boards")
    assert "WANDB_RUN_ID" not in os.environ


def test_a_tracker_that_leaves_its_run_open_is_ended(tmp_path, workplace, monkeypatch, surroundings):
    _, run = workplace
    ended = []
    monkeypatch.setitem(tracking.INTEGRATION_TO_CALLBACK, "wandb", TrainerCallback)
    monkeypatch.setitem(tracking.sys.modules, "wandb", types.SimpleNamespace(finish=lambda: ended.append(True)))
    with pytest.raises(KeyboardInterrupt), Tracking(("wandb",), tmp_path, print).of(run):
        raise KeyboardInterrupt
    assert ended == [True]


def test_each_run_of_a_process_is_a_run_of_its_own_in_wandb(tmp_path, workplace, monkeypatch, surroundings):
    """W&B reads the environment once; what it is told by `setup` changes what it holds."""
    _, run = workplace
    other = dataclasses.replace(run, config=dataclasses.replace(run.config, seed=run.config.seed + 1))
    held, seen = {}, []
    fake = types.SimpleNamespace(setup=held.update, Settings=dict, finish=lambda: seen.append(held["run_id"]))
    monkeypatch.setitem(tracking.INTEGRATION_TO_CALLBACK, "wandb", TrainerCallback)
    monkeypatch.setitem(tracking.sys.modules, "wandb", fake)
    for planned in (run, other):
        with Tracking(("wandb",), tmp_path, print).of(planned):
            pass
    assert seen == [run.config.run_id, other.config.run_id]
    assert held["run_id"] is None


def test_trackers_that_are_unknown_or_missing_are_refused(monkeypatch):
    require(("tensorboard",))
    with pytest.raises(ConfigurationError, match=r"unknown tracker 'tensorbord'. Did you mean 'tensorboard'"):
        require(("tensorboard", "tensorbord"))
    with pytest.raises(ConfigurationError, match=r"report_to: comet_ml cannot be used: .*comet"):
        require(("comet_ml",))


def test_mlflow_is_told_to_be_silent_and_quick_before_it_is_imported(tmp_path, workplace, monkeypatch, surroundings):
    _, run = workplace
    found = []

    def look(*_):
        found.append(tuple(os.environ.get(f"MLFLOW_{name}") for name in ("DISABLE_TELEMETRY", "HTTP_REQUEST_TIMEOUT")))

    monkeypatch.setitem(tracking.INTEGRATION_TO_CALLBACK, "mlflow", look)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "7")  # what a user has set stands
    require(("mlflow",))
    monkeypatch.delenv("MLFLOW_DISABLE_TELEMETRY")
    stand_in = types.SimpleNamespace(MlflowClient=look, exceptions=types.SimpleNamespace(MlflowException=OSError))
    monkeypatch.setitem(tracking.sys.modules, "mlflow", stand_in)
    monkeypatch.setattr(tracking, "experiment_of", lambda *_: "1")
    monkeypatch.setattr(tracking, "run_of", lambda *_: None)
    with Tracking(("mlflow",), tmp_path, print).of(run):
        pass
    assert found == [("true", "7")] * 3


def test_a_server_of_mlflow_that_does_not_answer_is_refused(monkeypatch, surroundings):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:secret@127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(ConfigurationError, match=r"mlflow at http://me:\*\*\*@127.0.0.1:9 .* cannot") as caught:
        require(("mlflow",))
    assert "secret" not in str(caught.value)
