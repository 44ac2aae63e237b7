"""Round to nearest: the floor that every other solver is compared with."""

from __future__ import annotations

from typing import Any

import torch

from qexport.grids.grid import Grid, encode


def round_to_nearest(weight: torch.Tensor, grid: Grid) -> Any:
    """The codes nearest to `weight` [out, in], each by itself, on any grid. Not changed."""
    return encode(grid, weight, grid.fit(weight))
