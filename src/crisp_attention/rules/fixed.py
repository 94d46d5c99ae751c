"""Structure without content: which keys survive is known before any score is."""

from __future__ import annotations

from torch import Tensor

from crisp_attention.errors import ConfigurationError
from crisp_attention.rules.selection import Pairs, Threshold
from crisp_attention.rules.threshold import topk


def window(
    pairs: Pairs,
    *,
    sparsity: float | Tensor | None = None,
    window: int | None = None,
    stride: int | None = None,
    min_keep: int,
    forced: Tensor | None = None,
) -> Threshold:
    """The nearest keys of each query, by distance in tokens, padding not counted.

    With `sparsity`: as many as `topk` would keep, the nearest first; of two keys equally far away the
    earlier one. This is the control of equal density. Monotone: a higher sparsity keeps a subset.

    With `window`: all keys with |i - j| <= window, so 2 * window + 1 in the middle of a bidirectional
    sequence and window + 1 in a causal one; with `stride` also all keys whose distance is a multiple
    of it. Monotone: a smaller window keeps a subset. A query left with fewer than `min_keep` keys is
    filled up with the nearest others.

    Source: Longformer, arXiv 2004.05150; the strides: Sparse Transformers, arXiv 1904.10509.

    Args:
        pairs: What there is to choose from.
        sparsity: Share of each row's keys to remove, in [0, 1); or
        window: the distance up to which keys survive.
        stride: Distance whose multiples survive too.
        min_keep: Keys that each query keeps at least.
        forced: Bool `[B, 1, Q, K]`, pairs that survive whatever their distance.
    """
    signed = pairs.key_position[:, None, None, :] - pairs.query_position[:, None, :, None]
    distance = signed.abs()
    nearness = -(2 * distance + (signed > 0)).float()
    if sparsity is not None:
        return topk(pairs, sparsity=sparsity, min_keep=min_keep, forced=forced, ranking=nearness)
    if window is None:
        raise ConfigurationError("Rule 'window' needs a sparsity or a window.")
    within = distance <= window
    if stride is not None:
        within = within | (distance % stride == 0)
    if forced is not None:
        within = within | forced
    keep = pairs.valid_per_row.clamp(max=min_keep)
    bound = min(min_keep, pairs.shape[3])
    return Threshold("row", keep, bound, pairs.valid, min_keep, nearness, forced=within)
