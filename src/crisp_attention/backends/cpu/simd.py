"""Vector loops for the kernels, as instructions for LLVM.

Written out because the loops that matter gather rows by index, which LLVM does not vectorise by itself: it
cannot know that two rows do not overlap. Vectors have eight lanes of 32 bits; LLVM splits or joins them as the
processor likes. Pointers are given as one-dimensional contiguous arrays and an offset in elements.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

LANES = 8
"""Elements in a vector."""

PANEL = 16
"""Keys in a panel: scores are computed for so many at once, and rows of scores are padded to a multiple."""

ROWS = 4
"""Queries whose scores are computed at once, with as many registers as there are."""

GROUPS = 4
"""Groups of as many queries that meet a panel of keys one after another."""

WIDTHS = (16, 32, 48, 64, 96, 128)
"""Head widths with loops of their own; others are padded with zeros to the next."""

_I8, _I16, _I32, _I64, _F32 = ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.IntType(64), ir.FloatType()
_VI, _VF = ir.VectorType(_I32, LANES), ir.VectorType(_F32, LANES)
_CONTRACT = ("contract",)

_floats = types.Array(types.float32, 1, "C")
_columns = types.Array(types.uint16, 1, "C")
_places = types.Array(types.int64, 1, "C")
_table = types.Array(types.uint64, 1, "C")


class _Writer:
    """Writes instructions on vectors of eight lanes."""

    def __init__(self, context: Any, builder: Any) -> None:
        self.context, self.builder = context, builder

    def data(self, type_: Any, array: Any, offset: Any = None) -> Any:
        """Pointer to an element of an array."""
        pointer = self.context.make_array(type_)(self.context, self.builder, array).data
        return pointer if offset is None else self.builder.gep(pointer, [offset])

    def at(self, pointer: Any, index: Any) -> Any:
        """Pointer moved by some elements."""
        if isinstance(index, int):
            index = ir.Constant(_I64, index)
        return self.builder.gep(pointer, [index])

    def load(self, pointer: Any) -> Any:
        """Eight floats from memory of any alignment."""
        return self.builder.load(self.builder.bitcast(pointer, _VF.as_pointer()), align=4)

    def store(self, value: Any, pointer: Any) -> None:
        """Eight floats to memory of any alignment."""
        self.builder.store(value, self.builder.bitcast(pointer, _VF.as_pointer()), align=4)

    def splat(self, scalar: Any, kind: Any = _VF) -> Any:
        """A vector of one value."""
        first = self.builder.insert_element(ir.Constant(kind, ir.Undefined), scalar, ir.Constant(_I32, 0))
        return self.builder.shuffle_vector(first, ir.Constant(kind, ir.Undefined), ir.Constant(_VI, [0] * LANES))

    def floats(self, value: float) -> Any:
        """A constant vector."""
        return ir.Constant(_VF, [value] * LANES)

    def integers(self, value: int) -> Any:
        """A constant vector of 32-bit integers."""
        return ir.Constant(_VI, [value] * LANES)

    def fma(self, a: Any, b: Any, c: Any) -> Any:
        """a * b + c."""
        return self.builder.fadd(self.builder.fmul(a, b, flags=_CONTRACT), c, flags=_CONTRACT)

    def call(self, name: str, result: Any, *arguments: Any) -> Any:
        """An instruction that LLVM knows by name."""
        kind = ir.FunctionType(result, [argument.type for argument in arguments])
        return self.builder.call(cgutils.get_or_insert_function(self.builder.module, kind, name), arguments)

    def total(self, vector: Any) -> Any:
        """Sum of the lanes."""
        if vector.type == _VI:
            return self.call("llvm.vector.reduce.add.v8i32", _I32, vector)
        kind = ir.FunctionType(_F32, [_F32, _VF])
        name = "llvm.vector.reduce.fadd.v8f32"
        function = cgutils.get_or_insert_function(self.builder.module, kind, name)
        return self.builder.call(function, [ir.Constant(_F32, -0.0), vector], fastmath=("reassoc",))

    def variables(self, start: Any, count: int = 1) -> list[Any]:
        """Accumulators; LLVM keeps them in registers."""
        return [cgutils.alloca_once_value(self.builder, start) for _ in range(count)]

    def add(self, variable: Any, value: Any) -> None:
        """Add to an accumulator."""
        add = self.builder.add if value.type == _VI else self.builder.fadd
        self.builder.store(add(self.builder.load(variable), value), variable)

    def multiply_add(self, a: Any, b: Any, variable: Any) -> None:
        """Add a product to an accumulator."""
        self.builder.store(self.fma(a, b, self.builder.load(variable)), variable)

    def by_width(self, width: Any, body: Callable[[int], None]) -> None:
        """One copy of some instructions for each head width."""
        after = self.builder.append_basic_block("after_widths")
        impossible = self.builder.append_basic_block("no_such_width")
        switch = self.builder.switch(width, impossible)
        for choice in WIDTHS:
            block = self.builder.append_basic_block(f"width_{choice}")
            switch.add_case(ir.Constant(_I64, choice), block)
            with self.builder.goto_block(block):
                body(choice // LANES)
                self.builder.branch(after)
        with self.builder.goto_block(impossible):
            self.builder.branch(after)
        self.builder.position_at_end(after)

    def row(self, pointer: Any, column: Any, vectors: int) -> Any:
        """Pointer to a row of a matrix whose rows hold some vectors."""
        index = self.builder.zext(column, _I64)
        return self.at(pointer, self.builder.mul(index, ir.Constant(_I64, vectors * LANES)))

    def mix(self, state: Any) -> Any:
        """`noise.mix`."""
        builder = self.builder
        for _ in range(2):
            state = builder.mul(builder.xor(state, builder.lshr(state, self.integers(16))), self.integers(0x45D9F3B))
        return builder.xor(state, builder.lshr(state, self.integers(16)))

    def exponential(self, x: Any) -> Any:
        """e^x for x <= 0, relative error below 2e-7; 0 from about -87 down; NaN for NaN.

        x = n ln 2 + r with |r| <= ln 2 / 2, e^r by its Taylor polynomial of degree 7, and 2^n by its exponent bits.
        """
        builder = self.builder
        lowest = self.floats(-87.0)
        under = builder.fcmp_ordered("<", x, lowest)
        x = builder.select(under, lowest, x)
        scaled = builder.fmul(x, self.floats(1.4426950408889634))
        n = self.call("llvm.rint.v8f32", _VF, scaled)
        r = self.fma(n, self.floats(-0.693145751953125), x)
        r = self.fma(n, self.floats(-1.428606765330187e-06), r)
        polynomial = self.floats(1.0 / 5040.0)
        for coefficient in (1 / 720, 1 / 120, 1 / 24, 1 / 6, 1 / 2, 1.0, 1.0):
            polynomial = self.fma(polynomial, r, self.floats(coefficient))
        # NaN must not reach the conversion, whose result would be undefined.
        number = builder.select(builder.fcmp_ordered("ord", n, n), n, self.floats(0.0))
        exponent = builder.shl(builder.add(builder.fptosi(number, _VI), self.integers(127)), self.integers(23))
        value = builder.fmul(polynomial, builder.bitcast(exponent, _VF))
        return builder.select(under, self.floats(0.0), value)


def _loop(builder: Any, count: Any) -> Any:
    return cgutils.for_range(builder, count)


@intrinsic  # type: ignore[untyped-decorator]
def copy(typingctx: Any, source: Any, from_at: Any, to: Any, to_at: Any, count: Any) -> Any:
    """Copy floats."""
    signature = types.void(_floats, types.int64, _floats, types.int64, types.int64)

    def codegen(context: Any, builder: Any, sig: Any, args: Sequence[Any]) -> Any:
        write = _Writer(context, builder)
        source_, to_ = write.data(sig.args[0], args[0], args[1]), write.data(sig.args[2], args[2], args[3])
        cgutils.raw_memcpy(builder, to_, source_, args[4], ir.Constant(_I64, 4), align=4)
        return context.get_dummy_value()

    return signature, codegen


@intrinsic  # type: ignore[untyped-decorator]
def copy_columns(typingctx: Any, source: Any, to: Any, to_at: Any, count: Any) -> Any:
    """Copy columns from the beginning of one array."""
    signature = types.void(_columns, _columns, types.int64, types.int64)

    def codegen(context: Any, builder: Any, sig: Any, args: Sequence[Any]) -> Any:
        write = _Writer(context, builder)
        source_, to_ = write.data(sig.args[0], args[0]), write.data(sig.args[1], args[1], args[2])
        cgutils.raw_memcpy(builder, to_, source_, args[3], ir.Constant(_I64, 2), align=2)
        return context.get_dummy_value()

    return signature, codegen


@intrinsic  # type: ignore[untyped-decorator]
def clear(typingctx: Any, values: Any, count: Any) -> Any:
    """Set floats to zero."""
    signature = types.void(_floats, types.int64)

    def codegen(context: Any, builder: Any, sig: Any, args: Sequence[Any]) -> Any:
        write = _Writer(context, builder)
        size = builder.mul(args[1], ir.Constant(_I64, 4))
        cgutils.memset(builder, write.data(sig.args[0], args[0]), size, 0)
        return context.get_dummy_value()

    return signature, codegen


@intrinsic  # type: ignore[untyped-decorator]
def transpose(typingctx: Any, source: Any, places: Any, vectors: Any, factor: Any, to: Any, to_at: Any) -> Any:
    """Eight rows, scaled, as columns of a panel.

    Args of the compiled function:
        source: Where the rows lie; places: where each begins, int64 `[LANES]`.
        vectors: Length of a row in vectors.
        factor: What they are multiplied by.
        to: From to_at on `[vectors * LANES, PANEL]`, of which `LANES` columns are written.
    """
    signature = types.void(_floats, _places, types.int64, types.float32, _floats, types.int64)

    def codegen(context: Any, builder: Any, sig: Any, args: Sequence[Any]) -> Any:
        write = _Writer(context, builder)
        source_, places_ = write.data(sig.args[0], args[0]), write.data(sig.args[1], args[1])
        to_, factor_ = write.data(sig.args[4], args[4], args[5]), write.splat(args[3])
        starts = [write.at(source_, builder.load(write.at(places_, row))) for row in range(LANES)]
        with _loop(builder, args[2]) as step:
            at = builder.mul(step.index, ir.Constant(_I64, LANES))
            block = [builder.fmul(write.load(write.at(start, at)), factor_) for start in starts]
            for distance in (1, 2, 4):  # swap halves of pairs of rows that lie so far apart
                for row in range(LANES):
                    if row & distance:
                        continue
                    one, other = block[row], block[row | distance]
                    first = [x if not x & distance else LANES + (x ^ distance) for x in range(LANES)]
                    second = [x | distance if not x & distance else LANES + x for x in range(LANES)]
                    block[row] = builder.shuffle_vector(one, other, ir.Constant(_VI, first))
                    block[row | distance] = builder.shuffle_vector(one, other, ir.Constant(_VI, second))
            below = write.at(to_, builder.mul(at, ir.Constant(_I64, PANEL)))
            for row, value in enumerate(block):
                write.store(value, write.at(below, row * PANEL))
        return context.get_dummy_value()

    return signature, codegen


@intrinsic  # type: ignore[untyped-decorator]
def dot(typingctx: Any, a: Any, a_at: Any, b: Any, b_at: Any, count: Any) -> Any:
    """Inner product."""
    signature = types.float32(_floats, types.int64, _floats, types.int64, types.int64)

    def codegen(context: Any, builder: Any, sig: Any, args: Sequence[Any]) -> Any:
        write = _Writer(context, builder)
        a_, b_ = write.data(sig.args[0], args[0], args[1]), write.data(sig.args[2], args[2], args[3])
        (sums,) = write.variables(write.floats(0.0))
        builder.store(write.floats(0.0), sums)
        whole = builder.udiv(args[4], ir.Constant(_I64, LANES))
        with _loop(builder, whole) as step:
            at = builder.mul(step.index, ir.Constant(_I64, LANES))
            write.multiply_add(write.load(write.at(a_, at)), write.load(write.at(b_, at)), sums)
        total = cgutils.alloca_once_value(builder, ir.Constant(_F32, 0.0))
        builder.store(write.total(builder.load(sums)), total)
        first = builder.mul(whole, ir.Constant(_I64, LANES))
        with cgutils.for_range(builder, args[4], start=first) as step:
            product = builder.fmul(builder.load(write.at(a_, step.index)), builder.load(write.at(b_, step.index)))
            builder.store(builder.fadd(builder.load(total), product), total)
        return builder.load(total)

    return signature, codegen


@intrinsic  # type: ignore[untyped-decorator]
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
        _floats, _places, types.int64, types.int64, _floats, types.int64, _floats, types.int64, types.int64
    )

    def codegen(context: Any, builder: Any, sig: Any, args: Sequence[Any]) -> Any:
        write = _Writer(context, builder)
        q_, places_, k = (write.data(sig.args[at], args[at]) for at in (0, 1, 4))
        out_ = write.data(sig.args[6], args[6], args[7])
        groups_, depth_, panels_, stride_ = args[2], args[3], args[5], args[8]
        vectors = PANEL // LANES
        sums = write.variables(write.floats(0.0), ROWS * vectors)
        with _loop(builder, panels_) as panel, _loop(builder, groups_) as group:
            for variable in sums:
                builder.store(write.floats(0.0), variable)
            of_panel = write.at(k, builder.mul(panel.index, builder.mul(depth_, ir.Constant(_I64, PANEL))))
            first = builder.mul(group.index, ir.Constant(_I64, ROWS))
            q = [write.at(q_, builder.load(write.at(write.at(places_, first), row))) for row in range(ROWS)]
            with _loop(builder, depth_) as step:
                of_key = write.at(of_panel, builder.mul(step.index, ir.Constant(_I64, PANEL)))
                parts = [write.load(write.at(of_key, LANES * part)) for part in range(vectors)]
                for row in range(ROWS):
                    factor = write.splat(builder.load(write.at(q[row], step.index)))
                    for part in range(vectors):
                        write.multiply_add(factor, parts[part], sums[row * vectors + part])
            column = builder.mul(panel.index, ir.Constant(_I64, PANEL))
            for row in range(ROWS):
                this = builder.mul(stride_, builder.add(first, ir.Constant(_I64, row)))
                for part in range(vectors):
                    at = write.at(out_, builder.add(builder.add(this, column), ir.Constant(_I64, LANES * part)))
                    write.store(builder.load(sums[row * vectors + part]), at)
        return context.get_dummy_value()

    return signature, codegen


@intrinsic  # type: ignore[untyped-decorator]
def count_not_below(typingctx: Any, values: Any, start: Any, count: Any, level: Any) -> Any:
    """How many values are not below a level; NaN is not. `count` is a multiple of `PANEL`."""
    signature = types.int64(_floats, types.int64, types.int64, types.float32)

    def codegen(context: Any, builder: Any, sig: Any, args: Sequence[Any]) -> Any:
        write = _Writer(context, builder)
        pointer, level_ = write.data(sig.args[0], args[0], args[1]), write.splat(args[3])
        parts = PANEL // LANES
        sums = write.variables(write.integers(0), parts)
        for variable in sums:
            builder.store(write.integers(0), variable)
        with _loop(builder, builder.udiv(args[2], ir.Constant(_I64, PANEL))) as step:
            at = write.at(pointer, builder.mul(step.index, ir.Constant(_I64, PANEL)))
            for part in range(parts):
                above = builder.fcmp_unordered(">=", write.load(write.at(at, LANES * part)), level_)
                write.add(sums[part], builder.sub(write.integers(0), builder.sext(above, _VI)))
        found = builder.load(sums[0])
        for variable in sums[1:]:
            found = builder.add(found, builder.load(variable))
        return builder.zext(write.total(found), _I64)

    return signature, codegen


@intrinsic  # type: ignore[untyped-decorator]
def moments(typingctx: Any, values: Any, start: Any, count: Any) -> Any:
    """Number, sum and sum of squares of the finite values. `count` is a multiple of `LANES`."""
    signature = types.UniTuple(types.float32, 3)(_floats, types.int64, types.int64)

    def codegen(context: Any, builder: Any, sig: Any, args: Sequence[Any]) -> Any:
        write = _Writer(context, builder)
        pointer = write.data(sig.args[0], args[0], args[1])
        number, total, squares = write.variables(write.floats(0.0), 3)
        for variable in (number, total, squares):
            builder.store(write.floats(0.0), variable)
        with _loop(builder, builder.udiv(args[2], ir.Constant(_I64, LANES))) as step:
            x = write.load(write.at(pointer, builder.mul(step.index, ir.Constant(_I64, LANES))))
            size = write.call("llvm.fabs.v8f32", _VF, x)
            finite = builder.fcmp_ordered("<", size, write.floats(1e18))  # whose square is finite too
            x = builder.select(finite, x, write.floats(0.0))
            write.add(number, builder.select(finite, write.floats(1.0), write.floats(0.0)))
            write.add(total, x)
            write.multiply_add(x, x, squares)
        results = [write.total(builder.load(variable)) for variable in (number, total, squares)]
        return context.make_tuple(builder, sig.return_type, results)

    return signature, codegen


def lanes_of_bits() -> Any:
    """For each set of lanes, a byte, its lanes in order, as eight bytes in a uint64: the table of `gather`."""
    table = np.zeros((256, LANES), np.uint8)
    for bits in range(256):
        lanes = [lane for lane in range(LANES) if bits >> lane & 1]
        table[bits, : len(lanes)] = lanes
    return table.view(np.uint64).reshape(256)


@intrinsic  # type: ignore[untyped-decorator]
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
        _floats, types.int64, _floats, types.int64, types.int64, types.float32, _columns, _table, _floats, _columns
    )

    def codegen(context: Any, builder: Any, sig: Any, args: Sequence[Any]) -> Any:
        write = _Writer(context, builder)
        scores_, ranks_ = write.data(sig.args[0], args[0], args[1]), write.data(sig.args[2], args[2], args[3])
        columns_, table_, to_, survivors_ = (write.data(sig.args[at], args[at]) for at in (6, 7, 8, 9))
        level_, lowest = write.splat(args[5]), write.floats(-math.inf)
        bytes_, shorts = ir.VectorType(_I8, LANES), ir.VectorType(_I16, LANES)
        (found,) = write.variables(ir.Constant(_I64, 0))
        builder.store(ir.Constant(_I64, 0), found)
        with _loop(builder, builder.udiv(args[4], ir.Constant(_I64, LANES))) as step:
            first, slot = builder.mul(step.index, ir.Constant(_I64, LANES)), builder.load(found)
            high_enough = builder.fcmp_unordered(">=", write.load(write.at(ranks_, first)), level_)
            there = builder.fcmp_unordered("!=", write.load(write.at(scores_, first)), lowest)
            bits = builder.zext(builder.bitcast(builder.and_(high_enough, there), _I8), _I64)
            lanes = builder.load(builder.bitcast(write.at(table_, bits), bytes_.as_pointer()), align=8)
            places = builder.add(builder.zext(lanes, shorts), write.splat(builder.trunc(first, _I16), shorts))
            builder.store(places, builder.bitcast(write.at(survivors_, slot), shorts.as_pointer()), align=2)
            builder.store(builder.add(slot, write.call("llvm.ctpop.i64", _I64, bits)), found)
        with _loop(builder, builder.load(found)) as step:
            place = builder.zext(builder.load(write.at(survivors_, step.index)), _I64)
            builder.store(builder.load(write.at(scores_, place)), write.at(to_, step.index))
            builder.store(builder.load(write.at(columns_, place)), write.at(survivors_, step.index))
        return builder.load(found)

    return signature, codegen


@intrinsic  # type: ignore[untyped-decorator]
def largest_of(typingctx: Any, values: Any, start: Any, count: Any) -> Any:
    """The largest value, NaN left out. `count` is rounded up to whole vectors; what lies there must be -inf."""
    signature = types.float32(_floats, types.int64, types.int64)

    def codegen(context: Any, builder: Any, sig: Any, args: Sequence[Any]) -> Any:
        write = _Writer(context, builder)
        pointer = write.data(sig.args[0], args[0], args[1])
        (largest,) = write.variables(write.floats(-math.inf))
        builder.store(write.floats(-math.inf), largest)
        steps = builder.udiv(builder.add(args[2], ir.Constant(_I64, LANES - 1)), ir.Constant(_I64, LANES))
        with _loop(builder, steps) as step:
            x, before = write.load(write.at(pointer, builder.mul(step.index, ir.Constant(_I64, LANES)))), builder.load(largest)
            builder.store(builder.select(builder.fcmp_ordered(">", x, before), x, before), largest)
        kind = ir.FunctionType(_F32, [_VF])
        reduce = cgutils.get_or_insert_function(builder.module, kind, "llvm.vector.reduce.fmax.v8f32")
        return builder.call(reduce, [builder.load(largest)])

    return signature, codegen


@intrinsic  # type: ignore[untyped-decorator]
def softmax(typingctx: Any, values: Any, start: Any, count: Any, top: Any) -> Any:
    """e^(value - top) in place; the sum, and the sum of each times (value - top).

    `count` is rounded up to whole vectors; what lies there must be -inf.
    """
    signature = types.UniTuple(types.float32, 2)(_floats, types.int64, types.int64, types.float32)

    def codegen(context: Any, builder: Any, sig: Any, args: Sequence[Any]) -> Any:
        write = _Writer(context, builder)
        pointer, top_ = write.data(sig.args[0], args[0], args[1]), write.splat(args[3])
        total, weighted = write.variables(write.floats(0.0), 2)
        for variable in (total, weighted):
            builder.store(write.floats(0.0), variable)
        steps = builder.udiv(builder.add(args[2], ir.Constant(_I64, LANES - 1)), ir.Constant(_I64, LANES))
        with _loop(builder, steps) as step:
            at = write.at(pointer, builder.mul(step.index, ir.Constant(_I64, LANES)))
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


@intrinsic  # type: ignore[untyped-decorator]
def scale(typingctx: Any, values: Any, start: Any, count: Any, factor: Any) -> Any:
    """Multiply values in place, `count` rounded up to whole vectors."""
    signature = types.void(_floats, types.int64, types.int64, types.float32)

    def codegen(context: Any, builder: Any, sig: Any, args: Sequence[Any]) -> Any:
        write = _Writer(context, builder)
        pointer, factor_ = write.data(sig.args[0], args[0], args[1]), write.splat(args[3])
        steps = builder.udiv(builder.add(args[2], ir.Constant(_I64, LANES - 1)), ir.Constant(_I64, LANES))
        with _loop(builder, steps) as step:
            at = write.at(pointer, builder.mul(step.index, ir.Constant(_I64, LANES)))
            write.store(builder.fmul(write.load(at), factor_), at)
        return context.get_dummy_value()

    return signature, codegen


@intrinsic  # type: ignore[untyped-decorator]
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
    signature = types.void(
        _columns, types.int64, types.int64, types.uint32, types.uint32, types.float32, _floats
    )

    def codegen(context: Any, builder: Any, sig: Any, args: Sequence[Any]) -> Any:
        write = _Writer(context, builder)
        pointer, out_ = write.data(sig.args[0], args[0], args[1]), write.data(sig.args[6], args[6])
        state_, lowest_ = write.splat(args[3], _VI), write.splat(args[4], _VI)
        factor_ = write.splat(args[5])
        shorts = ir.VectorType(ir.IntType(16), LANES)
        steps = builder.udiv(builder.add(args[2], ir.Constant(_I64, LANES - 1)), ir.Constant(_I64, LANES))
        with _loop(builder, steps) as step:
            at = builder.mul(step.index, ir.Constant(_I64, LANES))
            column = builder.load(builder.bitcast(write.at(pointer, at), shorts.as_pointer()), align=2)
            mixed = write.mix(builder.xor(state_, builder.zext(column, _VI)))
            remains = builder.icmp_unsigned(">=", builder.lshr(mixed, write.integers(8)), lowest_)
            write.store(builder.select(remains, factor_, write.floats(0.0)), write.at(out_, at))
        return context.get_dummy_value()

    return signature, codegen


@intrinsic  # type: ignore[untyped-decorator]
def weighted_sum(
    typingctx: Any, weights: Any, columns: Any, count: Any, rows: Any, width: Any, out: Any, out_at: Any
) -> Any:
    """Sum of `count` rows `[N, width]`, chosen by column and weighted, into `out[out_at:out_at + width]`."""
    signature = types.void(_floats, _columns, types.int64, _floats, types.int64, _floats, types.int64)

    def codegen(context: Any, builder: Any, sig: Any, args: Sequence[Any]) -> Any:
        write = _Writer(context, builder)
        w, columns_, rows_ = (write.data(sig.args[at], args[at]) for at in (0, 1, 3))
        out_ = write.data(sig.args[5], args[5], args[6])

        def body(vectors: int) -> None:
            sums = write.variables(write.floats(0.0), vectors)
            for variable in sums:
                builder.store(write.floats(0.0), variable)
            with _loop(builder, args[2]) as step:
                factor = write.splat(builder.load(write.at(w, step.index)))
                row = write.row(rows_, builder.load(write.at(columns_, step.index)), vectors)
                for part in range(vectors):
                    write.multiply_add(factor, write.load(write.at(row, LANES * part)), sums[part])
            for part in range(vectors):
                write.store(builder.load(sums[part]), write.at(out_, LANES * part))

        write.by_width(args[4], body)
        return context.get_dummy_value()

    return signature, codegen


@intrinsic  # type: ignore[untyped-decorator]
def row_gradients(
    typingctx: Any,
    probabilities: Any,
    columns: Any,
    begin: Any,
    count: Any,
    factors: Any,
    delta: Any,
    gradient: Any,
    g_at: Any,
    query: Any,
    q_at: Any,
    keys: Any,
    values: Any,
    d_keys: Any,
    d_values: Any,
    d_query: Any,
    dq_at: Any,
    width: Any,
    scale: Any,
    d_scores: Any,
) -> Any:
    """Gradients of one query's attention over its survivors, which begin at `begin`.

    With g the gradient of the output, m the dropout factor of a pair and p its probability:
    dp = m g.v - delta, ds = p dp scale; d_query = sum ds k; d_keys += ds q; d_values += p m g.
    The factors m become p m, and d_scores holds ds.
    """
    signature = types.void(
        _floats, _columns, types.int64, types.int64, _floats, types.float32, _floats, types.int64, _floats,
        types.int64, _floats, _floats, _floats, _floats, _floats, types.int64, types.int64, types.float32, _floats,
    )  # fmt: skip

    def codegen(context: Any, builder: Any, sig: Any, args: Sequence[Any]) -> Any:
        write = _Writer(context, builder)
        p, columns_ = (write.data(sig.args[at], args[at], args[2]) for at in (0, 1))
        factors_, ds, count_ = write.data(sig.args[4], args[4]), write.data(sig.args[18], args[18]), args[3]
        g, q, dq = (write.data(sig.args[at], args[at], args[at + 1]) for at in (6, 8, 14))
        k, v, dk, dv = (write.data(sig.args[at], args[at]) for at in range(10, 14))

        def body(vectors: int) -> None:
            # Three passes over the survivors: each keeps in registers what it uses again, and none waits for a
            # sum before it can go on to the next survivor.
            parts = range(vectors)
            of_g, of_q = ([write.load(write.at(row, LANES * part)) for part in parts] for row in (g, q))
            with _loop(builder, count_) as step:
                of_value = write.row(v, builder.load(write.at(columns_, step.index)), vectors)
                products = [write.floats(0.0)] * min(2, vectors)
                for part in parts:
                    lane = part % len(products)
                    value = write.load(write.at(of_value, LANES * part))
                    products[lane] = write.fma(of_g[part], value, products[lane])
                whole = products[0] if len(products) == 1 else builder.fadd(*products)
                probability = builder.load(write.at(p, step.index))
                factor = builder.load(write.at(factors_, step.index))
                dp = builder.fsub(builder.fmul(factor, write.total(whole)), args[5])
                builder.store(builder.fmul(builder.fmul(probability, dp), args[17]), write.at(ds, step.index))
                builder.store(builder.fmul(probability, factor), write.at(factors_, step.index))
            sums = write.variables(write.floats(0.0), vectors)
            for variable in sums:
                builder.store(write.floats(0.0), variable)
            with _loop(builder, count_) as step:
                column = builder.load(write.at(columns_, step.index))
                of_key, of_dk = write.row(k, column, vectors), write.row(dk, column, vectors)
                factor = write.splat(builder.load(write.at(ds, step.index)))
                for part in parts:
                    write.multiply_add(factor, write.load(write.at(of_key, LANES * part)), sums[part])
                add_row(of_dk, factor, of_q)
            for part in parts:
                write.store(builder.load(sums[part]), write.at(dq, LANES * part))
            with _loop(builder, count_) as step:
                of_dv = write.row(dv, builder.load(write.at(columns_, step.index)), vectors)
                add_row(of_dv, write.splat(builder.load(write.at(factors_, step.index))), of_g)

        def add_row(target: Any, factor: Any, row: list[Any]) -> None:
            # Read all before writing any: LLVM does not know that rows do not overlap.
            before = [write.load(write.at(target, LANES * part)) for part in range(len(row))]
            added = [write.fma(factor, part, there) for part, there in zip(row, before, strict=True)]
            for part, value in enumerate(added):
                write.store(value, write.at(target, LANES * part))

        write.by_width(args[16], body)
        return context.get_dummy_value()

    return signature, codegen
