"""Refined codes and scales: held against the definition of the loss, one code at a time."""

from __future__ import annotations

import itertools

import pytest
import torch

from qexport.errors import SpecError
from qexport.grids import products
from qexport.grids.bnb4 import Bnb4Grid
from qexport.grids.grid import Grid
from qexport.grids.integer import IntegerGrid
from qexport.solvers import refine as module
from qexport.solvers.chosen import Chosen
from qexport.solvers.gptq import curvature, gptq
from qexport.solvers.refine import damped, output_blocks, refine, usable_outputs

GRIDS: dict[str, Grid] = {
    "symmetric": IntegerGrid(3, 16),
    "integer zero": IntegerGrid(2, 16, "integer"),
    "float zero": IntegerGrid(4, 16, "float"),
    "bias": IntegerGrid(3, 16, "bias"),
    "codebook": Bnb4Grid("nf4", double_quant=False, block=64),
}


def case(seed: int = 0, out: int = 13, inputs: int = 64) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(inputs, inputs, generator=generator) / inputs**0.5
    x = torch.randn(400, inputs, generator=generator) @ mix
    g = torch.randn(400, out, generator=generator) @ torch.randn(out, out, generator=generator)
    return torch.randn(out, inputs, generator=generator), x.T @ x / 400, g


def rounded(weight: torch.Tensor, grid: Grid) -> Chosen:
    scales = grid.fit(weight)
    lines = grid.lines(scales)
    width = grid.group_width(weight.shape[1])
    step, origin = (part.repeat_interleave(width, 1) for part in (lines.step, lines.origin))
    return Chosen(grid.round(weight, step, origin)[0].to(torch.int16), scales)


def whole(blocks: torch.Tensor, out: int) -> torch.Tensor:
    dense: torch.Tensor = torch.block_diag(*blocks)  # type: ignore[no-untyped-call]
    return dense[:out, :out]


def loss(weight: torch.Tensor, chosen: Chosen, grid: Grid, H: torch.Tensor, G: torch.Tensor) -> float:  # noqa: N803
    D = (grid.decode(chosen.assembled(grid)) - weight).double()
    return float(torch.trace(G.double() @ D @ H.double() @ D.T))


@pytest.mark.parametrize("size", [1, 4, 5, 16])
@pytest.mark.parametrize("name", GRIDS)
def test_no_single_code_can_be_bettered(name: str, size: int) -> None:
    """After enough passes each code is the best one, the others being as they are: tried one by one."""
    grid = GRIDS[name]
    W, H, g = case()
    H = damped(H, 0.01)
    G = usable_outputs(output_blocks(g, size), 0.1, len(W)) if size > 1 else None
    dense = whole(G, len(W)) if G is not None else torch.eye(len(W))
    start = rounded(W, grid)
    found = refine(W, start, H, grid, G, rounds=1, passes=0)
    codes = module._better_codes(W, found, H, grid, G if G is not None else torch.ones(13, 1, 1), 60, H)
    least = loss(W, codes, grid, H, dense)
    assert least < 0.9 * loss(W, found, grid, H, dense)
    top = 2**grid.bits - 1
    for row, column in itertools.product((0, 5, 12), (0, 17, 63)):
        for other in range(top + 1):
            tried = codes.codes.clone()
            tried[row, column] = other
            assert loss(W, Chosen(tried, codes.scales), grid, H, dense) >= least * (1 - 1e-6)


