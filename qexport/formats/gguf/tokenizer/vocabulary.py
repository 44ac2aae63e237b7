"""A model's tokenizer as GGUF settings, so that llama.cpp gives text the ids that transformers gives it.

What counts is the tokenizer that transformers makes of the directory (its backend, written out as
tokenizer.json): the tokenizer's class may change what the file says, and a directory with tokenizer.model
alone has no such file.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from qexport.checkpoint.disk import is_file
from qexport.errors import CalibrationError, MissingDependencyError, UnsupportedModelError
from qexport.events import Noted, OnEvent, ignore
from qexport.formats.gguf.container import Metadata
from qexport.formats.gguf.tokenizer.byte_level import byte_level_metadata, is_byte_level
from qexport.formats.gguf.tokenizer.outline import outline_metadata
from qexport.formats.gguf.tokenizer.sentencepiece import PRE, is_sentencepiece, sentencepiece_metadata
from qexport.formats.gguf.tokenizer.special_tokens import (
    SpecialTokens,
    chat_templates,
    special_tokens,
    template_metadata,
)
from qexport.formats.gguf.tokenizer.token_table import token_table
from qexport.modeling.tokenizer import load_tokenizer

KNOWN_KINDS = (
    "byte-level BPE (GPT-2, Llama 3, Qwen, Mistral Nemo) and "
    "SentencePiece BPE (Llama 2, Mistral, Gemma, Phi-3)"
)


@dataclass(frozen=True)
class Vocabulary:
    """The settings for the file, and what they say in plain form.

    `metadata` holds all `tokenizer.*` settings. `model` is llama.cpp's tokenizer model ("gpt2", "llama",
    "t5"), `pre` its pre-tokenizer, `tokens` the text of each row. `notes` say in which texts llama.cpp's ids
    differ from transformers', and what else the user should know.
    """

    metadata: Metadata
    model: str
    pre: str
    tokens: tuple[str, ...]
    special: SpecialTokens
    chat_template: str | None
    notes: tuple[str, ...]


def vocabulary(
    directory: Path,
    *,
    vocab_size: int,
    pre: str | None = None,
    trust_remote_code: bool = False,
    on_event: OnEvent = ignore,
) -> Vocabulary:
    """The tokenizer in `directory` for an embedding of `vocab_size` rows.

    `pre` names llama.cpp's pre-tokenizer where it is known better than found out (byte-level BPE only).
    Raises UnsupportedModelError for no tokenizer, for a kind that llama.cpp has no place for and for a
    pre-tokenizer that it is not known to have; SpecError for a wrong `pre` and for tokens that have no row;
    CorruptFileError for two tokens of one text or one id; MissingDependencyError without gguf.
    """
    _require_packages(directory)
    try:
        tokenizer = load_tokenizer(directory, trust_remote_code=trust_remote_code)
    except CalibrationError as error:
        raise UnsupportedModelError(
            error.found, expected=f"known are {KNOWN_KINDS}", remedy=error.remedy
        ) from error
    parts = _parts(tokenizer, directory)
    templates = chat_templates(tokenizer)

    def in_use(text: str, number: int) -> bool:
        roles = (
            tokenizer.bos_token_id,
            tokenizer.eos_token_id,
            tokenizer.pad_token_id,
            tokenizer.unk_token_id,
        )
        return number in roles or any(text in template for template in templates.values())

    table = token_table(parts, vocab_size, in_use)
    special = special_tokens(tokenizer, directory, table.ids, templates)
    if is_byte_level(parts):
        metadata, name, notes = byte_level_metadata(tokenizer, parts, table, pre)
        model = "gpt2"
    elif is_sentencepiece(parts):
        metadata, model, notes = sentencepiece_metadata(parts, table)
        name = PRE
        if pre is not None:
            notes.append(
                f"the pre-tokenizer {pre} is not used: a SentencePiece-like tokenizer has none in llama.cpp"
            )
    else:
        raise UnsupportedModelError(
            f"the tokenizer of {directory}, a BPE that neither works on bytes nor writes spaces as ▁",
            expected=f"known are {KNOWN_KINDS}",
        )
    if table.dropped:
        notes.append(f"left out, as the embedding has no rows for them: {', '.join(table.dropped)}")
    metadata |= special.metadata() | template_metadata(templates) | outline_metadata(parts, table)
    notes += special.notes
    for note in notes:
        on_event(Noted(f"tokenizer: {note}"))
    return Vocabulary(
        metadata, model, name, tuple(table.texts), special, templates.get("default"), tuple(notes)
    )


def _require_packages(directory: Path) -> None:
    if find_spec("gguf") is None:
        raise MissingDependencyError(
            "the package gguf is not installed", remedy="pip install 'qexport[gguf]'"
        )
    lone = is_file(directory / "tokenizer.model") and not is_file(directory / "tokenizer.json")
    if lone and find_spec("sentencepiece") is None:
        raise MissingDependencyError(
            f"{directory} has a tokenizer.model and no tokenizer.json, which takes the package sentencepiece",
            remedy="pip install sentencepiece protobuf",
        )


def _parts(tokenizer: Any, directory: Path) -> Mapping[str, Any]:
    """The tokenizer as tokenizer.json's content. Raises UnsupportedModelError where it is no BPE."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise UnsupportedModelError(
            f"the tokenizer of {directory} is {type(tokenizer).__name__}, which has no tokenizer.json",
            expected=f"known are {KNOWN_KINDS}",
        )
    parts: dict[str, Any] = json.loads(backend.to_str())
    model = parts["model"]
    affixes = [key for key in ("continuing_subword_prefix", "end_of_word_suffix") if model.get(key)]
    if model["type"] != "BPE" or affixes:
        found = f"{model['type']} with {affixes[0]}" if affixes else model["type"]
        raise UnsupportedModelError(
            f"the tokenizer of {directory} is of the kind {found}", expected=f"known are {KNOWN_KINDS}"
        )
    return parts
