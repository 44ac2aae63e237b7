"""What ggml's encoders and decoders share: rows cut into blocks, bytes into numbers, kernels."""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from qexport.errors import MissingDependencyError, SpecError

# of the mean importance of a block: weights that are never excited in calibration stay near, too
_FLOOR = 1e-4


def in_blocks(weight: torch.Tensor, width: int) -> npt.NDArray[np.float32]:
    """fp32 [rows, in] as [rows * in / width, width], the same memory where that is contiguous.

    Raises SpecError where rows are no whole number of blocks.
    """
    if weight.ndim != 2 or weight.shape[1] % width:
        raise SpecError(
            f"a weight of shape {tuple(weight.shape)}",
            expected=f"rows of a multiple of {width} inputs",
            remedy="choose a type of smaller blocks, or f16",
        )
    values: npt.NDArray[np.float32] = weight.detach().float().contiguous().numpy().reshape(-1, width)
    return values


def importance_of_blocks(importance: torch.Tensor | None, inputs: int, width: int) -> npt.NDArray[np.float32]:
    """Importances fp32 [in] as [in / width, width], of mean about 1 in each block; ones where there are none.

    Blocks without any importance have ones, too. Raises SpecError for another number of them.
    """
    if importance is None:
        return np.ones((1, width), np.float32)
    if importance.shape != (inputs,):
        raise SpecError(
            f"importances of shape {tuple(importance.shape)}", expected=f"one each of {inputs} inputs"
        )
    groups = importance.detach().double().clamp(min=0).reshape(-1, width)
    mean = groups.mean(dim=1, keepdim=True)
    scaled = torch.where(mean > 0, groups / mean + _FLOOR, torch.ones_like(groups))
    found: npt.NDArray[np.float32] = scaled.float().numpy()
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
