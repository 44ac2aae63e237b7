"""bitsandbytes' grids, computed by ourselves: bitsandbytes is the oracle, to the bit, on the CPU."""

from __future__ import annotations

import math
from typing import Any

import bitsandbytes.functional
import pytest
import torch

from qexport.errors import SpecError
from qexport.grids.bnb4 import Bnb4Grid, Kind, NestedAbsmax, dynamic_codebook
from qexport.grids.grid import Grid, encode
from qexport.grids.int8_rows import Int8RowGrid

bnb: Any = bitsandbytes.functional
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
KINDS: list[Kind] = ["nf4", "fp4"]
EETQ = Int8RowGrid(bottom=-128, unit=1, dtype=torch.float16)
GRIDS: list[Grid] = [
    *(Bnb4Grid(kind, double) for kind in KINDS for double in (True, False)),
    Int8RowGrid(),
    EETQ,
]


def weights(*shape: int, seed: int = 0) -> torch.Tensor:
    """Heavy-tailed, as trained weights are."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator) * torch.randn(shape, generator=generator).exp()


def theirs(weight: torch.Tensor, kind: str, double: bool) -> tuple[torch.Tensor, Any]:
    """bitsandbytes' own packed codes, flat, and its state."""
    packed, state = bnb.quantize_4bit(weight, blocksize=64, compress_statistics=double, quant_type=kind)
    return packed.reshape(-1), state


def dequantized(packed: torch.Tensor, state: Any) -> torch.Tensor:
    """bitsandbytes' own weights in fp32, flat: its CPU decoder begins a block at each row."""
    count = math.prod(state.shape)
    state.dtype, state.shape = torch.float32, torch.Size((1, count))
    result: torch.Tensor = bnb.dequantize_4bit(packed.reshape(-1, 1), state)
    return result.reshape(-1)


def loss(weight: torch.Tensor, decoded: torch.Tensor) -> float:
    return float((weight.double() - decoded.double()).square().sum())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(64, 64), (32, 640), (3, 64), (128, 352), (5, 172), (7, 7), (3, 5, 100)])
def test_four_bit_codes_are_those_of_bitsandbytes(
    shape: tuple[int, ...], kind: Kind, dtype: torch.dtype
) -> None:
    weight = weights(*shape).to(dtype)
    packed, state = theirs(weight, kind, double=False)
    before = weight.clone()
    codes = Bnb4Grid(kind, double_quant=False).quantize(weight)
    assert torch.equal(weight, before)
    assert torch.equal(codes.packed, packed)
    assert isinstance(codes.absmax, torch.Tensor)
    assert torch.equal(codes.absmax, state.absmax)
    assert codes.codebook.numpy().tobytes() == state.code.numpy().tobytes()  # a zero's sign counts
    decoded = Bnb4Grid().decode(codes)
    assert decoded.shape == weight.shape
    torch.testing.assert_close(decoded.reshape(-1), dequantized(packed, state), rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(64, 64), (32, 640), (128, 352), (5, 172), (512, 1024)])
