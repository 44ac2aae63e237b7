"""The steps that measure and tell: a model's scores, the report of all of them, the push. See `tasks`."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from qexport.checkpoint.checkpoint import CONFIG_FILE, read_json
from qexport.checkpoint.disk import exists, is_file
from qexport.checkpoint.gguf_files import gguf_files
from qexport.checkpoint.manifest import add_figures, read_figures, read_manifest
from qexport.checkpoint.staging import write_file_atomically
from qexport.errors import CorruptFileError, OutputExistsError, QexportError
from qexport.events import Noted
from qexport.formats.opening import open_checkpoint
from qexport.graph.tasks import Context, ModelTask, QuantizeTask, Source, Task, path_of
from qexport.publishing.options import check_options
from qexport.publishing.push import check_repo_id, push, require_token
from qexport.publishing.spec import PushRecipe, PushSpec
from qexport.report.card import noted_card, write_card
from qexport.report.card_several import write_card_of_several
from qexport.report.content import FULL, Report
from qexport.report.files import CARD_PLOT, read_report, require_own, write_report
from qexport.report.layer_errors import layer_errors
from qexport.report.rows import Variant, make_report
from qexport.results import Evaluation
from qexport.specs import SOLVERS, VerifySpec
from qexport.verification.evaluate import Reference, evaluate, evaluate_recipe, evaluation_prompts

_LOGITS = ".logits"


@dataclass(frozen=True)
class _Kept:
    """The content of a file of scores: what they were made of, and the hash of the scores themselves."""

    key: str
    digest: str
    scores: Evaluation


_KEPT = TypeAdapter(_Kept)


def _digest(scores: Any) -> str:
    return hashlib.sha256(json.dumps(scores, sort_keys=True).encode()).hexdigest()


def _worded(data: Any) -> Any:
    """`data` with NaN and infinity, which JSON has not, as the words that pydantic reads as numbers."""
    if isinstance(data, float):
        return data if math.isfinite(data) else str(data)
    if isinstance(data, Mapping):
        return {key: _worded(value) for key, value in data.items()}
    return [_worded(value) for value in data] if isinstance(data, (list, tuple)) else data


@dataclass(frozen=True)
class VerifyTask(Task):
    """A model's integrity and scores, kept as JSON; the model's own manifest gets the figures too.

    Without a `reference` it is the one that others are held against: its logits lie beside its scores until
    the report is made.
    """

    source: Source
    spec: VerifySpec
    reference: VerifyTask | None = None

    @property
    def needs(self) -> tuple[Task, ...]:
        """The reference's scores, and the model if a task makes it."""
        made = (self.source,) if isinstance(self.source, Task) else ()
        return (*made, self.reference) if self.reference else made

    @property
    def logits(self) -> Path:
        """Where the logits of a reference lie."""
        return self.out.with_suffix(_LOGITS)

    def key(self) -> str:
        """Equal keys, equal scores."""
        key = evaluate_recipe(path_of(self.source), self.spec).key
        if self.reference is None:
            return key
        return hashlib.sha256(f"{key} {self.reference.key()}".encode()).hexdigest()

    def stands(self) -> bool:
        """By the key that the scores carry, and their hash: who changes a number has it measured again."""
        try:
            return self.out.is_file() and self._kept().key == self.key()
        except QexportError:
            return False

    def _kept(self) -> _Kept:
        content = read_json(self.out)
        try:
            kept = _KEPT.validate_python(content)
        except ValidationError as error:
            raise CorruptFileError(f"{self.out} holds no scores of qexport's") from error
        if kept.digest != _digest(content["scores"]):
            raise CorruptFileError(f"{self.out} was changed since qexport wrote it")
        return kept

    def run(self, context: Context) -> None:
        """See `evaluate`."""
        reference = self.reference
        scores = evaluate(
            path_of(self.source),
            self.spec,
            reference=Reference(
                reference.scores(), reference.logits, _given_path(reference.source), context.trust_remote_code
            )
            if reference
            else None,
            keep_logits=None if reference else self.logits,
            trust_remote_code=context.trust_remote_code,
            on_event=context.on_event,
        )
        told = _worded(asdict(scores))
        content = {"key": self.key(), "digest": _digest(told), "scores": told}
        write_file_atomically(self.out, json.dumps(content, indent=1, ensure_ascii=False) + "\n")
        if isinstance(self.source, Task):
            add_figures(self.source.out, _figures(scores))

    def scores(self) -> Evaluation:
        """The result, read back. Raises CorruptFileError where somebody changed it."""
        return self._kept().scores


