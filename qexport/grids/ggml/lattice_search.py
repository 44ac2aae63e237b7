"""The search for points, signs and scales of the IQ2 and IQ3 types, compiled.

Of a block: w = d (2s + 1) unit p, and signs: d of the block, s of a group, p a coordinate of a point.

1. The scale t of each group, alone: that at which levels without a lattice lose least; then the best points
   at this scale, and the least-squares t of those.
2. The block's d, such that the nearest d (2s + 1) cost the least while the points stay.
3. Against d as it is stored (fp16): the best points for some s about the nearest one, and the best of these;
   then the least-squares d of all that, and the best points against it.

The best point is sought among those near the cell of what is rounded, by weighted error. Where an octet must
have an even number of minus signs and has not, one weight is taken to be below 0: that whose error grows
least by it.

All groups of a block are searched at once: numba counts references to each array of a call, too slow for a
group. What is indexed from 0 on, or by unsigned numbers, is vectorised; other indices could be negative, and
are not. All is fp32. The kernels lie in one module because numba's cache does not see changes in others.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from qexport.grids.ggml.compiled import compiled, half, kernel
from qexport.grids.ggml.lattice_types import (
    OCTETS,
    QUARTETS,
    WIDTH,
    Bytes,
    Choice,
    Fields,
    Floats,
    Indices,
    Lattice,
    Work,
)

# Points that are tried for a cell. Measured: twice as many lose 0.3 % less and take up to a third more time;
# half as many lose 1 % more and above
NEAR_OCTET = 32
NEAR_QUARTET = 16

# Sums in any order. NaN is kept in mind: its comparisons must not give an index
_summing = compiled("reassoc", "contract", "nsz", "arcp")

_float, _int, _index = np.float32, np.int32, np.uint64
_ZERO, _HALF, _ONE, _TWO, _SEVEN, _LAST_CODE = (_float(x) for x in (0, 0.5, 1, 2, 7, 15))
_INFINITY = _float(np.inf)
_LARGEST = _int(0x7FFFFFFF)
_TINY = _float(1e-12)  # magnitudes below it are 0 in every type: the least d is 6e-8

# Scales that are tried in step 1: from above that at which the largest magnitude has the last level down to a
# fifth of it, where outliers are cut off
_SCANS = 12
_SCAN_FROM = _float(1.15)
_SCAN_RATIO = _float((1.15 / 0.2) ** (1 / 11))
# Variance of magnitudes, as a part of their mean square, below which they are about the same; of normal
# weights it is 0.36. It is less than what the types of three levels, and of eight, lose anyway
_SAME_OF_THREE = _float(0.05)
_SAME_OF_EIGHT = _float(0.01)
# d that are tried in step 2, as parts of that at which the largest scale has the last code
_STEPS = 40
_STEP_FROM = _float(0.85)
_STEP = _float(0.025)


@_summing
def _level(value: Any, low: Any, middle: Any, high: Any, first: Any, second: Any) -> Any:
    """The level nearest to a magnitude: one of three, or where `high` is 0 of eight at equal steps."""
    if high > _ZERO:
        return low if value < first else (middle if value < second else high)
    step = middle - low
    place = value * (_ONE / step)
    place = place if place < _SEVEN else _SEVEN
    return (_float(_int(place)) + _HALF) * step


@_summing
def _scan(work: Work, lattice: Lattice, found: Floats) -> None:
    """The scales [groups] at which levels lose least, were each weight's chosen alone.

    Where magnitudes are all about the same, any level would do, but of points there is the one of the least.
    """
    x, w = work.magnitudes, work.importance
    groups, group = x.shape
    low, middle, first, second = lattice.levels[0], lattice.levels[1], lattice.borders[0], lattice.borders[1]
    last = lattice.levels[len(lattice.levels) - 1]
    high = last if len(lattice.levels) == 3 else _ZERO
    same = _SAME_OF_THREE if high > _ZERO else _SAME_OF_EIGHT
    for g in range(groups):
        top = _ZERO
        total = _ZERO
        squares = _ZERO
        for i in range(group):
            top = max(top, x[g, i])
            total += x[g, i]
            squares += x[g, i] * x[g, i]
        if not top > _TINY:
            found[g] = _ZERO
            continue
        if total * total > (_ONE - same) * _float(group) * squares:
            found[g] = total / (_float(group) * low)
            continue
        found[g] = top / last
        most = _ZERO
        inverse = last / (top * _SCAN_FROM)
        for _ in range(_SCANS):
            wxp = _ZERO
            wpp = _ZERO
            for i in range(group):
                p = _level(x[g, i] * inverse, low, middle, high, first, second)
                wp = w[g, i] * p
                wxp += wp * x[g, i]
                wpp += wp * p
            if wxp * wxp > most * wpp:
                most = wxp * wxp / wpp
                found[g] = wxp / wpp
            inverse *= _SCAN_RATIO


@_summing
def _flip(work: Work, lattice: Lattice, odd: Bytes, flips: Bytes) -> None:
    """Turns a weight of each odd octet: that whose error grows least."""
    v, w, costs = work.scaled, work.importance, work.chosen
    groups, group = v.shape
    low, middle, first, second = lattice.levels[0], lattice.levels[1], lattice.borders[0], lattice.borders[1]
    high = lattice.levels[2] if len(lattice.levels) == 3 else _ZERO
    for g in range(groups):
        for i in range(group):
            p = _level(v[g, i], low, middle, high, first, second)
            # (v + low)^2 - (v - p)^2: the lowest level on the other side in place of the nearest
            costs[g, i] = w[g, i] * (p + low) * (_TWO * v[g, i] + low - p)
    values = v.reshape(OCTETS, 8)
    bits = costs.view(_int).reshape(OCTETS, 8)
    for o in range(OCTETS):
        # costs are not negative: their bits, as whole numbers, have their order, and room for a place
        least = _LARGEST
        for i in range(8):
            least = min(least, (bits[o, i] & _int(-8)) | _int(i))
        place = _index(least & _int(7))
        flips[o] = place
        values[o, place] *= _ONE - _TWO * _float(odd[o])


@_summing
def _octets(work: Work, lattice: Lattice, points: Indices) -> None:
    """The best of the points near each eight."""
    scaled, digits, costs = work.scaled, work.digits, work.costs
    first, second = lattice.borders[0], lattice.borders[1]
    groups, group = scaled.shape
    for g in range(groups):
        for i in range(group):
            digits[g, i] = _int(scaled[g, i] > first) + _int(scaled[g, i] > second)
    v, w = scaled.reshape(OCTETS, 8), work.importance.reshape(OCTETS, 8)
    chosen, d = work.chosen.reshape(OCTETS, 8), digits.reshape(OCTETS, 8)
    c, bits = lattice.coordinates, costs.view(_int)
    for o in range(OCTETS):
        low = d[o, 0] + d[o, 1] * _int(3) + d[o, 2] * _int(9) + d[o, 3] * _int(27)
        high = d[o, 4] + d[o, 5] * _int(3) + d[o, 6] * _int(9) + d[o, 7] * _int(27)
        cell = _index(low + high * _int(81))
        v0, v1, v2, v3, v4, v5, v6, v7 = (
            v[o, 0],
            v[o, 1],
            v[o, 2],
            v[o, 3],
            v[o, 4],
            v[o, 5],
            v[o, 6],
            v[o, 7],
        )
        w0, w1, w2, w3, w4, w5, w6, w7 = (
            w[o, 0],
            w[o, 1],
            w[o, 2],
            w[o, 3],
            w[o, 4],
            w[o, 5],
            w[o, 6],
            w[o, 7],
        )
        for k in range(NEAR_OCTET):
            costs[k] = (
                w0 * (_float(c[cell, 0, k]) - v0) ** 2
                + w1 * (_float(c[cell, 1, k]) - v1) ** 2
                + w2 * (_float(c[cell, 2, k]) - v2) ** 2
                + w3 * (_float(c[cell, 3, k]) - v3) ** 2
                + w4 * (_float(c[cell, 4, k]) - v4) ** 2
                + w5 * (_float(c[cell, 5, k]) - v5) ** 2
                + w6 * (_float(c[cell, 6, k]) - v6) ** 2
                + w7 * (_float(c[cell, 7, k]) - v7) ** 2
            )
        least = _LARGEST
        for k in range(NEAR_OCTET):
            least = min(least, (bits[k] & _int(-NEAR_OCTET)) | _int(k))
        point = _index(lattice.points[cell, _index(least & _int(NEAR_OCTET - 1))])
        points[o] = point
        for i in range(8):
            chosen[o, i] = lattice.grid[point, i]


@_summing
def _quartets(work: Work, lattice: Lattice, points: Indices) -> None:
    """The best of the points near each four."""
    scaled, digits, costs = work.scaled, work.digits, work.costs
    per_step = _ONE / (lattice.levels[1] - lattice.levels[0])
    groups, group = scaled.shape
    for g in range(groups):
        for i in range(group):
            place = scaled[g, i] * per_step
            place = place if place > _ZERO else _ZERO
            digits[g, i] = _int(place if place < _SEVEN else _SEVEN)
    v, w = scaled.reshape(QUARTETS, 4), work.importance.reshape(QUARTETS, 4)
    chosen, d = work.chosen.reshape(QUARTETS, 4), digits.reshape(QUARTETS, 4)
    c, bits = lattice.coordinates, costs.view(_int)
    for o in range(QUARTETS):
        cell = _index(d[o, 0] + d[o, 1] * _int(8) + d[o, 2] * _int(64) + d[o, 3] * _int(512))
        v0, v1, v2, v3 = v[o, 0], v[o, 1], v[o, 2], v[o, 3]
        w0, w1, w2, w3 = w[o, 0], w[o, 1], w[o, 2], w[o, 3]
        for k in range(NEAR_QUARTET):
            costs[k] = (
                w0 * (_float(c[cell, 0, k]) - v0) ** 2
                + w1 * (_float(c[cell, 1, k]) - v1) ** 2
                + w2 * (_float(c[cell, 2, k]) - v2) ** 2
                + w3 * (_float(c[cell, 3, k]) - v3) ** 2
            )
        least = _LARGEST
        for k in range(NEAR_QUARTET):
            least = min(least, (bits[k] & _int(-NEAR_QUARTET)) | _int(k))
        point = _index(lattice.points[cell, _index(least & _int(NEAR_QUARTET - 1))])
        points[o] = point
        for i in range(4):
            chosen[o, i] = lattice.grid[point, i]


@_summing
def _search(work: Work, lattice: Lattice, even: bool, odd: Bytes, choice: Choice) -> None:
    """Points for the trial scales of `choice`; its sums and losses."""
    x, w, v, p = work.magnitudes, work.importance, work.scaled, work.chosen
    groups, group = x.shape
    for g in range(groups):
        inverse = _ONE / choice.trial[g] if choice.trial[g] > _ZERO else _ZERO
        for i in range(group):
            v[g, i] = x[g, i] * inverse
    if even:
        _flip(work, lattice, odd, choice.flips)
    if lattice.grid.shape[1] == 8:
        _octets(work, lattice, choice.points)
    else:
        _quartets(work, lattice, choice.points)
    for g in range(groups):
        wxp = _ZERO
        wpp = _ZERO
        for i in range(group):
            wp = w[g, i] * p[g, i]
            wxp += wp * v[g, i]
            wpp += wp * p[g, i]
        choice.wxp[g] = wxp * choice.trial[g]
        choice.wpp[g] = wpp
        choice.losses[g] = choice.trial[g] * (choice.trial[g] * wpp - _TWO * choice.wxp[g])


@_summing
def _common(scales: Floats, curvatures: Floats) -> Any:
    """The d for which scales d (2s + 1), s in 0 to 15, lose least, each group's loss being a parabola."""
    top = _ZERO
    for g in range(len(scales)):
        top = max(top, scales[g])
    top /= _float(31)
    best = top
    least = _INFINITY
    for step in range(_STEPS):
        d = top * (_STEP_FROM + _STEP * _float(step))
        inverse = _ONE / d
        loss = _ZERO
        for g in range(len(scales)):
            code = np.rint((scales[g] * inverse - _ONE) * _HALF)
            code = min(max(code, _ZERO), _LAST_CODE)
            miss = d * (_TWO * code + _ONE) - scales[g]
            loss += curvatures[g] * miss * miss
        if loss < least:
            least = loss
            best = d
    return best


