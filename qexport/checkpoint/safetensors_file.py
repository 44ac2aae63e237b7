"""One safetensors file: its header, checked before anything is allocated, and its tensors, by `pread`.

Format: 8 bytes little-endian header length n, n bytes of JSON, then the tensors' bytes without holes
(https://huggingface.co/docs/safetensors, "Format"). Files are read with `pread` and not mapped:
mapped pages count as this process's resident memory.
"""

from __future__ import annotations

import json
import math
import os
import reprlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from qexport.checkpoint.disk import read_errors
from qexport.checkpoint.tensors import DTYPE_NAMES, DTYPES, TensorInfo
from qexport.errors import CorruptFileError

MAX_HEADER_BYTES = 100_000_000  # the limit of the reference implementation
_MAX_NATURAL = 1 << 63
MAX_TRANSFER = 1 << 30  # macOS refuses single reads beyond 2 GiB
_MAX_SIDES = 64  # torch's own limit
_REMEDY = "download or write the file again"


@dataclass(frozen=True)
class StoredTensor(TensorInfo):
    """A tensor and where its bytes lie: `offset` counts from the start of `file`."""

    file: Path
    offset: int


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    keys = dict(pairs)
    if len(keys) != len(pairs):
        raise ValueError("a name stands twice")
    return keys


def read_header(path: Path) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    """The tensors of a safetensors file, in file order, and its metadata.

    Raises CorruptFileError when the header is no header, or contradicts itself or the file's size.
    """

    def corrupt(found: str) -> CorruptFileError:
        return CorruptFileError(f"{path} is not a whole safetensors file: {found}", remedy=_REMEDY)

    with read_errors(path), path.open("rb") as file:
        file_size = os.fstat(file.fileno()).st_size
        prefix = file.read(8)
        if len(prefix) < 8:
            raise corrupt(f"it has {file_size} bytes, fewer than its length field")
        length = int.from_bytes(prefix, "little")
        if length > min(file_size - 8, MAX_HEADER_BYTES):
            raise corrupt(f"its header claims {length} bytes, the file has {file_size}")
        raw = file.read(length)
    try:
        header = json.loads(raw.decode("utf-8"), object_pairs_hook=_unique_keys)
        if not isinstance(header, dict):
            raise ValueError("no object")
    except (ValueError, RecursionError) as error:
        raise corrupt(f"its header is not the JSON it should be ({error})") from error

    metadata = header.pop("__metadata__", None)
    if metadata is None:  # mlx writes a null where there is none, and the reference reads it
        metadata = {}
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise corrupt("its metadata is not an object of texts")
    data_start = 8 + length
    tensors: list[StoredTensor] = []
    for name, entry in header.items():
        tensors.append(_stored_tensor(name, entry, path, data_start, corrupt))
    tensors.sort(key=lambda tensor: (tensor.offset, tensor.size))
    end = data_start
    for tensor in tensors:
        if tensor.offset != end:
            raise corrupt(f"tensor {reprlib.repr(tensor.name)} begins at {tensor.offset}, expected {end}")
        end += tensor.size
    if end != file_size:
        raise corrupt(f"its tensors end at byte {end}, the file has {file_size}")
    return {tensor.name: tensor for tensor in tensors}, metadata


def _stored_tensor(name: str, entry: Any, path: Path, data_start: int, corrupt: Any) -> StoredTensor:
    def natural(value: Any) -> bool:
        return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < _MAX_NATURAL

    shown = reprlib.repr(name)  # what stands in a hostile file may be of any length
    try:
        name.encode("utf-8")
    except UnicodeEncodeError:
        raise corrupt(f"the name {shown} is no text") from None
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise corrupt(f"the entry of {shown} is not dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise corrupt(f"tensor {shown} has the unknown dtype {reprlib.repr(dtype)}")
    if not isinstance(shape, list) or len(shape) > _MAX_SIDES or not all(map(natural, shape)):
        raise corrupt(f"tensor {shown} has an impossible shape")
    if not (isinstance(offsets, list) and len(offsets) == 2 and all(map(natural, offsets))):
        raise corrupt(f"tensor {shown} has impossible offsets")
    # the sides' product, a zero among them left aside, must be a size too: torch would overflow
    if math.prod(side for side in shape if side) * DTYPES[dtype].itemsize >= _MAX_NATURAL:
        raise corrupt(f"tensor {shown} has an impossible shape")
    begin, end = offsets
    expected = math.prod(shape) * DTYPES[dtype].itemsize
    if end - begin != expected:
        raise corrupt(f"tensor {shown} has {end - begin} bytes, its shape needs {expected}")
    return StoredTensor(name, DTYPES[dtype], tuple(shape), path, data_start + begin)


def read_into(tensor: StoredTensor, view: memoryview, begin: int = 0) -> None:
    """Fills `view`, of bytes, with the tensor's bytes from byte `begin` on, as they stand in the file."""
    with read_errors(tensor.file):
        descriptor = os.open(tensor.file, os.O_RDONLY)
        try:
            done = 0
            while done < len(view):
                part = view[done : done + MAX_TRANSFER]
                count = os.preadv(descriptor, [part], tensor.offset + begin + done)
                if count == 0:
                    raise CorruptFileError(
                        f"{tensor.file} ends within tensor {tensor.name!r}", remedy=_REMEDY
                    )
                done += count
        finally:
            os.close(descriptor)


def read_tensor(tensor: StoredTensor) -> torch.Tensor:
    """The tensor itself: dtype and shape as stored, in memory of its own."""
    return read_rows(tensor, 0, tensor.shape[0]) if tensor.shape else read_values(tensor, 0, 1).reshape(())


def read_rows(tensor: StoredTensor, begin: int, end: int) -> torch.Tensor:
    """Rows `begin` to `end` of the tensor, along its first side."""
    width = math.prod(tensor.shape[1:])
    return read_values(tensor, begin * width, end * width).reshape(end - begin, *tensor.shape[1:])


def read_values(tensor: StoredTensor, begin: int, end: int) -> torch.Tensor:
    """The values `begin` to `end` of the tensor, flat, in memory of their own."""
    if not 0 <= begin <= end <= tensor.numel:
        raise ValueError(f"{tensor.name} has {tensor.numel} values, asked for were {begin} to {end}")
    values = torch.empty(end - begin, dtype=tensor.dtype)
    read_into(tensor, byte_view(values), begin * tensor.dtype.itemsize)
    return values


def byte_view(values: torch.Tensor) -> memoryview:
    """The memory of a contiguous tensor as bytes."""
    flat: Any = values.reshape(-1).view(torch.uint8).numpy()
    return memoryview(flat)


def iter_values(tensor: StoredTensor, chunk: int = 1 << 24) -> Iterator[torch.Tensor]:
    """The tensor's values, flat, at most `chunk` bytes of them at a time."""
    step = max(chunk // tensor.dtype.itemsize, 1)
    for begin in range(0, tensor.numel, step):
        yield read_values(tensor, begin, min(begin + step, tensor.numel))


def header_bytes(tensors: Sequence[TensorInfo]) -> bytes:
    """Length field and header of a file that holds `tensors` in this order.

    Padded with spaces so that the data begins at a multiple of 8, as the reference writer does.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for tensor in tensors:
        header[tensor.name] = {
            "dtype": DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + tensor.size],
        }
        offset += tensor.size
    raw = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    raw += b" " * (-len(raw) % 8)
    return len(raw).to_bytes(8, "little") + raw
