"""The scales of K-quants: searched, 64 sub-blocks at a time.

A sub-block's weights lie down a column of [width, LANES], so that every inner loop runs over neighbouring
sub-blocks in SIMD lanes: no branches, no sums across lanes. What is known of each sub-block lies in a row of
`work` [rows, LANES]; that all of it is one array lets LLVM see that its rows do not overlap.

The search, for w = s q - m (m >= 0) and, with m = 0 and signed codes q, for w = s q:

1. Codes of each sub-block by some scales and offsets (tables of k_quants.py); for each the least-squares s
   and m of those codes; the pair with the least error, and the codes by that pair once more.
2. The super-block's d (and dmin), from a few, such that s and m as multiples of them cost the least while the
   codes stay.
3. The nearest multiples and their neighbours, with the codes and errors that they really give, against d
   as it is stored (fp16); then the least-squares d (and dmin) of all that; again. The best round is kept.

Errors follow from sums over a sub-block, E = sum o (y - s q - b)^2 = Syy - 2 s Syq - 2 b Sy + s^2 Sqq
+ 2 s b Sq + b^2 So, where o are the weights of errors, and y the weights with the middle of their range
taken off: float32 is enough then. Kernels do without reassociation, which would undo the rounding to fp16;
those that sum over a super-block have it.

It is all in one file: numba compiles a file's kernels anew when that file changes, and not when another does.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from qexport.grids.ggml.compiled import compiled

LANES = 64
Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]
Words = NDArray[np.uint64]

# Rows of `work`. Of the sub-block: its range, and sums that codes do not change.
_LOW, _HIGH, _MIDDLE, _SO, _SY, _SYY, _RANGE = range(0 * LANES, 7 * LANES, LANES)
# What the next codes are made with, q = rint(y * INV + OFF), and their sums.
_INV, _OFF, _SQ, _SQQ, _SYQ = range(7 * LANES, 12 * LANES, LANES)
# A trial, and the best one so far.
_SCALE, _SHIFT, _LEVEL, _MINLEVEL, _ERROR = range(12 * LANES, 17 * LANES, LANES)
_KSCALE, _KSHIFT, _KLEVEL, _KMINLEVEL, _KERROR = range(17 * LANES, 22 * LANES, LANES)
# Of the super-block, the same in all of its lanes; and the best round.
_D, _DMIN, _STEP, _LIMIT, _TOTAL = range(22 * LANES, 27 * LANES, LANES)
_BESTD, _BESTDMIN, _BESTLEVEL, _BESTMINLEVEL, _BESTTOTAL = range(27 * LANES, 32 * LANES, LANES)
# The scale that is best for the codes, stored or not; the best minimum for them is SLOPE scale - BASE.
_FREE, _SLOPE, _BASE = range(32 * LANES, 35 * LANES, LANES)
_ROWS = 35

_ZERO, _ONE, _TWO = np.float32(0), np.float32(1), np.float32(2)
_INFINITE = np.float32(np.inf)
_LEAST = np.float32(2.0**-24)  # fp16's least number
_LEAST_NORMAL = np.float32(2.0**-14)
_MOST = np.float32(65504)
_SMALLEST = np.float32(1e-30)  # numbers below it have no inverse to speak of
_REACH = np.float32(65504 * 128 * 32)  # no K-quant reaches further: squares beyond it are of no use


@compiled("contract", "nsz")
def _sums(y: Floats, o: Floats, work: Floats, low: np.float32, high: np.float32) -> None:
    """Sq, Sqq, Syq of the codes q = rint(y * INV + OFF) within [low, high]."""
    for k in range(LANES):
        work[_SQ + k] = _ZERO
        work[_SQQ + k] = _ZERO
        work[_SYQ + k] = _ZERO
    for i in range(0, len(y), 4):
        for k in range(LANES):
            inverse, offset = work[_INV + k], work[_OFF + k]
            sq, sqq, syq = work[_SQ + k], work[_SQQ + k], work[_SYQ + k]
            for j in range(4):
                value = y[i + j, k]
                q = np.rint(min(max(value * inverse + offset, low), high))
                oq = o[i + j, k] * q
                sq += oq
                sqq += oq * q
                syq += oq * value
            work[_SQ + k] = sq
            work[_SQQ + k] = sqq
            work[_SYQ + k] = syq


@compiled("contract", "nsz")
def _sums_centred(y: Floats, o: Floats, work: Floats, low: np.float32, high: np.float32) -> None:
    """Sqq, Syq of the codes q = rint(y * INV) within [low, high]."""
    for k in range(LANES):
        work[_SQQ + k] = _ZERO
        work[_SYQ + k] = _ZERO
    for i in range(0, len(y), 4):
        for k in range(LANES):
            inverse = work[_INV + k]
            sqq, syq = work[_SQQ + k], work[_SYQ + k]
            for j in range(4):
                value = y[i + j, k]
                q = np.rint(min(max(value * inverse, low), high))
                oq = o[i + j, k] * q
                sqq += oq * q
                syq += oq * value
            work[_SQQ + k] = sqq
            work[_SYQ + k] = syq


@compiled()
def _to_half(work: Floats, row: int) -> None:
    """Rounds a row to what fp16 holds, to the nearest and not beyond its largest number."""
    for k in range(LANES):
        value = work[row + k]
        high = value * np.float32(8193)
        normal = high - (high - value)  # Dekker's splitting keeps 11 bits
        magic = np.float32(0.75)  # its last place is 2^-24
        small = (value + magic) - magic
        picked = small if abs(value) < _LEAST_NORMAL else normal
        work[row + k] = max(min(picked, _MOST), -_MOST)


@compiled("contract", "nsz", "reassoc")
def _sum_blocks(work: Floats, row: int, out: int, blocks: int) -> None:
    """Sums of a row over each super-block, in all of its lanes."""
    count = LANES // blocks
    for first in range(0, LANES, count):
        total = _ZERO
        for k in range(first, first + count):
            total += work[row + k]
        for k in range(first, first + count):
            work[out + k] = total


@compiled("contract", "nsz", "reassoc")
def _max_blocks(work: Floats, row: int, out: int, blocks: int) -> None:
    """The value of largest size of a row in each super-block, with its sign, in all of its lanes."""
    count = LANES // blocks
    for first in range(0, LANES, count):
        most = work[row + first]
        for k in range(first + 1, first + count):
            most = work[row + k] if abs(work[row + k]) > abs(most) else most
        for k in range(first, first + count):
            work[out + k] = most


@compiled("contract", "nsz")
def _load(
    x: Floats,
    importance: Floats,
    first: int,
    y: Floats,
    o: Floats,
    work: Floats,
    bend: np.float32,
    blocks: int,
) -> None:
    """Sub-blocks from `first` on, in columns, with the weights of their errors; zeros after the last.

    x [sub-blocks, width]; importance [width, sub-blocks of a row], or [width, 0] for none.
    `bend` lets the weights of errors rise with weights: o = importance (1 + bend x^2 / mean square of its
    super-block).
    """
    width, count = x.shape[1], min(LANES, len(x) - first)
    for k in range(0, count, 8):  # every width has super-blocks of 8 sub-blocks or 16
        for i in range(width):
            for n in range(8):
                y[i, k + n] = x[first + k + n, i]
    for k in range(count, LANES):
        for i in range(width):
            y[i, k] = _ZERO
    for k in range(LANES):
        work[_LOW + k] = _ZERO
        work[_HIGH + k] = -_REACH
        work[_SYY + k] = _ZERO
    for i in range(0, len(y), 4):
        for k in range(LANES):
            low, high, square = work[_LOW + k], work[_HIGH + k], work[_SYY + k]
            for j in range(4):
                value = min(max(y[i + j, k], -_REACH), _REACH)
                y[i + j, k] = value
                low = min(low, value)
                high = max(high, value)
                square += value * value
            work[_LOW + k] = low
            work[_HIGH + k] = high
            work[_SYY + k] = square
    _sum_blocks(work, _SYY, _TOTAL, blocks)
    each = bend * np.float32(LANES // blocks * width)
    for k in range(LANES):
        total = work[_TOTAL + k]
        work[_ERROR + k] = each / total if total >= _SMALLEST else _ZERO
    for i in range(width):
        for k in range(LANES):
            o[i, k] = _ONE + work[_ERROR + k] * y[i, k] * y[i, k]
    period = importance.shape[1]
    if period:
        for i in range(width):
            column, k = first % period, 0
            while k < LANES:
                run = min(LANES - k, period - column)
                for n in range(run):
                    o[i, k + n] *= importance[i, column + n]
                k += run
                column = 0


@compiled("contract", "nsz")
def _centre(y: Floats, o: Floats, work: Floats) -> None:
    """Takes the middle of its range off each sub-block; So, Sy, Syy."""
    for k in range(LANES):
        work[_MIDDLE + k] = np.float32(0.5) * (work[_LOW + k] + work[_HIGH + k])
        work[_RANGE + k] = work[_HIGH + k] - work[_LOW + k]
        work[_SO + k] = _ZERO
        work[_SY + k] = _ZERO
        work[_SYY + k] = _ZERO
    for i in range(0, len(y), 4):
        for k in range(LANES):
            middle, so, sy, syy = work[_MIDDLE + k], work[_SO + k], work[_SY + k], work[_SYY + k]
            for j in range(4):
                value, weight = y[i + j, k] - middle, o[i + j, k]
                y[i + j, k] = value
                so += weight
                sy += weight * value
                syy += weight * value * value
            work[_SO + k] = so
            work[_SY + k] = sy
            work[_SYY + k] = syy


@compiled("contract", "nsz")
def _keep_fit(work: Floats, zero: np.float32) -> None:
    """The least-squares scale and shift of the codes, if their error is less than the best so far.

    y = s q + b, where m = s zero - b - middle must not be negative.
    """
    for k in range(LANES):
        so, sy, syy, middle = work[_SO + k], work[_SY + k], work[_SYY + k], work[_MIDDLE + k]
        sq, sqq, syq = work[_SQ + k], work[_SQQ + k], work[_SYQ + k]
        determinant = so * sqq - sq * sq
        scale = (so * syq - sy * sq) / determinant
        shift = (sy - scale * sq) / so
        bound = (syq + zero * sy + middle * (sq + zero * so)) / (sqq + zero * (_TWO * sq + zero * so))
        beyond = shift > scale * zero - middle
        scale = bound if beyond else scale
        shift = bound * zero - middle if beyond else shift
        error = syy - _TWO * (scale * syq + shift * sy) + scale * (scale * sqq + _TWO * shift * sq)
        error += shift * shift * so
        better = (error < work[_KERROR + k]) & (determinant > _ZERO) & (scale > _ZERO)
        work[_KERROR + k] = error if better else work[_KERROR + k]
        work[_KSCALE + k] = scale if better else work[_KSCALE + k]
        work[_KSHIFT + k] = shift if better else work[_KSHIFT + k]


@compiled("contract", "nsz")
def _keep_levels(y: Floats, o: Floats, work: Floats, low: np.float32, high: np.float32) -> None:
    """The trial's levels, if the error of SCALE and SHIFT is less than the best so far.

    The error is summed from what the codes really leave, not from sums as in `_keep_fit`: where importances
    are millions apart, those cancel.
    """
    for k in range(LANES):
        scale = work[_SCALE + k]
        empty = (scale == _ZERO) | (abs(scale) < _SMALLEST)
        work[_INV + k] = _ZERO if empty else _ONE / scale
        work[_OFF + k] = -work[_SHIFT + k] * work[_INV + k]
        work[_ERROR + k] = _ZERO
    for i in range(0, len(y), 4):
        for k in range(LANES):
            scale, shift = work[_SCALE + k], work[_SHIFT + k]
            inverse, offset, error = work[_INV + k], work[_OFF + k], work[_ERROR + k]
            for j in range(4):
                value = y[i + j, k]
                q = np.rint(min(max(value * inverse + offset, low), high))
                left = (value - shift) - scale * q
                error += o[i + j, k] * left * left
            work[_ERROR + k] = error
    for k in range(LANES):
        better = work[_ERROR + k] < work[_KERROR + k]
        work[_KERROR + k] = work[_ERROR + k] if better else work[_KERROR + k]
        work[_KLEVEL + k] = work[_LEVEL + k] if better else work[_KLEVEL + k]
        work[_KMINLEVEL + k] = work[_MINLEVEL + k] if better else work[_KMINLEVEL + k]


@compiled("contract", "nsz")
def _sums_of_kept(y: Floats, o: Floats, work: Floats, low: np.float32, high: np.float32) -> None:
    """Sq, Sqq, Syq of the codes by KSCALE and KSHIFT."""
    for k in range(LANES):
        scale = work[_KSCALE + k]
        work[_INV + k] = _ONE / scale if scale >= _SMALLEST else _ZERO
        work[_OFF + k] = -work[_KSHIFT + k] * work[_INV + k]
    _sums(y, o, work, low, high)


@compiled("contract", "nsz")
def _try_steps(
    work: Floats,
    values: int,
    cost: int,
    chosen: int,
    tries: Floats,
    low: np.float32,
    high: np.float32,
    blocks: int,
) -> None:
    """The step of each super-block whose multiples low..high cost the least in place of `values`.

    `tries` are which multiple the largest value becomes; `cost` the row of cost of a squared difference.
    """
    _max_blocks(work, values, _LIMIT, blocks)
    for k in range(LANES):
        work[_BESTTOTAL + k] = _INFINITE
        work[chosen + k] = _ZERO
    for i in range(len(tries)):
        for k in range(LANES):
            work[_STEP + k] = work[_LIMIT + k] / tries[i]
        _to_half(work, _STEP)
        for k in range(LANES):
            limit, step = work[_LIMIT + k], work[_STEP + k]
            # fp16's least numbers lie far apart: the next larger, where the largest value would be cut off
            short = abs(step * tries[i]) < np.float32(0.995) * abs(limit)
            least = _LEAST if limit * tries[i] > _ZERO else -_LEAST
            step = step + least if short & (abs(step) < _LEAST_NORMAL) else step
            inverse = _ZERO if step == _ZERO else _ONE / step
            level = max(min(np.rint(work[values + k] * inverse), high), low)
            away = level * step - work[values + k]
            work[_STEP + k] = step
            work[_ERROR + k] = away * away * work[cost + k]
        _sum_blocks(work, _ERROR, _TOTAL, blocks)
        for k in range(LANES):
            better = work[_TOTAL + k] < work[_BESTTOTAL + k]
            work[_BESTTOTAL + k] = work[_TOTAL + k] if better else work[_BESTTOTAL + k]
            work[chosen + k] = work[_STEP + k] if better else work[chosen + k]


@compiled("contract", "nsz")
def _keep_round(work: Floats, blocks: int) -> None:
    """The round's d, dmin and levels for super-blocks whose error is the least so far."""
    _sum_blocks(work, _KERROR, _TOTAL, blocks)
    for k in range(LANES):
        better = work[_TOTAL + k] < work[_BESTTOTAL + k]
        work[_BESTTOTAL + k] = work[_TOTAL + k] if better else work[_BESTTOTAL + k]
        work[_BESTD + k] = work[_D + k] if better else work[_BESTD + k]
        work[_BESTDMIN + k] = work[_DMIN + k] if better else work[_BESTDMIN + k]
        work[_BESTLEVEL + k] = work[_KLEVEL + k] if better else work[_BESTLEVEL + k]
        work[_BESTMINLEVEL + k] = work[_KMINLEVEL + k] if better else work[_BESTMINLEVEL + k]


