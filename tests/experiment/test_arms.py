"""Arms that are not one sparsity throughout: schedules, and rules that are told none."""

from __future__ import annotations

import json
import tomllib

import pytest

import crisp_attention as crisp
import tiny_study
from crisp_attention.experiment import data, model, report, train
from crisp_attention.experiment.analysis import analyse
from crisp_attention.experiment.report.pages import spec_as_toml
from crisp_attention.experiment.runs import Fingerprints, expand
from crisp_attention.experiment.spec import parse, to_plain
from crisp_attention.experiment.store import Store
from crisp_attention.experiment.workbench import preflight

ARMS = """
[[arms]]
name = "cubic"
sparsity = 0.8
schedule = { kind = "cubic", end = 0.5 }

[[arms]]
name = "anneal"
rule = "percentile"
sparsity = 0.8
schedule = { kind = "anneal" }

[[arms]]
name = "by-layer"
layer_sparsity = [0.0, 0.8]

[[arms]]
name = "top-p"
rule = "top_p"
p = 0.5

[[arms]]
name = "entmax"
rule = "entmax15"

[[arms]]
name = "near"
rule = "window"
window = 2
"""
NAMES = [arm["name"] for arm in tomllib.loads(ARMS)["arms"]]


@pytest.fixture(scope="module")
def spec(tiny_folders, csv_file):
    settings = {"seeds": 1, "train": 32, "epochs": 2}
    return parse(tomllib.loads(tiny_study.toml(tiny_folders["bert"], csv_file, **settings) + ARMS), "tiny")


@pytest.fixture(scope="module")
def store(spec, tmp_path_factory):
    """A run directory in which every one of these arms has been trained."""
    checkpoint, dataset = model.resolve(spec.model), data.load(spec.data)
    preflight(checkpoint, data.ExperimentData({"": dataset}), spec)
    store = Store(tmp_path_factory.mktemp("arms") / "out")
    store.open(spec, tiny_study.prints_of(checkpoint, dataset))
    bench = tiny_study.bench_of(checkpoint, dataset)
    for planned in expand(spec, tiny_study.prints_of(checkpoint, dataset)):
        if planned.arm in ("dense", *NAMES):
            store.save(*train.run(planned, bench, lambda _: None))
    return store


@pytest.fixture(scope="module")
def result(store):
    return analyse(store)


def realised(result, name, mode):
    record = next(arm for arm in result.arms if arm.name == name).records[0]
    return list(getattr(record.realised_sparsity, mode).values())


def test_a_specification_of_such_arms_survives_every_way_of_writing_it(spec):
    assert parse(tomllib.loads(spec_as_toml(spec)), "tiny") == spec
    assert parse(json.loads(json.dumps(to_plain(spec))), "tiny") == spec
    assert spec.arm("cubic").attention.schedule == crisp.Schedule("cubic", end=0.5)


def test_arms_that_differ_in_the_schedule_alone_are_two(spec):
    plain = to_plain(spec)
    twin = next(arm for arm in plain["arms"] if arm["name"] == "cubic")
    other = {**twin, "name": "other", "attention": {**twin["attention"], "schedule": {"kind": "cubic", "end": 0.6}}}
    with_both = parse({**plain, "arms": [*plain["arms"], other]}, "tiny")
    ids = {run.arm: run.config.run_id for run in expand(with_both, Fingerprints("weights", {"": "data"}))}
    assert ids["cubic"] != ids["other"]
    with pytest.raises(crisp.ConfigurationError, match="'cubic' and 'other' are the same"):
        parse({**plain, "arms": [*plain["arms"], {**twin, "name": "other"}]}, "tiny")


def test_a_schedule_in_a_file_is_checked_by_name(spec):
    plain = to_plain(spec)
    for schedule, message in (({"kind": "cubed"}, "Did you mean 'cubic'"), ({"kind": "cubic", "end": 2}, "got 2")):
        arm = {"name": "other", "sparsity": 0.5, "schedule": schedule}
        with pytest.raises(crisp.ConfigurationError, match=message):
            parse({**plain, "arms": [*plain["arms"], arm]}, "tiny")


def test_a_scheduled_arm_is_trained_and_evaluated_along_its_schedule(result):
    # Both are those of the last epoch: in the second half cubic stands at its end, anneal comes to dense.
    for mode in ("train", "test"):
        assert all(0.65 < share < 0.82 for share in realised(result, "cubic", mode))
    assert all(0.1 < share < 0.3 for share in realised(result, "anneal", "train"))
    assert realised(result, "anneal", "test") == [0.0, 0.0]


def test_arms_without_a_sparsity_record_what_they_realised(result):
    for mode in ("train", "test"):
        first, second = realised(result, "by-layer", mode)
        assert first == 0.0
        assert 0.65 < second < 0.82
        for name in ("top-p", "near"):
            assert all(0.2 < share < 0.9 for share in realised(result, name, mode))
        assert all(0.0 <= share < 0.5 for share in realised(result, "entmax", mode))


def test_the_report_holds_every_such_arm(store, result):
    page = report.write(result, store.folder).read_text(encoding="utf-8")
    for name in NAMES:
        assert next(arm for arm in result.arms if arm.name == name).records[0].status == "finished"
        assert name in page
    assert 'kind = "cubic"' in (store.folder / "report.md").read_text(encoding="utf-8")
