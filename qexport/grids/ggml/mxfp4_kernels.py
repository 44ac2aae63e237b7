"""The encoder of MXFP4, compiled."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from qexport.grids.ggml.compiled import ZERO, kernel, summing_kernel

# borders between levels, in steps: on a border, the level nearer to 0 is taken
_BORDERS = tuple(np.float32(border) for border in (0.5, 1.5, 2.5, 3.5, 5, 7, 10))
_NEARLY_TWO = np.int32(0x7FFF00)  # fractions from here on may have their logarithm rounded up


@summing_kernel
def _reach(values: Any, block: int) -> Any:
    """The absolute maximum."""
    low = high = values[block, 0]
    for j in range(32):
        low, high = min(low, values[block, j]), max(high, values[block, j])
    return max(-low, high)


@kernel
def _exponent(size: Any) -> Any:
    """floor(log2(size)) + 125, the logarithm in fp32 as in ggml; from 0 on."""
    bits = np.float32(size).view(np.int32)
    exponent = (bits >> 23) - 127
    if bits & 0x7FFFFF >= _NEARLY_TWO:
        exponent = math.floor(np.float32(math.log2(np.float64(size))))
    return max(exponent + 125, 0)


@kernel
def blocks_of_32(values: Any, powers: Any, blocks: Any) -> None:
    """Blocks uint8 [blocks, 17] of `values` fp32 [blocks, 32]; `powers` fp32 [256]: steps by exponent."""
    for block in range(len(values)):
        exponent = _exponent(abs(_reach(values, block)))
        step = powers[exponent]
        b0, b1, b2, b3 = step * _BORDERS[0], step * _BORDERS[1], step * _BORDERS[2], step * _BORDERS[3]
        b4, b5, b6 = step * _BORDERS[4], step * _BORDERS[5], step * _BORDERS[6]
        blocks[block, 0] = exponent
        for j in range(16):
            joined = np.int32(0)
            for side in range(2):
                value = values[block, j + 16 * side]
                size = abs(value)
                code = np.int32(size > b0) + np.int32(size > b1) + np.int32(size > b2) + np.int32(size > b3)
                code += np.int32(size > b4) + np.int32(size > b5) + np.int32(size > b6)
                code += np.int32(8) if value < ZERO and size > b0 else np.int32(0)
                joined |= code << (4 * side)
            blocks[block, 1 + j] = joined
