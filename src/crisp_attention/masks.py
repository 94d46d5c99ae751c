"""Masks in every form people write them, brought to the pairs that may be attended to and a finite bias.

And what a mask says of the tokens: which of them are padding, whether later ones are hidden from earlier
ones, whether several texts share a row.

Letters: B batch, H heads, Q queries, K keys.
"""

from __future__ import annotations

import torch
from torch import Tensor

from crisp_attention import eager
from crisp_attention.config import SparsityConfig
from crisp_attention.errors import ConfigurationError
from crisp_attention.rules import Pairs

LOWEST_BIAS = -9e3
"""An additive mask hides a pair from here down: people write -inf, -1e9, or -1e4 (which bf16 rounds up)."""


_COMPILED_REFUSAL = (
    "This rule decides over several queries at once, but the mask hides later tokens from earlier ones, or packs "
    "several texts into a row. Use rule='topk', which looks at one query at a time."
)


def read_pairs(
    shape: tuple[int, int, int, int],
    device: torch.device,
    *,
    valid: Tensor | None = None,
    query_valid: Tensor | None = None,
    bias: Tensor | None = None,
    causal: bool = False,
    cross: bool = False,
) -> tuple[Pairs, Tensor | None]:
    """Bring the masks of one call to the pairs that it may attend to and a finite bias.

    Args:
        shape: (B, H, Q, K).
        device: Where the scores will live.
        valid: As in `attention`.
        query_valid: As in `attention`; not derived from `valid` if `cross`.
        bias: As in `attention`.
        causal: As in `attention`.
        cross: Whether queries and keys come from two different sequences.

    Raises:
        ConfigurationError: If a mask has the wrong shape or dtype.
    """
    valid = _read_valid(valid, shape)
    bias, unmasked = _read_bias(bias, shape)
    if unmasked is not None:
        valid = _read_valid(unmasked if valid is None else valid & unmasked, shape)
    return _pairs(shape, device, valid, query_valid, causal, cross), bias


def padding_from_pairs(valid: Tensor, queries: int) -> Tensor | None:
    """Which queries of a self-attention call are not padding, from its pair mask.

    A position that no query may attend to is padding. Queries are the last of the keys' positions, unless nobody sees
    the last one and they do not all see the same, as where a cache has room behind the text: their places are not
    known then, and a query that may attend to nothing is padding.

    Args:
        valid: Bool `[B, 1 | H, Q, K]`.
        queries: Q.

    Returns:
        Bool `[B, Q]`, or None where there are more queries than keys (then nothing is known).
    """
    keys = valid.shape[-1]
    if queries > keys:
        return None
    seen = valid.any(dim=1)
    by_place = seen.any(dim=1)[:, keys - queries :]
    if queries == keys:
        return by_place
    room = ~seen[:, :, -1].any()
    if queries > 1:
        room = room & (seen != seen[:, :1]).flatten(1).any(dim=1, keepdim=True)
    return torch.where(room, seen.any(dim=2), by_place)


def split_mask(mask: Tensor) -> tuple[Tensor, Tensor | None]:
    """Split an additive mask into a finite bias and the pairs that it leaves valid.

    Invalid pairs are marked by -inf, by the dtype's lowest value or, by habit, by -1e9 or -1e4; whatever
    is below `LOWEST_BIAS` gets no weight in any case. NaN is neither: it stays in the bias, and shows.

    Args:
        mask: Floating point, any shape.

    Returns:
        The bias, 0 at invalid pairs, and a bool mask, True = valid, both of the mask's shape; None instead of the
        latter where a look is cheap (on a processor, outside graphs) and shows that all pairs are valid.
    """
    cheap = mask.device.type == "cpu" and mask.numel() > 0 and eager.obstacle(mask) is None
    # A bias that hides nothing would be copied, and read as a mask everywhere: as much again as attention itself.
    if cheap and bool(mask.detach().amin() > LOWEST_BIAS):
        return mask, None
    invalid = mask <= LOWEST_BIAS
    return mask.masked_fill(invalid, 0.0), ~invalid


def hides_future(valid: Tensor) -> bool:
    """Whether a mask hides all later keys from earlier queries, some of which later queries see."""
    queries, keys = valid.shape[-2:]
    future = torch.ones(queries, keys, dtype=torch.bool, device=valid.device).triu(1 + keys - queries)
    # Padding alone hides whole columns; causality hides keys that later queries do see.
    hidden_from_some = ~valid & valid.any(dim=-2, keepdim=True)
    return queries > 1 and not bool((valid & future).any()) and bool((hidden_from_some & future).any())


def one_way(valid: Tensor) -> Tensor:
    """Whether some query is hidden from a key that sees it, as in causal and prefix masks: a bool scalar.

    Between two sequences: whether queries see different keys at all.
    """
    seen = valid.any(dim=-2, keepdim=True)
    hidden = ~valid & seen
    if valid.shape[-2] == valid.shape[-1]:
        hidden = hidden & valid.transpose(-2, -1)
    return hidden.any()


_STEPS = 8
"""Steps between two looks at where they have led, each of which waits for the device."""


