"""QLoRA's grid: 4-bit NormalFloat in blocks of 64, their maxima quantized again (double quantization).

Dettmers et al. 2023, section 3 and appendix E. w = codebook[q] * absmax(block), where
absmax = nested_codebook[a] * nested_absmax(256 blocks) + offset. Fit and encode are bitsandbytes' own;
the decoder is ours.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from qexport.grids.bitsandbytes_import import bitsandbytes_functional

BLOCK = 64
NESTED_BLOCK = 256


@dataclass(frozen=True)
class Nf4Codes:
    """A tensor on the grid, in bitsandbytes' terms.

    `packed` uint8 [ceil(n/2)], the first value of a pair in the high bits; `absmax` uint8 [blocks];
    `codebook` fp32 [16]; `nested_absmax` fp32 [ceil(blocks/256)]; `nested_codebook` fp32 [256].
    """

    packed: torch.Tensor
    absmax: torch.Tensor
    codebook: torch.Tensor
    nested_absmax: torch.Tensor
    nested_codebook: torch.Tensor
    offset: float
    shape: tuple[int, ...]
    dtype: torch.dtype
    block: int = BLOCK
    nested_block: int = NESTED_BLOCK


@dataclass(frozen=True)
class Nf4Grid:
    """NF4 with double quantization; nothing to choose."""

    bits: int = 4

    def quantize(self, weight: torch.Tensor) -> Nf4Codes:
        """The nearest codes of `weight` (any shape; 16- or 32-bit floats), by bitsandbytes."""
        functional = bitsandbytes_functional()
        packed, state = functional.quantize_4bit(
            weight.contiguous(), blocksize=BLOCK, compress_statistics=True, quant_type="nf4"
        )
        return Nf4Codes(
            packed.reshape(-1),
            state.absmax,
            state.code.float(),
            state.state2.absmax,
            state.state2.code.float(),
            float(state.offset),
            tuple(weight.shape),
            weight.dtype,
        )

    def decode(self, codes: Nf4Codes) -> torch.Tensor:
        """The weights fp32, in `codes.shape`, that the codes stand for."""
        count = math.prod(codes.shape)
        nested = codes.nested_codebook[codes.absmax.long()]
        absmax = nested * _spread(codes.nested_absmax, codes.nested_block, len(nested))
        absmax = absmax + codes.offset
        pairs = torch.stack((codes.packed >> 4, codes.packed & 15), dim=1).reshape(-1)[:count]
        values = codes.codebook[pairs.long()] * _spread(absmax, codes.block, count)
        return values.reshape(codes.shape)


def _spread(scales: torch.Tensor, block: int, count: int) -> torch.Tensor:
    """Each scale repeated for its block of values; the last block may be short."""
    return scales.float().repeat_interleave(block)[:count]
