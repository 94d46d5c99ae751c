"""The forms in which a rule tells a backend which scores survive.

A rule says *what* survives, a backend computes it. `Pairs` describes what there is to choose from,
a `Selection` what to choose, in one of four forms:

- `Threshold`: survivors score at least tau, found by rank within a head's matrix or a query's row.
- `Blocks`: the best blocks of keys for each block of queries.
- `Mask`: a function of the scores, for what fits neither; it needs all scores of a row at once.
- `Normalizer`: another function in place of the softmax; nothing is removed beforehand.

No form holds a score, so that a backend is free never to store them.

Letters: B batch, H heads, Q queries, K keys.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from crisp_attention.errors import ConfigurationError


@dataclass(frozen=True)
class Pairs:
    """The (query, key) pairs of one attention call.

    Attributes:
        shape: (B, H, Q, K).
        device: Where the scores live.
        valid: Bool `[B, 1 | H, Q, K]`, True where the model's masks allow the pair; None if all are.
        query_valid: Bool `[B, Q]`, True for queries that are not padding; None if all are. The rows
            of padded queries are computed like any other but counted nowhere.
        causal: Whether who calls is causal, so that queries are the last of the keys' tokens. What is hidden, `valid`
            alone says.
        cross: Whether queries and keys come from two different sequences.
        first: Place of the first example in a batch whose others are with other processes, so that no two
            examples of it draw the same random pairs.
    """

    shape: tuple[int, int, int, int]
    device: torch.device
    valid: Tensor | None = None
    query_valid: Tensor | None = None
    causal: bool = False
    cross: bool = False
    first: int = 0

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
        # In 32 bits first, which takes a third of the time.
        return self.valid.sum(dim=-1, keepdim=True, dtype=torch.int32).long()

    @property
    def counted_per_head(self) -> Tensor:
        """Int64 `[B, 1 | H, 1, 1]`: counted pairs of each head's matrix."""
        batch, _, queries, keys = self.shape
        counted = self.counted
        if counted is None:
            return torch.full((batch, 1, 1, 1), queries * keys, device=self.device)
        return counted.sum(dim=(-2, -1), keepdim=True)

    @property
    def key_position(self) -> Tensor:
        """Int64 `[B, K]`: place of each key among those that some query may attend to, from 0.

        A key that none may attend to (padding) has the place of the last one before it, -1 if there
        is none.
        """
        batch, _, _, keys = self.shape
        if self.valid is None:
            return torch.arange(keys, device=self.device).expand(batch, keys)
        return self.valid.any(dim=1).any(dim=1).cumsum(dim=-1) - 1

    @property
    def query_position(self) -> Tensor:
        """Int64 `[B, Q]`: place of each query among the keys.

        Where there are as many queries as keys, they are the same tokens. A query that comes with a
        cache of earlier keys stands at the last key that it may attend to: itself.

        Raises:
            ConfigurationError: If queries and keys are different sequences, so that a query has no
                place among the keys.
        """
        _, _, queries, keys = self.shape
        if self.cross or not (queries == keys or self.causal or queries == 1):
            raise ConfigurationError(
                f"This rule goes by a query's place among the keys, which {queries} queries over {keys} keys of "
                "another sequence (cross-attention) do not have. Leave such layers out (layers=...) or use "
                "a rule that goes by scores, as topk."
            )
        position = self.key_position
        if queries == keys:
            return position
        if self.valid is None:
            return position[:, keys - queries :]
        return position[:, None, :].masked_fill(~self.valid.any(dim=1), -1).amax(dim=-1)


@dataclass(frozen=True)
class Threshold:
    """Survivors are the valid pairs with `ranking >= tau`; the backend finds tau.

    In each scope (a head's matrix or a query's row), tau is the `keep`-th largest ranking value of
    the pool. All pairs that tie with tau survive: deterministic and independent of order. A tau
    above a query's `min_keep`-th best valid key is lowered to it, for that query alone. NaN ranks
    above all and no tau removes it, so that scores that diverge show; a removed pair of a `ranking`
    of its own is not looked at.

    Attributes:
        scope: "matrix" (one tau per head and example) or "row" (one per query).
        keep: Int64 `[B, 1 | H, 1 | Q, 1]`, survivors wanted per scope; where it exceeds the pool,
            every valid pair of the scope survives.
        keep_bound: No entry of `keep` is larger. Known without reading `keep`, so no device sync;
            None where it is not known (a sparsity that lives on the device, a count left to chance).
        pool: Bool `[B, 1 | H, Q, K]`, the pairs among which tau is found; None for all.
        min_keep: Keys that a query keeps whatever tau says.
        ranking: Float `[B, 1 | H, Q, K]` ranked in place of the attention scores, or None for those.
        largest: Rank the lowest scores first if False.
        forced: Bool `[B, 1, Q, K]`, pairs that rank before all others; they count toward `keep`.
    """

    scope: Literal["matrix", "row"]
    keep: Tensor
    keep_bound: int | None
    pool: Tensor | None
    min_keep: int
    ranking: Tensor | None = None
    largest: bool = True
    forced: Tensor | None = None


