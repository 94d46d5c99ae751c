"""The forms in which a rule tells a backend which scores survive.

A rule says *what* survives, a backend computes it. `Pairs` describes what there is to choose from,
`Threshold` what to choose; neither holds a score, so that a backend is free never to store them.

Letters: B batch, H heads, Q queries, K keys.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor


@dataclass(frozen=True)
class Pairs:
    """The (query, key) pairs of one attention call.

    Attributes:
        shape: (B, H, Q, K).
        device: Where the scores live.
        valid: Bool `[B, 1 | H, Q, K]`, True where the model's masks allow the pair; None if all are.
        query_valid: Bool `[B, Q]`, True for queries that are not padding; None if all are. The rows
            of padded queries are computed like any other but counted nowhere.
        causal: Whether later keys are hidden from earlier queries (`valid` says so too).
    """

    shape: tuple[int, int, int, int]
    device: torch.device
    valid: Tensor | None = None
    query_valid: Tensor | None = None
    causal: bool = False

    @property
    def counted(self) -> Tensor | None:
        """Bool `[B, 1 | H, Q, K]`: valid pairs of valid queries; None if every pair counts."""
        if self.query_valid is None:
            return self.valid
        rows = self.query_valid[:, None, :, None]
        return rows.expand(-1, 1, -1, self.shape[3]) if self.valid is None else self.valid & rows

    @property
    def valid_per_row(self) -> Tensor:
        """Int64 `[B, 1 | H, Q, 1]`: valid keys of each query, padded queries included."""
        batch, _, queries, keys = self.shape
        if self.valid is None:
            return torch.full((batch, 1, queries, 1), keys, device=self.device)
        return self.valid.sum(dim=-1, keepdim=True)

    @property
    def counted_per_head(self) -> Tensor:
        """Int64 `[B, 1 | H, 1, 1]`: counted pairs of each head's matrix."""
        batch, _, queries, keys = self.shape
        if self.counted is None:
            return torch.full((batch, 1, 1, 1), queries * keys, device=self.device)
        return self.counted.sum(dim=(-2, -1), keepdim=True)


@dataclass(frozen=True)
class Threshold:
    """Survivors are the valid pairs with `ranking >= tau`; the backend finds tau.

    In each scope (a head's matrix or a query's row), tau is the `keep`-th largest ranking value of
    the pool. All pairs that tie with tau survive: deterministic and independent of order. A tau
    above a query's `min_keep`-th best valid key is lowered to it, for that query alone.

    Attributes:
        scope: "matrix" (one tau per head and example) or "row" (one per query).
        keep: Int64 `[B, 1 | H, 1 | Q, 1]`, survivors wanted per scope; where it exceeds the pool,
            every valid pair of the scope survives.
        keep_bound: No entry of `keep` is larger. Known without reading `keep`, so no device sync.
        pool: Bool `[B, 1 | H, Q, K]`, the pairs among which tau is found; None for all.
        min_keep: Keys that a query keeps whatever tau says.
        ranking: Float `[B, H, Q, K]` ranked in place of the attention scores, or None for those.
    """

    scope: Literal["matrix", "row"]
    keep: Tensor
    keep_bound: int
    pool: Tensor | None
    min_keep: int
    ranking: Tensor | None = None


def keep_count(pairs: Tensor, sparsity: float) -> Tensor:
    """Survivors among `pairs` pairs: the count whose sparsity is nearest to the requested one.

    Half-way cases keep the pair. Computed in float64 by one formula, so that every backend and
    device agrees to the last pair.

    Args:
        pairs: Int64 counts, any shape.
        sparsity: Requested share of removed pairs, in [0, 1).

    Returns:
        Int64, same shape, between 0 and `pairs`.
    """
    removed = torch.ceil(pairs.to(torch.float64) * sparsity - 0.5).clamp_(min=0)
    return pairs - removed.to(torch.int64)


def keep_bound(pairs: int, sparsity: float) -> int:
    """`keep_count` of one Python integer: the largest count of any scope with at most `pairs` pairs."""
    return pairs - max(0, math.ceil(pairs * sparsity - 0.5))
