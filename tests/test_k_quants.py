"""K-quants: decoded by gguf-py, and beside the real ggml (xllamacpp) on the same weights."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable
from functools import cache

import pytest
import torch
from safetensors.torch import load_file

from benchmarks import ggml as ggml_encoders
from qexport.errors import SpecError
from qexport.grids.ggml.k_layout import KScales
from qexport.grids.ggml.types import block_type
from tests.conftest import shared

NAMES = ("q2_k", "q3_k", "q4_k", "q5_k", "q6_k")
# relative squared error on normal weights, as measured, and a tenth more
ERRORS = {"q2_k": 0.077, "q3_k": 0.024, "q4_k": 0.0054, "q5_k": 0.00131, "q6_k": 0.00032}
Quantizer = Callable[[str, torch.Tensor, torch.Tensor | None], torch.Tensor]


def normal(rows: int = 16, inputs: int = 1024, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, inputs, generator=torch.Generator().manual_seed(seed)) * 0.02


def heavy_tailed(rows: int = 48, inputs: int = 1024, seed: int = 0) -> torch.Tensor:
    """Student's t with four degrees of freedom."""
    generator = torch.Generator().manual_seed(seed)
    squares = torch.randn(4, rows, inputs, generator=generator).square().mean(0)
    return torch.randn(rows, inputs, generator=generator) / squares.sqrt() * 0.02


