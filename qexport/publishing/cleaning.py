"""What qexport itself wrote goes without the paths of this machine; what else tells them is told the user."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from qexport.checkpoint.disk import is_file, read_errors
from qexport.checkpoint.manifest import MANIFEST_FILE
from qexport.errors import CorruptFileError
from qexport.report.card_file import CARD_FILE, parse_card
from qexport.report.files import REPORT_FILE, REPORT_FILES
from qexport.report.local_paths import local_paths, without_local_paths, without_these

_DATA = (MANIFEST_FILE, REPORT_FILE)
# made of the data; a plot's texts too
_TEXTS = tuple(name for name in REPORT_FILES if name.endswith((".md", ".html", ".svg")))
_SUFFIXES = (".json", ".md", ".txt", ".yaml", ".yml", ".html", ".svg", ".jinja", ".py", ".toml")
_LARGEST = 4 << 20  # bytes


def paths_told(directories: Iterable[Path]) -> dict[str, str]:
    """The paths that the data of our own in these directories tell, and what is told in their place."""
    files = [file for directory in directories for name in _DATA if is_file(file := directory / name)]
    return local_paths([_json(file) for file in files])


def cleaned(file: Path, name: str, paths: Mapping[str, str]) -> bytes | None:
    """What goes in the place of a file of ours called `name`; None where it goes as it lies.

    Data lose every path, texts that were made of them those in `paths`, a card in our part of it only.
    Raises StorageError.
    """
    if name in _DATA:
        told = _json(file)
        return None if told is None else (_written(without_local_paths(told)))
    if name not in (*_TEXTS, CARD_FILE):
        return None
    try:
        text = _read(file).decode("utf-8")
    except UnicodeDecodeError:
        return None
    return (_cleaned_card(text, file, paths) if name == CARD_FILE else without_these(text, paths)).encode()


def may_tell_paths(name: str, size: int) -> bool:
    """Whether a file is a small text: a vocabulary is larger, and no place for a path."""
    return size <= _LARGEST and (name.endswith(_SUFFIXES) or Path(name).name.startswith("Modelfile"))


def first_told(content: bytes, places: Iterable[Path]) -> Path | None:
    """The first of the `places` on this machine that a text tells."""
    return next((place for place in places if _whole_path(place).search(content)), None)


def _whole_path(place: Path) -> re.Pattern[bytes]:
    return re.compile(rb"(?<![\w.-])" + re.escape(os.fsencode(place)) + rb"(?![\w.-])")


def _cleaned_card(text: str, file: Path, paths: Mapping[str, str]) -> str:
    try:
        card = parse_card(text, file)
    except CorruptFileError:
        return text
    if card.section is None:
        return text
    begin, end = (place + len(text) - len(card.body) for place in card.section)
    return text[:begin] + without_these(text[begin:end], paths) + text[end:]


def _read(file: Path) -> bytes:
    with read_errors(file):
        return file.read_bytes()


def _json(file: Path) -> Any:
    try:
        return json.loads(_read(file))
    except ValueError:
        return None


def _written(data: Any) -> bytes:
    return (json.dumps(data, indent=2, ensure_ascii=False) + "\n").encode()
