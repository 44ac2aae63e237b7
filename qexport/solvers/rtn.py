"""Round to nearest: the floor that every other solver is compared with."""

from __future__ import annotations

from typing import Protocol, TypeVar

import torch

Codes = TypeVar("Codes", covariant=True)


class RoundingGrid(Protocol[Codes]):
    """A grid that can tell the nearest codes of a matrix."""

    def quantize(self, weight: torch.Tensor) -> Codes:
        """The nearest codes of `weight` [out, in]."""


def round_to_nearest(weight: torch.Tensor, grid: RoundingGrid[Codes]) -> Codes:
    """The codes of `weight` [out, in] nearest to it, each by itself. Works on every grid."""
    return grid.quantize(weight)
