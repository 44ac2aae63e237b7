"""bitsandbytes' 4-bit grids: 16 values, times the absolute maximum of a block.

The 16 values are NF4's or FP4's. The maxima are floats, or quantized again (double quantization):
w = codebook[q] * absmax(block), where then absmax = nested_codebook[a] * nested_absmax(256 blocks) + offset.
Dettmers et al. 2023 (QLoRA), section 3 and appendix E. Fit and encode are bitsandbytes' own; the decoder
is ours.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch

from qexport.grids.bitsandbytes_import import bitsandbytes_functional

BLOCK = 64
NESTED_BLOCK = 256


@dataclass(frozen=True)
class NestedAbsmax:
    """Maxima of blocks, quantized to 8 bits themselves.

    `codes` uint8 [blocks]; `codebook` fp32 [256]; `absmax` fp32 [ceil(blocks/block)].
    """

    codes: torch.Tensor
    codebook: torch.Tensor
    absmax: torch.Tensor
    offset: float
    block: int = NESTED_BLOCK


Absmax = TypeVar("Absmax", bound=torch.Tensor | NestedAbsmax, covariant=True)


@dataclass(frozen=True)
class Bnb4Codes(Generic[Absmax]):
    """A tensor on the grid, in bitsandbytes' terms.

    `packed` uint8 [ceil(n/2)], the first value of a pair in the high bits; `absmax` [blocks], floats or
    nested; `codebook` fp32 [16]. `dtype` is that of the tensor that was quantized.
    """

    packed: torch.Tensor
    absmax: Absmax
    codebook: torch.Tensor
    shape: tuple[int, ...]
    dtype: torch.dtype
    block: int = BLOCK


@dataclass(frozen=True)
class Bnb4Grid:
    """Fits NF4 with double quantization, with nothing to choose; decodes all kinds."""

    bits: int = 4

    def quantize(self, weight: torch.Tensor) -> Bnb4Codes[NestedAbsmax]:
        """The nearest NF4 codes of `weight` (any shape; 16- or 32-bit floats), by bitsandbytes."""
        functional = bitsandbytes_functional()
        packed, state = functional.quantize_4bit(
            weight.contiguous(), blocksize=BLOCK, compress_statistics=True, quant_type="nf4"
        )
        nested = NestedAbsmax(
            state.absmax, state.state2.code.float(), state.state2.absmax, float(state.offset)
        )
        return Bnb4Codes(packed.reshape(-1), nested, state.code.float(), tuple(weight.shape), weight.dtype)

    def decode(self, codes: Bnb4Codes[torch.Tensor | NestedAbsmax]) -> torch.Tensor:
        """The weights fp32, in `codes.shape`, that the codes stand for."""
        count = math.prod(codes.shape)
        absmax = codes.absmax
        if isinstance(absmax, NestedAbsmax):
            nested = absmax.codebook[absmax.codes.long()]
            absmax = nested * _spread(absmax.absmax, absmax.block, len(nested)) + absmax.offset
        pairs = torch.stack((codes.packed >> 4, codes.packed & 15), dim=1).reshape(-1)[:count]
        values = codes.codebook[pairs.long()] * _spread(absmax, codes.block, count)
        return values.reshape(codes.shape)


def _spread(scales: torch.Tensor, block: int, count: int) -> torch.Tensor:
    """Each scale repeated for its block of values; the last block may be short, and so the only one."""
    return scales.float().repeat_interleave(min(block, count))[:count]
