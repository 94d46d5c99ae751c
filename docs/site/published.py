"""The published studies, analysed once, and comparisons in them that their reports do not make."""

from __future__ import annotations

from functools import cache

import numpy as np
from tables import RESULTS

from crisp_attention.experiment import statistics
from crisp_attention.experiment.conclusions.analysis import Analysis, analyse, pair_of
from crisp_attention.experiment.conclusions.outputs import named
from crisp_attention.experiment.results.store import Store
from crisp_attention.experiment.statistics import Contrast, Pair


@cache
def analysis_of(name: str) -> Analysis:
    """A published study."""
    return analyse(Store(RESULTS / name))


def pair_between(analysis: Analysis, condition: str, arm: str, other: str) -> Pair:
    """What two arms of a study got right in one of its conditions."""
    arms = analysis.by_condition[condition]
    found = pair_of(named(arms, arm), named(arms, other), analysis.spec.seeds)
    assert found is not None, f"no seed has finished both {arm} and {other}"
    return found


def contrast_between(analysis: Analysis, condition: str, arm: str, other: str) -> Contrast:
    """One arm against another that is not the baseline."""
    pair = pair_between(analysis, condition, arm, other)
    return statistics.contrasts([pair], np.random.default_rng(0), statistics.ALPHA)[0]
