"""Byte-level BPE (GPT-2, Llama 3, Qwen, Mistral Nemo) as llama.cpp's tokenizer model "gpt2"."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qexport.errors import UnsupportedModelError
from qexport.formats.gguf.container import Metadata, array, text
from qexport.formats.gguf.tokenizer.pretokenizers import pretokenizer_name, require_known_name, steps_of
from qexport.formats.gguf.tokenizer.token_table import TokenTable, type_of_added

MODEL = "gpt2"
# Normalizers whose loss changes ids only for texts that are not in that form already.
_FORMS = ("NFC", "NFKC", "NFD", "NFKD")


def is_byte_level(parts: Mapping[str, Any]) -> bool:
    """Whether tokenizer.json's content turns bytes into letters before it merges."""
    nodes = (*steps_of(parts.get("normalizer")), *steps_of(parts.get("pre_tokenizer")))
    return any(node.get("type") == "ByteLevel" for node in nodes)


def byte_level_metadata(
    tokenizer: Any, parts: Mapping[str, Any], table: TokenTable, pre: str | None
) -> tuple[Metadata, str, list[str]]:
    """Tokens, types, merges and pre-tokenizer of a byte-level BPE; its name, and notes for the user.

    Sets the types of `table`. Raises UnsupportedModelError where llama.cpp has no such pre-tokenizer and the
    user names none, SpecError for a name that llama.cpp does not have.
    """
    from gguf import Keys

    notes: list[str] = []
    if pre is not None:
        require_known_name(pre)
    else:
        notes += _normalizer_notes(parts)
        pre, found = pretokenizer_name(tokenizer, parts)
        notes += found
    if any(node.get("add_prefix_space") for node in steps_of(parts.get("pre_tokenizer"))):
        notes.append(
            "this tokenizer puts a space before each text, llama.cpp does not: other ids for the first word"
        )
    for number, token in table.added.items():
        table.types[number] = type_of_added(token)
    keys = Keys.Tokenizer
    merges = (pair if isinstance(pair, str) else " ".join(pair) for pair in parts["model"]["merges"])
    return (
        {
            keys.MODEL: text(MODEL),
            keys.PRE: text(pre),
            keys.LIST: array("str", table.texts),
            keys.TOKEN_TYPE: array("i32", table.types),
            keys.MERGES: array("str", merges),
        },
        pre,
        notes,
    )


def _normalizer_notes(parts: Mapping[str, Any]) -> list[str]:
    """llama.cpp normalizes no text for a byte-level BPE. Raises UnsupportedModelError for more than a Unicode
    form."""
    kinds = [str(node.get("type")) for node in steps_of(parts.get("normalizer"))]
    forms = [kind for kind in kinds if kind in _FORMS]
    if others := [kind for kind in kinds if kind not in _FORMS]:
        raise UnsupportedModelError(
            f"a byte-level tokenizer with the normalizer {', '.join(others)}, which llama.cpp does not apply",
            remedy="where you can do without it, name the pre-tokenizer yourself: --pre-tokenizer NAME",
        )
    if not forms:
        return []
    return [
        f"llama.cpp does not bring text to the form {forms[0]}: decomposed letters (e + accent) get other ids"
    ]
