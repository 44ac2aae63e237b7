"""Conversations as a model's own chat template writes them, and as tokens."""

from __future__ import annotations

from typing import Any

from qexport.calibrate.records import Conversation, Document
from qexport.calibrate.windows import text_tokens
from qexport.errors import CalibrationError


def document_tokens(document: Document, tokenizer: Any) -> list[int]:
    """Token ids of a text, with its special tokens and an EOS, or of a conversation in the template's words.

    A template writes BOS and the ends of turns itself: the tokenizer adds none. Where there is no template
    a conversation is a text of its contents, a line each: calibration needs activations like those in use,
    and the words make more of them than the marks between. Raises CalibrationError when the template fails.
    """
    if isinstance(document, str):
        return text_tokens(document, tokenizer)
    if not tokenizer.chat_template:
        return text_tokens(document.plain, tokenizer)
    return list(tokenizer(rendered(document, tokenizer), add_special_tokens=False).input_ids)


def rendered(conversation: Conversation, tokenizer: Any, *, asking: bool = False) -> str:
    """The conversation as the chat template writes it; with `asking`, up to where an answer to it begins.

    A template that fails on a system prompt (Gemma's and older ones of Mistral's) gets it as the beginning of
    the first user turn. Raises CalibrationError, naming the record, when it fails all the same.
    """
    failure: Exception | None = None
    for attempt in (conversation, conversation.folded):
        if attempt is not None:
            try:
                return _apply(attempt, tokenizer, add_generation_prompt=asking)
            except Exception as error:  # a template raises what it likes
                failure = error
    reason = (str(failure).strip() or type(failure).__name__).splitlines()[0]
    raise CalibrationError(
        f"the model's chat template fails on {conversation.where}: {reason}",
        expected="a conversation that it can write",
        remedy='take the record out, or give its words as {"text": "..."}',
    ) from failure


def _apply(conversation: Conversation, tokenizer: Any, **options: Any) -> str:
    tools = {"tools": list(conversation.tools)} if conversation.tools else {}
    messages = [dict(message) for message in conversation.messages]
    return str(tokenizer.apply_chat_template(messages, tokenize=False, **options, **tools))
