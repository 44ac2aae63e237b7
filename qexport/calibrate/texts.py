"""Documents from the file forms in which people keep calibration and evaluation text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from qexport.calibrate.records import Document, document_of, json_records
from qexport.checkpoint.disk import exists, read_errors
from qexport.errors import CalibrationError

_SEPARATOR = "<|endoftext|>"  # between documents in plain text, as TinyStories and others have it
_RECORDS = 'records such as {"text": "..."}'
_JSON = (".json", ".jsonl", ".ndjson")
_TABLES = {".parquet": "parquet", ".csv": "csv", ".tsv": "csv"}
_NOT_READ = (*_TABLES, ".arrow", ".xlsx", ".gz", ".bz2", ".xz", ".zst", ".zip", ".tar")


def read_documents(path: Path) -> list[str]:
    """The documents of a text, JSON (`[{"text": ...}]`) or JSON-lines file, empty ones left out.

    Raises CalibrationError for a file without text, StorageError for one that cannot be read.
    """
    content = read_text(path)
    if path.suffix.lower() in _JSON:
        documents = [
            _text_of(record, path, number) for number, record in json_records(content, path, _RECORDS)
        ]
    else:
        documents = content.split(_SEPARATOR)
    documents = [document.strip() for document in documents if document.strip()]
    if not documents:
        raise CalibrationError(f"{path} holds no text")
    return documents


def read_training_documents(path: Path) -> list[Document]:
    """The texts and conversations of a file in any form that `records` knows, empty ones left out.

    Raises CalibrationError for a record in no such form, a file without text and one of a kind that is not
    read; StorageError for one that cannot be read.
    """
    refuse_tables(path)
    if path.suffix.lower() not in _JSON:
        return [*read_documents(path)]
    found = [
        document_of(record, f"record {number} of {path}")
        for number, record in json_records(read_text(path), path, _RECORDS)
    ]
    documents: list[Document] = [
        document.strip() if isinstance(document, str) else document
        for document in found
        if document is not None
    ]
    if not documents:
        raise CalibrationError(f"{path} holds no text")
    return documents


def refuse_tables(path: Path) -> None:
    """Raises CalibrationError for tables and packed files, by their suffix."""
    suffix = path.suffix.lower()
    if suffix not in _NOT_READ:
        return
    remedy = "unpack it first"
    if suffix in _TABLES:
        remedy = (
            f"write it as JSON lines with pandas: read_{_TABLES[suffix]}('{path.name}')"
            f".to_json('{path.stem}.jsonl', orient='records', lines=True)"
        )
    raise CalibrationError(
        f"{path} is a {suffix[1:]} file, which is not read",
        expected="a text, JSON or JSON-lines file",
        remedy=remedy,
    )


def read_text(path: Path) -> str:
    """The file's text as UTF-8, with or without the mark that Windows puts before it."""
    if not exists(path):
        raise CalibrationError(f"{path} does not exist")
    try:
        with read_errors(path):
            return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise CalibrationError(f"{path} is not UTF-8 text: {error.reason}") from error


def _text_of(record: Any, path: Path, number: int) -> str:
    if isinstance(record, str):
        return record
    if isinstance(record, dict) and isinstance(record.get("text"), str):
        return str(record["text"])
    found = ", ".join(map(str, record)) if isinstance(record, dict) else type(record).__name__
    raise CalibrationError(
        f'record {number} of {path} has no "text" that is a text (it has {found})',
        expected='{"text": "..."}',
    )
