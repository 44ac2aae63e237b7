"""Architectures as data: where the blocks lie, and which linear layers of a block share an input.

A new architecture is a row. Only calibrated methods need one.
"""

from __future__ import annotations

from dataclasses import dataclass

from qexport.errors import UnsupportedModelError


@dataclass(frozen=True)
class Architecture:
    """`blocks` is the path of the list of blocks; `linears` are a block's inner names.

    They are grouped by common input, the groups in the order in which the block runs them.
    """

    model_types: tuple[str, ...]
    blocks: str
    linears: tuple[tuple[str, ...], ...]


ARCHITECTURES = (
    Architecture(
        model_types=("llama", "mistral", "qwen2", "qwen3"),
        blocks="model.layers",
        linears=(
            ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
            ("self_attn.o_proj",),
            ("mlp.gate_proj", "mlp.up_proj"),
            ("mlp.down_proj",),
        ),
    ),
)


def architecture_of(model_type: str) -> Architecture:
    """The row of a `model_type` of config.json; UnsupportedModelError when there is none."""
    for row in ARCHITECTURES:
        if model_type in row.model_types:
            return row
    known = ", ".join(name for row in ARCHITECTURES for name in row.model_types)
    raise UnsupportedModelError(
        f"there is no architecture row for {model_type!r}",
        expected=f"GPTQ and verify know {known}; bnb and rtn need no row",
    )
