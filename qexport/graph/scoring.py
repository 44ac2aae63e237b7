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

from qexport.checkpoint.checkpoint import read_json
from qexport.checkpoint.disk import exists
from qexport.checkpoint.manifest import add_figures, read_figures, read_manifest
from qexport.checkpoint.staging import write_file_atomically
from qexport.errors import GateError, QexportError
from qexport.formats.opening import open_checkpoint
from qexport.graph.tasks import Context, QuantizeTask, Source, Task, path_of
from qexport.publishing.push import check_repo_id, push, require_token
from qexport.publishing.spec import PushRecipe, PushSpec
from qexport.report.card import write_card
from qexport.report.content import Report
from qexport.report.files import CARD_PLOT, require_own, write_report
from qexport.report.layer_errors import layer_errors
from qexport.report.rows import FULL, Variant, make_report
from qexport.results import Evaluation
from qexport.specs import SOLVERS, VerifySpec
from qexport.verification.evaluate import Reference, evaluate, evaluate_recipe, evaluation_data
from qexport.verification.prompts import read_prompts

_LOGITS = ".logits"


@dataclass(frozen=True)
class _Kept:
    """The content of a file of scores."""

    key: str
    scores: Evaluation


_KEPT = TypeAdapter(_Kept)


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
        """By the key that the scores carry."""
        try:
            return self.out.is_file() and read_json(self.out).get("key") == self.key()
        except QexportError:
            return False

    def run(self, context: Context) -> None:
        """See `evaluate`."""
        reference = self.reference
        scores = evaluate(
            path_of(self.source),
            self.spec,
            reference=Reference(reference.scores(), reference.logits, context.trust_remote_code)
            if reference
            else None,
            keep_logits=None if reference else self.logits,
            trust_remote_code=context.trust_remote_code,
            on_event=context.on_event,
        )
        content = json.dumps(_worded(asdict(_Kept(self.key(), scores))), indent=1, ensure_ascii=False)
        write_file_atomically(self.out, content + "\n")
        if isinstance(self.source, Task):
            add_figures(self.source.out, _figures(scores))

    def scores(self) -> Evaluation:
        """The result, read back."""
        return _KEPT.validate_python(read_json(self.out)).scores


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
    steps = [read_figures(source.out), *(_costs(need) for need in source.needs)]
    seconds = [step["seconds"] for step in steps if "seconds" in step]
    peaks = [step["peak_bytes"] for step in steps if "peak_bytes" in step]
    return {"seconds": sum(seconds), "peak_bytes": max(peaks)} if seconds and peaks else {}


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
        """Raises OutputExistsError when a report lies there that is not ours."""
        require_own(self.out)

    def report(self) -> Report:
        """The full-precision model first, then the variants in the recipe's order."""
        spec = self.reference.spec
        _, pairs = evaluation_data(spec)
        prompts = read_prompts(pairs)[: spec.max_pairs] if pairs else ()
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
            {**made.spec.model_dump(), "bits": made.spec.width}
            if isinstance(made, QuantizeTask)
            else _settings(path)
        )
        return Variant(
            name=made.name if isinstance(made, Task) else verified.out.stem,
            path=self._place(verified),
            settings=settings,
            scores=verified.scores(),
            costs=read_figures(path if path.is_dir() else path.parent),
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
            if isinstance(verified.source, Task):
                write_card(verified.source.out, report, verified.source.name, drawn)
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
        """Raises SpecError for a repository id that is none, HubError where nobody is logged in."""
        check_repo_id(self.spec.repo_id)
        require_token()

    def run(self, context: Context) -> None:
        """See `push`. Raises GateError, and pushes nothing, when a variant does not pass its gates."""
        if failing := [row.variant for row in self.report.report().rows if row.failures]:
            raise GateError(f"nothing was pushed: {', '.join(failing)} did not pass the gate")
        spec = PushSpec.model_validate(self.spec.model_dump(exclude={"repo_id"}))
        push(self.out, self.spec.repo_id, spec, on_event=context.on_event)


def _given_path(source: Source) -> Path:
    """Where a source lies in the user's words: a GGUF file itself, not the directory it is read from."""
    if isinstance(source, Task):
        return source.out
    return Path(source) if exists(Path(source)) else path_of(source)


def _settings(path: Path) -> Mapping[str, Any]:
    """How a finished model was made: as its manifest has it, or as far as its files tell."""
    manifest = read_manifest(path if path.is_dir() else path.parent)
    recipe, figures = manifest.get("recipe"), manifest.get("figures")
    options = recipe.get("options") if isinstance(recipe, dict) else None
    if isinstance(options, dict) and options.get("solver") in SOLVERS:
        files = figures.get("files") if isinstance(figures, dict) else None
        told = files.get(path.name) if isinstance(files, dict) else None
        if isinstance(told, dict):  # one of several GGUF files
            options = {**options, "type": [told.get("type")]}
        spec = SOLVERS[options["solver"]]
        own = {name: value for name, value in options.items() if name in spec.model_fields}
        with contextlib.suppress(ValidationError):
            return {**own, "bits": spec.model_validate(own).width}
    quantization = open_checkpoint(path).quantization or {}
    method = quantization.get("quant_method")
    return {"method": method, "format": method, "bits": quantization.get("bits")}
