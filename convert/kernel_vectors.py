"""Vectors for numba: `LANES` numbers that take part in every operation side by side.

numba has no such type. Here are three, of float32, of int32 and of truths, with the operations that the kernels need.
Each becomes one LLVM instruction without any licence to reorder or to fuse, so that a lane computes exactly what scalar
C code does. Arrays hold one vector after another and are indexed by vector.
"""

# numba and llvmlite have types for a part of what is used here
# mypy: disable-error-code="no-untyped-call, attr-defined, import-untyped"

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any, TypeVar, cast

import llvmlite.binding
import numba
from llvmlite import ir
from numba.core import cgutils, types
from numba.core.typing import signature
from numba.core.typing.templates import ConcreteTemplate, infer, infer_global
from numba.extending import intrinsic, lower_builtin, models, register_model

FEATURES = llvmlite.binding.get_host_cpu_features()
# Two registers of the widest kind: while the additions of one wait for each other, those of the other run.
LANES = 32 if FEATURES.get("avx512f") else 16
# Without instructions for it LLVM calls a C function for float16 that may not be there.
HAS_HALVES = bool(FEATURES.get("f16c")) or llvmlite.binding.get_process_triple().startswith(("aarch64", "arm64"))

Floats = Any  # LANES numbers of float32
Ints = Any  # LANES numbers of int32
Truths = Any  # LANES bits
_Function = TypeVar("_Function", bound=Callable[..., Any])


def inlined(function: _Function) -> _Function:
    """`function`, to be compiled into the kernels that call it."""
    return cast(_Function, numba.njit(nogil=True, error_model="numpy")(function))


class _Vector(types.Type):
    def __init__(self, element: ir.Type) -> None:
        self.ir = ir.VectorType(element, LANES)
        super().__init__(name=f"{LANES} x {element}")


@register_model(_Vector)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, manager: Any, vector: _Vector) -> None:
        super().__init__(manager, vector, vector.ir)


_F, _I, _T = _Vector(ir.FloatType()), _Vector(ir.IntType(32)), _Vector(ir.IntType(1))
_HALVES, _SHORTS = ir.VectorType(ir.HalfType(), LANES), ir.VectorType(ir.IntType(16), LANES)


def _define(function: Any, result: types.Type, arguments: tuple[types.Type, ...], instruction: Any) -> None:
    """Let compiled code apply `function` to `arguments`: `instruction(builder, *values)`."""
    cases = [signature(result, *arguments)]
    template = type("_Template", (ConcreteTemplate,), {"key": function, "cases": cases})
    infer(template)
    infer_global(function, types.Function(template))
    lower_builtin(function, *arguments)(lambda context, builder, typed, values: instruction(builder, *values))


def _named(result: types.Type, arguments: tuple[types.Type, ...], instruction: Any) -> Callable[..., Any]:
    """A new function for compiled code."""

    def function(*values: Any) -> Any:
        raise NotImplementedError("it is for compiled code")

    _define(function, result, arguments, instruction)
    return function


def _library(name: str) -> Any:
    """LLVM's own function of that name, on vectors."""
    typed, full = ir.FunctionType(_F.ir, [_F.ir]), f"{name}.v{LANES}f32"
    return lambda builder, x: builder.call(cgutils.get_or_insert_function(builder.module, typed, full), [x])


for _sign, _of_floats, _of_ints in (
    (operator.add, ir.IRBuilder.fadd, ir.IRBuilder.add),
    (operator.sub, ir.IRBuilder.fsub, ir.IRBuilder.sub),
    (operator.mul, ir.IRBuilder.fmul, None),
    (operator.truediv, ir.IRBuilder.fdiv, None),
    (operator.and_, None, ir.IRBuilder.and_),
    (operator.or_, None, ir.IRBuilder.or_),
    (operator.lshift, None, ir.IRBuilder.shl),
    (operator.rshift, None, ir.IRBuilder.ashr),
):
    if _of_floats:
        _define(_sign, _F, (_F, _F), _of_floats)
    if _of_ints:
        _define(_sign, _I, (_I, _I), _of_ints)
