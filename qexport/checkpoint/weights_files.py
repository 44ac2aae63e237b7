"""The files that a checkpoint's weights are written to, piece by piece, each hashed on its way.

A file's bytes are handed to the disk while the next ones are made, so that the last flush is short.
"""

from __future__ import annotations

import os
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Protocol

from qexport.checkpoint.hashing import PassingHash
from qexport.checkpoint.safetensors_file import header_bytes
from qexport.checkpoint.sharding import Shard
from qexport.checkpoint.torch_file import TorchFile

_FLUSH_EVERY = 1 << 29
# As cp does. Linux takes the page cache for a large write in large blocks, and in a virtual machine those are
# the ones that the host has to find memory for first: 2 MiB at once took twice as long.
_WRITE_BYTES = 1 << 17


class WeightsFile(Protocol):
    """One file of weights that is being written."""

    path: Path

    def write(self, name: str, begin: int, piece: memoryview) -> None:
        """`piece` stands at byte `begin` of the tensor `name`."""

    def close(self) -> None:
        """All has been written."""


class LastOpened:
    """The file that was written to last, kept open, and the thread that hashes what is written.

    One at a time: shards may be more than a process may have open files. Not opened anew for each piece:
    ext4 gives up the space that it set aside for a file when its last writer closes it.
    """

    def __init__(self) -> None:
        self._path: Path | None = None
        self._descriptor = -1
        self.hasher = ThreadPoolExecutor(1)

    def descriptor(self, path: Path) -> int:
        """The open file at `path`, for writing."""
        if path != self._path:
            self._close_file()
            self._descriptor = os.open(path, os.O_WRONLY)
            self._path = path
        return self._descriptor

    def close(self) -> None:
        """Nothing is open any more."""
        self.hasher.shutdown()
        self._close_file()

    def _close_file(self) -> None:
        if self._path is not None:
            os.close(self._descriptor)
            self._path = None


class HashedFile:
    """A file that begins with `header` and takes its other bytes in any order, hashed as they pass."""

    def __init__(self, path: Path, header: bytes, opened: LastOpened) -> None:
        self.path, self._opened = path, opened
        path.write_bytes(header)
        self._hash = PassingHash(path)
        self._hash.add(0, header)

    def put(self, offset: int, piece: memoryview) -> None:
        """`piece` stands at byte `offset`."""
        hashed = self._opened.hasher.submit(self._hash.add, offset, piece)  # both at once
        descriptor = self._opened.descriptor(self.path)
        done = 0
        while done < len(piece):
            done += os.pwrite(descriptor, piece[done : done + _WRITE_BYTES], offset + done)
        hashed.result()

    def close(self) -> None:
        """See `WeightsFile`."""
        self._hash.remember()


class SafetensorsFile(HashedFile):
    """A safetensors file: every tensor's place is known from the start, so pieces may come in any order."""

    def __init__(self, path: Path, shard: Shard, opened: LastOpened) -> None:
        header = header_bytes(shard.tensors)
        super().__init__(path, header, opened)
        self._places: dict[str, int] = {}
        offset = len(header)
        for tensor in shard.tensors:
            self._places[tensor.name] = offset
            offset += tensor.size

    def write(self, name: str, begin: int, piece: memoryview) -> None:
        """See `WeightsFile`."""
        self.put(self._places[name] + begin, piece)


class PytorchFile:
    """PyTorch's own zip file: tensors come in the planned order, front to back."""

    def __init__(self, path: Path, shard: Shard) -> None:
        self.path = path
        self._file = TorchFile(path, shard.tensors)

    def write(self, name: str, begin: int, piece: memoryview) -> None:
        """See `WeightsFile`."""
        self._file.write(piece)

    def close(self) -> None:
        """See `WeightsFile`."""
        self._file.close()


def create(path: Path, shard: Shard, opened: LastOpened) -> WeightsFile:
    """The file of a shard, in the form that its name tells. Raises OSError."""
    return PytorchFile(path, shard) if path.suffix == ".bin" else SafetensorsFile(path, shard, opened)


class Flusher:
    """Hands files to the disk in the background; `finish` waits and raises what went wrong."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1)
        self._written: dict[Path, int] = {}
        self._pending: list[Future[None]] = []

    def wrote(self, path: Path, size: int) -> None:
        """`size` more bytes of a file were written."""
        self._written[path] = self._written.get(path, 0) + size
        if self._written[path] >= _FLUSH_EVERY:
            self._written[path] = 0
            self._pending.append(self._pool.submit(_flush, path))

    def finish(self) -> None:
        """Every file that was written is on the disk. Raises OSError."""
        for path in self._written:
            self._pending.append(self._pool.submit(_flush, path))
        for future in self._pending:
            future.result()

    def close(self) -> None:
        """No more; what has not begun is not done."""
        self._pool.shutdown(cancel_futures=True)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
