"""Records of training data, as people keep them for a fine-tune, as texts and conversations.

The forms are those of the data sets that LLaMA-Factory (data/README.md), SWIFT (Custom-dataset.md), axolotl
and TRL read. A record's keys tell its form. What tells most goes first, because many data sets keep a
`text` beside it that was made for another model's template:

    messages, conversations, conversation   [{"role", "content"}] or [{"from", "value"}], + system, tools
    chosen                                  the better answer of preference data; `rejected` is not read
    instruction, query, prompt, question    with output, response, completion or answer, + input, system,
                                            history
    text, or a string
"""

from __future__ import annotations

import json
import reprlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from qexport.errors import CalibrationError

ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "tool_call": "assistant",
    "tool": "tool",
    "tool_response": "tool",
    "observation": "tool",
    "function": "tool",
    "ipython": "tool",
}
CONVERSATIONS = ("messages", "conversations", "conversation")
REQUESTS = ("instruction", "query", "prompt", "question")
_ANSWERS = ("output", "response", "completion", "answer")
_KEPT = ("tool_calls", "tool_call_id", "name", "reasoning_content")  # what templates read beside the content
_FORMS = (
    'a text in "text", a list in "messages" or "conversations", or texts in "instruction" and "output", '
    '"prompt" and "completion" or "response", "query" and "response"'
)

Message = Mapping[str, Any]


@dataclass(frozen=True)
class Conversation:
    """Messages with `role` and `content`, roles as templates know them; `where` is for errors."""

    messages: tuple[Message, ...]
    where: str
    tools: tuple[Any, ...] = ()

    @property
    def plain(self) -> str:
        """The contents, a line each: all that a model without a template can be given."""
        return "\n".join(message["content"] for message in self.messages if message["content"].strip())

    @property
    def folded(self) -> Conversation | None:
        """It with the system prompt as the beginning of the first user turn; None when that cannot be.

        For templates that know no system prompt: Gemma's and older ones of Mistral's.
        """
        if len(self.messages) < 2 or [m["role"] for m in self.messages[:2]] != ["system", "user"]:
            return None
        system, first, *rest = self.messages
        content = f"{system['content']}\n\n{first['content']}"
        return replace(self, messages=({**first, "content": content}, *rest))


Document = str | Conversation


def json_records(content: str, path: Path, expected: str) -> list[tuple[int, Any]]:
    """The records of a JSON list, of one JSON object or of JSON lines, each with its number or its line's.

    Raises CalibrationError, saying what was `expected`, for what is none of these.
    """

    def parsed(text: str, where: str) -> Any:
        try:
            return json.loads(text)
        except (ValueError, RecursionError) as error:
            raise CalibrationError(
                f"{path} is neither JSON nor JSON lines: {where}{error}", expected=expected
            ) from error

    if content.lstrip().startswith("["):
        return list(enumerate(parsed(content, ""), start=1))
    # only \n ends a line: a text in JSON may hold the other ends that Python knows, such as U+2028
    lines = [(number, line) for number, line in enumerate(content.split("\n"), start=1) if line.strip()]
    if lines and lines[0][1].strip() == "{":  # one object over several lines
        return [(1, parsed(content, ""))]
    return [(number, parsed(line, f"line {number}: ")) for number, line in lines]


def document_of(record: Any, where: str) -> Document | None:
    """The text or conversation in `record`; None when there is nothing but space in it.

    `where` names the record in errors, as in "record 3 of data.json". Raises CalibrationError for a form
    that is not known, a role that is not known, and a conversation without messages.
    """
    document = _document(record, where)
    text = document if isinstance(document, str) else document.plain
    require_text(text, where)
    if isinstance(document, str):
        return document if text.strip() else None
    if len(document.messages) == 1 and document.messages[0]["role"] == "assistant":
        return text if text.strip() else None  # SWIFT's form of a text without a question
    return document if text.strip() or any("tool_calls" in m for m in document.messages) else None


