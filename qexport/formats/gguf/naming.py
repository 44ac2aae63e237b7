"""GGUF's names of tensors, and the order of rows that llama.cpp wants in them.

Names come from gguf-py's maps. Sources: llama.cpp's `conversion/*.py`, gguf-py's `tensor_mapping.py`.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable, Mapping
from typing import Any

import torch

from qexport.errors import CorruptFileError, MissingDependencyError
from qexport.formats.gguf.rows import Row

_KIND = re.compile(r"^(?:blk\.\d+\.)?(?P<kind>\w+)(?:\.(?:weight|bias))?$")


def kind_of(name: str) -> str:
    """What a tensor is in any block: "attn_v", "ffn_down_exps", "token_embd"."""
    found = _KIND.match(name)
    return found["kind"] if found else name


def gguf_names(row: Row, blocks: int) -> Callable[[str], str | None]:
    """GGUF's name of a tensor in transformers' words, experts without their number (`mlp.experts.gate_proj`),
    by gguf-py's maps; None when there is none. MissingDependencyError without gguf.
    """
    try:
        from gguf import MODEL_ARCH_NAMES, get_tensor_name_map
    except ImportError as error:
        raise MissingDependencyError(
            "GGUF needs the package gguf", remedy="pip install 'qexport[gguf]'"
        ) from error
    arch = next(key for key, name in MODEL_ARCH_NAMES.items() if name == row.arch)
    names = get_tensor_name_map(arch, blocks)

    def name_of(tensor: str) -> str | None:
        found: str | None = names.get_name(tensor, try_suffixes=(".weight", ".bias"))
        return found

    return name_of


def row_order(rows: int, order: str, heads: int) -> torch.Tensor | None:
    """Numbers int64 [rows] of transformers' rows in the file's order; None when they go as they are.

    "rotary": a head's first and second half, [2, d/2], become neighbours, [d/2, 2].
    "qkv": each head's q, k and v, [heads, 3, d], become all q, all k and all v, [3, heads, d].
    """
    if not order:
        return None
    numbers = torch.arange(rows)
    if order == "rotary":
        return numbers.reshape(heads, 2, -1).transpose(1, 2).reshape(-1)
    return numbers.reshape(heads, 3, -1).transpose(0, 1).reshape(-1)


def order_of(row: Row, name: str, heads: Mapping[str, int]) -> tuple[str, int]:
    """The order of a tensor's rows and the number of heads it is for, ("", 0) where they go as they are."""
    kind = kind_of(name)
    order = row.orders.get(kind, "")
    return order, heads.get(kind, heads["attn_q"]) if order else 0


def is_plus_one(row: Row, name: str) -> bool:
    """Whether the file holds a norm's weight plus one."""
    return row.plus_one and name.endswith("norm.weight")


def whole_number(metadata: Mapping[str, Any], key: str) -> int:
    """A setting that a file must have, as a number; CorruptFileError without it."""
    value = metadata.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise CorruptFileError(f"the GGUF file's {key} is {value!r}, expected a whole number")
    return value


def short(value: float) -> float:
    """The number with the fewest digits that a 32-bit float holds as `value`: 1e-6, not 9.99999997e-07."""
    stored = struct.pack("<f", value)
    digits = (float(f"{value:.{count}g}") for count in range(1, 10))
    return next((number for number in digits if struct.pack("<f", number) == stored), value)
