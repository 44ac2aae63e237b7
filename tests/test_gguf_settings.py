"""config.json in GGUF's words: old forms and new, what llama.cpp cannot do, and the `general.` settings."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from qexport.errors import CorruptFileError, NotACheckpointError, UnsupportedModelError
from qexport.formats.gguf.container import Metadata
from qexport.formats.gguf.general import file_stem, general
from qexport.formats.gguf.naming import short
from qexport.formats.gguf.rope import FREQS, rope_config
from qexport.formats.gguf.rows import BY_TYPE
from qexport.formats.gguf.settings import computed_tensors, config_of, remarks, settings

pytest.importorskip("gguf")

SIZES = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "vocab_size": 320,
    "pad_token_id": None,
}
GEMMA = {"head_dim": 32, "query_pre_attn_scalar": 32, "num_hidden_layers": 6}


def config(model_type: str, **options: Any) -> dict[str, Any]:
    return {"model_type": model_type, **SIZES, **options}


def plain(metadata: Metadata) -> dict[str, Any]:
    return {key: typed.value for key, typed in metadata.items()}


def test_the_settings_of_a_llama() -> None:
    """Keys and kinds as llama.cpp's converter writes them."""
    found = settings(config("llama", rms_norm_eps=1e-6, rope_theta=500000.0))
    assert {key: (typed.kind, typed.value) for key, typed in found.items()} == {
        "llama.context_length": ("u32", 4096),
        "llama.embedding_length": ("u32", 128),
        "llama.block_count": ("u32", 2),
        "llama.feed_forward_length": ("u32", 256),
        "llama.attention.head_count": ("u32", 4),
        "llama.attention.head_count_kv": ("u32", 2),
        "llama.attention.layer_norm_rms_epsilon": ("f32", 1e-6),
        "llama.vocab_size": ("u32", 320),
        "llama.attention.key_length": ("u32", 32),
        "llama.attention.value_length": ("u32", 32),
        "llama.rope.dimension_count": ("u32", 32),
        "llama.rope.freq_base": ("f32", 500000.0),
    }


YARN = {"factor": 4.0, "original_max_position_embeddings": 1024}
FACTORS = {"short_factor": [1.0] * 16, "long_factor": [2.0] * 16}


@pytest.mark.parametrize(
    ("model_type", "old", "new"),
    [
        (
            "llama",
            {"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2.0}},
            {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 5e5}},
        ),
        (
            "qwen2",
            {"rope_theta": 1e6, "rope_scaling": {"type": "yarn", **YARN}},
            {"rope_parameters": {"rope_type": "yarn", **YARN, "rope_theta": 1e6}},
        ),
        (
            "phi3",
            {"original_max_position_embeddings": 1024, "rope_scaling": {"type": "longrope", **FACTORS}},
            {
                "original_max_position_embeddings": 1024,
                "rope_parameters": {"rope_type": "longrope", **FACTORS, "rope_theta": 1e4},
            },
        ),
        (
            "gemma3_text",
            {
                **GEMMA,
                "sliding_window_pattern": 3,
                "rope_theta": 1e6,
                "rope_local_base_freq": 5e3,
                "rope_scaling": {"rope_type": "linear", "factor": 8.0},
            },
            {
                **GEMMA,
                "layer_types": ["sliding_attention", "sliding_attention", "full_attention"] * 2,
                "rope_parameters": {
                    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                    "sliding_attention": {"rope_type": "default", "rope_theta": 5e3},
                },
            },
        ),
        (
            "gemma",
            {"hidden_act": "gelu", "head_dim": 32},
            {"hidden_act": "gelu_pytorch_tanh", "head_dim": 32},
        ),
        ("gpt2", {"n_inner": 256}, {"n_inner": 256}),
        ("mixtral", {"num_local_experts": 4}, {"num_local_experts": 4, "rope_theta": 1e6}),
    ],
)
def test_old_forms_of_a_config(model_type: str, old: dict[str, Any], new: dict[str, Any]) -> None:
    assert settings(config(model_type, **old)) == settings(config(model_type, **new))
    given, other = (computed_tensors(config(model_type, **options)) for options in (old, new))
    assert {name: value.tolist() for name, value in given.items()} == {
        name: value.tolist() for name, value in other.items()
    }


