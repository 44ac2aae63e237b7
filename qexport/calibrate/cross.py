"""How a layer's inputs have changed by what was quantized before it."""

from __future__ import annotations

import torch

from qexport.devices import CPU
from qexport.grids.products import fp32_factors_as_bf16, worthwhile


class CrossMoment:
    """Sums (x' - x) x^T, fp32 [in, in]: x' a layer's inputs in the full model, x those that it has now, both
    on `device`.

    Products in bf16 where that is faster: the difference is taken before, in fp32, and so keeps its digits.
    """

    def __init__(self, inputs: int, device: torch.device = CPU) -> None:
        self._products = torch.zeros(inputs, inputs, device=device)
        self._count = 0

    def add(self, full: torch.Tensor, x: torch.Tensor) -> None:
        """Both inputs [..., in] of the same tokens. Not changed."""
        rows = x.reshape(-1, x.shape[-1]).float()
        change = full.reshape(-1, full.shape[-1]).float() - rows
        with fp32_factors_as_bf16(worthwhile(rows)):
            self._products.addmm_(change.t(), rows)
        self._count += len(rows)

    def mean(self) -> torch.Tensor:
        """The mean over all tokens, fp32 [in, in] on the CPU; 0 without any."""
        return self._products.cpu() / max(self._count, 1)
