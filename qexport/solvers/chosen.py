"""Codes and scales before they become one value: what solvers pass on to one another."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from qexport.grids.grid import Grid, spread


@dataclass(frozen=True)
class Chosen:
    """Whole numbers `codes` [out, in] on a grid under its `scales`; `group_of` as in `Grid.assemble`."""

    codes: torch.Tensor
    scales: Any
    group_of: torch.Tensor | None = None

    def assembled(self, grid: Grid) -> Any:
        """As the grid's `decode` takes them."""
        return grid.assemble(self.codes, self.scales, self.group_of)

    def spread_lines(self, grid: Grid) -> tuple[torch.Tensor, torch.Tensor]:
        """Step and origin of every weight, fp32 [out, in]."""
        lines = grid.lines(self.scales)
        inputs = self.codes.shape[1]
        step, origin = (spread(part, inputs, grid, self.group_of) for part in (lines.step, lines.origin))
        return step, origin
