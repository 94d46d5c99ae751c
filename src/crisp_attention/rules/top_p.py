"""The fewest keys that hold a given share of a query's attention."""

from __future__ import annotations

import torch
from torch import Tensor

from crisp_attention.rules.ranking import kth_best_key, with_forced
from crisp_attention.rules.selection import Mask, Pairs


def top_p(pairs: Pairs, *, p: float, min_keep: int, forced: Tensor | None = None) -> Mask:
    """The smallest set of best keys whose softmax probabilities, over valid keys, add up to p.

    With the row's probabilities in falling order of score, a_1 >= a_2 >= ..., tau is the score of the
    first key at which a_1 + ... + a_k >= p, and S_ij survives iff S_ij >= tau (ties at tau all do).
    How many survive is the row's own affair: few where attention is peaked, most where it is flat.
    Monotone: a smaller p keeps a subset. A row never looks at another.

    Source: nucleus sampling, arXiv 1904.09751, applied to attention.

    Args:
        pairs: What there is to choose from.
        p: Share of the probability to keep, in (0, 1).
        min_keep: Keys that each query keeps at least.
        forced: Bool `[B, 1, Q, K]`, pairs that come first and count with what they hold.
    """

    def survivors(scores: Tensor) -> Tensor:
        ranking = with_forced(scores, forced)
        ordered, order = ranking.sort(dim=-1, descending=True)
        # The lowest finite value, not -inf: a row without a valid key has finite probabilities then.
        probabilities = scores.clamp(min=torch.finfo(scores.dtype).min).double().softmax(dim=-1)
        mass = probabilities.gather(-1, order).cumsum(dim=-1)
        needed = (mass < p).sum(dim=-1, keepdim=True).clamp(max=scores.shape[-1] - 1)
        tau = ordered.gather(-1, needed).minimum(kth_best_key(ranking, pairs.valid, min_keep))
        keep = (ranking < tau).logical_not_()
        return keep if pairs.valid is None else keep & pairs.valid

    return Mask(survivors)