def test_particular_settings() -> None:
    gemma3 = plain(settings(config("gemma3_text", **GEMMA, sliding_window_pattern=3, sliding_window=512)))
    assert gemma3["gemma3.attention.sliding_window"] == 512
    assert gemma3["gemma3.attention.sliding_window_pattern"] == 3
    assert gemma3["gemma3.rope.freq_base_swa"] == 10000.0
    gemma2 = plain(settings(config("gemma2", **GEMMA)))
    assert gemma2["gemma2.attn_logit_softcapping"] == 50.0
    assert "gemma2.attention.sliding_window_pattern" not in gemma2
    yarn = {"rope_type": "yarn", **YARN, "rope_theta": 1e4}
    plainly = plain(settings(config("qwen3", head_dim=32, rope_parameters=yarn)))
    assert plainly["qwen3.rope.scaling.type"] == "yarn"
    assert plainly["qwen3.rope.scaling.original_context_length"] == 1024
    assert "qwen3.rope.scaling.attn_factor" not in plainly
    scaled = plain(settings(config("qwen3", head_dim=32, rope_parameters={**yarn, "attention_factor": 1.0})))
    # llama.cpp multiplies by 0.1 ln 4 + 1 on its own
    assert scaled["qwen3.rope.scaling.attn_factor"] == pytest.approx(1 / 1.1386294)
    moe = config("qwen3_moe", num_experts=8, num_experts_per_tok=2, moe_intermediate_size=96)
    experts = plain(settings({**moe, "norm_topk_prob": True}))
    assert experts["qwen3moe.expert_count"] == 8
    assert experts["qwen3moe.expert_used_count"] == 2
    assert experts["qwen3moe.expert_feed_forward_length"] == 96
    assert plain(settings(config("gpt2", n_inner=None)))["gpt2.feed_forward_length"] == 512
    wide = {**GEMMA, "num_hidden_layers": 46, "hidden_size": 256, "query_pre_attn_scalar": 64}
    settings(config("gemma2", **wide))  # as Gemma 2 27B, which llama.cpp knows by its 46 blocks