@_summing
def _take_in(values: Floats, importance: Floats, work: Work, signs: Bytes, odd: Bytes) -> Any:
    """Magnitudes and signs of a block [WIDTH]; returns the largest magnitude."""
    top = _ZERO
    for i in range(WIDTH):
        top = max(top, abs(values[i]))
    shrink = _ONE / top if top > _TINY else _ZERO
    x, w = work.magnitudes.reshape(WIDTH), work.importance.reshape(WIDTH)
    for i in range(WIDTH):
        x[i] = abs(values[i]) * shrink
        w[i] = importance[i]
    for o in range(OCTETS):
        byte = _int(0)
        count = _int(0)
        for i in range(8):
            minus = _int(values[_index(8 * o + i)] < _ZERO)
            byte |= minus << _int(i)
            count += minus
        signs[o] = byte
        odd[o] = count & _int(1)
    return top


@_summing
def _keep(now: Choice, best: Choice) -> None:
    """What `now` has of the groups in which it loses less."""
    groups = len(now.trial)
    vectors, octets = len(now.points) // groups, OCTETS // groups
    for g in range(groups):
        if now.losses[g] < best.losses[g]:
            best.losses[g], best.codes[g] = now.losses[g], now.codes[g]
            best.wxp[g], best.wpp[g] = now.wxp[g], now.wpp[g]
            for i in range(vectors):
                at = _index(g * vectors + i)
                best.points[at] = now.points[at]
            for i in range(octets):
                at = _index(g * octets + i)
                best.flips[at] = now.flips[at]


