"""The GPTQ solver: a straight transcription of the paper's idea as oracle, and its promise as behaviour."""

from __future__ import annotations

import pytest
import torch

from qexport.errors import NonFiniteError
from qexport.grids.integer import IntegerGrid
from qexport.solvers.gptq import curvature, gptq, inverse_factor


def problem(out: int, inputs: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """A matrix and the Hessian of correlated inputs."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(inputs, inputs, generator=generator)
    x = torch.randn(4 * inputs, inputs, generator=generator) @ mixing
    return torch.randn(out, inputs, generator=generator), x.t() @ x / len(x)


def loss(decoded: torch.Tensor, weight: torch.Tensor, hessian: torch.Tensor) -> float:
    error = (decoded - weight).double()
    return float(((error @ hessian.double()) * error).sum())


def one_column_at_a_time(
    weight: torch.Tensor, hessian: torch.Tensor, grid: IntegerGrid, damp: float
) -> torch.Tensor:
    """Optimal brain quantization in fixed order (GPTQ's section 3.2), without Cholesky or lazy batches.

    After each column the inverse Hessian of the remaining ones is computed anew. Returns the codes.
    """
    W, inputs = weight.double().clone(), weight.shape[1]
    H = hessian.double() + damp * hessian.double().diagonal().mean() * torch.eye(inputs)
    width = grid.group_width(inputs)
    codes = torch.zeros_like(weight, dtype=torch.uint8)
    for i in range(inputs):
        if i % width == 0:
            scale = grid.fit(W[:, i : i + width].float())
        q = torch.round(W[:, i].float() / scale[:, 0].float()) + grid.zero
        codes[:, i] = q.clamp(0, (1 << grid.bits) - 1).to(torch.uint8)
        value = (codes[:, i].double() - grid.zero) * scale[:, 0].double()
        inverse = torch.linalg.inv(H[i:, i:])
        W[:, i:] -= torch.outer((W[:, i] - value) / inverse[0, 0], inverse[0])
    return codes


@pytest.mark.parametrize(("inputs", "group"), [(96, 32), (160, -1), (256, 64), (192, 192), (136, 8)])
@pytest.mark.parametrize("bits", [3, 4])
def test_codes_are_those_of_the_plain_algorithm(inputs: int, group: int, bits: int) -> None:
    weight, hessian = problem(16, inputs)
    grid = IntegerGrid(bits, group)
    ours = gptq(weight, curvature(hessian, damp=0.01), grid).codes
    plain = one_column_at_a_time(weight, hessian, grid, 0.01)
    # fp32 against fp64: a value in the middle between two codes may fall to either side, and what follows it
    assert (ours != plain).float().mean() < 0.02


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group", [32, 128, -1])
def test_it_beats_rounding_on_its_own_loss(bits: int, group: int) -> None:
    weight, hessian = problem(32, 256)
    grid = IntegerGrid(bits, group)
    solved = loss(grid.decode(gptq(weight, curvature(hessian), grid)), weight, hessian)
    rounded = loss(grid.decode(grid.quantize(weight)), weight, hessian)
    assert solved < 0.7 * rounded


def test_uncorrelated_inputs_leave_nothing_to_gain() -> None:
    weight, _ = problem(8, 64)
    grid = IntegerGrid(4, 32)
    codes = gptq(weight, curvature(torch.eye(64)), grid)
    assert torch.equal(codes.codes, grid.quantize(weight).codes)
    assert torch.equal(codes.scales, grid.quantize(weight).scales)


def test_inputs_that_never_occur_are_rounded_by_themselves() -> None:
    weight, hessian = problem(8, 64)
    hessian[:, 10] = hessian[10, :] = 0
    grid = IntegerGrid(4, 64)
    codes = gptq(weight, curvature(hessian), grid)
    nearest = grid.encode(weight, codes.scales)
    assert torch.equal(codes.codes[:, 10], nearest.codes[:, 10])


def test_the_inverse_factor() -> None:
    _, hessian = problem(1, 48)
    factor = inverse_factor(hessian, 0.01).double()
    damped = hessian.double() + 0.01 * hessian.double().diagonal().mean() * torch.eye(48)
    assert torch.equal(factor, factor.triu())
    torch.testing.assert_close(factor.t() @ factor, torch.linalg.inv(damped), rtol=1e-4, atol=1e-6)


def test_damping_rises_until_a_deficient_hessian_can_be_inverted() -> None:
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(1))
    hessian = (x.t() @ x).double()
    hessian -= 1e-3 * hessian.diagonal().mean() * torch.eye(64)  # not even semi-definite
    assert bool(inverse_factor(hessian.float(), 1e-6).isfinite().all())


def test_a_hopeless_hessian_is_told() -> None:
    with pytest.raises(NonFiniteError, match="not positive definite"):
        inverse_factor(-torch.eye(8) * 100, 0.01)


def test_arguments_are_not_changed() -> None:
    weight, hessian = problem(8, 64)
    before = weight.clone(), hessian.clone()
    gptq(weight, curvature(hessian), IntegerGrid(4, 32))
    assert torch.equal(weight, before[0])
    assert torch.equal(hessian, before[1])
