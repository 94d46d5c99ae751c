"""Finding the k-th best of many: what rules and the reference backend share.

All functions run along the last dimension and leave gradients to their callers.
"""

from __future__ import annotations

import torch
from torch import Tensor

from crisp_attention import eager


def kth_largest(values: Tensor, pool: Tensor | None, k: Tensor, bound: int | None) -> Tensor:
    """The k-th largest of the last dimension's pool, with a k that differs by row.

    Args:
        values: Float, any shape `[..., N]`.
        pool: Bool, broadcastable to `values`: the entries to choose among; None for all.
        k: Int64 `[..., 1]`, broadcastable.
        bound: No k is larger; None if that is not known.

    Returns:
        `[..., 1]`: +inf for k = 0, -inf where k exceeds the pool.
    """
    # A compiled graph should serve every length, and ONNX knows no quickselect.
    if bound is None or eager.in_graph():
        return _kth_by_sorting(values, pool, k)
    size = values.shape[-1]
    if bound == 0:
        return torch.full_like(values[..., :1], torch.inf)
    if pool is not None:
        # Quickselect wants one k for all rows: a row whose k is smaller gets as many entries of
        # +inf, in places outside its pool, as it lacks. There are always enough, since `bound - k`
        # never exceeds the number of those places.
        outside = ~pool
        lacking = outside & (outside.cumsum(dim=-1) <= bound - k)
        filler = torch.where(lacking, torch.inf, -torch.inf).to(values.dtype)
        values = torch.where(pool, values, filler)
    return values.kthvalue(size - bound + 1, dim=-1, keepdim=True).values


def _kth_by_sorting(values: Tensor, pool: Tensor | None, k: Tensor) -> Tensor:
    if pool is not None:
        values = values.masked_fill(~pool, -torch.inf)
    shape = torch.broadcast_shapes(values.shape[:-1], k.shape[:-1])
    k = k.expand(*shape, 1)
    ordered = values.sort(dim=-1, descending=True).values.expand(*shape, -1)
    return ordered.gather(-1, (k - 1).clamp(min=0)).masked_fill(k == 0, torch.inf)


def kth_best_key(ranking: Tensor, valid: Tensor | None, k: int) -> Tensor:
    """The k-th largest ranking among each query's valid keys, `[..., 1]`; -inf where it has fewer."""
    if valid is not None:
        ranking = ranking.masked_fill(~valid, -torch.inf)
    k = min(k, ranking.shape[-1])
    return ranking.amax(-1, keepdim=True) if k == 1 else ranking.topk(k, dim=-1).values[..., -1:]


def with_forced(ranking: Tensor, forced: Tensor | None) -> Tensor:
    """The ranking with forced pairs before all others."""
    return ranking if forced is None else torch.where(forced, torch.inf, ranking)


def rescue(keep: Tensor, ranking: Tensor, valid: Tensor | None, min_keep: int) -> Tensor:
    """Give queries that keep fewer than `min_keep` keys their best ones; leave all others alone.

    Args:
        keep: Bool `[B, H, Q, K]`, only valid pairs.
        ranking: Float, same shape.
        valid: Bool, broadcastable; None if all pairs are valid.
        min_keep: Keys wanted, as far as the query has valid ones.
    """
    best = ranking >= kth_best_key(ranking, valid, min_keep)
    if valid is not None:
        best = best & valid
    return keep | (best & (keep.sum(dim=-1, keepdim=True) < min_keep))
