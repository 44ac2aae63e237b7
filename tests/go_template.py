"""Go's text/template, as much as Ollama's templates use, and how Ollama executes one (template/template.go).

Text, `{{- -}}` trimming, if/else if/else, range with index and element, variables with := and =, fields,
nested calls of eq ne lt le gt ge and or not len slice currentDate. What is outside this raises.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

Node = tuple[Any, ...]
_TOKEN = re.compile(
    r'"(?:[^"\\\n]|\\.)*"|\d+|:=|=|\(|\)|,|\||\$?(?:\.[A-Za-z_]\w*)+|\$\w*(?:\.[A-Za-z_]\w*)*|\w+|\.'
)


@dataclass
class Message:
    """Ollama's templateMessage: a field that it lacks is an error, as in Go."""

    Role: str
    Content: str
    Thinking: str = ""


class GoTemplateError(Exception):
    """What Go refuses to parse or to execute."""


def parse(source: str) -> list[Node]:
    """The template's nodes."""
    pieces = re.split(r"(\{\{-(?=\s)[\s\S]*?\}\}|\{\{[\s\S]*?\}\})", source)
    items: list[tuple[str, str]] = []
    trim_next = False
    for piece in pieces:
        if piece.startswith("{{"):
            if not piece.endswith("}}") or "{{" in re.sub(r'"(?:[^"\\]|\\.)*"', "", piece[2:]):
                raise GoTemplateError(f"cannot read {piece[:40]!r}")
            inner = piece[2:-2]
            if re.match(r"-\s", inner):
                inner = inner[1:]
                if items and items[-1][0] == "text":
                    items[-1] = ("text", items[-1][1].rstrip())
            trim_next = bool(re.search(r"\s-$", inner))
            if not inner.strip("- \n"):
                raise GoTemplateError("missing value")
            items.append(("action", (inner[:-1] if trim_next else inner).strip()))
        else:
            items.append(("text", piece.lstrip() if trim_next else piece))
            trim_next = False
    reader = _Reader(items)
    nodes, ended = reader.nodes()
    if ended:
        raise GoTemplateError(f"unexpected {ended}")
    return nodes


class _Reader:
    def __init__(self, items: list[tuple[str, str]]) -> None:
        self.items, self.at = items, 0

    def nodes(self) -> tuple[list[Node], str]:
        """Nodes up to the end of the source, or of the block: then with the action that ended it."""
        found: list[Node] = []
        while self.at < len(self.items):
            kind, value = self.items[self.at]
            self.at += 1
            if kind == "text":
                found += [("text", value)] if value else []
            elif value == "end" or value.split()[0] == "else":
                return found, value
            elif value.split()[0] in ("if", "range"):
                found.append(self.block(value))
            else:
                found.append(("action", *_statement(value)))
        return found, ""

    def block(self, head: str) -> Node:
        kind, rest = head.split(None, 1)
        names, pipe = _statement(rest)
        body, ended = self.nodes()
        other: list[Node] = []
        if ended.startswith("else if"):
            other, ended = [self.block(ended[5:])], "end"
        elif ended == "else":
            other, ended = self.nodes()
        if ended != "end":
            raise GoTemplateError(f"{head} is not ended")
        return (kind, names, pipe, body, other)


def _statement(code: str) -> tuple[tuple[list[str], str], Node]:
    """(variables, "" or := or =) and the pipeline."""
    words = _TOKEN.findall(code)
    if re.sub(r"\s", "", code) != re.sub(r"\s", "", "".join(words)):
        raise GoTemplateError(f"cannot read {code!r}")
    names: list[str] = []
    how = next((word for word in words if word in (":=", "=")), "")
    if how:
        split = words.index(how)
        names, words = [word for word in words[:split] if word != ","], words[split + 1 :]
    node, rest = _pipeline(words)
    if rest:
        raise GoTemplateError(f"unexpected {rest[0]!r} in {code!r}")
    return (names, how), node


def _pipeline(words: list[str]) -> tuple[Node, list[str]]:
    operands: list[Node] = []
    while words and words[0] != ")":
        word, *words = words
        if word == "(":
            node, words = _pipeline(words)
            if not words:
                raise GoTemplateError("unclosed parenthesis")
            operands.append(node)
            words = words[1:]
        elif word.startswith('"'):
            operands.append(("value", _string(word[1:-1])))
        elif word.isdigit():
            operands.append(("value", int(word)))
        elif word in ("true", "false"):
            operands.append(("value", word == "true"))
        elif word[0] in ".$":
            operands.append(("field", word))
        elif word in _FUNCTIONS and not operands:
            operands.append(("function", word))
        else:
            raise GoTemplateError(f"function {word!r} not defined")
    if not operands:
        raise GoTemplateError("missing value")
    if operands[0][0] != "function" and len(operands) > 1:
        raise GoTemplateError("arguments to what is no function")
    return ("call", operands), words


def _string(body: str) -> str:
    simple = {"n": "\n", "t": "\t", "r": "\r", '"': '"', "\\": "\\"}

    def one(found: re.Match[str]) -> str:
        if found[1][0] in "uU":
            return chr(int(found[1][1:], 16))
        return simple[found[1]]

    return re.sub(r"\\(U[0-9a-fA-F]{8}|u[0-9a-fA-F]{4}|.)", one, body)


