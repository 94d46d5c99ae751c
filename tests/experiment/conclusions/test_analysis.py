from __future__ import annotations

import dataclasses
import subprocess
import sys

import numpy as np
import pytest

from crisp_attention.errors import RecordError
from crisp_attention.experiment import statistics
from crisp_attention.experiment.conclusions.analysis import analyse
from crisp_attention.experiment.results.record import RealisedSparsity
from crisp_attention.experiment.results.store import Store
from record_builders import (
    ARMS,
    EXAMPLES,
    PLACEBO,
    PRINTS,
    draws,
    fill,
    finished,
    make_spec,
    only,
    planned,
)

ACCURACY = {"dense": 0.8, "topk-50": 0.85, "percentile-80": 0.5, "dense-again": 0.8}
EVEN = draws(ACCURACY)


@pytest.fixture(scope="module")
def complete(tmp_path_factory):
    """Eight seeds of four arms, all finished."""
    spec = make_spec(arms=[*ARMS, PLACEBO])
    return fill(tmp_path_factory.mktemp("complete"), spec, EVEN)


@pytest.fixture(scope="module")
def result(complete):
    return analyse(complete)


# Counting


def test_every_run_is_counted_once_as_what_it_is(tmp_path):
    outcome = only(
        EVEN,
        dense={1: "failed", 7: None},
        topk_50={2: "diverged", 3: "failed", 4: None, 5: None},
        percentile_80={0: None},
    )
    arms = {arm.name: arm for arm in analyse(fill(tmp_path, make_spec(), outcome)).arms}
    found = {name: (arm.planned, len(arm.records), len(arm.troubled), arm.missing) for name, arm in arms.items()}
    assert found == {"dense": (8, 6, 1, 1), "topk-50": (8, 4, 2, 2), "percentile-80": (8, 7, 0, 1)}
    assert sorted(arms["dense"].records) == [0, 2, 3, 4, 5, 6]
    assert {index: record.status for index, record in arms["topk-50"].troubled.items()} == {2: "diverged", 3: "failed"}


def test_arms_come_in_the_specifications_order_with_the_records_of_their_own(result):
    assert [arm.name for arm in result.arms] == ["dense", "topk-50", "percentile-80", "dense-again"]
    for arm in result.arms:
        assert {index: record.config["seed"] for index, record in arm.records.items()} == {
            index: index + arm.spec.seed_offset for index in range(8)
        }
        assert {record.config["attention"]["sparsity"] for record in arm.records.values()} == {
            arm.spec.attention.sparsity
        }
    assert len(result.records) == 32


def test_numbers_are_those_of_the_last_epoch(result):
    for arm in result.arms:
        expected = [int(EVEN(arm.name, index).sum()) for index in range(8)]
        assert [score.correct for score in arm.test] == expected
        assert {score.total for score in arm.test} == {EXAMPLES}
        np.testing.assert_allclose(arm.accuracies, 100 * np.array(expected) / EXAMPLES)
        probe = [score.correct for score in arm.train]
        np.testing.assert_allclose(arm.gaps, 100 * (np.array(probe) - expected) / EXAMPLES)


def test_realised_sparsity_is_the_mean_over_layers_and_seeds(tmp_path):
    spec = make_spec(seeds=2)
    store = Store(tmp_path)
    store.open(spec, PRINTS)
    for index, (first, second) in enumerate([(0.5, 0.3), (0.4, 0.2)]):
        shares = RealisedSparsity(
            train={"layer.0": first, "layer.1": second}, test={"layer.0": first / 2, "layer.1": 0.1}
        )
        run = planned(spec)["topk-50", index]
        store.save(*finished(run, EVEN("topk-50", index), realised_sparsity=shares))
    arms = {arm.name: arm for arm in analyse(store).arms}
    assert arms["topk-50"].realised("train") == pytest.approx(0.35)
    assert arms["topk-50"].realised("test") == pytest.approx((0.25 + 0.1 + 0.2 + 0.1) / 4)
    assert arms["dense"].realised("train") is None


def test_nothing_done_is_no_contrast_and_no_verdict(tmp_path):
    result = analyse(fill(tmp_path, make_spec(), lambda arm, index: None))
    assert (result.primary, result.secondary, result.contrasts, result.records) == (None, (), (), [])
    assert result.verdict.word == "no verdict"
    assert [arm.missing for arm in result.arms] == [8, 8, 8]
    assert result.arms[0].accuracies.shape == (0,)
    assert "24 of 24 runs are not done yet." in result.cautions


