"""b-bit codes in int32 words, lowest bits first, without gaps: what GPTQ's tensors, compressed-tensors' and
MLX's have in common.

A code may straddle two words (3-bit: codes 10 and 21 of each 32), as in AutoGPTQ's own layout. `pack` goes
along the first side, as GPTQ does; `pack_rows` along the second, as compressed-tensors and MLX do. Both work
in pieces that stay in the processor's cache.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch

_PIECE = 1 << 18  # bytes of codes at a time


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """`codes` uint8 [n, m], each below 2^bits -> int32 [n * bits / 32, m], packed along dim 0.

    n * bits must be a multiple of 32.
    """
    columns = codes.shape[1]
    period = _period(bits)
    grouped = codes.reshape(-1, period, columns)
    words = torch.zeros(len(grouped), period * bits // 32, columns, dtype=torch.int32)
    for piece in _pieces(len(grouped), period * columns):
        for place in range(period):
            word, shift = divmod(place * bits, 32)
            value = grouped[piece, place].to(torch.int32)
            words[piece, word] |= value << shift
            if shift + bits > 32:
                words[piece, word + 1] |= value >> (32 - shift)
    return words.reshape(-1, columns)


def unpack(words: torch.Tensor, bits: int) -> torch.Tensor:
    """The inverse of `pack`: int32 [k, m] -> uint8 [k * 32 / bits, m]."""
    columns = words.shape[1]
    period = _period(bits)
    grouped = words.reshape(-1, period * bits // 32, columns)
    codes = torch.empty(len(grouped), period, columns, dtype=torch.uint8)
    top = (1 << bits) - 1
    for piece in _pieces(len(grouped), period * columns):
        for place in range(period):
            word, shift = divmod(place * bits, 32)
            value = grouped[piece, word] >> shift  # fills up with the sign, which `top` cuts off
            if (over := shift + bits - 32) > 0:
                value = (value & ((1 << (bits - over)) - 1)) | (grouped[piece, word + 1] << (bits - over))
            codes[piece, place] = value & top
    return codes.reshape(-1, columns)


def pack_rows(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """`codes` uint8 [n, m], each below 2^bits -> int32 [n, m * bits / 32], packed along dim 1.

    m * bits must be a multiple of 32, and m one of 8. Eight codes are taken for one 64-bit number, whose
    bits are pushed together in three steps: in pairs, in fours, all eight.
    """
    rows, columns = codes.shape
    packed = torch.empty(rows, columns * bits // 8, dtype=torch.uint8)
    source = _flat(codes).view(torch.int64)
    target = packed.view(-1, bits)
    for piece in _pieces(len(source), 8):
        value = source[piece]
        for shift, low, high in _folds(bits):
            value = ((value >> shift) & high).bitwise_or_(value & low)
        target[piece] = value.view(torch.uint8).view(-1, 8)[:, :bits]
    return packed.view(torch.int32)


def unpack_rows(words: torch.Tensor, bits: int) -> torch.Tensor:
    """The inverse of `pack_rows`: int32 [n, k] -> uint8 [n, k * 32 / bits]; k * 4 is a multiple of `bits`."""
    rows, count = words.shape
    codes = torch.zeros(rows, count * 32 // bits, dtype=torch.uint8)
    source = _flat(words).view(torch.uint8).view(-1, bits)
    target = codes.view(-1, 8)
    for piece in _pieces(len(source), 8):
        target[piece, :bits] = source[piece]
        value = target[piece].view(torch.int64).view(-1)
        for shift, low, high in reversed(_folds(bits)):
            value = ((value & high) << shift).bitwise_or_(value & low)
        target[piece] = value.view(torch.uint8).view(-1, 8)
    return codes


def _flat(values: torch.Tensor) -> torch.Tensor:
    """The values in a row, at a place in memory where they may be taken for 64-bit numbers."""
    flat = values.reshape(-1)
    return flat.clone() if flat.storage_offset() * flat.itemsize % 8 else flat


def _period(bits: int) -> int:
    """Codes after which a word begins with a code again."""
    return 32 // math.gcd(bits, 32)


def _folds(bits: int) -> list[tuple[int, int, int]]:
    """The steps of `pack_rows`: how far the upper half of each lane moves down to the lower one, and where
    both are then. Lanes are 16, 32 and 64 bits wide."""
    steps: list[tuple[int, int, int]] = []
    for codes in (1, 2, 4):  # in half a lane
        used, lane = codes * bits, codes * 16
        low = (1 << used) - 1
        steps.append((lane // 2 - used, _repeated(low, lane), _repeated(low << used, lane)))
    return steps


def _repeated(mask: int, width: int) -> int:
    """`mask` in every lane of `width` bits of a signed 64-bit number."""
    whole = sum(mask << place for place in range(0, 64, width))
    return whole - (1 << 64) if whole >> 63 else whole


def _pieces(count: int, each: int) -> Iterator[slice]:
    """Slices of `count` items of `each` bytes, about _PIECE bytes a slice."""
    step = max(_PIECE // max(each, 1), 1)
    return (slice(begin, begin + step) for begin in range(0, count, step))
