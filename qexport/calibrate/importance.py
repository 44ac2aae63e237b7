"""What GGUF's encoders want to know of a layer's inputs: how large each one is, by its mean square."""

from __future__ import annotations

import torch

from qexport.errors import NonFiniteError


class InputSquares:
    """Sums x^2, fp64 [in], over all inputs that it is shown: the diagonal of GPTQ's Hessian alone."""

    def __init__(self, inputs: int) -> None:
        self._sums = torch.zeros(inputs, dtype=torch.float64)
        self._count = 0

    @property
    def count(self) -> int:
        """Tokens seen."""
        return self._count

    def add(self, x: torch.Tensor) -> None:
        """Inputs [..., in] of the layer, of any float dtype. Not changed."""
        rows = x.detach().reshape(-1, x.shape[-1])
        self._sums += rows.float().square().sum(dim=0).to("cpu", torch.float64)
        self._count += len(rows)

    def sums(self, layer: str) -> torch.Tensor:
        """Sums of x^2, fp32 [in]. Raises NonFiniteError, naming `layer`, when an input was not finite."""
        sums = self._sums.float()
        if not bool(sums.isfinite().all()):
            raise NonFiniteError(
                f"the inputs of {layer} are NaN or infinite on the calibration text",
                remedy="check that the model works in 32 bits at all",
            )
        return sums
