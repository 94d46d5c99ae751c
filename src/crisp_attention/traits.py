"""The rules as data: what the rest of the package must know of each without running it.

This module imports neither torch nor transformers; the functions themselves live in `rules/`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple


class RuleTraits(NamedTuple):
    """What the rest of the package must know of a rule without running it.

    Attributes:
        summary: What survives, in a few words.
        source: Where the rule comes from.
        strengths: The settings that say how much is removed. Exactly one of them is in force: the
            first, at its default, where none is given. Empty if there is nothing to choose.
        settings: The optional settings that the rule reads, with their defaults; it refuses all others.
        per_row: Whether a query's survivors depend on that query's scores alone. A rule that looks
            at other rows would let later tokens change earlier outputs of a causal model.
    """

    summary: str
    source: str
    strengths: tuple[str, ...]
    settings: Mapping[str, Any]
    per_row: bool = True


_SELECTION = {"min_keep": 1, "keep_first": 0, "keep_self": False, "gradient": "selected"}

RULES: dict[str, RuleTraits] = {
    "block_topk": RuleTraits(
        "the best blocks of keys of each block of queries, by mean score",
        "structured blocks as in SeerAttention, arXiv 2410.13276, here by the scores themselves",
        ("sparsity",),
        {**_SELECTION, "sparsity": 0.8, "query_block": 16, "key_block": 16},
        per_row=False,
    ),
    "bottomk": RuleTraits(
        "the worst keys of each query, as many as topk keeps of the best",
        "negative control",
        ("sparsity",),
        {**_SELECTION, "sparsity": 0.8},
    ),
    "drop_topk": RuleTraits(
        "all but the best keys of each query",
        "negative control, and a regularizer that forbids the easiest answer",
        ("drop",),
        {**_SELECTION, "drop": 1},
    ),
    "entmax15": RuleTraits(
        "dense attention with 1.5-entmax for a softmax: exact zeros, as many as the scores call for",
        "Peters, Niculae & Martins, arXiv 1905.05702; baseline, needs the extra [entmax]",
        (),
        {},
    ),
    "nm": RuleTraits(
        "the best N of every M consecutive keys of each query",
        "Dynamic N:M Fine-grained Structured Sparse Attention, arXiv 2203.00091",
        ("sparsity",),
        {**_SELECTION, "sparsity": 0.5, "m": 4},
    ),
    "percentile": RuleTraits(
        "the best pairs of each head's matrix: one threshold per head and example",
        "Crisp Attention, arXiv 2508.06016",
        ("sparsity",),
        {**_SELECTION, "sparsity": 0.8, "count_padding": False},
        per_row=False,
    ),
    "random": RuleTraits(
        "pairs drawn at random, as many as topk (scope 'row') or percentile ('matrix') keeps, or each alone ('pair')",
        "control; scope 'pair' is DropKey, arXiv 2208.02646",
        ("sparsity",),
        {**_SELECTION, "sparsity": 0.8, "count_padding": False, "scope": "row", "seed": 0},
    ),
    "sparsemax": RuleTraits(
        "dense attention with sparsemax for a softmax: exact zeros, more than entmax15",
        "Martins & Astudillo, arXiv 1602.02068; baseline, needs the extra [entmax]",
        (),
        {},
    ),
    "temperature": RuleTraits(
        "every key, the softmax sharpened to the entropy that topk would have, or to a given one",
        "control: sharpening without zeros",
        ("sparsity", "entropy"),
        {"sparsity": 0.8, "entropy": None},
    ),
    "top_p": RuleTraits(
        "the fewest keys of each query that hold a share p of its attention",
        "Holtzman et al., arXiv 1904.09751, applied to attention",
        ("p",),
        {**_SELECTION, "p": 0.9},
    ),
    "topk": RuleTraits(
        "the best keys of each query",
        "Explicit Sparse Transformer, arXiv 1912.11637",
        ("sparsity",),
        {**_SELECTION, "sparsity": 0.8, "count_padding": False},
    ),
    "window": RuleTraits(
        "the nearest keys of each query, whatever their scores",
        "control; sliding and strided windows as in Longformer, arXiv 2004.05150",
        ("sparsity", "window"),
        {**_SELECTION, "sparsity": 0.8, "window": None, "stride": None},
    ),
}
