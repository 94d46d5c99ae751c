"""Rivals of selection: other functions in place of the softmax.

`temperature` sharpens without a zero; `entmax15` and `sparsemax` have as many zeros as the scores
call for. None takes a share to remove, so they are controls and baselines rather than relatives of
`topk`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from crisp_attention.errors import ConfigurationError
from crisp_attention.rules.ranking import kth_largest
from crisp_attention.rules.selection import Normalizer, Pairs
from crisp_attention.rules.threshold import topk

# The inverse temperature is sought between 1 and 2^_LARGEST by halving its logarithm's interval.
_LARGEST = 20.0
_HALVINGS = 40


def temperature(pairs: Pairs, *, sparsity: float | Tensor | None = None, entropy: float | None = None) -> Normalizer:
    """The softmax of beta * S, with beta >= 1 chosen for each query so that its entropy is the target.

    With `sparsity` the target is the entropy that the query's softmax over `topk`'s survivors has
    (min_keep = 1): a control as sharp as `topk`, row by row, that removes nothing. With `entropy` it
    is that many nats. A query whose entropy is below the target already is left alone (beta = 1).
    Where no beta up to 2^20 is enough (scores that tie for the best), that beta is used.

    The gradient is that of the function computed: beta moves with the scores (implicit
    differentiation), and so does the entropy of `topk`, whose survivors are held fixed.

    Args:
        pairs: What there is to choose from.
        sparsity: Share of keys that the `topk` to be matched removes, in [0, 1); or
        entropy: the target in nats.
    """

    def normalize(scores: Tensor, valid: Tensor | None) -> Tensor:
        if sparsity is not None:
            chosen = topk(pairs, sparsity=sparsity, min_keep=1)
            with torch.no_grad():
                survive = (scores < kth_largest(scores, chosen.pool, chosen.keep, chosen.keep_bound)).logical_not()
            target = _entropy(masked_softmax(scores, survive if valid is None else survive & valid))
        elif entropy is not None:
            target = scores.new_full((), entropy)
        else:
            raise ConfigurationError("Rule 'temperature' needs a sparsity or an entropy.")
        with torch.no_grad():
            sharpen = _entropy(masked_softmax(scores, valid)) > target
            low, high = torch.zeros_like(scores[..., :1]), torch.full_like(scores[..., :1], _LARGEST)
            for _ in range(_HALVINGS):
                middle = (low + high) / 2
                above = _entropy(masked_softmax(scores * middle.exp2(), valid)) > target
                low, high = torch.where(above, middle, low), torch.where(above, high, middle)
            beta = torch.where(sharpen, ((low + high) / 2).exp2(), 1.0)
            solved = sharpen & (high < _LARGEST)
        return masked_softmax(scores * _differentiable(beta, solved, scores, target, valid), valid)

    return Normalizer(normalize, removes=False)


def entmax15(pairs: Pairs) -> Normalizer:
    """1.5-entmax over each query's valid keys: argmax of p.S + H_1.5(p) over the simplex.

    Source: Peters, Niculae & Martins, arXiv 1905.05702, as computed by the `entmax` package.

    Args:
        pairs: Unused; every valid pair takes part.
    """
    return _from_package("entmax15")


def sparsemax(pairs: Pairs) -> Normalizer:
    """The Euclidean projection of each query's valid scores onto the simplex.

    Source: Martins & Astudillo, arXiv 1602.02068, as computed by the `entmax` package.

    Args:
        pairs: Unused; every valid pair takes part.
    """
    return _from_package("sparsemax")


def masked_softmax(scores: Tensor, valid: Tensor | None) -> Tensor:
    """Softmax over the valid keys of each query; zeros, with zero gradients, where none is valid."""
    if valid is None:
        return scores.softmax(dim=-1)
    # The lowest finite value, not -inf: a row without survivors then has a finite softmax, whose
    # weights the second mask sets to exactly zero, gradients included.
    lowest = torch.finfo(scores.dtype).min
    return scores.masked_fill(~valid, lowest).softmax(dim=-1).masked_fill(~valid, 0.0)


def _entropy(weights: Tensor) -> Tensor:
    """Entropy of each row in nats, `[..., 1]`; its gradient is finite at zero weights."""
    return -(weights * weights.clamp(min=torch.finfo(weights.dtype).tiny).log()).sum(dim=-1, keepdim=True)


def _differentiable(beta: Tensor, solved: Tensor, scores: Tensor, target: Tensor, valid: Tensor | None) -> Tensor:
    """The same beta, with its derivative: one step of Newton's method from the solution.

    At the solution H(beta, S) = target, so that the step changes nothing in value, while its gradient
    is that of the implicit function: (target - H) / (dH / dbeta) with the denominator held fixed.
    """
    if not (torch.is_grad_enabled() and scores.requires_grad):
        return beta
    weights = masked_softmax(scores * beta, valid)
    with torch.no_grad():
        safe = scores if valid is None else scores.masked_fill(~valid, 0.0)
        mean = (weights * safe).sum(dim=-1, keepdim=True)
        slope = -beta * (weights * (safe - mean).square()).sum(dim=-1, keepdim=True)
        flat = slope > -torch.finfo(scores.dtype).eps
    error = target - _entropy(weights)
    step = (error - error.detach()) / slope.masked_fill(flat, -1.0)
    return beta + torch.where(solved & ~flat, step, 0.0)


def _from_package(name: str) -> Normalizer:
    function = _LOADED.get(name) or _load(name)

    def normalize(scores: Tensor, valid: Tensor | None) -> Tensor:
        known = scores.detach() if valid is None else scores.detach().masked_fill(~valid, -torch.inf)
        best = known.amax(dim=-1, keepdim=True)
        # The package fails on NaN and on infinite scores; here they show, as in a softmax.
        diverged = best.isnan() | (best == torch.inf)
        # Far enough below the best score to get a weight of exactly zero (2 would do), near enough
        # to square without overflow.
        below = best.masked_fill(~best.isfinite(), 0.0) - 10.0
        weights = function(torch.where(known.isfinite() & ~diverged, scores, below), dim=-1)
        weights = weights.masked_fill(diverged, torch.nan)
        return weights if valid is None else weights.masked_fill(~valid, 0.0)

    return Normalizer(normalize, removes=True)


# Kept here, not in a cache decorator: compiled code may look it up, but not load it.
_LOADED: dict[str, Callable[..., Tensor]] = {}


def _load(name: str) -> Callable[..., Tensor]:
    try:
        import entmax
    except ImportError:
        raise ConfigurationError(
            f"Rule {name!r} needs the package entmax: pip install 'crisp-attention[entmax]'."
        ) from None
    # The package's autograd functions cannot be traced into, but may stand in a compiled graph whole.
    _LOADED[name] = torch.compiler.allow_in_graph(getattr(entmax, name))
    return _LOADED[name]
