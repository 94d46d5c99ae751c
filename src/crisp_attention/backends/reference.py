"""The specification: eager attention over stored scores, in fp32 or better.

Every other backend is tested against this one. Nothing here is tuned at the cost of being plain,
except that thresholds are found by partial selection rather than a full sort.

Letters: B batch, H heads, N tokens (Q queries, K keys), D head width.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from crisp_attention.rules.selection import Pairs, Threshold


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    pairs: Pairs,
    selection: Threshold | None,
    bias: Tensor | None,
    scale: float,
    dropout_p: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Scores, selection, softmax, dropout, weighted sum.

    Args:
        query: `[B, H, Q, D]`.
        key: `[B, H, K, D]`.
        value: `[B, H, K, Dv]`.
        pairs: The valid pairs.
        selection: Which of them survive; None keeps all (dense attention).
        bias: Added to the scaled scores before they are ranked, broadcastable to `[B, H, Q, K]`.
        scale: Factor on q.k.
        dropout_p: Probability of dropping an attention weight after the softmax; 0 in evaluation.
        softcap: Bends scores to `softcap * tanh(q.k * scale / softcap)` before the bias is added.
        sinks: One logit a head, broadcastable to `[B, H, Q, 1]`, that takes part in the softmax and
            has no value: a query's weights then sum to less than 1. It is not ranked.

    Returns:
        The output `[B, H, Q, Dv]` in the input's dtype; the weights after dropout `[B, H, Q, K]`;
        the keep mask `[B, H, Q, K]` (None if every pair is kept). A query without a valid key has
        zero weights, a zero output and zero gradients.
    """
    scores = score(query, key, bias=bias, scale=scale, softcap=softcap)
    keep = pairs.valid if selection is None else keep_mask(scores, pairs, selection)
    if keep is None:
        weights = _softmax(scores, sinks)
    else:
        # The lowest finite value, not -inf: a row without survivors then has a finite softmax,
        # whose weights the second mask sets to exactly zero, gradients included.
        lowest = torch.finfo(scores.dtype).min
        weights = _softmax(scores.masked_fill(~keep, lowest), sinks).masked_fill(~keep, 0.0)
    weights = weights.to(value.dtype)
    if dropout_p > 0.0:
        weights = F.dropout(weights, p=dropout_p)
    return weights @ value, weights, keep


def _softmax(scores: Tensor, sinks: Tensor | None) -> Tensor:
    """Softmax over the keys, and over the sink if there is one, whose own weight is left out."""
    if sinks is None:
        return scores.softmax(dim=-1)
    column = sinks.to(scores.dtype).expand(*scores.shape[:-1], 1)
    return torch.cat([scores, column], dim=-1).softmax(dim=-1)[..., :-1]


def score(query: Tensor, key: Tensor, *, bias: Tensor | None, scale: float, softcap: float | None = None) -> Tensor:
    """Final scores softcap(q.k * scale) + bias, `[B, H, Q, K]`, in fp32 or better."""
    dtype = torch.promote_types(query.dtype, torch.float32)
    # Autocast would take the product back to half precision, and ranks with it.
    with torch.autocast(query.device.type, enabled=False):
        scores = (query.to(dtype) * scale) @ key.to(dtype).transpose(-2, -1)
    if softcap is not None:
        scores = (scores / softcap).tanh() * softcap
    return scores if bias is None else scores + bias.to(dtype)


@torch.no_grad()
def keep_mask(scores: Tensor, pairs: Pairs, selection: Threshold) -> Tensor:
    """The survivors of a selection: bool `[B, H, Q, K]`, True = survives."""
    ranking = scores if selection.ranking is None else selection.ranking
    # "Not below" rather than "at or above": a NaN score survives and shows, instead of vanishing.
    keep = (ranking < threshold(ranking, pairs, selection)).logical_not_()
    return keep if pairs.valid is None else keep & pairs.valid


@torch.no_grad()
def threshold(ranking: Tensor, pairs: Pairs, selection: Threshold) -> Tensor:
    """Tau of each query, broadcastable to `[B, H, Q, 1]`."""
    if selection.scope == "row":
        return _kth_largest(ranking, selection.pool, selection.keep, selection.keep_bound)
    flat = ranking.flatten(-2).unsqueeze(-2)
    pool = None if selection.pool is None else selection.pool.flatten(-2).unsqueeze(-2)
    tau = _kth_largest(flat, pool, selection.keep, selection.keep_bound)
    rows = ranking if pairs.valid is None else ranking.masked_fill(~pairs.valid, -torch.inf)
    min_keep = min(selection.min_keep, rows.shape[-1])
    # The min_keep-th best key of each row; -inf, and so no limit, where a row has fewer valid keys.
    row_tau = rows.amax(-1, keepdim=True) if min_keep == 1 else rows.topk(min_keep, dim=-1).values[..., -1:]
    return torch.minimum(tau, row_tau)


def _kth_largest(values: Tensor, pool: Tensor | None, k: Tensor, bound: int) -> Tensor:
    """The k-th largest of the last dimension's pool, `k <= bound` differing by row.

    inf for k = 0; -inf where k exceeds the pool. Quickselect wants one k for all rows: a row whose k
    is smaller gets as many entries of +inf, in places outside its pool, as it lacks. There are
    always enough, since `bound - k` never exceeds the number of those places.
    """
    size = values.shape[-1]
    if bound == 0:
        return torch.full_like(values[..., :1], torch.inf)
    if pool is not None:
        outside = ~pool
        lacking = outside & (outside.cumsum(dim=-1) <= bound - k)
        filler = torch.where(lacking, torch.inf, -torch.inf).to(values.dtype)
        values = torch.where(pool, values, filler)
    return values.kthvalue(size - bound + 1, dim=-1, keepdim=True).values