# Contrasts


def test_contrasts_are_those_of_the_outputs(result):
    by_arm = {item.arm: item for item in result.contrasts}
    assert list(by_arm) == ["topk-50", "percentile-80", "dense-again"]
    for name, found in by_arm.items():
        arm, baseline = (np.stack([EVEN(which, index) for index in range(8)]) for which in (name, "dense"))
        pair = statistics.Pair(name, "dense", arm, baseline)
        (expected,) = statistics.contrasts([pair], np.random.default_rng(0))
        for field in dataclasses.fields(found):
            if field.name not in ("interval", "detectable_verdict", "p_holm"):
                assert getattr(found, field.name) == getattr(expected, field.name), field.name
        assert found.interval.low == pytest.approx(expected.interval.low, abs=1.5)
        assert found.interval.high == pytest.approx(expected.interval.high, abs=1.5)


def test_the_primary_contrast_is_the_one_named_before(tmp_path):
    for name in ("topk-50", "percentile-80"):
        spec = make_spec(primary={"arm": name})
        result = analyse(fill(tmp_path / name, spec, EVEN))
        assert result.primary.arm == name
        assert {item.arm for item in result.secondary} == {"topk-50", "percentile-80"} - {name}
        assert name in result.verdict.headline


def test_another_baseline_is_what_everything_is_compared_with(tmp_path):
    spec = make_spec(primary={"arm": "topk-50", "baseline": "percentile-80"})
    result = analyse(fill(tmp_path, spec, EVEN))
    assert {(item.arm, item.baseline) for item in result.contrasts} == {
        ("topk-50", "percentile-80"),
        ("dense", "percentile-80"),
    }
    assert result.primary.difference > 20


def test_only_seeds_that_both_arms_finished_are_paired(tmp_path):
    outcome = only(EVEN, dense={0: "failed", 1: None}, topk_50={2: "diverged", 3: None}, percentile_80={4: None})
    result = analyse(fill(tmp_path, make_spec(), outcome))
    kept = {"topk-50": [4, 5, 6, 7], "percentile-80": [2, 3, 5, 6, 7]}
    for found in result.contrasts:
        expected = [100 * (EVEN(found.arm, index).mean() - EVEN("dense", index).mean()) for index in kept[found.arm]]
        assert found.differences == pytest.approx(expected)
        assert found.seeds == len(kept[found.arm])
    assert result.verdict.word == "no verdict"


def test_an_arm_without_a_shared_seed_has_no_contrast(tmp_path):
    outcome = only(EVEN, percentile_80=dict.fromkeys(range(4)), dense=dict.fromkeys(range(4, 8), "failed"))
    result = analyse(fill(tmp_path, make_spec(), outcome))
    assert [item.arm for item in result.contrasts] == ["topk-50"]
    assert result.secondary == ()


def test_holm_is_over_the_secondary_contrasts_and_over_nothing_else(result):
    assert result.primary.p_holm is None
    adjusted = statistics.holm(np.array([item.p_value for item in result.secondary]))
    assert [item.p_holm for item in result.secondary] == adjusted.tolist()
    smallest = min(result.secondary, key=lambda item: item.p_value)
    assert smallest.p_holm == pytest.approx(min(1, 2 * smallest.p_value))


def test_the_verdict_is_on_the_primary_contrast_and_the_planned_seeds(tmp_path):
    drawn = draws({"dense": 0.5, "topk-50": 0.9, "percentile-80": 0.1}, examples=200)
    result = analyse(fill(tmp_path / "one", make_spec(), only(drawn, dense={7: "diverged"})))
    assert result.verdict.word == "helps"
    told = "Only 7 of 8 planned pairs have finished; diverged or failed: 0 of topk-50, 1 of dense."
    assert told in result.verdict.details
    # The other way round it would live on what was lost.
    other = analyse(fill(tmp_path / "other", make_spec(), only(drawn, topk_50={7: "diverged"})))
    assert (other.primary.p_value, other.verdict.word) == (result.primary.p_value, "inconclusive")


