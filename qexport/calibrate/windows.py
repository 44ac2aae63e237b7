"""Text as token windows: packed for calibration, document by document for scoring.

Each window opens with the model's BOS token where its tokenizer sets one: models use it as their
attention sink, and a window without it measures its absence.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from qexport.errors import CalibrationError


def opening_token(tokenizer: Any) -> int | None:
    """The BOS id, if the tokenizer puts one before a text by itself."""
    bos = tokenizer.bos_token_id
    return bos if bos is not None and bos in tokenizer("a").input_ids[:1] else None


def calibration_windows(
    documents: Sequence[str], tokenizer: Any, *, samples: int, length: int, seed: int
) -> torch.Tensor:
    """At most `samples` windows int64 [samples, length] of the documents in an order set by `seed`.

    Documents are packed one after the other, each with its special tokens and an EOS: none is dropped
    for being short or long.
    The last window is filled up from the start of the stream; a text that ends before `samples` windows
    are full gives fewer. Raises CalibrationError when there are no tokens.
    """
    order = list(documents)
    random.Random(seed).shuffle(order)
    opening = opening_token(tokenizer)
    room = length - (opening is not None)
    end = tokenizer.eos_token_id
    stream: list[int] = []
    for document in order:
        tokens = tokenizer(document).input_ids
        stream += tokens if end is None or tokens[-1:] == [end] else [*tokens, end]
        if len(stream) >= samples * room:
            break
    if not stream:
        raise CalibrationError("the calibration text has no tokens")
    count = min(samples, -(-len(stream) // room))
    while len(stream) < count * room:  # the last window is filled from the start again
        stream += stream[: count * room - len(stream)]
    windows = torch.tensor(stream[: count * room]).reshape(count, room)
    return windows if opening is None else torch.nn.functional.pad(windows, (1, 0), value=opening)


@dataclass(frozen=True)
class ScoredWindow:
    """Token ids of one window; those from position `first` on are scored. `document` is its number."""

    tokens: list[int]
    first: int
    document: int

    @property
    def scored(self) -> int:
        """How many tokens are scored."""
        return len(self.tokens) - self.first


def scored_windows(
    documents: Sequence[str], tokenizer: Any, *, length: int, stride: int
) -> list[ScoredWindow]:
    """Windows of at most `length` tokens that score every token of every document once.

    A document that fits is one window. In a longer one the first window scores all of its tokens, each
    later one its last `stride`, with the tokens before them as context; the last begins earlier rather
    than being shorter. Raises CalibrationError when there is no token to score.
    """
    opening = opening_token(tokenizer)
    lead = [] if opening is None else [opening]
    room = length - len(lead)
    windows = []
    for number, document in enumerate(documents):
        tokens = tokenizer(document).input_ids[len(lead) :]
        end = min(room, len(tokens))
        windows.append(ScoredWindow(lead + tokens[:end], 1, number))
        while end < len(tokens):
            new_end = min(end + stride, len(tokens))
            start = new_end - room
            windows.append(ScoredWindow(lead + tokens[start:new_end], end - start + len(lead), number))
            end = new_end
    windows = [window for window in windows if window.scored > 0]
    if not windows:
        raise CalibrationError("the text has no token to score", expected="at least two tokens in a document")
    return windows
