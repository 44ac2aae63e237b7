"""Grids: decode(encode) is the identity on the grid; bitsandbytes itself is the oracle of its own."""

from __future__ import annotations

import bitsandbytes.functional as bnb
import pytest
import torch

from qexport.errors import SpecError
from qexport.grids.bnb4 import Bnb4Grid
from qexport.grids.int8_rows import Int8RowGrid
from qexport.grids.integer import IntegerCodes, IntegerGrid


def weights(out: int, inputs: int, seed: int = 0) -> torch.Tensor:
    """Heavy-tailed, as trained weights are."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(out, inputs, generator=generator) * torch.randn(out, inputs, generator=generator).exp()


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize(("out", "inputs", "group"), [(8, 128, 32), (5, 96, 96), (7, 60, -1), (1, 16, 16)])
def test_integer_grid(bits: int, out: int, inputs: int, group: int) -> None:
    grid = IntegerGrid(bits, group)
    weight = weights(out, inputs)
    codes = grid.quantize(weight)
    assert int(codes.codes.max()) < 1 << bits
    assert codes.scales.shape == (out, inputs // grid.group_width(inputs))
    decoded = grid.decode(codes)
    # a value on the grid is its own nearest: encoding again changes nothing
    again = grid.encode(decoded, codes.scales)
    assert torch.equal(again.codes, codes.codes)
    # no value is further away than half a step, but for the top one, which the symmetric range cuts off
    step = codes.scales.float().repeat_interleave(grid.group_width(inputs), dim=1)
    inside = codes.codes < (1 << bits) - 1
    assert bool(((decoded - weight).abs() <= 0.5001 * step)[inside].all())
    assert bool(((decoded - weight).abs() <= 1.001 * step).all())


def test_integer_grid_by_hand() -> None:
    grid = IntegerGrid(2, 4)
    codes = grid.quantize(torch.tensor([[3.0, -3.0, 0.9, -1.1]]))
    assert codes.scales.tolist() == [[2.0]]  # 2 * 3 / (2^2 - 1)
    assert codes.codes.tolist() == [[3, 0, 2, 1]]  # round(-1.5) is -2: ties to even
    assert grid.decode(codes).tolist() == [[2.0, -4.0, 0.0, -2.0]]


def test_integer_grid_of_zeros_and_of_huge_values() -> None:
    grid = IntegerGrid(4, 4)
    zeros = grid.quantize(torch.zeros(2, 4))
    assert grid.decode(zeros).abs().max() == 0
    assert bool(zeros.scales.isfinite().all())
    huge = grid.quantize(torch.full((1, 4), 1e7))
    assert bool(grid.decode(huge).isfinite().all())


def test_groups_that_do_not_divide() -> None:
    with pytest.raises(SpecError, match="group size 48 does not divide 128 inputs"):
        IntegerGrid(4, 48).quantize(torch.zeros(2, 128))


def test_every_code_survives() -> None:
    grid = IntegerGrid(3, 8)
    codes = IntegerCodes(
        torch.arange(8, dtype=torch.uint8)[None], torch.tensor([[0.25]], dtype=torch.float16)
    )
    assert grid.decode(codes).tolist() == [[-1.0, -0.75, -0.5, -0.25, 0.0, 0.25, 0.5, 0.75]]
    assert torch.equal(grid.encode(grid.decode(codes), codes.scales).codes, codes.codes)


@pytest.mark.parametrize("shape", [(64, 64), (32, 640), (96, 192), (3, 64)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_nf4_decodes_as_bitsandbytes_does(shape: tuple[int, int], dtype: torch.dtype) -> None:
    weight = weights(*shape).to(dtype)
    packed, state = bnb.quantize_4bit(weight, blocksize=64, compress_statistics=True, quant_type="nf4")
    theirs = bnb.dequantize_4bit(packed, state).float()
    grid = Bnb4Grid()
    codes = grid.quantize(weight)
    ours = grid.decode(codes)
    assert ours.shape == weight.shape
    assert torch.equal(codes.packed, packed.reshape(-1))
    exact = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}[dtype]  # theirs rounds to dtype
    torch.testing.assert_close(ours, theirs, rtol=exact, atol=1e-7)


@pytest.mark.parametrize("shape", [(3, 100), (5, 172), (7, 7), (128, 352)])
def test_nf4_of_ragged_shapes(shape: tuple[int, int]) -> None:
    """bitsandbytes' own CPU decoder is wrong on some of these, so the bound of NF4 itself is the oracle."""
    weight = weights(*shape)
    decoded = Bnb4Grid().decode(Bnb4Grid().quantize(weight)).reshape(-1)
    flat = weight.reshape(-1)
    for block, found in zip(torch.split(flat, 64), torch.split(decoded, 64), strict=True):
        # the codebook's widest gap is 0.3 of the block's maximum, which itself carries 8-bit error
        assert (block - found).abs().max() <= 0.17 * block.abs().max() + 0.1 * flat.abs().max() / 2


@pytest.mark.parametrize("shape", [(4, 64), (7, 33)])
def test_int8_rows(shape: tuple[int, int]) -> None:
    weight = weights(*shape)
    grid = Int8RowGrid()
    codes = grid.quantize(weight)
    theirs, absmax, _ = bnb.int8_vectorwise_quant(weight.half())
    assert torch.equal(codes.codes, theirs)
    expected = theirs.float() * absmax[:, None] / 127
    torch.testing.assert_close(grid.decode(codes), expected)
    assert (grid.decode(codes) - weight).abs().max() <= 0.51 * weight.abs().max() / 127 + 1e-2
