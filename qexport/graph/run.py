"""Runs a job's tasks in order, skipping those whose results stand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from qexport.errors import GateError
from qexport.events import OnEvent, ignore
from qexport.graph.build import build, plan
from qexport.graph.foreign import ModelRecipe
from qexport.graph.recipe import AnyRecipe, ExportRecipe, read_recipe
from qexport.graph.tasks import Context, Task
from qexport.report.rows import Row, recipe_lines


@dataclass(frozen=True)
class MadeModel:
    """A model that an export made, or found standing: by which task, where, and the bytes of its files."""

    name: str
    path: Path
    size_bytes: int


@dataclass(frozen=True)
class ExportResult:
    """What an export made: its models, the report's rows if it has a report, and which tasks ran."""

    output: Path
    title: str
    models: tuple[MadeModel, ...]
    rows: tuple[Row, ...]
    recipe_lines: tuple[str, ...]
    ran: tuple[str, ...]
    skipped: tuple[str, ...]


# hears of each task before it runs: the task, whether it runs or stands, its number, and of how many
OnTask = Callable[[Task, bool, int, int], None]


def export(
    recipe: AnyRecipe | str | Path,
    *,
    trust_remote_code: bool = False,
    on_event: OnEvent = ignore,
    on_task: OnTask = lambda task, runs, number, total: None,
) -> ExportResult:
    """Runs a recipe: merge, shard, quantize and verify each variant, and report.

    Another tool's export file makes one model, without scores and report. Everything is checked before
    the first task runs. A task whose result stands is skipped.
    Whether the losses are within the recipe's gate is for `require_within_gate` to say.
    """
    if not isinstance(recipe, (ExportRecipe, ModelRecipe)):
        recipe = read_recipe(Path(recipe))
    job = build(recipe, on_event=on_event)
    plan(job, trust_remote_code=trust_remote_code)
    context = Context(on_event, trust_remote_code)
    ran: list[str] = []
    skipped: list[str] = []
    for number, task in enumerate(job.tasks, start=1):
        runs = not task.stands()
        on_task(task, runs, number, len(job.tasks))
        if runs:
            task.run(context)
        (ran if runs else skipped).append(task.name)
    return ExportResult(
        output=job.output,
        title=job.title,
        models=tuple(MadeModel(task.name, task.out, task.size_bytes()) for task in job.models),
        rows=tuple(job.report.rows()) if job.report else (),
        recipe_lines=tuple(recipe_lines(job.report.reference.scores())) if job.report else (),
        ran=tuple(ran),
        skipped=tuple(skipped),
    )


def require_within_gate(result: ExportResult, recipe: AnyRecipe) -> None:
    """Raises GateError that names every variant that loses more than the recipe's `verify.max_loss`."""
    max_loss = recipe.verify.max_loss if isinstance(recipe, ExportRecipe) else None
    if max_loss is None:
        return
    failing = [
        f"{row.variant} ({100 * row.loss:+.2f} %)"
        for row in result.rows
        if row.loss is not None and not row.loss <= max_loss
    ]
    if failing:
        raise GateError(
            f"too much perplexity is lost by {', '.join(failing)}", expected=f"at most {100 * max_loss:g} %"
        )
