"""Correctness of made-up arms, and the statistics of one contrast alone."""

from __future__ import annotations

import itertools
from fractions import Fraction

import numpy as np
from hypothesis import strategies as st

from crisp_attention.experiment.statistics import (
    Pair,
    contrasts,
    paired,
)


def generator(seed=0):
    return np.random.default_rng(seed)


def contrast(arm, baseline, correct_arm, correct_baseline, random, **settings):
    (found,) = contrasts([Pair(arm, baseline, correct_arm, correct_baseline)], random, **settings)
    return found


def sign_flip_p(differences, random):
    (found,) = paired.sign_flip_p(differences[None], random)
    return found


def crossed_bootstrap(arm, baseline, random, **settings):
    (found,) = paired.crossed_bootstrap([100 * (arm.astype(float) - baseline.astype(float))], random, **settings)
    return found


def matrix(correct, examples):
    """Bool `[S, N]` with the given number of correct examples per seed."""
    return np.arange(examples)[None, :] < np.asarray(correct)[:, None]


@st.composite
def matrices(draw, least_seeds=1):
    shape = draw(st.integers(least_seeds, 8)), draw(st.integers(1, 30))
    random = generator(draw(st.integers(0, 10**6)))
    rates = draw(st.sampled_from([(0.5, 0.5), (0.8, 0.9), (0.3, 0.9), (1.0, 0.5), (1.0, 1.0)]))
    return tuple(random.random(shape) < rate for rate in rates)


def brute_force(counts):
    """Share of all sign patterns whose sum is at least as far from 0, in whole numbers."""
    sums = [abs(sum(pattern)) for pattern in itertools.product(*((count, -count) for count in counts))]
    return Fraction(sum(total >= abs(sum(counts)) for total in sums), len(sums))
