"""Attention on a GPU in O(N) memory: exact thresholds, then FlashAttention over the survivors.

Stage 1 finds each query's threshold (`threshold`) or chooses blocks (`blocks`), stage 2 computes the output and its
gradients (`flash`); neither stores a matrix of scores or of weights. What a call brings as a matrix is read where it
lies: masks, biases, the noise of rule `random`. One byte is stored for each tile of up to 4,096 pairs.

Letters: B batch, H heads, Hkv key/value heads, N tokens (Q queries, K keys), D and Dv head widths.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from crisp_attention import eager
from crisp_attention.backends.call import Call, Computed, Detail, refuse_second_derivatives
from crisp_attention.backends.triton import blocks, flash, threshold, tiles
from crisp_attention.rules.selection import Blocks, Threshold

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_WIDTHS = (16, 32, 64, 128)


def refusal(call: Call) -> str | None:
    """Why a call cannot be served; None if it can."""
    q, k, v = call.query, call.key, call.value
    obstacle = eager.obstacle(q, k, v)
    if obstacle is not None:
        return obstacle
    if not tiles.INTERPRETED and q.device.type != "cuda":
        return f"its tensors are on device {q.device.type!r} instead of 'cuda'"
    if not tiles.INTERPRETED and torch.version.hip is None and torch.cuda.get_device_capability(q.device) < (8, 0):
        return "the GPU's compute capability is below 8.0"
    if q.dtype not in _DTYPES or not q.dtype == k.dtype == v.dtype:
        return (
            f"it takes one of float16, bfloat16 and float32 for all of q, k and v, not {q.dtype}, {k.dtype}, {v.dtype}"
        )
    if q.shape[3] not in _WIDTHS or v.shape[3] not in _WIDTHS:
        return f"heads are 16, 32, 64 or 128 wide for it, not {q.shape[3]} (values {v.shape[3]})"
    if call.detail >= Detail.WEIGHTS:
        return "it stores no weights"
    if call.softcap is not None:
        return "it has no soft-cap"
    if call.sinks is not None:
        return "it has no attention sinks"
    if isinstance(call.scale, Tensor):
        return "the scale is a tensor"
    if call.bias is not None and call.bias.requires_grad and torch.is_grad_enabled():
        return "it has no gradient for a bias"
    return _selection_refusal(call)


def _selection_refusal(call: Call) -> str | None:
    selection = call.selection
    if selection is None:
        return None
    if selection.straight_through:
        return "it has no straight-through gradient"
    form = selection.form
    if isinstance(form, Threshold):
        if form.scope == "matrix" and call.query.shape[2] * call.key.shape[2] >= 2**31:
            return "it counts a head's pairs in 31 bits"
        return None
    if not isinstance(form, Blocks):
        return "the rule is neither a threshold nor a choice of blocks"
    if call.bias is not None:
        return "it ranks blocks without a bias"
    if form.forced is not None:
        return "it ranks blocks without forced pairs"
    if form.min_keep > 1:
        return "it keeps no more than one key of each query on top of the blocks (min_keep=1)"
    if not blocks.by_key_alone(call.pairs.valid):
        return "it ranks blocks only under a mask that is the same for all queries and heads"
    return None


def attention(call: Call) -> Computed:
    """Thresholds, then attention over the survivors.

    Returns:
        The output; with `Detail.SUMMARY` also the survivors of queries that count, and entropies.
    """
    output, kept, entropy = _Attention.apply(call.query, call.key, call.value, call)
    if kept is not None:
        if call.pairs.query_valid is not None:
            kept = kept.masked_fill(~call.pairs.query_valid[:, None, :], 0)
        kept = kept.sum(dim=-1)
    return Computed(output, kept=kept, entropy=entropy)


class _Attention(torch.autograd.Function):
    """Queries, keys and values to the output, survivors and entropy of each query."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, call: Call
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        shape, keys = call.pairs.shape, key.shape[2]
        split = tiles.plan(query.dtype, keys)
        valid = call.pairs.valid
        inputs = tiles.Inputs(
            query=tiles.tokens(query),
            key=tiles.tokens(key),
            value=tiles.tokens(value),
            bias=tiles.matrix(call.bias, shape),
            valid=tiles.matrix(valid, shape),
            stop=None if valid is None else tiles.stops(valid, split),
            scale=cast(float, call.scale),
            heads=shape[1],
            groups=shape[1] // key.shape[1],
            queries=shape[2],
            keys=keys,
        )
        rule, alive, largest = _survivors(call, inputs, split)
        dropped = None
        if call.dropout is not None:
            dropped = tiles.Dropped(call.dropout.seed, call.dropout.lowest, call.dropout.factor)
        summary = call.detail >= Detail.SUMMARY
        done = flash.forward(inputs, rule, dropped, split, alive, largest=largest, summary=summary)
        # Masks among them: the backward pass reads them again, and autograd notices who writes to them before.
        matrices = (None if x is None else x.data for x in (inputs.bias, inputs.valid))
        ctx.save_for_backward(query, key, value, done.output, done.log_sum, *matrices)
        # What the graph neither made nor is asked about; the tensors above come back through it.
        ctx.rest = (
            inputs._replace(query=None, key=None, value=None),
            rule,
            dropped,
            split,
            done.alive,
            largest,
        )
        if done.kept is not None and done.entropy is not None:
            ctx.mark_non_differentiable(done.kept, done.entropy)
        return done.output, done.kept, done.entropy

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, *others: Tensor | None) -> tuple[Tensor | None, ...]:
        refuse_second_derivatives("triton")
        query, key, value, output, log_sum, *_ = ctx.saved_tensors
        rest, rule, dropped, split, alive, largest = ctx.rest
        gradients = flash.backward(
            flash.like(rest, query, key, value), rule, dropped, split,
            flash.Forward(output, log_sum, alive, None, None), gradient, largest=largest,
        )  # fmt: skip
        return *gradients, None


