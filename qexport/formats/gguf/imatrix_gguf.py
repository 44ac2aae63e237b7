"""The GGUF form of an importance matrix: `NAME.in_sum2` and `NAME.counts` for each entry (see imatrix.py)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from qexport.checkpoint.safetensors_file import read_tensor
from qexport.errors import CorruptFileError
from qexport.formats.gguf.container import Header, PlannedTensor, array, read_header, text, u32
from qexport.formats.gguf.whole_file import write_plain
from qexport.grids.ggml.types import TYPES

_TYPE = "general.type"
_DATASETS, _COUNT, _SIZE = "imatrix.datasets", "imatrix.chunk_count", "imatrix.chunk_size"
_SUMS, _COUNTS = ".in_sum2", ".counts"


@dataclass(frozen=True)
class StoredEntries:
    """Sums and counts, fp32, by tensor, as they stand in the file."""

    tensors: Mapping[str, tuple[torch.Tensor, torch.Tensor]]
    datasets: tuple[str, ...]
    chunk_count: int
    chunk_size: int


def read_entries(path: Path) -> StoredEntries:
    """All entries. Tensors of other suffixes (`in_sum`, of newer files) are passed over.

    Raises CorruptFileError for a file that is cut short, or no importance matrix.
    """
    header = read_header(path)
    settings = header.plain()
    if settings.get(_TYPE, "imatrix") != "imatrix" or not any(
        name.endswith(_SUMS) for name in header.tensors
    ):
        raise _corrupt(path, f"its {_TYPE} is {settings.get(_TYPE)!r}, and no tensor is called *{_SUMS}")
    names = {
        name.removesuffix(suffix)
        for suffix in (_SUMS, _COUNTS)
        for name in header.tensors
        if name.endswith(suffix)
    }
    tensors = {name: (_read(header, name + _SUMS), _read(header, name + _COUNTS)) for name in sorted(names)}
    datasets = settings.get(_DATASETS, [])
    if not isinstance(datasets, list) or not all(isinstance(name, str) for name in datasets):
        raise _corrupt(path, f"its {_DATASETS} are no names")
    return StoredEntries(
        tensors, tuple(datasets), _number(path, settings, _COUNT), _number(path, settings, _SIZE)
    )


def _read(header: Header, name: str) -> torch.Tensor:
    stored = header.tensors.get(name)
    if stored is None:
        raise _corrupt(header.path, f"it has no {name}")
    if stored.type.name != "f32" or not stored.numel:
        raise _corrupt(header.path, f"{name} is {list(stored.shape)} of {stored.type.name}, expected f32")
    return read_tensor(stored.as_stored())


def _number(path: Path, settings: Mapping[str, Any], key: str) -> int:
    value = settings.get(key, 0)
    if not isinstance(value, int) or value < 0:
        raise _corrupt(path, f"its {key} is {str(value)[:80]!r}")
    return value


def _corrupt(path: Path, found: str) -> CorruptFileError:
    return CorruptFileError(f"{path} is no importance matrix: {found}", remedy="download or gather it again")


def write_entries(
    path: Path,
    tensors: Mapping[str, tuple[torch.Tensor, torch.Tensor]],
    datasets: Sequence[str],
    chunk_count: int,
    chunk_size: int,
) -> None:
    """Writes sums [in] or [experts, in] and counts [1] or [experts], fp32; all three settings, as
    llama-quantize asks for them."""
    metadata = {
        _TYPE: text("imatrix"),
        _DATASETS: array("str", datasets),
        _COUNT: u32(chunk_count),
        _SIZE: u32(chunk_size),
    }
    planned: list[PlannedTensor] = []
    values: list[torch.Tensor] = []
    for name, (sums, counts) in tensors.items():
        column = counts.reshape(-1, 1) if sums.dim() > 1 else counts  # ggml's [1, experts]
        for suffix, value in ((_SUMS, sums), (_COUNTS, column)):
            planned.append(PlannedTensor(name + suffix, TYPES["f32"], tuple(value.shape)))
            values.append(value.float())
    write_plain(path, metadata, planned, values)
