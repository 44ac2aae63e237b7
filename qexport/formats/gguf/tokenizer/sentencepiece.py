"""SentencePiece-like BPE (Llama 2, Mistral, Gemma, Phi-3) as llama.cpp's tokenizer model "llama".

llama.cpp merges the two neighbours whose joint text is the token with the highest score, again and again;
transformers merges by the rank of the pair. So the score here is minus the rank of the first merge that makes
the token: the same order. (llama.cpp's own converter writes -1000 for each token where it has tokenizer.json
alone.) A tokenizer.model becomes merges in transformers already, ranked by its scores.

Source: llama.cpp's src/llama-vocab.cpp, `llm_tokenizer_spm_session` and `llama_vocab::impl::tokenize`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qexport.errors import UnsupportedModelError, first_of
from qexport.formats.gguf.container import Metadata, array, boolean, text
from qexport.formats.gguf.tokenizer.pretokenizers import Node, steps_of
from qexport.formats.gguf.tokenizer.token_table import (
    BYTE,
    BYTE_TOKEN,
    NORMAL,
    UNKNOWN,
    USER_DEFINED,
    TokenTable,
    type_of_added,
)

MODEL = "llama"
MODEL_OF_SYMBOLS = "t5"  # llama.cpp's Unigram, which for single symbols is the same and knows what is unknown
PRE = "default"
SPACE = "▁"
_FORMS = ("NFC", "NFKC", "NFD", "NFKD", "Precompiled")
_UNUSED_SCORE = -1e4  # below anything that text could become


def is_sentencepiece(parts: Mapping[str, Any]) -> bool:
    """Whether tokenizer.json's content writes spaces as ▁ before it merges."""
    nodes = (*steps_of(parts.get("normalizer")), *steps_of(parts.get("pre_tokenizer")))
    return any(_is_space_step(node) for node in nodes)


def sentencepiece_metadata(parts: Mapping[str, Any], table: TokenTable) -> tuple[Metadata, str, list[str]]:
    """Tokens, scores, types and flags; the tokenizer model's name in llama.cpp, and notes for the user.

    Sets the types of `table`. Raises UnsupportedModelError for a normalizer that changes every text.
    """
    from gguf import Keys

    model = parts["model"]
    ranks = merge_ranks(parts)
    whole = {f"<0x{byte:02X}>" for byte in range(256)} <= model["vocab"].keys() and bool(
        model.get("byte_fallback")
    )
    kind = MODEL if ranks or whole else MODEL_OF_SYMBOLS
    prefix, notes = _spaces(parts, table)
    notes += _unknown_notes(model, whole=whole, symbols=kind == MODEL_OF_SYMBOLS)
    _set_types(parts, table, ranks)
    lowest = -float(len(model["merges"]) + 1)
    scores = [
        -float(ranks[word])
        if word in ranks and kept == NORMAL
        else lowest
        if kept == NORMAL
        else _UNUSED_SCORE + lowest
        if kind == MODEL_OF_SYMBOLS
        else 0.0
        for word, kept in zip(table.texts, table.types, strict=True)
    ]
    keys = Keys.Tokenizer
    return (
        {
            keys.MODEL: text(kind),
            keys.PRE: text(PRE),
            keys.LIST: array("str", table.texts),
            keys.SCORES: array("f32", scores),
            keys.TOKEN_TYPE: array("i32", table.types),
            keys.ADD_PREFIX: boolean(prefix),
            keys.REMOVE_EXTRA_WS: boolean(False),
        },
        kind,
        notes,
    )


def merge_ranks(parts: Mapping[str, Any]) -> dict[str, int]:
    """Token -> rank of the first merge that makes it."""
    ranks: dict[str, int] = {}
    for rank, pair in enumerate(parts["model"]["merges"]):
        left, right = pair.split(" ", 1) if isinstance(pair, str) else pair
        ranks.setdefault(left + right, rank)
    return ranks


