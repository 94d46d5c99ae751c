"""A copy to publish: every number, and no text."""

from __future__ import annotations

import shutil

import numpy as np
import pytest

from crisp_attention.errors import RecordError, StorageError
from crisp_attention.experiment import study
from crisp_attention.experiment.export.study import publish
from crisp_attention.experiment.results.store import Store
from record_builders import EXAMPLES, fill, fill_in_full, make_spec

RIGHT = np.arange(EXAMPLES) % 3 != 0


@pytest.fixture
def store(tmp_path):
    """Two seeds of three arms, one run failed, with texts and attention maps."""
    return fill_in_full(
        tmp_path / "made up",
        make_spec(seeds=2),
        lambda arm, index: "failed" if (arm, index) == ("topk-50", 1) else RIGHT,
    )


def numbers(folder):
    study.rebuild(folder)
    return (folder / "report.md").read_text(encoding="utf-8")


@pytest.mark.slow
def test_all_numbers_rebuild_and_nothing_shows_a_text(store, tmp_path):
    out = tmp_path / "results" / "made-up"
    assert publish(store, out) == 6
    assert sorted(path.name for path in out.iterdir()) == ["records", "study.json"]
    copy, (_, runs, _) = Store(out), store.study()
    for run_id, record in store.load_all(runs).items():
        other = copy.load(run_id)
        assert other.model_dump(exclude={"arrays"}) == record.model_dump(exclude={"arrays"})
        if record.arrays is not None:
            arrays, kept = store.load_arrays(record), copy.load_arrays(other)
            assert set(arrays) - set(kept) == {"map_rows", "map_lengths", "map_layers", "maps"}
            for name, values in kept.items():
                np.testing.assert_array_equal(values, arrays[name])
    assert store.examples() is not None
    (store.folder / "examples.json").unlink()
    assert numbers(out) == numbers(store.folder)


def test_a_copy_is_replaced_and_nothing_else_is(store, tmp_path):
    out = tmp_path / "copy"
    publish(store, out)
    numbers(out)
    publish(store, out)
    assert not (out / "report.md").exists()
    other = fill(tmp_path / "other", make_spec(seeds=2, training={"epochs": 5}), lambda arm, index: RIGHT)
    running = shutil.copytree(store.folder, tmp_path / "running")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "note").write_text("mine")
    for taken, message in (
        (store.folder, "is the run directory itself"),
        (running, "is no published copy of this study"),
        (other.folder, "is no published copy of this study"),
        (tmp_path / "full", "is no published copy of this study"),
        (tmp_path / "full" / "note", "is no published copy of this study"),
    ):
        with pytest.raises(StorageError, match=message):
            publish(store, taken)
    assert (tmp_path / "full" / "note").read_text() == "mine"


def test_a_damaged_study_leaves_the_copy_that_there_is(store, tmp_path):
    out = tmp_path / "copy"
    publish(store, out)
    before = {path: path.read_bytes() for path in out.rglob("*.*")}
    next(store.records.glob("*.npz")).write_bytes(b"half")
    with pytest.raises(RecordError, match="its checksum differs"):
        publish(store, out)
    assert {path: path.read_bytes() for path in out.rglob("*.*")} == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["copy", "made up"]


def test_a_copy_with_files_of_others_is_left_alone(store, tmp_path):
    out = tmp_path / "copy"
    publish(store, out)
    (out / "README.md").write_text("by hand", encoding="utf-8")
    with pytest.raises(StorageError, match=r"holds README\.md besides"):
        publish(store, out)
    assert (out / "README.md").read_text(encoding="utf-8") == "by hand"
