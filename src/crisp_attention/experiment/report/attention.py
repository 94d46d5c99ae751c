"""The interactive attention page: what each head looks at, dense beside sparse, at any sparsity. No torch."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from crisp_attention.experiment.report.templating import environment
from crisp_attention.experiment.statistics import Array


@dataclass(frozen=True)
class InspectedLayer:
    """One layer's attention to one text.

    Attributes:
        name: The module's name.
        scores: Final scores of dense attention, float32 `[H, T, T]`; -inf at invalid pairs.
    """

    name: str
    scores: Array


@dataclass(frozen=True)
class Level:
    """What a rule does at one strength, where the page's script can't work it out from the scores.

    Attributes:
        label: The strength in words.
        keep: Survivors by layer, bool `[H, T, T]`.
        weights: Attention weights by layer, `[H, T, T]`, for a rule that replaces the softmax; else None.
    """

    label: str
    keep: tuple[Array, ...]
    weights: tuple[Array, ...] | None


@dataclass(frozen=True)
class Inspection:
    """What a model's attention does with one text.

    Attributes:
        model: Its name.
        text: What it read, a second text after a slash.
        tokens: T of them, special ones included.
        cut: Tokens that were left out at the end.
        rule: Which scores survive.
        settings: Of the rule, which differ from its defaults; without how much it removes.
        layers: In the order in which they run.
        levels: Strengths to choose from; empty if the script works out the survivors of any sparsity.
        start: The sparsity shown first, or the place of the level.
    """

    model: str
    text: str
    tokens: tuple[str, ...]
    cut: int
    rule: str
    settings: Mapping[str, Any]
    layers: tuple[InspectedLayer, ...]
    levels: tuple[Level, ...]
    start: float


def render_attention(inspection: Inspection) -> str:
    """One HTML page that needs nothing else; all text from data is escaped."""
    return (
        environment(autoescape=True)
        .get_template("attention.html.j2")
        .render(inspection=inspection, data=_data(inspection))
    )


def _data(inspection: Inspection) -> dict[str, Any]:
    """What the script reads: matrices as base64, little-endian, row after row."""
    return {
        "tokens": inspection.tokens,
        "rule": inspection.rule,
        "minKeep": inspection.settings.get("min_keep", 1),
        "start": inspection.start,
        "layers": [
            {
                "name": layer.name,
                "heads": layer.scores.shape[0],
                # Exact, not rounded: two scores that differ must not become a tie.
                "scores": _text(layer.scores.astype("<f4").tobytes()),
            }
            for layer in inspection.layers
        ],
        "levels": [
            {
                "label": level.label,
                "keep": [_text(np.packbits(keep, bitorder="little").tobytes()) for keep in level.keep],
                "weights": None
                if level.weights is None
                else [_text(np.rint(255 * weights).astype(np.uint8).tobytes()) for weights in level.weights],
            }
            for level in inspection.levels
        ],
    }


def _text(content: bytes) -> str:
    return base64.b64encode(content).decode()
