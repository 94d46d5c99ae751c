"""Two arms compared over paired seeds: tests, intervals, effect sizes.

Letters: C comparisons, S seeds, N evaluation examples. Accuracies and their differences are in percentage points.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.weightstats import DescrStatsW

from crisp_attention.experiment.statistics.power import ALPHA, POWER, detectable_effect, least_seeds, sign_flip_effect

Array = np.ndarray[Any, Any]

EQUIVALENCE_MARGIN = 0.5
"""Points within which two arms count as equivalent."""

EQUIVALENCE_EXAMPLES = 600
"""Fewest examples that can show this. With fewer, kinds of examples that make up that share may all be missing, and no
bootstrap knows of them: none seen of N leaves room for a share of 3 / N (rule of three)."""

_EXACT_SEEDS = 16
_POWER_Z = float(stats.norm.ppf(POWER))
_FLIPS = 99_999
_RESAMPLES = 10_000
_COLUMNS = 256


@dataclass(frozen=True)
class Interval:
    """An interval in the unit of its values, at the level that its owner states."""

    low: float
    high: float


@dataclass(frozen=True)
class Pair:
    """What a contrast is made from.

    Attributes:
        arm, baseline: Names.
        correct_arm: Bool `[S, N]`, whether each example was classified correctly.
        correct_baseline: Bool `[S, N]`, same seeds and examples in the same order.
    """

    arm: str
    baseline: str
    correct_arm: Array
    correct_baseline: Array

    @property
    def by_example(self) -> Array:
        """Int8 `[S, N]`: 1 where the arm alone is right, -1 where the baseline alone is."""
        return self.correct_arm.astype(np.int8) - self.correct_baseline.astype(np.int8)


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
        p_equivalence: TOST for a difference within `EQUIVALENCE_MARGIN` points either way; None for one seed.
        detectable: Smallest difference that a paired t test over seeds, so on these examples, finds with 80% power;
            None for one seed.
        detectable_verdict: Smallest difference that a verdict finds with 80% power: by the sign-flip test, and with an
            interval over seeds and examples that excludes 0. None for fewer seeds than can carry a verdict.
        alpha: Level of the tests; the intervals hold 1 - alpha.
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
    detectable_verdict: float | None
    alpha: float = ALPHA

    @property
    def sentences(self) -> float:
        """The mean difference in examples of the evaluation split."""
        return self.difference * self.examples / 100


@dataclass(frozen=True)
class McNemar:
    """Two particular checkpoints on the same examples.

    Attributes:
        index: Which pair of seeds.
        only_arm: Examples that only the arm's checkpoint classified correctly.
        only_baseline: Examples that only the baseline's did.
        p_value: Exact and two-sided. Says nothing of other seeds.
    """

    index: int
    only_arm: int
    only_baseline: int
    p_value: float


def contrasts(pairs: Sequence[Pair], random: np.random.Generator, alpha: float = ALPHA) -> list[Contrast]:
    """Compare several pairs of arms that have the same number of seeds and examples.

    All use the same draws, so that a result does not depend on what else is compared.

    Args:
        pairs: What to compare.
        random: For the bootstrap and, with many seeds, the permutation test.
        alpha: Level of the tests and, as 1 - alpha, of the intervals.

    Raises:
        ValueError: If the shapes differ or are empty.
    """
    if not pairs:
        return []
    shape = pairs[0].correct_arm.shape
    for pair in pairs:
        given = pair.correct_arm.shape, pair.correct_baseline.shape
        if given != (shape, shape) or len(shape) != 2 or not pair.correct_arm.size:
            raise ValueError(f"expected two [S, N] arrays, got {given[0]} and {given[1]}")
    # Whole counts first: equal differences are then equal to the last digit.
    right = [(pair.correct_arm.sum(axis=1), pair.correct_baseline.sum(axis=1)) for pair in pairs]
    counts = np.stack([arm - baseline for arm, baseline in right])
    seeds, examples = shape
    p_values = sign_flip_p(100 * counts / examples, random)
    by_example = [pair.by_example for pair in pairs]
    intervals = crossed_bootstrap(by_example, random, alpha)
    found = []
    for place, pair in enumerate(pairs):
        differences = 100 * counts[place] / examples
        several = seeds > 1
        spread = (float(differences.std(ddof=1)) if np.ptp(counts[place]) else 0.0) if several else None
        interval = Interval(100 * intervals[place].low, 100 * intervals[place].high)
        detectable = detectable_effect(spread, seeds, alpha) if spread is not None else None
        for_verdict = None
        if spread is not None and seeds >= least_seeds(alpha):
            beyond_zero = (interval.high - interval.low) / 2 + 100 * crossed_error(by_example[place]) * _POWER_Z
            for_verdict = max(sign_flip_effect(seeds, alpha) * spread, beyond_zero)
        found.append(
            Contrast(
                arm=pair.arm,
                baseline=pair.baseline,
                seeds=seeds,
                examples=examples,
                differences=tuple(float(value) for value in differences),
                difference=float(differences.mean()),
                spread=spread,
                p_value=float(p_values[place]),
                p_holm=None,
                interval=interval,
                seed_interval=t_interval(differences, alpha) if several else None,
                effect_size=float(differences.mean()) / spread if spread else None,
                probability_better=probability_better(*right[place]),
                p_equivalence=equivalence_p(differences, EQUIVALENCE_MARGIN) if several else None,
                detectable=detectable,
                detectable_verdict=for_verdict,
                alpha=alpha,
            )
        )
    return found


def sign_flip_p(differences: Array, random: np.random.Generator) -> Array:
    """Two-sided p of each mean under random sign flips: exact up to 16 seeds, else 99,999 draws.

    Args:
        differences: `[C, S]`, paired differences.
        random: For the draws, which all comparisons share.

    Returns:
        `[C]`.
    """
    seeds = differences.shape[1]
    if seeds <= _EXACT_SEEDS:
        patterns = (np.arange(2**seeds)[:, None] >> np.arange(seeds)) & 1
        return _as_far(differences, patterns) / len(patterns)
    counts = np.zeros(len(differences))
    block = max(1, 4_000_000 // seeds)
    for start in range(0, _FLIPS, block):
        counts += _as_far(differences, random.integers(0, 2, size=(min(block, _FLIPS - start), seeds)))
    # A sampled test counts the observed pattern among the draws, so that p is never 0.
    return (counts + 1) / (_FLIPS + 1)


def _as_far(differences: Array, patterns: Array) -> Array:
    """How many patterns of flipped signs (1, else 0) bring each row's mean at least as far from 0 as it is, `[C]`."""
    signs = (1 - 2 * patterns).astype(np.float64)
    # Accuracies are whole counts: sums that differ by rounding alone are ties, and count as such.
    return np.array(
        [(np.abs(signs @ row) >= abs(row.sum()) - 1e-9 * np.abs(row).sum()).sum() for row in differences],
        dtype=np.float64,
    )


