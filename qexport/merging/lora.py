"""The arithmetic of low-rank adapters: tensors in, tensors out.

W' = W + s B A with s = alpha / r (LoRA, Hu et al. 2021, section 4.1) or alpha / sqrt(r) (rsLoRA,
Kalajdzievski 2023, section 3).
"""

from __future__ import annotations

import math

import torch


def lora_scale(alpha: float, rank: int, *, rank_stabilized: bool) -> float:
    """The factor s of the product B A."""
    return alpha / (math.sqrt(rank) if rank_stabilized else rank)


def merge_lora(weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scale: float) -> torch.Tensor:
    """`weight` [out, in] plus scale * `b` [out, r] @ `a` [r, in], in weight's dtype.

    All arithmetic is in fp32, and the sum is rounded once. The inputs are not changed.
    """
    merged = torch.addmm(weight.float(), b.float(), a.float(), alpha=scale)
    return merged.to(weight.dtype)
