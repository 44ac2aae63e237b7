"""Where files lay on somebody's disk is nobody else's business: it does not go along."""

from __future__ import annotations

import json
import re
from pathlib import Path, PurePosixPath
from typing import Any

from qexport.checkpoint.disk import read_errors

TOLD_IN = ("qexport.json", "report.json")  # files of ours that tell local paths
_ABSOLUTE = re.compile(r"(/|~/|[A-Za-z]:[\\/])[^\n]+")
_CACHED = re.compile(r"models--(?P<owner>.+?)--(?P<name>.+)")  # a directory of the Hub's cache


def without_local_paths(file: Path) -> bytes:
    """The file's JSON with the last name of each absolute path, or the Hub id that it is the cache of.

    A file that is no JSON stays as it is. Raises StorageError.
    """
    with read_errors(file):
        content = file.read_bytes()
    try:
        told = json.loads(content)
    except ValueError:
        return content
    return (json.dumps(_shortened(told), indent=2, ensure_ascii=False) + "\n").encode()


def _shortened(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _shortened(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_shortened(inner) for inner in value]
    return _name(value) if isinstance(value, str) and _ABSOLUTE.fullmatch(value) else value


def _name(path: str) -> str:
    parts = PurePosixPath(path.replace("\\", "/")).parts
    cached = next((found for part in parts if (found := _CACHED.fullmatch(part))), None)
    return f"{cached['owner']}/{cached['name']}" if cached else parts[-1]
