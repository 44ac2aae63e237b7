"""Encoders of ggml's first block types, compiled.

`values` fp32 [blocks, 32]; `blocks` uint8 [blocks, bytes] is written. What llama.cpp does, bit for bit
(ggml-quants.c, quantize_row_*_ref): codes are chosen by the scale before it is rounded to fp16. `nearest`
alone is for scales that were searched.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from qexport.grids.ggml.compiled import ZERO, kernel, store_half, summing_kernel, within_half

_HALF = np.float32(0.5)
_ONE = np.float32(1)
_BELOW_HALF = np.float32(0.49999997)  # the number before 0.5
_LARGEST = np.float32(3.4028235e38)
# blocks that go through each step together: the steps of one block alone would wait for each other
_TOGETHER = 64


@summing_kernel
def _ranges(values: Any, begin: int, end: int, lows: Any, highs: Any) -> None:
    """The smallest numbers of some blocks and the largest; a zero may have any sign."""
    for block in range(begin, end):
        low = high = values[block, 0]
        for j in range(32):
            low, high = min(low, values[block, j]), max(high, values[block, j])
        lows[block - begin], highs[block - begin] = low, high


@kernel
def _furthest(values: Any, block: int, low: Any, high: Any) -> Any:
    """The number furthest from 0, the first one of several; +0 where there are only zeros."""
    size = abs(low) if abs(low) > abs(high) else abs(high)
    if low + high != ZERO or size == ZERO:
        # no branch on the sign: it cannot be foreseen
        return np.copysign(size, low + high + ZERO)  # -0 + 0 is 0
    for j in range(32):
        if abs(values[block, j]) == size:
            return values[block, j]
    return size


@kernel
def _first_zero(values: Any, block: int) -> Any:
    """The first zero of a block that has one, with its sign."""
    for j in range(32):
        if values[block, j] == ZERO:
            return values[block, j]
    return ZERO


@kernel
def _inverses(steps: Any, inverses: Any) -> None:
    """1 / step, or 0 where there is none."""
    for block in range(_TOGETHER):
        inverse = _ONE / steps[block]
        inverses[block] = inverse if abs(inverse) <= _LARGEST else ZERO


@kernel
def _write(
    values: Any, begin: int, end: int, lows: Any, inverses: Any, shifts: Any, top: Any, blocks: Any
) -> None:
    """Codes trunc((values - low) * inverse + shift), at most `top`, into the ends of some blocks: two a byte.

    The fifth bits come before them, where `top` has so many.
    """
    start = blocks.shape[1] - 16
    for block in range(begin, end):
        low, inverse, shift = lows[block - begin], inverses[block - begin], shifts[block - begin]
        for j in range(16):
            first = np.int32(min(max((values[block, j] - low) * inverse + shift, ZERO), top))
            second = np.int32(min(max((values[block, j + 16] - low) * inverse + shift, ZERO), top))
            blocks[block, start + j] = (first & 15) | ((second & 15) << 4)
    if top < 16:
        return
    fifth = np.empty(32, np.uint8)
    for block in range(begin, end):
        low, inverse, shift = lows[block - begin], inverses[block - begin], shifts[block - begin]
        for j in range(32):
            fifth[j] = np.int32(min(max((values[block, j] - low) * inverse + shift, ZERO), top)) >> 4
        for byte in range(4):
            bits = np.uint8(0)
            for j in range(8):
                bits |= np.uint8(fifth[8 * byte + j] << j)
            blocks[block, start - 4 + byte] = bits


@kernel
def symmetric(values: Any, blocks: Any, middle: int) -> None:
    """Q4_0 and Q5_0: `middle` 8 and 16 is the code of 0; the number furthest from 0 has code 0."""
    offset, top = np.float32(middle + 0.5), np.float32(2 * middle - 1)
    lows, highs, steps, inverses, shifts = np.zeros((5, _TOGETHER), np.float32)
    for begin in range(0, len(values), _TOGETHER):
        end = min(begin + _TOGETHER, len(values))
        _ranges(values, begin, end, lows, highs)
        for i in range(end - begin):
            furthest = _furthest(values, begin + i, lows[i], highs[i])
            steps[i] = within_half(furthest / np.float32(-middle))
            store_half(blocks, begin + i, 0, steps[i])
        _inverses(steps, inverses)
        for i in range(_TOGETHER):
            # a step without an inverse: code 0 there
            shifts[i] = ZERO if inverses[i] == ZERO and steps[i] != ZERO else offset
            lows[i] = ZERO
        _write(values, begin, end, lows, inverses, shifts, top, blocks)


@kernel
def affine(values: Any, blocks: Any, top: int) -> None:
    """Q4_1 and Q5_1: codes from 0, the smallest number, to `top`, 15 and 31, the largest."""
    lows, highs, steps, inverses = np.zeros((4, _TOGETHER), np.float32)
    shifts = np.full(_TOGETHER, _HALF)
    for begin in range(0, len(values), _TOGETHER):
        end = min(begin + _TOGETHER, len(values))
        _ranges(values, begin, end, lows, highs)
        for i in range(end - begin):
            steps[i] = within_half((highs[i] - lows[i]) / np.float32(top))
            if lows[i] == ZERO:
                lows[i] = _first_zero(values, begin + i)
            store_half(blocks, begin + i, 0, steps[i])
            store_half(blocks, begin + i, 2, lows[i])
            lows[i] = within_half(lows[i])
        _inverses(steps, inverses)
        _write(values, begin, end, lows, inverses, shifts, np.float32(top), blocks)


@kernel
def nearest(values: Any, steps: Any, lows: Any, middle: Any, top: Any, has_low: bool, blocks: Any) -> None:
    """Blocks of the codes that are nearest under steps and lows fp32 [blocks], which fp16 can hold.

    `middle` is the code of a low; `has_low` where lows are stored.
    """
    step_of, low_of, inverses = np.zeros((3, _TOGETHER), np.float32)
    shifts = np.full(_TOGETHER, middle + _HALF)
    for begin in range(0, len(values), _TOGETHER):
        end = min(begin + _TOGETHER, len(values))
        for i in range(end - begin):
            step_of[i], low_of[i] = steps[begin + i], lows[begin + i]
            store_half(blocks, begin + i, 0, step_of[i])
            if has_low:
                store_half(blocks, begin + i, 2, low_of[i])
        _inverses(step_of, inverses)
        _write(values, begin, end, low_of, inverses, shifts, top, blocks)


@kernel
def eight_bits(values: Any, blocks: Any) -> None:
    """Q8_0: 127 is the absolute maximum; halves are rounded away from 0."""
    top = np.float32(127)
    lows, highs, steps, inverses = np.zeros((4, _TOGETHER), np.float32)
    for begin in range(0, len(values), _TOGETHER):
        end = min(begin + _TOGETHER, len(values))
        _ranges(values, begin, end, lows, highs)
        for i in range(end - begin):
            steps[i] = within_half(max(abs(lows[i]), abs(highs[i])) / top)
            store_half(blocks, begin + i, 0, steps[i])
        _inverses(steps, inverses)
        for block in range(begin, end):
            inverse = inverses[block - begin]
            for j in range(32):
                scaled = values[block, j] * inverse
                # the number before 1/2: 1/2 itself would round 0.49999997 up
                scaled = min(max(scaled + np.copysign(_BELOW_HALF, scaled), -top), top)
                blocks[block, 2 + j] = np.int32(scaled)
