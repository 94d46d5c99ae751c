"""Secondary outcomes of two arms, and the examples on which they disagree. No torch."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from crisp_attention.experiment import statistics
from crisp_attention.experiment.conclusions.outputs import ArmResult, shared
from crisp_attention.experiment.statistics import Array, Interval

OUTCOMES = {
    "nll": "nats",
    "brier": "squared distance, 0 to 2",
    "ece": "share",
    "ece_scaled": "share",
    "gap": "points",
    "seconds": "seconds",
}
"""Secondary outcomes and their units."""

MOST_FLIPS = 40

_BY_EXAMPLE = ("nll", "brier")


@dataclass(frozen=True)
class OutcomeContrast:
    """A secondary outcome of two arms over paired seeds.

    Attributes:
        arm, baseline: Names.
        outcome: One of `OUTCOMES`.
        unit: Of all values.
        seeds: Pairs compared, S.
        examples: Evaluation examples, N.
        mean_arm, mean_baseline: Over these seeds.
        differences: Arm minus baseline by seed, `S` values. Less is better in all but the gap, which narrows
            also where both accuracies fall.
        difference: Their mean.
        interval: Student's t over seeds; None for one seed.
        crossed: Crossed bootstrap over seeds and examples, for what has a value by example (nll, brier); else None.
        p_value: Two-sided sign-flip permutation test.
        p_holm: Adjusted over all secondary outcomes of all arms.
        alpha: The intervals hold 1 - alpha.
    """

    arm: str
    baseline: str
    outcome: str
    unit: str
    seeds: int
    examples: int
    mean_arm: float
    mean_baseline: float
    differences: tuple[float, ...]
    difference: float
    interval: Interval | None
    crossed: Interval | None
    p_value: float
    p_holm: float
    alpha: float


@dataclass(frozen=True)
class Flip:
    """An example of the evaluation split on which two arms disagree in most seeds.

    Attributes:
        row: Its place in the evaluation split.
        label: Its class.
        disagreement: Share of seeds in which exactly one of the two is right.
        arm_right, baseline_right: Share of seeds in which each is right.
        arm_probability, baseline_probability: Mean probability of the true class.
    """

    row: int
    label: str
    disagreement: float
    arm_right: float
    baseline_right: float
    arm_probability: float
    baseline_probability: float


@dataclass(frozen=True)
class _Comparison:
    """One outcome of two arms: its values by seed `[S]` and, where it has them, differences by example `[S, N]`."""

    arm: str
    outcome: str
    arm_values: Array
    baseline_values: Array
    by_example: Array | None

    @property
    def differences(self) -> Array:
        """Arm minus baseline, `[S]`."""
        found = self.arm_values - self.baseline_values
        # What rounding leaves of no difference is none: the same sign in all seeds would pass for evidence.
        found[np.abs(found) <= 1e-12 * (np.abs(self.arm_values) + np.abs(self.baseline_values))] = 0.0
        return found


def outcome_contrasts(
    arms: Iterable[ArmResult], baseline: ArmResult, seeds: int, alpha: float, random_seed: int
) -> tuple[OutcomeContrast, ...]:
    """Compare every arm with the baseline in every secondary outcome.

    Args:
        arms: All but the baseline.
        baseline: What they are compared with.
        seeds: How many seeds count, from the first.
        alpha: The intervals hold 1 - alpha.
        random_seed: Of the generators, one for each number of pairs.
    """
    by_shape: dict[tuple[int, int], list[_Comparison]] = {}
    for arm in arms:
        if pairs := shared(arm, baseline, seeds):
            examples = len(arm.outputs[pairs[0]].labels)
            by_shape.setdefault((len(pairs), examples), []).extend(
                _comparison(arm, baseline, pairs, name) for name in OUTCOMES
            )
    compared: list[tuple[_Comparison, int, float, Interval | None]] = []
    for shape, members in by_shape.items():
        random = np.random.default_rng([random_seed, *shape])
        p_values = statistics.sign_flip_p(np.stack([item.differences for item in members]), random)
        tables = [item.by_example for item in members if item.by_example is not None]
        crossed = iter(statistics.crossed_bootstrap(tables, random, alpha))
        compared += [
            (item, shape[1], float(p), None if item.by_example is None else next(crossed))
            for item, p in zip(members, p_values, strict=True)
        ]
    adjusted = statistics.holm(np.array([p for _, _, p, _ in compared]))
    return tuple(
        OutcomeContrast(
            arm=item.arm,
            baseline=baseline.name,
            outcome=item.outcome,
            unit=OUTCOMES[item.outcome],
            seeds=len(item.arm_values),
            examples=examples,
            mean_arm=float(item.arm_values.mean()),
            mean_baseline=float(item.baseline_values.mean()),
            differences=tuple(item.differences.tolist()),
            difference=float(item.differences.mean()),
            interval=statistics.t_interval(item.differences, alpha) if len(item.differences) > 1 else None,
            crossed=crossed_interval,
            p_value=p_value,
            p_holm=float(p_holm),
            alpha=alpha,
        )
        for (item, examples, p_value, crossed_interval), p_holm in zip(compared, adjusted, strict=True)
    )


def _comparison(arm: ArmResult, baseline: ArmResult, pairs: list[int], name: str) -> _Comparison:
    values = [
        (side.gaps if name == "gap" else getattr(side, name))[np.isin(side.indexes, pairs)] for side in (arm, baseline)
    ]
    by_example = None
    if name in _BY_EXAMPLE:
        tables = [np.stack([getattr(side.outputs[index], name) for index in pairs]) for side in (arm, baseline)]
        by_example = tables[0] - tables[1]
    return _Comparison(arm.name, name, values[0], values[1], by_example)


def flips(arm: ArmResult, baseline: ArmResult, seeds: int) -> tuple[Flip, ...]:
    """The examples on which two arms disagree in most seeds, the most disputed first; at most 40.

    Args:
        arm: One arm.
        baseline: The other.
        seeds: How many seeds count, from the first.
    """
    pairs = shared(arm, baseline, seeds)
    if not pairs:
        return ()

    def stacked(side: ArmResult, name: str) -> Array:
        return np.stack([getattr(side.outputs[index], name) for index in pairs])

    arm_right, baseline_right = stacked(arm, "correct"), stacked(baseline, "correct")
    disagreement = (arm_right != baseline_right).mean(axis=0)
    certainty = np.stack([stacked(side, "probability").mean(axis=0) for side in (arm, baseline)])
    rows = np.flatnonzero(disagreement > 0.5)
    # Of equally disputed ones those first on which the arms are furthest apart.
    order = np.lexsort((rows, -np.abs(certainty[0] - certainty[1])[rows], -disagreement[rows]))
    classes = arm.records[pairs[0]].classes
    labels = arm.outputs[pairs[0]].labels
    return tuple(
        Flip(
            row=int(row),
            label=classes[labels[row]],
            disagreement=float(disagreement[row]),
            arm_right=float(arm_right[:, row].mean()),
            baseline_right=float(baseline_right[:, row].mean()),
            arm_probability=float(certainty[0, row]),
            baseline_probability=float(certainty[1, row]),
        )
        for row in rows[order][:MOST_FLIPS]
    )
