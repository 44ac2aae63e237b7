"""A report's files: report.json, from which the rest is made, report.md, report.html and the plots."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from pydantic import ValidationError

from qexport.checkpoint.checkpoint import read_json
from qexport.checkpoint.disk import exists, is_file, write_errors
from qexport.checkpoint.staging import whole_file
from qexport.errors import CorruptFileError, MissingDependencyError, OutputExistsError, SpecError
from qexport.events import Noted, OnEvent, ignore
from qexport.report.content import SCHEMA, Report
from qexport.report.tables import report_markdown

REPORT_FILE = "report.json"
TABLE_FILE = "report.md"
PAGE_FILE = "report.html"
PLOTS = ("loss_vs_bits.png", "loss_vs_bits.svg", "loss_vs_size.png", "loss_vs_size.svg")
CARD_PLOT = PLOTS[0]  # what a model card shows
REPORT_FILES = (REPORT_FILE, TABLE_FILE, PAGE_FILE, *PLOTS)
_MARK = "qexport"  # the key of report.json that tells whose it is


def require_own(directory: Path) -> None:
    """Raises OutputExistsError when a report lies there that is not ours."""
    ours = directory / REPORT_FILE
    if is_file(ours) and _MARK in read_json(ours):
        return
    for name in REPORT_FILES:
        if exists(directory / name):
            raise OutputExistsError(
                f"{directory / name} is there already and is no report of qexport's",
                remedy="move it away, or choose another output",
            )


def write_report(report: Report, directory: Path, on_event: OnEvent = ignore) -> None:
    """Writes all files, each whole, over nothing but an earlier report of ours.

    report.json comes first: what a run that was cut off leaves is known as ours by it, and made anew from it.
    Without the packages of the extra `report` there is no page or no plot, a note says so, and those of an
    earlier report go: they tell of other numbers.
    """
    require_own(directory)
    content = report.model_dump_json(indent=1) + "\n"
    files = {REPORT_FILE: content.encode(), TABLE_FILE: report_markdown(report).encode()}
    files |= _drawn(report, on_event)
    for name, data in files.items():
        with whole_file(directory / name) as file:
            file.write(data)
    for name in REPORT_FILES:
        if name not in files:
            with write_errors(directory / name):
                (directory / name).unlink(missing_ok=True)


def _drawn(report: Report, on_event: OnEvent) -> Mapping[str, bytes]:
    from qexport.report.page import page
    from qexport.report.plots import plots

    found: dict[str, bytes] = {}
    ways: dict[str, Callable[[], Mapping[str, bytes]]] = {
        "page": lambda: {PAGE_FILE: page(report).encode()},
        "plots": lambda: plots(report),
    }
    for what, draw in ways.items():
        try:
            found |= draw()
        except MissingDependencyError as error:
            on_event(Noted(f"no {what}: {error}"))
    return found


def read_report(path: Path) -> Report:
    """The report in a directory, or in a report.json.

    Raises SpecError where there is none, CorruptFileError for one that is damaged, or of another version.
    """
    file = path / REPORT_FILE if path.is_dir() else path
    if not is_file(file):
        raise SpecError(
            f"{path} holds no {REPORT_FILE}", expected="what qexport compare or qexport export wrote"
        )
    content = read_json(file)
    if content.get("schema_version") != SCHEMA:
        raise CorruptFileError(
            f"{file} is no report of this version of qexport", expected=f'"schema_version": {SCHEMA}'
        )
    try:
        return Report.model_validate(content)
    except ValidationError as error:
        raise CorruptFileError(f"{file}: {_first(error)}") from error


def _first(error: ValidationError) -> str:
    first = error.errors()[0]
    if not first["loc"]:  # of the whole, in our own words
        return first["msg"].removeprefix("Value error, ")
    return f"{'.'.join(map(str, first['loc']))}: {first['msg'].lower()}"
