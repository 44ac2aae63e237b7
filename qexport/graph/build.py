"""From a recipe to a job, and what the job will do: all of it before anything runs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qexport.calibrate.texts import read_documents
from qexport.checkpoint.checkpoint import open_directory
from qexport.checkpoint.disk import exists
from qexport.checkpoint.hashing import file_hash
from qexport.checkpoint.hub import resolve
from qexport.checkpoint.staging import require_space
from qexport.errors import CalibrationError, OutputExistsError, RecipeError
from qexport.events import Event, Noted, OnEvent, ignore
from qexport.formats.gguf.text_model import text_and_skeleton
from qexport.formats.opening import open_checkpoint
from qexport.graph.foreign import ModelRecipe, merged_beside
from qexport.graph.recipe import AnyRecipe, ExportRecipe
from qexport.graph.scoring import PushTask, ReportTask, VerifyTask
from qexport.graph.tasks import (
    MergeTask,
    ModelTask,
    QuantizeTask,
    ShardTask,
    Source,
    Task,
)
from qexport.merging.adapter import split_weight
from qexport.merging.plan import plan_merge
from qexport.modeling.architectures import architecture_of
from qexport.modeling.skeleton import Skeleton
from qexport.modeling.tokenizer import load_tokenizer
from qexport.publishing.spec import PushRecipe
from qexport.quantization.quantize import planned_size
from qexport.report.content import FULL
from qexport.sizes import format_size
from qexport.specs import METHODS, AnyQuantizeSpec, CalibrationSpec, GptqSpec, ShardSpec, VerifySpec
from qexport.verification.evaluate import FEW_TOKENS, evaluation_data, evaluation_prompts
from qexport.verification.kinship import require_same_shape
from qexport.verification.lm_tasks import require_harness

_LEAST_TOKENS = 100


@dataclass(frozen=True)
class Job:
    """What a recipe comes to: its tasks, each after those that it needs."""

    base: Path
    output: Path
    title: str
    tasks: tuple[Task, ...]
    report: ReportTask | None = None
    replace: bool = True  # whether a model of qexport's that is there may be replaced

    @property
    def models(self) -> tuple[ModelTask, ...]:
        """The tasks that make models."""
        return tuple(task for task in self.tasks if isinstance(task, ModelTask))


_USUAL_EFFORT = GptqSpec.model_fields["effort"].default


def variant_name(spec: AnyQuantizeSpec) -> str:
    """A variant's directory: method, bits or type, and the user's choice of group size, solver and format."""
    preset = METHODS[spec.method]
    group = spec.group_size
    parts = [
        f"{spec.method}-{'-'.join(spec.type).lower() or _bits_name(spec)}",
        "" if group is None else "row" if group == -1 else f"g{group}",
        "" if spec.solver == preset.solver else spec.solver.replace("+", "-"),
        "" if spec.format == preset.format else spec.format,
        effort if (effort := getattr(spec, "effort", _USUAL_EFFORT)) != _USUAL_EFFORT else "",
    ]
    return "-".join(part for part in parts if part)


def _bits_name(spec: AnyQuantizeSpec) -> str:
    """The bits, or what is asked for in their place."""
    if spec.target_size is not None:
        return format_size(spec.target_size).replace(" ", "")
    if spec.max_loss is not None:
        return f"loss{100 * spec.max_loss:g}pct"
    if spec.plan is not None:
        return f"plan-{file_hash(Path(spec.plan))[:8]}"
    return f"{spec.width:g}bit" if spec.average_bits is None else f"{spec.average_bits}bit"


def build(recipe: AnyRecipe, *, on_event: OnEvent = ignore) -> Job:
    """The recipe's job: variants with their scores and a report, or one model; says what its notes say.

    Hub ids become snapshots once: what an id points to may change while the job runs.
    Raises RecipeError when two variants are the same, or the output a name that no file can have.
    """
    if "\0" in recipe.output:
        raise RecipeError(f"the output {recipe.output!r} is no name that a directory can have")
    base = str(resolve(recipe.base))
    adapters = tuple(map(_snapshot, recipe.adapters))
    if isinstance(recipe, ModelRecipe):
        for note in recipe.notes:
            on_event(Noted(note))
        return _one_model(recipe, base, adapters)
    return _variants(recipe, base, adapters)


def _snapshot(adapter: str) -> str:
    """The adapter's local directory, with its weight if it has one."""
    name, weight = split_weight(adapter)
    return str(resolve(name)) + ("" if weight is None else f":{weight}")


