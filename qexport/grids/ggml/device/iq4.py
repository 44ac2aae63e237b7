"""The search for the steps of IQ4_NL and IQ4_XS in torch, all blocks at once: see `iq4_kernels`.

`values` fp32 [..., 32] and `weights` likewise, those of their errors; `nearest` fp32 [512]: the nearest level
of half units from -128 on. Blocks that hold what is no number have a step of 0.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from qexport.grids.ggml.blocks import reciprocal
from qexport.grids.ggml.device.halves import half, half_not_zero

# Weights at once: some ten tensors of 16 MiB at a time
PIECE = 1 << 22

_LARGEST = torch.finfo(torch.float32).max
_SETTLING = 3
_BETTER = 1 + 2**-21
_LOWEST, _HIGHEST = -32, 31  # whole numbers that scales of sub-blocks are


def steps_of_blocks(
    values: torch.Tensor, weights: torch.Tensor, tries: Sequence[float], nearest: torch.Tensor
) -> torch.Tensor:
    """IQ4_NL: the step fp32 [blocks], a number that fp16 has, of each of values [blocks, 32]."""
    size = _furthest(values)
    scaled = _scaled(values, size[:, None])
    wanted, _ = _best_steps(scaled, size, weights, tries, nearest)
    step = wanted / size
    # where fp16 has but 0 for it, a step must be better than none
    least = torch.where(
        half(wanted) == 0, _error(scaled, weights, torch.zeros_like(step), nearest)[0], _LARGEST
    )
    chosen, improving = torch.zeros_like(step), size != 0
    for _ in range(_SETTLING):
        stored = half_not_zero(step * size)
        error, sum_xq, sum_qq = _error(scaled, weights, stored / size, nearest)
        improving = improving & (error < least)
        least = torch.where(improving, error, least)
        chosen = torch.where(improving, stored, chosen)
        step = _ratio(sum_xq, sum_qq)
    return chosen


def steps_of_super_blocks(
    values: torch.Tensor, weights: torch.Tensor, tries: Sequence[float], nearest: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """IQ4_XS: the common step fp32 [blocks] of values [blocks, 8, 32], and its multiples [blocks, 8]."""
    sizes, size = _furthest(values), _furthest(values.flatten(1))
    wanted, growths = _best_steps(_scaled(values, sizes[..., None]), sizes, weights, tries, nearest)
    scaled = _scaled(values, size[:, None, None])
    wanted = (wanted / size[:, None]).nan_to_num_(0, 0, 0)
    unit = _common_step(wanted, growths)
    least = torch.full_like(unit, _LARGEST)
    chosen, multiples, improving = torch.zeros_like(unit), torch.zeros_like(wanted), size != 0
    for _ in range(_SETTLING):
        stored = half_not_zero(unit * size)
        error, found, unit = _choose_multiples(scaled, weights, wanted, stored / size, nearest)
        improving = improving & (error < least)
        least = torch.where(improving, error, least)
        chosen = torch.where(improving, stored, chosen)
        multiples = torch.where(improving[:, None], found, multiples)
    return chosen, multiples


def _furthest(values: torch.Tensor) -> torch.Tensor:
    """The number of each last dimension that is furthest from 0, and 0 where one is infinite or none."""
    low, high = values.amin(dim=-1).clamp_(max=0), values.amax(dim=-1).clamp_(min=0)
    return torch.where(high > -low, high, low).nan_to_num_(0, 0, 0)


def _scaled(values: torch.Tensor, size: torch.Tensor) -> torch.Tensor:
    """values / size, zeros where that is 0: squares of those neither overflow nor vanish."""
    return (values / size).nan_to_num_(0, 0, 0)


def _levels(ratios: torch.Tensor, nearest: torch.Tensor) -> torch.Tensor:
    """The levels nearest to numbers."""
    places = (ratios * 2).clamp_(-256, 255).add_(256).nan_to_num_(0).int()
    return nearest.index_select(0, places.flatten()).view(places.shape)


def _ratio(sum_xq: torch.Tensor, sum_qq: torch.Tensor) -> torch.Tensor:
    return torch.where(sum_qq > 0, sum_xq / sum_qq, 0)


def _best_steps(
    scaled: torch.Tensor,
    size: torch.Tensor,
    weights: torch.Tensor,
    tries: Sequence[float],
    nearest: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The best of all steps tried, after least squares, and how fast its error grows: [...] of [..., 32].

    `tries`: what the number furthest from 0 may be scaled to.
    """
    best = torch.zeros_like(size)
    steps, growths = torch.zeros_like(size), torch.zeros_like(size)
    for inverse in tries:
        levels = _levels(scaled * inverse, nearest)
        weighted = weights * levels
        sum_xq, sum_qq = (weighted * scaled).sum(dim=-1), weighted.mul_(levels).sum(dim=-1)
        step, gain = _ratio(sum_xq, sum_qq), _ratio(sum_xq * sum_xq, sum_qq)
        # the rounding of sums must not choose among steps that are equally good: neighbours would differ
        better = gain > best * _BETTER
        best = torch.where(better, gain, best)
        steps, growths = torch.where(better, step * size, steps), torch.where(better, sum_qq, growths)
    return steps, growths


