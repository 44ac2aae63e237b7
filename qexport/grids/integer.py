"""The integer grid: b bits, one scale a group of inputs, and the zero where the format keeps it.

w = (q - zero) * scale with q in [0, 2^b - 1]. Scales and zeros are kept as the formats store them, and
codes are chosen against what is stored.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch

from qexport.grids.grid import Lines, encode, group_width, grouped, row_slices, spread

Zero = Literal["middle", "integer", "float", "bias"]


@dataclass(frozen=True)
class IntegerScales:
    """`scales` [out, groups] in the grid's dtype; `zeros` [out, groups] by the grid's kind of zero.

    "middle" has None; "integer" uint8 codes of the value 0; "float" such codes with fractions, in the
    scales' dtype; "bias" the value of code 0, in the scales' dtype.
    """

    scales: torch.Tensor
    zeros: torch.Tensor | None


@dataclass(frozen=True)
class IntegerCodes:
    """A matrix on the grid: `codes` uint8 [out, in], scales and zeros as in IntegerScales.

    `group_of` int64 [in] is None where groups are neighbouring inputs.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor | None = None
    group_of: torch.Tensor | None = None


@dataclass(frozen=True)
class IntegerGrid:
    """`bits` a weight; `group_size` inputs share a scale, -1 for a whole row.

    `zero`: "middle" is the symmetric grid, where 2^(b-1) stands for 0; the others are asymmetric.
    `dtype` is that of stored scales, float zeros and biases.
    """

    bits: int
    group_size: int
    zero: Zero = "middle"
    dtype: torch.dtype = torch.float16

    @property
    def groups_alone(self) -> bool:
        """Always: a group's scale does not depend on other groups."""
        return True

    @property
    def symmetric(self) -> bool:
        """Whether 0 lies in the middle, without being stored."""
        return self.zero == "middle"

    @property
    def middle(self) -> int:
        """The code of the value 0 of the symmetric grid."""
        return 1 << (self.bits - 1)

    @property
    def top(self) -> int:
        """The largest code."""
        return (1 << self.bits) - 1

    def group_width(self, inputs: int) -> int:
        """Inputs a group of a row of `inputs`. Raises SpecError for an impossible group size."""
        return group_width(self.group_size, inputs)

    def fit(self, weight: torch.Tensor, shrink: torch.Tensor | float = 1.0) -> IntegerScales:
        """Scales and zeros such that no weight of [out, in] lies outside its group's range times `shrink`.

        The symmetric range is that of GPTQ's quantizer (Frantar et al. 2022, reference code): 2 max|w|
        spread over 2^b - 1 steps. With an integer zero the range holds 0, as in that code and in AWQ's.
        """
        values = grouped(weight, self.group_width(weight.shape[1]))
        if self.zero == "middle":
            return IntegerScales(self._stored(2 * values.abs().amax(dim=2) * shrink / self.top), None)
        low, high = values.amin(dim=2), values.amax(dim=2)
        if self.zero == "integer":
            low, high = low.clamp(max=0) * shrink, high.clamp(min=0) * shrink
        else:
            center, reach = (low + high) / 2, (high - low) / 2 * shrink
            low, high = center - reach, center + reach
        steps = (high - low) / self.top
        if self.zero == "float":
            # a zero far from the codes would be rounded by more than half a step
            steps = torch.maximum(steps, torch.maximum(low.abs(), high.abs()) * torch.finfo(self.dtype).eps)
        scales = self._stored(steps)
        return IntegerScales(scales, self.zeros_at(low, scales))

    def zeros_at(self, low: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        """The stored zeros that put code 0 at the values `low` [out, groups], as near as they can."""
        if self.zero == "bias":
            largest = torch.finfo(self.dtype).max
            return low.clamp(-largest, largest).to(self.dtype)
        zeros = -low / scales.float()
        if self.zero == "float":
            return zeros.to(self.dtype)
        return zeros.round().clamp(0, self.top).to(torch.uint8)

    def _stored(self, scales: torch.Tensor) -> torch.Tensor:
        """`scales` as they are stored; one that is too small for its dtype may be any: all is at the zero."""
        rounded = scales.clamp(max=torch.finfo(self.dtype).max).to(self.dtype)
        return torch.where(rounded > 0, rounded, torch.ones_like(rounded))

    def scaled(self, scales: IntegerScales, factors: torch.Tensor) -> IntegerScales:
        """Every value times its group's factor, fp32 [out, groups]; zeros that are codes stay."""
        zeros = scales.zeros
        if zeros is not None and self.zero == "bias":
            largest = torch.finfo(self.dtype).max
            zeros = (zeros.float() * factors).clamp(-largest, largest).to(self.dtype)
        found = (scales.scales.float() * factors).clamp(max=torch.finfo(self.dtype).max).to(self.dtype)
        # one that would fall to 0 stays as it is: the 1 of `_stored` is for groups that are all at the zero
        return IntegerScales(torch.where(found > 0, found, scales.scales), zeros)

    def stretched(self, codes: IntegerCodes, factors: torch.Tensor) -> IntegerCodes:
        """Codes as they are under scales that are `scaled`."""
        found = self.scaled(IntegerScales(codes.scales, codes.zeros), factors)
        return replace(codes, scales=found.scales, zeros=found.zeros)

    def lines(self, scales: IntegerScales) -> Lines:
        """Step and origin of all groups."""
        step = scales.scales.float()
        if scales.zeros is None:
            return Lines(step, -self.middle * step)
        zeros = scales.zeros.float()
        return Lines(step, zeros if self.zero == "bias" else -zeros * step)

    def round(
        self, values: torch.Tensor, step: torch.Tensor, origin: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The nearest codes, and what they stand for; elementwise."""
        codes = ((values - origin) / step).round_().clamp_(0, self.top)
        return codes, torch.addcmul(origin, codes, step)

    def assemble(
        self, codes: torch.Tensor, scales: IntegerScales, group_of: torch.Tensor | None = None
    ) -> IntegerCodes:
        """Codes [out, in] with their scales."""
        return IntegerCodes(codes.to(torch.uint8), scales.scales, scales.zeros, group_of)

    def encode(self, weight: torch.Tensor, scales: IntegerScales) -> IntegerCodes:
        """The nearest code of every weight of [out, in] under `scales`."""
        codes: IntegerCodes = encode(self, weight, scales)
        return codes

    def decode(self, codes: IntegerCodes) -> torch.Tensor:
        """The weights fp32 [out, in] that the codes stand for."""
        lines = self.lines(IntegerScales(codes.scales, codes.zeros))
        values = torch.empty(codes.codes.shape)
        for rows in row_slices(codes.codes.shape):
            step, origin = (
                spread(part[rows], codes.codes.shape[1], self, codes.group_of)
                for part in (lines.step, lines.origin)
            )
            torch.addcmul(origin, codes.codes[rows].float(), step, out=values[rows])
        return values
