"""Which tokens end an answer, as the model's own files say."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qexport.checkpoint.checkpoint import read_json
from qexport.checkpoint.disk import is_file

_FILE = "generation_config.json"


def end_tokens(model: Path, config: Mapping[str, Any], tokenizer: Any) -> tuple[int, ...]:
    """All ids named as `eos_token_id` by generation_config.json, config.json or the tokenizer.

    Chat models often name their end of turn in generation_config.json alone.
    """
    generation = read_json(model / _FILE) if is_file(model / _FILE) else {}
    found: list[int] = []
    for named in (generation.get("eos_token_id"), config.get("eos_token_id"), tokenizer.eos_token_id):
        for token in named if isinstance(named, list) else [named]:
            if isinstance(token, int) and not isinstance(token, bool) and token not in found:
                found.append(token)
    return tuple(found)
