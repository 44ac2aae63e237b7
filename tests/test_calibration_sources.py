"""Calibration input: every record form is read, sources are mixed by weight, what cannot be used is told."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from qexport.calibrate.chat import document_tokens, rendered
from qexport.calibrate.records import Conversation, document_of
from qexport.calibrate.sources import CalibrationSource, calibration_sources, shares
from qexport.checkpoint.hashing import file_hash
from qexport.errors import CalibrationError
from qexport.events import Event, Noted
from qexport.modeling.calibration import (
    CalibrationData,
    calibration_data,
    calibration_fingerprints,
    check_calibration,
)
from qexport.modeling.skeleton import build_skeleton
from qexport.modeling.tokenizer import load_tokenizer
from qexport.packaged import calibration_text
from qexport.specs import CalibrationSpec
from tests.conftest import shared

SYSTEM = {"role": "system", "content": "S"}
ONE = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]
TWO = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}, *ONE]

CONVERSATIONS: list[tuple[dict[str, Any], list[dict[str, str]]]] = [
    ({"messages": ONE}, ONE),
    ({"messages": [SYSTEM, *ONE]}, [SYSTEM, *ONE]),
    ({"messages": ONE, "text": "<s>made for another template"}, ONE),
    ({"messages": ONE, "text": None, "rejected_response": "B"}, ONE),
    ({"messages": [{"role": "user", "content": [{"type": "text", "text": "Q"}]}, ONE[1]]}, ONE),
    ({"messages": [{"role": "developer", "content": "S"}, *ONE], "system": "no"}, [SYSTEM, *ONE]),
    ({"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]}, ONE),
    ({"conversations": [{"role": "User", "value": "Q"}, {"from": "GPT", "content": "A"}]}, ONE),
    ({"conversations": [{"from": "human", "value": "Q"}, ONE[1]], "system": "S"}, [SYSTEM, *ONE]),
    ({"conversation": [{"human": "q", "assistant": "a"}, {"human": "Q", "assistant": "A"}]}, TWO),
    (
        {
            "conversations": [
                {"from": "human", "value": "Q"},
                {"from": "function_call", "value": "f()"},
                {"from": "observation", "value": "3"},
                {"from": "gpt", "value": "A"},
            ]
        },
        [
            ONE[0],
            {"role": "assistant", "content": "f()"},
            {"role": "tool", "content": "3"},
            ONE[1],
        ],
    ),
    (
        {"conversations": ONE[:1], "chosen": {"from": "gpt", "value": "A"}, "rejected": {"from": "gpt"}},
        ONE,
    ),
    ({"prompt": "Q", "chosen": ONE, "rejected": TWO}, ONE),
    ({"prompt": ONE[:1], "chosen": ONE[1:], "rejected": ONE[1:]}, ONE),
    ({"instruction": "Q", "chosen": "A", "rejected": "B"}, ONE),
    ({"instruction": "Q", "input": "", "output": "A", "text": "### Instruction: Q"}, ONE),
    ({"instruction": "Q", "output": "A", "history": [["q", "a"]]}, TWO),
    (
        {"instruction": "Q", "input": "I", "output": "A", "system": "S"},
        [SYSTEM, {"role": "user", "content": "Q\nI"}, ONE[1]],
    ),
    ({"input": "Q", "output": "A"}, ONE),
    ({"query": "Q", "response": "A", "history": [["q", "a"]], "system": None}, TWO),
    ({"prompt": "Q", "completion": "A"}, ONE),
    ({"prompt": ONE[:1], "completion": ONE[1:]}, ONE),
    ({"prompt": "Q", "response": "A"}, ONE),
    ({"question": "Q", "answer": "A"}, ONE),
]


@pytest.mark.parametrize(("record", "messages"), CONVERSATIONS)
def test_every_form_of_a_conversation(record: dict[str, Any], messages: list[dict[str, str]]) -> None:
    before = json.dumps(record)
    found = document_of(record, "record 1 of f")
    assert isinstance(found, Conversation)
    assert list(found.messages) == messages
    assert json.dumps(record) == before


@pytest.mark.parametrize(
    ("record", "text"),
    [
        ("a", "a"),
        ({"text": "a"}, "a"),
        ({"text": "a", "prompt": "what it was made by"}, "a"),
        ({"text": "a", "answer": "no question"}, "a"),
        ({"messages": [{"role": "assistant", "content": "a"}]}, "a"),  # SWIFT's pre-training form
        ({"chosen": "Human: a", "rejected": "Human: b"}, "Human: a"),
        ({"text": " \n"}, None),
        ({"instruction": "", "output": " "}, None),
        ({"messages": [{"role": "user", "content": ""}]}, None),
    ],
)
def test_every_form_of_a_text(record: Any, text: str | None) -> None:
    assert document_of(record, "record 1 of f") == text


@pytest.mark.parametrize(
    ("record", "pattern"),
    [
        (1, 'record 7 of f is a number; a text in "text"'),
        ({}, "record 7 of f has no text .*it has nothing"),
        ({"body": "x", "id": 1}, r'it has body: str, id: int\); a text in "text"'),
        ({"instruction": "Q"}, "it has instruction"),
        ({"prompt": "p", "reference": "r"}, "it has prompt: str, reference: str"),
        ({"messages": []}, "record 7 of f holds a conversation without messages"),
        ({"conversations": "Q"}, '"conversations" of record 7 of f is a text; a list of messages'),
        ({"messages": ["Q"]}, "message 1 of record 7 of f is a text"),
        (
            {"messages": [*ONE, {"role": "narrator", "content": "x"}]},
            "message 3 of record 7 of f has the role 'narrator'; one of assistant",
        ),
        ({"messages": [{"content": "x"}]}, r"message 1 of record 7 of f has no role \(it has content\)"),
        ({"messages": [{"role": "user"}]}, "the content of message 1 of record 7 of f is null"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
            "message 1 of record 7 of f has a part of type image_url; text",
        ),
        ({"instruction": "Q", "output": 3}, "the answer of record 7 of f is a number; a text"),
        ({"query": "Q", "response": "A", "history": ["q"]}, r"\"history\" .* holds 'q'; \[request"),
        ({"messages": ONE, "system": 1}, '"system" of record 7 of f is a number'),
        ({"text": "\ud800"}, "record 7 of f holds half of a surrogate pair"),
    ],
)
def test_a_record_that_cannot_be_used_is_named(record: Any, pattern: str) -> None:
    with pytest.raises(CalibrationError, match=pattern) as caught:
        document_of(record, "record 7 of f")
    assert "\n" not in str(caught.value)


def test_real_data_of_llamafactory() -> None:
    for name, kind in (("alpaca_en_demo.json", Conversation), ("c4_demo.jsonl", str)):
        path = shared("text", "llamafactory", name)
        text = path.read_text(encoding="utf-8")
        records = json.loads(text) if name.endswith("json") else map(json.loads, text.strip().split("\n"))
        assert all(isinstance(document_of(record, "it"), kind) for record in records)


@pytest.fixture(scope="module")
def tokenizer(llama: Path) -> Any:
    return load_tokenizer(llama)


def with_template(llama: Path, directory: Path, template: str | None) -> Path:
    """The model with another chat template, or none."""
    shutil.copytree(llama, directory)
    (directory / "chat_template.jinja").unlink()
    if template is not None:
        (directory / "chat_template.jinja").write_text(template)
    return directory


def test_a_template_writes_what_the_model_is_given(tokenizer: Any) -> None:
    document = document_of({"messages": ONE}, "it")
    assert isinstance(document, Conversation)
    assert rendered(document, tokenizer) == "<s><|user|>Q</s><|assistant|>A</s>"
    tokens = document_tokens(document, tokenizer)
    assert tokens.count(tokenizer.bos_token_id) == 1  # the template's, and no second one
    assert tokens[-1] == tokenizer.eos_token_id
    assert tokens[-2] != tokenizer.eos_token_id
    assert tokenizer.decode(tokens) == "<s><|user|>Q</s><|assistant|>A</s>"


def test_a_template_without_a_system_role_gets_it_in_the_first_turn(llama: Path, tmp_path: Path) -> None:
    strict = (
        "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        "[{{ m['role'] }}]{{ m['content'] }}{% endfor %}"
    )
    tokenizer = load_tokenizer(with_template(llama, tmp_path / "m", strict))
    document = document_of({"messages": ONE, "system": "S"}, "it")
    assert isinstance(document, Conversation)
    assert rendered(document, tokenizer) == "[user]S\n\nQ[assistant]A"
    assert document.messages[0]["role"] == "system"  # the input is not changed
    alone = document_of({"messages": [SYSTEM, ONE[1]]}, "record 2 of f")
    assert isinstance(alone, Conversation)
    with pytest.raises(CalibrationError, match=r"template fails on record 2 of f: no system"):
        rendered(alone, tokenizer)


def test_tools_reach_the_template(llama: Path, tmp_path: Path) -> None:
    template = "{{ tools[0]['name'] }}:{{ messages[-1]['tool_calls'][0]['id'] }}"
    tokenizer = load_tokenizer(with_template(llama, tmp_path / "m", template))
    call = {"role": "assistant", "content": None, "tool_calls": [{"id": "c1"}]}
    for tools in ([{"name": "f"}], json.dumps([{"name": "f"}])):
        document = document_of({"messages": [ONE[0], call], "tools": tools}, "it")
        assert isinstance(document, Conversation)
        assert rendered(document, tokenizer) == "f:c1"


def spec(*calibration: str, samples: int = 8, seed: int = 0) -> CalibrationSpec:
    return CalibrationSpec(calibration=calibration, samples=samples, sequence_length=16, seed=seed)


Data = Callable[..., tuple[CalibrationData, list[str]]]


@pytest.fixture(scope="module")
def data() -> Data:
    """The calibration data of a model for a spec, and the notes that came with it."""

    def make(model: Path, wanted: CalibrationSpec) -> tuple[CalibrationData, list[str]]:
        notes: list[str] = []

        def listen(event: Event) -> None:
            if isinstance(event, Noted):
                notes.append(event.text)

        return calibration_data(model, wanted, build_skeleton(model), on_event=listen), notes

    return make


def letters(path: Path, letter: str, words: int = 400) -> Path:
    """A text of one letter, so that its windows can be told from others'."""
    path.write_text(json.dumps([{"text": letter * 7}] * words))
    return path


