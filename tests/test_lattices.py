"""ggml's IQ2 and IQ3 types: gguf-py's decoder and llama.cpp's own encoder are the oracles."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from benchmarks import ggml
from qexport.errors import SpecError
from qexport.grids.ggml.types import BlockType, block_type
from tests.conftest import shared

gguf = pytest.importorskip("gguf")
pytest.importorskip("numba")

NAMES = ["iq2_xxs", "iq2_xs", "iq2_s", "iq3_xxs", "iq3_s"]
TYPES = [block_type(name) for name in NAMES]
INPUTS = 512


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.02


def heavy(*shape: int, seed: int = 1) -> torch.Tensor:
    """Heavy-tailed, with outliers."""
    return normal(*shape, seed=seed) * normal(*shape, seed=seed + 1).mul(50).exp()


def importance_of(flavour: str, inputs: int = INPUTS) -> torch.Tensor | None:
    if flavour == "none":
        return None
    if flavour == "spiky":
        return normal(inputs, seed=7).mul(100).exp()
    return torch.rand(inputs, generator=torch.Generator().manual_seed(7)) + 0.01


def by_gguf(kind: BlockType, blocks: torch.Tensor) -> torch.Tensor:
    """gguf-py's decoder."""
    number = gguf.GGMLQuantizationType(kind.number)
    return torch.from_numpy(gguf.quants.dequantize(blocks.numpy(), number))


def by_ggml(kind: BlockType, weight: torch.Tensor, importance: torch.Tensor | None) -> torch.Tensor:
    """Blocks by llama.cpp's encoder."""
    pytest.importorskip("xllamacpp")
    return ggml.encode(kind, weight, importance)


def loss(weight: torch.Tensor, decoded: torch.Tensor, importance: torch.Tensor | None = None) -> float:
    squares = (weight.double() - decoded.double()).square()
    return float((squares if importance is None else squares * importance).sum())


def given(kind: BlockType, inputs: int) -> torch.Tensor | None:
    """Importances that weigh nothing, for types that must have some."""
    return torch.ones(inputs) if kind.needs_importance else None


@pytest.mark.parametrize("kind", TYPES, ids=NAMES)
def test_any_bytes_decode_as_gguf_decodes_them(kind: BlockType) -> None:
    generator = torch.Generator().manual_seed(3)
    blocks = torch.randint(0, 256, (7, 5 * kind.size), dtype=torch.uint8, generator=generator)
    before = blocks.clone()
    with np.errstate(all="ignore"):
        decoded, expected = kind.decode(blocks), by_gguf(kind, blocks)
    assert decoded.dtype == torch.float32
    assert decoded.shape == (7, 5 * 256)
    same = decoded.view(torch.int32) == expected.view(torch.int32)
    assert bool((same | (decoded.isnan() & expected.isnan())).all())
    assert torch.equal(blocks, before)


# Parts of the energy of `normal` weights that llama.cpp's encoder loses (xllamacpp 2026.10.11549, measured)
GGML_LOSES = {
    ("iq2_xxs", "random"): 0.10010,
    ("iq2_xxs", "spiky"): 0.04430,
    ("iq2_xs", "random"): 0.07939,
    ("iq2_xs", "spiky"): 0.03112,
    ("iq2_s", "none"): 0.07197,
    ("iq2_s", "random"): 0.05767,
    ("iq2_s", "spiky"): 0.02609,
    ("iq3_xxs", "none"): 0.04592,
    ("iq3_xxs", "random"): 0.02871,
    ("iq3_xxs", "spiky"): 0.01030,
    ("iq3_s", "none"): 0.02687,
    ("iq3_s", "random"): 0.01581,
    ("iq3_s", "spiky"): 0.00800,
}


@pytest.mark.parametrize(("name", "flavour"), GGML_LOSES)
def test_less_weighted_error_than_ggml_is_known_to_have(name: str, flavour: str) -> None:
    kind, weight, importance = block_type(name), normal(8, INPUTS, seed=5), importance_of(flavour)
    before = weight.clone(), importance_of(flavour)
    blocks = kind.encode(weight, importance)
    assert blocks.dtype == torch.uint8
    assert blocks.shape == (8, kind.row_bytes(INPUTS))
    lost = loss(weight, by_gguf(kind, blocks), importance)
    assert lost < 0.94 * GGML_LOSES[name, flavour] * loss(weight, torch.zeros_like(weight), importance)
    assert torch.equal(weight, before[0])
    assert importance is None or (before[1] is not None and torch.equal(importance, before[1]))


