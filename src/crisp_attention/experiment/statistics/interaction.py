"""Does the difference between two arms change along a property of the data? A linear trend per seed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from crisp_attention.experiment.statistics.paired import Array, Interval, crossed_bootstrap, sign_flip_p, t_interval
from crisp_attention.experiment.statistics.power import ALPHA


@dataclass(frozen=True)
class Interaction:
    """How the difference between two arms follows what is varied.

    Attributes:
        arm, baseline: Names.
        factor: What is varied, "train_examples" or "label_noise".
        unit: The step that the slope is per.
        conditions: Names of the conditions.
        values: The factor in each condition.
        seeds: Pairs that are complete in every condition, S.
        examples: Evaluation examples, N.
        differences: Mean difference in each condition over these seeds, points.
        slopes: Least-squares slope of the difference, by seed, points per unit; `S` values.
        slope: Their mean.
        interval: Crossed bootstrap over seeds and examples, which are the same in every condition.
        seed_interval: Student's t over seeds alone: "on these N examples". None for one seed.
        p_value: Two-sided sign-flip permutation test on the mean slope.
        p_holm: Adjusted over the interactions of all other arms; None for the primary one.
        alpha: Level of the test; the interval holds 1 - alpha.
    """

    arm: str
    baseline: str
    factor: str
    unit: str
    conditions: tuple[str, ...]
    values: tuple[float, ...]
    seeds: int
    examples: int
    differences: tuple[float, ...]
    slopes: tuple[float, ...]
    slope: float
    interval: Interval
    seed_interval: Interval | None
    p_value: float
    p_holm: float | None
    alpha: float


SCALES: dict[str, tuple[str, Callable[[Array], Array]]] = {
    "train_examples": ("doubling of the training examples", np.log2),
    "label_noise": ("10 points of label noise", lambda share: share * 10),
}
"""What is varied -> the step that a slope is per, and the values in such steps."""


def slopes(positions: Array, differences: Array) -> Array:
    """Least-squares slope of each row.

    Args:
        positions: `[K]`, at least two different ones.
        differences: `[S, K]`.

    Returns:
        `[S]`, in units of the differences per unit of position.
    """
    centred, square = _centred(positions)
    changes = differences - differences[:, :1]
    products = changes @ centred
    # What rounding leaves of no slope at all is no slope: the same sign in all seeds would pass for evidence.
    products[np.abs(products) <= 1e-9 * (np.abs(changes) @ np.abs(centred))] = 0.0
    return np.asarray(products / square)


def slopes_by_example(positions: Array, by_example: Array) -> Array:
    """What each seed and example adds to the mean slope.

    Args:
        positions: `[K]`, at least two different ones.
        by_example: `[K, S, N]`.

    Returns:
        `[S, N]`, whose mean over N is the slope of each seed.
    """
    centred, square = _centred(positions)
    return np.asarray(np.tensordot(centred / square, by_example, axes=1))


def _centred(positions: Array) -> tuple[Array, float]:
    """Positions from their mean `[K]`, and the sum of their squares: what a least-squares slope is made with."""
    centred = positions - positions.mean()
    return centred, float(centred @ centred)


def linear_trends(
    by_example: Mapping[str, Array],
    baseline: str,
    factor: str,
    conditions: Mapping[str, float],
    random: np.random.Generator,
    alpha: float = ALPHA,
) -> list[Interaction]:
    """Test whether differences have a linear trend over the log of a train size or over a noise share.

    All arms use the same draws, so that a result does not depend on what else is tested.

    Args:
        by_example: By arm, all of one shape `[K, S, N]`, by condition, seed and evaluation example: 1 where the arm
            alone is right, -1 where the baseline alone is.
        baseline: Name.
        factor: A key of `SCALES`.
        conditions: The factor in each condition, by the condition's name.
        random: For the bootstrap and, with many seeds, the permutation test.
        alpha: Level of the test.
    """
    unit, scale = SCALES[factor]
    positions = scale(np.array(list(conditions.values())))
    differences = [100 * table.sum(axis=2).T / table.shape[2] for table in by_example.values()]
    by_seed = np.stack([slopes(positions, own) for own in differences])
    p_values = sign_flip_p(by_seed, random)
    tables = [100 * slopes_by_example(positions, table) for table in by_example.values()]
    intervals = crossed_bootstrap(tables, random, alpha)
    return [
        Interaction(
            arm=arm,
            baseline=baseline,
            factor=factor,
            unit=unit,
            conditions=tuple(conditions),
            values=tuple(conditions.values()),
            seeds=tables[place].shape[0],
            examples=tables[place].shape[1],
            differences=tuple(differences[place].mean(axis=0).tolist()),
            slopes=tuple(by_seed[place].tolist()),
            slope=float(by_seed[place].mean()),
            interval=intervals[place],
            seed_interval=t_interval(by_seed[place], alpha) if len(by_seed[place]) > 1 else None,
            p_value=float(p_values[place]),
            p_holm=None,
            alpha=alpha,
        )
        for place, arm in enumerate(by_example)
    ]
