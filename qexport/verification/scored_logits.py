"""Logits of scored windows, block by block: memory of one block and of some of the hidden states."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch

from qexport.calibrate.windows import ScoredWindow
from qexport.errors import NonFiniteError
from qexport.events import Advanced, Finished, OnEvent, Started, ignore
from qexport.modeling.activations import Activations
from qexport.modeling.blocks import BlockStream

_BATCH_TOKENS = 4096


def scored_logits(
    stream: BlockStream,
    windows: Sequence[ScoredWindow],
    memory: int,
    directory: Path,
    on_event: OnEvent = ignore,
) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
    """Each window's number, its scored tokens int64 [scored], and the logits that foretell them, [scored,
    vocabulary]; in an order of its own.

    Hidden states past `memory` bytes go to a temporary file in `directory`. They keep fp32: scored in
    16 bits a model is 2e-7 nats a token, and 5e-6 of its perplexity, off itself (tinystories-656k).
    Raises NonFiniteError that names the block from which on values are NaN or infinite, StorageError.
    """
    chosen = _batches(windows)
    batches = [_padded([windows[n].tokens for n in batch]) for batch in chosen]
    with Activations(memory, directory, torch.float32) as hidden:
        hidden.extend(stream.embeddings(batches))
        on_event(Started("scores", len(stream) + 1, "blocks"))
        for index in range(len(stream)):
            with stream.block(index):
                for number, batch in enumerate(hidden):  # one set of hidden states, not two
                    after = stream.run(index, batch)
                    if not bool(after.isfinite().all()):
                        raise NonFiniteError(f"{stream.block_name(index)} gives NaN or infinity on the text")
                    hidden[number] = after
            on_event(Advanced(1, stream.block_name(index)))
        # a row at a time: with a vocabulary of 150 000 the logits of a batch would be gigabytes
        order = [n for batch in chosen for n in batch]
        tokens = _rows(windows, chosen, batches)
        logits = stream.logits(_rows(windows, chosen, batches), _rows(windows, chosen, hidden))
        for n, seen, found in zip(order, tokens, logits, strict=True):
            first = windows[n].first
            scored = found[0, first - 1 : -1]
            if not bool(scored.amax(dim=-1).isfinite().all()):  # NaN is the largest of all; -inf may be
                raise NonFiniteError("the output head gives NaN or infinity on the text")
            yield n, seen[0, first:], scored
    on_event(Advanced(1, "output head"))
    on_event(Finished())


def _batches(windows: Sequence[ScoredWindow]) -> list[list[int]]:
    """Numbers of the windows, those of like length together, at most _BATCH_TOKENS a batch."""
    batches: list[list[int]] = []
    width = 0
    for n in sorted(range(len(windows)), key=lambda n: -len(windows[n].tokens)):
        if not batches or (len(batches[-1]) + 1) * width > _BATCH_TOKENS:
            batches.append([])
            width = len(windows[n].tokens)
        batches[-1].append(n)
    return batches


def _rows(
    windows: Sequence[ScoredWindow], chosen: Sequence[Sequence[int]], batches: Iterable[torch.Tensor]
) -> Iterator[torch.Tensor]:
    """The rows of batches [n, length, ...], each [1, the window's own length, ...]."""
    for numbers, batch in zip(chosen, batches, strict=True):
        for row, n in enumerate(numbers):
            yield batch[row : row + 1, : len(windows[n].tokens)]


def _padded(rows: Sequence[Sequence[int]]) -> torch.Tensor:
    """Rows filled up on the right: what follows a token cannot change its score."""
    width = max(len(row) for row in rows)
    return torch.tensor([[*row, *[0] * (width - len(row))] for row in rows])
