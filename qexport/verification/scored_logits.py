"""Logits of scored windows, block by block: memory of one block and of the hidden states."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from qexport.calibrate.windows import ScoredWindow
from qexport.errors import NonFiniteError
from qexport.events import Advanced, Finished, OnEvent, Started, ignore
from qexport.modeling.blocks import BlockStream

_BATCH_TOKENS = 4096


def scored_logits(
    stream: BlockStream, windows: Sequence[ScoredWindow], on_event: OnEvent = ignore
) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
    """Each window's number, its scored tokens int64 [scored], and the logits that foretell them, [scored,
    vocabulary]; in an order of its own.

    Raises NonFiniteError that names the block from which on values are NaN or infinite.
    """
    chosen = _batches(windows)
    batches = [_padded([windows[n].tokens for n in batch]) for batch in chosen]
    hidden = stream.embed(batches)
    on_event(Started("scores", len(stream) + 1, "blocks"))
    for index in range(len(stream)):
        with stream.block(index):
            hidden = [stream.run(index, batch) for batch in hidden]
        if not all(bool(batch.isfinite().all()) for batch in hidden):
            raise NonFiniteError(f"{stream.block_name(index)} gives NaN or infinity on the text")
        on_event(Advanced(1, stream.block_name(index)))
    # a row at a time: with a vocabulary of 150 000 the logits of a batch would be gigabytes
    rows = [(n, b, row) for b, batch in enumerate(chosen) for row, n in enumerate(batch)]
    singles = [batches[b][row : row + 1, : len(windows[n].tokens)] for n, b, row in rows]
    finals = [hidden[b][row : row + 1, : len(windows[n].tokens)] for n, b, row in rows]
    for (n, _, _), tokens, logits in zip(rows, singles, stream.logits(singles, finals), strict=True):
        first = windows[n].first
        scored = logits[0, first - 1 : -1]
        if not bool(scored.amax(dim=-1).isfinite().all()):  # NaN is the largest of all; -inf may be
            raise NonFiniteError("the output head gives NaN or infinity on the text")
        yield n, tokens[0, first:], scored
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


def _padded(rows: Sequence[Sequence[int]]) -> torch.Tensor:
    """Rows filled up on the right: what follows a token cannot change its score."""
    width = max(len(row) for row in rows)
    return torch.tensor([[*row, *[0] * (width - len(row))] for row in rows])
