"""Encoders of TQ1_0 and TQ2_0, compiled: blocks uint8 [blocks, bytes] of `values` fp32 [blocks, 256]."""

from __future__ import annotations

from typing import Any

import numpy as np

from qexport.grids.ggml.compiled import ZERO, kernel, store_half, summing_kernel, within_half

_ONE = np.float32(1)
_HALF = np.float32(0.5)
_LARGEST = np.float32(3.4028235e38)


@summing_kernel
def _reach(values: Any, block: int) -> Any:
    """The absolute maximum."""
    low = high = values[block, 0]
    for j in range(256):
        low, high = min(low, values[block, j]), max(high, values[block, j])
    return max(-low, high)


@kernel
def _codes(values: Any, block: int, step: Any, codes: Any) -> None:
    """Codes 0, 1, 2 of -step, 0 and step; halves go away from 0."""
    inverse = _ONE / step
    inverse = inverse if inverse <= _LARGEST else ZERO
    for j in range(256):
        scaled = values[block, j] * inverse
        codes[j] = np.uint8(1) + np.uint8(scaled >= _HALF) - np.uint8(scaled <= -_HALF)


@kernel
def two_bits(values: Any, blocks: Any) -> None:
    """TQ2_0: codes that lie 32 apart share a byte."""
    codes = np.empty(256, np.uint8)
    for block in range(len(values)):
        step = within_half(abs(_reach(values, block)))
        _codes(values, block, step, codes)
        for side in range(2):
            for j in range(32):
                at = 128 * side + j
                blocks[block, 32 * side + j] = (
                    codes[at] | (codes[at + 32] << 2) | (codes[at + 64] << 4) | (codes[at + 96] << 6)
                )
        store_half(blocks, block, 64, step)


@kernel
def base_three(values: Any, blocks: Any) -> None:
    """TQ1_0: five codes a byte, the first one the most; the number as a fraction of 256, rounded up."""
    codes = np.empty(256, np.uint8)
    for block in range(len(values)):
        step = within_half(abs(_reach(values, block)))
        _codes(values, block, step, codes)
        begin, at = 0, 0
        for part in range(2):
            apart = 32 if part == 0 else 16
            for j in range(apart):
                joined = np.uint16(codes[at + j])
                for place in range(1, 5):
                    joined = np.uint16(joined * 3 + codes[at + place * apart + j])
                blocks[block, begin + j] = np.uint16((np.int32(joined) * 256 + 242) // 243)
            begin, at = begin + apart, at + 5 * apart
        for j in range(4):
            joined = np.uint16(codes[240 + j])
            for place in range(1, 4):
                joined = np.uint16(joined * 3 + codes[240 + place * 4 + j])
            blocks[block, 48 + j] = np.uint16((np.int32(joined) * 3 * 256 + 242) // 243)
        store_half(blocks, block, 52, step)
