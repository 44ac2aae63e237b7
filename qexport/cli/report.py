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
@click.option("-o", "--output", type=click.Path(path_type=Path), help="where several go, merged into one")
@click.option("--title", help="heading of the merged report; default: the first one's")
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
    same model.
    """
    out = Output(as_json, quiet)
    if fail_on_regression and not baseline:
        raise SpecError("--fail-on-regression", expected="--baseline DIR beside it")
    from qexport.report.content import Report
    from qexport.report.files import read_report, write_report
    from qexport.report.several import changes, merged

    if schema:
        Output(json=True).result(Report.model_json_schema(), "")
        return
    if not directories:
        raise SpecError("no directory with a report", expected="qexport report DIR...")
    if len(directories) > 1 and output is None:
        raise SpecError("several reports", expected="-o DIR, where they go merged into one")
    found = [read_report(directory) for directory in directories]
    names = [path.absolute().name if path.is_dir() else path.absolute().parent.name for path in directories]
    made = found[0] if len(found) == 1 else merged(list(zip(_apart(names), found, strict=True)), title)
    if title:
        made = made.model_copy(update={"title": title})
    if baseline:
        _show_changes(changes(read_report(baseline), made), out, fail=fail_on_regression)
        return
    target = output or (directories[0] if directories[0].is_dir() else directories[0].parent)
    with out.listening() as on_event:
        write_report(made, target, on_event)
    show_report(made, out, {"output": str(target), "report": made.model_dump(mode="json")}, target)


def _apart(names: list[str]) -> list[str]:
    """The runs' names, those that come twice numbered."""
    return [
        f"{name}-{names[: number + 1].count(name)}" if names.count(name) > 1 else name
        for number, name in enumerate(names)
    ]


def _show_changes(found: list[Change], out: Output, *, fail: bool) -> None:
    rows = [
        (
            change.variant,
            change.measure,
            f"{change.before:.5g}",
            f"{change.after:.5g}",
            "worse" if change.worse else "better" if change.better else "",
        )
        for change in found
    ]
    columns = ("variant", "measure", "before", "after", "more than noise")
    out.table("since the baseline", columns, rows, {"changes": [asdict(change) for change in found]})
    if fail and (worse := [f"{change.variant} ({change.measure})" for change in found if change.worse]):
        raise GateError(f"worse than the baseline: {', '.join(worse)}")
