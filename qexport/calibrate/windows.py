"""Text as token windows: packed for calibration, document by document for scoring.

Each window opens with the model's BOS token where its tokenizer sets one: models use it as their
attention sink, and a window without it measures its absence.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from qexport.errors import CalibrationError

Value = TypeVar("Value")


def opening_token(tokenizer: Any) -> int | None:
    """The BOS id, if the tokenizer puts one before a text by itself."""
    bos = tokenizer.bos_token_id
    return bos if bos is not None and bos in tokenizer("a").input_ids[:1] else None


def text_tokens(document: str, tokenizer: Any) -> list[int]:
    """Token ids of a document with its special tokens, an EOS at its end."""
    tokens = list(tokenizer(document).input_ids)
    end = tokenizer.eos_token_id
    return tokens if end is None or tokens[-1:] == [end] else [*tokens, end]


def shuffled(values: Sequence[Value], seed: int) -> list[Value]:
    """`values` in an order set by `seed`; the input is not changed."""
    order = list(values)
    random.Random(seed).shuffle(order)
    return order


@dataclass(frozen=True)
class Packed:
    """Windows int64 [n, length], how many documents they took, and how many tokens were repeated to fill."""

    windows: torch.Tensor
    documents: int
    repeated: int = 0


def packed(documents: Iterable[Sequence[int]], *, samples: int, length: int, opening: int | None) -> Packed:
    """At most `samples` windows of documents' token ids, one after the other: none is dropped for its size.

    Every window opens with `opening`, if there is one; where a window begins with a document that brings
    it, it is not doubled. Documents are taken from the iterator as they are needed. The last window is
    filled up from the start of the stream; documents that end before `samples` windows are full give
    fewer. Raises CalibrationError when there are no tokens.
    """
    source = iter(documents)
    stream: list[int] = []
    windows: list[list[int]] = []
    taken = at = repeated = 0
    while len(windows) < samples:
        while len(stream) < at + length and (tokens := next(source, None)) is not None:
            stream += tokens
            taken += 1
        if at >= len(stream):
            break
        window = [] if opening is None or stream[at] == opening else [opening]
        room = length - len(window)
        window += stream[at : at + room]
        at += room
        repeated = length - len(window)
        while len(window) < length:  # the last one is filled from the start again
            window += stream[: length - len(window)]
        windows.append(window)
    if not windows:
        raise CalibrationError("the calibration text has no tokens")
    return Packed(torch.tensor(windows), taken, repeated)


def batches(windows: torch.Tensor, tokens: int) -> list[torch.Tensor]:
    """Windows [n, length] in parts of at most `tokens` tokens, of one window at least."""
    return list(torch.split(windows, max(tokens // windows.shape[1], 1)))


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
