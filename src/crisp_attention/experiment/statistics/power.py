"""What a design can find, how many seeds a finding needs, and what planned looks cost."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from statsmodels.stats.power import TTestPower

ALPHA = 0.05
POWER = 0.8

_COARSE = 10
"""Up to so many seeds the sign-flip test needs a larger effect than a t test."""

_DRAWS = 4000

MIN_SEEDS = 6
"""Below this no two-sided sign-flip test can reach p < .05: its smallest p is 2 / 2^S."""


@dataclass(frozen=True)
class Look:
    """One of several planned looks at growing data.

    Attributes:
        number: Which look, from 1; 0 before the first.
        planned: Numbers of seeds at all looks.
        complete: Pairs of seeds done so far.
        alpha: Level of the tests at each look: 5% shared equally.
    """

    number: int
    planned: tuple[int, ...]
    complete: int
    alpha: float

    @property
    def seeds(self) -> int:
        """Seeds that this look is at; 0 before the first."""
        return self.planned[self.number - 1] if self.number else 0


def look_at(planned: Sequence[int], complete: int) -> Look:
    """The last planned look that the data have reached.

    Looks share the 5% equally (Bonferroni), which bounds the chance that any of them errs.

    Args:
        planned: Numbers of seeds at the looks, rising.
        complete: Seeds 0, 1, ... whose pairs are all done.
    """
    reached = sum(seeds <= complete for seeds in planned)
    return Look(reached, tuple(planned), complete, ALPHA / len(planned))


def smallest_p(seeds: int) -> float:
    """Smallest p of a two-sided sign-flip test: all seeds agree."""
    return float(min(1.0, 2 / 2**seeds))


def least_seeds(alpha: float = ALPHA) -> int:
    """Fewest seeds at which a two-sided sign-flip test can reach p < alpha."""
    return next(seeds for seeds in range(1, 64) if smallest_p(seeds) < alpha)


def detectable_effect(spread: float, seeds: int, alpha: float = ALPHA) -> float:
    """Smallest mean difference that a paired t test finds with 80% power.

    Args:
        spread: Standard deviation of the paired differences, points.
        seeds: Pairs, at least 2.
        alpha: Level of the test, two-sided.

    Returns:
        Points.
    """
    size = TTestPower().solve_power(effect_size=None, nobs=seeds, alpha=alpha, power=POWER)
    return float(np.squeeze(size)) * spread


@functools.cache
def sign_flip_effect(seeds: int, alpha: float = ALPHA) -> float:
    """Smallest mean of normal differences, in their standard deviations, that the sign-flip test finds with 80% power.

    With few seeds the test can tell fewer outcomes apart than a t test and needs more: at six, all must agree.

    Args:
        seeds: Pairs; infinity below `least_seeds(alpha)`.
        alpha: Level of the test, two-sided.
    """
    if seeds < least_seeds(alpha):
        return math.inf
    alike = float(np.squeeze(TTestPower().solve_power(effect_size=None, nobs=seeds, alpha=alpha, power=POWER)))
    if seeds > _COARSE:
        return alike
    # An integral over normal differences, by always the same draws of them.
    noise = np.random.default_rng(0).normal(size=(_DRAWS, seeds))
    signs = (1.0 - 2 * ((np.arange(2**seeds) >> np.arange(seeds)[:, None]) & 1))[:, : 2 ** (seeds - 1)]

    def power(size: float) -> float:
        differences = noise + size
        # Half of the patterns stand for all: the other half has the same sums with the other sign.
        as_far = np.abs(differences @ signs) >= np.abs(differences.sum(axis=1, keepdims=True)) * (1 - 1e-9)
        return float((as_far.mean(axis=1) < alpha).mean())

    low, high = alike / 2, 2 * alike
    while high - low > 1e-3:
        middle = (low + high) / 2
        low, high = (middle, high) if power(middle) < POWER else (low, middle)
    return high


def seeds_needed(effect: float, spread: float, alpha: float = ALPHA) -> int:
    """Pairs that a paired t test needs to find a difference with 80% power.

    Args:
        effect: Points, above 0.
        spread: Standard deviation of the paired differences, points.
        alpha: Level of the test, two-sided.

    Returns:
        At least `least_seeds(alpha)`.
    """
    lowest = highest = least_seeds(alpha)
    while spread and _power(effect / spread, highest, alpha) < POWER:
        lowest, highest = highest, 2 * highest
    # The least number with the power, by bisection: statsmodels' own search for it fails far out.
    while lowest < highest:
        middle = (lowest + highest) // 2
        if _power(effect / spread, middle, alpha) < POWER:
            lowest = middle + 1
        else:
            highest = middle
    return highest


def _power(size: float, seeds: int, alpha: float) -> float:
    power = float(TTestPower().power(size, nobs=seeds, alpha=alpha))
    # Far out the noncentral t has no number any more: the effect is then found always.
    return 1.0 if math.isnan(power) else power