def more_than_ggml(kind: BlockType, weight: torch.Tensor, flavour: str) -> float:
    importance = importance_of(flavour, weight.shape[1])
    ours = loss(weight, by_gguf(kind, kind.encode(weight, importance)), importance)
    return ours / loss(weight, by_gguf(kind, by_ggml(kind, weight, importance)), importance)


# one test a type: ggml makes its tables once a process, in up to 3 s
@pytest.mark.parametrize(
    "kind",
    [
        pytest.param(kind, id=kind.name, marks=[pytest.mark.slow] * kind.name.startswith("iq2"))
        for kind in TYPES
    ],
)
def test_less_weighted_error_than_ggml_on_the_same_weights(kind: BlockType) -> None:
    tensors = load_file(shared("models", "captions22m") / "model.safetensors")
    weights = {
        "normal": normal(4, INPUTS),
        "heavy": heavy(8, INPUTS),
        "attention": tensors["model.layers.1.self_attn.q_proj.weight"][:4].float(),
        "MLP": tensors["model.layers.4.mlp.down_proj.weight"][:2].float(),
    }
    flavours = ["random", "spiky"] if kind.needs_importance else ["none", "random", "spiky"]
    ratios = {(at, f): more_than_ggml(kind, weights[at], f) for at in weights for f in flavours}
    assert max(ratios.values()) < 0.97, ratios


@pytest.mark.parametrize("kind", TYPES, ids=NAMES)
def test_decoded_weights_lose_next_to_nothing_when_encoded_again(kind: BlockType) -> None:
    weight = kind.decode(kind.encode(normal(8, INPUTS), importance_of("random")))
    again = kind.decode(kind.encode(weight, importance_of("random")))
    assert loss(weight, again) < 1e-3 * loss(weight, torch.zeros_like(weight))


@pytest.mark.parametrize("kind", TYPES, ids=NAMES)
def test_importance_is_used(kind: BlockType) -> None:
    weight, importance = normal(8, INPUTS), importance_of("spiky")
    with_it = kind.decode(kind.encode(weight, importance))
    without = kind.decode(kind.encode(weight, torch.ones(INPUTS)))
    assert loss(weight, with_it, importance) < 0.8 * loss(weight, without, importance)
    assert loss(weight, without) < loss(weight, with_it)


@pytest.mark.parametrize("kind", TYPES, ids=NAMES)
def test_rows_and_blocks_are_encoded_apart(kind: BlockType) -> None:
    weight, importance = heavy(3, 3 * 256), importance_of("random", 3 * 256)
    assert importance is not None
    whole = kind.encode(weight, importance).reshape(3, 3, kind.size)
    middle = slice(256, 512)
    alone = kind.encode(weight[1:2, middle].contiguous(), importance[middle].contiguous())
    assert torch.equal(whole[1, 1], alone[0])


@pytest.mark.parametrize("kind", TYPES, ids=NAMES)
def test_zeros_stay_zeros_and_their_neighbours_stay_near(kind: BlockType) -> None:
    weight = torch.zeros(2, 512)
    weight[1, 256:] = normal(256)
    weight[1, 256:320] = 0
    decoded = kind.decode(kind.encode(weight, given(kind, 512)))
    assert torch.equal(decoded[0], torch.zeros(512))
    assert torch.equal(decoded[1, :256], torch.zeros(256))
    # no point has a zero: the least of it at the least scale
    assert float(decoded[1, 256:320].abs().max()) < 0.05 * float(weight.abs().max())
    assert loss(weight, decoded) < 0.13 * loss(weight, torch.zeros_like(weight))


@pytest.mark.parametrize("kind", TYPES, ids=NAMES)
@pytest.mark.parametrize("value", [1.0, -3e-3])
def test_constants_are_kept(kind: BlockType, value: float) -> None:
    weight = torch.full((1, 256), value)
    decoded = kind.decode(kind.encode(weight, given(kind, 256)))
    torch.testing.assert_close(decoded, weight, rtol=2e-3, atol=0)


@pytest.mark.parametrize("kind", TYPES, ids=NAMES)
def test_binary_weights_are_kept(kind: BlockType) -> None:
    weight = normal(1, 32, 8).sign()
    weight[..., 7] *= weight.prod(dim=-1)  # an even number of minus signs, which all types can hold
    weight = weight.reshape(1, 256) * 0.02
    decoded = kind.decode(kind.encode(weight, given(kind, 256)))
    torch.testing.assert_close(decoded, weight, rtol=2e-3, atol=0)


