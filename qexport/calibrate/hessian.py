"""What solvers need to know of a layer's inputs: their second moment and their mean size."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch

from qexport.devices import CPU
from qexport.errors import NonFiniteError
from qexport.grids.products import fp32_factors_as_bf16, worthwhile

_COLUMNS = 1024  # of a Hessian that are summed at once, down to the diagonal: half of it mirrors the other


class InputStatistics:
    """Sums x x^T, fp32 [in, in], and |x|, fp64 [in], over all inputs that it is shown, on their `device`.

    Where that is faster, products are those of inputs rounded to bf16, and summed in fp32: the exact moment
    of inputs off by 1 in 512 at most, far less than the damping of it.
    """

    def __init__(self, inputs: int, device: torch.device = CPU) -> None:
        self._products = torch.zeros(inputs, inputs, device=device)
        self._sizes = torch.zeros(inputs, dtype=torch.float64, device=device)
        self._count = 0

    @property
    def abs_sum(self) -> torch.Tensor:
        """Sum of |x|, fp64 [in], on the CPU."""
        return self._sizes.cpu()

    @property
    def inputs(self) -> int:
        """Inputs of the layer."""
        return len(self._sizes)

    @property
    def count(self) -> int:
        """Tokens seen."""
        return self._count

    @property
    def too_few(self) -> bool:
        """Whether the tokens cannot fill the Hessian's rank: some directions were never seen."""
        return self._count < self.inputs

    def add(self, x: torch.Tensor) -> None:
        """Inputs [..., in] of the layer, of any float dtype. Not changed."""
        rows = x.detach().reshape(-1, x.shape[-1]).float()
        with fp32_factors_as_bf16(worthwhile(rows)):
            for begin in range(0, self.inputs, _COLUMNS):
                end = begin + _COLUMNS
                self._products[:end, begin:end].addmm_(rows[:, :end].t(), rows[:, begin:end])
        self._sizes += rows.abs().sum(dim=0)
        self._count += len(rows)

    def mean(self, layer: str) -> torch.Tensor:
        """Mean of x x^T, fp32 [in, in] on the CPU; 0 where no token came. GPTQ's Hessian, but for a factor.

        Raises NonFiniteError, naming `layer`, when an input was not finite.
        """
        # a NaN or an infinity makes a square of its own
        if not bool(self._products.diagonal().isfinite().all()):
            raise NonFiniteError(
                f"the inputs of {layer} are NaN or infinite on the calibration text",
                remedy="check that the model works in 32 bits at all",
            )
        mean = self._products.cpu() / max(self._count, 1)
        for begin in range(_COLUMNS, self.inputs, _COLUMNS):
            mean[begin : begin + _COLUMNS, :begin] = mean[:begin, begin : begin + _COLUMNS].t()
        return mean


def mean_abs(seen: Iterable[InputStatistics]) -> torch.Tensor:
    """Mean of |x| over all tokens of `seen` (experts that share an input, say), fp32 [in]; 0 without tokens.

    At least one; all of the same inputs.
    """
    parts = list(seen)
    total = torch.stack([part.abs_sum for part in parts]).sum(dim=0)
    return (total / max(sum(part.count for part in parts), 1)).float()


def adding(found: dict[str, InputStatistics]) -> Callable[[str, torch.Tensor], None]:
    """A function of a layer and an input [..., in] of it, that adds the input to the layer's statistics."""

    def add(layer: str, x: torch.Tensor) -> None:
        if layer not in found:
            found[layer] = InputStatistics(x.shape[-1], x.device)
        found[layer].add(x)

    return add
