from __future__ import annotations

import json
import shutil

import numpy as np
import pandas as pd
import pytest

from crisp_attention.errors import ConfigurationError, RecordError, StorageError
from crisp_attention.experiment import statistics
from crisp_attention.experiment.export import files, mlflow
from crisp_attention.experiment.export.tables import PREDICTION_COLUMNS, RUN_COLUMNS, Tables
from crisp_attention.experiment.results.mlflow import DATABASE
from crisp_attention.experiment.results.store import Store
from record_builders import EXAMPLES, fill, fill_runs, finished, finished_in_full, make_spec, planned

RIGHT = np.arange(EXAMPLES) % 3 != 0


def outcome(arm, index):
    """Two seeds of three arms: all but two are finished."""
    return {("topk-50", 1): "failed", ("percentile-80", 1): None}.get((arm, index), RIGHT)


@pytest.fixture
def store(tmp_path):
    return fill(tmp_path / "made up", make_spec(seeds=2), outcome)


def read(path):
    return pd.read_parquet(path) if path.suffix == ".parquet" else pd.read_csv(path)


@pytest.mark.parametrize("kind", ["parquet", "csv"])
def test_a_row_a_run_and_a_row_a_prediction(store, tmp_path, kind):
    runs, predictions = map(read, files.export(store, kind, tmp_path / "out"))
    assert len(runs) == 6
    by_run = runs.set_index(["arm", "seed_index"])
    done = by_run.loc["topk-50", 0]
    record = store.load(done.run_id)
    assert (done.study, done.status, done.seed) == ("made-up", "finished", 0)
    assert (done.rule, done.requested_sparsity) == ("topk", 0.5)
    assert (done.test_correct, done.test_examples, done.test_accuracy) == (16, 24, 16 / 24)
    assert (done.test_loss, done.train_loss) == (record.final.test.loss, record.final.train.loss)
    assert (done.train_realised_sparsity, done.test_realised_sparsity) == (0.375, 0.375)
    assert (done.seconds, done.train_seconds, done.version_torch) == (12.3, 10.0, "2.8.0")
    assert by_run.loc["dense", 0].rule == "dense"
    failed = by_run.loc["topk-50", 1]
    assert (failed.status, failed.reason) == ("failed", "made to be failed")
    assert np.isnan(failed.test_accuracy)
    assert by_run.loc["percentile-80", 1].status == "missing"

    assert set(predictions.evaluation) == {"test", "train"}
    own = predictions[(predictions.run_id == done.run_id) & (predictions.evaluation == "test")]
    assert list(own.example) == list(range(EXAMPLES))
    arrays = store.load_arrays(record)
    logits = arrays["test_logits"].astype(float)
    np.testing.assert_array_equal(own[["logit_0", "logit_1"]], logits)
    likelihood = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    np.testing.assert_allclose(own[["probability_0", "probability_1"]], likelihood)
    np.testing.assert_allclose(own.probability, likelihood.max(axis=1))
    np.testing.assert_allclose(own.loss, -np.log(likelihood[np.arange(EXAMPLES), arrays["test_labels"]]))
    np.testing.assert_allclose(own.label_probability, np.exp(-own.loss))
    np.testing.assert_array_equal(own.correct, RIGHT)
    np.testing.assert_array_equal(own.label, arrays["test_labels"])
    assert list(own.label_name[:2]) == ["negative", "positive"]
    assert list(own.predicted_name[:2]) == ["positive", "positive"]
    brier = statistics.brier(arrays["test_logits"][None], arrays["test_labels"]).mean()
    assert done.test_brier == pytest.approx(brier)


def test_both_formats_have_the_same_columns(store, tmp_path):
    parquet, csv = (
        [list(read(path).columns) for path in files.export(store, kind, tmp_path / kind)] for kind in ("parquet", "csv")
    )
    assert parquet == csv
    runs, predictions = parquet
    assert set(RUN_COLUMNS) <= set(runs)
    assert set(predictions) == {*PREDICTION_COLUMNS, "logit_0", "logit_1", "probability_0", "probability_1"}


def test_conditions_and_further_evaluations_have_columns_and_rows(tmp_path):
    spec = make_spec(seeds=1, vary={"train_examples": [10, 20]}, evaluations=[{"name": "typos-10", "typos": 0.1}])
    store = fill_runs(tmp_path / "run", spec, lambda run: finished_in_full(run, RIGHT, spec))
    runs, predictions = map(read, files.export(store, "parquet", tmp_path / "out"))
    assert list(runs.condition.unique()) == ["train_examples=10", "train_examples=20"]
    typos = predictions[predictions.evaluation == "typos-10"]
    assert len(typos) == len(runs) * EXAMPLES
    assert typos.tokens.isna().all()
    assert not predictions[predictions.evaluation == "test"].tokens.isna().any()
    correct = typos.groupby("run_id").correct.sum()
    assert list(runs["typos-10_correct"]) == [correct[run_id] for run_id in runs.run_id]


def test_a_study_without_a_record_has_only_missing_runs(tmp_path):
    store = fill(tmp_path / "run", make_spec(seeds=1), lambda arm, index: None)
    runs, predictions = map(read, files.export(store, "parquet", tmp_path / "out"))
    assert set(runs.status) == {"missing"}
    assert len(predictions) == 0


# Files