def _one_model(recipe: ModelRecipe, base: str, adapters: tuple[str, ...]) -> Job:
    out = Path(recipe.output)
    tasks: list[Task] = []
    source: Source = base
    if adapters:
        merged = merged_beside(recipe.output) if recipe.quantize else out
        source = MergeTask("merge", merged, base, adapters, recipe.merge)
        tasks.append(source)
    if recipe.quantize:
        tasks.append(QuantizeTask(variant_name(recipe.quantize), out, source, recipe.quantize))
    if not tasks:
        tasks.append(ShardTask("shard", out, base, ShardSpec(max_shard_size=recipe.merge.max_shard_size)))
    return Job(base=Path(base), output=out, title="models", tasks=tuple(tasks), replace=recipe.replace)


def _variants(recipe: ExportRecipe, base: str, adapters: tuple[str, ...]) -> Job:
    out = Path(recipe.output)
    tasks: list[Task] = []
    source: Source = base
    if adapters:
        source = MergeTask("merge", out / "merged", base, adapters, recipe.merge)
        tasks.append(source)
    if recipe.shard:
        source = ShardTask("shard", out / "sharded", source, recipe.shard)
        tasks.append(source)
    reference = VerifyTask("verify full", out / "scores" / "full.json", source, recipe.verify)
    tasks.append(reference)
    variants: list[VerifyTask] = []

    def measure(name: str, made: Source) -> None:
        scores = out / "scores" / f"{name}.json"
        variants.append(VerifyTask(f"verify {name}", scores, made, recipe.verify, reference))
        tasks.append(variants[-1])

    names = dict(named(recipe.quantize))
    for name, spec in names.items():
        tasks.append(QuantizeTask(name, out / name, source, spec))
        measure(name, tasks[-1])
    for name, candidate in _candidates(recipe.candidates, {*names, FULL}):
        measure(name, candidate)
    report = ReportTask("report", out, recipe.title, reference, tuple(variants))
    if recipe.push:
        made = [task.name for task in tasks if isinstance(task, QuantizeTask)]
        push = PushTask("push", out, report, _pushed(recipe.push, made, tasks))
        return Job(Path(base), out, recipe.title, (*tasks, report, push), report)
    return Job(base=Path(base), output=out, title=recipe.title, tasks=(*tasks, report), report=report)


def _pushed(push: PushRecipe, made: Sequence[str], tasks: Sequence[Task]) -> PushRecipe:
    """With the names of the variants that go. Raises RecipeError for one that is not made."""
    models = [task.out.name for task in tasks if isinstance(task, ModelTask)]
    chosen = push.variant or tuple(made) or tuple(models)
    if unknown := [name for name in chosen if name not in models]:
        raise RecipeError(f"push.variant: there is no {unknown[0]}, known are {', '.join(models)}")
    if not chosen:
        raise RecipeError("push: the recipe makes no model that could be pushed")
    return push.model_copy(update={"variant": chosen})


def named(specs: Sequence[AnyQuantizeSpec]) -> Iterator[tuple[str, AnyQuantizeSpec]]:
    """Each variant with a name of its own: those that differ in what the name does not tell are numbered."""
    seen: dict[str, list[AnyQuantizeSpec]] = {}
    for spec in specs:
        name = variant_name(spec)
        others = seen.setdefault(name, [])
        if spec in others:
            raise RecipeError(f"the recipe asks for {name} twice")
        others.append(spec)
        yield name if len(others) == 1 else f"{name}-{len(others)}", spec


def _candidates(candidates: Sequence[str], taken: set[str]) -> Iterator[tuple[str, str]]:
    """Each finished model, a local path from here on, with a name of its own: its file's or directory's."""
    if twice := next((name for name in candidates if candidates.count(name) > 1), None):
        raise RecipeError(f"{twice} is to be measured twice")
    for candidate in candidates:
        path = Path(candidate) if exists(Path(candidate)) else resolve(candidate)
        stem = path.stem if path.is_file() else path.absolute().name
        name, number = stem, 1
        while name in taken:
            number += 1
            name = f"{stem}-{number}"
        taken.add(name)
        yield name, str(path)