def test_nested_maxima_are_those_of_bitsandbytes(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    weight = weights(*shape).to(dtype)
    _, state = theirs(weight, "nf4", double=True)
    nested = Bnb4Grid().quantize(weight).absmax
    assert isinstance(nested, NestedAbsmax)
    assert torch.equal(nested.codes, state.absmax)
    assert torch.equal(nested.absmax, state.state2.absmax)
    assert torch.equal(nested.codebook, state.state2.code)
    assert nested.offset == state.offset.item()
    decoded = bnb.dequantize_blockwise(state.absmax, state.state2) + state.offset
    assert torch.equal(nested.decoded(), decoded)


def test_the_dynamic_codebook_is_that_of_bitsandbytes() -> None:
    assert torch.equal(dynamic_codebook(), bnb.create_dynamic_map())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("neighbours", [0, 1, 2])
def test_borders_between_codes_lie_where_those_of_bitsandbytes_do(kind: Kind, neighbours: int) -> None:
    """Every halfway point between two levels, and the floats next to it on either side; both zeros."""
    levels = bnb.get_4bit_type(kind, device="cpu").sort().values
    middles = (levels[:-1] + levels[1:]) / 2
    below, above = middles.clone(), middles.clone()
    for _ in range(neighbours):
        below, above = below.nextafter(torch.tensor(-2.0)), above.nextafter(torch.tensor(2.0))
    values = torch.cat((middles, below, above, levels, torch.tensor([0.0, -0.0, 1e-30, -1e-30])))
    values = torch.nn.functional.pad(values, (0, -len(values) % 63))
    # a block of 64 with maximum 1, so that values are not scaled
    blocks = torch.cat((torch.ones(len(values) // 63, 1), values.reshape(-1, 63)), dim=1)
    packed, _ = theirs(blocks, kind, double=False)
    assert torch.equal(Bnb4Grid(kind, double_quant=False).quantize(blocks).packed, packed)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(4))
def test_codes_against_what_is_stored_are_never_worse(kind: Kind, seed: int) -> None:
    """bitsandbytes chooses codes before it quantizes the maxima."""
    weight = weights(64, 512, seed=seed)
    packed, state = theirs(weight, kind, double=True)
    grid = Bnb4Grid(kind)
    ours = grid.decode(grid.quantize(weight))
    assert loss(weight, ours) < loss(weight, dequantized(packed, state).reshape(weight.shape))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("double", [True, False])
def test_zeros_decode_to_zeros(kind: Kind, double: bool) -> None:
    grid = Bnb4Grid(kind, double)
    nothing = grid.quantize(torch.zeros(4, 128))
    assert torch.equal(grid.decode(nothing), torch.zeros(4, 128))
    weight = weights(4, 512)
    weight[1, 64:128] = 0
    packed, state = theirs(weight, kind, double)
    codes = grid.quantize(weight)
    decoded = grid.decode(codes)
    assert bool(decoded.isfinite().all())
    assert decoded[1, 64:128].abs().max() == 0
    if isinstance(codes.absmax, NestedAbsmax):
        assert torch.equal(codes.absmax.codes, state.absmax)
    else:
        assert torch.equal(codes.packed, packed)


def test_a_maximum_that_nests_to_less_than_nothing_is_lived_with() -> None:
    """A tiny block among huge ones: its stored maximum may be negative, and codes are nearest even so."""
    weight = weights(1, 64 * 256)
    weight[:, :64] *= 1e-4
    grid = Bnb4Grid()
    found = False
    for scale in torch.linspace(1, 10, 60):
        changed = weight.clone()
        changed[:, 64:128] *= scale
        scales = grid.fit(changed)
        found = found or bool(grid.lines(scales).step[0, 0] < 0)
        decoded = grid.decode(encode(grid, changed, scales))
        assert (decoded - changed)[:, :64].abs().max() <= changed[:, :64].abs().max()  # 0 is a level
    assert found


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("double", [True, False])
def test_shrunk_ranges(kind: Kind, double: bool) -> None:
    grid, weight = Bnb4Grid(kind, double), weights(8, 256)
    shrink = torch.linspace(0.5, 1, 32).reshape(8, 4)
    found = grid.lines(grid.fit(weight, shrink)).step
    full = Bnb4Grid(kind, double_quant=False).fit(weight)
    assert isinstance(full, torch.Tensor)
    expected = full * shrink
    assert (found - expected).abs().max() <= (0.05 * expected.max() if double else 0)
    assert torch.equal(grid.lines(grid.fit(weight, 0.5)).step, grid.lines(grid.fit(weight * 0.5)).step)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_round_broadcasts(grid: Grid) -> None:
    """Columns in turn, groups at a time and whole matrices come to the same."""
    weight = weights(6, 192)
    lines = grid.lines(grid.fit(weight))
    width = grid.group_width(192)
    step = lines.step.repeat_interleave(width, dim=1)
    codes, values = grid.round(weight, step, torch.zeros_like(step))
    for column in range(192):
        c, v = grid.round(weight[:, column], step[:, column], torch.zeros(6))
        assert torch.equal(c, codes[:, column])
        assert torch.equal(v, values[:, column])
    c, v = grid.round(weight.reshape(6, -1, width), lines.step[:, :, None], lines.origin[:, :, None])
    assert torch.equal(c.reshape(6, 192), codes)
    assert torch.equal(v.reshape(6, 192), values)
    c, v = grid.round(weight[0], step[:, :1], torch.zeros(6, 1))  # one row against many steps
    assert c.shape == (6, 192)
    again = grid.round(weight[:1].expand(6, -1).contiguous(), step[:, :1].expand(6, 192), torch.zeros(1))
    assert torch.equal(c, again[0])
    assert torch.equal(grid.decode(grid.assemble(codes, grid.fit(weight))), values)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_codes_are_nearest_and_stay(grid: Grid) -> None:
    weight = weights(16, 256)
    scales = grid.fit(weight)
    codes = encode(grid, weight, scales)
    decoded = grid.decode(codes)
    assert torch.equal(grid.decode(encode(grid, decoded, scales)), decoded)
    lines = grid.lines(scales)
    step = lines.step.repeat_interleave(grid.group_width(256), dim=1)
    if isinstance(grid, Bnb4Grid):
        levels = codes.codebook[None, None] * step[:, :, None]
    else:
        levels = torch.arange(-128.0 if grid == EETQ else -127.0, 128)[None, None] * step[:, :, None]
    best = (levels - weight[:, :, None]).abs().amin(dim=2)
    torch.testing.assert_close((decoded - weight).abs(), best, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_what_is_not_a_number_ends_no_process(grid: Grid) -> None:
    weight = weights(2, 64)
    weight[0, 3] = float("nan")
    codes, _ = grid.round(weight, torch.ones(2, 1), torch.zeros(2, 1))
    assert codes.shape == weight.shape


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_groups_that_are_no_neighbours_are_refused(grid: Grid) -> None:
    weight = weights(2, 64)
    with pytest.raises(SpecError):
        grid.assemble(torch.zeros(2, 64), grid.fit(weight), torch.zeros(64, dtype=torch.int64))


def test_rows_that_blocks_run_over_are_refused_as_groups() -> None:
    with pytest.raises(SpecError, match="rows of 96 inputs; a multiple of 64"):
        Bnb4Grid().fit(weights(4, 96))


@pytest.mark.parametrize("shape", [(4, 64), (7, 33), (256, 1024)])
def test_int8_rows_are_those_of_bitsandbytes(shape: tuple[int, int]) -> None:
    """Equal but for ties: bitsandbytes multiplies by 127/absmax, and we divide by absmax/127."""
    weight = weights(*shape).half()
    expected, absmax, _ = bnb.int8_vectorwise_quant(weight.clone())
    grid = Int8RowGrid()
    codes = encode(grid, weight, grid.fit(weight))
    assert torch.equal(codes.scales, absmax)
    differ = codes.codes != expected
    exact = weight.double() * 127 / absmax.double()[:, None]
    assert bool(((exact - exact.floor() - 0.5).abs()[differ] < 1e-4).all())
    assert float(differ.double().mean()) < 1e-4
    decoded = grid.decode(codes)
    theirs_decoded = bnb.int8_vectorwise_dequant(codes.codes, absmax)
    torch.testing.assert_close(decoded, theirs_decoded, rtol=1e-6, atol=0)


@pytest.mark.parametrize("grid", [Int8RowGrid(), EETQ], ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_int8_rows_cover_their_range(grid: Int8RowGrid, dtype: torch.dtype) -> None:
    weight = weights(32, 96).to(dtype)
    before = weight.clone()
    scales = grid.fit(weight)
    codes = encode(grid, weight, scales)
    assert torch.equal(weight, before)
    step = grid.lines(scales).step
    error = (grid.decode(codes) - weight.float()).abs() / step
    # an fp16 step may be smaller than the exact one by 2^-11: 128 of them, by a sixteenth
    assert error.max() <= (0.5001 if grid == Int8RowGrid() else 0.5626)
    assert int(codes.codes.min()) >= grid.bottom
    both = torch.tensor([[1.0, -128.0], [127.0, -1.0]])
    if grid == EETQ:
        assert grid.fit(both).tolist() == [1.0, 1.0]
        assert encode(grid, both, grid.fit(both)).codes.tolist() == [[1, -128], [127, -1]]
    else:
        assert grid.fit(both).tolist() == [128.0, 127.0]


def test_int8_rows_are_nearer_to_bf16_weights_than_through_fp16() -> None:
    """bitsandbytes rounds every weight to fp16 before it quantizes."""
    weight = weights(64, 256).bfloat16() * 1e-6  # where fp16 has few digits left
    expected, absmax, _ = bnb.int8_vectorwise_quant(weight.half())
    grid = Int8RowGrid()
    ours = grid.decode(encode(grid, weight, grid.fit(weight)))
    through_fp16 = bnb.int8_vectorwise_dequant(expected, absmax)
    assert loss(weight, ours) < 0.95 * loss(weight, through_fp16)


@pytest.mark.parametrize("grid", [Int8RowGrid(), EETQ], ids=str)
def test_int8_rows_of_zeros_and_of_shrunk_ranges(grid: Int8RowGrid) -> None:
    weight = weights(3, 40)
    weight[1] = 0
    decoded = grid.decode(encode(grid, weight, grid.fit(weight)))
    assert bool(decoded.isfinite().all())
    assert decoded[1].abs().max() == 0
    shrink = torch.tensor([[0.5], [1.0], [0.75]])
    found, full = grid.lines(grid.fit(weight, shrink)).step, grid.lines(grid.fit(weight)).step
    torch.testing.assert_close(found, full * shrink, rtol=1e-3, atol=0)
    assert torch.equal(grid.lines(grid.fit(weight * 1e9, 1.0)).step.isfinite(), torch.ones(3, 1) > 0)
