"""ggml's searches for the scale of a block, for `LANES` blocks at once: each lane does what the reference in C does, in
its order, in float32. Functions, and what a reader would look for in them, have the reference's names.

They are for regular blocks: nothing infinite, no sum or scale zero, nothing rounded that `nearest_int` cannot round.
Where `require` finds it otherwise, ggml's own function packs the super-block.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from . import vectors
from .vectors import Floats, Row, Truths, absolute, any_of, choose, floats, inlined, larger, nearest, smaller, unrolled

f32 = np.float32
EPSILON, HUGE, INFINITE = f32(1e-15), f32(3e38), np.inf  # GROUP_MAX_EPS: what is smaller counts as zero
HALF = f32(0.49999997)  # the largest below it
SMALL, _NEAR = f32(2**22 - 1), f32(0.4999)  # what nearest_int can round; what is as near to an integer goes there
VALUES = np.array([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], f32)  # kvalues_iq4nl
INDEXES, _MIDDLES = np.arange(16, dtype=f32), (VALUES[1:] + VALUES[:-1]) / f32(2)


class Scratch(NamedTuple):
    """Vectors for one group of super-blocks, each of which has a lane."""

    x: Row  # the weights
    importance: Row  # of each weight
    levels: Row  # of each weight
    w: Row  # what a block's weights count in its search
    aux: Row  # for the searches
    scales: Row  # by block
    minimums: Row
    sums: Row  # of w, by block
    ls: Row  # scales and minimums as small integers
    lm: Row
    lx: Row  # for `improve`, by weight
    l2: Row
    above: Row
    below: Row
    irregular: Row  # one vector: not 0 where ggml has to do the work
    block: Row  # the packed bytes, two to a number
    weighted: bool  # is there an importance matrix?


@inlined
def require(s: Scratch, truths: Truths) -> None:
    """Where it is not so, the super-block is left to ggml."""
    s.irregular[0] = s.irregular[0] + choose(truths, 0, 1)


@inlined
def level(x: Floats, low: float, high: float) -> Floats:
    """MAX(low, MIN(high, nearest_int(x))). A low of 0.25 stands for 0, and takes one instruction less."""
    return nearest(larger(smaller(x, high), low))


@inlined
def largest(x: Row, n: int) -> Floats:
    """The number with the largest magnitude."""
    value = x[0]
    for i in range(1, n):
        value = choose(absolute(x[i]) > absolute(value), x[i], value)
    return value


@inlined
def squares(x: Row, n: int) -> Floats:
    total = floats(0)
    for i in range(n):
        total = total + x[i] * x[i]
    return total


@inlined
def weigh(s: Scratch, j: int, n: int, sigma2: Floats) -> None:
    """What the weights of block j count, by the importance matrix if there is one, and the sum of it."""
    total = floats(0)
    for i in range(n):
        x = s.x[n * j + i]
        s.w[i] = s.importance[n * j + i] * vectors.square_root(sigma2 + x * x) if s.weighted else x * x
        total = total + s.w[i]
    s.sums[j] = total


@inlined
def make_qkx(
    s: Scratch, x: Row, n: int, nmax: int, rmin: float, rdelta: float, nstep: int, use_mad: bool
) -> tuple[Floats, Floats]:
    """make_qkx2_quants, make_qkx3_quants: scale and negated minimum, by least squares over the levels on each of
    nstep + 1 grids. A grid starts at the best minimum so far, so each depends on those before it."""
    low = high = x[0]
    sum_w, sum_x = s.w[0], s.w[0] * x[0]
    for i in range(1, n):
        low, high = smaller(x[i], low), larger(x[i], high)
        sum_w, sum_x = sum_w + s.w[i], sum_x + s.w[i] * x[i]
    minimum, best = smaller(low, 0), floats(0)
    iscale = nmax / (high - minimum)
    scale = 1 / iscale
    require(s, (high > minimum) & (absolute(iscale * (high - minimum)) < SMALL))
    for i in range(n):
        difference = scale * nearest(iscale * (x[i] - minimum)) + minimum - x[i]
        best = best + s.w[i] * (absolute(difference) if use_mad else difference * difference)
    for step in range(nstep + 1):
        iscale = (f32(rmin) + f32(rdelta) * f32(step) + f32(nmax)) / (high - minimum)
        require(s, (absolute(iscale * (low - minimum)) < SMALL) & (absolute(iscale * (high - minimum)) < SMALL))
        sum_l = sum_l2 = sum_xl = error = floats(0)
        for i in range(n):
            li = s.aux[i] = level(iscale * (x[i] - minimum), 0.25, nmax)
            wl = s.w[i] * li
            sum_l, sum_l2, sum_xl = sum_l + wl, sum_l2 + wl * li, sum_xl + wl * x[i]
        determinant = sum_w * sum_l2 - sum_l * sum_l
        this_scale = (sum_w * sum_xl - sum_x * sum_l) / determinant
        this_minimum = (sum_l2 * sum_x - sum_l * sum_xl) / determinant
        this_scale = choose(this_minimum > 0, sum_xl / sum_l2, this_scale)
        this_minimum = choose(this_minimum > 0, 0, this_minimum)
        for i in range(n):
            difference = this_scale * s.aux[i] + this_minimum - x[i]
            error = error + s.w[i] * (absolute(difference) if use_mad else difference * difference)
        better = (determinant > 0) & (error < best)
        best, scale = choose(better, error, best), choose(better, this_scale, scale)
        minimum = choose(better, this_minimum, minimum)
    return scale, -minimum


@inlined
def _step(grid: int, most: int) -> int:
    """Of the grid with this number: 0, -most .. -1, 1 .. most."""
    return (grid - 1 - most + grid // (most + 1)) * min(grid, 1)


@inlined
def make_qx(s: Scratch, x: Row, w: Row, n: int, nmax: int) -> tuple[Floats, Floats]:
    """make_qx_quants: the scale of a grid around zero, the best of 19 by weighted least squares, and its iscale."""
    value = largest(x, n)
    require(s, (absolute(value) >= EPSILON) & (absolute(value) < HUGE))
    for i in range(n):
        s.aux[i] = w[i] * x[i]
    found, scale, best = floats(0), floats(0), floats(-INFINITE)
    for grid in range(19):  # the first is the plain one
        iscale = -(f32(nmax) + f32(0.1) * f32(_step(grid, 9))) / value
        sumlx = suml2 = floats(0)
        for i in range(n):
            li = level(iscale * x[i], -nmax, nmax - 1)
            sumlx, suml2 = sumlx + s.aux[i] * li, suml2 + w[i] * li * li
        better = (suml2 > 0) & (sumlx * sumlx > best * suml2)
        if grid == 0:
            require(s, better)
        found, scale = choose(better, iscale, found), choose(better, sumlx / suml2, scale)
        best = choose(better, scale * sumlx, best)
    require(s, absolute(scale) < HUGE)
    return scale, found


@inlined
def make_q3(s: Scratch, x: Row, levels: Row, n: int, nmax: int) -> Floats:
    """make_q3_quants, with do_rmse"""
    value = largest(x, n)
    require(s, (absolute(value) >= EPSILON) & (absolute(value) < HUGE))
    iscale = -nmax / value
    for i in range(n):
        levels[i] = level(iscale * x[i], -nmax, nmax - 1)
    return improve(s, x, s.w, levels, n, -nmax, nmax - 1, -INFINITE)


@inlined
def make_qp(s: Scratch, x: Row, w: Row, levels: Row, n: int, nmax: int) -> Floats:
    """make_qp_quants: scale and levels of positive numbers, from the best of nine grids on."""
    high, found, best = floats(0), floats(0), floats(INFINITE)
    for i in range(n):
        high = larger(high, x[i])
        require(s, (x[i] >= 0) & (x[i] < HUGE) & (w[i] >= 0))
    require(s, high >= EPSILON)
    for grid in range(9):  # the first is the plain one
        iscale = (f32(0.1) * f32(_step(grid, 4)) + f32(nmax)) / high
        scale, error = 1 / iscale, floats(0)
        for i in range(n):
            difference = x[i] - scale * smaller(nearest(iscale * x[i]), nmax)
            error = error + w[i] * difference * difference
        found, best = choose(error < best, iscale, found), choose(error < best, error, best)
    require(s, found > 0)
    for i in range(n):
        levels[i] = smaller(nearest(found * x[i]), nmax)
    return improve(s, x, w, levels, n, 0, nmax, 0)


@inlined
def _settle(s: Scratch, i: int, x: Floats, w: Floats, li: Floats, low: int, high: int) -> None:
    """Note what a weight adds to the sums, and between which ends it may be wanted without a move, for certain."""
    s.lx[i], s.l2[i] = w * x * li, w * li * li
    s.above[i], s.below[i] = choose(li > low, li - _NEAR, -SMALL), choose(li < high, li + _NEAR, SMALL)


@inlined
def improve(s: Scratch, x: Row, w: Row, levels: Row, n: int, low: int, high: int, least: float) -> Floats:
    """The end of make_q3_quants and make_qp_quants: in up to five rounds each level in turn moves to where the other
    levels' scale wants it, if that improves the fit. Most stay, and that is seen without a division."""
    sumlx = suml2 = floats(0)
    for i in range(n):
        _settle(s, i, x[i], w[i], levels[i], low, high)
        sumlx, suml2 = sumlx + s.lx[i], suml2 + s.l2[i]
    require(s, absolute(sumlx) > f32(1e-26))  # what is left of it when one weight is taken away is no denormal
    rounds, moved = 0, True
    while moved & (rounds < 5):  # without a move the next round would be the same
        rounds, moved = rounds + 1, False
        for i in range(n):
            slx, sl2 = sumlx - s.lx[i], suml2 - s.l2[i]
            if any_of((slx > 0) & ~((s.above[i] * slx < x[i] * sl2) & (x[i] * sl2 < s.below[i] * slx))):
                li, wanted = levels[i], x[i] * sl2 / slx
                new, better = level(wanted, low, high), (slx > 0) & (sl2 > least)
                require(s, (absolute(wanted) < SMALL) | ~better)
                slx, sl2 = slx + w[i] * x[i] * new, sl2 + w[i] * new * new
                better = better & (new != li) & (sl2 > 0) & (slx * slx * suml2 > sumlx * sumlx * sl2)
                levels[i] = choose(better, new, li)
                sumlx, suml2 = choose(better, slx, sumlx), choose(better, sl2, suml2)
                _settle(s, i, x[i], w[i], levels[i], low, high)
                moved |= any_of(better)
    require(s, (suml2 > 0) & (absolute(sumlx / suml2) < HUGE))
    return sumlx / suml2


