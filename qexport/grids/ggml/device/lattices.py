"""The search for points, signs and scales of the IQ2 and IQ3 types in torch, all blocks at once.

It is that of `lattice_search`, which says how it goes, with its numbers and its letters. Blocks that hold
what is no number become zeros. b, g, n stand for blocks, groups of a block, weights of a group; points and
octets of a group lie in a third dimension.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import NamedTuple

import torch

from qexport.grids.ggml.device.halves import half
from qexport.grids.ggml.device.sharing import kept_by_device
from qexport.grids.ggml.lattice_tables import lattice
from qexport.grids.ggml.lattice_types import Parts

# Weights at once: the distances to all points near take 160 bytes a weight
PIECE = 1 << 20

_TINY = 1e-12
_LAST_CODE = 15.0
_SCANS, _SCAN_FROM, _SCAN_RATIO = 12, 1.15, (1.15 / 0.2) ** (1 / 11)
_SAME_OF_THREE, _SAME_OF_EIGHT = 0.05, 0.01
_STEPS, _STEP_FROM, _STEP = 40, 0.85, 0.025


class _Levels(NamedTuple):
    """The values of a coordinate: the lowest two and the last; the borders of three, none of eight."""

    low: float
    middle: float
    last: float
    borders: tuple[float, float] | None


class _Tables(NamedTuple):
    """A `Lattice` on a device: `points` int32 [cells * near], `coordinates` int8, `grid` fp32.

    `radix` int32 [dims]: what a level counts in the number of a cell. `places` int32 [near]: 0, 1, ...
    """

    points: torch.Tensor
    coordinates: torch.Tensor
    grid: torch.Tensor
    radix: torch.Tensor
    places: torch.Tensor


class _Work(NamedTuple):
    """Magnitudes relative to the largest, and their importance [b, g, n]; `odd` bool [b, g, octets]."""

    x: torch.Tensor
    w: torch.Tensor
    odd: torch.Tensor


class _Choice(NamedTuple):
    """Points and flips int32 [b, g, some] for trial scales, and what follows from them, fp32 [b, g].

    See `lattice_types.Choice`.
    """

    points: torch.Tensor
    flips: torch.Tensor
    codes: torch.Tensor
    wxp: torch.Tensor
    wpp: torch.Tensor
    losses: torch.Tensor


def parts_of_blocks(
    name: str, values: torch.Tensor, importance: torch.Tensor, group: int, unit: float, even: bool, tries: int
) -> Parts:
    """What stands for values fp32 [blocks, width] with importances likewise, of means about 1.

    `group` weights share a scale; `even`: octets have an even number of minus signs; `tries`: how many s.
    """
    levels, tables = _levels(name), _tables(name)(values)
    count, width = values.shape
    top = values.abs().amax(dim=1)
    top = torch.where((top > _TINY) & (top < torch.inf), top, 0)
    x = (values.abs() / top[:, None]).nan_to_num_(0, 0, 0)
    minus = (values < 0).view(count, width // group, group // 8, 8)
    signs = (minus.int() << _octet(values)).sum(dim=-1, dtype=torch.int32)
    grouped = (count, width // group, group)
    work = _Work(x.view(grouped), importance.reshape(grouped), minus.sum(dim=-1) % 2 == 1)

    alone = _search(work, tables, levels, even, _scan(work, levels), None)
    trial = alone.wxp.clamp(min=0) / alone.wpp
    stored = half((_common(trial, alone.wpp) * top / unit).nan_to_num_(0))
    step = (stored * unit / top)[:, None]
    middle = ((trial / step - 1) * 0.5).round_()
    best = _aim(work, tables, levels, even, middle, step)
    for k in range(1, tries):
        aside = (k + 1) // 2 * (1 if k % 2 else -1)
        best = _better(_aim(work, tables, levels, even, middle + aside, step), best)
    refitted = half((_refit(best) * top / unit).clamp_(min=0).nan_to_num_(0))
    stored = torch.where(stored > 0, refitted, 0)
    step = (stored * unit / top)[:, None]
    best = _aim(work, tables, levels, even, best.codes, step)

    some = (stored > 0)[:, None]
    if even:
        turned = work.odd & some[:, :, None]
        signs = torch.where(turned, signs ^ (1 << best.flips), signs)
    return Parts(
        stored,
        torch.where(some, best.codes, 0).int(),
        torch.where(some, best.points.flatten(1), 0),
        signs.flatten(1),
    )


@cache
def _levels(name: str) -> _Levels:
    found = lattice(name)
    low, middle, *_, last = found.levels.tolist()
    first, second = found.borders[:2].tolist()
    return _Levels(low, middle, last, (first, second) if len(found.levels) == 3 else None)


@cache
def _tables(name: str) -> Callable[[torch.Tensor], _Tables]:
    return kept_by_device(partial(_made, name))


def _made(name: str, device: torch.device) -> _Tables:
    found = lattice(name)
    dims, near = found.coordinates.shape[1:]
    return _Tables(
        torch.tensor(found.points.ravel().astype("i4")).to(device),
        torch.tensor(found.coordinates).to(device),
        torch.tensor(found.grid).to(device),
        torch.tensor([len(found.levels) ** i for i in range(dims)], dtype=torch.int32).to(device),
        torch.arange(near, dtype=torch.int32).to(device),
    )


def _octet(like: torch.Tensor) -> torch.Tensor:
    """0 to 7."""
    return torch.arange(8, dtype=torch.int32, device=like.device)


def _level(value: torch.Tensor, levels: _Levels) -> torch.Tensor:
    """The level nearest to each magnitude."""
    low, middle, last, borders = levels
    if borders is not None:
        return torch.where(value < borders[0], low, torch.where(value < borders[1], middle, last))
    step = middle - low
    return (value * (1 / step)).clamp_(max=7).trunc_().add_(0.5).mul_(step)


def _scan(work: _Work, levels: _Levels) -> torch.Tensor:
    """The scales [b, g] at which levels lose least, were each weight's chosen alone.

    Where magnitudes are all about the same, any level would do, but of points there is the one of the least.
    """
    x, w, _ = work
    top, total, squares = x.amax(dim=-1), x.sum(dim=-1), x.square().sum(dim=-1)
    found = top / levels.last
    most = torch.zeros_like(found)
    inverse = levels.last / (top * _SCAN_FROM)
    for _ in range(_SCANS):
        p = _level(x * inverse[..., None], levels)
        wp = w * p
        wxp, wpp = (wp * x).sum(dim=-1), wp.mul_(p).sum(dim=-1)
        squared = wxp * wxp
        more = squared > most * wpp
        most, found = torch.where(more, squared / wpp, most), torch.where(more, wxp / wpp, found)
        inverse = inverse * _SCAN_RATIO
    group = x.shape[-1]
    same = _SAME_OF_EIGHT if levels.borders is None else _SAME_OF_THREE
    alike = total * total > (1 - same) * group * squares
    return torch.where(top > _TINY, torch.where(alike, total / (group * levels.low), found), 0)


def _least(costs: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """Where in the last dimension, a power of two long, costs are least; the first of about the same.

    Costs are not negative: their bits, as whole numbers, have their order, and room for a place, which is
    written there.
    """
    last = len(places) - 1
    bits = costs.view(torch.int32).bitwise_and_(~last).bitwise_or_(places)
    return bits.amin(dim=-1).bitwise_and_(last)


def _flip(work: _Work, levels: _Levels, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The weight of each octet whose error grows least when turned, [b, g, octets]; v, odd octets' turned."""
    p = _level(v, levels)
    # (v + low)^2 - (v - p)^2: the lowest level on the other side in place of the nearest
    costs = (2 * v + levels.low - p).mul_(p.add_(levels.low)).mul_(work.w)
    octets = (*work.odd.shape, 8)
    flips = _least(costs.view(octets), _octet(v))
    turned = (_octet(v) == flips[..., None]) & work.odd[..., None]
    values = v.view(octets)
    return flips, torch.where(turned, -values, values).view(v.shape)


