"""Where files lay on somebody's disk is nobody else's business: of a path, its last name alone is told.

A path is what begins at a root (`/`, `~/`, `../`, a drive), behind `hf:` or `file:` too. A text that is one
as a whole may hold blanks; within a sentence a path ends at the first, and `/` alone before a name is none.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import PurePosixPath
from typing import Any

from qexport.report.content import Report
from qexport.report.markdown import plain

_BEFORE = r"(?:hf:|file:(?://)?(?:localhost(?=/))?)?"
_NAME = r"[^\s/\\\"'`<>|*?,;:()\[\]{}]"
_ROOT = r"~(?:[a-z_][\w.-]*)?/|\.\.[\\/]|[a-z]:[\\/]|\\\\"
_WHOLE = re.compile(rf"{_BEFORE}(?:/|{_ROOT})(?=\S)[^\n]+", re.IGNORECASE)
_WITHIN = re.compile(
    # not within a word, a URL or another path; `&lt;/b` and `</b` are tags; a full stop ends the sentence
    rf"(?<![\w./\\~<;&-]){_BEFORE}(?:/{_NAME}+/|{_ROOT})(?:{_NAME}+[\\/]+)*{_NAME}*(?!\.){_NAME}",
    re.IGNORECASE,
)
_SCRIPT = re.compile(r"(<script>.*?</script>)", re.DOTALL)
_CACHED = re.compile(r"models--(?P<owner>.+?)--(?P<name>.+)")  # a directory of the Hub's cache
_DATA = ("samples",)  # prompts and answers, which may speak of paths as of anything else


def local_paths(value: Any) -> dict[str, str]:
    """The paths in all texts of JSON data, the longest first, and what is told of each."""
    found = {path: _last_name(path) for text in _texts(value) for path in _paths(text)}
    return dict(sorted(found.items(), key=lambda pair: -len(pair[0])))


def without_local_paths(value: Any) -> Any:
    """JSON data, or a text, in which no path is told; the samples of a report are left as they are."""
    if isinstance(value, Mapping):
        return {key: inner if key in _DATA else without_local_paths(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(map(without_local_paths, value))
    if not isinstance(value, str):
        return value
    return _last_name(value) if _WHOLE.fullmatch(value) else _within(value)


def cleaned_report(report: Report) -> Report:
    """A report whose texts tell no path; its rows' own are kept, which are no part of any text."""
    rows = tuple(
        row.model_copy(update={"failures": without_local_paths(row.failures)}) for row in report.rows
    )
    texts = {name: getattr(report, name) for name in ("title", "verdict", "recipes", "recipe_lines")}
    return report.model_copy(update={"rows": rows, **without_local_paths(texts)})


def without_these(text: str, paths: Mapping[str, str]) -> str:
    """Markdown or HTML in which the names of `paths` stand in their places, however they are escaped there.

    Code in the page is left alone: its hash stands in the page's policy. So is `/name`, which tells nothing.
    """
    pieces = _SCRIPT.split(text)
    for path, name in paths.items():
        if len(re.findall(r"[\\/]", path)) > 1:
            for escape in (plain, _in_a_script, _in_html, str):
                pieces[::2] = [piece.replace(escape(path), escape(name)) for piece in pieces[::2]]
    return "".join(pieces)


def _texts(value: Any) -> Iterable[str]:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            if key not in _DATA:
                yield from _texts(inner)
    elif isinstance(value, (list, tuple)):
        for inner in value:
            yield from _texts(inner)
    elif isinstance(value, str):
        yield value


def _paths(text: str) -> list[str]:
    return [text] if _WHOLE.fullmatch(text) else _WITHIN.findall(text)


def _within(text: str) -> str:
    return _WITHIN.sub(lambda found: _last_name(found[0]), text)


def _last_name(path: str) -> str:
    parts = PurePosixPath(path.replace("\\", "/")).parts
    cached = next((found for part in parts if (found := _CACHED.fullmatch(part))), None)
    return f"{cached['owner']}/{cached['name']}" if cached else parts[-1]


def _in_html(text: str) -> str:
    """As jinja2 escapes."""
    for char, written in (("&", "&amp;"), ("<", "&lt;"), (">", "&gt;"), ("'", "&#39;"), ('"', "&#34;")):
        text = text.replace(char, written)
    return text


def _in_a_script(text: str) -> str:
    """As jinja2 writes JSON into HTML."""
    text = json.dumps(text, ensure_ascii=False)[1:-1]
    for char in "<>&'":
        text = text.replace(char, f"\\u{ord(char):04x}")
    return text
