"""`qexport report`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from qexport.cli.output import Output, output_options
from qexport.cli.report_table import show_report
from qexport.errors import GateError, SpecError

if TYPE_CHECKING:
    from qexport.report.several import Change


@click.command(short_help="Render reports again, merge several, compare two.")
@click.argument("directories", nargs=-1, type=click.Path(path_type=Path))
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), help="where the report goes; of several, one of all"
)
@click.option("--title", help="heading of the report; default: the first one's")
@click.option(
    "--baseline",
    type=click.Path(path_type=Path),
    help="an earlier report: tell what became better or worse since",
)
@click.option("--fail-on-regression", is_flag=True, help="exit with 1 when anything became worse")
@click.option("--schema", is_flag=True, help="print the JSON schema of report.json")
@output_options
def report(
    directories: tuple[Path, ...],
    output: Path | None,
    title: str | None,
    baseline: Path | None,
    fail_on_regression: bool,
    schema: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Make the files of a report again from the report.json in each of DIRECTORIES.

    Of several, one report is made in --output: they must have been measured on the same text against the
    same model. With --baseline nothing is written but to --output.
    """
    out = Output(as_json, quiet)
    if fail_on_regression and not baseline:
        raise SpecError("--fail-on-regression", expected="--baseline DIR beside it")
    from qexport.report.content import Report
    from qexport.report.files import read_report, write_report
    from qexport.report.several import changes, merged, moved

    if schema:
        Output(json=True).result(Report.model_json_schema(), "")
        return
    if not directories:
        raise SpecError("no directory with a report", expected="qexport report DIR...")
    if len(directories) > 1 and output is None and not baseline:
        raise SpecError("several reports", expected="-o DIR, where they go merged into one")
    if title and baseline and output is None:
        raise SpecError("--title of a report that is not written", expected="-o DIR beside it")
    homes = [path if path.is_dir() else path.parent for path in directories]
    target = output or homes[0]
    found = [moved(read_report(path), home, target) for path, home in zip(directories, homes, strict=True)]
    names = _apart([home.absolute().name for home in homes])
    made = found[0] if len(found) == 1 else merged(list(zip(names, found, strict=True)), title)
    if title:
        made = made.model_copy(update={"title": title})
    compared = changes(read_report(baseline), made) if baseline else []
    if output or not baseline:
        with out.listening() as on_event:
            write_report(made, target, on_event)
    if baseline:
        _show_changes(compared, out, fail=fail_on_regression)
    else:
        data = {"output": str(target), "report": made.model_dump(mode="json")}
        show_report(made, out, data, target)


def _apart(names: list[str]) -> list[str]:
    """The runs' names, those that come twice numbered."""
    found: list[str] = []
    for name in names:
        number, apart = 1, f"{name}-1" if names.count(name) > 1 else name
        while apart in found:
            number += 1
            apart = f"{name}-{number}"
        found.append(apart)
    return found


_WORDS = {"gone": "gone: worse", "unknown": "noise not known"}


def _show_changes(found: list[Change], out: Output, *, fail: bool) -> None:
    rows = [
        (
            change.variant,
            change.measure,
            "" if change.before is None else f"{change.before:.5g}",
            "" if change.after is None else f"{change.after:.5g}",
            _WORDS.get(change.kind, change.kind),
        )
        for change in found
    ]
    columns = ("variant", "measure", "before", "after", "more than noise")
    data = [{**asdict(change), "worse": change.worse, "better": change.better} for change in found]
    out.table("since the baseline", columns, rows, {"changes": data})
    if fail and (worse := [f"{change.variant} ({_told(change)})" for change in found if change.worse]):
        raise GateError(f"worse than the baseline: {', '.join(worse)}")


def _told(change: Change) -> str:
    return f"{change.measure} is gone" if change.kind == "gone" else change.measure
