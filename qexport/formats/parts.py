"""Checks of a packed layer's stored parts, the same in every reader."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import torch

from qexport.checkpoint.safetensors_file import StoredTensor
from qexport.errors import CorruptFileError

FLOATS = (torch.float16, torch.bfloat16, torch.float32)


def require_part(
    stored: Mapping[str, StoredTensor],
    module: str,
    part: str,
    *,
    dtypes: Collection[torch.dtype],
    sides: Collection[int],
    parts: Sequence[str],
) -> StoredTensor:
    """The tensor `module.part`, which must have one of these dtypes and numbers of sides, and be not empty.

    `parts` are all that such a layer has. Raises CorruptFileError.
    """
    tensor = stored.get(f"{module}.{part}")
    if tensor is None:
        raise CorruptFileError(f"{module} has no {part}", expected=", ".join(parts))
    if len(tensor.shape) not in sides or tensor.dtype not in dtypes or not tensor.numel:
        raise CorruptFileError(
            f"{tensor.name} is {tensor.dtype} {list(tensor.shape)}",
            expected=f"{' or '.join(map(str, sides))} dimensions, "
            + " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes),
        )
    return tensor


def misfit(module: str, tensors: Sequence[StoredTensor], expected: str) -> CorruptFileError:
    """The error for parts that are each in order, but do not fit together."""
    shapes = ", ".join(f"{t.name.rpartition('.')[2]} {list(t.shape)}" for t in tensors)
    return CorruptFileError(f"the tensors of {module} do not fit together: {shapes}", expected=expected)