def of_letter(data: CalibrationData, tokenizer: Any, letter: str) -> int:
    """How many windows hold the letter and no other one."""
    texts = [tokenizer.decode(row, skip_special_tokens=True) for row in data.windows]
    return sum(set(text) == {letter} for text in texts)


def test_sources_are_mixed_by_weight(data: Data, llama: Path, tmp_path: Path, tokenizer: Any) -> None:
    x, y = letters(tmp_path / "x.json", "X"), letters(tmp_path / "y.json", "Y")
    found, notes = data(llama, spec(f"{x}:3", str(y), samples=12))
    assert not notes
    assert (found.windows.dtype, tuple(found.windows.shape)) == (torch.int64, (12, 16))
    assert of_letter(found, tokenizer, "X") == 9
    assert of_letter(found, tokenizer, "Y") == 3
    firsts = "".join(tokenizer.decode(row, skip_special_tokens=True)[0] for row in found.windows)
    assert firsts != "XXXXXXXXXYYY"  # mixed, not one after the other
    again, _ = data(llama, spec(f"{x}:3", str(y), samples=12))
    assert found.windows.equal(again.windows)
    assert found == again
    other, _ = data(llama, spec(f"{x}:3", str(y), samples=12, seed=1))
    assert not found.windows.equal(other.windows)