@compiled("contract", "nsz")
def _store(work: Floats, first: int, blocks: int, steps: Floats, levels: Floats) -> None:
    """The best round's d, dmin and levels of the sub-blocks from `first` on."""
    count = LANES // blocks
    for k in range(min(LANES, levels.shape[1] - first)):
        levels[0, first + k] = work[_BESTLEVEL + k]
        levels[1, first + k] = work[_BESTMINLEVEL + k]
    block = first // count
    for n in range(min(blocks, steps.shape[1] - block)):
        steps[0, block + n] = work[_BESTD + n * count]
        steps[1, block + n] = work[_BESTDMIN + n * count]


@compiled()
def _write_codes(
    x: Floats, first: int, work: Floats, low: np.float32, high: np.float32, codes: Bytes
) -> None:
    """The nearest codes by the best round's lines, from 0 on; to the bit what torch makes of them."""
    for k in range(min(LANES, len(codes) - first)):
        step = work[_BESTD + k] * work[_BESTLEVEL + k]
        origin = -(work[_BESTDMIN + k] * work[_BESTMINLEVEL + k])
        inverse = _ZERO if step == _ZERO else _ONE / step
        for i in range(x.shape[1]):
            code = np.rint(min(max((x[first + k, i] - origin) * inverse, low), high))
            codes[first + k, i] = np.uint8(code - low)