def importance(inputs: int, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(inputs, generator=generator).square() * torch.randn(inputs, generator=generator).exp()


@cache
def trained() -> torch.Tensor:
    """Rows of all kinds of matrices of a real model."""
    tensors = load_file(shared("models", "captions22m", "model.safetensors"))
    matrices = [part for name, part in sorted(tensors.items()) if part.ndim == 2 and "layers.2" in name]
    return torch.cat([part[:64].float().reshape(-1, 512) for part in matrices])


def gguf_decode(name: str, blocks: torch.Tensor) -> torch.Tensor:
    gguf = pytest.importorskip("gguf")
    kind = gguf.GGMLQuantizationType(block_type(name).number)
    return torch.from_numpy(gguf.quants.dequantize(blocks.numpy(), kind))


def ggml() -> Quantizer:
    """ggml_quantize_chunk of the real ggml."""
    pytest.importorskip("xllamacpp")
    return lambda name, weight, h: ggml_encoders.encode(block_type(name), weight, h)


def own_weights(name: str, weight: torch.Tensor, h: torch.Tensor | None) -> torch.Tensor:
    """What ggml weighs squared errors with (ggml-quants.c; q2_k takes |x| times the plain error)."""
    width = 256 if h is not None else 32
    groups = weight.reshape(len(weight), -1, width)
    square = groups.square().mean(2, keepdim=True)
    if h is not None:
        return h * (2 * square + groups.square()).sqrt().reshape(weight.shape)
    if name in ("q3_k", "q6_k"):
        return weight.square()
    return weight.abs() if name == "q2_k" else (square.sqrt() + groups.abs()).reshape(weight.shape)


def error(weight: torch.Tensor, found: torch.Tensor, by: torch.Tensor | None = None) -> float:
    squares = (weight - found).double().square()
    return float((squares if by is None else squares * by).sum())


def random_blocks(name: str, count: int = 64) -> torch.Tensor:
    """Any bytes, but for d and dmin, which are finite."""
    kind = block_type(name)
    blocks = torch.randint(0, 256, (count, kind.size), generator=torch.Generator().manual_seed(3)).to(
        torch.uint8
    )
    halves = {"q2_k": (80, 82), "q3_k": (108,), "q4_k": (0, 2), "q5_k": (0, 2), "q6_k": (208,)}[name]
    for place in halves:
        blocks[:, place + 1] &= (
            0b1011_1011  # no exponent of all ones, normal and subnormal numbers of both signs
        )
    return blocks


@pytest.mark.parametrize("name", NAMES)
def test_decodes_as_gguf_does(name: str) -> None:
    """To the bit, signs of zeros included."""
    blocks = random_blocks(name)
    rows = blocks.view(16, -1)
    ours, theirs = block_type(name).decode(rows), gguf_decode(name, rows)
    assert ours.shape == (16, 1024)
    assert torch.equal(ours.view(torch.int32), theirs.view(torch.int32))


def test_reading_needs_no_numba() -> None:
    code = (
        "import sys, torch; from qexport.grids.ggml.types import block_type;"
        "block_type('q4_k').decode(torch.zeros(1, 144, dtype=torch.uint8));"
        "sys.exit('numba' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("name", NAMES)
def test_packs_what_it_unpacks(name: str) -> None:
    """Bytes to codes and scales and back are the same bytes."""
    kind = block_type(name)
    blocks = random_blocks(name)
    raw, scales = kind.module.AFFINE[name].unpacker(blocks)  # type: ignore[attr-defined]
    codes = raw.view(torch.int8) + kind.module.AFFINE[name].lowest  # type: ignore[attr-defined]
    assert torch.equal(kind.module.AFFINE[name].pack(codes, scales), blocks)


@pytest.mark.parametrize("weighed", [False, True], ids=["plain", "importance"])
@pytest.mark.parametrize("name", NAMES)
def test_loses_less_than_ggml(name: str, weighed: bool) -> None:
    """By the error asked for and by ggml's own, on normal, heavy-tailed and trained weights."""
    quantize = ggml()
    for weight in (normal(48), heavy_tailed(), trained()):
        h = importance(weight.shape[1]) if weighed else None
        kind = block_type(name)
        ours = gguf_decode(name, kind.encode(weight, h))
        theirs = gguf_decode(name, quantize(name, weight, h))
        assert error(weight, ours, h) < 0.96 * error(weight, theirs, h)
        own = own_weights(name, weight, h)
        assert error(weight, ours, own) < error(weight, theirs, own)


@pytest.mark.parametrize("name", NAMES)
def test_error_of_normal_weights(name: str) -> None:
    weight = normal()
    assert error(weight, gguf_decode(name, block_type(name).encode(weight))) < ERRORS[name] * error(
        weight, 0 * weight
    )


@pytest.mark.parametrize("name", NAMES)
def test_importance_moves_the_error(name: str) -> None:
    weight, h = normal(), importance(1024)
    kind = block_type(name)
    plain, weighed = kind.decode(kind.encode(weight)), kind.decode(kind.encode(weight, h))
    assert error(weight, weighed, h) < 0.9 * error(weight, plain, h)


@pytest.mark.parametrize("name", NAMES)
def test_encodes_its_own_values_again(name: str) -> None:
    """What is on a grid stays nearly there: a twentieth of the first loss at most.

    Not the same bytes: another grid may hold the same values, and the search may find one that is as near.
    """
    kind = block_type(name)
    weight = normal()
    once = kind.decode(kind.encode(weight))
    assert error(once, kind.decode(kind.encode(once))) < 0.05 * error(weight, once)


@pytest.mark.parametrize("weighed", [False, True], ids=["plain", "importance"])
@pytest.mark.parametrize("name", NAMES)
def test_fit_round_and_pack_are_the_encoder(name: str, weighed: bool) -> None:
    kind = block_type(name)
    weight = heavy_tailed(7, 768)  # 21 super-blocks: no whole number of the search's
    h = importance(768) if weighed else None
    affine = kind.affine
    assert affine is not None
    scales = affine.fit(weight, h)
    step, origin = affine.lines(scales)
    assert step.shape == origin.shape == (7, 768 // affine.width)
    assert (step >= 0).all() or name in ("q3_k", "q6_k")
    codes, values = affine.round(weight.view(7, -1, affine.width), step[..., None], origin[..., None])
    assert len(torch.unique(codes)) == 2**affine.bits
    blocks = kind.encode(weight, h)
    assert torch.equal(affine.pack(codes.view(7, 768), scales), blocks)
    assert torch.equal(values.view(7, 768), gguf_decode(name, blocks))
    # a code either side of the chosen one is no nearer
    for other in (codes - 1, codes + 1):
        inside = other.clamp(int(codes.min()), int(codes.max()))
        away = (inside.float() * step[..., None] + origin[..., None] - weight.view(values.shape)).abs()
        assert (away >= (values - weight.view(values.shape)).abs() - 1e-6 * step.abs()[..., None]).all()


@pytest.mark.parametrize("name", NAMES)
def test_rows_alone_and_together(name: str) -> None:
    """A row's bytes do not depend on the rows beside it; inputs are not changed."""
    weight, h = heavy_tailed(5, 512), importance(512)
    kept, kept_h = weight.clone(), h.clone()
    kind = block_type(name)
    together = kind.encode(weight, h)
    assert together.dtype == torch.uint8
    assert together.shape == (5, kind.row_bytes(512))
    assert torch.equal(weight, kept)
    assert torch.equal(h, kept_h)
    for row in range(5):
        assert torch.equal(kind.encode(weight[row : row + 1], h)[0], together[row])


@pytest.mark.parametrize("name", NAMES)
def test_edges(name: str) -> None:
    """Zeros, constants, one outlier, tiny and huge values: finite, and as near as the type allows."""
    kind = block_type(name)

    def coded(row: torch.Tensor, h: torch.Tensor | None = None) -> torch.Tensor:
        found = gguf_decode(name, kind.encode(row[None].contiguous(), h))[0]
        assert found.isfinite().all()
        return found

    assert not coded(torch.zeros(512)).any()
    for constant in (0.37, -0.37, 1e-3, 40000.0, -1e5):
        row = torch.full((256,), constant)
        assert (coded(row) / constant - 1).abs().max() < 0.02
    mixed = torch.cat((torch.zeros(64), normal(1, 192)[0]))
    assert not coded(mixed)[:64].any()
    outlier = normal(1, 256)[0]
    outlier[100] = 30.0
    found = coded(outlier)
    assert abs(found[100] - 30) < 3
    assert (found - outlier).abs().max() < 8
    # below fp16's least number nothing but zeros are left; near it, no more than its steps are lost
    assert not coded(torch.full((256,), 1e-42)).any()
    for tiny in (1e-15, 1e-18, 1e-30):
        beside = torch.cat((normal(1, 4096)[0], normal(1, 512)[0] * tiny))  # nothing is left over from others
        assert not coded(beside)[4096:].any()
    small = normal(1, 256)[0] * 1e-4
    assert (coded(small) - small).abs().max() < 4e-6
    huge = normal(1, 256)[0] * 1e38
    assert coded(huge).sign().eq(huge.sign()).float().mean() > 0.5
    wide = normal(1, 256)[0] * 1e6
    assert error(wide, coded(wide)) < 0.2 * error(wide, 0 * wide)


@pytest.mark.parametrize("name", NAMES)
def test_importance_of_zeros(name: str) -> None:
    """Where nothing is important, the weights are still held; far-apart importances overflow nothing."""
    kind = block_type(name)
    weight = normal(4, 512)
    plain = error(weight, kind.decode(kind.encode(weight)))
    h = importance(512)
    h[64:160] = 0
    found = kind.decode(kind.encode(weight, h))
    part, size = error(weight[:, 64:160], found[:, 64:160]), error(weight, 0 * weight)
    assert part < 0.25 * size
    assert part < 4 * plain
    assert error(weight, kind.decode(kind.encode(weight, torch.zeros(512)))) == pytest.approx(plain, rel=0.05)
    scaled = kind.encode(weight, h * 1e30)
    assert torch.equal(scaled, kind.encode(weight, h * 1e30 / 1024 * 1024))
    assert error(weight, kind.decode(scaled), h) == pytest.approx(error(weight, found, h), rel=0.01)
    h[7] = 1e9 * h.max()
    apart = kind.decode(kind.encode(weight, h))
    assert apart.isfinite().all()
    assert (apart - weight)[:, 7].abs().max() < 0.003


@pytest.mark.parametrize("name", NAMES)
def test_two_threads_at_once(name: str) -> None:
    weight, h = heavy_tailed(64), importance(1024)
    kind = block_type(name)
    expected = kind.encode(weight, h)
    found: list[torch.Tensor] = []
    threads = [threading.Thread(target=lambda: found.append(kind.encode(weight, h))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 2
    assert all(torch.equal(one, expected) for one in found)


def test_what_it_refuses() -> None:
    kind = block_type("q4_k")
    with pytest.raises(SpecError, match="multiple of 256"):
        kind.encode(torch.zeros(2, 96))
    with pytest.raises(SpecError, match="multiple of 256"):
        kind.encode(torch.zeros(256))
    with pytest.raises(SpecError, match="each of 256 inputs"):
        kind.encode(torch.zeros(2, 256), torch.ones(128))
    for bad in (-1.0, float("nan"), float("inf")):
        with pytest.raises(SpecError, match="negative or not finite"):
            kind.encode(torch.zeros(2, 256), torch.full((256,), bad))
    affine = kind.affine
    assert affine is not None
    with pytest.raises(SpecError, match="fit"):
        affine.lines(torch.zeros(2, 8))
    with pytest.raises(SpecError, match="minima"):
        affine.pack(
            torch.zeros(1, 256), KScales(torch.zeros(1, 1).half(), torch.zeros(1, 8, dtype=torch.int8))
        )
