"""Texts from elsewhere, made fit for Markdown: shown as they are, never read as markup or HTML."""

from __future__ import annotations

import re

# an underscore within a word is no markup
_MARKUP = re.compile(r"([\\`*\[\]|~#!$]|(?<![^\W_])_|_(?![^\W_]))")
# of a list, or a line that makes the one above a heading
_LEADING = re.compile(r"^(\d*)([-+.)](?=\s|$)|[-=](?=[-=\s]*$))")
_HTML = str.maketrans({"&": "&amp;", "<": "&lt;", ">": "&gt;"})


def _one_line(text: object) -> str:
    return " ".join("".join(char if char.isprintable() else " " for char in str(text)).split())


def plain(text: object) -> str:
    """`text` anywhere in a paragraph, a list or a cell of a table."""
    safe = _MARKUP.sub(r"\\\1", _one_line(text).translate(_HTML))
    safe = _LEADING.sub(r"\1\\\2", safe)
    return safe.replace("://", ":&#47;&#47;").replace("www.", "www&#46;")  # no links of its own


def code(text: object, *, cell: bool = False) -> str:
    """`text` as code within a line; `cell` in a table, where a bar would end the cell."""
    found = _one_line(text)
    ticks = "`" * (_longest_run(found) + 1)
    pad = " " if found.startswith("`") or found.endswith("`") or not found else ""
    return f"{ticks}{pad}{found.replace('|', chr(92) + '|') if cell else found}{pad}{ticks}"


def code_block(text: str, language: str) -> str:
    """Lines of code between fences that do not stand in them."""
    fence = "`" * max(_longest_run(text) + 1, 3)
    return f"{fence}{language}\n{text}\n{fence}"


def _longest_run(text: str) -> int:
    return max((len(run) for run in re.findall("`+", text)), default=0)
