"""A directory of GGUF files of one model: a file, or its parts, for each type."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from qexport.checkpoint.disk import write_errors
from qexport.checkpoint.manifest import Recipe
from qexport.checkpoint.output import Room, StagedOutput
from qexport.checkpoint.weights_files import LastOpened
from qexport.formats.gguf.container import Metadata, PlannedTensor
from qexport.formats.gguf.splitting import SplitFile, plan_split
from qexport.formats.gguf.writing import GgufFile, header_bytes


@dataclass(frozen=True)
class PlannedModel:
    """One model of the directory: `stem` is its name without `.gguf`, `max_size` that of a part's tensors."""

    stem: str
    metadata: Metadata
    tensors: Sequence[PlannedTensor]
    max_size: int | None = None

    @cached_property
    def size(self) -> int:
        """Bytes of the files, headers and padding included."""
        return sum(len(header_bytes(file.metadata, file.tensors)) + file.size for file in self.files)

    @cached_property
    def files(self) -> Sequence[SplitFile]:
        """The file, or its parts."""
        return plan_split(self.stem, self.metadata, self.tensors, self.max_size)


class GgufOutput(StagedOutput):
    """See `StagedOutput`; the keys are (number of the model, name of the tensor)."""

    def __init__(
        self,
        out: Path,
        models: Sequence[PlannedModel],
        *,
        recipe: Callable[[], Recipe],
        sidecars: Mapping[Path, Path],
        sources: Sequence[Path],
        overwrite: bool = False,
    ) -> None:
        super().__init__(
            out,
            size=sum(model.size for model in models),
            recipe=recipe,
            sidecars=sidecars,
            sources=sources,
            overwrite=overwrite,
        )
        self.models = models

    def create_files(self, directory: Path, opened: LastOpened) -> Mapping[Hashable, Room]:
        """See `StagedOutput`."""
        rooms: dict[Hashable, Room] = {}
        for number, model in enumerate(self.models):
            for part in model.files:
                with write_errors(self.target):
                    file = GgufFile(directory / part.name, part.metadata, part.tensors, opened)
                rooms |= {
                    (number, tensor.name): Room(file, tensor.name, tensor.size) for tensor in part.tensors
                }
        return rooms
