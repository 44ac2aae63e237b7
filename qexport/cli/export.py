"""`qexport export`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from qexport.cli.output import Output, output_options
from qexport.cli.report_table import check_junit, show_report, write_junit
from qexport.sizes import format_size

if TYPE_CHECKING:
    from qexport.graph.recipe import AnyRecipe


@click.command(short_help="Run a recipe: merge, shard, quantize, verify, report.")
@click.argument("recipe", type=click.Path(path_type=Path))
@click.option("--junit", type=click.Path(path_type=Path), help="write the gates to this file as JUnit XML")
@click.option("--dry-run", is_flag=True, help="print what would run, and how large it gets")
@click.option("--trust-remote-code", is_flag=True, help="run the code that the model brings")
@output_options
def export(
    recipe: Path, junit: Path | None, dry_run: bool, trust_remote_code: bool, as_json: bool, quiet: bool
) -> None:
    """Run RECIPE, a YAML file. Steps whose results stand are skipped.

    An export file of LLaMA-Factory or SWIFT will do: it makes the one model that it asks for.

    Exits with 1 when a variant is not whole, or loses more than the recipe's verify part
    allows (max_loss, max_kl, min_bleu).
    """
    out = Output(as_json, quiet)
    from qexport.graph.recipe import read_recipe

    check_junit(junit)
    parsed = read_recipe(recipe)
    if dry_run:
        show_plan(parsed, out, trust_remote_code=trust_remote_code)
    else:
        run_recipe(parsed, out, trust_remote_code=trust_remote_code, junit=junit)


def show_plan(recipe: AnyRecipe, out: Output, *, trust_remote_code: bool = False) -> None:
    """Prints the recipe's tasks, what each needs, its size, and whether it would run."""
    from qexport.graph.build import build, plan

    with out.listening() as on_event:
        job = build(recipe, on_event=on_event)
        planned = plan(job, trust_remote_code=trust_remote_code, on_event=on_event)
    rows = [
        (
            step.task.name,
            "runs" if step.runs else "stands",
            "" if step.size_bytes is None else format_size(step.size_bytes),
            str(step.task.out),
        )
        for step in planned
    ]
    total = sum(step.size_bytes or 0 for step in planned if step.runs)
    tasks = [
        {
            "task": step.task.name,
            "needs": [need.name for need in step.task.needs],
            "runs": step.runs,
            "size_bytes": step.size_bytes,
            "output": str(step.task.out),
        }
        for step in planned
    ]
    out.table("dry run", ("task", "state", "size", "output"), rows, {"tasks": tasks, "size_bytes": total})
    if not out.json:
        out.note(f"{format_size(total)} would be written")


def run_recipe(
    recipe: AnyRecipe, out: Output, *, trust_remote_code: bool = False, junit: Path | None = None
) -> None:
    """Runs the recipe and prints the report's table; without a report, the models."""
    from qexport.graph.run import export as run
    from qexport.graph.run import require_within_gate
    from qexport.graph.tasks import Task

    def told(task: Task, runs: bool, number: int, total: int) -> None:
        out.note(f"{number}/{total} {task.name}" + ("" if runs else ": stands"))

    with out.listening() as on_event:
        result = run(recipe, trust_remote_code=trust_remote_code, on_event=on_event, on_task=told)
    report = result.report
    data = {
        "output": str(result.output),
        "models": [{**asdict(model), "path": str(model.path)} for model in result.models],
        "report": report.model_dump(mode="json") if report else None,
        "ran": list(result.ran),
        "skipped": list(result.skipped),
    }
    if report is None:
        models = [(model.name, format_size(model.size_bytes), str(model.path)) for model in result.models]
        out.table(result.title, ("model", "size", "output"), models, data)
        return
    show_report(report, out, data, result.output)
    if junit:
        write_junit(report, junit)
    require_within_gate(report)
