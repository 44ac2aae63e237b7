"""ggml's ternary types, TQ1_0 and TQ2_0: super-blocks of 256 weights that are -d, 0 or d, d an fp16 number.

TQ1_0 holds five codes of base 3 a byte, as a fraction of 256; TQ2_0 four of two bits. d is the absolute
maximum: these types are for models trained to be ternary (BitNet b1.58), and importance has no say, as in
llama.cpp. Source: ggml-quants.c, quantize_row_tq1_0_ref and quantize_row_tq2_0_ref; the bytes are theirs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch

from qexport.grids.ggml import blocks as layout
from qexport.grids.ggml.blocks import as_rows, cut, half_bytes, halves, in_blocks, kernels, reciprocal
from qexport.grids.ggml.device.blocks import by_rows
from qexport.grids.ggml.device.halves import half
from qexport.grids.ggml.device.ternary import codes_and_steps
from qexport.grids.ggml.types import Affine, Decoder, Encoder

_WIDTH = 256
_POWERS = (81, 27, 9, 3, 1)
# TQ1_0's bytes are made of codes that lie this far apart: 32 bytes of five codes, 16 of five, 4 of four
_PARTS = ((32, 5), (16, 5), (4, 4))


@dataclass(frozen=True)
class Ternary:
    """TQ1_0 (`base_three`) or TQ2_0. An `Affine` whose scales are the fp16 `d` [rows, groups]."""

    base_three: bool
    width: int = _WIDTH
    bits: int = 2

    @property
    def size(self) -> int:
        """Bytes of a block: codes, and d at the end."""
        return 54 if self.base_three else 66

    def encode(self, weight: torch.Tensor, importance: torch.Tensor | None) -> torch.Tensor:
        """See `Encoder`. A d beyond fp16 becomes its largest number."""
        if layout.in_torch(weight):
            return by_rows(weight, _WIDTH, self.size, self._encode_in_torch)
        values = in_blocks(weight, _WIDTH)
        blocks = np.empty((len(values), self.size), np.uint8)
        found = kernels("ternary_kernels")
        (found.base_three if self.base_three else found.two_bits)(values, blocks)
        return as_rows(blocks, len(weight))

    def _encode_in_torch(self, values: torch.Tensor) -> torch.Tensor:
        """Blocks uint8 [rows, bytes] of fp32 [rows, groups, 256]."""
        codes, steps = codes_and_steps(values)
        return self.pack(codes.flatten(1), half(steps).half())

    def decode(self, blocks: torch.Tensor) -> torch.Tensor:
        """See `Decoder`."""
        parts = cut(blocks, self.size)
        signs = self._codes(parts[..., :-2]).float() - 1
        return (signs * halves(parts[..., -2:])).reshape(len(blocks), -1)

    def fit(self, weight: torch.Tensor, importance: torch.Tensor | None) -> torch.Tensor:
        """The scales that `encode` stores."""
        parts = cut(self.encode(weight, importance), self.size)
        return parts[..., -2:].contiguous().view(torch.float16)[..., 0]

    def lines(self, scales: object) -> tuple[torch.Tensor, torch.Tensor]:
        """Steps, and the origin 0: the middle one of three codes is the value 0."""
        assert isinstance(scales, torch.Tensor)  # noqa: S101
        step = scales.float()
        return step, torch.zeros_like(step)

    def round(
        self, values: torch.Tensor, step: torch.Tensor, origin: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The nearest codes 0, 1 or 2, fp32, and what they stand for."""
        scaled = (values - origin) * reciprocal(step)
        signs = (scaled >= 0.5).float() - (scaled <= -0.5).float()
        return signs + 1, signs * step + origin

    def pack(self, codes: torch.Tensor, scales: object) -> torch.Tensor:
        """Codes as `round` has them, with their scales, as blocks."""
        assert isinstance(scales, torch.Tensor)  # noqa: S101
        rows, inputs = codes.shape
        codes = codes.to(torch.uint8).reshape(rows, inputs // _WIDTH, _WIDTH)
        packed = _join_base_three(codes) if self.base_three else _join_two_bits(codes)
        return torch.cat((packed, half_bytes(scales)), dim=-1).reshape(rows, -1)

    def _codes(self, parts: torch.Tensor) -> torch.Tensor:
        """Codes uint8 [rows, blocks, 256]."""
        if self.base_three:
            return _split_base_three(parts)
        shifts = _shifts(parts.device)
        return ((parts.reshape(*parts.shape[:-1], 2, 1, 32) >> shifts) & 3).flatten(-3)


def _shifts(device: torch.device) -> torch.Tensor:
    """0, 2, 4 and 6, uint8 [4, 1]."""
    return torch.arange(0, 8, 2, dtype=torch.uint8, device=device)[:, None]


def _join_two_bits(codes: torch.Tensor) -> torch.Tensor:
    shifted = codes.reshape(*codes.shape[:-1], 2, 4, 32) << _shifts(codes.device)
    return shifted.sum(dim=-2, dtype=torch.uint8).flatten(-2)


def _join_base_three(codes: torch.Tensor) -> torch.Tensor:
    parts, begin = [], 0
    for apart, count in _PARTS:
        joined = torch.zeros_like(codes[..., :apart], dtype=torch.int32)
        for place, power in enumerate(_POWERS[:count]):
            joined.add_(codes[..., begin + place * apart : begin + (place + 1) * apart], alpha=power)
        parts.append(joined)
        begin += apart * count
    # a number below 243 as a fraction of 256, rounded up: multiplied by 3, the next code is what overflows
    return ((torch.cat(parts, dim=-1) * 256 + 242) // 243).to(torch.uint8)


def _split_base_three(parts: torch.Tensor) -> torch.Tensor:
    found, begin = [], 0
    for apart, count in _PARTS:
        some = parts[..., begin : begin + apart]
        for power in _POWERS[::-1][:count]:
            shifted = some * power  # of the product, the low byte
            found.append(((shifted.short() * 3) >> 8).to(torch.uint8))
        begin += apart
    return torch.cat(found, dim=-1)


_TYPES: Mapping[str, Ternary] = {"tq1_0": Ternary(base_three=True), "tq2_0": Ternary(base_three=False)}
ENCODERS: Mapping[str, Encoder] = {name: kind.encode for name, kind in _TYPES.items()}
DECODERS: Mapping[str, Decoder] = {name: kind.decode for name, kind in _TYPES.items()}
AFFINE: Mapping[str, Affine] = _TYPES
