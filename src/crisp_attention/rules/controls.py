"""Rules that make a claim about content testable: as sparse as the others, but blind or contrary."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from crisp_attention import noise
from crisp_attention.rules.ranking import with_forced
from crisp_attention.rules.selection import Pairs, Threshold
from crisp_attention.rules.threshold import percentile, topk


def random(
    pairs: Pairs,
    *,
    sparsity: float | Tensor,
    min_keep: int,
    forced: Tensor | None = None,
    count_padding: bool = False,
    scope: Literal["matrix", "pair", "row"] = "row",
    stream: Tensor,
    vary_in_batch: bool,
) -> Threshold:
    """As many pairs as `topk` (scope "row") or `percentile` ("matrix") would keep, drawn uniformly.

    With scope "pair", each pair is removed with probability `sparsity`, independently of all others,
    so that the count is left to chance: DropKey (Li et al., arXiv 2208.02646), which drops in training
    only. A query left with fewer than `min_keep` keys gets the first of the draw.

    The ranking is noise, a hash of the stream, the head and the two positions (counted over valid
    tokens), so it needs no state, does not touch torch's global random stream and is the same
    whatever the padding. Monotone: a higher sparsity keeps a subset of the same draw.

    Args:
        pairs: What there is to choose from.
        sparsity: Share of pairs to remove, or the probability of each to be removed, in [0, 1).
        min_keep: Keys that each query keeps at least.
        forced: Bool `[B, 1, Q, K]`, pairs that are drawn before all others.
        count_padding: As in `topk` and `percentile`; nothing is counted with scope "pair".
        scope: Whose count to match, or "pair" for a draw of each pair alone.
        stream: Int64 scalar tensor; equal streams give equal masks.
        vary_in_batch: Draw anew for each example of the batch (training). False (evaluation) gives
            all examples the same draw, so that results do not depend on batch mates.
    """
    drawn = _noise(pairs, stream, vary_in_batch)
    if scope == "pair":
        return _each_alone(pairs, drawn, sparsity, min_keep, forced)
    rule = topk if scope == "row" else percentile
    return rule(pairs, sparsity=sparsity, min_keep=min_keep, forced=forced, count_padding=count_padding, ranking=drawn)


def bottomk(pairs: Pairs, *, sparsity: float | Tensor, min_keep: int, forced: Tensor | None = None) -> Threshold:
    """The worst keys of each query: as many as `topk` keeps, from the other end.

    With n valid keys in a row and `keep` as in `topk`, S_ij survives iff it is at most the row's
    keep-th smallest score. Monotone: a higher sparsity keeps a subset. A row never looks at another.

    Args:
        pairs: What there is to choose from.
        sparsity: Share of each row's keys to remove, in [0, 1).
        min_keep: Keys that each query keeps at least.
        forced: Bool `[B, 1, Q, K]`, pairs that rank before all others.
    """
    return topk(pairs, sparsity=sparsity, min_keep=min_keep, forced=forced, largest=False)


def drop_topk(pairs: Pairs, *, drop: int, min_keep: int, forced: Tensor | None = None) -> Threshold:
    """All but the best `drop` keys of each query.

    With n valid keys in a row, the `max(n - drop, min(min_keep, n))` lowest scores survive, and all
    that tie with the highest of them. Monotone: a higher `drop` keeps a subset. A row never looks at
    another.

    Args:
        pairs: What there is to choose from.
        drop: How many of the best keys each query loses.
        min_keep: Keys that each query keeps at least, the lowest-scoring ones.
        forced: Bool `[B, 1, Q, K]`, pairs that are never dropped.
    """
    valid, keys = pairs.valid_per_row, pairs.shape[3]
    keep = (valid - drop).maximum(valid.clamp(max=min_keep))
    bound = min(max(keys - drop, min_keep), keys)
    return Threshold("row", keep, bound, pairs.valid, min_keep, largest=False, forced=forced)


def _each_alone(
    pairs: Pairs, drawn: Tensor, sparsity: float | Tensor, min_keep: int, forced: Tensor | None
) -> Threshold:
    """The pairs whose noise is not among the lowest share, as a threshold on it: each row keeps as many as it has."""
    # A whole number, so that the comparison in fp32 is exact.
    lowest = torch.ceil(torch.as_tensor(sparsity, dtype=torch.float64) * noise.LEVELS)
    survives = with_forced(drawn, forced) >= lowest
    if pairs.valid is not None:
        survives = survives & pairs.valid
    keep = survives.sum(dim=-1, keepdim=True).maximum(pairs.valid_per_row.clamp(max=min_keep))
    return Threshold("row", keep, None, pairs.valid, min_keep, drawn, forced=forced)


def _noise(pairs: Pairs, stream: Tensor, vary_in_batch: bool) -> Tensor:
    """Uniform float32 noise: whole numbers below 2^24, `[B, H, Q, K]`."""
    batch, heads, queries, keys = pairs.shape
    state = noise.fold(stream.to(pairs.device))
    if vary_in_batch:
        example = torch.arange(pairs.first + 1, pairs.first + batch + 1, dtype=torch.int32, device=pairs.device)
        state = noise.mix(state ^ example.view(batch, 1, 1, 1))
    state = noise.mix(state ^ torch.arange(heads, dtype=torch.int32, device=pairs.device).view(1, heads, 1, 1))
    drawn = noise.pairwise(state, pairs.query_position[:, None, :, None], pairs.key_position[:, None, None, :])
    return drawn.to(torch.float32).expand(batch, heads, queries, keys)
