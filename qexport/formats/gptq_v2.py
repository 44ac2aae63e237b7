"""AutoGPTQ's layout, in version 2 always: zero points are stored as they are.

All else is as in `gptq.py`, which writes this version too where version 1 cannot hold the zero points.
"""

from __future__ import annotations

from typing import Any

import torch

from qexport.formats.format import Facts
from qexport.formats.gptq import (
    EXPERTS,
    HOLDS_CONV1D,
    HOLDS_EMBEDDINGS,
    HOLDS_GROUP_ORDER,
    HOLDS_HEAD,
    METHOD,
    decoder,
    encode_as,
    entries_as,
    extra_files,
    finish,
    grid_for,
    layout,
    obstacle,
)
from qexport.grids.integer import IntegerCodes, IntegerGrid

__all__ = [
    "EXPERTS",
    "HOLDS_CONV1D",
    "HOLDS_EMBEDDINGS",
    "HOLDS_GROUP_ORDER",
    "HOLDS_HEAD",
    "METHOD",
    "NAME",
    "config_entries",
    "decoder",
    "encode",
    "extra_files",
    "finish",
    "grid_for",
    "layout",
    "obstacle",
]

NAME = "gptq_v2"


def encode(module: str, codes: IntegerCodes, grid: IntegerGrid) -> dict[str, torch.Tensor]:
    """The layer's tensors, named and shaped as `layout` says."""
    return encode_as(NAME, module, codes, grid)


def config_entries(facts: Facts) -> dict[str, Any]:
    """config.json's `quantization_config`; symmetric and asymmetric layers may stand side by side."""
    return entries_as(NAME, facts)
