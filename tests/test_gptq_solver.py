"""The GPTQ solver: a straight transcription of the paper's idea as oracle, and its promise as behaviour."""

from __future__ import annotations

from typing import Any, get_args

import pytest
import torch

from qexport.errors import NonFiniteError, SpecError
from qexport.grids.bnb4 import Bnb4Grid
from qexport.grids.grid import Grid
from qexport.grids.int8_rows import Int8RowGrid
from qexport.grids.integer import IntegerGrid, Zero
from qexport.solvers import evenly
from qexport.solvers import gptq as solver
from qexport.solvers.cholesky import damped_factor, lower_factor
from qexport.solvers.gptq import ActOrder, Curvature, curvature
from qexport.solvers.rtn import round_to_nearest
from qexport.solvers.search import search_scales

GRIDS: list[Grid] = [
    *(IntegerGrid(4, 32, zero) for zero in get_args(Zero)),
    IntegerGrid(3, 64, "integer", torch.bfloat16),
    IntegerGrid(8, -1, "float", torch.float32),
    Bnb4Grid(double_quant=False),
    Bnb4Grid(double_quant=True),
    Bnb4Grid("fp4", double_quant=False),
    Int8RowGrid(),
    Int8RowGrid(bottom=-128, unit=1, dtype=torch.float16),
]


def gptq(weight: torch.Tensor, prepared: Curvature, grid: Grid, **options: Any) -> Any:
    """As the grid decodes them."""
    return solver.gptq(weight, prepared, grid, **options).assembled(grid)


