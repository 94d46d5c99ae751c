"""Masks as `torch.nn` writes them, brought to the operator's: which pairs are valid, and a bias.

Letters: B batch, H heads, Q queries, K keys.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from crisp_attention.config import SparsityConfig
from crisp_attention.errors import ConfigurationError
from crisp_attention.masks import LOWEST_BIAS, causal_refusal, one_way, read_pairs, require_two_ways
from crisp_attention.rules import Pairs


def multihead_masks(
    shape: tuple[int, int, int, int],
    device: torch.device,
    *,
    attn_mask: Tensor | None,
    key_padding_mask: Tensor | None,
    cross: bool,
    extra_keys: int = 0,
) -> tuple[Pairs, Tensor | None]:
    """Read the masks of `nn.MultiheadAttention`, whose bool masks say True = hidden.

    Args:
        shape: (B, H, Q, K), without extra keys.
        device: Where the scores will live.
        attn_mask: Bool, or float added to the scores: `[Q, K]` or `[B * H, Q, K]`.
        key_padding_mask: The same: `[B, K]`.
        cross: Whether queries and keys come from two different sequences.
        extra_keys: Keys of the module itself that are appended and always visible.

    Returns:
        The pairs and a finite bias, extra keys included.

    Raises:
        ConfigurationError: If a mask has the wrong shape or dtype.
    """
    batch, heads, queries, keys = shape
    expected = {"attn_mask": ((queries, keys), (batch * heads, queries, keys)), "key_padding_mask": ((batch, keys),)}
    valid: Tensor | None = None
    bias: Tensor | None = None
    for name, mask in (("attn_mask", attn_mask), ("key_padding_mask", key_padding_mask)):
        if mask is None:
            continue
        if mask.shape not in expected[name] or not (mask.dtype == torch.bool or mask.is_floating_point()):
            shapes = " or ".join(str(list(wanted)) for wanted in expected[name])
            raise ConfigurationError(f"{name} must be bool or float {shapes}, got {list(mask.shape)} {mask.dtype}.")
        if name == "key_padding_mask":
            full = mask[:, None, None, :]
        else:
            full = mask[None, None] if mask.dim() == 2 else mask.view(batch, heads, queries, keys)
        if mask.dtype == torch.bool:
            valid = ~full if valid is None else valid & ~full
        else:
            full = additive(full)
            bias = full if bias is None else bias + full
    pairs, bias = read_pairs(shape, device, valid=valid, bias=bias, cross=cross)
    if not extra_keys:
        return pairs, bias
    if bias is not None:
        bias = F.pad(bias.expand(*bias.shape[:-1], keys), (0, extra_keys))
    valid = None if pairs.valid is None else F.pad(pairs.valid, (0, extra_keys), value=True)
    wider = (batch, heads, queries, keys + extra_keys)
    return Pairs(wider, device, valid, pairs.query_valid, cross=cross), bias


def additive(mask: Tensor) -> Tensor:
    """An additive mask with -inf wherever it hides a pair, however it writes that."""
    return mask.masked_fill(mask <= LOWEST_BIAS, -torch.inf)


def require_servable(config: SparsityConfig | None, pairs: Pairs, *, causal: bool = False, extra_keys: int = 0) -> None:
    """Refuse a rule that would make results depend on what a query must not see.

    Args:
        config: The settings in force; None is dense.
        pairs: The pairs of a call.
        causal: Whether the caller says that its mask is causal.
        extra_keys: As in `multihead_masks`.

    Raises:
        ConfigurationError: If the rule looks at other rows where information flows one way, or where
            nobody knows which queries are padding; or goes by position where keys have none.
    """
    if config is None:
        return
    if extra_keys and config.by_position:
        raise ConfigurationError(
            f"These settings (rule {config.rule!r}) go by the place of keys in the sequence, which the keys that "
            "add_bias_kv and add_zero_attn append do not have. Use rule='topk' without keep_self."
        )
    if config.per_row:
        return
    if causal or (pairs.cross and pairs.valid is not None and one_way(pairs.valid)):
        raise causal_refusal(config)
    require_two_ways(config, pairs)
    if pairs.cross and pairs.query_valid is None and pairs.shape[0] > 1:
        raise ConfigurationError(
            f"Rule {config.rule!r} decides over several queries at once, and nothing says which queries of this "
            "cross-attention are padding, so results would depend on it. Use rule='topk', or leave the layer out "
            "with layers=... or exclude=...."
        )
