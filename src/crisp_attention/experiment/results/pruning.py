"""When a trial is given up: the median stopping rule, as limits that are known before the trial begins.

Limits follow from the trials before it alone, so that an interrupted trial is given up after the same epoch as one that
was not, whoever trains it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

STARTUP_TRIALS = 5
"""Trials that are trained to their end before any is given up."""


def limits(earlier: Sequence[Sequence[float]], epochs: int) -> tuple[float, ...]:
    """The most that a trial's loss may be, epoch by epoch, if it is to go on.

    The median of what the trials before it had after the same epoch (Golovin et al., Google Vizier, 2017, and
    Optuna's `MedianPruner`).

    Args:
        earlier: Validation losses by epoch of the trials that were trained to their end.
        epochs: Of each trial; after the last there is nothing to give up.

    Returns:
        One for each epoch but the last; empty while there are fewer than `STARTUP_TRIALS`.
    """
    if len(earlier) < STARTUP_TRIALS:
        return ()
    return tuple(float(np.percentile([losses[epoch] for losses in earlier], 50)) for epoch in range(epochs - 1))


def exceeded(losses: Sequence[float], limits: Sequence[float]) -> bool:
    """Whether a trial is to be given up now: the best of its losses so far is above the limit of this epoch.

    Args:
        losses: Validation losses by epoch, one or more.
        limits: What `limits` gave.
    """
    epoch = len(losses) - 1
    return epoch < len(limits) and min(losses) > limits[epoch]
