"""Fine-grained structured sparsity: N of every M consecutive keys."""

from __future__ import annotations

import torch
from torch import Tensor

from crisp_attention.rules.ranking import kth_largest, rescue, with_forced
from crisp_attention.rules.selection import Mask, Pairs, keep_count


def nm(pairs: Pairs, *, sparsity: float | Tensor, m: int, min_keep: int, forced: Tensor | None = None) -> Mask:
    """The best N of every M consecutive keys of each query.

    Keys are grouped by their place in the sequence, padding not counted: 0..M-1, M..2M-1, ... Of the n
    keys of a group that a query may attend to, `max(n - ceil(n * sparsity - 1/2), 1)` survive, the
    best-scoring ones and all that tie with the last of them. So 2:4 is sparsity 0.5 with m = 4, and a
    sparsity above 1 - 1/M realises 1 - 1/M. A query left with fewer than `min_keep` keys gets its best
    ones too. Monotone: a higher sparsity keeps a subset, but for what `min_keep` adds. A row never
    looks at another.

    Source: Dynamic N:M Fine-grained Structured Sparse Attention Mechanism, arXiv 2203.00091.

    Args:
        pairs: What there is to choose from.
        sparsity: Share of each group to remove, in [0, 1).
        m: Keys in a group.
        min_keep: Keys that each query keeps at least.
        forced: Bool `[B, 1, Q, K]`, pairs that rank before all others of their group.
    """

    def survivors(scores: Tensor) -> Tensor:
        batch, heads, queries, keys = pairs.shape
        groups = (keys + m - 1) // m
        position = pairs.key_position
        # Where each place of the sequence lies in memory: padding may stand between valid keys.
        reachable = torch.ones_like(position, dtype=torch.bool) if pairs.valid is None else _reachable(pairs.valid)
        place = torch.where(reachable, position, groups * m)
        memory = torch.full((batch, groups * m + 1), -1, dtype=torch.int64, device=scores.device)
        memory = memory.scatter(1, place, torch.arange(keys, device=scores.device).expand(batch, keys))[:, :-1]
        there = (memory >= 0)[:, None, None, :].expand(batch, 1, queries, -1)
        index = memory.clamp(min=0)[:, None, None, :]
        if pairs.valid is not None:
            there = there & pairs.valid.gather(-1, index.expand(batch, pairs.valid.shape[1], queries, -1))
        ranking = with_forced(scores, forced)
        grouped = ranking.gather(-1, index.expand(batch, heads, queries, -1)).unflatten(-1, (groups, m))
        there = there.unflatten(-1, (groups, m))
        keep = keep_count(there.sum(dim=-1, keepdim=True), sparsity).clamp(min=1)
        tau = kth_largest(grouped, there, keep, None).squeeze(-1)
        own = position.div(m, rounding_mode="floor").clamp(min=0)[:, None, None, :].expand(batch, heads, queries, -1)
        kept = (ranking < tau.gather(-1, own)).logical_not_()
        kept = kept if pairs.valid is None else kept & pairs.valid
        return rescue(kept, ranking, pairs.valid, min_keep)

    return Mask(survivors)


def _reachable(valid: Tensor) -> Tensor:
    return valid.any(dim=1).any(dim=1)
