"""What the verbs return: typed results, plain numbers with their units in the names."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any


def plain(data: Any) -> Any:
    """`data` as JSON can hold it: NaN and infinity, which it cannot, become None."""
    if isinstance(data, float):
        return data if math.isfinite(data) else None
    if isinstance(data, Mapping):
        return {key: plain(value) for key, value in data.items()}
    return [plain(value) for value in data] if isinstance(data, (list, tuple)) else data


@dataclass(frozen=True)
class TensorChange:
    """How much a merge changed a tensor: |W' - W| / |W|, and the numbers, from 1, of the adapters that did.

    `relative_norm` is infinite where the base was all zeros.
    """

    tensor: str
    relative_norm: float
    adapters: tuple[int, ...]


@dataclass(frozen=True)
class MergeResult:
    """A merged checkpoint, and what became of its tensors.

    `base` is what was merged into, `base_precision` how a quantized base was made full ("full",
    "dequantize", or None where it was not quantized), `vocabulary_rows` the rows before and after where the
    vocabulary was resized.
    """

    path: Path
    base: Path
    base_precision: str | None
    vocabulary_rows: tuple[int, int] | None
    size_bytes: int
    tensors: int
    changes: tuple[TensorChange, ...]


@dataclass(frozen=True)
class QuantizeResult:
    """A quantized checkpoint and what it took.

    `bits_per_weight` counts every byte of the weights' files, embeddings and scales included, over every
    parameter; `layer_bits_per_weight` the quantized layers alone.
    """

    path: Path
    method: str
    bits: int
    quantized_layers: int
    layers_left: tuple[str, ...]
    size_bytes: int
    bits_per_weight: float
    layer_bits_per_weight: float
    seconds: float
    peak_bytes: int


@dataclass(frozen=True)
class Perplexity:
    """exp of the mean negative log-likelihood a token, with its standard error.

    `unit_nll` (nats, summed) and `unit_tokens` are the sums of each independent unit, a document or a
    window: what a paired comparison of two models on the same text needs.
    """

    value: float
    standard_error: float
    tokens: int
    unit_nll: tuple[float, ...]
    unit_tokens: tuple[int, ...]
    recipe: Mapping[str, Any]


@dataclass(frozen=True)
class Bleu:
    """Corpus BLEU of greedy answers, with sacrebleu's signature; the answers stand beside it."""

    value: float
    signature: str
    answers: tuple[str, ...]
    recipe: Mapping[str, Any]


@dataclass(frozen=True)
class Evaluation:
    """One model's scores, and how many of its tensors were decoded and found whole.

    A score that was not asked for is None.
    """

    model: str
    size_bytes: int
    bits_per_weight: float
    tensors_checked: int
    perplexity: Perplexity
    bleu: Bleu | None


@dataclass(frozen=True)
class Difference:
    """How much worse the candidate is: relative rise of perplexity, and its paired standard error."""

    loss: float
    standard_error: float


@dataclass(frozen=True)
class VerifyResult:
    """Reference and candidate on the same data."""

    reference: Evaluation
    candidate: Evaluation
    loss: Difference
