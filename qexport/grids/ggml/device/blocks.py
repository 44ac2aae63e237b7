"""Rows cut into blocks, and the importance of their weights, in torch: on any device."""

from __future__ import annotations

from collections.abc import Callable

import torch

from qexport.errors import SpecError

# of the mean importance of a block: weights that are never excited in calibration stay near, too
_FLOOR = 1e-4
# weights that are encoded together: of some 24 bytes each, temporaries stay below 512 MB
_AT_ONCE = 2**24


def in_blocks(weight: torch.Tensor, width: int) -> torch.Tensor:
    """fp32 [rows, in] as [rows * in / width, width], the same memory where that is contiguous.

    Raises SpecError where rows are no whole number of blocks.
    """
    if weight.ndim != 2 or weight.shape[1] % width:
        raise SpecError(
            f"a weight of shape {tuple(weight.shape)}",
            expected=f"rows of a multiple of {width} inputs",
            remedy="choose a type of smaller blocks, or f16",
        )
    return weight.detach().float().contiguous().reshape(weight.numel() // width, width)


def importance_of_blocks(
    importance: torch.Tensor | None, inputs: int, width: int, device: torch.device
) -> torch.Tensor:
    """Importances fp32 [in] as [in / width, width], of mean about 1 in each block; ones where there are none.

    Blocks without any importance have ones, too. It is for weights on `device`, wherever importances lie.
    Raises SpecError for another number of them.
    """
    if importance is None:
        return torch.ones(1, width, device=device)
    if importance.shape != (inputs,):
        raise SpecError(
            f"importances of shape {tuple(importance.shape)}", expected=f"one each of {inputs} inputs"
        )
    groups = importance.detach().double().clamp(min=0).reshape(-1, width)
    mean = groups.mean(dim=1, keepdim=True)
    scaled = torch.where(mean > 0, groups / mean + _FLOOR, torch.ones_like(groups))
    return scaled.float().to(device)


def by_rows(
    weight: torch.Tensor, width: int, size: int, encode: Callable[[torch.Tensor], torch.Tensor]
) -> torch.Tensor:
    """Blocks uint8 [rows, bytes] of fp32 [rows, in], made of some rows at a time.

    `encode` makes blocks uint8 [some, bytes], `size` a block, of fp32 [some, in / width, width]. Raises
    SpecError where rows are no whole number of blocks.
    """
    values = in_blocks(weight, width).reshape(len(weight), weight.shape[1] // width, width)
    blocks = torch.empty(len(values), values.shape[1] * size, dtype=torch.uint8, device=weight.device)
    rows = max(1, _AT_ONCE // max(1, weight.shape[1]))
    for begin in range(0, len(values), rows):
        blocks[begin : begin + rows] = encode(values[begin : begin + rows])
    return blocks
