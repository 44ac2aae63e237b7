"""What each matrix of a finished model lost, as its manifest tells it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qexport.checkpoint.gguf_files import gguf_files
from qexport.checkpoint.manifest import read_figures
from qexport.errors import QexportError


def layer_errors(model: Path) -> dict[str, float]:
    """|W' - W| / |W| by transformers' names, without `.weight`; empty where nothing tells.

    `model` is a directory that qexport made, or one of its GGUF files.
    """
    figures = read_figures(model if model.is_dir() else model.parent)
    files = figures.get("files")
    if not isinstance(files, dict):
        return _values(figures.get("tensor_errors"), {})
    found = [model] if model.is_file() else gguf_files(model)
    told = files.get(found[0].name) if found else None
    return _values(told.get("tensor_errors"), _gguf_names(found[0])) if isinstance(told, dict) else {}


def _values(errors: Any, names: Mapping[str, str]) -> dict[str, float]:
    found: dict[str, float] = {}
    for error in errors if isinstance(errors, list) else []:
        if isinstance(error, dict) and isinstance(error.get("relative"), (int, float)):
            name = str(error.get("tensor"))
            found[names.get(name, name).removesuffix(".weight")] = float(error["relative"])
    return found


def _gguf_names(file: Path) -> dict[str, str]:
    """GGUF's names in transformers' words, an expert's with its number; none where they cannot be told."""
    from qexport.formats.gguf.reading import places
    from qexport.formats.gguf.splitting import read_model

    try:
        origins = places(read_model(file))
    except QexportError:
        return {}
    return {
        origin.tensor if origin.expert is None else f"{origin.tensor}[{origin.expert}]": name
        for name, origin in origins.items()
    }
