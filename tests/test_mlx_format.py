"""MLX's layout: mlx itself makes and reads the same numbers, and mlx_lm runs the models."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import qexport
from qexport.errors import CorruptFileError, SpecError, UnsupportedModelError
from qexport.formats import mlx
from qexport.formats.format import Facts, Wish
from qexport.formats.mlx_names import place_of
from qexport.grids.grid import encode
from qexport.grids.integer import IntegerCodes, IntegerGrid, Zero
from tests.encoded import Written, require_decoded, write_encoded
from tests.tiny import edit_json, edit_weights, in_transformers, logits, tiny_model, tokens
from tests.zoo import zoo_model

Q_PROJ = "model.layers.0.self_attn.q_proj"
KINDS: Sequence[Zero] = ("middle", "bias")
DTYPES = [torch.float16, torch.bfloat16, torch.float32]


def to_mlx(tensor: torch.Tensor) -> Any:
    """The tensor in mlx, bit by bit."""
    mx = pytest.importorskip("mlx.core")
    if tensor.dtype == torch.bfloat16:
        return mx.array(tensor.float().numpy()).astype(mx.bfloat16)
    return mx.array(tensor.numpy())


def from_mlx(array: Any) -> torch.Tensor:
    """The values of an mlx array, as fp32."""
    import numpy as np

    mx = pytest.importorskip("mlx.core")
    return torch.from_numpy(np.array(array.astype(mx.float32)))


@pytest.mark.parametrize("zero", KINDS)
@pytest.mark.parametrize("bits", mlx.BITS)
@pytest.mark.parametrize("group", mlx.GROUP_SIZES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_mlx_decodes_what_we_write(zero: Zero, bits: int, group: int, dtype: torch.dtype) -> None:
    mx = pytest.importorskip("mlx.core")
    grid = IntegerGrid(bits, group, zero, dtype)
    weight = torch.randn(6, 2 * group, generator=torch.Generator().manual_seed(bits))
    codes = encode(grid, weight, grid.fit(weight))
    made = mlx.encode("m", codes, grid)
    words, scales, biases = (to_mlx(made[f"m.{part}"]) for part in ("weight", "scales", "biases"))
    theirs = from_mlx(mx.dequantize(words, scales, biases, group, bits))
    # mlx computes in the scales' dtype; nothing else may differ
    reach = 2 * grid.decode(codes).abs().max() * torch.finfo(dtype).eps
    torch.testing.assert_close(theirs, grid.decode(codes), rtol=0, atol=float(reach))
    in_dtype = codes.codes.to(dtype) * made["m.scales"].repeat_interleave(group, 1).to(dtype)
    exact = in_dtype + made["m.biases"].repeat_interleave(group, 1)
    if dtype == torch.float32:
        torch.testing.assert_close(theirs, exact.float(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("bits", mlx.BITS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_we_decode_what_mlx_writes(tmp_path: Path, llama: Path, bits: int, dtype: torch.dtype) -> None:
    mx = pytest.importorskip("mlx.core")
    weight = to_mlx(torch.randn(8, 192, generator=torch.Generator().manual_seed(bits)).to(dtype))
    words, scales, biases = mx.quantize(weight, 64, bits)
    write_encoded(llama, tmp_path / "out", mlx, IntegerGrid(bits, 64, "bias"))
    mx.save_safetensors(
        str(tmp_path / "out" / "model.safetensors"),
        {"m.weight": words, "m.scales": scales, "m.biases": biases},
    )
    opened = qexport.open_checkpoint(tmp_path / "out")
    assert (opened.info("m.weight").dtype, opened.info("m.weight").shape) == (dtype, (8, 192))
    expected = from_mlx(mx.dequantize(words, scales.astype(mx.float32), biases.astype(mx.float32), 64, bits))
    torch.testing.assert_close(opened.read("m.weight"), expected, rtol=1e-6, atol=1e-6)


def test_words_by_hand() -> None:
    """Three bits straddle words: code 10 lies in the last two bits of one and the first of the next."""
    grid = IntegerGrid(3, 32, "bias")
    values = torch.zeros(1, 32, dtype=torch.uint8)
    values[0, :3] = torch.tensor([1, 2, 3])
    values[0, 10] = 7
    codes = IntegerCodes(values, torch.ones(1, 1).half(), torch.zeros(1, 1).half())
    words = mlx.encode("m", codes, grid)["m.weight"]
    assert words.tolist() == [[0b011_010_001 | 0b11 << 30, 1, 0]]


def test_a_symmetric_grid_keeps_its_values() -> None:
    grid = IntegerGrid(4, 32, "middle", torch.bfloat16)
    weight = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
    codes = encode(grid, weight, grid.fit(weight))
    biases = mlx.encode("m", codes, grid)["m.biases"]
    assert torch.equal(biases.float(), -8 * codes.scales.float())
    as_bias = IntegerGrid(4, 32, "bias", torch.bfloat16)
    assert torch.equal(as_bias.decode(IntegerCodes(codes.codes, codes.scales, biases)), grid.decode(codes))


def mlx_logits(path: Path, rows: torch.Tensor) -> torch.Tensor:
    """mlx_lm's logits of a checkpoint; it refuses missing and unexpected tensors itself."""
    utils = pytest.importorskip("mlx_lm.utils")
    mx = pytest.importorskip("mlx.core")
    model, _ = utils.load_model(path)
    return from_mlx(model(mx.array(rows.numpy())))


