"""The AWQ solver: its losses are those of running the layer, and no search ends above where it began."""

from __future__ import annotations

from typing import get_args

import pytest
import torch

from qexport.errors import SpecError
from qexport.grids.bnb4 import Bnb4Grid
from qexport.grids.grid import Grid, encode
from qexport.grids.int8_rows import Int8RowGrid
from qexport.grids.integer import IntegerGrid, Zero
from qexport.solvers import awq
from qexport.solvers.awq import search_awq_scales, search_clip
from qexport.solvers.rtn import round_to_nearest

GRIDS: list[Grid] = [
    *(IntegerGrid(4, 32, zero) for zero in get_args(Zero)),
    IntegerGrid(2, 64, "integer", torch.bfloat16),
    IntegerGrid(3, -1, "float", torch.float32),
    IntegerGrid(4, 48, "integer"),  # 128 inputs: the last group is short
    Bnb4Grid(double_quant=False),
    Bnb4Grid(double_quant=True),
    Int8RowGrid(),
]


def inputs_of(tokens: int, inputs: int, outliers: int = 0) -> torch.Tensor:
    """Correlated inputs, of which some are much larger than others."""
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(tokens, inputs, generator=generator)
    x += 0.3 * x.roll(1, dims=1)
    if outliers:
        x[:, :: inputs // outliers] *= 30
    return x


def weights(out: int, inputs: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(out, inputs, generator=torch.Generator().manual_seed(seed)) * 0.05


def by_running(weight: torch.Tensor, x: torch.Tensor, scales: torch.Tensor, grid: Grid) -> float:
    """The squared error of the outputs, by running the layer with x / s and Q(W s)."""
    folded = grid.decode(round_to_nearest(weight.float() * scales, grid))
    return float(((x / scales) @ folded.t() - x @ weight.float().t()).square().sum())


def hessian_of(x: torch.Tensor) -> torch.Tensor:
    return x.t() @ x


@pytest.mark.parametrize("outliers", [0, 4])
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_outputs_are_never_worse(grid: Grid, outliers: int) -> None:
    x = inputs_of(300, 128, outliers)
    targets = [weights(48, 128), weights(32, 128, 1)]
    scales = search_awq_scales([(w, hessian_of(x)) for w in targets], x.abs().mean(dim=0), grid)
    assert scales.dtype == torch.float32
    assert bool((scales > 0).all() and scales.isfinite().all())
    ones = torch.ones(128)
    plain = sum(by_running(w, x, ones, grid) for w in targets)
    scaled = sum(by_running(w, x, scales, grid) for w in targets)
    assert scaled <= plain * (1 + 1e-5)
    if outliers and grid.bits <= 4:
        assert scaled < 0.6 * plain


def test_the_best_of_the_ratios() -> None:
    """All tried by running the layer; the search, which runs nothing, finds that one."""
    x, weight, grid = inputs_of(300, 96, 3), weights(40, 96), IntegerGrid(4, 32, "integer")
    size = x.abs().mean(dim=0)
    shares = weight.abs().reshape(40, 3, 32)
    share = (shares / (shares.amax(dim=2, keepdim=True) + 1e-6)).reshape(40, 96).mean(dim=0)
    errors = []
    for ratio in (point / 20 for point in range(20)):
        for raw in (size.pow(ratio), size.pow(ratio) / share.pow(1 - ratio)):
            scales = raw / (raw.max() * raw.min()).sqrt()
            errors.append(by_running(weight, x, scales, grid))
    found = by_running(weight, x, search_awq_scales([(weight, hessian_of(x))], size, grid), grid)
    assert found == pytest.approx(min(errors), rel=0.02)


def test_ones_where_nothing_is_better() -> None:
    """Equal inputs, and weights that lie on the grid already."""
    grid = IntegerGrid(4, 32, "integer")
    weight = grid.decode(round_to_nearest(weights(16, 64), grid))
    scales = search_awq_scales([(weight, torch.eye(64))], torch.ones(64), grid)
    assert torch.equal(scales, torch.ones(64))
    nothing_seen = search_awq_scales([(weights(16, 64), torch.zeros(64, 64))], torch.zeros(64), grid)
    assert torch.equal(nothing_seen, torch.ones(64))


def test_inputs_that_never_occur() -> None:
    x = inputs_of(300, 64, 4)
    x[:, 7] = 0
    x[:, 9] = 1e-30
    scales = search_awq_scales([(weights(16, 64), hessian_of(x))], x.abs().mean(dim=0), IntegerGrid(3, 32))
    assert bool(scales.isfinite().all())
    assert scales[7] == 1
    assert scales[9] > 0
    assert not torch.equal(scales, torch.ones(64))


def test_the_unit_of_the_inputs_is_of_no_account() -> None:
    x, weight, grid = inputs_of(200, 64, 4), weights(16, 64), IntegerGrid(4, 32, "integer")
    one = search_awq_scales([(weight, hessian_of(x))], x.abs().mean(dim=0), grid)
    other = search_awq_scales([(weight, 1e-8 * hessian_of(x))], 1e-4 * x.abs().mean(dim=0), grid)
    torch.testing.assert_close(one, other)


def test_rows_stand_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """A sample of rows finds scales that serve all of them nearly as well; the same ones every time."""
    x, grid = inputs_of(300, 64, 4), IntegerGrid(3, 32, "integer")
    targets = [weights(1500, 64), weights(500, 64, 1)]
    pairs, size = [(w, hessian_of(x)) for w in targets], x.abs().mean(dim=0)
    exact = search_awq_scales(pairs, size, grid)
    monkeypatch.setattr(awq, "_MULTIPLICATIONS", 64 * 64 * 200)
    sampled = search_awq_scales(pairs, size, grid)
    assert torch.equal(sampled, search_awq_scales(pairs, size, grid))
    errors = [sum(by_running(w, x, s, grid) for w in targets) for s in (exact, sampled, torch.ones(64))]
    assert errors[1] < 1.03 * errors[0] < 0.7 * errors[2]


def clip_loss(decoded: torch.Tensor, weight: torch.Tensor, hessian: torch.Tensor, width: int) -> torch.Tensor:
    """d^T H_gg d of every group."""
    d, parts = (decoded - weight.float()).double(), []
    for begin in range(0, weight.shape[1], width):
        part = slice(begin, begin + width)
        parts.append(((d[:, part] @ hessian[part, part].double()) * d[:, part]).sum(dim=1))
    return torch.stack(parts, dim=1)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_clipping_is_never_worse(grid: Grid) -> None:
    weight = weights(40, 128) * weights(40, 128, 1).mul(20).exp()
    hessian = hessian_of(inputs_of(300, 128))
    shrink = search_clip(weight, hessian, grid)
    width = grid.group_width(128)
    assert shrink.shape == (40, -(-128 // width))
    assert float(shrink.min()) >= 0.549
    assert float(shrink.max()) <= 1
    clipped = clip_loss(grid.decode(encode(grid, weight, grid.fit(weight, shrink))), weight, hessian, width)
    plain = clip_loss(grid.decode(round_to_nearest(weight, grid)), weight, hessian, width)
    if getattr(grid, "double_quant", False):  # a group's factor moves the stored scales of its neighbours
        assert clipped.sum() < plain.sum()
    else:
        assert bool((clipped <= plain * (1 + 1e-5)).all())
    if grid.bits <= 4:
        assert clipped.sum() < 0.97 * plain.sum()
    # against each factor for all
    for factor in (0.95, 0.8, 0.55):
        decoded = grid.decode(encode(grid, weight, grid.fit(weight, factor)))
        if not getattr(grid, "double_quant", False):
            assert bool((clipped <= clip_loss(decoded, weight, hessian, width) * (1 + 1e-5)).all())


def test_no_clipping_where_it_gains_nothing() -> None:
    grid = IntegerGrid(4, 32, "integer")
    weight = grid.decode(round_to_nearest(weights(16, 64), grid))
    assert torch.equal(search_clip(weight, torch.eye(64), grid), torch.ones(16, 2))
    assert torch.equal(search_clip(weights(16, 64), torch.zeros(64, 64), grid), torch.ones(16, 2))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_arguments_are_not_changed(dtype: torch.dtype) -> None:
    x, weight, grid = inputs_of(200, 64, 4), weights(16, 64).to(dtype), IntegerGrid(4, 32, "integer")
    hessian, size = hessian_of(x), x.abs().mean(dim=0)
    before = [part.clone() for part in (weight, hessian, size)]
    scales = search_awq_scales([(weight, hessian)], size, grid)
    shrink = search_clip(weight, hessian, grid)
    for part, was in zip((weight, hessian, size), before, strict=True):
        assert torch.equal(part, was)
    assert torch.equal(scales, search_awq_scales([(weight.float(), hessian)], size, grid))
    assert torch.equal(shrink, search_clip(weight.float(), hessian, grid))


def test_shapes_that_do_not_fit_together() -> None:
    weight, grid = weights(16, 64), IntegerGrid(4, 32)
    with pytest.raises(SpecError, match="of 64 inputs"):
        search_awq_scales([(weight, torch.eye(32))], torch.ones(64), grid)
    with pytest.raises(SpecError, match="targets"):
        search_awq_scales([], torch.ones(64), grid)
    with pytest.raises(SpecError, match="for a weight of 64 inputs"):
        search_clip(weight, torch.eye(32), grid)