@pytest.mark.parametrize(
    ("model_type", "options", "match"),
    [
        ("llama", {"hidden_act": "relu"}, "hidden_act = 'relu' in a llama model .*as for 'silu'"),
        ("llama", {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "RoPE scaling 'dynamic' .*llama3"),
        ("qwen2", {"head_dim": 64}, "head_dim = 64"),
        ("qwen3", {"attention_bias": True}, "attention_bias = True"),
        ("qwen3_moe", {"norm_topk_prob": False}, "norm_topk_prob = False"),
        ("qwen3_moe", {"norm_topk_prob": True, "mlp_only_layers": [0]}, r"mlp_only_layers = \[0\]"),
        ("qwen3_moe", {"norm_topk_prob": True, "decoder_sparse_step": 2}, "decoder_sparse_step = 2"),
        ("gemma2", {**GEMMA, "query_pre_attn_scalar": 64}, "query_pre_attn_scalar = 64 .*as for 32"),
        ("gemma2", {**GEMMA, "attn_logit_softcapping": None}, "attn_logit_softcapping = None .*by 50"),
        ("gemma2", {**GEMMA, "hidden_activation": "silu"}, "hidden_activation = 'silu'"),
        ("gemma2", {**GEMMA, "layer_types": ["sliding_attention"] * 6}, "layer_types = .*full_attention in"),
        (
            "gemma2",
            {**GEMMA, "layer_types": ["full_attention"] + ["sliding_attention"] * 5},
            "layer_types = .*full_attention in",
        ),
        ("gemma3_text", {**GEMMA, "use_bidirectional_attention": True}, "use_bidirectional_attention = True"),
        ("gemma3_text", {**GEMMA, "attn_logit_softcapping": 50.0}, "attn_logit_softcapping = 50.0"),
        ("gpt2", {"activation_function": "relu"}, "activation_function = 'relu'"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx = True"),
        ("gpt_neox", {"attention_bias": False}, "attention_bias = False"),
        ("llama", {"rope_scaling": {"type": "yarn", **YARN, "beta_slow": 2.0}}, "beta_slow = 2.0"),
        ("llama", {"rope_scaling": {"type": "yarn", **YARN, "truncate": False}}, "truncate = False"),
        ("qwen2", {"rope_scaling": {"type": "longrope", **FACTORS}}, "'longrope' in a qwen2"),
        ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor of 0.5"),
        ("bloom", {}, "'bloom' cannot be written as GGUF so far; one of llama"),
        (None, {}, "type None cannot"),
    ],
)
def test_what_llama_cpp_cannot_do_is_refused_by_name(
    model_type: str, options: dict[str, Any], match: str
) -> None:
    with pytest.raises(UnsupportedModelError, match=match):
        settings(config(model_type, **options))


def test_a_broken_config() -> None:
    with pytest.raises(NotACheckpointError, match=r"config.json describes no llama model"):
        settings(config("llama", hidden_size="many"))
    with pytest.raises(NotACheckpointError, match=r"max_position_embeddings is 0"):
        settings(config("llama", max_position_embeddings=0))


def test_remarks_tell_what_llama_cpp_passes_over() -> None:
    assert remarks(config("llama")) == []
    assert remarks(config("mistral", sliding_window=None)) == []
    assert remarks(config("mistral", sliding_window=4096)) == []
    (told,) = remarks(config("mistral", sliding_window=1024))
    assert "no sliding window in mistral: past 1024 tokens" in told
    assert remarks(config("qwen2", sliding_window=1024, use_sliding_window=False)) == []
    assert remarks(config("gemma2", **GEMMA, sliding_window=1024)) == []
    assert "GELU by tanh" in remarks(config("gpt_neox", hidden_act="gelu"))[0]


LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
PUBLISHED = [
    {**LLAMA3, "rope_theta": 5e5, "original_max_position_embeddings": 8192},  # Llama 3.1
    {**LLAMA3, "factor": 32.0, "rope_theta": 5e5, "original_max_position_embeddings": 8192},  # 3.2
    {**LLAMA3, "high_freq_factor": 3.5, "rope_theta": 1e4, "original_max_position_embeddings": 1000},
]


@pytest.mark.parametrize("parameters", PUBLISHED)
@pytest.mark.parametrize("size", [64, 128])
def test_llama3s_divisors_are_transformers(parameters: dict[str, Any], size: int) -> None:
    asked = config("llama", head_dim=size, rope_parameters=dict(parameters))
    (factors,) = computed_tensors(asked).values()
    told: Any = LlamaConfig.from_dict(asked)
    scaled, attention = ROPE_INIT_FUNCTIONS["llama3"](told, "cpu")
    usual = 1.0 / parameters["rope_theta"] ** (torch.arange(0, size, 2).float() / size)
    assert attention == 1.0
    torch.testing.assert_close(usual / factors, scaled, rtol=1e-5, atol=0)
    # and back, from the divisors alone
    metadata = plain(settings(asked))
    found = rope_config(metadata, BY_TYPE["llama"], size, {FREQS: factors})["rope_parameters"]
    assert found == parameters


def test_divisors_that_are_not_llama3s_come_back_as_longrope() -> None:
    odd = torch.tensor([1.0, 1.5, 1.2, 3.0])
    metadata = {"llama.rope.freq_base": 10000.0, "llama.context_length": 64}
    found = rope_config(metadata, BY_TYPE["llama"], 8, {FREQS: odd})["rope_parameters"]
    assert found["rope_type"] == "longrope"
    assert found["short_factor"] == found["long_factor"] == odd.tolist()
    assert found["attention_factor"] == 1.0


FILE = {
    "general.architecture": "llama",
    "llama.context_length": 64,
    "llama.embedding_length": 128,
    "llama.block_count": 1,
    "llama.feed_forward_length": 256,
    "llama.attention.head_count": 4,
}
SHAPES: dict[str, tuple[int, ...]] = {"token_embd.weight": (320, 128)}


@pytest.mark.parametrize(
    ("changes", "shapes", "match"),
    [
        ({"llama.block_count": None}, SHAPES, "llama.block_count is None, expected a whole number"),
        ({"llama.block_count": 1 << 40}, SHAPES, "1099511627776 blocks and holds 1 tensors"),
        ({"llama.attention.head_count": [4, 4]}, SHAPES, r"head_count is \[4, 4\]"),
        ({"llama.attention.head_count": 0}, SHAPES, "claims 0 heads"),
        ({"llama.attention.head_count": 3}, SHAPES, "claims 3 heads in 128 values"),
        ({}, {"output_norm.weight": (128,)}, "no token_embd.weight"),
        ({"llama.rope.scaling.type": "magic"}, SHAPES, "scales RoPE by 'magic'"),
    ],
)
def test_a_file_that_lacks_settings(
    changes: dict[str, Any], shapes: dict[str, tuple[int, ...]], match: str
) -> None:
    with pytest.raises(CorruptFileError, match=match):
        config_of({**FILE, **changes}, shapes)


def test_numbers_come_back_with_the_digits_that_they_had() -> None:
    stored = float(torch.tensor(1e-6))
    assert stored != 1e-6
    assert short(stored) == 1e-6
    assert (
        config_of({**FILE, "llama.attention.layer_norm_rms_epsilon": stored}, SHAPES)["rms_norm_eps"] == 1e-6
    )
    assert short(float(torch.tensor(0.1).div(3))) == pytest.approx(0.1 / 3, rel=1e-7)


CARD = """---
license: other
license_name: llama3.2
license_link: https://example.org/LICENSE
base_model:
- meta-llama/Llama-3.2-1B-Instruct
tags: [stories, "small"]
language:
- no
- en
---
# A model
"""


def test_general_settings(tmp_path: Path) -> None:
    path = tmp_path / "Tiny-Llama-1B-Chat-v1.0"
    path.mkdir()
    (path / "README.md").write_text(CARD)
    assert plain(general(path, config("llama"), parameters=1_100_048_384)) == {
        "general.architecture": "llama",
        "general.type": "model",
        "general.name": "Tiny Llama 1B Chat v1.0",
        "general.version": "v1.0",
        "general.finetune": "Chat",
        "general.basename": "Tiny-Llama",
        "general.size_label": "1.1B",
        "general.license": "other",
        "general.license.name": "llama3.2",
        "general.license.link": "https://example.org/LICENSE",
        "general.base_model.count": 1,
        "general.base_model.0.name": "Llama 3.2 1B Instruct",
        "general.base_model.0.organization": "Meta Llama",
        "general.base_model.0.repo_url": "https://huggingface.co/meta-llama/Llama-3.2-1B-Instruct",
        "general.tags": ["stories", "small"],
        "general.languages": ["no", "en"],
    }


def test_what_a_model_was_tuned_from(tmp_path: Path) -> None:
    def base(**options: Any) -> dict[str, Any]:
        found = plain(general(tmp_path, config("llama"), parameters=1000, **options))
        return {key: value for key, value in found.items() if "base_model" in key}

    assert base() == {}
    given = base(base_model="/models/Qwen2.5-0.5B")
    assert given == {"general.base_model.count": 1, "general.base_model.0.name": "Qwen2.5 0.5B"}
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "me/Story-1M"}))
    assert base()["general.base_model.0.repo_url"] == "https://huggingface.co/me/Story-1M"


