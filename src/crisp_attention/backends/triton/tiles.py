"""What all kernels share: how they see tensors, and one way to compute the scores of a tile.

A survivor at the threshold must survive in every kernel that recomputes its score, so that scores have to be alike
to the last bit. They are, because `score_tile` is the only function that computes one, and all kernels of a call
use it on the same tiles (`Plan`) with the same number of warps:

- The whole width D is one product, so that no loop of ours splits the sum. Its operands have the same types and
  the same roles everywhere (queries are rows, also where keys are the outer loop), so the compiler picks the same
  instruction, which adds up along D in the same order and in fp32; what else the kernel computes has no part in it.
- fp32 inputs are multiplied as such (`input_precision="ieee"`), never as TF32.
- Scale and bias are one explicit `fma`: left to the compiler, a product and a sum may or may not be contracted.

Where a threshold has a gap below it, it also lies anywhere in that gap (`threshold._search_kernel`).

Letters: B batch, H heads, Hkv key/value heads, N tokens (Q queries, K keys), D and Dv head widths.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

INTERPRETED = triton.knobs.runtime.interpret
"""Whether kernels run in Triton's interpreter (TRITON_INTERPRET=1 when it was imported), on any device."""

# Kernels may read global names only where they are constant.
_WIDEN = tl.constexpr(INTERPRETED)
OUTSIDE = tl.constexpr(-(2**31))
"""The image of pairs that are not ranked: below every score's."""


class Tokens(NamedTuple):
    """`[B, H, N, D]` with adjacent elements along D."""

    data: Any
    batch: int
    head: int
    token: int


class Matrix(NamedTuple):
    """`[B, H, Q, K]` by strides, which are 0 where it is broadcast."""

    data: Any
    batch: int
    head: int
    query: int
    key: int


class Inputs(NamedTuple):
    """One attention call.

    Attributes:
        query: Of H heads.
        key: Of Hkv heads.
        value: Of Hkv heads.
        bias: Added to the scaled scores, or None.
        valid: Bytes, not 0 where a pair is valid; None if all are.
        stop: Int32 `[B, Q]`, contiguous: behind the last key that the query may attend to in some head; None for K.
        scale: Factor on q.k.
        heads: H.
        groups: H / Hkv.
        queries: Q.
        keys: K.
    """

    query: Any
    key: Any
    value: Any
    bias: Any
    valid: Any
    stop: Any
    scale: float
    heads: int
    groups: int
    queries: int
    keys: int


class Rule(NamedTuple):
    """Which valid pairs survive: those that do not rank below tau, and those in chosen blocks.

    Attributes:
        tau: Float32 `[B, H, Q]`, contiguous; None if every valid pair survives.
        ranking: Ranked in place of the scores, or None.
        forced: Bytes, not 0 where a pair ranks before all others; None if there are none.
        chosen: Bytes by block of queries and block of keys, not 0 where it survives; None without blocks.
        query_block: Int32 `[B, Q]`, the block of each query, -1 for none; None without blocks.
        key_block: Int32 `[B, K]`, likewise.
    """

    tau: Any = None
    ranking: Any = None
    forced: Any = None
    chosen: Any = None
    query_block: Any = None
    key_block: Any = None


class Dropped(NamedTuple):
    """Dropout as kernels see it: see `backends.call.Dropout`."""

    seed: Any
    lowest: int
    factor: float


