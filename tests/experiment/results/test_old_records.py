"""Records as released versions wrote them: each keeps loading. `data/records-vN` is never written again."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from crisp_attention.errors import RecordError
from crisp_attention.experiment import study
from crisp_attention.experiment.results.record import READABLE, SCHEMA
from crisp_attention.experiment.results.store import Store
from crisp_attention.experiment.specification.runs import Fingerprints

DATA = Path(__file__).parents[2] / "data"
DENSE, SPARSE = "410aa7ffd87935a8", "bd9a9044b2743037"


@pytest.fixture
def folder(tmp_path):
    """Version 1: dense and percentile-80 of the quick preset, first seed."""
    shutil.copytree(DATA / "records-v1", tmp_path / "quick")
    return tmp_path / "quick"


def test_every_older_version_has_its_records_here():
    kept = {int(path.name.removeprefix("records-v")) for path in DATA.glob("records-v*")}
    assert kept == set(READABLE) - {SCHEMA}


def test_a_study_of_version_2_is_gone_on_with():
    # A key that is added since must not make it another experiment: see `_LATER` in the specification.
    store = Store(DATA / "records-v2")
    begun = json.loads((store.folder / "study.json").read_text(encoding="utf-8"))
    data = begun["data"] if isinstance(begun["data"], dict) else {"": begun["data"]}
    store.require(store.study()[0], Fingerprints(begun["model"], data, begun.get("evaluations", {})))


def test_version_1_loads_and_what_came_later_is_empty(folder):
    store = Store(folder)
    spec, runs, asked = store.study()
    assert (spec.name, len(runs), asked) == ("quick", 12, [3])
    records = store.load_all(runs)
    assert {run_id: (record.arm, record.final.test.correct) for run_id, record in records.items()} == {
        DENSE: ("dense", 232),
        SPARSE: ("percentile-80", 213),
    }
    for record in records.values():
        assert record.schema_version == 1
        assert (record.realised_by_length, record.entropy, record.evaluations, record.resumed) == ((), {}, {}, 0)
        arrays = store.load_arrays(record)
        assert arrays.keys() == {"test_logits", "test_labels", "train_logits", "train_labels"}
        assert (arrays["test_logits"].argmax(1) == arrays["test_labels"]).sum() == record.final.test.correct
    assert store.examples() is None


def test_version_1_is_analysed_and_reported(folder):
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    analysis, page = study.rebuild(folder)
    assert analysis.primary.difference == pytest.approx(100 * (213 - 232) / 300)
    text = page.read_text(encoding="utf-8")
    for run_id in (DENSE, SPARSE):
        assert run_id in text
    assert {path: path.read_bytes() for path in before} == before


def test_version_2_loads_and_what_came_later_is_that_of_one_process():
    store = Store(DATA / "records-v2")
    _, runs, _ = store.study()
    records = store.load_all(runs)
    assert {run_id: record.final.test.correct for run_id, record in records.items()} == {DENSE: 238, SPARSE: 221}
    for record in records.values():
        assert (record.schema_version, record.provenance.processes, record.effective_batch_size) == (2, 1, None)
        assert len(store.load_arrays(record)["test_lengths"]) == record.final.test.total


@pytest.mark.parametrize("file", ["study.json", f"records/{DENSE}.json"])
@pytest.mark.parametrize("schema", [SCHEMA + 1, 0, "2", None])
def test_a_version_that_is_not_known_is_refused(folder, file, schema):
    path = folder / file
    content = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(content | {"schema": schema}), encoding="utf-8")
    with pytest.raises(RecordError) as caught:
        study.rebuild(folder)
    assert f"has record schema {schema!r}, this version reads 1, 2 and 3. Update crisp-attention" in str(caught.value)
