"""GGUF's bytes: a header of typed settings, a table of tensors, their data (ggml/docs/gguf.md, version 3).

    "GGUF"  version u32  tensors u64  settings u64
    each setting:  key, kind of value, value                          (values.py)
    each tensor:   name, sides u32, each side u64 (the row first), type u32, offset u64 from the data's start
    zeros up to the alignment, then the tensors' bytes, each from an aligned place on

Files are read with `pread` and not mapped, as safetensors are. Version 2 is as 3 is; 1 had shorter counts.
"""

from __future__ import annotations

import math
import os
import reprlib
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from qexport.checkpoint.disk import read_errors
from qexport.checkpoint.safetensors_file import StoredTensor, read_rows
from qexport.errors import CorruptFileError
from qexport.formats.gguf.values import MAX_NAME_BYTES, Cursor
from qexport.grids.ggml.types import BY_NUMBER, BlockType

MAGIC = b"GGUF"
VERSION = 3
ALIGNMENT = 32
ALIGNMENT_KEY = "general.alignment"
MAX_SIDES = 4  # ggml.h, GGML_MAX_DIMS
MAX_ENTRIES = (
    65_536  # settings, and tensors: real files have some tens and a few thousand; each is an object here
)
_MAX_NATURAL = 1 << 63
_MAX_ALIGNMENT = 1 << 20
_REMEDY = "download or write the file again"

# Types that stand in files and have no encoder here (ggml.h, `enum ggml_type`).
_OTHERS = (
    BlockType("iq1_s", 19, 256, 50, ""),
    BlockType("iq1_m", 29, 256, 56, ""),
    BlockType("nvfp4", 40, 64, 36, ""),
    BlockType("q1_0", 41, 128, 18, ""),
    BlockType("i8", 24, 1, 1, ""),
    BlockType("i16", 25, 1, 2, ""),
    BlockType("i32", 26, 1, 4, ""),
    BlockType("i64", 27, 1, 8, ""),
    BlockType("f64", 28, 1, 8, ""),
)
READABLE: Mapping[int, BlockType] = {**BY_NUMBER, **{row.number: row for row in _OTHERS}}
PLAIN: Mapping[str, torch.dtype] = {
    "f32": torch.float32,
    "f16": torch.float16,
    "bf16": torch.bfloat16,
    "f64": torch.float64,
    "i8": torch.int8,
    "i16": torch.int16,
    "i32": torch.int32,
    "i64": torch.int64,
}
"""Types that are no blocks: a value each."""


@dataclass(frozen=True)
class Typed:
    """A setting's value and the type that it has in the file: u8 i8 u16 i16 u32 i32 u64 i64 f32 f64 bool
    str, or one of these in square brackets for an array of them."""

    kind: str
    value: Any


Metadata = dict[str, Typed]


def u32(value: int) -> Typed:
    """A whole number as most settings have it."""
    return Typed("u32", int(value))


def f32(value: float) -> Typed:
    """A real number as most settings have it."""
    return Typed("f32", float(value))


def boolean(value: bool) -> Typed:
    """Yes or no."""
    return Typed("bool", bool(value))


def text(value: str) -> Typed:
    """A string."""
    return Typed("str", str(value))


def array(kind: str, values: Iterable[Any]) -> Typed:
    """Values of one kind."""
    return Typed(f"[{kind}]", list(values))


@dataclass(frozen=True)
class PlannedTensor:
    """A tensor before its bytes are there; `shape` as torch has it, the row last."""

    name: str
    type: BlockType
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        """Number of values."""
        return math.prod(self.shape)

    @property
    def size(self) -> int:
        """Bytes on disk, padding left aside."""
        return self.numel // self.type.values * self.type.size


@dataclass(frozen=True)
class StoredBlocks(PlannedTensor):
    """A tensor and where its bytes lie: `offset` counts from the start of `file`."""

    file: Path
    offset: int

    def as_stored(self) -> StoredTensor:
        """The tensor as it lies there: its values, or uint8 [..., bytes of a row] where it is blocks."""
        if dtype := PLAIN.get(self.type.name):
            return StoredTensor(self.name, dtype, self.shape, self.file, self.offset)
        rows = (*self.shape[:-1], self.type.row_bytes(self.shape[-1]))
        return StoredTensor(self.name, torch.uint8, rows, self.file, self.offset)

    def read_rows(self, begin: int, end: int) -> torch.Tensor:
        """Rows `begin` to `end` along the last side but one, all sides before it counted through.

        [rows, values] of a plain type, else uint8 [rows, bytes].
        """
        stored = self.as_stored()
        width = stored.shape[-1] if stored.shape else 1
        rows = stored.numel // width if width else 0
        flat = StoredTensor(self.name, stored.dtype, (rows, width), self.file, self.offset)
        return read_rows(flat, begin, end)


@dataclass(frozen=True)
class Header:
    """What stands before the data; of a split model the first file's settings and all files' tensors."""

    path: Path
    version: int
    metadata: Metadata
    tensors: dict[str, StoredBlocks]
    alignment: int = ALIGNMENT
    files: tuple[Path, ...] = ()

    def plain(self) -> dict[str, Any]:
        """The settings' values without their types."""
        return {key: typed.value for key, typed in self.metadata.items()}


