"""b-bit codes in int32 words, lowest bits first, without gaps: the packing of GPTQ's tensors.

A code may straddle two words (3-bit: codes 10 and 21 of each 32), as in AutoGPTQ's own layout.
"""

from __future__ import annotations

import torch


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """`codes` uint8 [n, m], each below 2^bits -> int32 [n * bits / 32, m], packed along dim 0.

    n * bits must be a multiple of 32.
    """
    if bits in (2, 4, 8):
        return _pack_whole(codes, bits)
    rows, columns = codes.shape
    places = torch.arange(bits, dtype=torch.uint8)[None, :, None]
    stream = ((codes[:, None, :] >> places) & 1).reshape(rows * bits // 32, 32, columns)
    words = torch.zeros(rows * bits // 32, columns, dtype=torch.int64)
    for place in range(32):
        words |= stream[:, place].long() << place
    return _as_int32(words)


def unpack(words: torch.Tensor, bits: int) -> torch.Tensor:
    """The inverse of `pack`: int32 [k, m] -> uint8 [k * 32 / bits, m]."""
    rows, columns = words.shape
    places = torch.arange(32, dtype=torch.int32)[None, :, None]
    stream = ((words[:, None, :] >> places) & 1).to(torch.uint8)
    groups = stream.reshape(rows * 32 // bits, bits, columns)
    codes = torch.zeros(rows * 32 // bits, columns, dtype=torch.uint8)
    for place in range(bits):
        codes |= groups[:, place] << place
    return codes


def _pack_whole(codes: torch.Tensor, bits: int) -> torch.Tensor:
    each = 32 // bits
    grouped = codes.reshape(-1, each, codes.shape[1])
    words = torch.zeros(len(grouped), codes.shape[1], dtype=torch.int64)
    for place in range(each):
        words |= grouped[:, place].long() << (place * bits)
    return _as_int32(words)


def _as_int32(words: torch.Tensor) -> torch.Tensor:
    """Unsigned 32-bit values in int64 -> the int32 with the same bits."""
    return torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)
