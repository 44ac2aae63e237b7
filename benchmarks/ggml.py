"""ggml's own encoders, out of the wheel of xllamacpp, to measure against: `ggml_quantize_chunk` by ctypes."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import torch

from qexport.grids.ggml.types import BlockType


@cache
def library() -> Any:
    """ggml's C functions, its tables made."""
    import xllamacpp

    found: Any = ctypes.CDLL(str(next(Path(xllamacpp.__file__).parent.glob("*.so"))))
    found.ggml_quantize_chunk.restype = ctypes.c_size_t
    found.ggml_quantize_chunk.argtypes = [
        ctypes.c_int,
        *(ctypes.c_void_p, ctypes.c_void_p),
        *(ctypes.c_int64, ctypes.c_int64, ctypes.c_int64),
        ctypes.c_void_p,
    ]
    return found


def encode(kind: BlockType, weight: torch.Tensor, importance: torch.Tensor | None = None) -> torch.Tensor:
    """What `kind.encode` gives, by ggml."""
    library().ggml_quantize_init(kind.number)
    rows, inputs = weight.shape
    weight = weight.float().contiguous()
    held = None if importance is None else importance.float().contiguous()
    out = torch.empty(rows, kind.row_bytes(inputs), dtype=torch.uint8)
    library().ggml_quantize_chunk(
        kind.number,
        weight.data_ptr(),
        out.data_ptr(),
        *(0, rows, inputs),
        None if held is None else held.data_ptr(),
    )
    return out


@contextlib.contextmanager
def in_our_place() -> Iterator[None]:
    """Within it, qexport writes what ggml's encoders make: the same files, but for the codes."""
    ours = BlockType.encode

    def theirs(kind: BlockType, weight: torch.Tensor, importance: torch.Tensor | None = None) -> torch.Tensor:
        if kind.values == 1:
            return ours(kind, weight, importance)
        return encode(kind, weight, importance)

    BlockType.encode = theirs  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        BlockType.encode = ours  # type: ignore[method-assign]
