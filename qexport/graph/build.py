"""From a recipe to its tasks, and what they will do: all of it before anything runs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from qexport.calibrate.texts import read_documents, read_pairs
from qexport.checkpoint.checkpoint import open_directory
from qexport.checkpoint.hub import resolve
from qexport.checkpoint.staging import require_space
from qexport.errors import RecipeError
from qexport.events import Event, Noted, OnEvent, ignore
from qexport.graph.recipe import ExportRecipe
from qexport.graph.tasks import (
    MergeTask,
    QuantizeTask,
    ReportTask,
    ShardTask,
    Source,
    Task,
    VerifyTask,
)
from qexport.merging.merge import check_merge
from qexport.modeling.architectures import architecture_of
from qexport.modeling.skeleton import build_skeleton
from qexport.modeling.tokenizer import load_tokenizer
from qexport.quantization import planned_size
from qexport.specs import AnyQuantizeSpec
from qexport.verification.verify import evaluation_data


def variant_name(spec: AnyQuantizeSpec) -> str:
    """A variant's directory: method, bits, and the group size where the user chose one."""
    group = getattr(spec, "group_size", None)
    suffix = "" if group is None else "-row" if group == -1 else f"-g{group}"
    return f"{spec.method}-{spec.bits}bit{suffix}"


def build(recipe: ExportRecipe) -> list[Task]:
    """The recipe's tasks, each after those that it needs; the report is the last.

    Raises RecipeError when two variants would get the same name.
    """
    out = Path(recipe.output)
    tasks: list[Task] = []
    # Hub ids become snapshots once: what an id points to may change while the recipe runs
    base = str(resolve(recipe.base))
    adapters = tuple(str(resolve(adapter)) for adapter in recipe.adapters)
    source: Source = base
    if adapters:
        source = MergeTask("merge", out / "merged", base, adapters, recipe.merge)
        tasks.append(source)
    if recipe.shard:
        source = ShardTask("shard", out / "sharded", source, recipe.shard)
        tasks.append(source)
    reference = VerifyTask("verify full", out / "scores" / "full.json", source, recipe.verify)
    tasks.append(reference)
    variants = []
    names: set[str] = set()
    for spec in recipe.quantize:
        name = variant_name(spec)
        if name in names:
            raise RecipeError(f"the recipe asks for {name} twice")
        names.add(name)
        made = QuantizeTask(name, out / name, source, spec)
        scores = out / "scores" / f"{name}.json"
        verified = VerifyTask(f"verify {name}", scores, made, recipe.verify)
        tasks += [made, verified]
        variants.append((made, verified))
    tasks.append(ReportTask("report", out, recipe.title, reference, tuple(variants)))
    return tasks


@dataclass(frozen=True)
class Planned:
    """A task and what is known of it before it runs: whether it will, and how many bytes it writes."""

    task: Task
    runs: bool
    size_bytes: int | None


def plan(
    recipe: ExportRecipe,
    tasks: list[Task],
    *,
    trust_remote_code: bool = False,
    on_event: OnEvent = ignore,
) -> list[Planned]:
    """Checks the whole recipe against its inputs and tells what would run; reads headers and hashes.

    Raises whatever InputError a task would run into for its options or inputs.
    """
    base = resolve(recipe.base)
    checkpoint = open_directory(base)
    if recipe.adapters:
        check_merge(recipe.base, recipe.adapters)
    text, pairs = evaluation_data(recipe.verify)
    read_documents(text)
    if pairs:
        read_pairs(pairs)
    skeleton = build_skeleton(base, trust_remote_code=trust_remote_code)
    architecture_of(skeleton.model_type)
    load_tokenizer(base, trust_remote_code=trust_remote_code)
    told: set[str] = set()

    def once(event: Event) -> None:
        if not isinstance(event, Noted) or event.text not in told:
            on_event(event)
        if isinstance(event, Noted):
            told.add(event.text)

    planned: list[Planned] = []
    running: set[str] = set()
    for task in tasks:
        size = None
        if isinstance(task, QuantizeTask):
            size = planned_size(checkpoint, skeleton, task.spec, on_event=once)
        elif isinstance(task, (MergeTask, ShardTask)):
            size = checkpoint.weights_size
        runs = any(need.name in running for need in task.needs) or not task.stands()
        if runs:
            running.add(task.name)
            task.check()
        planned.append(Planned(task, runs, size))
    require_space(Path(recipe.output), sum(step.size_bytes or 0 for step in planned if step.runs))
    return planned
