"""A model's settings: config.json and GGUF's metadata, both ways.

What llama.cpp computes whatever a config says (activation, norms of routing weights, ...) stands in the
rows; a config that asks for something else is refused. Sources: llama.cpp's
`conversion/base.py`, `src/models/*.cpp`.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch

from qexport.errors import CorruptFileError, NotACheckpointError, UnsupportedModelError
from qexport.formats.gguf.container import Metadata, boolean, f32, u32
from qexport.formats.gguf.naming import short, whole_number
from qexport.formats.gguf.rope import head_size, rope_config, rope_settings, rope_tensors
from qexport.formats.gguf.rows import Row, row_of, row_of_file
from qexport.modeling.skeleton import quiet_transformers

_SLIDING, _FULL = "sliding_attention", "full_attention"
# GGUF's key and the config's, of whole numbers that every model has
_SIZES = (
    ("context_length", "max_position_embeddings"),
    ("embedding_length", "hidden_size"),
    ("block_count", "num_hidden_layers"),
    ("feed_forward_length", "intermediate_size"),
    ("attention.head_count", "num_attention_heads"),
)
_TOKENS = {
    "bos_token_id": "bos_token_id",
    "eos_token_id": "eos_token_id",
    "pad_token_id": "padding_token_id",
}
_DTYPES = {0: "float32", 32: "bfloat16"}  # llama_ftype; all others have float16 scales


def settings(config: Mapping[str, Any], row: Row | None = None) -> Metadata:
    """GGUF's settings of the model that a config.json describes, without `general.` and the tokenizer's.

    Old and new forms of config.json are read as transformers reads them. Raises UnsupportedModelError for an
    architecture without a row or an option that llama.cpp does not have, and NotACheckpointError for a
    config that transformers refuses.
    """
    row, full = complete(config, row)
    for key, allowed in row.fixed.items():
        _require(row, key, getattr(full, key, allowed[0]), allowed)
    found: Metadata = {key: u32(_size(full, name)) for key, name in _SIZES}
    heads = int(full.num_attention_heads)
    found["attention.head_count_kv"] = u32(getattr(full, "num_key_value_heads", None) or heads)
    key, name = row.epsilon
    found[key] = f32(getattr(full, name))
    found["vocab_size"] = u32(full.vocab_size)
    if row.scalings:
        found["attention.key_length"] = found["attention.value_length"] = u32(head_size(full))
    if row.experts:
        found["expert_count"] = u32(getattr(full, row.experts.count))
        found["expert_used_count"] = u32(full.num_experts_per_tok)
        if row.experts.size != "intermediate_size":
            found["expert_feed_forward_length"] = u32(getattr(full, row.experts.size))
    if hasattr(full, "use_parallel_residual"):
        found["use_parallel_residual"] = boolean(full.use_parallel_residual)
    for key, default in row.caps.items():
        cap = getattr(full, key)
        if cap is not None:
            found[key] = f32(cap)
        elif default is not None:
            raise _refused(row, key, None, f"llama.cpp caps them, by {default:g} where nothing is said")
    if row.wide_model_layers:
        _require(row, "query_pre_attn_scalar", full.query_pre_attn_scalar, (_attention_scalar(full, row),))
    if row.whole_heads:
        _require(row, "head_dim", head_size(full), (full.hidden_size // full.num_attention_heads,))
    found |= _window_settings(full, row)
    return {f"{row.arch}.{key}": value for key, value in found.items()} | rope_settings(full, row)


def computed_tensors(config: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """The tensors fp32 that a file holds besides the model's own, by name: divisors of RoPE's frequencies.

    Raises as `settings`.
    """
    row, full = complete(config)
    return rope_tensors(full, row)


def remarks(config: Mapping[str, Any], row: Row | None = None) -> list[str]:
    """What llama.cpp computes otherwise than transformers does, though it runs the model: for the user.

    Raises as `settings`.
    """
    row, full = complete(config, row)
    told = []
    window = getattr(full, "sliding_window", None)
    if window and not row.window_period and window < full.max_position_embeddings:
        told.append(
            f"llama.cpp knows no sliding window in {row.model_type}: past {window} tokens it attends to more "
            "than the model does"
        )
    if row.model_type == "gpt_neox" and full.hidden_act == "gelu":
        told.append("llama.cpp computes GPT-NeoX's GELU by tanh: logits differ slightly")
    if rope_tensors(full, row).keys() == {"rope_factors_long.weight", "rope_factors_short.weight"}:
        told.append(
            "llama.cpp takes the long or the short RoPE factors by the size of its context, transformers by "
            "the length of the text"
        )
    return told


def complete(config: Mapping[str, Any], row: Row | None = None) -> tuple[Row, Any]:
    """The row, and transformers' config object: defaults filled in, old forms brought to the new one.

    Raises UnsupportedModelError and NotACheckpointError, as `settings`.
    """
    from transformers import CONFIG_MAPPING

    row = row or row_of(config.get("model_type"))
    quiet_transformers()
    values = {key: value for key, value in config.items() if key != "quantization_config"}
    try:
        return row, CONFIG_MAPPING[row.model_type].from_dict(copy.deepcopy(values))
    except Exception as error:  # transformers raises whatever a broken config leads it to
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise NotACheckpointError(f"config.json describes no {row.model_type} model: {reason}") from error


def _size(full: Any, name: str) -> int:
    value = getattr(full, name, None)
    if name == "intermediate_size" and hasattr(full, "n_inner"):  # GPT-2's own name, and its default
        value = full.n_inner or 4 * full.hidden_size
    if not isinstance(value, int) or value <= 0:
        raise NotACheckpointError(f"config.json's {name} is {value!r}, expected a positive number")
    return value


def _require(row: Row, key: str, value: object, allowed: tuple[object, ...]) -> None:
    if not any(value == one and type(value) is type(one) for one in allowed):
        usual = ", ".join(dict.fromkeys(repr(one) for one in allowed if one is not None)) or "None"
        raise _refused(row, key, value, f"llama.cpp computes as for {usual}")


def _refused(row: Row, key: str, value: object, expected: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"{key} = {value!r} in a {row.model_type} model cannot be said in GGUF", expected=expected
    )


def _attention_scalar(full: Any, row: Row) -> int:
    """What llama.cpp divides attention's scores by the root of."""
    if full.num_hidden_layers == row.wide_model_layers:
        return int(full.hidden_size // full.num_attention_heads)
    return head_size(full)


def _window_settings(full: Any, row: Row) -> Metadata:
    window = getattr(full, "sliding_window", None)
    if row.model_type == "phi3":  # llama.cpp takes none for Phi-3, older releases insist on the key
        return {"attention.sliding_window": u32(window or 0)}
    if not row.window_period:
        return {}
    kinds = list(full.layer_types)
    if set(kinds) - {_SLIDING, _FULL}:
        raise _refused(row, "layer_types", kinds, f"{_SLIDING} and {_FULL}")
    if _SLIDING not in kinds:
        # llama.cpp cannot do without sliding layers in Gemma 2: theirs is a window over everything
        return {} if row.sliding_rope else {"attention.sliding_window": u32(full.max_position_embeddings)}
    periods = (row.window_period, *range(2, len(kinds) + 1))
    period = next((one for one in periods if _layer_types(len(kinds), one) == kinds), None)
    if period is None or _FULL not in kinds:
        raise _refused(row, "layer_types", kinds, f"{_FULL} in every n-th layer and {_SLIDING} in the others")
    if not window:
        raise _refused(row, "sliding_window", window, "the number of tokens that sliding layers attend to")
    found = {"attention.sliding_window": u32(window)}
    if period != row.window_period:
        found["attention.sliding_window_pattern"] = u32(period)
    return found


def _layer_types(layers: int, period: int) -> list[str]:
    return [_SLIDING if number % period < period - 1 else _FULL for number in range(layers)]


def config_of(
    metadata: Mapping[str, Any],
    shapes: Mapping[str, tuple[int, ...]],
    tensors: Mapping[str, torch.Tensor] | None = None,
) -> dict[str, Any]:
    """The config.json of the model in a GGUF file, from its metadata (plain values), the shapes of its
    tensors by GGUF's names, and those of `tensors.COMPUTED` that it holds.

    Raises UnsupportedModelError for an architecture without a row, CorruptFileError for metadata that lacks
    what the architecture needs.
    """
    row = row_of_file(metadata)

    def setting(key: str, default: Any = None) -> Any:
        value = metadata.get(f"{row.arch}.{key}", default)
        return short(value) if isinstance(value, float) else value

    sizes = {name: whole_number(metadata, f"{row.arch}.{key}") for key, name in _SIZES}
    heads, hidden, layers = (
        sizes[name] for name in ("num_attention_heads", "hidden_size", "num_hidden_layers")
    )
    if layers > len(shapes):
        raise CorruptFileError(f"the file claims {layers} blocks and holds {len(shapes)} tensors")
    if not heads or (hidden % heads and setting("attention.key_length") is None):
        raise CorruptFileError(f"the GGUF file claims {heads} heads in {hidden} values")
    size = int(setting("attention.key_length", hidden // heads))
    config: dict[str, Any] = {"architectures": [row.architecture], "model_type": row.model_type}
    config |= {key: allowed[0] for key, allowed in row.fixed.items()}
    config |= {row.renamed.get(name, name): value for name, value in sizes.items()}
    if row.scalings:
        config |= {"num_key_value_heads": setting("attention.head_count_kv", heads), "head_dim": size}
    key, name = row.epsilon
    config[name] = float(setting(key, 1e-5))
    config["vocab_size"] = _vocabulary(shapes)
    config["tie_word_embeddings"] = "output.weight" not in shapes
    config |= {key: tensor in shapes for key, tensor in row.biases.items()}
    config |= {key: setting(key, default) for key, default in row.caps.items()}
    if row.experts:
        config[row.experts.count] = setting("expert_count")
        config["num_experts_per_tok"] = setting("expert_used_count")
        config[row.experts.size] = setting("expert_feed_forward_length") or sizes["intermediate_size"]
    if setting("use_parallel_residual") is not None:
        config["use_parallel_residual"] = setting("use_parallel_residual")
    if row.wide_model_layers:
        wide = layers == row.wide_model_layers
        config["query_pre_attn_scalar"] = hidden // heads if wide else size
    config |= _window_config(setting, row, layers)
    config |= rope_config(metadata, row, size, tensors or {})
    original = config.get("rope_parameters", {}).get("original_max_position_embeddings")
    if row.model_type == "phi3" and original:  # its config class looks for it here
        config["original_max_position_embeddings"] = original
    # a default of the class may lie outside of this vocabulary
    config |= {key: metadata.get(f"tokenizer.ggml.{name}") for key, name in _TOKENS.items()}
    config["dtype"] = _DTYPES.get(metadata.get("general.file_type", 1), "float16")
    return config


def _vocabulary(shapes: Mapping[str, tuple[int, ...]]) -> int:
    shape = shapes.get("token_embd.weight", ())
    if len(shape) != 2:
        raise CorruptFileError("the GGUF file has no token_embd.weight [tokens, hidden]")
    return shape[0]


def _window_config(setting: Any, row: Row, layers: int) -> dict[str, Any]:
    window = setting("attention.sliding_window")
    if row.model_type == "phi3" or not row.window_period:
        return {"sliding_window": window or None} if row.scalings else {}
    if row.sliding_rope and not window:
        return {"layer_types": [_FULL] * layers}
    period = setting("attention.sliding_window_pattern", row.window_period)
    if not isinstance(period, int) or period < 1:
        raise CorruptFileError(f"the GGUF file's sliding_window_pattern is {period!r}, expected a number")
    return {"sliding_window": window or 4096, "layer_types": _layer_types(layers, period)}
