"""The scales of K-quants, searched in torch: the search of `k_search`, all super-blocks at once.

A sub-block's weights lie down a column of y [width, super-blocks, sub-blocks], so that sums over a sub-block
run over neighbouring columns. What is known of each sub-block is [super-blocks, sub-blocks]; what of each
super-block, [super-blocks, 1]. Steps, formulas and names are those of `k_search`, which says why. Fits of
several starts are compared at once and not one after the other: fewer and larger operations. Of lines that
fit all but exactly the first is taken; in `k_search` rounding chooses among them.

Nothing here waits for the device: no number is read back, and no shape depends on data. Operations in place
are upon tensors made here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

from qexport.grids.ggml.device.halves import half

PIECE = 1 << 23  # weights to search at once
_TOGETHER = 8  # starts whose fits are compared at once

_LEAST = 2.0**-24  # fp16's least number
_LEAST_NORMAL = 2.0**-14
_SMALLEST = 1e-30  # numbers below it have no inverse to speak of
# Of a sub-block's square: an error below it is of rounding alone. Weights of two or three values fit exactly
# in several ways; where all sub-blocks take the first of them, one step d suits them all.
_EXACT = 1e-6
_REACH = 65504.0 * 128 * 32  # no K-quant reaches further: squares beyond it are of no use


@dataclass(frozen=True)
class Search:
    """What to search, as the kernels of `k_search` take it (`affine` and `symmetric`): see there."""

    count: int  # sub-blocks of a super-block
    width: int
    zero: float
    top: float
    bend: float
    starts: list[list[float]]
    tries: tuple[float, ...]
    neighbours: tuple[tuple[float, ...], ...]
    rounds: int


class Found(NamedTuple):
    """What is best for super-blocks, fp32: errors [n, 1]; d and dmin [n, 1], as fp16 holds them; levels."""

    error: torch.Tensor
    d: torch.Tensor
    dmin: torch.Tensor
    level: torch.Tensor
    minlevel: torch.Tensor


class _Columns(NamedTuple):
    """Weights and the weights of their errors, [width, n, m], and sums over each sub-block, [n, m].

    y is without the middle of its range, where one was taken off.
    """

    y: torch.Tensor
    o: torch.Tensor
    low: torch.Tensor
    high: torch.Tensor
    middle: torch.Tensor
    so: torch.Tensor
    sy: torch.Tensor
    syy: torch.Tensor


class _Sums(NamedTuple):
    """Sums over the codes of sub-blocks: [n, m], or [starts, n, m]."""

    sq: torch.Tensor
    sqq: torch.Tensor
    syq: torch.Tensor


class _Fit(NamedTuple):
    """Least-squares lines and their errors, infinite where there is none that may be taken."""

    error: torch.Tensor
    scale: torch.Tensor
    shift: torch.Tensor


def affine(weight: torch.Tensor, importance: torch.Tensor, search: Search) -> Found:
    """Scales of w = d level q - dmin minlevel, q in 0..2 zero - 1, levels in 0..top.

    weight fp32 [rows, in]; importance fp32 [width, sub-blocks of a row], or [width, 0] for none.
    """
    zero = search.zero
    part = _centred(_load(weight, importance, search))
    scale, shift = _searched_line(part, search)
    sums = _sums_of(part, scale, shift, zero)
    free = scale
    d = _step(free, sums.sqq - sums.sq.square() / part.so, search, 0, search.top)
    scale = d * _multiple(free, d).clamp_(max=search.top)
    minimum = scale * zero - (part.sy - scale * sums.sq) / part.so - part.middle
    dmin = _step(minimum.clamp_(min=0), part.so, search, 0, search.top)
    trial = best = _affine_levels(part, sums, free, d, dmin, search)
    for _ in range(1, search.rounds):
        scale = trial.level * d
        shift = scale * zero - trial.minlevel * dmin - part.middle
        sums = _sums_of(part, scale, shift, zero)
        d, dmin = _refit(part, sums, trial, zero)
        determinant = part.so * sums.sqq - sums.sq.square()
        free = (part.so * sums.syq - part.sy * sums.sq) / determinant
        free = torch.where((determinant > 0) & (free > 0), free, trial.level * d)
        trial = _affine_levels(part, sums, free, d, dmin, search)
        best = _better(trial, best)
    return best


def symmetric(weight: torch.Tensor, importance: torch.Tensor, search: Search) -> Found:
    """Scales of w = d level q, q in -zero..zero - 1, levels in -top..top - 1; minima are zeros.

    See `affine`. A start is which code the weight of largest size would have.
    """
    zero, top = search.zero, search.top
    part = _load(weight, importance, search)
    free, cost = _searched_scale(part, search)
    d = _step(free, cost, search, -top, top - 1)
    trial = best = _symmetric_levels(part, free, d, search)
    for _ in range(1, search.rounds):
        sums = _sums(part, _inverse(trial.level * d), None, zero)
        d = _refit_scale(sums, trial)
        free = torch.where(sums.sqq > 0, sums.syq / sums.sqq, trial.level * d)
        trial = _symmetric_levels(part, free, d, search)
        best = _better(trial, best)
    return best


def _load(weight: torch.Tensor, importance: torch.Tensor, search: Search) -> _Columns:
    """Sub-blocks in columns, with the weights of their errors: importance (1 + bend x^2 / mean square)."""
    rows = len(weight)
    y = weight.view(-1, search.count, search.width).permute(2, 0, 1).clamp(-_REACH, _REACH).contiguous()
    square = y.square()
    total = square.sum(0).sum(-1, keepdim=True)
    each = search.bend * search.count * search.width / total
    o = square.mul_(torch.where(total >= _SMALLEST, each, 0.0)).add_(1)
    if importance.shape[1]:
        of_row = o.view(search.width, rows, -1, search.count)
        of_row.mul_(importance.view(search.width, 1, -1, search.count))
    low, high = y.amin(0).clamp_(max=0), y.amax(0)
    none = torch.zeros_like(low)
    return _Columns(y, o, low, high, none, none, none, none)


def _centred(part: _Columns) -> _Columns:
    """Takes the middle of its range off each sub-block: `part.y` is changed."""
    middle = 0.5 * (part.low + part.high)
    y = part.y.sub_(middle)
    oy = part.o * y
    return part._replace(middle=middle, so=part.o.sum(0), sy=oy.sum(0), syy=oy.mul_(y).sum(0))


def _searched_line(part: _Columns, search: Search) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and shift, [n, m], of the least error that the starts lead to."""
    zero = search.zero
    reach = part.high - part.low
    narrow = _inverse(reach)
    wide = reach / (2 * zero - 1)
    best = _Fit(torch.full_like(wide, torch.inf), wide, 0.5 * wide)
    for first in range(0, len(search.starts), _TOGETHER):
        starts = search.starts[first : first + _TOGETHER]
        sums = _stacked([_sums(part, a * narrow, narrow.new_full((1,), b), zero) for a, b in starts])
        fits = _least_squares(part, sums, zero)
        _, start = fits.error.min(0, keepdim=True)
        best = _lesser(_Fit(*(each.gather(0, start)[0] for each in fits)), best)
    again = _least_squares(part, _sums_of(part, best.scale, best.shift, zero), zero)
    _, scale, shift = _lesser(again, best)
    return scale, shift


