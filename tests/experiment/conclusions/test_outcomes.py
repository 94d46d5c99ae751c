from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from scipy import stats

from crisp_attention.experiment import statistics
from crisp_attention.experiment.conclusions.analysis import analyse
from crisp_attention.experiment.conclusions.outcomes import MOST_FLIPS, OUTCOMES
from crisp_attention.experiment.results.record import LengthBin
from record_builders import ARMS, CLASSES, PLACEBO, fill_runs, finished, make_spec

EXAMPLES, SEEDS = 60, 7
SHARPNESS = {"dense": 3.0, "topk-50": 1.0, "percentile-80": 1.5, "dense-again": 3.0}


def logits_of(run, examples=EXAMPLES):
    """Answers of a made-up model: sparse arms are less sure of the same answers, and of some others."""
    random = np.random.default_rng([run.index, 5])
    labels = np.arange(examples) % 2
    margin = (2 * labels - 1) * 1.2 + random.normal(size=examples)
    own = np.random.default_rng([run.index, len(run.arm)])
    margin = SHARPNESS[run.arm] * (margin + 0.3 * own.normal(size=examples))
    return np.stack([-margin / 2, margin / 2], axis=1).astype(np.float32), labels.astype(np.int64)


def made(run, **changes):
    logits, labels = logits_of(run)
    record, arrays = finished(run, logits.argmax(axis=1) == labels, **changes)
    return record, arrays | {"test_logits": logits, "test_labels": labels}


@pytest.fixture(scope="module")
def spec():
    return make_spec(seeds=SEEDS, arms=[*ARMS, PLACEBO])


@pytest.fixture(scope="module")
def result(tmp_path_factory, spec):
    return analyse(fill_runs(tmp_path_factory.mktemp("outcomes"), spec, made))


def by_name(result, arm="topk-50"):
    return {item.outcome: item for item in result.outcomes if item.arm == arm}


def test_every_arm_is_compared_in_every_outcome(result):
    assert [(item.arm, item.outcome) for item in result.outcomes] == [
        (arm, outcome) for arm in ("topk-50", "percentile-80", "dense-again") for outcome in OUTCOMES
    ]
    assert {(item.baseline, item.seeds, item.examples) for item in result.outcomes} == {("dense", SEEDS, EXAMPLES)}


def test_arms_have_their_outcomes_by_seed(result, spec):
    for arm in result.arms:
        for index, run in enumerate(item for item in _planned(spec) if item.arm == arm.name):
            logits, labels = logits_of(run)
            shares = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
            right = logits.argmax(axis=1) == labels
            assert arm.nll[index] == pytest.approx(-np.log(shares[np.arange(EXAMPLES), labels]).mean(), rel=1e-5)
            assert arm.brier[index] == pytest.approx(((shares - np.eye(2)[labels]) ** 2).sum(axis=1).mean(), rel=1e-5)
            assert arm.ece[index] == pytest.approx(statistics.calibration_error(shares.max(axis=1), right), rel=1e-5)
            assert arm.seconds[index] == 10.0
        assert sum(item.count for item in arm.reliability) == SEEDS * EXAMPLES
        for name in ("nll", "brier", "ece", "ece_scaled", "seconds", "gaps"):
            assert getattr(arm, name).shape == (SEEDS,)


def _planned(spec):
    from crisp_attention.experiment.specification.runs import expand
    from record_builders import prints_of

    return list(expand(spec, prints_of(spec)))


def test_overconfidence_is_mended_by_scaling(result):
    dense = result.arms[0]
    assert dense.ece.mean() > 0.05
    assert dense.ece_scaled.mean() < dense.ece.mean()


def test_a_contrast_of_outcomes_is_the_paired_one(result):
    arm, baseline = result.arms[1], result.arms[0]
    for name, found in by_name(result).items():
        values = [side.gaps if name == "gap" else getattr(side, name) for side in (arm, baseline)]
        assert found.differences == pytest.approx(values[0] - values[1], abs=1e-12)
        assert (found.mean_arm, found.mean_baseline) == pytest.approx([side.mean() for side in values])
        assert found.difference == pytest.approx(found.mean_arm - found.mean_baseline, abs=1e-12)
        if np.ptp(found.differences):
            expected = stats.ttest_rel(*values).confidence_interval(0.95)
            assert (found.interval.low, found.interval.high) == pytest.approx((expected.low, expected.high), rel=1e-6)
        assert (found.crossed is not None) == (name in ("nll", "brier"))
    assert by_name(result)["nll"].crossed.low < by_name(result)["nll"].difference < by_name(result)["nll"].crossed.high
    assert by_name(result)["nll"].p_value < 0.05  # less sure, so less punished
    assert by_name(result)["seconds"].p_value == 1.0


def test_holm_is_over_the_family_of_secondary_outcomes(result):
    adjusted = statistics.holm(np.array([item.p_value for item in result.outcomes]))
    assert [item.p_holm for item in result.outcomes] == adjusted.tolist()
    assert max(item.p_holm for item in result.outcomes) == 1.0


