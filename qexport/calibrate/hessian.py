"""The statistic of GPTQ: the second moment of a layer's inputs."""

from __future__ import annotations

import torch

from qexport.errors import NonFiniteError


class HessianSum:
    """Sums x x^T over all inputs that it is shown; fp32 [in, in]."""

    def __init__(self, inputs: int) -> None:
        self._sum = torch.zeros(inputs, inputs)
        self._count = 0

    def add(self, x: torch.Tensor) -> None:
        """Inputs [..., in] of the layer."""
        rows = x.reshape(-1, x.shape[-1]).float()
        self._sum.addmm_(rows.t(), rows)
        self._count += len(rows)

    def mean(self, layer: str) -> torch.Tensor:
        """Mean of x x^T. Raises NonFiniteError, naming `layer`, when an input was not finite."""
        if not bool(self._sum.isfinite().all()):
            raise NonFiniteError(
                f"the inputs of {layer} are NaN or infinite on the calibration text",
                remedy="check that the model works in 32 bits at all",
            )
        return self._sum / max(self._count, 1)
