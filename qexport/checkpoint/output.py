"""A directory of weights files and small ones that appears whole or not at all, with its manifest."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

from qexport.checkpoint.disk import write_errors
from qexport.checkpoint.manifest import MANIFEST_FILE, Manifest, Recipe, carried_figures, record_files
from qexport.checkpoint.sidecars import copy_sidecars
from qexport.checkpoint.staging import StagedDirectory, require_space
from qexport.checkpoint.weights_files import Flusher, LastOpened, WeightsFile

Self = TypeVar("Self", bound="StagedOutput")


@dataclass(frozen=True)
class Room:
    """Where a tensor goes: a file, the tensor's name in it, and its bytes."""

    file: WeightsFile
    name: str
    size: int


class StagedOutput(ABC):
    """`with ... as output:` write every planned tensor.

    Leaving the block without an error checks that all were written and renames the directory into place;
    leaving it with one leaves nothing behind. `size` is what the weights take in all. `recipe` is asked for
    at the end: the inputs' hashes may be known by then, and whatever refuses the job should do so before.
    `sidecars` are the small files to carry along: name in the output -> where it lies.
    """

    def __init__(
        self,
        out: Path,
        *,
        size: int,
        recipe: Callable[[], Recipe],
        sidecars: Mapping[Path, Path],
        sources: Sequence[Path],
        overwrite: bool = False,
    ) -> None:
        self.figures: dict[str, Any] = {}
        self._size, self._recipe, self._sidecars, self._sources = size, recipe, sidecars, sources
        self._texts: dict[str, str] = {}
        self._rooms: dict[Hashable, Room] = {}
        self._left: dict[Hashable, int] = {}
        self._staged = StagedDirectory(out, overwrite=overwrite, sources=sources)
        self._flusher, self._opened = Flusher(), LastOpened()

    @property
    def target(self) -> Path:
        """The directory that is to be."""
        return self._staged.target

    @abstractmethod
    def create_files(self, directory: Path, opened: LastOpened) -> Mapping[Hashable, Room]:
        """Makes the files of the weights; what can be written, by the key that `write_bytes` takes.

        Raises StorageError.
        """

    def last_files(self, directory: Path) -> None:  # noqa: B027 - most outputs have none
        """What is made when all weights are there; small texts by `add_text`."""

    def __enter__(self: Self) -> Self:
        try:
            require_space(self._staged.target, self._size)
            self._rooms.update(self.create_files(self._staged.path, self._opened))
            self._left = {key: room.size for key, room in self._rooms.items() if room.size}
        except BaseException as error:
            self._release()
            self._staged.__exit__(type(error), error, None)
            raise
        return self

    def write_bytes(self, key: Hashable, begin: int, raw: memoryview) -> None:
        """Writes bytes of a planned tensor, from byte `begin` of it on."""
        room = self._rooms[key]
        with write_errors(self._staged.target):
            room.file.write(room.name, begin, raw)
        self._flusher.wrote(room.file.path, len(raw))
        left = self._left.get(key, 0) - len(raw)
        if left < 0:
            raise ValueError(f"{-left} bytes too many for {room.name}")
        if left:
            self._left[key] = left
        else:
            self._left.pop(key, None)

    def add_json(self, name: str, content: Mapping[str, Any]) -> None:
        """Adds a small JSON file, such as quantize_config.json."""
        self.add_text(name, json.dumps(content, indent=2, ensure_ascii=False) + "\n")

    def add_text(self, name: str, text: str) -> None:
        """Adds a small text file."""
        self._texts[name] = text

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            if error is None:
                self._finish()
        finally:
            self._release()
            self._staged.__exit__(kind, error, trace)

    def _release(self) -> None:
        self._flusher.close()
        self._opened.close()

    def _finish(self) -> None:
        if self._left:
            raise RuntimeError(f"planned but not written: {sorted(map(str, self._left))[:3]}")
        directory, target = self._staged.path, self._staged.target
        copy_sidecars(self._sidecars, directory, target)
        with write_errors(target):
            for file in {id(room.file): room.file for room in self._rooms.values()}.values():
                file.close()
            for name, text in self._texts.items():
                (directory / name).write_text(text, encoding="utf-8")
            self._flusher.finish()
        self.last_files(directory)
        figures = {**carried_figures(self._sources), **self.figures}
        manifest = Manifest(self._recipe(), record_files(directory), figures)
        with write_errors(target):
            (directory / MANIFEST_FILE).write_text(manifest.to_json(), encoding="utf-8")
        self._staged.commit()
