"""ggml's first block types in torch: what `legacy_kernels` and `legacy_search` find, all blocks at once.

`values` fp32 [rows, groups, 32]; `weights` fp32 [groups, 32] are importances. Without these the bytes are
llama.cpp's: codes are chosen by the scale before it is rounded to fp16.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from qexport.grids.ggml.device.halves import half, half_not_zero
from qexport.grids.ggml.device.steps import divided, inverses, within_half

_BELOW_HALF = 0.49999997  # the number before 0.5
_SETTLING = 3


class Found(NamedTuple):
    """Codes, whole numbers fp32 [rows, groups, 32]; steps and values of code 0, fp32 [rows, groups, 1]."""

    codes: torch.Tensor
    steps: torch.Tensor
    lows: torch.Tensor


def symmetric(values: torch.Tensor, middle: int) -> Found:
    """Q4_0 and Q5_0: `middle` 8 and 16 is the code of 0; the number furthest from 0 has code 0."""
    place = values.abs().argmax(dim=-1, keepdim=True)  # the first one of several
    furthest = values.gather(-1, place) + 0.0  # -0 + 0 is 0
    steps = within_half(divided(furthest, -middle))
    inverse = inverses(steps)
    # a step without an inverse: code 0 there
    shift = torch.full_like(steps, middle + 0.5).masked_fill_((inverse == 0) & (steps != 0), 0)
    codes = (values * inverse).add_(shift).clamp_(0, 2 * middle - 1).floor_()
    return Found(codes, steps, torch.zeros_like(steps))


def affine(values: torch.Tensor, top: int) -> Found:
    """Q4_1 and Q5_1: codes from 0, the smallest number, to `top`, 15 and 31, the largest."""
    low, high = values.aminmax(dim=-1, keepdim=True)
    steps = within_half(divided(high - low + 0.0, top))
    # the smallest number keeps its sign where it is a zero: that of the first
    first_zero = values.gather(-1, (values == 0).to(torch.uint8).argmax(dim=-1, keepdim=True))
    lows = torch.where(low == 0, first_zero, low)
    codes = (values - within_half(lows)).mul_(inverses(steps)).add_(0.5).clamp_(0, top).floor_()
    return Found(codes, steps, lows)


def eight_bits(values: torch.Tensor) -> Found:
    """Q8_0: 127 is the absolute maximum; halves are rounded away from 0."""
    low, high = values.aminmax(dim=-1, keepdim=True)
    steps = within_half(divided(torch.maximum(low.abs(), high.abs()), 127))
    scaled = values * inverses(steps)
    # the number before 1/2: 1/2 itself would round 0.49999997 up
    codes = scaled.add_(torch.copysign(torch.full_like(scaled, _BELOW_HALF), scaled))
    return Found(codes.clamp_(-127, 127).trunc_(), steps, torch.zeros_like(steps))


def nearest(values: torch.Tensor, steps: torch.Tensor, lows: torch.Tensor, middle: int, top: int) -> Found:
    """The nearest codes under steps and lows that fp16 can hold; `middle` is the code of a low."""
    codes = (values - lows).mul_(inverses(steps)).add_(middle + 0.5).clamp_(0, top).floor_()
    return Found(codes, steps, lows)


def symmetric_search(
    values: torch.Tensor, weights: torch.Tensor, tries: Sequence[float], middle: int
) -> Found:
    """Q4_0 and Q5_0 under the least weighted squared error.

    `tries`: the code, a broken number from -middle to middle - 1, that the number furthest from 0 gets.
    """
    scaled, size, nothing = _scaled_down(values)
    weighted = scaled * weights
    best = step = torch.zeros_like(size)
    for inverse in tries:
        codes = (scaled * inverse).round_().clamp_(-middle, middle - 1)
        sum_xq, sum_qq = _sum(weighted * codes), _sum(codes.square_().mul_(weights))
        # by so much a step of sum_xq / sum_qq lowers the sum of h x x; NaN where all codes are 0
        gain = sum_xq * sum_xq / sum_qq
        better = gain > best
        best, step = torch.where(better, gain, best), torch.where(better, sum_xq / sum_qq, step)
    least, steps, going = torch.full_like(size, torch.inf), torch.zeros_like(size), ~nothing
    for _ in range(_SETTLING):
        stored = half_not_zero(step * size)
        step = stored / size
        codes = (scaled * step.reciprocal()).round_().clamp_(-middle, middle - 1)
        error = _sum((scaled - step * codes).square_().mul_(weights))
        going = going & (error < least)
        least, steps = torch.where(going, error, least), torch.where(going, stored, steps)
        sum_xq, sum_qq = _sum(weighted * codes), _sum(codes.square_().mul_(weights))
        going = going & (sum_qq != 0)
        step = sum_xq / sum_qq
    return nearest(values, steps, torch.zeros_like(steps), middle, 2 * middle - 1)


def affine_search(
    values: torch.Tensor, weights: torch.Tensor, tries: Sequence[tuple[float, float]], top: int
) -> Found:
    """Q4_1 and Q5_1 under the least weighted squared error.

    `tries`: the codes, broken numbers, that the smallest and the largest number get.
    """
    scaled, size, nothing = _scaled_down(values)
    weighted, sum_h = scaled * weights, _sum(weights)
    sum_x = _sum(weighted)

    def with_low(codes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The best low and step for codes, which are lost, and what they gain over no step at all.

        Where all codes are equal, the step is 0.
        """
        sum_xq = _sum(weighted * codes)
        heavy = codes * weights
        sum_q, sum_qq = _sum(heavy), _sum(heavy.mul_(codes))
        spread = sum_qq - sum_q * sum_q / sum_h
        together = sum_xq - sum_x * sum_q / sum_h
        step = (together / spread).masked_fill_(spread <= 0, 0)
        return (sum_x - step * sum_q) / sum_h, step, together * step

    least_value, greatest = scaled.aminmax(dim=-1, keepdim=True)
    going = greatest > least_value
    reach = (greatest - least_value).masked_fill_(~going, 1)
    # the plain range is what must be beaten
    low, step, best = least_value, reach / top, torch.full_like(size, -1)
    for first, last in tries:
        inverse = (last - first) / reach
        base = least_value - first / inverse
        codes = (scaled - base).mul_(inverse).round_().clamp_(0, top)
        found_low, found_step, gain = with_low(codes)
        better = (gain > best) & (found_step > 0)
        best = torch.where(better, gain, best)
        low, step = torch.where(better, found_low, low), torch.where(better, found_step, step)
    least, steps = torch.full_like(size, torch.inf), torch.zeros_like(size)
    lows = half(least_value * size).masked_fill_(nothing, 0)
    for _ in range(_SETTLING):
        stored_low, stored = half(low * size), half_not_zero(step * size)
        low, step = stored_low / size, stored / size
        from_low = scaled - low
        codes = (from_low * step.reciprocal()).round_().clamp_(0, top)
        error = _sum(from_low.sub_(step * codes).square_().mul_(weights))
        going = going & (error < least)
        least = torch.where(going, error, least)
        lows, steps = torch.where(going, stored_low, lows), torch.where(going, stored, steps)
        low, step, _ = with_low(codes)
        going = going & (step > 0)
    return nearest(values, steps, lows, 0, top)


def _scaled_down(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Blocks over their numbers furthest from 0, so that squares can't overflow or vanish; these numbers.

    And which blocks have only zeros: those stay, over 1.
    """
    low, high = values.aminmax(dim=-1, keepdim=True)
    furthest = torch.where(high > -low, high, low)
    nothing = furthest == 0
    size = furthest.masked_fill(nothing, 1)
    return values / size, size, nothing


def _sum(terms: torch.Tensor) -> torch.Tensor:
    return terms.sum(dim=-1, keepdim=True)
