"""Scales of ggml's first block types under the least weighted squared error, compiled.

Many scales are tried, each scored by the best scale for the codes that it gives (least squares); the winner
is then settled: codes nearest to what is stored, the best scale for those codes, and again, as long as that
helps. llama.cpp does the first part with another weight (importance times a root of the squared weight).
"""

from __future__ import annotations

from typing import Any

import numpy as np

from qexport.grids.ggml.compiled import ZERO, half, half_not_zero, kernel, summing_kernel

_ONE = np.float32(1)
_LARGEST = np.float32(3.4028235e38)
_SETTLING = 3


@kernel
def furthest(values: Any, block: int) -> Any:
    """The number of a block of 32 that is furthest from 0."""
    low = high = values[block, 0]
    for j in range(32):
        low, high = min(low, values[block, j]), max(high, values[block, j])
    return high if high > -low else low


@kernel
def scaled_down(values: Any, block: int, size: Any, scaled: Any) -> None:
    """`scaled` fp32 [32] becomes a block / `size`, its furthest number: squares can't overflow or vanish."""
    for j in range(32):
        scaled[j] = values[block, j] / size


@summing_kernel
def _through_zero(scaled: Any, weights: Any, group: int, inverse: Any, bottom: Any, top: Any) -> Any:
    """Under codes round(x * inverse) within [bottom, top]: the sums of h x q and of h q q."""
    sum_xq = sum_qq = ZERO
    for j in range(32):
        code = min(max(np.rint(scaled[j] * inverse), bottom), top)
        weighted = weights[group, j] * code
        sum_xq += weighted * scaled[j]
        sum_qq += weighted * code
    return sum_xq, sum_qq


@summing_kernel
def _error(scaled: Any, weights: Any, group: int, low: Any, step: Any, bottom: Any, top: Any) -> Any:
    """The sum of h (x - low - step q)^2 under the nearest codes."""
    total = ZERO
    inverse = _ONE / step
    for j in range(32):
        code = min(max(np.rint((scaled[j] - low) * inverse), bottom), top)
        off = scaled[j] - low - step * code
        total += weights[group, j] * off * off
    return total


@kernel
def symmetric_steps(values: Any, weights: Any, tries: Any, middle: int, steps: Any) -> None:
    """Steps fp32 [blocks], rounded to fp16, for codes -middle to middle - 1 of fp32 [blocks, 32].

    `weights` fp32 [groups, 32] belong to the blocks of a row, row after row. `tries` fp32: the code, a broken
    number, that the number furthest from 0 gets.
    """
    scaled = np.empty(32, np.float32)
    bottom, top = np.float32(-middle), np.float32(middle - 1)
    for block in range(len(values)):
        size = furthest(values, block)
        steps[block] = ZERO
        if size == ZERO:
            continue
        group = block % len(weights)
        scaled_down(values, block, size, scaled)
        best, step = ZERO, ZERO
        for place in range(len(tries)):
            sum_xq, sum_qq = _through_zero(scaled, weights, group, tries[place], bottom, top)
            # by so much a step of sum_xq / sum_qq lowers the sum of h x x
            gain = sum_xq * sum_xq / sum_qq if sum_qq > ZERO else ZERO
            if gain > best:
                best, step = gain, sum_xq / sum_qq
        least = _LARGEST
        for _ in range(_SETTLING):
            stored = half_not_zero(step * size)
            step = stored / size
            inverse = _ONE / step
            error = _error(scaled, weights, group, ZERO, step, bottom, top)
            if error >= least:
                break
            least, steps[block] = error, stored
            sum_xq, sum_qq = _through_zero(scaled, weights, group, inverse, bottom, top)
            if sum_qq == ZERO:
                break
            step = sum_xq / sum_qq


@summing_kernel
def _with_low(scaled: Any, weights: Any, group: int, low: Any, inverse: Any, top: Any) -> Any:
    """Under codes round((x - low) * inverse) within [0, top]: the best low and step, and what they gain.

    The gain is that over no step at all; where all codes are equal, there is none.
    """
    sum_h = sum_x = sum_q = sum_qq = sum_xq = ZERO
    for j in range(32):
        code = min(max(np.rint((scaled[j] - low) * inverse), ZERO), top)
        weight = weights[group, j]
        sum_h += weight
        sum_x += weight * scaled[j]
        sum_q += weight * code
        sum_qq += weight * code * code
        sum_xq += weight * code * scaled[j]
    spread = sum_qq - sum_q * sum_q / sum_h
    if spread <= ZERO:
        return low, ZERO, ZERO
    together = sum_xq - sum_x * sum_q / sum_h
    step = together / spread
    return (sum_x - step * sum_q) / sum_h, step, together * step


@kernel
def affine_steps(values: Any, weights: Any, tries: Any, top: int, lows: Any, steps: Any) -> None:
    """Lows and steps fp32 [blocks], rounded to fp16, for codes 0 to top of fp32 [blocks, 32].

    `tries` fp32 [tries, 2]: the codes, broken numbers, that the smallest and the largest number get.
    """
    scaled = np.empty(32, np.float32)
    largest = np.float32(top)
    for block in range(len(values)):
        size = furthest(values, block)
        steps[block] = lows[block] = ZERO
        if size == ZERO:
            continue
        group = block % len(weights)
        scaled_down(values, block, size, scaled)
        least_value = greatest = scaled[0]
        for j in range(32):
            least_value, greatest = min(least_value, scaled[j]), max(greatest, scaled[j])
        lows[block] = half(least_value * size)
        if greatest <= least_value:
            continue
        # the plain range is what must be beaten
        low, step = least_value, (greatest - least_value) / largest
        best = -_ONE
        for place in range(len(tries)):
            inverse = (tries[place, 1] - tries[place, 0]) / (greatest - least_value)
            base = least_value - tries[place, 0] / inverse
            found_low, found_step, gain = _with_low(scaled, weights, group, base, inverse, largest)
            if gain > best and found_step > ZERO:
                best, low, step = gain, found_low, found_step
        least = _LARGEST
        for _ in range(_SETTLING):
            stored_low, stored = half(low * size), half_not_zero(step * size)
            low, step = stored_low / size, stored / size
            inverse = _ONE / step
            error = _error(scaled, weights, group, low, step, ZERO, largest)
            if error >= least:
                break
            least, lows[block], steps[block] = error, stored_low, stored
            low, step, _gain = _with_low(scaled, weights, group, low, inverse, largest)
            if step <= ZERO:
                break
