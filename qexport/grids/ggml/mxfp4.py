"""ggml's MXFP4: blocks of 32 FP4 numbers (E2M1) that share a power of two (E8M0).

OCP Microscaling Formats 1.0, as gguf-py and ggml encode it: the largest number's exponent less 2, and the
nearest levels; importance has no say. Levels here are twice E2M1's, and powers half of E8M0's, as in ggml.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch

from qexport.grids.ggml.blocks import as_rows, cut, from_nibbles, in_blocks, kernels, nibbles
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
        values = in_blocks(weight, _WIDTH)
        blocks = np.empty((len(values), _SIZE), np.uint8)
        kernels("mxfp4_kernels").blocks_of_32(values, _powers().numpy(), blocks)
        return as_rows(blocks, len(weight))

    def decode(self, blocks: torch.Tensor) -> torch.Tensor:
        """See `Decoder`."""
        parts = cut(blocks, _SIZE)
        values = torch.tensor(LEVELS, dtype=torch.float32)[nibbles(parts[..., 1:]).int()]
        return (values * _powers()[parts[..., :1].int()]).reshape(len(blocks), -1)

    def fit(self, weight: torch.Tensor, importance: torch.Tensor | None) -> torch.Tensor:
        """The exponents that `encode` stores."""
        return cut(self.encode(weight, importance), _SIZE)[..., 0].contiguous()

    def lines(self, scales: object) -> tuple[torch.Tensor, torch.Tensor]:
        """Steps, powers of two; the origin is 0."""
        assert isinstance(scales, torch.Tensor)  # noqa: S101
        step = _powers()[scales.int()]
        return step, torch.zeros_like(step)

    def round(
        self, values: torch.Tensor, step: torch.Tensor, origin: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The places of the nearest levels, uint8, and what they stand for; origin 0. Halves go towards 0."""
        levels = torch.tensor(LEVELS[:8], dtype=torch.float32)
        places = torch.bucketize((values / step).abs_(), (levels[1:] + levels[:-1]) / 2, out_int32=True)
        rounded = torch.copysign(levels[places], values)
        codes = torch.where((values < 0) & (places > 0), places + 8, places).to(torch.uint8)
        return codes, rounded * step + origin

    def pack(self, codes: torch.Tensor, scales: object) -> torch.Tensor:
        """Codes as `round` has them, with their exponents, as blocks."""
        assert isinstance(scales, torch.Tensor)  # noqa: S101
        rows, inputs = codes.shape
        pairs = from_nibbles(codes.to(torch.uint8).reshape(rows, inputs // _WIDTH, _WIDTH))
        return torch.cat((scales[..., None], pairs), dim=-1).reshape(rows, -1)


@cache
def _powers() -> torch.Tensor:
    """2^(e - 128) for every exponent e, fp32 [256]; the first is subnormal."""
    return torch.ldexp(torch.ones(256, dtype=torch.float64), torch.arange(256) - 128).float()


_TYPE = Mxfp4()
ENCODERS: Mapping[str, Encoder] = {"mxfp4": _TYPE.encode}
DECODERS: Mapping[str, Decoder] = {"mxfp4": _TYPE.decode}
AFFINE: Mapping[str, Affine] = {"mxfp4": _TYPE}