def _searched_scale(part: _Columns, search: Search) -> tuple[torch.Tensor, torch.Tensor]:
    """The scale [n, m] of the least error that the starts lead to, and the cost of its squared change."""
    extreme = torch.where(part.high > -part.low, part.high, part.low)
    narrow = _inverse(extreme)
    sums = _stacked([_sums(part, start * narrow, None, search.zero) for (start,) in search.starts])
    free = sums.syq / sums.sqq
    gain, start = torch.where(sums.sqq > 0, sums.syq * free, 0.0).max(0, keepdim=True)
    some = gain[0] > 0
    found = torch.where(some, free.gather(0, start)[0], extreme / -search.zero)
    return found, torch.where(some, sums.sqq.gather(0, start)[0], 0.0)


def _codes(y: torch.Tensor, inverse: torch.Tensor, offset: torch.Tensor | None, zero: float) -> torch.Tensor:
    """The codes rint(y inverse + offset), signed, [width, n, m]."""
    found = y * inverse if offset is None else torch.addcmul(offset, y, inverse)
    return found.clamp_(-zero, zero - 1).round_()


def _sums(part: _Columns, inverse: torch.Tensor, offset: torch.Tensor | None, zero: float) -> _Sums:
    """The sums of those codes; without offset, no sum of the codes alone is wanted: zeros."""
    q = _codes(part.y, inverse, offset, zero)
    oq = part.o * q
    sq = torch.zeros_like(inverse) if offset is None else oq.sum(0)
    sqq = q.mul_(oq).sum(0)
    return _Sums(sq, sqq, oq.mul_(part.y).sum(0))


