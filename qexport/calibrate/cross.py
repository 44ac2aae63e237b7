"""How a layer's inputs have changed by what was quantized before it."""

from __future__ import annotations

import torch


class CrossMoment:
    """Sums (x' - x) x^T, fp32 [in, in]: x' a layer's inputs in the full model, x those that it has now."""

    def __init__(self, inputs: int) -> None:
        self._products = torch.zeros(inputs, inputs)
        self._count = 0

    def add(self, full: torch.Tensor, x: torch.Tensor) -> None:
        """Both inputs [..., in] of the same tokens. Not changed."""
        rows = x.reshape(-1, x.shape[-1]).float()
        change = full.reshape(-1, full.shape[-1]).float() - rows
        self._products.addmm_(change.t(), rows)
        self._count += len(rows)

    def mean(self) -> torch.Tensor:
        """The mean over all tokens, fp32 [in, in]; 0 without any."""
        return self._products / max(self._count, 1)
