"""ggml's first types: Q4_0, Q4_1, Q5_0, Q5_1 and Q8_0, blocks of 32 weights with fp16 scales of their own.

Q4_0, Q5_0: w = d (q - middle); Q4_1, Q5_1: w = d q + m; Q8_0: w = d q with q int8. Source: ggml-common.h.
Without importance (and Q8_0 always) the bytes are llama.cpp's; with importance, those of `legacy_search`.
Weights on a GPU have the same searches in torch (`device.legacy`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from qexport.grids.ggml import blocks as layout
from qexport.grids.ggml.blocks import (
    as_rows,
    cut,
    from_nibbles,
    half_bytes,
    halves,
    importance_of_blocks,
    in_blocks,
    kernels,
    nibbles,
    reciprocal,
)
from qexport.grids.ggml.device import legacy as device
from qexport.grids.ggml.device.blocks import by_rows
from qexport.grids.ggml.device.blocks import importance_of_blocks as importance_in_torch
from qexport.grids.ggml.device.halves import half
from qexport.grids.ggml.types import Affine, Decoder, Encoder

_WIDTH = 32


@dataclass(frozen=True)
class LegacyScales:
    """fp16 [rows, groups]: the steps `d` and the values `m` of code 0, None where code 0 follows from d."""

    d: torch.Tensor
    m: torch.Tensor | None


@dataclass(frozen=True)
class Legacy:
    """One of the types: `bits` a code, `has_low` where the value of code 0 is stored. An `Affine`."""

    bits: int
    has_low: bool
    width: int = _WIDTH

    @property
    def size(self) -> int:
        """Bytes of a block."""
        return self._scale_bytes + _WIDTH * self.bits // 8

    @property
    def _scale_bytes(self) -> int:
        return 4 if self.has_low else 2

    @property
    def _middle(self) -> int:
        """The code of the value 0, where it is the same for all blocks; of 8 bits, codes are signed."""
        return 0 if self.has_low or self.bits == 8 else 1 << (self.bits - 1)

    @property
    def _ends(self) -> tuple[int, int]:
        return (-128, 127) if self.bits == 8 else (0, (1 << self.bits) - 1)

    def encode(self, weight: torch.Tensor, importance: torch.Tensor | None) -> torch.Tensor:
        """See `Encoder`. Scales beyond fp16 become its largest number."""
        if layout.in_torch(weight):
            return by_rows(weight, _WIDTH, self.size, lambda some: self._encode_in_torch(some, importance))
        values = in_blocks(weight, _WIDTH)
        blocks = np.empty((len(values), self.size), np.uint8)
        plain = kernels("legacy_kernels")
        if self.bits == 8:
            plain.eight_bits(values, blocks)
        elif importance is not None:
            groups = importance_of_blocks(importance, weight.shape[1], _WIDTH)
            self._search(values, groups, blocks)
        elif self.has_low:
            plain.affine(values, blocks, self._ends[1])
        else:
            plain.symmetric(values, blocks, self._middle)
        return as_rows(blocks, len(weight))

    def _search(self, values: Any, groups: Any, blocks: Any) -> None:
        search, write = kernels("legacy_search"), kernels("legacy_kernels").nearest
        steps, lows = np.empty(len(values), np.float32), np.zeros(len(values), np.float32)
        if self.has_low:
            search.affine_steps(values, groups, _pairs_to_try(self._ends[1]), self._ends[1], lows, steps)
        else:
            search.symmetric_steps(values, groups, _codes_to_try(self._middle), self._middle, steps)
        write(values, steps, lows, np.float32(self._middle), np.float32(self._ends[1]), self.has_low, blocks)

    def _encode_in_torch(self, values: torch.Tensor, importance: torch.Tensor | None) -> torch.Tensor:
        """Blocks uint8 [rows, bytes] of fp32 [rows, groups, 32]."""
        top, middle = self._ends[1], self._middle
        if self.bits == 8:
            found = device.eight_bits(values)
        elif importance is None:
            found = device.affine(values, top) if self.has_low else device.symmetric(values, middle)
        else:
            inputs = values.shape[1] * _WIDTH
            weights = importance_in_torch(importance, inputs, _WIDTH, values.device)
            if self.has_low:
                found = device.affine_search(values, weights, _pairs_to_try(top).tolist(), top)
            else:
                found = device.symmetric_search(values, weights, _codes_to_try(middle).tolist(), middle)
        step, low = (half(numbers).half().squeeze(-1) for numbers in (found.steps, found.lows))
        return self.pack(found.codes.flatten(1), LegacyScales(step, low if self.has_low else None))

    def decode(self, blocks: torch.Tensor) -> torch.Tensor:
        """See `Decoder`."""
        parts = cut(blocks, self.size)
        scales = halves(parts[..., : self._scale_bytes])
        if self.bits == 8:
            values = parts[..., 2:].view(torch.int8).float()
        else:
            codes = nibbles(parts[..., -16:])
            if self.bits == 5:
                codes |= _spread_bits(parts[..., -20:-16]) << 4
            values = codes.float()
            if self._middle:
                values -= self._middle
        values *= scales[..., :1]
        if self.has_low:
            values += scales[..., 1:]
        return values.reshape(len(blocks), -1)

    def fit(self, weight: torch.Tensor, importance: torch.Tensor | None) -> LegacyScales:
        """The scales that `encode` stores."""
        parts = cut(self.encode(weight, importance), self.size)
        scales = parts[..., : self._scale_bytes].contiguous().view(torch.float16)
        return LegacyScales(scales[..., 0], scales[..., 1] if self.has_low else None)

    def lines(self, scales: object) -> tuple[torch.Tensor, torch.Tensor]:
        """Steps, and the values of code 0, or 0 where the codes' middle is the value 0."""
        assert isinstance(scales, LegacyScales)  # noqa: S101
        step = scales.d.float()
        return step, torch.zeros_like(step) if scales.m is None else scales.m.float()

    def round(
        self, values: torch.Tensor, step: torch.Tensor, origin: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The nearest codes, of 8 bits -128 to 127 and otherwise from 0, fp32, and what they stand for."""
        codes = (values - origin) * reciprocal(step)
        codes = codes.add_(self._middle + 0.5).floor_().clamp_(*self._ends)
        return codes, (codes - self._middle) * step + origin

    def pack(self, codes: torch.Tensor, scales: object) -> torch.Tensor:
        """Codes as `round` has them, with their scales, as blocks."""
        assert isinstance(scales, LegacyScales)  # noqa: S101
        rows, inputs = codes.shape
        parts = [half_bytes(scales.d)]
        if scales.m is not None:
            parts.append(half_bytes(scales.m))
        codes = codes.reshape(rows, inputs // _WIDTH, _WIDTH)
        if self.bits == 8:
            parts.append(codes.to(torch.int8).view(torch.uint8))
        else:
            codes = codes.to(torch.uint8)
            if self.bits == 5:
                parts.append(_join_bits(codes >> 4))
            parts.append(from_nibbles(codes))
        return torch.cat(parts, dim=-1).reshape(rows, -1)


def _spread_bits(parts: torch.Tensor) -> torch.Tensor:
    """Bytes uint8 [..., 4] -> their bits uint8 [..., 32], the lowest first."""
    bits = parts[..., None] >> torch.arange(8, dtype=torch.uint8, device=parts.device)
    return (bits & 1).flatten(-2)


def _join_bits(bits: torch.Tensor) -> torch.Tensor:
    """Bits uint8 [..., 32] -> bytes uint8 [..., 4], as `_spread_bits` reads them."""
    shifted = bits.reshape(*bits.shape[:-1], 4, 8) << torch.arange(8, dtype=torch.uint8, device=bits.device)
    return shifted.sum(dim=-1, dtype=torch.uint8)


@cache
def _codes_to_try(middle: int) -> npt.NDArray[np.float32]:
    """What the number furthest from 0 may be in steps: the codes' far end or beyond, or the near end."""
    far, near = -middle * np.geomspace(0.94, 2, 18), (middle - 1) * np.geomspace(0.97, 1.8, 10)
    return np.concatenate((far, near)).astype(np.float32)


@cache
def _pairs_to_try(top: int) -> npt.NDArray[np.float32]:
    """The codes [tries, 2] of the smallest and the largest number: so much beyond the ends, shared out."""
    pairs = [
        (-beyond * share, top + beyond * (1 - share))
        for beyond in np.linspace(-0.8, 6, 20) * top / 15
        for share in (0.05, 0.5, 0.95)
    ]
    return np.array(pairs, np.float32)


_TYPES: Mapping[str, Legacy] = {
    "q4_0": Legacy(4, has_low=False),
    "q4_1": Legacy(4, has_low=True),
    "q5_0": Legacy(5, has_low=False),
    "q5_1": Legacy(5, has_low=True),
    "q8_0": Legacy(8, has_low=False),
}
ENCODERS: Mapping[str, Encoder] = {name: kind.encode for name, kind in _TYPES.items()}
DECODERS: Mapping[str, Decoder] = {name: kind.decode for name, kind in _TYPES.items()}
AFFINE: Mapping[str, Affine] = _TYPES
