"""The operator: attention that keeps only the best-scoring part of each head's scores.

    scores  = q @ k.T * scale + bias          fp32 or better, over valid pairs
    keep    = scores >= tau                   the rule says which survive; ties at tau all do
    weights = dropout(softmax(scores | keep))
    output  = weights @ v

Source of the idea: Crisp Attention, arXiv 2508.06016.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from crisp_attention import backends
from crisp_attention.backends import reference
from crisp_attention.config import SparsityConfig
from crisp_attention.errors import ConfigurationError
from crisp_attention.rules import Normalizer, Pairs, select

LOWEST_BIAS = -9e3
"""An additive mask hides a pair from here down: people write -inf, -1e9, or -1e4 (which bf16 rounds up)."""

# Settings that say where and when a model is sparse, which one call cannot.
_OF_A_MODEL = frozenset({"apply", "layer_sparsity", "layers", "schedule"})


class PairCounts(NamedTuple):
    """How many pairs there were and how many survived, over valid pairs of valid queries.

    Attributes:
        kept: Int64 `[B, H]`.
        valid: Int64 `[B, H]`.
    """

    kept: Tensor
    valid: Tensor

    @property
    def sparsity(self) -> Tensor:
        """Realised sparsity of each head, float32 `[B, H]`; 0 where nothing is valid."""
        return 1.0 - self.kept / self.valid.clamp(min=1).to(torch.float32) - (self.valid == 0).to(torch.float32)


@dataclass(frozen=True)
class AttentionOutput:
    """What `attention(..., return_details=True)` returns.

    Attributes:
        output: `[B, H, Q, Dv]`.
        weights: Attention weights after dropout, `[B, H, Q, K]`.
        probabilities: The weights before dropout.
        survivors: The keep mask as the backend left it; None if no pair was masked at all.
        pairs: The pairs there were to choose from.
    """

    output: Tensor
    weights: Tensor
    probabilities: Tensor
    survivors: Tensor | None
    pairs: Pairs

    @property
    def keep(self) -> Tensor:
        """Keep mask, bool `[B, H, Q, K]`, True = the score survived."""
        if self.survivors is None:
            return torch.ones_like(self.weights, dtype=torch.bool)
        return self.survivors.expand(self.weights.shape)

    @property
    def counts(self) -> PairCounts:
        """Kept and valid pairs per example and head, `[B, H]`; padded queries not counted."""
        keep = self.keep
        if self.pairs.query_valid is not None:
            keep = keep & self.pairs.query_valid[:, None, :, None]
        kept = keep.sum(dim=(-2, -1))
        return PairCounts(kept, self.pairs.counted_per_head[..., 0, 0].expand_as(kept))

    @property
    def entropy(self) -> Tensor:
        """Entropy of each query's attention in nats, before dropout, `[B, H, Q]`.

        NaN for queries that count nowhere: padding, and those without a valid key.
        """
        weights = self.probabilities.detach()
        entropy = -(weights * weights.clamp(min=torch.finfo(weights.dtype).tiny).log()).sum(dim=-1)
        counted = self.pairs.counted
        return entropy if counted is None else entropy.masked_fill(~counted.any(dim=-1), torch.nan)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    sparsity: float | None = None,
    rule: str = "topk",
    valid: Tensor | None = None,
    query_valid: Tensor | None = None,
    bias: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    dropout_p: float = 0.0,
    training: bool = False,
    generator: torch.Generator | None = None,
    backend: str = "auto",
    return_details: bool = False,
    **settings: Any,
) -> Tensor | AttentionOutput:
    """Attention over the surviving scores only.

    Args:
        q: Queries `[B, H, Q, D]`.
        k: Keys `[B, Hkv, K, D]`; H must be a multiple of Hkv (grouped-query attention).
        v: Values `[B, Hkv, K, Dv]`.
        sparsity: Share of valid scores to remove, in [0, 1). 0 equals dense attention. No query loses
            its last key: over a single key any sparsity realises 0, and a warning says so.
        rule: Which scores survive: any rule of `SparsityConfig`.
        valid: Bool, True = the pair may be attended: `[B, K]` (valid keys), or anything
            broadcastable to `[B, H, Q, K]`. None if all are.
        query_valid: Bool `[B, Q]`, True = not padding. Padded queries are computed but not counted
            in a percentile or in the realised sparsity. By default it follows from `valid` where
            Q = K: a position that no query may attend to is padding. Give it for cross-attention.
        bias: Added to the scaled scores before ranking, broadcastable to `[B, H, Q, K]`; -inf, or
            a value below -9000, marks an invalid pair.
        causal: Query i attends to keys up to i + K - Q. Refused for rules that look at other rows.
        scale: Factor on q.k; 1 / sqrt(D) by default.
        softcap: Bounds the scaled scores to (-softcap, softcap) by tanh, before the bias.
        sinks: `[H]`, one more logit for every query of a head that takes weight and has no value.
        dropout_p: Dropout on the attention weights, after the softmax, if `training`.
        training: Whether dropout applies and `random` draws anew for each example.
        generator: Own stream of the `random` rule, advanced by one draw a call; without it the rule
            is a pure function of its inputs. Dropout draws from torch's global stream, so that
            sparse and dense arms stay paired.
        backend: "auto", or a name that is used or refused, never replaced.
        return_details: Return an `AttentionOutput` instead of the output alone.
        **settings: Other fields of `SparsityConfig` that concern one call: `heads`, `min_keep`,
            `keep_first`, `keep_self`, `gradient` and the rule's own.

    Returns:
        `[B, H, Q, Dv]` in q's dtype, or an `AttentionOutput`. Queries without a valid key give zeros.

    Raises:
        ConfigurationError: If a shape, dtype, setting or combination cannot be served.
    """
    for name in sorted(_OF_A_MODEL & settings.keys()):
        raise ConfigurationError(f"{name} is a setting of a model, not of one attention call; use sparsify.")
    config = SparsityConfig.from_dict({"sparsity": sparsity, "rule": rule, **settings})
    if causal and config.removes and not config.per_row:
        raise causal_refusal(config)
    if not 0.0 <= dropout_p < 1.0:
        raise ConfigurationError(f"dropout_p must be in [0, 1), got {dropout_p!r}.")
    _check_shapes(q, k, v)
    if softcap is not None and not softcap > 0.0:
        raise ConfigurationError(f"softcap must be greater than 0, got {softcap!r}.")
    if sinks is not None and sinks.shape != (q.shape[1],):
        raise ConfigurationError(f"sinks must be [H] = ({q.shape[1]},), got {tuple(sinks.shape)}.")
    shape = (q.shape[0], q.shape[1], q.shape[2], k.shape[2])
    pairs, bias = read_pairs(shape, q.device, valid=valid, query_valid=query_valid, bias=bias, causal=causal)
    if config.sparsity and shape[3] == 1:
        _warn_of_a_single_key(config.sparsity)
    stream = None
    if generator is not None:
        stream = torch.randint(2**32, (), generator=generator, device=generator.device)
    result = attend(
        q,
        k,
        v,
        config=config if config.removes else None,
        pairs=pairs,
        bias=bias,
        scale=scale,
        softcap=softcap,
        sinks=None if sinks is None else sinks.view(1, -1, 1, 1),
        dropout_p=dropout_p if training else 0.0,
        stream=stream,
        training=training,
        backend=backend,
    )
    return result if return_details else result.output


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    config: SparsityConfig | None,
    pairs: Pairs,
    sparsity: float | Tensor | None = None,
    bias: Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    dropout_p: float = 0.0,
    stream: Tensor | None = None,
    training: bool = False,
    backend: str = "auto",
) -> AttentionOutput:
    """`attention` on arguments already validated: the one way from a model to a backend.

    Args:
        q: As in `attention`.
        k: As in `attention`.
        v: As in `attention`.
        config: The rule; None keeps every valid pair (dense).
        pairs: The valid pairs.
        sparsity: In place of the configuration's, where a schedule moves it.
        bias: Additive, finite at valid pairs.
        scale: Factor on q.k; 1 / sqrt(D) by default.
        softcap: As in `attention`.
        sinks: One logit a head, broadcastable to `[B, H, Q, 1]`.
        dropout_p: Applied as given.
        stream: Random stream of a randomised rule.
        training: Whether a randomised rule draws anew for each example.
        backend: As in `attention`.
    """
    backends.choose(backend)
    groups = q.shape[1] // k.shape[1]
    if groups > 1:
        k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    selection = None
    if config is not None:
        selection = select(config, pairs, sparsity=sparsity, stream=stream, training=training)
        if sinks is not None and isinstance(selection.form, Normalizer):
            raise ConfigurationError(
                f"Rule {config.rule!r} replaces the softmax, which attention sinks are a part of; it cannot have both."
            )
    computed = reference.attention(
        q,
        k,
        v,
        pairs=pairs,
        selection=selection,
        bias=bias,
        scale=1.0 / math.sqrt(q.shape[-1]) if scale is None else scale,
        softcap=softcap,
        sinks=sinks,
        dropout_p=dropout_p,
    )
    return AttentionOutput(computed.output, computed.weights, computed.probabilities, computed.keep, pairs)


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

    A position that no query may attend to is padding. Queries are the last of the keys' positions.

    Args:
        valid: Bool `[B, 1 | H, Q, K]`.
        queries: Q.

    Returns:
        Bool `[B, Q]`, or None where there are more queries than keys (then nothing is known).
    """
    keys = valid.shape[-1]
    if queries > keys:
        return None
    return valid.any(dim=1).any(dim=1)[:, keys - queries :]