@inlined
def nearest_of(x: Floats, results: Any) -> Floats:
    """best_index_int8 among kvalues_iq4nl: the one of `results` at its index."""
    result = floats(results[0])
    for k in unrolled(15):
        result = choose(x >= _MIDDLES[k], results[k + 1], result)
    return result


@inlined
def make_iq4(s: Scratch, x: Row, n: int, ntry: int) -> Floats:
    """The search of quantize_row_iq4_nl_impl: as make_qx, on a grid that is not even."""
    value, scale, best = largest(x, n), floats(0), floats(-INFINITE)
    require(s, (absolute(value) >= EPSILON) & (absolute(value) < HUGE))
    for step in range(-ntry - 1, ntry + 1):  # -ntry - 1 stands for the first, plain grid
        iscale = 1 / (-value / VALUES[0]) if step < -ntry else (f32(step) + VALUES[0]) / value
        sumqx = sumq2 = floats(0)
        for i in range(n):
            q = nearest_of(iscale * x[i], VALUES)
            sumqx, sumq2 = sumqx + s.w[i] * q * x[i], sumq2 + s.w[i] * q * q
        better = (sumq2 > 0) & (sumqx * sumqx > best * sumq2)
        if step < -ntry:
            require(s, better)
        scale = choose(better, sumqx / sumq2, scale)
        best = choose(better, scale * sumqx, best)
    require(s, absolute(scale) < HUGE)
    return scale
