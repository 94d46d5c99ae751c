"""Vector loops up to the survivors: moving rows, scores, counting, collecting."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils

from crisp_attention.backends.cpu.compiling import instruction
from crisp_attention.backends.cpu.writer import (
    COLUMNS,
    F32,
    FLAGS,
    FLOAT_ROWS,
    FLOATS,
    I8,
    I16,
    I64,
    INTEGERS,
    LANES,
    PANEL,
    PLACES,
    ROWS,
    TABLE,
    Writer,
    loop,
)


@instruction
def copy(typingctx: Any, source: Any, from_at: Any, to: Any, to_at: Any, count: Any) -> Any:
    """Copy floats."""
    signature = types.void(FLOAT_ROWS, types.int64, FLOAT_ROWS, types.int64, types.int64)

    def codegen(context: Any, builder: Any, sig: Any, args: Sequence[Any]) -> Any:
        write = Writer(context, builder)
        source_, to_ = write.data(sig.args[0], args[0], args[1]), write.data(sig.args[2], args[2], args[3])
        cgutils.raw_memcpy(builder, to_, source_, args[4], ir.Constant(I64, 4), align=4)
        return context.get_dummy_value()

    return signature, codegen


@instruction
def copy_columns(typingctx: Any, source: Any, to: Any, to_at: Any, count: Any) -> Any:
    """Copy columns from the beginning of one array."""
    signature = types.void(COLUMNS, COLUMNS, types.int64, types.int64)

    def codegen(context: Any, builder: Any, sig: Any, args: Sequence[Any]) -> Any:
        write = Writer(context, builder)
        source_, to_ = write.data(sig.args[0], args[0]), write.data(sig.args[1], args[1], args[2])
        cgutils.raw_memcpy(builder, to_, source_, args[3], ir.Constant(I64, 2), align=2)
        return context.get_dummy_value()

    return signature, codegen


@instruction
def clear(typingctx: Any, values: Any, count: Any) -> Any:
    """Set floats to zero."""
    signature = types.void(FLOAT_ROWS, types.int64)

    def codegen(context: Any, builder: Any, sig: Any, args: Sequence[Any]) -> Any:
        write = Writer(context, builder)
        size = builder.mul(args[1], ir.Constant(I64, 4))
        cgutils.memset(builder, write.data(sig.args[0], args[0]), size, 0)
        return context.get_dummy_value()

    return signature, codegen


@instruction
def add(typingctx: Any, source: Any, from_at: Any, to: Any, to_at: Any, count: Any) -> Any:
    """Add floats to others."""
    signature = types.void(FLOAT_ROWS, types.int64, FLOAT_ROWS, types.int64, types.int64)

    def codegen(context: Any, builder: Any, sig: Any, args: Sequence[Any]) -> Any:
        write = Writer(context, builder)
        source_, to_ = write.data(sig.args[0], args[0], args[1]), write.data(sig.args[2], args[2], args[3])
        with write.whole_vectors(args[4]) as at:
            place = write.at(to_, at)
            write.store(builder.fadd(write.load(place), write.load(write.at(source_, at))), place)
        with write.rest(args[4]) as at:
            place = write.at(to_, at)
            builder.store(builder.fadd(builder.load(place), builder.load(write.at(source_, at))), place)
        return context.get_dummy_value()

    return signature, codegen


@instruction
def hide(typingctx: Any, flags: Any, from_at: Any, to: Any, to_at: Any, count: Any) -> Any:
    """Set floats to -inf where a flag is not set."""
    signature = types.void(FLAGS, types.int64, FLOAT_ROWS, types.int64, types.int64)

    def codegen(context: Any, builder: Any, sig: Any, args: Sequence[Any]) -> Any:
        write = Writer(context, builder)
        flags_, to_ = write.data(sig.args[0], args[0], args[1]), write.data(sig.args[2], args[2], args[3])
        bytes_ = ir.VectorType(I8, LANES)
        with write.whole_vectors(args[4]) as at:
            place, there = write.at(to_, at), builder.bitcast(write.at(flags_, at), bytes_.as_pointer())
            flag = builder.icmp_unsigned("!=", builder.load(there, align=1), ir.Constant(bytes_, [0] * LANES))
            write.store(builder.select(flag, write.load(place), write.floats(-math.inf)), place)
        with write.rest(args[4]) as at:
            place = write.at(to_, at)
            flag = builder.icmp_unsigned("!=", builder.load(write.at(flags_, at)), ir.Constant(I8, 0))
            builder.store(builder.select(flag, builder.load(place), ir.Constant(F32, -math.inf)), place)
        return context.get_dummy_value()

    return signature, codegen


@instruction
def transpose(typingctx: Any, source: Any, places: Any, vectors: Any, factor: Any, to: Any, to_at: Any) -> Any:
    """Eight rows, scaled, as columns of a panel.

    Args of the compiled function:
        source: Where the rows lie; places: where each begins, int64 `[LANES]`.
        vectors: Length of a row in vectors.
        factor: What they are multiplied by.
        to: From to_at on `[vectors * LANES, PANEL]`, of which `LANES` columns are written.
    """
    signature = types.void(FLOAT_ROWS, PLACES, types.int64, types.float32, FLOAT_ROWS, types.int64)

    def codegen(context: Any, builder: Any, sig: Any, args: Sequence[Any]) -> Any:
        write = Writer(context, builder)
        source_, places_ = write.data(sig.args[0], args[0]), write.data(sig.args[1], args[1])
        to_, factor_ = write.data(sig.args[4], args[4], args[5]), write.splat(args[3])
        starts = [write.at(source_, builder.load(write.at(places_, row))) for row in range(LANES)]
        with loop(builder, args[2]) as step:
            at = builder.mul(step.index, ir.Constant(I64, LANES))
            block = [builder.fmul(write.load(write.at(start, at)), factor_) for start in starts]
            for distance in (1, 2, 4):  # swap halves of pairs of rows that lie so far apart
                for row in range(LANES):
                    if row & distance:
                        continue
                    one, other = block[row], block[row | distance]
                    first = [x if not x & distance else LANES + (x ^ distance) for x in range(LANES)]
                    second = [x | distance if not x & distance else LANES + x for x in range(LANES)]
                    block[row] = builder.shuffle_vector(one, other, ir.Constant(INTEGERS, first))
                    block[row | distance] = builder.shuffle_vector(one, other, ir.Constant(INTEGERS, second))
            below = write.at(to_, builder.mul(at, ir.Constant(I64, PANEL)))
            for row, value in enumerate(block):
                write.store(value, write.at(below, row * PANEL))
        return context.get_dummy_value()

    return signature, codegen


@instruction
def dot(typingctx: Any, a: Any, a_at: Any, b: Any, b_at: Any, count: Any) -> Any:
    """Inner product."""
    signature = types.float32(FLOAT_ROWS, types.int64, FLOAT_ROWS, types.int64, types.int64)

    def codegen(context: Any, builder: Any, sig: Any, args: Sequence[Any]) -> Any:
        write = Writer(context, builder)
        a_, b_ = write.data(sig.args[0], args[0], args[1]), write.data(sig.args[2], args[2], args[3])
        (sums,) = write.variables(write.floats(0.0))
        with write.whole_vectors(args[4]) as at:
            write.multiply_add(write.load(write.at(a_, at)), write.load(write.at(b_, at)), sums)
        total = cgutils.alloca_once_value(builder, ir.Constant(F32, 0.0))
        builder.store(write.total(builder.load(sums)), total)
        with write.rest(args[4]) as at:
            product = builder.fmul(builder.load(write.at(a_, at)), builder.load(write.at(b_, at)))
            builder.store(builder.fadd(builder.load(total), product), total)
        return builder.load(total)

    return signature, codegen


@instruction
def panel_scores(
    typingctx: Any, queries: Any, places: Any, groups: Any, depth: Any, keys: Any, panels: Any, out: Any, out_at: Any,
    stride: Any,
) -> Any:  # fmt: skip
    """Products of some groups of `ROWS` queries with all keys of some panels.

    A panel meets all groups while it is in the processor's nearest cache.

    Args of the compiled function:
        queries: Where the queries lie; places: where each begins, int64 `[groups * ROWS]`.
        depth: Head width D.
        keys: Packed `[panels, depth, PANEL]`.
        panels: How many.
        out: `[groups * ROWS, stride]` from out_at on, of which `panels * PANEL` columns are written.
    """
    signature = types.void(
        FLOAT_ROWS,
        PLACES,
        types.int64,
        types.int64,
        FLOAT_ROWS,
        types.int64,
        FLOAT_ROWS,
        types.int64,
        types.int64,
    )

    def codegen(context: Any, builder: Any, sig: Any, args: Sequence[Any]) -> Any:
        write = Writer(context, builder)
        q_, places_, k = (write.data(sig.args[at], args[at]) for at in (0, 1, 4))
        out_ = write.data(sig.args[6], args[6], args[7])
        groups_, depth_, panels_, stride_ = args[2], args[3], args[5], args[8]
        vectors = PANEL // LANES
        with loop(builder, panels_) as panel, loop(builder, groups_) as group:
            sums = write.variables(write.floats(0.0), ROWS * vectors)
            of_panel = write.at(k, builder.mul(panel.index, builder.mul(depth_, ir.Constant(I64, PANEL))))
            first = builder.mul(group.index, ir.Constant(I64, ROWS))
            q = [write.at(q_, builder.load(write.at(write.at(places_, first), row))) for row in range(ROWS)]
            with loop(builder, depth_) as step:
                of_key = write.at(of_panel, builder.mul(step.index, ir.Constant(I64, PANEL)))
                parts = [write.load(write.at(of_key, LANES * part)) for part in range(vectors)]
                for row in range(ROWS):
                    factor = write.splat(builder.load(write.at(q[row], step.index)))
                    for part in range(vectors):
                        write.multiply_add(factor, parts[part], sums[row * vectors + part])
            column = builder.mul(panel.index, ir.Constant(I64, PANEL))
            for row in range(ROWS):
                this = builder.mul(stride_, builder.add(first, ir.Constant(I64, row)))
                for part in range(vectors):
                    at = write.at(out_, builder.add(builder.add(this, column), ir.Constant(I64, LANES * part)))
                    write.store(builder.load(sums[row * vectors + part]), at)
        return context.get_dummy_value()

    return signature, codegen


@instruction
def count_not_below(typingctx: Any, values: Any, start: Any, count: Any, level: Any) -> Any:
    """How many values are not below a level; NaN is not. `count` is a multiple of `PANEL`."""
    signature = types.int64(FLOAT_ROWS, types.int64, types.int64, types.float32)

    def codegen(context: Any, builder: Any, sig: Any, args: Sequence[Any]) -> Any:
        write = Writer(context, builder)
        pointer, level_ = write.data(sig.args[0], args[0], args[1]), write.splat(args[3])
        parts = PANEL // LANES
        sums = write.variables(write.integers(0), parts)
        with loop(builder, builder.udiv(args[2], ir.Constant(I64, PANEL))) as step:
            at = write.at(pointer, builder.mul(step.index, ir.Constant(I64, PANEL)))
            for part in range(parts):
                above = builder.fcmp_unordered(">=", write.load(write.at(at, LANES * part)), level_)
                write.add(sums[part], builder.sub(write.integers(0), builder.sext(above, INTEGERS)))
        found = builder.load(sums[0])
        for variable in sums[1:]:
            found = builder.add(found, builder.load(variable))
        return builder.zext(write.total(found), I64)

    return signature, codegen


@instruction
def moments(typingctx: Any, values: Any, start: Any, count: Any) -> Any:
    """Number, sum and sum of squares of the finite values. `count` is a multiple of `LANES`."""
    signature = types.UniTuple(types.float32, 3)(FLOAT_ROWS, types.int64, types.int64)

    def codegen(context: Any, builder: Any, sig: Any, args: Sequence[Any]) -> Any:
        write = Writer(context, builder)
        pointer = write.data(sig.args[0], args[0], args[1])
        number, total, squares = write.variables(write.floats(0.0), 3)
        with write.vectors(args[2]) as offset:
            x = write.load(write.at(pointer, offset))
            size = write.call("llvm.fabs.v8f32", FLOATS, x)
            finite = builder.fcmp_ordered("<", size, write.floats(1e18))  # whose square is finite too
            x = builder.select(finite, x, write.floats(0.0))
            write.add(number, builder.select(finite, write.floats(1.0), write.floats(0.0)))
            write.add(total, x)
            write.multiply_add(x, x, squares)
        results = [write.total(builder.load(variable)) for variable in (number, total, squares)]
        return context.make_tuple(builder, sig.return_type, results)

    return signature, codegen


@cache
def lanes_of_bits() -> Any:
    """For each set of lanes, a byte, its lanes in order, as eight bytes in a uint64: the table of `gather`."""
    table = np.zeros((256, LANES), np.uint8)
    for bits in range(256):
        lanes = [lane for lane in range(LANES) if bits >> lane & 1]
        table[bits, : len(lanes)] = lanes
    return table.view(np.uint64).reshape(256)


@instruction
def gather(
    typingctx: Any,
    scores: Any,
    s_at: Any,
    ranks: Any,
    r_at: Any,
    count: Any,
    level: Any,
    columns: Any,
    table: Any,
    to: Any,
    survivors: Any,
) -> Any:
    """Collect scores and columns where the rank is not below a level and the score not -inf; how many there are.

    `count` is a multiple of `LANES`; `survivors` has room for a vector more. Places are looked up for eight pairs
    at once in the table of `lanes_of_bits`: which pairs survive cannot be guessed, so that branches would be slow.
    """
    signature = types.int64(
        FLOAT_ROWS,
        types.int64,
        FLOAT_ROWS,
        types.int64,
        types.int64,
        types.float32,
        COLUMNS,
        TABLE,
        FLOAT_ROWS,
        COLUMNS,
    )

    def codegen(context: Any, builder: Any, sig: Any, args: Sequence[Any]) -> Any:
        write = Writer(context, builder)
        scores_, ranks_ = write.data(sig.args[0], args[0], args[1]), write.data(sig.args[2], args[2], args[3])
        columns_, table_, to_, survivors_ = (write.data(sig.args[at], args[at]) for at in (6, 7, 8, 9))
        level_, lowest = write.splat(args[5]), write.floats(-math.inf)
        bytes_, shorts = ir.VectorType(I8, LANES), ir.VectorType(I16, LANES)
        (found,) = write.variables(ir.Constant(I64, 0))
        with write.vectors(args[4]) as first:
            slot = builder.load(found)
            high_enough = builder.fcmp_unordered(">=", write.load(write.at(ranks_, first)), level_)
            there = builder.fcmp_unordered("!=", write.load(write.at(scores_, first)), lowest)
            bits = builder.zext(builder.bitcast(builder.and_(high_enough, there), I8), I64)
            lanes = builder.load(builder.bitcast(write.at(table_, bits), bytes_.as_pointer()), align=8)
            places = builder.add(builder.zext(lanes, shorts), write.splat(builder.trunc(first, I16), shorts))
            builder.store(places, builder.bitcast(write.at(survivors_, slot), shorts.as_pointer()), align=2)
            builder.store(builder.add(slot, write.call("llvm.ctpop.i64", I64, bits)), found)
        with loop(builder, builder.load(found)) as step:
            place = builder.zext(builder.load(write.at(survivors_, step.index)), I64)
            builder.store(builder.load(write.at(scores_, place)), write.at(to_, step.index))
            builder.store(builder.load(write.at(columns_, place)), write.at(survivors_, step.index))
        return builder.load(found)

    return signature, codegen