def crossed_bootstrap(
    differences: Sequence[Array], random: np.random.Generator, alpha: float = ALPHA, resamples: int = _RESAMPLES
) -> list[Interval]:
    """Percentile intervals of mean differences, seeds and examples resampled independently.

    Both are samples: of the training procedure's randomness, and of the sentences that there could
    have been. The pairing of arms is kept in both. Values may be graded, as differences in loss are.

    Args:
        differences: C arrays `[S, N]`, arm minus baseline by seed and example.
        random: For the resamples, which all comparisons share.
        alpha: The intervals hold 1 - alpha.
        resamples: How many.

    Returns:
        C intervals, in the unit of the differences.
    """
    seeds, examples = differences[0].shape
    # Several comparisons go through one product: thin ones only wait for memory.
    width = max(1, _COLUMNS // seeds)
    groups = [
        np.concatenate([table.T for table in differences[start : start + width]], axis=1).astype(np.float64)
        for start in range(0, len(differences), width)
    ]
    means = np.empty((len(differences), resamples))
    block = max(1, 4_000_000 // examples)
    for start in range(0, resamples, block):
        count = min(block, resamples - start)
        seed_counts = random.multinomial(seeds, np.full(seeds, 1 / seeds), size=count)
        example_counts = _resampled(examples, count, random)
        for place, group in enumerate(groups):
            # Whole counts once more: their sums are exact, whatever the order in which they are added.
            by_seed = (example_counts @ group).reshape(count, -1, seeds)
            sums = np.einsum("rcs,rs->cr", by_seed, seed_counts.astype(np.float64))
            means[place * width : (place + 1) * width, start : start + count] = sums / (seeds * examples)
    bounds = np.quantile(means, [alpha / 2, 1 - alpha / 2], axis=1)
    return [Interval(float(low), float(high)) for low, high in bounds.T]


def _resampled(examples: int, count: int, random: np.random.Generator) -> Array:
    """How often each example stands in each resample, float64 `[count, N]`."""
    drawn = random.integers(examples, size=(count, examples))
    drawn += np.arange(count)[:, None] * examples
    return np.bincount(drawn.ravel(), minlength=count * examples).reshape(count, examples).astype(np.float64)


def crossed_error(differences: Array) -> float:
    """Standard error of a mean whose seeds and examples are both samples, by analysis of variance.

    What is particular to one seed and one example is counted once here. The crossed bootstrap counts it up to three
    times (Owen 2007, The pigeonhole bootstrap): its intervals are too wide rather than too narrow. No bootstrap of
    crossed samples is exact (McCullagh 2000, Resampling and exchangeable arrays).

    Args:
        differences: `[S, N]`, at least two seeds.

    Returns:
        In the unit of the differences.
    """
    seeds, examples = differences.shape
    values = differences.astype(np.float64)
    by_seed, by_example, mean = values.mean(axis=1), values.mean(axis=0), values.mean()
    rest = ((values - mean) ** 2).sum()
    seed_square = examples * float(((by_seed - mean) ** 2).sum())
    example_square = seeds * float(((by_example - mean) ** 2).sum())
    seed_mean = seed_square / (seeds - 1)
    if examples == 1:
        return math.sqrt(seed_mean / seeds)
    example_mean = example_square / (examples - 1)
    rest_mean = max(0.0, rest - seed_square - example_square) / ((seeds - 1) * (examples - 1))
    # An estimate of a variance component may fall below 0: then the other one is all there is.
    return math.sqrt(max(seed_mean + example_mean - rest_mean, seed_mean, example_mean) / (seeds * examples))


def t_interval(differences: Array, alpha: float = ALPHA) -> Interval:
    """Student's interval of the mean over seeds, holding 1 - alpha; says nothing of other sentences."""
    low, high = DescrStatsW(differences).tconfint_mean(alpha)
    return Interval(float(low), float(high))


def equivalence_p(differences: Array, margin: float) -> float:
    """Two one-sided t tests: p that the mean lies outside +-margin points."""
    if np.ptp(differences) == 0:
        return 0.0 if abs(float(differences[0])) < margin else 1.0
    return float(DescrStatsW(differences).ttost_mean(-margin, margin)[0])


def mcnemar(correct_arm: Array, correct_baseline: Array, index: int) -> McNemar:
    """McNemar's exact test: are the examples that only one of two checkpoints gets right split evenly?

    Args:
        correct_arm: Bool `[N]`.
        correct_baseline: Bool `[N]`.
        index: Which pair of seeds.
    """
    only_arm = int((correct_arm & ~correct_baseline).sum())
    only_baseline = int((correct_baseline & ~correct_arm).sum())
    discordant = only_arm + only_baseline
    p_value = float(stats.binomtest(only_arm, discordant).pvalue) if discordant else 1.0
    return McNemar(index, only_arm, only_baseline, p_value)


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
