"""The HQQ solver: hqq itself is the oracle, and no group is worse than rounded."""

from __future__ import annotations

from dataclasses import replace
from typing import get_args

import pytest
import torch

from qexport.errors import SpecError
from qexport.grids.bnb4 import Bnb4Grid
from qexport.grids.grid import Grid, encode
from qexport.grids.int8_rows import Int8RowGrid
from qexport.grids.integer import IntegerGrid, Zero
from qexport.solvers.hqq import half_quadratic, half_quadratic_scales, moved_zero


def weights(out: int, inputs: int, seed: int = 0) -> torch.Tensor:
    """Heavy-tailed, as trained weights are."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(out, inputs, generator=generator)
    return 0.05 * noise * torch.randn(out, inputs, generator=generator).exp()


def lp(errors: torch.Tensor, width: int) -> torch.Tensor:
    """The sums of |e|^0.7 in groups that divide the inputs."""
    return errors.abs().pow(0.7).reshape(len(errors), -1, width).sum(dim=2)


def rounded_by(grid: IntegerGrid, weight: torch.Tensor) -> torch.Tensor:
    """What HQQ starts from: rounding to nearest, at 4 bits under whole zeros, as hqq has it."""
    scales = grid.fit(weight)
    if grid.zero == "float" and grid.bits == 4:
        assert scales.zeros is not None
        scales = replace(scales, zeros=scales.zeros.round())
    return grid.decode(encode(grid, weight, scales))


@pytest.mark.parametrize("bits", [8, 6, 5, 4, 3, 2, 1])
@pytest.mark.parametrize("group", [64, 16, -1])
def test_zeros_are_those_of_hqq(bits: int, group: int) -> None:
    quantizer = pytest.importorskip("hqq.core.quantize").Quantizer
    weight = weights(32, 192)
    width = 192 if group == -1 else group
    codes, meta = quantizer.quantize(
        weight,
        nbits=bits,
        group_size=width,
        axis=1,
        bitpack=False,
        device="cpu",
        optimize=True,
        round_zero=bits == 4,  # as hqq's BaseQuantizeConfig chooses it
    )
    values = weight.reshape(-1, width)
    low, high = values.amin(dim=1), values.amax(dim=1)
    inverse = ((2**bits - 1) / (high - low)).reshape(32, -1)
    grid = IntegerGrid(bits, group, "float", torch.float32)
    start = -low.reshape(32, -1) * inverse
    start = start.round() if bits == 4 else start
    zero = moved_zero(weight, inverse, start, grid, lp_norm=0.7, beta=10.0, iters=20)
    torch.testing.assert_close(zero.reshape(-1, 1), meta["zero"], rtol=1e-6, atol=1e-5)
    torch.testing.assert_close((1 / inverse).reshape(-1, 1), meta["scale"], rtol=1e-6, atol=0)
    # the solver's own codes are hqq's, but for groups that rounding serves better
    theirs = ((codes.float().reshape(-1, width) - meta["zero"]) * meta["scale"]).reshape(32, 192)
    ours = half_quadratic(weight, grid)
    rounded = rounded_by(grid, weight)
    their_loss, rounded_loss = lp(theirs - weight, width), lp(rounded - weight, width)
    clearly = their_loss < 0.9999 * rounded_loss
    same = (grid.decode(ours) - theirs).abs().reshape(32, -1, width).amax(dim=2) < 1e-5
    assert bool(same[clearly].all())
    assert bool(clearly.any())
    assert bool(
        (lp(grid.decode(ours) - weight, width) <= 1.0001 * torch.minimum(their_loss, rounded_loss)).all()
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("zero", ["integer", "float", "bias"])
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
def test_no_group_is_worse_than_rounded(bits: int, zero: Zero, dtype: torch.dtype) -> None:
    weight = weights(24, 128)
    grid = IntegerGrid(bits, 32, zero, dtype)
    solved = lp(grid.decode(half_quadratic(weight, grid)) - weight, 32)
    rounded = lp(rounded_by(grid, weight) - weight, 32)
    assert bool((solved <= rounded).all())
    if zero != "integer" and bits < 8:
        assert solved.sum() < {1: 0.8, 2: 0.85, 3: 0.95, 4: 0.99}[bits] * rounded.sum()


@pytest.mark.parametrize("zero", ["float", "bias"])
def test_a_short_last_group_counts_its_own_values_alone(zero: Zero) -> None:
    weight = weights(16, 96)
    grid = IntegerGrid(3, 64, zero, torch.float32)
    whole = half_quadratic_scales(weight, grid, iters=1)  # more would stop together
    last = half_quadratic_scales(weight[:, 64:], IntegerGrid(3, 32, zero, torch.float32), iters=1)
    assert whole.zeros is not None
    assert last.zeros is not None
    torch.testing.assert_close(whole.zeros[:, 1:], last.zeros, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("zero", ["integer", "float", "bias"])
@pytest.mark.parametrize("values", ["zeros", "constant", "tiny", "huge", "far"])
def test_strange_groups(values: str, zero: Zero) -> None:
    weight = {
        "zeros": torch.zeros(4, 64),
        "constant": torch.full((4, 64), 0.3),
        "tiny": weights(4, 64) * 1e-5,  # a range below 1e-4, where hqq gives up
        "huge": weights(4, 64) * 2e4,  # about as far as fp16 reaches
        "far": weights(4, 64) * 1e-3 + 5,
    }[values]
    grid = IntegerGrid(4, 32, zero)
    solved = grid.decode(half_quadratic(weight, grid))
    rounded = rounded_by(grid, weight)
    assert bool(solved.isfinite().all())
    assert bool((lp(solved - weight, 32) <= lp(rounded - weight, 32)).all())


@pytest.mark.parametrize("shape", [(3, 7), (1, 1), (5, 100)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_any_shape_and_dtype_unchanged(shape: tuple[int, int], dtype: torch.dtype) -> None:
    weight = weights(*shape).to(dtype)
    before = weight.clone()
    grid = IntegerGrid(4, 64, "float")
    codes = half_quadratic(weight, grid)
    assert torch.equal(weight, before)
    assert codes.codes.shape == shape
    assert torch.equal(codes.codes, half_quadratic(weight, grid).codes)
    error = (grid.decode(codes) - weight.float()).abs().max()
    assert error <= (weight.float().amax() - weight.float().amin()) / 15 + 1e-3


GRIDS: list[Grid] = [IntegerGrid(4, 64), Bnb4Grid(), Bnb4Grid("fp4"), Int8RowGrid()]


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_a_grid_without_a_zero_to_move(grid: Grid) -> None:
    with pytest.raises(SpecError, match=r"HQQ moves the zero.*; (use an asymmetric grid|round to nearest)"):
        half_quadratic(torch.ones(4, 64), grid)


def test_settings_without_sense() -> None:
    with pytest.raises(SpecError, match=r"lp_norm 1\.5"):
        half_quadratic(torch.ones(4, 64), IntegerGrid(4, 64, "float"), lp_norm=1.5)
    assert set(get_args(Zero)) == {"middle", "integer", "float", "bias"}
