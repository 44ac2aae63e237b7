"""The columns of the page's table: a heading, a row's text and what it is sorted by."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from qexport.report.content import Interval, Measure, Report, Row, Z
from qexport.sizes import format_size


@dataclass(frozen=True)
class Cell:
    """`text` is None where nothing was measured; `extra` is its error, `order` a number or words."""

    text: str | None
    extra: str = ""
    order: float | str | None = None


@dataclass(frozen=True)
class Column:
    """`hint` explains the heading; a column that is not `main` is hidden until all are asked for."""

    key: str
    heading: str
    hint: str
    cell: Callable[[Row], Cell]
    main: bool = True
    numeric: bool = True


_NONE = Cell(None)
_LONG = 1e9  # from here on a broken model's number is told by its power of ten
_ENDLESS = 1e300  # where infinity sorts: scripts read finite numbers


def number(value: float) -> str:
    """Three decimals, or four digits from 100 on."""
    return f"{value:.3f}" if abs(value) < 100 else f"{value:,.4g}"


def decimals(value: float, least: int) -> int:
    """So many that two digits of a small number show, `least` of them at least."""
    size = abs(value)
    return (
        least
        if size == 0 or not math.isfinite(size)
        else min(max(least, 1 - math.floor(math.log10(size))), 9)
    )


def _signed(text: str) -> str:
    return text.replace("-", "−")


def _measure(measure: Measure | None, factor: float, digits: int, *, sign: bool = False) -> Cell:
    """A value with the half width of its 95 % interval."""
    if measure is None:
        return _NONE
    value = factor * measure.value
    if not math.isfinite(value):
        return Cell("∞" if value > 0 else "−∞", order=math.copysign(_ENDLESS, value))
    if abs(value) > _LONG:
        return Cell(_signed(f"{value:{'+' if sign else ''}.3g}"), order=value)
    digits = decimals(value, digits) if digits > 3 else digits
    shown = f"{value:{'+' if sign else ''},.{digits if abs(value) < 1000 else 0}f}"
    error = measure.standard_error
    extra = "" if error is None else f"±{Z * factor * error:,.{digits}f}"
    return Cell(_signed(shown), extra, value)


def _percentile(value: float | None) -> Cell:
    if value is None:
        return _NONE
    return Cell(f"{value:.3f}", order=value) if math.isfinite(value) else Cell("∞", order=_ENDLESS)


def _bound(row: Row, cell: Cell) -> Cell:
    """A divergence, which may be a lower bound."""
    return replace(cell, text=f"≥\N{NO-BREAK SPACE}{cell.text}") if row.kl_at_least and cell.text else cell


def _interval(interval: Interval | None) -> Cell:
    if interval is None:
        return _NONE
    return Cell(f"{interval.value:.1f}", f"{interval.low:.1f} to {interval.high:.1f}", interval.value)


def _perplexity(row: Row) -> Cell:
    if not math.isfinite(row.perplexity.value):
        return Cell("∞", order=_ENDLESS)
    error = row.perplexity.standard_error
    extra = "" if error is None else f"±{number(Z * error)}"
    return Cell(number(row.perplexity.value), extra, row.perplexity.value)


def _words(text: str | None) -> Cell:
    return _NONE if text is None else Cell(text, order=text.casefold())


def _score(whose: str, score: str) -> Callable[[Row], Cell]:
    def cell(row: Row) -> Cell:
        scores = getattr(row, whose)
        return _NONE if scores is None else _interval(getattr(scores, score))

    return cell


def _speed(runtime: str) -> Callable[[Row], Cell]:
    def cell(row: Row) -> Cell:
        speed = row.tokens_per_second.get(runtime)
        return _NONE if speed is None else Cell(f"{speed:,.1f}", order=speed)

    return cell


def _task(task: str) -> Callable[[Row], Cell]:
    return lambda row: _measure(row.tasks.get(task), 1.0, 3)


def _seconds(seconds: float | None) -> Cell:
    if seconds is None:
        return _NONE
    text = f"{seconds:.1f} s" if seconds < 60 else f"{seconds / 60:.1f} min"
    return Cell(text if seconds < 3600 else f"{seconds / 3600:.1f} h", order=seconds)


def columns(report: Report) -> list[Column]:
    """The columns in which some row has a value, the variant's name first."""
    full = next((row.size_bytes for row in report.rows if row.is_full), 0)

    def share(row: Row) -> Cell:
        percent = 100 * row.size_bytes / full if full else None
        return _NONE if percent is None else Cell(f"{percent:.1f} %", order=percent)

    def bytes_(size: int | None) -> Cell:
        return _NONE if size is None else Cell(format_size(size), order=float(size))

    ways = (("text_full", "the full model’s answers", "vs full"), ("text", "the references", "vs refs"))
    scores = (("bleu", "BLEU"), ("chrf", "chrF"), ("rouge_l", "ROUGE-L"), ("exact_match", "Exact match"))
    runtimes = sorted({runtime for row in report.rows for runtime in row.tokens_per_second})
    tasks = sorted({task for row in report.rows for task in row.tasks})
    every = [
        Column("variant", "Variant", "its name", lambda row: _words(row.variant), numeric=False),
        Column("method", "Method", "how it was quantized", lambda row: _words(said(row)), numeric=False),
        Column("solver", "Solver", "how the codes were chosen", lambda row: _words(row.solver), False, False),
        Column("format", "Format", "what the bytes look like", lambda row: _words(row.format), False, False),
        Column("bits", "Bits", "bits a code", lambda row: Cell(f"{row.bits:g}", order=row.bits), main=False),
        Column("bpw", "Bits a weight", "all bytes of the weights over all parameters",
               lambda row: Cell(f"{row.bits_per_weight:.2f}", order=row.bits_per_weight)),
        Column("size", "Size", "on disk", lambda row: bytes_(row.size_bytes)),
        Column("share", "Of full", "share of the full-precision size", share),
        Column("perplexity", "Perplexity", "lower is better", _perplexity),
        Column("loss", "Rise, %", "relative rise of perplexity over full precision, paired",
               lambda row: _measure(row.loss, 100.0, 2, sign=True)),
        Column("kl", "KL", "mean KL divergence to full precision, nats a token",
               lambda row: _bound(row, _measure(row.kl, 1.0, 4))),
        Column("kl_p99", "KL p99", "its 99th percentile over tokens",
               lambda row: _bound(row, _percentile(row.kl_p99)), main=False),
        Column("same_top", "Same top, %", "tokens with the same most likely one as full precision",
               lambda row: _measure(row.same_top, 100.0, 1)),
        *(Column(f"{score}_{whose}", f"{name} {short}", f"{name} against {words}, 95 % interval",
                 _score(whose, score), main=(whose, score) == ("text_full", "bleu"))
          for whose, words, short in ways for score, name in scores),
        *(Column(f"task{n}", task, f"{task} (lm-evaluation-harness)", _task(task), main=False)
          for n, task in enumerate(tasks)),
        *(Column(f"speed{n}", f"{runtime}, tok/s", f"tokens a second in {runtime}", _speed(runtime), False)
          for n, runtime in enumerate(runtimes)),
        Column("seconds", "Time", "to make it", lambda row: _seconds(row.seconds), main=False),
        Column("peak", "Peak memory", "of making it", lambda row: bytes_(row.peak_bytes), main=False),
    ]  # fmt: skip
    return [column for column in every if _some(column, report.rows)]


def said(row: Row) -> str:
    """The row's method in words."""
    return "full precision" if row.method == "none" else row.method


def _some(column: Column, rows: Sequence[Row]) -> bool:
    return any(column.cell(row).text is not None for row in rows)
