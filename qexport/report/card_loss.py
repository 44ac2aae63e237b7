"""What a card tells of a report: the table of all rows, and a warning where these files are bad."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from qexport.report.content import Report, Row
from qexport.report.markdown import plain
from qexport.report.tables import format_loss, table
from qexport.report.verdict import BROKEN

_LARGE_LOSS = 0.1  # a rise of perplexity from which on a card warns
# columns of a report's table that say nothing to who only uses the files
_NOT_SHOWN = ("method", "bits", "time", "peak memory", "tokens/s", "gate")


def warnings(own: Sequence[Row], *, named: bool = False) -> Iterator[str]:
    """What a user should know before the download, of which row if `named`: a failed gate, a large loss."""
    for row in own:
        of = f"{plain(row.variant)}: it" if named or len(own) > 1 else "It"
        for failure in row.failures:
            yield f"{of} {plain(failure)}."
        if row.loss and not row.loss.value < _LARGE_LOSS:
            what = "not usable for most purposes" if not row.loss.value < BROKEN else "noticeably worse"
            rise = format_loss(row.loss.value, None).removeprefix("+")
            yield f"{of}s perplexity is {rise} above full precision's: the answers are {what}."


def loss_table(report: Report, own: Sequence[Row]) -> str:
    """The report's rows as Markdown, those of these files in bold."""
    titles, lines = table(report.rows, short=True)
    shown = [number for number, title in enumerate(titles) if title not in _NOT_SHOWN]
    made = [
        "| " + " | ".join(plain(titles[number]) for number in shown) + " |",
        "| --- |" + " ---: |" * (len(shown) - 1),
    ]
    for row, line in zip(report.rows, lines, strict=True):
        mark = "**" if row in own else ""
        cells = [f"{mark}{plain(line[number])}{mark}" if line[number] else "" for number in shown]
        made.append(f"| {' | '.join(cells)} |")
    return "\n".join(made)


def legend(report: Report) -> str:
    """What the columns mean."""
    told = "Loss is the rise of perplexity over full precision, ± the standard error, paired on the same text"
    if any(row.kl for row in report.rows):
        told += "; KL is the divergence from full precision, nats a token"
    if any(row.kl_at_least for row in report.rows):
        told += " (≥: from its likeliest tokens alone)"
    if any(row.text for row in report.rows):
        told += "; BLEU comes with half its 95 % bootstrap interval"
    return f"{told}."
