"""Super-blocks of 256 weights, `LANES` at a time, from weights to the bytes of ggml's types.

A type's function searches a scale for each of its 8 or 16 blocks, rounds those scales to a few bits, rounds the weights
anew on the grids that are left, and packs. `quantize_row_*_ref` and `quantize_row_*_impl` are its reference.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from . import search, vectors
from .ggml import WEIGHTS
from .search import HUGE, Scratch, largest, level, require, squares, weigh
from .vectors import Floats, Ints, Row, absolute, as_ints, choose, floats, groups, half_bits, inlined, larger, row_of

_STEP = 34  # vectors from one short row of Scratch to the next, of up to 32; 4 kB apart, stores would hold up loads
_FLAGS = 3 * WEIGHTS + 11 * _STEP  # where a vector lies that tells what is left to ggml
_BLOCK = _FLAGS + _STEP  # where the packed bytes begin, in vectors
_WORDS = 136  # of 16 bits, at most: eight blocks of Q8_0
SCRATCH = _BLOCK + _WORDS


@inlined
def _begin(x: Any, importance: Any, irregular: Any, scratch: Any, first: int) -> Scratch:
    """Fetch the group of super-blocks that starts with number `first`, or the last whole group."""
    start = vectors.whole(first, irregular)
    row, few = row_of(scratch), row_of(scratch) + 3 * WEIGHTS
    flags, block = row + _FLAGS, vectors.ints_of(row + _BLOCK)
    vectors.fetch(x, start, WEIGHTS, row)
    if importance is not None:
        vectors.fetch_again(importance, start, WEIGHTS, row + WEIGHTS)
    for i in range(_WORDS):
        block[i] = 0
    flags[0] = 0
    return Scratch(
        row, row + WEIGHTS, row + 2 * WEIGHTS, few, few + _STEP, few + 2 * _STEP, few + 3 * _STEP, few + 4 * _STEP,
        few + 5 * _STEP, few + 6 * _STEP, few + 7 * _STEP, few + 8 * _STEP, few + 9 * _STEP, few + 10 * _STEP,
        flags, block, importance is not None,
    )  # fmt: skip


@inlined
def _put(s: Scratch, byte: int, value: Ints) -> None:
    """Add a byte, or from an even place two, to the super-block."""
    s.block[byte // 2] = s.block[byte // 2] | value << (byte % 2 * 8)


@inlined
def _pack(s: Scratch, start: int, skip: int, width: int, run: int) -> None:
    """Put `width` bits of each level, from bit `skip` on, from byte `start` on: `run` levels lie in as many bytes, the
    next `run` beside them in the next higher bits, until these bytes are full."""
    fields = 8 // width
    for byte in range(WEIGHTS // fields):
        bits = as_ints(floats(0))
        for field in range(fields):
            i = byte // run * run * fields + field * run + byte % run
            bits = bits | ((as_ints(s.levels[i]) >> skip) & ((1 << width) - 1)) << (width * field)
        _put(s, start + byte, bits)


@inlined
def _round_weights(s: Scratch, j: int, n: int, d: Floats, minimum: Floats, low: int, high: int) -> None:
    """The levels of block j on its final grid."""
    most = floats(0)
    for i in range(n * j, n * j + n):
        scaled = (s.x[i] + minimum) / d
        most = larger(absolute(scaled), most)
        s.levels[i] = level(scaled, low, high) - low
    require(s, (most < search.SMALL) & (absolute(d) > 0) & (absolute(d) < HUGE) & (absolute(minimum) < HUGE))


@inlined
def _search(s: Scratch, n: int, nmax: int, rmin: float, nstep: int) -> None:
    """Scale and minimum of every block of n weights."""
    sigma2 = (1 if n == 16 else 2) * squares(s.x, WEIGHTS) / WEIGHTS
    for j in range(WEIGHTS // n):
        x = s.x + n * j
        if s.weighted:
            weigh(s, j, n, sigma2)
            s.scales[j], s.minimums[j] = search.make_qkx(s, x, n, nmax, -0.9, 0.05, 36, False)
        else:
            average = floats(0) if n == 16 else vectors.square_root(squares(x, n) / n)
            for i in range(n):
                s.w[i] = average + absolute(x[i])
            s.scales[j], s.minimums[j] = search.make_qkx(s, x, n, nmax, rmin, 0.1, nstep, n == 16)


@inlined
def _round_scales(s: Scratch, numbers: Row, levels: Row, n: int, nmax: int) -> Ints:
    """Scales or minimums as integers up to nmax, and what one step stands for, in float16."""
    if s.weighted:
        return half_bits(search.make_qp(s, numbers, s.sums, levels, n, nmax))
    top = floats(0)
    for j in range(n):
        top = larger(numbers[j], top)
        require(s, (numbers[j] >= 0) & (numbers[j] < HUGE))
    inverse = choose(top > 0, nmax / top, 0)
    require(s, inverse < HUGE)
    for j in range(n):
        levels[j] = vectors.nearest(inverse * numbers[j])
    return half_bits(top / nmax)


@inlined
def _with_six_bits(s: Scratch, nmax: int, rmin: float, nstep: int) -> None:
    """The levels, and at the head of the block d, dmin and scales[12]: those of eight blocks, and their minimums."""
    _search(s, 32, nmax, rmin, nstep)
    d, dmin = _round_scales(s, s.scales, s.ls, 8, 63), _round_scales(s, s.minimums, s.lm, 8, 63)
    _put(s, 0, d)
    _put(s, 2, dmin)
    for j in range(4):
        ls, lm, ls4, lm4 = as_ints(s.ls[j]), as_ints(s.lm[j]), as_ints(s.ls[j + 4]), as_ints(s.lm[j + 4])
        _put(s, 4 + j, ls | ls4 >> 4 << 6)
        _put(s, 8 + j, lm | lm4 >> 4 << 6)
        _put(s, 12 + j, (ls4 & 15) | (lm4 & 15) << 4)
    for j in range(8):
        _round_weights(s, j, 32, vectors.from_half_bits(d) * s.ls[j], vectors.from_half_bits(dmin) * s.lm[j], 0, nmax)


# The kernels, of `x`, which divides into super-blocks, and `importance`, one number for each column or none. They write
# 16-bit words to `packed`, and to `irregular` which super-blocks are left to ggml.


def q2_k(x: Any, importance: Any, packed: Any, irregular: Any, scratch: Any) -> None:
    """scales[16], of four bits each for scale and minimum, qs[64], d, dmin"""
    for first in groups(irregular):
        s = _begin(x, importance, irregular, scratch, first)
        _search(s, 16, 3, -0.5, 15)
        d, dmin = _round_scales(s, s.scales, s.ls, 16, 15), _round_scales(s, s.minimums, s.lm, 16, 15)
        for j in range(16):
            _put(s, j, as_ints(s.ls[j]) | as_ints(s.lm[j]) << 4)
            _round_weights(s, j, 16, vectors.from_half_bits(d) * s.ls[j], vectors.from_half_bits(dmin) * s.lm[j], 0, 3)
        _pack(s, 16, 0, 2, 32)
        _put(s, 80, d)
        _put(s, 82, dmin)
        vectors.deliver(scratch, _FLAGS, _BLOCK, 42, first, packed, irregular)


def q3_k(x: Any, importance: Any, packed: Any, irregular: Any, scratch: Any) -> None:
    """hmask[32], qs[64], scales[12], of six bits each, d"""
    for first in groups(irregular):
        s = _begin(x, importance, irregular, scratch, first)
        sigma2 = 2 * squares(s.x, WEIGHTS) / WEIGHTS
        for j in range(16):
            weigh(s, j, 16, sigma2)
            if importance is not None:
                s.scales[j] = search.make_qx(s, s.x + 16 * j, s.w, 16, 4)[0]
            else:
                s.scales[j] = search.make_q3(s, s.x + 16 * j, s.levels, 16, 4)
        if importance is not None:
            scale, iscale = search.make_qx(s, s.scales, s.sums, 16, 32)
        else:
            iscale = -32 / largest(s.scales, 16)
            scale = 1 / iscale
        d = half_bits(scale)
        for j in range(16):
            ls = level(iscale * s.scales[j], -32, 31)
            bits = as_ints(ls + 32)
            _put(s, 96 + j % 8, (bits & 15) << (j // 8 * 4))
            _put(s, 104 + j % 4, bits >> 4 << (j // 4 * 2))
            _round_weights(s, j, 16, vectors.from_half_bits(d) * ls, floats(-0.0), -4, 3)
        _pack(s, 0, 2, 1, 32)
        _pack(s, 32, 0, 2, 32)
        _put(s, 108, d)
        vectors.deliver(scratch, _FLAGS, _BLOCK, 55, first, packed, irregular)


def q4_k(x: Any, importance: Any, packed: Any, irregular: Any, scratch: Any) -> None:
    """d, dmin, scales[12], qs[128]"""
    for first in groups(irregular):
        s = _begin(x, importance, irregular, scratch, first)
        _with_six_bits(s, 15, -1.0, 20)
        _pack(s, 16, 0, 4, 32)
        vectors.deliver(scratch, _FLAGS, _BLOCK, 72, first, packed, irregular)


def q5_k(x: Any, importance: Any, packed: Any, irregular: Any, scratch: Any) -> None:
    """d, dmin, scales[12], qh[32], qs[128]"""
    for first in groups(irregular):
        s = _begin(x, importance, irregular, scratch, first)
        _with_six_bits(s, 31, -0.5, 15)
        _pack(s, 16, 4, 1, 32)
        _pack(s, 48, 0, 4, 32)
        vectors.deliver(scratch, _FLAGS, _BLOCK, 88, first, packed, irregular)


def q6_k(x: Any, importance: Any, packed: Any, irregular: Any, scratch: Any) -> None:
    """ql[128], qh[64], scales[16], of eight bits each, d"""
    for first in groups(irregular):
        s = _begin(x, importance, irregular, scratch, first)
        for j in range(16):
            for i in range(16):
                s.w[i] = s.importance[16 * j + i] if importance is not None else s.x[16 * j + i] * s.x[16 * j + i]
            s.scales[j] = search.make_qx(s, s.x + 16 * j, s.w, 16, 32)[0]
        top = largest(s.scales, 16)
        require(s, absolute(top) >= search.EPSILON)
        iscale = -128 / top
        d = half_bits(1 / iscale)
        for j in range(16):
            ls = level(iscale * s.scales[j], -128, 127)
            _put(s, 192 + j, as_ints(ls) & 255)
            _round_weights(s, j, 16, vectors.from_half_bits(d) * ls, floats(-0.0), -32, 31)
        _pack(s, 0, 0, 4, 64)
        _pack(s, 128, 4, 2, 32)
        _put(s, 208, d)
        vectors.deliver(scratch, _FLAGS, _BLOCK, 105, first, packed, irregular)


def iq4_xs(x: Any, importance: Any, packed: Any, irregular: Any, scratch: Any) -> None:
    """d, scales_h, scales_l[4], of six bits each, qs[128]"""
    for first in groups(irregular):
        s = _begin(x, importance, irregular, scratch, first)
        sigma2 = squares(s.x, WEIGHTS) * (2 / WEIGHTS)
        for j in range(8):
            weigh(s, j, 32, sigma2)
            s.scales[j] = search.make_iq4(s, s.x + 32 * j, 32, 7)
        d = -largest(s.scales, 8) / 32
        require(s, (absolute(d) > 0) & (absolute(d) < HUGE))
        _put(s, 0, half_bits(d))
        for j in range(8):
            ls = level(1 / d * s.scales[j], -32, 31)
            require(s, (1 / (d * ls) < HUGE) & (1 / (d * ls) > -HUGE))
            for i in range(32 * j, 32 * j + 32):
                s.levels[i] = search.nearest_of(1 / (d * ls) * s.x[i], search.INDEXES)
            bits = as_ints(ls + 32)
            s.block[1] = s.block[1] | bits >> 4 << (2 * j)
            _put(s, 4 + j // 2, (bits & 15) << (j % 2 * 4))
        _pack(s, 8, 0, 4, 16)
        vectors.deliver(scratch, _FLAGS, _BLOCK, 68, first, packed, irregular)


def q8_0(x: Any, importance: Any, packed: Any, irregular: Any, scratch: Any) -> None:
    """eight blocks of d, qs[32], without a search"""
    for first in groups(irregular):
        s = _begin(x, None, irregular, scratch, first)
        for j in range(8):
            d = absolute(largest(s.x + 32 * j, 32)) / 127
            require(s, (d > 0) & (1 / d < HUGE))
            _put(s, 34 * j, half_bits(d))
            for i in range(32):
                scaled = s.x[32 * j + i] * (1 / d)
                half = choose(scaled < 0, -search.HALF, search.HALF)
                _put(s, 34 * j + 2 + i, as_ints(scaled + half) & 255)  # roundf
        vectors.deliver(scratch, _FLAGS, _BLOCK, 136, first, packed, irregular)


KERNELS: dict[str, Callable[[Any, Any, Any, Any, Any], None]] = {
    "Q2_K": q2_k, "Q3_K": q3_k, "Q4_K": q4_k, "Q5_K": q5_k, "Q6_K": q6_k, "IQ4_XS": iq4_xs, "Q8_0": q8_0,
}  # fmt: skip