@dataclass(frozen=True)
class Blocks:
    """Survivors are the valid pairs in the best key blocks of each query block.

    A block of queries ranks blocks of keys by the mean of their valid scores. It keeps, of the n
    that have a valid pair with it, the best `keep_count(n, sparsity)`, at least one; ties at the
    last place all survive. A query left with fewer than `min_keep` keys gets its best ones.

    Attributes:
        query_block: Int64 `[B, Q]`, the block of each query; padded queries hold -1, in none.
        key_block: Int64 `[B, K]`, the block of each key; keys that nobody may attend to hold -1.
        count: How many blocks of queries and of keys there are at most.
        sparsity: Share of blocks to remove, in [0, 1).
        min_keep: Keys that each query keeps at least.
        forced: Bool `[B, 1, Q, K]`, pairs whose blocks rank before all others.
    """

    query_block: Tensor
    key_block: Tensor
    count: tuple[int, int]
    sparsity: float | Tensor
    min_keep: int
    forced: Tensor | None = None


@dataclass(frozen=True)
class Mask:
    """Survivors are what a function of the final scores says.

    Attributes:
        survivors: Scores `[B, H, Q, K]`, -inf at invalid pairs, to a bool mask of the same shape.
            Runs without gradients.
    """

    survivors: Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Normalizer:
    """Another function in place of the softmax.

    Attributes:
        normalize: Scores `[B, H, Q, K]` and bool valid pairs (None if all are) to weights that are
            zero at invalid pairs and sum to one over the valid keys of each query that has any.
            Differentiable.
        removes: Whether a weight of zero is a removed pair. False where it can only be underflow.
    """

    normalize: Callable[[Tensor, Tensor | None], Tensor]
    removes: bool


@dataclass(frozen=True)
class Selection:
    """What one attention call keeps.

    Attributes:
        form: Which scores survive.
        heads: Bool `[H]`, the heads that it applies to, the others being dense; None for all.
        straight_through: Let gradients reach the scores as if attention were dense.
    """

    form: Threshold | Blocks | Mask | Normalizer
    heads: Tensor | None = None
    straight_through: bool = False


def keep_count(pairs: Tensor, sparsity: float | Tensor) -> Tensor:
    """Survivors among `pairs` pairs: the count whose sparsity is nearest to the requested one.

    Half-way cases keep the pair, as far as the float64 product of count and sparsity is half-way (50
    times 0.07 is above 3.5 there). One formula, so that every backend and device agrees to the last
    pair.

    Args:
        pairs: Int64 counts, any shape.
        sparsity: Requested share of removed pairs, in [0, 1).

    Returns:
        Int64, same shape, between 0 and `pairs`.
    """
    removed = torch.ceil(pairs.to(torch.float64) * sparsity - 0.5).clamp(min=0)
    return pairs - removed.to(torch.int64)


def keep_bound(pairs: int, sparsity: float | Tensor) -> int | None:
    """`keep_count` of one Python integer: the largest count of any scope with at most `pairs` pairs.

    None where the sparsity is a tensor: reading it would wait for the device, or break a graph.
    """
    return None if isinstance(sparsity, Tensor) else pairs - max(0, math.ceil(pairs * sparsity - 0.5))


def forced_pairs(pairs: Pairs, keep_first: int, keep_self: bool) -> Tensor | None:
    """The pairs that survive whatever they score: bool `[B, 1, Q, K]`, or None if there are none.

    Args:
        pairs: What there is to choose from.
        keep_first: How many keys at the beginning of the sequence, padding not counted.
        keep_self: Whether each query keeps its own key.
    """
    if not keep_first and not keep_self:
        return None
    batch, _, queries, keys = pairs.shape
    key_position = pairs.key_position[:, None, None, :]
    forced = (key_position < keep_first).expand(batch, 1, queries, keys)
    if keep_self:
        own = key_position == pairs.query_position[:, None, :, None]
        if queries == keys:  # not by place, which padding shares with the token before it
            own = torch.eye(queries, dtype=torch.bool, device=pairs.device)
        forced = forced | own
    return forced if pairs.valid is None else forced & pairs.valid.any(dim=1, keepdim=True)
