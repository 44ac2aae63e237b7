"""Data on stdout, talk on stderr: for people, for programs (`--json`) and for nobody (`--quiet`)."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import click

from qexport.checkpoint.gguf_files import in_the_users_words
from qexport.events import Advanced, Event, Finished, Noted, OnEvent, Started
from qexport.results import plain

_ROOM_FOR_NAMES = 130  # columns from which a bar tells the tensor at hand too
_SHORT = 8  # columns of this width are left whole on a narrow terminal
Function = TypeVar("Function", bound=Callable[..., Any])


def printable(text: str) -> str:
    """`text` with control characters and half surrogates escaped: names out of files are not trusted.

    A GGUF file goes by its own name, not by that of the directory it was unpacked to.
    """
    text = in_the_users_words(text)
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _encodable(text: str) -> str:
    """`text` with the bytes of file names that are no UTF-8 escaped, as JSON escapes them too."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def _in_the_users_words(data: Any) -> Any:
    """`in_the_users_words` of every string in data of JSON's kinds: within JSON a path is escaped."""
    if isinstance(data, str):
        return in_the_users_words(data)
    if isinstance(data, dict):
        return {_in_the_users_words(key): _in_the_users_words(value) for key, value in data.items()}
    return [_in_the_users_words(value) for value in data] if isinstance(data, list) else data


@dataclass(frozen=True)
class Output:
    """How a command speaks."""

    json: bool = False
    quiet: bool = False

    def result(self, data: dict[str, Any], text: str) -> None:
        """The command's result: `data` as one JSON object, or `text` for people."""
        if self.json:
            self._json(data)
        elif not self.quiet:
            click.echo(_encodable(in_the_users_words(text)))

    def _json(self, data: dict[str, Any]) -> None:
        told = json.dumps(_in_the_users_words(plain(data)), ensure_ascii=False, allow_nan=False)
        click.echo(_encodable(told))

    def table(
        self,
        title: str,
        columns: Sequence[str],
        rows: Sequence[Sequence[str]],
        data: dict[str, Any],
    ) -> None:
        """A result with rows: a table on a terminal, tab-separated lines elsewhere, or JSON."""
        rows = [[printable(cell) for cell in row] for row in rows]
        if self.json:
            self._json(data)
        elif self.quiet:
            return
        elif sys.stdout.isatty():
            _rich_table(title, columns, rows)
        else:
            for row in (columns, *rows):
                click.echo("\t".join(row))

    def note(self, text: str) -> None:
        """Something worth knowing, on stderr."""
        if not self.quiet:
            click.echo(printable(text), err=True)

    def card(self, directory: Path) -> None:
        """Writes the model card of an output that stands; what keeps it from that is but a note."""
        from qexport.report.card import noted_card, write_card

        noted_card(self._notes_only, write_card, directory)

    @contextmanager
    def listening(self) -> Iterator[OnEvent]:
        """A listener for the library's events: progress bars on a terminal, notes everywhere."""
        if self.quiet or self.json or not (sys.stdout.isatty() and sys.stderr.isatty()):
            yield self._notes_only
            return
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            ProgressColumn,
            SpinnerColumn,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )

        console = Console(stderr=True)
        columns: tuple[ProgressColumn, ...] = (
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TextColumn("{task.percentage:>3.0f} %"),
            MofNCompleteColumn(),
            TextColumn("{task.fields[unit]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
        )
        if console.width >= _ROOM_FOR_NAMES:
            columns = (*columns, TextColumn("[dim]{task.fields[what]}"))
        with Progress(*columns, console=console, transient=True) as progress:
            yield _ProgressListener(progress, self)

    def _notes_only(self, event: Event) -> None:
        if isinstance(event, Noted):
            self.note(f"note: {event.text}")


class _ProgressListener:
    """Shows one bar a stage; bytes are counted in megabytes."""

    def __init__(self, progress: Any, output: Output) -> None:
        self._progress, self._output = progress, output
        self._task: Any = None
        self._divisor = 1.0

    def __call__(self, event: Event) -> None:
        if isinstance(event, Started):
            self._divisor = 1e6 if event.unit == "bytes" else 1.0
            total = max(round(event.total / self._divisor), 1)
            unit = "MB" if event.unit == "bytes" else event.unit
            self._done = 0.0
            self._task = self._progress.add_task(event.stage, total=total, unit=unit, what="")
        elif isinstance(event, Advanced):
            self._done += event.steps / self._divisor
            self._progress.update(self._task, completed=round(self._done), what=event.what)
        elif isinstance(event, Finished):
            self._progress.remove_task(self._task)
        else:
            self._progress.console.print(f"note: {printable(event.text)}", markup=False, highlight=False)


def _rich_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console = Console()
    widths = [max(map(len, texts)) for texts in zip(columns, *rows, strict=True)]
    narrow = sum(widths) + 2 * len(widths) > console.width

    def fitted(text: str, width: int) -> str:
        """On a narrow terminal the wide columns break at their spaces, rather than being cut off."""
        return text.replace(" ", "\n") if narrow and width > _SHORT else text

    table = Table(
        title=title, title_justify="left", box=box.SIMPLE_HEAD, show_edge=False, padding=(0, not narrow, 0, 0)
    )
    for number, (column, width) in enumerate(zip(columns, widths, strict=True)):
        justify: Literal["left", "right"] = "left" if number < 2 else "right"
        table.add_column(fitted(column, width), justify=justify, overflow="fold")
    for row in rows:
        table.add_row(*map(fitted, row, widths))
    console.print(table)


def output_options(function: Function) -> Function:
    """Adds `--json` and `--quiet`."""
    for decorator in (
        click.option("--quiet", "-q", is_flag=True, help="print errors only"),
        click.option("--json", "as_json", is_flag=True, help="print the result as one JSON object"),
    ):
        function = decorator(function)
    return function
