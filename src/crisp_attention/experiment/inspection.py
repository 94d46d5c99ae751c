"""One text through one model: every head's scores, and what a rule removes of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import AutoModel

from crisp_attention.backends import reference
from crisp_attention.config import SETTINGS, SparsityConfig
from crisp_attention.errors import ConfigurationError, UnsupportedModelError
from crisp_attention.experiment.report.attention import InspectedLayer, Inspection, Level
from crisp_attention.experiment.training.model import Checkpoint, load, load_tokenizer
from crisp_attention.huggingface.model import dense, monitor, sparsify
from crisp_attention.huggingface.persistence import read_settings
from crisp_attention.huggingface.quiet import quiet
from crisp_attention.operator import AttentionOutput
from crisp_attention.rules import Normalizer, Pairs, select
from crisp_attention.state import LayerState, attach, layers

MAX_TOKENS = 128
"""Longer texts are cut: 72 heads of 128 x 128 scores are what a browser still moves smoothly."""

_SCRIPTED = ("percentile", "topk")
_STRENGTHS: dict[str, tuple[Any, ...]] = {
    "sparsity": (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95),
    "p": (0.99, 0.95, 0.9, 0.8, 0.7, 0.6, 0.5),
    "drop": (1, 2, 3, 5, 8),
    "window": (1, 2, 4, 8, 16, 32, 64),
    "entropy": (0.25, 0.5, 1.0, 1.5, 2.0, 3.0),
}
_MILD_IF_HIGH = ("p", "window", "entropy")
_LABELS = {
    "sparsity": "sparsity {:.0%}",
    "p": "p = {:g}",
    "drop": "drop {:g}",
    "window": "window {:g}",
    "entropy": "entropy {:g} nats",
}


def inspect(
    checkpoint: Checkpoint, text: str, pair: str | None = None, rule: str | None = None, sparsity: float | None = None
) -> Inspection:
    """Let a model read one text, dense, and see what a rule would remove in each head.

    Args:
        checkpoint: The model; its own settings count where it was saved sparse.
        text: What it reads.
        pair: A second text, for models of sentence pairs.
        rule: Which scores survive (default: the model's own rule, else topk).
        sparsity: What is shown first (default: the model's own, else the rule's).

    Raises:
        ConfigurationError: If a setting is wrong or the text is empty.
        UnsupportedModelError: If the model reads no text, or attends to more than one sequence.
    """
    if not text.strip():
        raise ConfigurationError("The text is empty; give a sentence in quotes.")
    with quiet():
        network = load(checkpoint, AutoModel, use_safetensors=True).eval()
    if network.main_input_name != "input_ids" or network.config.is_encoder_decoder:
        raise UnsupportedModelError(
            f"crisp inspect shows a text's attention to itself. {type(network).__name__} "
            + ("has two sequences." if network.config.is_encoder_decoder else f"reads {network.main_input_name}.")
        )
    config = _chosen(network, rule, sparsity)
    with quiet():
        tokenizer = load_tokenizer(checkpoint)
        whole = tokenizer(text, pair)["input_ids"]
        inputs = tokenizer(text, pair, truncation=True, max_length=MAX_TOKENS, return_tensors="pt")
        read = inputs["input_ids"][0].tolist()
        seen = _scores(sparsify(network, config), inputs)
    return Inspection(
        model=checkpoint.name,
        text=text if pair is None else f"{text} / {pair}",
        tokens=tuple(tokenizer.convert_ids_to_tokens(read)),
        cut=len(whole) - len(read),
        rule=config.rule,
        settings={name: value for name, value in config.changes().items() if name not in ("rule", *config.strength)},
        layers=tuple(
            InspectedLayer(name, scores.masked_fill(~_valid(pairs, scores), -torch.inf)[0].numpy())
            for name, scores, pairs in seen
        ),
        levels=() if _scripted(config) else _levels(config, [found for _, *found in seen]),
        start=_start(config),
    )


def _chosen(network: Any, rule: str | None, sparsity: float | None) -> SparsityConfig:
    """What is shown: the rule that was asked for, else the model's own as it is set, in every head of every layer."""
    if rule is not None or getattr(network.config, SETTINGS, None) is None:
        return SparsityConfig(rule=rule or "topk", sparsity=sparsity)
    own, _ = read_settings(network.config)
    if own.layer_sparsity is not None:
        own = own.replace(layer_sparsity=None, sparsity=max(own.layer_sparsity), schedule=None)
    own = own.replace(apply="always", heads=None, layers=None, schedule=None)
    if sparsity is None:
        return own
    return own.replace(**{**dict.fromkeys((*own.strength, "stride")), "sparsity": sparsity})


def _scripted(config: SparsityConfig) -> bool:
    """Whether the page's script works out the survivors of any sparsity, which it does from scores alone."""
    return config.rule in _SCRIPTED and not config.keep_first and not config.keep_self


class _Watched(LayerState):
    """A layer's state that keeps the final scores of its last call."""

    def __init__(self, state: LayerState, seen: list[tuple[str, Tensor, Pairs]]) -> None:
        self.__dict__.update(state.__dict__)
        self._seen = seen

    def attend(self, q: Tensor, k: Tensor, v: Tensor, **rest: Any) -> AttentionOutput:
        if rest.get("sinks") is not None:
            raise UnsupportedModelError("This model has attention sinks, which take weight without being a token.")
        groups = q.shape[1] // k.shape[1]
        scale = q.shape[-1] ** -0.5 if rest.get("scale") is None else rest["scale"]
        scores = reference.score(
            q, k.repeat_interleave(groups, dim=1), bias=rest.get("bias"), scale=scale, softcap=rest.get("softcap")
        )
        self._seen.append((self.name, scores, rest["pairs"]))
        return super().attend(q, k, v, **rest)


@torch.no_grad()
def _scores(network: Any, inputs: Any) -> list[tuple[str, Tensor, Pairs]]:
    """Name, scores `[1, H, T, T]` and valid pairs of every attention call of a dense pass."""
    seen: list[tuple[str, Tensor, Pairs]] = []
    for name, state in layers(network).items():
        attach(network.get_submodule(name), _Watched(state, seen))
    # Watched, because unwatched dense attention takes a fused kernel, which has no scores.
    with dense(network), monitor(network):
        network(**inputs)
    return seen


def _strengths(config: SparsityConfig) -> list[Any]:
    """The strengths to choose from, mildest first; a sparsity of 0 is dense attention, which the page shows anyway."""
    strength, chosen = next(iter(config.strength.items()))
    strengths = sorted({*_STRENGTHS[strength], chosen}, reverse=strength in _MILD_IF_HIGH)
    return [value for value in strengths if value or strength != "sparsity"]


def _levels(config: SparsityConfig, seen: list[list[Any]]) -> tuple[Level, ...]:
    if not config.strength:
        return (_level(config, config.rule, seen),)
    strength = next(iter(config.strength))
    return tuple(
        _level(config.replace(**{strength: value}), _LABELS[strength].format(value), seen)
        for value in _strengths(config)
    )


def _level(config: SparsityConfig, label: str, seen: list[list[Any]]) -> Level:
    keep, weights, replaced = [], [], False
    for scores, pairs in seen:
        selection = select(config, pairs)
        probabilities, survivors = reference.sparse_probabilities(scores, pairs, selection, None)
        replaced = isinstance(selection.form, Normalizer)
        kept = _valid(pairs, scores) if survivors is None else survivors.expand(scores.shape)
        keep.append(kept[0].numpy())
        weights.append(probabilities[0].numpy())
    return Level(label, tuple(keep), tuple(weights) if replaced else None)


def _start(config: SparsityConfig) -> float:
    if _scripted(config):
        return float(config.sparsity or 0.0)
    if not config.strength:
        return 0.0
    chosen, strengths = next(iter(config.strength.values())), _strengths(config)
    return float(strengths.index(chosen)) if chosen in strengths else 0.0


def _valid(pairs: Pairs, scores: Tensor) -> Tensor:
    return torch.ones_like(scores, dtype=torch.bool) if pairs.valid is None else pairs.valid.expand(scores.shape)
