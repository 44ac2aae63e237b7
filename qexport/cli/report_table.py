"""A report on the terminal: what the commands that make one share."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qexport.cli.output import Output

if TYPE_CHECKING:
    from qexport.report.content import Report


def show_report(report: Report, out: Output, data: dict[str, Any], directory: Path) -> None:
    """The table, and on stderr the verdict, what it was measured on, and where the files lie."""
    from qexport.report.files import PAGE_FILE, TABLE_FILE
    from qexport.report.tables import table

    # on a terminal that is too narrow for all columns; --json, files and pipes have all of them
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
    columns, rows = table(report.rows, short=True, width=width)
    out.table(report.title, columns, rows, data)
    page = directory / PAGE_FILE
    for line in (
        report.verdict,
        *report.recipe_lines,
        f"report: {page if page.is_file() else directory / TABLE_FILE}",
    ):
        out.note(line)


def write_junit(report: Report, file: Path) -> None:
    """The gates as JUnit XML. Raises StorageError."""
    from qexport.checkpoint.staging import write_file_atomically
    from qexport.report.junit import junit

    write_file_atomically(file, junit(report))


def check_junit(file: Path | None) -> None:
    """Raises SpecError, before the long job, for a place where no file can be written."""
    from qexport.errors import SpecError

    if file is not None and (file.is_dir() or (file.parent.exists() and not file.parent.is_dir())):
        raise SpecError(f"--junit {file}", expected="a file to write")
