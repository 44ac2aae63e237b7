"""Architectures as data: where the blocks lie, which linear layers of a block share an input, and
through which pairs of layers a scale can move.

A new architecture is a row. Only calibrated methods and verify need one. Names are those of the modules in
memory; experts always are `mlp.experts.N.gate_proj`, `up_proj` and `down_proj` there (see `experts.py`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from qexport.errors import UnsupportedModelError


@dataclass(frozen=True)
class FoldRule:
    """Output channels of `source` feed `targets` and nothing else, with no more between than what keeps a
    positive factor of a channel as it is (a product, a ReLU, attention's mix of tokens).

    `targets` are every reader, quantized or not. A `*` stands for the number of an expert; where source and
    targets have one, there is a fold for each expert. `part` (i, n) takes the i-th of n equal parts of the
    source's channels, counted from 0. `when` is a key of the config and the value that it must have.
    """

    source: str
    targets: tuple[str, ...]
    part: tuple[int, int] = (0, 1)
    when: tuple[str, object] | None = None


@dataclass(frozen=True)
class Architecture:
    """`blocks` is the path of the list of blocks; `linears` are a block's inner names.

    They are grouped by common input, the groups in the order in which the block runs them. `*` stands for
    the number of an expert: each has an input of its own. A block may lack some of the names: in a mixture
    of experts some are dense. `norm_plus_one`: the norms multiply by 1 + weight.
    """

    model_types: tuple[str, ...]
    blocks: str
    linears: tuple[tuple[str, ...], ...]
    folds: tuple[FoldRule, ...]
    norm_plus_one: bool = False


_QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_GATE_UP = ("mlp.gate_proj", "mlp.up_proj")
_EXPERTS_GATE_UP = ("mlp.experts.*.gate_proj", "mlp.experts.*.up_proj")
_LLAMA = (_QKV, ("self_attn.o_proj",), _GATE_UP, ("mlp.down_proj",))
_MIXTURE = (*_LLAMA, _EXPERTS_GATE_UP, ("mlp.experts.*.down_proj",))
_INPUT_NORM = FoldRule("input_layernorm", _QKV)
# with fewer key-value heads a channel of v feeds several of o: the shapes tell, and there is no fold
_VALUES = FoldRule("self_attn.v_proj", ("self_attn.o_proj",))
_UP = FoldRule("mlp.up_proj", ("mlp.down_proj",))

ARCHITECTURES = (
    Architecture(
        model_types=("llama", "mistral", "qwen2", "qwen3"),
        blocks="model.layers",
        linears=_LLAMA,
        folds=(_INPUT_NORM, _VALUES, FoldRule("post_attention_layernorm", _GATE_UP), _UP),
    ),
    Architecture(
        model_types=("gemma",),
        blocks="model.layers",
        linears=_LLAMA,
        folds=(_INPUT_NORM, _VALUES, FoldRule("post_attention_layernorm", _GATE_UP), _UP),
        norm_plus_one=True,
    ),
    Architecture(
        # post_attention_layernorm and post_feedforward_layernorm feed the residual
        model_types=("gemma2", "gemma3_text"),
        blocks="model.layers",
        linears=_LLAMA,
        folds=(_INPUT_NORM, _VALUES, FoldRule("pre_feedforward_layernorm", _GATE_UP), _UP),
        norm_plus_one=True,
    ),
    Architecture(
        model_types=("phi3",),
        blocks="model.layers",
        linears=(
            ("self_attn.qkv_proj",),
            ("self_attn.o_proj",),
            ("mlp.gate_up_proj",),
            ("mlp.down_proj",),
        ),
        folds=(
            FoldRule("input_layernorm", ("self_attn.qkv_proj",)),
            FoldRule("self_attn.qkv_proj", ("self_attn.o_proj",), part=(2, 3)),
            FoldRule("post_attention_layernorm", ("mlp.gate_up_proj",)),
            FoldRule("mlp.gate_up_proj", ("mlp.down_proj",), part=(1, 2)),
        ),
    ),
    Architecture(
        model_types=("gpt2",),
        blocks="transformer.h",
        linears=(("attn.c_attn",), ("attn.c_proj",), ("mlp.c_fc",), ("mlp.c_proj",)),
        folds=(
            FoldRule("ln_1", ("attn.c_attn",)),
            FoldRule("attn.c_attn", ("attn.c_proj",), part=(2, 3)),
            FoldRule("ln_2", ("mlp.c_fc",)),
            # none through mlp.c_fc: GELU changes with its input's scale
        ),
    ),
    Architecture(
        model_types=("gpt_neox",),
        blocks="gpt_neox.layers",
        linears=(
            ("attention.query_key_value",),
            ("attention.dense",),
            ("mlp.dense_h_to_4h",),
            ("mlp.dense_4h_to_h",),
        ),
        folds=(
            FoldRule("input_layernorm", ("attention.query_key_value",)),
            FoldRule("post_attention_layernorm", ("mlp.dense_h_to_4h",)),
            # none from query_key_value: head by head it holds q, k and v
        ),
    ),
    Architecture(
        model_types=("opt",),
        blocks="model.decoder.layers",
        linears=(_QKV, ("self_attn.out_proj",), ("fc1",), ("fc2",)),
        folds=(
            # where the norms come after (opt-350m) they feed the residual too
            FoldRule("self_attn_layer_norm", _QKV, when=("do_layer_norm_before", True)),
            FoldRule("self_attn.v_proj", ("self_attn.out_proj",)),
            FoldRule("final_layer_norm", ("fc1",), when=("do_layer_norm_before", True)),
            FoldRule("fc1", ("fc2",), when=("activation_function", "relu")),
        ),
    ),
    Architecture(
        model_types=("mixtral", "qwen3_moe"),
        blocks="model.layers",
        linears=_MIXTURE,
        folds=(
            _INPUT_NORM,
            _VALUES,
            FoldRule("post_attention_layernorm", ("mlp.gate", *_EXPERTS_GATE_UP, *_GATE_UP)),
            _UP,
            FoldRule("mlp.experts.*.up_proj", ("mlp.experts.*.down_proj",)),
        ),
    ),
)

# transformers' Conv1D (GPT-2 and its kin) stores a weight as [in, out]
_CONV1D_MODEL_TYPES = frozenset({"gpt2", "openai-gpt", "imagegpt", "decision_transformer"})
_CONV1D = re.compile(r"(^|\.)(c_attn|q_attn|c_proj|c_fc)(\.weight)?$")


def stored_transposed(config: Mapping[str, Any]) -> Callable[[str], bool]:
    """Whether a model with this config.json stores a weight as [in, out]; asked with the name on disk of
    the weight or of its module. No model is built.
    """
    if config.get("model_type") not in _CONV1D_MODEL_TYPES:
        return lambda name: False
    return lambda name: _CONV1D.search(name) is not None


def architecture_of(model_type: str) -> Architecture:
    """The row of a `model_type` of config.json; UnsupportedModelError when there is none."""
    for row in ARCHITECTURES:
        if model_type in row.model_types:
            return row
    known = ", ".join(name for row in ARCHITECTURES for name in row.model_types)
    raise UnsupportedModelError(
        f"there is no architecture row for {model_type!r}, as calibrated methods and verify need",
        expected=f"one of {known}",
        remedy="add the row, or quantize without data (no row: bnb, eetq, rtn, search, hqq, mlx's default)",
    )
