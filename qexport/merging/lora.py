"""The arithmetic of low-rank adapters: tensors in, tensors out.

W' = W + s B A with s = alpha / r (LoRA, Hu et al. 2021, section 4.1) or alpha / sqrt(r) (rsLoRA,
Kalajdzievski 2023, section 3). DoRA (Liu et al. 2024, section 4.1) then gives every output's weights the
learned magnitude m: W'' = m W' / |W'|.
"""

from __future__ import annotations

import math

import torch


def lora_scale(alpha: float, rank: int, *, rank_stabilized: bool) -> float:
    """The factor s of the product B A."""
    return alpha / (math.sqrt(rank) if rank_stabilized else rank)


def product_square(left: torch.Tensor, right: torch.Tensor) -> float:
    """The squared Frobenius norm of `left` [n, r] @ `right` [r, m], without the product.

    |L R|^2 = trace(L^T L R R^T), two [r, r] matrices.
    """
    return float(((left.T @ left).double() * (right @ right.T).double()).sum())


def with_magnitude(weight: torch.Tensor, magnitude: torch.Tensor) -> torch.Tensor:
    """`weight` [out, in] with its rows scaled to the lengths `magnitude` [out]."""
    factor: torch.Tensor = magnitude / torch.linalg.vector_norm(weight, dim=1)
    return weight * factor[:, None]
