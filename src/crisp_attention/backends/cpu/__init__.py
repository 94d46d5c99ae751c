"""Attention over survivors on the processor: exact selection, then only what survives, forward and backward.

Scores are computed a few queries at a time and never stored for the backward pass (a threshold over a whole
head keeps one head's at a time, per thread); survivors are: six bytes each. Compiled by Numba on first use and
cached on disk. Computes in float32; results do not depend on the number of threads.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from crisp_attention import eager, noise
from crisp_attention.backends.call import Call, Computed, Detail, refuse_second_derivatives
from crisp_attention.backends.cpu import compiling, kernels, pool
from crisp_attention.backends.cpu.writer import LANES, WIDTHS
from crisp_attention.rules.selection import Pairs, Selection, Threshold

_MOST_KEYS = 2**16  # a survivor's key is stored in 16 bits
_MOST_PAIRS = 2**32 - 1  # what is not below a level is counted in 32 bits


def refusal(call: Call) -> str | None:
    """Why a call cannot be served, as half a sentence; None if it can."""
    selection, form = call.selection, None if call.selection is None else call.selection.form
    width = max(call.query.shape[-1], call.value.shape[-1])
    obstacle = eager.obstacle(call.query, call.key, call.value)
    reasons = (
        (call.query.device.type != "cpu", f"the tensors are on {call.query.device}"),
        (obstacle is not None, obstacle),
        (compiling.DISABLED, "NUMBA_DISABLE_JIT is set"),
        (0 in call.pairs.shape, "there are no pairs"),
        (call.query.dtype == torch.float64, "it computes in float32"),
        (selection is None, "nothing is to be removed"),
        (not isinstance(form, Threshold), "the rule is not one of a threshold"),
        (selection is not None and selection.straight_through, "gradients are to be straight-through"),
        (call.softcap is not None, "scores are soft-capped"),
        (call.sinks is not None, "there are attention sinks"),
        (isinstance(call.scale, Tensor), "the scale is a tensor"),
        (call.detail is Detail.WEIGHTS, "somebody wants to see the weights, which it does not store"),
        (
            call.bias is not None and call.bias.requires_grad and torch.is_grad_enabled(),
            "the bias wants a gradient",
        ),
        (width > max(WIDTHS), f"heads are wider than {max(WIDTHS)}"),
        (call.pairs.shape[3] > _MOST_KEYS, f"there are more than {_MOST_KEYS} keys"),
        (
            isinstance(form, Threshold) and form.scope == "matrix" and math.prod(call.pairs.shape[2:]) > _MOST_PAIRS,
            f"a head has more than {_MOST_PAIRS} pairs to rank",
        ),
    )
    return next((reason for refused, reason in reasons if refused), None)


def attention(call: Call) -> Computed:
    """The call's output, and kept pairs and entropies if they are wanted."""
    query, key, value = (x.to(torch.float32) for x in (call.query, call.key, call.value))
    output, kept, entropy = _Attention.apply(query, key, value, _Plan.of(call))
    output = output.to(call.value.dtype)
    return Computed(output, kept, entropy) if call.detail is Detail.SUMMARY else Computed(output)


