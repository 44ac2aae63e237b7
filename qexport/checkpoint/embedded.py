"""Whether a model is the embedded one, or made of it: its packaged texts are for no other."""

from __future__ import annotations

from pathlib import Path

from qexport.checkpoint.disk import is_file
from qexport.checkpoint.hashing import file_hash
from qexport.packaged import embedded_base

_TOKENIZER = "tokenizer.json"


def is_embedded(model: Path) -> bool:
    """By the tokenizer, which everything made of the embedded model carries along."""
    return is_file(model / _TOKENIZER) and file_hash(model / _TOKENIZER) == file_hash(
        embedded_base() / _TOKENIZER
    )