@dataclass(frozen=True)
class Planned:
    """A task and what is known of it before it runs: whether it will, and how many bytes it writes."""

    task: Task
    runs: bool
    size_bytes: int | None


def plan(job: Job, *, trust_remote_code: bool = False, on_event: OnEvent = ignore) -> list[Planned]:
    """Checks the whole job against its inputs and tells what would run; reads headers and hashes.

    Raises whatever InputError a task would run into for its options or inputs.
    """
    told: set[str] = set()

    def once(event: Event) -> None:
        if not isinstance(event, Noted) or event.text not in told:
            on_event(event)
        if isinstance(event, Noted):
            told.add(event.text)

    sizes: dict[str, int] = {}
    checkpoint = open_directory(job.base)
    for task in job.tasks:
        if isinstance(task, MergeTask):
            merging = plan_merge(
                task.base, task.adapters, task.spec, trust_remote_code=trust_remote_code, on_event=once
            )
            sizes[task.name] = merging.size
            checkpoint = merging.base.checkpoint
    skeleton = _check_inputs(job, checkpoint.path, trust_remote_code)
    decodes = bool(sizes) and checkpoint.quantization is not None  # what is quantized is not there to look at
    planned: list[Planned] = []
    running: set[str] = set()
    for task in job.tasks:
        size = sizes.get(task.name)
        if isinstance(task, QuantizeTask) and skeleton and not decodes:
            size = planned_size(checkpoint, skeleton, task.spec, on_event=once)
        elif isinstance(task, ShardTask):
            size = next(iter(sizes.values()), checkpoint.weights_size)
        runs = any(need.name in running for need in task.needs) or not task.stands()
        if runs:
            running.add(task.name)
            task.check()
            if isinstance(task, ModelTask) and task.occupied() and not job.replace:
                raise OutputExistsError(
                    f"{task.out} is there already, made of other inputs or options",
                    remedy="let the recipe say exist_ok: true, or choose another output in it",
                )
        planned.append(Planned(task, runs, size))
    require_space(job.output, sum(step.size_bytes or 0 for step in planned if step.runs))
    return planned


def _require_tokens(spec: VerifySpec, tokenizer: Any) -> None:
    """Raises CalibrationError for a text that is too short for any comparison."""
    text, _ = evaluation_data(spec)
    found = 0
    for document in read_documents(text)[: spec.max_documents]:
        found += max(len(tokenizer(document).input_ids) - 1, 0)
        if found >= _LEAST_TOKENS:
            return
    raise CalibrationError(
        f"{spec.text or text} has {found} tokens to score",
        expected=f"at least {_LEAST_TOKENS}; a loss of some per cent shows from {FEW_TOKENS} on",
    )


def _check_inputs(job: Job, base: Path, trust_remote_code: bool) -> Skeleton | None:
    """Reads the texts that the tasks will; the skeleton, if any of them needs the model's structure."""
    for spec in dict.fromkeys(task.spec for task in job.tasks if isinstance(task, VerifyTask)):
        text, _ = evaluation_data(spec)
        read_documents(text)
        evaluation_prompts(spec)
    specs = [task.spec for task in job.tasks if isinstance(task, (QuantizeTask, VerifyTask))]
    if not specs:
        return None
    _, skeleton = text_and_skeleton(open_checkpoint(base), trust_remote_code=trust_remote_code)
    for task in job.tasks:  # finished models: headers only
        if isinstance(task, VerifyTask) and task.reference and isinstance(task.source, str):
            _, theirs = text_and_skeleton(open_checkpoint(task.source), trust_remote_code=trust_remote_code)
            require_same_shape(theirs, skeleton, (task.source, str(base)))
    if job.report:
        architecture_of(skeleton.model_type)
    if job.report or any(isinstance(spec, CalibrationSpec) for spec in specs):
        tokenizer = load_tokenizer(base, trust_remote_code=trust_remote_code)
        for asked in specs:
            if isinstance(asked, VerifySpec):
                _require_tokens(asked, tokenizer)
                if asked.tasks:
                    require_harness()
    return skeleton