def _set_types(parts: Mapping[str, Any], table: TokenTable, ranks: Mapping[str, int]) -> None:
    """The types; user-defined tokens get their spaces back, as llama.cpp looks for them in the raw text."""
    model = parts["model"]
    for word in model["vocab"]:
        if BYTE_TOKEN.fullmatch(word) and model.get("byte_fallback") and word in table.ids:
            table.types[table.ids[word]] = BYTE
    for number, token in table.added.items():
        kept = type_of_added(token)
        if kept == USER_DEFINED and SPACE in token["content"]:
            if token["content"] in ranks:  # Gemma's ▁▁: text has spaces there, so that merges make it
                kept = NORMAL
            elif (raw := token["content"].replace(SPACE, " ")) not in table.ids:
                table.texts[number] = raw
        table.types[number] = kept
    unknown = model.get("unk_token")
    if unknown in table.ids:
        table.types[table.ids[unknown]] = UNKNOWN


def _spaces(parts: Mapping[str, Any], table: TokenTable) -> tuple[bool, list[str]]:
    """Whether a space goes before each text, and in which texts llama.cpp does otherwise than
    transformers."""
    prefix = False
    notes: list[str] = []
    for node in steps_of(parts.get("normalizer")):
        kind = str(node.get("type"))
        if kind == "Prepend" and node.get("prepend") == SPACE:
            prefix = True
        elif kind in _FORMS:
            notes.append(
                f"llama.cpp does not bring text to the form {kind}: other ids for text that is not in it"
            )
        elif not _is_space_step(node):
            raise UnsupportedModelError(
                f"a SentencePiece-like tokenizer with the normalizer {kind}, which llama.cpp does not apply",
                expected="a Prepend and a Replace of spaces by ▁",
            )
    for node in steps_of(parts.get("pre_tokenizer")):
        kind = str(node.get("type"))
        if kind == "Metaspace":
            scheme = node.get("prepend_scheme", "always")
            prefix = scheme != "never"
            notes += _metaspace_notes(scheme, bool(node.get("split", True)), parts)
        elif kind != "Split" or node.get("pattern") != {"String": " "}:  # Gemma's, when spaces are gone
            notes.append(
                f"llama.cpp does not split where the pre-tokenizer {kind} does: tokens may cross there"
            )
    formed = [t["content"] for t in table.added.values() if t.get("normalized")]
    if formed and any(node.get("type") == "Prepend" for node in steps_of(parts.get("normalizer"))):
        notes.append(
            f"transformers looks for {first_of(formed)} in text that has its first space (▁) already, "
            "llama.cpp before: other ids where such a token begins a text, and after it"
        )
    return prefix, notes


def _unknown_notes(model: Node, *, whole: bool, symbols: bool) -> list[str]:
    """What becomes of characters that the vocabulary has no token for."""
    gives = model.get("unk_token") or "nothing"
    if symbols:
        notes = ["llama.cpp puts no space (▁) before a text of spaces alone; transformers does"]
        if gives == "nothing" or not model.get("fuse_unk"):
            notes.append(
                f"llama.cpp gives one unknown token for unknown characters in a row, transformers {gives}"
            )
        return notes
    if whole:
        return []
    return [
        "the vocabulary has no byte tokens: llama.cpp ends with std::out_of_range at a character outside it, "
        f"where transformers gives {gives}"
    ]


def _metaspace_notes(scheme: str, split: bool, parts: Mapping[str, Any]) -> list[str]:
    notes = []
    if scheme == "first":
        notes.append(
            "llama.cpp puts a space (▁) before text that follows a special token inside a text, and before "
            "text that begins with a space; transformers does neither with this tokenizer"
        )
    elif scheme == "always":
        notes.append(
            "llama.cpp puts a space (▁) before text that begins with a space, too; transformers does not"
        )
    crossing = [word for word in merge_ranks(parts) if SPACE in word[1:]] if split else []
    if crossing:
        notes.append(f"transformers splits text at each space, so that it never makes {first_of(crossing)}")
    return notes


def _is_space_step(node: Node) -> bool:
    if node.get("type") == "Metaspace":
        return bool(node.get("replacement", SPACE) == SPACE)
    replaces = node.get("type") == "Replace" and node.get("pattern") == {"String": " "}
    return replaces and bool(node.get("content") == SPACE)
