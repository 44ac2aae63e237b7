"""ggml's ternary types in torch, byte for byte what `ternary_kernels` finds."""

from __future__ import annotations

import torch

from qexport.grids.ggml.device.steps import inverses, within_half


def codes_and_steps(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes 0, 1, 2 of -step, 0 and step, uint8 [..., 256], of fp32 [..., 256], and steps fp32 [...].

    A step is the absolute maximum, or fp16's largest number; halves go away from 0.
    """
    low, high = values.aminmax(dim=-1, keepdim=True)
    steps = within_half(torch.maximum(low.abs(), high.abs()))
    scaled = values * inverses(steps)
    codes = (scaled >= 0.5).to(torch.uint8).add_(1).sub_((scaled <= -0.5).to(torch.uint8))
    return codes, steps.squeeze(-1)
