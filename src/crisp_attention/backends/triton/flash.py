"""Stage 2: attention over the survivors, and its gradients, with the weights recomputed tile by tile.

As in FlashAttention-2 (Dao, arXiv 2307.08691): the forward pass keeps a running maximum and sum of each row and stores
the logarithm of the sum; the backward pass recomputes weights from it, once over tiles of queries for dQ and once
over tiles of keys for dK and dV, so that no gradient is added to by two programs. The forward pass notes which tiles
have survivors (one byte a tile); the backward pass does not touch the others.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from crisp_attention.backends.triton.tiles import (
    Dropped,
    Inputs,
    Plan,
    Rule,
    dot,
    drop_tile,
    keep_tile,
    place,
    row_states,
    row_tile,
    score_tile,
    stop_column,
    token_tile,
    tokens,
)


class Forward(NamedTuple):
    """What the forward pass leaves.

    Attributes:
        output: `[B, H, Q, Dv]`.
        log_sum: Float32 `[B, H, Q]`, logarithm of the sum of the survivors' exponentials; 0 without survivors.
        alive: Int8 `[B, H, rows of tiles, columns of tiles]`, not 0 where a tile may have survivors.
        kept: Int32 `[B, H, Q]`, survivors; None if not wanted.
        entropy: Float32 `[B, H, Q]`, in nats; None if not wanted.
    """

    output: Tensor
    log_sum: Tensor
    alive: Tensor
    kept: Tensor | None
    entropy: Tensor | None


def forward(
    inputs: Inputs,
    rule: Rule,
    dropped: Dropped | None,
    split: Plan,
    alive: Tensor | None,
    *,
    largest: bool,
    summary: bool,
) -> Forward:
    """Attention over the survivors.

    Args:
        inputs: The call.
        rule: Its survivors.
        dropped: Its dropout.
        split: Its tiles.
        alive: Tiles to visit, as in `Forward`; None where only scores tell.
        largest: Whether higher ranks survive.
        summary: Whether kept pairs and entropies are wanted.
    """
    query, value = inputs.query.data, inputs.value.data
    batch, heads, queries, width = query.shape
    rows, columns = split.tiles(queries, inputs.keys)
    output = torch.empty(batch, heads, queries, value.shape[3], dtype=query.dtype, device=query.device)
    log_sum = torch.empty(batch, heads, queries, dtype=torch.float32, device=query.device)
    kept = torch.empty_like(log_sum, dtype=torch.int32) if summary else None
    entropy = torch.empty_like(log_sum) if summary else None
    noted = torch.zeros(batch, heads, rows, columns, dtype=torch.int8, device=query.device) if alive is None else alive
    _forward_kernel[(rows * batch * heads,)](
        inputs, rule, dropped, tokens(output), log_sum, noted, kept, entropy, WIDTH=width,
        VALUE_WIDTH=value.shape[3], ROWS=split.rows, COLUMNS=split.columns, NOTE=alive is None,
        LARGEST=largest, num_warps=split.warps,
    )  # fmt: skip
    return Forward(output, log_sum, noted, kept, entropy)


def backward(
    inputs: Inputs,
    rule: Rule,
    dropped: Dropped | None,
    split: Plan,
    done: Forward,
    gradient: Tensor,
    *,
    largest: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of queries, keys and values.

    Args:
        inputs: The call.
        rule: Its survivors.
        dropped: Its dropout.
        split: Its tiles.
        done: What the forward pass left.
        gradient: Of the output, `[B, H, Q, Dv]`.
        largest: As in `forward`.
    """
    query, key, value = inputs.query.data, inputs.key.data, inputs.value.data
    batch, heads, queries, width = query.shape
    rows, columns = split.tiles(queries, inputs.keys)
    to_query, to_key, to_value = (
        torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device) for tensor in (query, key, value)
    )
    mean = torch.empty_like(done.log_sum)
    sizes = {"WIDTH": width, "VALUE_WIDTH": value.shape[3], "ROWS": split.rows, "COLUMNS": split.columns}
    _query_gradient_kernel[(rows * batch * heads,)](
        inputs, rule, dropped, tokens(done.output), tokens(gradient), done.log_sum, mean, done.alive,
        tokens(to_query), **sizes, LARGEST=largest, num_warps=split.warps,
    )  # fmt: skip
    _key_gradient_kernel[(columns * batch * key.shape[1],)](
        inputs, rule, dropped, tokens(gradient), done.log_sum, mean, done.alive, tokens(to_key), tokens(to_value),
        **sizes, LARGEST=largest, num_warps=split.warps,
    )  # fmt: skip
    return to_query, to_key, to_value


def like(inputs: Inputs, query: Tensor, key: Tensor, value: Tensor) -> Inputs:
    """The inputs with other tensors of the same shapes."""
    return inputs._replace(query=tokens(query), key=tokens(key), value=tokens(value))