@pytest.mark.parametrize("size", [1, 5])
@pytest.mark.parametrize("name", ["symmetric", "integer zero", "float zero", "bias"])
def test_compiled_and_plain_loops_agree(name: str, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    grid = GRIDS[name]
    W, H, g = case(1, out=22, inputs=192)
    G = usable_outputs(output_blocks(g, size), 0.1, len(W)) if size > 1 else None
    compiled = refine(W, rounded(W, grid), damped(H, 0.01), grid, G)
    monkeypatch.setattr(module, "code_range", lambda *_: None)
    plain = refine(W, rounded(W, grid), damped(H, 0.01), grid, G)
    assert (compiled.codes == plain.codes).float().mean() > 0.98  # sums in other orders: ties
    dense = whole(G, 22) if G is not None else torch.eye(22)
    losses = [loss(W, found, grid, damped(H, 0.01), dense) for found in (compiled, plain)]
    assert losses[0] == pytest.approx(losses[1], rel=0.02)


@pytest.mark.parametrize("name", GRIDS)
def test_each_round_lowers_the_loss(name: str) -> None:
    grid = GRIDS[name]
    W, H, _ = case(2)
    H = damped(H, 0.01)
    losses = [
        loss(W, refine(W, rounded(W, grid), H, grid, rounds=rounds), grid, H, torch.eye(13))
        for rounds in (0, 1, 2, 4)
    ]
    assert losses == sorted(losses, reverse=True)
    assert losses[1] < 0.8 * losses[0]


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("mean", [0.3, 1.0, 10.0])  # the inputs' variance is a tenth
def test_inputs_far_from_0_are_not_made_worse(
    mean: float, bits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rounded to bf16, their second moment would be off by more than what most of its directions hold."""
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(576, 576, generator=generator) / 24
    x = torch.randn(2000, 576, generator=generator) @ mixing * 0.3
    x += torch.randn(576, generator=generator) * mean
    W, H = torch.randn(24, 576, generator=generator) * 0.05, x.T @ x / len(x)
    grid = IntegerGrid(bits, 64, "integer")
    order = curvature(H, act_order="full", group_size=64)
    H = damped(H, order.damp)
    start = gptq(W, order, grid, static_groups=True, searched=True)
    found = {}
    for fast in (True, False):
        monkeypatch.setattr(products, "fast_in_bf16", lambda fast=fast: fast)
        found[fast] = loss(W, refine(W, start, H, grid), grid, H, torch.eye(24))
    assert found[True] < 1.01 * found[False]
    assert found[False] < loss(W, start, grid, H, torch.eye(24))


@pytest.mark.parametrize("fast", [True, False])
def test_large_layers_lose_nothing_by_products_in_bf16(fast: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Correlated inputs, in exact arithmetic: as good as in fp32, and better than before."""
    monkeypatch.setattr(products, "fast_in_bf16", lambda: fast)
    grid = IntegerGrid(3, 64, "integer")
    W, H, _ = case(8, out=24, inputs=640)
    H = damped(H, 0.01)
    start = rounded(W, grid)
    losses = [
        loss(W, refine(W, start, H, grid, rounds=rounds), grid, H, torch.eye(24)) for rounds in (0, 1, 2, 3)
    ]
    assert losses == sorted(losses, reverse=True)
    monkeypatch.setattr(products, "fast_in_bf16", lambda: False)
    exact = loss(W, refine(W, start, H, grid, rounds=3), grid, H, torch.eye(24))
    assert losses[-1] < 1.01 * exact
    assert exact < 0.5 * losses[0]


def test_scales_are_those_of_least_squares() -> None:
    """One group a row: the best factor has a closed form."""
    grid = IntegerGrid(3, -1, dtype=torch.float32)
    W, H, _ = case(3)
    start = rounded(W, grid)
    found = module._better_scales(W, start, H, grid)
    V = grid.decode(start.assembled(grid))
    best = ((V @ H) * W).sum(1) / ((V @ H) * V).sum(1)
    assert torch.allclose(found.scales.scales[:, 0] / start.scales.scales[:, 0], best, rtol=1e-3)


def test_groups_in_another_order_are_kept() -> None:
    """The same as with inputs, Hessian and weights sorted by group beforehand."""
    grid = IntegerGrid(3, 16, "integer")
    W, H, _ = case(4)
    H = damped(H, 0.01)
    order = torch.randperm(64, generator=torch.Generator().manual_seed(1))
    group_of = torch.empty(64, dtype=torch.int64)
    group_of[order] = torch.arange(64) // 16
    sorted_order = group_of.argsort(stable=True)
    plain = rounded(W[:, sorted_order], grid)
    codes = torch.empty_like(plain.codes)
    codes[:, sorted_order] = plain.codes
    found = refine(W, Chosen(codes, plain.scales, group_of), H, grid)
    expected = refine(W[:, sorted_order], plain, H[sorted_order][:, sorted_order], grid)
    assert found.group_of is not None
    assert torch.equal(found.group_of, group_of)
    assert torch.equal(found.codes[:, sorted_order], expected.codes)
    assert loss(W, found, grid, H, torch.eye(13)) == pytest.approx(
        loss(W[:, sorted_order], expected, grid, H[sorted_order][:, sorted_order], torch.eye(13)), rel=1e-5
    )


def test_dead_inputs_and_outputs_stay() -> None:
    """A zero on a diagonal leaves the code as it was, instead of dividing by it."""
    grid = IntegerGrid(4, 16)
    W, H, g = case(5)
    H[7], H[:, 7] = 0, 0
    g[:, 3] = 0
    G = output_blocks(g, 5)
    start = rounded(W, grid)
    found = module._better_codes(W, start, H, grid, G, 2, H)
    assert torch.equal(found.codes[:, 7], start.codes[:, 7])
    assert torch.equal(found.codes[3], start.codes[3])
    assert (found.codes != start.codes).any()


def test_output_blocks_are_those_of_the_whole() -> None:
    _, _, g = case(6)
    blocks = output_blocks(g, 5)
    dense = g.T @ g
    assert blocks.shape == (3, 5, 5)
    assert torch.allclose(blocks[1], dense[5:10, 5:10], rtol=1e-4)
    assert torch.allclose(blocks[2, :3, :3], dense[10:, 10:], rtol=1e-4)
    assert not blocks[2, 3:].any()
    usable = usable_outputs(blocks, 0.1, 13)
    assert float(whole(usable, 13).diagonal().mean()) == pytest.approx(1, abs=0.05)
    assert torch.equal(usable_outputs(torch.zeros(3, 5, 5), 0.1, 13)[0], torch.eye(5))


def test_shapes_that_do_not_fit() -> None:
    grid = IntegerGrid(4, 16)
    W, H, _ = case()
    with pytest.raises(SpecError, match="a Hessian of shape"):
        refine(W, rounded(W, grid), H[:32, :32], grid)
    with pytest.raises(SpecError, match="curvatures of outputs"):
        refine(W, rounded(W, grid), H, grid, torch.ones(2, 5, 5))
