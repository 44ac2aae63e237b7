"""Rotary positions: transformers' `rope_parameters` and llama.cpp's settings and tensors, both ways.

llama.cpp turns position p of pair i by p * base^(-2i/d), the frequency divided by a tensor's factors where
there is one. Its YaRN multiplies q and k by (1 + 0.1 ln factor) * attn_factor each, transformers' by
`attention_factor`. Sources: transformers' `modeling_rope_utils.py`, llama.cpp's `llama-context.cpp` (the YaRN
factor), `ggml_rope_ext`, `conversion/llama.py` and `phi.py`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from qexport.errors import CorruptFileError, UnsupportedModelError
from qexport.formats.gguf.container import Metadata, f32, text, u32
from qexport.formats.gguf.naming import short
from qexport.formats.gguf.rows import Row

FREQS = "rope_freqs.weight"
LONG = "rope_factors_long.weight"
SHORT = "rope_factors_short.weight"


def head_size(config: Any) -> int:
    """Values of a head of q and k, by transformers' config object."""
    own = getattr(config, "head_dim", None)
    return int(own or config.hidden_size // config.num_attention_heads)


def parameters(config: Any) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """transformers' parameters of the layers, and those of the sliding ones where they have their own."""
    found = config.rope_parameters
    if "full_attention" in found or "sliding_attention" in found:
        return dict(found["full_attention"]), dict(found["sliding_attention"])
    return dict(found), None


def rope_settings(config: Any, row: Row) -> Metadata:
    """The settings of a model's rotary positions, `rope.` keys with the architecture in front; none for a
    model that learns its positions.

    Raises UnsupportedModelError for a scaling, or an option of one, that llama.cpp does not have.
    """
    if not row.scalings:
        return {}
    full, sliding = parameters(config)
    kind = _kind(full, row)
    size = head_size(config)
    turned = int(size * float(full.get("partial_rotary_factor") or 1.0))
    if turned != size and not row.partial_rotary:
        raise _refused(f"a partial_rotary_factor of {full['partial_rotary_factor']}", row)
    found = {
        "dimension_count": u32(turned),
        "freq_base": f32(full["rope_theta"]),
    }
    if sliding:
        if _kind(sliding, row) != "default":
            raise _refused(f"RoPE scaling {sliding['rope_type']!r} of the sliding layers", row)
        found["freq_base_swa"] = f32(sliding["rope_theta"])
    if kind in ("linear", "yarn"):
        found["scaling.type"] = text(kind)
        found["scaling.factor"] = f32(_factor(full, config))
    if kind == "yarn":
        found |= _yarn_settings(full, config, row)
    if kind == "longrope":
        found["scaling.type"] = text(kind)
        found["scaling.original_context_length"] = u32(full["original_max_position_embeddings"])
        found["scaling.attn_factor"] = f32(_longrope_attention(full, config))
    return {f"{row.arch}.rope.{key}": value for key, value in found.items()}


def _kind(found: Mapping[str, Any], row: Row) -> str:
    kind = str(found.get("rope_type") or found.get("type") or "default")
    kind = {"su": "longrope"}.get(kind, kind)
    if kind not in row.scalings:
        raise _refused(f"RoPE scaling {kind!r}", row)
    return kind


def _refused(what: str, row: Row) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"{what} in a {row.model_type} model cannot be said in GGUF",
        expected=f"llama.cpp knows {', '.join(row.scalings)} scaling there",
    )


def _factor(found: Mapping[str, Any], config: Any) -> float:
    own = found.get("factor")
    if own is None:
        return float(config.max_position_embeddings / found["original_max_position_embeddings"])
    return float(own)


def _mscale(factor: float, by: float = 1.0) -> float:
    return 1.0 if factor <= 1 else 0.1 * by * math.log(factor) + 1.0


def _yarn_settings(found: Mapping[str, Any], config: Any, row: Row) -> Metadata:
    for key, value in (("truncate", True), ("beta_fast", 32), ("beta_slow", 1)):
        own = found.get(key)
        if own is not None and own != value:  # llama.cpp knows the betas' keys, but reads them elsewhere only
            raise _refused(f"YaRN with {key} = {own!r}", row)
    factor = _factor(found, config)
    attention, over_all = found.get("attention_factor"), found.get("mscale_all_dim")
    if attention is None:
        attention = _mscale(factor)
        if found.get("mscale") and over_all:
            attention = _mscale(factor, found["mscale"]) / _mscale(factor, over_all)
    settings = {"scaling.original_context_length": u32(found["original_max_position_embeddings"])}
    if not math.isclose(attention, _mscale(factor), rel_tol=1e-9):
        settings["scaling.attn_factor"] = f32(attention / _mscale(factor))
    return settings


def _longrope_attention(found: Mapping[str, Any], config: Any) -> float:
    if found.get("attention_factor") is not None:
        return float(found["attention_factor"])
    factor = _factor(found, config)
    original = found["original_max_position_embeddings"]
    return 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))