def _error(
    scaled: torch.Tensor, weights: torch.Tensor, step: torch.Tensor, nearest: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The sums of h (x - step q)^2, h x q, h q q, of each [..., 32] under steps [...] and nearest levels."""
    levels = _levels(scaled * reciprocal(step)[..., None], nearest)
    off = scaled - step[..., None] * levels
    weighted = weights * levels
    error = off.square_().mul_(weights).sum(dim=-1)
    return error, (weighted * scaled).sum(dim=-1), weighted.mul_(levels).sum(dim=-1)


def _common_step(steps: torch.Tensor, growths: torch.Tensor) -> torch.Tensor:
    """[blocks]: of which steps [blocks, 8] are nearest to multiples, weighed by how their errors grow."""
    largest = steps.gather(1, steps.abs().argmax(dim=1, keepdim=True))
    # the largest is one of the multiples -32 to -20 or 19 to 31
    among = [torch.arange(first, first + 13, device=steps.device) for first in (-32, 19)]
    units = (largest / torch.cat(among))[:, :, None]
    steps = steps[:, None]
    off = steps - units * (steps / units).round_().clamp_(_LOWEST, _HIGHEST)
    totals = off.square_().mul_(growths[:, None]).sum(dim=-1).nan_to_num_(torch.inf, torch.inf)
    least, place = totals.min(dim=1, keepdim=True)
    return torch.where(least < _LARGEST, units[:, :, 0].gather(1, place), 0)[:, 0]


def _choose_multiples(
    scaled: torch.Tensor,
    weights: torch.Tensor,
    steps: torch.Tensor,
    unit: torch.Tensor,
    nearest: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Each sub-block's best multiple of a unit, near its own step [blocks, 8].

    Gives their errors [blocks], the multiples [blocks, 8], and their best unit [blocks].
    """
    middle = (steps / unit[:, None]).round_()
    least = torch.full_like(steps, _LARGEST)
    multiples, best_xq, best_qq = (torch.zeros_like(steps) for _ in range(3))
    for way in (-1, 0, 1):
        multiple = (middle + way).clamp_(_LOWEST, _HIGHEST)
        error, sum_xq, sum_qq = _error(scaled, weights, unit[:, None] * multiple, nearest)
        better = error < least
        least, multiples = torch.where(better, error, least), torch.where(better, multiple, multiples)
        best_xq, best_qq = torch.where(better, sum_xq, best_xq), torch.where(better, sum_qq, best_qq)
    products, squares = (multiples * best_xq).sum(dim=1), (multiples * multiples * best_qq).sum(dim=1)
    return least.sum(dim=1), multiples, _ratio(products, squares)
