"""Writing GGUF files: the header at once, the tensors' bytes in any order, each hashed on its way."""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from pathlib import Path

from qexport.checkpoint.weights_files import HashedFile, LastOpened
from qexport.formats.gguf.container import (
    ALIGNMENT,
    ALIGNMENT_KEY,
    MAGIC,
    MAX_SIDES,
    VERSION,
    PlannedTensor,
    Typed,
    padded,
    u32,
)
from qexport.formats.gguf.values import string_bytes, value_bytes

_NAME_BYTES = 64  # ggml.h, GGML_MAX_NAME: the zero at its end included


def tensor_offsets(tensors: Sequence[PlannedTensor], alignment: int = ALIGNMENT) -> dict[str, int]:
    """Where each tensor begins, counted from the end of the header's bytes."""
    offsets: dict[str, int] = {}
    end = 0
    for tensor in tensors:
        offsets[tensor.name] = end
        end += padded(tensor.size, alignment)
    return offsets


def header_bytes(
    metadata: Mapping[str, Typed], tensors: Sequence[PlannedTensor], alignment: int = ALIGNMENT
) -> bytes:
    """All that stands before the data of a file with these tensors in this order, padding included.

    An alignment other than 32 becomes a setting. Raises ValueError for tensors that ggml cannot hold.
    """
    if alignment != ALIGNMENT:
        metadata = {**metadata, ALIGNMENT_KEY: u32(alignment)}
    elif metadata.get(ALIGNMENT_KEY, u32(alignment)).value != alignment:
        raise ValueError(f"{ALIGNMENT_KEY} is not the alignment of the tensors")
    offsets = tensor_offsets(tensors, alignment)
    if len(offsets) != len(tensors):
        raise ValueError("a tensor stands twice")
    parts = [MAGIC, struct.pack("<IQQ", VERSION, len(tensors), len(metadata))]
    for key, typed in metadata.items():
        parts += string_bytes(key), value_bytes(typed.kind, typed.value)
    for tensor in tensors:
        name = string_bytes(tensor.name)
        if len(name) - 8 >= _NAME_BYTES or len(tensor.shape) > MAX_SIDES:
            raise ValueError(f"ggml holds no tensor {tensor.name} {tensor.shape}: a name or a side too long")
        if tensor.shape and not tensor.type.holds(tensor.shape[-1]):
            raise ValueError(
                f"rows of {tensor.name} {tensor.shape} are no whole blocks of {tensor.type.name}"
            )
        sides = struct.pack(f"<I{len(tensor.shape)}Q", len(tensor.shape), *reversed(tensor.shape))
        parts += name, sides, struct.pack("<IQ", tensor.type.number, offsets[tensor.name])
    raw = b"".join(parts)
    return raw + bytes(-len(raw) % alignment)


class GgufFile(HashedFile):
    """A GGUF file that is being written: every tensor's place is known, so pieces may come in any order.

    See `WeightsFile`. Raises OSError.
    """

    def __init__(
        self,
        path: Path,
        metadata: Mapping[str, Typed],
        tensors: Sequence[PlannedTensor],
        opened: LastOpened,
        alignment: int = ALIGNMENT,
    ) -> None:
        header = header_bytes(metadata, tensors, alignment)
        super().__init__(path, header, opened)
        offsets = tensor_offsets(tensors, alignment)
        self._places = {tensor.name: (len(header) + offsets[tensor.name], tensor.size) for tensor in tensors}
        self._alignment = alignment

    def write(self, name: str, begin: int, piece: memoryview) -> None:
        """`piece` stands at byte `begin` of the tensor `name`; zeros follow the tensor's last one."""
        place, size = self._places[name]
        end = begin + len(piece)
        if end > size:
            raise ValueError(f"{end - size} bytes too many for {name}")
        self.put(place + begin, piece)
        if end == size and (padding := -size % self._alignment):
            self.put(place + size, memoryview(bytes(padding)))
