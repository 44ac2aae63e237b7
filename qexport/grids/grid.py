"""What every grid has: which values may a group of weights take, and how they are told by codes.

A group's values lie on a line: w = level(q) * step + origin, where `level` is the code itself or its entry
in a codebook. Solvers know grids by this alone, so any of them works on any grid.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch

from qexport.errors import SpecError

_VALUES_AT_ONCE = 1 << 18  # what is widened to fp32 at once: stays in a core's cache


@dataclass(frozen=True)
class Lines:
    """`step` and `origin`, fp32 [out, groups]: exactly what the stored scales decode to."""

    step: torch.Tensor
    origin: torch.Tensor


class Grid(Protocol):
    """A grid. Its scales and codes are types of its own; codes [out, in] are whole numbers.

    `scales` of a matrix are those of all its groups, dtypes and rounding as they are stored. A group is
    `group_width` neighbouring inputs of a row; the last one may be shorter.
    """

    @property
    def bits(self) -> int:
        """Bits a code."""

    @property
    def groups_alone(self) -> bool:
        """Whether a group can be fitted without the others; not so where scales are quantized together."""

    def group_width(self, inputs: int) -> int:
        """Inputs a group of a row of `inputs`."""

    def fit(self, weight: torch.Tensor, shrink: torch.Tensor | float = 1.0) -> Any:
        """Scales under which the range of every group of [out, in], times `shrink`, is covered.

        `shrink` is a number or fp32 [out, groups]. Inputs are not changed, here and below.
        """

    def lines(self, scales: Any) -> Lines:
        """The lines of all groups."""

    def round(
        self, values: torch.Tensor, step: torch.Tensor, origin: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The codes nearest to `values`, and the fp32 values that those stand for.

        Elementwise: `step` and `origin` broadcast against `values`.
        """

    def assemble(self, codes: torch.Tensor, scales: Any, group_of: torch.Tensor | None = None) -> Any:
        """Codes [out, in] and scales as one value, which `decode` takes.

        `group_of` int64 [in] tells each input's group where groups are no neighbours (act-order).
        """

    def decode(self, codes: Any) -> torch.Tensor:
        """The weights fp32 [out, in] that the codes stand for."""


@runtime_checkable
class SelfFitting(Protocol):
    """A grid that searches its own scales, better than by a row of shrinks."""

    @property
    def has_lines(self) -> bool:
        """Whether it is a `Grid` in full; otherwise `search` and `decode` are all that it has."""

    def search_scales(self, weight: torch.Tensor, importance: torch.Tensor | None) -> Any:
        """Scales of [out, in] under which the squared error, weighed by fp32 [in], is small."""

    def search(self, weight: torch.Tensor, importance: torch.Tensor | None) -> Any:
        """The assembled codes of [out, in] under those scales."""


@runtime_checkable
class Scalable(Protocol):
    """A grid each group of which can be stretched by itself."""

    def group_width(self, inputs: int) -> int:
        """As in `Grid`."""

    def scaled(self, scales: Any, factors: torch.Tensor) -> Any:
        """Scales under which every code stands for its value times fp32 [out, groups], as stored."""

    def stretched(self, codes: Any, factors: torch.Tensor) -> Any:
        """Assembled codes under such scales."""

    def decode(self, codes: Any) -> torch.Tensor:
        """As in `Grid`."""


def encode(grid: Grid, weight: torch.Tensor, scales: Any, group_of: torch.Tensor | None = None) -> Any:
    """The nearest code of every weight of [out, in] under `scales`, some rows at a time."""
    lines = grid.lines(scales)
    inputs = weight.shape[1]
    parts = []
    for rows in row_slices(weight.shape):
        step, origin = (spread(part[rows], inputs, grid, group_of) for part in (lines.step, lines.origin))
        codes, _ = grid.round(weight[rows].float(), step, origin)
        parts.append(codes.to(torch.int16) if codes.is_floating_point() else codes)
    return grid.assemble(torch.cat(parts), scales, group_of)


def row_slices(shape: Sequence[int]) -> Iterator[slice]:
    """Slices of the rows of a matrix [out, in], each of about a megabyte in fp32."""
    rows = max(1, _VALUES_AT_ONCE // max(shape[1], 1))
    for begin in range(0, max(shape[0], 1), rows):
        yield slice(begin, begin + rows)


def spread(
    values: torch.Tensor, inputs: int, grid: Grid, group_of: torch.Tensor | None = None
) -> torch.Tensor:
    """Values [out, groups] -> [out, in], each input with its group's."""
    if group_of is not None:
        return values[:, group_of]
    if values.shape[1] == 1:
        return values.expand(-1, inputs)
    return values.repeat_interleave(grid.group_width(inputs), dim=1)[:, :inputs]


def group_width(group_size: int, inputs: int) -> int:
    """Inputs a group of `group_size`, -1 for a whole row. Raises SpecError when that is impossible."""
    width = inputs if group_size == -1 else min(group_size, inputs)
    if width < 1:
        raise SpecError(f"a group size of {group_size}", expected="a positive number, or -1 for a whole row")
    return width


def grouped(weight: torch.Tensor, width: int) -> torch.Tensor:
    """[out, in] -> fp32 [out, groups, width]; a short last group is filled up with its own last value."""
    values = weight.float()
    if missing := -values.shape[1] % width:
        values = torch.cat((values, values[:, -1:].expand(-1, missing)), dim=1)
    return values.reshape(len(values), -1, width)