@compiled("contract", "nsz", "reassoc")
def _refit(work: Floats, zero: np.float32, blocks: int) -> None:
    """Least-squares d and dmin of each super-block for its codes and levels."""
    count = LANES // blocks
    for first in range(0, LANES, count):
        dd, dm, mm, dx, mx = _ZERO, _ZERO, _ZERO, _ZERO, _ZERO
        for k in range(first, first + count):
            so, sy, sq, middle = work[_SO + k], work[_SY + k], work[_SQ + k], work[_MIDDLE + k]
            level, minlevel = work[_KLEVEL + k], work[_KMINLEVEL + k]
            # of codes from 0 on, and of the weights themselves
            soq = sq + zero * so
            soqq = work[_SQQ + k] + zero * (sq + soq)
            dd += level * level * soqq
            dm += level * minlevel * soq
            mm += minlevel * minlevel * so
            dx += level * (work[_SYQ + k] + zero * sy + middle * soq)
            mx += minlevel * (sy + middle * so)
        determinant = dd * mm - dm * dm
        d, dmin = work[_D + first], work[_DMIN + first]
        if determinant > np.float32(1e-5) * dd * mm:
            d, dmin = (dx * mm - mx * dm) / determinant, (dx * dm - dd * mx) / determinant
        elif dd > _ZERO and mm == _ZERO:
            d = dx / dd
        for k in range(first, first + count):
            work[_D + k] = d if d * work[_D + k] > _ZERO else work[_D + k]
            work[_DMIN + k] = dmin if dmin > _ZERO else work[_DMIN + k]
    _to_half(work, _D)
    _to_half(work, _DMIN)


