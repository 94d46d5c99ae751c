"""One difference over several studies: the same arms on other data sets."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

import numpy as np
from scipy import stats

from crisp_attention.experiment.statistics.paired import Array, Interval, crossed_error, sign_flip_p
from crisp_attention.experiment.statistics.power import ALPHA


@dataclass(frozen=True)
class PooledDifference:
    """An arm's mean difference from another over several studies, each of which weighs alike.

    Attributes:
        seeds: Pairs of all studies.
        difference: In points; of a slope, points per unit.
        interval: For these data sets, their seeds and examples both samples: Student's t on the crossed standard
            errors by analysis of variance. Narrower than the bootstrap of single studies, which errs on the wide side.
        p_value: Sign-flip permutation test over all pairs.
        over_studies: For other data sets, of which these are a sample: Student's t over the studies. None for one.
        alpha: The intervals hold 1 - alpha.
    """

    seeds: int
    difference: float
    interval: Interval
    p_value: float
    over_studies: Interval | None
    alpha: float


def pooled(by_example: Sequence[Array], random: np.random.Generator, alpha: float = ALPHA) -> PooledDifference:
    """Average a difference over studies that share no examples, and of their seeds only the numbers.

    Args:
        by_example: From each study `[S, N]`, S at least 2: what a seed and an example add to the difference, in shares.
        random: For the permutation test, if there are many pairs.
        alpha: The intervals hold 1 - alpha.
    """
    by_seed = [100 * table.mean(axis=1) for table in by_example]
    by_study = [float(differences.mean()) for differences in by_seed]
    difference = fmean(by_study)
    error = 100 * math.hypot(*map(crossed_error, by_example)) / len(by_example)
    width = error * float(stats.t.ppf(1 - alpha / 2, sum(len(own) - 1 for own in by_seed)))
    over_studies = None
    if len(by_study) > 1:
        critical = float(stats.t.ppf(1 - alpha / 2, len(by_study) - 1))
        wider = critical * stdev(by_study) / math.sqrt(len(by_study))
        over_studies = Interval(difference - wider, difference + wider)
    # A study of few seeds weighs as much as one of many.
    weighed = np.concatenate([differences / len(differences) for differences in by_seed])
    return PooledDifference(
        seeds=len(weighed),
        difference=difference,
        interval=Interval(difference - width, difference + width),
        p_value=float(sign_flip_p(weighed[None], random)[0]),
        over_studies=over_studies,
        alpha=alpha,
    )
