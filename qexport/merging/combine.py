"""One LoRA out of several, as PEFT's `add_weighted_adapter` does it: tensors in, tensors out.

TIES: Yadav et al. 2023, section 3. DARE: Yu et al. 2023, section 3.2. Magnitude pruning keeps the largest
values. Without `_svd` a method works on the factors A and B by themselves, each weighted by the square
root of weight times scale; with it, and in `svd`, on the products, of which a low rank is kept.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

Merge = Callable[[Sequence[torch.Tensor], Sequence[float]], torch.Tensor]


@dataclass(frozen=True)
class Pair:
    """A [r, in] and B [out, r] in fp32; the adapter's change is weight * scale * B A."""

    a: torch.Tensor
    b: torch.Tensor
    scale: float
    weight: float


@dataclass(frozen=True)
class Combining:
    """How to combine. `rank` is what the svd methods keep; `density` the share that pruning keeps."""

    method: str
    rank: int
    density: float = 1.0
    majority_sign: str = "total"


def combine(
    pairs: Sequence[Pair], how: Combining, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """A [r, in] and B [out, r] of the combination, whose scale is 1. `generator` is what DARE draws from."""
    if how.method in ("cat", "svd"):
        a = torch.cat([pair.weight * pair.scale * pair.a for pair in pairs])
        b = torch.cat([pair.b for pair in pairs], dim=1)
        return (a, b) if how.method == "cat" else _truncated_product(a, b, how.rank)
    merge = _merge(how, generator)
    if how.method.endswith("_svd"):
        products = [pair.scale * (pair.b @ pair.a) for pair in pairs]
        return _truncated(merge(products, [pair.weight for pair in pairs]), how.rank)
    factors = [pair.weight * pair.scale for pair in pairs]
    roots = [math.sqrt(abs(factor)) for factor in factors]
    # a negative factor changes the sign on one side only
    signed = [math.copysign(root, factor) for root, factor in zip(roots, factors, strict=True)]
    return merge([pair.a for pair in pairs], signed), merge([pair.b for pair in pairs], roots)


def _merge(how: Combining, generator: torch.Generator) -> Merge:
    name = how.method.removesuffix("_svd")

    def prune(tensor: torch.Tensor) -> torch.Tensor:
        if name == "linear" or how.density >= 1:
            return tensor
        return (
            _drop(tensor, how.density, generator) if name.startswith("dare") else _trim(tensor, how.density)
        )

    def merge(tensors: Sequence[torch.Tensor], weights: Sequence[float]) -> torch.Tensor:
        stacked = torch.stack([prune(tensor) for tensor in tensors])
        weighted = stacked * torch.tensor(weights, device=stacked.device)[:, None, None]
        if name not in ("ties", "dare_ties"):
            return weighted.sum(dim=0)
        agree = _majority(stacked, how.majority_sign)
        return (weighted * agree).sum(dim=0) / agree.sum(dim=0).clamp(min=1)

    return merge


def _trim(tensor: torch.Tensor, density: float) -> torch.Tensor:
    """The share `density` of largest values; the others are zero."""
    kept = tensor.abs().reshape(-1).topk(int(density * tensor.numel())).indices
    mask = torch.zeros(tensor.numel(), dtype=torch.bool, device=tensor.device).index_fill_(
        0, kept, value=True
    )
    return tensor * mask.reshape(tensor.shape)


def _drop(tensor: torch.Tensor, density: float, generator: torch.Generator) -> torch.Tensor:
    """A random share `density` of the values, enlarged so that the mean stays; the others are zero."""
    kept = torch.bernoulli(torch.full(tensor.shape, density), generator=generator)  # alike on every device
    return tensor * kept.to(tensor.device) / density


def _majority(stacked: torch.Tensor, method: str) -> torch.Tensor:
    """Where each tensor has the sign that most have: by the sum of values (`total`) or their number."""
    votes = stacked.sum(dim=0) if method == "total" else stacked.sign().sum(dim=0)
    return stacked.sign() == torch.where(votes >= 0, 1, -1)


def _truncated(product: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The best A [rank, in], B [out, rank] of a matrix [out, in] (Eckart and Young)."""
    u, s, vh = torch.linalg.svd(product, full_matrices=False)
    return vh[:rank], u[:, :rank] * s[:rank]


def _truncated_product(a: torch.Tensor, b: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The same of `b` @ `a`, from two thin QR factorisations: [r, r] is all that is decomposed."""
    q_out, r_out = torch.linalg.qr(b)
    q_in, r_in = torch.linalg.qr(a.T)
    inner_a, inner_b = _truncated(r_out @ r_in.T, rank)
    return inner_a @ q_in.T, q_out @ inner_b
