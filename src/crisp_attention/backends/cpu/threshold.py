"""The level at which the k best of many floats are told from the rest, found by counting.

Counting how many values are not below a level reads them once, at the speed of memory; a handful of well-chosen
levels is enough. Levels come from the normal distribution with the values' mean and deviation, then from linear
interpolation, and where that stalls (ties, odd distributions) from bisection on the floats' bits, which ends.
"""

from __future__ import annotations

import math

import numpy as np
from numba import uint32

from crisp_attention.backends.cpu.compiling import compiled
from crisp_attention.backends.cpu.scoring import count_not_below, moments

_PATIENCE = 10  # levels tried by interpolation before bisection takes over


def memory_of_levels():
    """Scratch of `level_of`: one element as float32 and as uint32, and the quantile that was asked for last."""
    element = np.empty(1, np.float32)
    return element, element.view(np.uint32), np.full(4, -1.0)


@compiled
def level_of(values, start, count, k, memory):
    """The highest level that at least k values are not below, or one with exactly k of them.

    Either way the survivors `not value < level` are those of the k-th largest value. NaN counts as the largest.

    Args:
        values: Float32 `[...]`.
        start: Where they begin.
        count: How many, a multiple of `PANEL`; -inf stands for those that are none.
        k: None survive for 0, all (-inf) if there are no more than k above -inf.
        memory: Of `memory_of_levels`.

    Returns:
        Float32.
    """
    low, high = np.float32(-np.inf), np.float32(np.inf)
    if k <= 0:
        return high
    if k >= count:
        return low
    number, total, squares = moments(values, start, count)
    if number == 0:  # none, or none whose square is finite
        return _by_bisection(values, start, count, k, low, high, memory)
    at_low, at_high = count, np.int64(0)
    last = memory[2]
    if last[0] != k or last[1] != number:
        z = _upper_quantile(min(max((k - 0.5) / number, 1e-6), 1.0 - 1e-6))
        last[0], last[1], last[2], last[3] = k, number, z, number * math.exp(-0.5 * z * z) / math.sqrt(2.0 * math.pi)
    mean = total / number
    deviation = math.sqrt(max(squares / number - mean * mean, 0.0))
    level = np.float32(mean + last[2] * deviation)
    slope = deviation / last[3]  # of the level by the count
    for attempt in range(_PATIENCE):
        if not (low < level < high):
            break
        found = count_not_below(values, start, count, level)
        if found == k:
            return level
        if found > k:
            low, at_low = level, found
        else:
            high, at_high = level, found
        if np.isinf(low) or np.isinf(high):
            level = np.float32(level + (found - k) * slope * (1.0 + attempt))
        else:
            level = np.float32(low + (high - low) * ((at_low - k) / (at_low - at_high)))
            if level <= low or level >= high:
                level = np.float32(0.5 * low + 0.5 * high)
    return _by_bisection(values, start, count, k, low, high, memory)


@compiled
def lowest_not_below(values, start, count, level):
    """The lowest value that is not below a level: the threshold itself, for values beside those it was found among.

    -inf stays, as it says that everything survives.
    """
    if level == -np.inf:
        return level
    lowest = np.float32(np.inf)
    for at in range(start, start + count):
        if level <= values[at] < lowest:
            lowest = values[at]
    return lowest


@compiled
def _by_bisection(values, start, count, k, low, high, memory):
    """As `level_of`, between two levels of which the lower one is known to be low enough."""
    if np.isinf(high) and count_not_below(values, start, count, high) >= k:
        return high
    below, above = _ordered(low, memory), _ordered(high, memory)
    while above - below > 1:
        middle = below + (above - below) // 2
        level = _float_of(middle, memory)
        found = count_not_below(values, start, count, level)
        if found == k:
            return level
        if found > k:
            below = middle
        else:
            above = middle
    return _float_of(below, memory)


@compiled
def _ordered(value, memory):
    """A whole number that orders floats as they are ordered."""
    floats, integers, _ = memory
    floats[0] = value
    raw = np.int64(integers[0])
    return raw if raw < 2**31 else np.int64(2**31) - raw


@compiled
def _float_of(ordered, memory):
    floats, integers, _ = memory
    integers[0] = uint32(ordered if ordered >= 0 else np.int64(2**31) - ordered)
    return floats[0]


@compiled
def _upper_quantile(share):
    """The z that a standard normal variable exceeds with this probability, to about 5e-4.

    Source: Abramowitz and Stegun, Handbook of Mathematical Functions, 26.2.23.
    """
    tail = min(share, 1.0 - share)
    t = math.sqrt(-2.0 * math.log(tail))
    z = t - (2.515517 + t * (0.802853 + t * 0.010328)) / (1.0 + t * (1.432788 + t * (0.189269 + t * 0.001308)))
    return z if share < 0.5 else -z