def problem(out: int, inputs: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """A matrix and the Hessian of correlated inputs of different sizes."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(inputs, inputs, generator=generator)
    sizes = torch.rand(inputs, generator=generator) + 0.2
    x = torch.randn(4 * inputs, inputs, generator=generator) @ mixing * sizes
    return torch.randn(out, inputs, generator=generator), x.t() @ x / len(x)


def loss(decoded: torch.Tensor, weight: torch.Tensor, hessian: torch.Tensor) -> float:
    error = (decoded - weight.float()).double()
    return float(((error @ hessian.double()) * error).sum())


def one_column_at_a_time(
    weight: torch.Tensor, hessian: torch.Tensor, grid: IntegerGrid, order: list[int], static: bool
) -> torch.Tensor:
    """Optimal brain quantization in a given order (GPTQ's section 3.2), without Cholesky or lazy batches.

    After each column the inverse Hessian of the remaining ones is computed anew, fp64. A group is fitted when
    its first column comes, or before. Groups are neighbouring inputs. Returns the values.
    """
    W, inputs = weight.double().clone(), weight.shape[1]
    H = hessian.double() + 0.01 * hessian.double().diagonal().mean() * torch.eye(inputs)
    width = grid.group_width(inputs)
    whole = grid.lines(grid.fit(weight))
    steps, origins = whole.step.clone(), whole.origin.clone()
    met = set(range(steps.shape[1])) if static else set()
    values = torch.zeros_like(W)
    for at, i in enumerate(order):
        group = i // width
        if group not in met:
            met.add(group)
            lines = grid.lines(grid.fit(W[:, group * width : (group + 1) * width].float()))
            steps[:, group], origins[:, group] = lines.step[:, 0], lines.origin[:, 0]
        _, value = grid.round(W[:, i].float(), steps[:, group], origins[:, group])
        values[:, i] = value.double()
        left = torch.tensor(order[at:])
        inverse = torch.linalg.inv(H[left][:, left])
        W[:, left] -= torch.outer((W[:, i] - values[:, i]) / inverse[0, 0], inverse[0])
    return values


@pytest.mark.parametrize(
    ("inputs", "group"), [(96, 32), (160, -1), (256, 64), (192, 192), (136, 8), (150, 64)]
)
@pytest.mark.parametrize(("bits", "zero"), [(3, "middle"), (4, "integer"), (4, "float"), (2, "bias")])
def test_values_are_those_of_the_plain_algorithm(inputs: int, group: int, bits: int, zero: Zero) -> None:
    weight, hessian = problem(16, inputs)
    grid = IntegerGrid(bits, group, zero)
    ours = grid.decode(gptq(weight, curvature(hessian), grid))
    plain = one_column_at_a_time(weight, hessian, grid, list(range(inputs)), static=False)
    # fp32 against fp64: a value in the middle between two codes may fall to either side, and what follows it
    assert (ours - plain).abs().gt(1e-4).float().mean() < 0.02


@pytest.mark.parametrize("grid", [grid for grid in GRIDS if not isinstance(grid, Bnb4Grid)], ids=str)
@pytest.mark.parametrize("static", [True, False])
def test_compiled_loops_and_those_in_torch_agree(
    grid: Grid, static: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight, hessian = problem(70, 300)
    prepared = curvature(hessian, act_order="group-aware", group_size=grid.group_width(300))

    def solved() -> torch.Tensor:
        return grid.decode(gptq(weight, prepared, grid, static_groups=static, searched=True))

    assert evenly.code_range(grid, weight) is not None
    compiled = solved()
    monkeypatch.setattr(evenly, "kernels", lambda: None)
    assert evenly.code_range(grid, weight) is None
    # sums in another order: a value in the middle may fall to either side, and what follows it in its row
    assert (solved() - compiled).abs().gt(1e-4).float().mean() < 0.01


@pytest.mark.parametrize("zero", ["middle", "integer"])
@pytest.mark.parametrize(("inputs", "group"), [(160, 32), (150, 64), (96, -1)])
@pytest.mark.parametrize(
    ("act_order", "static"), [("none", True), ("full", True), ("group-aware", True), ("group-aware", False)]
)
def test_orders_are_those_of_the_plain_algorithm(
    inputs: int, group: int, act_order: ActOrder, static: bool, zero: Zero
) -> None:
    weight, hessian = problem(16, inputs)
    grid = IntegerGrid(3, group, zero)
    diagonal, width = hessian.diagonal().tolist(), grid.group_width(inputs)
    groups = [list(range(begin, min(begin + width, inputs))) for begin in range(0, inputs, width)]
    order = list(range(inputs))
    if act_order == "full":
        order.sort(key=lambda i: -diagonal[i])
    elif act_order == "group-aware":
        groups.sort(key=lambda group: -max(diagonal[i] for i in group))
        order = [i for group in groups for i in sorted(group, key=lambda i: -diagonal[i])]
    prepared = curvature(hessian, act_order=act_order, group_size=group)
    codes = gptq(weight, prepared, grid, static_groups=static)
    assert codes.group_of is None
    plain = one_column_at_a_time(weight, hessian, grid, order, static)
    assert (grid.decode(codes) - plain).abs().gt(1e-4).float().mean() < 0.02


def test_full_order_is_a_permutation_of_inputs() -> None:
    """Solving in order equals solving the matrix with its inputs put in that order, groups and all."""
    weight, hessian = problem(16, 150)
    grid = IntegerGrid(4, 32, "integer")
    order = hessian.diagonal().argsort(descending=True)
    codes = gptq(weight, curvature(hessian, act_order="full"), grid)
    sorted_codes = gptq(weight[:, order], curvature(hessian[order][:, order]), grid)
    assert torch.equal(codes.codes[:, order], sorted_codes.codes)
    assert torch.equal(codes.scales, sorted_codes.scales)
    assert codes.group_of is not None
    assert torch.equal(codes.group_of[order], torch.arange(150) // 32)
    torch.testing.assert_close(grid.decode(codes)[:, order], grid.decode(sorted_codes))


def test_full_order_of_one_group_leaves_groups_as_they_are() -> None:
    weight, hessian = problem(4, 64)
    assert gptq(weight, curvature(hessian, act_order="full"), IntegerGrid(4, -1)).group_of is None


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize("group", [32, 128, -1])
@pytest.mark.parametrize("zero", get_args(Zero))
def test_it_beats_rounding_on_its_own_loss(bits: int, group: int, zero: Zero) -> None:
    weight, hessian = problem(32, 256)
    grid = IntegerGrid(bits, group, zero)
    prepared = curvature(hessian)
    solved = loss(grid.decode(gptq(weight, prepared, grid)), weight, hessian)
    searched = loss(grid.decode(gptq(weight, prepared, grid, searched=True)), weight, hessian)
    rounded = loss(grid.decode(round_to_nearest(weight, grid)), weight, hessian)
    assert searched < 0.65 * rounded
    if bits >= 3:  # with fewer, ranges that follow their errors grow with them
        assert solved < 0.65 * rounded
    if bits <= 4:
        assert searched < solved


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("act_order", get_args(ActOrder))
def test_it_beats_rounding_on_every_grid(grid: Grid, act_order: ActOrder) -> None:
    weight, hessian = problem(32, 256)
    prepared = curvature(hessian, act_order=act_order, group_size=grid.group_width(256))
    solved = loss(grid.decode(gptq(weight, prepared, grid, static_groups=True)), weight, hessian)
    assert solved < 0.7 * loss(grid.decode(round_to_nearest(weight, grid)), weight, hessian)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_groups_fitted_when_they_come(grid: Grid) -> None:
    """Double quantization cannot do so, and fits them before."""
    weight, hessian = problem(32, 256)
    solved = loss(grid.decode(gptq(weight, curvature(hessian), grid)), weight, hessian)
    assert solved < 0.7 * loss(grid.decode(round_to_nearest(weight, grid)), weight, hessian)


@pytest.mark.parametrize("act_order", get_args(ActOrder))
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_searched_scales_are_better(grid: Grid, act_order: ActOrder) -> None:
    if act_order == "full" and not isinstance(grid, IntegerGrid):
        pytest.skip("no place for groups that are no neighbours")
    weight, hessian = problem(32, 256)
    prepared = curvature(hessian, act_order=act_order, group_size=grid.group_width(256))
    codes = [gptq(weight, prepared, grid, searched=searched) for searched in (False, True)]
    fitted, searched = (loss(grid.decode(found), weight, hessian) for found in codes)
    assert searched < (0.99 if grid.bits <= 4 else 1.05) * fitted


def test_given_scales_are_kept() -> None:
    weight, hessian = problem(16, 128)
    grid = IntegerGrid(2, 32, "integer")
    prepared = curvature(hessian, act_order="full")
    scales = search_scales(weight, grid, prepared.diagonal)
    codes = gptq(weight, prepared, grid, scales=scales)
    assert torch.equal(codes.scales, scales.scales)
    assert torch.equal(codes.zeros, scales.zeros)
    plain = gptq(weight, prepared, grid, static_groups=True)
    assert loss(grid.decode(codes), weight, hessian) < loss(grid.decode(plain), weight, hessian)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_weights_of_16_bits(dtype: torch.dtype) -> None:
    weight, hessian = problem(8, 96)
    grid = IntegerGrid(4, 32)
    half = gptq(weight.to(dtype), curvature(hessian), grid)
    assert torch.equal(half.codes, gptq(weight.to(dtype).float(), curvature(hessian), grid).codes)


@pytest.mark.parametrize("scale", [1.0, 1e-6])
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_uncorrelated_inputs_leave_nothing_to_gain(grid: Grid, scale: float) -> None:
    weight, _ = problem(8, 64)
    codes = gptq(weight, curvature(scale * torch.eye(64)), grid)
    assert torch.equal(grid.decode(codes), grid.decode(round_to_nearest(weight, grid)))


@pytest.mark.parametrize("act_order", get_args(ActOrder))
def test_a_hessian_of_zeros_rounds(act_order: ActOrder) -> None:
    """An expert that no token reached."""
    weight, _ = problem(8, 64)
    grid = IntegerGrid(4, 32, "integer")
    codes = gptq(weight, curvature(torch.zeros(64, 64), act_order=act_order, group_size=32), grid)
    assert torch.equal(codes.codes, round_to_nearest(weight, grid).codes)


@pytest.mark.parametrize("size", [1.0, 1e-8])
def test_inputs_that_never_occur_are_rounded_by_themselves(size: float) -> None:
    """And the size of the others, far from 1 or not, changes nothing in that."""
    weight, hessian = problem(8, 64)
    hessian[:, 10] = hessian[10, :] = 0
    grid = IntegerGrid(4, 64)
    codes = gptq(weight, curvature(size * hessian), grid)
    nearest = grid.encode(weight, grid.fit(weight))
    assert torch.equal(codes.codes[:, 10], nearest.codes[:, 10])
    torch.testing.assert_close(codes.codes, gptq(weight, curvature(hessian), grid).codes)


def test_fewer_tokens_than_inputs() -> None:
    x = torch.randn(20, 128, generator=torch.Generator().manual_seed(3))
    weight, hessian = problem(16, 128)[0], x.t() @ x / 20
    grid = IntegerGrid(4, 32)
    solved = loss(grid.decode(gptq(weight, curvature(hessian), grid)), weight, hessian)
    assert solved < 0.3 * loss(grid.decode(round_to_nearest(weight, grid)), weight, hessian)


@pytest.mark.parametrize("inputs", [48, 512, 601, 1100])
def test_the_factor(inputs: int) -> None:
    _, hessian = problem(1, inputs)
    factor, damp = damped_factor(hessian.clone(), 0.01)
    damped = hessian.double() + 0.01 * hessian.double().diagonal().mean() * torch.eye(inputs)
    assert damp == 0.01
    assert torch.equal(factor, factor.triu())
    # the one factor with a positive diagonal, whose inverse is the paper's
    expected = torch.linalg.cholesky(damped.flip(0, 1)).flip(0, 1)
    assert (factor - expected).norm() < 1e-5 * expected.norm()
    assert (factor.double() @ factor.double().t() - damped).abs().max() < 1e-6 * damped.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_triangle_is_taken_for_the_whole(dtype: torch.dtype) -> None:
    _, hessian = problem(1, 700)
    matrix = hessian.to(dtype) + 0.1 * torch.eye(700, dtype=dtype)
    found = lower_factor(matrix.tril())
    assert found is not None
    torch.testing.assert_close(found, torch.linalg.cholesky(matrix), rtol=1e-3, atol=1e-4)
    matrix[600, 600] = -1
    assert lower_factor(matrix) is None


def test_a_factor_that_fp32_cannot_reach_is_found_in_fp64() -> None:
    """Two inputs that are all but the same, and a damping far below fp32's digits."""
    x = torch.randn(2000, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    x[:, 1] = x[:, 0]
    hessian = (x.t() @ x / 2000).float()
    hessian[0, 1] = hessian[1, 0] = hessian[0, 0] = hessian[1, 1]
    factor, damp = damped_factor(hessian.clone(), 1e-9)
    assert bool(factor.isfinite().all())
    assert damp <= 1e-5


def test_damping_rises_until_a_deficient_hessian_can_be_inverted() -> None:
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(1))
    hessian = (x.t() @ x).double()
    hessian -= 1e-3 * hessian.diagonal().mean() * torch.eye(64)  # not even semi-definite
    prepared = curvature(hessian.float(), damp=1e-6)
    assert bool(prepared.factor.isfinite().all())
    assert prepared.damp == pytest.approx(1e-2)
    assert curvature(torch.eye(4), damp=0.05).damp == 0.05


def test_a_hopeless_hessian_is_told() -> None:
    with pytest.raises(NonFiniteError, match="not positive definite"):
        damped_factor(-torch.eye(8) * 100, 0.01)
    with pytest.raises(NonFiniteError, match="NaN"):
        curvature(torch.eye(8) * float("nan"))


def test_what_does_not_fit_together_is_told() -> None:
    weight, hessian = problem(8, 64)
    unknown: Any = "fulll"
    with pytest.raises(SpecError, match="fulll"):
        curvature(hessian, act_order=unknown)
    with pytest.raises(SpecError, match="64 inputs for a weight of 32"):
        gptq(weight[:, :32], curvature(hessian), IntegerGrid(4, 32))
    with pytest.raises(SpecError, match="groups of 16 for a grid of groups of 32"):
        gptq(weight, curvature(hessian, act_order="group-aware", group_size=16), IntegerGrid(4, 32))


def test_arguments_are_not_changed_and_results_repeat() -> None:
    weight, hessian = problem(8, 64)
    before = weight.clone(), hessian.clone()
    grid = IntegerGrid(4, 32)
    for act_order in get_args(ActOrder):
        prepared = curvature(hessian, act_order=act_order, group_size=32)
        factor = prepared.factor.clone()
        first, second = gptq(weight, prepared, grid), gptq(weight, prepared, grid)
        assert torch.equal(first.codes, second.codes)
        assert torch.equal(factor, prepared.factor)
    transposed = gptq(weight.t().contiguous().t(), curvature(hessian), grid)  # W^T of it is no copy
    assert torch.equal(transposed.codes, gptq(weight, curvature(hessian), grid).codes)
    gptq(weight.t().contiguous().t(), curvature(hessian), grid)
    assert torch.equal(weight, before[0])
    assert torch.equal(hessian, before[1])
