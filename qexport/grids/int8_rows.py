"""int8 with one scale a row: w = q * scale / unit.

LLM.int8's (Dettmers et al. 2022, section 3): the scale is the absolute maximum fp32, unit 127, and q is in
[-127, 127]. EETQ's: the scale is the step itself in fp16, unit 1, and q is in [-128, 127].
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from qexport.errors import SpecError
from qexport.grids.grid import Lines, row_slices

_TOP = 127


@dataclass(frozen=True)
class Int8RowCodes:
    """A matrix on the grid: `codes` int8 [out, in] and `scales` floats [out]."""

    codes: torch.Tensor
    scales: torch.Tensor


@dataclass(frozen=True)
class Int8RowGrid:
    """`bottom` is the lowest code, 127 the highest; `dtype` is that of stored scales."""

    bottom: int = -127
    unit: int = 127
    dtype: torch.dtype = torch.float32
    bits: int = 8

    @property
    def groups_alone(self) -> bool:
        """Rows do not share anything."""
        return True

    def group_width(self, inputs: int) -> int:
        """Inputs a group: a whole row."""
        return inputs

    def fit(self, weight: torch.Tensor, shrink: torch.Tensor | float = 1.0) -> torch.Tensor:
        """Scales [out] under which the lowest and the highest code reach every weight of [out, in].

        Times `shrink`, a number or fp32 [out, 1].
        """
        parts = []
        for rows in row_slices(weight.shape):  # in fp32, whose extremes are found several times as fast
            values = weight[rows].float()
            low, high = values.amin(dim=1, keepdim=True), values.amax(dim=1, keepdim=True)
            # the quotients of constants are 1 for LLM.int8, and so its maxima are the weights' own to the bit
            parts.append(torch.maximum(high * (self.unit / _TOP), low * (self.unit / self.bottom)))
        reach = torch.cat(parts).clamp(min=0)
        return (reach * shrink).clamp(max=torch.finfo(self.dtype).max).to(self.dtype)[:, 0]

    def lines(self, scales: torch.Tensor) -> Lines:
        """Step and origin of all rows; the origin is 0, and so is the step of a row of zeros."""
        step = (scales.float() / self.unit)[:, None]
        return Lines(step, torch.zeros_like(step))

    def round(
        self, values: torch.Tensor, step: torch.Tensor, origin: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The nearest codes, fp32, and what they stand for; elementwise. The origin is 0 on this grid."""
        codes = values / step.clamp(min=torch.finfo(torch.float32).tiny)
        codes = codes.round_().clamp_(self.bottom, _TOP)
        return codes, codes * step

    def assemble(
        self, codes: torch.Tensor, scales: torch.Tensor, group_of: torch.Tensor | None = None
    ) -> Int8RowCodes:
        """Codes [out, in] with their scales. Raises SpecError for a `group_of`: there is one group a row."""
        if group_of is not None:
            raise SpecError("groups within a row", expected="one scale a row")
        return Int8RowCodes(codes.to(torch.int8), scales)

    def decode(self, codes: Int8RowCodes) -> torch.Tensor:
        """The weights fp32 [out, in] that the codes stand for."""
        return codes.codes.float() * self.lines(codes.scales).step
