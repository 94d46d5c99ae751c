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
from crisp_attention.backends import Call, Choice, Computed, Detail
from crisp_attention.config import SparsityConfig
from crisp_attention.errors import ConfigurationError
from crisp_attention.masks import causal_refusal, hides_future, read_pairs
from crisp_attention.rules import Normalizer, Pairs, select

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
    """What `attention(..., return_details=True)` returns, and what monitors see.

    Attributes:
        pairs: The pairs there were to choose from.
        computed: What the backend gave.
        choice: Which backend that was, and why.
    """

    pairs: Pairs
    computed: Computed
    choice: Choice

    @property
    def output(self) -> Tensor:
        """`[B, H, Q, Dv]`."""
        return self.computed.output

    @property
    def weights(self) -> Tensor:
        """Attention weights after dropout, `[B, H, Q, K]`.

        Raises:
            ConfigurationError: If nobody asked for them and they were not stored.
        """
        return _seen(self.computed.weights, "weights")

    @property
    def probabilities(self) -> Tensor:
        """The weights before dropout.

        Raises:
            ConfigurationError: As `weights`.
        """
        return _seen(self.computed.probabilities, "probabilities")

    @property
    def keep(self) -> Tensor:
        """Keep mask, bool `[B, H, Q, K]`, True = the score survived.

        Raises:
            ConfigurationError: As `weights`.
        """
        if self.computed.keep is None:
            return torch.ones_like(self.weights, dtype=torch.bool)
        return self.computed.keep.expand(self.weights.shape)

    @property
    def counts(self) -> PairCounts:
        """Kept and valid pairs per example and head, `[B, H]`; padded queries not counted.

        Raises:
            ConfigurationError: If nobody asked for more than the output.
        """
        kept = self.computed.kept
        if kept is None:
            keep = self.keep
            if self.pairs.query_valid is not None:
                keep = keep & self.pairs.query_valid[:, None, :, None]
            kept = keep.sum(dim=(-2, -1))
        return PairCounts(kept, self.pairs.counted_per_head[..., 0, 0].expand_as(kept))

    @property
    def entropy(self) -> Tensor:
        """Entropy of each query's attention in nats, before dropout, `[B, H, Q]`.

        NaN for queries that count nowhere: padding, and those without a valid key.

        Raises:
            ConfigurationError: If nobody asked for more than the output.
        """
        entropy = self.computed.entropy
        if entropy is None:
            weights = self.probabilities.detach()
            entropy = -(weights * weights.clamp(min=torch.finfo(weights.dtype).tiny).log()).sum(dim=-1)
        counted = self.pairs.counted
        return entropy if counted is None else entropy.masked_fill(~counted.any(dim=-1), torch.nan)


def _seen(stored: Tensor | None, what: str) -> Tensor:
    if stored is None:
        raise ConfigurationError(
            f"The {what} of this call were not stored, as nobody asked for them. A monitor says what it wants to see "
            "(detail = Detail.WEIGHTS), attention takes return_details=True, Transformers output_attentions=True."
        )
    return stored


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
    scale: float | Tensor | None = None,
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
            broadcastable to `[B, H, Q, K]`. None if all are. A rule over several rows ranks all valid pairs
            together. Of masks under which rows must not learn of each other, only a causal one is refused here;
            models refuse those of packed texts and prefixes, too.
        query_valid: Bool `[B, Q]`, True = not padding. Padded queries are computed but not counted
            in a percentile or in the realised sparsity. By default it follows from `valid` where
            Q = K: a position that no query may attend to is padding. Give it for cross-attention.
        bias: Added to the scaled scores before ranking, broadcastable to `[B, H, Q, K]`; -inf, or
            a value below -9000, marks an invalid pair.
        causal: Query i attends to keys up to i + K - Q. Refused for rules that look at other rows.
        scale: Factor on q.k; 1 / sqrt(D) by default. A tensor, broadcastable to `[B, H, Q, 1]`, may learn; only
            "reference" serves it.
        softcap: Bounds the scaled scores to (-softcap, softcap) by tanh, before the bias.
        sinks: `[H]`, one more logit for every query of a head that takes weight and has no value.
        dropout_p: Dropout on the attention weights, after the softmax, if `training`.
        training: Whether dropout applies and `random` draws anew for each example.
        generator: Own stream of the `random` rule, advanced by one draw a call; without it the rule
            is a pure function of its inputs. Dropout draws from torch's global stream, so that
            sparse and dense arms stay paired.
        backend: "auto", or a name that is used or refused, never replaced.
        return_details: Return an `AttentionOutput` instead of the output alone; only "reference" stores what it
            shows.
        **settings: Other fields of `SparsityConfig` that concern one call: `heads`, `min_keep`,
            `keep_first`, `keep_self`, `gradient` and the rule's own.

    Returns:
        `[B, H, Q, Dv]` in q's dtype, or an `AttentionOutput` with the weights. Queries without a valid key give zeros.

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
    several_rows = config.removes and not config.per_row and shape[2] == shape[3]
    if several_rows and pairs.valid is not None and not torch.compiler.is_compiling() and hides_future(pairs.valid):
        raise causal_refusal(config)
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
        detail=Detail.WEIGHTS if return_details else Detail.OUTPUT,
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
    scale: float | Tensor | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    dropout_p: float = 0.0,
    stream: Tensor | None = None,
    training: bool = False,
    backend: str = "auto",
    detail: Detail = Detail.OUTPUT,
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
        detail: What somebody wants to see beside the output.
    """
    selection = None
    if config is not None:
        selection = select(config, pairs, sparsity=sparsity, stream=stream, training=training)
        if sinks is not None and isinstance(selection.form, Normalizer):
            raise ConfigurationError(
                f"Rule {config.rule!r} replaces the softmax, which attention sinks are a part of; it cannot have both."
            )
    call = Call(
        q,
        k,
        v,
        pairs=pairs,
        selection=selection,
        bias=bias,
        scale=1.0 / math.sqrt(q.shape[-1]) if scale is None else scale,
        softcap=softcap,
        sinks=sinks,
        dropout=backends.draw_dropout(dropout_p, q.device),
        detail=detail,
    )
    choice = backends.choose(backend, call)
    return AttentionOutput(pairs, choice.attention(call), choice)


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