def test_there_is_no_verdict_before_the_last_planned_pair_is_done(tmp_path):
    """Whoever looks at a study that goes on is not told to stop when it suits."""
    outcome = only(draws({"dense": 0.5, "topk-50": 0.9, "percentile-80": 0.1}, examples=200), dense={7: None})
    result = analyse(fill(tmp_path / "early", make_spec(), outcome))
    assert result.primary.p_value < 0.05
    assert result.verdict.word == "no verdict"
    assert result.verdict.headline == "No verdict yet: 7 of 8 planned pairs of seeds are done."
    assert "would be a look that was not planned" in " ".join(result.verdict.details)
    # For what another arm lacks nobody waits.
    outcome = only(
        draws({"dense": 0.5, "topk-50": 0.9, "percentile-80": 0.1}, examples=200), **{"percentile-80": {7: None}}
    )
    assert analyse(fill(tmp_path / "other", make_spec(), outcome)).verdict.word == "helps"


# Rebuilding


def test_a_rebuild_gives_the_same_to_the_last_digit(complete, result):
    again = analyse(Store(complete.folder))
    assert again == result
    assert again.primary.interval == result.primary.interval


def numbers(result):
    return {item.arm: dataclasses.replace(item, p_holm=None) for item in result.contrasts}


@pytest.mark.parametrize(
    ("place", "seeds"), [(3, 8), (3, 18), (1, 8)], ids=["at the end", "at the end, p sampled", "in between"]
)
def test_one_more_arm_changes_no_other_number(tmp_path, place, seeds):
    arms = list(ARMS)
    arms.insert(place, {"name": "topk-20", "sparsity": 0.2})
    fewer = analyse(fill(tmp_path / "fewer", make_spec(seeds=seeds), EVEN))
    more = analyse(fill(tmp_path / "more", make_spec(seeds=seeds, arms=arms), EVEN))
    before, after = numbers(fewer), numbers(more)
    assert set(after) == set(before) | {"topk-20"}
    assert {name: after[name] for name in before} == before
    assert more.verdict == fewer.verdict


def test_seeds_that_two_arms_share_are_run_once_and_serve_both(tmp_path):
    """An A/A arm one seed further on has all its runs but the last in common with the baseline."""
    shifted = [*ARMS, {"name": "shifted", "seed_offset": 1}]
    store = fill(tmp_path, make_spec(arms=shifted), lambda arm, index: None if arm == "shifted" else EVEN(arm, index))
    result = analyse(store)
    assert (len(result.arms[3].records), result.arms[3].missing) == (7, 1)
    np.testing.assert_array_equal(result.arms[3].accuracies, result.arms[0].accuracies[1:])


def test_a_damaged_record_is_no_missing_one(tmp_path):
    spec = make_spec()
    store = fill(tmp_path, spec, EVEN)
    run_id = planned(spec)["dense", 2].config.run_id
    outputs = store.records / f"{run_id}.npz"
    outputs.write_bytes(outputs.read_bytes()[:-3])
    with pytest.raises(RecordError, match=rf"{run_id}\.npz is damaged"):
        analyse(store)
    (store.records / f"{run_id}.json").write_text("{", encoding="utf-8")
    with pytest.raises(RecordError, match=rf"{run_id}\.json is damaged"):
        analyse(store)


def test_a_directory_without_a_study_cannot_be_analysed(tmp_path):
    with pytest.raises(RecordError, match="is not a run directory"):
        analyse(Store(tmp_path))


# Without torch

MODULES = [
    "specification.spec",
    "results.record",
    "results.store",
    "data.assets",
    "data.dataset",
    "training.model",
    "statistics",
    "conclusions.verdict",
    "conclusions.analysis",
    "report",
]


@pytest.mark.slow
def test_published_numbers_rebuild_without_torch(complete, result):
    code = f"""
import importlib, sys
for name in {MODULES}:
    importlib.import_module("crisp_attention.experiment." + name)
    if "torch" in sys.modules or "transformers" in sys.modules:
        sys.exit(name + " imports torch")
from pathlib import Path
from crisp_attention.experiment.conclusions.analysis import analyse
from crisp_attention.experiment.report import tables
from crisp_attention.experiment.results.store import Store
print(tables.contrasts(analyse(Store(Path({str(complete.folder)!r})))))
if "torch" in sys.modules:
    sys.exit("an analysis imports torch")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    from crisp_attention.experiment.report import tables

    assert done.stdout.strip() == str(tables.contrasts(result))
