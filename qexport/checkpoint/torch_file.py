"""One PyTorch file (.bin), written in pieces: what `torch.save` makes of a dict of names and tensors.

`torch.save` wants every tensor in memory at once, and torch's own zip writer wants each one whole. Here sizes
are enough to plan the file, and the tensors' bytes follow in pieces. Files are written only, never read: a
pickle can run code.

Layout: a zip archive without compression, of the records

    archive/data.pkl            the dict, pickled; a tensor's bytes stand in it as a persistent id
                                ("storage", type, key, "cpu", number of values)
    archive/.format_version     "1": the storages follow in the order of their keys
    archive/.storage_alignment  "64"
    archive/byteorder           "little"
    archive/data/0, data/1 ...  each storage's bytes
    archive/version             "3\\n"

Each record is a local header, padded so that its content begins at a multiple of 64 (what mmap needs), the
content, and its checksum behind it; hence nothing is ever written twice. torch's reader may compute where a
storage lies instead of looking it up (`_get_offset` in torch/serialization.py), so headers are those of its
own writer, to the byte (PyTorch's caffe2/serialize/inline_container.cc, getPadding, and third_party/miniz,
mz_zip_writer_add_mem_ex_v2).
"""

from __future__ import annotations

import io
import pickle
import struct
import zlib
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch

from qexport.checkpoint.tensors import DTYPE_NAMES, TensorInfo

_ARCHIVE = "archive"  # torch.save takes the file's stem, and this when it has none; readers take any
_ALIGNMENT = 64
_MAX_32 = 0xFFFFFFFF  # a size or offset from here on stands in a zip64 field
_UTF8, _CHECKSUM_BEHIND = 1 << 11, 1 << 3  # zip's general purpose flags
_PROTOCOL = 2  # torch.save's, and the newest that weights_only=True reads

# The dtypes that have a storage type of their own; newer ones are a dtype upon an untyped storage.
_STORAGES: dict[torch.dtype, type] = {
    torch.float64: torch.DoubleStorage,
    torch.float32: torch.FloatStorage,
    torch.float16: torch.HalfStorage,
    torch.bfloat16: torch.BFloat16Storage,
    torch.int64: torch.LongStorage,
    torch.int32: torch.IntStorage,
    torch.int16: torch.ShortStorage,
    torch.int8: torch.CharStorage,
    torch.uint8: torch.ByteStorage,
    torch.bool: torch.BoolStorage,
}


# What is pickled, made of the dict of names and (stand-ins for) tensors; each may stand in it more than once.
Arrange = Callable[[Mapping[str, Any]], Any]


@dataclass(frozen=True)
class Record:
    """One file of the archive: where its local header begins, how long it is, and what is known of it.

    `content` is None for a storage, whose bytes come later.
    """

    name: bytes
    offset: int
    size: int
    content: bytes | None

    def _zip64(self, compressed: int) -> bytes:
        """The field for numbers too large for 32 bits, with just those; empty when there is none.

        miniz's ways: a local header tells its own offset, and 0 for the size after compression.
        """
        large = [self.size, compressed] if self.size >= _MAX_32 else []
        large += [self.offset] if self.offset >= _MAX_32 else []
        return struct.pack(f"<HH{len(large)}Q", 1, 8 * len(large), *large) if large else b""

    @property
    def _flags(self) -> int:
        return _UTF8 | (_CHECKSUM_BEHIND if self.size else 0)

    @property
    def header(self) -> bytes:
        """What stands in front of the content; checksum and sizes, zero here, stand behind it."""
        zip64 = self._zip64(0)
        start = self.offset + 30 + len(self.name) + len(zip64) + 4
        padding = -start % _ALIGNMENT
        extra = zip64 + struct.pack("<2sH", b"FB", padding) + b"Z" * padding
        sizes = (len(self.name), len(extra))
        fixed = struct.pack("<4s5H3I2H", b"PK\3\4", 0, self._flags, 0, 0, 0, 0, 0, 0, *sizes)
        return fixed + self.name + extra

    def trailer(self, checksum: int) -> bytes:
        """What stands behind the content: `checksum` is its CRC-32. An empty record has none."""
        if not self.size:
            return b""
        numbers = "<4sI2Q" if self._zip64(0) else "<4s3I"
        return struct.pack(numbers, b"PK\7\10", checksum, self.size, self.size)

    def entry(self, checksum: int) -> bytes:
        """The record's line in the directory at the archive's end."""
        zip64, size, offset = self._zip64(self.size), min(self.size, _MAX_32), min(self.offset, _MAX_32)
        numbers = (0, 0, self._flags, 0, 0, 0, checksum, size, size, len(self.name), len(zip64), 0, 0, 0, 0)
        return struct.pack("<4s6H3I5H2I", b"PK\1\2", *numbers, offset) + self.name + zip64

    @property
    def end(self) -> int:
        """Where the next record begins."""
        return self.offset + len(self.header) + self.size + len(self.trailer(0))


def plan_records(tensors: Sequence[TensorInfo], arrange: Arrange = dict) -> list[Record]:
    """The archive's records, in order, with one storage a tensor. `arrange` makes what is pickled.

    Raises ValueError for a name that stands twice and for a dtype that checkpoints do not have.
    """
    if len({tensor.name for tensor in tensors}) != len(tensors):
        raise ValueError("a name stands twice")
    for tensor in tensors:
        if tensor.dtype not in DTYPE_NAMES:
            raise ValueError(f"{tensor.name} is {tensor.dtype}, which no checkpoint holds")
    contents: list[tuple[str, int | bytes]] = [
        ("data.pkl", _pickled(tensors, arrange)),
        (".format_version", b"1"),
        (".storage_alignment", str(_ALIGNMENT).encode()),
        ("byteorder", b"little"),
        *((f"data/{key}", tensor.size) for key, tensor in enumerate(tensors)),
        ("version", b"3\n"),
    ]
    records: list[Record] = []
    for name, content in contents:
        size, known = (content, None) if isinstance(content, int) else (len(content), content)
        offset = records[-1].end if records else 0
        records.append(Record(f"{_ARCHIVE}/{name}".encode(), offset, size, known))
    return records


