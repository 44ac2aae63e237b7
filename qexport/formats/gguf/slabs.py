"""A file's tensors in slabs of rows: planned from shapes alone, read one at a time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from qexport.checkpoint.checkpoint import Checkpoint
from qexport.formats.gguf.tensors import GgufTensor, Part

VALUES = 1 << 20  # of a slab: 4 MiB in fp32


@dataclass(frozen=True)
class Slab:
    """Rows `begin` to `end` of a tensor in the file, its experts one below the other; all of one part.

    A vector is one row.
    """

    tensor: GgufTensor
    part: Part
    begin: int
    end: int

    @property
    def width(self) -> int:
        """Values a row."""
        return self.tensor.shape[-1]

    @property
    def size(self) -> int:
        """Bytes in fp32."""
        return 4 * (self.end - self.begin) * self.width


def slabs_of(tensor: GgufTensor, values: int = VALUES) -> Iterator[Slab]:
    """The tensor in slabs of at most about `values` values, in the file's order."""
    rows = tensor.shape[-2] if len(tensor.shape) > 1 else 1
    step = max(1, values // max(1, tensor.shape[-1]))
    for part in tensor.parts:
        first = (part.expert or 0) * rows
        for begin in range(0, rows, step):
            yield Slab(tensor, part, first + begin, first + min(begin + step, rows))


class SlabReader:
    """Reads slabs of a checkpoint, best in their order.

    Only a slab's own rows are read where they lie together on disk. Else the matrix that they are of is, and
    is held until one of another comes: where a file's rows are in another order, or codes have to be decoded.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        self._held: tuple[tuple[str, int | None], torch.Tensor] | None = None

    def read(self, slab: Slab) -> torch.Tensor:
        """The values fp32 [rows, width] as they go into the file."""
        tensor, part = slab.tensor, slab.part
        rows = tensor.shape[-2] if len(tensor.shape) > 1 else 1
        first = (part.expert or 0) * rows
        begin, end = slab.begin - first, slab.end - first
        together = len(tensor.shape) > 1 and not tensor.order and not tensor.transposed
        if together and part.source_expert is None and self._checkpoint.reads_rows:
            offset = part.rows.start if part.rows else 0
            values = self._checkpoint.read_rows(part.name, offset + begin, offset + end)
        else:
            matrix = self._matrix(part)
            matrix = matrix.t() if tensor.transposed else matrix
            order = tensor.row_order()
            if order is not None:
                values = matrix[order] if matrix.dim() == 1 else matrix[order[begin:end]]
            else:
                values = matrix if matrix.dim() == 1 else matrix[begin:end]
        values = values.to(torch.float32).reshape(-1, slab.width).contiguous()
        return values + 1 if tensor.plus_one else values

    def _matrix(self, part: Part) -> torch.Tensor:
        """What a part takes, as it lies on disk."""
        key = (part.name, part.source_expert)
        if self._held is None or self._held[0] != key:
            self._held = None  # free before the next is read
            self._held = (key, self._read(part))
        matrix = self._held[1]
        return matrix if part.rows is None else matrix[part.rows]

    def _read(self, part: Part) -> torch.Tensor:
        if part.source_expert is None:
            return self._checkpoint.read(part.name)
        return self._checkpoint.read_rows(part.name, part.source_expert, part.source_expert + 1)[0]


def read_tensor(tensor: GgufTensor, checkpoint: Checkpoint) -> torch.Tensor:
    """The tensor in fp32, of its shape, as it goes into the file."""
    reader = SlabReader(checkpoint)
    return torch.cat([reader.read(slab) for slab in slabs_of(tensor)]).reshape(tensor.shape)
