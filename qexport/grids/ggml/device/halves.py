"""fp16 numbers in torch, as the compiled kernels round them (`compiled.half`)."""

from __future__ import annotations

import torch

_LARGEST = 65504.0
_SMALLEST = 2.0**-24


def half(values: torch.Tensor) -> torch.Tensor:
    """The fp32 values of the nearest fp16 of fp32 numbers, ties to even; never infinite."""
    return values.clamp(-_LARGEST, _LARGEST).half().float()


def half_not_zero(values: torch.Tensor) -> torch.Tensor:
    """As `half`, but fp16's smallest number of that sign where the nearest is 0."""
    rounded = half(values)
    smallest = torch.copysign(torch.full_like(values, _SMALLEST), values)
    return torch.where(rounded == 0, smallest, rounded)
