"""Prompts with their references, from the record forms in which people keep them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qexport.calibrate.records import (
    CONVERSATIONS,
    REQUESTS,
    Conversation,
    Message,
    columns,
    conversation_of,
    found_keys,
    json_records,
    require_text,
)
from qexport.calibrate.texts import read_text, refuse_tables
from qexport.errors import CalibrationError

_JSON = (".json", ".jsonl", ".ndjson")
_FORMS = (
    '{"prompt", "reference"}, {"instruction", "input", "output"}, {"messages": [{"role", "content"}]}, '
    '{"conversations": [{"from", "value"}]}, {"translation": {"de", "en"}} or {"source", "target"}'
)
_REFERENCE = "output"  # the answer's first name in `records`


@dataclass(frozen=True)
class Prompt:
    """What a model is asked, and the answer that was wished for, if any.

    The last message is not the assistant's. `where` names the prompt in errors; `tools` are for the template.
    """

    messages: tuple[Message, ...]
    reference: str | None
    where: str = "a prompt"
    tools: tuple[Any, ...] = ()

    @property
    def conversation(self) -> Conversation:
        """The messages as templates take them."""
        return Conversation(self.messages, self.where, self.tools)

    @property
    def text(self) -> str:
        """The messages' contents, a line each: what a reader sees, and a model without a template."""
        return self.conversation.plain


def prompt_of(text: str, reference: str | None = None, where: str = "a prompt") -> Prompt:
    """The prompt of a single user turn."""
    return Prompt(({"role": "user", "content": text},), reference, where)


def read_prompts(
    path: Path, *, languages: tuple[str, str] | None = None, wording: str = "{source}"
) -> tuple[Prompt, ...]:
    """The prompts of a JSON or JSON-lines file, in any form of these, record by record; or a line each.

    - {"prompt", "reference"}, and what training data calls them: {"instruction", "input", "output"} (Alpaca),
      {"prompt", "completion"}, {"question", "answer"}, ...; with "system" and "history" where they are.
    - {"messages": [{"role", "content"}]} (OpenAI), {"conversations": [{"from", "value"}]} (ShareGPT): where
      the last turn is the assistant's it is the reference, what stands before it the prompt. A conversation
      that ends in a question is a prompt without a reference.
    - {"translation": {"de": ..., "en": ...}}, the source first unless `languages` names (source, target);
      {"source", "target"}. `wording` asks for the translation: "German: {source}\\nEnglish:".
    - A text alone is a prompt, as is each line of a file that is not JSON. Blank lines are left out.

    A reference that is missing, null or blank is None. Raises CalibrationError for a record in no such form
    or without a prompt, and for a file without records; StorageError for a file that cannot be read.
    """
    refuse_tables(path)
    if "{source}" not in wording:
        raise CalibrationError(f"the wording {wording!r} has no place for a text", expected="{source} in it")
    content = read_text(path)
    if path.suffix.lower() in _JSON:
        prompts = tuple(
            _prompt(record, f"record {number} of {path}", languages, wording)
            for number, record in json_records(content, path, f"records such as {_FORMS}")
        )
    else:
        prompts = tuple(
            prompt_of(line.strip(), None, f"line {number} of {path}")
            for number, line in enumerate(content.split("\n"), start=1)
            if line.strip()
        )
    if not prompts:
        raise CalibrationError(f"{path} holds no prompts", expected=f"a line each, or records: {_FORMS}")
    return prompts


def _prompt(record: Any, where: str, languages: tuple[str, str] | None, wording: str) -> Prompt:
    if isinstance(record, str):
        record = {"prompt": record}
    record = columns(record, where, _FORMS)
    pair = _translation(record, where, languages)
    if pair:
        source, target = pair
        record = {"prompt": wording.replace("{source}", source) if source.strip() else "", _REFERENCE: target}
    elif "reference" in record:
        record = {**record, _REFERENCE: _text(record["reference"], f'the "reference" of {where}')}
    conversation = conversation_of(
        {key: value for key, value in record.items() if value is not None}, where, unanswered=True
    )
    if conversation is None:
        raise CalibrationError(
            f"{where} has no prompt that is known by its keys (it has {found_keys(record)})", expected=_FORMS
        )
    messages, reference = conversation.messages, ""
    if messages[-1]["role"] == "assistant":
        messages, reference = messages[:-1], str(messages[-1]["content"])
    if not any(message["content"].strip() for message in messages if message["role"] != "system"):
        raise CalibrationError(f"{where} has no prompt: it asks nothing", expected=_FORMS)
    prompt = Prompt(messages, reference if reference.strip() else None, where, conversation.tools)
    require_text(prompt.text + reference, where)
    return prompt


def _translation(
    record: Mapping[str, Any], where: str, languages: Sequence[str] | None
) -> tuple[str, str | None] | None:
    """Source and target of a translation pair; None when `record` is none."""
    pair = record.get("translation")
    if isinstance(pair, dict):
        chosen = languages or tuple(pair)
        if len(chosen) != 2 or not set(chosen) <= set(pair):
            raise CalibrationError(
                f'the "translation" of {where} has {", ".join(map(str, pair)) or "nothing"}',
                expected=f"texts in {' and '.join(languages)}" if languages else "texts in two languages",
                remedy="name the source's and the target's key",
            )
        source, target = (pair[language] for language in chosen)
        place = f'the "translation" of {where}'
    elif "source" in record and not any(key in record for key in (*CONVERSATIONS, *REQUESTS, "input")):
        source, target = record["source"], record.get("target")
        place = f'the "source" or "target" of {where}'
    else:
        return None
    return _text(source, place), None if target is None else _text(target, place)


def _text(value: Any, place: str) -> str:
    if not isinstance(value, str):
        raise CalibrationError(f"{place} is of type {type(value).__name__}", expected="a text")
    return value