def test_an_export_is_replaced_by_the_next_one(store, tmp_path):
    out = tmp_path / "out"
    files.export(store, "csv", out)
    files.export(store, "parquet", out)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    tables = {f"{name}.{kind}" for name in ("runs", "predictions") for kind in ("csv", "parquet")}
    assert set(before) == {"export.json", *tables}
    files.export(store, "csv", out)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    store.save(*finished(planned(make_spec(seeds=2))["percentile-80", 1], RIGHT))
    assert set(read(files.export(store, "csv", out)[0]).status) == {"finished", "failed"}


@pytest.mark.parametrize("name", ["runs.csv", "predictions.csv", "export.json"])
def test_a_file_of_somebody_else_is_left_alone(store, tmp_path, name):
    (tmp_path / name).write_text("years of work", encoding="utf-8")
    with pytest.raises(StorageError, match=rf"{name} exists .*Choose another --out"):
        files.export(store, "csv", tmp_path)
    assert (tmp_path / name).read_text(encoding="utf-8") == "years of work"
    assert not [path for path in tmp_path.iterdir() if path.is_file() and path.name != name]


def test_the_export_of_another_study_is_left_alone(store, tmp_path):
    other = fill(tmp_path / "other", make_spec(seeds=2, training={"epochs": 9}), outcome)
    files.export(store, "csv", tmp_path / "out")
    with pytest.raises(StorageError, match="holds the export of another study"):
        files.export(other, "csv", tmp_path / "out")


def test_damaged_outputs_leave_no_half(store, tmp_path):
    out = tmp_path / "out"
    files.export(store, "csv", out)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    record = store.load(Tables(store).runs[0].config.run_id)
    (store.records / record.arrays.file).write_bytes(b"damaged")
    with pytest.raises(RecordError, match="is damaged"):
        files.export(store, "csv", out)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_a_place_that_cannot_be_written_is_named(store, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match="file could not be written"):
        files.export(store, "csv", tmp_path / "file")
    with pytest.raises(RecordError, match=r"is not a run directory"):
        files.export(Store(tmp_path / "absent"), "csv", tmp_path / "out")
    assert not (tmp_path / "out").exists()


# MLflow


def test_mlflow_that_is_missing_is_told(store, monkeypatch):
    monkeypatch.setattr(mlflow.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigurationError, match=r"pip install 'crisp-attention\[mlflow\]'"):
        mlflow.export(store, None)


@pytest.mark.slow
def test_mlflow_gets_each_run_once(store, monkeypatch, mlflow_database):
    from mlflow import MlflowClient

    (store.folder / DATABASE).parent.mkdir()
    shutil.copy(mlflow_database, store.folder / DATABASE)
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME"):
        monkeypatch.delenv(name, raising=False)
    done = mlflow.export(store, None)
    assert (done.experiment, done.new, done.known) == ("made up", 5, 0)
    again = mlflow.export(store, None)
    assert (again.new, again.known) == (0, 5)
    client = MlflowClient(done.uri)
    experiment = client.get_experiment_by_name("made up").experiment_id
    runs = {run.info.run_name: run for run in client.search_runs([experiment])}
    assert len(runs) == len(client.search_runs([experiment])) == 5
    run = runs["topk-50, seed 0"]
    record = store.load(run.data.tags["crisp.run_id"])
    assert run.info.status == "FINISHED"
    expected = {"arm": "topk-50", "seed": "0", "rule": "topk", "requested_sparsity": "0.5", "version_torch": "2.8.0"}
    assert run.data.params.items() >= expected.items()
    assert json.loads(run.data.params["training"]) == record.config["training"]
    history = [(item.step, item.value) for item in client.get_metric_history(run.info.run_id, "test_accuracy")]
    assert history == [(epoch.epoch, epoch.test.accuracy) for epoch in record.epochs]
    assert run.data.metrics["test_realised_sparsity"] == 0.375
    failed = runs["topk-50, seed 1"]
    assert (failed.info.status, failed.data.tags["crisp.status"]) == ("FAILED", "failed")

    # A run that was done again takes the place of what was exported of it before.
    redone = planned(make_spec(seeds=2))["topk-50", 1]
    store.save(*finished(redone, RIGHT), before=store.load(redone.config.run_id))
    assert mlflow.export(store, None).new == 1
    runs = {run.info.run_name: run for run in client.search_runs([experiment])}
    assert len(runs) == 5
    assert runs["topk-50, seed 1"].info.status == "FINISHED"

    # One that a tracker wrote while it trained is completed, and keeps its history.
    live = planned(make_spec(seeds=2))["percentile-80", 1]
    own = client.create_run(experiment, tags={"crisp.run_id": live.config.run_id}).info.run_id
    client.log_metric(own, "running_loss", 0.25, step=12)
    client.log_param(own, "arm", "percentile-80")
    store.save(*finished(live, RIGHT))
    assert mlflow.export(store, None).new == 1
    found = client.get_run(own)
    assert [item.value for item in client.get_metric_history(own, "running_loss")] == [0.25]
    assert found.data.metrics["test_correct"] == 16
    assert found.data.params["requested_sparsity"] == "0.8"

    with pytest.raises(StorageError, match=r"MLflow at sqlite:.*study\.json/x cannot be written"):
        mlflow.export(store, f"sqlite:///{store.folder / 'study.json' / 'x'}")
