"""Which of llama.cpp's pre-tokenizers splits text as a byte-level tokenizer.json does.

A GGUF names its pre-tokenizer (`tokenizer.ggml.pre`); llama.cpp has the splitting for each name built in. The
name is found by the published hash where the vocabulary is a published one (pretokenizer_hashes.py), else by
structure: the same pre_tokenizer as one in the table below, or one that splits the check texts alike.

Sources: llama.cpp's src/llama-vocab.cpp (`llm_tokenizer_bpe` keeps the tokenizer.json's own regex in
comments, and `llama_vocab::impl::load` says what each name implies). tests/test_gguf_vocabulary.py holds each
row against the real llama.cpp.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from qexport.errors import SpecError, UnsupportedModelError
from qexport.formats.gguf.tokenizer.pretokenizer_hashes import CHECK_TEXT, NAMES, name_by_hash

Node = Mapping[str, Any]  # a node of tokenizer.json

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_LETTERS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_REST_SLASH = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_CASED = rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+", rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
_DEEPSEEK_V3 = (
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_EXAONE_MOE = (
    rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?(?:\p{{L}}\p{{M}}*(?: \p{{L}}\p{{M}}*)*)+|\p{{N}}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]?|\s*[\r\n]|\s+(?!\S)|\s+"
)
_QWEN35 = (
    rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_SEED_CODER = (
    rf"{_CONTRACTIONS}|{_LETTERS}|\p{{N}}{{1}}| ?[^\s\p{{L}}\p{{N}}"
    "\r\n"
    r"]+|\s*["
    "\r\n"
    r"]+|\s+(?!\S)|\s+"
)
_BLOOM = r" ?[^(\s|[.,!?…。，、।۔،])]+"


def _split(pattern: str, *, isolated: bool = True) -> dict[str, Any]:
    behavior = "Isolated" if isolated else "Removed"
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": behavior, "invert": not isolated}


def _bytes(*, use_regex: bool = False) -> dict[str, Any]:
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": use_regex}


def _digits(*, individual: bool) -> dict[str, Any]:
    return {"type": "Digits", "individual_digits": individual}


@dataclass(frozen=True)
class Pretokenizer:
    """One of llama.cpp's: its name, the steps in tokenizer.json that it equals, and what the name implies
    there.

    `same` are names with the same splitting and merging; `adds_bos` is llama.cpp's default where the file
    does not say. `differs` is what llama.cpp is known to split otherwise than tokenizer.json, in a few words.
    """

    name: str
    steps: tuple[dict[str, Any], ...]
    ignore_merges: bool = False
    adds_bos: bool = False
    same: tuple[str, ...] = field(default=())
    differs: str = ""


_CASE_DIFFERS = "words with combining marks (Hindi, Khmer, ...) or with upper case outside ASCII (ÉCOLE)"

PRETOKENIZERS: tuple[Pretokenizer, ...] = (
    Pretokenizer(
        "gpt-2",
        (_bytes(use_regex=True),),
        same=(
            *(
                "phi-2",
                "gigachat",
                "jina-es",
                "jina-de",
                "jina-v1-en",
                "jina-v2-es",
                "jina-v2-de",
                "jina-v2-code",
            ),
            *(
                "a.x-4.0",
                "mellum",
                "modern-bert",
                "roberta-bpe",
                "mpt",
                "olmo",
                "jais",
                "trillion",
                "exaone4",
            ),
            "granite-docling",
        ),
    ),
    Pretokenizer(
        "smollm",
        (_digits(individual=True), _bytes(use_regex=True)),
        same=("starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"),
    ),
    Pretokenizer(
        "llama-bpe",
        (_split(rf"{_CONTRACTIONS}|{_LETTERS}|\p{{N}}{{1,3}}|{_REST}"), _bytes()),
        ignore_merges=True,
        adds_bos=True,
        same=("llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2", "jina-v5-nano"),
    ),
    Pretokenizer(
        "smaug-bpe",
        (_split(rf"{_CONTRACTIONS}|{_LETTERS}|\p{{N}}{{1,3}}|{_REST}"), _bytes()),
        same=("dbrx", "glm4", "chatglm-bpe"),
    ),
    Pretokenizer(
        "qwen2",
        (_split(rf"{_CONTRACTIONS}|{_LETTERS}|\p{{N}}|{_REST}"), _bytes()),
        same=(
            "deepseek-r1-qwen",
            "kormo",
            "f2llmv2",
            "stablelm2",
            "megrez",
            "hunyuan",
            "solar-open",
            "grok-2",
        ),
    ),
    Pretokenizer("qwen35", (_split(_QWEN35), _bytes())),
    Pretokenizer(
        "tekken",
        (_split(rf"{_CASED[0]}|{_CASED[1]}|\p{{N}}|{_REST_SLASH}"), _bytes()),
        ignore_merges=True,
        adds_bos=True,
        differs=_CASE_DIFFERS,
    ),
    Pretokenizer(
        "gpt-4o",
        (
            _split(
                rf"{_CASED[0]}{_CONTRACTIONS}?|{_CASED[1]}{_CONTRACTIONS}?|\p{{N}}{{1,3}}|{_REST_SLASH}",
            ),
            _bytes(),
        ),
        same=("llama4", "kanana2", "minimax-m2"),
        differs=_CASE_DIFFERS,
    ),
    Pretokenizer(
        "deepseek-v3",
        (_split(r"\p{N}{1,3}"), _split(r"[一-龥぀-ゟ゠-ヿ]+"), _split(_DEEPSEEK_V3), _bytes()),
        same=("hunyuan-dense", "joyai-llm"),
    ),
    Pretokenizer(
        "falcon",
        (
            {"type": "Punctuation", "behavior": "Contiguous"},
            _bytes(use_regex=True),
            _digits(individual=False),
            _split("[0-9][0-9][0-9]"),
        ),
    ),
    Pretokenizer(
        "bailingmoe",
        (
            _split(
                r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]"
                r"|\s+(?!\S)|\s+"
            ),
            _bytes(),
        ),
        same=("bailingmoe2",),
    ),
    Pretokenizer("seed-coder", (_split(_SEED_CODER), _bytes())),
    Pretokenizer("exaone-moe", (_split(_EXAONE_MOE), _bytes())),
    Pretokenizer("bloom", (_split(_BLOOM), _bytes()), same=("poro-chat", "gpt3-finnish")),
    Pretokenizer("viking", (_split(_BLOOM), _digits(individual=True), _bytes())),
)


def by_name(name: str) -> Pretokenizer | None:
    """The table's row of a name or of one that llama.cpp treats alike; None where the table has none."""
    return next((row for row in PRETOKENIZERS if name == row.name or name in row.same), None)


