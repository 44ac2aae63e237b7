"""Runs a job's tasks in order, skipping those whose results stand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from qexport.errors import GateError
from qexport.events import Noted, OnEvent, ignore
from qexport.graph.build import build, plan
from qexport.graph.foreign import ModelRecipe
from qexport.graph.recipe import AnyRecipe, ExportRecipe, read_recipe
from qexport.graph.scoring import PushTask
from qexport.graph.tasks import Context, Task
from qexport.report.content import Report
from qexport.report.files import read_report


@dataclass(frozen=True)
class MadeModel:
    """A model that an export made, or found standing: by which task, where, and the bytes of its files."""

    name: str
    path: Path
    size_bytes: int


@dataclass(frozen=True)
class ExportResult:
    """What an export made: its models, its report if it has one, and which tasks ran."""

    output: Path
    title: str
    models: tuple[MadeModel, ...]
    report: Report | None
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
    for task in job.tasks:
        if isinstance(task, PushTask):
            task.check_login()
    if job.report and (left := job.report.left_out()):
        told = (
            f"not in this report are {', '.join(left)} of earlier runs; name them as candidates to have them"
        )
        on_event(Noted(told))
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
        report=read_report(job.report.out) if job.report else None,
        ran=tuple(ran),
        skipped=tuple(skipped),
    )


def require_within_gate(report: Report) -> None:
    """Raises GateError that names every variant that does not pass the gates of the recipe's `verify`."""
    failing = [f"{row.variant} {failure}" for row in report.rows for failure in row.failures]
    if failing:
        raise GateError("; ".join(failing))
