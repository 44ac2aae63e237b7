"""A model in several GGUF files, NAME-00001-of-00003.gguf, as llama.cpp's gguf-split writes and loads them.

Every file tells its number from 0, their count and the count of all tensors; the settings stand in the
first. Source: llama.cpp, tools/gguf-split/gguf-split.cpp and src/llama-model-loader.cpp.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from qexport.checkpoint.disk import is_file
from qexport.errors import CorruptFileError, SpecError
from qexport.formats.gguf.container import (
    ALIGNMENT,
    Header,
    Metadata,
    PlannedTensor,
    Typed,
    padded,
    read_header,
)

SUFFIX = ".gguf"
_NUMBER, _COUNT, _TENSORS = "split.no", "split.count", "split.tensors.count"
_NAME = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf", re.DOTALL)
_MAX_FILES = 65_535  # number and count have 16 bits


@dataclass(frozen=True)
class SplitFile:
    """One file of a model: its name, its settings, and the tensors in it, in order."""

    name: str
    metadata: Metadata
    tensors: tuple[PlannedTensor, ...]

    @property
    def size(self) -> int:
        """Bytes of the tensors with their padding; the header comes on top."""
        return sum(padded(tensor.size, ALIGNMENT) for tensor in self.tensors)


def plan_split(
    stem: str, metadata: Metadata, tensors: Sequence[PlannedTensor], max_size: int | None = None
) -> tuple[SplitFile, ...]:
    """Fills files in order, none with more than `max_size` bytes of tensors; None is one file.

    A tensor larger than that gets a file of its own, where gguf-split would give up. One file is STEM.gguf.
    Raises SpecError for more files than can be numbered.
    """
    groups: list[list[PlannedTensor]] = [[]]
    held = 0
    for tensor in tensors:
        size = padded(tensor.size, ALIGNMENT)
        if max_size is not None and groups[-1] and held + size > max_size:
            groups.append([])
            held = 0
        groups[-1].append(tensor)
        held += size
    count = len(groups)
    if count == 1:
        return (SplitFile(f"{stem}{SUFFIX}", dict(metadata), tuple(tensors)),)
    if count > _MAX_FILES:
        raise SpecError(
            f"files of {max_size} bytes would be {count}",
            expected=f"at most {_MAX_FILES} GGUF files of a model",
        )
    return tuple(
        SplitFile(
            _file_name(stem, number, count),
            {**(metadata if number == 0 else {}), **_settings(number, count, len(tensors))},
            tuple(group),
        )
        for number, group in enumerate(groups)
    )


def _file_name(stem: str, number: int, count: int) -> str:
    return f"{stem}-{number + 1:05d}-of-{count:05d}{SUFFIX}"


def _settings(number: int, count: int, tensors: int) -> Metadata:
    return {_NUMBER: Typed("u16", number), _COUNT: Typed("u16", count), _TENSORS: Typed("i32", tensors)}


def first_of_split(path: Path) -> Path:
    """The first file of the split that a name belongs to; the file itself when its name is that of none."""
    named = _NAME.fullmatch(path.name)
    return path.with_name(_file_name(named["stem"], 0, int(named["count"]))) if named else path


def read_model(path: Path) -> Header:
    """The header of a GGUF model, whichever of its files `path` is; headers only are read.

    Raises CorruptFileError for what is not whole: a file of a split that is not there, has another's name, or
    belongs to another model.
    """
    given = read_header(path)
    count = _whole(given, _COUNT, 1)
    if count <= 1:
        return given
    named = _NAME.fullmatch(path.name)
    number = _whole(given, _NUMBER, -1)
    if not named or (int(named["number"]) - 1, int(named["count"])) != (number, count):
        raise CorruptFileError(
            f"{path} is file {number + 1} of {count} of a split model",
            expected=f"the name {_file_name('NAME', number, count)}",
            remedy="give it the name back that it had when the model was split",
        )
    parts = list(_parts(path, named["stem"], count, given))
    tensors = {name: tensor for part in parts for name, tensor in part.tensors.items()}
    held = sum(len(part.tensors) for part in parts)
    if len(tensors) != held:
        raise CorruptFileError(f"{path} and the files beside it hold a tensor twice")
    if (told := _whole(parts[0], _TENSORS, held)) != held:
        raise CorruptFileError(
            f"{path} and the files beside it hold {held} tensors, the first says {told}",
            remedy="download them again",
        )
    metadata = {key: typed for key, typed in parts[0].metadata.items() if not key.startswith("split.")}
    return replace(parts[0], metadata=metadata, tensors=tensors, files=tuple(part.path for part in parts))


def _parts(path: Path, stem: str, count: int, given: Header) -> Iterator[Header]:
    files = [path.with_name(_file_name(stem, number, count)) for number in range(count)]
    missing = [file.name for file in files if not is_file(file)]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise CorruptFileError(
            f"{path} is one of {count} files of a model, and {missing[0]}{more} is not beside it",
            remedy="download all of them into one directory",
        )
    for number, file in enumerate(files):
        part = given if file == path else read_header(file)
        if (_whole(part, _NUMBER, -1), _whole(part, _COUNT, 1)) != (number, count):
            raise CorruptFileError(
                f"{file} says that it is file {_whole(part, _NUMBER, -1) + 1} of {_whole(part, _COUNT, 1)}",
                expected=f"file {number + 1} of {count}, as its name has it",
                remedy="download it again",
            )
        yield part


def _whole(header: Header, key: str, missing: int) -> int:
    """A setting that should be a whole number; one that is something else counts as -1."""
    value = header.metadata[key].value if key in header.metadata else missing
    return value if isinstance(value, int) and not isinstance(value, bool) else -1
