"""Texts and windows: every form is read, nothing is dropped, every token is scored once."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from qexport.calibrate.texts import read_documents, read_training_documents
from qexport.calibrate.windows import opening_token, packed, scored_windows
from qexport.errors import CalibrationError, StorageError
from qexport.modeling.tokenizer import load_tokenizer
from tests.conftest import shared
from tests.tiny import calibration_windows

RECORDS = ["one", "two words", "three\nlines"]


def test_every_form_gives_the_same_documents(tmp_path: Path) -> None:
    records = [{"text": text} for text in RECORDS]
    forms = {
        "list.json": json.dumps(records),
        "lines.json": "\n".join(map(json.dumps, records)),
        "lines.jsonl": "\n\n".join(map(json.dumps, records)) + "\n",
        "strings.json": json.dumps(RECORDS),
        "plain.txt": "<|endoftext|>".join(RECORDS),
    }
    for name, content in forms.items():
        (tmp_path / name).write_text(content)
        assert read_documents(tmp_path / name) == RECORDS, name


@pytest.mark.parametrize(
    ("name", "content", "pattern"),
    [
        ("a.txt", b"  \n", "holds no text"),
        ("a.jsonl", b"", "holds no text"),
        ("a.json", b"[]", "holds no text"),
        ("a.json", b'{"text": "x"', "neither JSON nor JSON lines"),
        (
            "a.jsonl",
            b'{"text": "x"}\n{"body": "y"}',
            "record 2 of .* has no .text. that is a text .it has body",
        ),
        ("a.json", b"[1]", "record 1 of .* has no .text. that is a text .it has int"),
        ("a.txt", b"\xff\xfe\x00", "is not UTF-8"),
        ("a.json", b"[" * 100_000, "neither JSON nor JSON lines"),
    ],
)
def test_what_is_no_text_is_told(tmp_path: Path, name: str, content: bytes, pattern: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CalibrationError, match=pattern):
        read_documents(tmp_path / name)


def test_missing_files_and_directories(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match="does not exist"):
        read_documents(tmp_path / "none.txt")
    with pytest.raises(StorageError, match="cannot read"):
        read_documents(tmp_path)


def test_only_a_line_feed_ends_a_line(tmp_path: Path) -> None:
    texts = ["one\u2028two", "three\x85four", "five\x0csix"]
    file = tmp_path / "raw.jsonl"
    lines = [json.dumps({"text": text}, ensure_ascii=False).replace("\\f", "\\u000c") for text in texts]
    file.write_bytes(("\ufeff" + "\r\n".join(lines)).encode())  # as Windows writes it
    assert read_documents(file) == texts


def test_one_object_over_several_lines_is_one_record(tmp_path: Path) -> None:
    file = tmp_path / "one.json"
    file.write_text(json.dumps({"text": "a"}, indent=2))
    assert read_documents(file) == ["a"]
    file.write_text(json.dumps({"data": [{"text": "a"}]}, indent=2))
    with pytest.raises(CalibrationError, match=r"record 1 of .* has no .text.*it has data"):
        read_documents(file)


@pytest.mark.parametrize(
    ("name", "pattern"),
    [
        ("a.parquet", r"is a parquet file, which is not read.*read_parquet\('a.parquet'\)"),
        ("a.csv", r"is a csv file, which is not read.*read_csv\('a.csv'\)"),
        ("a.jsonl.gz", "is a gz file, which is not read.*unpack it"),
        ("a.jsonl", "does not exist"),
    ],
)
def test_files_of_other_kinds_are_told(tmp_path: Path, name: str, pattern: str) -> None:
    if "jsonl" not in Path(name).suffix:
        (tmp_path / name).write_bytes(b"PAR1")
    with pytest.raises(CalibrationError, match=pattern):
        read_training_documents(tmp_path / name)


@pytest.fixture(scope="module")
def tokenizer(llama: Path) -> Any:
    return load_tokenizer(llama)


@pytest.mark.parametrize(("samples", "length"), [(3, 16), (5, 40), (1, 128)])
def test_calibration_samples_are_packed(tokenizer: Any, samples: int, length: int) -> None:
    documents = ["a", "a small model " * 40, "reads many words", "x" * 300]
    windows = calibration_windows(documents, tokenizer, samples=samples, length=length, seed=0)
    assert windows.shape == (samples, length)
    assert set(windows[:, 0].tolist()) == {tokenizer.bos_token_id}


def test_no_token_is_dropped_for_its_document_being_short_or_long(tokenizer: Any) -> None:
    documents = ["a", "a small model " * 40, "words"]
    windows = calibration_windows(documents, tokenizer, samples=1000, length=32, seed=0)
    found = Counter(windows[:, 1:].flatten().tolist())
    for document in documents:
        for token, count in Counter(tokenizer(document).input_ids).items():
            assert found[token] >= count


def test_the_seed_orders_the_documents(tokenizer: Any) -> None:
    documents = [f"document {number}" for number in range(50)]
    one, again, other = (
        calibration_windows(documents, tokenizer, samples=4, length=16, seed=seed) for seed in (1, 1, 2)
    )
    assert one.equal(again)
    assert not one.equal(other)


def test_windows_are_cut_from_one_stream_and_no_opening_is_doubled() -> None:
    def windows(samples: int, opening: int | None) -> tuple[list[list[int]], int]:
        found = packed([[9, 1, 2], [9, 3, 4, 5], [9, 6]], samples=samples, length=4, opening=opening)
        return found.windows.tolist(), found.documents

    assert windows(2, None) == ([[9, 1, 2, 9], [3, 4, 5, 9]], 3)
    assert windows(9, None) == ([[9, 1, 2, 9], [3, 4, 5, 9], [6, 9, 1, 2]], 3)  # filled from the start
    # the first window begins with the document's own 9, the second gets one
    assert windows(9, 9) == ([[9, 1, 2, 9], [9, 3, 4, 5], [9, 6, 9, 1]], 3)
    assert windows(1, 9) == ([[9, 1, 2, 9]], 2)
    assert windows(2, 7) == ([[7, 9, 1, 2], [7, 9, 3, 4]], 2)
    one = packed([[1]], samples=3, length=4, opening=None)
    assert one.windows.tolist() == [[1, 1, 1, 1]]


@pytest.mark.parametrize(("length", "stride"), [(16, 8), (16, 1), (16, 15), (9, 4), (400, 200)])
def test_every_token_is_scored_once(tokenizer: Any, length: int, stride: int) -> None:
    documents = ["a small model reads many words " * 5, "a", "b " * 15]
    windows = scored_windows(documents, tokenizer, length=length, stride=stride)
    for number, document in enumerate(documents):
        tokens = tokenizer(document).input_ids
        scored = [t for w in windows if w.document == number for t in w.tokens[w.first :]]
        assert scored == tokens[1:]
    assert max(len(window.tokens) for window in windows) <= length
    assert all(window.tokens[0] == tokenizer.bos_token_id for window in windows)
    later = [w for before, w in itertools.pairwise(windows) if before.document == w.document]
    assert all(len(w.tokens) - w.first <= stride for w in later)


def test_a_text_without_a_token_to_score(tokenizer: Any) -> None:
    with pytest.raises(CalibrationError, match="no token to score"):
        scored_windows([""], tokenizer, length=16, stride=8)


def test_the_opening_token_is_the_tokenizers_own_choice(tokenizer: Any) -> None:
    assert opening_token(tokenizer) == tokenizer.bos_token_id
    # babyllama's tokenizer names a BOS token; whether it sets one is what counts
    other = load_tokenizer(shared("models", "babyllama-105"))
    assert (opening_token(other) is not None) == (other("a").input_ids[0] == other.bos_token_id)
