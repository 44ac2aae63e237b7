"""ggml's plain, legacy, ternary, MXFP4 and IQ4 types. Oracles: gguf-py, and ggml itself inside xllamacpp."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import gguf
import numpy as np
import pytest
import torch

from benchmarks import ggml as ggml_encoders
from qexport.errors import MissingDependencyError, SpecError
from qexport.grids.ggml.types import TYPES, BlockType

LEGACY = ["q4_0", "q4_1", "q5_0", "q5_1", "q8_0"]
IQ4 = ["iq4_nl", "iq4_xs"]
EXACT = [*LEGACY, "tq1_0", "tq2_0", "mxfp4", "f16", "bf16", "f32"]  # byte for byte what llama.cpp writes
ALL = [*EXACT, *IQ4]
SEARCHED = ["q4_0", "q4_1", "q5_0", "q5_1", *IQ4]  # with importance
LINES = [*LEGACY, "tq1_0", "tq2_0", "mxfp4", *IQ4]


@pytest.fixture(scope="session")
def ggml() -> Any:
    """ggml's own encoders."""
    pytest.importorskip("xllamacpp")
    return ggml_encoders


def by_ggml(
    ggml: Any, kind: BlockType, weight: torch.Tensor, importance: torch.Tensor | None = None
) -> torch.Tensor:
    blocks: torch.Tensor = ggml.encode(kind, weight, importance)
    return blocks


def by_gguf(kind: BlockType, blocks: torch.Tensor) -> torch.Tensor:
    with np.errstate(all="ignore"):
        decoded = gguf.quants.dequantize(blocks.numpy(), gguf.GGMLQuantizationType(kind.number))
    return torch.from_numpy(decoded.copy())


def heavy(rows: int = 24, inputs: int = 1024, seed: int = 0) -> torch.Tensor:
    """Heavy-tailed noise."""
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(rows, inputs, generator=generator) * torch.randn(rows, inputs, generator=generator).exp()
    )


def plain(rows: int = 24, inputs: int = 1024, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, inputs, generator=torch.Generator().manual_seed(seed)) * 0.02


def importances(inputs: int = 1024, seed: int = 1) -> torch.Tensor:
    """Means of squared activations, some of them large."""
    return torch.randn(inputs, generator=torch.Generator().manual_seed(seed)).exp().square()


def edge_rows() -> torch.Tensor:
    """Rows of 256 that have something to trip over, all within what fp16 scales can hold."""
    base = torch.randn(256, generator=torch.Generator().manual_seed(9))
    signs = torch.tensor([1.0, -1.0]).repeat(128)
    ramp = torch.arange(256.0)
    rows = [
        torch.zeros(256),
        -torch.zeros(256),
        torch.zeros(256) * signs,
        torch.zeros(256) * -signs,
        torch.full((256,), 0.7),
        torch.full((256,), -0.7),
        signs,  # which of several furthest numbers is the first
        -signs,
        signs * 0.3 + (ramp % 32 == 31),
        (ramp % 32 == 5).float() * -3,
        base.abs() * (ramp % 3 > 0),  # zeros are the smallest
        base.abs() * (ramp % 3 > 0) * signs.clamp(min=-0.0),
        base.abs() + 5,
        -base.abs() - 5,
        ramp % 32 - 16,  # halves between codes
        (ramp % 32 - 16) / 2 + 0.25,
        (ramp % 64) / 8,
        base * 1e-6,
        base * 1e-30,
        base * 2e-38,
        base * 1e4,
        torch.where(ramp == 77, 6e4, base),
        1 - 2.0**-24 * (ramp % 40),  # logarithms that round up
        4 - 2.0**-22 * (ramp % 40),
        signs * 2.0 ** (ramp % 16 - 8),
    ]
    return torch.stack(rows)


def loss(weight: torch.Tensor, decoded: torch.Tensor, importance: torch.Tensor | None) -> float:
    squares = (weight.double() - decoded.double()).square()
    return float((squares if importance is None else squares * importance.double()).sum())


