"""ggml's MXFP4: blocks of 32 FP4 numbers (E2M1) that share a power of two (E8M0).

OCP Microscaling Formats 1.0, as gguf-py and ggml encode it: the largest number's exponent less 2, and the
nearest levels; importance has no say. Levels here are twice E2M1's, and powers half of E8M0's, as in ggml.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch

from qexport.grids.ggml import blocks as layout
from qexport.grids.ggml.blocks import as_rows, cut, from_nibbles, in_blocks, kernels, nibbles
from qexport.grids.ggml.device.blocks import by_rows
from qexport.grids.ggml.device.mxfp4 import exponents
from qexport.grids.ggml.types import Affine, Decoder, Encoder

LEVELS = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)
_WIDTH = 32
_SIZE = 17


@dataclass(frozen=True)
class Mxfp4:
    """The type as an `Affine`: codes are places in `LEVELS`; scales, uint8 [rows, groups], are exponents."""

    width: int = _WIDTH
    bits: int = 4

    def encode(self, weight: torch.Tensor, importance: torch.Tensor | None) -> torch.Tensor:
        """See `Encoder`."""
        if layout.in_torch(weight):
            return by_rows(weight, _WIDTH, _SIZE, self._encode_in_torch)
        values = in_blocks(weight, _WIDTH)
        blocks = np.empty((len(values), _SIZE), np.uint8)
        kernels("mxfp4_kernels").blocks_of_32(values, _powers(torch.arange(256)).numpy(), blocks)
        return as_rows(blocks, len(weight))

    def _encode_in_torch(self, values: torch.Tensor) -> torch.Tensor:
        """Blocks uint8 [rows, bytes] of fp32 [rows, groups, 32]."""
        scales = exponents(values)
        step, origin = self.lines(scales[..., None])
        return self.pack(self.round(values, step, origin)[0].flatten(1), scales)

    def decode(self, blocks: torch.Tensor) -> torch.Tensor:
        """See `Decoder`."""
        parts = cut(blocks, _SIZE)
        levels = torch.tensor(LEVELS, dtype=torch.float32).to(blocks.device)
        values = levels[nibbles(parts[..., 1:]).int()]
        return (values * _powers(parts[..., :1])).reshape(len(blocks), -1)

    def fit(self, weight: torch.Tensor, importance: torch.Tensor | None) -> torch.Tensor:
        """The exponents that `encode` stores."""
        return cut(self.encode(weight, importance), _SIZE)[..., 0].contiguous()

    def lines(self, scales: object) -> tuple[torch.Tensor, torch.Tensor]:
        """Steps, powers of two; the origin is 0."""
        assert isinstance(scales, torch.Tensor)  # noqa: S101
        step = _powers(scales)
        return step, torch.zeros_like(step)

    def round(
        self, values: torch.Tensor, step: torch.Tensor, origin: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The places of the nearest levels, uint8, and what they stand for; origin 0. Halves go towards 0."""
        size = (values / step).abs_()
        # levels lie 1 apart up to 4, and then 2, 2 and 4; without a table, for that would lie on some device
        places = size.clamp(max=4).sub_(0.5).ceil_()
        levels = places.clone()
        for border, apart in ((5, 2), (7, 2), (10, 4)):
            beyond = size > border
            places += beyond
            levels.add_(beyond, alpha=apart)
        codes = places.add_((values < 0) & (places > 0), alpha=8).to(torch.uint8)
        return codes, torch.copysign(levels, values).mul_(step).add_(origin)

    def pack(self, codes: torch.Tensor, scales: object) -> torch.Tensor:
        """Codes as `round` has them, with their exponents, as blocks."""
        assert isinstance(scales, torch.Tensor)  # noqa: S101
        rows, inputs = codes.shape
        pairs = from_nibbles(codes.to(torch.uint8).reshape(rows, inputs // _WIDTH, _WIDTH))
        return torch.cat((scales[..., None], pairs), dim=-1).reshape(rows, -1)


def _powers(exponents: torch.Tensor) -> torch.Tensor:
    """2^(e - 128), fp32, of exponents e from 0 to 255; the first two are subnormal numbers."""
    exponents = exponents.int()
    bits = torch.where(exponents < 2, (exponents + 1) << 21, (exponents - 1) << 23)
    return bits.view(torch.float32)


_TYPE = Mxfp4()
ENCODERS: Mapping[str, Encoder] = {"mxfp4": _TYPE.encode}
DECODERS: Mapping[str, Decoder] = {"mxfp4": _TYPE.decode}
AFFINE: Mapping[str, Affine] = {"mxfp4": _TYPE}