def read_header(path: Path) -> Header:
    """The settings and the tensors of one GGUF file, in its order.

    Raises CorruptFileError when it is none, or contradicts itself or the file's size, and StorageError.
    """

    def corrupt(found: str) -> CorruptFileError:
        return CorruptFileError(f"{path} is not a whole GGUF file: {found}", remedy=_REMEDY)

    with read_errors(path):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            cursor = Cursor(descriptor, os.fstat(descriptor).st_size, corrupt)
            version = _version(cursor, path)
            count = cursor.number("u64", "its count of tensors")
            _require_room(
                count, "tensors", 24, cursor
            )  # each has the length of a name, sides, type and offset
            settings = cursor.number("u64", "its count of settings")
            metadata = _read_settings(cursor, settings)
            alignment = _alignment(cursor, metadata)
            infos = _read_infos(cursor, count)
        finally:
            os.close(descriptor)
    start = padded(cursor.place, alignment)
    tensors = {name: _placed(info, offset, start, path) for name, (info, offset) in infos.items()}
    _check_places(tensors, start, alignment, cursor)
    return Header(path, version, metadata, tensors, alignment, (path,))


def _version(cursor: Cursor, path: Path) -> int:
    cursor.need(8, "its beginning")
    magic = struct.pack("<I", cursor.number("u32", "its beginning"))
    if magic != MAGIC:
        older = magic in (b"lmgg", b"tjgg", b"fmgg", b"algg")
        raise CorruptFileError(
            f"{path} is no GGUF file: it begins with {magic!r}"
            + (", an older form of ggml" if older else ""),
            expected=f"a file that begins with {MAGIC!r}",
        )
    version = int(cursor.number("u32", "its version"))
    if version & 0xFFFF == 0 and version:
        raise CorruptFileError(
            f"{path} is a big-endian GGUF file", expected="little endian, as nearly all machines have it"
        )
    if version not in (2, VERSION):
        raise CorruptFileError(
            f"{path} is GGUF version {version}",
            expected="version 2 or 3",
            remedy="" if version > VERSION else "write it again with a newer llama.cpp",
        )
    return version


def _require_room(count: int, what: str, least: int, cursor: Cursor) -> None:
    if count > MAX_ENTRIES:
        raise cursor.corrupt(f"it claims {count} {what}, it may have {MAX_ENTRIES}")
    if count * least > cursor.file_size:
        raise cursor.corrupt(f"it claims {count} {what} in {cursor.file_size} bytes")


def _read_settings(cursor: Cursor, count: int) -> Metadata:
    _require_room(count, "settings", 13, cursor)  # each has the length of a key, a kind and a byte at least
    metadata: Metadata = {}
    for _ in range(count):
        key = cursor.string("the key of a setting", MAX_NAME_BYTES)
        shown = reprlib.repr(key)
        if key in metadata or not key:
            raise cursor.corrupt(f"the setting {shown} stands twice" if key else "a setting has no name")
        metadata[key] = Typed(*cursor.value(f"the setting {shown}"))
    return metadata


def _alignment(cursor: Cursor, metadata: Metadata) -> int:
    typed = metadata.get(ALIGNMENT_KEY, u32(ALIGNMENT))
    value = typed.value
    if typed.kind != "u32" or not 0 < value <= _MAX_ALIGNMENT or value & (value - 1):
        raise cursor.corrupt(f"its alignment is {reprlib.repr(value)}, no power of two")
    return int(value)


def _read_infos(cursor: Cursor, count: int) -> dict[str, tuple[PlannedTensor, int]]:
    infos: dict[str, tuple[PlannedTensor, int]] = {}
    for _ in range(count):
        name = cursor.string("the name of a tensor", MAX_NAME_BYTES)
        what = f"tensor {reprlib.repr(name)}"
        if name in infos:
            raise cursor.corrupt(f"{what} stands twice")
        sides = cursor.number("u32", what)
        if sides > MAX_SIDES:
            raise cursor.corrupt(f"{what} has {sides} sides, it may have {MAX_SIDES}")
        shape = tuple(reversed([cursor.number("u64", what) for _ in range(sides)]))
        number, offset = cursor.number("u32", what), cursor.number("u64", what)
        infos[name] = _info(name, number, shape, what, cursor), offset
    return infos


def _info(name: str, number: int, shape: tuple[int, ...], what: str, cursor: Cursor) -> PlannedTensor:
    found = READABLE.get(number)
    if found is None:
        raise CorruptFileError(
            f"{cursor.corrupt(f'{what} is of type {number}').found}",
            expected=f"one of {', '.join(row.name for row in READABLE.values())}",
            remedy="a type that is newer than this qexport needs a newer one",
        )
    # the sides' product, a zero among them left aside, must be a size too: torch would overflow
    if math.prod(side for side in shape if side) * found.size >= _MAX_NATURAL:
        raise cursor.corrupt(f"{what} has an impossible shape")
    if (shape[-1] if shape else 1) % found.values:
        raise cursor.corrupt(
            f"{what} has rows of {shape[-1] if shape else 1}, and {found.name} has blocks of {found.values}"
        )
    return PlannedTensor(name, found, shape)


def _placed(info: PlannedTensor, offset: int, start: int, path: Path) -> StoredBlocks:
    return StoredBlocks(info.name, info.type, info.shape, path, start + offset)


def _check_places(tensors: Mapping[str, StoredBlocks], start: int, alignment: int, cursor: Cursor) -> None:
    end = start
    for tensor in sorted(tensors.values(), key=lambda tensor: (tensor.offset, tensor.size)):
        what = f"tensor {reprlib.repr(tensor.name)}"
        if (tensor.offset - start) % alignment:
            raise cursor.corrupt(
                f"{what} begins at byte {tensor.offset}, which is not aligned to {alignment}"
            )
        if tensor.offset < end:
            raise cursor.corrupt(f"{what} begins at byte {tensor.offset}, within another that ends at {end}")
        end = tensor.offset + tensor.size
        if end > cursor.file_size:
            raise cursor.corrupt(f"{what} ends at byte {end}, the file has {cursor.file_size}")


def padded(size: int, alignment: int) -> int:
    """The next multiple of the alignment."""
    return size + -size % alignment