@compiled("contract", "nsz")
def _try_levels(
    y: Floats,
    o: Floats,
    work: Floats,
    neighbours: Floats,
    zero: np.float32,
    top: np.float32,
    high: np.float32,
) -> None:
    """The levels near FREE, and near the minimum that is best for the codes, with the least error."""
    for k in range(LANES):
        work[_BASE + k] = work[_SY + k] / work[_SO + k] + work[_MIDDLE + k]
        work[_SLOPE + k] = zero + work[_SQ + k] / work[_SO + k]
        work[_LIMIT + k] = np.rint(work[_FREE + k] / work[_D + k]) if work[_D + k] > _ZERO else _ZERO
        work[_STEP + k] = _ONE / work[_DMIN + k] if work[_DMIN + k] > _ZERO else _ZERO
        work[_KERROR + k] = _INFINITE
    for i in range(len(neighbours)):
        for k in range(LANES):
            level = min(max(work[_LIMIT + k] + neighbours[i, 0], _ZERO), top)
            scale = level * work[_D + k]
            minimum = (scale * work[_SLOPE + k] - work[_BASE + k]) * work[_STEP + k]
            minlevel = min(max(np.rint(minimum) + neighbours[i, 1], _ZERO), top)
            work[_LEVEL + k] = level
            work[_MINLEVEL + k] = minlevel
            work[_SCALE + k] = scale
            work[_SHIFT + k] = scale * zero - minlevel * work[_DMIN + k] - work[_MIDDLE + k]
        _keep_levels(y, o, work, -zero, high)