def reference_logits(source: Path, written: Written, rows: torch.Tensor) -> torch.Tensor:
    model = in_transformers(source, dtype=torch.float32)
    for name, weight in written.weights.items():
        # what GPT-NeoX calls its head on disk
        model.get_parameter(name.replace("embed_out.", "lm_head.")).data = weight
    model.tie_weights()
    return logits(model, rows)


@pytest.mark.parametrize("tied", [True, False])
def test_mlx_lm_runs_what_we_write(tmp_path: Path, tied: bool) -> None:
    """Embeddings, head and three grids; one layer left. All fp32, so that only the codes can differ."""
    source = tiny_model(tmp_path / "full", tied=tied, dtype=torch.float32)
    written = write_encoded(
        source,
        tmp_path / "out",
        mlx,
        IntegerGrid(4, 64, "bias", torch.float32),
        others={
            r"layers\.1.*down_proj": IntegerGrid(3, 32, "bias", torch.float32),
            "k_proj|embed": IntegerGrid(8, 128, "middle", torch.float32),
        },
        left=["model.layers.1.self_attn.o_proj"],
        more=["model.embed_tokens"] if tied else ["model.embed_tokens", "lm_head"],
    )
    require_decoded(source, written)
    found = mlx_logits(written.path, tokens())
    torch.testing.assert_close(found, reference_logits(source, written, tokens()), rtol=1e-3, atol=1e-3)


ROWS: list[tuple[str, dict[str, Any], list[str]]] = [
    (
        "gpt2",
        {"tied": True, "n_embd": 128, "n_layer": 2, "n_head": 4, "n_positions": 128},
        ["transformer.wte"],
    ),
    (
        "gpt_neox",
        {"tied": False, "hidden_act": "gelu_pytorch_tanh", "intermediate_size": 512},
        ["gpt_neox.embed_in", "embed_out"],
    ),
    ("qwen2", {"tied": True}, []),
    ("qwen3", {"tied": False, "head_dim": 32}, ["lm_head"]),
    ("gemma", {"tied": True, "head_dim": 32}, ["model.embed_tokens"]),
    ("phi3", {"tied": False}, []),
]


@pytest.mark.slow
@pytest.mark.parametrize(("model_type", "options", "more"), ROWS, ids=[row[0] for row in ROWS])
def test_mlx_lm_runs_other_architectures(
    tmp_path: Path, model_type: str, options: dict[str, Any], more: list[str]
) -> None:
    source = zoo_model(tmp_path / "full", model_type, dtype=torch.float32, **options)
    names = list(load_file(source / "model.safetensors"))
    last = next(
        name for name in reversed(names) if name.endswith(("c_fc.weight", "dense.weight", "o_proj.weight"))
    )
    grid = IntegerGrid(4, 32, "bias", torch.float32)
    others = {"c_attn|dense_h_to_4h|down_proj": IntegerGrid(6, 64, "bias", torch.float32)}
    left = [last.removesuffix(".weight")]
    written = write_encoded(source, tmp_path / "out", mlx, grid, others=others, left=left, more=more)
    require_decoded(source, written)
    found = mlx_logits(written.path, tokens())
    torch.testing.assert_close(found, reference_logits(source, written, tokens()), rtol=1e-2, atol=1e-2)


