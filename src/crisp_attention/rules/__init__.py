"""Which scores survive: one pure function a rule, from the pairs of a call to a `Threshold`."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from crisp_attention.config import SparsityConfig
from crisp_attention.rules.controls import random
from crisp_attention.rules.selection import Pairs, Threshold, keep_count
from crisp_attention.rules.threshold import percentile, topk

__all__ = ["FUNCTIONS", "Pairs", "Threshold", "keep_count", "percentile", "random", "select", "topk"]

FUNCTIONS: dict[str, Callable[..., Threshold]] = {"percentile": percentile, "random": random, "topk": topk}


def select(config: SparsityConfig, pairs: Pairs, *, stream: Tensor | None = None, training: bool = False) -> Threshold:
    """Apply the configured rule to the pairs of one attention call.

    Args:
        config: The rule and its settings.
        pairs: What there is to choose from.
        stream: Int64 scalar: which random stream a randomised rule draws from (default: its seed).
        training: Whether a randomised rule draws anew for each example of the batch.
    """
    settings = {name: getattr(config, name) for name in config.traits.settings - {"seed"}}
    settings = {name: value for name, value in settings.items() if value is not None}
    if config.rule == "random":
        settings["stream"] = torch.tensor(config.seed or 0) if stream is None else stream
        settings["vary_in_batch"] = training
    return FUNCTIONS[config.rule](pairs, sparsity=config.sparsity, min_keep=config.min_keep, **settings)
