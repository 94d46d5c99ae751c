"""Pictures of what each rule keeps: the rules of the package on one made-up matrix of scores, drawn as SVG.

Nothing is painted by hand: a cell is what `crisp_attention.attention` kept, its shade the weight it got.
"""

from __future__ import annotations

import html
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import crisp_attention as crisp

TOKENS = ("[CLS]", "the", "plot", "is", "thin", "but", "the", "cast", "is", "superb", "[PAD]", "[PAD]")
VALID = torch.tensor([token != "[PAD]" for token in TOKENS])

SETTINGS: dict[str, dict[str, Any]] = {
    "percentile": {"sparsity": 0.7},
    "topk": {"sparsity": 0.7},
    "top_p": {"p": 0.7},
    "nm": {"sparsity": 0.5, "m": 4},
    "block_topk": {"sparsity": 0.5, "query_block": 2, "key_block": 2},
    "window": {"window": 1},
    "random": {"sparsity": 0.7},
    "bottomk": {"sparsity": 0.7},
    "drop_topk": {"drop": 2},
    "temperature": {"sparsity": 0.7},
    "entmax15": {},
    "sparsemax": {},
}
"""How each rule is set in its picture."""

_SIDE = 20
_LEFT, _TOP = 52, 52


@dataclass(frozen=True)
class Kept:
    """What a rule did to the example.

    Attributes:
        settings: As they are written in a call.
        weights: Attention weights `[Q, K]`.
        keep: Bool `[Q, K]`.
        removed: How many valid pairs were removed.
        valid: How many there were.
    """

    settings: str
    weights: Tensor
    keep: Tensor
    removed: int
    valid: int


def scores() -> Tensor:
    """The example: scores `[Q, K]` of one head, made up so that there is something to choose.

    Some noise, a taste for near keys, two words that everyone looks at, and padding that scores low.
    """
    count = len(TOKENS)
    noise = torch.randn(count, count, generator=torch.Generator().manual_seed(4))
    place = torch.arange(count)
    near = -0.35 * (place[:, None] - place[None, :]).abs()
    liked = torch.tensor(
        [{"thin": 2.2, "superb": 2.6, "[CLS]": 1.0, "[PAD]": -3.0}.get(token, 0.0) for token in TOKENS]
    )
    return 0.9 * noise + near + liked[None, :]


def apply(rule: str) -> Kept:
    """A rule on the example."""
    example, settings = scores(), SETTINGS[rule]
    # With the unit matrix as queries, q @ k.T is the example itself.
    q = torch.eye(len(TOKENS))[None, None]
    k = example.T[None, None].contiguous()
    out = crisp.attention(
        q, k, q, rule=rule, valid=VALID[None], scale=1.0, backend="reference", return_details=True, **settings
    )
    kept, valid = int(out.counts.kept.sum()), int(out.counts.valid.sum())
    told = ", ".join([f'rule="{rule}"', *(f"{name}={value}" for name, value in settings.items())])
    return Kept(told, out.weights[0, 0], out.keep[0, 0], valid - kept, valid)


def picture_of_rule(rule: str) -> str:
    """A rule's keep mask as a figure of HTML: kept pairs filled by weight, removed ones empty, padding dashed."""
    kept = apply(rule)
    what = f"{kept.removed} of {kept.valid} valid pairs removed"
    shades = kept.weights / kept.weights[VALID].max()
    return _figure(f"<code>{html.escape(kept.settings)}</code>: {what}", f"{rule}: {what}", kept.keep, shades)


def picture_of_scores() -> str:
    """The example itself, every valid pair shaded by its score."""
    example = scores()
    valid = example[VALID][:, VALID]
    shades = (example - valid.min()) / (valid.max() - valid.min())
    caption = "The scores that all pictures below begin with, higher ones stronger. Rows are queries, columns keys."
    return _figure(caption, "scores of the example", torch.ones_like(example, dtype=torch.bool), shades)


def _figure(caption: str, label: str, keep: Tensor, shades: Tensor) -> str:
    side = _SIDE * len(TOKENS)
    parts = [
        f'<figure class="rule"><svg viewBox="0 0 {_LEFT + side} {_TOP + side}" role="img" '
        f'aria-label="{html.escape(label)}">'
    ]
    for place, token in enumerate(TOKENS):
        middle = place * _SIDE + _SIDE / 2
        kind = "" if VALID[place] else ' class="pad"'
        parts.append(f'<text x="{_LEFT - 5}" y="{_TOP + middle + 3.5:g}" text-anchor="end"{kind}>{token}</text>')
        x, y = _LEFT + middle + 3.5, _TOP - 5
        parts.append(f'<text x="{x:g}" y="{y}" transform="rotate(-90 {x:g} {y})"{kind}>{token}</text>')
    for query in range(len(TOKENS)):
        for key in range(len(TOKENS)):
            at = f'x="{_LEFT + key * _SIDE + 1}" y="{_TOP + query * _SIDE + 1}"'
            if not (VALID[query] and VALID[key]):
                parts.append(f'<rect {at} class="pad"/>')
            elif keep[query, key]:
                parts.append(f'<rect {at} class="kept" fill-opacity="{0.15 + 0.85 * float(shades[query, key]):.2f}"/>')
            else:
                parts.append(f'<rect {at} class="removed"/>')
    parts.append(f"</svg><figcaption>{caption}</figcaption></figure>")
    return "".join(parts)
