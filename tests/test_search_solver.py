"""Scale search: never worse than rounding, against brute force, on every grid."""

from __future__ import annotations

from typing import get_args

import pytest
import torch

from qexport.errors import SpecError
from qexport.grids.bnb4 import Bnb4Grid
from qexport.grids.grid import Grid
from qexport.grids.int8_rows import Int8RowGrid
from qexport.grids.integer import IntegerGrid, Zero
from qexport.solvers import evenly
from qexport.solvers import search as solver
from qexport.solvers.rtn import round_to_nearest
from qexport.solvers.search import search, search_scales, shrinks_to_try

GRIDS: list[Grid] = [
    *(IntegerGrid(bits, 32, zero) for zero in get_args(Zero) for bits in (1, 2, 3, 4, 5, 6, 8)),
    IntegerGrid(4, -1, "float", torch.bfloat16),
    IntegerGrid(3, 48, "integer", torch.float32),  # 128 inputs: the last group is short
    Bnb4Grid(double_quant=False),
    Bnb4Grid(double_quant=True),
    Bnb4Grid("fp4", double_quant=False),
    Bnb4Grid("fp4", double_quant=True),
    Int8RowGrid(),
    Int8RowGrid(bottom=-128, unit=1, dtype=torch.float16),
]


@pytest.mark.parametrize(
    "grid", [grid for grid in GRIDS if not isinstance(grid, Bnb4Grid)] + [IntegerGrid(3, 48, "bias")], ids=str
)
def test_compiled_loops_and_those_in_torch_agree(grid: Grid, monkeypatch: pytest.MonkeyPatch) -> None:
    """On rows of zeros, inputs that never occur and 16-bit weights too."""
    weight, h = weights(40, 128), importances(128)
    weight[3] = 0
    h[32:64] = 0
    assert evenly.code_range(grid, weight) is not None
    compiled = [grid.lines(search_scales(w, grid, h)) for w in (weight, weight.bfloat16())]
    monkeypatch.setattr(evenly, "kernels", lambda: None)
    assert evenly.code_range(grid, weight) is None
    plain = [grid.lines(search_scales(w, grid, h)) for w in (weight, weight.bfloat16())]
    for ours, theirs in zip(compiled, plain, strict=True):
        # losses summed in another order: of two factors that are as good either may be taken
        assert ours.step.ne(theirs.step).float().mean() < 0.01


def weights(out: int, inputs: int, seed: int = 0) -> torch.Tensor:
    """Heavy-tailed, as trained weights are."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(out, inputs, generator=generator) * torch.randn(out, inputs, generator=generator).exp()


def importances(inputs: int) -> torch.Tensor:
    return torch.rand(inputs, generator=torch.Generator().manual_seed(7)) ** 4 * 100


def loss(decoded: torch.Tensor, weight: torch.Tensor, importance: torch.Tensor | None) -> torch.Tensor:
    squares = (decoded - weight.float()).square()
    return (squares if importance is None else squares * importance).sum()


@pytest.mark.parametrize("weighed", [False, True])
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_never_worse_than_rounding(grid: Grid, weighed: bool) -> None:
    weight = weights(48, 128)
    importance = importances(128) if weighed else None
    found = loss(grid.decode(search(weight, grid, importance)), weight, importance)
    rounded = loss(grid.decode(round_to_nearest(weight, grid)), weight, importance)
    assert found <= rounded * (1 + 1e-6)
    if grid.bits <= 4:
        assert found < 0.97 * rounded


@pytest.mark.parametrize("zero", get_args(Zero))
@pytest.mark.parametrize("bits", [2, 4])
def test_each_group_has_the_best_of_all_factors(bits: int, zero: Zero) -> None:
    """Group by group, in fp64, by trying each."""
    weight, importance = weights(6, 80), importances(80)
    grid = IntegerGrid(bits, 32, zero)
    decoded = grid.decode(search(weight, grid, importance))
    for row in range(6):
        for begin in range(0, 80, 32):
            part = weight[row : row + 1, begin : begin + 32]
            h = importance[begin : begin + 32].double()
            tried = [
                ((grid.decode(grid.encode(part, grid.fit(part, shrink))) - part).double().square() * h).sum()
                for shrink in shrinks_to_try(bits)
            ]
            found = ((decoded[row, begin : begin + 32] - part[0]).double().square() * h).sum()
            assert float(found) == pytest.approx(float(min(tried)), rel=1e-5)


def test_an_outlier_of_no_importance_is_clipped() -> None:
    weight = torch.linspace(-1, 1, 64)[None].clone()
    weight[0, 5] = 3.0
    importance = torch.ones(64)
    importance[5] = 1e-6
    grid = IntegerGrid(4, 64, "float")
    scales = search_scales(weight, grid, importance)
    # 15 steps over the shrunk range, which cannot move from its own centre at 1: -1 .. 3 stays, or less
    assert float(scales.scales[0, 0]) < 4 / 15
    assert loss(grid.decode(grid.encode(weight, scales)), weight, importance) < loss(
        grid.decode(round_to_nearest(weight, grid)), weight, importance
    )


def test_factors() -> None:
    for bits in (1, 2, 3, 4, 5, 6, 8):
        factors = shrinks_to_try(bits)
        assert factors[0] == 1
        assert factors == sorted(factors, reverse=True)
        assert factors[-1] >= 0.09
    assert len(shrinks_to_try(2)) > len(shrinks_to_try(4)) > len(shrinks_to_try(8))


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, importance = weights(37, 96), importances(96)
    for grid in (IntegerGrid(3, 32, "integer"), IntegerGrid(3, 40, "bias")):
        whole = search(weight, grid, importance)
        monkeypatch.setattr(solver, "CHUNK", 300)
        parts = search(weight, grid, importance)
        monkeypatch.undo()
        assert torch.equal(whole.codes, parts.codes)
        assert torch.equal(whole.scales, parts.scales)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_weights_of_16_bits_unchanged(dtype: torch.dtype) -> None:
    weight = weights(8, 64).to(dtype)
    before = weight.clone()
    grid = IntegerGrid(4, 32)
    assert torch.equal(search(weight, grid).codes, search(weight.float(), grid).codes)
    assert torch.equal(weight, before)


def test_inputs_that_never_occur() -> None:
    """Where nothing is known of a group its weights all count alike."""
    weight = weights(8, 64)
    importance = torch.ones(64)
    importance[32:] = 0
    grid = IntegerGrid(3, 32)
    assert torch.equal(search(weight, grid, importance).codes, search(weight, grid).codes)
    zeros = search(torch.zeros(2, 64), grid)
    assert float(grid.decode(zeros).abs().max()) == 0


def test_an_importance_of_another_length() -> None:
    with pytest.raises(SpecError, match=r"\(32,\) for a weight of 64 inputs"):
        search(weights(2, 64), IntegerGrid(4, 32), torch.ones(32))
