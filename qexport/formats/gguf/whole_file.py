"""One small GGUF file (no model), written whole or not at all: it gets its name with its last byte."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO

import torch

from qexport.checkpoint.disk import write_errors
from qexport.checkpoint.safetensors_file import byte_view
from qexport.formats.gguf.container import ALIGNMENT, PLAIN, PlannedTensor, Typed
from qexport.formats.gguf.writing import header_bytes


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """A file to write to, beside `path`; it takes that name, and the place of what is there, at the end.

    An error within leaves what was there. Raises StorageError.
    """
    with write_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        made = Path(name)
        try:
            with os.fdopen(descriptor, "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            made.chmod(0o666 & ~_umask())  # mkstemp's are private
            made.replace(path)
        except BaseException:
            made.unlink(missing_ok=True)
            raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


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
