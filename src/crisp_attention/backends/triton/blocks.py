"""Which blocks of keys each block of queries keeps, from sums of vectors instead of a matrix of scores.

The mean of a block's scores is the product of the two blocks' summed vectors, over its pairs. Sums of so few numbers
of half or single precision are exact in float64 unless they differ widely in size, whatever the order in which a
device adds them; so blocks that tie in the reference do so here.
"""

from __future__ import annotations

import torch
from torch import Tensor

from crisp_attention.backends.triton.tiles import Plan
from crisp_attention.rules.ranking import kth_largest
from crisp_attention.rules.selection import Blocks, keep_count


def by_key_alone(valid: Tensor | None) -> bool:
    """Whether a mask says the same of all queries, told by its strides so that nobody waits for the device."""
    return valid is None or all(valid.shape[dim] == 1 or valid.stride(dim) == 0 for dim in (1, 2))


def choose(query: Tensor, key: Tensor, scale: float, form: Blocks, valid: Tensor | None) -> Tensor:
    """The blocks of keys that survive for each block of queries: bool `[B, H, count[0], count[1]]`.

    Args:
        query: `[B, H, Q, D]`.
        key: `[B, Hkv, K, D]`.
        scale: Factor on q.k.
        form: The blocks.
        valid: Bool `[B, 1, Q, K]`, by key alone; None for all.
    """
    of_key = form.key_block if valid is None else form.key_block.masked_fill(~valid[:, 0, 0], -1)
    query_sums, queries = _pool(query, form.query_block, form.count[0])
    key_sums, keys = _pool(key, of_key, form.count[1])
    key_sums = key_sums.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    pairs = queries[:, None, :, None] * keys[:, None, None, :]
    ranking = (query_sums @ key_sums.transpose(-2, -1)) * scale / pairs.clamp(min=1)
    there = pairs > 0
    wanted = keep_count(there.sum(dim=-1, keepdim=True), form.sparsity).clamp(min=1)
    return (ranking < kth_largest(ranking, there, wanted, None)).logical_not_() & there


def tiles_of(form: Blocks, chosen: Tensor, split: Plan) -> Tensor:
    """The tiles that hold a chosen block or a query in no block: int8 `[B, H, rows of tiles, columns of tiles]`."""
    rows = _blocks_of_tiles(form.query_block, split.rows, form.count[0])
    columns = _blocks_of_tiles(form.key_block, split.columns, form.count[1])
    touched = rows[:, None, :, 1:] @ chosen.float() @ columns[:, None, :, 1:].transpose(-2, -1) > 0
    return (touched | (rows[:, None, :, :1] > 0)).to(torch.int8)


def _pool(vectors: Tensor, block: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Sums of the vectors of each block, float64 `[B, H, count, D]`, and how many there are, `[B, count]`."""
    batch, heads, length, width = vectors.shape
    # A slot in front for tokens in no block.
    slot = (block + 1 + torch.arange(batch, device=block.device)[:, None] * (count + 1)).flatten()
    sums = torch.zeros(batch * (count + 1), heads * width, dtype=torch.float64, device=block.device)
    sums.index_add_(0, slot, vectors.transpose(1, 2).reshape(batch * length, heads * width).double())
    members = torch.zeros(batch * (count + 1), dtype=torch.int64, device=block.device)
    members.index_add_(0, slot, torch.ones_like(slot))
    sums = sums.view(batch, count + 1, heads, width)[:, 1:].transpose(1, 2)
    return sums, members.view(batch, count + 1)[:, 1:]


def _blocks_of_tiles(block: Tensor, side: int, count: int) -> Tensor:
    """1.0 where a tile of `side` tokens holds one of a block, `[B, tiles, 1 + count]`; first of no block at all."""
    batch, length = block.shape
    tiles = -(-length // side)
    tile = torch.arange(length, device=block.device).expand(batch, -1) // side
    held = torch.zeros(batch, tiles * (count + 1), device=block.device)
    held.scatter_(1, tile * (count + 1) + block + 1, 1.0)
    return held.view(batch, tiles, count + 1)
