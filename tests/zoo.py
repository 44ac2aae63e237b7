"""A tiny random model of every architecture that has a row, and of the ways in which its files may differ.

All sides of all matrices are multiples of 64. Biases are not zero and norms not one, as transformers starts
them: what forgets them is seen. Heads are tied where the real models tie them.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tests.tiny import edit_weights, tiny_model

LENGTH = 40  # tokens of a test's rows, more than gemma2's and gemma3's sliding windows


def zoo_model(directory: Path, model_type: str, **options: Any) -> Path:
    """A random model of 2 blocks with tokenizer, in fp16. `options` go to tiny_model and the config."""
    path = tiny_model(directory, model_type=model_type, **options)
    generator = torch.Generator().manual_seed(11)

    def noise(tensor: torch.Tensor) -> torch.Tensor:
        return (torch.randn(tensor.shape, generator=generator) * 0.2).to(tensor.dtype)

    tensors = load_file(path / "model.safetensors")
    vectors = {name: value + noise(value) for name, value in tensors.items() if value.dim() == 1}
    edit_weights(path, **vectors)
    return path


_GEMMA = {"tied": True, "head_dim": 32}
_SLIDING = {**_GEMMA, "query_pre_attn_scalar": 32, "sliding_window": 8}
_GEMMA2 = {**_SLIDING, "layer_types": ["sliding_attention", "full_attention"]}
_GPT2: dict[str, Any] = {"n_embd": 128, "n_layer": 2, "n_head": 4, "n_positions": 128}
_OPT = {"tied": True, "ffn_dim": 256, "word_embed_proj_dim": 128}
_MIXTRAL = {"tied": False, "num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 32}
_QWEN3_MOE = {
    "tied": False,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 128,
    "head_dim": 32,
    "norm_topk_prob": True,
}


def _maker(model_type: str, **options: Any) -> Callable[[Path], Path]:
    return partial(zoo_model, model_type=model_type, **options)


ZOO: dict[str, Callable[[Path], Path]] = {
    "llama": _maker("llama", tied=False),
    "mistral": _maker("mistral", tied=False, sliding_window=8),
    "qwen2": _maker("qwen2", tied=False),
    "qwen3": _maker("qwen3", tied=True, head_dim=32),
    "gemma": _maker("gemma", **_GEMMA, num_key_value_heads=4),
    "gemma2": _maker("gemma2", **_GEMMA2),
    "gemma3_text": _maker("gemma3_text", **_GEMMA2),
    "phi3": _maker("phi3", tied=False),
    "gpt2": _maker("gpt2", tied=True, **_GPT2, num_key_value_heads=4),
    "gpt_neox": _maker("gpt_neox", tied=False, num_key_value_heads=4, rotary_pct=0.25),
    "opt": _maker("opt", **_OPT, num_key_value_heads=4),
    "mixtral": _maker("mixtral", **_MIXTRAL),
    "qwen3_moe": _maker("qwen3_moe", **_QWEN3_MOE),
}

_WIDE = {"sliding_window": 2 * LENGTH}
# The same architectures with settings that all runtimes heed. mlx-lm 0.32 computes without a window
# within a test's few tokens, takes its pattern to be six blocks long in gemma3, and has GPT-NeoX's inner
# size at four times the hidden one.
RUNNABLE: dict[str, Callable[[Path], Path]] = {
    **ZOO,
    "mistral": _maker("mistral", tied=False, **_WIDE),
    "gemma2": _maker("gemma2", **{**_GEMMA2, **_WIDE}),
    "gemma3_text": _maker(
        "gemma3_text",
        **{**_GEMMA2, **_WIDE, "layer_types": ["sliding_attention"] * 5 + ["full_attention"]},
        num_hidden_layers=6,
    ),
    "gpt_neox": _maker("gpt_neox", tied=False, num_key_value_heads=4, rotary_pct=0.25, intermediate_size=512),
}


def _rewritten(directory: Path, make: Callable[[Path], Path], change: Callable[[Any], Any]) -> Path:
    path = make(directory)
    tensors = change(load_file(path / "model.safetensors"))
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    return path


def _without_prefix(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name.removeprefix("transformer."): value for name, value in tensors.items()}


def _experts_fused(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """As transformers 5 keeps them in memory: [experts, gate above up, hidden], [experts, hidden, inner]."""
    kept = {name: value for name, value in tensors.items() if ".experts." not in name}
    for layer in range(2):
        stem = f"model.layers.{layer}.mlp.experts"
        disk = next(
            name.split(".experts.")[0]
            for name in tensors
            if f"layers.{layer}." in name and ".experts." in name
        )
        leaves = ("w1", "w3", "w2") if "block_sparse_moe" in disk else ("gate_proj", "up_proj", "down_proj")
        gate, up, down = (
            torch.stack([tensors[f"{disk}.experts.{n}.{leaf}.weight"] for n in range(4)]) for leaf in leaves
        )
        kept[f"{stem}.gate_up_proj"] = torch.cat([gate, up], dim=1)
        kept[f"{stem}.down_proj"] = down
    return kept


VARIANTS: dict[str, Callable[[Path], Path]] = {
    "llama_as_many_kv_heads": _maker("llama", tied=False, num_key_value_heads=4),
    "phi3_as_many_kv_heads": _maker("phi3", tied=False, num_key_value_heads=4),
    "opt_norms_after": _maker("opt", **_OPT, num_key_value_heads=4, do_layer_norm_before=False),
    "opt_gelu": _maker("opt", **_OPT, num_key_value_heads=4, activation_function="gelu"),
    "gpt_neox_one_after_the_other": _maker(
        "gpt_neox", tied=False, num_key_value_heads=4, use_parallel_residual=False
    ),
    "gpt2_without_prefix": partial(_rewritten, make=ZOO["gpt2"], change=_without_prefix),
    "mixtral_fused": partial(_rewritten, make=ZOO["mixtral"], change=_experts_fused),
    "qwen3_moe_fused": partial(_rewritten, make=ZOO["qwen3_moe"], change=_experts_fused),
    "qwen3_moe_with_dense_layer": _maker("qwen3_moe", **_QWEN3_MOE, mlp_only_layers=[0]),
    "mixtral_router_logits": _maker("mixtral", **_MIXTRAL, output_router_logits=True),
}

# models without a row: methods that need no data take them all the same
ROWLESS: dict[str, Callable[[Path], Path]] = {
    "granite": _maker("granite", tied=True),
    "starcoder2": _maker("starcoder2", tied=True),
    "stablelm": _maker("stablelm", tied=False),
    "phimoe": _maker("phimoe", **_MIXTRAL),
    "qwen2_moe": _maker("qwen2_moe", **_QWEN3_MOE, shared_expert_intermediate_size=128),
    "bloom": _maker("bloom", tied=True, n_layer=2, n_head=4),
    "falcon": _maker("falcon", tied=True),
}
