"""Statistics of paired runs: pure functions, arrays in, numbers out. No torch.

Letters: S seeds, N evaluation examples. Accuracies and differences are in percentage points.
Randomness comes from the `numpy.random.Generator` that is passed in.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.power import TTestPower
from statsmodels.stats.weightstats import DescrStatsW

Array = np.ndarray[Any, Any]

MIN_SEEDS = 6
"""Below this no two-sided sign-flip test can reach p < .05: its smallest p is 2 / 2^S."""

EQUIVALENCE_MARGIN = 0.5
"""Points within which two arms count as equivalent."""

ALPHA = 0.05
POWER = 0.8
_EXACT_SEEDS = 16
_FLIPS = 99_999
_RESAMPLES = 10_000


@dataclass(frozen=True)
class Interval:
    """A 95% interval, in points."""

    low: float
    high: float


@dataclass(frozen=True)
class Contrast:
    """Two arms compared over paired seeds, arm minus baseline.

    Attributes:
        arm, baseline: Names.
        seeds: Pairs compared, S.
        examples: Evaluation examples, N.
        differences: Per seed, points, `S` values.
        difference: Their mean.
        spread: Their standard deviation (n - 1); None for one seed.
        p_value: Two-sided sign-flip permutation test on the mean.
        p_holm: Adjusted over the secondary contrasts; None for the primary one.
        interval: Crossed bootstrap over seeds and examples.
        seed_interval: Student's t over seeds alone: "on these N examples". None for one seed.
        effect_size: d_z, the mean difference in its standard deviations; None where that is 0.
        probability_better: P(arm > baseline) for two independent seeds, ties half.
        p_equivalence: TOST for a difference within +-0.5 points; None for one seed.
        detectable: Smallest difference found with 80% power; None for one seed.
    """

    arm: str
    baseline: str
    seeds: int
    examples: int
    differences: tuple[float, ...]
    difference: float
    spread: float | None
    p_value: float
    p_holm: float | None
    interval: Interval
    seed_interval: Interval | None
    effect_size: float | None
    probability_better: float
    p_equivalence: float | None
    detectable: float | None

    @property
    def sentences(self) -> float:
        """The mean difference in examples of the evaluation split."""
        return self.difference * self.examples / 100


def contrast(
    arm: str, baseline: str, correct_arm: Array, correct_baseline: Array, random: np.random.Generator
) -> Contrast:
    """Compare two arms.

    Args:
        arm: Name.
        baseline: Name.
        correct_arm: Bool `[S, N]`, whether each example was classified correctly.
        correct_baseline: Bool `[S, N]`, same seeds and examples in the same order.
        random: For the bootstrap and, with many seeds, the permutation test.

    Raises:
        ValueError: If the shapes differ or are empty.
    """
    if correct_arm.shape != correct_baseline.shape or correct_arm.ndim != 2 or not correct_arm.size:
        raise ValueError(f"expected two [S, N] arrays, got {correct_arm.shape} and {correct_baseline.shape}")
    # Whole counts first: equal differences are then equal to the last digit.
    counts_arm, counts_baseline = correct_arm.sum(axis=1), correct_baseline.sum(axis=1)
    counts = counts_arm - counts_baseline
    differences = 100 * counts / correct_arm.shape[1]
    several = len(counts) > 1
    spread = (float(differences.std(ddof=1)) if np.ptp(counts) else 0.0) if several else None
    return Contrast(
        arm=arm,
        baseline=baseline,
        seeds=correct_arm.shape[0],
        examples=correct_arm.shape[1],
        differences=tuple(float(value) for value in differences),
        difference=float(differences.mean()),
        spread=spread,
        p_value=sign_flip_p(differences, random),
        p_holm=None,
        interval=crossed_bootstrap(correct_arm, correct_baseline, random),
        seed_interval=t_interval(differences) if several else None,
        effect_size=float(differences.mean()) / spread if spread else None,
        probability_better=probability_better(counts_arm, counts_baseline),
        p_equivalence=equivalence_p(differences, EQUIVALENCE_MARGIN) if several else None,
        detectable=detectable_effect(spread, len(differences)) if spread is not None else None,
    )


def sign_flip_p(differences: Array, random: np.random.Generator) -> float:
    """Two-sided p of the mean under random sign flips: exact up to 16 seeds, else 99,999 draws.

    Args:
        differences: `[S]`, paired differences.
        random: For the draws.
    """
    seeds = len(differences)
    exact = seeds <= _EXACT_SEEDS
    if exact:
        patterns = (np.arange(2**seeds)[:, None] >> np.arange(seeds)) & 1
    else:
        patterns = random.integers(0, 2, size=(_FLIPS, seeds))
    sums = np.abs((1 - 2 * patterns) @ differences)
    # Accuracies are whole counts: sums that differ by rounding alone are ties, and count as such.
    as_far = sums >= abs(differences.sum()) - 1e-9 * np.abs(differences).sum()
    # A sampled test counts the observed pattern among the draws, so that p is never 0.
    return float(as_far.mean() if exact else (as_far.sum() + 1) / (_FLIPS + 1))


def crossed_bootstrap(
    correct_arm: Array, correct_baseline: Array, random: np.random.Generator, resamples: int = _RESAMPLES
) -> Interval:
    """95% percentile interval of the mean difference, seeds and examples resampled independently.

    Both are samples: of the training procedure's randomness, and of the sentences that there could
    have been. The pairing of arms is kept in both.

    Args:
        correct_arm: Bool `[S, N]`.
        correct_baseline: Bool `[S, N]`.
        random: For the resamples.
        resamples: How many.

    Returns:
        Points.
    """
    difference = correct_arm.astype(np.float64) - correct_baseline.astype(np.float64)
    seeds, examples = difference.shape
    means = np.empty(resamples)
    block = max(1, 4_000_000 // examples)
    for start in range(0, resamples, block):
        count = min(block, resamples - start)
        seed_weights = random.multinomial(seeds, np.full(seeds, 1 / seeds), size=count) / seeds
        example_weights = random.multinomial(examples, np.full(examples, 1 / examples), size=count) / examples
        means[start : start + count] = ((seed_weights @ difference) * example_weights).sum(axis=1)
    low, high = np.quantile(100 * means, [ALPHA / 2, 1 - ALPHA / 2])
    return Interval(float(low), float(high))


def t_interval(differences: Array) -> Interval:
    """95% Student interval of the mean over seeds; says nothing of other sentences."""
    low, high = DescrStatsW(differences).tconfint_mean(ALPHA)
    return Interval(float(low), float(high))


def equivalence_p(differences: Array, margin: float) -> float:
    """Two one-sided t tests: p that the mean lies outside +-margin points."""
    if np.ptp(differences) == 0:
        return 0.0 if abs(float(differences[0])) < margin else 1.0
    return float(DescrStatsW(differences).ttost_mean(-margin, margin)[0])


def probability_better(arm: Array, baseline: Array) -> float:
    """P(arm > baseline) over all pairs of seeds `[S]` x `[S]`, ties half (as Mann-Whitney's U)."""
    wins = (arm[:, None] > baseline[None, :]).mean()
    ties = (arm[:, None] == baseline[None, :]).mean()
    return float(wins + ties / 2)


def interquartile_mean(values: Array) -> float:
    """Mean of the middle half."""
    return float(stats.trim_mean(values, 0.25))


def holm(p_values: Array) -> Array:
    """Holm-adjusted p-values, `[C]`."""
    return np.asarray(multipletests(p_values, method="holm")[1]) if len(p_values) else p_values


def detectable_effect(spread: float, seeds: int) -> float:
    """Smallest mean difference that a paired t test at 5% finds with 80% power.

    Args:
        spread: Standard deviation of the paired differences, points.
        seeds: Pairs, at least 2.

    Returns:
        Points.
    """
    size = TTestPower().solve_power(effect_size=None, nobs=seeds, alpha=ALPHA, power=POWER)
    return float(np.squeeze(size)) * spread


def seeds_needed(effect: float, spread: float) -> int:
    """Pairs that a paired t test at 5% needs to find a difference with 80% power.

    Args:
        effect: Points, above 0.
        spread: Standard deviation of the paired differences, points.

    Returns:
        At least `MIN_SEEDS`.
    """
    lowest, highest = MIN_SEEDS, MIN_SEEDS
    while spread and _power(effect / spread, highest) < POWER:
        lowest, highest = highest, 2 * highest
    # The least number with the power, by bisection: statsmodels' own search for it fails far out.
    while lowest < highest:
        middle = (lowest + highest) // 2
        if _power(effect / spread, middle) < POWER:
            lowest = middle + 1
        else:
            highest = middle
    return highest


def _power(size: float, seeds: int) -> float:
    power = float(TTestPower().power(size, nobs=seeds, alpha=ALPHA))
    # Far out the noncentral t has no number any more: the effect is then found always.
    return 1.0 if math.isnan(power) else power