def split_mask(mask: Tensor) -> tuple[Tensor, Tensor]:
    """Split an additive mask into a finite bias and the pairs that it leaves valid.

    Invalid pairs are marked by -inf, by the dtype's lowest value or, by habit, by -1e9 or -1e4; whatever
    is below `LOWEST_BIAS` gets no weight in any case. NaN is neither: it stays in the bias, and shows.

    Args:
        mask: Floating point, any shape.

    Returns:
        The bias, 0 at invalid pairs, and a bool mask, True = valid; both of the mask's shape.
    """
    invalid = mask <= LOWEST_BIAS
    return mask.masked_fill(invalid, 0.0), ~invalid


def one_way(valid: Tensor) -> bool:
    """Whether some query is hidden from a key that sees it, as in causal and prefix masks.

    Between two sequences: whether queries see different keys at all.
    """
    seen = valid.any(dim=-2, keepdim=True)
    hidden = ~valid & seen
    if valid.shape[-2] == valid.shape[-1]:
        hidden = hidden & valid.transpose(-2, -1)
    return bool(hidden.any())


def causal_refusal(config: SparsityConfig) -> ConfigurationError:
    """The error for a rule that would let a causal model see the future."""
    cure = "rule='topk', which looks at one query at a time"
    if config.rule == "block_topk":
        cure = "query_block=1, or " + cure
    elif config.rule == "random":
        cure = "scope='row', which draws for one query at a time"
    return ConfigurationError(
        f"Rule {config.rule!r} decides over several queries at once, so later tokens would change earlier outputs "
        f"of a causal model. Use {cure}."
    )


