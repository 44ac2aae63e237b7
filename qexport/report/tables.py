"""A report as a table, for terminals and in Markdown."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from qexport import results
from qexport.report.content import Interval, Measure, Report, Row
from qexport.report.markdown import plain
from qexport.results import Perplexity
from qexport.sizes import format_size


def _error(text: str) -> str:
    """A standard error behind its value; nothing where a single unit leaves it unknown."""
    return "" if text == "nan" else f" ±{text}"


def _number(value: float) -> str:
    return f"{value:.3f}" if abs(value) < 100 else f"{value:.4g}"


def format_perplexity(score: Perplexity | Measure) -> str:
    """A perplexity with its standard error: 12.345 ±0.678."""
    error = score.standard_error
    return _number(score.value) + ("" if error is None else _error(_number(error)))


def format_loss(loss: float, standard_error: float | None) -> str:
    """A rise of perplexity in per cent, with its standard error: +1.23% ±0.10."""
    error = "" if standard_error is None else _error(f"{100 * standard_error:.2f}")
    return f"{100 * loss:+.2f}%{error}" if abs(loss) < 10 else f"{100 * loss:+.3g}%"


def format_kl(kl: float, standard_error: float | None) -> str:
    """A KL divergence, nats a token, with its standard error: 0.0123 ±0.0004."""
    digits = 5 if kl < 0.01 else 4 if kl < 1 else 2
    error = "" if standard_error is None else _error(f"{standard_error:.{digits}f}")
    return f"{kl:.{digits}f}{error}"


def format_interval(score: Interval | results.Interval) -> str:
    """A score with the half of its 95 % interval: 41.2 ±3.1."""
    half = (score.high - score.low) / 2
    return f"{score.value:.1f}" + (f" ±{half:.1f}" if half else "")


def _divergence(row: Row, kl: float | None, error: float | None = None) -> str:
    bound = "≥" if row.kl_at_least else ""
    return "" if kl is None else f"{bound}{format_kl(kl, error)}"


def _text(whose: str, score: str) -> Callable[[Row], str]:
    def cell(row: Row) -> str:
        scores = getattr(row, whose)
        return format_interval(getattr(scores, score)) if scores else ""

    return cell


_SCORES = {"BLEU": "bleu", "chrF": "chrf", "ROUGE-L": "rouge_l", "exact match": "exact_match"}
_TO_FULL = {f"{title} to full": _text("text_full", score) for title, score in _SCORES.items()}


def _speed(row: Row) -> str:
    return ", ".join(f"{speed:.1f} ({runtime})" for runtime, speed in row.tokens_per_second.items())


# title -> what a row has there; a column that no row has anything in is left out
_CELLS: dict[str, Callable[[Row], str]] = {
    "variant": lambda row: row.variant,
    "method": lambda row: row.method,
    "bits": lambda row: f"{row.bits:g}",
    "bits a weight": lambda row: f"{row.bits_per_weight:.2f}",
    "size": lambda row: format_size(row.size_bytes),
    "perplexity": lambda row: format_perplexity(row.perplexity),
    "loss": lambda row: format_loss(row.loss.value, row.loss.standard_error) if row.loss else "",
    "KL": lambda row: _divergence(row, row.kl.value, row.kl.standard_error) if row.kl else "",
    "KL 99 %": lambda row: _divergence(row, row.kl_p99),
    "same top token": lambda row: f"{100 * row.same_top.value:.1f}%" if row.same_top else "",
    **{title: _text("text", score) for title, score in _SCORES.items()},
    **_TO_FULL,
    "time": lambda row: "" if row.seconds is None else f"{row.seconds:.1f} s",
    "peak memory": lambda row: "" if row.peak_bytes is None else format_size(row.peak_bytes),
    "tokens/s": _speed,
    "gate": lambda row: "FAILED" if row.failures else "",
}
# what a terminal's width has no room for
_LONG = ("KL 99 %", "chrF", "ROUGE-L", "exact match", *_TO_FULL)


# what a narrow terminal goes without, first what is missed least
_SPARED = (
    *("method", "bits", "peak memory", "time", "perplexity", "same top token", "tokens/s", "BLEU"),
    *("bits a weight", "size"),
)


def table(
    rows: Sequence[Row], *, short: bool = False, width: int | None = None
) -> tuple[list[str], list[list[str]]]:
    """Titles of the columns, and the rows as text. The scores of tasks are columns of their own.

    `short` leaves long columns out; with `width`, characters, others go too until the rest has room.
    """
    tasks = sorted({task for row in rows for task in row.tasks})
    cells = {title: [cell(row) for row in rows] for title, cell in _CELLS.items()}
    for task in tasks:
        cells[task] = [f"{row.tasks[task].value:.3f}" if task in row.tasks else "" for row in rows]
    kept = [title for title, texts in cells.items() if any(texts) and not (short and title in _LONG)]
    for spared in _SPARED if width else ():
        if sum(2 + max(map(len, (title, *cells[title]))) for title in kept) <= (width or 0):
            break
        kept = [title for title in kept if title != spared]
    return kept, [[cells[title][number] for title in kept] for number in range(len(rows))]


def table_markdown(rows: Sequence[Row], *, short: bool = False) -> str:
    """The rows as a Markdown table; names and all else stand in it as they are, never as markup."""
    titles, lines = table(rows, short=short)
    return "\n".join(
        [
            f"| {' | '.join(map(plain, titles))} |",
            f"|{' --- |' * len(titles)}",
            *(f"| {' | '.join(map(plain, line))} |" for line in lines),
        ]
    )


def report_markdown(report: Report) -> str:
    """The content of report.md; every text of the report is escaped."""
    recipes = "\n".join(f"- {plain(line)}" for line in report.recipe_lines)
    gates = "\n".join(
        f"- {plain(f'{row.variant} {failure}')}" for row in report.rows for failure in row.failures
    )
    failed = f"## Gates that were not passed\n\n{gates}\n\n" if gates else ""
    bound = " (≥: from its likeliest tokens alone)" if any(row.kl_at_least for row in report.rows) else ""
    return (
        f"# {plain(report.title)}\n\n{plain(report.verdict)}\n\n{table_markdown(report.rows)}\n\n{failed}"
        "In the words above, ± is a 95 % interval. In the table loss is the rise of perplexity over the "
        "first row, ± its paired standard error; KL the divergence "
        f"from the first row's predictions, nats a token{bound}; BLEU, chrF, ROUGE-L and exact match come "
        "with half their 95 % bootstrap intervals, against the references and the first row's answers."
        f"\n\n{recipes}\n"
    )
