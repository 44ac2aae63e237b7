"""Encoders of IQ4_NL and IQ4_XS, compiled: scales under the least weighted squared error, and the codes.

`values` fp32 [blocks, 32]; `weights` fp32 [groups, 32] belong to the blocks of a row, row after row. A level
is looked up by a number in half units, for borders between levels lie on those: `levels` fp32 [512] has the
nearest level of -128 and on, `codes` uint8 [512] its code.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from qexport.grids.ggml.compiled import ZERO, half, half_not_zero, kernel, store_half, summing_kernel

_ONE = np.float32(1)
_TWO = np.float32(2)
_LARGEST = np.float32(3.4028235e38)
_FIRST, _LAST, _BINS_BELOW = np.float32(-256), np.float32(255), np.float32(256)
_SETTLING = 3
_SUB_BLOCKS = 8  # of a super-block of IQ4_XS
_LOWEST, _HIGHEST = np.float32(-32), np.float32(31)  # whole numbers that scales of sub-blocks are


@summing_kernel
def _sums(scaled: Any, weights: Any, group: int, inverse: Any, levels: Any) -> Any:
    """Under the nearest levels q of x * inverse: the sums of h x q and of h q q."""
    sum_xq = sum_qq = ZERO
    for j in range(32):
        place = min(max(scaled[0, j] * inverse * _TWO, _FIRST), _LAST) + _BINS_BELOW
        level = levels[np.int32(place)]
        weighted = weights[group, j] * level
        sum_xq += weighted * scaled[0, j]
        sum_qq += weighted * level
    return sum_xq, sum_qq


@summing_kernel
def _error(scaled: Any, block: int, weights: Any, group: int, step: Any, levels: Any) -> Any:
    """The sum of h (x - step q)^2 under the nearest levels q, and the sums as `_sums` has them."""
    sum_xq = sum_qq = total = ZERO
    inverse = _ONE / step if step != ZERO else ZERO
    for j in range(32):
        place = min(max(scaled[block, j] * inverse * _TWO, _FIRST), _LAST) + _BINS_BELOW
        level = levels[np.int32(place)]
        weighted = weights[group, j] * level
        sum_xq += weighted * scaled[block, j]
        sum_qq += weighted * level
        off = scaled[block, j] - step * level
        total += weights[group, j] * off * off
    return total, sum_xq, sum_qq


@kernel
def _furthest(values: Any, begin: int, end: int) -> Any:
    """The number of some blocks that is furthest from 0."""
    low = high = ZERO
    for block in range(begin, end):
        for j in range(32):
            low, high = min(low, values[block, j]), max(high, values[block, j])
    return high if high > -low else low


@kernel
def _scale_down(values: Any, begin: int, end: int, size: Any, scaled: Any) -> None:
    """`scaled` becomes some blocks / `size`: squares of those neither overflow nor vanish."""
    for block in range(begin, end):
        for j in range(32):
            scaled[block - begin, j] = values[block, j] / size


@kernel
def _write(values: Any, block: int, step: Any, codes: Any, blocks: Any, target: int, start: int) -> None:
    """The nearest codes under a step, in pairs, from byte `start` of block number `target`."""
    inverse = _ONE / step if step != ZERO else ZERO
    for j in range(16):
        first = min(max(values[block, j] * inverse * _TWO, _FIRST), _LAST) + _BINS_BELOW
        second = min(max(values[block, j + 16] * inverse * _TWO, _FIRST), _LAST) + _BINS_BELOW
        blocks[target, start + j] = codes[np.int32(first)] | (codes[np.int32(second)] << 4)


@kernel
def best_steps(values: Any, weights: Any, tries: Any, levels: Any, steps: Any, growths: Any) -> None:
    """The best of all steps tried, after least squares, and how fast its error grows: fp32 [blocks].

    `tries` fp32: what the number furthest from 0 may be scaled to.
    """
    scaled = np.empty((1, 32), np.float32)
    for block in range(len(values)):
        size = _furthest(values, block, block + 1)
        steps[block] = growths[block] = ZERO
        if size == ZERO:
            continue
        group = block % len(weights)
        _scale_down(values, block, block + 1, size, scaled)
        best = ZERO
        for place in range(len(tries)):
            sum_xq, sum_qq = _sums(scaled, weights, group, tries[place], levels)
            gain = sum_xq * sum_xq / sum_qq if sum_qq > ZERO else ZERO
            if gain > best:
                best = gain
                steps[block], growths[block] = sum_xq / sum_qq * size, sum_qq


@kernel
def single_blocks(values: Any, weights: Any, steps: Any, levels: Any, codes: Any, blocks: Any) -> None:
    """IQ4_NL, blocks uint8 [blocks, 18]: `steps` settled (codes, the best step for those, again), stored."""
    scaled = np.empty((1, 32), np.float32)
    start = blocks.shape[1] - 16
    for block in range(len(values)):
        size, chosen = _furthest(values, block, block + 1), ZERO
        if size != ZERO:
            group = block % len(weights)
            _scale_down(values, block, block + 1, size, scaled)
            step, least = steps[block] / size, _LARGEST
            if half(steps[block]) == ZERO:  # then a step must be better than none
                least, _xq, _qq = _error(scaled, len(scaled) - 1, weights, group, ZERO, levels)
            for _ in range(_SETTLING):
                stored = half_not_zero(step * size)
                step = stored / size
                error, sum_xq, sum_qq = _error(scaled, len(scaled) - 1, weights, group, step, levels)
                if error >= least:
                    break
                least, chosen = error, stored
                step = sum_xq / sum_qq if sum_qq > ZERO else ZERO
        store_half(blocks, block, 0, chosen)
        _write(values, block, chosen, codes, blocks, block, start)


@kernel
def _common_step(steps: Any, growths: Any, first: int) -> Any:
    """The number of which sub-blocks' steps are nearest to multiples, weighed by how their errors grow."""
    largest = ZERO
    for sub in range(len(steps)):
        largest = steps[sub] if abs(steps[sub]) > abs(largest) else largest
    best, least = ZERO, _LARGEST
    # the largest is one of the multiples -32 to -20 or 19 to 31
    for place in range(26):
        unit = largest / np.float32(place - 32 if place < 13 else place + 6)
        total = ZERO
        for sub in range(len(steps)):
            multiple = min(max(np.rint(steps[sub] / unit), _LOWEST), _HIGHEST)
            off = steps[sub] - unit * multiple
            total += growths[first + sub] * off * off
        if total < least:
            best, least = unit, total
    return best


