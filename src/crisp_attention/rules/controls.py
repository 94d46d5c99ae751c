"""Rules that make a claim about content testable: as sparse as the others, but blind to the scores."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from crisp_attention.errors import ConfigurationError
from crisp_attention.rules.selection import Pairs, Threshold
from crisp_attention.rules.threshold import percentile, topk


def random(
    pairs: Pairs,
    *,
    sparsity: float,
    min_keep: int,
    count_padding: bool = False,
    scope: Literal["matrix", "row"] = "row",
    stream: Tensor,
    vary_in_batch: bool,
) -> Threshold:
    """As many pairs as `topk` (scope "row") or `percentile` ("matrix") would keep, drawn uniformly.

    The ranking is noise, a hash of the stream, the head and the two positions (counted over valid
    tokens), so it needs no state, does not touch torch's global random stream and is the same
    whatever the padding.

    Args:
        pairs: What there is to choose from.
        sparsity: Share of pairs to remove, in [0, 1).
        min_keep: Keys that each query keeps at least.
        count_padding: As in `topk` and `percentile`.
        scope: Whose count to match.
        stream: Int64 scalar tensor; equal streams give equal masks.
        vary_in_batch: Draw anew for each example of the batch (training). False (evaluation) gives
            all examples the same draw, so that results do not depend on batch mates.
    """
    rule = topk if scope == "row" else percentile
    noise = _noise(pairs, stream, vary_in_batch)
    return rule(pairs, sparsity=sparsity, min_keep=min_keep, count_padding=count_padding, ranking=noise)


def _noise(pairs: Pairs, stream: Tensor, vary_in_batch: bool) -> Tensor:
    """Uniform float32 noise on a grid of 2^24 values, `[B, H, Q, K]`."""
    batch, heads, queries, keys = pairs.shape
    key_position, query_position = _positions(pairs)
    head = torch.arange(heads, device=pairs.device).view(1, heads, 1, 1)
    stream = stream.to(pairs.device)
    state = _mix((stream ^ (stream >> 32)) & 0xFFFFFFFF)
    if vary_in_batch:
        state = _mix(state ^ torch.arange(1, batch + 1, device=pairs.device).view(batch, 1, 1, 1))
    state = _mix(state ^ head)
    state = _mix(state ^ query_position[:, None, :, None])
    state = _mix(state ^ key_position[:, None, None, :])
    return (state >> 8).to(torch.float32).expand(batch, heads, queries, keys)


def _positions(pairs: Pairs) -> tuple[Tensor, Tensor]:
    """Positions of keys `[B, K]` and queries `[B, Q]`, padding not counted.

    Where there are as many queries as keys, they are the same tokens. A causal query that comes with
    a cache of earlier keys stands after all the keys that it may attend to but itself.

    Raises:
        ConfigurationError: If queries and keys are different tokens, so that a query's position, and
            with it the same draw under another padding, cannot be known.
    """
    batch, _, queries, keys = pairs.shape
    if pairs.valid is None:
        key_position = torch.arange(keys, device=pairs.device).expand(batch, keys)
    else:
        key_position = pairs.valid.any(dim=1).any(dim=1).cumsum(dim=-1) - 1
    if queries == keys:
        return key_position, key_position
    if not (pairs.causal or queries == 1):
        raise ConfigurationError(
            f"Rule 'random' draws by position, which {queries} queries over {keys} keys (cross-attention) do not have."
        )
    return key_position, pairs.valid_per_row[:, 0, :, 0].expand(batch, queries) - 1


def _mix(state: Tensor) -> Tensor:
    """A bijective 32-bit integer hash held in int64 (no product exceeds 63 bits).

    Two rounds of xor-shift-multiply with the well-known multiplier 0x45d9f3b, and a last xor-shift.
    """
    for _ in range(2):
        state = ((state ^ (state >> 16)) * 0x45D9F3B) & 0xFFFFFFFF
    return state ^ (state >> 16)
