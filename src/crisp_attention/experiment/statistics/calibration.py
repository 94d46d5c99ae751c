"""How far predicted probabilities can be trusted: scores by example, calibration error, temperature.

Letters: S seeds, N examples, C classes. Everything is in nats or in shares of 1, not in points.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.special import log_softmax, softmax

from crisp_attention.experiment.statistics.paired import Array

BINS = 15
"""Bins of equal mass in a calibration error."""

_LOG_TEMPERATURE = np.log(20.0)
_STEPS = 30


@dataclass(frozen=True)
class ReliabilityBin:
    """Predictions of like confidence.

    Attributes:
        confidence: Mean probability of the predicted class.
        accuracy: Share of correct predictions.
        count: Predictions in the bin.
    """

    confidence: float
    accuracy: float
    count: int


def nll(logits: Array, labels: Array) -> Array:
    """Negative log-likelihood of each example, nats.

    Args:
        logits: `[..., N, C]`.
        labels: Int `[N]`.

    Returns:
        `[..., N]`.
    """
    return np.asarray(-log_softmax(logits.astype(np.float64), axis=-1)[..., np.arange(len(labels)), labels])


def brier(logits: Array, labels: Array) -> Array:
    """Brier score of each example: squared distance to the true class, summed over classes; 0 to 2.

    Args:
        logits: `[..., N, C]`.
        labels: Int `[N]`.

    Returns:
        `[..., N]`.
    """
    distance = softmax(logits.astype(np.float64), axis=-1)
    distance[..., np.arange(len(labels)), labels] -= 1
    return np.asarray((distance**2).sum(axis=-1))


def confidence(logits: Array) -> Array:
    """Probability of the predicted class, `[..., N, C]` -> `[..., N]`."""
    return np.asarray(softmax(logits.astype(np.float64), axis=-1).max(axis=-1))


def reliability(confidences: Array, correct: Array, bins: int = BINS) -> tuple[ReliabilityBin, ...]:
    """The reliability curve in bins of equal mass, least confident first.

    Args:
        confidences: `[M]`.
        correct: Bool `[M]`.
        bins: How many; fewer if there are fewer predictions.
    """
    counts, confidence_sums, correct_sums = _binned(confidences, correct, bins)
    return tuple(
        ReliabilityBin(float(confidence), float(accuracy), int(count))
        for confidence, accuracy, count in zip(confidence_sums / counts, correct_sums / counts, counts, strict=True)
    )


def calibration_error(confidences: Array, correct: Array, bins: int = BINS) -> float:
    """Expected calibration error: mean gap between confidence and accuracy over bins of equal mass.

    Args:
        confidences: `[N]`.
        correct: Bool `[N]`.
        bins: How many.
    """
    _, confidence_sums, correct_sums = _binned(confidences, correct, bins)
    return float(np.abs(confidence_sums - correct_sums).sum() / len(confidences))


def _binned(confidences: Array, correct: Array, bins: int) -> tuple[Array, Array, Array]:
    """Counts, sums of confidence and numbers of correct predictions in bins of equal mass."""
    order = np.argsort(confidences, kind="stable")
    bins = min(bins, len(order))
    # The first bins are the larger ones where the predictions cannot be shared evenly.
    counts = np.full(bins, len(order) // bins) + (np.arange(bins) < len(order) % bins)
    starts = np.cumsum(counts) - counts
    confidence_sums, correct_sums = (
        np.add.reduceat(values[order].astype(np.float64), starts) for values in (confidences, correct)
    )
    return counts, confidence_sums, correct_sums


def temperature(logits: Array, labels: Array) -> Array:
    """The temperature that makes the labels most likely, between 1/20 and 20.

    The likelihood has one maximum in 1/T: its slope is followed by bisection. Where every prediction is
    right (or every one wrong) the limit itself is best.

    Args:
        logits: `[S, N, C]`.
        labels: Int `[N]`.

    Returns:
        `[S]`; logits are to be divided by it.
    """
    # Classes first: sums over them are then sums of long rows. The largest logit is 0: no exponential overflows.
    values = np.ascontiguousarray(np.moveaxis(logits, -1, 0), dtype=np.float64)
    values -= values.max(axis=0)
    true = values[labels, :, np.arange(len(labels))].mean(axis=0)
    low, high = np.full(len(logits), -_LOG_TEMPERATURE), np.full(len(logits), _LOG_TEMPERATURE)
    for _ in range(_STEPS):
        middle = (low + high) / 2
        weights = np.exp(values * np.exp(-middle)[:, None])
        expected = ((weights * values).sum(axis=0) / weights.sum(axis=0)).mean(axis=1)
        hotter = expected > true
        low, high = np.where(hotter, middle, low), np.where(hotter, high, middle)
    return np.asarray(np.exp((low + high) / 2))


def rescaled(logits: Array, labels: Array, random: np.random.Generator) -> Array:
    """Logits after temperature scaling by cross-fitting.

    The examples are split into two random halves. Each half is divided by the temperature that was fitted on the
    other, so that no example is judged by a temperature that has seen its label.

    Args:
        logits: `[S, N, C]`.
        labels: Int `[N]`.
        random: Draws the halves, which all seeds share.

    Returns:
        `[S, N, C]`, float64; unchanged where there is one example.
    """
    scaled = logits.astype(np.float64)
    order = random.permutation(len(labels))
    halves = order[::2], order[1::2]
    if len(labels) > 1:
        for judged, fitted in (halves, halves[::-1]):
            scaled[:, judged] /= temperature(logits[:, fitted], labels[fitted])[:, None, None]
    return scaled
