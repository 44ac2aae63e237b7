"""Groups that are stretched: each code stands for its value times the factor, up to what is stored."""

from __future__ import annotations

from typing import get_args

import pytest
import torch

from qexport.grids.bnb4 import Bnb4Grid
from qexport.grids.grid import Scalable
from qexport.grids.int8_rows import Int8RowGrid
from qexport.grids.integer import IntegerGrid, Zero

ZEROS: tuple[Zero, ...] = get_args(Zero)
OUT, INPUTS, GROUP = 12, 72, 16  # the last group is a short one


def weights(seed: int = 0) -> torch.Tensor:
    return torch.randn(OUT, INPUTS, generator=torch.Generator().manual_seed(seed)) * 0.3 + 0.1


def factors(groups: int, low: float = 0.5, high: float = 2.0) -> torch.Tensor:
    return low + (high - low) * torch.rand(OUT, groups, generator=torch.Generator().manual_seed(7))


def each_inputs(values: torch.Tensor, group: int) -> torch.Tensor:
    """[out, groups] -> [out, in], written out."""
    return torch.stack([values[:, column // group] for column in range(INPUTS)], dim=1)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("zero", ZEROS)
def test_values_are_stretched_up_to_the_rounding_of_what_is_stored(
    zero: Zero, bits: int, dtype: torch.dtype
) -> None:
    grid = IntegerGrid(bits, GROUP, zero, dtype)
    assert isinstance(grid, Scalable)
    W = weights()
    codes = grid.encode(W, grid.fit(W))
    f = factors(5)
    found = grid.stretched(codes, f)
    assert torch.equal(found.codes, codes.codes)
    assert found.scales.dtype == codes.scales.dtype == dtype
    before, after = grid.decode(codes), grid.decode(found)
    wanted = before * each_inputs(f, GROUP)
    # a stored scale is off by half a unit in the last place, and so is a bias; both are of the row's reach
    eps = torch.finfo(dtype).eps
    reach = each_inputs(codes.scales.float() * f, GROUP) * 2**bits + wanted.abs()
    assert bool(((after - wanted).abs() <= eps * reach).all())
    if zero == "bias":
        assert found.zeros is not None
        assert found.zeros.dtype == dtype
    elif codes.zeros is None:
        assert found.zeros is None
    else:  # a zero that is a code moves with the scale
        assert found.zeros is not None
        assert torch.equal(found.zeros, codes.zeros)


@pytest.mark.parametrize("zero", ZEROS)
def test_scales_alone_are_those_of_stretched_codes(zero: Zero) -> None:
    grid = IntegerGrid(3, GROUP, zero)
    W = weights()
    scales = grid.fit(W)
    kept = scales.scales.clone()
    f = factors(5)
    scaled = grid.scaled(scales, f)
    codes = grid.encode(W, scales)
    assert torch.equal(grid.decode(grid.stretched(codes, f)), grid.decode(grid.assemble(codes.codes, scaled)))
    assert torch.equal(scales.scales, kept)
    one = grid.scaled(scales, torch.ones(OUT, 5))
    assert torch.equal(one.scales, scales.scales)
    assert one.zeros is scales.zeros or torch.equal(one.zeros, scales.zeros)  # type: ignore[arg-type]


@pytest.mark.parametrize("zero", ZEROS)
def test_groups_in_an_order_of_their_own(zero: Zero) -> None:
    grid = IntegerGrid(4, GROUP, zero)
    W = weights()
    permutation = torch.randperm(INPUTS, generator=torch.Generator().manual_seed(1))
    group_of = torch.empty(INPUTS, dtype=torch.long)
    group_of[permutation] = torch.arange(INPUTS) // GROUP
    plain = grid.encode(W[:, permutation], grid.fit(W[:, permutation]))
    codes = torch.empty_like(plain.codes)
    codes[:, permutation] = plain.codes
    shuffled = grid.assemble(codes, grid.fit(W[:, permutation]), group_of)
    f = factors(5)
    found = grid.stretched(shuffled, f)
    assert found.group_of is group_of
    assert torch.equal(grid.decode(found)[:, permutation], grid.decode(grid.stretched(plain, f)))


@pytest.mark.parametrize("zero", ["middle", "integer", "float"])
def test_a_group_of_zeros_stays_one(zero: Zero) -> None:
    """Its scale is 1 for want of another."""
    grid = IntegerGrid(4, GROUP, zero)
    W = weights()
    W[:, :GROUP] = 0
    codes = grid.encode(W, grid.fit(W))
    assert bool((grid.decode(codes)[:, :GROUP] == 0).all())
    assert bool((grid.decode(grid.stretched(codes, factors(5)))[:, :GROUP] == 0).all())


@pytest.mark.parametrize("zero", ZEROS)
def test_a_scale_at_the_end_of_its_dtype_stays_there(zero: Zero) -> None:
    grid = IntegerGrid(2, GROUP, zero)
    W = weights() * 2e5
    codes = grid.encode(W, grid.fit(W))
    found = grid.stretched(codes, torch.full((OUT, 5), 2.0))
    assert bool(found.scales.isfinite().all())
    assert bool((found.scales >= codes.scales).all())
    assert bool(grid.decode(found).isfinite().all())


@pytest.mark.parametrize("zero", ZEROS)
def test_a_scale_at_the_other_end_becomes_no_large_one(zero: Zero) -> None:
    """Half of fp16's smallest number is 0; the 1 that stands in for such scales would be far too large."""
    grid = IntegerGrid(3, GROUP, zero)
    W = weights() * 1e-6
    codes = grid.encode(W, grid.fit(W))
    assert float(codes.scales.min()) < 1e-6
    found = grid.stretched(codes, torch.full((OUT, 5), 0.3))
    assert float(grid.decode(found).abs().max()) <= 1.1 * float(grid.decode(codes).abs().max())


def test_codebooks_and_rows_of_int8_are_not_scalable() -> None:
    """What tunes and refines scales leaves these alone: theirs are quantized together, or a format's own."""
    for grid in (Bnb4Grid("nf4", double_quant=True, block=64), Int8RowGrid(dtype=torch.float16)):
        assert not isinstance(grid, Scalable)
