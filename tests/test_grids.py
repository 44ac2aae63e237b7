"""The integer grid: decode(encode) is the identity on it; bitsandbytes' grids are in test_bnb_grids.py."""

from __future__ import annotations

from typing import get_args

import pytest
import torch

from qexport.errors import SpecError
from qexport.grids.grid import encode, spread
from qexport.grids.integer import IntegerCodes, IntegerGrid, IntegerScales, Zero


def weights(out: int, inputs: int, seed: int = 0) -> torch.Tensor:
    """Heavy-tailed, as trained weights are."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(out, inputs, generator=generator) * torch.randn(out, inputs, generator=generator).exp()


BITS = [1, 2, 3, 4, 5, 6, 8]
DTYPES = [torch.float16, torch.bfloat16, torch.float32]


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("zero", get_args(Zero))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("out", "inputs", "group"),
    [(8, 128, 32), (8, 128, 16), (5, 96, 128), (7, 60, -1), (3, 100, 32), (1, 1, 16)],
)
def test_integer_grid(bits: int, zero: Zero, dtype: torch.dtype, out: int, inputs: int, group: int) -> None:
    grid = IntegerGrid(bits, group, zero, dtype)
    weight = weights(out, inputs)
    before = weight.clone()
    scales = grid.fit(weight)
    codes = grid.encode(weight, scales)
    assert torch.equal(weight, before)
    assert codes.codes.dtype == torch.uint8
    assert int(codes.codes.max()) < 1 << bits
    groups = -(-inputs // grid.group_width(inputs))
    assert codes.scales.shape == (out, groups)
    assert codes.scales.dtype == dtype
    if codes.zeros is None:
        assert zero == "middle"
    else:
        assert codes.zeros.shape == (out, groups)
        assert codes.zeros.dtype == (torch.uint8 if zero == "integer" else dtype)
    decoded = grid.decode(codes)
    assert decoded.dtype == torch.float32
    # a value on the grid is its own nearest: encoding again changes nothing
    assert torch.equal(grid.encode(decoded, scales).codes, codes.codes)
    # no value is further away than half a step, but where the range was cut off: by rounding of what is
    # stored, by an integer zero, or by the symmetric range at its top
    lines = grid.lines(scales)
    step, origin = (spread(part, inputs, grid) for part in (lines.step, lines.origin))
    inside = (weight >= origin) & (weight <= origin + step * grid.top)
    assert bool(((decoded - weight).abs() <= 0.5001 * step)[inside].all())
    slack = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}[dtype] * (1 << bits)
    assert bool(((decoded - weight).abs() <= (1.001 + slack) * step).all())
    # and no code is nearer than the one that was chosen
    values = origin[..., None] + step[..., None] * torch.arange(1 << bits)
    nearest = (values - weight[..., None]).abs().amin(dim=-1)
    assert bool(((decoded - weight).abs() <= nearest + 1e-4 * step + 1e-6).all())


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("zero", get_args(Zero))
def test_every_code_survives(bits: int, zero: Zero) -> None:
    """Decoded and encoded again, each code is itself; and decodes to what the formula says."""
    grid = IntegerGrid(bits, -1, zero)
    every = torch.arange(1 << bits, dtype=torch.uint8)[None]
    zeros, offset = {
        "middle": (None, -0.25 * (1 << (bits - 1))),
        "integer": (torch.tensor([[1]], dtype=torch.uint8), -0.25),
        "float": (torch.tensor([[0.5]]).half(), -0.125),
        "bias": (torch.tensor([[-3.0]]).half(), -3.0),
    }[zero]
    codes = IntegerCodes(every, torch.tensor([[0.25]]).half(), zeros)
    decoded = grid.decode(codes)
    assert torch.equal(decoded, offset + 0.25 * every.float())
    assert torch.equal(grid.encode(decoded, IntegerScales(codes.scales, zeros)).codes, every)


def test_integer_grid_by_hand() -> None:
    weight = torch.tensor([[3.0, -3.0, 0.9, -1.1]])
    grid = IntegerGrid(2, 4)
    codes = grid.encode(weight, grid.fit(weight))
    assert codes.scales.tolist() == [[2.0]]  # 2 * 3 / (2^2 - 1)
    assert codes.codes.tolist() == [[3, 0, 2, 1]]  # round(-1.5 + 2) is 0: ties to even
    assert grid.decode(codes).tolist() == [[2.0, -4.0, 0.0, -2.0]]
    weight = torch.tensor([[2.0, -1.0, 0.4, 0.6]])
    cases: tuple[tuple[Zero, int, list[float]], ...] = (
        ("integer", 1, [2.0, -1.0, 0.0, 1.0]),  # steps of 1: the value 0 has code 1
        ("float", 1, [2.0, -1.0, 0.0, 1.0]),
        ("bias", -1, [2.0, -1.0, 0.0, 1.0]),
    )
    for zero, zeros, expected in cases:
        grid = IntegerGrid(2, 4, zero)
        codes = grid.encode(weight, grid.fit(weight))
        assert codes.scales.tolist() == [[1.0]]
        assert codes.zeros is not None
        assert codes.zeros.tolist() == [[zeros]]
        assert codes.codes.tolist() == [[3, 0, 1, 2]]
        assert grid.decode(codes).tolist() == [expected]


def test_the_kinds_of_zero_on_values_of_one_sign() -> None:
    """An integer zero must lie among the codes, so the range holds 0; the others start at the values."""
    weight = torch.tensor([[1.0, 2.0, 3.0, 4.0]])
    steps = {}
    for zero in get_args(Zero):
        grid = IntegerGrid(2, 4, zero, torch.float32)
        scales = grid.fit(weight)
        steps[zero] = float(scales.scales[0, 0])
        if zero in ("float", "bias"):
            torch.testing.assert_close(grid.decode(grid.encode(weight, scales)), weight)
    assert steps == pytest.approx({"middle": 8 / 3, "integer": 4 / 3, "float": 1.0, "bias": 1.0})


@pytest.mark.parametrize("zero", get_args(Zero))
def test_shrink_is_of_each_group(zero: Zero) -> None:
    grid = IntegerGrid(4, 32, zero, torch.float32)
    weight = weights(3, 80)
    shrink = torch.rand(3, 3, generator=torch.Generator().manual_seed(1)) * 0.5 + 0.5
    plain, shrunk = grid.fit(weight), grid.fit(weight, shrink)
    torch.testing.assert_close(shrunk.scales, plain.scales * shrink)
    assert torch.equal(grid.fit(weight, 0.5).scales, grid.fit(weight, torch.full((3, 3), 0.5)).scales)
    if zero in ("float", "bias"):  # the centre of the range stays
        before, after = grid.lines(plain), grid.lines(shrunk)
        torch.testing.assert_close(
            before.origin + 7.5 * before.step, after.origin + 7.5 * after.step, rtol=1e-4, atol=1e-5
        )


def test_groups_that_are_no_neighbours() -> None:
    """Codes with `group_of` decode to what the same weights do when their groups are put side by side."""
    grid = IntegerGrid(4, 8, "integer")
    weight = weights(3, 32)
    order = torch.randperm(32, generator=torch.Generator().manual_seed(2))
    group_of = torch.empty(32, dtype=torch.int64)
    group_of[order] = torch.arange(32) // 8
    scales = grid.fit(weight[:, order])
    side_by_side = grid.decode(grid.encode(weight[:, order], scales))
    codes = encode(grid, weight, scales, group_of)
    assert torch.equal(codes.group_of, group_of)
    assert torch.equal(grid.decode(codes)[:, order], side_by_side)


@pytest.mark.parametrize("zero", get_args(Zero))
def test_integer_grid_of_zeros_constants_and_far_values(zero: Zero) -> None:
    grid = IntegerGrid(4, 4, zero)
    zeros = grid.encode(torch.zeros(2, 4), grid.fit(torch.zeros(2, 4)))
    assert grid.decode(zeros).abs().max() == 0
    assert bool((zeros.scales > 0).all())
    tiny = torch.full((1, 4), -1e-9)  # less than fp16 can tell from 0
    assert float(grid.decode(grid.encode(tiny, grid.fit(tiny))).abs().max()) < 1e-8
    far = torch.tensor([[5.0, 5.001, 5.002, 5.003]])
    for weight in (torch.full((1, 4), 0.3), torch.full((1, 4), -1e-3), far):
        scales = grid.fit(weight)
        decoded = grid.decode(grid.encode(weight, scales))
        assert (decoded - weight).abs().max() <= 0.07 * weight.abs().max()
    huge = torch.full((1, 4), 6e4)
    assert bool(grid.decode(grid.encode(huge, grid.fit(huge))).isfinite().all())


def test_impossible_group_sizes() -> None:
    for size in (0, -2):
        with pytest.raises(SpecError, match=f"a group size of {size}; a positive number"):
            IntegerGrid(4, size).group_width(128)