for _sign, _word in ((operator.lt, "<"), (operator.gt, ">"), (operator.eq, "==")):
    _define(_sign, _T, (_F, _F), lambda builder, x, y, word=_word: builder.fcmp_ordered(word, x, y))
    _define(_sign, _T, (_I, _I), lambda builder, x, y, word=_word: builder.icmp_signed(word, x, y))
_define(operator.and_, _T, (_T, _T), ir.IRBuilder.and_)
_define(operator.or_, _T, (_T, _T), ir.IRBuilder.or_)
_define(operator.neg, _F, (_F,), ir.IRBuilder.fneg)

absolute = _named(_F, (_F,), _library("llvm.fabs"))
square_root = _named(_F, (_F,), _library("llvm.sqrt"))
bits_of = _named(_I, (_F,), lambda builder, x: builder.bitcast(x, _I.ir))
as_floats = _named(_F, (_I,), lambda builder, x: builder.sitofp(x, _F.ir))
choose = _named(_F, (_T, _F, _F), ir.IRBuilder.select)
choose_ints = _named(_I, (_T, _I, _I), ir.IRBuilder.select)


def _to_half(builder: Any, x: Any) -> Any:
    return builder.zext(builder.bitcast(builder.fptrunc(x, _HALVES), _SHORTS), _I.ir)


def _from_half(builder: Any, x: Any) -> Any:
    return builder.fpext(builder.bitcast(builder.trunc(x, _SHORTS), _HALVES), _F.ir)


def _any(builder: Any, truths: Any) -> Any:
    bits = builder.bitcast(truths, ir.IntType(LANES))
    return builder.icmp_signed("!=", bits, bits.type(0))


def _all(builder: Any, truths: Any) -> Any:
    bits = builder.bitcast(truths, ir.IntType(LANES))
    return builder.icmp_signed("==", bits, bits.type(-1))


half_bits = _named(_I, (_F,), _to_half)  # rounded to float16, as its 16 bits
from_half_bits = _named(_F, (_I,), _from_half)
any_of, all_of = _named(types.boolean, (_T,), _any), _named(types.boolean, (_T,), _all)


def _filled(scalar: types.Type, vector: _Vector) -> Callable[..., Any]:
    """A function that puts one number, as `scalar`, into every lane."""

    def fill(context: Any, x: Any) -> Any:
        def generate(context: Any, builder: Any, typed: Any, values: Any) -> Any:
            index = ir.IntType(32)
            value = context.cast(builder, values[0], typed.args[0], scalar)
            one = builder.insert_element(ir.Constant(vector.ir, ir.Undefined), value, index(0))
            return builder.shuffle_vector(one, one, ir.Constant(ir.VectorType(index, LANES), [0] * LANES))

        return signature(vector, x), generate

    return cast(Callable[..., Any], intrinsic(fill))


floats, ints = _filled(types.float32, _F), _filled(types.int32, _I)


def _pointer(context: Any, builder: Any, typed: Any, array: Any, index: Any, vector: Any) -> Any:
    data = context.make_array(typed.args[0])(context, builder, array).data
    return builder.gep(builder.bitcast(data, vector.ir.as_pointer()), [index])


def _load(context: Any, array: Any, index: Any) -> Any:
    vector = _F if array.dtype == types.float32 else _I

    def generate(context: Any, builder: Any, typed: Any, values: Any) -> Any:
        return builder.load(_pointer(context, builder, typed, values[0], values[1], vector), align=4)

    return signature(vector, array, types.intp), generate


def _store(context: Any, array: Any, index: Any, value: Any) -> Any:
    def generate(context: Any, builder: Any, typed: Any, values: Any) -> Any:
        builder.store(values[2], _pointer(context, builder, typed, values[0], values[1], value), align=4)
        return context.get_dummy_value()

    return signature(types.void, array, types.intp, value), generate


load = cast(Callable[..., Any], intrinsic(_load))  # load(array, index): a vector of an array of float32 or int32
store = cast(Callable[..., Any], intrinsic(_store))  # store(array, index, value)