def _figures(scores: Evaluation) -> dict[str, Any]:
    """What a model's own manifest tells of its scores."""
    figures: dict[str, Any] = {
        "perplexity": scores.perplexity.value,
        "perplexity_se": scores.perplexity.standard_error,
        "perplexity_recipe": dict(scores.perplexity.recipe),
    }
    if scores.divergence:
        figures["kl"] = scores.divergence.mean
        figures["kl_se"] = scores.divergence.standard_error
    if scores.answers and scores.answers.references:
        figures["bleu"] = scores.answers.references.bleu.value
        figures["bleu_recipe"] = dict(scores.answers.recipe)
    return figures


def _costs(source: Source) -> dict[str, Any]:
    """What it took to make `source` and the models that it was made of: time in all, memory at most."""
    if not isinstance(source, Task):
        return {}
    steps = [_own_costs(source.out), *(_costs(need) for need in source.needs)]
    seconds = [step["seconds"] for step in steps if "seconds" in step]
    peaks = [step["peak_bytes"] for step in steps if "peak_bytes" in step]
    return {"seconds": sum(seconds), "peak_bytes": max(peaks)} if seconds and peaks else {}


def _own_costs(directory: Path) -> dict[str, Any]:
    """What an output's manifest tells of its making, as far as that is numbers."""
    figures = read_figures(directory)
    return {
        key: figures[key] for key in ("seconds", "peak_bytes") if isinstance(figures.get(key), (int, float))
    }


def _mean_bits(path: Path) -> float | None:
    """Bits a code where layers may differ, as an output's manifest tells them; None where it does not."""
    bits = read_figures(path).get("bits") if path.is_dir() else None
    return bits if isinstance(bits, (int, float)) else None


@dataclass(frozen=True)
class ReportTask(Task):
    """All files of the report, from the scores of the full-precision model and of every variant."""

    title: str
    reference: VerifyTask
    variants: tuple[VerifyTask, ...]

    @property
    def needs(self) -> tuple[Task, ...]:
        """All scores."""
        return (self.reference, *self.variants)

    def stands(self) -> bool:
        """Never: writing it costs little."""
        return False

    def check(self) -> None:
        """Raises OutputExistsError for a report that is not ours, and for what is a model or a file."""
        for place in (self.out, *self.out.absolute().parents):
            if exists(place) and not place.is_dir():
                raise OutputExistsError(f"{place} is no directory", remedy="choose another output")
        if is_file(self.out / CONFIG_FILE) or gguf_files(self.out):
            raise OutputExistsError(
                f"{self.out} is a model",
                expected="a directory for the report and all variants",
                remedy="choose another output",
            )
        require_own(self.out)

    def left_out(self) -> list[str]:
        """Models of ours that lie there with scores, and that this report is not about."""
        known = {verified.out.stem for verified in (self.reference, *self.variants)}
        scores = sorted(self.out.glob("scores/*.json"))
        return [file.stem for file in scores if file.stem not in known]

    def report(self) -> Report:
        """The full-precision model first, then the variants in the recipe's order."""
        spec = self.reference.spec
        prompts = evaluation_prompts(spec)
        return make_report(
            self.title,
            Variant(
                FULL, self._place(self.reference), {}, self.reference.scores(), _costs(self.reference.source)
            ),
            [self._variant(verified) for verified in self.variants],
            [(str(prompt.messages[-1]["content"]), prompt.reference) for prompt in prompts],
            spec,
        )

    def _variant(self, verified: VerifyTask) -> Variant:
        path = _given_path(verified.source)
        made = verified.source
        settings = (
            {**made.spec.model_dump(), "bits": _mean_bits(path) or made.spec.width}
            if isinstance(made, QuantizeTask)
            else _settings(path)
        )
        return Variant(
            name=made.name if isinstance(made, Task) else verified.out.stem,
            path=self._place(verified),
            settings=settings,
            scores=verified.scores(),
            costs=_own_costs(path) if path.is_dir() else {},
            layer_errors=layer_errors(path),
        )

    def _place(self, verified: VerifyTask) -> str:
        path = _given_path(verified.source).absolute()
        home = self.out.absolute()
        return path.relative_to(home).as_posix() if path.is_relative_to(home) else str(path)

    def run(self, context: Context) -> None:
        """Writes the files, over nothing but an earlier report of ours, and the cards of the models that were
        made here; the kept logits go."""
        report = self.report()
        write_report(report, self.out, context.on_event)
        plot = self.out / CARD_PLOT
        drawn = plot.read_bytes() if plot.is_file() else None
        for verified in self.variants:
            if isinstance(made := verified.source, Task):
                noted_card(context.on_event, write_card, made.out, report, made.name, drawn)
        noted_card(context.on_event, write_card_of_several, self.out, report)
        self.reference.logits.unlink(missing_ok=True)