def test_openais_own_names_of_gpt2(tmp_path: Path) -> None:
    """Without a prefix, and with buffers that MLX does not know."""
    options = {"tied": True, "n_embd": 128, "n_layer": 2, "n_head": 4, "n_positions": 128}
    source = zoo_model(tmp_path / "full", "gpt2", dtype=torch.float32, **options)
    tensors = load_file(source / "model.safetensors")
    bare = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    for index in range(2):
        bare[f"h.{index}.attn.bias"] = torch.ones(1, 1, 128, 128).tril()
        bare[f"h.{index}.attn.masked_bias"] = torch.tensor(-1e4)
    (tmp_path / "bare").mkdir()
    for file in source.iterdir():
        (tmp_path / "bare" / file.name).write_bytes(file.read_bytes())
    save_file(bare, tmp_path / "bare" / "model.safetensors", metadata={"format": "pt"})
    grid = IntegerGrid(4, 32, "bias", torch.float32)
    written = write_encoded(tmp_path / "bare", tmp_path / "out", mlx, grid, left=["h.1.mlp.c_proj"])
    assert set(written.open().names()) == set(tensors)
    renamed = {f"transformer.{name}": weight for name, weight in written.weights.items()}
    expected = reference_logits(source, Written(written.path, renamed), tokens())
    torch.testing.assert_close(mlx_logits(written.path, tokens()), expected, rtol=2e-3, atol=2e-3)


