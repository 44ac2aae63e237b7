"""Steps as ggml's plain encoders choose codes by them: before they are rounded to fp16."""

from __future__ import annotations

import torch

_LARGEST = 65504.0
_OVERFLOW = 65520.0  # the smallest number that fp16 rounds to infinity


def within_half(values: torch.Tensor) -> torch.Tensor:
    """Numbers fp32, or fp16's largest of that sign where fp16 would round them to infinity."""
    largest = torch.copysign(torch.full_like(values, _LARGEST), values)
    return torch.where(values.abs() >= _OVERFLOW, largest, values)


def inverses(steps: torch.Tensor) -> torch.Tensor:
    """1 / step, or 0 where there is none."""
    inverse = steps.reciprocal()
    return inverse.masked_fill_(inverse.isinf(), 0)


def divided(values: torch.Tensor, divisor: float) -> torch.Tensor:
    """The fp32 numbers nearest to fp32 / divisor.

    On a GPU, torch multiplies by the inverse of a divisor that is a number of Python, and so rounds twice.
    """
    return values / torch.full_like(values, divisor)
