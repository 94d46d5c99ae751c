"""Structured sparsity that hardware likes: whole blocks of keys for whole blocks of queries."""

from __future__ import annotations

import torch
from torch import Tensor

from crisp_attention.rules.selection import Blocks, Pairs


def block_topk(
    pairs: Pairs,
    *,
    sparsity: float | Tensor,
    query_block: int,
    key_block: int,
    min_keep: int,
    forced: Tensor | None = None,
) -> Blocks:
    """The best blocks of keys of each block of queries.

    Queries and keys are cut into blocks by their place in the sequence, padding not counted; the last
    block may be smaller. A block of queries scores a block of keys by the mean of the valid scores
    between them. Of the n blocks of keys with a valid score it keeps the best
    `max(n - ceil(n * sparsity - 1/2), 1)` and all that tie with the last of them. A query left with
    fewer than `min_keep` keys gets its best ones too, and so does padding, which is in no block.
    Monotone: a higher sparsity keeps a subset, but for what `min_keep` adds.

    Queries of one block decide together, so causal models need `query_block=1`.

    Source: block-sparse attention as in SeerAttention, arXiv 2410.13276; there a gate that is learned
    predicts what is computed here.

    Args:
        pairs: What there is to choose from.
        sparsity: Share of each query block's key blocks to remove, in [0, 1).
        query_block: Queries in a block.
        key_block: Keys in a block.
        min_keep: Keys that each query keeps at least.
        forced: Bool `[B, 1, Q, K]`, pairs whose blocks rank before all others.
    """
    batch, _, queries, keys = pairs.shape
    if query_block == 1:
        of_query = torch.arange(queries, device=pairs.device).expand(batch, queries)
    else:
        of_query = pairs.query_position.clamp(min=0) // query_block
    if pairs.query_valid is not None:
        of_query = of_query.masked_fill(~pairs.query_valid, -1)
    of_key = pairs.key_position.clamp(min=0) // key_block
    if pairs.valid is not None:
        of_key = of_key.masked_fill(~pairs.valid.any(dim=1).any(dim=1), -1)
    if torch.compiler.is_exporting():
        # An exported graph serves lengths that it was not traced with: a number of blocks would be built in.
        count = (max(queries, keys), keys)
    else:
        # A query with a cache stands late in the sequence, so its block's number is bounded by the keys.
        last = queries if query_block == 1 else max(queries, keys)
        count = ((last + query_block - 1) // query_block, (keys + key_block - 1) // key_block)
    return Blocks(of_query, of_key, count, sparsity, min_keep, forced)