def test_the_size_label_of_a_mixture(tmp_path: Path) -> None:
    moe = {"num_local_experts": 4, "num_experts_per_tok": 2}
    experts = 4 * 3 * 128 * 256 * 2
    found = plain(general(tmp_path, config("mixtral", **moe), parameters=experts + 500_000))
    assert found["general.size_label"] == "4x697K"  # the shared ones and one expert of each block


@pytest.mark.parametrize(
    "card",
    ["", "# no front matter", "---\n: [\n---\n", "---\n- a\n---\n", "---\nlicense: [1, {a: b}]\n---\n"],
)
def test_a_broken_card_is_passed_over(tmp_path: Path, card: str) -> None:
    (tmp_path / "README.md").write_text(card)
    found = general(tmp_path, config("llama"), parameters=1000, name="Story")
    assert set(found) == {"general.architecture", "general.type", "general.name", "general.size_label"}


def test_file_stems(tmp_path: Path) -> None:
    assert file_stem(tmp_path / "Qwen2.5-0.5B", {}) == "Qwen2.5-0.5B"
    assert file_stem(tmp_path / "my model (2)", {}) == "my-model-2"
    cached = (
        tmp_path / "models--Qwen--Qwen2.5-0.5B" / "snapshots" / "060db6499f32faf8b98477b0a26969ef7d8b9987"
    )
    assert file_stem(cached, {}) == "Qwen2.5-0.5B"
    assert file_stem(Path("/"), {"model_type": "llama"}) == "llama"
