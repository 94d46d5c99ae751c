"""Attention over survivors, head by head: the compiled loops.

A kernel takes every `step`-th task of a call, a task being the heads that share one key/value head of one
example. It holds no lock of Python's, so that threads share a call; each task's result depends on nothing else.

Letters: B batch, H heads, G key/value heads, Q queries, K keys, D head width, S survivors of the call.
"""

from __future__ import annotations

import numpy as np
from numba import uint32

from crisp_attention.backends.cpu.compiling import SOURCES, Kernel, compiled
from crisp_attention.backends.cpu.scoring import (
    add,
    clear,
    copy,
    copy_columns,
    dot,
    gather,
    hide,
    lanes_of_bits,
    panel_scores,
    transpose,
)
from crisp_attention.backends.cpu.threshold import level_of, lowest_not_below, memory_of_levels
from crisp_attention.backends.cpu.weighting import (
    dropout_factors,
    key_gradients,
    largest_of,
    scale,
    softmax,
    value_gradients,
    weighted_sum,
)
from crisp_attention.backends.cpu.writer import GROUPS, LANES, PANEL, ROWS
from crisp_attention.noise import MULTIPLIER

EVERYTHING = 2**62
"""A count of survivors that no head reaches: its heads are dense."""


def forward_scratch(shape, width, by_row, other):
    """What one thread's `forward` works in.

    Args:
        shape: As there, and width and by_row.
        other: Whether keys are ranked by anything else than their scores.
    """
    _, _, _, queries, keys, depth, _ = shape
    stride = (keys + PANEL - 1) // PANEL * PANEL + PANEL
    taken = ROWS * GROUPS
    rows = taken if by_row else (queries + taken - 1) // taken * taken
    scores = np.empty(rows * stride, np.float32)
    return (
        np.zeros(stride, np.uint16),
        np.empty(stride * depth, np.float32),
        np.empty(keys * width, np.float32),
        scores,
        np.empty_like(scores) if other else scores,
        np.empty(stride, np.float32),
        np.zeros(stride, np.uint16),
        np.empty(stride, np.float32),
        np.empty(width, np.float32),
        np.empty(queries, np.int64),
        np.empty(taken, np.int64),
        memory_of_levels(),
        lanes_of_bits(),
    )


def backward_scratch(shape, width, most):
    """What one thread's `backward` works in.

    Args:
        shape: As there, and width.
        most: The most survivors that a head has room for.
    """
    _, _, _, queries, keys, _, _ = shape
    return (
        *(np.empty(keys * width, np.float32) for _ in range(4)),
        *(np.zeros(width, np.float32) for _ in range(3)),
        np.empty(keys + LANES, np.float32),
        np.empty(most, np.float32),
        np.empty(queries, np.int64),
    )


@compiled
def mix(state):
    """`noise.mix` of one uint32."""
    for _ in range(2):
        state = uint32(uint32(state ^ uint32(state >> uint32(16))) * uint32(MULTIPLIER))
    return uint32(state ^ uint32(state >> uint32(16)))


