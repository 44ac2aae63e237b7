"""K-quants' bytes: super-blocks of 256 weights to codes and scales, and back.

w = d level q - dmin minlevel for q2_k, q4_k and q5_k; w = d level q, both signed, for q3_k and q6_k.
A level is a sub-block's, d and dmin are the super-block's, fp16. Bytes are those of ggml-common.h:

    q2_k   level | minlevel << 4 [16], codes of 2 bits [64], d, dmin
    q3_k   codes' highest bit [32], lower 2 bits [64], levels of 6 bits [12], d
    q4_k   d, dmin, levels and minlevels of 6 bits [12], codes of 4 bits [128]
    q5_k   d, dmin, levels and minlevels of 6 bits [12], codes' highest bit [32], lower 4 bits [128]
    q6_k   codes' lower 4 bits [128], higher 2 bits [64], levels int8 [16], d

Fields of less than a byte lie side by side as in `_split`. Codes here are from 0 on, uint8 [blocks, 256].
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from qexport.errors import SpecError
from qexport.grids.ggml import blocks as shared

SUPER = 256


@dataclass(frozen=True)
class KScales:
    """Scales of rows of super-blocks.

    `d` fp16 [rows, super-blocks]; `levels` int8 [rows, sub-blocks]. `dmin` and `minlevels` likewise, None
    where the type has no minima.
    """

    d: torch.Tensor
    levels: torch.Tensor
    dmin: torch.Tensor | None = None
    minlevels: torch.Tensor | None = None


def pack_q2_k(codes: torch.Tensor, scales: KScales) -> torch.Tensor:
    """Blocks uint8 [blocks, 84] of codes 0..3 and scales of [blocks, 1] and [blocks, 16]."""
    levels, minlevels = _bytes(scales.levels), _bytes(_given(scales.minlevels))
    return torch.cat(
        (
            levels | (minlevels << 4),
            _join(codes, 0, 2),
            _halves(scales.d),
            _halves(_given(scales.dmin)),
        ),
        dim=1,
    )


def unpack_q2_k(blocks: torch.Tensor) -> tuple[torch.Tensor, KScales]:
    """The codes and scales of blocks uint8 [blocks, 84]."""
    levels, codes, d, dmin = _cut(blocks, (16, 64, 2, 2))
    scales = KScales(_floats(d), _signed(levels & 15), _floats(dmin), _signed(levels >> 4))
    return _split(codes.reshape(-1, 2, 32), 2), scales


def pack_q3_k(codes: torch.Tensor, scales: KScales) -> torch.Tensor:
    """Blocks uint8 [blocks, 110] of codes 0..7 and scales of [blocks, 1] and [blocks, 16]."""
    levels = _bytes(scales.levels + 32)
    higher = (levels >> 4).view(-1, 4, 4)
    return torch.cat(
        (
            _join(codes, 2, 1),
            _join(codes, 0, 2),
            (levels[:, :8] & 15) | (levels[:, 8:] << 4),
            higher[:, 0] | (higher[:, 1] << 2) | (higher[:, 2] << 4) | (higher[:, 3] << 6),
            _halves(scales.d),
        ),
        dim=1,
    )


def unpack_q3_k(blocks: torch.Tensor) -> tuple[torch.Tensor, KScales]:
    """The codes and scales of blocks uint8 [blocks, 110]."""
    high, low, levels, higher, d = _cut(blocks, (32, 64, 8, 4, 2))
    codes = _split(low.reshape(-1, 2, 32), 2) | (_split(high.reshape(-1, 1, 32), 1) << 2)
    joined = _split(levels.reshape(-1, 1, 8), 4) | (_split(higher.reshape(-1, 1, 4), 2) << 4)
    return codes, KScales(_floats(d), _signed(joined) - 32)


def pack_q4_k(codes: torch.Tensor, scales: KScales) -> torch.Tensor:
    """Blocks uint8 [blocks, 144] of codes 0..15 and scales of [blocks, 1] and [blocks, 8]."""
    return torch.cat((_head(scales), _join(codes, 0, 4)), dim=1)


def unpack_q4_k(blocks: torch.Tensor) -> tuple[torch.Tensor, KScales]:
    """The codes and scales of blocks uint8 [blocks, 144]."""
    head, codes = _cut(blocks, (16, 128))
    return _split(codes.reshape(-1, 4, 32), 4), _head_scales(head)


def pack_q5_k(codes: torch.Tensor, scales: KScales) -> torch.Tensor:
    """Blocks uint8 [blocks, 176] of codes 0..31 and scales of [blocks, 1] and [blocks, 8]."""
    high = _join(codes, 4, 1)
    return torch.cat((_head(scales), high, _join(codes, 0, 4)), dim=1)


def unpack_q5_k(blocks: torch.Tensor) -> tuple[torch.Tensor, KScales]:
    """The codes and scales of blocks uint8 [blocks, 176]."""
    head, high, low = _cut(blocks, (16, 32, 128))
    codes = _split(low.reshape(-1, 4, 32), 4) | (_split(high.reshape(-1, 1, 32), 1) << 4)
    return codes, _head_scales(head)


def pack_q6_k(codes: torch.Tensor, scales: KScales) -> torch.Tensor:
    """Blocks uint8 [blocks, 210] of codes 0..63 and scales of [blocks, 1] and [blocks, 16]."""
    return torch.cat(
        (
            _join(codes, 0, 4, 64),
            _join(codes, 4, 2),
            _bytes(scales.levels),
            _halves(scales.d),
        ),
        dim=1,
    )


def unpack_q6_k(blocks: torch.Tensor) -> tuple[torch.Tensor, KScales]:
    """The codes and scales of blocks uint8 [blocks, 210]."""
    low, high, levels, d = _cut(blocks, (128, 64, 16, 2))
    codes = _split(low.reshape(-1, 2, 64), 4) | (_split(high.reshape(-1, 2, 32), 2) << 4)
    return codes, KScales(_floats(d), _signed(levels))


def _head(scales: KScales) -> torch.Tensor:
    """What q4_k and q5_k begin with: d, dmin, and 8 levels and minlevels of 6 bits in 12 bytes.

    The first four have their 6 bits in bytes 0 to 3 (minlevels: 4 to 7); of the others, the lower 4 bits are
    in bytes 8 to 11, and the higher 2 are above the first four's.
    """
    levels, minlevels = _bytes(scales.levels), _bytes(_given(scales.minlevels))
    first = levels[:, :4] | (levels[:, 4:] >> 4 << 6)
    second = minlevels[:, :4] | (minlevels[:, 4:] >> 4 << 6)
    third = (levels[:, 4:] & 15) | (minlevels[:, 4:] << 4)
    return torch.cat((_halves(scales.d), _halves(_given(scales.dmin)), first, second, third), dim=1)


def _head_scales(head: torch.Tensor) -> KScales:
    d, dmin, first, second, third = _cut(head, (2, 2, 4, 4, 4))
    levels = torch.cat((first & 63, (third & 15) | (first >> 6 << 4)), dim=1)
    minlevels = torch.cat((second & 63, (third >> 4) | (second >> 6 << 4)), dim=1)
    return KScales(_floats(d), _signed(levels), _floats(dmin), _signed(minlevels))


def _join(codes: torch.Tensor, shift: int, bits: int, width: int = 32) -> torch.Tensor:
    """Packs `bits` of codes uint8 [blocks, 256], from bit `shift` on: [blocks, 32 * bits].

    Of 8 // bits runs of `width` codes, the first lies in the lowest bits of `width` bytes, the next above it;
    then the same with the runs that follow. `_split` is the way back.
    """
    if shared.in_torch(codes):
        runs = ((codes >> shift) & (2**bits - 1)).view(len(codes), -1, 8 // bits, width)
        joined: torch.Tensor = runs[:, :, 0]
        for run in range(1, 8 // bits):
            joined = joined | (runs[:, :, run] << (run * bits))
        return joined.flatten(1)
    packed = torch.empty(len(codes), SUPER * bits // 8, dtype=torch.uint8)
    shared.kernels("k_search").join(
        codes.numpy().view("u8"),
        np.uint64(shift),
        bits,
        np.uint64((2**bits - 1) * 0x0101_0101_0101_0101),
        width // 8,
        packed.numpy().view("u8"),
    )
    return packed


def _split(packed: torch.Tensor, bits: int) -> torch.Tensor:
    """Bytes [blocks, parts, n] -> their fields [blocks, parts * (8 // bits) * n], the lowest first."""
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=packed.device)
    fields = (packed[:, :, None] >> shifts[:, None]) & (2**bits - 1)
    joined: torch.Tensor = fields.flatten(1)
    return joined


def _bytes(levels: torch.Tensor) -> torch.Tensor:
    return levels.contiguous().view(torch.uint8)


def _signed(levels: torch.Tensor) -> torch.Tensor:
    return levels.contiguous().view(torch.int8)


def _halves(steps: torch.Tensor) -> torch.Tensor:
    return _fresh(steps).view(torch.uint8)


def _floats(packed: torch.Tensor) -> torch.Tensor:
    return _fresh(packed).view(torch.float16)


def _cut(blocks: torch.Tensor, sizes: tuple[int, ...]) -> tuple[torch.Tensor, ...]:
    return torch.split(blocks, list(sizes), dim=1)


def _fresh(part: torch.Tensor) -> torch.Tensor:
    """A copy: of a slice with one row, torch says that it is contiguous, and yet cannot view it otherwise."""
    return part.clone(memory_format=torch.contiguous_format)


def _given(part: torch.Tensor | None) -> torch.Tensor:
    """A part that this type's scales have."""
    if part is None:
        raise SpecError("scales without minima", expected="minima: this type has them")
    return part
