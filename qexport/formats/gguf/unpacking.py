"""A GGUF model as a directory that everything takes for a model's: config.json, the tokenizer's files, and
links to the GGUF files. It lies in a private temporary directory of this process, which its end removes."""

from __future__ import annotations

import atexit
import json
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from qexport.checkpoint.checkpoint import CONFIG_FILE, Checkpoint, read_json
from qexport.checkpoint.disk import is_file, write_errors
from qexport.checkpoint.gguf_files import gguf_files
from qexport.checkpoint.sidecars import sidecar_files
from qexport.checkpoint.ties import tie_of
from qexport.errors import (
    CorruptFileError,
    NotACheckpointError,
    QexportError,
    first_of,
)
from qexport.formats.gguf.container import Header
from qexport.formats.gguf.reading import GgufDecoder, places, read_config, require_model, settings_of
from qexport.formats.gguf.splitting import first_of_split, read_model
from qexport.formats.gguf.tokenizer.files import tokenizer_files

_LICENCES = ("LICENSE", "LICENCE", "NOTICE", "COPYING", "USE_POLICY")
_GENERATION_FILE = "generation_config.json"
_TOKENIZER_FILES = ("tokenizer", "special_tokens_map", "added_tokens", "vocab", "merges", "chat_template")
_BEGIN, _PADDING = "bos_token_id", "padding_token_id"
_ENDS = ("eos_token_id", "eot_token_id", "eom_token_id")  # llama.cpp ends an answer at any of them
_State = tuple[tuple[str, int, int], ...]
_made: dict[_State, Path] = {}


def unpack(source: Path) -> Path:
    """The directory that stands for a GGUF file, any of a split model's, or for the one model in a directory.

    The same one as long as the files do not change. Raises CorruptFileError for what is not whole,
    NotACheckpointError for what is no language model or for several in a directory, UnsupportedModelError for
    an architecture that is not known, StorageError.
    """
    header = _model_in(source) if source.is_dir() else _opened(source)
    state = tuple(
        (str(file.absolute()), file.stat().st_size, file.stat().st_mtime_ns) for file in header.files
    )
    found = _made.get(state)
    if found is None or not found.is_dir():
        found = _made[state] = _unpacked(header)
    return found


def open_unpacked(directory: Path) -> Checkpoint:
    """The checkpoint of a directory that `unpack` made."""
    files = gguf_files(directory)
    header = read_model(files[0])
    origins = places(header)
    config = read_json(directory / CONFIG_FILE)
    stored = {name: tensor.as_stored() for name, tensor in header.tensors.items()}
    decoder = GgufDecoder(header.tensors, origins)
    return Checkpoint(directory, config, stored, tie_of(config, origins), decoder=decoder)


def _opened(file: Path) -> Header:
    header = read_model(file)
    require_model(header)
    return header


def _model_in(directory: Path) -> Header:
    """The one model among the GGUF files of a directory; projectors and adapters are passed over."""
    models: list[Header] = []
    refusals: list[QexportError] = []
    for file in sorted({first_of_split(file) for file in gguf_files(directory)}):
        try:
            models.append(_opened(file if is_file(file) else _any_of(directory, file)))
        except NotACheckpointError as error:
            refusals.append(error)
    if len(models) == 1:
        return models[0]
    if not models:
        raise refusals[0]
    raise NotACheckpointError(
        f"{directory} holds {len(models)} models: {first_of([model.path.name for model in models])}",
        expected="one model",
        remedy=f"name its file, such as {models[0].path}",
    )


def _any_of(directory: Path, first: Path) -> Path:
    """A file of a split whose first one is missing: reading it tells so."""
    return next(file for file in gguf_files(directory) if first_of_split(file) == first)


def _unpacked(header: Header) -> Path:
    origins = places(header)
    config = read_config(header)
    settings = header.plain()
    files: dict[str, str | Path] = {
        CONFIG_FILE: _json(config),
        **_beside(header, _LICENCES),
        **_tokenizer(header),
    }
    if generation := _generation(settings):
        files.setdefault(_GENERATION_FILE, _json(generation))
    if not origins:
        raise CorruptFileError(f"{header.path} holds none of the tensors of its model")
    with write_errors(Path(tempfile.gettempdir())):
        directory = Path(tempfile.mkdtemp(dir=_room())) / _as_text(header.path)
        directory.mkdir()
        for name, content in files.items():
            if isinstance(content, Path):
                (directory / name).symlink_to(content)
            else:
                (directory / name).write_bytes(
                    content.encode("utf-8") if isinstance(content, str) else content
                )
        for file, name in zip(header.files, _link_names(header.files), strict=True):
            (directory / name).symlink_to(file.absolute())
    return directory


def _link_names(files: Sequence[Path]) -> list[str]:
    """Their own names; a file alone, which may have any, gets the suffix."""
    if len(files) == 1 and files[0].suffix != ".gguf":
        return [f"{_as_text(files[0])}.gguf"]
    return [_as_text(file) for file in files]


def _as_text(file: Path) -> str:
    """A file's name; tokenizers and hashes take no bytes that are not UTF-8."""
    return os.fsencode(file.name).decode("utf-8", "replace")


def _tokenizer(header: Header) -> Mapping[str, str | Path]:
    """The tokenizer's files, made of the settings; those beside the model where that cannot be done."""
    with settings_of(header):
        made = tokenizer_files(header.metadata)
    if made:
        return made
    return _beside(header, _TOKENIZER_FILES)


def _beside(header: Header, beginnings: tuple[str, ...]) -> dict[str, Path]:
    """The sidecar files in the model's own directory whose names begin so."""
    directory = header.path.parent.absolute()
    return {
        str(file): directory / file
        for file in sidecar_files(directory)
        if file.name.startswith(beginnings) and len(file.parts) == 1
    }


def _generation(settings: Mapping[str, Any]) -> dict[str, Any]:
    """generation_config.json: which tokens begin and end an answer, and which pad it."""
    ids = {key: settings.get(f"tokenizer.ggml.{key}") for key in (_BEGIN, *_ENDS, _PADDING)}
    known = {key: value for key, value in ids.items() if type(value) is int}
    found: dict[str, Any] = {_BEGIN: known[_BEGIN]} if _BEGIN in known else {}
    if ends := list(dict.fromkeys(known[key] for key in _ENDS if key in known)):
        found["eos_token_id"] = ends if len(ends) > 1 else ends[0]
    if _PADDING in known:
        found["pad_token_id"] = known[_PADDING]
    return found


def _json(content: Mapping[str, Any]) -> str:
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"


@cache
def _room() -> Path:
    """The directory that holds all of this process's."""
    room, owner = Path(tempfile.mkdtemp(prefix="qexport-gguf-")).resolve(), os.getpid()

    def remove() -> None:
        if os.getpid() == owner:  # not a fork's end
            shutil.rmtree(room, ignore_errors=True)

    atexit.register(remove)
    return room
