"""Vectors for numba: `LANES` numbers that take part in every operation side by side.

numba has no such type. Here are three, of float32, of int32 and of truths, with the operations that the kernels need.
Each becomes LLVM instructions without any licence to reorder or to fuse, so that a lane computes exactly what scalar C
code does. A number beside a vector stands for a vector of it. A `Row` is a pointer to vectors, used as in C.

This module is loaded once for each width of its vectors: see narrow.py.
"""

# numba and llvmlite have types for a part of what is used here
# mypy: disable-error-code="no-untyped-call, attr-defined, import-untyped"

from __future__ import annotations

import operator
from collections.abc import Callable
from itertools import product
from typing import Any, TypeVar, cast

import llvmlite.binding
import numba
import numpy as np
from llvmlite import ir
from numba.core import cgutils, types
from numba.core.typing import signature
from numba.core.typing.templates import ConcreteTemplate, infer, infer_global
from numba.extending import intrinsic, lower_builtin, models, register_model

from . import REGISTERS

FEATURES = llvmlite.binding.get_host_cpu_features()
WIDTH = 16 if FEATURES.get("avx512f") else 8 if FEATURES.get("avx2") else 4  # numbers in a register
LANES = WIDTH * REGISTERS
# Without instructions for it LLVM calls a C function for float16 that may not be there.
HAS_HALVES = bool(FEATURES.get("f16c")) or llvmlite.binding.get_process_triple().startswith(("aarch64", "arm64"))

Floats = Any  # LANES numbers of float32
Ints = Any  # LANES numbers of int32
Truths = Any  # LANES bits
Row = Any  # Floats, or Ints, one after another: row[i], row[i] = x, row + i
_Function = TypeVar("_Function", bound=Callable[..., Any])


def inlined(function: _Function) -> _Function:
    """`function`, to be compiled into the kernels that call it."""
    return cast(_Function, numba.njit(nogil=True, error_model="numpy", forceinline=True)(function))


class _Type(types.Type):
    """A numba type with the form that LLVM knows, and what number of numba's can stand for it."""

    def __init__(self, name: str, form: ir.Type, number: types.Type | None = None) -> None:
        self.ir, self.number = form, number
        super().__init__(name=name)


@register_model(_Type)
class _Model(models.PrimitiveModel):
    def __init__(self, manager: Any, of: _Type) -> None:
        super().__init__(manager, of, of.ir)


_BYTES, _INT = ir.IntType(8).as_pointer(), ir.IntType(32)
_FLOATS, _INTS, _TRUTHS, _HALVES, _SHORTS = (
    ir.VectorType(element, WIDTH) for element in (ir.FloatType(), _INT, ir.IntType(1), ir.HalfType(), ir.IntType(16))
)
_F = _Type("Floats", ir.ArrayType(_FLOATS, REGISTERS), types.float32)
_I = _Type("Ints", ir.ArrayType(_INTS, REGISTERS), types.int32)
_T = _Type("Truths", ir.ArrayType(_TRUTHS, REGISTERS))
_ROWS = {vector: _Type(f"Row of {vector.name}", vector.ir.as_pointer()) for vector in (_F, _I)}
_NOTHING = ir.Constant(_BYTES, None)


def _register(builder: Any, value: Any, number: int) -> Any:
    """That register of a vector, or one that a number fills."""
    if isinstance(value.type, ir.ArrayType):
        return builder.extract_value(value, number)
    one = builder.insert_element(ir.Constant(ir.VectorType(value.type, WIDTH), ir.Undefined), value, _INT(0))
    return builder.shuffle_vector(one, one, ir.Constant(_INTS, [0] * WIDTH))


def _each(instruction: Any) -> Any:
    """`instruction(builder, *registers)` for vectors."""

    def lowered(builder: Any, *values: Any) -> Any:
        whole = None
        for number in range(REGISTERS):
            result = instruction(builder, *(_register(builder, value, number) for value in values))
            whole = whole or ir.Constant(ir.ArrayType(result.type, REGISTERS), ir.Undefined)
            whole = builder.insert_value(whole, result, number)
        return whole

    return lowered


