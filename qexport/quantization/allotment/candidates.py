"""Which grids a layer may get, and what each costs in bytes."""

from __future__ import annotations

import math
import typing
from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

from qexport.errors import SpecError
from qexport.grids.grid import Grid
from qexport.methods import Method
from qexport.modeling.blocks import fused_layers
from qexport.modeling.skeleton import Skeleton
from qexport.specs import Bits

GROUP_SIZES = (32, 64, 128)  # what every runtime of integer grids has kernels for
_MANY_BITS = 5  # from which on finer groups cost more than they are worth


class Candidate(NamedTuple):
    """Bits a code, and inputs a scale: -1 for a whole row, None where the format has no choice."""

    bits: int
    group_size: int | None

    def __str__(self) -> str:
        return str(self.bits) if self.group_size is None else f"{self.bits}:{self.group_size}"

    @classmethod
    def parse(cls, text: str) -> Candidate:
        """The candidate that `str` wrote. Raises ValueError."""
        bits, colon, group = text.partition(":")
        return cls(int(bits), int(group) if colon else None)


def candidate_of(grid: Grid) -> Candidate:
    """What a grid is called here."""
    return Candidate(grid.bits, getattr(grid, "group_size", None))


def grids_to_try(method: Method, group_size: int | None = None) -> dict[Candidate, Grid]:
    """The grids of the method's format: every width that it has, in groups of 32, 64, 128 and of the common
    size; with `group_size` of that one alone."""
    common = candidate_of(method.common).group_size
    sizes: Sequence[int | None] = [None] if common is None else sorted({*GROUP_SIZES, common})
    found: dict[Candidate, Grid] = {}
    for bits in typing.get_args(Bits):
        for size in sizes if group_size is None else [group_size]:
            try:
                found[Candidate(bits, size)] = method.grid(bits, size)
            except SpecError:
                continue  # the format has it not
    return found


def _width(group_size: int | None) -> float:
    """-1 is a whole row."""
    return math.inf if group_size in (None, -1) else float(group_size or 0)


def fitting(method: Method, shape: tuple[int, int], grids: Mapping[Candidate, Grid]) -> dict[Candidate, Grid]:
    """Those of `grids` that a layer [out, in] can be stored on; from 5 bits on in the largest groups only."""
    found = {
        candidate: grid
        for candidate, grid in grids.items()
        if not method.format.obstacle(shape, grid)
        and not ((candidate.group_size or -1) > 0 and shape[1] % (candidate.group_size or 1))
    }

    return {
        candidate: grid
        for candidate, grid in found.items()
        if candidate.bits < _MANY_BITS
        or _width(candidate.group_size)
        == max(_width(other.group_size) for other in found if other.bits == candidate.bits)
    }


def stored_bytes(method: Method, shape: tuple[int, int], grid: Grid) -> int:
    """Bytes of a layer [out, in] in the method's format: codes, scales, zeros and all."""
    return sum(info.size for info in method.format.layout("", shape, grid))


def units_of(skeleton: Skeleton, layers: Collection[str]) -> list[tuple[str, ...]]:
    """Those of `layers` that lie in blocks, as sets that must get the same grid: vLLM refuses fused layers of
    differing bits."""
    found = [tuple(name for name in fused if name in layers) for fused in fused_layers(skeleton)]
    return [unit for unit in found if unit]
