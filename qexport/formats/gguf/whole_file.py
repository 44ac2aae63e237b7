"""One small GGUF file (no model), written whole or not at all: it gets its name with its last byte."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch

from qexport.checkpoint.safetensors_file import byte_view
from qexport.checkpoint.staging import whole_file
from qexport.formats.gguf.container import ALIGNMENT, PLAIN, PlannedTensor, Typed
from qexport.formats.gguf.writing import header_bytes

__all__ = ["whole_file", "write_plain"]


def write_plain(
    path: Path,
    metadata: Mapping[str, Typed],
    tensors: Sequence[PlannedTensor],
    values: Iterable[torch.Tensor],
) -> int:
    """Writes a GGUF file whose tensors are plain (f32, f16, bf16), whole or not at all; its bytes.

    `values` come in the order of `tensors`, one at a time, each in the planned dtype and shape. Raises
    ValueError when they do not, StorageError.
    """
    with whole_file(path) as file:
        file.write(header_bytes(metadata, tensors))
        for planned, given in zip(tensors, values, strict=True):
            if (given.dtype, tuple(given.shape)) != (PLAIN[planned.type.name], planned.shape):
                raise ValueError(
                    f"{planned.name} is {given.dtype} {tuple(given.shape)}, planned was {planned}"
                )
            file.write(byte_view(given.contiguous()))
            file.write(bytes(-planned.size % ALIGNMENT))
        return file.tell()
