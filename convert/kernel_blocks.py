"""Super-blocks of 256 weights, `LANES` at a time, from weights to the bytes of ggml's K types.

A type's function searches a scale for each of its 8 or 16 blocks, rounds those scales to a few bits, rounds the weights
anew on the grids that are left, and packs. `quantize_row_*_ref` and `quantize_row_*_impl` are its reference.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from .kernel_search import EPSILON, at_most, clamped, largest, make_q3, make_qkx, make_qp, make_qx, nearest_int
from .kernel_vectors import (
    LANES,
    Floats,
    Ints,
    absolute,
    any_of,
    as_floats,
    choose,
    choose_ints,
    floats,
    from_half_bits,
    half_bits,
    inlined,
    ints,
    load,
    square_root,
    store,
)

WEIGHTS = 256  # of a super-block


class Scratch(NamedTuple):
    """Arrays of vectors for one group of super-blocks."""

    x: Any  # the weights
    importance: Any  # of each weight
    levels: Any  # of each weight
    w: Any  # what a block's weights count in its search
    aux: Any  # for the searches
    scales: Any  # by block
    minimums: Any
    sums: Any  # of w, by block
    ls: Any  # scales and minimums as small integers
    lm: Any
    block: Any  # the packed bytes, as words of 32 bits
    weighted: Any  # is there an importance matrix?


@inlined
def _scratch(weighted: bool) -> Scratch:
    whole, some = np.empty((2, WEIGHTS * LANES), np.float32), np.empty((5, 32 * LANES), np.float32)
    integers, few = np.empty((2, WEIGHTS * LANES), np.int32), np.empty((2, 16 * LANES), np.int32)
    return Scratch(
        whole[0], whole[1], integers[0], some[0], some[1], some[2], some[3], some[4], few[0], few[1], integers[1],
        weighted,
    )  # fmt: skip


@inlined
def _gather(source: Any, first: int, blocks: int, target: Any) -> None:
    """Super-blocks `first` to `first` + LANES, one a lane; beyond the last one zeros. A short source starts anew."""
    for start in range(0, WEIGHTS, 16):  # tiles that stay in the cache
        place = first * WEIGHTS % source.size + start
        for lane in range(LANES):
            for i in range(16):
                value = source[place + i] if first + lane < blocks else np.float32(0)
                target[(start + i) * LANES + lane] = value
            place += WEIGHTS
            if place >= source.size:
                place -= source.size


@inlined
def _begin(s: Scratch, x: Any, importance: Any, first: int) -> None:
    """Fetch the group of super-blocks that starts with number `first`."""
    _gather(x, first, x.size // WEIGHTS, s.x)
    if s.weighted:
        _gather(importance, first, x.size // WEIGHTS, s.importance)
    for word in range(WEIGHTS // 4):
        store(s.block, word, ints(0))


@inlined
def _end(s: Scratch, first: int, size: int, packed: Any) -> None:
    """Write the group, super-blocks of `size` 16-bit words."""
    for lane in range(min(LANES, packed.size // size - first)):
        for half in range(size):
            packed[(first + lane) * size + half] = s.block[half // 2 * LANES + lane] >> (half % 2 * 16)


@inlined
def _squares(s: Scratch, first: int, n: int) -> Floats:
    total = floats(0)
    for i in range(first, first + n):
        total = total + load(s.x, i) * load(s.x, i)
    return total


@inlined
def _weigh(s: Scratch, j: int, n: int, sigma2: Floats) -> None:
    """What the weights of block j count by the importance matrix, and the sum of it."""
    total = floats(0)
    for i in range(n):
        x = load(s.x, n * j + i)
        w = load(s.importance, n * j + i) * square_root(sigma2 + x * x)
        store(s.w, i, w)
        total = total + w
    store(s.sums, j, total)


@inlined
def _round_weights(s: Scratch, first: int, n: int, d: Floats, minimum: Floats, low: int, high: int) -> None:
    """The levels of a block on its final grid. Where the grid has no width those of the search stay."""
    keep = d == floats(0)
    for i in range(first, first + n):
        level = clamped(nearest_int((load(s.x, i) + minimum) / d), low, high) - ints(low)
        store(s.levels, i, choose_ints(keep, load(s.levels, i), level))


@inlined
def _put(s: Scratch, byte: int, value: Ints) -> None:
    """Add a byte, or from an even place two, to the block."""
    store(s.block, byte // 4, load(s.block, byte // 4) | (value << ints(8 * (byte % 4))))


@inlined
def _pack(s: Scratch, start: int, skip: int, width: int, run: int) -> None:
    """Put `width` bits of each level, from bit `skip` on, from byte `start` on: `run` levels lie in as many bytes, the
    next `run` beside them in the next higher bits, until these bytes are full."""
    fields = 8 // width
    for byte in range(0, WEIGHTS // fields, 4):
        word = ints(0)
        for b in range(4):
            for field in range(fields):
                i = byte // run * run * fields + field * run + byte % run + b
                bits = (load(s.levels, i) >> ints(skip)) & ints((1 << width) - 1)
                word = word | (bits << ints(8 * b + width * field))
        store(s.block, (start + byte) // 4, word)


@inlined
def _search(s: Scratch, n: int, nmax: int, rmin: float, nstep: int) -> None:
    """Scale and minimum of every block of n weights."""
    sigma2 = floats(1 if n == 16 else 2) * _squares(s, 0, WEIGHTS) / floats(WEIGHTS)
    use_mad, rdelta = n == 16 and not s.weighted, 0.1
    if s.weighted:
        rmin, rdelta, nstep = -0.9, 0.05, 36
    for j in range(WEIGHTS // n):
        if s.weighted:
            _weigh(s, j, n, sigma2)
        else:
            average = floats(0) if n == 16 else square_root(_squares(s, n * j, n) / floats(n))
            for i in range(n):
                store(s.w, i, average + absolute(load(s.x, n * j + i)))
        found = make_qkx(s.x, s.w, s.levels, s.aux, n * j, n, nmax, rmin, rdelta, nstep, use_mad, s.weighted)
        store(s.scales, j, found[0])
        store(s.minimums, j, found[1])


@inlined
def _round_scales(s: Scratch, numbers: Any, levels: Any, n: int, nmax: int) -> Ints:
    """Scales or minimums as integers up to nmax, and what one step stands for, in float16."""
    if s.weighted:
        return half_bits(make_qp(numbers, s.sums, levels, s.w, s.aux, n, nmax))
    top = floats(0)
    for j in range(n):
        top = choose(load(numbers, j) > top, load(numbers, j), top)
    inverse = choose(top > floats(0), floats(nmax) / top, floats(0))
    for j in range(n):
        store(levels, j, nearest_int(inverse * load(numbers, j)) & ints(255))
    return half_bits(top / floats(nmax))


@inlined
def _with_six_bits(s: Scratch, nmax: int, rmin: float, nstep: int) -> None:
    """The levels, and at the head of the block d, dmin and scales[12]: those of eight blocks, and their minimums."""
    _search(s, 32, nmax, rmin, nstep)
    d, dmin = _round_scales(s, s.scales, s.ls, 8, 63), _round_scales(s, s.minimums, s.lm, 8, 63)
    _put(s, 0, d)
    _put(s, 2, dmin)
    four, six, low = ints(4), ints(6), ints(15)
    most = 63 if nmax == 31 or not s.weighted else 255
    for j in range(4):
        ls, ls4 = at_most(load(s.ls, j), most), at_most(load(s.ls, j + 4), most)
        lm, lm4 = at_most(load(s.lm, j), most), at_most(load(s.lm, j + 4), most)
        q0, q4 = (ls | ls4 >> four << six) & ints(255), (lm | lm4 >> four << six) & ints(255)
        q8 = (ls4 & low) | (lm4 & low) << four
        _put(s, 4 + j, q0)
        _put(s, 8 + j, q4)
        _put(s, 12 + j, q8)
        store(s.ls, j, q0 & ints(63))  # get_scale_min_k4
        store(s.lm, j, q4 & ints(63))
        store(s.ls, j + 4, (q8 & low) | q0 >> six << four)
        store(s.lm, j + 4, q8 >> four | q4 >> six << four)
    for j in range(8):
        scale, minimum = as_floats(load(s.ls, j)), as_floats(load(s.lm, j))
        _round_weights(s, 32 * j, 32, from_half_bits(d) * scale, from_half_bits(dmin) * minimum, 0, nmax)


# The kernels: of `x`, which divides into super-blocks, and `importance`, one number for each column or none, to
# `packed`, 16-bit words.


def q2_k(x: Any, importance: Any, packed: Any) -> None:
    """scales[16], of four bits each for scale and minimum, qs[64], d, dmin"""
    s = _scratch(importance.size > 0)
    for first in range(0, x.size // WEIGHTS, LANES):
        _begin(s, x, importance, first)
        _search(s, 16, 3, -0.5, 15)
        d, dmin = _round_scales(s, s.scales, s.ls, 16, 15), _round_scales(s, s.minimums, s.lm, 16, 15)
        _put(s, 80, d)
        _put(s, 82, dmin)
        for j in range(16):
            both = (load(s.ls, j) | load(s.lm, j) << ints(4)) & ints(255)
            _put(s, j, both)
            scale, minimum = as_floats(both & ints(15)), as_floats(both >> ints(4))
            _round_weights(s, 16 * j, 16, from_half_bits(d) * scale, from_half_bits(dmin) * minimum, 0, 3)
        _pack(s, 16, 0, 2, 32)
        _end(s, first, 42, packed)


def q3_k(x: Any, importance: Any, packed: Any) -> None:
    """hmask[32], qs[64], scales[12], of six bits each, d"""
    s = _scratch(importance.size > 0)
    for first in range(0, x.size // WEIGHTS, LANES):
        _begin(s, x, importance, first)
        if s.weighted:
            sigma2 = floats(2) * _squares(s, 0, WEIGHTS) / floats(WEIGHTS)
            for j in range(16):
                _weigh(s, j, 16, sigma2)
                store(s.scales, j, make_qx(s.x, s.w, s.levels, s.aux, 16 * j, 16, 4))
            d = half_bits(make_qx(s.scales, s.sums, s.ls, s.aux, 0, 16, 32))
        else:
            make_q3(s.x, s.importance, s.levels, s.scales, s.sums, 16, 16, 4)
            top = largest(s.scales, 0, 16)[1]
            iscale, zeros = floats(-32) / top, top == floats(0)
            for j in range(16):
                level = nearest_int(iscale * load(s.scales, j)) << ints(24) >> ints(24)  # int8_t
                store(s.ls, j, choose_ints(zeros, ints(0), clamped(level, -32, 31) + ints(32)))
            d = half_bits(choose(zeros, floats(0), floats(1) / iscale))
        _put(s, 108, d)
        for j in range(16):
            level = load(s.ls, j)
            _put(s, 96 + j % 8, (level & ints(15)) << ints(j // 8 * 4))
            _put(s, 104 + j % 4, level >> ints(4) << ints(j // 4 * 2))
            _round_weights(s, 16 * j, 16, from_half_bits(d) * as_floats(level - ints(32)), floats(0), -4, 3)
        _pack(s, 0, 2, 1, 32)
        _pack(s, 32, 0, 2, 32)
        _end(s, first, 55, packed)


def q4_k(x: Any, importance: Any, packed: Any) -> None:
    """d, dmin, scales[12], qs[128]"""
    s = _scratch(importance.size > 0)
    for first in range(0, x.size // WEIGHTS, LANES):
        _begin(s, x, importance, first)
        _with_six_bits(s, 15, -1.0, 20)
        _pack(s, 16, 0, 4, 32)
        _end(s, first, 72, packed)


def q5_k(x: Any, importance: Any, packed: Any) -> None:
    """d, dmin, scales[12], qh[32], qs[128]"""
    s = _scratch(importance.size > 0)
    for first in range(0, x.size // WEIGHTS, LANES):
        _begin(s, x, importance, first)
        _with_six_bits(s, 31, -0.5, 15)
        _pack(s, 16, 4, 1, 32)
        _pack(s, 48, 0, 4, 32)
        _end(s, first, 88, packed)


def q6_k(x: Any, importance: Any, packed: Any) -> None:
    """ql[128], qh[64], scales[16], of eight bits each, d"""
    s = _scratch(importance.size > 0)
    for first in range(0, x.size // WEIGHTS, LANES):
        _begin(s, x, importance, first)
        for j in range(16):
            for i in range(16):
                xi = load(s.x, 16 * j + i)
                store(s.w, i, load(s.importance, 16 * j + i) if s.weighted else xi * xi)
            store(s.scales, j, make_qx(s.x, s.w, s.levels, s.aux, 16 * j, 16, 32))
        amax, top = largest(s.scales, 0, 16)
        iscale = floats(-128) / top
        d = half_bits(floats(1) / iscale)
        _put(s, 208, d)
        for j in range(16):
            scale = at_most(nearest_int(iscale * load(s.scales, j)), 127) << ints(24) >> ints(24)  # int8_t
            _put(s, 192 + j, scale & ints(255))
            _round_weights(s, 16 * j, 16, from_half_bits(d) * as_floats(scale), floats(0), -32, 31)
        _pack(s, 0, 0, 4, 64)
        _pack(s, 128, 4, 2, 32)
        zeros = amax < floats(EPSILON)
        if any_of(zeros):
            for word in range(53):
                store(s.block, word, choose_ints(zeros, ints(0), load(s.block, word)))
        _end(s, first, 105, packed)


KERNELS: dict[str, Callable[[Any, Any, Any], None]] = {
    "Q2_K": q2_k, "Q3_K": q3_k, "Q4_K": q4_k, "Q5_K": q5_k, "Q6_K": q6_k,
}  # fmt: skip
