"""Stage 1: the threshold of each query, without storing a matrix of scores.

Scores are recomputed tile by tile, mapped to whole numbers in the same order (`tiles.image`) and counted. By row, a
program narrows the interval of its rows' thresholds; where a row of tiles fits into registers, its scores are
computed once. Over a matrix that one program cannot see whole, four passes count the digits of 8 bits, highest first.
Counts are whole numbers, so the order in which programs add them changes nothing.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from crisp_attention.backends.triton.tiles import (
    OUTSIDE,
    Inputs,
    Matrix,
    Plan,
    Rule,
    from_image,
    image,
    matrix,
    pair_tile,
    place,
    rank_tile,
    score_tile,
    stop_column,
    token_tile,
)
from crisp_attention.rules.selection import Threshold

_DIGIT = 8


def thresholds(inputs: Inputs, rule: Rule, form: Threshold, split: Plan) -> Tensor:
    """Tau of each query, float32 `[B, H, Q]`, or any number in the gap below it.

    Args:
        inputs: The call.
        rule: Its rankings; tau is not read.
        form: Scope, counts and pool.
        split: Its tiles.
    """
    batch, queries = inputs.query.data.shape[0], inputs.queries
    rows = (batch, inputs.heads, queries, 1)
    keep = matrix(form.keep, rows)
    assert keep is not None
    pool = matrix(form.pool, (batch, inputs.heads, queries, inputs.keys))
    largest = form.largest
    if form.pool is None and inputs.valid is not None:  # pairs that nobody attends to count too
        tau = _scoped(inputs._replace(stop=None), rule, keep, pool, split, form.scope, largest)
    else:
        tau = _scoped(inputs, rule, keep, pool, split, form.scope, largest)
    if form.scope == "row":
        return tau
    wanted = matrix(torch.full((1, 1, 1, 1), min(form.min_keep, inputs.keys), device=tau.device), rows)
    assert wanted is not None
    best = search(inputs, rule, wanted, inputs.valid, split, largest=largest)
    return torch.minimum(tau, best)


def _scoped(
    inputs: Inputs, rule: Rule, keep: Matrix, pool: Matrix | None, split: Plan, scope: str, largest: bool
) -> Tensor:
    if scope == "matrix" and inputs.queries > split.rows:
        return _by_digits(inputs, rule, keep, pool, split, largest)
    return search(inputs, rule, keep, pool, split, largest=largest, whole=scope == "matrix")


def search(
    inputs: Inputs,
    rule: Rule,
    keep: Matrix,
    pool: Matrix | None,
    split: Plan,
    *,
    largest: bool,
    whole: bool = False,
) -> Tensor:
    """The keep-th largest of each row, or of each matrix that has no more rows than a tile (`whole`).

    Args:
        inputs: The call.
        rule: Its rankings.
        keep: Int64 counts by example, head and query.
        pool: The pairs to choose among, all of them valid; None for all.
        split: Its tiles.
        largest: Rank the lowest first if False.
        whole: Count over all rows of a matrix.

    Returns:
        Float32 `[B, H, Q]`: +inf for 0, -inf where keep exceeds the pool, and in general any number above the
        next lower entry, up to the keep-th largest itself.
    """
    batch, width = inputs.query.data.shape[0], inputs.query.data.shape[3]
    tau = torch.empty(batch, inputs.heads, inputs.queries, dtype=torch.float32, device=inputs.query.data.device)
    programs = split.tiles(inputs.queries, inputs.keys)[0] * batch * inputs.heads
    _search_kernel[(programs,)](
        inputs, rule, keep, pool, tau, WIDTH=width, ROWS=split.rows, COLUMNS=split.columns, HELD=split.held,
        LARGEST=largest, WHOLE=whole, num_warps=split.warps,
    )  # fmt: skip
    return tau


def _by_digits(inputs: Inputs, rule: Rule, keep: Matrix, pool: Matrix | None, split: Plan, largest: bool) -> Tensor:
    """The keep-th largest of each matrix, float32 `[B, H, Q]` (the same for all its rows)."""
    batch, width = inputs.query.data.shape[0], inputs.query.data.shape[3]
    device = inputs.query.data.device
    wanted = keep.data.expand(batch, inputs.heads, 1, 1).reshape(-1).clone()
    asked = wanted.clone()
    total = torch.zeros_like(wanted)
    prefix = torch.zeros(len(wanted), dtype=torch.int32, device=device)
    counts = torch.zeros(len(wanted), 2**_DIGIT, dtype=torch.int32, device=device)
    programs = split.tiles(inputs.queries, inputs.keys)[0] * len(wanted)
    for shift in range(32 - _DIGIT, -1, -_DIGIT):
        _count_kernel[(programs,)](
            inputs, rule, pool, prefix, counts, SHIFT=shift, DIGIT=_DIGIT, WIDTH=width, ROWS=split.rows,
            COLUMNS=split.columns, LARGEST=largest, num_warps=split.warps,
        )  # fmt: skip
        _descend_kernel[(len(wanted),)](wanted, total, prefix, counts, DIGIT=_DIGIT, FIRST=shift == 32 - _DIGIT)
    ordered = prefix ^ -(2**31)
    tau = (ordered ^ ((ordered >> 31) & 0x7FFFFFFF)).view(torch.float32)
    tau = tau.masked_fill(asked > total, -torch.inf).masked_fill(asked == 0, torch.inf)
    return tau.view(batch, inputs.heads, 1).expand(-1, -1, inputs.queries)


@triton.jit
def _image_tile(
    query, inputs, rule, pool, example, head, rows, first_column,
    WIDTH: tl.constexpr, COLUMNS: tl.constexpr, LARGEST: tl.constexpr,
):  # fmt: skip
    """The ranks of a tile as whole numbers; `OUTSIDE` where a pair is not in the pool."""
    columns = first_column + tl.arange(0, COLUMNS)
    inside = (rows < inputs.queries)[:, None] & (columns < inputs.keys)[None, :]
    if pool is not None:
        inside = inside & (pair_tile(pool, example, head, rows, columns, inside) != 0)
    if rule.ranking is None:
        key = token_tile(inputs.key, example, head // inputs.groups, columns, inputs.keys, WIDTH)
        scores = score_tile(query, key, inputs, example, head, rows, columns)
    else:
        scores = tl.zeros([rows.shape[0], COLUMNS], tl.float32)
    rank = rank_tile(scores, rule, example, head, rows, columns, inside, LARGEST)
    return tl.where(inside, image(rank), OUTSIDE)


@triton.jit
def _middle(low, high):
    """Their mean, rounded down, without overflow."""
    return (low & high) + ((low ^ high) >> 1)


@triton.jit
def _over(counts, WHOLE: tl.constexpr):
    """Counts of a scope: of each row, or for each row that of all."""
    if WHOLE:
        counts = tl.zeros_like(counts) + tl.sum(counts, 0)
    return counts


@triton.jit
def _narrow(low, high, reached, candidate, count, wanted):
    """Move the end of the interval [low, high) that a candidate settles; `reached` counts what is at least low."""
    enough = (count >= wanted) & (candidate > low)
    short = (count < wanted) & (candidate < high)
    low = tl.where(enough, candidate, low)
    reached = tl.where(enough, count, reached)
    high = tl.where(short, candidate, high)
    return low, high, reached


@triton.jit
def _search_kernel(
    inputs, rule, keep, pool, tau,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, HELD: tl.constexpr,
    LARGEST: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    example, head, first_row = place(inputs, ROWS)
    rows = first_row + tl.arange(0, ROWS)
    stop = stop_column(inputs, example, rows)
    query = token_tile(inputs.query, example, head, rows, inputs.queries, WIDTH)
    at = keep.data + example * keep.batch + head * keep.head + rows.to(tl.int64) * keep.query
    # Rows behind the last want nothing; over a whole matrix all rows want the same.
    wanted = tl.load(at, mask=rows < inputs.queries, other=0).to(tl.int32)
    if WHOLE:
        wanted = tl.zeros_like(wanted) + tl.max(wanted, 0)
    total = tl.zeros([ROWS], tl.int32)
    top = tl.full([ROWS], OUTSIDE, tl.int32)
    bottom = tl.full([ROWS], 2**31 - 1, tl.int32)
    held = ()
    if HELD:
        for tile in tl.static_range(HELD):
            images = _image_tile(
                query, inputs, rule, pool, example, head, rows, tile * COLUMNS, WIDTH, COLUMNS, LARGEST
            )
            there = images != OUTSIDE
            total += tl.sum(there.to(tl.int32), 1)
            top = tl.maximum(top, tl.max(images, 1))
            bottom = tl.minimum(bottom, tl.min(tl.where(there, images, 2**31 - 1), 1))
            held = held + (images,)  # type: ignore[assignment]  # noqa: RUF005 - the language has no unpacking
    else:
        for first_column in range(0, stop, COLUMNS):
            images = _image_tile(query, inputs, rule, pool, example, head, rows, first_column, WIDTH, COLUMNS, LARGEST)
            there = images != OUTSIDE
            total += tl.sum(there.to(tl.int32), 1)
            top = tl.maximum(top, tl.max(images, 1))
            bottom = tl.minimum(bottom, tl.min(tl.where(there, images, 2**31 - 1), 1))
    total = _over(total, WHOLE)
    if WHOLE:
        top = tl.zeros_like(top) + tl.max(top, 0)
        bottom = tl.zeros_like(bottom) + tl.min(bottom, 0)
    # What is at least low is enough, what is at least high is not. The best alone needs no search, and where
    # nothing is wanted, or more than there is, none is made.
    low = tl.where(wanted == 1, top, bottom)
    high = top + 1
    reached = tl.where(wanted == 1, 1, total)
    seek = (wanted > 1) & (wanted < total)
    unsettled = seek & (_middle(low, high) > low)
    for _ in range(32):
        if tl.max(unsettled.to(tl.int32), 0) > 0:
            middle = _middle(low, high)
            if HELD:
                count = tl.zeros([ROWS], tl.int32)
                for tile in tl.static_range(HELD):
                    count += tl.sum((held[tile] >= middle[:, None]).to(tl.int32), 1)
                low, high, reached = _narrow(low, high, reached, middle, _over(count, WHOLE), wanted)
            else:
                # Scores cost more than comparing them, so that each pass settles two bits.
                lower, upper = _middle(low, middle), _middle(middle, high)
                count = tl.zeros([ROWS], tl.int32)
                count_lower = tl.zeros([ROWS], tl.int32)
                count_upper = tl.zeros([ROWS], tl.int32)
                for first_column in range(0, stop, COLUMNS):
                    images = _image_tile(
                        query, inputs, rule, pool, example, head, rows, first_column, WIDTH, COLUMNS, LARGEST
                    )
                    count += tl.sum((images >= middle[:, None]).to(tl.int32), 1)
                    count_lower += tl.sum((images >= lower[:, None]).to(tl.int32), 1)
                    count_upper += tl.sum((images >= upper[:, None]).to(tl.int32), 1)
                low, high, reached = _narrow(low, high, reached, middle, _over(count, WHOLE), wanted)
                low, high, reached = _narrow(low, high, reached, lower, _over(count_lower, WHOLE), wanted)
                low, high, reached = _narrow(low, high, reached, upper, _over(count_upper, WHOLE), wanted)
            unsettled = seek & (reached != wanted) & (_middle(low, high) > low)
    found = tl.where(wanted > total, float("-inf"), from_image(low))
    found = tl.where(wanted <= 0, float("inf"), found)
    tl.store(tau + (example * inputs.heads + head) * inputs.queries + rows, found, mask=rows < inputs.queries)


@triton.jit
def _count_kernel(
    inputs, rule, pool, prefix, counts,
    SHIFT: tl.constexpr, DIGIT: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    LARGEST: tl.constexpr,
):  # fmt: skip
    """Count the next digit of the ranks whose higher digits are the prefix of their matrix."""
    example, head, first_row = place(inputs, ROWS)
    rows = first_row + tl.arange(0, ROWS)
    stop = stop_column(inputs, example, rows)
    query = token_tile(inputs.query, example, head, rows, inputs.queries, WIDTH)
    of = example * inputs.heads + head
    known = tl.load(prefix + of).to(tl.uint32, bitcast=True)
    bins = tl.arange(0, 2**DIGIT)
    found = tl.zeros([2**DIGIT], tl.int32)
    for first_column in range(0, stop, COLUMNS):
        images = _image_tile(query, inputs, rule, pool, example, head, rows, first_column, WIDTH, COLUMNS, LARGEST)
        digits = (images ^ OUTSIDE).to(tl.uint32, bitcast=True) >> SHIFT
        counted = images != OUTSIDE
        if SHIFT + DIGIT < 32:
            counted = counted & ((digits >> DIGIT) == known)
        digits = (digits & (2**DIGIT - 1)).to(tl.int32)
        found += tl.histogram(
            tl.reshape(digits, [ROWS * COLUMNS]), 2**DIGIT, mask=tl.reshape(counted, [ROWS * COLUMNS])
        )
    tl.atomic_add(counts + of * 2**DIGIT + bins, found, mask=found > 0, sem="relaxed")


@triton.jit
def _descend_kernel(wanted, total, prefix, counts, DIGIT: tl.constexpr, FIRST: tl.constexpr):
    """Append the digit in which the wanted rank lies, and clear the counts for the next."""
    of = tl.program_id(0).to(tl.int64)
    bins = tl.arange(0, 2**DIGIT)
    found = tl.load(counts + of * 2**DIGIT + bins)
    rank = tl.load(wanted + of)
    at_least = tl.cumsum(found, 0, reverse=True)
    digit = tl.maximum(tl.sum((at_least >= rank).to(tl.int32), 0) - 1, 0)
    tl.store(wanted + of, rank - tl.sum(tl.where(bins > digit, found, 0), 0))
    tl.store(prefix + of, (tl.load(prefix + of) << DIGIT) | digit)
    tl.store(counts + of * 2**DIGIT + bins, tl.zeros_like(found))
    if FIRST:
        tl.store(total + of, tl.sum(found, 0).to(tl.int64))