def packed(valid: Tensor) -> Tensor:
    """Whether a square mask has several groups of tokens that see each other and nobody else: a bool scalar.

    Under compilation, which cannot walk from token to token, only groups of which all see all are found.
    """
    valid = valid.any(dim=1)  # what some head sees
    # Of tokens that someone sees, some hide from each other.
    apart = (~valid & valid.any(dim=-2, keepdim=True) & valid.any(dim=-1, keepdim=True)).any()
    if torch.compiler.is_compiling():
        links = valid.to(torch.float32)
        # Whoever sees a token sees what it sees.
        return apart & ((links @ links > 0) == valid).all()
    if not apart:
        return apart
    seen = valid.any(dim=-1) | valid.any(dim=-2)
    links = (valid | valid.transpose(-2, -1)).to(torch.float32)
    # Whom the first one reaches, from neighbour to neighbour: a sliding window takes many steps.
    reached = torch.zeros_like(seen).scatter(-1, seen.to(torch.uint8).argmax(dim=-1, keepdim=True), True) & seen
    while True:
        before = reached
        for _ in range(_STEPS):
            reached = reached | ((links @ reached.to(torch.float32).unsqueeze(-1)).squeeze(-1) > 0)
        if torch.equal(reached, before):
            return (seen & ~reached).any()


def require_two_ways(config: SparsityConfig, pairs: Pairs) -> None:
    """Refuse a rule that looks at several rows where these must not learn of each other.

    Args:
        config: The settings in force, of a rule that is not by row.
        pairs: The pairs of a call. In cross-attention queries may differ in what they see.

    Raises:
        ConfigurationError: If information flows one way only, or several texts are packed in a row. A compiled
            graph cannot read the answer: there it is an assertion of torch's, a RuntimeError.
    """
    if pairs.valid is None or pairs.cross:
        return
    square = pairs.shape[2] == pairs.shape[3]
    if torch.compiler.is_compiling():
        if not torch.compiler.is_exporting():
            separate = one_way(pairs.valid) | packed(pairs.valid) if square else one_way(pairs.valid)
            torch._assert_async(~separate, _COMPILED_REFUSAL)
        return
    if one_way(pairs.valid):
        raise causal_refusal(config)
    if square and packed(pairs.valid):
        raise ConfigurationError(
            f"Several texts are packed in a row, and rule {config.rule!r} decides over several queries at once: what "
            "survives in one text would depend on the others. Use rule='topk', or one text a row."
        )


def causal_refusal(config: SparsityConfig) -> ConfigurationError:
    """The error for a rule that would let a causal model see the future."""
    cure = "rule='topk', which looks at one query at a time"
    if config.count_padding:
        return ConfigurationError(
            "count_padding=True counts the keys that a mask hides, its future among them, so the number of later "
            "tokens would change earlier outputs of a causal model. Use count_padding=False"
            + (f", and {cure}." if config.rule == "percentile" else ".")
        )
    if config.rule == "block_topk":
        cure = "query_block=1, or " + cure
    elif config.rule == "random":
        cure = "scope='row', which draws for one query at a time"
    return ConfigurationError(
        f"Rule {config.rule!r} decides over several queries at once, so later tokens would change earlier outputs "
        f"of a causal model. Use {cure}."
    )


def _read_valid(valid: Tensor | None, shape: tuple[int, int, int, int]) -> Tensor | None:
    """Bring a mask of valid pairs to `[B, 1 | H, Q, K]`."""
    if valid is None:
        return None
    batch, heads, queries, keys = shape
    if valid.dtype != torch.bool:
        raise ConfigurationError(f"valid must be bool (True = may be attended), got {valid.dtype}.")
    full = valid[:, None, None, :] if valid.dim() == 2 else valid
    try:
        return torch.broadcast_to(full, (batch, heads if full.shape[-3:-2] == (heads,) else 1, queries, keys))
    except (RuntimeError, IndexError):
        raise ConfigurationError(
            f"valid must be [B, K] = {(batch, keys)} or broadcastable to [B, H, Q, K] = {shape}, "
            f"got {tuple(valid.shape)}."
        ) from None


def _read_bias(bias: Tensor | None, shape: tuple[int, int, int, int]) -> tuple[Tensor | None, Tensor | None]:
    """Split a bias into its finite part and the pairs that it leaves valid, both broadcast like it."""
    if bias is None:
        return None, None
    if not bias.is_floating_point():
        raise ConfigurationError(f"bias must be floating point (use valid= for a bool mask), got {bias.dtype}.")
    sizes = zip(reversed(bias.shape), reversed(shape), strict=False)
    if bias.dim() > 4 or any(size not in (1, full) for size, full in sizes):
        raise ConfigurationError(f"bias must be broadcastable to [B, H, Q, K] = {shape}, got {tuple(bias.shape)}.")
    return split_mask(bias[(None,) * (4 - bias.dim())])


def _pairs(
    shape: tuple[int, int, int, int],
    device: torch.device,
    valid: Tensor | None,
    query_valid: Tensor | None,
    causal: bool,
    cross: bool,
) -> Pairs:
    batch, _, queries, keys = shape
    if query_valid is not None:
        if query_valid.dtype != torch.bool or query_valid.shape != (batch, queries):
            raise ConfigurationError(
                f"query_valid must be bool [B, Q] = {(batch, queries)}, "
                f"got {tuple(query_valid.shape)} {query_valid.dtype}."
            )
    elif valid is not None and queries == keys and not cross:
        query_valid = padding_from_pairs(valid, queries)
    if causal:
        allowed = torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)
        valid = allowed.expand(batch, 1, queries, keys) if valid is None else valid & allowed
    return Pairs(shape, device, valid, query_valid, causal, cross)