def steps_of(node: Node | None) -> Iterator[Node]:
    """The normalizers or pre-tokenizers that a node of tokenizer.json runs, one after the other."""
    if node is None:
        return
    if node.get("type") == "Sequence":
        for inner in node.get("normalizers") or node.get("pretokenizers") or ():
            yield from steps_of(inner)
    else:
        yield node


# Beside the published text: case changes, digits of other scripts, quotes, slashes, marks, runs of white
# space.
_PROBES = (
    CHECK_TEXT,
    "I'M sure, DON'T they'Re; camelCaseWords HTMLParser приветМИР ÉCOLE École's x86_64 v1.2.3 "
    "1,234,567.89 ٣٤٥ २०२४",
    "a/b//c\r\n/\n\n/ http://ex.org/?q=1&r=%20 #tag @me\t\t if (x==1) {\r\n\treturn y;\n}  \n \n  end   ",
    "नमस्ते दुनिया é e\u0301 ñ n\u0303 ไทย 한국어 日本語のテキスト、東京。中文，12字 "
    "مرحبا، بالعالم ۔ «quoted» “curly’s” ’tis … ½ Ⅷ ²",
    "(a|b)|c [x] {y} <|z|> a\u00a0b\u3000c  d's 's S 'S 'll'LL ''s\n's 12345678901",
)