@compiled("contract", "nsz")
def affine(
    x: Floats,
    importance: Floats,
    bend: np.float32,
    blocks: int,
    zero: np.float32,
    top: np.float32,
    starts: Floats,
    tries: Floats,
    neighbours: Floats,
    rounds: int,
    steps: Floats,
    levels: Floats,
    codes: Bytes,
) -> None:
    """Scales of w = d level q - dmin minlevel, q in 0..2 zero - 1, levels in 0..top.

    x [sub-blocks, width]; importance [width, sub-blocks of a row or none]; `blocks` super-blocks
    lie in LANES. Fills steps [2, super-blocks] (d, dmin, as fp16 holds them), levels [2, sub-blocks], and
    codes uint8 [sub-blocks, width], or [0, width] for none.
    """
    width = x.shape[1]
    y = np.empty((width, LANES), np.float32)
    o = np.empty((width, LANES), np.float32)
    work = np.zeros(_ROWS * LANES, np.float32)
    low, high = -zero, zero - _ONE
    for first in range(0, len(x), LANES):
        _load(x, importance, first, y, o, work, bend, blocks)
        _centre(y, o, work)
        for k in range(LANES):
            reach = work[_RANGE + k]
            work[_RANGE + k] = _ONE / reach if reach >= _SMALLEST else _ZERO
            work[_KSCALE + k] = reach / (high + zero)
            work[_KSHIFT + k] = np.float32(0.5) * work[_KSCALE + k]
            work[_KERROR + k] = _INFINITE
        for i in range(len(starts)):
            for k in range(LANES):
                work[_INV + k] = starts[i, 0] * work[_RANGE + k]
                work[_OFF + k] = starts[i, 1]
            _sums(y, o, work, low, high)
            _keep_fit(work, zero)
        _sums_of_kept(y, o, work, low, high)
        _keep_fit(work, zero)
        _sums_of_kept(y, o, work, low, high)
        for k in range(LANES):
            work[_FREE + k] = work[_KSCALE + k]
            work[_SCALE + k] = work[_SQQ + k] - work[_SQ + k] * work[_SQ + k] / work[_SO + k]
        _try_steps(work, _FREE, _SCALE, _D, tries, _ZERO, top, blocks)
        for k in range(LANES):
            d = work[_D + k]
            scale = d * min(np.rint(work[_FREE + k] / d), top) if d > _ZERO else _ZERO
            shift = (work[_SY + k] - scale * work[_SQ + k]) / work[_SO + k]
            work[_SHIFT + k] = max(scale * zero - shift - work[_MIDDLE + k], _ZERO)
        _try_steps(work, _SHIFT, _SO, _DMIN, tries, _ZERO, top, blocks)
        for k in range(LANES):
            work[_BESTTOTAL + k], work[_BESTD + k], work[_BESTDMIN + k] = _INFINITE, _ZERO, _ZERO
        for turn in range(rounds):
            if turn:
                for k in range(LANES):
                    work[_KSCALE + k] = work[_KLEVEL + k] * work[_D + k]
                    minimum = work[_KMINLEVEL + k] * work[_DMIN + k]
                    work[_KSHIFT + k] = work[_KSCALE + k] * zero - minimum - work[_MIDDLE + k]
                _sums_of_kept(y, o, work, low, high)
                _refit(work, zero, blocks)
                for k in range(LANES):
                    so, sy, sq = work[_SO + k], work[_SY + k], work[_SQ + k]
                    determinant = so * work[_SQQ + k] - sq * sq
                    free = (so * work[_SYQ + k] - sy * sq) / determinant
                    kept = work[_KLEVEL + k] * work[_D + k]
                    work[_FREE + k] = free if (determinant > _ZERO) & (free > _ZERO) else kept
            _try_levels(y, o, work, neighbours, zero, top, high)
            _keep_round(work, blocks)
        _store(work, first, blocks, steps, levels)
        _write_codes(x, first, work, _ZERO, zero + high, codes)