def directory_bytes(records: Sequence[Record], checksums: Sequence[int]) -> bytes:
    """What stands behind the last record: one line a record, and where to find them."""
    lines = b"".join(record.entry(crc) for record, crc in zip(records, checksums, strict=True))
    start, count = records[-1].end, len(records)
    end = struct.pack("<4sQ2H2I4Q", b"PK\6\6", 44, 0x31E, 45, 0, 0, count, count, len(lines), start)
    end += struct.pack("<4sIQI", b"PK\6\7", 0, start + len(lines), 1)
    few, small = min(count, 0xFFFF), (min(len(lines), _MAX_32), min(start, _MAX_32))
    return lines + end + struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, few, few, *small, 0)


def file_size(tensors: Sequence[TensorInfo]) -> int:
    """Bytes of the whole file: the tensors', and what the format adds."""
    records = plan_records(tensors)
    return records[-1].end + len(directory_bytes(records, [0] * len(records)))


class TorchFile:
    """A file being written: `write` the tensors' bytes in the planned order, then `close`.

    Holds no more than the piece being written, and no open file in between: a model may have more shards
    than a process may have open files. An OSError is left to the caller, who knows the output's name.
    """

    def __init__(self, path: Path, tensors: Sequence[TensorInfo], arrange: Arrange = dict) -> None:
        self._path = path
        self._records = plan_records(tensors, arrange)
        self._checksums: list[int] = []  # of the records that are whole
        self._checksum, self._left = 0, 0  # of the record being written: so far, and bytes to come
        with path.open("wb") as file:
            self._advance(file)

    def write(self, raw: bytes | bytearray | memoryview) -> None:
        """The next bytes, little-endian: any number of them, also across tensors."""
        if not memoryview(raw).nbytes:
            return  # an empty view of several sides cannot be cast
        rest = memoryview(raw).cast("B")
        with self._path.open("ab") as file:
            while rest:
                if not self._left:
                    raise ValueError(f"{self._path} has all its bytes, and {len(rest)} more came")
                count = min(self._left, len(rest))
                self._put(file, rest[:count])
                rest = rest[count:]
                self._advance(file)

    def _advance(self, file: BinaryIO) -> None:
        """Begins records up to the next whose bytes have yet to come."""
        while not self._left and len(self._checksums) < len(self._records):
            record = self._records[len(self._checksums)]
            file.write(record.header)
            self._checksum, self._left = 0, record.size
            if record.content is not None or not record.size:
                self._put(file, record.content or b"")

    def _put(self, file: BinaryIO, part: bytes | memoryview) -> None:
        """Bytes of the record being written, which ends with the last of them."""
        file.write(part)
        self._checksum = zlib.crc32(part, self._checksum)
        self._left -= len(part)
        if not self._left:
            file.write(self._records[len(self._checksums)].trailer(self._checksum))
            self._checksums.append(self._checksum)

    def close(self) -> None:
        """Ends the archive. Raises RuntimeError when bytes are missing."""
        if len(self._checksums) < len(self._records):
            record = self._records[len(self._checksums)]
            raise RuntimeError(
                f"{self._path} lacks {self._left} of the {record.size} bytes of {record.name.decode()}"
            )
        with self._path.open("ab") as file:
            file.write(directory_bytes(self._records, self._checksums))


class _Storage:
    """Stands for a tensor's bytes in the pickle."""

    def __init__(self, tensor: TensorInfo, key: str) -> None:
        typed = _STORAGES.get(tensor.dtype)
        kind, count = (typed, tensor.numel) if typed else (torch.UntypedStorage, tensor.size)
        self.persistent_id = ("storage", kind, key, "cpu", count)


class _Tensor:
    """Pickles as a contiguous torch.Tensor does, without its bytes."""

    def __init__(self, tensor: TensorInfo, key: str) -> None:
        self._info, self._key = tensor, key

    def __reduce__(self) -> tuple[Any, ...]:
        shape, dtype = self._info.shape, self._info.dtype
        strides: list[int] = []
        step = 1
        for side in reversed(shape):
            strides.append(step)
            step *= max(side, 1)
        # storage, offset, shape, strides, no gradient, no hooks
        hooks: OrderedDict[Any, Any] = OrderedDict()
        arguments = (_Storage(self._info, self._key), 0, shape, tuple(reversed(strides)), False, hooks)
        if dtype in _STORAGES:
            return torch._utils._rebuild_tensor_v2, arguments
        return torch._utils._rebuild_tensor_v3, (*arguments, dtype)


class _Pickler(pickle.Pickler):
    def persistent_id(self, value: Any) -> Any:
        return value.persistent_id if isinstance(value, _Storage) else None


def _pickled(tensors: Sequence[TensorInfo], arrange: Arrange) -> bytes:
    stream = io.BytesIO()
    _Pickler(stream, _PROTOCOL).dump(arrange({t.name: _Tensor(t, str(key)) for key, t in enumerate(tensors)}))
    return stream.getvalue()
