"""What ggml's encoders and decoders share: rows cut into blocks, bytes into numbers, kernels."""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from qexport.errors import MissingDependencyError, SpecError
from qexport.grids.ggml.device import blocks as device

_CPU = torch.device("cpu")


def in_blocks(weight: torch.Tensor, width: int) -> npt.NDArray[np.float32]:
    """See `device.blocks`; for compiled kernels."""
    values: npt.NDArray[np.float32] = device.in_blocks(weight, width).numpy()
    return values


def importance_of_blocks(importance: torch.Tensor | None, inputs: int, width: int) -> npt.NDArray[np.float32]:
    """See `device.blocks`; for compiled kernels, wherever importances lie."""
    groups = device.importance_of_blocks(importance, inputs, width, _CPU)
    found: npt.NDArray[np.float32] = groups.numpy()
    return found


def as_rows(blocks: npt.NDArray[np.uint8], rows: int) -> torch.Tensor:
    """Blocks uint8 [blocks, bytes] as the bytes of rows, [rows, bytes]."""
    return torch.from_numpy(blocks.reshape(rows, blocks.size // max(rows, 1)))


def cut(blocks: torch.Tensor, size: int) -> torch.Tensor:
    """Bytes uint8 [rows, bytes] as [rows, blocks, size]. Raises SpecError for a part of a block."""
    if blocks.shape[1] % size:
        raise SpecError(f"rows of {blocks.shape[1]} bytes", expected=f"whole blocks of {size}")
    return blocks.reshape(len(blocks), blocks.shape[1] // size, size)


def halves(parts: torch.Tensor) -> torch.Tensor:
    """Bytes uint8 [..., 2 n] that are fp16 numbers, as fp32 [..., n]."""
    return parts.contiguous().view(torch.float16).float()


def half_bytes(values: torch.Tensor) -> torch.Tensor:
    """fp16 numbers [...] as bytes uint8 [..., 2]."""
    return values.contiguous().view(torch.uint8).reshape(*values.shape, 2)


def nibbles(parts: torch.Tensor) -> torch.Tensor:
    """Bytes uint8 [..., 16] -> codes uint8 [..., 32]: the low four bits of all, and then the high ones."""
    return torch.cat((parts & 15, parts >> 4), dim=-1)


def from_nibbles(codes: torch.Tensor) -> torch.Tensor:
    """Codes uint8 [..., 32] -> bytes uint8 [..., 16], as `nibbles` reads them."""
    first, second = codes.chunk(2, dim=-1)
    return (first & 15) | (second << 4)


def reciprocal(step: torch.Tensor) -> torch.Tensor:
    """1 / step, and 0 where the step is 0."""
    return torch.where(step == 0, torch.zeros_like(step), step.reciprocal())


def in_torch(weight: torch.Tensor) -> bool:
    """Whether a weight is encoded in torch (`device`): the compiled kernels run on CPUs alone."""
    return weight.device.type != "cpu"


def kernels(name: str) -> Any:
    """A module of compiled kernels beside this one. Raises MissingDependencyError where numba is absent."""
    try:
        return importlib.import_module(f"qexport.grids.ggml.{name}")
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in ("numba", "llvmlite"):
            raise
        raise MissingDependencyError(
            f"quantizing to GGUF types needs {error.name}, which is not installed",
            remedy="pip install 'qexport[gguf]'",
        ) from error