def _points(
    work: _Work, tables: _Tables, levels: _Levels, v: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The best of the points near each eight or four, [b, g, points], and their coordinates [b, g, n]."""
    dims, near = tables.coordinates.shape[1:]
    if levels.borders is None:
        digits = (v * (1 / (levels.middle - levels.low))).clamp_(0, 7).nan_to_num_(0).int()
    else:
        digits = (v > levels.borders[0]).int() + (v > levels.borders[1])
    cells = (digits.view(-1, dims) * tables.radix).sum(dim=1, dtype=torch.int32)
    distances = tables.coordinates.index_select(0, cells) - v.view(-1, dims, 1)
    costs = distances.square_().mul_(work.w.reshape(-1, dims, 1)).sum(dim=1)
    points = tables.points.index_select(0, cells * near + _least(costs, tables.places))
    return points.view(*v.shape[:2], v.shape[2] // dims), tables.grid.index_select(0, points).view(v.shape)


def _search(
    work: _Work,
    tables: _Tables,
    levels: _Levels,
    even: bool,
    trial: torch.Tensor,
    codes: torch.Tensor | None,
) -> _Choice:
    """Points for trial scales [b, g]; their sums and losses."""
    inverse = torch.where(trial > 0, trial.reciprocal(), 0)
    v = work.x * inverse[..., None]
    flips = torch.zeros_like(work.odd, dtype=torch.int32)
    if even:
        flips, v = _flip(work, levels, v)
    points, p = _points(work, tables, levels, v)
    wp = work.w * p
    wxp, wpp = (wp * v).sum(dim=-1) * trial, wp.mul_(p).sum(dim=-1)
    losses = trial * (trial * wpp - 2 * wxp)
    return _Choice(points, flips, trial if codes is None else codes, wxp, wpp, losses)


def _aim(
    work: _Work,
    tables: _Tables,
    levels: _Levels,
    even: bool,
    codes: torch.Tensor,
    step: torch.Tensor,
) -> _Choice:
    """Points for the scales that codes [b, g] stand for under d = `step` [b, 1]."""
    codes = codes.clamp(0, _LAST_CODE)
    return _search(work, tables, levels, even, step * (2 * codes + 1), codes)


def _better(now: _Choice, best: _Choice) -> _Choice:
    """Of each group that of two in which it loses less."""
    less = now.losses < best.losses
    wide = less[..., None]
    return _Choice(
        *(torch.where(wide, *pair) for pair in zip(now[:2], best[:2], strict=True)),
        *(torch.where(less, *pair) for pair in zip(now[2:], best[2:], strict=True)),
    )


def _common(scales: torch.Tensor, curvatures: torch.Tensor) -> torch.Tensor:
    """The d [b] for which scales d (2s + 1), s in 0 to 15, lose least, each group's loss being a parabola."""
    top = scales.amax(dim=1, keepdim=True) / 31
    steps = top * (torch.arange(_STEPS, device=scales.device) * _STEP + _STEP_FROM)
    d, scales = steps[:, :, None], scales[:, None]
    codes = ((scales * d.reciprocal() - 1) * 0.5).round_().clamp_(0, _LAST_CODE)
    misses = d * (2 * codes + 1) - scales
    losses = misses.square_().mul_(curvatures[:, None]).sum(dim=-1)
    return steps.gather(1, losses.argmin(dim=1, keepdim=True))[:, 0]


def _refit(choice: _Choice) -> torch.Tensor:
    """The least-squares d [b] of the points and codes."""
    factors = 2 * choice.codes + 1
    return (factors * choice.wxp).sum(dim=1) / (factors * factors * choice.wpp).sum(dim=1)
