"""The symmetric integer grid: b bits, one scale a group of inputs, the zero in the middle.

w = (q - 2^(b-1)) * s with q in [0, 2^b - 1]. Scales are kept in fp16, as the formats store them, and
codes are chosen against the rounded scale.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from qexport.errors import SpecError


@dataclass(frozen=True)
class IntegerCodes:
    """A matrix on the grid: `codes` uint8 [out, in] and `scales` fp16 [out, groups]."""

    codes: torch.Tensor
    scales: torch.Tensor


@dataclass(frozen=True)
class IntegerGrid:
    """`bits` a weight; `group_size` inputs share a scale, -1 for a whole row."""

    bits: int
    group_size: int

    @property
    def zero(self) -> int:
        """The code of the value 0."""
        return 1 << (self.bits - 1)

    def group_width(self, inputs: int) -> int:
        """Inputs a group of a row of `inputs`. Raises SpecError when they do not divide it."""
        width = inputs if self.group_size == -1 else self.group_size
        if width < 1 or inputs % width:
            raise SpecError(f"group size {self.group_size} does not divide {inputs} inputs")
        return width

    def fit(self, weight: torch.Tensor) -> torch.Tensor:
        """Scales fp16 [out, groups] such that no weight of [out, in] lies outside its group's range.

        The range is that of GPTQ's symmetric quantizer (Frantar et al. 2022, reference code):
        2 max|w| spread over 2^b - 1 steps.
        """
        width = self.group_width(weight.shape[1])
        largest = weight.float().reshape(weight.shape[0], -1, width).abs().amax(dim=2)
        scales = (2 * largest / ((1 << self.bits) - 1)).to(torch.float16)
        # an all-zero group, or one too small for fp16, may have any scale: its codes are the zero
        return torch.where(scales > 0, scales, torch.ones_like(scales)).clamp(max=65504.0)

    def encode(self, weight: torch.Tensor, scales: torch.Tensor) -> IntegerCodes:
        """The nearest code of every weight of [out, in] under `scales` [out, groups]."""
        width = self.group_width(weight.shape[1])
        grouped = weight.float().reshape(weight.shape[0], -1, width)
        steps = torch.round(grouped / scales.float()[:, :, None]) + self.zero
        codes = steps.clamp(0, (1 << self.bits) - 1).to(torch.uint8).reshape(weight.shape)
        return IntegerCodes(codes, scales)

    def quantize(self, weight: torch.Tensor) -> IntegerCodes:
        """The nearest codes of `weight` [out, in] under the scales that fit it."""
        return self.encode(weight, self.fit(weight))

    def decode(self, codes: IntegerCodes) -> torch.Tensor:
        """The weights fp32 [out, in] that the codes stand for."""
        out, inputs = codes.codes.shape
        width = inputs // codes.scales.shape[1]
        values = codes.codes.reshape(out, -1, width).float() - self.zero
        return (values * codes.scales.float()[:, :, None]).reshape(out, inputs)