def require_text(text: str, where: str) -> None:
    """Raises CalibrationError for a text that UTF-8 cannot hold."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:  # JSON may escape it, a tokenizer cannot take it
        raise CalibrationError(f"{where} holds half of a surrogate pair, which is no text") from None


def columns(record: Any, where: str, expected: str) -> dict[str, Any]:
    """What `record` has under its keys; CalibrationError, saying what was `expected`, when it is no object.

    Columns that a record does not use are null in files that a data library wrote: they are left out.
    """
    if not isinstance(record, dict):
        raise CalibrationError(f"{where} is {_kind(record)}", expected=expected)
    return {key: value for key, value in record.items() if value is not None}


def conversation_of(
    record: Mapping[str, Any], where: str, *, unanswered: bool = False
) -> Conversation | None:
    """The conversation in `record`, without nulls; None when its keys name none.

    With `unanswered`, a request that has no answer is one too. Raises CalibrationError for a role that is not
    known, and a conversation without messages.
    """
    messages = _messages(record, where, unanswered)
    if messages is None:
        return None
    if not messages:
        raise CalibrationError(
            f"{where} holds a conversation without messages", expected='[{"role": ..., "content": ...}]'
        )
    return Conversation(tuple(_with_system(record, messages, where)), where, _tools(record))


def found_keys(record: Mapping[str, Any]) -> str:
    """The keys of `record` and the types of their values, for errors."""
    return ", ".join(f"{key}: {type(value).__name__}" for key, value in record.items()) or "nothing"


def _document(record: Any, where: str) -> Document:
    if isinstance(record, str):
        return record
    record = columns(record, where, _FORMS)
    conversation = conversation_of(record, where)
    if conversation is not None:
        return conversation
    for key in ("text", "chosen"):  # preference data of plain texts has its whole text there
        if isinstance(record.get(key), str):
            return str(record[key])
    raise CalibrationError(
        f"{where} has no text that is known by its keys (it has {found_keys(record)})", expected=_FORMS
    )


def _messages(record: Mapping[str, Any], where: str, unanswered: bool) -> list[Message] | None:
    """The messages of `record`; None when it is no conversation."""
    chosen = record.get("chosen")
    for key in CONVERSATIONS:
        if key in record:
            if not isinstance(record[key], list):
                raise CalibrationError(
                    f'the "{key}" of {where} is {_kind(record[key])}', expected="a list of messages"
                )
            turns = list(_turns(record[key], where))
            return [*turns, *_turns([chosen], where)] if isinstance(chosen, dict) and turns else turns
    request = next((record[key] for key in REQUESTS if key in record), record.get("input"))
    answer = next((record[key] for key in _ANSWERS if key in record), chosen)
    if isinstance(chosen, list) and not isinstance(request, list):
        return list(_turns(chosen, where))  # the whole conversation, its prompt included
    if request is None or (answer is None and not unanswered):
        return None
    extra = record.get("input") if any(key in record for key in REQUESTS) else None
    if isinstance(extra, str) and extra.strip() and isinstance(request, str):
        request = f"{request}\n{extra}" if request.strip() else extra  # as LLaMA-Factory joins the two
    return [
        *_history(record.get("history"), where),
        *_part(request, "user", where),
        *([] if answer is None else _part(answer, "assistant", where)),
    ]


def _part(value: Any, role: str, where: str) -> list[Message]:
    """A request or an answer: a text, some texts of which the first is taken, or messages."""
    if isinstance(value, dict):
        return list(_turns([value], where))
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return list(_turns(value, where))
    if isinstance(value, list) and value:
        value = value[0]
    if not isinstance(value, str):
        raise CalibrationError(
            f"{'the request' if role == 'user' else 'the answer'} of {where} is {_kind(value)}",
            expected="a text",
        )
    return [{"role": role, "content": value}]


def _history(history: Any, where: str) -> Iterator[Message]:
    for pair in history or ():
        if not isinstance(pair, list) or len(pair) != 2:
            raise CalibrationError(
                f'the "history" of {where} holds {reprlib.repr(pair)}', expected="[request, answer] pairs"
            )
        for role, value in zip(("user", "assistant"), pair, strict=True):
            if value is not None:
                yield from _part(value, role, where)


def _turns(items: Sequence[Any], where: str) -> Iterator[Message]:
    for number, item in enumerate(items, start=1):
        place = f"message {number} of {where}"
        if not isinstance(item, dict):
            raise CalibrationError(f"{place} is {_kind(item)}", expected='{"role": ..., "content": ...}')
        role = item.get("role", item.get("from"))
        if role is None and (pair := [key for key in item if str(key).lower() in ROLES]):
            for key in pair:  # SWIFT's [{"human": ..., "assistant": ...}]
                yield {"role": ROLES[str(key).lower()], "content": _content(item[key], place)}
            continue
        if not isinstance(role, str):
            raise CalibrationError(
                f"{place} has no role (it has {', '.join(map(str, item)) or 'nothing'})",
                expected='"role" and "content", or "from" and "value"',
            )
        if role.strip().lower() not in ROLES:
            raise CalibrationError(
                f"{place} has the role {role!r}", expected="one of " + ", ".join(sorted(ROLES))
            )
        content = item.get("content", item.get("value"))
        if content is None and item.get("tool_calls"):
            content = ""  # a call of a tool has no words
        kept = {key: item[key] for key in _KEPT if item.get(key) is not None}
        yield {"role": ROLES[role.strip().lower()], "content": _content(content, place), **kept}


def _content(content: Any, place: str) -> str:
    """A message's text; OpenAI's lists of text parts joined."""
    if isinstance(content, str):
        return content
    if isinstance(content, list):
        texts = []
        for part in content:
            text = part.get("text") if isinstance(part, dict) else part
            if not isinstance(text, str):
                kind = part.get("type") if isinstance(part, dict) else None
                raise CalibrationError(f"{place} has a part of type {kind or _kind(part)}", expected="text")
            texts.append(text)
        return "".join(texts)
    raise CalibrationError(f"the content of {place} is {_kind(content)}", expected="a text")


def _with_system(record: Mapping[str, Any], messages: list[Message], where: str) -> list[Message]:
    """`messages`, the record's own system prompt first unless they bring one."""
    system = record.get("system", "")
    if not isinstance(system, str):
        raise CalibrationError(f'the "system" of {where} is {_kind(system)}', expected="a text")
    if not system.strip() or messages[0]["role"] == "system":
        return messages
    return [{"role": "system", "content": system}, *messages]


def _tools(record: Mapping[str, Any]) -> tuple[Any, ...]:
    """Descriptions of tools for the template; LLaMA-Factory keeps them as JSON in a text."""
    tools = record.get("tools")
    if isinstance(tools, str):
        try:
            tools = json.loads(tools)
        except (ValueError, RecursionError):
            return ()
    return tuple(tools) if isinstance(tools, list) else ()


def _kind(value: Any) -> str:
    """The name of a value's JSON type, with its article."""
    names = {
        dict: "an object",
        list: "a list",
        str: "a text",
        bool: "true or false",
        int: "a number",
        float: "a number",
        type(None): "null",
    }
    return names.get(type(value), type(value).__name__)
