"""A GGUF's vocabulary as the Hugging Face files: tokenizer.json, tokenizer_config.json,
special_tokens_map.json.

The tokenizer.json does what llama.cpp does with the same settings: its pre-tokenizer is the named one's, the
merges of a SentencePiece-like vocabulary are put in the order of the scores. A file that qexport wrote says
beside it what GGUF has no place for (tokenizer_outline.py).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from qexport.errors import CorruptFileError
from qexport.events import Noted, OnEvent, ignore
from qexport.formats.gguf.container import Metadata
from qexport.formats.gguf.tokenizer.outline import USUAL_FLAGS, Outline, read_outline
from qexport.formats.gguf.tokenizer.pretokenizers import by_name
from qexport.formats.gguf.tokenizer.sentencepiece import SPACE
from qexport.formats.gguf.tokenizer.token_table import BYTE, CONTROL, NORMAL, UNKNOWN, UNUSED, USER_DEFINED

_PADDING = re.compile(r"\[PAD\d+\]_*")
_ROLES = {
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "unk_token": "unknown_token_id",
    "sep_token": "seperator_token_id",  # GGUF's own spelling
    "pad_token": "padding_token_id",
    "mask_token": "mask_token_id",
}
_LLAMA_DEFAULTS = {"bos_token": 1, "eos_token": 2, "unk_token": 0}  # llama.cpp's, where a file says nothing
_LONGEST_MERGED = 1024  # characters; a longer token would only cost time, squared
_BYTES = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}


def tokenizer_files(metadata: Metadata, on_event: OnEvent = ignore) -> dict[str, str]:
    """File names and contents; empty, with a note to `on_event`, where the kind of vocabulary is not known
    here.

    Known are "llama" (SentencePiece BPE) and "gpt2" (byte-level BPE) with a pre-tokenizer of the table.
    Raises CorruptFileError for lists that do not fit together.
    """
    model = _value(metadata, "tokenizer.ggml.model")
    outline = read_outline(metadata)
    if model not in ("llama", "gpt2", "t5") or (model == "t5" and outline is None):
        on_event(
            Noted(f"no tokenizer written: llama.cpp's tokenizer model {model!r} has no counterpart here")
        )
        return {}
    pre = _value(metadata, "tokenizer.ggml.pre")
    if model == "gpt2" and outline is None and by_name(str(pre)) is None:
        on_event(Noted(f"no tokenizer written: the pre-tokenizer {pre!r} has no counterpart here"))
        return {}
    tokens, types = _rows(metadata)
    roles = _roles(metadata, tokens, model)
    parts = _byte_level(metadata, tokens, types, outline) if model == "gpt2" else None
    if parts is None:
        parts = _sentencepiece(metadata, tokens, types, outline, roles)
    parts = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": _added(tokens, types, outline, roles),
        "normalizer": None,
        "pre_tokenizer": None,
        "post_processor": _post_processor(metadata, roles, model),
        "decoder": None,
        **parts,
    }
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_max_length": 10**30,
        **{role: text for role, (_, text) in roles.items()},
    }
    if templates := _templates(metadata):
        config["chat_template"] = templates
    return {
        "tokenizer.json": json.dumps(parts, ensure_ascii=False),
        "tokenizer_config.json": json.dumps(config, ensure_ascii=False, indent=2) + "\n",
        "special_tokens_map.json": json.dumps(
            {role: text for role, (_, text) in roles.items()}, ensure_ascii=False, indent=2
        )
        + "\n",
    }


def _value(metadata: Metadata, key: str) -> Any:
    return metadata[key].value if key in metadata else None


def _rows(metadata: Metadata) -> tuple[list[str], list[int]]:
    """The tokens and their types, without the padding that fills up an embedding."""
    tokens = _value(metadata, "tokenizer.ggml.tokens")
    if not isinstance(tokens, list) or not tokens or not all(isinstance(word, str) for word in tokens):
        raise CorruptFileError("the GGUF's tokenizer.ggml.tokens is no list of texts")
    types = _value(metadata, "tokenizer.ggml.token_type") or [NORMAL] * len(tokens)
    if not isinstance(types, list) or len(types) != len(tokens):
        raise CorruptFileError(f"the GGUF has {len(tokens)} tokens, and not as many token types")
    if len(set(tokens)) != len(tokens):
        raise CorruptFileError("the GGUF has a token twice")
    count = len(tokens)
    while count and types[count - 1] == UNUSED and _PADDING.fullmatch(tokens[count - 1]):
        count -= 1
    return tokens[:count], types[:count]


def _roles(metadata: Metadata, tokens: list[str], model: str) -> dict[str, tuple[int, str]]:
    """Role -> id and text of the special tokens that the file has."""
    found = {}
    for role, key in _ROLES.items():
        number = _value(metadata, f"tokenizer.ggml.{key}")
        if number is None and model == "llama":
            number = _LLAMA_DEFAULTS.get(role)
        if isinstance(number, int) and 0 <= number < len(tokens):
            found[role] = (number, tokens[number])
    return found


def _added(
    tokens: list[str],
    types: list[int],
    outline: Outline | None,
    roles: Mapping[str, tuple[int, str]],
) -> list[dict[str, Any]]:
    """The tokens that are found in the raw text, in the order of their ids."""
    if outline is not None:
        special, flags = outline.special, outline.flags
    else:
        kinds = {CONTROL: True, UNKNOWN: True, USER_DEFINED: False}
        special = {number: kinds[kind] for number, kind in enumerate(types) if kind in kinds}
        # Roles too: GPT-2's file calls its end of text normal, and llama.cpp makes it special by its name.
        special = {**special, **{number: True for number, _ in roles.values()}}
        flags = {}
    return [
        {
            "id": number,
            "content": tokens[number],
            "special": special[number],
            **USUAL_FLAGS,
            **flags.get(number, {}),
        }
        for number in sorted(special)
        if 0 <= number < len(tokens)
    ]


def _byte_level(
    metadata: Metadata, tokens: list[str], types: list[int], outline: Outline | None
) -> dict[str, Any]:
    merges = [_pair(word) for word in _value(metadata, "tokenizer.ggml.merges") or ()]
    row = by_name(str(_value(metadata, "tokenizer.ggml.pre")))
    model = {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": row is not None and row.ignore_merges,
        "vocab": {word: number for number, word in enumerate(tokens)},
        "merges": merges,
    }
    if outline is not None:
        return {**outline.steps, "model": {**model, **outline.model}}
    return {
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": list(row.steps if row else ())},
        "decoder": _BYTES,
        "model": model,
    }


def _sentencepiece(
    metadata: Metadata,
    tokens: list[str],
    types: list[int],
    outline: Outline | None,
    roles: Mapping[str, tuple[int, str]],
) -> dict[str, Any]:
    scores = _value(metadata, "tokenizer.ggml.scores") or [0.0] * len(tokens)
    if not isinstance(scores, list) or len(scores) < len(tokens):
        raise CorruptFileError(f"the GGUF has {len(tokens)} tokens, and not as many scores")
    model = {
        "type": "BPE",
        "dropout": None,
        "unk_token": roles["unk_token"][1] if "unk_token" in roles else None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": True,
        "byte_fallback": BYTE in types,
        "ignore_merges": False,
        "vocab": {word: number for number, word in enumerate(tokens)},
        "merges": _merges_of_scores(tokens, types, scores),
    }
    if outline is not None:
        # A user-defined token has its spaces in the file, tokenizer.json may have ▁ for them.
        texts = {
            number: str(flags["content"]) for number, flags in outline.flags.items() if "content" in flags
        }
        model["vocab"] = {texts.get(number, word): number for number, word in enumerate(tokens)}
        return {**outline.steps, "model": {**model, **outline.model}}
    prefix = _value(metadata, "tokenizer.ggml.add_space_prefix")
    prefix = prefix is None or bool(prefix)
    normalizers: list[dict[str, Any]] = [{"type": "Prepend", "prepend": SPACE}] if prefix else []
    normalizers.append({"type": "Replace", "pattern": {"String": " "}, "content": SPACE})
    decoders: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if prefix:
        decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    return {
        "normalizer": {"type": "Sequence", "normalizers": normalizers},
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": model,
    }


def _merges_of_scores(tokens: list[str], types: list[int], scores: list[float]) -> list[tuple[str, str]]:
    """All pairs of tokens that make a token, the highest score first: what llama.cpp would join, in its
    order."""
    mergeable = {word: number for number, word in enumerate(tokens) if types[number] in (NORMAL, UNUSED)}
    found: list[tuple[float, int, str, str]] = []
    for word, number in mergeable.items():
        for cut in range(1, len(word) if len(word) <= _LONGEST_MERGED else 0):
            left, right = word[:cut], word[cut:]
            if left in mergeable and right in mergeable:
                found.append((-scores[number], number, left, right))
    found.sort(key=lambda merge: merge[:2])
    return [(left, right) for _, _, left, right in found]


def _pair(merge: object) -> tuple[str, str]:
    """A merge as GGUF has it, two tokens with a space between; the first may begin with one."""
    text = str(merge)
    cut = text.find(" ", 1)
    if cut < 0:
        raise CorruptFileError(f"the GGUF's merge {text!r} is no pair of tokens")
    return text[:cut], text[cut + 1 :]


def _post_processor(
    metadata: Metadata, roles: Mapping[str, tuple[int, str]], model: str
) -> dict[str, Any] | None:
    """Opens and closes texts as the file says, or as llama.cpp does where it says nothing."""
    row = by_name(str(_value(metadata, "tokenizer.ggml.pre"))) if model == "gpt2" else None
    opens = _value(metadata, "tokenizer.ggml.add_bos_token")
    opens = (model == "llama" or (row is not None and row.adds_bos)) if opens is None else bool(opens)
    closes = bool(_value(metadata, "tokenizer.ggml.add_eos_token"))
    ends = [
        role for role, wanted in (("bos_token", opens), ("eos_token", closes)) if wanted and role in roles
    ]
    if not ends:
        return None
    single: list[dict[str, Any]] = [{"Sequence": {"id": "A", "type_id": 0}}]
    second: list[dict[str, Any]] = [{"Sequence": {"id": "B", "type_id": 1}}]
    for role in ends:
        first = {"SpecialToken": {"id": roles[role][1], "type_id": 0}}
        other = {"SpecialToken": {"id": roles[role][1], "type_id": 1}}
        single = [first, *single] if role == "bos_token" else [*single, first]
        second = [other, *second] if role == "bos_token" else [*second, other]
    named = {roles[role][1]: roles[role][0] for role in ends}
    return {
        "type": "TemplateProcessing",
        "single": single,
        "pair": [*single, *second],
        "special_tokens": {t: {"id": t, "ids": [number], "tokens": [t]} for t, number in named.items()},
    }


def _templates(metadata: Metadata) -> str | list[dict[str, str]] | None:
    """The chat template, or several by name, as tokenizer_config.json has them."""
    default = _value(metadata, "tokenizer.chat_template")
    names = _value(metadata, "tokenizer.chat_templates") or ()
    named = {str(name): _value(metadata, f"tokenizer.chat_template.{name}") for name in names}
    others = [{"name": name, "template": template} for name, template in named.items() if template]
    if not others:
        return str(default) if default else None
    return ([{"name": "default", "template": str(default)}] if default else []) + others
