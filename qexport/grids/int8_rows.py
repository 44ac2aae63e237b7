"""LLM.int8's grid: int8 with one absolute maximum a row (Dettmers et al. 2022, section 3).

w = q * absmax / 127. Fit and encode are bitsandbytes' own; the decoder is ours.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from qexport.grids.bitsandbytes_import import bitsandbytes_functional


@dataclass(frozen=True)
class Int8RowCodes:
    """A matrix on the grid: `codes` int8 [out, in] and `absmax` fp32 [out]."""

    codes: torch.Tensor
    absmax: torch.Tensor


@dataclass(frozen=True)
class Int8RowGrid:
    """One scale a row; nothing to choose."""

    bits: int = 8

    def quantize(self, weight: torch.Tensor) -> Int8RowCodes:
        """The nearest codes of `weight` [out, in], as bitsandbytes rounds (from fp16)."""
        functional = bitsandbytes_functional()
        codes, absmax, _ = functional.int8_vectorwise_quant(weight.to(torch.float16))
        return Int8RowCodes(codes, absmax.float())

    def decode(self, codes: Int8RowCodes) -> torch.Tensor:
        """The weights fp32 [out, in] that the codes stand for."""
        return codes.codes.float() * (codes.absmax.float() / 127)[:, None]