def spread(kind: BlockType, scales: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Step and origin of every weight."""
    assert kind.affine is not None
    step, origin = kind.affine.lines(scales)
    return step.repeat_interleave(kind.affine.width, 1), origin.repeat_interleave(kind.affine.width, 1)


@pytest.mark.parametrize("name", ALL)
def test_decoders_equal_gguf_on_any_bytes(name: str) -> None:
    kind = TYPES[name]
    generator = torch.Generator().manual_seed(3)
    blocks = torch.randint(0, 256, (5, kind.size * 64), dtype=torch.uint8, generator=generator)
    ours, theirs = kind.decode(blocks), by_gguf(kind, blocks)
    assert ours.shape == (5, kind.values * 64)
    numbers = ~theirs.isnan()
    assert torch.equal(ours.isnan(), ~numbers)
    assert torch.equal(ours.view(torch.int32)[numbers], theirs.view(torch.int32)[numbers])


@pytest.mark.parametrize("name", EXACT)
@pytest.mark.parametrize(
    "weight", [heavy(), plain(rows=3, inputs=256), edge_rows()], ids=["heavy", "plain", "edge"]
)
def test_bytes_are_those_of_ggml(name: str, weight: torch.Tensor, ggml: Any) -> None:
    kind = TYPES[name]
    if name == "f16":
        weight = weight.clamp(-60000, 60000)
    before = weight.clone()
    assert torch.equal(kind.encode(weight), by_ggml(ggml, kind, weight))
    assert torch.equal(weight.view(torch.int32), before.view(torch.int32))


@pytest.mark.parametrize("name", EXACT)
def test_bytes_are_those_of_gguf(name: str) -> None:
    kind, weight = TYPES[name], heavy(seed=4)
    theirs = gguf.quants.quantize(weight.numpy(), gguf.GGMLQuantizationType(kind.number)).view(np.uint8)
    assert torch.equal(kind.encode(weight), torch.from_numpy(theirs))


@pytest.mark.parametrize("name", ["q8_0", "tq1_0", "tq2_0", "mxfp4", "f16"])
def test_importance_changes_nothing_where_llama_cpp_ignores_it(name: str) -> None:
    kind, weight = TYPES[name], heavy()
    assert torch.equal(kind.encode(weight, importances()), kind.encode(weight))


@pytest.mark.parametrize("name", SEARCHED)
@pytest.mark.parametrize("weight", [heavy(), plain(), heavy(seed=7) + 0.5], ids=["heavy", "plain", "shifted"])
def test_weighted_error_is_no_larger_than_ggmls(name: str, weight: torch.Tensor, ggml: Any) -> None:
    kind, importance = TYPES[name], importances()
    for used in (importance, torch.ones(1024), None) if name in IQ4 else (importance, torch.ones(1024)):
        ours = kind.decode(kind.encode(weight, used))
        theirs = kind.decode(by_ggml(ggml, kind, weight, used))
        assert loss(weight, ours, used) < loss(weight, theirs, used)


@pytest.mark.parametrize("name", SEARCHED)
def test_importance_lowers_the_error_that_it_weighs(name: str) -> None:
    kind, weight, importance = TYPES[name], plain(), importances()
    weighted, unweighted = (kind.decode(kind.encode(weight, used)) for used in (importance, None))
    assert loss(weight, weighted, importance) < 0.95 * loss(weight, unweighted, importance)


@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("name", LINES)
def test_scales_and_codes_apart_make_the_same_blocks(name: str, weighted: bool) -> None:
    kind, weight = TYPES[name], heavy(rows=6)
    importance = importances() if weighted else None
    assert kind.affine is not None
    blocks = kind.encode(weight, importance)
    scales = kind.affine.fit(weight, importance)
    codes, rounded = kind.affine.round(weight, *spread(kind, scales))
    packed = kind.affine.pack(codes, scales)
    assert torch.equal(kind.decode(packed), rounded)
    if name in IQ4 or name == "mxfp4" or (weighted and name in SEARCHED):
        assert torch.equal(packed, blocks)
    else:
        # llama.cpp chooses codes by the scale before it is rounded; here they are nearest to what is stored
        assert float((packed != blocks).float().mean()) < 0.05
        assert loss(weight, rounded, None) <= loss(weight, kind.decode(blocks), None)


@pytest.mark.parametrize("name", LINES)
def test_rounding_finds_the_nearest_of_all_values(name: str) -> None:
    kind, weight = TYPES[name], heavy(rows=1, inputs=256, seed=5)
    assert kind.affine is not None
    step, origin = spread(kind, kind.affine.fit(weight, None))
    # what codes can stand for: the values that rounding a fine lattice gives
    lattice = torch.linspace(-130, 130, 1041)[:, None] * step.abs() + origin
    codes, reachable = kind.affine.round(lattice, step, origin)
    wanted = {"q8_0": 256, "tq1_0": 3, "tq2_0": 3, "mxfp4": 15}.get(name, 2**kind.affine.bits)
    assert len(set(codes.flatten().tolist())) == wanted
    nearest = (reachable - weight).abs().amin(dim=0)
    _, rounded = kind.affine.round(weight, step, origin)
    assert torch.allclose((rounded[0] - weight[0]).abs(), nearest, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", LINES)
@pytest.mark.parametrize("weighted", [True, False])
def test_edges_decode_to_what_is_near(name: str, weighted: bool) -> None:
    kind, weight = TYPES[name], edge_rows()
    # two groups have none
    importance = (importances(256).clamp(0.5, 2) * (torch.arange(256) >= 64)) if weighted else None
    decoded = kind.decode(kind.encode(weight, importance))
    assert bool(decoded.isfinite().all())
    assert not decoded[:4].any()
    reach = weight.reshape(len(weight), -1, kind.values).abs().amax(dim=2)
    off = (decoded - weight).abs().reshape(*reach.shape, -1).amax(dim=2)
    # llama.cpp rounds the tiniest scales to 0
    least = 1e-6 if name in IQ4 or (weighted and name in SEARCHED) else 4e-6
    assert bool((off <= reach * (0.51 if name.startswith("tq") else 0.3) + least).all())


@pytest.mark.parametrize("name", LINES)
@pytest.mark.parametrize("scale", [1e7, 1e30, 3e38, 1e-39, 1e-7])
@pytest.mark.parametrize("weighted", [True, False])
def test_scales_that_fp16_cannot_hold_stay_finite(name: str, scale: float, weighted: bool) -> None:
    kind = TYPES[name]
    weight = (heavy(rows=2, inputs=256) / 40).clamp(-1, 1) * scale
    decoded = kind.decode(kind.encode(weight, importances(256) if weighted else None))
    assert bool(decoded.isfinite().all())
    assert bool((decoded.abs() <= weight.abs().amax() * 1.2 + 1e-6).all())
    if scale > 1:
        large = weight.abs() > scale / 4
        assert torch.equal(decoded[large].sign(), weight[large].sign())


@pytest.mark.parametrize("name", SEARCHED)
def test_importance_of_any_size_is_as_good(name: str) -> None:
    kind, weight, importance = TYPES[name], heavy(rows=4), importances()
    blocks = kind.encode(weight, importance)
    for factor in (2.0**-100, 2.0**90):
        assert torch.equal(kind.encode(weight, importance * factor), blocks)


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(SpecError, match="multiple of 32"):
        TYPES["q4_0"].encode(torch.zeros(2, 33))
    with pytest.raises(SpecError, match="multiple of 256"):
        TYPES["iq4_xs"].encode(torch.zeros(2, 32))
    with pytest.raises(SpecError, match="one each of 64 inputs"):
        TYPES["q4_0"].encode(torch.zeros(2, 64), torch.ones(32))
    with pytest.raises(SpecError, match="whole blocks of 18"):
        TYPES["q4_0"].decode(torch.zeros(2, 17, dtype=torch.uint8))
    with pytest.raises(SpecError, match=r"70000.*65504.*bf16 or f32"):
        TYPES["f16"].encode(torch.tensor([[1.0, -70000.0]]))


@pytest.mark.parametrize("name", ALL)
def test_no_rows_are_no_bytes(name: str) -> None:
    kind = TYPES[name]
    blocks = kind.encode(torch.zeros(0, 256))
    assert blocks.dtype == torch.uint8
    assert blocks.numel() == 0


@pytest.mark.parametrize("name", ["f32", "f16", "bf16"])
def test_numbers_at_odd_places_are_read(name: str) -> None:
    kind, weight = TYPES[name], plain(rows=2, inputs=8)
    blocks = kind.encode(weight)
    shifted = torch.cat((torch.zeros(1, dtype=torch.uint8), blocks.flatten()))[1:].reshape(blocks.shape)
    assert torch.equal(kind.decode(shifted), kind.decode(blocks))


def test_reading_needs_no_numba(monkeypatch: pytest.MonkeyPatch) -> None:
    kind, weight = TYPES["q4_0"], plain()
    blocks = kind.encode(weight)
    for module in ("compiled", "legacy_kernels", "legacy_search", "legacy", "blocks"):
        monkeypatch.delitem(sys.modules, f"qexport.grids.ggml.{module}", raising=False)
    monkeypatch.setitem(sys.modules, "numba", None)
    assert kind.decode(blocks).shape == weight.shape
    with pytest.raises(MissingDependencyError, match=r"needs numba.*qexport"):
        kind.encode(weight)


def test_kernels_run_where_nothing_can_be_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    numba = pytest.importorskip("numba")
    from qexport.grids.ggml import compiled

    real = numba.njit

    def unkept(**options: Any) -> Any:
        if options.pop("cache", False):
            raise RuntimeError("cannot cache function: no locator available")
        return real(**options)

    monkeypatch.setattr(compiled, "numba", SimpleNamespace(njit=unkept))

    @compiled.compiled()
    def twice(value: Any) -> Any:
        return value + value

    assert twice(2) == 4