def pretokenizer_name(tokenizer: Any, parts: Node) -> tuple[str, list[str]]:
    """The name for a byte-level tokenizer, and notes for the user.

    `tokenizer` is transformers', `parts` the content of its tokenizer.json. Raises UnsupportedModelError
    where nothing in llama.cpp is known to split alike.
    """
    found = name_by_hash(tokenizer.encode(CHECK_TEXT))
    if found is not None:
        row = by_name(found)
        return found, _difference(row)
    wanted = list(steps_of(parts.get("pre_tokenizer")))
    ignores = bool(parts["model"].get("ignore_merges"))
    fitting = [row for row in PRETOKENIZERS if _spelled(row.steps) == _spelled(wanted)]
    notes: list[str] = []
    if not fitting:
        pieces = _pieces(wanted)
        fitting = [row for row in PRETOKENIZERS if _pieces(row.steps) == pieces]
        if fitting:
            notes.append(
                f"pre-tokenizer: {fitting[0].name}, which splits {len(_PROBES)} check texts as this one"
            )
    if not fitting:
        raise UnsupportedModelError(
            f"a byte-level tokenizer whose pre-tokenizer is none that llama.cpp is known to have: "
            f"{json.dumps(parts.get('pre_tokenizer'), ensure_ascii=False)[:300]}",
            expected=f"one of {', '.join(row.name for row in PRETOKENIZERS)}",
            remedy="where you know the right one, name it: --pre-tokenizer NAME",
        )
    row = next((row for row in fitting if row.ignore_merges == ignores), fitting[0])
    if row.ignore_merges != ignores:
        notes.append(
            f"llama.cpp's {row.name} {'takes' if row.ignore_merges else 'does not take'} whole words from "
            "the vocabulary before it merges, this tokenizer does the opposite: rare words may get other ids"
        )
    return row.name, notes + _difference(row)


def require_known_name(name: str) -> None:
    """Raises SpecError for a name that llama.cpp does not take, as far as is known here."""
    if name not in NAMES and by_name(name) is None:
        raise SpecError(f"the pre-tokenizer {name!r}", expected=f"one of {', '.join(NAMES)}")


def _difference(row: Pretokenizer | None) -> list[str]:
    if row is None or not row.differs:
        return []
    return [f"llama.cpp's {row.name} splits {row.differs} otherwise than transformers: other ids there"]


def _spelled(steps: Sequence[Node]) -> list[tuple[Any, ...]]:
    """What decides the splitting, in a form that compares."""
    found: list[tuple[Any, ...]] = []
    for step in steps:
        kind = step.get("type")
        if kind == "ByteLevel":
            found.append((kind, step.get("use_regex", True)))
        elif kind == "Split":
            pattern = step["pattern"]
            found.append((kind, *pattern.items(), step["behavior"], step.get("invert", False)))
        else:
            found.append((kind, *sorted((k, v) for k, v in step.items() if k != "type")))
    return found


def _pieces(steps: Sequence[Node]) -> list[list[str]] | None:
    """The words that the steps make of each check text; None where the steps cannot be built."""
    from tokenizers import Tokenizer

    plain = {"add_prefix_space": False}
    steps = [{**step, **plain} if step.get("type") == "ByteLevel" else step for step in steps]
    content = {
        "version": "1.0",
        "added_tokens": [],
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": steps},
        "model": {"type": "BPE", "vocab": {}, "merges": []},
    }
    try:
        splitter = Tokenizer.from_str(json.dumps(content)).pre_tokenizer
        return [[piece for piece, _ in splitter.pre_tokenize_str(text)] for text in _PROBES]
    except Exception:  # tokenizers raises plain Exception for a pattern that it cannot compile
        return None