def _compare(sign: str, one: Any, other: Any) -> bool:
    if type(one) is not type(other):
        raise GoTemplateError(f"incompatible types for comparison: {one!r} and {other!r}")
    answers = {"eq": one == other, "ne": one != other, "lt": one < other, "le": one <= other}
    answers |= {"gt": one > other, "ge": one >= other}
    return bool(answers[sign])


_FUNCTIONS = ("eq", "ne", "lt", "le", "gt", "ge", "and", "or", "not", "len", "slice", "currentDate")


@dataclass
class _Execution:
    root: Mapping[str, Any]
    date: str
    scopes: list[dict[str, Any]] = field(default_factory=lambda: [{}])

    def run(self, nodes: Sequence[Node], dot: Any) -> str:
        out = []
        for node in nodes:
            if node[0] == "text":
                out.append(node[1])
                continue
            kind, (names, how), pipe = node[:3]
            value = self.value(pipe, dot)
            if kind == "range":
                out.append(self.each(node, value, names, dot))
                continue
            self.set(names, how, value)
            if kind == "if":
                self.scopes.append({})
                out.append(self.run(node[3] if value else node[4], dot))
                self.scopes.pop()
            elif not how:
                out.append("<no value>" if value is None else str(value))
        return "".join(out)

    def each(self, node: Node, values: Sequence[Any], names: list[str], dot: Any) -> str:
        out = []
        for number, value in enumerate(values):
            self.scopes.append(
                dict(zip(names, (number, value) if len(names) == 2 else (value,), strict=False))
            )
            out.append(self.run(node[3], value))
            self.scopes.pop()
        return "".join(out) if values else self.run(node[4], dot)

    def set(self, names: list[str], how: str, value: Any) -> None:
        if how == ":=":
            self.scopes[-1][names[0]] = value
        elif how == "=":
            scope = next((scope for scope in reversed(self.scopes) if names[0] in scope), None)
            if scope is None:
                raise GoTemplateError(f"undefined variable {names[0]}")
            scope[names[0]] = value

    def value(self, node: Node, dot: Any) -> Any:
        kind, what = node[:2]
        if kind == "value":
            return what
        if kind == "field":
            return self.field(what, dot)
        if what[0][0] != "function":
            return self.value(what[0], dot)
        name, arguments = what[0][1], what[1:]
        if name in ("and", "or"):  # the argument that decides; the rest are not evaluated
            result = None
            for argument in arguments:
                result = self.value(argument, dot)
                if bool(result) == (name == "or"):
                    break
            return result
        values = [self.value(argument, dot) for argument in arguments]
        if name == "not":
            return not values[0]
        if name == "len":
            return len(values[0])
        if name == "slice":
            return values[0][slice(*[*values[1:], None, None][:2])]
        return self.date if name == "currentDate" else _compare(name, *values)

    def field(self, path: str, dot: Any) -> Any:
        head, *names = path.split(".")
        value = dot
        if head == "$":
            value = self.root
        elif head:
            scope = next((scope for scope in reversed(self.scopes) if head in scope), None)
            if scope is None:
                raise GoTemplateError(f"undefined variable {head}")
            value = scope[head]
        for name in filter(None, names):
            if isinstance(value, Mapping):
                value = value.get(name)
            elif hasattr(value, name):
                value = getattr(value, name)
            else:
                raise GoTemplateError(f"can't evaluate field {name} in {type(value).__name__}")
        return value


def ollama_text(
    template: str, messages: Sequence[Mapping[str, str]], *, think: bool | None = None, date: str = ""
) -> str:
    """What Ollama sends the model for `messages` (`Template.Execute`)."""
    nodes = parse(template)
    system, collated = _collate(messages)
    values: dict[str, Any] = {"Think": bool(think), "ThinkLevel": "", "IsThinkSet": think is not None}
    if ".Messages" in template:
        values |= {"System": system, "Messages": collated, "Tools": None, "Response": ""}
        return _Execution(values, date).run(nodes, values)
    out = ""
    turn = {"System": "", "Prompt": "", "Response": ""}
    for message in collated:
        if message.Role == "system" and (turn["Prompt"] or turn["Response"]):
            out, turn = out + _legacy(nodes, {**values, **turn}), dict.fromkeys(turn, "")
        if message.Role == "user" and turn["Response"]:
            out, turn = out + _legacy(nodes, {**values, **turn}), dict.fromkeys(turn, "")
        turn[{"system": "System", "user": "Prompt", "assistant": "Response"}[message.Role]] = message.Content
    return out + _Execution({**values, **turn}, date).run(nodes, {**values, **turn})


def _legacy(nodes: Sequence[Node], values: Mapping[str, Any]) -> str:
    """A finished turn; a template without `.Response` gets one at its end."""
    return _Execution(values, "").run([*nodes, ("action", ([], ""), ("field", ".Response"))], values)


def _collate(messages: Sequence[Mapping[str, str]]) -> tuple[str, list[Message]]:
    found: list[Message] = []
    for message in messages:
        if found and found[-1].Role == message["role"] != "tool":
            found[-1].Content += "\n\n" + message["content"]
        else:
            found.append(Message(message["role"], message["content"], message.get("thinking", "")))
    system = "\n\n".join(message["content"] for message in messages if message["role"] == "system")
    return system, found
