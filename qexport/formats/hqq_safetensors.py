"""HQQ's layout in safetensors alone, without the `qmodel.pt` that doubles the size; see `hqq.py`."""

from __future__ import annotations

from pathlib import Path

from qexport.formats.hqq import (
    EXPERTS,
    HOLDS_CONV1D,
    HOLDS_EMBEDDINGS,
    HOLDS_GROUP_ORDER,
    HOLDS_HEAD,
    METHOD,
    config_entries,
    decoder,
    encode,
    extra_files,
    grid_for,
    layout,
    obstacle,
)

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

NAME = "hqq-safetensors"


def finish(directory: Path) -> None:
    """Nothing: a checkpoint is its tensors and its config."""
