"""What vectors.py is for numba, for Triton: a lane is a thread of the GPU, `LANES` of them are a warp.

A thread computes exactly what scalar C code does: division and square root are the rounded ones, and the launch turns
the fusing of multiplication and addition off. A `Row` points at a thread's own number of a vector; its vectors lie
`SIDE` numbers apart, so that neighbouring threads read neighbouring numbers.
"""

# triton has types for a part of what is used here
# mypy: disable-error-code="no-untyped-call, no-any-return, misc, untyped-decorator"

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import triton
import triton.language as tl

INTERPRETED = triton.knobs.runtime.interpret  # by Python and numpy, for which a step takes as long for many
LANES = tl.constexpr(1024 if INTERPRETED else 32)
SIDE = tl.constexpr(2048 if INTERPRETED else 4096)  # threads of a launch; what is more goes in several
if TYPE_CHECKING:
    Floats = Any
    Ints = Any
    Truths = Any
    Row = Any
    Number = Any
else:  # Triton looks names in annotations up
    Floats = Ints = Truths = Row = Number = tl.tensor

inlined = (lambda function: function) if INTERPRETED else triton.jit
unrolled = range if INTERPRETED else tl.static_range


@inlined
def floats(number: Number) -> Number:
    return number + tl.full([LANES], -0.0, tl.float32)  # what leaves every number as it is


@inlined
def f32(number: Number) -> Number:
    return number + tl.full([], -0.0, tl.float32)


@inlined
def at(row: Row, i: Number) -> Number:
    return tl.load(row + i * SIDE)


@inlined
def put(row: Row, i: Number, value: Number) -> None:
    tl.store(row + i * SIDE, value)


@inlined
def beyond(row: Row, i: Number) -> Row:
    return row + i * SIDE


@inlined
def divided(x: Number, y: Number) -> Floats:
    return tl.div_rn(floats(x), floats(y))


@inlined
def square_root(x: Floats) -> Floats:
    return tl.sqrt_rn(x)


@inlined
def absolute(x: Floats) -> Floats:
    return tl.abs(x)


@inlined
def nearest(x: Floats) -> Floats:
    return (x + 12582912.0) - 12582912.0  # as nearest_int does


@inlined
def choose(truths: Truths, x: Number, y: Number) -> Floats:
    return tl.where(truths, x, y)


@inlined
def smaller(x: Number, y: Number) -> Floats:
    return choose(x < y, x, y)


@inlined
def larger(x: Number, y: Number) -> Floats:
    return choose(x > y, x, y)


@inlined
def any_of(truths: Truths) -> Number:
    return tl.max(truths.to(tl.int32), 0) > 0


@inlined
def as_ints(x: Floats) -> Ints:
    return x.to(tl.int32)


@inlined
def half_bits(x: Floats) -> Ints:
    return x.to(tl.float16).to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF


@inlined
def from_half_bits(x: Ints) -> Floats:
    return x.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@inlined
def row_of(scratch: Number) -> Row:
    """This thread's."""
    return scratch + tl.program_id(0) * LANES + tl.arange(0, LANES)


@inlined
def ints_of(row: Row) -> Row:
    return row.to(tl.pointer_type(tl.int32), bitcast=True)


@inlined
def first_of_group() -> Number:
    return tl.program_id(0) * LANES


@inlined
def whole(first: Number, irregular: Number) -> Number:
    return first  # super-blocks come in whole groups here


@inlined
def fetch(source: Number, first: Number, weights: Number, target: Row) -> None:
    for i in range(weights):
        put(target, i, tl.load(source + (first + tl.arange(0, LANES)) * weights + i))


fetch_again = fetch  # of importances, which lie there for every super-block


@inlined
def deliver(
    scratch: Number, flags: Number, words: Number, size: Number, first: Number, packed: Number, irregular: Number
) -> None:
    lanes = first + tl.arange(0, LANES)
    tl.store(irregular + lanes, (at(row_of(scratch), flags) != 0).to(tl.int8))
    for i in range(size):
        tl.store(packed + lanes * size + i, at(ints_of(beyond(row_of(scratch), words)), i).to(tl.int16))
