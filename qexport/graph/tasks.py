"""The steps of an export as frozen tasks: each knows its inputs, whether its result stands, and how to run.

A result stands when its manifest carries the key of the task's recipe, made of the hashes of its inputs,
its options and qexport's version, and when every file still has its hash.
"""

from __future__ import annotations

import json
import math
from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from qexport.checkpoint.checkpoint import read_json
from qexport.checkpoint.disk import exists, is_file
from qexport.checkpoint.hub import resolve
from qexport.checkpoint.manifest import (
    MANIFEST_FILE,
    Recipe,
    add_figures,
    read_figures,
    read_manifest,
    stands,
)
from qexport.checkpoint.resharding import shard, shard_recipe
from qexport.checkpoint.staging import check_target, write_file_atomically
from qexport.errors import OutputExistsError, QexportError
from qexport.events import OnEvent
from qexport.measure import Measured
from qexport.merging.adapter import split_weight
from qexport.merging.merge import merge, merge_recipe
from qexport.quantization.quantize import quantize, quantize_recipe
from qexport.report.rows import MARK, Row, make_row, report_json, report_markdown
from qexport.results import Bleu, Evaluation, Perplexity, plain
from qexport.specs import (
    AnyQuantizeSpec,
    MergeSpec,
    ShardSpec,
    VerifySpec,
)
from qexport.verification.verify import evaluate, evaluate_recipe

REPORT_FILES = ("report.json", "report.md")


@dataclass(frozen=True)
class Context:
    """What a run as a whole decides: who listens, and whether a checkpoint's own code may run."""

    on_event: OnEvent
    trust_remote_code: bool = False


@dataclass(frozen=True)
class Task(ABC):
    """One step. `needs` come before it; `out` is where its result lies."""

    name: str
    out: Path

    @property
    @abstractmethod
    def needs(self) -> tuple[Task, ...]:
        """The tasks whose results this one reads."""

    @abstractmethod
    def stands(self) -> bool:
        """Whether the result is there, whole, and made of the present inputs."""

    @abstractmethod
    def run(self, context: Context) -> None:
        """Makes the result anew."""

    def check(self) -> None:  # noqa: B027 - most tasks have nothing to refuse
        """Raises an InputError, before anything runs, when `run` would have to."""


Source = Task | str


def _path(source: Source) -> Path:
    return source.out if isinstance(source, Task) else resolve(source)


@dataclass(frozen=True)
class ModelTask(Task):
    """A task whose result is a model directory with a manifest."""

    @property
    @abstractmethod
    def sources(self) -> tuple[Source, ...]:
        """What it reads: tasks' results and the user's own directories."""

    @property
    def needs(self) -> tuple[Task, ...]:
        """The tasks among the sources."""
        return tuple(source for source in self.sources if isinstance(source, Task))

    @abstractmethod
    def recipe(self) -> Recipe:
        """What determines the result; its inputs must be there."""

    @abstractmethod
    def make(self, context: Context, *, overwrite: bool) -> None:
        """Writes the model."""

    def _ours(self) -> bool:
        return is_file(self.out / MANIFEST_FILE)

    def occupied(self) -> bool:
        """Whether anything lies at `out`; an empty directory is nothing."""
        return exists(self.out) and not (self.out.is_dir() and not any(self.out.iterdir()))

    def size_bytes(self) -> int:
        """Bytes of the result's files, by its manifest."""
        return sum(record["size"] for record in read_manifest(self.out)["files"].values())

    def check(self) -> None:
        """Raises OutputExistsError when something lies there that must not be replaced."""
        inputs = [_path(source) for source in self.sources if isinstance(source, str)]
        is_input = self.out.resolve() in [path.resolve() for path in inputs]  # check_target's words fit then
        if self.occupied() and not self._ours() and not is_input:
            raise OutputExistsError(
                f"{self.out} is there already and was not made by qexport",
                remedy="move it away, or choose another output in the recipe",
            )
        check_target(self.out, overwrite=True, sources=inputs)

    def stands(self) -> bool:
        """By the manifest's key and the files' hashes."""
        return self._ours() and stands(self.out, self.recipe().key)

    def run(self, context: Context) -> None:
        """Replaces what qexport itself made before, and nothing else; notes what it cost."""
        with Measured() as cost:
            self.make(context, overwrite=self._ours())
        costs = {"seconds": round(cost.seconds, 3), "peak_bytes": cost.peak_bytes}
        add_figures(self.out, costs)


@dataclass(frozen=True)
class MergeTask(ModelTask):
    """Adapters into their base."""

    base: str
    adapters: tuple[str, ...]
    spec: MergeSpec

    @property
    def sources(self) -> tuple[Source, ...]:
        """Base and adapters, the user's own."""
        return (self.base, *(split_weight(adapter)[0] for adapter in self.adapters))

    def recipe(self) -> Recipe:
        """See `merge_recipe`."""
        return merge_recipe(self.base, self.adapters, self.spec)

    def make(self, context: Context, *, overwrite: bool) -> None:
        """See `merge`."""
        merge(
            self.base,
            self.adapters,
            self.out,
            self.spec,
            trust_remote_code=context.trust_remote_code,
            overwrite=overwrite,
            on_event=context.on_event,
        )


