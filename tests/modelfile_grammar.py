"""Ollama's reading of a Modelfile (parser/parser.go, August 2026), rune by rune, states and quirks alike."""

from __future__ import annotations

import re

COMMANDS = {"from", "license", "template", "system", "adapter", "draft", "renderer", "parser", "parameter"}
COMMANDS |= {"message", "requires"}


class ModelfileError(Exception):
    """What `ollama create` refuses."""


def parse_modelfile(text: str) -> list[tuple[str, str]]:
    """The commands and their values: ("from", "./x.gguf"), ("stop", "</s>") for PARAMETER stop, ..."""
    commands: list[tuple[str, str]] = []
    state, name, buffer = "nil", "", ""
    for rune in text:
        space, newline = rune in " \t", rune in "\r\n"
        following, kept = state, rune
        if state == "nil":
            following, kept = ("name", rune) if not (space or newline or rune == "#") else ("nil", "")
            following = "comment" if rune == "#" else following
        elif state == "comment":
            following, kept = ("nil" if newline else "comment"), ""
        elif state in ("name", "parameter"):
            if space:
                following, kept = "value", ""
            elif not re.fullmatch("[A-Za-z]" if state == "name" else "[A-Za-z0-9_]", rune):
                raise ModelfileError(f"{buffer + rune!r} is no command")
        elif newline or space:
            following = "nil"
        if following != state:
            if state == "name":
                name = buffer.lower()
                if name not in COMMANDS:
                    raise ModelfileError(f"no command {name!r}")
                following = "parameter" if name == "parameter" else following
            elif state == "parameter":
                name = buffer
            elif state == "value":
                value = _unquoted(buffer.strip())
                if value is None or space:
                    buffer += rune
                    continue
                commands.append((name, value))
            buffer, state = "", following
        if kept.isprintable():  # Go's strconv.IsPrint: no separators but the space, nothing invisible
            buffer += kept
    if state == "value":
        value = _unquoted(buffer.strip())
        if value is None:
            raise ModelfileError("unexpected end")
        commands.append((name, value))
    elif state not in ("nil", "comment"):
        raise ModelfileError("unexpected end")
    if not any(name == "from" for name, _ in commands):
        raise ModelfileError("no FROM line")
    return commands


def _unquoted(text: str) -> str | None:
    for quote in ('"""', '"'):
        if text.startswith(quote):
            whole = len(text) >= 2 * len(quote) and text.endswith(quote)
            return text[len(quote) : -len(quote)] if whole else None
    return text