@triton.jit
def _store_tokens(of, example, head, index, count, values, WIDTH: tl.constexpr):
    start = of.data + example * of.batch + head * of.head
    offsets = index.to(tl.int64)[:, None] * of.token + tl.arange(0, WIDTH)[None, :]
    tl.store(start + offsets, values.to(of.data.dtype.element_ty), mask=(index < count)[:, None])


@triton.jit
def _forward_kernel(
    inputs, rule, dropped, output, log_sum, alive, kept, entropy,
    WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    NOTE: tl.constexpr, LARGEST: tl.constexpr,
):  # fmt: skip
    example, head, first_row = place(inputs, ROWS)
    rows = first_row + tl.arange(0, ROWS)
    of_row = (example * inputs.heads + head) * inputs.queries + rows
    exists = rows < inputs.queries
    stop = stop_column(inputs, example, rows)
    tiles = tl.cdiv(inputs.keys, COLUMNS)
    visits = alive + ((example * inputs.heads + head) * tl.cdiv(inputs.queries, ROWS) + first_row // ROWS) * tiles
    query = token_tile(inputs.query, example, head, rows, inputs.queries, WIDTH)
    tau = tl.zeros([ROWS], tl.float32)
    if rule.tau is not None:
        tau = row_tile(rule.tau, inputs, example, head, rows)
    states = tl.zeros([ROWS], tl.uint32)
    if dropped is not None:
        states = row_states(dropped, inputs, example, head, rows)
    best = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    count = tl.zeros([ROWS], tl.int32)
    # Sum of p * (s - best): entropy is log(total) - energy / total.
    energy = tl.zeros([ROWS], tl.float32)
    sums = tl.zeros([ROWS, VALUE_WIDTH], tl.float32)
    for first_column in range(0, stop, COLUMNS):
        visit = 1
        if not NOTE:
            visit = tl.load(visits + first_column // COLUMNS).to(tl.int32)
        if visit != 0:
            columns = first_column + tl.arange(0, COLUMNS)
            key = token_tile(inputs.key, example, head // inputs.groups, columns, inputs.keys, WIDTH)
            scores = score_tile(query, key, inputs, example, head, rows, columns)
            keep = keep_tile(scores, tau, inputs, rule, example, head, rows, columns, LARGEST)
            survivors = tl.sum(keep.to(tl.int32), 1)
            some = tl.max(survivors, 0) > 0
            if NOTE:
                tl.store(visits + first_column // COLUMNS, some.to(tl.int8))
            if some:
                scores = tl.where(keep, scores, float("-inf"))
                higher = tl.maximum(best, tl.max(scores, 1))
                # A row without survivors so far: no difference of infinities.
                shift = tl.where(higher == float("-inf"), 0.0, higher)
                shrink = tl.exp(best - shift)
                below = scores - shift[:, None]
                weights = tl.exp(below)
                if entropy is not None:
                    moved = tl.where(total > 0.0, total * (best - shift), 0.0)
                    energy = shrink * (energy + moved) + tl.sum(tl.where(keep, weights * below, 0.0), 1)
                total = total * shrink + tl.sum(weights, 1)
                count += survivors
                if dropped is not None:
                    weights = tl.where(drop_tile(dropped, states, columns), 0.0, weights)
                value = token_tile(inputs.value, example, head // inputs.groups, columns, inputs.keys, VALUE_WIDTH)
                sums = sums * shrink[:, None] + dot(weights.to(value.dtype), value)
                best = higher
    some_weight = tl.where(total == 0.0, 1.0, total)
    logarithm = tl.log(some_weight)
    if dropped is not None:
        sums = sums * dropped.factor
    _store_tokens(output, example, head, rows, inputs.queries, sums / some_weight[:, None], VALUE_WIDTH)
    tl.store(log_sum + of_row, tl.where(best == float("-inf"), 0.0, best) + logarithm, mask=exists)
    if kept is not None:
        tl.store(kept + of_row, count, mask=exists)
    if entropy is not None:
        tl.store(entropy + of_row, logarithm - energy / some_weight, mask=exists)


@triton.jit
def _score_gradient_tile(
    query, key, value, gradient, tau, log_sum, mean, states, inputs, rule, dropped, example, head, rows, columns,
    LARGEST: tl.constexpr,
):  # fmt: skip
    """The weights after dropout, and the gradients of the scores, of one tile."""
    scores = score_tile(query, key, inputs, example, head, rows, columns)
    keep = keep_tile(scores, tau, inputs, rule, example, head, rows, columns, LARGEST)
    weights = tl.where(keep, tl.exp(scores - log_sum[:, None]), 0.0)
    to_weights = dot(gradient, tl.trans(value))
    used = weights
    if dropped is not None:
        gone = drop_tile(dropped, states, columns)
        used = tl.where(gone, 0.0, weights * dropped.factor)
        to_weights = tl.where(gone, 0.0, to_weights * dropped.factor)
    return used, tl.where(keep, weights * (to_weights - mean[:, None]), 0.0)


@triton.jit
def _query_gradient_kernel(
    inputs, rule, dropped, output, gradient, log_sum, mean, alive, to_query,
    WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    LARGEST: tl.constexpr,
):  # fmt: skip
    """Gradients of a tile of queries, and each row's mean gradient of its weights, which dK and dV need too."""
    example, head, first_row = place(inputs, ROWS)
    rows = first_row + tl.arange(0, ROWS)
    stop = stop_column(inputs, example, rows)
    tiles = tl.cdiv(inputs.keys, COLUMNS)
    visits = alive + ((example * inputs.heads + head) * tl.cdiv(inputs.queries, ROWS) + first_row // ROWS) * tiles
    query = token_tile(inputs.query, example, head, rows, inputs.queries, WIDTH)
    given = token_tile(gradient, example, head, rows, inputs.queries, VALUE_WIDTH)
    result = token_tile(output, example, head, rows, inputs.queries, VALUE_WIDTH)
    of_weights = tl.sum(given.to(tl.float32) * result.to(tl.float32), 1)
    of_row = (example * inputs.heads + head) * inputs.queries + rows
    tl.store(mean + of_row, of_weights, mask=rows < inputs.queries)
    sums_log = row_tile(log_sum, inputs, example, head, rows)
    tau = tl.zeros([ROWS], tl.float32)
    if rule.tau is not None:
        tau = row_tile(rule.tau, inputs, example, head, rows)
    states = tl.zeros([ROWS], tl.uint32)
    if dropped is not None:
        states = row_states(dropped, inputs, example, head, rows)
    sums = tl.zeros([ROWS, WIDTH], tl.float32)
    for first_column in range(0, stop, COLUMNS):
        if tl.load(visits + first_column // COLUMNS).to(tl.int32) != 0:
            columns = first_column + tl.arange(0, COLUMNS)
            key = token_tile(inputs.key, example, head // inputs.groups, columns, inputs.keys, WIDTH)
            value = token_tile(inputs.value, example, head // inputs.groups, columns, inputs.keys, VALUE_WIDTH)
            _, to_scores = _score_gradient_tile(
                query, key, value, given, tau, sums_log, of_weights, states, inputs, rule, dropped, example, head,
                rows, columns, LARGEST,
            )  # fmt: skip
            sums += dot(to_scores.to(key.dtype), key)
    _store_tokens(to_query, example, head, rows, inputs.queries, sums * inputs.scale, WIDTH)


@triton.jit
def _key_gradient_kernel(
    inputs, rule, dropped, gradient, log_sum, mean, alive, to_key, to_value,
    WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    LARGEST: tl.constexpr,
):  # fmt: skip
    """Gradients of a tile of keys and values, over all queries of all heads that share them."""
    tiles = tl.cdiv(inputs.keys, COLUMNS)
    row_tiles = tl.cdiv(inputs.queries, ROWS)
    program = tl.program_id(0)
    shared = inputs.heads // inputs.groups
    of = (program // tiles).to(tl.int64)
    example, key_head, tile = of // shared, of % shared, program % tiles
    columns = tile * COLUMNS + tl.arange(0, COLUMNS)
    key = token_tile(inputs.key, example, key_head, columns, inputs.keys, WIDTH)
    value = token_tile(inputs.value, example, key_head, columns, inputs.keys, VALUE_WIDTH)
    key_sums = tl.zeros([COLUMNS, WIDTH], tl.float32)
    value_sums = tl.zeros([COLUMNS, VALUE_WIDTH], tl.float32)
    for member in range(0, inputs.groups):
        head = key_head * inputs.groups + member
        visits = alive + (example * inputs.heads + head) * row_tiles * tiles + tile
        for row_tile_index in range(0, row_tiles):
            if tl.load(visits + row_tile_index * tiles).to(tl.int32) != 0:
                rows = row_tile_index * ROWS + tl.arange(0, ROWS)
                query = token_tile(inputs.query, example, head, rows, inputs.queries, WIDTH)
                given = token_tile(gradient, example, head, rows, inputs.queries, VALUE_WIDTH)
                tau = tl.zeros([ROWS], tl.float32)
                if rule.tau is not None:
                    tau = row_tile(rule.tau, inputs, example, head, rows)
                states = tl.zeros([ROWS], tl.uint32)
                if dropped is not None:
                    states = row_states(dropped, inputs, example, head, rows)
                used, to_scores = _score_gradient_tile(
                    query, key, value, given, tau, row_tile(log_sum, inputs, example, head, rows),
                    row_tile(mean, inputs, example, head, rows), states, inputs, rule, dropped, example, head,
                    rows, columns, LARGEST,
                )  # fmt: skip
                value_sums += dot(tl.trans(used).to(given.dtype), given)
                key_sums += dot(tl.trans(to_scores).to(query.dtype), query)
    _store_tokens(to_key, example, key_head, columns, inputs.keys, key_sums * inputs.scale, WIDTH)
    _store_tokens(to_value, example, key_head, columns, inputs.keys, value_sums, VALUE_WIDTH)
