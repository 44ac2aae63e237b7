"""Scale search: how much of a group's range to cover, so that its squared error is least.

Few large weights stretch a group's range and so coarsen all of its steps; to clip them costs less. Each
group tries a row of `shrink` factors, which move the zero too where the grid has one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from qexport.errors import SpecError
from qexport.grids.grid import Grid, Lines, SelfFitting, encode, grouped
from qexport.solvers.evenly import code_range, divisible, kernels, over_rows, shrunk_lines

# values that are worked on together: 1 MiB in fp32, which stays in a core's cache
CHUNK = 1 << 18
_COMPILED_CHUNK = 1 << 21  # loops that keep a group in registers need no cache, but work for every thread

# The smallest factor tried, by bits. The best range of a normal variable shrinks with the bits (about 4
# deviations for 4 bits, 1.5 for 2), while a group's extremes are at 2 to 4 of them.
_LEAST = {1: 0.1, 2: 0.3, 3: 0.4, 4: 0.5, 5: 0.6}
_LEAST_OF_MANY_BITS = 0.7
_SPACING = 0.025

GroupLoss = Callable[[torch.Tensor], torch.Tensor]
"""Errors fp32 [rows, groups, width], 0 where a short last group is filled up -> losses [rows, groups].

May work in place."""


def shrinks_to_try(bits: int) -> list[float]:
    """Factors from 1 downwards, 0.025 apart: 37 for 1 bit, 29 for 2, 21 for 4, 13 for 6 and more."""
    count = round((1 - _LEAST.get(bits, _LEAST_OF_MANY_BITS)) / _SPACING)
    return [1 - i * _SPACING for i in range(count + 1)]


def search_scales(weight: torch.Tensor, grid: Grid, importance: torch.Tensor | None = None) -> Any:
    """Scales of `weight` [out, in] that minimise sum_j h_j (w_j - q_j)^2 in each group. Not changed.

    `importance` h, fp32 [in] and not negative, is the mean square of each input (the diagonal of the
    Hessian); None weighs all alike. Never worse than the grid's own fit, each group by itself. Where groups
    depend on each other the factor of each is chosen as if all had it, and the outcome as a whole is kept
    only if it is better. Raises SpecError for an importance of another length.
    """
    inputs = weight.shape[1]
    if importance is not None and importance.shape != (inputs,):
        raise SpecError(
            f"importance of shape {tuple(importance.shape)} for a weight of {inputs} inputs",
            expected="one number an input",
        )
    if isinstance(grid, SelfFitting):
        return grid.search_scales(weight, importance)
    h = torch.ones(inputs) if importance is None else importance.float()
    width = grid.group_width(inputs)
    h = zero_filled(h[None].to(weight.device), width)[0]
    # a group whose inputs never occur is still to be near its weights
    h = torch.where(h.sum(dim=1, keepdim=True) > 0, h, torch.ones_like(h))

    def loss(errors: torch.Tensor) -> torch.Tensor:
        return errors.square_().mul_(h).sum(dim=2)

    shrinks = shrinks_to_try(grid.bits)
    compiled = _least_squares(weight, grid, shrinks, h)
    shrink = best_shrink(weight, grid, shrinks, loss) if compiled is None else compiled
    scales = grid.fit(weight, shrink)
    if grid.groups_alone:
        return scales
    plain = grid.fit(weight)
    better = group_losses(weight, grid, scales, loss).sum() < group_losses(weight, grid, plain, loss).sum()
    return scales if bool(better) else plain


def search(weight: torch.Tensor, grid: Grid, importance: torch.Tensor | None = None) -> Any:
    """The nearest codes of `weight` [out, in] under the scales of `search_scales`. Not changed."""
    if isinstance(grid, SelfFitting):
        return grid.search(weight, importance)
    return encode(grid, weight, search_scales(weight, grid, importance))


def _least_squares(
    weight: torch.Tensor, grid: Grid, shrinks: Sequence[float], importance: torch.Tensor
) -> torch.Tensor | None:
    """`best_shrink` of the weighted square, `importance` [groups, width], in one loop; None without one."""
    codes = code_range(grid, weight)
    if codes is None:
        return None
    h = importance.clone()
    if beyond := h.numel() - weight.shape[1]:
        h[-1, -beyond:] = 0
    found = []
    for _, rows in row_chunks(weight, _COMPILED_CHUNK):
        values = grouped(rows, grid.group_width(weight.shape[1])).contiguous()
        lines = shrunk_lines(values, grid, shrinks)
        best = torch.zeros(values.shape[:2], dtype=torch.int64)
        arrays = [part.numpy() for part in (values, h, lines.step, lines.origin)]
        over_rows(len(rows), partial(_into, kernels().square_losses, (*arrays, *codes), best.numpy()))
        found.append(torch.tensor(shrinks)[best])
    return torch.cat(found)


def _into(kernel: Callable[..., None], arguments: tuple[Any, ...], result: Any, begin: int, end: int) -> None:
    """A kernel on some rows."""
    kernel(*arguments, begin, end, result)


def best_shrink(weight: torch.Tensor, grid: Grid, shrinks: Sequence[float], loss: GroupLoss) -> torch.Tensor:
    """The factor of each group, fp32 [out, groups], under which `loss` is least; the first of equals.

    Takes the memory of a few chunks of rows, and of one set of scales where groups depend on each other: then
    all are fitted together. Weight not changed.
    """
    if not grid.groups_alone:
        return _least(shrinks, lambda shrink: group_losses(weight, grid, grid.fit(weight, shrink), loss))
    found, inputs = [], weight.shape[1]
    compiled = code_range(grid, weight) is not None
    for _, rows in row_chunks(weight, _COMPILED_CHUNK if compiled else CHUNK):
        values = grouped(rows, grid.group_width(inputs))
        all_lines = shrunk_lines(values, grid, shrinks) if compiled else None

        def loss_of(
            shrink: float,
            rows: torch.Tensor = rows,
            values: torch.Tensor = values,
            all_lines: Lines | None = all_lines,
        ) -> torch.Tensor:
            if all_lines is None:
                lines = grid.lines(grid.fit(rows, shrink))
            else:
                at = shrinks.index(shrink)
                lines = Lines(all_lines.step[at], all_lines.origin[at])
            return loss(errors_of(values, inputs, grid, lines))

        found.append(_least(shrinks, loss_of))
    return torch.cat(found)


def _least(shrinks: Sequence[float], loss_of: Callable[[float], torch.Tensor]) -> torch.Tensor:
    """For each group the first of the factors whose loss [rows, groups] is least."""
    least = loss_of(shrinks[0])
    least = torch.where(least < torch.inf, least, torch.inf)  # NaN is worse than anything
    best = torch.full_like(least, shrinks[0])
    for shrink in shrinks[1:]:
        found = loss_of(shrink)
        better = found < least
        best[better] = shrink
        least = torch.where(better, found, least)
    return best


def group_losses(weight: torch.Tensor, grid: Grid, scales: Any, loss: GroupLoss) -> torch.Tensor:
    """The loss [out, groups] of rounding `weight` [out, in] under `scales`."""
    lines, inputs = grid.lines(scales), weight.shape[1]
    width = grid.group_width(inputs)
    chunks = ((rows, rows_of(lines, begin, len(rows))) for begin, rows in row_chunks(weight))
    return torch.cat([loss(errors_of(grouped(rows, width), inputs, grid, lines)) for rows, lines in chunks])


def rounding_errors(weight: torch.Tensor, grid: Grid, lines: Lines) -> torch.Tensor:
    """How far the nearest values are from `weight` [out, in], fp32 [out, in]."""
    inputs = weight.shape[1]
    errors = errors_of(grouped(weight, grid.group_width(inputs)), inputs, grid, lines)
    return errors.reshape(len(weight), -1)[:, :inputs]


def errors_of(values: torch.Tensor, inputs: int, grid: Grid, lines: Lines) -> torch.Tensor:
    """Rounding errors of `grouped` values [rows, groups, width]; 0 beyond `inputs`."""
    codes = code_range(grid, values)
    if codes is None:
        _, nearest = grid.round(values, lines.step[:, :, None], lines.origin[:, :, None])
        errors = nearest - values
    else:
        # group by group in memory: so a loss that couples a group's values multiplies without a copy
        rows, groups, width = values.shape
        by_group = torch.empty(groups, rows, width)
        parts = (values.contiguous(), divisible(lines.step).contiguous(), lines.origin.contiguous())
        arrays = [part.numpy() for part in parts]
        over_rows(rows, partial(_into, kernels().rounding_errors, (*arrays, *codes), by_group.numpy()))
        errors = by_group.transpose(0, 1)
    beyond = errors.shape[1] * errors.shape[2] - inputs
    if beyond:
        errors[:, -1, -beyond:] = 0
    return errors


def rows_of(lines: Lines, begin: int, count: int) -> Lines:
    """The lines of some rows."""
    return Lines(lines.step[begin : begin + count], lines.origin[begin : begin + count])


def row_chunks(weight: torch.Tensor, values: int = CHUNK) -> list[tuple[int, torch.Tensor]]:
    """Chunks of the rows of [out, in] of about so many values, each with the number of its first row."""
    rows = max(values // max(weight.shape[1], 1), 1)
    return [(begin, weight[begin : begin + rows]) for begin in range(0, len(weight), rows)]


def zero_filled(values: torch.Tensor, width: int) -> torch.Tensor:
    """[rows, in] -> [rows, groups, width]; a short last group is filled up with 0."""
    missing = -values.shape[1] % width
    return torch.nn.functional.pad(values, (0, missing)).reshape(len(values), -1, width)