def _define(function: Any, result: types.Type, arguments: tuple[types.Type, ...], instruction: Any) -> None:
    """Let compiled code apply `function` to `arguments`: `instruction(builder, *values)`."""
    numbers = [(item, item.number) if getattr(item, "number", None) else (item,) for item in arguments]
    own = function.__module__ == __name__
    choices = [choice for choice in product(*numbers) if own or any(isinstance(item, _Type) for item in choice)]
    cases = [signature(result, *choice) for choice in choices]
    template = type("_Template", (ConcreteTemplate,), {"key": function, "cases": cases})
    infer(template)
    infer_global(function, types.Function(template))
    for choice in choices:
        lower_builtin(function, *choice)(lambda context, builder, typed, values: instruction(builder, *values))


def _named(result: types.Type, arguments: tuple[types.Type, ...], instruction: Any) -> Callable[..., Any]:
    """A new function for compiled code."""

    def function(*values: Any) -> Any:
        raise NotImplementedError("it is for compiled code")

    _define(function, result, arguments, instruction)
    return function


def _library(name: str) -> Any:
    """LLVM's own function of that name."""
    typed, full = ir.FunctionType(_FLOATS, [_FLOATS]), f"{name}.v{WIDTH}f32"
    return lambda builder, x: builder.call(cgutils.get_or_insert_function(builder.module, typed, full), [x])


def _chosen(word: str) -> Any:
    return lambda builder, x, y: builder.select(builder.fcmp_ordered(word, x, y), x, y)


def _load(builder: Any, row: Any, i: Any) -> Any:
    return builder.load(builder.gep(row, [i]), align=4)


def _store(builder: Any, row: Any, i: Any, value: Any) -> Any:
    for number in range(REGISTERS):
        builder.store(_register(builder, value, number), builder.gep(row, [i, _INT(number)]), align=4)
    return _NOTHING


def _to_half(builder: Any, x: Any) -> Any:
    return builder.zext(builder.bitcast(builder.fptrunc(x, _HALVES), _SHORTS), _INTS)


def _from_half(builder: Any, x: Any) -> Any:
    return builder.fpext(builder.bitcast(builder.trunc(x, _SHORTS), _HALVES), _FLOATS)


def _any(builder: Any, truths: Any) -> Any:
    either = _register(builder, truths, 0)
    for number in range(1, REGISTERS):
        either = builder.or_(either, _register(builder, truths, number))
    bits = builder.bitcast(either, ir.IntType(WIDTH))
    return builder.icmp_signed("!=", bits, bits.type(0))


def _transpose(builder: Any, rows: Any, stride: Any, columns: Any) -> Any:
    """Tiles of a register's width: for each power of two the squares of that size off the diagonal change places."""
    for right, below in product(range(REGISTERS), repeat=2):
        tile = []
        for i in range(WIDTH):
            row = builder.gep(rows, [builder.mul(stride, stride.type(below * WIDTH + i))])
            tile.append(builder.load(builder.gep(row, [_INT(0), _INT(right)]), align=4))
        for size in (2**power for power in range(WIDTH.bit_length() - 1)):
            low = ir.Constant(_INTS, [k if not k & size else k - size + WIDTH for k in range(WIDTH)])
            high = ir.Constant(_INTS, [k + size if not k & size else k + WIDTH for k in range(WIDTH)])
            for i in (i for i in range(WIDTH) if not i & size):
                pair = tile[i], tile[i + size]
                tile[i], tile[i + size] = builder.shuffle_vector(*pair, low), builder.shuffle_vector(*pair, high)
        for i, register in enumerate(tile):
            place = builder.gep(columns, [_INT(right * WIDTH + i), _INT(below)])
            builder.store(register, place, align=4)
    return _NOTHING


def _prefetch(builder: Any, row: Any, i: Any) -> Any:
    typed = ir.FunctionType(ir.VoidType(), [_BYTES, _INT, _INT, _INT])
    function = cgutils.get_or_insert_function(builder.module, typed, "llvm.prefetch.p0")
    builder.call(function, [builder.bitcast(builder.gep(row, [i]), _BYTES), _INT(0), _INT(2), _INT(1)])
    return _NOTHING


_build = ir.IRBuilder
for _sign, _vector, _instruction in (
    (operator.add, _F, _build.fadd), (operator.sub, _F, _build.fsub), (operator.mul, _F, _build.fmul),
    (operator.truediv, _F, _build.fdiv), (operator.and_, _T, _build.and_), (operator.or_, _T, _build.or_),
    (operator.and_, _I, _build.and_), (operator.or_, _I, _build.or_), (operator.lshift, _I, _build.shl),
    (operator.rshift, _I, _build.ashr),
):  # fmt: skip
    _define(_sign, _vector, (_vector, _vector), _each(_instruction))
