"""HQQ, half-quadratic quantization: the zero is moved until few errors are large. Needs no data.

Badri & Shaji, "Half-Quadratic Quantization of Large Machine Learning Models" (2023). Minimised is
|W - W_r|_p^p with p < 1, which forgives outliers, over the zero z alone, where W_r = (W_q - z) / s and s is
the inverse of the step. With an auxiliary error W_e the problem falls into two halves, solved in turn.
"""

from __future__ import annotations

import torch

from qexport.errors import SpecError
from qexport.grids.grid import Grid, encode, grouped
from qexport.grids.integer import IntegerCodes, IntegerGrid, IntegerScales
from qexport.solvers.search import group_losses, row_chunks, zero_filled

# hqq's default for 4 bits (`round_zero`): from whole zeros on, the value 0 stays near a code
_ROUNDED_START = 4


def half_quadratic_scales(
    weight: torch.Tensor,
    grid: Grid,
    *,
    lp_norm: float = 0.7,
    beta: float = 10.0,
    iters: int = 20,
) -> IntegerScales:
    """Scales and zeros of `weight` [out, in] that minimise |W - W_r|_p^p. Not changed.

    A zero of fractions is hqq's own; an integer zero and a bias are rounded from it as they are stored. A
    group that rounding with the range's own scale and zero serves better in that norm keeps those: so
    where hqq clamps (ranges below 1e-4; steps below 5e-5) or rounding a far zero does harm.

    Raises SpecError for a grid without a zero to move, and for settings without sense.
    """
    if not isinstance(grid, IntegerGrid):
        raise SpecError(
            "HQQ moves the zero of an integer grid, and this grid has none",
            remedy="round to nearest, search the scales, or use GPTQ",
        )
    if grid.symmetric:
        raise SpecError(
            "HQQ moves the zero, and a symmetric grid has none to move", remedy="use an asymmetric grid"
        )
    if not (0 < lp_norm <= 1 and beta > 0 and iters > 0):
        raise SpecError(
            f"HQQ with lp_norm {lp_norm}, beta {beta}, iters {iters}",
            expected="a norm in (0, 1], all others positive",
        )
    plain = grid.fit(weight)
    inverse, zero = _start(weight, grid)
    if grid.zero == "float" and grid.bits == _ROUNDED_START and plain.zeros is not None:
        plain, zero = IntegerScales(plain.scales, plain.zeros.round()), zero.round()
    zero = moved_zero(weight, inverse, zero, grid, lp_norm=lp_norm, beta=beta, iters=iters)
    step = (1 / inverse).clamp(max=torch.finfo(grid.dtype).max).to(grid.dtype)
    # a step too small for its dtype: the plain fit knows what to do
    step = torch.where(step > 0, step, plain.scales)
    found = IntegerScales(step, grid.zeros_at(-zero / inverse, step))

    def loss(errors: torch.Tensor) -> torch.Tensor:
        return errors.abs().pow_(lp_norm).sum(dim=2)

    better = group_losses(weight, grid, found, loss) < group_losses(weight, grid, plain, loss)
    assert found.zeros is not None  # noqa: S101 - for the type checker
    assert plain.zeros is not None  # noqa: S101
    return IntegerScales(
        torch.where(better, found.scales, plain.scales), torch.where(better, found.zeros, plain.zeros)
    )


def half_quadratic(
    weight: torch.Tensor,
    grid: Grid,
    *,
    lp_norm: float = 0.7,
    beta: float = 10.0,
    iters: int = 20,
) -> IntegerCodes:
    """The nearest codes of `weight` [out, in] under the scales of `half_quadratic_scales`. Not changed."""
    scales = half_quadratic_scales(weight, grid, lp_norm=lp_norm, beta=beta, iters=iters)
    codes: IntegerCodes = encode(grid, weight, scales)
    return codes


def _start(weight: torch.Tensor, grid: IntegerGrid) -> tuple[torch.Tensor, torch.Tensor]:
    """Inverse steps and zeros, fp32 [out, groups], that cover each group's range."""
    values = grouped(weight, grid.group_width(weight.shape[1]))
    low, high = values.amin(dim=2), values.amax(dim=2)
    if grid.zero == "integer":  # which must lie among the codes
        low, high = low.clamp(max=0), high.clamp(min=0)
    inverse = grid.top / (high - low)
    inverse = torch.where(inverse.isfinite(), inverse, torch.ones_like(inverse))
    return inverse, -low * inverse


def moved_zero(
    weight: torch.Tensor,
    inverse: torch.Tensor,
    zero: torch.Tensor,
    grid: IntegerGrid,
    *,
    lp_norm: float,
    beta: float,
    iters: int,
) -> torch.Tensor:
    """The zeros, fp32 [out, groups], after at most `iters` rounds; `inverse` steps stay. Nothing is changed.

    As hqq 0.2.8's `optimize_weights_proximal_legacy`, its default: it stops when the mean error over the
    whole matrix no longer falls, with the zeros of that round, and beta does not grow by the paper's kappa.
    Takes the memory of a few chunks of rows.
    """
    inputs = weight.shape[1]
    width = grid.group_width(inputs)
    zero = zero.clone()
    # the filling of a short last group counts for nothing
    counted = None
    if inputs % width:
        counted = zero_filled(torch.ones(1, inputs, device=weight.device), width)
    least = float("inf")
    for _ in range(iters):
        total = 0.0
        for begin, rows in row_chunks(weight):
            W_f = grouped(rows, width)  # noqa: N806
            chunk = slice(begin, begin + len(rows))
            s, z = inverse[chunk, :, None], zero[chunk, :, None]
            W_q = (W_f * s).add_(z).round_().clamp_(0, grid.top)  # noqa: N806
            W_r = (W_q - z).div_(s)  # noqa: N806
            error = W_f - W_r
            size = error.abs()
            # the half of W_e: a shrinkage that sets small errors to 0 (the paper's equation 4)
            W_e = size.sub(size.pow(lp_norm - 1).mul_(1 / beta)).clamp_min_(0)  # noqa: N806
            W_e.mul_(error.sign())
            # the half of z: a mean (equation 5)
            targets = W_q.sub_((W_f - W_e).mul_(s))
            if counted is None:
                zero[chunk] = targets.mean(dim=2)
            else:
                zero[chunk] = targets.mul_(counted).sum(dim=2) / counted.sum(dim=2)
                size.mul_(counted)
            total += float(size.sum(dtype=torch.float64))
        if total >= least:
            break
        least = total
    return zero
