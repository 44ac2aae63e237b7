"""Prompt sets: each form that people keep gives the same prompts, and what is none is told by its place."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from qexport.errors import CalibrationError
from qexport.packaged import heldout_pairs
from qexport.verification.prompts import Prompt, prompt_of, read_prompts
from tests.conftest import shared

USER = {"role": "user", "content": "Q"}
ANSWER = {"role": "assistant", "content": "A"}
SYSTEM = {"role": "system", "content": "S"}


def written(path: Path, *records: Any) -> Path:
    path.write_text("\n".join(map(json.dumps, records)), encoding="utf-8")
    return path


def plain(prompt: Prompt) -> tuple[list[dict[str, str]], str | None]:
    return [dict(message) for message in prompt.messages], prompt.reference


FORMS: list[tuple[dict[str, Any], list[dict[str, str]], str | None]] = [
    ({"prompt": "Q", "reference": "A"}, [USER], "A"),
    ({"prompt": "Q", "reference": None}, [USER], None),
    ({"prompt": "Q", "reference": " \n"}, [USER], None),
    ({"prompt": "Q"}, [USER], None),
    ({"prompt": "Q", "reference": "A", "output": "another model's"}, [USER], "A"),
    ({"system": "S", "prompt": "Q", "reference": "A"}, [SYSTEM, USER], "A"),
    ({"instruction": "Q", "input": "", "output": "A"}, [USER], "A"),
    ({"instruction": "Q", "input": "x", "output": "A"}, [{"role": "user", "content": "Q\nx"}], "A"),
    ({"instruction": "Q", "input": "x"}, [{"role": "user", "content": "Q\nx"}], None),
    ({"instruction": "Q", "output": "", "text": "### Instruction: Q"}, [USER], None),
    ({"question": "Q", "answer": "A", "source": "a web page"}, [USER], "A"),
    ({"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]}, [USER], "A"),
    (
        {"system": "S", "conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]},
        [SYSTEM, USER],
        "A",
    ),
    (
        {
            "conversations": [
                {"from": "system", "value": "S"},
                {"from": "human", "value": "Q"},
                {"from": "gpt", "value": "A"},
                {"from": "human", "value": "Q"},
                {"from": "gpt", "value": "the last"},
            ]
        },
        [SYSTEM, USER, ANSWER, USER],
        "the last",
    ),
    ({"messages": [SYSTEM, USER, ANSWER]}, [SYSTEM, USER], "A"),
    ({"messages": [USER, ANSWER, USER]}, [USER, ANSWER, USER], None),  # asks, and is not answered
    ({"messages": [USER]}, [USER], None),
    ({"translation": {"de": "Q", "en": "A"}}, [USER], "A"),
    ({"translation": {"de": "Q", "en": None}}, [USER], None),
    ({"source": "Q", "target": "A"}, [USER], "A"),
    ({"source": "Q"}, [USER], None),
]


@pytest.mark.parametrize(("record", "messages", "reference"), FORMS)
def test_every_form(
    record: dict[str, Any], messages: list[dict[str, str]], reference: str | None, tmp_path: Path
) -> None:
    (found,) = read_prompts(written(tmp_path / "a.jsonl", record))
    assert plain(found) == (messages, reference)
    assert found.where == f"record 1 of {tmp_path / 'a.jsonl'}"


def test_a_file_may_mix_the_forms(tmp_path: Path) -> None:
    records = [record for record, _, _ in FORMS]
    expected = [(messages, reference) for _, messages, reference in FORMS]
    assert [plain(prompt) for prompt in read_prompts(written(tmp_path / "a.jsonl", *records))] == expected
    (tmp_path / "a.json").write_text(json.dumps(records, indent=1))
    assert [plain(prompt) for prompt in read_prompts(tmp_path / "a.json")] == expected


def test_texts_alone_are_prompts(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('["one", "two\\nlines"]')
    assert [(prompt.text, prompt.reference) for prompt in read_prompts(tmp_path / "a.json")] == [
        ("one", None),
        ("two\nlines", None),
    ]
    (tmp_path / "a.txt").write_bytes("\ufeffWas ist das?\r\n\r\n  Und\u2028das?  \r\n".encode())
    lines = read_prompts(tmp_path / "a.txt")
    assert [prompt.text for prompt in lines] == ["Was ist das?", "Und\u2028das?"]
    assert lines[1] == prompt_of("Und\u2028das?", where=f"line 3 of {tmp_path / 'a.txt'}")


def test_translations_both_ways_and_in_words(tmp_path: Path) -> None:
    file = written(tmp_path / "a.jsonl", {"translation": {"de": "Hund {source}", "en": "dog", "fr": "chien"}})
    wording = "German: {source}\nEnglish:"
    (found,) = read_prompts(file, languages=("de", "en"), wording=wording)
    assert (found.text, found.reference) == ("German: Hund {source}\nEnglish:", "dog")
    (found,) = read_prompts(file, languages=("en", "fr"))
    assert (found.text, found.reference) == ("dog", "chien")
    with pytest.raises(CalibrationError, match=r"has de, en, fr; texts in two languages; name the source's"):
        read_prompts(file)
    with pytest.raises(CalibrationError, match=r"has de, en, fr; texts in de and ru"):
        read_prompts(file, languages=("de", "ru"))
    with pytest.raises(CalibrationError, match=r"has no place for a text; {source} in it"):
        read_prompts(file, wording="Translate")
    pair = written(tmp_path / "b.jsonl", {"source": "Hund", "target": "dog"}, {"prompt": "Q"})
    assert [prompt.text for prompt in read_prompts(pair, wording=wording)] == ["German: Hund\nEnglish:", "Q"]


def test_what_goes_into_a_template_is_kept(tmp_path: Path) -> None:
    tools = [{"type": "function", "function": {"name": "f"}}]
    call = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}
    result = {"role": "tool", "content": "3", "name": "f"}
    file = written(tmp_path / "a.jsonl", {"messages": [USER, call, result, ANSWER], "tools": tools})
    (found,) = read_prompts(file)
    assert plain(found) == ([USER, call, result], "A")
    assert found.tools == tuple(tools)
    assert found.text == "Q\n3"


@pytest.mark.parametrize(
    ("record", "pattern"),
    [
        (
            {"body": "x", "n": 1},
            r'has no prompt that is known by its keys \(it has body: str, n: int\); {"prompt"',
        ),
        ({"text": "a text of training data"}, r"known by its keys \(it has text: str\)"),
        ({}, r"\(it has nothing\)"),
        (3, "is a number"),
        ({"prompt": "  "}, "it asks nothing"),
        ({"source": "", "target": "A"}, "it asks nothing"),
        ({"messages": [SYSTEM, ANSWER]}, "it asks nothing"),
        ({"messages": []}, "conversation without messages"),
        ({"messages": [{"role": "alien", "content": "x"}]}, r"message 1 of record 2 .* has the role 'alien'"),
        ({"prompt": "Q", "reference": ["A", "B"]}, r'the "reference" of record 2 .* is of type list; a text'),
        ({"prompt": 7, "reference": "A"}, "the request of record 2 .* is a number"),
        ({"translation": {"de": 7, "en": "x"}}, r'the "translation" of record 2 .* is of type int'),
        ({"source": ["Q"], "target": "A"}, r'the "source" or "target" of record 2 .* is of type list'),
        ({"prompt": "Q", "reference": "\ud800"}, "half of a surrogate pair"),
    ],
)
def test_records_that_are_no_prompts(record: Any, pattern: str, tmp_path: Path) -> None:
    file = written(tmp_path / "a.jsonl", {"prompt": "Q"}, record)
    with pytest.raises(CalibrationError, match=pattern) as caught:
        read_prompts(file)
    assert f"record 2 of {file}" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "pattern"),
    [
        ("a.jsonl", "", r'holds no prompts; a line each, or records: {"prompt", "reference"}'),
        ("a.json", "[]", "holds no prompts"),
        ("a.txt", " \n\n", "holds no prompts"),
        ("a.jsonl", '{"prompt": "Q"}\n{"prompt": ', r"line 2: .*; records such as {.prompt"),
        ("a.parquet", "PAR1", "parquet file, which is not read"),
    ],
)
def test_files_without_prompts(name: str, content: str, pattern: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(CalibrationError, match=pattern):
        read_prompts(tmp_path / name)
    with pytest.raises(CalibrationError, match="does not exist"):
        read_prompts(tmp_path / "none.jsonl")


def test_the_packages_own_pairs() -> None:
    prompts = read_prompts(heldout_pairs())
    records = [json.loads(line) for line in heldout_pairs().read_text(encoding="utf-8").splitlines()]
    found = [{"prompt": prompt.text, "reference": prompt.reference} for prompt in prompts]
    assert found == records


def test_llama_factorys_own_alpaca_file() -> None:
    file = shared("text", "llamafactory", "alpaca_en_demo.json")
    prompts = read_prompts(file)
    records = json.loads(file.read_text(encoding="utf-8"))
    assert len(prompts) == len(records) > 100
    for prompt, record in zip(prompts, records, strict=True):
        expected = "\n".join(filter(None, (record["instruction"], record["input"])))
        assert (prompt.text, prompt.reference) == (expected, record["output"] or None)