class Plan(NamedTuple):
    """How a call is cut into tiles; the same for all its kernels.

    Attributes:
        rows: Queries of a tile.
        columns: Keys of a tile.
        warps: Of each program.
        held: How many tiles of scores a program holds in registers while it looks for a threshold: all of a
            row of tiles, or 0 where they do not fit.
    """

    rows: int
    columns: int
    warps: int
    held: int

    def tiles(self, queries: int, keys: int) -> tuple[int, int]:
        """Rows and columns of tiles."""
        return -(-queries // self.rows), -(-keys // self.columns)


def plan(dtype: torch.dtype, keys: int) -> Plan:
    """The tiles of a call: by a table, since what is timed would differ from run to run.

    Args:
        dtype: Of queries, keys and values.
        keys: K.
    """
    # Products in fp32 are unrolled on ordinary registers, and their tiles have twice the bytes.
    if dtype == torch.float32:
        return Plan(32, 32, 4, 1 if keys <= 32 else 0)
    side, warps = 64, 4
    tiles = triton.next_power_of_2(-(-keys // side))
    # A thread has 255 registers; half of them may hold scores.
    fits = 128 * 32 * warps // side**2
    if tiles == 2 * fits:
        warps, fits = 2 * warps, tiles
    return Plan(side, side, warps, tiles if tiles <= fits else 0)


def tokens(tensor: Tensor) -> Tokens:
    """A tensor `[B, H, N, D]` for kernels; copied if elements along D are not adjacent."""
    if tensor.stride(-1) != 1:
        tensor = tensor.contiguous()
    return Tokens(tensor, *tensor.stride()[:3])


def matrix(tensor: Tensor | None, shape: tuple[int, int, int, int]) -> Matrix | None:
    """A tensor that broadcasts to `[B, H, Q, K]` for kernels, bool ones as bytes."""
    if tensor is None:
        return None
    if tensor.dtype == torch.bool:
        tensor = tensor.view(torch.uint8)
    return Matrix(tensor, *tensor.expand(shape).stride())


@triton.jit
def place(inputs, ROWS: tl.constexpr):
    """Which rows of which matrix a program has: example, head, first row; programs of a head are neighbours."""
    tiles = tl.cdiv(inputs.queries, ROWS)
    program = tl.program_id(0)
    of = (program // tiles).to(tl.int64)
    return of // inputs.heads, of % inputs.heads, (program % tiles) * ROWS


@triton.jit
def stop_column(inputs, example, rows):
    """Behind the last key that any row of a tile may attend to."""
    stop = inputs.keys + 0
    if inputs.stop is not None:
        stop = tl.max(tl.load(inputs.stop + example * inputs.queries + rows, mask=rows < inputs.queries, other=0), 0)
    return stop


def stops(valid: Tensor, split: Plan) -> Tensor:
    """Behind the last key that each query may attend to in some head: int32 `[B, Q]`, contiguous.

    What the mask itself says, whether it is causal, a prefix or neither. Nothing of the mask's size is made.

    Args:
        valid: Bool `[B, 1 | H, Q, K]`.
        split: The call's tiles.
    """
    batch, heads, queries, keys = valid.shape
    heads = 1 if valid.stride(1) == 0 else heads
    rows = 1 if valid.stride(2) == 0 else queries  # a mask of keys alone
    found = torch.empty(batch, rows, dtype=torch.int32, device=valid.device)
    mask = matrix(valid, (batch, valid.shape[1], queries, keys))
    _stop_kernel[(batch * -(-rows // split.rows),)](
        mask, found, heads, rows, keys, ROWS=split.rows, COLUMNS=split.columns, num_warps=split.warps
    )
    return found.expand(batch, queries).contiguous()


@triton.jit
def _stop_kernel(valid, found, heads, queries, keys, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    tiles = tl.cdiv(queries, ROWS)
    program = tl.program_id(0)
    example = (program // tiles).to(tl.int64)
    rows = (program % tiles) * ROWS + tl.arange(0, ROWS)
    stop = tl.zeros([ROWS], tl.int32)
    for head in range(0, heads):
        for first_column in range(0, keys, COLUMNS):
            columns = first_column + tl.arange(0, COLUMNS)
            inside = (rows < queries)[:, None] & (columns < keys)[None, :]
            seen = pair_tile(valid, example, head, rows, columns, inside) != 0
            stop = tl.maximum(stop, tl.max(tl.where(seen, (columns + 1)[None, :], 0), 1))
    tl.store(found + example * queries + rows, stop, mask=rows < queries)


@triton.jit
def token_tile(of, example, head, index, count, WIDTH: tl.constexpr):
    """The vectors of some tokens `[n, WIDTH]`, zeros behind the last."""
    start = of.data + example * of.batch + head * of.head
    offsets = index.to(tl.int64)[:, None] * of.token + tl.arange(0, WIDTH)[None, :]
    return tl.load(start + offsets, mask=(index < count)[:, None], other=0.0)


@triton.jit
def pair_tile(of, example, head, rows, columns, inside):
    """The entries of some pairs, 0 at those that are not inside."""
    start = of.data + example * of.batch + head * of.head
    offsets = rows.to(tl.int64)[:, None] * of.query + columns.to(tl.int64)[None, :] * of.key
    return tl.load(start + offsets, mask=inside, other=0)


@triton.jit
def row_tile(of, inputs, example, head, rows):
    """The entries of some queries in a contiguous `[B, H, Q]`."""
    start = of + (example * inputs.heads + head) * inputs.queries
    return tl.load(start + rows, mask=rows < inputs.queries, other=0.0)


@triton.jit
def dot(a, b):
    """A product of tiles, accumulated in fp32."""
    if _WIDEN:  # the interpreter holds bf16 as integers
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def score_tile(query, key, inputs, example, head, rows, columns):
    """Final scores of a tile, fp32: see the head of the module."""
    scores = dot(query, tl.trans(key))
    if inputs.bias is not None:
        inside = (rows < inputs.queries)[:, None] & (columns < inputs.keys)[None, :]
        bias = pair_tile(inputs.bias, example, head, rows, columns, inside).to(tl.float32)
        scores = tl.fma(scores, tl.zeros_like(scores) + inputs.scale, bias)
    else:
        scores = scores * inputs.scale
    return scores


@triton.jit
def rank_tile(scores, rule, example, head, rows, columns, inside, LARGEST: tl.constexpr):
    """What pairs are ranked by: higher is better."""
    rank = scores
    if rule.ranking is not None:
        rank = pair_tile(rule.ranking, example, head, rows, columns, inside).to(tl.float32)
    if not LARGEST:
        rank = -rank
    if rule.forced is not None:
        forced = pair_tile(rule.forced, example, head, rows, columns, inside) != 0
        rank = tl.where(forced, float("inf"), rank)
    return rank


@triton.jit
def keep_tile(scores, tau, inputs, rule, example, head, rows, columns, LARGEST: tl.constexpr):
    """The survivors of a tile, bool; none outside the matrix."""
    keep = (rows < inputs.queries)[:, None] & (columns < inputs.keys)[None, :]
    if inputs.valid is not None:
        keep = keep & (pair_tile(inputs.valid, example, head, rows, columns, keep) != 0)
    if rule.tau is not None:
        # "Not below" rather than "at or above", for NaN, as in the reference.
        below = rank_tile(scores, rule, example, head, rows, columns, keep, LARGEST) < tau[:, None]
        if rule.chosen is not None:
            below = below & ~_chosen_tile(inputs, rule, example, head, rows, columns, keep)
        keep = keep & ~below
    return keep


@triton.jit
def _chosen_tile(inputs, rule, example, head, rows, columns, inside):
    """Pairs whose block survives."""
    query_block = tl.load(rule.query_block + example * inputs.queries + rows, mask=rows < inputs.queries, other=-1)
    key_block = tl.load(rule.key_block + example * inputs.keys + columns, mask=columns < inputs.keys, other=-1)
    there = inside & (query_block >= 0)[:, None] & (key_block >= 0)[None, :]
    return pair_tile(rule.chosen, example, head, query_block, key_block, there) != 0


@triton.jit
def image(rank):
    """Whole numbers in the order of floats: NaN above all, and one zero."""
    bits = rank.to(tl.int32, bitcast=True)
    ordered = tl.where(rank == 0.0, 0, bits ^ ((bits >> 31) & 0x7FFFFFFF))
    return tl.where(rank != rank, 0x7FC00000, ordered)


@triton.jit
def from_image(ordered):
    """The float of an image."""
    return (ordered ^ ((ordered >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def row_states(dropped, inputs, example, head, rows):
    """The state of `noise.pairwise` behind each query, uint32."""
    seed = tl.load(dropped.seed)
    state = _mix((seed ^ (seed >> 32)).to(tl.uint32))
    state = _mix(state ^ (example * inputs.heads + head).to(tl.uint32))
    return _mix(state ^ rows.to(tl.uint32))


@triton.jit
def drop_tile(dropped, states, columns):
    """Pairs that dropout drops."""
    level = _mix(states[:, None] ^ columns.to(tl.uint32)[None, :]) >> 8
    return level.to(tl.int32) < dropped.lowest


@triton.jit
def _mix(state):
    """`noise.mix`."""
    state = (state ^ (state >> 16)) * 0x45D9F3B
    state = (state ^ (state >> 16)) * 0x45D9F3B
    return state ^ (state >> 16)