def test_rounding_in_a_gap_is_no_evidence(tmp_path, spec):
    """Arms with the same answers have the same gaps: no sign of a last digit decides."""

    def same(run):
        right = np.random.default_rng(run.index).random(59) < 0.8
        return finished(run, right)

    found = analyse(fill_runs(tmp_path, spec, same))
    assert {item.p_value for item in found.outcomes} == {1.0}


def test_seeds_that_one_arm_lacks_are_left_out(tmp_path, spec, result):
    def some(run):
        return None if (run.arm, run.index) in {("topk-50", 0), ("dense", 3)} else made(run)

    found = by_name(analyse(fill_runs(tmp_path, spec, some)))["brier"]
    kept = [index for index in range(SEEDS) if index not in (0, 3)]
    assert found.differences == pytest.approx([by_name(result)["brier"].differences[index] for index in kept])


# Flips


def test_flips_are_the_examples_on_which_most_seeds_disagree(result, spec):
    arm, baseline = result.arms[1], result.arms[0]
    right = [np.stack([side.outputs[index].correct for index in range(SEEDS)]) for side in (arm, baseline)]
    share = (right[0] != right[1]).mean(axis=0)
    assert {flip.row for flip in result.flips} == set(np.flatnonzero(share > 0.5))
    for flip in result.flips:
        assert flip.disagreement == pytest.approx(share[flip.row])
        assert (flip.arm_right, flip.baseline_right) == (right[0][:, flip.row].mean(), right[1][:, flip.row].mean())
        assert flip.label == CLASSES[flip.row % 2]


def test_the_most_disputed_come_first_and_at_most_forty(tmp_path):
    def disputed(run):
        """The arm is wrong from row 10 on, the baseline never; the first rows are less and less disputed."""
        right = np.ones(100, dtype=bool)
        if run.arm == "topk-50":
            right[10:] = False
            right[:8] = np.arange(8) <= run.index
        return finished(run, right)

    found = analyse(fill_runs(tmp_path, make_spec(seeds=8), disputed)).flips
    assert len(found) == MOST_FLIPS
    assert [flip.row for flip in found] == list(range(10, 10 + MOST_FLIPS))
    for flip in found:
        assert (flip.disagreement, flip.arm_right, flip.baseline_right) == (1.0, 0.0, 1.0)
        assert flip.arm_probability == pytest.approx(1 / (1 + np.e))
        assert flip.baseline_probability == pytest.approx(np.e / (1 + np.e))


def test_half_the_seeds_are_not_most(tmp_path):
    def outcome(run):
        right = np.ones(4, dtype=bool)
        if run.arm == "topk-50":
            right[0], right[1] = run.index >= 4, run.index >= 5
        return finished(run, right)

    found = analyse(fill_runs(tmp_path, make_spec(seeds=8), outcome)).flips
    assert [(flip.row, flip.disagreement) for flip in found] == [(1, 0.625)]


# What only newer records tell


def test_lengths_and_entropy_are_means_over_seeds(tmp_path):
    def told(run):
        bins = [LengthBin(shortest=3, longest=9, examples=40, realised=0.2 + 0.1 * run.index)]
        return made(run, realised_by_length=tuple(bins), entropy={"layer.0": 1.0 + run.index})

    found = analyse(fill_runs(tmp_path, make_spec(seeds=2), told)).arms[1]
    assert [(item.shortest, item.longest, item.examples) for item in found.lengths] == [(3, 9, 40)]
    assert found.lengths[0].realised == pytest.approx(0.25)
    assert found.entropy == {"layer.0": 1.5}


def test_records_that_do_not_tell_give_nothing(result):
    for arm in result.arms:
        assert (arm.lengths, arm.entropy) == ((), {})


def test_class_names_and_arm_names_mean_nothing(tmp_path, result):
    renamed = {"dense": "p", "topk-50": "q", "percentile-80": "r", "dense-again": "s"}
    back = {new: old for old, new in renamed.items()}
    arms = [{**arm, "name": renamed[arm["name"]]} for arm in (*ARMS, PLACEBO)]
    spec = make_spec(seeds=SEEDS, arms=arms, primary={"arm": "q", "baseline": "p"})

    def turned(run):
        record, arrays = made(dataclasses.replace(run, arm=back[run.arm]))
        arrays = arrays | {"test_logits": arrays["test_logits"][:, ::-1], "test_labels": 1 - arrays["test_labels"]}
        return record.model_copy(update={"arm": run.arm}), arrays

    other = analyse(fill_runs(tmp_path, spec, turned))

    def named(items):
        return [dataclasses.replace(item, arm=renamed[item.arm], baseline="p") for item in items]

    assert list(other.contrasts) == named(result.contrasts)
    for one, two in zip(named(result.outcomes), other.outcomes, strict=True):
        assert (one.arm, one.outcome) == (two.arm, two.outcome)
        assert two.differences == pytest.approx(one.differences, abs=1e-6)
        assert two.p_value == one.p_value
    assert [flip.row for flip in other.flips] == [flip.row for flip in result.flips]
    assert other.mcnemar == result.mcnemar