MIXTURES: list[tuple[str, dict[str, Any], str]] = [
    ("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}, "block_sparse_moe.switch_mlp.gate_proj"),
    (
        "qwen3_moe",
        {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 128, "head_dim": 32}
        | {"decoder_sparse_step": 1, "norm_topk_prob": True, "mlp_only_layers": []},
        "mlp.switch_mlp.gate_proj",
    ),
]


@pytest.mark.slow
@pytest.mark.parametrize(("model_type", "options", "stack"), MIXTURES, ids=[row[0] for row in MIXTURES])
@pytest.mark.parametrize("left", [False, True])
def test_mlx_lm_runs_stacked_experts(
    tmp_path: Path, model_type: str, options: dict[str, Any], stack: str, left: bool
) -> None:
    """Packed, and plain in one layer; experts of a layer lie in two files."""
    source = tiny_model(tmp_path / "full", model_type=model_type, tied=False, dtype=torch.float32, **options)
    names = [name.removesuffix(".weight") for name in load_file(source / "model.safetensors")]
    plain = [name for name in names if "layers.1." in name and ".experts." in name] if left else []
    written = write_encoded(
        source,
        tmp_path / "out",
        mlx,
        IntegerGrid(4, 32, "bias", torch.float32),
        others={r"layers\.0.*experts": IntegerGrid(8, 64, "bias", torch.float32)},
        left=plain,
        split=lambda name: ".experts.2." in name or ".experts.3." in name or "layers.1." in name,
    )
    require_decoded(source, written)
    config = json.loads((written.path / "config.json").read_text())
    assert config["quantization"][f"model.layers.0.{stack}"] == {"group_size": 64, "bits": 8}
    assert config["quantization"] == config["quantization_config"]
    found = mlx_logits(written.path, tokens())
    model = in_transformers(source, dtype=torch.float32)
    full = qexport.open_checkpoint(source)
    # transformers fuses experts: what it gets is a checkpoint of the decoded weights
    decoded = {name: written.weights.get(name, full.read(name)).contiguous() for name in full.names()}
    del model
    save_file(decoded, source / "model.safetensors", metadata={"format": "pt"})
    expected = logits(in_transformers(source, dtype=torch.float32), tokens())
    torch.testing.assert_close(found, expected, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize(
    ("model_type", "rope", "expected"),
    [
        ("llama", {"rope_type": "default", "rope_theta": 5e5}, {"rope_theta": 5e5}),
        (
            "llama",
            {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0},
            {"rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", "factor": 8.0}},
        ),
        (
            "gpt_neox",
            {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
            {"rope_theta": 1e4, "rotary_emb_base": 1e4, "partial_rotary_factor": 0.5, "rotary_pct": 0.5},
        ),
        (
            "gemma3_text",
            {"full_attention": {"rope_theta": 1e6}, "sliding_attention": {"rope_theta": 1e4}},
            {"rope_theta": 1e6, "rope_local_base_freq": 1e4},
        ),
        ("llama", None, {}),
    ],
)
def test_settings_that_transformers_5_renamed(
    model_type: str, rope: dict[str, Any] | None, expected: dict[str, Any]
) -> None:
    assert mlx.older_settings({"model_type": model_type, "rope_parameters": rope}) == expected


@pytest.mark.parametrize("kind", ["default", "llama3"])
def test_rotary_settings_that_mlx_lm_would_pass_over(tmp_path: Path, kind: str) -> None:
    rope: dict[str, Any] = {"rope_type": kind, "rope_theta": 30.0}
    if kind == "llama3":
        rope |= {"factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
        rope |= {"original_max_position_embeddings": 16}
    source = tiny_model(tmp_path / "full", dtype=torch.float32, rope_parameters=rope)
    assert "rope_theta" not in json.loads((source / "config.json").read_text())
    written = write_encoded(source, tmp_path / "out", mlx, IntegerGrid(8, 64, "bias", torch.float32))
    found = mlx_logits(written.path, tokens())
    torch.testing.assert_close(found, reference_logits(source, written, tokens()), rtol=1e-3, atol=1e-3)
    require_decoded(source, written)


def test_experts_of_a_layer_must_be_alike() -> None:
    grid, other = IntegerGrid(4, 64, "bias"), IntegerGrid(8, 64, "bias")
    stem = "model.layers.0.mlp.experts"
    for grids, left in (({"0": grid, "1": other}, []), ({"0": grid}, [f"{stem}.1.up_proj"])):
        facts = Facts(
            {f"{stem}.{n}.up_proj": g for n, g in grids.items()}, left, grid, torch.float16, "qwen3_moe"
        )
        with pytest.raises(SpecError, match=r"switch_mlp\.up_proj differ"):
            mlx.config_entries(facts)


def test_the_config_is_mlx_lms() -> None:
    grid, other = IntegerGrid(4, 64, "bias"), IntegerGrid(8, 32, "bias")
    facts = Facts({"a": grid, "b": other}, ["c"], grid, torch.float16, "llama")
    expected = {"group_size": 64, "bits": 4, "mode": "affine", "b": {"group_size": 32, "bits": 8}}
    assert mlx.config_entries(facts) == {"quantization": expected, "quantization_config": expected}
    assert mlx.extra_files({}) == {}


@pytest.mark.parametrize(
    ("model_type", "module", "path"),
    [
        ("gpt2", "transformer.h.0.attn.c_attn", "model.h.0.attn.c_attn"),
        ("gpt2", "h.0.attn.c_attn", "model.h.0.attn.c_attn"),
        ("gpt_bigcode", "transformer.h.0.attn.c_attn", "transformer.h.0.attn.c_attn"),
        ("gpt_neox", "gpt_neox.layers.3.mlp.dense", "model.h.3.mlp.dense"),
        ("gpt_neox", "embed_out", "model.embed_out"),
        ("gpt_neox", "gpt_neox.final_layer_norm", "model.final_layer_norm"),
        ("mixtral", "model.layers.0.block_sparse_moe.gate", "model.layers.0.block_sparse_moe.gate"),
        ("llama", "model.layers.0.mlp.experts.0.up_proj", "model.layers.0.mlp.experts.0.up_proj"),
    ],
)
def test_names(model_type: str, module: str, path: str) -> None:
    assert place_of(module, model_type).path == path


@pytest.mark.parametrize(
    ("wish", "expected"),
    [
        (Wish(4), IntegerGrid(4, 64, "bias")),
        (Wish(3, 32, False, torch.bfloat16), IntegerGrid(3, 32, "bias", torch.bfloat16)),
        (Wish(8, 128, True), IntegerGrid(8, 128, "middle")),
    ],
)
def test_grids(wish: Wish, expected: IntegerGrid) -> None:
    assert mlx.grid_for(wish) == expected


@pytest.mark.parametrize(
    ("wish", "match"),
    [(Wish(7), "7 bits"), (Wish(1), "1 bits"), (Wish(4, 16), "of 16"), (Wish(4, -1), "of -1")],
)
def test_impossible_grids(wish: Wish, match: str) -> None:
    with pytest.raises(SpecError, match=match):
        mlx.grid_for(wish)


def test_obstacles() -> None:
    assert mlx.obstacle((3, 64), IntegerGrid(3, 64, "bias")) is None
    assert "whole number of groups" in str(mlx.obstacle((3, 96), IntegerGrid(3, 64, "bias")))


@pytest.fixture
def written(llama: Path, tmp_path: Path) -> Written:
    return write_encoded(
        llama, tmp_path / "out", mlx, IntegerGrid(4, 32, "bias"), more=["model.embed_tokens"]
    )


@pytest.mark.parametrize("key", ["quantization", "quantization_config"])
def test_either_key_of_the_config_will_do(llama: Path, written: Written, key: str) -> None:
    edit_json(written.path / "config.json", **{key: None})
    require_decoded(llama, written)
    assert written.open().quantization is not None


def test_the_head_of_tied_embeddings(written: Written) -> None:
    opened = written.open()
    assert torch.equal(opened.read("lm_head.weight"), written.weights["model.embed_tokens.weight"])


@pytest.mark.parametrize(
    ("part", "tensor", "match"),
    [
        ("scales", None, "is packed and has no scales"),
        ("biases", None, "has no biases"),
        ("weight", None, "but no weight"),
        ("weight", torch.zeros(128, 16), "weight is torch.float32"),
        ("weight", torch.zeros(128, 15, dtype=torch.uint32), "do not fit together"),
        ("weight", torch.zeros(64, 16, dtype=torch.uint32), "do not fit together"),
        ("scales", torch.ones(128, 8), "do not fit together"),
        ("scales", torch.ones(128, 4, dtype=torch.uint8), "scales is torch.uint8"),
        ("scales", torch.ones(0, 4), r"\[0, 4\]"),
        ("biases", torch.ones(128, 4), "do not fit together"),
        ("biases", torch.ones(128, 3).half(), "do not fit together"),
    ],
)
def test_damaged_layers_are_told(
    written: Written, part: str, tensor: torch.Tensor | None, match: str
) -> None:
    edit_weights(written.path, **{f"{Q_PROJ}.{part}": tensor})
    opened = qexport.open_checkpoint(written.path)
    with pytest.raises(CorruptFileError, match=match):
        list(opened.names())


@pytest.mark.parametrize(
    ("tensor", "match"),
    [(torch.zeros(9999, 1, 1), "a stack of 1 to 4096"), (torch.zeros(0, 4, 4), "a stack of 1")],
)
def test_impossible_stacks_are_told(written: Written, tensor: torch.Tensor, match: str) -> None:
    edit_weights(written.path, **{"model.layers.0.mlp.switch_mlp.up_proj.weight": tensor})
    with pytest.raises(CorruptFileError, match=match):
        list(qexport.open_checkpoint(written.path).names())


def test_a_name_that_two_tensors_have(written: Written) -> None:
    edit_weights(
        written.path,
        **{
            "model.layers.0.mlp.switch_mlp.up_proj.bias": torch.zeros(2, 4),
            "model.layers.0.mlp.experts.1.up_proj.bias": torch.zeros(4),
        },
    )
    with pytest.raises(CorruptFileError, match="two tensors are"):
        list(qexport.open_checkpoint(written.path).names())


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"mode": "mxfp4"}, "mode 'mxfp4'"),
        ({"bits": 7}, "of 7 bits"),
        ({"bits": "4"}, "'4'"),
        ({"group_size": 16}, "groups of 16"),
        ({"group_size": True}, "True"),
    ],
)
def test_other_forms_are_refused(written: Written, changes: dict[str, Any], match: str) -> None:
    config = {"group_size": 32, "bits": 4, "mode": "affine", **changes}
    edit_json(written.path / "config.json", quantization_config=config, quantization=config)
    with pytest.raises(UnsupportedModelError, match=match):
        qexport.open_checkpoint(written.path)


def test_a_layer_in_another_mode_is_refused(written: Written) -> None:
    config = {"group_size": 32, "bits": 4, Q_PROJ: {"group_size": 32, "bits": 4, "mode": "mxfp4"}}
    edit_json(written.path / "config.json", quantization_config=config, quantization=config)
    with pytest.raises(UnsupportedModelError, match=f"'mxfp4' .{Q_PROJ}"):
        list(qexport.open_checkpoint(written.path).names())