def _survivors(call: Call, inputs: tiles.Inputs, split: tiles.Plan) -> tuple[tiles.Rule, Tensor | None, bool]:
    """Which pairs survive, which tiles to visit (None where scores tell), and whether higher ranks survive."""
    selection = call.selection
    if selection is None:
        return tiles.Rule(), None, True
    form, shape, heads = selection.form, call.pairs.shape, selection.heads
    alive = None
    if isinstance(form, Threshold):
        largest = form.largest
        rule = tiles.Rule(ranking=tiles.matrix(form.ranking, shape), forced=tiles.matrix(form.forced, shape))
        tau = threshold.thresholds(inputs, rule, form, split)
    else:
        assert isinstance(form, Blocks)
        largest = True
        chosen = blocks.choose(call.query, call.key, cast(float, call.scale), form, call.pairs.valid)
        alive = blocks.tiles_of(form, chosen, split)
        rule = tiles.Rule(
            chosen=tiles.matrix(chosen, (*shape[:2], *form.count)),
            query_block=form.query_block.to(torch.int32).contiguous(),
            key_block=form.key_block.to(torch.int32).contiguous(),
        )
        tau = _of_queries_in_no_block(call, inputs, form, split)
    if heads is not None:
        tau = tau.masked_fill(~heads[:, None], -torch.inf)
        alive = None if alive is None else alive.masked_fill(~heads[:, None, None], 1)
    return rule._replace(tau=tau.contiguous()), alive, largest


def _of_queries_in_no_block(call: Call, inputs: tiles.Inputs, form: Blocks, split: tiles.Plan) -> Tensor:
    """Thresholds that let the best key of padded queries survive, and beyond the blocks nothing of all others."""
    batch, heads, queries, _ = call.pairs.shape
    if call.pairs.query_valid is None:
        return torch.full((batch, heads, queries), torch.inf, device=call.query.device)
    keep = tiles.matrix((form.query_block < 0).to(torch.int64)[:, None, :, None], (batch, heads, queries, 1))
    assert keep is not None
    return threshold.search(inputs, tiles.Rule(), keep, inputs.valid, split, largest=True)