@kernel
def _work(groups: int) -> Work:
    shape = (groups, WIDTH // groups)
    return Work(
        np.empty(shape, np.float32),
        np.empty(shape, np.float32),
        np.empty(shape, np.float32),
        np.empty(shape, np.float32),
        np.empty(shape, np.int32),
        np.empty(max(NEAR_OCTET, NEAR_QUARTET), np.float32),
    )


@kernel
def _choice(groups: int, vectors: int) -> Choice:
    return Choice(
        np.zeros(vectors, np.uint16),
        np.zeros(OCTETS, np.uint8),
        np.zeros(groups, np.float32),
        np.zeros(groups, np.float32),
        np.zeros(groups, np.float32),
        np.zeros(groups, np.float32),
        np.zeros(groups, np.float32),
    )


@_summing
def _write(best: Choice, d: Any, even: bool, odd: Bytes, block: int, fields: Fields) -> None:
    """What was chosen for a block, unless its d is 0."""
    if not d > _ZERO:
        return
    fields.d[block] = d
    for g in range(len(best.codes)):
        fields.scales[block, g] = _int(best.codes[g])
    for i in range(len(best.points)):
        fields.points[block, i] = best.points[i]
    if even:
        for o in range(OCTETS):
            fields.signs[block, o] ^= odd[o] << best.flips[o]


@_summing
def _aim(middle: Floats, step: Any, aside: Any, choice: Choice) -> None:
    """Trial scales: the codes `middle` + `aside` of d = `step`; the codes."""
    for g in range(len(middle)):
        choice.codes[g] = min(max(middle[g] + aside, _ZERO), _LAST_CODE)
        choice.trial[g] = step * (_TWO * choice.codes[g] + _ONE)


@_summing
def _refit(choice: Choice) -> Any:
    """The least-squares d of the points and codes."""
    wxp = _ZERO
    wpp = _ZERO
    for g in range(len(choice.codes)):
        factor = _TWO * choice.codes[g] + _ONE
        wxp += factor * choice.wxp[g]
        wpp += factor * factor * choice.wpp[g]
    return wxp / wpp


@kernel
def encode_blocks(
    values: Floats, importance: Floats, lattice: Lattice, unit: Any, even: bool, tries: int, fields: Fields
) -> None:
    """Fills `fields`, zeros before, for values fp32 [blocks, WIDTH].

    `importance` fp32 [some, WIDTH], of means about 1, repeats for the blocks. `tries`: how many s are tried.
    """
    groups, vectors = fields.scales.shape[1], fields.points.shape[1]
    work = _work(groups)
    now, best = _choice(groups, vectors), _choice(groups, vectors)
    odd = np.zeros(OCTETS, np.uint8)
    middle = np.zeros(groups, _float)
    for block in range(len(values)):
        top = _take_in(values[block], importance[block % len(importance)], work, fields.signs[block], odd)
        if not top > _TINY:
            continue
        stored = step = _ZERO
        _scan(work, lattice, now.trial)
        for turn in range(3):
            step = stored * unit / top
            if turn > 0 and not step > _ZERO:
                break
            for g in range(groups):
                best.losses[g] = _INFINITY
                if turn == 1:
                    middle[g] = np.rint((best.trial[g] / step - _ONE) * _HALF)
                elif turn == 2:
                    middle[g] = best.codes[g]
            for k in range(tries if turn == 1 else 1):
                if turn > 0:
                    _aim(middle, step, _float((k + 1) // 2 * (1 if k & 1 else -1)), now)
                _search(work, lattice, even, odd, now)
                _keep(now, best)
            if turn == 0:
                for g in range(groups):
                    best.trial[g] = max(best.wxp[g], _ZERO) / best.wpp[g]
                stored = half(_common(best.trial, best.wpp) * top / unit)
            elif turn == 1:
                stored = half(max(_refit(best) * top / unit, _ZERO))
        _write(best, stored, even, odd, block, fields)
