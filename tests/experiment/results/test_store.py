from __future__ import annotations

import hashlib
import io
import json
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from pydantic import ValidationError

from crisp_attention.errors import RecordError
from crisp_attention.experiment.results import records as records_module
from crisp_attention.experiment.results.record import SCHEMA, Record, Score
from crisp_attention.experiment.results.store import Store
from crisp_attention.experiment.specification.runs import Fingerprints
from record_builders import DATA, MODEL, PRINTS, content, draws, fill, finished, make_spec, planned, troubled

RIGHT = np.arange(20) % 3 != 0


@pytest.fixture
def store(tmp_path):
    store = Store(tmp_path / "runs" / "made-up")
    store.open(make_spec(), PRINTS)
    return store


@pytest.fixture
def run():
    return planned(make_spec())["topk-50", 3]


def everything(folder):
    """Path and content of all files below a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def damage(file, change):
    """Change the text of a file; lone surrogates stand for bytes that are not UTF-8."""
    before = file.read_bytes()
    file.write_bytes(change(before.decode()).encode(errors="surrogateescape"))
    assert file.read_bytes() != before
    return file


# The directory


def test_a_new_directory_is_made_by_open_and_by_nothing_before(tmp_path):
    folder = tmp_path / "runs" / "new"
    store = Store(folder)
    store.require(make_spec(), PRINTS)
    assert not folder.exists()
    store.open(make_spec(), PRINTS)
    assert {"study.json", "records", "locks", "locks/study.lock", "logs"} == set(everything(folder))


def test_an_empty_directory_will_do(tmp_path):
    Store(tmp_path).open(make_spec(), PRINTS)
    assert (tmp_path / "study.json").is_file()


def test_a_foreign_directory_is_refused_and_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work", encoding="utf-8")
    before = everything(tmp_path)
    for verb in ("require", "open"):
        with pytest.raises(RecordError, match=r"exists and is not a run directory \(it has no study\.json\)") as caught:
            getattr(Store(tmp_path), verb)(make_spec(), PRINTS)
        assert "Choose another --out" in str(caught.value)
    assert everything(tmp_path) == before


def test_a_file_is_no_directory(tmp_path):
    file = tmp_path / "file"
    file.write_text("x", encoding="utf-8")
    with pytest.raises(RecordError, match="exists and is not a run directory"):
        Store(file).open(make_spec(), PRINTS)
    assert file.read_text(encoding="utf-8") == "x"


@pytest.mark.parametrize(
    ("changes", "model", "data", "difference"),
    [
        ({"training": {"epochs": 9}}, MODEL, DATA, "training"),
        ({"primary": {"arm": "percentile-80"}}, MODEL, DATA, "primary"),
        ({"arms": [*content()["arms"], {"name": "more", "sparsity": 0.1}]}, MODEL, DATA, "arms"),
        ({"data": {"source": "movie-snippets", "max_length": 64}}, MODEL, DATA, "data"),
        ({}, "f" * 64, DATA, "model"),
        ({}, MODEL, "f" * 64, "data"),
        ({"training": {"epochs": 9}}, "f" * 64, DATA, "model, training"),
    ],
)
def test_another_experiment_is_refused_by_what_differs_and_nothing_is_written(store, changes, model, data, difference):
    before = everything(store.folder)
    for verb in ("require", "open"):
        with pytest.raises(RecordError, match=rf"holds another experiment \(different {difference}\)"):
            getattr(store, verb)(make_spec(**changes), Fingerprints(model, {"": data}))
    assert everything(store.folder) == before


def test_what_decides_no_result_may_change(store):
    changes = {"name": "renamed", "description": "new words", "choices": ["ours"], "model": "a/copy"}
    spec = make_spec(**changes, data={"source": "a/copy.csv", "test": "another.csv"})
    store.open(spec, PRINTS)
    assert store.study()[0] == spec


def test_another_number_of_seeds_is_allowed_and_remembered(store):
    assert store.study()[2] == [8]
    for seeds in (8, 10, 10, 20, 8):
        store.open(make_spec(seeds=seeds), PRINTS)
    spec, runs, asked = store.study()
    assert asked == [8, 10, 20, 8]
    assert spec.seeds == 8
    assert len(runs) == 8 * len(spec.arms)


def test_records_outlive_more_seeds(store, run):
    store.save(*finished(run, RIGHT))
    store.open(make_spec(seeds=20), PRINTS)
    assert store.load(run.config.run_id).arm == "topk-50"


def test_a_study_reads_back_as_what_was_opened(store):
    spec, runs, asked = store.study()
    assert spec == make_spec()
    assert {(item.arm, item.index): item for item in runs} == planned(make_spec())
    assert asked == [8]


def test_a_directory_without_a_study_is_told(tmp_path):
    with pytest.raises(RecordError, match=r"is not a run directory: it has no study\.json"):
        Store(tmp_path / "absent").study()
    (tmp_path / "experiment.toml").touch()
    with pytest.raises(RecordError, match=r"experiment\.toml is not a run directory: it has no study\.json"):
        Store(tmp_path / "experiment.toml").study()


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text[: len(text) // 2],
        lambda text: "",
        lambda text: "[]",
        lambda text: "\udcff",
        lambda text: text.replace('"identity"', '"identify"'),
        lambda text: text.replace(f'"schema": {SCHEMA}', f'"schema": {SCHEMA + 1}'),
        lambda text: json.dumps(json.loads(text) | {"seeds_asked": []}),
    ],
    ids=["truncated", "empty", "list", "bytes", "key", "schema", "no seeds"],
)
def test_a_damaged_study_is_named_and_nothing_is_written(store, change):
    file = damage(store.folder / "study.json", change)
    before = file.read_bytes()
    with pytest.raises(RecordError, match=r"study\.json"):
        store.study()
    with pytest.raises(RecordError, match=r"study\.json"):
        store.open(make_spec(seeds=9), PRINTS)
    assert file.read_bytes() == before


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text.replace('"epochs": 3', '"epochs": "three"'),
        lambda text: text.replace('"epochs": 3', '"epoch": 3'),
        lambda text: json.dumps(json.loads(text) | {"spec": None}),
    ],
    ids=["value", "key", "no spec"],
)
def test_a_study_whose_specification_is_damaged_is_no_readable_study(store, change):
    damage(store.folder / "study.json", change)
    with pytest.raises(RecordError, match=r"study\.json"):
        store.study()


# Records


def test_a_record_and_its_outputs_read_back(store, run):
    record, arrays = finished(run, RIGHT)
    store.save(record, arrays)
    loaded = store.load(run.config.run_id)
    assert loaded.arrays.file == f"{run.config.run_id}.npz"
    assert loaded.model_copy(update={"arrays": None}) == record
    found = store.load_arrays(loaded)
    assert set(found) == set(arrays)
    for name, array in arrays.items():
        np.testing.assert_array_equal(found[name], array)
        assert found[name].dtype == array.dtype


def test_what_is_not_done_is_none(store, run):
    assert store.load(run.config.run_id) is None
    assert store.load_all([run]) == {}


def test_all_records_of_the_given_runs_are_found_and_no_others(store):
    runs = planned(make_spec())
    wanted, other, absent = runs["dense", 0], runs["dense", 1], runs["dense", 2]
    for item in (wanted, other):
        store.save(*finished(item, RIGHT))
    found = store.load_all([wanted, absent])
    assert {run_id: record.run_id for run_id, record in found.items()} == {wanted.config.run_id: wanted.config.run_id}


@pytest.mark.parametrize("status", ["diverged", "failed"])
def test_a_run_in_trouble_has_a_reason_and_no_outputs(store, run, status):
    store.save(troubled(run, status, reason="naïve «reason»\nof two lines"), None)
    record = store.load(run.config.run_id)
    assert (record.status, record.reason, record.arrays) == (status, "naïve «reason»\nof two lines", None)
    with pytest.raises(RecordError, match=rf"Run {run.config.run_id} is {status} and has no per-example outputs"):
        store.load_arrays(record)


def test_the_record_is_written_after_its_outputs(store, run, monkeypatch):
    """Whoever sees a record sees its outputs too, whenever the process ends."""
    written = []
    monkeypatch.setattr(records_module, "write_once", lambda path, content: written.append(path.suffix) or True)
    store.save(*finished(run, RIGHT))
    assert written == [".npz", ".json"]


def test_a_failure_between_outputs_and_record_leaves_the_run_undone(store, run, monkeypatch):
    original = records_module.write_once

    def fail(path, content):
        if path.suffix == ".json":
            raise OSError("disk full")
        return original(path, content)

    monkeypatch.setattr(records_module, "write_once", fail)
    with pytest.raises(OSError, match="disk full"):
        store.save(*finished(run, RIGHT))
    assert store.load(run.config.run_id) is None
    monkeypatch.undo()
    store.save(*finished(run, ~RIGHT))
    found = store.load_arrays(store.load(run.config.run_id))
    np.testing.assert_array_equal(found["test_logits"].argmax(1) == found["test_labels"], ~RIGHT)


def test_the_first_record_of_a_run_stands(store, run):
    """Who was silent for so long that another process took its run over has nothing to add."""
    first = store.save(*finished(run, RIGHT))
    before = everything(store.folder)
    assert store.save(*finished(run, RIGHT)) == first
    assert everything(store.folder) == before
    assert store.save(*finished(run, ~RIGHT)) == first
    assert store.save(troubled(run, "failed"), None) == first
    found = store.load_arrays(store.load(run.config.run_id))
    np.testing.assert_array_equal(found["test_logits"].argmax(1) == found["test_labels"], RIGHT)


def test_a_record_gives_way_to_that_of_a_run_that_is_done_again(store, run):
    failed = store.save(troubled(run, "failed"), None)
    done = store.save(*finished(run, RIGHT), before=failed)
    assert store.load(run.config.run_id) == done
    # Another process had planned to do it again too.
    assert store.save(*finished(run, ~RIGHT), before=failed) == done


def schema_changed(text):
    return text.replace(f'"schema": {SCHEMA}', f'"schema": {SCHEMA + 1}')


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text[: len(text) // 2], r"is damaged: not valid JSON .*; truncated\?.*Delete it"),
        (lambda text: "", r"is damaged: not valid JSON .*Delete it"),
        (lambda text: "\udcff\udcfe", r"is damaged: .*utf-8.*Delete it"),
        (lambda text: "[]", r"is damaged: not a JSON object.*Delete it"),
        (lambda text: "null", r"is damaged: not a JSON object"),
        (
            schema_changed,
            rf"has record schema {SCHEMA + 1}, this version reads 1, 2 and {SCHEMA}.*Update crisp-attention",
        ),
        (lambda text: text.replace('"schema"', '"skema"'), r"has record schema None"),
        (lambda text: text.replace('"finished"', '"perfect"'), r"is damaged: status: .*Delete it"),
        (lambda text: text.replace('"total": 20', '"total": "many"', 1), r"is damaged: epochs\.0\.\w+\.total: "),
        (lambda text: text.replace('"parameters"', '"parameter"'), r"is damaged: parameters?: .*Delete it"),
    ],
    ids=["truncated", "empty", "bytes", "list", "null", "schema", "no schema", "status", "number", "key"],
)
def test_a_damaged_record_is_named_with_what_to_do(store, run, change, message):
    store.save(*finished(run, RIGHT))
    file = damage(store.records / f"{run.config.run_id}.json", change)
    with pytest.raises(RecordError, match=message) as caught:
        store.load(run.config.run_id)
    assert str(file) in str(caught.value)
    with pytest.raises(RecordError, match=message):
        store.load_all([run])


def test_a_record_under_another_runs_name_is_refused(store, run):
    store.save(*finished(run, RIGHT))
    (store.records / f"{run.config.run_id}.json").rename(store.records / "0123456789abcdef.json")
    with pytest.raises(RecordError, match=rf"0123456789abcdef\.json is damaged: it describes run {run.config.run_id}"):
        store.load("0123456789abcdef")


@pytest.mark.parametrize("damage", ["changed", "truncated", "missing"])
def test_damaged_outputs_are_named_with_what_to_do(store, run, damage):
    store.save(*finished(run, RIGHT))
    file = store.records / f"{run.config.run_id}.npz"
    if damage == "missing":
        file.unlink()
    else:
        raw = bytearray(file.read_bytes())
        raw[len(raw) // 2] ^= 1
        file.write_bytes(raw if damage == "changed" else raw[:-1])
    with pytest.raises(RecordError, match=r"\.npz is damaged: .*Delete [0-9a-f]+\.json to have") as caught:
        store.load_arrays(store.load(run.config.run_id))
    assert str(file) in str(caught.value)


def test_outputs_of_python_objects_are_neither_written_nor_read(store, run):
    record, arrays = finished(run, RIGHT)
    objects = np.array([{"a": 1}, None], dtype=object)
    with pytest.raises(ValueError, match="allow_pickle"):
        store.save(record, arrays | {"test_labels": objects})
    assert list(store.records.iterdir()) == []
    buffer = io.BytesIO()
    np.savez(buffer, test_labels=objects)
    store.save(record, arrays)
    (store.records / f"{run.config.run_id}.npz").write_bytes(buffer.getvalue())
    file = store.records / f"{run.config.run_id}.json"
    plain = json.loads(file.read_text(encoding="utf-8"))
    plain["arrays"]["sha256"] = hashlib.sha256(buffer.getvalue()).hexdigest()
    file.write_text(json.dumps(plain), encoding="utf-8")
    with pytest.raises(ValueError, match="allow_pickle"):
        store.load_arrays(store.load(run.config.run_id))


# Locks

HOLDER = """
import sys
from pathlib import Path
from crisp_attention.experiment.results.store import Store
lock = Store(Path(sys.argv[1])).lock(sys.argv[2])
print("refused" if lock is None else "held", flush=True)
sys.stdin.read()
"""


def holder(store, run_id):
    return subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(store.folder), run_id],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip


def test_a_lock_has_one_holder_and_can_be_passed_on(store):
    lock = store.lock("a")
    assert lock is not None
    assert store.lock("a") is None
    assert Store(store.folder).lock("a") is None
    other = store.lock("b")
    assert other is not None
    lock.release()
    again = store.lock("a")
    assert again is not None
    again.release()
    other.release()


def test_a_lock_excludes_another_process_until_that_ends_however_it_ends(store):
    with holder(store, "a") as process:
        assert process.stdout.readline() == "held\n"
        assert store.lock("a") is None
        process.kill()
        process.wait()
        lock = store.lock("a")
    assert lock is not None
    with holder(store, "a") as process:
        assert process.stdout.readline() == "refused\n"
        process.stdin.close()
    lock.release()


def test_whoever_only_looks_writes_nothing_and_keeps_nobody_from_the_run(store):
    assert not store.in_training("a")
    assert not (store.folder / "locks" / "a.lock").exists()
    lock = store.lock("a")
    assert store.in_training("a")
    lock.release()
    assert not store.in_training("a")
    assert [path.name for path in (store.folder / "leases").iterdir()] == ["a"]

    held = threading.Event()

    def glance():
        lock = store.lock("a")
        held.set()
        time.sleep(0.02)
        lock.release()

    looking = threading.Thread(target=glance)
    looking.start()
    held.wait()
    assert store.lock("a") is not None
    looking.join()


# The record


def test_accuracy_is_the_share_of_correct_examples():
    assert Score(loss=0.5, correct=3, total=8).accuracy == 0.375


def test_a_record_is_its_last_epoch(run):
    record, _ = finished(run, RIGHT)
    assert record.final is record.epochs[1]
    assert record.final.epoch == 2
    assert record.final.test.correct == RIGHT.sum()


def test_a_record_is_frozen_and_refuses_what_it_does_not_know(run):
    record, _ = finished(run, RIGHT)
    with pytest.raises(ValidationError, match="frozen"):
        record.status = "failed"
    plain = record.model_dump(mode="json", by_alias=True)
    assert plain["schema"] == SCHEMA
    assert Record.model_validate(json.loads(json.dumps(plain))) == record
    with pytest.raises(ValidationError, match="best_epoch"):
        Record.model_validate(plain | {"best_epoch": 1})
    with pytest.raises(ValidationError, match="status"):
        Record.model_validate(plain | {"status": "promising"})


def test_a_number_that_is_none_is_not_written_as_one(store, run):
    """NaN is no JSON: other readers would choke on it."""
    record, arrays = finished(run, RIGHT)
    first = record.epochs[0].model_copy(update={"running_loss": float("nan")})
    try:
        store.save(record.model_copy(update={"epochs": (first, record.epochs[1])}), arrays)
    except ValueError:
        assert store.load(run.config.run_id) is None
        return
    assert "NaN" not in (store.records / f"{run.config.run_id}.json").read_text(encoding="utf-8")


def test_damaged_texts_may_be_deleted(tmp_path):
    store = fill(tmp_path, make_spec(seeds=1), draws({}))
    (tmp_path / "examples.json").write_text('{"texts": ["a"', encoding="utf-8")
    with pytest.raises(RecordError, match="Delete it: no number rests on the texts"):
        store.examples()


def test_what_others_hide_among_the_records_is_left_alone(tmp_path):
    spec = make_spec(seeds=1)
    store = fill(tmp_path, spec, draws({}))
    (store.records / ".ipynb_checkpoints").mkdir()
    store.open(spec, PRINTS)
    assert (store.records / ".ipynb_checkpoints").is_dir()