@dataclass(frozen=True)
class _Plan:
    """A call as the kernels read it.

    Attributes:
        mask: valid, by_key, by_pair, query_valid, counts_padded, bias, has_bias.
        selection: ranking, ranked, largest, forced, forces, by_row, keep, min_keep.
        dropout: Folded seed, lowest, factor.
        room: Survivors that each head has room for, `[B * H]`.
        factor: Scale of q.k.
        width: Head width with padding.
        stores: Whether survivors are kept for the backward pass.
        summarises: Whether kept pairs and entropies are wanted.
    """

    mask: tuple[Any, ...]
    selection: tuple[Any, ...]
    dropout: tuple[Any, ...]
    room: Tensor
    factor: float
    width: int
    stores: bool
    summarises: bool

    @property
    def scratch(self) -> tuple[bool, bool]:
        """Whether there is one threshold a query, and whether keys are ranked by anything else than their scores."""
        _, ranked, largest, _, forces, by_row, *_ = self.selection
        return by_row, ranked or forces or not largest

    @classmethod
    def of(cls, call: Call) -> _Plan:
        """Read a call that is not refused."""
        selection, pairs, shape = cast(Selection, call.selection), call.pairs, call.pairs.shape
        form = cast(Threshold, selection.form)
        batch, heads, queries, keys = shape
        by_row = form.scope == "row"
        # Padded queries take no part in a head's threshold, unless the rule's pool is every valid pair.
        counts_padded = by_row or pairs.query_valid is None or form.pool is None or form.pool is pairs.valid
        keep = form.keep.expand(batch, heads, queries if by_row else 1, 1)[..., 0]
        if selection.heads is not None:
            keep = keep.masked_fill(~selection.heads[:, None], kernels.EVERYTHING)
        # One threshold a head: padded queries survive by the same one, and each query by its best keys.
        room = keep.clamp(max=keys).sum(-1) if by_row else (keep[..., 0] + queries * form.min_keep)
        room = room + (0 if by_row else _uncounted(pairs))
        # A tie or two; where there are more, everything is computed again with the room that it takes.
        room = (room + queries // 8 + 32).flatten().clamp(max=queries * keys)
        rank = form.ranking
        return cls(
            mask=(
                *_mask(pairs),
                _query_valid(pairs),
                counts_padded,
                _filled(shape, call.bias, torch.float32),
                call.bias is not None,
            ),
            selection=(
                _filled(shape, rank, torch.float32),
                rank is not None,
                form.largest,
                _filled(shape, form.forced, torch.bool),
                form.forced is not None,
                by_row,
                keep.contiguous().numpy(),
                form.min_keep,
            ),
            dropout=_dropout(call),
            room=room,
            factor=cast(float, call.scale),
            width=next(width for width in WIDTHS if width >= max(call.query.shape[-1], call.value.shape[-1])),
            # A Function is told which inputs want gradients, even where none are recorded.
            stores=torch.is_grad_enabled() and any(x.requires_grad for x in (call.query, call.key, call.value)),
            summarises=call.detail is Detail.SUMMARY,
        )


def _mask(pairs: Pairs) -> tuple[tuple[Any, int, int, int, int], bool, bool]:
    """The mask of valid pairs, and whether it is to be read by key (all queries alike) or by pair."""
    valid = pairs.valid
    # As bytes, which torch reduces many times faster.
    if valid is None or bool((valid[:, :, :1] if valid.stride(2) == 0 else valid).view(torch.uint8).amin()):
        return _filled(pairs.shape, None, torch.bool), False, False
    by_key = valid.shape[1] == 1 and (valid.stride(2) == 0 or bool((valid == valid[:, :, :1]).all()))
    return _strided(valid.expand(pairs.shape)), by_key, not by_key


def _query_valid(pairs: Pairs) -> Any:
    """The queries that count, `[B, Q]`."""
    if pairs.query_valid is None:
        return np.ones(pairs.shape[0:3:2], np.bool_)
    # A copy: the backward pass reads it too, when its owner may have written to it.
    return pairs.query_valid.clone(memory_format=torch.contiguous_format).numpy()


def _uncounted(pairs: Pairs) -> int:
    """Room for the survivors of padded queries, which no count foresees."""
    return 0 if pairs.query_valid is None else int((~pairs.query_valid).sum(-1).max()) * pairs.shape[3]


def _filled(shape: tuple[int, ...], tensor: Tensor | None, dtype: torch.dtype) -> tuple[Any, int, int, int, int]:
    """A tensor or, in place of None, a zero that nobody reads, expanded to a shape without copying."""
    chosen = torch.zeros((), dtype=dtype, device="cpu") if tensor is None else tensor.to(dtype)
    return _strided(chosen.expand(shape))


def _dropout(call: Call) -> tuple[Any, Any, Any]:
    if call.dropout is None:
        return np.uint32(0), np.uint32(0), np.float32(1.0)
    state = int(noise.fold(call.dropout.seed)) % 2**32
    return np.uint32(state), np.uint32(call.dropout.lowest), np.float32(call.dropout.factor)


def _shape(query: Tensor, key: Tensor, value: Tensor) -> tuple[int, ...]:
    batch, heads, queries, depth = query.shape
    return batch, heads, key.shape[1], queries, key.shape[2], depth, value.shape[3]


def _empty(batch: int, heads: int, tokens: int, width: int) -> Tensor:
    """Float32 `[B, H, N, D]` with the heads of a token side by side in memory, as a model's projections have them."""
    strides = (tokens * heads * width, width, heads * width, 1)
    # By its strides rather than transposed: of a Function's outputs, none that is a view may be changed in place.
    return torch.empty_strided((batch, heads, tokens, width), strides, dtype=torch.float32, device="cpu")


def _flat(tensor: Tensor) -> tuple[Any, int, int, int]:
    """A tensor of which the last dimension is to be contiguous, as memory and its other strides."""
    if tensor.stride(-1) != 1 and tensor.shape[-1] > 1:
        tensor = tensor.contiguous()
    return _strided(tensor)[:4]


def _strided(tensor: Tensor) -> tuple[Any, int, int, int, int]:
    """A tensor's memory as one dimension, from its first element to its last, and its strides.

    In this form all tensors are of one type for Numba, however they lie in memory, and a kernel is compiled once.
    """
    tensor = tensor.detach()
    span = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    batch, heads, queries, last = tensor.stride()
    return tensor.as_strided((span,), (1,)).numpy(), batch, heads, queries, last


class _Attention(torch.autograd.Function):
    """Output `[B, H, Q, Dv]`, kept pairs `[B, H]` and entropies `[B, H, Q]`."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, plan: _Plan) -> tuple[Tensor, Tensor, Tensor]:
        shape = _shape(query, key, value)
        batch, heads, _, queries, *_ = shape
        stores = plan.stores
        out = _empty(batch, heads, queries, value.shape[3])
        summary = (heads, queries) if plan.summarises else (0, 0)
        kept = torch.empty(batch, summary[0], dtype=torch.int64, device="cpu")
        entropy = query.new_empty(batch, *summary)
        room = plan.room if stores else torch.zeros_like(plan.room)
        while True:
            offsets = torch.cat((room.new_zeros(1), room.cumsum(0)))
            total = int(offsets[-1])
            columns = torch.empty(total + LANES, dtype=torch.uint16, device="cpu")
            weights = query.new_empty(total + LANES)
            places = (batch, heads, queries + 1) if stores else (1, 1, 1)
            starts = torch.empty(places, dtype=torch.int64, device="cpu")
            needed = torch.empty(batch * heads, dtype=torch.int64, device="cpu")
            arrays = (x.numpy() for x in (offsets, columns, weights, starts))
            kernel = partial(
                kernels.forward,
                shape,
                *(_flat(x) for x in (query, key, value)),
                np.float32(plan.factor),
                *plan.mask,
                *plan.selection,
                *plan.dropout,
                plan.width,
                *arrays,
                stores,
                _flat(out),
                *(x.numpy() for x in (kept, entropy)),
                plan.summarises,
                needed.numpy(),
            )
            scratch = partial(kernels.forward_scratch, shape, plan.width, *plan.scratch)
            pool.share(kernel, scratch, batch * key.shape[1])
            if not stores or bool((needed <= room).all()):
                break
            room = needed  # more ties than anyone could foresee
        ctx.plan = plan
        ctx.save_for_backward(query, key, value, out, offsets, columns, weights, starts)
        ctx.mark_non_differentiable(kept, entropy)
        return out, kept, entropy

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivatives("cpu")
        query, key, value, out, *stored = ctx.saved_tensors
        plan: _Plan = ctx.plan
        shape = _shape(query, key, value)
        # Not as the inputs lie in memory: what is not contiguous along D would be written to a copy.
        dq, dk, dv = (_empty(*x.shape) for x in (query, key, value))
        kernel = partial(
            kernels.backward,
            shape,
            *(_flat(x) for x in (query, key, value, out, gradients[0])),
            np.float32(plan.factor),
            *plan.mask[3:5],
            *plan.dropout,
            plan.width,
            *(x.numpy() for x in stored),
            *(_flat(x) for x in (dq, dk, dv)),
        )
        most = int(stored[0].diff().max())
        pool.share(kernel, partial(kernels.backward_scratch, shape, plan.width, most), query.shape[0] * key.shape[1])
        return dq, dk, dv, None