@dataclass(frozen=True)
class PushTask(Task):
    """The variants to the Hub, once the report is there and every gate is passed."""

    report: ReportTask
    spec: PushRecipe

    @property
    def needs(self) -> tuple[Task, ...]:
        """The report: it comes after all that is made."""
        return (self.report,)

    def stands(self) -> bool:
        """Never: the Hub is asked what it has already."""
        return False

    def check(self) -> None:
        """Raises SpecError for a repository id that is none, and for options that cannot be."""
        check_repo_id(self.spec.repo_id)
        check_options(self.spec, [task.out.name for task in _made(self.report)])

    def check_login(self) -> None:
        """Raises HubError where nobody is logged in."""
        require_token()

    def run(self, context: Context) -> None:
        """See `push`. Pushes nothing, and says so, when a variant does not pass its gates."""
        if failing := [row.variant for row in read_report(self.report.out).rows if row.failures]:
            told = f"nothing was pushed: {', '.join(failing)} did not pass the gate"
            context.on_event(Noted(told))
            return
        spec = PushSpec.model_validate(self.spec.model_dump(exclude={"repo_id"}))
        push(self.out, self.spec.repo_id, spec, on_event=context.on_event)


def _made(report: ReportTask) -> list[Task]:
    """The models that are made for a report, in the directory that it lies in."""
    found: list[Task] = []
    waiting: list[Task] = [report]
    while waiting:
        task = waiting.pop()
        waiting += task.needs
        if isinstance(task, ModelTask) and task not in found:
            found.append(task)
    return found


def _given_path(source: Source) -> Path:
    """Where a source lies in the user's words: a GGUF file itself, not the directory it is read from."""
    if isinstance(source, Task):
        return source.out
    return Path(source) if exists(Path(source)) else path_of(source)


def _settings(path: Path) -> Mapping[str, Any]:
    """How a finished model was made: as its manifest has it, or as far as its files tell."""
    manifest = read_manifest(path if path.is_dir() else path.parent)
    files = manifest.get("files")
    if path.is_file() and not (isinstance(files, dict) and path.name in files):
        manifest = {}  # it lies beside an output, and is none of it
    recipe, figures = manifest.get("recipe"), manifest.get("figures")
    options = recipe.get("options") if isinstance(recipe, dict) else None
    if isinstance(options, dict) and str(options.get("solver")) in SOLVERS:
        types = figures.get("files") if isinstance(figures, dict) else None
        told = types.get(path.name) if isinstance(types, dict) else None
        if isinstance(told, dict):  # one of several GGUF files
            options = {**options, "type": [told.get("type")]}
        spec = SOLVERS[options["solver"]]
        own = {name: value for name, value in options.items() if name in spec.model_fields}
        with contextlib.suppress(ValidationError):
            return {**own, "bits": _mean_bits(path) or spec.model_validate(own).width}
    quantization = open_checkpoint(path).quantization or {}
    method, bits = quantization.get("quant_method"), quantization.get("bits")
    method = method if isinstance(method, str) else None
    return {"method": method, "format": method, "bits": bits if isinstance(bits, (int, float)) else None}