@dataclass(frozen=True)
class ShardTask(ModelTask):
    """The same tensors in files of another size."""

    source: Source
    spec: ShardSpec

    @property
    def sources(self) -> tuple[Source, ...]:
        """The source."""
        return (self.source,)

    def recipe(self) -> Recipe:
        """See `shard_recipe`."""
        return shard_recipe(_path(self.source), self.spec)

    def make(self, context: Context, *, overwrite: bool) -> None:
        """See `shard`."""
        shard(
            _path(self.source),
            self.out,
            self.spec,
            overwrite=overwrite,
            on_event=context.on_event,
        )


@dataclass(frozen=True)
class QuantizeTask(ModelTask):
    """One quantized variant."""

    source: Source
    spec: AnyQuantizeSpec

    @property
    def sources(self) -> tuple[Source, ...]:
        """The source."""
        return (self.source,)

    def recipe(self) -> Recipe:
        """See `quantize_recipe`."""
        return quantize_recipe(_path(self.source), self.spec)

    def make(self, context: Context, *, overwrite: bool) -> None:
        """See `quantize`."""
        quantize(
            _path(self.source),
            self.out,
            self.spec,
            overwrite=overwrite,
            trust_remote_code=context.trust_remote_code,
            on_event=context.on_event,
        )


@dataclass(frozen=True)
class VerifyTask(Task):
    """A model's integrity and scores, kept as JSON; the model's own manifest gets the figures too."""

    source: Source
    spec: VerifySpec

    @property
    def needs(self) -> tuple[Task, ...]:
        """The model, if a task makes it."""
        return (self.source,) if isinstance(self.source, Task) else ()

    def _key(self) -> str:
        return evaluate_recipe(_path(self.source), self.spec).key

    def stands(self) -> bool:
        """By the key that the scores carry."""
        try:
            return self.out.is_file() and read_json(self.out).get("key") == self._key()
        except QexportError:
            return False

    def run(self, context: Context) -> None:
        """See `evaluate`."""
        scores = evaluate(
            _path(self.source),
            self.spec,
            trust_remote_code=context.trust_remote_code,
            on_event=context.on_event,
        )
        content = plain({"key": self._key(), "scores": asdict(scores)})
        write_file_atomically(self.out, json.dumps(content, indent=1, ensure_ascii=False) + "\n")
        if isinstance(self.source, Task):
            figures: dict[str, Any] = {
                "perplexity": scores.perplexity.value,
                "perplexity_se": scores.perplexity.standard_error,
                "perplexity_recipe": dict(scores.perplexity.recipe),
            }
            if scores.bleu:
                figures["bleu"] = scores.bleu.value
                figures["bleu_recipe"] = dict(scores.bleu.recipe)
            add_figures(self.source.out, figures)

    def scores(self) -> Evaluation:
        """The result, read back."""
        raw = read_json(self.out)["scores"]
        perplexity = raw.pop("perplexity")
        for name in ("value", "standard_error"):
            if perplexity[name] is None:  # JSON has no NaN and no infinity
                perplexity[name] = math.nan if name == "standard_error" else math.inf
        for name in ("unit_nll", "unit_tokens"):
            perplexity[name] = tuple(perplexity[name])
        bleu = raw.pop("bleu")
        if bleu:
            bleu["answers"] = tuple(bleu["answers"])
        return Evaluation(**raw, perplexity=Perplexity(**perplexity), bleu=Bleu(**bleu) if bleu else None)


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
    """report.json and report.md from the scores of the full-precision model and of every variant."""

    title: str
    reference: VerifyTask
    variants: tuple[tuple[QuantizeTask, VerifyTask], ...]

    @property
    def needs(self) -> tuple[Task, ...]:
        """All scores."""
        return (self.reference, *(verified for _, verified in self.variants))

    def stands(self) -> bool:
        """Never: writing it costs nothing."""
        return False

    def check(self) -> None:
        """Raises OutputExistsError when a report lies there that is not ours."""
        ours = self.out / REPORT_FILES[0]
        if is_file(ours) and MARK in read_json(ours):
            return
        for name in REPORT_FILES:
            if exists(self.out / name):
                raise OutputExistsError(
                    f"{self.out / name} is there already and is no report of qexport's",
                    remedy="move it away, or choose another output",
                )

    def rows(self) -> list[Row]:
        """The full-precision model first, then the variants in the recipe's order."""
        full = self.reference.scores()
        bits = round(full.bits_per_weight)
        costs = _costs(self.reference.source)
        rows = [make_row("full", "none", bits, full, reference=None, costs=costs)]
        for made, verified in self.variants:
            rows.append(
                make_row(
                    made.name,
                    made.spec.method,
                    made.spec.width,
                    verified.scores(),
                    reference=full,
                    costs=read_figures(made.out),
                )
            )
        return rows

    def run(self, context: Context) -> None:
        """Writes both files, over nothing but an earlier report of ours."""
        self.check()
        rows, full = self.rows(), self.reference.scores()
        content = json.dumps(plain(report_json(self.title, rows, full)), indent=2, ensure_ascii=False)
        texts = (content + "\n", report_markdown(self.title, rows, full))
        for name, text in zip(REPORT_FILES, texts, strict=True):
            write_file_atomically(self.out / name, text)
