"""Perplexity on sliding windows, block by block: memory of one block and of the hidden states."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from qexport.calibrate.windows import ScoredWindow
from qexport.errors import NonFiniteError
from qexport.events import Advanced, Finished, OnEvent, Started, ignore
from qexport.modeling.blocks import BlockStream
from qexport.results import Difference, Perplexity

_BATCH_TOKENS = 4096
_FEW_DOCUMENTS = 10  # below it, windows are the units of the standard error


def perplexity(
    stream: BlockStream,
    windows: Sequence[ScoredWindow],
    recipe: Mapping[str, Any],
    on_event: OnEvent = ignore,
) -> Perplexity:
    """exp of the token-weighted mean negative log-likelihood over the windows' scored tokens.

    Raises NonFiniteError when the model's logits are NaN or infinite.
    """
    chosen = _batches(windows)
    batches = [_padded([windows[n].tokens for n in batch]) for batch in chosen]
    hidden = stream.embed(batches)
    on_event(Started("perplexity", len(stream) + 1, "blocks"))
    for index in range(len(stream)):
        with stream.block(index):
            hidden = [stream.run(index, batch) for batch in hidden]
        if not all(bool(batch.isfinite().all()) for batch in hidden):
            raise NonFiniteError(f"{stream.block_name(index)} gives NaN or infinity on the text")
        on_event(Advanced(1, stream.block_name(index)))
    sums = [0.0] * len(windows)
    # a row at a time: with a vocabulary of 150 000 the logits of a batch would be gigabytes
    rows = [(n, b, row) for b, batch in enumerate(chosen) for row, n in enumerate(batch)]
    singles = [batches[b][row : row + 1, : len(windows[n].tokens)] for n, b, row in rows]
    finals = [hidden[b][row : row + 1, : len(windows[n].tokens)] for n, b, row in rows]
    for (n, _, _), tokens, logits in zip(rows, singles, stream.logits(singles, finals), strict=True):
        first = windows[n].first
        nll = torch.nn.functional.cross_entropy(
            logits[0, first - 1 : -1], tokens[0, first:], reduction="none"
        )
        sums[n] = float(nll.double().sum())
    on_event(Advanced(1, "output head"))
    on_event(Finished())
    return summarize(*_units(windows, sums), recipe)


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


def _units(windows: Sequence[ScoredWindow], sums: Sequence[float]) -> tuple[list[float], list[int]]:
    """Sums and token counts of the documents, which are independent; of the windows if those are few."""
    documents = {window.document for window in windows}
    if len(documents) < _FEW_DOCUMENTS:
        return list(sums), [window.scored for window in windows]
    totals = dict.fromkeys(sorted(documents), 0.0)
    counts = dict.fromkeys(sorted(documents), 0)
    for window, value in zip(windows, sums, strict=True):
        totals[window.document] += value
        counts[window.document] += window.scored
    return list(totals.values()), list(counts.values())


def summarize(sums: Sequence[float], counts: Sequence[int], recipe: Mapping[str, Any]) -> Perplexity:
    """Perplexity from each unit's summed negative log-likelihood (nats) and token count."""
    total = sum(counts)
    mean = sum(sums) / total
    if not math.isfinite(mean):
        raise NonFiniteError("the model's logits are NaN or infinite on the text")
    try:
        value = math.exp(mean)
    except OverflowError:
        value = math.inf
    return Perplexity(value, value * _standard_error(sums, counts), total, tuple(sums), tuple(counts), recipe)


def _standard_error(sums: Sequence[float], counts: Sequence[int]) -> float:
    """Of the ratio sum(sums) / sum(counts); units, not tokens, count as independent.

    The ratio estimator's linearised variance (Cochran, Sampling Techniques, section 6.4).
    """
    n, total = len(sums), sum(counts)
    if n < 2:
        return math.nan
    mean = sum(sums) / total
    squares = sum((s - mean * c) ** 2 for s, c in zip(sums, counts, strict=True))
    return math.sqrt(squares * n / (n - 1)) / total


def relative_difference(reference: Perplexity, candidate: Perplexity) -> Difference:
    """The candidate's rise over the reference, paired by unit: both saw the same tokens."""
    if reference.unit_tokens != candidate.unit_tokens:
        raise ValueError("the two perplexities were measured on different text")
    gaps = [c - r for r, c in zip(reference.unit_nll, candidate.unit_nll, strict=True)]
    mean = sum(gaps) / reference.tokens
    try:
        ratio = math.exp(mean)
    except OverflowError:
        ratio = math.inf
    return Difference(ratio - 1, ratio * _standard_error(gaps, reference.unit_tokens))