def _stacked(trials: list[_Sums]) -> _Sums:
    """The sums of several trials as one, [trials, n, m]."""
    return _Sums(*(torch.stack(each) for each in zip(*trials, strict=True)))


def _sums_of(part: _Columns, scale: torch.Tensor, shift: torch.Tensor, zero: float) -> _Sums:
    """The sums of the codes by a scale, 0 or more, and a shift."""
    inverse = _inverse(scale)
    return _sums(part, inverse, -shift * inverse, zero)


def _least_squares(part: _Columns, sums: _Sums, zero: float) -> _Fit:
    """The scale and shift of least squares: y = s q + b, where s zero - b - middle must not be negative."""
    (sq, sqq, syq), (so, sy, middle) = sums, (part.so, part.sy, part.middle)
    determinant = so * sqq - sq.square()
    scale = (so * syq - sy * sq) / determinant
    shift = (sy - scale * sq) / so
    beyond = shift > scale * zero - middle
    bound = (syq + zero * sy + middle * (sq + zero * so)) / (sqq + zero * (2 * sq + zero * so))
    scale = torch.where(beyond, bound, scale)
    shift = torch.where(beyond, bound * zero - middle, shift)
    error = part.syy - 2 * (scale * syq + shift * sy) + scale * (scale * sqq + 2 * shift * sq)
    error += shift.square() * so
    error = torch.maximum(error, _EXACT * part.syy)
    taken = (determinant > 0) & (scale > 0) & (error < torch.inf)
    return _Fit(torch.where(taken, error, torch.inf), scale, shift)


def _lesser(fit: _Fit, best: _Fit) -> _Fit:
    """The fit with the lesser error, sub-block by sub-block."""
    better = fit.error < best.error
    return _Fit(*(torch.where(better, new, old) for new, old in zip(fit, best, strict=True)))


def _step(
    values: torch.Tensor, cost: torch.Tensor, search: Search, lowest: float, highest: float
) -> torch.Tensor:
    """The step [n, 1] whose multiples lowest..highest cost the least in place of values [n, m]."""
    limit = values.gather(-1, values.abs().argmax(-1, keepdim=True))
    best, least = torch.zeros_like(limit), torch.full_like(limit, torch.inf)
    for multiple in search.tries:
        step = half(limit / multiple)
        # fp16's least numbers lie far apart: the next larger, where the largest value would be cut off
        short = ((step * multiple).abs() < 0.995 * limit.abs()) & (step.abs() < _LEAST_NORMAL)
        step = torch.where(short, step + torch.where(limit * multiple > 0, _LEAST, -_LEAST), step)
        away = _multiple(values, step).clamp_(lowest, highest).mul_(step).sub_(values)
        total = away.square_().mul_(cost).sum(-1, keepdim=True)
        better = total < least
        least, best = torch.where(better, total, least), torch.where(better, step, best)
    return best


def _affine_levels(
    part: _Columns, sums: _Sums, free: torch.Tensor, d: torch.Tensor, dmin: torch.Tensor, search: Search
) -> Found:
    """The levels near `free`, and near the minimum that is best for the codes, with the least error."""
    base = part.sy / part.so + part.middle
    slope = search.zero + sums.sq / part.so
    nearest = _multiple(free, d)
    trials = []
    for aside, min_aside in search.neighbours:
        level = (nearest + aside).clamp_(0, search.top)
        scale = level * d
        minlevel = (_multiple(scale * slope - base, dmin) + min_aside).clamp_(0, search.top)
        shift = scale * search.zero - minlevel * dmin - part.middle
        trials.append((_error(part, scale, shift, search.zero), level, minlevel))
    return _least(trials, d, dmin)


