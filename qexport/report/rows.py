"""One row a variant: what it costs and what it lost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from qexport.results import Evaluation, Perplexity
from qexport.sizes import format_size
from qexport.verification.perplexity import relative_difference
from qexport.version import __version__

MARK = "qexport"  # the key of report.json that tells whose it is
COLUMNS = (
    "variant",
    "method",
    "bits",
    "bits a weight",
    "size",
    "perplexity",
    "loss",
    "BLEU",
    "time",
    "peak memory",
)


@dataclass(frozen=True)
class Row:
    """A variant's figures. Sizes are bytes, times seconds, losses fractions; None was not measured."""

    variant: str
    method: str
    bits: int
    bits_per_weight: float
    size_bytes: int
    perplexity: float
    perplexity_se: float
    loss: float | None
    loss_se: float | None
    bleu: float | None
    seconds: float | None
    peak_bytes: int | None

    def cells(self) -> tuple[str, ...]:
        """The row as text, in the order of COLUMNS."""
        return (
            self.variant,
            self.method,
            str(self.bits),
            f"{self.bits_per_weight:.2f}",
            format_size(self.size_bytes),
            _number(self.perplexity) + _error(_number(self.perplexity_se)),
            "" if self.loss is None else format_loss(self.loss, self.loss_se),
            "" if self.bleu is None else f"{self.bleu:.1f}",
            "" if self.seconds is None else f"{self.seconds:.1f} s",
            "" if self.peak_bytes is None else format_size(self.peak_bytes),
        )


def _error(text: str) -> str:
    """A standard error behind its value; nothing where a single unit leaves it unknown."""
    return "" if text == "nan" else f" ±{text}"


def _number(value: float) -> str:
    return f"{value:.3f}" if abs(value) < 100 else f"{value:.4g}"


def format_perplexity(score: Perplexity) -> str:
    """A perplexity with its standard error: 12.345 ±0.678."""
    return _number(score.value) + _error(_number(score.standard_error))


def format_loss(loss: float, standard_error: float | None) -> str:
    """A rise of perplexity in per cent, with its standard error: +1.23% ±0.10."""
    error = "" if standard_error is None else _error(f"{100 * standard_error:.2f}")
    return f"{100 * loss:+.2f}%{error}" if abs(loss) < 10 else f"{100 * loss:+.3g}%"


def make_row(
    variant: str,
    method: str,
    bits: int,
    scores: Evaluation,
    *,
    reference: Evaluation | None,
    costs: Mapping[str, Any],
) -> Row:
    """The row of a variant from its scores, those of the reference (None for itself), and its costs."""
    loss = relative_difference(reference.perplexity, scores.perplexity) if reference else None
    return Row(
        variant=variant,
        method=method,
        bits=bits,
        bits_per_weight=scores.bits_per_weight,
        size_bytes=scores.size_bytes,
        perplexity=scores.perplexity.value,
        perplexity_se=scores.perplexity.standard_error,
        loss=loss.loss if loss else None,
        loss_se=loss.standard_error if loss else None,
        bleu=scores.bleu.value if scores.bleu else None,
        seconds=costs.get("seconds"),
        peak_bytes=costs.get("peak_bytes"),
    )


def recipe_lines(scores: Evaluation) -> list[str]:
    """What the scores were measured on and how, one line each."""
    text = scores.perplexity.recipe
    lines = [
        f"perplexity: {scores.perplexity.tokens} tokens of {text['documents']} documents, window "
        f"{text['window']}, stride {text['stride']}, {text['dtype']}, data blake3 {text['data'][:12]}"
    ]
    if scores.bleu:
        pairs = scores.bleu.recipe
        lines.append(
            f"BLEU: {pairs['pairs']} pairs, greedy, at most {pairs['max_new_tokens']} tokens, "
            f"{scores.bleu.signature}, data blake3 {pairs['data'][:12]}"
        )
    return lines


def report_json(title: str, rows: Sequence[Row], reference: Evaluation) -> dict[str, Any]:
    """The content of report.json."""
    return {
        MARK: __version__,
        "title": title,
        "rows": [asdict(row) for row in rows],
        "perplexity_recipe": dict(reference.perplexity.recipe),
        "bleu_recipe": dict(reference.bleu.recipe) if reference.bleu else None,
        "bleu_signature": reference.bleu.signature if reference.bleu else None,
    }


def table_markdown(rows: Sequence[Row]) -> str:
    """The rows as a Markdown table."""
    lines = [f"| {' | '.join(COLUMNS)} |", f"|{' --- |' * len(COLUMNS)}"]
    return "\n".join([*lines, *(f"| {' | '.join(row.cells())} |" for row in rows)])


def report_markdown(title: str, rows: Sequence[Row], reference: Evaluation) -> str:
    """The content of report.md."""
    recipes = "\n".join(f"- {line}" for line in recipe_lines(reference))
    return (
        f"# {title}\n\n{table_markdown(rows)}\n\n"
        f"Loss is the rise of perplexity over the first row, ± the paired standard error.\n\n{recipes}\n"
    )
