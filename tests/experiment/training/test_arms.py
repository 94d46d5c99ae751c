"""Arms that are not one sparsity throughout: schedules, and rules that are told none."""

from __future__ import annotations

import json
import tomllib

import pytest

import crisp_attention as crisp
import tiny_study
from crisp_attention.experiment import report
from crisp_attention.experiment.conclusions.analysis import analyse
from crisp_attention.experiment.data import dataset
from crisp_attention.experiment.report.pages import spec_as_toml
from crisp_attention.experiment.results.store import Store
from crisp_attention.experiment.specification.runs import Fingerprints, expand
from crisp_attention.experiment.specification.spec import parse, to_plain
from crisp_attention.experiment.training import model, train
from crisp_attention.experiment.training.workbench import Workbench, preflight

pytestmark = pytest.mark.slow

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
    checkpoint, loaded = model.resolve(spec.model), dataset.load(spec.data)
    preflight(checkpoint, dataset.ExperimentData({"": loaded}), spec)
    store = Store(tmp_path_factory.mktemp("arms") / "out")
    store.open(spec, tiny_study.prints_of(checkpoint, loaded))
    bench = tiny_study.bench_of(checkpoint, loaded)
    for planned in expand(spec, tiny_study.prints_of(checkpoint, loaded)):
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


# Arms that are trained and evaluated otherwise, or regularized otherwise

OTHERWISE = """
[[arms]]
name = "apply-train"
sparsity = 0.5
apply = "train"

[[arms]]
name = "to-dense"
sparsity = 0.5
evaluate = {}

[[arms]]
name = "apply-eval"
sparsity = 0.5
apply = "eval"

[[arms]]
name = "from-dense"
evaluate = { sparsity = 0.5 }

[[arms]]
name = "cubic-to-random"
sparsity = 0.8
schedule = { kind = "cubic", end = 0.5 }
evaluate = { rule = "random", sparsity = 0.5 }

[[arms]]
name = "random-to-window"
rule = "random"
sparsity = 0.5
evaluate = { rule = "window", sparsity = 0.8 }

[[arms]]
name = "dropkey"
rule = "random"
scope = "pair"
sparsity = 0.5
apply = "train"

[[arms]]
name = "smooth"
training = { label_smoothing = 0.4 }

[[arms]]
name = "attention-dropout"
training = { attention_dropout = 0.5 }

[[arms]]
name = "no-dropout"
training = { attention_dropout = 0.0, hidden_dropout = 0.0 }

[[arms]]
name = "decay"
training = { weight_decay = 10.0 }

[[arms]]
name = "slow"
training = { learning_rate = 1e-6 }
"""


@pytest.fixture(scope="module")
def otherwise(tiny_folders, csv_file):
    """Record and outputs of each such arm by name, and the data."""
    settings = {"seeds": 1, "train": 32, "epochs": 2}
    text = tiny_study.toml(tiny_folders["bert"], csv_file, **settings) + OTHERWISE
    text += '[[evaluations]]\nname = "typos"\ntypos = 0.2\n'
    spec = parse(tomllib.loads(text), "tiny")
    checkpoint, found = model.resolve(spec.model), dataset.load_experiment(spec)
    preflight(checkpoint, found, spec)
    bench = Workbench(checkpoint, found)
    prints = Fingerprints(checkpoint.fingerprint, *found.prints())
    wanted = {"dense", *(arm["name"] for arm in tomllib.loads(OTHERWISE)["arms"])}
    runs = {run.arm: train.run(run, bench, lambda _: None) for run in expand(spec, prints) if run.arm in wanted}
    return runs, found


def shares(runs, name, mode):
    return list(getattr(runs[name][0].realised_sparsity, mode).values())


@pytest.mark.parametrize(("one", "other"), [("apply-train", "to-dense"), ("apply-eval", "from-dense")])
def test_two_ways_to_say_where_an_arm_is_sparse_give_the_same_to_the_last_bit(otherwise, one, other):
    runs, _ = otherwise
    for name, array in runs[one][1].items():
        assert (array == runs[other][1][name]).all()
    assert runs[one][0].epochs == runs[other][0].epochs
    assert runs[one][0].realised_sparsity == runs[other][0].realised_sparsity


def test_an_arm_evaluated_otherwise_is_trained_as_ever(otherwise):
    runs, _ = otherwise
    for name, trained, evaluated in (
        ("to-dense", 0.5, 0.0),
        ("from-dense", 0.0, 0.5),
        ("random-to-window", 0.5, 0.8),
        ("cubic-to-random", 0.8, 0.5),
    ):
        assert all(abs(share - trained) < 0.1 for share in shares(runs, name, "train"))
        assert all(abs(share - evaluated) < 0.1 for share in shares(runs, name, "test"))
    dense, sparse = (runs[name][0].epochs for name in ("dense", "from-dense"))
    assert [epoch.running_loss for epoch in dense] == [epoch.running_loss for epoch in sparse]
    assert dense[-1].test.loss != sparse[-1].test.loss


def test_dropkey_removes_its_share_in_training_alone(otherwise):
    runs, _ = otherwise
    assert all(abs(share - 0.5) < 0.05 for share in shares(runs, "dropkey", "train"))
    assert shares(runs, "dropkey", "test") == [0.0, 0.0]


def test_each_regularizer_of_training_does_something_of_its_own(otherwise):
    runs, _ = otherwise
    names = ["dense", "smooth", "attention-dropout", "no-dropout", "decay", "slow"]
    assert len({runs[name][0].final.test.loss for name in names}) == len(names)
    assert len({runs[name][0].epochs[0].running_loss for name in names if name != "decay"}) == len(names) - 1
    for name in names:
        assert runs[name][0].config["training"]["epochs"] == 2
    losses = {name: [epoch.train.loss for epoch in runs[name][0].epochs] for name in ("dense", "slow")}
    assert abs(losses["slow"][1] - losses["slow"][0]) < 1e-3 < abs(losses["dense"][1] - losses["dense"][0])


def test_further_evaluations_are_in_the_record_with_their_logits(otherwise):
    runs, found = otherwise
    for record, outputs in runs.values():
        split = found.evaluations["typos"]
        assert (outputs["typos_labels"] == split.labels).all()
        hits = outputs["typos_logits"].argmax(1) == split.labels
        assert record.evaluations["typos"].correct == hits.sum()
        assert record.evaluations["typos"].total == 24
        assert not (outputs["typos_logits"] == outputs["test_logits"]).all()
    # The further evaluation is done with the attention of evaluation too.
    typos = {name: outputs["typos_logits"] for name, (_, outputs) in runs.items()}
    assert (typos["apply-eval"] == typos["from-dense"]).all()
    assert not (typos["from-dense"] == typos["dense"]).all()
