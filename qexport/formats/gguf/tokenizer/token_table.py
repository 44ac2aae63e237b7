"""The rows of a GGUF's vocabulary: one text and one type for each row of the embedding."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from qexport.errors import CorruptFileError, SpecError, first_of

# llama.cpp's token types (gguf.TokenType; enum llama_token_type in llama.h).
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")
# Tokens that steer a chat although their files do not call them special (llama.cpp's converter, for the same
# reason).
_LOOKS_SPECIAL = re.compile(r"<\|.*\|>|<｜.*｜>|<pad>|<mask>|<2mass>|\[@BOS@\]|<unused\d+>", re.DOTALL)


@dataclass
class TokenTable:
    """What is known of each row while the vocabulary is built.

    `texts` and `types` are as long as the embedding has rows; `added` are the rows that tokenizer.json has as
    added tokens, with their flags, and `dropped` the added tokens that no row is left for.
    """

    texts: list[str]
    types: list[int]
    added: dict[int, Mapping[str, Any]]
    dropped: tuple[str, ...] = ()
    ids: dict[str, int] = field(default_factory=dict)


def token_table(parts: Mapping[str, Any], vocab_size: int, in_use: Callable[[str, int], bool]) -> TokenTable:
    """The rows of a tokenizer.json's content for an embedding of `vocab_size` rows, types not yet set.

    Rows without a token become [PADn] of type unused. An added token beyond the last row is dropped where
    `in_use` of its text and id says no (Gemma 3 has one for images, which its text models have no row for).
    Raises SpecError where a token that is needed has no row, and CorruptFileError where two tokens share one.
    """
    texts: dict[int, str] = {}
    beyond: list[str] = []
    for text, number in parts["model"]["vocab"].items():
        if number >= vocab_size:
            beyond.append(text)
        elif texts.setdefault(number, text) != text:
            raise CorruptFileError(
                f"the tokenizer has two tokens with the id {number}: {texts[number]!r}, {text!r}"
            )
    added: dict[int, Mapping[str, Any]] = {}
    dropped: list[str] = []
    for token in parts.get("added_tokens") or ():
        number, text = token["id"], token["content"]
        if number < vocab_size:
            texts[number] = text
            added[number] = token
        elif in_use(text, number):
            beyond.append(text)
        else:
            dropped.append(text)
    beyond = [text for text in beyond if text not in dropped]
    if beyond:
        raise SpecError(
            f"tokens for which the embedding has no row ({vocab_size} rows): {first_of(beyond)}",
            remedy="resize the model's embedding (model.resize_token_embeddings(len(tokenizer))) and "
            "train it, or put the model's own tokenizer beside it",
        )
    rows = [texts.get(number, "") for number in range(vocab_size)]
    types = [NORMAL if number in texts else UNUSED for number in range(vocab_size)]
    taken = set(texts.values())
    for number, text in enumerate(rows):
        if types[number] == UNUSED:
            rows[number] = next(name for name in _pad_names(number) if name not in taken)
        elif not text:  # llama.cpp gives it this name itself, and warns
            rows[number] = f"[EMPTY_{number}]"
    ids = {text: number for number, text in enumerate(rows)}
    if len(ids) != vocab_size:  # llama.cpp does not load such a file
        twice = sorted({text for number, text in enumerate(rows) if ids[text] != number})
        raise CorruptFileError(f"the tokenizer has tokens twice: {first_of(twice)}")
    return TokenTable(rows, types, added, tuple(dropped), ids)


def type_of_added(token: Mapping[str, Any]) -> int:
    """Control tokens llama.cpp shows to nobody and parses where asked to; user-defined ones are text that it
    never splits."""
    special = token.get("special") or _LOOKS_SPECIAL.fullmatch(token["content"])
    return CONTROL if special else USER_DEFINED


def _pad_names(number: int) -> Iterator[str]:
    name = f"[PAD{number}]"
    while True:
        yield name
        name += "_"
