"""What the verbs return: typed results, plain numbers with their units in the names."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
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
class TensorError:
    """How far a quantized matrix is from the weights it stands for: |W' - W| / |W|.

    `weighted` is the same for its outputs on the calibration inputs, None for methods without data. Where
    blocks are tuned both are those of the codes before that.
    """

    tensor: str
    bits: int
    relative: float
    weighted: float | None


@dataclass(frozen=True)
class GgufFileResult:
    """One GGUF model of an output: its file, or the first of its parts, its type or mix, and its size.

    `types` counts the tensors by type.
    """

    file: str
    type: str
    size_bytes: int
    bits_per_weight: float
    types: Mapping[str, int]


@dataclass(frozen=True)
class PlanRow:
    """Layers that a plan gives the same bits and group size: how many, their weights, and what they are
    predicted to cost together, nats a token, where that was measured."""

    bits: int
    group_size: int | None
    layers: int
    weights: int
    loss: float | None


@dataclass(frozen=True)
class QuantizeResult:
    """A quantized checkpoint and what it took.

    The weights lie `copies` times in the output. `bits_per_weight` counts every byte of the safetensors,
    embeddings and scales included, over every parameter; `layer_bits_per_weight` the quantized layers alone.
    `bits` is the mean over the weights where layers differ. `files` has the GGUF models; then the size is
    that of all, the rest the smallest one's. `plan` counts the layers where bits were allotted to them.
    """

    path: Path
    method: str
    solver: str
    format: str
    bits: float
    quantized_layers: int
    layers_left: tuple[str, ...]
    size_bytes: int
    bits_per_weight: float
    layer_bits_per_weight: float
    copies: int
    seconds: float
    peak_bytes: int
    tensors: tuple[TensorError, ...]
    files: tuple[GgufFileResult, ...] = ()
    plan: tuple[PlanRow, ...] = ()

    def worst(self, count: int = 5) -> list[TensorError]:
        """The tensors that lost most: by their outputs where those were seen, else by their values."""
        return sorted(self.tensors, key=_loss, reverse=True)[:count]


def _loss(error: TensorError) -> float:
    return error.relative if error.weighted is None else error.weighted


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
class Divergence:
    """KL(full precision || candidate) a token, nats: mean, standard error, 99th percentile over tokens.

    `same_top` is the share of tokens with the same most likely one. `unit_sums` and `unit_tokens` are the
    sums of each independent unit, as in `Perplexity`.
    """

    mean: float
    standard_error: float
    percentile_99: float
    same_top: float
    same_top_error: float
    tokens: int
    unit_sums: tuple[float, ...]
    unit_tokens: tuple[int, ...]
    recipe: Mapping[str, Any]


@dataclass(frozen=True)
class Interval:
    """A score with its 95 % bootstrap interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class TextScores:
    """How near answers come to texts, each 0 to 100; with sacrebleu's signatures by name of the score."""

    bleu: Interval
    chrf: Interval
    rouge_l: Interval
    exact_match: Interval
    signatures: Mapping[str, str]


@dataclass(frozen=True)
class Answers:
    """A model's greedy answers, `tokens` in `seconds`; against the references and the full model's."""

    texts: tuple[str, ...]
    tokens: int
    seconds: float
    references: TextScores | None
    full: TextScores | None
    recipe: Mapping[str, Any]


@dataclass(frozen=True)
class TaskScore:
    """A score of lm-evaluation-harness, with its standard error (NaN where it tells none)."""

    value: float
    standard_error: float


@dataclass(frozen=True)
class Evaluation:
    """One model's scores, and how many of its tensors were decoded and found whole.

    A score that was not asked for, or that full precision has none of, is None. `speeds` are generated tokens
    a second by runtime, `tasks` scores by 'task/metric'.
    """

    model: str
    size_bytes: int
    bits_per_weight: float
    tensors_checked: int
    perplexity: Perplexity
    divergence: Divergence | None
    answers: Answers | None
    speeds: Mapping[str, float] = field(default_factory=dict)
    speed_recipe: Mapping[str, Any] = field(default_factory=dict)
    tasks: Mapping[str, TaskScore] = field(default_factory=dict)
    task_recipe: Mapping[str, Any] = field(default_factory=dict)


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


@dataclass(frozen=True)
class RuntimeCheck:
    """What a real runtime made of a checkpoint, against the weights that qexport decodes from it.

    `layers` counts the quantized layers that the runtime has, by class, `stored_layers` those that the file
    holds codes for; a runtime that `decodes_at_load` may have fewer. `missing` started with random weights,
    `unexpected` was not read. `difference` is |theirs - ours| / |ours| over the logits of `tokens` tokens,
    `largest` the largest absolute one, `same_top` the share of tokens whose most likely successor is the
    same; they are None where there was nothing to compare.
    """

    model: str
    runtime: str
    versions: Mapping[str, str]
    dtype: str
    layers: Mapping[str, int]
    stored_layers: int
    decodes_at_load: bool
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    mismatched: tuple[str, ...]
    problems: tuple[str, ...]
    tokens: int
    difference: float | None
    largest: float | None
    same_top: float | None
    tolerance: float
