"""Vector loops over survivors: softmax, dropout, weighted sums and their gradients."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from llvmlite import ir
from numba import types

from crisp_attention.backends.cpu.compiling import instruction
from crisp_attention.backends.cpu.writer import (
    COLUMNS,
    F32,
    FLOAT_ROWS,
    INTEGERS,
    LANES,
    Writer,
    loop,
)


@instruction
def largest_of(typingctx: Any, values: Any, start: Any, count: Any) -> Any:
    """The largest value, NaN left out. `count` is rounded up to whole vectors; what lies there must be -inf."""
    signature = types.float32(FLOAT_ROWS, types.int64, types.int64)

    def codegen(context: Any, builder: Any, sig: Any, args: Sequence[Any]) -> Any:
        write = Writer(context, builder)
        pointer = write.data(sig.args[0], args[0], args[1])
        (largest,) = write.variables(write.floats(-math.inf))
        with write.vectors(args[2]) as offset:
            x = write.load(write.at(pointer, offset))
            before = builder.load(largest)
            builder.store(builder.select(builder.fcmp_ordered(">", x, before), x, before), largest)
        return write.call("llvm.vector.reduce.fmax.v8f32", F32, builder.load(largest))

    return signature, codegen


@instruction
def softmax(typingctx: Any, values: Any, start: Any, count: Any, top: Any) -> Any:
    """e^(value - top) in place; the sum, and the sum of each times (value - top).

    `count` is rounded up to whole vectors; what lies there must be -inf.
    """
    signature = types.UniTuple(types.float32, 2)(FLOAT_ROWS, types.int64, types.int64, types.float32)

    def codegen(context: Any, builder: Any, sig: Any, args: Sequence[Any]) -> Any:
        write = Writer(context, builder)
        pointer, top_ = write.data(sig.args[0], args[0], args[1]), write.splat(args[3])
        total, weighted = write.variables(write.floats(0.0), 2)
        with write.vectors(args[2]) as offset:
            at = write.at(pointer, offset)
            difference = builder.fsub(write.load(at), top_)
            value = write.exponential(difference)
            write.store(value, at)
            write.add(total, value)
            # 0 * -inf would be NaN.
            bounded = builder.select(
                builder.fcmp_ordered("<", difference, write.floats(-87.0)), write.floats(0.0), difference
            )
            write.multiply_add(value, bounded, weighted)
        results = [write.total(builder.load(variable)) for variable in (total, weighted)]
        return context.make_tuple(builder, sig.return_type, results)

    return signature, codegen


@instruction
def scale(typingctx: Any, values: Any, start: Any, count: Any, factor: Any) -> Any:
    """Multiply values in place, `count` rounded up to whole vectors."""
    signature = types.void(FLOAT_ROWS, types.int64, types.int64, types.float32)

    def codegen(context: Any, builder: Any, sig: Any, args: Sequence[Any]) -> Any:
        write = Writer(context, builder)
        pointer, factor_ = write.data(sig.args[0], args[0], args[1]), write.splat(args[3])
        with write.vectors(args[2]) as offset:
            at = write.at(pointer, offset)
            write.store(builder.fmul(write.load(at), factor_), at)
        return context.get_dummy_value()

    return signature, codegen


@instruction
def dropout_factors(
    typingctx: Any, columns: Any, start: Any, count: Any, state: Any, lowest: Any, factor: Any, out: Any
) -> Any:
    """For some columns of a row: 0 where `Dropout` drops the pair, its factor where it does not.

    Args of the compiled function:
        columns: From `start` on; `count` is rounded up to whole vectors, all of which must be readable.
        state: The mixed state of the row, uint32.
        lowest: `Dropout.lowest`, uint32.
        factor: `Dropout.factor`.
        out: Where the factors go, from its beginning on.
    """
    signature = types.void(COLUMNS, types.int64, types.int64, types.uint32, types.uint32, types.float32, FLOAT_ROWS)

    def codegen(context: Any, builder: Any, sig: Any, args: Sequence[Any]) -> Any:
        write = Writer(context, builder)
        pointer, out_ = write.data(sig.args[0], args[0], args[1]), write.data(sig.args[6], args[6])
        state_, lowest_ = write.splat(args[3], INTEGERS), write.splat(args[4], INTEGERS)
        factor_ = write.splat(args[5])
        shorts = ir.VectorType(ir.IntType(16), LANES)
        with write.vectors(args[2]) as offset:
            column = builder.load(builder.bitcast(write.at(pointer, offset), shorts.as_pointer()), align=2)
            mixed = write.mix(builder.xor(state_, builder.zext(column, INTEGERS)))
            remains = builder.icmp_unsigned(">=", builder.lshr(mixed, write.integers(8)), lowest_)
            write.store(builder.select(remains, factor_, write.floats(0.0)), write.at(out_, offset))
        return context.get_dummy_value()

    return signature, codegen


@instruction
def weighted_sum(
    typingctx: Any, weights: Any, columns: Any, count: Any, rows: Any, width: Any, out: Any, out_at: Any
) -> Any:
    """Sum of `count` rows `[N, width]`, chosen by column and weighted, into `out[out_at:out_at + width]`."""
    signature = types.void(FLOAT_ROWS, COLUMNS, types.int64, FLOAT_ROWS, types.int64, FLOAT_ROWS, types.int64)

    def codegen(context: Any, builder: Any, sig: Any, args: Sequence[Any]) -> Any:
        write = Writer(context, builder)
        w, columns_, rows_ = (write.data(sig.args[at], args[at]) for at in (0, 1, 3))
        out_ = write.data(sig.args[5], args[5], args[6])

        def body(vectors: int) -> None:
            sums = write.variables(write.floats(0.0), vectors)
            with loop(builder, args[2]) as step:
                factor = write.splat(builder.load(write.at(w, step.index)))
                row = write.row(rows_, builder.load(write.at(columns_, step.index)), vectors)
                for part in range(vectors):
                    write.multiply_add(factor, write.load(write.at(row, LANES * part)), sums[part])
            for part in range(vectors):
                write.store(builder.load(sums[part]), write.at(out_, LANES * part))

        write.by_width(args[4], body)
        return context.get_dummy_value()

    return signature, codegen


@instruction
def value_gradients(
    typingctx: Any,
    probabilities: Any,
    columns: Any,
    begin: Any,
    count: Any,
    factors: Any,
    delta: Any,
    gradient: Any,
    g_at: Any,
    values: Any,
    d_values: Any,
    d_scores: Any,
    d_at: Any,
    width: Any,
    scale: Any,
) -> Any:
    """Gradients by one query's scores and by the values, over its survivors, which begin at `begin`.

    With g the gradient of the output, m the dropout factor of a pair and p its probability:
    d_scores = p (m g.v - delta) scale, and d_values += p m g. The factors m become p m.
    """
    signature = types.void(
        FLOAT_ROWS,
        COLUMNS,
        types.int64,
        types.int64,
        FLOAT_ROWS,
        types.float32,
        FLOAT_ROWS,
        types.int64,
        FLOAT_ROWS,
        FLOAT_ROWS,
        FLOAT_ROWS,
        types.int64,
        types.int64,
        types.float32,
    )

    def codegen(context: Any, builder: Any, sig: Any, args: Sequence[Any]) -> Any:
        write = Writer(context, builder)
        p, columns_ = (write.data(sig.args[at], args[at], args[2]) for at in (0, 1))
        g, ds = write.data(sig.args[6], args[6], args[7]), write.data(sig.args[10], args[10], args[11])
        factors_, v, dv = (write.data(sig.args[at], args[at]) for at in (4, 8, 9))

        def body(vectors: int) -> None:
            # Twice over the survivors, so that none waits for a sum before the next one can begin.
            of_g = [write.load(write.at(g, LANES * part)) for part in range(vectors)]
            with loop(builder, args[3]) as step:
                of_value = write.row(v, builder.load(write.at(columns_, step.index)), vectors)
                products = [write.floats(0.0)] * min(2, vectors)
                for part in range(vectors):
                    lane = part % len(products)
                    products[lane] = write.fma(of_g[part], write.load(write.at(of_value, LANES * part)), products[lane])
                whole = products[0] if len(products) == 1 else builder.fadd(*products)
                probability, factor = (builder.load(write.at(x, step.index)) for x in (p, factors_))
                dp = builder.fsub(builder.fmul(factor, write.total(whole)), args[5])
                builder.store(builder.fmul(builder.fmul(probability, dp), args[13]), write.at(ds, step.index))
                builder.store(builder.fmul(probability, factor), write.at(factors_, step.index))
            with loop(builder, args[3]) as step:
                of_dv = write.row(dv, builder.load(write.at(columns_, step.index)), vectors)
                write.add_row(of_dv, write.splat(builder.load(write.at(factors_, step.index))), of_g)

        write.by_width(args[12], body)
        return context.get_dummy_value()

    return signature, codegen


@instruction
def key_gradients(
    typingctx: Any,
    d_scores: Any,
    d_at: Any,
    columns: Any,
    begin: Any,
    count: Any,
    query: Any,
    q_at: Any,
    keys: Any,
    d_keys: Any,
    d_query: Any,
    dq_at: Any,
    width: Any,
) -> Any:
    """Gradients by one query and by the keys, over its survivors: d_query = sum ds k, d_keys += ds q."""
    signature = types.void(
        FLOAT_ROWS,
        types.int64,
        COLUMNS,
        types.int64,
        types.int64,
        FLOAT_ROWS,
        types.int64,
        FLOAT_ROWS,
        FLOAT_ROWS,
        FLOAT_ROWS,
        types.int64,
        types.int64,
    )

    def codegen(context: Any, builder: Any, sig: Any, args: Sequence[Any]) -> Any:
        write = Writer(context, builder)
        ds, columns_, q = (write.data(sig.args[at], args[at], args[at + 1]) for at in (0, 2, 5))
        k, dk, dq = (*(write.data(sig.args[at], args[at]) for at in (7, 8)), write.data(sig.args[9], args[9], args[10]))

        def body(vectors: int) -> None:
            of_q = [write.load(write.at(q, LANES * part)) for part in range(vectors)]
            sums = write.variables(write.floats(0.0), vectors)
            with loop(builder, args[4]) as step:
                column = builder.load(write.at(columns_, step.index))
                of_key, of_dk = write.row(k, column, vectors), write.row(dk, column, vectors)
                factor = write.splat(builder.load(write.at(ds, step.index)))
                for part in range(vectors):
                    write.multiply_add(factor, write.load(write.at(of_key, LANES * part)), sums[part])
                write.add_row(of_dk, factor, of_q)
            for part in range(vectors):
                write.store(builder.load(sums[part]), write.at(dq, LANES * part))

        write.by_width(args[11], body)
        return context.get_dummy_value()

    return signature, codegen