def test_a_source_too_small_for_its_share_is_told(
    data: Data, llama: Path, tmp_path: Path, tokenizer: Any
) -> None:
    x, y = letters(tmp_path / "x.json", "X"), letters(tmp_path / "y.json", "Y", words=2)
    found, notes = data(llama, spec(str(x), str(y), samples=20))
    assert [(source.samples, source.documents) for source in found.sources][1] == (2, 2)
    assert of_letter(found, tokenizer, "X") == 10
    assert found.samples == 12
    assert notes == [f"{y} fills 2 of 10 samples of 16 tokens; more text gives better codes"]


def test_what_an_output_tells(data: Data, llama: Path, tmp_path: Path) -> None:
    x, y = letters(tmp_path / "x.json", "X"), letters(tmp_path / "y.json", "Y")
    found, _ = data(llama, spec(f"{x}:3", f"{y}:1", samples=4, seed=5))
    figures = json.loads(json.dumps(found.figures()))
    assert figures == {
        "sources": [
            {"source": str(x), "weight": 3.0, "blake3": file_hash(x), "documents": 6, "samples": 3},
            {"source": str(y), "weight": 1.0, "blake3": file_hash(y), "documents": 2, "samples": 1},
        ],
        "samples": 4,
        "length": 16,
        "tokens": 64,
        "seed": 5,
    }


def test_conversations_without_a_template_are_joined_and_told(
    data: Data, llama: Path, tmp_path: Path, tokenizer: Any
) -> None:
    bare = with_template(llama, tmp_path / "bare", None)
    file = tmp_path / "chat.jsonl"
    file.write_text(json.dumps({"instruction": "QQQQ", "input": "II", "output": "AAAA", "system": " "}))
    found, notes = data(bare, spec(str(file), samples=1))
    assert tokenizer.decode(found.windows[0]).startswith("<s>QQQQ\nII\nAAAA</s>")
    assert any("has no chat template: conversations were joined" in note for note in notes)
    found, notes = data(llama, spec(str(file), samples=1))
    assert tokenizer.decode(found.windows[0]).startswith("<s><|user|>QQQQ\nII</s><|assistant|>AAAA</s>")
    assert not notes
    plain = letters(tmp_path / "x.json", "X")
    assert data(bare, spec(str(plain), samples=1))[1] == []


def test_a_template_that_fails_names_the_record(data: Data, llama: Path, tmp_path: Path) -> None:
    broken = with_template(llama, tmp_path / "broken", "{{ raise_exception('roles must alternate') }}")
    file = tmp_path / "chat.jsonl"
    file.write_text("\n" + json.dumps({"messages": ONE}))
    with pytest.raises(CalibrationError, match=r"fails on record 2 of .*chat.jsonl: roles must alternate"):
        data(broken, spec(str(file), samples=1))


