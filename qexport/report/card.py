"""The model card: README.md in an output, for the people who find it on the Hub.

Its YAML is `card_metadata`'s, the rest a template's (templates/card.md.jinja). What a card says of numbers
comes from a report, or from what was measured into qexport.json.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from qexport.checkpoint.disk import is_file
from qexport.checkpoint.staging import whole_file, write_file_atomically
from qexport.errors import InputError, QexportError
from qexport.events import Noted, OnEvent
from qexport.report.card_body import card_body, title_of
from qexport.report.card_facts import PLOT_FILE, CardFacts, card_facts
from qexport.report.card_file import CARD_FILE, EMPTY, Card, merged, read_card
from qexport.report.card_metadata import card_metadata
from qexport.report.content import Report, Row
from qexport.report.local_paths import cleaned_report
from qexport.report.markdown import plain
from qexport.verification.runtimes.support import GGUF


def model_card(facts: CardFacts, report: Report | None = None, variant: str | None = None) -> str:
    """The text of a new card: YAML, then our part of the body. The same arguments give the same text.

    `variant` names the report's row of these files; by default those whose path ends in the directory's name,
    or in a file's. Raises InputError for a name that no row has.
    """
    return _merged_card(EMPTY, facts, report, variant)


def write_card(
    directory: Path, report: Report | None = None, variant: str | None = None, plot: bytes | None = None
) -> None:
    """Writes README.md into an output, and the plot (PNG) beside it where there is one.

    What a user wrote in a README.md that is there stays: see `card_file`. Raises what `card_facts`,
    `read_card` and `model_card` do, before anything is written.
    """
    facts = card_facts(directory)
    path = directory / CARD_FILE
    card = read_card(path) if is_file(path) else EMPTY
    text = _merged_card(card, replace(facts, plot=facts.plot or plot is not None), report, variant)
    if plot is not None:
        with whole_file(directory / PLOT_FILE) as file:
            file.write(plot)
    if text != card.text:
        write_file_atomically(path, text)


def _merged_card(card: Card, facts: CardFacts, report: Report | None, variant: str | None) -> str:
    report = cleaned_report(report) if report else None
    own = own_rows(facts, report, variant)
    title = title_of(facts)
    section = card_body(facts, report, own, title="" if card.titled else plain(title))
    return merged(card, card_metadata(facts, title, report, own), section)


def own_rows(facts: CardFacts, report: Report | None, variant: str | None) -> tuple[Row, ...]:
    """The rows of a report that tell of these files."""
    if report is None:
        return ()
    if variant is not None:
        found = tuple(row for row in report.rows if row.variant == variant)
        if not found:
            known = [row.variant for row in report.rows]
            near = difflib.get_close_matches(variant, known, n=1)
            raise InputError(
                f"the report has no variant {variant!r}",
                expected=", ".join(known),
                remedy=f"did you mean {near[0]!r}?" if near else "",
            )
        return found
    called = {file.name for file in facts.files if facts.form == GGUF} | {facts.directory.resolve().name}
    return tuple(row for row in report.rows if Path(row.path).name in called)


def noted_card(on_event: OnEvent, write: Callable[..., None], *given: Any) -> None:
    """Writes a model card; what keeps it from that (a user's own that cannot be read) is but a note."""
    try:
        write(*given)
    except QexportError as error:
        on_event(Noted(f"no model card: {error}"))
