"""A ggml type as a grid: its scales are fitted all together, by the type's own search."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from qexport.errors import SpecError
from qexport.grids.ggml.types import Affine, BlockType
from qexport.grids.grid import Lines


@dataclass(frozen=True)
class GgmlGrid:
    """See `Grid` and `SelfFitting`. Codes, once assembled, are blocks uint8 [out, bytes].

    Types whose values do not lie on lines (IQ2, IQ3) have `search` alone.
    """

    type: BlockType

    @property
    def bits(self) -> int:
        """Bits a weight, without the scales'."""
        affine = self.type.affine
        return affine.bits if affine else int(self.type.bits_per_weight)

    @property
    def groups_alone(self) -> bool:
        """Never: a super-block's scales are quantized together."""
        return False

    @property
    def has_lines(self) -> bool:
        """Whether codes can be chosen one by one under scales that are given."""
        return self.type.affine is not None

    def group_width(self, inputs: int) -> int:
        """Weights that share a scale; a whole block where values lie on no lines."""
        affine = self.type.affine
        return affine.width if affine else self.type.values

    def fit(self, weight: torch.Tensor, shrink: torch.Tensor | float = 1.0) -> Any:
        """The scales of the type's own search; `shrink` has no say in them."""
        return self.search_scales(weight, None)

    def lines(self, scales: Any) -> Lines:
        """See `Grid`."""
        return Lines(*self._affine().lines(scales))

    def round(
        self, values: torch.Tensor, step: torch.Tensor, origin: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See `Grid`."""
        return self._affine().round(values, step, origin)

    def assemble(self, codes: torch.Tensor, scales: Any, group_of: torch.Tensor | None = None) -> Any:
        """See `Grid`; groups are neighbours always."""
        if group_of is not None:
            raise SpecError(
                f"{self.type.name} has no place for groups in another order", expected="--static-groups"
            )
        return self._affine().pack(codes, scales)

    def decode(self, codes: Any) -> torch.Tensor:
        """See `Grid`."""
        return self.type.decode(codes)

    def search_scales(self, weight: torch.Tensor, importance: torch.Tensor | None) -> Any:
        """See `SelfFitting`."""
        return self._affine().fit(weight.float().contiguous(), importance)

    def search(self, weight: torch.Tensor, importance: torch.Tensor | None) -> Any:
        """See `SelfFitting`."""
        return self.type.encode(weight.float().contiguous(), importance)

    def _affine(self) -> Affine:
        found = self.type.affine
        if found is None:
            raise SpecError(
                f"the values of {self.type.name} do not lie on lines",
                expected="a type that has a scale a code",
            )
        return found
