"""Where the values of an output tensor come from, row by row, before any adapter changes them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch

from qexport.checkpoint.checkpoint import Checkpoint
from qexport.checkpoint.hashing import PassingHash
from qexport.checkpoint.safetensors_file import StoredTensor, byte_view, read_into, read_rows, read_tensor

_CHUNK_ROWS = 4096


class Source(Protocol):
    """Rows of a tensor along its first side."""

    @property
    def dtype(self) -> torch.dtype:
        """What it is stored in, or will be written in where it is decoded."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Its sides."""

    @property
    def whole(self) -> bool:
        """Whether rows can be had at the cost of all of them only."""

    def rows(self, begin: int, end: int) -> torch.Tensor:
        """Rows in memory of their own, dtype as told, or fp32 where it was decoded."""

    def silent_rows(self, begin: int, end: int) -> torch.Tensor:
        """The same, out of turn: nobody who listens to the bytes hears of it."""


@dataclass(frozen=True)
class StoredSource:
    """A tensor as it lies in a file; `passing` hears of its bytes."""

    tensor: StoredTensor
    passing: PassingHash | None = None
    whole = False

    @property
    def dtype(self) -> torch.dtype:
        """See `Source`."""
        return self.tensor.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """See `Source`."""
        return self.tensor.shape

    def rows(self, begin: int, end: int) -> torch.Tensor:
        """See `Source`."""
        values = self.silent_rows(begin, end)
        self._tell(begin, values)
        return values

    def rows_in(self, buffer: torch.Tensor, begin: int, end: int) -> torch.Tensor:
        """The same in the memory of `buffer`, uint8 and large enough."""
        width = self.tensor.size // max(self.tensor.shape[0], 1)
        memory = buffer[: (end - begin) * width]
        read_into(self.tensor, byte_view(memory), begin * width)
        values = memory.view(self.tensor.dtype).view(end - begin, *self.tensor.shape[1:])
        self._tell(begin, values)
        return values

    def _tell(self, begin: int, values: torch.Tensor) -> None:
        if self.passing:
            width = self.tensor.size // max(self.tensor.shape[0], 1) if self.tensor.shape else 0
            self.passing.add(self.tensor.offset + begin * width, byte_view(values))

    def silent_rows(self, begin: int, end: int) -> torch.Tensor:
        """See `Source`."""
        return read_rows(self.tensor, begin, end) if self.tensor.shape else read_tensor(self.tensor)


@dataclass(frozen=True)
class DecodedSource:
    """A quantized tensor, decoded; `dtype` is the one it will be written in."""

    checkpoint: Checkpoint
    name: str
    dtype: torch.dtype
    whole = True

    @property
    def shape(self) -> tuple[int, ...]:
        """See `Source`."""
        return self.checkpoint.info(self.name).shape

    def rows(self, begin: int, end: int) -> torch.Tensor:
        """See `Source`."""
        return self.checkpoint.read(self.name)[begin:end]

    def silent_rows(self, begin: int, end: int) -> torch.Tensor:
        """See `Source`."""
        return self.rows(begin, end)


@dataclass(frozen=True)
class ResizedSource:
    """A vocabulary with fewer rows, or with new ones, each of them the mean of the old.

    The mean is what transformers' resize_token_embeddings draws around (Hewitt 2021, "Initializing new
    word embeddings"): a new token is then no likelier than the average one.
    """

    inner: Source
    count: int

    @property
    def dtype(self) -> torch.dtype:
        """See `Source`."""
        return self.inner.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """See `Source`."""
        return (self.count, *self.inner.shape[1:])

    @property
    def whole(self) -> bool:
        """See `Source`."""
        return self.inner.whole

    @cached_property
    def _mean(self) -> torch.Tensor:
        total = torch.zeros(self.inner.shape[1:], dtype=torch.float64)
        rows = self.inner.shape[0]
        step = rows if self.inner.whole else _CHUNK_ROWS
        for begin in range(0, rows, step):
            total += self.inner.silent_rows(begin, min(begin + step, rows)).double().sum(dim=0)
        return total / rows

    def rows(self, begin: int, end: int) -> torch.Tensor:
        """See `Source`."""
        old = min(end, self.inner.shape[0])
        return self._grown(self.inner.rows(begin, old) if begin < old else None, begin, end)

    def silent_rows(self, begin: int, end: int) -> torch.Tensor:
        """See `Source`."""
        old = min(end, self.inner.shape[0])
        return self._grown(self.inner.silent_rows(begin, old) if begin < old else None, begin, end)

    def _grown(self, kept: torch.Tensor | None, begin: int, end: int) -> torch.Tensor:
        if kept is not None and len(kept) == end - begin:
            return kept
        dtype = self.dtype if kept is None else kept.dtype
        missing = end - begin - (0 if kept is None else len(kept))
        added = self._mean.to(dtype).expand(missing, *self.inner.shape[1:])
        return added.clone() if kept is None else torch.cat([kept, added])
