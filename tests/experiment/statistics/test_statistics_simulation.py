"""What `benchmarks/statistics_simulation.py` measures in full, in small; and words on recorded logits."""

from __future__ import annotations

import importlib
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from crisp_attention.experiment.conclusions.analysis import analyse
from crisp_attention.experiment.results.store import Store
from crisp_attention.experiment.statistics import ALPHA, Pair, contrasts

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def simulation():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "benchmarks")
        yield importlib.import_module("statistics_simulation")


@pytest.mark.slow
def test_identical_arms_are_told_apart_no_more_often_than_promised(simulation):
    """Also where each arm has examples that suit it, so that seeds alone are sure of a difference."""
    random, experiments = np.random.default_rng(1), 80
    for law in (simulation.IDENTICAL, simulation.EQUAL_ON_AVERAGE):
        found = list(simulation.simulated(law, 8, 150, 0.0, experiments, random))
        words = [simulation.word(item) for item in found]
        assert sum(word in ("helps", "hurts") for word in words) <= stats.binom.ppf(1 - 1e-4, experiments, ALPHA)


@pytest.mark.slow
def test_a_known_effect_is_found(simulation):
    random, experiments = np.random.default_rng(2), 80
    first = next(simulation.simulated(simulation.IDENTICAL, 8, 150, 0.0, 1, random))
    found = list(
        simulation.simulated(
            simulation.IDENTICAL, 8, 150, min(10.0, 1.5 * first.detectable_verdict), experiments, random
        )
    )
    words = [simulation.word(item) for item in found]
    assert words.count("helps") >= stats.binom.ppf(1e-4, experiments, 0.8)
    assert "hurts" not in words


@pytest.mark.slow
def test_looks_together_err_no_more_often_than_one_test(simulation):
    found = simulation.looks(simulation.IDENTICAL, 60, 40, np.random.default_rng(3))
    assert found["helps_or_hurts_at_any"]["share"] * 40 <= stats.binom.ppf(1 - 1e-4, 40, ALPHA)
    assert found["alpha_at_each"] == pytest.approx(ALPHA / 3)


def test_dense_against_dense_never_helps_on_recorded_logits(simulation):
    """Twenty repetitions at ten seeds. Each run of either arm is one of the recorded dense runs, drawn at random; the
    evaluation split is drawn anew, with replacement, for every repetition.
    """
    store = Store(ROOT / "results" / "quick")
    dense = analyse(store).arms[0]
    recorded = np.stack([dense.outputs[index].correct for index in dense.indexes])
    random = np.random.default_rng(0)
    pairs = []
    for _ in range(20):
        rows = random.integers(recorded.shape[1], size=recorded.shape[1])
        runs = random.integers(len(recorded), size=(2, 10))
        pairs.append(Pair("dense-again", "dense", recorded[runs[0]][:, rows], recorded[runs[1]][:, rows]))
    words = [simulation.word(item) for item in contrasts(pairs, random)]
    assert len(words) == 20
    assert "helps" not in words
    assert any(np.ptp(pair.correct_arm.sum(axis=1)) for pair in pairs)