def test_the_packages_own_text(data: Data, llama: Path) -> None:
    found, notes = data(llama, spec(samples=2))
    assert notes[0].startswith("calibrating on the package's own little text")
    assert found.sources[0].hash == file_hash(calibration_text())
    named, notes = data(llama, spec("default", samples=2))  # who asks for it knows
    assert not notes
    assert named.windows.equal(found.windows)


@pytest.mark.parametrize(
    ("values", "pattern"),
    [
        (["nowhere.txt"], "the calibration text nowhere.txt is no file; a text, JSON or JSON-lines file"),
        (["wikitext2"], "wikitext2 is no file"),
        (["."], "is no file"),
        (["x\0y"], "is no file"),
        (["default:0"], "the weight of default is 0; a positive number"),
        (["default:-2"], "the weight of default is -2; a positive number"),
        (["self:half"], "the weight of self is 'half'; a number"),
        (["self:nan"], "the weight of self is nan; a finite number"),
        (["default:inf"], "the weight of default is inf; a finite number"),
        ([""], "has no name"),
        (["a.parquet"], "is a parquet file, which is not read"),
    ],
)
def test_sources_that_cannot_be_used(values: list[str], pattern: str) -> None:
    with pytest.raises(CalibrationError, match=pattern):
        calibration_sources(values)


def test_a_file_with_a_colon_and_a_weight(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a:2", "self", "b.txt"):
        Path(name).write_text("text")
    with pytest.raises(CalibrationError, match=r"the weight of b.txt is 'much'"):
        calibration_sources(["b.txt:much"])
    found = calibration_sources(["a:2", "a:2:0.5", "self:2", "./self", "default:3"])
    assert [(source.name, source.weight) for source in found] == [
        ("a:2", 1.0),
        ("a:2", 0.5),
        ("self", 2.0),
        ("./self", 1.0),
        ("default", 3.0),
    ]
    assert [source.path for source in found] == [
        Path("a:2"),
        Path("a:2"),
        None,
        Path("self"),
        calibration_text(),
    ]


def test_shares_are_whole_and_add_up() -> None:
    def counts(samples: int, *weights: float) -> list[int]:
        return shares([CalibrationSource("x", weight) for weight in weights], samples)

    assert counts(128, 1) == [128]
    assert counts(10, 1, 1, 1) == [4, 3, 3]
    assert counts(7, 0.5, 0.3, 0.2) == [4, 2, 1]
    assert counts(8, 5, 1, 1) == [6, 1, 1]
    assert all(sum(counts(n, 3, 2, 7)) == n for n in range(4, 200))
    with pytest.raises(CalibrationError, match="with 2 samples the weight 1 gives x none"):
        counts(2, 1, 1, 1)


def test_the_check_reads_every_file(tmp_path: Path) -> None:
    good, bad = letters(tmp_path / "x.json", "X"), tmp_path / "bad.jsonl"
    bad.write_text('{"text": "a"}\n{"messages": []}\n')
    check_calibration(spec(str(good), "self"))
    with pytest.raises(CalibrationError, match=r"record 2 of .*bad.jsonl holds a conversation without"):
        check_calibration(spec(str(good), str(bad)))
    with pytest.raises(CalibrationError, match="with 1 samples"):
        check_calibration(spec(str(good), "self", samples=1))


def test_fingerprints_follow_content_weights_and_order(tmp_path: Path) -> None:
    x, y = letters(tmp_path / "x.json", "X"), letters(tmp_path / "y.json", "Y")

    def prints(*values: str) -> dict[str, str]:
        return calibration_fingerprints(spec(*values))

    assert prints() == {"calibration": file_hash(calibration_text())}
    assert prints("self") == prints("self:2") == {"calibration": "self"}
    assert prints(str(x)) == {"calibration": file_hash(x)}
    assert prints(f"{x}:2", f"{y}:2") == prints(str(x), str(y))  # only the shares count
    assert prints(f"{x}:2", str(y)) != prints(str(x), str(y))
    assert prints(str(y), str(x)) != prints(str(x), str(y))
    before = prints(str(x), "self")
    letters(x, "Z")
    assert prints(str(x), "self") != before
    with pytest.raises(CalibrationError, match="is no file"):
        prints("nowhere")


def test_one_value_or_several_in_a_spec() -> None:
    assert CalibrationSpec.model_validate({"calibration": "a.txt"}).calibration == ("a.txt",)
    assert CalibrationSpec.model_validate({"calibration": ["a", "self:2"]}).calibration == ("a", "self:2")
    assert CalibrationSpec().calibration == ()
