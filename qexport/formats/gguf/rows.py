"""What llama.cpp runs, one row of data a model type: names, order of rows, what it computes come what may.

A new architecture is a row. Modules stand under the names that transformers saves them by; their GGUF names
come from gguf-py's maps. Source: llama.cpp's `src/models/*.cpp` and `conversion/*.py` (b9190).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from qexport.errors import UnsupportedModelError


@dataclass(frozen=True)
class Experts:
    """Module of the experts within a block and an expert's three matrices, as they are saved one by one; the
    config's keys of their number and of their inner size.
    """

    module: str
    gate: str
    up: str
    down: str
    count: str
    size: str

    def leaves(self) -> dict[str, str]:
        """By the names in memory (see modeling/experts.py) those on disk."""
        return {"gate_proj": self.gate, "up_proj": self.up, "down_proj": self.down}


@dataclass(frozen=True)
class Row:
    """`outside` and `inside` are the modules with tensors, outside the blocks and within each.

    `orders`: tensors whose rows llama.cpp wants in another order, "rotary" for q and k whose rotary pairs are
    neighbours there, "qkv" for heads that each bring q, k and v. `plus_one`: its norms hold weight + 1.
    `fixed`: keys of the config that llama.cpp never asks for, and the values that come to what it computes,
    the usual one first. `biases`: keys of the config that come with a tensor. `caps`: soft caps of logits,
    with what llama.cpp takes when the file says none. `scalings`: kinds of RoPE scaling that it can do, none
    for a model that learns its positions. `renamed`: keys of the config that differ from the usual ones.

    `window_period`: of so many layers the last attends to all tokens, where nothing else is said; 0:
    llama.cpp knows no sliding window. `sliding_rope`: sliding layers have rotary positions of their own.
    `wide_model_layers`: with so many blocks attention is scaled by hidden size / heads, else by the head's
    size; 0: the config has no say in it. `whole_heads`: heads must fill the hidden size. `own_head`: the
    output head is stored even where it is tied.
    """

    model_type: str
    arch: str
    architecture: str
    outside: tuple[str, ...]
    blocks: str
    inside: tuple[str, ...]
    fixed: Mapping[str, tuple[object, ...]]
    scalings: tuple[str, ...] = ("default", "linear", "yarn")
    experts: Experts | None = None
    orders: Mapping[str, str] = field(default_factory=dict)
    epsilon: tuple[str, str] = ("attention.layer_norm_rms_epsilon", "rms_norm_eps")
    renamed: Mapping[str, str] = field(default_factory=dict)
    biases: Mapping[str, str] = field(default_factory=dict)
    caps: Mapping[str, float | None] = field(default_factory=dict)
    plus_one: bool = False
    partial_rotary: bool = False
    sliding_rope: bool = False
    window_period: int = 0
    wide_model_layers: int = 0
    whole_heads: bool = False
    own_head: bool = False

    def block(self, number: int, module: str) -> str:
        """Full name of a module of a block."""
        return f"{self.blocks}.{number}.{module}"


_OUTSIDE = ("model.embed_tokens", "model.norm", "lm_head")
_QKVO = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
_QK_NORMS = ("self_attn.q_norm", "self_attn.k_norm")
_MLP = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
_NORMS = ("input_layernorm", "post_attention_layernorm")
_GEMMA_NORMS = (*_NORMS, "pre_feedforward_layernorm", "post_feedforward_layernorm")
_SILU = {"hidden_act": ("silu", "swish")}
_NO_BIAS = {"attention_bias": (False, None)}
_TANH = ("gelu_pytorch_tanh", "gelu_new", "gelu_fast", "gelu_python_tanh")
_GEMMA = {"hidden_act": _TANH, **_NO_BIAS, "use_bidirectional_attention": (False, None)}
_GEMMA23 = {**_GEMMA, "hidden_activation": _TANH}
del _GEMMA23["hidden_act"]
# rotary pairs: transformers has the halves of a head, llama.cpp's `llama` neighbours
_ROTARY = {"attn_q": "rotary", "attn_k": "rotary"}
_LLAMA_SCALINGS = ("default", "linear", "yarn", "llama3", "longrope")

ROWS = (
    Row(
        "llama",
        "llama",
        "LlamaForCausalLM",
        _OUTSIDE,
        "model.layers",
        (*_QKVO, *_MLP, *_NORMS),
        _SILU,
        _LLAMA_SCALINGS,
        orders=_ROTARY,
        biases={"attention_bias": "blk.0.attn_q.bias", "mlp_bias": "blk.0.ffn_up.bias"},
    ),
    Row(
        "mixtral",
        "llama",
        "MixtralForCausalLM",
        _OUTSIDE,
        "model.layers",
        (*_QKVO, "block_sparse_moe.gate", *_NORMS),
        _SILU,
        _LLAMA_SCALINGS,
        experts=Experts(
            "block_sparse_moe.experts", "w1", "w3", "w2", "num_local_experts", "intermediate_size"
        ),
        orders=_ROTARY,
    ),
    Row(
        "mistral",
        "llama",
        "MistralForCausalLM",
        _OUTSIDE,
        "model.layers",
        (*_QKVO, *_MLP, *_NORMS),
        _SILU,
        _LLAMA_SCALINGS,
        orders=_ROTARY,
    ),
    Row(
        "qwen2",
        "qwen2",
        "Qwen2ForCausalLM",
        _OUTSIDE,
        "model.layers",
        (*_QKVO, *_MLP, *_NORMS),
        _SILU,
        whole_heads=True,
    ),
    Row(
        "qwen3",
        "qwen3",
        "Qwen3ForCausalLM",
        _OUTSIDE,
        "model.layers",
        (*_QKVO, *_QK_NORMS, *_MLP, *_NORMS),
        {**_SILU, **_NO_BIAS},
    ),
    Row(
        "qwen3_moe",
        "qwen3moe",
        "Qwen3MoeForCausalLM",
        _OUTSIDE,
        "model.layers",
        (*_QKVO, *_QK_NORMS, "mlp.gate", *_NORMS),
        {
            **_SILU,
            **_NO_BIAS,
            "norm_topk_prob": (True,),
            "decoder_sparse_step": (1,),
            "mlp_only_layers": ([], None),
        },
        experts=Experts(
            "mlp.experts", "gate_proj", "up_proj", "down_proj", "num_experts", "moe_intermediate_size"
        ),
    ),
    Row(
        "gemma",
        "gemma",
        "GemmaForCausalLM",
        _OUTSIDE[:2],
        "model.layers",
        (*_QKVO, *_MLP, *_NORMS),
        _GEMMA,
        plus_one=True,
    ),
    Row(
        "gemma2",
        "gemma2",
        "Gemma2ForCausalLM",
        _OUTSIDE[:2],
        "model.layers",
        (*_QKVO, *_MLP, *_GEMMA_NORMS),
        _GEMMA23,
        plus_one=True,
        caps={"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
        window_period=2,
        wide_model_layers=46,
    ),
    Row(
        "gemma3_text",
        "gemma3",
        "Gemma3ForCausalLM",
        _OUTSIDE,
        "model.layers",
        (*_QKVO, *_QK_NORMS, *_MLP, *_GEMMA_NORMS),
        {**_GEMMA23, "attn_logit_softcapping": (None,)},
        ("default", "linear"),
        plus_one=True,
        caps={"final_logit_softcapping": None},
        sliding_rope=True,
        window_period=6,
        wide_model_layers=62,
    ),
    Row(
        "phi3",
        "phi3",
        "Phi3ForCausalLM",
        _OUTSIDE,
        "model.layers",
        ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj", *_NORMS),
        _SILU,
        ("default", "longrope"),
        partial_rotary=True,
        whole_heads=True,
    ),
    Row(
        "gpt2",
        "gpt2",
        "GPT2LMHeadModel",
        ("transformer.wte", "transformer.wpe", "transformer.ln_f", "lm_head"),
        "transformer.h",
        ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj", "ln_1", "ln_2"),
        {
            "activation_function": _TANH[1:] + _TANH[:1],
            "scale_attn_weights": (True,),
            "scale_attn_by_inverse_layer_idx": (False,),
            "add_cross_attention": (False,),
        },
        (),
        epsilon=("attention.layer_norm_epsilon", "layer_norm_epsilon"),
        renamed={
            "max_position_embeddings": "n_positions",
            "hidden_size": "n_embd",
            "num_hidden_layers": "n_layer",
            "num_attention_heads": "n_head",
            "intermediate_size": "n_inner",
        },
    ),
    Row(
        "gpt_neox",
        "gptneox",
        "GPTNeoXForCausalLM",
        ("gpt_neox.embed_in", "gpt_neox.final_layer_norm", "embed_out"),
        "gpt_neox.layers",
        (
            "attention.query_key_value",
            "attention.dense",
            "mlp.dense_h_to_4h",
            "mlp.dense_4h_to_h",
            *_NORMS,
        ),
        # `gelu` is not quite what llama.cpp computes: see `settings.remarks`
        {"hidden_act": ("gelu", *_TANH), "attention_bias": (True,)},
        orders={"attn_qkv": "qkv"},
        own_head=True,
        epsilon=("attention.layer_norm_epsilon", "layer_norm_eps"),
        partial_rotary=True,
        whole_heads=True,
    ),
)
BY_TYPE: dict[str, Row] = {row.model_type: row for row in ROWS}


def row_of(model_type: object) -> Row:
    """The row of a `model_type` of config.json; UnsupportedModelError with the known ones when none is."""
    found = BY_TYPE.get(model_type) if isinstance(model_type, str) else None
    if found is None:
        raise UnsupportedModelError(
            f"a model of type {model_type!r} cannot be written as GGUF so far",
            expected=f"one of {', '.join(BY_TYPE)}",
        )
    return found


def row_of_file(metadata: Mapping[str, Any]) -> Row:
    """The row of a GGUF file's metadata (plain values). `llama` stands for three kinds: experts tell Mixtral,
    and Mistral is Llama. UnsupportedModelError when there is none.
    """
    arch = metadata.get("general.architecture")
    mixture = bool(metadata.get(f"{arch}.expert_count"))
    for row in ROWS:
        if row.arch == arch and mixture == (row.experts is not None):
            return row
    known = ", ".join(dict.fromkeys(row.arch for row in ROWS))
    kind = f"{arch!r} with experts" if mixture else repr(arch)
    raise UnsupportedModelError(f"a GGUF file of architecture {kind} cannot be read so far", expected=known)
