"""ggml's searches for a block's scale, for `LANES` blocks at once: each lane does what the reference in C does, in its
order, in float32. Functions, and what a reader would look for in them, have the reference's names.

Vectors `first` to `first + n` of `x` are the n weights of the lanes' blocks, vectors 0 to n of `w` their importances.
The levels found go to `levels`, from `first` on.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from .kernel_vectors import (
    Floats,
    Ints,
    absolute,
    all_of,
    any_of,
    as_floats,
    bits_of,
    choose,
    choose_ints,
    floats,
    inlined,
    ints,
    load,
    store,
)

EPSILON = 1e-15  # GROUP_MAX_EPS: what is smaller counts as zero
_ROUNDER = 12582912.0  # 1.5 * 2^23: a sum with it has no fraction
_SMALL = 4194303.0  # what can be rounded by that


@inlined
def nearest_int(x: Floats) -> Ints:
    """The nearest integer, out of the low bits of a sum. For numbers that are not small it is wrong as in C."""
    return (bits_of(x + floats(_ROUNDER)) & ints(0x007FFFFF)) - ints(0x00400000)


@inlined
def at_most(x: Ints, high: int) -> Ints:
    """MIN(high, x)"""
    return choose_ints(x < ints(high), x, ints(high))


@inlined
def clamped(x: Ints, low: int, high: int) -> Ints:
    """MAX(low, MIN(high, x))"""
    x = at_most(x, high)
    return choose_ints(x > ints(low), x, ints(low))


@inlined
def _level(x: Floats, low: int, high: int, small: bool) -> Floats:
    """nearest_int and clamped. Where all lanes are `small`, the same for less."""
    if not small:
        return as_floats(clamped(nearest_int(x), low, high))
    x = choose(x < floats(high), x, floats(high)) + floats(_ROUNDER) - floats(_ROUNDER)
    return choose(x > floats(low), x, floats(low))


@inlined
def _all_small(x: Floats) -> bool:
    return all_of(absolute(x) < floats(_SMALL))  # type: ignore[no-any-return]


@inlined
def _error(difference: Floats, use_mad: bool) -> Floats:
    return absolute(difference) if use_mad else difference * difference


@inlined
def make_qkx(
    x: Any, w: Any, levels: Any, aux: Any, first: int, n: int, nmax: int, rmin: float, rdelta: float, nstep: int,
    use_mad: bool, third: bool,
) -> tuple[Floats, Floats]:  # fmt: skip
    """make_qkx2_quants, or with `third` make_qkx3_quants: scale and negated minimum, by least squares over the levels
    on each of nstep + 1 grids. A grid starts at the best minimum so far, so each depends on those before it."""
    zero = floats(0)
    low = high = load(x, first)
    sum_w = load(w, 0)
    sum_x = sum_w * low
    for i in range(1, n):
        xi, wi = load(x, first + i), load(w, i)
        low, high = choose(xi < low, xi, low), choose(xi > high, xi, high)
        sum_w, sum_x = sum_w + wi, sum_x + wi * xi
    minimum = choose(low > zero, zero, low)
    uneven = high > minimum
    iscale = floats(nmax) / (high - minimum)
    scale = floats(1) / iscale
    best = zero
    for i in range(n):
        xi = load(x, first + i)
        level = clamped(nearest_int(iscale * (xi - minimum)), 0, nmax)
        store(levels, first + i, choose_ints(uneven, level, ints(0)))
        best = best + load(w, i) * _error(scale * as_floats(level) + minimum - xi, use_mad)
    found, found_iscale, found_minimum = high < low, iscale, minimum
    for step in range(nstep + 1):
        iscale = (floats(rmin) + floats(rdelta) * floats(step) + floats(nmax)) / (high - minimum)
        # make_qkx3_quants clamps before it rounds, which is right for any number
        small = third or (_all_small(iscale * (low - minimum)) and _all_small(iscale * (high - minimum)))
        sum_l = sum_l2 = sum_xl = zero
        for i in range(n):
            xi = load(x, first + i)
            li = _level(iscale * (xi - minimum), 0, nmax, small)
            store(aux, i, li)
            wl = load(w, i) * li
            sum_l, sum_l2, sum_xl = sum_l + wl, sum_l2 + wl * li, sum_xl + wl * xi
        determinant = sum_w * sum_l2 - sum_l * sum_l
        this_scale = (sum_w * sum_xl - sum_x * sum_l) / determinant
        this_minimum = (sum_l2 * sum_x - sum_l * sum_xl) / determinant
        positive = this_minimum > zero
        this_scale = choose(positive, sum_xl / sum_l2, this_scale)
        this_minimum = choose(positive, zero, this_minimum)
        error = zero
        for i in range(n):
            error = error + load(w, i) * _error(this_scale * load(aux, i) + this_minimum - load(x, first + i), use_mad)
        better = uneven & (determinant > zero) & (error < best)
        found, found_iscale = found | better, choose(better, iscale, found_iscale)
        found_minimum = choose(better, minimum, found_minimum)
        best, scale = choose(better, error, best), choose(better, this_scale, scale)
        minimum = choose(better, this_minimum, minimum)
    for i in range(n):
        level = nearest_int(_level(found_iscale * (load(x, first + i) - found_minimum), 0, nmax, third))
        store(levels, first + i, choose_ints(found, level, load(levels, first + i)))
    return choose(uneven, scale, zero), -minimum


@inlined
def largest(x: Any, first: int, n: int) -> tuple[Floats, Floats]:
    """The largest magnitude, and the number that has it."""
    amax = value = floats(0)
    for i in range(n):
        xi = load(x, first + i)
        larger = absolute(xi) > amax
        amax, value = choose(larger, absolute(xi), amax), choose(larger, xi, value)
    return amax, value


@inlined
def make_qx(x: Any, w: Any, levels: Any, aux: Any, first: int, n: int, nmax: int) -> Floats:
    """make_qx_quants: the scale of a grid around zero, the best of 19 by weighted least squares."""
    zero, half = floats(0), ints(nmax)
    amax, value = largest(x, first, n)
    sum_x = zero
    for i in range(n):
        store(aux, i, load(w, i) * load(x, first + i))
        sum_x = sum_x + absolute(load(x, first + i))
    small = all_of(sum_x < floats(3e38))  # so nothing is infinite, and no level beyond nmax + 1
    found_iscale = scale = best = zero
    for step in range(-10, 10):  # -10 stands for the first, plain grid
        if step == 0:
            continue
        numerator = floats(-nmax) if step == -10 else -(floats(nmax) + floats(0.1) * floats(step))
        iscale = numerator / value
        sumlx = suml2 = zero
        for i in range(n):
            li = _level(iscale * load(x, first + i), -nmax, nmax - 1, small)
            sumlx, suml2 = sumlx + load(aux, i) * li, suml2 + load(w, i) * li * li
        if step == -10:
            found_iscale = iscale
            scale = choose(suml2 == zero, zero, sumlx / suml2)
            best = scale * sumlx
        else:
            better = (suml2 > zero) & (sumlx * sumlx > best * suml2)
            found_iscale = choose(better, iscale, found_iscale)
            scale = choose(better, sumlx / suml2, scale)
            best = choose(better, scale * sumlx, best)
    zeros = amax < floats(EPSILON)
    for i in range(n):
        level = clamped(nearest_int(found_iscale * load(x, first + i)), -nmax, nmax - 1) + half
        store(levels, first + i, choose_ints(zeros, ints(0), level))
    return choose(zeros, zero, scale)


@inlined
def make_q3(x: Any, w: Any, levels: Any, scales: Any, sums: Any, blocks: int, n: int, nmax: int) -> None:
    """make_q3_quants of several blocks, from plain grids on; the scales go to `scales`."""
    for j in range(blocks):
        iscale = floats(-nmax) / largest(x, n * j, n)[1]
        sumlx = suml2 = floats(0)
        for i in range(n * j, n * j + n):
            xi = load(x, i)
            wi, level = xi * xi, clamped(nearest_int(iscale * xi), -nmax, nmax - 1)
            store(w, i, wi)
            store(levels, i, level)
            sumlx, suml2 = sumlx + wi * xi * as_floats(level), suml2 + wi * as_floats(level) * as_floats(level)
        store(scales, j, sumlx)
        store(sums, j, suml2)
    _improve(x, w, levels, scales, sums, blocks, n, nmax, False)
    for j in range(blocks):
        zeros = largest(x, n * j, n)[0] < floats(EPSILON)
        for i in range(n * j, n * j + n):
            store(levels, i, choose_ints(zeros, ints(0), load(levels, i) + ints(nmax)))
        store(scales, j, choose(zeros, floats(0), load(scales, j)))


@inlined
def make_qp(x: Any, w: Any, levels: Any, scale_at: Any, sum_at: Any, n: int, nmax: int) -> Floats:
    """make_qp_quants: scale and levels, of 8 bits, of positive numbers, from the best of nine grids on."""
    zero = floats(0)
    high = zero
    for i in range(n):
        high = choose(high > load(x, i), high, load(x, i))
    zeros = high < floats(EPSILON)
    found_iscale, best = floats(nmax) / high, zero
    for step in range(-5, 5):  # -5 stands for the first, plain grid
        if step == 0:
            continue
        iscale = found_iscale if step == -5 else (floats(0.1) * floats(step) + floats(nmax)) / high
        scale, error = floats(1) / iscale, zero
        for i in range(n):
            level = nearest_int(iscale * load(x, i))
            level = level & ints(255) if step == -5 else at_most(level, nmax)
            difference = load(x, i) - scale * as_floats(level)
            error = error + load(w, i) * difference * difference
        better = error < best
        found_iscale = choose(better, iscale, found_iscale)
        best = error if step == -5 else choose(better, error, best)
    sumlx = suml2 = zero
    for i in range(n):
        level = at_most(nearest_int(found_iscale * load(x, i)), nmax)
        store(levels, i, level & ints(255))
        sumlx = sumlx + load(w, i) * load(x, i) * as_floats(level)
        suml2 = suml2 + load(w, i) * as_floats(level) * as_floats(level)
    store(scale_at, 0, sumlx)
    store(sum_at, 0, suml2)
    _improve(x, w, levels, scale_at, sum_at, 1, n, nmax, True)
    for i in range(n):
        store(levels, i, choose_ints(zeros, ints(0), load(levels, i)))
    return choose(zeros, zero, load(scale_at, 0))


@inlined
def _improve(
    x: Any, w: Any, levels: Any, sumlx_at: Any, suml2_at: Any, blocks: int, n: int, nmax: int, positive: bool
) -> None:
    """The rounds, up to five, at the end of make_q3_quants and make_qp_quants (`positive`): each level in turn moves to
    where the other levels' scale wants it, if that improves the fit. The scales take the place of the sums of x.
    Blocks take turns within a round: the moves of one wait for each other, those of different blocks do not."""
    low, high = (-(1 << 22), nmax) if positive else (-nmax, nmax - 1)
    kept, least = (255, 0.0) if positive else (-1, -np.inf)
    moving = (1 << blocks) - 1
    for _ in range(5):
        moved = 0
        for i in range(n):
            for j in range(blocks):
                if not moving >> j & 1:
                    continue
                k, sumlx, suml2 = n * j + i, load(sumlx_at, j), load(suml2_at, j)
                xi, wi, level = load(x, k), load(w, k), load(levels, k)
                li = as_floats(level)
                slx, sl2 = sumlx - wi * xi * li, suml2 - wi * li * li
                new = clamped(nearest_int(xi * sl2 / slx), low, high)
                candidate = (slx > floats(0)) & (sl2 > floats(least)) & ((new < level) | (new > level))
                if not any_of(candidate):
                    continue
                li = as_floats(new)
                slx, sl2 = slx + wi * xi * li, sl2 + wi * li * li
                better = candidate & (sl2 > floats(0)) & (slx * slx * suml2 > sumlx * sumlx * sl2)
                store(levels, k, choose_ints(better, new & ints(kept), level))
                store(sumlx_at, j, choose(better, slx, sumlx))
                store(suml2_at, j, choose(better, sl2, suml2))
                moved |= any_of(better) << j
        moving = moved  # a round without a change repeats itself
    for j in range(blocks):
        sumlx, suml2 = load(sumlx_at, j), load(suml2_at, j)
        store(sumlx_at, j, choose(suml2 > floats(0), sumlx / suml2, floats(0)))