@kernel
def _choose_multiples(
    scaled: Any, weights: Any, group: int, steps: Any, unit: Any, levels: Any, multiples: Any
) -> Any:
    """Each sub-block's best multiple of a unit, near its own step. Their error, and their best unit."""
    total = products = squares = ZERO
    for sub in range(len(steps)):
        middle = np.rint(steps[sub] / unit)
        least, best_xq, best_qq = _LARGEST, ZERO, ZERO
        for way in range(-1, 2):
            multiple = min(max(middle + np.float32(way), _LOWEST), _HIGHEST)
            error, sum_xq, sum_qq = _error(scaled, sub, weights, group + sub, unit * multiple, levels)
            if error < least:
                least, best_xq, best_qq = error, sum_xq, sum_qq
                multiples[sub] = multiple
        total += least
        products += multiples[sub] * best_xq
        squares += multiples[sub] * multiples[sub] * best_qq
    return total, products / squares if squares > ZERO else ZERO


@kernel
def _store_multiples(multiples: Any, blocks: Any, block: int) -> None:
    """Multiples + 32: the high two bits of all in two bytes, then the low four in four."""
    high = 0
    for sub in range(len(multiples)):
        high |= ((np.int32(multiples[sub]) + 32) >> 4) << (2 * sub)
    blocks[block, 2], blocks[block, 3] = high & 0xFF, high >> 8
    for pair in range(len(multiples) // 2):
        first, second = np.int32(multiples[2 * pair]) + 32, np.int32(multiples[2 * pair + 1]) + 32
        blocks[block, 4 + pair] = (first & 15) | ((second & 15) << 4)


@kernel
def super_blocks(
    values: Any, weights: Any, steps: Any, growths: Any, levels: Any, codes: Any, blocks: Any
) -> None:
    """IQ4_XS, blocks uint8 [super-blocks, 136], each eight of `values`: `steps` made multiples of one."""
    scaled = np.empty((_SUB_BLOCKS, 32), np.float32)
    wanted, multiples, chosen = np.empty((3, _SUB_BLOCKS), np.float32)
    for block in range(len(blocks)):
        first = block * _SUB_BLOCKS
        group = first % len(weights)
        size, unit_stored = _furthest(values, first, first + _SUB_BLOCKS), ZERO
        for sub in range(len(chosen)):
            chosen[sub] = ZERO
        if size != ZERO:
            _scale_down(values, first, first + _SUB_BLOCKS, size, scaled)
            for sub in range(len(wanted)):
                wanted[sub] = steps[first + sub] / size
            unit, least = _common_step(wanted, growths, first), _LARGEST
            for _ in range(_SETTLING):
                stored = half_not_zero(unit * size)
                unit = stored / size
                error, unit = _choose_multiples(scaled, weights, group, wanted, unit, levels, multiples)
                if error >= least:
                    break
                least, unit_stored = error, stored
                for sub in range(len(chosen)):
                    chosen[sub] = multiples[sub]
        store_half(blocks, block, 0, unit_stored)
        _store_multiples(chosen, blocks, block)
        for sub in range(len(chosen)):
            start = 8 + 16 * sub
            _write(values, first + sub, unit_stored * chosen[sub], codes, blocks, block, start)
