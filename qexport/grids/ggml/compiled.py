"""numba, typed, and what several kernels here share: fp16 numbers by hand, for numba has none on CPUs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import numba
import numpy as np

Function = TypeVar("Function", bound=Callable[..., Any])


def compiled(*fastmath: str) -> Callable[[Function], Function]:
    """numba's njit for a kernel that runs without the interpreter's lock, and may round as `fastmath` says.

    What it makes is kept on disk for the next process, where there is a place for it.
    """

    def decorate(function: Function) -> Function:
        options: dict[str, Any] = {"nogil": True, "error_model": "numpy", "fastmath": set(fastmath)}
        try:
            made: Function = numba.njit(cache=True, **options)(function)
        except RuntimeError:  # neither the package's directory nor the user's cache can be written
            made = numba.njit(**options)(function)
        return made

    return decorate


kernel = compiled()  # arithmetic as written
# sums in any order; the sign of a zero is not kept, and no number is NaN: sums and maxima lie in registers
summing_kernel = compiled("reassoc", "contract", "nsz", "nnan")

_LARGEST = np.float32(65504)
_OVERFLOW = np.float32(65520)  # the smallest number that fp16 rounds to infinity
_SMALLEST_NORMAL = np.float32(2**-14)
_SMALLEST = np.float32(2**-24)
_SUBNORMAL_SHIFT = np.float32(0.5)  # fp32 has the spacing of fp16's subnormals there
_SUBNORMALS = np.float32(2**24)  # in a whole
_EXPONENT_SHIFT = np.int32(112 << 23)
ZERO = np.float32(0)


@kernel
def within_half(value: Any) -> Any:
    """A number fp32, or fp16's largest of that sign where fp16 would round it to infinity."""
    if value >= _OVERFLOW:
        return _LARGEST
    return -_LARGEST if value <= -_OVERFLOW else value


@kernel
def half(value: Any) -> Any:
    """The fp32 value of the nearest fp16, ties to even; never infinite."""
    size = abs(np.float32(value))
    if size >= _LARGEST:
        size = _LARGEST
    elif size < _SMALLEST_NORMAL:
        size = (size + _SUBNORMAL_SHIFT) - _SUBNORMAL_SHIFT
    else:
        bits = np.float32(size).view(np.int32)
        bits = np.int32((bits + 0xFFF + ((bits >> 13) & 1)) & -8192)
        size = np.int32(bits).view(np.float32)
    return np.float32(np.copysign(size, value))


@kernel
def half_not_zero(value: Any) -> Any:
    """As `half`, but fp16's smallest number of that sign where the nearest is 0."""
    rounded = half(value)
    return rounded if rounded != ZERO else np.float32(np.copysign(_SMALLEST, value))


@kernel
def store_half(blocks: Any, block: int, place: int, value: Any) -> None:
    """Write the nearest fp16 to two bytes of block number `block`, the low one first."""
    rounded = half(value)
    size = abs(np.float32(rounded))
    if size < _SMALLEST_NORMAL:
        bits = np.int32(size * _SUBNORMALS)
    else:
        bits = np.int32((np.float32(size).view(np.int32) - _EXPONENT_SHIFT) >> 13)
    if np.float32(rounded).view(np.int32) < 0:
        bits |= 0x8000
    blocks[block, place] = np.uint8(bits & 0xFF)
    blocks[block, place + 1] = np.uint8(bits >> 8)
