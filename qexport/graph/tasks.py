"""The steps of an export as frozen tasks: each knows its inputs, whether its result stands, and how to run.

A result stands when its manifest carries the key of the task's recipe, made of the hashes of its inputs,
its options and qexport's version, and when every file still has its hash.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path

from qexport.checkpoint.disk import exists, is_file
from qexport.checkpoint.hub import resolve
from qexport.checkpoint.manifest import (
    MANIFEST_FILE,
    Recipe,
    add_figures,
    read_manifest,
    stands,
)
from qexport.checkpoint.resharding import shard, shard_recipe
from qexport.checkpoint.staging import check_target
from qexport.errors import OutputExistsError
from qexport.events import OnEvent
from qexport.measure import Measured
from qexport.merging.adapter import split_weight
from qexport.merging.merge import merge, merge_recipe
from qexport.quantization.quantize import quantize, quantize_recipe
from qexport.report.card import noted_card, write_card
from qexport.specs import (
    AnyQuantizeSpec,
    MergeSpec,
    ShardSpec,
)


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


def path_of(source: Source) -> Path:
    """Where a source lies."""
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
        inputs = [path_of(source) for source in self.sources if isinstance(source, str)]
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
        noted_card(context.on_event, write_card, self.out)


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
        return shard_recipe(path_of(self.source), self.spec)

    def make(self, context: Context, *, overwrite: bool) -> None:
        """See `shard`."""
        shard(
            path_of(self.source),
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
        return quantize_recipe(path_of(self.source), self.spec)

    def make(self, context: Context, *, overwrite: bool) -> None:
        """See `quantize`."""
        quantize(
            path_of(self.source),
            self.out,
            self.spec,
            overwrite=overwrite,
            trust_remote_code=context.trust_remote_code,
            on_event=context.on_event,
        )