def _symmetric_levels(part: _Columns, free: torch.Tensor, d: torch.Tensor, search: Search) -> Found:
    """The levels near `free` with the least error."""
    nearest, none = _multiple(free, d), torch.zeros_like(free)
    trials = []
    for (aside,) in search.neighbours:
        level = (nearest + aside).clamp_(-search.top, search.top - 1)
        trials.append((_error(part, level * d, None, search.zero), level, none))
    return _least(trials, d, torch.zeros_like(d))


def _error(part: _Columns, scale: torch.Tensor, shift: torch.Tensor | None, zero: float) -> torch.Tensor:
    """What the codes by a scale and a shift leave, [n, m]: summed, for sums that were multiplied cancel."""
    inverse = _inverse(scale)
    q = _codes(part.y, inverse, None if shift is None else -shift * inverse, zero)
    left = part.y if shift is None else part.y - shift
    return torch.addcmul(left, scale, q, value=-1).square_().mul_(part.o).sum(0)


def _least(
    trials: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]], d: torch.Tensor, dmin: torch.Tensor
) -> Found:
    """The first of those trials (error, level, minlevel) with the least error, sub-block by sub-block."""
    error, level, minlevel = trials[0]
    for other, other_level, other_minlevel in trials[1:]:
        better = other < error
        error = torch.where(better, other, error)
        level = torch.where(better, other_level, level)
        minlevel = torch.where(better, other_minlevel, minlevel)
    return Found(error.sum(-1, keepdim=True), d, dmin, level, minlevel)


def _better(trial: Found, best: Found) -> Found:
    """The one with the lesser error, super-block by super-block."""
    better = trial.error < best.error
    return Found(*(torch.where(better, new, old) for new, old in zip(trial, best, strict=True)))


def _refit(part: _Columns, sums: _Sums, of: Found, zero: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Least-squares d and dmin of super-blocks for their codes and levels, or as they were."""
    so, sy, middle, level, minlevel = part.so, part.sy, part.middle, of.level, of.minlevel
    # of codes from 0 on, and of the weights themselves
    soq = sums.sq + zero * so
    soqq = sums.sqq + zero * (sums.sq + soq)
    dd = (level.square() * soqq).sum(-1, keepdim=True)
    dm = (level * minlevel * soq).sum(-1, keepdim=True)
    mm = (minlevel.square() * so).sum(-1, keepdim=True)
    dx = (level * (sums.syq + zero * sy + middle * soq)).sum(-1, keepdim=True)
    mx = (minlevel * (sy + middle * so)).sum(-1, keepdim=True)
    determinant = dd * mm - dm.square()
    both = determinant > 1e-5 * dd * mm
    d = torch.where((dd > 0) & (mm == 0), dx / dd, of.d)
    d = torch.where(both, (dx * mm - mx * dm) / determinant, d)
    dmin = torch.where(both, (dx * dm - dd * mx) / determinant, of.dmin)
    return half(torch.where(d * of.d > 0, d, of.d)), half(torch.where(dmin > 0, dmin, of.dmin))


def _refit_scale(sums: _Sums, of: Found) -> torch.Tensor:
    """As `_refit`, without minima."""
    dd = (of.level.square() * sums.sqq).sum(-1, keepdim=True)
    d = (of.level * sums.syq).sum(-1, keepdim=True) / dd
    return half(torch.where((dd > 0) & (d * of.d > 0), d, of.d))


def _inverse(scale: torch.Tensor) -> torch.Tensor:
    """1 / scale, and 0 where the scale is next to nothing."""
    return torch.where(scale.abs() >= _SMALLEST, scale.reciprocal(), 0.0)


def _multiple(values: torch.Tensor, step: torch.Tensor) -> torch.Tensor:
    """The nearest multiples of a step to values, and 0 where the step is 0."""
    return torch.where(step == 0, 0.0, values / step).round_()