@compiled
def _pack_keys(flat, base, step, columns, count, panels, depth, factor, packed, places):
    """Keys of one head, scaled, in panels `[panels, depth, PANEL]`, padded with zeros."""
    for first in range(0, panels * PANEL, LANES):
        to = first // PANEL * depth * PANEL + first % PANEL
        if first + LANES <= count and depth % LANES == 0:
            for lane in range(LANES):
                places[lane] = base + columns[first + lane] * step
            transpose(flat, places, depth // LANES, factor, packed, to)
            continue
        for lane in range(LANES):
            exists = first + lane < count
            source = base + columns[first + lane] * step if exists else 0
            for d in range(depth):
                packed[to + d * PANEL + lane] = flat[source + d] * factor if exists else 0.0


@compiled
def _pack_rows(flat, base, step, rows, depth, width, packed):
    """Rows of one head, `[rows, width]`, padded with zeros."""
    for n in range(rows):
        copy(flat, base + n * step, packed, n * width, depth)
        for d in range(depth, width):
            packed[n * width + d] = 0.0


@compiled
def _of_pair(matrix, b, h, i, j):
    """What a matrix `[B, H, Q, K]`, as memory and its four strides, says of a pair."""
    flat, of_b, of_h, of_i, of_j = matrix
    return flat[b * of_b + h * of_h + i * of_i + j * of_j]


@compiled
def _order(query_valid, b, queries, counts_padded, order):
    """Queries in the order in which they are taken, those that count first; how many do."""
    front = 0
    for i in range(queries):
        if counts_padded or query_valid[b, i]:
            order[front] = i
            front += 1
    behind = front
    if front < queries:
        for i in range(queries):
            if not query_valid[b, i]:
                order[behind] = i
                behind += 1
    return front


@compiled
def _finish_scores(scores, at, i, b, h, count, stride, columns, valid, by_pair, bias, has_bias):
    """Add the bias to a row of raw scores and hide what is invalid and what only fills up a panel."""
    if has_bias:
        flat, of_b, of_h, of_i, of_j = bias
        if of_j == 1 and columns[count - 1] == count - 1:  # of the first keys, one beside the other
            add(flat, b * of_b + h * of_h + i * of_i, scores, at, count)
        else:
            for j in range(count):
                scores[at + j] += _of_pair(bias, b, h, i, columns[j])
    for j in range(count, stride):
        scores[at + j] = -np.inf
    if by_pair:
        flags, of_b, of_h, of_i, of_j = valid
        if of_j == 1:
            hide(flags, b * of_b + h * of_h + i * of_i, scores, at, count)
        else:
            for j in range(count):
                if not _of_pair(valid, b, h, i, columns[j]):
                    scores[at + j] = -np.inf


@compiled
def _sees_a_key(b, h, i, count, valid, by_pair):
    """Whether a query has a valid key."""
    seen = count > 0
    if by_pair:
        seen = False
        for j in range(count):
            seen = seen or _of_pair(valid, b, h, i, j)
    return seen


@compiled
def _rank(scores, s_at, ranks, r_at, i, b, h, count, stride, columns, largest, ranking, ranked, forced, forces):
    """What a row's keys are ranked by, where it is not their scores."""
    for j in range(count):
        if scores[s_at + j] == -np.inf:
            ranks[r_at + j] = -np.inf
            continue
        rank = _of_pair(ranking, b, h, i, columns[j]) if ranked else scores[s_at + j]
        if not largest:
            rank = -rank
        if forces and _of_pair(forced, b, h, i, columns[j]):
            rank = np.inf
        ranks[r_at + j] = rank
    for j in range(count, stride):
        ranks[r_at + j] = -np.inf


@Kernel
def forward(
    shape, q, k, v, factor, valid, by_key, by_pair, query_valid, counts_padded, bias, has_bias, ranking, ranked,
    largest, forced, forces, by_row, keep, min_keep, dropout_state, lowest, dropout_factor, width, offsets, columns_out,
    weights_out, starts, stores, out, kept, entropy, summarises, needed, scratch, first_task, step, sources=SOURCES,
):  # fmt: skip
    """Attention of every `step`-th task from `first_task` on.

    Args:
        shape: B, H, G, Q, K, D and the values' width Dv.
        q: Float32 `[B, H, Q, D]` as memory and strides of B, H and Q, D being contiguous; likewise k
            `[B, G, K, D]`, v `[B, G, K, Dv]` and out `[B, H, Q, Dv]`.
        factor: Scale of q.k.
        valid: Bool `[B, H, Q, K]` as memory and four strides, likewise bias, ranking and forced; read if `by_pair`, or
            if `by_key`, where all rows are alike.
        query_valid: Bool `[B, Q]`: queries that count. Others take no part in a threshold over several rows unless
            `counts_padded`.
        bias: Float32 `[B, H, Q, K]`, read if `has_bias`.
        ranking: Float32 `[B, H, Q, K]`, read if `ranked`; ranked from the other end unless `largest`.
        forced: Bool `[B, H, Q, K]`, read if `forces`.
        by_row: One threshold a query, not one a head.
        keep: Int64 `[B, H, Q]`, or `[B, H, 1]` unless `by_row`.
        min_keep: Keys that a query keeps whatever the threshold of its head.
        dropout_state: Uint32, `noise.fold` of the seed; `lowest` and `dropout_factor` as in `Dropout`, lowest 0
            for none.
        width: D and Dv padded to one of `WIDTHS`.
        offsets: Int64 `[B * H + 1]`, where each head's survivors are stored.
        columns_out: Uint16 `[S]`, keys of survivors; weights_out: float32 `[S]`, their probabilities.
        starts: Int64 `[B, H, Q + 1]`, where each query's survivors begin among its head's.
        stores: Whether the last three are written.
        out: The output.
        kept: Int64 `[B, H]`, survivors of queries that count; entropy: float32 `[B, H, Q]`; if `summarises`.
        needed: Int64 `[B * H]`, the room that each head's survivors take, to be compared with what it had.
        scratch: Of `forward_scratch`, for this thread alone.
        first_task: Which task to begin with, and step.
        sources: Never given: it is there for the cache.
    """
    batch, heads, groups, queries, keys, depth, v_depth = shape
    q_flat, q_b, q_h, q_n = q
    k_flat, k_b, k_g, k_n = k
    v_flat, v_b, v_g, v_n = v
    out_flat, out_b, out_h, out_n = out
    (
        columns, packed_keys, packed_values, scores, ranks, weights, survivors, factors, row_out, order, places, memory,
        table,
    ) = scratch  # fmt: skip
    taken = ROWS * GROUPS
    blocks = (queries + taken - 1) // taken
    other = ranked or forces or not largest
    for task in range(first_task, batch * groups, step):
        b, g = task // groups, task % groups
        first_head, last_head = g * (heads // groups), (g + 1) * (heads // groups)
        count = 0
        for j in range(keys):
            if not by_key or _of_pair(valid, b, first_head, 0, j):
                columns[count] = j
                count += 1
        panels = (count + PANEL - 1) // PANEL
        # No row of scores begins a multiple of 1024 bytes after another: processors that tell places apart by
        # their last bits would wait for one to be written before they read the other.
        used = panels * PANEL if panels % 16 else (panels + 1) * PANEL
        _pack_keys(k_flat, b * k_b + g * k_g, k_n, columns, count, panels, depth, factor, packed_keys, places)
        _pack_rows(v_flat, b * v_b + g * v_g, v_n, keys, v_depth, width, packed_values)
        # Queries that count come first, so that a head's threshold is found over the beginning of its scores.
        ranked_rows = _order(query_valid, b, queries, counts_padded, order)
        for h in range(first_head, last_head):
            q_at, out_at = b * q_b + h * q_h, b * out_b + h * out_h
            base, capacity = offsets[b * heads + h], offsets[b * heads + h + 1] - offsets[b * heads + h]
            filled, needs, counted = 0, 0, 0
            head_level = np.float32(-np.inf)
            matrix = mix(uint32(dropout_state ^ uint32(b * heads + h)))
            # A threshold over a head needs all of its scores before any query's survivors are known.
            for stage in range(1 if by_row else 0, 2):
                for block in range(blocks):
                    first, held = block * taken, (0 if by_row else block * taken)
                    lanes = min(taken, queries - first)
                    if by_row or stage == 0:
                        for lane in range(taken):
                            places[lane] = q_at + order[first + min(lane, lanes - 1)] * q_n
                        parts = (lanes + ROWS - 1) // ROWS
                        panel_scores(q_flat, places, parts, depth, packed_keys, panels, scores, held * used, used)
                        for lane in range(lanes):
                            i, at = order[first + lane], (held + lane) * used
                            _finish_scores(scores, at, i, b, h, count, used, columns, valid, by_pair, bias, has_bias)
                            if other:
                                _rank(
                                    scores, at, ranks, at, i, b, h, count, used, columns, largest, ranking, ranked,
                                    forced, forces,
                                )  # fmt: skip
                    if stage == 0:
                        continue
                    for lane in range(lanes):
                        i, at = order[first + lane], (held + lane) * used
                        if by_row:
                            level = level_of(ranks, at, used, keep[b, h, i], memory)
                        else:
                            level = head_level
                            if level > -np.inf:
                                level = min(level, level_of(ranks, at, used, min_keep, memory))
                        amount = gather(scores, at, ranks, at, used, level, columns, table, weights, survivors)
                        for slot in range(amount, (amount + LANES - 1) // LANES * LANES):
                            weights[slot] = -np.inf
                        if amount > 0:
                            total, weighted = softmax(weights, 0, amount, largest_of(weights, 0, amount))
                            scale(weights, 0, amount, np.float32(1.0) / total)
                            if summarises:
                                entropy[b, h, i] = np.log(total) - weighted / total
                        elif summarises:
                            entropy[b, h, i] = 0.0
                        # Of valid keys some survive, unless all scores are -inf: shown as softmax shows it.
                        lost = amount == 0 and _sees_a_key(b, h, i, count, valid, by_pair)
                        needs += amount
                        if query_valid[b, i]:
                            counted += amount
                        if stores:
                            starts[b, h, first + lane] = filled
                            if needs <= capacity:
                                copy_columns(survivors, columns_out, base + filled, amount)
                                copy(weights, 0, weights_out, base + filled, amount)
                                filled += amount
                        if lowest > 0:
                            state = mix(uint32(matrix ^ uint32(i)))
                            dropout_factors(survivors, 0, amount, state, lowest, dropout_factor, factors)
                            for slot in range(amount):
                                weights[slot] *= factors[slot]
                        if v_depth == width:
                            weighted_sum(weights, survivors, amount, packed_values, width, out_flat, out_at + i * out_n)
                        else:
                            weighted_sum(weights, survivors, amount, packed_values, width, row_out, 0)
                            copy(row_out, 0, out_flat, out_at + i * out_n, v_depth)
                        if lost:
                            for d in range(v_depth):
                                out_flat[out_at + i * out_n + d] = np.nan
                if stage == 0:
                    head_level = level_of(ranks, 0, ranked_rows * used, keep[b, h, 0], memory)
                    if ranked_rows < queries:
                        head_level = lowest_not_below(ranks, 0, ranked_rows * used, head_level)
            if stores:
                starts[b, h, queries] = filled
            needed[b * heads + h] = needs
            if summarises:
                kept[b, h] = counted


@Kernel
def backward(
    shape, q, k, v, out, gradient, factor, query_valid, counts_padded, dropout_state, lowest, dropout_factor, width,
    offsets, columns, weights, starts, dq, dk, dv, scratch, first_task, step, sources=SOURCES,
):  # fmt: skip
    """Gradients of every `step`-th task from `first_task` on.

    Args:
        shape: As in `forward`, and q, k, v, out, factor, query_valid, counts_padded, width and what concerns
            dropout; gradient (the loss's by the output), dq, dk and dv likewise.
        offsets: What `forward` stored, with columns, weights and starts.
        scratch: Of `backward_scratch`, for this thread alone.
        first_task: As in `forward`, and step and sources.
    """
    batch, heads, groups, queries, keys, depth, v_depth = shape
    q_flat, q_b, q_h, q_n = q
    k_flat, k_b, k_g, k_n = k
    v_flat, v_b, v_g, v_n = v
    o_flat, o_b, o_h, o_n = out
    g_flat, g_b, g_h, g_n = gradient
    dq_flat, dq_b, dq_h, dq_n = dq
    dk_flat, dk_b, dk_g, dk_n = dk
    dv_flat, dv_b, dv_g, dv_n = dv
    rows_k, rows_v, sums_k, sums_v, row_q, row_g, row_dq, factors, d_scores, order = scratch
    for task in range(first_task, batch * groups, step):
        b, g = task // groups, task % groups
        _pack_rows(k_flat, b * k_b + g * k_g, k_n, keys, depth, width, rows_k)
        _pack_rows(v_flat, b * v_b + g * v_g, v_n, keys, v_depth, width, rows_v)
        clear(sums_k, keys * width)
        clear(sums_v, keys * width)
        _order(query_valid, b, queries, counts_padded, order)
        for h in range(g * (heads // groups), (g + 1) * (heads // groups)):
            base = offsets[b * heads + h]
            matrix = mix(uint32(dropout_state ^ uint32(b * heads + h)))
            # First all that meets values, then all that meets keys: half as much competes for the cache.
            for place in range(queries):
                i = order[place]
                begin, amount = starts[b, h, place], starts[b, h, place + 1] - starts[b, h, place]
                g_at = b * g_b + h * g_h + i * g_n
                delta = dot(g_flat, g_at, o_flat, b * o_b + h * o_h + i * o_n, v_depth)
                if lowest > 0:
                    state = mix(uint32(matrix ^ uint32(i)))
                    dropout_factors(columns, base + begin, amount, state, lowest, dropout_factor, factors)
                else:
                    for slot in range(amount):
                        factors[slot] = 1.0
                if v_depth == width:
                    value_gradients(
                        weights, columns, base + begin, amount, factors, delta, g_flat, g_at, rows_v, sums_v, d_scores,
                        begin, width, factor,
                    )  # fmt: skip
                else:
                    copy(g_flat, g_at, row_g, 0, v_depth)
                    value_gradients(
                        weights, columns, base + begin, amount, factors, delta, row_g, 0, rows_v, sums_v, d_scores,
                        begin, width, factor,
                    )  # fmt: skip
            for place in range(queries):
                i = order[place]
                begin, amount = starts[b, h, place], starts[b, h, place + 1] - starts[b, h, place]
                q_at, dq_at = b * q_b + h * q_h + i * q_n, b * dq_b + h * dq_h + i * dq_n
                if depth == width:
                    key_gradients(
                        d_scores, begin, columns, base + begin, amount, q_flat, q_at, rows_k, sums_k, dq_flat, dq_at,
                        width,
                    )  # fmt: skip
                else:
                    copy(q_flat, q_at, row_q, 0, depth)
                    key_gradients(
                        d_scores, begin, columns, base + begin, amount, row_q, 0, rows_k, sums_k, row_dq, 0, width
                    )
                    copy(row_dq, 0, dq_flat, dq_at, depth)
        for j in range(keys):
            copy(sums_k, j * width, dk_flat, b * dk_b + g * dk_g + j * dk_n, depth)
            copy(sums_v, j * width, dv_flat, b * dv_b + g * dv_g + j * dv_n, v_depth)
