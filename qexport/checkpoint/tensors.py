"""What is known of a tensor before its bytes are read: name, dtype, shape, size."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

# safetensors' dtype names (https://huggingface.co/docs/safetensors, "Format").
DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
DTYPE_NAMES: dict[torch.dtype, str] = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class TensorInfo:
    """A named tensor's dtype and shape; everything that planning a file needs."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Bytes on disk."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def numel(self) -> int:
        """Number of values."""
        return math.prod(self.shape)