@compiled("contract", "nsz")
def symmetric(
    x: Floats,
    importance: Floats,
    bend: np.float32,
    blocks: int,
    zero: np.float32,
    top: np.float32,
    starts: Floats,
    tries: Floats,
    neighbours: Floats,
    rounds: int,
    steps: Floats,
    levels: Floats,
    codes: Bytes,
) -> None:
    """Scales of w = d level q, q in -zero..zero - 1, levels in -top..top - 1.

    x [sub-blocks, width]; importance [width, sub-blocks of a row or none]; `blocks` super-blocks
    lie in LANES. A start is which code the weight of largest size would have.
    Fills the first of steps [2, super-blocks] (d, as fp16 holds it) and of levels [2, sub-blocks], and codes
    uint8 [sub-blocks, width] from 0 on, or [0, width] for none.
    """
    width = x.shape[1]
    y = np.empty((width, LANES), np.float32)
    o = np.empty((width, LANES), np.float32)
    work = np.zeros(_ROWS * LANES, np.float32)
    low, high = -zero, zero - _ONE
    for first in range(0, len(x), LANES):
        _load(x, importance, first, y, o, work, bend, blocks)
        for k in range(LANES):
            extreme = work[_HIGH + k] if work[_HIGH + k] > -work[_LOW + k] else work[_LOW + k]
            work[_RANGE + k] = _ONE / extreme if abs(extreme) >= _SMALLEST else _ZERO
            work[_FREE + k] = -extreme / zero
            work[_SCALE + k] = _ZERO
            work[_SHIFT + k] = _ZERO
            work[_KERROR + k] = _ZERO
        for i in range(len(starts)):
            for k in range(LANES):
                work[_INV + k] = starts[i, 0] * work[_RANGE + k]
            _sums_centred(y, o, work, low, high)
            for k in range(LANES):
                sqq, syq = work[_SQQ + k], work[_SYQ + k]
                free = syq / sqq
                gain = syq * free
                better = (gain > work[_KERROR + k]) & (sqq > _ZERO)
                work[_KERROR + k] = gain if better else work[_KERROR + k]
                work[_FREE + k] = free if better else work[_FREE + k]
                work[_SCALE + k] = sqq if better else work[_SCALE + k]
        _try_steps(work, _FREE, _SCALE, _D, tries, -top, top - _ONE, blocks)
        for k in range(LANES):
            work[_BESTTOTAL + k], work[_BESTD + k], work[_BESTDMIN + k] = _INFINITE, _ZERO, _ZERO
        for turn in range(rounds):
            if turn:
                for k in range(LANES):
                    scale = work[_KLEVEL + k] * work[_D + k]
                    work[_INV + k] = _ZERO if abs(scale) < _SMALLEST else _ONE / scale
                _sums_centred(y, o, work, low, high)
                _refit(work, _ZERO, blocks)
                for k in range(LANES):
                    sqq, kept = work[_SQQ + k], work[_KLEVEL + k] * work[_D + k]
                    work[_FREE + k] = work[_SYQ + k] / sqq if sqq > _ZERO else kept
            for k in range(LANES):
                work[_LIMIT + k] = _ZERO if work[_D + k] == _ZERO else np.rint(work[_FREE + k] / work[_D + k])
                work[_KERROR + k] = _INFINITE
            for i in range(len(neighbours)):
                for k in range(LANES):
                    level = min(max(work[_LIMIT + k] + neighbours[i, 0], -top), top - _ONE)
                    work[_LEVEL + k] = level
                    work[_SCALE + k] = level * work[_D + k]
                _keep_levels(y, o, work, low, high)
            _keep_round(work, blocks)
        _store(work, first, blocks, steps, levels)
        _write_codes(x, first, work, low, high, codes)


@compiled()
def join(codes: Words, shift: np.uint64, bits: int, mask: np.uint64, words: int, out: Words) -> None:
    """Packs `bits` of each byte, from bit `shift` on; eight bytes at a time.

    codes [blocks, n]; out [blocks, n / runs]. Of `runs` = 8 // bits runs of `words` words, the first comes
    into the lowest bits of `words` words, the next above it; then the same with the runs that follow. `mask`
    has the lowest `bits` of each byte.
    """
    runs = 8 // bits
    for block in range(codes.shape[0]):
        for part in range(codes.shape[1] // (runs * words)):
            for i in range(words):
                packed = np.uint64(0)
                for run in range(runs):
                    field = (codes[block, (part * runs + run) * words + i] >> shift) & mask
                    packed |= field << np.uint64(run * bits)
                out[block, part * words + i] = packed
