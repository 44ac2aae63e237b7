"""The way to the compiled loops: which grids they know, and rows shared out to threads.

For other grids and devices, and where numba has no wheel, solvers do the same in torch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import torch

from qexport.grids.grid import Grid, Lines
from qexport.grids.int8_rows import Int8RowGrid
from qexport.grids.integer import IntegerGrid

_ROWS_AT_LEAST = 16  # of a thread


@cache
def kernels() -> Any:
    """The module `kernels`; None where numba is not installed."""
    try:
        from qexport.solvers import kernels as found
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in ("numba", "llvmlite"):
            raise
        return None
    return found


def code_range(grid: Grid, weight: torch.Tensor) -> tuple[np.float32, np.float32] | None:
    """The lowest and the highest code of a grid of evenly spaced values; None where loops in torch serve.

    Those are other grids, weights on other devices, and a Python without numba.
    """
    if weight.device.type != "cpu" or kernels() is None:
        return None
    # their heirs may round in ways of their own
    if type(grid) is IntegerGrid:
        return np.float32(0), np.float32(grid.top)
    if type(grid) is Int8RowGrid:
        return np.float32(grid.bottom), np.float32(127)
    return None


def divisible(step: torch.Tensor) -> torch.Tensor:
    """Steps that one can divide by: a row of zeros has 0. GGUF's may be negative, and stay so."""
    tiny = torch.finfo(torch.float32).tiny
    return torch.where(step.abs() < tiny, tiny, step)


def shrunk_lines(values: torch.Tensor, grid: Grid, shrinks: Sequence[float]) -> Lines:
    """The lines of every group [rows, groups, width] under each factor, fp32 [shrinks, rows, groups].

    An evenly spaced grid's fit depends on a group's smallest and largest value alone, which are found once.
    """
    low, high = values.aminmax(dim=2)
    extremes = torch.stack((low, high), dim=2).reshape(len(values), -1)
    pairs: Grid = replace(grid, group_size=2) if isinstance(grid, IntegerGrid) else grid
    lines = [pairs.lines(pairs.fit(extremes, shrink)) for shrink in shrinks]
    return Lines(
        divisible(torch.stack([line.step for line in lines])), torch.stack([line.origin for line in lines])
    )


def over_rows(rows: int, work: Callable[[int, int], Any], at_least: int = _ROWS_AT_LEAST) -> list[Any]:
    """Calls `work(begin, end)` on spans that cover so many rows, where there are several no fewer than
    `at_least` each, in as many threads as torch has."""
    threads = min(torch.get_num_threads(), max(rows // at_least, 1))
    bounds = [rows * number // threads for number in range(threads + 1)]
    if threads == 1:
        return [work(0, rows)]
    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(work, bounds[:-1], bounds[1:]))