for _sign, _word in ((operator.lt, "<"), (operator.gt, ">"), (operator.ge, ">="), (operator.ne, "!=")):
    _define(_sign, _T, (_F, _F), _each(lambda builder, x, y, word=_word: builder.fcmp_ordered(word, x, y)))
_define(operator.neg, _F, (_F,), _each(_build.fneg))
_define(operator.invert, _T, (_T,), _each(_build.not_))
for _vector, _row in _ROWS.items():
    _define(operator.add, _row, (_row, types.intp), lambda builder, row, i: builder.gep(row, [i]))
    _define(operator.getitem, _vector, (_row, types.intp), _load)
    _define(operator.setitem, types.none, (_row, types.intp, _vector), _store)

unrolled = range  # of a loop whose turns are written out
floats = _named(_F, (_F,), _each(lambda builder, x: x))  # a number in every lane
absolute = _named(_F, (_F,), _each(_library("llvm.fabs")))
square_root = _named(_F, (_F,), _each(_library("llvm.sqrt")))
nearest = _named(_F, (_F,), _each(_library("llvm.rint")))  # integer, ties to even
smaller = _named(_F, (_F, _F), _each(_chosen("<")))  # the first where it is smaller, else the second
larger = _named(_F, (_F, _F), _each(_chosen(">")))
choose = _named(_F, (_T, _F, _F), _each(_build.select))
any_of = _named(types.boolean, (_T,), _any)
as_ints = _named(_I, (_F,), _each(lambda builder, x: builder.fptosi(x, _INTS)))
half_bits = _named(_I, (_F,), _each(_to_half))  # rounded to float16, as its 16 bits
from_half_bits = _named(_F, (_I,), _each(_from_half))
ints_of = _named(_ROWS[_I], (_ROWS[_F],), lambda builder, row: builder.bitcast(row, _ROWS[_I].ir))
_prefetch_row = _named(types.none, (_ROWS[_F], types.intp), _prefetch)  # row[i], which will be wanted soon
_transposed = _named(types.none, (_ROWS[_F], types.intp, _ROWS[_F]), _transpose)  # of LANES rows `stride` apart


def _row_of(context: Any, array: Any) -> Any:
    def generate(context: Any, builder: Any, typed: Any, values: Any) -> Any:
        return builder.bitcast(context.make_array(array)(context, builder, values[0]).data, _ROWS[_F].ir)

    return signature(_ROWS[_F], array), generate


row_of = cast(Callable[..., Any], intrinsic(_row_of))  # of an array of float32, which has to outlive it


@inlined
def groups(irregular: Any) -> Any:
    """The number of the first of every `LANES` super-blocks."""
    return range(0, irregular.size, LANES)


@inlined
def whole(first: int, irregular: Any) -> Any:
    """`first`, moved back where fewer than `LANES` super-blocks are left."""
    return min(first, irregular.size - LANES)


@inlined
def fetch(source: Any, first: int, weights: int, target: Row) -> None:
    """`LANES` super-blocks of so many weights, one a lane. Those behind them will be wanted next."""
    rows = row_of(source[first * weights :])
    for i in range(weights // LANES):
        _transposed(rows + i, weights // LANES, target + i * LANES)
    for i in range(weights):
        _prefetch_row(rows, weights + i)


@inlined
def fetch_again(source: Any, first: int, weights: int, target: Row) -> None:
    """`fetch` from numbers that repeat with the tensor's columns; `source` goes on for a group behind them."""
    fetch(source, first % (source.size // weights - LANES), weights, target)


@inlined
def deliver(scratch: Any, flags: int, words: int, size: int, first: int, packed: Any, irregular: Any) -> None:
    """Write each lane's super-block, the low 16 bits of `size` numbers from vector `words` on, and its flag."""
    marks, numbers = scratch[flags * LANES :], scratch[words * LANES :].view(np.int32)
    for lane in range(LANES):
        block = whole(first, irregular) + lane
        irregular[block] = marks[lane] != 0
        for i in range(size):
            packed[block * size + i] = numbers[i * LANES + lane]
