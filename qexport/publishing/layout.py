"""Where in a repository the files of an output go: one revision each, or all variants in one tree."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from qexport.errors import SpecError
from qexport.publishing.cleaning import cleaned, first_told, may_tell_paths

_SHARD = re.compile(r"-\d{5}-of-\d{5}$")


@dataclass(frozen=True)
class Item:
    """One file: its path in the repository, where it lies, its size in bytes.

    `content` goes in the place of what lies there, where there is one.
    """

    path_in_repo: str
    path: Path
    size: int
    content: bytes | None = None


@dataclass(frozen=True)
class Upload:
    """One commit: the files, and the branch (None: the repository's main) that they go to."""

    revision: str | None
    items: tuple[Item, ...]
    what: str

    @property
    def size_bytes(self) -> int:
        """Bytes of all files."""
        return sum(item.size for item in self.items)


@dataclass(frozen=True)
class Plan:
    """What a push would send, and what the user should know of it."""

    uploads: tuple[Upload, ...]
    notes: tuple[str, ...] = ()

    @property
    def size_bytes(self) -> int:
        """Bytes of all uploads."""
        return sum(upload.size_bytes for upload in self.uploads)


@dataclass
class Part:
    """The files of one output, or those beside the variants, as they lie.

    `files` are relative to `directory`; `local` are this machine's paths that do not go along, and what is
    told in their place: see `cleaning`.
    """

    name: str
    directory: Path
    files: list[Path] = field(default_factory=list)
    local: Mapping[str, str] = field(default_factory=dict)

    def items(self, prefix: str = "") -> list[Item]:
        """Each file under `prefix`."""
        return [self.item(file, f"{prefix}{file.as_posix()}") for file in self.files]

    def item(self, file: Path, path_in_repo: str) -> Item:
        """One file under another path."""
        path = self.directory / file
        content = cleaned(path, file.as_posix(), self.local)
        return Item(path_in_repo, path, path.stat().st_size if content is None else len(content), content)


def told_place(item: Item, places: Iterable[Path]) -> Path | None:
    """The first of the `places` on this machine that a text tells, as it would go."""
    if not may_tell_paths(item.path_in_repo, item.size):
        return None
    return first_told(item.path.read_bytes() if item.content is None else item.content, places)


def side_by_side(parts: Sequence[Part]) -> list[Item]:
    """All variants in one tree: subfolders, but GGUF files and their Modelfiles at the root.

    A Modelfile names its GGUF as lying beside it. Where two variants have a GGUF file of the same name,
    theirs stay in their subfolders; a plain `Modelfile` gets the GGUF's name when there are several.
    """
    owners: dict[str, set[str]] = {}
    for part in parts:
        for file in part.files:
            if file.suffix == ".gguf":
                owners.setdefault(file.name.lower(), set()).add(part.name)
    several = len({name for names in owners.values() for name in names}) > 1
    items: list[Item] = []
    for part in parts:
        ggufs = [file for file in part.files if file.suffix == ".gguf" and len(file.parts) == 1]
        alone = all(len(owners[file.name.lower()]) == 1 for file in ggufs)
        for file in part.files:
            path = f"{part.name}/{file.as_posix()}"
            if ggufs and alone and file in ggufs:
                path = file.name
            elif ggufs and alone and len(file.parts) == 1 and file.name.startswith("Modelfile"):
                stem = _SHARD.sub("", ggufs[0].stem)
                path = f"Modelfile.{stem}" if several and file.name == "Modelfile" else file.name
            items.append(part.item(file, path))
    return items


def refuse_twins(items: Sequence[Item]) -> None:
    """Raises SpecError when two files would have the same path."""
    held: dict[str, Path] = {}
    for item in items:
        other = held.setdefault(item.path_in_repo, item.path)
        if other != item.path:
            raise SpecError(
                f"{other} and {item.path} would both be {item.path_in_repo} in the repository",
                remedy="rename one, leave one out with --exclude, or take --layout branches",
            )
