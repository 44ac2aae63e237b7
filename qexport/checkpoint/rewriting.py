"""Rewrites a directory's safetensors files with other names, and tensors stacked, one tensor at a time."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from qexport.checkpoint.checkpoint import read_json
from qexport.checkpoint.disk import is_file, write_errors
from qexport.checkpoint.safetensors_file import StoredTensor, byte_view, header_bytes, iter_values
from qexport.checkpoint.sharding import INDEX_FILE
from qexport.checkpoint.tensors import TensorInfo


@dataclass(frozen=True)
class Made:
    """A tensor of the new files: the bytes of `sources`, one behind the other."""

    info: TensorInfo
    sources: tuple[StoredTensor, ...]


def rewrite(directory: Path, tensors: Sequence[Made]) -> None:
    """Replaces the files that the sources lie in by files that hold just `tensors`, and their index.

    A tensor goes to the first of its sources' files, so a file's old bytes are given up as soon as its new
    ones are written. A file that no tensor is left for is removed.
    """
    files = sorted({source.file for tensor in tensors for source in tensor.sources})
    held: dict[Path, list[Made]] = {file: [] for file in files}
    for tensor in tensors:
        held[min(source.file for source in tensor.sources)].append(tensor)
    with write_errors(directory):
        for file, own in held.items():
            if own:
                _write(file, own)
            else:
                file.unlink()
        if is_file(directory / INDEX_FILE):
            _write_index(directory / INDEX_FILE, held)


def _write(file: Path, tensors: Sequence[Made]) -> None:
    part = file.with_name(f"{file.name}.part")
    with part.open("wb") as out:
        out.write(header_bytes([tensor.info for tensor in tensors]))
        for tensor in tensors:
            for source in tensor.sources:
                for values in iter_values(source):
                    out.write(byte_view(values))
    part.replace(file)


def _write_index(path: Path, held: Mapping[Path, Sequence[Made]]) -> None:
    index = read_json(path)
    index["weight_map"] = {tensor.info.name: file.name for file, own in held.items() for tensor in own}
    path.write_text(json.dumps(index, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
