"""Vector loops for the kernels, as instructions for LLVM.

Written out because the loops that matter gather rows by index, which LLVM does not vectorise by itself: it
cannot know that two rows do not overlap. Vectors have eight lanes of 32 bits; LLVM splits or joins them as the
processor likes. Pointers are given as one-dimensional contiguous arrays and an offset in elements.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils

from crisp_attention.noise import MULTIPLIER

LANES = 8
"""Elements in a vector."""

PANEL = 16
"""Keys in a panel: scores are computed for so many at once, and rows of scores are padded to a multiple."""

ROWS = 4
"""Queries in a tile: their scores are computed at once, which takes all vector registers."""

GROUPS = 4
"""Tiles of `ROWS` queries that meet a panel of keys one after another, while it is in the cache."""

WIDTHS = (16, 32, 48, 64, 96, 128)
"""Head widths with loops of their own; others are padded with zeros to the next."""

I8, I16, I32, I64, F32 = ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.IntType(64), ir.FloatType()
INTEGERS, FLOATS = ir.VectorType(I32, LANES), ir.VectorType(F32, LANES)
_CONTRACT = ("contract",)

FLOAT_ROWS = types.Array(types.float32, 1, "C")
"""Type of floats in memory: contiguous, one dimension."""
COLUMNS = types.Array(types.uint16, 1, "C")
"""Type of the keys of survivors."""
FLAGS = types.Array(types.boolean, 1, "C")
"""Type of a mask."""
PLACES = types.Array(types.int64, 1, "C")
"""Type of offsets."""
TABLE = types.Array(types.uint64, 1, "C")
"""Type of the table that `gather` looks lanes up in."""


class Writer:
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
            index = ir.Constant(I64, index)
        return self.builder.gep(pointer, [index])

    def load(self, pointer: Any) -> Any:
        """Eight floats from memory of any alignment."""
        return self.builder.load(self.builder.bitcast(pointer, FLOATS.as_pointer()), align=4)

    def store(self, value: Any, pointer: Any) -> None:
        """Eight floats to memory of any alignment."""
        self.builder.store(value, self.builder.bitcast(pointer, FLOATS.as_pointer()), align=4)

    def splat(self, scalar: Any, kind: Any = FLOATS) -> Any:
        """A vector of one value."""
        first = self.builder.insert_element(ir.Constant(kind, ir.Undefined), scalar, ir.Constant(I32, 0))
        return self.builder.shuffle_vector(first, ir.Constant(kind, ir.Undefined), ir.Constant(INTEGERS, [0] * LANES))

    def floats(self, value: float) -> Any:
        """A constant vector."""
        return ir.Constant(FLOATS, [value] * LANES)

    def integers(self, value: int) -> Any:
        """A constant vector of 32-bit integers."""
        return ir.Constant(INTEGERS, [value] * LANES)

    def fma(self, a: Any, b: Any, c: Any) -> Any:
        """The sum a * b + c, rounded once where the processor can."""
        return self.builder.fadd(self.builder.fmul(a, b, flags=_CONTRACT), c, flags=_CONTRACT)

    def call(self, name: str, result: Any, *arguments: Any) -> Any:
        """An instruction that LLVM knows by name."""
        kind = ir.FunctionType(result, [argument.type for argument in arguments])
        return self.builder.call(cgutils.get_or_insert_function(self.builder.module, kind, name), arguments)

    def total(self, vector: Any) -> Any:
        """Sum of the lanes."""
        if vector.type == INTEGERS:
            return self.call("llvm.vector.reduce.add.v8i32", I32, vector)
        kind = ir.FunctionType(F32, [F32, FLOATS])
        name = "llvm.vector.reduce.fadd.v8f32"
        function = cgutils.get_or_insert_function(self.builder.module, kind, name)
        return self.builder.call(function, [ir.Constant(F32, -0.0), vector], fastmath=("reassoc",))

    def variables(self, start: Any, count: int = 1) -> list[Any]:
        """Accumulators, which stand at `start` each time this place is passed; LLVM keeps them in registers."""
        found = [cgutils.alloca_once(self.builder, start.type) for _ in range(count)]
        for variable in found:
            self.builder.store(start, variable)
        return found

    def add(self, variable: Any, value: Any) -> None:
        """Add to an accumulator."""
        add = self.builder.add if value.type == INTEGERS else self.builder.fadd
        self.builder.store(add(self.builder.load(variable), value), variable)

    def multiply_add(self, a: Any, b: Any, variable: Any) -> None:
        """Add a product to an accumulator."""
        self.builder.store(self.fma(a, b, self.builder.load(variable)), variable)

    def add_row(self, target: Any, factor: Any, row: list[Any]) -> None:
        """Add a row that is held in registers, times a factor, to one in memory."""
        # Read all before writing any: LLVM does not know that rows do not overlap.
        before = [self.load(self.at(target, LANES * part)) for part in range(len(row))]
        added = [self.fma(factor, part, there) for part, there in zip(row, before, strict=True)]
        for part, value in enumerate(added):
            self.store(value, self.at(target, LANES * part))

    @contextlib.contextmanager
    def vectors(self, count: Any) -> Iterator[Any]:
        """A loop over whole vectors of a count that is rounded up: the offset of each."""
        with self.whole_vectors(self.builder.add(count, ir.Constant(I64, LANES - 1))) as at:
            yield at

    @contextlib.contextmanager
    def whole_vectors(self, count: Any) -> Iterator[Any]:
        """A loop over the whole vectors of a count: the offset of each."""
        with loop(self.builder, self.builder.udiv(count, ir.Constant(I64, LANES))) as step:
            yield self.builder.mul(step.index, ir.Constant(I64, LANES))

    @contextlib.contextmanager
    def rest(self, count: Any) -> Iterator[Any]:
        """A loop over what is left of a count behind its whole vectors: the offset of each element."""
        first = self.builder.sub(count, self.builder.urem(count, ir.Constant(I64, LANES)))
        with cgutils.for_range(self.builder, count, start=first) as step:
            yield step.index

    def by_width(self, width: Any, body: Callable[[int], None]) -> None:
        """One copy of some instructions for each head width."""
        after = self.builder.append_basic_block("after_widths")
        impossible = self.builder.append_basic_block("no_such_width")
        switch = self.builder.switch(width, impossible)
        for choice in WIDTHS:
            block = self.builder.append_basic_block(f"width_{choice}")
            switch.add_case(ir.Constant(I64, choice), block)
            with self.builder.goto_block(block):
                body(choice // LANES)
                self.builder.branch(after)
        with self.builder.goto_block(impossible):
            self.builder.branch(after)
        self.builder.position_at_end(after)

    def row(self, pointer: Any, column: Any, vectors: int) -> Any:
        """Pointer to a row of a matrix whose rows hold some vectors."""
        index = self.builder.zext(column, I64)
        return self.at(pointer, self.builder.mul(index, ir.Constant(I64, vectors * LANES)))

    def mix(self, state: Any) -> Any:
        """`noise.mix`."""
        builder = self.builder
        for _ in range(2):
            state = builder.mul(builder.xor(state, builder.lshr(state, self.integers(16))), self.integers(MULTIPLIER))
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
        n = self.call("llvm.rint.v8f32", FLOATS, scaled)
        r = self.fma(n, self.floats(-0.693145751953125), x)
        r = self.fma(n, self.floats(-1.428606765330187e-06), r)
        polynomial = self.floats(1.0 / 5040.0)
        for coefficient in (1 / 720, 1 / 120, 1 / 24, 1 / 6, 1 / 2, 1.0, 1.0):
            polynomial = self.fma(polynomial, r, self.floats(coefficient))
        # NaN must not reach the conversion, whose result would be undefined.
        number = builder.select(builder.fcmp_ordered("ord", n, n), n, self.floats(0.0))
        exponent = builder.shl(builder.add(builder.fptosi(number, INTEGERS), self.integers(127)), self.integers(23))
        value = builder.fmul(polynomial, builder.bitcast(exponent, FLOATS))
        return builder.select(under, self.floats(0.0), value)


def loop(builder: Any, count: Any) -> Any:
    """A loop over 0 to count - 1, whose `index` is an int64."""
    return cgutils.for_range(builder, count)
