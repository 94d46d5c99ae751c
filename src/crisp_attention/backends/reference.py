"""The specification: eager attention over stored scores, in fp32 or better.

Every other backend is tested against this one. Nothing here is tuned at the cost of being plain,
except that thresholds are found by partial selection rather than a full sort.

Letters: B batch, H heads, N tokens (Q queries, K keys), D head width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from crisp_attention.backends.call import Call, Computed
from crisp_attention.rules.normalizers import masked_softmax
from crisp_attention.rules.ranking import kth_best_key, kth_largest, rescue, with_forced
from crisp_attention.rules.selection import Blocks, Mask, Normalizer, Pairs, Selection, Threshold, keep_count


def refusal(call: Call) -> str | None:
    """Nothing is refused."""
    return None


def attention(call: Call) -> Computed:
    """Scores, selection, softmax, dropout, weighted sum.

    Returns:
        Output, weights and survivors. A query without a valid key has zero weights, a zero output
        and zero gradients.
    """
    groups = call.query.shape[1] // call.key.shape[1]
    key, value = (x.repeat_interleave(groups, dim=1) if groups > 1 else x for x in (call.key, call.value))
    scores = score(call.query, key, bias=call.bias, scale=call.scale, softcap=call.softcap)
    if call.selection is None:
        probabilities, keep = softmax(scores, call.pairs.valid, call.sinks), call.pairs.valid
    else:
        probabilities, keep = sparse_probabilities(scores, call.pairs, call.selection, call.sinks)
    weights = probabilities.to(value.dtype)
    if call.dropout is not None:
        weights = weights.masked_fill(~call.dropout.survivors(call.pairs.shape), 0.0) * call.dropout.factor
    with torch.autocast(value.device.type, enabled=False):  # which would change the dtype
        output = weights @ value
    return Computed(output, weights=weights, probabilities=probabilities, keep=keep)


def score(
    query: Tensor, key: Tensor, *, bias: Tensor | None, scale: float | Tensor, softcap: float | None = None
) -> Tensor:
    """Final scores `[B, H, Q, K]` in fp32 or better: q.k * scale, soft-capped, plus the bias.

    A soft-cap c maps s to c * tanh(s / c): Gemma 2, arXiv 2408.00118.
    """
    dtype = torch.promote_types(query.dtype, torch.float32)
    # Autocast would take the product back to half precision, and ranks with it.
    with torch.autocast(query.device.type, enabled=False):
        scores = (query.to(dtype) * scale) @ key.to(dtype).transpose(-2, -1)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    return scores if bias is None else scores + bias.to(dtype)


def softmax(scores: Tensor, valid: Tensor | None, sinks: Tensor | None) -> Tensor:
    """Softmax over the valid keys of each query, `[B, H, Q, K]`.

    Args:
        scores: `[B, H, Q, K]`.
        valid: Bool, broadcastable; None for all.
        sinks: Broadcastable to `[B, H, Q, 1]`: one more logit for every query of a head, which takes its
            share of the weight and has no value (attention sinks as in gpt-oss). Never removed, not
            counted.
    """
    if sinks is None:
        return masked_softmax(scores, valid)
    column = sinks.to(scores.dtype).expand(*scores.shape[:3], 1)
    if valid is not None:
        valid = F.pad(valid.expand(scores.shape), (0, 1), value=True)
    return masked_softmax(torch.cat((scores, column), dim=-1), valid)[..., :-1]


def sparse_probabilities(
    scores: Tensor, pairs: Pairs, selection: Selection, sinks: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Attention probabilities over the survivors of a selection, and the survivors."""
    form, valid = selection.form, pairs.valid
    keep: Tensor | None
    if isinstance(form, Normalizer):
        probabilities = form.normalize(scores, valid)
        keep = probabilities.detach() != 0 if form.removes else valid
    else:
        keep = keep_mask(scores, pairs, form)
        probabilities = softmax(scores, keep, sinks)
    if selection.heads is None and not selection.straight_through:
        return probabilities, keep
    dense = softmax(scores, valid, sinks)
    if selection.straight_through:
        probabilities = _StraightThrough.apply(probabilities, dense)
    if selection.heads is not None:
        chosen = selection.heads[:, None, None]
        probabilities = torch.where(chosen, probabilities, dense)
        if keep is not None:
            keep = keep | ~chosen if valid is None else (keep | ~chosen) & valid
    return probabilities, keep


@torch.no_grad()
def keep_mask(scores: Tensor, pairs: Pairs, form: Threshold | Blocks | Mask) -> Tensor:
    """The survivors: bool `[B, H, Q, K]`, True = survives."""
    if isinstance(form, Threshold):
        ranking = scores if form.ranking is None else form.ranking
        ranking = with_forced(ranking if form.largest else -ranking, form.forced)
        # "Not below" rather than "at or above": a NaN score survives and shows, instead of vanishing.
        keep = (ranking < threshold(ranking, pairs, form)).logical_not_()
        return keep.expand(scores.shape) if pairs.valid is None else keep & pairs.valid
    if isinstance(form, Blocks):
        return _block_mask(scores, pairs, form)
    return form.survivors(scores if pairs.valid is None else scores.masked_fill(~pairs.valid, -torch.inf))


@torch.no_grad()
def threshold(ranking: Tensor, pairs: Pairs, form: Threshold) -> Tensor:
    """Tau of each query, broadcastable to `[B, H, Q, 1]`."""
    if form.scope == "row":
        return kth_largest(ranking, form.pool, form.keep, form.keep_bound)
    flat = ranking.flatten(-2).unsqueeze(-2)
    pool = None if form.pool is None else form.pool.flatten(-2).unsqueeze(-2)
    tau = kth_largest(flat, pool, form.keep, form.keep_bound)
    return torch.minimum(tau, kth_best_key(ranking, pairs.valid, form.min_keep))


def _block_mask(scores: Tensor, pairs: Pairs, form: Blocks) -> Tensor:
    """Survivors of `Blocks`, pooled by products with the blocks' membership matrices."""
    # In float64, so that means of equal scores tie whatever the blocks' sizes, padding changes no
    # rounding, and autocast does not reach the products.
    in_query_block = _membership(form.query_block, form.count[0])
    in_key_block = _membership(form.key_block, form.count[1])

    def pool(values: Tensor) -> Tensor:
        return in_query_block.transpose(-2, -1) @ values.double() @ in_key_block

    valid = torch.ones_like(scores[:, :1], dtype=torch.bool) if pairs.valid is None else pairs.valid
    count = pool(valid)
    ranking = pool(scores.masked_fill(~valid, 0.0)) / count.clamp(min=1)
    if form.forced is not None:
        ranking = with_forced(ranking, pool(form.forced & valid) > 0)
    there = count > 0
    wanted = keep_count(there.sum(dim=-1, keepdim=True), form.sparsity).clamp(min=1)
    chosen = (ranking < kth_largest(ranking, there, wanted, None)).logical_not_() & there
    keep = (in_query_block @ chosen.double() @ in_key_block.transpose(-2, -1)) > 0
    return rescue(keep & valid, with_forced(scores, form.forced), pairs.valid, form.min_keep)


def _membership(block: Tensor, count: int) -> Tensor:
    """One-hot rows `[B, 1, N, blocks]`, float64; all zero for a token in no block."""
    return (block[:, None, :, None] == torch.arange(count, device=block.device)).double()


class _StraightThrough(torch.autograd.Function):
    """The first argument's value with the second one's gradient."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, differentiable: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, Tensor]:
        return None, gradients[0]
