"""Which scores survive: one pure function a rule, from the pairs of a call to a form of selection."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from crisp_attention.config import SparsityConfig
from crisp_attention.errors import ConfigurationError
from crisp_attention.rules.block_topk import block_topk
from crisp_attention.rules.controls import bottomk, drop_topk, random
from crisp_attention.rules.fixed import window
from crisp_attention.rules.nm import nm
from crisp_attention.rules.normalizers import entmax15, sparsemax, temperature
from crisp_attention.rules.selection import (
    Blocks,
    Mask,
    Normalizer,
    Pairs,
    Selection,
    Threshold,
    forced_pairs,
    keep_count,
)
from crisp_attention.rules.threshold import percentile, topk
from crisp_attention.rules.top_p import top_p

__all__ = ["FUNCTIONS", "Blocks", "Mask", "Normalizer", "Pairs", "Selection", "Threshold", "keep_count", "select"]

FUNCTIONS: dict[str, Callable[..., Threshold | Blocks | Mask | Normalizer]] = {
    "block_topk": block_topk,
    "bottomk": bottomk,
    "drop_topk": drop_topk,
    "entmax15": entmax15,
    "nm": nm,
    "percentile": percentile,
    "random": random,
    "sparsemax": sparsemax,
    "temperature": temperature,
    "top_p": top_p,
    "topk": topk,
    "window": window,
}

# Settings that are not the rule's own business: who is forced, which draw, whose gradient.
_SHARED = frozenset({"gradient", "keep_first", "keep_self", "seed"})


def select(
    config: SparsityConfig,
    pairs: Pairs,
    *,
    sparsity: float | Tensor | None = None,
    stream: Tensor | None = None,
    training: bool = False,
) -> Selection:
    """Apply the configured rule to the pairs of one attention call.

    Args:
        config: The rule and its settings.
        pairs: What there is to choose from.
        sparsity: In place of the configuration's, where a schedule moves it; a float64 scalar tensor
            if it must not be read.
        stream: Int64 scalar: which random stream a randomised rule draws from (default: its seed).
        training: Whether a randomised rule draws anew for each example of the batch.

    Raises:
        ConfigurationError: If the configured heads do not exist, or the rule cannot serve such pairs.
    """
    settings = {name: getattr(config, name) for name in config.traits.settings if name not in _SHARED}
    settings = {name: value for name, value in settings.items() if value is not None}
    if sparsity is not None:
        settings["sparsity"] = sparsity
    if "min_keep" in settings:  # which may be beyond what a tensor holds
        settings["min_keep"] = min(settings["min_keep"], pairs.shape[3])
    if "keep_first" in config.traits.settings:
        settings["forced"] = forced_pairs(pairs, config.keep_first or 0, bool(config.keep_self))
    if config.rule == "random":
        settings["stream"] = torch.tensor(config.seed or 0) if stream is None else stream
        settings["vary_in_batch"] = training
    form = FUNCTIONS[config.rule](pairs, **settings)
    return Selection(form, _heads(config, pairs), straight_through=config.gradient == "straight_through")


def _heads(config: SparsityConfig, pairs: Pairs) -> Tensor | None:
    if config.heads is None:
        return None
    count = pairs.shape[1]
    if max(config.heads) >= count:
        raise ConfigurationError(
            f"heads={list(config.heads)} names {max(config.heads)}, but there are {count} query heads "
            f"(0 to {count - 1})."
        )
    chosen = torch.zeros(count, dtype=torch.bool, device=pairs.device)
    chosen[list(config.heads)] = True
    return chosen
