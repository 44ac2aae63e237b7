"""AWQ: inputs that are large make their weights matter, so those weights are scaled up before rounding.

Lin et al., "AWQ" (2023), section 3.2: Q(W s) (x / s) with s per input, chosen by the error of the outputs.
The reference searches by running the layers; here the inputs' second moment H stands for the inputs, for
the mean squared error of a linear layer's outputs is tr(D H D^T) with D = Q(W s) / s - W.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from qexport.errors import SpecError
from qexport.grids.grid import Grid, grouped
from qexport.grids.products import for_products, multiply
from qexport.solvers.search import best_shrink, rounding_errors, row_chunks

_MULTIPLICATIONS = 1 << 32  # a trial of one ratio: about 0.1 s on two cores
_ROWS_AT_LEAST = 128
_LEAST = 1e-4  # of the largest scale, before they are centred


def search_awq_scales(
    targets: Sequence[tuple[torch.Tensor, torch.Tensor]],
    mean_abs: torch.Tensor,
    grid: Grid,
    points: int = 20,
) -> torch.Tensor:
    """Scales s, fp32 [in], for the layers that share an input: fold W * s into them and x / s before them.

    `targets` are pairs of a weight [out, in] and its inputs' Hessian [in, in]; `mean_abs` [in] is the mean
    |x| of the shared input. Tried are s = x^r, r in 0, 1/points .. (the paper's equation 5), and AutoAWQ's
    x^r / w^(1 - r), w the mean share of each weight in its group's largest ("duo scaling"); rounded to
    nearest on `grid`. Ones when none lowers the error. Inputs that never occur have 1.

    A trial costs out * in^2 multiplications. Beyond 2^32 (4096 inputs: 256 rows), rows evenly spaced
    over all targets, but no fewer than 128, stand for all. Nothing is changed. Raises SpecError when shapes
    do not fit together.
    """
    if not targets or any(
        weight.shape[1] != len(mean_abs) or hessian.shape != (len(mean_abs), len(mean_abs))
        for weight, hessian in targets
    ):
        raise SpecError(
            f"targets {[(tuple(w.shape), tuple(h.shape)) for w, h in targets]} of {len(mean_abs)} inputs",
            expected="weights [out, in] and Hessians [in, in] of the same inputs",
        )
    inputs = len(mean_abs)
    samples = _samples([weight for weight, _ in targets], inputs)
    shared = _by_hessian(samples, [hessian for _, hessian in targets])
    x = mean_abs.float()
    w = _mean_share([weight for weight, _ in targets], grid)
    best = torch.ones(inputs, device=x.device)
    (least,) = _output_errors(shared, [best], grid)
    for point in range(points):
        ratio = point / points
        larger = (x / x.max().clamp(min=torch.finfo(torch.float32).tiny)).pow(ratio)
        tried = [_centred(raw, x > 0) for raw in (larger, larger / (w.pow(1 - ratio) + 1e-4))]
        for scales, error in zip(tried, _output_errors(shared, tried, grid), strict=True):
            if error < least:
                best, least = scales, error
    return best


def search_clip(
    weight: torch.Tensor,
    hessian: torch.Tensor,
    grid: Grid,
    points: int = 20,
    max_shrink: float = 0.5,
) -> torch.Tensor:
    """Factors fp32 [out, groups] on the groups' ranges, for `grid.fit(weight, shrink)`. Nothing is changed.

    Tried are 1 - i / points down to, but without, 1 - `max_shrink`, as AutoAWQ does; each group takes that
    which minimises d^T H_gg d, d its rounding errors [width] and H_gg its block of the Hessian [in, in]; 1
    where nothing is better. Errors of different groups are taken as independent. AutoAWQ leaves queries
    and keys as they are, whose product this loss knows nothing of. Raises SpecError for a Hessian of
    another shape.
    """
    inputs = weight.shape[1]
    if hessian.shape != (inputs, inputs):
        raise SpecError(
            f"a Hessian of shape {tuple(hessian.shape)} for a weight of {inputs} inputs",
            expected="one row and column an input",
        )
    blocks = _diagonal_blocks(hessian, grid.group_width(inputs))

    def loss(errors: torch.Tensor) -> torch.Tensor:
        errors = errors.transpose(0, 1)  # [groups, rows, width]
        return (errors @ blocks).mul_(errors).sum(dim=2).t()

    shrinks = [1 - i / points for i in range(max(int(max_shrink * points), 1))]
    return best_shrink(weight, grid, shrinks, loss)


def _diagonal_blocks(hessian: torch.Tensor, width: int) -> torch.Tensor:
    """[in, in] -> [groups, width, width] along the diagonal; a short last one is filled up with 0."""
    inputs = len(hessian)
    groups = -(-inputs // width)
    blocks = torch.zeros(groups, width, width, device=hessian.device)
    for group in range(groups):
        part = slice(group * width, min((group + 1) * width, inputs))
        count = part.stop - part.start
        blocks[group, :count, :count] = hessian[part, part]
    return blocks


def _samples(weights: Sequence[torch.Tensor], inputs: int) -> list[tuple[torch.Tensor, float]]:
    """Rows of each weight, fp32, and how many each stands for: all, or evenly spaced ones, in proportion."""
    total = sum(len(weight) for weight in weights)
    affordable = max(_MULTIPLICATIONS // inputs**2, _ROWS_AT_LEAST)
    samples = []
    for weight in weights:
        count = len(weight) if total <= affordable else max(len(weight) * affordable // total, 1)
        rows = torch.arange(count, device=weight.device) * len(weight) // count
        samples.append((weight[rows].float(), len(weight) / count))
    return samples


def _by_hessian(
    samples: Sequence[tuple[torch.Tensor, float]], hessians: Sequence[torch.Tensor]
) -> list[tuple[torch.Tensor, list[tuple[torch.Tensor, float]]]]:
    """Targets that share a Hessian together, with it: in bf16 where the processor multiplies that faster.

    bf16's error, 1 in 500 of each entry and to either side, is lost in a sum over thousands of them.
    """
    shared: dict[int, tuple[torch.Tensor, list[tuple[torch.Tensor, float]]]] = {}
    for sample, hessian in zip(samples, hessians, strict=True):
        if id(hessian) not in shared:
            shared[id(hessian)] = for_products(hessian), []
        shared[id(hessian)][1].append(sample)
    return list(shared.values())


def _output_errors(
    shared: Sequence[tuple[torch.Tensor, list[tuple[torch.Tensor, float]]]],
    candidates: Sequence[torch.Tensor],
    grid: Grid,
) -> list[float]:
    """For each of the scales the sum over targets of tr(D H D^T)."""
    totals = [0.0] * len(candidates)
    for hessian, samples in shared:
        # a Hessian is long to read: once for all that is multiplied with it
        parts = []
        for scales in candidates:
            for weight, share in samples:
                W = weight * scales  # noqa: N806
                D = rounding_errors(W, grid, grid.lines(grid.fit(W))).div_(scales)  # noqa: N806
                parts.append(D.mul_(share**0.5))
        errors = torch.cat(parts)
        products = multiply(errors, hessian).mul_(errors)
        rows = sum(len(weight) for weight, _ in samples)
        for number in range(len(candidates)):
            totals[number] += float(products[number * rows : (number + 1) * rows].sum(dtype=torch.float64))
    return totals


def _mean_share(weights: Sequence[torch.Tensor], grid: Grid) -> torch.Tensor:
    """The mean over all rows of |w| / max |w| of the group, fp32 [in]."""
    inputs = weights[0].shape[1]
    total = torch.zeros(inputs, dtype=torch.float64, device=weights[0].device)
    for weight in weights:
        for _, rows in row_chunks(weight):
            values = grouped(rows, grid.group_width(inputs)).abs()
            shares = values.div_(values.amax(dim=2, keepdim=True) + 1e-6)
            total += shares.reshape(len(rows), -1)[:, :inputs].sum(dim=0)
    return (total / sum(len(weight) for weight in weights)).float()


def _centred(raw: torch.Tensor, alive: torch.Tensor) -> torch.Tensor:
    """Scales with the largest and the smallest as far from 1; inputs that never occur have 1."""
    if not bool(alive.any()):
        return torch.ones_like(raw)
    clamped = raw.clamp(min=float(raw[alive].max()) * _LEAST)
    low, high = clamped[alive].min(), clamped[alive].max()
    return torch.where(alive, clamped / (low * high).sqrt(), torch.ones_like(raw))