def rope_tensors(config: Any, row: Row) -> dict[str, torch.Tensor]:
    """The tensors fp32 [pairs] by which llama.cpp divides the frequencies, where the scaling has some.

    Raises UnsupportedModelError for longrope factors of another number than pairs.
    """
    if not row.scalings:
        return {}
    found, _ = parameters(config)
    kind = _kind(found, row)
    size = int(head_size(config) * float(found.get("partial_rotary_factor") or 1.0))
    if kind == "llama3":
        keys = ("rope_theta", "factor", "low_freq_factor", "high_freq_factor")
        values = [found[key] for key in (*keys, "original_max_position_embeddings")]
        return {FREQS: _llama3(size, *values)}
    if kind == "longrope":
        tensors = {LONG: torch.tensor(found["long_factor"]), SHORT: torch.tensor(found["short_factor"])}
        if any(tensor.shape != (size // 2,) for tensor in tensors.values()):
            raise _refused(f"longrope with factors for other than {size // 2} rotary pairs", row)
        return {name: tensor.to(torch.float32) for name, tensor in tensors.items()}
    return {}


def _llama3(size: int, base: float, factor: float, low: float, high: float, original: float) -> torch.Tensor:
    """Llama 3's divisors of the frequencies: 1 for short waves, `factor` for long ones, between smoothly."""
    frequencies = 1.0 / base ** (torch.arange(0, size, 2, dtype=torch.float64) / size)
    turns = original * frequencies / (2 * math.pi)  # within the original context
    smooth = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 / ((1 - smooth) / factor + smooth)).to(torch.float32)


def rope_config(
    metadata: Mapping[str, Any], row: Row, size: int, tensors: Mapping[str, torch.Tensor]
) -> dict[str, Any]:
    """config.json's entries for a file's rotary positions; `size` is that of a head, `tensors` those of
    `rope_tensors` that the file holds.
    """
    if not row.scalings:
        return {}

    def setting(key: str, default: Any = None) -> Any:
        value = metadata.get(f"{row.arch}.rope.{key}", default)
        return short(value) if isinstance(value, float) else value

    base = float(setting("freq_base", 10000.0))
    found: dict[str, Any] = {"rope_type": "default", "rope_theta": base}
    turned = int(setting("dimension_count", size))
    if turned != size or row.partial_rotary:
        found["partial_rotary_factor"] = turned / size
    kind, factor = setting("scaling.type"), setting("scaling.factor") or setting("scale_linear")
    original = setting("scaling.original_context_length", metadata.get(f"{row.arch}.context_length"))
    attention = setting("scaling.attn_factor")
    if LONG in tensors and SHORT in tensors:
        factors = {"long_factor": tensors[LONG].tolist(), "short_factor": tensors[SHORT].tolist()}
        found |= {"rope_type": "longrope", "original_max_position_embeddings": original, **factors}
        found["attention_factor"] = 1.0 if attention is None else float(attention)
    elif FREQS in tensors:
        found |= _llama3_config(tensors[FREQS], turned, base, original)
    elif kind == "yarn" and factor:
        factor = float(factor)
        found |= {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original}
        if attention is not None:
            found["attention_factor"] = float(attention) * _mscale(factor)
    elif kind in (None, "linear") and factor and factor != 1.0:
        found |= {"rope_type": "linear", "factor": float(factor)}
    elif kind not in (None, "none", "linear", "longrope"):
        raise CorruptFileError(f"the GGUF file scales RoPE by {kind!r}", expected="linear, yarn or longrope")
    if not row.sliding_rope:
        return {"rope_parameters": found}
    local = {"rope_type": "default", "rope_theta": float(setting("freq_base_swa", 10000.0))}
    return {"rope_parameters": {"full_attention": found, "sliding_attention": local}}


def _llama3_config(factors: torch.Tensor, size: int, base: float, original: Any) -> dict[str, Any]:
    """Llama 3's parameters that give these divisors; longrope with the same ones when there are none.

    With `low_freq_factor` 1, as in every published model, two smooth divisors tell the others.
    """
    factor = float(factors.max())
    turns_each = 1.0 / base ** (torch.arange(0, size, 2, dtype=torch.float64) / size) / (2 * math.pi)
    between = (factors > 1) & (factors < factor)
    if len(factors) == len(turns_each) and int(between.sum()) >= 2 and factor > 1:
        # smooth = (original * turns_each - 1) / (high - 1): a line
        smooth = ((1 / factors.double() - 1 / factor) / (1 - 1 / factor))[between]
        x, y = turns_each[between][[0, -1]].tolist(), smooth[[0, -1]].tolist()
        slope = (y[0] - y[1]) / (x[0] - x[1])
        offset = y[0] - slope * x[0]
        if offset < 0:
            high = round(1 - 1 / offset, 3)
            found = {"factor": factor, "low_freq_factor": 1.0, "high_freq_factor": high}
            length = round(slope * (high - 1))
            if torch.allclose(_llama3(size, base, factor, 1.0, high, length), factors, rtol=1e-5, atol=0):
                return {"rope_type": "llama3", **found, "original_max_position_embeddings": length}
    same = {"long_factor": factors.tolist(), "short_factor": factors.tolist(), "attention_factor": 1.0}
    return {"rope_type": "longrope", **same, "original_max_position_embeddings": original}