def _warn_of_a_single_key(sparsity: float) -> None:
    if torch.compiler.is_compiling():  # a warning would break the graph
        return
    warnings.warn(
        f"sparsity={sparsity:g} of a single key removes nothing: no query loses its last key, so that this call is "
        "dense. Give k and v [B, Hkv, K, D] more than one token, or sparsity=0 if dense is what you want.",
        stacklevel=3,
    )


def _check_shapes(q: Tensor, k: Tensor, v: Tensor) -> None:
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if tensor.dim() != 4 or not tensor.is_floating_point() or not tensor.numel():
            raise ConfigurationError(
                f"{name} must be a non-empty floating-point tensor [B, H, N, D], "
                f"got {tuple(tensor.shape)} {tensor.dtype}."
            )
    if k.shape[:3] != v.shape[:3] or q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        raise ConfigurationError(
            "q [B, H, Q, D], k [B, Hkv, K, D] and v [B, Hkv, K, Dv] do not fit: "
            f"got {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}."
        )
    if q.shape[1] % k.shape[1]:
        raise ConfigurationError(f"{q.shape[1]} query heads are not a multiple of {k.shape[1]} key/value heads.")
    if not q.dtype == k.dtype == v.dtype:
        raise ConfigurationError(f"q, k and v must share a dtype, got {q.dtype}, {k.dtype}, {v.dtype}.")


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
