"""The scales of MXFP4 in torch, those of `mxfp4_kernels`; codes are the nearest under them."""

from __future__ import annotations

import torch

_FRACTION = 0x7FFFFF
_NEARLY_TWO = 0x7FFF00  # fractions from here on may have their logarithm rounded up


def exponents(values: torch.Tensor) -> torch.Tensor:
    """floor(log2(absolute maximum)) + 125, from 0 on, uint8 [...] of fp32 [..., 32].

    The logarithm is an fp32 number, as in ggml.
    """
    low, high = values.aminmax(dim=-1)
    size = torch.maximum(low.abs(), high.abs())
    bits = size.view(torch.int32)
    logarithm = size.double().log2_().float().floor_()
    exponent = torch.where(bits & _FRACTION >= _NEARLY_TWO, logarithm, (bits >> 23) - 127.0)
    return exponent.add_(125).clamp_(min=0).to(torch.uint8)