# what llama.cpp's encoder loses of a weight of -2 among 255 of 0.01 (xllamacpp 2026.10.11549, measured)
@pytest.mark.parametrize(
    ("name", "most"),
    [("iq2_xxs", 4.28), ("iq2_xs", 2.92), ("iq2_s", 2.73), ("iq3_xxs", 0.87), ("iq3_s", 0.80)],
)
def test_one_large_weight_of_a_block_loses_less_than_by_ggml(name: str, most: float) -> None:
    kind, weight = block_type(name), torch.full((1, 256), 0.01)
    weight[0, 100] = -2.0
    decoded = kind.decode(kind.encode(weight, given(kind, 256)))
    assert float(decoded[0, 100]) < -0.9
    assert loss(weight, decoded) < 0.6 * most


@pytest.mark.parametrize("kind", TYPES, ids=NAMES)
def test_an_even_number_of_minus_signs_where_the_type_wants_it(kind: BlockType) -> None:
    # an octet with one minus sign, at its least important weight: that one is turned where signs are even
    weight = torch.full((1, 256), 0.5)
    weight[0, ::8] = -0.1
    importance = torch.ones(256)
    importance[::8] = 0.01
    decoded = kind.decode(kind.encode(weight, importance))
    minus = (decoded < 0).reshape(32, 8)
    if kind.name in ("iq2_s", "iq3_s"):
        assert torch.equal(minus, (weight < 0).reshape(32, 8))
    else:
        assert not bool(minus.any())


@pytest.mark.parametrize("kind", TYPES, ids=NAMES)
def test_scales_beyond_fp16_are_its_largest_number(kind: BlockType) -> None:
    weight = normal(2, 256)
    weight[0] *= 1e9
    weight[1, 3] = 3e38
    decoded = kind.decode(kind.encode(weight, given(kind, 256)))
    assert bool(decoded.isfinite().all())
    assert float(decoded[1, 3]) > 1e5
    assert float(decoded[0].abs().max()) > 1e5


@pytest.mark.parametrize("kind", TYPES, ids=NAMES)
@pytest.mark.parametrize("size", [1e-44, 1e-20, 1e-9])
def test_scales_below_fp16_give_zeros(kind: BlockType, size: float) -> None:
    weight = torch.full((1, 256), size)
    weight[0, ::3] *= -1
    decoded = kind.decode(kind.encode(weight, given(kind, 256)))
    assert torch.equal(decoded.abs(), torch.zeros(1, 256))


@pytest.mark.parametrize("kind", TYPES, ids=NAMES)
def test_weights_without_importance_stay_near(kind: BlockType) -> None:
    weight = normal(4, 512)
    importance = torch.ones(512)
    importance[64:96] = 0
    importance[256:] = 0
    decoded = kind.decode(kind.encode(weight, importance))
    for part in (slice(64, 96), slice(256, 512)):
        assert loss(weight[:, part], decoded[:, part]) < 0.15 * float(weight[:, part].square().sum())


@pytest.mark.parametrize("kind", TYPES, ids=NAMES)
def test_what_is_no_number_makes_no_harm(kind: BlockType) -> None:
    weight = normal(3, 256)
    weight[0, 7], weight[1, 9], weight[1, 70] = torch.nan, torch.inf, -torch.inf
    importance = torch.ones(256)
    blocks = kind.encode(weight, importance)
    assert blocks.shape == (3, kind.size)
    assert torch.equal(blocks[2:], kind.encode(weight[2:], importance))
    importance[3], importance[90] = torch.nan, torch.inf
    assert kind.encode(weight, importance).shape == (3, kind.size)


@pytest.mark.parametrize("kind", TYPES, ids=NAMES)
def test_no_rows(kind: BlockType) -> None:
    blocks = kind.encode(torch.empty(0, 512), torch.ones(512))
    assert len(blocks) == 0
    assert kind.decode(torch.empty(0, 2 * kind.size, dtype=torch.uint8)).shape == (0, 512)


@pytest.mark.parametrize("kind", TYPES, ids=NAMES)
def test_misfits_are_refused(kind: BlockType) -> None:
    with pytest.raises(SpecError, match="256"):
        kind.encode(torch.zeros(2, 300), torch.ones(300))
    with pytest.raises(SpecError, match="256"):
        kind.encode(torch.zeros(256), torch.ones(256))
    with pytest.raises(SpecError, match="512"):
        kind.encode(torch.zeros(2, 512), torch.ones(256))
    with pytest.raises(SpecError, match=str(kind.size)):
        kind.decode(torch.zeros(2, kind.size + 1, dtype=torch.uint8))


@pytest.mark.parametrize("kind", TYPES, ids=NAMES)
def test_types_that_need_importance_say_so(kind: BlockType) -> None:
    if kind.needs_importance:
        with pytest.raises(SpecError, match="importance"):
            kind.encode(torch.zeros(1, 256))
    else:
        assert kind.encode(torch.zeros(1, 256)).shape == (1, kind.size)
    assert kind.affine is None
