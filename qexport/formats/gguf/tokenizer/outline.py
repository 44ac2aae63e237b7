"""tokenizer.json without its vocabulary, as one GGUF setting more, so that the way back is exact.

GGUF has no place for a normalizer, a decoder or an added token's flags; llama.cpp passes over settings that
it does not know. The setting is a few hundred bytes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qexport.errors import CorruptFileError
from qexport.formats.gguf.container import Metadata, text
from qexport.formats.gguf.tokenizer.token_table import TokenTable

KEY = "qexport.tokenizer.outline"
USUAL_FLAGS: Mapping[str, bool] = {
    "single_word": False,
    "lstrip": False,
    "rstrip": False,
    "normalized": False,
}
_STEPS = ("normalizer", "pre_tokenizer", "post_processor", "decoder")
_MODEL = ("unk_token", "fuse_unk", "byte_fallback", "ignore_merges")


@dataclass(frozen=True)
class Outline:
    """What tokenizer.json says beside its vocabulary.

    `steps` are its normalizer, pre_tokenizer, post_processor and decoder; `model` the model's flags;
    `special` the added tokens by id, and whether they are special; `flags` their unusual flags, and their
    text where the file has another (a ▁ for a space).
    """

    steps: Mapping[str, Any]
    model: Mapping[str, Any]
    special: Mapping[int, bool]
    flags: Mapping[int, Mapping[str, Any]]


def outline_metadata(parts: Mapping[str, Any], table: TokenTable) -> Metadata:
    """The setting for a tokenizer.json's content and its rows in the file."""
    flags = {}
    for number, token in table.added.items():
        unusual = {
            name: bool(token.get(name))
            for name, usual in USUAL_FLAGS.items()
            if bool(token.get(name)) != usual
        }
        if token["content"] != table.texts[number]:
            unusual["content"] = token["content"]
        if unusual:
            flags[number] = unusual
    outline = {
        "steps": {name: parts.get(name) for name in _STEPS},
        "model": {name: parts["model"].get(name) for name in _MODEL},
        "special": {number: bool(token.get("special")) for number, token in table.added.items()},
        "flags": flags,
    }
    return {KEY: text(json.dumps(outline, ensure_ascii=False))}


def read_outline(metadata: Metadata) -> Outline | None:
    """The outline in a GGUF's settings; None in a file that others wrote. Raises CorruptFileError."""
    if KEY not in metadata:
        return None
    try:
        found = json.loads(metadata[KEY].value)
        return Outline(
            {name: found["steps"][name] for name in _STEPS},
            {name: found["model"][name] for name in _MODEL},
            {int(number): bool(special) for number, special in found["special"].items()},
            {int(number): dict(flags) for number, flags in found["flags"].items()},
        )
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise CorruptFileError(f"the GGUF's setting {KEY} is no outline of a tokenizer ({reason})") from error
